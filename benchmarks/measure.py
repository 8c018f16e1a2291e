"""One measurement in a process of its own: what `run.py` starts, and reads as JSON.

    python benchmarks/measure.py '{"do": "about"}'
    python benchmarks/measure.py '{"do": "time", "model": "mlp", "variants": ["ordinary",
        "noise", "vectorized"], "rounds": 5}'
    python benchmarks/measure.py '{"do": "fits", "model": "mlp", "engine": "ghost", "rounds": 3}'
    python benchmarks/measure.py '{"do": "memory", "model": "mlp", "variants": ["ordinary"]}'

Prints one line of JSON.

A step is a call of the function that `fit` calls, on an iterator of a
`tf.data.Dataset` of unknown batch size, as `fit` makes one: there are no
callbacks, no metrics and no conversions around it. All variants are called in
the same way. Keyword `sizes` goes to the function in `zoo.py`.

Memory is what a step needs beyond what is held between steps (weights,
optimizer, batch, TensorFlow itself): after some steps, so that tracing and
compiling are over, the process's high-water mark is reset and read again after
more steps. On the CPU this is Linux' `VmHWM`, over the resident size between
two steps, in an environment (`tables.RETURN_MEMORY`) in which TensorFlow has no
pool of its own and the C library gives freed blocks back at once, or the
resident size would never shrink. On a GPU it is TensorFlow's own count.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import ctypes
import functools
import json
import logging
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from zoo import ZOO

import keras_dp
from keras_dp.backend.tensorflow.filters import _folded_filter_gradients_work
from keras_dp.noise import NoiseSource

XLA, AUTO = ", XLA", ", auto"  # variants: compiled, and in microbatches of a size that is found
_FIT_STEPS = 30  # in an epoch
SETTINGS = json.loads(os.environ.get("KERAS_DP_BENCHMARKS", '{"clock": "wall"}'))  # of run.py


def main():
    request = json.loads(sys.argv[1])
    keras.config.set_dtype_policy(SETTINGS.get("policy", "float32"))
    tf.config.experimental.enable_tensor_float_32_execution(SETTINGS.get("tf32", True))
    logging.getLogger("keras_dp").setLevel(logging.ERROR)  # the table names what engine ran
    do = {"about": about, "time": measure_time, "memory": measure_memory, "fits": measure_fits}
    print(json.dumps(do[request.pop("do")](**request)), flush=True)


# -- one step ------------------------------------------------------------------------------


def make_step(name, variant, sizes, microbatch_size=None):
    """A function that takes one step of a variant and waits for it, and its model."""
    random = np.random.default_rng(0)
    model, x, y, loss = ZOO[name](random, **sizes)
    if variant == "noise":
        return noise_draw(model.trainable_variables), model
    gradients = variant.removesuffix(XLA).removesuffix(AUTO)
    finds_size = variant.endswith(AUTO)
    optimizer = (
        keras.optimizers.SGD(0.1)
        if gradients == "ordinary"
        else keras_dp.DPSGD(
            0.1,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            gradients=gradients,
            microbatch_size="auto" if finds_size else microbatch_size,
        )
    )
    model.compile(optimizer, loss, jit_compile=variant.endswith(XLA))
    return training_step(model, x, y, known=finds_size), model


def training_step(model, x, y, *, known=False):
    """A call of the model's train function, on an iterator that yields the same batch.

    `known` is whether it says the batch's size, as the expected one is known in `fit`.
    """

    def of_unknown_size(*tensors):
        return tuple(
            tf.compat.v1.placeholder_with_default(t, [None, *t.shape[1:]]) for t in tensors
        )

    batches = tf.data.Dataset.from_tensors((x, y))
    iterator = iter((batches if known else batches.map(of_unknown_size)).repeat())
    model.make_train_function()
    session = getattr(model.optimizer, "session", None)
    if session is not None:  # as for `train_on_batch`
        session.begin_train_on_batch()

    def step():
        if session is not None:
            session.gate.open()
        model.train_function(iterator)
        tf.test.experimental.sync_devices()

    return step


def noise_draw(variables):
    """A function that draws what a private step adds: a Gaussian for each variable in turn."""
    source = NoiseSource()
    shapes = [(v.shape, "float32") for v in variables]
    stddev = tf.Variable(1.0, dtype="float64")

    @tf.function
    def draw():
        return source.draw(shapes, stddev * 1.0)

    def step():
        draw()
        tf.test.experimental.sync_devices()

    return step


def engine_of(model):
    """Which engine a private model used, or `None`."""
    return getattr(getattr(model, "optimizer", None), "engine", None)


# -- time ----------------------------------------------------------------------------------


def measure_time(model, variants, rounds, sizes=None):
    """Milliseconds of each round by variant, all variants taking turns.

    Each turn is one step that isn't timed and one that is, because a step
    follows its own kind in training: it finds the caches as that left them.
    """
    results, steps = {}, {}
    tf.reduce_sum(tf.random.normal([100, 100]) @ tf.ones([100, 100]))  # wakes TensorFlow
    for variant in variants:
        try:
            steps[variant], results[variant] = first_steps(model, variant, sizes or {})
        except Exception as error:
            results[variant] = {"error": first_line(error)}
    for _ in range(rounds):
        for variant in list(steps):
            try:
                steps[variant]()
                results[variant]["ms"].append(timed(steps[variant]))
            except Exception as error:
                results[variant] = {"error": first_line(error)}
                del steps[variant]
    for result in results.values():
        if "ms" in result:
            later = statistics.median(result["ms"])
            result["compile_s"] = (result.pop("first_ms") - later) / 1e3
    return results


def measure_fits(model, engine, rounds):
    """Milliseconds of a step in `fit`, by whether its Poisson batches are whole, in turns."""
    epochs = {}
    for size in (None, "auto"):
        made, x, y, loss = ZOO[model](np.random.default_rng(0))  # a clone would have no LoRA
        optimizer = keras_dp.DPSGD(
            0.1, max_grad_norm=1.0, noise_multiplier=1.0, gradients=engine, microbatch_size=size
        )
        made.compile(optimizer, loss)
        many = (np.concatenate([t] * _FIT_STEPS) for t in (x, y))
        epochs[size or "whole"] = functools.partial(made.fit, *many, batch_size=len(x), verbose=0)
    results = {name: [] for name in epochs}
    for k in range(rounds + 1):
        for name, epoch in epochs.items():
            ms = timed(epoch) / _FIT_STEPS
            if k:
                results[name].append(ms)
    return results


def first_steps(name, variant, sizes):
    """A variant's step, which was taken three times, and the beginning of its results."""
    step, model = make_step(name, variant, sizes)
    result = {"ms": [], "first_ms": timed(step), "engine": engine_of(model)}
    result["parameters"] = int(sum(np.prod(v.shape) for v in model.trainable_variables))
    step()
    step()
    return step, result


def timed(step):
    """Milliseconds of one step, by the clock of `run.py --clock`."""
    clock = time.process_time if SETTINGS["clock"] == "cpu" else time.perf_counter
    start = clock()
    step()
    return (clock() - start) * 1e3


def first_line(error):
    """The first line of an error, and its kind."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


# -- memory --------------------------------------------------------------------------------


def measure_memory(model, variants, steps=4, sizes=None, microbatch_size=None):
    """Bytes that a step of the first variant needs beyond what is held between steps."""
    try:
        step, _ = make_step(model, variants[0], sizes or {}, microbatch_size)
        for _ in range(steps):
            step()
        gpu = tf.config.list_physical_devices("GPU")
        return {"bytes": gpu_peak(step, steps) if gpu else cpu_peak(step, steps)}
    except Exception as error:
        return {"error": first_line(error)}


def gpu_peak(step, steps):
    tf.config.experimental.reset_memory_stats("GPU:0")
    before = tf.config.experimental.get_memory_info("GPU:0")["current"]
    for _ in range(steps):
        step()
    return tf.config.experimental.get_memory_info("GPU:0")["peak"] - before


def cpu_peak(step, steps):
    """Linux only: growth of the resident size, and `None` where that can't be known."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
    except (OSError, AttributeError):
        return None
    for _ in range(steps):
        step()
    return resident("VmHWM") - before


def resident(field):
    """A field of this process's status, in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# -- machine -------------------------------------------------------------------------------


def about():
    """Versions, and the name of the device."""
    return {
        "device": device(),
        "date": time.strftime("%Y-%m-%d"),
        "onednn": _folded_filter_gradients_work("float32"),
        "settings": SETTINGS,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "keras_dp": keras_dp.__version__,
        },
        "models": {name: function.__doc__.splitlines()[0] for name, function in ZOO.items()},
    }


@functools.cache
def device():
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def cpu_name():
    """The CPU's name, and its family and model where the name is a bare one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.M))
    name = found.get("model name", platform.machine())
    return name if re.search(r"\d", name) else f"{name} (family {found['cpu family']})"


if __name__ == "__main__":
    main()
