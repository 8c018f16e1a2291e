"""The tests' own test: the package broken on purpose, one small thing at a time.

Every check of `checks.py` must pass on the package as it is, and every mutant
must fail the check that is there to notice it, or be refused by the package
itself. False alarms: as `checks.py` says of each.
"""

import dataclasses

import checks
import keras
import numpy as np
import pytest

from keras_dp import PoissonDataset, PrivacyError, ShuffledDataset, arithmetic, backend
from keras_dp.clipping import Clip, FlatClipping
from keras_dp.gradients import mapped, trial
from keras_dp.gradients.forms import OuterProducts, Squares
from keras_dp.noise import NoiseSource
from keras_dp.training import Meter

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")

CHECKS = {
    name: check
    for name, check in vars(checks).items()
    if callable(check) and getattr(check, "__module__", "") == "checks" and name[0] != "_"
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_package_as_it_is_passes(name):
    CHECKS[name]()


def test_every_engine_passes():
    for engine in ("vectorized", "loop"):
        checks.clipped_sums_are_those_of_the_loop(engine)
        checks.one_example_changes_the_sum_by_at_most_c(engine)


# -- mutants: what to put in the place of what ----------------------------------------------------


def weaker_noise():
    draw = NoiseSource.draw
    return NoiseSource, "draw", lambda self, shapes, s: draw(self, shapes, 0.7 * s)


def noise_of_half_the_sensitivity():
    noised = FlatClipping.noised
    return (
        FlatClipping,
        "noised",
        lambda self, add, sums, sigma, seen: noised(self, add, sums, sigma / 2, seen),
    )


def the_same_noise_in_every_step():
    def draw(self, shapes, stddev):
        return [
            keras.random.normal(shape, dtype=dtype, seed=k) * keras.ops.cast(stddev, dtype)
            for k, (shape, dtype) in enumerate(shapes)
        ]

    return NoiseSource, "draw", draw


def one_noise_for_all_variables_of_a_shape():
    draw = NoiseSource.draw

    def reusing(self, shapes, stddev):
        made = {}
        for shape, dtype in shapes:
            key = (tuple(shape), str(dtype))
            if key not in made:
                (made[key],) = draw(self, [(shape, dtype)], stddev)
        return [made[tuple(shape), str(dtype)] for shape, dtype in shapes]

    return NoiseSource, "draw", reusing


def no_clip():
    return Clip, "__call__", lambda self, norms, *bound: keras.ops.ones_like(norms)


def clip_that_spares_what_is_not_finite():
    def weights(self, norms, *_):
        bound = self.max_grad_norm() if callable(self.max_grad_norm) else self.max_grad_norm
        bound = keras.ops.cast(bound, norms.dtype)
        return bound / keras.ops.maximum(arithmetic.total_norms(norms), bound)

    return Clip, "__call__", weights


def clip_of_gradients_of_a_scaled_loss():
    """Clipped while they are 128 times as long, and brought back afterwards."""
    clip = Clip.__call__
    return Clip, "__call__", lambda self, norms, *bound: clip(self, 128 * norms, *bound)


def norm_that_omits_the_first_weight():
    columns = Squares.columns
    return (
        Squares,
        "columns",
        staticmethod(lambda found, like: columns([None, *found[1:]], like)),
    )


def rule_that_omits_its_kernel():
    squares = OuterProducts.squares
    return OuterProducts, "squares", lambda self: squares(self).times(keras.ops.zeros(()))


def division_by_the_drawn_size():
    declare = Meter.declare

    def undeclared(self, sampling, *, iteration):
        declare(self, sampling, iteration=iteration)
        self._divisor.set(0.0)  # which stands for the rows that are handed over

    return Meter, "declare", undeclared


def padding_that_counts():
    whole = mapped.chunked_sum

    def counted(engine, leaves, size, **settings):
        def all_real(chunk):
            return engine([*chunk[:-1], keras.ops.ones_like(chunk[-1])])

        return whole(all_real, leaves, size, **settings)

    return mapped, "chunked_sum", counted


def one_dropout_mask_for_all():
    draw = backend.per_example_seeds

    def seeds(states, rows, views=1):
        return [keras.ops.zeros_like(s) + s[:1] for s in draw(states, rows, views)]

    return backend, "per_example_seeds", seeds


def steps_that_are_not_recorded():
    return backend.Counter, "increment", lambda self: None


def shuffled_batches_taken_for_poisson_draws():
    sampling = ShuffledDataset.sampling.fget

    def claimed(self):
        rate = 1 / self.steps_per_epoch
        return dataclasses.replace(sampling(self), sampler="poisson", sampling_rate=rate)

    return ShuffledDataset, "sampling", property(claimed)


def draws_of_one_size():
    def draw(self):
        return np.random.default_rng().choice(self.num_examples, self.batch_size, replace=False)

    return PoissonDataset, "_draw", draw


def draws_without_replacement():
    """An epoch of blocks of a shuffled order, the sizes of which vary as they should."""
    original = PoissonDataset._draw

    def draw(self):
        if not getattr(self, "_waiting", ()):
            self._waiting = list(np.random.default_rng().permutation(self.num_examples))
        size = len(original(self))
        taken, self._waiting = self._waiting[:size], self._waiting[size:]
        return np.array(taken, int)

    return PoissonDataset, "_draw", draw


def vectorized_neighbours():
    checks.one_example_changes_the_sum_by_at_most_c("vectorized")


MUTANTS = [
    (weaker_noise, checks.noise_is_gaussian_of_sigma_c),
    (noise_of_half_the_sensitivity, checks.noise_is_gaussian_of_sigma_c),
    (noise_of_half_the_sensitivity, checks.noise_has_the_sensitivity_of_the_clip),
    (the_same_noise_in_every_step, checks.steps_draw_unrelated_noise),
    (one_noise_for_all_variables_of_a_shape, checks.variables_of_one_shape_draw_unrelated_noise),
    (no_clip, checks.one_example_changes_the_sum_by_at_most_c),
    (no_clip, checks.noise_has_the_sensitivity_of_the_clip),
    (clip_that_spares_what_is_not_finite, checks.noise_has_the_sensitivity_of_the_clip),
    (clip_of_gradients_of_a_scaled_loss, checks.clipped_sums_are_those_of_the_loop),
    (norm_that_omits_the_first_weight, vectorized_neighbours),
    (rule_that_omits_its_kernel, checks.clipped_sums_are_those_of_the_loop),
    (division_by_the_drawn_size, checks.the_divisor_is_the_expected_batch_size),
    (padding_that_counts, checks.padding_contributes_nothing),
    (one_dropout_mask_for_all, checks.examples_have_dropout_masks_of_their_own),
    (steps_that_are_not_recorded, checks.every_step_is_in_the_ledger),
    (
        shuffled_batches_taken_for_poisson_draws,
        checks.shuffled_batches_cost_one_release_an_epoch,
    ),
    (draws_of_one_size, checks.poisson_batches_vary_in_size_and_repeat_examples),
    (draws_without_replacement, checks.poisson_batches_vary_in_size_and_repeat_examples),
]


@pytest.mark.parametrize(
    ("mutant", "check"), MUTANTS, ids=[f"{m.__name__}-{c.__name__}" for m, c in MUTANTS]
)
def test_a_broken_package_is_found_out(mutant, check, monkeypatch):
    monkeypatch.setattr(*mutant())
    with pytest.raises((AssertionError, PrivacyError)):
        check()


def test_a_wrong_rule_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(trial, "_right", set())  # in this process the rule was right before
    monkeypatch.setattr(*rule_that_omits_its_kernel())
    with pytest.raises(PrivacyError, match="differ from plain ones"):
        checks.clipped_sums_are_those_of_the_loop()


def test_every_check_has_a_mutant():
    assert set(CHECKS.values()) <= {check for _, check in MUTANTS}
