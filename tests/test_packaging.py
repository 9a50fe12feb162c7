"""The build's choices, and what its archives hold and do away from the checkout."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from tcm_fast.kernels import _backend

ROOT = Path(__file__).parents[1]


# What steers the build or the imports.
STEERING = (
    *("TCM_FAST_CUDA", "TCM_FAST_CUDA_ARCHS", "TCM_FAST_DEBUG", "TCM_FAST_BACKEND"),
    *("PYTHONPATH", "CUDA_HOME", "CUDA_PATH", "CXX"),
)


def environment(**changes):
    """This process's environment without that, changed."""
    kept = {name: value for name, value in os.environ.items() if name not in STEERING}
    return {**kept, **changes}


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# ---- choices ------------------------------------------------------------------------------------


@pytest.fixture
def toolchain(monkeypatch, tmp_path):
    """csrc/toolchain.py on a machine without compilers and without a driver."""
    for name in STEERING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "csrc")
    module = importlib.import_module("toolchain")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(module, "TOOLKIT", tmp_path / "usual/cuda/bin")
    monkeypatch.setattr(module, "find_driver", lambda: None)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "site-packages"))
    yield module
    sys.modules.pop("toolchain", None)


@pytest.fixture
def has_driver(toolchain, monkeypatch):
    """Gives the machine a driver that runs this CUDA, and GPUs of these architectures."""

    def give(major, minor, *archs):
        monkeypatch.setattr(
            toolchain, "find_driver", lambda: toolchain.Driver((major, minor), archs)
        )

    return give


def test_no_compiler_is_no_error(toolchain):
    assert toolchain.find_compiler() is None
    assert toolchain.choose_nvcc() is None


def test_no_compiler_is_taken_on_windows(toolchain, monkeypatch, tmp_path):
    compiler = script(tmp_path / "bin/g++", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert toolchain.find_compiler() == compiler
    monkeypatch.setattr(sys, "platform", "win32")
    assert toolchain.find_compiler() is None


def test_nvcc_is_required_where_it_is_asked_for(toolchain, monkeypatch):
    monkeypatch.setenv("TCM_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"TCM_FAST_CUDA=1 needs nvcc .* install the CUDA toolkit"):
        toolchain.choose_nvcc()
    monkeypatch.setenv("TCM_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="TCM_FAST_CUDA must be 0 or 1, got yes"):
        toolchain.choose_nvcc()


def test_where_nvcc_is_looked_for(toolchain, monkeypatch, tmp_path):
    wheel = script(tmp_path / "site-packages/nvidia/cu13/bin/nvcc", "true")
    assert toolchain.choose_nvcc() == wheel
    usual = script(tmp_path / "usual/cuda/bin/nvcc", "true")
    assert toolchain.choose_nvcc() == usual
    on_path = script(tmp_path / "bin/nvcc", "true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert toolchain.choose_nvcc() == on_path
    in_home = script(tmp_path / "cuda/bin/nvcc", "true")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert toolchain.choose_nvcc() == in_home
    monkeypatch.setenv("TCM_FAST_CUDA", "0")
    assert toolchain.choose_nvcc() is None


def test_architectures(toolchain, monkeypatch, tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo 'sm_80\nsm_86\nsm_90\nsm_90a'")
    assert toolchain.choose_archs(nvcc) == ["80", "86", "90"]
    for given in ("86;90a", "86, 90a"):
        monkeypatch.setenv("TCM_FAST_CUDA_ARCHS", given)
        assert toolchain.choose_archs(nvcc) == ["86", "90a"]
    monkeypatch.setenv("TCM_FAST_CUDA_ARCHS", "90;130")
    with pytest.raises(SystemExit, match=r"TCM_FAST_CUDA_ARCHS must name .*, got 130"):
        toolchain.choose_archs(nvcc)


def test_an_editable_install_is_for_the_gpus_that_are_there(
    toolchain, has_driver, monkeypatch, tmp_path, capsys
):
    nvcc = script(tmp_path / "nvcc", "echo 'sm_75\nsm_80\nsm_86\nsm_90'")
    everything = ["80", "86", "90"]
    assert toolchain.choose_archs(nvcc, for_this_machine=True) == everything  # no driver
    has_driver(13, 0)
    assert toolchain.choose_archs(nvcc, for_this_machine=True) == everything  # no GPU
    has_driver(13, 0, "75", "90")
    assert toolchain.choose_archs(nvcc, for_this_machine=True) == ["75", "90"]
    assert "built for the GPU of this machine (sm_75, sm_90)" in capsys.readouterr().err
    assert toolchain.choose_archs(nvcc) == everything  # a wheel goes elsewhere
    has_driver(13, 0, "130")  # nvcc is older than the GPU: PTX has to serve it
    assert toolchain.choose_archs(nvcc, for_this_machine=True) == everything
    monkeypatch.setenv("TCM_FAST_CUDA_ARCHS", "86")
    has_driver(13, 0, "90")
    assert toolchain.choose_archs(nvcc, for_this_machine=True) == ["86"]


def test_nvcc_newer_than_the_driver_is_said(toolchain, has_driver, tmp_path, monkeypatch, capsys):
    nvcc = script(tmp_path / "bin/nvcc", "echo 'Cuda compilation tools, release 13.1, V13.1.80'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    has_driver(13, 0, "90")
    assert toolchain.choose_nvcc() == nvcc
    assert capsys.readouterr().err == ""
    has_driver(12, 4, "90")
    assert toolchain.choose_nvcc() == nvcc
    said = capsys.readouterr().err
    assert "is of CUDA 13.1, the driver runs 12.4" in said
    assert "set CUDA_HOME to a toolkit 12" in said


@pytest.fixture
def setup(monkeypatch):
    """setup.py's names."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("TCM_FAST_DEBUG", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_debug_builds_are_asked_for_by_1(setup, monkeypatch):
    assert not setup["is_debug"]()
    for value in ("0", "1", ""):
        monkeypatch.setenv("TCM_FAST_DEBUG", value)
        assert setup["is_debug"]() == (value == "1")
    monkeypatch.setenv("TCM_FAST_DEBUG", "on")
    with pytest.raises(SystemExit, match="TCM_FAST_DEBUG must be 0 or 1, got on"):
        setup["is_debug"]()


def test_the_hash_of_the_sources_is_the_one_the_library_looks_for(setup):
    assert setup["sources_hash"]() == _backend.sources_hash(ROOT / "csrc")
    listed = setup["SOURCES"] + setup["CUDA_SOURCES"] + setup["HEADERS"]
    assert sorted(listed) == sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*.[ch]*"))


# ---- nvcc where only a driver is ----------------------------------------------------------------


def test_a_driver_without_nvcc_brings_nvccs_wheels(toolchain, has_driver, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert toolchain.nvcc_wheels() == []  # no driver
    has_driver(13, 1, "90")
    wheels = toolchain.nvcc_wheels()
    assert [wheel.partition(">")[0] for wheel in wheels] == list(toolchain.NVCC_WHEELS)
    # One range for all of them: a newer cicc writes what an older ptxas cannot read.
    assert {wheel.partition(">")[2] for wheel in wheels} == {"=13,<13.2"}
    monkeypatch.setenv("TCM_FAST_CUDA", "0")
    assert toolchain.nvcc_wheels() == []
    monkeypatch.delenv("TCM_FAST_CUDA")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert toolchain.nvcc_wheels() == []
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert toolchain.nvcc_wheels() == wheels
    script(tmp_path / "site-packages/nvidia/cu13/bin/nvcc", "true")
    assert toolchain.nvcc_wheels() == []


def test_cuda_12_has_no_wheel_of_nvcc(toolchain, has_driver, capsys):
    has_driver(12, 8, "86")
    assert toolchain.nvcc_wheels() == []
    assert toolchain.choose_nvcc() is None
    assert "install the CUDA toolkit 12, or a newer driver" in capsys.readouterr().err


def test_the_build_asks_for_them(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(ROOT / "csrc")
    backend = importlib.import_module("backend")
    monkeypatch.setattr(backend.toolchain, "nvcc_wheels", lambda: ["nvidia-cuda-nvcc>=13,<13.1"])
    for kind in ("wheel", "editable"):
        name = f"get_requires_for_build_{kind}"
        monkeypatch.setattr(backend.build_meta, name, lambda settings: ["ninja"])
        assert getattr(backend, name)() == ["ninja", "nvidia-cuda-nvcc>=13,<13.1"]
    # The rest is setuptools' own; an sdist compiles nothing.
    for name in ("backend", "toolchain"):
        sys.modules.pop(name, None)
    for name in ("get_requires_for_build_sdist", "build_sdist", "build_wheel", "build_editable"):
        assert getattr(backend, name) is getattr(backend.build_meta, name)


FAKE_LIBCUDA = """
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuInit(unsigned flags) { return NO_GPU ? 100 : 0; }
int cuDeviceGetCount(int* count) { *count = 3; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? (device == 1 ? 12 : 8) : (device == 1 ? 0 : 6);
  return 0;
}
"""


@pytest.mark.parametrize(("no_gpu", "archs"), [(0, ("86", "120")), (1, ())])
def test_what_a_driver_is_asked(no_gpu, archs, tmp_path):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux: none found")
    (tmp_path / "cuda.c").write_text(FAKE_LIBCUDA)
    command = [compiler, "-shared", "-fPIC", f"-DNO_GPU={no_gpu}", tmp_path / "cuda.c"]
    subprocess.run([*command, "-o", tmp_path / "libcuda.so.1"], check=True)
    code, output = run(
        ["-c", "import toolchain; print(toolchain.find_driver())"],
        tmp_path,
        PYTHONPATH=str(ROOT / "csrc"),
        LD_LIBRARY_PATH=str(tmp_path),
    )
    assert code == 0, output
    assert output.strip() == f"Driver(cuda=(13, 1), archs={archs})"


def test_a_library_that_is_no_driver_is_none(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "csrc")
    toolchain = importlib.import_module("toolchain")

    class Stub:  # the toolkit's, to link with
        def cuDriverGetVersion(self, version):
            return 34

    for library in (Stub, object):
        monkeypatch.setattr(toolchain.ctypes, "CDLL", lambda name, library=library: library())
        assert toolchain.find_driver.__wrapped__() is None
    sys.modules.pop("toolchain", None)


# ---- a release's wheels -------------------------------------------------------------------------


def test_a_release_has_wheels_for_every_python_and_every_card(toolchain):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheels = project["tool"]["cibuildwheel"]
    assert wheels["build"].split() == [f"cp3{minor}-*" for minor in range(11, 15)]
    assert project["project"]["requires-python"] == ">=3.11"
    assert wheels["environment"]["TCM_FAST_CUDA"] == "1"  # or the build fails
    assert wheels["environment"]["CUDA_HOME"].endswith("cuda-12.8")
    assert wheels["environment"]["CXX"].endswith("gcc-toolset-14/root/usr/bin/g++")  # nvcc's newest
    assert "cuda-nvcc-12-8 cuda-cudart-devel-12-8" in wheels["before-all"][-1]
    for machine in ("x86_64", "aarch64"):
        assert wheels[f"manylinux-{machine}-image"] == "manylinux_2_28"
    assert " ".join(toolchain.CUDA_ARCHS) in wheels["test-command"]


def test_the_workflow_builds_them_on_a_tag():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads it; not installed")
    text = (ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow[True]["push"] == {"tags": ["v*"]}  # YAML's `on`
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) for name in used)
    assert len(used) == len(re.findall(r"uses: \S+ # v\d+\.\d+\.\d+\n", text))
    assert any(name.startswith("pypa/cibuildwheel@") for name in used)


# ---- archives -----------------------------------------------------------------------------------


def run(command, cwd, **changes):
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ran.returncode, ran.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """An sdist of the checkout, and the wheel made from that sdist, under build isolation."""
    folder = tmp_path_factory.mktemp("archives")
    code, output = run(["-m", "build", "--outdir", folder, ROOT], folder)
    assert code == 0, output
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


# An editable install of the checkout must not lend the installed copy what that lacks.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
"""


def install(wheel, folder):
    code, output = run(
        ["-m", "pip", "install", "--no-deps", "--target", folder, wheel], folder.parent
    )
    assert code == 0, output
    return folder


@pytest.mark.slow
def test_the_sdist_holds_everything(archives):
    with tarfile.open(archives[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in ("csrc", "kernels", "benchmarks", "tests", "tcm_fast"):
        wanted = [path for path in tracked.splitlines() if path.startswith(f"{name}/")]
        assert held.issuperset(wanted)
        assert any(path.startswith(f"{name}/") for path in held)
    assert held >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert not [path for path in held if path.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert sorted(name.split("-")[0] for name in top) == ["tcm_fast", "tcm_fast"]
    assert {"tcm_fast/_C.pyi", "tcm_fast/py.typed", "tcm_fast/kernels/philox.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "csrc" in name or "conftest" in name]


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(archives, tmp_path):
    site = install(archives[1], tmp_path / "site")
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    code = f"""
import importlib, pkgutil, torch, tcm_fast
assert tcm_fast.__file__.startswith({str(site)!r}), tcm_fast.__file__
import tcm_fast.benchmarks.official_style, tcm_fast.kernels
for module in pkgutil.walk_packages(tcm_fast.__path__, "tcm_fast."):
    if not module.name.endswith("__main__") and ".benchmarks.test_" not in module.name:
        try:
            found = importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert "pip install 'tcm-fast[" in str(error), error
            continue
        assert found.__file__.startswith({str(site)!r}), found.__file__
from tcm_fast.config import load_preset, preset_names
assert "digits" in preset_names()
load_preset("digits")
from tcm_fast.data.dataset import load_images
assert len(load_images("digits").images) == 1797
from tcm_fast.kernels import _backend, philox_bits
assert (_backend.extension() is not None) == {compiler}
bits = philox_bits(0, 0, 0, torch.zeros(1, dtype=torch.int64), 1)
assert bits[0, 0, 0] == 0x5f6fb709, bits
"""
    status, output = run(["-c", ALONE + code], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output
    status, output = run(["-m", "tcm_fast", "--help"], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds(archives, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, archives[0]]
    status, output = run(command, tmp_path, PATH=str(empty))
    assert status == 0, output
    assert "no C++17 compiler found: the PyTorch references are used" in output
    site = install(next(tmp_path.glob("*.whl")), tmp_path / "site")
    code = """
import torch
from tcm_fast.kernels import _backend, philox_bits
assert _backend.extension() is None
print(_backend.describe())
assert philox_bits(0, 0, 0, torch.zeros(1, dtype=torch.int64), 1)[0, 0, 0] == 0x5f6fb709
"""
    status, output = run(["-c", ALONE + code], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output
    assert "install a C++17 compiler" in output


@pytest.mark.slow
def test_a_failing_nvcc_costs_the_cuda_half_alone(archives, tmp_path):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler: none found")
    script(tmp_path / "cuda/bin/nvcc", '[ "$1" = --list-gpu-code ] && echo sm_90 || exit 1')
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, archives[0]]
    status, output = run(command, tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    assert status == 0, output
    assert "the extension is built without its CUDA half" in output
    site = install(next(tmp_path.glob("*.whl")), tmp_path / "site")
    code = "import tcm_fast._C as ext; assert not ext.has_cuda() and ext.cuda_archs() == []"
    status, output = run(["-c", ALONE + code], tmp_path, PYTHONPATH=str(site))
    assert status == 0, output
    status, output = run(command, tmp_path, CUDA_HOME=str(tmp_path / "cuda"), TCM_FAST_CUDA="1")
    assert status != 0
    assert "TCM_FAST_CUDA=1, and" in output


def empty_environment(folder, wheel):
    """A virtual environment with the wheel, and of this environment's packages links to those that run it:
    nothing to build with."""
    links = folder / "packages"
    links.mkdir()
    left_out = ("tcm_fast", "ninja", "pybind11", "__")
    for site in map(Path, sys.path):
        for package in site.iterdir() if site.name.endswith("-packages") and site.is_dir() else ():
            if not package.name.startswith(left_out) and package.suffix != ".pth":
                with suppress(FileExistsError):
                    (links / package.name).symlink_to(package)
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{links}\n")
    python = folder / "venv/bin/python"
    command = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    code, output = run(command, folder)
    assert code == 0, output
    return python.parent


@pytest.mark.slow
def test_the_wheel_trains_without_a_compiler(archives, tmp_path):
    if sys.platform != "linux":
        pytest.skip("the environment is laid out as on Linux")
    folder = empty_environment(tmp_path, archives[1])

    def tcm_fast(*arguments):
        ran = subprocess.run(
            [folder / "tcm-fast", *arguments],
            cwd=tmp_path,
            env=environment(PATH=str(folder), COLUMNS="200"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    assert not any(shutil.which(name, path=str(folder)) for name in ("c++", "cc", "nvcc", "ninja"))
    tcm_fast("train", "--preset", "digits", "--phase", "ect", "--max-steps", "2", "--out", "run")
    tcm_fast("sample", "run", "--num", "4", "--out", "samples.png")
    assert (tmp_path / "samples.png").is_file()
    table = {
        line.split("│")[1].strip(): line for line in tcm_fast("doctor").splitlines() if "│" in line
    }
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    assert ("in use" in table["C++ extension, CPU half"]) == compiler
