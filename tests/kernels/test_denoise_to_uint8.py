"""From raw output to bytes, against numpy in float64."""

import math

import numpy as np
import pytest
import torch

from tcm_fast.kernels.denoise_to_uint8 import denoise_to_uint8


def inputs(n=3, shape=(3, 5, 7)):
    g = torch.Generator().manual_seed(0)
    output, x = (torch.randn(n, *shape, generator=g) for _ in range(2))
    return output, x, torch.exp(torch.randn(n, generator=g))


def expected(output, x, t, sd=0.5):
    output, x = output.double().numpy(), x.double().numpy()
    t = t.double().numpy().reshape(-1, 1, 1, 1)
    variance = t**2 + sd**2
    images = sd**2 / variance * x + t * sd / np.sqrt(variance) * output
    return np.clip(127.5 * images + 128, 0, 255).transpose(0, 2, 3, 1)


def check(bytes_, exact):
    """Equal where the exact value does not all but touch an integer, nowhere off by more than one."""
    bytes_ = bytes_.cpu().numpy()
    clear = np.abs(exact - np.round(exact)) > 1e-3
    assert clear.mean() > 0.8  # black and white are integers
    assert (bytes_ == np.floor(exact))[clear].all()
    assert np.abs(bytes_ - np.floor(exact)).max() <= 1


def test_the_reference_is_the_formula():
    check(denoise_to_uint8(*inputs()), expected(*inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (3, 32, 32)])
def test_the_kernel_is_the_formula(dtype, layout, shape, triton_device):
    output, x, t = inputs(shape=shape)
    output = output.to(dtype).contiguous(memory_format=layout)
    image = denoise_to_uint8(output.to(triton_device), x.to(triton_device), t.to(triton_device))
    assert image.is_contiguous()
    check(image, expected(output, x, t))


def test_the_kernel_writes_every_byte_and_makes_nan_black(triton_device, monkeypatch):
    output, x, t = (v.to(triton_device) for v in inputs(shape=(3, 37, 29)))
    first = denoise_to_uint8(output, x, t)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(7))
    assert torch.equal(denoise_to_uint8(output, x, t), first)
    output[0, 0, 0, 0] = math.nan
    assert denoise_to_uint8(output, x, t)[0, 0, 0, 0] == 0


def test_the_kernel_of_no_images(triton_device):
    output, x, t = (v[:0].to(triton_device) for v in inputs())
    assert denoise_to_uint8(output, x, t).shape == (0, 5, 7, 3)
    output, x, t = (v.to(triton_device) for v in inputs())
    torch.library.opcheck(torch.ops.tcm_fast.denoise_to_uint8.default, (output, x, t, 0.5))


def test_bad_shapes_are_named():
    output, x, t = inputs()
    with pytest.raises(ValueError, match=r"denoise_to_uint8: output must be \[N,C,H,W\] like x"):
        denoise_to_uint8(output[:2], x, t)
    with pytest.raises(ValueError, match=r"denoise_to_uint8: t must be \[3\], got \[2\]"):
        denoise_to_uint8(output, x, t[:2])
