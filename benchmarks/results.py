"""What a run of the benchmarks leaves: rows with every sample, and where they come from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcm_fast.benchmarks.measure import spread
from tcm_fast.planning.throughput import Ceilings
from tcm_fast.runtime.atomic import replacing

FORMAT = 1
GROUPS = ("ops", "host", "optimizer", "step", "sample", "memory")


@dataclass
class Row:
    """One provider in one case.

    group: of GROUPS. case: what was done; provider: by whom. samples: seconds a call (memory: bytes),
    every one. how: graph, events, clock or counted. bytes, flops: what cannot be avoided, by formula.
    images: a call's images, where it has any. peak_memory: bytes; launches: operations a step starts;
    waits: times a step makes the host wait for the device. precision: chooses the matmul ceiling.
    sums: (network, direction, calls a pass) for a sum over a network's sites. wrong: why the answer was
    not right, and nothing timed. extra: anything else.
    """

    group: str
    case: str
    provider: str
    samples: list[float]
    how: str = "clock"
    unit: str = "s"
    precision: str = "fp32"
    bytes: int = 0
    flops: int = 0
    images: int = 0
    peak_memory: int | None = None
    launches: int | None = None
    waits: int | None = None
    network: str = ""
    operation: str = ""
    direction: str = ""
    count: int = 1
    batch: int = 0
    wrong: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.case, self.provider

    @property
    def spread(self) -> tuple[float, float, float]:
        """20th percentile, median, 80th percentile."""
        return spread(self.samples)

    @property
    def median(self) -> float:
        return self.spread[1]


@dataclass
class Results:
    """environment: hardware, versions, commit. configuration: what was asked for. skipped: (case,
    provider, reason). roofline: case -> rows of parts. notes: sentences for the reader."""

    environment: dict[str, Any]
    configuration: dict[str, Any]
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    roofline: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.wrong]

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.samples]

    def save(self, path: Path) -> None:
        """As JSON, rounded to four digits more than anybody can measure; the file is whole or absent."""
        data = {"format": FORMAT} | dataclasses.asdict(self)
        for row in data["rows"]:
            row["samples"] = [float(f"{value:.7g}") for value in row["samples"]]
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> Results:
    """Results from a JSON file. ValueError for a file that holds none."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.pop("format")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: holds no results of tcm-fast bench") from None
    if version != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {version}")
    try:
        rows = [Row(**row) for row in data.pop("rows")]
        ceilings = data.pop("ceilings")
        skipped = [tuple(entry) for entry in data.pop("skipped")]
        return Results(
            rows=rows, ceilings=None if ceilings is None else Ceilings(**ceilings), skipped=skipped, **data
        )  # fmt: skip
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: holds no results of tcm-fast bench ({error})") from None
