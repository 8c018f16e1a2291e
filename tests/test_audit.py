"""A white-box audit: how much an attacker who sees the weights really learns.

Every coordinate of a linear model belongs to one possible example, whose
gradient is clipped to exactly C; half of the examples take part. From the final
weights the attacker guesses who did. Four steps over the full batch with
sigma = 2 are one Gaussian mechanism with mu = 1, so the right answer is
epsilon = 4.377 at delta = 1e-5; the attack's lower confidence bound must come
close to that and not pass it. The seed is fixed: the outcome is always the same.
"""

import keras
import numpy as np
import pytest
from reference import noiseless_optimizer, update_on_batch
from scipy import optimize, stats

import keras_dp
from keras_dp.clipping import AdaptiveClipping, Clip
from keras_dp.noise import NoiseSource

DELTA, EPSILON = 1e-5, 4.377
COORDINATES, STEPS, SIGMA, C = 2000, 4, 2.0, 0.5
RUNS, SEED = 5, 1


def gaussian_epsilon(mu):
    """epsilon of a mu-GDP mechanism at DELTA."""

    def excess(epsilon):
        left = stats.norm.cdf(mu / 2 - epsilon / mu)
        return left - np.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)) - DELTA

    return 0.0 if excess(0.0) < 0 else optimize.brentq(excess, 0.0, 200.0)


def upper_rate(events, trials):
    """Clopper-Pearson upper bound, at 99.95 %; two of them hold with 99.9 %."""
    return stats.beta.ppf(0.9995, events + 1, trials - events)


def lower_bound(members, others):
    """A 99.9 % lower bound on epsilon, from the scores of who took part and who did not."""
    threshold = STEPS / 2
    false_alarms = upper_rate(np.sum(others > threshold), len(others))
    misses = upper_rate(np.sum(members <= threshold), len(members))
    mu = stats.norm.isf(false_alarms) + stats.norm.isf(misses)
    return gaussian_epsilon(mu) if mu > 0 else 0.0


def linear_model(branches, policy):
    """The sum of as many linear layers: each example's gradient is its row in every one."""
    x = keras.Input((COORDINATES,))
    made = [keras.layers.Dense(1, use_bias=False, dtype=policy)(x) for _ in range(branches)]
    return keras.Model(x, made[0] if branches == 1 else keras.layers.Add(dtype="float32")(made))


def audit(gradients="ghost", *, branches=1, policy="float32", runs=RUNS, seed=SEED, **arguments):
    """Scores of who took part and who did not."""
    included = np.arange(0, COORDINATES, 2)
    x = np.zeros((len(included), COORDINATES), "float32")
    x[np.arange(len(included)), included] = 7 * C
    members, others = [], []
    model = linear_model(branches, policy)
    optimizer = keras_dp.DPSGD(
        1.0, max_grad_norm=C, noise_multiplier=SIGMA, gradients=gradients, seed=seed, **arguments
    )
    loss = lambda y, y_pred: keras.ops.sum(y_pred, axis=-1)  # noqa: E731
    model.compile(optimizer, loss=loss)
    taken = np.isin(np.arange(COORDINATES), included)
    for run in range(runs):
        model.set_weights([np.zeros((COORDINATES, 1))] * branches)
        model.fit(x, np.zeros(len(x)), batch_size=len(x), epochs=STEPS, verbose=0)
        if run == 0:
            assert optimizer.get_epsilon(DELTA) == pytest.approx(EPSILON, abs=1e-3)
        assert optimizer.engine == gradients
        together = np.sum(model.get_weights(), axis=0) / np.sqrt(branches)
        scores = -np.ravel(together) * len(x) / C
        members.append(scores[taken])
        others.append(scores[~taken])
    return np.concatenate(members), np.concatenate(others)


def test_the_audit_knows_the_gaussian_mechanism():
    assert gaussian_epsilon(1.0) == pytest.approx(4.377178, abs=1e-5)


# Every engine, clipping mode and dtype policy. Adaptive clipping stands still here, so
# that the attacker knows C; the noise that its count is paid with is there all the same.
AUDITED = {
    "ghost": {},
    "vectorized": {"gradients": "vectorized"},
    "loop": {"gradients": "loop", "runs": 3},
    "per layer": {"clipping": "per_layer", "branches": 2},
    "automatic": {"clipping": "automatic"},
    "adaptive": {"clipping": AdaptiveClipping(rate=1e-9)},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
    "mixed_float16": {"policy": "mixed_float16"},
    "float64": {"policy": "float64"},
    "microbatches": {"microbatch_size": 300},
}


@pytest.mark.parametrize("case", AUDITED)
@pytest.mark.one_in(12)
@pytest.mark.thorough
def test_the_weights_leak_what_the_accountant_says_and_no_more(case):
    members, others = audit(**AUDITED[case])
    assert (3.0 if case == "loop" else 3.3) < lower_bound(members, others) <= EPSILON
    for scores, mean in ((members, STEPS), (others, 0)):
        assert scores.std() == pytest.approx(SIGMA * np.sqrt(STEPS), rel=0.05)
        assert scores.mean() == pytest.approx(mean, abs=0.3)


def _noise(factor):
    original = NoiseSource.draw
    return NoiseSource, "draw", lambda self, shapes, s: original(self, shapes, s * factor)


def _unclipped():
    return Clip, "__call__", lambda self, norms, *bound: keras.ops.ones_like(norms)


@pytest.mark.parametrize(
    ("mutant", "leaks"),
    [
        (lambda: _noise(0.5), "more"),
        (lambda: _noise(0.7), "more"),
        (_unclipped, "more"),
        (lambda: _noise(2.0), "less"),
    ],
    ids=["half the noise", "noise x 0.7", "not clipped", "twice the noise"],
)
@pytest.mark.one_in(4)
@pytest.mark.thorough
def test_the_audit_finds_wrong_training_out(mutant, leaks, monkeypatch):
    monkeypatch.setattr(*mutant())
    bound = lower_bound(*audit())
    assert bound > EPSILON if leaks == "more" else bound < 3.3


# -- neighbouring data sets ---------------


def dense_model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])


def reused_model():
    shared = keras.layers.Dense(3, activation="tanh")
    x = keras.Input((3,))
    return keras.Model(x, keras.layers.Dense(1)(shared(shared(shared(x)))))


def masked_model():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Embedding(5, 4, mask_zero=True),
            keras.layers.Dense(1),
        ]
    )


def penalised_model():
    x = keras.Input((3,))
    h = keras.layers.Dense(4, activity_regularizer=keras.regularizers.L2(3.0))(x)
    return keras.Model(x, keras.layers.Dense(1)(h))


ROWS = 6
RANDOM = np.random.default_rng(0)
X = 3 * RANDOM.normal(size=(ROWS, 3)).astype("float32")
Y = RANDOM.normal(size=(ROWS, 1)).astype("float32")


def _with_row(x, row, value):
    x = x.copy()
    x[row] = value
    return x


TOKENS = RANDOM.integers(1, 5, (ROWS, 6)) * (np.arange(6) < np.arange(1, ROWS + 1)[:, None])
WEIGHTS = np.array([1, 0, 50, 1e-3, 1, 2], "float32")
CASES = {
    "plain": (dense_model, X, Y, None),
    "a row of NaN": (dense_model, _with_row(X, 2, np.nan), Y, None),
    "an infinite row": (dense_model, _with_row(X, 2, np.inf), Y, None),
    "a row that overflows": (dense_model, _with_row(X, 2, 1e30), Y, None),
    "sample weights": (dense_model, X, Y, WEIGHTS),
    "a reused layer": (reused_model, X, Y, None),
    "masks": (masked_model, TOKENS, RANDOM.normal(size=(ROWS, 6, 1)), None),
    "activity regularizer": (penalised_model, X, Y, None),
}


def changes_of(model, x, y, weights, left_out):
    """How far leaving out one row moves the clipped sum, for each of the rows in `left_out`."""
    start = model.get_weights()

    def clipped(rows):
        model.set_weights(start)
        w = None if weights is None else weights[rows]
        update = update_on_batch(model, x[rows], y[rows], w)
        return np.concatenate([np.ravel(u) for u in update]) * len(rows)

    everyone = clipped(np.arange(ROWS))
    assert np.all(np.isfinite(everyone))
    return {i: np.linalg.norm(everyone - clipped(np.delete(np.arange(ROWS), i))) for i in left_out}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradients", ["ghost", "vectorized", "loop"])
@pytest.mark.one_in(8)
@pytest.mark.thorough
def test_one_example_changes_the_clipped_sum_by_at_most_c(case, gradients):
    build, x, y, weights = CASES[case]
    model = build()
    model.compile(noiseless_optimizer(C, gradients), loss="mse")
    changes = changes_of(model, x, y, weights, left_out=(0, 2, 5))
    assert max(changes.values()) <= C * (1 + 1e-4)
    assert max(changes.values()) > 0.99 * C  # the bound is reached
    assert model.optimizer.engine == gradients
    if "row" in case:  # whose gradient is not finite: it took no part
        assert changes[2] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("gradients", ["ghost", "vectorized"])
@pytest.mark.one_in(2)
def test_the_neighbour_check_sees_a_missing_clip(gradients, monkeypatch):
    monkeypatch.setattr(*_unclipped())
    model = dense_model()
    model.compile(noiseless_optimizer(C, gradients), loss="mse")
    assert max(changes_of(model, X, Y, None, range(ROWS)).values()) > 2 * C
