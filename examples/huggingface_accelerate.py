"""A Hugging Face accelerate loop around one of our networks: stage 1's loss by Ect, in any precision.

pip install accelerate; run it with `accelerate launch` on several devices.
"""

import torch
from accelerate import Accelerator

import tcm_fast
from tcm_fast.config import EctConfig
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.ect import Ect


def train(images, steps=4, **architecture):
    """images: uint8 [N,C,H,W], all of a step's, on every process. Returns the losses."""
    accelerator = Accelerator()
    options = {"img_resolution": images.shape[2], "img_channels": images.shape[1], **architecture}
    net = tcm_fast.build_network("ddpmpp", **options)
    config = EctConfig(batch_size=len(images))
    optimizer = torch.optim.RAdam(net.parameters(), lr=1e-4)
    objective, optimizer = accelerator.prepare(Ect(config, net), optimizer)
    losses, world = [], accelerator.num_processes
    for step in range(steps):
        plan = Ect.plan(config, seed=0, images_seen=step * len(images), iteration=step)
        part = plan.parts(world)[accelerator.process_index]  # sample numbers of this process
        mine = images[torch.from_numpy(part)].to(accelerator.device)
        loss, _ = objective(make_batch(plan, part, mine, None, seed=0, step=step))
        optimizer.zero_grad()
        accelerator.backward(loss * world)  # the loss is a sum over processes, which are averaged
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train(torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), channel_mult=[1],
                model_channels=16, num_blocks=1, attn_resolutions=[8]))  # fmt: skip
