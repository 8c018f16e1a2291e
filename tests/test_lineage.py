"""The ledger follows the weights: whatever model, optimizer, copy or file they turn up in."""

import copy
import gc
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tiny
from tiny import private_steps

import keras_dp
from keras_dp import lineage

X, Y = tiny.data()
Dense = keras.layers.Dense


def train(model, optimizer=None, *, epochs=1):
    """Four steps an epoch, private unless another optimizer is given."""
    # Keras can't load a legacy file with the loss "mse".
    model.compile(optimizer or tiny.sgd(), loss=keras.losses.MeanSquaredError())
    if isinstance(model.optimizer, keras_dp.DPOptimizer):
        private_steps(model, 4 * epochs)
    else:
        for _ in range(4 * epochs):
            model.train_on_batch(X, Y)
    return model


def trained(epochs=1):
    return train(tiny.model(hidden=3), epochs=epochs)


def spent(model):
    """The steps that a fresh private compile goes on from; infinite without protection."""
    model.compile(tiny.sgd(), loss="mse")
    return steps_of(model.optimizer)


def steps_of(optimizer):
    ledger = optimizer.ledger
    finite = np.isfinite(optimizer.get_epsilon(tiny.DELTA))
    assert finite == all(r.sampler != "unprotected" or not r.steps for r in ledger)
    return ledger.steps if finite else np.inf


def head(*layers):
    return keras.Sequential([keras.Input((4,)), *layers, Dense(1)])


# -- the same weights in another model ------------------------------------------------------------


def new_head(model):
    return head(*model.layers[:-1])


def part_of_the_graph(model):
    return keras.Model(model.inputs[0], model.layers[0].output)


def nested_in_a_sequential(model):
    return keras.Sequential([keras.Input((4,)), model])


def nested_in_a_graph(model):
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Add()([model(inputs), Dense(1)(inputs)]))


class Around(keras.Model):
    """A class of one's own that keeps a model in a list."""

    def __init__(self, model):
        super().__init__()
        self.parts = [{"of": model}]

    def call(self, x):
        return self.parts[0]["of"](x)


def nested_in_a_class(model):
    around = Around(model)
    around(X[:1])
    return around


def nested_twice(model):
    return nested_in_a_sequential(nested_in_a_class(model))


def frozen_under_a_head(model):
    model.layers[0].trainable = False
    return new_head(model)


def unbuilt_with_a_new_head(model):
    return keras.Sequential([*model.layers[:-1], Dense(2), Dense(1)])


def a_layer_alone(model):
    return head(model.layers[0])


OTHERS = [
    new_head,
    part_of_the_graph,
    nested_in_a_sequential,
    nested_in_a_graph,
    nested_in_a_class,
    nested_twice,
    frozen_under_a_head,
    unbuilt_with_a_new_head,
    a_layer_alone,
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.one_in(3)
def test_rule_16_another_model_of_the_same_weights_knows_what_they_cost(other):
    model = other(trained())
    assert spent(model) == 4
    private_steps(model)
    assert steps_of(model.optimizer) == 8
    assert keras_dp.privacy_report(model).steps == 8


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.one_in(9)
def test_rule_16_a_budget_counts_what_the_weights_cost_before(other):
    model = other(trained(epochs=2))
    model.compile(tiny.sgd(), loss="mse")
    already = model.optimizer.get_epsilon(tiny.DELTA)
    budget = keras_dp.PrivacyBudget(already * 1.001, delta=tiny.DELTA)
    with pytest.raises(keras_dp.PrivacyBudgetExceeded, match="8 steps"):
        model.fit(X, np.zeros((64, model(X[:1]).shape[-1])), callbacks=[budget], verbose=0)


@pytest.mark.parametrize("other", [frozen_under_a_head])
@pytest.mark.thorough
def test_rule_16_a_target_is_calibrated_for_what_the_weights_cost_before(other):
    model = other(trained())
    fresh = tiny.model(hidden=3)
    sigma = []
    for m in (model, fresh):
        target = keras_dp.DPSGD(0.1, max_grad_norm=1.0, target_epsilon=6.0, target_delta=1e-5)
        m.compile(target, loss="mse")
        m.fit(X, Y, batch_size=16, verbose=0)
        assert 5.9 < m.optimizer.get_epsilon(1e-5) <= 6.0
        sigma.append(m.optimizer.noise_multiplier)
    assert sigma[0] > sigma[1]


@pytest.mark.thorough
def test_rule_16_models_that_share_layers_are_trained_in_turns():
    encoder = Dense(3, activation="tanh")
    first, second = head(encoder), head(encoder)
    first.compile(tiny.sgd(), loss="mse")
    second.compile(tiny.sgd(), loss="mse")
    for epochs in (1, 2, 3):
        private_steps(first, 4 * epochs)
        private_steps(second)
    private_steps(second, 1)
    second.optimizer.limit_steps(epsilon=1e3, delta=tiny.DELTA)
    assert steps_of(first.optimizer) == steps_of(second.optimizer) == 24 + 12 + 1
    assert spent(first) == spent(second) == spent(head(encoder)) == 37
    # Each head has learned what the encoder has.
    assert [lineage.of(m.layers[-1]).steps for m in (first, second)] == [37, 37]


def test_rule_16_an_autoencoders_encoder_is_used_in_a_classifier():
    encoder = keras.Sequential([keras.Input((4,)), Dense(3, activation="tanh")], name="encoder")
    autoencoder = keras.Sequential([keras.Input((4,)), encoder, Dense(4)])
    train(autoencoder, epochs=2)
    classifier = keras.Sequential([keras.Input((4,)), encoder, Dense(1)])
    train(classifier, epochs=3)
    assert steps_of(classifier.optimizer) == steps_of(autoencoder.optimizer) == 20


def test_rule_16_two_private_models_meet_in_one():
    first, second = trained(), trained(epochs=2)
    inputs = keras.Input((4,))
    both = keras.Model(inputs, keras.layers.Add()([first(inputs), second(inputs)]))
    assert spent(both) == 12
    assert (spent(first), spent(second)) == (4, 8)


def test_rule_16_a_new_head_carries_its_encoders_cost_away():
    model = frozen_under_a_head(trained())
    train(model)
    alone = keras.Sequential([keras.Input((3,)), model.layers[-1]])
    assert spent(alone) == 8


def test_rule_16_public_weights_cost_nothing():
    public = train(tiny.model(hidden=3), keras.optimizers.SGD(0.1))
    public.layers[0].trainable = False
    model = new_head(public)
    assert spent(model) == 0
    train(model)
    assert steps_of(model.optimizer) == 4
    assert lineage.of(public.layers[0]).steps == 0
    # The public part may be trained on, and used elsewhere.
    public.layers[0].trainable = True
    alone = train(a_layer_alone(public), "sgd")
    assert lineage.of(alone).steps == 0


def test_rule_16_weights_that_are_gone_leave_nothing_behind():
    gc.collect()
    before = len(lineage._lineages)
    model = trained()
    assert len(lineage._lineages) > before
    del model
    gc.collect()
    assert len(lineage._lineages) == before


# -- compile --------------------------------------------------------------------------------------


def set_the_optimizer(model):
    model.optimizer = keras.optimizers.SGD()


def set_it_to_none(model):
    model.optimizer = None


def fail_in_compile(model):
    with pytest.raises(ValueError):
        model.compile("sgd", loss="mse", metrics="mae")


def fail_in_private_compile(model):
    with pytest.raises(ValueError):
        model.compile(tiny.sgd(), loss="mse", metrics="mae")


def compile_otherwise(model):
    model.compile("sgd", loss=keras.losses.MeanSquaredError())


def compile_otherwise_twice(model):
    for optimizer in ("sgd", keras.optimizers.Adam()):
        model.compile(optimizer, loss="mse")


@pytest.mark.parametrize(
    "change",
    [
        set_the_optimizer,
        set_it_to_none,
        fail_in_compile,
        fail_in_private_compile,
        compile_otherwise,
        compile_otherwise_twice,
    ],
)
@pytest.mark.one_in(2)
def test_rule_16_whatever_compile_was_given_before_the_cost_is_known(change):
    model = trained()
    change(model)
    assert spent(model) == 4


class OwnCompile(keras.Model):
    """Sets its optimizer itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = Dense(1)

    def call(self, x):
        return self.dense(x)

    def compile(self, optimizer, loss):
        self.optimizer = optimizer
        super().compile(optimizer=optimizer, loss=loss)


def test_rule_16_a_class_with_a_compile_of_its_own():
    model = train(OwnCompile())
    assert spent(model) == 4
    train(model)
    assert steps_of(model.optimizer) == 8
    train(model, keras.optimizers.SGD())
    assert spent(model) == np.inf


def test_rule_16_an_optimizer_that_was_replaced_knows_what_its_weights_cost_since():
    model = trained()
    first = model.optimizer
    train(model)
    assert steps_of(first) == 8
    train(model, "sgd")
    assert steps_of(first) == np.inf


# -- ordinary training ----------------------------------------------------------------------------


def ordinary_fit(model):
    model.compile(keras.optimizers.SGD(0.01), loss="mse")
    model.fit(X, np.zeros((64, model.layers[-1].units)), batch_size=16, verbose=0)


def ordinary_steps(model):
    train(model, keras.optimizers.SGD(0.01))


def ordinary_train_on_batch(model):
    model.compile("sgd", loss="mse")
    model.train_on_batch(X, Y)


def ordinary_scaled_loss(model):
    train(model, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01)))


def ordinary_accumulated(model):
    model.compile(keras.optimizers.SGD(0.01, gradient_accumulation_steps=2), loss="mse")
    model.train_on_batch(X, Y)


def with_the_inner_optimizer(model):
    train(model, model.optimizer.inner_optimizer)


def loop_of_ones_own(model, optimizer=None):
    import tensorflow as tf

    optimizer = optimizer or keras.optimizers.SGD(0.01)
    with tf.GradientTape() as tape:
        loss = keras.ops.mean((model(X) - Y) ** 2)
    variables = model.trainable_variables
    optimizer.apply(tape.gradient(loss, variables), variables)


def compiled_loop_of_ones_own(model):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(0.01)
    tf.function(lambda: loop_of_ones_own(model, optimizer))()


def loop_on_variables_of_tensorflow(model):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = keras.ops.mean((model(X) - Y) ** 2)
    variables = [v.value for v in model.trainable_variables]
    keras.optimizers.SGD(0.01).apply_gradients(
        zip(tape.gradient(loss, variables), variables, strict=True)
    )


def in_another_model(model):
    ordinary_steps(new_head(model))


def nested_in_another(model):
    ordinary_steps(nested_in_a_class(model))


ORDINARY = [
    ordinary_fit,
    ordinary_train_on_batch,
    ordinary_scaled_loss,
    ordinary_accumulated,
    with_the_inner_optimizer,
    loop_of_ones_own,
    compiled_loop_of_ones_own,
    loop_on_variables_of_tensorflow,
    in_another_model,
    nested_in_another,
]


@pytest.mark.filterwarnings("ignore:The state of this optimizer counts")  # its inner one's
@pytest.mark.parametrize("ordinary", ORDINARY)
@pytest.mark.one_in(6)
def test_rule_16_trained_without_protection_anywhere_is_infinite_everywhere(ordinary):
    model = trained()
    optimizer, beside = model.optimizer, new_head(model)
    ordinary(model)
    assert steps_of(optimizer) == np.inf
    assert spent(beside) == spent(part_of_the_graph(model)) == np.inf
    assert spent(copy.deepcopy(beside)) == np.inf
    assert spent(model) == np.inf
    train(model)
    assert steps_of(model.optimizer) == np.inf
    assert not keras_dp.privacy_report(model).private


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("other", [new_head, unbuilt_with_a_new_head, nested_in_a_class])
@pytest.mark.one_in(2)
def test_rule_16_ordinary_training_beside_private_weights_marks_what_it_trains(other, freeze):
    encoder = trained()
    model = keras.Sequential([other(encoder), Dense(1)])
    if freeze:
        encoder.trainable = False
    train(model, keras.optimizers.SGD(0.01))
    assert spent(keras.Sequential([keras.Input((1,)), model.layers[-1]])) == np.inf
    assert spent(model) == np.inf
    encoder.trainable = True
    if freeze and other is nested_in_a_class:
        assert spent(encoder) == 4  # it was not trained


def test_rule_16_an_optimizer_built_before_is_not_forgotten():
    """A graph that was traced while the weights were public runs again."""
    import tensorflow as tf

    model, optimizer = tiny.model(hidden=3), keras.optimizers.SGD(0.01)
    step = tf.function(lambda: loop_of_ones_own(model, optimizer))
    step()
    assert spent(model) == 0
    step()
    train(model)
    assert steps_of(model.optimizer) == 4  # what came before was public
    step()
    assert steps_of(model.optimizer) == np.inf


def test_rule_16_public_training_before_a_private_file_is_loaded_costs_nothing(tmp_path):
    trained().save_weights(tmp_path / "m.weights.h5")
    model = tiny.compiled(hidden=3)  # and then not trained with it
    train(model, keras.optimizers.SGD(0.01))
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        model.load_weights(tmp_path / "m.weights.h5")
    assert spent(model) == 4
    train(model, keras.optimizers.SGD(0.01))
    assert spent(model) == np.inf


def test_rule_16_setting_the_ordinary_optimizers_count_back_hides_nothing():
    model = trained()
    optimizer = keras.optimizers.SGD(0.01)
    train(model, optimizer)
    assert lineage.of(model).steps == 8
    optimizer.iterations.assign(0)
    assert lineage.of(model).steps == 8
    assert spent(model) == np.inf


def test_rule_16_compiling_without_training_costs_nothing():
    model = trained()
    for optimizer in ("sgd", model.optimizer.inner_optimizer, keras.optimizers.Adam()):
        model.compile(optimizer, loss="mse")
        model.evaluate(X, Y, verbose=0)
        with pytest.raises(ValueError):
            model.fit(X, Y[:3], verbose=0)
        model.compile(tiny.sgd(), loss="mse")
    assert spent(model) == 4


def test_rule_16_going_back_to_the_private_optimizer_after_its_inner_one():
    model = tiny.compiled(hidden=3)
    private = model.optimizer
    private_steps(model)
    model.compile(private.inner_optimizer, loss="mse")
    model.compile(private, loss="mse")
    private_steps(model)
    assert steps_of(private) == 8


def test_rule_16_ordinary_models_do_not_notice():
    model = tiny.model(hidden=3)
    train(model, keras.optimizers.Adam())
    again = pickle.loads(pickle.dumps(model))
    assert lineage.of(model, again).steps == 0
    assert not any(id(v) in lineage._lineages for v in [*model.variables, *again.variables])


@pytest.mark.thorough
def test_rule_16_ordinary_training_on_several_replicas_is_seen():
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        import keras, tiny, keras_dp
        from keras_dp import lineage
        from keras_dp.ledger import PrivacyLedger, Release
        x, y = tiny.data()
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = tiny.model(hidden=3)
            model.compile("sgd", loss="mse")
            model.fit(x, y, batch_size=16, verbose=0)
        ledger = PrivacyLedger((Release("unknown", 1.0, steps=4),))
        lineage.add(ledger, model)
        before = lineage.of(model).steps
        model.fit(x, y, batch_size=16, verbose=0)
        print(before, lineage.of(model).steps)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["4", "8"]


def test_rule_16_a_generator_that_sees_the_private_critic_only_stays_out_of_it():
    generator = keras.Sequential([keras.Input((2,)), Dense(4)])
    critic = trained()
    ordinary = keras.optimizers.SGD(0.01)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = keras.ops.mean(critic(generator(X[:, :2])))
    variables = generator.trainable_variables
    ordinary.apply(tape.gradient(loss, variables), variables)
    assert steps_of(critic.optimizer) == 4


# -- files ----------------------------------------------------------------------------------------


def loaded(path, **kwargs):
    return keras.saving.load_model(path, **kwargs)


def keras_file(model, folder):
    model.save(folder / "m.keras")
    return loaded(folder / "m.keras")


def keras_file_without_compile(model, folder):
    keras.saving.save_model(model, folder / "m.keras")
    return loaded(folder / "m.keras", compile=False)


def folder_without_zip(model, folder):
    path = folder / f"m{len(list(folder.iterdir()))}"
    keras.saving.save_model(model, path, zipped=False)
    return loaded(path)


def weights_before_compile(model, folder):
    model.save_weights(folder / "m.weights.h5")
    other = tiny.model(hidden=3)
    other.load_weights(folder / "m.weights.h5")
    return other


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def weights_while_compiled_otherwise(model, folder):
    keras.saving.save_weights(model, folder / "m.weights.h5")
    other = tiny.model(hidden=3)
    other.compile("adam", loss="mse")
    keras.saving.load_weights(other, folder / "m.weights.h5")
    return other


def weights_of_a_keras_file(model, folder):
    model.save(folder / "m.keras")
    other = tiny.model(hidden=3)
    other.load_weights(folder / "m.keras")
    return other


def sharded_weights(model, folder):
    model.save_weights(folder / "m.weights.json", max_shard_size=1e-3)
    other = tiny.model(hidden=3)
    other.load_weights(folder / "m.weights.json")
    return other


def only_some_weights(model, folder):
    model.save_weights(folder / "m.weights.h5")
    other = tiny.model(hidden=model.layers[0].units + 1)
    with pytest.warns(UserWarning, match="could not be loaded"):
        other.load_weights(folder / "m.weights.h5", skip_mismatch=True)
    return other


def memory(model, _):
    buffer = io.BytesIO()
    keras.saving.save_model(model, buffer, zipped=False)
    buffer.seek(0)
    return keras.src.saving.saving_lib.load_model(buffer)


def pickled(model, _):
    return pickle.loads(pickle.dumps(model))


def deep_copied(model, _):
    return copy.deepcopy(model)


def shallow_copied(model, _):
    return copy.copy(model)


def pickled_layer(model, _):
    return head(pickle.loads(pickle.dumps(model.layers[0])))


def legacy_file(model, folder):
    model.save(folder / "m.h5")
    return loaded(folder / "m.h5")


def legacy_file_without_compile(model, folder):
    keras.saving.save_model(model, folder / "m.hdf5", include_optimizer=False)
    return loaded(folder / "m.hdf5", compile=False)


def legacy_weights(model, folder):
    model.save(folder / "m.h5")
    other = tiny.model(hidden=3)
    other.load_weights(folder / "m.h5")
    return other


def legacy_weights_by_name(model, folder):
    model.save(folder / "m.h5")
    other = keras.models.clone_model(model)
    other.load_weights(folder / "m.h5", by_name=True)
    return other


def fixed(model, _):
    return keras_dp.fix_model(model)


def for_deployment(model, folder):
    keras_dp.save_inference_model(model, folder / "m.keras")
    return loaded(folder / "m.keras")


WAYS = [
    keras_file,
    keras_file_without_compile,
    folder_without_zip,
    weights_before_compile,
    weights_while_compiled_otherwise,
    weights_of_a_keras_file,
    sharded_weights,
    only_some_weights,
    memory,
    pickled,
    deep_copied,
    shallow_copied,
    pickled_layer,
    legacy_file,
    legacy_file_without_compile,
    legacy_weights,
    legacy_weights_by_name,
    fixed,
    for_deployment,
]


def as_trained(model):
    pass


def uncompiled(model):
    del model.optimizer
    model.compiled = False


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("written", [as_trained, compile_otherwise, uncompiled, ordinary_steps])
@pytest.mark.one_in(4)
def test_rule_16_every_copy_and_file_carries_it_whatever_it_is_compiled_with(
    way, written, tmp_path
):
    model = trained()
    written(model)
    again = way(model, tmp_path)
    cost = np.inf if written is ordinary_steps else 4
    assert lineage.of(again).steps == (8 if written is ordinary_steps else 4)
    if isinstance(getattr(again, "optimizer", None), keras_dp.DPOptimizer):
        assert steps_of(again.optimizer) == cost
    assert spent(again) == cost
    assert spent(model) == cost
    train(again)
    assert steps_of(again.optimizer) == cost + 4
    assert spent(way(again, tmp_path)) == cost + 4  # and once more


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_in(5)
def test_rule_16_training_a_copy_without_protection_is_seen(way, tmp_path):
    again = way(trained(), tmp_path)
    again.compile("sgd", loss="mse")
    again.train_on_batch(X, Y)
    assert spent(again) == np.inf


def test_rule_16_a_file_that_was_edited_with_keras_carries_it(tmp_path):
    model = trained()
    model.save_weights(tmp_path / "m.weights.h5")
    editor = keras.saving.KerasFileEditor(str(tmp_path / "m.weights.h5"))
    editor.save(str(tmp_path / "edited.weights.h5"))
    other = tiny.model(hidden=3)
    other.load_weights(tmp_path / "edited.weights.h5")
    assert spent(other) == 4


def test_rule_16_weights_in_several_shards_carry_it(tmp_path):
    model = train(tiny.model(hidden=300))
    model.save_weights(tmp_path / "m.weights.json", max_shard_size=5e-6)
    assert len(list(tmp_path.iterdir())) > 2
    other = tiny.model(hidden=300)
    other.load_weights(tmp_path / "m.weights.json")
    assert tiny.same(other.get_weights(), model.get_weights())
    assert spent(other) == 4


def test_rule_16_a_keras_file_written_after_a_legacy_one_trains_privately(tmp_path):
    model = trained()
    model.save(tmp_path / "m.h5")
    model.save(tmp_path / "m.keras")
    again = loaded(tmp_path / "m.keras")
    assert type(again.optimizer) is keras_dp.DPSGD
    private_steps(again)
    assert steps_of(again.optimizer) == 8


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.thorough
def test_rule_16_a_checkpoint_is_loaded_while_compiled_otherwise(tmp_path):
    path = tmp_path / "{epoch}.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    model = tiny.compiled(hidden=3)
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[checkpoint])
    other = tiny.model(hidden=3)
    other.compile("sgd", loss="mse")
    other.fit(X, Y, batch_size=16, verbose=0)  # on public data, say
    other.load_weights(tmp_path / "1.weights.h5")
    assert lineage.of(other).steps == 4
    other.load_weights(tmp_path / "2.weights.h5")
    assert lineage.of(other).steps == 8
    assert np.isfinite(keras_dp.privacy_report(other).epsilon["pld"])
    other.fit(X, Y, batch_size=16, verbose=0)
    assert spent(other) == np.inf


def test_rule_16_a_backup_of_ordinary_training_carries_it(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "b", delete_checkpoint=False)
    model = trained()
    model.compile("sgd", loss="mse")
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[backup])
    other = tiny.model(hidden=3)
    other.compile("sgd", loss="mse")
    backup = keras.callbacks.BackupAndRestore(tmp_path / "b")
    other.fit(X, Y, batch_size=16, verbose=0, callbacks=[backup])
    assert spent(other) == np.inf


def test_rule_16_loading_takes_nothing_away(tmp_path):
    public = train(tiny.model(hidden=3), "sgd")
    public.save_weights(tmp_path / "public.weights.h5")
    model = trained()
    model.compile("sgd", loss="mse")
    model.load_weights(tmp_path / "public.weights.h5")
    assert spent(model) == 4


def test_rule_16_a_count_that_a_file_sets_back_hides_no_ordinary_step(tmp_path):
    model = trained()
    model.compile("sgd", loss="mse")
    model.save_weights(tmp_path / "before.weights.h5")
    model.fit(X, Y, batch_size=16, verbose=0)
    model.load_weights(tmp_path / "before.weights.h5")
    assert int(model.optimizer.iterations) == 0
    assert spent(model) == np.inf


@pytest.mark.thorough
def test_rule_16_files_load_where_keras_dp_is_not_installed(tmp_path):
    model = trained()
    keras_dp.save_inference_model(model, tmp_path / "deploy.keras")
    model.compile("sgd", loss=keras.losses.MeanSquaredError())
    model.save(tmp_path / "m.keras")
    model.save(tmp_path / "m.h5")
    model.save_weights(tmp_path / "m.weights.h5")
    np.save(tmp_path / "x.npy", X)
    script = """
        import sys
        sys.modules["keras_dp"] = None
        import json, keras, numpy as np
        folder = sys.argv[1]
        x = np.load(folder + "/x.npy")
        names = ("deploy.keras", "m.keras", "m.h5")
        models = [keras.saving.load_model(f"{folder}/{name}") for name in names]
        models.append(keras.models.clone_model(models[0]))
        models[-1].load_weights(folder + "/m.weights.h5")
        print(json.dumps([m.predict(x, verbose=0).tolist() for m in models]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    wanted = model.predict(X, verbose=0)
    for served in json.loads(done.stdout.splitlines()[-1]):
        assert np.allclose(served, wanted, atol=1e-6)


def test_rule_16_an_ordinary_file_is_as_it_always_was(tmp_path):
    import h5py

    train(tiny.model(hidden=3), "sgd").save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5") as file:
        assert set(file) == {"layers", "optimizer", "vars"} or set(file) == {"layers", "optimizer"}


def test_rule_16_quantized_weights_are_those_they_were_made_of():
    model = trained()
    model.layers[0].quantize("int8")
    assert lineage.of(model.layers[0]).steps == 4
    assert lineage.of(part_of_the_graph(model)).steps == 4


# -- files of older versions ----------------------------------------------------------------------

OLD = pathlib.Path(__file__).parent / "data" / "0.1.0"


def old_architecture():
    encoder = keras.Sequential([keras.Input((4,)), Dense(3, activation="tanh")])
    return keras.Sequential([keras.Input((4,)), encoder, Dense(1)])


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize(("name", "steps"), [("model.keras", 4), ("nested.keras", 8)])
def test_rule_16_models_of_older_versions_load_with_their_ledger(name, steps, compile):
    model = loaded(OLD / name, compile=compile)
    assert lineage.of(model).steps == steps
    if compile:
        assert steps_of(model.optimizer) == steps
    assert spent(model) == steps


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("optimizer", [None, "sgd", tiny.sgd])
@pytest.mark.parametrize("name", ["model.weights.h5", "backup/latest.weights.h5", "model.keras"])
def test_rule_16_weights_of_older_versions_load_with_their_ledger(name, optimizer):
    model = old_architecture()
    if optimizer is not None:
        made = optimizer if isinstance(optimizer, str) else optimizer(momentum=0.9)
        model.compile(made, loss="mse")
    model.load_weights(OLD / name)
    assert lineage.of(model).steps == 4
    assert spent(model) == 4


def test_rule_16_backups_of_older_versions_load_with_their_ledger(tmp_path):
    shutil.copytree(OLD / "backup", tmp_path / "backup")
    model = old_architecture()
    model.compile(tiny.sgd(momentum=0.9), loss="mse")
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    model.fit(X, Y, batch_size=16, epochs=2, callbacks=[backup], verbose=0)
    assert steps_of(model.optimizer) == 8


def test_rule_16_journals_of_older_versions_are_read(tmp_path):
    shutil.copy(OLD / "journal.jsonl", tmp_path)
    model = old_architecture()
    model.compile(tiny.sgd(), loss="mse")
    budget = keras_dp.PrivacyBudget(delta=1e-5, ledger_path=tmp_path / "journal.jsonl")
    model.fit(X, Y, batch_size=16, callbacks=[budget], verbose=0)
    assert steps_of(model.optimizer) == 8
    assert spent(new_head(model)) == 8


@pytest.mark.parametrize("compile", [True, False])
def test_rule_16_a_legacy_file_of_an_older_version_is_taken_for_unprotected(compile):
    """It says that it was trained privately, and not what that cost."""
    with pytest.warns(keras_dp.PrivacyWarning, match=r"model\.h5.*no ledger"):
        model = loaded(OLD / "model.h5", compile=compile)
    assert spent(model) == np.inf


# -- state without a ledger -----------------------------------------------------------------------


def state_tree(model, other):
    with pytest.warns(keras_dp.PrivacyWarning, match="get_state_tree.* without the ledger"):
        tree = model.get_state_tree()
    other.set_state_tree(tree)


def optimizer_weights(model, other):
    other.set_weights(model.get_weights())
    other.optimizer.build(other.trainable_variables)
    other.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])


def tensorflow_checkpoint(model, other, folder):
    import tensorflow as tf

    with pytest.warns(keras_dp.PrivacyWarning, match="without the ledger of the 4 steps"):
        path = tf.train.Checkpoint(model=model).save(str(folder / "c"))
    tf.train.Checkpoint(model=other).restore(path).expect_partial()


@pytest.mark.parametrize("way", [state_tree, optimizer_weights, tensorflow_checkpoint])
@pytest.mark.one_in(3)
def test_rule_16_an_optimizer_with_steps_and_no_ledger_never_reports_0(way, tmp_path):
    keras.utils.clear_session()  # a state tree goes by names: as in another process
    model = trained()
    keras.utils.clear_session()
    other = tiny.compiled(hidden=3)
    other.optimizer.build(other.trainable_variables)
    way(model, other, *([tmp_path] if way is tensorflow_checkpoint else []))
    with pytest.warns(keras_dp.PrivacyWarning, match=r"4 steps.*no ledger"):
        assert other.optimizer.get_epsilon(tiny.DELTA) == np.inf
    assert other.optimizer.get_epsilon(tiny.DELTA) == np.inf
    private_steps(other)
    assert other.optimizer.get_epsilon(tiny.DELTA) == np.inf
    assert spent(other) == np.inf
    assert not keras_dp.privacy_report(other).private


@pytest.mark.parametrize("kind", ["save", "write", "manager", "root", "list", "nested"])
@pytest.mark.one_in(3)
def test_rule_16_a_tensorflow_checkpoint_says_that_it_keeps_no_ledger(kind, tmp_path):
    import tensorflow as tf

    model = trained()
    path = str(tmp_path / "c")
    held = {
        "root": lambda: tf.train.Checkpoint(model),
        "list": lambda: tf.train.Checkpoint(models=[model]),
        "nested": lambda: tf.train.Checkpoint(inside=tf.train.Checkpoint(of=model.layers[0])),
    }
    checkpoint = held.get(kind, lambda: tf.train.Checkpoint(model=model))()
    manager = tf.train.CheckpointManager(checkpoint, str(tmp_path), 1)
    write = {"write": lambda: checkpoint.write(path), "manager": manager.save}
    with pytest.warns(keras_dp.PrivacyWarning, match=r"without the ledger.*weights\.h5"):
        write.get(kind, lambda: checkpoint.save(path))()
    tf.train.Checkpoint(model=train(tiny.model(hidden=3), "sgd")).save(path)  # an ordinary one


def test_rule_16_a_step_of_ones_own_that_was_never_applied_is_a_step():
    model, optimizer = tiny.model(hidden=3), tiny.sgd()
    data = keras_dp.PoissonDataset(X, Y, batch_size=16)

    def loss_fn(example):
        x, y = example
        return keras.ops.mean((model(x) - y) ** 2)

    variables = model.trainable_variables
    for k, batch in enumerate(data):
        found = optimizer.private_gradients(
            loss_fn, variables, batch, sampling=data, models=[model]
        )
        if k % 2:
            optimizer.apply(found, variables)
    assert steps_of(optimizer) == 4
    assert spent(model) == 4  # compiled with another one
    assert spent(new_head(model)) == 4


@pytest.mark.thorough
def test_rule_16_a_loop_of_ones_own_on_weights_that_fit_trained():
    model = trained()
    optimizer = tiny.sgd()
    data = keras_dp.PoissonDataset(X, Y, batch_size=16)
    variables = [model.layers[-1].kernel]

    def loss_fn(example):
        return keras.ops.mean((model(example[0]) - example[1]) ** 2)

    for batch in data:
        found = optimizer.private_gradients(
            loss_fn, variables, batch, sampling=data, models=[model]
        )
        optimizer.apply(found, variables)
    assert steps_of(optimizer) == steps_of(model.optimizer) == 8
