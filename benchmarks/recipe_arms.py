"""The arms of `recipe_study`: which trainings, from which network, on what, and what arithmetic they take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tcm_fast.config import PHASES, Config, load_preset, phase_name
from tcm_fast.evaluation.metrics import FRECHET, KERNEL
from tcm_fast.objectives import OBJECTIVES, is_consistency
from tcm_fast.objectives.noise_levels import IMAGE

FEATURES = tuple(f"{phase}.features" for phase in PHASES)
OWN = ("stop_after", "data.source", *FEATURES)  # where a run may differ from the table


@dataclass(frozen=True)
class Setting:
    """What arms are trained on and judged by: images, network, features."""

    title: str
    features: str
    """As --eval.features."""
    resolution: int | None = None
    """Of CIFAR-10; None is the built-in digits."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration, by their dotted names, other than in `BASE`."""
    metric: str = KERNEL
    """The distance to go by."""
    num: int = 500
    """Samples of a set."""
    sets: int = 2
    feature_images: int = 64_000
    """Length of the training of the manifold distance's feature network."""


@dataclass(frozen=True)
class Arm:
    """A training: phases from the network of another arm of the same setting."""

    setting: str
    name: str
    label: str
    """For people."""
    images: Mapping[str, int]
    """Of each phase, in order."""
    after: str = ""
    """The arm whose network the first phase starts from."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """As those of a setting."""
    against: str = ""
    """The arm of equal arithmetic that this one is compared with."""
    teacher: Mapping[str, float] = field(default_factory=dict)
    """By phase: passes of a teacher for each image, which plans do not know of."""
    denoises: bool = False
    """Whether one-call denoising over the noise level is measured, too."""
    table: str = ""
    """Key of `TABLES` where it is not in the first table of its setting."""

    def __post_init__(self) -> None:
        for phase in self.images:
            phase_name(phase)

    @property
    def feature_fields(self) -> tuple[str, ...]:
        """Those of `changes` that name the file for the manifold distance."""
        return tuple(name for name in self.changes if name in FEATURES)


BASE: dict[str, Any] = {
    "network.model_channels": 16,
    "network.attn_resolutions": (),
    "network.class_conditional": False,
    "eval.features": "",
    "log.to": (),
    "save_every": 10**9,
    "grid_every": 10**9,
    "keep_checkpoints": 1,
    "edm.batch_size": 64,
    "edm.dropout": 0.0,
} | {
    f"{phase}.{name}": value
    for phase in ("ect", "tcm")
    for name, value in {"batch_size": 64, "dropout": 0.0, "stage_iterations": 60}.items()
}
"""The digits' recipe with a narrower network and smaller batches, as fits minutes of one CPU core."""

SETTINGS = {
    "digits": Setting("digits, 8×8", "digits", metric=FRECHET, num=899, sets=3),
    "cifar16": Setting("CIFAR-10 at 16×16", "efficientnet", 16),
    "cifar16-classes": Setting(
        "CIFAR-10 at 16×16 by class", "efficientnet", 16, {"network.class_conditional": True}
    ),
    "cifar8": Setting("CIFAR-10 at 8×8", "efficientnet", 8),
}
PRETRAINING, STAGE = 48_000, 20_000  # images


def beginning(setting: str) -> Iterator[Arm]:
    """Pre-training and stage 1."""
    yield Arm(setting, "pretrained", "pre-training, 18 Heun steps", {"edm": PRETRAINING})
    yield Arm(setting, "stage1", "stage 1", {"ect": STAGE}, "pretrained", denoises=True)


def short(setting: str) -> Iterator[Arm]:
    """Stage 2, and stage 1 continued instead."""
    yield Arm(setting, "continued", "stage 1 continued", {"ect": STAGE}, "stage1", {"seed": 1000})
    label = "stage 2, t′ = 1, scale 0.2"
    yield Arm(setting, "stage2", label, {"tcm": STAGE}, "stage1", against="continued")


def long(setting: str) -> Iterator[Arm]:
    """The same from a stage 1 of twice the length, and for twice the length."""
    images = 2 * STAGE
    yield Arm(
        setting, "continued-long", "stage 1 of twice the length, continued", {"ect": images},
        "continued", {"seed": 2000},
    )  # fmt: skip
    yield Arm(
        setting, "stage2-long", "stage 2 of twice the length, after that stage 1", {"tcm": images},
        "continued", against="continued-long",
    )  # fmt: skip


def truncations(setting: str) -> Iterator[Arm]:
    """Stage 2 for other t' and other widths of the law of ln t around ln t'; t' = 1 and 0.2 is `short`'s."""
    for t_prime, scale in ((0.5, 1.0), (0.25, 1.0), (0.5, 0.2), (1.0, 1.0), (0.25, 0.2)):
        law = {"tcm.t_prime": t_prime, "tcm.t_mean": float(np.log(t_prime)), "tcm.t_std": scale}
        yield Arm(
            setting, f"t{t_prime:g}-scale{scale:g}", f"stage 2, t′ = {t_prime:g}, scale {scale:g}",
            {"tcm": STAGE}, "stage1", law, against="stage2", table="laws",
        )  # fmt: skip


FLOWS = {"ect": "", "ect-tcm": "ect", "cmt-ect": "ect", "cmt-tcm": "ect-tcm"}
"""Phases that share a budget, and the flow that each is compared with."""
ADD_ONS: dict[str, tuple[dict[str, Any], float]] = {
    "": ({}, 0.0),
    "manifold distance": ({"distance": "manifold", "features": "to be made"}, 0.41),
    "posterior targets": ({"target": "posterior"}, 0.09),
}
"""What changes in `ect` and `tcm`, and passes for each image, counted in multiplications of the network at
16x16: two passes of the features and a gradient to the image by 0.136 each; the two products of a bank of
1,024 images."""


def add_ons(setting: str, batch: int) -> Iterator[Arm]:
    """Flows of `STAGE` images in batches of a size, with and without the add-ons, whose own arithmetic means
    fewer images; so does cmt's, each of whose targets takes a pass. After it the gap is at its smallest at
    once."""
    for add_on, (values, passes) in ADD_ONS.items():
        for flow, beside in FLOWS.items():
            phases = flow.split("-")
            share = STAGE / len(phases) * (14 / 15 if "cmt" in phases else 1)
            images, teacher = dict.fromkeys(phases, int(share)), {"cmt": 1.0}
            changes: dict[str, Any] = {f"{phase}.batch_size": batch for phase in phases}
            for phase in phases:
                if phase != "cmt":
                    images[phase], teacher[phase] = int(share / (1 + passes / 4)), passes
                    own = {"stage_iterations": 60 * 64 // batch, **values}
                    own |= {"q": 4096.0} if "cmt" in phases else {}
                    changes |= {f"{phase}.{name}": value for name, value in own.items()}
            against = f"{flow if add_on else beside}-{batch}" if add_on or beside else ""
            yield Arm(
                setting, "-".join(filter(None, (flow, str(batch), add_on.split(" ")[0]))),
                ", ".join(filter(None, (flow.replace("-", " → "), add_on))), images, "pretrained", changes,
                against, teacher, table=f"batch-{batch}",
            )  # fmt: skip


TABLES = {
    "laws": "Other t′ and other widths of the law of ln t, from the same stage-1 networks:",
    "batch-128": "Cheaper training, batches of 128, from the pre-trained networks:",
    "batch-32": "Cheaper training, batches of 32, from the pre-trained networks:",
}
"""Heads of the tables of a setting but the first."""

BLOCKS: tuple[tuple[Arm, ...], ...] = (
    (*beginning("digits"), *short("digits"), *truncations("digits")),
    (*beginning("cifar16"), *short("cifar16")),
    (*truncations("cifar16"),),
    (*add_ons("cifar16", 32), *add_ons("cifar16", 128)),
    (*long("cifar16"),),
    (*beginning("cifar16-classes"), *short("cifar16-classes")),
    (*long("cifar16-classes"),),
    (*beginning("cifar8"), *short("cifar8"), *truncations("cifar8")),
)
"""In the order in which they are trained, each seed by seed: an arm after the one that it starts from. A line
more is an arm more; `changes` takes any field of the configuration, `images` any phase."""
ARMS = tuple(itertools.chain(*BLOCKS))


def with_changes(config: Any, values: Mapping[str, Any]) -> Any:
    """A configuration with other values of fields by their dotted names, those of a section at once."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        section, _, rest = name.partition(".")
        if not hasattr(config, section):
            raise ValueError(f"changes: the configuration has no field {name}")
        if rest:
            changed.setdefault(section, {})[rest] = value
        else:
            changed[section] = value
    for section in {name.partition(".")[0] for name in values if "." in name}:
        changed[section] = with_changes(getattr(config, section), changed[section])
    return replace(config, **changed)


@dataclass(frozen=True)
class Table:
    """Arms and their settings, and what follows from them."""

    blocks: tuple[tuple[Arm, ...], ...] = BLOCKS
    settings: Mapping[str, Setting] = field(default_factory=lambda: SETTINGS)

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(itertools.chain(*self.blocks))

    def find(self, setting: str, name: str) -> Arm:
        return next(a for a in self.arms if (a.setting, a.name) == (setting, name))

    def order(self, seeds: int) -> Iterator[tuple[Arm, int]]:
        """What is trained when."""
        for block in self.blocks:
            yield from ((arm, seed) for seed in range(seeds) for arm in block)

    def before(self, arm: Arm) -> Arm | None:
        """The arm that it starts from."""
        return self.find(arm.setting, arm.after) if arm.after else None

    def config(self, arm: Arm, seed: int, source: str = "", features: str = "") -> Config:
        """The configuration that an arm is trained with, `features` the file for the manifold distance.
        A seed of `changes` is added: stage 1 continued must not see the same noise again."""
        values = {**BASE, **self.settings[arm.setting].changes, **arm.changes}
        if features:
            values |= dict.fromkeys(arm.feature_fields, features)
        values |= {f"{phase}.images": images for phase, images in arm.images.items()}
        values |= {"seed": seed + values.get("seed", 0), "phases": tuple(arm.images)}
        return with_changes(load_preset("digits"), values | {"data.source": source})

    def passes(self, arm: Arm) -> int:
        """Arithmetic of an arm and of all that came before it, in network passes × images: forward 1,
        backward 2, and 1 for every target that a network computes, by the plans of the steps (of seed 0:
        others differ by little)."""
        before = self.before(arm)
        total = self.passes(before) if before else 0
        config, iteration = self.config(arm, 0), self._iterations_before(arm)
        for phase in arm.images:
            own, steps, objective = config.phase(phase), config.steps(phase), OBJECTIVES[phase]
            total += round((3 + arm.teacher.get(phase, 0)) * steps * own.batch_size)
            for step in range(steps if objective.is_consistency else 0):
                plan = objective.plan(
                    own, seed=0, images_seen=step * own.batch_size, iteration=iteration + step,
                    iterations=steps,
                )  # fmt: skip
                total += int((plan.source != IMAGE).sum())
            iteration += steps if objective.is_consistency else 0
        return total

    def _iterations_before(self, arm: Arm) -> int:
        """Steps of consistency phases before it, from which schedules count on."""
        before = self.before(arm)
        if before is None:
            return 0
        config = self.config(before, 0)
        own = sum(config.steps(phase) for phase in before.images if is_consistency(phase))
        return own + self._iterations_before(before)

    def shortened(self) -> Table:
        """The same arms on next to nothing, for trying the command."""
        few = {"features": "random", "num": 16, "sets": 2, "feature_images": 256}
        blocks = (
            tuple(replace(arm, images=dict.fromkeys(arm.images, 128)) for arm in block)
            for block in self.blocks
        )
        return Table(tuple(blocks), {name: replace(s, **few) for name, s in self.settings.items()})
