"""Results as tables: for the terminal, as Markdown, as one HTML page that needs nothing beside it, and the
README's table.

    python -m tcm_fast.benchmarks.report RESULTS.json --out FOLDER
    python -m tcm_fast.benchmarks.report --readme README.md [--check]
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tcm_fast.benchmarks.peers import BASELINE
from tcm_fast.benchmarks.plots import WITHOUT, available, plots
from tcm_fast.benchmarks.results import Results, Row, load
from tcm_fast.runtime.atomic import replacing

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
RECORDED = Path(__file__).parent / "results"
BASELINES = {
    "ops": BASELINE, "host": BASELINE, "optimizer": "foreach", "step": "official_style",
    "sample": "plain", "memory": "official_style",
}  # fmt: skip
TITLES = {
    "step": "Training steps", "sample": "Sampling", "ops": "Operations", "optimizer": "Optimizer",
    "host": "Host time of a call", "memory": "Memory of a training step",
}  # fmt: skip


@dataclass
class Table:
    """A title, a sentence, a head and rows of text."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", *([self.note, ""] if self.note else [])]
        lines += ["| " + " | ".join(self.head) + " |"]
        lines += ["|" + "|".join("---" if i < 2 else "---:" for i in range(len(self.head))) + "|"]
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in self.rows]
        return "\n".join([*lines, ""])

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body, last = [], ""
        for row in self.rows:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            marks = [] if row[0] == last or not row[0] else ["new"]
            marks += ["ours"] if len(row) > 1 and row[1].startswith("tcm_fast") else []
            body.append(f'<tr class="{" ".join(marks)}">{cells}</tr>')
            last = row[0] or last
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        return f"<h2>{html.escape(self.title)}</h2>{note}{table}"


# ---- numbers in words ---------------------------------------------------------------------------


def seconds(value: float) -> str:
    """With a unit in which it has at most three digits before the point."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.9995 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def amount(row: Row, value: float) -> str:
    return size(value) if row.unit == "bytes" else seconds(value)


def title_of(results: Results) -> str:
    env = results.environment
    threads = f"{env['threads']} thread{'' if env['threads'] == 1 else 's'}"
    where = "" if env["device"] == "cuda" else f" (CPU, {threads})"
    return f"{env['name']}{where}"


def environment_line(results: Results) -> str:
    env = results.environment
    parts = [f"torch {env.get('torch')}", f"triton {env.get('triton')}"]
    if env["device"] == "cuda":
        parts += [
            f"driver {env.get('driver')}",
            f"CUDA {env.get('cuda')}",
            f"cuDNN {env.get('cudnn')}",
        ]
    parts.append(f"Python {env.get('python')}")
    commit = env.get("commit")
    changed = " with changes" if env.get("modified") else ""
    parts.append(f"commit {commit[:10]}{changed}" if commit else "no commit known")
    if results.configuration.get("quick"):
        parts.append("quick: few samples")
    return ", ".join(parts)


def ceilings_line(results: Results) -> str:
    ceilings = results.ceilings
    if ceilings is None:
        return ""
    products = ", ".join(
        f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.matmul.items()
    )
    return f"Measured ceilings: copy {ceilings.copy / 1e9:.4g} GB/s; products {products}."


# ---- tables -------------------------------------------------------------------------------------


def _shares(row: Row, results: Results) -> list[str]:
    """GB/s and TFLOP/s with their share of the measured ceilings."""
    ceilings = results.ceilings
    if not row.bytes or ceilings is None:
        return ["", ""]
    rate = row.bytes / row.median
    cells = [f"{rate / 1e9:.4g} GB/s ({rate / ceilings.copy:.0%})"]
    if not row.flops:
        return [*cells, ""]
    flops = row.flops / row.median
    share = flops / ceilings.matmul.get(row.precision, max(ceilings.matmul.values()))
    return [*cells, f"{flops / 1e12:.3g} TFLOP/s ({share:.0%})"]


def group_table(results: Results, group: str) -> Table | None:
    """Every row of a group beside its baseline."""
    rows = [row for row in results.rows if row.group == group]
    if not rows:
        return None
    base_name = BASELINES[group]
    medians = {row.case: row.median for row in rows if row.provider == base_name and row.samples}
    first = "peak" if group == "memory" else "median"
    head = ["case", "provider", first]
    if group != "memory":
        head.append("p20 to p80")
    head.append("less than" if group == "memory" else f"over {base_name}")
    if group in ("step", "sample"):
        head.append("images/s")
    if group == "step":
        head += ["operations", "waits"]
    if group in ("ops", "optimizer"):
        head += ["of the copy rate", "of the product rate"]
    if group == "memory":
        head[-1] = f"{base_name} takes"
    table, last = [], ""
    for row in rows:
        cells = ["" if row.case == last else row.case, row.provider]
        last = row.case
        if row.wrong:
            table.append([*cells, "WRONG", row.wrong, *[""] * (len(head) - 4)])
            continue
        p20, median, p80 = row.spread
        cells.append(amount(row, median))
        if group != "memory":
            cells.append(f"{amount(row, p20)} to {amount(row, p80)}")
        base = medians.get(row.case)
        cells.append("" if base is None else f"{base / median:.2f}x")
        if group in ("step", "sample"):
            cells.append(
                f"{row.images / median:,.0f}"
                if row.images / median >= 10
                else f"{row.images / median:.2f}"
            )
        if group == "step":
            cells += ["" if v is None else str(v) for v in (row.launches, row.waits)]
        if group in ("ops", "optimizer"):
            cells += _shares(row, results)
        table.append(cells)
    return Table(TITLES[group], NOTES.get(group, "") if results.environment["device"] == "cuda" else
                 CPU_NOTES.get(group, ""), head, table)  # fmt: skip


NOTES = {
    "ops": "A call's device time, L2 cache emptied before. GB/s count the bytes that cannot be avoided, "
    "so they fall short of the copy rate where a provider moves more.",
    "step": "Host clock over blocks of steps, one wait at the end of each. Operations are launches; "
    "waits are how often the host waits for the device in a step.",
    "sample": "From noise to bytes on the host.",
    "memory": "Peak of torch's allocator, the provider alone on the device.",
    "host": "Time until a call has been issued.",
}
CPU_NOTES = {
    "ops": "On a CPU, most operations of tcm_fast are plain PyTorch too; the GPU's kernels were not "
    "timed. GB/s count the bytes that cannot be avoided.",
    "step": "Operations are those that a step dispatches; waits are the operations that read a value "
    "back, each of which would make the host wait for a GPU.",
    "sample": "From noise to bytes.",
    "memory": "Bytes of tensors made in a step and alive at once, counted; weights and optimizer left out.",
    "host": "Wall time of a call on tensors of a few values, plain PyTorch on all sides.",
}


def roofline_tables(results: Results) -> list[Table]:
    """Where a step's time goes, slowest part first, beside its limit."""
    tables = []
    for case, parts in results.roofline.items():
        rows = []
        whole = parts[-1]["seconds"] or 1.0
        for part in parts:
            spent, limit = part["seconds"], part["limit"]
            rows.append([
                part["part"], seconds(spent), f"{spent / whole:.0%}",
                seconds(limit) if limit else "", f"{limit / spent:.0%}" if limit and spent else "",
                part["bound"], f"{part['bytes'] / 1e9:.3g} GB" if part["bytes"] else "",
                f"{part['flops'] / 1e9:.4g} GFLOP" if part["flops"] else "",
                str(part["launches"] or ""),
            ])  # fmt: skip
        head = [
            "part",
            "time",
            "share",
            "limit",
            "limit/time",
            "bound by",
            "moved",
            "computed",
            "operations",
        ]
        note = (
            "Time from the profiler. The limit is what the part's bytes and operations, as issued, take at "
            "the measured ceilings; above 100 % the caches helped. What has the most time left over its "
            "limit is the next thing to optimise."
        )
        tables.append(Table(f"Where a step's time goes: {case}", note, head, rows))
    return tables


def tables(results: Results) -> list[Table]:
    found = [group_table(results, group) for group in TITLES]
    return [table for table in found if table is not None] + roofline_tables(results)


def markdown(results: Results) -> str:
    parts = [f"# tcm-fast bench: {title_of(results)}", "", environment_line(results) + ".", ""]
    parts += [ceilings_line(results), ""]
    if results.wrong:
        parts += [f"**{len(results.wrong)} answers were wrong and were not timed.**", ""]
    parts += [f"- {note}" for note in results.notes] + [""]
    parts += [table.markdown() for table in tables(results)]
    if results.skipped:
        reasons: dict[tuple[str, str], int] = {}
        for _, provider, why in results.skipped:
            reasons[provider, why] = reasons.get((provider, why), 0) + 1
        rows = [[provider, why, str(count)] for (provider, why), count in reasons.items()]
        parts.append(Table("Not timed", "", ["provider", "why", "cases"], rows).markdown())
    return "\n".join(parts)


STYLE = """
:root { color-scheme: light }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #202124 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .18rem .6rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { white-space: normal; min-width: 16rem }
th { border-bottom: 1px solid #5f6368; vertical-align: bottom }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
tr.new td { border-top: 1px solid #dadce0 } tr.ours td { color: #174ea6; font-weight: 600 }
.wrong { background: #fce8e6; padding: .5rem 1rem } figure { margin: 1.5rem 0 } svg { max-width: 100%;
height: auto } figcaption { font-weight: 600 } details { margin-top: 2rem }
"""


def page(results: Results) -> str:
    """One HTML page with everything in it."""
    heading = f"tcm-fast bench: {html.escape(title_of(results))}"
    parts = [f"<h1>{heading}</h1>", f"<p>{html.escape(environment_line(results))}.</p>"]
    parts.append(f"<p>{html.escape(ceilings_line(results))}</p>")
    for row in results.wrong:
        text = f"{row.provider} is wrong and was not timed: {row.case}: {row.wrong}"
        parts.append(f'<p class="wrong">{html.escape(text)}</p>')
    parts += [f"<p>{html.escape(note)}</p>" for note in results.notes]
    drawn = plots(results)
    parts += [
        f"<figure><figcaption>{html.escape(c)}</figcaption>{svg}</figure>" for c, svg in drawn
    ]
    if not available():
        parts.append(f"<p>{html.escape(WITHOUT)}</p>")
    parts += [table.html() for table in tables(results)]
    if results.skipped:
        items = "".join(
            f"<li>{html.escape(provider)}: {html.escape(case)}: {html.escape(why)}</li>"
            for case, provider, why in results.skipped
        )
        parts.append(
            f"<details><summary>Not timed ({len(results.skipped)})</summary><ul>{items}</ul></details>"
        )
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def write_numbers(results: Results, out: Path) -> None:
    """results.json and report.md in a folder: what is written while a run goes on."""
    results.save(out / "results.json")
    with replacing(out / "report.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")


def write(results: Results, out: Path) -> Path:
    """results.json, report.md and report.html in a folder; returns the page's path."""
    write_numbers(results, out)
    (out / "report.html").write_text(page(results), encoding="utf-8")
    return out / "report.html"


def terminal(results: Results) -> str:
    """The tables that a reader wants to see first, in plain columns."""
    lines = [title_of(results), environment_line(results), ceilings_line(results)]
    for table in tables(results):
        lines += ["", table.title]
        widths = [max(len(r[i]) for r in [table.head, *table.rows]) for i in range(len(table.head))]
        widths[0] = min(widths[0], 70)
        for row in [table.head, *table.rows]:
            cells = [
                cell[: widths[i]].ljust(widths[i]) if i < 2 else cell.rjust(widths[i])
                for i, cell in enumerate(row)
            ]
            lines.append("  ".join(cells).rstrip())
    lines += ["", *results.notes]
    lines += [f"WRONG: {row.provider}: {row.case}: {row.wrong}" for row in results.wrong]
    return "\n".join(lines)


# ---- the README's table -------------------------------------------------------------------------


def recorded(folder: Path = RECORDED) -> list[Results]:
    """The results of `tcm-fast bench` in a folder (other files of numbers are passed over)."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(load(path))
        except ValueError:
            continue
    return found


def readme_table(results: Sequence[Results]) -> str:
    """Training and sampling on the GPUs that results were recorded on, as Markdown between the marks."""
    lines = [BEGIN]
    on_gpu = [r for r in results if r.environment["device"] == "cuda"]
    if not on_gpu:
        lines.append(
            "No result of a GPU has been recorded for this version: `tcm-fast bench` measures yours."
        )
    for result in on_gpu:
        rows = [row for row in result.timed if row.group in ("step", "sample")]
        base = {r.case: r.median for r in rows if r.provider == BASELINES[r.group]}
        lines += [f"{title_of(result)}; {environment_line(result)}.", ""]
        lines += ["| | provider | images/s | over the baseline |", "|---|---|---:|---:|"]
        last = ""
        for row in rows:
            ratio = f"{base[row.case] / row.median:.2f}x" if row.case in base else ""
            name = "" if row.case == last else row.case
            last = row.case
            lines.append(f"| {name} | {row.provider} | {row.images / row.median:,.0f} | {ratio} |")
        lines.append("")
    return "\n".join([*lines, END])


def with_table(text: str, table: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """A page with a table, which has its marks, in place of the one before. ValueError where it has none."""
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"report: needs one {begin} before one {end}, found none or several")
    before, _, rest = text.partition(begin)
    return before + table + rest.partition(end)[2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="make reports of recorded benchmarks")
    parser.add_argument("results", nargs="?", type=Path, help="results.json")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="where the report goes")
    parser.add_argument("--readme", type=Path, help="renew the table between this file's marks")
    parser.add_argument(
        "--check", action="store_true", help="with --readme: only say whether it is new"
    )
    given = parser.parse_args(argv)
    try:
        if given.readme is not None:
            text = given.readme.read_text(encoding="utf-8")
            renewed = with_table(text, readme_table(recorded()))
            if given.check:
                print(
                    "up to date"
                    if renewed == text
                    else f"{given.readme}: the table is not of the results"
                )
                return int(renewed != text)
            given.readme.write_text(renewed, encoding="utf-8")
        elif given.results is not None:
            print(write(load(given.results), given.out))
        else:
            parser.error("give RESULTS.json or --readme FILE")
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
