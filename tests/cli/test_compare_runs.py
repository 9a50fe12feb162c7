"""`tcm-fast compare`: verdicts on trained runs, the grid, mistakes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import tiny, train, write_images

from tcm_fast.cli.compare import names_of, verdict
from tcm_fast.cli.main import main
from tcm_fast.config import load_preset
from tcm_fast.evaluation.repeats import Difference


def run(*argv):
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv), "--device", "cpu"])
    return end.value.code


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    images = write_images(folder)
    for seed, out in enumerate(("a/run", "b/run")):
        train(tiny(images, phases=["ect"], seed=seed), folder / out)
    return folder


def test_two_runs_and_their_grid(runs, tmp_path, capsys):
    out = tmp_path / "both.png"
    command = ["compare", runs / "a/run", runs / "b/run", "--features", "random", "--out", out]
    assert run(*command, "--seeds", 3, "--num", 30) == 0
    shown = capsys.readouterr().out
    assert "3 × 30 samples of the same noise" in shown
    for row in ("a/run", "b/run"):
        assert re.search(rf"{row}.* ± .* ± ", shown)
    assert "are not told apart" in shown
    assert f"{out}: rows of a/run, b/run in turn, of the same noise" in shown
    width, height = Image.open(out).size
    assert width / 16 == pytest.approx(height / 6, rel=0.05)
    assert run(*command) == 2
    assert "both.png exists" in capsys.readouterr().err


def test_mistakes(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = runs / "a/run", runs / "b/run"
    for argv, message in [
        ((a,), "compare: needs at least two runs, got 1"),
        ((a, a, "--features", "random"), "compare: needs different runs"),
        ((a, b, "--seeds", 1), "seeds: must be at least 2, got 1"),
        ((a, b, "--num", 1), "num: must be at least 2"),
        ((a, b, "--training-spread", -1), "training_spread: must not be negative, got -1"),
    ]:
        assert run("compare", *argv) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/log.jsonl").touch()
    (tmp_path / "other/config.json").write_text(
        (b / "config.json").read_text().replace("images.npz", "x.npz")
    )
    assert run("compare", a, tmp_path / "other") == 2
    assert re.search(
        r"the runs need the same data, got .*x\.npz; give --data", capsys.readouterr().err
    )
    assert not (tmp_path / "comparison.png").exists()


def test_names_are_as_long_as_they_have_to_be():
    assert names_of((Path("runs/a"), Path("runs/b"))) == ["a", "b"]
    assert names_of((Path("x/a"), Path("y/a"))) == ["x/a", "y/a"]
    assert names_of((Path("a"), Path("y/a"))) == ["a", "y/a"]


def test_verdicts():
    far, near, same = (Difference(value, 1.0, 4.0) for value in (5.0, 3.0, 0.5))
    assert verdict("a", "b", far, "shift").startswith(
        "a is worse than b: by 5.000 in shift, more than"
    )
    assert "not told apart as recipes" in verdict("a", "b", near, "shift")
    assert "which other samples may undo" in verdict("a", "b", same, "shift")
    assert "b is better by 5000.000 in KID × 1000, a in Fréchet distance" in verdict(
        "a", "b", far, "KID", ["Fréchet distance"]
    )


@pytest.mark.slow
def test_half_the_images_are_worse_and_another_seed_is_not(tmp_path, capsys):
    preset = load_preset("digits")
    for name, seed, images in (("whole", 0, 16_000), ("seed", 1, 16_000), ("half", 0, 8000)):
        phase = {"images": images}
        config = replace(
            preset, phases=("edm", "ect"), seed=seed, eval=replace(preset.eval, features=""),
            edm=replace(preset.edm, warmup_images=6400, **phase), ect=replace(preset.ect, **phase),
        )  # fmt: skip
        train(config, tmp_path / name)
    command = ["compare", "--features", "digits", "--seeds", 3, "--out", tmp_path / "grid.png"]
    assert run(*command, tmp_path / "whole", tmp_path / "half", tmp_path / "seed") == 0
    shown = capsys.readouterr().out
    best = re.search(r"half is worse than (whole|seed): by", shown)[1]
    other = {"whole": "seed", "seed": "whole"}[best]
    assert f"{other} and {best} are not told apart" in shown
