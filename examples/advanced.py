"""Microbatches, schedules, ways of clipping, mixed precision, and the monitor.

One network, one budget, seven ways to spend it: each differs from the first in one thing.
The script prints accuracy, epsilon and noise of each, and draws what the monitor saw of the
last one. Data: scikit-learn's handwritten digits.

    pip install ".[examples]" && python examples/advanced.py
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
from quickstart import DELTA, SETTINGS, accuracy, build_model, load_data

import keras_dp

EPSILON = 3
SETTING = SETTINGS[3]  # batches of 512 of 1,347 images: 3 steps an epoch


def falling_noise(sigma, steps):
    """More noise at first, less at the end: in three parts, around sigma."""
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [steps // 3, 2 * steps // 3], [1.25 * sigma, sigma, 0.9 * sigma]
    )


def ways(steps):
    """A name, and what is different: arguments of the optimizer, and the dtype policy."""
    sigma = keras_dp.accounting.calibrate_noise_multiplier(
        target_epsilon=EPSILON, delta=DELTA, num_examples=1347, batch_size=512, steps=steps
    )
    target = {"target_epsilon": EPSILON, "target_delta": DELTA}
    return {
        "as in quickstart": ({**target}, "float32"),
        "microbatches of 64": ({**target, "microbatch_size": 64}, "float32"),
        "noise falls": ({"noise_multiplier": falling_noise(sigma, steps)}, "float32"),
        "automatic clipping": ({**target, "clipping": "automatic"}, "float32"),
        "adaptive clipping": ({**target, "clipping": "adaptive"}, "float32"),
        "mixed precision": ({**target}, "mixed_bfloat16"),
        "per-layer clipping": ({**target, "clipping": "per_layer"}, "float32"),
    }


def train(arguments, policy, train_data, epochs, callbacks):
    keras.utils.set_random_seed(0)  # the initial weights; never the noise
    keras.config.set_dtype_policy(policy)
    try:
        model = build_model(SETTING)
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras_dp.DPSGD(
        SETTING.learning_rate,
        momentum=0.9,
        use_ema=True,
        ema_momentum=0.9,
        max_grad_norm=1.0,
        **arguments,
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        *train_data,
        batch_size=SETTING.batch_size,
        epochs=epochs,
        callbacks=callbacks,
        verbose=0,
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--ways", nargs="+", help="only these, by the first word (default: all)")
    parser.add_argument("--output", type=Path, default=Path("advanced_output"))
    options = parser.parse_args()
    train_data, test_data = load_data()

    print("way                            noise  epsilon  test accuracy  seconds")
    monitor = None
    for name, (arguments, policy) in ways(3 * options.epochs).items():
        if options.ways and name.split()[0] not in options.ways:
            continue
        began = time.perf_counter()
        # What it shows is covered by epsilon: private=True. Raw figures would not be.
        monitor = keras_dp.PrivacyMonitor(delta=DELTA, private=True, path=options.output)
        budget = keras_dp.PrivacyBudget(epsilon=EPSILON, delta=DELTA, verbose=0)
        callbacks = [budget, monitor] if name == "per-layer clipping" else [budget]
        model = train(arguments, policy, train_data, options.epochs, callbacks)
        releases = model.optimizer.ledger.releases
        noises = sorted({release.noise_multiplier for release in releases}, reverse=True)
        noise = " ".join(f"{value:.2f}" for value in noises)
        print(
            f"{name:20} {noise:>15} {model.optimizer.get_epsilon(DELTA):8.3f} "
            f"{accuracy(model, test_data):14.1%} {time.perf_counter() - began:8.0f}",
            flush=True,
        )
    if monitor.history:
        print("\nWhat the monitor saw (private), at the end of some epochs:")
        print("step   share of clipped examples   signal to noise")
        history = monitor.history
        for k in range(0, len(history["step"]), max(1, len(history["step"]) // 5)):
            print(
                f"{history['step'][k]:4} {history['clipped_share'][k]:19.2f} "
                f"(± {history['clipped_share_error'][k]:.2f}) {history['signal_to_noise'][k]:15.2f}"
            )
        print(f"\nPicture: {options.output / 'privacy-monitor.png'}")


if __name__ == "__main__":
    main()
