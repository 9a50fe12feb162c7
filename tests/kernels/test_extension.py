"""tcm_fast._C itself: its stubs, what it links, its debug build."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tcm_fast.kernels import _backend

ROOT = Path(__file__).parents[2]
STUBS = ast.parse((ROOT / "tcm_fast/_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUBS.body if isinstance(node, ast.FunctionDef)}


@pytest.fixture
def extension():
    module = _backend.extension()
    if module is None:
        pytest.skip(f"needs tcm_fast._C: {_backend._load()[1]}")
    return module


# ---- stubs --------------------------------------------------------------------------------------


def arguments_of(node):
    assert not [*filter(None, [node.args.vararg]), *node.args.kwonlyargs, *node.args.defaults]
    return [argument.arg for argument in node.args.args]


def test_the_stubs_name_what_the_source_binds():
    source = (ROOT / "csrc/module.cpp").read_text()
    bound = {}
    for call in re.findall(r"m\.def\((.*?)\);\n", source, re.DOTALL):
        name = re.match(r'"(\w+)"', call)[1]
        bound[name] = re.findall(r'py::arg\("(\w+)"\)', call)
    assert bound == {name: arguments_of(node) for name, node in FUNCTIONS.items()}
    values = {node.target.id for node in STUBS.body if isinstance(node, ast.AnnAssign)}
    assert values == set(re.findall(r'm\.attr\("(\w+)"\)', source))


def test_the_bound_functions_take_what_the_stubs_say(extension):
    """By the signatures that pybind11 writes from the C++ types."""
    kinds = {"int": "SupportsInt", "bool": "bool", "float": "SupportsFloat"}
    kinds["Sequence[float]"] = "Sequence"
    of_cuda = {name for name in FUNCTIONS if name.endswith("_cuda") or "_version" in name}
    of_cuda = of_cuda - {"has_cuda"} | {"fused_step_scratch"}
    there = {n for n in dir(extension) if inspect.isroutine(getattr(extension, n))}
    assert there == set(FUNCTIONS) - (set() if extension.has_cuda() else of_cuda)
    for name in there:
        signature = getattr(extension, name).__doc__.splitlines()[0]
        taken, returned = re.fullmatch(rf"{name}\((.*)\) -> (.*)", signature).groups()
        types = dict(re.findall(r"(\w+): (.*?)(?=, \w+: |$)", taken))
        node = FUNCTIONS[name]
        assert list(types) == arguments_of(node)
        for argument in node.args.args:
            assert kinds[ast.unparse(argument.annotation)] in types[argument.arg], (
                name,
                argument.arg,
            )
        assert returned == ast.unparse(node.returns)


# ---- what it links ------------------------------------------------------------------------------


def test_it_links_neither_torch_nor_cuda(extension):
    """One binary serves every torch, and a machine without CUDA."""
    readelf = shutil.which("readelf")
    if readelf is None or sys.platform != "linux":
        pytest.skip("needs readelf: not found")
    dynamic = subprocess.run([readelf, "-d", extension.__file__], capture_output=True, text=True)
    needed = re.findall(r"NEEDED.*\[(.*?)\.so", dynamic.stdout)
    assert "libc" in needed
    assert set(needed) <= {"libc", "libm", "libstdc++", "libgcc_s", "libgomp", "libpthread", "libdl",
                           "librt", "ld-linux-x86-64", "ld-linux-aarch64"}  # fmt: skip


# ---- debug builds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "count", "size", "is_within"),
    [(0, 8, 8, True), (3, 5, 8, True), (8, 0, 8, True), (4, 5, 8, False), (-1, 1, 8, False),
     (9, 0, 8, False), (0, 2**62, 2**62, True), (2**62, 2**62, 2**62, False)],
)  # fmt: skip
def test_indices_are_checked_in_debug_builds(first, count, size, is_within, debug_program):
    ran = subprocess.run([debug_program, *map(str, (first, count, size))], capture_output=True)
    assert (ran.returncode == 0) == is_within
    said = f"probe.cpp:6: elements {first} + {count} of {size}\n"
    assert ran.stdout.decode().endswith("" if is_within else said)
    assert bool(ran.stdout) == (not is_within)


@pytest.fixture(scope="module")
def debug_program(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler: none found")
    folder = tmp_path_factory.mktemp("bounds")
    (folder / "probe.cpp").write_text(
        '#include <cstdlib>\n#define TCM_FAST_DEBUG\n#include "bounds.h"\n\n'
        "int main(int, char** given) {\n"
        "  TCM_FAST_BOUNDS(std::atoll(given[1]), std::atoll(given[2]), std::atoll(given[3]));\n}\n"
    )
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", folder / "probe.cpp"]
    subprocess.run([*command, "-o", folder / "probe"], check=True)
    return folder / "probe"


RUN = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("tcm_fast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.is_debug()
import tcm_fast.kernels
from tcm_fast.kernels import _backend
sys.modules["tcm_fast._C"] = tcm_fast._C = module
assert _backend.extension() is module, _backend._load()
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_a_debug_build_passes_the_tests_of_its_operations(extension, tmp_path):
    """In a folder of its own, so that the fast build stays."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    checkout = tmp_path / "checkout"
    for name in ("csrc", "kernels", "benchmarks", "tcm_fast"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TCM_FAST_DEBUG": "1"}
    environment |= {"TCM_FAST_CUDA": "0", "HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    library = tmp_path / "lib/tcm_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    tests = [
        f"tests/kernels/test_{name}.py" for name in ("philox", "dropout", "fused_step", "eight_bit")
    ]
    ran = subprocess.run(
        [sys.executable, "-c", RUN, library, *tests, "-m", "not slow and not gpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
