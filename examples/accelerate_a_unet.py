"""Fused operations inside a network that somebody else wrote, and out again."""

import torch
from torch import nn

import tcm_fast


class ResBlock(nn.Module):  # yours, or EDM's, EDM2's, diffusers', PhysicsNeMo's
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.layers(x)


def main():
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), ResBlock(32), ResBlock(32))
    optimizer = torch.optim.Adam(model.parameters())  # stays valid: parameters are the same objects
    report = tcm_fast.accelerate(model)  # then DistributedDataParallel, torch.compile
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    optimizer.step()
    tcm_fast.restore(model)
    return report


if __name__ == "__main__":
    print(main())
