"""common/autoencoder.py: latent-diffusion's sizes and names, a second pass by torch's functions, the posterior, others' weights."""
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import run
from common.autoencoder import Attention, AutoencoderKL, downsample, kl, load_autoencoder, norm, sample, upsample


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
