"""A long run at toy size, watched from outside: python -m tcm_fast.benchmarks.soak --minutes 30

Host memory, file descriptors and threads of a training process (and a GPU's memory in use) every few
seconds, over pre-training, stage 1 and stage 2, with a checkpoint every five minutes; and what the run
itself says it spent on checks, logging and saving. All goes to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PHASE_STEPS = 1500  # of pre-training and of stage 1; stage 2 has the rest of the time
FLAT = 0.02  # growth of host memory that counts as none: the allocator breathes


def config() -> dict[str, Any]:
    """Digits, a network of 0.1 M parameters, and a stage 2 without end."""
    phase = {"batch_size": 32, "images": 32 * PHASE_STEPS, "dropout": 0.1, "ema": ["power:6.94"]}
    pairs = phase | {"huber_c": 0.03, "stage_iterations": 500, "max_ratio": 0.97}
    return {
        "phases": ["edm", "ect", "tcm"],
        "data": {"source": "digits:train"},
        "network": {"model_channels": 32, "channel_mult": [1, 1], "num_blocks": 1,
                    "attn_resolutions": [4]},
        "edm": phase | {"lr": 1e-3}, "ect": pairs, "tcm": pairs | {"images": 10**12},
        "eval": {"features": "digits"},
        "save_every": 10**9, "save_minutes": 5.0, "grid_every": 1000, "snapshot_every": 10_000,
    }  # fmt: skip


def look(pid: int) -> dict[str, float]:
    """What a process holds now: rss (bytes), files, threads; device (bytes) where there is a GPU."""
    import torch

    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    found = {
        "rss": 1024.0 * int(status["VmRSS"].split()[0]),
        "files": float(len(os.listdir(f"/proc/{pid}/fd"))),
        "threads": float(status["Threads"]),
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["device"] = float(total - free)
    return found


def evaluate(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the second and of the last quarter, their ratio, and whether nothing grew.

    The first half of the quarters holds imports, the phases' beginnings and the first checkpoint."""
    quarter = len(samples) // 4
    if quarter < 1:
        raise ValueError(f"soak: must have at least 4 samples, got {len(samples)}")
    before, after = samples[quarter : 2 * quarter], samples[-quarter:]
    found: dict[str, Any] = {}
    for key in samples[0]:
        early, late = (statistics.median(s[key] for s in part) for part in (before, after))
        allowed = FLAT if key in ("rss", "device") else 0.0
        found[key] = {
            "early": early,
            "late": late,
            "growth": late / early - 1,
            "most": max(s[key] for s in samples),
            "flat": late <= early * (1 + allowed),
        }
    return found


def shares(log: Path) -> dict[str, Any]:
    """Time that training waited for checks, logging and saving, as shares of the run."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    spent = [event for event in events if event["event"] == "spent"]
    training = sum(event["training"] for event in spent)
    last = spent[-1]  # the accounts run on through the phases
    overhead = {key: last.get(key, 0.0) for key in ("checks", "logging", "saving")}
    saves = [event["seconds"] for event in events if event["event"] == "saved"]
    return {
        "training_seconds": training,
        "seconds": overhead,
        "share": sum(overhead.values()) / max(training + overhead["saving"], 1e-9),
        "saves": len(saves),
        "background_seconds": sum(saves),
        "images": max(event.get("images", 0) for event in events),
    }


def soak(minutes: float, every: float, folder: Path) -> dict[str, Any]:
    """Train for some minutes in a process of its own, and watch it."""
    path = folder / "config.json"
    path.write_text(json.dumps(config()))
    command = [
        sys.executable, "-m", "tcm_fast", "train", "--config", str(path), "--out",
        str(folder / "run"), "--stop-after", str(minutes / 60),
    ]  # fmt: skip
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    samples: list[dict[str, float]] = []
    while process.poll() is None:
        time.sleep(every)
        try:
            samples.append({"at": time.monotonic() - begun, **look(process.pid)})
        except (OSError, KeyError):
            break  # it has just ended
    error = process.communicate()[1].decode()
    if process.returncode != 75:
        raise RuntimeError(f"soak: the run ended with status {process.returncode}: {error[-2000:]}")
    measured = [{k: v for k, v in sample.items() if k != "at"} for sample in samples]
    return {
        "minutes": minutes,
        "samples": len(samples),
        **evaluate(measured),
        "time": shares(folder / "run" / "log.jsonl"),
        "track": samples[:: max(1, len(samples) // 60)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two readings")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.minutes, args.every, Path(folder))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for key in ("rss", "files", "threads", "device"):
        if key in found:
            row = found[key]
            verdict = "flat" if row["flat"] else "GROWS"
            print(f"{key:>8}: {row['early']:.6g} -> {row['late']:.6g} ({verdict})")
    share = found["time"]["share"]
    print(
        f"checks, logging, saving: {100 * share:.2f} % of {found['time']['training_seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
