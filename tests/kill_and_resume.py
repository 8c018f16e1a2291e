"""Kills private training again and again, and checks that no step is forgotten.

    python tests/kill_and_resume.py [--kills 200] [--seed 0] [--checkpoint backup|model|none]
                                    [--journal both|yes|no] [--jobs 1]

A process trains a tiny model, restores what its last one left (`BackupAndRestore`,
a `ModelCheckpoint`, or nothing), and is killed with SIGKILL at a random moment
after training has begun. Every process writes into a file of its own, apart from
keras_dp, which steps began and which are over. So does, when it starts, what its
ledger says after restoring. Then must hold:

- with `ledger_path`: the ledger has at least every step that any process began;
- without: it has at least every step that the restored weights have learned from
  (the count of updates that Keras saves with them).

Each is compared in steps and in epsilon. Half of the kills are made with a
journal, half without, unless `--journal` says otherwise. The exit status is 1 if
any step was forgotten.

A kill costs two seconds or so: one process imports TensorFlow, and forks for each life
before it has used it, while it has a single thread (the fork is a whole process,
and the kill a real one). Where that is not so, each life is a process from scratch.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

DELTA = 1e-5
Q = 1 / 8
SIGMA = 4.0
TORN = 3  # exit status: the checkpoint was torn by the kill, so that Keras can't read it
SAVE_EVERY = 7
PATIENCE = 180.0


# -- the life that is killed ------------------------------------------------------------------


def live(folder: pathlib.Path, life: int, checkpoint: str, journal: bool, steps: int) -> None:
    """Restores, trains, and writes down what it does, until it is killed or took `steps` steps."""
    import keras
    import numpy as np

    import keras_dp

    log = os.open(folder / f"life{life}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**what: object) -> None:
        os.write(log, json.dumps(what).encode() + b"\n")

    class Recorder(keras.callbacks.Callback):
        """Comes after PrivacyBudget: a step that it sees begin was reserved before."""

        def __init__(self) -> None:
            super().__init__()
            self.started = False

        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            if not self.started:
                self.started = True
                optimizer = self.model.optimizer
                note(ledger=optimizer.ledger.to_json(), learned=int(optimizer.iterations))

        def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
            note(began=1)

        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            releases = self.model.optimizer.releases
            note(over=releases)
            if releases == steps:
                self.model.stop_training = True

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = keras_dp.DPSGD(
        0.01, max_grad_norm=1.0, noise_multiplier=SIGMA, gradients="vectorized"
    )
    model.compile(optimizer, loss="mse")
    path = folder / "privacy.jsonl" if journal else None
    budget = keras_dp.PrivacyBudget(delta=DELTA, accountant="rdp", ledger_path=path)
    callbacks = [budget]
    recorder = Recorder()
    try:
        if checkpoint == "backup":
            backup = keras.callbacks.BackupAndRestore(
                str(folder / "saved"), save_freq=SAVE_EVERY, double_checkpoint=True
            )
            # Keras' own restoring comes before PrivacyBudget's in every other life.
            callbacks.insert(life % 2, backup)
        elif checkpoint == "model":
            (folder / "saved").mkdir(exist_ok=True)
            file = folder / "saved" / "model.weights.h5"
            if file.exists():
                optimizer.build(model.trainable_variables)
                model.load_weights(file)
            callbacks.append(
                keras.callbacks.ModelCheckpoint(
                    str(file), save_weights_only=True, save_freq=SAVE_EVERY
                )
            )
        x, y = np.ones((16, 2), "float32"), np.ones((16, 1), "float32")
        model.fit(x, y, batch_size=2, epochs=10**6, callbacks=[*callbacks, recorder], verbose=0)
    except Exception as error:
        note(error=repr(error))
        os._exit(1 if recorder.started else TORN)
    os._exit(0)


def serve() -> None:
    """Imports once, then starts a life for each line that comes in, and tells its process id."""
    import keras_dp

    keras_dp.accounting.compute_epsilon(  # imports the accountant, for every fork
        num_examples=2, batch_size=1, noise_multiplier=1.0, steps=1, delta=DELTA, accountant="rdp"
    )
    print("ready" if _may_fork() else "threads", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            folder = pathlib.Path(order.pop("folder"))
            live(folder, **order)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _may_fork() -> bool:
    """Whether there is one thread; that of jemalloc, pandas' allocator, makes ready for forks."""
    tasks = pathlib.Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.glob("*")]
    return len(names) - names.count("jemalloc_bg_thd") == 1


class Lives:
    """Starts lives: forks of one process where that is safe."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        if hasattr(os, "fork"):
            self._server = self._python("serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._server.stdout is not None
            if self._server.stdout.readline().strip() != "ready":
                self.close()

    def _python(self, *arguments: str, **streams: object) -> subprocess.Popen[str]:
        command = [sys.executable, os.path.abspath(__file__), *arguments]
        kwargs = {"stderr": subprocess.DEVNULL, **streams}
        return subprocess.Popen(command, env=self._environment, text=True, **kwargs)

    @property
    def forks(self) -> bool:
        """Whether lives are forks."""
        return self._server is not None

    def close(self) -> None:
        """Ends the process that forks."""
        if self._server is not None:
            self._server.kill()
            for stream in (self._server.stdin, self._server.stdout):
                stream.close()
            self._server.wait()
            self._server = None

    def run(self, log: pathlib.Path, kill_after: float | None, seen: int, **order: object) -> int:
        """One life. Kills it so many seconds after training began and `seen` steps were over.

        Returns:
            Its exit status.
        """
        process = None
        if self._server is not None:
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
            pid = int(self._server.stdout.readline())
        else:
            process = self._python("live", json.dumps(order))
            pid = process.pid
        if kill_after is not None and self._begun(log, seen, pid, process):
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process is not None:
            return process.wait()
        return int(self._server.stdout.readline())

    def _begun(
        self, log: pathlib.Path, steps: int, pid: int, process: subprocess.Popen[str] | None
    ) -> bool:
        """Waits for a life to train; false if it ended before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if log.exists():
                text = log.read_text()
                if text.count('"over"') >= steps and '"began"' in text:
                    return True
            if process is not None and process.poll() is not None:
                return False
            try:
                os.kill(pid, 0)
            except ProcessLookupError:  # it ended, and the process that forks has noticed
                return False
            time.sleep(0.005)
        raise TimeoutError(f"No step began within {PATIENCE:g} s: {log}")


# -- the checks -------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What a chain of lives showed."""

    checkpoint: str
    journal: bool
    kills: int = 0
    torn: int = 0  # checkpoints that Keras couldn't read after the kill
    began: int = 0  # steps, over all lives
    over: int = 0
    must: int = 0  # steps that must count when the last life starts
    counted: int = 0  # steps, in its ledger then
    lost: int = 0  # steps that no checkpoint knew of
    ahead: int = 0  # steps that kills left reserved and not begun
    most_ahead: int = 0  # by a single kill
    epsilon_executed: float = 0.0
    epsilon_counted: float = 0.0
    forgotten: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"checkpoint={self.checkpoint}, journal={'yes' if self.journal else 'no'}: "
            f"{self.kills} kills, {self.began} steps begun, {self.over} seen to end, "
            f"at the last start {self.counted} in the ledger (epsilon "
            f"{self.epsilon_counted:.4f}), {self.must} must count (epsilon "
            f"{self.epsilon_executed:.4f}), {self.lost} of those begun are not in the restored "
            f"weights, {self.ahead} were reserved in vain, at most {self.most_ahead} by one kill, "
            f"{self.torn} checkpoints torn; forgotten: {self.forgotten or 'none'}"
        )


def run(
    folder: pathlib.Path, *, kills: int, checkpoint: str, journal: bool, seed: int, lives: Lives
) -> Result:
    """A chain of lives on one journal and one checkpoint, all killed but the last."""
    random_ = random.Random(f"{seed} {checkpoint} {journal}")
    result = Result(checkpoint, journal)
    life = 0
    folder.mkdir(parents=True)
    while True:
        last = result.kills == kills
        log = folder / f"life{life}.log"
        # A quarter comes in the first step, which takes longest; half of them early, while
        # blocks are still of a step or two.
        after = random_.choice([random_.uniform(0, 0.05), random_.uniform(0, 0.6)])
        order = {"checkpoint": checkpoint, "journal": journal, "steps": 20 if last else -1}
        seen = random_.choice([0, 1, 1, 10])
        status = lives.run(
            log, None if last else after, seen, folder=str(folder), life=life, **order
        )
        life += 1
        notes = _notes(log)
        start = next((n for n in notes if "ledger" in n), None)
        if status == TORN and start is None and checkpoint != "none" and life <= 3 * kills + 3:
            result.torn += 1
            shutil.rmtree(folder / "saved", ignore_errors=True)
            continue
        if start is None or status != (0 if last else -signal.SIGKILL):
            raise RuntimeError(f"Life {life - 1} ended with status {status}: {notes[-1:]}")
        _check(result, start, life - 1)
        result.began += sum("began" in note for note in notes)
        result.over += max((note["over"] for note in notes if "over" in note), default=0)
        if last:
            if journal:
                _check_journal(result, folder / "privacy.jsonl")
            return result
        result.kills += 1


def _notes(log: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if "}\n" in line]


def _check(result: Result, start: dict, life: int) -> None:
    """Compares what a life starts with, after restoring, and what was executed before it."""
    from keras_dp.accounting import compute_epsilon, ledger_epsilon
    from keras_dp.ledger import PrivacyLedger

    ledger, learned = PrivacyLedger.from_json(start["ledger"]), start["learned"]
    must = max(result.began if result.journal else 0, learned)
    result.must, result.counted = must, ledger.steps
    result.lost = result.began - learned
    result.most_ahead = max(result.most_ahead, ledger.steps - must - result.ahead)
    result.ahead = ledger.steps - must
    executed = compute_epsilon(
        num_examples=16,
        batch_size=2,
        noise_multiplier=SIGMA,
        steps=must,
        delta=DELTA,
        accountant="rdp",
    )
    counted = ledger_epsilon(ledger, DELTA, "rdp")
    result.epsilon_executed, result.epsilon_counted = executed, counted
    if ledger.steps < must or counted < executed:
        result.forgotten.append(
            f"life {life}: {ledger.steps} steps (epsilon {counted:.6f}) of {must} ({executed:.6f})"
        )


def _check_journal(result: Result, path: pathlib.Path) -> None:
    """After a clean end the journal has every step, and no line of it is torn."""
    from keras_dp import journal

    ledger, problems = journal.read(path)
    if ledger.steps != result.began + result.ahead or problems:
        result.forgotten.append(
            f"journal: {ledger.steps} steps, not {result.began} begun and {result.ahead} reserved "
            f"in vain; {problems}"
        )


# -- many of them -----------------------------------------------------------------------------


def chain(lives: Lives, kills: int, checkpoint: str, journal: bool, seed: int) -> Result:
    """One chain in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return run(
            pathlib.Path(folder) / "run",
            kills=kills,
            checkpoint=checkpoint,
            journal=journal,
            seed=seed,
            lives=lives,
        )


def main() -> int:
    """Runs chains of at most 50 kills, `--jobs` at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", choices=["backup", "model", "none"], default="backup")
    parser.add_argument("--journal", choices=["both", "yes", "no"], default="both")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    journals = {"both": [True, False], "yes": [True], "no": [False]}[options.journal]
    share = -(-options.kills // len(journals))
    chains = [
        (min(50, share - done), options.checkpoint, journal, options.seed + done)
        for done in range(0, share, 50)
        for journal in journals
    ]
    free: queue.SimpleQueue[Lives] = queue.SimpleQueue()
    for _ in range(options.jobs):
        free.put(Lives())

    def work(arguments: tuple[int, str, bool, int]) -> Result:
        lives = free.get()
        try:
            return chain(lives, *arguments)
        finally:
            free.put(lives)

    results = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(work, chains):
            print(result, flush=True)
            results.append(result)
    while not free.empty():
        free.get().close()
    forgotten = sum(len(result.forgotten) for result in results)
    print(f"{sum(r.kills for r in results)} kills; forgotten: {forgotten or 'none'}")
    return 1 if forgotten else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve()
    elif sys.argv[1:2] == ["live"]:
        given = json.loads(sys.argv[2])
        live(pathlib.Path(given.pop("folder")), **given)
    else:
        sys.exit(main())
