"""The models of `keras.applications`, fixed and trained privately: at what cost.

    python benchmarks/applications.py [--models MobileNetV3Small,DenseNet121] [--rows 4] [--steps 3]

Each model is built without weights, for the smallest images that it takes and
ten classes, fixed by `keras_dp.fix_model`, compiled with `keras_dp.DPSGD`, and
trained on made-up images. Printed, as a table in Markdown:

- `weights`: how many, in millions;
- `problems`: what `check_model` finds;
- `engine`: which one serves the fixed model;
- `first s`: the first step, which traces the model and tries the engine;
- `s per step`: the median of the steps after it.

A model takes from half a minute to some minutes on two cores.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import logging
import statistics
import time
import warnings
from collections import Counter

import keras
import numpy as np

import keras_dp

CLASSES = 10
SIZES = {  # the smallest images, for those that don't take 32 × 32
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
    "Xception": 71,
}
DEFAULT = (
    "MobileNetV2",
    "MobileNetV3Small",
    "MobileNetV3Large",
    "EfficientNetV2B0",
    "ResNet50V2",
    "ConvNeXtTiny",
    "DenseNet121",
    "VGG16",
    "Xception",
    "InceptionV3",
    "NASNetMobile",
)
COLUMNS = ("model", "images", "weights", "problems", "engine", "first s", "s per step")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(DEFAULT))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    names = options.models.split(",")
    unknown = [name for name in names if not callable(getattr(keras.applications, name, None))]
    if unknown:
        raise SystemExit(f"keras.applications has no {', '.join(unknown)}.")
    logging.getLogger("keras_dp").setLevel(logging.ERROR)  # the table names what engine ran
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in names:
        keras.backend.clear_session()
        cells = measured(name, options.rows, options.steps)
        print(f"| {' | '.join(cells)} |", flush=True)


def measured(name, rows, steps):
    """One row of the table."""
    side = SIZES.get(name, 32)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(side, side, 3), classes=CLASSES
    )
    cells = [name, f"{side} × {side}", f"{model.count_params() / 1e6:.1f} M"]
    found = Counter(p.layer.split("(")[-1].rstrip(")") for p in keras_dp.check_model(model))
    cells.append(", ".join(f"{n} {kind}" for kind, n in found.items()) or "none")
    try:
        fixed = keras_dp.fix_model(model)
        fixed.compile(
            keras_dp.DPSGD(0.01, max_grad_norm=1.0, noise_multiplier=1.0),
            loss="sparse_categorical_crossentropy",
        )
        seconds = timed(fixed, side, rows, steps)
    except (ValueError, keras_dp.PrivacyError) as error:
        return [*cells, str(error).strip().splitlines()[0][:160], "", ""]
    after = f"{statistics.median(seconds[1:]):.2f}" if steps else ""
    return [*cells, str(fixed.optimizer.engine), f"{seconds[0]:.0f}", after]


def timed(model, side, rows, steps):
    """Seconds for the first step and each one after it."""
    random = np.random.default_rng(0)
    x = random.uniform(0, 255, (rows, side, side, 3)).astype("float32")
    y = random.integers(0, CLASSES, rows)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
            model.train_on_batch(x, y)
        seconds.append(time.perf_counter() - start)
    if not all(np.all(np.isfinite(w)) for w in model.get_weights()):
        raise ValueError("weights aren't finite after training")
    return seconds


if __name__ == "__main__":
    main()
