"""A Lightning module around one of our networks. pip install lightning."""

import lightning
import torch

import tcm_fast
from tcm_fast.config import EctConfig
from tcm_fast.objectives.batch import make_batch
from tcm_fast.objectives.ect import Ect


class ConsistencyTraining(lightning.LightningModule):
    """A training batch is uint8 [n,C,H,W], of one size in all processes and steps."""

    def __init__(self, batch_size, **network):
        super().__init__()
        self.config = EctConfig(batch_size=batch_size)
        self.net = tcm_fast.build_network("ddpmpp", **network)
        self.objective = Ect(self.config, self.net)

    def training_step(self, images, _):
        step, size, world = self.global_step, self.config.batch_size, self.trainer.world_size
        plan = Ect.plan(self.config, seed=0, images_seen=step * size, iteration=step)
        part = plan.parts(world)[self.trainer.global_rank]
        loss, _ = self.objective(make_batch(plan, part, images, None, seed=0, step=step))
        self.log("loss", loss.detach())
        return loss * world

    def configure_optimizers(self):
        return torch.optim.RAdam(self.net.parameters(), lr=1e-4)


def train(images, steps=3, **network):
    loader = torch.utils.data.DataLoader(images, batch_size=8, drop_last=True)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = ConsistencyTraining(8, img_resolution=8, img_channels=3, **network)
    lightning.Trainer(max_steps=steps, accelerator="auto", **options).fit(module, loader)
    return module.net
