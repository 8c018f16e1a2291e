"""Recognise handwritten digits, with and without privacy.

The same network is trained twice on scikit-learn's 1,797 images of handwritten
digits, which come with scikit-learn: once with Keras' SGD, once with
`keras_dp.DPSGD`, which is (epsilon, delta)-differentially private for each single
image. The script prints the test accuracy and the epsilon of both, draws their
progress, and saves the private model for further training and for deployment.

    pip install ".[examples]" && python examples/quickstart.py

How the settings were chosen: see SETTINGS below.
"""

import argparse
import dataclasses
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import matplotlib

matplotlib.use("Agg")  # draw into files; no window is needed
import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_dp

DELTA = 1e-5  # well below 1 / number of examples
MAX_GRAD_NORM = 1.0
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Settings:
    batch_size: int  # of 1,347 training images
    epochs: int
    learning_rate: float
    hidden_units: int  # 0: a linear classifier
    averaging: float | None  # the momentum of the average over steps that the weights end with


# SETTINGS for a privacy budget. What private training likes, compared with ordinary:
#
# - large batches, because all examples of a batch share one draw of the noise: here
#   a step sees each image with probability 1/3 (batches of 512) or 1/2 (of 674);
# - a small network with bounded activations, because every weight gets noise: the
#   smaller the budget, the smaller the network;
# - as many steps as pay for themselves: for the same epsilon, more steps mean more
#   noise in each;
# - the average of the weights over the last steps, which has less of the noise.
#
# The values come from a small search over these and the learning rate, scored on a
# quarter of the training images that was held out for it; the test images had no part
# in it. Such a search uses privacy too, which no accountant sees. For data of your own,
# search on public data that looks alike.
SETTINGS = {
    8: Settings(512, epochs=100, learning_rate=0.15, hidden_units=64, averaging=0.9),
    3: Settings(512, epochs=67, learning_rate=0.15, hidden_units=32, averaging=0.9),
    1: Settings(674, epochs=10, learning_rate=1.0, hidden_units=0, averaging=None),
}


def load_data():
    """The digits as (images, labels) for training and for testing.

    Pixels are scaled to lie around 0 by constants: whatever is computed from the
    data, such as their mean, would be a release of its own.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0 - 0.3).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def build_model(settings):
    if not settings.hidden_units:
        outputs = keras.layers.Dense(10, activation="softmax", kernel_initializer="zeros")
        return keras.Sequential([keras.Input((64,)), outputs])
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(settings.hidden_units, activation="tanh"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def ordinary_optimizer(settings):
    return keras.optimizers.SGD(settings.learning_rate, momentum=MOMENTUM, **_averaging(settings))


def private_optimizer(settings, epsilon):
    # Given a target, the optimizer finds the noise that spends it in the epochs asked for.
    return keras_dp.DPSGD(
        settings.learning_rate,
        momentum=MOMENTUM,
        **_averaging(settings),
        max_grad_norm=MAX_GRAD_NORM,
        target_epsilon=epsilon,
        target_delta=DELTA,
    )


def _averaging(settings):
    if settings.averaging is None:
        return {}
    return {"use_ema": True, "ema_momentum": settings.averaging}


def train(settings, optimizer, data, *, test_data=None, callbacks=(), seed=0, verbose=0):
    """A trained model and its history. Nothing here knows about privacy.

    Whatever is chosen by looking at test data is not private with respect to them: they are
    for the picture.
    """
    keras.utils.set_random_seed(seed)  # the initial weights; never the noise
    model = build_model(settings)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(
        *data,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        validation_data=test_data,
        callbacks=list(callbacks),
        verbose=verbose,
    )
    return model, history.history


def accuracy(model, data):
    return model.evaluate(*data, verbose=0, return_dict=True)["accuracy"]


def draw(path, histories, reached, budget):
    """One picture: the test accuracy of both by epoch, and the epsilon of the private one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    looks = {"ordinary": ("C0", 7), "private": ("C1", -16)}  # a colour, and where the figure goes
    for name, (colour, above) in looks.items():
        percent = [100 * share for share in histories[name]["val_accuracy"]]
        left.plot(range(1, len(percent) + 1), percent, color=colour, label=name)
        # The weights that training ends with may be an average, which is better than the last.
        end, figure_at_end = (len(percent), 100 * reached[name]), f"{reached[name]:.1%}"
        left.plot(*end, "o", color=colour, clip_on=False, zorder=3)
        left.annotate(
            figure_at_end,
            end,
            (0, above),
            textcoords="offset points",
            ha="center",
            color=colour,
        )
    left.set(xlabel="epoch", ylabel="test images recognised, %", title="Accuracy", ylim=(0, 105))
    left.legend(frameon=False, loc="lower right")

    spent = [0, *histories["private"]["epsilon"]]
    right.plot(range(len(spent)), spent, color="C1")
    right.axhline(budget, color="black", linestyle="--", label=f"budget: ε = {budget:g}")
    right.set(xlabel="epoch", ylabel="ε", title=f"Privacy spent, at δ = {DELTA:g}")
    right.set(xlim=(0, None), ylim=(0, budget * 1.08))
    right.legend(frameon=False, loc="lower right")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--epsilon",
        type=int,
        choices=tuple(SETTINGS),
        default=3,
        help="privacy budget (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, help="passes over the data (default: see SETTINGS)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("quickstart_output"),
        help="folder for the picture and the models (default: %(default)s)",
    )
    parser.add_argument(
        "--verbose",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="1 or 2 shows each epoch, with the epsilon so far (default: %(default)s)",
    )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[arguments.epsilon]
    if arguments.epochs is not None:
        settings = dataclasses.replace(settings, epochs=arguments.epochs)
    train_data, test_data = load_data()

    print(f"Ordinary training, {settings.epochs} epochs ...", flush=True)
    ordinary_model, ordinary = train(
        settings,
        ordinary_optimizer(settings),
        train_data,
        test_data=test_data,
        verbose=arguments.verbose,
    )

    print(f"Private training, {settings.epochs} epochs ...", flush=True)
    # The two changes: another optimizer, and a callback that watches the budget.
    optimizer = private_optimizer(settings, arguments.epsilon)
    budget = keras_dp.PrivacyBudget(epsilon=arguments.epsilon, delta=DELTA, verbose=0)
    private_model, private = train(
        settings,
        optimizer,
        train_data,
        test_data=test_data,
        callbacks=[budget],
        verbose=arguments.verbose,
    )

    spent = optimizer.get_epsilon(DELTA)
    reached = {
        "ordinary": accuracy(ordinary_model, test_data),
        "private": accuracy(private_model, test_data),
    }
    print("\n           test accuracy   epsilon")
    print(f"ordinary   {reached['ordinary']:13.1%}   infinite (no guarantee)")
    print(f"private    {reached['private']:13.1%}   {spent:.3f}")
    print(
        f"(delta = {DELTA:g}, one image added or removed; {optimizer.ledger.steps} steps, "
        f"noise multiplier {optimizer.noise_multiplier:.2f})\n"
    )

    picture = arguments.output / "quickstart.png"
    draw(picture, {"ordinary": ordinary, "private": private}, reached, arguments.epsilon)

    # To go on training later: the file remembers what was spent.
    checkpoint = arguments.output / "private.keras"
    private_model.save(checkpoint)

    # To deploy: a plain Keras file, which loads where keras_dp isn't installed,
    # with the statement of what was spent beside it.
    files = keras_dp.save_inference_model(private_model, arguments.output / "deploy.keras")

    print(f"Picture:                {picture}")
    print(f"Model to train further: {checkpoint}")
    print(f"Model to deploy:        {files.model}")
    print(f"Privacy statement:      {files.statement}")


if __name__ == "__main__":
    main()
