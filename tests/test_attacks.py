"""Attacks by fresh eyes that went through once, each with what holds it off now."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers, ops

import keras_dp
from keras_dp import PrivacyError, lineage, tuning

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")

DELTA = 1e-5
X = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
Y = X[:, :1]


def dp(sigma=1.0, **options):
    return keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=sigma, **options)


def model_of(*more, optimizer=None):
    model = keras.Sequential([keras.Input((3,)), *more])
    model.compile(optimizer or dp(), loss="mse")
    return model


def during(**hooks):
    return keras.callbacks.LambdaCallback(**hooks)


def test_rule_09_a_layer_of_keras_that_looks_for_the_loudest_of_a_batch_is_refused():
    """One example in decibels moved the sum by 13.7 C."""
    made = {"fft_length": 128, "sequence_length": 128, "sequence_stride": 128, "num_mel_bins": 8}

    def model(**more):
        return keras.Sequential([keras.Input((512,)), layers.MelSpectrogram(**made, **more)])

    (problem,) = keras_dp.check_model(model())
    assert "loudest of its whole batch" in str(problem)
    assert not keras_dp.check_model(model(power_to_db=False))


# -- budgets, while others add to the same weights -----------------------------------------------


def two_models():
    shared = layers.Dense(3)
    return [model_of(shared, layers.Dense(1)) for _ in range(2)]


def loss_of(model):
    return lambda example: ops.mean((model(example[0]) - example[1]) ** 2)


@pytest.mark.parametrize("road", ["train_on_batch", "train_step", "private_gradients"])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_rule_17_nobody_trains_the_weights_of_a_fit(road):
    """A budget of 3 ended at 4.96."""
    one, two = two_models()

    def attack(batch, logs):
        if road == "private_gradients":
            two.optimizer.private_gradients(
                loss_of(two), two.trainable_variables, (X, Y), models=[two]
            )
        elif road == "train_step":
            two.train_step((X, Y))
        else:
            two.train_on_batch(X, Y)

    budget = keras_dp.PrivacyBudget(3.0, delta=DELTA, verbose=0)
    callbacks = [during(on_train_batch_end=attack), budget]
    with pytest.raises(PrivacyError, match="weights in common"):
        one.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks)
    assert one.optimizer.get_epsilon(DELTA) <= 3.0
    two.train_on_batch(X, Y)  # afterwards it may


def test_rule_17_a_file_that_is_loaded_in_mid_fit_counts_against_the_budget(tmp_path):
    """A budget of 3 ended at 4.83."""
    other = model_of(layers.Dense(1))
    tiny.private_steps(other, 16, batch_size=8)
    path = tmp_path / "other.weights.h5"
    other.save_weights(path)
    model = model_of(layers.Dense(1))

    def attack(epoch, logs):
        if epoch == 1:
            model.load_weights(path)

    budget = keras_dp.PrivacyBudget(8.0, delta=DELTA, verbose=0)
    model.fit(
        X,
        Y,
        batch_size=8,
        epochs=20,
        verbose=0,
        callbacks=[during(on_epoch_begin=attack), budget],
    )
    assert other.optimizer.ledger.steps < model.optimizer.ledger.steps
    assert 7.5 < model.optimizer.get_epsilon(DELTA) <= 8.0


def test_rule_17_two_loops_on_the_same_weights_keep_one_budget():
    """Each kept its own: 3.33 for 3."""
    model = model_of(layers.Dense(1))
    data = keras_dp.PoissonDataset(X, Y, batch_size=8)
    optimizers, loss = [dp(3.0), dp(3.0)], loss_of(model)
    for optimizer in optimizers:
        optimizer.begin_loop(data)
        optimizer.limit_steps(epsilon=1.5, delta=DELTA, at_most=100)
    with pytest.raises(keras_dp.PrivacyBudgetExceeded):
        for _ in range(100):
            for optimizer in optimizers:
                optimizer.private_gradients(loss, model.trainable_variables, data[0], sampling=data)
    epsilons = [optimizer.get_epsilon(DELTA) for optimizer in optimizers]
    assert epsilons[0] == epsilons[1]
    assert 1.2 < epsilons[0] <= 1.5


# -- draws in graphs ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["inside", "from around", "in a loop"])
def test_rule_17_a_batch_that_a_graph_would_repeat_is_refused(where):
    """Twenty steps on one draw were twenty Poisson draws: 4.36 reported, 28.4 spent."""
    model = model_of(layers.Dense(1))
    optimizer, loss_fn, variables = dp(), loss_of(model), model.trainable_variables
    data = keras_dp.PoissonDataset(X, Y, batch_size=4)
    drawn = tuple(map(tf.constant, data[0]))

    @tf.function
    def step(batch):
        if where == "in a loop":
            for _ in tf.range(5):
                optimizer.private_gradients(loss_fn, variables, batch, sampling=data)
        else:
            given = data[0] if where == "inside" else drawn
            optimizer.private_gradients(loss_fn, variables, given, sampling=data)

    with pytest.raises(Exception, match="use the same rows"):
        step(drawn)
    assert optimizer.ledger.steps == 0


# -- ordinary training that hides its steps -------------------------------------------------------


def test_rule_16_a_count_that_is_set_back_hides_no_ordinary_step():
    """`iterations.assign(0)` made as many un-noised steps invisible as there had been before."""
    ordinary = keras.optimizers.SGD(0.1)
    model = model_of(layers.Dense(1), optimizer=ordinary)
    model.fit(X, Y, batch_size=8, verbose=0)
    model.compile(dp(), loss="mse")
    model.fit(X, Y, batch_size=8, verbose=0)
    model.compile(ordinary, loss="mse")
    restart = during(on_train_begin=lambda logs: ordinary.iterations.assign(0))
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[restart])
    model.compile(dp(), loss="mse")
    assert model.optimizer.get_epsilon(DELTA) == np.inf
    assert any(r.sampler == "unprotected" for r in lineage.of(model))


# -- choosing among runs --------------------------------------------------------------------------


def test_rule_10_a_run_that_goes_on_from_another_is_refused(tmp_path):
    """The cost of a choice is proved for runs that know nothing of each other."""
    declared = tuning.plan(num_examples=32, batch_size=8, noise_multiplier=1.0, epochs=10)
    path = tmp_path / "run.weights.h5"

    def train(_):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
        if path.exists():
            model.load_weights(path)
        model.compile(dp(), loss="mse")
        model.fit(X, Y, batch_size=8, verbose=0)
        model.save_weights(path)
        return model

    with pytest.raises(PrivacyError, match="goes on from one"):
        for _ in range(20):  # a single run in each has a chance of less than 1e-9
            tuning.select(train, [1], score=lambda model: 0.0, declared=declared, mean_runs=9)


# -- eager steps, and errors ----------------------------------------------------------------------


class Switched(layers.Layer):
    mixing = False

    def call(self, x):
        return x - ops.mean(x, axis=0, keepdims=True) * 5 if self.mixing else x


def test_rule_19_a_layer_that_changes_between_eager_steps_is_tried_again():
    """A flag that a callback sets let one example move the sum by 6.2 C."""
    layer = Switched()
    model = keras.Sequential([keras.Input((3,)), layer, layers.Dense(1)])
    model.compile(dp(), loss="mse", run_eagerly=True)
    model.train_on_batch(X, Y)
    layer.mixing = True
    with pytest.raises(PrivacyError, match="mix"):
        model.train_on_batch(X, Y)


class Asserting(layers.Layer):
    def call(self, x):
        tf.debugging.assert_less(x, 3.0, summarize=100)
        return x


@pytest.mark.parametrize("eagerly", [False, True])
def test_rule_18_an_assertion_does_not_print_what_it_saw(eagerly):
    x = X.copy()
    x[5] = [1.2345, 42.4242, 0.777]
    model = keras.Sequential([keras.Input((3,)), Asserting(), layers.Dense(1)])
    model.compile(dp(), loss="mse", run_eagerly=eagerly)
    with pytest.raises(tf.errors.InvalidArgumentError, match="assertion failed") as caught:
        model.fit(x, Y, batch_size=32, verbose=0)
    said = "".join(map(str, (caught.value, caught.value.message)))
    assert "42.4" not in said and "1.23" not in said and "left out" in said
    assert tiny.DELTA > 0
