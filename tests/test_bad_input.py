"""Wrong input gets an error that names it and the fix, before any private data was used."""

import keras
import numpy as np
import pytest
import tiny

import keras_dp

pytestmark = pytest.mark.fast

PRIVATE = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
TARGET = {"target_epsilon": 1.0, "target_delta": 1e-5}
NAN, INF = float("nan"), float("inf")


# -- arguments of the optimizers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("max_grad_norm", v) for v in (-1.0, 0, NAN, INF, "1", None, True, [1.0])),
        *(("noise_multiplier", v) for v in (-0.1, NAN, INF, "1", False, (1.0,))),
        *(("microbatch_size", v) for v in (0, -3, 2.5, "8", True)),
        *(("clipping", v) for v in ("round", 3, None)),
        *(("gradients", v) for v in ("fast", 3, None)),
        *(("seed", v) for v in (-1, 1.5, "1", True)),
    ],
)
def test_a_wrong_argument_of_an_optimizer_is_named(argument, value):
    with pytest.raises(ValueError, match=rf"`{argument}` must") as caught:
        keras_dp.DPSGD(0.1, **{**PRIVATE, argument: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("target_epsilon", v) for v in (0, -1.0, NAN, INF, "1", True)),
        *(("target_delta", v) for v in (0, 1, -1e-5, NAN, "1e-5", True)),
    ],
)
def test_a_wrong_target_is_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        keras_dp.DPSGD(0.1, max_grad_norm=1.0, **{**TARGET, argument: value})


@pytest.mark.parametrize(
    "noise",
    [
        {},
        {"noise_multiplier": 1.0, **TARGET},
        {"noise_multiplier": 1.0, "target_epsilon": 1.0},
        {"noise_multiplier": 1.0, "target_delta": 1e-5},
        {"target_epsilon": 1.0},
        {"target_delta": 1e-5},
    ],
    ids=str,
)
def test_both_or_neither_of_noise_and_target_is_refused(noise):
    with pytest.raises(ValueError, match=r"noise_multiplier.*target_epsilon.*target_delta"):
        keras_dp.DPSGD(0.1, max_grad_norm=1.0, **noise)


@pytest.mark.parametrize(
    "inner",
    [None, 0.1, "nonsense", object(), keras.layers.Dense(1)],
    ids=lambda v: type(v).__name__,
)
def test_an_inner_optimizer_that_is_none_is_refused(inner):
    with pytest.raises(ValueError, match="optimizer"):
        keras_dp.DPOptimizer(inner, **PRIVATE)


def test_an_inner_optimizer_that_is_private_or_scales_the_loss_is_refused():
    with pytest.raises(ValueError, match="already private"):
        keras_dp.DPOptimizer(tiny.sgd(), **PRIVATE)
    for inner in (
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
        keras.optimizers.SGD(loss_scale_factor=8.0),
    ):
        with pytest.raises(ValueError, match="without loss scaling"):
            keras_dp.DPOptimizer(inner, **PRIVATE)


def test_numpy_scalars_are_numbers():
    optimizer = keras_dp.DPSGD(
        0.1,
        max_grad_norm=np.float32(1),
        noise_multiplier=np.int64(1),
        microbatch_size=np.int32(4),
        seed=np.int64(3),
    )
    assert optimizer.get_config()["max_grad_norm"] == 1.0
    keras_dp.DPSGD(0.1, max_grad_norm=1, target_epsilon=np.float64(1), target_delta=np.float64(0.1))
    keras_dp.PrivacyBudget(np.float32(1), delta=np.float64(1e-5))
    model = tiny.compiled(optimizer)
    model.fit(*tiny.data(), batch_size=np.int64(16), verbose=0)
    assert optimizer.get_epsilon(np.float64(1e-5)) > 0


def test_no_noise_is_allowed_warns_once_and_costs_infinity():
    with pytest.warns(keras_dp.PrivacyWarning, match="noise_multiplier=0") as caught:
        model = tiny.compiled(tiny.sgd(noise_multiplier=0))
        assert model.optimizer.get_epsilon(1e-5) == 0
        model.fit(*tiny.data(), epochs=2, verbose=0)
    assert len(caught) == 1
    assert caught[0].filename == tiny.__file__  # where the user made the optimizer
    assert model.optimizer.get_epsilon(1e-5) == INF


# -- arguments of the rest --------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 2.0, NAN, INF, "1e-5", None, True])
def test_a_wrong_delta_is_named_everywhere(delta):
    model = tiny.compiled()
    with pytest.raises(ValueError, match="delta"):
        keras_dp.PrivacyBudget(1.0, delta=delta)
    with pytest.raises(ValueError, match="delta"):
        model.optimizer.get_epsilon(delta)
    if delta is not None:  # the report has a default
        with pytest.raises(ValueError, match="delta"):
            keras_dp.privacy_report(model, delta=delta)


@pytest.mark.parametrize("epsilon", [0, -1.0, NAN, INF, "3", True, [3.0]])
def test_a_wrong_budget_is_named(epsilon):
    with pytest.raises(ValueError, match="`epsilon` must"):
        keras_dp.PrivacyBudget(epsilon, delta=1e-5)


@pytest.mark.parametrize("accountant", ["gdp", "", None, 3])
def test_an_unknown_accountant_is_named_with_the_known_ones(accountant):
    with pytest.raises(ValueError, match=r"accountant.*pld.*rdp"):
        keras_dp.PrivacyBudget(1.0, delta=1e-5, accountant=accountant)
    with pytest.raises(ValueError, match=r"accountant.*pld.*rdp"):
        tiny.sgd().get_epsilon(1e-5, accountant)


# -- compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dpsgd", "DPSGD", "dp_sgd", "DPAdam", "dpadamw", "dpadagrad", "dprmsprop"]
)
def test_a_dp_optimizer_named_by_a_string_is_refused_with_the_fix(name):
    model = tiny.model()
    with pytest.raises(ValueError, match=rf"{name}.*keras_dp\.DPSGD\(0\.1, max_grad_norm"):
        model.compile(name, loss="mse")


def layered(*layers):
    return keras.Sequential([keras.Input((4, 4, 1)), *layers, keras.layers.Flatten()])


def test_batch_normalization_is_refused_by_name_with_the_fix():
    for layer in (
        keras.layers.BatchNormalization(name="norm"),
        keras.Sequential([keras.layers.BatchNormalization(name="norm")]),
    ):
        model = layered(layer, keras.layers.Dense(1))
        with pytest.raises(keras_dp.PrivacyError, match=r"norm'.*GroupNormalization"):
            model.compile(tiny.sgd(), loss="mse")


def test_batch_normalization_that_thaws_or_shows_up_later_is_refused_before_training():
    layer = keras.layers.BatchNormalization(name="norm", trainable=False)
    model = layered(layer, keras.layers.Dense(1))
    model.compile(tiny.sgd(), loss="mse")
    layer.trainable = True
    before = tiny.weights_of(model)
    with pytest.raises(keras_dp.PrivacyError, match="'norm'"):
        model.fit(np.ones((8, 4, 4, 1)), np.ones((8, 16)), batch_size=4, verbose=0)
    assert model.optimizer.ledger.steps == 0
    assert tiny.same(model.get_weights(), before)


def test_a_model_without_trainable_weights_is_refused():
    built = tiny.model()
    built.trainable = False
    with pytest.raises(ValueError, match=rf"'{built.name}' has no trainable weights.*Add a layer"):
        built.compile(tiny.sgd(), loss="mse")
    unbuilt = keras.Sequential([keras.layers.Flatten()])
    unbuilt.compile(tiny.sgd(), loss="mse")
    with pytest.raises(ValueError, match="no trainable weights"):
        unbuilt.fit(np.ones((8, 4)), np.ones((8, 4)), batch_size=4, verbose=0)
    assert unbuilt.optimizer.ledger.steps == 0


# -- fit --------------------------------------------------------------------------------------

X, Y = tiny.data(32)

FITS = {
    "batch_size too large": ({"batch_size": 33}, "batch_size.*33.*at most 32"),
    "batch_size 0": ({"batch_size": 0}, "`batch_size` must be a positive integer"),
    "batch_size text": ({"batch_size": "8"}, "`batch_size` must be a positive integer"),
    "batch_size bool": ({"batch_size": True}, "`batch_size` must be a positive integer"),
    "batch_size float": ({"batch_size": 8.0}, "`batch_size` must be a positive integer"),
    "steps 0": ({"steps_per_epoch": 0}, "`steps_per_epoch` must be a positive integer"),
    "steps text": ({"steps_per_epoch": "2"}, "`steps_per_epoch` must be a positive integer"),
    "no data": ({"x": None, "y": None}, "no training data"),
    "empty data": ({"x": X[:0], "y": Y[:0]}, "empty"),
    "empty list": ({"x": [], "y": []}, "data"),
    "short y": ({"y": Y[:5]}, "same number of rows.*`x` has 32.*`y` has 5"),
    "short weights": ({"sample_weight": np.ones(5)}, "same number of rows.*`sample_weight` has 5"),
    "a single number": ({"x": 3.0}, "x"),
    "ordered": ({"shuffle": False}, "shuffle=False.*Remove `shuffle`"),
    "weights twice": (
        {"sample_weight": np.ones(32), "class_weight": {0: 1.0}},
        "class_weight.*sample_weight.*give one",
    ),
    "all held out": ({"validation_split": 0.999}, "validation_split=0.999.*nothing to train on"),
    "split above 1": ({"validation_split": 2.0}, "`validation_split` must be a fraction"),
    "split text": ({"validation_split": "0.5"}, "`validation_split` must be a fraction"),
}


@pytest.mark.parametrize("case", FITS)
def test_wrong_arguments_of_fit_are_named_before_any_step(case):
    arguments, message = FITS[case]
    model = tiny.compiled()
    before = tiny.weights_of(model)
    with pytest.raises(ValueError, match=message):
        model.fit(**{"x": X, "y": Y, "verbose": 0, **arguments})
    assert model.optimizer.ledger.steps == 0
    assert tiny.same(model.get_weights(), before)


def batch_coupled(y, y_pred):
    return keras.ops.square(keras.ops.mean(y_pred) - keras.ops.mean(y))


def two_or_more(y, y_pred):
    if y_pred.shape[0] == 1:
        raise ValueError("this loss wants pairs")
    return keras.ops.mean(keras.ops.square(y - y_pred))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (batch_coupled, "depends on how examples are batched"),
        (two_or_more, "can't be computed for one example alone.*this loss wants pairs"),
    ],
)
def test_a_loss_that_needs_other_examples_is_refused_before_any_step(loss, message):
    model = tiny.compiled(loss=loss)
    before = tiny.weights_of(model)
    with pytest.raises(keras_dp.PrivacyError, match=message):
        model.fit(X, Y, batch_size=8, verbose=0)
    assert model.optimizer.ledger.steps == 0
    assert tiny.same(model.get_weights(), before)


def test_after_an_error_the_model_trains_on_right_input():
    model = tiny.compiled()
    with pytest.raises(ValueError, match="batch_size"):
        model.fit(X, Y, batch_size=1000, verbose=0)
    model.fit(X, Y, batch_size=8, verbose=0)
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger] == [("poisson", 4)]


@pytest.mark.parametrize("dataset", [keras_dp.PoissonDataset, keras_dp.ShuffledDataset])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 33}, "batch_size"),
        ({"batch_size": None}, "batch_size"),
        ({"batch_size": 8, "y": Y[:3]}, "same number of rows"),
        ({"batch_size": 8, "x": X[:0]}, "rows"),
        ({"batch_size": 8, "seed": -1}, "seed"),
        ({"batch_size": 8, "seed": "a"}, "seed"),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_dataset_are_named(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        dataset(**{"x": X, "y": Y, **arguments})
