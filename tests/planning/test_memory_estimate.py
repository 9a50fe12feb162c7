"""Predicted memory against tensors counted during real steps."""

import numpy as np
import pytest

from tcm_fast.benchmarks.memory_optimizations import held
from tcm_fast.config import Config, from_dict
from tcm_fast.kernels._backend import extension
from tcm_fast.planning.memory_estimate import ImageShape, memory

PHASE = {"batch_size": 16, "images": 16 * 3, "dropout": 0.2, "lr": 1e-3, "ema": ["power:6.94"]}
PAIRS = {"stage_iterations": 1, "max_ratio": 0.9, "huber_c": 0.06}
OPTIMIZATIONS = {
    "none": {},
    "norms": {"recompute_norms": True},
    "blocks": {"recompute_blocks": 1},
    "high blocks, norms": {"recompute_blocks": 16, "recompute_norms": True},
    "micro-batches": {"micro_batches": 4},
    "offload": {"offload": True},
    "moments": {"moments": "bf16"},
    "8-bit moments": {"moments": "8bit"},
    "bf16": {"precision": "bf16"},
    "two averages": {"ema": ["power:6.94", "constant:0.99"]},
    "all": {
        "precision": "bf16", "offload": True, "recompute_norms": True, "recompute_blocks": 8,
        "micro_batches": 2, "moments": "bf16",
    },
}  # fmt: skip
needs_extension = pytest.mark.skipif(extension() is None, reason="needs the extension: not built")


def config(source, channels=32, **changes):
    """Wide enough that weights count, on images large enough that activations do."""
    network = {
        "model_channels": channels, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
    }  # fmt: skip
    phase = PHASE | {k: changes.pop(k) for k in ("ema", "batch_size") if k in changes}
    values = {"data": {"source": str(source)}, "network": network, "edm": phase}
    values |= {"ect": phase | PAIRS, "tcm": phase | PAIRS, "grid_every": 100} | changes
    return from_dict(Config, values)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (24, 16, 16, 3), np.uint8))
    return path


@needs_extension
@pytest.mark.parametrize("optimization", OPTIMIZATIONS)
@pytest.mark.parametrize("name", [pytest.param("edm", marks=pytest.mark.slow), "tcm"])
def test_predicted_memory_is_what_a_step_holds(name, optimization, source, tmp_path):
    given = config(source, **OPTIMIZATIONS[optimization])
    predicted = memory(given, name, ImageShape(16, 3, 0, 24), on_gpu=False)
    found = held(given, name, tmp_path / "run")
    assert predicted.total == pytest.approx(found, rel=0.1)


@needs_extension
@pytest.mark.parametrize("size", [12, 1000])
def test_the_memory_of_a_bank_is_counted(size, source, tmp_path):
    """On a CPU, where float64 products with the bank are what a step holds most of."""
    pairs = PHASE | PAIRS
    given = config(source, tcm=pairs | {"target": "posterior", "bank_size": size})
    shape = ImageShape(16, 3, 0, 24)
    predicted = memory(given, "tcm", shape, on_gpu=False)
    assert predicted.total == pytest.approx(held(given, "tcm", tmp_path / "run"), rel=0.1)
    usual = memory(config(source), "tcm", shape, on_gpu=True)
    bank = memory(given, "tcm", shape, on_gpu=True).images - usual.images
    assert bank == 2 * min(size, 24) * 3 * 16 * 16
