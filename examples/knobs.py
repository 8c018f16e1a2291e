"""What the knobs of private training do: noise, clipping norm, epochs, batch size.

First four settings, each trained with and without privacy on made-up data for two classes:

1. little data, many epochs: a large epsilon;
2. ten times the data, a tenth of the epochs: a small one, at the same number of steps;
3. more epochs at a lower learning rate: more steps, more epsilon;
4. more noise, and another optimizer, which the noise throws about: the smallest epsilon.

Then one knob at a time, the other three as they are. The script prints the epsilon of each
model as it was really trained, and draws the training loss of the four, ordinary against
private, and below them what each knob does to epsilon and to the loss on new data.

    pip install ".[examples]" && python examples/knobs.py
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import matplotlib

matplotlib.use("Agg")  # draw into files; no window is needed
import matplotlib.pyplot as plt
import numpy as np

import keras_dp

DELTA = 1e-5
BATCH_SIZE = 256
MAX_GRAD_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
    title: str
    num_examples: int
    epochs: int
    optimizer: Callable[[], keras.optimizers.Optimizer]
    private_optimizer: Callable[..., keras.optimizers.Optimizer]
    learning_rate: float
    noise_multiplier: float = 1.0


SETTINGS = [
    Setting("little data", 2_000, 100, keras.optimizers.SGD, keras_dp.DPSGD, 0.05),
    Setting("more data", 20_000, 10, keras.optimizers.SGD, keras_dp.DPSGD, 0.05),
    Setting("more epochs", 20_000, 50, keras.optimizers.SGD, keras_dp.DPSGD, 0.01),
    Setting("more noise", 20_000, 10, keras.optimizers.Adam, keras_dp.DPAdam, 0.01, 2.5),
]

# One knob at a time: these values, with the others at BASE.
BASE = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "epochs": 10, "batch_size": 256}
KNOBS = {
    "noise_multiplier": ("noise σ", [0.5, 1.0, 2.0, 4.0, 8.0]),
    "max_grad_norm": ("clipping norm C", [0.01, 0.1, 1.0, 10.0, 100.0]),
    "epochs": ("epochs", [1, 3, 10, 30]),
    "batch_size": ("batch size", [32, 128, 256, 1024]),
}


def make_data(num_examples, num_features=20, seed=0):
    """Two overlapping clouds of points, and which of them each point is from."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size=(num_examples, 1))
    centres = np.where(labels == 1, 0.4, -0.4)
    points = centres + rng.normal(size=(num_examples, num_features))
    return points.astype("float32"), labels.astype("float32")


def train(optimizer, data, epochs, batch_size=BATCH_SIZE):
    keras.utils.set_random_seed(0)  # the same initial weights for both; never the noise
    model = keras.Sequential(
        [
            keras.Input(data[0].shape[1:]),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(optimizer=optimizer, loss="binary_crossentropy")
    history = model.fit(*data, batch_size=batch_size, epochs=epochs, verbose=0)
    return model, history.history["loss"]


def turn(knob, value, data, epochs=None):
    """Epsilon, and the loss on new data, with one knob at a value and the others at BASE."""
    at = BASE | ({"epochs": epochs} if epochs else {}) | {knob: value}
    optimizer = keras_dp.DPSGD(
        0.05, max_grad_norm=at["max_grad_norm"], noise_multiplier=at["noise_multiplier"]
    )
    model, _ = train(optimizer, data, at["epochs"], at["batch_size"])
    loss = model.evaluate(*make_data(10_000, seed=1), batch_size=2048, verbose=0)
    return optimizer.get_epsilon(DELTA), loss


def draw_knob(panel, label, values, epsilons, losses):
    panel.plot(values, epsilons, "o-", color="C3")
    panel.set(xscale="log", yscale="log", xlabel=label, ylim=(0.1, 100))
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.minorticks_off()
    panel.tick_params(axis="y", colors="C3")
    other = panel.twinx()
    other.plot(values, losses, "s--", color="C1")
    other.set(ylim=(0, 0.8))
    other.tick_params(axis="y", colors="C1")
    return other


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("knobs.png"),
        help="where to write the picture (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, help="epochs of each setting (default: its own)")
    parser.add_argument(
        "--knobs",
        nargs="*",
        choices=tuple(KNOBS),
        default=list(KNOBS),
        help="knobs to turn one at a time (default: all)",
    )
    arguments = parser.parse_args()
    settings = SETTINGS
    if arguments.epochs is not None:
        settings = [dataclasses.replace(s, epochs=arguments.epochs) for s in SETTINGS]

    print(f"delta = {DELTA:g}; one example added or removed\n")
    print("setting      examples  epochs  optimizer      noise   epsilon  loss: ordinary  private")
    figure, panels = plt.subplots(2, 4, figsize=(15, 7.5), layout="constrained")
    for setting, panel in zip(settings, panels[0], strict=True):
        data = make_data(setting.num_examples)
        _, ordinary = train(setting.optimizer(setting.learning_rate), data, setting.epochs)
        model, private = train(
            setting.private_optimizer(
                setting.learning_rate,
                max_grad_norm=MAX_GRAD_NORM,
                noise_multiplier=setting.noise_multiplier,
            ),
            data,
            setting.epochs,
        )
        # From the steps that were taken, not from the ones that were planned.
        epsilon = model.optimizer.get_epsilon(DELTA)

        optimizer = f"{setting.optimizer.__name__} {setting.learning_rate:g}"
        print(
            f"{setting.title:12} {setting.num_examples:8}  {setting.epochs:6}  {optimizer:10} "
            f"{setting.noise_multiplier:9.1f} {epsilon:9.3f}  "
            f"{ordinary[-1]:14.3f} {private[-1]:8.3f}",
            flush=True,
        )

        for name, loss in (("ordinary", ordinary), ("private", private)):
            panel.plot(range(1, len(loss) + 1), loss, label=name)
        panel.set(xlabel="epoch", xlim=(0, setting.epochs), ylim=(0, 0.9))
        panel.set_title(
            f"{setting.title}: ε = {epsilon:.2g}\n"
            f"n = {setting.num_examples}, {setting.epochs} epochs, {optimizer}, "
            f"σ = {setting.noise_multiplier:g}",
            fontsize="medium",
        )
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    panels[0, 0].set_ylabel("training loss")

    data = make_data(5_000)
    if arguments.knobs:
        print("\none knob at a time: 5,000 examples, SGD 0.05; the others at", end=" ")
        print(", ".join(f"{KNOBS[knob][0]} {value:g}" for knob, value in BASE.items()))
        print("knob              value   epsilon  loss on new data")
    for knob, panel in zip(KNOBS, panels[1], strict=True):
        label, values = KNOBS[knob]
        if knob not in arguments.knobs:
            panel.set_axis_off()
            continue
        turned = [turn(knob, value, data, arguments.epochs) for value in values]
        for value, (epsilon, loss) in zip(values, turned, strict=True):
            print(f"{label:16} {value:6g} {epsilon:9.2f} {loss:17.3f}", flush=True)
        right = draw_knob(panel, label, values, *zip(*turned, strict=True))
        if knob == next(iter(KNOBS)):
            panel.set_ylabel("ε (log scale)", color="C3")
    if arguments.knobs:
        right.set_ylabel("loss on new data, private", color="C1")
    figure.suptitle(
        f"Above: four settings. Below: one knob at a time, the others held. ε at δ = {DELTA:g}"
    )

    figure.savefig(arguments.output, dpi=120)
    print(f"\nPicture: {arguments.output}")


if __name__ == "__main__":
    main()
