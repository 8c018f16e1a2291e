"""What people as the unit cost: a step on the same rows, with and without people.

    python benchmarks/users.py

Each line: milliseconds of the private step's gradients (forward, backward, norms,
clipped sum) for a batch of rows, as examples and as the rows of people; the least of
many, taken in turns.
"""

import argparse
import time

import keras
import numpy as np
from keras import layers

from keras_dp import backend, keras_private
from keras_dp.clipping import Clip, FlatClipping
from keras_dp.gradients import (
    Batch,
    Engine,
    EngineOptions,
    ExampleLoss,
    UserEngine,
    Users,
)


def mlp():
    model = keras.Sequential([keras.Input((784,))])
    for width in (512, 512):
        model.add(layers.Dense(width, "relu"))
    model.add(layers.Dense(10))
    return model, (784,), 256


def cnn():
    return (
        keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(16, 8, strides=2, padding="same", activation="relu"),
                layers.MaxPooling2D(2, 1),
                layers.Conv2D(32, 4, strides=2, activation="relu"),
                layers.MaxPooling2D(2, 1),
                layers.Flatten(),
                layers.Dense(32, "relu"),
                layers.Dense(10),
            ]
        ),
        (28, 28, 1),
        256,
    )


def transformer():
    inputs = keras.Input((64,), dtype="int32")
    x = layers.Embedding(2000, 96)(inputs)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 24)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(96)(layers.Dense(384, "relu")(x)))
    outputs = layers.Dense(10)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs), (64,), 32


def engines(model, shape, rows, most, varied):
    """The step's gradients without people, and with them."""
    random = np.random.default_rng(0)
    if model.inputs[0].dtype == "int32":
        x = random.integers(0, 2000, (rows, *shape)).astype("int32")
    else:
        x = random.normal(size=(rows, *shape)).astype("float32")
    y = random.integers(0, 10, rows)
    model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batch = Batch(*backend.as_tensors([x, y]))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    loss = ExampleLoss(model, list(model.trainable_variables), batch)
    clip = Clip(FlatClipping(), 1.0)
    real = np.ones(rows, bool)
    seeds = backend.per_example_seeds(loss.seed_states, rows)
    plain = Engine(loss, clip, EngineOptions())
    counts = []
    while sum(counts) < rows:
        held = int(random.integers(1, most + 1)) if varied else most
        counts.append(min(held, rows - sum(counts)))
    present = np.arange(most) < np.array(counts)[:, np.newaxis]
    users, of_people = Users.padded(present, rows, 1)
    engine = UserEngine(loss, clip, EngineOptions(), most)
    return (
        lambda: plain(batch, backend.as_tensors([real])[0], seeds).norms,
        lambda: engine.of_users(batch, users, of_people, seeds).norms,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--most", type=int, nargs="*", default=[4, 8])
    arguments = parser.parse_args()
    print(f"{'model':12} {'rows':>5} {'each has':>10} {'rows alone':>11} {'people':>8} {'more':>6}")
    for make in (mlp, cnn, transformer):
        for most in arguments.most:
            for varied in (False, True):
                keras.backend.clear_session()
                model, shape, rows = make()
                both = engines(model, shape, rows, most, varied)
                times = [[], []]
                for _ in range(arguments.repeats):
                    for k, run in enumerate(both):
                        start = time.perf_counter()
                        run().numpy()
                        times[k].append(time.perf_counter() - start)
                alone, people = (1e3 * min(t[2:]) for t in times)
                each = f"1 to {most}" if varied else str(most)
                print(
                    f"{make.__name__:12} {rows:5} {each:>10} {alone:11.1f} {people:8.1f} "
                    f"{people / alone - 1:6.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
