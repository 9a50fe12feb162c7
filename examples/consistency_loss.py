"""The consistency loss and its times in a loop of one's own, around any network F(x, c_noise).

Ect.plan draws a step's noise levels, noise_pair makes both noisy images of one noise draw.
"""

import torch

import tcm_fast
from tcm_fast.config import EctConfig
from tcm_fast.kernels import PhiloxKey, consistency_loss, noise_pair
from tcm_fast.objectives.ect import Ect


def train(network, images, steps=60, lr=1e-2):
    """images: uint8 [N,C,H,W], or floating in [-1,1]."""
    config = EctConfig(batch_size=len(images), huber_c=0.03, q=2.0, stage_iterations=20)
    optimizer, losses = torch.optim.RAdam(network.parameters(), lr=lr), []
    for step in range(steps):
        plan = Ect.plan(config, seed=0, images_seen=step * len(images), iteration=step)
        levels = (plan.t, plan.r, plan.delta)
        t, r, delta = (torch.from_numpy(v).float().to(images.device) for v in levels)
        sample = torch.arange(len(images), device=images.device)
        pair = noise_pair(images, t, r, PhiloxKey(seed=0, step=step, sample=sample))
        output = network(pair.input_t, t.log() / 4)
        with torch.no_grad():  # a network with dropout has to use the same masks here
            target = network(pair.input_r, r.log() / 4)
        options = {"delta": delta, "c": config.huber_c, "weighting": "inv_dt"}
        loss = consistency_loss(output, pair.x_t, t, target, pair.x_r, r, **options).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    net = tcm_fast.build_network("ncsnpp", img_resolution=16, img_channels=3, model_channels=16,
                                 num_blocks=1).model.eval()  # fmt: skip
    print(train(net, torch.rand(16, 3, 16, 16), steps=5))
