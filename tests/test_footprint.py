"""Predicted memory against tensors counted during real steps."""

import gc

import numpy as np
import pytest
import torch

from tcm_fast.config import Config, from_dict
from tcm_fast.data import ImageStream
from tcm_fast.footprint import Counter, ImageShape, memory
from tcm_fast.kernels._backend import extension
from tcm_fast.offload import PiecewiseOptimizer
from tcm_fast.trainer import Trainer

PHASE = {"batch_size": 16, "images": 16 * 3, "dropout": 0.2, "lr": 1e-3, "ema": ["power:6.94"]}
PAIRS = {"double": 1, "limit": 0.9, "c": 0.06}
LEVERS = {
    "none": {},
    "norms": {"recompute_norms": True},
    "blocks": {"recompute_blocks": 1},
    "high blocks, norms": {"recompute_blocks": 16, "recompute_norms": True},
    "micro-batches": {"micro_batches": 4},
    "offload": {"offload": True},
    "moments": {"moments": "bf16"},
    "8-bit moments": {"moments": "8bit"},
    "bf16": {"precision": "bf16"},
    "16-bit gradients": {"precision": "bf16", "gradients": "16bit"},
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
    phase = PHASE | {k: changes.pop(k) for k in ("moments", "ema", "batch_size") if k in changes}
    values = {"data": {"source": str(source)}, "network": network, "edm": phase}
    values |= {"ect": phase | PAIRS, "tcm": phase | PAIRS, "grid_every": 100} | changes
    return from_dict(Config, values)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (24, 16, 16, 3), np.uint8))
    return path


def all_tensors():
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def storages(tensors):
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


def counted(config, name, out):
    """Bytes of all tensors that a trainer's phase holds, and of those that its second step makes."""
    before = all_tensors()
    trainer = Trainer(config, out)
    phase = trainer.assembly.begin(
        name, trainer.assembly.build(config.phase(name)) if name == "tcm" else None
    )
    stream = ImageStream(trainer.data, seed=0, device="cpu")
    batches = trainer._prepare(phase, stream)
    trainer._step(phase, batches)
    phase.step = phase.steps - 1  # the schedule's end, where most targets need a network
    batches = trainer._prepare(phase, stream)
    phase.optimizer.zero_grad(set_to_none=True)
    known = storages(before)
    there = all_tensors()
    there += [x for state in phase.optimizer.state.values() for x in state.values()]
    sizes = {k: v for k, v in storages(there).items() if k not in known}
    host = set()
    if isinstance(phase.optimizer, PiecewiseOptimizer) and phase.optimizer.on_host:
        host = storages(piece.host for piece in phase.optimizer._pieces).keys()
    if name == "tcm" and config.precision != "fp32":
        host |= storages([*phase.frozen.parameters(), *phase.frozen.buffers()]).keys()
    base = sum(size for key, size in sizes.items() if key not in host)
    with Counter(there) as counter:
        trainer._step(phase, batches)
    return base + counter.peak


@needs_extension
@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("name", [pytest.param("edm", marks=pytest.mark.slow), "tcm"])
def test_predicted_memory_is_what_a_step_holds(name, lever, source, tmp_path):
    given = config(source, **LEVERS[lever])
    predicted = memory(given, name, ImageShape(16, 3, 0, 24), on_gpu=False)
    found = counted(given, name, tmp_path / "run")
    assert predicted.total == pytest.approx(found, rel=0.1)
