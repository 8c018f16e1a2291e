"""The DP optimizers behave as the Keras optimizers that they are named after."""

import copy
import inspect
import pickle
import pydoc

import keras
import numpy as np
import pytest
import tiny

import keras_dp

CLOSE = {"rtol": 2e-5, "atol": 1e-6}
PRIVATE = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
PAIRS = {
    "SGD": (keras_dp.DPSGD, keras.optimizers.SGD),
    "Adam": (keras_dp.DPAdam, keras.optimizers.Adam),
    "AdamW": (keras_dp.DPAdamW, keras.optimizers.AdamW),
    "Adagrad": (keras_dp.DPAdagrad, keras.optimizers.Adagrad),
    "RMSprop": (keras_dp.DPRMSprop, keras.optimizers.RMSprop),
}
pairs = pytest.mark.parametrize(("private", "ordinary"), PAIRS.values(), ids=PAIRS)
quiet = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=2, decay_rate=0.5)


def trained(optimizer, steps=4, **kwargs):
    """The weights after some steps on whole batches."""
    model = tiny.compiled(optimizer, hidden=3, **kwargs)
    for k in range(steps):
        model.train_on_batch(*tiny.data(16, seed=k))
    return tiny.weights_of(model), model


# -- the namesakes' own arguments -------------------------------------------------------------


@pairs
def test_takes_its_namesakes_arguments_by_position_and_by_name(private, ordinary):
    names = list(inspect.signature(ordinary.__init__).parameters)[1:4]
    defaults = ordinary().get_config()
    values = [0.25, *(defaults[n] or 0.125 for n in names[1:])]
    by_position = private(*values, **PRIVATE).inner_optimizer.get_config()
    by_name = private(**dict(zip(names, values, strict=True)), **PRIVATE)
    wanted = ordinary(*values).get_config()
    for got in (by_position, by_name.inner_optimizer.get_config()):
        assert {k: v for k, v in got.items() if k != "name"} == {
            k: v for k, v in wanted.items() if k != "name"
        }


@pairs
def test_its_defaults_are_its_namesakes(private, ordinary):
    got, wanted = private(**PRIVATE).inner_optimizer.get_config(), ordinary().get_config()
    assert {k: v for k, v in got.items() if k != "name"} == {
        k: v for k, v in wanted.items() if k != "name"
    }


@pairs
def test_signature_and_help_show_both_kinds_of_arguments(private, ordinary):
    signature = inspect.signature(private)
    own = list(inspect.signature(ordinary.__init__).parameters.values())[1:]
    for parameter in own:
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "name":
            assert signature.parameters[parameter.name].default == parameter.default
    for name in ("max_grad_norm", "noise_multiplier", "target_epsilon", "microbatch_size", "seed"):
        assert signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.parameters["max_grad_norm"].default is inspect.Parameter.empty
    text = pydoc.render_doc(private)
    assert "max_grad_norm" in text and "learning_rate" in text
    assert private.__doc__ and ">>>" in private.__doc__


@pairs
def test_an_argument_that_its_namesake_does_not_know_is_refused(private, ordinary):
    with pytest.raises((TypeError, ValueError), match="temperature"):
        private(0.1, temperature=3, **PRIVATE)


def test_max_grad_norm_has_no_default():
    with pytest.raises(TypeError, match="max_grad_norm"):
        keras_dp.DPSGD(0.1, noise_multiplier=1.0)
    with pytest.raises(TypeError, match="max_grad_norm"):
        keras_dp.DPOptimizer(keras.optimizers.SGD(), noise_multiplier=1.0)


# -- without noise and clipping it is the ordinary optimizer ----------------------------------

SETTINGS = {
    "SGD": (0.1, {}),
    "SGD, momentum": (0.1, {"momentum": 0.9, "nesterov": True}),
    "SGD, schedule": (schedule, {}),
    "SGD, weight decay": (0.1, {"weight_decay": 0.01}),
    "SGD, averaging": (0.1, {"use_ema": True, "ema_overwrite_frequency": 2, "ema_momentum": 0.5}),
    "SGD, accumulation": (0.1, {"gradient_accumulation_steps": 2}),
    "SGD, clipnorm": (0.1, {"clipnorm": 0.05}),
    "Adam": (0.05, {}),
    "AdamW": (0.05, {"weight_decay": 0.1}),
    "Adagrad": (0.1, {}),
    "RMSprop": (0.05, {"momentum": 0.5}),
}


@quiet
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.one_in(8)
def test_noiseless_and_unclipped_it_takes_its_namesakes_steps(setting):
    private, ordinary = PAIRS[setting.split(",")[0]]
    rate, kwargs = SETTINGS[setting]
    rate = rate() if callable(rate) else rate
    got, _ = trained(tiny.noiseless(private, rate, **kwargs))
    wanted, _ = trained(ordinary(rate, **kwargs))
    start = tiny.weights_of(tiny.model(hidden=3))
    assert not tiny.same(wanted, start, **CLOSE)
    assert tiny.same(got, wanted, **CLOSE)


@quiet
@pytest.mark.thorough
def test_wraps_any_keras_optimizer():
    got, _ = trained(tiny.noiseless(keras_dp.DPOptimizer, keras.optimizers.Nadam(0.05)))
    wanted, _ = trained(keras.optimizers.Nadam(0.05))
    assert tiny.same(got, wanted, **CLOSE)


@quiet
def test_constraints_hold_after_every_step():
    def model_with(optimizer):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        layer = model.layers[0]
        layer.kernel.assign(np.full((4, 3), 0.5))
        layer.kernel.constraint = keras.constraints.NonNeg()
        model.compile(optimizer, loss="mse")
        model.train_on_batch(np.ones((8, 4)), -10 * np.ones((8, 3)))
        return tiny.weights_of(model)

    got = model_with(tiny.noiseless(keras_dp.DPSGD, 1.0))
    assert np.all(got[0] == 0)
    assert tiny.same(got, model_with(keras.optimizers.SGD(1.0)), **CLOSE)


# -- learning rate, iterations, averaging -----------------------------------------------------


@pytest.mark.thorough
def test_learning_rate_and_iterations_are_the_inner_optimizers():
    optimizer = tiny.sgd(0.5)
    assert float(optimizer.learning_rate) == 0.5
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25
    model = tiny.compiled(optimizer)
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    assert int(optimizer.iterations) == int(optimizer.inner_optimizer.iterations) == 8


def test_a_schedule_advances_once_per_step_and_the_rate_cannot_be_set():
    optimizer = tiny.sgd(schedule())
    model = tiny.compiled(optimizer)
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    assert float(optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2)
    with pytest.raises(TypeError, match="LearningRateSchedule"):
        optimizer.learning_rate = 0.1


@pytest.mark.thorough
def test_learning_rate_scheduler_callback_sets_the_rate():
    model = tiny.compiled(tiny.sgd(0.5))
    callback = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 * rate)
    history = model.fit(*tiny.data(), epochs=3, callbacks=[callback], verbose=0).history
    assert history["learning_rate"] == pytest.approx([0.25, 0.125, 0.0625])
    assert float(model.optimizer.inner_optimizer.learning_rate) == pytest.approx(0.0625)


@pytest.mark.thorough
def test_reduce_on_plateau_callback_sets_the_rate():
    model = tiny.compiled(tiny.sgd(0.5))
    callback = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1e9)
    with pytest.warns(keras_dp.PrivacyWarning, match="ReduceLROnPlateau moves .* by 'loss'"):
        model.fit(*tiny.data(), epochs=3, callbacks=[callback], verbose=0)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.005, rel=1e-4)


@quiet
@pytest.mark.thorough
def test_averaged_weights_are_in_place_when_fit_ends():
    def weights(optimizer):
        model = tiny.compiled(optimizer)
        x, y = tiny.data(16)
        model.fit(x, y, batch_size=16, epochs=4, verbose=0)
        return tiny.weights_of(model)

    settings = {"use_ema": True, "ema_momentum": 0.5}
    got = weights(tiny.noiseless(keras_dp.DPSGD, 0.1, **settings))
    wanted = weights(keras.optimizers.SGD(0.1, **settings))
    assert tiny.same(got, wanted, **CLOSE)
    assert not tiny.same(got, weights(tiny.noiseless(keras_dp.DPSGD, 0.1)), **CLOSE)


@quiet
@pytest.mark.thorough
def test_swap_ema_weights_callback_evaluates_the_average():
    def losses(optimizer):
        model = tiny.compiled(optimizer)
        x, y = tiny.data(16)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        fitted = model.fit(
            x, y, batch_size=16, epochs=3, validation_data=(x, y), callbacks=[swap], verbose=0
        )
        return fitted.history["val_loss"]

    settings = {"use_ema": True, "ema_momentum": 0.5}
    got = losses(tiny.noiseless(keras_dp.DPSGD, 0.1, **settings))
    assert got == pytest.approx(losses(keras.optimizers.SGD(0.1, **settings)), rel=1e-4)


def test_accumulation_in_the_inner_optimizer_still_counts_every_release():
    model = tiny.compiled(tiny.sgd(gradient_accumulation_steps=4))
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    assert model.optimizer.ledger.steps == 8


@quiet
@pytest.mark.thorough
def test_exclusion_from_weight_decay_is_the_inner_optimizers():
    def weights(optimizer):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return trained(optimizer, steps=2)[0]

    got = weights(tiny.noiseless(keras_dp.DPAdamW, 0.1, weight_decay=0.5))
    assert tiny.same(got, weights(keras.optimizers.AdamW(0.1, weight_decay=0.5)), **CLOSE)


# -- configuration and state ------------------------------------------------------------------

FULL = {
    "max_grad_norm": 0.5,
    "target_epsilon": 2.0,
    "target_delta": 1e-6,
    "microbatch_size": 8,
    "gradients": "loop",
    "name": "mine",
}


def rebuilt(optimizer):
    return type(optimizer).from_config(optimizer.get_config())


def registered(optimizer):
    return keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))


@pytest.mark.parametrize("copied", [rebuilt, registered])
@pairs
def test_configuration_makes_the_same_optimizer(private, ordinary, copied):
    original = private(0.25, weight_decay=0.125, use_ema=True, **FULL)
    config = copied(original).get_config()
    assert config == original.get_config()
    assert {k: config[k] for k in FULL} == FULL
    assert config["learning_rate"] == 0.25 and config["weight_decay"] == 0.125


@pytest.mark.parametrize("copied", [rebuilt, registered])
def test_configuration_holds_schedules_and_any_inner_optimizer(copied):
    for optimizer in (
        keras_dp.DPAdam(schedule(), **PRIVATE),
        keras_dp.DPOptimizer(keras.optimizers.Lion(schedule()), **PRIVATE),
    ):
        again = copied(optimizer)
        assert again.get_config() == optimizer.get_config()
        inner = again.inner_optimizer
        assert type(inner) is type(optimizer.inner_optimizer)
        assert float(inner.learning_rate) == pytest.approx(0.1)


def test_configuration_is_plain_and_holds_no_seed():
    optimizer = tiny.sgd(seed=1234)
    config = optimizer.get_config()
    assert config["seed"] is None
    assert "1234" not in repr(config)


def test_every_argument_is_in_the_configuration():
    arguments = set(inspect.signature(keras_dp.DPOptimizer.__init__).parameters) - {"self"}
    wrapped = keras_dp.DPOptimizer(keras.optimizers.SGD(), **PRIVATE)
    assert set(wrapped.get_config()) == arguments


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_optimizer_has_its_settings(duplicate):
    optimizer = tiny.sgd(0.25, momentum=0.5)
    assert duplicate(optimizer).get_config() == optimizer.get_config()


@pytest.mark.thorough
def test_variables_are_the_inner_optimizers_and_setting_them_keeps_the_ledger():
    model = tiny.compiled(tiny.sgd(momentum=0.5))
    optimizer = model.optimizer
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    assert [v.path for v in optimizer.variables] == [
        v.path for v in optimizer.inner_optimizer.variables
    ]
    state = [v.numpy() for v in optimizer.variables]
    model.fit(x, y, batch_size=16, verbose=0)
    optimizer.set_weights(state)
    assert tiny.same([v.numpy() for v in optimizer.variables], state)
    assert int(optimizer.iterations) == 4
    assert optimizer.ledger.steps == 8


# -- ordinary gradients are refused (rule 1) --------------------------------------------------


@pytest.mark.parametrize("by", ["apply", "apply_gradients", "stateless_apply"])
def test_rule_01_ordinary_gradients_are_refused(by):
    model = tiny.compiled()
    before = tiny.weights_of(model)
    variables = model.trainable_variables
    gradients = [np.ones(v.shape, "float32") for v in variables]
    optimizer = model.optimizer
    optimizer.build(variables)
    calls = {
        "apply": lambda: optimizer.apply(gradients, variables),
        "apply_gradients": lambda: optimizer.apply_gradients(zip(gradients, variables)),  # noqa: B905
        "stateless_apply": lambda: optimizer.stateless_apply(
            optimizer.variables, gradients, variables
        ),
    }
    with pytest.raises(keras_dp.PrivacyError, match=r"model\.fit"):
        calls[by]()
    assert tiny.same(model.get_weights(), before)


def test_rule_01_ordinary_gradients_are_refused_after_a_private_step_too():
    model = tiny.compiled()
    model.fit(*tiny.data(), verbose=0)
    variables = model.trainable_variables
    with pytest.raises(keras_dp.PrivacyError):
        model.optimizer.apply([np.ones(v.shape, "float32") for v in variables], variables)
