"""The tolerance rule itself: it passes what PyTorch's own rounding explains, and nothing else."""

import pytest
import torch


@pytest.fixture
def case(seed):
    oracle = torch.randn(1000, dtype=torch.float64)
    return oracle, oracle.to(torch.bfloat16)


def test_it_accepts_the_references_own_error(check_against_oracle, case):
    oracle, rounded = case
    check_against_oracle(rounded, rounded, oracle)
    check_against_oracle(oracle.float(), oracle.float(), oracle)


@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_it_refuses_a_wrong_scale(check_against_oracle, case, factor):
    oracle, rounded = case
    with pytest.raises(AssertionError, match="grad_x: error"):
        check_against_oracle((oracle * factor).to(torch.bfloat16), rounded, oracle, "grad_x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_it_refuses_one_wrong_element(check_against_oracle, case, value):
    oracle, rounded = case
    wrong = rounded.clone()
    wrong[oracle.abs().argmax()] = value
    with pytest.raises(AssertionError, match="error"):
        check_against_oracle(wrong, rounded, oracle)


def test_it_refuses_another_dtype_or_shape(check_against_oracle, case):
    oracle, rounded = case
    with pytest.raises(AssertionError):
        check_against_oracle(rounded.float(), rounded, oracle)
    with pytest.raises(AssertionError):
        check_against_oracle(rounded[1:], rounded, oracle)


def test_nothing_to_compare(check_against_oracle):
    empty = torch.empty(0, 3)
    check_against_oracle(empty, empty, empty.double())
