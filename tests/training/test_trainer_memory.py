"""Memory optimizations that trade time for memory: whole runs give the same weights."""

import numpy as np
import pytest
import torch

from tcm_fast.checkpoint.format import load_checkpoint
from tcm_fast.checkpoint.run_folder import newest_checkpoint
from tcm_fast.config import Config, from_dict
from tcm_fast.kernels._backend import extension
from tcm_fast.training.trainer import Trainer

PHASE = {"batch_size": 8, "images": 8 * 4, "dropout": 0.2, "lr": 1e-3, "ema": ["power:6.94"]}
PAIRS = {"stage_iterations": 4, "max_ratio": 0.9, "huber_c": 0.06}
OPTIMIZATIONS = {
    "norms": {"recompute_norms": True},
    "blocks": {"recompute_blocks": 4},
    "offload": {"offload": True},
    "all": {"recompute_norms": True, "recompute_blocks": 8, "offload": True},
}
needs_extension = pytest.mark.skipif(extension() is None, reason="needs the extension: not built")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (24, 8, 8, 1), np.uint8))
    return str(path)


def config(source, **changes):
    network = {
        "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
    }  # fmt: skip
    values = {"data": {"source": source}, "network": network, "edm": PHASE, "ect": PHASE | PAIRS}
    values |= {"tcm": PHASE | PAIRS, "log_every": 2, "grid_every": 100} | changes
    return from_dict(Config, values)


def weights(out):
    """All that the end of a run consists of."""
    saved = load_checkpoint(newest_checkpoint(out))
    files = [saved.network_tensors(name) for name in ("model", "ema-0", "stage1")]
    return [tensor for file in files for tensor in file.values()]


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """The same runs without optimizations, by precision."""
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path_factory.mktemp("plain") / precision
        Trainer(config(source, precision=precision), out).run()
        found[precision] = weights(out)
    return found


@needs_extension
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimization", OPTIMIZATIONS)
def test_a_lever_changes_no_bit_of_a_run(optimization, precision, source, plain, tmp_path):
    Trainer(
        config(source, precision=precision, **OPTIMIZATIONS[optimization]), tmp_path / "run"
    ).run()
    for a, b in zip(plain[precision], weights(tmp_path / "run"), strict=True):
        assert torch.equal(a, b)


@needs_extension
def test_a_run_with_levers_resumes_and_hands_on(source, plain, tmp_path):
    out = tmp_path / "run"
    changes = {"offload": True, "recompute_norms": True}
    first = config(source, phases=["edm", "ect"], **changes)
    Trainer(first, out).run()
    Trainer(config(source, phases=["tcm"], max_steps=2, **changes), out, resume=True).run()
    Trainer(config(source, phases=["tcm"], **changes), out, resume=True).run()
    for a, b in zip(plain["fp32"], weights(out), strict=True):
        assert torch.equal(a, b)


def test_levers_out_of_range_are_refused(source):
    with pytest.raises(ValueError, match="recompute_blocks: must be a resolution, got 0"):
        config(source, recompute_blocks=0)
    with pytest.raises(ValueError, match="memory_limit: must be an amount of memory such as 8GiB"):
        config(source, memory_limit="much")


def test_without_the_extension_offloading_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TCM_FAST_BACKEND", "reference")
    with pytest.raises(ValueError, match="offload: needs the extension"):
        Trainer(config(source, offload=True), tmp_path / "run").run()
