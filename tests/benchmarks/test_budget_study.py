"""A recipe run and judged: the shortest one there is."""

import json
import sys

import numpy as np
import pytest

from tcm_fast.benchmarks import budget_study
from tcm_fast.training import time_budget


@pytest.mark.slow
def test_a_minute(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    data = tmp_path / "images.npz"
    np.savez(data, images=rng.integers(0, 256, (300, 8, 8, 1), np.uint8), labels=np.arange(300) % 3)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results" / "recipe.json"
    arguments = ["--data", str(data), "--preset", "digits", "--minutes", "2", "--num", "32"]
    arguments += ["--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["budget_study", *arguments])
    monkeypatch.setattr(time_budget, "FEWEST_STEPS", 2)  # however slow the machine
    budget_study.main()
    record = json.loads(out.read_text())
    assert {row["phase"] for row in record["rows"]} == {"edm", "ect", "tcm"}
    assert {row["phase"] for row in record["control"]} == {"ect"}
    last = {row["phase"]: row["images"] for row in record["rows"]}
    assert record["control"][-1]["images"] == last["tcm"]
    times = [row["seconds"] for row in record["rows"]]
    assert times == sorted(times)
    assert all(row["frechet_1"] > 0 for row in record["rows"] if row["phase"] != "edm")
    assert record["seconds"].keys() == {"run", "control"}
    for name in ("recipe.png", "recipe_1_step.png", "recipe_2_step.png"):
        assert (out.parent / name).stat().st_size > 1000
    table = capsys.readouterr().out
    assert "| stage 1 continued |" in table
    assert "| stage 2 |" in table
