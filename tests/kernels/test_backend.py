"""Which backend runs, and what is said where one cannot."""

import pytest
import torch

from tcm_fast.kernels import _backend
from tcm_fast.kernels.dropout import DropoutKey, dropout
from tcm_fast.kernels.philox import philox_bits

CPU = torch.device("cpu")


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_backend, "_load", lambda: (None, "tcm_fast._C was not built"))


def test_the_variable(monkeypatch):
    assert _backend.backend() is None
    for value in ("reference", "kernel"):
        monkeypatch.setenv("TCM_FAST_BACKEND", value)
        assert _backend.backend() == value
    monkeypatch.setenv("TCM_FAST_BACKEND", "")
    assert _backend.backend() is None
    monkeypatch.setenv("TCM_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="TCM_FAST_BACKEND: must be reference or kernel, got fast"):
        _backend.backend()


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    assert _backend.extension_for("dropout", CPU) is None


def test_without_an_extension_the_reference_serves(no_extension):
    assert _backend.extension() is None
    sample = torch.arange(2)
    assert philox_bits(0, 0, 0, sample, 3).shape == (2, 3, 4)
    y = dropout(torch.ones(2, 8), 0.5, DropoutKey(seed=0, step=0, sample=sample))
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_a_kernel_that_cannot_run_is_an_error(no_extension, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    message = r"philox_bits: TCM_FAST_BACKEND=kernel needs a kernel on cpu, got none \(tcm_fast._C"
    with pytest.raises(ValueError, match=message):
        philox_bits(0, 0, 0, torch.arange(2), 3)


def test_no_kernel_for_an_unknown_device(monkeypatch):
    assert _backend.extension_for("dropout", torch.device("meta")) is None
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    with pytest.raises(ValueError, match="needs a kernel on meta"):
        _backend.extension_for("dropout", torch.device("meta"))


class FakeExtension:
    def __init__(self, archs):
        self.archs = archs

    def has_cuda(self):
        return bool(self.archs)

    def cuda_archs(self):
        return self.archs


@pytest.mark.parametrize(
    ("archs", "capability", "gap"),
    [
        (["80", "90"], (9, 0), ""),
        (["80", "90"], (8, 9), ""),
        (["80", "90a"], (12, 0), ""),
        (["86", "90"], (8, 0), "no code for compute capability 8.0"),
        (["80", "90"], (7, 5), "no code for compute capability 7.5"),
        ([], (9, 0), "without its CUDA half"),
    ],
)
def test_what_runs_on_which_card(archs, capability, gap, monkeypatch):
    monkeypatch.setattr(_backend, "_load", lambda: (FakeExtension(archs), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    said = _backend._cuda_gap.__wrapped__(0)
    assert gap in said
    assert bool(gap) == bool(said)


@pytest.mark.parametrize("value", [None, "reference", "kernel"])
def test_the_description_names_every_backend(value, monkeypatch):
    if value:
        monkeypatch.setenv("TCM_FAST_BACKEND", value)
    rows = _backend.describe()
    active = {name: active for name, active, _ in rows}
    assert list(active) == ["GPU", "C++ extension, CPU half", "C++ extension, CUDA half", "Triton"]
    assert all(why and "\n" not in why for _, _, why in rows)
    assert active["GPU"] == torch.cuda.is_available()
    if value == "reference":
        assert not any(active[name] for name in active if name != "GPU")
    else:
        assert active["C++ extension, CPU half"] == (_backend.extension() is not None)


def test_the_description_without_an_extension(no_extension):
    rows = {name: (active, why) for name, active, why in _backend.describe()}
    active, why = rows["C++ extension, CPU half"]
    assert not active
    assert "tcm_fast._C was not built" in why
    assert "take about 20 times as long" in why


@pytest.mark.skipif(_backend.extension() is None, reason="tcm_fast._C was not built")
def test_the_halves_agree_on_what_was_built():
    ext = _backend.extension()
    assert ext.has_cuda() == bool(ext.cuda_archs()) == hasattr(ext, "philox_bits_cuda")
