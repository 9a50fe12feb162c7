"""The GPU's cases where there is no GPU: the kernels at tiny sizes in Triton's interpreter, against the
float64 oracle. Nothing is timed.

    TRITON_INTERPRET=1 TCM_FAST_BACKEND=kernel python -m tcm_fast.benchmarks.validate
"""

from __future__ import annotations

import sys

import torch

from tcm_fast.benchmarks.cases import Case, NetworkShape, cases
from tcm_fast.benchmarks.check import Provider, check
from tcm_fast.kernels import _triton

TINY = NetworkShape(
    "ddpmpp", 8, 3,
    (("model_channels", 16), ("channel_mult", (1, 2)), ("num_blocks", 1), ("attn_resolutions", (4,))),
)  # fmt: skip


def tiny_cases() -> list[Case]:
    """One site of each way of calling an operation. bf16 is left out: the interpreter cuts it off where
    a GPU rounds."""
    found: dict[object, Case] = {}
    for case in cases((TINY,), (2,), (torch.float32, torch.float16)):
        names = tuple(name for name, _ in case.site.arguments)
        found.setdefault((case.operation, names, case.dtype), case)
    return list(found.values())


def main() -> int:
    if not _triton.interpreting():
        print("validate: needs Triton, and TRITON_INTERPRET=1 from the start; nothing was run")
        return 0 if not _triton.AVAILABLE else 2
    torch.set_num_threads(1)
    wrong = 0
    operations = set()
    for case in tiny_cases():
        launched = _triton.LAUNCHES.total()
        ours = Provider("tcm_fast", case.site.function, torch.channels_last, is_ours=True)
        problem = check(case, ours, "cpu")
        if not problem and _triton.LAUNCHES.total() == launched:
            problem = "no kernel ran"
        if problem:
            wrong += 1
            print(f"{case}: {problem}")
        operations.add(case.operation)
    if wrong:
        print(f"{wrong} kernels' answers are wrong in the interpreter")
        return 1
    print(
        f"{len(tiny_cases())} cases of {len(operations)} operations' GPU kernels are right at tiny sizes in "
        "Triton's interpreter; without a GPU nothing of them was timed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
