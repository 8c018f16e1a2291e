"""Seeded runs whose weights, ledgers and epsilons must not change by a bit when code is moved.

    python tests/golden.py before.json          # before a move
    python tests/golden.py after.json before.json   # after it: says what differs

Ten models, each trained in a graph, eagerly, under XLA, in several steps an
execution, and in microbatches. Run both on one machine: another may round otherwise.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings

import keras
import numpy as np
from keras import layers

import keras_dp

ROWS = 24


def functional(shape, body, dtype="float32"):
    inputs = keras.Input(shape, dtype=dtype)
    return keras.Model(inputs, body(inputs))


def reused(x):
    dense = layers.Dense(4, activation="tanh")
    return layers.Dense(2)(dense(dense(x)))


def attending(x):
    x = layers.Embedding(9, 4)(x)
    x = x + layers.MultiHeadAttention(2, 2)(x, x)
    return layers.Dense(2)(layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x)))


def nested(x):
    inner = keras.Sequential([layers.Dense(4, activation="relu"), layers.Dense(4)])
    return layers.Dense(2)(layers.add([inner(x), x]))


MODELS = {
    "dense": ((4,), lambda x: layers.Dense(2)(layers.Dense(6, activation="relu")(x))),
    "dropout": ((4,), lambda x: layers.Dense(2)(layers.Dropout(0.3, seed=1)(x))),
    "reused": ((4,), reused),
    "nested": ((4,), nested),
    "convolution": (
        (6, 6, 2),
        lambda x: layers.Dense(2)(layers.Flatten()(layers.Conv2D(3, 3, activation="relu")(x))),
    ),
    "depthwise": (
        (6, 6, 2),
        lambda x: layers.Dense(2)(layers.Flatten()(layers.DepthwiseConv2D(3)(x))),
    ),
    "normalized": (
        (5, 4),
        lambda x: layers.Dense(2)(layers.Flatten()(layers.GroupNormalization(2)(x))),
    ),
    "recurrent": ((5, 3), lambda x: layers.Dense(2)(layers.LSTM(4)(x))),
    "gated": ((5, 3), lambda x: layers.Dense(2)(layers.GRU(4)(x))),
    "attending": ((5,), attending),
}
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
    "several steps": {"steps_per_execution": 3},
    "microbatches": {},
}


def run(name, mode):
    """What a run leaves: a hash of its weights, its ledger without ids, its epsilon."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(3)
    shape, body = MODELS[name]
    random = np.random.default_rng(5)
    words = name == "attending"
    x = random.integers(0, 9, (ROWS, *shape)) if words else random.normal(size=(ROWS, *shape))
    y = random.normal(size=(ROWS, 2))
    model = functional(shape, body, "int32" if words else "float32")
    optimizer = keras_dp.DPAdam(
        0.05,
        max_grad_norm=0.5,
        noise_multiplier=0.8,
        seed=11,
        microbatch_size=4 if mode == "microbatches" else None,
    )
    model.compile(optimizer, loss="mse", **MODES[mode])
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    weights = b"".join(np.ascontiguousarray(w).tobytes() for w in model.get_weights())
    ledger = [
        [r.sampler, r.steps, r.noise_multiplier, r.sampling_rate, r.batch_size, r.seeded]
        for r in optimizer.ledger
        if r.steps
    ]
    return [hashlib.sha256(weights).hexdigest(), ledger, optimizer.get_epsilon(1e-5)]


def main(path, before=None):
    warnings.simplefilter("ignore")
    found = {f"{name}, {mode}": run(name, mode) for name in MODELS for mode in MODES}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    if before is None:
        return 0
    with open(before, encoding="utf-8") as file:
        known = json.load(file)
    different = [key for key in known if json.loads(json.dumps(found[key])) != known[key]]
    print(f"{len(known) - len(different)} of {len(known)} runs are equal to the last bit")
    for key in different:
        print(f"differs: {key}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
