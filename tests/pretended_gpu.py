"""Training and sampling on a pretended GPU: a stand-in for CUDA's libraries on which a CUDA build of torch
runs the host's side (launches, copies, streams, captures, memory) and no arithmetic. Values mean nothing
there; what CUDA refuses is refused, and out of memory is out of memory.

    START PYTHON tests/pretended_gpu.py [--only PATTERN] [--list] [--json FILE]

START is what starts a program on one, `run.sh` of a folder with `fakegpu.py`; PYTHON has a CUDA build of
torch and this project. Prints a line a case, and ends with 1 where one failed."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foreign_networks import FAMILIES

import tcm_fast
from tcm_fast.checkpoint import async_writer
from tcm_fast.cli import main as cli
from tcm_fast.config import Config, from_dict, to_dict
from tcm_fast.drop_in.accelerate import accelerate
from tcm_fast.evaluation import metrics
from tcm_fast.objectives.manifold import FeatureNetwork, contents_of
from tcm_fast.planning.cards import CARDS
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.planning.memory_planner import plan_run
from tcm_fast.runtime.atomic import write_tensors
from tcm_fast.training import step_reports
from tcm_fast.training.trainer import Interrupted, Trainer

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "bf16x3")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"micro_batches": 2},
    "offload": {"offload": True},
    "recomputing": {"recompute_norms": True, "recompute_blocks": 8},
    "deterministic": {"deterministic": True},
    "8-bit moments": {"moments": "8bit"},
    "several EMAs": {"ema": ["power:16.97", "constant:0.999", "halflife:1000"]},
}
NARROW = {"model_channels": 32, "num_blocks": 1}
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "digits": (8, {}),
    "cifar10-tiny": (16, {}),
    "cifar10": (32, NARROW),
    "imagenet64-s": (64, NARROW | {"model_channels": 64}),
}


def configured(
    folder: Path,
    preset: str = "digits",
    *,
    size: int = 8,
    network: dict[str, Any] | None = None,
    phases: tuple[str, ...] = ("edm", "ect", "tcm"),
    steps: int = 60,
    batch: int = 16,
    of_phase: dict[str, Any] | None = None,
    **settings: Any,
) -> Config:
    """A run on random images that lie in `folder`, with phases of so many steps."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, size, size, 3), np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(256) % 10)
    values = to_dict(tcm_fast.load_preset(preset))
    for phase in phases:
        own = {name: value for name, value in (of_phase or {}).items() if name in values[phase]}
        values[phase] |= {"batch_size": batch, "images": batch * steps, **own}
        if (
            "stage_iterations" in values[phase]
        ):  # ratio stages, and with them kinds of batches, change
            values[phase]["stage_iterations"] = max(1, steps // 6)
    values["network"] |= network or {}
    values["data"] |= {"source": str(folder / "images.npz"), "resolution": None}
    values["eval"] |= {"features": "", **settings.pop("eval", {})}
    values |= {
        "phases": phases,
        "device": "cuda",
        "keep_best": "",
        "max_steps": None,
        "memory": "manual",
    }
    values |= {"log_every": 10, "save_every": 25, "grid_every": 30, **settings}
    return from_dict(Config, values)


def warnings(run: Path) -> list[str]:
    """What a run's log warns of, but for what values alone bring about: they mean nothing here."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    of_values = ("spike", "collapse", "bad_numbers")
    return [e["event"] for e in lines if "message" in e and e["event"] not in of_values]


def train(folder: Path, **settings: Any) -> str:
    """A run that ends well, without a warning."""
    peak = trained(Trainer(configured(folder, **settings), folder / "run"))
    warned = warnings(folder / "run")
    assert not warned, warned
    return f"peak {peak >> 20} MiB"


def train_by_features(folder: Path, **settings: Any) -> str:
    """With distances in the features of a network."""
    net = FeatureNetwork(resolution=8, channels=3, width=4, strengths=15)
    file = folder / "features.safetensors"
    write_tensors(file, *contents_of(net, {}))
    of_phase = {"distance": "manifold", "features": str(file)}
    return train(folder, phases=("edm", "cmt", "ect", "tcm"), of_phase=of_phase, **settings)


def trained(trainer: Trainer, count: Callable[[], int] = torch.cuda.max_memory_allocated) -> int:
    """The most bytes that a step's tensors take in a whole run, or that the allocator keeps."""
    step, peaks = trainer.step, [0]

    def watched(*args: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        step(*args)
        peaks.append(count())

    trainer.step = watched  # type: ignore[method-assign]
    trainer.run()
    return max(peaks)


def beside_plan(folder: Path, phases: tuple[str, ...], **settings: Any) -> str:
    """What the allocator keeps through all steps of a run, captures included, beside its plan."""
    config = configured(folder, phases=phases, **settings)
    classes = 10 if config.network.class_conditional else 0
    shape = ImageShape(settings["size"], 3, classes, 256)
    trainer = Trainer(config, folder / "run")
    planned = plan_run(trainer.config, shape, CARDS["h200"]).peak
    reserved = trained(trainer, torch.cuda.max_memory_reserved)
    told = f"reserved {reserved >> 20} MiB, planned {planned >> 20}"
    assert 0.9 * planned <= reserved <= 1.1 * planned, told
    return told


def stop_and_resume(folder: Path) -> str:
    config = configured(folder, phases=("ect", "tcm"), steps=40)
    trainer = Trainer(config, folder / "run")
    trained, step = 0, trainer.step

    def interrupted(*args: Any) -> None:
        nonlocal trained
        step(*args)
        trained += 1
        if trained == 50:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.step = interrupted  # type: ignore[method-assign]
    try:
        trainer.run()
    except Interrupted:
        Trainer(config, folder / "run", resume=True).run()
        return f"stopped after {trained} steps, resumed, ended"
    raise AssertionError("the run was not stopped")


def evaluate(folder: Path) -> str:
    """Grids and distances while a run goes, then the commands that look at it; values that the host goes on
    with are made up."""
    config = configured(
        folder, phases=("ect", "tcm"), steps=12, eval={"features": "random", "num": 64}
    )
    checked, nearest = metrics._checked, metrics.nearest_distances
    rng = np.random.default_rng(0)
    metrics._checked = lambda *sets: [rng.random(features.shape) for features in sets[:2]]
    metrics.nearest_distances = lambda queries, *_, num=2, **__: np.ones((len(queries), num))
    try:
        Trainer(config, folder / "run").run()
        common = [str(folder / "run"), "--device", "cuda"]
        for arguments in (
            ["eval", *common, "--features", "random", "--num", "64"],
            ["eval", *common, "--features", "random", "--denoising"],
            ["sample", *common, "--num", "9", "--steps", "2", "--out", str(folder / "grid.png")],
        ):
            status: Any = 0
            try:
                cli.main(arguments)
            except SystemExit as end:
                status = end.code
            assert not status, f"{arguments[0]} ended with {status}"
    finally:
        metrics._checked, metrics.nearest_distances = checked, nearest
    return "grids, distances, eval, sample"


def draw(folder: Path, name: str, precision: str) -> str:
    """Several numbers of images and steps, each often enough to be captured."""
    options = {"attn_resolutions": [8], "model_channels": 32, "num_blocks": 1}
    net = tcm_fast.build_network(
        name, img_resolution=16, img_channels=3, label_dim=10, channel_mult=[1, 2], **options
    )
    net = net.to("cuda")
    drawn = 0
    for steps, batch in itertools.product((1, 2, 18), (1, 5, 32)):
        kept = tcm_fast.sample(
            net, 5 * batch, steps=steps, batch_size=batch, labels=3, precision=precision,
            times=None if steps < 3 else list(np.geomspace(70, 0.1, steps - 1)),
        )  # fmt: skip
        drawn += len(kept)
    return f"{drawn} images"


def run_out(folder: Path, share: float, where: str) -> str:
    """Memory for a share of what a run takes, from the first step, a capture or a picture on."""
    settings: dict[str, Any] = {"preset": "cifar10", "size": 32, "batch": 256, "phases": ("ect",)}
    settings |= {"steps": 12, "network": {"model_channels": 64, "num_blocks": 2}, "grid_every": 6}
    peak = trained(Trainer(configured(folder, **settings), folder / "free"))
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    config = configured(folder, **settings)
    trainer = Trainer(config, folder / "run")

    def limit() -> None:
        torch.cuda.set_per_process_memory_fraction(share * peak / total)

    if where == "the first step":
        limit()
    else:
        owner, name = (trainer.runner, "step") if where == "a capture" else (trainer, "_log_step")
        inner, calls = getattr(owner, name), itertools.count()

        def limited(*args: Any) -> None:
            if next(calls) == 2:
                torch.cuda.empty_cache()
                limit()
            inner(*args)

        setattr(owner, name, limited)
    try:
        trainer.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    warned = warnings(folder / "run")
    # What a failed attempt held is free again: the batch is cut as often as it has to be.
    assert warned.count("out_of_memory") <= math.ceil(math.log2(1 / share)) + (share <= 0.5), warned
    return f"peak {peak >> 20} MiB, {share:.0%} of it: {', '.join(warned) or 'no warning'}"


def replace(net: torch.nn.Module, precision: str, *inputs: torch.Tensor) -> str:
    """Someone else's network with our operations: forward and backward, in fp32, 16 bits or autocast."""
    report = accelerate(net)
    x = inputs[0].contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
        out = net(x, *inputs[1:])
    out = getattr(out, "sample", out)
    out.float().square().mean().backward()
    return f"{len(report.replaced)} modules replaced"


def replace_family(folder: Path, family: str, precision: str) -> str:
    make, channels = FAMILIES[family]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    net = make().to("cuda", dtype, memory_format=torch.channels_last)
    x, emb = (
        torch.zeros(shape, device="cuda", dtype=dtype) for shape in ((3, channels, 8, 8), (3, 8))
    )
    return replace(net, precision, x, emb)


def replace_diffusers(folder: Path, precision: str) -> str:
    unet = importlib.import_module("diffusers").UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet = unet.to("cuda", memory_format=torch.channels_last)
    return replace(
        unet, precision, torch.zeros(4, 3, 16, 16, device="cuda"), torch.ones(4, device="cuda")
    )


def cases() -> dict[str, Callable[[Path], str]]:
    found: dict[str, Callable[[Path], str]] = {}
    for (preset, (size, network)), precision, (option, changes), graph in itertools.product(
        PRESETS.items(), PRECISIONS, OPTIONS.items(), ("auto", "off")
    ):
        own = {k: v for k, v in changes.items() if k != "ema"}
        of_phase = {k: v for k, v in changes.items() if k == "ema"}
        found[f"train {preset} {precision} {option} graph={graph}"] = partial(
            train, preset=preset, size=size, network=network, precision=precision,
            cuda_graph=graph, of_phase=of_phase, **own,
        )  # fmt: skip
    found["train digits, posterior target"] = partial(
        train, phases=("ect", "tcm"), of_phase={"target": "posterior", "bank_size": 100}
    )
    for phase, precision, graph in itertools.product(
        ("ict", "cd", "cmt"), PRECISIONS, ("auto", "off")
    ):
        found[f"train digits {phase} {precision} graph={graph}"] = partial(
            train, phases=("edm", phase), precision=precision, cuda_graph=graph
        )
    for precision in PRECISIONS:
        found[f"train digits, manifold distance {precision}"] = partial(
            train_by_features, precision=precision
        )
    network = {"model_channels": 64, "num_blocks": 1}
    for size in ("m", "l", "xl"):
        found[f"train imagenet64-{size} narrowed"] = partial(
            train, preset=f"imagenet64-{size}", size=64, network=network, steps=12
        )
    for precision in PRECISIONS:
        found[f"train ict-deep narrowed {precision}"] = partial(
            train, preset="ict-deep", size=32, network=NARROW, precision=precision, phases=("ict",)
        )
    for preset, size, precision in (
        ("cifar10", 32, "fp32"), ("cifar10", 32, "bf16"), ("imagenet64-s", 64, "fp16"),
    ):  # fmt: skip
        found[f"train whole {preset} {precision}"] = partial(
            train, preset=preset, size=size, precision=precision, batch=32, steps=16
        )
    for preset, size, precision, phases, batch in (
        ("cifar10", 32, "fp32", ("edm", "ect"), 512), ("cifar10", 32, "fp32", ("ect", "tcm"), 1024),
        ("imagenet64-s", 64, "fp16", ("ect", "tcm"), 128),
    ):  # fmt: skip
        found[f"memory {preset} {precision} {' '.join(phases)} {batch}"] = partial(
            beside_plan,
            phases=phases,
            preset=preset,
            size=size,
            precision=precision,
            batch=batch,
            steps=16,
        )
    # The recipes' own sizes, with the optimizations that make them fit.
    for phases, batch in ((("edm",), 2048), (("ect",), 2048), (("ect", "tcm"), 1024)):
        found[f"memory imagenet64-s fp16 {' '.join(phases)} {batch}, auto"] = partial(
            beside_plan, phases=phases, preset="imagenet64-s", size=64, precision="fp16", batch=batch,
            steps=6, memory="auto", save_every=100, grid_every=100,
        )  # fmt: skip
    found["train device=cuda:0"] = partial(train, device="cuda:0", steps=12)
    for name, precision in itertools.product(("ddpmpp", "ncsnpp", "adm", "edm2"), PRECISIONS):
        found[f"sample {name} {precision}"] = partial(draw, name=name, precision=precision)
    found["stop and resume"] = stop_and_resume
    found["evaluate"] = evaluate
    for share, where in itertools.product((0.9, 0.5), ("the first step", "a capture", "a picture")):
        found[f"out of memory in {where}, {share:.0%}"] = partial(run_out, share=share, where=where)
    for family, precision in itertools.product(FAMILIES, ("fp32", "bf16", "fp16", "autocast")):
        found[f"accelerate {family} {precision}"] = partial(
            replace_family, family=family, precision=precision
        )
    if importlib.util.find_spec("diffusers"):
        for precision in ("fp32", "autocast"):
            found[f"accelerate diffusers UNet2DModel {precision}"] = partial(
                replace_diffusers, precision=precision
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], help="glob of case names; repeatable"
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chosen = {
        name: case
        for name, case in cases().items()
        if not args.only or any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only)
    }
    if args.list:
        print("\n".join(chosen))
        return 0
    fakegpu = __import__("fakegpu")
    fakegpu.install()
    async_writer.check_finite = lambda *_: None  # type: ignore[assignment]
    step_reports.diagnose = lambda *_: None  # which rows are not finite depends on values
    torch.backends.cuda.enable_cudnn_sdp(False)  # the one library that looks for the device itself
    rows = []
    for name, case in chosen.items():
        begun, said, failed = time.monotonic(), io.StringIO(), ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    result = case(Path(folder))
            except Exception as error:
                result = failed = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                failed += "\n" + traceback.format_exc() + said.getvalue()[-2000:]
        torch.cuda.empty_cache()
        rows.append({"case": name, "result": result, "failed": failed})
        mark = "FAILED" if failed else "ok"
        print(f"{mark:6} {name} ({time.monotonic() - begun:.0f} s): {result}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    broken = [row for row in rows if row["failed"]]
    for row in broken[:3]:
        print(f"\n{row['case']}\n{row['failed']}")
    print(f"{len(rows) - len(broken)} passed, {len(broken)} failed")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
