"""The KL autoencoder of latent diffusion (Rombach et al. 2022): images to a map of 1/8 of the sides with 4 channels, and back ("KL-f8").

    x ── encoder ── quant_conv ── mean, logvar ── z = mean + exp(logvar / 2) noise ── post_quant_conv ── decoder ── x
         conv_in │ down: blocks, halve │ mid │ norm, conv_out                  conv_in │ mid │ up: blocks, double │ norm, conv_out
No skips join the two: all that the decoder knows is z. It has one block more at every level and no tanh at its end (the caller
clamps). A diffusion model works on z as it is (Mediffusion's authors), times 0.18215 (Stable Diffusion,
MedSymmFlow's) or, by default here, at unit spread.

    AutoencoderKL()  has 83,653,863 parameters (83,649,253 for gray images). A 256x256 image becomes 4x32x32 for 136 GMAC, and
                     again an image for 311; MedSymmFlow's U-Net on that latent needs 6: encode a data set once.
The keys of the state_dict are latent-diffusion's; `load_autoencoder` reads its files (vae-ft-mse-840000-ema-pruned) and diffusers'.

Training (Rombach et al. 2022, appendix G), with `reconstruction_loss`, `gan_losses` and the weights of their terms:
    loss = nll + 1e-6 kl + gan_weight(step) adaptive_weight generator + gan_weight(step, weight=1) discriminator
The first three move the autoencoder alone, the last the discriminator alone: one backward pass and one Adam(betas=(.5, .9)) serve both.
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
    if not isinstance(weights, dict):
        raise ValueError("is no KL autoencoder (no tensors with names)")
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


def encode_once(encode, x, keys, known):
    """Latents of images x (B, ...), float32. Only those are encoded whose key, one an image, is not in the dict `known`, which keeps them in half precision;
    sixteen at a time, the last filled up, so that a resumed run, which lacks others, rounds alike."""
    if new := [i for i, key in enumerate(keys) if key not in known]:
        rows = (new * 16)[:-(-len(new) // 16) * 16]
        found = torch.cat([encode(x[rows[i:i + 16]]) for i in range(0, len(rows), 16)]).half().cpu()
        known |= {keys[i]: z for i, z in zip(new, found)}
    return torch.stack([known[key].float() for key in keys]).to(x.device)               # bf16 autocast of a CPU cannot stack halves


class Codec:
    """A frozen autoencoder from a file, for what flows or is noised in its latents. It is no part of a network's weights: a checkpoint
    knows it by `id`, a copy of a network shares it. Raises run.UserError where the file is no autoencoder's."""

    def __init__(self, path):
        try:
            self.net = autoencoder_from(run.load_weights(path, "--autoencoder"))
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
        return encode_once(self.encode, x, keys, self.known)

    @torch.no_grad()
    def decode(self, z, channels=0):
        """Latents -> images (B, channels, H, W) float32, not clamped; one channel of a colour autoencoder is the colours' mean."""
        x = self.net.to(z.device).decode(z).float()
        return x.mean(1, keepdim=True) if channels == 1 else x


# ------------------------------------------------------------------------------------------------ training: reconstruction
def pyramid(x, x_hat):
    """Images (B, C, H, W) in [-1, 1], 8x8 or more -> (B, 1, 1, 1): a distance without weights, no LPIPS.

    L1 of the difference and of its gradients down and across, on three levels of its Gaussian pyramid (Burt & Adelson 1983). The factor 1/3, a
    mean over the levels, gives .35 to .58 for two chest radiographs or skin lesions of 64 or 256 px, as LPIPS's .1 to .6 for what differs.
    """
    d, total = (x.float() - x_hat.float()).flatten(0, 1)[:, None], 0.              # (B C, 1, H, W)
    kernel = d.new_tensor([1, 4, 6, 4, 1]) / 16
    for level in range(3):
        if level:
            d = F.conv2d(F.pad(d, (2, 2, 2, 2), mode="reflect"), (kernel[:, None] * kernel)[None, None], stride=2).float()
        total = total + sum(part.abs().reshape(len(x), -1).mean(1) for part in (d, d.diff(dim=2), d.diff(dim=3)))
    return total.view(-1, 1, 1, 1) / 3


VGG = ((64, 0, 2), (128, 5, 7), (256, 10, 12, 14), (512, 17, 19, 21), (512, 24, 26, 28))        # stages: channels, torchvision's numbers


def read_weights(path, shapes, what, option):
    """The tensors {name: shape} of a file, float32 and frozen. Raises run.UserError naming the file and the first that does not fit."""
    weights = run.load_weights(path, option)
    for name, shape in shapes.items():
        tensor = weights.get(name) if isinstance(weights, dict) else None
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "missing"
        if given != shape:
            raise run.UserError(f"{option} {path}: {name} is {given}, must be {shape}; needed: {what}")
    return {name: weights[name].detach().float() for name in shapes}


class Perceptual:
    """perceptual(x, x_hat): images (B, 1 or 3, H, W) in [-1, 1] -> (B, 1, 1, 1) float32, by the best that the files allow:

    "pyramid"      no file: `pyramid`
    "vgg-uniform"  VGG16 of torchvision: LPIPS's formula with .1 for all its weights, which is the mean of 1 - cosine of features; no LPIPS
    "lpips"        lins as well (taming's vgg.pth): LPIPS-VGG (Zhang et al. 2018, eq. 1). Both need images of 16x16 or more.
    `tier` says which. It is no module: these weights are constants, nothing that a checkpoint or an optimizer should hold.
    """

    def __init__(self, vgg="", lins=""):
        self.tier = "lpips" if lins else "vgg-uniform" if vgg else "pyramid"
        if lins and not vgg:
            raise run.UserError(f"{lins}: weighs the features of VGG16; name its file too")
        lin, features, c_in = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, (c, *_) in enumerate(VGG)}, {}, 3
        for c, *stage in VGG:
            for i in stage:
                features |= {f"features.{i}.weight": (c, c_in, 3, 3), f"features.{i}.bias": (c,)}
                c_in = c
        self.weights = {"shift": torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), "scale": torch.tensor([.458, .448, .450]).view(1, 3, 1, 1)}
        self.weights |= read_weights(vgg, features, "VGG16 of torchvision", "--vgg") if vgg else {}
        self.weights |= read_weights(lins, lin, "LPIPS's weights for VGG16", "--lpips") if lins else {name: torch.tensor(.1) for name in lin}

    def __call__(self, x, x_hat):
        if self.tier == "pyramid":
            return pyramid(x, x_hat)
        self.weights = {name: w.to(x.device) for name, w in self.weights.items()}
        return sum((self.weights[f"lin{i}.model.1.weight"] * (f - g).square()).sum(1, keepdim=True).mean((2, 3), keepdim=True)
                   for i, (f, g) in enumerate(zip(self.features(x), self.features(x_hat))))

    def features(self, x):
        """Images -> VGG16's features after the last relu of each stage, 5 x (B, c, H/2^i, W/2^i) float32, of length 1 in every pixel."""
        h, found = (x.float() - self.weights["shift"]) / self.weights["scale"], []          # a gray image becomes three channels here
        for _, *stage in VGG:
            h = F.max_pool2d(h, 2) if found else h
            for i in stage:
                h = F.conv2d(h, self.weights[f"features.{i}.weight"], self.weights[f"features.{i}.bias"], padding=1).relu()
            found.append(h / (torch.linalg.vector_norm(h.float(), dim=1, keepdim=True) + 1e-10))
        return found


def reconstruction_loss(x, x_hat, mean, logvar, perceptual, kl_weight=1e-6):
    """x, x_hat (B, C, H, W), x in [-1, 1]; mean, logvar of q(z|x) -> nll, KL term, and {"l1", "perceptual", "kl"} for the log.

    nll: |x - x_hat| + perceptual(x, x_hat), the same in every pixel, summed over C, H, W; a mean over B alone. latent-diffusion's nll has a
    log-variance of its own that no optimizer holds: 0 it is and stays, so it is left out. "l1": mean over pixels; "kl": nats an image.
    """
    l1, p, nats = (x - x_hat).abs(), perceptual(x, x_hat), kl(mean, logvar).mean()
    return (l1 + p).sum() / len(x), kl_weight * nats, {"l1": l1.detach().mean(), "perceptual": p.detach().mean(), "kl": nats.detach()}


# ------------------------------------------------------------------------------------------------ training: discriminator
class Discriminator(nn.Module):
    """(B, channels, H, W), 24x24 or more -> logits (B, 1, H/8 - 2, W/8 - 2) float32: are patches of 70x70 real? (Isola et al. 2017).

    4x4 convolutions, three of stride 2 and two of stride 1. 2,763,585 parameters for gray images. Names as in latent-diffusion.
    """

    def __init__(self, channels, width=64):
        super().__init__()
        layers, c = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(.2)], width
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(.2)]
            c = 2 * c
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for m in self.main:
            if not isinstance(m, nn.LeakyReLU):
                nn.init.normal_(m.weight, float(isinstance(m, nn.BatchNorm2d)), .02)

    def forward(self, x):
        return self.main(x).float()


def discriminator_loss(real, fake):
    """Hinge loss of logits of any shape (Lim & Ye 2017): 0 where real ones are above 1 and made ones below -1."""
    return .5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def gan_losses(discriminator, x, x_hat):
    """Generator term -mean D(x_hat), whose gradient reaches x_hat and not the discriminator, and the hinge loss, the other way round.

    Real and made images are batches of their own. Each enters the batch norms' averages once: the generator's pass has copies of them.
    """
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()} | {name: b.clone() for name, b in discriminator.named_buffers()}
    generator = -torch.func.functional_call(discriminator, frozen, x_hat).mean()
    return generator, discriminator_loss(discriminator(x), discriminator(x_hat.detach()))


def adaptive_weight(nll, g, last_layer):
    """|grad nll| / |grad g| at the decoder's last weights, `decoder.conv_out.weight`, 0..1e4, without gradient (Esser et al. 2021, eq. 7).

    It keeps the graph: a compiled decoder needs torch._functorch.config.donated_buffer = False.
    """
    at_nll, at_g = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (nll, g))
    return (at_nll / (at_g + 1e-4)).clamp(0, 1e4)


def gan_weight(step, start=50_001, weight=.5):
    """0 before step `start`, then `weight`: latent-diffusion's .5 of the generator's term; 1 of the discriminator's loss."""
    return weight if step >= start else 0.
