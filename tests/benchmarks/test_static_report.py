"""The report of what the compilers make of the kernels."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tcm_fast.benchmarks import static_report
from tcm_fast.benchmarks.static_report import (
    ARCHS,
    OPERATIONS,
    SM,
    access_bytes,
    module_of,
    resident,
    sources_hash,
    summary,
    tasks_for,
)
from tcm_fast.kernels import _backend

CSRC = Path(__file__).parents[2] / "csrc"
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "static_report.json"


def test_widths_of_accesses():
    names = ("LDG.E.128", "STG.E.64.STRONG.GPU", "LDG.E.U16.CONSTANT", "LDG.E.U8", "STG.E")
    assert [access_bytes(name) for name in names] == [16, 8, 2, 1, 4]


def test_resident_programs():
    assert resident(90, 32, 0, 4) == 16  # 2048 threads in programs of 128
    assert resident(90, 255, 0, 8) == 1  # 65536 registers
    assert resident(86, 32, 49 << 10, 4) == 2  # 100 KB of shared memory
    assert resident(90, 16, 0, 1) == 32


@pytest.mark.parametrize("operation", OPERATIONS)
def test_variants_name_the_kernels_arguments(operation):
    pytest.importorskip("triton")
    for arch in ARCHS:
        for variant in module_of(operation).specialisations(arch):
            names = list(variant.kernel.arg_names)
            given = [*variant.signature, *variant.constants]
            assert sorted(given) == sorted(names), variant.site
            assert variant.aligned <= set(variant.signature)


def test_the_recorded_report_is_of_these_sources_and_clean():
    """`python -m tcm_fast.benchmarks.static_report --out benchmarks/results/static_report.json` writes
    it anew."""
    recorded = json.loads(RESULT.read_text())
    changed = [name for name in OPERATIONS if recorded["sources"].get(name) != sources_hash(name)]
    assert not changed, "these kernels have changed since the report"
    rows = recorded["rows"]
    if CSRC.is_dir():  # not beside a wheel
        assert recorded["sources"]["_C"] == _backend.sources_hash(CSRC), "csrc/ has changed since"
    assert {row["arch"] for row in rows if row["operation"] == "_C"} == set(ARCHS)
    for operation in OPERATIONS:
        found = [(row["arch"], row["site"]) for row in rows if row["operation"] == operation]
        assert len(found) == len(tasks_for(operation, list(ARCHS)))
        assert {arch for arch, _ in found} == set(ARCHS)
    assert not [row for row in rows if "error" in row]
    assert all(row["shared_bytes"] <= SM[row["arch"]][1] for row in rows)
    assert all(row["spill_bytes"] == 0 for row in rows if row["operation"] in CLEAN)
    for row in rows:  # fp32 attention alone may spill: its products are sums of three
        if row["arch"] in (80, 90) and row.get("site", "").startswith(
            ("ddpmpp", "DDPM++", "EDM2-S")
        ):
            is_wide = row["operation"] == "qkv_attention" and "fp32" in row["site"]
            assert row["spill_bytes"] == 0 or is_wide, row
    for operation in ("group_norm_silu", "qkv_attention"):
        # What is narrower are statistics and operands of [N,C], read once where the image is read in
        # tiles, but an instruction like another here.
        shares = [row["wide_share"] for row in rows if row["operation"] == operation]
        assert statistics.median(shares) >= 0.9
        assert min(shares) >= 0.75
    assert "registers" not in summary(rows)  # a table, not a dump


CLEAN = ("consistency_loss", "noise_pair", "denoise_to_uint8", "_C")


@pytest.mark.slow
def test_small_kernels_compile_without_spills(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for only in ("loss", "noise", "uint8"):
        out = tmp_path / f"{only}.json"
        command = [sys.executable, "-m", "tcm_fast.benchmarks.static_report", "--only", only]
        command += ["--archs", "80", "90", "--jobs", "2", "--out", str(out)]
        subprocess.run(command, check=True, env=environment, timeout=1800)
        rows = json.loads(out.read_text())["rows"]
        assert {row["arch"] for row in rows} == {80, 90}
        assert all(row["spill_bytes"] == 0 for row in rows)


FORMERLY_FAILED = """
import json
from tcm_fast.benchmarks.static_report import compile_variant, module_of, tasks_for

rows = []
for task in tasks_for("qkv_attention", [80, 90]):
    site = module_of("qkv_attention").specialisations(task[0])[task[2]].site
    if site in ("DDPM++ 8x8 bf16", "ADM 16x16 bf16") and (task[0] == 90 or "DDPM" in site):
        rows.append(compile_variant(*task, True))
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_attention_compiles_with_the_installed_triton():
    """Triton 3.5 and 3.6 refused a reshape before a product on sm_90, and up to 3.7 they need more shared
    memory on sm_80."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FORMERLY_FAILED]
    run = subprocess.run(command, check=True, env=environment, capture_output=True, timeout=1200)
    rows = json.loads(run.stdout)
    assert [row["arch"] for row in rows] == [80] * 2 + [90] * 4
    assert not [row for row in rows if "error" in row]


def test_a_check_names_what_does_not_compile(monkeypatch, capsys):
    pytest.importorskip("triton")
    rows = [{"arch": 90, "kernel": "_k", "site": "8x8", "operation": "residual"}]
    rows.append(rows[0] | {"arch": 80, "error": "PassManager::run failed"})
    given = []

    def report(*arguments):
        given.append(arguments)
        return {"rows": rows, "sources": {}, "versions": {"triton": "3.6.0"}}

    monkeypatch.setattr(static_report, "report", report)
    monkeypatch.setattr(sys, "argv", ["static_report", "--check", "--archs", "80", "90"])
    assert static_report.main() == 1
    assert given == [([80, 90], "", None, True)]
    printed = capsys.readouterr().out
    assert printed == "sm_80 _k 8x8: PassManager::run failed\nTriton 3.6.0: 1 of 2 compile\n"


def test_an_interpreting_process_refuses(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tcm_fast.benchmarks.static_report"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert ended.returncode == 2
    assert "an interpreting process cannot compile" in ended.stdout
