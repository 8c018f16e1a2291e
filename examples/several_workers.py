"""Train in several processes, which may be on several machines, with the guarantee of one.

Handwritten digits (scikit-learn's 1,797 images), by
`tf.distribute.MultiWorkerMirroredStrategy`. Started as it stands, this program starts its
workers itself, on this machine. On machines of your own, set TF_CONFIG on each, as for
ordinary training (https://www.tensorflow.org/guide/distributed_training), and start it
there: every worker runs the same program on the same data.

Worker 0 is the chief: batches and noise are drawn from its secret, and it alone writes the
backup and the ledger on disk. If a worker dies, the others end with an error; start the
program again, and it goes on, with every step that was taken counted.

    pip install ".[examples]" && python examples/several_workers.py
"""

import argparse
import json
import os
import socket
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

DELTA = 1e-5


def start_workers(count):
    """Runs this program once for each worker, and waits for all."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in listening]
    for s in listening:
        s.close()  # a port that is free now
    workers = []
    for k in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": k}}
        environment = os.environ | {"TF_CONFIG": json.dumps(config)}
        workers.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    return max(abs(worker.wait()) for worker in workers)


def train(options):
    import keras
    import numpy as np
    import tensorflow as tf
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    import keras_dp

    tf.get_logger().setLevel("ERROR")  # no warning for each variable that is made
    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else of TensorFlow
    chief = strategy.cluster_resolver.task_id == 0

    # Every worker must have the same rows in the same order.
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0 - 0.3).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )

    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(64, activation="tanh"),
                keras.layers.Dense(10, activation="softmax"),
            ]
        )
        optimizer = keras_dp.DPSGD(0.3, momentum=0.9, max_grad_norm=1.0, noise_multiplier=2.0)
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    os.makedirs(options.folder, exist_ok=True)
    callbacks = [  # of those that write files only the chief's do
        keras.callbacks.BackupAndRestore(os.path.join(options.folder, "backup")),
        keras_dp.PrivacyBudget(
            options.epsilon,
            delta=DELTA,
            verbose=int(chief),
            ledger_path=os.path.join(options.folder, "privacy.jsonl"),
        ),
    ]
    model.fit(
        x_train,
        y_train,
        batch_size=512,  # of all workers together
        epochs=options.epochs,
        callbacks=callbacks,
        verbose=0,
    )
    if chief:
        probabilities = model(x_test).numpy()
        accuracy = np.mean(probabilities.argmax(-1) == y_test)
        print(
            f"{strategy.num_replicas_in_sync} workers, {optimizer.ledger.steps} steps: "
            f"{100 * accuracy:.1f} % of the test images, epsilon = "
            f"{optimizer.get_epsilon(DELTA):.3f} at delta = {DELTA:g}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="started here, without TF_CONFIG")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--folder", default="several_workers_output")
    options = parser.parse_args()
    if "TF_CONFIG" not in os.environ:
        sys.exit(start_workers(options.workers))
    train(options)


if __name__ == "__main__":
    main()
