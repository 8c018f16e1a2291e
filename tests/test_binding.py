"""`compile` makes the training of any plain Keras model private, and nothing else."""

import copy
import pickle
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tiny

import keras_dp

pytestmark = pytest.mark.filterwarnings("ignore:train_on_batch can't know")


def functional():
    """Two inputs, two outputs, a nested model that is used twice."""
    encoder = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation="tanh")], name="encoder"
    )
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    both = keras.layers.Concatenate()([encoder(a), encoder(b)])
    outputs = [keras.layers.Dense(1, name=name)(both) for name in ("p", "q")]
    return keras.Model([a, b], outputs)


@keras.saving.register_keras_serializable(package="test_binding")
class Subclassed(keras.Model):
    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, activation="tanh")
        self.head = keras.layers.Dense(1)

    def build(self, shape):
        self.hidden.build(shape)
        self.head.build((None, self.units))

    def call(self, x):
        return self.head(self.hidden(x))

    def get_config(self):
        return {"units": self.units}


def is_private(model, x, y):
    """Whether `fit` trains privately: it then keeps a ledger."""
    before = getattr(model.optimizer, "ledger", keras_dp.PrivacyLedger()).steps
    fitted = model.fit(x, y, batch_size=16, verbose=0)
    assert np.isfinite(fitted.history["loss"][0])
    ledger = getattr(model.optimizer, "ledger", keras_dp.PrivacyLedger())
    assert ledger.steps in (before, before + 4)
    return ledger.steps == before + 4


# -- kinds of models --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:With run_eagerly=True:keras_dp.PrivacyWarning")
@pytest.mark.parametrize("make", [tiny.model, Subclassed])
@pytest.mark.parametrize(
    "mode", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}], ids=str
)
@pytest.mark.one_in(4)
def test_every_kind_of_model_trains_privately_in_every_mode(make, mode):
    model = make()
    model.compile(tiny.sgd(), loss="mse", metrics=["mae"], **mode)
    x, y = tiny.data()
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0).history
    assert set(history) == {"loss", "mae"}
    assert model.optimizer.ledger.steps == 8
    assert [r.sampler for r in model.optimizer.ledger] == ["poisson"]


@pytest.mark.thorough
def test_several_inputs_and_outputs_train_privately():
    model = functional()
    model.compile(tiny.sgd(), loss={"p": "mse", "q": "mae"}, metrics={"q": ["mse"]})
    x, y = tiny.data()
    assert is_private(model, {"a": x, "b": x[::-1]}, {"p": y, "q": -y})
    assert is_private(model, [x, x[::-1]], [y, -y])


@pytest.mark.thorough
def test_an_unbuilt_sequential_model_trains_privately():
    model = keras.Sequential([keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    assert is_private(model, *tiny.data())


# -- compiling again --------------------------------------------------------------------------


def test_rule_01_a_train_function_from_before_binding_is_rebuilt():
    model = tiny.model()
    x, y = tiny.data()
    model.compile("sgd", loss="mse")
    assert not is_private(model, x, y)
    model.compile(tiny.sgd(), loss="mse")
    assert is_private(model, x, y)
    assert [r.sampler for r in model.optimizer.ledger] == ["poisson"]


def test_compiling_with_an_ordinary_optimizer_unbinds_fully():
    model, plain = tiny.compiled(), tiny.model()
    x, y = tiny.data()
    assert is_private(model, x, y)
    plain.set_weights(model.get_weights())
    for m in (model, plain):
        m.compile(keras.optimizers.SGD(0.1), loss="mse")
        m.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        m.train_on_batch(x, y)
    assert tiny.same(model.get_weights(), plain.get_weights())
    assert {"train_step", "fit", "make_train_function", "train_on_batch"}.isdisjoint(vars(model))


@pytest.mark.thorough
def test_rule_06_another_dp_optimizer_takes_over_what_was_spent():
    model = tiny.compiled()
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    first = model.optimizer
    spent = first.get_epsilon(tiny.DELTA)
    model.compile(keras_dp.DPAdam(max_grad_norm=0.5, noise_multiplier=2.0), loss="mse")
    assert model.optimizer.get_epsilon(tiny.DELTA) == pytest.approx(spent)
    model.fit(x, y, batch_size=16, verbose=0)
    assert model.optimizer.ledger.steps == 8
    assert model.optimizer.get_epsilon(tiny.DELTA) > spent
    assert first.ledger.steps == 8  # the ledger is that of the weights, whoever trained them


def test_rule_06_unprotected_training_in_between_is_never_forgotten():
    model = tiny.compiled()
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    model.compile("sgd", loss="mse")
    model.compile(tiny.sgd(), loss="mse")  # nothing was trained in between
    assert np.isfinite(model.optimizer.get_epsilon(tiny.DELTA))
    model.compile("sgd", loss="mse")
    model.fit(x, y, verbose=0)
    model.compile(tiny.sgd(), loss="mse")
    assert model.optimizer.get_epsilon(tiny.DELTA) == np.inf


def test_compiling_again_with_the_same_optimizer_counts_nothing_twice():
    model = tiny.compiled()
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    model.compile(model.optimizer, loss="mae")
    assert model.optimizer.ledger.steps == 4
    assert is_private(model, x, y)
    assert model.optimizer.ledger.steps == 8


def test_an_optimizer_trains_one_model_only():
    optimizer = tiny.sgd()
    model = tiny.compiled(optimizer)
    other = tiny.model()
    with pytest.raises(ValueError, match=f"already trains the model '{model.name}'.*new optimizer"):
        other.compile(optimizer, loss="mse")


# -- copies of a model ------------------------------------------------------------------------


def saved_and_loaded(model, path):
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


COPIES = {
    "save and load": saved_and_loaded,
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, _: copy.deepcopy(model),
}


@pytest.mark.parametrize("make", [tiny.model, Subclassed])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_a_copy_trains_privately_and_remembers_what_was_spent(how, make, tmp_path):
    model = make()
    model.compile(tiny.sgd(momentum=0.5), loss="mse")
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    again = COPIES[how](model, tmp_path)
    assert again.optimizer is not model.optimizer
    assert again.optimizer.ledger == model.optimizer.ledger
    assert tiny.same(again.get_weights(), model.get_weights())
    assert is_private(again, x, y)
    assert (again.optimizer.ledger.steps, model.optimizer.ledger.steps) == (8, 4)


@pytest.mark.thorough
def test_a_clone_trains_privately_from_the_beginning():
    model = tiny.compiled()
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    clone = keras.models.clone_model(model)
    clone.compile_from_config(model.get_compile_config())
    assert clone.optimizer.ledger.steps == 0
    assert is_private(clone, x, y)


# -- classes that override Keras' methods -----------------------------------------------------


def test_overriding_compile_and_fit_with_super_works():
    class Own(Subclassed):
        def compile(self, rate, **kwargs):
            super().compile(tiny.sgd(rate), loss="mse", **kwargs)

        def fit(self, table, **kwargs):
            return super().fit(table[:, :4], table[:, 4:], **kwargs)

        def train_on_batch(self, table):
            return super().train_on_batch(table[:, :4], table[:, 4:])

    model = Own()
    model.compile(0.1, metrics=["mae"])
    table = np.hstack(tiny.data())
    history = model.fit(table, batch_size=16, epochs=2, verbose=0).history
    assert set(history) == {"loss", "mae"}
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger] == [("poisson", 8)]
    model.train_on_batch(table)
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger][1:] == [("unknown", 1)]


def test_rule_10_what_an_overridden_fit_hands_to_keras_is_what_is_accounted():
    import tensorflow as tf

    class Own(Subclassed):
        def fit(self, x, y, **kwargs):
            return super().fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(16), **kwargs)

    model = Own()
    model.compile(tiny.sgd(), loss="mse")
    with pytest.warns(keras_dp.PrivacyWarning, match="PoissonDataset"):
        model.fit(*tiny.data(), verbose=0)
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger] == [("unknown", 4)]


@pytest.mark.parametrize("method", ["train_step", "make_train_function"])
def test_rule_01_a_class_that_overrides_the_training_is_refused(method):
    own = type("Own", (Subclassed,), {method: lambda self, *args: {}})
    model = own()
    with pytest.raises(keras_dp.PrivacyError, match=f"Own overrides `{method}`.*compute_loss"):
        model.compile(tiny.sgd(), loss="mse")
    model.compile("sgd", loss="mse")  # without privacy, Keras lets it


@pytest.mark.thorough
def test_an_overridden_compute_loss_trains_privately():
    class Own(Subclassed):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(keras.ops.square(y - y_pred))

    model = Own()
    model.compile(tiny.sgd())
    assert is_private(model, *tiny.data())


# -- what can't be bound ----------------------------------------------------------------------


def test_a_dp_optimizer_inside_a_loss_scaling_one_is_refused():
    wrapped = keras.optimizers.LossScaleOptimizer(tiny.sgd())
    with pytest.raises(ValueError, match=r"LossScaleOptimizer.*Pass the DPSGD itself"):
        tiny.model().compile(wrapped, loss="mse")


def test_rule_11_mixed_precision_wraps_no_loss_scaling_around_a_dp_optimizer():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = tiny.compiled()
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras_dp.DPSGD)
    assert is_private(model, *tiny.data())


# -- ordinary Keras ---------------------------------------------------------------------------


def test_keras_methods_are_wrapped_once():
    from keras_dp.binding import install

    before = [getattr(keras.Model, name) for name in ("compile", "fit", "train_on_batch")]
    install()
    assert [getattr(keras.Model, name) for name in ("compile", "fit", "train_on_batch")] == before
    assert all(method.__wrapped__.__module__.startswith("keras.") for method in before)


def test_ordinary_models_train_as_if_keras_dp_were_not_there():
    script = """
        import sys, keras, numpy as np

        def train():
            keras.utils.set_random_seed(3)
            layers = [keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
            model = keras.Sequential(layers)
            model.compile("adam", "mse")
            x = np.linspace(-1, 1, 256).reshape(64, 4)
            history = model.fit(x, x[:, :1], 16, 2, 0, validation_split=0.25).history
            loss = model.train_on_batch(x, x[:, :1])
            print([w.tolist() for w in model.get_weights()], history, loss)

        train()
        assert "keras_dp" not in sys.modules
        import keras_dp
        train()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    without, with_it = done.stdout.splitlines()[-2:]
    assert with_it == without, done.stderr
    assert "loss" in without


@pytest.mark.parametrize("replacement", [tiny.sgd, keras.optimizers.SGD])
def test_rule_06_an_optimizer_replaced_without_compile_is_refused(replacement):
    """Its ledger would not hold the steps, and epsilon would be too small."""
    model = tiny.compiled()
    model.optimizer = replacement()
    before = tiny.weights_of(model)
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(keras_dp.PrivacyError, match=r"replaced after `compile`.*compile\("):
            train(*tiny.data())
    assert tiny.same(before, model.get_weights())


def test_rule_01_a_train_step_replaced_after_compile_is_refused():
    model = tiny.compiled()
    model.train_step = lambda data: {}
    with pytest.raises(keras_dp.PrivacyError, match="train_step"):
        model.fit(*tiny.data(), verbose=0)
