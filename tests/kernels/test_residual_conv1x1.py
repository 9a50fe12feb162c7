"""Residual sums with a 1x1 convolution among their terms against the formula in float64."""

import importlib
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tcm_fast.kernels._triton import LAUNCHES, assuming_kernels
from tcm_fast.kernels.conv_bf16x3 import split_weight
from tcm_fast.kernels.residual import of_its_terms, residual, residual_reference
from tcm_fast.kernels.residual_conv1x1 import residual_conv1x1, residual_conv1x1_reference

module = importlib.import_module(
    "tcm_fast.kernels.residual_conv1x1"
)  # the package has the function
CL = torch.channels_last
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Batch, channels of the sum, of the two that are multiplied, height and width of these, whether the sum has
# twice as much of both.
SITES = [
    (2, 24, 20, 0, 4, 3, False),
    (1, 1, 1, 0, 1, 1, False),
    (3, 7, 33, 5, 5, 3, False),
    (2, 130, 33, 0, 3, 7, False),  # two tiles of channels
    (3, 33, 130, 7, 3, 5, True),  # tiles that begin within a row of pixels
    (5, 7, 1, 1, 3, 2, True),
    (1, 64, 128, 64, 8, 8, False),  # whole tiles
]


@pytest.fixture(autouse=True)
def fp32_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def case(site=SITES[2], biases=2):
    """x, skip, weight, second where there is one, biases; float64."""
    n, k, c, c2, h, w, _ = site
    generator = torch.Generator().manual_seed(1)
    images = [(n, c, h, w), (k, c + c2, 1, 1)] + [(n, c2, h, w)] * (c2 > 0)
    shapes = [shape_of(site), *images, *[(k,)] * biases]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] /= math.sqrt(c + c2)
    return tensors


def shape_of(site):
    n, k, _, _, h, w, up = site
    return (n, k, 2 * h, 2 * w) if up else (n, k, h, w)


def call(
    function, site, tensors, scale=0.7, *, by_sample=False, lay_out=None, only_skip=False, **more
):
    """The operation, or its reference, on `case`'s tensors."""
    if lay_out is not None:
        tensors = [lay_out(v) if v.ndim == 4 else v for v in tensors]
    x, skip, weight, *rest = tensors
    second = rest.pop(0) if site[3] else None
    rest = [b.expand(site[0], -1) for b in rest] if by_sample else rest
    rest = [None, *rest] if only_skip else rest
    return function(x, skip, weight, scale, *rest, second=second, up=site[6], **more)


def published(x, skip, weight, scale, *biases, second, up):
    """One PyTorch call after another. Where the convolution's result is repeated, the sum of four pixels'
    gradients is rounded to the dtype before it is multiplied, as ours is and the reference's is not."""
    y = torch.conv2d(skip if second is None else torch.cat([skip, second], 1), weight)
    y = torch.nn.functional.interpolate(y, scale_factor=2.0) if up else y
    return residual_reference(x, y, scale, *biases)


def in_dtype(site):
    return published if site[6] else residual_conv1x1_reference


def pair(site, scale=0.7, reference=residual_conv1x1_reference, **more):
    return (
        lambda *tensors, f=f: call(f, site, tensors, scale, **more)
        for f in (residual_conv1x1, reference)
    )


def leaves_on(device, site=SITES[2], dtype=torch.float32, biases=2):
    tensors = [v.to(device, dtype if v.ndim == 4 else None) for v in case(site, biases)]
    return [v.float() if v.ndim == 1 else v.requires_grad_() for v in tensors]


def run(site, tensors, upstream, **more):
    """The output and all gradients."""
    leaves = [v.detach().requires_grad_() for v in tensors]
    out = call(residual_conv1x1, site, leaves, **more)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, allow_unused=True)]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_reference_is_the_formula(site):
    tensors = case(site)
    x, skip, weight, *second, bias, skip_bias = tensors
    product = torch.einsum("nchw,kc->nkhw", torch.cat([skip, *second], 1), weight[:, :, 0, 0])
    if site[6]:
        product = product.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = 0.7 * (x + product + (bias + skip_bias)[:, None, None])
    torch.testing.assert_close(call(residual_conv1x1_reference, site, tensors), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("site", SITES, ids=str)
def test_kernels(compare, dtype, scale, site):
    compare(*pair(site, scale, in_dtype(site)), case(site), [shape_of(site)], dtype)


# Widths of DDPM++ on CIFAR-10 and of ADM at 64 x 64, at fewer pixels.
NETWORKS = [
    (2, 256, 256, 256, 8, 9, False),
    (1, 256, 256, 0, 5, 8, True),
    (1, 192, 384, 192, 11, 12, False),
    (1, 768, 768, 0, 8, 8, False),
]


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("site", NETWORKS, ids=str)
def test_kernels_at_the_networks_widths(compare, monkeypatch, site, rows, dtype):
    tiles = module._tiles

    def of_a_batch(pixels, *more):
        constants, _ = tiles(2**20 if rows == 128 else 1, *more)
        assert constants["PIXELS"] == rows
        return constants, -(-pixels // rows) * -(-site[1] // constants["WIDTH"])

    monkeypatch.setattr(module, "_tiles", of_a_batch)
    compare(*pair(site, reference=in_dtype(site)), case(site), [shape_of(site)], dtype)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize(("biases", "only_skip"), [(0, False), (1, False), (1, True), (2, False)])
def test_biases(compare, dtype, by_sample, biases, only_skip):
    site = SITES[2]
    functions = pair(site, by_sample=by_sample, only_skip=only_skip)
    compare(*functions, case(site, biases), [shape_of(site)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES[2:5:2], ids=str)
def test_large_means(compare, dtype, site):
    tensors = [v + 100 if v.ndim == 4 and i != 2 else v for i, v in enumerate(case(site))]
    compare(*pair(site), tensors, [shape_of(site)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES[2:5:2], ids=str)
def test_the_gradient_that_arrives_is_that_of_the_terms(compare, triton_device, dtype, site):
    compare(*pair(site, of_terms=True), case(site), [shape_of(site)], dtype)
    tensors = [v.detach() for v in leaves_on(triton_device, site, dtype)]
    upstream = torch.randn_like(tensors[0], memory_format=CL)
    out, *grads = run(site, tensors, upstream, of_terms=True)
    unscaled = run(site, tensors, upstream, scale=1.0)
    assert torch.equal(out, run(site, tensors, upstream)[0])
    assert torch.equal(grads[0], upstream)
    for ours, of_one in zip(grads[:-2], unscaled[1:-2], strict=True):
        assert torch.equal(ours, of_one)
    assert grads[-2:] == [None, None]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_every_element_is_written(compare, poisoned, site):
    compare(*pair(site), case(site), [shape_of(site)], torch.float32)


@pytest.mark.parametrize("site", SITES[2:5:2], ids=str)
def test_what_is_not_finite_stays_in_its_sample(triton_device, site):
    tensors = [v.detach() for v in leaves_on(triton_device, site)]
    expected = call(residual_conv1x1, site, tensors)
    for i in (0, 1, 3):  # x, skip, second
        spoiled = [v.clone() for v in tensors]
        spoiled[i][1] = math.nan
        found = call(residual_conv1x1, site, spoiled)
        assert found[1].isnan().all()
        assert torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("site", SITES[2:5:2], ids=str)
def test_layouts(triton_device, site):
    """What is not channels_last is copied: the same bits forward. Backward a library multiplies."""
    tensors = [v.detach() for v in leaves_on(triton_device, site)]
    upstream = torch.randn(shape_of(site), device=triton_device)
    expected = run(site, tensors, upstream)
    assert expected[0].is_contiguous(memory_format=CL)
    for lay_out in (
        lambda v: v.contiguous(memory_format=CL),
        lambda v: torch.cat([v, v], 1).contiguous(memory_format=CL)[:, : v.shape[1]],
        lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
        lambda v: v.repeat_interleave(2, 3)[..., ::2],
    ):
        found = run(site, tensors, upstream.contiguous(memory_format=CL), lay_out=lay_out)
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_a_slice_of_channels(triton_device):
    site = SITES[2]
    tensors = [v.detach() for v in leaves_on(triton_device, site)]
    n, k, h, w = shape_of(site)
    whole = torch.randn(n, 2 * k, h, w, device=triton_device).contiguous(memory_format=CL)
    for more in ({"scale": 1.0}, {"scale": 0.7}, {"of_terms": True}):
        found = run(site, tensors, whole[:, k:], **more)
        expected = run(site, tensors, whole[:, k:].contiguous(memory_format=CL), **more)
        assert found[1].is_contiguous(memory_format=CL)
        for a, b in zip(found, expected, strict=True):
            assert (a is b) or torch.equal(a, b)


def test_a_skip_without_channels(triton_device):
    """Then `second` alone is multiplied."""
    n, k, c, h, w = 2, 5, 9, 3, 4
    x, skip = torch.randn(n, k, h, w), torch.randn(n, c, h, w)
    weight = torch.randn(k, c, 1, 1)
    x, skip, weight = (v.to(triton_device) for v in (x, skip, weight))
    found = residual_conv1x1(x, skip[:, :0], weight, second=skip)
    assert torch.equal(found, residual_conv1x1(x, skip, weight))
    assert torch.equal(found, residual_conv1x1(x, skip, weight, second=skip[:, :0]))


@pytest.mark.parametrize("site", SITES[2:5:2], ids=str)
def test_an_empty_batch(triton_device, site):
    call(residual_conv1x1, site, leaves_on(triton_device, site))
    empty = (0, *site[1:])
    tensors = leaves_on(triton_device, empty)
    out, *grads = run(empty, tensors, torch.empty(shape_of(empty), device=triton_device))
    assert out.shape == shape_of(empty)
    for tensor, grad in zip(tensors, grads, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@pytest.mark.parametrize("wanted", range(6))
def test_gradients_that_are_not_wanted_are_not_computed(triton_device, wanted):
    site = SITES[2]
    tensors = [v.detach() for v in leaves_on(triton_device, site)]
    upstream = torch.randn(shape_of(site), device=triton_device)
    expected = run(site, tensors, upstream)[1 + wanted]
    tensors[wanted].requires_grad_()
    out = call(residual_conv1x1, site, tensors)
    with FlopCounterMode(display=False) as counter:
        out.backward(upstream)
    assert torch.equal(tensors[wanted].grad, expected)
    assert all(v.grad is None for i, v in enumerate(tensors) if i != wanted)
    products = counter.get_total_flops() / (2 * tensors[2].numel() * upstream[:, 0].numel())
    assert products == (1 if wanted in (1, 2, 3) else 0)


def test_second_derivatives(triton_device):
    """The sum is linear in each of its arguments."""
    site = SITES[4]
    leaves = leaves_on(triton_device, site)

    def penalty(function, leaves):
        out = call(function, site, leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves[:4], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves[:4])

    found = penalty(residual_conv1x1, leaves)
    exact = penalty(residual_conv1x1_reference, [v.double() for v in leaves])
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("of_terms", [False, True])
@pytest.mark.parametrize("site", [SITES[0], SITES[4]], ids=str)
def test_the_operator(triton_device, monkeypatch, backend, of_terms, site):
    x, skip, weight, *second, bias, skip_bias = leaves_on(triton_device, site)
    residual_conv1x1(x, x, torch.ones(len(x[0]), len(x[0]), 1, 1, device=x.device))  # a launch
    monkeypatch.setenv("TCM_FAST_BACKEND", backend)
    rows = [b.expand(len(x), -1).requires_grad_() for b in (bias, skip_bias)]
    images = x, skip, (second or [None])[0], weight
    for biases in ((bias.requires_grad_(), None), rows):
        arguments = *images, 0.7, *biases, site[6], of_terms
        torch.library.opcheck(torch.ops.tcm_fast.residual_conv1x1_fwd.default, arguments)


@pytest.mark.parametrize("site", SITES[2:5:2], ids=str)
@pytest.mark.parametrize("of_terms", [False, True])
def test_compiles_to_one_graph(triton_device, site, of_terms):
    tensors = [v.detach() for v in leaves_on(triton_device, site)]
    upstream = torch.randn(shape_of(site), device=triton_device)
    compiled = torch.compile(residual_conv1x1, fullgraph=True, backend="aot_eager")
    leaves = [v.requires_grad_() for v in tensors]
    out = call(compiled, site, leaves, of_terms=of_terms)
    found = [out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True)]
    for a, b in zip(found, run(site, tensors, upstream, of_terms=of_terms), strict=True):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("site", [SITES[2], SITES[5]], ids=str)
@pytest.mark.parametrize("of_terms", [False, True])
def test_without_a_kernel(site, of_terms):
    """The reference, in x's own layout: fp64 anywhere, the rest where no kernel runs."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = [v.detach() for v in leaves_on("cpu", site, dtype)]
        before = LAUNCHES.total()
        found = call(residual_conv1x1, site, tensors, of_terms=of_terms)
        assert torch.equal(found, call(residual_conv1x1_reference, site, tensors))
        assert LAUNCHES.total() == before
        assert found.is_contiguous()
        lay_out = lambda v: v.contiguous(memory_format=CL)  # noqa: E731
        last = call(residual_conv1x1, site, tensors, of_terms=of_terms, lay_out=lay_out)
        assert last.is_contiguous(memory_format=CL)
    if not of_terms:
        leaves = [v.requires_grad_() for v in case(site)]
        assert torch.autograd.gradcheck(lambda *v: call(residual_conv1x1, site, v), leaves)


def test_float64_beside_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    tensors = case()
    found = call(residual_conv1x1, SITES[2], tensors)
    assert torch.equal(found, call(residual_conv1x1_reference, SITES[2], tensors))


def test_it_is_the_residual_of_a_convolution(triton_device):
    """Within the errors of one more rounding to the dtype."""
    site = SITES[4]
    x, skip, weight, second, *biases = (v.detach() for v in leaves_on(triton_device, site))
    product = torch.conv2d(torch.cat([skip, second], 1), weight)
    product = torch.nn.functional.interpolate(product, scale_factor=2.0)
    expected = residual(x, product, 0.7, *biases)
    found = residual_conv1x1(x, skip, weight, 0.7, *biases, second=second, up=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_offsets_within_a_tile_have_32_bits():
    """The tile's own begins in 64; rows of 16 million channels would not do."""
    for itemsize in (2, 4):
        for pixels, c in ((2**32, 2048), (1, 1), (2**31, 1), (2**20, 2**14)):
            constants, programs = module._tiles(pixels, c, itemsize, "tf32x3")
            rows = constants["PIXELS"]
            slabs = -(-c // constants["WIDTH"])
            assert (programs // slabs - 1) * rows < pixels <= programs // slabs * rows
            assert programs < 2**31
            assert rows * c < 2**31  # of the sum
            for half in (1, 7, 16, 2**14):  # the width of what is repeated, from its row's begin
                assert (rows // (4 * half) + 2) * half * 2**14 < 2**31


def test_more_than_2_to_the_31_elements():
    image = torch.empty(2**16, 256, 16, 16, dtype=torch.bfloat16, device="meta")
    assert image.numel() > 2**31
    low = torch.empty(2**16, 512, 8, 8, dtype=torch.bfloat16, device="meta").requires_grad_()
    weight = torch.empty(256, 512, 1, 1, dtype=torch.bfloat16, device="meta")
    with assuming_kernels():
        out = residual_conv1x1(image, low, weight, up=True)
        out.backward(out.detach())
    assert out.shape == image.shape
    assert out.is_contiguous(memory_format=CL)
    assert low.grad.shape == low.shape


@pytest.mark.parametrize("allowed", [False, True])
def test_fp32_products_are_what_convolutions_have(monkeypatch, allowed):
    monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert module._precision(torch.float32, None) == ("tf32" if allowed else "tf32x3")
    assert module._precision(torch.float32, torch.empty(0)) == "tf32x3"
    assert (
        module._precision(torch.bfloat16, None) == "tf32x3"
    )  # one form, whatever convolutions may


def test_refuses():
    x, skip, weight, second, bias, skip_bias = (v.float() for v in case())
    wide = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    both = {"second": second}
    for error, message, arguments, more in (
        (TypeError, r"x must be floating, got torch\.int64", (x.long(), skip, weight), both),
        (ValueError, r"x must be \[N,C,H,W\], got \[7, 5, 3\]", (x[0], skip, weight), both),
        (
            ValueError,
            r"x must have an even height and width with up, got 5x3",
            (x, skip, weight),
            both | {"up": True},
        ),
        (
            ValueError,
            r"skip must be \[3,C,5,3\], got \[2, 33, 5, 3\]",
            (x, skip[:2], weight),
            both,
        ),
        (ValueError, r"skip must be \[3,C,5,3\], got \[3, 5, 3\]", (x, skip[:, 0], weight), both),
        (ValueError, r"skip must be \[3,C,5,3\], got \[3, 1, 10", (x, wide[:, :1], weight), both),
        (
            ValueError,
            r"skip must be \[3,C,5,3\], got \[3, 7, 10, 6\]",
            (wide, wide, weight),
            both | {"up": True},
        ),
        (
            ValueError,
            r"second must be \[3,C,5,3\], got \[3, 5, 5, 2\]",
            (x, skip, weight),
            {"second": second[..., :2]},
        ),
        (ValueError, r"weight must be \[7,33,1,1\], got \[7, 38, 1, 1\]", (x, skip, weight), {}),
        (
            ValueError,
            r"weight must be \[7,38,1,1\], got \[7, 38\]",
            (x, skip, weight[..., 0, 0]),
            both,
        ),
        (ValueError, r"weight must be \[7,38,1,1\], got \[6, 38", (x, skip, weight[:6]), both),
        (
            ValueError,
            r"weight must have channels on both sides, got \[7, 0, 1, 1\]",
            (x, skip[:, :0], weight[:, :0]),
            {},
        ),
        (
            ValueError,
            r"weight must have channels on both sides, got \[0, 33, 1, 1\]",
            (x[:, :0], skip, weight[:0, :33]),
            {},
        ),
        (
            TypeError,
            r"skip must be of x's dtype torch\.float32, got torch\.float64",
            (x, skip.double(), weight),
            both,
        ),
        (
            TypeError,
            r"second must be of x's dtype torch\.float32, got torch\.bfloat16",
            (x, skip, weight),
            {"second": second.bfloat16()},
        ),
        (
            TypeError,
            r"weight must be of x's dtype torch\.float32, got torch\.float16",
            (x, skip, weight.half()),
            both,
        ),
        (ValueError, r"skip must be on cpu, got meta", (x, skip.to("meta"), weight), both),
        (ValueError, r"weight must be on cpu, got meta", (x, skip, weight.to("meta")), both),
        (
            ValueError,
            r"x_bias must be \[7\] on cpu, or all biases .* got \[3\]",
            (x, skip, weight, 1.0, bias[:3]),
            both,
        ),
        (
            ValueError,
            r"skip_bias must be \[7\] on cpu, or all biases .* \[3,7\], got \[3, 7\]",
            (x, skip, weight, 1.0, bias, skip_bias.expand(3, -1)),
            both,
        ),
        (
            ValueError,
            r"x_bias must be \[7\] on cpu, or all biases .* got \[3, 7\]",
            (x, skip, weight, 1.0, bias.repeat(3, 1)),
            both,
        ),
    ):
        with pytest.raises(error, match=rf"^residual_conv1x1: {message}"):
            residual_conv1x1(*arguments, **more)


@pytest.mark.parametrize("of_terms", [False, True])
def test_gradients_of_products_in_bf16_parts(of_terms, triton_device):
    """They are those of fp32 to what is left out, 2^-16 of the sum of magnitudes."""
    for site in (SITES[2], SITES[4]):
        leaves = [v.requires_grad_() for v in leaves_on(triton_device, site, biases=0)]
        options = dict(of_terms=of_terms)
        x, skip, weight, second = leaves
        options |= dict(second=second, up=site[6])
        split = split_weight(weight)
        plain = residual_conv1x1(x, skip, weight, 0.7, **options)
        ours = residual_conv1x1(x, skip, weight, 0.7, parts=split, **options)
        assert torch.equal(plain, ours)
        upstream = torch.randn_like(plain)
        expected = torch.autograd.grad(plain, leaves, upstream)
        found = torch.autograd.grad(ours, leaves, upstream)
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 2**-12 * b.abs().max()
    assert not torch.equal(found[1], expected[1])
    with pytest.raises(
        ValueError,
        match=r"residual_conv1x1: parts must be split_weight's of an fp32 weight, \[2,33,137\]",
    ):
        residual_conv1x1(x, skip, weight, parts=split[:1], **options)


def test_what_is_infinite_stays_so_where_only_the_terms_have_gradients(triton_device, monkeypatch):
    x, skip, weight, second = leaves_on(triton_device, biases=0)
    x.data[0, 0, 0, 0] = math.inf
    ours = residual_conv1x1(x, skip, weight, second=second, of_terms=True)
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    plain = residual_conv1x1(x, skip, weight, second=second, of_terms=True)
    assert ours[0, 0, 0, 0] == plain[0, 0, 0, 0] == math.inf
    assert ours.isinf().sum() == plain.isinf().sum() == 1
    with pytest.raises(ValueError, match=r"of_its_terms: bias must be \[7\]"):
        of_its_terms(plain, 0.7, torch.zeros(3))
