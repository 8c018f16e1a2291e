"""Writes the files of an older version that newer ones must still load with their ledger.

Run with the version that is to write them: `python tests/data/make.py <folder>`.
"""

import os
import sys

import keras
import numpy as np

import keras_dp


def compiled(inner_is_private=False):
    encoder = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="tanh")])
    if inner_is_private:
        encoder.compile(optimizer(), loss="mse")
    model = keras.Sequential([keras.Input((4,)), encoder, keras.layers.Dense(1)])
    model.compile(optimizer(), loss=keras.losses.MeanSquaredError())
    return model


def optimizer():
    return keras_dp.DPSGD(0.1, momentum=0.9, max_grad_norm=1.0, noise_multiplier=1.0)


def fitted(x, y, callbacks=(), **kwargs):
    model = compiled(**kwargs)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=list(callbacks))
    return model


def main(folder):
    keras.utils.set_random_seed(0)
    data = np.random.default_rng(0)
    x, y = data.normal(size=(64, 4)).astype("float32"), data.normal(size=(64, 1)).astype("float32")
    ledger_path = os.path.join(folder, "journal.jsonl")
    model = fitted(x, y, [keras_dp.PrivacyBudget(delta=1e-5, ledger_path=ledger_path)])
    model.save(os.path.join(folder, "model.keras"))
    model.save_weights(os.path.join(folder, "model.weights.h5"))
    model.save(os.path.join(folder, "model.h5"))
    fitted(
        x,
        y,
        [keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"), delete_checkpoint=False)],
    )
    inner = fitted(x, y, inner_is_private=True)
    inner.layers[0].fit(x, y @ np.ones((1, 3), "float32"), batch_size=16, verbose=0)
    inner.save(os.path.join(folder, "nested.keras"))


if __name__ == "__main__":
    main(sys.argv[1])
