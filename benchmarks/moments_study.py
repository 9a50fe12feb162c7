"""Whether moments in 16 and 8 bits train as well as in fp32, on the built-in digits:
python -m tcm_fast.benchmarks.moments_study

For each seed and each kind of moments: pre-training and stage 1 from nothing, everything else equal. Fréchet
distances against held-out digits and the bytes of the optimizer's state go to a JSON file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tcm_fast.benchmarks.digits_study import train

KINDS = ("fp32", "bf16", "8bit")


def study(
    folder: Path, seeds: int, jobs: int, images: int, kinds: tuple[str, ...] = KINDS
) -> list[dict[str, Any]]:
    """The row of every phase, `jobs` runs at a time with one thread each."""
    runs = [(kind, seed) for seed in range(seeds) for kind in kinds]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for phase, before in (("edm", None), ("ect", "edm")):
            rows += pool.map(
                train,
                [
                    (
                        f"{folder}/{phase}-{kind}-{seed}",
                        phase,
                        seed,
                        {"images": images, "moments": kind},
                        before and f"{folder}/{before}-{kind}-{seed}",
                    )
                    for kind, seed in runs
                ],
            )
    for row in rows:
        row["state_bytes"] = state_bytes(folder / row["run"])
    return rows


def state_bytes(run: Path) -> int:
    """Of the moments in a run's newest checkpoint."""
    from tcm_fast.checkpoint.run_folder import newest_checkpoint
    from tcm_fast.runtime.atomic import read_tensors

    newest = newest_checkpoint(run)
    assert newest is not None
    tensors = read_tensors(newest / "optimizer.safetensors")[1]
    return sum(x.nbytes for name, x in tensors.items() if not name.endswith("/step"))


def summarise(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as a Markdown table."""
    lines = [
        "| moments | state | pre-trained, 18 Heun steps | stage 1, 1 step | 2 steps |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["changes"]["moments"] for row in rows):
        own = [row for row in rows if row["changes"]["moments"] == kind]
        cells = []
        for key in ("frechet_heun", "frechet_1", "frechet_2"):
            values = [row[key] for row in own if key in row]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        size = f"{own[0]['state_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {kind} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from tcm_fast.benchmarks.measure import write_record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/moments_study.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64_000, help="of each phase")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = study(Path(scratch), args.seeds, args.jobs, args.images)
    what = "digits: Fréchet distances to held-out digits by the memory of the optimizer's moments"
    write_record(args.out, what, f"{platform.machine()} CPU, one thread a run", rows=rows)
    print(summarise(rows))


if __name__ == "__main__":
    main()
