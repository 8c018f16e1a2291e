"""`PrivacyMonitor`: its numbers, what it leaves alone, and what `private=True` keeps back."""

from __future__ import annotations

import glob
import json
import math
import sys
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers, ops
from reference import example_gradients
from scipy import stats
from tensorflow.core.util import event_pb2

import keras_dp
from keras_dp import backend, waiting
from keras_dp.clipping import Clipping, SplitNoise
from keras_dp.monitor import PrivacyMonitor

N, EPOCHS = 12, 2
SIGMA, C = 2.0, 1.5
BIN = 10 ** (1 / 16)  # the bins' width
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 3},
    "microbatches": {"microbatch_size": 7},
    "vectorized": {"gradients": "vectorized"},
    "loop": {"gradients": "loop"},
}


def watched(
    monitor, *, data=None, epochs=EPOCHS, batch_size=None, callbacks=(), fit=None, **kwargs
):
    """A model, fitted on all examples in every step, whose weights stay as they are."""
    own = ("microbatch_size", "gradients", "clipping", "seed")
    optimizer = keras_dp.DPSGD(
        0.0,
        max_grad_norm=C,
        noise_multiplier=kwargs.pop("sigma", SIGMA),
        **{k: kwargs.pop(k) for k in own if k in kwargs},
    )
    model = tiny.compiled(optimizer, hidden=3, **kwargs)
    x, y = data or tiny.data(N)
    given = {"batch_size": batch_size or len(x), "epochs": epochs, "verbose": 0, **(fit or {})}
    callbacks = [*([monitor] if monitor else []), *callbacks]
    model.fit(x, y, callbacks=callbacks, **given)
    return model


def norms_by_layer(model, x, y):
    """Norms, (rows, 1 + layers): of the whole gradient and of each layer's."""
    gradients, _ = example_gradients(model, x, y)
    squares = np.array([[np.sum(g**2) for g in one] for one in gradients])
    pairs = squares.reshape(len(squares), -1, 2).sum(-1)  # each layer has a kernel and a bias
    return np.sqrt(np.column_stack([pairs.sum(-1), pairs])), gradients


def weights_by_layer(norms, clipping):
    whole, by_layer = norms[:, :1], norms[:, 1:]
    if clipping == "per_layer":
        return np.minimum(1, C / math.sqrt(by_layer.shape[1]) / by_layer)
    factor = C / (whole + 0.01) if clipping == "automatic" else np.minimum(1, C / whole)
    return np.broadcast_to(factor, by_layer.shape)


@pytest.mark.parametrize(
    ("mode", "clipping"),
    [
        *((mode, "flat") for mode in MODES if mode != "microbatches"),
        *(("graph", clipping) for clipping in ("per_layer", "automatic", "adaptive")),
        ("microbatches", "per_layer"),
    ],
)
@pytest.mark.one_in(9)
def test_the_numbers_are_those_of_one_example_at_a_time(mode, clipping):
    monitor = PrivacyMonitor(tiny.DELTA, quantiles=(0.1, 0.5, 0.8), accountant="rdp")
    epochs = 1 if clipping == "adaptive" else EPOCHS  # then C moves
    steps = 1 if clipping == "adaptive" else 3
    fit = {"steps_per_epoch": steps}
    model = watched(monitor, epochs=epochs, fit=fit, clipping=clipping, **MODES[mode])
    norms, gradients = norms_by_layer(model, *tiny.data(N))
    weights = weights_by_layer(norms, clipping)
    columns = ["", *(f"/{layer.name}" for layer in model.layers)]
    history = {k.removeprefix("not_private/"): v for k, v in monitor.history.items()}

    assert history["step"] == [steps * (k + 1) for k in range(epochs)]
    assert history["examples"] == [N * steps] * epochs
    assert history["nonfinite_share"] == [0.0] * epochs
    assert history["max_grad_norm"] == [C] * epochs
    assert history["noise_multiplier"] == [SIGMA] * epochs
    for q in (0.1, 0.5, 0.8):
        for column, name in enumerate(columns):
            wanted = np.quantile(norms[:, column], q, method="inverted_cdf")
            for got in history[f"gradient_norm/{q:g}{name}"]:
                assert wanted / BIN <= got <= wanted * BIN

    shorter = weights < 1 - 1e-6
    wanted = [np.mean(shorter.any(1)), *shorter.mean(0)]
    assert 0 < wanted[0] <= 1
    got = [history[f"clipped_share{name}"] for name in columns]
    np.testing.assert_allclose(got, np.transpose([wanted] * epochs), rtol=1e-9)

    sums = [
        sum(w[k // 2] * one[k] for w, one in zip(weights, gradients, strict=True)) for k in range(4)
    ]
    squares = np.array([np.sum(s**2) for s in sums]).reshape(-1, 2).sum(1)
    sizes = np.array([s.size for s in sums]).reshape(-1, 2).sum(1)
    deviation = C * float(SplitNoise.of(ops.cast(SIGMA, "float64"), N).of_sum)
    deviation = deviation if clipping == "adaptive" else C * SIGMA
    ratios = np.sqrt([squares.sum() / sizes.sum(), *(squares / sizes)]) / deviation
    got = [history[f"signal_to_noise{name}"] for name in columns]
    np.testing.assert_allclose(got, np.transpose([ratios] * epochs), rtol=1e-4)


@pytest.mark.thorough
def test_epsilon_is_that_of_the_ledger_and_steps_are_noted_as_often_as_asked():
    monitor = PrivacyMonitor(tiny.DELTA, every=3, accountant="rdp")
    model = watched(monitor, epochs=2, fit={"steps_per_epoch": 4}, **CHEAP)
    assert monitor.history["step"] == [3, 6, 8]
    assert monitor.history["epoch"] == [0, 1, 1]
    assert monitor.history["epsilon"][-1] == model.optimizer.get_epsilon(tiny.DELTA, "rdp")
    assert sorted(monitor.history["epsilon"]) == monitor.history["epsilon"]


@pytest.mark.thorough
def test_a_row_that_is_not_a_number_counts_as_clipped_and_spoils_no_other_number():
    x, y = tiny.data(N)
    x[3] = np.nan
    monitor = PrivacyMonitor(tiny.DELTA, quantiles=(0.5, 0.99))
    model = watched(monitor, data=(x, y))
    others = np.delete(np.arange(N), 3)
    norms, _ = norms_by_layer(model, x[others], y[others])
    history = monitor.history
    assert history["not_private/nonfinite_share"] == [1 / N] * EPOCHS
    share = (np.sum(norms[:, 0] > C) + 1) / N
    assert history["not_private/clipped_share"] == pytest.approx([share] * EPOCHS)
    assert history["not_private/gradient_norm/0.99"] == [math.inf] * EPOCHS
    assert all(0 < v < 100 for v in history["not_private/gradient_norm/0.5"])
    assert all(0 < v < 100 for v in history["not_private/signal_to_noise"])


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_empty_batches_and_batches_of_the_callers_own_are_watched_too(private):
    model = tiny.compiled(tiny.sgd(gradients="loop"))
    monitor = PrivacyMonitor(tiny.DELTA, private=private)
    x, y = tiny.data(5)
    monitor.set_model(model)
    monitor.on_train_begin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        model.train_on_batch(x[:0], y[:0])
        model.train_on_batch(x, y)
        model.train_on_batch(x[:0], y[:0])
    monitor.on_train_end()
    assert monitor.history["step"] == [3]
    values = [v for values in monitor.history.values() for v in values]
    assert np.all(np.isfinite(values))
    if not private:
        assert monitor.history["not_private/examples"] == [5]


def test_nothing_but_empty_batches_has_no_share_and_no_norms():
    model = tiny.compiled(tiny.sgd(gradients="loop"), run_eagerly=True)
    monitor = PrivacyMonitor(tiny.DELTA)
    x, y = tiny.data(5)
    monitor.set_model(model)
    monitor.on_train_begin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        model.train_on_batch(x[:0], y[:0])
    monitor.on_train_end()
    assert math.isnan(monitor.history["not_private/clipped_share"][0])
    assert math.isnan(monitor.history["not_private/gradient_norm/0.5"][0])
    assert monitor.history["not_private/signal_to_noise"] == [0.0]
    monitor.plot()


@pytest.mark.thorough
def test_steps_that_the_budget_forbids_are_not_gathered():
    monitor = PrivacyMonitor(tiny.DELTA)
    budget = keras_dp.PrivacyBudget(epsilon=9.0, delta=tiny.DELTA, verbose=0)
    model = watched(
        monitor,
        callbacks=[budget],
        epochs=4,
        fit={"steps_per_epoch": 8},
        steps_per_execution=8,
        gradients="loop",
    )
    steps = model.optimizer.ledger.steps
    assert steps % 8
    assert sum(monitor.history["not_private/examples"]) == N * steps


@pytest.mark.thorough
def test_clipping_of_the_users_own_and_weights_that_are_the_models_own():
    class Half(Clipping):
        def __call__(self, norms, max_grad_norm):
            return ops.full_like(norms, 1e-3)

    class Own(keras.Model):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 1), name="kernel")
            self.built = True

        def call(self, x):
            return x @ self.kernel

    model = Own()
    model.compile(
        keras_dp.DPSGD(
            0.0, max_grad_norm=1.0, noise_multiplier=1.0, clipping=Half(), gradients="loop"
        ),
        loss="mse",
    )
    monitor = PrivacyMonitor(tiny.DELTA)
    model.fit(*tiny.data(N), batch_size=N, verbose=0, callbacks=[monitor])
    assert monitor.history["not_private/clipped_share"] == [1.0]
    assert len(monitor.layers) == 1


CHEAP = {"gradients": "loop", "run_eagerly": True}  # no engine is tried, and nothing traced


# -- it changes nothing, and is gone when the fit is over --------------------------------------


def trained(*callbacks, seed=7, clipping="flat"):
    model = tiny.compiled(tiny.sgd(seed=seed, clipping=clipping, gradients="loop"))
    model.fit(*tiny.data(32), batch_size=8, epochs=2, verbose=0, callbacks=list(callbacks))
    return model


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
@pytest.mark.one_in(2)
def test_no_monitor_changes_the_ledger_and_a_raw_one_not_even_the_weights(clipping):
    plain = trained(clipping=clipping)
    seen = trained(PrivacyMonitor(tiny.DELTA), clipping=clipping)
    assert tiny.same(tiny.weights_of(plain), tiny.weights_of(seen), rtol=1e-6, atol=1e-7)
    noised = trained(PrivacyMonitor(tiny.DELTA, private=True), clipping=clipping)
    for model in (seen, noised):
        assert_same_ledger(plain, model)


def assert_same_ledger(one, other):
    for a, b in zip(one.optimizer.ledger, other.optimizer.ledger, strict=True):
        assert (a.steps, a.noise_multiplier) == (b.steps, b.noise_multiplier)
    assert one.optimizer.get_epsilon(tiny.DELTA) == other.optimizer.get_epsilon(tiny.DELTA)


def test_without_the_callback_nothing_is_gathered(monkeypatch):
    def never(*args):
        raise AssertionError("gathered")

    monkeypatch.setattr(backend.Totals, "__init__", never)
    model = tiny.compiled(tiny.sgd(gradients="loop"))
    model.fit(*tiny.data(), batch_size=16, verbose=0)
    assert model.optimizer.ledger.steps == 4


class Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("stop here")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_once_the_fit_is_over_nothing_is_gathered_any_more(fails):
    monitor = PrivacyMonitor(tiny.DELTA, accountant="rdp")
    model = tiny.compiled(tiny.sgd(gradients="loop"))
    data = tiny.data(16)
    if fails:
        with pytest.raises(RuntimeError, match="stop here"):
            model.fit(*data, batch_size=4, verbose=0, callbacks=[monitor, Fails()])
    else:
        model.fit(*data, batch_size=4, verbose=0, callbacks=[monitor])
    totals = monitor._statistics._totals["settings"]
    assert totals.take()[0] == (1 if fails else 0)
    model.fit(*data, batch_size=4, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        model.train_on_batch(*data)
    assert model.optimizer.ledger.steps == (6 if fails else 9)
    assert totals.take()[0] == 0

    model.fit(*data, batch_size=4, verbose=0, callbacks=[monitor])  # and again with it
    assert monitor.history["step"] == [10 if fails else 13]


@pytest.mark.thorough
def test_a_model_saved_while_it_is_watched_can_be_loaded(tmp_path):
    path = str(tmp_path / "model.keras")
    trained(PrivacyMonitor(tiny.DELTA), keras.callbacks.ModelCheckpoint(path))
    loaded = keras.saving.load_model(path)
    loaded.fit(*tiny.data(), batch_size=16, verbose=0)
    assert loaded.optimizer.ledger.steps == 12


# -- private=True ------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("batch_size", [1.0, 24.0, 1000.0])
def test_the_split_noise_is_one_gaussian_mechanism_of_sigma(sigma, batch_size):
    split = SplitNoise.of(*(ops.convert_to_tensor(v, "float64") for v in (sigma, batch_size)))
    of_sum, of_count = float(split.of_sum), float(split.of_count)
    assert of_sum**-2 + (2 * of_count) ** -2 == pytest.approx(sigma**-2)
    assert sigma < of_sum <= sigma * (4 / 3) ** 0.5 + 1e-12


class Noise:
    """Stands in for the noise: notes what is asked for, and adds numbers that can be recognised."""

    OF_SUM, OF_COUNT = 0.25, 3.0

    def __init__(self):
        self.asked = []

    def add_to(self, tensors, stddev):
        shapes = [tuple(t.shape) for t in tensors]
        self.asked.append((shapes, float(stddev), [np.array(t) for t in tensors]))
        return [t + (self.OF_SUM if tuple(t.shape) else self.OF_COUNT) for t in tensors]

    def refresh(self, key=None):
        pass


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
@pytest.mark.one_in(2)
def test_what_is_private_follows_from_noised_values_alone(clipping, monkeypatch):
    monitor = PrivacyMonitor(tiny.DELTA, private=True)
    model = tiny.compiled(
        keras_dp.DPSGD(0.0, max_grad_norm=C, noise_multiplier=SIGMA, clipping=clipping),
        run_eagerly=True,
    )
    noise = Noise()
    monkeypatch.setattr(model.optimizer._mechanism, "noise", noise)
    model.fit(*tiny.data(N), batch_size=N, verbose=0, callbacks=[monitor])
    history = {k: v[0] for k, v in monitor.history.items()}

    (_, of_sum, sums), (count_shapes, of_count, (excess,)) = noise.asked
    assert count_shapes == [()]
    # Each release is one Gaussian mechanism of noise multiplier sigma.
    assert (of_sum / C) ** -2 + (2 * of_count) ** -2 == pytest.approx(SIGMA**-2)
    assert history["noise_multiplier"] == SIGMA
    assert history["noise_multiplier_of_sum"] == pytest.approx(of_sum / C)
    assert model.optimizer.ledger.releases[0].noise_multiplier == SIGMA

    norms, _ = norms_by_layer(model, *tiny.data(N))
    clipped = np.any(weights_by_layer(norms, clipping) < 1 - 1e-6, axis=1)
    sign = -1 if clipping == "adaptive" else 1  # which counts those that are not clipped
    assert excess == pytest.approx(sign * np.sum(clipped - 0.5))
    share = np.mean(clipped) + sign * Noise.OF_COUNT / N
    assert history["clipped_share"] == pytest.approx(share)
    assert history["clipped_share_error"] == pytest.approx(of_count / N)

    squares = sum(np.sum((s + Noise.OF_SUM) ** 2) for s in sums)
    wanted = max(squares / (of_sum**2 * sum(s.size for s in sums)) - 1, 0) ** 0.5
    assert history["signal_to_noise"] == pytest.approx(wanted, rel=1e-5)
    weights = sum(s.size for s in sums)
    assert history["signal_to_noise_least"] == pytest.approx((8 / weights) ** 0.25)


def test_private_keeps_no_raw_number_anywhere(tmp_path):
    monitor = PrivacyMonitor(tiny.DELTA, private=True, path=tmp_path, log_dir=tmp_path / "logs")
    watched(monitor, **CHEAP)
    names = {name.partition("/")[0] for name in monitor.history}
    assert names == {
        "epoch",
        "step",
        "epsilon",
        "noise_multiplier",
        "noise_multiplier_of_sum",
        "max_grad_norm",
        "clipped_share",
        "clipped_share_error",
        "signal_to_noise",
        "signal_to_noise_least",
    }
    gathered = set(monitor._statistics._totals)
    assert gathered == {"settings", "sigma", "of_sum", "signal", "noise", "share"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "logs",
        "privacy-monitor.json",
        "privacy-monitor.png",
    ]
    assert "not_private" not in (tmp_path / "privacy-monitor.json").read_text()
    assert all(tag.startswith("privacy/") for tag in tags_of(tmp_path / "logs"))
    texts = [axes.get_title() for axes in monitor.plot().axes]
    assert not any("not private" in text for text in texts)


@pytest.mark.thorough
def test_the_noise_on_the_share_is_what_it_is_said_to_be():
    steps = 400
    monitor = PrivacyMonitor(tiny.DELTA, private=True, every=1, accountant="rdp")
    model = watched(monitor, epochs=1, fit={"steps_per_epoch": steps})
    norms, _ = norms_by_layer(model, *tiny.data(N))
    off = np.array(monitor.history["clipped_share"]) - np.mean(norms[:, 0] > C)
    said = np.array(monitor.history["clipped_share_error"])
    assert said == pytest.approx(np.full(steps, max(N / 20, SIGMA) / N))
    squares = np.sum((off / said) ** 2)  # false alarm: 1e-6 for each of the two
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], steps)
    assert low < squares < high
    assert abs(np.sum(off / said)) < 5 * math.sqrt(steps)


@pytest.mark.parametrize(("private", "factor"), [(True, (4 / 3) ** 0.5), (False, 1.0)])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_the_noise_on_the_sum_grows_by_the_stated_factor(private, factor):
    width, batch_size = 4000, 4
    model = keras.Sequential([keras.Input((width,)), layers.Dense(1, use_bias=False)])
    model.compile(keras_dp.DPSGD(1.0, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    before = model.get_weights()[0]
    data = np.zeros((batch_size, width)), np.zeros((batch_size, 1))
    monitor = PrivacyMonitor(tiny.DELTA, private=private)
    model.fit(*data, batch_size=batch_size, verbose=0, callbacks=[monitor])
    noise = (before - model.get_weights()[0]).ravel() * batch_size
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], width)  # false alarm: 1e-6
    assert low < np.sum((noise / factor) ** 2) < high
    assert monitor.history["max_grad_norm"] == [1.0]


@pytest.mark.thorough
def test_the_ratio_from_noised_sums_is_near_the_raw_one():
    def ratio(private):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((50,)), layers.Dense(50)])
        model.compile(keras_dp.DPSGD(0.0, max_grad_norm=1.0, noise_multiplier=0.5), loss="mse")
        monitor = PrivacyMonitor(tiny.DELTA, private=private)
        x = np.random.default_rng(0).normal(1.0, 1.0, (40, 50))
        fit = {"batch_size": 40, "steps_per_epoch": 20, "verbose": 0}
        model.fit(x, np.full((40, 50), 5.0), callbacks=[monitor], **fit)
        return monitor.history["signal_to_noise" if private else "not_private/signal_to_noise"][0]

    raw = ratio(False)
    assert raw > 0.5
    # 51,000 squared draws: a standard deviation of 0.0063 (1 + 2 raw^2)^(1/2) on the square, and
    # the noise on the sum larger by 1/(1 - (0.5/4)^2)^(1/2). False alarm below 1e-6 at five.
    off = 5 * 0.0063 * (1 + 2 * raw**2) ** 0.5
    wanted = raw**2 * (1 - (0.5 / 4) ** 2)
    assert ratio(True) ** 2 == pytest.approx(wanted, abs=off)


# -- files, TensorBoard and pictures -----------------------------------------------------------


def tags_of(folder):
    found = {}
    for file in glob.glob(f"{folder}/events.out.tfevents.*"):
        for record in tf.data.TFRecordDataset(file):
            event = event_pb2.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, tf.make_ndarray(value.tensor)))
    return found


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.thorough
def test_what_is_written_is_complete_and_says_that_it_is_not_private(tmp_path):
    monitor = PrivacyMonitor(tiny.DELTA, path=tmp_path / "made", log_dir=tmp_path / "logs")
    watched(monitor, **CHEAP)
    names = sorted(p.name for p in (tmp_path / "made").iterdir())
    assert names == ["privacy-monitor-not-private.json", "privacy-monitor-not-private.png"]
    assert is_png(tmp_path / "made" / names[1])
    content = json.loads((tmp_path / "made" / names[0]).read_text())
    assert content["private"] is False
    assert content["note"].startswith("Not private")
    assert content["history"] == monitor.history
    assert {len(values) for values in content["history"].values()} == {EPOCHS}

    tags = tags_of(tmp_path / "logs")
    public = {tag for tag in tags if not tag.startswith("not_private/")}
    assert public == {"privacy/epsilon", "privacy/noise_multiplier", "privacy/max_grad_norm"}
    raw = {name for name in monitor.history if name.startswith("not_private/")}
    assert raw and raw == set(tags) - public
    assert [step for step, _ in tags["privacy/epsilon"]] == monitor.history["step"]
    shown = [float(v) for _, v in tags["not_private/clipped_share"]]
    assert shown == pytest.approx(monitor.history["not_private/clipped_share"])
    figure = monitor.plot()
    assert "NOT PRIVATE" in figure.get_suptitle()


@pytest.mark.thorough
def test_a_picture_shows_twelve_layers_of_many():
    monitor = PrivacyMonitor(tiny.DELTA)
    model = keras.Sequential([keras.Input((3,)), *(layers.Dense(3) for _ in range(20))])
    model.compile(tiny.sgd(gradients="loop"), loss="mse", run_eagerly=True)
    x = tiny.data(2, width=3)[0]
    model.fit(x, x, batch_size=2, verbose=0, callbacks=[monitor])
    assert len(monitor.layers) == 20
    rows = [len(axes.get_yticks()) for axes in monitor.plot().axes[-2:]]
    assert rows == [12, 12]


@pytest.mark.thorough
def test_a_picture_that_can_not_be_written_does_not_stop_training(tmp_path):
    monitor = PrivacyMonitor(tiny.DELTA, path=tmp_path)
    (tmp_path / "privacy-monitor-not-private.json").mkdir()
    with pytest.warns(UserWarning, match="could not write"):
        model = watched(monitor, **CHEAP)
    assert model.optimizer.ledger.steps == EPOCHS
    assert is_png(tmp_path / "privacy-monitor-not-private.png")


def test_what_is_missing_is_said_before_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install"):
        PrivacyMonitor(tiny.DELTA, path=tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    model = tiny.compiled()
    monitor = PrivacyMonitor(tiny.DELTA, log_dir=tmp_path)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        model.fit(*tiny.data(), batch_size=16, verbose=0, callbacks=[monitor])
    assert model.optimizer.ledger.steps == 0


# -- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 0}, "delta"),
        ({"quantiles": ()}, "`quantiles` must be"),
        ({"quantiles": (0.5, 1.0)}, "`quantiles` must be"),
        ({"quantiles": 0.5}, "`quantiles` must be"),
        ({"every": "step"}, "`every` must be"),
        ({"every": 0}, "`every` must be"),
        ({"private": "yes"}, "`private` must be"),
        ({"accountant": "prv"}, "accountant"),
    ],
)
def test_an_argument_that_makes_no_sense_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrivacyMonitor(**{"delta": tiny.DELTA, **arguments})


def test_an_ordinary_optimizer_and_a_second_monitor_are_refused():
    model = tiny.model(hidden=3)
    model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="watches a DP optimizer"):
        model.fit(*tiny.data(), verbose=0, callbacks=[PrivacyMonitor(tiny.DELTA)])
    two = [PrivacyMonitor(tiny.DELTA), PrivacyMonitor(tiny.DELTA, private=True)]
    model.compile(tiny.sgd(gradients="loop"), loss="mse", run_eagerly=True)
    with pytest.raises(ValueError, match="one at a time"):
        model.fit(*tiny.data(), verbose=0, callbacks=two)
    assert model.optimizer.ledger.steps == 0
    model.fit(*tiny.data(), verbose=0, callbacks=two[1:])


def test_there_is_nothing_to_draw_before_training():
    with pytest.raises(ValueError, match="nothing to draw yet"):
        PrivacyMonitor(tiny.DELTA).plot()


# -- a line for what takes long ----------------------------------------------------------------


def test_what_takes_long_is_said_and_how_long_it_took(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "_PATIENCE", 0.0)
    printed = ""
    with waiting.said_if_slow("Calibrating"):
        for _ in range(1000):
            printed += capsys.readouterr().out
            if printed:
                break
            time.sleep(0.01)
    assert printed == "Calibrating ..."
    assert capsys.readouterr().out.startswith(" done, ")


def test_what_is_quick_or_silent_is_not_said(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "_PATIENCE", 1000.0)
    with waiting.said_if_slow("Calibrating"):
        pass
    monkeypatch.setattr(waiting, "_PATIENCE", 0.0)
    with waiting.said_if_slow("Calibrating", silent=True):
        time.sleep(0.05)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("verbose", [0, 2])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_a_silent_fit_is_silent_about_calibration_and_search_too(verbose, monkeypatch):
    asked = []

    def noting(what, *, silent=False, **how):
        asked.append((what.split()[0], silent))
        return waiting.said_if_slow(what, silent=True)

    monkeypatch.setattr(keras_dp.binding, "said_if_slow", noting)
    monkeypatch.setattr(keras_dp.callbacks, "said_if_slow", noting)
    model = tiny.model(hidden=3)
    model.compile(
        keras_dp.DPSGD(
            0.1,
            max_grad_norm=1.0,
            target_epsilon=5.0,
            target_delta=tiny.DELTA,
            gradients="loop",
        ),
        loss="mse",
        run_eagerly=True,
    )
    budget = keras_dp.PrivacyBudget(epsilon=9.0, delta=tiny.DELTA)
    model.fit(*tiny.data(), batch_size=16, verbose=verbose, callbacks=[budget])
    first = dict(reversed(asked))  # once prepared, later steps are silent
    assert first == dict.fromkeys(("Calibrating", "Finding", "Preparing"), not verbose)
