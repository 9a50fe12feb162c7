"""Compilers and GPUs of the machine that builds: what setup.py and the build backend choose by.

Environment: TCM_FAST_CUDA=1 insists on the CUDA half of the extension, 0 leaves it out;
TCM_FAST_CUDA_ARCHS="90" or "86;89" names its architectures; CUDA_HOME and CXX choose the compilers.
"""

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
TOOLKIT = Path(
    "/usr/local/cuda/bin"
)  # where NVIDIA's packages put it, often without a place on PATH
# Of these wheels nvcc needs all, of one version: its parts read each other's intermediate files.
NVCC_WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")
FIRST_WHEELS = 13  # CUDA 12's wheels of this name hold ptxas alone


def say(sentence: str) -> None:
    print(f"tcm_fast: {sentence}", file=sys.stderr, flush=True)


# ---- the C++ compiler ----------------------------------------------------------------------------


def accepts(compiler: str, flag: str) -> bool:
    """Does the compiler build a shared library with this flag?"""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int probe() { return 0; }\n")
        command = [compiler, flag, "-fPIC", "-shared", str(source), "-o", f"{source}.so"]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def find_compiler() -> str | None:
    if sys.platform == "win32":
        return None  # ninja's rules and the folder's link are Unix's, also where MinGW has a g++
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = (shutil.which(name) for name in names if name)
    return next((path for path in found if path and accepts(path, "-std=c++17")), None)


# ---- the GPU's driver ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Driver:
    cuda: tuple[int, int]
    """Newest CUDA that it runs."""
    archs: tuple[str, ...]
    """Of the GPUs present, such as ("90",)."""


@functools.cache
def find_driver() -> Driver | None:
    """NVIDIA's driver, asked through its library: no nvidia-smi, no CUDA is needed."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(version)) or not version.value:
            return None
        return Driver((version.value // 1000, version.value % 1000 // 10), _archs_of(cuda))
    except (OSError, AttributeError):  # no driver; a library of that name without its functions
        return None


def _archs_of(cuda: ctypes.CDLL) -> tuple[str, ...]:
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()  # a driver without a GPU, or none that this process may see
    found = set()
    for device in range(count.value):
        capability = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(capability, (75, 76), strict=True):  # major, minor
            if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return ()
        found.add(10 * capability[0].value + capability[1].value)
    return tuple(map(str, sorted(found)))


# ---- nvcc ----------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """CUDA_HOME, PATH, the toolkit's usual place, then the wheels of the environment that is installed
    into or of the one that builds."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home, "bin")) for home in homes if home]
    places += [os.environ.get("PATH", os.defpath), str(TOOLKIT)]
    sites = dict.fromkeys([sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path])
    for site in sites:
        places += map(str, sorted(Path(site or ".").glob("nvidia/*/bin")))
    return shutil.which("nvcc", path=os.pathsep.join(places))


def cuda_wish() -> str | None:
    """TCM_FAST_CUDA: "1", "0" or None."""
    wish = os.environ.get("TCM_FAST_CUDA") or None
    if wish not in (None, "0", "1"):
        raise SystemExit(f"tcm_fast: TCM_FAST_CUDA must be 0 or 1, got {wish}")
    return wish


def choose_nvcc() -> str | None:
    wish = cuda_wish()
    nvcc = None if wish == "0" else find_nvcc()
    if wish == "1" and nvcc is None:
        raise SystemExit(
            "tcm_fast: TCM_FAST_CUDA=1 needs nvcc on PATH or under CUDA_HOME: install the CUDA toolkit, "
            "or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime` into this environment"
        )
    driver = find_driver()
    if wish is None and nvcc is None and driver and driver.cuda[0] < FIRST_WHEELS:
        say(
            f"no nvcc found, and none comes as wheels for this driver's CUDA {_dotted(driver.cuda)}: "
            f"install the CUDA toolkit {driver.cuda[0]}, or a newer driver; without it the extension "
            "has no CUDA half"
        )
    if nvcc and driver and (release := nvcc_release(nvcc)) and release[0] > driver.cuda[0]:
        say(
            f"{nvcc} is of CUDA {_dotted(release)}, the driver runs {_dotted(driver.cuda)}: the "
            f"extension's CUDA half stays idle until the driver is newer, or set CUDA_HOME to a "
            f"toolkit {driver.cuda[0]}"
        )
    return nvcc


def nvcc_release(nvcc: str) -> tuple[int, int] | None:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None


def nvcc_wheels() -> list[str]:
    """Build requirements that bring nvcc where there is a driver and no nvcc: not newer than the driver,
    which would refuse what they build."""
    driver = find_driver()
    has_wheels = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    if cuda_wish() == "0" or driver is None or not has_wheels or find_nvcc():
        return []
    major, minor = driver.cuda
    if major < FIRST_WHEELS:
        return []
    return [f"{name}>={major},<{major}.{minor + 1}" for name in NVCC_WHEELS]


def choose_archs(nvcc: str, for_this_machine: bool = False) -> list[str]:
    """What is asked for; for this machine alone its GPUs', where nvcc knows them; else all of ours that it
    knows."""
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = re.findall(r"sm_(\w+)", listing)
    asked = re.findall(r"[^\s;,]+", os.environ.get("TCM_FAST_CUDA_ARCHS", ""))
    for arch in asked:
        if arch not in known and arch.rstrip("af") not in known:
            raise SystemExit(
                f"tcm_fast: TCM_FAST_CUDA_ARCHS must name architectures of {nvcc}, got {arch}"
            )
    driver = find_driver() if for_this_machine and not asked else None
    present = list(driver.archs) if driver else []
    if present and set(present) <= set(known):
        say(f"the extension is built for the GPU of this machine (sm_{', sm_'.join(present)})")
        return present
    return asked or [arch for arch in CUDA_ARCHS if arch in known]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
