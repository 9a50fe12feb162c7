"""Triton kernels compiled for a GPU that is not here, into a file that is carried to where it is.

    python -m tcm_fast.benchmarks.precompile --arch 90 --out kernels.zip       # needs no GPU
    python -m tcm_fast.benchmarks.precompile --install kernels.zip             # there, before anything runs

The launches are those that the operations make at the sites of the recipes' networks, and those of the
tests: carried out up to the launch itself, on tensors on the CPU. Each goes through Triton's own path from
arguments to a compiled form, for the GPU that is asked for, so that the cache knows it when it is launched.
Both sides need the same release of Triton, and the same kernels' sources.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import tcm_fast.kernels
from tcm_fast.benchmarks import convolutions
from tcm_fast.benchmarks.cases import (
    CIFAR10,
    DTYPE_NAMES,
    Case,
    NetworkShape,
    available_networks,
    cases,
    tensors_of,
)
from tcm_fast.benchmarks.sites import kernels_in_their_places
from tcm_fast.kernels._triton import AVAILABLE, compiling_together
from tcm_fast.kernels.conv_bf16x3 import conv_bf16x3
from tcm_fast.networks import build_network, layers
from tcm_fast.networks.by_sample import scales_and_gains
from tcm_fast.networks.precision import in_precision
from tcm_fast.runtime.arithmetic import tf32

MANIFEST = "manifest.json"
LOADED = (".cubin", ".json")  # of what a kernel goes through, what is read when it is launched
# Triton tells apart multiples of 16, 1, and other numbers; some tiles grow with the batch.
BATCHES = (1, 2, 16, 32, 64, 128, 512)
# The dtypes in which gpu_session.py runs each network.
DTYPES = {"ddpmpp": ("bf16", "fp16", "fp32"), "edm2": ("fp16", "bf16"), "adm": ("bf16",)}


# ---- what is launched ---------------------------------------------------------------------------


class Pointer:
    """What decides which compiled form a tensor gets: its dtype and its address modulo 16."""

    def __init__(self, tensor: Any) -> None:
        self.dtype, self.address = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, of tensors their Pointer, and its constants."""

    kernel: Any
    args: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> Any:
        """Equal where Triton compiles the same (or nearly: then it compiles twice)."""
        general = {p.num for p in getattr(self.kernel, "params", ()) if p.do_not_specialize}
        args = (
            (a.dtype, a.address) if isinstance(a, Pointer)
            else (a == 1, a % 16 == 0, abs(a) >= 2**31) if type(a) is int and i not in general
            else type(a)
            for i, a in enumerate(self.args)
        )  # fmt: skip
        return self.kernel.__name__, *args, *self.constants


@contextmanager
def _as_on_a_gpu(arch: int) -> Iterator[None]:
    """Inside, operations on CPU tensors choose what they choose on a GPU."""
    stand_ins: dict[str, Callable[..., Any]] = {
        "runs_triton": lambda name, device_type: True,
        "interpreting": lambda: False,
        "has_asm": lambda x: True,
        "_capability": lambda device: arch,
    }
    with ExitStack() as stack:
        for info in pkgutil.iter_modules(tcm_fast.kernels.__path__):
            module = importlib.import_module(f"tcm_fast.kernels.{info.name}")
            for name, function in stand_ins.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, function))
        yield


class _Enough(Exception):
    """Leaves `compiling_together` before it compiles: here a kernel that fails costs no other."""


def noted(work: Callable[[], object], arch: int) -> dict[Any, Launch]:
    """The launches of `work`, none of which is carried out: what they would write is undefined."""
    found: dict[Any, Launch] = {}
    with suppress(_Enough), _as_on_a_gpu(arch), compiling_together() as launches:
        work()
        for kernel, _, args, constants in launches:
            pointers = tuple(Pointer(a) if hasattr(a, "data_ptr") else a for a in args)
            launch = Launch(kernel, pointers, tuple(sorted(constants.items())))
            found[launch.key] = launch
        raise _Enough
    return found


def site_launches(arch: int, chosen: Mapping[str, Collection[str]] = DTYPES) -> dict[Any, Launch]:
    """Of every operation at every site of the recipes' networks (name -> dtypes), forward and backward."""
    found: dict[Any, Launch] = {}
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    for network in available_networks():
        wanted = [dtypes[name] for name in chosen.get(network.name, ())]
        for case in cases([network], BATCHES, wanted):
            # Products in fp32 have a compiled form with TF32 and one without.
            for allowed in (False, True)[: 1 + (case.dtype == torch.float32)]:
                with tf32(allowed):
                    found |= noted(lambda case=case: _both(case), arch)  # type: ignore[misc]
    return found


def split_launches(
    arch: int, network: NetworkShape = CIFAR10, batch: int = 128
) -> dict[Any, Launch]:
    """Of precision bf16x3: a network's convolutions, and those of `benchmarks.convolutions`."""
    heard = {
        ((batch, site.c, site.size, site.size), (site.k, site.c, site.kernel, site.kernel), False)
        for site in convolutions.SITES
    }

    def note(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, parts: torch.Tensor
    ) -> torch.Tensor:
        heard.add((tuple(x.shape), tuple(weight.shape), bias is not None))
        return conv_bf16x3(x, weight, bias, parts=parts)

    with torch.device("meta"), patch.object(layers, "conv_bf16x3", note):
        net = build_network(
            network.name, img_resolution=network.img_resolution, img_channels=network.img_channels,
            label_dim=network.label_dim, **dict(network.architecture),
        )  # fmt: skip
        net = in_precision(net, torch.float32, split=True)
        x = torch.empty(batch, net.img_channels, net.img_resolution, net.img_resolution)
        with kernels_in_their_places():
            net.raw(x, torch.ones(batch))  # sampling
            net.raw_and_bias(x, torch.ones(batch))  # a step

    def run(image: tuple[int, ...], weight: tuple[int, ...], has_bias: bool) -> None:
        empty = partial(torch.empty, memory_format=torch.channels_last)
        x, w = empty(image).requires_grad_(), empty(weight).requires_grad_()
        bias = torch.empty(weight[0]) if has_bias else None
        parts = torch.empty(2, weight[0], w[0].numel(), dtype=torch.bfloat16)
        out = conv_bf16x3(x, w, bias, parts=parts)
        torch.autograd.grad(out, (x, w), empty(out.shape))

    found: dict[Any, Launch] = {}
    for shapes in sorted(heard):
        found |= noted(partial(run, *shapes), arch)
    return found


def _both(case: Case) -> None:
    """Forward without gradients, and forward and backward; on tensors without values, which nothing reads."""
    empty = lambda name, sizes, dtype, *_: torch.empty(sizes, dtype=dtype)  # noqa: E731
    with patch("tcm_fast.benchmarks.cases._random", empty):
        inputs = case.inputs("cpu", torch.channels_last)
    if case.operation == "modulate_mp_silu":  # as a training pass calls it
        given = inputs["scale"], inputs["gain"]
        with kernels_in_their_places():
            (scale,), (gain,) = scales_and_gains(given[0], [given[0].shape[1]], [given[1]])
        out = case.site.function(**inputs | {"scale": scale, "gain": gain})
        torch.autograd.grad(out, given, torch.empty_like(out))
    with torch.no_grad():
        case.site.function(**inputs)
    # Of one that multiplies the backward pass is a library's, which would compute.
    if case.has_backward and case.operation != "residual_conv1x1":
        results = [x for x in tensors_of(case.site.function(**inputs)) if x.requires_grad]
        wanted = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.grad(results, wanted, [torch.empty_like(x) for x in results])


def test_launches(arch: int, tests: Path) -> dict[Any, Launch]:
    """Of the tests that run on `triton_device`, up to where they look at what nothing has written."""
    import pytest

    from tcm_fast.benchmarks.gpu_session import test_files

    class Chosen:
        @staticmethod
        def pytest_collection_modifyitems(items: list[Any]) -> None:
            items[:] = [item for item in items if "triton_device" in item.fixturenames]

    files = [str(path) for _, path in test_files(tests)]
    # Without the terminal's plugin its options, which the project's usual ones have, are unknown.
    options = ["-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:terminal"]

    def run() -> None:
        status = pytest.main([*options, *files], plugins=[Chosen()])
        assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), status

    return noted(run, arch)


# ---- compiling ----------------------------------------------------------------------------------


class _NoDevice:
    """In the place of Triton's driver: a GPU that can be compiled for."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


_launches: list[Launch] = []  # what the forked workers compile


def _compile(index: int, arch: int) -> tuple[str, dict[str, bytes]] | str:
    """(the cache's key without Triton's own part, files), or what the compiler says."""
    import triton
    from triton.compiler import compiler

    launch, keys = _launches[index], {}
    get_key, own = compiler.get_cache_key, triton.runtime.cache.triton_key()

    def get_and_note(*args: Any, **options: Any) -> str:
        key = get_key(*args, **options)
        keys[hashlib.sha256(key.encode()).hexdigest()] = key.removeprefix(own)
        return key

    triton.runtime.driver.set_active(_NoDevice(arch))
    try:
        with patch.object(compiler, "get_cache_key", get_and_note):
            built = launch.kernel.warmup(*launch.args, grid=(1,), **dict(launch.constants))
    except Exception as error:  # the others are compiled all the same
        return f"{launch.kernel.__name__}: {' '.join(str(error).split())[:200]}"
    files = {name: Path(path) for name, path in built.metadata_group.items()}
    return keys[built.hash], {n: p.read_bytes() for n, p in files.items() if p.suffix in LOADED}


def write(
    launches: Sequence[Launch], arch: int, out: Path, jobs: int | None = None
) -> tuple[int, list[str]]:
    """Compile, and pack into a zip. Returns the number of kernels, and why others have none."""
    import triton

    _launches[:] = launches
    entries, problems = {}, []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        # Only what is loaded, not what it went through.
        variables = {"TRITON_CACHE_DIR": folder, "TRITON_STORE_BINARY_ONLY": "1"}
        with patch.dict(os.environ, variables), ProcessPoolExecutor(jobs, context) as pool:
            for built in pool.map(_compile, range(len(launches)), [arch] * len(launches)):
                if isinstance(built, str):
                    problems.append(built)
                else:
                    entries[built[0]] = built[1]
    manifest = {"triton": triton.__version__, "arch": arch, "keys": list(entries)}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(MANIFEST, json.dumps(manifest))
        for i, files in enumerate(entries.values()):
            for name, data in files.items():
                file.writestr(f"{i}/{name}", data)
    return len(entries), problems


def install(path: Path) -> int:
    """Put a zip's kernels into Triton's cache (TRITON_CACHE_DIR, or its default); returns their number.

    Raises:
        ValueError: it was made with another release of Triton.
    """
    import triton
    from triton.runtime.cache import get_cache_manager, triton_key

    with zipfile.ZipFile(path) as file:
        manifest = json.loads(file.read(MANIFEST))
        if manifest["triton"] != triton.__version__:
            raise ValueError(
                f"precompile: {path} must be made with the Triton that is here, {triton.__version__}, got "
                f"{manifest['triton']}"
            )
        names = file.namelist()
        for i, key in enumerate(manifest["keys"]):
            whole = hashlib.sha256((triton_key() + key).encode()).hexdigest()
            cache, group = get_cache_manager(whole), {}
            for name in names:
                folder, _, plain = name.partition("/")
                if folder == str(i):
                    group[plain] = cache.put(file.read(name), plain)
            cache.put_group(next(n for n in group if n.endswith(".json")), group)
        return len(manifest["keys"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile the Triton kernels for another machine")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--out", type=Path, default=Path("kernels.zip"))
    parser.add_argument(
        "--tests", type=Path, help="the folder of tests, whose kernels are wanted too"
    )
    parser.add_argument("--networks", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp16", "fp32"],
                        help="instead of those in which the session runs each network")  # fmt: skip
    parser.add_argument("--jobs", type=int, help="processes (the machine's cores)")
    parser.add_argument("--install", type=Path, help="instead: put a file's kernels into the cache")
    given = parser.parse_args(argv)
    if not AVAILABLE or os.environ.get("TRITON_INTERPRET") == "1":
        print("precompile: needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    if given.install is not None:
        try:
            count = install(given.install)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        print(f"{count} kernels are in Triton's cache")
        return 0
    chosen = {name: given.dtypes or DTYPES[name] for name in given.networks}
    launches = site_launches(given.arch, chosen)
    if "ddpmpp" in chosen:
        launches |= split_launches(given.arch)
    print(f"{len(launches)} compiled forms at the networks' sites", flush=True)
    if given.tests is not None:
        launches = launches | test_launches(given.arch, given.tests)
        print(f"{len(launches)} with those of the tests", flush=True)
    count, problems = write(list(launches.values()), given.arch, given.out, given.jobs)
    for problem in problems:
        print(f"does not compile: {problem}")
    print(f"{count} kernels for sm_{given.arch}, {given.out.stat().st_size >> 20} MiB: {given.out}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
