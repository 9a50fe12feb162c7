"""The denoiser D around a raw network F: EDM's preconditioning (Karras et al. 2022, table 1)."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tcm_fast.kernels.dropout import DropoutKey
from tcm_fast.kernels.precondition import denoise, preconditioning


class Precond(nn.Module):
    """D(x,t) = c_skip(t) x + c_out(t) F(c_in(t) x, ln(t)/4), with F owned as `.model`.

    Args:
        model: raw network, called as model(x, c_noise, labels, dropout_key=key).
        img_resolution, img_channels: height and width, and channels, of the images.
        label_dim: number of classes, 0 for an unconditional network.
        sigma_data: standard deviation of the data.
        spec: JSON-able arguments with which `build_network(**spec)` builds an equal module.
    """

    info: dict[str, Any]
    """What a loaded or trained network's file says of its training; absent from a fresh network."""

    def __init__(
        self,
        model: nn.Module,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = 0.5,
        spec: dict[str, Any],
    ):
        super().__init__()
        self.model = model
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.sigma_data, self.spec = label_dim, sigma_data, spec

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        dropout_key: DropoutKey | None = None,
    ) -> torch.Tensor:
        """The denoised images D [N,C,H,W], fp32 (float64 for a float64 network).

        Args:
            x: noisy images [N,C,H,W], any floating dtype.
            t: noise levels (standard deviations) [N], positive.
            labels: one-hot classes [N,label_dim]; required by a class-conditional network.
            dropout_key: keys the dropout masks in train mode; None draws a fresh one.

        Raises:
            ValueError: shapes that do not fit, labels missing or not expected.
        """
        self._check(x, t, labels)
        dtype = torch.promote_types(self._weights_dtype, torch.float32)
        x, t = x.to(dtype), t.to(dtype)
        c_in = preconditioning(t, self.sigma_data)[2]
        output = self._raw(c_in * x, t, labels, dropout_key)
        return denoise(output, x, t, self.sigma_data)

    def raw(
        self,
        x_in: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        dropout_key: DropoutKey | None = None,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The network's own output F(x_in, ln(t)/4), x_in = c_in(t) x, in the dtype that its
        convolutions compute in; otherwise as `forward`.

        `weights` replace parameters of `model` by name (`precision.cast_weights`); x_in then has their
        dtype."""
        self._check(x_in, t, labels)
        if weights is None:
            return self._raw(x_in.to(self._weights_dtype), t, labels, dropout_key)
        c_noise = t.to(torch.float32).log() / 4
        inputs, key = (x_in, c_noise, labels), {"dropout_key": dropout_key}
        return functional_call(self.model, weights, inputs, key)

    def _raw(self, x_in, t, labels, dropout_key):
        dtype = self._weights_dtype
        c_noise = t.to(torch.promote_types(dtype, torch.float32)).log() / 4
        return self.model(x_in.to(dtype), c_noise, labels, dropout_key=dropout_key)

    @property
    def _weights_dtype(self) -> torch.dtype:
        """Of the first convolution, which takes the images."""
        convolutions = (p for p in self.model.parameters() if p.ndim == 4)
        return next(convolutions, next(self.model.parameters())).dtype

    def _check(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> None:
        size = [self.img_channels, self.img_resolution, self.img_resolution]
        if x.ndim != 4 or list(x.shape[1:]) != size:
            raise ValueError(
                f"x: must be [N,{','.join(map(str, size))}] for this network, got {list(x.shape)}"
            )
        n = len(x)
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
