"""Runs that take seconds: what the trainer's tests share."""

import json
import multiprocessing
import os
import socket
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tcm_fast.checkpoint.format import load_checkpoint
from tcm_fast.checkpoint.run_folder import newest_checkpoint
from tcm_fast.config import Config, from_dict, load_config, save_config
from tcm_fast.objectives.consistency import Consistency
from tcm_fast.objectives.edm import Edm
from tcm_fast.training import trainer
from tcm_fast.training.trainer import Interrupted, Trainer

TINY = {
    "network": {
        "model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4],
    },
    "phases": ["edm", "ect", "tcm"],
    "log_every": 2, "save_every": 3, "grid_every": 4,
}  # fmt: skip
PHASE = {"batch_size": 16, "images": 16 * 6, "dropout": 0.2, "lr": 1e-3, "ema": ["power:6.94"]}
PAIRS = {"stage_iterations": 4, "max_ratio": 0.9, "huber_c": 0.06}


def write_images(folder):
    """A small labelled set in an npz."""
    rng = np.random.default_rng(0)
    path = folder / "images.npz"
    np.savez(path, images=rng.integers(0, 256, (40, 8, 8, 1), np.uint8), labels=np.arange(40) % 3)
    return path


def tiny(images, **changes):
    values = {**TINY, "data": {"source": str(images)}}
    values |= dict.fromkeys(("ect", "tcm", "cd"), PHASE | PAIRS) | {"edm": PHASE}
    values["ict"] = PHASE | {"s1": 20}
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return from_dict(Config, values)


class WorkClock:
    """Stands in for a module's `time`: it goes on by what work is said to take, not by itself."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic
    strftime, time = time.strftime, time.time

    def costs(self, seconds, function):
        """The function, after which it is `seconds(*arguments)` later."""

        def timed(*args, **options):
            result = function(*args, **options)
            self.now += seconds(*args, **options)
            return result

        return timed


def train(config, out, **options):
    return Trainer(config, out, **options).run()


def weights(out, file="model"):
    """The tensors of the newest checkpoint's file."""
    return load_checkpoint(newest_checkpoint(out)).network_tensors(file)


def events(out):
    """The lines of the log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(one, other, files=("model", "ema-0", "stage1", "optimizer")):
    """The newest checkpoints hold the same bits."""
    saved = [load_checkpoint(newest_checkpoint(out)) for out in (one, other)]
    for file in files:
        name = f"{file}.safetensors"
        tensors = [load_file(checkpoint.path / name) for checkpoint in saved]
        assert_equal(*tensors)


def relative_difference(one, other):
    """‖a - b‖ / ‖a‖ over the tensors of two state dicts."""
    difference = sum((one[k].double() - other[k].double()).square().sum() for k in one).sqrt()
    return float(difference / sum(one[k].double().square().sum() for k in one).sqrt())


def forkserver():
    """Processes that have everything imported when they begin."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tcm_fast.training.trainer", "tiny_runs"])
    return context


def change_losses(change, set_attribute=setattr):
    """Put change(objective, batch, its losses' function) in the place of every objective's losses."""
    for kind in (Edm, Consistency):
        own = kind.losses

        def changed(self, batch, own=own):
            return change(self, batch, lambda: own(self, batch))

        set_attribute(kind, "losses", changed)


def break_something(fault, rank):
    """Make a process fail: "nan STEP", "memory SIZE" (that many images are too many to differentiate),
    "memory SIZE from STEP" or "drift STEP" (a weight changes by itself), all on rank 1."""
    words = fault.split()

    def broken(self, batch, losses):
        values, step = losses(), int(batch.key.step)
        if words[0] == "nan" and step == int(words[1]):
            values = values * torch.nan
        if words[0] == "drift" and step == int(words[1]):
            next(self.student.parameters()).data[0] += 1e-3
        starts = int(words[3]) if len(words) > 3 else 0
        is_short = words[0] == "memory" and len(batch.t) >= int(words[1]) and step >= starts
        if is_short and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("injected")
        return values

    if rank == 1:
        change_losses(broken)


def as_on_a_gpu():
    """Go through what only a GPU needs before the first step."""
    trainer.runs_triton = lambda *_: True
    trainer.compiling_together = lambda: nullcontext([])


def child(config, out, output, place=None, init=None, fault=None):
    """A run in a process of its own, resumed where there is something to resume.

    place: rank, number of processes and port, for one of several; fault: see `break_something`."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if place is not None:
        as_on_a_gpu()
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
        os.environ |= dict(zip(names, map(str, place), strict=True)) | {"MASTER_ADDR": "localhost"}
    if fault is not None:
        break_something(fault, place[0])
    try:
        Trainer(load_config(config), Path(out), init=init, resume=True).run()
    except Interrupted:
        sys.exit(75)


def run_ranks(ranks, config, out, init=None, *, fault=None, fails=False):
    """A run of so many processes, and what they said."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path, output = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.txt")
    save_config(config, path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = forkserver()
    processes = [
        context.Process(target=child, args=(path, out, output, (rank, ranks, port), init, fault))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = output.read_text()
    assert any(codes) if fails else not any(codes), said[-3000:]
    return said
