"""Audits: their statistics hold, right training passes, broken training is found out.

All seeds are fixed, so the outcome is always the same. What a right
implementation risks under other seeds is the stated confidence: a bound above
the truth in at most `1 - confidence` of all audits.
"""

import keras
import numpy as np
import pytest
import tiny
from scipy import special, stats

import keras_dp
from keras_dp import auditing
from keras_dp.clipping import Clip
from keras_dp.noise import NoiseSource

DELTA = 1e-5
GAUSSIAN = 4.377178  # epsilon of one Gaussian mechanism with sigma 1, at DELTA

# -- guesses -----------------------------------------------------------------------------------


def chance_in_the_paper(epsilon, correct, guesses, canaries, delta):
    """The p-value of arXiv 2305.08846, appendix D, sum by sum."""
    q = 1 / (1 + np.exp(-epsilon))
    pmf = [stats.binom.pmf(k, guesses, q) for k in range(guesses + 1)]
    beta = sum(pmf[correct:])
    alpha = max(sum(pmf[correct - i : correct]) / i for i in range(1, correct + 1))
    return beta + 2 * canaries * delta * alpha


@pytest.mark.parametrize("counts", [(100, 100, 100), (80, 100, 100), (30, 40, 400), (57, 100, 100)])
@pytest.mark.parametrize("delta", [1e-6, 1e-3])
def test_at_the_bound_the_papers_p_value_is_what_the_confidence_leaves(counts, delta):
    bound = auditing.guesses_lower_bound(*counts, delta=delta, confidence=0.9)
    if counts[0] == 57 and delta == 1e-3:
        assert bound == 0 and chance_in_the_paper(0, *counts, delta) > 0.1
    else:
        assert bound > 0
        assert chance_in_the_paper(bound, *counts, delta) == pytest.approx(0.1, rel=1e-5)


def test_a_thousand_right_guesses_give_what_theory_gives():
    """Without delta, q^1000 = 0.05."""
    bound = auditing.guesses_lower_bound(1000, 1000, 1000, delta=1e-12)
    assert bound == pytest.approx(special.logit(0.05 ** (1 / 1000)), abs=1e-5)


def test_the_bound_of_guesses_is_monotone():
    def bounds(of):
        return [auditing.guesses_lower_bound(**{**common, **more}) for more in of]

    common = {"correct": 180, "guesses": 200, "canaries": 300, "delta": 1e-4}
    rising = [
        [{"correct": c} for c in (0, 90, 120, 150, 180, 199, 200)],
        [{"canaries": m} for m in (10_000, 2000, 500, 200)],
        [{"delta": d} for d in (0.1, 1e-2, 1e-3, 1e-4, 1e-6)],
        [{"confidence": c} for c in (0.999, 0.99, 0.9, 0.5)],
    ]
    for case in rising:
        found = bounds(case)
        assert found == sorted(found) and found[0] < found[-1]


@pytest.mark.parametrize("canaries", [50, 1000])
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 1e-2])
def test_the_p_value_rises_with_epsilon(canaries, delta):
    """So the bound is the only place where it crosses the doubt."""
    for share in (0.5, 0.7, 1.0):
        chances = [
            auditing.bounds._chance(e, int(share * canaries), canaries, canaries, delta)
            for e in np.linspace(0, 6, 30)
        ]
        assert np.all(np.diff(chances) > -1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("delta", [1e-9, 0.003])
def test_randomized_response_is_overrated_no_more_often_than_stated(epsilon, delta):
    """The worst (epsilon, delta)-DP there is, in exact probabilities: randomized response that
    reveals each example, or all of them at once, with probability delta."""
    canaries, confidence = 200, 0.9
    honest = special.expit(epsilon)
    # The fewest right guesses with which the audit would say more than epsilon.
    refuting = next(
        v
        for v in range(canaries + 2)
        if v > canaries or auditing.bounds._chance(epsilon, v, canaries, canaries, delta) < 0.1
    )
    if refuting <= canaries:
        bound = auditing.guesses_lower_bound(
            refuting, canaries, canaries, delta=delta, confidence=confidence
        )
        assert bound > epsilon
    each = stats.binom.sf(refuting - 1, canaries, delta + (1 - delta) * honest)
    at_once = delta + (1 - delta) * stats.binom.sf(refuting - 1, canaries, honest)
    assert max(each, at_once) <= 0.1
    assert delta > 1e-4 or max(each, at_once) > 0.05  # and the test is not idle


def test_choosing_the_share_of_guesses_keeps_the_confidence(monkeypatch):
    """Randomized response, the more certain answers first: 300 audits at 90 %."""
    epsilon, canaries = 1.0, 200
    random = np.random.default_rng(0)
    # Asked for epsilon alone, the bound need not be searched for.
    monkeypatch.setattr(
        auditing.bounds,
        "guesses_lower_bound",
        lambda v, r, m, delta, confidence: float(
            auditing.bounds._chance(epsilon, v, r, m, delta) < 1 - confidence
        ),
    )
    refuted = 0.0
    for _ in range(300):
        coins = random.random(canaries) < 0.5
        guesses = coins ^ (random.random(canaries) > special.expit(epsilon))
        gain = np.where(guesses, 1, -1) * random.random(canaries)
        refuted += auditing.bounds.best_guesses(gain, coins, 1e-9, 0.9)[2]
    assert 0 < refuted <= 30


# -- scores ------------------------------------------------------------------------------------


def gaussian_scores(size, mu=1.0, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(mu, 1, size), random.normal(0, 1, size)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_gaussian_bound_comes_close_to_the_truth_and_stays_below(threshold):
    bound = auditing.scores_lower_bound(*gaussian_scores(20_000), delta=DELTA, threshold=threshold)
    assert 0.9 * GAUSSIAN < bound <= GAUSSIAN


@pytest.mark.parametrize("method", ["gaussian", "rates"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_scores_overrate_epsilon_no_more_often_than_stated(method, threshold):
    """40 audits with 80 %."""
    above = sum(
        auditing.scores_lower_bound(
            *gaussian_scores(400, seed=k),
            delta=DELTA,
            confidence=0.8,
            method=method,
            threshold=threshold,
        )
        > GAUSSIAN
        for k in range(40)
    )
    assert above <= 8


def test_the_threshold_is_not_chosen_by_the_scores_that_are_bounded():
    """Scores that say nothing, 40 audits with 80 %: the best of all thresholds says too much."""

    def alarms(chosen, bounded):
        found = 0
        for k in range(40):
            inside, outside = gaussian_scores(400, mu=0.0, seed=k)
            found += (
                auditing.bounds.bound_at(
                    auditing.bounds.best_threshold(
                        inside[chosen], outside[chosen], DELTA, 0.8, "gaussian"
                    ),
                    inside[bounded],
                    outside[bounded],
                    DELTA,
                    0.8,
                    "gaussian",
                )
                > 0
            )
        return found

    everything, fifth = slice(None), slice(None, None, 5)
    assert alarms(fifth, np.arange(400) % 5 != 0) <= 8 < alarms(everything, everything)


def test_rates_of_randomized_response():
    random = np.random.default_rng(0)
    right = special.expit(2.0)
    inside = (random.random(50_000) < right).astype(float)
    outside = (random.random(50_000) > right).astype(float)
    bound = auditing.scores_lower_bound(inside, outside, delta=DELTA, method="rates")
    assert 1.9 < bound <= 2.0


@pytest.mark.parametrize("method", ["gaussian", "rates"])
def test_scores_that_say_nothing_give_nothing(method):
    inside, outside = gaussian_scores(1000, mu=0.0)
    assert auditing.scores_lower_bound(inside, outside, delta=DELTA, method=method) == 0
    assert auditing.scores_lower_bound(np.ones(50), np.ones(50), delta=DELTA, method=method) == 0


@pytest.mark.parametrize("method", ["gaussian", "rates"])
def test_scores_that_say_all_are_bounded_by_their_number(method):
    few, many = (
        auditing.scores_lower_bound(np.ones(n), np.zeros(n), delta=DELTA, method=method)
        for n in (100, 1000)
    )
    assert 1 < few < many < 100


# -- the white-box audit -----------------------------------------------------------------------


def white_box(**arguments):
    settings = {"noise_multiplier": 2.0, "delta": DELTA, "seed": 1, "verbose": 0}
    settings |= {"canaries": 1000, "runs": 4}
    return auditing.white_box_audit(**{**settings, **arguments})


def noise_times(factor):
    original = NoiseSource.draw
    return NoiseSource, "draw", lambda self, shapes, s: original(self, shapes, s * factor)


def unclipped():
    return Clip, "__call__", lambda self, norms, *bound: keras.ops.ones_like(norms)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_grad_norm": 0.1, "microbatch_size": 250},
        {"gradients": "vectorized", "compile_arguments": {"steps_per_execution": 1}},
    ],
    ids=["default", "microbatches", "vectorized"],
)
@pytest.mark.one_in(3)
def test_right_training_passes_the_white_box_audit_and_barely(settings):
    result = white_box(**settings)
    assert result.claimed_epsilon == pytest.approx(GAUSSIAN, abs=1e-4)
    assert result.consistent and result.epsilon_lower_bound > 3.2
    assert (result.canaries, result.confidence, result.delta) == (4000, 0.999, DELTA)
    assert "4 steps" in result.method


@pytest.mark.parametrize(
    "mutant",
    [lambda: noise_times(0.5), lambda: noise_times(0.8), unclipped],
    ids=["half the noise", "a fifth less noise", "not clipped"],
)
@pytest.mark.one_in(4)
def test_broken_training_is_refuted_by_the_white_box_audit(mutant, monkeypatch):
    monkeypatch.setattr(*mutant())
    result = white_box()
    assert not result.consistent
    assert "REFUTED" in str(result) and "report a bug" in str(result)


@pytest.mark.thorough
def test_the_white_box_audit_takes_the_steps_it_is_told(capsys):
    result = white_box(noise_multiplier=1.5, steps=3, canaries=101, runs=2, verbose=1)
    assert "2/2" in capsys.readouterr().out
    assert result.claimed_epsilon == pytest.approx(
        keras_dp.accounting.compute_epsilon(
            num_examples=1, batch_size=1, noise_multiplier=1.5, steps=3, delta=DELTA
        ),
        abs=1e-3,
    )
    assert white_box(noise_multiplier=0.5, canaries=20, runs=1).method.count("1 step in") == 1


# -- the audit of a model and data of one's own ---------------------------------------------------

CANARIES, C = 400, 0.5
ROWS = 100 + int(np.random.default_rng(0).integers(0, 2, CANARIES).sum())  # in full batches


def linear_model(sigma=2.0):
    model = keras.Sequential(
        [
            keras.Input((CANARIES,)),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
        ]
    )
    model.compile(
        keras_dp.DPSGD(1.0, max_grad_norm=C, noise_multiplier=sigma, seed=1),
        loss=lambda y, y_pred: keras.ops.sum(y_pred, axis=-1),
    )
    return model


def easy_audit(make_model=linear_model, **arguments):
    """Canaries that touch one weight each, among data that touch none."""
    canaries = 7 * C * np.eye(CANARIES), np.zeros(CANARIES)
    settings = {"delta": DELTA, "batch_size": ROWS, "epochs": 2, "seed": 0, "verbose": 0}
    x, y = np.zeros((100, CANARIES)), np.zeros(100)
    return auditing.audit(make_model, x, y, canaries, **{**settings, **arguments})


@pytest.mark.thorough
def test_right_training_passes_the_audit_which_is_not_blind():
    models = []

    def make_model():
        models.append(linear_model())
        return models[-1]

    result = easy_audit(make_model)
    assert result.consistent
    assert result.epsilon_lower_bound > 0.1
    (model,) = models
    assert result.claimed_epsilon == model.optimizer.get_epsilon(DELTA)
    (release,) = model.optimizer.ledger
    assert release.sampler == "poisson" and release.num_examples == ROWS
    assert result.canaries == CANARIES and result.correct <= result.guesses <= CANARIES
    assert "proves nothing" in str(result) and f"{result.epsilon_lower_bound:.4f}" in str(result)


@pytest.mark.parametrize("mutant", [lambda: noise_times(0.1), unclipped], ids=["noise", "clip"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_badly_broken_training_is_refuted_by_the_audit(mutant, monkeypatch):
    monkeypatch.setattr(*mutant())
    result = easy_audit()
    assert not result.consistent and "REFUTED" in str(result)


@pytest.mark.thorough
def test_a_score_of_ones_own_is_the_attack():
    asked = []

    def weights(model, x, y):
        asked.append(model.optimizer.ledger.steps)
        return -np.ravel(model.get_weights()[0])

    def blind(model, x, y):
        return np.zeros(len(x))

    by_loss = easy_audit()
    assert easy_audit(score=weights).epsilon_lower_bound == by_loss.epsilon_lower_bound
    assert asked[0] == 0 < asked[1] and len(asked) == 2
    assert easy_audit(score=blind).epsilon_lower_bound == 0


@pytest.mark.thorough
def test_a_model_of_several_inputs_and_outputs_is_audited():
    def make_model():
        a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
        h = keras.layers.Concatenate()([a, b])
        outputs = {"p": keras.layers.Dense(1)(h), "q": keras.layers.Dense(3)(h)}
        model = keras.Model({"a": a, "b": b}, outputs)
        model.compile(
            tiny.sgd(),
            loss={"p": "mse", "q": "sparse_categorical_crossentropy"},
            metrics={"p": ["mae"]},
        )
        return model

    random = np.random.default_rng(0)
    x = {"a": random.normal(size=(60, 4)), "b": random.normal(size=(60, 2))}
    y = {"p": random.normal(size=(60, 1)), "q": random.integers(0, 3, 60)}
    canaries = auditing.make_canaries(x, y, count=20, kind="noise", seed=0)
    result = auditing.audit(
        make_model, x, y, canaries, delta=DELTA, batch_size=20, epochs=1, verbose=0
    )
    assert result.canaries == 20 and result.claimed_epsilon > 0


def test_the_loss_of_each_canary_is_its_own():
    x, y = tiny.data(n=5)
    model = tiny.compiled()
    found = -auditing.one_run._minus_loss(model, x, y)
    np.testing.assert_allclose(found, np.ravel((model.predict(x, verbose=0) - y) ** 2), rtol=1e-5)


# -- canaries ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y",
    [
        np.arange(90) % 5,
        np.eye(4, dtype="float32")[np.arange(90) % 4],
        (np.arange(90) % 2).reshape(-1, 1).astype("float32"),
        np.linspace(-1, 1, 90, dtype="float32").reshape(-1, 1),
    ],
    ids=["integers", "one-hot", "zeros and ones", "numbers"],
)
def test_mislabelled_canaries_have_a_target_that_occurs_but_is_not_theirs(y):
    x = np.arange(90, dtype="float32").reshape(-1, 1)
    got_x, got_y = auditing.make_canaries(x, y, count=80, seed=0)
    rows = got_x[:, 0].astype(int)
    assert len(set(rows)) == 80
    assert got_y.shape == (80, *y.shape[1:]) and got_y.dtype == y.dtype
    for row, wrong in zip(rows, got_y, strict=True):
        assert np.any(wrong != y[row])
        assert any(np.array_equal(wrong, known) for known in y)
    other = auditing.make_canaries(x, y, count=80, seed=1)
    again = auditing.make_canaries(x, y, count=80, seed=0)
    assert np.array_equal(again[0], got_x) and not np.array_equal(other[0], got_x)


def test_noise_canaries_look_like_the_data():
    random = np.random.default_rng(0)
    x = {"a": random.normal([0, 50], [1, 5], (500, 2)), "b": random.integers(3, 9, (500, 4))}
    made, y = auditing.make_canaries(x, np.arange(500), count=1000, kind="noise", seed=1)
    np.testing.assert_allclose(made["a"].mean(0), [0, 50], atol=1)
    np.testing.assert_allclose(made["a"].std(0), [1, 5], rtol=0.15)
    assert set(np.unique(made["b"])) == {3, 4, 5, 6, 7, 8} and made["b"].dtype == x["b"].dtype
    assert y.shape == (1000,)
    assert auditing.make_canaries(x, count=3, kind="noise")[1] is None


# -- wrong arguments ---------------------------------------------------------------------------


def trained():
    model = linear_model()
    model.fit(np.zeros((8, CANARIES)), np.zeros(8), batch_size=8, verbose=0)
    return model


def ordinary():
    model = tiny.model()
    model.compile("sgd", "mse")
    return model


def lossless():
    model = keras.Sequential([keras.Input((CANARIES,)), keras.layers.Dense(1)])
    model.compile(tiny.sgd())
    return model


X, Y = np.zeros((9, 2)), np.arange(9) % 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: auditing.guesses_lower_bound(11, 10, 20, delta=DELTA), "`correct`"),
        (lambda: auditing.guesses_lower_bound(5, 30, 20, delta=DELTA), "`guesses`"),
        (lambda: auditing.guesses_lower_bound(5, 10, 0, delta=DELTA), "`canaries`"),
        (lambda: auditing.guesses_lower_bound(5.0, 10, 20, delta=DELTA), "`correct`"),
        (lambda: auditing.guesses_lower_bound(5, 10, 20, delta=0.0), "`delta`"),
        (lambda: auditing.guesses_lower_bound(5, 10, 20, delta=DELTA, confidence=95), "`confid"),
        (lambda: auditing.scores_lower_bound([1] * 9, [1] * 50, delta=DELTA), "`scores_in`"),
        (lambda: auditing.scores_lower_bound([1] * 50, [np.nan] * 50, delta=DELTA), "`scores_out`"),
        (lambda: auditing.scores_lower_bound(["a"], [1] * 50, delta=DELTA), "`scores_in`"),
        (lambda: auditing.scores_lower_bound(X, X, delta=DELTA, method="x"), "`method`"),
        (lambda: auditing.scores_lower_bound(X, X, delta=DELTA, threshold="x"), "`threshold`"),
        (lambda: auditing.make_canaries(X, Y, count=0), "`count`"),
        (lambda: auditing.make_canaries(X, Y, count=10), "`count`"),
        (lambda: auditing.make_canaries(X, Y, count=3, kind="poison"), "`kind`"),
        (lambda: auditing.make_canaries(X, count=3), "needs targets"),
        (lambda: auditing.make_canaries(X, Y * 0, count=3), "alike"),
        (lambda: auditing.make_canaries(np.array(["a"] * 9), Y, count=3, kind="noise"), "type"),
        (lambda: white_box(noise_multiplier=0), "`noise_multiplier`"),
        (lambda: white_box(noise_multiplier="1"), "`noise_multiplier`"),
        (lambda: white_box(steps=0), "`steps`"),
        (lambda: white_box(runs=0), "`runs`"),
        (lambda: white_box(canaries=1), "`canaries`"),
        (lambda: white_box(gradients="x"), "`gradients`"),
        (lambda: easy_audit(ordinary), "DP optimizer"),
        (lambda: easy_audit(lambda: None), "DP optimizer"),
        (lambda: easy_audit(trained), "new model"),
        (lambda: easy_audit(lossless), "`score`"),
        (lambda: easy_audit(score=lambda model, x, y: 1.0), "one number for each"),
        (lambda: easy_audit(epochs=0), "`epochs`"),
        (lambda: easy_audit(batch_size=0), "`batch_size`"),
        (
            lambda: auditing.audit(linear_model, X, Y, X, delta=DELTA, batch_size=1, epochs=1),
            "pair",
        ),
        (
            lambda: auditing.audit(
                linear_model, X, Y, (X[:, :1], Y), delta=DELTA, batch_size=1, epochs=1
            ),
            "structure and the shape",
        ),
        (
            lambda: auditing.audit(
                linear_model, X, Y, (X, None), delta=DELTA, batch_size=1, epochs=1
            ),
            "structure and the shape",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
