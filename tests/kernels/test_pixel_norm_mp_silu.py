"""EDM2's pixel normalisation and activation against the formula in float64."""

import pytest
import torch

from tcm_fast.kernels.pixel_norm_mp_silu import pixel_norm_mp_silu, pixel_norm_mp_silu_reference

CL, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 192, 4, 4), (1, 384, 3, 5), (3, 7, 5, 3), (1, 2, 2, 2), (2, 48, 1, 1)]


def case(shape=(2, 48, 4, 3), spread=3.0):
    generator = torch.Generator().manual_seed(1)
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_the_reference_is_the_formula():
    x = case()
    u, h = pixel_norm_mp_silu_reference(x)
    for n, row, column in ((0, 0, 0), (1, 3, 2)):
        pixel = x[n, :, row, column]
        expected = pixel / (1e-4 + pixel.square().mean().sqrt())
        assert torch.allclose(u[n, :, row, column], expected, rtol=1e-12)
        silu = expected / (1 + (-expected).exp()) / 0.596
        assert torch.allclose(h[n, :, row, column], silu, rtol=1e-12)


def test_gradient_by_finite_differences():
    x = case((1, 3, 2, 1)).requires_grad_()
    assert torch.autograd.gradcheck(pixel_norm_mp_silu_reference, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(compare, dtype, layout, shape):
    operation = (pixel_norm_mp_silu, pixel_norm_mp_silu_reference)
    compare(*operation, [case(shape)], [shape, shape], dtype, layout)


@pytest.mark.parametrize("without", [(0,), (1,)])
def test_kernels_where_one_output_has_no_gradient(compare, without):
    shape = (2, 24, 3, 3)
    operation = (pixel_norm_mp_silu, pixel_norm_mp_silu_reference)
    compare(*operation, [case(shape)], [shape, shape], torch.float16, without=without)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("without", [(), (0,), (0, 1), (2,)], ids=str)
def test_kernels_past_which_x_goes(compare, dtype, without):
    def ours(x):
        return pixel_norm_mp_silu(x, with_x=True)

    def reference(x):
        u, h, x = pixel_norm_mp_silu_reference(x, with_x=True)
        return u, h, x * 1.0

    shape = (3, 7, 5, 3)
    compare(ours, reference, [case(shape)], [shape] * 3, dtype, without=without)


@pytest.mark.parametrize("shape", [(1, 1536, 2, 2), (1, 1152, 2, 3), (1, 768, 4, 4)], ids=str)
def test_kernels_at_the_widths_of_edm2_xl(compare, shape):
    operation = (pixel_norm_mp_silu, pixel_norm_mp_silu_reference)
    compare(*operation, [case(shape)], [shape, shape], torch.float16)


def test_every_element_is_written(compare, poisoned):
    shape = (3, 7, 5, 3)
    operation = (pixel_norm_mp_silu, pixel_norm_mp_silu_reference)
    compare(*operation, [case(shape)], [shape, shape], torch.float32)


def test_zeros_have_a_finite_gradient(triton_device):
    x = torch.zeros(1, 8, 2, 2, device=triton_device, requires_grad=True)
    u, h = pixel_norm_mp_silu(x)
    (u.sum() + h.sum()).backward()
    assert (u == 0).all()
    assert x.grad.isfinite().all()


def test_empty_batches_non_contiguous_input_and_the_operators(triton_device):
    empty = torch.zeros(0, 8, 2, 2, device=triton_device, requires_grad=True)
    u, _ = pixel_norm_mp_silu(empty)
    assert u.shape == empty.shape
    u.sum().backward()
    x = case((2, 8, 4, 6)).float().to(triton_device)[..., ::2]
    assert torch.allclose(pixel_norm_mp_silu(x)[0], pixel_norm_mp_silu_reference(x)[0], atol=1e-6)
    x = x.contiguous().requires_grad_()
    torch.library.opcheck(torch.ops.tcm_fast.pixel_norm_mp_silu_fwd.default, (x,))


def test_compiles_to_one_graph():
    compiled = torch.compile(pixel_norm_mp_silu, fullgraph=True, backend="aot_eager")
    x = case().float()
    assert torch.allclose(compiled(x)[1], pixel_norm_mp_silu(x)[1], atol=1e-6)


def test_refuses():
    with pytest.raises(
        TypeError, match=r"pixel_norm_mp_silu: x must be floating, got torch\.int64"
    ):
        pixel_norm_mp_silu(torch.ones(1, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must be \[N,C,H,W\], got \[2, 3\]"):
        pixel_norm_mp_silu(torch.ones(2, 3))
