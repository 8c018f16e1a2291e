"""The bound on membership attacks: its figures, that it is a bound, and how it is said.

`RISKCAL` was computed by the package riskcal 1.5.1 (`get_beta_from_pld` and
`get_advantage_from_pld` of dp-accounting 0.6's distributions, grid 1e-4 for one
example a person, 1e-3 for several). For little noise its rates are too low: of
sigma = 0.7, q = 1/64 and 3,000 steps it says 0.1573 at 0.1 %, where simulated
attacks find 0.160 (`SIMULATED`), which is why those are compared too.
"""

import json
import math

import numpy as np
import pytest
import tiny
from scipy import stats

import keras_dp
from keras_dp import Release, accounting, auditing, cli, losses, risk
from keras_dp.losses import Gaussian, Renyi

RATES = (0.001, 0.01, 0.05, 0.1)
PLAN = Release("poisson", 1.1, 60 * 235, sampling_rate=1 / 235)


def poisson(sigma, q, steps):
    return Release("poisson", sigma, steps, sampling_rate=q)


# What was released, examples a person, the true-positive rates at RATES, and the advantage.
RISKCAL = {
    "plan": (PLAN, 1, (0.00552, 0.03973, 0.141958, 0.239137), 0.224187),
    "large batches": (
        poisson(2.0, 0.25, 40),
        1,
        (0.013282, 0.070376, 0.209473, 0.324992),
        0.313437,
    ),
    "short": (poisson(1.0, 0.01, 500), 1, (0.002842, 0.022117, 0.09015, 0.163231), 0.114084),
    "one Gaussian": (
        Release("unknown", 1.0, 1),
        1,
        (0.018298, 0.092362, 0.259511, 0.389144),
        0.382925,
    ),
    "two examples": (PLAN, 2, (0.026503, 0.119681, 0.308484, 0.444515), 0.430249),
    "four examples": (PLAN, 4, (0.211006, 0.48011, 0.733013, 0.836491), 0.741443),
    "eight examples": (PLAN, 8, (0.919886, 0.984145, 0.997767, 0.999351), 0.974655),
}


def test_the_readmes_plan_has_its_known_figures():
    found = risk.attack_risk([PLAN], delta=1e-5)
    assert found.false_positive_rates == RATES
    assert found.true_positive_rates == pytest.approx((0.006, 0.040, 0.142, 0.239), abs=1e-3)
    assert found.advantage == pytest.approx(0.224, abs=1e-3)
    assert found.epsilon == accounting.ledger_epsilon([PLAN], 1e-5)
    # From (epsilon, delta) alone, far more would have to be feared.
    assert found.at(0.01) < 0.108 / 2


@pytest.mark.parametrize("name", RISKCAL)
def test_figures_agree_with_riskcal(name):
    release, k, rates, advantage = RISKCAL[name]
    found = risk.attack_risk([release], delta=1e-5, examples_per_person=k)
    assert found.true_positive_rates == pytest.approx(rates, abs=1e-3)
    assert found.advantage == pytest.approx(advantage, abs=1e-3)


def simulated(sigma, q, steps, trials, seed=0):
    """True-positive rates at RATES, and the advantage, of the likelihood-ratio attack."""
    random = np.random.default_rng(seed)
    loss = np.zeros(trials)
    for _ in range(steps):
        x = sigma * random.standard_normal(trials) + (random.random(trials) < q)
        loss += np.log1p(q * np.expm1((x - 0.5) / sigma**2))
    loss = np.sort(loss)[::-1]
    # The same outcomes, weighted to be those without the example.
    false = np.cumsum(np.exp(-loss)) / trials
    true = np.arange(1, trials + 1) / trials
    return np.interp(RATES, false, true), float(np.max(true - false))


# By the function above, with so many trials.
SIMULATED = {
    (0.7, 1 / 64, 3000, 150_000): ((0.16017, 0.38891, 0.64001, 0.75794), 0.67402),
    (1.0, 0.01, 500, 500_000): ((0.00285, 0.02216, 0.09031, 0.16344), 0.11438),
}


@pytest.mark.parametrize("setting", [*SIMULATED, (2.0, 0.25, 40, 200_000)])
@pytest.mark.one_in(3)
def test_simulated_attacks_come_near_and_stay_below(setting):
    sigma, q, steps, trials = setting
    rates, advantage = SIMULATED.get(setting) or simulated(*setting)
    found = risk.attack_risk([poisson(sigma, q, steps)], delta=1e-5)
    for bound, rate in zip(
        (*found.true_positive_rates, found.advantage), (*rates, advantage), strict=True
    ):
        # Five standard deviations: wrong once in 300,000 times for each.
        spread = 5 * math.sqrt(max(rate * (1 - rate), 0.01) / trials)
        assert rate - spread <= bound <= rate + spread + 1e-3


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
@pytest.mark.one_in(3)
def test_a_gaussian_has_its_trade_off_curve(mu):
    rates = np.array([0, 1e-6, 0.01, 0.5, 0.99, 1])
    wanted = stats.norm.sf(stats.norm.isf(rates) - mu)
    found = accounting.privacy_loss([Release("unknown", 1 / mu, 1)])
    np.testing.assert_allclose(found.true_positive_rates(rates), wanted, atol=1e-12)
    assert found.advantage == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1)
    # Subsampled so that nothing is left out, it is the same.
    sampled = accounting.privacy_loss([Release("poisson", 1 / mu, 1, sampling_rate=1 - 1e-12)])
    np.testing.assert_allclose(sampled.true_positive_rates(rates), wanted, atol=2e-3)
    assert np.all(sampled.true_positive_rates(rates) >= wanted - 1e-9)


@pytest.mark.parametrize(("q", "sigma", "k"), [(0.5, 1.0, 1), (0.1, 0.6, 1), (0.3, 1.0, 3)])
@pytest.mark.one_in(2)
def test_the_best_attack_on_one_step_never_beats_the_bound_and_comes_near(q, sigma, k):
    """The likelihood ratio is monotone in the noisy sum, so a threshold is the best attack."""
    held = np.arange(k + 1)
    chances = stats.binom.pmf(held, k, q)
    thresholds = np.linspace(-8, 8 + k, 4000)
    member = sum(
        c * stats.norm.sf(thresholds, m, sigma) for m, c in zip(held, chances, strict=True)
    )
    other = stats.norm.sf(thresholds, 0, sigma)
    loss = accounting.privacy_loss([poisson(sigma, q, 1)], k)
    bound = loss.true_positive_rates(other)
    absent = loss.true_positive_rates(1 - member)  # attacks that look for those who are out
    assert np.all(member <= bound + 1e-9) and np.all(1 - other <= absent + 1e-9)
    # Near, too: of the two kinds of attack the better one.
    rates = np.linspace(0.01, 0.99, 99)
    best = np.maximum(
        np.interp(rates, other[::-1], member[::-1]), np.interp(rates, 1 - member, 1 - other)
    )
    assert np.mean(loss.true_positive_rates(rates) - best) < 0.01
    assert loss.advantage == pytest.approx(np.max(member - other), abs=1e-3)
    assert loss.advantage >= np.max(member - other) - 1e-9


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    "release", [PLAN, poisson(1.0, 0.25, 8), Release("shuffled", 5.0, 3, steps_per_epoch=1)]
)
def test_the_curve_is_concave_grows_and_lies_above_guessing(release, accountant):
    loss = accounting.privacy_loss([release], accountant=accountant)
    rates = np.linspace(0, 1, 201)
    found = loss.true_positive_rates(rates)
    assert np.all(found >= rates) and np.all(np.diff(found) >= -1e-9) and found[-1] == 1
    assert np.all(np.diff(found, 2) < 1e-4)
    assert loss.advantage >= np.max(found - rates) - 1e-6
    assert loss.advantage == pytest.approx(np.max(found - rates), abs=2e-3)


def test_the_fast_deltas_are_those_of_dp_accounting():
    for release, k in ((poisson(1.0, 0.25, 8), 2), (PLAN, 4)):
        pld = accounting.privacy_loss([release], k).pld
        epsilons = np.linspace(0, 25, 60)
        np.testing.assert_allclose(
            losses._deltas(pld, epsilons),
            pld.get_delta_for_epsilon(epsilons),
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("release", [PLAN, poisson(1.0, 0.25, 8), Release("unknown", 2.0, 3)])
def test_renyi_divergences_bound_the_same_attacks_from_further_above(release):
    tight, loose = (accounting.privacy_loss([release], accountant=a) for a in ("pld", "rdp"))
    rates = np.linspace(0.001, 0.999, 50)
    assert isinstance(loose, Renyi)
    assert np.all(loose.true_positive_rates(rates) >= tight.true_positive_rates(rates) - 2e-4)
    assert tight.advantage < loose.advantage < tight.advantage + 0.12
    rdp = accounting.ledger_epsilon([release], 1e-5, "rdp")
    assert tight.epsilon(1e-5) < loose.epsilon(1e-5) <= rdp


def test_renyi_divergences_allow_no_pair_of_rates_that_is_further_apart():
    loose = accounting.privacy_loss([Release("unknown", 1.0, 1)], accountant="rdp")
    rate = 0.05
    found = float(loose.true_positive_rates(rate))

    def apart(order, p, q):
        terms = p**order * q ** (1 - order) + (1 - p) ** order * (1 - q) ** (1 - order)
        return math.log(terms) / (order - 1)

    orders = np.asarray(losses.ORDERS)
    short = orders <= 64
    for p, q in ((found, rate), (rate, found)):
        allowed = [
            apart(o, p, q) <= d + 1e-6
            for o, d in zip(orders[short], loose.divergences[short], strict=True)
        ]
        assert all(allowed)
    wider = found + 1e-3
    assert any(
        apart(o, p, q) > d
        for o, d in zip(orders[short], loose.divergences[short], strict=True)
        for p, q in ((wider, rate), (rate, wider))
    )


# -- an audit never finds more -----------------------------------------------------------------


@pytest.mark.thorough
def test_no_audit_finds_more_than_the_bound(monkeypatch):
    """The white-box attack on the easiest target: at any threshold its rates are allowed ones."""
    seen = {}
    original = auditing.scores_lower_bound

    def keep(inside, outside, **settings):
        seen["scores"] = np.asarray(inside), np.asarray(outside)
        return original(inside, outside, **settings)

    monkeypatch.setattr(auditing.white_box, "scores_lower_bound", keep)
    result = auditing.white_box_audit(noise_multiplier=2.0, delta=1e-5, runs=1, verbose=0)
    inside, outside = seen["scores"]
    assert len(inside) > 300 and len(outside) > 300
    claim = result.claimed_epsilon
    mu = 1 / _sigma_of(claim)
    bounds = Gaussian(mu)
    for rate in (0.05, 0.1, 0.3, 0.5):
        threshold = np.quantile(outside, 1 - rate)
        hits, alarms = int(np.sum(inside > threshold)), int(np.sum(outside > threshold))
        # Clopper and Pearson: each bound is wrong once in 100,000 times.
        least = stats.beta.ppf(1e-5, hits, len(inside) - hits + 1)
        most = stats.beta.isf(1e-5, alarms + 1, len(outside) - alarms)
        assert least <= float(bounds.true_positive_rates(most))
    # It is a good attack, so the bound is near.
    threshold = np.quantile(outside, 0.9)
    assert np.mean(inside > threshold) > float(bounds.true_positive_rates(0.1)) - 0.15


def _sigma_of(epsilon):
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        spent = accounting.ledger_epsilon([Release("unknown", middle, 1)], 1e-5)
        low, high = (middle, high) if spent > epsilon else (low, middle)
    return high


# -- ends and errors -----------------------------------------------------------------------------


def test_nothing_released_is_guessing_and_no_noise_is_certainty():
    nothing = risk.attack_risk([], delta=1e-5)
    assert nothing.true_positive_rates == RATES and nothing.advantage == nothing.epsilon == 0
    for release in (Release("unprotected", 0.0, 1), poisson(0.0, 0.1, 1)):
        sure = risk.attack_risk([release], delta=1e-5, examples_per_person=2)
        assert sure.true_positive_rates == (1, 1, 1, 1) and sure.advantage == 1
        assert sure.epsilon == math.inf
    assert risk.unlimited(1e-5).advantage == 1


@pytest.mark.parametrize(
    "release", [poisson(1e-4, 0.01, 1), poisson(0.05, 0.5, 10), poisson(2.0, 1e-6, 10**8)]
)
@pytest.mark.one_in(2)
def test_extreme_settings_have_rates_between_guessing_and_certainty(release):
    for k in (1, 3):
        found = risk.attack_risk([release], delta=1e-5, examples_per_person=k)
        for rate, bound in zip(RATES, found.true_positive_rates, strict=True):
            assert rate <= bound <= 1
        assert 0 <= found.advantage <= 1


@pytest.mark.parametrize("wrong", [(), (2.0,), (-0.1,), ("a",), (True,), 0.5j, (math.nan,)])
def test_wrong_rates_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match="`false_positive_rates`"):
        risk.attack_risk([PLAN], delta=1e-5, false_positive_rates=wrong)


def test_other_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`delta`"):
        risk.attack_risk([PLAN], delta=2)
    with pytest.raises(ValueError, match="`ledger`"):
        risk.attack_risk(["no release"], delta=1e-5)
    with pytest.raises(ValueError, match=r"`false_positive_rate` must be one of 0\.001, 0\.01"):
        risk.attack_risk([PLAN], delta=1e-5).at(0.02)


@pytest.mark.parametrize(
    ("rate", "said"),
    [(0.0401, "4.01 %"), (0.040101, "4.02 %"), (0.04, "4 %"), (1, "100 %"), (0, "0 %")],
)
def test_what_is_said_is_rounded_up(rate, said):
    assert risk.percent(rate) == said


# -- in the statement ----------------------------------------------------------------------------


def of_ledger(*releases):
    model = tiny.compiled()
    model.optimizer.session.attach(model, keras_dp.PrivacyLedger(releases))
    return model


def test_the_statement_has_the_risk_of_people_with_one_example_and_several():
    report = keras_dp.privacy_report(of_ledger(PLAN), delta=1e-5)
    for found in report.attack_risk:
        wanted = risk.attack_risk([PLAN], delta=1e-5, examples_per_person=found.examples_per_person)
        assert found == wanted
    assert [r.examples_per_person for r in report.attack_risk] == [1, 2, 4, 8]
    assert "| 1 | 2.3781 | 0.61 % | 4.02 % | 14.23 % | 23.94 % | 22.42 % |" in str(report)
    data = json.loads(report.to_json())
    assert data["attack_risk"][1]["epsilon"] == pytest.approx(5.257, abs=1e-2)
    rates = data["attack_risk"][0]["true_positive_rates"]
    assert [r["false_positive_rate"] for r in rates] == list(RATES)
    assert rates[1]["true_positive_rate"] == pytest.approx(0.0401, abs=1e-3)


def test_rule_13_three_sentences_at_the_top_say_what_an_attacker_can_and_cant_learn():
    report = keras_dp.privacy_report(of_ledger(PLAN), delta=1e-5)
    title, empty, top, *_ = str(report).splitlines()
    assert title.startswith("# ") and not empty and top == " ".join(report.summary)
    assert len(report.summary) == 3
    assert "at most 4.02 %" in report.summary[0] and "hardly" in report.summary[0]
    assert "2, 4 or 8 rows" in report.summary[1] and "11.96 %" in report.summary[1]
    assert "people in general" in report.summary[2]
    for word in ("epsilon", "delta", "differential", "sigma"):
        assert word not in top
    assert json.loads(report.to_json())["summary"] == list(report.summary)


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (Release("unknown", 8.0, 1), "can hardly tell"),
        (Release("unknown", 0.6, 1), "can't always tell"),
        (Release("unknown", 0.3, 1), "can often tell"),
    ],
)
def test_the_sentences_are_as_strong_as_the_promise(release, said):
    assert said in keras_dp.privacy_report(of_ledger(release), delta=1e-3).summary[0]


@pytest.mark.parametrize(
    "release",
    [
        Release("unknown", 1.0, 1, seeded=True),
        Release("unknown", 0.0, 1),
        Release("unprotected", 0.0, 1),
    ],
    ids=["seed", "no noise", "unprotected"],
)
def test_rule_13_without_a_guarantee_no_attack_is_limited(release):
    report = keras_dp.privacy_report(of_ledger(release), delta=1e-5)
    assert all(r.true_positive_rates == (1, 1, 1, 1) for r in report.attack_risk)
    assert "no privacy guarantee" in report.summary[0] and "| 100 % |" in str(report)
    assert "hardly" not in str(report)


def test_an_untrained_model_says_that_no_private_step_was_taken():
    report = keras_dp.privacy_report(tiny.compiled(), delta=1e-5)
    assert report.summary[0].startswith("No private step taken")
    assert str(report).count("No private step taken") == 2
    assert report.risk.true_positive_rates == RATES


def test_the_statement_can_be_for_people():
    report = keras_dp.privacy_report(of_ledger(PLAN), delta=1e-5, examples_per_person=3)
    wanted = accounting.ledger_epsilon([PLAN], 1e-5, examples_per_person=3)
    assert report.epsilon["pld"] == report.risk.epsilon == wanted
    assert [r.examples_per_person for r in report.attack_risk] == [1, 2, 3, 4, 8]
    data = json.loads(report.to_json())
    assert data["unit_of_privacy"] == "person" and data["examples_per_person"] == 3
    assert "all examples of one person, at most 3" in data["adjacency"]
    assert "at most 3, which one has" in report.statement
    assert any("more than 3 examples" in a["text"] for a in report.assumptions)
    assert "up to 3 rows" in report.summary[1] and "4 or 8 rows" in report.summary[1]


@pytest.mark.thorough
def test_several_models_of_the_same_data_are_stated_together():
    first, second = of_ledger(PLAN), of_ledger(Release("unknown", 20.0, 5))
    together = keras_dp.privacy_report([first, second], delta=1e-5)
    ledger = [*first.optimizer.ledger, *second.optimizer.ledger]
    assert together.epsilon["pld"] == accounting.ledger_epsilon(ledger, 1e-5)
    assert together.epsilon["pld"] > keras_dp.privacy_report(first, delta=1e-5).epsilon["pld"]
    assert together.steps == 60 * 235 + 5 and together.models == (first.name, second.name)
    assert "these models" in together.summary[0]
    # The same steps aren't counted twice.
    twice = keras_dp.privacy_report((first, first), delta=1e-5)
    assert twice.epsilon == keras_dp.privacy_report(first, delta=1e-5).epsilon


@pytest.mark.parametrize(
    ("models", "said"),
    [([], "empty list"), ("model", "must be a Keras model"), ([3], "must be a Keras model")],
)
def test_what_is_no_model_is_refused(models, said):
    with pytest.raises(ValueError, match=said):
        keras_dp.privacy_report(models, delta=1e-5)


def test_one_model_of_several_without_private_training_is_refused():
    plain = tiny.model()
    plain.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="not been trained privately"):
        keras_dp.privacy_report([of_ledger(PLAN), plain], delta=1e-5)


# -- pictures ------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_picture_has_the_curves_and_the_line_of_guessing(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    loss = accounting.privacy_loss([PLAN])
    risk.draw([("one example", loss)], figure, "a title")
    whole, few = figure.axes
    for axes in (whole, few):
        guess, curve = axes.get_lines()
        np.testing.assert_array_equal(*guess.get_data())
        rates, bounds = curve.get_data()
        np.testing.assert_array_equal(bounds, loss.true_positive_rates(rates))
    assert [t.get_text() for t in whole.get_legend().get_texts()] == ["guessing", "one example"]
    assert few.get_xscale() == few.get_yscale() == "log"
    report = keras_dp.privacy_report(of_ledger(Release("unknown", 5.0, 2)), delta=1e-5)
    for ending, beginning in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        path = tmp_path / f"risk.{ending}"
        report.draw(path)
        assert path.read_bytes().startswith(beginning)


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    report = keras_dp.privacy_report(of_ledger(Release("unknown", 5.0, 2)), delta=1e-5)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.draw(tmp_path / "risk.png")


# -- the command ---------------------------------------------------------------------------------


def run(line, capsys):
    try:
        status = cli.main(line.split())
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


README = "-n 60000 -b 256 -s 1.1 -e 60"


def test_the_command_says_the_risk(capsys):
    status, out, _ = run(f"risk {README} --json", capsys)
    data = json.loads(out)
    assert status == 0 and [p["examples_per_person"] for p in data["people"]] == [1, 2, 4, 8]
    wanted = risk.attack_risk([PLAN], delta=1e-5)
    assert data["people"][0]["advantage"] == pytest.approx(wanted.advantage)
    text = run(f"risk {README} -k 1", capsys)[1]
    assert "finds at most 4.02 % of those who are, with one example" in text
    assert "14.23 %" in text and "22.42 %" in text
    assert "one example: one row" in text


def test_the_command_asks_for_people(capsys):
    status, out, _ = run(f"epsilon {README} --examples-per-person 4 --json", capsys)
    data = json.loads(out)
    assert status == 0 and data["examples_per_person"] == 4
    assert data["epsilon"] == pytest.approx(12.13, abs=1e-2)
    assert data["epsilon_by_sampling"]["shuffled"] > 500
    assert "at most 4 examples" in data["assumptions"]["unit"]
    assert "for people with up to 4 examples" in run(f"epsilon {README} -k 4", capsys)[1]
    assert "people with" not in run(f"epsilon {README}", capsys)[1]


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "many", "1001", "nan"])
@pytest.mark.parametrize("command", ["epsilon", "risk", "select"])
def test_the_command_refuses_a_wrong_number_of_examples(command, wrong, capsys):
    status, out, error = run(f"{command} {README} --examples-per-person={wrong}", capsys)
    assert (status, out) == (2, "")
    assert "--examples-per-person: must be a whole number from 1 to 1000" in error


def test_the_command_draws(capsys, tmp_path):
    path = tmp_path / "attacks.png"
    status, out, _ = run(f"risk {README} -k 1 2 --picture {path}", capsys)
    assert status == 0 and str(path) in out and path.read_bytes().startswith(b"\x89PNG")
    status, _, error = run(f"risk {README} --picture {tmp_path}/no/where.png", capsys)
    assert status == 2 and "folder that exists" in error
