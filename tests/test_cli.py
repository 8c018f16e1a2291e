"""The command `keras-dp`: its figures, its words, its errors, and what it doesn't load."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import cases
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_dp
from keras_dp import accounting, cli, planning, waiting

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def run(line, capsys):
    """The status, standard output and standard error of a command line."""
    try:
        status = cli.main(shlex.split(line))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def answer(line, capsys):
    """What a command line prints as strict JSON."""
    status, out, _ = run(f"{line} --json", capsys)
    assert status == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(out, parse_constant=refuse)


# -- figures -----------------------------------------------------------------------------------


@pytest.mark.oldest
@pytest.mark.parametrize(
    "n, batch, sigma, epochs, pld, rdp",
    [
        (20000, 256, 2.5, 10, 0.5378, 0.5933),
        (60000, 256, 1.3, 15, 0.8632, 0.9531),
        (60000, 256, 0.7, 45, 5.6309, 6.3100),
    ],
)
def test_epsilon_is_the_published_figure(n, batch, sigma, epochs, pld, rdp, capsys):
    got = answer(f"epsilon -n {n} -b {batch} -s {sigma} -e {epochs} --delta 1e-5", capsys)
    assert got["by_accountant"] == pytest.approx({"pld": pld, "rdp": rdp}, abs=6e-5)
    assert (got["epsilon"], got["accountant"]) == (got["by_accountant"]["pld"], "pld")
    steps = epochs * math.ceil(n / batch)
    assert (got["steps"], got["epochs"], got["sampling"]) == (steps, epochs, "poisson")


def test_epsilon_by_sampling_is_the_table_of_the_readme(capsys):
    got = answer("epsilon -n 60000 -b 256 -s 1.1 -e 60", capsys)["epsilon_by_sampling"]
    assert round(got["poisson"], 2) == 2.38
    assert round(got["shuffled"]) == 54
    assert got["unknown"] > 6000


def test_epochs_and_steps_are_the_same_plan(capsys):
    plan = "epsilon -n 60000 -b 256 -s 1.3 --accountant rdp"
    assert answer(f"{plan} -e 15", capsys) == answer(f"{plan} --steps {15 * 235}", capsys)


def test_noise_is_that_of_accounting_and_safe_as_printed(capsys):
    plan = {"num_examples": 20_000, "batch_size": 256, "epochs": 10, "delta": 1e-5}
    line = "noise -n 20000 -b 256 -e 10 --epsilon 2"
    got = answer(line, capsys)
    best = accounting.calibrate_noise_multiplier(**plan, target_epsilon=2.0)
    assert got["noise_multiplier"] == pytest.approx(best, rel=1e-3)
    assert got["accountant"] == "pld"
    assert got["by_accountant"]["rdp"] > got["by_accountant"]["pld"] == got["noise_multiplier"]
    assert 1.99 < got["epsilon"] <= 2.0
    printed = float(run(line, capsys)[1].split()[3])
    assert got["noise_multiplier"] <= printed < got["noise_multiplier"] * 1.001
    assert accounting.compute_epsilon(**plan, noise_multiplier=printed) <= 2.0


def test_steps_are_those_of_accounting(capsys):
    plan = {"num_examples": 60_000, "batch_size": 256, "noise_multiplier": 1.1, "delta": 1e-5}
    got = answer("steps -n 60000 -b 256 -s 1.1 --epsilon 3", capsys)
    assert got["steps"] == accounting.calibrate_steps(**plan, target_epsilon=3.0) == 21478
    assert got["by_accountant"] == {"pld": 21478, "rdp": 18438}
    assert got["epochs"] == pytest.approx(21478 / 235)


@pytest.mark.parametrize(
    "n, sigma, length, accountant",
    [
        *itertools.product([24], [0.3, 1.0, 3.0], [{"epochs": 2}, {"steps": 7}], ["rdp"]),
        (4, 0.6, {"epochs": 2}, "pld"),
    ],
)
@pytest.mark.one_in(7)
def test_the_batch_size_is_the_largest_of_all_that_fit(n, sigma, length, accountant):
    plan = {"num_examples": n, "noise_multiplier": sigma, "delta": 1e-2, "accountant": accountant}
    sizes = range(1, n + 1)
    costs = {s: accounting.compute_epsilon(**plan, **length, batch_size=s) for s in sizes}
    for target in (0.3, 3.0, 30.0, 60.0, *costs.values()):
        found = accounting.calibrate_batch_size(**plan, **length, target_epsilon=target)
        assert found == max((size for size in costs if costs[size] <= target), default=0), target


def test_the_batch_command_gives_that_batch_size(capsys):
    got = answer("batch -n 1797 -s 5 -e 50 --epsilon 3 -d 1e-5", capsys)
    assert got["by_accountant"] == {"pld": 449, "rdp": 449}
    assert (got["batch_size"], got["steps_per_epoch"], got["steps"]) == (449, 5, 250)
    assert got["epsilon"] <= 3.0
    plan = planning.Plan(1797, 450, 5.0, 0, got["delta"]).for_epochs(50)
    assert plan.epsilon("pld") > 3.0


@pytest.mark.parametrize(
    "sampling, releases", [("shuffled", 10), ("unknown", 2350)], ids=["shuffled", "unknown"]
)
def test_other_ways_to_draw_batches_are_accounted_as_plain_gaussians(sampling, releases, capsys):
    line = f"-n 60000 -b 256 --sampling {sampling} --accountant pld"
    got = answer(f"noise {line} -e 10 --epsilon 3", capsys)
    one = accounting.compute_epsilon(
        num_examples=60_000,
        batch_size=60_000,
        noise_multiplier=got["noise_multiplier"] / math.sqrt(releases),
        delta=1e-5,
        steps=1,
    )
    assert one == pytest.approx(got["epsilon"]) and 2.99 < one <= 3
    steps = answer(f"steps {line} -s {got['noise_multiplier']} --epsilon 3", capsys)["steps"]
    assert 2350 <= steps < 2355  # the noise found is up to 0.05 % more than the least


def test_the_noise_on_the_average_is_sigma_over_the_expected_batch(capsys):
    got = answer("epsilon -n 1000 -b 100 -s 2 -e 1 --accountant rdp", capsys)
    assert got["noise_on_average"] == pytest.approx(2 / 100)


@pytest.mark.parametrize("n", [1, 9, 10, 11, 999, 1000, 60_000, 10**12])
def test_delta_is_the_largest_power_of_ten_below_one_over_n(n, capsys):
    line = f"epsilon -n {n} -b 1 -s 9 --steps 1 --accountant rdp"
    got = answer(line, capsys)
    assert got["delta"] < 1 / n <= got["delta"] * 10
    assert "not given" in got["assumptions"]["delta"] and "delta" not in str(got["warnings"])
    assert "as given" in answer(f"{line} --delta 1e-3", capsys)["assumptions"]["delta"]


# -- tables and pictures -----------------------------------------------------------------------


def test_a_table_has_epsilon_for_every_combination(capsys):
    line = "table -n 1000 -b 100 50 -s 2 1.5 -e 3 1 --accountant rdp --delta 1e-4"
    got = answer(line, capsys)
    rows = {
        (r["batch_size"], r["noise_multiplier"], r["epochs"]): r["epsilon"] for r in got["rows"]
    }
    assert list(rows) == list(itertools.product([50, 100], [1.5, 2.0], [1, 3]))
    plan = {"num_examples": 1000, "delta": 1e-4, "accountant": "rdp"}
    for (size, sigma, epochs), epsilon in rows.items():
        assert epsilon == accounting.compute_epsilon(
            **plan, batch_size=size, noise_multiplier=sigma, epochs=epochs
        )
    lines = run(line, capsys)[1].splitlines()[2:7]
    assert re.split(r"  +", lines[0].strip())[2:] == ["1 epoch", "3 epochs"]
    shown = [float(word) for text in lines[1:] for word in text.split()[2:]]
    assert shown == pytest.approx(list(rows.values()), rel=1e-4)


def test_a_table_of_targets_has_the_noise_that_reaches_each(capsys):
    got = answer("table -n 1000 -b 50 --epsilon 1 4 -e 1 3 --accountant rdp", capsys)
    assert [(r["target_epsilon"], r["epochs"]) for r in got["rows"]] == [
        (1, 1),
        (1, 3),
        (4, 1),
        (4, 3),
    ]
    assert all(
        0.99 * r["target_epsilon"] < r["epsilon"] <= r["target_epsilon"] for r in got["rows"]
    )


def test_a_target_out_of_reach_is_a_gap_in_the_table(capsys):
    # RDP with its finite orders can't go so low.
    line = "table -n 1000 -b 50 --epsilon 1e-9 2 -e 1 --accountant rdp --delta 1e-12"
    low, high = answer(line, capsys)["rows"]
    assert low["noise_multiplier"] is low["epsilon"] is None and not low["private"]
    assert high["private"]
    _, out, err = run(line, capsys)
    assert (
        out.splitlines()[3].split()[-1] == "-"
        and "Out of reach, whatever the noise: 1 of 2 targets" in err
    )


def test_the_table_of_one_number_is_sensible(capsys):
    got = answer("table -n 1797 -e 5 --accountant rdp", capsys)
    assert sorted({r["batch_size"] for r in got["rows"]}) == [8, 32, 128]
    assert len({r["noise_multiplier"] for r in got["rows"]}) == 5
    for n in (1, 2, 3, 100, 10**12):
        sizes = planning.default_batch_sizes(n)
        assert sizes and all(1 <= size <= n for size in sizes)


@pytest.mark.parametrize(
    "ending, beginning", [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")]
)
@pytest.mark.one_in(2)
def test_a_picture_is_drawn_in_the_format_of_its_name(ending, beginning, capsys, tmp_path):
    file = tmp_path / f"ε.{ending}"
    targets = "--epsilon 1e-9 2" if ending == "png" else "-s 0 2 1e9"  # with gaps
    line = f"table -n 100 -b 10 {targets} -e 1 5 --accountant rdp --picture {file}"
    status, out, _ = run(line, capsys)
    assert status == 0 and str(file) in out
    assert file.read_bytes().startswith(beginning)


def test_a_picture_without_matplotlib_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(planning, "table", None)  # and says so before it computes
    status, out, err = run("table -n 100 --picture a.png", capsys)
    assert (status, out) == (2, "")
    assert "--picture" in err and "pip install matplotlib" in err


def test_a_table_outlives_a_picture_that_cant_be_written(capsys, monkeypatch, tmp_path):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(planning, "draw", full)
    line = f"table -n 100 -b 10 -s 2 -e 1 --accountant rdp --picture {tmp_path}/a.png"
    status, out, err = run(line, capsys)
    assert status == 1 and "1 epoch" in out and "No space left" in err


# -- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, said",
    [
        ("epsilon -n 1000 -b 100 -s 2 -e 1 --delta 0.001", "not below 1/n"),
        ("epsilon -n 1000 -b 100 -s 0.5 -e 9 ", "above 10"),
        ("epsilon -n 1000 -b 1 -s 0.29 --steps 1", "below 0.3"),
        ("epsilon -n 1000 -b 100 -s 0 -e 1", "no privacy"),
        ("epsilon -n 1000 -b 100 -s 1e-8 -e 1", "too little noise"),
        ("table -n 1000 -b 100 -s 0.2 2 -e 1", "noise multiplier is below 0.3 for 1 of 2 plans"),
        ("table -n 1000 -b 100 -s 0.2 2 -e 1", "above 10 for 1 of 2 plans"),
        ("table -n 1000 -b 100 -s 2 -e 1 -d 0.01", "not below 1/n"),
    ],
)
def test_what_should_make_one_think_again_is_said(line, said, capsys):
    line += " --accountant rdp"
    assert any(said in warning for warning in answer(line, capsys)["warnings"])
    status, _, err = run(line, capsys)
    assert status == 0 and said in err


def test_a_sound_plan_has_no_warning(capsys):
    status, _, err = run("epsilon -n 1000 -b 10 -s 1 -e 3 --accountant rdp", capsys)
    assert (status, err) == (0, "")


def test_an_infinite_epsilon_is_null_and_not_private(capsys):
    got = answer("epsilon -n 1000 -b 10 -s 0 -e 3", capsys)
    assert got["epsilon"] is got["by_accountant"]["pld"] is None and got["private"] is False
    assert "epsilon = infinite" in run("epsilon -n 1000 -b 10 -s 0 -e 3", capsys)[1]


def test_the_tightest_accountant_is_named_whichever_it_is(capsys, monkeypatch):
    figures = {"pld": 2.0, "rdp": 1.5}
    monkeypatch.setattr(
        planning.Plan, "epsilon", lambda plan, accountant="pld", examples=1: figures[accountant]
    )
    line = "epsilon -n 1000 -b 10 -s 1 -e 3"
    got = answer(line, capsys)
    assert (got["epsilon"], got["accountant"], got["by_accountant"]) == (1.5, "rdp", figures)
    out = run(line, capsys)[1]
    assert "the tightest is rdp" in out and 'accountant="rdp"' in out
    assert answer(f"{line} --accountant pld", capsys)["by_accountant"] == {"pld": 2.0}


@pytest.mark.parametrize(
    "command", ["epsilon", "noise", "steps", "batch", "table", "risk", "select"]
)
def test_the_assumptions_are_said(command, capsys):
    lines = {
        "epsilon": "-b 10 -s 1 -e 3",
        "noise": "-b 10 -e 3 --epsilon 2",
        "steps": "-b 10 -s 1 --epsilon 2",
        "batch": "-s 1 -e 3 --epsilon 4",
        "table": "-b 10 -s 1 -e 3",
        "risk": "-b 10 -s 1 -e 3 -k 1",
        "select": "-b 10 -s 1 -e 3",
    }
    rdp = "" if command in ("risk", "select") else "--accountant rdp"
    got = answer(f"{command} -n 1000 {lines[command]} {rdp}", capsys)
    assumed = got["assumptions"]
    assert assumed["adjacency"] == "add-or-remove (zero-out) one example; n public"
    assert "row" in assumed["unit"] and "oisson" in assumed["sampling"]
    assert "ceil(" in assumed["sampling"] and "largest power of ten" in assumed["delta"]
    fields = set(re.findall(r"`(\w+)`", DOCUMENT))
    assert {*got, *assumed} <= fields
    assert all(set(row) <= fields for row in got.get("rows", []))


def examples():
    people = (ROOT / "docs" / "people.md").read_text(encoding="utf-8")
    blocks = r"```console\n\$ keras-dp ([^\n]+)\n(.*?)\n```"
    return re.findall(blocks, DOCUMENT + people, flags=re.S)


@pytest.mark.parametrize("line, said", examples(), ids=[line for line, _ in examples()])
@pytest.mark.one_in(4)
def test_the_document_shows_what_the_command_prints(line, said, capsys):
    out = run(line, capsys)[1].rstrip()
    said, cut, _ = said.partition("\n...")
    assert len(said) > 200
    if cut:
        out = out[: out.index("\n\nassumes")]
    assert NUMBER.sub("#", out).split() == NUMBER.sub("#", said).split()
    got, want = ([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (out, said))
    assert got == pytest.approx(want, rel=2e-3)  # how close a search comes to its target


# -- errors ------------------------------------------------------------------------------------

PLAN = {"-n": "1000", "-b": "10", "-s": "1", "-e": "3"}


@pytest.mark.parametrize(
    "command, wrong, said",
    [
        ("epsilon", {"-n": "many"}, ["-n/--num-examples", "whole number", "'many'"]),
        ("epsilon", {"-n": "0"}, ["-n/--num-examples", "from 1", "'0'"]),
        ("epsilon", {"-n": "9" * 5000}, ["-n/--num-examples", "9999..."]),
        ("epsilon", {"-b": "2.5"}, ["-b/--batch-size", "whole number", "'2.5'"]),
        ("epsilon", {"-b": "-5"}, ["-b/--batch-size", "whole number", "'-5'"]),
        ("epsilon", {"-b": "1001"}, ["-b/--batch-size", "at most", "1000", "1001"]),
        ("epsilon", {"-s": "nan"}, ["--noise-multiplier", "finite number", "'nan'"]),
        ("epsilon", {"-s": "-1"}, ["--noise-multiplier", "0 or more", "'-1'"]),
        ("epsilon", {"-s": "½"}, ["--noise-multiplier", "finite number", r"'\xbd'"]),
        ("epsilon", {"-e": "1e400"}, ["-e/--epochs", "whole number", "'1e400'"]),
        ("epsilon", {"-e": "3", "--steps": "3"}, ["--steps", "not allowed with", "--epochs"]),
        ("epsilon", {"-d": "1"}, ["-d/--delta", "at most 0.1", "'1'"]),
        ("epsilon", {"-d": "-inf"}, ["-d/--delta", "written as in --delta=-1"]),
        ("epsilon", {"--sampling": "x"}, ["--sampling", "poisson", "'x'"]),
        ("epsilon", {"--accountant": "gdp"}, ["--accountant", "pld", "all", "'gdp'"]),
        ("epsilon", {"-b": None}, ["-b/--batch-size", "required"]),
        ("epsilon", {"--epsilon": "3"}, ["--epsilon"]),
        ("noise", {"-s": None, "--epsilon": "0"}, ["--epsilon", "above 0", "'0'"]),
        ("noise", {"-s": None, "--epsilon": "inf"}, ["--epsilon", "finite", "'inf'"]),
        ("table", {"-b": "1001"}, ["-b/--batch-size", "at most", "1000", "1001"]),
        ("table", {"--epsilon": "1"}, ["--epsilon", "not allowed with", "--noise-multiplier"]),
        ("table", {"--picture": "a.doc"}, ["--picture", ".png", "'a.doc'"]),
        ("table", {"--picture": "no/a.png"}, ["--picture", "folder that exists", "'no/a.png'"]),
        ("table", {"--picture": "''"}, ["--picture", ".png", "''"]),
        ("risk", {"-k": "x"}, ["-k/--examples-per-person", "from 1 to 1000", "'x'"]),
        ("risk", {"--accountant": "rdp"}, ["--accountant"]),
        ("select", {"--runs": "0"}, ["--runs", "from 1 to 10000", "'0'"]),
        ("guess", {}, ["guess", "epsilon", "table"]),
    ],
)
def test_a_wrong_argument_is_named_with_its_value_and_the_fix(command, wrong, said, capsys):
    options = {k: v for k, v in (PLAN | wrong).items() if v is not None}
    line = " ".join([command, *itertools.chain(*options.items())])
    status, out, err = run(line, capsys)
    assert (status, out) == (2, "")
    assert all(word in err for word in said), err
    assert "--help" in err and "Traceback" not in err and len(err) < 1000


@pytest.mark.parametrize(
    "line, fix",
    [
        ("noise -n 1000 -b 10 -e 3 --epsilon 1e-9 -d 1e-15 --accountant rdp", "Raise --epsilon"),
        ("steps -n 1000 -b 10 -s 0.1 --epsilon 1", "Raise --noise-multiplier"),
        ("steps -n 1000 -b 10 -s 0 --epsilon 1", "Raise --noise-multiplier"),
        ("batch -n 1000 -s 0.2 -e 9 --epsilon 1", "Raise --noise-multiplier"),
    ],
)
def test_a_target_out_of_reach_ends_with_1_and_one_clear_line(line, fix, capsys):
    status, out, err = run(line, capsys)
    assert (status, out) == (1, "")
    assert fix in err and "delta" in err and err.count("\n") == 1


def test_an_accountant_that_fails_alone_is_left_out(capsys):
    got = answer("noise -n 1000 -b 10 -e 3 --epsilon 1e-3 -d 1e-12", capsys)
    assert got["accountant"] == "pld" and got["by_accountant"]["rdp"] is None
    assert "rdp out of reach" in run("noise -n 1000 -b 10 -e 3 --epsilon 1e-3 -d 1e-12", capsys)[1]


def test_targets_of_any_size_are_searched(capsys):
    got = answer("steps -n 1000 -b 10 -s 1 --epsilon 1e300 --accountant rdp", capsys)
    assert got["steps"] == 10**9
    assert got["epsilon"] < 1e300
    assert "where the search ends" in run("steps -n 9 -b 1 -s 9 --epsilon 1e300", capsys)[1]


def test_an_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(planning.Plan, "epsilon", interrupted)
    status, out, err = run("epsilon -n 1000 -b 10 -s 1 -e 3", capsys)
    assert (status, out) == (130, "") and "interrupted" in err


TEXTS = st.sampled_from(
    ["1", "10", "1000", "1e3", "0", "-1", "nan", "inf", "1e-400", "1e300", "0.5", "3", "x", "", "٣"]
) | st.text("aZ09 ._-+=/\\%\n\0é語😀", max_size=8)
OPTIONS = [
    "-n",
    "-b",
    "-s",
    "-e",
    "-d",
    "--steps",
    "--epsilon",
    "--sampling",
    "--picture",
    "--json",
    "-k",
    "--runs",
    "--score-noise",
]


@settings(max_examples=cases.examples(150), deadline=None, derandomize=True)
@given(
    command=st.sampled_from(["epsilon", "noise", "steps", "batch", "table", "risk", "select"]),
    wrong=st.dictionaries(st.sampled_from(OPTIONS), TEXTS, max_size=3),
    left_out=st.sets(st.sampled_from(["-n", "-b", "-s", "-e"]), max_size=2),
)
def test_no_command_line_ends_in_a_traceback(command, wrong, left_out):
    given = PLAN | ({"--epsilon": "3"} if command in ("noise", "steps", "batch") else {})
    known = {
        "noise": {"-n", "-b", "-e"},
        "steps": {"-n", "-b", "-s"},
        "batch": {"-n", "-s", "-e"},
    }.get(command, set(PLAN))
    given = {k: v for k, v in given.items() if k in known | {"--epsilon"}} | wrong
    line = [command]
    line += ["-k", "2"] if command in ("risk", "select") else ["--accountant", "rdp"]
    line += itertools.chain(*((k, v) for k, v in given.items() if k not in left_out))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(line)
        except SystemExit as stop:
            status = stop.code
    assert status in (0, 1, 2)
    assert bool(out.getvalue()) == (status == 0)
    assert err.getvalue() or status == 0


# -- what takes long ---------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "line, said",
    [
        ("table -n 100 -b 10 -s 1 2 -e 1", "2 plans"),
        ("noise -n 100 -b 10 -e 1 --epsilon 2", "noise for epsilon 2"),
    ],
)
def test_a_long_job_is_said_on_a_terminal_and_never_in_the_output(line, said, capsys, monkeypatch):
    line += " --accountant rdp --json"
    quiet = run(line, capsys)
    assert quiet[2] == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(waiting, "_PATIENCE", 0.0)
    assert run(line, capsys)[:2] == quiet[:2]
    assert said in terminal.getvalue()


# -- what is loaded ----------------------------------------------------------------------------


def test_the_project_installs_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"keras-dp": "keras_dp.cli:main"}


@pytest.mark.parametrize(
    "argv, orig_argv, only_plans",
    [
        (["/bin/keras-dp"], ["python", "/bin/keras-dp", "epsilon"], True),
        (["keras-dp.exe"], ["python", "keras-dp.exe"], True),
        (["-m"], ["python", "-m", "keras_dp", "epsilon"], True),
        (["-m"], ["python", "-X", "dev", "-Im", "keras_dp"], True),
        (["-m"], ["python", "-m", "trainer", "keras_dp"], False),
        (["-m"], ["python", "-m", "trainer", "-m", "keras_dp"], False),
        (["-m"], ["python", "-m"], False),
        (["keras-dp.py"], ["python", "keras-dp.py"], False),
        (["train.py"], ["python", "train.py", "-m", "keras_dp"], False),
        (["-c"], ["python", "-c"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_only_the_command_itself_goes_without_keras(argv, orig_argv, only_plans, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert cli.runs_this_process() is only_plans


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.oldest
def test_the_installed_command_loads_neither_keras_nor_tensorflow(tmp_path):
    script = tmp_path / "keras-dp"  # as pip writes it, with a word at the end
    script.write_text(
        "import sys\n"
        "from keras_dp.cli import main\n"
        "status = main()\n"
        "print([m for m in ('keras', 'tensorflow') if m in sys.modules], file=sys.stderr)\n"
        "sys.exit(status)\n",
        encoding="utf-8",
    )
    # On another backend of Keras, too: planning is the same there.
    line = shlex.split("epsilon -n 60000 -b 256 -s 1.3 -e 15 --json")
    done = python(script, *line, KERAS_BACKEND="jax")
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert round(json.loads(done.stdout)["epsilon"], 2) == 0.86


def test_python_m_helps_without_loading_accounting():
    done = python("-X", "importtime", "-m", "keras_dp", "--help")
    assert done.returncode == 0 and "epsilon" in done.stdout
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "keras_dp" in loaded
    assert not loaded & {"keras", "tensorflow", "dp_accounting", "numpy", "matplotlib"}


def test_python_m_ends_quietly_when_its_reader_has_had_enough():
    line = shlex.split("-m keras_dp table -n 9 -b 1 -s 1 -e 1 --accountant rdp")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *line], stdout=pipe, stderr=pipe) as started:
        started.stdout.close()
        assert started.stderr.read() == b"" and started.wait(300) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that was trained privately for eight steps, in a file."""
    file = tmp_path_factory.mktemp("saved") / "private.keras"
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    model.fit(np.ones((64, 4)), np.ones((64, 1)), batch_size=8, verbose=0)
    model.save(file)
    return file


@pytest.mark.oldest
@pytest.mark.parametrize("first", ["keras", "keras_dp"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_a_model_loads_privately_right_after_the_import(first, trained):
    second = {"keras": "keras_dp", "keras_dp": "keras"}[first]
    done = python(
        "-c",
        f"import {first}; import {second}\n"
        f"model = keras.saving.load_model({str(trained)!r})\n"
        "print(type(model.optimizer).__name__, model.optimizer.ledger.steps)\n"
        "print('train_step' in vars(model), model.optimizer.train_step.__name__)\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["DPSGD 8", "True train_step"]
