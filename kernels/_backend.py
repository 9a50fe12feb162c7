"""What runs an operation: the C++ extension, Triton, or its plain PyTorch reference."""

import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
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


# Where kernels/ is mounted from a checkout, csrc/ lies beside it.
_SOURCES = Path(__file__).parents[1] / "csrc"


def sources_hash(folder: Path) -> str:
    """SHA-256 over csrc/, as setup.py compiles it into the extension."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".cu", ".h"))
    parts = [part for file in files for part in (file.name.encode(), file.read_bytes())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("tcm_fast._C")
    except ModuleNotFoundError:
        if sys.platform == "win32":
            return None, "tcm_fast._C is not built on Windows"
        return None, "tcm_fast._C was not built: install a C++17 compiler and tcm_fast again"
    except ImportError as error:
        return None, f"tcm_fast._C does not load: {' '.join(str(error).split())}"
    # Memory is passed by address: a binary that reads it otherwise than this Python would corrupt it.
    if _SOURCES.is_dir() and getattr(module, "SOURCES", "") != sources_hash(_SOURCES):
        return None, "tcm_fast._C is not of the present csrc/: run `pip install -e .` again"
    return module, ""


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
    if torch.version.hip:
        return "ROCm: it serves NVIDIA's GPUs"
    # Within a major version every driver runs what every toolkit builds.
    built, runs = module.cuda_runtime_version(), module.cuda_driver_version()
    if built // 1000 > runs // 1000:
        return (
            f"the driver runs CUDA {_dotted(runs)}, and tcm_fast._C was built with {_dotted(built)}: "
            f"update the driver, or install tcm_fast again with nvcc {runs // 1000}"
        )
    archs = [int(arch.rstrip("af")) for arch in module.cuda_archs()]
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    # A binary serves its own major version from its minor on; the last one also comes as PTX.
    if any(arch // 10 == major and arch <= capability for arch in archs) or capability > archs[-1]:
        return ""
    return (
        f"tcm_fast._C has no code for compute capability {major}.{minor}: set TCM_FAST_CUDA_ARCHS"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


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


def fast_layout(device: torch.device) -> torch.memory_format:
    """The layout in which convolutions are fastest and the normalisations between them have a kernel:
    contiguous on a CPU without the extension, whose channels_last `group_norm` loses digits."""
    is_served = device.type == "cuda" or (device.type == "cpu" and not extension_gap(device))
    return torch.channels_last if is_served else torch.contiguous_format


def _triton_gap(gpu: bool) -> str:
    """Why Triton does not run; empty where it does."""
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not gpu:
        return "no GPU"
    # Its launchers are C, compiled when a run begins; on Windows it brings a compiler.
    if sys.platform != "win32":
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "needs a C compiler: install gcc"
        if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
            return "needs Python's headers: install python3-dev"
    return ""


# What is lost where a backend does not run: times of the CPU, the optimizer's from
# benchmarks/results/optimizer_cpu.json; bytes counted, 120 for each parameter instead of 42.
_CPU_COST = (
    "random numbers take about 20 times as long in PyTorch, an optimizer step 4 times (RAdam) or 1.5 "
    "times (Adam); no moments in 16 bits, no offload"
)
_CUDA_COST = (
    "an optimizer step is torch's, in many launches that move about three times the bytes (RAdam); "
    "random numbers and masks are PyTorch's"
)
_TRITON_COST = "normalisation, attention, noise and loss run on PyTorch's operators, many to one"


def describe() -> list[tuple[str, bool, str]]:
    """(name, active, why) of each backend, for `tcm-fast doctor`: what serves, or why not and what that
    costs."""
    module, gap = _load()
    gpu = torch.cuda.is_available()
    other = None if gpu else torch.accelerator.current_accelerator(check_available=True)
    if other is not None:
        gpu_gap = f"{other.type} is there, for which tcm_fast has no kernels: it runs on the CPU"
    else:
        gpu_gap = "none found" if torch.version.cuda else "torch was built without CUDA"
    forced_off = "TCM_FAST_BACKEND=reference" if backend() == "reference" else ""
    has_cuda = module is not None and module.has_cuda()
    if not has_cuda:
        cuda_gap = gap or "built without it: install nvcc and tcm_fast again"
    else:
        cuda_gap = _cuda_gap(torch.cuda.current_device()) if gpu else "no GPU"
    built = "; debug build, slow" if module is not None and module.is_debug() else ""
    archs = f"; built for sm_{', '.join(module.cuda_archs())}" if module and has_cuda else ""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"

    def row(name: str, gap: str, cost: str, how: str) -> tuple[str, bool, str]:
        gap = forced_off or gap
        # Without a GPU nothing is lost by what serves GPUs alone.
        lost = f": {cost}" if gap and (gpu or cost is _CPU_COST) else ""
        return name, not gap, f"{gap}{lost}{how}" if gap else f"in use{how}"

    return [
        ("GPU", gpu, torch.cuda.get_device_name() if gpu else gpu_gap),
        row("C++ extension, CPU half", gap, _CPU_COST, built),
        row("C++ extension, CUDA half", cuda_gap, _CUDA_COST, archs),
        row("Triton", _triton_gap(gpu), _TRITON_COST, " (interpreted)" if interpreted else ""),
    ]
