"""Choosing the best of several runs: how many there are, what it costs, and what is refused."""

import collections
import dataclasses
import json
import math
import secrets

import keras
import numpy as np
import pytest
import tiny
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import stats

import keras_dp
from keras_dp import PrivacyError, PrivacyLedger, Release, accounting, cli, risk, tuning
from keras_dp.repetition import DISTRIBUTIONS, Repetition, dominated, selection_loss

X, Y = tiny.data()
PLAN = Release("poisson", 1.1, 60 * 235, sampling_rate=1 / 235)
DECLARED = tuning.plan(num_examples=64, batch_size=16, noise_multiplier=1.0, epochs=1)
FIGURES = {"logarithmic": 4.29, "geometric": 5.04, "poisson": 5.74}


def trained(optimizer=None, epochs=1):
    """A model that has taken the private steps of so many epochs."""
    model = tiny.compiled(optimizer)
    tiny.private_steps(model, 4 * epochs)
    return model


def runs_of(monkeypatch, number):
    monkeypatch.setattr(Repetition, "draw", lambda self: number)


# -- how many runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mean", [1, 1.5, 10, 200])
def test_the_number_of_runs_has_its_distribution_and_mean(distribution, mean):
    repetition = Repetition(distribution, mean)
    runs = np.arange(0, 30_000)
    chances = np.array([repetition.chance_of(k) for k in runs])
    assert chances.sum() == pytest.approx(1, abs=1e-9)
    assert runs @ chances == pytest.approx(mean, rel=1e-6)
    if mean == 1 and distribution != "poisson":
        return
    if distribution == "poisson":
        wanted = stats.poisson.pmf(runs, mean)
    elif distribution == "geometric":
        wanted = stats.geom.pmf(runs, 1 / mean)
    else:  # of the logarithmic distribution, SciPy's parameter is 1 - gamma
        wanted = stats.logser.pmf(runs, -math.expm1(-repetition._rate))
    np.testing.assert_allclose(chances, wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("distribution", ["logarithmic", "geometric"])
def test_no_more_runs_are_made_than_are_accounted(distribution):
    """dp_accounting turns a mean into a chance to stop; ours must be no smaller."""
    repetition = Repetition(distribution, 10)
    gamma = rdp_privacy_accountant._gamma_truncated_negative_binomial(repetition.shape, 10)
    assert math.exp(-repetition._rate) >= gamma * (1 - 1e-12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_follow_the_distribution(distribution):
    repetition = Repetition(distribution, 4)
    drawn = collections.Counter(repetition.draw() for _ in range(4000))
    kinds = range(0, 9)
    seen = np.array([drawn[k] for k in kinds])
    chances = np.array([repetition.chance_of(k) for k in kinds])
    # Six standard deviations of each: wrong once in ten million times.
    assert np.all(np.abs(seen - 4000 * chances) <= 6 * np.sqrt(4000 * chances) + 1e-9)
    assert min(drawn) >= (0 if distribution == "poisson" else 1)


def test_rule_07_the_number_of_runs_and_candidates_come_from_the_operating_system(monkeypatch):
    keras.utils.set_random_seed(0)
    repetition = Repetition("geometric", 1000)
    first = [repetition.draw() for _ in range(6)]
    keras.utils.set_random_seed(0)
    assert [repetition.draw() for _ in range(6)] != first
    asked = []
    monkeypatch.setattr(secrets, "randbelow", lambda n: asked.append(n) or 1)
    assert tuning.BestOfRuns(DECLARED).draw(["a", "b", "c"]) == "b" and asked == [3]


@pytest.mark.parametrize(
    ("uniform", "runs"), [(0.0, 1), (0.0999, 1), (0.1001, 2), (0.1899, 2), (0.1901, 3)]
)
def test_a_uniform_number_is_turned_into_runs(uniform, runs):
    assert Repetition("geometric", 10).draw(lambda: uniform) == runs


# -- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", FIGURES)
def test_the_best_of_ten_runs_has_its_known_figure(distribution):
    repetition = Repetition(distribution, 10)
    found = selection_loss([PLAN], repetition).epsilon(1e-5)
    assert found == pytest.approx(FIGURES[distribution], abs=1e-2)
    step = dp_event.PoissonSampledDpEvent(1 / 235, dp_event.GaussianDpEvent(1.1))
    event = dp_event.RepeatAndSelectDpEvent(
        dp_event.SelfComposedDpEvent(step, 60 * 235), 10, repetition.shape
    )
    wanted = rdp_privacy_accountant.RdpAccountant().compose(event).get_epsilon(1e-5)
    assert found == pytest.approx(wanted, rel=1e-9)
    # Ten in a row, by the same accountant.
    ten = PLAN.with_steps(10 * PLAN.steps)
    assert found < accounting.ledger_epsilon([ten], 1e-5, "rdp") == pytest.approx(9.58, abs=1e-2)


def test_a_choice_never_costs_less_than_one_run():
    for distribution in DISTRIBUTIONS:
        costs = [
            selection_loss([PLAN], Repetition(distribution, mean)).epsilon(1e-5)
            for mean in (1, 2, 10, 50)
        ]
        assert costs == sorted(costs)
        assert costs[0] >= selection_loss([PLAN], None).epsilon(1e-5) - 1e-9


@pytest.mark.parametrize(
    ("ledger", "fits"),
    [
        ([PLAN], True),
        ([PLAN.with_steps(10)], True),
        ([PLAN.with_steps(PLAN.steps + 1)], False),
        ([Release("poisson", 1.2, PLAN.steps, sampling_rate=1 / 235)], True),
        ([Release("poisson", 1.0, PLAN.steps, sampling_rate=1 / 235)], False),
        ([Release("poisson", 1.1, PLAN.steps, sampling_rate=1 / 117)], False),
        ([Release("shuffled", 1.1, PLAN.steps, steps_per_epoch=235)], False),
        ([Release("unprotected", 0.0, 1)], False),
        ([], True),
    ],
)
def test_a_run_fits_if_it_costs_no_more_by_any_order(ledger, fits):
    assert dominated(ledger, [PLAN]) is fits


def test_two_ledgers_with_equal_epsilon_but_another_curve_do_not_pass_for_each_other():
    """Equal at one delta says nothing of the other orders, on which the choice rests."""
    many = Release("poisson", 1.1, 14_100, sampling_rate=1 / 235)
    epsilon = accounting.ledger_epsilon([many], 1e-5, "rdp")
    sigma = accounting.calibrate_release(
        (), Release("unknown", 1.0), steps=1, epsilon=epsilon, delta=1e-5, accountant="rdp"
    )
    once = Release("unknown", sigma, 1)
    assert accounting.ledger_epsilon([once], 1e-5, "rdp") <= epsilon
    assert not (dominated([once], [many]) and dominated([many], [once]))


# -- choosing ------------------------------------------------------------------------------------


def test_the_best_run_is_returned_with_its_candidate_and_score(monkeypatch):
    runs_of(monkeypatch, 4)
    given, made, scores = [], [], iter([0.3, float("nan"), 0.9, 0.5])

    def train(candidate):
        given.append(candidate)
        made.append(trained())
        return made[-1]

    selected = tuning.select(
        train, [1, 2, 3], score=lambda model: next(scores), declared=DECLARED, mean_runs=4
    )
    assert len(made) == 4 and set(given) <= {1, 2, 3}
    assert selected.model is made[2] and selected.score == 0.9 and selected.candidate == given[2]
    assert [tuning.was_passed_over(m) for m in made] == [True, True, False, True]
    assert tuning.procedure_of(made[2]) == selected.procedure
    wanted = selection_loss(DECLARED, Repetition("logarithmic", 4)).epsilon(1e-3)
    assert selected.epsilon(1e-3) == wanted


def test_what_is_returned_does_not_tell_how_many_runs_there_were(monkeypatch):
    texts = []
    for number in (1, 3):
        runs_of(monkeypatch, number)
        selected = tuning.select(
            lambda c: trained(), ["c"], score=lambda m: 1.0, declared=DECLARED, mean_runs=2
        )
        report = keras_dp.privacy_report(selected.model, delta=1e-3)
        known = json.loads(report.to_json())
        assert "runs" not in known["selections"][0] and known["steps"] == 4
        texts.append(str(report).replace(selected.model.name, "it"))
    assert texts[0] == texts[1]


def test_candidates_may_be_drawn_by_a_function_and_none_is_preferred(monkeypatch):
    best = tuning.BestOfRuns(DECLARED)
    assert best.draw(lambda: "mine") == "mine"
    drawn = collections.Counter(best.draw("abcd") for _ in range(2000))
    assert all(abs(drawn[c] - 500) < 6 * math.sqrt(375) for c in "abcd")
    for wrong in ([], 3, None):
        with pytest.raises(ValueError, match="`candidates` must be a sequence"):
            best.draw(wrong)


def test_no_run_at_all_returns_no_model(monkeypatch):
    runs_of(monkeypatch, 0)
    selected = tuning.select(
        lambda c: 1 / 0, [1], score=abs, declared=DECLARED, distribution="poisson"
    )
    assert selected.model is None and selected.score is None and selected.candidate is None
    assert selected.epsilon(1e-3) > 0


# -- what is refused -----------------------------------------------------------------------------


def offering(model, declared=DECLARED, score=1.0):
    best = tuning.BestOfRuns(declared, mean_runs=1, distribution="geometric")
    for _ in best:
        best.offer(model, score)
    return best.result()


def dearer():
    return trained(epochs=2)


def unknown_batches():
    model = tiny.compiled()
    model.train_on_batch(X, Y)
    return model


def went_on_without_protection():
    model = trained()
    model.compile("sgd", loss="mse")
    model.fit(X, Y, verbose=0)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (dearer, "cost more than was declared"),
        (lambda: trained(tiny.sgd(noise_multiplier=0.9)), "cost more than was declared"),
        (went_on_without_protection, "cost more than was declared"),
        (lambda: trained(tiny.sgd(seed=1)), "chosen seed"),
        (tiny.compiled, "taken no private step"),
        (tiny.model, "taken no private step"),
    ],
)
@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
@pytest.mark.one_in(2)
def test_rule_10_a_run_that_is_not_what_was_declared_is_refused(make, said):
    with pytest.raises(PrivacyError, match=said):
        offering(make())


def test_cheaper_runs_are_accepted():
    assert offering(trained(tiny.sgd(noise_multiplier=3.0))).model is not None


def test_the_same_model_twice_is_refused(monkeypatch):
    runs_of(monkeypatch, 2)
    model = trained()
    best = tuning.BestOfRuns(DECLARED)
    with pytest.raises(PrivacyError, match="offered by an earlier run"):
        for _ in best:
            best.offer(model, 1.0)


def test_a_loop_has_to_be_gone_through_once_and_to_its_end(monkeypatch):
    runs_of(monkeypatch, 2)
    best = tuning.BestOfRuns(DECLARED)
    with pytest.raises(PrivacyError, match="not over"):
        best.result()
    with pytest.raises(PrivacyError, match="no run that this model belongs to"):
        best.offer(trained(), 1.0)
    for _ in best:
        best.offer(trained(), 1.0)
        with pytest.raises(PrivacyError, match="no run that this model belongs to"):
            best.offer(trained(), 2.0)
        break
    with pytest.raises(PrivacyError, match="stops early"):
        best.result()
    with pytest.raises(PrivacyError, match="gone through already"):
        list(best)
    lazy = tuning.BestOfRuns(DECLARED)
    with pytest.raises(PrivacyError, match="exactly one model"):
        list(lazy)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mean_runs": 0.5}, "`mean_runs`"),
        ({"mean_runs": "ten"}, "`mean_runs`"),
        ({"mean_runs": math.nan}, "`mean_runs`"),
        ({"mean_runs": True}, "`mean_runs`"),
        ({"distribution": "uniform"}, "`distribution`"),
        ({"score_noise_multiplier": 0}, "`score_noise_multiplier`"),
        ({"score_noise_multiplier": "loud"}, "`score_noise_multiplier`"),
        ({"declared": ()}, "`declared`"),
        ({"declared": 3.0}, "`declared`"),
        ({"declared": [Release("unprotected", 0.0, 1)]}, "`declared`"),
        ({"declared": [Release("poisson", 1.0, 0, sampling_rate=0.1)]}, "`declared`"),
    ],
)
def test_wrong_arguments_are_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        tuning.BestOfRuns(settings.pop("declared", DECLARED), **settings)


def test_a_score_that_is_no_number_is_refused():
    model = trained()
    for score in ("high", None, [1, 2]):
        with pytest.raises(ValueError, match="`score` must be a number"):
            offering(model, score=score)


def test_what_is_no_model_or_function_is_refused():
    with pytest.raises(ValueError, match="`model` must be a Keras model"):
        offering("model")
    for name in ("train", "score"):
        given = {"train": abs, "score": abs} | {name: 3}
        with pytest.raises(ValueError, match=f"`{name}` must be a function"):
            tuning.select(given["train"], [1], score=given["score"], declared=DECLARED)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"batch_size": 0}, "batch_size"), ({"noise_multiplier": -1.0}, "noise_multiplier")],
)
def test_a_plan_checks_its_arguments(settings, name):
    plan = {"num_examples": 64, "batch_size": 16, "noise_multiplier": 1.0, "epochs": 1}
    with pytest.raises(ValueError, match=f"`{name}`"):
        tuning.plan(**plan | settings)


def test_a_plan_is_what_fit_costs():
    (planned,) = DECLARED
    model = tiny.compiled()
    model.fit(X, Y, batch_size=16, verbose=0)
    (made,) = model.optimizer.ledger
    for field in ("sampler", "noise_multiplier", "steps", "sampling_rate", "num_examples"):
        assert getattr(planned, field) == getattr(made, field)


# -- private scores ------------------------------------------------------------------------------


def test_a_noisy_mean_has_noise_of_the_stated_size():
    values = np.repeat([0.0, 1.0], 50)
    drawn = np.array([tuning.noisy_mean(values, 5.0) for _ in range(4000)])
    # Five standard deviations: wrong once in a million times.
    assert drawn.mean() == pytest.approx(0.5, abs=5 * 0.05 / math.sqrt(4000))
    assert drawn.std() == pytest.approx(0.05, rel=5 / math.sqrt(8000))
    assert stats.kstest((drawn - 0.5) / 0.05, "norm").pvalue > 1e-6


def test_rule_07_the_noise_on_a_score_cant_be_replayed():
    keras.utils.set_random_seed(0)
    first = tuning.noisy_mean([1.0], 1.0)
    keras.utils.set_random_seed(0)
    assert tuning.noisy_mean([1.0], 1.0) != first


@pytest.mark.parametrize("values", [[], [2.0], [-0.1], [math.nan], "accuracy", [[1.0]], 1.0])
def test_values_that_one_example_could_stretch_are_refused(values):
    with pytest.raises(ValueError, match="`values` must be one number"):
        tuning.noisy_mean(values, 1.0)


@pytest.mark.parametrize("sigma", [0, -1, math.inf, None, "1"])
def test_a_score_without_noise_is_refused(sigma):
    with pytest.raises(ValueError, match="`noise_multiplier` must be a finite number above 0"):
        tuning.noisy_mean([1.0], sigma)


def test_a_score_from_private_data_is_paid_for(monkeypatch):
    runs_of(monkeypatch, 1)
    settings = {"declared": DECLARED, "mean_runs": 3, "score": lambda m: 1.0}
    free = tuning.select(lambda c: trained(), [1], **settings)
    paid = tuning.select(lambda c: trained(), [1], **settings, score_noise_multiplier=2.0)
    both = (*DECLARED, Release("unknown", 2.0, 1))
    wanted = selection_loss(both, Repetition("logarithmic", 3)).epsilon(1e-3)
    assert paid.epsilon(1e-3) == wanted > free.epsilon(1e-3)
    report = keras_dp.privacy_report(paid.model, delta=1e-3)
    assert report.epsilon["pld"] == wanted
    assert "private data, with noise of sigma = 2" in str(report)
    assert any("noise of sigma = 2.0 only" in a["text"] for a in report.assumptions)


# -- in the statement ----------------------------------------------------------------------------


def chosen(**settings):
    return tuning.select(
        lambda c: trained(),
        [1],
        score=lambda m: 1.0,
        declared=DECLARED,
        **{"mean_runs": 2, "distribution": "geometric"} | settings,
    )


@pytest.fixture(scope="module")
def selected():
    """A choice that tests look at, and leave as it is."""
    return chosen()


def test_rule_13_the_statement_of_a_chosen_model_counts_and_names_the_choice(selected):
    report = keras_dp.privacy_report(selected.model, delta=1e-3)
    wanted = selected.epsilon(1e-3)
    assert report.epsilon == {"pld": wanted, "rdp": wanted}
    runs = [r for r in selected.model.optimizer.ledger if r.choice is None]
    assert wanted > accounting.ledger_epsilon(runs, 1e-3, "rdp")
    assert report.tuning_covered and not any("hyper-param" in t for t in report.not_covered)
    text, data = str(report), json.loads(report.to_json())
    for said in (
        "best of several private runs",
        "geometric distribution, 2 on average",
        "sigma = 1",
    ):
        assert said in text
    assert "privacy loss distributions;" not in text
    assert data["selections"][0]["distribution"] == "geometric" and data["tuning_covered"] is True
    loss = selection_loss(DECLARED, Repetition("geometric", 2))
    assert report.risk == risk.attack_risk(loss, delta=1e-3)
    assert all(
        a.advantage < b.advantage and a.epsilon < b.epsilon
        for a, b in zip(report.attack_risk, report.attack_risk[1:], strict=False)
    )
    assert report.epsilon_if_shuffled["pld"] > wanted


@pytest.mark.thorough
def test_training_on_after_the_choice_is_added():
    selected = chosen()
    model = selected.model
    before = keras_dp.privacy_report(model, delta=1e-3).epsilon["pld"]
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    (release,) = (r for r in model.optimizer.ledger if r.choice is None)
    further = [release.with_steps(release.steps - 4)]
    wanted = selection_loss(DECLARED, Repetition("geometric", 2), further).epsilon(1e-3)
    report = keras_dp.privacy_report(model, delta=1e-3)
    assert report.epsilon["pld"] == pytest.approx(wanted)
    assert model.optimizer.get_epsilon(1e-3) == pytest.approx(wanted)
    assert wanted > before
    model.compile("sgd", loss="mse")
    model.fit(X, Y, verbose=0)
    assert not keras_dp.privacy_report(model, delta=1e-3).private


def test_a_candidate_draws_what_a_function_for_keras_tuner_asks_for():
    def build(hp):
        with hp.conditional_scope("kind", ["a"]):
            kind = hp.Choice("kind", ["a", "b"], default="a")
        return (
            kind,
            hp.Int("units", min_value=16, max_value=64, step=16),
            hp.Int("any", 1, 3),
            hp.Int("doubled", 2, 16, step=2, sampling="log"),
            hp.Int("log", 1, 100, sampling="log"),
            hp.Float("rate", 1e-3, 1.0, sampling="log"),
            hp.Float("late", 1e-3, 1.0, sampling="reverse_log"),
            hp.Float("part", 0.0, 0.5, step=0.25),
            hp.Boolean("on", default=True),
            hp.Fixed("set", 7),
        )

    runs = [(hp := tuning.Candidate(), build(hp)) for _ in range(400)]
    kinds, units, some, doubled, log, rate, late, part, on, fixed = zip(
        *(found for _, found in runs), strict=True
    )
    assert set(kinds) == {"a", "b"} and set(on) == {True, False} and set(fixed) == {7}
    assert set(units) == {16, 32, 48, 64} and set(some) == {1, 2, 3}
    assert set(doubled) == {2, 4, 8, 16} and set(part) == {0.0, 0.25, 0.5}
    assert all(isinstance(v, int) for v in (*units, *some, *doubled, *log))
    assert min(log) >= 1 and max(log) <= 100 and np.mean(np.array(log) <= 10) > 0.4
    assert 0.4 < np.mean(np.array(rate) < np.sqrt(1e-3)) < 0.6
    assert 0.4 < np.mean(np.array(late) > 1.001 - np.sqrt(1e-3)) < 0.6
    hp, found = runs[0]
    assert build(hp) == found and hp.get("units") == found[1] and len(hp.values) == 10
    assert build(tuning.Candidate(hp.values)) == found
    for wrong in (
        lambda hp: hp.Float("a", 1, 0),
        lambda hp: hp.Float("a", 0, 1, sampling="log"),
        lambda hp: hp.Float("a", 0, 1, step=0),
        lambda hp: hp.Float("a", 0, 1, sampling="any"),
        lambda hp: hp.Float("a", 0, math.inf),
        lambda hp: hp.Int("a", 0.5, 2),
        lambda hp: hp.Choice("a", []),
        lambda hp: hp.get("a"),
    ):
        with pytest.raises(ValueError, match="'a'"):
            wrong(tuning.Candidate())


def test_rule_16_the_choice_follows_the_weights_into_every_file_and_model(selected, tmp_path):
    wanted = selected.epsilon(1e-3)
    model = selected.model
    assert model.optimizer.get_epsilon(1e-3) == pytest.approx(wanted)
    assert model.optimizer.get_epsilon(1e-3, "rdp", 2) == pytest.approx(selected.epsilon(1e-3, 2))
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    other = trained()
    alone = other.optimizer.get_epsilon(1e-3, "rdp")
    other.load_weights(tmp_path / "m.weights.h5")
    for found in (loaded, other):
        assert tuning.procedure_of(found) == selected.procedure
        report = keras_dp.privacy_report(found, delta=1e-3)
        assert report.epsilon["pld"] == pytest.approx(found.optimizer.get_epsilon(1e-3))
        assert report.selections[0]["distribution"] == "geometric"
    assert loaded.optimizer.get_epsilon(1e-3) == pytest.approx(wanted)
    assert other.optimizer.get_epsilon(1e-3) > max(wanted, alone)
    assert loaded.optimizer.ledger.steps == 4  # a choice is no step
    again = loaded.optimizer.ledger.merge(model.optimizer.ledger)  # one choice, not two
    assert accounting.ledger_epsilon(again, 1e-3) == pytest.approx(wanted)


@pytest.mark.thorough
def test_a_budget_knows_of_the_choice():
    model = chosen().model
    spent = model.optimizer.get_epsilon(1e-3)
    with pytest.raises(keras_dp.PrivacyBudgetExceeded):
        budget = keras_dp.PrivacyBudget(epsilon=spent * 0.99, delta=1e-3)
        model.fit(X, Y, batch_size=16, verbose=0, callbacks=[budget])
    budget = keras_dp.PrivacyBudget(epsilon=spent * 1.3, delta=1e-3)
    model.fit(X, Y, batch_size=16, epochs=20, verbose=0, callbacks=[budget])
    assert 4 < model.optimizer.ledger.steps < 80
    assert spent * 1.1 < model.optimizer.get_epsilon(1e-3) <= spent * 1.3


def test_a_result_that_is_asked_for_twice_is_paid_for_once():
    best = tuning.BestOfRuns(DECLARED, mean_runs=1, distribution="geometric")
    for _ in best:
        best.offer(trained(), 1.0)
    first = best.result().model.optimizer.get_epsilon(1e-3)
    assert best.result().model.optimizer.get_epsilon(1e-3) == first


def test_a_choice_is_read_back_from_json_as_it_was(selected):
    ledger = selected.model.optimizer.ledger
    assert PrivacyLedger.from_json(ledger.to_json()) == ledger
    (choice,) = (r for r in ledger if r.choice is not None)
    with pytest.raises(ValueError, match="`choice` is for the sampler 'choice'"):
        dataclasses.replace(choice, sampler="unknown")
    with pytest.raises(ValueError, match="`choice` is for the sampler 'choice'"):
        choice.with_steps(2)


@pytest.mark.thorough
def test_a_chosen_model_and_another_are_stated_together(selected):
    other = trained()
    report = keras_dp.privacy_report([selected.model, other], delta=1e-3)
    wanted = selection_loss(DECLARED, Repetition("geometric", 2), other.optimizer.ledger)
    assert report.epsilon["pld"] == pytest.approx(wanted.epsilon(1e-3))
    assert not report.tuning_covered and any("hyper-param" in t for t in report.not_covered)
    two = keras_dp.privacy_report([selected.model, chosen().model], delta=1e-3)
    assert two.tuning_covered and two.epsilon["pld"] > report.risk.epsilon * 0.99


def test_a_run_that_was_passed_over_is_doubted_when_it_is_stated(monkeypatch):
    runs_of(monkeypatch, 2)
    models = []
    tuning.select(
        lambda c: models.append(trained()) or models[-1],
        [1],
        score=lambda m: float(len(models)),
        declared=DECLARED,
    )
    report = keras_dp.privacy_report(models[0], delta=1e-3)
    assert any("one of several runs of which another was chosen" in d for d in report.warnings)
    assert not keras_dp.privacy_report(models[1], delta=1e-3).warnings


def test_the_file_for_deployment_has_the_statement_with_the_choice(selected, tmp_path):
    keras_dp.save_inference_model(selected.model, tmp_path / "m.keras", delta=1e-3)
    data = json.loads((tmp_path / "m.privacy.json").read_text(encoding="utf-8"))
    assert data["epsilon"]["pld"] == selected.epsilon(1e-3) and data["tuning_covered"] is True


def test_a_chosen_model_can_be_drawn(selected, tmp_path):
    keras_dp.privacy_report(selected.model, delta=1e-3).draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_ledger_is_any_declaration():
    assert offering(trained(), declared=PrivacyLedger([Release("unknown", 0.5, 8)])).model


# -- the command ---------------------------------------------------------------------------------


def run(line, capsys):
    try:
        status = cli.main(line.split())
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


README = "select -n 60000 -b 256 -s 1.1 -e 60"


@pytest.mark.parametrize("distribution", FIGURES)
def test_the_command_says_what_a_choice_costs(distribution, capsys):
    status, out, _ = run(f"{README} --distribution {distribution} --json", capsys)
    data = json.loads(out)
    assert status == 0 and data["mean_runs"] == 10
    assert data["epsilon"] == pytest.approx(FIGURES[distribution], abs=1e-2)
    assert data["epsilon_by_distribution"] == pytest.approx(FIGURES, abs=1e-2)
    assert data["epsilon"] < data["epsilon_in_a_row"] < 9.58
    text = run(f"{README} --distribution {distribution}", capsys)[1]
    assert f"for the best of 10 runs on average ({distribution})" in text


def test_the_command_counts_a_noisy_score_and_people(capsys):
    plain, noisy, people = (
        json.loads(run(f"{README} {more} --json", capsys)[1])["epsilon"]
        for more in ("", "--score-noise 2", "-k 2")
    )
    assert plain < noisy and 2 * plain < people


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--runs 0.5", "--runs: must be a number from 1 to 10000"),
        ("--runs many", "--runs: must be a number"),
        ("--score-noise 0", "--score-noise: must be a finite number"),
        ("--distribution uniform", "invalid choice: 'uniform'"),
    ],
)
def test_the_command_refuses_wrong_arguments_by_name(wrong, said, capsys):
    status, out, error = run(f"{README} {wrong}", capsys)
    assert (status, out) == (2, "") and said in error
