"""What all tests share: quiet surroundings, the tolerance rule, visible skips."""

import functools
import importlib
import os
import pickle
import pkgutil
import sys

import pytest
import torch
from hypothesis import settings

# Triton decides when a kernel is defined whether it will be interpreted; so before anything imports it.
os.environ.pop("TRITON_INTERPRET", None)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import tcm_fast.kernels

for module in pkgutil.iter_modules(tcm_fast.kernels.__path__):
    importlib.import_module(f"tcm_fast.kernels.{module.name}")

os.environ.pop("TRITON_INTERPRET", None)

# A busy machine is no failure.
# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("tcm_fast", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tcm_fast"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` means: a process for each core, but each takes about a GB."""
    return min(os.cpu_count() or 1, 8)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """What runs in Triton's interpreter elsewhere is a GPU's test where there is one."""
    if torch.cuda.is_available():
        for item in items:
            if "triton_device" in item.fixturenames:
                item.add_marker(pytest.mark.gpu)
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: none found"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tests' tensors are small, and on a busy machine two threads wait for each other. With
    OMP_NUM_THREADS set, as many as it says."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_unpickled_by_us():
    """No module of the library may call what can run a file's contents (libraries do, between
    processes)."""

    def guarded(function, is_safe=lambda **_: False):
        @functools.wraps(function)
        def call(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            assert not caller.startswith("tcm_fast") or is_safe(**kwargs), f"{caller} unpickles"
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads"):
            patch.setattr(pickle, name, guarded(getattr(pickle, name)))
        is_safe = lambda **options: options.get("weights_only") is True  # noqa: E731
        patch.setattr(torch, "load", guarded(torch.load, is_safe))
        yield


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.delenv("TCM_FAST_BACKEND", raising=False)


def round_as_a_gpu(convert):
    """Triton 3.9's interpreter cuts bf16 off where a GPU rounds to the nearest even."""
    import numpy as np
    import triton.language as tl

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)

    return rounded


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton's kernels run in this test: on the GPU, else in the interpreter on the CPU. Fails
    where the test launched none."""
    pytest.importorskip("triton")
    from tcm_fast.kernels import _triton

    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(
            interpreter, "_convert_float", round_as_a_gpu(interpreter._convert_float)
        )
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    before = _triton.LAUNCHES.total()
    yield "cuda" if torch.cuda.is_available() else "cpu"
    assert _triton.LAUNCHES.total() > before, "no Triton kernel ran"


@pytest.fixture(autouse=True)
def seed():
    """Seeds torch's default generators before every test, whichever ran before it, and says with what."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def check_against_oracle():
    """The rule for a kernel: its error against the float64 oracle is at most twice that of PyTorch in
    the kernel's own dtype, plus a millionth of the oracle's largest value. A sum that may cancel has an
    error in the last place of its terms: `terms` is the sum of their magnitudes."""

    def check(
        kernel: torch.Tensor,
        reference: torch.Tensor,
        oracle: torch.Tensor,
        what: str = "",
        *,
        terms: float = 0.0,
    ):
        assert oracle.dtype == torch.float64
        assert kernel.shape == reference.shape == oracle.shape
        assert kernel.dtype == reference.dtype
        if oracle.numel() == 0:
            return
        error = (kernel.double() - oracle).abs().max().item()
        allowed = 2 * (reference.double() - oracle).abs().max().item()
        allowed += 1e-6 * oracle.abs().max().item() + terms * torch.finfo(torch.float32).eps
        # Written so that a NaN fails.
        assert error <= allowed, f"{what}: error {error:.3g} is above {allowed:.3g}"

    return check


@pytest.fixture(params=["reference", "kernel"])
def either_backend(request, monkeypatch):
    """The optimizer's pass by its reference and by the extension."""
    if request.param == "kernel" and tcm_fast.kernels._backend.extension() is None:
        pytest.skip("needs the extension: not built")
    monkeypatch.setenv("TCM_FAST_BACKEND", request.param)
