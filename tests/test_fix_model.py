"""`fix_model`: a copy of a model that can be trained privately, with its weights carried over."""

from __future__ import annotations

import keras
import numpy as np
import pytest
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
    mended = keras_dp.fix_model(model)
    assert mended.layers[-1].groups == 4
    np.testing.assert_allclose(mended(x), model(x), atol=1e-2)


@pytest.mark.parametrize(("center", "scale"), [(True, False), (False, True)])
def test_without_scale_or_offset_there_is_none_in_the_copy(center, scale):
    normalize = layers.BatchNormalization(center=center, scale=scale)
    mended = keras_dp.fix_model(keras.Sequential([keras.Input((4, 8)), normalize]))
    assert len(mended.weights) == 1


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
    mended = keras_dp.fix_model(model)
    assert keras_dp.check_model(model) and not keras_dp.check_model(mended)
    assert len([x for x in mended.layers if isinstance(x, keras.Sequential)]) == 1
    assert [type(x).__name__ for x in mended.layers] == [
        "GroupNormalization" if isinstance(x, normalization) else type(x).__name__
        for x in model.layers
    ]
    kernels = [[w for w in m.weights if w.name == "kernel"] for m in (model, mended)]
    assert len(kernels[0]) == len(kernels[1]) == 3
    for a, b in zip(*kernels, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a is not b
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_copy_trains_privately_with_the_ghost_engine():
    mended = keras_dp.fix_model(small_model())
    mended.compile(noiseless_optimizer(1.0), loss="mse")
    random = np.random.default_rng(0)
    update = update_on_batch(mended, random.normal(size=(4, 6, 6, 3)), np.zeros((4, 2)))
    assert mended.optimizer.engine == "ghost"
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
    mended = keras_dp.fix_model(model)
    block = mended.layers[0]
    assert isinstance(block, Block) and not keras_dp.check_model(mended)
    assert type(block.first) is type(block.rest[0]) is layers.GroupNormalization
    np.testing.assert_array_equal(block.dense.kernel, model.layers[0].dense.kernel)
    np.testing.assert_array_equal(block.rest[1].kernel, model.layers[0].rest[1].kernel)
    assert len(mended.trainable_weights) == 2 + 2 + 2 + 2 + 2
    assert mended(np.ones((2, 5))).shape == (2, 1)


def test_recurrent_layers_lose_their_state_and_keep_their_weights():
    model = keras.Sequential(
        [keras.Input((4, 3), batch_size=2), layers.LSTM(5, stateful=True), layers.Dense(1)]
    )
    disturb(model)
    mended = keras_dp.fix_model(model)
    assert not mended.layers[0].stateful
    for a, b in zip(model.trainable_weights, mended.trainable_weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_spectral_normalization_gives_way_to_the_layer_inside():
    inside = layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), layers.SpectralNormalization(inside)])
    mended = keras_dp.fix_model(model)
    assert type(mended.layers[-1]) is layers.Dense
    np.testing.assert_array_equal(mended.layers[-1].kernel, inside.kernel)


def test_frozen_layers_stay_frozen():
    model = small_model()
    model.layers[1].trainable = False
    mended = keras_dp.fix_model(model)
    assert not mended.layers[1].trainable and mended.layers[-1].trainable
    assert len(mended.trainable_weights) == len(model.trainable_weights)


def test_a_model_of_keras_applications():
    model = keras.applications.MobileNetV3Small(
        weights=None, input_shape=(32, 32, 3), classes=5, include_preprocessing=False
    )
    mended = keras_dp.fix_model(model)
    assert len(keras_dp.check_model(model)) == 34 and not keras_dp.check_model(mended)
    assert mended(np.zeros((1, 32, 32, 3))).shape == (1, 5)


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
