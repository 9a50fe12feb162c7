"""EDM's augmentations: what is done is what the labels say, keyed by sample, and nothing else."""

import math

import pytest
import torch

from tcm_fast.data import augment as module
from tcm_fast.data.augment import AUGMENT_DIM, SYM6, augment
from tcm_fast.kernels.dropout import PhiloxKey


def key(n=8, step=3):
    return PhiloxKey(seed=1, step=step, sample=torch.arange(n))


def blobs(n=8, size=32):
    """Smooth images without symmetry, which rotation, scaling and interpolation hardly hurt."""
    y, x = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
    places = [(12.0, 13.0, 30.0, 1.0), (21.0, 17.0, 12.0, -0.7), (15.0, 22.0, 16.0, 0.5)]
    image = sum(a * torch.exp(-((x - u) ** 2 + (y - v) ** 2) / w) for u, v, w, a in places)
    return image.expand(n, 2, -1, -1).clone()


def value_at(x, y, size=32):
    """The first of `blobs` at places given in pixels."""
    places = [(12.0, 13.0, 30.0, 1.0), (21.0, 17.0, 12.0, -0.7), (15.0, 22.0, 16.0, 0.5)]
    return sum(a * torch.exp(-((x - u) ** 2 + (y - v) ** 2) / w) for u, v, w, a in places)


def test_the_filter_is_an_orthonormal_wavelets():
    h = torch.tensor(SYM6, dtype=torch.float64)
    assert h.sum().item() == pytest.approx(math.sqrt(2))
    for shift in range(6):
        product = (h[2 * shift :] * h[: 12 - 2 * shift]).sum().item()
        assert product == pytest.approx(float(shift == 0), abs=1e-10)
    k = torch.arange(12, dtype=torch.float64)
    for moment in range(6):  # vanishing ones of the wavelet: what makes it sym6's filter
        assert abs(((-1) ** k * h * k**moment).sum()) < 1e-5 * 12.0**moment


def test_nothing_happens_at_probability_0_but_mirroring():
    images = blobs(64)
    out, labels = augment(images, key(64), 0.0)
    assert labels.shape == (64, AUGMENT_DIM)
    assert not labels[:, 1:].any()
    mirrored = labels[:, 0] == 1
    assert 16 < mirrored.sum() < 48
    assert torch.equal(out[mirrored], images[mirrored].flip(3))
    assert torch.equal(out[~mirrored], images[~mirrored])


def test_the_warp_alone_changes_nothing_inside():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same = module._warp(x, torch.eye(3).expand(2, 3, 3))
    assert (same - x)[..., 8:-8, 8:-8].abs().max() < 0.01


def test_images_are_what_the_labels_say():
    """Each transformed pixel against the analytic image, moved back by the published order: scale,
    rotation, anisotropy, translation after the flips."""
    images = blobs(24)
    out, labels = augment(images, key(24), 1.0)
    grid = torch.arange(32) + 0.5 - 16
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    # The label of an anisotropy has its direction, and not whether it stretches or squeezes along it.
    signs = module._draws(key(24))[1][:, 1].sign().tolist()
    for image, label, sign in zip(out, labels, signs, strict=True):
        flip_x, flip_y, scale, cos1, sin, along, across, dx, dy = label.tolist()
        angle, direction = math.atan2(sin, cos1 + 1), math.atan2(across, along)
        stretch = 2 ** (0.2 * sign * math.hypot(along, across))
        u, v = x - dx * 32 / 8, y - dy * 32 / 8
        c, s = math.cos(direction), math.sin(direction)
        u, v = (u * c + v * s) / stretch, (-u * s + v * c) * stretch
        u, v = u * c - v * s, u * s + v * c
        c, s = math.cos(angle), math.sin(angle)
        u, v = u * c + v * s, -u * s + v * c
        u, v = u / 2 ** (0.2 * scale), v / 2 ** (0.2 * scale)
        u = -u if flip_x else u
        v = -v if flip_y else v
        expected = value_at(u + 16, v + 16)
        inside = (u.abs() < 14) & (v.abs() < 14)
        assert (image[0] - expected)[inside].abs().max() < 0.06
        assert torch.equal(image[0], image[1])


def test_each_one_happens_with_its_probability():
    n = 4000
    _, labels = augment(torch.zeros(n, 1, 4, 4), key(n), 0.12)
    done = {"flip_y": (1, 0.06), "scale": (2, 0.12), "rotation": (4, 0.12), "aniso": (5, 0.12),
            "shift": (7, 0.12)}  # fmt: skip
    for name, (column, share) in done.items():
        found = (labels[:, column] != 0).double().mean().item()
        assert abs(found - share) < 5 * math.sqrt(share / n), name
    both = ((labels[:, 2] != 0) & (labels[:, 4] != 0)).double().mean().item()
    assert abs(both - 0.0144) < 0.01
    on = labels[labels[:, 2] != 0, 2]
    assert abs(on.std() - 1) < 0.2


def test_an_images_augmentation_is_its_own():
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = augment(images, key(6), 0.5)
    rows = torch.tensor([4, 1])
    part = augment(images[rows], key(6).select(rows), 0.5)
    torch.testing.assert_close(part[0], whole[0][rows])
    assert torch.equal(part[1], whole[1][rows])
    assert not torch.equal(augment(images, key(6, step=4), 0.5)[1], whole[1])
    assert augment(images[:0], key(0), 0.5)[0].shape == (0, 3, 8, 8)


def test_layout_and_dtype_stay():
    images = blobs().to(memory_format=torch.channels_last)
    out, labels = augment(images.double(), key(), 1.0)
    assert out.dtype == torch.float64
    assert labels.dtype == torch.float32


# ---- distortions --------------------------------------------------------------------------------


def alone(monkeypatch, name, value, images):
    """Distorted in one way alone, with the strength that the labels say."""
    chosen = module.STRENGTHS.index(name)
    words = torch.zeros(len(images), 32)
    words[:, :15] = 1 - 2.0**-24  # nothing is done where this is not below p
    words[:, chosen] = 0
    words[:, 15 + chosen] = value if name in module.ONE_SIDED else (value + 1) / 2
    words[:, 30:] = 0.5
    bits = (words.double() * 2**24).round().long() << 8
    bits = torch.where(bits > 0x7FFFFFFF, bits - 2**32, bits).to(torch.int32)
    monkeypatch.setattr(module, "philox_bits", lambda *_: bits.reshape(len(images), 8, 4))
    out, strengths = module.distort(images, key(len(images)))
    others = [i for i in range(strengths.shape[1]) if i != chosen]
    assert not strengths[:, others].any()
    torch.testing.assert_close(strengths[:, chosen], torch.full((len(images),), value))
    return out


def test_distorting_with_probability_0_changes_nothing():
    images = blobs().clamp(-1, 1)
    out, strengths = module.distort(images[:, :1], key(), 0.0)
    assert strengths.shape == (8, 13)
    assert not strengths.any()
    assert (out - images[:, :1])[..., 8:-8, 8:-8].abs().max() < 0.01


COS, SIN = math.cos(math.pi / 8), math.sin(math.pi / 8)


@pytest.mark.parametrize(
    ("name", "a", "b", "c", "d"),
    [  # x', y' of the place that is seen at x, y, from the middle: a x + b y, c x + d y
        ("rotation", COS, SIN, -SIN, COS),
        ("scale", 2**-0.2, 0, 0, 2**-0.2),
        ("stretch", 2**-0.15, 0, 0, 2**0.15),
        ("shear", 1, 0.2, 0, 1),
    ],
)  # fmt: skip
def test_places_move_as_the_strengths_say(name, a, b, c, d, monkeypatch):
    images = blobs(1)[:, :1]
    images = (images - images.min()) / (images.max() - images.min()) * 1.6 - 0.8
    low, high = blobs(1)[:, :1].min(), blobs(1)[:, :1].max()
    out = alone(monkeypatch, name, 0.5, images)
    y, x = torch.meshgrid(*[torch.arange(32) + 0.5 - 16] * 2, indexing="ij")
    expected = value_at(a * x + b * y + 16, c * x + d * y + 16)
    expected = (expected - low) / (high - low) * 1.6 - 0.8
    assert (out[0, 0] - expected)[8:-8, 8:-8].abs().max() < 0.03


@pytest.mark.parametrize("axis", [3, 2])
def test_a_shift_moves_by_pixels(axis, monkeypatch):
    images = 0.5 * blobs(1)[:, :1]
    out = alone(monkeypatch, "shift_x" if axis == 3 else "shift_y", 0.5, images)
    moved = images.roll(2, axis)  # half of an eighth of 32
    assert (out - moved)[..., 8:-8, 8:-8].abs().max() < 0.01


def test_colours_change_as_the_strengths_say(monkeypatch):
    flat = torch.tensor([-0.4, 0.0, 0.6]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16).clone()
    grey = flat.mean()
    for name, value, expected in [
        ("brightness", -0.5, flat - 0.2),
        ("contrast", 0.5, grey + (flat - grey) * 2**0.35),
        ("gamma", -1.0, 2 * ((flat + 1) / 2).sqrt() - 1),
        ("saturation", 0.5, grey + (flat - grey) * 2**0.5),
    ]:
        torch.testing.assert_close(
            alone(monkeypatch, name, value, flat), expected, rtol=1e-4, atol=1e-4
        )
    turned = module._recoloured(flat, torch.tensor(1.0), torch.tensor(2 * math.pi / 3))
    torch.testing.assert_close(turned, flat.roll(1, 1), rtol=1e-4, atol=1e-4)  # r, g, b in turn


def test_images_are_spoilt_as_the_strengths_say(monkeypatch):
    point = torch.zeros(1, 1, 32, 32)
    point[..., 16, 16] = 0.5
    blurred = alone(monkeypatch, "blur", 0.6, point)
    place = torch.arange(32) - 16.0
    variance = (blurred.sum((0, 1, 2)) * place**2).sum() / blurred.sum()
    assert blurred.sum().item() == pytest.approx(0.5, rel=1e-3)
    assert variance.sqrt().item() == pytest.approx(0.6 * (0.5 + 32 / 48), rel=0.03)

    noisy = alone(monkeypatch, "noise", 0.8, torch.zeros(8, 1, 32, 32))
    assert noisy.std().item() == pytest.approx(0.4, rel=0.03)

    cut = alone(monkeypatch, "cutout", 0.5, torch.ones(1, 1, 32, 32))
    assert (cut == 0).sum() == 8 * 8
    assert not cut[..., 12:20, 12:20].any()

    stripes = torch.tensor([0.5, -0.5]).repeat(8)[:15].expand(1, 1, 15, 15)
    coarse = alone(monkeypatch, "pixelate", 0.75, stripes.clone())
    assert (coarse - stripes / 4)[..., 4:10, 4:10].abs().max() < 0.02
