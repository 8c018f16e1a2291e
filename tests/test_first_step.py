"""The benchmark of first steps: exactness of what it starts, and a list that can be cut off."""

import argparse
import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "first_step.py"


@pytest.fixture(scope="module")
def first_step():
    spec = importlib.util.spec_from_file_location("first_step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options_for(path, **changes):
    known = {
        "models": "mlp,cnn,lstm",
        "repeats": 1,
        "cpu": False,
        "together": False,
        "budget": 1e9,
        "results": path,
        "limit": 60.0,
        "write": False,
    }
    return argparse.Namespace(**(known | changes))


def result(name):
    return {
        "name": name,
        "layers": 3,
        "engine": "ghost",
        "seconds": [1.0, 2.5],
        "cpu": [1.0, 2.0],
        "repeats": 1,
        "off": 2e-5,
        "float64": [3e-14, 1e-5],
        "measured": "2026-11-27",
    }


def test_the_list_has_forty_models(first_step):
    assert len(first_step.MODELS) == 40
    assert (len(first_step.HUB), len(first_step.APPLICATIONS)) == (14, 12)


def test_a_list_goes_on_where_it_ended(first_step, tmp_path, monkeypatch, capsys):
    asked = []

    def measured(name, options):
        asked.append(name)
        if name == "lstm" and asked.count(name) == 1:
            raise RuntimeError("the machine went down")
        return result(name)

    monkeypatch.setattr(first_step, "apart", measured)
    options = options_for(tmp_path / "measured.jsonl")
    first_step.run_list(options)
    assert "| lstm (the machine went down) |" in capsys.readouterr().out
    first_step.run_list(options)
    assert asked == ["mlp", "cnn", "lstm", "lstm"]
    row = "| cnn | 3 | ghost | 1.00 | 2.50 | 2.5 | 2e-05 (float32 itself 1e-05; in float64 3e-14) |"
    assert row in capsys.readouterr().out
    first_step.run_list(options_for(options.results, repeats=3, models="mlp"))
    assert asked[-1] == "mlp"  # measured once isn't measured three times


def test_a_model_that_takes_too_long_is_ended(first_step, tmp_path):
    with pytest.raises(RuntimeError, match="it took more than 0 s"):
        first_step.apart("mlp", options_for(tmp_path / "none", limit=0.01))


@pytest.mark.thorough
def test_exactness_is_that_of_one_example_at_a_time(first_step, monkeypatch):
    off, double = first_step.exactness("mlp")
    assert 0 < off < 1e-5 and double is None
    monkeypatch.setattr(first_step, "EXACT", 0.0)
    off, (double, own) = first_step.exactness("mlp")
    assert double < 1e-12 < own < 1e-5
