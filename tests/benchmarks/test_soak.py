"""The soak's judgement, and a short one."""

import json
import math

import pytest

from tcm_fast.benchmarks import soak


def sample(i, rss=1e9, files=20, threads=4):
    return {"rss": rss, "files": files, "threads": threads}


def test_growth_is_seen():
    """A leak of 5 % is; memory that rises before the second quarter, or breathes, is not."""
    steady = [sample(i, rss=1e9 * (1 + 0.01 * math.sin(i) - (i < 20) * 0.5)) for i in range(100)]
    found = soak.evaluate(steady)
    assert all(found[key]["flat"] for key in ("rss", "files", "threads"))
    leaking = soak.evaluate([sample(i, rss=1e9 + 1e6 * i) for i in range(100)])
    assert not leaking["rss"]["flat"]
    assert leaking["rss"]["growth"] == pytest.approx(0.05, abs=0.01)
    assert not soak.evaluate([sample(i, files=20 + i // 30) for i in range(100)])["files"]["flat"]
    assert not soak.evaluate([sample(i, threads=4 + i // 50) for i in range(100)])["threads"][
        "flat"
    ]
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        soak.evaluate([sample(0)] * 3)


def test_shares_of_time(tmp_path):
    events = [
        {"event": "train", "images": 64},
        {"event": "saved", "seconds": 3.0},
        {"event": "spent", "training": 100.0, "checks": 0.5, "logging": 0.25, "saving": 0.0},
        {"event": "spent", "training": 99.0, "checks": 1.0, "logging": 0.5, "saving": 1.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    found = soak.shares(tmp_path / "log.jsonl")
    assert found["share"] == pytest.approx(2.5 / 200)
    assert (found["saves"], found["background_seconds"], found["images"]) == (1, 3.0, 64)


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    """Nothing grows but what is imported and built in the first seconds."""
    found = soak.soak(0.5, 0.5, tmp_path)
    assert found["samples"] >= 8
    assert found["time"]["images"] > 0
    assert found["files"]["most"] < 60
    assert 0 <= found["time"]["share"] < 0.2
