"""What engines do at the edges: falling back, padding, bad numbers, nothing to do."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    flat,
    noiseless_optimizer,
    norms_of,
    relative_error,
    update_on_batch,
)

import keras_dp
from keras_dp.backend.tensorflow.compiling import emits_broken_matmul
from keras_dp.gradients import mapped
from keras_dp.gradients.mapped import chunked_sum


def linear(**kwargs):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.compile("sgd", loss=lambda y, y_pred: ops.sum(y_pred, axis=-1), **kwargs)
    return model


def masked_recurrence():
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            layers.Embedding(5, 2, mask_zero=True),
            layers.SimpleRNN(2),
            layers.Dense(1),
        ],
        name="tagger",
    )


def attention():
    x = keras.Input((6, 4))
    return keras.Model(x, layers.Dense(1)(layers.MultiHeadAttention(2, 2)(x, x)))


TOKENS = np.array([[1, 2, 0], [3, 0, 0], [4, 1, 2]], "int32")
Y = np.array([[1.0], [0.0], [-1.0]], "float32")
ALL = ("ghost", "vectorized", "loop")


# -- which engine runs ---------------------------------------------------------------------


@pytest.mark.thorough
def test_where_the_vectorizer_fails_the_loop_takes_over_with_one_line_in_the_log(caplog):
    model = masked_recurrence()
    caplog.set_level(logging.DEBUG, logger="keras_dp")
    model.compile(noiseless_optimizer(0.5, "vectorized"), loss="mse")
    update_on_batch(model, TOKENS, Y)
    update_on_batch(model, TOKENS, Y)
    assert model.optimizer.engine == "loop"
    (record,) = [r for r in caplog.records if r.name == "keras_dp"]
    assert record.levelno == logging.WARNING
    assert "'tagger' can't be vectorized" in record.getMessage()
    assert "the same numbers, more slowly" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.thorough
def test_asking_for_the_loop_says_nothing(caplog):
    model = masked_recurrence()
    model.compile(noiseless_optimizer(0.5, "loop"), loss="mse")
    update_on_batch(model, TOKENS, Y)
    assert model.optimizer.engine == "loop"
    assert not [r for r in caplog.records if r.name == "keras_dp"]


@pytest.mark.parametrize(
    ("gradients", "engine"), [("auto", "ghost"), ("ghost", "ghost"), ("vectorized", "vectorized")]
)
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_a_model_that_the_engine_can_serve_is_served_silently(gradients, engine, caplog):
    model = attention()
    model.compile("sgd", loss="mse")
    x = np.random.default_rng(0).normal(size=(3, 6, 4)).astype("float32")
    y = np.random.default_rng(1).normal(size=(3, 6, 1)).astype("float32")
    _, name = engine_outcome(model, x, y, max_grad_norm=1.0, gradients=gradients)
    assert name == engine
    assert not [r for r in caplog.records if r.name == "keras_dp"]


@pytest.mark.parametrize(("gradients", "engine"), [("vectorized", "loop"), ("ghost", "ghost")])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_recurrence_that_xla_cannot_compile_vectorized_is_looped_over_there(gradients, engine):
    model = keras.Sequential([keras.Input((3, 2)), layers.SimpleRNN(2), layers.Dense(1)])
    model.compile("sgd", loss="mse")
    x = np.random.default_rng(0).normal(size=(3, 3, 2)).astype("float32")
    wanted, _ = example_gradients(model, x, Y)
    outcome, name = engine_outcome(
        model, x, Y, max_grad_norm=0.7, gradients=gradients, jit_compile=True
    )
    assert name == engine
    assert relative_error(outcome.sums, clipped_sum(wanted, 0.7)) < 1e-5


@pytest.mark.parametrize("build", [attention, masked_recurrence])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_every_engine_gives_the_same(build):
    model = build()
    model.compile("sgd", loss="mse")
    x, y = TOKENS, Y
    if build is attention:
        x = np.random.default_rng(0).normal(size=(3, 6, 4)).astype("float32")
        y = np.random.default_rng(1).normal(size=(3, 6, 1)).astype("float32")
    outcomes = {}
    for gradients in ALL:
        outcomes[gradients], name = engine_outcome(
            model, x, y, max_grad_norm=0.5, gradients=gradients
        )
        unable = build is masked_recurrence and gradients == "vectorized"
        assert name == ("loop" if unable else gradients)
    one = outcomes.pop("loop")
    for other in outcomes.values():
        assert relative_error(other.sums, one.sums) < 1e-5
        np.testing.assert_allclose(other.norms, one.norms, rtol=1e-5)
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
        np.testing.assert_allclose(other.outputs, one.outputs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("wrong", ["sums", "norms"])
@pytest.mark.one_in(2)
def test_a_vectorizer_that_computes_wrongly_is_found_out_before_it_is_used(
    monkeypatch, caplog, wrong, jit_compile
):
    right = mapped.vectorized_engine

    def faulty(*args, **kwargs):
        sums, norms, losses, extra = right(*args, **kwargs)
        if wrong == "sums":
            return [1.01 * s for s in sums], norms, losses, extra
        return sums, 0.99 * norms, losses, extra

    monkeypatch.setattr(mapped, "vectorized_engine", faulty)
    model = linear()
    x = np.array([[3.0, 4.0], [0.3, 0.4]], "float32")
    gradients = example_gradients(model, x, np.zeros((2, 1), "float32"))[0]
    optimizer = noiseless_optimizer(1.0, "vectorized")
    model.compile(optimizer, loss=model.loss, jit_compile=jit_compile)
    update = update_on_batch(model, x, np.zeros((2, 1), "float32"))
    assert model.optimizer.engine == "loop"
    assert relative_error(update, [s / 2 for s in clipped_sum(gradients, 1.0)]) < 1e-5
    assert "two made-up examples are off by" in caplog.text


def test_a_layer_with_random_numbers_of_its_own_is_looped_over(caplog):
    class Jitter(layers.Layer):
        def call(self, x):
            return x + tf.random.normal(tf.shape(x))

    model = keras.Sequential([keras.Input((2,)), Jitter(), layers.Dense(1)])
    for _ in range(2):
        model.compile(noiseless_optimizer(1.0, "vectorized"), loss="mse")
        update_on_batch(model, np.ones((3, 2), "float32"), Y)
        assert model.optimizer.engine == "loop"
    (record,) = [r for r in caplog.records if r.name == "keras_dp"]  # said once
    assert "SeedGenerator" in record.getMessage()


@pytest.mark.parametrize("gradients", ALL)
def test_an_error_of_the_model_itself_is_shown_and_not_swallowed_by_the_fallback(gradients):
    class Broken(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=())

        def call(self, x, training=False):
            if training:
                raise RuntimeError("the user's own mistake")
            return x * self.w

        def compute_output_shape(self, shape):
            return shape

    model = keras.Sequential([keras.Input((2,)), Broken()])
    model.compile(noiseless_optimizer(1.0, gradients), loss="mse")
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        update_on_batch(model, np.ones((2, 2)), np.ones((2, 2)))


# -- the matrix product that TensorFlow with oneDNN gets wrong --------------------------------


def graph_of(left, right, in_a_function=False):
    def product(a, b):
        return tf.matmul(a, b)

    inner = tf.function(product) if in_a_function else product
    specs = [tf.TensorSpec(shape, tf.float32) for shape in (left, right)]
    return tf.function(lambda a, b: inner(a, b)).get_concrete_function(*specs).graph


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 1, 6, 4), (4, 6)),
        ((None, 1, 6, 4), (4, 6)),
        ((None, None, 6, 4), (4, 6)),
        ((None, 1, 6, 4), (1, 4, 6)),
        (None, (4, 6)),
    ],
)
@pytest.mark.parametrize("in_a_function", [False, True])
def test_the_broken_product_is_found(left, right, in_a_function):
    assert emits_broken_matmul(graph_of(left, right, in_a_function))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((6, 4), (4, 6)),
        ((3, 6, 4), (4, 6)),
        ((3, 2, 6, 4), (4, 6)),
        ((3, 1, 6, 4), (3, 1, 4, 6)),
    ],
)
def test_sound_products_are_let_through(left, right):
    assert not emits_broken_matmul(graph_of(left, right))


def test_the_broken_product_is_found_inside_a_loop():
    @tf.function(input_signature=[tf.TensorSpec((3, 1, 6, 4)), tf.TensorSpec((4, 4))])
    def repeated(a, b):
        return tf.while_loop(lambda i, _: i < 2, lambda i, t: (i + 1, tf.matmul(t, b)), (0, a))

    assert emits_broken_matmul(repeated.get_concrete_function().graph)


# -- clipping, at its edges ------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ALL)
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_an_example_with_a_huge_gradient_counts_as_c(gradients):
    x = np.array([[3e15, 4e15], [0.3, 0.4]], "float32")
    outcome, _ = engine_outcome(
        linear(), x, np.zeros((2, 1)), max_grad_norm=1.0, gradients=gradients
    )
    np.testing.assert_allclose(outcome.norms, [5e15, 0.5], rtol=1e-5)
    np.testing.assert_allclose(outcome.sums[0][:, 0], [0.9, 1.2], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])  # the square of the last is inf
@pytest.mark.parametrize("gradients", ALL)
def test_rule_05_an_example_with_a_non_finite_norm_adds_nothing(bad, gradients):
    x = np.array([[0.3, 0.4], [bad, 1.0], [6.0, 8.0]], "float32")
    outcome, _ = engine_outcome(
        linear(), x, np.zeros((3, 1)), max_grad_norm=1.0, gradients=gradients
    )
    np.testing.assert_allclose(outcome.sums[0][:, 0], [0.9, 1.2], rtol=1e-5)


@pytest.mark.parametrize("gradients", ALL)
@pytest.mark.one_in(3)
def test_examples_with_a_gradient_of_zero_add_zero(gradients):
    outcome, _ = engine_outcome(
        linear(), np.zeros((2, 2)), np.zeros((2, 1)), max_grad_norm=1.0, gradients=gradients
    )
    np.testing.assert_array_equal(outcome.sums[0], np.zeros((2, 1)))
    np.testing.assert_array_equal(outcome.norms, [0, 0])


def test_clip_weights_never_let_more_than_c_through():
    norms = np.array([0, 1e-30, 0.5, 1, 1.0000001, 7, 1e30, np.inf, np.nan], "float32")
    weights = ops.convert_to_numpy(flat(1.0)(ops.convert_to_tensor(norms[:, None])))
    np.testing.assert_array_equal(weights[:4], 1)
    np.testing.assert_array_equal(weights[-2:], 0)
    assert np.all(weights[:-2] * norms[:-2] <= 1 + 1e-6)


# -- padding and chunks ------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ALL)
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.one_in(4)
def test_padding_adds_nothing(gradients, microbatch_size):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, "tanh"), layers.Dense(1)])
    model.set_weights([np.ones(w.shape) for w in model.get_weights()])
    model.compile("sgd", loss="mse")
    x, y = np.random.default_rng(0).normal(size=(2, 3, 2)).astype("float32")
    y = y[:, :1]
    gradients_alone, _ = example_gradients(model, x, y + 1)
    clip_norm = float(np.median(norms_of(gradients_alone)))
    outcome, _ = engine_outcome(
        model,
        x,
        y + 1,
        max_grad_norm=clip_norm,
        padding=5,
        gradients=gradients,
        microbatch_size=microbatch_size,
    )
    # Biases are not zero: a row of zeros has a gradient of its own, which must not be added.
    assert np.all(outcome.norms[3:] > 0)
    assert len(outcome.norms) == 8
    assert relative_error(outcome.sums, clipped_sum(gradients_alone, clip_norm)) < 1e-5


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.one_in(2)
def test_a_chunked_sum_adds_sums_and_joins_the_rest_in_order(in_graph):
    sizes = []

    def engine(leaves):
        t, real = leaves
        sizes.append(t.shape[0])
        kept = tf.where(real[:, tf.newaxis], t, 0)
        return [tf.reduce_sum(kept, 0)], t[:, 0], 2 * t[:, 0], [3 * t]

    def whole(t):
        return chunked_sum(engine, [t, tf.fill([tf.shape(t)[0]], True)], 4)

    rows = tf.reshape(tf.range(12.0), (6, 2))
    run = tf.function(whole, input_signature=[tf.TensorSpec((None, 2))]) if in_graph else whole
    sums, norms, losses, extra = run(rows)
    np.testing.assert_allclose(sums[0], [30, 36])
    np.testing.assert_allclose(norms, rows[:, 0])
    np.testing.assert_allclose(losses, 2 * rows[:, 0])
    np.testing.assert_allclose(extra[0], 3 * rows)
    assert set(sizes) == {4}


# -- through compile -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradients", "mode"),
    [
        ("ghost", {}),
        ("ghost", {"jit_compile": True}),
        ("vectorized", {}),
        ("ghost", {"run_eagerly": True}),
        ("loop", {}),
        ("loop", {"run_eagerly": True}),
    ],
)
@pytest.mark.one_in(6)
@pytest.mark.thorough
def test_rule_04_an_empty_batch_is_a_step_that_moves_nothing_without_noise(gradients, mode):
    x = keras.Input((4, 4, 1))
    h = layers.MaxPooling2D()(layers.Conv2D(2, 2)(x))
    model = keras.Model(x, layers.Dense(1)(layers.Flatten()(h)))
    model.compile(noiseless_optimizer(1.0, gradients), loss="mse", metrics=["mae"], **mode)
    update = update_on_batch(model, np.ones((2, 4, 4, 1)), np.ones((2, 1)))
    assert any(np.any(u != 0) for u in update)
    update = update_on_batch(model, np.ones((0, 4, 4, 1)), np.ones((0, 1)))
    assert all(np.all(u == 0) for u in update)
    assert model.optimizer.ledger.steps == 2
    assert model.optimizer.engine == gradients


@pytest.mark.parametrize("gradients", ALL)
@pytest.mark.one_in(3)
def test_weights_that_the_loss_does_not_reach_stay_as_they_are(gradients):
    x = keras.Input((2,))
    used, unused = layers.Dense(1, name="used"), layers.Dense(1, name="unused")
    model = keras.Model(x, {"a": used(x), "b": unused(x)})
    model.compile(noiseless_optimizer(1.0, gradients), loss={"a": "mse"})
    update = update_on_batch(model, np.ones((2, 2)), {"a": np.ones((2, 1)) * 5})
    updates = zip(model.trainable_variables, update, strict=True)
    moved = {v.path.split("/")[-2] for v, u in updates if u.any()}
    assert moved == {"used"}


def test_a_model_that_is_gone_leaves_no_graph_behind():
    """Six graphs and some ten MiB stayed for each: TensorFlow's own objects hide them from gc."""

    def graphs():
        gc.collect()
        return sum(type(o).__name__.endswith("FuncGraph") for o in gc.get_objects())

    def train():
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation="relu")])
        model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
            model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
        return weakref.ref(model)

    train()
    before = graphs()
    gone = [train()]
    keras.backend.clear_session()
    assert graphs() <= before
    assert all(model() is None for model in gone)
