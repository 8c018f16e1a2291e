"""Budgets and targets: training stops at the last step that the promise allows."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorboard.backend.event_processing import event_accumulator

import keras_dp
from keras_dp import accounting

DELTA = tiny.DELTA
quiet = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")


def budget(epsilon, **kwargs):
    return keras_dp.PrivacyBudget(epsilon, delta=DELTA, verbose=0, **kwargs)


def cost(sigma, steps, *, batch_size, n=64, accountant="pld"):
    return accounting.compute_epsilon(
        num_examples=n,
        batch_size=batch_size,
        noise_multiplier=sigma,
        steps=steps,
        delta=DELTA,
        accountant=accountant,
    )


# -- stopping ---------------------------------------------------------------------------------

MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "seven steps at once": {"steps_per_execution": 7},
}


@pytest.mark.parametrize(
    ("sigma", "batch_size", "epsilon", "accountant", "mode"),
    [
        (1.0, 4, 2.0, "pld", "graph"),
        (2.0, 16, 1.5, "rdp", "graph"),
        (1.0, 4, 2.0, "pld", "seven steps at once"),
        (4.0, 64, 1.5, "pld", "seven steps at once"),
        (1.0, 8, 3.0, "pld", "xla"),
        (1.5, 8, 1.5, "pld", "eager"),
    ],
)
@pytest.mark.one_in(3)
def test_stops_at_the_last_step_within_the_budget(sigma, batch_size, epsilon, accountant, mode):
    model = tiny.compiled(tiny.sgd(noise_multiplier=sigma), **MODES[mode])
    callback = budget(epsilon, accountant=accountant)
    x, y = tiny.data()
    fitted = model.fit(x, y, batch_size=batch_size, epochs=200, callbacks=[callback], verbose=0)
    steps = model.optimizer.ledger.steps
    spent = model.optimizer.get_epsilon(DELTA, accountant)
    assert 1 < steps < 200 * (64 // batch_size)
    assert spent <= epsilon
    assert cost(sigma, steps + 1, batch_size=batch_size, accountant=accountant) > epsilon
    assert spent == pytest.approx(cost(sigma, steps, batch_size=batch_size, accountant=accountant))
    assert fitted.history["epsilon"][-1] == callback.spent == spent
    assert int(model.optimizer.iterations) == steps


@pytest.mark.thorough
def test_the_message_at_the_stop_says_steps_and_what_is_left(capsys):
    model = tiny.compiled()
    callback = keras_dp.PrivacyBudget(3.0, delta=DELTA)
    x, y = tiny.data()
    model.fit(x, y, batch_size=8, epochs=100, callbacks=[callback], verbose=0)
    said = capsys.readouterr().out
    spent = model.optimizer.get_epsilon(DELTA)
    assert f"{model.optimizer.ledger.steps} steps" in said
    assert f"{spent:.4f} of 3" in said
    assert f"{3 - spent:.4f} is left" in said


@pytest.mark.thorough
def test_nothing_is_said_when_the_budget_does_not_bind(capsys):
    model = tiny.compiled()
    callback = keras_dp.PrivacyBudget(50.0, delta=DELTA)
    x, y = tiny.data()
    model.fit(x, y, batch_size=8, epochs=2, callbacks=[callback], verbose=0)
    assert model.optimizer.ledger.steps == 16
    assert capsys.readouterr().out == ""


def test_a_spent_budget_lets_no_step_run():
    model = tiny.compiled()
    x, y = tiny.data()
    model.fit(x, y, batch_size=8, epochs=50, callbacks=[budget(2.0)], verbose=0)
    before, steps = tiny.weights_of(model), model.optimizer.ledger.steps
    with pytest.raises(keras_dp.PrivacyBudgetExceeded, match=r"of 2 .*No step was taken"):
        model.fit(x, y, batch_size=8, callbacks=[budget(2.0)], verbose=0)
    assert tiny.same(model.get_weights(), before)
    assert model.optimizer.ledger.steps == steps
    # A larger budget goes on where the smaller one stopped.
    model.fit(x, y, batch_size=8, epochs=50, callbacks=[budget(2.5)], verbose=0)
    assert model.optimizer.ledger.steps > steps
    assert 2.0 < model.optimizer.get_epsilon(DELTA) <= 2.5


def test_too_small_a_budget_for_a_single_step_lets_none_run():
    model = tiny.compiled()
    before = tiny.weights_of(model)
    with pytest.raises(keras_dp.PrivacyBudgetExceeded):
        model.fit(*tiny.data(), batch_size=64, callbacks=[budget(0.1)], verbose=0)
    assert model.optimizer.ledger.steps == 0
    assert tiny.same(model.get_weights(), before)


@quiet
def test_a_budget_holds_beyond_fit_and_on_any_source():
    x, y = tiny.data()
    model = tiny.compiled(tiny.sgd(noise_multiplier=20.0))

    def batches():
        while True:
            yield x[:16], y[:16]

    model.fit(batches(), steps_per_epoch=5, epochs=50, callbacks=[budget(1.0)], verbose=0)
    steps = model.optimizer.ledger.steps
    assert 1 < steps < 250
    assert model.optimizer.get_epsilon(DELTA) <= 1.0
    before = tiny.weights_of(model)
    with pytest.raises(keras_dp.PrivacyBudgetExceeded, match="No step was taken"):
        model.train_on_batch(x, y)
    assert model.optimizer.ledger.steps == steps
    assert tiny.same(model.get_weights(), before)


@quiet
def test_train_on_batch_uses_what_fit_left_of_the_budget_and_no_more():
    x, y = tiny.data()
    model = tiny.compiled(tiny.sgd(noise_multiplier=20.0))
    model.fit(x, y, batch_size=16, callbacks=[budget(0.5)], verbose=0)
    with pytest.raises(keras_dp.PrivacyBudgetExceeded):
        for _ in range(1000):
            model.train_on_batch(x, y)
    assert 4 < model.optimizer.ledger.steps < 1000
    assert model.optimizer.get_epsilon(DELTA) <= 0.5
    release = model.optimizer.ledger.releases[-1]
    one_more = model.optimizer.ledger.merge([release.with_steps(release.steps + 1)])
    assert accounting.ledger_epsilon(one_more, DELTA) > 0.5


@pytest.mark.thorough
def test_without_stopping_it_warns_once_and_goes_on():
    model = tiny.compiled()
    callback = budget(1.0, stop_training=False)
    with pytest.warns(keras_dp.PrivacyWarning, match="budget is passed") as caught:
        model.fit(*tiny.data(), batch_size=16, epochs=4, callbacks=[callback], verbose=0)
    assert len(caught) == 1
    assert model.optimizer.ledger.steps == 16
    assert model.optimizer.get_epsilon(DELTA) > 1.0


# -- watching ---------------------------------------------------------------------------------


def test_epsilon_reaches_history_progress_bar_and_csv(tmp_path, capsys):
    model = tiny.compiled()
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    watch = keras_dp.PrivacyBudget(delta=DELTA)
    x, y = tiny.data()
    history = model.fit(x, y, batch_size=16, epochs=3, callbacks=[watch, log], verbose=2).history
    wanted = [cost(1.0, steps, batch_size=16) for steps in (4, 8, 12)]
    assert history["epsilon"] == pytest.approx(wanted)
    with open(tmp_path / "log.csv") as file:
        assert [float(row["epsilon"]) for row in csv.DictReader(file)] == pytest.approx(wanted)
    assert f"epsilon: {wanted[-1]:.2f}"[:12] in capsys.readouterr().out
    assert model.optimizer.ledger.steps == 12


def test_epsilon_reaches_tensorboard(tmp_path):
    model = tiny.compiled()
    callbacks = [keras_dp.PrivacyBudget(delta=DELTA), keras.callbacks.TensorBoard(tmp_path)]
    model.fit(*tiny.data(), batch_size=16, epochs=2, callbacks=callbacks, verbose=0)
    board = event_accumulator.EventAccumulator(str(tmp_path / "train")).Reload()
    shown = [float(tf.make_ndarray(e.tensor_proto)) for e in board.Tensors("epoch_epsilon")]
    assert shown == pytest.approx([cost(1.0, steps, batch_size=16) for steps in (4, 8)])


@pytest.mark.parametrize("optimizer", ["sgd", keras.optimizers.Adam])
def test_refuses_a_model_without_a_dp_optimizer(optimizer):
    model = tiny.model()
    model.compile(optimizer if isinstance(optimizer, str) else optimizer(), loss="mse")
    before = tiny.weights_of(model)
    with pytest.raises(ValueError, match=r"not private\. Compile it with keras_dp\.DPSGD"):
        model.fit(*tiny.data(), callbacks=[budget(1.0)], verbose=0)
    assert tiny.same(model.get_weights(), before)


# -- aiming -----------------------------------------------------------------------------------


def aimed(epsilon=2.0, **kwargs):
    return tiny.sgd(noise_multiplier=None, target_epsilon=epsilon, target_delta=DELTA, **kwargs)


def within(spent, target):
    return 0.98 * target < spent <= target


def test_a_target_is_met_by_the_planned_steps_and_then_is_spent():
    model = tiny.compiled(aimed())
    x, y = tiny.data()
    assert model.optimizer.noise_multiplier is None
    model.fit(x, y, batch_size=16, epochs=3, verbose=0)
    assert model.optimizer.ledger.steps == 12
    assert within(model.optimizer.get_epsilon(DELTA), 2.0)
    assert model.optimizer.noise_multiplier > 0
    before = tiny.weights_of(model)
    with pytest.raises(keras_dp.PrivacyBudgetExceeded, match="No step was taken"):
        model.fit(x, y, batch_size=16, verbose=0)
    assert tiny.same(model.get_weights(), before)
    assert model.optimizer.ledger.steps == 12


@pytest.mark.thorough
def test_after_an_interruption_the_rest_of_the_target_is_for_the_rest_of_the_steps():
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    model = tiny.compiled(aimed())
    x, y = tiny.data()
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, batch_size=16, epochs=6, callbacks=[Interrupt()], verbose=0)
    assert model.optimizer.ledger.steps == 8
    assert model.optimizer.get_epsilon(DELTA) < 1.9
    model.fit(x, y, batch_size=16, epochs=6, initial_epoch=2, verbose=0)
    assert model.optimizer.ledger.steps == 24
    assert within(model.optimizer.get_epsilon(DELTA), 2.0)


@pytest.mark.thorough
def test_a_target_counts_what_was_spent_before():
    model = tiny.compiled(tiny.sgd(noise_multiplier=3.0))
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, verbose=0)
    model.compile(aimed(1.5), loss="mse")
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    assert within(model.optimizer.get_epsilon(DELTA), 1.5)


@pytest.mark.thorough
def test_a_target_with_nothing_planned_takes_nothing_and_fixes_nothing():
    model = tiny.compiled(aimed())
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, epochs=0, verbose=0)
    assert model.optimizer.noise_multiplier is None
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    assert within(model.optimizer.get_epsilon(DELTA), 2.0)


@quiet
def test_a_target_needs_a_known_number_of_steps():
    model = tiny.compiled(aimed())
    x, y = tiny.data()
    with pytest.raises(keras_dp.PrivacyError, match="target_epsilon"):
        model.train_on_batch(x, y)

    def batches():
        while True:
            yield x[:16], y[:16]

    with pytest.raises(ValueError, match="steps_per_epoch"):
        model.fit(batches(), verbose=0)
    assert model.optimizer.ledger.steps == 0
    model.fit(batches(), steps_per_epoch=2, epochs=2, verbose=0)
    assert within(model.optimizer.get_epsilon(DELTA), 2.0)
    assert np.isclose(model.optimizer.noise_multiplier, np.sqrt(4) * 2.01, atol=0.6)


@pytest.mark.thorough
def test_a_target_works_with_a_callback_list_of_the_users_own():
    model = tiny.compiled(aimed())
    callbacks = keras.callbacks.CallbackList(
        [keras_dp.PrivacyBudget(delta=DELTA)], add_history=True, model=model
    )
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, epochs=3, callbacks=callbacks, verbose=0)
    assert within(model.optimizer.get_epsilon(DELTA), 2.0)
    assert len(callbacks.callbacks) == 2
