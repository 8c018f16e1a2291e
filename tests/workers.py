"""Several workers of one training on this machine: starting them, and killing them at random.

    python tests/workers.py --kills 20

trains with a backup and a journal, kills one of two workers at a random moment, starts both
again, and compares the ledger with what all that were killed had taken.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

PROGRAM = pathlib.Path(__file__).with_name("worker.py")


def start(count, folder, *arguments):
    """Starts so many workers of one training."""
    with contextlib.ExitStack() as stack:  # ports that are free once all are known
        listening = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        cluster = {"worker": [f"127.0.0.1:{s.getsockname()[1]}" for s in listening]}
    started = []
    for k in range(count):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": k}})
        with open(folder / f"worker{k}.log", "w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", PROGRAM, str(folder), *arguments],
                    env=os.environ | {"TF_CONFIG": config, "TF_CPP_MIN_LOG_LEVEL": "3"},
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def finish(started, folder, seconds=300):
    """What workers returned, and what they printed; kills those that take too long."""
    try:
        codes = [w.wait(seconds) for w in started]
        return codes, [(folder / f"worker{k}.log").read_text() for k in range(len(started))]
    finally:
        for w in started:
            if w.poll() is None:
                w.kill()


def killed_and_resumed(folder, *, kills, seed, within=120):
    """Trains, kills a worker at random and starts anew, so many times; then trains to an end.

    Args:
        folder: For what they write.
        kills: How many times.
        seed: Of the moments, and of who is killed.
        within: After how many seconds the other must have ended.

    Returns:
        What the workers of the last start counted.
    """
    chance, taken = random.Random(seed), 0
    for life in range(kills):
        started = start(2, folder, "resume", "--life", str(life), "--forever")
        deadline = time.monotonic() + 300
        while not (folder / f"taken{life}").exists() and time.monotonic() < deadline:
            assert all(w.poll() is None for w in started), _logs(folder)
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 5))
        chosen = chance.randrange(2)
        started[chosen].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        codes, logs = finish(started, folder)
        assert time.monotonic() - killed < within
        assert codes[chosen] == -signal.SIGKILL
        assert codes[1 - chosen] not in (0, -signal.SIGKILL)
        assert "another worker is gone" in logs[1 - chosen], logs
        _check_nothing_is_forgotten(folder, life, taken)
        taken += int((folder / f"taken{life}").read_text())

    codes, logs = finish(start(2, folder, "resume", "--life", str(kills)), folder)
    assert codes == [0, 0], logs
    _check_nothing_is_forgotten(folder, kills, taken)
    counts = [json.loads((folder / f"count{k}.json").read_text()) for k in range(2)]
    assert counts[0]["after"] == counts[0]["restored"] + counts[0]["steps"]
    return counts


def _check_nothing_is_forgotten(folder, life, taken):
    restored = int((folder / f"restored{life}").read_text())
    assert restored >= taken, (restored, taken)


def _logs(folder):
    return [log.read_text() for log in sorted(folder.glob("worker*.log"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = killed_and_resumed(pathlib.Path(folder), kills=options.kills, seed=options.seed)
    print(f"{options.kills} kills, nothing forgotten: {counts[0]}")
