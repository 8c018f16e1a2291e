"""Handwritten digits of people who each wrote several: the person is the unit of privacy.

The digits of `quickstart.py` are given made-up users with 1, 4 or 16 images each. A
model is trained for epsilon = 3 for people: `PoissonDataset` draws people, each one's
gradients are averaged, and the average is clipped. Beside it, for comparison: what
epsilon ordinary private training, with each image for itself, would have for a person
with so many images, at the noise that spends epsilon = 3 for one image.

    pip install ".[examples]" && python examples/users.py
"""

import argparse
import statistics

import keras
import numpy as np
from quickstart import DELTA, MAX_GRAD_NORM, MOMENTUM, SETTINGS, accuracy, build_model, load_data

import keras_dp

EPSILON = 3.0
SETTING = SETTINGS[3]


def make_users(labels, examples_each, seed=0):
    """A user for each image: everybody writes digits of every kind."""
    order = np.random.default_rng(seed).permutation(len(labels))
    users = np.empty(len(labels), int)
    users[order] = np.arange(len(labels)) // examples_each
    return users


def train(images, labels, users, examples_each, *, epochs, seed):
    keras.utils.set_random_seed(seed)  # the initial weights; never the noise
    model = build_model(SETTING)
    optimizer = keras_dp.DPSGD(
        SETTING.learning_rate,
        momentum=MOMENTUM,
        use_ema=True,
        ema_momentum=SETTING.averaging,
        max_grad_norm=MAX_GRAD_NORM,
        target_epsilon=EPSILON,
        target_delta=DELTA,
    )
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    people = len(np.unique(users))
    data = keras_dp.PoissonDataset(
        images,
        labels,
        batch_size=-(-people // 3),  # as in quickstart.py: a third of all, people now
        user_ids=users,
        max_examples_per_user=examples_each,
    )
    model.fit(data, epochs=epochs, verbose=0)
    return model


def epsilon_of_rows(n, examples_each, epochs):
    """What a person with so many images would get from training that takes each for itself."""
    plan = {"num_examples": n, "batch_size": SETTING.batch_size, "epochs": epochs, "delta": DELTA}
    sigma = keras_dp.accounting.calibrate_noise_multiplier(target_epsilon=EPSILON, **plan)
    return keras_dp.accounting.compute_epsilon(
        noise_multiplier=sigma, examples_per_person=examples_each, **plan
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--examples",
        type=int,
        nargs="*",
        default=[1, 4, 16],
        help="images of each user (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=2, help="models for each (default: 2)")
    parser.add_argument("--epochs", type=int, default=SETTING.epochs, help="passes over the people")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    (images, labels), test_data = load_data()
    print(f"Test accuracy at epsilon = {EPSILON:g} for people, delta = {DELTA:g}\n")
    print("images each  people  sigma  epsilon    mean    as rows: epsilon    each seed")
    for examples_each in arguments.examples:
        users = make_users(labels, examples_each)
        scores = []
        for seed in range(arguments.seeds):
            model = train(images, labels, users, examples_each, epochs=arguments.epochs, seed=seed)
            scores.append(accuracy(model, test_data))
        spent = model.optimizer.get_epsilon(DELTA)
        sigma = model.optimizer.ledger.releases[0].noise_multiplier
        rows = epsilon_of_rows(len(labels), examples_each, arguments.epochs)
        each = " ".join(f"{score:6.1%}" for score in scores)
        print(
            f"{examples_each:11} {len(np.unique(users)):7} {sigma:6.2f} {spent:8.3f}  "
            f"{statistics.mean(scores):6.1%}    {rows:16.4g}    {each}",
            flush=True,
        )


if __name__ == "__main__":
    main()
