"""Two results beside each other: what became faster or slower, by the samples, and a gate on it.

A difference counts where the medians differ by more than a tolerance and the samples tell the two apart
(Mann-Whitney, corrected after Holm for the number of comparisons). Neither alone would do: with many
samples a per mille is significant, and with few a fifth is luck.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scipy.stats import mannwhitneyu

from tcm_fast.benchmarks.peers import OURS
from tcm_fast.benchmarks.results import Results, Row

TOLERANCE = 0.05  # of the median; clocks and neighbours move a run by less
LEVEL = 0.01  # chance of calling any of the comparisons of equal runs different


@dataclass
class Change:
    """One row in both results. ratio: median of B over A; p: corrected; verdict: equal, slower, faster,
    wrong or missing."""

    group: str
    case: str
    provider: str
    a: float
    b: float
    ratio: float
    p: float
    verdict: str


@dataclass
class Comparison:
    """changes: rows of both. drift: geometric mean ratio of everybody's rows but ours, what the machine
    itself did. cautions: why the two may not be comparable."""

    changes: list[Change]
    drift: float | None = None
    cautions: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Change]:
        """What closes the gate: our rows that are slower (or take more memory), wrong or missing."""
        bad = ("slower", "wrong", "missing")
        return [c for c in self.changes if c.verdict in bad and is_ours(c.provider)]


def is_ours(provider: str) -> bool:
    return provider == OURS or provider.startswith(f"{OURS} ")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def relative_samples(row: Row, rows: Iterable[Row]) -> list[float]:
    """Samples of a row over those of everybody but us in the same case and round, which were taken at the
    same moment: what the machine does to both goes out."""
    others = [
        r.samples
        for r in rows
        if (r.group, r.case) == (row.group, row.case)
        and not is_ours(r.provider)
        and len(r.samples) == len(row.samples)
    ]
    if not others:
        return row.samples
    beside = [
        math.exp(statistics.fmean(map(math.log, column))) for column in zip(*others, strict=True)
    ]
    return [value / base for value, base in zip(row.samples, beside, strict=True)]


def _difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Chance of samples as different as these from one distribution."""
    if len(a) < 4 or len(b) < 4:  # counts, not samples: equal or not
        return 0.0
    return float(mannwhitneyu(a, b).pvalue)


def compare(
    a: Results, b: Results, *, tolerance: float = TOLERANCE, relative: bool = False
) -> Comparison:
    """B against A.

    Args:
        tolerance: share of the median below which nothing counts.
        relative: compare our samples over the others' of the same round instead of seconds.

    Raises:
        ValueError: a tolerance that is not positive, results without a row in common.
    """
    if not tolerance > 0:
        raise ValueError(f"compare: tolerance must be positive, got {tolerance}")
    before, after = {row.key: row for row in a.rows}, {row.key: row for row in b.rows}
    common = [key for key in before if key in after]
    if not common:
        raise ValueError("compare: the two results have no case in common")
    pairs, changes = [], []
    for key in before:
        old, new = before[key], after.get(key)
        if old.wrong:
            continue
        if new is None or new.wrong or not new.samples:
            verdict = "wrong" if new is not None and new.wrong else "missing"
            if new is not None or key[0] in {row.group for row in b.rows}:
                changes.append(Change(*key, old.median, math.nan, math.nan, 0.0, verdict))
            continue
        took_turns = relative and is_ours(old.provider)
        samples = [
            relative_samples(row, results.rows) if took_turns else row.samples
            for row, results in ((old, a), (new, b))
        ]
        pairs.append((key, *samples))
    p_values = holm([_difference(x, y) for _, x, y in pairs])
    for (key, x, y), p in zip(pairs, p_values, strict=True):
        ratio = statistics.median(y) / statistics.median(x)
        different = p < LEVEL and abs(math.log(ratio)) > math.log1p(tolerance)
        verdict = "equal" if not different else "slower" if ratio > 1 else "faster"
        changes.append(Change(*key, before[key].median, after[key].median, ratio, p, verdict))
    logs = [math.log(c.ratio) for c in changes if not is_ours(c.provider) and c.ratio > 0]
    drift = math.exp(statistics.fmean(logs)) if logs else None
    return Comparison(changes, drift, _cautions(a, b, drift, tolerance))


def _cautions(a: Results, b: Results, drift: float | None, tolerance: float) -> list[str]:
    found = []
    for name in ("name", "driver", "torch", "triton", "threads"):
        old, new = a.environment.get(name), b.environment.get(name)
        if old != new:
            found.append(f"{name} differs: {old} and {new}")
    if drift is not None and abs(math.log(drift)) > math.log1p(tolerance):
        found.append(
            f"what is not ours took {drift:.2f} times as long in B: the machine itself changed "
            "(--relative compares with it)"
        )
    return found


def text(comparison: Comparison) -> str:
    """For the terminal: what is not equal, and how many are."""
    lines = [f"caution: {caution}" for caution in comparison.cautions]
    changes = sorted(
        comparison.changes, key=lambda c: -abs(math.log(c.ratio)) if c.ratio > 0 else -99
    )
    for c in changes:
        if c.verdict == "equal":
            continue
        detail = "" if math.isnan(c.ratio) else f"  x{c.ratio:.2f}  p {c.p:.1g}"
        lines.append(f"{c.verdict:>8}  {c.provider}: {c.case} [{c.group}]{detail}")
    equal = sum(c.verdict == "equal" for c in comparison.changes)
    lines.append(f"{equal} of {len(comparison.changes)} rows are equal")
    if comparison.failures:
        lines.append(f"{len(comparison.failures)} of ours got slower, wrong or lost")
    return "\n".join(lines)
