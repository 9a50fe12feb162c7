import math

import pytest
import torch

from tcm_fast.kernels.qkv_attention import qkv_attention, qkv_attention_reference

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# On either side of the length at which the CPU's fused operation takes over.
SIZES = [(4, 5), (11, 9)]


def naive(qkv, num_heads, normalize=False, scale=None):
    """One head and one image at a time, in float64."""
    n, c3, height, width = qkv.shape
    d = c3 // 3 // num_heads
    out = torch.zeros(n, c3 // 3, height, width, dtype=torch.float64)
    for i in range(n):
        for head in range(num_heads):
            first = head * 3 * d
            q, k, v = (
                qkv[i, first + part : first + 3 * d : 3].double().reshape(d, -1)
                for part in range(3)
            )
            if normalize:
                q, k, v = (x / (1e-4 + x.square().mean(0).sqrt()) for x in (q, k, v))
            weights = torch.softmax(q.T @ k * (scale or 1 / math.sqrt(d)), 1)
            out[i, head * d : (head + 1) * d] = (v @ weights.T).reshape(d, height, width)
    return out


def case(n=2, heads=2, d=6, size=(4, 5), dtype=torch.float32, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn((n, 3 * heads * d, *size), generator=generator, dtype=torch.float64)
    return (1.5 * qkv).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_forward_is_the_formula(dtype, layout, size, normalize):
    qkv = case(size=size, dtype=dtype, layout=layout)
    out = qkv_attention(qkv, 2, normalize=normalize)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    error = (out.double() - naive(qkv, 2, normalize)).abs().max()
    assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_heads_and_scale(heads, size):
    qkv = case(heads=heads, size=size)
    out = qkv_attention(qkv, heads, scale=0.7)
    assert (out.double() - naive(qkv, heads, scale=0.7)).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_is_the_formulas(size, normalize):
    qkv = case(size=size, dtype=torch.float64).requires_grad_()
    weights = torch.randn((2, 12, *size), dtype=torch.float64)
    grads = [
        torch.autograd.grad((function(qkv, 2, normalize=normalize) * weights).sum(), qkv)[0]
        for function in (qkv_attention_reference, naive)
    ]
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_by_finite_differences(normalize):
    qkv = case(n=1, heads=2, d=2, size=(2, 2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: qkv_attention_reference(x, 2, normalize=normalize), qkv
    )


def test_zero_input_has_a_finite_gradient():
    qkv = torch.zeros(1, 12, 2, 2, requires_grad=True)
    qkv_attention(qkv, 1, normalize=True).sum().backward()
    assert qkv.grad.isfinite().all()


def test_empty_batch_and_non_contiguous_input():
    assert qkv_attention(case(n=0), 2).shape == (0, 12, 4, 5)
    qkv = case(size=(4, 10))[..., ::2]
    assert (qkv_attention(qkv, 2).double() - naive(qkv, 2)).abs().max() < 1e-5


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = qkv_attention(case(dtype=torch.bfloat16), 2)
    assert out.dtype == torch.bfloat16
    assert (out.double() - naive(case(dtype=torch.bfloat16), 2)).abs().max() < 2e-2


def test_compiles_to_one_graph():
    compiled = torch.compile(qkv_attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(case(), 2), qkv_attention(case(), 2), atol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match=r"qkv must be \[N,3C,H,W\], got \[2, 12\]"):
        qkv_attention(torch.ones(2, 12), 1)
    with pytest.raises(ValueError, match="must divide the 36 channels of qkv, got num_heads=5"):
        qkv_attention(case(), 5)
    with pytest.raises(ValueError, match="got num_heads=0"):
        qkv_attention(case(), 0)
    with pytest.raises(TypeError, match=r"qkv must be floating, got torch\.int64"):
        qkv_attention(torch.ones(1, 3, 1, 1, dtype=torch.int64), 1)
