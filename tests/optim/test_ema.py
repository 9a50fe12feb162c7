"""EMAs and their decays."""

import math

import pytest
import torch

from tcm_fast.optim.ema import Ema, EmaRule


def test_constant_average_is_the_plain_recursion():
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = Ema("constant:0.9", [weight])
    expected = torch.zeros(3)
    for i in range(1, 6):
        weight.data.fill_(float(i))
        ema.update(i, 10 * i, 10)
        expected = 0.9 * expected + 0.1 * i
    torch.testing.assert_close(ema.average[0], expected)


@pytest.mark.parametrize(("gamma", "width"), [(16.97, 0.05), (6.94, 0.10)])
def test_power_average_has_edm2s_relative_width(gamma, width):
    """The weight given to step i is proportional to (i/n)^gamma: its relative standard deviation is
    sqrt(gamma+1) / ((gamma+2) sqrt(gamma+3)), EDM2 eq. 126."""
    n = 4000
    rule = EmaRule.parse(f"power:{gamma}")
    weights, left = [], 1.0
    for i in range(n, 0, -1):
        beta = rule.beta(i, 0, 0)
        weights.append(left * (1 - beta))
        left *= beta
    weights = torch.tensor(weights[::-1], dtype=torch.float64)
    position = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert weights.sum().item() == pytest.approx(1)  # the start is forgotten at the first step
    mean = (weights * position).sum()
    std = ((weights * position**2).sum() - mean**2).sqrt().item()
    assert std == pytest.approx(width, rel=0.01)
    assert std == pytest.approx(
        math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)), rel=0.01
    )


def test_halflife_average_ramps_up():
    rule = EmaRule.parse("halflife:500000")
    assert rule.beta(1, 512, 512) == pytest.approx(0.5**20)  # 5 % of 512 images
    assert rule.beta(10**6, 10**9, 512) == pytest.approx(0.5 ** (512 / 500_000))


@pytest.mark.parametrize(
    "text", ["constant", "constant:1.5", "constant:x", "mean:1", "power:-2", ""]
)
def test_bad_rules_are_refused(text):
    with pytest.raises(ValueError, match="ema: must be constant:BETA"):
        EmaRule.parse(text)
