"""Tables, plots, the page, and the README's table."""

import html.parser
import re
from pathlib import Path

import pytest

from tcm_fast.benchmarks import plots, report
from tcm_fast.benchmarks.report import BEGIN, END, main, readme_table, recorded, with_table
from tcm_fast.benchmarks.results import Results, Row
from tcm_fast.planning.throughput import Ceilings

ROOT = Path(__file__).parents[2]


def results(device="cuda"):
    """One row of everything, with round numbers."""
    rows = []
    for name, seconds in (("pytorch", 4e-3), ("tcm_fast", 1e-3), ("liger", 2e-3)):
        samples = [seconds * factor for factor in (0.9, 0.95, 1.0, 1.05, 1.1)]
        rows.append(
            Row("ops", "group_norm_silu Nx256x32x32 <odd> batch 64 bf16 both", name, samples,
                how="graph", precision="bf16", bytes=2 * 10**9, operation="group_norm_silu")
        )  # fmt: skip
        rows.append(
            Row("ops", "qkv_attention Nx768x16x16 batch 64 bf16 both", name, samples,
                precision="bf16", bytes=10**6, flops=10**11, operation="qkv_attention")
        )  # fmt: skip
        rows.append(Row("host", "host time of group_norm_silu", name, samples))
    rows.append(Row("ops", "pixel | norm", "tcm_fast", [], wrong="result 0 is off by 3"))
    for batch in (16, 128):
        for name, seconds in (("official_style", 1.0), ("tcm_fast", 0.25)):
            case = f"tcm ddpmpp-32 width 128 batch {batch} bf16"
            common = dict(images=batch, batch=batch, network="ddpmpp-32 width 128")
            rows.append(Row("step", case, name, [seconds] * 3, launches=100, waits=0, **common))
            rows.append(Row("memory", case, name, [batch * 2.0**25], unit="bytes", **common))
        for name in ("plain", "tcm_fast"):
            case = f"ddpmpp-32 1-step batch {batch} fp16"
            rows.append(Row("sample", case, name, [0.01] * 3, images=batch, batch=batch))
    rows.append(Row("optimizer", "radam step", "tcm_fast", [1e-3] * 3, bytes=10**9))
    part = dict(part="convolution", seconds=0.2, limit=0.1, bytes=10**8, flops=10**12, launches=9,
                bound="matmul")  # fmt: skip
    environment = dict(
        device=device, name="Some GPU", torch="2.13", triton="3.9", python="3.11", threads=2,
        commit="c" * 40, modified=False, driver="999", cuda="13.0", cudnn=91000,
    )  # fmt: skip
    return Results(
        environment, {"quick": False}, Ceilings(4e12, {"bf16": 8e14, "fp32": 5e13}), rows,
        [("qkv", "apex", "needs a GPU")], {"tcm ddpmpp": [part, part | {"part": "whole step"}]},
        ["a note"],
    )  # fmt: skip


def cells(table, first, provider):
    name = ""
    for row in table.rows:
        name = row[0] or name
        if first in name and row[1] == provider:
            return dict(zip(table.head, row, strict=True))
    raise AssertionError(f"no row {first} {provider}")


def test_numbers_of_the_tables():
    found = results()
    ops = report.group_table(found, "ops")
    row = cells(ops, "group_norm_silu", "tcm_fast")
    assert row["median"] == "1 ms"
    assert row["over pytorch"] == "4.00x"
    assert row["of the copy rate"] == "2000 GB/s (50%)"
    assert row["of the product rate"] == ""
    assert cells(ops, "qkv_attention", "tcm_fast")["of the product rate"] == "100 TFLOP/s (12%)"
    assert cells(ops, "pixel", "tcm_fast")["median"] == "WRONG"
    step = cells(report.group_table(found, "step"), "batch 128", "tcm_fast")
    assert step["images/s"] == "512"
    assert step["over official_style"] == "4.00x"
    assert step["waits"] == "0"
    memory = cells(report.group_table(found, "memory"), "batch 128", "tcm_fast")
    assert memory["peak"] == "4.00 GiB"
    (parts,) = report.roofline_tables(found)
    assert parts.rows[0][:5] == ["convolution", "200 ms", "100%", "100 ms", "50%"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5 s"),
        (0.0123, "12.3 ms"),
        (4.5e-5, "45 µs"),
        (3e-8, "0.03 µs"),
        (0.9999, "1 s"),
    ],
)
def test_seconds(value, text):
    assert report.seconds(value) == text


def test_a_cpus_results_say_so():
    found = results("cpu")
    text = report.markdown(found)
    assert "Some GPU (CPU, 2 threads)" in text
    assert "the GPU's kernels were not timed" in text
    assert "driver" not in report.environment_line(found)


class Checker(html.parser.HTMLParser):
    """Every tag is closed, nothing is fetched."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tables, self.figures, self.text = [], 0, 0, []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            outside = name in ("src", "href", "xlink:href") and not value.startswith("#")
            assert not outside, f"{tag} {name}={value} is not in the page"
        if tag not in self.VOID:
            self.open.append(tag)
        self.tables += tag == "table"
        self.figures += tag == "figure"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(page):
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return checker


def test_the_page_is_whole_and_self_contained(tmp_path):
    pytest.importorskip("matplotlib")
    path = report.write(results(), tmp_path / "new" / "folder")
    page = checked(path.read_text(encoding="utf-8"))
    assert page.tables == 7
    assert page.figures == 6
    text = "".join(page.text)
    assert "Nx256x32x32 <odd>" in text  # escaped
    assert "is wrong and was not timed: pixel | norm" in text
    assert "a note" in text
    assert (path.parent / "results.json").is_file()
    markdown = (path.parent / "report.md").read_text(encoding="utf-8")
    assert "pixel \\| norm" in markdown
    assert "1 answers were wrong" in markdown


def test_without_matplotlib_the_page_has_its_tables(tmp_path, monkeypatch):
    for module in (plots, report):
        monkeypatch.setattr(module, "available", lambda: False)
    page = checked(report.page(results()))
    assert page.figures == 0
    assert page.tables == 7
    assert plots.WITHOUT in "".join(page.text)


def test_without_a_roof_or_a_baseline_there_is_still_a_page():
    pytest.importorskip("matplotlib")
    found = results()
    found.ceilings = None
    found.rows = [row for row in found.rows if row.provider == "tcm_fast"]
    checked(report.page(found))
    found.rows, found.roofline = [], {}
    assert checked(report.page(found)).tables == 0


def test_plots_say_what_they_show():
    pytest.importorskip("matplotlib")
    drawn = dict(plots.plots(results()))
    speed_ups = next(svg for caption, svg in drawn.items() if "operations over" in caption)
    assert "times as fast as pytorch" in speed_ups
    for name in ("tcm_fast", "liger"):
        assert name in speed_ups
    assert all(svg.startswith("<svg") for svg in drawn.values())
    assert drawn == dict(plots.plots(results())), "the same results give another picture"


def test_the_terminal_shows_every_group():
    text = report.terminal(results())
    for title in report.TITLES.values():
        assert title in text
    assert "WRONG: tcm_fast: pixel | norm" in text


# ---- the README's table -------------------------------------------------------------------------


def test_the_readmes_table():
    table = readme_table([results(), results("cpu")])
    assert table.startswith(BEGIN)
    assert table.endswith(END)
    assert "| tcm ddpmpp-32 width 128 batch 128 bf16 | official_style | 128 | 1.00x |" in table
    assert "|  | tcm_fast | 512 | 4.00x |" in table
    assert table.count("Some GPU") == 1  # a CPU's results are not for the README
    assert "No result of a GPU has been recorded" in readme_table([results("cpu")])


def test_the_table_goes_between_its_marks(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--readme", str(readme), "--check"]) == 1
    assert "old" in readme.read_text()
    assert main(["--readme", str(readme)]) == 0
    assert re.fullmatch(r"before\n<!-- bench:begin -->\n.*\n<!-- bench:end -->\nafter\n",
                        readme.read_text(), re.DOTALL)  # fmt: skip
    assert "old" not in readme.read_text()
    assert main(["--readme", str(readme), "--check"]) == 0
    for text in ("nothing", f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"):
        readme.write_text(text)
        assert main(["--readme", str(readme)]) == 2
    assert "needs one" in capsys.readouterr().err
    with pytest.raises(ValueError, match="needs one"):
        with_table("", "")


def test_a_report_from_a_file(tmp_path, capsys):
    results().save(tmp_path / "r.json")
    assert main([str(tmp_path / "r.json"), "--out", str(tmp_path / "page")]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main([str(tmp_path / "missing.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_readmes_table_is_of_the_recorded_results():
    """`python -m tcm_fast.benchmarks.report --readme README.md` renews it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if BEGIN not in text:
        pytest.skip("README.md has no marks for the table")
    assert with_table(text, readme_table(recorded())) == text


def test_recorded_files_of_other_kinds_are_passed_over(tmp_path):
    (tmp_path / "step_cpu.json").write_text('{"machine_info": {}}')
    results().save(tmp_path / "h200.json")
    assert len(recorded(tmp_path)) == 1
    assert recorded() == [r for r in recorded() if r.rows]
