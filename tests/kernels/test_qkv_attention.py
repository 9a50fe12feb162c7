import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcm_fast.kernels.qkv_attention import HEAD_CHANNELS, qkv_attention, qkv_attention_reference

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


# ---- the Triton kernels -------------------------------------------------------------------------

CL, NCHW = torch.channels_last, torch.contiguous_format
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def output_and_gradient(function, qkv, upstream, heads, **options):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, heads, **options)
    return out.detach(), torch.autograd.grad(out, qkv, upstream.to(out.dtype))[0]


def compare_with_oracle(check, device, heads, d, size, dtype, layout=CL, n=1, qkv=None, **options):
    """The kernels' output and gradient beside PyTorch's in the same dtype, by the float64 oracle."""
    if qkv is None:
        qkv = case(n, heads, d, size, dtype, layout)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(len(qkv), heads * d, *size, generator=generator).to(device, dtype)
    qkv = qkv.to(device)
    kernel = output_and_gradient(qkv_attention, qkv, upstream, heads, **options)
    plain = output_and_gradient(qkv_attention_reference, qkv, upstream, heads, **options)
    wide = qkv.double(), upstream.double()
    oracle = output_and_gradient(qkv_attention_reference, *wide, heads, **options)
    for what, ours, theirs, exact in zip(("output", "grad"), kernel, plain, oracle, strict=True):
        check(ours, theirs, exact, what)
    return kernel


# (heads, channels of a head, size): the networks', then the other head sizes and odd token counts.
SITES = [
    (1, 256, (8, 8)),
    (1, 256, (16, 16)),
    (2, 64, (8, 8)),
    (1, 64, (16, 16)),
    (1, 128, (10, 10)),
    (2, 32, (9, 11)),
    (3, 16, (4, 4)),
    (2, 16, (1, 1)),
    (1, 64, (5, 13)),
    (1, 256, (5, 7)),
]


LARGEST = (16, 16)


def marks_of(site, layout, dtype):
    """What compiles for seconds is emulated once: wide heads in the networks' layout, 16 bits as bf16."""
    is_slow = site[2] == LARGEST or (site[1] >= 128 and layout != CL) or dtype == torch.float16
    return [pytest.mark.slow_emulated] if is_slow else []


CASES = [
    pytest.param(*site, dtype, layout, marks=marks_of(site, layout, dtype))
    for site in SITES
    for dtype in FLOATS
    for layout in LAYOUTS
    if (site[1] <= 64 or dtype != torch.float32) and (site[2] != LARGEST or layout == CL)
]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("heads", "d", "size", "dtype", "layout"), CASES)
def test_kernels_match_the_oracle(
    heads, d, size, dtype, layout, normalize, triton_device, check_against_oracle
):
    out, grad = compare_with_oracle(
        check_against_oracle, triton_device, heads, d, size, dtype, layout, normalize=normalize
    )
    assert out.is_contiguous(memory_format=layout)
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "normalize"), [((32, 32), False), ((64, 64), True)])
def test_kernels_match_the_oracle_on_large_maps(
    size, normalize, triton_device, check_against_oracle
):
    compare_with_oracle(
        check_against_oracle, triton_device, 1, 64, size, torch.float16, normalize=normalize
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_kernels_take_a_scale(dtype, normalize, scale, triton_device, check_against_oracle):
    for size in [(5, 5), (9, 9)]:
        compare_with_oracle(
            check_against_oracle, triton_device, 2, 16, size, dtype, n=2,
            normalize=normalize, scale=scale,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [(5, 5), (9, 9)])
def test_kernels_take_large_means_and_large_logits(
    dtype, normalize, size, triton_device, check_against_oracle
):
    """Logits of about 50 ± 20, whose exponentials are no fp16."""
    qkv = case(1, 2, 32, size, dtype, CL) * 2 + 3
    compare_with_oracle(
        check_against_oracle, triton_device, 2, 32, size, dtype, qkv=qkv, normalize=normalize
    )


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_normalisation_takes_any_magnitude(dtype, magnitude, triton_device, check_against_oracle):
    qkv = (case(1, 1, 64, (9, 9), torch.float32, CL) * magnitude).to(dtype)
    qkv[:, :, 3, 4] = 0
    # fp16 holds the gradient, which is as much larger as the input is smaller, only for some.
    if dtype == torch.float16 and magnitude < 1:
        out = qkv_attention(qkv.to(triton_device), 1, normalize=True)
        exact = qkv_attention_reference(qkv.double(), 1, normalize=True)
        plain = qkv_attention_reference(qkv, 1, normalize=True)
        check_against_oracle(out.cpu(), plain, exact)
        return
    compare_with_oracle(
        check_against_oracle, triton_device, 1, 64, (9, 9), dtype, qkv=qkv, normalize=True
    )


def test_kernels_of_a_zero_input_have_a_finite_gradient(triton_device):
    for size in [(4, 4), (9, 9)]:
        qkv = torch.zeros(1, 3 * 16, *size, requires_grad=True, device=triton_device)
        qkv_attention(qkv, 1, normalize=True).sum().backward()
        assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (9, 13)])
def test_kernels_write_every_element_and_repeat_their_bits(
    size, normalize, layout, triton_device, monkeypatch
):
    qkv = case(2, 1, 32, size, torch.float16, layout).to(triton_device)
    upstream = torch.randn(2, 32, *size, device=triton_device)
    first = output_and_gradient(qkv_attention, qkv, upstream, 1, normalize=normalize)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    second = output_and_gradient(qkv_attention, qkv, upstream, 1, normalize=normalize)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalize", [False, True])
def test_an_image_and_a_head_do_not_depend_on_the_others(normalize, triton_device):
    qkv = case(3, 2, 16, (9, 9), torch.float16, CL).to(triton_device)
    upstream = torch.randn(3, 32, 9, 9, device=triton_device)
    out, grad = output_and_gradient(qkv_attention, qkv, upstream, 2, normalize=normalize)
    alone = output_and_gradient(
        qkv_attention, qkv[1:2, 48:], upstream[1:2, 16:], 1, normalize=normalize
    )
    assert torch.equal(alone[0], out[1:2, 16:])
    assert torch.equal(alone[1], grad[1:2, 48:])


def test_kernels_take_any_strides(triton_device):
    """Slices of either layout, a gradient that is one number seen many times, no image at all."""
    wide = case(2, 2, 16, (9, 18), torch.float32, CL).to(triton_device)
    for qkv in (wide[..., ::2], wide.contiguous()[..., ::2], wide[..., ::2].mT, wide[:, 48:]):
        heads = qkv.shape[1] // 48
        upstream = torch.ones((), device=triton_device).expand(2, 16 * heads, *qkv.shape[2:])
        ours = output_and_gradient(qkv_attention, qkv, upstream, heads)
        plain = output_and_gradient(qkv_attention_reference, qkv, upstream, heads)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)
    empty = wide[:0].requires_grad_()
    out = qkv_attention(empty, 2)
    out.sum().backward()
    assert out.shape == (0, 32, 9, 18)
    assert empty.grad.shape == empty.shape


@pytest.mark.slow_emulated
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 2),
    heads=st.integers(1, 3),
    d=st.sampled_from(HEAD_CHANNELS[:3]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    normalize=st.booleans(),
)
def test_kernels_take_any_shape(
    n, heads, d, size, dtype, layout, normalize, triton_device, check_against_oracle
):
    compare_with_oracle(
        check_against_oracle, triton_device, heads, d, size, dtype, layout, n, normalize=normalize
    )


def test_what_the_kernels_do_not_take_goes_to_the_reference(triton_device):
    """The last one is theirs."""
    for d, dtype in ((24, torch.float32), (128, torch.float32), (16, torch.float64), (16, None)):
        qkv = case(1, 1, d, (3, 3), dtype or torch.float32).to(triton_device)
        out, expected = qkv_attention(qkv, 1), qkv_attention_reference(qkv, 1)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert out.stride() == expected.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_operators_are_well_formed(layout, normalize, triton_device):
    qkv = case(2, 1, 16, (3, 5), torch.float32, layout).to(triton_device).requires_grad_()
    operator = torch.ops.tcm_fast.qkv_attention_fwd.default
    torch.library.opcheck(operator, (qkv, 1, normalize, 0.25))


def test_kernels_compile_to_one_graph(triton_device):
    qkv = case(2, 2, 16, (3, 5)).to(triton_device)

    def loss(qkv):
        return (qkv_attention(qkv, 2, normalize=True) * 2).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = qkv.detach().requires_grad_()
        gradients.append(torch.autograd.grad(function(x), x)[0])
    assert torch.equal(*gradients)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Conv2d(16, 48, 1)

    def forward(self, x):
        return x + qkv_attention(self.qkv(x), 1)


def test_kernels_in_a_module(triton_device, seed):
    """Autocast, a functional call and a deep copy."""
    module = Attention().to(triton_device)
    x = torch.randn(2, 16, 3, 5, device=triton_device)
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        low = module(x)
    torch.testing.assert_close(low.float(), module(x), atol=2e-2, rtol=2e-2)
    called = torch.func.functional_call(module, dict(module.named_parameters()), (x,))
    assert torch.equal(called, module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_a_second_derivative_is_refused(triton_device):
    qkv = case(1, 1, 16, (3, 3)).to(triton_device).requires_grad_()
    (grad,) = torch.autograd.grad(qkv_attention(qkv, 1).sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="qkv_attention: its kernel has no second"):
        grad.sum().backward()


def test_kernels_are_required_where_none_can_run(monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    with pytest.raises(ValueError, match="qkv_attention: TCM_FAST_BACKEND=kernel needs a kernel"):
        qkv_attention(case(1, 1, 16), 1)


@pytest.mark.gpu
def test_kernels_count_more_than_2_to_the_31_elements(triton_device):
    n = 2**31 // (192 * 64) + 2
    qkv = torch.zeros(n, 192, 8, 8, dtype=torch.float16, device=triton_device)
    qkv = qkv.contiguous(memory_format=CL)
    qkv[-1:] = case(1, 1, 64, (8, 8), torch.float16).to(triton_device)
    whole = output_and_gradient(qkv_attention, qkv, torch.ones_like(qkv[:, :64]), 1)
    last = output_and_gradient(qkv_attention, qkv[-1:], torch.ones_like(qkv[-1:, :64]), 1)
    for a, b in zip(whole, last, strict=True):
        assert torch.equal(a[-1:], b)


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tcm_fast.kernels.qkv_attention import qkv_attention
import tcm_fast.kernels
specialisations = sys.modules["tcm_fast.kernels.qkv_attention"].specialisations
cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
compiled = set()
for capability, room in ((80, 163), (90, 227)):
    for v in specialisations(capability):
        if "fp32" in v.site or not v.site.startswith(("DDPM++", "EDM2-S 16x16")):
            continue
        names = v.kernel.arg_names
        types = {name: v.signature.get(name, "constexpr") for name in names}
        aligned = [n for n in names if types[n].startswith("*") or n in v.aligned]
        source = ASTSource(
            v.kernel, types, {(names.index(n),): c for n, c in v.constants.items()},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        binary = triton.compile(
            source, target=GPUTarget("cuda", capability, 32),
            options={"num_warps": v.num_warps, "num_stages": v.num_stages},
        )
        where = f"{v.kernel.__name__} {v.site} sm_{capability}"
        assert binary.metadata.shared <= room * 1024, where
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        stack, local = re.search(r"STACK:(\\d+).*LOCAL:(\\d+)", usage).groups()
        assert stack == local == "0", where + ": " + usage
        compiled.add(v.site)
print(len(compiled))
"""


@pytest.mark.slow
def test_no_spills_at_16_bit_sites_of_the_networks(tmp_path, monkeypatch):
    """A few of those that the recorded report holds, with the compiler that is here, in a process that
    does not interpret."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 6
