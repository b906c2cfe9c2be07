"""The KL autoencoder of latent diffusion (Rombach et al. 2022): images to a map of 1/8 of the sides with 4 channels, and back ("KL-f8").

    x ── encoder ── quant_conv ── mean, logvar ── z = mean + exp(logvar / 2) noise ── post_quant_conv ── decoder ── x
         conv_in │ down: blocks, halve │ mid │ norm, conv_out                  conv_in │ mid │ up: blocks, double │ norm, conv_out
No skips join the two: all that the decoder knows is z. It has one block more at every level and no tanh at its end (the caller
clamps). A diffusion model works on z as it is (Mediffusion) or times 0.18215 (Stable Diffusion, MedSymmFlow).

    AutoencoderKL()  has 83,653,863 parameters (83,649,253 for gray images). A 256x256 image becomes 4x32x32 for 136 GMAC, and
                     again an image for 311; MedSymmFlow's U-Net on that latent needs 6: encode a data set once.
The keys of the state_dict are latent-diffusion's; `load_autoencoder` reads its files (vae-ft-mse-840000-ema-pruned) and diffusers'.
"""
import re
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from . import run, unet


norm = partial(unet.norm, eps=1e-6)


def conv(c_in, c, kernel=3):
    return nn.Conv2d(c_in, c, kernel, padding=kernel // 2)


def chain(**parts):
    """Modules to be run one after the other, each under its name in latent-diffusion; those without parameters have no key."""
    return nn.Sequential(OrderedDict(parts))


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c, H, W): x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1x1 convolution where c_in != c."""

    def __init__(self, c_in, c):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c)
        self.norm2, self.conv2 = norm(c), conv(c, c)
        self.nin_shortcut = conv(c_in, c, 1) if c_in != c else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """(B, c, H, W) -> the same shape: x + proj_out(softmax(Q K^T / sqrt(c)) V), every pixel a token, one head."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.proj_out = norm(c), *(conv(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))      # (B, 1, HW, C) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


def downsample(c):
    """(B, c, H, W) -> (B, c, H/2, W/2): a 3x3 convolution of stride 2 with zeros right and below only, as the weights expect it."""
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))


def upsample(c):
    """(B, c, H, W) -> (B, c, 2H, 2W): every pixel repeated, then a 3x3 convolution."""
    return chain(enlarge=unet.Double(), conv=conv(c, c))


class AutoencoderKL(nn.Module):
    """Level i has width * mult[i] channels and 1 / 2^i of the image's sides, z `latent` channels. The defaults: KL-f8."""

    def __init__(self, channels=3, width=128, mult=(1, 2, 4, 4), blocks=2, latent=4):
        super().__init__()
        c, last = [width * m for m in mult], len(mult) - 1
        self.multiple = 2 ** last

        def level(c_in, c, n, **resize):
            return chain(block=nn.Sequential(*(ResBlock(c if j else c_in, c) for j in range(n))), **resize)

        def middle(c):
            return chain(block_1=ResBlock(c, c), attn_1=Attention(c), block_2=ResBlock(c, c))

        down, up = {}, {}                                               # in the order of use: up.3, the lowest level, runs first
        for i in range(len(mult)):
            down[f"{i}"] = level(c[i - 1] if i else width, c[i], blocks, downsample=downsample(c[i]) if i < last else nn.Identity())
        for i in reversed(range(len(mult))):
            up[f"{i}"] = level(c[min(i + 1, last)], c[i], blocks + 1, upsample=upsample(c[i]) if i else nn.Identity())
        self.encoder = chain(conv_in=conv(channels, width), down=chain(**down), mid=middle(c[-1]),
                             norm_out=norm(c[-1]), silu=nn.SiLU(), conv_out=conv(c[-1], 2 * latent))
        self.decoder = chain(conv_in=conv(latent, c[-1]), mid=middle(c[-1]), up=chain(**up),
                             norm_out=norm(c[0]), silu=nn.SiLU(), conv_out=conv(c[0], channels))
        self.quant_conv, self.post_quant_conv = conv(2 * latent, 2 * latent, 1), conv(latent, latent, 1)

    def encode(self, x):
        """x (B, channels, H, W) in [-1, 1] -> mean, logvar of q(z|x), (B, latent, H/8, W/8) each. ValueError for other sides."""
        H, W = x.shape[-2:]
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"image of {H}x{W}: the sides must be multiples of {self.multiple}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                              # exp(logvar) stays finite

    def decode(self, z):
        """z (B, latent, h, w) -> (B, channels, 8h, 8w), near [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(z))


def sample(mean, logvar, noise):
    """z ~ N(mean, exp(logvar)), made from noise ~ N(0, I) so that it can be differentiated (Kingma & Welling 2014, eq. 10)."""
    return mean + (logvar / 2).exp() * noise


def kl(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)) of every image, in nats: (B, ...) -> (B,). Kingma & Welling 2014, appendix B.

    A sum over the latent. Latent diffusion weighs it by 1e-6 against an error that is a sum over pixels and channels as well;
    against a mean it would count 65,536 times as much for a gray image of 256x256.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)              # sums of bfloat16 lose the small terms
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    return (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1) / 2


# Names in diffusers (for its attention now, and until 2023): in latent-diffusion. `mid_block.resnets` must come before `resnets`.
DIFFUSERS = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
             ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".proj_out.", ".group_norm.": ".norm.",
             ".query.": ".q.", ".key.": ".k.", ".value.": ".v.", ".proj_attn.": ".proj_out.",
             "down_blocks": "down", "resnets": "block", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
             "downsamplers.0": "downsample", "upsamplers.0": "upsample"}


def rename(key, levels):
    """A key of latent-diffusion, or of diffusers, as it stands in `AutoencoderKL`: without prefixes, up_blocks.0 as up.3."""
    key = re.sub(r"^((module|first_stage_model)\.)+", "", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
    for theirs, ours in DIFFUSERS.items():
        key = key.replace(theirs, ours)
    return key


def load_autoencoder(net, weights):
    """Loads the weights of latent-diffusion or diffusers (a dict of tensors) into `net`; whatever is not of the autoencoder is ignored.

    Raises ValueError naming the first tensor that is missing, has another shape, or has no place in `net` (a level more, say,
    which would otherwise be dropped in silence). Nothing is loaded then.
    """
    found, own = {}, net.state_dict()
    for key, tensor in weights.items():
        name = rename(str(key), len(net.decoder.up)) if isinstance(tensor, torch.Tensor) else ""
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            found[name] = key, tensor[:, :, None, None] if tensor.ndim == 2 else tensor     # a Linear is a 1x1 convolution
    for name, tensor in own.items():
        if name not in found:
            raise ValueError(f"has no tensor {name}")
        key, given = found[name]
        if given.shape != tensor.shape:
            raise ValueError(f"has {key} of shape {tuple(weights[key].shape)}, the network needs {tuple(tensor.shape)}")
    if more := [key for name, (key, _) in found.items() if name not in own]:
        raise ValueError(f"has {more[0]}, for which the network has no place")
    net.load_state_dict({name: tensor for name, (_, tensor) in found.items()})


def autoencoder_from(weights):
    """An AutoencoderKL of the sizes that the weights have, loaded and frozen. ValueError where they are no autoencoder's."""
    found = [int(m[1]) for key in weights if (m := re.search(r"encoder\.down(?:_blocks)?\.(\d+)\.", str(key)))]
    shapes = {rename(str(key), 1 + max(found, default=0)): tensor.shape for key, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    try:
        width, channels = shapes["encoder.conv_in.weight"][:2]
        mult = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // width for i in range(1 + max(found))]
        blocks = sum(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", key) is not None for key in shapes)
        net = AutoencoderKL(channels, width, mult, blocks, shapes["post_quant_conv.weight"][0])
    except (KeyError, ValueError) as fault:
        raise ValueError(f"is no KL autoencoder (no tensor {str(fault)})") from None
    load_autoencoder(net, weights)
    return net.eval().requires_grad_(False)


class Codec:
    """A frozen autoencoder from a file, for what flows or is noised in its latents. It is no part of a network's weights: a checkpoint
    knows it by `id`, a copy of a network shares it. Raises run.UserError where the file is no autoencoder's."""

    def __init__(self, path):
        try:
            self.net = autoencoder_from(run.load_weights(path))
        except ValueError as fault:
            raise run.UserError(f"--autoencoder {path}: {fault}") from None
        self.id, self.path, self.known = run.file_id(path), path, {}
        self.channels, self.latent = self.net.decoder.conv_out.out_channels, self.net.post_quant_conv.in_channels

    def __deepcopy__(self, memo):
        return self

    def check(self, trained_with):
        """Raises run.UserError where a model's `id` says that it was trained with another one."""
        if int(trained_with) != self.id:
            raise run.UserError(f"--autoencoder {self.path}: is not the one that this model was trained with")

    @torch.no_grad()
    def encode(self, x, keys=()):
        """Images (B, channels, H, W), or gray ones (B, 1, H, W), in [-1, 1] -> latents (B, latent, H/f, W/f) float32: the posterior's mean.
        Those with a key, one an image, are computed once and kept in half precision."""
        if len(keys) == 0:
            return self.net.to(x.device).encode(x.expand(-1, self.channels, -1, -1))[0].float()
        if new := [i for i, key in enumerate(keys) if key not in self.known]:
            self.known |= {keys[i]: z for i, z in zip(new, self.encode(x[new]).half().cpu())}
        return torch.stack([self.known[key] for key in keys]).to(x.device).float()

    @torch.no_grad()
    def decode(self, z, channels=0):
        """Latents -> images (B, channels, H, W) float32, not clamped; one channel of a colour autoencoder is the colours' mean."""
        x = self.net.to(z.device).decode(z).float()
        return x.mean(1, keepdim=True) if channels == 1 else x
