"""The accountant: figures, searches, and the ways other libraries got them wrong."""

import inspect
import itertools
import math
import subprocess
import sys
import time

import cases
import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dp import accounting
from keras_dp.accounting import (
    accountants,
    calibrate_noise_multiplier,
    calibrate_release,
    calibrate_steps,
    compute_epsilon,
    ledger_epsilon,
    ledgers,
    remaining_steps,
    steps_per_epoch,
)
from keras_dp.accounting.accountants import pld
from keras_dp.accounting.mechanisms import SampledGaussian
from keras_dp.ledger import PrivacyLedger, Release

DELTA = 1e-5

# n, batch, sigma, epochs, PLD, RDP (computed with dp_accounting 0.6.0)
ORACLES = [
    (2000, 256, 1.0, 100, 28.8491, 31.3219),
    (20000, 256, 1.0, 10, 2.1068, 2.4052),
    (20000, 256, 1.0, 50, 4.8310, 5.2759),
    (20000, 256, 2.5, 10, 0.5378, 0.5933),
    (60000, 256, 1.3, 15, 0.8632, 0.9531),
    (60000, 256, 1.1, 60, 2.3781, 2.5927),
    (60000, 256, 0.7, 45, 5.6309, 6.3100),
]
PLAN = {"num_examples": 60_000, "batch_size": 256, "delta": DELTA}


def poisson(sigma=1.1, steps=0, rate=1 / 235, **more):
    return Release("poisson", sigma, steps, sampling_rate=rate, **more)


def shuffled(sigma, steps, per_epoch, **more):
    return Release("shuffled", sigma, steps, steps_per_epoch=per_epoch, **more)


def library_epsilon(releases, make=PLDAccountant):
    """dp_accounting's own composition of Poisson-sampled and plain Gaussians."""
    events = []
    for r in releases:
        event = dp_accounting.GaussianDpEvent(float(r.noise_multiplier))
        if r.sampler == "poisson":
            event = dp_accounting.PoissonSampledDpEvent(float(r.sampling_rate), event)
        events.append(dp_accounting.SelfComposedDpEvent(event, int(r.steps)))
    return make().compose(dp_accounting.ComposedDpEvent(events)).get_epsilon(DELTA)


# --- figures ----------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch", "sigma", "epochs", "pld", "rdp"), ORACLES)
@pytest.mark.fast
def test_oracles(n, batch, sigma, epochs, pld, rdp):
    plan = {"num_examples": n, "batch_size": batch, "noise_multiplier": sigma, "epochs": epochs}
    assert compute_epsilon(**plan, delta=DELTA) == pytest.approx(pld, abs=1e-3)
    assert compute_epsilon(**plan, delta=DELTA, accountant="rdp") == pytest.approx(rdp, abs=1e-3)


@pytest.mark.parametrize(
    ("sigma", "steps", "pld", "rdp"),
    [(4.0, 10_000, 0.9470, 1.0355), (0.7, 120, 2.4612381, 3.2392676)],
)
@pytest.mark.fast
def test_oracles_at_one_percent_sampling(sigma, steps, pld, rdp):
    plan = {"num_examples": 100, "batch_size": 1, "noise_multiplier": sigma, "steps": steps}
    assert compute_epsilon(**plan, delta=DELTA) == pytest.approx(pld, abs=1e-4)
    assert compute_epsilon(**plan, delta=DELTA, accountant="rdp") == pytest.approx(rdp, abs=1e-4)


@pytest.mark.parametrize(
    "releases",
    [
        (Release("unknown", 1.0, 1),),
        (Release("unknown", 10.0, 100),),
        (shuffled(1.0, 235, 235),),
        (shuffled(2.0, 940, 235),),
        (shuffled(2.0, 706, 235),),  # a pass begun counts in full
        (poisson(2.0, 4, rate=1.0),),
        (Release("unknown", math.sqrt(2), 1), shuffled(math.sqrt(2), 7, 7)),
    ],
)
@pytest.mark.fast
def test_gaussian_oracle(releases):
    assert ledger_epsilon(PrivacyLedger(releases), DELTA) == pytest.approx(4.377178, abs=1e-6)


@pytest.mark.fast
def test_shuffled_is_never_accounted_as_poisson():
    steps = 60 * 235
    ledger = PrivacyLedger((shuffled(1.1, steps, 235),))
    assert ledger_epsilon(ledger, DELTA) == pytest.approx(54, abs=1)
    assert ledger_epsilon((poisson(1.1, steps),), DELTA) == pytest.approx(2.3781, abs=1e-3)


@pytest.mark.parametrize("releases", [
    *[(poisson(sigma, steps, rate),) for rate, sigma, steps in [
        (1 / 79, 1.0, 1), (1 / 79, 1.0, 2), (1 / 79, 1.0, 790), (1 / 8, 0.8, 16), (0.5, 3.0, 65),
        (0.999, 5.0, 10), (1e-3, 0.6, 5000), (1e-3, 30.0, 20_000),
    ]],
    (poisson(1.0, 700, 1 / 79), poisson(2.0, 300, 1 / 79), poisson(1.5, 100, 1 / 30)),
    (poisson(1.0, 700, 1 / 79), Release("unknown", 9.0, 20)),
])  # fmt: skip
@pytest.mark.one_in(3)
def test_figures_are_dp_accountings_own(releases):
    assert pld.grid_interval(ledgers._counts(releases)) == 1e-4
    ours = ledger_epsilon(PrivacyLedger(releases), DELTA)
    library = min(library_epsilon(releases), library_epsilon(releases, RdpAccountant))
    # That of a delta from which what rounding may have taken came off: never below the library's.
    assert -1e-9 < ours - library < 1e-6
    rdp = ledger_epsilon(PrivacyLedger(releases), DELTA, "rdp")
    assert rdp == pytest.approx(library_epsilon(releases, RdpAccountant), abs=1e-9)
    if len(releases) > 1:
        assert ours > max(ledger_epsilon((r,), DELTA) for r in releases)


@pytest.mark.thorough
def test_a_coarser_grid_is_a_close_upper_bound():
    """Little noise would need endless grids (FACTS H10)."""
    rate, sigma, steps = 0.1, 0.33, 20
    counts = ((SampledGaussian(sigma, rate), steps),)
    assert pld.grid_interval(counts) > 1e-4
    ours, fine = ledger_epsilon((poisson(sigma, steps, rate),), DELTA), 1e-4
    library = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=fine
    )
    exact = library.self_compose(steps).get_epsilon_for_delta(DELTA)
    assert exact - 1e-9 <= ours < 1.001 * exact


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.fast
def test_empty_and_endless(accountant):
    assert ledger_epsilon(PrivacyLedger(), DELTA, accountant) == 0.0
    assert ledger_epsilon((poisson(1.0, 0), poisson(0.0, 0)), DELTA, accountant) == 0.0
    assert ledger_epsilon((Release("unprotected", 1.0, 0),), DELTA, accountant) == 0.0
    assert ledger_epsilon((Release("unprotected", 1.0, 1),), DELTA, accountant) == math.inf
    assert ledger_epsilon((poisson(0.0, 1),), DELTA, accountant) == math.inf
    assert ledger_epsilon((Release("unknown", 0.0, 1),), DELTA, accountant) == math.inf
    plan = {**PLAN, "noise_multiplier": 0.0, "accountant": accountant}
    assert compute_epsilon(**plan, steps=1) == math.inf
    assert compute_epsilon(**plan, steps=0) == 0.0
    assert calibrate_steps(**{**plan, "target_epsilon": 3.0}) == 0


# --- mistakes seen elsewhere ------------------------------------------------


def test_opacus_mistake_22_a_step_lost_to_floating_point():
    """`int(1 / sample_rate)` is a step too few for some sizes."""
    assert any(int(1 / (1 / n)) != n for n in range(1, 4000))
    for n in range(1, 4000):
        assert steps_per_epoch(n, 1) == n
        assert steps_per_epoch(7 * n, 7) == n
        assert steps_per_epoch(7 * n + 1, 7) == n + 1


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
def test_opacus_mistake_23_calibration_never_passes_the_target(target, accountant):
    plan = {**PLAN, "epochs": 15, "accountant": accountant}
    sigma = calibrate_noise_multiplier(target_epsilon=target, **plan)
    assert isinstance(sigma, float)
    epsilon = compute_epsilon(noise_multiplier=sigma, **plan)
    assert target * (1 - 1e-3) < epsilon <= target


def test_noise_of_any_number_type_is_composed_in_full():
    """dp_accounting drops a composition whose sigma is no Python float (FACTS H10)."""
    plain = compute_epsilon(
        num_examples=20000, batch_size=256, noise_multiplier=1.0, steps=790, delta=1e-5
    )
    for sigma in (1, np.float32(1), np.float64(1), np.int64(1)):
        for accountant in accounting.ACCOUNTANTS:
            arguments = {"num_examples": 20000, "batch_size": 256, "accountant": accountant}
            scalars = compute_epsilon(
                **{**arguments, "num_examples": np.int64(20000), "batch_size": np.int32(256)},
                noise_multiplier=sigma,
                steps=np.int64(790),
                delta=np.float64(1e-5),
            )
            again = compute_epsilon(**arguments, noise_multiplier=1.0, steps=790, delta=1e-5)
            assert type(scalars) is float
            assert scalars == again
    assert plain == pytest.approx(2.1068, abs=1e-3)


def test_the_accountant_imports_no_framework():
    code = (
        "import sys, importlib.util as u; p = sys.argv[1]\n"
        "import types; k = types.ModuleType('k'); k.__path__ = [p]; sys.modules['k'] = k\n"
        "import k.accounting\n"
        "print([m for m in ('tensorflow', 'keras', 'torch', 'jax') if m in sys.modules])"
    )
    folder = inspect.getfile(accounting).rsplit("/", 2)[0]
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- speed, extremes, history -----------------------------------------------


@pytest.mark.thorough
def test_tiny_and_huge_noise_answer_quickly_with_a_bound():
    start = time.perf_counter()
    for sigma in (0.25, 0.03, 1e-3, 1e-12, 1e-300):
        epsilon = compute_epsilon(noise_multiplier=sigma, epochs=60, **PLAN)
        assert epsilon > 100
        assert calibrate_steps(target_epsilon=3.0, noise_multiplier=sigma, **PLAN) == 0
    for sigma in (1e3, 1e9, 1e300):
        epsilon = compute_epsilon(noise_multiplier=sigma, epochs=60, **PLAN)
        assert 0 <= epsilon < 0.02
        steps = calibrate_steps(target_epsilon=3.0, noise_multiplier=sigma, **PLAN)
        assert 10**8 < steps <= 10**9
    for steps in (1, 10**7, 10**9, 10**12):
        assert compute_epsilon(noise_multiplier=1.0, steps=steps, **PLAN) > 0
    assert time.perf_counter() - start < 30


@pytest.mark.filterwarnings("error")
def test_extremes_do_not_warn(caplog):
    for sigma in (0.02, 0.4, 1.0, 1e4):
        for accountant in accounting.ACCOUNTANTS:
            compute_epsilon(
                num_examples=80, batch_size=10, noise_multiplier=sigma, epochs=3, delta=1e-5,
                accountant=accountant,
            )  # fmt: skip
    assert not caplog.records


def forget():
    accountants.epsilon_of.cache_clear()
    pld.forget()


def test_a_repeated_query_is_free_and_searches_take_few(monkeypatch):
    plan = {**PLAN, "noise_multiplier": 1.1}
    queries = []
    exact = pld.pld_epsilon
    monkeypatch.setattr(pld, "pld_epsilon", lambda *args: queries.append(args[-1]) or exact(*args))
    forget()
    compute_epsilon(steps=14_100, **plan)
    compute_epsilon(steps=14_100, **plan)
    assert queries == [1]
    calibrate_steps(target_epsilon=3.0, **plan)
    assert queries.count(1) <= 1 + 6
    queries.clear()
    calibrate_noise_multiplier(target_epsilon=3.0, epochs=15, **PLAN)
    assert queries.count(1) <= 2 + 5  # two of which are the trivial ends


@pytest.mark.thorough
def test_figures_do_not_depend_on_earlier_queries():
    plan = {**PLAN, "noise_multiplier": 1.1}
    counts = [1, 128, 14_100]
    series = []
    for order in (counts, counts[::-1]):
        forget()
        series.append({steps: compute_epsilon(steps=steps, **plan) for steps in order})
    forget()
    calibrate_steps(target_epsilon=2.0, **plan)
    series.append({steps: compute_epsilon(steps=steps, **plan) for steps in counts})
    assert series[0] == series[1] == series[2]


def test_how_a_run_is_split_or_ordered_does_not_matter():
    one, other = poisson(1.1, 5000), poisson(1.4, 300, 1 / 40)
    split = (poisson(1.1, 2000), other, poisson(1.1, 3000))
    assert ledger_epsilon(split, DELTA) == ledger_epsilon((one, other), DELTA)
    assert ledger_epsilon((other, one), DELTA) == ledger_epsilon((one, other), DELTA)


@pytest.mark.thorough
def test_epsilon_never_falls_where_the_grid_changes():
    rate, sigma = 1 / 20, 0.5
    widths = {k: pld.grid_interval(((SampledGaussian(sigma, rate), 2**k),)) for k in range(20)}
    assert len(set(widths.values())) > 2
    values = [ledger_epsilon((poisson(sigma, 2**k, rate),), DELTA) for k in range(0, 20, 4)]
    assert all(a <= b for a, b in itertools.pairwise(values))


@settings(max_examples=cases.examples(30), deadline=None)
@given(
    sigma=st.floats(0.5, 20),
    per_epoch=st.integers(2, 500),
    steps=st.integers(1, 20_000),
    more=st.integers(1, 5_000),
    delta=st.floats(1e-9, 1e-2),
)
def test_monotone(sigma, per_epoch, steps, more, delta):
    def epsilon(sigma=sigma, steps=steps, delta=delta):
        return compute_epsilon(
            num_examples=per_epoch, batch_size=1, noise_multiplier=sigma, steps=steps, delta=delta
        )

    middle = epsilon()
    slack = 1e-6 * (1 + middle)  # rounding of a double-precision Fourier transform
    assert middle >= 0
    assert epsilon(steps=steps + more) >= middle - slack
    assert epsilon(sigma=sigma * 1.1) <= middle + slack
    assert epsilon(delta=delta * 2) <= middle + slack
    assert epsilon() == middle


@settings(max_examples=6, deadline=None)
@given(
    sigma=st.floats(0.6, 5), per_epoch=st.integers(2, 300), steps=st.integers(1, 3000),
)  # fmt: skip
def test_pld_is_between_the_trivial_bounds(sigma, per_epoch, steps):
    plan = {"num_examples": per_epoch, "batch_size": 1, "steps": steps, "delta": DELTA}
    tight = compute_epsilon(noise_multiplier=sigma, **plan)
    assert tight <= compute_epsilon(noise_multiplier=sigma, accountant="rdp", **plan) * 1.001 + 1e-4
    assert tight <= ledger_epsilon((Release("unknown", sigma, steps),), DELTA) * 1.001 + 1e-4


# --- searches ---------------------------------------------------------------


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize(("target", "sigma"), [(0.2, 1.1), (1.0, 1.1), (3.0, 0.8), (8.0, 1.1)])
@pytest.mark.fast
def test_calibrate_steps_is_exact(target, sigma, accountant):
    plan = {**PLAN, "noise_multiplier": sigma, "accountant": accountant}
    steps = calibrate_steps(target_epsilon=target, **plan)
    assert type(steps) is int
    assert compute_epsilon(steps=steps, **plan) <= target
    assert compute_epsilon(steps=steps + 1, **plan) > target


LEDGERS = [
    (PrivacyLedger(), poisson(1.1)),
    (PrivacyLedger((poisson(1.1, 4321, id="a"),)), poisson(1.1, id="a")),
    (PrivacyLedger((poisson(1.0, 3000), Release("unknown", 20.0, 30))), poisson(1.3)),
    (PrivacyLedger((poisson(1.0, 300),)), Release("unknown", 20.0)),
    (PrivacyLedger((shuffled(20.0, 1000, 235),)), Release("unknown", 30.0)),
    (PrivacyLedger((shuffled(10.0, 1000, 235, id="s"),)), shuffled(10.0, 0, 235, id="s")),
    (PrivacyLedger((shuffled(10.0, 1000, 235, id="s"),)), shuffled(10.0, 0, 235, id="t")),
]


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize(("ledger", "release"), LEDGERS)
@pytest.mark.one_in(4)
def test_remaining_steps_is_exact(ledger, release, accountant):
    budget = {"epsilon": 3.0, "delta": DELTA, "accountant": accountant}

    def after(steps):
        made = [r.with_steps(r.steps + steps) if r.id == release.id else r for r in ledger]
        if release.id not in {r.id for r in ledger}:
            made.append(release.with_steps(steps))
        return ledger_epsilon(made, DELTA, accountant)

    steps = remaining_steps(ledger, release, **budget)
    assert type(steps) is int
    assert after(steps) <= 3.0 < after(steps + 1)
    assert remaining_steps(ledger, release, **budget, at_most=steps) == steps
    assert remaining_steps(ledger, release, **budget, at_most=steps + 1) == steps
    assert remaining_steps(ledger, release, **budget, at_most=steps // 2) == steps // 2
    assert remaining_steps(ledger, release, **budget, at_most=0) == 0


def test_a_shuffled_pass_that_was_begun_may_be_finished():
    begun = shuffled(10.0, 236, 235, id="s")
    spent = ledger_epsilon((begun,), DELTA)
    assert remaining_steps((begun,), begun, epsilon=spent, delta=DELTA) == 234


def test_remaining_steps_of_a_spent_or_unprotected_ledger():
    budget = {"epsilon": 1.0, "delta": DELTA}
    assert remaining_steps((poisson(1.1, 50_000),), poisson(), **budget) == 0
    assert remaining_steps((poisson(1.1, 50_000),), poisson(), **budget, at_most=10) == 0
    assert remaining_steps((Release("unprotected", 1.0, 1),), poisson(), **budget) == 0
    assert remaining_steps((), Release("unprotected", 1.0), **budget) == 0
    assert remaining_steps((), poisson(1e9), **budget) == 10**9


def test_a_plan_that_fits_costs_one_query(monkeypatch):
    queries = []
    exact = ledgers.epsilon_of
    monkeypatch.setattr(ledgers, "epsilon_of", lambda *args: queries.append(args) or exact(*args))
    assert remaining_steps((), poisson(), epsilon=3.0, delta=DELTA, at_most=14_100) == 14_100
    assert len(queries) == 1


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize(("ledger", "release"), LEDGERS[2:])
def test_calibrate_release_fills_the_budget(ledger, release, accountant):
    sigma = calibrate_release(
        ledger, release, steps=500, epsilon=3.0, delta=DELTA, accountant=accountant
    )

    def after(sigma):
        kind = {"sampling_rate": release.sampling_rate, "steps_per_epoch": release.steps_per_epoch}
        more = Release(release.sampler, sigma, 500, **kind)
        return ledger_epsilon((*ledger, more), DELTA, accountant)

    assert 0.999 * 3.0 <= after(sigma) <= 3.0


def test_calibrate_release_of_an_empty_ledger_is_calibrate_noise_multiplier():
    sigma = calibrate_release(PrivacyLedger(), poisson(), steps=15 * 235, epsilon=3.0, delta=DELTA)
    assert sigma == calibrate_noise_multiplier(target_epsilon=3.0, epochs=15, **PLAN)


@pytest.mark.parametrize("made", [poisson(1.1, 50_000), Release("unprotected", 1.0, 1)])
def test_calibrate_release_of_a_spent_ledger(made):
    with pytest.raises(ValueError, match=r"already spent epsilon=.*`epsilon`=2 for 10 more steps"):
        calibrate_release((made,), poisson(), steps=10, epsilon=2.0, delta=DELTA)


def test_calibrating_an_unprotected_release():
    with pytest.raises(ValueError, match="unprotected"):
        calibrate_release((), Release("unprotected", 1.0), steps=10, epsilon=2.0, delta=DELTA)


@pytest.mark.thorough
def test_extreme_targets():
    assert calibrate_noise_multiplier(target_epsilon=1e12, steps=10, **PLAN) <= 0.001
    for target in (1e-3, 500.0):
        sigma = calibrate_noise_multiplier(target_epsilon=target, steps=1000, **PLAN)
        epsilon = compute_epsilon(noise_multiplier=sigma, steps=1000, **PLAN)
        assert target * 0.99 < epsilon <= target
    with pytest.raises(ValueError, match="No noise keeps epsilon within"):
        calibrate_noise_multiplier(
            target_epsilon=1e-9, steps=10**15, delta=1e-12, num_examples=10, batch_size=10
        )


# --- arguments --------------------------------------------------------------

GOOD = {
    "compute_epsilon": {**PLAN, "noise_multiplier": 1.1, "steps": 10},
    "calibrate_noise_multiplier": {**PLAN, "target_epsilon": 3.0, "steps": 10},
    "calibrate_steps": {**PLAN, "target_epsilon": 3.0, "noise_multiplier": 1.1},
    "ledger_epsilon": {"ledger": (poisson(1.1, 10),), "delta": DELTA},
    "remaining_steps": {
        "ledger": (), "release": poisson(), "epsilon": 3.0, "delta": DELTA, "at_most": 5,
    },
    "calibrate_release": {
        "ledger": (), "release": poisson(), "steps": 5, "epsilon": 3.0, "delta": DELTA,
    },
}  # fmt: skip
BAD_WHOLE = [-1, 1.0, 2.5, "3", True, math.nan, np.float64(3), [3]]
BAD_POSITIVE = [0, 0.0, -1.0, math.nan, math.inf, "3", True, None, 1j, [3.0]]
BAD = {
    "num_examples": [0, None, *BAD_WHOLE],
    "batch_size": [0, None, 60_001, *BAD_WHOLE],
    "noise_multiplier": [-0.1, math.nan, math.inf, "1", True, None, [1.0]],
    "delta": [0, 1, 0.0, 1.0, -1e-5, 1.5, math.nan, math.inf, "1e-5", True, None],
    "target_epsilon": BAD_POSITIVE,
    "epsilon": BAD_POSITIVE,
    "steps": BAD_WHOLE,
    "at_most": BAD_WHOLE,
    "accountant": ["prv", "PLD", "", None, 3, ["pld"]],
}


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (function, argument)
        for function in GOOD
        for argument in inspect.signature(getattr(accounting, function)).parameters
        if argument in BAD
    ],
)
@pytest.mark.fast
def test_bad_arguments_are_named(function, argument):
    call, good = getattr(accounting, function), GOOD[function]
    for value in BAD[argument]:
        with pytest.raises(ValueError) as error:
            call(**{**good, argument: value})
        assert f"`{argument}`" in str(error.value)
        assert f"{argument}={value!r}" in str(error.value)


@pytest.mark.parametrize("function", ["compute_epsilon", "calibrate_noise_multiplier"])
@pytest.mark.fast
def test_exactly_one_of_epochs_and_steps(function):
    call, good = getattr(accounting, function), dict(GOOD[function])
    with pytest.raises(ValueError, match="exactly one of `epochs` and `steps`"):
        call(**good, epochs=1)
    del good["steps"]
    with pytest.raises(ValueError, match="exactly one of `epochs` and `steps`"):
        call(**good)
    for value in BAD_WHOLE:
        with pytest.raises(ValueError, match="`epochs` must be an integer"):
            call(**good, epochs=value)


def test_a_batch_larger_than_the_data_says_what_to_do():
    with pytest.raises(ValueError, match=r"`batch_size` must not be larger than .*at most 100"):
        steps_per_epoch(100, 101)


@pytest.mark.fast
def test_what_is_no_release_is_named():
    with pytest.raises(ValueError, match="`ledger` must be a PrivacyLedger"):
        ledger_epsilon(None, DELTA)
    with pytest.raises(ValueError, match="`ledger` must be a PrivacyLedger"):
        ledger_epsilon((1.1,), DELTA)
    with pytest.raises(ValueError, match="`release` must be a keras_dp Release"):
        remaining_steps((), 1.1, epsilon=1.0, delta=DELTA)
    with pytest.raises(ValueError, match="`release` must be a keras_dp Release"):
        calibrate_release((), None, steps=3, epsilon=1.0, delta=DELTA)
