"""The suite from end to end on small things: what it times, what it refuses to time, what it says."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from tcm_fast.benchmarks import official, optimizers, suite, suite_operations, suite_steps
from tcm_fast.benchmarks.cases import DIGITS, NetworkShape, cases
from tcm_fast.benchmarks.check import Provider
from tcm_fast.benchmarks.compare import compare
from tcm_fast.benchmarks.measure import Pace
from tcm_fast.benchmarks.peers import BASELINE, OURS, providers
from tcm_fast.benchmarks.results import GROUPS, Results, Row, load
from tcm_fast.benchmarks.settings import Settings
from tcm_fast.benchmarks.steps import (
    OurStep,
    SampleCase,
    StepCase,
    check_networks,
    official_style_step,
    published_precision,
    sample_providers,
    step_cases,
    step_providers,
)
from tcm_fast.benchmarks.validate import TINY, tiny_cases
from tcm_fast.planning.throughput import Ceilings

pytest.importorskip("triton")


class Quick(Settings):
    """Settings that take next to no time."""

    @property
    def pace(self):
        return Pace(warm_up=0.0, rounds=4)


@pytest.fixture
def small(monkeypatch):
    """Every group on networks of a few thousand weights."""
    case = StepCase(TINY, 8)
    monkeypatch.setattr(suite_steps, "step_cases", lambda device, quick: [case])
    monkeypatch.setattr(suite_steps, "memory_cases", lambda settings: [case])
    monkeypatch.setattr(suite_steps, "roofline_cases", lambda settings: [case])
    monkeypatch.setattr(suite_steps, "sample_cases", lambda device, quick: [SampleCase(TINY, 2, 1)])
    for module in (suite_operations, suite_steps):
        monkeypatch.setattr(module, "NARROW", TINY)
    monkeypatch.setattr(suite, "validate_interpreted", lambda: "kernels: right, not timed")
    sizes = (torch.Size((64, 3, 3, 3)), torch.Size((64,)))
    monkeypatch.setattr(optimizers, "network_shapes", lambda *_, **__: sizes)
    ceilings = Ceilings(1e10, {"fp32": 1e11})
    monkeypatch.setattr(suite, "measure_ceilings", lambda device, quick: ceilings)
    return Quick(quick=True)


def test_the_whole_suite(small):
    said = []
    results = suite.run(small, say=said.append)
    assert {row.group for row in results.rows} == set(GROUPS)
    assert not results.wrong
    assert all(row.samples for row in results.rows)
    for group in GROUPS:
        names = {row.provider for row in results.rows if row.group == group}
        assert OURS in names
        assert len(names) > 1, f"{group} has nothing to compare with"
    assert len({row.key for row in results.rows}) == len(results.rows)
    (parts,) = results.roofline.values()
    assert parts[-1]["part"] == "whole step"
    assert "kernels: right, not timed" in results.notes
    assert any("GPU" in why for *_, why in results.skipped)
    ours, style = (
        next(r for r in results.rows if r.group == "step" and r.provider == name)
        for name in (OURS, "official_style")
    )
    assert ours.waits == 0 < style.waits
    assert ours.launches < style.launches
    assert ours.images == 8


def test_only_what_is_asked_for(small):
    results = suite.run(dataclasses.replace(small, groups=("ops",), only="qkv_attention"))
    assert {row.operation for row in results.rows} == {"qkv_attention"}


def test_a_run_that_is_cut_keeps_what_it_has_measured(small, tmp_path):
    path, counts = tmp_path / "results.json", []

    def save(results):
        results.save(path)
        counts.append(len(results.rows))
        if len(counts) == 3:
            raise KeyboardInterrupt

    groups = ("sample", "memory", "optimizer")
    with pytest.raises(KeyboardInterrupt):
        suite.run(dataclasses.replace(small, groups=groups), say=lambda _: None, save=save)
    assert 0 < counts[0] < counts[1] < counts[2] == len(load(path).rows)
    assert [path] == list(tmp_path.iterdir())


SITE = next(c for c in cases([DIGITS], [2], [torch.float32]) if c.operation == "qkv_attention")


def rows_with(change, **settings):
    """Operation rows with our provider replaced."""
    candidates = [
        dataclasses.replace(p, make=change(p.make)) if p.name == OURS else p
        for p in providers(SITE, "cpu")
    ]
    rows = suite_operations.operation_rows(SITE, candidates, Quick(), [])
    return Results({"name": "x", "device": "cpu", "threads": 1}, {}, rows=rows)


def honest(function):
    return function


def wrong(function):
    return lambda **inputs: 1.01 * function(**inputs)


def slow(function):
    def twice(**inputs):
        for _ in range(20):  # far from any noise
            function(**inputs)
        return function(**inputs)

    return twice


def test_a_wrong_answer_is_not_timed_and_closes_the_gate():
    before, after = rows_with(honest), rows_with(wrong)
    for row in after.rows:
        if row.provider == OURS:
            assert not row.samples
            assert "is off by" in row.wrong
        else:
            assert row.samples
    failures = compare(before, after).failures
    assert {(f.provider, f.verdict) for f in failures} == {(OURS, "wrong")}


def test_a_planted_slow_down_is_measured():
    medians = {}
    for change in (honest, slow):
        rows = rows_with(change).rows
        found = {row.provider: row for row in rows if row.direction == "forward"}
        medians[change] = found[OURS].median / found[BASELINE].median
    assert medians[slow] > 2 * medians[honest]  # by 21 on a machine at rest


def test_a_peer_that_cannot_do_a_site_is_skipped():
    def refuses(**_):
        raise RuntimeError("no kernel for this")

    skipped = []
    rows = suite_operations.operation_rows(SITE, [Provider("peer", refuses)], Quick(), skipped)
    assert not rows
    assert skipped[0][1:] == ("peer", "RuntimeError: no kernel for this")


def test_sums_need_every_site():
    def row(case, provider, samples, count):
        return Row(
            "ops", case, provider, samples, operation="op", network="net", count=count, bytes=10
        )

    rows = [
        row("a", "x", [1.0, 2.0], 3),
        row("b", "x", [10.0, 20.0], 1),
        row("a", "y", [5.0, 5.0], 3),
    ]
    (total,) = suite_operations.network_sums(rows)
    assert total.samples == [13.0, 26.0]
    assert total.bytes == 40
    assert "all 4 calls of net" in total.case
    assert not suite_operations.network_sums(rows[:1])


# ---- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["edm", "ect", "tcm"])
def test_the_official_styles_step_of_each_phase_trains(phase):
    case = StepCase(TINY, 8, phase=phase)
    assert not check_networks(case)
    for name, (make, gap) in step_providers(case).items():
        if not gap:
            step = make()
            step()
            step()
            assert name


def test_our_step_trains():
    step = OurStep(StepCase(TINY, 8))
    before = [p.detach().clone() for p in step.net.parameters()]
    stats = [step() for _ in range(3)]
    assert torch.stack(stats).isfinite().all()
    assert any((a != b).any() for a, b in zip(before, step.net.parameters(), strict=True))
    assert step.count == 3


def test_a_step_that_fails_costs_no_other_its_numbers(small, monkeypatch):
    def fails():
        raise RuntimeError("no graph\nhere")

    real = step_providers(StepCase(TINY, 8))
    broken = {"official_style": (lambda: fails, ""), "tcm_fast unsplit": (fails, "")}
    monkeypatch.setattr(suite_steps, "step_providers", lambda case: real | broken)
    results = suite.run(dataclasses.replace(small, groups=("step",)), say=lambda _: None)
    rows = {row.provider: row for row in results.rows}
    assert rows["tcm_fast"].samples
    assert rows["tcm_fast unsplit"].wrong == "RuntimeError: no graph here"
    assert "official_style" not in rows
    assert ("official_style", "RuntimeError: no graph here") in [s[1:] for s in results.skipped]


def test_a_network_that_differs_is_found(monkeypatch):
    case = StepCase(TINY, 8)
    build = StepCase.build

    def changed(self):
        net = build(self)
        net.sigma_data = 0.6
        return net

    monkeypatch.setattr(StepCase, "build", changed)
    assert "differs by" in check_networks(case)


TINY_EDM2 = NetworkShape(
    "edm2", 8, 3,
    (("model_channels", 16), ("channel_mult", (1, 2)), ("num_blocks", 1), ("attn_resolutions", (4,)),
     ("channels_per_head", 16)),
    label_dim=5,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_edm2s_steps_train(precision):
    case = StepCase(TINY_EDM2, 8, precision)
    assert not check_networks(case)
    step = OurStep(case)
    assert torch.stack([step() for _ in range(2)]).isfinite().all()
    style = official_style_step(case, precision=precision)
    style()
    style()
    assert published_precision(TINY_EDM2) == "fp16"
    for draw in sample_providers(SampleCase(TINY_EDM2, 3, 1)).values():
        assert draw().shape == (3, 8, 8, 3)


def test_a_network_without_an_official_style_says_so():
    case = StepCase(dataclasses.replace(TINY, name="adm"), 8)
    assert "has no adm" in step_providers(case)["official_style"][1]
    with pytest.raises(ValueError, match="has no adm"):
        official_style_step(case)


def test_samplers_draw_bytes():
    for draw in sample_providers(SampleCase(TINY, 3, 2)).values():
        images = draw()
        assert images.shape == (3, 8, 8, 3)
        assert images.dtype == torch.uint8


def test_a_gpus_cases_are_the_recipes():
    names = [str(case) for case in step_cases("cuda")]
    assert len(names) == len(set(names))
    for phase in ("edm", "ect", "tcm"):
        for precision in ("fp32", "tf32", "fp16", "bf16"):
            assert f"{phase} ddpmpp-32 width 128 batch 512 {precision}" in names
    assert len(step_cases("cuda", quick=True)) < len(names) / 4


# ---- kernels without a GPU ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_gpus_cases_are_validated_in_the_interpreter():
    sentence = suite.validate_interpreted()
    assert "are right at tiny sizes" in sentence
    assert "nothing of them was timed" in sentence
    operations = {case.operation for case in tiny_cases()}
    assert operations >= {"group_norm_silu", "qkv_attention", "consistency_loss", "noise_pair"}


def test_a_wrong_kernel_is_found_in_the_interpreter():
    """Its softmax's scale is off."""
    code = (
        "import functools, importlib\n"
        "m = importlib.import_module('tcm_fast.kernels.qkv_attention')\n"
        "f = m.qkv_attention\n"
        "def g(qkv, num_heads, **k): return f(qkv, num_heads, **(k | {'scale': 1.0}))\n"
        "m.qkv_attention = functools.wraps(f)(g)\n"
        "from tcm_fast.benchmarks import validate\n"
        "cases = validate.tiny_cases()\n"
        "validate.tiny_cases = lambda: [c for c in cases if c.operation == 'qkv_attention'][:1]\n"
        "assert validate.tiny_cases()\n"
        "raise SystemExit(validate.main())"
    )
    variables = {"TRITON_INTERPRET": "1", "TCM_FAST_BACKEND": "kernel", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert ran.returncode == 1, ran.stderr
    assert "answers are wrong in the interpreter" in ran.stdout


# ---- the published code -------------------------------------------------------------------------

FAKE_TCM = {
    "dnnlib/__init__.py": "",
    "torch_utils/__init__.py": "",
    "training/__init__.py": "",
    "training/networks.py": (
        "import torch\n"
        "class ECMPrecond(torch.nn.Module):\n"
        "    def __init__(self, img_resolution, img_channels, label_dim, use_fp16, model_type, **kwargs):\n"
        "        super().__init__()\n"
        "        assert model_type == 'SongUNet' and not use_fp16\n"
        "        self.conv = torch.nn.Conv2d(img_channels, img_channels, 3, padding=1)\n"
        "    def forward(self, x, t, labels=None):\n"
        "        return self.conv(x)\n"
    ),
    "training/loss.py": (
        "class ECMLoss:\n"
        "    def __init__(self, **kwargs):\n"
        "        assert kwargs['tdist'] == 't' and kwargs['boundary_prob'] == 0.25\n"
        "    def update_schedule(self, stage):\n"
        "        self.stage = stage\n"
        "    def __call__(self, net, images, labels):\n"
        "        loss = (net(images, None) - images).square().mean((1, 2, 3))\n"
        "        return loss, loss, None, None, loss[:2]\n"
    ),
    "training/networks_tcm.py": (
        "class TCMPrecond:\n"
        "    def __init__(self, frozen, net, transition_t):\n"
        "        self.net = net\n"
        "    def __call__(self, x, t):\n"
        "        return self.net(x, t)\n"
    ),
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    for name, text in FAKE_TCM.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_adapter_takes_the_published_steps(checkout):
    before = set(sys.modules)
    step = official.official_tcm(checkout, StepCase(TINY, 4))
    step()
    step()
    assert not {n for n in set(sys.modules) - before if n.startswith(("training", "dnnlib"))}
    assert str(checkout) not in sys.path


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a checkout that holds training/"):
        official.official_tcm(tmp_path, StepCase(TINY, 4))


def test_when_the_published_code_cannot_run(tmp_path):
    assert official.gap(None, StepCase(TINY, 4)) == "no checkout given"
    assert official.gap(tmp_path, StepCase(TINY, 4)) == "needs a GPU"
    assert official.gap(tmp_path, StepCase(TINY, 4, device="cuda")) == ""
    assert "fp32" in official.gap(tmp_path, StepCase(TINY, 4, "bf16", device="cuda"))


@pytest.mark.parametrize(("ratio", "word"), [(1.0, " within"), (0.85, "NOT"), (1.2, "NOT")])
def test_the_style_must_lie_near_the_published_code(ratio, word):
    found, sentence = official.nearness([ratio] * 3, [1.0] * 3)
    assert found == pytest.approx(ratio)
    assert word in sentence


def test_it_is_compared_where_both_run(small, checkout, monkeypatch):
    monkeypatch.setattr(official, "gap", lambda path, case: "" if path else "no checkout given")
    settings = dataclasses.replace(small, groups=("step",), official=checkout)
    results = suite.run(settings, say=lambda _: None)
    assert "published TCM" in {row.provider for row in results.rows}
    assert any("times as long as the published code" in note for note in results.notes)
