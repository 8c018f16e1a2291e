"""What a step on two replicas costs next to one on one device, private and ordinary.

    python benchmarks/devices.py

Four fits of the same model take turns: ordinary and private, on one device and on two
replicas of half the batch each. On a machine without GPUs the replicas are logical devices
of one processor, so that two are no faster than one: what is to be seen is whether private
training loses more by being divided than ordinary training does.
"""

import argparse
import contextlib
import os
import statistics
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_dp

warnings.filterwarnings("ignore")
BATCH, ROWS = 512, 8192


def compiled(strategy, private):
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = keras.Sequential(
            [
                keras.Input((784,)),
                keras.layers.Dense(512, activation="relu"),
                keras.layers.Dense(512, activation="relu"),
                keras.layers.Dense(10),
            ]
        )
        optimizer = keras.optimizers.SGD(0.1)
        if private:
            optimizer = keras_dp.DPOptimizer(optimizer, max_grad_norm=1.0, noise_multiplier=1.0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss=loss)
    return model


class Clock(keras.callbacks.Callback):
    """Milliseconds of each step but the first ones."""

    def __init__(self):
        super().__init__()
        self.times = []

    def on_train_batch_begin(self, batch, logs=None):
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if batch > 1:
            self.times.append(1000 * (time.perf_counter() - self._begun))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) < 2:
        processor = tf.config.list_physical_devices("CPU")[0]
        halves = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(processor, halves)
    names = ["GPU:0", "GPU:1"] if len(gpus) >= 2 else ["CPU:0", "CPU:1"]
    strategy = tf.distribute.MirroredStrategy(names)

    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 784)).astype("float32")
    y = random.integers(0, 10, ROWS)
    models = {
        (kind, count): compiled(strategy if count == 2 else None, kind == "private")
        for kind in ("ordinary", "private")
        for count in (1, 2)
    }
    times = {key: [] for key in models}
    for turn in range(options.rounds + 1):
        for key, model in models.items():
            clock = Clock()
            model.fit(x, y, batch_size=BATCH, callbacks=[clock], verbose=0)
            if turn:  # the first is traced
                times[key].append(statistics.median(clock.times))
    for (kind, count), found in times.items():
        print(f"{kind:9} {count} {statistics.median(found):8.1f} ms a step")
    pairs = zip(*times.values(), strict=True)
    ratios = [
        (two / one, private_two / private_one) for one, two, private_one, private_two in pairs
    ]
    ordinary, private = (statistics.median(r) for r in zip(*ratios, strict=True))
    print(f"two replicas / one device: ordinary {ordinary:.2f}, private {private:.2f}")
    print(f"private next to ordinary: {statistics.median(b / a for a, b in ratios):.2f}")


if __name__ == "__main__":
    main()
