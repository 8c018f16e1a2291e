"""Train on several devices of one machine, with the guarantee of one.

Handwritten digits (scikit-learn's 1,797 images), by `tf.distribute.MirroredStrategy`:
each step draws one batch, divides it among the devices, adds up their clipped gradients,
and adds noise to the total, once. Epsilon is that of one device. All GPUs are used, where
there are two or more; else the processor is divided into logical devices, which is no
faster, but the same program.

    pip install ".[examples]" && python examples/several_devices.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_dp

DELTA = 1e-5


def devices(count):
    """The names of the devices to train on; before TensorFlow has done anything else."""
    found = tf.config.list_physical_devices("GPU")
    if len(found) >= 2:
        return [f"GPU:{k}" for k in range(len(found))]
    processor = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(processor, parts)
    return [f"CPU:{k}" for k in range(count)]


def largest_difference(variables):
    """Of the weights on the first device from those on any other."""
    differences = [0.0]
    for variable in variables:
        first, *others = (part.numpy() for part in variable.value.values)
        differences += [np.abs(first - other).max() for other in others]
    return max(differences)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2, help="logical ones, without GPUs")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--epsilon", type=float, default=8.0)
    options = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0 - 0.3).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )

    strategy = tf.distribute.MirroredStrategy(devices(options.devices))
    with strategy.scope():  # model and optimizer: each device has a copy of all that they hold
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(64, activation="tanh"),
                keras.layers.Dense(10, activation="softmax"),
            ]
        )
        optimizer = keras_dp.DPSGD(
            0.3,
            momentum=0.9,
            max_grad_norm=1.0,
            target_epsilon=options.epsilon,
            target_delta=DELTA,
        )
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    # batch_size is that of all devices together.
    model.fit(x_train, y_train, batch_size=512, epochs=options.epochs, verbose=0)
    print("Weights on the devices differ by", largest_difference(model.trainable_variables))
    on_one = keras_dp.accounting.compute_epsilon(
        num_examples=len(x_train),
        batch_size=512,
        noise_multiplier=optimizer.noise_multiplier,
        epochs=options.epochs,
        delta=DELTA,
    )
    print(f"The same plan on one device: epsilon = {on_one:.3f}")

    accuracy = np.mean(model.predict(x_test, verbose=0).argmax(-1) == y_test)
    print(
        f"{strategy.num_replicas_in_sync} devices, {optimizer.ledger.steps} steps: "
        f"{100 * accuracy:.1f} % of the test images, epsilon = "
        f"{optimizer.get_epsilon(DELTA):.3f} at delta = {DELTA:g}"
    )


if __name__ == "__main__":
    main()
