"""Images from a trained network: one step, a few steps, or the ODE solver of a diffusion network.

Image i of a seed has the same noise whatever the batch size, the first image or the device: it is
keyed by (seed, sampling step, i).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from tcm_fast.kernels._backend import fast_layout
from tcm_fast.kernels.denoise_to_uint8 import denoise_to_uint8, to_uint8
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import noise_pair
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.kernels.precondition import denoise
from tcm_fast.networks import Precond
from tcm_fast.networks.precision import in_precision
from tcm_fast.networks.precond import want_ones
from tcm_fast.objectives import is_consistency
from tcm_fast.runtime.arithmetic import PRECISIONS, splits_convolutions, tf32
from tcm_fast.runtime.cuda_graphs import CaptureError, CudaPlace, GraphCache
from tcm_fast.runtime.distributed import Workers
from tcm_fast.sampling.arguments import (
    Labels,
    check_numbers,
    label_rows,
    network_info,
    networks_at,
    one_hot,
    times_of,
)
from tcm_fast.sampling.solvers import (
    HEUN_STEPS,
    Denoiser,
    Solver,
    heun,
    heun_levels,
    multistep,
)

LARGEST_BATCH = 2**20  # pixels on a GPU (1024 images at 32x32): more is no faster
SHARED_BATCH = 256  # images of a batch that processes with GPUs share out
NOISE_LAYER = 0x80000001  # Philox key of sampling noise; training noise has 0x80000000


# ---- sampling -----------------------------------------------------------------------------------


def sample(
    net: Precond,
    num: int,
    *,
    steps: int | None = 1,
    seed: int = 0,
    labels: Labels = None,
    times: Sequence[float] | None = None,
    batch_size: int | None = None,
    stage1: Precond | None = None,
    allow_below_t_prime: bool = False,
    start: int = 0,
    device: str | torch.device | None = None,
    precision: str | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Draw `num` images: x = T z, y = D(x, T); for each further t_i: x = y + t_i z', y = D(x, t_i).

    A network that `net.info` calls pre-trained is no consistency function: it is sampled by
    the deterministic solver of Karras et al. 2022 (algorithm 1) with `steps` noise levels, 2·steps - 1
    evaluations; one step would give a blur and is refused. Every other network is sampled by the formula
    above.

    Args:
        net: the network; it is used in eval mode and left in the mode it was in.
        num: number of images.
        steps: network evaluations per image; None is what is usual, 1 (edm: 18 Heun steps).
        seed: seed of the noise.
        labels: for class-conditional networks. None gives image i class i mod K; an int gives all
            the same class; of a sequence of ints image i takes the (i mod length)-th; a one-hot
            tensor [num,K] is taken row by row.
        times: noise levels of the steps after the first, which is always at T = 80 (a leading 80
            may be given too), strictly falling. By default `default_times`.
        batch_size: images per network call; by default as many as fill the device.
        stage1: the stage-1 network of a truncated network, used at times below t'; by default that
            of the checkpoint from which `net` was loaded.
        allow_below_t_prime: where there is no stage-1 network, use `net` there although it was not
            trained for it.
        start: number of the first image.
        device: where to compute; the network moves there. By default where it is.
        precision: fp32, tf32, fp16, bf16 or bf16x3 (not yet timed on a GPU); by default fp16 on a GPU,
            whose error is far below a byte's step, and fp32 elsewhere.
        progress: show a progress bar on stderr.

    Returns:
        uint8 [num,H,W,C] on the CPU: 127.5 x + 128, clipped to [0, 255] and truncated.

    Raises:
        ValueError: arguments that the network does not support; the message says which.
    """
    batches = sample_batches(
        net, num, steps=steps, seed=seed, labels=labels, times=times, batch_size=batch_size,
        stage1=stage1, allow_below_t_prime=allow_below_t_prime, start=start, device=device,
        precision=precision, progress=progress,
    )  # fmt: skip
    return torch.cat([images for _, images in batches])


def sample_shared(net: Precond, num: int, workers: Workers, **options: Any) -> torch.Tensor:
    """`sample` by several processes: uint8 [num,H,W,C] on the main one, of length 0 on the others.

    The images are drawn in batches that do not depend on the number of processes, and so do not the
    images. `options` are those of `sample`."""
    is_cuda = workers.device.type == "cuda"
    default = SHARED_BATCH if is_cuda else _default_batch_size(net.img_resolution, workers.device)
    options["batch_size"] = options.get("batch_size") or default
    own = list(sample_batches(net, num, share=(workers.rank, workers.world), **options))
    drawn = dict(batch for some in workers.gather(own) for batch in some)
    images = torch.cat([drawn[first] for first in sorted(drawn)])
    return images if workers.is_main else images[:0]


def sample_batches(
    net: Precond,
    num: int,
    *,
    steps: int | None = 1,
    seed: int = 0,
    labels: Labels = None,
    times: Sequence[float] | None = None,
    batch_size: int | None = None,
    stage1: Precond | None = None,
    allow_below_t_prime: bool = False,
    start: int = 0,
    device: str | torch.device | None = None,
    precision: str | None = None,
    progress: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, torch.Tensor]]:
    """`sample`, batch by batch: yields the number of the first image and uint8 [n,H,W,C]. A share (k, n)
    leaves out all but batches k, k+n, k+2n, ...

    Arguments are checked when it is called, images are computed when they are asked for."""
    nets = [net]
    phase = network_info(net).get("phase")
    if not is_consistency(phase):
        if times is not None:
            raise ValueError(
                "times: apply to consistency networks, but this one is pre-trained only (phase "
                f"{phase}); give a number of steps"
            )
        solve: Solver = heun
        levels = heun_levels(HEUN_STEPS if steps is None else steps)
    else:
        levels, solve = times_of(steps, times, network_info(net).get("t_prime")), multistep
        nets = networks_at(net, levels, stage1, allow_below_t_prime)
    check_numbers(num, seed, start, batch_size)
    rows = label_rows(net, num, labels, start)
    sampler = Sampler(nets, solve, levels, seed=seed, device=device, precision=precision)

    def given(first: int, n: int) -> list[torch.Tensor]:
        return [] if rows is None else [one_hot(rows[first : first + n], net.label_dim)]

    return generate(sampler, num, given, start, batch_size, progress=progress, share=share)


def generate(
    sampler: Sampler,
    num: int,
    given: Callable[[int, int], Sequence[torch.Tensor]],
    start: int = 0,
    batch_size: int | None = None,
    *,
    progress: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, torch.Tensor]]:
    """Batch by batch what a sampler draws: the number of the first image and uint8 [n,H,W,C].

    given: (first, n) -> what `Sampler.draw` takes beside the numbers, for n images from the first-th on.
    The rest as in `sample_batches`."""

    def on_device(first: int, n: int) -> list[torch.Tensor]:
        return [tensor.to(sampler.device) for tensor in given(first, n)]

    size = batch_size or sampler.batch_size(*on_device(0, 1))
    ahead = 0 if sampler.graphs is None else 1  # batches drawn while an earlier one is used
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("sampling", total=num)
        drawn: deque[tuple[int, Fetched]] = deque()
        own = range(share[0] * size, num, share[1] * size)
        for first in own:
            n = min(size, num - first)
            numbers = torch.arange(start + first, start + first + n, device=sampler.device)
            drawn.append((start + first, Fetched(sampler.draw(numbers, *on_device(first, n)))))
            while len(drawn) > (ahead if first != own[-1] else 0):
                number, fetched = drawn.popleft()
                yield number, fetched.images()
                bar.advance(task, len(fetched.host))


def _default_batch_size(resolution: int, device: torch.device) -> int:
    """Images that occupy a CPU without leaving its caches (2^15 pixels), or the most for a GPU."""
    return max(1, (2**15 if device.type == "cpu" else LARGEST_BATCH) // resolution**2)


# ---- the loop -----------------------------------------------------------------------------------


class Sampler:
    """Draws images by their numbers; cast weights and captured graphs are kept between calls.

    Args:
        nets: the network of each level; a network is used in eval mode and left in the mode it was in.
        solve: `multistep` or another solver.
        levels: noise levels, T first.
        seed: of the noise.
        device, precision: where and how to compute; as in `sample`.
    """

    def __init__(
        self,
        nets: Sequence[Precond],
        solve: Solver,
        levels: Sequence[float],
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        precision: str | None = None,
    ) -> None:
        self.device = torch.device(device or next(nets[0].parameters(), torch.empty(0)).device)
        is_cuda = self.device.type == "cuda"
        self.precision = precision or ("fp16" if is_cuda else "fp32")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision: must be one of {', '.join(PRECISIONS)}, got {precision!r}"
            )
        self.dtype = PRECISIONS[self.precision]
        self.solve, self.levels, self.seed = solve, list(levels), seed
        self.shape = (nets[0].img_channels, nets[0].img_resolution, nets[0].img_resolution)
        ready: dict[int, Precond] = {}
        for net in nets:
            if id(net) not in ready:
                ready[id(net)] = self._ready(net)
        self.nets = [ready[id(net)] for net in nets]
        self.graphs = GraphCache(CudaPlace(self.device)) if is_cuda else None

    def _ready(self, net: Precond) -> Precond:
        """The network on the device, with its weights cast."""
        net.to(self.device)
        if isinstance(net, Precond):
            net.to(memory_format=fast_layout(self.device))  # type: ignore[call-overload]
        if not isinstance(net, Precond):
            return net
        return in_precision(net, self.dtype, split=splits_convolutions(self.precision))

    def draw(self, numbers: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """Images uint8 [n,H,W,C] on the device, valid until the next call. Where they run
        out of memory they are drawn in halves: the same images.

        numbers: int64 [n] on the device; given, on the device too and with a row for each image: for a
        class-conditional network first one-hot labels fp32 [n,K]; then what `solve` takes besides."""
        tensors = [numbers, *given]
        for is_last in (len(numbers) == 1 and self.graphs is None, len(numbers) == 1):
            try:
                return self._draw_together(*tensors)
            except CaptureError:
                self.graphs = None  # without, then: the same images
            except torch.OutOfMemoryError:
                if is_last:
                    raise
                if self.graphs is not None:  # its memory, and what the allocator keeps unused
                    self.graphs = GraphCache(CudaPlace(self.device))
                    torch.cuda.empty_cache()
        half = len(numbers) // 2
        parts = [[t[:half] for t in tensors], [t[half:] for t in tensors]]
        return torch.cat([self.draw(*part).clone() for part in parts])

    def _draw_together(self, *tensors: torch.Tensor) -> torch.Tensor:
        with tf32(self.precision == "tf32"), torch.inference_mode(), _evaluating(self.nets):
            if self.graphs is None:
                return self._draw(*tensors)
            return self.graphs("draw", self._draw_within, *tensors)

    def _draw_within(self, *tensors: torch.Tensor) -> torch.Tensor:
        assert self.graphs is not None
        with self.graphs.memory():
            return self._draw(*tensors)

    def _draw(self, numbers: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        labels, rest = (given[0], given[1:]) if self.nets[0].label_dim else (None, given)
        if self.solve is multistep and all(isinstance(net, Precond) for net in self.nets):
            return self._multistep(numbers, labels)

        def noise(step: int) -> torch.Tensor:
            return philox_normal(self.seed, step, NOISE_LAYER, numbers, self.shape)

        def denoiser(net: Precond) -> Denoiser:
            return lambda x, t: net(x, numbers.new_full((len(x),), t, dtype=x.dtype), labels)

        return to_uint8(self.solve(noise, [denoiser(net) for net in self.nets], self.levels, *rest))

    def _multistep(self, numbers: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """`multistep` in as few passes over the images as there are: noise and scaling before the
        network in one, preconditioning and bytes after it in another."""
        y = torch.zeros((len(numbers), *self.shape), device=self.device)
        y = y.contiguous(memory_format=fast_layout(self.device))
        ones = want_ones(self.nets, split=splits_convolutions(self.precision))
        for step, (net, level) in enumerate(zip(self.nets, self.levels, strict=True)):
            t = y.new_full((len(y),), level)
            key = PhiloxKey(seed=self.seed, step=step, layer=NOISE_LAYER, sample=numbers)
            noisy = noise_pair(
                y, t, None, key, sigma_data=net.sigma_data, dtype=self.dtype, append_ones=ones
            )
            output = net.raw(noisy.input_t, t, labels, with_ones=ones)
            if step < len(self.levels) - 1:
                y = denoise(output, noisy.x_t, t, net.sigma_data)
        return denoise_to_uint8(output, noisy.x_t, t, net.sigma_data)

    def batch_size(self, *given: torch.Tensor) -> int:
        """Images a call that fill the device: on a GPU as many as take half of its free memory,
        estimated from a small batch. `given` as in `draw`, of one image."""
        size = _default_batch_size(self.shape[-1], self.device)
        if self.graphs is None:
            return size
        probe = 8
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.inference_mode(), _evaluating(self.nets):
            numbers = torch.arange(probe, device=self.device)
            self._draw(numbers, *(t.expand(probe, *t.shape[1:]) for t in given))
        each = (torch.cuda.max_memory_allocated(self.device) - before) / probe
        free, _ = torch.cuda.mem_get_info(self.device)
        fitting = max(1, int(free / 2 / max(each, 1)))
        return min(size, 1 << (fitting.bit_length() - 1))


class Fetched:
    """Images on their way from the device to the host."""

    def __init__(self, images: torch.Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        if images.device.type != "cuda":
            # The copy is an ordinary tensor: those of inference mode cannot be written to.
            self.host = images.cpu().clone()
            return
        self.host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
        self.host.copy_(images, non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record(torch.cuda.current_stream(images.device))

    def images(self) -> torch.Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host


@contextmanager
def _evaluating(nets: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Eval mode for a while; every module gets back the mode it was in."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
