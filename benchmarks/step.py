"""How much a private training step costs, as a ratio to an ordinary one.

    python benchmarks/step.py [--rounds 15]

All variants of a model take their steps in turn, in one run, so that the ratios
hold on a machine whose speed drifts. Prints medians in milliseconds, and in
parentheses the median of the ratios to the ordinary step of the same round.
"""

import argparse
import statistics
import time
import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_dp

VARIANTS = {
    "ordinary": None,
    "vectorized": {"gradients": "vectorized"},
    "vectorized, XLA": {"gradients": "vectorized"},
    "loop": {"gradients": "loop"},
}


def mlp(random):
    """784-512-512-10, batch 256."""
    model = keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(512, activation="relu"),
            layers.Dense(512, activation="relu"),
            layers.Dense(10),
        ]
    )
    return model, random.normal(size=(256, 784)).astype("float32")


def cnn(random):
    """Two convolutions and two dense layers on 28 x 28 images, batch 256."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 8, 2, padding="same", activation="relu"),
            layers.MaxPooling2D(2, 1),
            layers.Conv2D(32, 4, 2, activation="relu"),
            layers.MaxPooling2D(2, 1),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )
    return model, random.normal(size=(256, 28, 28, 1)).astype("float32")


def transformer(random):
    """Two blocks of width 128 on 128 tokens, vocabulary 5,000, batch 32."""
    tokens = keras.Input((128,), dtype="int32")
    x = layers.Embedding(5000, 128)(tokens)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 32)(x, x))
        x = layers.LayerNormalization()(
            x + layers.Dense(128)(layers.Dense(512, activation="relu")(x))
        )
    model = keras.Model(tokens, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))
    return model, random.integers(0, 5000, (32, 128)).astype("int32")


def make_step(build, name, options):
    """A function that takes one step, and waits for it."""
    random = np.random.default_rng(0)
    model, x = build(random)
    optimizer = (
        keras.optimizers.SGD(0.1)
        if options is None
        else keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0, **options)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile="XLA" in name)
    batch = tf.constant(x), tf.constant(random.integers(0, 10, len(x)))
    return lambda: model.train_on_batch(*batch)


def measure(build, rounds):
    """Milliseconds of each round, by variant."""
    steps = {name: make_step(build, name, options) for name, options in VARIANTS.items()}
    for step in steps.values():
        step()
        step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore", keras_dp.PrivacyWarning)  # train_on_batch, on purpose
    print("model        " + "".join(f"{name:>22}" for name in VARIANTS))
    for build in (mlp, cnn, transformer):
        times = measure(build, rounds)
        cells = []
        for took in times.values():
            ratios = [a / b for a, b in zip(took, times["ordinary"], strict=True)]
            cells.append(f"{statistics.median(took):.1f} ({statistics.median(ratios):.1f}x)")
        print(f"{build.__name__:13}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
