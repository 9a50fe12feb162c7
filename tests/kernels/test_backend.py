"""Which backend runs, and what is said where one cannot."""

import json
from pathlib import Path

import pytest
import torch

from tcm_fast.kernels import _backend
from tcm_fast.kernels.dropout import PhiloxKey, dropout
from tcm_fast.kernels.philox import philox_bits

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


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
    y = dropout(torch.ones(2, 8), 0.5, PhiloxKey(seed=0, step=0, sample=sample))
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_a_kernel_that_cannot_run_is_an_error(no_extension, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    message = r"philox_bits: TCM_FAST_BACKEND=kernel needs a kernel on cpu, got none \(tcm_fast._C"
    with pytest.raises(ValueError, match=message):
        philox_bits(0, 0, 0, torch.arange(2), 3)


def test_the_layout_of_networks(monkeypatch):
    assert _backend.fast_layout(torch.device("cuda")) == torch.channels_last
    assert _backend.fast_layout(torch.device("meta")) == torch.contiguous_format
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")  # torch's own channels_last loses digits
    assert _backend.fast_layout(CPU) == torch.contiguous_format
    monkeypatch.setenv("TCM_FAST_BACKEND", "")
    monkeypatch.setattr(_backend, "_load", lambda: (object(), ""))
    assert _backend.fast_layout(CPU) == torch.channels_last
    monkeypatch.setattr(_backend, "_load", lambda: (None, "not built"))
    assert _backend.fast_layout(CPU) == torch.contiguous_format


def test_no_kernel_for_an_unknown_device(monkeypatch):
    assert _backend.extension_for("dropout", torch.device("meta")) is None
    monkeypatch.setenv("TCM_FAST_BACKEND", "kernel")
    with pytest.raises(ValueError, match="needs a kernel on meta"):
        _backend.extension_for("dropout", torch.device("meta"))


class FakeExtension:
    def __init__(self, archs, built=13000, runs=13010):
        self.archs = archs
        self.cuda_runtime_version = lambda: built
        self.cuda_driver_version = lambda: runs

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


def gap_on_a_card(monkeypatch, **versions):
    monkeypatch.setattr(_backend, "_load", lambda: (FakeExtension(["90"], **versions), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return _backend._cuda_gap.__wrapped__(0)


def test_gpus_of_others(monkeypatch):
    with monkeypatch.context() as rocm:
        rocm.setattr(torch.version, "hip", "7.0")
        assert "ROCm" in gap_on_a_card(rocm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    name, is_active, why = _backend.describe()[0]
    assert (name, is_active) == ("GPU", False)
    assert why == "mps is there, for which tcm_fast has no kernels: it runs on the CPU"


def test_a_driver_too_old_for_the_runtime_built_in(monkeypatch):
    said = gap_on_a_card(monkeypatch, built=13010, runs=12040)
    assert said.startswith("the driver runs CUDA 12.4, and tcm_fast._C was built with 13.1: update")
    assert said.endswith("or install tcm_fast again with nvcc 12")
    # An older one of the same major version serves, as does any newer.
    assert gap_on_a_card(monkeypatch, built=13010, runs=13000) == ""
    assert gap_on_a_card(monkeypatch, built=12080, runs=13000) == ""


def test_an_extension_of_other_sources_does_not_load(monkeypatch, tmp_path):
    if _backend.extension() is None:
        pytest.skip("tcm_fast._C was not built")
    monkeypatch.setattr(_backend, "_SOURCES", tmp_path)
    (tmp_path / "module.cpp").write_text("// a line more\n")
    module, gap = _backend._load.__wrapped__()
    assert module is None
    assert "not of the present csrc/: run `pip install -e .` again" in gap
    monkeypatch.setattr(_backend, "_SOURCES", tmp_path / "none")  # an installed wheel
    assert _backend._load.__wrapped__()[0] is _backend.extension()


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


def test_the_description_says_what_each_missing_half_costs(no_extension, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    why = {name: (active, why) for name, active, why in _backend.describe()}
    assert "an optimizer step 4 times (RAdam)" in why["C++ extension, CPU half"][1]
    assert "launches that move about three times the bytes" in why["C++ extension, CUDA half"][1]
    assert why["Triton"] == (False, f"not installed: {_backend._TRITON_COST}")


def test_triton_on_a_gpu_needs_a_compiler_and_headers(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(_backend, "_cuda_gap", lambda index: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_backend.sysconfig, "get_path", lambda *scheme: str(tmp_path))
    for name in ("CC", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    cost = _backend._TRITON_COST
    assert _backend.describe()[3][1:] == (False, f"needs a C compiler: install gcc: {cost}")
    (tmp_path / "gcc").touch(mode=0o755)
    assert "needs Python's headers: install python3-dev" in _backend.describe()[3][2]
    (tmp_path / "Python.h").touch()
    assert _backend.describe()[3] == ("Triton", True, "in use")


def test_the_costs_are_those_of_the_recorded_benchmark():
    """Ours beside the fastest of torch's own paths, on one thread and on two."""
    recorded = json.loads((ROOT / "benchmarks/results/optimizer_cpu.json").read_text())
    for kind, target, said in (("radam", 1.6, 4), ("adam", 0.9, 1.5)):
        for threads in ("threads_1", "threads_2"):
            times = {r["provider"]: r["median"] for r in recorded[threads] if r["kind"] == kind}
            ratio = min(t for name, t in times.items() if name != "tcm_fast") / times["tcm_fast"]
            assert ratio >= target
            assert 0.8 <= ratio / said <= 1.25
        assert f"{said} times" in _backend._CPU_COST


@pytest.mark.skipif(_backend.extension() is None, reason="tcm_fast._C was not built")
def test_the_halves_agree_on_what_was_built():
    ext = _backend.extension()
    assert ext.has_cuda() == bool(ext.cuda_archs()) == hasattr(ext, "philox_bits_cuda")
