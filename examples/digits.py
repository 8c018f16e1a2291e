"""How well private training does on handwritten digits, over several seeds.

Trains the models of `quickstart.py` for epsilon = 8, 3 and 1 with five seeds
each, beside ordinary training, and prints the test accuracy of every one. The
test images are always the same quarter of the data; a seed sets the initial
weights (in private training, noise and batches are new each time, seed or not).

    pip install ".[examples]" && python examples/digits.py

How the settings were chosen: see SETTINGS in `quickstart.py`.
"""

import argparse
import dataclasses
import statistics
from functools import partial

from quickstart import (
    DELTA,
    SETTINGS,
    accuracy,
    load_data,
    ordinary_optimizer,
    private_optimizer,
    train,
)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--epsilon",
        type=int,
        nargs="*",
        choices=tuple(SETTINGS),
        default=list(SETTINGS),
        help="privacy budgets (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="models for each budget (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, help="passes over the data (default: see SETTINGS)")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    train_data, test_data = load_data()
    print(f"Test accuracy, delta = {DELTA:g}, one image added or removed\n")
    print("training    epsilon    mean    each seed")

    def row(name, settings, make_optimizer):
        """Trains with each seed, and prints what came of it."""
        if arguments.epochs is not None:
            settings = dataclasses.replace(settings, epochs=arguments.epochs)
        scores, spent = [], 0.0
        for seed in range(arguments.seeds):
            optimizer = make_optimizer(settings)
            model, _ = train(settings, optimizer, train_data, seed=seed)
            scores.append(accuracy(model, test_data))
            if hasattr(optimizer, "get_epsilon"):  # what was spent, not what was planned
                spent = max(spent, optimizer.get_epsilon(DELTA))
        each = " ".join(f"{score:6.1%}" for score in scores)
        epsilon = f"{spent:7.3f}" if spent else "infinite"
        print(f"{name:9} {epsilon:>9}  {statistics.mean(scores):6.1%}    {each}", flush=True)

    row("ordinary", SETTINGS[8], ordinary_optimizer)
    for epsilon in arguments.epsilon:
        row("private", SETTINGS[epsilon], partial(private_optimizer, epsilon=epsilon))


if __name__ == "__main__":
    main()
