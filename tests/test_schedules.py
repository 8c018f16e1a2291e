"""Schedules for sigma and C: what is used, what is recorded, what it costs."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tiny
from keras import ops

import keras_dp
from keras_dp import Release, accounting
from keras_dp.training.schedules import StepSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:train_on_batch can't know"),
    pytest.mark.filterwarnings("ignore:With run_eagerly=True:keras_dp.PrivacyWarning"),
]

DELTA = 1e-5


def falling(step):
    """sigma: 4, 4, 2, 2, 1, 1, 1, ..."""
    return 4.0 / 2 ** min(int(step) // 2, 2)


def releases(ledger):
    """(sigma, C, steps) of each run, in the order of sigma, then C."""
    rows = [(r.noise_multiplier, r.max_grad_norm, r.steps) for r in ledger]
    return sorted(rows, key=lambda row: (-row[0], row[1]))


def wide(optimizer, width=20_000, **compile_args):
    """A model whose weights show the noise: no example has a gradient."""
    model = keras.Sequential(
        [keras.Input((width,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )
    model.compile(optimizer, loss=lambda y, y_pred: 0 * ops.sum(y_pred, axis=-1), **compile_args)
    return model


def deviations(model, steps, batch=2):
    """The noise of each step on the sum, measured."""
    width = model.input_shape[-1]
    x, found = np.zeros((batch, width), "float32"), []
    before = model.get_weights()[0]
    for _ in range(steps):
        model.train_on_batch(x, np.zeros((batch, 1)))
        after = model.get_weights()[0]
        found.append(np.std(after - before) * batch)
        before = after
    return found


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"jit_compile": True}])
@pytest.mark.one_in(4)
def test_each_step_draws_the_noise_of_its_own_sigma_and_c(mode):
    optimizer = keras_dp.DPSGD(1.0, max_grad_norm=lambda step: 1.0 + step, noise_multiplier=falling)
    found = deviations(wide(optimizer, **mode), 6)
    wanted = [falling(k) * (1 + k) for k in range(6)]
    # The deviation of a sample's deviation is 1 / sqrt(2 n) = 0.5 %: six of them.
    np.testing.assert_allclose(found, wanted, rtol=0.03)
    assert releases(optimizer.ledger) == [
        (4.0, 1.0, 1),
        (4.0, 2.0, 1),
        (2.0, 3.0, 1),
        (2.0, 4.0, 1),
        (1.0, 5.0, 1),
        (1.0, 6.0, 1),
    ]


def test_each_step_clips_to_the_c_of_its_own():
    """With one example and no noise to speak of, a step is as long as C."""
    optimizer = keras_dp.DPSGD(
        1.0, max_grad_norm=lambda step: [3.0, 1.0, 0.5][step], noise_multiplier=1e-6
    )
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(optimizer, loss=lambda y, y_pred: 100 * ops.sum(y_pred, axis=-1))
    before = model.get_weights()[0]
    for wanted in (3.0, 1.0, 0.5):
        model.train_on_batch(np.ones((1, 2)), np.zeros((1, 1)))
        after = model.get_weights()[0]
        assert np.linalg.norm(after - before) == pytest.approx(wanted, rel=1e-4)
        before = after


@pytest.mark.parametrize("steps_per_execution", [1, 3])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_a_scheduled_fit_costs_what_its_steps_cost(steps_per_execution):
    x, y = tiny.data(64)
    model = tiny.compiled(
        tiny.sgd(noise_multiplier=falling), steps_per_execution=steps_per_execution
    )
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    ledger = model.optimizer.ledger
    assert releases(ledger) == [(4.0, 1.0, 2), (2.0, 1.0, 2), (1.0, 1.0, 12)]
    by_hand = [
        Release("poisson", sigma, steps=steps, sampling_rate=1 / 8)
        for sigma, steps in ((4.0, 2), (2.0, 2), (1.0, 12))
    ]
    spent = model.optimizer.get_epsilon(DELTA)
    assert spent == accounting.ledger_epsilon(by_hand, DELTA)
    quietest, loudest = (
        accounting.ledger_epsilon([Release("poisson", s, steps=16, sampling_rate=1 / 8)], DELTA)
        for s in (1.0, 4.0)
    )
    assert loudest < spent < quietest


@pytest.mark.thorough
def test_a_keras_schedule_goes_on_where_the_last_fit_and_a_saved_model_stopped(tmp_path):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([10, 25], [4.0, 2.0, 1.0])
    x, y = tiny.data(64)
    model = tiny.compiled(tiny.sgd(noise_multiplier=schedule))
    model.fit(x, y, batch_size=8, verbose=0)  # steps 0 to 7
    model.fit(x, y, batch_size=8, verbose=0)  # to 15: those after step 10 have sigma 2
    assert releases(model.optimizer.ledger) == [(4.0, 1.0, 11), (2.0, 1.0, 5)]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert (
        loaded.optimizer.get_config()["noise_multiplier"]
        == (model.optimizer.get_config()["noise_multiplier"])
    )
    loaded.fit(x, y, batch_size=8, epochs=2, verbose=0)  # to 31
    by_sigma = {sigma: 0 for sigma in (4.0, 2.0, 1.0)}
    for sigma, _, steps in releases(loaded.optimizer.ledger):
        by_sigma[sigma] += steps
    assert by_sigma == {4.0: 11, 2.0: 15, 1.0: 6}
    loaded.train_on_batch(x, y)
    assert loaded.optimizer.ledger.releases[-1].noise_multiplier == 1.0


def test_a_budget_stops_at_the_last_step_that_fits():
    x, y = tiny.data(64)
    model = tiny.compiled(tiny.sgd(noise_multiplier=falling))
    budget = keras_dp.PrivacyBudget(4.0, delta=DELTA, accountant="rdp")
    model.fit(x, y, batch_size=8, epochs=40, callbacks=[budget], verbose=0)
    optimizer = model.optimizer
    assert optimizer.get_epsilon(DELTA, "rdp") <= 4.0
    one_more = optimizer.ledger.merge(optimizer.meter.runs_after(1))
    assert accounting.ledger_epsilon(one_more, DELTA, "rdp") > 4.0


def test_a_budget_without_an_end_of_training_is_refused():
    def endless():
        x, y = tiny.data(8)
        while True:
            yield x, y

    model = tiny.compiled(tiny.sgd(noise_multiplier=falling))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        with pytest.raises(ValueError, match="Pass steps_per_epoch"):
            model.fit(endless(), callbacks=[keras_dp.PrivacyBudget(4.0, delta=DELTA)], verbose=0)
    assert model.optimizer.ledger.steps == 0


@pytest.mark.thorough
def test_a_pass_over_shuffled_batches_has_one_sigma():
    """Each example takes part once in a pass: two sigmas in one would count it twice."""
    x, y = tiny.data(24)
    model = tiny.compiled(tiny.sgd(noise_multiplier=lambda step: 4.0 if step < 4 else 1.0))
    model.fit(keras_dp.ShuffledDataset(x, y, batch_size=8), epochs=3, verbose=0)
    # Passes of three steps: the second began when sigma was 4 still.
    assert releases(model.optimizer.ledger) == [(4.0, 1.0, 6), (1.0, 1.0, 3)]
    passes = [Release("unknown", 4.0, steps=2), Release("unknown", 1.0, steps=1)]
    assert model.optimizer.get_epsilon(DELTA) == accounting.ledger_epsilon(passes, DELTA)


@pytest.mark.thorough
def test_the_journal_counts_each_sigma(tmp_path):
    path = tmp_path / "ledger.jsonl"
    x, y = tiny.data(64)
    model = tiny.compiled(tiny.sgd(noise_multiplier=falling))
    budget = keras_dp.PrivacyBudget(delta=DELTA, accountant="rdp", ledger_path=path)
    model.fit(x, y, batch_size=8, epochs=2, callbacks=[budget], verbose=0)
    written, problems = keras_dp.journal.read(path)
    assert problems == []
    assert releases([r for r in written if r.steps]) == releases(model.optimizer.ledger)
    # What another process reads from it.
    other = tiny.compiled(tiny.sgd(noise_multiplier=falling))
    budget = keras_dp.PrivacyBudget(delta=DELTA, accountant="rdp", ledger_path=path)
    other.fit(x, y, batch_size=8, callbacks=[budget], verbose=0)
    assert other.optimizer.ledger.steps == 16 + 8


@pytest.mark.thorough
def test_a_target_with_a_schedule_of_c():
    x, y = tiny.data(64)
    halved = lambda step: 1.0 / (1 + step // 8)  # noqa: E731
    optimizer = keras_dp.DPSGD(
        0.1,
        max_grad_norm=halved,
        target_epsilon=3.0,
        target_delta=DELTA,
    )
    model = tiny.compiled(optimizer)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert 2.99 < optimizer.get_epsilon(DELTA) <= 3.0
    assert [(r[1], r[2]) for r in releases(optimizer.ledger)] == [(0.5, 8), (1.0, 8)]


def test_values_have_few_digits_and_noise_is_never_rounded_down():
    count = keras_dp.backend.Counter()
    values = StepSettings(lambda k: 1.23401 + k, lambda k: 0.0123467, count).begin(0)
    assert [values(k) for k in range(2)] == [(1.25, 0.0123), (2.3, 0.0123)]
    exact = StepSettings(1.23456, 0.123456789, count)
    assert exact.upcoming == (1.23456, 0.123456789)  # a number stays as it was given


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "much", None])
@pytest.mark.parametrize("argument", ["noise_multiplier", "max_grad_norm"])
def test_a_schedule_that_gives_no_sigma_or_c_is_named_with_its_step(argument, value):
    given = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, argument: lambda step: value}
    with pytest.raises(ValueError, match=f"`{argument}` must return .* For step 0 it returned"):
        keras_dp.DPSGD(0.1, **given)


def test_a_schedule_that_would_fail_later_is_named_before_the_first_step():
    x, y = tiny.data(64)
    late = lambda step: 1.0 if step < 100 else -1.0  # noqa: E731
    model = tiny.compiled(tiny.sgd(noise_multiplier=late))
    with pytest.raises(ValueError, match="For step 100 it returned: -1"):
        model.fit(x, y, batch_size=8, epochs=20, verbose=0)
    assert model.optimizer.ledger.steps == 0
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert releases(model.optimizer.ledger) == [(1.0, 1.0, 16)]


def test_adaptive_clipping_takes_no_schedule_of_c():
    with pytest.raises(ValueError, match="Adaptive clipping moves C itself"):
        keras_dp.DPSGD(
            0.1, max_grad_norm=lambda step: 1.0, noise_multiplier=1.0, clipping="adaptive"
        )


def test_a_step_that_nothing_announced_is_refused():
    """A table that ends would otherwise lend a step the noise of another."""
    optimizer = keras_dp.DPSGD(1.0, max_grad_norm=1.0, noise_multiplier=falling)
    model = wide(optimizer, 3)
    deviations(model, 1)
    step = model.train_function
    batch = (np.zeros((2, 3), "float32"), np.zeros((2, 1), "float32"))
    with pytest.raises(Exception, match="a step that nothing announced"):
        for _ in range(200):
            optimizer.session.gate.open()
            step(iter([batch]))
    assert optimizer.ledger.steps <= 64
    assert sum(steps for *_, steps in releases(optimizer.ledger)) == optimizer.releases
