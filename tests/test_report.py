"""The privacy statement says what training cost, what that rests on and what it doesn't cover."""

import dataclasses
import functools
import json
import math
import pathlib
import platform
import re
import tempfile
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_dp
from keras_dp import PrivacyLedger, Release, accounting

X, Y = tiny.data()
DOCS = pathlib.Path(__file__).parents[1] / "docs"
SCHEMA = json.loads((DOCS / "privacy-report.schema.json").read_text(encoding="utf-8"))


def fitted(optimizer=None):
    model = tiny.compiled(optimizer)
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    return model


def stepped(optimizer=None, model=None, epochs=2):
    """What `fitted` leaves in ledger and statement, without its gradients."""
    model = model or tiny.compiled(optimizer)
    tiny.private_steps(model, 4 * epochs)
    return model


def of_ledger(*releases):
    """A model that learned from these releases, as its ledger has it."""
    model = tiny.compiled()
    model.optimizer.session.attach(model, PrivacyLedger(releases))
    return model


# -- what training may have been ----------------------------------------------------------------


def shuffled():
    model = tiny.compiled()
    model.fit(keras_dp.ShuffledDataset(X, Y, batch_size=16), epochs=3, verbose=0)
    return model


def tf_data():
    model = tiny.compiled()
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)
    model.fit(batches, epochs=2, verbose=0)
    return model


def on_batches():
    model = tiny.compiled()
    for _ in range(3):
        model.train_on_batch(X, Y)
    return model


def noiseless():
    return stepped(tiny.noiseless())


def seeded():
    return stepped(tiny.sgd(seed=1))


def unprotected():
    model = stepped()
    model.compile("sgd", loss="mse")
    model.fit(X, Y, batch_size=16, epochs=3, verbose=0)
    return model


def two_sigmas():
    model = stepped()
    model.compile(tiny.sgd(noise_multiplier=2.0), loss="mse")
    return stepped(model=model, epochs=1)


def resumed():
    model = stepped()
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/m.keras")
        model = keras.saving.load_model(f"{folder}/m.keras")
    return stepped(model=model, epochs=1)


POISSON = Release("poisson", 1.0, sampling_rate=0.25)
ONCE = Release("unknown", 1.0)  # one Gaussian a step

# What trains, the (sampler, who vouches for it, steps) of each segment, its resumes, its cost,
# and what it would cost had the batches been shuffled.
WAYS = {
    "poisson": (fitted, [("poisson", "verified", 8)], 0, [(POISSON, 8)], [(ONCE, 2)]),
    "shuffled": (shuffled, [("shuffled", "verified", 12)], 0, [(ONCE, 3)], [(ONCE, 3)]),
    "tf.data": (tf_data, [("unknown", "unknown", 4)], 0, [(ONCE, 4)], [(ONCE, 4)]),
    "train_on_batch": (on_batches, [("unknown", "unknown", 3)], 0, [(ONCE, 3)], [(ONCE, 3)]),
    "no noise": (noiseless, [("poisson", "verified", 8)], 0, None, None),
    "seed": (seeded, [("poisson", "verified", 8)], 0, [(POISSON, 8)], [(ONCE, 2)]),
    "unprotected": (
        unprotected,
        [("poisson", "verified", 8), ("unprotected", "none", 12)],
        0,
        None,
        None,
    ),
    "two sigmas": (
        two_sigmas,
        [("poisson", "verified", 8), ("poisson", "verified", 4)],
        0,
        [(POISSON, 8), (Release("poisson", 2.0, sampling_rate=0.25), 4)],
        [(ONCE, 2), (Release("unknown", 2.0), 1)],
    ),
    "resumed": (
        resumed,
        [("poisson", "verified", 8), ("poisson", "verified", 4)],
        1,
        [(POISSON, 12)],
        [(ONCE, 3)],
    ),
}


@functools.cache
def report_of(way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        return keras_dp.privacy_report(WAYS[way][0](), delta=1e-5)


def cost_of(kinds):
    if kinds is None:
        return {"pld": math.inf, "rdp": math.inf}
    ledger = PrivacyLedger(release.with_steps(steps) for release, steps in kinds)
    return {a: accounting.ledger_epsilon(ledger, 1e-5, a) for a in ("pld", "rdp")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.one_in(2)
def test_every_kind_of_training_is_stated_as_what_it_was(way):
    _, segments, resumes, cost, if_shuffled = WAYS[way]
    report, data = report_of(way), strict(report_of(way).to_json())
    assert [(r["sampler"], r["sampler_basis"], r["steps"]) for r in data["releases"]] == segments
    assert (data["segments"], data["resumes"]) == (len(segments), resumes)
    assert data["steps"] == sum(steps for *_, steps in segments)
    assert report.epsilon == pytest.approx(cost_of(cost))
    assert report.epsilon_if_shuffled == pytest.approx(cost_of(if_shuffled))
    assert data["private"] == report.private == (cost is not None and way != "seed")
    text = str(report)
    for stated in (report.epsilon, report.epsilon_if_shuffled):
        for value in stated.values():
            assert ("infinite" if math.isinf(value) else f"{value:.4f}") in text
    assert f"{data['steps']} steps in {len(segments)} segment" in text
    assert ("NOT private" in text) is (not report.private)


# As others print them: 60,000 examples, batches of 256.
@pytest.mark.parametrize(
    ("sigma", "epochs", "pld", "rdp"), [(1.3, 15, 0.8632, 0.9531), (1.1, 60, 2.3781, 2.5927)]
)
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_published_settings_have_their_known_figures(sigma, epochs, pld, rdp):
    plan = {"num_examples": 60_000, "batch_size": 256, "noise_multiplier": sigma}
    release = Release(
        "poisson", sigma, epochs * 235, sampling_rate=1 / 235, num_examples=60_000, batch_size=255.3
    )
    report = keras_dp.privacy_report(of_ledger(release), delta=1e-5)
    for accountant, known in (("pld", pld), ("rdp", rdp)):
        assert report.epsilon[accountant] == accounting.compute_epsilon(
            **plan, epochs=epochs, delta=1e-5, accountant=accountant
        )
        assert report.epsilon[accountant] == pytest.approx(known, abs=5e-5)
        assert f"{known:.4f}" in str(report)
    once = Release("unknown", sigma, epochs)  # one Gaussian release an epoch
    assert report.epsilon_if_shuffled["pld"] == pytest.approx(
        accounting.ledger_epsilon([once], 1e-5)
    )


@pytest.mark.parametrize(("steps", "passes"), [(1, 1), (234, 1), (235, 1), (236, 2), (23500, 100)])
@pytest.mark.one_in(3)
def test_a_pass_that_was_begun_counts_as_one_had_batches_been_shuffled(steps, passes):
    report = keras_dp.privacy_report(
        of_ledger(Release("poisson", 2.0, steps, sampling_rate=1 / 235)), delta=1e-5
    )
    once = Release("unknown", 2.0, passes)
    assert report.epsilon_if_shuffled["rdp"] == accounting.ledger_epsilon([once], 1e-5, "rdp")


def test_the_formal_statement_has_epsilon_rounded_up_and_delta():
    report = report_of("poisson")
    stated = float(re.search(r"epsilon = ([\d.]+)", report.statement)[1])
    assert report.epsilon["pld"] <= stated <= report.epsilon["pld"] + 1e-6
    assert "delta = 1e-05" in report.statement and report.statement in str(report)
    for way in ("no noise", "unprotected", "seed"):
        assert report_of(way).statement.startswith("No guarantee holds: ")
        assert "exp(epsilon)" not in str(report_of(way))


def test_settings_are_stated_in_words_and_in_json():
    report = report_of("poisson")
    data = strict(report.to_json())
    (release,) = data["releases"]
    wanted = {"sampling_rate": 0.25, "num_examples": 64, "batch_size": 16.0, "seeded": False}
    wanted |= {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "clipping": "flat"}
    assert {k: release[k] for k in wanted} == wanted
    assert data["precision"] == "float32" and data["engine"] in ("vectorized", "ghost")
    assert data["versions"]["python"] == platform.python_version()
    assert data["versions"]["numpy"] == np.__version__
    assert data["versions"]["keras"] == keras.__version__
    text = str(report)
    row = (
        "| 8 steps | Poisson sampling, drawn by keras_dp | verified | 0.25 | 64 | 16 | 1 | 1 (flat)"
    )
    for said in (row, "zero out", "public", "central", "every checkpoint", "one example"):
        assert said in text
    assert "once in 4 steps" in str(report_of("shuffled"))
    assert "your own batches" in str(report_of("tf.data"))
    assert "1 of them" in str(report_of("resumed"))


def test_the_source_of_randomness_is_the_optimizers_word_unless_a_seed_was_chosen():
    class FairCoin(keras_dp.DPSGD):
        random_source = "a fair coin"

    model = tiny.compiled(FairCoin(0.1, max_grad_norm=1.0, noise_multiplier=1.0))
    assert keras_dp.privacy_report(model).random_source == "a fair coin"
    model.optimizer.session.attach(model, PrivacyLedger([Release("unknown", 1.0, 1, seeded=True)]))
    report = keras_dp.privacy_report(model)
    assert report.random_source == "a chosen seed"
    assert "Randomness: a chosen seed" in str(report)
    assert "operating system" in report_of("poisson").random_source


def test_assumptions_say_what_keras_dp_saw_to():
    def seen_to(way, words):
        (found,) = [a for a in report_of(way).assumptions if words in a["text"]]
        assert found["text"] in str(report_of(way))
        return found["verified"]

    assert seen_to("poisson", "joined each Poisson batch")
    assert not seen_to("seed", "joined each Poisson batch")
    assert seen_to("shuffled", "exactly one batch")
    assert not seen_to("tf.data", "held an example twice")
    assert seen_to("poisson", "was clipped") and not seen_to("unprotected", "was clipped")
    assert seen_to("poisson", "Gaussian noise of") and not seen_to("seed", "Gaussian noise of")
    assert not seen_to("poisson", "ledger is complete")
    assert not any("Poisson" in a["text"] for a in report_of("tf.data").assumptions)


# -- doubts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "doubts"),
    [
        ("poisson", []),
        ("no noise", ["8 steps had no noise (noise_multiplier=0): epsilon is infinite"]),
        (
            "unprotected",
            ["12 steps were taken with an ordinary optimizer after private training, without"],
        ),
        ("tf.data", ["n is unknown", "4 steps used batches of your own"]),
    ],
)
def test_what_to_doubt_is_said_and_where_it_comes_from(way, doubts):
    report = report_of(way)
    found = [d for d in report.warnings if "above 10" not in d]
    assert len(found) == len(doubts)
    assert all(f.startswith(d) for f, d in zip(found, doubts, strict=True))
    assert all(f"- {d}\n" in str(report) for d in report.warnings)
    assert ("## Doubts" in str(report)) is bool(report.warnings)
    assert list(report.warnings) == strict(report.to_json())["warnings"]


def test_rule_07_a_chosen_seed_is_said_to_void_the_guarantee():
    report = report_of("seed")
    assert report.seeded and not report.private
    assert "guarantee is void" in str(report)
    assert strict(report.to_json())["releases"][0]["seeded"] is True


@pytest.mark.parametrize(
    ("changes", "delta", "doubt"),
    [
        ({}, 1 / 64, "is not below 1/n"),
        ({}, 0.99 / 64, None),
        ({}, 1e-300, "epsilon is above 10"),
        ({"noise_multiplier": 0.29}, 1e-2, "noise multiplier is below 0.3"),
        ({"noise_multiplier": 0.3}, 1e-2, None),
        ({"noise_multiplier": 1e-8}, 1e-2, "too little noise for these steps"),
    ],
)
def test_doubts_begin_where_they_should(changes, delta, doubt):
    passing = Release("shuffled", 1.0, 1, steps_per_epoch=4, num_examples=64)
    release = dataclasses.replace(passing, **changes)
    report = keras_dp.privacy_report(of_ledger(release), delta=delta)
    others = [d for d in report.warnings if "above 10" not in d]
    assert any(doubt in d for d in report.warnings) if doubt else others == []


def test_problems_of_the_ledger_on_disk_are_among_the_doubts(tmp_path):
    path = tmp_path / "ledger.jsonl"
    watch = keras_dp.PrivacyBudget(delta=1e-5, ledger_path=path)
    model = tiny.compiled()
    model.fit(*tiny.data(16), batch_size=8, callbacks=[watch], verbose=0)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(keras_dp.PrivacyWarning, match="can't be read"):
        model.fit(*tiny.data(16), batch_size=8, callbacks=[watch], verbose=0)
    assert any("can't be read" in doubt for doubt in keras_dp.privacy_report(model).warnings)


# -- what the guarantee does not cover ----------------------------------------------------------


@pytest.mark.parametrize("topic", ["metrics", "validation", "hyper-parameters", "examples n"])
def test_rule_13_says_what_the_guarantee_does_not_cover(topic):
    report = report_of("poisson")
    assert topic in str(report).lower()
    data = strict(report.to_json())
    assert topic in " ".join(data["not_covered"]).lower()
    assert data["tuning_covered"] is False and data["selections"] == []


# -- which delta, and whether there is anything to state ----------------------------------------


@pytest.mark.thorough
def test_the_delta_is_the_budgets_or_the_targets_or_well_below_one_over_n():
    assert keras_dp.privacy_report(
        of_ledger(dataclasses.replace(POISSON, steps=1, num_examples=64))
    ).delta == pytest.approx(1e-2)
    aimed = tiny.sgd(noise_multiplier=None, target_epsilon=3.0, target_delta=1e-7)
    assert keras_dp.privacy_report(fitted(aimed)).delta == 1e-7
    model = tiny.compiled()
    model.fit(X, Y, callbacks=[keras_dp.PrivacyBudget(delta=1e-6)], verbose=0)
    assert keras_dp.privacy_report(model).delta == 1e-6


def test_a_private_model_that_was_not_trained_has_spent_nothing():
    report = keras_dp.privacy_report(tiny.compiled(), delta=1e-5)
    assert report.epsilon == report.epsilon_if_shuffled == {"pld": 0.0, "rdp": 0.0}
    assert report.steps == 0 and report.private and report.warnings == ()
    assert "no private step" in str(report)
    assert strict(report.to_json())["releases"] == []


@pytest.mark.parametrize("optimizer", [None, "sgd", keras.optimizers.Adam])
def test_a_model_without_private_training_has_nothing_to_state(optimizer):
    model = tiny.model()
    if optimizer:
        model.compile(optimizer if isinstance(optimizer, str) else optimizer(), loss="mse")
    with pytest.raises(ValueError, match=r"not been trained privately.*keras_dp\.DPSGD"):
        keras_dp.privacy_report(model, delta=1e-5)


def test_a_report_is_frozen_plain_data():
    report = report_of("two sigmas")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.steps = 0

    def plain(value):
        if isinstance(value, (dict, tuple)):
            return all(map(plain, value.values() if isinstance(value, dict) else value))
        return type(value) in (str, int, float, bool, type(None))

    assert plain(dataclasses.asdict(report))


# -- the JSON: strict, of the schema, documented ------------------------------------------------


def strict(text):
    """The parsed text, which must be JSON as the standard has it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
_NOTES = {"$schema", "$defs", "title", "description"}


def is_a(kind, value):
    if kind in ("number", "integer"):
        numbers = (int, float) if kind == "number" else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, _TYPES[kind])


def problems(value, schema=SCHEMA, at="report"):
    """Where a value is not of the schema: the part of JSON Schema that ours uses."""
    if "$ref" in schema:
        return problems(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], at)
    found, number = [], is_a("number", value)
    for keyword, asked in schema.items():
        match keyword:
            case "type":
                kinds = [asked] if isinstance(asked, str) else asked
                holds = any(is_a(kind, value) for kind in kinds)
            case "const":
                holds = type(value) is type(asked) and value == asked
            case "enum":
                holds = value in asked
            case "minimum":
                holds = not number or value >= asked
            case "maximum":
                holds = not number or value <= asked
            case "exclusiveMinimum":
                holds = not number or value > asked
            case "exclusiveMaximum":
                holds = not number or value < asked
            case "required":
                holds = set(asked) <= set(value)
            case "items":
                holds = True
                for i, entry in enumerate(value):
                    found += problems(entry, asked, f"{at}[{i}]")
            case "properties" | "additionalProperties":
                holds = True
                for key in value:
                    own = schema.get("properties", {})
                    if keyword == "properties" and key in own:
                        found += problems(value[key], own[key], f"{at}.{key}")
                    if keyword == "additionalProperties" and key not in own:
                        holds = holds and asked is not False
                        found += problems(value[key], asked or {}, f"{at}.{key}")
            case _:
                holds = keyword in _NOTES  # else a keyword that this function doesn't know
        if not holds:
            found.append(f"{at}: {keyword} {asked}")
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_json_is_strict_and_of_the_schema(way):
    assert problems(strict(report_of(way).to_json())) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.pop("epsilon"), "report: required"),
        (lambda d: d.update(more=1), "report: additionalProperties"),
        (lambda d: d.update(schema=1), "report.schema: const"),
        (lambda d: d.update(private=1), "report.private: type"),
        (lambda d: d.update(delta=1.0), "report.delta: exclusiveMaximum"),
        (lambda d: d["epsilon"].update(pld=-1.0), "report.epsilon.pld: minimum"),
        (lambda d: d["releases"][0].update(sampler="cards"), r"report.releases\[0\].sampler: enum"),
        (lambda d: d["releases"][0].update(sampling_rate=2.0), "sampling_rate: maximum"),
        (lambda d: d["releases"][0].pop("id"), r"report.releases\[0\]: required"),
        (lambda d: d["versions"].update(keras=3), "report.versions.keras: type"),
        (lambda d: d["warnings"].append(None), r"report.warnings\[0\]: type"),
    ],
)
def test_what_is_not_of_the_schema_is_found(change, problem):
    data = strict(report_of("poisson").to_json())
    change(data)
    (found,) = problems(data)
    assert re.search(problem, found)


def test_every_field_is_documented_and_in_the_schema():
    text = (DOCS / "privacy-report.md").read_text(encoding="utf-8")
    data = strict(report_of("resumed").to_json())
    fields = [*data, *data["releases"][0], *data["assumptions"][0], *data["epsilon"]]
    fields += [*data["attack_risk"][0], *data["attack_risk"][0]["true_positive_rates"][0]]
    fields += [f for f in SCHEMA["$defs"]["selection"]["properties"] if f != "model"]
    fields.append("capacity")  # of releases that have one
    assert [name for name in fields if f"| `{name}` |" not in text] == []
    stated = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert set(stated) == set(fields)
    known = {f.name for f in dataclasses.fields(keras_dp.PrivacyReport)}
    assert known <= set(SCHEMA["properties"])
