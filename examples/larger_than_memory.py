"""Train on data that never lie in memory as a whole.

scikit-learn brings two photographs along. Every square of 16 by 16 pixels of them is an
example: some hundred thousand, cut out one after the other by a generator. `spool` writes
them to disk once; `fit` then draws its Poisson batches from the files, and only the rows that
were drawn are read. The network learns which of the two photographs a square is from.

    pip install ".[examples]" && python examples/larger_than_memory.py

The script prints how large the files are, and by how much the memory of the process grew:
before the first step TensorFlow makes a graph of it, whatever the data.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_sample_images

import keras_dp

SIDE = 16
DELTA = 1e-6  # well below 1 / number of examples


def squares(step, first_column, last_column):
    """Squares of both photographs, one after the other, with the number of the photograph.

    Columns left of the middle are for training, those on the right for testing, so that no
    pixel is in both.
    """
    for label, photograph in enumerate(load_sample_images().images):
        height, width, _ = photograph.shape
        for top in range(0, height - SIDE, step):
            for left in range(int(first_column * width), int(last_column * width) - SIDE, step):
                yield photograph[top : top + SIDE, left : left + SIDE].copy(), np.int32(label)


def megabytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def memory_in_use():
    """Megabytes that this process holds for itself (pages of files on disk don't count)."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1e3


class Memory(keras.callbacks.Callback):
    """Memory in use before training, after its first step, and at its end."""

    def on_train_begin(self, logs=None):
        self.seen = [memory_in_use()]

    def on_train_batch_end(self, batch, logs=None):
        if len(self.seen) == 1:
            self.seen.append(memory_in_use())

    def on_train_end(self, logs=None):
        self.seen.append(memory_in_use())


def build_model():
    return keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 3)),
            layers.Rescaling(1 / 128, offset=-1),
            layers.Flatten(),
            layers.Dense(16, activation="tanh"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--step", type=int, default=1, help="pixels from square to square")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("squares"), help="where to write")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)

    began = time.perf_counter()
    source = keras_dp.spool(squares(arguments.step, 0.0, 0.7), arguments.folder, verbose=0)
    size = megabytes(arguments.folder)
    print(f"{len(source):,} squares written, {size:.0f} MB, {time.perf_counter() - began:.0f} s")

    keras.utils.set_random_seed(0)  # the initial weights; never the noise
    model = build_model()
    optimizer = keras_dp.DPAdam(0.01, max_grad_norm=1.0, target_epsilon=1.0, target_delta=DELTA)
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])
    memory = Memory()
    began = time.perf_counter()
    model.fit(source, batch_size=2048, epochs=arguments.epochs, callbacks=[memory], verbose=0)
    seconds = time.perf_counter() - began
    before, first, last = memory.seen
    print(f"{optimizer.ledger.steps} steps in {seconds:.0f} s; memory grew by ", end="")
    print(f"{first - before:.0f} MB for the first step, by {last - first:.0f} MB after it")

    test = list(squares(8, 0.7, 1.0))
    images, labels = (np.stack(part) for part in zip(*test, strict=True))
    accuracy = model.evaluate(images, labels, verbose=0)[1]
    print(f"test accuracy {accuracy:.1%}, epsilon {optimizer.get_epsilon(DELTA):.3f} ", end="")
    print(f"at delta = {DELTA:g} (one square), noise multiplier {optimizer.noise_multiplier:.2f}")


if __name__ == "__main__":
    main()
