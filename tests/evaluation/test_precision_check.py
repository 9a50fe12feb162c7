"""Rounding against signal: the emulated rounding, the readings' sense, the command."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tcm_fast.checkpoint.format import save_network
from tcm_fast.cli.doctor import schedule_end
from tcm_fast.cli.main import main
from tcm_fast.config import Config, save_config
from tcm_fast.data.dataset import ImageData
from tcm_fast.evaluation.precision_check import SplitConvolutions, _to_tf32, measure, plot
from tcm_fast.networks import build_network


def network(**options):
    torch.manual_seed(0)
    net = build_network(
        "ddpmpp", img_resolution=8, img_channels=1, model_channels=16, channel_mult=[1, 1],
        num_blocks=1, attn_resolutions=[4], **options,
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def images(labels=None):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    return ImageData(pixels, labels, "noise", ())


def test_tf32_keeps_ten_bits_to_the_nearest_even():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-11 + 2**-20), 0.0])
    expected = [1.0, 1 + 2**-10, 1.0, 1 + 2**-9, -(1 + 2**-10), 0.0]
    assert _to_tf32(x).tolist() == expected


@pytest.mark.parametrize(("name", "bits"), [("bf16x6", 20), ("tf32x3", 20)])
@pytest.mark.parametrize("groups", [1, 4])
def test_split_convolutions(name, bits, groups):
    """What is left out is the products of the smallest parts: 2^-24 and 2^-22 of each product, in
    at most three of them, and far less on average; fp32's own rounding of 144 terms' sum comes on top."""
    x, weight, bias = torch.randn(3, 16, 9, 7), torch.randn(8, 16 // groups, 3, 3), torch.randn(8)

    def convolve(*operands):
        return torch.nn.functional.conv2d(*operands, stride=2, padding=1, groups=groups)

    with torch.no_grad(), SplitConvolutions(name):
        found = convolve(x, weight, bias)
        exact = convolve(x.double(), weight.double(), bias.double())  # float64 is left alone
    magnitude = convolve(x.double().abs(), weight.double().abs(), bias.double().abs())
    error = ((found - exact).abs() / magnitude).max()
    assert found.dtype == torch.float32
    assert error < 2.0**-bits
    assert (convolve(x.bfloat16(), weight.bfloat16(), bias.bfloat16()) - exact).abs().max() > 2**-9


def test_coarser_precisions_add_more_noise_to_the_same_signal():
    net = network()
    readings = measure(net, images(), num=8, times=(1.0, 10.0), ratio=0.99)
    by_name = {}
    for reading in readings:
        by_name.setdefault(reading.precision, []).append(reading)
    for i in range(2):
        fp32, tf32, fp16, bf16 = (by_name[n][i] for n in ("fp32", "tf32", "fp16", "bf16"))
        assert fp32.noise < 0.02 * fp16.noise
        assert fp32.noise < 0.02 * tf32.noise
        assert fp16.noise < bf16.noise
        for name in ("bf16x3", "bf16x6", "tf32x3"):
            assert by_name[name][i].noise < 0.2 * tf32.noise
        assert fp32.signal == bf16.signal > 0
        assert fp32.cosine > 0.999 > bf16.cosine
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_the_signal_shrinks_as_r_approaches_t():
    far, near = (
        measure(network(), images(), num=4, times=(3.0,), ratio=ratio, precisions=("bf16",))[0]
        for ratio in (0.5, 0.9999)
    )
    assert near.signal < 0.01 * far.signal
    assert near.is_drowned
    assert not far.is_drowned


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"doctor: the images must be \[8, 8, 1\]"):
        measure(network(), ImageData(np.zeros((4, 8, 8, 3), np.uint8), None, "black", ()))
    with pytest.raises(ValueError, match="doctor: the network needs labels"):
        measure(network(label_dim=3), images())


def test_the_command_prints_a_table_and_warns(tmp_path, capsys):
    save_network(tmp_path / "net.safetensors", network(), metadata={})
    np.savez(tmp_path / "images.npz", images=images().images)
    arguments = [str(tmp_path / "net.safetensors"), "--data", str(tmp_path / "images.npz")]
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--precision", *arguments, "--num", "4", "--ratio", "0.9999"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "bf16 drowns the signal" in printed.err
    assert "fp32" in printed.out
    assert "tf32 is emulated" in printed.out


def test_the_ratio_is_the_runs(tmp_path, capsys):
    save_network(tmp_path / "net.safetensors", network(), metadata={})
    np.savez(tmp_path / "images.npz", images=images().images)
    arguments = [str(tmp_path / "net.safetensors"), "--data", str(tmp_path / "images.npz")]
    config = Config()
    assert schedule_end(config) == pytest.approx(0.999)
    assert schedule_end(replace(config, phases=("edm",))) == 0.999
    config = replace(config, phases=("edm", "ect"), ect=replace(config.ect, max_ratio=0.5))
    save_config(config, tmp_path / "config.json")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--precision", *arguments, "--num", "2"])
    assert ended.value.code == 0
    assert "r/t = 0.5" in " ".join(capsys.readouterr().out.split())


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot(measure(network(), images(), num=2, times=(1.0, 3.0)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
