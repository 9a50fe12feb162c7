"""Builds tcm_fast; pyproject.toml holds the metadata.

Mounts kernels/ and benchmarks/ inside the package and compiles csrc/ into tcm_fast._C with ninja. The
extension includes no torch header, so that one binary serves every torch version. Its CUDA half is
built where nvcc is found. Environment: TCM_FAST_CUDA=1 insists on it, 0 leaves it out;
TCM_FAST_CUDA_ARCHS="90" or "86;89" names the architectures; CUDA_HOME and CXX choose the compilers.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/module.cpp", "csrc/philox_cpu.cpp", "csrc/fused_step_cpu.cpp"]
CUDA_SOURCES = ["csrc/philox_cuda.cu", "csrc/fused_step_cuda.cu"]
HEADERS = ["csrc/operations.h", "csrc/philox.h", "csrc/fused_step.h"]
CUDA_ARCHS = ["80", "86", "89", "90", "100", "120"]

# Unfused products and sums: the same bits on every machine and on the device.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def say(sentence: str) -> None:
    print(f"tcm_fast: {sentence}", file=sys.stderr, flush=True)


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
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = (shutil.which(name) for name in names if name)
    return next((path for path in found if path and accepts(path, "-std=c++17")), None)


def find_nvcc() -> str | None:
    """CUDA_HOME, PATH, then the nvidia-cuda-nvcc wheel of the environment that is installed into."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home, "bin") for home in homes if home]
    sites = dict.fromkeys([sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path])
    wheels = [path for site in sites for path in sorted(Path(site or ".").glob("nvidia/*/bin"))]
    path = os.environ.get("PATH", os.defpath)
    return shutil.which("nvcc", path=os.pathsep.join([*map(str, places), path, *map(str, wheels)]))


def choose_nvcc() -> str | None:
    wanted = os.environ.get("TCM_FAST_CUDA") or None
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"tcm_fast: TCM_FAST_CUDA must be 0 or 1, got {wanted}")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        raise SystemExit(
            "tcm_fast: TCM_FAST_CUDA=1 needs nvcc on PATH or under CUDA_HOME: install the CUDA toolkit, "
            "or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime` into this environment"
        )
    return nvcc


def choose_archs(nvcc: str) -> list[str]:
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = re.findall(r"sm_(\w+)", listing)
    asked = re.findall(r"[^\s;,]+", os.environ.get("TCM_FAST_CUDA_ARCHS", ""))
    for arch in asked:
        if arch not in known and arch.rstrip("af") not in known:
            raise SystemExit(
                f"tcm_fast: TCM_FAST_CUDA_ARCHS must name architectures of {nvcc}, got {arch}"
            )
    return asked or [arch for arch in CUDA_ARCHS if arch in known]


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

        root = Path(__file__).resolve().parent
        folder = root / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        # A fixed name for build isolation's passing folder keeps the commands the same from one
        # install to the next, and what has not changed uncompiled.
        pybind = folder / f"pybind11-{pybind11.__version__}"
        pybind.unlink(missing_ok=True)
        pybind.symlink_to(pybind11.get_include(), target_is_directory=True)

        archs = choose_archs(nvcc) if nvcc else []
        openmp = ["-fopenmp"] if accepts(compiler, "-fopenmp") else []
        defines = [f"'-DTCM_FAST_WITH_CUDA=\"{';'.join(archs)}\"'"] if nvcc else []
        python = shlex.quote(sysconfig.get_path("include"))
        binding = [f"-isystem {pybind.name}", f"-isystem {python}", *defines]
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -s"
        library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        headers = [str(root / header) for header in HEADERS]
        objects = []
        with open(folder / "build.ninja", "w") as file:
            w = ninja.Writer(file)
            w.variable("cxx", [shlex.quote(compiler), *CXX_FLAGS, *openmp])
            w.rule(
                "cxx", "$cxx $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc"
            )
            w.rule("link", f"$cxx {shared} $in -o $out")
            if nvcc:
                codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
                codes.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
                host = ["-ccbin", shlex.quote(compiler), "-Xcompiler -fPIC,-fvisibility=hidden"]
                link = [f"-Xcompiler {','.join([*openmp, '-s'])}"]
                home = Path(nvcc).parent.parent
                if "nvidia" in home.parts:  # the wheels' layout, which their nvcc does not know
                    host.append(f"-I{shlex.quote(str(home / 'include'))}")
                    link.append(f"-L{shlex.quote(str(home / 'lib'))}")
                w.variable("nvcc", [shlex.quote(nvcc), "-O3 -std=c++17 -cudart static", *host])
                w.rule("cuda", ["$nvcc", *codes, *defines, "-c $in -o $out"])
                w.rule("cuda_link", ["$nvcc -shared", *link, "$in -o $out"])
            for source in SOURCES + (CUDA_SOURCES if nvcc else []):
                path = root / source
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
    packages=["tcm_fast", "tcm_fast.networks", "tcm_fast.kernels", "tcm_fast.benchmarks"],
    package_dir={
        "tcm_fast": "tcm_fast",
        "tcm_fast.kernels": "kernels",
        "tcm_fast.benchmarks": "benchmarks",
    },
    package_data={"tcm_fast": ["_C.pyi", "py.typed", "assets/*", "presets/*.toml"]},
    ext_modules=[Extension("tcm_fast._C", SOURCES, depends=HEADERS + CUDA_SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
