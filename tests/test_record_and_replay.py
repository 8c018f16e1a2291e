"""Record and replay (arXiv 2602.17454): one run is recorded, another replayed with its noise.

A run on D is recorded: every sum that gets noise, the noise, and what came out. Then the
same training runs on D', in which each step may draw one example more, with the same
draws otherwise; whatever the sums are now, each step gets the noised sums of the
recording. So:

- the sums of each step differ by at most what the noise is sized for: over all
  that gets noise in a step, `sum (change / standard deviation)^2 <= sigma^-2`;
- everything else that a step does or leaves behind must be *equal*, bit by bit: what
  was noised, how often, in which shapes, with what deviation; the operations of the
  traced graphs, or those that ran; how many steps were taken, counted and
  accounted; every variable there is, in the model or not; warnings and the log.

Left out by name, and nothing else is:

- metrics and losses, known not to be covered: the variables of `model.metrics`
  (`left_by`) and the logs;
- in an eager run, what computes them (`left_out`), and which operations run for a
  gradient that isn't finite: it is set to zero in a branch of its own. Only the time
  that a step takes could tell.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import logging
import warnings
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from tensorflow.python.framework import op_callbacks
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

from keras_dp import DPSGD, DPAdam, PoissonDataset, backend, clipping
from keras_dp.backend import tensorflow as tensorflow_backend
from keras_dp.backend.tensorflow.operations import all_operations
from keras_dp.noise import NoiseSource
from keras_dp.optimizers import DPOptimizer
from keras_dp.training import Meter
from keras_dp.training import step as training

SIGMA, C, BATCH = 0.8, 0.5, 3
PLAIN, HUGE, NAN = 9, 10, 11  # the examples that D has not
# Which examples each step draws. At most one of those in question, always the last of its
# batch, so that no other example's random numbers move. Once it is alone, once nobody is there.
PLAN = ([0, 1, 2, PLAIN], [HUGE], [], [3, 4, HUGE], [5, 6, 7, 8, NAN], [0, 5])
ROUNDING = 1e-4

ENGINES = ("ghost", "vectorized", "loop")
MODES = {
    "graph": {},
    "eager": {"compiled": {"run_eagerly": True}},
    "xla": {"compiled": {"jit_compile": True}},
    "microbatches": {"optimizer": {"microbatch_size": 2}},
    "several steps": {"compiled": {"steps_per_execution": 3}},
}
CLIPPINGS = ("flat", "per_layer", "automatic", "adaptive")
# Pairs of engine and mode, of mode and clipping, of engine and clipping: each at least once.
CASES = (
    ("ghost", "graph", "flat"),
    ("ghost", "eager", "adaptive"),
    ("ghost", "xla", "per_layer"),
    ("ghost", "microbatches", "automatic"),
    ("ghost", "several steps", "adaptive"),
    ("vectorized", "graph", "per_layer"),
    ("vectorized", "xla", "adaptive"),
    ("vectorized", "microbatches", "flat"),
    ("vectorized", "several steps", "automatic"),
    ("loop", "graph", "adaptive", "dropout"),
    ("loop", "eager", "automatic"),
    ("loop", "microbatches", "per_layer"),
    ("loop", "several steps", "flat"),
)


def test_the_cases_cover_all_pairs_but_what_does_not_exist():
    found = {pair for c in CASES for pair in ((c[0], c[1]), (c[1], c[2]), (c[0], c[2]))}
    pairs = [(e, m) for e in ENGINES for m in MODES] + [(e, c) for e in ENGINES for c in CLIPPINGS]
    missing = set(pairs) - found
    # Nothing is vectorized eagerly, and a loop compiled by XLA is a loop.
    assert missing == {("vectorized", "eager"), ("loop", "xla")}


# -- what is recorded ---------------------------------------------------------------------------


class Recorder:
    """Takes the place of the noise: keeps what it is given, or hands out what was recorded."""

    def __init__(self, recorded=None):
        self.recorded = recorded
        self.given: list[tuple[float, list[np.ndarray]]] = []
        self.returned: list[list[np.ndarray]] = []
        self._random = np.random.default_rng(7)

    def add_to(self, sums, stddev):
        return backend.call_numpy(self._run, [ops.cast(stddev, "float64"), *sums], sums)

    def _run(self, stddev, *sums):
        self.given.append((float(stddev), [np.array(s) for s in sums]))
        k = len(self.returned)
        if self.recorded is None or k >= len(self.recorded.returned):
            noised = [
                np.asarray(s + stddev * self._random.normal(size=s.shape), s.dtype) for s in sums
            ]
        else:
            noised = [
                r.astype(s.dtype) for r, s in zip(self.recorded.returned[k], sums, strict=True)
            ]
        self.returned.append(noised)
        return noised


@dataclasses.dataclass
class Run:
    """What a run gave to the noise, and all that it left behind."""

    recorder: Recorder
    left: dict[str, object]
    executed: list[str]  # operations, one after another, where they ran eagerly


class Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def variables_made():
    """References to all variables that are made meanwhile, whoever keeps them."""
    made, patch = [], pytest.MonkeyPatch()
    initialize = BaseResourceVariable.__init__

    def noted(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        made.append(weakref.ref(self))

    patch.setattr(BaseResourceVariable, "__init__", noted)
    try:
        yield made
    finally:
        patch.undo()


def left_by(model, made, steps):
    """All that can be read afterwards, but metrics and their logs."""
    optimizer = model.optimizer
    metrics = {id(v._value) for v in model.metrics_variables}
    gc.collect()
    kept = [v for v in (reference() for reference in made) if v is not None]
    new = [v for v in kept if id(v) not in metrics]
    store = {}
    optimizer.save_own_variables(store)
    saved = {k: v for k, v in store.items() if "ledger" not in str(k)}  # below, without its ids
    return {
        "weights": [w.tobytes() for w in model.get_weights()],
        "optimizer": {str(k): np.asarray(v).tobytes() for k, v in saved.items()},
        "state of the optimizer inside": [
            np.asarray(v).tobytes() for v in optimizer.inner_optimizer.variables
        ],
        "variables": collections.Counter(
            (v.dtype.name, tuple(v.shape), v.numpy().tobytes()) for v in new
        ),
        "ledger": [dataclasses.replace(r, id="") for r in optimizer.ledger],
        "releases": optimizer.releases,
        "epsilon": optimizer.get_epsilon(1e-5),
        "batches": steps.batches,
        "engine": optimizer.engine,
        "stopped": model.stop_training,
    }


def model_of(*, dropout):
    start = [keras.initializers.GlorotUniform(seed=k) for k in (1, 2)]
    return keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(2, activation="tanh", kernel_initializer=start[0]),
            *([layers.Dropout(0.3, seed=5)] if dropout else []),
            layers.Dense(1, kernel_initializer=start[1]),
        ]
    )


def data(*kinds):
    """Twelve examples, of which some are extreme."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 2)), random.normal(size=(12, 1))
    if "huge" in kinds:
        y[HUGE] = -1e6
    if "not a number" in kinds:
        x[NAN] = np.nan
    return x.astype("float32"), y.astype("float32")


@contextlib.contextmanager
def frozen(recorder, present, traced, executed):
    """Draws as planned, noise as recorded; what is traced and executed is written down."""
    patch = pytest.MonkeyPatch()
    step = DPOptimizer.train_step
    candidate = tensorflow_backend.compiled_candidate
    metrics = training.update_metrics
    noting = False

    def planned(self):
        for rows in PLAN:
            yield np.array([i for i in rows if present or i < PLAIN], int)

    def noted_step(self, model, batch):
        def note(op_type, *_, **__):
            name = op_type.decode() if isinstance(op_type, bytes) else op_type
            if noting:
                executed.append("a function" if name.startswith("__") else name)

        nonlocal noting
        if not tf.executing_eagerly():
            result = step(self, model, batch)
            traced.append([op.type for op in all_operations(backend.current_graph())])
            return result
        op_callbacks.add_op_callback(note)
        noting = True
        try:
            return step(self, model, batch)
        finally:
            noting = False
            op_callbacks.remove_op_callback(note)

    def left_out(*args):
        nonlocal noting
        noting = False
        return metrics(*args)

    def noted_candidate(engine, leaves, **options):
        def noting(leaves):
            result = engine(leaves)
            traced.append([op.type for op in all_operations(backend.current_graph())])
            return result

        return candidate(noting, leaves, **options)

    patch.setattr(PoissonDataset, "_epoch", planned)
    patch.setattr(NoiseSource, "add_to", lambda self, sums, stddev: recorder.add_to(sums, stddev))
    patch.setattr(DPOptimizer, "train_step", noted_step)
    patch.setattr(training, "update_metrics", left_out)
    patch.setattr(backend, "compiled_candidate", noted_candidate)
    try:
        yield
    finally:
        patch.undo()


def run(case, recorded=None, *, callbacks=(), kinds=("huge", "not a number")):
    """Trains for an epoch of the plan: on D, or on D' with what was recorded on D."""
    engine, mode, strategy, *more = case
    settings = MODES[mode]
    keras.utils.set_random_seed(3)
    recorder, traced, executed = Recorder(recorded), [], []
    make = DPAdam if strategy == "per_layer" else DPSGD
    log = Log()
    logging.getLogger("keras_dp").addHandler(log)
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            frozen(recorder, recorded is not None, traced, executed),
            variables_made() as made,
        ):
            warnings.simplefilter("always")
            model = model_of(dropout="dropout" in more)
            optimizer = make(
                0.1,
                max_grad_norm=C,
                noise_multiplier=SIGMA,
                clipping=strategy,
                gradients=engine,
                seed=4,
                **settings.get("optimizer", {}),
            )
            model.compile(optimizer, loss="mse", metrics=["mae"], **settings.get("compiled", {}))
            steps = Steps()
            model.fit(
                *data(*kinds),
                batch_size=2,
                verbose=0,
                callbacks=[*(make() for make in callbacks), steps],
            )
            left = left_by(model, made, steps)
    finally:
        logging.getLogger("keras_dp").removeHandler(log)
    ours = [w for w in warned if "__array__" not in str(w.message)]
    left["warnings"] = [(w.category, str(w.message)) for w in ours]
    left["log"] = log.lines
    left["traced"] = traced
    return Run(recorder, left, executed)


# -- what must hold -----------------------------------------------------------------------------


def agree(recorded, replayed):
    """Raises if anything differs but the sums, or these by more than the noise is sized for.

    Returns:
        The change of each step, as a share of what is allowed.
    """
    given, again = recorded.recorder.given, replayed.recorder.given
    assert len(given) == len(again), f"noise was drawn {len(given)} and {len(again)} times"
    for (deviation, sums), (other, others) in zip(given, again, strict=True):
        assert deviation == other, f"noise of {deviation} and {other}"
        assert [s.shape for s in sums] == [s.shape for s in others]
    for what, value in recorded.left.items():
        assert value == replayed.left[what], f"{what} depends on the example"
    steps = recorded.left["releases"]
    assert steps == len(PLAN) and len(given) % steps == 0
    each = len(given) // steps
    shares = []
    for step in range(steps):
        change = 0.0
        for k in range(step * each, (step + 1) * each):
            deviation, sums = given[k]
            _, others = again[k]
            square = sum(
                np.sum((a.astype("f8") - b) ** 2) for a, b in zip(sums, others, strict=True)
            )
            change += square / deviation**2
        shares.append(np.sqrt(change) * SIGMA)
    assert np.all(np.isfinite(shares)) and max(shares) <= 1 + ROUNDING, f"sums change by {shares}"
    return shares


def check(case, *, operations=False, **kwargs):
    """Records and replays.

    Returns:
        The change of each step, as a share of what is allowed.
    """
    recorded = run(case, **kwargs)
    if not operations:
        return agree(recorded, run(case, recorded.recorder, **kwargs))
    # Of batches of one size: which operations run, one after another.
    huge, plain = (run(case, recorded.recorder, kinds=k, **kwargs) for k in (["huge"], []))
    agree(recorded, plain)
    shares = agree(recorded, huge)
    same = huge.executed == plain.executed
    assert same and huge.executed, "which operations run depends on the examples"
    return shares


# Of the cases above, one with graphs, one without, and one of several steps at once.
EVERY_TIME = (
    ("ghost", "graph", "flat"),
    ("ghost", "eager", "adaptive"),
    ("loop", "several steps", "flat"),
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in EVERY_TIME else [pytest.mark.thorough]) for c in CASES],
    ids="-".join,
)
def test_rule_18_nothing_but_noised_sums_depends_on_an_example(case):
    shares = check(case, operations=case[1] == "eager")
    nobody = [k for k, drawn in enumerate(PLAN) if max(drawn, default=0) < PLAIN]
    assert all(shares[k] == 0 for k in nobody)
    # So that the test can fail: the huge one reaches what is allowed, and the one that isn't a
    # number adds nothing, but to the noised count of adaptive clipping.
    assert min(shares[1], shares[3]) > 0.97
    # But for rounding: where an example isn't finite, the sums of all are taken in float64.
    assert shares[4] < 1e-5 or case[2] == "adaptive" or case[1] == "eager"


# -- mutants: what to put in the place of what ----------------------------------------------------


def division_by_the_drawn_size():
    declare = Meter.declare

    def undeclared(self, sampling, *, iteration):
        declare(self, sampling, iteration=iteration)
        self._divisor.set(0.0)  # which stands for the rows that are handed over

    return Meter, "declare", undeclared


def empty_batches_left_out():
    spend = Meter.spend

    def unless_empty(self, step, otherwise, *, after, **kwargs):
        if ops.any(after[-1]):
            return spend(self, step, otherwise, after=after, **kwargs)
        return False, otherwise()

    return Meter, "spend", unless_empty


def empty_batches_not_counted():
    spend = Meter.spend

    def counted(self, step, otherwise, *, after, **kwargs):
        found = spend(self, step, otherwise, after=after, **kwargs)
        if not ops.any(after[-1]):
            self._releases.set(self._releases.read() - 1)
        return found

    return Meter, "spend", counted


def a_mean_norm_that_is_kept():
    metrics, kept = training.update_metrics, []

    def keeping(model, shown):
        kept.append(tf.Variable(tf.reduce_mean(shown.outcome.norms)))
        return metrics(model, shown)

    return training, "update_metrics", keeping


def noise_that_follows_the_norms():
    noised = clipping.FlatClipping.noised

    def by_norm(self, add, sums, sigma, seen):
        large = ops.cast(ops.max(seen.norms) > 1e3, sigma.dtype)
        return noised(self, add, sums, sigma * (1 + large), seen)

    return clipping.FlatClipping, "noised", by_norm


def a_step_that_follows_the_norms():
    noised = clipping.FlatClipping.noised

    def by_norm(self, add, sums, sigma, seen):
        found = noised(self, add, sums, sigma, seen)
        rate = 1 - 0.1 * ops.cast(ops.max(seen.norms) > 1e3, found[0].dtype)
        return [rate * s for s in found]

    return clipping.FlatClipping, "noised", by_norm


def a_branch_that_follows_the_norms():
    clip = clipping.Clip.__call__

    def branching(self, norms, *bound):
        weights = clip(self, norms, *bound)
        if tf.executing_eagerly() and float(ops.max(norms)) > 1e3:
            weights = weights * 1.0
        return weights

    return clipping.Clip, "__call__", branching


def no_clip():
    return clipping.Clip, "__call__", lambda self, norms, *bound: ops.ones_like(norms)


def a_clip_of_twice_the_norm():
    clip = clipping.Clip.__call__
    return clipping.Clip, "__call__", lambda self, norms, *bound: 2 * clip(self, norms, *bound)


def the_exact_share_of_clipped_examples():
    def share(self, add_noise, chosen, seen):
        return ops.mean(ops.cast(chosen, self.of_count.dtype))

    return clipping.SplitNoise, "share", share


def random_numbers_that_follow_the_size():
    seeds = backend.per_example_seeds

    def shifted(states, rows, views=1):
        return [s + ops.cast(rows, s.dtype) for s in seeds(states, rows, views)]

    return backend, "per_example_seeds", shifted


FLAT, ADAPTIVE = ("ghost", "eager", "flat"), ("ghost", "eager", "adaptive")
MUTANTS = [
    (division_by_the_drawn_size, FLAT, "weights"),
    (empty_batches_left_out, FLAT, "noise was drawn"),
    (empty_batches_not_counted, FLAT, "depends on the example"),
    (a_mean_norm_that_is_kept, FLAT, "variables depends"),
    (noise_that_follows_the_norms, FLAT, "noise of"),
    (a_step_that_follows_the_norms, FLAT, "weights depends"),
    (a_branch_that_follows_the_norms, FLAT, "which operations run"),
    (no_clip, FLAT, "sums change"),
    (a_clip_of_twice_the_norm, FLAT, "sums change"),
    (the_exact_share_of_clipped_examples, ADAPTIVE, "noise of|depends on the example"),
    (random_numbers_that_follow_the_size, (*FLAT, "dropout"), "sums change"),
]


@pytest.mark.parametrize(("mutant", "case", "match"), MUTANTS, ids=[m[0].__name__ for m in MUTANTS])
@pytest.mark.one_in(4)
def test_rule_18_a_step_that_lets_something_else_out_is_found_out(mutant, case, match, monkeypatch):
    monkeypatch.setattr(*mutant())
    with pytest.raises(AssertionError, match=match):
        check(case, operations=mutant is a_branch_that_follows_the_norms)


class Plateau(keras.callbacks.ReduceLROnPlateau):
    """As after a first epoch, from where on only a loss that isn't a number is no better."""

    def __init__(self):
        super().__init__("loss", patience=0)

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.best = 1e9


@pytest.mark.parametrize("callback", [keras.callbacks.TerminateOnNaN, Plateau])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_rule_18_callbacks_that_decide_by_the_loss_are_found_out(callback):
    """What they do, no epsilon covers: `fit` warns of them."""
    with pytest.raises(AssertionError, match=r"depends on the example|noise was drawn"):
        check(FLAT, callbacks=[callback])
