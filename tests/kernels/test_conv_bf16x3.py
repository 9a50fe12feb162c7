"""fp32 convolutions by three bf16 products against float64, at the networks' sites within 2^-16 of the sum of
magnitudes."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from tcm_fast.kernels import _triton
from tcm_fast.kernels.conv_bf16x3 import conv_bf16x3, split_reference, split_weight
from tcm_fast.networks import build_network
from tcm_fast.networks.layers import Conv2d

CL, NCHW = torch.channels_last, torch.contiguous_format
# Of the sum of a result's products' magnitudes: a product is off by 2^-15 of it at most, and 27 products or
# more together by half of that.
SHARE, WORST = 2**-16, 2**-15


def case(n=2, c=20, k=24, h=5, w=3, size=3, *, seed=1, layout=CL, device="cpu"):
    """x, weight, bias and an upstream gradient, fp32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, c, h, w), (k, c, size, size), (k,), (n, k, h, w))
    x, weight, bias, grad = (torch.randn(s, generator=generator).to(device) for s in shapes)
    return (*(v.contiguous(memory_format=layout) for v in (x, weight)), bias, grad)


def run(function, x, weight, bias, grad):
    """The output and the gradients to x, weight and bias."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(x, weight, bias, grad):
    """In float64, and the same with magnitudes."""

    def function(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    wide = [v.double() for v in (x, weight, bias, grad)]
    return run(function, *wide), run(function, *(v.abs() for v in wide))


def check(*tensors):
    """The largest error of output and gradients as a share of the sum of magnitudes; two runs are equal."""
    ours = run(conv_bf16x3, *tensors)
    again = run(conv_bf16x3, *tensors)
    worst = 0.0
    for a, b, truth, terms in zip(ours, again, *exact(*tensors), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)  # in every bit
        error = (a.double() - truth).abs()
        assert (error <= WORST * terms).all()
        if error.numel():
            worst = max(worst, (error / terms).max().item())
    return worst


SHAPES = [
    {"size": 3},
    {"size": 1},
    {"c": 3, "k": 130, "h": 4, "w": 4},  # the first convolution
    {"c": 70, "k": 3, "n": 1},  # the last
    {"n": 1, "c": 1, "k": 1, "h": 1, "w": 1},
    {"c": 33, "k": 17, "h": 1, "w": 7},
    {"n": 9, "c": 5, "k": 150, "h": 4, "w": 4, "size": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(triton_device, shape):
    check(*case(**shape, device=triton_device))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape):
    check(*case(**shape))


@pytest.mark.parametrize("pixels", [(3, 5, 8), (1, 16, 16)], ids=str)
def test_a_gradient_in_pieces(triton_device, monkeypatch, pixels):
    """The gradient to the weight is summed piece by piece; the last one may be shorter."""
    monkeypatch.setattr(sys.modules[conv_bf16x3.__module__], "FEWEST_STEPS", 1)
    n, h, w = pixels
    check(*case(n, 7, 9, h, w, size=1, device=triton_device))


def sites():
    """(input channels, output channels, kernel size) of every such convolution of DDPM++ on CIFAR-10."""
    with torch.device("meta"):
        net = build_network("ddpmpp", img_resolution=32, img_channels=3)
    layers = [m for m in net.modules() if isinstance(m, Conv2d)]
    return sorted({(m.in_channels, m.out_channels, m.kernel_size[0]) for m in layers})


def test_offsets_within_a_piece_have_32_bits():
    tiles = sys.modules[conv_bf16x3.__module__]._weight_tiles
    for pixels, c, k, taps in ((2048 * 32**2, 1024, 1024, 9), (2**31 - 2**16, 3, 3, 1)):
        constants, _, _, _, steps, pieces = tiles(pixels, c, k, taps, 90)
        assert steps * constants["DEPTH"] * max(c, k) <= 2**31 - 2**20
        assert (
            (pieces - 1) * steps * constants["DEPTH"]
            < pixels
            <= pieces * steps * constants["DEPTH"]
        )
        assert pieces * steps * constants["DEPTH"] < 2**31


def test_the_networks_sites():
    assert len(sites()) > 8
    assert {size for _, _, size in sites()} == {1, 3}


@pytest.mark.parametrize("site", sites(), ids=str)
def test_reference_at_the_networks_sites(site):
    c, k, size = site
    assert check(*case(2, c, k, 8, 8, size)) < SHARE


@pytest.mark.slow
@pytest.mark.parametrize("site", sites(), ids=str)
def test_kernels_at_the_networks_sites(triton_device, site):
    c, k, size = site
    if size == 3 and min(c, k) > 128 and _triton.interpreting():
        conv_bf16x3(*case(1, device=triton_device)[:2])
        pytest.skip("takes minutes in Triton's interpreter: with a GPU or emulated")
    assert check(*case(1, c, k, 5, 4, size, device=triton_device)) < SHARE


def test_the_parts_are_the_number(triton_device):
    """hi + lo is x but for 2^-17 of it; so each product is off by 2^-15 of it at most."""
    x = torch.randn(4096).mul(torch.randn(4096).mul(20).exp2())
    hi, lo = split_reference(x)
    assert ((hi + lo - x).abs() <= 2.0**-17 * x.abs()).all()
    assert torch.equal(hi, hi.bfloat16().float())
    weight = torch.randn(3, 5, 3, 3)
    parts = split_weight(weight).double().sum(0).view(3, 3, 3, 5).permute(0, 3, 1, 2)
    assert ((parts - weight).abs() <= 2.0**-17 * weight.abs()).all()
    # One product each: x split by the kernel.
    eye = torch.ones(1, 1, 1, 1, device=triton_device)
    image = x.view(1, 1, 64, 64).to(triton_device)
    assert torch.equal(conv_bf16x3(image, eye).view(-1).cpu(), hi + lo)


def test_kernels_are_the_reference(triton_device, monkeypatch):
    """Where every sum is exact they agree in every bit."""
    x, weight, bias, grad = (v.mul(64).round().div(64) for v in case(device=triton_device))
    ours = run(conv_bf16x3, x, weight, bias, grad)
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    for a, b in zip(ours, run(conv_bf16x3, x, weight, bias, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_what_is_not_finite_shows_where_fp32_has_it(triton_device, monkeypatch, bad, backend):
    x, weight, bias, _ = case(1, 17, 18, 5, 6, device=triton_device)
    conv_bf16x3(x, weight)  # a launch also where the reference is meant
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    x[0, 3, 2, 2] = bad
    expected = F.conv2d(x, weight, bias, padding=1).isfinite()
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(conv_bf16x3(x, weight, bias).isfinite(), expected)
    x[0, 3, 2, 2] = 1
    weight[5, 2, 1, 1] = bad
    assert torch.equal(conv_bf16x3(x, weight).isfinite(), F.conv2d(x, weight, padding=1).isfinite())


def test_small_and_large_numbers(triton_device, monkeypatch):
    x, weight, _, _ = case(1, 24, 16, 3, 3, device=triton_device)
    for factor in (2.0**-140, 2.0**-120, 2.0**-60, 2.0**110):
        truth = F.conv2d((x * factor).double(), weight.double(), padding=1)
        terms = F.conv2d((x * factor).double().abs(), weight.double().abs(), padding=1)
        for backend, least in (("reference", 2.0**-133), ("kernel", 2.0**-126)):
            # Of bf16's numbers; the interpreter has none below the normal ones.
            monkeypatch.setenv("TCM_FAST_BACKEND", backend)
            error = (conv_bf16x3(x * factor, weight).double() - truth).abs()
            assert (error <= WORST * terms + least * weight.abs().sum().item()).all()


def test_an_empty_batch(triton_device):
    conv_bf16x3(*case(1, device=triton_device)[:2])
    empty = case(0, device=triton_device)
    out, grad_x, grad_weight, grad_bias = run(conv_bf16x3, *empty)
    assert out.shape == (0, 24, 5, 3)
    assert grad_x.shape == (0, 20, 5, 3)
    assert not grad_weight.any()
    assert not grad_bias.any()


def test_layouts(triton_device):
    x, weight, bias, grad = case(device=triton_device)
    expected = run(conv_bf16x3, x, weight, bias, grad)
    assert expected[0].is_contiguous(memory_format=CL)
    wide = torch.cat([x, x], 1)[:, :20]  # a slice of channels
    for other in (x.contiguous(), wide, x.transpose(2, 3).contiguous().transpose(2, 3)):
        found = run(conv_bf16x3, other, weight.contiguous(), bias, grad.contiguous())
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_an_image_alone_is_the_image_in_a_batch(triton_device):
    x, weight, _, _ = case(5, 40, 30, 4, 4, device=triton_device)
    assert torch.equal(conv_bf16x3(x, weight)[4:5], conv_bf16x3(x[4:5], weight))


def test_parts_that_are_known(triton_device):
    x, weight, bias, grad = case(device=triton_device)
    parts = split_weight(weight)
    for a, b in zip(
        run(lambda *v: conv_bf16x3(*v, parts=parts), x, weight, bias, grad),
        run(conv_bf16x3, x, weight, bias, grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_every_element_is_written(triton_device, poisoned):
    for tensor in run(conv_bf16x3, *case(2, 7, 40, 7, 5, device=triton_device)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_the_operators(triton_device, monkeypatch, backend):
    x, weight, bias, grad = case(device=triton_device)
    parts = split_weight(weight)
    conv_bf16x3(x, weight)
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    ops = torch.ops.tcm_fast
    torch.library.opcheck(ops.conv_bf16x3_fwd.default, (*leaves, parts))
    torch.library.opcheck(ops.conv_bf16x3_fwd.default, (x.detach(), weight, None, parts))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.conv_bf16x3_input_bwd.default, (grad, parts, 3), test_utils=tests)
    torch.library.opcheck(ops.conv_bf16x3_weight_bwd.default, (grad, x, 3), test_utils=tests)


def test_compiles_to_one_graph():
    x, weight, bias, grad = case()
    compiled = torch.compile(conv_bf16x3, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, x, weight, bias, grad),
        run(conv_bf16x3, x, weight, bias, grad),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-5)


def test_gradients_that_are_not_wanted_are_not_computed(monkeypatch):
    x, weight, _, _ = case()
    out = conv_bf16x3(x.requires_grad_(), weight)
    (saved, _) = out.grad_fn.saved_tensors
    assert saved is None
    out.sum().backward()
    assert weight.grad is None


def test_no_second_derivative():
    x, weight, _, grad = case()
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    for wanted in leaves:
        first = torch.autograd.grad(
            conv_bf16x3(*leaves), wanted, grad.requires_grad_(), create_graph=True
        )
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first[0].sum().backward()


def test_refuses():
    x, weight, bias, _ = case()
    parts = split_weight(weight)
    with pytest.raises(TypeError, match=r"conv_bf16x3: x must be fp32, got torch\.float64"):
        conv_bf16x3(x.double(), weight.double())
    with pytest.raises(TypeError, match=r"conv_bf16x3: weight must be fp32, got torch\.bfloat16"):
        conv_bf16x3(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"conv_bf16x3: x must be \[N,C,H,W\], got \[20, 5, 3\]"):
        conv_bf16x3(x[0], weight)
    with pytest.raises(
        ValueError, match=r"weight must be \[K,20,3,3\] or \[K,20,1,1\], got \[24, 20, 5, 5\]"
    ):
        conv_bf16x3(x, torch.zeros(24, 20, 5, 5))
    with pytest.raises(ValueError, match=r"20 input channels of x \(no groups\), got 10"):
        conv_bf16x3(x, weight[:, :10])
    with pytest.raises(ValueError, match=r"conv_bf16x3: bias must be \[24\], got \[23\]"):
        conv_bf16x3(x, weight, bias[:-1])
    with pytest.raises(TypeError, match=r"conv_bf16x3: parts must be bf16, got torch\.float32"):
        conv_bf16x3(x, weight, parts=parts.float())
    with pytest.raises(
        ValueError, match=r"parts must be split_weight's of the weight, \[2,24,180\]"
    ):
        conv_bf16x3(x, weight, parts=parts[:, :-1])
    with pytest.raises(ValueError, match=r"without a gradient"):
        conv_bf16x3(x, weight, parts=parts.requires_grad_())
    with pytest.raises(ValueError, match=r"conv_bf16x3: weight must be on cpu, got meta"):
        conv_bf16x3(x, weight.to("meta"))
