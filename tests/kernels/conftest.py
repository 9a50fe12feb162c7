"""What the tests of the elementwise operations share."""

import math

import pytest
import torch

CL, NCHW = torch.channels_last, torch.contiguous_format


def rounded(tensors, dtype):
    return [None if v is None else v.to(dtype) if v.ndim == 4 else v for v in tensors]


def run(function, tensors, upstream):
    """Outputs of `function(*tensors)` and the gradients of all tensors, under given upstream gradients,
    None where an output has none."""
    leaves = [v.detach().requires_grad_() for v in tensors]
    outputs = function(*leaves)
    outputs = [v for v in (outputs if isinstance(outputs, tuple) else (outputs,)) if v is not None]
    used = [(out, g) for out, g in zip(outputs, upstream, strict=True) if g is not None]
    grads = torch.autograd.grad(
        [out for out, _ in used], leaves, [g.to(out.dtype) for out, g in used], allow_unused=True
    )
    return [out.detach() for out in outputs], list(grads)


@pytest.fixture
def compare(check_against_oracle, triton_device):
    """Holds an operation's kernels against its float64 reference, outputs and gradients.

    compare(function, reference, tensors, shapes, dtype, layout, without=()): tensors are float64, feature
    maps are rounded to dtype and laid out; shapes are the outputs'; outputs in `without` get no upstream
    gradient.
    """

    def check(function, reference, tensors, shapes, dtype, layout=CL, without=()):
        generator = torch.Generator().manual_seed(11)
        upstream = [
            None
            if i in without
            else torch.randn(shape, generator=generator).to(dtype).to(triton_device)
            for i, shape in enumerate(shapes)
        ]
        narrow = [
            v.to(dtype).contiguous(memory_format=layout) if v.ndim == 4 else v.to(torch.float32)
            for v in tensors
        ]
        narrow = [v.to(triton_device) for v in narrow]
        exact = [v.double() for v in narrow]
        kernel, plain = (run(f, narrow, upstream) for f in (function, reference))
        oracle = run(reference, exact, [None if g is None else g.double() for g in upstream])
        for kind, ours, theirs, truth in zip(
            ("output", "grad"), kernel, plain, oracle, strict=True
        ):
            for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
                if c is None:
                    assert a is None or not a.any(), f"{kind} {i}"
                    continue
                assert a.isfinite().all(), f"{kind} {i}"
                check_against_oracle(a, b, c, f"{kind} {i} {dtype}")
                if kind == "output" and a.ndim == 4:
                    assert a.is_contiguous(memory_format=layout)
        again = run(function, narrow, upstream)
        for first, second in zip(kernel[0] + kernel[1], again[0] + again[1], strict=True):
            assert first is second or torch.equal(first, second)

    return check


@pytest.fixture
def poisoned(monkeypatch):
    """Fills what torch.empty gives with NaN: what a kernel does not write shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def filled(*args, _make=make, **options):
            out = _make(*args, **options)
            return out.fill_(math.nan) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, filled)
