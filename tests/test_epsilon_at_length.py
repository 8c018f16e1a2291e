"""Epsilon of long trainings: what it costs, how close it is, and where accountants end.

Costs are counted (compositions, calls, entries), never timed.
"""

from __future__ import annotations

import itertools
import math

import dp_accounting
import keras
import numpy as np
import pytest
import tiny
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_dp
from keras_dp import PrivacyLedger, Release, accounting
from keras_dp.accounting import accountants
from keras_dp.accounting.accountants import pld
from keras_dp.accounting.mechanisms import SampledGaussian
from keras_dp.accounting.sampled_gaussian import sampled_gaussian_pld
from keras_dp.ledger import LedgerBook
from keras_dp.training.schedules import Period, StepSettings, rounded_up

DELTA = 1e-5
COSINE = keras.optimizers.schedules.CosineDecay(7.0, 90, alpha=0.6)


def poisson(sigma, steps, rate):
    return Release("poisson", sigma, steps, sampling_rate=rate)


def forget():
    accountants.epsilon_of.cache_clear()
    pld.forget()


def counted(monkeypatch):
    """Counts dp-accounting's compositions: of two distributions, and of one with itself."""
    made = {"compose": 0, "self_compose": 0}
    for name in made:
        plain = getattr(privacy_loss_distribution.PrivacyLossDistribution, name)

        def counting(*args, _name=name, _plain=plain, **more):
            made[_name] += 1
            return _plain(*args, **more)

        monkeypatch.setattr(privacy_loss_distribution.PrivacyLossDistribution, name, counting)
    return made


# --- the smallest bound ---------------------------------------------------------------------


def test_the_default_is_rdp_where_that_is_smaller():
    """A step of q = 1e-4 tells far less than the grid of losses resolves: 0.296 by PLD."""
    plan = {"num_examples": 10**4, "batch_size": 1, "noise_multiplier": 2.0, "steps": 10**6}
    default = accounting.compute_epsilon(**plan, delta=1e-7)
    assert default == accounting.compute_epsilon(**plan, delta=1e-7, accountant="rdp")
    assert default == pytest.approx(0.267, abs=1e-3)
    ledger = [poisson(2.0, 10**6, 1e-4)]
    assert accounting.ledger_epsilon(ledger, 1e-7) == default
    assert accounting.accountant_of(ledger, 1e-7) == "rdp"
    assert accounting.accountant_of([poisson(1.1, 100, 1 / 235)], DELTA) == "pld"
    assert accounting.accountant_of([], DELTA) == "pld"
    # Budgets stop by the same figure.
    most = accounting.calibrate_steps(
        num_examples=10**4, batch_size=1, noise_multiplier=2.0, delta=1e-7, target_epsilon=default
    )
    assert most >= 10**6
    step = poisson(2.0, 0, 1e-4)
    room = accounting.remaining_steps([], step, epsilon=default, delta=1e-7, at_most=10**6)
    assert room == 10**6


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(0.7, 20),
    per_epoch=st.integers(2, 20_000),
    steps=st.integers(1, 50_000),
    exponent=st.floats(-13, -3),
)
def test_the_default_is_never_above_rdp(sigma, per_epoch, steps, exponent):
    ledger, delta = [poisson(sigma, steps, 1 / per_epoch)], 10.0**exponent
    default = accounting.ledger_epsilon(ledger, delta)
    assert default <= accounting.ledger_epsilon(ledger, delta, "rdp") + 1e-12


def test_groups_get_the_smaller_bound_too():
    ledger = [poisson(2.0, 10**5, 1e-4)]
    default, renyi = (
        accounting.ledger_epsilon(ledger, 1e-7, name, examples_per_person=2)
        for name in ("pld", "rdp")
    )
    assert 0 < default <= renyi


def test_no_jump_where_distributions_end():
    """0.229 at 1e-9, and 1.295 at 1e-11, it was once."""
    plan = {"num_examples": 10**8, "batch_size": 10**4, "noise_multiplier": 1.0, "steps": 10**5}
    deltas = (1e-9, 3e-10, 1e-10, 3e-11, 1e-11)
    found = [accounting.compute_epsilon(**plan, delta=delta) for delta in deltas]
    assert found == sorted(found)
    assert all(b - a < 0.02 for a, b in itertools.pairwise(found))
    # What dp-accounting says, without allowing for rounding, is a little less.
    event = dp_accounting.PoissonSampledDpEvent(1e-4, dp_accounting.GaussianDpEvent(1.0))
    library = dp_accounting.pld.PLDAccountant().compose(event, 10**5)
    for delta, epsilon in zip(deltas, found, strict=True):
        least = library.get_epsilon(delta)
        assert least <= epsilon < least + 0.02
    for delta in (1e-12, 1e-13, 1e-15, 1e-30):
        further = accounting.compute_epsilon(**plan, delta=delta)
        assert found[-1] < further
        assert further == accounting.compute_epsilon(**plan, delta=delta, accountant="rdp")


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"),
    [(1e-4, 1.0, 10**4), (1e-4, 1.0, 10**6), (1 / 235, 1.1, 14_100), (0.1, 1.0, 50), (0.5, 3, 1)],
)
def test_what_comes_off_delta_covers_what_rounding_took(rate, sigma, steps):
    counts = ((SampledGaussian(sigma, rate), steps),)
    found = pld.composed(counts)
    for pmf in (found._pmf_remove, found._pmf_add):
        taken = -np.cumsum(np.flip(pmf.to_dense_pmf()._probs)).min()
        assert taken <= pld.rounding(counts)
    assert pld.slack(found, counts) == pld.rounding(counts)
    assert pld.pld_epsilon(counts, pld.rounding(counts), 1) == math.inf
    assert pld.rounding(counts) < 1e-5 * DELTA


def test_what_rounding_took_is_seen_where_it_is_more():
    counts = ((SampledGaussian(1.0, 0.1), 2),)
    found = pld.composed(counts)
    found._pmf_add._probs[-1] = -1e-9
    assert pld.slack(found, counts) == pytest.approx(1e-9, rel=1e-3)
    forget()


@pytest.mark.thorough
def test_the_statement_says_which_accountant_a_figure_is_from():
    model = tiny.compiled(tiny.sgd(noise_multiplier=2.0))
    few = keras_dp.privacy_report(model, delta=1e-7)
    assert few.accounting["pld"].startswith("privacy loss distributions")
    model.optimizer.session.absorb(PrivacyLedger((poisson(2.0, 10**6, 1e-4),)))
    report = keras_dp.privacy_report(model, delta=1e-7)
    assert report.epsilon["pld"] == report.epsilon["rdp"]
    assert "Renyi differential privacy's here" in report.accounting["pld"]
    assert report.accounting["pld"] in str(report)


# --- what it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "sigma", "interval"),
    [
        (1 / 235, 1.1, 1e-4),
        (1 / 3907, 0.6, 1e-3),
        (0.999, 5.0, 1e-3),
        (1e-4, 2.0, 1e-4),
        (1.0, 2.0, 1e-3),
        (0.1, 0.33, 1e-2),
        (1e-9, 1.0, 1e-4),
    ],
)
def test_a_steps_distribution_is_dp_accountings(rate, sigma, interval):
    ours = sampled_gaussian_pld(rate, sigma, interval)
    library = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=interval
    )
    pairs = [(ours._pmf_remove, library._pmf_remove), (ours._pmf_add, library._pmf_add)]
    assert ours._symmetric == library._symmetric
    for one, other in pairs:
        one, other = one.to_dense_pmf(), other.to_dense_pmf()
        assert one._lower_loss == other._lower_loss
        np.testing.assert_allclose(one._probs, other._probs, rtol=0, atol=2e-11)
        assert one._infinity_mass == pytest.approx(other._infinity_mass, abs=1e-15)


@pytest.mark.thorough
def test_two_million_steps_are_calibrated_in_a_few_compositions(monkeypatch):
    forget()
    made = counted(monkeypatch)
    plan = {"num_examples": 10**6, "batch_size": 256, "noise_multiplier": 0.6, "delta": 1e-6}
    steps = accounting.calibrate_steps(**plan, target_epsilon=8.0)
    assert made["self_compose"] <= 10 and made["compose"] == 0
    assert steps == pytest.approx(2_264_400, abs=200)
    assert accounting.compute_epsilon(**plan, steps=steps) <= 8.0
    assert accounting.compute_epsilon(**plan, steps=steps + 1) > 8.0
    forget()


def scheduled(steps, schedule, rate):
    """A ledger of so many steps of a schedule, and how many sigmas it has."""
    period = Period({"noise_multiplier": schedule, "max_grad_norm": 1.0}, 0, 1)
    by_sigma = {}
    for (sigma, _), n in period.runs(0, steps):
        by_sigma[sigma] = by_sigma.get(sigma, 0) + n
    return [poisson(sigma, n, rate) for sigma, n in by_sigma.items()]


@pytest.mark.thorough
def test_epochs_of_a_schedule_cost_few_compositions(monkeypatch):
    forget()
    whole = scheduled(90, COSINE, 1 / 3)
    assert sum(r.steps for r in whole) == 90
    assert len(whole) < 30  # 85 it was
    made = counted(monkeypatch)
    accounting.ledger_epsilon(whole, DELTA)
    assert made == {"compose": len(whole) - 1, "self_compose": len(whole)}
    before = accounting.ledger_epsilon(whole, DELTA)
    made.update(compose=0, self_compose=0)
    more = [whole[0].with_steps(whole[0].steps + 1), *whole[1:]]
    after = accounting.ledger_epsilon(more, DELTA)
    assert after > before
    assert made["self_compose"] == 1
    assert made["compose"] <= 2 * math.log2(len(whole)) + 2
    # Nor does a figure depend on what was kept, or on the order.
    forget()
    assert accounting.ledger_epsilon(more[::-1], DELTA) == after


@pytest.mark.thorough
def test_epsilon_of_a_schedule_never_falls():
    falling = lambda step: 4.0 * 0.97**step  # noqa: E731
    rising = lambda step: 1.0 * 1.03**step  # noqa: E731
    for schedule in (falling, rising):
        found = [
            accounting.ledger_epsilon(scheduled(steps, schedule, 0.05), DELTA)
            for steps in (1, 2, 3, 4, 5, 6, 7, 9, 12, 20, 30)
        ]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))


@pytest.mark.thorough
def test_the_grid_of_many_mechanisms_adds_next_to_nothing(monkeypatch):
    releases = [poisson(s, 400, 1 / 50) for s in (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)]
    coarse = accounting.ledger_epsilon(releases, DELTA)
    forget()
    monkeypatch.setattr(pld, "_FEW", 100)
    fine = accounting.ledger_epsilon(releases, DELTA)
    assert fine <= coarse < 1.002 * fine
    forget()


def test_what_is_kept_is_bounded():
    kept = pld._Kept(3000)
    make = lambda: sampled_gaussian_pld(0.1, 2.0, 1e-2)  # noqa: E731
    points = pld._points(make())
    for key in range(20):
        kept.get(key, make)
    assert sum(map(pld._points, kept._kept.values())) <= max(3000, points)
    assert 19 in kept._kept
    assert kept.get(19, lambda: 1 / 0) is kept._kept[19]


# --- schedules ------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e6))
def test_noise_is_rounded_up_on_a_coarse_public_grid(sigma):
    found = rounded_up(sigma)
    assert sigma * (1 - 1.1e-6) <= found <= 1.0501 * sigma
    assert rounded_up(found) == found
    assert float(f"{found:.3g}") == found


def test_the_grid_of_noise_has_the_usual_values():
    usual = (0.1, 0.55, 0.7, 0.95, 1.0, 1.05, 1.1, 1.3, 2.0, 2.5, 4.0, 7.0, 9.9, 10.0, 12.5)
    assert [rounded_up(s) for s in usual] == list(usual)
    assert rounded_up(float(np.float32(1.1))) == 1.1
    assert [rounded_up(s) for s in (1.01, 1.06, 2.01, 9.95, 0.951)] == [1.05, 1.1, 2.1, 10.0, 0.96]


def test_keras_schedules_are_asked_for_many_steps_at_once(monkeypatch):
    calls = []
    plain = keras.optimizers.schedules.CosineDecay.__call__
    monkeypatch.setattr(
        keras.optimizers.schedules.CosineDecay,
        "__call__",
        lambda self, step: calls.append(step) or plain(self, step),
    )
    period = Period({"noise_multiplier": COSINE, "max_grad_norm": 1.0}, 0, 1)
    period.reach(4000)
    assert len(calls) < 5
    for step in (0, 1, 45, 60, 89, 3999):
        assert period(step) == (rounded_up(float(plain(COSINE, step))), 1.0)


def test_a_schedule_of_your_own_is_asked_for_each_step_once():
    asked = []

    class Mine(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            asked.append(int(step))
            return 2.0 if step < 3 else 1.0

    period = Period({"noise_multiplier": Mine(), "max_grad_norm": 1.0}, 0, 1)
    assert list(period.runs(1, 6)) == [((2.0, 1.0), 2), ((1.0, 1.0), 3)]
    assert list(period.runs(0, 3)) == [((2.0, 1.0), 3)]
    assert list(period.runs(4, 4)) == []
    assert asked == list(range(6))


def test_the_table_of_a_step_does_not_grow_with_training(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        keras_dp.backend.Table, "set", lambda self, values: sizes.append(len(values))
    )
    count = keras_dp.backend.Counter()
    values = StepSettings(lambda step: 4.0 if step < 500 else 2.0, 1.0, count)
    values._period.reach(5000)
    for _ in range(1000):
        values.announce(1)
        count.increment()
    assert max(sizes) <= 63
    assert len(sizes) < 2 * 1000 / 50
    values.announce(200)
    assert sizes[-1] == 200


# --- ledgers --------------------------------------------------------------------------------------


class Alternating:
    """Two kinds of steps in turn, a million in a row."""

    def __init__(self):
        self.asked = 0

    def runs(self, first, last):
        while first < last:
            end = min((first // 10**6 + 1) * 10**6, last)
            self.asked += 1
            yield poisson_kinds[first // 10**6 % 2], end - first
            first = end


poisson_kinds = [Release("poisson", sigma, sampling_rate=0.01) for sigma in (1.0, 2.0)]


def test_ten_million_steps_are_counted_by_runs():
    made = [0]
    book = LedgerBook(lambda: made[0])
    kinds = Alternating()
    book.open(kinds)
    made[0] = 10**7
    assert [r.steps for r in book.ledger] == [5 * 10**6] * 2
    assert [r.steps for r in book.runs_after(10**6)] == [6 * 10**6, 5 * 10**6]
    assert kinds.asked < 20
    book.fork()
    made[0] += 10**6
    assert book.ledger.steps == 11 * 10**6
    assert len(book.ledger) == 3  # apart from what the other side does
    assert kinds.asked < 40


def test_a_release_knows_what_it_is_once():
    release = poisson(1.0, 5, 0.01)
    assert release.mechanism is release.mechanism
    assert release.mechanism == release.with_steps(7).mechanism
    assert release.mechanism != poisson(1.0, 5, 0.02).mechanism
    assert Release(**release.to_dict()) == release


def test_a_thousand_segments_are_composed_as_one(monkeypatch):
    forget()
    made = counted(monkeypatch)
    segments = PrivacyLedger(tuple(poisson(1.1, 10, 1 / 235) for _ in range(1000)))
    found = accounting.ledger_epsilon(segments, DELTA)
    assert found == accounting.ledger_epsilon([poisson(1.1, 10_000, 1 / 235)], DELTA)
    assert made == {"compose": 0, "self_compose": 1}
