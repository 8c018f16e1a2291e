"""Ordinary training of models with private parts: noted as before, and noted once."""

import keras
import pytest
import tiny
from keras import layers

from keras_dp import lineage


def private_encoder():
    """A frozen layer that was trained privately."""
    encoder = layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), encoder, layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    model.fit(*tiny.data(), batch_size=16, verbose=0)
    encoder.trainable = False
    return encoder


def head_on(encoder, optimizer="sgd"):
    model = keras.Sequential([keras.Input((4,)), encoder, layers.Dense(1)])
    model.compile(optimizer, loss="mse")
    return model


def noted(monkeypatch):
    """Every time that ordinary training is noted: how many weights and layers it was for."""
    found, original = [], lineage._note_ordinary
    monkeypatch.setattr(
        lineage,
        "_note_ordinary",
        lambda optimizer, things, *a, **k: (
            found.append(len(list(things))) or original(optimizer, things, *a, **k)
        ),
    )
    return found


def unprotected(*owners):
    return sum(r.steps for r in lineage.of(*owners) if r.sampler == "unprotected")


def test_the_same_training_is_noted_once(monkeypatch):
    model = head_on(private_encoder())
    model.train_on_batch(*tiny.data())
    found = noted(monkeypatch)
    for _ in range(5):
        model.train_on_batch(*tiny.data())
    assert not found
    assert unprotected(model) == 6


def test_rule_16_another_optimizer_is_noted_as_well(monkeypatch):
    model = head_on(private_encoder())
    model.train_on_batch(*tiny.data())
    model.compile("adam", loss="mse")
    found = noted(monkeypatch)
    model.train_on_batch(*tiny.data())
    assert found
    assert unprotected(model) == 2


def test_rule_16_a_layer_that_thaws_is_noted_as_well(monkeypatch):
    encoder = private_encoder()
    model = head_on(encoder)
    for _ in range(3):
        model.train_on_batch(*tiny.data())
    assert unprotected(encoder) == 0
    encoder.trainable = True
    model.compile("sgd", loss="mse")
    found = noted(monkeypatch)
    model.train_on_batch(*tiny.data())
    assert found
    assert unprotected(encoder) == 1
    assert head_on(encoder, tiny.sgd()).optimizer.get_epsilon(1e-5) == float("inf")


@pytest.mark.thorough
def test_rule_16_a_layer_that_is_added_is_noted_as_well(monkeypatch):
    encoder = private_encoder()
    model = head_on(encoder)
    model.train_on_batch(*tiny.data())
    added = layers.Dense(1)
    model.add(added)
    model.compile("sgd", loss="mse")
    found = noted(monkeypatch)
    model.train_on_batch(*tiny.data())
    assert found
    assert unprotected(added) == 1


@pytest.mark.parametrize("state", ["nothing", "private", "private elsewhere", "ordinary", "copied"])
def test_rule_16_what_is_looked_at_first_agrees_with_the_whole_ledger(state):
    encoder = layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), encoder, layers.Dense(1)])
    if state == "ordinary":
        model.compile("sgd", loss="mse")
        model.fit(*tiny.data(), verbose=0)
    elif state == "private":
        model.compile(tiny.sgd(), loss="mse")
        model.fit(*tiny.data(), batch_size=16, verbose=0)
    elif state == "private elsewhere":
        tiny.compiled().fit(*tiny.data(), batch_size=16, verbose=0)
    elif state == "copied":
        other = head_on(private_encoder())
        model = keras.models.clone_model(other)
        lineage.add(lineage.of(other), model)
    assert lineage._has_learned(model) == (lineage.of(model).steps > 0)
    assert lineage._has_learned(model) == (state in ("private", "copied"))


def test_rule_16_ordinary_steps_after_private_ones_count_also_where_nothing_else_is_left():
    model = tiny.compiled()
    model.fit(*tiny.data(), batch_size=16, verbose=0)
    model.compile("sgd", loss="mse")
    model.train_on_batch(*tiny.data())
    kernel = model.layers[0]
    other = keras.Sequential([keras.Input((4,)), kernel, layers.Dense(1)])
    other.compile("sgd", loss="mse")
    assert lineage._has_learned(other)
    other.train_on_batch(*tiny.data())
    assert unprotected(other) == 2
    assert unprotected(model) == 2
