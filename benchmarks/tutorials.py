"""What Opacus reaches on the data of the tutorials, with the same network and settings.

    python benchmarks/tutorials.py images|convolutions|texts|names [--seeds 5]

Needs PyTorch and Opacus beside the packages of the examples. Data, split, network, batch
size, epochs, learning rate, clipping norm, epsilon, delta and averaging are those of the
example. The layers are Opacus' own, and start from the weights that the network of the
example starts from: before training both must give the same answers, and Opacus' gradients
of single examples must have PyTorch's as their mean, or the program ends.
Batches are Poisson samples of the same rate, with the same noise, so that epsilon is the
same too. Opacus' own accountant (PRV) states about 0.01 more for it.
"""

import argparse
import copy
import statistics
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import opacus
import torch
from opacus.layers import DPLSTM
from torch import nn

from keras_dp.accounting import calibrate_noise_multiplier

DELTA = 1e-5

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def copy_dense(layer, kernel, bias):
    """Weights of a Keras layer; those of attention are divided into heads."""
    layer.weight.copy_(torch.tensor(kernel.reshape(layer.in_features, -1).T))
    layer.bias.copy_(torch.tensor(bias.reshape(-1)))


class Attention(nn.Module):
    """Attention of two heads, of layers that Opacus has.

    Its own, DPMultiheadAttention, gives other answers than PyTorch's with batch_first=True
    (in 1.6.0): what the heads say is put together in the wrong order.
    """

    def __init__(self, width):
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x, there):
        heads = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in self.dense[:3])
        y = nn.functional.scaled_dot_product_attention(*heads, attn_mask=there[:, None, None])
        return self.dense[3](y.transpose(1, 2).flatten(2))


class TextModel(nn.Module):
    """The network of `examples/texts.py`."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width, eps=1e-3)
        self.head = nn.Linear(width, 1)

    def forward(self, tokens):
        there = tokens != 0
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, there))
        there = there.unsqueeze(-1).float()
        score = self.head((x * there).sum(1) / there.sum(1))
        return torch.cat([torch.zeros_like(score), score], 1)  # one score, as a sigmoid has

    @torch.no_grad()
    def start_from(self, table, *others):
        self.table.weight.copy_(torch.tensor(table))
        for layer in (*self.attention.dense, self.norm, self.head):
            kernel, bias, *others = others
            if layer is not self.norm:  # whose scale and offset begin as 1 and 0 on both sides
                copy_dense(layer, kernel, bias)


class NameModel(nn.Module):
    """The network of `examples/names.py`."""

    def __init__(self, letters, classes):
        super().__init__()
        self.table = nn.Embedding(letters, 16)
        self.lstm = DPLSTM(16, 32, batch_first=True)
        self.lstm.l0.hh.bias.requires_grad_(False)  # Keras has one bias in the place of two
        self.head = nn.Linear(32, classes)

    def forward(self, letters):
        return self.head(self.lstm(self.table(letters))[0][:, -1])

    @torch.no_grad()
    def start_from(self, table, kernel, recurrent_kernel, bias, *head):
        self.table.weight.copy_(torch.tensor(table))
        copy_dense(self.lstm.l0.ih, kernel, bias)
        copy_dense(self.lstm.l0.hh, recurrent_kernel, np.zeros_like(bias))
        copy_dense(self.head, *head)


class Head(nn.Linear):
    """The last layer of `examples/images.py`, on the bank of filters."""

    @torch.no_grad()
    def start_from(self, kernel, bias):
        copy_dense(self, kernel, bias)


class ConvolutionalModel(nn.Module):
    """The small network of `examples/images.py`."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 8, 5, 2), nn.Conv2d(8, 16, 3)])
        self.head = nn.Linear(144, 10)

    def forward(self, images):
        x = images.reshape(-1, 1, 28, 28)
        for convolve, padding in zip(self.convolutions, ((1, 2, 1, 2), (1, 1, 1, 1)), strict=True):
            x = nn.functional.pad(x, padding)  # "same", as Keras has it
            # With colours last in memory, Opacus' gradients of a convolution are wrong (1.6.0).
            x = torch.tanh(convolve(x.contiguous()))
            x = nn.functional.avg_pool2d(x, 2)
        return self.head(x.permute(0, 2, 3, 1).flatten(1))

    @torch.no_grad()
    def start_from(self, *weights):
        for layer in self.convolutions:
            kernel, bias, *weights = weights
            layer.weight.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1)))
            layer.bias.copy_(torch.tensor(bias))
        copy_dense(self.head, *weights)


def _budgets(example, recipe):
    return {
        epsilon: {"batch_size": b, "epochs": e, "rate": r, "norm": example.MAX_GRAD_NORM}
        for epsilon, (b, e, r) in example.BUDGETS[recipe].items()
    }


def images(held_out):
    import images as example

    bank = example.build_bank()
    data = [(bank.predict(x, batch_size=500, verbose=0), y) for x, y in example.load_data(held_out)]
    features = data[0][0].shape[1]
    networks = (lambda: example.build_head(features), lambda: Head(features, 10))
    return data, _budgets(example, "bank"), *networks


def convolutions(held_out):
    import images as example

    settings = _budgets(example, "averaged")
    networks = (lambda: example.build_network("small"), ConvolutionalModel)
    return example.load_data(held_out), settings, *networks


def _of(example, held_out, make_module):
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
    return data, settings, example.build_model, make_module


def texts(held_out):
    import texts as example

    return _of(example, held_out, lambda: TextModel(example.VOCABULARY, example.WIDTH))


def names(held_out):
    import names as example

    letters, classes = len(example.ALPHABET) + 1, len(example.COUNTRIES)
    return _of(example, held_out, lambda: NameModel(letters, classes))


def require_right_gradients(module, x, y):
    """That Opacus' gradients of single examples have PyTorch's own as their mean."""
    tried = opacus.GradSampleModule(copy.deepcopy(module))
    nn.functional.cross_entropy(tried(as_tensor(x)), as_tensor(y)).backward()
    for name, weight in tried.named_parameters():
        if weight.requires_grad:
            error = (weight.grad_sample.mean(0) - weight.grad).abs().max()
            if error > 1e-4 * weight.grad.abs().max() + 1e-7:
                raise SystemExit(f"Opacus' gradients of {name} are off by {error}.")


def start(build_model, make_module, x, y, seed):
    """The network of the example in PyTorch, with the weights that it starts from for a seed."""
    keras.utils.set_random_seed(seed)
    model, module = build_model(), make_module()
    module.start_from(*model.get_weights())
    wanted = model.predict(x, verbose=0)
    with torch.no_grad():
        found = torch.softmax(module(as_tensor(x)), -1).numpy()[:, -wanted.shape[1] :]
    if not np.allclose(found, wanted, atol=1e-5):
        raise SystemExit(f"The two networks differ by {np.abs(found - wanted).max()}.")
    require_right_gradients(module, x, y)
    return module


def as_tensor(x):
    x = torch.as_tensor(np.asarray(x))
    return x if x.is_floating_point() else x.long()


def noise_for(epsilon, num_examples, *, batch_size, epochs, **_):
    """The noise of keras_dp for this plan, so that both train with the same."""
    return calibrate_noise_multiplier(
        target_epsilon=epsilon,
        delta=DELTA,
        num_examples=num_examples,
        batch_size=batch_size,
        epochs=epochs,
    )


def train(model, data, noise_multiplier, *, batch_size, epochs, rate, norm):
    """Trains in place, and leaves the weights averaged over the last steps."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(as_tensor, data)), batch_size=batch_size
    )
    engine = opacus.PrivacyEngine()
    trained = [p for p in model.parameters() if p.requires_grad]
    module, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, rate, momentum=0.9),
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=norm,
    )
    criterion = nn.CrossEntropyLoss()
    average, weight = [torch.zeros_like(p) for p in trained], 0.0
    module.train()
    for _ in range(epochs):
        for rows, labels in loader:
            optimizer.zero_grad()
            criterion(module(rows), labels).backward()
            optimizer.step()
            with torch.no_grad():
                for mean, p in zip(average, trained, strict=True):
                    mean.mul_(0.9).add_(p, alpha=0.1)
                weight = 0.9 * weight + 0.1
    with torch.no_grad():
        for mean, p in zip(average, trained, strict=True):
            p.copy_(mean / weight)


def accuracy(model, data):
    x, y = map(as_tensor, data)
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tutorial", choices=("images", "convolutions", "texts", "names"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="of every budget (default: as the example)")
    parser.add_argument("--held-out", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data, settings, *networks = globals()[arguments.tutorial](arguments.held_out)
    if arguments.epochs is not None:
        settings = {epsilon: s | {"epochs": arguments.epochs} for epsilon, s in settings.items()}
    print(f"Opacus {opacus.__version__}, PyTorch {torch.__version__}")
    print("epsilon    mean  standard error   each seed")
    for epsilon, of_budget in settings.items():
        scores, noise = [], noise_for(epsilon, len(data[0][1]), **of_budget)
        for seed in range(arguments.seeds):
            model = start(*networks, *(part[:50] for part in data[1]), seed)
            torch.manual_seed(seed)
            train(model, data[0], noise, **of_budget)
            scores.append(accuracy(model, data[1]))
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        each = " ".join(f"{score:6.1%}" for score in scores)
        print(f"{epsilon:7.3f}  {statistics.mean(scores):6.1%} {error:15.1%}   {each}", flush=True)


if __name__ == "__main__":
    main()
