"""The noise: its size and shape, through the real training step, and that it can't be replayed.

The accepting checks raise a false alarm with a probability below 1e-6 each;
every one of them is shown to reject noise that is wrong.
"""

import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

import keras_dp
from keras_dp.noise import NoiseSource, SecureNoiseSource

C, SIGMA = 0.3, 1.7
ROWS, BATCH = 8, 4  # two steps per epoch, q = 1/2, expected batch size 4
SHAPE = (80, 100)


def no_gradient(y_true, y_pred):
    """A loss that no weight changes: the update is noise alone."""
    return 0.0 * keras.ops.sum(y_pred, axis=-1)


def noise_model(optimizer=None, layers=1, **compile_arguments):
    arguments = {"max_grad_norm": C, "noise_multiplier": SIGMA, **(optimizer or {})}
    model = keras.Sequential(
        [keras.Input(SHAPE[:1])]
        + [keras.layers.Dense(SHAPE[1], use_bias=False)]
        + [keras.layers.Dense(SHAPE[1], use_bias=False) for _ in range(layers - 1)]
    )
    model.compile(keras_dp.DPSGD(1.0, **arguments), loss=no_gradient, **compile_arguments)
    return model


DATA = np.ones((ROWS, SHAPE[0])), np.ones((ROWS, SHAPE[1]))


def noise_of(model, train):
    """The noise on the sum, in units of C, for one weight after another."""
    before = [w.copy() for w in model.get_weights()]
    train(model)
    after = model.get_weights()
    return [np.ravel(b.astype("f8") - a) * BATCH / C for b, a in zip(before, after, strict=True)]


def one_epoch(model):
    model.fit(*DATA, batch_size=BATCH, verbose=0)


def one_batch(model):
    model.train_on_batch(DATA[0][:BATCH], DATA[1][:BATCH])


def is_gaussian(noise, stddev):
    """Kolmogorov-Smirnov against N(0, stddev^2), at a false-alarm rate of 5e-7; and the size."""
    shape = stats.kstest(noise / stddev, "norm").pvalue > 5e-7
    return shape and abs(noise.std() / stddev - 1) < 5.1 / np.sqrt(2 * noise.size)


def unrelated(a, b):
    """|correlation| < 5 / sqrt(d), passed by mistake once in 1.7 million."""
    return abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "microbatches": {"optimizer": {"microbatch_size": 2}},
    "loop": {"optimizer": {"gradients": "loop"}},
    "steps per execution": {"steps_per_execution": 2},
    "microbatches in one execution": {
        "optimizer": {"microbatch_size": 1},
        "steps_per_execution": 2,
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:With run_eagerly=True the Python code of 'no_gradient'")
@pytest.mark.one_in(4)
def test_noise_is_gaussian_of_sigma_c_once_per_step(mode):
    """Two steps: variances add up to 2 (sigma C)^2, whatever the mode."""
    (noise,) = noise_of(noise_model(**MODES[mode]), one_epoch)
    wanted = SIGMA * np.sqrt(2)
    assert is_gaussian(noise, wanted)
    assert not is_gaussian(noise, 2 / 3 * wanted)
    assert not is_gaussian(noise, 3 / 2 * wanted)


@pytest.mark.parametrize("policy", ["float64", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.one_in(3)
def test_noise_under_every_dtype_policy(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = noise_model()
    finally:
        keras.config.set_dtype_policy("float32")
    (noise,) = noise_of(model, one_epoch)
    assert is_gaussian(noise, SIGMA * np.sqrt(2))
    if policy == "float64":  # drawn in double precision, not widened afterwards
        weights = model.get_weights()[0]
        assert weights.dtype == np.float64
        assert np.any(weights != weights.astype("float32"))


@pytest.mark.parametrize(
    ("optimizer", "scale"),
    [({"noise_multiplier": 2 * SIGMA}, 2), ({"max_grad_norm": 3 * C}, 3)],
)
@pytest.mark.one_in(2)
def test_noise_scales_with_sigma_and_with_c(optimizer, scale):
    (noise,) = noise_of(noise_model(optimizer), one_batch)
    assert is_gaussian(noise, SIGMA * scale)


def test_noise_on_train_on_batch():
    with pytest.warns(keras_dp.PrivacyWarning, match="train_on_batch"):
        (noise,) = noise_of(noise_model(), one_batch)
    assert is_gaussian(noise, SIGMA)


def _scaled(factor):
    def mutant(original):
        return lambda self, shapes, stddev: original(self, shapes, stddev * factor)

    return mutant


def _once_per_example(original):
    def draw(self, shapes, stddev):
        draws = [original(self, shapes, stddev) for _ in range(BATCH)]
        return [sum(parts) for parts in zip(*draws, strict=True)]

    return draw


def _uniform(original):
    def draw(self, shapes, stddev):
        return [
            keras.random.uniform(s, -1, 1, dtype=d) * float(np.sqrt(3)) * keras.ops.cast(stddev, d)
            for s, d in shapes
        ]

    return draw


@pytest.mark.parametrize(
    "mutant", [_scaled(2 / 3), _scaled(3 / 2), _scaled(1.1), _once_per_example, _uniform]
)
@pytest.mark.one_in(3)
def test_the_check_rejects_wrong_noise_in_the_training_step(mutant, monkeypatch):
    monkeypatch.setattr(NoiseSource, "draw", mutant(NoiseSource.draw))
    (noise,) = noise_of(noise_model(), one_batch)
    assert not is_gaussian(noise, SIGMA)


# -- nothing is drawn twice ---------------


pytestmark = pytest.mark.filterwarnings("ignore:train_on_batch can't know")


@pytest.mark.thorough
def test_variables_of_one_shape_get_unrelated_noise():
    model = keras.Sequential(
        [keras.Input((50,))] + [keras.layers.Dense(50, use_bias=False) for _ in range(3)]
    )
    model.compile(keras_dp.DPSGD(1.0, max_grad_norm=C, noise_multiplier=SIGMA), loss=no_gradient)
    x = np.ones((BATCH, 50))
    noise = noise_of(model, lambda m: m.train_on_batch(x, x))
    assert unrelated(noise[0], noise[1])
    assert unrelated(noise[1], noise[2])
    assert unrelated(noise[0], noise[2])


def test_steps_fits_set_weights_and_seeding_never_repeat_noise():
    """One model, step after step; Keras', NumPy's and TensorFlow's seed are set before each."""
    model = noise_model()
    start = model.get_weights()
    found = []
    for train in (one_batch, one_batch, one_epoch, one_epoch, one_batch):
        keras.utils.set_random_seed(5)
        model.set_weights(start)
        found += noise_of(model, train)
    assert all(unrelated(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.thorough
def test_two_optimizers_under_one_global_seed_draw_unrelated_noise():
    found = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        found += noise_of(noise_model(), one_epoch)
    assert unrelated(*found)


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_resumed_training_draws_noise_unrelated_to_what_came_before_and_after(file, tmp_path):
    path = str(tmp_path / file)
    model = noise_model()
    found = noise_of(model, one_batch)
    (model.save if file.endswith(".keras") else model.save_weights)(path)
    found += noise_of(model, one_batch)
    for _ in range(2):
        if file.endswith(".keras"):
            resumed = keras.saving.load_model(path, custom_objects={"no_gradient": no_gradient})
        else:
            resumed = noise_model()
            resumed.load_weights(path)
        assert resumed.optimizer.ledger.steps == 1
        found += noise_of(resumed, one_batch)
    model.load_weights(path)
    found += noise_of(model, one_batch)
    assert all(unrelated(a, b) for i, a in enumerate(found) for b in found[:i])


def test_the_correlation_check_sees_reused_noise(monkeypatch):
    monkeypatch.setattr(NoiseSource, "refresh", lambda self, key=None: self._generator.rekey(KEY))
    found = []
    model = noise_model()
    for _ in range(2):
        found += noise_of(model, lambda m: m.fit(*DATA, batch_size=ROWS, verbose=0))
    assert not unrelated(*found)


KEY = np.arange(3)

IN_ANOTHER_PROCESS = """
import warnings
warnings.simplefilter("error")
import keras, numpy as np, keras_dp
from keras_dp.noise import NoiseSource
keras.utils.set_random_seed(5)
print(" ".join(repr(float(v)) for v in np.ravel(NoiseSource().draw([((500,), "float32")], 1.0)[0])))
"""


@pytest.mark.oldest
def test_another_process_imports_keras_dp_in_silence_and_draws_other_noise():
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    theirs = np.array(line.split(), float)
    keras.utils.set_random_seed(5)
    ours = np.ravel(NoiseSource().draw([((500,), "float32")], 1.0)[0])
    assert is_gaussian(theirs, 1.0)
    assert unrelated(ours, theirs)


def test_after_a_fork_the_child_takes_a_key_of_its_own(monkeypatch):
    def draw(source):
        return np.ravel(source.draw([((2000,), "float32")], 1.0)[0])

    entropy = os.urandom
    with monkeypatch.context() as same_key:
        same_key.setattr(os, "urandom", bytes)
        parent, child = NoiseSource(), NoiseSource()
    assert os.urandom is entropy
    np.testing.assert_array_equal(draw(parent), draw(child))
    parent.refresh_after_fork()  # no fork: the generator just goes on
    child.refresh_after_fork()
    np.testing.assert_array_equal(draw(parent), draw(child))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    child.refresh_after_fork()
    assert unrelated(draw(parent), draw(child))
    assert unrelated(draw(child), draw(child))


# -- no key leaves the process ---------------


def members(path):
    """Every file in a .keras archive, or the file itself, as bytes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist()]
    return [path.read_bytes()]


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
@pytest.mark.one_in(2)
def test_no_saved_file_holds_the_key(file, tmp_path, monkeypatch):
    keys = []
    entropy = os.urandom

    def recorded(size):
        keys.append(entropy(size))
        return keys[-1]

    monkeypatch.setattr(os, "urandom", recorded)
    model = noise_model()
    one_epoch(model)
    monkeypatch.undo()
    path = tmp_path / file
    (model.save if file.endswith(".keras") else model.save_weights)(path)
    words = {key[k : k + 8] for key in keys for k in range(0, len(key) - 7, 8)}
    assert len(words) >= 3
    contents = members(path)
    for word in words:
        number = str(int.from_bytes(word, sys.byteorder, signed=True)).encode()
        assert not any(word in content or number in content for content in contents)
    # The search would find what is there: a weight's bytes.
    weights = model.get_weights()[0].tobytes()[:32]
    assert any(weights in content for content in contents)


@pytest.mark.thorough
def test_a_chosen_seed_is_not_saved_either(tmp_path):
    seed = 987654321987
    model = noise_model({"seed": seed})
    one_epoch(model)
    model.save(tmp_path / "model.keras")
    assert not any(str(seed).encode() in content for content in members(tmp_path / "model.keras"))
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"no_gradient": no_gradient}
    )
    assert loaded.optimizer.seed is None
    assert unrelated(*noise_of(model, one_epoch), *noise_of(loaded, one_epoch))


# -- seeds, for tests ---------------


@pytest.mark.thorough
def test_a_seed_repeats_the_noise_and_voids_the_guarantee():
    found = []
    for seed in (3, 3, 4):
        model = noise_model({"seed": seed})
        found += noise_of(model, one_epoch)
        assert [r.seeded for r in model.optimizer.ledger] == [True]
        report = keras_dp.privacy_report(model, delta=1e-5)
        assert report.seeded
        assert "the guarantee is void" in str(report)
        assert '"private": false' in report.to_json()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert unrelated(found[0], found[2])


@pytest.mark.thorough
def test_seeded_noise_still_differs_from_step_to_step():
    model = noise_model({"seed": 3})
    first, second = (noise_of(model, one_epoch)[0] for _ in "ab")
    assert unrelated(first, second)


@pytest.mark.thorough
def test_unseeded_noise_is_not_marked():
    model = noise_model()
    one_epoch(model)
    assert [r.seeded for r in model.optimizer.ledger] == [False]
    assert not keras_dp.privacy_report(model, delta=1e-5).seeded


# -- secure mode ---------------


SECURE_MODES = {
    "graph": {},
    "eager": MODES["eager"],
    "xla": MODES["xla"],
    "microbatches in one execution": MODES["microbatches in one execution"],
}


def secure_model(optimizer=None, **compile_arguments):
    return noise_model({"secure_mode": True, **(optimizer or {})}, **compile_arguments)


def secure_noise(count, stddev=1.0, onto=0.0, dtype="float32"):
    """Sums of `onto`, noised by `SecureNoiseSource`."""
    sums = keras.ops.full((count,), onto, dtype)
    return np.ravel(SecureNoiseSource().add_to([sums], stddev)[0]).astype("f8")


@pytest.mark.parametrize("mode", SECURE_MODES)
@pytest.mark.filterwarnings("ignore:With run_eagerly=True the Python code of 'no_gradient'")
@pytest.mark.one_in(2)
def test_secure_noise_is_gaussian_of_sigma_c_once_per_step(mode):
    (noise,) = noise_of(secure_model(**SECURE_MODES[mode]), one_epoch)
    wanted = SIGMA * np.sqrt(2)
    assert is_gaussian(noise, wanted)
    assert not is_gaussian(noise, 2 / 3 * wanted)
    assert not is_gaussian(noise, 3 / 2 * wanted)


@pytest.mark.parametrize("policy", ["float64", "mixed_float16"])
@pytest.mark.thorough
def test_secure_noise_under_other_dtype_policies(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = secure_model()
    finally:
        keras.config.set_dtype_policy("float32")
    (noise,) = noise_of(model, one_epoch)
    assert is_gaussian(noise, SIGMA * np.sqrt(2))


@pytest.mark.parametrize("stddev", [1e-30, 0.7, 1e30])
def test_secure_noise_has_the_size_that_was_asked_for_and_its_shape_far_out(stddev):
    noise = secure_noise(10**6, stddev) / stddev
    assert is_gaussian(noise, 1.0)
    assert not is_gaussian(noise, 2 / 3)
    assert not is_gaussian(noise, 3 / 2)
    # 63.3 numbers beyond 4 are expected; fewer than 27 or more than 109 once in 2 million times.
    assert 27 <= np.sum(np.abs(noise) > 4) <= 109


def test_secure_noise_of_no_size_is_none():
    assert np.all(secure_noise(5, 0.0, onto=1 / 3) == np.float32(1 / 3))


@pytest.mark.parametrize(
    "mutant",
    [
        lambda original, count: original(count) * 2,  # four draws, not scaled back
        lambda original, count: original(count) / 2,  # their mean
        lambda original, count: np.abs(original(count)),  # the side left out
        lambda original, count: np.full(count, original(1)),  # one for all
    ],
)
def test_the_check_rejects_wrong_secure_noise(mutant, monkeypatch):
    original = keras_dp.noise._gaussians
    monkeypatch.setattr(keras_dp.noise, "_gaussians", lambda count: mutant(original, count))
    assert not is_gaussian(secure_noise(8000), 1.0)


def test_secure_noise_of_variables_steps_and_fits_is_unrelated_whatever_the_seeds():
    model = secure_model()
    start = model.get_weights()
    found = []
    for train in (one_batch, one_batch, one_epoch, one_epoch):
        keras.utils.set_random_seed(5)
        model.set_weights(start)
        found += noise_of(model, train)
    sums = [keras.ops.zeros(SHAPE), keras.ops.zeros(SHAPE)]
    for _ in range(2):
        keras.utils.set_random_seed(5)
        found += [np.ravel(n) for n in SecureNoiseSource().add_to(sums, 1.0)]
    assert len(found) == 8
    assert all(unrelated(a, b) for i, a in enumerate(found) for b in found[:i])


IN_A_FORK = """
import os
import keras
from keras_dp.noise import SecureNoiseSource
source = SecureNoiseSource()
def show():
    noise = source.add_to([keras.ops.zeros((500,))], 1.0)[0]
    print(" ".join(repr(float(v)) for v in keras.ops.convert_to_numpy(noise)), flush=True)
show()
child = os.fork()
if child:
    os.waitpid(child, 0)
show()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.thorough
def test_secure_noise_of_a_process_and_its_fork_is_unrelated():
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FORK], capture_output=True, text=True, check=True
    )
    before, child, parent = (
        np.array(line.split(), float) for line in done.stdout.splitlines()[-3:]
    )
    assert is_gaussian(child, 1.0)
    assert unrelated(before, child) and unrelated(child, parent) and unrelated(before, parent)


def test_secure_noise_takes_three_words_from_the_operating_system_for_each_number(monkeypatch):
    sizes = []
    entropy = os.urandom

    def recorded(size):
        sizes.append(size)
        return entropy(size)

    monkeypatch.setattr(os, "urandom", recorded)
    secure_noise(10000)
    assert sum(sizes) == 10000 * 3 * 8


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.filterwarnings("ignore:With run_eagerly=True the Python code of 'no_gradient'")
def test_without_entropy_secure_mode_stops_and_trains_nothing(mode, monkeypatch):
    model = secure_model(**SECURE_MODES[mode])
    start = model.get_weights()

    def none(size):
        raise NotImplementedError("no entropy today")

    monkeypatch.setattr(os, "urandom", none)
    with pytest.raises(Exception, match="no entropy today"):
        one_batch(model)
    monkeypatch.undo()
    np.testing.assert_array_equal(model.get_weights()[0], start[0])


@pytest.mark.thorough
def test_a_whole_step_inside_xla_stops_with_an_error_that_names_the_cause():
    model = secure_model()
    one_batch(model)
    start = model.get_weights()
    whole = tf.function(lambda: model.train_step(DATA), jit_compile=True, autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="runs_in_python_not_in_XLA"):
        whole()
    np.testing.assert_array_equal(model.get_weights()[0], start[0])


# What an attack on floating-point numbers looks at: which of them can come out at all.


@pytest.mark.parametrize("stddev", [SIGMA * C, 1.0, 40.0])
def test_which_numbers_come_out_of_secure_mode_does_not_depend_on_the_sum(stddev):
    grid = 2.0 ** (np.floor(np.log2(stddev)) - 20)
    for onto in (0.0, 1.0, 1 / 3, -1e-3, 1e-12):
        for dtype in ("float32", "float64"):
            noised = secure_noise(20000, stddev, onto, dtype)
            assert np.all(noised % grid == 0)
            # All of the grid is met evenly where float32 doesn't round once more.
            near = noised[np.abs(noised) < stddev] / grid
            counts = np.bincount((near % 64).astype(int), minlength=64)
            assert stats.chisquare(counts).pvalue > 1e-8


def test_which_numbers_come_out_of_ordinary_noise_tells_the_sum():
    """The attack: near 0, a sum of 1 leaves only multiples of 2^-24, a sum of 0 all numbers."""

    def on_the_grid(onto):
        sums = keras.ops.full((20000,), onto, "float32")
        noised = np.ravel(NoiseSource().add_to([sums], 1.0)[0]).astype("f8")
        return np.mean(noised[np.abs(noised) < 0.1] % 2.0**-24 == 0)

    assert on_the_grid(1.0) == 1.0
    assert on_the_grid(0.0) < 0.9


def test_secure_gaussians_fill_the_low_bits_of_double_precision():
    """Before they are rounded to the grid; numbers made in float32 would leave them empty."""

    def filled(draws):
        low = np.bincount((draws.view(np.uint64) & 255).astype(int), minlength=256)
        return low.min() > 0 and low.max() < 0.1 * len(draws)

    draws = keras_dp.noise._gaussians(50000)
    assert len(np.unique(draws)) == len(draws)
    assert filled(draws)
    assert not filled(draws.astype("float32").astype("float64"))


@pytest.mark.thorough
def test_secure_mode_is_saved_and_nothing_of_its_noise(tmp_path):
    model = secure_model()
    found = noise_of(model, one_epoch)
    assert vars(model.optimizer._mechanism.noise) == {}
    path = tmp_path / "model.keras"
    model.save(path)
    for _ in range(2):
        loaded = keras.saving.load_model(path, custom_objects={"no_gradient": no_gradient})
        assert loaded.optimizer.secure_mode is True
        assert type(loaded.optimizer._mechanism.noise) is SecureNoiseSource
        found += noise_of(loaded, one_epoch)
    found += noise_of(model, one_epoch)
    assert all(unrelated(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("name", ["DPSGD", "DPAdam", "DPAdamW", "DPAdagrad", "DPRMSprop"])
def test_every_optimizer_takes_secure_mode_and_keeps_it_when_copied(name):
    cls = getattr(keras_dp, name)
    for secure in (True, False):
        optimizer = cls(0.1, max_grad_norm=C, noise_multiplier=SIGMA, secure_mode=secure)
        again = cls.from_config(optimizer.get_config())
        assert optimizer.secure_mode is again.secure_mode is secure
        assert type(again._mechanism.noise) is (SecureNoiseSource if secure else NoiseSource)


def test_secure_mode_and_a_seed_contradict_each_other():
    with pytest.raises(ValueError, match="secure_mode=True, seed=0"):
        secure_model({"seed": 0})


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_secure_mode_is_true_or_false(wrong):
    with pytest.raises(ValueError, match="`secure_mode` must be True or False"):
        noise_model({"secure_mode": wrong})


def test_the_source_of_randomness_is_told_in_words():
    def words(**settings):
        return noise_model(settings).optimizer.random_source

    assert words() == "OpenSSL's generator or Philox, keyed by the operating system"
    assert words(seed=3) == "a chosen seed"
    assert words(secure_mode=True).startswith("cryptographic: the operating system's generator")
    assert "floating-point" in words(secure_mode=True)
