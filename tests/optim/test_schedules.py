"""Learning rates."""

import pytest

from tcm_fast.config import load_preset
from tcm_fast.optim.schedules import learning_rate


def test_learning_rates_of_the_recipes():
    edm = load_preset("cifar10").edm
    assert learning_rate(edm, 0, 0) == 0
    assert learning_rate(edm, 5_000_000, 9765) == pytest.approx(5e-4)
    assert learning_rate(edm, 20_000_000, 39062) == 1e-3
    edm2 = load_preset("imagenet64-s").ect
    assert learning_rate(edm2, 0, 0) == learning_rate(edm2, 1, 2000) == 1e-3
    assert learning_rate(edm2, 1, 8000) == pytest.approx(5e-4)
