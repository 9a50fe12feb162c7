"""The arguments of `build_network` from a network's names and shapes. What leaves no trace there, dropout
and the like, comes from the constructor's arguments that a snapshot records."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tcm_fast.interchange.foreign import Found
from tcm_fast.interchange.safe_pickle import Refused, shown
from tcm_fast.interchange.torch_format import FileTensor

OTHER_PRECONDITIONING = ("VPPrecond", "VEPrecond", "iDDPMPrecond")


def architecture(found: Found) -> dict[str, Any]:
    """The arguments of `build_network` for a network, from its names and shapes and its options.

    Raises:
        Refused: the network is not one of ours; the message says by what.
    """
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    if found.preconditioning in OTHER_PRECONDITIONING:
        raise Refused(
            f"its preconditioning is {found.preconditioning}; only EDM's is supported, of which EDM has "
            "published a network for each of its data sets"
        )
    stems = [
        m for name in shapes if (m := re.fullmatch(r"model\.enc\.(\d+)x\1_conv\.weight", name))
    ]
    if len(stems) != 1 or len(shapes[stems[0][0]]) != 4:
        raise Refused("its network has no first convolution model.enc.RxR_conv.weight")
    resolution = int(stems[0][1])
    is_edm2 = any(name.endswith(".conv_res0.weight") for name in shapes)
    levels = _levels(shapes, resolution, "conv_res1" if is_edm2 else "conv1")
    attention = "attn_qkv" if is_edm2 else "qkv"
    spec: dict[str, Any] = {
        "img_resolution": resolution,
        "img_channels": shapes[stems[0][0]][1] - is_edm2,
        "sigma_data": float(_number(found.options, "sigma_data", 0.5)),
        "num_blocks": levels[0].blocks,
        "attn_resolutions": [
            level.resolution
            for level in levels
            if f"model.enc.{level.name}_block0.{attention}.weight" in shapes
        ],
        "dropout": float(_number(found.options, "dropout", 0.0)),
    }
    if len({level.blocks for level in levels}) > 1:
        raise Refused("its levels have different numbers of blocks")
    spec |= (_edm2 if is_edm2 else _edm)(found, shapes, levels, shapes[stems[0][0]][0])
    rates = _option(found.options, "dropout_resolutions", "dout_resolutions")
    if rates is not None:
        known = [level.resolution for level in levels]
        spec["dropout_resolutions"] = [res for res in _whole_numbers(rates) if res in known]
    spec["label_dropout"] = float(_number(found.options, "label_dropout", 0.0))
    for name in ("img_resolution", "img_channels", "label_dim"):
        recorded = found.options.get(name, spec[name])
        if recorded != spec[name]:
            raise Refused(
                f"{name} is {shown(recorded)} by its arguments, {spec[name]} by its weights"
            )
    return spec


@dataclass(frozen=True)
class _Level:
    resolution: int
    blocks: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.resolution}x{self.resolution}"


def _levels(shapes: Mapping[str, tuple], resolution: int, last: str) -> list[_Level]:
    """The levels of the encoder, whose blocks end in the convolution `last`."""
    levels = []
    while True:
        name = f"{resolution}x{resolution}"
        blocks = 0
        while f"model.enc.{name}_block{blocks}.{last}.weight" in shapes:
            blocks += 1
        if blocks == 0:
            break
        width = shapes[f"model.enc.{name}_block0.{last}.weight"][0]
        levels.append(_Level(resolution, blocks, width))
        resolution //= 2
    if not levels:
        raise Refused("its encoder has no blocks")
    return levels


def _edm(
    found: Found, shapes: Mapping[str, tuple], levels: list[_Level], stem: int
) -> dict[str, Any]:
    """What DDPM++, NCSN++ and ADM have."""
    foreign = [n for n in shapes if re.search(r"_aux_(up|down|skip)\.|map_noise\.scale|_r\.", n)]
    if foreign:
        raise Refused(f"its network has a part that ours lack, {shown(foreign[0])}")
    for name in ("map_layer0", "map_layer1"):
        if len(shapes.get(f"model.{name}.weight", ())) != 2:
            raise Refused(f"its network has no model.{name}.weight")
    embedding, noise = shapes["model.map_layer0.weight"]
    is_adm = "model.out_norm.weight" in shapes
    model_channels = noise if is_adm else stem
    spec = {
        "name": "adm",
        "label_dim": shapes.get("model.map_label.weight", (0, 0))[1],
        "augment_dim": shapes.get("model.map_augment.weight", (0, 0))[1],
        "model_channels": model_channels,
        "channel_mult": _multiples([level.width for level in levels], model_channels),
        "channel_mult_emb": _multiples([embedding], model_channels)[0],
    }
    if is_adm:
        return spec
    is_fourier = "model.map_noise.freqs" in shapes
    is_residual = any("_aux_residual." in name for name in shapes)
    taps = next(
        (t for name, t in found.tensors.items() if name.endswith("_down.conv0.resample_filter")),
        None,
    )
    return spec | {
        "name": "ncsnpp" if is_fourier or is_residual else "ddpmpp",
        "embedding_type": "fourier" if is_fourier else "positional",
        "channel_mult_noise": _multiples([noise], model_channels)[0],
        "encoder_type": "residual" if is_residual else "standard",
        "resample_filter": [1, 1] if taps is None else _taps(taps),
    }


def _edm2(
    found: Found, shapes: Mapping[str, tuple], levels: list[_Level], stem: int
) -> dict[str, Any]:
    """What EDM2's networks have."""
    fixed = {"res_balance": 0.3, "attn_balance": 0.3, "concat_balance": 0.5, "label_balance": 0.5,
             "clip_act": 256, "resample_filter": [1, 1]}  # fmt: skip
    for name, value in fixed.items():
        if found.options.get(name, value) != value:
            raise Refused(f"its {name} is {shown(found.options[name])}, ours {value}")
    if "model.emb_fourier.freqs" not in shapes or "model.emb_noise_r.weight" in shapes:
        raise Refused("its embedding of the noise level is not EDM2's")
    widths = [level.width for level in levels]
    model_channels = math.gcd(*widths)
    recorded = found.options.get("model_channels", model_channels)
    if type(recorded) is int and recorded > 0 and all(width % recorded == 0 for width in widths):
        model_channels = recorded
    spec = {
        "name": "edm2",
        "label_dim": shapes.get("model.emb_label.weight", (0, 0))[1],
        "model_channels": model_channels,
        "channel_mult": _multiples(widths, model_channels),
        "channels_per_head": int(_number(found.options, "channels_per_head", 64)),
    }
    if "logvar_linear.weight" in shapes and "logvar_fourier.freqs" in shapes:
        spec["logvar_channels"] = shapes["logvar_linear.weight"][1]
    return spec


def _multiples(widths: list[int], unit: int) -> list[int]:
    if unit < 1 or any(width % unit for width in widths):
        raise Refused(f"its widths {widths} are no multiples of {unit}")
    return [width // unit for width in widths]


def _taps(tensor: FileTensor) -> list[int]:
    """The taps of a resampling filter, which is kept as their normalised outer product [1,1,k,k]."""
    if len(tensor.shape) != 4 or tensor.shape[2] != tensor.shape[3] or tensor.shape[2] > 16:
        raise Refused(f"a resampling filter is {list(tensor.shape)}")
    taps = tensor.load().double()[0, 0].diagonal().clamp(min=1e-12).sqrt()
    return [max(1, min(round(tap), 1000)) for tap in (taps / taps.min()).nan_to_num(1.0).tolist()]


def _option(options: Mapping[str, Any], *names: str) -> Any:
    return next((options[name] for name in names if options.get(name) is not None), None)


def _number(options: Mapping[str, Any], name: str, default: float) -> float:
    value = options.get(name, default)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"its argument {name} is {shown(value)}, not a number")
    return value


def _whole_numbers(value: Any) -> list[int]:
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        raise Refused(f"a list of resolutions is {shown(value)}")
    return list(value)
