"""torch's settings for the whole program: changed for a while, and put back."""

import os

import pytest
import torch

from tcm_fast.runtime.arithmetic import tf32, training_settings


def settings():
    return {
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "sums of fp16": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "sums of bf16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32(allowed):
    before = settings()
    with tf32(allowed):
        assert torch.backends.cudnn.allow_tf32 is allowed
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert settings() == before


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_of_training(precision, deterministic):
    before = settings()
    found = {}

    def fail():
        found.update(settings())
        raise KeyError

    with pytest.raises(KeyError), training_settings(precision, deterministic=deterministic):
        fail()
    assert settings() == before
    assert found["cudnn.allow_tf32"] is (precision == "tf32")
    assert found["sums of fp16"] is found["sums of bf16"] is False
    assert found["cudnn.benchmark"] is not deterministic
    assert found["deterministic"] == (2 if deterministic else 0)
    assert not (deterministic and found["fill"])


def test_deterministic_settings_of_the_caller_stay(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with training_settings("fp32", deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
