"""Builds tcm_fast; pyproject.toml holds the metadata.

Mounts kernels/ and benchmarks/ inside the package and compiles csrc/ into tcm_fast._C with ninja. The
extension includes no torch header, so that one binary serves every torch version. Its CUDA half is
built where nvcc is found; csrc/toolchain.py has the choices and their environment variables.
TCM_FAST_DEBUG=1 makes a slow build that checks its indices and can be debugged.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from toolchain import accepts, choose_archs, choose_nvcc, find_compiler, say  # noqa: E402

SOURCES = ["csrc/module.cpp", "csrc/philox_cpu.cpp", "csrc/group_norm_silu_cpu.cpp"]
SOURCES += ["csrc/fused_step_cpu.cpp"]
CUDA_SOURCES = ["csrc/philox_cuda.cu", "csrc/fused_step_cuda.cu", "csrc/device_cuda.cu"]
HEADERS = ["csrc/operations.h", "csrc/bounds.h", "csrc/cpu.h", "csrc/philox.h", "csrc/fused_step.h"]

# Unfused products and sums: the same bits on every machine and on the device.
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FAST, DEBUG = ["-O3"], ["-O1", "-g", "-DTCM_FAST_DEBUG", "-D_GLIBCXX_ASSERTIONS"]
CUDA_DEBUG = ["-O1", "-g", "-lineinfo", "-DTCM_FAST_DEBUG"]


def is_debug() -> bool:
    value = os.environ.get("TCM_FAST_DEBUG") or "0"
    if value not in ("0", "1"):
        raise SystemExit(f"tcm_fast: TCM_FAST_DEBUG must be 0 or 1, got {value}")
    return value == "1"


def sources_hash() -> str:
    """As tcm_fast/kernels/_backend.py has it."""
    csrc = (ROOT / "csrc").iterdir()
    files = sorted(path for path in csrc if path.suffix in (".cpp", ".cu", ".h"))
    parts = [part for file in files for part in (file.name.encode(), file.read_bytes())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


class NinjaBuild(build_ext):
    """Compiles with ninja in build/, where an editable install finds what has not changed."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = choose_nvcc()
        insists = os.environ.get("TCM_FAST_CUDA") == "1"
        compiler = find_compiler()
        if compiler is None:
            if insists:
                raise SystemExit("tcm_fast: TCM_FAST_CUDA=1 needs a C++17 compiler: install g++")
            say("no C++17 compiler found: the PyTorch references are used instead of the extension")
            return
        library = self.compile(compiler, nvcc)
        if library is None and nvcc:
            if insists:
                raise SystemExit(f"tcm_fast: TCM_FAST_CUDA=1, and {nvcc} failed as printed above")
            say(f"{nvcc} failed as printed above: the extension is built without its CUDA half")
            library = self.compile(compiler, None)
        if library is None:
            say("the C++ compiler failed as printed above: the PyTorch references are used instead")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)

    def compile(self, compiler: str, nvcc: str | None) -> Path | None:
        import ninja
        import pybind11

        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        # A fixed name for build isolation's passing folder keeps the commands the same from one
        # install to the next, and what has not changed uncompiled.
        pybind = folder / f"pybind11-{pybind11.__version__}"
        pybind.unlink(missing_ok=True)
        pybind.symlink_to(pybind11.get_include(), target_is_directory=True)

        archs = choose_archs(nvcc, self.editable_mode or self.inplace) if nvcc else []
        if nvcc and not archs:
            say(f"{nvcc} knows none of the architectures that the extension is built for")
            return None
        debug = is_debug()
        openmp = ["-fopenmp"] if accepts(compiler, "-fopenmp") else []
        defines = [f"'-DTCM_FAST_WITH_CUDA=\"{';'.join(archs)}\"'"] if nvcc else []
        python = shlex.quote(sysconfig.get_path("include"))
        binding = [f"-isystem {pybind.name}", f"-isystem {python}", *defines]
        binding.append(f"'-DTCM_FAST_SOURCES=\"{sources_hash()}\"'")
        strip = "" if debug else "-s"
        shared = f"-shared {strip}"
        if sys.platform == "darwin":
            shared = "-bundle -undefined dynamic_lookup"
        library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        headers = [str(ROOT / header) for header in HEADERS]
        objects = []
        with open(folder / "build.ninja", "w") as file:
            w = ninja.Writer(file)
            w.variable(
                "cxx", [shlex.quote(compiler), *(DEBUG if debug else FAST), *CXX_FLAGS, *openmp]
            )
            w.rule(
                "cxx", "$cxx $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc"
            )
            w.rule("link", f"$cxx {shared} $in -o $out")
            if nvcc:
                codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
                codes.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
                host = ["-ccbin", shlex.quote(compiler), "-Xcompiler -fPIC,-fvisibility=hidden"]
                passed = ",".join(filter(None, [*openmp, strip]))
                link = [f"-Xcompiler {passed}"] if passed else []
                home = Path(nvcc).parent.parent
                if "nvidia" in home.parts:  # the wheels' layout, which their nvcc does not know
                    host.append(f"-I{shlex.quote(str(home / 'include'))}")
                    link.append(f"-L{shlex.quote(str(home / 'lib'))}")
                effort = CUDA_DEBUG if debug else FAST
                w.variable("nvcc", [shlex.quote(nvcc), *effort, "-std=c++17 -cudart static", *host])
                w.rule("cuda", ["$nvcc", *codes, *defines, "-c $in -o $out"])
                w.rule("cuda_link", ["$nvcc -shared", *link, "$in -o $out"])
            for source in SOURCES + (CUDA_SOURCES if nvcc else []):
                path = ROOT / source
                objects.append(f"{path.name}.o")
                if path.suffix == ".cu":
                    w.build(objects[-1], "cuda", str(path), headers)
                else:
                    flags = binding if path.name == "module.cpp" else []
                    w.build(objects[-1], "cxx", str(path), variables={"flags": flags})
            w.build(library.name, "cuda_link" if nvcc else "link", objects)
        ran = subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)])
        return library if ran.returncode == 0 else None


setup(
    packages=[*find_packages(include=["tcm_fast*"]), "tcm_fast.kernels", "tcm_fast.benchmarks"],
    package_dir={
        "tcm_fast": "tcm_fast",
        "tcm_fast.kernels": "kernels",
        "tcm_fast.benchmarks": "benchmarks",
    },
    package_data={"tcm_fast": ["_C.pyi", "py.typed", "assets/*", "presets/*.toml"]},
    ext_modules=[Extension("tcm_fast._C", SOURCES, depends=HEADERS + CUDA_SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
