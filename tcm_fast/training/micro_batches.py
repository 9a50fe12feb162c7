"""How many micro-batches a batch is cut into, raised where a step runs out of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tcm_fast.runtime.atomic import replacing
from tcm_fast.runtime.distributed import Workers

NAME = "memory.json"


class MicroBatches:
    """The number of passes that each process's share of a batch is cut into.

    What a run has found out for a kind of device and a number of processes lies in RUN/memory.json, so
    that it is found out once.

    Args:
        out: the run's folder.
        count: as configured.
        workers: the processes.
    """

    def __init__(self, out: Path, count: int, workers: Workers) -> None:
        self.file, self.workers = out / NAME, workers
        self.count = max(count, workers.on_main(self._recall))

    def of(self, batch_size: int) -> int:
        """Passes for a batch: the smallest number of equal parts that is not below `count`."""
        share = batch_size // self.workers.world
        return next(n for n in range(min(self.count, share), share + 1) if share % n == 0)

    def halve(self, batch_size: int) -> bool:
        """Cut into twice as many passes, or the next possible number, from now on. False where each
        pass has one image already."""
        share = batch_size // self.workers.world
        now = self.of(batch_size)
        if now == share:
            return False
        self.count = 2 * now
        self.count = self.of(batch_size)
        if self.workers.is_main:
            self._note()
        return True

    @property
    def _place(self) -> dict[str, Any]:
        device = self.workers.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"device": name, "processes": self.workers.world}

    def _recall(self) -> int:
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
            fits = all(known[key] == value for key, value in self._place.items())
            return max(1, int(known["micro_batches"])) if fits else 1
        except (OSError, ValueError, KeyError, TypeError):
            return 1

    def _note(self) -> None:
        try:
            with replacing(self.file) as temporary:
                temporary.write_text(json.dumps({**self._place, "micro_batches": self.count}))
        except OSError:
            pass  # then it is found out again
