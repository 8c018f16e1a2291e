"""Rule 18: nothing but noised sums and counts carries what was seen of the examples out of a step.

Everything here is refused before an example is seen, or, where nothing can be
seen, said to be so.
"""

from __future__ import annotations

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers, ops

import keras_dp
from keras_dp.decisions import raw_decisions

MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "several steps": {"steps_per_execution": 2},
}
own_code = pytest.mark.filterwarnings("ignore:With run_eagerly=True:keras_dp.PrivacyWarning")


def fitted(model, **kwargs):
    return model.fit(*tiny.data(), batch_size=16, verbose=0, **kwargs)


def refused(model, match):
    """Training is refused with the fix, and nothing was released."""
    with pytest.raises(keras_dp.PrivacyError, match=match):
        fitted(model)
    assert model.optimizer.ledger.steps == 0
    assert model.optimizer.get_epsilon(1e-5) == 0.0


# -- metrics ------------------------------------------------------------------------------------

TABLE = tf.lookup.experimental.MutableHashTable(tf.string, tf.float32, 0.0)


class WithMetrics(keras.Model):
    """A model whose `compute_metrics` does something more."""

    def __init__(self, more):
        super().__init__()
        self.dense = layers.Dense(1)
        self.dropout = layers.Dropout(0.5)
        self.seen = self.add_weight(shape=(4,), trainable=False, initializer="zeros")
        self.raw = tf.Variable(tf.zeros(4), trainable=False)
        self.mean = keras.metrics.Mean(name="mean_of_x")
        self.more = more

    def call(self, x):
        return self.dropout(self.dense(x))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.more(self, ops.mean(x, 0))
        return super().compute_metrics(x, y, y_pred, sample_weight)


def in_python(_, mean):
    tf.numpy_function(lambda m: np.float32(m.sum()), [mean], tf.float32)


WRITES = {
    "a weight of the model": (lambda m, mean: m.seen.assign(mean), "no metric.*variable"),
    "what it adds up": (lambda m, mean: m.seen.assign_add(mean), "no metric"),
    "a weight of a layer": (lambda m, mean: m.dense.kernel.assign(mean[:, None]), "kernel"),
    "the learning rate": (
        lambda m, mean: m.optimizer.inner_optimizer._learning_rate.assign(mean[0]),
        "no metric",
    ),
    "a weight's own value": (lambda m, mean: m.seen.value.assign(mean), "AssignVariableOp"),
    "a variable of TensorFlow's": (lambda m, mean: m.raw.assign(mean), "AssignVariableOp"),
    "a part of it": (lambda m, mean: m.raw[:1].assign(mean[:1]), "ResourceStridedSliceAssign"),
    "a table": (lambda m, mean: TABLE.insert(tf.constant("x"), mean[0]), "LookupTableInsert"),
    "Python": (in_python, "PyFunc.*numpy_function"),
    "the terminal": (lambda m, mean: tf.print(mean), "PrintV2.*prints"),
    "a branch": (
        lambda m, mean: ops.cond(
            mean[0] > 0, lambda: m.raw.assign(mean), lambda: tf.identity(m.raw)
        ),
        "AssignVariableOp",
    ),
}


@own_code
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", WRITES)
@pytest.mark.one_in(2)
def test_rule_18_what_computes_metrics_writes_to_metrics_alone(what, mode):
    more, match = WRITES[what]
    model = WithMetrics(more)
    model.compile(tiny.sgd(gradients="loop"), loss="mse", metrics=["mae"], **MODES[mode])
    TABLE.remove(tf.constant(["x"]))
    refused(model, match)
    assert not np.any(model.seen.numpy()) and not np.any(model.raw.numpy())
    assert TABLE.size() == 0


@own_code
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.one_in(3)
def test_rule_18_metrics_of_the_model_and_random_layers_work_in_compute_metrics(mode):
    def more(model, mean):
        model.mean.update_state(ops.mean(mean))
        model.dropout(mean[None], training=True)

    model = WithMetrics(more)
    model.compile(tiny.sgd(gradients="loop", seed=2), loss="mse", metrics=["mae"], **MODES[mode])
    x, y = tiny.data()
    x += 1
    states = model.dropout.seed_generator.state.numpy()
    found = model.fit(x, y, batch_size=16, verbose=0).history
    assert found["mean_of_x"] == pytest.approx([x.mean()], abs=0.2)
    assert found["mae"][0] > 0
    # What is drawn for metrics advances nothing: one advance a step, for the examples' seeds.
    assert np.abs(model.dropout.seed_generator.state.numpy() - states).max() == 4


class Remembering(keras.metrics.Metric):
    """A metric that keeps what it saw in a way that isn't a metric's."""

    def __init__(self, how):
        super().__init__(name="remembering")
        self.raw = tf.Variable(0.0)
        self.how = how

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.how(self.raw, tf.reduce_mean(y_true))

    def result(self):
        return ops.zeros(())


@own_code
@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize(
    ("how", "match"),
    [
        (lambda raw, seen: raw.assign(seen), "of the metrics.*AssignVariableOp|AssignVariableOp"),
        (lambda raw, seen: tf.py_function(lambda s: s, [seen], tf.float32), "EagerPyFunc"),
        (lambda raw, seen: tf.io.write_file("/nowhere/x", tf.as_string(seen)), "WriteFile"),
    ],
)
def test_rule_18_a_metric_that_keeps_more_than_its_own_variables_is_refused(how, match, mode):
    model = tiny.compiled(tiny.sgd(gradients="loop"), metrics=[Remembering(how)], **MODES[mode])
    refused(model, match)


def test_rule_18_the_error_for_an_own_train_step_does_not_send_data_into_compute_metrics():
    class Own(keras.Sequential):
        def train_step(self, data):
            return {}

    model = Own([keras.Input((4,)), layers.Dense(1)])
    with pytest.raises(keras_dp.PrivacyError, match=r"may assign to metrics alone"):
        model.compile(tiny.sgd(), loss="mse")


# -- models and losses --------------------------------------------------------------------------


class Doing(layers.Layer):
    """A layer that does something with what it sees."""

    def __init__(self, what):
        super().__init__(name="doing")
        self.what = what

    def call(self, x):
        return self.what(x)


def beside(what):
    """Of one example a batch, (1, 4) or (rows, 4): something is done, and it goes on unchanged."""

    def call(x):
        what(x)
        return x

    return call


def through(function, x):
    x.set_shape(x.shape)
    return tf.ensure_shape(function(x), x.shape)


RAW = tf.Variable(tf.zeros(4), trainable=False)
QUEUE = tf.queue.FIFOQueue(10, [tf.float32], shapes=[[]])
GENERATOR = tf.random.Generator.from_seed(1)


@tf.function
def writing(x):
    return RAW.assign(x[0])


@tf.custom_gradient
def writing_in_the_gradient(x):
    def gradient(g):
        with tf.control_dependencies([RAW.assign(g[0])]):
            return tf.identity(g)

    return tf.identity(x), gradient


def writing_in_a_loop(x):
    return tf.while_loop(
        lambda i: i < 2, lambda i: (i + tf.cast(RAW.assign(x[0])[0] * 0, tf.int32) + 1,), [0]
    )


def writing_in_a_map(x):
    return tf.map_fn(lambda row: RAW.assign(row), x)


def into_a_queue(x):
    return QUEUE.enqueue(tf.reduce_mean(x))


def by_what_is_skipped(x):
    GENERATOR.skip(tf.cast(tf.reduce_sum(x) * 1000, tf.int64))


KEPT = {
    "numpy_function": (
        lambda x: through(lambda t: tf.numpy_function(lambda a: a, [t], t.dtype), x),
        "PyFunc",
    ),
    "numpy_function beside": (
        beside(lambda x: tf.numpy_function(lambda a: np.float32(0), [x], tf.float32)),
        "PyFunc",
    ),
    "stateless numpy_function": (
        lambda x: through(
            lambda t: tf.numpy_function(lambda a: a, [t], t.dtype, stateful=False), x
        ),
        "PyFuncStateless",
    ),
    "py_function": (
        lambda x: through(lambda t: tf.py_function(lambda a: a, [t], t.dtype), x),
        "Py",
    ),
    "print": (beside(tf.print), "PrintV2"),
    "file": (
        beside(lambda x: tf.io.write_file("/nowhere/x", tf.as_string(tf.reduce_sum(x)))),
        "WriteFile",
    ),
    "function": (beside(writing), "AssignVariableOp"),
    "gradient": (writing_in_the_gradient, "AssignVariableOp"),
    "loop": (beside(writing_in_a_loop), "AssignVariableOp"),
    "map": (beside(writing_in_a_map), "AssignVariableOp"),
    "queue": (beside(into_a_queue), "QueueEnqueue"),
    "generator": (beside(by_what_is_skipped), "Rng"),
}


@own_code
@pytest.mark.parametrize(
    ("what", "gradients", "mode"),
    [(what, *how) for what in KEPT for how in (("auto", "graph"), ("loop", "eager"))]
    + [(what, "vectorized", "graph") for what in ("numpy_function", "print", "function", "map")]
    + [("py_function", "auto", "eager"), ("file", "loop", "graph")],
)
@pytest.mark.one_in(3)
def test_rule_18_a_layer_that_keeps_or_carries_out_what_it_sees_is_refused(what, gradients, mode):
    how, match = KEPT[what]
    # After a layer with weights, so that the way back goes through it, too.
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), Doing(how), layers.Dense(1)])
    model.compile(tiny.sgd(gradients=gradients), loss="mse", **MODES[mode])
    state = GENERATOR.state.numpy()
    refused(model, match)
    assert QUEUE.size() == 0 and not np.any(RAW.numpy())
    np.testing.assert_array_equal(GENERATOR.state.numpy(), state)


def test_rule_18_the_error_names_the_layer():
    how, _ = KEPT["print"]
    model = keras.Sequential([keras.Input((4,)), Doing(how), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    refused(model, r"'[^']*/doing\w*/[^']*' \(PrintV2\), of the layer of that name")


def test_rule_18_xla_refuses_alike():
    how, match = KEPT["numpy_function beside"]
    model = keras.Sequential([keras.Input((4,)), Doing(how), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse", jit_compile=True)
    refused(model, match)


def test_rule_18_summaries_are_refused(tmp_path):
    writer = tf.summary.create_file_writer(str(tmp_path))

    def what(x):
        with writer.as_default(step=1):
            tf.summary.scalar("mean", tf.reduce_mean(x))

    model = keras.Sequential([keras.Input((4,)), Doing(beside(what)), layers.Dense(1)])
    model.compile(tiny.sgd(gradients="loop"), loss="mse")
    refused(model, "Summary.*prints or writes")


@own_code
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_rule_18_a_loss_that_carries_out_what_it_sees_is_refused(mode):
    def loss(y_true, y_pred):
        squares = ops.mean(ops.square(y_true - y_pred), -1)
        return (
            tf.ensure_shape(tf.numpy_function(lambda s: s, [squares], squares.dtype), squares.shape)
            + 0 * squares
        )

    refused(tiny.compiled(tiny.sgd(gradients="loop"), loss=loss, **MODES[mode]), "PyFunc")


@own_code
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_rule_18_compute_loss_that_carries_out_what_it_sees_is_refused(mode):
    class Own(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            tf.print(y)
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)

    model = Own([keras.Input((4,)), layers.Dense(1)])
    model.compile(tiny.sgd(gradients="loop"), loss="mse", **MODES[mode])
    refused(model, "PrintV2")


@pytest.mark.filterwarnings("ignore:private_gradients can't know:keras_dp.PrivacyWarning")
def test_rule_18_a_loss_function_of_a_loop_of_ones_own_is_looked_through_as_well():
    model, optimizer = tiny.model(), tiny.sgd()

    def loss_fn(example):
        x, y = example
        tf.print(x)
        return ops.mean(ops.square(model(x) - y))

    with pytest.raises(keras_dp.PrivacyError, match="PrintV2"):
        optimizer.private_gradients(loss_fn, model.trainable_variables, tiny.data(), models=[model])
    assert optimizer.ledger.steps == 0


@pytest.mark.parametrize("gradients", ["auto", "loop"])
@pytest.mark.one_in(2)
def test_rule_18_what_is_harmless_still_trains(gradients):
    """Tables that are read, asserts, stateless and stateful random numbers, frozen variables."""
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer([0, 1], [1.0, 2.0]), default_value=1.0
    )
    scale = tf.Variable(2.0, trainable=False)

    def what(x):
        tf.debugging.assert_all_finite(x, "finite")
        tf.debugging.Assert(tf.reduce_all(tf.abs(x) < 1e9), ["large"])
        known = table.lookup(tf.cast(x > 0, tf.int32))
        drawn = tf.random.stateless_uniform(tf.shape(x)[1:], seed=[1, 2])
        return x * scale * known + drawn

    model = keras.Sequential([keras.Input((4,)), Doing(what), layers.Dense(1)])
    model.compile(tiny.sgd(gradients=gradients), loss="mse")
    fitted(model)
    assert model.optimizer.ledger.steps == 4


@pytest.mark.thorough
def test_rule_18_secure_noise_is_not_taken_for_part_of_the_model():
    model = tiny.compiled(tiny.sgd(secure_mode=True))
    fitted(model)
    assert model.optimizer.ledger.steps == 4


# -- what runs as plain Python ------------------------------------------------------------------


def test_rule_18_python_code_that_runs_eagerly_is_warned_of_and_in_the_statement():
    kept = []
    model = keras.Sequential([keras.Input((4,)), Doing(beside(kept.append)), layers.Dense(1)])
    model.compile(tiny.sgd(gradients="loop"), loss="mse", run_eagerly=True)
    with pytest.warns(keras_dp.PrivacyWarning, match=r"'doing' \(Doing\).*without noise"):
        fitted(model)
    report = keras_dp.privacy_report(model, delta=1e-5)
    assert any("'doing' (Doing)" in line for line in report.warnings)
    assert "'doing' (Doing)" in str(report)
    assert any("doing" in line for line in json.loads(report.to_json())["warnings"])


def test_rule_18_what_cannot_be_traced_is_said_to_be_so():
    only_eagerly = False

    def loss(y_true, y_pred):
        if only_eagerly and not tf.executing_eagerly():
            raise NotImplementedError("only for debugging")
        return ops.mean(ops.square(y_true - y_pred), -1)

    model = tiny.compiled(tiny.sgd(gradients="loop"), loss=loss, run_eagerly=True)
    model.evaluate(*tiny.data(), verbose=0)  # so that Keras needn't trace it any more
    only_eagerly = True
    with pytest.warns(keras_dp.PrivacyWarning, match="'loss'.*can't be traced"):
        fitted(model)
    assert any("can't be traced" in w for w in keras_dp.privacy_report(model, delta=1e-5).warnings)


def test_rule_18_keras_own_code_is_not_warned_of_when_it_runs_eagerly():
    model = tiny.compiled(metrics=["mae", keras.metrics.RootMeanSquaredError()], run_eagerly=True)
    fitted(model)
    assert model.optimizer.session.notes.unseen is None
    assert "run_eagerly" not in str(keras_dp.privacy_report(model, delta=1e-5))


# -- clipping strategies ------------------------------------------------------------------------


class Plain(keras_dp.clipping.Clipping):
    def __call__(self, norms, max_grad_norm):
        return max_grad_norm / (ops.sqrt(ops.sum(ops.square(norms), axis=1)) + max_grad_norm)


class KeepsRawNorms(Plain):
    def noised(self, add_noise, sums, sigma, seen):
        self.next = ops.max(seen.norms)
        return super().noised(add_noise, sums, sigma, seen)


class KeepsTheShare(keras_dp.clipping.AdaptiveClipping):
    def noised(self, add_noise, sums, sigma, seen):
        return super().noised(add_noise, sums, sigma / 2, seen)


@pytest.mark.parametrize("cls", [KeepsRawNorms, KeepsTheShare])
def test_rule_18_a_strategy_from_outside_does_not_see_what_is_not_noised(cls):
    with pytest.raises(keras_dp.PrivacyError, match=r"`noised`.*AdaptiveClipping"):
        tiny.sgd(clipping=cls())


def test_rule_18_nor_one_that_gets_its_noised_later():
    late, own = type("Late", (Plain,), {}), Plain()
    for strategy, give in ((late(), lambda f: setattr(late, "noised", f)), (own, None)):
        model = tiny.compiled(tiny.sgd(clipping=strategy))
        if give is None:
            own.noised = KeepsRawNorms.noised
        else:
            give(KeepsRawNorms.noised)
        refused(model, "`noised`")


class Writing(Plain):
    def __init__(self, how):
        self.seen = tf.Variable(0.0)
        self.weight = keras.Variable(0.0)
        self.how = how

    def __call__(self, norms, max_grad_norm):
        self.how(self, ops.max(norms))
        return super().__call__(norms, max_grad_norm)


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize(
    "how",
    [
        lambda s, largest: s.seen.assign(largest),
        lambda s, largest: s.weight.assign(largest),
        lambda s, largest: tf.numpy_function(lambda x: x, [largest], tf.float32),
        lambda s, largest: tf.print(largest),
    ],
)
def test_rule_18_a_strategy_that_writes_is_refused(how, mode):
    strategy = Writing(how)
    model = tiny.compiled(tiny.sgd(clipping=strategy, gradients="loop"), **MODES[mode])
    refused(model, "the clipping strategy Writing")
    assert float(strategy.seen) == 0.0 and float(strategy.weight.numpy()) == 0.0


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.one_in(2)
def test_rule_18_the_python_code_of_a_strategy_sees_no_number(mode):
    seen = []

    class Looking(Plain):
        def __call__(self, norms, max_grad_norm):
            seen.append(norms)
            return super().__call__(norms, max_grad_norm)

    model = tiny.compiled(tiny.sgd(clipping=Looking(), gradients="loop"), **MODES[mode])
    fitted(model)
    assert model.optimizer.ledger.steps == 4
    assert seen and not any(hasattr(norms, "numpy") for norms in seen)


@pytest.mark.parametrize("method", ["norm", "sensitivity"])
def test_rule_18_clip_and_noise_see_one_sensitivity(method):
    class Counting(Plain):
        calls = 0

        def count(self, max_grad_norm):
            self.calls += 1
            return max_grad_norm * self.calls

    class Drawing(Plain):
        pass

    class Stepping(Plain):
        def __init__(self):
            self.state = tf.Variable(1.0)

    setattr(Counting, method, Counting.count)
    setattr(Drawing, method, lambda self, c: c * tf.random.uniform(()))
    setattr(Stepping, method, lambda self, c: c * self.state.assign_add(1.0))
    for cls, match in ((Counting, "another"), (Drawing, "another"), (Stepping, "AssignAdd")):
        refused(tiny.compiled(tiny.sgd(clipping=cls(), gradients="loop")), match)


@pytest.mark.parametrize("method", ["norm", "sensitivity"])
def test_rule_18_a_subclass_of_adaptive_clipping_gets_the_noise_of_its_sensitivity(method):
    """Its noise was of the C that the base knows, whatever the subclass let through."""

    class Wide(keras_dp.clipping.AdaptiveClipping):
        pass

    base = getattr(keras_dp.clipping.AdaptiveClipping, method)
    setattr(Wide, method, lambda self, c: 10.0 * base(self, c))
    strategy = Wide()
    strategy.restore(1.0)
    deviations = []

    def add(sums, deviation):
        deviations.append(float(deviation))
        return list(sums)

    norms = ops.ones((3,))
    seen = keras_dp.clipping.Seen(norms, norms > 0, 100.0, 1.0)
    strategy.noised(add, [norms], ops.cast(1.0, "float64"), seen)
    assert deviations[0] >= 10.0


# -- callbacks ----------------------------------------------------------------------------------


class OwnStopping(keras.callbacks.EarlyStopping):
    pass


class OwnMonitor(keras.callbacks.Callback):
    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor


C = keras.callbacks
DECIDING = {
    "TerminateOnNaN": (lambda: C.TerminateOnNaN(), "loss of a batch.*contributes nothing"),
    "EarlyStopping": (lambda: C.EarlyStopping("loss"), "stops training by 'loss'.*val_"),
    "OwnStopping": (lambda: OwnStopping("mae"), "stops training by 'mae'"),
    "ReduceLROnPlateau": (lambda: C.ReduceLROnPlateau("loss"), "moves the learning rate by 'loss'"),
    "ModelCheckpoint": (
        lambda: C.ModelCheckpoint("best.keras", monitor="loss", save_best_only=True),
        "chooses which weights to keep by 'loss'",
    ),
    "ModelCheckpoint, named": (
        lambda: C.ModelCheckpoint("{epoch}-{loss:.3f}.weights.h5", save_weights_only=True),
        "writes 'loss' into the names of files",
    ),
    "OwnMonitor": (lambda: OwnMonitor("accuracy"), "acts on 'accuracy'"),
}
SILENT = [
    lambda: None,
    lambda: [],
    lambda: C.EarlyStopping("val_loss"),
    lambda: C.ReduceLROnPlateau("val_loss"),
    lambda: C.EarlyStopping("epsilon", mode="min"),
    lambda: C.ModelCheckpoint("{epoch}.keras"),
    lambda: C.ModelCheckpoint("{epoch}-{val_loss:.2f}.keras", save_best_only=True),
    lambda: C.ModelCheckpoint("all.keras", monitor="loss"),
    lambda: C.BackupAndRestore("backup"),
    lambda: C.LearningRateScheduler(lambda epoch: 0.1),
    lambda: C.LambdaCallback(on_epoch_end=lambda *_: None),
    lambda: keras_dp.PrivacyBudget(delta=1e-5),
    lambda: keras_dp.PrivacyMonitor(1e-5),
]


@pytest.mark.parametrize("what", DECIDING)
def test_rule_18_a_callback_that_decides_by_raw_numbers_is_named_with_the_fix(what):
    make, match = DECIDING[what]
    for given in (make(), [make()], [[make()], None], C.CallbackList([make()])):
        warning = raw_decisions(given)
        assert warning is not None and "epsilon" in warning
        with pytest.warns(keras_dp.PrivacyWarning, match=f"{what.partition(',')[0]} .*{match}"):
            warnings.warn(warning, keras_dp.PrivacyWarning, stacklevel=1)


@pytest.mark.parametrize("make", SILENT)
@pytest.mark.one_in(3)
def test_rule_18_other_callbacks_are_not_warned_of(make):
    assert raw_decisions(make()) is None


def test_rule_18_fit_warns_once_of_all_callbacks_and_again_the_next_time():
    model = tiny.compiled()

    def run(callbacks):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(model, epochs=2, callbacks=callbacks)
        found = [w for w in caught if issubclass(w.category, keras_dp.PrivacyWarning)]
        assert all(w.filename == __file__ for w in found)
        return [str(w.message) for w in found]

    callbacks = [C.TerminateOnNaN(), C.EarlyStopping("loss", patience=9)]
    for given in (callbacks, callbacks, C.CallbackList(callbacks, model=model)):
        (message,) = run(given)
        assert "TerminateOnNaN" in message and "EarlyStopping" in message
    assert run([]) == []


def test_rule_18_ordinary_training_is_not_warned_of():
    model = tiny.model()
    model.compile("sgd", loss="mse")
    fitted(model, callbacks=[C.TerminateOnNaN(), C.EarlyStopping("loss")])


def test_rule_13_statement_and_report_say_that_decisions_by_metrics_are_not_covered():
    model = tiny.compiled()
    tiny.private_steps(model)
    report = keras_dp.privacy_report(model, delta=1e-5)
    for text in (str(report), " ".join(json.loads(report.to_json())["not_covered"])):
        assert "whatever was decided by looking at them" in " ".join(text.split())
