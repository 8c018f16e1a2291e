"""A rule for a layer of your own, and the check that it has to pass.

A layer with weights of its own trains privately without a rule: its gradients are vectorized
over the examples, which writes out one gradient of its weights for each example. A rule says
the same in fewer operations. This script

1. trains with the layer as it is, and takes the time of a step;
2. registers a rule, and takes the time again;
3. compares what both give with a plain loop over the examples;
4. registers a rule with a mistake in it, and shows how it is refused.

    pip install ".[examples]" && python examples/own_rule.py
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes from TensorFlow about itself

import keras
import numpy as np
from keras import layers, ops

import keras_dp


class LowRank(layers.Layer):
    """y_t = x_t A B at each place t of a sequence: A is (d, rank), B is (rank, units)."""

    def __init__(self, rank, units, **kwargs):
        super().__init__(**kwargs)
        self.rank, self.units = rank, units

    def build(self, shape):
        self.a = self.add_weight(shape=(shape[-1], self.rank), name="a")
        self.b = self.add_weight(shape=(self.rank, self.units), name="b")

    def call(self, x):
        return ops.matmul(ops.matmul(x, self.a), self.b)


class Careless(LowRank):
    """The same layer, for the rule with a mistake."""


def low_rank_rule(unit, x):
    """With g_t the gradient at y_t: sum_t x_t ⊗ (g_t Bᵀ) is that of A, sum_t (x_t A) ⊗ g_t of B."""
    a, b = unit.value(unit.layer.a), unit.value(unit.layer.b)
    outputs = unit.watch(unit.call(x))

    def gradients(g):  # (examples, places, units)
        through = ops.matmul(g, ops.transpose(b))
        return [
            (unit.layer.a, keras_dp.OuterProducts(x, through)),
            (unit.layer.b, keras_dp.OuterProducts(ops.matmul(x, a), g)),
        ]

    return outputs, gradients


def careless_rule(unit, x):
    """The same, but it forgets that A comes before B."""
    b = unit.value(unit.layer.b)
    outputs = unit.watch(unit.call(x))

    def gradients(g):
        through = ops.matmul(g, ops.transpose(b))
        return [
            (unit.layer.a, keras_dp.OuterProducts(x, through)),
            (unit.layer.b, keras_dp.OuterProducts(ops.ones_like(through), g)),
        ]

    return outputs, gradients


def build_model(layer=LowRank, *, width, places, gradients="auto"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((places, width)),
            layer(8, width),
            layers.Activation("tanh"),
            layer(8, width),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )
    # Without noise, so that two runs can be compared: σ = 0 promises nothing, and ε is infinite.
    optimizer = keras_dp.DPSGD(0.1, max_grad_norm=0.01, noise_multiplier=0.0, gradients=gradients)
    model.compile(optimizer, loss="mse")
    return model


def step_time(model, x, y, steps):
    """Milliseconds of a step, the median of several; the first ones, which trace, don't count."""
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        model.train_on_batch(x, y)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times[2:]))


def after_one_step(model, x, y):
    model.train_on_batch(x, y)
    return model.get_weights()


def main():
    import warnings

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--places", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps to take the time of")
    arguments = parser.parse_args()
    # Batches of one's own are accounted as if everybody were in each; there is a warning.
    warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
    sizes = {"width": arguments.width, "places": arguments.places}
    random = np.random.default_rng(0)
    x = random.normal(size=(128, arguments.places, arguments.width)).astype("float32")
    y = random.normal(size=(128, 1)).astype("float32")

    print("way                        engine      ms a step   largest difference from the loop")
    wanted = after_one_step(build_model(**sizes, gradients="loop"), x[:8], y[:8])

    def describe(way):
        found = after_one_step(build_model(**sizes), x[:8], y[:8])
        difference = max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True))
        model = build_model(**sizes)
        milliseconds = step_time(model, x, y, arguments.steps)
        print(f"{way:26} {model.optimizer.engine:10} {milliseconds:10.0f} {difference:20.1e}")

    describe("without a rule")
    keras_dp.register_rule(LowRank)(low_rank_rule)
    describe("with a rule")

    keras_dp.register_rule(Careless)(careless_rule)
    try:
        after_one_step(build_model(Careless, **sizes), x[:8], y[:8])
    except keras_dp.PrivacyError as error:
        print(f"\nwith a mistake in the rule, no step is taken:\n{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
