"""common/dit.py: counts against the papers' tables and by hand, each part against its formula, and what adaLN-zero promises."""
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.dit import Block, DiT, modulate, positions
from common.unet import sinusoid
from tests.test_unet import count, silu, worn

PAPER = dict(in_channels=12, out_channels=12, side=128, patch=4, dim=768, depth=12, heads=12, num_classes=3)
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def meta(**settings):
    with torch.device("meta"):
        return DiT(**settings)


def tiny(in_channels=3, out_channels=3, side=16, patch=4, dim=16, depth=2, heads=2, num_classes=3):
    return DiT(in_channels, out_channels, side, patch, dim, depth, heads, num_classes)


def inputs(B=2, C=3, side=16):
    return torch.randn(B, C, side, side), torch.rand(B) * 1000, torch.arange(B) % 3


def multiply_adds(net, C, side):
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, C, side, side, device="meta"), torch.empty(1, device="meta"), torch.empty(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops() / 2


# ---------------------------------------------------------------------------------------------- oracle: the papers' sizes
@pytest.mark.parametrize("dim, depth, heads, patch, millions, giga", [
    (384, 12, 6, 8, 33, .36), (384, 12, 6, 4, 33, 1.41), (384, 12, 6, 2, 33, 6.06), (768, 12, 12, 8, 131, 1.42), (768, 12, 12, 4, 130, 5.56),
    (768, 12, 12, 2, 130, 23.01), (1024, 24, 16, 8, 459, 5.01), (1024, 24, 16, 4, 458, 19.70), (1024, 24, 16, 2, 458, 80.71),
    (1152, 28, 16, 8, 676, 7.39), (1152, 28, 16, 4, 675, 29.05), (1152, 28, 16, 2, 675, 118.64)])
def test_sizes_and_multiply_adds_are_those_of_peebles_and_xies_table(dim, depth, heads, patch, millions, giga):
    net = meta(in_channels=4, out_channels=8, side=32, patch=patch, dim=dim, depth=depth, heads=heads, num_classes=1001)
    assert round(count(net) / 1e6) == millions and multiply_adds(net, 4, 32) / 1e9 == pytest.approx(giga, abs=.006, rel=5e-4)


def test_faveros_network_has_the_parameters_that_are_counted_by_hand():
    """130.6 M with the 1,001 rows of ImageNet in the table of classes, of which three are needed; 147.7 M as their code has it, with a time MLP and a
    table in each of the twelve blocks."""
    d, pixels = 768, 12 * 4 * 4
    linear = lambda a, b: a * b + b
    time, table = linear(256, d) + linear(d, d), lambda rows: rows * d
    block = linear(d, 6 * d) + linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    rest = linear(pixels, d) + 12 * block + linear(d, 2 * d) + linear(d, pixels)
    assert count(meta(**PAPER)) == rest + time + table(3) == 129_807_552
    assert rest + time + table(1001) == 130_574_016 and round((rest + 12 * (time + table(1001))) / 1e6, 1) == 147.7


def test_faveros_network_takes_107_giga_multiply_adds():
    d, tokens, pixels = 768, 32 ** 2, 12 * 4 * 4
    a_token = 2 * pixels * d + 12 * (12 * d * d + 2 * tokens * d)       # ends; a block's four layers of 3, 1, 4 and 4 d^2; scores, and values by them
    an_image = 256 * d + d * d + 12 * 6 * d * d + 2 * d * d
    assert multiply_adds(meta(**PAPER), 12, 128) == tokens * a_token + an_image and (tokens * a_token + an_image) / 1e9 == pytest.approx(107, rel=.005)


# ---------------------------------------------------------------------------------------------- oracle: formulas
def test_positions_are_cosines_and_sines_of_row_and_column():
    found = positions(3, 8)
    for row in range(3):
        for column in range(3):
            wanted = [f(v / 10000 ** (i / 2)) for v in (row, column) for f in (math.cos, math.sin) for i in range(2)]
            assert found[3 * row + column].tolist() == pytest.approx(wanted, abs=1e-6)
    assert len(found) == len(found.unique(dim=0)) == 9 and len(positions(32, 768).unique(dim=0)) == 1024


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def linear(layer, x):
    return torch.einsum("oi,...i->...o", layer.weight, x) + layer.bias


@pytest.mark.parametrize("heads", [1, 2, 3])
@torch.no_grad()
def test_attention_equals_a_loop_over_heads_and_tokens(heads):
    block, x, d = worn(Block(12, heads)).double(), torch.randn(2, 5, 12).double(), 12 // heads
    q, k, v = linear(block.qkv, x).split(12, dim=2)
    out = torch.zeros(2, 5, 12).double()
    for b in range(2):
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(5):
                weights = torch.stack([torch.dot(q[b, i, part], k[b, j, part]) / math.sqrt(d) for j in range(5)]).exp()
                out[b, i, part] = sum(w * v[b, j, part] for j, w in enumerate(weights / weights.sum()))
    assert torch.allclose(block.attention(x), linear(block.projection, out), atol=1e-12)


@torch.no_grad()
def test_a_block_is_two_gated_branches_of_scaled_and_shifted_norms():
    block, x, e = worn(Block(8, 2)).double(), torch.randn(2, 5, 8).double(), torch.randn(2, 8).double()
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(block.modulation, silu(e)).view(2, 6, 1, 8).unbind(1)
    h = x + gate1 * block.attention(layer_norm(x) * (1 + scale1) + shift1)
    wide = linear(block.mlp[0], layer_norm(h) * (1 + scale2) + shift2)
    gelu = wide / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + .044715 * wide ** 3)))
    assert torch.allclose(block(x, e), h + gate2 * linear(block.mlp[2], gelu), atol=1e-12)
    assert torch.allclose(modulate(x, shift1, scale1), layer_norm(x) * (1 + scale1) + shift1, atol=1e-12)


@torch.no_grad()
def test_the_network_equals_its_blocks_joined_by_hand_patch_by_patch():
    net, (x, t, c) = worn(tiny(in_channels=2, out_channels=3)).double(), inputs(C=2)
    x, t = x.double(), t.double()
    e = linear(net.time[2], silu(linear(net.time[0], sinusoid(t, 256)))) + net.classes.weight[c]
    cut = [(4 * i, 4 * j) for i in range(4) for j in range(4)]          # patches, row by row
    tokens = torch.stack([linear(net.enter, x[:, :, i:i + 4, j:j + 4].flatten(1)) for i, j in cut], dim=1) + positions(4, 16).double()
    for block in net.blocks:
        tokens = block(tokens, e)
    shift, scale = linear(net.modulation, silu(e)).view(2, 2, 1, 16).unbind(1)
    found, out = linear(net.leave, layer_norm(tokens) * (1 + scale) + shift), torch.zeros(2, 3, 16, 16).double()
    for n, (i, j) in enumerate(cut):
        out[:, :, i:i + 4, j:j + 4] = found[:, n].view(2, 3, 4, 4)
    assert torch.allclose(net(x, t, c), out, atol=1e-10)


# ---------------------------------------------------------------------------------------------- adaLN-zero
@torch.no_grad()
def test_a_fresh_block_is_the_identity_and_a_fresh_network_gives_exactly_zero():
    net, (x, t, c) = tiny(), inputs()
    tokens, e = torch.randn(2, 16, 16), torch.randn(2, 16)
    assert all(torch.equal(block(tokens, e), tokens) for block in net.blocks) and net(x, t, c).eq(0).all()
    worn(net.blocks[0].modulation)
    assert not torch.allclose(net.blocks[0](tokens, e), tokens, atol=1e-2)


@torch.no_grad()
def test_class_and_time_speak_through_the_modulation_alone():
    net, (x, t, c) = tiny(), inputs()
    nn.init.normal_(net.leave.weight)
    assert torch.equal(net(x, t, c), net(x, t + 100, 2 - c))
    for layer in ("modulation", "blocks.0.modulation"):                 # either is enough
        net = tiny()
        nn.init.normal_(net.leave.weight)
        nn.init.normal_(net.get_submodule(layer).weight)
        assert not torch.equal(net(x, t, c), net(x, t, 2 - c)) and not torch.equal(net(x, t, c), net(x, t + 100, c))


def test_gradients_reach_every_parameter_after_a_few_steps():
    net, (x, t, c) = tiny(), inputs(3)
    optimizer, wanted = torch.optim.SGD(net.parameters(), lr=.1), torch.randn(3, 3, 16, 16)
    moved = []
    for _ in range(4):                                                  # the end first, then gates, then what they let through, then time and class
        optimizer.zero_grad()
        (net(x, t, c) - wanted).square().mean().backward()
        moved.append({name for name, p in net.named_parameters() if p.grad.any()})
        optimizer.step()
    assert moved[0] == {"leave.weight", "leave.bias"} and moved[-1] == {name for name, _ in net.named_parameters()}
    assert all(p.grad.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------------------------------------- the whole network
def shuffled(x, order):
    """The patches of x (B, C, 16, 16), 4 pixels a side, in another order."""
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]                          # (B, C, 16, 4, 4)
    return patches.unflatten(2, (4, 4)).transpose(3, 4).flatten(4).flatten(2, 3)


@torch.no_grad()
def test_without_positions_the_order_of_the_patches_is_that_of_the_output_and_nothing_else():
    net, (x, t, c), order = worn(tiny()), inputs(), torch.randperm(16)
    assert torch.equal(shuffled(x, torch.arange(16)), x)
    assert not torch.allclose(net(shuffled(x, order), t, c), shuffled(net(x, t, c), order), atol=1e-2)
    net.positions.zero_()
    assert torch.allclose(net(shuffled(x, order), t, c), shuffled(net(x, t, c), order), atol=1e-4)


@torch.no_grad()
def test_image_time_and_class_each_change_the_output():
    net, (x, t, c) = worn(tiny()), inputs()
    out = net(x, t, c)
    for changed in (net(x + .5, t, c), net(x, t + 20, c), net(x, t, c + 1)):
        assert ((changed - out).abs().amax((1, 2, 3)) > 1e-3).all()
    assert torch.equal(net.train()(x, t, c), out)                       # nothing is dropped


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    net, (x, t, c) = worn(tiny()), inputs(3)
    alone = torch.cat([net(x[i:i + 1], t[i:i + 1], c[i:i + 1]) for i in range(3)])
    assert torch.allclose(net(x, t, c), alone, atol=1e-4)


@pytest.mark.parametrize("in_channels, out_channels, side, patch", [(1, 1, 8, 8), (4, 8, 8, 2), (3, 1, 12, 3), (2, 2, 5, 1)])
@torch.no_grad()
def test_the_output_has_the_images_sides_and_its_own_channels(in_channels, out_channels, side, patch):
    net, (x, t, c) = worn(tiny(in_channels, out_channels, side, patch)), inputs(C=in_channels, side=side)
    assert net(x, t, c).shape == (2, out_channels, side, side)


def test_one_table_of_classes_serves_all_blocks_and_positions_are_no_part_of_a_checkpoint():
    assert count(tiny(num_classes=5)) - count(tiny(num_classes=3)) == 2 * 16 and sum(isinstance(m, nn.Embedding) for m in tiny().modules()) == 1
    assert "positions" not in tiny().state_dict() and not any(isinstance(m, nn.Dropout) for m in tiny().modules())


@torch.no_grad()
def test_channels_last_and_the_compiler_give_the_same_numbers():
    net, (x, t, c) = worn(tiny()), inputs()
    out = net(x, t, c)
    assert torch.allclose(net(x.to(memory_format=torch.channels_last), t, c), out, atol=1e-5)
    compiled = torch.compile(net, backend="eager", fullgraph=True)       # raises where python depends on the data
    assert torch.allclose(compiled(x, t, c), out, atol=1e-5)


def test_under_autocast_the_output_is_bfloat16_and_close():
    net, (x, t, c) = worn(tiny()), inputs()
    with torch.no_grad():
        out = net(x, t, c)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, c)
    assert half.dtype == torch.bfloat16 and (half - out).norm() < .05 * out.norm()
    half.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        assert net.to(torch.bfloat16)(x.bfloat16(), t, c).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("given, said", [
    (dict(side=18), "image of 18x18: the sides must be multiples of 4"), (dict(patch=32), "image of 16x16: the sides must be multiples of 32"),
    (dict(dim=20, heads=3), "dim 20: must be a multiple of 3, the heads"), (dict(dim=18), "and of 4, for sines and cosines")])
def test_sides_and_dims_that_do_not_divide_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        tiny(**given)
