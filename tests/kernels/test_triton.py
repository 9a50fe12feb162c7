"""What the Triton kernels share: dispatch, counting, compiling together."""

import pytest
import torch

from tcm_fast.kernels import _triton
from tcm_fast.kernels._triton import LAUNCHES, compiling_together, launch, runs_triton
from tcm_fast.kernels.denoise_to_uint8 import denoise_to_uint8


def test_the_backend_decides(monkeypatch):
    assert not runs_triton("operation", "cpu")
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    with pytest.raises(
        ValueError, match="operation: TCM_FAST_BACKEND=kernel needs a kernel on cpu"
    ):
        runs_triton("operation", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runs_triton("operation", "cpu") == _triton.AVAILABLE
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    assert not runs_triton("operation", "cuda")


def test_an_empty_grid_is_no_launch():
    launch(None, (0, 3))


def test_launches_are_noted_instead_of_carried_out(triton_device):
    output, x, t = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.ones(2)
    tensors = [v.to(triton_device) for v in (output, x, t)]
    expected = denoise_to_uint8(*tensors)
    before = LAUNCHES.total()
    with compiling_together() as noted:
        denoise_to_uint8(*tensors)
        assert [kernel.__name__ for kernel, *_ in noted] == ["_denoise_to_uint8_kernel"]
    assert LAUNCHES.total() == before
    assert torch.equal(denoise_to_uint8(*tensors), expected)
    assert LAUNCHES.total() == before + 1


def test_a_noting_block_that_fails_leaves_launches_alone(triton_device):
    with pytest.raises(RuntimeError, match="no"), compiling_together():
        raise RuntimeError("no")
    tensors = [torch.ones(2, 3, 8, 8, device=triton_device) for _ in range(2)]
    denoise_to_uint8(*tensors, torch.ones(2, device=triton_device))
