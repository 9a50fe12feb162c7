"""Runs that are killed at any moment, and go on as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import assert_same_run, child, events, forkserver, tiny, write_images

from tcm_fast.config import save_config

KILLS = 20


def write_config(folder, steps):
    """A run in which something is being saved most of the time."""
    phase = {"images": 16 * steps}
    made = tiny(
        write_images(folder), edm=phase, ect=phase, tcm=phase, save_every=1, grid_every=1000,
        device="cpu", snapshot_every=10,
    )  # fmt: skip
    save_config(made, folder / "config.json")
    return folder / "config.json"


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, steps=30)


def start(made, config, out):
    process = made.Process(target=child, args=(config, out, config.with_name("output")))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_run_killed_at_random_moments_ends_like_an_unbroken_one(number, config, tmp_path):
    made, chance = forkserver(), random.Random(0)
    whole = start(made, config, tmp_path / "whole")
    begun = time.monotonic()
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "output").read_text()[-2000:]
    span = time.monotonic() - begun
    kills, runs, codes = 0, 0, set()
    while kills < KILLS:
        runs += 1
        out = tmp_path / f"cut-{runs}"
        while True:
            process = start(made, config, out)
            process.join(chance.uniform(0, span / 4))
            if process.exitcode is None and kills < KILLS:
                os.kill(process.pid, number)
                kills += 1
            process.join()
            codes.add(process.exitcode)
            if process.exitcode == 0:
                break
            expected = -number if number == signal.SIGKILL else (75, -number)
            # SIGTERM ends a process that has not begun to train as it ends any other.
            assert process.exitcode in (expected if isinstance(expected, tuple) else (expected,)), (
                tmp_path / "output"
            ).read_text()[-2000:]
        assert_same_run(tmp_path / "whole", out)
        names = [p.name for p in (out / "checkpoints").iterdir()]
        assert not [name for name in names if name.startswith(".tmp-")]
        assert same_snapshots(tmp_path / "whole", out)
    if number == signal.SIGTERM:
        assert 75 in codes


def same_snapshots(one, other):
    files = [sorted((out / "snapshots").iterdir()) for out in (one, other)]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def children(pid):
    """Processes that a process has started."""
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def torchrun(config, out, *options, restarts=0, ranks=2):
    """A command under torchrun, on one machine and a free port."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), "--max-restarts", str(restarts), "-m", "tcm_fast", "train", "--config",
        str(config), "--out", str(out), *options,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """A run of two ranks that nothing interrupts, and its configuration."""
    folder = tmp_path_factory.mktemp("two")
    path = write_config(folder, steps=20)
    run = torchrun(path, folder / "whole", "--resume", "auto")
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output[-3000:]
    return path, folder / "whole"


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_again_and_again(whole_of_two, tmp_path):
    """torchrun starts them anew, and the run goes on by itself."""
    config, whole = whole_of_two
    chance, kills = random.Random(0), 0
    out = tmp_path / "cut"
    process = torchrun(config, out, "--resume", "auto", restarts=50)
    known: set[int] = set()
    while process.poll() is None and kills < 6:
        time.sleep(0.05)
        workers = set(children(process.pid)) - known
        if len(workers) == 2 and (out / "log.jsonl").is_file():
            known |= workers
            time.sleep(chance.uniform(1, 5))
            victim = chance.choice(sorted(workers))
            if process.poll() is None and victim in children(process.pid):
                os.kill(victim, signal.SIGKILL)
                kills += 1
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    assert kills >= 3
    assert_same_run(whole, out)


@pytest.mark.slow
def test_two_ranks_are_stopped_by_a_signal_and_go_on(whole_of_two, tmp_path):
    config, whole = whole_of_two
    process = torchrun(config, tmp_path / "cut")
    log = tmp_path / "cut" / "log.jsonl"
    while not (log.is_file() and any(e["event"] == "train" for e in events(tmp_path / "cut"))):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=900)
    assert "saved (" in output, output[-3000:]
    assert "to go on: tcm-fast train" in output
    process = torchrun(config, tmp_path / "cut", "--resume", "auto")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    assert_same_run(whole, tmp_path / "cut")


FAILING = """
import sys
from tcm_fast.cli import main as cli
from tcm_fast.training.step_runner import StepRunner
step = StepRunner.step
def failing(self, phase, batches):
    if self.workers.rank == 1 and phase.step == 5:
        raise RuntimeError("a fault of rank one's own")
    step(self, phase, batches)
StepRunner.step = failing
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_others(config, tmp_path):
    """At once, in the step that they would share, and its traceback is shown."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), "train", "--config", str(config), "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    output, _ = process.communicate(timeout=900)
    assert process.returncode != 0
    assert "a fault of rank one's own" in output, output[-3000:]
    assert "Traceback" in output
    assert "in failing" in output


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(config, tmp_path):
    made = forkserver()
    first = start(made, config, tmp_path / "run")
    while not (tmp_path / "run" / "log.jsonl").is_file():
        assert first.is_alive()
        time.sleep(0.02)
    done = subprocess.run(
        [sys.executable, "-m", "tcm_fast", "train", "--config", str(config), "--out",
         str(tmp_path / "run"), "--resume", "auto"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"is in use by process {first.pid} on" in done.stderr
    first.kill()
    first.join()


@pytest.mark.slow
def test_the_time_limit_saves_and_says_so(config, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tcm_fast", "train", "--config", str(config), "--out",
         str(tmp_path / "run"), "--stop-after", "1e-9"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "edm: stopped after 16 images, saved (--stop-after 1e-09 hours are over)" in done.stderr
