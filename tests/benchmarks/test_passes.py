"""Passes over memory counted by kind."""

import dataclasses
import json
import os
import shlex
import subprocess

import pytest
import torch
import torch.nn.functional as F

from tcm_fast.benchmarks import passes
from tcm_fast.benchmarks.passes import (
    BIAS,
    BIAS_GRADIENT,
    COPY,
    LAYOUT,
    Passes,
    count_passes,
    read_logs,
)
from tcm_fast.config import NetworkConfig, load_preset
from tcm_fast.kernels._triton import assuming_kernels
from tcm_fast.kernels.residual import residual
from tcm_fast.planning.memory_estimate import ImageShape

START = shlex.split(os.environ.get("TCM_FAST_PRETENDED_GPU", ""))


def meta(*shape, layout=torch.channels_last):
    x = torch.empty(shape, device="meta")
    return x.contiguous(memory_format=layout) if x.ndim == 4 else x


def test_what_a_convolution_hides():
    """The bias is a pass of its own, its gradient another; a gradient in NCHW is converted."""
    x, weight, bias = meta(2, 8, 4, 4).requires_grad_(), meta(16, 8, 3, 3), meta(16)
    parameters = [x, weight.requires_grad_(), bias.requires_grad_()]
    with Passes() as counted:
        y = F.conv2d(x, weight, bias, padding=1)
        torch.autograd.grad(y, parameters, meta(2, 16, 4, 4, layout=torch.contiguous_format))
    assert y.stride() == (256, 1, 64, 16)
    size = 4 * y.numel()
    found = {name: (tally.launches, tally.bytes) for name, tally in counted.by_kind.items()}
    assert found[BIAS] == (1, 2 * size)
    assert found[BIAS_GRADIENT] == (1, size)
    assert found[LAYOUT] == (1, 2 * size)
    assert found["convolution"][0] == 2
    assert [m[:2] for m in counted.moved] == [(LAYOUT, "aten::convolution_backward gradient")]


def test_a_part_of_a_tensor_is_copied_by_our_operations():
    whole, dense = meta(2, 8, 4, 4), meta(2, 4, 4, 4)
    with assuming_kernels(), Passes() as counted:
        torch.ops.tcm_fast.residual_bwd(whole[:, :4], 0.5, True)  # reads it as it lies
        residual(whole[:, :4], whole[:, 4:], 0.5)
        residual(dense, dense, 0.5)
    assert counted.by_kind[COPY].launches == 2
    assert counted.by_kind[COPY].bytes == 2 * 4 * whole.numel()
    assert counted.by_kind["fused operation"].launches == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::cat", "concatenation"),
        ("aten::add_", "addition"),
        ("aten::sum", "reduction"),
        ("aten::mul", "pointwise"),
        ("aten::clone", COPY),
        ("aten::_foreach_copy_", COPY),
        ("tcm_fast::group_norm_silu_fwd", "fused operation"),
        ("tcm_fast::qkv_attention_fwd", "attention"),
        ("TRITON _residual_fwd_kernel grid (1,)", "fused operation"),
        ("LAYOUTCOPY convbwd grad (1, 2, 3, 4) strides (24, 12, 4, 1)", LAYOUT),
        ("CONV dgrad (1, 2, 3, 4) (2, 2, 1, 1)", "convolution"),
        ("_ZN2at6native24vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEE", "addition"),
        ("_ZN2at6native13reduce_kernelILi512ELi1E", "reduction"),
        ("_ZN2at6native27unrolled_elementwise_kernelIZZZNS0_23direct_copy_kernel_cuda", COPY),
        ("memset 8", "fill"),
        ("EXT sum_squares", "optimizer"),
    ],
)
def test_kinds(name, expected):
    assert passes.kind(name) == expected


def test_logs_of_a_pretended_gpu():
    capture = "RUN memcpy H2D pinned 8\nCAPTURE begin\nCAP CONV fwd (1,)\nCAP memset 8\nCAPTURE end 2 nodes\n"
    launched = read_logs(capture, "RUN memcpy D2D 64\nRUN graphLaunch 2\nSYNC event\n")
    assert launched.nodes == {"convolution": 1, "fill": 1}
    assert launched.outside == {COPY: 1}
    assert launched.waits == 1


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "passes.json"
    options = ["--preset", "digits", "--batch", "16", "--precision", "bf16"]
    assert passes.main([*options, "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits tcm batch 16 bf16"
    kinds = json.loads(file.read_text())["kinds"]
    total = sum(tally["launches"] for tally in kinds.values())
    (whole,) = (line for line in lines if line.startswith("| whole step"))
    assert f"| {total} |" in whole
    assert kinds["convolution"]["launches"] > kinds["concatenation"]["launches"] > 0


@pytest.mark.parametrize("family", ["ddpmpp", "adm", "edm2"])
def test_small_passes_are_no_more_for_more_blocks(family):
    """Products of the embedding, sums for small parameters' gradients, sums of two gradients, additions of
    biases, concatenations: as many for two blocks a level as for one, products of feature maps apart."""
    config = load_preset("cifar10-tiny")
    phase = dataclasses.replace(config.tcm, batch_size=16, images=1 << 24)
    counts = []
    for blocks in (1, 2):
        network = NetworkConfig(
            name=family,
            model_channels=64,
            channel_mult=(1, 2),
            num_blocks=blocks,
            attn_resolutions=(),
        )
        config = dataclasses.replace(config, network=network, precision="bf16", tcm=phase)
        kinds = count_passes(config, "tcm", ImageShape(16)).by_kind
        counts.append(
            {
                kind: kinds[kind].launches
                for kind in ("matrix product", "reduction", "addition", "concatenation", BIAS, COPY)
                if kind in kinds
            }
        )
    # A decoder block has a 1x1 convolution: a product for the gradient of its two images, one for that of
    # each one's part of the weight, and the parts are joined.
    more = [
        {"matrix product": 0, "concatenation": 0},
        {"matrix product": 3 * 2, "concatenation": 2},
    ]
    for kind, number in more[family != "edm2"].items():
        assert counts[1].pop(kind) - counts[0].pop(kind) == number
    assert counts[0] == counts[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["ddpmpp", "ncsnpp", "adm", "edm2"])
def test_no_activation_and_no_gradient_is_copied_or_laid_out_anew(family, precision):
    """With the GPU's kernels, in a step of stage 2. The filters of NCSN++ are, which are weights."""
    config = load_preset("cifar10-tiny")
    network = NetworkConfig(
        name=family, model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,)
    )
    phase = dataclasses.replace(config.tcm, batch_size=16, images=1 << 24)
    config = dataclasses.replace(config, network=network, precision=precision, tcm=phase)
    counted = count_passes(config, "tcm", ImageShape(16))
    assert counted.by_kind["concatenation"].launches > 0
    assert not [moved for moved in counted.moved if not moved[1].endswith("weight")]
    if family != "ncsnpp":  # whose residual encoder is as published
        assert not {BIAS, BIAS_GRADIENT} & set(counted.by_kind)


@pytest.mark.skipif(not START, reason="needs a pretended GPU: TCM_FAST_PRETENDED_GPU is not set")
def test_a_captured_step_has_the_operations_that_were_counted(tmp_path):
    file = tmp_path / "passes.json"
    options = ["--preset", "digits", "--batch", "16", "--json", str(file)]
    command = [*START, "-m", "tcm_fast.benchmarks.passes", *options]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["waits"] == 0
    for name in ("fused operation", LAYOUT):
        assert found["nodes"].get(name, 0) == found["kinds"].get(name, {"launches": 0})["launches"]
