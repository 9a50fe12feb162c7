"""Our networks in the folders of Hugging Face's diffusers (the [diffusers] extra), and back into images.

    save_folder(net, "folder")
    pipeline = TruncatedConsistencyPipeline.from_pretrained("folder")
    image = pipeline(class_labels=[3], seed=7).images[0]

An ADM network becomes a plain `UNet2DModel`, which diffusers loads by itself; DDPM++, NCSN++ and EDM2
have parts that UNet2DModel lacks and are loaded by this package. No folder holds code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcm_fast.kernels.precondition import denoise, preconditioning
from tcm_fast.networks import Precond, build_network
from tcm_fast.networks.adm import DhariwalUNet
from tcm_fast.sampling.sampler import sample

try:
    from diffusers import (
        ConfigMixin,
        DiffusionPipeline,
        ImagePipelineOutput,
        ModelMixin,
        UNet2DModel,
    )
    from diffusers.configuration_utils import register_to_config
except ImportError as error:
    raise ModuleNotFoundError(
        f"diffusers: needs the package diffusers ({error}): pip install 'tcm-fast[diffusers]'"
    ) from None


class TruncatedConsistencyUNet(ModelMixin, ConfigMixin):
    """One of our networks as a model of diffusers. spec: arguments of `build_network`."""

    @register_to_config
    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        self.net = build_network(**spec)

    def forward(
        self, sample: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """D(x, sigma), [N,C,H,W]; class_labels one-hot."""
        return self.net(sample, sigma, class_labels)


class UNet2DDenoiser(nn.Module):
    """D(x, t, labels) from a UNet2DModel that computes F(c_in x, ln(t)/4)."""

    def __init__(self, unet: Any, sigma_data: float):
        super().__init__()
        self.unet, self.sigma_data = unet, sigma_data
        self.img_resolution = unet.config.sample_size
        self.img_channels = unet.config.in_channels
        self.label_dim = unet.config.num_class_embeds or 0

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        c_in = preconditioning(t, self.sigma_data)[2]
        classes = None if labels is None else labels.argmax(1)
        output = self.unet(c_in * x, t.log() / 4, class_labels=classes).sample
        return denoise(output, x, t, self.sigma_data)


class TruncatedConsistencyPipeline(DiffusionPipeline):
    """Samples as `tcm_fast.sample` does: the same images for the same seed and numbers.

    Args:
        unet: a TruncatedConsistencyUNet, or the UNet2DModel of an ADM network.
        sigma_data: standard deviation of the data.
        phase, t_prime: of the network's training; a truncated network takes no times below t_prime.
    """

    def __init__(
        self,
        unet: Any,
        sigma_data: float = 0.5,
        phase: str | None = None,
        t_prime: float | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(sigma_data=sigma_data, phase=phase, t_prime=t_prime)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        class_labels: int | Sequence[int] | None = None,
        seed: int = 0,
        start: int = 0,
        timesteps: Sequence[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images number start, start + 1, ... of a seed, as `output_type` "pil", "np" (uint8
        [n,H,W,C]) or "pt" (the same as a tensor). `num_inference_steps` None is what is usual, 1;
        `timesteps` are the noise levels after the first."""
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: must be pil, np or pt, got {output_type}")
        net: Any = self.unet
        if isinstance(net, TruncatedConsistencyUNet):
            net = net.net
        else:
            net = UNet2DDenoiser(net, self.config.sigma_data)
        net.info = {"phase": self.config.phase, "t_prime": self.config.t_prime}
        found = sample(
            net, batch_size, steps=num_inference_steps, seed=seed, labels=class_labels,
            times=timesteps, start=start, device=self.device,
        )  # fmt: skip
        images: Any = found if output_type == "pt" else found.numpy()
        if output_type == "pil":
            from PIL import Image

            images = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
                      for image in images]  # fmt: skip
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def save_folder(net: Precond, folder: str | Path) -> str:
    """Write a network as a diffusers pipeline. Returns the name of the model's class.

    Raises:
        FileExistsError: the folder is there and not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"convert: the folder {folder} is there already and not empty")
    info = getattr(net, "info", {})
    unet = as_unet2d(net)
    if unet is None:
        unet = TruncatedConsistencyUNet(spec=net.spec)
        unet.net.load_state_dict(net.state_dict())
    pipeline = TruncatedConsistencyPipeline(
        unet, sigma_data=net.sigma_data, phase=info.get("phase"), t_prime=info.get("t_prime")
    )
    pipeline.save_pretrained(folder)
    return type(unet).__name__


# ---- ADM as UNet2DModel ---------------------------------------------------------------------------

PARTS = {  # of a block: ours -> diffusers'
    "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2",
    "conv1": "conv2", "skip": "conv_shortcut",
}  # fmt: skip


def as_unet2d(net: Precond) -> Any | None:
    """A UNet2DModel that computes what an ADM network does, or None where its architecture differs."""
    spec = net.spec
    is_adm = isinstance(net.model, DhariwalUNet)
    if not is_adm or spec["channel_mult"][0] != 1 or spec["channel_mult_emb"] != 4:
        return None
    widths = [spec["model_channels"] * mult for mult in spec["channel_mult"]]
    if min(widths) < 128:  # diffusers has one number of groups for all widths
        return None
    resolutions = [net.img_resolution >> level for level in range(len(widths))]
    has_attention = [res in spec["attn_resolutions"] for res in resolutions]
    down = ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in has_attention]
    up = ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(has_attention)]
    unet = UNet2DModel(
        sample_size=net.img_resolution, in_channels=net.img_channels, out_channels=net.img_channels,
        time_embedding_type="positional", freq_shift=0, flip_sin_to_cos=True,
        down_block_types=tuple(down), up_block_types=tuple(up), block_out_channels=tuple(widths),
        layers_per_block=spec["num_blocks"], downsample_type="resnet", upsample_type="resnet",
        dropout=spec["dropout"], attention_head_dim=64, norm_num_groups=32, attn_norm_num_groups=32,
        norm_eps=1e-5, resnet_time_scale_shift="scale_shift", num_class_embeds=net.label_dim or None,
    )  # fmt: skip
    unet.load_state_dict(_unet2d_state(net))
    return unet.eval()


def _unet2d_state(net: Precond) -> dict[str, torch.Tensor]:
    """The weights of an ADM network by the names that UNet2DModel has for them."""
    network = net.model
    assert isinstance(network, DhariwalUNet)
    paths = {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2",
             "out_norm": "conv_norm_out", "out_conv": "conv_out", network.stem: "conv_in"}  # fmt: skip
    blocks = {}  # ours -> (diffusers' residual block, its attention)
    for path, at in network.places.items():
        up = len(net.spec["channel_mult"]) - 1 - at.level
        side = f"down_blocks.{at.level}" if at.side == "enc" else f"up_blocks.{up}"
        blocks[path] = {
            "down": (f"down_blocks.{at.level - 1}.downsamplers.0", ""),
            "up": (f"up_blocks.{up - 1}.upsamplers.0", ""),
            "in": (f"mid_block.resnets.{at.index}", "mid_block.attentions.0"),
            "block": (f"{side}.resnets.{at.index}", f"{side}.attentions.{at.index}"),
        }[at.kind]
    state = {}
    for full, value in network.state_dict().items():
        path, _, leaf = full.rpartition(".")
        block, _, part = path.rpartition(".")
        if full == "map_label.weight":
            state["class_embedding.weight"] = value.T.contiguous()
        elif path == "map_augment":  # computes nothing without augmentation
            continue
        elif path in paths:
            state[f"{paths[path]}.{leaf}"] = value
        elif part in PARTS:
            state[f"{blocks[block][0]}.{PARTS[part]}.{leaf}"] = value
        elif part == "qkv":
            for name, share in zip("qkv", value.unflatten(0, (-1, 3)).unbind(1), strict=True):
                state[f"{blocks[block][1]}.to_{name}.{leaf}"] = _as_linear(share)
        else:
            theirs = {"norm2": "group_norm", "proj": "to_out.0"}[part]
            state[f"{blocks[block][1]}.{theirs}.{leaf}"] = _as_linear(value)
    return {name: value.clone() for name, value in state.items() if "resample_filter" not in name}


def _as_linear(value: torch.Tensor) -> torch.Tensor:
    """The weight of a 1x1 convolution as that of a linear layer; a bias as it is."""
    return value.flatten(1) if value.ndim == 4 else value
