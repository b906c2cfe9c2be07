"""common/autoencoder.py: latent-diffusion's sizes and names, a second pass by torch's functions, the posterior, others' weights, the losses."""
import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import run
from common.autoencoder import (Attention, AutoencoderKL, Codec, Discriminator, Perceptual, adaptive_weight, discriminator_loss, downsample, gan_losses,
                                gan_weight, kl, load_autoencoder, norm, pyramid, reconstruction_loss, sample, upsample)


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


def meta(*args, **kwargs):
    """A network without memory: enough for names, shapes and counts."""
    with torch.device("meta"):
        return AutoencoderKL(*args, **kwargs)


def tiny(channels=3, width=8, mult=(1, 2, 2), blocks=1, latent=4):
    return AutoencoderKL(channels, width, mult, blocks, latent)


def worn(module):
    """As after training: no norm is at its start."""
    for p in module.parameters():
        p.data += .1 * torch.randn_like(p)
    return module.eval()


def latent_diffusion_keys(mult, blocks):
    """The names in latent-diffusion's files, spelled out by their scheme."""
    def block(name, shortcut=False):
        return [f"{name}.{part}" for part in ("norm1", "conv1", "norm2", "conv2") + ("nin_shortcut",) * shortcut]

    def ends_and_middle(side):
        attention = [f"{side}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
        middle = [*block(f"{side}.mid.block_1"), *attention, *block(f"{side}.mid.block_2")]
        return [f"{side}.conv_in", *middle, f"{side}.norm_out", f"{side}.conv_out"]

    modules, last = ["quant_conv", "post_quant_conv", *ends_and_middle("encoder"), *ends_and_middle("decoder")], len(mult) - 1
    for i in range(len(mult)):
        for j in range(blocks):
            modules += block(f"encoder.down.{i}.block.{j}", j == 0 and i > 0 and mult[i] != mult[i - 1])
        for j in range(blocks + 1):
            modules += block(f"decoder.up.{i}.block.{j}", j == 0 and i < last and mult[i] != mult[i + 1])
        modules += [f"encoder.down.{i}.downsample.conv"] * (i < last) + [f"decoder.up.{i}.upsample.conv"] * (i > 0)
    return [f"{m}.{part}" for m in modules for part in ("weight", "bias")]


# ---------------------------------------------------------------------------------------------- oracle: latent-diffusion's files
@pytest.mark.parametrize("channels, parameters, encoder, decoder", [
    (3, 83_653_863, 34_163_592, 49_490_179), (1, 83_649_253, 34_161_288, 49_487_873)])
def test_kl_f8_has_latent_diffusions_number_of_parameters(channels, parameters, encoder, decoder):
    net = meta(channels)
    assert [sum(p.numel() for p in m.parameters()) for m in (net, net.encoder, net.decoder)] == [parameters, encoder, decoder]


@pytest.mark.parametrize("mult, blocks, entries", [((1, 2, 4, 4), 2, 248), ((1, 2, 4), 2, 204), ((1, 1), 1, 120), ((1,), 1, 92)])
def test_the_state_dict_has_latent_diffusions_names_and_no_other(mult, blocks, entries):
    keys = list(meta(mult=mult, blocks=blocks).state_dict())
    assert set(keys) == set(latent_diffusion_keys(mult, blocks)) and len(keys) == entries


def test_tensors_have_the_shapes_of_latent_diffusions_files():
    state = meta().state_dict()
    shapes = {
        "encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3), "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1), "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,), "encoder.conv_out.weight": (8, 512, 3, 3), "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1), "decoder.conv_in.weight": (512, 4, 3, 3), "decoder.mid.attn_1.q.bias": (512,),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3), "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1), "decoder.up.0.block.2.conv2.bias": (128,),
        "decoder.norm_out.bias": (128,), "decoder.conv_out.weight": (3, 128, 3, 3)}
    assert {k: tuple(state[k].shape) for k in shapes} == shapes


@pytest.mark.parametrize("part, places", [
    ("nin_shortcut", {"encoder.down.1.block.0", "encoder.down.2.block.0", "decoder.up.0.block.0", "decoder.up.1.block.0"}),
    ("downsample.conv", {f"encoder.down.{i}" for i in (0, 1, 2)}), ("upsample.conv", {f"decoder.up.{i}" for i in (1, 2, 3)})])
def test_shortcuts_stand_where_channels_change_and_all_levels_but_one_change_the_sides(part, places):
    end = f".{part}.weight"
    assert {k.removesuffix(end) for k in meta().state_dict() if k.endswith(end)} == places


@pytest.mark.parametrize("channels, H, W", [(3, 256, 256), (1, 256, 256), (3, 224, 320), (1, 8, 8)])
def test_the_latent_has_four_channels_and_an_eighth_of_the_sides(channels, H, W):
    net = meta(channels)
    mean, logvar = net.encode(torch.empty(2, channels, H, W, device="meta"))
    assert mean.shape == logvar.shape == (2, 4, H // 8, W // 8) and net.decode(mean).shape == (2, channels, H, W)


def test_norms_have_32_groups_and_latent_diffusions_epsilon():
    norms = [m for m in meta().modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 52 and all(m.num_groups == 32 and m.eps == 1e-6 for m in norms)


# ---------------------------------------------------------------------------------------------- oracle: a second pass
def passes(state, levels, blocks):
    """encode and decode from the weights alone, by their names: no module of common/autoencoder.py takes part."""
    def conv(name, x, **kwargs):
        return F.conv2d(x, state[name + ".weight"], state[name + ".bias"], **kwargs)

    def normed(name, x):
        c = x.shape[1]
        groups = next(g for g in range(min(32, c // 2), 0, -1) if c % g == 0)
        return F.group_norm(x, groups, state[name + ".weight"], state[name + ".bias"], 1e-6)

    def block(name, x):
        h = conv(f"{name}.conv1", F.silu(normed(f"{name}.norm1", x)), padding=1)
        h = conv(f"{name}.conv2", F.silu(normed(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def middle(name, x):
        x = block(f"{name}.block_1", x)
        h = normed(f"{name}.attn_1.norm", x)
        q, k, v = (conv(f"{name}.attn_1.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -.5, dim=2)
        x = x + conv(f"{name}.attn_1.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))
        return block(f"{name}.block_2", x)

    def encode(x):
        h = conv("encoder.conv_in", x, padding=1)
        for i in range(levels):
            for j in range(blocks):
                h = block(f"encoder.down.{i}.block.{j}", h)
            if i < levels - 1:
                h = conv(f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
        h = F.silu(normed("encoder.norm_out", middle("encoder.mid", h)))
        h = conv("quant_conv", conv("encoder.conv_out", h, padding=1))
        return h[:, :h.shape[1] // 2], h[:, h.shape[1] // 2:].clamp(-30, 20)

    def decode(z):
        h = middle("decoder.mid", conv("decoder.conv_in", conv("post_quant_conv", z), padding=1))
        for i in range(levels - 1, -1, -1):
            for j in range(blocks + 1):
                h = block(f"decoder.up.{i}.block.{j}", h)
            if i > 0:
                h = conv(f"decoder.up.{i}.upsample.conv", F.interpolate(h, scale_factor=2, mode="nearest"), padding=1)
        return conv("decoder.conv_out", F.silu(normed("decoder.norm_out", h)), padding=1)
    return encode, decode


@pytest.mark.parametrize("channels, mult, blocks", [(3, (1, 2, 2), 1), (1, (1, 2, 4, 4), 2), (3, (2, 1), 1), (1, (3,), 2)])
@torch.no_grad()
def test_encode_and_decode_equal_a_pass_written_with_torchs_functions(channels, mult, blocks):
    net = worn(tiny(channels, 8, mult, blocks)).double()
    encode, decode = passes(net.state_dict(), len(mult), blocks)
    x = torch.rand(2, channels, 16, 24).double() * 2 - 1
    z = torch.randn(2, 4, 16 >> len(mult) - 1, 24 >> len(mult) - 1).double()
    assert all(torch.allclose(*pair, atol=1e-10) for pair in zip(net.encode(x), encode(x), strict=True))
    assert torch.allclose(net.decode(z), decode(z), atol=1e-10)


@torch.no_grad()
def test_downsampling_equals_a_double_loop_with_zeros_right_and_below_only():
    module, x = downsample(2).double(), torch.randn(1, 2, 4, 6).double()
    out = module.conv.bias[:, None, None].repeat(1, 2, 3)
    for y in range(2):
        for column in range(3):
            for dy in range(3):
                for dx in range(3):
                    if 2 * y + dy < 4 and 2 * column + dx < 6:           # beyond: zeros. Nothing is read above or left of the image
                        out[:, y, column] += module.conv.weight[:, :, dy, dx] @ x[0, :, 2 * y + dy, 2 * column + dx]
    assert torch.allclose(module(x)[0], out, atol=1e-12)
    symmetric = F.conv2d(x, module.conv.weight, module.conv.bias, stride=2, padding=1)
    assert symmetric.shape == module(x).shape and not torch.allclose(symmetric, module(x), atol=.1)


@torch.no_grad()
def test_upsampling_repeats_every_pixel_before_the_convolution():
    module, x = upsample(2), torch.arange(12.).view(1, 2, 2, 3)
    module.conv.weight.copy_(F.pad(torch.eye(2)[..., None, None], (1, 1, 1, 1)))         # a convolution that changes nothing
    module.conv.bias.zero_()
    assert torch.equal(module(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@torch.no_grad()
def test_attention_equals_its_formula_pixel_by_pixel():
    attention, x = worn(Attention(8)).double(), torch.randn(2, 8, 3, 4).double()
    h = attention.norm(x).flatten(2)
    q, k, v = (torch.einsum("oi,bin->bon", m.weight[..., 0, 0], h) + m.bias[:, None] for m in (attention.q, attention.k, attention.v))
    out = torch.empty_like(h)
    for i in range(12):
        weights = (torch.einsum("bc,bcj->bj", q[..., i], k) / 8 ** .5).exp()
        out[..., i] = torch.einsum("bj,bcj->bc", weights, v) / weights.sum(1, keepdim=True)
    out = torch.einsum("oi,bin->bon", attention.proj_out.weight[..., 0, 0], out) + attention.proj_out.bias[:, None]
    assert torch.allclose(attention(x), x + out.view_as(x), atol=1e-12)


# ---------------------------------------------------------------------------------------------- norms of small networks
@pytest.mark.parametrize("c, groups", [(1, 1), (2, 1), (6, 3), (8, 4), (32, 16), (64, 32), (96, 32), (128, 32), (512, 32)])
def test_a_norm_has_32_groups_or_as_many_as_leave_two_channels_to_each(c, groups):
    assert norm(c).num_groups == groups


@torch.no_grad()
def test_groups_of_one_channel_would_lose_the_brightness():
    h, brighter = torch.randn(1, 8, 6, 6), torch.tensor([1., 0] * 4)[:, None, None]
    assert not torch.allclose(norm(8)(h + brighter), norm(8)(h), atol=.1)
    assert torch.allclose(nn.GroupNorm(8, 8)(h + brighter), nn.GroupNorm(8, 8)(h), atol=1e-5)


# ---------------------------------------------------------------------------------------------- the posterior
def test_the_kl_of_the_standard_normal_is_zero_and_of_any_other_positive():
    zero = torch.zeros(3, 4, 2, 2)
    assert torch.equal(kl(zero, zero), torch.zeros(3))
    assert (kl(zero + .1, zero) > 0).all() and (kl(zero, zero + .1) > 0).all() and (kl(zero, zero - .1) > 0).all()


def test_the_kl_equals_torchs_and_is_summed_over_each_image():
    mean, logvar = torch.randn(3, 4, 2, 5).double(), torch.randn(3, 4, 2, 5).double()
    each = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0., 1.))
    assert torch.allclose(kl(mean, logvar), each.sum((1, 2, 3)))


def test_the_kl_is_the_mean_of_log_q_minus_log_p_over_samples():
    mean, logvar = torch.tensor([[.5, -1.]]).double(), torch.tensor([[-1., .4]]).double()
    z = sample(mean, logvar, torch.randn(200_000, 2).double())
    log_q = -.5 * ((z - mean) ** 2 / logvar.exp() + logvar)              # the 2 pi cancel
    excess = (log_q + .5 * z ** 2).sum(1)
    assert abs(excess.mean() - kl(mean, logvar)) < 5 * excess.std() / 200_000 ** .5


def test_the_kl_of_bfloat16_is_summed_in_float32():
    mean, logvar = torch.full((1, 4, 32, 32), .125).bfloat16(), torch.zeros(1, 4, 32, 32).bfloat16()
    assert kl(mean, logvar).dtype == torch.float32 and kl(mean, logvar).item() == 4096 * .125 ** 2 / 2


def test_a_sample_without_noise_is_the_mean_and_noise_is_scaled_by_the_standard_deviation():
    mean, logvar, noise = torch.randn(3, 2, 4, 3, 3)
    assert torch.equal(sample(mean, logvar, torch.zeros_like(noise)), mean)
    assert torch.allclose(sample(mean, logvar, noise), mean + logvar.exp().sqrt() * noise)


@pytest.mark.parametrize("bias, wanted", [(100., 20.), (-100., -30.)])
@torch.no_grad()
def test_the_log_variance_is_clamped_and_the_mean_is_not(bias, wanted):
    net = tiny(width=4)
    net.quant_conv.bias += bias
    mean, logvar = net.encode(torch.zeros(1, 3, 8, 8))
    assert (logvar == wanted).all() and (mean.abs() > 50).all()
    assert sample(mean, logvar, mean).isfinite().all() and kl(mean, logvar).isfinite().all()


# ---------------------------------------------------------------------------------------------- the whole network
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_reach_every_parameter_but_the_bias_of_the_keys(channels):
    net, x = worn(tiny(channels)), torch.rand(2, channels, 16, 16) * 2 - 1
    mean, logvar = net.encode(x)
    out = net.decode(sample(mean, logvar, torch.randn_like(mean)))
    ((out - x).abs().sum() + kl(mean, logvar).sum()).backward()
    for name, p in net.named_parameters():
        if name.endswith("attn_1.k.bias"):                               # adds the same to all scores of a query: softmax cannot see it
            assert p.grad.abs().max() < 1e-4 * net.get_parameter(name.replace("bias", "weight")).grad.abs().max()
        else:
            assert p.grad.isfinite().all() and p.grad.any(), name


def test_the_gradient_of_the_image_equals_a_finite_difference():
    net, x, step = worn(tiny(1)).double(), torch.rand(1, 1, 8, 8).double(), torch.randn(1, 1, 8, 8).double()

    def loss(x):
        return net.decode(net.encode(x)[0]).square().mean()
    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    with torch.no_grad():
        assert torch.isclose((gradient * step).sum(), (loss(x + 1e-5 * step) - loss(x - 1e-5 * step)) / 2e-5, rtol=1e-5)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    net, x = worn(tiny()), torch.randn(3, 3, 16, 16)
    together, alone = net.decode(net.encode(x)[0]), torch.cat([net.decode(net.encode(x[i:i + 1])[0]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("mult, H, W, multiple", [
    ((1, 2, 4, 4), 30, 32, 8), ((1, 2, 4, 4), 32, 28, 8), ((1, 2, 2), 14, 16, 4), ((1, 2), 15, 16, 2)])
def test_sides_that_cannot_be_halved_as_often_are_refused_with_the_multiple_that_is_needed(mult, H, W, multiple):
    with pytest.raises(ValueError, match=f"image of {H}x{W}: the sides must be multiples of {multiple}$"):
        meta(1, 4, mult).encode(torch.empty(1, 1, H, W, device="meta"))


@torch.no_grad()
def test_channels_last_gives_the_same_numbers():
    net, x = worn(tiny()), torch.randn(2, 3, 16, 16)
    z, _ = net.encode(x)
    out = net.decode(z)
    net = net.to(memory_format=torch.channels_last)
    assert torch.allclose(net.encode(x.to(memory_format=torch.channels_last))[0], z, atol=1e-4)
    assert torch.allclose(net.decode(z.to(memory_format=torch.channels_last)), out, atol=1e-4)


def test_under_autocast_the_outputs_are_close_and_all_gradients_finite():
    net, x = worn(tiny()), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = net.decode(net.encode(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = net.encode(x)
        half = net.decode(mean)
    assert half.dtype == torch.bfloat16 and (half - out).norm() < .05 * out.norm()
    (half.float().square().sum() + kl(mean, logvar).sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


@torch.no_grad()
def test_the_compiler_needs_one_graph_each_way():
    net, x = worn(tiny()), torch.randn(2, 3, 16, 16)
    encode, decode = (torch.compile(f, backend="eager", fullgraph=True) for f in (net.encode, net.decode))     # raises at a break
    mean, logvar = encode(x)
    assert torch.allclose(mean, net.encode(x)[0], atol=1e-5) and torch.allclose(decode(mean), net.decode(mean), atol=1e-4)


# ---------------------------------------------------------------------------------------------- weights of others
def diffusers_name(key, levels, old):
    """latent-diffusion's name -> diffusers', written the other way round than common/autoencoder.py has it."""
    attention = dict(norm="group_norm", q="query", k="key", v="value", proj_out="proj_attn") if old else \
        dict(norm="group_norm", q="to_q", k="to_k", v="to_v", proj_out="to_out.0")
    key = re.sub(r"mid\.attn_1\.(\w+)", lambda m: f"mid_block.attentions.0.{attention[m[1]]}", key)
    key = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
    key = re.sub(r"down\.(\d)\.block\.", r"down_blocks.\1.resnets.", key)
    key = re.sub(r"down\.(\d)\.downsample\.", r"down_blocks.\1.downsamplers.0.", key)
    key = re.sub(r"up\.(\d)\.block\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.resnets.", key)
    key = re.sub(r"up\.(\d)\.upsample\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.", key)
    return re.sub(r"coder\.norm_out", "coder.conv_norm_out", key.replace("nin_shortcut", "conv_shortcut"))


def diffusers_file(net, old):
    """The weights of `net` as diffusers saves them: attention's 1x1 convolutions are Linears there."""
    return {diffusers_name(k, len(net.decoder.up), old): v.clone()[..., 0, 0] if "attn_1" in k and v.ndim == 4 else v.clone()
            for k, v in net.state_dict().items()}


def assert_same(net, source):
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 4, 4)
    assert all(torch.equal(*pair) for pair in zip(net.encode(x), source.encode(x))) and torch.equal(net.decode(z), source.decode(z))


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "module.", "module.first_stage_model.", "first_stage_model.module."])
@torch.no_grad()
def test_latent_diffusions_weights_load_with_and_without_prefixes(prefix):
    source, net = worn(tiny()), tiny()
    load_autoencoder(net, {prefix + k: v for k, v in source.state_dict().items()})
    assert_same(net, source)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("mult, blocks", [((1, 2, 4), 2), ((1, 2, 2), 1), ((1,), 1)])
@torch.no_grad()
def test_diffusers_weights_give_the_same_outputs(mult, blocks, old):
    source, net = worn(tiny(mult=mult, blocks=blocks)), tiny(mult=mult, blocks=blocks)
    load_autoencoder(net, diffusers_file(source, old))
    assert_same(net, source)


def test_the_names_of_diffusers_are_those_of_its_files():
    """So that the two tables, that of the file and that of this test, cannot be wrong together."""
    names = {"encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
             "encoder.down.2.downsample.conv.bias": "encoder.down_blocks.2.downsamplers.0.conv.bias",
             "encoder.mid.block_2.norm1.weight": "encoder.mid_block.resnets.1.norm1.weight",
             "encoder.norm_out.bias": "encoder.conv_norm_out.bias",
             "decoder.up.0.block.0.nin_shortcut.bias": "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
             "decoder.up.3.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
             "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
             "post_quant_conv.bias": "post_quant_conv.bias"}
    new, old = ([diffusers_name(k, 4, old) for k in meta().state_dict()] for old in (False, True))
    assert len(set(new)) == len(set(old)) == 248 and set(names.values()) <= set(new)
    assert {k: diffusers_name(k, 4, False) for k in names} == names
    assert [k for k in old if k not in new] == [f"{side}.mid_block.attentions.0.{part}.{kind}" for side in ("encoder", "decoder")
                                                for part in ("query", "key", "value", "proj_attn") for kind in ("weight", "bias")]


@torch.no_grad()
def test_what_else_is_in_a_file_is_ignored():
    source, net = worn(tiny()), tiny()
    more = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.randn(8, 3, 4, 4),
            "model_ema.decay": torch.tensor(.9999), "model_ema.encoderconv_inweight": torch.randn(8, 3, 3, 3),
            "cond_stage_model.transformer.encoder.weight": torch.randn(3, 3), "epoch": 3, "optimizer_states": [{}], 7: torch.zeros(2)}
    load_autoencoder(net, more | source.state_dict())
    assert_same(net, source)


@torch.no_grad()
def test_a_lightning_checkpoint_on_disk_loads_without_running_code_from_it(tmp_path):
    source, net = worn(tiny()), tiny()
    torch.save({"state_dict": source.state_dict(), "epoch": 93, "global_step": 840_000}, tmp_path / "vae.ckpt")
    load_autoencoder(net, run.load_weights(tmp_path / "vae.ckpt"))
    assert_same(net, source)


@torch.no_grad()
def test_half_precision_files_load_into_a_network_that_stays_float32():
    source, net = worn(tiny()), tiny()
    load_autoencoder(net, {k: v.half() for k, v in source.state_dict().items()})
    assert all(p.dtype == torch.float32 and torch.equal(p, q.half().float()) for p, q in zip(net.parameters(), source.parameters()))


def test_loading_leaves_the_given_dict_as_it_was():
    weights = diffusers_file(tiny(), True)
    before = {k: (v.shape, v.clone()) for k, v in weights.items()}
    load_autoencoder(tiny(), weights)
    assert weights.keys() == before.keys() and all(v.shape == before[k][0] and torch.equal(v, before[k][1]) for k, v in weights.items())


@pytest.mark.parametrize("given, wanted, words", [
    (dict(), dict(channels=1), "encoder.conv_in.weight of shape (8, 3, 3, 3), the network needs (8, 1, 3, 3)"),
    (dict(width=16), dict(), "encoder.conv_in.weight of shape (16, 3, 3, 3), the network needs (8, 3, 3, 3)"),
    (dict(mult=(1, 2, 4)), dict(), "encoder.down.2.block.0.conv1.weight of shape (32, 16, 3, 3), the network needs (16, 16, 3, 3)"),
    (dict(latent=3), dict(), "encoder.conv_out.weight of shape (6, 16, 3, 3), the network needs (8, 16, 3, 3)"),
    (dict(mult=(1, 2)), dict(), "no tensor encoder.down.1.downsample.conv.weight"),
    (dict(), dict(blocks=2), "no tensor encoder.down.0.block.1.norm1.weight"),
    (dict(mult=(1, 2, 2, 2)), dict(), "has encoder.down.2.downsample.conv.weight, for which the network has no place"),
    (dict(blocks=2), dict(), "has encoder.down.0.block.1.norm1.weight, for which the network has no place")])
def test_weights_of_another_size_are_refused_by_the_name_of_the_first_that_does_not_fit(given, wanted, words):
    weights, net = tiny(**given).state_dict(), tiny(**wanted)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_autoencoder(net, weights)
    assert words in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())          # nothing was half loaded


@pytest.mark.parametrize("key", ["encoder.conv_in.weight", "encoder.mid.attn_1.q.bias", "decoder.up.2.upsample.conv.weight",
                                 "post_quant_conv.bias"])
def test_a_missing_tensor_is_named(key):
    weights = tiny().state_dict()
    del weights[key]
    with pytest.raises(ValueError, match=f"^has no tensor {key}$"):
        load_autoencoder(tiny(), weights)


def test_a_misfit_in_a_diffusers_file_is_named_as_that_file_has_it():
    weights = diffusers_file(tiny(), False)
    key = "decoder.mid_block.attentions.0.to_out.0.weight"
    weights[key] = torch.zeros(4, 4)
    with pytest.raises(ValueError) as caught:
        load_autoencoder(tiny(), weights)
    assert str(caught.value) == f"has {key} of shape (4, 4), the network needs (16, 16, 1, 1)"


def test_a_file_of_something_else_is_refused():
    with pytest.raises(ValueError, match="has no tensor encoder.conv_in.weight"):
        load_autoencoder(tiny(), {"layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3), "epoch": 3})


# ---------------------------------------------------------------------------------------------- training: the perceptual distance
def smooth(n, channels=1, side=16):
    """Toy images in [-1, 1]: waves of few periods, with the contrast of photographs."""
    waves = .4 * torch.randn(n, channels, 4, 4)
    return F.interpolate(waves, size=(side, side), mode="bicubic", align_corners=True).clamp(-1, 1)


def pyramid_by_loops(x, x_hat):
    """Of one image each, numpy (C, H, W): every pixel of every level in turn, the border mirrored."""
    def mirrored(i, n):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    def halved(d):
        C, H, W = d.shape
        out, k = np.zeros((C, (H + 1) // 2, (W + 1) // 2)), [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
        for c, i, j in np.ndindex(out.shape):
            out[c, i, j] = sum(k[a] * k[b] * d[c, mirrored(2 * i + a - 2, H), mirrored(2 * j + b - 2, W)] for a in range(5) for b in range(5))
        return out

    total = 0
    for level in range(3):
        x, x_hat = (halved(x), halved(x_hat)) if level else (x, x_hat)
        C, H, W = x.shape
        down = [abs((x - x_hat)[c, i + 1, j] - (x - x_hat)[c, i, j]) for c in range(C) for i in range(H - 1) for j in range(W)]
        across = [abs((x - x_hat)[c, i, j + 1] - (x - x_hat)[c, i, j]) for c in range(C) for i in range(H) for j in range(W - 1)]
        total += abs(x - x_hat).mean() + np.mean(down) + np.mean(across)
    return total / 3


@pytest.mark.parametrize("channels, H, W", [(1, 8, 8), (3, 8, 8), (3, 11, 14), (1, 16, 9)])
def test_the_pyramid_distance_equals_a_loop_over_pixels_image_by_image(channels, H, W):
    x, x_hat = torch.randn(2, 3, channels, H, W)
    each = [pyramid_by_loops(a, b) for a, b in zip(x.double().numpy(), x_hat.double().numpy())]
    found = pyramid(x, x_hat)
    assert found.shape == (3, 1, 1, 1) and found.dtype == torch.float32 and np.allclose(found.flatten().numpy(), each, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pyramid_distance_is_zero_of_equal_images_c_of_a_shift_by_c_and_about_lpips_of_different_ones(channels):
    x, other = smooth(64, channels, 64), smooth(64, channels, 64)
    assert not pyramid(x, x).any() and torch.allclose(pyramid(x, x + .25), torch.tensor(.25), atol=1e-5)
    assert torch.equal(pyramid(x, other), pyramid(other, x)) and .1 < pyramid(x, other).mean() < .6
    assert (pyramid(x, x.roll(1, 3)) < pyramid(x, x.roll(4, 3))).all()                  # further off, farther


def test_the_gradient_of_the_pyramid_distance_equals_a_finite_difference():
    x, x_hat, step = torch.randn(3, 2, 3, 8, 8)
    (gradient,) = torch.autograd.grad(pyramid(x, x_hat.requires_grad_()).sum(), x_hat)
    with torch.no_grad():
        slope = (pyramid(x, x_hat + 1e-3 * step) - pyramid(x, x_hat - 1e-3 * step)).sum() / 2e-3
    assert torch.isclose((gradient * step).sum(), slope, rtol=2e-2, atol=2e-3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """VGG16 as torchvision builds it, with made-up weights, made-up LPIPS weights, and the files of both."""
    layers, c_in = [], 3
    for c in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512):
        layers += [nn.MaxPool2d(2, 2)] if c == "M" else [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
        c_in = c_in if c == "M" else c
    vgg, folder = nn.Sequential(*layers), tmp_path_factory.mktemp("weights")
    for layer in vgg:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    lins = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    torch.save({f"features.{k}": p for k, p in vgg.named_parameters()} | {"classifier.0.bias": torch.zeros(9)}, folder / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(lins)}, folder / "lins.pth")
    return vgg.eval().requires_grad_(False), lins, folder / "vgg.pth", folder / "lins.pth"


def lpips(vgg, lins, x, x_hat):
    """Zhang et al. 2018, eq. 1, an image at a time."""
    values = []
    for pair in zip(x, x_hat):
        taps = []
        for image in pair:
            r, g, b = image if len(image) == 3 else [image[0]] * 3
            h, maps = torch.stack([(r + .030) / .458, (g + .088) / .448, (b + .188) / .450])[None], []
            for i, layer in enumerate(vgg):
                h = layer(h)
                if i in (3, 8, 15, 22, 29):
                    maps.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
            taps.append(maps)
        values.append(sum(((a - b).square() * w).sum() / a.shape[2] / a.shape[3] for a, b, w in zip(*taps, lins)))
    return torch.stack(values)


@pytest.mark.parametrize("channels, side", [(1, 16), (3, 16), (3, 40)])
def test_lpips_from_files_equals_its_formula_for_colour_and_gray_images(files, channels, side):
    vgg, lins, vgg_file, lins_file = files
    perceptual, x, x_hat = Perceptual(str(vgg_file), lins_file), torch.rand(2, channels, side, side) * 2 - 1, smooth(2, channels, side)
    found = perceptual(x, x_hat)
    assert perceptual.tier == "lpips" and found.shape == (2, 1, 1, 1) and found.dtype == torch.float32
    assert torch.allclose(found.flatten(), lpips(vgg, lins, x, x_hat), rtol=1e-4) and not perceptual(x, x).any()


def test_without_lpips_own_weights_the_distance_is_the_mean_of_one_minus_the_cosine_and_bears_another_name(files):
    vgg, _, vgg_file, _ = files
    perceptual, x, x_hat = Perceptual(vgg_file), smooth(2, 3, 32), smooth(2, 3, 32)
    cosines = [1 - F.cosine_similarity(vgg[:i + 1](z(x)), vgg[:i + 1](z(x_hat))).mean((1, 2)) for i in (3, 8, 15, 22, 29)
               for z in [lambda x: (x - torch.tensor([-.030, -.088, -.188]).view(3, 1, 1)) / torch.tensor([.458, .448, .450]).view(3, 1, 1)]]
    assert perceptual.tier == "vgg-uniform" and torch.allclose(perceptual(x, x_hat).flatten(), sum(cosines) / 5, rtol=1e-3)


def test_without_files_the_distance_is_the_pyramids():
    perceptual, x, x_hat = Perceptual(), smooth(2), smooth(2)
    assert perceptual.tier == "pyramid" and torch.equal(perceptual(x, x_hat), pyramid(x, x_hat))


def test_lpips_is_frozen_gives_the_image_a_finite_gradient_and_follows_its_device(files):
    perceptual = Perceptual(*files[2:])
    x_hat = torch.cat([smooth(2, 3), -torch.ones(1, 3, 16, 16)]).requires_grad_()
    perceptual(smooth(3, 3), x_hat).sum().backward()
    assert x_hat.grad.isfinite().all() and x_hat.grad.flatten(1).any(1).all()
    assert not any(w.requires_grad for w in perceptual.weights.values())                # the file of the fixture holds nn.Parameters
    assert perceptual(torch.empty(2, 1, 16, 16, device="meta"), torch.empty(2, 1, 16, 16, device="meta")).device.type == "meta"


def hollow(path, change=()):
    """The weights of a file with nothing in them, few bytes, and what `change` sets (None: left out)."""
    weights = {k: torch.zeros(1).expand(v.shape) for k, v in run.load_weights(path).items()} | dict(change)
    return {k: v for k, v in weights.items() if v is not None}


@pytest.mark.parametrize("which, change, words", [
    (0, {"features.0.weight": torch.zeros(64, 1, 3, 3)}, "features.0.weight is (64, 1, 3, 3), must be (64, 3, 3, 3)"),
    (0, {"features.28.bias": None}, "features.28.bias is missing, must be (512,)"),
    (0, {"features.17.weight": None, "features.16.weight": torch.zeros(512, 256, 3, 3)}, "features.17.weight is missing"),      # VGG19
    (0, {"features.5.bias": 3.}, "features.5.bias is missing"),
    (1, {"lin3.model.1.weight": torch.zeros(1, 256, 1, 1)}, "lin3.model.1.weight is (1, 256, 1, 1), must be (1, 512, 1, 1)"),    # AlexNet's
    (1, {"lin4.model.1.weight": None}, "lin4.model.1.weight is missing, must be (1, 512, 1, 1)")])
def test_a_perceptual_file_that_does_not_fit_is_refused_by_name_and_tensor(files, tmp_path, which, change, words):
    paths = list(files[2:])
    torch.save(hollow(paths[which], change), tmp_path / "bad.pth")
    paths[which] = tmp_path / "bad.pth"
    with pytest.raises(run.UserError) as caught:
        Perceptual(*paths)
    assert str(caught.value).startswith(f"{('--vgg', '--lpips')[which]} {tmp_path / 'bad.pth'}: {words}") and "\n" not in str(caught.value)


def test_perceptual_files_that_are_none_or_stand_alone_or_in_the_others_place_are_refused(files, tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("VGG16")
    vgg, lins = files[2:]
    for given, named, words in (((tmp_path / "list.pth",), "list.pth", "features.0.weight is missing"), ((tmp_path / "text.pth",), "text.pth", ""),
                                ((tmp_path / "no.pth",), "no.pth", "no such file"), (("", lins), "lins.pth", "name its file too"),
                                ((lins,), "lins.pth", "features.0.weight is missing"), ((vgg, vgg), "vgg.pth", "lin0.model.1.weight is missing")):
        with pytest.raises(run.UserError) as caught:
            Perceptual(*given)
        assert f"{named}: " in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- training: the reconstruction loss
@pytest.mark.parametrize("B", [1, 2, 5])
def test_the_reconstruction_loss_is_summed_over_pixels_and_averaged_over_images_alone(B):
    x, mean = torch.zeros(B, 3, 8, 4), torch.full((B, 4, 2, 2), 2.)
    nll, kl_term, parts = reconstruction_loss(x, x + .5, mean, torch.zeros_like(mean), lambda x, x_hat: torch.full((B, 1, 1, 1), .25), kl_weight=1e-3)
    assert nll == 3 * 8 * 4 * (.5 + .25)                                 # 72, for any B
    assert torch.isclose(kl_term, torch.tensor(1e-3 * 16 * 2 ** 2 / 2)) and parts == {"l1": .5, "perceptual": .25, "kl": 32}


def test_the_reconstruction_loss_of_one_image_does_not_depend_on_its_neighbours_and_the_kl_counts_a_millionth():
    x, x_hat, (mean, logvar) = smooth(3), smooth(3), torch.randn(2, 3, 4, 2, 2)
    nll, kl_term, _ = reconstruction_loss(x, x_hat, mean, logvar, Perceptual())
    each = [reconstruction_loss(*(a[i:i + 1] for a in (x, x_hat, mean, logvar)), Perceptual())[:2] for i in range(3)]
    assert torch.isclose(nll, sum(e[0] for e in each) / 3) and torch.isclose(kl_term, sum(e[1] for e in each) / 3)
    assert torch.isclose(kl_term, 1e-6 * kl(mean, logvar).mean())


def test_the_log_of_the_reconstruction_loss_has_no_gradient_and_the_loss_reaches_image_and_posterior():
    x_hat, mean, logvar = (t.requires_grad_() for t in (smooth(2), torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)))
    nll, kl_term, parts = reconstruction_loss(smooth(2), x_hat, mean, logvar, Perceptual())
    (nll + kl_term).backward()
    assert not any(p.requires_grad for p in parts.values()) and all(t.grad.any() for t in (x_hat, mean, logvar))


# ---------------------------------------------------------------------------------------------- training: the discriminator
@pytest.mark.parametrize("channels, parameters", [(1, 2_763_585), (3, 2_765_633)])
def test_the_discriminator_has_latent_diffusions_parameters_and_maps(channels, parameters):
    with torch.device("meta"):
        net = Discriminator(channels)
    assert sum(p.numel() for p in net.parameters()) == parameters
    for side, out in ((256, 30), (64, 6), (32, 2), (24, 1)):
        assert net(torch.empty(2, channels, side, side, device="meta")).shape == (2, 1, out, out)


def test_the_discriminator_starts_as_latent_diffusions():
    net = Discriminator(3, 32)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == 3 and all(abs(w.mean()) < .003 and abs(w.std() - .02) < .003 for w in weights)
    assert all(abs(m.weight.mean() - 1) < .01 and abs(m.weight.std() - .02) < .01 and not m.bias.any() for m in norms)
    assert sorted(k for k, _ in net.named_parameters()) == sorted(
        [f"main.{i}.weight" for i in (0, 2, 3, 5, 6, 8, 9, 11)] + [f"main.{i}.bias" for i in (0, 3, 6, 9, 11)])      # taming's names


def test_the_discriminator_equals_a_second_pass_by_torchs_functions():
    net, x = Discriminator(3, 8), torch.randn(4, 3, 32, 32)
    state = {k.removeprefix("main."): p + .1 * torch.randn_like(p) for k, p in net.named_parameters()}
    net.load_state_dict({f"main.{k}": v for k, v in state.items()}, strict=False)
    h = F.leaky_relu(F.conv2d(x, state["0.weight"], state["0.bias"], stride=2, padding=1), .2)
    for i, stride in ((2, 2), (5, 2), (8, 1)):
        h = F.conv2d(h, state[f"{i}.weight"], stride=stride, padding=1)
        h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        h = F.leaky_relu(h * state[f"{i + 1}.weight"].view(-1, 1, 1) + state[f"{i + 1}.bias"].view(-1, 1, 1), .2)
    assert torch.allclose(net(x), F.conv2d(h, state["11.weight"], state["11.bias"], padding=1), atol=1e-4)


def test_the_hinge_loss_of_a_few_logits_and_where_it_stops_to_push():
    real, fake = torch.tensor([2., .5, -1.]), torch.tensor([-3., 0., 1.])
    assert torch.isclose(discriminator_loss(real, fake), torch.tensor(.5 * ((0 + .5 + 2) / 3 + (0 + 1 + 2) / 3)))
    assert discriminator_loss(torch.tensor([1., 9.]), torch.tensor([-1., -9.])) == 0 and discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1


def one_step():
    """An autoencoder, a discriminator and images to train them on."""
    torch.manual_seed(1)
    x = smooth(4, 1, 32)
    return AutoencoderKL(1, 8, (1, 2), 1, 4), Discriminator(1, 8), x, torch.randn(4, 4, 16, 16)


def test_one_backward_pass_and_one_optimizer_train_both_nets_as_two_passes_and_two_optimizers_do():
    """The oracle is the way of latent-diffusion: the generator's step, its gradients in the discriminator thrown away, the discriminator's."""
    net, critic, x, noise = one_step()
    theirs, their_critic = copy.deepcopy(net), copy.deepcopy(critic)

    def nll_and_image(net):
        mean, logvar = net.encode(x)
        x_hat = net.decode(sample(mean, logvar, noise))
        return sum(reconstruction_loss(x, x_hat, mean, logvar, Perceptual())[:2]), x_hat

    nll, x_hat = nll_and_image(net)
    g, d = gan_losses(critic, x, x_hat)
    one = torch.optim.Adam([*net.parameters(), *critic.parameters()], 1e-3, (.5, .9))
    (nll + .3 * g + d).backward()
    one.step()

    two = [torch.optim.Adam(n.parameters(), 1e-3, (.5, .9)) for n in (theirs, their_critic)]
    nll, x_hat = nll_and_image(theirs)
    (nll - .3 * their_critic(x_hat).mean()).backward()
    their_critic.zero_grad()
    discriminator_loss(their_critic(x), their_critic(x_hat.detach())).backward()
    for optimizer in two:
        optimizer.step()
    for a, b in ((net, theirs), (critic, their_critic)):
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6) and torch.allclose(p, q, atol=1e-4), name


def test_the_generators_term_reaches_the_image_alone_and_the_discriminators_loss_the_discriminator_alone():
    _, critic, x, _ = one_step()
    x_hat = smooth(4, 1, 32).requires_grad_()
    g, d = gan_losses(critic, x, x_hat)
    g.backward()
    assert x_hat.grad.any() and all(p.grad is None for p in critic.parameters()) and all(p.requires_grad for p in critic.parameters())
    (wanted,) = torch.autograd.grad(-critic(x_hat).mean(), x_hat)
    assert torch.allclose(x_hat.grad, wanted, atol=1e-7)
    before = x_hat.grad.clone()
    d.backward()
    assert torch.equal(x_hat.grad, before)
    assert all(p.grad.any() for name, p in critic.named_parameters() if name != "main.11.bias")     # within the margins it cancels


def test_batch_norms_count_the_real_images_once_and_the_made_ones_once():
    _, critic, x, _ = one_step()
    x_hat, other = smooth(4, 1, 32), copy.deepcopy(critic)
    gan_losses(critic, x, x_hat)
    other(x), other(x_hat)
    assert critic.main[3].num_batches_tracked == 2
    assert all(torch.equal(a, b) for a, b in zip(critic.buffers(), other.buffers()))


def test_under_autocast_the_losses_are_float32_and_close():
    net, critic, x, noise = one_step()
    values = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            mean, logvar = net.encode(x)
            x_hat = net.decode(sample(mean, logvar, noise))
            nll, kl_term, _ = reconstruction_loss(x, x_hat, mean, logvar, Perceptual())
            values.append(torch.stack([nll, kl_term, *gan_losses(critic, x, x_hat)]))
            ratio = adaptive_weight(nll, values[-1][2], net.decoder.conv_out.weight)
    assert values[1].dtype == ratio.dtype == torch.float32 and ratio.isfinite() and torch.allclose(*values, rtol=.05, atol=.02)


# ---------------------------------------------------------------------------------------------- training: the weights of the terms
def test_the_adaptive_weight_is_the_ratio_of_known_gradients_without_a_gradient_and_leaves_the_graph():
    w = torch.tensor([1., 2.], requires_grad=True)
    nll, g = 3 * w[0] + 4 * w[1], -w[0] ** 2                              # gradients (3, 4) and (-2, 0)
    found = adaptive_weight(nll, g, w)
    assert torch.isclose(found, torch.tensor(5 / (2 + 1e-4))) and not found.requires_grad and w.grad is None
    (nll + found * g).backward()
    assert torch.allclose(w.grad, torch.tensor([3 - 2 * 5 / 2.0001, 4]))


@pytest.mark.parametrize("a, b, wanted", [(0., 3., 0.), (1., 0., 1e4), (5., 0., 1e4), (1e-3, 0., 10.), (2., .5, 2 / .5001)])
def test_the_adaptive_weight_lies_in_0_to_10000(a, b, wanted):
    w = torch.ones(1, requires_grad=True)
    assert torch.isclose(adaptive_weight((a * w).sum(), (b * w).sum(), w), torch.tensor(wanted))


def test_the_adaptive_weight_makes_the_generators_gradient_as_long_as_the_reconstructions_at_the_last_layer():
    net, critic, x, noise = one_step()
    mean, logvar = net.encode(x)
    x_hat, last = net.decode(sample(mean, logvar, noise)), net.decoder.conv_out.weight
    nll, _, _ = reconstruction_loss(x, x_hat, mean, logvar, Perceptual())
    g, _ = gan_losses(critic, x, x_hat)
    a, b = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, adaptive_weight(nll, g, last) * g))
    assert torch.isclose(a, b, rtol=.05)                                 # but for the 1e-4


def test_the_discriminator_counts_from_step_50001():
    assert [gan_weight(step) for step in (0, 1, 50_000, 50_001, 50_002, 300_000)] == [0, 0, 0, .5, .5, .5]
    assert [gan_weight(step, weight=1.) for step in (50_000, 50_001)] == [0, 1] and [gan_weight(s, 3, .2) for s in (2, 3)] == [0, .2]


@pytest.mark.usefixtures("one_thread")
def test_a_short_training_lowers_the_error_on_images_that_were_not_trained_on():
    torch.manual_seed(0)
    net, perceptual = AutoencoderKL(1, 8, (1, 2), 1, 4), Perceptual()
    optimizer, held_out = torch.optim.Adam(net.parameters(), 2e-3, (.5, .9)), smooth(32)

    def error():
        with torch.no_grad():
            return (net.decode(net.encode(held_out)[0]) - held_out).abs().mean().item()

    before = error()
    for _ in range(100):
        x = smooth(8)
        mean, logvar = net.encode(x)
        nll, kl_term, _ = reconstruction_loss(x, net.decode(sample(mean, logvar, torch.randn_like(mean))), mean, logvar, perceptual)
        optimizer.zero_grad()
        (nll + kl_term).backward()
        optimizer.step()
    assert error() < .35 * before


def test_cached_latents_can_be_had_under_autocast(tmp_path):
    """On a CPU, bfloat16 autocast refuses to stack half precision."""
    torch.save(AutoencoderKL(1, 8, (1, 2), 1, 4).state_dict(), tmp_path / "ae.pt")
    codec, x = Codec(tmp_path / "ae.pt"), torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        first, again = (codec.encode(x, [0, 1]) for _ in range(2))
    assert first.dtype == torch.float32 and torch.equal(first, again)
