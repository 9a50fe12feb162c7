"""EDM2's magnitude-preserving concatenation against the formula in float64."""

import math
from functools import partial

import pytest
import torch

from tcm_fast.kernels.mp_cat_mp_silu import mp_cat_mp_silu, mp_cat_mp_silu_reference

CL, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [(16, 24), (5, 3), (192, 192), (2, 9)]
OPERATION = (mp_cat_mp_silu, mp_cat_mp_silu_reference)


def case(a=16, b=24, n=2, size=(4, 3)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((n, c, *size), generator=generator, dtype=torch.float64) for c in (a, b)]


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_the_reference_is_the_formula(t):
    a, b = case()
    z, h = mp_cat_mp_silu_reference(a, b, t)
    norm = math.sqrt(40 / ((1 - t) ** 2 + t**2))
    expected = torch.cat([a * norm / 4 * (1 - t), b * norm / math.sqrt(24) * t], 1)
    assert torch.allclose(z, expected, rtol=1e-12)
    assert torch.allclose(h, expected / (1 + (-expected).exp()) / 0.596, rtol=1e-12)


def test_it_preserves_magnitude():
    a, b = case(8, 512, size=(64, 64))
    z, _ = mp_cat_mp_silu_reference(a, b, 0.5)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.01)
    shares = z[:, :8].square().sum() / z.square().sum()
    assert shares.item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_kernels(compare, dtype, layout, widths):
    shape = (2, sum(widths), 4, 3)
    operation = (partial(f, t=0.4) for f in OPERATION)
    compare(*operation, case(*widths), [shape, shape], dtype, layout)


@pytest.mark.parametrize("without", [(0,), (1,)])
def test_kernels_where_one_output_has_no_gradient(compare, without):
    compare(*OPERATION, case(), [(2, 40, 4, 3)] * 2, torch.float16, without=without)


def test_kernels_at_a_site_of_edm2_xl(compare):
    compare(*OPERATION, case(1536, 1152, 1, (2, 2)), [(1, 2688, 2, 2)] * 2, torch.float16)


def test_every_element_is_written(compare, poisoned):
    compare(*OPERATION, case(5, 3, 3, (5, 7)), [(3, 8, 5, 7)] * 2, torch.float32)


def test_layouts_that_differ_and_empty_batches(triton_device):
    a, b = (v.half().to(triton_device) for v in case())
    mixed = mp_cat_mp_silu(a, b.contiguous(memory_format=CL))[0]
    assert torch.equal(mixed, mp_cat_mp_silu(a, b)[0])
    assert mp_cat_mp_silu(a[:0], b[:0])[1].shape == (0, 40, 4, 3)
    a.requires_grad_()
    torch.library.opcheck(torch.ops.tcm_fast.mp_cat_mp_silu_fwd.default, (a, b, 0.5))


def test_compiles_to_one_graph():
    compiled = torch.compile(mp_cat_mp_silu, fullgraph=True, backend="aot_eager")
    a, b = (v.float() for v in case())
    assert torch.allclose(compiled(a, b)[1], mp_cat_mp_silu(a, b)[1], atol=1e-6)


def test_refuses():
    a, b = case()
    with pytest.raises(
        TypeError, match=r"one floating dtype, got torch\.float64 and torch\.float32"
    ):
        mp_cat_mp_silu(a, b.float())
    with pytest.raises(ValueError, match=r"b must be \[2,B,4,3\] on cpu, got \[1, 24, 4, 3\]"):
        mp_cat_mp_silu(a, b[:1])
    with pytest.raises(ValueError, match=r"a must be \[N,A,H,W\], got \[2, 3\]"):
        mp_cat_mp_silu(torch.ones(2, 3).double(), b)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\], got -1"):
        mp_cat_mp_silu(a, b, -1)
