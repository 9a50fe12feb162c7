"""What each memory optimization saves and costs, beside the same step without it:
python -m tcm_fast.benchmarks.memory_optimizations

On a GPU the allocator says what a step holds, on a CPU its tensors are counted. Gradients are compared by
the first moments after one step from the same start (root mean square of the tensors' relative
differences), so that the rounding of short moments shows too.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcm_fast.benchmarks.measure import write_record
from tcm_fast.cli.plan import image_shape
from tcm_fast.config import Config, from_dict, load_preset
from tcm_fast.planning.cards import Card, this_device
from tcm_fast.planning.counter import Counter
from tcm_fast.planning.memory_estimate import ImageShape, memory
from tcm_fast.planning.memory_planner import choose_optimizations
from tcm_fast.training.phase import Phase
from tcm_fast.training.trainer import Trainer

OPTIMIZATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "recompute_norms": {"recompute_norms": True},
    "recompute_blocks 1": {"recompute_blocks": 1},
    "micro_batches 4": {"micro_batches": 4},
    "moments bf16": {"moments": "bf16"},
    "moments 8bit": {"moments": "8bit"},
    "offload": {"offload": True},
    "all of these": {
        "recompute_norms": True,
        "recompute_blocks": 1,
        "micro_batches": 4,
        "moments": "8bit",
        "offload": True,
    },
}


@dataclass(frozen=True)
class Row:
    """The step of one of them. Bytes on the device; `difference`: of the gradients, relative to none's."""

    precision: str
    optimization: str
    predicted: int
    held: int
    milliseconds: float
    difference: float


def held(config: Config, name: str, out: str | Path) -> int:
    """Bytes that a phase and a step at its schedule's end hold at most: tensors counted on a CPU, what the
    allocator gave on a GPU."""
    before = [] if torch.cuda.is_available() else _storages(_tensors())
    trainer = Trainer(config, out)
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        _forget()
        floor = torch.cuda.memory_allocated()
    phase = _begin(trainer, name)
    trainer.step(phase)
    phase.step = phase.steps - 1  # where most targets need a network
    batches = trainer.loader.batches(phase)
    phase.optimizer.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        trainer.runner.step(phase, batches)
        return torch.cuda.max_memory_allocated() - floor
    there = _tensors()
    there += [x for state in phase.optimizer.state.values() for x in state.values()]
    sizes = {k: v for k, v in _storages(there).items() if k not in before}
    host: set[int] = set()
    if config.offload:  # EMAs and moments share their blocks of memory
        host |= _storages([x for ema in phase.emas for x in ema.average]).keys()
    if name == "tcm" and config.precision != "fp32" and phase.frozen is not None:
        host |= _storages([*phase.frozen.parameters(), *phase.frozen.buffers()]).keys()
    with Counter(there) as counter:
        trainer.runner.step(phase, batches)
    return sum(size for key, size in sizes.items() if key not in host) + counter.peak


def _begin(trainer: Trainer, name: str) -> Phase:
    """A phase on a new network."""
    previous = trainer.builder.build(name) if name == "tcm" else None
    return trainer.begin(name, previous)


def first_moments(config: Config, name: str, out: str | Path) -> list[torch.Tensor]:
    """Of each parameter after one step: the gradient but for a factor."""
    trainer = Trainer(config, out)
    torch.manual_seed(0)
    phase = _begin(trainer, name)
    trainer.step(phase)
    state = phase.optimizer.state_dict()["state"]
    return [state[k]["exp_avg"].double().cpu() for k in sorted(state)]


def relative_difference(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Root mean square over the tensors: of a new network a few of them have nearly all of the norm."""
    pairs = [(a, b) for a, b in zip(found, reference, strict=True) if b.norm() > 0]
    shares = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    return float(shares.square().mean().sqrt())


def measure(
    config: Config,
    name: str,
    optimizations: dict[str, dict[str, Any]],
    shape: ImageShape,
    card: Card,
    *,
    seconds: float = 3.0,
) -> list[Row]:
    """A row for each optimization, the first of which is none at all."""
    rows: list[Row] = []
    reference: list[torch.Tensor] | None = None
    for optimization, changes in optimizations.items():
        given = replace(config, phases=(name,), **changes)
        with tempfile.TemporaryDirectory() as folder:
            found = held(given, name, f"{folder}/held")
            moments = first_moments(given, name, f"{folder}/moments")
            trainer = Trainer(given, f"{folder}/speed")
            rate = trainer.measure(name, seconds=seconds)
            trainer.checkpoints.close()
        reference = moments if reference is None else reference
        difference = relative_difference(moments, reference)
        predicted = memory(given, name, shape, on_gpu=card.on_gpu).total
        took = 1e3 * given.phase(name).batch_size / rate
        rows.append(Row(config.precision, optimization, predicted, found, took, difference))
        _forget()
    return rows


def summarise(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| precision | optimization | memory, predicted | measured | of none | time of a step | of none "
        "| gradients differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    none = rows[0]
    for row in rows:
        none = row if row.optimization == "none" else none
        difference = f"{row.difference:.0e}" if row.difference else "0"
        lines.append(
            f"| {row.precision} | {row.optimization} | {row.predicted / 2**20:.1f} MiB "
            f"| {row.held / 2**20:.1f} MiB | {row.held / none.held:.2f} | {row.milliseconds:.0f} ms "
            f"| {row.milliseconds / none.milliseconds:.2f} | {difference} |"
        )
    return "\n".join(lines)


def narrow(folder: Path, batch: int, channels: int = 64) -> Config:
    """A narrow DDPM++ on random images of 32x32, for a CPU."""
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (2 * batch, 32, 32, 3), np.uint8))
    network = {"model_channels": channels, "channel_mult": [1, 2], "num_blocks": 1}
    phase = {"batch_size": batch, "images": 16 * batch, "ema": ["power:6.94"]}
    pairs = {"stage_iterations": 1, "max_ratio": 0.99}
    return from_dict(
        Config,
        {
            "data": {"source": str(folder / "images.npz")},
            "network": network,
            **{"edm": phase, "ect": phase | pairs, "tcm": phase | pairs},
        },
    )


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--preset", help="its network and batch (a narrow one where there is no GPU)"
    )
    parser.add_argument("--data", help="images for the preset")
    parser.add_argument("--phase", default="tcm", choices=["edm", "ect", "tcm"])
    parser.add_argument("--batch", type=int, default=16, help="of the narrow network")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each of them")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/memory_optimizations.json")
    )
    args = parser.parse_args()
    card = this_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        config = narrow(Path(folder), args.batch)
        if args.preset:
            config = load_preset(args.preset)
            if args.data:
                config = replace(config, data=replace(config.data, source=args.data))
        shape = image_shape(config, args.preset or "", None)
        rows: list[Row] = []
        for precision, optimizations in (("fp32", OPTIMIZATIONS), ("bf16", {"none": {}})):
            own = replace(config, precision=precision)
            rows += measure(own, args.phase, optimizations, shape, card, seconds=args.seconds)
        if card.on_gpu:
            chosen = choose_optimizations(config, shape, card)
            rows += measure(chosen, args.phase, {"auto": {}}, shape, card, seconds=args.seconds)
    what = f"memory optimizations: a step of {args.phase}, {args.preset or 'narrow DDPM++'}"
    write_record(args.out, what, card.name, rows=[asdict(row) for row in rows])
    print(summarise(rows))


if __name__ == "__main__":
    main()
