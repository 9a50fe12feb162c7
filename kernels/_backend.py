"""What runs an operation: the C++ extension, Triton, or its plain PyTorch reference."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch


def backend() -> str | None:
    """TCM_FAST_BACKEND: "reference" (plain PyTorch only), "kernel" (an error where no kernel can run)
    or None (whatever is fastest and available).

    Raises:
        ValueError: any other value.
    """
    value = os.environ.get("TCM_FAST_BACKEND") or None
    if value not in (None, "reference", "kernel"):
        raise ValueError(f"TCM_FAST_BACKEND: must be reference or kernel, got {value}")
    return value


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("tcm_fast._C"), ""
    except ModuleNotFoundError:
        return None, "tcm_fast._C was not built: install a C++17 compiler and tcm_fast again"
    except ImportError as error:
        return None, f"tcm_fast._C does not load: {' '.join(str(error).split())}"


def extension() -> ModuleType | None:
    """tcm_fast._C, or None where it was not built or does not load."""
    return _load()[0]


@functools.cache
def _cuda_gap(index: int) -> str:
    """Why the extension's CUDA half cannot run on this device; empty where it can."""
    module, gap = _load()
    if module is None:
        return gap
    if not module.has_cuda():
        return "tcm_fast._C was built without its CUDA half: install nvcc and tcm_fast again"
    archs = [int(arch.rstrip("af")) for arch in module.cuda_archs()]
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    # A binary serves its own major version from its minor on; the last one also comes as PTX.
    if any(arch // 10 == major and arch <= capability for arch in archs) or capability > archs[-1]:
        return ""
    return (
        f"tcm_fast._C has no code for compute capability {major}.{minor}: set TCM_FAST_CUDA_ARCHS"
    )


def extension_gap(device: torch.device) -> str:
    """Why the extension does not serve `device`; empty where it does."""
    if backend() == "reference":
        return "TCM_FAST_BACKEND=reference"
    if device.type == "cuda":
        return _cuda_gap(torch.cuda.current_device() if device.index is None else device.index)
    return _load()[1] if device.type == "cpu" else f"no kernel for {device.type}"


def extension_for(name: str, device: torch.device) -> ModuleType | None:
    """The extension where it serves operation `name` on `device`, None where the reference does.

    Raises:
        ValueError: TCM_FAST_BACKEND=kernel, and it cannot.
    """
    gap = extension_gap(device)
    if not gap:
        return extension()
    if backend() == "kernel":
        raise ValueError(
            f"{name}: TCM_FAST_BACKEND=kernel needs a kernel on {device}, got none ({gap})"
        )
    return None


def describe() -> list[tuple[str, bool, str]]:
    """(name, active, why) of each backend, for `tcm-fast doctor`."""
    module, gap = _load()
    gpu = torch.cuda.is_available()
    gpu_gap = (
        "" if gpu else "torch was built without CUDA" if not torch.version.cuda else "none found"
    )
    forced_off = "TCM_FAST_BACKEND=reference" if backend() == "reference" else ""
    cpu_gap = forced_off or gap
    if module is None or not module.has_cuda():
        cuda_gap = gap or "built without it: install nvcc and tcm_fast again"
        cuda_what = ""
    else:
        cuda_what = "for sm_" + ", ".join(module.cuda_archs())
        cuda_gap = _cuda_gap(torch.cuda.current_device()) if gpu else "no GPU"
    cuda_gap = forced_off or cuda_gap
    triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    triton_gap = forced_off or (
        "not installed" if not triton else "" if gpu or interpreted else "no GPU"
    )
    return [
        ("GPU", gpu, torch.cuda.get_device_name() if gpu else gpu_gap),
        (
            "C++ extension, CPU half",
            not cpu_gap,
            f"{cpu_gap}; random numbers take about 20 times as long in PyTorch"
            if cpu_gap
            else "in use",
        ),
        (
            "C++ extension, CUDA half",
            not cuda_gap,
            "; ".join(filter(None, [cuda_gap, cuda_what and f"built {cuda_what}"])) or "in use",
        ),
        ("Triton", not triton_gap, triton_gap or ("interpreted" if interpreted else "in use")),
    ]
