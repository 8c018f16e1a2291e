"""Balls-in-bins and truncated Poisson batches, schedules and long ledgers: what they cost."""

import functools
import itertools
import math
import time

import numpy as np
import pytest

from keras_dp import accounting
from keras_dp.accounting import accountants, balls_in_bins, library, mechanisms, samplers
from keras_dp.accounting.losses import Composer, Losses
from keras_dp.accounting.mechanisms import SampledGaussian
from keras_dp.ledger import SAMPLERS, LedgerBook, PrivacyLedger, Release

DELTA = 1e-5


def bins(sigma, steps, per_epoch, **more):
    return Release("balls_in_bins", sigma, steps, steps_per_epoch=per_epoch, **more)


def poisson(sigma, steps, rate):
    return Release("poisson", sigma, steps, sampling_rate=rate)


def truncated(sigma, steps, per_epoch, n, capacity):
    return Release(
        "truncated_poisson", sigma, steps, sampling_rate=1 / per_epoch, num_examples=n,
        capacity=capacity,
    )  # fmt: skip


def epsilon(*releases, delta=DELTA, accountant="pld"):
    return accounting.ledger_epsilon(releases, delta, accountant)


# --- balls in bins ----------------------------------------------------------

# n, batch, sigma, epochs, delta, epsilon. Computed by convolution on a linear grid, without
# rounding upwards, independently of the code here (arXiv 2412.16802 has the mathematics).
FIGURES = [
    (60_000, 256, 1.1, 60, 1e-5, 2.335),
    (60_000, 4096, 3.0, 60, 1e-5, 2.838),
    (50_000, 4096, 3.0, 100, 1e-5, 4.121),
    (1_347, 512, 5.0, 60, 1e-5, 3.879),
    (1_347, 256, 5.0, 60, 1e-5, 2.619),
    (15, 1, 1.5, 5, 1e-3, 1.142),
]


@pytest.mark.parametrize(("n", "batch", "sigma", "epochs", "delta", "wanted"), FIGURES)
def test_figures_of_balls_in_bins(n, batch, sigma, epochs, delta, wanted):
    t = accounting.steps_per_epoch(n, batch)
    accountants._COMPOSER.forget()
    start = time.process_time()
    found = epsilon(bins(sigma, epochs * t, t), delta=delta)
    assert time.process_time() - start < 2
    assert found == pytest.approx(wanted, abs=1e-3)
    assert found < epsilon(poisson(sigma, epochs * t, 1 / t), delta=delta)


def test_both_directions_of_adjacency_are_bounded():
    removing, adding = balls_in_bins.epoch_losses(1.1, 235, 235, 2e-4)
    composer = Composer(lambda way, _: (way.losses, way.losses))

    class Way:
        family = 0

        def __init__(self, losses):
            self.losses = losses

    found = [composer.epsilon(((Way(one), 60),), DELTA, 2e-4, 8.0) for one in (removing, adding)]
    assert found == pytest.approx([2.3349, 2.2944], abs=2e-4)


def test_one_batch_an_epoch_is_the_composed_gaussian():
    for sigma, epochs in ((1.1, 1), (2.0, 4), (9.0, 60)):
        gaussian = library.gaussian_epsilon(sigma / math.sqrt(epochs), DELTA)
        assert epsilon(bins(sigma, epochs, 1)) == pytest.approx(gaussian, abs=1e-6)


@pytest.mark.parametrize("sigma", [2.0, 5.0])
def test_the_machinery_gives_the_gaussian_too(sigma):
    """An epoch of one batch, computed as all others are; its grid is not made for it."""
    gaussian = library.gaussian_epsilon(sigma, 1e-3)
    for one in balls_in_bins.epoch_losses(sigma, 1, 1, 1e-4):
        assert one.delta(gaussian) >= 1e-3 * (1 - 1e-9)
        assert one.delta(gaussian * 1.01) <= 1e-3


def monte_carlo(sigma, t, steps, delta_at, draws, rng):
    """delta of removing and of adding at epsilons, and standard errors, from drawn losses."""
    found = []
    for way in (1, -1):
        total = np.zeros(draws)
        left = steps
        while left > 0:
            s = min(left, t)
            z = rng.standard_normal((draws, s))
            if way == 1:  # the example takes part in one of t steps, if that one was made
                where = rng.integers(t, size=draws)
                there = np.flatnonzero(where < s)
                z[there, where[there]] += 1 / sigma
            total += way * np.log((np.exp(z / sigma - 0.5 / sigma**2).sum(1) + (t - s)) / t)
            left -= s
        above = [np.maximum(-np.expm1(e - total), 0) for e in delta_at]
        found.append([(a.mean(), a.std() / math.sqrt(draws)) for a in above])
    return [max(pair) for pair in zip(*found, strict=True)]


PLANS = [
    (sigma, t, steps, delta)
    for (sigma, delta), (t, steps) in itertools.product(
        [(0.8, 3e-2), (1.2, 1e-2), (2.0, 1e-2), (4.0, 1e-2)],
        [(2, 6), (3, 4), (5, 5), (8, 21), (16, 40)],
    )
]


@pytest.mark.parametrize(("sigma", "t", "steps", "delta"), PLANS)
def test_monte_carlo_agrees_to_one_percent(sigma, t, steps, delta):
    """Twenty plans, partial epochs among them. False alarms: 40 one-sided tests at 5 standard
    errors, 1 in 87,000 in all; one per cent of epsilon must show beyond the error."""
    found = epsilon(bins(sigma, steps, t), delta=delta)
    rng = np.random.default_rng([int(10 * sigma), t, steps])
    at, below = monte_carlo(sigma, t, steps, (found, 0.99 * found - 1e-3), 100_000, rng)
    assert at[0] - 5 * at[1] < delta  # never below the true value
    assert below[0] + 5 * below[1] > delta  # nor above it by more than one per cent


def test_every_step_of_an_epoch_counts():
    t = 12
    found = [epsilon(bins(1.0, steps, t)) for steps in range(0, 3 * t + 1)]
    assert found[0] == 0
    assert all(a < b for a, b in itertools.pairwise(found))
    # A cut epoch is a segment of its own: two halves are not a whole.
    assert epsilon(bins(1.0, 6, t), bins(1.0, 6, t)) > epsilon(bins(1.0, 12, t))


def test_a_partial_epoch_lies_between_whole_ones_for_each_delta():
    for delta in (1e-3, 1e-7):
        one, cut, two = (epsilon(bins(2.0, s, 10), delta=delta) for s in (10, 15, 20))
        assert one < cut < two


def test_balls_in_bins_is_monotone():
    base = epsilon(bins(1.5, 50, 10))
    assert epsilon(bins(1.4, 50, 10)) > base > epsilon(bins(1.6, 50, 10))
    assert epsilon(bins(1.5, 50, 10), delta=1e-6) > base > epsilon(bins(1.5, 50, 10), delta=1e-4)
    # More batches to choose from hide an example better.
    assert epsilon(bins(1.5, 60, 12)) < base < epsilon(bins(1.5, 40, 8))


def test_extremes_of_balls_in_bins_are_bounds():
    for sigma in (1e-12, 0.05, 0.4, 30.0, 1e9):
        for t in (2, 50):
            found = epsilon(bins(sigma, 2 * t, t))
            in_full = epsilon(Release("unknown", sigma, 2))
            assert 0 <= found <= in_full * (1 + 1e-9) or in_full == math.inf
    assert epsilon(bins(0.0, 1, 5)) == math.inf
    assert epsilon(bins(1.0, 400_000, 400_000)) < 0.1


def test_rounding_keeps_the_mean_and_gives_nothing_away():
    for t, s in ((235, 100), (235, 235), (20, 13), (3, 3)):
        values, masses, infinite = balls_in_bins._sums(1.1, t, s)
        assert (values * masses).sum() / t == pytest.approx(1, abs=1e-10)
        assert masses.sum() == pytest.approx(1, abs=1e-12)
        assert all(0 < one < 1e-12 for one in infinite)
        exact = t**-2 * s * math.expm1(1 / 1.1**2)
        variance = ((values / t - 1) ** 2 * masses).sum()
        assert exact * (1 - 1e-9) <= variance < 1.002 * exact


def test_balls_in_bins_goes_with_other_samplers():
    one, other = bins(1.1, 20 * 235, 235), poisson(1.1, 20 * 235, 1 / 235)
    both = epsilon(one, other)
    assert max(epsilon(one), epsilon(other)) < both < epsilon(one) + epsilon(other)
    # Balls in bins cost a little less than Poisson batches; so does the mixture.
    twice = epsilon(poisson(1.1, 40 * 235, 1 / 235))
    assert 0.97 * twice < both < twice
    with_all = epsilon(
        one, other, Release("unknown", 30.0, 4), truncated(1.1, 10, 235, 60_000, 320)
    )
    assert with_all > both


def test_searches_over_balls_in_bins_are_exact_to_the_step():
    step = bins(1.5, 0, 10)
    allowed = accounting.remaining_steps((), step, epsilon=2.0, delta=DELTA)
    assert allowed % 10  # stops within an epoch
    assert epsilon(step.with_steps(allowed)) <= 2.0 < epsilon(step.with_steps(allowed + 1))
    sigma = accounting.calibrate_release((), step, steps=100, epsilon=2.0, delta=DELTA)
    assert 0.999 * 2.0 <= epsilon(bins(sigma, 100, 10)) <= 2.0


@pytest.mark.parametrize("release", [bins(1.0, 10, 5), truncated(1.0, 10, 10, 1000, 120)])
def test_rdp_without_a_proved_bound_is_refused_with_the_alternative(release):
    with pytest.raises(ValueError, match=r"`accountant`='rdp' has no proved bound.*'pld'"):
        epsilon(release, accountant="rdp")
    assert accounting.accountants_for([release]) == ("pld",)


def test_rule_10_every_start_of_balls_in_bins_is_a_new_epoch():
    count = [0]
    book = LedgerBook(lambda: count[0])
    for steps in (7, 5):
        book.open(bins(1.0, 0, 10))
        count[0] += steps
    assert [r.steps for r in book.ledger] == [7, 5]
    assert epsilon(*book.ledger) > epsilon(bins(1.0, 12, 10))


# --- truncated Poisson ------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "wanted"), [(512, 2.378), (384, 2.378), (320, 2.401), (288, 4.587), (256, 12.41)]
)
def test_figures_of_truncated_poisson(capacity, wanted):
    """dp_accounting 0.6.0, `TruncatedSubsampledGaussianDpEvent`: n = 60,000, batch 256."""
    found = epsilon(truncated(1.1, 60 * 235, 235, 60_000, capacity))
    assert found == pytest.approx(wanted, abs=1e-3 if wanted < 10 else 5e-3)


def test_a_capacity_never_makes_it_cheaper():
    plain = epsilon(poisson(1.0, 100, 0.1))
    found = [epsilon(truncated(1.0, 100, 10, 1000, c)) for c in (1000, 140, 120)]
    assert found[0] == plain
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))


# --- tables -----------------------------------------------------------------


def test_every_word_of_the_ledger_has_its_sampler():
    assert set(samplers.SAMPLERS) == set(SAMPLERS)
    made = [
        poisson(1.0, 3, 0.1), truncated(1.0, 3, 10, 100, 20), bins(1.0, 3, 2),
        Release("shuffled", 1.0, 3, steps_per_epoch=2), Release("unknown", 1.0, 3),
        Release("unprotected", 1.0, 3),
    ]  # fmt: skip
    assert {release.sampler for release in made} == set(SAMPLERS)
    for release in made:
        sampler = accounting.sampler_of(release)
        assert sampler.description and sampler.computed and "pld" in sampler.accountants
        assert bool(sampler.assumption) == (release.sampler != "unprotected")
        assert PrivacyLedger.from_json(PrivacyLedger((release,)).to_json()).releases == (release,)


def test_balls_in_bins_says_how_it_was_computed():
    said = accounting.sampler_of(bins(1.0, 3, 2)).computed
    assert "keras_dp itself" in said and "rounding upwards" in said and "2412.16802" in said


@pytest.mark.parametrize(
    ("sampler", "argument"),
    [
        ("balls_in_bins", "steps_per_epoch"),
        ("shuffled", "steps_per_epoch"),
        ("truncated_poisson", "num_examples"),
        ("truncated_poisson", "capacity"),
        ("truncated_poisson", "sampling_rate"),
    ],
)
@pytest.mark.parametrize("value", [None, 0, -1, True, "3"])
def test_a_release_names_what_its_sampler_needs(sampler, argument, value):
    good = {"sampling_rate": 0.1, "steps_per_epoch": 10, "num_examples": 100, "capacity": 20}
    Release(sampler, 1.0, 5, **good)
    if argument == "sampling_rate" and value is True:
        return
    with pytest.raises(ValueError, match=f"`{argument}` of a"):
        Release(sampler, 1.0, 5, **(good | {argument: value}))


# --- composition ------------------------------------------------------------


def test_composition_of_two_atoms_is_the_binomial():
    """Losses of a and -a, and the sum's hockey stick by hand."""
    for p, times, delta in ((0.6, 5, 1e-2), (0.52, 400, 1e-3), (0.52, 400, 1e-9)):
        step = round(math.log(p / (1 - p)) * 1e4)
        one = Losses(1e-4, -step, np.r_[1 - p, np.zeros(2 * step - 1), p], 0.0)

        class Source:
            family = 0

        source = Source()
        composer = Composer(lambda *_, one=one: (one, one))
        spread = math.sqrt(times) * step * 1e-4
        found = composer.epsilon(
            ((source, times),), delta, 1e-4, math.sqrt(-2 * math.log(delta)) / spread
        )
        k = np.arange(times + 1)
        log = np.array([math.lgamma(times + 1) - math.lgamma(j + 1) - math.lgamma(times - j + 1)
                        for j in k])  # fmt: skip
        mass = np.exp(log + k * math.log(p) + (times - k) * math.log1p(-p))
        loss = (2 * k - times) * step * 1e-4

        def exact(e, mass=mass, loss=loss):
            return (np.maximum(-np.expm1(e - loss), 0) * mass).sum()

        assert exact(found) <= delta * (1 + 1e-6)
        assert exact(found - 1e-5) >= delta


def test_the_default_is_never_above_rdp():
    for rate, sigma, steps, delta in (
        (1e-4, 2.0, 10**6, 1e-7), (1e-3, 20.0, 10**6, 1e-6), (1e-4, 1.0, 10**5, 1e-20),
        (1e-5, 1.0, 10**6, 1e-9), (1e-6, 3.0, 10**7, 1e-8), (0.01, 1.0, 10**9, 1e-5),
    ):  # fmt: skip
        one = poisson(sigma, steps, rate)
        assert epsilon(one, delta=delta) <= epsilon(one, delta=delta, accountant="rdp")
    # 0.296 by dp_accounting's PLD at its default grid, 0.267 by RDP; a finer grid shows 0.231.
    assert epsilon(poisson(2.0, 10**6, 1e-4), delta=1e-7) == pytest.approx(0.2307, abs=1e-3)


def test_epsilon_does_not_jump_where_a_transform_would_end():
    """n = 1e8, batch 1e4: dp_accounting says 0.229 and 0.265 at 1e-9 and 1e-11, and nothing
    useful below; a finer grid shows a little less."""
    deltas = [10.0**-k for k in range(5, 16)]
    found = [epsilon(poisson(1.0, 10**5, 1e-4), delta=delta) for delta in deltas]
    assert found[4] == pytest.approx(0.2182, abs=1e-3) and found[4] < 0.229
    assert found[6] == pytest.approx(0.2522, abs=1e-3) and found[6] < 0.265
    assert all(0 < b - a < 0.1 for a, b in itertools.pairwise(found))


def test_many_sigmas_are_rounded_down_a_little():
    releases = [poisson(1.0 + k / 500, 5, 0.01) for k in range(500)]
    counts = accountants.merged(
        (SampledGaussian(r.noise_multiplier, 0.01), r.steps) for r in releases
    )
    few = accountants._with_few_sigmas(counts)
    assert len(few) <= 128 and sum(n for _, n in few) == 2500
    halves = [poisson(1.0 + k / 10, 250, 0.01) for k in range(11)]
    assert epsilon(*halves) < 1.1 * epsilon(*releases)
    start = time.process_time()
    epsilon(*releases, poisson(1.0, 1, 0.01))
    assert time.process_time() - start < 5


# --- schedules and length ---------------------------------------------------


def cosine(initial, steps, alpha):
    """`keras.optimizers.schedules.CosineDecay`, as a plain function."""
    return lambda k: (
        initial * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * min(k, steps) / steps)) + alpha)
    )


def trained(schedule, steps, per_epoch, budget=None):
    """The queries of a fit: one for its budget, one an epoch."""
    from keras_dp.schedules import rounded_noise

    count = [0]
    book = LedgerBook(lambda: count[0])
    kind = functools.cache(lambda s: poisson(s, 0, 1 / per_epoch))
    book.open(lambda k: kind(rounded_noise(schedule(k))))
    if budget is not None:
        steps = accounting.most_further_steps(
            lambda more: book.ledger.merge(book.runs_after(more)),
            epsilon=budget, delta=DELTA, at_most=steps,
        )  # fmt: skip
    found = []
    while count[0] < steps:
        count[0] = min(count[0] + per_epoch, steps)
        found.append(accounting.ledger_epsilon(book.ledger, DELTA))
    return book.ledger, found


@pytest.mark.parametrize(
    ("schedule", "steps", "per_epoch", "budget"),
    [
        (cosine(7.0, 90, 0.6), 90, 3, 8.0),
        (cosine(7.0, 10_000, 0.6), 10_000, 100, 3.0),
        (cosine(7.0, 10_000, 0.6), 10_000, 100, 0.5),
    ],
)
def test_a_smooth_schedule_costs_little(schedule, steps, per_epoch, budget):
    """Queries used to take 5, 18, 38, 71 s after 5, 10, 15, 20 epochs of the first."""
    accountants.epsilon_of.cache_clear()
    accountants._COMPOSER.forget()
    start = time.process_time()
    ledger, found = trained(schedule, steps, per_epoch, budget)
    assert time.process_time() - start < 3  # 0.3 to 0.9 on a machine that does nothing else
    assert len(ledger) <= 40
    assert all(a < b for a, b in itertools.pairwise(found))
    assert found[-1] <= budget
    by_library = functools.reduce(
        lambda a, b: a.compose(b),
        [_step(r).self_compose(r.steps) for r in ledger],
    ).get_epsilon_for_delta(DELTA)
    assert by_library * (1 - 1e-6) < found[-1] < by_library * 1.005


def _step(release):
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        release.noise_multiplier,
        sampling_prob=release.sampling_rate,
        value_discretization_interval=1e-4,
    )


def test_what_was_composed_is_kept(monkeypatch):
    """A ledger of many sigmas that grows builds nothing but what is new."""
    built = []
    exact = mechanisms.sampled_gaussian_losses
    monkeypatch.setattr(
        mechanisms, "sampled_gaussian_losses", lambda *a: built.append(a) or exact(*a)
    )
    accountants._COMPOSER.forget()
    kinds = [poisson(2.0 + k / 50, 40, 0.02) for k in range(20)]
    epsilon(*kinds)
    first = len(built)
    epsilon(*kinds, poisson(2.0, 1, 0.02))
    assert len(built) == first


def test_length_costs_nothing():
    for steps in (10**3, 10**7):
        start = time.process_time()
        epsilon(poisson(1.0, steps, 1e-3))
        assert time.process_time() - start < 2
    segments = [poisson(1.0, k % 7 + 1, 1e-3) for k in range(1000)]
    start = time.process_time()
    assert epsilon(*segments) == epsilon(poisson(1.0, sum(r.steps for r in segments), 1e-3))
    merged = PrivacyLedger(tuple(segments)).merge(segments)
    assert len(merged) == 1000
    assert time.process_time() - start < 2


def test_two_million_steps_are_found_in_seconds():
    """It took 47 s once."""
    accountants._COMPOSER.forget()
    plan = {"delta": 1e-6, "num_examples": 10**6, "batch_size": 256, "noise_multiplier": 0.6}
    start = time.process_time()
    steps = accounting.calibrate_steps(target_epsilon=8.0, **plan)
    assert time.process_time() - start < 5
    assert 2_264_000 < steps < 2_265_000
    assert accounting.compute_epsilon(steps=steps, **plan) <= 8.0
    assert accounting.compute_epsilon(steps=steps + 1, **plan) > 8.0
