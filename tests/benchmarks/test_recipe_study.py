"""The study of recipes: its table, what makes it go on, its page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tcm_fast.benchmarks import recipe_report, recipe_study
from tcm_fast.benchmarks.recipe_arms import ARMS, SETTINGS, STAGE, Arm, Table
from tcm_fast.benchmarks.recipe_study import folder_of, study
from tcm_fast.evaluation.metrics import FRECHET, KERNEL
from tcm_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
DIGITS = [arm for arm in ARMS if arm.setting == "digits"]


# ---- the table ----------------------------------------------------------------------------------


def test_arms_come_after_those_that_they_need():
    seen = set()
    for arm in ARMS:
        assert arm.setting in SETTINGS
        assert (arm.setting, arm.name) not in seen
        for needed in filter(None, (arm.after, arm.against)):
            assert (arm.setting, needed) in seen
        seen.add((arm.setting, arm.name))


def test_a_seed_is_done_before_the_next_begins():
    order = [*Table().order(2)]
    assert (
        len(order) == len({(arm.setting, arm.name, seed) for arm, seed in order}) == 2 * len(ARMS)
    )
    count = len(DIGITS)
    assert [seed for _, seed in order[: 2 * count]] == [0] * count + [1] * count
    assert [arm for arm, _ in order[count : 2 * count]] == DIGITS


def own_passes(table, arm):
    before = table.before(arm)
    return table.passes(arm) - (table.passes(before) if before else 0)


@pytest.mark.parametrize(
    "arm",
    [a for a in ARMS if a.against and (a.setting == "digits" or a.table.startswith("batch"))],
    ids=lambda a: a.name,
)
def test_what_is_compared_has_taken_equal_arithmetic(arm):
    table = Table()
    beside = table.find(arm.setting, arm.against)
    assert own_passes(table, arm) == pytest.approx(own_passes(table, beside), rel=0.012)


def test_arithmetic_counts_forward_backward_and_targets():
    arms = (
        Arm("digits", "a", "", {"edm": 640}),
        Arm("digits", "b", "", {"ect": 640}, "a", {"ect.q": 1e9, "ect.max_ratio": 0.9}),
        Arm("digits", "c", "", {"edm": 64, "tcm": 128}, "b"),
    )
    table = Table((arms,))
    assert table.passes(arms[0]) == 3 * 640
    assert table.passes(arms[1]) == 3 * 640 + 4 * 640  # every target takes a network
    taught = replace(arms[1], teacher={"ect": 1.5})
    assert table.passes(taught) == 3 * 640 + 5.5 * 640
    late = {"ect.max_ratio": 1e-9, "tcm.max_ratio": 1e-9}  # r = r_min: every target is an image
    table = Table((tuple(replace(arm, changes=late) for arm in arms),))
    assert [table.passes(arm) for arm in table.arms] == [1920, 3840, 3840 + 3 * 192]


def test_changes_are_fields_and_seeds_add():
    table = Table()
    config = table.config(table.find("digits", "t0.5-scale1"), 2)
    assert (config.tcm.t_prime, config.tcm.t_mean, config.tcm.t_std) == (0.5, np.log(0.5), 1.0)
    assert (config.seed, config.phases, config.tcm.images) == (2, ("tcm",), STAGE)
    assert table.config(table.find("digits", "continued"), 2).seed == 1002
    arm = table.find("cifar16", "cmt-tcm-32-manifold")
    config = table.config(arm, 0, features="features.safetensors")
    assert (config.tcm.distance, config.tcm.features) == ("manifold", "features.safetensors")
    assert (config.tcm.batch_size, config.cmt.batch_size, config.tcm.q) == (32, 32, 4096)
    with pytest.raises(ValueError, match="no field t_primes"):
        table.config(replace(DIGITS[0], changes={"tcm.t_primes": 1.0}), 0)
    with pytest.raises(ValueError, match="phase: unknown, did you mean 'edm'"):
        Arm("digits", "a", "", {"edn": 1})


# ---- going on -----------------------------------------------------------------------------------


@pytest.fixture
def beginning():
    """Pre-training and stage 1 of the digits, on next to nothing."""
    return Table((tuple(replace(arm, denoises=False) for arm in DIGITS[:2]),)).shortened()


def test_what_is_done_is_not_done_again(beginning, tmp_path, monkeypatch, capsys):
    study(beginning, tmp_path, None, seeds=1)
    found = recipe_study.results(beginning, tmp_path, 1)
    assert [row["arm"] for row in found] == ["pretrained", "stage1"]
    assert [*found[1]["distances"]] == ["1", "2"]
    assert len(found[1]["distances"]["2"][KERNEL]) == 2
    result = folder_of(tmp_path, beginning.arms[1], 0) / recipe_study.RESULT
    whole = result.read_bytes()
    result.unlink()  # as if it had been stopped while it was judged
    trained = []
    monkeypatch.setattr(Trainer, "step", lambda self, phase: trained.append(phase))
    study(beginning, tmp_path, None, seeds=1)
    assert not trained
    again, before = json.loads(result.read_bytes()), json.loads(whole)
    assert again["distances"] == before["distances"]
    study(beginning, tmp_path, None, seeds=1)
    assert capsys.readouterr().out.count("stage1 0: Fréchet distance") == 2


def test_a_feature_network_is_made_for_those_that_need_one(beginning, tmp_path):
    (of_cifar,) = (a for a in ARMS if a.name == "ect-32-manifold")
    changes = of_cifar.changes | {"ect.batch_size": 64}
    arm = Arm("digits", "manifold", "", {"ect": 64}, "pretrained", changes)
    table = Table(((beginning.arms[0], arm),), beginning.settings)
    study(table, tmp_path, None, seeds=2)
    file = tmp_path / "images" / "features-8.safetensors"
    assert file.exists()
    for seed in range(2):
        config = json.loads((folder_of(tmp_path, arm, seed) / "config.json").read_text())
        assert config["ect"]["features"] == str(file)
    study(table, tmp_path, None, seeds=2)  # a file elsewhere is no other recipe
    assert len(recipe_study.results(table, tmp_path, 2)) == 4


def test_no_time_and_other_recipes(beginning, tmp_path, capsys):
    study(beginning, tmp_path, None, seeds=1, budget=0.0)
    assert "the same command goes on" in capsys.readouterr().out
    assert not recipe_study.results(beginning, tmp_path, 1)
    arm = beginning.arms[0]
    folder = folder_of(tmp_path, arm, 0)
    folder.mkdir(parents=True)
    other = {"seed": 5, "stop_after": 1.0, "data": {"source": "elsewhere"}}
    (folder / "config.json").write_text(json.dumps(other))
    (folder / recipe_study.RESULT).write_text("{}")
    with pytest.raises(ValueError, match=r"is of another recipe \(seed 5 -> 0\), remove it"):
        study(beginning, tmp_path, None, seeds=1)


# ---- the page -----------------------------------------------------------------------------------


def record(setting="digits"):
    """Results in which stage 2 is better by a fifth in every seed, and t' = 0.5 in two of three."""

    def row(arm, seed, kid):
        found = {KERNEL: [kid, kid + 0.002], FRECHET: [10 * kid, 10 * kid]}
        steps = ("heun",) if arm == "pretrained" else ("1", "2")
        return {"setting": setting, "arm": arm, "seed": seed, "passes": 2_500_000,
                "distances": dict.fromkeys(steps, found)}  # fmt: skip

    rows = []
    for seed, size in enumerate((1.0, 1.1, 1.2)):
        rows += [row("pretrained", seed, 0.1), row("stage1", seed, size)]
        rows += [row("continued", seed, size), row("stage2", seed, 0.8 * size)]
        rows += [row("t0.5-scale1", seed, (0.7, 0.8, 1.1)[seed])]
        rows[-4]["denoising"] = {"0.5": 1.0 + seed, "80": 4.0 + 4 * seed}
    real = {setting: {KERNEL: 0.01, FRECHET: 0.2}}
    return {"what": "", "commit": "abcdef123", "torch": "2", "machine": "a CPU", "real": real,
            "rows": rows, "pictures": {setting: ["stage 1", "stage 2"]}}  # fmt: skip


def test_tables_have_means_errors_and_verdicts(tmp_path):
    page = tmp_path / "docs" / "page.md"
    text = recipe_report.block(record("cifar16"), tmp_path / "results" / "study.json", page)
    assert "| stage 1 | 2.50 M | 1,101 ± 100 | 1,101 ± 100 | 11.0 ± 1.0 | 11.0 ± 1.0 |" in text
    assert "| pre-training, 18 Heun steps | 2.50 M | 101 ± 0 |  | 1.00 ± 0.00 |  |" in text
    assert "| training images | | 10.0 | | 0.200 | |" in text
    assert "sets of samples of one network is 1.41" in text
    better = [line for line in text.splitlines() if line.endswith("better |")]
    assert len(better) == 2
    assert better[0].startswith(
        "| stage 2, t′ = 1, scale 0.2 | stage 1 continued | 1 step | -20 % | "
    )
    assert "| 3 of 3 seeds | better |" in better[0]
    assert text.count("| not told apart |") == 2  # t' = 0.5
    assert "![samples](../results/study_cifar16.png)" in text
    assert "| CIFAR-10 at 16×16 | 25% | 100% |" in text
    assert "| KID | 95 % interval |" in text
    heads = [
        text.index(head) for head in ("### CIFAR-10", recipe_report.TABLES["laws"], "### One-call")
    ]
    assert heads == sorted(heads)
    assert (
        text[heads[1] :].count("| stage 2, t′ = 1, scale 0.2 | 2.50 M |") == 1
    )  # what they stand beside
    digits = recipe_report.block(record(), tmp_path / "study.json", page)
    assert "| Fréchet distance | 95 % interval |" in digits


def test_seeds_that_are_missing_are_said_and_nothing_is_compared_with_one(tmp_path):
    partial = record()
    partial["rows"] = [row for row in partial["rows"] if row["seed"] == 0]
    text = recipe_report.block(partial, tmp_path / "study.json", tmp_path / "page.md")
    assert "| stage 2, t′ = 1, scale 0.2 (1 seed) | 2.50 M | 801 |" in text
    assert "verdict" not in text


def test_the_page_is_renewed_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    out, page = tmp_path / "study.json", tmp_path / "page.md"
    out.write_text(json.dumps(record()))
    page.write_text(f"before\n{recipe_report.BEGIN}\nwas there\n{recipe_report.END}\nafter\n")
    recipe_report.renew(out, page)
    once = page.read_text(encoding="utf-8")
    assert once.startswith(f"before\n{recipe_report.BEGIN}\n")
    assert once.endswith(f"{recipe_report.END}\nafter\n")
    assert "was there" not in once
    recipe_report.renew(out, page)
    assert page.read_text(encoding="utf-8") == once
    assert (tmp_path / "study_denoising.png").stat().st_size > 1000
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs one"):
        recipe_report.renew(out, page)


def test_the_site_has_the_page_of_the_results():
    out, page = ROOT / "benchmarks/results/recipe_study.json", ROOT / "docs/study.md"
    text = page.read_text(encoding="utf-8")
    kept = text[
        text.index(recipe_report.BEGIN) : text.index(recipe_report.END) + len(recipe_report.END)
    ]
    assert kept == recipe_report.block(json.loads(out.read_text(encoding="utf-8")), out, page)
    pictures = sorted(out.parent.glob("recipe_study_*.png"))
    assert all(f"results/{picture.name}" in text for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) < 300_000


def test_results_are_not_dropped(tmp_path, monkeypatch, capsys):
    """Runs elsewhere do not empty a file of results; a folder without images is refused at once."""
    out = tmp_path / "study.json"
    out.write_text(json.dumps(record()))
    command = ["recipe_study", "--runs", str(tmp_path / "runs"), "--out", str(out), "--budget", "0"]
    for more, message in (
        ([], "lacks 15 results"), (["--data", str(tmp_path)], "must have train and test"),
        (["--budget", "-1"], "must not be negative"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit):
            recipe_study.main()
        assert message in capsys.readouterr().err
    assert json.loads(out.read_text()) == record()


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    arguments = ["--quick", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["recipe_study", *arguments])
    monkeypatch.chdir(tmp_path)
    recipe_study.main()
    folder = tmp_path / "runs/recipe_study/quick"
    rows = json.loads((folder / "recipe_study.json").read_text())["rows"]
    assert {row["arm"] for row in rows} == {arm.name for arm in DIGITS}
    assert {row["setting"] for row in rows} == {"digits"}
    page = (folder / "study.md").read_text(encoding="utf-8")
    assert "stage 2, t′ = 0.5, scale 1 (1 seed)" in page
    assert (folder / "recipe_study_digits.png").exists()
    assert not (tmp_path / "docs").exists()
    (folder / "study.md").write_text(page.replace("stage 2", "stage 9"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["recipe_study", "--report", *arguments])
    recipe_study.main()
    assert (folder / "study.md").read_text(encoding="utf-8") == page
