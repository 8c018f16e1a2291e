"""People as the unit: their rows are drawn, averaged, clipped, counted and audited together."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from reference import clipped_sum, example_gradients, flat, norms_of, relative_error

from keras_dp import backend, keras_private
from keras_dp.gradients import Batch, EngineOptions, ExampleLoss, UserEngine, Users

COUNTS = (2, 1, 4, 3)  # rows of each person
MOST = 4
ENGINES = ("ghost", "vectorized", "loop")


def present(counts=COUNTS, most=MOST):
    return np.arange(most) < np.array(counts)[:, np.newaxis]


def user_outcome(model, x, y, counts=COUNTS, *, most=MOST, clip, padding=0, **options):
    """What the engine for people makes of a batch by itself, and its name."""
    batch = Batch(x, y)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    one = ExampleLoss(model, list(model.trainable_variables), batch)
    engine = UserEngine(one, flat(clip), EngineOptions(**options), most)
    leaves, _ = backend.pad_examples(batch.leaves(), len(batch.leaves()[0]) + padding)
    leaves, _ = backend.pad_examples(leaves, engine.padding)
    rows = len(leaves[0])
    users, real = Users.padded(present(counts, most), rows, engine.padding)
    seeds = backend.per_example_seeds(one.seed_states, rows, options.get("views", 1))
    return engine.of_users(batch.with_leaves(leaves), users, real, seeds), engine.name


def means_of_people(model, x, y, counts=COUNTS):
    """Each person's mean gradient, from plain gradients of single rows; and the rows' losses."""
    gradients, losses = example_gradients(model, x, y)
    ends = np.cumsum(counts)
    theirs = [gradients[e - k : e] for e, k in zip(ends, counts, strict=True) if k]
    means = [[np.mean(parts, axis=0) for parts in zip(*some, strict=True)] for some in theirs]
    return means, losses


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(sum(COUNTS), *shape)).astype("float32")


def ids(*shape, below=7, seed=0):
    return np.random.default_rng(seed).integers(0, below, (sum(COUNTS), *shape))


def compiled(*parts, loss="mse"):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(list(parts))
    model.compile("sgd", loss=loss)
    return model


class Tied(layers.Layer):
    """Looks words up in a table, and multiplies with the same table."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.ReversibleEmbedding(7, 5)

    def call(self, x):
        return self.table(keras.ops.tanh(self.table(x)), reverse=True)


def attention():
    inputs = keras.Input((3, 4))
    outputs = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    model = keras.Model(inputs, layers.Flatten()(outputs))
    model.compile("sgd", loss="mse")
    return model


def shared_layer():
    shared = layers.Dense(6, "tanh")
    return compiled(keras.Input((6,)), shared, shared, layers.Dense(2)), rows(6)


# Every form that gradients come in, in both of its ways to a norm where it has two.
MODELS = {
    "wide": lambda: (
        compiled(keras.Input((30,)), layers.Dense(20, "tanh"), layers.Dense(9)),
        rows(30),
    ),
    "narrow": lambda: (compiled(keras.Input((6,)), layers.Dense(1)), rows(6)),
    "few positions": lambda: (
        compiled(keras.Input((2, 24)), layers.Dense(30, "tanh"), layers.Dense(2)),
        rows(2, 24),
    ),
    "many positions": lambda: (
        compiled(keras.Input((9, 3)), layers.Dense(4, "tanh"), layers.Dense(2)),
        rows(9, 3),
    ),
    "any number of positions": lambda: (
        compiled(keras.Input((None, 6)), layers.Dense(7, "tanh"), layers.Dense(2)),
        rows(3, 6),
    ),
    "early convolution": lambda: (
        compiled(keras.Input((7, 7, 1)), layers.Conv2D(3, 3, strides=2), layers.Flatten()),
        rows(7, 7, 1),
    ),
    "late convolution": lambda: (
        compiled(keras.Input((3, 3, 24)), layers.Conv2D(32, 3, padding="same"), layers.Flatten()),
        rows(3, 3, 24),
    ),
    "depthwise and grouped": lambda: (
        compiled(
            keras.Input((4, 4, 4)),
            layers.DepthwiseConv2D(2),
            layers.Conv2D(8, 2, groups=2),
            layers.GroupNormalization(2),
            layers.Flatten(),
        ),
        rows(4, 4, 4),
    ),
    "attention": lambda: (attention(), rows(3, 4)),
    "embedding": lambda: (
        compiled(keras.Input((5,), dtype="int32"), layers.Embedding(7, 4), layers.Flatten()),
        ids(5),
    ),
    "tied": lambda: (
        compiled(keras.Input((3,), dtype="int32"), Tied(), layers.Flatten()),
        ids(3),
    ),
    "recurrent": lambda: (
        compiled(keras.Input((4, 3)), layers.LSTM(5), layers.Dense(2)),
        rows(4, 3),
    ),
    "used twice": shared_layer,
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_clipped_is_the_mean_of_a_persons_gradients(name):
    model, x = MODELS[name]()
    y = np.random.default_rng(1).normal(size=np.shape(model(x))).astype("float32")
    wanted, losses = means_of_people(model, x, y)
    clip = float(np.median(norms_of(wanted)))
    outcome, used = user_outcome(model, x, y, clip=clip, gradients="ghost")
    assert used == "ghost"
    assert relative_error([outcome.norms[: len(COUNTS)]], [norms_of(wanted)]) < 1e-5
    assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 1e-5
    np.testing.assert_allclose(outcome.losses[: len(x)], losses, rtol=1e-5)
    # Neither rows clipped each by itself, nor sums in the place of means.
    of_rows, _ = example_gradients(model, x, y)
    assert relative_error(clipped_sum(of_rows, clip), clipped_sum(wanted, clip)) > 0.05
    ends = np.cumsum(COUNTS)
    each = np.array(norms_of(of_rows))
    assert not np.allclose(
        norms_of(wanted), [np.mean(each[e - k : e]) for e, k in zip(ends, COUNTS, strict=True)]
    )


@pytest.mark.parametrize(
    ("gradients", "mode"),
    [
        ("ghost", {"eagerly": True}),
        ("ghost", {"jit_compile": True}),
        ("ghost", {"microbatch_size": 1}),
        ("ghost", {"microbatch_size": 8, "jit_compile": True}),
        ("ghost", {"microbatch_size": 9, "eagerly": True}),
        ("vectorized", {}),
        ("vectorized", {"jit_compile": True}),
        ("vectorized", {"microbatch_size": 8}),
        ("loop", {}),
        ("loop", {"eagerly": True}),
        ("loop", {"jit_compile": True}),
        ("loop", {"microbatch_size": 4}),
    ],
)
def test_every_engine_and_mode_gives_the_same_numbers(gradients, mode):
    model, x = MODELS["wide"]()
    y = rows(9, seed=1)
    wanted, losses = means_of_people(model, x, y)
    clip = float(np.median(norms_of(wanted)))
    for padding in (0, 3):
        outcome, used = user_outcome(
            model, x, y, clip=clip, gradients=gradients, padding=padding, **mode
        )
        assert used == gradients
        assert relative_error([outcome.norms[: len(COUNTS)]], [norms_of(wanted)]) < 1e-5
        assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 1e-5
        np.testing.assert_allclose(outcome.losses[: len(x)], losses, rtol=1e-5)
        np.testing.assert_allclose(outcome.outputs[: len(x)], model(x), rtol=1e-4, atol=1e-5)
