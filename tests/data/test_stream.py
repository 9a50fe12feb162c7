"""The order of a run is a function of (seed, images seen)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import numbered

from tcm_fast.data import stream as stream_module
from tcm_fast.data.stream import ImageStream


@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_every_epoch_is_a_permutation(count, seed, epoch):
    stream = ImageStream(numbered(count), seed=seed, device="cpu")
    order = stream.indices(epoch * count, count)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


@given(st.integers(1, 20), st.integers(0, 100), st.lists(st.integers(0, 30), max_size=8))
@settings(deadline=None, max_examples=60)
def test_the_order_does_not_depend_on_how_it_is_cut(count, start, cuts):
    stream = ImageStream(numbered(count), seed=3, device="cpu", flip=True)
    total = sum(cuts)
    whole = stream.indices(start, total)
    positions = np.arange(start, start + total)
    images, labels = stream.batch(positions)
    other = ImageStream(numbered(count), seed=3, device="cpu", flip=True)
    at = 0
    for size in cuts:
        part = slice(at, at + size)
        np.testing.assert_array_equal(other.indices(start + at, size), whole[part])
        some_images, some_labels = other.batch(positions[part])
        assert torch.equal(some_images, images[part])
        assert torch.equal(some_labels, labels[part])
        at += size


def test_epochs_and_seeds_differ():
    first = ImageStream(numbered(500), seed=0, device="cpu")
    second = ImageStream(numbered(500), seed=1, device="cpu")
    orders = [first.indices(0, 500), first.indices(500, 500), second.indices(0, 500)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).mean() < 0.02


def test_the_order_is_frozen():
    """A change here would break every resumed run."""
    stream = ImageStream(numbered(8), seed=7, device="cpu", flip=True)
    epochs = [[4, 3, 6, 2, 1, 0, 5, 7], [7, 6, 1, 4, 3, 2, 5, 0]]
    assert stream.indices(0, 16).tolist() == epochs[0] + epochs[1]
    flips = [0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert stream.flipped(np.arange(16)).astype(int).tolist() == flips


def test_a_batch_larger_than_the_set():
    stream = ImageStream(numbered(3), seed=0, device="cpu")
    order = stream.indices(1, 1000)
    assert np.bincount(order).tolist() in ([333, 333, 334], [333, 334, 333], [334, 333, 333])
    images, labels = stream.batch(np.arange(1, 1001))
    assert images.shape == (1000, 3, 2, 2)
    np.testing.assert_array_equal(images[:, 1, 0, 0].numpy(), order)
    np.testing.assert_array_equal(labels.argmax(1).numpy(), order % 3)


def test_batch_has_what_the_positions_say():
    stream = ImageStream(numbered(700), seed=0, device="cpu")
    positions = np.array([1399, 0, 700, 699, 5, 5])
    images, labels = stream.batch(positions)
    index = stream.index_of(positions)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(256 * images[:, 0, 0, 0].int() + images[:, 1, 0, 0], index)
    assert labels.dtype == torch.float32
    assert torch.equal(labels, torch.eye(3)[index % 3])


def test_batch_without_labels_or_images():
    stream = ImageStream(numbered(5, labelled=False), seed=0, device="cpu", flip=True)
    assert stream.batch(np.arange(4))[1] is None
    assert stream.batch(np.arange(0))[0].shape == (0, 3, 2, 2)


def test_flips_mirror_half_of_the_positions():
    data = numbered(100)
    positions = np.arange(4000)
    plain, _ = ImageStream(data, seed=1, device="cpu").batch(positions)
    stream = ImageStream(data, seed=1, device="cpu", flip=True)
    images, _ = stream.batch(positions)
    flipped = torch.from_numpy(stream.flipped(positions))
    assert torch.equal(images[flipped], plain[flipped].flip(3))
    assert torch.equal(images[~flipped], plain[~flipped])
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    # neither the same image in every epoch, nor every other position
    epochs = flipped.view(40, 100).float()
    assert 0.1 < epochs.mean(0).std() / (0.5 / 40**0.5) < 1.5
    assert abs(((2 * epochs - 1)[:, 1:] * (2 * epochs - 1)[:, :-1]).mean()) < 4 / 4000**0.5


def test_seed_must_not_be_negative():
    with pytest.raises(ValueError, match="got -1"):
        ImageStream(numbered(2), seed=-1, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fits", [True, False])
def test_cuda_batches_equal_those_of_the_cpu(monkeypatch, fits):
    monkeypatch.setattr(stream_module, "_fits", lambda *_: fits)
    positions = np.arange(30, 600)
    expected = ImageStream(numbered(100), seed=2, device="cpu", flip=True).batch(positions)
    stream = ImageStream(numbered(100), seed=2, device="cuda", flip=True)
    assert stream.resident == fits
    for found, wanted in zip(stream.batch(positions), expected, strict=True):
        assert found.is_cuda
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("flip", [False, True])
def test_what_is_read_ahead_is_what_is_asked_for(flip):
    expected = ImageStream(numbered(100), seed=2, device="cpu", flip=flip)
    stream = ImageStream(numbered(100), seed=2, device="cpu", flip=flip)
    stream.prefetch(np.arange(4))  # of a resident set: nothing
    stream.resident, stream._reader = False, ThreadPoolExecutor(1)
    first, second = np.arange(30, 60), np.arange(60, 90)
    stream.prefetch(first)
    stream.prefetch(second)
    for positions in (second, first, np.arange(90, 95)):
        for found, wanted in zip(stream.batch(positions), expected.batch(positions), strict=True):
            assert torch.equal(found, wanted)
    assert not stream._ahead
    for start in range(300):  # asked for and never fetched: not kept for ever
        stream.prefetch(np.arange(start, start + 3))
    assert len(stream._ahead) == stream_module.MOST_AHEAD
