"""First impressions: what users see, and what they read when they get something wrong."""

import csv
import importlib.util
import os
import pathlib
import pydoc
import re
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers

import keras_dp
from keras_dp import PrivacyLedger, Release, WeakPrivacyWarning, accounting, names, statements
from keras_dp.backend.tensorflow import quiet
from keras_dp.monitor.picture import Picture, _short
from keras_dp.outlook import _Plan

ROOT = pathlib.Path(__file__).parents[1]
X, Y = tiny.data()
TEXT = np.array(["a", "b"] * 32)
PROMISE = "promise of privacy"


@pytest.fixture(scope="module")
def trained():
    """A model that has taken 8 steps of sigma 5, watched at delta 1e-5."""
    model = tiny.compiled(tiny.sgd(noise_multiplier=5.0))
    budget = keras_dp.PrivacyBudget(3.0, delta=1e-5)
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[budget])
    model.budget = budget
    return model


# -- in a line --------------------------------------------------------------------------------


def test_optimizer_budget_ledger_and_report_show_what_was_spent(trained):
    spent = trained.optimizer.get_epsilon(1e-5)
    shown = statements.rounded_up(spent)
    assert spent <= float(shown) < spent * 1.01
    cost = f"ε = {shown} at δ = 1e-5 after 8 steps"
    assert repr(trained.optimizer) == f"DPSGD(C=1, σ=5; {cost})"
    assert repr(trained.budget) == f"PrivacyBudget(ε = 3 at δ = 1e-5; spent: {shown})"
    ledger = "PrivacyLedger(8 steps: 8 poisson, σ=5, q=0.125, n=64)"
    assert repr(trained.optimizer.ledger) == ledger
    report = keras_dp.privacy_report(trained)
    assert repr(report).startswith(f"PrivacyReport('{trained.name}': {cost}; 0 doubts")
    assert report._repr_markdown_() == str(report)


def test_before_training_they_show_what_is_meant():
    make = keras_dp.DPSGD
    assert repr(make(0.1, max_grad_norm=0.5, noise_multiplier=1.1)) == (
        "DPSGD(C=0.5, σ=1.1; no private step taken)"
    )
    aimed = make(0.1, max_grad_norm=1.0, target_epsilon=3.0, target_delta=1e-6, seed=1)
    assert repr(aimed) == (
        "DPSGD(C=1, σ to be found for ε = 3 at δ = 1e-6, seed=...: no promise; "
        "no private step taken)"
    )
    falling = keras.optimizers.schedules.PiecewiseConstantDecay([10], [2.0, 1.0])
    adaptive = keras_dp.DPOptimizer(
        keras.optimizers.Lion(0.1), max_grad_norm=1.0, noise_multiplier=falling, clipping="adaptive"
    )
    assert repr(adaptive) == (
        "DPOptimizer(Lion, C=1 now, σ=2 now, clipping='adaptive'; no private step taken)"
    )
    assert repr(keras_dp.PrivacyBudget(delta=1e-5)) == "PrivacyBudget(δ = 1e-5; only shows ε)"
    assert "not private" in repr(keras_dp.PrivacyMonitor(1e-5))
    assert repr(PrivacyLedger()) == "PrivacyLedger(0 steps)"


def test_data_sets_show_their_plan_and_no_data():
    assert repr(keras_dp.PoissonDataset(X, Y, batch_size=16, batch_capacity=20)) == (
        "PoissonDataset(n = 64 examples, batch_size=16, 4 steps an epoch, q = 0.25, "
        "batch_capacity=20)"
    )
    people = keras_dp.BallsInBinsDataset(
        X, Y, batch_size=4, seed=1, user_ids=np.arange(64) // 4, max_examples_per_user=2
    )
    assert repr(people) == (
        "BallsInBinsDataset(n = 16 people, batch_size=4, 4 steps an epoch, seed=...: no promise)"
    )


def test_an_epsilon_is_never_shown_below_what_it_is():
    for epsilon in (1e-9, 0.00123456, 0.1234, 0.9991, 2.9901, 2.991, 12.34, 123.4, 99999.5):
        assert float(statements.rounded_up(epsilon)) >= epsilon * (1 - 1e-5)
        assert float(statements.rounded_up(epsilon)) <= epsilon * 1.01
    assert statements.rounded_up(2.98765) == "2.99"
    assert statements.rounded_up(0.0) == "0"
    assert statements.rounded_up(float("inf")) == "infinite"
    assert statements.short(1e-05) == "1e-5" and statements.short(1e-10) == "1e-10"


def test_long_ledgers_stay_in_a_line():
    many = PrivacyLedger(tuple(Release("unknown", 1.0 + k, 1) for k in range(9)))
    assert "and 5 more runs" in repr(many) and len(repr(many)) < 160


def test_the_statement_of_an_untrained_model_promises_nothing_yet():
    report = keras_dp.privacy_report(tiny.compiled())
    for text in (str(report), report.statement, repr(report)):
        assert re.search("no private step taken", text, re.I)
        assert "differentially private (" not in text and "Pr[" not in text
        assert "(0.0" not in text


# -- at the start of fit ----------------------------------------------------------------------


def warned_of(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [w for w in caught if issubclass(w.category, WeakPrivacyWarning)]


def test_fit_says_once_and_in_a_line_what_it_does(capsys):
    model = tiny.compiled(tiny.sgd(noise_multiplier=5.0))
    for verbose in (0, 2, 2):
        model.fit(X, Y, batch_size=8, epochs=2, verbose=verbose)
    lines = [t for t in capsys.readouterr().out.splitlines() if t.startswith("Private training")]
    planned = accounting.compute_epsilon(
        num_examples=64, batch_size=8, noise_multiplier=5.0, delta=0.01, steps=32
    )
    assert lines == [
        "Private training: n = 64 examples, q = 0.125 (batches of 8 on average), σ = 5, "
        f"C = 1 (flat), ghost engine; planned: ε = {statements.rounded_up(planned)} at δ = 0.01 "
        "after 32 steps (one example added or removed)."
    ]


@pytest.mark.thorough
def test_what_a_budget_stops_is_not_planned_for(capsys):
    """The plan alone is for 160 steps, would cost 13.9, and be warned of."""
    model = tiny.compiled()
    budget = keras_dp.PrivacyBudget(4.0, delta=1e-5, verbose=0)

    def train():
        model.fit(X, Y, batch_size=8, epochs=20, verbose=2, callbacks=[budget])

    assert warned_of(train) == []
    steps = model.optimizer.ledger.steps
    assert 4 < steps < 160
    spent = statements.rounded_up(model.optimizer.get_epsilon(1e-5))
    assert f"planned: ε = {spent} at δ = 1e-5 after {steps} steps" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_void_promise_is_warned_of_once_where_the_user_called_fit():
    model = tiny.compiled(tiny.sgd(noise_multiplier=5.0, seed=3))
    found = warned_of(lambda: [model.fit(X, Y, batch_size=32, verbose=0) for _ in range(2)])
    assert len(found) == 1
    assert re.match("No promise of privacy: with `seed=`", str(found[0].message))
    assert found[0].filename == __file__


def test_a_weak_promise_is_warned_of_before_the_first_step():
    model = tiny.compiled(tiny.sgd(noise_multiplier=0.25))
    budget = keras_dp.PrivacyBudget(delta=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeakPrivacyWarning)
        with pytest.raises(WeakPrivacyWarning):
            model.fit(X, Y, batch_size=8, verbose=0, callbacks=[budget])
    assert model.optimizer.ledger.steps == 0


def plan(sigma, *, delta=1e-5, steps=8, n=64, seeded=False):
    sampling = keras_dp.PoissonDataset(np.zeros((n, 1)), batch_size=8).sampling
    kind = sampling.release(noise_multiplier=sigma, max_grad_norm=1.0, clipping="", seeded=seeded)
    ledger = None if steps is None else PrivacyLedger((kind.with_steps(steps),))
    return _Plan(sampling, sigma, 1.0, "flat", seeded, delta, ledger)


@pytest.mark.parametrize(
    ("made", "topics"),
    [
        (plan(5.0), []),
        (plan(5.0, seeded=True), ["seed"]),
        (plan(5.0, delta=1 / 64), ["delta"]),
        (plan(5.0, delta=1 / 65), []),
        (plan(0.29), ["sigma", "epsilon"]),
        (plan(0.29, steps=None), ["sigma"]),
        (plan(1.0, steps=200), ["epsilon"]),
        (plan(0.0), []),  # of which the optimizer warned when it was made
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_is_weak_and_what_is_not(made, topics):
    found = dict(made.weaknesses())
    assert list(found) == topics
    assert all(PROMISE in text and text[-1] == "." for text in found.values())


def test_a_figure_that_promises_little_is_the_one_that_will_be_spent():
    (_, text), *_ = plan(1.0, steps=200).weaknesses()
    wanted = accounting.compute_epsilon(
        num_examples=64, batch_size=8, noise_multiplier=1.0, delta=1e-5, steps=200
    )
    assert wanted > 10 and f"epsilon will be {statements.rounded_up(wanted)} at" in text


# -- names of other libraries -----------------------------------------------------------------

SGD = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
CALLS = {
    "TensorFlow Privacy's clip": (
        lambda: keras_dp.DPSGD(0.1, l2_norm_clip=1.0, noise_multiplier=1.0),
        "`l2_norm_clip`. It is `max_grad_norm`",
    ),
    "and its microbatches": (
        lambda: keras_dp.DPSGD(0.1, num_microbatches=1, **SGD),
        "clipped by itself.*leave it out",
    ),
    "Opacus' clip": (
        lambda: keras_dp.DPOptimizer(keras.optimizers.SGD(), max_norm=1, noise_multiplier=1),
        "`max_grad_norm`",
    ),
    "a short learning rate": (lambda: keras_dp.DPAdam(lr=0.1, **SGD), "`learning_rate`"),
    "misspelt": (
        lambda: keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplyer=1.0),
        "`noise_multiplier`",
    ),
    "both": (lambda: keras_dp.DPSGD(0.1, max_norm=2.0, **SGD), "given too: leave `max_norm` out"),
    "a target on plain SGD": (
        lambda: keras_dp.DPSGD(0.1, max_grad_norm=1.0, epsilon=3.0, delta=1e-5),
        "`target_epsilon`.*`target_delta`",
    ),
    "a target in the budget": (
        lambda: keras_dp.PrivacyBudget(target_epsilon=3.0, target_delta=1e-5),
        "`epsilon` here.*`delta` here",
    ),
    "delta without its name": (
        lambda: keras_dp.PrivacyBudget(3.0, 1e-5),
        re.escape("`delta` by its name: write PrivacyBudget(3.0, delta=1e-05)."),
    ),
    "planning": (
        lambda: accounting.compute_epsilon(n=9, batch_size=3, sigma=1.0, epochs=1, delta=0.1),
        "`num_examples`.*`noise_multiplier`",
    ),
    "the noise in compile": (
        lambda: tiny.model().compile(tiny.sgd(), loss="mse", l2_norm_clip=1.0),
        "compile knows no argument `l2_norm_clip`.*the optimizer, as `max_grad_norm`",
    ),
    "a target in fit": (
        lambda: tiny.compiled().fit(X, Y, target_epsilon=3.0),
        "fit knows no argument `target_epsilon`.*PrivacyBudget",
    ),
    "nothing like it": (lambda: keras_dp.PrivacyBudget(delta=1e-5, colour=1), "It takes epsilon"),
}


@pytest.mark.parametrize("call", CALLS)
def test_names_of_others_are_answered_with_ours(call):
    act, match = CALLS[call]
    with pytest.raises(ValueError, match=match):
        act()


def test_what_is_missing_is_named_with_a_value_to_start_from(trained):
    for act, match in (
        (lambda: keras_dp.DPSGD(0.1, noise_multiplier=1.0), "max_grad_norm=1.0"),
        (lambda: keras_dp.PrivacyBudget(3.0), "delta=1e-5 suits up to 99,999"),
        (lambda: keras_dp.PrivacyMonitor(), "delta=1e-5"),
        (lambda: trained.optimizer.get_epsilon(), "delta=0.01 suits 64"),
        (
            lambda: accounting.compute_epsilon(
                num_examples=60_000, batch_size=256, noise_multiplier=1.0, epochs=1
            ),
            "delta=1e-5 suits 60,000",
        ),
        (lambda: keras_dp.PoissonDataset(X, Y), "`batch_size`"),
    ):
        with pytest.raises(TypeError, match=match):
            act()


def test_a_usual_delta_is_below_one_over_n():
    for n in (1, 9, 10, 11, 99, 100, 1797, 60_000, 10**15, None):
        assert statements.usual_delta(n) < 1 / (n or 99_999)


def test_data_are_not_shown_where_a_call_is_wrong():
    def by_place(a, *, b):
        return a, b

    checked = names.with_our_names(by_place)
    with pytest.raises(ValueError, match=re.escape("write by_place(..., b=...)")):
        checked(X, Y)
    assert checked(1, b=2) == (1, 2)


@pytest.mark.parametrize(
    "name",
    ["make_private", "PrivacyEngine", "DPKerasSGDOptimizer", "DPKerasAdamOptimizer", "get_epsilon"],
)
def test_functions_of_others_are_answered_with_ours(name):
    with pytest.raises(AttributeError, match=r"keras_dp\.DP(SGD|Adam)|model\.optimizer"):
        getattr(keras_dp, name)
    assert not hasattr(keras_dp, "nothing_of_the_kind")


@pytest.mark.parametrize("argument", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_after_the_noise_is_warned_of(argument):
    with pytest.warns(keras_dp.PrivacyWarning, match=f"`{argument}` cuts.*`max_grad_norm`"):
        keras_dp.DPSGD(0.1, **{argument: 1.0}, **SGD)


# -- help and dir -----------------------------------------------------------------------------


def test_dir_and_help_show_what_users_need():
    shown = {name for name in dir(keras_dp) if not name.startswith("__")}
    assert shown == {*keras_dp.__all__, "journal", "ledger", "noise"}
    text = pydoc.plain(pydoc.render_doc(keras_dp.DPSGD))
    assert "get_epsilon" in text and "clipping_norm" in text
    for inner in ("absorb", "attach", "binding", "waiting", "meter", "session"):
        assert not re.search(rf"^ +\|? *{inner}\b", text, re.M), inner
    optimizer = tiny.sgd()
    assert "get_epsilon" in dir(optimizer)
    assert not {"meter", "session", "absorb"} & set(dir(optimizer))


# -- logs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.one_in(2)
def test_epsilon_is_in_every_log_whatever_the_order(tmp_path, validated, as_list, trained):
    seen = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.logs.append(logs))
    seen.logs = []
    path = tmp_path / "log.csv"
    callbacks = [seen, keras.callbacks.CSVLogger(path), keras_dp.PrivacyBudget(delta=1e-5)]
    given = keras.callbacks.CallbackList(list(callbacks), model=trained) if as_list else callbacks
    held_out = (X, Y) if validated else None
    trained.fit(X, Y, batch_size=8, validation_data=held_out, verbose=0, callbacks=given)
    with open(path) as file:
        (row,) = csv.DictReader(file)
    wanted = trained.optimizer.get_epsilon(1e-5)
    assert float(row["epsilon"]) == seen.logs[0]["epsilon"] == wanted
    assert "val_epsilon" not in row and "val_loss" in row
    assert not as_list or given.callbacks == callbacks


# -- text -------------------------------------------------------------------------------------


def test_text_is_refused_where_numbers_are_needed(trained):
    before = trained.optimizer.ledger.steps
    for x, y, match in (
        (X, TEXT, r"`y` holds text.*np\.unique"),
        (X, TEXT.astype(object), "`y` holds text"),
        (TEXT.reshape(-1, 1), Y, "`x` holds text, and the input .* takes float32"),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            trained.fit(x, y, batch_size=8, verbose=0)
        assert "'a'" not in str(caught.value)
    unbuilt = keras.Sequential([layers.Dense(1)])
    unbuilt.compile(tiny.sgd(), loss="mse")
    with pytest.raises(ValueError, match=r"first layer .* takes numbers"):
        unbuilt.fit(TEXT.reshape(-1, 1), Y, batch_size=8, verbose=0)
    with pytest.raises(ValueError, match="`sample_weight` holds text"):
        trained.fit(X, Y, sample_weight=TEXT, batch_size=8, verbose=0)
    assert trained.optimizer.ledger.steps == before


def test_columns_of_text_in_numpy_train_as_they_are():
    """Ordinary Keras says of them "Invalid dtype: str32"."""
    inputs = {
        "word": keras.Input((1,), dtype="string", name="word"),
        "size": keras.Input((1,), name="size"),
    }
    looked_up = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")(inputs["word"])
    joined = layers.Concatenate()([looked_up, inputs["size"]])
    model = keras.Model(inputs, layers.Dense(1)(joined))
    model.compile(tiny.sgd(), loss="mse")
    columns = {"word": TEXT.reshape(-1, 1), "size": X[:, :1]}
    model.fit(columns, Y, batch_size=32, verbose=0)
    assert model.optimizer.ledger.steps == 2
    with pytest.raises(ValueError, match=r"the input 'size' .* takes float32"):
        model.fit({"word": columns["word"], "size": columns["word"]}, Y, verbose=0)


# -- C of the moment --------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_clipping_norm_of_the_moment_can_be_read():
    moving = keras_dp.DPSGD(0.1, max_grad_norm=0.01, noise_multiplier=1.0, clipping="adaptive")
    assert moving.clipping_norm == pytest.approx(0.01)
    model = tiny.compiled(moving)
    model.fit(X, Y, batch_size=32, epochs=3, verbose=0)
    assert moving.max_grad_norm == 0.01
    assert moving.clipping_norm == moving.clipping_strategy.max_grad_norm != 0.01
    assert f"C={moving.clipping_norm:g} now" in repr(moving)
    falling = keras.optimizers.schedules.PiecewiseConstantDecay([10], [2.0, 1.0])
    assert keras_dp.DPSGD(0.1, max_grad_norm=falling, noise_multiplier=1.0).clipping_norm == 2


# -- deployment -------------------------------------------------------------------------------


def test_saving_for_deployment_returns_the_paths(trained, tmp_path):
    files = keras_dp.save_inference_model(trained, tmp_path / "m.keras")
    assert files == (
        tmp_path / "m.keras",
        tmp_path / "m.privacy.md",
        tmp_path / "m.privacy.json",
    )
    assert sorted(tmp_path.iterdir()) == sorted(files)
    loaded = keras.saving.load_model(files.model)
    assert tiny.same(loaded.get_weights(), trained.get_weights())


def test_a_file_that_cannot_be_loaded_is_not_left_behind(tmp_path):
    class Lost(layers.Layer):
        def __init__(self, units):
            super().__init__()
            self.dense = layers.Dense(units)

        def call(self, x):
            return self.dense(x)

        def get_config(self):
            return {}

    class Half(layers.Dense):
        def load_own_variables(self, store):
            """Forgets them."""

    path = tmp_path / "m.keras"
    path.write_text("what was there before")
    for layer, match in ((Lost(1), "not loaded again"), (Half(1), "other weights")):
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile(tiny.sgd(), loss="mse")
        with pytest.raises(ValueError, match=match):
            keras_dp.save_inference_model(model, path)
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_text() == "what was there before"


# -- TensorFlow's line about a GPU that isn't there -------------------------------------------


def test_the_line_about_a_gpu_that_is_not_there_is_kept_back(monkeypatch, capfd):
    def look():
        os.write(2, b"E0000 cuda_platform.cc:52] failed call to cuInit: INTERNAL\nanother line\n")

    monkeypatch.setattr(tf.config, "list_physical_devices", look)
    monkeypatch.setattr(quiet, "_ACCELERATORS", ())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    quiet.look_for_devices_quietly()
    assert capfd.readouterr().err == "another line\n"

    asked = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda: asked.append(1))
    monkeypatch.setattr(quiet, "_ACCELERATORS", ("/dev/null",))  # as where there is one
    quiet.look_for_devices_quietly()
    monkeypatch.setattr(quiet, "_ACCELERATORS", ())
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    quiet.look_for_devices_quietly()
    assert not asked


# -- pictures ---------------------------------------------------------------------------------


def test_the_trade_off_shades_what_promises_little_and_labels_its_lines(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from keras_dp import planning

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    cells = planning.table(
        num_examples=2000,
        batch_sizes=[100],
        epochs=[1, 50],
        delta=1e-5,
        noise_multipliers=[0.5, 1.0, 1.01],
        accountants=("rdp",),
    )
    planning.draw(cells, "unused.png")
    (axes,) = drawn[0].axes
    said = [t.get_text() for t in axes.texts]
    assert said[-1] == "ε above 10: promises little" and said[:-1] == [
        "σ = 1.01",
        "σ = 1",
        "σ = 0.5",
    ]
    assert [patch.get_y() for patch in axes.patches] == [10]  # where the shade begins
    places = [t.xy[1] for t in axes.texts[:-1]]
    assert places[1] > 1.05 * places[0]  # though the lines end at almost one place
    assert axes.get_legend() is None


def test_the_lines_of_the_monitor_differ():
    paths = [f"model/block_{k}/attention/output_projection/dense" for k in range(8)]
    assert len(set(_short(paths))) == 8 and max(map(len, _short(paths))) < 50
    assert _short(["dense", "dense_1"]) == ["dense", "dense_1"]
    history = {"step": [1, 2], "epsilon": [0.1, 0.2], "max_grad_norm": [1.0, 1.0]}
    names_of = [f"gradient_norm/{q:g}" for q in (0.1, 0.5, 0.9)] + ["clipped_share"]
    for k, name in enumerate([*names_of, "signal_to_noise"]):
        for j, of in enumerate(("", *(f"/{path}" for path in paths))):
            history[f"not_private/{name}{of}"] = [0.1 + k, 0.2 + k + j]
    settings = {"layers": paths, "quantiles": [0.1, 0.5, 0.9], "delta": 1e-5, "private": False}
    figure = Picture(history, **settings).figure
    shares, norms = figure.axes[1], figure.axes[3]
    labels = [t.get_text() for t in shares.get_legend().get_texts()]
    assert len(set(labels)) == 9
    looks = {(line.get_color(), line.get_linestyle()) for line in shares.lines}
    assert len(looks) == len(shares.lines) == 9
    assert {t.get_text() for t in norms.texts} == {
        "10 % are below",
        "median",
        "90 % are below",
        "C",
    }
    assert len({(line.get_color(), line.get_linestyle()) for line in norms.lines}) == 4
    for path in paths:  # as with flat clipping
        history[f"not_private/clipped_share/{path}"] = history["not_private/clipped_share"]
    (label,) = Picture(history, **settings).figure.axes[1].get_legend().get_texts()
    assert label.get_text() == "in all, and in each layer"


def test_the_bars_of_the_benchmarks_start_where_a_step_takes_what_it_must(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    spec = importlib.util.spec_from_file_location("picture", ROOT / "benchmarks" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    found = {"r": 2.0, "engine": "ghost", "note": ""}
    about = {"device": "a machine", "versions": {"keras_dp": 1, "keras": 2, "tensorflow": 3}}
    models = {"small": {"ghost": found}, "large": {"ghost": {**found, "r": 0.8}}}
    picture.draw({"models": models, "about": about}, tmp_path / "unused.png")
    bars = drawn[0].axes[0].patches
    assert [bar.get_y() for bar in bars] == [1, 1]
    assert [bar.get_height() for bar in bars] == pytest.approx([1.0, -0.2])
