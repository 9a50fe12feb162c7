"""Imports point one way, are absolute, and the command line starts without torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import those of the lines before its own, and of its own package.
ORDER = """
_C
kernels
arithmetic config distributed runlog stopping run_lock image_labels graphs
image_arrays
image_files
packed
data
times augment
networks
objectives
diagnosis optim watch
offload tensor_files
optimizer_state run_folder
checkpoint
saving snapshots parallel
pictures
sampler
precision_check
features
metrics
denoising time_search
plan footprint
cards recipes
budget
phase memory summary
keeping assembly gallery
trainer
timebox
foreign_blocks
norm_act
inert_pickle
torch_files
convert accelerate
export diffusers_folder
plan_command eval_command
cli
__init__ __main__
"""
RANK = {name: i for i, line in enumerate(ORDER.split("\n")) for name in line.split()}
# Inside kernels/.
KERNELS_ORDER = """
_backend
_triton
philox
dropout precondition _philox_triton
group_norm_silu qkv_attention consistency_loss noise_pair denoise_to_uint8
normalized_copy eight_bit
fused_step
_pointwise
pixel_norm_mp_silu mp_cat_mp_silu modulate_mp_silu mp_sum resample residual
__init__
"""
KERNELS_RANK = {
    name: i for i, line in enumerate(KERNELS_ORDER.split("\n")) for name in line.split()
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names.add(node.module)
            if node.module == "tcm_fast" or node.module.startswith("tcm_fast."):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("tcm_fast.x")
            name, first = getattr(node.func, "attr", ""), node.args[0]
            if name == "import_module" and isinstance(first, ast.Constant):
                names.add(first.value)
    return names


def parts_of_library(names: set[str]) -> set[str]:
    """The parts of tcm_fast among dotted names: "tcm_fast.networks.layers" -> "networks"."""
    parts = {name.split(".")[1] for name in names if re.match(r"tcm_fast\.", name)}
    return parts & {*RANK, "benchmarks"}


def part(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("").parts
    return inside[0] if inside[0] in ("kernels", "benchmarks") else inside[1]


LIBRARY = sources("tcm_fast") + sources("kernels")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = part(path)
    if own == "assets":
        return
    assert own in RANK, f"{path.relative_to(ROOT)}: give {own} its place in ORDER"
    for name in parts_of_library(imported(path)):
        if name == "benchmarks":
            assert own == "cli", f"{path.relative_to(ROOT)}: only cli imports benchmarks"
        elif name != own:
            same_line = RANK[name] == RANK[own] and own not in ("convert", "accelerate")
            assert RANK[name] < RANK[own] or same_line, (
                f"{path.relative_to(ROOT)}: {own} comes before {name} and must not import it"
            )


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda p: p.stem)
def test_operations_build_on_one_another_one_way(path):
    assert path.stem in KERNELS_RANK, f"give {path.stem} its place in KERNELS_ORDER"
    for name in imported(path):
        if name.startswith("tcm_fast.kernels."):
            other = name.split(".")[2]
            if other in KERNELS_RANK:
                assert KERNELS_RANK[other] < KERNELS_RANK[path.stem]


def test_nothing_imports_the_tests():
    for path in [*LIBRARY, *sources("benchmarks"), *sources("tests")]:
        assert not any(name.split(".")[0] in ("tests", "kernels") for name in imported(path)), path


def test_every_part_of_the_order_that_exists_was_seen():
    seen = {part(path) for path in LIBRARY} - {"assets"}
    assert {"kernels", "config", "data", "networks", "trainer", "cli"} <= seen <= set(RANK)


def test_a_wrong_import_would_be_noticed(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "def f():\n    from tcm_fast.trainer import Trainer\n    import tcm_fast.cli\n"
    )
    assert parts_of_library(imported(wrong)) == {"trainer", "cli"}
    wrong.write_text("from . import trainer\n")
    with pytest.raises(AssertionError, match="a relative import"):
        imported(wrong)


@pytest.mark.parametrize("module", ["tcm_fast", "tcm_fast.config", "tcm_fast.cli"])
def test_the_command_line_starts_without_torch(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'triton', 'scipy') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
