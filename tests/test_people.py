"""Epsilon for people with several examples: the figures, the bounds, and that they are bounds."""

import functools
import itertools
import math
import time

import numpy as np
import pytest
import tiny
from dp_accounting.pld import privacy_loss_distribution
from scipy import integrate, special, stats

import keras_dp
from keras_dp import PrivacyLedger, Release, accounting, people
from keras_dp.losses import ORDERS, Distribution, Gaussian

PLAN = {"num_examples": 60_000, "batch_size": 256, "noise_multiplier": 1.1, "epochs": 60}
FIGURES = {1: 2.378, 2: 5.257, 4: 12.13, 8: 29.96}
POISSON = Release("poisson", 1.1, 60 * 235, sampling_rate=1 / 235)


@pytest.mark.parametrize("k", FIGURES)
@pytest.mark.fast
def test_the_readmes_plan_has_its_known_figures_in_under_two_seconds(k):
    people._composed.cache_clear(), people.loss.cache_clear()
    begun = time.process_time()
    found = accounting.compute_epsilon(**PLAN, delta=1e-5, examples_per_person=k)
    taken = time.process_time() - begun
    assert found == pytest.approx(FIGURES[k], abs=1e-2)
    assert taken < 2 or k == 1
    assert accounting.ledger_epsilon([POISSON], 1e-5, examples_per_person=k) == found


@functools.cache
def by_dp_accounting(q, sigma, steps, k):
    """dp_accounting's own mixture of Gaussians, on a fine grid."""
    held = np.arange(k + 1)
    step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma,
        list(held),
        list(stats.binom.pmf(held, k, q)),
        value_discretization_interval=1e-3,
    )
    return step.self_compose(steps)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "k"),
    [(0.25, 1.0, 8, 2), (0.25, 2.0, 40, 3), (0.02, 1.5, 300, 5), (0.9, 4.0, 10, 4)],
)
@pytest.mark.one_in(4)
@pytest.mark.thorough
def test_figures_are_those_of_dp_accountings_mixture(q, sigma, steps, k):
    release = Release("poisson", sigma, steps, sampling_rate=q)
    for delta in (1e-3, 1e-6):
        found = accounting.ledger_epsilon([release], delta, examples_per_person=k)
        wanted = by_dp_accounting(q, sigma, steps, k).get_epsilon_for_delta(delta)
        assert found == pytest.approx(wanted, rel=3e-3, abs=3e-3)


@pytest.mark.parametrize(("q", "sigma", "k"), [(0.3, 1.0, 3), (0.05, 0.8, 8), (0.5, 2.0, 2)])
@pytest.mark.fast
def test_one_step_is_never_below_the_integral_of_its_densities(q, sigma, k):
    def density(x, means, chances):
        return sum(c * stats.norm.pdf(x, m, sigma) for m, c in zip(means, chances, strict=True))

    held = np.arange(k + 1)
    chances = stats.binom.pmf(held, k, q)
    release = Release("poisson", sigma, 1, sampling_rate=q)
    x = np.linspace(-12 * sigma, k + 12 * sigma, 400_001)
    inside, outside = density(x, held, chances), density(x, [0], [1])
    for delta in (1e-2, 1e-4):
        epsilon = accounting.ledger_epsilon([release], delta, examples_per_person=k)
        spent = max(
            integrate.trapezoid(np.maximum(p - math.exp(epsilon) * r, 0), x)
            for p, r in ((inside, outside), (outside, inside))
        )
        assert delta * 0.97 < spent <= delta * (1 + 1e-6)


@pytest.mark.parametrize("rate", [1 / 235, 0.25, 1.0])
@pytest.mark.fast
def test_one_example_a_person_is_the_ordinary_epsilon(rate):
    counts = ((rate, 1.1, 200),)
    release = Release("poisson", 1.1, 200, sampling_rate=rate)
    wanted = accounting.ledger_epsilon([release], 1e-5)
    assert people.epsilon(counts, 1, 1e-5) == pytest.approx(wanted, rel=1e-3)
    assert people.epsilon(counts, 1, 1e-5) >= wanted * (1 - 1e-6)


@pytest.mark.parametrize(
    "release",
    [
        Release("unknown", 4.0, 10),
        Release("shuffled", 4.0, 10, steps_per_epoch=1),
        Release("shuffled", 4.0, 95, steps_per_epoch=10),  # ten passes begun
        Release("poisson", 4.0, 10, sampling_rate=1.0),
    ],
    ids=["unknown", "shuffled", "passes", "full batch"],
)
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.fast
def test_all_of_somebody_may_be_in_one_batch_where_nothing_is_drawn(release, k):
    one = accounting.ledger_epsilon([Release("unknown", 4.0 / k, 10)], 1e-5)
    assert accounting.ledger_epsilon([release], 1e-5, examples_per_person=k) == pytest.approx(one)


@pytest.mark.fast
def test_rule_10_a_person_costs_more_the_more_examples_and_never_less_than_a_part_of_them():
    ledger = [POISSON, Release("unknown", 30.0, 3), Release("poisson", 2.0, 50, sampling_rate=0.1)]
    for accountant in ("pld", "rdp"):
        found = [accounting.ledger_epsilon(ledger, 1e-5, accountant, k) for k in (1, 2, 3, 4, 8)]
        assert all(a < b for a, b in itertools.pairwise(found))
    for k in (2, 4):
        tight, loose = (accounting.ledger_epsilon(ledger, 1e-5, a, k) for a in ("pld", "rdp"))
        assert tight < loose < 1.2 * tight


@pytest.mark.fast
def test_renyi_divergences_of_one_example_are_those_of_dp_accounting():
    orders = np.asarray(ORDERS)
    for q, sigma in ((0.25, 1.0), (0.01, 0.7), (0.9, 2.0)):
        found = people._mixture_divergences(q, sigma, 1)
        wanted = people._step_divergences(q, sigma, 1)
        known = np.isfinite(wanted) & (orders >= 2) & (orders == np.round(orders))
        assert known.sum() > 50
        # Both are exact for whole orders.
        np.testing.assert_allclose(found[known], wanted[known], rtol=1e-6)


@pytest.mark.parametrize(("q", "sigma", "k"), [(0.3, 1.0, 3), (0.02, 0.8, 6)])
@pytest.mark.fast
def test_renyi_divergences_of_several_examples_are_the_integral(q, sigma, k):
    held = np.arange(k + 1)
    chances = stats.binom.pmf(held, k, q)
    found = people._mixture_divergences(q, sigma, k)
    for order in (1.5, 2.0, 3.0):

        def integrand(x, power):
            ratio = special.logsumexp((held * x - held**2 / 2) / sigma**2, b=chances)
            return math.exp(stats.norm.logpdf(x, 0, sigma) + power * ratio)

        both = [
            integrate.quad(integrand, -15 * sigma, order * k + 15 * sigma, (p,), limit=500)[0]
            for p in (order, 1 - order)
        ]
        wanted = math.log(max(both)) / (order - 1)
        assert found[ORDERS.index(order)] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.fast
def test_a_coarser_grid_never_gives_less():
    counts = ((0.05, 1.0, 100),)
    found = [
        Distribution(people._composed(*counts[0], 4, h)).epsilon(1e-5) for h in (1e-3, 1e-2, 0.05)
    ]
    assert found == sorted(found) and found[-1] < 1.2 * found[0]


@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        (Release("poisson", 0.0, 1, sampling_rate=0.1), math.inf),
        (Release("unprotected", 0.0, 1), math.inf),
        (Release("poisson", 1.0, 0, sampling_rate=0.1), 0.0),
    ],
)
@pytest.mark.fast
def test_nothing_costs_nothing_and_no_noise_everything(release, wanted):
    for accountant in ("pld", "rdp"):
        assert accounting.ledger_epsilon([release], 1e-5, accountant, 3) == wanted


@pytest.mark.parametrize(
    "release",
    [
        Release("poisson", 0.01, 100, sampling_rate=0.5),
        Release("poisson", 1e-3, 1, sampling_rate=1e-6),
        Release("poisson", 1.0, 10**9, sampling_rate=1e-6),
        Release("poisson", 1e5, 10, sampling_rate=1e-3),
        Release("poisson", 1.0, 5, sampling_rate=1e-12),
    ],
)
@pytest.mark.one_in(5)
@pytest.mark.thorough
def test_extreme_settings_have_a_figure_above_that_of_one_example(release):
    for k in (2, 200):
        found = accounting.ledger_epsilon([release], 1e-5, examples_per_person=k)
        assert found >= 0.999 * accounting.ledger_epsilon([release], 1e-5) and not math.isnan(found)


@pytest.mark.thorough
def test_the_optimizer_says_it_of_what_was_run():
    model = tiny.compiled()
    model.fit(*tiny.data(), batch_size=16, epochs=1, verbose=0)
    optimizer = model.optimizer
    wanted = accounting.ledger_epsilon(optimizer.ledger, 1e-3, examples_per_person=4)
    assert optimizer.get_epsilon(1e-3, examples_per_person=4) == wanted
    assert wanted > optimizer.get_epsilon(1e-3)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "4", None, 1001, math.nan])
@pytest.mark.fast
def test_a_wrong_number_of_examples_is_refused_by_name(wrong):
    calls = [
        lambda: accounting.ledger_epsilon([POISSON], 1e-5, examples_per_person=wrong),
        lambda: accounting.compute_epsilon(**PLAN, delta=1e-5, examples_per_person=wrong),
        lambda: accounting.privacy_loss([POISSON], wrong),
        lambda: keras_dp.privacy_report(tiny.compiled(), examples_per_person=wrong),
        lambda: tiny.compiled().optimizer.get_epsilon(1e-5, examples_per_person=wrong),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="`examples_per_person` must be an integer"):
            call()


@pytest.mark.fast
def test_the_loss_of_plain_gaussians_is_exact():
    loss = accounting.privacy_loss(PrivacyLedger([Release("unknown", 2.0, 4)]), 3)
    assert loss == Gaussian(3.0)


# -- the data really differ so: an attack on people with several examples --------------------------


@pytest.mark.fast
def test_an_attack_on_people_with_several_examples_stays_below_the_bound_and_comes_near():
    """The best attack there is on one Poisson-sampled step, simulated."""
    q, sigma, k, trials = 0.5, 1.0, 4, 400_000
    random = np.random.default_rng(0)
    noise = random.normal(0, sigma, (2, trials))
    inside = noise[0] + random.binomial(k, q, trials)
    outside = noise[1]
    loss = accounting.privacy_loss([Release("poisson", sigma, 1, sampling_rate=q)], k)
    for rate in (0.01, 0.1):
        threshold = np.quantile(outside, 1 - rate)
        found = np.mean(inside > threshold)
        bound = float(loss.true_positive_rates(rate))
        # Four standard deviations of both rates: wrong once in 10,000 times.
        spread = 4 * math.sqrt(found * (1 - found) / trials) + 60 * math.sqrt(rate / trials)
        assert found <= bound + spread
        assert bound < found + 0.05
