"""What `tcm-fast bench` is to measure."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcm_fast.benchmarks.measure import Pace
from tcm_fast.benchmarks.results import GROUPS

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is wanted. groups: of results.GROUPS, and roofline. compiled: torch.compile among the
    operations' providers, None on a GPU only. only: part of a case's name. official, fastgen: checkouts.
    dry_run: each call once and no answer looked at, to see that all runs on a device that computes nothing.
    """

    groups: tuple[str, ...] = (*GROUPS, "roofline")
    quick: bool = False
    device: str = "cpu"
    compiled: bool | None = None
    only: str = ""
    official: Path | None = None
    fastgen: Path | None = None
    dry_run: bool = False

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def pace(self) -> Pace:
        return Pace(0.0, 1) if self.dry_run else Pace.of(self.quick)

    def wants(self, case: Any) -> bool:
        """Whether `only` is part of a case's name."""
        return self.only in str(case)


def release_memory(is_cuda: bool) -> None:
    """Of what is no longer referred to, and on a GPU what torch's allocator keeps of it."""
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
