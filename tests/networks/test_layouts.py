"""Nothing that enters a convolution, forward or backward, has to be laid out anew."""

import pytest
import torch
import torch.nn.functional as F

from tcm_fast.networks import build_network

# Heads that have a kernel and heads that have none; a resolution with few pixels and one with more.
OPTIONS = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
FAMILIES = {
    "ddpmpp": {"model_channels": 16},
    "ncsnpp": {"model_channels": 16},
    "adm": {"model_channels": 64},
    "edm2": {"model_channels": 16, "channels_per_head": 16},
}


@pytest.fixture
def arriving(monkeypatch):
    """Shapes and strides of each convolution's inputs and of the gradients at its results."""
    found = {"input": [], "gradient": []}

    def watch(name):
        convolve = getattr(F, name)

        def watched(x, *args, **options):
            found["input"].append((tuple(x.shape), x.stride()))
            y = convolve(x, *args, **options)
            y.register_hook(lambda g: found["gradient"].append((tuple(g.shape), g.stride())))
            return y

        monkeypatch.setattr(F, name, watched)

    watch("conv2d")
    watch("conv_transpose2d")
    return found


@pytest.mark.parametrize("resolution", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_and_gradients_are_channels_last(arriving, family, resolution):
    torch.manual_seed(0)
    options = OPTIONS | {"attn_resolutions": [resolution]} | FAMILIES[family]
    net = build_network(family, img_resolution=resolution, img_channels=3, **options)
    net = net.to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 3, resolution, resolution)
    x = x.contiguous(memory_format=torch.channels_last)
    out = net.raw(x, torch.tensor([0.5, 2.0]))
    out.backward(torch.randn_like(out))
    count = len(arriving["input"])
    assert len(arriving["gradient"]) == count > 10
    for name, seen in arriving.items():
        wrong = [
            (shape, strides)
            for shape, strides in seen
            if not torch.empty_strided(shape, strides).is_contiguous(
                memory_format=torch.channels_last
            )
        ]
        assert not wrong, f"{name}: {wrong}"
