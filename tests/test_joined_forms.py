"""Small forms of a kind are joined into one: their norms, bounds and sums are those of each."""

import numpy as np
import pytest
import tensorflow as tf

from keras_dp import backend
from keras_dp.clipping import Clip, FlatClipping
from keras_dp.gradients.forms import Instantiated, OuterProducts, Rows, Scaled, alike, clipped_sums
from keras_dp.gradients.rules.convolution import Filters

RANDOM = np.random.default_rng(0)
B, COUNT = 4, 3


def tensor(*shape):
    return tf.constant(RANDOM.normal(size=shape).astype("float32"))


def heads():
    """Of a weight (4, 2, 5) from its axes in another order."""
    return OuterProducts(tensor(B, 9, 4), tensor(B, 9, 10), shape=(4, 2, 5), order=(1, 0, 2))


JOINED = {
    "written out": lambda: Instantiated(tensor(B, 3, 2)),
    "one position": lambda: OuterProducts(tensor(B, 5), tensor(B, 6)),
    "products": lambda: OuterProducts(tensor(B, 9, 3), tensor(B, 9, 4)),
    "pairs": lambda: OuterProducts(tensor(B, 2, 30), tensor(B, 2, 20)),
    "axes in another order": heads,
    "scaled": lambda: Scaled(Instantiated(tensor(B, 7)), tf.constant([1.0, 2.0, 0.5, 4.0])),
}


def both(build):
    forms = [build() for _ in range(COUNT)]
    weights = [tf.abs(tensor(B)) for _ in forms]
    once = alike.OnceForEachKind(forms)
    squares = once.squares(forms)
    return forms, weights, once, squares, once.weighted_sums(forms, weights)


@pytest.mark.parametrize("name", JOINED)
def test_rule_15_joined_forms_give_what_each_gives(name):
    forms, weights, once, squares, sums = both(JOINED[name])
    assert once._joined
    for form, weight, square, total in zip(forms, weights, squares, sums, strict=True):
        alone = form.squares()
        np.testing.assert_allclose(square.value, alone.value, rtol=1e-6)
        np.testing.assert_allclose(square.most, alone.most, rtol=1e-6)
        assert np.all(np.asarray(square.at_most) >= np.asarray(square.value))
        wanted = form.weighted_sum(weight)
        assert total.shape == wanted.shape
        np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_large_or_has_no_sums_of_parts_is_left_apart():
    large = [Instantiated(tensor(B, alike._FEW_NUMBERS + 1)) for _ in range(2)]
    tables = [Rows(tf.zeros((B, 2), "int32"), tensor(B, 2, 3), 5) for _ in range(2)]
    blocks = [OuterProducts(tensor(B, 2, 3, 4), tensor(B, 2, 3, 5)) for _ in range(2)]
    other = [Instantiated(tensor(B, 2)), Instantiated(tensor(B, 3))]
    for forms in (large, tables, blocks, other):
        assert not alike.OnceForEachKind(forms)._joined


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_rule_05_one_that_is_not_finite_spoils_no_other_form_or_example(bad, traced):
    gradients = [RANDOM.normal(size=(B, 3)).astype("float32") for _ in range(COUNT)]
    gradients[1][2] = bad

    def run(*arrays):
        def clip(norms):
            return 1 / tf.maximum(tf.norm(norms, axis=1), 1.0)

        safe = lambda norms: tf.where(  # noqa: E731
            tf.math.is_finite(clip(norms)), clip(norms), tf.zeros_like(clip(norms))
        )
        found = [Instantiated(a) for a in arrays]
        sums, _ = clipped_sums(found, [a[0] for a in arrays], safe, tf.ones(B, "bool"))
        return sums

    function = tf.function(run, autograph=False) if traced else run
    sums = function(*(tf.constant(g) for g in gradients))
    kept = [0, 1, 3]
    norms = np.linalg.norm(np.concatenate(gradients, axis=1)[kept], axis=1)
    for total, gradient in zip(sums, gradients, strict=True):
        assert np.all(np.isfinite(total))
        wanted = (gradient[kept] / np.maximum(norms, 1)[:, None]).sum(0)
        if np.isfinite(bad):  # then it counts as one of norm 1
            assert np.linalg.norm(total - wanted) <= 1 + 1e-4
        else:
            np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_rule_05_filters_of_scaled_losses_are_emptied_by_example():
    """As in float16. The kernel's first axis was taken for the examples."""
    x = RANDOM.normal(size=(B, 6, 6, 2)).astype("float32")
    x[1] = np.nan
    g = tensor(B, 3, 3, 3)
    settings = (4, 4, 2, 3), (1, 1), "valid", (1, 1), 1
    form = Scaled(Filters(tf.constant(x), g, *settings), tf.ones(B))
    alone = [Filters(tf.constant(x[k : k + 1]), g[k : k + 1], *settings) for k in (0, 2, 3)]
    wanted = sum(f.instantiate()[0] / tf.norm(f.instantiate()) for f in alone)
    ((total,), _) = clipped_sums([form], [wanted], Clip(FlatClipping(), 1e-3), tf.ones(B, "bool"))
    np.testing.assert_allclose(total, 1e-3 * wanted, rtol=1e-4, atol=1e-8)


# -- traced once for all sizes ---------------------------------------------------------------


def test_what_is_traced_for_any_size_is_traced_once_in_a_graph():
    traced = []

    def times(tensors, factor):
        traced.append(tuple(tensors[0].shape))
        return [factor * tensors[0]]

    @tf.function
    def step(a, b, c):
        found = [backend.for_any_size(times, (2,), [t])[0] for t in (a, b)]
        other = backend.for_any_size(times, (3,), [a])[0]
        return *found, other, backend.for_any_size(times, (2,), [c])[0]

    a, b, c = tensor(3, 4), tensor(2, 5), tf.ones((2, 2), "float64")
    found = step(a, b, c)
    for one, wanted in zip(found, (2 * a, 2 * b, 3 * a, 2 * c), strict=True):
        np.testing.assert_array_equal(one, wanted)
    # One for both sizes; another factor and another type have their own.
    assert traced == [(None, None)] * 3
    assert backend.for_any_size(times, (2,), [a])[0].shape == a.shape


@pytest.mark.parametrize(
    ("x", "g", "shape", "settings"),
    [
        ((2, 2, 96), (2, 2, 96), (3, 3, 48, 96), ((1, 1), "same", (1, 1), 2)),
        ((2, 3, 90), (2, 2, 120), (3, 2, 30, 120), ((1, 2), "same", (1, 1), 3)),
        ((5, 5, 60), (5, 5, 60), (3, 3, 60, 60), ((1, 1), "same", (2, 2), 1)),
        ((4, 60), (4, 60), (3, 60, 60), ((1,), "same", (2,), 1)),
        ((2, 2, 2, 80), (2, 2, 2, 80), (2, 3, 2, 40, 80), ((1, 1, 1), "same", (1, 1, 1), 2)),
    ],
    ids=["groups", "groups and strides", "dilation", "one dimension", "three dimensions"],
)
def test_sums_and_norms_of_filters_from_patches_are_those_written_out(x, g, shape, settings):
    form = Filters(tensor(B, *x), tensor(B, *g), shape, *settings)
    assert form._gram_is_smaller()
    weights = tf.abs(tensor(B))

    @tf.function
    def found():
        return form.weighted_sum(weights), form.squares().value

    total, squares = found()
    written = form.instantiate().numpy().astype("f8")
    np.testing.assert_allclose(squares, np.sum(written**2, tuple(range(1, written.ndim))), 1e-5)
    wanted = np.tensordot(weights.numpy().astype("f8"), written, 1)
    assert np.linalg.norm(total - wanted) < 1e-5 * np.linalg.norm(wanted)
