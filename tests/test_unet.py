"""common/unet.py: the papers' parameter counts, each part against its formula, and what the methods ask of the whole."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.unet import Attention, Block, Double, ResBlock, UNet, norm, sinusoid

MEDSYMMFLOW = dict(channels=64, mult=(1, 2, 2, 2), num_res_blocks=2, attention={2}, head_channels=64)
MEDIFFUSION = dict(in_channels=4, out_channels=4, channels=256, mult=(1, 2, 4), num_res_blocks=2, attention={1, 2, 4}, head_channels=32)


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


def meta(*args, **kwargs):
    """A network without memory: enough for names, shapes and counts."""
    with torch.device("meta"):
        return UNet(*args, **kwargs)


def tiny(in_channels=3, out_channels=3, channels=8, mult=(1, 2, 2), num_res_blocks=1, attention=(2,), head_channels=8, **kwargs):
    return UNet(in_channels, out_channels, channels, mult, num_res_blocks, attention, head_channels, **kwargs)


def worn(module):
    """As after training: no parameter is zero, no norm is at its start."""
    for p in module.parameters():
        p.data += .1 * torch.randn_like(p)
    return module.eval()


def inputs(B=2, C=3, side=16):
    return torch.randn(B, C, side, side), torch.rand(B) * 1000


def count(net):
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------------------------------------- oracle: the papers' sizes
@pytest.mark.parametrize("settings, parameters", [
    (dict(MEDSYMMFLOW, in_channels=4, out_channels=4), 8_953_220), (dict(MEDSYMMFLOW, in_channels=6, out_channels=6), 8_955_526),
    (dict(MEDSYMMFLOW, in_channels=8, out_channels=8, channels=128), 35_757_832), (MEDIFFUSION, 257_733_124),
    (dict(MEDIFFUSION, attention=()), 230_154_244)])                     # the last: attention in the middle alone
def test_the_papers_networks_have_their_number_of_parameters(settings, parameters):
    assert count(meta(**settings)) == parameters


def test_mediffusions_network_has_306_tensors():
    assert len(meta(**MEDIFFUSION).state_dict()) == 306


def test_classes_add_one_row_each_and_nothing_else():
    assert count(tiny(num_classes=5)) - count(tiny()) == 5 * 4 * 8


def attention_shapes(net, side):
    """(channels, heads, height) of every attention, in the order of the forward pass."""
    seen = []
    for m in net.modules():
        if isinstance(m, Attention):
            m.register_forward_hook(lambda m, args, out: seen.append((out.shape[1], m.heads, out.shape[2])))
    net(torch.empty(2, net.enter[0].in_channels, side, side, device="meta"), torch.empty(2, device="meta"))
    return seen


def test_attention_stands_at_half_the_sides_and_in_the_middle():
    net = meta(4, 4, **MEDSYMMFLOW)
    assert attention_shapes(net, 32) == [(128, 2, 16)] * 2 + [(128, 2, 4)] + [(128, 2, 16)] * 3


def test_attention_at_every_level_has_heads_of_32_channels_in_mediffusions_network():
    down = [(256, 8, 32)] * 2 + [(512, 16, 16)] * 2 + [(1024, 32, 8)] * 2
    up = [(1024, 32, 8)] * 3 + [(512, 16, 16)] * 3 + [(256, 8, 32)] * 3
    assert attention_shapes(meta(**MEDIFFUSION), 32) == down + [(1024, 32, 8)] + up


def test_the_middle_is_block_attention_block():
    first, second = tiny(attention=()).middle
    assert isinstance(first.attention, Attention) and isinstance(second.attention, nn.Identity)


# ---------------------------------------------------------------------------------------------- oracle: formulas
def test_the_sinusoid_equals_an_explicit_loop():
    t = torch.tensor([0., .25, 1., 37., 999.], dtype=torch.float64)
    wanted = [[f(v / 10000 ** (i / 4)) for f in (math.cos, math.sin) for i in range(4)] for v in t.tolist()]
    assert torch.allclose(sinusoid(t, 8), torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("t, cosine", [(.04, .99995), (1., .970), (40., .509), (1000., .159)])
def test_the_sinusoid_is_as_flat_in_small_t_as_was_measured_on_the_authors(t, cosine):
    emb = sinusoid(torch.tensor([0., t]), 128)
    assert torch.cosine_similarity(emb[0], emb[1], dim=0).item() == pytest.approx(cosine, abs=6e-4 if t > .1 else 6e-6)


def test_whole_and_broken_times_give_the_same_sinusoid():
    t = torch.tensor([0, 3, 999])
    assert torch.equal(sinusoid(t, 16), sinusoid(t.float(), 16)) and sinusoid(t, 16).dtype == torch.float32


def group_norm(x, m):
    """m, a GroupNorm, by its formula."""
    groups = x.unflatten(1, (m.num_groups, -1))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, correction=0)
    return ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2) * m.weight[:, None, None] + m.bias[:, None, None]


def silu(x):
    return x / (1 + (-x).exp())


@pytest.mark.parametrize("c_in, c", [(8, 8), (12, 8)])
@torch.no_grad()
def test_a_residual_block_equals_its_formula(c_in, c):
    block, x, emb = worn(ResBlock(c_in, c, 6)).double(), torch.randn(2, c_in, 5, 4).double(), torch.randn(2, 6).double()
    h = F.conv2d(silu(group_norm(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    h = h + (silu(emb) @ block.embedding.weight.T + block.embedding.bias)[..., None, None]
    h = F.conv2d(silu(group_norm(h, block.norm2)), block.conv2.weight, block.conv2.bias, padding=1)
    skip = x if c_in == c else torch.einsum("oi,bihw->bohw", block.skip.weight[..., 0, 0], x) + block.skip.bias[:, None, None]
    assert torch.allclose(block(x, emb), skip + h, atol=1e-12)


@pytest.mark.parametrize("c, head_channels, heads", [(8, 4, 2), (8, 8, 1), (8, 64, 1), (12, 4, 3)])
@torch.no_grad()
def test_attention_equals_a_loop_over_heads_and_pixels(c, head_channels, heads):
    attention, x = worn(Attention(c, head_channels)).double(), torch.randn(2, c, 3, 4).double()
    assert attention.heads == heads
    tokens, d, out = group_norm(x, attention.norm).flatten(2), c // heads, torch.zeros(2, c, 12).double()        # (B, C, HW)
    qkv = torch.einsum("oi,bin->bon", attention.qkv.weight, tokens) + attention.qkv.bias[:, None]
    for b in range(2):
        for head in range(heads):
            q, k, v = (qkv[b, part * c + head * d:part * c + (head + 1) * d] for part in range(3))               # (d, HW)
            for i in range(12):
                weights = torch.stack([(q[:, i] * k[:, j]).sum() / math.sqrt(d) for j in range(12)]).exp()
                out[b, head * d:(head + 1) * d, i] = (v * weights).sum(1) / weights.sum()
    out = torch.einsum("oi,bin->bon", attention.projection.weight, out) + attention.projection.bias[:, None]
    assert torch.allclose(attention(x), x + out.view_as(x), atol=1e-12)


@torch.no_grad()
def test_the_embedding_is_an_mlp_of_the_sinusoid_plus_the_row_of_the_class():
    net, t, y = worn(tiny(num_classes=3)), torch.tensor([0., 500.]), torch.tensor([2, 0])
    first, _, last = net.time
    hidden = silu(sinusoid(t, 8) @ first.weight.T + first.bias)
    assert torch.allclose(net.embed(t, y), hidden @ last.weight.T + last.bias + net.classes.weight[y], atol=1e-5)


@torch.no_grad()
def test_the_network_equals_its_blocks_joined_by_hand():
    net, (x, t), y = worn(tiny(num_res_blocks=2, num_classes=2)), inputs(), torch.tensor([1, 0])
    emb, h, features = net.embed(t, y), x, []
    for level in range(3):
        h = F.conv2d(h, net.enter[level].weight, net.enter[level].bias, stride=2 if level else 1, padding=1)
        features.append(h)
        for i in range(2):
            h = net.down[level][i](h, emb)
            features.append(h)
    h = net.middle[1](net.middle[0](h, emb), emb)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(net.encode(x, t, y), [*features, h], strict=True))
    for level in range(3):                                               # from the lowest up, the newest skip first
        for i in range(3):
            h = net.up[level][i](torch.cat([h, features.pop()], 1), emb)
        end = net.leave[level]
        h = F.interpolate(h, scale_factor=2, mode="nearest") if level < 2 else silu(group_norm(h, end[0]))
        h = F.conv2d(h, end[-1].weight, end[-1].bias, padding=1)
    assert not features and torch.allclose(net(x, t, y), h, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_values_enter_through_a_linear_layer_beside_the_time():
    net, (x, t), values = worn(tiny(num_values=3)), inputs(), torch.randn(2, 3)
    assert torch.allclose(net.embed(t, values), net.time_embedding(t) + values @ net.classes.weight.T + net.classes.bias, atol=1e-5)
    assert net.classes.in_features == 3 and not torch.allclose(net(x, t, values), net(x, t, values + 1))
    with pytest.raises(ValueError, match="y is missing"):
        net(x, t)


@torch.no_grad()
def test_what_is_read_is_linear_in_the_pixels_of_the_middle():
    net, (x, t) = worn(tiny(num_read=3)), inputs()
    features = net.encode(x, t)
    wanted = torch.einsum("bchw,kc->bkhw", features[-1], net.reader.weight) + net.reader.bias.view(3, 1, 1)
    assert torch.allclose(net.read(features), wanted, atol=1e-5) and wanted.std() > 1e-3
    fresh = tiny(num_read=3)
    assert not fresh.read(fresh.encode(x, t)).any() and tiny().reader is None and torch.equal(net(x, t), net.decode(features, t))


@torch.no_grad()
def test_a_late_class_enters_the_up_blocks_alone_so_that_one_encoding_serves_all_classes():
    (x, t), y = inputs(), torch.tensor([1, 0])
    late, early = worn(tiny(num_classes=2, late_class=True)), worn(tiny(num_classes=2))
    assert late.state_dict().keys() == early.state_dict().keys()
    features = late.encode(x, t)
    assert all(torch.equal(*pair) for pair in zip(features, late.encode(x, t, y), strict=True))
    for k in range(2):
        labels = torch.full((2,), k)
        assert torch.equal(late.decode(features, t, labels), late(x, t, labels))
    assert not torch.allclose(late(x, t, y), late(x, t, 1 - y)) and not torch.allclose(late(x, t, y), early(x, t, y))
    twice = [f.repeat_interleave(2, 0) for f in features]               # an encoding an image, a decoding an image and class
    both = late.decode(twice, t.repeat_interleave(2), torch.tensor([0, 1, 0, 1]))
    assert torch.allclose(both[::2], late(x, t, torch.zeros(2, dtype=torch.long)), atol=1e-5)
    with pytest.raises(ValueError, match="y is missing"):
        late(x, t)


# ---------------------------------------------------------------------------------------------- norms and small networks
@pytest.mark.parametrize("c, groups", [(2, 1), (6, 3), (8, 4), (32, 16), (48, 24), (64, 32), (96, 32), (128, 32), (1024, 32)])
def test_a_norm_has_32_groups_or_as_many_as_leave_two_channels_to_each(c, groups):
    assert norm(c).num_groups == groups


@torch.no_grad()
def test_groups_of_one_channel_would_lose_the_time_embedding():
    block, x, emb = worn(ResBlock(8, 8, 6)), torch.randn(1, 8, 5, 5), torch.randn(2, 1, 6)
    assert not torch.allclose(block(x, emb[0]), block(x, emb[1]), atol=1e-2)
    block.norm2 = nn.GroupNorm(8, 8)
    assert torch.allclose(block(x, emb[0]), block(x, emb[1]), atol=1e-5)


# ---------------------------------------------------------------------------------------------- the whole network
@pytest.mark.parametrize("in_channels, out_channels, side", [(1, 1, (16, 16)), (2, 2, (16, 16)), (3, 3, (8, 20)), (4, 4, (16, 16)),
                                                             (6, 6, (4, 4)), (8, 8, (16, 16)), (4, 3, (16, 16))])
@torch.no_grad()
def test_the_output_has_the_images_sides_and_its_own_channels(in_channels, out_channels, side):
    net = tiny(in_channels, out_channels)
    assert net(torch.randn(2, in_channels, *side), torch.rand(2)).shape == (2, out_channels, *side)


@pytest.mark.parametrize("classes", [None, 4])
@torch.no_grad()
def test_a_fresh_network_gives_exactly_zero(classes):
    (x, t), y = inputs(), None if classes is None else torch.tensor([0, 3])
    assert tiny(num_classes=classes)(x, t, y).eq(0).all()


@torch.no_grad()
def test_a_fresh_block_adds_nothing_to_its_skip():
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    assert torch.equal(Block(8, 8, 6, head_channels=4)(x, emb), x)
    wider = Block(8, 12, 6, head_channels=4)
    assert torch.equal(wider(x, emb), wider.res.skip(x))


@torch.no_grad()
def test_image_time_and_class_each_change_the_output():
    net, (x, t), y = worn(tiny(num_classes=3)), inputs(), torch.tensor([0, 1])
    out = net(x, t, y)
    for changed in (net(x + .5, t, y), net(x, t + 20, y), net(x, t, y + 1)):
        assert ((changed - out).abs().amax((1, 2, 3)) > 1e-3).all()
    assert torch.equal(net(x, t, y), out)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    net, (x, t), y = worn(tiny(num_classes=3)), inputs(3), torch.tensor([0, 1, 2])
    alone = torch.cat([net(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert torch.allclose(net(x, t, y), alone, atol=1e-4)


@torch.no_grad()
def test_whole_times_are_taken_as_well():
    net, (x, t) = worn(tiny()), inputs()
    assert torch.equal(net(x, t.long()), net(x, t.long().float()))


@torch.no_grad()
def test_dropout_acts_in_training_alone():
    net, (x, t) = worn(tiny(dropout=.5)), inputs()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.allclose(net(x, t), net(x, t))


def test_gradients_reach_every_parameter():
    net, (x, t) = worn(tiny(num_res_blocks=2, num_classes=2)), inputs()
    net(x, t, torch.tensor([0, 1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


# ---------------------------------------------------------------------------------------------- encode
def decoder(net):
    return [m for part in (net.up, net.leave) for m in part.modules() if not isinstance(m, nn.ModuleList)]


def test_mediffusions_features_are_ten_tensors_of_5632_channels():
    net = meta(**MEDIFFUSION)
    features = net.encode(torch.empty(2, 4, 32, 32, device="meta"), torch.empty(2, device="meta"))
    assert [tuple(f.shape[1:3]) for f in features] == [(256, 32)] * 3 + [(256, 16)] + [(512, 16)] * 2 + [(512, 8)] + [(1024, 8)] * 3
    assert len(features) == 10 and sum(f.shape[1] for f in features) == 5632
    small = meta(**MEDIFFUSION | dict(channels=64))
    assert sum(f.shape[1] for f in small.encode(torch.empty(1, 4, 16, 16, device="meta"), torch.empty(1, device="meta"))) == 1408


@torch.no_grad()
def test_encode_calls_no_module_of_the_decoder_and_forward_calls_all():
    net, (x, t), calls = tiny(), inputs(), []
    for m in decoder(net):
        m.register_forward_hook(lambda m, args, out: calls.append(m))
    net.encode(x, t)
    assert not calls
    net(x, t)
    assert set(calls) == set(decoder(net))


def test_a_loss_on_the_features_has_no_gradient_in_the_decoder():
    net, (x, t) = worn(tiny()), inputs()
    sum(f.mean((2, 3)).square().sum() for f in net.encode(x, t)).backward()
    ours = {id(p) for m in decoder(net) for p in m.parameters()}
    assert all((p.grad is None) if id(p) in ours else p.grad.any() for p in net.parameters())


# ---------------------------------------------------------------------------------------------- formats and compilers
@torch.no_grad()
def test_channels_last_gives_the_same_numbers():
    net, (x, t) = worn(tiny(num_res_blocks=2)), inputs()
    out = net(x, t)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    assert torch.allclose(last, out, atol=1e-4) and last.is_contiguous(memory_format=torch.channels_last)


def test_under_autocast_the_output_is_bfloat16_and_close():
    net, (x, t) = worn(tiny()), inputs()
    with torch.no_grad():
        out = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t)
    assert half.dtype == torch.bfloat16 and (half - out).norm() < .05 * out.norm()
    half.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_network_of_another_dtype_answers_in_it(dtype):
    net, (x, t) = worn(tiny()).to(dtype), inputs()
    assert net(x.to(dtype), t).dtype == dtype


@torch.no_grad()
def test_the_compiler_needs_one_graph():
    net, (x, t), y = worn(tiny(num_classes=2)), inputs(), torch.tensor([0, 1])
    compiled = torch.compile(net, backend="eager", fullgraph=True)       # raises where python depends on the data
    assert torch.allclose(compiled(x, t, y), net(x, t, y), atol=1e-5)


def test_doubling_is_nearest_neighbour_interpolation():
    x = torch.arange(12.).view(1, 2, 2, 3)
    assert torch.equal(Double()(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler writes C++")
def test_compiled_under_bfloat16_the_gradient_goes_through_doubling():
    first, second, last = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 32), (32, 32), (32, 3)))
    net = nn.Sequential(first, Double(), second, norm(32), nn.SiLU(), last)
    x, grads = torch.randn(4, 3, 8, 8), []
    for f, amp in ((net, False), (torch.compile(net), True)):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = f(x)
        out.float().square().mean().backward()
        grads.append(first.weight.grad.clone())                          # zero with nn.Upsample, torch 2.13
    assert (grads[1] - grads[0]).norm() < .05 * grads[0].norm()


# ---------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("H, W", [(30, 32), (32, 30), (28, 28), (7, 16)])
@pytest.mark.parametrize("call", ["forward", "encode"])
def test_sides_that_cannot_be_halved_as_often_are_refused_with_the_multiple_that_is_needed(call, H, W):
    net = meta(4, 4, **MEDSYMMFLOW)
    with pytest.raises(ValueError, match=f"image of {H}x{W}: the sides must be multiples of 8, for 4 levels"):
        getattr(net, call)(torch.empty(1, 4, H, W, device="meta"), torch.empty(1, device="meta"))


@pytest.mark.parametrize("call", ["forward", "encode"])
def test_a_class_is_needed_where_classes_are_known_and_refused_where_not(call):
    x, t = inputs()
    with pytest.raises(ValueError, match="without num_classes"):
        getattr(tiny(), call)(x, t, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="y is missing"):
        getattr(tiny(num_classes=2), call)(x, t)


def test_channels_that_do_not_divide_into_heads_or_halves_are_refused():
    with pytest.raises(ValueError, match="20 channels cannot be shared by 3 heads"):
        Block(8, 20, 8, head_channels=6)
    with pytest.raises(ValueError, match="channels 9: must be even"):
        tiny(channels=9)
