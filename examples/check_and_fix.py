"""A network of keras.applications that can't be trained privately, and how to fix it.

MobileNet normalizes by batch: what comes out for one image depends on the others beside it.
The script asks `check_model` what stands in the way, tries to train all the same, fixes the
network with `fix_model`, looks at what became of it, and trains it for a few private steps on
handwritten digits. Weights are random, so that nothing is downloaded: it is the way that is
shown, not what a large network reaches.

    pip install ".[examples]" && python examples/check_and_fix.py
"""

import argparse
import collections
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_dp

DELTA = 1e-5


def load_data():
    """The digits, as colour images of 32 by 32."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0 - 0.3).astype("float32").reshape(-1, 8, 8, 1)
    return np.tile(np.kron(images, np.ones((1, 4, 4, 1), "float32")), 3), labels


def build_model(alpha):
    return keras.applications.MobileNet(
        input_shape=(32, 32, 3), alpha=alpha, weights=None, classes=10
    )


def kinds(model):
    return collections.Counter(type(layer).__name__ for layer in model.layers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--alpha", type=float, default=0.25, help="width of MobileNet")
    parser.add_argument("--epochs", type=int, default=2, help="private passes; 0: don't train")
    arguments = parser.parse_args()
    images, labels = load_data()

    keras.utils.set_random_seed(0)
    model = build_model(arguments.alpha)
    problems = keras_dp.check_model(model)
    print(f"{model.name}: {model.count_params():,} weights, {len(problems)} problems. The first:\n")
    print(problems[0])

    print("\nCompiled and trained all the same:")
    optimizer = keras_dp.DPAdam(1e-3, max_grad_norm=1.0, noise_multiplier=1.0)
    try:
        model.compile(optimizer, "sparse_categorical_crossentropy")
        model.fit(images, labels, batch_size=300, epochs=1, verbose=0)
    except keras_dp.PrivacyError as error:
        print(f"PrivacyError: {str(error)[:230]} ...")

    fixed = keras_dp.fix_model(model)
    frozen = keras_dp.fix_model(model, batch_normalization="freeze")
    before, after = kinds(model), kinds(fixed)
    print("\nlayers                    before  fixed  frozen")
    for kind in ("BatchNormalization", "GroupNormalization", "DepthwiseConv2D", "Conv2D"):
        print(f"{kind:24} {before[kind]:7} {after[kind]:6} {kinds(frozen)[kind]:7}")
    outputs = [m.predict(images[:64], verbose=0) for m in (model, fixed, frozen)]
    print(
        f"largest difference of the outputs: fixed {np.abs(outputs[1] - outputs[0]).max():.1e}, "
        f"frozen {np.abs(outputs[2] - outputs[0]).max():.1e}"
    )
    print(f"problems left: {len(keras_dp.check_model(fixed))}")

    if arguments.epochs:
        began = time.perf_counter()
        fixed.compile(
            keras_dp.DPAdam(1e-3, max_grad_norm=1.0, noise_multiplier=1.0, microbatch_size=128),
            "sparse_categorical_crossentropy",
        )
        budget = keras_dp.PrivacyBudget(delta=DELTA)
        history = fixed.fit(
            images,
            labels,
            batch_size=600,
            epochs=arguments.epochs,
            callbacks=[budget],
            verbose=0,
        ).history
        print(
            f"\nengine {fixed.optimizer.engine!r}; {time.perf_counter() - began:.0f} seconds, ",
            end="",
        )
        print("most of them for the first step")
        for epoch, (loss, epsilon) in enumerate(
            zip(history["loss"], history["epsilon"], strict=True), start=1
        ):
            print(f"epoch {epoch}: loss {loss:.3f} (not private), epsilon {epsilon:.3f}")


if __name__ == "__main__":
    main()
