"""Rule 15: an example adds at most C (1 + 1e-4), however its numbers round.

What an example adds is measured in float64 from the very sum that comes out
for it alone. The inputs are those that an attacker would choose, or that meet
the arithmetic of float32 at its edges: uses of a weight that nearly cancel,
large offsets, and values from 1e-30 to 1e30.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import flat, noiseless_optimizer, update_on_batch

import keras_dp
from keras_dp import arithmetic, backend
from keras_dp.backend.tensorflow import rounding
from keras_dp.gradients import forms
from keras_dp.gradients.forms import (
    Instantiated,
    OuterProducts,
    Rows,
    Scaled,
    Squares,
    clipped_sums,
    combined,
)
from keras_dp.gradients.rules.convolution import Filters, filters_of_steps

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")

MOST = 1 + 1e-4
B = 3


@functools.cache
def traced(name):
    """From what a form is made of, and the examples that are real, to the clipped sum for C = 1."""
    arrays, build = FORMS[name]

    @tf.function(autograph=False)
    def summed(tensors, real):
        (total,), _ = clipped_sums([build(*tensors)], [None], flat(1.0), real)
        return total

    return arrays, summed


def sums(name, how, *groups):
    """The clipped sum, in float64, of each of several groups of examples."""
    arrays, summed = traced(name)
    tensors = [tf.constant(t) for t in arrays(**how)]
    masks = (tf.constant(np.isin(np.arange(B), rows)) for rows in groups)
    return [np.asarray(summed(tensors, real), "f8") for real in masks]


def added(name, how):
    """How long what each of the examples adds alone is."""
    return np.array([np.linalg.norm(total) for total in sums(name, how, *range(B))])


# -- forms ------------------------------------------------------------------------------------


def outer(length, d, p, *, scale=(1.0, 1.0), blocks=None, cancel=None, offset=0.0, seed=0):
    """Factors of sums of outer products.

    With `cancel`, every second position takes back what the one before gave, but for that part.
    """
    random = np.random.default_rng(seed)
    middle = () if blocks is None else (blocks,)
    left = random.normal(size=(B, *middle, length, d)) + offset
    right = random.normal(size=(B, *middle, length, p))
    if cancel is not None:
        half = length // 2
        left[..., half : 2 * half, :] = left[..., :half, :] * (
            1 + cancel * random.normal(size=left[..., :half, :].shape)
        )
        right[..., half : 2 * half, :] = -right[..., :half, :]
        right[..., 2 * half :, :] = 0
    if offset:
        right -= right.mean(axis=-2, keepdims=True)
    return [
        np.clip(t * s, -3e38, 3e38).astype("float32")
        for t, s in zip((left, right), scale, strict=True)
    ]


def lookups(length, width):
    ids = np.arange(length) % max(1, length // 2)  # the second half takes the rows of the first
    ids = np.tile(ids, (B, 1)).astype("int32")
    return (lambda **how: [outer(length, 1, width, **how)[1]]), lambda right: Rows(ids, right, 50)


def tied(**how):
    """A table of 50 rows, looked up in, and multiplied with: one cancels the other."""
    (_, right), (hidden, _) = outer(6, 1, 8, **how), outer(6, 8, 1, **how)
    left = np.zeros((B, 6, 50), "float32")
    left[:, np.arange(6), np.arange(6)] = -1
    if "cancel" in how:
        hidden = right * (1 + how["cancel"] * np.random.default_rng(1).normal(size=right.shape))
    return [right, left, hidden.astype("float32")]


def as_tied(right, left, hidden):
    ids = np.tile(np.arange(6), (B, 1)).astype("int32")
    return combined([Rows(ids, right, 50), OuterProducts(left, hidden)])


def images(channels, filters, groups=1, size=3):
    """Filters of a convolution with kernels of 2 by 2, on images whose pixels cancel in pairs."""

    def arrays(**how):
        x, _ = outer(size * size, channels, 1, **how)
        _, g = outer((size - 1) ** 2, 1, filters, **how)
        if "cancel" in how:  # an even image; the upstream gradients add up to nearly nothing
            noise = np.random.default_rng(1).normal(size=x.shape)
            x = x[:, :1] * (1 + how["cancel"] * noise)
        x = x.reshape(B, size, size, channels).astype("float32")
        return [x, g.reshape(B, size - 1, size - 1, filters)]

    shape = (2, 2, channels // groups, filters)
    return arrays, lambda x, g: Filters(x, g, shape, (1, 1), "valid", (1, 1), groups)


def two_steps(channels, filters):
    """The same filters on each of two images, one after the other."""

    def arrays(**how):
        x, _ = outer(18, channels, 1, **how)
        _, g = outer(8, 1, filters, **how)
        if "cancel" in how:
            noise = np.random.default_rng(1).normal(size=x.shape)
            x = x[:, :1] * (1 + how["cancel"] * noise)
        x = x.reshape(B, 2, 3, 3, channels).astype("float32")
        return [x, g.reshape(B, 2, 2, 2, filters)]

    shape = (2, 2, channels, filters)
    return arrays, lambda x, g: filters_of_steps(x, g, shape, (1, 1), "valid", (1, 1))


def products(length, d, p, **fixed):
    return functools.partial(outer, length, d, p, **fixed), OuterProducts


def one_position(**how):
    return [t[:, 0] for t in outer(1, 40, 30, **how)]


def written_out(**how):
    left, right = (t.astype("f8") for t in outer(6, 8, 9, **how))
    gradients = np.einsum("btd,btp->bdp", left, right)
    return [np.clip(gradients, -3e38, 3e38).astype("float32")]


def two_uses(**how):
    left, right = outer(2, 64, 48, **how)
    return [left[:, 0], right[:, 0], left[:, 1], right[:, 1]]


def four_views(**how):
    return [t.reshape(4 * B, -1) for t in outer(4, 64, 48, **how)]


FORMS = {
    "one position": (one_position, OuterProducts),
    "written out": (written_out, Instantiated),
    "products": products(8, 6, 5),
    "pairs": products(4, 64, 48),
    "long pairs": products(6, 300, 200),
    "blocks of products": products(8, 6, 5, blocks=2),
    "blocks of pairs": products(4, 30, 20, blocks=2),
    "uses of one weight": (
        two_uses,
        lambda a, g, b, h: combined([OuterProducts(a, g), OuterProducts(b, h)]),
    ),
    "views": (four_views, lambda left, right: OuterProducts(left, right).folded(4)),
    "scaled": (
        functools.partial(outer, 4, 64, 48),
        lambda left, right: Scaled(OuterProducts(left, right), tf.constant([2.0**-9] * B)),
    ),
    "rows": lookups(6, 8),
    "many rows": lookups(20, 8),
    "tied": (tied, as_tied),
    "filters written out": images(2, 3),
    "filters by pairs": images(32, 24),
    "filters in groups": images(64, 48, groups=2),
    "filters of two steps": two_steps(2, 3),
    "filters of two steps by pairs": two_steps(64, 48),
}

HOW = {
    "plain": {},
    "offset 1e3": {"offset": 1e3},
    "offset 1e6": {"offset": 1e6},
    **{f"cancels but for {part:g}": {"cancel": part} for part in (1e-2, 1e-4, 1e-6, 0.0)},
    **{
        f"{a:g} times {b:g}": {"scale": (a, b)}
        for a, b in (
            (1e-30, 1e30),
            (1e30, 1e-30),
            (9e-20, 1e19),
            (1e30, 1e3),
            (1e25, 1e25),
            (1e-25, 1e-25),
            (3e37, 1e-44),
            (1e-40, 1e38),
        )
    },
    "cancels, 1e15 times 1e15": {"cancel": 1e-4, "scale": (1e15, 1e15)},
    "cancels, 1e30 times 1e-28": {"cancel": 1e-4, "scale": (1e30, 1e-28)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.one_in(2)
def test_rule_15_what_is_added_is_at_most_c(form):
    for name, how in HOW.items():
        lengths = added(form, how)
        assert np.all(np.isfinite(lengths)), name
        assert lengths.max() <= MOST, (name, lengths)


def exact_norms(name, how):
    """In float64; of what is written out, from what is written."""
    arrays, build = FORMS[name]
    written = name in ("written out", "filters written out", "filters of two steps")
    tensors = [tf.constant(t, "float32" if written else "float64") for t in arrays(**how)]
    form = build(*tensors)
    form = form.gradients if isinstance(form, Scaled) else form
    if written:
        found = form.instantiate()
    else:
        found = [form.weighted_sum(tf.one_hot(i, B, dtype="float64")) for i in range(B)]
    return np.linalg.norm(np.asarray(found, "f8").reshape(B, -1), axis=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.one_in(3)
def test_rule_15_what_is_not_extreme_is_clipped_to_c(form):
    """Nor is what leaves the range of float32 in its squares only."""
    factor = 2.0**-9 if form == "scaled" else 1.0
    for name, how in HOW.items():
        if how.get("offset", 0) > 1e4 or how.get("cancel", 1) < 1e-3:
            continue
        scale = how.get("scale", (1.0, 1.0))
        if not (min(scale) >= 1e-30 and 1e-30 <= scale[0] * scale[1] <= 1e30):
            continue
        exact = factor * exact_norms(form, how)
        if exact.max() > 1e36:
            continue
        wanted = np.minimum(exact, 1)
        lengths = added(form, how)
        assert np.all(lengths >= (1 - 1e-3) * wanted), (name, lengths, wanted)
        assert np.all(lengths <= MOST * wanted), (name, lengths, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_rule_15_an_example_moves_the_sum_of_all_by_at_most_c(form):
    for name in ("plain", "offset 1e3", "cancels but for 0.01", "cancels but for 0.0001"):
        everyone, others = sums(form, HOW[name], range(B), range(1, B))
        # The terms of the others round otherwise, too.
        assert np.linalg.norm(everyone - others) <= MOST + 1e-4, name


@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.parametrize("length", [4, 40])
def test_rule_15_holds_where_the_number_of_positions_is_not_known(blocks, length):
    middle = [] if blocks is None else [blocks]

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None, *middle, None, 12]),
            tf.TensorSpec([None, *middle, None, 10]),
            tf.TensorSpec([None], tf.bool),
        ],
    )
    def found(left, right, real):
        (total,), _ = clipped_sums([OuterProducts(left, right)], [None], flat(1.0), real)
        return total

    for how in HOW.values():
        left, right = outer(length, 12, 10, blocks=blocks, **how)
        for i in (0, B - 1):
            total = found(left, right, np.arange(B) == i)
            assert np.linalg.norm(np.asarray(total, "f8")) <= MOST, how


@pytest.mark.parametrize("d", [3, 200])
def test_rule_15_the_bounds_hold_for_what_pairs_are_off_by(d):
    """Squares from pairs in float32 against float64, next to the bound on them."""
    for how in HOW.values():
        left, right = outer(4, d, 64, **how)
        if max(np.abs(left).max(), np.abs(right).max()) > 1e9:
            continue
        found = OuterProducts(tf.constant(left), tf.constant(right))._gram()
        exact = np.einsum("btd,btp->bdp", left.astype("f8"), right.astype("f8"))
        exact = (exact**2).sum((1, 2))
        value, most = np.asarray(found.value), np.asarray(found.most)
        assert np.all(np.abs(value - exact) <= (most - value) * 1.0001), how


# -- utility: shapes of the benchmarks and of larger models ---------------------------------------


def random_products(length, d, p):
    random = np.random.default_rng(0)
    shape = (2,) if length is None else (2, length)
    return (random.normal(size=(*shape, k)).astype("float32") for k in (d, p))


ORDINARY = {
    "mlp": (None, 784, 512),
    "lstm": (60, 128, 512),
    "transformer": (128, 128, 512),
    "512 x 512 x 128": (128, 512, 512),
    "BERT": (128, 768, 768),
    "BERT, inner": (128, 768, 3072),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("kind", ["normal", "positive"])
def test_rule_15_ordinary_gradients_are_clipped_to_c_without_float64(name, kind, monkeypatch):
    """Random upstream gradients, whose sum over the positions is small next to their sizes."""
    monkeypatch.delattr(forms.PerExample, "in_float64")
    length, d, p = ORDINARY[name]
    left, right = random_products(length, d, p)
    left = np.maximum(left, 0) if kind == "positive" else left
    form = OuterProducts(tf.constant(left), tf.constant(right))
    for i in (0, 1):
        (total,), _ = clipped_sums([form], [None], flat(1.0), np.arange(2) == i)
        assert 1 - 1e-3 <= np.linalg.norm(np.asarray(total, "f8")) <= MOST


@pytest.mark.parametrize("length", [60, 128, 400])
def test_rule_15_ordinary_lookups_are_clipped_to_c_without_float64(length, monkeypatch):
    monkeypatch.delattr(forms.PerExample, "in_float64")
    random = np.random.default_rng(0)
    ids = random.zipf(1.3, (2, length)) % 5000
    right = random.normal(size=(2, length, 128)).astype("float32")
    form = Rows(tf.constant(ids, tf.int32), tf.constant(right), 5000)
    for i in (0, 1):
        (total,), _ = clipped_sums([form], [None], flat(1.0), np.arange(2) == i)
        assert 1 - 1e-3 <= np.linalg.norm(np.asarray(total, "f8")) <= MOST


@pytest.mark.parametrize("shape", [(1_000_003,), (2, 1031), (31,), (20000, 128), (1,)])
@pytest.mark.fast
def test_rule_15_long_sums_of_squares_are_as_exact_as_they_say(shape):
    values = np.random.default_rng(0).uniform(1, 2, (2, *shape)).astype("float32")
    found, off = arithmetic.sum_of_squares(tf.constant(values))
    exact = (values.astype("f8") ** 2).reshape(2, -1).sum(1)
    assert off < 4e-5
    np.testing.assert_allclose(found, exact, rtol=off)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.fast
def test_rule_15_squared_lengths_are_as_exact_as_they_say(dtype, compiled):
    """Also where squares leave the range of their type, and of no numbers at all."""
    lengths = tf.function(backend.squared_lengths, jit_compile=compiled, autograph=False)
    numbers = np.random.default_rng(0).normal(size=(12, 300, 37)).astype(dtype)
    numbers[0] = numbers[0, :1, :1]
    scales = np.array([1, 1, 1e-30, 1e-22, 1e-20, 1e-19, 1e-18, 1e15, 1e18, 1e19, 1e25, 1e30])
    x = numbers * scales[:, None, None].astype(dtype)
    exact = (x.astype(np.longdouble) ** 2).sum(-1)
    found, of = lengths(x).numpy(), tf.constant(x)
    most = np.longdouble(np.finfo(dtype).max)
    fits = exact < most
    assert np.all(np.isinf(found[exact > 1.001 * most]))
    lost = 37 * backend.least_square(of)
    off = (37 + 6) * backend.roundoff(of) * exact[fits] + lost
    assert np.all(np.abs(found[fits] - exact[fits]) <= off)
    odd = np.array([[np.nan, 1], [np.inf, 1], [-np.inf, np.inf], [0, 0], [-3, 4]], dtype)
    np.testing.assert_array_equal(lengths(odd), [np.nan, np.inf, np.inf, 0, 25])
    np.testing.assert_array_equal(lengths(-odd[:, 1:]), [1, 1, np.inf, 0, 16])
    assert lengths(x[:0, 0]).shape == (0,)
    np.testing.assert_array_equal(lengths(x[0, :2, :0]), [0, 0])


# -- whole models ---------------------------------------------------------------------------------


def difference_model(width=64, units=64):
    """What two inputs make of one shared layer, one less the other."""
    keras.utils.set_random_seed(0)
    shared = layers.Dense(units, use_bias=False)
    one, two = keras.Input((width,)), keras.Input((width,))
    return keras.Model([one, two], layers.Subtract(dtype="float32")([shared(one), shared(two)]))


def difference_data(scale=500.0, width=64, units=64, rows=3):
    random = np.random.default_rng(0)
    one = scale * random.normal(size=(rows, width))
    two = one + 0.04 * random.normal(size=(rows, width))
    return [one.astype("float32"), two.astype("float32")], np.full((rows, units), 100.0, "float32")


def alone(model, x, y, **compiled):
    """What each example adds by itself, in one `train_on_batch` without noise."""
    settings = {k: compiled.pop(k) for k in ("gradients", "clipping", "microbatch_size")
                if k in compiled}  # fmt: skip
    model.compile(noiseless_optimizer(1.0, **settings), loss="mse", **compiled)
    start, lengths = model.get_weights(), []
    for i in range(len(y)):
        model.set_weights(start)
        rows = keras.tree.map_structure(lambda t, i=i: t[i : i + 1], x)
        update = update_on_batch(model, rows, y[i : i + 1])
        lengths.append(np.sqrt(sum((u**2).sum() for u in update)))
    return np.array(lengths)


WAYS = {
    "ghost": {},
    "eager": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
    "vectorized": {"gradients": "vectorized"},
    "loop": {"gradients": "loop"},
    "per layer": {"clipping": "per_layer"},
    "automatic": {"clipping": "automatic"},
    "microbatches": {"microbatch_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_in(2)
def test_rule_15_two_uses_of_a_layer_that_nearly_cancel(way):
    lengths = alone(difference_model(), *difference_data(), **WAYS[way])
    assert lengths.max() <= MOST
    assert lengths.min() >= (0.99 if way == "automatic" else 1 - 1e-3)  # C / (norm + 0.01)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
@pytest.mark.one_in(2)
def test_rule_15_two_uses_that_nearly_cancel_in_other_types(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = difference_model()
    finally:
        keras.config.set_dtype_policy("float32")
    lengths = alone(model, *difference_data(scale=50.0))
    assert lengths.max() <= MOST


def test_rule_15_two_uses_that_cancel_to_the_last_bits():
    assert alone(difference_model(), *difference_data(scale=1e6)).max() <= MOST


def test_rule_15_raw_counts_before_a_normalization():
    random = np.random.default_rng(0)
    x = np.round(30000 + 10 * random.normal(size=(6, 16, 64))).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((16, 64)),
            layers.Dense(64),
            layers.GroupNormalization(groups=-1),
            layers.Activation("tanh"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )
    lengths = alone(model, x, 100 * np.ones((6, 1)))
    assert lengths.max() <= MOST
    assert lengths.min() >= 1 - 1e-3


def test_rule_15_two_time_steps_that_nearly_cancel():
    x = keras.Input((2, 256))
    h = layers.Dense(256, use_bias=False)(x)
    model = keras.Model(x, layers.Subtract()([h[:, 0], h[:, 1]]))
    random = np.random.default_rng(0)
    data = np.repeat(1e4 * random.normal(size=(3, 1, 256)), 2, axis=1)
    data[:, 1] += 0.04 * random.normal(size=(3, 256))
    lengths = alone(model, data.astype("float32"), np.full((3, 256), 100.0))
    assert lengths.max() <= MOST
    assert lengths.min() >= 0.9  # as far as float64 can tell


@pytest.mark.parametrize("gradients", ["ghost", "vectorized", "loop"])
@pytest.mark.one_in(3)
def test_rule_15_inputs_whose_squares_are_too_small(gradients):
    model = keras.Sequential([keras.Input((784,)), layers.Dense(1, use_bias=False)])
    x, y = np.full((1, 784), 9e-20, "float32"), np.full((1, 1), 8e18, "float32")
    lengths = alone(model, x, y, gradients=gradients)
    assert 1 - 1e-3 <= lengths[0] <= MOST


# -- the tests' own test -----------------------------------------------------------------------


def no_bound_on_rounding(monkeypatch):
    columns = Squares.columns
    monkeypatch.setattr(Squares, "columns", staticmethod(lambda *args: [columns(*args)[0]] * 2))


def numbers_that_hardly_round(monkeypatch):
    monkeypatch.setattr(backend, "roundoff", lambda tensor: 1e-12)
    monkeypatch.setattr(backend, "products_off", lambda tensor: 1e-12)


@pytest.mark.parametrize(
    ("mutant", "form"),
    [
        (no_bound_on_rounding, "pairs"),
        (no_bound_on_rounding, "views"),
        (no_bound_on_rounding, "filters by pairs"),
        (numbers_that_hardly_round, "pairs"),
    ],
)
def test_rule_15_a_clip_without_its_bound_is_found_out(mutant, form, monkeypatch):
    mutant(monkeypatch)
    traced.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_rule_15_what_is_added_is_at_most_c(form)
    finally:
        traced.cache_clear()


# -- what multiplies less exactly ------------------------------------------------------------------


def coarsely(a, b):
    """A product as a GPU does it in TF32: of factors rounded to 11 bits."""

    def rounded(t):
        bits = t.view("int32")
        return ((bits + 0x1000) & ~0x1FFF).astype("int32").view("float32").astype("f8")

    return tf.constant(rounded(a.numpy()) @ rounded(b.numpy()), tf.float32)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_rule_15_products_in_tf32_are_as_exact_as_they_say(scale, monkeypatch):
    monkeypatch.setattr(rounding, "multiplies_coarsely", lambda: True)
    random = np.random.default_rng(0)
    a, b = (tf.constant(scale * random.normal(size=(40, 40)), tf.float32) for _ in range(2))
    exact = a.numpy().astype("f8") @ b.numpy().astype("f8")
    sizes = np.abs(a.numpy().astype("f8")) @ np.abs(b.numpy().astype("f8"))
    off = backend.products_off(a) + 44 * backend.roundoff(a)
    assert np.all(np.abs(backend.exactly(coarsely, a, b).numpy() - exact) <= off * sizes)
    assert not np.all(np.abs(coarsely(a, b).numpy() - exact) <= off * sizes)


def test_rule_15_holds_with_products_in_tf32(monkeypatch):
    monkeypatch.setattr(rounding, "multiplies_coarsely", lambda: True)
    traced.cache_clear()
    for name in ("pairs", "rows", "filters by pairs"):
        test_rule_15_what_is_added_is_at_most_c(name)
    traced.cache_clear()


ONE_NUMBER = {
    "written out": lambda g: Instantiated(g),
    "one position": lambda g: OuterProducts(g, tf.ones_like(g)),
    "filters": lambda g: Filters(g[:, None], tf.ones((1, 1, 1)), (1, 1, 1), (1,), "valid", (1,), 1),
}


@pytest.mark.parametrize("form", ONE_NUMBER)
def test_rule_15_there_is_room_for_the_product_with_a_clip_weight_in_tf32(form, monkeypatch):
    monkeypatch.setattr(rounding, "multiplies_coarsely", lambda: True)
    found = ONE_NUMBER[form](tf.constant([[3.0]])).squares()
    np.testing.assert_allclose(found.value, 9.0)
    assert found.at_most >= (3 * (1 + 2.0**-19)) ** 2


def test_rule_15_tf32_matters_only_where_there_is_a_gpu():
    assert rounding.multiplies_coarsely() == bool(tf.config.list_physical_devices("GPU"))


@pytest.mark.parametrize("variable", ["TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"])
def test_rule_15_arithmetic_that_is_coarse_unseen_is_refused(variable, monkeypatch):
    backend.require_exact_arithmetic()
    monkeypatch.setenv(variable, "BF16")
    with pytest.raises(keras_dp.PrivacyError, match=f"{variable}=BF16"):
        backend.require_exact_arithmetic()


def test_rule_15_graphs_rewritten_to_half_precision_are_refused():
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})
    try:
        with pytest.raises(keras_dp.PrivacyError, match="auto_mixed_precision"):
            alone(difference_model(2, 1), *difference_data(1.0, 2, 1))
    finally:
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision": False})


# -- the clip itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
@pytest.mark.fast
def test_rule_15_a_clip_weight_holds_for_norms_of_every_size(clipping):
    optimizer = noiseless_optimizer(1.0, clipping=clipping)
    strategy = optimizer.clipping_strategy
    sizes = np.array([0.0, 1e-38, 1e-30, 1e-19, 1e-9, 1.0, 1e9, 1e19, 1e30, 1e36])
    norms = np.array(list(itertools.product(sizes, sizes)), "float32")
    if clipping == "per_layer":
        strategy._layers = np.eye(2, dtype="float32")
    if clipping == "adaptive":
        strategy.restore(1.0)
    weights = np.asarray(keras_dp.clipping.Clip(strategy, 1.0)(ops.convert_to_tensor(norms)), "f8")
    weights = weights if weights.ndim > 1 else weights[:, None]
    kept = np.linalg.norm(weights * norms.astype("f8"), axis=1)
    assert np.all(np.isfinite(weights)) and kept.max() <= MOST
    if clipping in ("flat", "adaptive"):
        exact = np.minimum(np.linalg.norm(norms.astype("f8"), axis=1), 1)
        np.testing.assert_allclose(kept, exact, rtol=1e-3)
