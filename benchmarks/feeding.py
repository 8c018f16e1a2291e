"""What it costs to feed a private `fit`, next to an ordinary shuffled one on the same data.

    python benchmarks/feeding.py [--models linear,cnn] [--sources arrays,memmap] [--executions 1,16]
        [--rounds 7] [--gigabytes 2] [--folder DIR]

The input cost is what a step of `fit` takes beyond the step itself: `fit` on the data
(`verbose=0`), less the train function on one batch that is there already. All four take turns,
four epochs each, in one process; printed are the medians of wall time and of CPU time, and the
ratio of the two input costs in each.

Sources: `arrays` (60,000 of 28 x 28 x 1 in memory); `memmap`, `hdf5`, `hdf5-gzip`, `zarr` and
`spooled` (so many gigabytes of 28 x 28 x 1 on disk, an epoch of which is 235 steps); `sparse`
(a memory-mapped file of 20 GB with holes). The ordinary `fit` reads those through a
`keras.utils.PyDataset` that takes rows at random. Their memory is the growth of what
is resident and not of a file.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_dp

BATCH, STEPS, N, EPOCHS = 256, 235, 60_000, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="linear,cnn")
    parser.add_argument("--sources", default="arrays")
    parser.add_argument("--executions", default="1,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    print("| source | model | executions | ordinary fit / step | private fit / step ", end="")
    print("| input wall | input CPU | resident MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for source in options.sources.split(","):
        data = SOURCES[source](folder, options.gigabytes)
        for model in options.models.split(","):
            for executions in map(int, options.executions.split(",")):
                found = measured(data, MODELS[model], executions, options.rounds)
                print(f"| {source} | {model} | {executions} | {found} |", flush=True)
    draw()


def linear():
    return keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(10)])


def cnn():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 8, strides=2, padding="same", activation="relu"),
            layers.MaxPool2D(2, 1),
            layers.Conv2D(32, 4, strides=2, activation="relu"),
            layers.MaxPool2D(2, 1),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )


MODELS = {"linear": linear, "cnn": cnn}


# -- data --------------------------------------------------------------------------------------


class Shuffled(keras.utils.PyDataset):
    """What one writes to train on a file in random order: rows are taken as they are drawn."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        chosen = np.sort(np.random.default_rng().integers(len(self.y), size=BATCH))
        if isinstance(self.x, np.ndarray):
            return self.x[chosen], self.y[chosen]
        chosen = np.unique(chosen)
        rows = self.x.oindex[chosen] if hasattr(self.x, "oindex") else self.x[chosen]
        return rows, self.y[chosen]


def labels(n):
    return np.random.default_rng(0).integers(10, size=n).astype("int32")


def arrays(folder, gigabytes):
    x = np.random.default_rng(0).random((N, 28, 28, 1), "float32")
    return x, labels(N)


def rows_of(gigabytes):
    return int(gigabytes * 1e9 / (28 * 28 * 4))


def blocks(n, size=10_000):
    random = np.random.default_rng(0)
    for start in range(0, n, size):
        count = min(size, n - start)
        yield slice(start, start + count), random.random((count, 28, 28, 1), "float32")


def memmap(folder, gigabytes):
    n = rows_of(gigabytes)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", "float32", (n, 28, 28, 1))
    for where, block in blocks(n):
        x[where] = block
    x.flush()
    return np.load(folder / "x.npy", mmap_mode="r"), labels(n)


def sparse(folder, gigabytes):
    n = rows_of(20)
    np.lib.format.open_memmap(folder / "sparse.npy", "w+", "float32", (n, 28, 28, 1))
    return np.load(folder / "sparse.npy", mmap_mode="r"), labels(n)


def hdf5(folder, gigabytes, name="x.h5", **layout):
    import h5py

    n = rows_of(gigabytes)
    with h5py.File(folder / name, "w") as file:
        x = file.create_dataset("x", (n, 28, 28, 1), "float32", **layout)
        for where, block in blocks(n):
            x[where] = np.round(block, 1) if layout else block
    return h5py.File(folder / name)["x"], labels(n)


def hdf5_gzip(folder, gigabytes):
    return hdf5(folder, gigabytes, "z.h5", chunks=(32, 28, 28, 1), compression="gzip")


def zarr(folder, gigabytes):
    import zarr

    n = rows_of(gigabytes)
    x = zarr.create_array(
        folder / "x.zarr", shape=(n, 28, 28, 1), chunks=(32, 28, 28, 1), dtype="float32"
    )
    for where, block in blocks(n):
        x[where] = block
    return x, labels(n)


def spooled(folder, gigabytes):
    n = rows_of(gigabytes)
    y = labels(n)

    def examples():
        for where, block in blocks(n):
            yield from zip(block, y[where], strict=True)

    start = time.perf_counter()
    source = keras_dp.spool(examples, folder / "spooled")
    print(f"<!-- spooled {n} examples in {time.perf_counter() - start:.0f} s -->")
    return source, None


SOURCES = {
    "arrays": arrays,
    "memmap": memmap,
    "sparse": sparse,
    "hdf5": hdf5,
    "hdf5-gzip": hdf5_gzip,
    "zarr": zarr,
    "spooled": spooled,
}


# -- time --------------------------------------------------------------------------------------


class Takes:
    """Milliseconds a step of what is done again and again, by wall and by CPU."""

    def __init__(self):
        self.wall, self.cpu = [], []

    def __call__(self, function):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        self.cpu.append((time.process_time() - cpu) / (EPOCHS * STEPS) * 1e3)
        self.wall.append((time.perf_counter() - wall) / (EPOCHS * STEPS) * 1e3)

    @property
    def medians(self):
        return statistics.median(self.wall), statistics.median(self.cpu)


def compiled(make, optimizer, executions):
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, steps_per_execution=executions)
    return model


def measured(data, make, executions, rounds):
    x, y = data
    private = compiled(
        make, keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), executions
    )
    ordinary = compiled(make, "sgd", executions)
    in_memory = type(x) is np.ndarray
    if in_memory:
        ordinary_data = {"x": x, "y": y, "batch_size": BATCH}
        private_data = dict(ordinary_data)
    else:
        both = (
            (x, y)
            if y is not None
            else (np.random.default_rng(0).random((N, 28, 28, 1), "float32"), labels(N))
        )
        ordinary_data = {"x": Shuffled(*both)}
        sampled = keras_dp.PoissonDataset(x, y, batch_size=BATCH)
        private_data = {"x": sampled, "steps_per_epoch": STEPS}
    before = resident()
    batch = (
        np.random.default_rng(0).random((BATCH, 28, 28, 1), "float32"),
        labels(BATCH),
    )
    runs = {
        "ordinary fit": lambda: ordinary.fit(**ordinary_data, epochs=EPOCHS, verbose=0),
        "private fit": lambda: private.fit(**private_data, epochs=EPOCHS, verbose=0),
        "ordinary step": stepper(ordinary, batch, executions),
        "private step": stepper(private, batch, executions),
    }
    takes = {name: Takes() for name in runs}
    for k in range(rounds + 1):
        for name, run in runs.items():
            takes[name](run) if k else run()
    found = {name: one.medians for name, one in takes.items()}
    cost = [
        (
            found["ordinary fit"][k] - found["ordinary step"][k],
            found["private fit"][k] - found["private step"][k],
        )
        for k in (0, 1)
    ]
    shown = [
        f"{found[f'{kind} fit'][0]:.2f} / {found[f'{kind} step'][0]:.2f}"
        for kind in ("ordinary", "private")
    ]
    shown += [f"{a:.2f} → {b:.2f} (× {b / a:.2f})" for a, b in cost]
    return " | ".join([*shown, f"{resident() - before:.0f}"])


def stepper(model, batch, executions):
    """As many steps on one batch, by what `fit` calls."""
    dataset = tf.data.Dataset.from_tensors(batch).map(of_unknown_size).repeat()
    optimizer = model.optimizer
    gate = getattr(optimizer, "session", None)

    def run():
        model.make_train_function()
        iterator = iter(dataset)
        for _ in range(-(-EPOCHS * STEPS // executions)):
            if gate is not None:
                gate.gate.open()
            model.train_function(iterator)
        tf.test.experimental.sync_devices()

    return run


def of_unknown_size(*tensors):
    return tuple(tf.compat.v1.placeholder_with_default(t, [None, *t.shape[1:]]) for t in tensors)


def resident():
    """MiB of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def draw():
    """A batch of 1,024 from a billion rows, none of which takes memory."""
    rows = np.broadcast_to(np.float32(0), (10**9, 4))
    data = keras_dp.PoissonDataset(rows, batch_size=1024)
    times = []
    for _ in range(100):
        start = time.perf_counter()
        data[0]
        times.append((time.perf_counter() - start) * 1e3)
    print(f"\n1,024 drawn from 10^9: {statistics.median(times):.2f} ms")


if __name__ == "__main__":
    main()
