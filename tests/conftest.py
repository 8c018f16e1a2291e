"""What every test starts from, and which cases of a product of settings run every time."""

from __future__ import annotations

import gc

import cases
import keras
import pytest
import tensorflow as tf
from scripts import run_example  # noqa: F401 (a fixture)

# Four devices, for tests of several replicas: TensorFlow takes no more once it has begun.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)
# Layers that a test module makes while it is imported choose their weights there.
keras.utils.set_random_seed(0)

collect_ignore = ["worker.py"]  # a program of its own

# TensorFlow rewrites graphs in all tests as it does for users, but for these: they are of files,
# words and data sources, and take a quarter less time with graphs as they are.
NO_NUMBERS = {
    "test_cli",
    "test_docs",
    "test_examples",
    "test_fine_tuning",
    "test_impressions",
    "test_journal",
    "test_lineage",
    "test_optimizers",
    "test_report",
    "test_saving",
    "test_sources",
    "test_spool",
    "test_tuning",
    "test_tutorials",
}


def pytest_configure(config):
    cases.everything = not config.option.markexpr


def pytest_collection_finish(session):
    """What is there now stays: looking through it for garbage takes a quarter of a small fit."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """The same initial weights and dropout masks in every run; never the noise."""
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def graphs_as_they_are(request):
    as_they_are = request.module.__name__ in NO_NUMBERS
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": as_they_are})


def settings_of(item):
    """For each parameter of a test (or set of them that is listed together), its value's id."""
    found = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = names.replace(" ", "").split(",") if isinstance(names, str) else names
        found[tuple(names)] = tuple(id(item.callspec.params.get(name)) for name in names)
    return found


def each_value_once(cases):
    """Of a product of parameters, the places of as few cases as hold every value of each."""
    left, kept, known = dict(enumerate(cases)), [], set()
    while left:
        best = max(left, key=lambda k: (len(set(left[k].items()) - known), -k))
        new = set(left.pop(best).items()) - known
        if not new:
            break
        known |= new
        kept.append(best)
    return sorted(kept)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as thorough the cases that only repeat, in other settings, what others show."""
    tests = {}
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("fast"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for listed in tests.values():
        some = listed[0].get_closest_marker("one_in")
        kept = each_value_once([settings_of(item) for item in listed])
        kept = set(kept[:: some.args[0]] if some else kept)
        for place, item in enumerate(listed):
            if place not in kept:
                item.add_marker("thorough")
