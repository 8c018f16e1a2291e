"""Steps of Opacus for `peers.py`: `opacus_worker.py MODEL ordinary|noise|hooks|ghost`.

`hooks` and `ghost` are values of `make_private(grad_sample_mode=...)`.
"""

import os
import sys
import warnings

import opacus
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn
from worker import VOCABULARIES, examples, serve


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
    """A transformer's block of width 128, with attention that Opacus can follow, or PyTorch's.

    With `batch_first` the former puts heads in the places of tokens in Opacus 1.6.0
    (its pull request 825). That stays within an example; only one copy is saved.
    """

    def __init__(self, private):
        super().__init__()
        kind = DPMultiheadAttention if private else nn.MultiheadAttention
        self.attention = kind(128, 4, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128))
        self.first, self.second = (nn.LayerNorm(128, eps=1e-3) for _ in range(2))

    def forward(self, x):
        x = self.first(x + self.attention(x, x, x, need_weights=False)[0])
        return self.second(x + self.dense(x))


class Transformer(nn.Module):
    def __init__(self, private):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARIES["transformer"], 128)
        self.blocks = nn.Sequential(Block(private), Block(private))
        self.head = nn.Linear(128, 10)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)).mean(1))


class LSTM(nn.Module):
    """Opacus' LSTM, or PyTorch's: both have two biases where Keras has one."""

    def __init__(self, private):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARIES["lstm"], 64)
        self.lstm = (DPLSTM if private else nn.LSTM)(64, 128, batch_first=True)
        self.head = nn.Linear(128, 18)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARIES["text"], 128)
        self.dense = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, tokens):
        return self.dense(self.embedding(tokens).mean(1))


def convolution(channels, filters, strides=1):
    """A 3 × 3 convolution that pads as Keras' `same` does: at stride 2 only behind."""
    pad = nn.ZeroPad2d((0, 1, 0, 1) if strides == 2 else 1)
    return nn.Sequential(pad, nn.Conv2d(channels, filters, 3, strides, bias=False))


class Residual(nn.Module):
    """Two convolutions, each normalized, around which the input is added."""

    def __init__(self, channels, filters, strides):
        super().__init__()
        self.body = nn.Sequential(
            convolution(channels, filters, strides),
            nn.GroupNorm(8, filters, eps=1e-3),
            nn.ReLU(),
            convolution(filters, filters),
            nn.GroupNorm(8, filters, eps=1e-3),
        )
        same = strides == 1 and channels == filters
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(channels, filters, 1, strides, bias=False)
        )

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet():
    stages = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    return nn.Sequential(
        convolution(3, 16),
        nn.GroupNorm(8, 16, eps=1e-3),
        nn.ReLU(),
        *(Residual(*stage) for stage in stages),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Adapted(nn.Module):
    """A frozen dense layer and two factors of rank 4 beside it, as PEFT's LoRA has them."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen
        self.a = nn.Linear(frozen.in_features, 4, bias=False)
        self.b = nn.Linear(4, frozen.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.frozen(x) + self.b(self.a(x))


class Attention(nn.Module):
    """PyTorch's attention with dense layers of its own, which `nn.MultiheadAttention` has not."""

    def __init__(self):
        super().__init__()
        self.qlinear, self.klinear, self.vlinear, self.out_proj = (
            nn.Linear(128, 128) for _ in range(4)
        )

    def forward(self, x, *_, **__):
        q, k, v = (
            dense(x).unflatten(-1, (4, 32)).transpose(1, 2)
            for dense in (self.qlinear, self.klinear, self.vlinear)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return (self.out_proj(y.transpose(1, 2).flatten(2)),)


def lora(private):
    """A frozen transformer of four blocks: the factors and the head are trained."""
    model = Transformer(private)
    model.blocks = nn.Sequential(*(Block(private) for _ in range(4)))
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        if not private:
            block.attention = Attention().requires_grad_(False)
        for name in ("qlinear", "klinear", "vlinear", "out_proj"):
            setattr(block.attention, name, Adapted(getattr(block.attention, name)))
        for index in (0, 2):
            block.dense[index] = Adapted(block.dense[index])
    return model


def make_model(name, private):
    kinds = {"transformer": Transformer, "lstm": LSTM, "lora": lora}
    if name in kinds:
        return kinds[name](private)
    return {"mlp": mlp, "cnn": cnn, "text": Text, "resnet": resnet}[name]()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def make_step(name, variant):
    """A function that takes one step, and its model."""
    model = make_model(name, private=variant in ("hooks", "ghost"))
    if variant == "noise":
        shapes = [p.shape for p in trained(model)]
        return lambda: [torch.normal(0.0, 1.0, shape) for shape in shapes], model
    x, y = (torch.from_numpy(a) for a in examples(name))
    x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
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
        parameters=sum(p.numel() for p in trained(model)),
        versions={"opacus": opacus.__version__, "torch": torch.__version__},
    )
