"""What helps private accuracy, and what doesn't: digits at one epsilon, over several seeds.

    python benchmarks/utility.py [--seeds 10] [--epsilon 3] [--table clipping advice]

The data are scikit-learn's digits, 1,347 for training and 450 for testing; every
row spends the same epsilon at delta = 1e-5, and its noise follows from that. A seed
sets the initial weights; noise and batches are new each time. Two tables:

- clipping: the ways of clipping, and augmentation multiplicity, with all other
  settings as in `examples/quickstart.py`, where they were chosen for flat clipping;
- advice: from settings that are good for ordinary training, one change at a time.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import keras
import rich.console
import rich.progress

import keras_dp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import DELTA, SETTINGS, accuracy, load_data

BACKGROUND = -0.3  # a pixel without ink, as load_data scales it


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is trained; by default as the quickstart does for epsilon = 3."""

    clipping: str = "flat"
    max_grad_norm: float = 1.0
    learning_rate: float = SETTINGS[3].learning_rate
    batch_size: int = SETTINGS[3].batch_size
    epochs: int = SETTINGS[3].epochs
    hidden: tuple = (SETTINGS[3].hidden_units,)
    activation: str = "tanh"
    averaging: bool = True
    shift: float = 0.0  # of the image, at most, as a share of its side
    views: int = 1


CLIPPING = {
    "flat": Way(),
    "per layer": Way(clipping="per_layer"),
    "automatic": Way(clipping="automatic"),
    "adaptive": Way(clipping="adaptive"),
    "flat, images shifted by up to a pixel": Way(shift=1 / 8),
    "flat, shifted, 4 views of each": Way(shift=1 / 8, views=4),
    "flat, shifted, 8 views of each": Way(shift=1 / 8, views=8),
}

ORDINARY = Way(
    max_grad_norm=10.0,
    learning_rate=0.1,
    batch_size=32,
    epochs=20,
    hidden=(128, 128),
    activation="relu",
    averaging=False,
)
ADVICE = {"settings for ordinary training": ORDINARY}
for _name, _change in (
    ("C = 1, and a learning rate to match", {"max_grad_norm": 1.0, "learning_rate": 0.5}),
    ("batches of 512, more epochs", {"batch_size": 512, "epochs": 67}),
    ("a learning rate for such batches", {"learning_rate": 0.15}),
    ("a small network, tanh", {"hidden": (32,), "activation": "tanh"}),
    ("weights averaged over the last steps", {"averaging": True}),
):
    ADVICE[_name] = dataclasses.replace(list(ADVICE.values())[-1], **_change)


def build(way):
    layers = [keras.Input((64,))]
    if way.shift:
        layers += [
            keras.layers.Reshape((8, 8, 1)),
            keras.layers.RandomTranslation(
                way.shift, way.shift, fill_mode="constant", fill_value=BACKGROUND
            ),
            keras.layers.Flatten(),
        ]
    layers += [keras.layers.Dense(units, activation=way.activation) for units in way.hidden]
    return keras.Sequential([*layers, keras.layers.Dense(10, activation="softmax")])


def score(way, epsilon, data, seed):
    """Test accuracy, and the epsilon that was spent."""
    train, test = data
    keras.utils.set_random_seed(seed)
    model = build(way)
    averaging = {"use_ema": True, "ema_momentum": 0.9} if way.averaging else {}
    optimizer = keras_dp.DPSGD(
        way.learning_rate,
        momentum=0.9,
        **averaging,
        max_grad_norm=way.max_grad_norm,
        target_epsilon=epsilon,
        target_delta=DELTA,
        clipping=way.clipping,
        augmentation_multiplicity=way.views,
    )
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*train, batch_size=way.batch_size, epochs=way.epochs, verbose=0)
    return accuracy(model, test), optimizer.get_epsilon(DELTA)


def table(ways, arguments, data):
    """Prints a Markdown table."""
    print(
        "| training | ε | mean | standard error | each seed | minutes |\n|---|---|---|---|---|---|"
    )
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task("training", total=len(ways) * arguments.seeds)
        for name, way in ways.items():
            began, scores, spent = time.monotonic(), [], 0.0
            for seed in range(arguments.seeds):
                value, epsilon = score(way, arguments.epsilon, data, seed)
                scores.append(100 * value)
                spent = max(spent, epsilon)
                progress.advance(task)
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
            each = ", ".join(f"{s:.1f}" for s in scores)
            minutes = (time.monotonic() - began) / 60
            mean = statistics.mean(scores)
            print(
                f"| {name} | {spent:.3f} | {mean:.1f} % | {error:.1f} | {each} | {minutes:.1f} |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=10, help="models a row (default: %(default)s)")
    parser.add_argument("--epsilon", type=float, default=3.0, help="(default: %(default)s)")
    parser.add_argument(
        "--table", nargs="*", choices=("clipping", "advice"), default=["clipping", "advice"]
    )
    parser.add_argument("--rows", default="", help="only those with this in their name")
    arguments = parser.parse_args()
    data = load_data()
    for name in arguments.table:
        ways = {"clipping": CLIPPING, "advice": ADVICE}[name]
        ways = {row: way for row, way in ways.items() if arguments.rows in row}
        print(f"\n{name}: test accuracy, epsilon = {arguments.epsilon:g}, delta = {DELTA:g}\n")
        table(ways, arguments, data)


if __name__ == "__main__":
    main()
