"""Projections onto the known part: against explicit matrices, idempotent, and exact in bytes."""

import numpy as np
import pytest
import torch
from PIL import Image

from tcm_fast.kernels.denoise_to_uint8 import to_uint8
from tcm_fast.sampling.projections import (
    LUMINANCE,
    KnownPixels,
    Projection,
    known_luminance,
    known_patch_means,
)

MASK = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5
PROJECTIONS = {
    "pixels": KnownPixels(MASK),
    "luminance": known_luminance(),
    "patches of 2": known_patch_means(2),
    "patches of 4": known_patch_means(4),
    "a function": Projection(lambda x: (x + x.flip(3)) / 2),
}


def noise(seed, size=1.0, n=2):
    return size * torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=PROJECTIONS)
def known(request):
    return PROJECTIONS[request.param]


def test_linear_idempotent_and_symmetric(known):
    x, y = noise(0), noise(1)
    torch.testing.assert_close(known(known(x)), known(x))
    torch.testing.assert_close(known(2 * x - y), 2 * known(x) - known(y))
    # <Px, y> = <x, Py>: known part and complement are orthogonal.
    torch.testing.assert_close((known(x) * y).sum(), (x * known(y)).sum())
    torch.testing.assert_close((known(x) * (y - known(y))).sum(), torch.tensor(0.0))


def test_replace_takes_the_known_part_of_one_and_the_complement_of_the_other(known):
    x, y = noise(0), noise(1)
    both = known.replace(x, y)
    torch.testing.assert_close(known(both), known(y))
    torch.testing.assert_close(both - known(both), x - known(x))
    torch.testing.assert_close(known.replace(both, y), both)


def orthogonal(first):
    """An orthogonal matrix whose first row is a multiple of a vector."""
    start = np.eye(len(first))
    start[:, 0] = first
    q, _ = np.linalg.qr(start)
    return q.T


@pytest.mark.parametrize(
    ("known", "into", "weights"),
    [
        # each column of what `into` gives is one group: channels of a pixel, pixels of a patch
        (known_luminance(), lambda x: x.permute(1, 0, 2, 3).flatten(1), LUMINANCE),
        (
            known_patch_means(2),
            lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).permute(4, 5, 0, 1, 2, 3).reshape(4, -1),
            [0.25] * 4,
        ),
    ],
)
def test_as_song_et_al_write_it(known, into, weights):
    """A⁻¹ [(A y)(1 - Ω) + (A x) Ω] with an orthogonal A whose first row is known (algorithm 4)."""
    x, y = noise(0), noise(1)
    a = orthogonal(weights)
    mixed = a @ into(x).double().numpy()
    mixed[0] = (a @ into(y).double().numpy())[0]
    expected = a.T @ mixed
    np.testing.assert_allclose(into(known.replace(x, y)).numpy(), expected, atol=1e-6)


def grey_images(n=64):
    """Bytes [n,4,4,1], black, white and what lies near them among them."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (n, 4, 4, 1), generator=generator, dtype=torch.uint8)
    images[:4] = torch.tensor([0, 1, 254, 255], dtype=torch.uint8).reshape(4, 1, 1, 1)
    return images


def as_float(images):
    return (images.float() / 127.5 - 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_finished_images_keep_the_luminance_in_bytes(size):
    grey = grey_images()
    y = as_float(grey.expand(-1, -1, -1, 3))
    finished = known_luminance().finish(noise(1, size, 64), y)
    assert finished.abs().max() <= 1
    for image, expected in zip(to_uint8(finished), grey, strict=True):
        shown = np.asarray(Image.fromarray(image.numpy()).convert("L"))
        assert (shown == expected[..., 0].numpy()).all()


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_finished_images_keep_the_patches_in_bytes(size):
    small = grey_images()[:, :2, :2].expand(-1, -1, -1, 3)
    y = as_float(small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    finished = known_patch_means(2).finish(noise(1, size, 64), y)
    assert finished.abs().max() <= 1
    patches = to_uint8(finished).double().reshape(64, 2, 2, 2, 2, 3).mean((2, 4))
    assert torch.equal((patches + 0.5).floor().to(torch.uint8), small)


@pytest.mark.parametrize("known", [known_luminance(), known_patch_means(2)])
def test_finishing_changes_only_what_does_not_fit(known):
    x, y = noise(0, 0.1), noise(1, 0.1)
    torch.testing.assert_close(known.finish(x, y), known.replace(x, y), atol=2e-6, rtol=0)
    far = noise(2, 2.0)
    expected = known.replace(far, y)
    # No image in [-1,1] with the known part is nearer: moving towards any other one gets farther.
    finished = known.finish(far, y)
    for seed in range(3, 8):
        other = known.finish(noise(seed, 1.0), y)
        inner = ((expected - finished) * (other - finished)).sum((1, 2, 3))
        assert (inner <= 1e-4).all()


@pytest.mark.parametrize("known", [known_luminance(), known_patch_means(2)])
@pytest.mark.parametrize("wild", [1e6, float("nan")])
def test_finished_images_do_not_depend_on_their_neighbours(known, wild):
    x, y = noise(0, 2.0), noise(1, 0.1)
    alone = known.finish(x[:1], y[:1])
    x[1] = wild
    assert torch.equal(known.finish(x, y)[:1], alone)


@pytest.mark.parametrize("factor", [41, 47, 55])
def test_patches_of_any_size(factor):
    small = torch.arange(12.0).reshape(1, 3, 2, 2)
    expected = np.kron(small.numpy(), np.ones((factor, factor), np.float32))
    known = known_patch_means(factor)
    np.testing.assert_allclose(known.spread(small).numpy(), expected)
    torch.testing.assert_close(known.measure(torch.from_numpy(expected)), small)
