"""The denoiser D around a raw network F: EDM's preconditioning (Karras et al. 2022, table 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tcm_fast.kernels._triton import runs_triton
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.precondition import denoise, preconditioning
from tcm_fast.networks.by_sample import by_sample
from tcm_fast.networks.layers import without_autocast
from tcm_fast.networks.mp_layers import MPConv, MPFourier
from tcm_fast.networks.raw_network import RawNetwork


class Precond(nn.Module):
    """D(x,t) = c_skip(t) x + c_out(t) F(c_in(t) x, ln(t)/4), with F owned as `.model`.

    Args:
        model: raw network, called as model(x, c_noise, labels, dropout_key=key).
        img_resolution, img_channels: height and width, and channels, of the images.
        label_dim: number of classes, 0 for an unconditional network.
        sigma_data: standard deviation of the data.
        logvar_channels: width of EDM2's learned log-variance u(t) of pre-training, 0 for none.
        spec: JSON-able arguments with which `build_network(**spec)` builds an equal module.
    """

    info: dict[str, Any]
    """What a loaded or trained network's file says of its training; absent from a fresh network."""

    def __init__(
        self,
        model: RawNetwork,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = 0.5,
        logvar_channels: int = 0,
        spec: dict[str, Any],
    ):
        super().__init__()
        self.model = model
        self.logvar_fourier: MPFourier | None = None
        if logvar_channels:
            self.logvar_fourier = MPFourier(logvar_channels)
            self.logvar_linear = MPConv(logvar_channels, 1)
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.sigma_data, self.spec = label_dim, sigma_data, spec

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        augment_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
    ) -> torch.Tensor:
        """The denoised images D [N,C,H,W], fp32 (float64 for a float64 network).

        Args:
            x: noisy images [N,C,H,W], any floating dtype.
            t: noise levels (standard deviations) [N], positive.
            labels: one-hot classes [N,label_dim]; required by a class-conditional network.
            augment_labels: parameters of each image's augmentation [N,augment_dim]; None is no
                augmentation.
            dropout_key: keys the dropout masks in train mode; None draws a fresh one.

        Raises:
            ValueError: shapes that do not fit, labels missing or not expected.
        """
        self._check(x, t, labels)
        dtype = torch.promote_types(self._weights_dtype, torch.float32)
        x, t = x.to(dtype), t.to(dtype)
        c_in = preconditioning(t, self.sigma_data)[2]
        output = self.raw(
            c_in * x, t, labels, augment_labels=augment_labels, dropout_key=dropout_key
        )
        return denoise(output, x, t, self.sigma_data)

    def raw(
        self,
        x_in: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        augment_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
        weights: dict[str, torch.Tensor] | None = None,
        with_ones: bool = False,
    ) -> torch.Tensor:
        """The network's own output F(x_in, ln(t)/4), x_in = c_in(t) x, in the dtype that its
        convolutions compute in; otherwise as `forward`. `with_ones`: x_in has a channel of ones behind it,
        for a `model` that takes one (`takes_ones`).

        `weights` replace parameters and buffers of `model` by name (`precision.cast_weights`); x_in then
        has the dtype to compute in."""
        output, _ = self._raw(
            x_in, t, labels, without=None, augment_labels=augment_labels, dropout_key=dropout_key,
            weights=weights, with_ones=with_ones,
        )  # fmt: skip
        return output

    def raw_and_bias(
        self,
        x_in: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`raw` without the last convolution's bias, and the bias, fp32 [N,C], for whoever reads F next
        (`consistency_loss`): on a GPU a convolution adds it in a pass of its own. Elsewhere, and where there
        is none, `raw` and None."""
        layer, _, leaf = self.model.last_bias.rpartition(".")
        own = self.model.get_submodule(layer)._parameters.get(leaf) if layer else None
        if own is None or not runs_triton("consistency_loss", x_in.device.type):
            return self.raw(x_in, t, labels, **options), None
        return self._raw(x_in, t, labels, without=own, **options)

    def _raw(
        self,
        x_in: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        without: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
        weights: dict[str, torch.Tensor] | None = None,
        with_ones: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """F, and the bias [N,C] of its last convolution that F is `without`, or None."""
        assert not with_ones or self.model.takes_ones
        self._check(x_in, t, labels, channels=self.img_channels + with_ones)
        x_in = x_in if weights is not None else x_in.to(self._weights_dtype)
        c_noise = t.to(torch.promote_types(x_in.dtype, torch.float32)).log() / 4
        inputs: tuple[Any, ...] = (x_in, c_noise, labels)
        options: dict[str, Any] = {"dropout_key": dropout_key}
        if augment_labels is not None:
            self._check_augmentation(augment_labels, x_in.shape[0])
            options["augment_labels"] = augment_labels
        name, bias = self.model.last_bias, None
        expanded = by_sample(self.model, x_in, [] if without is None else [name])
        given: dict[str, torch.Tensor | None] = {**(weights or {}), **expanded}
        if without is not None:
            wide = without.to(torch.promote_types(without.dtype, torch.float32))
            bias = expanded.get(name, wide.expand(x_in.shape[0], -1))
            given[name] = None
        if not given:
            return self.model(*inputs, **options), None
        return functional_call(self.model, given, inputs, options), bias  # type: ignore[arg-type]

    def log_variance(self, t: torch.Tensor) -> torch.Tensor | None:
        """The learned log-variance u(t) of the denoising error at t [N]: [N], or None."""
        if self.logvar_fourier is None:
            return None
        with without_autocast(t.device):
            return self.logvar_linear(self.logvar_fourier(t.log() / 4)).squeeze(1)

    def log_variance_names(self) -> set[str]:
        """The names of what `log_variance` computes with, in the state dict."""
        return {name for name in self.state_dict() if name.startswith("logvar_")}

    def pretraining_names(self) -> set[str]:
        """The names of the inputs and outputs of pre-training, without which the network computes the
        same."""
        layer, names = self.model.augmentation, self.log_variance_names()
        for path, module in self.named_modules():
            if layer is not None and module is layer:
                names |= {f"{path}.{name}" for name in module.state_dict()}
        return names

    @property
    def _weights_dtype(self) -> torch.dtype:
        """Of the first convolution, which takes the images."""
        convolutions = (p for p in self.model.parameters() if p.ndim == 4)
        return next(convolutions, next(self.model.parameters())).dtype

    def _check(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        channels: int | None = None,
    ) -> None:
        size = [channels or self.img_channels, self.img_resolution, self.img_resolution]
        if x.ndim != 4 or list(x.shape[1:]) != size:
            raise ValueError(
                f"x: must be [N,{','.join(map(str, size))}] for this network, got {list(x.shape)}"
            )
        n = x.shape[0]  # not len(x), which fixes the batch in a traced program
        if t.shape != (n,):
            raise ValueError(f"t: must hold one noise level per image, [{n}], got {list(t.shape)}")
        expected = f"one-hot [{n},{self.label_dim}]"
        if labels is None and self.label_dim:
            raise ValueError(
                f"labels: required by a class-conditional network as {expected}, got None"
            )
        if labels is not None and not self.label_dim:
            raise ValueError(
                f"labels: the network is unconditional (label_dim 0), got {list(labels.shape)}"
            )
        if labels is not None and labels.shape != (n, self.label_dim):
            raise ValueError(f"labels: must be {expected}, got {list(labels.shape)}")

    def _check_augmentation(self, augment_labels: torch.Tensor, n: int) -> None:
        layer = self.model.augmentation
        if layer is None:
            raise ValueError(
                "augment_labels: the network has no input for them (augment_dim 0), "
                f"got {list(augment_labels.shape)}"
            )
        if augment_labels.shape != (n, layer.in_features):
            raise ValueError(
                f"augment_labels: must be [{n},{layer.in_features}], got {list(augment_labels.shape)}"
            )


def want_ones(nets: Sequence[Precond], *, split: bool) -> bool:
    """Whether images are to get a channel of ones (`raw(with_ones=True)`): where all networks have weights
    for it, or take it for a bias that would be added in a pass of its own. A CPU's convolution adds it with
    its product, and so does `conv_bf16x3`, of `split` weights."""
    if all(net.model.constant_channels == 1 for net in nets):
        return True
    device = next(nets[0].parameters()).device
    adds_apart = not split and runs_triton("noise_pair", device.type)
    return adds_apart and all(net.model.takes_ones for net in nets)
