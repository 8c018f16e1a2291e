"""How long noise takes: ordinary and secure, in nanoseconds for each weight, in one run.

    python benchmarks/noise.py [--weights 1000000] [--rounds 20]

Both run as they do in training: inside a compiled step, on sums that are there already.
"""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf
from tables import median_ratio, number, print_head, print_row

from keras_dp.noise import NoiseSource, SecureNoiseSource


def step_of(source, sums):
    """A compiled step that noises `sums`, already traced."""
    step = tf.function(lambda: [tf.reduce_sum(n) for n in source.add_to(sums, 1.0)])
    step()
    return step


def seconds(step):
    start = time.perf_counter()
    keras.ops.convert_to_numpy(step()[0])
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    sums = [keras.ops.zeros((options.weights,))]
    steps = {
        "ordinary": step_of(NoiseSource(), sums),
        "secure_mode": step_of(SecureNoiseSource(), sums),
    }
    times = {name: [] for name in steps}
    for _ in range(options.rounds):  # in turn, so that both meet the machine in the same state
        for name, step in steps.items():
            times[name].append(seconds(step))

    print(f"{options.weights:,} weights, median of {options.rounds} rounds")
    print_head("noise", "ns for each weight", "ms a step", "times ordinary")
    for name, measured in times.items():
        middle = float(np.median(measured))
        ratio = median_ratio(measured, times["ordinary"])
        print_row(name, number(middle / options.weights * 1e9), number(middle * 1e3), number(ratio))


if __name__ == "__main__":
    main()
