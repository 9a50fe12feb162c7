"""Other people's networks, replaced and restored."""

import copy
import re

import foreign_networks as theirs
import pytest
import torch
from foreign_networks import FAMILIES
from rounding import allowed_errors
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import tcm_fast
from tcm_fast.drop_in import known_blocks
from tcm_fast.drop_in.accelerate import is_accelerated
from tcm_fast.kernels.group_norm_silu import group_norm_silu

ROOT_SEED = 20


def randomise(net, seed=ROOT_SEED):
    """Weights that let every part of a network count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return net


def inputs(channels=3, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(ROOT_SEED + 1)
    x = torch.randn(n, channels, 8, 8, generator=generator)
    return x.to(dtype), torch.randn(n, 8, generator=generator).to(dtype)


def run(net, x, emb):
    """The output and the gradient of each input and parameter, under a random upstream gradient."""
    x, emb = x.clone().requires_grad_(), emb.clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    y = net(x, emb)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y.backward(upstream.to(y))
    found = {"output": y.detach(), "grad_x": x.grad, "grad_emb": emb.grad}
    return found | {f"grad of {k}": p.grad for k, p in net.named_parameters()}


def one_block(**options):
    return randomise(theirs.UNetBlock(8, 16, 8, **options))


# The longest sums in these networks: a 3×3 convolution of 32 channels.
TERMS = 32 * 9


def assert_same_function(net, x, emb, accelerate=tcm_fast.accelerate):
    """The replaced network is the network, output and gradients: in float64 to its last places, which
    holds the formulas, and in float32 to float32's, which holds the precision."""
    exact = copy.deepcopy(net).double()
    x_exact, emb_exact = x.double(), emb.double()
    oracle = run(exact, x_exact, emb_exact)
    allowed = allowed_errors(lambda: run(exact, x_exact, emb_exact), torch.float32, TERMS)
    accelerate(net)
    accelerate(exact)
    found = {torch.float64: run(exact, x_exact, emb_exact), torch.float32: run(net, x, emb)}
    largest = max(oracle[name].abs().max() for name in oracle if name.startswith("grad of"))
    for dtype, values in found.items():
        scale = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        for name, value in oracle.items():
            if name.startswith("grad of") and value.abs().max() < 1e-9 * largest:
                continue  # of a bias in front of a normalisation or softmax: 0 but for rounding
            assert values[name].dtype == dtype
            error = (values[name].double() - value).abs().max().item()
            assert error <= scale * allowed[name], (
                f"{dtype} {name}: error {error:.3g} is above {scale * allowed[name]:.3g}"
            )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients(family, training):
    make, channels = FAMILIES[family]
    net = randomise(make()).train(training)
    x, emb = inputs(channels)
    before = run(net, x, emb)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    parameters = dict(net.named_parameters())

    def accelerate(net):
        report = tcm_fast.accelerate(net)
        assert report.replaced
        # At most the network's last normalisation, whose SiLU it calls itself.
        assert all(e.path == "" and "is not a known block" in e.note for e in report.left), report

    assert_same_function(net, x, emb, accelerate)
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert all(p is parameters[name] for name, p in net.named_parameters())

    tcm_fast.restore(net)
    assert not any(is_accelerated(m) for m in net.modules())
    restored = run(net, x, emb)
    assert all(torch.equal(restored[name], before[name]) for name in before)


def scaled(out):
    return out * (1 + 2 * torch.finfo(torch.float32).eps)


def one_element(out):
    return out * (1 + 4 * torch.finfo(torch.float32).eps * (out == out.detach().max()))


def one_channel(out):
    return out * (1 + 2**-14 * (torch.arange(out.shape[1]) == 1).reshape(-1, 1, 1))


def through_fp16(out):
    return out + (out.half().to(out.dtype) - out).detach()


@pytest.mark.parametrize("family", ["diffusers, scale and shift", "PhysicsNeMo, scale and shift"])
@pytest.mark.parametrize(
    ("wrong", "found_in"),
    [
        (scaled, torch.float64), (one_element, torch.float64),
        (one_channel, torch.float32), (through_fp16, torch.float32),
    ],
    ids=["2 ulps everywhere", "4 ulps of one element", "2^-14 of a channel", "through fp16"],
)  # fmt: skip
def test_a_planted_error_is_caught(family, wrong, found_in, monkeypatch):
    """A few ulps of float32 in the formula are seen in float64; what only float32 does, in float32."""
    make, channels = FAMILIES[family]

    def planted(x, *args, **options):
        out = group_norm_silu(x, *args, **options)
        if x.dtype != found_in:
            return out
        return (wrong(out[0]), *out[1:]) if isinstance(out, tuple) else wrong(out)

    monkeypatch.setattr(known_blocks, "group_norm_silu", planted)
    with pytest.raises(AssertionError, match=f"{found_in} .*: error"):
        assert_same_function(randomise(make()).eval(), *inputs(channels))


def resnet_block(**options):
    return randomise(theirs.ResnetBlock2D(8, 16, 8, **options))


BLOCKS = {
    "EDM, scale and shift, attention": lambda: one_block(heads=1, adaptive=True),
    "EDM, down": lambda: one_block(down=True),
    "diffusers": resnet_block,
    "diffusers, scale and shift": lambda: resnet_block(norm="scale_shift"),
}


class Biases(TorchDispatchMode):
    """Counts the convolutions that add a bias."""

    def __init__(self):
        super().__init__()
        self.added = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.added += args[2] is not None
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_kernels_compute_it(block, triton_device):
    net = BLOCKS[block]()
    x, emb = inputs(8, n=2)
    exact = copy.deepcopy(net).double()
    oracle = run(exact, x.double(), emb.double())
    allowed = allowed_errors(lambda: run(exact, x.double(), emb.double()), torch.float32, TERMS)
    net.to(triton_device)
    tcm_fast.accelerate(net)
    with Biases() as biases:
        after = run(net, x.to(triton_device), emb.to(triton_device))
    # The q, k and v of an attention, the layers that resample; the rest goes into the sums and norms.
    assert biases.added == {"EDM, scale and shift, attention": 1, "EDM, down": 2}.get(block, 0)
    for name, value in oracle.items():
        if value.abs().max() > 1e-9 * oracle["grad_x"].abs().max():
            error = (after[name].cpu().double() - value).abs().max().item()
            assert error <= allowed[name], f"{name}: error {error:.3g} is above {allowed[name]:.3g}"


def test_layers_that_are_hooked_or_adapted_are_called(triton_device):
    block, heard = one_block(), []
    block.conv0.register_forward_hook(lambda *_: heard.append("conv0"))
    block.conv1 = nn.utils.parametrizations.weight_norm(block.conv1)
    block.skip = nn.Sequential(block.skip)
    x, emb = (value.to(triton_device) for value in inputs(8))
    block.to(triton_device)
    expected = run(copy.deepcopy(block), x, emb)
    tcm_fast.accelerate(block)
    assert is_accelerated(block)
    heard.clear()
    found = run(block, x, emb)
    assert heard == ["conv0"]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-5, name


@pytest.mark.parametrize(
    "family", ["EDM, embedding added", "diffusers", "guided diffusion", "EDM2"]
)
def test_dropout_is_drawn_from_torchs_generator(family):
    net = randomise(FAMILIES[family][0](dropout=0.5)).train()
    x, emb = inputs(n=2)
    tcm_fast.accelerate(net)
    torch.manual_seed(7)
    first, second = net(x, emb), net(x, emb)
    torch.manual_seed(7)
    again = net(x, emb)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(net.eval()(x, emb), net(x, emb))


def test_dropout_drops_its_share():
    block = one_block(dropout=0.3).train()
    block.conv1.weight.data.zero_()
    block.conv1.weight.data[:, :, 1, 1] = torch.eye(16)  # conv1 shows what dropout left
    block.conv1.bias.data.zero_()
    block.skip.weight.data.zero_()
    block.skip.bias.data.zero_()
    tcm_fast.accelerate(block)
    x, emb = torch.randn(20, 8, 16, 16), torch.randn(20, 8)
    y, undropped = block(x, emb), block.eval()(x, emb)
    share = (y == 0).float().mean().item()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / y.numel()) ** 0.5
    kept = y != 0
    assert torch.allclose(y[kept], undropped[kept] / 0.7, rtol=1e-4)


def test_nothing_is_drawn_and_no_mode_is_changed_by_the_trial():
    net = FAMILIES["EDM2"][0](dropout=0.4).train()
    net.blocks[0].eval()
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    tcm_fast.accelerate(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert net.blocks[0].dropout == 0.4


def test_an_optimizer_built_before_stays_valid():
    nets = [randomise(theirs.SongUNet()) for _ in range(2)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in nets]
    tcm_fast.accelerate(nets[1])
    x, emb = inputs()
    for _ in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            run(net, x, emb)
            optimizer.step()
    tcm_fast.restore(nets[1])
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        # Adam's first steps have the size of lr whatever the gradient's, also where that is rounding.
        if "bias" not in name:
            assert torch.allclose(a, b, atol=2e-3), name


def test_another_formula_under_the_same_name_is_left():
    class UNetBlock(theirs.UNetBlock):
        def forward(self, x, emb):
            return super().forward(x, emb) * 1.01

    net = nn.ModuleList([UNetBlock(8, 8, 8), theirs.UNetBlock(8, 8, 8)])
    report = tcm_fast.accelerate(net)
    assert [e.path for e in report.left] == ["0"]
    assert "computes something else" in report.left[0].note
    # What is inside it and known is replaced all the same.
    assert {e.path for e in report.replaced} >= {"1", "0.norm0"}


def test_a_sub_class_with_its_own_forward_is_left():
    class Twice(theirs.UNetBlock):
        def forward(self, x, emb):
            return 2 * super().forward(x, emb)

    block = randomise(Twice(8, 8, 8))
    x, emb = inputs(8)
    before = block(x, emb)
    tcm_fast.accelerate(block)
    assert torch.allclose(block(x, emb), before, atol=1e-4)


@pytest.mark.parametrize("name", ["norm0", "norm2"])
def test_hooks_are_not_silenced(name):
    block, heard = one_block(heads=1), []
    getattr(block, name).register_forward_hook(lambda *_: heard.append(name))
    report = tcm_fast.accelerate(block)
    assert re.search(f"has forward or backward hooks on {name}", report.left[0].note)
    block(*inputs(8))
    assert heard


def test_other_arguments_go_to_the_original():
    block = one_block()
    x, emb = inputs(8)
    expected = block(x, emb, emb_norm=True)
    tcm_fast.accelerate(block)
    assert torch.equal(block(x, emb, emb_norm=True), expected)
    assert torch.equal(block(x, emb, emb_norm=False), block(x, emb))


def test_other_activations_and_filters_are_left():
    net = nn.ModuleList([
        theirs.ResnetBlock2D(8, 8, act=nn.ReLU),
        theirs.Block(16, 16, 8, "enc", "down"),
        nn.GroupNorm(4, 8, affine=False),
    ])  # fmt: skip
    net[1].resample_filter = [1, 3, 3, 1]
    notes = {e.path: e.note for e in tcm_fast.accelerate(net).left}
    assert notes["0"] == "its activation is ReLU, not SiLU"
    assert notes["1"] == "its resampling filter is [1, 3, 3, 1], not [1, 1]"
    assert notes["2"] == "has no weight and bias"


# ---- attention ----------------------------------------------------------------------------------


def test_attention_over_tokens_and_context_is_left_to_torch():
    net = nn.ModuleList([theirs.Attention(16, 2, tokens=True), theirs.Attention(16, 2, context=8)])
    report = tcm_fast.accelerate(net)
    notes = {e.path: e.note for e in report.left}
    assert notes["0"].startswith("attends to tokens")
    assert notes["1"] == "q, k and v differ in width"
    assert all(type(a.processor) is theirs.AttnProcessor2_0 for a in net)


def test_attention_that_is_adapted_later_is_computed_as_adapted():
    attention = randomise(theirs.Attention(16, 2))
    x = torch.randn(2, 16, 4, 4)
    tcm_fast.accelerate(attention)
    attention.to_q = nn.Sequential(attention.to_q, nn.Linear(16, 16))  # as LoRA does it
    ours = attention(x)
    tcm_fast.restore(attention)
    assert type(attention.processor) is theirs.AttnProcessor2_0
    assert torch.equal(ours, attention(x))


def test_attention_with_other_inputs_goes_to_the_original():
    attention = randomise(theirs.Attention(16, 2))
    tokens = torch.randn(2, 9, 16)
    expected = attention(tokens)
    tcm_fast.accelerate(attention)
    assert torch.equal(attention(tokens), expected)


# ---- patterns -----------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.act(self.norm(x)))


def test_a_module_that_nobody_has_described_is_left_but_for_its_normalisation():
    net, x = randomise(Nested()), torch.randn(2, 8, 5, 5)
    expected = net(x)
    report = tcm_fast.accelerate(net)
    assert [e.path for e in report.replaced] == ["norm"]
    (left,) = report.left
    assert (left.path, left.kind) == ("", "Nested")
    assert left.note == "is not a known block: norm alone, what follows is not known"
    assert type(net) is Nested
    assert torch.allclose(net(x), expected, atol=1e-5)


def test_sequential_with_shared_and_indexed_modules():
    norm = nn.GroupNorm(2, 8)
    net = nn.Sequential(norm, nn.SiLU(), nn.Conv2d(8, 8, 1), norm, nn.ReLU())
    x = torch.randn(2, 8, 5, 5)
    expected, alone = net(x), net[0](x)
    report = tcm_fast.accelerate(net)
    assert "GroupNorm and SiLU at 0" in str(report)
    assert torch.allclose(net(x), expected, atol=1e-5)
    assert torch.allclose(net[0](x), alone, atol=1e-5)
    net.append(nn.Flatten())
    assert net(x).ndim == 2


# ---- what others do with a model afterwards -------------------------------------------------------


def test_blocks_that_drop_at_some_resolutions_and_take_a_flag():
    """TCM's EDM2 block: `emb_norm` is passed to it, and it drops at `dout_resolutions` only."""
    torch.manual_seed(0)

    class Block(theirs.Block):
        def forward(self, x, emb, emb_norm=False):
            assert not emb_norm
            kept, self.dropout = self.dropout, self.dropout * (self.size in self.dout_resolutions)
            out = super().forward(x, emb)
            self.dropout = kept
            return out

    x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 8)
    for mode, resolution in (("keep", 8), ("down", 4), ("up", 16)):
        block = Block(16, 32, 8, "enc", mode, dropout=0.4).train()
        block.size = resolution
        for resolutions, drops in (([resolution], True), ([32], False)):
            block.dout_resolutions = resolutions
            expected = block(x, emb, emb_norm=False)
            report = tcm_fast.accelerate(block)
            assert [entry.kind for entry in report.replaced] == ["EDM2 Block"]
            out = block(x, emb, emb_norm=False)
            assert torch.allclose(out, expected, atol=1e-5) != drops
            assert torch.equal(out, block(x, emb, emb_norm=False)) != drops
            tcm_fast.restore(block)


@pytest.mark.parametrize("family", ["EDM, scale and shift", "EDM2", "diffusers"])
def test_compiled_afterwards(family):
    make, channels = FAMILIES[family]
    net = randomise(make()).train()
    x, emb = inputs(channels)
    tcm_fast.accelerate(net)
    expected = run(net, x, emb)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = run(compiled, x, emb)
    for name, value in expected.items():
        scale = value.abs().max()
        assert torch.allclose(
            found[name.replace("of ", "of _orig_mod.")], value, atol=1e-4 * scale
        ), name


def test_compiled_with_dropout():
    block = one_block(dropout=0.5).train()
    tcm_fast.accelerate(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x, emb = inputs(8)
    assert not torch.equal(compiled(x, emb), compiled(x, emb))


def test_distributed_data_parallel_afterwards():
    net = randomise(theirs.SongUNet())
    x, emb = inputs()
    tcm_fast.accelerate(net)
    expected = run(net, x, emb)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = run(DistributedDataParallel(net), x, emb)
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        assert torch.equal(found[name.replace("of ", "of module.")], value), name


def test_copies_stay_accelerated_and_are_independent():
    net = randomise(theirs.SongUNet())
    tcm_fast.accelerate(net)
    copied = copy.deepcopy(net)
    x, emb = inputs()
    assert sum(map(is_accelerated, copied.modules())) == sum(map(is_accelerated, net.modules()))
    assert torch.equal(copied(x, emb), net(x, emb))
    randomise(copied, 3)
    assert not torch.equal(copied(x, emb), net(x, emb))
    tcm_fast.restore(copied)
    assert any(map(is_accelerated, net.modules()))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_as_the_original_class(protocol):
    block = one_block()
    tcm_fast.accelerate(block)
    _, arguments, *_ = block.__reduce_ex__(protocol)
    assert arguments[0] is theirs.UNetBlock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_cast_as_a_whole(dtype, check_against_oracle):
    net = randomise(theirs.UNet2DModel()).to(dtype)
    x, emb = inputs(dtype=dtype)
    oracle = copy.deepcopy(net).double()(x.double(), emb.double())
    before = net(x, emb)
    tcm_fast.accelerate(net)
    check_against_oracle(net(x, emb), before, oracle)


# ---- memory formats -----------------------------------------------------------------------------


def test_memory_format_there_and_back():
    net = randomise(theirs.SongUNet())
    x, emb = inputs()
    before = run(net, x, emb)
    strides = {name: p.stride() for name, p in net.named_parameters()}
    parameters = dict(net.named_parameters())
    report = tcm_fast.accelerate(net, memory_format=torch.channels_last)
    wide = [p for p in parameters.values() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    assert (
        report.channels_last == sum(strides[k] != p.stride() for k, p in net.named_parameters()) > 0
    )
    for p in wide:
        assert p.grad.stride() == p.stride()
    for name, value in run(net, x, emb).items():
        assert torch.allclose(value, before[name], atol=1e-3 * before[name].abs().max()), name
    tcm_fast.restore(net)
    assert {name: p.stride() for name, p in net.named_parameters()} == strides
    assert all(p is parameters[name] for name, p in net.named_parameters())
    after = run(net, x, emb)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_on_a_cpu_weights_stay_where_they_are():
    net = theirs.SongUNet()
    assert tcm_fast.accelerate(net).channels_last == 0


# ---- the function -------------------------------------------------------------------------------


def test_twice_is_once():
    net = randomise(theirs.UNet2DModel())
    first = tcm_fast.accelerate(net)
    kinds = [type(m) for m in net.modules()]
    second = tcm_fast.accelerate(net)
    assert [type(m) for m in net.modules()] == kinds
    assert len(second.replaced) == len(first.replaced)
    tcm_fast.restore(net)
    tcm_fast.restore(net)
    assert not any(map(is_accelerated, net.modules()))


def test_our_own_networks_need_nothing():
    net = tcm_fast.build_network("ddpmpp", img_resolution=8, img_channels=3, model_channels=8,
                                 num_blocks=1, channel_mult=[1, 1], attn_resolutions=[4])  # fmt: skip
    report = tcm_fast.accelerate(net)
    assert report.replaced == report.left == []


def test_the_report_says_it_in_words():
    text = str(tcm_fast.accelerate(theirs.SongUNet(), memory_format=torch.channels_last))
    assert "replaced 4 x EDM UNetBlock: forward" in text
    assert "left 1 x SongUNet: is not a known block: out_norm alone" in text
    assert "to channels_last" in text


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        tcm_fast.accelerate({})
    with pytest.raises(ValueError, match=r"memory_format must be 'auto'.*got nhwc"):
        tcm_fast.accelerate(nn.Linear(1, 1), memory_format="nhwc")
