"""Small models and data, on which a step takes milliseconds."""

from __future__ import annotations

import warnings

import keras
import numpy as np

import keras_dp
from keras_dp.training.mechanism import Clipped

DELTA = 1e-5


def data(n=64, width=4, seed=0):
    """A linear problem: x of shape (n, width) and y of shape (n, 1)."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, width)).astype("float32")
    y = (x @ random.normal(size=(width, 1)) + 0.1).astype("float32")
    return x, y


def model(width=4, seed=1, hidden=0):
    """A linear model, or a network: each layer costs a test a quarter of a second.

    The same weights for the same seed.
    """
    first, last = [keras.initializers.GlorotUniform(seed=seed + k) for k in range(2)]
    made = keras.Sequential([keras.Input((width,))])
    if hidden:
        made.add(keras.layers.Dense(hidden, activation="tanh", kernel_initializer=first))
    made.add(keras.layers.Dense(1, kernel_initializer=last))
    return made


def sgd(learning_rate=0.1, *, noise_multiplier=1.0, **kwargs):
    """A DP optimizer with ordinary settings."""
    return keras_dp.DPSGD(
        learning_rate, max_grad_norm=1.0, noise_multiplier=noise_multiplier, **kwargs
    )


def compiled(optimizer=None, *, loss="mse", seed=1, hidden=0, **kwargs):
    """A model that trains privately."""
    made = model(seed=seed, hidden=hidden)
    made.compile(optimizer or sgd(), loss=loss, **kwargs)
    return made


def private_steps(a_model, steps=4, batch_size=16):
    """The private steps of a `fit`, on sums of zero: computing gradients costs a test seconds."""
    x, y = data()
    if not a_model.built:
        a_model(x[:1])
    optimizer, variables = a_model.optimizer, a_model.trainable_variables
    sampling = keras_dp.PoissonDataset(x, y, batch_size=batch_size).sampling
    optimizer.session.begin_fit(sampling, steps)
    optimizer.build(variables)
    for _ in range(steps):
        sums = [keras.ops.zeros(v.shape) for v in variables]
        norms, real = keras.ops.zeros(batch_size), keras.ops.ones(batch_size, "bool")
        found = Clipped(variables, sums, norms, real, batch_size)

        def step(now, found=found):
            optimizer.inner_optimizer.apply(optimizer._mechanism.noised(found, now), variables)
            return keras.ops.zeros(())

        optimizer._meter.spend(step, lambda: keras.ops.zeros(()), after=found.evidence)
    optimizer.session.end_fit()


def noiseless(cls=keras_dp.DPSGD, *args, **kwargs):
    """A DP optimizer that neither clips nor noises: it must do what its namesake does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        return cls(*args, max_grad_norm=1e6, noise_multiplier=0.0, **kwargs)


def weights_of(a_model):
    return [w.copy() for w in a_model.get_weights()]


def same(first, second, **tolerance):
    """Whether two lists of arrays agree."""
    return all(np.allclose(a, b, **tolerance) for a, b in zip(first, second, strict=True))
