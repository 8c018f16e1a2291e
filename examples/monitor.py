"""Watch what clipping and noise do while a model learns handwritten digits.

A small convolutional network is trained privately on scikit-learn's images of
handwritten digits, with a `keras_dp.PrivacyMonitor` that draws epsilon, the share
of clipped examples, gradient norms and the signal-to-noise ratio. The script
prints what they say about the settings.

    pip install ".[examples]" && python examples/monitor.py

With `--private`, only what is private is gathered, printed and drawn.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
from sklearn.datasets import load_digits

import keras_dp

DELTA = 1e-5


def load_data():
    """The digits as images of 8 × 8, scaled by constants, and labels."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16.0 - 0.3).astype("float32").reshape(-1, 8, 8, 1), labels


def build_model(args):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="tanh", name="conv_1"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(32, 3, padding="same", activation="tanh", name="conv_2"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="tanh", name="hidden"),
            keras.layers.Dense(10, activation="softmax", name="classes"),
        ]
    )
    optimizer = keras_dp.DPSGD(
        args.learning_rate,
        momentum=0.9,
        max_grad_norm=args.max_grad_norm,
        target_epsilon=args.epsilon,
        target_delta=DELTA,
    )
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--private", action="store_true", help="show only what is private")
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--epsilon", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="C (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.15, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("monitor_output"),
        help="folder for the picture and the numbers (default: %(default)s)",
    )
    return parser.parse_args()


def main():
    args = parse_arguments()
    keras.utils.set_random_seed(0)  # the initial weights; never the noise
    model = build_model(args)
    monitor = keras_dp.PrivacyMonitor(
        DELTA, path=args.output, log_dir=args.output / "logs", private=args.private
    )
    images, labels = load_data()
    print(f"Private training, {args.epochs} epochs ...", flush=True)
    model.fit(images, labels, batch_size=512, epochs=args.epochs, verbose=0, callbacks=[monitor])

    marked = "" if args.private else "not_private/"
    names = {
        "epsilon": "epsilon",
        "clipped": f"{marked}clipped_share",
        "signal/noise": f"{marked}signal_to_noise",
    }
    if not args.private:
        names["median norm"] = f"{marked}gradient_norm/0.5"
    print(" step  " + "  ".join(f"{title:>12}" for title in names))
    steps = monitor.history["step"]
    for k in sorted({0, len(steps) // 4, len(steps) // 2, len(steps) - 1}):
        row = "  ".join(f"{monitor.history[name][k]:12.3f}" for name in names.values())
        print(f"{steps[k]:5}  {row}")
    print("covered by epsilon" if args.private else "NOT PRIVATE: don't release these numbers")
    print(f"\nPicture and numbers: {args.output}")
    print(f"TensorBoard:         tensorboard --logdir {args.output / 'logs'}")


if __name__ == "__main__":
    main()
