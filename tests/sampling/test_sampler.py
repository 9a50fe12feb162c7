"""Sampling: the formulas against plain float64 loops, the t' rule, seeds per image, the writers."""

import errno
import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from replays import OnHost
from torch import nn

from tcm_fast.checkpoint.format import collect, load_network, write_checkpoint
from tcm_fast.kernels.denoise_to_uint8 import to_uint8
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import build_network
from tcm_fast.runtime.cuda_graphs import GraphCache
from tcm_fast.sampling.arguments import class_numbers
from tcm_fast.sampling.image_io import GAP, save_grid, save_images, save_npz, write_samples
from tcm_fast.sampling.sampler import NOISE_LAYER, Sampler, sample, sample_batches
from tcm_fast.sampling.solvers import default_times, heun, heun_levels, multistep


class Gaussian(nn.Module):
    """The exact denoiser of data ~ N(mean, sd²), the posterior mean. Notes the times asked for."""

    def __init__(self, info=None, *, sd=0.5, mean=0.0, label_dim=0, channels=2, resolution=4):
        super().__init__()
        self.info = {} if info is None else info
        self.img_resolution, self.img_channels, self.label_dim = resolution, channels, label_dim
        self.inner = nn.Sequential(nn.Dropout(0.5)).eval()
        self.sd, self.mean, self.times, self.sizes = sd, mean, [], []

    def forward(self, x, t, labels=None):
        assert not self.training
        assert not self.inner.training
        assert torch.is_inference_mode_enabled()
        self.times.append(round(t[0].item(), 6))
        self.sizes.append(len(x))
        assert (t == t[0]).all()
        assert t.shape == x.shape[:1]
        mean = self.mean if labels is None else labels.argmax(1).reshape(-1, 1, 1, 1) / 4 - 0.5
        share = (self.sd**2 / (self.sd**2 + t**2)).reshape(-1, 1, 1, 1)
        return mean + share * (x - mean)


def noise64(seed, step, numbers, shape):
    numbers = torch.tensor(numbers, dtype=torch.int64)
    return philox_normal(seed, step, NOISE_LAYER, numbers, shape).double().numpy()


def posterior_mean(x, t, sd=0.5):
    return sd**2 / (sd**2 + t**2) * x


# ---- formulas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [[80.0], [80.0, 0.821], [80.0, 10.0, 2.0, 0.5]])
def test_steps_follow_the_formula(times):
    numbers, shape = [3, 4, 5, 6, 7], (2, 4, 4)
    y = posterior_mean(80 * noise64(9, 0, numbers, shape), 80)
    for i, t in enumerate(times[1:], start=1):
        y = posterior_mean(y + t * noise64(9, i, numbers, shape), t)
    expected = np.clip(127.5 * y + 128, 0, 255).transpose(0, 2, 3, 1)

    images = sample(Gaussian(), 5, times=times, seed=9, start=3)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 4, 4, 2)
    assert np.abs(images.numpy() - np.floor(expected)).max() <= 1
    # Truncation can differ only where the exact value all but touches an integer.
    clear = np.abs(expected - np.round(expected)) > 1e-3
    assert (images.numpy() == np.floor(expected))[clear].all()
    assert clear.mean() > 0.95


def test_multistep_draws_new_noise_for_each_level():
    noises = [torch.full((1, 1, 1, 1), float(2**i), dtype=torch.float64) for i in range(3)]
    calls = []

    def denoise(x, t):
        calls.append((x.item(), t))
        return x / 4

    y = multistep(noises.__getitem__, [denoise] * 3, [80.0, 2.0, 1.0])
    assert calls == [(80.0, 80.0), (20.0 + 4.0, 2.0), (6.0 + 4.0, 1.0)]
    assert y.item() == 2.5


def test_default_times():
    assert default_times(1) == default_times(1, 1.0) == [80.0]
    assert default_times(2) == [80.0, 0.821]
    assert default_times(2, 1.0) == [80.0, 1.0]
    assert default_times(2, 0.5) == [80.0, 0.821]
    times = default_times(5, 1.526)
    assert times[0] == 80.0
    assert times[-1] == 1.526
    np.testing.assert_allclose(np.diff(np.log(times)), math.log(1.526 / 80) / 4)
    with pytest.raises(ValueError, match=r"steps: must be at least 1, got 0"):
        default_times(0)


def test_leading_80_may_be_given_or_not():
    net = Gaussian()
    assert torch.equal(sample(net, 3, times=[2.0]), sample(net, 3, times=[80, 2.0], steps=2))
    assert torch.equal(sample(net, 3, times=[]), sample(net, 3))


def heun_error(steps, sd=0.5):
    """How far the solver ends from the exact flow x(0) = x(T) sd/√(sd²+T²), relatively."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    x = heun(lambda _: start, [lambda x, t: posterior_mean(x, t, sd)], heun_levels(steps))
    exact = 80 * start * sd / math.sqrt(sd**2 + 80**2)
    return ((x - exact).abs().max() / exact.abs().max()).item()


def test_heun_converges_to_the_flow_at_second_order():
    errors = [heun_error(steps) for steps in (16, 32, 64, 128)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(rate > 1.7 for rate in rates), rates
    assert errors[-1] < 1e-3


def test_heun_levels():
    levels = heun_levels(18)
    assert len(levels) == 18
    np.testing.assert_allclose([levels[0], levels[-1]], [80, 0.002])
    np.testing.assert_allclose(np.diff(np.array(levels) ** (1 / 7), 2), 0, atol=1e-12)


def test_edm_network_is_sampled_by_the_ode_solver():
    net = Gaussian({"phase": "edm", "t_prime": None})
    images = sample(net, 4, steps=20, seed=2)
    assert len(net.times) == 2 * 20 - 1
    exact = 80 * noise64(2, 0, range(4), (2, 4, 4)) * 0.5 / math.sqrt(0.25 + 6400)
    expected = np.clip(127.5 * exact + 128, 0, 255).transpose(0, 2, 3, 1)
    assert np.abs(images.numpy() - expected).max() < 0.05 * 127.5
    assert torch.equal(sample(net, 4, steps=None), sample(net, 4, steps=18))
    with pytest.raises(ValueError, match=r"pre-trained network .* at least 2, 18 are usual, got 1"):
        sample(net, 4)
    with pytest.raises(ValueError, match=r"times: apply to consistency networks"):
        sample(net, 4, steps=2, times=[1.0])


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
def test_uint8_rule(values):
    x = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)
    scaled = np.float32(127.5) * x.numpy() + np.float32(128)
    expected = np.clip(scaled, 0, 255).astype(np.uint8)
    assert (to_uint8(x).numpy() == expected.transpose(0, 2, 3, 1)).all()


def test_uint8_is_exact_where_images_come_from():
    levels = torch.arange(256, dtype=torch.uint8)
    x = (levels.float() / 127.5 - 1).reshape(-1, 1, 1, 1)
    # 127.5 x + 128 lies half a level above its origin, so truncation cannot go wrong.
    assert torch.equal(to_uint8(x).flatten(), levels)
    edges = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(-1, 1, 1, 1)
    assert to_uint8(edges).flatten().tolist() == [0, 0, 128, 255, 255]


# ---- an image is its number ---------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    start=st.integers(0, 6), num=st.integers(1, 6), size=st.integers(1, 7), steps=st.integers(1, 3)
)
def test_image_depends_on_its_number_alone(start, num, size, steps):
    net = Gaussian(label_dim=3)
    whole = sample(net, 12, steps=steps, seed=5)
    part = sample(net, num, steps=steps, seed=5, start=start, batch_size=size)
    assert torch.equal(part, whole[start : start + num])


def test_seeds_and_images_differ():
    net = Gaussian()
    a, b = sample(net, 2), sample(net, 2, seed=1)
    assert not torch.equal(a, b)
    assert not torch.equal(a[0], a[1])


def test_batches_stream_and_leave_the_network_as_it_was():
    net = Gaussian().train()
    net.inner.eval()
    batches = sample_batches(net, 7, batch_size=3, start=10)
    assert net.sizes == []  # nothing is drawn before it is asked for
    first, images = next(batches)
    assert (first, len(images), net.sizes) == (10, 3, [3])
    assert net.training
    assert not net.inner.training
    assert not torch.is_inference_mode_enabled()
    images.zero_()  # an ordinary tensor
    assert [first for first, _ in batches] == [13, 16]
    assert net.sizes == [3, 3, 1]


def test_real_network(tmp_path):
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=1, label_dim=3, model_channels=16,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[], dropout=0.5,
    )  # fmt: skip
    images = sample(net, 5, steps=2, batch_size=2)
    assert net.training
    assert images.shape == (5, 8, 8, 1)
    # Sums over another batch size may round differently; never by more than a level.
    again = sample(net, 4, steps=2, start=1)
    assert (images[1:].int() - again.int()).abs().max() <= 1


def test_progress_goes_to_stderr(capsys):
    sample(Gaussian(), 4, batch_size=2, progress=True)
    sample(Gaussian(), 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("100%") == 1


# ---- t' -----------------------------------------------------------------------------------------

TCM = {"phase": "tcm", "t_prime": 1.0}


def test_times_below_t_prime_are_refused_without_stage1():
    net = Gaussian(TCM)
    with pytest.raises(ValueError, match=r"times: 0.821 lies below t'=1, .*not trained") as caught:
        sample(net, 2, times=[80, 0.821])
    assert "--allow-below-t-prime" in str(caught.value)
    assert net.times == []
    sample(net, 2, times=[80, 0.821], allow_below_t_prime=True)
    assert net.times == [80.0, 0.821]


def test_times_from_t_prime_on_need_no_stage1():
    net, stage1 = Gaussian(TCM), Gaussian()
    sample(net, 2, times=[2.0, 1.0], stage1=stage1)
    sample(net, 2, steps=2)
    assert net.times == [80.0, 2.0, 1.0, 80.0, 1.0]
    assert stage1.times == []


def test_times_below_t_prime_use_stage1():
    net, stage1 = Gaussian(TCM), Gaussian(sd=0.1)
    given = sample(net, 2, times=[0.9, 0.5], stage1=stage1, allow_below_t_prime=True)
    assert net.times == [80.0]
    assert stage1.times == [0.9, 0.5]
    net.stage1 = stage1  # or carried by the network
    assert torch.equal(sample(net, 2, times=[0.9, 0.5]), given)


def test_stage1_is_found_beside_the_network(tmp_path):
    def tiny():
        return build_network(
            "ddpmpp", img_resolution=8, img_channels=1, model_channels=16, channel_mult=[1, 1],
            num_blocks=1, attn_resolutions=[],
        )  # fmt: skip

    net, stage1 = tiny(), tiny()
    optimizer = torch.optim.Adam(net.parameters())
    networks = {"model": net, "stage1": stage1}
    write_checkpoint(tmp_path, collect(networks, optimizer, {**TCM, "images": 1}, {}))
    loaded = load_network(tmp_path)
    found = sample(loaded, 2, times=[0.5])
    assert torch.equal(found, sample(loaded, 2, times=[0.5], stage1=stage1))


def test_stage1_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"stage1: img_resolution must be .* 4, got 8"):
        sample(Gaussian(TCM), 1, times=[0.5], stage1=Gaussian(resolution=8))


def test_consistency_network_without_t_prime_goes_anywhere():
    net = Gaussian({"phase": "ect", "t_prime": None})
    sample(net, 1, times=[0.1])
    assert net.times == [80.0, 0.1]


# ---- labels -------------------------------------------------------------------------------------


def test_labels():
    net = Gaussian(label_dim=3, sd=1e-4)  # the image is its class's mean

    def drawn(**arguments):
        images = sample(net, 5, batch_size=2, **arguments)
        return (((images[:, 0, 0, 0].float() - 128) / 127.5 + 0.5) * 4).round().int().tolist()

    assert drawn() == class_numbers(net, 5).tolist() == [0, 1, 2, 0, 1]
    assert drawn(start=1) == class_numbers(net, 5, start=1).tolist() == [1, 2, 0, 1, 2]
    assert drawn(labels=2) == [2] * 5
    assert drawn(labels=[2, 0]) == drawn(labels=torch.tensor([2, 0])) == [2, 0, 2, 0, 2]
    assert drawn(labels=[2, 0], start=1) == [0, 2, 0, 2, 0]
    one_hot = torch.eye(3)[[1, 1, 0, 2, 0]]
    assert drawn(labels=one_hot) == class_numbers(net, 5, one_hot).tolist() == [1, 1, 0, 2, 0]
    assert class_numbers(Gaussian(), 5) is None


@pytest.mark.parametrize(
    ("label_dim", "labels", "message"),
    [
        (0, [1], r"labels: the network is unconditional"),
        (3, 3, r"labels: must lie in \[0, 3\), got 3"),
        (3, [0, 10**20], r"labels: must lie in \[0, 3\), got 1000000"),
        (3, [0, -1], r"labels: must lie in \[0, 3\), got -1"),
        (3, [], r"labels: must be an int, ints or one-hot"),
        (3, [0.5], r"labels: must be an int, ints or one-hot"),
        (3, torch.eye(3), r"labels: one-hot labels must be \[2,3\], got \[3, 3\]"),
    ],
)
def test_wrong_labels(label_dim, labels, message):
    with pytest.raises(ValueError, match=message):
        sample_batches(Gaussian(label_dim=label_dim), 2, labels=labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, r"num: must be at least 1, got 0"),
        ({"seed": -1}, r"seed: must lie in"),
        ({"start": -1}, r"start: images are numbered"),
        ({"start": 2**32}, r"start: images are numbered"),
        ({"batch_size": 0}, r"batch_size: must be at least 1"),
        ({"steps": 0}, r"steps: must be at least 1"),
        ({"times": [80, 2, 2]}, r"times: must fall strictly"),
        ({"times": [90]}, r"times: must fall strictly from at most 80"),
        ({"times": [0.0]}, r"times: .* stay positive"),
        ({"times": [math.nan]}, r"times: must fall"),
        ({"times": [2.0], "steps": 3}, r"steps: 3 steps need 2 times after the first, got 1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample_batches(Gaussian(), **{"num": 2, **arguments})
    assert "\n" not in str(caught.value)


# ---- files --------------------------------------------------------------------------------------


def pictures(num=5, channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    shape = (num, size, size, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def cells(path, num, columns, size):
    """The images of a grid, cut out again."""
    sheet = np.asarray(Image.open(path))
    step = size + GAP
    return [
        sheet[GAP + i // columns * step :, GAP + i % columns * step :][:size, :size]
        for i in range(num)
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_every_image_enlarged(tmp_path, channels):
    images = pictures(5, channels)
    save_grid(images, tmp_path / "grid.png")
    for cell, image in zip(cells(tmp_path / "grid.png", 5, 3, 64), images.numpy(), strict=True):
        assert (cell == image.squeeze().repeat(8, 0).repeat(8, 1)).all()
    save_grid(images.numpy(), tmp_path / "plain.png", columns=5, scale=1)
    assert Image.open(tmp_path / "plain.png").size == (5 * 10 + GAP, 10 + GAP)
    for cell, image in zip(cells(tmp_path / "plain.png", 5, 5, 8), images.numpy(), strict=True):
        assert (cell == image.squeeze()).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_is_lossless_and_numbered(tmp_path, channels):
    images = pictures(3, channels)
    save_images(images, tmp_path / "deep" / "folder", start=9)
    names = sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir())
    assert names == ["000009.png", "000010.png", "000011.png"]
    for name, image in zip(names, images.numpy(), strict=True):
        assert (np.asarray(Image.open(tmp_path / "deep/folder" / name)) == image.squeeze()).all()


def test_npz_round_trip(tmp_path):
    images = pictures(4)
    save_npz(images, torch.arange(4), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (arrays["images"] == images.numpy()).all()
        assert arrays["labels"].tolist() == [0, 1, 2, 3]
        assert arrays["labels"].dtype == np.int64
    save_npz(images, None, tmp_path / "b.npz")
    assert np.load(tmp_path / "b.npz").files == ["images"]
    with pytest.raises(ValueError, match=r"labels: must be 4, got 3"):
        save_npz(images, [0, 1, 2], tmp_path / "c.npz")


def test_destination_chooses_the_kind(tmp_path):
    net = Gaussian(channels=1, label_dim=3)
    images = sample(net, 5).numpy()

    def write(name, **options):
        return write_samples(sample_batches(net, 5, batch_size=2), tmp_path / name, **options)

    grid = cells(write("grid.png", scale=2), 5, 3, 8)
    for cell, image in zip(grid, images, strict=True):
        assert (cell[::2, ::2] == image[..., 0]).all()
    arrays = np.load(write("a.npz", labels=class_numbers(net, 5)))
    assert (arrays["images"] == images).all()
    assert arrays["labels"].tolist() == [0, 1, 2, 0, 1]
    folder = write("folder")
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(5)]
    assert (np.asarray(Image.open(folder / "000004.png")) == images[4, ..., 0]).all()
    with pytest.raises(ValueError, match=r"out: must end in .png or .npz, or be a folder"):
        write("grid.jpg")


@pytest.mark.parametrize("name", ["grid.png", "arrays.npz", "folder"])
def test_nothing_is_overwritten_unasked(tmp_path, name):
    def write(seed, **options):
        batches = sample_batches(Gaussian(channels=1), 2, seed=seed)
        return write_samples(batches, tmp_path / name, **options)

    def contents():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    write(0)
    before = contents()
    with pytest.raises(FileExistsError, match=r"exists; choose another name, or allow --overwrite"):
        write(1)
    assert contents() == before
    write(1, overwrite=True)
    assert contents().keys() == before.keys()
    assert contents() != before


def test_occupied_file_is_refused_before_anything_is_drawn(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "folder").touch()
    net = Gaussian(channels=1)
    for name in ("a.png", "folder"):
        with pytest.raises(FileExistsError):
            write_samples(sample_batches(net, 2), tmp_path / name)
    assert net.times == []


def test_disk_that_fills_leaves_no_half_written_file(tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    for name, save in (
        ("a.png", save_grid),
        ("a.npz", lambda images, path: save_npz(images, None, path)),
    ):
        with pytest.raises(OSError, match=rf"{name}: could not be written, No space left"):
            save(pictures(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_images_must_be_uint8_pictures(tmp_path):
    for images in (torch.zeros(2, 8, 8, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images: must be uint8 \[N,H,W,C\]"):
            save_grid(images, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"grid: columns and scale must be positive"):
        save_grid(pictures(), tmp_path / "a.png", columns=-1)


# ---- precision, fused passes, graphs -------------------------------------------------------------


class Plain(nn.Module):
    """A network seen from outside: whatever it is, a denoiser."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        for name in ("img_resolution", "img_channels", "label_dim"):
            setattr(self, name, getattr(net, name))

    def forward(self, x, t, labels=None):
        return self.net(x, t, labels)


def trained_looking(label_dim=0):
    """A network whose output is not nearly zero, as a fresh one's is."""
    torch.manual_seed(0)
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=1, label_dim=label_dim, model_channels=16,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4],
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("label_dim", [0, 3])
@pytest.mark.parametrize("times", [[80.0], [80.0, 2.0, 0.821]])
def test_fused_passes_draw_the_same_images(label_dim, times):
    net = trained_looking(label_dim)
    fused, plain = sample(net, 7, times=times, seed=3), sample(Plain(net), 7, times=times, seed=3)
    assert fused.float().std() > 20
    assert (fused.int() - plain.int()).abs().max() <= 1
    assert (fused == plain).float().mean() > 0.99


def test_kernels_draw_the_same_images(triton_device, monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND")  # attention and normalisation may have no kernel here
    net = trained_looking().to(triton_device)
    ours = sample(net, 2, times=[80.0, 2.0], seed=3, precision="fp32")
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    plain = sample(net, 2, times=[80.0, 2.0], seed=3, precision="fp32")
    assert (ours.int() - plain.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("precision", "bytes_off"), [("fp16", 1), ("bf16", 4), ("tf32", 0), ("bf16x3", 0)]
)
def test_16_bit_sampling_is_near(precision, bytes_off):
    net = trained_looking()
    wide, low = sample(net, 8, seed=3), sample(net, 8, seed=3, precision=precision)
    assert (wide.int() - low.int()).abs().float().mean() <= bytes_off
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_an_unknown_precision_is_refused():
    with pytest.raises(
        ValueError, match="precision: must be one of fp32, tf32, fp16, bf16, bf16x3, got"
    ):
        sample(trained_looking(), 2, precision="int8")


def test_a_sampler_replays_what_it_has_captured():
    net = trained_looking(3)
    sampler = Sampler([net], multistep, [80.0], seed=3)
    sampler.graphs = GraphCache(place := OnHost())
    labels = torch.eye(3)[torch.arange(12) % 3]
    expected = sample(net, 12, seed=3)
    for first in range(0, 12, 2):
        drawn = sampler.draw(torch.arange(first, first + 2), labels[first : first + 2])
        assert torch.equal(drawn, expected[first : first + 2])
    assert (place.captures, place.replays) == (1, 4)


def test_images_that_do_not_fit_into_memory_are_drawn_in_halves(monkeypatch):
    net = trained_looking(3)
    labels = torch.eye(3)[torch.arange(13) % 3]
    expected = sample(net, 13, seed=3, labels=labels)
    draw, sizes = Sampler._draw, []

    def short(self, numbers, labels=None):
        if len(numbers) > 4:
            raise torch.OutOfMemoryError("full")
        sizes.append(len(numbers))
        return draw(self, numbers, labels)

    monkeypatch.setattr(Sampler, "_draw", short)
    assert torch.equal(sample(net, 13, seed=3, labels=labels), expected)
    assert sizes == [3, 3, 3, 4]
    monkeypatch.setattr(Sampler, "_draw", lambda *_: short(*_[:1], torch.arange(5)))
    with pytest.raises(torch.OutOfMemoryError):
        sample(net, 1, seed=3, labels=labels[:1])
