"""Several processes: the run of one, whatever their number and the micro-batches."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    assert_equal,
    events,
    relative_difference,
    run_ranks,
    tiny,
    train,
    weights,
    write_images,
)

from tcm_fast.checkpoint.format import load_checkpoint
from tcm_fast.checkpoint.run_folder import newest_checkpoint
from tcm_fast.kernels.normalized_copy import normalized_rows

STEPS = 20
PHASE = {
    "images": 16 * STEPS,
    "q": 16.0,
    "stage_iterations": 1000,
    "max_ratio": 0.9375,
    "huber_c": 0.06,
    "lr": 1e-4,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Images, and a stage-1 network to begin from."""
    folder = tmp_path_factory.mktemp("start")
    images = write_images(folder)
    train(tiny(images, phases=["edm", "ect"], grid_every=1000), folder / "run")
    return images, folder / "run"


def config_of(start, **changes):
    """Stage 2, saved after every step."""
    changes = {
        "phases": ["tcm"],
        "tcm": PHASE,
        "log_every": 1,
        "save_every": 1,
        "keep_checkpoints": STEPS,
    } | (changes)
    return tiny(start[0], grid_every=1000, device="cpu", **changes)


@pytest.fixture(scope="module")
def single(start, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    train(config_of(start), out, init=start[1])
    return out


def first_moments(out, step=1):
    """After the first step, the gradient times 1 - beta1."""
    file = out / "checkpoints" / f"tcm-{16 * step:09d}" / "optimizer.safetensors"
    values = load_file(file)
    return torch.cat([v.flatten() for k, v in values.items() if k.endswith("/exp_avg")]).double()


def losses(out):
    return [e["loss"] for e in events(out) if e["event"] == "train"]


def assert_same_training(one, other, steps=STEPS):
    """Loss and gradient of the first step, weights at the end."""
    assert losses(other)[0] == pytest.approx(losses(one)[0], rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(first_moments(one), first_moments(other), dim=0)
    assert cosine >= 1 - 1e-5
    for file in ("model", "ema-0"):
        assert relative_difference(weights(one, file), weights(other, file)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batches"), [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)]
)
def test_ranks_and_micro_batches_do_not_change_the_run(
    ranks, micro_batches, start, single, tmp_path
):
    config = config_of(start, micro_batches=micro_batches)
    run_ranks(ranks, config, tmp_path / "run", start[1])
    assert_same_training(single, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, start, single, tmp_path):
    config = config_of(start)
    for ranks, steps in ((before, 10), (after, None)):
        part = dataclasses.replace(config, max_steps=steps)
        run_ranks(ranks, part, tmp_path / "run", start[1])
    assert_same_training(single, tmp_path / "run")


@pytest.mark.slow
def test_normalised_rows_and_a_learned_variance(start, tmp_path):
    """EDM2, through all phases."""
    network = {
        "name": "edm2", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4], "channels_per_head": 8, "class_conditional": True,
    }  # fmt: skip
    phase = {"images": 16 * 5, "optimizer": "adam", "lr": 1e-3, "dropout": 0.0}
    pairs = phase | {"huber_c": 0.06, "max_ratio": 0.9375, "q": 16.0}
    config = config_of(
        start, network=network, edm=phase | {"learned_variance": True}, ect=pairs, tcm=pairs,
        phases=["edm", "ect", "tcm"], save_every=5,
    )  # fmt: skip
    train(config, tmp_path / "one")
    run_ranks(2, config, tmp_path / "two")
    for name in ("edm", "ect", "tcm"):
        saved = [
            load_checkpoint(tmp_path / out / "checkpoints" / f"{name}-000000080")
            for out in ("one", "two")
        ]
        for file in ("model", "ema-0"):
            one, two = (checkpoint.network_tensors(file) for checkpoint in saved)
            assert one.keys() == two.keys()
            if (
                file == "model"
            ):  # whose rows the one optimizer normalises after a step, the other before
                one, two = forced(one), forced(two)
            assert relative_difference(one, two) <= 1e-5


def forced(tensors):
    return {k: normalized_rows(v) if v.ndim > 1 else v for k, v in tensors.items()}


@pytest.mark.slow
def test_gradients_can_be_exchanged_in_16_bits(start, single, tmp_path):
    config = config_of(start, gradient_dtype="fp16", micro_batches=2)
    run_ranks(2, config, tmp_path / "run", start[1])
    cosine = torch.nn.functional.cosine_similarity(
        first_moments(single), first_moments(tmp_path / "run"), dim=0
    )
    assert 1 - 1e-4 < cosine < 1 - 1e-9
    assert relative_difference(weights(single), weights(tmp_path / "run")) < 1e-3
    said = run_ranks(
        2, config_of(start, gradient_dtype="bf16"), tmp_path / "bf16", start[1], fails=True
    )
    assert "gradient_dtype: bf16 is exchanged between GPUs only" in said


@pytest.mark.slow
def test_samples_and_their_judgement_do_not_depend_on_the_number_of_processes(start, tmp_path):
    config = config_of(start, eval={"features": "random", "num": 700}, max_steps=1)
    reports = []
    for ranks in (1, 2, 3):
        adapted = dataclasses.replace(
            config, tcm=dataclasses.replace(config.tcm, batch_size=12, images=12)
        )
        run_ranks(ranks, adapted, tmp_path / str(ranks), start[1])
        (found,) = [e["frechet"] for e in events(tmp_path / str(ranks)) if e["event"] == "eval"]
        reports.append(found)
    assert reports[0] == pytest.approx(reports[1], rel=1e-4)
    assert reports[0] == pytest.approx(reports[2], rel=1e-4)


@pytest.mark.slow
def test_bad_numbers_on_one_process_are_skipped_by_all(start, tmp_path):
    """And the run of several goes on bit for bit."""
    config = config_of(start, max_steps=6, save_every=6)
    iterations = 6  # of stage 1, on which stage 2 counts on
    fault = f"nan {iterations + 2}"
    run_ranks(2, config, tmp_path / "whole", start[1], fault=fault)
    found = [e for e in events(tmp_path / "whole") if e["event"] == "bad_numbers"]
    assert [e["steps"] for e in found] == [[2]]
    assert "the loss itself, sample" in found[0]["message"]
    for steps in (3, 6):
        part = dataclasses.replace(config, max_steps=steps)
        run_ranks(2, part, tmp_path / "cut", start[1], fault=fault)
    a, b = (load_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("whole", "cut"))
    assert a.state["skips"] == b.state["skips"] == 1
    for file in ("model", "ema-0", "stage1"):
        assert_equal(a.network_tensors(file), b.network_tensors(file))
        assert all(value.isfinite().all() for value in a.network_tensors(file).values())


@pytest.mark.slow
def test_memory_that_does_not_suffice_on_one_process(start, single, tmp_path):
    """At the first step all processes cut their batches smaller together; later the run ends, and goes
    on in smaller pieces."""
    config = config_of(start)
    run_ranks(2, config, tmp_path / "first", start[1], fault="memory 5")
    found = [e for e in events(tmp_path / "first") if e["event"] == "out_of_memory"]
    assert [e["micro_batches"] for e in found] == [2]
    assert_same_training(single, tmp_path / "first")
    said = run_ranks(2, config, tmp_path / "later", start[1], fault="memory 5 from 14", fails=True)
    assert "rank 1 ran out of memory after 128 images" in said
    run_ranks(2, config, tmp_path / "later", start[1], fault="memory 5 from 14")
    assert_same_training(single, tmp_path / "later")


@pytest.mark.slow
def test_commands_share_their_work(start, tmp_path):
    """`sample` and `eval` under torchrun give what they give alone."""
    tables = []
    for ranks in (1, 2):
        many = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), "-m", "--", "tcm_fast",  # torchrun would take --num for its own
        ]  # fmt: skip
        alone = [sys.executable, "-m", "tcm_fast"]
        command = many if ranks > 1 else alone
        out = tmp_path / f"{ranks}.npz"
        for arguments in (
            ["sample", str(start[1]), "--num", "1100", "--out", str(out), "--device", "cpu"],
            ["eval", str(start[1]), "--features", "random", "--num", "600", "--device", "cpu"],
        ):
            done = subprocess.run(
                command + arguments, capture_output=True, text=True, timeout=900,
                env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
        tables.append(done.stdout)
    images = [np.load(tmp_path / f"{ranks}.npz")["images"] for ranks in (1, 2)]
    assert images[0].shape == (1100, 8, 8, 1)
    np.testing.assert_array_equal(*images)
    assert "Fréchet" in tables[0]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_ranks_whose_weights_drift_apart_end_the_run(start, tmp_path):
    """Nothing else would show it: each rank goes on with weights of its own."""
    config = config_of(start, save_every=STEPS)
    said = run_ranks(2, config, tmp_path / "run", start[1], fault="drift 7", fails=True)
    assert "tcm: the ranks' weights differ after step 2, first in " in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# Stands for wandb: notes which rank asks it for what, and can refuse to begin.
STAND_IN = """
import os
from pathlib import Path

NOTES = Path(__file__).with_name("notes.txt")

def note(what):
    with NOTES.open("a") as file:
        file.write(f"{what} {os.environ['RANK']}\\n")

class Run:
    def define_metric(self, name, **options): pass
    def log(self, values): note("log")
    def finish(self): note("finish")

def Settings(**options): pass

def init(**options):
    note("init")
    if options["project"] == "refused":
        raise RuntimeError("no key")
    return Run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("project", ["faces", "refused"])
def test_one_rank_opens_the_logger(project, tmp_path, monkeypatch):
    (stand := tmp_path / "stand").mkdir()
    (stand / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(stand)  # the processes take over the path
    config = tiny(
        write_images(tmp_path), phases=["ect"], ect={"images": 32}, log_every=1, device="cpu",
        log={"to": ["wandb"], "project": project},
    )  # fmt: skip
    is_refused = project == "refused"
    said = run_ranks(2, config, tmp_path / "run", fails=is_refused)
    asked = (stand / "notes.txt").read_text().splitlines()
    assert asked == (["init 0"] if is_refused else ["init 0", "log 0", "log 0", "finish 0"])
    assert ("log.to: wandb cannot begin: no key" in said) == is_refused
