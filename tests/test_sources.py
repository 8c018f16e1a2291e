"""Data of every kind that can be indexed: drawn as arrays are, read right, and with clear errors.

Bounds on statistics lie five standard errors or more out: a false alarm is rarer than 1e-6.
"""

import itertools
import threading
import time
import traceback
import warnings

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tiny
from test_sampling import looks_poisson, peak_memory

import keras_dp
from keras_dp.sampling import sources
from keras_dp.sampling.reading import Reader

N = 240
ROWS = np.random.default_rng(0).random((N, 3)).astype("float32")
ROWS[:, 0] = np.arange(N)
MARKS = np.arange(N, dtype="float32")[:, np.newaxis]
SAMPLERS = [keras_dp.PoissonDataset, keras_dp.BallsInBinsDataset, keras_dp.ShuffledDataset]


class MapStyle:
    """A data set as PyTorch has it."""

    def __init__(self, rows=ROWS, marks=MARKS):
        self.rows, self.marks = rows, marks

    def __len__(self):
        return len(self.marks)

    def __getitem__(self, index):
        return self.rows[index], self.marks[index]


class MapStyleOfMany(MapStyle):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class ColumnsStyle:
    """A data set as Hugging Face has it: a list of indices gives a dictionary of lists."""

    column_names = ("x", "y")

    def __len__(self):
        return N

    def __getitem__(self, indices):
        return {"x": ROWS[indices].tolist(), "y": MARKS[indices].tolist()}

    def __getitems__(self, indices):
        raise AssertionError("columns are faster")


class OneEach(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()

    def __len__(self):
        return N

    def __getitem__(self, index):
        return ROWS[index], MARKS[index]


def hdf5(folder, **layout):
    with h5py.File(folder / "data.h5", "w") as file:
        file.create_dataset("x", data=ROWS, **layout)
        file.create_dataset("y", data=MARKS)
    file = h5py.File(folder / "data.h5")
    return file["x"], file["y"]


def memmap(folder):
    np.save(folder / "x.npy", ROWS.astype("float64"))
    return np.load(folder / "x.npy", mmap_mode="r"), MARKS


def files(folder):
    for k, row in enumerate(ROWS):
        np.save(folder / f"{k}.npy", row)
    return (keras_dp.from_files([folder / f"{k}.npy" for k in range(N)], MARKS, load=np.load),)


def arrow(folder, pieces=1):
    pyarrow = pytest.importorskip("pyarrow")
    x = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(ROWS.ravel()), 3)
    table = pyarrow.table({"x": x, "y": pyarrow.array(MARKS[:, 0])})
    edges = np.linspace(0, N, pieces + 1).astype(int)
    cut = [table.slice(a, b - a) for a, b in itertools.pairwise(edges)]
    return pyarrow.concat_tables(cut)


def parquet(folder):
    written = pytest.importorskip("pyarrow.parquet")
    written.write_table(arrow(folder), folder / "t.parquet", row_group_size=50)
    source = keras_dp.spool(
        written.ParquetFile(folder / "t.parquet"), folder / "spool", verbose=False
    )
    return source, None, lambda e: (e["x"], e["y"])


def hugging_face(folder):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": ROWS.tolist(), "y": MARKS.tolist()})
    return data.with_format("numpy"), None, lambda e: (e["x"], e["y"])


def zarr(folder):
    return pytest.importorskip("zarr").array(ROWS, chunks=(16, 3)), MARKS


def polars(folder):
    frames = pytest.importorskip("polars")
    return frames.DataFrame(ROWS), frames.Series(MARKS[:, 0])


# From a folder to x, y and map.
SOURCES = {
    "memmap": memmap,
    "hdf5": hdf5,
    "hdf5 in chunks": lambda folder: hdf5(folder, chunks=(16, 3)),
    "hdf5 compressed": lambda folder: hdf5(folder, chunks=(16, 2), compression="gzip"),
    "zarr": zarr,
    "arrow columns": lambda folder: (arrow(folder).column("x"), arrow(folder).column("y")),
    "arrow table": lambda folder: (arrow(folder, 7), None, lambda e: (e["x"], e["y"])),
    "arrow batch": lambda f: (arrow(f).to_batches()[0], None, lambda e: (e["x"], e["y"])),
    "parquet": parquet,
    "hugging face": hugging_face,
    "columns": lambda folder: (ColumnsStyle(), None, lambda e: (e["x"], e["y"])),
    "map-style": lambda folder: (MapStyle(),),
    "map-style of many": lambda folder: (MapStyleOfMany(),),
    "files": files,
    "pandas": lambda folder: (pd.DataFrame(ROWS), pd.Series(MARKS[:, 0])),
    "polars": polars,
    "spooled": lambda folder: (
        keras_dp.spool(zip(ROWS, MARKS, strict=True), folder / "spool", verbose=False),
    ),
    "nest": lambda folder: (
        {"a": memmap(folder)[0], "b": [hdf5(folder)[0], ROWS]},
        MARKS,
        lambda x, y: (x["a"] + x["b"][0] * 0 + x["b"][1] * 0, y),
    ),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    x, y, then, *_ = (*SOURCES[request.param](tmp_path), None, None)
    return {"x": x, "y": y, "map": then}


def marks_of(batch):
    x, y = keras.tree.map_structure(np.asarray, batch)
    assert x.dtype == y.dtype == np.float32
    assert x.shape[1:] == (3,)
    np.testing.assert_array_equal(x, ROWS[y.ravel().astype(int)])
    return y.ravel().astype(int)


# -- drawn as arrays are ----------------------------------------------------------------------


def test_every_source_gives_the_rows_of_its_indices_as_batches_and_in_fit(source):
    for kind in SAMPLERS:
        data = kind(**source, batch_size=60)
        fed = [marks_of(batch) for batch in data.for_fit(None, secure_mode=False).feed()]
        assert len(fed) == len(data) == 4
        for marks in (*fed, marks_of(data[0])):
            assert len(set(marks)) == len(marks) > 0
        if kind is not keras_dp.PoissonDataset:
            assert sorted(np.concatenate(fed)) == list(range(N))


@pytest.mark.parametrize(("workers", "secure_mode"), [(None, False), (3, True)])
def test_batches_of_every_source_are_poisson_draws(source, workers, secure_mode):
    data = keras_dp.PoissonDataset(**source, batch_size=24, workers=workers)
    fed = data.for_fit(60, secure_mode=secure_mode).feed()
    assert looks_poisson([marks_of(batch) for batch in fed], n=N, q=0.1)


def test_the_check_fails_for_each_example_once_an_epoch(source):
    data = keras_dp.ShuffledDataset(**source, batch_size=24)
    fed = data.for_fit(None, secure_mode=False).feed()
    drawn = [marks_of(batch) for _ in range(6) for batch in fed]
    assert not looks_poisson(drawn, n=N, q=0.1)


@pytest.mark.parametrize("name", ["memmap", "hdf5", "map-style", "spooled"])
@pytest.mark.one_in(4)
def test_fit_on_a_source_has_the_epsilon_of_arrays(name, tmp_path):
    given = SOURCES[name](tmp_path)
    found = []
    for data in (given, (ROWS, MARKS)):
        model = tiny.model(width=3)
        model.compile(tiny.sgd(), loss="mse")
        model.fit(*data, batch_size=60, epochs=2, verbose=0)
        (release,) = model.optimizer.ledger
        assert (release.sampler, release.num_examples, release.steps) == ("poisson", N, 8)
        found.append(model.optimizer.get_epsilon(1e-5))
    assert found[0] == found[1]
    wanted = keras_dp.accounting.compute_epsilon(
        num_examples=N, batch_size=60, noise_multiplier=1.0, delta=1e-5, epochs=2
    )
    assert found[0] == pytest.approx(wanted, abs=1e-9)


def test_what_fit_is_fed_is_drawn_anew_each_time():
    data = keras_dp.PoissonDataset(MapStyle(), batch_size=60)
    fed = [data.for_fit(None, secure_mode=False).feed() for _ in range(2)]
    epochs = [[marks_of(b) for b in feed] for feed in (*fed, fed[0])]
    for one in range(3):
        for other in range(one):
            pairs = zip(epochs[one], epochs[other], strict=True)
            assert not any(np.array_equal(a, b) for a, b in pairs)


def test_text_and_several_inputs():
    words = np.array([f"word {k}" for k in range(N)])
    x = {"text": words, "row": MapStyle(MARKS, MARKS)}
    for batch in keras_dp.PoissonDataset(
        x, MARKS, batch_size=60, map=lambda x, y: ({"text": x["text"], "row": x["row"][0]}, y)
    ).feed():
        inputs, y = batch
        assert inputs["text"].dtype == tf.string
        assert [int(t.split()[1]) for t in inputs["text"].numpy()] == y.numpy().ravel().tolist()
        np.testing.assert_array_equal(inputs["row"], y)


def test_rows_of_differing_shapes_are_brought_to_one_by_map():
    class Sequences(MapStyle):
        def __getitem__(self, index):
            return np.full(index % 5 + 1, index), self.marks[index]

    with pytest.raises(ValueError, match=r"Row 239 .* shape .* by `map` \(pad"):
        keras_dp.PoissonDataset(Sequences(), batch_size=60)
    data = keras_dp.PoissonDataset(
        Sequences(), batch_size=60, map=lambda x, y: (np.resize(x, 5), y)
    )
    x, y = data[0]
    np.testing.assert_array_equal(x, np.repeat(y, 5, axis=1))


def test_map_sees_one_example_at_a_time_after_the_draw():
    seen = []

    def look(x, y):
        seen.append((x.shape, y.shape))
        return x * 2, y

    data = keras_dp.PoissonDataset(ROWS, MARKS, batch_size=60, map=look)
    seen.clear()
    x, y = data[0]
    assert seen == [((3,), (1,))] * len(y)
    np.testing.assert_array_equal(x, 2 * ROWS[y.ravel().astype(int)])


def test_one_of_a_batch_changes_nothing_of_the_others():
    """A source and a `map` see each example alone, so rows are what they are alone."""
    data = keras_dp.PoissonDataset(MapStyle(), batch_size=60, map=lambda x, y: (x - x.mean(), y))
    x, y = data[0]
    alone = [ROWS[int(k)] - ROWS[int(k)].mean() for k in y.ravel()]
    np.testing.assert_array_equal(x, alone)


def test_several_threads_read_where_a_source_bears_it(tmp_path):
    readers = set()

    def load(path):
        readers.add(threading.get_ident())
        time.sleep(0.001)
        return np.zeros(2)

    source = keras_dp.from_files(range(N), load=load)
    keras_dp.PoissonDataset(source, batch_size=120, workers=4)[0]
    assert len(readers - {threading.get_ident()}) > 1
    readers.clear()

    class Alone(MapStyle):
        def __getitem__(self, index):
            readers.add(threading.get_ident())
            return super().__getitem__(index)

    keras_dp.PoissonDataset(Alone(), batch_size=120)[0]
    assert readers == {threading.get_ident()}


def test_an_hdf5_data_set_in_one_piece_is_mapped_into_memory(tmp_path):
    plain, compressed = hdf5(tmp_path)[0], None
    assert sources.StoredArray(plain).parallel
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_dataset("x", data=ROWS, chunks=(16, 3))
        compressed = sources.StoredArray(file["x"])
        assert not compressed.parallel
        chosen = np.array([200, 3, 3, 17, 16])
        np.testing.assert_array_equal(compressed.take(chosen), ROWS[chosen])
    with h5py.File(tmp_path / "big.h5", "w", userblock_size=512) as file:
        file["x"] = ROWS
    mapped = sources.StoredArray(h5py.File(tmp_path / "big.h5")["x"])
    assert mapped.parallel
    np.testing.assert_array_equal(mapped.take(np.array([5, 1])), ROWS[[5, 1]])


def test_what_is_read_stays_on_disk(tmp_path):
    """A file with holes, much larger than what may be read: only the rows drawn are read."""
    n = 300_000
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "float32", (n, 2500))
    data = keras_dp.PoissonDataset(x, batch_size=100)  # 3 GB

    def draw():
        assert data[0][0].shape[1:] == next(iter(data.feed()))[0].shape[1:] == (2500,)

    assert peak_memory(draw) < 64 * 2**20


# -- bad input --------------------------------------------------------------------------------

SECRET = "Alice"


class Broken(MapStyle):
    """One row is not like the others."""

    def __init__(self, how, row=7):
        super().__init__()
        self.how, self.row = how, row

    def __getitem__(self, index):
        if index != self.row:
            return super().__getitem__(index)
        if isinstance(self.how, Exception):
            raise self.how
        return self.how, self.marks[index]


BROKEN = {
    "raises": (ValueError(f"{SECRET} has no number"), "ValueError was raised"),
    "ends too soon": (IndexError(SECRET), "IndexError was raised"),
    "another shape": (np.zeros(4), r"its shape is \(4,\), and the first row's is \(3,\)"),
    "fewer axes": (0.5, r"its shape is \(\), and the first row's is \(3,\)"),
    "text": (SECRET, "type"),
    "missing": (None, "missing value"),
    "missing within": ([1.0, None, 2.0], "missing value"),
    "an object": ([object()] * 3, "Python objects"),
    "another structure": ({"a": ROWS[0]}, "its structure is"),
    "complex": (np.zeros(3, complex), "complex128"),
    "ragged": ([[1.0], [1.0, 2.0]], "differing lengths"),
}


def shown(error):
    return "".join(traceback.format_exception(error))


@pytest.fixture(scope="module")
def trainee():
    """A model that is traced once; each fit goes on from the last."""
    model = tiny.model(width=3)
    model.compile(tiny.sgd(), loss="mse")
    return model


@pytest.mark.parametrize(("problem", "workers"), [*((p, 1) for p in BROKEN), ("raises", 3)])
@pytest.mark.one_in(3)
def test_a_row_that_can_not_be_used_ends_training_and_is_named(problem, workers, trainee, capfd):
    how, message = BROKEN[problem]
    data = keras_dp.PoissonDataset(Broken(how), batch_size=120, workers=workers)
    model, before = trainee, trainee.optimizer.releases
    with pytest.raises(RuntimeError, match=rf"Row 7 of the data can't be read: .*{message}") as e:
        model.fit(data, epochs=50, verbose=0)
    assert SECRET not in shown(e.value)
    assert SECRET not in "".join(capfd.readouterr())
    steps = int(model.optimizer.inner_optimizer.iterations)
    assert model.optimizer.ledger.steps == steps < before + 100
    assert f"after {steps - before} steps of this fit, all of which are counted" in str(e.value)
    if steps:
        wanted = keras_dp.accounting.compute_epsilon(
            num_examples=N, batch_size=120, noise_multiplier=1.0, delta=1e-5, steps=steps
        )
        assert model.optimizer.get_epsilon(1e-5) == pytest.approx(wanted)


@pytest.mark.parametrize("row", [0, N - 1])
def test_the_first_and_the_last_row_are_tried_beforehand(row):
    """The last: a source that has fewer rows than it says."""
    with pytest.raises(ValueError, match=f"Row {row} of the data can't be read") as e:
        keras_dp.PoissonDataset(Broken(IndexError(SECRET), row), batch_size=60)
    assert SECRET not in shown(e.value)


def test_a_map_that_raises_names_the_row_and_no_data():
    def decode(x, y):
        if y == 7:
            raise KeyError(SECRET)
        return x, y

    data = keras_dp.PoissonDataset(ROWS, MARKS, batch_size=N, map=decode)
    with pytest.raises(RuntimeError, match="Row 7 of the data can't be read and mapped") as e:
        for _ in range(3):
            data[0]
    assert SECRET not in shown(e.value)


def test_a_source_that_changes_its_length_is_refused():
    source = MapStyle()
    data = keras_dp.PoissonDataset(source, batch_size=60)
    source.marks = MARKS[: N // 2]
    with pytest.raises(RuntimeError, match=r"changed its length: 240 .* 120 now"):
        data[0]
    model = tiny.model(width=3)
    model.compile(tiny.sgd(), loss="mse")
    with pytest.raises(RuntimeError, match="changed its length"):
        model.fit(data, verbose=0)
    assert model.optimizer.ledger.steps == 0


def test_a_source_that_gives_too_few_rows_is_found_out():
    class TooFew(MapStyleOfMany):
        def __getitems__(self, indices):
            return super().__getitems__(indices)[: max(1, len(indices) - 1)]

    data = keras_dp.PoissonDataset(TooFew(), batch_size=120)
    with pytest.raises(RuntimeError, match="rows can't be read together"):
        for _ in range(5):
            data[0]


def test_a_column_with_a_null_names_the_row():
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array([1.0, 2.0, None, 4.0])
    data = keras_dp.PoissonDataset(column, batch_size=4)
    with pytest.raises(RuntimeError, match=r"Row 2 .* missing value"):
        for _ in range(60):
            data[0]
    dates = pyarrow.array([1, 2, 3], pyarrow.date32())
    with pytest.raises(ValueError, match=r"Row 0 .* type date32"):
        keras_dp.PoissonDataset(dates, batch_size=1)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (OneEach(), "one_example_each=True"),
        (tf.data.Dataset.range(9), "keras_dp.spool"),
        ((k for k in range(9)), "keras_dp.spool"),
        (MapStyle(ROWS[:0], MARKS[:0]), "0 rows"),
        ({"a": MapStyle(), "b": ROWS[:7]}, "same number of rows"),
    ],
)
def test_what_can_not_be_drawn_from_says_what_to_do(x, message):
    with pytest.raises(ValueError, match=message):
        keras_dp.PoissonDataset(x, batch_size=4)


def test_a_py_dataset_that_is_declared_to_hold_examples_is_drawn_from():
    data = keras_dp.PoissonDataset(OneEach(), batch_size=60, one_example_each=True)
    marks_of(data[0])
    assert data.num_examples == N


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers=0"),
        ({"map": 3}, "`map` must be a function"),
        ({"one_example_each": 1}, "one_example_each=1"),
        ({"map": lambda x, y: (x, y, y, y)}, "tuple of 4"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_dp.PoissonDataset(ROWS, MARKS, batch_size=60, **arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], None), "`paths` is empty"),
        (("one.png", None), "not one path"),
        ((["a", "b"], [1]), "2 paths, and 1 rows"),
    ],
)
def test_from_files_checks_what_it_is_given(given, message):
    with pytest.raises(ValueError, match=message):
        keras_dp.from_files(*given, load=np.load)
    with pytest.raises(ValueError, match="`load` must be a function"):
        keras_dp.from_files(["a"], load=None)


@pytest.mark.parametrize("x", [["a secret"], {"x": "a secret"}, "a secret", {1, 2}])
def test_fit_on_what_has_no_rows_shows_no_data(x):
    model = tiny.compiled()
    with pytest.raises(ValueError, match="fit") as e:
        model.fit(x, verbose=0)
    assert "a secret" not in shown(e.value)


def test_targets_beside_a_data_set_are_refused():
    data = keras_dp.PoissonDataset(ROWS, MARKS, batch_size=60)
    with pytest.raises(ValueError, match=r"fit\(y=...\)"):
        tiny.compiled().fit(data, MARKS, verbose=0)


# -- pipelines that can't be seen through --------------------------------------------------------


def pipeline():
    return tf.data.Dataset.from_tensor_slices((ROWS, MARKS)).batch(60)


def generator():
    yield ROWS[:60], MARKS[:60]


class Batches(OneEach):
    def __getitem__(self, index):
        return ROWS[:60], MARKS[:60]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (pipeline, r"fit\(keras_dp\.spool\(examples, 'folder'\), batch_size=256\)"),
        (generator, r"fit\(keras_dp\.spool\(examples, 'folder'\), batch_size=256\)"),
        (Batches, r"fit\(keras_dp\.PoissonDataset\(data, .*one_example_each=True\)\)"),
    ],
)
@pytest.mark.one_in(3)
def test_a_foreign_source_is_warned_of_with_the_line_to_write(make, line):
    model = tiny.model(width=3)
    model.compile(tiny.sgd(), loss="mse")
    with pytest.warns(keras_dp.PrivacyWarning, match=line):
        model.fit(make(), steps_per_epoch=1, verbose=0)
    assert [r.sampler for r in model.optimizer.ledger] == ["unknown"]


@pytest.mark.thorough
def test_a_class_with_a_fit_of_its_own_is_named():
    class Own(keras.Sequential):
        def fit(self, x, y, **kwargs):
            return super().fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(60), **kwargs)

    model = Own([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    with pytest.warns(keras_dp.PrivacyWarning, match=r"keras\.Model\.fit\(model, x, y"):
        model.fit(ROWS, MARKS, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.Model.fit(model, ROWS, MARKS, batch_size=60, verbose=0)
    assert [r.sampler for r in model.optimizer.ledger] == ["unknown", "poisson"]


def test_a_reader_may_be_made_of_a_reader():
    first = Reader(lambda x, y: (x + 1, y), None).then(lambda x, y: (x * 2, y))
    first.examine((ROWS, MARKS), N)
    x, _ = first.read((ROWS, MARKS), np.array([3]))
    np.testing.assert_array_equal(x, 2 * (ROWS[[3]] + 1))
