"""Twice and half the resolution against the formula in float64."""

from functools import partial

import pytest
import torch

from tcm_fast.kernels.resample import resample, resample_reference

CL, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 24, 4, 6), (3, 5, 2, 2), (1, 192, 8, 4)]


def case(shape=(2, 24, 4, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def result(shape, mode):
    n, c, h, w = shape
    return (n, c, 2 * h, 2 * w) if mode == "up" else (n, c, h // 2, w // 2)


def pair(mode, **form):
    return (partial(f, mode=mode, **form) for f in (resample, resample_reference))


def test_the_reference_is_the_formula():
    x = case()
    up, h = resample_reference(x, "up", with_silu=True)
    assert torch.equal(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.allclose(h, up / (1 + (-up).exp()) / 0.596, rtol=1e-12)
    down, _ = resample_reference(x, "down")
    assert torch.allclose(down, x.reshape(2, 24, 2, 2, 3, 2).mean((3, 5)), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["up", "down"])
@pytest.mark.parametrize("with_silu", [False, True])
def test_kernels(compare, dtype, layout, shape, mode, with_silu):
    shapes = [result(shape, mode)] * (1 + with_silu)
    compare(*pair(mode, with_silu=with_silu), [case(shape)], shapes, dtype, layout)


@pytest.mark.parametrize("mode", ["up", "down"])
@pytest.mark.parametrize("without", [(0,), (1,)])
def test_kernels_where_one_output_has_no_gradient(compare, mode, without):
    shapes = [result((2, 24, 4, 6), mode)] * 2
    operation = pair(mode, with_silu=True)
    compare(*operation, [case()], shapes, torch.float16, without=without)


@pytest.mark.parametrize("mode", ["up", "down"])
def test_every_element_is_written(compare, poisoned, mode):
    shape = (3, 7, 6, 2)
    operation = pair(mode, with_silu=True)
    compare(*operation, [case(shape)], [result(shape, mode)] * 2, torch.float32)


def test_empty_batches_non_contiguous_input_and_the_operators(triton_device):
    x = case().float().to(triton_device)
    assert resample(x[:0], "down")[0].shape == (0, 24, 2, 3)
    view = x[:, ::2]
    assert torch.equal(resample(view, "up")[0], resample_reference(view, "up")[0])
    x.requires_grad_()
    for mode in ("up", "down"):
        torch.library.opcheck(torch.ops.tcm_fast.resample_fwd.default, (x, mode, True))


def test_compiles_to_one_graph():
    function = partial(resample, mode="up", with_silu=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(case())[1], function(case())[1])


def test_refuses():
    with pytest.raises(ValueError, match=r"mode must be up or down, got 'keep'"):
        resample(case(), "keep")
    with pytest.raises(ValueError, match=r"height and width must be even, got \[1, 2, 3, 4\]"):
        resample(case((1, 2, 3, 4)), "down")
    with pytest.raises(ValueError, match=r"x must be \[N,C,H,W\], got \[2\]"):
        resample(case((2,)), "up")
    with pytest.raises(TypeError, match=r"x must be floating, got torch\.int64"):
        resample(case().long(), "up")
