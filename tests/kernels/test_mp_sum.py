"""EDM2's magnitude-preserving sum against the formula in float64."""

import math
from functools import partial

import pytest
import torch

from tcm_fast.kernels.mp_sum import mp_sum, mp_sum_reference, mp_sum_weights

CL, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = [
    {}, {"clip": 2.0}, {"with_silu": True}, {"clip": 2.0, "with_silu": True},
    {"factors": (2**0.5, -3.0), "with_silu": True},
]  # fmt: skip


def case(shape=(2, 24, 4, 3), spread=1.5):
    """Two tensors whose sum stays away from ±2, where rounding decides whether it is clipped."""
    generator = torch.Generator().manual_seed(1)
    a, b = (spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    out, _ = mp_sum_reference(a, b, 0.3)
    is_near = (out.abs() - 2).abs() < 0.05
    return [torch.where(is_near, 0, v) for v in (a, b)]


def pair(t, **form):
    return partial(mp_sum, t=t, **form), partial(mp_sum_reference, t=t, **form)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_the_reference_is_the_formula(t):
    a, b = case()
    out, h = mp_sum_reference(a, b, t, clip=1.0, with_silu=True)
    expected = (((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)).clamp(-1, 1)
    assert torch.allclose(out, expected, rtol=1e-12)
    assert torch.allclose(h, expected / (1 + (-expected).exp()) / 0.596, rtol=1e-12)
    scaled = mp_sum_reference(a, b, t, factors=(3.0, 0.5))[0]
    assert torch.allclose(scaled, mp_sum_reference(3 * a, b / 2, t)[0], rtol=1e-12)


def test_the_sum_of_unit_gaussians_is_one():
    for t in (0.1, 0.3, 0.5):
        assert math.hypot(*mp_sum_weights(t)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 4, 3), (3, 5, 7, 1), (1, 192, 8, 8)], ids=str)
def test_kernels(compare, dtype, layout, form, shape):
    outputs = 2 if form.get("with_silu") else 1
    compare(*pair(0.3, **form), case(shape), [shape] * outputs, dtype, layout)


@pytest.mark.parametrize("without", [(0,), (1,)])
def test_kernels_where_one_output_has_no_gradient(compare, without):
    shape = (2, 24, 3, 3)
    operation = pair(0.3, clip=2.0, with_silu=True)
    compare(*operation, case(shape), [shape, shape], torch.float16, without=without)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("without", [(), (0,), (2,)], ids=str)
def test_kernels_whose_sum_is_read_twice(compare, dtype, form, without):
    """Gradients of the sum, of its activation where there is one, and of the sum again."""
    shape, acts = (3, 5, 7, 1), "with_silu" in form

    def ours(function, a, b):
        out, h, again = function(a, b, 0.3, **form)
        return (out, h, again) if acts else (out, again)

    def plain(a, b):
        out, h = mp_sum_reference(a, b, 0.3, **form)
        return out, h, out * 1.0

    def reference(a, b):
        out, h, again = plain(a, b)
        return (out, h, again) if acts else (out, again)

    without = tuple(i - (i > 0 and not acts) for i in without)
    operation = partial(ours, partial(mp_sum, twice=True))
    compare(operation, reference, case(shape), [shape] * (2 + acts), dtype, CL, without=without)


def test_rows_of_embeddings(triton_device):
    a, b = (v.float().to(triton_device) for v in case((4, 50)))
    assert torch.allclose(mp_sum(a, b)[0], mp_sum_reference(a, b)[0], atol=1e-6)


def test_every_element_is_written(compare, poisoned):
    shape = (3, 7, 5, 3)
    operation = pair(0.3, clip=2.0, with_silu=True)
    compare(*operation, case(shape), [shape, shape], torch.float32)


def test_nan_and_infinity(triton_device):
    a = torch.tensor([math.nan, math.inf, -math.inf, 300.0], device=triton_device)
    out, _ = mp_sum(a, torch.zeros_like(a), 0.0, clip=256.0)
    assert out[0].isnan()
    assert out[1:].tolist() == [256.0, -256.0, 256.0]


def test_no_gradient_beyond_the_bound(triton_device):
    a = torch.tensor([1.0, 5.0, -5.0], device=triton_device, requires_grad=True)
    mp_sum(a, torch.zeros_like(a), 0.0, clip=2.0)[0].sum().backward()
    assert a.grad.tolist() == [1.0, 0.0, 0.0]


def test_layouts_that_differ_and_empty_batches(triton_device):
    a, b = (v.half().to(triton_device) for v in case())
    mixed = mp_sum(a.contiguous(memory_format=CL), b)[0]
    assert torch.equal(mixed, mp_sum(a, b)[0])
    assert mp_sum(a[:0], b[:0], with_silu=True)[1].shape == (0, 24, 4, 3)
    a.requires_grad_()
    torch.library.opcheck(torch.ops.tcm_fast.mp_sum_fwd.default, (a, b, 0.3, 0.7, 2.0, True))
    torch.library.opcheck(torch.ops.tcm_fast.mp_sum_fwd.default, (a, b, 0.3, 0.7, None, False))


def test_compiles_to_one_graph():
    function = partial(mp_sum, clip=2.0, with_silu=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    a, b = (v.float() for v in case())
    assert torch.allclose(compiled(a, b)[1], function(a, b)[1], atol=1e-6)


def test_refuses():
    a, b = case()
    with pytest.raises(
        TypeError, match=r"one floating dtype, got torch\.float64 and torch\.float32"
    ):
        mp_sum(a, b.float())
    with pytest.raises(ValueError, match=r"mp_sum: b must be \[2, 24, 4, 3\] on cpu like a"):
        mp_sum(a, b[:1])
    with pytest.raises(ValueError, match=r"mp_sum: t must be in \[0, 1\], got 1.5"):
        mp_sum(a, b, 1.5)
    with pytest.raises(ValueError, match=r"mp_sum: factors must be two numbers, .* got \(1.0,\)"):
        mp_sum(a, b, factors=(1.0,))
    with pytest.raises(ValueError, match=r"mp_sum: clip must be positive, got 0"):
        mp_sum(a, b, clip=0)
