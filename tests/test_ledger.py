"""The ledger only grows, merges without loss, and survives being written down."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dp.ledger import PrivacyLedger, Release

pytestmark = pytest.mark.fast

KINDS = {
    "a": {"sampler": "poisson", "noise_multiplier": 1.1, "sampling_rate": 1 / 235},
    "b": {"sampler": "shuffled", "noise_multiplier": 4.0, "steps_per_epoch": 235, "seeded": True},
    "c": {"sampler": "unknown", "noise_multiplier": 20.0, "max_grad_norm": 0.5},
    "d": {"sampler": "unprotected", "noise_multiplier": 0.0, "num_examples": 60_000},
}
# Runs of one identity agree in all but their steps, as in checkpoints of one run.
RELEASES = st.builds(
    lambda name, steps: Release(**KINDS[name], steps=steps, id=name),
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 10**6),
)
LEDGERS = st.lists(RELEASES, max_size=5).map(lambda runs: PrivacyLedger().merge(runs))


def counts(ledger):
    return {(r.id, r.mechanism): r.steps for r in ledger}


@settings(max_examples=200, deadline=None)
@given(LEDGERS, LEDGERS, LEDGERS)
def test_merge_is_a_union(a, b, c):
    assert counts(a.merge(b)) == counts(b.merge(a))
    assert counts(a.merge(b).merge(c)) == counts(a.merge(b.merge(c)))
    assert a.merge(a) == a
    assert a.merge(b).merge(b) == a.merge(b)
    assert a.merge(PrivacyLedger()) == a == PrivacyLedger().merge(a)


@settings(max_examples=200, deadline=None)
@given(LEDGERS, LEDGERS)
def test_merge_never_shrinks(a, b):
    merged = a.merge(b)
    assert merged.steps >= max(a.steps, b.steps)
    for ledger in (a, b):
        for key, steps in counts(ledger).items():
            assert counts(merged)[key] >= steps


@settings(max_examples=100, deadline=None)
@given(LEDGERS)
def test_json_round_trip(ledger):
    assert PrivacyLedger.from_json(ledger.to_json()) == ledger


def test_a_figure_survives_json_to_the_last_bit():
    release = Release("poisson", 0.1 + 0.2, 3, sampling_rate=1 / 3, batch_size=20000 / 79)
    back = PrivacyLedger.from_json(PrivacyLedger((release,)).to_json()).releases[0]
    assert back == release
    assert back.noise_multiplier.hex() == release.noise_multiplier.hex()


def test_merging_an_old_checkpoint_changes_nothing():
    run = Release("poisson", 1.1, 100, sampling_rate=0.01)
    now = PrivacyLedger((run,))
    assert now.merge(PrivacyLedger((run.with_steps(40),))) == now
    assert PrivacyLedger((run.with_steps(40),)).merge(now) == now


def test_two_runs_of_one_kind_both_count():
    ledgers = [PrivacyLedger((Release("poisson", 1.1, 7, sampling_rate=0.01),)) for _ in "ab"]
    assert ledgers[0].merge(ledgers[1]).steps == 14


def test_an_edited_release_is_kept_beside_the_original():
    run = Release("poisson", 1.1, 100, sampling_rate=0.01, id="x")
    edited = Release("poisson", 9.9, 100, sampling_rate=0.01, id="x")
    assert PrivacyLedger((run,)).merge((edited,)).steps == 200


def test_releases_are_plain_and_frozen():
    release = Release("unknown", 1.0)
    with pytest.raises(AttributeError):
        release.steps = 5
    with pytest.raises(AttributeError):
        PrivacyLedger().releases = (release,)
    assert release.with_steps(5).id == release.id
    assert release.with_steps(5).mechanism == release.mechanism
    assert Release("unknown", 1.0).id != release.id
    assert len(PrivacyLedger([release])) == 1
    assert list(PrivacyLedger([release])) == [release]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("sampler", "bernoulli"), ("sampler", None)]
    + [("noise_multiplier", v) for v in (-1.0, math.nan, math.inf, "1", True, None)]
    + [("steps", v) for v in (-1, 1.5, True, None, "3")]
    + [("sampling_rate", v) for v in (0.0, -0.1, 1.1, math.nan, None, "0.1")],
)
def test_impossible_releases_are_refused(argument, value):
    good = {"sampler": "poisson", "noise_multiplier": 1.0, "steps": 1, "sampling_rate": 0.1}
    with pytest.raises(ValueError, match=f"`{argument}`"):
        Release(**{**good, argument: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_impossible_passes_are_refused(value):
    with pytest.raises(ValueError, match="`steps_per_epoch`"):
        Release("shuffled", 1.0, steps_per_epoch=value)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{", '{"format": 1}', '{"format": 1, "releases": 3}',
             '{"format": 1, "releases": [{"sampler": "unknown"}]}',
             '{"format": 1, "releases": [{"nonsense": 1}]}',
             '{"format": 1, "releases": [3]}',
             '{"format": 1, "releases": [{"sampler": "unknown", "noise_multiplier": NaN}]}'],
)  # fmt: skip
def test_text_that_is_no_ledger_is_a_value_error(text):
    with pytest.raises(ValueError):
        PrivacyLedger.from_json(text)


def test_a_newer_format_says_so():
    text = json.dumps({"format": 99, "releases": []})
    with pytest.raises(ValueError, match="format 99"):
        PrivacyLedger.from_json(text)


def test_json_is_plain_numbers():
    """No class or module names (FACTS H9): nothing in the file is ever imported."""
    ledger = PrivacyLedger((Release("poisson", 1.1, 3, sampling_rate=0.01),))
    data = json.loads(ledger.to_json())
    assert set(data) == {"format", "releases"}
    for value in data["releases"][0].values():
        assert value is None or isinstance(value, (str, int, float, bool))
