"""`fix_model`: a copy of a model that can be trained privately, with its weights carried over."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import noiseless_optimizer, update_on_batch

import keras_dp


class OwnBatchNormalization(layers.BatchNormalization):
    """A subclass must not slip through."""


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A layer of the user's own, with batch normalizations in a list and by themselves."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units)
        self.first = layers.BatchNormalization()
        self.rest = [layers.BatchNormalization(), layers.Dense(units)]

    def get_config(self):
        return {**super().get_config(), "units": self.units}

    def build(self, shape):
        self.dense.build(shape)
        for layer in (self.first, *self.rest):
            layer.build((*shape[:-1], self.units))

    def call(self, x, training=None):
        x = self.first(self.dense(x), training=training)
        return self.rest[1](self.rest[0](x, training=training))


def spread_by_channel(channels, seed=0):
    """Images whose channels have a mean and a deviation of their own, the same in every image."""
    random = np.random.default_rng(seed)
    mean, deviation = random.normal(size=channels), random.uniform(0.5, 2.0, channels)
    unit = random.normal(size=(6, 40, 40, channels))
    unit = (unit - unit.mean((1, 2), keepdims=True)) / unit.std((1, 2), keepdims=True)
    return (mean + deviation * unit).astype("float32"), mean, deviation**2


def disturb(model):
    random = np.random.default_rng(1)
    for w in model.weights:
        if w.dtype.startswith("float"):
            w.assign(np.abs(np.asarray(w) + random.normal(0, 0.3, w.shape)) + 0.1)


def test_what_is_spread_as_the_running_statistics_say_comes_out_as_it_did():
    x, mean, variance = spread_by_channel(16)
    normalize = layers.BatchNormalization()
    model = keras.Sequential([keras.Input(x.shape[1:]), normalize])
    disturb(model)
    normalize.moving_mean.assign(mean)
    normalize.moving_variance.assign(variance)
    fixed = keras_dp.fix_model(model)
    assert fixed.layers[-1].groups == 4
    np.testing.assert_allclose(fixed(x), model(x), atol=1e-2)


@pytest.mark.parametrize(("center", "scale"), [(True, False), (False, True)])
def test_without_scale_or_offset_there_is_none_in_the_copy(center, scale):
    normalize = layers.BatchNormalization(center=center, scale=scale)
    fixed = keras_dp.fix_model(keras.Sequential([keras.Input((4, 8)), normalize]))
    assert len(fixed.weights) == 1


@pytest.mark.parametrize("channels", [1, 3, 8, 24, 96, 7])
def test_groups_divide_the_channels(channels):
    model = keras.Sequential([keras.Input((5, 5, channels)), layers.BatchNormalization()])
    groups = keras_dp.fix_model(model).layers[-1].groups
    assert channels % groups == 0 and groups <= 32 and (groups == 1 or channels // groups >= 4)


def small_model(normalization=layers.BatchNormalization):
    inputs = keras.Input((6, 6, 3))
    shared = keras.Sequential([layers.Conv2D(8, 3, padding="same"), normalization()])
    x = layers.Conv2D(8, 3, padding="same")(inputs)
    x = normalization(axis=-1)(x)
    x = shared(shared(x)) + x
    x = layers.GlobalAveragePooling2D()(layers.Activation("tanh")(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    disturb(model)
    return model


@pytest.mark.parametrize("normalization", [layers.BatchNormalization, OwnBatchNormalization])
def test_other_weights_are_copied_and_shared_models_stay_shared(normalization):
    model = small_model(normalization)
    before = [w.copy() for w in model.get_weights()]
    fixed = keras_dp.fix_model(model)
    assert keras_dp.check_model(model) and not keras_dp.check_model(fixed)
    assert len([x for x in fixed.layers if isinstance(x, keras.Sequential)]) == 1
    assert [type(x).__name__ for x in fixed.layers] == [
        "GroupNormalization" if isinstance(x, normalization) else type(x).__name__
        for x in model.layers
    ]
    kernels = [[w for w in m.weights if w.name == "kernel"] for m in (model, fixed)]
    assert len(kernels[0]) == len(kernels[1]) == 3
    for a, b in zip(*kernels, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a is not b
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_copy_trains_privately_with_the_ghost_engine():
    fixed = keras_dp.fix_model(small_model())
    fixed.compile(noiseless_optimizer(1.0), loss="mse")
    random = np.random.default_rng(0)
    update = update_on_batch(fixed, random.normal(size=(4, 6, 6, 3)), np.zeros((4, 2)))
    assert fixed.optimizer.engine == "ghost"
    assert all(np.any(u != 0) for u in update)


def test_frozen_batch_normalization_stays_and_freezing_keeps_the_statistics():
    model = small_model()
    kept = keras_dp.fix_model(model, batch_normalization="freeze")
    assert not keras_dp.check_model(kept)
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 3))
    np.testing.assert_allclose(kept(x), model(x, training=False), rtol=1e-5)
    again = keras_dp.fix_model(kept)
    assert [type(a) for a in again.layers] == [type(a) for a in kept.layers]
    assert not again.layers[2].trainable


def test_layers_of_the_users_own_are_mended_inside():
    model = keras.Sequential([keras.Input((5,)), Block(8), layers.Dense(1)])
    disturb(model)
    with pytest.warns(UserWarning, match="'block'.*Change the class"):
        fixed = keras_dp.fix_model(model)
    block = fixed.layers[0]
    assert isinstance(block, Block) and not keras_dp.check_model(fixed)
    assert type(block.first) is type(block.rest[0]) is layers.GroupNormalization
    np.testing.assert_array_equal(block.dense.kernel, model.layers[0].dense.kernel)
    np.testing.assert_array_equal(block.rest[1].kernel, model.layers[0].rest[1].kernel)
    assert len(fixed.trainable_weights) == 2 + 2 + 2 + 2 + 2
    assert fixed(np.ones((2, 5))).shape == (2, 1)


def test_recurrent_layers_lose_their_state_and_keep_their_weights():
    model = keras.Sequential(
        [keras.Input((4, 3), batch_size=2), layers.LSTM(5, stateful=True), layers.Dense(1)]
    )
    disturb(model)
    fixed = keras_dp.fix_model(model)
    assert not fixed.layers[0].stateful
    for a, b in zip(model.trainable_weights, fixed.trainable_weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_spectral_normalization_gives_way_to_the_layer_inside():
    inside = layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), layers.SpectralNormalization(inside)])
    fixed = keras_dp.fix_model(model)
    assert type(fixed.layers[-1]) is layers.Dense
    np.testing.assert_array_equal(fixed.layers[-1].kernel, inside.kernel)


def test_frozen_layers_stay_frozen():
    model = small_model()
    model.layers[1].trainable = False
    fixed = keras_dp.fix_model(model)
    assert not fixed.layers[1].trainable and fixed.layers[-1].trainable
    assert len(fixed.trainable_weights) == len(model.trainable_weights)


# One model of keras.applications: each takes long to trace (docs/models.md has a table of more).
@pytest.mark.thorough
def test_a_model_of_keras_applications():
    model = keras.applications.MobileNetV3Small(
        weights=None, input_shape=(32, 32, 3), classes=5, include_preprocessing=False
    )
    fixed = keras_dp.fix_model(model)
    assert len(keras_dp.check_model(model)) == 34 and not keras_dp.check_model(fixed)
    assert fixed(np.zeros((1, 32, 32, 3))).shape == (1, 5)


def stateful_of(layer):
    return keras.Sequential([keras.Input((3, 4), batch_size=2), layer, layers.Dense(1)])


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Bidirectional(layers.GRU(2, stateful=True)),
        lambda: layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)], stateful=True),
        lambda: layers.TimeDistributed(layers.Dense(2)),
        lambda: layers.TimeDistributed(
            keras.Sequential([layers.Dense(2), layers.BatchNormalization()])
        ),
    ],
)
def test_what_wrappers_hold_is_mended_and_a_file_of_it_loads(layer, tmp_path):
    model = stateful_of(layer())
    fixed = keras_dp.fix_model(model)
    assert not keras_dp.check_model(fixed)
    copied = [w.path.split("/")[-1] for w in fixed.trainable_weights]
    assert copied == [w.path.split("/")[-1] for w in model.trainable_weights]
    fixed.save(tmp_path / "fixed.keras")
    loaded = keras.saving.load_model(tmp_path / "fixed.keras")
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(loaded(x), fixed(x), rtol=1e-6)
    assert not keras_dp.check_model(loaded)


def test_recurrent_convolutions_lose_their_state():
    inputs = keras.Input((2, 5, 5, 1), batch_size=2)
    model = keras.Model(inputs, layers.ConvLSTM2D(2, 3, stateful=True)(inputs))
    fixed = keras_dp.fix_model(model)
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 5, 1))
    np.testing.assert_allclose(fixed(x), model(x), rtol=1e-6)


class Subclassed(keras.Model):
    """Layers in attributes, public and not, in a list; two inputs; one layer held twice."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self._normalize = layers.BatchNormalization()
        self.blocks = [keras.Sequential([layers.Dense(3), layers.BatchNormalization()]), self.dense]

    def call(self, inputs, training=None):
        x = self._normalize(self.dense(inputs["a"]) + inputs["b"], training=training)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.thorough
def test_a_subclassed_model_is_mended_and_its_weights_are_kept_in_a_file(tmp_path):
    model = Subclassed()
    random = np.random.default_rng(0)
    x = {key: random.normal(size=(4, 3)).astype("float32") for key in "ab"}
    model(x)
    assert [p.layer.split("'")[1] for p in keras_dp.check_model(model)] == [
        model._normalize.name,
        f"{model.blocks[0].name}/{model.blocks[0].layers[1].name}",
    ]
    with pytest.warns(UserWarning, match="save_weights"):
        fixed, again = keras_dp.fix_model(model), keras_dp.fix_model(model)
    assert fixed.blocks[1] is fixed.dense and fixed.dense is not model.dense
    np.testing.assert_array_equal(fixed.dense.kernel, model.dense.kernel)
    np.testing.assert_array_equal(
        fixed.blocks[0].layers[0].kernel, model.blocks[0].layers[0].kernel
    )
    fixed.compile(noiseless_optimizer(1.0), loss="mse")
    update = update_on_batch(fixed, x, np.zeros((4, 3)))
    assert len(update) == 8 and all(np.any(u != 0) for u in update)
    fixed.save_weights(tmp_path / "a.weights.h5")
    again.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_allclose(again(x), fixed(x), rtol=1e-6)


class Doubled(keras.Model):
    """A graph of layers that is called in a way of its own."""

    def __init__(self):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.BatchNormalization(name="inner")(inputs))

    def call(self, x, training=None, mask=None):
        return 2 * super().call(x, training=training, mask=mask)


def test_what_cannot_be_reached_is_not_mended_in_part():
    with pytest.raises(ValueError, match=r"(?s)by hand.*'inner' \(BatchNormalization\)"):
        keras_dp.fix_model(Doubled())


def test_layers_that_nothing_has_called_are_named():
    model = Subclassed()
    model.built = True
    with pytest.raises(ValueError, match=r"(?s)isn't built.*Call the model on a batch"):
        keras_dp.fix_model(model)


def test_several_inputs_and_outputs_by_name_and_a_layer_used_twice():
    inputs = {key: keras.Input((4,), name=key) for key in "ab"}
    dense, normalize = layers.Dense(4), layers.BatchNormalization()
    a, b = (normalize(dense(t)) for t in inputs.values())
    model = keras.Model(inputs, {"one": layers.Dense(1)(a), "two": layers.Dense(2)(a + b)})
    fixed = keras_dp.fix_model(model)
    out = fixed({key: np.ones((3, 4)) for key in "ab"})
    assert {k: v.shape for k, v in out.items()} == {"one": (3, 1), "two": (3, 2)}
    assert len(fixed.trainable_weights) == len(model.trainable_weights) == 8


def test_the_copy_of_a_compiled_model_is_not_compiled_and_the_model_stays_so():
    model = small_model()
    model.compile("adam", loss="mse")
    optimizer = model.optimizer
    assert not keras_dp.fix_model(model).compiled
    assert model.compiled and model.optimizer is optimizer


def test_regularizers_and_constraints_of_scale_and_offset_are_kept():
    normalize = layers.BatchNormalization(gamma_regularizer="l2", beta_constraint="non_neg")
    fixed = keras_dp.fix_model(keras.Sequential([keras.Input((4, 8)), normalize])).layers[-1]
    assert fixed.gamma.regularizer is not None and fixed.beta.constraint is not None
    assert fixed.beta.regularizer is None


def test_a_vector_is_normalized_as_one_group_and_a_single_number_cannot_be():
    fixed = keras_dp.fix_model(keras.Sequential([keras.Input((64,)), layers.BatchNormalization()]))
    assert fixed.layers[-1].groups == 1
    single = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"(?s)single number.*Take the layer out"):
        keras_dp.fix_model(single)
    assert keras_dp.fix_model(single, batch_normalization="freeze")(np.ones((2, 1))).shape == (2, 1)


def test_what_preprocessing_layers_learned_is_copied():
    numbers = np.random.default_rng(0).normal(3.0, 2.0, (20, 4)).astype("float32")
    words = np.array(["a", "b", "a", "c"])
    normalization, lookup = layers.Normalization(), layers.StringLookup()
    vectorize = layers.TextVectorization(output_sequence_length=2)
    normalization.adapt(numbers)
    lookup.adapt(words)
    vectorize.adapt(words)
    x, word = keras.Input((4,)), keras.Input((1,), dtype="string")
    tokens = layers.Concatenate()([lookup(word), vectorize(word)])
    outputs = [layers.BatchNormalization()(normalization(x)), layers.Embedding(9, 2)(tokens)]
    model = keras.Model([x, word], outputs)
    fixed = keras_dp.fix_model(model, batch_normalization="freeze")
    assert fixed.layers[-1] is not model.layers[-1]
    for a, b in zip(
        *(m([tf.constant(numbers[:4]), tf.constant(words[:, None])]) for m in (model, fixed)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_augmentation_that_mixes_is_taken_out_of_a_pipeline():
    pipeline = layers.Pipeline([layers.RandomFlip(), layers.MixUp(), layers.AugMix()])
    model = keras.Sequential([keras.Input((8, 8, 3)), pipeline, layers.Flatten(), layers.Dense(1)])
    problems = keras_dp.check_model(model)
    assert sorted(p.layer.split("(")[1] for p in problems) == ["AugMix)", "MixUp)"]
    fixed = keras_dp.fix_model(model)
    kinds = [type(x).__name__ for x in fixed.layers[0].layers]
    assert kinds == ["RandomFlip", "Identity", "Identity"]


@pytest.mark.parametrize(
    "layer",
    [
        layers.Softmax(axis=0),
        layers.Softmax(axis=-2),
        layers.UnitNormalization(axis=0),
        layers.RMSNormalization(axis=0),
        layers.LayerNormalization(axis=[0, 1]),
        layers.GroupNormalization(1, axis=0),
    ],
)
def test_normalization_over_the_examples_is_refused(layer):
    model = keras.Sequential([keras.Input((4,), batch_size=3), layer])
    (problem,) = keras_dp.check_model(model)
    assert "axis 0" in problem.reason and "-1 for the last" in problem.fix
    with pytest.raises(ValueError, match="by hand"):
        keras_dp.fix_model(model)


def test_joining_batches_is_refused():
    inputs = keras.Input((4,))
    outputs = layers.Concatenate(axis=0)([inputs, layers.Dense(4)(inputs)])
    (problem,) = keras_dp.check_model(keras.Model(inputs, outputs))
    assert "(Concatenate)" in problem.layer


def test_normalization_within_an_example_and_other_harmless_layers_pass():
    inputs = keras.Input((6, 4))
    x = inputs
    for layer in (
        layers.Softmax(axis=-2),
        layers.LayerNormalization(axis=[1, 2]),
        layers.UnitNormalization(axis=1),
        layers.Concatenate(axis=1),
        layers.Dropout(0.5, seed=1),
        layers.ActivityRegularization(0.1),
        layers.Normalization(mean=1.0, variance=2.0),
    ):
        x = layer([x, x] if isinstance(layer, layers.Concatenate) else x)
    assert keras_dp.check_model(keras.Model(inputs, x)) == []


def test_problems_come_all_at_once_each_with_the_path_to_its_layer():
    block = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(name="normalize")],
        name="block",
    )
    inputs = keras.Input((3, 4), batch_size=2)
    x = layers.TimeDistributed(block, name="each")(inputs)
    x = layers.LSTM(2, stateful=True, name="memory")(x)
    x = layers.SpectralNormalization(layers.Dense(2), name="spectral")(x)
    problems = keras_dp.check_model(keras.Model(inputs, layers.Softmax(axis=0, name="mixed")(x)))
    assert {p.layer for p in problems} == {
        "'each/block/normalize' (BatchNormalization)",
        "'memory' (LSTM)",
        "'spectral' (SpectralNormalization)",
        "'mixed' (Softmax)",
    }


def dense_block(x):
    """As in DenseNet: every layer is given all that came before, joined."""
    for _ in range(2):
        y = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.Concatenate()([x, layers.Conv2D(4, 3, padding="same", use_bias=False)(y)])
    return x


def inverted_bottleneck(x):
    """As in MobileNet and EfficientNet: depthwise, squeeze and excitation, dropped paths."""
    y = layers.BatchNormalization()(layers.Conv2D(16, 1, use_bias=False)(x))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(layers.Activation("silu")(y))
    y = layers.Activation("hard_silu")(layers.BatchNormalization()(y))
    squeezed = layers.Dense(16, activation="sigmoid")(
        layers.GlobalAveragePooling2D(keepdims=True)(y)
    )
    y = layers.BatchNormalization()(layers.Conv2D(8, 1)(y * squeezed))
    return x + layers.Dropout(0.2, noise_shape=(None, 1, 1, 1))(y)


def separable(x):
    """As in Xception and NASNet."""
    y = layers.BatchNormalization()(layers.SeparableConv2D(8, 3, padding="same")(x))
    return layers.Average()([x, layers.ZeroPadding2D(1)(layers.Cropping2D(1)(y))])


@pytest.mark.parametrize("block", [separable, dense_block, inverted_bottleneck])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_small_models_built_like_those_of_keras_applications_train(block):
    inputs = keras.Input((6, 6, 3))
    x = block(layers.Conv2D(8, 3, padding="same")(layers.Rescaling(1 / 255)(inputs)))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    fixed = keras_dp.fix_model(model)
    fixed.compile(noiseless_optimizer(1.0), loss="mse")
    images = np.random.default_rng(0).uniform(0, 255, (4, 6, 6, 3))
    update = update_on_batch(fixed, images, np.ones((4, 2)))
    assert fixed.optimizer.engine == "ghost"
    assert np.mean([np.any(u != 0) for u in update]) > 0.9


class Forgetful(layers.Dense):
    """Its configuration is that of another layer."""

    def get_config(self):
        return {**super().get_config(), "units": 2}


def test_weights_that_do_not_fit_are_named():
    model = keras.Sequential([keras.Input((4,)), Forgetful(3), layers.Flatten()])
    with pytest.raises(ValueError, match=r"(?s)'forgetful' \(Forgetful\).*kernel \(4, 3\)"):
        keras_dp.fix_model(model)


def test_low_rank_factors_are_copied():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.BatchNormalization()])
    model.layers[0].enable_lora(2)
    disturb(model)
    fixed = keras_dp.fix_model(model)
    np.testing.assert_array_equal(fixed.layers[0].lora_kernel_a, model.layers[0].lora_kernel_a)
    assert len(fixed.trainable_weights) == len(model.trainable_weights)


def test_a_layer_that_cannot_be_copied_is_named():
    class Closed(layers.Layer):
        def __init__(self, units):
            super().__init__()
            self.inside = layers.Dense(units)

        def call(self, x):
            return self.inside(x)

    model = keras.Sequential([keras.Input((3,)), Closed(2), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"(?s)'closed' \(Closed\).*get_config"):
        keras_dp.fix_model(model)


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="batch_normalization='layer'"):
        keras_dp.fix_model(small_model(), batch_normalization="layer")
    with pytest.raises(ValueError, match="isn't built"):
        keras_dp.fix_model(keras.Sequential([layers.Dense(2)]))
