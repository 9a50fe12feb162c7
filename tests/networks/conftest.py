"""What the tests of the networks share."""

import pytest
import torch


@pytest.fixture
def compare_with_plain():
    """Holds a raw network's output and the gradient of every parameter and of the input against a plain
    function on its state dict, in float64; then its fp32 output against that."""

    def check(net, plain, labels=None, n=3, res=8, channels=2):
        generator = torch.Generator().manual_seed(3)
        for parameter in net.parameters():  # as initialised, much ends in zero
            value = torch.randn(parameter.shape, generator=generator)
            parameter.data = value * (1 if parameter.ndim == 0 else 0.3)
        net.eval()
        x = torch.randn(n, channels, res, res, generator=generator)
        c_noise = torch.linspace(-1, 1, n)
        upstream = torch.randn(n, channels, res, res, generator=generator, dtype=torch.float64)
        narrow = net(x, c_noise, labels).detach()
        net.double()
        wide = None if labels is None else labels.double()
        state = dict(net.named_buffers()) | dict(net.named_parameters())
        leaves = list(net.parameters())
        x = x.double().requires_grad_()
        outputs = [net(x, c_noise.double(), wide), plain(state)(x, c_noise.double(), wide)]
        assert outputs[1].std() > 0.05, "the case shows nothing"
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
        grads = [
            torch.autograd.grad(out, [x, *leaves], upstream, allow_unused=True) for out in outputs
        ]
        names = ["x", *(name for name, _ in net.named_parameters())]
        for name, ours, theirs in zip(names, *grads, strict=True):
            assert (ours is None) == (theirs is None), name
            assert ours is not None, name
            assert ours.any(), name
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)
        scale = outputs[1].abs().max()
        assert (narrow - outputs[1]).abs().max() < 1e-4 * scale

    return check
