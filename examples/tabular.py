"""A table with columns of several kinds, a rare class, and settings chosen on public data.

Two surveys of the 1970s on extramarital affairs (Fair 1978), which the package statsmodels
brings along. That of Redbook (6,366 women) is private here; that of Psychology Today (601
readers, some years earlier) is public. Four settings are tried on the public one, with as
much noise as the private one will get; the best is used once on the private one.

Preprocessing layers are inside the model. What they usually learn from the data (means,
boundaries, a vocabulary) they are given from the questionnaire. Fewer than half answer yes:
class weights make up for it.

    pip install ".[examples]" && python examples/tabular.py
"""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
import pandas as pd
from keras import layers
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split

import keras_dp

DELTA = 1e-5  # well below 1 / number of people
EPSILON = 1
BATCH_SIZE = 1024
CANDIDATES = [(0.03, 0), (0.1, 0), (0.01, 16), (0.03, 16)]  # learning rate, hidden units

# Columns as the questionnaire has them: a mean and a spread that one would guess, or answers.
NUMBERS = {"age": (32.0, 9.0), "years": (10.0, 7.0), "education": (14.0, 2.5)}
GRADES = {"religious": 5, "rating": 5, "occupation": 7}  # answers 1 to so many
AGES = [25.0, 30.0, 40.0]  # boundaries


def load_data():
    """The public and the private table: columns by name, and who had an affair."""
    folder = Path(importlib.util.find_spec("statsmodels").origin).parent / "datasets" / "fair"
    names = {
        "public": {
            "age": "age",
            "years": "nmarried",
            "education": "education",
            "religious": "religious",
            "rating": "rate_marriage",
            "occupation": "occupation",
        },
        "private": {
            "age": "age",
            "years": "yrs_married",
            "education": "educ",
            "religious": "religious",
            "rating": "rate_marriage",
            "occupation": "occupation",
        },
    }
    tables = {}
    for which, file, label in (
        ("public", "fair_pt.csv", "naffairs"),
        ("private", "fair.csv", "affairs"),
    ):
        frame = pd.read_csv(folder / file)
        columns = {
            new: frame[old].to_numpy("float32" if new in NUMBERS else "int32")
            for new, old in names[which].items()
        }
        tables[which] = columns, (frame[label] > 0).to_numpy("int32")
    return tables


def rows(table, index):
    columns, labels = table
    return {name: column[index] for name, column in columns.items()}, labels[index]


def split(table, part=0.2):
    chosen = train_test_split(
        np.arange(len(table[1])), test_size=part, stratify=table[1], random_state=0
    )
    return [rows(table, index) for index in chosen]


def build_model(hidden_units):
    inputs, parts = {}, []
    for name, (mean, spread) in NUMBERS.items():
        inputs[name] = keras.Input((1,), name=name)
        parts.append(layers.Normalization(mean=mean, variance=spread**2)(inputs[name]))
    bins = layers.Discretization(bin_boundaries=AGES, output_mode="one_hot")
    parts.append(bins(inputs["age"]))
    for name, answers in GRADES.items():
        inputs[name] = keras.Input((1,), name=name, dtype="int32")
        encode = layers.CategoryEncoding(answers + 1, output_mode="one_hot")
        parts.append(encode(inputs[name]))
    x = layers.Concatenate()(parts)
    if hidden_units:
        x = layers.Dense(hidden_units, activation="tanh")(x)
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))


def train(table, learning_rate, hidden_units, epochs, *, epsilon=EPSILON, weights=None):
    keras.utils.set_random_seed(0)  # the initial weights; never the noise
    model = build_model(hidden_units)
    if epsilon is None:
        optimizer = keras.optimizers.Adam(learning_rate)
    else:
        optimizer = keras_dp.DPAdam(
            learning_rate,
            use_ema=True,
            ema_momentum=0.9,
            max_grad_norm=1.0,
            target_epsilon=epsilon,
            target_delta=DELTA,
        )
    model.compile(optimizer, "binary_crossentropy")
    model.fit(*table, batch_size=BATCH_SIZE, epochs=epochs, class_weight=weights, verbose=0)
    return model


def scores(model, table):
    """How well it ranks people, and how well it finds both kinds of them."""
    columns, labels = table
    said = np.asarray(model(columns))[:, 0]
    return roc_auc_score(labels, said), balanced_accuracy_score(labels, said > 0.5)


def choose(public, num_private, epochs, candidates):
    """The best settings on public data, made as large as the private data by repetition.

    Then the same epsilon means the same noise. Nothing is promised to public people.
    """
    train_table, test_table = split(public, part=0.4)
    index = np.resize(np.arange(len(train_table[1])), num_private)
    results = []
    print("learning rate  hidden units   public AUC")
    for learning_rate, hidden_units in candidates:
        model = train(rows(train_table, index), learning_rate, hidden_units, epochs)
        results.append(scores(model, test_table)[0])
        print(f"{learning_rate:13g} {hidden_units:13} {results[-1]:12.3f}", flush=True)
    return candidates[int(np.argmax(results))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
    parser.add_argument("--candidates", type=int, default=4, help="settings to try, at most")
    arguments = parser.parse_args()
    epochs, candidates = arguments.epochs, CANDIDATES[: arguments.candidates]

    tables = load_data()
    for which, (_, labels) in tables.items():
        print(f"{which:8} {len(labels):5,} people, {labels.mean():.0%} answered yes")
    train_table, test_table = split(tables["private"])

    print(f"\nOn public data, with the noise of epsilon = {EPSILON:g}:")
    settings = choose(tables["public"], len(train_table[1]), epochs, candidates)
    print(f"chosen: learning rate {settings[0]:g}, {settings[1]} hidden units\n")

    # How many answer yes, as the public survey has it: one in four.
    share = tables["public"][1].mean()
    weights = {0: 0.5 / (1 - share), 1: 0.5 / share}
    print("On private data:\ntraining                      epsilon     AUC   balanced accuracy")
    for name, epsilon, class_weight in (
        ("ordinary, class weights", None, weights),
        ("private, no class weights", EPSILON, None),
        ("private, class weights", EPSILON, weights),
    ):
        model = train(train_table, *settings, epochs, epsilon=epsilon, weights=class_weight)
        auc, balanced = scores(model, test_table)
        spent = f"{model.optimizer.get_epsilon(DELTA):8.3f}" if epsilon else "infinite"
        print(f"{name:28} {spent:>8} {auc:7.3f} {balanced:19.1%}", flush=True)
    print(f"\n(delta = {DELTA:g}, one person added or removed; the second and third line are two")
    print("releases: whoever publishes both models has spent both.)")


if __name__ == "__main__":
    main()
