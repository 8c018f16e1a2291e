"""Balls-in-bins and truncated Poisson batches: what they cost, and how ledgers keep them."""

import itertools
import json
import math
import time

import numpy as np
import pytest
import tiny
from dp_accounting import get_epsilon_gaussian

import keras_dp
from keras_dp import accounting, risk
from keras_dp.accounting import samplers
from keras_dp.accounting.accountants import pld
from keras_dp.accounting.samplers import balls_in_bins
from keras_dp.ledger import SAMPLERS, LedgerBook, PrivacyLedger, Release
from keras_dp.sampling import UNKNOWN, Sampling
from keras_dp.training import Budget, Meter, Phase

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
@pytest.mark.one_in(2)
def test_figures_of_balls_in_bins(n, batch, sigma, epochs, delta, wanted):
    t = accounting.steps_per_epoch(n, batch)
    pld.forget()
    start = time.process_time()
    found = epsilon(bins(sigma, epochs * t, t), delta=delta)
    assert time.process_time() - start < 2
    assert wanted - 6e-4 < found < wanted + 1e-3
    if epochs > 5:
        assert found < epsilon(poisson(sigma, epochs * t, 1 / t), delta=delta)


def test_both_directions_of_adjacency_are_bounded():
    removing, adding = balls_in_bins.epoch_losses(1.1, 235, 235, 2e-4)
    found = [
        one.self_compose(60, tail_mass_truncation=1e-15).get_epsilon_for_delta(DELTA)
        for one in (removing, adding)
    ]
    assert found == pytest.approx([2.3349, 2.2944], abs=3e-4)


def test_one_batch_an_epoch_is_the_composed_gaussian():
    for sigma, epochs in ((1.1, 1), (2.0, 4), (9.0, 60)):
        gaussian = get_epsilon_gaussian(sigma / math.sqrt(epochs), DELTA)
        assert epsilon(bins(sigma, epochs, 1)) == pytest.approx(gaussian, abs=1e-6)


@pytest.mark.parametrize("sigma", [2.0, 5.0])
def test_the_machinery_gives_the_gaussian_too(sigma):
    """An epoch of one batch, computed as all others are; its grid is not made for it."""
    gaussian = get_epsilon_gaussian(sigma, 1e-3)
    for one in balls_in_bins.epoch_losses(sigma, 1, 1, 1e-4):
        assert one.get_delta_for_epsilon(gaussian) >= 1e-3 * (1 - 1e-9)
        assert one.get_delta_for_epsilon(gaussian * 1.01) <= 1e-3


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
@pytest.mark.one_in(8)
@pytest.mark.thorough
def test_monte_carlo_agrees_to_one_percent(sigma, t, steps, delta):
    """Twenty plans, partial epochs among them. False alarms: 40 one-sided tests at 5 standard
    errors, 1 in 87,000 in all; one per cent of epsilon must show beyond the error."""
    found = epsilon(bins(sigma, steps, t), delta=delta)
    rng = np.random.default_rng([int(10 * sigma), t, steps])
    at, below = monte_carlo(sigma, t, steps, (found, 0.99 * found - 1e-3), 50_000, rng)
    assert at[0] - 5 * at[1] < delta  # never below the true value
    assert below[0] + 5 * below[1] > delta  # nor above it by more than one per cent


@pytest.mark.thorough
def test_every_step_of_an_epoch_counts():
    t = 8
    found = [epsilon(bins(1.0, steps, t)) for steps in range(2 * t + 2)]
    assert found[0] == 0
    assert all(a < b for a, b in itertools.pairwise(found))
    # A cut epoch is a segment of its own: two halves are not a whole.
    assert epsilon(bins(1.0, 4, t), bins(1.0, 4, t)) > epsilon(bins(1.0, 8, t))


def test_balls_in_bins_is_monotone():
    base = epsilon(bins(1.5, 50, 10))
    assert epsilon(bins(1.4, 50, 10)) > base > epsilon(bins(1.6, 50, 10))
    assert epsilon(bins(1.5, 50, 10), delta=1e-6) > base > epsilon(bins(1.5, 50, 10), delta=1e-4)
    # More batches to choose from hide an example better.
    assert epsilon(bins(1.5, 60, 12)) < base < epsilon(bins(1.5, 40, 8))


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.thorough
def test_extremes_of_balls_in_bins_are_bounds(accountant):
    for sigma in (1e-12, 1e-3, 0.05, 0.4, 30.0, 1e9):
        for t in (2, 50):
            found = epsilon(bins(sigma, 2 * t, t), accountant=accountant)
            in_full = epsilon(Release("unknown", sigma, 2), accountant=accountant)
            assert 0 <= found <= in_full * (1 + 1e-9) + 1e-6 or in_full == math.inf
    assert epsilon(bins(0.0, 1, 5), accountant=accountant) == math.inf


@pytest.mark.thorough
def test_little_delta_and_many_steps_are_bounds_too():
    assert epsilon(bins(1.0, 100_000, 100_000)) < 0.1
    in_full = epsilon(Release("unknown", 2.0, 3), delta=1e-30)
    assert epsilon(bins(2.0, 30, 10), delta=1e-30) == pytest.approx(in_full)


def test_rounding_keeps_the_mean_and_gives_nothing_away():
    for t, s in ((235, 100), (235, 235), (20, 13), (3, 3)):
        values, masses, infinite = balls_in_bins._sums(1.1, t, s)
        assert (values * masses).sum() / t == pytest.approx(1, abs=1e-10)
        assert masses.sum() == pytest.approx(1, abs=1e-12)
        assert all(0 < one < 1e-12 for one in infinite)
        exact = t**-2 * s * math.expm1(1 / 1.1**2)
        variance = ((values / t - 1) ** 2 * masses).sum()
        assert exact * (1 - 1e-9) <= variance < 1.002 * exact


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_searches_over_balls_in_bins_are_exact_to_the_step():
    step = bins(1.5, 0, 10)
    allowed = accounting.remaining_steps((), step, epsilon=2.0, delta=DELTA)
    assert allowed % 10  # stops within an epoch
    assert epsilon(step.with_steps(allowed)) <= 2.0 < epsilon(step.with_steps(allowed + 1))
    sigma = accounting.calibrate_release((), step, steps=100, epsilon=2.0, delta=DELTA)
    assert 0.999 * 2.0 <= epsilon(bins(sigma, 100, 10)) <= 2.0


@pytest.mark.parametrize("release", [bins(3.0, 50, 5), truncated(3.0, 10, 10, 1000, 120)])
def test_rdp_people_and_attacks_are_bounded_where_the_chance_cannot_be_used(release):
    """As one Gaussian each epoch, or each step with twice the sensitivity: both are bounds."""
    one = epsilon(release)
    assert one < epsilon(release, accountant="rdp") < math.inf
    two = accounting.ledger_epsilon([release], DELTA, examples_per_person=2)
    assert one < two < math.inf
    loss = accounting.privacy_loss([release])
    assert loss.epsilon(DELTA) == pytest.approx(one, rel=1e-9)
    found = risk.attack_risk([release], delta=DELTA)
    plain = risk.attack_risk([Release("unknown", 1.5, 10)], delta=DELTA)
    assert 0.01 < found.at(0.01) < plain.at(0.01)


@pytest.mark.thorough
def test_with_little_noise_the_loss_is_that_of_the_smaller_bound():
    release = bins(0.05, 4, 2)
    assert accounting.privacy_loss([release]).epsilon(DELTA) <= epsilon(release) * (1 + 1e-9)


# --- truncated Poisson ------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "wanted"), [(512, 2.378), (320, 2.401), (288, 4.587), (256, 12.41)]
)
@pytest.mark.one_in(4)
def test_figures_of_truncated_poisson(capacity, wanted):
    """dp_accounting 0.6.0, `TruncatedSubsampledGaussianDpEvent`: n = 60,000, batch 256."""
    found = epsilon(truncated(1.1, 60 * 235, 235, 60_000, capacity))
    assert found == pytest.approx(wanted, abs=1e-3 if wanted < 10 else 5e-3)


@pytest.mark.thorough
def test_a_capacity_never_makes_it_cheaper():
    plain = epsilon(poisson(1.0, 100, 0.1))
    found = [epsilon(truncated(1.0, 100, 10, 1000, c)) for c in (1000, 140)]
    assert found[0] == plain
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))


# --- tables -----------------------------------------------------------------

MADE = [
    poisson(1.0, 3, 0.1), truncated(1.0, 3, 10, 100, 20), bins(1.0, 3, 2),
    Release("shuffled", 1.0, 3, steps_per_epoch=2), Release("unknown", 1.0, 3),
    Release("unprotected", 1.0, 3),
]  # fmt: skip


def test_every_word_of_the_ledger_has_its_sampler():
    assert list(samplers.SAMPLERS) == list(SAMPLERS)
    # A choice among runs isn't drawn: `test_tuning` has it.
    assert {release.sampler for release in MADE} == set(SAMPLERS) - {"choice"}
    for release in MADE:
        sampler = accounting.sampler_of(release)
        assert sampler.description
        assert bool(sampler.assumption) == (release.sampler != "unprotected")
        assert sampler.known == (release.sampler not in ("unknown", "unprotected"))
        assert PrivacyLedger.from_json(PrivacyLedger((release,)).to_json()).releases == (release,)


def test_balls_in_bins_says_how_it_was_computed():
    said = accounting.sampler_of(bins(1.0, 3, 2)).computed
    assert "keras_dp's own" in said and "rounding upwards" in said and "2412.16802" in said


def test_files_from_before_have_no_capacity_and_files_without_one_stay_as_they_were():
    old = '{"format": 1, "releases": [{"sampler": "poisson", "noise_multiplier": 1.0, "steps": 3,'
    old += ' "sampling_rate": 0.1, "id": "a"}]}'
    (release,) = PrivacyLedger.from_json(old)
    assert release.capacity is None
    assert "capacity" not in PrivacyLedger((release,)).to_json()
    assert '"capacity": 20' in PrivacyLedger((truncated(1.0, 3, 10, 100, 20),)).to_json()


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


# --- the meter and the book -------------------------------------------------


def meter(sigma, **more):
    return Meter(sigma, 1.0, clipping="flat", seeded=False, **more)


def step(one, times=1):
    for _ in range(times):
        one.announce(1)
        one.spend(lambda now: now.divisor(1.0), lambda: 0.0, after=[])


DRAWN = Sampling("balls_in_bins", batch_size=10.0, num_examples=50, steps_per_epoch=5)
CUT = Sampling("truncated_poisson", 10.0, 50, sampling_rate=0.2, capacity=15)


def test_rule_10_the_meter_declares_what_the_sampler_did():
    one = meter(2.0)
    one.begin(Phase("fit", DRAWN, 10), iteration=0)
    step(one, 7)
    (release,) = [r for r in one.ledger if r.steps]
    assert (release.sampler, release.steps, release.steps_per_epoch) == ("balls_in_bins", 7, 5)
    one.begin(Phase("fit", CUT, 10), iteration=7)
    step(one, 2)
    cut = next(r for r in one.ledger if r.sampler == "truncated_poisson")
    assert (cut.steps, cut.capacity, cut.sampling_rate, cut.num_examples) == (2, 15, 0.2, 50)
    one.end(iteration=9)
    one.begin(Phase("fit", CUT, 10), iteration=9)  # goes on with the run: draws are independent
    step(one)
    assert sorted(r.steps for r in one.ledger if r.steps) == [3, 7]


def test_rule_10_every_start_of_balls_in_bins_is_a_new_epoch():
    one = meter(2.0)
    for steps in (7, 4):
        one.begin(Phase("fit", DRAWN, 10), iteration=one.releases)
        step(one, steps)
        one.end(iteration=one.releases)
    assert [r.steps for r in one.ledger if r.steps] == [7, 4]
    assert epsilon(*one.ledger) > epsilon(bins(2.0, 11, 5))


def test_rule_10_a_schedule_holds_over_a_whole_epoch():
    one = meter(lambda number: 2.0 + number / 10)
    one.begin(Phase("fit", DRAWN, 12), iteration=0)
    step(one, 12)
    made = [(r.noise_multiplier, r.steps) for r in one.ledger if r.steps]
    assert made == [(2.0, 5), (2.5, 5), (3.0, 2)]


def test_rule_17_a_limit_stops_within_an_epoch():
    one = meter(2.0)
    one.begin(Phase("fit", DRAWN, 40), iteration=0)
    allowed = one.limit(Budget(2.0, DELTA), 40)
    assert 0 < allowed < 40 and allowed % 5
    step(one, 40)
    assert one.releases == allowed
    assert epsilon(*one.ledger) <= 2.0 < epsilon(bins(2.0, allowed + 1, 5))


def test_rule_10_the_rest_of_an_epoch_is_no_epoch_of_its_own():
    """Two parts of one epoch share each example's choice, which two epochs don't."""
    one = meter(2.0)
    one.declare_batches(DRAWN, iteration=0)
    step(one, 3)
    one.declare_batches(UNKNOWN, iteration=3)
    step(one)
    one.declare_batches(DRAWN, iteration=4, within_pass=True)
    step(one, 2)
    made = [(r.sampler, r.steps) for r in one.ledger if r.steps]
    assert made == [("balls_in_bins", 3), ("unknown", 1), ("shuffled", 2)]


def test_rule_10_after_a_fork_both_may_go_on_with_the_same_choice():
    count = [0]
    book = LedgerBook(lambda: count[0])
    book.open(bins(1.0, 0, 10))
    count[0] = 4
    before = book.ledger
    book.fork()
    count[0] = 10
    assert [(r.sampler, r.steps) for r in book.ledger] == [("balls_in_bins", 4), ("shuffled", 6)]
    assert book.ledger.merge(before).steps == 10


# --- the statement ----------------------------------------------------------


def test_rule_10_the_statement_says_how_batches_were_drawn_and_accounted():
    model = tiny.compiled()
    releases = (bins(2.0, 12, 5, num_examples=50), truncated(2.0, 3, 5, 50, 15))
    model.optimizer.session.absorb(PrivacyLedger(releases))
    report = keras_dp.privacy_report(model, delta=DELTA)
    assert report.epsilon["pld"] == epsilon(*releases)
    assert report.epsilon_if_shuffled["pld"] > report.epsilon["pld"]
    text = str(report)
    for said in (
        "| 12 steps | each example once per epoch, in a randomly chosen batch",
        "once in 5 steps",
        "| 3 steps | Poisson sampling, cut to 15 at most",
        "keras_dp's own, with every rounding upwards",
        "chosen uniformly, independently of all other examples and epochs. (verified by keras_dp)",
        "above the public capacity of 15, a uniformly random part was kept. (verified by keras_dp)",
        "had the batches been shuffled",
        "but for what it has no event for",
    ):
        assert said in text, said
    entries = json.loads(report.to_json())["releases"]
    assert [e.get("capacity") for e in entries] == [None, 15]
    assert [e["sampler_basis"] for e in entries] == ["verified"] * 2
    again = [Release(**{k: v for k, v in e.items() if k != "sampler_basis"}) for e in entries]
    assert tuple(again) == releases


def test_rule_13_what_is_asserted_or_seeded_is_not_said_to_be_seen_to():
    for more in ({"asserted": True}, {"seeded": True}):
        model = tiny.compiled()
        model.optimizer.session.absorb(PrivacyLedger((bins(2.0, 12, 5, **more),)))
        drawn = [
            a
            for a in keras_dp.privacy_report(model, delta=DELTA).assumptions
            if "chosen uniformly" in a["text"]
        ]
        assert [a["verified"] for a in drawn] == [False]
