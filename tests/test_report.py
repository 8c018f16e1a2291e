"""The privacy statement says what really ran, and what is not covered."""

import json

import keras
import numpy as np
import pytest
import tiny

import keras_dp

X, Y = tiny.data()


def fitted(optimizer=None):
    model = tiny.compiled(optimizer)
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    return model


def test_states_what_was_spent_in_words_and_in_json():
    model = fitted()
    report = keras_dp.privacy_report(model, delta=1e-5)
    pld, rdp = (model.optimizer.get_epsilon(1e-5, a) for a in ("pld", "rdp"))
    assert report.epsilon == {"pld": pld, "rdp": rdp}
    assert report.private and report.steps == 8
    data = json.loads(report.to_json())
    assert data["epsilon"] == pytest.approx({"pld": pld, "rdp": rdp})
    assert data["private"] is True and data["delta"] == 1e-5 and data["steps"] == 8
    (release,) = data["releases"]
    assert (release["sampler"], release["sampling_rate"], release["steps"]) == ("poisson", 0.25, 8)
    assert (release["noise_multiplier"], release["max_grad_norm"]) == (1.0, 1.0)
    assert data["precision"] == "float32" and data["engine"] in ("vectorized", "ghost")
    assert set(data["versions"]) == {"keras-dp", "keras", "tensorflow", "dp-accounting"}
    text = str(report)
    for said in (f"({pld:.4f}, 1e-05)", f"{rdp:.4f}", "Poisson", "8 steps", "zero out", "public"):
        assert said in text


@pytest.mark.parametrize("topic", ["metrics", "validation", "hyper-parameters", "examples n"])
def test_rule_13_says_what_the_guarantee_does_not_cover(topic):
    report = keras_dp.privacy_report(fitted(), delta=1e-5)
    assert topic in str(report).lower()
    assert topic in " ".join(json.loads(report.to_json())["not_covered"]).lower()


def test_lists_every_kind_of_release():
    model = fitted()
    with pytest.warns(keras_dp.PrivacyWarning):
        model.train_on_batch(X, Y)
    model.fit(keras_dp.ShuffledDataset(X, Y, batch_size=16), verbose=0)
    report = keras_dp.privacy_report(model, delta=1e-5)
    assert [r["sampler"] for r in report.releases] == ["poisson", "unknown", "shuffled"]
    text = str(report)
    assert "caller's own batches" in text and "once per epoch" in text


def test_an_infinite_epsilon_is_said_to_be_no_privacy():
    model = fitted(tiny.noiseless())
    report = keras_dp.privacy_report(model, delta=1e-5)
    assert not report.private
    assert "NOT private" in str(report) and "epsilon is infinite" in str(report)
    data = json.loads(report.to_json())
    assert data["private"] is False and data["epsilon"] == {"pld": None, "rdp": None}


def test_rule_7_a_chosen_seed_is_said_to_void_the_guarantee():
    report = keras_dp.privacy_report(fitted(tiny.sgd(seed=1)), delta=1e-5)
    assert report.seeded and not report.private
    assert "guarantee is void" in str(report)
    assert json.loads(report.to_json())["private"] is False


def test_training_without_protection_in_between_is_said():
    model = fitted()
    model.compile("sgd", loss="mse")
    model.fit(X, Y, verbose=0)
    report = keras_dp.privacy_report(model, delta=1e-5)
    assert report.epsilon["pld"] == np.inf
    assert "without protection" in str(report)


@pytest.mark.parametrize(
    ("delta", "doubt"), [(0.5, "delta is not below 1/n"), (1e-300, "epsilon is above 10")]
)
def test_doubts_are_said(delta, doubt):
    assert doubt in str(keras_dp.privacy_report(fitted(), delta=delta))


def test_the_delta_is_the_budgets_or_the_targets_or_well_below_one_over_n():
    assert keras_dp.privacy_report(fitted()).delta == pytest.approx(1e-2)  # n = 64
    aimed = tiny.sgd(noise_multiplier=None, target_epsilon=3.0, target_delta=1e-7)
    assert keras_dp.privacy_report(fitted(aimed)).delta == 1e-7
    model = tiny.compiled()
    model.fit(X, Y, callbacks=[keras_dp.PrivacyBudget(delta=1e-6)], verbose=0)
    assert keras_dp.privacy_report(model).delta == 1e-6


def test_a_private_model_that_was_not_trained_has_spent_nothing():
    report = keras_dp.privacy_report(tiny.compiled(), delta=1e-5)
    assert report.epsilon == {"pld": 0.0, "rdp": 0.0} and report.steps == 0
    assert "no private step" in str(report)


@pytest.mark.parametrize("optimizer", [None, "sgd", keras.optimizers.Adam])
def test_a_model_without_private_training_has_nothing_to_state(optimizer):
    model = tiny.model()
    if optimizer:
        model.compile(optimizer if isinstance(optimizer, str) else optimizer(), loss="mse")
    with pytest.raises(ValueError, match=r"not been trained privately.*keras_dp\.DPSGD"):
        keras_dp.privacy_report(model, delta=1e-5)
