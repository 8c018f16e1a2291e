"""What training has cost travels with the model; what is deployed needs no keras_dp."""

import inspect
import json
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tiny

import keras_dp

X, Y = tiny.data()


def fitted(*, epochs=1, **kwargs):
    model = tiny.compiled(tiny.sgd(momentum=0.9, **kwargs))
    tiny.private_steps(model, 4 * epochs)
    return model


def slots(model):
    return [v.numpy() for v in model.optimizer.variables]


def run(script, *arguments):
    """Runs Python code in a process of its own and returns the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# -- .keras and .weights.h5 -------------------------------------------------------------------


@pytest.mark.oldest
def test_rule_06_a_keras_file_carries_ledger_and_optimizer_state(tmp_path):
    model = fitted()
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.optimizer.ledger == model.optimizer.ledger
    assert tiny.same(slots(again), slots(model))
    assert np.any(slots(again)[2] != 0)
    spent = model.optimizer.get_epsilon(1e-5)
    assert again.optimizer.get_epsilon(1e-5) == spent > 0
    again.fit(X, Y, batch_size=16, verbose=0)
    assert again.optimizer.ledger.steps == 8
    assert again.optimizer.get_epsilon(1e-5) > spent


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.thorough
def test_rule_06_a_weights_file_carries_ledger_and_optimizer_state(built, tmp_path):
    model = fitted()
    model.save_weights(tmp_path / "m.weights.h5")
    other = tiny.compiled(tiny.sgd(momentum=0.9))
    if built:
        other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "m.weights.h5")
    assert tiny.same(other.get_weights(), model.get_weights())
    assert tiny.same(slots(other), slots(model))
    assert other.optimizer.ledger == model.optimizer.ledger


@pytest.mark.thorough
def test_rule_06_loading_an_older_state_of_the_same_training_takes_nothing_back(tmp_path):
    model = fitted()
    model.save_weights(tmp_path / "old.weights.h5")
    model.fit(X, Y, batch_size=16, verbose=0)
    spent = model.optimizer.get_epsilon(1e-5)
    for _ in range(2):
        model.load_weights(tmp_path / "old.weights.h5")
        assert int(model.optimizer.iterations) == 4
        assert model.optimizer.ledger.steps == 8
        assert model.optimizer.get_epsilon(1e-5) == spent
    model.fit(X, Y, batch_size=16, verbose=0)
    assert model.optimizer.ledger.steps == 12


@pytest.mark.thorough
def test_rule_06_loading_another_training_adds_what_it_has_cost(tmp_path):
    first, second = fitted(), fitted()
    first.save_weights(tmp_path / "first.weights.h5")
    second.load_weights(tmp_path / "first.weights.h5")
    assert second.optimizer.ledger.steps == 8
    # Two trainings that went on from one file share its steps and nothing else.
    ways = [keras.models.clone_model(first) for _ in range(2)]
    for way in ways:
        way.compile(tiny.sgd(momentum=0.9), loss="mse")
        way.load_weights(tmp_path / "first.weights.h5")
        way.fit(X, Y, batch_size=16, verbose=0)
    ways[0].save_weights(tmp_path / "way.weights.h5")
    ways[1].load_weights(tmp_path / "way.weights.h5")
    assert ways[1].optimizer.ledger.steps == 4 + 4 + 4


@pytest.mark.filterwarnings("ignore:Skipping variable loading")  # Keras, of the other's state
def test_weights_of_unknown_cost_are_loaded_with_a_warning(tmp_path):
    plain = tiny.model()
    plain.compile("sgd", loss="mse")
    plain.fit(X, Y, verbose=0)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = tiny.compiled(tiny.sgd())
    with pytest.warns(UserWarning, match="cost is unknown"):
        model.load_weights(tmp_path / "plain.weights.h5")
    assert tiny.same(model.get_weights(), plain.get_weights())
    assert model.optimizer.ledger.steps == 0


def test_rule_07_no_seed_and_no_generator_state_is_saved(tmp_path):
    import zipfile

    model = fitted(seed=987654321)
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as file:
        config = file.read("config.json")
    assert b"987654321" not in config
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.optimizer.seed is None
    assert again.optimizer.ledger.releases[0].seeded


# -- BackupAndRestore -------------------------------------------------------------------------


def go_on(folder, *callbacks):
    backup = keras.callbacks.BackupAndRestore(folder)
    optimizer = tiny.sgd(momentum=0.9, noise_multiplier=None, target_epsilon=2.0, target_delta=1e-5)
    model = tiny.compiled(optimizer)
    x, y = tiny.data()
    model.fit(x, y, batch_size=16, epochs=5, callbacks=[backup, *callbacks], verbose=0)
    print(optimizer.ledger.steps, int(optimizer.iterations), optimizer.get_epsilon(1e-5))


class Crash(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.thorough
def test_rule_06_backup_and_restore_goes_on_in_a_fresh_process(tmp_path):
    folder = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        go_on(folder, Crash())
    script = "import sys; sys.path.insert(0, sys.argv[1]); import keras, tiny\n"
    script += inspect.getsource(go_on) + "go_on(sys.argv[2])"
    last = run(script, os.path.dirname(__file__), folder)
    steps, iterations, epsilon = map(float, last.split())
    assert (steps, iterations) == (20, 20)
    assert 1.96 < epsilon <= 2.0


# -- deployment -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_an_exported_model_serves_the_same_numbers_without_keras_dp(tmp_path):
    model = fitted()
    model.export(tmp_path / "serving", verbose=False)
    np.save(tmp_path / "x.npy", X)
    served = run(
        """
        import sys
        sys.modules["keras"] = sys.modules["keras_dp"] = None
        import json, numpy as np, tensorflow as tf
        loaded = tf.saved_model.load(sys.argv[1] + "/serving")
        print(json.dumps(loaded.serve(np.load(sys.argv[1] + "/x.npy")).numpy().tolist()))
        """,
        tmp_path,
    )
    assert np.allclose(json.loads(served), model.predict(X, verbose=0), atol=1e-6)


class Doubled(keras.Model):
    """Two outputs from a class of the user's own, around a model that is compiled itself."""

    def __init__(self, units=1, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner = tiny.compiled()
        self.head = keras.layers.Dense(units)

    def call(self, x):
        h = self.inner(x)
        return {"a": h, "b": self.head(h)}

    def get_config(self):
        return {"units": self.units}


SUBCLASS = """
class Doubled(keras.Model):
    def __init__(self, units=1, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        self.head = keras.layers.Dense(units)
    def call(self, x):
        h = self.inner(x)
        return {"a": h, "b": self.head(h)}
    def get_config(self):
        return {"units": self.units}
"""


def nested():
    inputs = keras.Input((4,))
    hidden = tiny.compiled()(inputs)  # a part that was compiled with a DP optimizer itself
    return keras.Model(inputs, {"a": hidden, "b": keras.layers.Dense(1)(hidden)})


@pytest.mark.parametrize("make", [Doubled, nested])
@pytest.mark.one_in(2)
def test_an_inference_model_loads_where_keras_dp_is_not_installed(make, tmp_path):
    model = make()
    model(X[:1])
    model.compile(tiny.sgd(momentum=0.9), loss={"a": "mse", "b": "mae"}, metrics={"a": ["mae"]})
    targets = {"a": Y, "b": Y}
    model.fit(X, targets, batch_size=16, verbose=0)
    keras_dp.save_inference_model(model, tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", X)
    script = f"""
        import sys
        sys.modules["keras_dp"] = None
        import json, keras, numpy as np
        {textwrap.indent(SUBCLASS, " " * 8).strip()}
        objects = {{"Doubled": Doubled}}
        model = keras.saving.load_model(sys.argv[1] + "/m.keras", custom_objects=objects)
        out = model.predict(np.load(sys.argv[1] + "/x.npy"), verbose=0)
        print(json.dumps([{{k: v.tolist() for k, v in out.items()}}, model.compiled]))
    """
    served, is_compiled = json.loads(run(script, tmp_path))
    wanted = model.predict(X, verbose=0)
    assert all(np.allclose(served[k], wanted[k], atol=1e-6) for k in ("a", "b"))
    assert not is_compiled
    # The model itself is as it was: compiled, trainable, and its ledger goes on.
    assert model.compiled
    assert set(model.evaluate(X, targets, verbose=0, return_dict=True)) >= {"loss"}
    model.fit(X, targets, batch_size=16, verbose=0)
    assert model.optimizer.ledger.steps == 8


@pytest.mark.thorough
def test_the_statement_lies_beside_the_inference_model(tmp_path):
    model = fitted()
    keras_dp.save_inference_model(model, str(tmp_path / "m.keras"), delta=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "m.keras",
        "m.privacy.json",
        "m.privacy.md",
    ]
    statement = json.loads((tmp_path / "m.privacy.json").read_text(encoding="utf-8"))
    assert statement["epsilon"]["pld"] == pytest.approx(model.optimizer.get_epsilon(1e-6))
    assert statement["steps"] == 4
    text = (tmp_path / "m.privacy.md").read_text(encoding="utf-8")
    assert f"{model.optimizer.get_epsilon(1e-6):.4f}" in text and "1e-06" in text


def test_another_ending_is_refused_and_nothing_is_written(tmp_path):
    model = fitted()
    for name in ("m.h5", "m", "m.weights.h5"):
        with pytest.raises(ValueError, match=r"\.keras file.*model\.export"):
            keras_dp.save_inference_model(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_model_without_privacy_is_refused_and_nothing_is_written(tmp_path):
    model = tiny.model()
    for _ in range(2):
        with pytest.raises(ValueError, match="not been trained privately"):
            keras_dp.save_inference_model(model, tmp_path / "m.keras")
        model.compile("sgd", loss="mse")
    assert not list(tmp_path.iterdir())
