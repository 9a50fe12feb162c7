"""Where the networks call the operations, and with what: collected by running them, not typed in.

A network of `build_network` runs once on tensors without memory; every public operation of
`tcm_fast.kernels` that the networks, the objectives and the sampler imported notes what it is called
with. So a new operation or a new network is measured as soon as it exists.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tcm_fast.networks
import tcm_fast.objectives
from tcm_fast.config import TcmConfig
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import NoisePair
from tcm_fast.networks import build_network
from tcm_fast.networks.precision import cast_weights
from tcm_fast.objectives.batch import Batch, make_batch
from tcm_fast.objectives.tcm import Tcm
from tcm_fast.sampling import sampler, solvers

BATCH = (
    7  # of the network that is listened to: no width or group count is 7, so dim 0 tells the batch
)
COMPUTE = (
    torch.bfloat16
)  # stands for the compute dtype: what is fp32 then stays fp32 in any precision


@dataclass(frozen=True)
class Like:
    """A tensor argument. shape: None stands for the batch; dtype: None for the compute dtype."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None
    requires_grad: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> Like:
        shape = tuple(None if i == 0 and size == BATCH else size for i, size in enumerate(x.shape))
        return cls(shape, None if x.dtype == COMPUTE else x.dtype, x.requires_grad)

    def sizes(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if size is None else size for size in self.shape)


@dataclass(frozen=True)
class KeyLike:
    """A PhiloxKey argument."""

    layer: int


@dataclass(frozen=True)
class Site:
    """One way in which a network calls an operation.

    operation: the public function's name. arguments: (name, Like, KeyLike or the value itself) of all.
    network: whose site it is; count: how often a forward pass calls it so. module: where the function is
    defined.
    """

    operation: str
    arguments: tuple[tuple[str, Any], ...]
    network: str
    count: int = 1
    module: str = ""

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments).get(name)

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), self.operation)

    @property
    def reference(self) -> Callable[..., Any] | None:
        """The plain PyTorch function beside the operation, where there is one under the usual name."""
        return getattr(importlib.import_module(self.module), f"{self.operation}_reference", None)

    def __str__(self) -> str:
        """The first tensor's shape, then what else tells sites apart: further tensors, with their shapes
        where they are other images, and values that differ from the defaults."""
        (_, first), *others = self.arguments
        words = ["uint8" if first.dtype == torch.uint8 else "", _shape(first)]
        parameters = inspect.signature(self.function).parameters
        for name, value in others:
            if isinstance(value, Like):
                is_other = len(value.shape) == 4 and value.shape != first.shape
                words.append(f"{name} {_shape(value)}" if is_other else name)
            elif isinstance(value, KeyLike) or name in ("num_groups", "eps") or value is COMPUTE:
                continue
            elif value != parameters[name].default:
                words.append(_setting(name, value))
        return " ".join(word for word in words if word and word not in UNSAID)


OF_CHANNELS = ("weight", "bias", "x_bias", "skip_bias")
"""Arguments [C] of the operations of the networks, where these may expand them to [N,C]."""

# What every site of its operation has, or what follows from the rest.
UNSAID = {
    "weight", "bias", "num_groups", "eps", "x_t", "x_r", "t", "delta", "weighting", "target_output", "x",
}  # fmt: skip


def _setting(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"


def _shape(like: Like) -> str:
    return "x".join("N" if size is None else str(size) for size in like.shape)


def public_operations() -> dict[FunctionType, str]:
    """The public functions of the files of `tcm_fast.kernels` that bear the file's name and have Triton
    kernels (the optimizer's are measured in `optimizers.py`)."""
    found: dict[FunctionType, str] = {}
    for info in pkgutil.iter_modules(tcm_fast.kernels.__path__):
        module = importlib.import_module(f"tcm_fast.kernels.{info.name}")
        function = getattr(module, info.name, None)
        if inspect.isfunction(function) and hasattr(module, "specialisations"):
            found[function] = info.name
    return found


def _listened() -> list[ModuleType]:
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for package in (tcm_fast.networks, tcm_fast.objectives)
        for info in pkgutil.iter_modules(package.__path__)
    ]
    return [*modules, sampler]


def _described(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # What a network expands, over the batch or over parts of a sample, to sum its gradients with other
        # layers', stands here as it was.
        if value.ndim == 3 or (value.ndim == 2 and name in OF_CHANNELS):
            value = value[tuple(0 if stride == 0 else slice(None) for stride in value.stride())]
        return Like.of(value)
    if isinstance(value, PhiloxKey):
        return KeyLike(0)  # the layer's number changes the mask, not the work
    return value


@contextmanager
def kernels_in_their_places() -> Iterator[None]:
    """Inside, networks call operations as on a GPU: a bias goes into the sum after its convolution."""
    with ExitStack() as stack:
        for module in _listened():
            if hasattr(module, "runs_triton"):
                stack.enter_context(patch.object(module, "runs_triton", lambda *_: True))
        yield


@contextmanager
def listening(network: str) -> Iterator[Counter[Site]]:
    """Inside, calls of operations by networks, objectives and sampler are counted by site. Not for
    several threads at once."""
    heard: Counter[Site] = Counter()
    operations = public_operations()

    def wrap(function: FunctionType) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            arguments = tuple((name, _described(name, v)) for name, v in given.arguments.items())
            heard[Site(operations[function], arguments, network, 1, function.__module__)] += 1
            return function(*args, **kwargs)

        return noted

    replaced = []
    for module in _listened():
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in operations:
                replaced.append((module, name, value))
                setattr(module, name, wrap(value))
    try:
        yield heard
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def in_channels_last(net: nn.Module) -> None:
    """Lays a network of fake tensors out as on a GPU (`Module.to` would set their data)."""
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 4:
                moved = parameter.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, name, nn.Parameter(moved))


@functools.cache
def network_sites(
    name: str, img_resolution: int, img_channels: int, label_dim: int = 0, **architecture: Any
) -> tuple[Site, ...]:
    """The sites of a forward pass in train mode, in the order in which they first occur.

    Args:
        name, img_resolution, img_channels, label_dim, architecture: as `build_network`'s; sequences as
            tuples.
    """
    with FakeTensorMode():
        net = build_network(
            name, img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
            **architecture,
        )  # fmt: skip
        net.train()
        in_channels_last(net)
        size = (BATCH, img_channels, img_resolution, img_resolution)
        x, t = torch.empty(size, dtype=COMPUTE), torch.ones(BATCH)
        labels = torch.zeros(BATCH, label_dim) if label_dim else None
        key = PhiloxKey(seed=0, step=0, sample=torch.arange(BATCH))
        with listening(name) as heard, kernels_in_their_places():
            net.raw(x, t, labels, dropout_key=key, weights=cast_weights(net, COMPUTE))
    return tuple(dataclasses.replace(site, count=count) for site, count in heard.items())


@functools.cache
def loop_sites(img_resolution: int, img_channels: int) -> tuple[Site, ...]:
    """What a stage-2 step and a sampler call around the networks, which here are as small as can be."""
    config = TcmConfig(batch_size=BATCH, boundary_fraction=0.3, huber_c=0.06)
    net = build_network(
        "ddpmpp", img_resolution=img_resolution, img_channels=img_channels, model_channels=4,
        channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    )  # fmt: skip
    objective = Tcm(config, net, net, dtype=COMPUTE)
    plan = Tcm.plan(config, seed=0, images_seen=0, iteration=10**6)
    (part,) = plan.parts(1)
    shape = (BATCH, img_channels, img_resolution, img_resolution)
    images = torch.zeros(shape, dtype=torch.uint8)
    batch = make_batch(plan, part, images, None, seed=0, step=0)
    image = f"{img_channels}x{img_resolution}x{img_resolution}"
    with listening(image) as heard, kernels_in_their_places():
        objective(batch)
        _posterior_target(objective, batch)
        drawing = sampler.Sampler([net], solvers.multistep, [80.0], precision="bf16")
        drawing.draw(torch.arange(BATCH))
    sites = [dataclasses.replace(site, count=count) for site, count in heard.items()]
    return tuple(site for site in sites if site.operation not in _of_networks(net))


def _posterior_target(objective: Tcm, batch: Batch) -> None:
    """Where the images at the inner noise levels are made if the target is the posterior mean."""
    config = dataclasses.replace(objective.config, target="posterior")
    other = Tcm(config, objective.student, objective.frozen)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = batch.images.shape
        own, bank = (
            torch.empty((n, *shape[1:]), dtype=torch.uint8) for n in (BATCH, config.bank_size)
        )
        pair = NoisePair(*(torch.empty(shape) for _ in range(5)))
        other.inner_images(pair, dataclasses.replace(batch, images=own, bank=bank))


def _of_networks(net: torch.nn.Module) -> set[str]:
    """The operations that a network's own modules import."""
    modules = {importlib.import_module(type(m).__module__) for m in net.modules()}
    operations = public_operations()
    values = [value for module in modules for value in vars(module).values()]
    return {
        operations[value] for value in values if inspect.isfunction(value) and value in operations
    }
