"""Adapters: the published TCM code, and FastGen, from checkouts that the user names. None of their code is
here; their modules are imported from where they lie, and need what they need (a GPU, their packages).

    git clone https://github.com/NVlabs/TCM      # NVIDIA Source Code License: research only
    git clone https://github.com/NVlabs/FastGen
    tcm-fast bench step --official TCM --fastgen FastGen

Their training loops are not called, which would load data, write files and never end: an adapter builds
network, loss and optimizer by their own classes with their own settings, and takes the loop's steps. The
data loader is left out on all sides.
"""

from __future__ import annotations

import copy
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tcm_fast.benchmarks.steps import Step, StepCase
from tcm_fast.runtime.arithmetic import training_settings

WITHIN = 0.10  # official_style.py must lie this near to the published code


@contextmanager
def importing_from(checkout: Path, *packages: str) -> Iterator[Callable[[str], Any]]:
    """Yields an import that looks into a checkout first. The packages named are forgotten before and
    after, so that two checkouts do not get into each other's way.

    Raises:
        ValueError: there is no such checkout, or it does not hold these packages.
    """
    for package in packages:
        if not (checkout / package).is_dir():
            raise ValueError(f"{checkout}: must be a checkout that holds {package}/, got none")
    kept = {name: m for name, m in sys.modules.items() if name.partition(".")[0] in packages}
    for name in kept:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(checkout))
        for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
            del sys.modules[name]
        sys.modules.update(kept)


def gap(checkout: Path | None, case: StepCase) -> str:
    """Why the published code cannot take this step here; empty where it can."""
    if checkout is None:
        return "no checkout given"
    if case.device != "cuda":
        return "needs a GPU"
    if case.phase != "tcm" or case.network.name != "ddpmpp" or case.network.label_dim:
        return "the adapters know stage 2 on CIFAR-10 without classes"
    return "" if case.precision == "fp32" else "is published in fp32"


def official_tcm(checkout: Path, case: StepCase) -> Step:
    """The published stage-2 step, in fp32 without TF32, noise levels by scipy, RAdam, an EMA by a
    loop over parameters."""
    architecture = dict(case.network.architecture)
    with importing_from(checkout, "training", "torch_utils", "dnnlib") as load:
        networks, losses = load("training.networks"), load("training.loss")
        truncated = load("training.networks_tcm")
        net = networks.ECMPrecond(
            img_resolution=case.network.img_resolution, img_channels=case.network.img_channels,
            label_dim=0, use_fp16=False, model_type="SongUNet", embedding_type="positional",
            encoder_type="standard", decoder_type="standard", channel_mult_noise=1,
            resample_filter=[1, 1], dropout=case.config.dropout,
            model_channels=architecture["model_channels"],
            channel_mult=list(architecture["channel_mult"]), num_blocks=architecture["num_blocks"],
            attn_resolutions=list(architecture["attn_resolutions"]),
        )  # fmt: skip
        loss_fn = losses.ECMLoss(
            P_mean=0.0, P_std=0.2, t_lower=1.0, t_upper=80.0, q=2.0, c=1e-8, ratio_limit=0.999,
            boundary_prob=0.25, tdist="t", df=0.01,
        )  # fmt: skip
    net.load_state_dict(case.build().state_dict(), strict=False)
    net = net.train().requires_grad_(True).to(case.device)
    loss_fn.update_schedule(20)  # the schedule's end
    average = copy.deepcopy(net).eval().requires_grad_(False)
    frozen = copy.deepcopy(net).requires_grad_(False)
    both = truncated.TCMPrecond(frozen, net, transition_t=1.0)
    optimizer = torch.optim.RAdam(net.parameters(), lr=5e-5)
    pixels, labels = _images(case)

    @training_settings("fp32", deterministic=False)
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        images = pixels.to(torch.float32) / 127.5 - 1
        unweighted, loss, _, _, boundary = loss_fn(net=both, images=images, labels=labels)
        (loss.mean() + boundary.mean() * 0.1).backward()
        for value in (loss, unweighted, boundary):
            value.mean().item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e6).item()
        optimizer.step()
        with torch.no_grad():
            for kept, value in zip(average.parameters(), net.parameters(), strict=True):
                kept.copy_(value.detach().lerp(kept, 0.9999))

    return step


def fastgen_tcm(checkout: Path, case: StepCase) -> Step:
    """FastGen's stage-2 step on CIFAR-10, by its own configuration, model and optimizer."""
    architecture = dict(case.network.architecture)
    with importing_from(checkout, "fastgen") as load:
        config = load("fastgen.configs.experiments.EDM.config_tcm_cifar10").create_config()
        model_config = config.model
        model_config.device = case.device
        model_config.pretrained_model_path = ""
        model_config.use_ema = ["ema_9999"]
        side = case.network.img_resolution
        model_config.input_shape = [case.network.img_channels, side, side]
        model_config.net.img_resolution = side
        model_config.net.img_channels = case.network.img_channels
        model_config.net.augment_dim = 0
        for key, value in architecture.items():
            if key != "dropout":
                model_config.net[key] = list(value) if isinstance(value, tuple) else value
        model = load("fastgen.methods").TCMModel(model_config)
    model.on_train_begin()
    model.init_optimizers()
    model.ratio = 0.999
    model = model.to(case.device)
    pixels, labels = _images(case)
    average, count = model.ema_9999, 0

    @training_settings("fp32", deterministic=False)
    def step() -> None:
        nonlocal count
        images = pixels.to(torch.float32) / 127.5 - 1
        data = {"real": images, "condition": labels, "neg_condition": labels}
        losses, _ = model.single_train_step(data, count)
        losses["total_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1e6)
        model.optimizers_schedulers_step(count)
        model.optimizers_zero_grad(count)
        with torch.no_grad():
            for kept, value in zip(average.parameters(), model.net.parameters(), strict=True):
                kept.lerp_(value, 1e-4)
        count += 1

    return step


def _images(case: StepCase) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N,C,H,W] on the device, and labels [N,0] for a network without classes."""
    pixels = torch.from_numpy(case.images()[: case.batch_size]).permute(0, 3, 1, 2).contiguous()
    labels = torch.zeros((case.batch_size, 0), device=case.device)
    return pixels.to(case.device), labels


def nearness(style: list[float], official: list[float]) -> tuple[float, str]:
    """Median of official_style.py's samples over the published code's, and what to say of it."""
    ratio = statistics.median(style) / statistics.median(official)
    verdict = "within" if 1 - WITHIN <= ratio <= 1 + WITHIN else "NOT within"
    return ratio, (
        f"official_style.py takes {ratio:.2f} times as long as the published code: {verdict} "
        f"{WITHIN:.0%}"
    )
