"""Configuration: one frozen dataclass per component, filled from a preset, a file and the command line.

A preset is a TOML file in `presets/`; its tables are the sections below, its keys their fields.
Unknown keys are errors that suggest the right name. Nothing here imports torch: the command line's
help has to come up at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

PhaseName = Literal["edm", "ect", "tcm", "ict", "cd", "cmt"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "bf16x3"]
LoggerName = Literal["tensorboard", "wandb", "trackio"]
Distance = Literal["huber", "manifold"]
Weighting = Literal["inv_dt", "inv_cout_sq", "inv_cout", "inv_sqrt_dt", "one"]

T_MIN, T_MAX = 0.002, 80.0  # lowest and highest noise level
R_MIN = 1e-6  # smallest inner noise level: its target is the image
PHASES: tuple[str, ...] = typing.get_args(PhaseName)
PRESETS = Path(__file__).parent / "presets"


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
}


def parse_bytes(name: str, text: str) -> int:
    """'8GiB', '7.25 GiB', '24GB' or '500M' (MiB) in bytes. ValueError, naming the argument, for anything
    else."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    known = found is not None and found[2].upper() in UNITS
    require(known, f"{name}: must be an amount of memory such as 8GiB, got {text!r}")
    assert found is not None
    size = int(float(found[1]) * UNITS[found[2].upper()])
    require(size > 0, f"{name}: must be positive, got {text!r}")
    return size


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    source: str = ""
    """`digits:train` (built in), a folder, a zip, an npz, cifar-10-binary.tar.gz or image parquet."""
    resolution: int | None = None
    """Centre-crop and resize to this many pixels; None takes the images as they are."""
    flip: bool = False
    """Mirror half of the images left to right."""
    skip_corrupt: bool = False
    """Go on without the images that cannot be read."""
    skip_unlabelled: bool = False
    """Go on without the images that have no label where others have one, instead of without labels."""

    def reading(self) -> dict[str, Any]:
        """The arguments of `load_images` beside the source."""
        names = ("resolution", "skip_corrupt", "skip_unlabelled")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class NetworkConfig:
    """The network; fields are named as EDM names them, None is the architecture's own default."""

    name: str = "ddpmpp"
    """ddpmpp, ncsnpp, adm or edm2."""
    model_channels: int | None = None
    """Channels at the first resolution."""
    channel_mult: tuple[int, ...] | None = None
    """Times as many channels at each resolution, halved from one to the next."""
    num_blocks: int | None = None
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] | None = None
    """Resolutions whose blocks have self-attention."""
    label_dropout: float | None = None
    """Share of the training images whose label is left out."""
    dropout_resolutions: tuple[int, ...] | None = None
    """Drop in the blocks of these resolutions only."""
    fourier_scale: float | None = None
    """Spread of the noise embedding's frequencies (ncsnpp)."""
    augment_dim: int | None = None
    """Inputs for the parameters of augmentations (ddpmpp, ncsnpp, adm); 9 with --edm.augment."""
    channels_per_head: int | None = None
    """Width of an attention head (edm2)."""
    class_conditional: bool = False
    """Train with the data's class labels."""

    def architecture(self) -> dict[str, Any]:
        """The arguments of `build_network` that were given."""
        skip = {"name", "class_conditional"}
        given = {k: v for k, v in vars(self).items() if k not in skip and v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}


@dataclass(frozen=True)
class PhaseConfig:
    """What every training phase has: length, optimizer, EMA."""

    warmup_images: ClassVar[int] = 0  # pre-training alone warms up

    images: int = 0
    """Length of the phase in images."""
    batch_size: int = 512
    """Images per optimizer step, over all ranks and micro-batches."""
    optimizer: Literal["radam", "adam"] = "radam"
    """Which optimizer; without weight decay."""
    lr: float = 1e-4
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the optimizer's first and second moments."""
    decay_start: int | None = None
    """The learning rate falls as 1/sqrt(i) after this many iterations."""
    grad_clip: float | None = None
    """Largest norm of the gradient over all parameters."""
    dropout: float = 0.0
    """Probability with which an element is dropped."""
    ema: tuple[str, ...] = ("constant:0.9999",)
    """EMA of the weights: constant:BETA, halflife:IMAGES or power:GAMMA. The first one is sampled, and the
    next phase starts from it."""

    @property
    def _section(self) -> str:
        """The phase's name, as messages give it."""
        return type(self).__name__.removesuffix("Config").lower()

    def __post_init__(self) -> None:
        name = self._section
        require(self.images >= 0, f"{name}.images: must not be negative, got {self.images}")
        require(self.batch_size >= 1, f"{name}.batch_size: must be positive, got {self.batch_size}")
        require(self.lr > 0, f"{name}.lr: must be positive, got {self.lr}")
        require(0 <= self.dropout < 1, f"{name}.dropout: must lie in [0, 1), got {self.dropout}")
        require(len(self.ema) > 0, f"{name}.ema: needs at least one EMA, got none")


@dataclass(frozen=True)
class EdmConfig(PhaseConfig):
    """Pre-training: denoising at every noise level (Karras et al. 2022)."""

    optimizer: Literal["radam", "adam"] = "adam"
    lr: float = 1e-3
    warmup_images: int = 0  # type: ignore[misc]
    """The learning rate rises linearly over this many images."""
    t_mean: float = -1.2
    """Mean of ln t."""
    t_std: float = 1.2
    """Standard deviation of ln t."""
    learned_variance: bool = False
    """Weight the noise levels by a learned log-variance of the error (EDM2)."""
    augment: float = 0.0
    """Probability of each of EDM's augmentations (small sets: 0.12); needs network.augment_dim = 9."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.augment <= 1, f"edm.augment: must lie in [0, 1], got {self.augment}")


@dataclass(frozen=True)
class DistanceConfig(PhaseConfig):
    """What the phases share whose distance can be the manifold feature distance."""

    distance: str = "huber"
    """Of D(x_t,t) to its target, by its name."""
    features: str = ""
    """File of the feature network for the manifold distance, from `tcm-fast features train`."""
    huber_c: float = 1e-8
    """Constant of the pseudo-Huber distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self._section
        has_rule = type(self).huber_c == 0  # which 0 stands for
        require(
            self.huber_c > 0 or (has_rule and self.huber_c == 0),
            f"{name}.huber_c: must be positive, got {self.huber_c}",
        )
        require(
            self.distance != "manifold" or bool(self.features),
            f"{name}.features: the manifold distance needs a file of tcm-fast features train, got none",
        )
        require(
            self.distance == "manifold" or not self.features,
            f"{name}.features: only the manifold distance has a feature network, got {self.features} "
            f"for distance {self.distance}",
        )


@dataclass(frozen=True)
class ConsistencyConfig(DistanceConfig):
    """What the consistency phases share: which pairs of noise levels, which distance."""

    t_mean: float = -1.1
    """Mean of ln t."""
    t_std: float = 2.0
    """Standard deviation of ln t."""
    distance: Distance = "huber"
    """Of D(x_t,t) to its target: pseudo-Huber of the pixels, or the manifold feature distance (AYT)."""
    weighting: Weighting = "inv_dt"
    """w(t, r) of the loss: 1/dt with dt = t - r, 1/c_out(t)^2, 1/c_out(t), 1/sqrt(dt), or 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self._section
        require(self.t_std > 0, f"{name}.t_std: must be positive, got {self.t_std}")


@dataclass(frozen=True)
class RatioConfig(ConsistencyConfig):
    """What the phases share whose pairs have a ratio r/t that rises in stages."""

    r_min: ClassVar[float] = R_MIN
    q: float = 2.0
    """r/t approaches 1 as 1 - 1/q^(stage+1)."""
    stage_iterations: int = 25_000
    """Iterations of each stage of that schedule."""
    max_ratio: float = 0.999
    """The ratio r/t stops here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self._section
        require(self.q > 1, f"{name}.q: must be greater than 1, got {self.q}")
        require(
            self.stage_iterations >= 1,
            f"{name}.stage_iterations: must be at least 1, got {self.stage_iterations}",
        )
        require(
            0 < self.max_ratio < 1, f"{name}.max_ratio: must lie in (0, 1), got {self.max_ratio}"
        )


@dataclass(frozen=True)
class TargetConfig(RatioConfig):
    """Where x_r lies: on the line from x_t to the image, or to the mean of the images x_t may come from."""

    target: Literal["image", "posterior"] = "image"
    """image: x_r from the image that x_t was made from; posterior: from the posterior mean over that image
    and a bank (SCT)."""
    bank_size: int = 1024
    """Images of that bank, drawn anew for each step; at most the whole set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self._section
        require(self.bank_size >= 2, f"{name}.bank_size: must be at least 2, got {self.bank_size}")


@dataclass(frozen=True)
class EctConfig(TargetConfig):
    """Stage 1: consistency training over all noise levels ("Consistency Models Made Easy")."""

    truncate: bool = True
    """Draw t from [0.002, 80] only, and let r be at least 1e-6; the original ECT does neither."""
    images: int = 350_000 * 512
    dropout: float = 0.2

    @property
    def r_min(self) -> float:  # type: ignore[override]
        """Smallest inner noise level."""
        return R_MIN if self.truncate else 0.0


@dataclass(frozen=True)
class TcmConfig(TargetConfig):
    """Stage 2: truncated consistency training (Lee et al., ICLR 2025). ln t is Student-t distributed
    with location t_mean and scale t_std, truncated to [ln t_prime, ln 80]."""

    lr: float = 5e-5
    batch_size: int = 1024
    images: int = 300_000 * 1024
    dropout: float = 0.2
    t_mean: float = 0.0
    t_std: float = 0.2
    student_t_df: float = 0.01
    """Degrees of freedom of that distribution."""
    t_prime: float = 1.0
    """The student's lowest noise level: below, the frozen stage-1 network is the consistency function."""
    boundary_fraction: float = 0.25
    """Share of the global batch that is put exactly at t_prime, rho."""
    boundary_weight: float = 0.1
    """Weight of the boundary loss, w_b."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            T_MIN <= self.t_prime < T_MAX,
            f"tcm.t_prime: must lie in [{T_MIN:g}, {T_MAX:g}), got {self.t_prime:g}",
        )
        require(
            self.student_t_df > 0, f"tcm.student_t_df: must be positive, got {self.student_t_df}"
        )
        require(
            0 < self.boundary_fraction < 1,
            f"tcm.boundary_fraction: must lie in (0, 1), got {self.boundary_fraction}",
        )
        require(
            self.boundary_weight >= 0,
            f"tcm.boundary_weight: must not be negative, got {self.boundary_weight}",
        )


@dataclass(frozen=True)
class IctConfig(ConsistencyConfig):
    """Improved consistency training (Song & Dhariwal 2023), a baseline: discrete noise levels."""

    images: int = 400_000 * 1024
    batch_size: int = 1024
    dropout: float = 0.3
    s0: int = 10
    """Noise levels at the start."""
    s1: int = 1280
    """Noise levels at the end."""
    huber_c: float = 0.0
    """Constant of the pseudo-Huber distance; 0 is 0.00054 sqrt(C H W)."""


@dataclass(frozen=True)
class CdConfig(RatioConfig):
    """Consistency distillation, a baseline: the pre-trained network takes one Euler step t -> r."""

    images: int = 350_000 * 512
    dropout: float = 0.2


@dataclass(frozen=True)
class CmtConfig(DistanceConfig):
    """Mid-training, between edm and ect: the end of the pre-trained network's ODE from every point of it (Hu
    et al., ICLR 2026)."""

    images: int = 75_000 * 512
    steps: int = 16
    """Steps of the ODE solver from 80 to 0.002: the levels from which the end is learnt."""
    points: int | None = None
    """Samples of a batch that share a trajectory, each with a point of its own (the greatest common divisor
    of this and batch_size); None is all points, which costs least."""
    distance: Literal["pixel", "huber", "manifold"] = "pixel"
    """Between the network's image and the trajectory's end: squared error, pseudo-Huber, or the manifold
    feature distance (AYT)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps >= 1, f"cmt.steps: must be at least 1, got {self.steps}")
        require(
            self.points is None or 1 <= self.points <= self.steps,
            f"cmt.points: must lie in [1, steps = {self.steps}], got {self.points}",
        )

    @property
    def sharing(self) -> int:
        """Samples of a batch that share a trajectory."""
        return math.gcd(self.batch_size, self.points or self.steps)


@dataclass(frozen=True)
class EvalConfig:
    """How samples are evaluated during training."""

    features: str = ""
    """Feature space of the distances: digits, random, efficientnet (the [features] extra), inception:WEIGHTS,
    dinov2:WEIGHTS or a TorchScript file; empty for none."""
    num: int = 0
    """Samples to compare; 0 takes as many as there are reference images."""


@dataclass(frozen=True)
class GuardConfig:
    """What happens where a loss or gradient is NaN or Inf. Such a step changes nothing."""

    bad_steps: int = 20
    """After this many such steps in a row the last good checkpoint is loaded, or the phase begins again
    where there is none yet."""
    rollbacks: int = 3
    """How often that is tried in a phase before the run stops with a diagnosis."""
    lower: Literal["rate", "scale"] = "rate"
    """What is halved then: the learning rate, or the loss scale (fp16)."""

    def __post_init__(self) -> None:
        require(self.bad_steps >= 1, f"guard.bad_steps: must be at least 1, got {self.bad_steps}")
        require(self.rollbacks >= 0, f"guard.rollbacks: must not be negative, got {self.rollbacks}")


@dataclass(frozen=True)
class LogConfig:
    """Where the curves of a run go; RUN/log.jsonl has all numbers anyway."""

    to: tuple[LoggerName, ...] | None = None
    """Any of tensorboard, wandb and trackio; none with an empty list; by default tensorboard where it is
    installed."""
    project: str = "tcm-fast"
    """The project's name at wandb and trackio; a run is called as its folder."""

    def __post_init__(self) -> None:
        to = self.to or ()
        require(len({*to}) == len(to), f"log.to: must name each once, got {', '.join(to)}")


@dataclass(frozen=True)
class Config:
    """A run: data, network, phases and how they are carried out."""

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    edm: EdmConfig = field(default_factory=EdmConfig)
    ect: EctConfig = field(default_factory=EctConfig)
    tcm: TcmConfig = field(default_factory=TcmConfig)
    ict: IctConfig = field(default_factory=IctConfig)
    cd: CdConfig = field(default_factory=CdConfig)
    cmt: CmtConfig = field(default_factory=CmtConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    phases: tuple[PhaseName, ...] = ("edm", "ect", "tcm")
    """Phases to run, in order; each starts from the first EMA of the one before."""
    seed: int = 0
    """Of initial weights, order of images, noise levels, noise and dropout."""
    precision: Precision = "fp32"
    """In which the networks compute; weights and loss are fp32. bf16x3: fp32 convolutions by three bf16
    products, executed in emulation, not yet timed on a GPU."""
    micro_batches: int = 1
    """Cut each rank's share of the batch into this many passes; the result is the same. Doubled where a
    step runs out of memory."""
    memory: Literal["manual", "auto"] = "manual"
    """auto: choose micro_batches, recompute_norms, recompute_blocks and offload so that the run fits, the
    cheapest first."""
    memory_limit: str = ""
    """What auto has to fit into, such as 8GiB; by default the device's memory."""
    recompute_norms: bool = False
    """Activation checkpointing of normalisations and SiLU: they are computed again in the backward pass."""
    recompute_blocks: int | None = None
    """Activation checkpointing of whole blocks, those at this resolution or above."""
    offload: bool = False
    """Keep moments and EMA in the host's memory; they are copied to the device piece by piece."""
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """Memory of the optimizer's moments: bf16 takes half, 8bit a quarter; both are stochastically rounded."""
    max_steps: int | None = None
    """Stop each phase after this many optimizer steps."""
    stop_after: float | None = None
    """Save and stop after so many hours; --resume auto goes on."""
    log_every: int = 50
    """Steps between log lines."""
    save_every: int = 5000
    """Steps between checkpoints."""
    save_minutes: float = 5.0
    """Minutes between checkpoints, where steps are slow; 0 counts steps alone."""
    grid_every: int = 2000
    """Steps between sample grids."""
    snapshot_every: int = 0
    """Steps between snapshots of the power-function EMA, from which `tcm-fast ema` makes EMA of other
    widths; 0 for none."""
    keep_checkpoints: int = 2
    """Checkpoints kept besides the last of each phase."""
    milestone_every: int = 0
    """Steps between checkpoints that are kept for good; 0 for none."""
    keep_best: Literal["", "frechet"] = ""
    """Keep the checkpoint with the smallest Fréchet distance (measured whenever one is saved), too."""
    device: str = "auto"
    """cuda, cpu, or auto: a GPU where there is one."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay a step as one CUDA graph: on is an error where it cannot be, auto then goes without."""
    deterministic: bool = False
    """On a GPU, use algorithms alone that give equal bits in every run, as a CPU does."""
    gradient_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which processes exchange gradients."""
    compile: bool = False
    """Compile the networks with torch.compile around the fused operations: a minute or more before the
    first step."""

    def __post_init__(self) -> None:
        for name in ("micro_batches", "log_every", "save_every", "grid_every", "keep_checkpoints"):
            require(
                getattr(self, name) >= 1, f"{name}: must be at least 1, got {getattr(self, name)}"
            )
        for name in ("snapshot_every", "milestone_every", "save_minutes"):
            require(
                getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}"
            )
        require(
            self.stop_after is None or self.stop_after > 0,
            f"stop_after: must be positive, got {self.stop_after}",
        )
        require(
            self.recompute_blocks is None or self.recompute_blocks >= 1,
            f"recompute_blocks: must be a resolution, got {self.recompute_blocks}",
        )
        if self.memory_limit:
            parse_bytes("memory_limit", self.memory_limit)
        require(
            self.max_steps is None or self.max_steps >= 1,
            f"max_steps: must be at least 1, got {self.max_steps}",
        )
        require(0 <= self.seed < 2**63, f"seed: must lie in [0, 2**63), got {self.seed}")
        require(
            len({*self.phases}) == len(self.phases),
            f"phases: must name each once, got {' '.join(self.phases)}",
        )

    @property
    def is_lean(self) -> bool:
        """Whether any memory optimization that takes time is on."""
        recomputes = self.recompute_norms or self.recompute_blocks is not None
        return recomputes or self.offload or self.micro_batches > 1

    @property
    def folds_rows(self) -> bool:
        """Whether the optimizer may take the gradients of normalised rows as they are: all at once."""
        return not self.offload

    def phase(self, name: str) -> PhaseConfig:
        """The section of a phase."""
        return getattr(self, name)

    def steps(self, name: str) -> int:
        """Optimizer steps of a phase: its images over its batch, cut by max_steps."""
        phase = self.phase(name)
        steps = math.ceil(phase.images / phase.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


def phase_name(name: str) -> PhaseName:
    """A phase's name as one. ValueError for anything else."""
    require(name in PHASES, f"phase: {suggest(name, list(PHASES))}")
    return typing.cast(PhaseName, name)


# ---- files ------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def load_preset(name: str) -> Config:
    """The configuration of a preset. ValueError for an unknown name, with the nearest ones."""
    path = PRESETS / f"{name}.toml"
    if name not in preset_names():
        raise ValueError(f"preset: {suggest(name, preset_names())}, got {name!r}")
    return load_config(path)


def load_config(path: str | Path) -> Config:
    """Read a configuration from TOML, or from the JSON that a run has saved. In TOML, `base = "cifar10"`
    starts from a preset, and the table `[consistency]` holds what ect, tcm and cd have in common."""
    path = Path(path)
    values = _read(path)
    if path.suffix == ".json":
        return from_dict(Config, from_earlier(values))
    values = _by_phase(values)
    while (base := values.pop("base", None)) is not None:
        require(base in preset_names(), f"base: {suggest(str(base), preset_names())}, got {base!r}")
        values = _over(_by_phase(_read(PRESETS / f"{base}.toml")), values)
    return from_dict(Config, values)


def _by_phase(values: dict[str, Any]) -> dict[str, Any]:
    """A file's tables with what `[consistency]` holds in those of the phases, below what they hold."""
    common = values.pop("consistency", {})
    for name in ("ect", "tcm", "cd") if common else ():
        values[name] = _over(common, values.get(name, {}))
    return values


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"config: no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} cannot be read: {error}") from None


def _over(below: Any, above: Any) -> Any:
    """Two tables as one: what is above counts, table by table."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


RENAMED = {
    "max_hours": "stop_after", "keep": "keep_checkpoints", "best": "keep_best", "double": "stage_iterations",
    "limit": "max_ratio", "c": "huber_c", "df": "student_t_df", "rho": "boundary_fraction",
}  # fmt: skip
"""Fields of a run or a phase that had other names in earlier versions."""

NO_EFFECT = object()
GONE: dict[str, Any] = {
    "engine": "ddp", "gradients": "fp32", "guard.factor": 0.5, "guard.spike": 10.0, "tcm.truncate": NO_EFFECT,
    "cd.truncate": True,
    **{f"ict.{name}": NO_EFFECT for name in ("q", "stage_iterations", "max_ratio", "truncate", "r_min")},
    **{f"{name}.warmup_images": 0 for name in PHASES if name != "edm"},
    **{
        f"{name}.{field}": value
        for name in PHASES
        for field, value in {
            "weight_norm": "exact", "eps": 1e-8, "weight_decay": 0.0, "t_min": T_MIN, "t_max": T_MAX,
        }.items()
    },
}  # fmt: skip
"""Fields of earlier versions that are gone, and the value of each that is still what happens."""


def from_earlier(values: Any) -> Any:
    """What an earlier version saved, as this one reads it. ValueError for what is no longer supported."""
    if not isinstance(values, dict):
        return values
    values = {
        RENAMED.get(key, key): {RENAMED.get(k, k): v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in values.items()
    }
    if values.get("memory") == "given":
        values["memory"] = "manual"
    phases = {name: values[name] for name in PHASES if isinstance(values.get(name), dict)}
    gone = dict(GONE)
    for name in {*phases} - {"ict"}:  # the original ECT's two differences are one option now
        gone[f"{name}.r_min"] = R_MIN if phases[name].get("truncate", True) else 0.0
    moments = {name: table.pop("moments") for name, table in phases.items() if "moments" in table}
    if moments:
        used = values.get("phases", PHASES)
        values["moments"], *others = dict.fromkeys(moments.get(n, "fp32") for n in used)
        require(not others, f"moments: must be the same in all phases, got {moments}")
    for path, kept in gone.items():
        section, _, name = path.rpartition(".")
        table = values.get(section) if section else values
        if not isinstance(table, dict) or name not in table:
            continue
        value = table.pop(name)
        require(
            kept is NO_EFFECT or value == kept,
            f"{path}: must be {kept!r}, what else there was is no longer supported, got {value!r}",
        )
    return values


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as JSON; `--config` reads it back."""
    path.write_text(json.dumps(to_dict(config), indent=1) + "\n", encoding="utf-8")


def changes(before: dict[str, Any], after: dict[str, Any], where: str = "") -> list[str]:
    """The fields in which two saved configurations differ: "tcm.lr 5e-05 -> 0.0001"."""
    found = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{where}{name}.")
        elif json.dumps(old) != json.dumps(new):  # which knows no tuples
            found.append(f"{where}{name} {old} -> {new}")
    return sorted(found)


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """Build a configuration dataclass from nested dictionaries; ValueError for an unknown key (with
    the nearest name) or a value of the wrong kind."""
    label = where.rstrip(".") or "config"
    if not isinstance(values, dict):
        raise ValueError(f"{label}: must be a table of fields, got {values!r}")
    kinds = typing.get_type_hints(cls)
    hints = {field.name: kinds[field.name] for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{where}{key}: {suggest(key, list(hints))}")
        arguments[key] = _convert(hints[key], value, f"{where}{key}")
    return cls(**arguments)


def suggest(name: str, known: list[str]) -> str:
    """'unknown, did you mean x' (or all that is known, where nothing is near)."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return (
        f"unknown, did you mean {near[0]!r}" if near else f"unknown, use one of {', '.join(known)}"
    )


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, f"{where}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        require(value in args, f"{where}: must be one of {', '.join(args)}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where}: must be a list, got {value!r}")
        if args[-1] is not Ellipsis:
            require(len(value) == len(args), f"{where}: needs {len(args)} values, got {len(value)}")
        return tuple(_convert(args[0], v, where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    require(is_right, f"{where}: must be of type {kind.__name__}, got {value!r}")
    return value
