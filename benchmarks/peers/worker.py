"""The line protocol of the peers' workers.

A worker is started with a model and a variant. It prints `ready` and a JSON
object once its step is compiled, then, for each line on its standard input,
takes a step and prints its seconds. It ends at the end of its input.
"""

import json
import sys
import time

BATCHES = {"mlp": 256, "cnn": 256, "transformer": 32}
SHAPES = {"mlp": (784,), "cnn": (28, 28, 1), "transformer": (128,)}
VOCABULARY = 5000


def examples(model):
    """One made-up batch: NumPy arrays x and y."""
    import numpy as np

    random = np.random.default_rng(0)
    batch, shape = BATCHES[model], SHAPES[model]
    if model == "transformer":
        x = random.integers(0, VOCABULARY, (batch, *shape)).astype("int32")
    else:
        x = random.normal(size=(batch, *shape)).astype("float32")
    return x, random.integers(0, 10, batch).astype("int32")


def serve(step, **about):
    """Takes steps on demand. `step` must return only when its results are there."""
    for _ in range(3):
        step()
    print("ready", json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
