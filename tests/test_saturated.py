"""Saturated predictions have the gradients that Keras gives them, in every engine."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from reference import clipped_sum, engine_outcome, example_gradients, relative_error


@pytest.mark.parametrize("gradients", ["ghost", "vectorized", "loop"])
@pytest.mark.parametrize(
    ("activation", "loss", "units"),
    [("softmax", "sparse_categorical_crossentropy", 3), ("sigmoid", "binary_crossentropy", 1)],
)
@pytest.mark.one_in(3)
def test_rule_14_a_saturated_prediction_still_has_a_gradient(activation, loss, units, gradients):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units, activation=activation)])
    random = np.random.default_rng(0)
    x, y = random.normal(0.0, 500.0, (6, 4)).astype("float32"), np.arange(6) % max(units, 2)
    model.compile("sgd", loss=loss)
    wanted, _ = example_gradients(model, x, y.astype("float32")[:, None])
    outcome, engine = engine_outcome(
        model, x, y.astype("float32")[:, None], max_grad_norm=1.0, gradients=gradients
    )
    assert engine == gradients
    assert relative_error(outcome.sums, clipped_sum(wanted, 1.0)) < 1e-5
    assert np.abs(outcome.sums[0]).max() > 0.1
