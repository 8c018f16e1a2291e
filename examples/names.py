"""Tell where a name is from, letter by letter: an LSTM, trained privately.

The names are first and last names of six countries, as they lie in the package Faker
(MIT licence): real names, and no download. An LSTM reads a name letter by letter and
says where it is at home. The script trains it without and with privacy, prints what both
reach and which countries the private one confuses, and asks it about a few names.

    pip install ".[examples]" && python examples/names.py

`--table` trains for epsilon = 8, 3 and 1 with five seeds each. `--held-out` scores on a
fifth of the training names in the place of the test names: that is how the settings were
chosen.
"""

import argparse
import dataclasses
import importlib
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
from keras import layers
from sklearn.model_selection import train_test_split

import keras_dp

COUNTRIES = {
    "Spain": "es_ES",
    "Italy": "it_IT",
    "Slovakia": "sk_SK",
    "Turkey": "tr_TR",
    "Iceland": "is_IS",
    "USA": "en_US",
}
PER_COUNTRY = 2_000  # names, at most
LENGTH = 12  # letters
# A public alphabet: one made from the names would be a release of its own. Letter 0 is none.
ALPHABET = " '-abcdefghijklmnopqrstuvwxyzàáâäçčďéèëğíìıîľĺňñóòôöřŕšşťúùûüýžðþæ"  # noqa: RUF001
DELTA = 1e-5  # well below 1 / number of examples
EPSILON = 3
MAX_GRAD_NORM = 0.3


@dataclasses.dataclass(frozen=True)
class Settings:
    batch_size: int
    epochs: int
    learning_rate: float


# Chosen on a fifth of the training names, which was held out for it (`--held-out`). Such a
# search uses privacy too, which no accountant sees: search on public data where you can.
SETTINGS = {
    8: Settings(2048, 30, 6.0),
    3: Settings(2048, 30, 6.0),
    1: Settings(2048, 20, 6.0),
}


def names_of(locale):
    """All first and last names of a country."""
    provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
    found = set()
    for kind in ("first_names", "last_names"):
        for ending in ("", "_male", "_female"):
            found.update(getattr(provider, kind + ending, ()))
    return {name.lower() for name in found}


def to_letters(names):
    """A number for each letter, and 0 before the name begins (so that it ends at the end)."""
    letters = np.zeros((len(names), LENGTH), "int32")
    for row, name in zip(letters, names, strict=True):
        numbers = [1 + ALPHABET.find(letter) for letter in name[-LENGTH:]]
        row[LENGTH - len(numbers) :] = numbers
    return letters


def load_data(held_out=False, most=PER_COUNTRY):
    """(letters, countries, names) to train on, and the same to test on."""
    names = {country: names_of(locale) for country, locale in COUNTRIES.items()}
    every, labels = [], []
    for label, country in enumerate(COUNTRIES):
        others = set().union(*(names[other] for other in COUNTRIES if other != country))
        own = sorted(names[country] - others)  # at home in one of the six alone
        np.random.default_rng(0).shuffle(own)
        every += own[:most]
        labels += [label] * len(own[:most])
    every, labels = np.array(every), np.array(labels)

    def split(part, seed, *arrays):
        halves = train_test_split(*arrays, test_size=part, stratify=arrays[1], random_state=seed)
        return halves[::2], halves[1::2]

    train, test = split(0.2, 0, to_letters(every), labels, every)
    return split(0.2, 1, *train) if held_out else (train, test)


def build_model():
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(len(ALPHABET) + 1, 16),
            layers.LSTM(32),
            layers.Dense(len(COUNTRIES), activation="softmax"),
        ]
    )


def train(optimizer, settings, train_data, seed=0):
    keras.utils.set_random_seed(seed)  # the initial weights; never the noise
    model = build_model()
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    letters, labels, *_ = train_data
    batch_size = min(settings.batch_size, len(labels))
    model.fit(letters, labels, batch_size=batch_size, epochs=settings.epochs, verbose=0)
    return model


def private_optimizer(settings, epsilon):
    return keras_dp.DPSGD(
        settings.learning_rate,
        momentum=0.9,
        use_ema=True,
        ema_momentum=0.9,
        max_grad_norm=MAX_GRAD_NORM,
        target_epsilon=epsilon,
        target_delta=DELTA,
    )


def accuracy(model, data):
    letters, labels, *_ = data
    return model.evaluate(letters, labels, verbose=0, return_dict=True)["accuracy"]


def with_epochs(settings, epochs):
    return settings if epochs is None else dataclasses.replace(settings, epochs=epochs)


def compare(arguments, train_data, test_data):
    settings = with_epochs(SETTINGS[EPSILON], arguments.epochs)
    print("training   epsilon   test accuracy  seconds")
    for name in ("ordinary", "private"):
        began = time.perf_counter()
        if name == "private":
            optimizer = private_optimizer(settings, EPSILON)
        else:
            optimizer = keras.optimizers.Adam(0.01)
        model = train(optimizer, settings, train_data)
        spent = f"{optimizer.get_epsilon(DELTA):8.3f}" if name == "private" else "infinite"
        seconds = time.perf_counter() - began
        print(f"{name:9} {spent:>8} {accuracy(model, test_data):15.1%} {seconds:8.0f}", flush=True)

    letters, labels, _ = test_data
    said = model.predict(letters, verbose=0).argmax(-1)
    print("\nof 100 names from ... the private model says")
    print(" " * 10 + "".join(f"{country:>10}" for country in COUNTRIES))
    for label, country in enumerate(COUNTRIES):
        shares = np.bincount(said[labels == label], minlength=len(COUNTRIES))
        shares = 100 * shares / shares.sum()
        print(f"{country:10}" + "".join(f"{share:10.0f}" for share in shares))

    print()
    asked = ["guðrún", "yılmaz", "esposito", "horváthová", "rodríguez", "washington"]  # noqa: RUF001
    for name, scores in zip(asked, model.predict(to_letters(asked), verbose=0), strict=True):
        print(f"{name:12} {list(COUNTRIES)[scores.argmax()]:10} {scores.max():4.0%}")


def print_table(arguments, train_data, test_data):
    print(f"delta = {DELTA:g}, one name added or removed\n")
    print("epsilon    mean  standard error   each seed")
    for epsilon, settings in SETTINGS.items():
        settings = with_epochs(settings, arguments.epochs)
        scores = []
        for seed in range(arguments.seeds):
            optimizer = private_optimizer(settings, epsilon)
            scores.append(accuracy(train(optimizer, settings, train_data, seed), test_data))
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        each = " ".join(f"{score:6.1%}" for score in scores)
        spent = optimizer.get_epsilon(DELTA)
        print(f"{spent:7.3f}  {statistics.mean(scores):6.1%} {error:15.1%}   {each}", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--table", action="store_true", help="epsilon = 8, 3, 1 and several seeds")
    parser.add_argument("--seeds", type=int, default=5, help="for --table (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over the data (default: see SETTINGS)")
    parser.add_argument("--most", type=int, default=PER_COUNTRY, help="names of each country")
    parser.add_argument(
        "--held-out", action="store_true", help="score on a fifth of the training names"
    )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    train_data, test_data = load_data(arguments.held_out, arguments.most)
    print(f"{len(train_data[0]):,} names to train on, {len(test_data[0]):,} to test on\n")
    (print_table if arguments.table else compare)(arguments, train_data, test_data)


if __name__ == "__main__":
    main()
