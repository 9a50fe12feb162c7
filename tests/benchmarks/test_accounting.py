"""Counting by dispatch, the roofline's rows, the profile."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.benchmarks.accounting import Counting, category, named_ranges, profile_step, roofline
from tcm_fast.benchmarks.official_style import OfficialStyleUNet
from tcm_fast.benchmarks.steps import OurStep, StepCase, official_style_step
from tcm_fast.benchmarks.validate import TINY
from tcm_fast.planning.throughput import Ceilings

CASE = StepCase(TINY, 8)
CEILINGS = Ceilings(copy=1e9, matmul={"fp32": 1e10})


def test_bytes_are_arguments_and_results():
    a, b = torch.randn(10, 10), torch.randn(10, 10)
    with Counting() as counting:
        c = a + b  # 3 x 400
        c.mul_(2)  # in place: read and written
        c.view(100)[:50]  # views
        torch.empty(1000)
        c.sum().item()  # 404, and 4 read back
    tallies = {name: tally.bytes for name, tally in counting.by_name.items()}
    assert tallies["aten::add"] == 1200
    assert tallies["aten::mul_"] == 800
    assert tallies["aten::sum"] == 404
    assert "aten::view" not in tallies
    assert "aten::empty" not in tallies
    assert counting.waits == {"aten::_local_scalar_dense": 1}


def test_expanded_tensors_count_once():
    a = torch.randn(1, 100).expand(50, 100)
    with Counting() as counting:
        a + 1
    assert counting.total.bytes == 400 + 20000


def test_operations_are_the_flop_counters():
    """The convolutions of the baseline's network, by the formula 2·k²·C·C'·H·W, an image."""
    net = OfficialStyleUNet(8, 3, 16, (1, 2), 1, (4,), 0.0)
    expected = 0

    def hook(module, args, result):
        nonlocal expected
        weight = module.weight
        expected += 2 * weight[0].numel() * result[0].numel() * len(result)
        if module.up or module.down:  # a depthwise filter of 2x2, at the lower resolution's pixels
            low = min(args[0].shape[2], result.shape[2])
            expected += 2 * 4 * args[0].shape[1] * low**2 * len(result)

    for module in net.modules():
        if type(module).__name__ == "Convolution":
            module.register_forward_hook(hook)
    with Counting() as counting, torch.no_grad():
        net(torch.randn(2, 3, 8, 8), torch.zeros(2))
    assert counting.by_category()["convolution"].flops == expected


def test_the_peak_is_of_what_lives_at_once():
    kilobyte = 256
    with Counting() as counting:
        a = torch.ones(kilobyte)
        b = a + 1
        del a
        c = b + 1
        del b
        assert counting.live == 1024
        del c
    assert counting.peak == 2048
    assert counting.live == 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128", "convolution"),
        ("aten::addmm", "matrix product"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n", "matrix product"),
        ("_qkv_attention_fwd_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_group_norm_silu_bwd_kernel", "normalisation and pointwise"),
        ("aten::add_", "normalisation and pointwise"),
        ("Optimizer.step#FusedOptimizer.step", "optimizer"),
        ("void tcm_fast::(anonymous namespace)::update_tensors(long const*)", "optimizer"),
        ("aten::_foreach_lerp_", "optimizer"),
    ],
)  # fmt: skip
def test_categories(name, part):
    assert category(name) == part


def test_the_rooflines_rows_add_up():
    rows = {row.part: row for row in roofline(OurStep(CASE), CEILINGS, "fp32", repeats=1)}
    parts = (
        "convolution",
        "normalisation and pointwise",
        "attention",
        "matrix product",
        "optimizer",
    )
    assert rows.keys() >= {*parts, "data (on the host)", "gaps and Python", "whole step"}
    whole = rows["whole step"]
    for part in parts:
        row = rows[part]
        assert row.seconds > 0
        assert row.limit == pytest.approx(max(row.bytes / 1e9, row.flops / 1e10))
        assert row.bound in ("copy", "matmul")
    busy = sum(
        rows[part].seconds for part in rows if part not in ("whole step", "data (on the host)")
    )
    assert busy == pytest.approx(whole.seconds, rel=0.02)
    assert whole.flops == sum(rows[part].flops for part in parts)
    parameters = sum(p.numel() for p in CASE.build().parameters())
    assert rows["optimizer"].bytes >= 42 * parameters or rows["optimizer"].launches > 0


def test_our_step_moves_less_and_never_waits():
    """What the README claims of a step, counted: four passes instead of five, no value read back."""
    ours, theirs = OurStep(CASE), official_style_step(CASE)
    counted = []
    for step in (ours, theirs):
        for _ in range(2):
            step()
        with Counting() as counting:
            step()
        counted.append(counting)
    mine, official = counted
    assert sum(mine.waits.values()) == 0
    assert sum(official.waits.values()) >= 5
    assert mine.total.launches < official.total.launches / 2
    assert mine.total.bytes < 0.75 * official.total.bytes
    assert mine.total.flops < official.total.flops


def test_ranges_bear_the_modules_names():
    net = nn.Sequential()
    net.add_module("first", nn.Linear(3, 3))
    net.add_module("second", nn.Sequential(nn.ReLU()))
    with named_ranges(net), torch.profiler.profile() as prof:
        net(torch.randn(2, 3))
    names = {event.key for event in prof.key_averages()}
    assert {"first", "second", "second.0"} <= names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_ranges_close_where_a_module_fails():
    class Fails(nn.Module):
        def forward(self, x):
            return F.linear(x, torch.ones(7, 7))

    net = nn.Sequential(Fails())
    with named_ranges(net), pytest.raises(RuntimeError):
        net(torch.randn(2, 3))


def test_the_profile_of_a_step(tmp_path):
    found = profile_step(OurStep(CASE), tmp_path / "new")
    trace = json.loads(found.trace.read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "enc.8x8_block0.conv0" in names
    assert "stage1.enc.8x8_block0.conv0" in names
    assert {name for name, *_ in found.modules} >= {"enc.8x8_block0.conv0", "dec.4x4_in0.qkv"}
    assert any(part == "convolution" for *_, part in found.kernels)
    table = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert len(table["kernels"]) == len(found.kernels)
    assert 0 < sum(row["seconds"] for row in table["kernels"]) <= 1.02 * found.seconds
