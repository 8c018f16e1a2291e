"""Rule 19: what can't be verified is not used. And faults of the rooms, each found once."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers
from reference import clipped_sum, example_gradients, private_clipped_sum, relative_error

import keras_dp
from keras_dp import keras_losses, keras_private
from keras_dp.gradients import trial
from keras_dp.gradients.rules.registry import Unit

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")


def tried(loss, run):
    """Tries an engine against a loop over a loss of one example and one weight."""
    weight = keras.Variable([2.0])
    leaves = [tf.ones((4, 1)), tf.ones(4, tf.bool)]

    def clipped(gradients, real):
        return [tf.reduce_sum(g, axis=0) for g in gradients], tf.stack(
            [tf.norm(tf.reshape(g, (g.shape[0], -1)), axis=1) for g in gradients], axis=1
        )

    trial.require_agreement(loss, [weight], run, clipped, leaves, 2, 1e-3)


def ran(leaves):
    raise AssertionError("an engine ran that could not be tried")


def raising(weights, leaves):
    raise ValueError("nothing made up will do")


def not_finite(weights, leaves):
    return tf.reduce_sum(weights[0]) * np.nan, []


@pytest.mark.parametrize("loss", [raising, not_finite])
def test_rule_19_an_engine_that_can_not_be_tried_is_not_used(loss):
    """Both counted as an error of 0, so whatever the engine computed was used."""
    with pytest.raises(ArithmeticError, match="can't be tried"):
        tried(loss, ran)


def test_rule_19_what_is_not_finite_agrees_with_nothing():
    one, nan = [tf.constant([1.0])], [tf.constant([np.nan])]
    assert trial.relative_error(one, one) == 0
    assert trial.relative_error(nan, one) == trial.relative_error(one, nan) == np.inf


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.LayerNormalization(), (4,)),
        (layers.GroupNormalization(2), (4,)),
        (layers.LSTM(2), (3, 4)),
        (layers.GRU(2), (3, 4)),
        (layers.Dense(2), (4,)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, keras.Layer) else None,
)
@pytest.mark.one_in(4)
def test_rules_use_what_watching_returns(layer, shape, monkeypatch):
    """Where watching makes a new tensor, the old one has no gradient."""
    watch = Unit.watch
    monkeypatch.setattr(Unit, "watch", lambda self, tensor: watch(self, tf.identity(tensor)))
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(1)])
    model.compile(
        keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=0.0, gradients="ghost"), loss="mse"
    )
    model.train_on_batch(np.ones((4, *shape)), np.ones((4, 1)))
    assert model.optimizer.engine == "ghost"


def other_call(layer, x, training=None):
    """Uses the kernel twice."""
    return keras.ops.matmul(keras.ops.matmul(x, layer.kernel), layer.kernel)


def patched_class(layer, monkeypatch):
    monkeypatch.setattr(layers.Dense, "call", other_call)


def patched_class_by_what_names_keras_as_its_module(layer, monkeypatch):
    monkeypatch.setattr(layers.Dense, "call", functools.wraps(layers.Dense.call)(other_call))


def patched_with_a_partial(layer, monkeypatch):
    layer.call = functools.partial(other_call, layer)


def patched_with_an_object(layer, monkeypatch):
    class Call:
        def __call__(self, x, training=None):
            return other_call(layer, x)

    layer.call = Call()


def patched_with_what_names_keras_as_its_module(layer, monkeypatch):
    layer.call = functools.wraps(layer.call)(functools.partial(other_call, layer))


def decorated(layer, monkeypatch):
    original = layer.call

    @functools.wraps(original)
    def call(x, training=None):
        return original(keras.ops.matmul(x, layer.kernel))

    layer.call = call


@pytest.mark.parametrize(
    "change",
    [
        decorated,
        patched_with_what_names_keras_as_its_module,
        patched_class,
        patched_class_by_what_names_keras_as_its_module,
        patched_with_a_partial,
        patched_with_an_object,
    ],
)
def test_rule_19_a_layer_that_somebody_has_changed_is_not_alike(change, monkeypatch):
    """It was, and trained with the gradients of what it computed before."""

    def train(change):
        layer = layers.Dense(4)
        layer.build((None, 4))
        change(layer, monkeypatch)
        model = keras.Sequential([keras.Input((4,)), layer])
        optimizer = keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=0.0, gradients="ghost")
        model.compile(optimizer, loss="mse")
        model.train_on_batch(np.ones((4, 4)), np.ones((4, 4)))

    train(lambda layer, monkeypatch: None)
    with pytest.raises(keras_dp.PrivacyError, match="tried by itself"):
        train(change)


def test_rule_19_a_layer_that_is_changed_between_eager_steps_is_tried_again():
    layer = layers.Dense(4)
    layer.build((None, 4))
    model = keras.Sequential([keras.Input((4,)), layer])
    optimizer = keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=0.0, gradients="ghost")
    model.compile(optimizer, loss="mse", run_eagerly=True)
    x = np.ones((4, 4), "float32")
    for _ in range(2):
        model.train_on_batch(x, x)
    layer.call = functools.partial(other_call, layer)
    with pytest.raises(keras_dp.PrivacyError, match="tried by itself"):
        model.train_on_batch(x, x)


def test_rule_19_a_layer_that_has_a_traced_function_from_outside_is_not_alike():
    layer = layers.Dense(2)
    assert keras_private.settings_of(layer) is not None
    layer.call = tf.function(lambda x: x)
    assert keras_private.settings_of(layer) is None


class Callable:
    def __call__(self, *_):
        return 0


@pytest.mark.parametrize(
    "member",
    [
        lambda self, x: x,
        tf.function(lambda self, x: x),
        functools.partialmethod(lambda self, x: x),
        functools.lru_cache(lambda self, x: x),
        Callable(),
    ],
    ids=["function", "tf.function", "partialmethod", "lru_cache", "object"],
)
@pytest.mark.fast
def test_rule_19_a_class_that_has_a_part_from_outside_is_not_known(member, monkeypatch):
    """What is no plain function was passed over."""
    layer = layers.GroupNormalization(2)
    assert keras_private.settings_of(layer) is not None
    monkeypatch.setattr(layers.GroupNormalization, "_apply_normalization", member)
    assert keras_private.settings_of(layer) is None


def doubled(call):
    def other(*args, **kwargs):
        output, states = call(*args, **kwargs)
        return 2 * output, states

    return other


@pytest.mark.parametrize("where", ["cell", "class", "loop"])
@pytest.mark.parametrize("cls", [layers.LSTM, layers.SimpleRNN])
@pytest.mark.one_in(3)
def test_rule_19_a_cell_that_somebody_has_changed_computes_what_it_computes(
    cls, where, monkeypatch
):
    """The rule computed what its class does, and trained something else in silence."""
    layer = cls(2)
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype("float32")
    y = np.ones((4, 2), "float32")
    model = keras.Sequential([keras.Input((3, 2)), layer])
    if where == "cell":
        layer.cell.call = doubled(layer.cell.call)
    elif where == "class":
        monkeypatch.setattr(type(layer.cell), "call", doubled(type(layer.cell).call))
    else:
        last = layer.inner_loop
        layer.inner_loop = lambda *a, **k: [
            2 * t if i == 0 else t for i, t in enumerate(last(*a, **k))
        ]
    model.compile(loss="mse")
    wanted = clipped_sum(example_gradients(model, x, y)[0], 0.1)
    found = private_clipped_sum(model, x, y, loss="mse", max_grad_norm=0.1)
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.fast
def test_all_layers_of_keras_are_known():
    """A verdict is kept for them: else each would be tried in every start."""
    every = [c for c in vars(layers).values() if isinstance(c, type)]
    assert len(every) > 100
    assert all(map(keras_private._has_known_methods, [*every, keras.Model, keras.Sequential]))


def loss_settings(loss, **given):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", loss=loss, **given)
    return keras_losses.loss_settings_of(model)


def test_settings_tell_what_losses_compute_by():
    plain = loss_settings(keras.losses.MeanSquaredError())
    assert plain == loss_settings(keras.losses.MeanSquaredError()) is not None
    assert plain != loss_settings(keras.losses.MeanSquaredError(), loss_weights=3.0)
    assert plain != loss_settings(keras.losses.MeanSquaredError(dtype="float16"))
    assert plain != loss_settings(keras.losses.MeanSquaredError(reduction="sum"))
    changed = keras.losses.MeanSquaredError()
    changed.call = lambda y_true, y_pred: y_pred
    assert loss_settings(changed) is None
    (wrapper,) = keras.losses.MeanSquaredError.__bases__
    assert loss_settings(wrapper(lambda y_true, y_pred: y_pred)) is None


def test_settings_tell_which_operations_a_graph_has():
    def graph(operation):
        inputs = keras.Input((3,))
        return keras.Model(inputs, operation(layers.Dense(3)(inputs)))

    of = functools.partial(keras_private.settings_of, order=False)
    assert of(graph(keras.ops.exp)) == of(graph(keras.ops.exp)) is not None
    assert of(graph(keras.ops.exp)) != of(graph(keras.ops.sin))


def test_settings_tell_which_layer_feeds_which():
    def settings(wire):
        x = keras.Input((3,))
        first, second = layers.Dense(3), layers.Dense(3)
        return keras_private.settings_of(keras.Model(x, wire(first, second, x)), order=False)

    def chain(first, second, x):
        return first(second(first(x)))

    def other_twice(first, second, x):
        return second(first(first(x)))

    def side_by_side(first, second, x):
        return layers.Add()([first(x), second(x)])

    def added_to_the_input(first, second, x):
        return layers.Add()([first(second(x)), x])

    wires = chain, other_twice, side_by_side, added_to_the_input
    assert len({settings(wire) for wire in wires}) == len(wires)
    for wire in wires:
        assert settings(wire) == settings(wire)


def test_two_optimizers_do_not_move_one_c():
    strategy = keras_dp.clipping.AdaptiveClipping(quantile=0.7)
    made = {"noise_multiplier": 1.0, "clipping": strategy}
    one = keras_dp.DPSGD(0.1, max_grad_norm=3.0, **made)
    two = keras_dp.DPSGD(0.1, max_grad_norm=5.0, **made)
    assert one.clipping_strategy is strategy and strategy.max_grad_norm == 3.0
    assert two.clipping_strategy.max_grad_norm == 5.0
    assert two.clipping_strategy.get_config() == strategy.get_config()
    one.clipping_strategy.restore(4.0)
    assert two.clipping_strategy.max_grad_norm == 5.0


@pytest.mark.parametrize(
    ("argument", "meaning"),
    [
        ("microbatch_size", "how many examples are in memory at once"),
        ("augmentation_multiplicity", "how many times each example is run"),
    ],
)
def test_a_wrong_number_is_explained_as_what_it_is(argument, meaning):
    with pytest.raises(ValueError, match=rf"`{argument}` must be a positive integer: {meaning}"):
        keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0, **{argument: 0})


def test_steps_per_epoch_is_explained_as_what_it_is():
    model = tiny.compiled()
    x, y = tiny.data(8)
    with pytest.raises(ValueError, match="how many steps are an epoch"):
        model.fit(x, y, steps_per_epoch=0)
