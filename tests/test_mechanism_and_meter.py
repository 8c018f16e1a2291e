"""The two objects that a private step is made of, as plain code: no model, no training."""

import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_dp
from keras_dp.clipping import Clipping, FlatClipping, PerLayerClipping
from keras_dp.errors import PrivacyError
from keras_dp.sampling import UNKNOWN, PoissonDataset
from keras_dp.training import Budget, Mechanism, Meter, Phase
from keras_dp.training.mechanism import Clipped, StepValues

pytestmark = pytest.mark.fast

# -- the mechanism: clip, noise, divide -----------------------------------------------------------


class CountedNoise:
    """Adds 1, 2, 3, ... standard deviations to the sums, and notes what it was asked for."""

    description = "counted"

    def __init__(self):
        self.asked = []

    def add_to(self, sums, stddev):
        self.asked.append(float(stddev))
        return [s + (k + 1) * ops.cast(stddev, s.dtype) for k, s in enumerate(sums)]


class Weight:
    """As much of a variable as a strategy looks at."""

    def __init__(self, path):
        self.path, self.shape, self.dtype = path, (2,), "float32"


WEIGHTS = [Weight("first/kernel"), Weight("second/kernel")]
NORMS = np.array([[3.0, 4.0], [0.3, 0.4], [np.inf, 0.0], [0.0, 0.0]], "float32")


def mechanism(strategy):
    made = Mechanism(strategy, CountedNoise())
    made.build(WEIGHTS)
    return made


def found(rows=4):
    sums = [ops.convert_to_tensor(np.array(s, "float32")) for s in ([1.0, 2.0], [3.0, 4.0])]
    real = ops.ones(len(NORMS), "bool")
    return Clipped(WEIGHTS, sums, ops.convert_to_tensor(NORMS), real, rows)


def values(sigma=2.0, c=0.5, batch_size=0.0):
    return StepValues(*(tf.constant(v, "float64") for v in (sigma, c, batch_size)))


@pytest.mark.parametrize("strategy", [FlatClipping(), PerLayerClipping()])
def test_rule_03_noise_of_sigma_times_the_sensitivity_once_on_the_sum(strategy):
    one = mechanism(strategy)
    first, second = one.noised(found(), values(sigma=2.0, c=0.5, batch_size=8.0))
    assert one.noise.asked == [2.0 * 0.5]
    np.testing.assert_allclose(first, (np.array([1.0, 2.0]) + 1.0) / 8)
    np.testing.assert_allclose(second, (np.array([3.0, 4.0]) + 2.0) / 8)


@pytest.mark.parametrize(("declared", "rows", "divisor"), [(8.0, 3, 8), (0.0, 3, 3), (0.0, 0, 1)])
def test_rule_02_the_divisor_is_public(declared, rows, divisor):
    """The declared batch size, whatever was drawn; else the rows that were handed over."""
    assert float(values(batch_size=declared).divisor(rows)) == divisor
    one = mechanism(FlatClipping())
    first, _ = one.noised(found(rows), values(batch_size=declared))
    np.testing.assert_allclose(first, (np.array([1.0, 2.0]) + 1.0) / divisor)


def test_rule_03_flat_clipping_scales_the_whole_gradient_to_c():
    weights = np.asarray(mechanism(FlatClipping()).clip(1.0)(NORMS)).reshape(4, -1)
    np.testing.assert_allclose(weights[:2, 0], [1 / 5, 1.0], rtol=1e-6)
    assert np.all(weights[2] == 0)  # what isn't finite adds nothing
    assert np.all(np.linalg.norm(weights[:2] * NORMS[:2], axis=1) <= 1.0)


def test_rule_03_per_layer_clipping_shares_c_among_the_layers():
    weights = np.asarray(mechanism(PerLayerClipping()).clip(1.0)(NORMS))
    share = 1 / np.sqrt(2)
    np.testing.assert_allclose(weights[0], [share / 3, share / 4], rtol=1e-6)
    np.testing.assert_allclose(weights[1], [1.0, 1.0], rtol=1e-6)


class ByTheBatch(Clipping):
    def __call__(self, norms, max_grad_norm):
        return max_grad_norm / (1 + ops.max(norms)) + 0 * norms


class Longer(Clipping):
    def __call__(self, norms, max_grad_norm):
        return 100 * ops.ones_like(norms)


def test_rule_09_a_strategy_that_couples_examples_is_refused():
    with pytest.raises(PrivacyError, match="weight of one example depend"):
        mechanism(ByTheBatch())


def test_rule_19_whatever_a_strategy_returns_an_example_is_held_to_the_sensitivity():
    weights = np.asarray(mechanism(Longer()).clip(1.0)(NORMS))
    lengths = np.linalg.norm(weights[[0, 1, 3]] * NORMS[[0, 1, 3]], axis=1)
    assert np.all(lengths <= 1.0) and np.all(weights[2] == 0)


class Watching:
    def __init__(self):
        self.saw = []

    def build(self, variables):
        self.saw.append(len(variables))

    def noised(self, strategy, add_noise, sums, sigma, seen):
        self.saw.append(seen)
        return strategy.noised(add_noise, sums, sigma, seen)


def test_a_watcher_sees_each_step_and_there_is_one_at_a_time():
    one, watcher = Mechanism(FlatClipping(), CountedNoise()), Watching()
    assert one.watch(watcher) and not one.watch(watcher)
    with pytest.raises(ValueError, match="one at a time"):
        one.watch(Watching())
    one.build(WEIGHTS)
    plain = one.noised(found(), values())  # no norms by variable: nothing to see
    by_variable = Clipped(WEIGHTS, found().sums, NORMS[:, 0], found().real, 4, NORMS)
    watched = one.noised(by_variable, values())
    np.testing.assert_array_equal(plain[0], watched[0])
    assert watcher.saw[0] == 2 and len(watcher.saw) == 2
    assert one.unwatch() and not one.unwatch()


# -- the meter: steps spent, left, and what each is -----------------------------------------------


def meter(**options):
    return Meter(1.0, 1.0, clipping="flat", seeded=False, **options)


POISSON = PoissonDataset(np.zeros((40, 1)), batch_size=10).sampling


def steps(one, count):
    for _ in range(count):
        one.spend(lambda now: tf.zeros(()), lambda: tf.zeros(()), after=[])


def test_a_phase_of_a_loop_is_over_when_a_fit_begins():
    """The number of its steps outlived it, and schedules in graphs then ran out of values."""
    one = meter()
    one.begin(Phase("loop", POISSON, 10), iteration=0)
    steps(one, 3)
    one.begin(Phase("fit", POISSON, 4), iteration=3)
    assert (one.phase.kind, one.phase.steps) == ("fit", 4)
    steps(one, 4)
    one.end(iteration=7)
    assert (one.phase.kind, one.phase.steps) == ("batches", None)
    assert [(r.sampler, r.steps) for r in one.ledger if r.steps] == [("poisson", 7)]


def test_a_meter_stops_at_its_limit_and_counts_no_further():
    one = meter()
    one.begin(Phase("fit", POISSON, 50), iteration=0)
    allowed = one.limit(Budget(6.0, 1e-5), 50)
    assert 0 < allowed < 50
    steps(one, allowed + 5)
    assert one.releases == allowed == one.ledger.steps and one.limit_reached
    with pytest.raises(keras_dp.PrivacyBudgetExceeded):
        one.require_left()


def test_a_meter_is_held_to_every_budget():
    for order in ((9.0, 6.0), (6.0, 9.0)):
        one = meter()
        one.begin(Phase("fit", POISSON, 50), iteration=0)
        allowed = min(one.limit(Budget(e, 1e-5), 50) for e in order)
        steps(one, 50)
        assert one.releases == allowed


def test_a_target_is_for_the_planned_steps():
    one = Meter(None, 1.0, clipping="flat", seeded=False, target=Budget(3.0, 1e-5))
    one.begin(Phase("fit", POISSON, 12), iteration=0)
    steps(one, 20)
    one.end(iteration=12)
    steps(one, 3)
    assert one.releases == 12


def test_rule_02_a_meter_gives_each_step_its_sigma_c_and_divisor():
    one = Meter(lambda k: 1.0 + k, 0.5, clipping="flat", seeded=False)
    one.begin(Phase("loop", POISSON, 3), iteration=0)
    seen = []
    for _ in range(3):
        one.announce(1)
        one.spend(
            lambda now: seen.append((float(now.noise_multiplier), float(now.divisor(3)))),
            lambda: None,
            after=[],
        )
    assert seen == [(1.0, 10.0), (2.0, 10.0), (3.0, 10.0)]
    made = [(r.noise_multiplier, r.max_grad_norm, r.steps) for r in one.ledger if r.steps]
    assert made == [(1.0, 0.5, 1), (2.0, 0.5, 1), (3.0, 0.5, 1)]


def test_rule_17_one_training_at_a_time_and_the_door_opens_again():
    one = meter()
    with one.occupied("fit"):
        assert one.busy
        with pytest.raises(PrivacyError, match="while another training"), one.occupied("fit"):
            raise AssertionError("two at once")
    assert not one.busy
    with pytest.raises(KeyError), one.occupied("fit"):
        raise KeyError
    assert not one.busy


def test_rule_17_after_a_budget_nothing_is_released_until_it_is_declared_anew():
    one = meter()
    one.begin(Phase("fit", POISSON, 50), iteration=0)
    one.keep(epsilon=6.0, delta=1e-5)
    one.limit(Budget(6.0, 1e-5), 50)
    steps(one, 2)
    one.end(iteration=2)
    steps(one, 3)
    assert one.releases == 2
    one.declare_batches(POISSON, iteration=2)
    one.find_limit()
    steps(one, 1)
    assert one.releases == 3 and one.limited


def test_rule_10_batches_of_unknown_origin_are_runs_of_their_own():
    one = meter()
    steps(one, 1)
    one.declare_batches(POISSON, iteration=1)
    steps(one, 2)
    one.declare_batches(UNKNOWN, iteration=3)
    steps(one, 1)
    made = [(r.sampler, r.steps) for r in one.ledger if r.steps]
    assert sorted(made) == [("poisson", 2), ("unknown", 2)]


def test_rule_10_a_limit_for_other_batches_is_not_kept():
    one = meter()
    one.begin(Phase("loop", POISSON, None), iteration=0)
    one.limit(Budget(6.0, 1e-5), 50)
    with pytest.raises(PrivacyError, match="drawn otherwise"):
        one.declare_batches(UNKNOWN, iteration=0)


def test_what_runs_in_the_place_of_a_step_is_what_was_asked_for():
    one = meter()
    one.begin(Phase("fit", POISSON, 50), iteration=0)
    one.limit(Budget(6.0, 1e-5), 1)
    took = [one.spend(lambda now: 1.0, lambda: 2.0, after=[]) for _ in range(2)]
    assert [(bool(within), float(value)) for within, value in took] == [(True, 1.0), (False, 2.0)]
