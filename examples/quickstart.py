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
from pathlib import Path

import keras
import matplotlib

matplotlib.use("Agg")  # draw into files; no window is needed
import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_dp

# SETTINGS. What private training likes, compared with ordinary training:
#
# - large batches, because all examples of a batch share one draw of the noise: here
#   every step sees every image, so an epoch is a single step;
# - a small network with bounded activations, because every weight gets noise;
# - a learning rate that suits the clipped gradients, none longer than MAX_GRAD_NORM;
# - as many steps as pay for themselves: for the same epsilon, more steps mean more
#   noise in each.
#
# The values were found by a small search over hidden units, batch sizes, epochs,
# clipping norms and learning rates, scored on a quarter of the training images that
# was held out for it; the test images had no part in it. Such a search uses privacy
# too, which no accountant sees. For data of your own, search on public data that
# looks alike.
DELTA = 1e-5  # well below 1 / number of examples
HIDDEN_UNITS = 64
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 0.125  # with more epsilon, try more: 0.2 for 8
MOMENTUM = 0.9


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--epsilon", type=float, default=3.0, help="privacy budget (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=int, default=150, help="passes over the data (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, help="expected size of a batch (default: all training images)"
    )
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


def load_data():
    """The digits as (images, labels) for training and for testing, scaled to [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def build_model():
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(HIDDEN_UNITS, activation="tanh"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


class EpsilonByStep(keras.callbacks.Callback):
    """Notes what has been spent after each step, for the picture."""

    def on_train_begin(self, logs=None):
        self.epsilon = []

    def on_train_batch_end(self, batch, logs=None):
        self.epsilon.append(self.model.optimizer.get_epsilon(DELTA))


def train(optimizer, data, arguments, callbacks=()):
    """A trained model and its history. Nothing here knows about privacy."""
    keras.utils.set_random_seed(0)  # the same initial weights for both; never the noise
    model = build_model()
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(
        *data,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        callbacks=list(callbacks),
        verbose=arguments.verbose,
    )
    return model, history.history


def draw(path, ordinary, private, epsilon_by_step, budget):
    """One picture: the loss of both by epoch, and the epsilon of the private one by step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, history in (("ordinary", ordinary), ("private", private)):
        left.plot(range(1, len(history["loss"]) + 1), history["loss"], label=name)
    left.set(xlabel="epoch", ylabel="training loss", title="Loss", ylim=(0, None))
    left.legend()

    right.plot(range(1, len(epsilon_by_step) + 1), epsilon_by_step, color="tab:orange")
    right.axhline(budget, color="black", linestyle="--", label=f"budget: {budget:g}")
    right.set(xlabel="step", ylabel="ε", title=f"Privacy spent (δ = {DELTA:g})", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_data, test_data = load_data()
    if arguments.batch_size is None:
        arguments.batch_size = len(train_data[0])

    print("Ordinary training ...")
    ordinary_model, ordinary = train(
        keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM), train_data, arguments
    )

    print("Private training ...")
    # The two changes: another optimizer, and a callback that watches the budget.
    # Given a target, the optimizer finds the noise that spends it in the epochs asked for.
    optimizer = keras_dp.DPSGD(
        LEARNING_RATE,
        momentum=MOMENTUM,
        max_grad_norm=MAX_GRAD_NORM,
        target_epsilon=arguments.epsilon,
        target_delta=DELTA,
    )
    budget = keras_dp.PrivacyBudget(epsilon=arguments.epsilon, delta=DELTA)
    spending = EpsilonByStep()
    private_model, private = train(optimizer, train_data, arguments, [budget, spending])

    print("\n           test accuracy   epsilon")
    for name, model, epsilon in (
        ("ordinary", ordinary_model, "infinite: no promise"),
        ("private", private_model, f"{private_model.optimizer.get_epsilon(DELTA):.3f}"),
    ):
        accuracy = model.evaluate(*test_data, verbose=0, return_dict=True)["accuracy"]
        print(f"{name:9} {accuracy:14.1%}   {epsilon}")
    print(f"(delta = {DELTA:g}; add or remove one image)\n")

    picture = arguments.output / "quickstart.png"
    draw(picture, ordinary, private, spending.epsilon, arguments.epsilon)

    # To go on training later: the file remembers what was spent.
    checkpoint = arguments.output / "private.keras"
    private_model.save(checkpoint)

    # To deploy: a plain Keras file, which loads where keras_dp isn't installed,
    # with the statement of what was spent beside it.
    deployed = arguments.output / "deploy.keras"
    keras_dp.save_inference_model(private_model, deployed)

    print(f"Picture:                {picture}")
    print(f"Model to train further: {checkpoint}")
    print(f"Model to deploy:        {deployed}")


if __name__ == "__main__":
    main()
