"""EDM's preconditioning against its table."""

import pytest
import torch

from tcm_fast.kernels.precondition import denoise, preconditioning


def test_the_table_of_edm():
    t = torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in = (c.flatten() for c in preconditioning(t))
    torch.testing.assert_close(c_skip, 0.25 / (t**2 + 0.25))
    torch.testing.assert_close(c_out, t * 0.5 / (t**2 + 0.25) ** 0.5)
    torch.testing.assert_close(c_in, 1 / (t**2 + 0.25) ** 0.5)


def test_unit_variance_in_and_out():
    """c_in makes the input, and c_out the network's target, of unit variance: the table's purpose."""
    torch.manual_seed(0)
    y = 0.5 * torch.randn(200_000, 1, 1, 1, dtype=torch.float64)
    x = y + 3.0 * torch.randn_like(y)
    t = torch.full((len(y),), 3.0, dtype=torch.float64)
    c_skip, c_out, c_in = preconditioning(t)
    assert (c_in * x).var().item() == pytest.approx(1, abs=0.02)
    assert ((y - c_skip * x) / c_out).var().item() == pytest.approx(1, abs=0.02)


def test_denoise_is_the_identity_at_zero_noise():
    x, output = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(denoise(output, x, torch.zeros(3)), x)


def test_denoise_keeps_the_images_dtype():
    x, output = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4).bfloat16()
    assert denoise(output, x, torch.ones(3, dtype=torch.float64)).dtype == torch.float32
