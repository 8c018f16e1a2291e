"""What Opacus reaches on the data of the tutorials, with the same network and settings.

    python benchmarks/tutorials.py images|texts|names [--seeds 5]

Needs PyTorch and Opacus beside the packages of the examples. Data, split, network, batch
size, epochs, learning rate, clipping norm, epsilon, delta and averaging are those of the
example; the layers are Opacus' own, with PyTorch's initial weights. Batches are Poisson
samples of the same rate, with the same noise, so that epsilon is the same too. Opacus' own
accountant (PRV) states about 0.01 more for it.
"""

import argparse
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import opacus
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn

from keras_dp.accounting import calibrate_noise_multiplier

DELTA = 1e-5

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


class TextModel(nn.Module):
    """The network of `examples/texts.py`."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)
        nn.init.uniform_(self.table.weight, -0.05, 0.05)  # as Keras'; PyTorch's are 35 x as large
        self.attention = DPMultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=1e-3)
        self.head = nn.Linear(width, 1)

    def forward(self, tokens):
        padding = tokens == 0
        x = self.table(tokens)
        y, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        x = self.norm(x + y)
        there = (~padding).unsqueeze(-1).float()
        score = self.head((x * there).sum(1) / there.sum(1))
        return torch.cat([torch.zeros_like(score), score], 1)  # one score, as a sigmoid has


class NameModel(nn.Module):
    """The network of `examples/names.py`."""

    def __init__(self, letters, classes):
        super().__init__()
        self.table = nn.Embedding(letters, 16)
        nn.init.uniform_(self.table.weight, -0.05, 0.05)
        self.lstm = DPLSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, classes)

    def forward(self, letters):
        return self.head(self.lstm(self.table(letters))[0][:, -1])


def images(held_out):
    import images as example

    bank = example.build_bank()
    data = [(bank.predict(x, batch_size=500, verbose=0), y) for x, y in example.load_data(held_out)]
    settings = {
        epsilon: {"batch_size": b, "epochs": e, "rate": r, "norm": example.MAX_GRAD_NORM}
        for epsilon, (b, e, r) in example.BUDGETS["bank"].items()
    }

    def make_model():
        model = nn.Linear(data[0][0].shape[1], 10)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    return data, settings, make_model, _sgd


def _sgd(parameters, rate):
    return torch.optim.SGD(parameters, rate, momentum=0.9)


def _of(example, held_out, make_model):
    data = [part[:2] for part in example.load_data(held_out)]
    settings = {
        epsilon: {
            "batch_size": s.batch_size,
            "epochs": s.epochs,
            "rate": s.learning_rate,
            "norm": example.MAX_GRAD_NORM,
        }
        for epsilon, s in example.SETTINGS.items()
    }
    return data, settings, make_model, _sgd


def texts(held_out):
    import texts as example

    return _of(example, held_out, lambda: TextModel(example.VOCABULARY, example.WIDTH))


def names(held_out):
    import names as example

    letters, classes = len(example.ALPHABET) + 1, len(example.COUNTRIES)
    return _of(example, held_out, lambda: NameModel(letters, classes))


def noise_for(epsilon, num_examples, *, batch_size, epochs, **_):
    """The noise of keras_dp for this plan, so that both train with the same."""
    return calibrate_noise_multiplier(
        target_epsilon=epsilon,
        delta=DELTA,
        num_examples=num_examples,
        batch_size=batch_size,
        epochs=epochs,
    )


def train(model, make_optimizer, data, noise_multiplier, *, batch_size, epochs, rate, norm):
    """Trains in place, and leaves the weights averaged over the last steps."""
    x, y = (torch.as_tensor(np.asarray(part)) for part in data)
    x = x if x.is_floating_point() else x.long()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y.long()), batch_size=batch_size
    )
    engine = opacus.PrivacyEngine()
    module, optimizer, loader = engine.make_private(
        module=model,
        optimizer=make_optimizer(model.parameters(), rate),
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=norm,
    )
    criterion = nn.CrossEntropyLoss()
    average, weight = [torch.zeros_like(p) for p in model.parameters()], 0.0
    module.train()
    for _ in range(epochs):
        for rows, labels in loader:
            optimizer.zero_grad()
            criterion(module(rows), labels).backward()
            optimizer.step()
            with torch.no_grad():
                for mean, p in zip(average, model.parameters(), strict=True):
                    mean.mul_(0.9).add_(p, alpha=0.1)
                weight = 0.9 * weight + 0.1
    with torch.no_grad():
        for mean, p in zip(average, model.parameters(), strict=True):
            p.copy_(mean / weight)


def accuracy(model, data):
    x, y = (torch.as_tensor(np.asarray(part)) for part in data)
    model.eval()
    with torch.no_grad():
        said = model(x if x.is_floating_point() else x.long()).argmax(-1)
    return float((said == y).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tutorial", choices=("images", "texts", "names"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-out", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data, settings, make_model, make_optimizer = globals()[arguments.tutorial](arguments.held_out)
    print(f"Opacus {opacus.__version__}, PyTorch {torch.__version__}")
    print("epsilon    mean  standard error   each seed")
    for epsilon, of_budget in settings.items():
        scores, noise = [], noise_for(epsilon, len(data[0][1]), **of_budget)
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            model = make_model()
            train(model, make_optimizer, data[0], noise, **of_budget)
            scores.append(accuracy(model, data[1]))
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        each = " ".join(f"{score:6.1%}" for score in scores)
        print(f"{epsilon:7.3f}  {statistics.mean(scores):6.1%} {error:15.1%}   {each}", flush=True)


if __name__ == "__main__":
    main()
