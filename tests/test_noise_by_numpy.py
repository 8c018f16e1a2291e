"""The noise that NumPy draws from OpenSSL's random bytes: much of it, where a processor trains.

Each accepting check raises a false alarm with a probability below 1e-6, and is
shown to reject noise that is wrong.
"""

import os
import ssl

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import keras_dp
from keras_dp import noise
from keras_dp.noise import NoiseSource

MANY = 2**20


@pytest.fixture
def drawn(monkeypatch):
    """How many bytes OpenSSL gave, call by call."""
    sizes = []
    given = ssl.RAND_bytes

    def counted(size):
        sizes.append(size)
        return given(size)

    monkeypatch.setattr(ssl, "RAND_bytes", counted)
    return sizes


def draw(shapes=((MANY,),), dtype="float32", stddev=1.0, seed=None):
    made = NoiseSource(seed).draw([(shape, dtype) for shape in shapes], stddev)
    return [np.ravel(m) for m in made]


def is_gaussian(z):
    """Kolmogorov-Smirnov (5e-7), the size (3e-7), and how many are beyond 4 (2e-7).

    63.3 in a million are expected there, and the bounds are Poisson's.
    """
    z = z.astype("f8")
    beyond, expected = np.sum(np.abs(z) > 4), 2 * stats.norm.sf(4) * z.size
    low, high = stats.poisson.ppf([1e-7, 1 - 1e-7], expected)
    shape = stats.kstest(z, "norm").pvalue > 5e-7
    return shape and abs(z.std() - 1) < 5.1 / np.sqrt(2 * z.size) and low <= beyond <= high


def unrelated(a, b):
    """Correlations of the numbers, and of their squares: each 5.7e-7."""
    return all(
        abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(len(x)) for x, y in ((a, b), (a**2, b**2))
    )


def is_independent(z):
    """What is made of the same words, of neighbours, and of other blocks."""
    z = z.astype("f8")[: z.size // noise._BLOCK * noise._BLOCK].reshape(-1, noise._BLOCK)
    first, second = np.split(z, 2, axis=1)
    return (
        unrelated(first.ravel(), second.ravel())
        and unrelated(z[:, 1:].ravel(), z[:, :-1].ravel())
        and unrelated(z[1:].ravel(), z[:-1].ravel())
        and unrelated(z[: len(z) // 2].ravel(), z[len(z) // 2 :].ravel())
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_of_numpy_is_gaussian_and_independent(dtype, drawn):
    (z,) = draw(dtype=dtype)
    assert z.dtype == dtype
    assert sum(drawn) == MANY * z.itemsize  # NumPy drew it, a word for each number
    assert is_gaussian(z)
    assert is_independent(z)
    if dtype == "float64":  # drawn in double precision, not widened afterwards
        assert np.mean(z != z.astype("float32")) > 0.99


def of_another_size(original, z, stddev):
    original(z, 1.01 * stddev)


def of_one_sign(original, z, stddev):
    original(z, stddev)
    np.abs(z, out=z)


def cut_at_four(original, z, stddev):
    original(z, stddev)
    np.clip(z, -4, 4, out=z)


def uniform(original, z, stddev):
    z[:] = np.random.default_rng().uniform(-np.sqrt(3), np.sqrt(3), z.size)


@pytest.mark.parametrize("mutant", [of_another_size, of_one_sign, cut_at_four, uniform])
def test_the_check_of_the_distribution_rejects(mutant, monkeypatch):
    original = noise._fill
    monkeypatch.setattr(noise, "_fill", lambda z, stddev: mutant(original, z, stddev))
    assert not is_gaussian(draw()[0])


def the_same_words_for_every_block(original):
    words = {}
    return lambda dtype, count: words.setdefault(count, original(dtype, count))


def one_word_for_length_and_direction(original):
    def words(dtype, count):
        return np.tile(original(dtype, count // 2), 2)

    return words


def neighbours_share_a_word(original):
    def words(dtype, count):
        return np.repeat(original(dtype, count // 2), 2)

    return words


@pytest.mark.parametrize(
    "mutant",
    [
        the_same_words_for_every_block,
        one_word_for_length_and_direction,
        neighbours_share_a_word,
    ],
)
def test_the_check_of_independence_rejects(mutant, monkeypatch):
    monkeypatch.setattr(noise, "_random_words", mutant(noise._random_words))
    assert not is_independent(draw()[0])


def test_the_check_of_independence_rejects_the_same_of_a_pair(monkeypatch):
    monkeypatch.setattr(np, "sin", np.cos)
    assert not is_independent(draw()[0])


def test_variables_steps_and_sources_share_nothing_whatever_the_seeds():
    source, shapes = NoiseSource(), [((200, 100), "float32"), ((20000,), "float32")]
    step = tf.function(lambda: source.draw(shapes, 1.0))
    found = []
    for made in (step, step, lambda: NoiseSource().draw(shapes, 1.0)):
        keras.utils.set_random_seed(5)
        found += [np.ravel(z) for z in made()]
    assert all(unrelated(a, b) for i, a in enumerate(found) for b in found[:i])


LARGE = [(700, 500), (3,), (300, 1000), (2**18,), (), (5,), (0, 4), (100, 900), (7,)]


def added(source, sums, stddev):
    """Noise that a traced step adds, and how many operations of NumPy's it has for that."""
    step = tf.function(lambda sums: source.add_to(sums, tf.constant(stddev, "float64")))
    kinds = [op.type for op in step.get_concrete_function(sums).graph.get_operations()]
    assert not any("Random" in kind or "Rng" in kind for kind in kinds)  # the framework's
    return step(sums), kinds.count("PyFunc")


@pytest.mark.parametrize("source", [NoiseSource, noise.SecureNoiseSource])
def test_a_large_model_has_its_noise_a_part_at_a_time(source):
    """Beside the sums there is no more noise than their largest has, or a sixteenth of them all."""
    random = np.random.default_rng(0)
    sums = [tf.constant(random.normal(size=shape), "float32") for shape in LARGE]
    same, parts = added(source(), sums, 0.0)
    assert parts == 3  # 350,003; 300,000; 352,157
    for got, wanted in zip(same, sums, strict=True):
        np.testing.assert_array_equal(got, wanted)
    noised, _ = added(source(), sums, 2.0)
    found = [np.ravel(a - b) for a, b in zip(noised, sums, strict=True)]
    for z in found:
        assert z.size < 1000 or abs(z.std() / 2 - 1) < 5.1 / np.sqrt(2 * z.size)
    first, second, third = (found[k][:90_000] for k in (0, 2, 7))
    assert unrelated(first, second)
    assert unrelated(first, third)
    assert unrelated(second, third)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([200_000, 60_000], 1),
        ([300_000, 500] * 4, 4),  # kernels and their biases
        ([300_000, 500, 16_000, 300_000, 200], 2),
        ([10_000] * 28, 1),
        ([10_000] * 40, 2),
        ([1] * 40 + [400_000], 1),
    ],
)
def test_no_part_of_a_large_model_has_the_noise_of_a_small_one(sizes, wanted):
    """Of few numbers it wouldn't come from a cryptographic generator."""
    _, parts = added(NoiseSource(), [tf.zeros(n) for n in sizes], 1.0)
    assert parts == wanted


def test_every_shape_and_size_is_filled():
    shapes = [(3, 5), (), (0, 4), (1,), (20001,), (7, 11, 13)]
    dtypes = ["float32", "float64", "float32", "float64", "float32", "float64"]
    made = NoiseSource().draw(list(zip(shapes, dtypes, strict=True)), 3.0)
    assert [tuple(z.shape) for z in made] == shapes
    assert [keras.backend.standardize_dtype(z.dtype) for z in made] == dtypes
    numbers = np.concatenate([np.ravel(z).astype("f8") for z in made])
    assert np.unique(numbers).size > 0.999 * numbers.size  # none twice, but by rounding
    assert is_gaussian(numbers / 3)


def model_of(units=200, **arguments):
    """Its 20,000 weights get noise alone: no loss depends on them."""
    settings = {"max_grad_norm": 0.5, "noise_multiplier": 2.0, **arguments.pop("optimizer", {})}
    model = keras.Sequential(
        [keras.Input((100,)), keras.layers.Dense(units, use_bias=False, kernel_initializer="zeros")]
    )
    optimizer = keras_dp.DPSGD(1.0, **settings)
    model.compile(optimizer, lambda y, p: 0.0 * keras.ops.sum(p, axis=-1), **arguments)
    return model


DATA = np.ones((8, 100), "f4"), np.ones((8, 200), "f4")


@pytest.mark.parametrize("mode", [{}, {"jit_compile": True}, {"steps_per_execution": 2}])
@pytest.mark.one_in(3)
def test_rule_03_noise_of_numpy_in_the_training_step(mode, drawn):
    """Two steps, each divided by an expected batch of 4."""
    model = model_of(**mode)
    model.fit(*DATA, batch_size=4, verbose=0)
    assert sum(drawn) == 2 * 4 * 20000
    z = np.ravel(model.get_weights()[0]).astype("f8") * 4 / (0.5 * 2.0 * np.sqrt(2))
    assert is_gaussian(z)
    assert not is_gaussian(z / np.sqrt(2))


@pytest.mark.filterwarnings("ignore:train_on_batch can't know")
def test_without_random_bytes_nothing_is_trained(monkeypatch):
    model = model_of()

    def none(size):
        raise ssl.SSLError("no entropy today")

    monkeypatch.setattr(ssl, "RAND_bytes", none)
    with pytest.raises(Exception, match="no entropy today"):
        model.train_on_batch(*DATA)
    np.testing.assert_array_equal(model.get_weights()[0], 0)


def test_rule_07_every_fit_stirs_in_fresh_entropy(monkeypatch):
    given, added = [], []
    entropy, add = os.urandom, ssl.RAND_add

    def recorded(size):
        given.append(entropy(size))
        return given[-1]

    monkeypatch.setattr(os, "urandom", recorded)
    monkeypatch.setattr(ssl, "RAND_add", lambda b, size: (added.append((b, size)), add(b, size)))
    model = model_of()
    for _ in range(2):
        model.fit(*DATA, batch_size=4, verbose=0)
    assert len({b for b, _ in added}) == len(added) >= 2
    assert all(len(b) == size >= 32 and b in given for b, size in added)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_rule_07_a_fork_draws_other_noise():
    def numbers():
        return noise._drawn([((2000,), "float32")], 1.0)[0]

    before = numbers()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, numbers().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 8000), "f4")
    for end in (read, write):
        os.close(end)
    ours = numbers()
    assert unrelated(before, theirs) and unrelated(theirs, ours) and unrelated(before, ours)


def test_few_numbers_seeded_ones_and_those_for_xla_or_a_gpu_are_the_framework_s(drawn, monkeypatch):
    assert is_gaussian(draw(shapes=[(noise._MANY - 1,)])[0])
    np.testing.assert_array_equal(draw(seed=3)[0], draw(seed=3)[0])
    source = NoiseSource()

    def inside():
        outer = tf.cond(tf.constant(True), one, one)
        return tf.reshape(outer, [-1])

    def one():
        return source.draw([((MANY,), "float32")], 1.0)[0]

    assert is_gaussian(np.ravel(tf.function(inside, jit_compile=True)()))
    both = [tf.config.LogicalDevice(name, name) for name in ("CPU", "GPU")]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: both)
    assert is_gaussian(draw()[0])
    assert drawn == []
