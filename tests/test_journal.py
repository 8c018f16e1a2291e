"""The journal: what was executed counts after a crash, whatever was restored."""

import json
import os
import random
import threading
import types

import keras
import kill_and_resume
import pytest
import tiny

import keras_dp
from keras_dp import callbacks, journal
from keras_dp.journal import Journal
from keras_dp.ledger import LedgerBook, PrivacyLedger, Release

DELTA = tiny.DELTA
RUN = Release("poisson", 1.1, sampling_rate=1 / 8, batch_size=8.0, id="a")
OTHER = Release("unknown", 4.0, id="b")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "privacy.jsonl"


def written(path, *lines):
    """A journal with these lines: ("reserved" or "exact", steps) of one run."""
    writer = Journal(path)
    for kind, steps in lines:
        writer.append(kind, RUN.with_steps(steps))
    return path


def counts(path):
    """Steps by run, and how many problems there are."""
    ledger, problems = journal.read(path)
    return {r.id: r.steps for r in ledger}, len(problems)


# -- which count holds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        ([("reserved", 1)], 1),
        ([("reserved", 1), ("reserved", 9)], 9),
        ([("reserved", 9), ("exact", 5)], 5),
        ([("reserved", 9), ("exact", 5), ("reserved", 7)], 7),
        ([("exact", 5), ("reserved", 9), ("exact", 6)], 6),
        ([("exact", 8), ("reserved", 9), ("exact", 6)], 8),
        ([("exact", 0)], 0),
    ],
)
def test_a_reservation_counts_until_an_exact_count_takes_its_place(path, lines, steps):
    assert counts(written(path, *lines)) == ({"a": steps}, 0)


def test_everything_about_a_run_but_no_seed_travels(path):
    run = Release(
        "shuffled",
        2.5,
        steps=3,
        steps_per_epoch=4,
        num_examples=60,
        batch_size=15.0,
        max_grad_norm=0.5,
        seeded=True,
    )
    Journal(path).append("exact", run)
    assert journal.read(path) == (PrivacyLedger((run,)), [])
    line = json.loads(path.read_text())
    assert set(line) == {"journal", "format", "number", "previous", "kind", "release", "hash"}
    assert line["release"]["seeded"] is True


def test_runs_are_told_apart_by_identity_and_by_how_they_were_made(path):
    writer = Journal(path)
    writer.append("exact", RUN.with_steps(3))
    writer.append("exact", OTHER.with_steps(4))
    writer.append("exact", Release("poisson", 9.0, steps=5, sampling_rate=1 / 8, id="a"))
    ledger, problems = journal.read(path)
    assert [r.steps for r in ledger] == [3, 4, 5]
    assert not problems


def test_a_line_is_on_disk_when_append_returns(path, monkeypatch):
    sizes = []
    sync = os.fsync

    def spy(file):
        sizes.append(path.stat().st_size if os.path.isfile(f"/proc/self/fd/{file}") else "folder")
        sync(file)

    monkeypatch.setattr(os, "fsync", spy)
    written(path, ("reserved", 1))
    assert path.stat().st_size in sizes  # with the whole line in it
    if os.path.isdir("/proc/self/fd"):
        assert "folder" in sizes  # once, so that the new name is there too
    sizes.clear()
    written(path, ("reserved", 2))
    assert sizes == [path.stat().st_size]


def test_writers_at_once_add_up_and_their_lines_do_not_mix(path):
    def write(name):
        writer = Journal(path)
        for steps in range(1, 16):
            writer.append("reserved", Release("unknown", 1.0, steps=steps, id=name))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(path) == (dict.fromkeys("abcd", 15), 0)
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == list(
        range(1, 61)
    )


# -- what is noticed --------------------------------------------------------------------------


def test_a_torn_last_line_is_noticed_wherever_it_is_torn_and_takes_nothing_away(path):
    whole = written(path, ("reserved", 4), ("exact", 3), ("reserved", 8)).read_bytes()
    begin = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for end in [begin, begin + 1, begin + 9, begin + 40, len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:end])
        complete = end >= len(whole) - 1
        torn = begin < end and not complete
        assert counts(path) == ({"a": 8 if complete else 3}, int(torn))
        writer = Journal(path)
        if torn:
            with pytest.warns(keras_dp.PrivacyWarning, match="line 3 can't be read"):
                writer.append("reserved", RUN.with_steps(9))
        else:
            writer.append("reserved", RUN.with_steps(9))
        assert counts(path) == ({"a": 9}, int(torn))
        # Said once: the new line says that it was written knowing of the torn one.
        assert Journal(path).read().steps == 9
        writer.append("exact", RUN.with_steps(9))
        assert counts(path) == ({"a": 9}, int(torn))


def test_a_journal_whose_only_line_is_torn_is_a_journal(path):
    path.write_bytes(written(path, ("reserved", 4)).read_bytes()[:30])
    assert counts(path) == ({}, 1)
    path.write_bytes(b"")
    assert counts(path) == ({}, 0)


@pytest.mark.parametrize("steps", [1, 900])
def test_an_edited_line_is_noticed_and_the_larger_count_wins(path, steps):
    written(path, ("exact", 50), ("exact", 70), ("exact", 60))
    path.write_text(path.read_text().replace('"steps":70', f'"steps":{steps}'))
    ledger, problems = journal.read(path)
    assert ledger.steps == max(steps, 60)
    assert problems == ["line 2 was edited"]


def test_an_edited_exact_count_cancels_no_reservation(path):
    written(path, ("reserved", 50), ("exact", 40))
    path.write_text(path.read_text().replace('"steps":40', '"steps":10'))
    assert counts(path) == ({"a": 50}, 1)


@pytest.mark.parametrize("keep", [(1, 2, 3), (0, 2, 3), (0, 1, 3), (1, 0, 2, 3), (3,)])
def test_lines_that_are_missing_or_moved_are_noticed(path, keep):
    written(path, *(("reserved", steps) for steps in (1, 2, 3, 4)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[k] for k in keep))
    ledger, problems = journal.read(path)
    assert ledger.steps == 4
    assert "lines are missing or were changed" in problems[0]
    with pytest.warns(keras_dp.PrivacyWarning, match="lines are missing"):
        Journal(path).append("exact", RUN.with_steps(5))
    assert Journal(path).read().steps == 5  # said once


def test_a_journal_that_shrinks_under_its_writer_has_a_gap(path):
    writer = Journal(path)
    for steps in (1, 2, 3):
        writer.append("reserved", RUN.with_steps(steps))
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    writer.append("reserved", RUN.with_steps(4))
    assert counts(path) == ({"a": 4}, 1)
    path.unlink()
    writer.append("reserved", RUN.with_steps(5))
    assert counts(path) == ({"a": 5}, 1)


@pytest.mark.parametrize(
    "strange",
    [
        b"hello",
        b"[1, 2]",
        b'{"journal": "keras_dp"}',
        b"\xff\x00" * 9,
        b"[" * 100_000,
        b'{"journal":"keras_dp","format":1,"release":{"id":[]}}',
        b'{"journal":"keras_dp","format":1,"release":7}',
    ],
)
def test_a_strange_line_among_ours_is_noticed_and_skipped(path, strange):
    written(path, ("reserved", 3))
    path.write_bytes(path.read_bytes() + strange + b"\n")
    assert counts(path) == ({"a": 3}, 1)


def test_values_that_no_ledger_can_hold_are_skipped(path):
    text = written(path, ("reserved", 3)).read_text()
    for old, new in [
        ('"steps":3', '"steps":-1'),
        ('"noise_multiplier":1.1', '"noise_multiplier":NaN'),
        ('"batch_size":8.0', '"batch_size":1e999'),
        ('"clipping":"flat"', '"clipping":["flat"]'),
        ('"seeded":false', '"seeded":false,"other":1'),
        ('"number":1', '"number":"1"'),
    ]:
        assert old in text
        path.write_text(text + text.replace(old, new))
        ledger, problems = journal.read(path)
        assert (ledger.steps, len(problems)) == (3, 1), new
        ledger.to_json()


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"x,y\n1,2\n", b'{"format": 1, "releases": []}', b"\x89PNG\r\n\x1a\n\0\0", b"[]\n"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(path, content):
    path.write_bytes(content)
    for use in (
        lambda: journal.read(path),
        lambda: Journal(path).read(),
        lambda: Journal(path).append("exact", RUN),
    ):
        with pytest.raises(ValueError, match=r"`ledger_path` is no privacy journal.*ledger_path="):
            use()
    assert path.read_bytes() == content


def test_a_newer_format_is_refused(path):
    text = written(path, ("exact", 3)).read_text().replace('"format":1', '"format":2')
    path.write_text(text)
    with pytest.raises(ValueError, match=r"has format 2.*Install the keras_dp that wrote it"):
        Journal(path).append("exact", RUN)
    assert path.read_text() == text


def test_a_path_that_can_hold_no_journal_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder of `ledger_path` does not exist.*Make it first"):
        keras_dp.PrivacyBudget(delta=DELTA, ledger_path=tmp_path / "no" / "privacy.jsonl")
    for wrong in ("", 7, b"x"):
        with pytest.raises(ValueError, match="`ledger_path` must be the path of a file"):
            keras_dp.PrivacyBudget(delta=DELTA, ledger_path=wrong)
    with pytest.raises(ValueError, match="there is a folder or a device"):
        Journal(tmp_path).read()
    with pytest.raises(ValueError, match="There is no journal"):
        journal.read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="`kind` must be one of"):
        Journal(tmp_path / "privacy.jsonl").append("perhaps", RUN)


def test_a_journal_that_may_not_be_opened_is_refused_by_name(path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    written(path, ("exact", 3))
    monkeypatch.setattr(os, "open", refuse)
    for use in (Journal(path).read, lambda: Journal(path).append("exact", RUN)):
        with pytest.raises(ValueError, match=r"can't be read and written \(Permission denied\)"):
            use()
    with pytest.raises(ValueError, match=r"can't be read \(Permission denied\)"):
        journal.read(path)


@pytest.mark.parametrize("bytes_written", [None, 20])
def test_a_full_disk_is_an_error_and_what_was_written_stays(path, monkeypatch, bytes_written):
    write = os.write

    def full(file, data):
        if bytes_written is None:
            raise OSError(28, "No space left on device")
        return write(file, data[:bytes_written])

    writer = Journal(path)
    writer.append("reserved", RUN.with_steps(3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(keras_dp.PrivacyError, match=r"can't be written.*Free space"):
            writer.append("reserved", RUN.with_steps(5))
    assert counts(path)[0] == {"a": 3}
    if bytes_written is None:
        writer.append("reserved", RUN.with_steps(5))
    else:
        with pytest.warns(keras_dp.PrivacyWarning, match="line 2 can't be read"):
            writer.append("reserved", RUN.with_steps(5))
    assert counts(path)[0] == {"a": 5}


# -- how far ahead ----------------------------------------------------------------------------


class Clockwork:
    """An optimizer without TensorFlow: its steps take as long as they are said to."""

    def __init__(self, monkeypatch, path, seconds):
        self.now, self.steps, self.seconds = 0.0, 0, seconds
        self._book = LedgerBook(lambda: self.steps)
        self._book.open(RUN)
        monkeypatch.setattr(callbacks, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        self.reservations = callbacks._Reservations(path)
        self.lines = []
        monkeypatch.setattr(
            self.reservations._journal, "append", lambda kind, r: self.lines.append(r.steps)
        )

    @property
    def releases(self):
        return self.steps

    @property
    def ledger(self):
        return self._book.ledger

    @property
    def meter(self):
        return self

    def runs_after(self, further):
        return self._book.runs_after(further)

    @property
    def own_runs(self):
        return self._book.own_runs

    def train(self, batches, at_once=1):
        for _ in range(batches):
            self.reservations.reserve(self, at_once)
            self.steps += at_once
            self.now += at_once * self.seconds
            assert self.lines[-1] >= self.steps


def test_reservations_grow_to_a_second_of_steps_and_no_further(monkeypatch, path):
    quick = Clockwork(monkeypatch, path, seconds=0.01)
    quick.train(2000)
    assert quick.lines[:5] == [1, 3, 7, 15, 31]
    ahead = [b - a for a, b in zip(quick.lines, quick.lines[1:], strict=False)]
    assert 99 <= max(ahead) <= 101
    assert len(quick.lines) == pytest.approx(20 + 7, abs=3)


def test_reservations_are_bounded_for_the_quickest_steps(monkeypatch, path):
    quickest = Clockwork(monkeypatch, path, seconds=1e-5)
    quickest.train(20_000)
    assert max(b - a for a, b in zip(quickest.lines, quickest.lines[1:], strict=False)) == 1000


def test_slow_steps_are_reserved_one_by_one(monkeypatch, path):
    slow = Clockwork(monkeypatch, path, seconds=2.0)
    slow.train(1500)
    assert slow.lines == list(range(1, 1501))


def test_all_the_steps_of_an_execution_are_reserved_at_once(monkeypatch, path):
    slow = Clockwork(monkeypatch, path, seconds=2.0)
    slow.train(5, at_once=7)
    assert slow.lines == [7, 14, 21, 28, 35]


def test_never_more_is_reserved_than_the_budget_allows(monkeypatch, path):
    capped = Clockwork(monkeypatch, path, seconds=0.01)
    capped.reservations.cap(capped, 20)
    capped.train(20)
    assert max(capped.lines) == 20


# -- training ---------------------------------------------------------------------------------


class Stop(keras.callbacks.Callback):
    """Ends a fit as a crash would: without `on_train_end`."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.releases == self.after:
            raise KeyboardInterrupt


class Watch(keras.callbacks.Callback):
    """What the ledger and the journal say while training."""

    def __init__(self, path):
        super().__init__()
        self.path, self.start, self.before, self.after = path, None, [], []

    def on_epoch_begin(self, epoch, logs=None):
        if self.start is None:
            self.start = self.model.optimizer.ledger.steps

    def on_train_batch_begin(self, batch, logs=None):
        self.before.append((self.model.optimizer.releases, journal.read(self.path)[0].steps))

    def on_train_batch_end(self, batch, logs=None):
        self.after.append((self.model.optimizer.releases, journal.read(self.path)[0].steps))


def budget(path, epsilon=None):
    """By the quicker accountant where nothing hangs on epsilon."""
    accountant = "rdp" if epsilon is None else "pld"
    return keras_dp.PrivacyBudget(
        epsilon, delta=DELTA, verbose=0, ledger_path=path, accountant=accountant
    )


def fit(model, *callbacks_, epochs=2, batch_size=8):
    watch = next((c for c in callbacks_ if isinstance(c, Watch)), None)
    x, y = tiny.data()
    model.fit(x, y, batch_size=batch_size, epochs=epochs, callbacks=list(callbacks_), verbose=0)
    return watch


def crash(model, *callbacks_, after):
    with pytest.raises(KeyboardInterrupt):
        fit(model, *callbacks_, Stop(after), epochs=10)
    assert model.optimizer.releases == after


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.one_in(2)
def test_every_step_is_written_down_before_it_runs(path, at_once):
    model = tiny.compiled(steps_per_execution=at_once)
    watch = fit(model, budget(path), Watch(path), epochs=2)
    assert len(watch.before) == 16 // at_once
    assert all(steps + at_once <= known for steps, known in watch.before)
    assert all(steps <= known for steps, known in watch.after)
    assert model.optimizer.ledger.steps == 16
    assert journal.read(path) == (model.optimizer.ledger, [])


def test_lost_steps_count_when_nothing_is_restored_and_the_budget_stops_accordingly(path):
    allowed = keras_dp.accounting.calibrate_steps(
        target_epsilon=2.0, delta=DELTA, num_examples=64, batch_size=8, noise_multiplier=2.0
    )

    def made():
        return tiny.compiled(tiny.sgd(noise_multiplier=2.0))

    crash(made(), budget(path, 2.0), after=6)
    reserved = journal.read(path)[0].steps
    assert 6 <= reserved <= 12

    again = made()
    watch = fit(again, budget(path, 2.0), Watch(path), epochs=50)
    assert watch.start == reserved
    assert again.optimizer.ledger.steps == allowed  # of the same kind, so the same number
    assert again.optimizer.releases == allowed - reserved
    assert again.optimizer.get_epsilon(DELTA) <= 2.0
    assert max(known for _, known in watch.before) == allowed
    with pytest.raises(keras_dp.PrivacyBudgetExceeded, match="No step was taken"):
        fit(made(), budget(path, 2.0))


@pytest.mark.parametrize("order", ["backup first", "budget first"])
@pytest.mark.one_in(2)
def test_lost_steps_count_once_beside_a_restored_backup(path, tmp_path, order):
    def both(*more):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"), save_freq=5)
        pair = [backup, budget(path)]
        return [*(pair if order == "backup first" else reversed(pair)), *more]

    crash(tiny.compiled(), *both(), after=7)
    reserved = journal.read(path)[0].steps
    assert 7 <= reserved <= 14
    again = tiny.compiled()
    watch = fit(again, *both(Watch(path)), epochs=1)
    assert int(again.optimizer.iterations) == 5 + again.optimizer.releases
    assert watch.start == reserved
    assert again.optimizer.ledger.steps == reserved + again.optimizer.releases
    assert journal.read(path) == (again.optimizer.ledger, [])


def test_after_an_interruption_in_the_same_process_the_count_is_exact(path):
    model = tiny.compiled()
    crash(model, budget(path), after=5)
    assert journal.read(path)[0].steps >= 5
    watch = fit(model, budget(path), Watch(path), epochs=1)
    assert watch.start == 5
    assert model.optimizer.ledger.steps == model.optimizer.releases == 13
    assert journal.read(path) == (model.optimizer.ledger, [])


@pytest.mark.thorough
def test_a_target_counts_lost_steps_too(path):
    crash(tiny.compiled(tiny.sgd(noise_multiplier=3.0)), budget(path), after=6)
    aimed = tiny.sgd(noise_multiplier=None, target_epsilon=2.0, target_delta=DELTA)
    model = tiny.compiled(aimed)
    fit(model, budget(path))
    assert len(model.optimizer.ledger) == 2
    assert 0.98 * 2.0 < model.optimizer.get_epsilon(DELTA) <= 2.0


@pytest.mark.filterwarnings("ignore:train_on_batch can't know")
@pytest.mark.thorough
def test_steps_outside_of_such_a_fit_are_written_down_at_the_next_one(path):
    model = tiny.compiled()
    fit(model, epochs=1)
    fit(model, budget(path), epochs=1)
    for _ in range(2):
        model.train_on_batch(*tiny.data())
        fit(model, budget(path), epochs=1)
    assert model.optimizer.ledger.steps == 8 * 4 + 2
    assert set(journal.read(path)[0]) == set(model.optimizer.ledger)


def test_a_journal_that_lost_lines_is_noticed_by_what_a_checkpoint_knows(path, tmp_path):
    first = tiny.compiled()
    fit(first, budget(path))
    first.save_weights(tmp_path / "m.weights.h5")
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    model = tiny.compiled()
    model.load_weights(tmp_path / "m.weights.h5")
    with pytest.warns(keras_dp.PrivacyWarning, match="it has 1 steps of a run.* has 16"):
        fit(model, budget(path), epochs=1)
    assert model.optimizer.ledger.steps == 24
    assert set(journal.read(path)[0]) == set(model.optimizer.ledger)


def test_no_step_runs_that_can_not_be_written_down(path, monkeypatch):
    model = tiny.compiled()
    before = tiny.weights_of(model)
    path.write_text("a diary, of which nothing may be lost\n")
    with pytest.raises(ValueError, match="no privacy journal"):
        fit(model, budget(path))
    assert path.read_text() == "a diary, of which nothing may be lost\n"
    assert model.optimizer.releases == 0
    assert tiny.same(model.get_weights(), before)
    path.unlink()

    write = os.write

    def full(file, data):
        if b'"reserved"' in data and b'"number":3' in data:
            raise OSError(28, "No space left on device")
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(keras_dp.PrivacyError, match="training stops here"):
            fit(model, budget(path))
    assert model.optimizer.releases == journal.read(path)[0].steps > 0
    fit(model, budget(path), epochs=1)
    assert journal.read(path) == (model.optimizer.ledger, [])


def test_a_count_that_can_not_be_written_at_the_end_loses_nothing(path, monkeypatch):
    write = os.write

    def full(file, data):
        if b'"exact"' in data:
            raise OSError(28, "No space left on device")
        return write(file, data)

    model = tiny.compiled()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.warns(keras_dp.PrivacyWarning, match="counts as a whole"):
            fit(model, budget(path), epochs=1)
    assert model.optimizer.ledger.steps == 8
    assert journal.read(path)[0].steps >= 8


# -- kill -9 ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each kill would cost a start of TensorFlow")
@pytest.mark.parametrize(
    ("kills", "journal"),
    [
        (1, True),
        pytest.param(3, True, marks=[pytest.mark.thorough]),
        pytest.param(1, False, marks=[pytest.mark.thorough]),
    ],
)
def test_rule_06_after_kill_minus_nine_no_executed_step_is_forgotten(kills, journal):
    lives = kill_and_resume.Lives()
    seed = random.SystemRandom().randrange(10**6)
    try:
        found = kill_and_resume.chain(lives, kills, "backup", journal, seed)
        assert lives.forks
    finally:
        lives.close()
    assert found.kills == kills and found.forgotten == [], seed
    if journal:
        assert found.counted >= found.began - 20 > 0  # the last life takes 20
