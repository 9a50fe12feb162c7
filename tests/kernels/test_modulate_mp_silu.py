"""The embedding's gain, activation and dropout of an EDM2 block against the formula in float64."""

import importlib
from functools import partial

import pytest
import torch

from tcm_fast.kernels.dropout import PhiloxKey, dropout_mask
from tcm_fast.kernels.modulate_mp_silu import modulate_mp_silu, modulate_mp_silu_reference

module = importlib.import_module(
    "tcm_fast.kernels.modulate_mp_silu"
)  # the package has the function
CL, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 24, 4, 3), (1, 192, 8, 8), (3, 7, 5, 3), (2, 20, 3, 3)]


def case(shape=(2, 24, 4, 3), gain=0.7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    return [1.5 * x, scale, torch.tensor(gain, dtype=torch.float64)]


def pair(n, p=0.0, device="cpu"):
    sample = torch.arange(5, 5 + n, device=device)
    key = PhiloxKey(seed=3, step=4, layer=2, sample=sample) if p else None
    options = {"dropout_p": p, "dropout_key": key}
    return (partial(f, **options) for f in (modulate_mp_silu, modulate_mp_silu_reference))


def test_the_reference_is_the_formula():
    x, scale, gain = case()
    z = x * (scale * gain + 1)[:, :, None, None]
    expected = z / (1 + (-z).exp()) / 0.596
    assert torch.allclose(modulate_mp_silu_reference(x, scale, gain), expected, rtol=1e-12)
    key = PhiloxKey(seed=3, step=4, layer=2, sample=torch.arange(2))
    kept = dropout_mask(key, 0.4, x.shape)
    y = modulate_mp_silu_reference(x, scale, gain, dropout_p=0.4, dropout_key=key)
    realised = 65536 / (65536 - round(0.4 * 65536))
    assert torch.allclose(y, torch.where(kept, expected * realised, 0), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(compare, triton_device, dtype, layout, p, shape):
    compare(*pair(shape[0], p, triton_device), case(shape), [shape], dtype, layout)


def test_kernels_whose_sums_come_in_pieces(compare, triton_device, monkeypatch):
    """Several tiles a program, several programs a sample, and a last piece that is not full."""
    monkeypatch.setattr(module, "LANES", 64)
    monkeypatch.setattr(module, "PROGRAMS", 8)
    shape = (2, 16, 9, 7)
    constants, grid = module._constants(shape, 1, True, False)
    assert constants["PIECE"] > 1
    assert grid[1] > 1
    compare(*pair(2, 0.4, triton_device), case(shape), [shape], torch.float32)


def in_parts(function, parts):
    """With a gain and a scale whose gradients come in parts, which autograd adds up."""

    def run(x, scale, gain):
        n, c = scale.shape
        return function(
            x, scale[:, None].expand(n, parts, c), gain.expand(n, parts, module.GAIN_PARTS)
        )

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 600, 2, 2)], ids=str)
def test_kernels_that_leave_the_gradients_in_parts(compare, triton_device, dtype, shape, parts):
    """Also in more parts than there are pixels, and in more groups than there are channels."""
    functions = (in_parts(f, parts) for f in pair(shape[0], 0.4, triton_device))
    compare(*functions, case(shape), [shape], dtype)


def test_each_part_is_its_pixels(triton_device):
    x, scale, gain = (v.float().to(triton_device) for v in case((2, 160, 4, 4)))
    grad_y = torch.randn_like(x)
    wide = scale[:, None].expand(2, 4, 160), gain.expand(2, 4, module.GAIN_PARTS)
    bwd, rest = torch.ops.tcm_fast.modulate_mp_silu_bwd, (None, None, None, 0, 0)
    for _ in range(2):
        grad_x, grad_scale, grad_gain = bwd(grad_y, x, *wide, *rest)
        for part in range(4):
            rows = slice(part, part + 1)  # of four pixels
            expected = bwd(grad_y[:, :, rows], x[:, :, rows], scale, gain, *rest)
            torch.testing.assert_close(grad_x[:, :, rows], expected[0])
            torch.testing.assert_close(grad_scale[:, part], expected[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad_gain[:, part].sum(), expected[2], rtol=1e-4, atol=1e-4)
    assert not grad_gain[:, :, 3].any()  # three groups of 64 have the channels


def test_parts_enough_to_fill_a_gpu():
    assert [module.parts_for(n) for n in (1, 16, 64, 512, 4096)] == [512, 32, 8, 1, 1]
    for c in (4, 64, 192, 576, 1000, 1536):
        constants, grid = module._constants((64, c, 8, 8), 1, True, False, 8)
        assert grid[:2] == (64, 8)
        assert grid[2] <= module.GAIN_PARTS
        assert constants["WIDTH"] * module.GAIN_PARTS >= c
        assert constants["PIXELS"] * constants["PIECE"] * 8 >= 64


@pytest.mark.parametrize("gain", [0.0, -2.0])
def test_gains(compare, triton_device, gain):
    shape = (2, 24, 4, 3)
    compare(*pair(2, 0.0, triton_device), case(shape, gain), [shape], torch.float16)


def test_every_element_is_written(compare, triton_device, poisoned):
    shape = (3, 7, 5, 3)
    compare(*pair(3, 0.4, triton_device), case(shape), [shape], torch.float32)


def test_more_channels_than_a_program_sums(compare, triton_device):
    shape = (2, 600, 2, 2)
    compare(*pair(2, 0.0, triton_device), case(shape), [shape], torch.bfloat16)


def test_gradients_of_strided_rows_and_empty_batches(triton_device):
    x, scale, gain = (v.float().to(triton_device) for v in case((3, 20, 4, 4)))
    wide = torch.cat([scale, scale], 1)[:, :20]
    assert wide.stride(0) == 40
    arguments = x, x, scale, gain, None, None, None, 0, 0
    dense = torch.ops.tcm_fast.modulate_mp_silu_bwd(*arguments)
    strided = torch.ops.tcm_fast.modulate_mp_silu_bwd(x, x, wide, *arguments[3:])
    for a, b in zip(dense, strided, strict=True):
        assert torch.equal(a, b)
    empty = torch.ops.tcm_fast.modulate_mp_silu_bwd(x[:0], x[:0], scale[:0], *arguments[3:])
    assert [v.shape for v in empty] == [(0, 20, 4, 4), (0, 20), ()]
    assert empty[2] == 0


def test_masks_do_not_depend_on_layout_or_batch(triton_device):
    x, scale, gain = (v.float().to(triton_device) for v in case((3, 16, 4, 4)))
    sample = torch.tensor([9, 2, 5], device=triton_device)
    key = PhiloxKey(seed=1, step=2, layer=3, sample=sample)
    whole = modulate_mp_silu(x, scale, gain, dropout_p=0.3, dropout_key=key)
    rows = torch.tensor([2, 0], device=triton_device)
    part = modulate_mp_silu(
        x[rows].contiguous(memory_format=CL), scale[rows], gain,
        dropout_p=0.3, dropout_key=key.select(rows),
    )  # fmt: skip
    assert torch.equal(whole[rows] == 0, part == 0)


def test_empty_batches_strided_rows_and_the_operators(triton_device):
    x, scale, gain = (v.float().to(triton_device) for v in case())
    assert modulate_mp_silu(x[:0], scale[:0], gain).shape == (0, 24, 4, 3)
    wide = torch.cat([scale, scale], 1)[:, :24]
    assert torch.equal(modulate_mp_silu(x, wide, gain), modulate_mp_silu(x, scale, gain))
    x.requires_grad_()
    arguments = (x, scale, gain, None, None, None, 0, 0)
    torch.library.opcheck(torch.ops.tcm_fast.modulate_mp_silu_fwd.default, arguments)


def test_compiles_to_one_graph():
    compiled = torch.compile(modulate_mp_silu, fullgraph=True, backend="aot_eager")
    x, scale, gain = (v.float() for v in case())
    assert torch.allclose(compiled(x, scale, gain), modulate_mp_silu(x, scale, gain), atol=1e-6)


def test_refuses():
    x, scale, gain = case()
    with pytest.raises(ValueError, match=r"scale must be \[2,24\], .* got \[2, 3\]"):
        modulate_mp_silu(x, scale[:, :3], gain)
    with pytest.raises(
        ValueError, match=r"gain must be a scalar, or one .* \[N,P,4\] .*, got \[1\]"
    ):
        modulate_mp_silu(x, scale, gain[None])
    wide = scale[:, None].expand(2, 3, 24)
    with pytest.raises(
        ValueError, match=r"gain must be a scalar, or one .* \[N,P,4\] .*, got \[\]"
    ):
        modulate_mp_silu(x, wide, gain)
    with pytest.raises(ValueError, match=r"or expanded to \[2,P,24\], got \[2, 3, 24\]"):
        modulate_mp_silu(x, wide.contiguous(), gain.expand(2, 3, 4))
    with pytest.raises(ValueError, match=r"or expanded to \[2,P,24\], got \[2, 0, 24\]"):
        modulate_mp_silu(x, wide[:, :0], gain.expand(2, 0, 4))
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0,1\), got 1"):
        modulate_mp_silu(x, scale, gain, dropout_p=1)
    with pytest.raises(ValueError, match="dropout_key is required where dropout_p > 0, got None"):
        modulate_mp_silu(x, scale, gain, dropout_p=0.1)
    with pytest.raises(TypeError, match=r"must be floating, got torch\.int64"):
        modulate_mp_silu(x.long(), scale, gain)
    with pytest.raises(ValueError, match=r"x must be \[N,C,H,W\], got \[2, 24\]"):
        modulate_mp_silu(scale, scale, gain)
