"""Made-up people from a private model: train on synthetic, test on real.

A small generative model learns the joint distribution of a survey's nine columns (Fair 1978,
6,366 women, from the package statsmodels) privately: each column from those before it. It
then makes up as many people as were asked. Whatever is done with them costs no privacy. A
classifier is trained on real and on made-up people, and both are tested on real people that
neither has seen; the difference is what the privacy costs.

    pip install ".[examples]" && python examples/synthetic.py
"""

import argparse
import itertools
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import matplotlib

matplotlib.use("Agg")  # draw into files; no window is needed
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from statsmodels.datasets import fair

import keras_dp

DELTA = 1e-5  # well below 1 / number of people
# The answers that each question allows, from the questionnaire and not from the data.
COLUMNS = {
    "rate_marriage": [1, 2, 3, 4, 5],
    "age": [17.5, 22, 27, 32, 37, 42],
    "yrs_married": [0.5, 2.5, 6, 9, 13, 16.5, 23],
    "children": [0, 1, 2, 3, 4, 5.5],
    "religious": [1, 2, 3, 4],
    "educ": [9, 12, 14, 16, 17, 20],
    "occupation": [1, 2, 3, 4, 5, 6],
    "occupation_husb": [1, 2, 3, 4, 5, 6],
    "affair": [0, 1],
}
SIZES = [len(answers) for answers in COLUMNS.values()]
STARTS = np.cumsum([0, *SIZES])


def load_data():
    """Answers by number: (people, columns), for training and for testing."""
    frame = fair.load_pandas().data
    frame["affair"] = (frame["affairs"] > 0).astype(int)
    numbers = [
        np.abs(frame[name].to_numpy()[:, None] - np.array(answers)).argmin(axis=1)
        for name, answers in COLUMNS.items()
    ]
    return train_test_split(np.stack(numbers, axis=1), test_size=0.25, random_state=0)


def one_hot(people):
    return np.concatenate(
        [np.eye(size, dtype="float32")[people[:, k]] for k, size in enumerate(SIZES)], axis=1
    )


def build_model():
    """Scores for every answer to every question, each from the answers to earlier questions."""
    answers = keras.Input((STARTS[-1],))
    scores = []
    for k, size in enumerate(SIZES):
        earlier = answers[:, : STARTS[k]] if k else ops.zeros_like(answers[:, :1])
        scores.append(layers.Dense(size, kernel_initializer="zeros")(earlier))
    return keras.Model(answers, layers.Concatenate()(scores))


@keras.saving.register_keras_serializable("synthetic")
def answers_loss(answers, scores):
    """Minus the log of the probability of all answers of a person."""
    total = 0.0
    for start, end in itertools.pairwise(STARTS):
        total += keras.losses.categorical_crossentropy(
            answers[:, start:end], scores[:, start:end], from_logits=True
        )
    return total


def train(people, optimizer, epochs):
    model = build_model()
    model.compile(optimizer, answers_loss)
    rows = one_hot(people)
    model.fit(rows, rows, batch_size=1024, epochs=epochs, verbose=0)
    return model


def make_people(model, count, seed=0):
    """People who never were: question by question, each answer drawn given the earlier ones."""
    random = np.random.default_rng(seed)
    rows = np.zeros((count, STARTS[-1]), "float32")
    people = np.zeros((count, len(SIZES)), int)
    for k, size in enumerate(SIZES):
        scores = model.predict(rows, batch_size=4096, verbose=0)[:, STARTS[k] : STARTS[k + 1]]
        noise = random.gumbel(size=scores.shape)  # the largest of score + Gumbel: a draw
        people[:, k] = (scores + noise).argmax(axis=1)
        rows[:, STARTS[k] : STARTS[k + 1]] = np.eye(size)[people[:, k]]
    return people


def usefulness(people, test):
    """The AUC on real people of a classifier that was trained on these: who had an affair?"""
    classifier = LogisticRegression(max_iter=2000)
    classifier.fit(one_hot(people)[:, : STARTS[-2]], people[:, -1])
    scores = classifier.predict_proba(one_hot(test)[:, : STARTS[-2]])[:, 1]
    return roc_auc_score(test[:, -1], scores)


def shares(people, k):
    return np.bincount(people[:, k], minlength=SIZES[k]) / len(people)


def distances(people, real):
    """By how much shares of answers differ (total variation), for one column and for two."""
    ones = [np.abs(shares(people, k) - shares(real, k)).sum() / 2 for k in range(len(SIZES))]
    twos = []
    for i in range(len(SIZES)):
        for j in range(i):
            tables = [
                np.histogram2d(p[:, i], p[:, j], bins=(range(SIZES[i] + 1), range(SIZES[j] + 1)))[0]
                / len(p)
                for p in (people, real)
            ]
            twos.append(np.abs(tables[0] - tables[1]).sum() / 2)
    return np.mean(ones), np.mean(twos)


def draw(path, real, made_up, epsilon):
    names = ("rate_marriage", "yrs_married", "children", "affair")
    figure, panels = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        k = list(COLUMNS).index(name)
        places = np.arange(SIZES[k])
        panel.bar(places - 0.2, shares(real, k), 0.4, label="real")
        panel.bar(places + 0.2, shares(made_up, k), 0.4, label=f"made up, ε = {epsilon:.2g}")
        panel.set_xticks(places, [f"{answer:g}" for answer in COLUMNS[name]])
        panel.set(title=name)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="share of people")
    panels[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epsilon", type=float, nargs="*", default=[8.0, 3.0, 1.0])
    parser.add_argument("--epochs", type=int, default=30, help="passes over the data")
    parser.add_argument("--output", type=Path, default=Path("synthetic.png"))
    arguments = parser.parse_args()
    real, test = load_data()
    print(f"{len(real):,} people to learn from, {len(test):,} to test on, delta = {DELTA:g}\n")
    print("trained on           epsilon   AUC on real people   shares differ by (1 column, 2)")

    def describe(name, spent, people):
        one, two = distances(people, test)
        auc = usefulness(people, test)
        print(f"{name:18} {spent:>9} {auc:20.3f} {one:18.1%} {two:6.1%}", flush=True)

    describe("real people", "infinite", real)
    runs = [("made up, ordinary", keras.optimizers.Adam(0.05))]
    for epsilon in arguments.epsilon:
        private = keras_dp.DPAdam(
            0.05,
            use_ema=True,
            ema_momentum=0.9,
            max_grad_norm=1.0,
            target_epsilon=epsilon,
            target_delta=DELTA,
        )
        runs.append(("made up, private", private))
    for name, optimizer in runs:
        model = train(real, optimizer, arguments.epochs)
        made_up = make_people(model, len(real))
        private = isinstance(optimizer, keras_dp.DPOptimizer)
        spent = optimizer.get_epsilon(DELTA) if private else np.inf
        describe(name, f"{spent:.3f}" if private else "infinite", made_up)
    draw(arguments.output, test, made_up, spent)
    print(f"\nfive of the last made-up people:\n{'  '.join(COLUMNS)}")
    for person in made_up[:5]:
        answers = zip(COLUMNS.items(), person, strict=True)
        print("  ".join(f"{given[k]:<{len(name)}g}" for (name, given), k in answers))
    print(f"\nPicture: {arguments.output}")


if __name__ == "__main__":
    main()
