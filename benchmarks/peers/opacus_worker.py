"""Steps of Opacus for `peers.py`: `opacus_worker.py MODEL ordinary|noise|hooks|ghost`.

`hooks` and `ghost` are values of `make_private(grad_sample_mode=...)`.
"""

import os
import sys
import warnings

import opacus
import torch
from opacus.layers import DPMultiheadAttention
from torch import nn
from worker import VOCABULARY, examples, serve


def mlp():
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class Block(nn.Module):
    """A transformer's block of width 128, with attention that Opacus can follow, or PyTorch's."""

    def __init__(self, private):
        super().__init__()
        kind = DPMultiheadAttention if private else nn.MultiheadAttention
        self.attention = kind(128, 4, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128))
        self.first, self.second = nn.LayerNorm(128), nn.LayerNorm(128)

    def forward(self, x):
        x = self.first(x + self.attention(x, x, x, need_weights=False)[0])
        return self.second(x + self.dense(x))


class Transformer(nn.Module):
    def __init__(self, private):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        self.blocks = nn.Sequential(Block(private), Block(private))
        self.head = nn.Linear(128, 10)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)).mean(1))


def make_model(name, private):
    return Transformer(private) if name == "transformer" else {"mlp": mlp, "cnn": cnn}[name]()


def make_step(name, variant):
    """A function that takes one step, and its model."""
    model = make_model(name, private=variant in ("hooks", "ghost"))
    if variant == "noise":
        shapes = [p.shape for p in model.parameters()]
        return lambda: [torch.normal(0.0, 1.0, shape) for shape in shapes], model
    x, y = (torch.from_numpy(a) for a in examples(name))
    x = x.permute(0, 3, 1, 2).contiguous() if name == "cnn" else x
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    if variant != "ordinary":
        private = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(x, y), batch_size=len(x)
            ),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=variant,
        )
        model, optimizer = private[:2]
        criterion = private[2] if variant == "ghost" else criterion

    y = y.long()

    def step():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step, model


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step, model = make_step(*sys.argv[1:3])
    serve(
        step,
        parameters=sum(p.numel() for p in model.parameters()),
        versions={"opacus": opacus.__version__, "torch": torch.__version__},
    )
