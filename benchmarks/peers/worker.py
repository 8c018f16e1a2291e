"""The line protocol of the peers' workers.

A worker is started with a model and a variant. It prints `ready` and a JSON
object once its step is compiled, then, for each line on its standard input,
takes a step and prints its seconds. It ends at the end of its input.
"""

import json
import sys
import time

# Those of `zoo.py`: examples in a batch, the shape of one, and the number of classes.
BATCHES = {
    "mlp": (256, (784,), 10),
    "cnn": (256, (28, 28, 1), 10),
    "transformer": (32, (128,), 10),
    "lstm": (128, (60,), 18),
    "text": (128, (100,), 4),
    "resnet": (64, (32, 32, 3), 10),
    "lora": (32, (64,), 10),
}
VOCABULARIES = {"transformer": 5000, "lstm": 100, "text": 20_000, "lora": 5000}


def examples(model):
    """One made-up batch: NumPy arrays x and y."""
    import numpy as np

    random = np.random.default_rng(0)
    batch, shape, classes = BATCHES[model]
    if model in VOCABULARIES:
        x = random.integers(0, VOCABULARIES[model], (batch, *shape)).astype("int32")
    else:
        x = random.normal(size=(batch, *shape)).astype("float32")
    return x, random.integers(0, classes, batch).astype("int32")


def serve(step, **about):
    """Takes steps on demand. `step` must return only when its results are there."""
    for _ in range(3):
        step()
    print("ready", json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
