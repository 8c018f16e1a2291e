"""One of several workers that train a model together, for `test_devices`."""

import argparse
import json
import os
import pathlib

import keras
import numpy as np
import tensorflow as tf
import test_devices
from test_devices import X, Y, compiled, mlp, seen

import keras_dp

WORKER = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
WORKERS = "workers"  # in the place of a number of replicas


def train(folder):
    """Trains with and without noise, and writes down what came of it."""
    model = compiled(WORKERS, mlp)
    history = model.fit(X, Y, batch_size=3, epochs=2, validation_data=(X[:8], Y[:8]), verbose=0)
    found = {f"weight{k}": w for k, w in enumerate(model.get_weights())} | history.history
    found["parts"], found["noise"], found["steps"] = seen(WORKERS)
    model = compiled(WORKERS, mlp, clipping="adaptive", sigma=lambda step: 1.0 + step // 7)
    for _ in range(2):  # the second fit goes on in the same run
        model.fit(X, Y, batch_size=6, verbose=0)
        found.setdefault("norm", model.optimizer.clipping_strategy.max_grad_norm)
    assert model.optimizer.ledger.steps == 10
    found["ledger"] = json.dumps(json.loads(model.optimizer.ledger.to_json()), sort_keys=True)
    np.savez(folder / f"found{WORKER}.npz", **found)
    try:
        model.fit(X[:: 1 - 2 * WORKER], Y, batch_size=6, verbose=0)
    except keras_dp.PrivacyError as error:
        (folder / f"refused{WORKER}.txt").write_text(str(error))


class EndAfterOneEpoch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


def resume(folder, life, forever):
    """Trains with a backup and a journal; the chief says how far it is."""
    model = compiled(WORKERS, mlp, sigma=1.0, seed=None)
    before = []

    def say(name, number):
        if WORKER == 0:
            (folder / "new").write_text(str(number))
            (folder / "new").rename(folder / f"{name}{life}")

    def begun(epoch, logs):
        before.append(model.optimizer.ledger.steps)
        if len(before) == 1:
            say("restored", before[0])

    watch = keras.callbacks.LambdaCallback(
        on_epoch_begin=begun,
        on_train_batch_end=lambda *_, **__: say("taken", model.optimizer.releases),
    )
    callbacks = [
        keras.callbacks.BackupAndRestore(folder / "backup"),
        keras_dp.PrivacyBudget(delta=1e-5, ledger_path=folder / f"journal{WORKER}.jsonl"),
        watch,
    ]
    epochs = 100_000
    if not forever:
        callbacks.append(EndAfterOneEpoch())
    model.fit(X, Y, batch_size=6, epochs=epochs, callbacks=callbacks, verbose=0)
    ledger = model.optimizer.ledger
    counts = {"restored": before[0], "after": ledger.steps, "steps": model.optimizer.releases}
    counts["epsilon"] = model.optimizer.get_epsilon(1e-5, "rdp")
    (folder / f"count{WORKER}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("what", choices=["train", "resume"])
    parser.add_argument("--life", type=int)
    parser.add_argument("--forever", action="store_true")
    options = parser.parse_args()
    test_devices._strategies[WORKERS] = tf.distribute.MultiWorkerMirroredStrategy()
    if options.what == "train":
        train(options.folder)
    else:
        resume(options.folder, options.life, options.forever)
