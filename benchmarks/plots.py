"""The report's plots, as SVG text: where each operation lies under the roofs, speed-ups with their spread,
speed and memory over the batch. Needs matplotlib (the [plot] extra)."""

from __future__ import annotations

import importlib.util
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tcm_fast.benchmarks.peers import BASELINE, OURS
from tcm_fast.benchmarks.results import Results, Row

WITHOUT = "Plots need matplotlib: pip install 'tcm-fast[plot]'."
COLOURS = ("#1f77b4", "#9aa0a6", "#d95f02", "#7570b3", "#66a61e", "#e7298a", "#a6761d", "#444444")


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def colour_of(provider: str, others: list[str]) -> str:
    """Ours is blue, the baseline grey, in every plot."""
    if provider == OURS:
        return COLOURS[0]
    if provider in (BASELINE, "official_style", "plain"):
        return COLOURS[1]
    rest = [name for name in others if name not in (OURS, BASELINE, "official_style", "plain")]
    return COLOURS[2 + rest.index(provider) % (len(COLOURS) - 2)]


def plots(results: Results) -> list[tuple[str, str]]:
    """(caption, SVG) of each plot that the results have something for; none without matplotlib."""
    if not available():
        return []
    drawn = [
        ("Speed of training steps over the official style", _speed_ups(results, "step")),
        ("Training speed over the batch size", _over_batch(results, "step")),
        ("Sampling speed over the batch size", _over_batch(results, "sample")),
        ("Memory over the batch size", _over_batch(results, "memory")),
        ("Operations under the measured roofs", _roofline(results)),
        (
            "Speed of the operations over plain PyTorch (bars: medians, lines: 20th to 80th percentile)",
            _speed_ups(results, "ops"),
        ),
    ]
    return [(caption, svg) for caption, svg in drawn if svg]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({
        "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "tcm_fast",
    })  # fmt: skip
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return re.sub(r"^.*?<svg", "<svg", svg, flags=re.DOTALL)


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.provider for row in rows))


def _roofline(results: Results) -> str:
    """Attained operations a second over operations a byte, of rows that have operations to count; for the
    others their share of the copy rate."""
    rows = [r for r in results.timed if r.group == "ops" and r.flops and r.count]
    ceilings = results.ceilings
    if not rows or ceilings is None:
        return ""
    figure, axes = _figure(7, 4)
    names = _names(rows)
    points = [(r.flops / r.bytes, r.flops / r.median / 1e9) for r in rows]
    bends = [roof / ceilings.copy for roof in ceilings.matmul.values()]
    low = min(*bends, *(x for x, _ in points)) / 3
    high = max(max(x for x, _ in points), max(ceilings.matmul.values()) / ceilings.copy) * 3
    for precision in sorted({row.precision for row in rows}):
        roof = ceilings.matmul.get(precision, max(ceilings.matmul.values()))
        bend = roof / ceilings.copy
        axes.plot(
            [low, bend, high], [low * ceilings.copy / 1e9, roof / 1e9, roof / 1e9], lw=1, c="black"
        )
        axes.annotate(f"{precision} product, measured", (high, roof / 1e9), ha="right", va="bottom")
    axes.annotate("copy, measured", (low, low * ceilings.copy / 1e9), va="bottom", rotation=20)
    seen = set()
    for row, (x, y) in zip(rows, points, strict=True):
        label = None if row.provider in seen else row.provider
        seen.add(row.provider)
        marker = "o" if row.direction == "forward" else "s"
        axes.scatter(x, y, s=22, marker=marker, color=colour_of(row.provider, names), label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that cannot be avoided",
             ylabel="GFLOP/s attained")  # fmt: skip
    figure.legend(
        frameon=False, fontsize=8, title="o forward, \u25a1 both", loc="outside right upper"
    )
    return _svg(figure)


def _speed_ups(results: Results, group: str) -> str:
    """Baseline's median over each provider's, with the provider's spread."""
    base_name = BASELINE if group == "ops" else "official_style"
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in results.timed:
        if row.group == group:
            cases[row.case].append(row)
    cases = {c: rows for c, rows in cases.items() if any(r.provider == base_name for r in rows)}
    if group == "ops" and len(cases) > 24:  # sums over a network say it in fewer bars
        sums = {c: rows for c, rows in cases.items() if rows[0].count == 0}
        cases = sums or dict(list(cases.items())[:24])
    if not cases:
        return ""
    names = [n for n in _names(r for rows in cases.values() for r in rows) if n != base_name]
    height = 0.16 * sum(len(rows) for rows in cases.values()) + 0.14 * len(cases) + 1.1
    figure, axes = _figure(8, height)
    at, ticks, seen = 0.0, [], set()
    for rows in reversed(cases.values()):
        base = next(r for r in rows if r.provider == base_name).median
        shown = [r for r in rows if r.provider != base_name]
        begun = at
        for row in reversed(shown):
            p20, median, p80 = (base / value for value in reversed(row.spread))
            label = None if row.provider in seen else row.provider
            seen.add(row.provider)
            axes.barh(
                at, median, 0.8, color=colour_of(row.provider, names), label=label,
                xerr=[[max(0.0, median - p20)], [max(0.0, p80 - median)]], error_kw={"lw": 0.8},
            )  # fmt: skip
            at += 1
        ticks.append(((begun + at - 1) / 2, rows[0].case))
        at += 0.8
    axes.axvline(1, color=COLOURS[1], lw=1)
    axes.set_yticks([y for y, _ in ticks], [_wrapped(case) for _, case in ticks], fontsize=7)
    axes.set_ylim(-0.8, at - 0.4)
    axes.set_xlabel(f"times as fast as {base_name} (1 = the grey line)")
    figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=4)
    return _svg(figure)


def _wrapped(text: str, width: int = 44) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _over_batch(results: Results, group: str) -> str:
    """Images a second (memory: megabytes) over the batch, a line for each provider and network."""
    lines: dict[Any, dict[int, Row]] = defaultdict(dict)
    for row in results.timed:
        if row.group == group:
            rest = row.case.replace(f"batch {row.batch} ", "")
            lines[row.provider, rest][row.batch] = row
    lines = {key: by_batch for key, by_batch in lines.items() if len(by_batch) > 1}
    if not lines:
        return ""
    figure, axes = _figure(7, 3.6)
    names = list(dict.fromkeys(provider for provider, _ in lines))
    styles = dict.fromkeys(rest for _, rest in lines)
    for i, rest in enumerate(styles):
        styles[rest] = ("-", "--", ":", "-.")[i % 4]  # type: ignore[call-overload]
    for (provider, rest), by_batch in lines.items():
        batches = sorted(by_batch)
        rows = [by_batch[batch] for batch in batches]
        if group == "memory":
            columns = [tuple(v / 2**20 for v in row.spread) for row in rows]
        else:
            columns = [tuple(row.images / v for v in reversed(row.spread)) for row in rows]
        low, middle, high = zip(*columns, strict=True)
        colour = colour_of(provider, names)
        axes.plot(
            batches,
            middle,
            styles[rest],
            marker="o",
            ms=3,
            color=colour,
            label=f"{provider}, {rest}",
        )
        axes.fill_between(batches, low, high, color=colour, alpha=0.2, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="batch")
    axes.set_ylabel("MiB" if group == "memory" else "images/s")
    batches = sorted({batch for by_batch in lines.values() for batch in by_batch})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    return _svg(figure)
