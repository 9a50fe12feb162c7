"""The posterior mean against a double loop in float64: both limits of t, near duplicates, classes, bits."""

import math

import pytest
import torch

from tcm_fast.kernels._triton import interpreting
from tcm_fast.kernels.noise_pair import to_unit_range
from tcm_fast.kernels.posterior_mean import posterior_mean

SHAPE = (3, 8, 8)


def problem(t, n=5, bank=70, shape=SHAPE, seed=0):
    """Images of which several of the bank lie within a few t of each: posteriors over more than one."""
    g = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    own = torch.randint(0, 256, (n, *shape), generator=g)
    near = own[torch.randint(0, n, (bank,), generator=g)]
    grey = 127.5 * 2 * t / math.sqrt(size)  # of each element, for a distance of 2 t
    shift = (grey * torch.randn(bank, *shape, generator=g)).round()
    if grey < 1:  # single elements by one
        shift = torch.randn(bank, *shape, generator=g).sign()
        shift = shift * (torch.rand(bank, *shape, generator=g) < grey**2)
    bank_images = (near + shift).clamp(0, 255).byte()
    noise = torch.randn(n, *shape, generator=g)
    levels = torch.full((n,), float(t))
    own = own.byte()
    return to_unit_range(own) + t * noise, levels, own, bank_images


def naive(x_t, t, own, bank, classes=None, bank_classes=None):
    """The mean, one pair of images at a time in float64, and how much its elements may be off in fp32: each
    logit by a few roundings of its two terms and of the noise, to 2^-19."""
    means, slack = [], []
    for i in range(len(x_t)):
        x, y = x_t[i].double(), to_unit_range(own[i]).double()
        images, logits, errors = [y], [-(x - y).square().sum() / (2 * t[i].double() ** 2)], [0.0]
        for j in range(len(bank)):
            if torch.equal(own[i], bank[j]):
                continue
            if classes is not None and classes[i] != bank_classes[j]:
                continue
            z, level = to_unit_range(bank[j]).double(), t[i].double()
            logits.append(-(x - z).square().sum() / (2 * level**2))
            d, eps = y - z, (x - y) / level
            terms = d.square().sum() / (2 * level**2) + (eps * d).sum().abs() / level
            errors.append(float(2**-22 * terms + 2**-19 * d.norm() / level))
            images.append(z)
        stack = torch.stack(images)
        weights = torch.stack(logits).softmax(0).reshape(-1, 1, 1, 1)
        mean = (weights * stack).sum(0)
        off = torch.tensor(errors, dtype=torch.float64).reshape(-1, 1, 1, 1)
        means.append(mean)
        slack.append((weights * off * (stack - mean).abs()).sum(0))
    return torch.stack(means), torch.stack(slack)


def check(found, expected):
    mean, slack = expected
    assert found.shape == mean.shape
    assert ((found.double() - mean).abs() <= slack + 3e-7).all()  # NaN fails


LEVELS = [0.002, 0.05, 1.0, 5.0, 80.0]


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_is_the_formula(t, dtype):
    x_t, levels, own, bank = problem(t)
    expected = naive(x_t, levels, own, bank)
    found = posterior_mean(x_t.to(dtype), levels.to(dtype), own, bank)
    assert found.dtype == dtype
    check(found, expected)
    assert (expected[0] - to_unit_range(own)).abs().max() > 1e-4  # others count


def test_classes_count_alone_and_equal_images_once(seed):
    x_t, levels, own, bank = problem(2.0)
    classes, bank_classes = torch.arange(5) % 3, torch.arange(70) % 2  # class 2 has no image
    bank = torch.cat([bank, own, own])
    bank_classes = torch.cat([bank_classes, classes, classes])
    found = posterior_mean(x_t, levels, own, bank, classes, bank_classes)
    check(found, naive(x_t, levels, own, bank, classes, bank_classes))
    assert torch.equal(found[2], to_unit_range(own[2]))
    assert not torch.equal(found[1], to_unit_range(own[1]))


def test_limits_of_the_noise_level():
    _, _, own, bank = problem(5.0)
    tiny = torch.full((5,), 1e-6)
    y = to_unit_range(own)
    assert torch.equal(posterior_mean(y + 1e-6 * torch.randn_like(y), tiny, own, bank), y)
    huge = torch.full((5,), 1e5)
    found = posterior_mean(y + 1e5 * torch.randn_like(y), huge, own, bank)
    of_all = torch.stack([torch.cat([to_unit_range(bank), y[i : i + 1]]).mean(0) for i in range(5)])
    torch.testing.assert_close(found, of_all, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_t": torch.zeros(5, 3, 8, 8).byte()}, TypeError, "x_t must be floating, got torch.uint8"),
        ({"own": torch.zeros(5, 3, 8, 8)}, TypeError, "own must be uint8, got torch.float32"),
        ({"own": torch.zeros(4, 3, 8, 8).byte()}, ValueError, r"own must be \[5, 3, 8, 8\]"),
        ({"bank": torch.zeros(9, 3, 4, 4).byte()}, ValueError, r"bank must be \[9, 3, 8, 8\]"),
        ({"t": torch.ones(4)}, ValueError, r"t must be \[5\], got \[4\]"),
        ({"classes": torch.zeros(5).long()}, ValueError, "classes and bank_classes go together"),
        (
            {"classes": torch.zeros(5), "bank_classes": torch.zeros(70).long()},
            ValueError,
            r"classes must be int64 \[5\], got torch.float32 \[5\]",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, error, message):
    values = dict(zip(("x_t", "t", "own", "bank"), problem(1.0), strict=True)) | change
    with pytest.raises(error, match=f"posterior_mean: {message}"):
        posterior_mean(**values)


def test_a_gradient_is_refused():
    x_t, *rest = problem(1.0)
    with pytest.raises(ValueError, match="posterior_mean: x_t has no gradient here"):
        posterior_mean(x_t.requires_grad_(), *rest)


# ---- the Triton kernels -------------------------------------------------------------------------


def on(device, tensors):
    return [v.to(device) for v in tensors]


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize(
    ("shape", "n", "bank"), [((3, 8, 8), 5, 70), ((1, 5, 7), 33, 3), ((3, 5, 11), 2, 129)]
)
def test_kernel_matches_the_oracle(t, shape, n, bank, triton_device):
    values = problem(t, n, bank, shape)
    found = posterior_mean(*on(triton_device, values))
    check(found.cpu(), naive(*values))


@pytest.mark.parametrize("t", [0.002, 80.0])
def test_kernel_is_well_conditioned_at_the_networks_size(t, triton_device):
    """At t = 0.002 |x_t|² / (2 t²) is 1e8, and the weights depend on decimals of differences."""
    values = problem(t, n=2, bank=20, shape=(3, 32, 32))
    found = posterior_mean(*on(triton_device, values))
    expected = naive(*values)
    check(found.cpu(), expected)
    assert (expected[0] - to_unit_range(values[2])).abs().max() > 1e-4


def test_kernel_takes_classes(triton_device):
    x_t, levels, own, bank = problem(2.0)
    classes, bank_classes = torch.arange(5) % 3, torch.arange(70) % 2
    values = x_t, levels, own, torch.cat([bank, own]), classes, torch.cat([bank_classes, classes])
    found = posterior_mean(*on(triton_device, values)).cpu()
    check(found, naive(*values))
    assert torch.equal(found[2], to_unit_range(own[2]))


def test_kernel_gives_the_own_image_at_small_noise_and_takes_no_bank(triton_device):
    x_t, levels, own, bank = on(triton_device, problem(5.0))
    y = to_unit_range(own)
    tiny = torch.full_like(levels, 1e-6)
    assert torch.equal(posterior_mean(y + 1e-6 * torch.randn_like(y), tiny, own, bank), y)
    assert torch.equal(posterior_mean(x_t, levels, own, bank[:0]), y)
    assert posterior_mean(x_t[:0], levels[:0], own[:0], bank).shape == (0, 3, 8, 8)


def test_kernel_repeats_its_bits_in_any_layout_and_cut(triton_device, poisoned):
    x_t, levels, own, bank = on(triton_device, problem(1.0, n=40))
    first = posterior_mean(x_t, levels, own, bank)
    assert torch.equal(posterior_mean(x_t, levels, own, bank), first)
    for i in range(3):
        part = posterior_mean(x_t[i::3], levels[i::3], own[i::3], bank)
        torch.testing.assert_close(part, first[i::3], rtol=0, atol=3e-6)
        assert interpreting() or torch.equal(part, first[i::3])  # NumPy's products depend on it
    last = [v.contiguous(memory_format=torch.channels_last) for v in (x_t, own, bank)]
    found = posterior_mean(last[0], levels, *last[1:])
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, first, rtol=0, atol=3e-6)
    strided = x_t.mT.contiguous().mT
    assert torch.equal(posterior_mean(strided, levels, last[1], bank), first)


def test_kernel_hands_a_nan_on(triton_device):
    x_t, levels, own, bank = on(triton_device, problem(1.0))
    x_t[1, 0, 3, 3] = math.nan
    found = posterior_mean(x_t, levels, own, bank).isnan().flatten(1)
    assert found.any(1).tolist() == [False, True, False, False, False]


def test_operator_is_well_formed_and_compiles_whole(triton_device):
    values = on(triton_device, problem(1.0))
    torch.library.opcheck(torch.ops.tcm_fast.posterior_mean.default, (*values, None, None))
    compiled = torch.compile(posterior_mean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*values), posterior_mean(*values))
