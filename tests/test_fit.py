"""`fit` means what a Keras user expects, on every kind of data."""

import csv
import pathlib
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tiny

import keras_dp

X, Y = tiny.data()
quiet = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")


def releases(model):
    return [(r.sampler, r.steps) for r in model.optimizer.ledger]


# -- kinds of data ----------------------------------------------------------------------------

ARRAYS = {
    "numpy": (X, Y),
    "float64": (X.astype("float64"), Y.astype("float64")),
    "tensors": (tf.constant(X), tf.constant(Y)),
    "pandas": (pd.DataFrame(X), pd.Series(Y[:, 0])),
    "poisson dataset": (keras_dp.PoissonDataset(X, Y, batch_size=16), None),
}


@pytest.mark.oldest
@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.one_in(4)
@pytest.mark.thorough
def test_rule_10_arrays_are_poisson_sampled(kind):
    x, y = ARRAYS[kind]
    model = tiny.compiled(metrics=["mae"])
    size = {} if y is None else {"batch_size": 16}
    history = model.fit(x, y, **size, epochs=3, verbose=0).history
    assert set(history) == {"loss", "mae"} and len(history["loss"]) == 3
    (release,) = model.optimizer.ledger
    assert (release.sampler, release.steps, release.sampling_rate) == ("poisson", 12, 0.25)
    assert (release.num_examples, release.batch_size) == (64, 16)


@pytest.mark.parametrize("kind", [dict, list, tuple])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_rule_10_structures_of_arrays_are_poisson_sampled(kind):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model([a, b], keras.layers.Dense(1)(keras.layers.Concatenate()([a, b])))
    model.compile(tiny.sgd(), loss="mse")
    x = {"a": X, "b": X[::-1]} if kind is dict else kind([X, X[::-1]])
    model.fit(x, Y, batch_size=16, validation_split=0.25, verbose=0)
    assert releases(model) == [("poisson", 3)]


@pytest.mark.thorough
def test_rule_10_a_shuffled_dataset_is_one_participation_an_epoch():
    model = tiny.compiled(tiny.sgd(noise_multiplier=2.0))
    model.fit(keras_dp.ShuffledDataset(X, Y, batch_size=16), epochs=4, verbose=0)
    assert releases(model) == [("shuffled", 16)]
    one_gaussian = keras_dp.PrivacyLedger((keras_dp.Release("unknown", 1.0, steps=1),))
    assert model.optimizer.get_epsilon(1e-5) == pytest.approx(
        keras_dp.accounting.ledger_epsilon(one_gaussian, 1e-5), rel=1e-3
    )


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[index * 16 : index * 16 + 16], Y[index * 16 : index * 16 + 16]


class OwnPoisson(keras_dp.PoissonDataset):
    """Whatever a subclass draws is nobody's promise."""

    def __getitem__(self, index):
        return X[:16], Y[:16]


def generated():
    while True:
        yield X[:16], Y[:16]


FOREIGN = {
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(16),
    "PyDataset": Batches,
    "generator": generated,
    "subclass": lambda: OwnPoisson(X, Y, batch_size=16),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.thorough
def test_rule_10_sources_of_unknown_sampling_count_every_example_in_every_step(kind):
    model = tiny.compiled(tiny.sgd(noise_multiplier=2.0))
    with pytest.warns(keras_dp.PrivacyWarning, match="PoissonDataset") as caught:
        model.fit(FOREIGN[kind](), steps_per_epoch=4, verbose=0)
        model.fit(FOREIGN[kind](), steps_per_epoch=4, verbose=0)
    assert len(caught) == 1
    assert pathlib.Path(caught[0].filename).name == "test_fit.py"
    assert releases(model) == [("unknown", 8)]
    assert model.optimizer.ledger.releases[0].batch_size == 16
    gaussian = keras_dp.PrivacyLedger((keras_dp.Release("unknown", 2.0, steps=8),))
    assert model.optimizer.get_epsilon(1e-5) == keras_dp.accounting.ledger_epsilon(gaussian, 1e-5)


@pytest.mark.thorough
def test_rule_10_train_on_batch_counts_every_example_and_warns_once():
    model = tiny.compiled()
    with pytest.warns(keras_dp.PrivacyWarning, match="`fit` on arrays") as caught:
        first = model.train_on_batch(X, Y)
        second = model.train_on_batch(X, Y, return_dict=True)
    assert len(caught) == 1
    assert np.isfinite(first) and set(second) == {"loss"}
    assert releases(model) == [("unknown", 2)]


def test_rule_10_train_on_batch_during_fit_is_refused():
    class Meddler(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.train_on_batch(X, Y)

    model = tiny.compiled()
    with pytest.raises(keras_dp.PrivacyError, match="while `fit` is running"):
        model.fit(X, Y, batch_size=16, callbacks=[Meddler()], verbose=0)
    assert releases(model) == [("poisson", 1)]


@quiet
@pytest.mark.parametrize(("declared", "divisor"), [(None, 16), (32, 32)])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_rule_02_the_divisor_of_a_foreign_source_is_the_declared_batch_size(declared, divisor):
    model = tiny.compiled(tiny.noiseless(keras_dp.DPSGD, 1.0))
    before = tiny.weights_of(model)
    model.fit(FOREIGN["tf.data"]().take(1), batch_size=declared, verbose=0)
    plain = tiny.model()
    plain.compile(keras.optimizers.SGD(16 / divisor), loss="mse")
    plain.train_on_batch(X[:16], Y[:16])
    assert tiny.same(model.get_weights(), plain.get_weights(), atol=1e-5)
    assert not tiny.same(model.get_weights(), before, atol=1e-3)


@quiet
def test_rule_02_the_divisor_of_fit_is_the_expected_batch_size_whatever_was_drawn():
    # Equal examples: the size of the update tells how many were drawn.
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.0]])
    model.compile(tiny.noiseless(keras_dp.DPSGD, 1.0, seed=3), loss=lambda y, p: p)
    x = np.ones((64, 1))
    kernels = [0.0]
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kernels.append(
            float(model.layers[0].kernel.numpy()[0, 0])
        )
    )
    model.fit(x, x, batch_size=16, epochs=2, callbacks=[callback], verbose=0)
    sizes = -16 * np.diff(kernels)
    assert len(sizes) == 8
    assert np.allclose(sizes, np.round(sizes), atol=1e-3)
    assert len(set(np.round(sizes))) > 1  # not the drawn size, which would give 16 each time


@pytest.mark.parametrize("batches", [[], [(X[:0], Y[:0])]], ids=["no batch", "an empty one"])
@quiet
def test_an_empty_generator_is_refused(batches):
    model = tiny.compiled()
    with pytest.raises(ValueError, match="empty"):
        model.fit((b for b in batches), verbose=0)
    assert model.optimizer.ledger.steps == 0


# -- steps and epochs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps", "rate"),
    [
        ({"batch_size": 16}, 4, 1 / 4),
        ({"batch_size": 24}, 3, 1 / 3),
        ({"batch_size": 64}, 1, 1),
        ({}, 2, 1 / 2),  # Keras' default of 32
        ({"steps_per_epoch": 8}, 8, 1 / 8),  # and its batch size of n / steps
        ({"batch_size": 16, "steps_per_epoch": 10}, 10, 1 / 4),
        ({"batch_size": 16, "steps_per_epoch": 2}, 2, 1 / 4),
        ({"batch_size": 16, "epochs": 3}, 12, 1 / 4),
        ({"batch_size": 16, "epochs": 3, "initial_epoch": 1}, 8, 1 / 4),
        ({"batch_size": 16, "epochs": 0}, 0, None),
        ({"batch_size": 16, "validation_split": 0.25}, 3, 1 / 3),
    ],
    ids=str,
)
@pytest.mark.one_in(4)
def test_steps_and_sampling_rate(arguments, steps, rate):
    counted = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: counted.append(b))
    model = tiny.compiled()
    model.fit(X, Y, **arguments, callbacks=[callback], verbose=0)
    assert model.optimizer.ledger.steps == steps == len(counted)
    assert [r.sampling_rate for r in model.optimizer.ledger] == [rate] * bool(steps)


@pytest.mark.thorough
def test_fewer_examples_than_the_default_batch_size_are_one_batch():
    model = tiny.compiled()
    model.fit(X[:5], Y[:5], verbose=0)
    assert model.optimizer.ledger.releases[0].batch_size == 5


def test_an_epoch_of_a_shuffled_dataset_cannot_be_cut():
    model = tiny.compiled()
    data = keras_dp.ShuffledDataset(X, Y, batch_size=16)
    with pytest.raises(ValueError, match=r"steps_per_epoch=2.*PoissonDataset"):
        model.fit(data, steps_per_epoch=2, verbose=0)


# -- validation -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_validation_split_trains_on_the_first_rows_and_measures_the_last():
    x, y = X.copy(), Y.copy()
    x[48:] = np.nan  # would poison every loss that saw them
    model = tiny.compiled()
    history = model.fit(x, y, batch_size=16, validation_split=0.25, verbose=0).history
    assert np.isfinite(history["loss"][0]) and np.isnan(history["val_loss"][0])
    assert model.optimizer.ledger.releases[0].num_examples == 48


def test_validation_data_is_evaluated_as_ever_and_never_trained_on():
    model = tiny.compiled(metrics=["mae"])
    history = model.fit(X, Y, batch_size=16, validation_data=(X[:10], Y[:10]), verbose=0).history
    assert set(history) == {"loss", "mae", "val_loss", "val_mae"}
    evaluated = model.evaluate(X[:10], Y[:10], verbose=0, return_dict=True)
    assert history["val_mae"][0] == pytest.approx(evaluated["mae"], rel=1e-5)
    assert model.optimizer.ledger.steps == 4


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [({}, 4), ({"validation_batch_size": 8}, 8), ({"validation_batch_size": None}, 4)],
    ids=str,
)
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_validation_batches_are_of_the_training_batch_size(arguments, batches):
    counted = []
    callback = keras.callbacks.LambdaCallback()
    callback.on_test_batch_end = lambda batch, logs=None: counted.append(batch)
    model = tiny.compiled()
    model.fit(X, Y, 16, validation_data=(X, Y), callbacks=[callback], verbose=0, **arguments)
    assert len(counted) == batches


@quiet
def test_validation_split_of_a_dataset_is_refused_as_in_keras():
    model = tiny.compiled()
    for data in (keras_dp.PoissonDataset(X, Y, batch_size=16), FOREIGN["tf.data"]()):
        with pytest.raises(ValueError, match=r"validation_split.*validation_data"):
            model.fit(data, validation_split=0.5, verbose=0)


# -- weights ----------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize(
    "weights",
    [
        {"class_weight": {0: 0.5, 1: 3.0}},
        {"sample_weight": np.linspace(0, 2, 64)},
    ],
    ids=["class_weight", "sample_weight"],
)
@pytest.mark.one_in(2)
def test_weights_weigh_the_loss_of_each_example(weights):
    labels = (X[:, :1] > 0).astype("float32")

    def fitted(optimizer):
        model = tiny.compiled(optimizer, loss="mse")
        model.fit(X, labels, batch_size=64, verbose=0, **weights)
        return tiny.weights_of(model)

    got = fitted(tiny.noiseless(keras_dp.DPSGD, 0.1))
    per_example = weights.get("sample_weight", np.where(labels[:, 0] > 0, 3.0, 0.5))
    plain = tiny.model()
    plain.compile(keras.optimizers.SGD(0.1), loss="mse")
    plain.train_on_batch(X, labels, sample_weight=per_example)
    assert tiny.same(got, plain.get_weights(), atol=1e-5)
    plain = tiny.compiled(keras.optimizers.SGD(0.1))
    plain.train_on_batch(X, labels)
    assert not tiny.same(got, plain.get_weights(), atol=1e-4)


# -- what is shown ----------------------------------------------------------------------------


def test_metrics_and_loss_count_real_examples_only():
    # Draws of expected size 1.6 are often empty; constant targets make every average exact.
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, trainable=False)])
    model.add(keras.layers.Dense(1, kernel_initializer="zeros", bias_initializer="zeros"))
    model.compile(
        tiny.sgd(learning_rate=0.0, microbatch_size=4),
        loss="mse",
        metrics=["mae", keras.metrics.MeanSquaredError(name="mse")],
    )
    x, y = np.ones((64, 1)), np.full((64, 1), 2.0)
    history = model.fit(x, y, batch_size=2, epochs=2, verbose=0).history
    assert history["loss"] == pytest.approx([4.0, 4.0])
    assert history["mae"] == pytest.approx([2.0, 2.0])
    assert history["mse"] == pytest.approx([4.0, 4.0])


@pytest.mark.thorough
def test_the_progress_bar_counts_the_steps_of_an_epoch(capsys):
    model = tiny.compiled()
    model.fit(X, Y, batch_size=16, epochs=2, verbose=1)
    said = capsys.readouterr().out
    assert "4/4" in said and "Epoch 2/2" in said and "loss" in said


# -- callbacks --------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_usual_callbacks_work(tmp_path):
    model = tiny.compiled(metrics=["mae"])
    callbacks = [
        keras_dp.PrivacyBudget(delta=1e-5),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TerminateOnNaN(),
    ]
    with pytest.warns(keras_dp.PrivacyWarning, match="TerminateOnNaN stops training"):
        fitted = model.fit(X, Y, batch_size=16, epochs=2, callbacks=callbacks, verbose=0)
    assert set(fitted.history) == {"loss", "mae", "epsilon"}
    assert keras.saving.load_model(tmp_path / "1.keras").optimizer.ledger.steps == 4
    assert keras.saving.load_model(tmp_path / "2.keras").optimizer.ledger.steps == 8
    with open(tmp_path / "log.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.thorough
def test_rule_06_early_stopping_restores_weights_and_keeps_the_ledger():
    model = tiny.compiled()
    stop = keras.callbacks.EarlyStopping(
        "loss", patience=1, min_delta=1e9, restore_best_weights=True
    )
    with pytest.warns(keras_dp.PrivacyWarning, match="EarlyStopping stops training by 'loss'"):
        fitted = model.fit(X, Y, batch_size=16, epochs=9, callbacks=[stop], verbose=0)
    epochs = len(fitted.history["loss"])
    assert epochs < 9
    assert model.optimizer.ledger.steps == 4 * epochs


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.one_in(2)
def test_rule_06_an_interrupted_fit_keeps_its_ledger_and_training_goes_on(error):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise error

    model = tiny.compiled()
    with pytest.raises(error):
        model.fit(X, Y, batch_size=16, callbacks=[Interrupt()], verbose=0)
    assert releases(model) == [("poisson", 3)]
    with pytest.warns(keras_dp.PrivacyWarning):
        model.train_on_batch(X, Y)
    assert releases(model) == [("poisson", 3), ("unknown", 1)]
    model.fit(X, Y, batch_size=16, verbose=0)
    assert releases(model) == [("poisson", 7), ("unknown", 1)]


@pytest.mark.thorough
def test_a_callback_list_of_the_users_own_serves_again():
    model = tiny.compiled()
    callbacks = keras.callbacks.CallbackList(
        [keras_dp.PrivacyBudget(delta=1e-5)], add_history=True, model=model, epochs=2, steps=4
    )
    for _ in range(2):
        model.fit(X, Y, batch_size=16, epochs=2, callbacks=callbacks, verbose=0)
    assert releases(model) == [("poisson", 16)]
    assert len(callbacks.callbacks) == 2


@pytest.mark.parametrize(
    "callbacks", [None, [], keras_dp.PrivacyBudget(delta=1e-5)], ids=lambda v: type(v).__name__
)
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_callbacks_may_be_none_or_a_single_one(callbacks):
    model = tiny.compiled()
    model.fit(X, Y, batch_size=16, callbacks=callbacks, verbose=0)
    assert model.optimizer.ledger.steps == 4


@pytest.mark.thorough
def test_private_training_on_arrays_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny.compiled()
        model.fit(X, Y, batch_size=16, verbose=0)
        model.evaluate(X, Y, verbose=0)
        model.predict(X, verbose=0)
