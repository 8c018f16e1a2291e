"""Fine-tuning: what is frozen costs nothing; LoRA's factors alone are noised and pay."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
import scipy.stats
from keras import layers
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    noiseless_optimizer,
    norms_of,
    relative_error,
    update_on_batch,
)
from tiny import DELTA, sgd

import keras_dp
from keras_dp import PrivacyError
from keras_dp.gradients import ghost

EXAMPLES = Path(__file__).parents[1] / "examples"
LENGTH, VOCABULARY = 5, 9
TOLERANCE = 1e-5


# -- small models that are fine-tuned ------------------------------------------------------


def backbone(width=4, dropout=0.0):
    """From token numbers to a vector, by each of the layers that LoRA can be enabled on."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width, name="table")(tokens)
    x = layers.EinsumDense("abc,cd->abd", (LENGTH, width), name="mix")(x)
    x = layers.Dropout(dropout)(layers.Activation("tanh")(x))
    x = layers.Dense(width, "tanh", name="dense")(x)
    return keras.Model(tokens, layers.Flatten()(x), name="backbone")


def enable_lora(a_backbone, rank=2):
    """As docs/fine-tuning.md says: the factors are trained, all else is frozen."""
    for name in ("table", "mix", "dense"):
        a_backbone.get_layer(name).enable_lora(rank)
    for weight in a_backbone.weights:
        weight.trainable = "lora" in weight.path
    return a_backbone


def with_head(a_backbone):
    tokens = keras.Input((LENGTH,), dtype="int32")
    return keras.Model(tokens, layers.Dense(2, name="head")(a_backbone(tokens)))


def data(rows=32):
    random = np.random.default_rng(0)
    x = random.integers(0, VOCABULARY, (rows, LENGTH)).astype("int32")
    return x, random.normal(size=(rows, 2)).astype("float32")


def names(variables):
    return [v.path.split("/", 1)[-1] if "head" in v.path else v.path for v in variables]


FACTORS = [
    f"{layer}/lora_{weight}_{factor}"
    for layer, weight in (("table", "embeddings"), ("mix", "kernel"), ("dense", "kernel"))
    for factor in "ab"
]


def disturb(model):
    """Weights of any value: B starts at zero, where A has no gradient."""
    random = np.random.default_rng(4)
    for v in model.trainable_variables:
        v.assign(0.5 * random.normal(size=v.shape))
    return model


def outside_uses():
    """Sees which weights the ghost engine finds used outside of their layers' calls."""
    seen = set()
    original = ghost.GhostEngine._outside_gradients

    def spy(self, *args):
        seen.update(self.used_outside)
        return original(self, *args)

    return mock.patch.object(ghost.GhostEngine, "_outside_gradients", spy), seen


def require_exact(model, x, y, *, loss="mse"):
    """The ghost engine serves the model by its layers; the numbers are those of a plain loop."""
    model.compile("sgd", loss=loss)
    gradients, _ = example_gradients(model, x, y)
    norms = norms_of(gradients)
    assert all(np.any(g != 0) for g in gradients[0])
    clip_norm = float(np.median(norms))
    patch, outside = outside_uses()
    with patch:
        outcome, engine = engine_outcome(model, x, y, max_grad_norm=clip_norm)
    assert engine == "ghost"
    assert not outside
    np.testing.assert_allclose(outcome.norms[: len(norms)], norms, rtol=TOLERANCE)
    assert len(outcome.sums) == len(model.trainable_variables)
    assert relative_error(outcome.sums, clipped_sum(gradients, clip_norm)) < TOLERANCE
    return norms


def noise_alone(model, *, epochs=4):
    """Trains on examples of weight 0, so that all that moves a weight is noise.

    Returns:
        What was added to each weight, trained or not; and for the trained ones
        the standard deviation that it must have.
    """
    x, y = data(64)
    model.compile(keras_dp.DPSGD(1.0, max_grad_norm=1.5, noise_multiplier=2.0), loss="mse")
    before = {v.path: v.numpy() for v in model.weights}
    steps_before = model.optimizer.ledger.steps
    model.fit(x, y, sample_weight=np.zeros(64), batch_size=32, epochs=epochs, verbose=0)
    steps = model.optimizer.ledger.steps - steps_before
    assert steps == 2 * epochs
    return {v.path: v.numpy() - before[v.path] for v in model.weights}, steps**0.5 * 2 * 1.5 / 32


def require_noise_of(added, deviation):
    """Mean square as of Gaussian noise; false alarm 2e-8."""
    low, high = scipy.stats.chi2.ppf([1e-8, 1 - 1e-8], added.size)
    assert low < np.sum((added / deviation) ** 2) < high


# -- what is frozen --------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_frozen_backbone_gets_neither_gradient_nor_noise_nor_optimizer_state():
    frozen = backbone()
    frozen.trainable = False
    model = with_head(frozen)
    x, y = data()
    model.compile(sgd(momentum=0.9), loss="mse")
    before = {v.path: v.numpy() for v in model.weights}

    model.fit(x, y, batch_size=16, epochs=2, verbose=0)

    moved = [path for path, value in before.items() if np.any(value != _now(model, path))]
    assert moved == ["head/kernel", "head/bias"]
    slots = [v for v in model.optimizer.variables if len(v.shape)]
    assert sorted(tuple(v.shape) for v in slots) == [(2,), (4 * LENGTH, 2)]


def _now(model, path):
    return next(v for v in model.weights if v.path == path).numpy()


@pytest.mark.thorough
def test_clipping_looks_at_the_trained_weights_alone():
    """Freezing leaves more of the clipping norm to what is trained."""
    model = with_head(enable_lora(backbone()))
    disturb(model)
    x, y = data(1)
    model.compile(noiseless_optimizer(0.01), loss="mse")

    update = update_on_batch(model, x, 100 * y)

    assert names(model.trainable_variables) == [*FACTORS, "kernel", "bias"]
    assert all(np.any(u != 0) for u in update)
    assert np.sqrt(sum(np.sum(u**2) for u in update)) == pytest.approx(0.01, rel=1e-4)


# -- LoRA ------------------------------------------------------------------------------------


def test_the_factors_are_noised_each_in_full_and_nothing_else_is():
    model = with_head(enable_lora(backbone(width=32), rank=8))

    added, deviation = noise_alone(model)

    trained = [v.path for v in model.trainable_variables]
    assert {path for path in added if np.any(added[path] != 0)} == set(trained)
    assert len(trained) == len(FACTORS) + 2
    for path in trained:
        require_noise_of(added[path], deviation)


def layers_frozen_first(a_backbone):
    """The whole backbone is frozen, and then the factors alone are made trainable."""
    for name in ("table", "mix", "dense"):
        a_backbone.get_layer(name).enable_lora(2)
    a_backbone.trainable = False
    for weight in a_backbone.weights:
        weight.trainable = "lora" in weight.path
    return a_backbone


def with_biases(a_backbone):
    """As Keras leaves it: the kernels are frozen, the biases are not."""
    for name in ("table", "mix", "dense"):
        a_backbone.get_layer(name).enable_lora(2)
    return a_backbone


@pytest.mark.parametrize("how", [enable_lora, layers_frozen_first, with_biases])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_factors_inside_a_nested_backbone_are_served_by_their_layers_rules(how):
    require_exact(disturb(with_head(how(backbone()))), *data(4))


@pytest.mark.thorough
def test_the_kernel_may_be_trained_along_with_its_factors():
    model = with_head(enable_lora(backbone()))
    for name in ("mix", "dense"):
        model.get_layer("backbone").get_layer(name)._kernel.trainable = True
    assert len(model.trainable_variables) == len(FACTORS) + 4
    require_exact(disturb(model), *data(4))


@pytest.mark.thorough
def test_dropout_beside_the_factors_keeps_the_fast_engine():
    model = with_head(layers_frozen_first(backbone(dropout=0.5)))
    model.compile(sgd(), loss="mse")
    model.fit(*data(), batch_size=16, verbose=0)
    assert model.optimizer.engine == "ghost"


# -- after compile ---------------------------------------------------------------------------


def train(model, how):
    x, y = data()
    if how == "fit":
        model.fit(x, y, batch_size=16, verbose=0)
    else:
        model.train_on_batch(x, y)


@pytest.mark.thorough
def test_lora_enabled_between_compile_and_the_first_step_is_trained():
    inner = backbone()
    model = with_head(inner)
    model.compile(sgd(), loss="mse")
    enable_lora(inner)
    before = {v.path: v.numpy() for v in model.weights}

    train(model, "fit")

    moved = {path for path, value in before.items() if np.any(value != _now(model, path))}
    assert moved == {v.path for v in model.trainable_variables}


@pytest.mark.parametrize(("how", "eagerly"), [("fit", False), ("train_on_batch", True)])
@pytest.mark.filterwarnings("ignore:train_on_batch can't know")
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_lora_enabled_after_training_began_asks_for_compile(how, eagerly):
    """Keras would go on training the weights of before, and never the factors."""
    model = with_head(backbone())
    model.compile(sgd(), loss="mse", run_eagerly=eagerly)
    train(model, how)
    steps, epsilon = model.optimizer.ledger.steps, model.optimizer.get_epsilon(DELTA)
    enable_lora(model.get_layer("backbone"))
    before = model.get_weights()

    with pytest.raises(PrivacyError, match=r"new: 'table/lora_embeddings_a'.*and 2 more; gone: "):
        train(model, how)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert model.optimizer.ledger.steps == steps

    model.compile(sgd(), loss="mse", run_eagerly=eagerly)
    train(model, how)
    assert model.optimizer.ledger.steps == 2 * steps
    assert model.optimizer.get_epsilon(DELTA) > epsilon


@pytest.mark.thorough
def test_an_optimizer_without_state_for_newly_trainable_weights_is_refused_at_compile():
    inner = backbone()
    inner.trainable = False
    model = with_head(inner)
    optimizer = sgd()
    model.compile(optimizer, loss="mse")
    train(model, "fit")

    inner.trainable = True
    with pytest.raises(
        ValueError, match=r"no state for weights.*'table/embeddings'.*new optimizer"
    ):
        model.compile(optimizer, loss="mse")


@pytest.mark.thorough
def test_an_optimizer_serves_on_when_more_is_frozen():
    model = with_head(backbone())
    optimizer = sgd()
    model.compile(optimizer, loss="mse")
    train(model, "fit")
    model.get_layer("backbone").trainable = False
    with pytest.raises(PrivacyError, match="gone: 'table/embeddings'"):
        train(model, "fit")
    before = {v.path: v.numpy() for v in model.weights}

    model.compile(optimizer, loss="mse")
    train(model, "fit")

    moved = [path for path, value in before.items() if np.any(value != _now(model, path))]
    assert moved == ["head/kernel", "head/bias"]
    assert optimizer.ledger.steps == 4


def test_what_is_unfrozen_between_two_fits_is_noised_and_the_ledger_goes_on():
    inner = backbone(width=32)
    inner.trainable = False
    model = with_head(inner)
    first, _ = noise_alone(model)
    assert not np.any(first["dense/kernel"])
    steps, epsilon = model.optimizer.ledger.steps, model.optimizer.get_epsilon(DELTA)

    inner.get_layer("dense").trainable = True
    second, deviation = noise_alone(model)

    assert not np.any(second["mix/kernel"])
    for path in ("dense/kernel", "dense/bias", "head/kernel"):
        require_noise_of(second[path], deviation)
    assert model.optimizer.ledger.steps == 2 * steps
    assert model.optimizer.get_epsilon(DELTA) > epsilon


# -- saving ----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_saved_model_comes_back_with_its_factors_merged_and_new_ones_and_its_ledger(tmp_path):
    model = with_head(with_biases(backbone()))
    model.compile(sgd(momentum=0.9), loss="mse")
    x, y = data()
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)

    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")

    np.testing.assert_allclose(loaded(x), model(x), atol=1e-5)
    assert loaded.optimizer.ledger == model.optimizer.ledger
    assert names(loaded.trainable_variables) == names(model.trainable_variables)
    low, high = loaded.trainable_variables[:2]
    assert np.any(low != model.trainable_variables[0]) and not np.any(high)

    keras_dp.save_inference_model(loaded, tmp_path / "deploy.keras")
    np.testing.assert_allclose(
        keras.saving.load_model(tmp_path / "deploy.keras")(x), model(x), atol=1e-5
    )


# -- quantized weights (QLoRA) -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.thorough
def test_factors_beside_int8_weights_are_served_by_their_layers_rules():
    inner = backbone()
    inner.quantize("int8")
    model = with_head(enable_lora(inner))
    assert inner.get_layer("dense")._kernel.dtype == "int8"
    assert names(model.trainable_variables) == [*FACTORS, "kernel", "bias"]
    require_exact(disturb(model), *data(4))


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_float8_scales_which_follow_the_batch_are_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="scaled")])
    model.quantize("float8")
    [problem] = keras_dp.check_model(model)
    assert problem.layer.startswith("'scaled'") and "float8" in problem.reason
    with pytest.raises(PrivacyError, match="float8"):
        model.compile(sgd(), loss="mse")


# -- KerasHub --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    """KerasHub, imported here since the oldest dependencies are tried without it."""
    import keras_hub

    return keras_hub


def bert(hub):
    """A backbone and the vector that it makes of a text."""
    made = hub.models.BertBackbone(
        vocabulary_size=17,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
        dropout=0.0,
    )
    return made, made.output["pooled_output"]


def gemma(hub):
    made = hub.models.GemmaBackbone(
        vocabulary_size=17,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        head_dim=4,
    )
    mask = keras.ops.cast(made.input["padding_mask"], "bool")
    return made, layers.GlobalAveragePooling1D()(made.output, mask=mask)


def classifier(hub, make, rank=2, quantize=None):
    """A model with a head, whose backbone has LoRA; and the backbone."""
    keras.utils.set_random_seed(1)
    made, vector = make(hub)
    if quantize:
        made.quantize(quantize)
    made.enable_lora(rank)
    return keras.Model(made.input, layers.Dense(3, "softmax", name="head")(vector)), made


def texts(model, rows=4, length=6):
    """Texts of several lengths, each twice: the second time with other tokens in the padding."""
    random = np.random.default_rng(0)
    tokens, mask = random.integers(1, 17, (rows, length)), np.ones((rows, length))
    for row in range(rows):
        mask[row, length - row :] = 0
    twice = np.concatenate([tokens, np.where(mask == 1, tokens, 16 - tokens % 16)])
    assert np.any(twice[:rows] != twice[rows:])
    x = {"token_ids": twice, "padding_mask": np.tile(mask, (2, 1)), "segment_ids": 0 * twice}
    given = {name: x[name].astype("int32") for name in model.input}
    return given, np.tile(np.arange(rows) % 3, 2)


@pytest.mark.parametrize("make", [bert, gemma])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_a_keras_hub_backbone_has_exact_gradients_of_its_factors_whatever_the_padding(hub, make):
    model, _ = classifier(hub, make)
    x, y = texts(model)
    norms = require_exact(disturb(model), x, y, loss="sparse_categorical_crossentropy")
    np.testing.assert_allclose(norms[:4], norms[4:], rtol=TOLERANCE)


@pytest.mark.parametrize(("make", "eagerly"), [(bert, False), (gemma, True)])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_a_keras_hub_backbone_is_fine_tuned_privately_and_goes_on_from_a_file(
    hub, make, eagerly, tmp_path
):
    model, made = classifier(hub, make)
    x, y = texts(model)
    frozen = [w for w in made.weights if not w.trainable]
    before = [w.numpy() for w in frozen]
    trained = {v.path: v.numpy() for v in model.trainable_variables}
    model.compile(
        keras_dp.DPAdam(0.01, max_grad_norm=1.0, noise_multiplier=1.0),
        loss="sparse_categorical_crossentropy",
        run_eagerly=eagerly,
    )

    model.fit(x, y, batch_size=4, verbose=0)

    assert model.optimizer.engine == "ghost"
    assert len(frozen) > len(trained) > 4
    assert all(np.array_equal(a, w) for a, w in zip(before, frozen, strict=True))
    assert all(np.any(v != _now(model, path)) for path, v in trained.items())

    # A backbone's configuration knows nothing of LoRA: the factors are in the weights now.
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-5)
    assert loaded.optimizer.ledger == model.optimizer.ledger
    assert len(loaded.trainable_variables) > len(trained)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.thorough
def test_a_quantized_keras_hub_backbone_is_served_too(hub):
    model, made = classifier(hub, bert, quantize="int8")
    assert any(w.dtype == "int8" for w in made.weights)
    x, y = texts(model)
    require_exact(disturb(model), x, y, loss="sparse_categorical_crossentropy")


@pytest.mark.thorough
def test_every_engine_serves_attention_with_a_single_head_of_keys():
    """One example alone makes products of (1, 1, m, k) with (1, 1, k, n), which are safe."""
    inputs = keras.Input((1, 3, 4))
    keys = keras.ops.transpose(layers.Dense(4)(inputs), (0, 1, 3, 2))
    model = keras.Model(inputs, layers.Flatten()(keras.ops.matmul(inputs, keys)))
    model.compile("sgd", loss="mse")
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 1, 3, 4)).astype("float32")
    y = random.normal(size=(3, 9)).astype("float32")
    wanted = clipped_sum(example_gradients(model, x, y)[0], 1.0)
    for gradients in ("loop", "vectorized"):
        outcome, _ = engine_outcome(model, x, y, max_grad_norm=1.0, gradients=gradients)
        assert relative_error(outcome.sums, wanted) < TOLERANCE


# -- the example -----------------------------------------------------------------------------


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Runs the example as a script, and returns the numbers of each row it printed."""
    row = r"^(\w+) +([\d,]+) of +([\d,]+) +([\d,]+) +([\d.]+) +([\d.]+)% "

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fine_tune.py", *arguments])
        runpy.run_path(str(EXAMPLES / "fine_tune.py"), run_name="__main__")
        rows = re.findall(row, capsys.readouterr().out, re.M)
        return {name: [float(n.replace(",", "")) for n in found] for name, *found in rows}

    return run


@pytest.mark.thorough
def test_the_example_noises_what_it_trains_and_nothing_else(run_example):
    rows = run_example("--ways", "LoRA", "--epochs", "1", "--pretrain-epochs", "0")
    [(trained, of_all, noised, epsilon, _)] = rows.values()
    head, factors = 256 * 5 + 5, 4 * (32 * 4 * 2 + 2 * 8)
    assert noised == trained == head + factors < of_all / 5
    assert 0.98 < epsilon <= 1


@pytest.mark.thorough
def test_the_example_with_keras_hub_noises_what_it_trains_and_nothing_else(run_example):
    [(trained, of_all, noised, epsilon, _)] = run_example("--hub", "--epochs", "1").values()
    assert noised == trained < of_all
    assert 0.98 < epsilon <= 1
