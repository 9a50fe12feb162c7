"""RAdam, clipping and two EMAs of the weights in one pass over memory, for a model of one's own.

FusedOptimizer has the state dicts of torch's optimizer of that kind; it needs the C++ extension (see
`tcm-fast doctor`). Ema.update goes with any other optimizer.
"""

import torch

from tcm_fast.optim.ema import Ema
from tcm_fast.optim.fused import FusedOptimizer


def train(model, batches, lr=1e-2):
    """batches: pairs (x, y). Returns the EMAs of width 0.05 and 0.10 (relative)."""
    emas = [Ema("power:16.97", model.parameters()), Ema("power:6.94", model.parameters())]
    optimizer = FusedOptimizer(
        model.parameters(), "radam", lr=lr, max_norm=1.0, emas=[ema.average for ema in emas]
    )
    seen = 0
    for step, (x, y) in enumerate(batches, start=1):
        seen += len(x)
        optimizer.ema_betas = [ema.rule.beta(step, seen, len(x)) for ema in emas]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()  # a NaN/Inf gradient changes nothing; optimizer.skips counts them
    return emas


if __name__ == "__main__":
    model = torch.nn.Linear(4, 1)
    x = torch.randn(64, 4)
    emas = train(model, [(x, x.sum(1, keepdim=True))] * 300)
    print(model.weight.data, *(ema.average[0] for ema in emas), sep="\n")
