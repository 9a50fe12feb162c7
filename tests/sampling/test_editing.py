"""Editing: the algorithm against a plain float64 loop, what is kept, the two networks, seeds and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from replays import OnHost
from torch import nn

import tcm_fast
from tcm_fast.cli.edit import Task
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.runtime.cuda_graphs import GraphCache
from tcm_fast.sampling import arguments as arguments_module
from tcm_fast.sampling.edit_arguments import TASKS
from tcm_fast.sampling.editing import edit, slerp
from tcm_fast.sampling.sampler import NOISE_LAYER, Sampler, sample

TCM = {"phase": "tcm", "t_prime": 1.0}
HALF = torch.tensor([[False, False, True, True]]).expand(4, 4)


class Gaussian(nn.Module):
    """The exact denoiser of data ~ N(mean, sd²), the mean 0 or by labels. Notes the levels asked for."""

    def __init__(self, info=None, *, sd=0.3, label_dim=0, channels=3, resolution=4):
        super().__init__()
        self.info = {} if info is None else info
        self.img_resolution, self.img_channels, self.label_dim = resolution, channels, label_dim
        self.sd, self.times = sd, []

    def forward(self, x, t, labels=None):
        self.times.append(round(t[0].item(), 6))
        mean = 0.0
        if labels is not None:
            mean = (labels @ torch.arange(self.label_dim).float() / 4 - 0.5).reshape(-1, 1, 1, 1)
        share = (self.sd**2 / (self.sd**2 + t**2)).reshape(-1, 1, 1, 1)
        return mean + share * (x - mean)


def images(n=2, channels=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, size, size, channels), generator=generator, dtype=torch.uint8)


def arguments(task, channels=3):
    """Images and options of a task that a 4×4 network takes."""
    given = {
        "inpaint": (images(channels=channels), {"mask": HALF}),
        "upscale": (images(channels=channels, size=2), {}),
        "denoise": (images(channels=channels), {"level": 0.3}),
        "interpolate": (images(channels=channels), {"num": 5}),
    }
    return given.get(task, (images(channels=channels), {}))


# ---- the algorithm ------------------------------------------------------------------------------


def test_the_steps_follow_the_formula():
    """Algorithm 4 of Song et al. 2023, in float64 with NumPy."""
    times, y = [80.0, 3.0, 0.5], images().numpy()
    hole = np.broadcast_to(HALF.numpy()[..., None], y.shape)
    known = np.where(hole, 0.0, y / 127.5 - 1)
    x = known
    for i, t in enumerate(times):
        z = philox_normal(7, i, NOISE_LAYER, torch.tensor([5, 6]), (3, 4, 4)).double().numpy()
        x = x + t * z.transpose(0, 2, 3, 1)
        x = 0.3**2 / (0.3**2 + t**2) * x
        x = np.where(hole, x, known)
    expected = np.floor(np.clip(127.5 * x + 128, 0, 255))

    edited = edit(Gaussian(), y, "inpaint", mask=HALF, times=times[1:], seed=7, start=5).numpy()
    with_the_first = edit(Gaussian(), y, "inpaint", mask=HALF, times=times, seed=7, start=5).numpy()
    assert (with_the_first == edited).all()
    assert edited.dtype == np.uint8
    assert (edited == y)[~hole].all()
    assert np.abs(edited.astype(int) - expected).max() <= 1


def test_nothing_known_is_sampling():
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    edited = edit(Gaussian(), images(3), "inpaint", mask=everywhere, times=[2.0], seed=4)
    assert torch.equal(edited, sample(Gaussian(), 3, times=[2.0], seed=4))


def test_pixels_outside_the_mask_are_kept_and_those_inside_ignored():
    y = images()
    other = y.clone()
    other[:, :, 2:] = images(seed=1)[:, :, 2:]
    edited = edit(Gaussian(), y, "inpaint", mask=HALF, num=3)
    assert edited.shape == (6, 4, 4, 3)
    assert torch.equal(edited[:, :, :2], y.repeat_interleave(3, 0)[:, :, :2])
    assert torch.equal(edit(Gaussian(), other, "inpaint", mask=HALF, num=3), edited)
    assert len(edited[:3, :, 2:].unique(dim=0)) == 3


@pytest.mark.parametrize("task", ["stroke", "vary"])
def test_a_mask_limits_strokes_and_variations(task):
    y = images()
    edited = edit(Gaussian(), y, task, mask=HALF)
    assert torch.equal(edited[:, :, :2], y[:, :, :2])
    assert not torch.equal(edited[:, :, 2:], y[:, :, 2:])


def test_colours_keep_the_luminance():
    colour, net = images(4), Gaussian()
    grey = torch.stack(
        [torch.from_numpy(np.array(Image.fromarray(x.numpy()).convert("L"))) for x in colour]
    )[..., None]
    edited = edit(net, grey, "colorize", num=2)
    for image, expected in zip(edited, grey.repeat_interleave(2, 0), strict=True):
        shown = np.asarray(Image.fromarray(image.numpy()).convert("L"))
        assert (shown == expected[..., 0].numpy()).all()
    assert (edited[..., 0] != edited[..., 1]).any()
    # A grey picture is the same with three equal channels, a coloured one stands for its luminance.
    assert torch.equal(edit(net, grey.expand(-1, -1, -1, 3), "colorize", num=2), edited)
    assert torch.equal(edit(net, colour, "colorize", num=2), edited)


@pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 3), (4, 1)])
def test_upscaled_images_shrink_to_what_was_given(size, channels):
    small = images(3, channels, size)
    edited = edit(Gaussian(channels=channels, resolution=8), small, "upscale", num=2)
    factor = 8 // size
    patches = edited.double().reshape(6, size, factor, size, factor, channels)
    shrunk = (patches.mean((2, 4)) + 0.5).floor().to(torch.uint8)
    assert torch.equal(shrunk, small.repeat_interleave(2, 0))
    assert not torch.equal(
        edited,
        small.repeat_interleave(2, 0).repeat_interleave(factor, 1).repeat_interleave(factor, 2),
    )


def test_denoising_is_one_call_of_the_network():
    clean = 0.3 * torch.randn(64, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    noisy = clean + 0.5 * torch.randn(64, 4, 4, 3, generator=torch.Generator().manual_seed(1))
    net = Gaussian()
    edited = edit(net, noisy, "denoise", level=0.5, seed=1)
    assert net.times == [0.5]
    expected = (127.5 * 0.09 / (0.09 + 0.25) * noisy + 128).clamp(0, 255).to(torch.uint8)
    assert (edited.int() - expected.int()).abs().max() <= 1
    assert torch.equal(edited, edit(net, noisy, "denoise", level=0.5, seed=2))  # no noise is added
    two = edit(net, noisy, "denoise", level=0.5, times=[0.2])
    assert net.times[-2:] == [0.5, 0.2]
    assert not torch.equal(two, edited)


def test_a_higher_level_keeps_less():
    y = images(16)

    def distance(level):
        return (edit(Gaussian(sd=0.5), y, "vary", level=level).int() - y.int()).abs().float().mean()

    assert 0 < distance(0.05) < distance(0.5) < distance(5.0)


@pytest.mark.parametrize("times", [(), (5.0, 0.5)])
def test_ends_of_an_interpolation_are_what_the_seeds_give(times):
    net = Gaussian()
    edited = edit(net, None, "interpolate", num=6, seeds=(3, 9), times=times, start=2, batch_size=4)
    for place, seed in ((0, 3), (-1, 9)):
        assert torch.equal(edited[place], sample(net, 1, seed=seed, times=times, start=2)[0])
    assert len(edited.unique(dim=0)) == 6


def test_interpolation_between_images():
    y, net = images(), Gaussian(sd=0.5)
    edited = edit(net, y, "interpolate", level=1e-2 / 2, num=3).int()
    mean = (y.float().mean(0) + 0.5).int()
    for image, expected in zip(edited, (y[0].int(), mean, y[1].int()), strict=True):
        assert (image - expected).abs().max() <= 3


def test_slerp():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 3, 32, 32, generator=generator)
    path = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.equal(path[0], a[0])
    torch.testing.assert_close(path[-1], b[0])
    assert path.std((1, 2, 3)).sub(1).abs().max() < 0.05  # a straight line would have 0.71 halfway
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.0, 0.3, 1.0])), a.expand(3, -1, -1, -1))


def test_a_projection_of_ones_own():
    def left_right_mean(x):
        return (x + x.flip(3)) / 2

    y = images(2) // 4 + 96  # far from where clipping begins
    edited = edit(Gaussian(sd=0.1), y, left_right_mean, num=2)
    expected = y.repeat_interleave(2, 0).float()
    kept, given = (x.float() + x.float().flip(2) for x in (edited, expected))
    assert (kept - given).abs().max() <= 1
    assert not torch.equal(edited, y.repeat_interleave(2, 0))


@pytest.mark.parametrize(("given", "channels"), [(1, 3), (3, 1)])
def test_a_projection_is_of_as_many_channels_as_the_network_has(given, channels):
    seen = []

    def column_means(x):
        seen.append((x.shape[1], x.device.type))
        return x.mean(2, keepdim=True).expand_as(x)

    grey, net = images(channels=1), Gaussian(channels=channels)
    edited = edit(net, grey.expand(-1, -1, -1, given), column_means)
    assert edited.shape == (2, 4, 4, channels)
    assert set(seen) == {(channels, "cpu")}


# ---- networks, labels, seeds --------------------------------------------------------------------


def test_below_t_prime_the_stage_1_network_edits():
    net, stage1 = Gaussian(TCM), Gaussian()
    edit(net, images(), "inpaint", mask=HALF, stage1=stage1)
    assert net.times == sorted(net.times, reverse=True)
    assert net.times[0] == 80
    assert stage1.times[-1] == 0.2
    assert min(net.times) >= 1 > max(stage1.times)
    assert len(net.times + stage1.times) == 8


def test_without_stage_1_the_levels_end_at_t_prime():
    net = Gaussian(TCM)
    edit(net, images(), "inpaint", mask=HALF)
    assert net.times[-1] == 1
    with pytest.raises(
        ValueError, match=r"level: 0.5 lies below t'=1, .*; use noise levels of at least 1"
    ):
        edit(net, images(), "vary", level=0.5)
    with pytest.raises(ValueError, match=r"times: 0.3 lies below t'=1"):
        edit(net, images(), "vary", level=2.0, times=[0.5, 0.3])
    edit(net, images(), "vary", level=0.5, allow_below_t_prime=True)
    assert net.times[-1] == 0.5


class Loaded(Gaussian):
    """A truncated network that came from a file."""

    def __init__(self, source):
        super().__init__(TCM)
        self.source = source


def test_stage_1_is_read_where_it_is_needed_and_once(tmp_path, monkeypatch):
    stage1, read = Gaussian(), []
    monkeypatch.setattr(
        arguments_module, "load_stage1", lambda source: read.append(source) or stage1
    )
    net = Loaded(tmp_path / "net.safetensors")
    edit(net, images(), "vary", level=2.0)  # reads nothing: the file is not even there
    edit(net, images(), "inpaint", mask=HALF, times=[2.0, 1.0])
    assert read == []
    for options in ({}, {"level": 2.0, "times": [0.5]}):
        with pytest.raises(ValueError, match=r"net: its file .*net.safetensors is gone"):
            edit(net, images(), "stroke", **options)
    net.source.touch()
    for _ in range(2):
        edit(net, images(), "stroke")
    assert read == [net.source]
    net.source.unlink()
    edit(net, images(), "stroke")
    assert stage1.times == [0.2] * 3
    assert dict(net.named_modules()).keys() == {""}


def test_a_pre_trained_network_is_no_stage_1():
    stage1 = Gaussian({"phase": "edm"})
    with pytest.raises(
        ValueError, match="stage1: must be a consistency network, got one of phase edm"
    ):
        edit(Gaussian(TCM), images(), "stroke", stage1=stage1)
    with pytest.raises(ValueError, match="stage1: must be a consistency network"):
        sample(Gaussian(TCM), 2, times=[0.5], stage1=stage1)


def test_labels_go_with_the_images():
    net = Gaussian(label_dim=3, sd=1e-4)

    def classes(**options):
        edited = edit(net, images(2), "inpaint", mask=HALF, num=2, batch_size=3, **options)
        return (((edited[:, 0, 3, 0].float() - 128) / 127.5 + 0.5) * 4).round().int().tolist()

    assert classes(labels=1) == classes(labels=[1]) == [1] * 4
    assert classes(labels=np.int64(1)) == classes(labels=torch.tensor(1)) == [1] * 4
    assert classes(labels=[2, 0]) == classes(labels=torch.tensor([2, 0])) == [2, 2, 0, 0]
    assert classes(labels=torch.eye(3)[[0, 2]]) == [0, 0, 2, 2]
    assert classes(labels=np.eye(3)[[0, 2]]) == [0, 0, 2, 2]
    assert classes(labels=[[1, 0, 0], [0, 0, 1]]) == [0, 0, 2, 2]


def test_an_interpolation_goes_from_class_to_class():
    edited = edit(Gaussian(label_dim=3, sd=1e-4), None, "interpolate", num=3, labels=[0, 2])
    means = (edited[:, 0, 0, 0].float() - 128) / 127.5
    torch.testing.assert_close(means, torch.tensor([-0.5, -0.25, 0.0]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_seeds_batches_and_numbers(task):
    y, options = arguments(task)
    net = Gaussian(sd=0.5).train()
    options = {"num": 3, "steps": 2, "level": 3.0} | options
    whole = edit(net, y, task, seed=1, **options)
    assert net.training
    assert whole.dtype == torch.uint8
    assert whole.shape == (5 if task == "interpolate" else 6, 4, 4, 3)
    assert torch.equal(whole, edit(net, y, task, seed=1, batch_size=2, **options))
    if task != "denoise":
        assert not torch.equal(whole, edit(net, y, task, seed=2, **options))
    if task != "interpolate":  # image 1's results have the numbers 3, 4, 5
        assert torch.equal(whole[3:], edit(net, y[1:], task, seed=1, start=3, **options))


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"colorize"}))
def test_grey_networks(task):
    y, options = arguments(task, channels=1)
    net = Gaussian(channels=1)
    edited = edit(net, y, task, **options)
    assert edited.shape[1:] == (4, 4, 1)
    assert torch.equal(edit(net, y.expand(-1, -1, -1, 3), task, **options), edited)
    with pytest.raises(ValueError, match="takes grey images, got coloured"):
        edit(net, images(2, 3, y.shape[1]), task, **options)


def test_masks_of_bytes_and_one_for_each_image():
    y = images()
    masks = torch.stack([HALF, HALF.flip(1)])
    edited = edit(Gaussian(), y, "inpaint", mask=masks, num=2)
    assert torch.equal(edited[:2, :, :2], y[:1, :, :2].expand(2, -1, -1, -1))
    assert torch.equal(edited[2:, :, 2:], y[1:, :, 2:].expand(2, -1, -1, -1))
    as_bytes = masks.numpy() * np.uint8(128)
    assert torch.equal(edit(Gaussian(), y, "inpaint", mask=as_bytes, num=2), edited)


def test_arrays_that_are_views_or_read_only():
    y, mask = images().numpy(), HALF.numpy().copy()
    expected = edit(Gaussian(), y, "inpaint", mask=mask)
    y.flags.writeable = mask.flags.writeable = False
    flipped = y[:, ::-1].copy()
    assert torch.equal(edit(Gaussian(), flipped[:, ::-1], "inpaint", mask=mask), expected)
    assert torch.equal(edit(Gaussian(), y, "inpaint", mask=mask), expected)


def test_a_real_network_in_16_bits():
    net = tcm_fast.build_network(
        "ddpmpp", img_resolution=8, img_channels=3, label_dim=3, model_channels=16,
        channel_mult=[1, 1], num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    y = images(2, 3, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:] = True
    for precision in ("fp32", "bf16"):
        edited = tcm_fast.edit(
            net, y, "inpaint", mask=mask, labels=1, num=2, precision=precision, steps=2
        )
        assert torch.equal(edited[:, ~mask], y.repeat_interleave(2, 0)[:, ~mask])


@pytest.mark.parametrize("task", TASKS)
def test_as_one_captured_graph(task, monkeypatch):
    """As on a GPU: from the third batch on it is replayed with what the next images are."""
    y, options = arguments(task)
    y = torch.cat([y, images(8, size=y.shape[1], seed=1)]) if task != "interpolate" else y
    options |= {"num": 12} if task == "interpolate" else {}
    expected = edit(Gaussian(), y, task, **options)
    places, make = [], Sampler.__init__

    def with_graphs(self, *arguments, **given):
        make(self, *arguments, **given)
        places.append(OnHost())
        self.graphs = GraphCache(places[-1])

    monkeypatch.setattr(Sampler, "__init__", with_graphs)
    assert torch.equal(edit(Gaussian(), y, task, batch_size=2, **options), expected)
    assert places[0].captures == 1
    assert places[0].replays >= 3


# ---- refusals -----------------------------------------------------------------------------------

REFUSED = [
    ("erase", {}, ValueError, "task: must be one of inpaint, .*got 'erase'"),
    ("inpaint", {}, ValueError, "mask: inpaint needs one"),
    ("inpaint", {"mask": HALF[:3]}, ValueError, r"mask: must be \[4, 4\], or \[2,4,4\].*got \[3, 4\]"),
    ("inpaint", {"mask": HALF[None].expand(3, 4, 4)}, ValueError, r"mask: .*got \[3, 4, 4\]"),
    ("inpaint", {"mask": HALF.float()}, TypeError, "mask: must be bool or uint8, got float32"),
    ("inpaint", {"mask": HALF.byte()}, ValueError, "mask: marks no pixel to generate"),
    ("inpaint", {"mask": torch.stack([HALF, HALF & False])}, ValueError, "no pixel of image 1"),
    ("colorize", {"mask": HALF}, ValueError, "mask: is for inpaint, stroke, vary; colorize takes none"),
    ("vary", {"images": images(2, 3, 5)}, ValueError, "images: must be the network's 4x4, got 5x5"),
    ("vary", {"images": images()[:, :3]}, ValueError, "got 4x3"),
    ("vary", {"images": images()[0]}, ValueError, r"must be \[N,H,W,C\] with C 3, got \[4, 4, 3\]"),
    ("vary", {"images": images(1, 4)}, ValueError, r"with C 3, got \[1, 4, 4, 4\]"),
    ("vary", {"images": images()[:0]}, ValueError, r"got \[0, 4, 4, 3\]"),
    ("vary", {"images": images().float()}, TypeError, "vary takes uint8 .*got float32"),
    ("vary", {"images": None}, ValueError, "images: vary needs some, got None"),
    ("vary", {"level": 81}, ValueError, r"level: must lie in \[0.002, 80\], got 81"),
    ("vary", {"level": float("nan")}, ValueError, "level: must lie in .*got nan"),
    ("vary", {"level": 0.1, "steps": 2}, ValueError, "steps: more than 1 need a level above 0.2"),
    ("vary", {"steps": 0}, ValueError, "steps: must be at least 1, got 0"),
    ("vary", {"times": [2.0]}, ValueError, "times: must fall strictly from at most 1"),
    ("vary", {"times": [0.5], "steps": 0}, ValueError, "steps: must be at least 1, got 0"),
    ("vary", {"times": ["x"]}, TypeError, "times: must be a number, got 'x'"),
    ("vary", {"level": "x"}, TypeError, "level: must be a number, got 'x'"),
    ("vary", {"steps": 1.5}, TypeError, "steps: must be an int, got 1.5"),
    ("vary", {"num": 2.5}, TypeError, "num: must be an int, got 2.5"),
    ("vary", {"num": -1}, ValueError, "num: must be at least 1, got -1"),
    ("vary", {"start": torch.tensor(1.5)}, TypeError, "start: must be an int, got tensor"),
    ("vary", {"seed": 1.5}, TypeError, "seed: must be an int, got 1.5"),
    (["vary"], {}, ValueError, r"task: must be one of inpaint, .*got \['vary'\]"),
    ("vary", {"images": Image.new("RGB", (4, 4))}, TypeError, "must be a tensor or an array, got Image"),
    ("vary", {"images": list(images())}, TypeError, "images: must be a tensor or an array, got list"),
    ("vary", {"images": "a.png"}, TypeError, "images: must be a tensor or an array, got str"),
    ("vary", {"images": np.array([None])}, TypeError, "must be a tensor or an array, got object"),
    ("inpaint", {"mask": Path("a.png")}, TypeError, "mask: must be a tensor or an array, got .*Path"),
    ("vary", {"times": [0.5], "steps": 3}, ValueError, "3 steps need 2 times after the first, got 1"),
    ("vary", {"num": 0}, ValueError, "num: must be at least 1, got 0"),
    ("vary", {"seed": -1}, ValueError, r"seed: must lie in \[0, 2\*\*32\), got -1"),
    ("vary", {"seeds": (1, 2)}, ValueError, "seeds: are for interpolate; vary takes one seed"),
    ("vary", {"labels": 1}, ValueError, "labels: the network is unconditional"),
    ("upscale", {}, ValueError, "upscale takes squares of which 4 is a multiple.*got 4x4"),
    ("upscale", {"images": images(1, 3, 3)}, ValueError, "got 3x3"),
    ("upscale", {"images": images()[:, :1]}, ValueError, "got 4x1"),
    ("denoise", {}, ValueError, "level: denoise needs the standard deviation of the noise"),
    ("denoise", {"images": images() / torch.tensor(0.0), "level": 1}, ValueError, "NaN or Inf"),
    ("denoise", {"images": images().float(), "level": 1}, ValueError, "within 11, got 2"),
    ("interpolate", {"seeds": (1,)}, ValueError, r"seeds: must be two ints, got \(1,\)"),
    ("interpolate", {"seeds": (1, 2, 3)}, ValueError, "seeds: must be two ints"),
    ("interpolate", {"seeds": 5}, ValueError, "seeds: must be two ints, got 5"),
    ("interpolate", {"seeds": (1, 2.5)}, ValueError, "seeds: must be two ints"),
    ("interpolate", {"num": 1}, ValueError, "num: interpolate needs at least its 2 ends, got 1"),
    ("interpolate", {"images": images(3)}, ValueError, "interpolate takes 2 images, got 3"),
    ("interpolate", {"seeds": (1, 2**32)}, ValueError, r"seeds: must lie in \[0, 2\*\*32\)"),
    (lambda x: 2 * x, {}, ValueError, "linear, idempotent and orthogonal, but of noise P P x - P x is"),
    (lambda x: x.clamp(min=0), {}, ValueError, r"P\(x \+ y\) - P x - P y is up to"),
    (lambda x: x[..., ::2].repeat_interleave(2, 3), {}, ValueError, "<P x, x - P x> / <x, x> is up to"),
    (lambda x: x / 0, {}, ValueError, "is up to nan"),
    (lambda x: x[:, :1], {}, ValueError, r"must keep the shape \[n,C,H,W\]"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "changes", "error", "message"), REFUSED)
def test_refused(task, changes, error, message):
    net, options = Gaussian(), {"images": images()} | changes
    with pytest.raises(error, match=message):
        edit(net, task=task, **options)
    assert net.times == []  # before a network is called


def test_networks_that_cannot_edit_are_refused():
    with pytest.raises(ValueError, match=r"pre-trained only \(phase edm\)"):
        edit(Gaussian({"phase": "edm"}), images(), "vary")
    with pytest.raises(
        TypeError, match="net: must have an attribute img_resolution, Linear has none"
    ):
        edit(nn.Linear(2, 2), images(), "vary")
    for channels in (1, 3):
        with pytest.raises(ValueError, match=rf"with C 4, got \[2, 4, 4, {channels}\]"):
            edit(Gaussian(channels=4), images(channels=channels), "vary")
    with pytest.raises(ValueError, match="colorize needs a network of 3 channels, this one has 1"):
        edit(Gaussian(channels=1), images(channels=1), "colorize")


def test_labels_out_of_range_or_missing():
    net = Gaussian(label_dim=3)
    for labels, message in [
        (None, "give the class of each image, 0 to 2"),
        (3, r"must lie in \[0, 3\), got 3"),
        ([0, 1, 2], "one class, or one for each of 2 images, got 3"),
        (torch.eye(3), r"must be \[2,3\], got \[3, 3\]"),
    ]:
        with pytest.raises(ValueError, match=f"labels: .*{message}"):
            edit(net, images(), "vary", labels=labels)
    with pytest.raises(ValueError, match="interpolate takes one class or two, got 3"):
        edit(net, None, "interpolate", labels=[0, 1, 2])


def test_the_command_line_lists_the_same_tasks():
    assert set(Task.__args__) == set(TASKS)
