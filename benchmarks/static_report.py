"""What can be said of the kernels without a GPU: registers, spills, shared memory, resident programs,
width of the memory accesses, for every architecture.

    python -m tcm_fast.benchmarks.static_report [--archs 80 90] [--only group_norm] [--out FILE]
    python -m tcm_fast.benchmarks.static_report --check [--archs 80 90] [--only group_norm]

Compiles each operation's `specialisations` with Triton, reads the machine code with the cuobjdump that
Triton brings, and lists the kernels of the C++ extension beside them. Nothing is timed. fp16 is compiled
for sm_80 and sm_90 only: it differs from bf16 in conversions. The report carries a hash of each operation's
sources, by which a test sees that it is not of other ones; rows of the other operations stay in FILE.
`--check` only says which variants do not compile with the installed Triton, or need more shared memory than
there is. `--only _C` lists the extension's kernels, as it was built here: with TCM_FAST_CUDA=1 and all
architectures.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track

OPERATIONS = (
    *("consistency_loss", "noise_pair", "denoise_to_uint8", "posterior_mean"),
    *("group_norm_silu", "qkv_attention", "conv_bf16x3"),
    *("pixel_norm_mp_silu", "mp_cat_mp_silu", "modulate_mp_silu", "mp_sum", "resample", "residual"),
    "residual_conv1x1",
)
ARCHS = (80, 86, 89, 90, 100, 120)
# Shared memory of an SM and of one program (bytes), threads and programs of an SM: CUDA C++
# Programming Guide, table "technical specifications per compute capability".
SM = {
    80: (164 << 10, 163 << 10, 2048, 32),
    86: (100 << 10, 99 << 10, 1536, 16),
    89: (100 << 10, 99 << 10, 1536, 24),
    90: (228 << 10, 227 << 10, 2048, 32),
    100: (228 << 10, 227 << 10, 2048, 32),
    120: (100 << 10, 99 << 10, 1536, 24),
}
REGISTERS = 65536  # of an SM
ROOT = Path(__file__).parents[1]
ACCESS = re.compile(r"\b((?:LDG|STG|LDGSTS)\.[A-Z0-9.]*)")
MMA = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA)\b")  # of tensor cores: sm_80 and 120, 90, 100


def sources_hash(operation: str) -> str:
    """SHA-256 over what an operation's kernels are made of: its sections of kernels and launchers, and
    the functions that kernels share."""
    folder = Path(importlib.import_module("tcm_fast.kernels").__file__ or "").parent

    def part(name: str, start: str, end: str) -> str:
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        return source[source.index(start) : source.index(end)]

    shared = (folder / "_philox_triton.py").read_text(encoding="utf-8")
    shared += part("_common", "# -- in kernels ---", "# -- beside them ---")
    own = part(operation, "# -- kernels ---", "# -- registration ---")
    own += "".join(
        file.read_text(encoding="utf-8") for file in folder.glob(f"_{operation}_plan.py")
    )
    return hashlib.sha256((own + shared).encode()).hexdigest()


def module_of(operation: str) -> Any:
    return importlib.import_module(f"tcm_fast.kernels.{operation}")


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[str], int]:
    """Resource usage (REG, STACK, LOCAL, SHARED, ...), the global accesses and the number of tensor-core
    instructions of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tool("cuobjdump"), "--dump-resource-usage", file.name]).stdout
        sass = run([tool("cuobjdump"), "-sass", file.name]).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return resources, ACCESS.findall(sass), len(MMA.findall(sass))


def access_bytes(access: str) -> int:
    """Bytes that an instruction moves for a thread, from its name: LDG.E.128 moves 16."""
    parts = access.split(".")
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((size for name, size in widths.items() if name in parts), 4)


def resident(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs that fit on an SM at once."""
    sm_shared, _, threads, programs = SM[arch]
    per_warp = -(-registers * 32 // 256) * 256
    limits = [programs, threads // (32 * warps), REGISTERS // max(per_warp * warps, 1)]
    # The driver keeps 1 KB of each program's shared memory.
    limits.append(sm_shared // (shared + 1024))
    return max(min(limits), 0)


def compile_variant(
    arch: int, operation: str, index: int, check_only: bool = False
) -> dict[str, Any]:
    """Compile one variant; a row of the report, without what is read off the machine code if check_only."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = module_of(operation).specialisations(arch)[index]
    names = list(variant.kernel.arg_names)
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    unknown = (set(variant.signature) | set(variant.constants)) - set(names)
    assert not unknown, f"{variant.kernel.__name__} has no argument {unknown}"
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    row: dict[str, Any] = {
        "operation": operation,
        "kernel": variant.kernel.__name__,
        "site": variant.site,
        "arch": arch,
        "warps": variant.num_warps,
        "stages": variant.num_stages,
    }
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        compiled = triton.compile(
            ASTSource(variant.kernel, signature, constants, aligned),
            target=GPUTarget("cuda", arch, 32),
            options={**options, "enable_fp_fusion": variant.fp_fusion},
        )
    except Exception as error:  # a kernel that does not compile is a row of the report
        return row | {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    shared = int(compiled.metadata.shared)
    if shared > SM[arch][1]:
        row["error"] = f"needs {shared} bytes of shared memory, sm_{arch} has {SM[arch][1]}"
    if check_only:
        return row
    resources, accesses, products = disassemble(compiled.asm["cubin"])
    sizes = [access_bytes(access) for access in accesses]
    if products:
        row["mma"] = products
    return row | {
        "registers": resources.get("REG", 0),
        "spill_bytes": resources.get("STACK", 0) + resources.get("LOCAL", 0),
        "shared_bytes": shared,
        "resident": resident(arch, resources.get("REG", 0), shared, variant.num_warps),
        "accesses": len(accesses),
        "wide_share": round(sum(b for b in sizes if b == 16) / sum(sizes), 3) if sizes else None,
    }


def extension_rows() -> list[dict[str, Any]]:
    """The CUDA half of the extension, as it was built here; no rows without one."""
    from tcm_fast.kernels._backend import extension

    module = extension()
    if module is None or not module.has_cuda():
        return []
    listing = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", module.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if shutil.which("c++filt"):
        listing = subprocess.run(
            ["c++filt"], input=listing, capture_output=True, text=True, check=True
        ).stdout
    rows, arch, kernel = [], 0, ""
    for line in listing.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.search(r"Function (.+):$", line.rstrip()):
            kernel = re.sub(r"\(anonymous namespace\)::|tcm_fast::|void |\(.*", "", found[1])
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            rows.append({
                "operation": "_C", "kernel": kernel, "arch": arch, "registers": usage["REG"],
                "spill_bytes": usage["STACK"] + usage["LOCAL"], "shared_bytes": usage["SHARED"],
            })  # fmt: skip
    return rows


def tasks_for(operation: str, archs: list[int]) -> list[tuple[int, str, int]]:
    """(architecture, operation, number of the variant) of all that is to be compiled."""
    return [
        (arch, operation, index)
        for arch in archs
        for index, variant in enumerate(module_of(operation).specialisations(arch))
        if arch in (80, 90) or "fp16" not in variant.site
    ]


def report(
    archs: list[int], only: str = "", jobs: int | None = None, check_only: bool = False
) -> dict[str, Any]:
    """The rows of the chosen operations, in the order of operation, architecture and site."""
    import torch
    import triton

    chosen = [name for name in OPERATIONS if only in name]
    tasks = [task for name in chosen for task in tasks_for(name, archs)]
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        futures = [pool.submit(compile_variant, *task, check_only) for task in tasks]
        rows = [future.result() for future in track(futures, "compiling")]
    sources = {name: sources_hash(name) for name in chosen}
    if not check_only and only in ("", "_C") and (extension := extension_rows()):
        rows += extension
        sources["_C"] = importlib.import_module("tcm_fast._C").SOURCES
    return {
        "sources": sources,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": rows,
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A report with the operations of a newer one in place of its own."""
    renewed = {row["operation"] for row in new["rows"]}
    rows = [row for row in old["rows"] if row["operation"] not in renewed] + new["rows"]
    return new | {"sources": old["sources"] | new["sources"], "rows": rows}


def summary(rows: list[dict[str, Any]]) -> str:
    """One line per kernel and architecture: the worst of its sites."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    lines = [
        f"{'kernel':44} {'arch':>5} {'sites':>5} {'regs':>5} {'spill':>6} {'shared':>7} {'wide':>5}"
    ]
    for (kernel, arch), group in groups.items():
        good = [row for row in group if "registers" in row]
        failed = Counter(row["error"] for row in group if "error" in row)
        shares = [row["wide_share"] for row in good if row.get("wide_share") is not None]
        numbers = [max((row[k] for row in good), default=0) for k in ("registers", "spill_bytes")]
        shared = max((row["shared_bytes"] for row in good), default=0)
        lines.append(
            f"{kernel[:44]:44} {arch:>5} {len(group):>5} {numbers[0]:>5} {numbers[1]:>6} {shared:>7} "
            f"{min(shares, default=0):>5.2f}"
        )
        lines += [f"    {count} x {error}" for error, count in failed.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for every architecture")
    parser.add_argument("--archs", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--jobs", type=int, help="processes (the machine's cores)")
    parser.add_argument("--out", type=Path, help="where the rows go as JSON")
    parser.add_argument("--check", action="store_true", help="only list what does not compile")
    given = parser.parse_args()
    if given.check and given.out is not None:
        parser.error("--check writes no report, leave out --out")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("static_report: TRITON_INTERPRET=1, an interpreting process cannot compile")
        return 2
    result = report(given.archs, given.only, given.jobs, given.check)
    failed = [row for row in result["rows"] if "error" in row]
    if given.check:
        for row in failed:
            print(f"sm_{row['arch']} {row['kernel']} {row['site']}: {row['error']}")
    else:
        print(summary(result["rows"]))
    print(
        f"Triton {result['versions']['triton']}: {len(result['rows']) - len(failed)} of "
        f"{len(result['rows'])} compile"
    )
    if given.out is not None:
        if given.out.is_file():
            result = merged(json.loads(given.out.read_text(encoding="utf-8")), result)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in result.pop("rows"))
        head = json.dumps(result, indent=1).removesuffix("\n}")
        given.out.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
