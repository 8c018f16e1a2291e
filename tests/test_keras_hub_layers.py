"""KerasHub's layers that have rules, and verdicts that are kept for all of its layers."""

import importlib
import types

import keras
import numpy as np
import pytest
from keras import layers
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    norms_of,
    relative_error,
)

import keras_dp
from keras_dp import keras_private
from keras_dp.gradients import capture, trial
from keras_dp.gradients.rules import registry

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")

ROWS = 3
# Where each class that has a rule is found.
NORMS = [
    "layers.modeling.rms_normalization.RMSNormalization",
    "models.gemma.rms_normalization.RMSNormalization",
    "models.gemma3.gemma3_layers.RMSNormalization",
    "models.gpt_oss.gpt_oss_layer_norm.GptOssLayerNormalization",
    "models.llama.llama_layernorm.LlamaLayerNorm",
    "models.mistral.mistral_layer_norm.MistralLayerNormalization",
    "models.mixtral.mixtral_layer_norm.MixtralLayerNormalization",
    "models.phi3.phi3_layernorm.Phi3LayerNorm",
    "models.qwen.qwen_layernorm.QwenLayerNorm",
    "models.qwen3.qwen3_layernorm.Qwen3LayerNorm",
    "models.qwen3_moe.qwen3_moe_layernorm.Qwen3MoeLayerNorm",
    "models.qwen_moe.qwen_moe_layernorm.QwenMoeLayerNorm",
    "models.t5.t5_layer_norm.T5LayerNorm",
]
POSITIONS = "layers.modeling.position_embedding.PositionEmbedding"
T5_ATTENTION = "models.t5.t5_multi_head_attention.T5MultiHeadAttention"


def found(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"keras_hub.src.{module}"), name)


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=(ROWS, *shape)).astype("float32")


def require_exact(model, x, monkeypatch):
    """Sums and norms by rules alone are those of one example at a time."""
    random = np.random.default_rng(4)
    for w in model.trainable_weights:
        w.assign(w + 0.3 * random.normal(size=w.shape))
    monkeypatch.setattr(capture, "vectorized", None)  # whoever needs it fails
    monkeypatch.setattr(capture, "alone", None)
    model.compile("sgd", loss="mse")
    y = np.zeros_like(model(x))
    gradients, _ = example_gradients(model, x, y)
    outcome, engine = engine_outcome(model, x, y, max_grad_norm=1e9)
    assert engine == "ghost"
    np.testing.assert_allclose(outcome.norms, norms_of(gradients), rtol=1e-5)
    assert relative_error(outcome.sums, clipped_sum(gradients, 1e9)) < 1e-5


def test_every_rule_by_name_is_tried_here():
    here = {path.rpartition(".")[2] for path in (*NORMS, POSITIONS, T5_ATTENTION)}
    assert here == set(registry._rules_by_name)


@pytest.mark.parametrize("path", NORMS)
@pytest.mark.one_in(3)
def test_scales_of_keras_hub_are_exact(path, monkeypatch):
    cls = found(path)
    layer = cls(4) if path.startswith("layers.") else cls()
    inputs = keras.Input((2, 4))
    require_exact(keras.Model(inputs, layer(layers.Dense(4)(inputs))), normal(2, 4), monkeypatch)


@pytest.mark.parametrize(("length", "start"), [(5, 0), (8, 0), (5, 2)])
@pytest.mark.one_in(3)
def test_positions_of_keras_hub_are_exact(length, start, monkeypatch):
    inputs = keras.Input((length, 4))
    positions = found(POSITIONS)(8)
    x = layers.Dense(4)(inputs)
    model = keras.Model(inputs, layers.Dense(2)(x + positions(x, start_index=start)))
    require_exact(model, normal(length, 4), monkeypatch)


class TwoAttentions(layers.Layer):
    """The second attends to what came in, with the biases of the first."""

    def __init__(self, *, is_decoder, biased):
        super().__init__()
        settings = (is_decoder, 4, 2, 2, 0.0)
        self.first = found(T5_ATTENTION)(*settings, use_relative_attention_bias=biased)
        self.second = found(T5_ATTENTION)(*settings)

    def call(self, x):
        first, bias, _ = self.first(x, mask=keras.ops.ones((1, 5, 5)))
        return self.second(first, key_value_states=x, position_bias=bias)[0]


@pytest.mark.filterwarnings("ignore:Layer 't5_multi_head:UserWarning")
@pytest.mark.filterwarnings("ignore:Layer 'two_attentions:UserWarning")
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.one_in(2)
def test_attention_of_t5_is_exact(is_decoder, biased, monkeypatch):
    inputs = keras.Input((5, 4))
    outputs = layers.Dense(2)(TwoAttentions(is_decoder=is_decoder, biased=biased)(inputs))
    require_exact(keras.Model(inputs, outputs), normal(5, 4), monkeypatch)


class ReturnsNothing(layers.Layer):
    """Has a weight and no rule, draws random numbers, and returns `None` beside a tensor."""

    def __init__(self):
        super().__init__()
        self.drop = layers.Dropout(0.5)

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[1:], initializer="ones")

    def call(self, x, training=None):
        return self.drop(x * self.scale, training=training), None


class Around(layers.Layer):
    def __init__(self):
        super().__init__()
        self.inside = ReturnsNothing()

    def call(self, x):
        kept, nothing = self.inside(x)
        assert nothing is None
        return kept


@pytest.mark.thorough
def test_a_layer_that_returns_none_beside_tensors_runs_one_example_at_a_time():
    """It was "None values not supported", and the whole model was vectorized."""
    model = keras.Sequential([keras.Input((4,)), Around(), layers.Dense(1)])
    model.compile("sgd", loss="mse")
    _, engine = engine_outcome(model, normal(4), np.zeros((ROWS, 1)), max_grad_norm=1.0)
    assert engine == "ghost"


# -- verdicts --------------------------------------------------------------------------------


def llama(**settings):
    import keras_hub

    shape = {
        "vocabulary_size": 10,
        "num_layers": 1,
        "num_query_heads": 2,
        "num_key_value_heads": 1,
        "hidden_dim": 8,
        "intermediate_dim": 8,
    }
    backbone = keras_hub.models.LlamaBackbone(**{**shape, **settings})
    ids, mask = (keras.Input((4,), dtype="int32", name=n) for n in ("token_ids", "padding_mask"))
    model = keras.Model([ids, mask], backbone({"token_ids": ids, "padding_mask": mask})[:, 0])
    model.compile("sgd", loss="mse")
    return model


def start(model):
    x = [np.ones((ROWS, 4), "int32")] * 2
    assert engine_outcome(model, x, np.zeros((ROWS, 8)), max_grad_norm=1.0)[1] == "ghost"


def loss_from_outside(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


@pytest.mark.thorough
def test_models_of_keras_hub_that_are_alike_are_tried_once(monkeypatch):
    tried = []
    original = trial._try
    monkeypatch.setattr(trial, "_right", set())
    monkeypatch.setattr(
        trial,
        "_try",
        lambda ghost, leaves, *, together: (
            tried.append(together),
            original(ghost, leaves, together=together),
        ),
    )
    start(llama())
    assert tried == [True]
    start(llama())
    assert tried == [True]
    start(llama(layer_norm_epsilon=1e-3))
    assert tried == [True, True]
    model = llama()
    model.compile("sgd", loss=loss_from_outside)  # it could see more than what the model returns
    start(model)
    assert tried == [True, True, True]


@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
def test_private_training_itself_is_no_code_from_outside(monkeypatch):
    """It was, so that models compiled with a DP optimizer were tried together every time."""
    tried = []
    monkeypatch.setattr(trial, "_right", set())
    monkeypatch.setattr(trial, "_try", lambda *_, together: tried.append(together))
    for changed in (False, False, True):
        model = llama()
        model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
        model.train_step_of_mine = (lambda: None) if changed else None
        model.train_on_batch([np.ones((ROWS, 4), "int32")] * 2, np.zeros((ROWS, 8)))
    assert tried == [True, True]
    assert keras_private.settings_of(llama(), order=False) is not None
    for name in ("train_step", "call", "compute_loss"):
        other = llama()
        vars(other)[name] = lambda *_: None
        assert keras_private.settings_of(other, order=False) is None, name


class FromOutside(layers.Layer):
    def call(self, x):
        return x


def test_settings_tell_what_layers_of_keras_hub_compute_by():
    cls = found("models.llama.llama_layernorm.LlamaLayerNorm")
    of = keras_private.settings_of
    assert of(cls(epsilon=1e-6)) == of(cls(epsilon=1e-6)) is not None
    assert of(cls(epsilon=1e-6)) != of(cls(epsilon=1e-5))
    other = cls(epsilon=1e-6)
    other.something = np.ones(3)  # of which nothing is known
    assert of(other) is None
    outside = cls(epsilon=1e-6)
    outside.inside = FromOutside()
    assert of(outside) is None
    outside = cls(epsilon=1e-6)
    outside.function = lambda x: x
    assert of(outside) is None
    outside = cls(epsilon=1e-6)
    outside.functions = [lambda x: x]
    assert of(outside) is None


def test_settings_tell_apart_functions_of_one_name():
    cls = found("models.llama.llama_layernorm.LlamaLayerNorm")
    functions = [lambda x, k=1: x, lambda x, k=2: x]
    functions += [lambda x: x]
    known = {"__name__": "keras_hub.src.anything"}
    inside = [
        types.FunctionType(f.__code__, known, "f", f.__defaults__, f.__closure__) for f in functions
    ]
    settings = []
    for f in inside:
        f.__module__ = known["__name__"]
        layer = cls()
        layer.functions = [f]
        settings.append(keras_private.settings_of(layer))
    assert None not in settings and len(set(settings)) == 3

    def closed(k):
        return lambda x: x * k

    layer = cls()
    f = closed(3)
    layer.functions = [types.FunctionType(f.__code__, known, "f", None, f.__closure__)]
    layer.functions[0].__module__ = known["__name__"]
    assert keras_private.settings_of(layer) is None


@pytest.mark.filterwarnings("ignore:Layer 't5_multi_head:UserWarning")
@pytest.mark.filterwarnings("ignore:Layer 'two_attentions:UserWarning")
def test_which_of_a_layer_s_weights_are_trained_counts(monkeypatch):
    """Four of them have the same name and size."""
    found_kinds = []
    monkeypatch.setattr(
        trial, "require_right_gradients", lambda ghost, _: found_kinds.append(ghost.plan.kinds)
    )

    def kinds(frozen):
        inputs = keras.Input((5, 4))
        both = TwoAttentions(is_decoder=False, biased=False)
        model = keras.Model(inputs, both(inputs))
        getattr(both.first, frozen).trainable = False
        model.compile("sgd", loss="mse")
        assert engine_outcome(model, normal(5, 4), normal(5, 4), max_grad_norm=1.0)[1] == "ghost"
        return found_kinds[-1]

    assert kinds("query_projector") == kinds("query_projector") != kinds("key_projector")
