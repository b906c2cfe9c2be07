"""The U-Net of image diffusion (Ho et al. 2020, DDPM): embedding added, stride-2 convolutions; attention as in Dhariwal & Nichol 2021.

    x ── enter ── down blocks ──────────────── skip ──────────────── up blocks ── leave ── prediction
                     └ halve ── down blocks ── skip ── up blocks ── double ┘
                                   └──────── middle ──────────┘
Every level begins with a convolution (`enter`: the first reads the image, the others halve the sides) and ends, on the way
up, with one (`leave`: double the sides, at last write the prediction). All that the encoder makes is a skip of the decoder:
at every level num_res_blocks + 1 tensors, hence as many blocks on the way up. Time and class reach every residual block.

The papers' networks:  UNet(4, 4, 64, (1, 2, 2, 2), 2, {2}, 64)              8,953,220   MedSymmFlow, gray images
                       UNet(8, 8, 128, (1, 2, 2, 2), 2, {2}, 64)            35,757,832   MedSymmFlow, latent
                       UNet(4, 4, 256, (1, 2, 4), 2, {1, 2, 4}, 32)        257,733,124   Mediffusion, latent
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoid(t, dim):
    """Times (B,), whole numbers or not -> (B, dim), dim even: cosines, then sines, of t / 10000^(i / (dim/2)) (Vaswani et al. 2017).

    Periods from 2 pi to nearly 2 pi * 10^4: made for t = 0..1000. A t in [0, 1] moves few of the entries; the caller scales it.
    """
    dtype = torch.promote_types(t.dtype, torch.float32)                 # bfloat16 cannot tell 999 from 1000
    frequencies = torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, dtype=dtype, device=t.device))
    angles = t[:, None].to(dtype) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def norm(c, eps=1e-5):
    """GroupNorm for c channels: 32 groups, or the most that leave two channels to each.

    A channel alone in its group loses its mean, all that the time embedding adds to it (`ResBlock`): 32 groups would make
    a block of 32 channels blind to t and y.
    """
    return nn.GroupNorm(max((g for g in range(1, 33) if c % g == 0 and 2 * g <= c), default=c), c, eps)


def zero(module):
    """The module with its parameters set to zero: its branch adds nothing until it has learnt to."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """x (B, c_in, H, W), embedding (B, c_emb) -> (B, c, H, W): skip(x) + conv(silu(norm(conv(silu(norm(x))) + linear(silu(emb))))).

    scale_shift: h = norm(conv(..)) (1 + scale) + shift instead, both made of the embedding (Dhariwal & Nichol 2021, AdaGN): behind the norm, whose
    small groups take away much of what is added before it.
    """

    def __init__(self, c_in, c, c_emb, dropout=0., scale_shift=False):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c, 3, padding=1)
        self.embedding, self.scale_shift = nn.Linear(c_emb, 2 * c if scale_shift else c), scale_shift
        self.norm2, self.dropout, self.conv2 = norm(c), nn.Dropout(dropout), zero(nn.Conv2d(c, c, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.embedding(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """x (B, c, H, W) -> the same shape: x + projection(softmax(Q K^T / sqrt(d)) V), every pixel a token, c // head_channels heads."""

    def __init__(self, c, head_channels):
        super().__init__()
        self.heads = max(1, c // head_channels)
        if c % self.heads:
            raise ValueError(f"attention: {c} channels cannot be shared by {self.heads} heads (head_channels {head_channels})")
        self.norm, self.qkv, self.projection = norm(c), nn.Linear(c, 3 * c), zero(nn.Linear(c, c))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                                            # (B, HW, C)
        q, k, v = self.qkv(tokens).view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)         # (B, heads, HW, d) each
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.projection(h).transpose(1, 2).reshape(B, C, H, W)


class Block(nn.Module):
    """A residual block, followed by attention if head_channels is given."""

    def __init__(self, c_in, c, c_emb, dropout=0., head_channels=None, scale_shift=False):
        super().__init__()
        self.res = ResBlock(c_in, c, c_emb, dropout, scale_shift)
        self.attention = Attention(c, head_channels) if head_channels else nn.Identity()

    def forward(self, x, emb):
        return self.attention(self.res(x, emb))


class Double(nn.Module):
    """(B, c, H, W) -> (B, c, 2H, 2W): nearest neighbour. nn.Upsample, compiled for a CPU, can lose its bfloat16 gradient (torch 2.13)."""

    def forward(self, x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class UNet(nn.Module):
    """x (B, in_channels, H, W), t (B,), y (B,) int64 or (B, num_values) float -> (B, out_channels, H, W); exactly zero before training.

    Level i has channels * mult[i] channels and 1 / 2^i of the image's sides; H and W must be multiples of 2^(levels - 1).
    attention:    the downsampling factors (1, 2, 4, ...) at which every block has attention; the middle always has it.
                  A factor that no level has is without effect.
    num_classes:  rows of the class embedding, None for a network without y. A null token is a row more, asked for by the caller.
    num_values:   y is float (B, num_values) instead, and enters through a linear layer: what all pixels have in common, of which group norms
                  leave little where it stands in the image's channels.
    num_read:     entries of `read`, which a linear layer makes of the middle's pixels: what the encoder alone says of the image.
    scale_shift:  time and class scale and shift what the norms give, instead of being added before them.
    late_class:   the class enters the up blocks alone: one `encode` of an image then serves the `decode` of every class.
    t is used as it comes (see `sinusoid`). The output has the dtype of torch's convolutions: bfloat16 under autocast.
    Raises ValueError for sides that cannot be halved that often, for y missing or not expected, for odd `channels`, and where
    a level's channels do not divide into its heads.
    """

    def __init__(self, in_channels, out_channels, channels, mult, num_res_blocks, attention, head_channels, num_classes=None, dropout=0.,
                 late_class=False, num_values=None, num_read=None, scale_shift=False):
        super().__init__()
        if channels % 2:
            raise ValueError(f"channels {channels}: must be even, half for the cosines and half for the sines of t")
        self.channels, self.multiple, c_emb = channels, 2 ** (len(mult) - 1), 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.classes = nn.Embedding(num_classes, c_emb) if num_classes is not None else nn.Linear(num_values, c_emb) if num_values is not None else None
        self.late_class = late_class

        def block(c_in, level, attend):
            return Block(c_in, channels * mult[level], c_emb, dropout, head_channels if attend else None, scale_shift)

        self.enter, self.down = nn.ModuleList(), nn.ModuleList()
        c, skips = channels, []                                         # c: channels of the running map
        for level in range(len(mult)):
            self.enter.append(nn.Conv2d(c, c, 3, stride=2, padding=1) if level else nn.Conv2d(in_channels, c, 3, padding=1))
            skips.append(c)
            self.down.append(nn.ModuleList())
            for _ in range(num_res_blocks):
                self.down[-1].append(block(c, level, 2 ** level in attention))
                c = channels * mult[level]
                skips.append(c)

        self.middle = nn.ModuleList([block(c, -1, True), block(c, -1, False)])
        self.reader = zero(nn.Linear(c, num_read)) if num_read is not None else None

        self.up, self.leave = nn.ModuleList(), nn.ModuleList()          # in the order of use: the lowest level first
        for level in reversed(range(len(mult))):
            self.up.append(nn.ModuleList())
            for _ in range(num_res_blocks + 1):
                self.up[-1].append(block(c + skips.pop(), level, 2 ** level in attention))
                c = channels * mult[level]
            self.leave.append(nn.Sequential(Double(), nn.Conv2d(c, c, 3, padding=1)) if level else
                              nn.Sequential(norm(c), nn.SiLU(), zero(nn.Conv2d(c, out_channels, 3, padding=1))))

    def embed(self, t, y=None):
        """t (B,), y (B,) or None -> (B, 4 * channels): the time embedding plus, if the network knows classes, that of the class."""
        if (y is None) != (self.classes is None):
            raise ValueError("y is missing: the network was made for classes or values" if y is None else
                             "y is given, but the network was made without num_classes or num_values")
        emb = self.time_embedding(t)
        return emb if y is None else emb + self.classes(y)

    def time_embedding(self, t):
        return self.time(sinusoid(t, self.channels).to(self.time[0].weight.dtype))

    def _encode(self, x, emb):
        H, W = x.shape[-2:]
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"image of {H}x{W}: the sides must be multiples of {self.multiple}, for {len(self.down)} levels")
        features, h = [], x
        for conv, blocks in zip(self.enter, self.down):
            h = conv(h)
            features.append(h)
            for block in blocks:
                h = block(h, emb)
                features.append(h)
        for block in self.middle:
            h = block(h, emb)
        return [*features, h]

    def encode(self, x, t, y=None):
        """The encoder's tensors, in the order in which they are made; the decoder is not computed.

        Level by level the convolution it begins with and its blocks (after their attention): the skips; then the middle.
        Mediffusion's H_t (Kaleta et al. 2024): 256 256 256 | 256 512 512 | 512 1024 1024 | 1024 channels, 5,632 in all.
        With late_class they do not depend on y, which may be left out.
        """
        return self._encode(x, self.time_embedding(t) if self.late_class else self.embed(t, y))

    def compile(self, *args, **kwargs):
        """As nn.Module does, and its parts, for who calls them."""
        super().compile(*args, **kwargs)
        self.encode, self.decode = (torch.compile(part, *args, **kwargs) for part in (self.encode, self.decode))

    def read(self, features):
        """What `encode` gave -> (B, num_read, h, w), of each pixel of the middle; for a network made with num_read."""
        return self.reader(features[-1].movedim(1, -1)).movedim(-1, 1)

    def _decode(self, features, emb):
        *skips, h = features
        for blocks, conv in zip(self.up, self.leave):
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            h = conv(h)
        return h

    def decode(self, features, t, y=None):
        """What `encode` gave, or some rows of it, or each for several classes -> the prediction, as `forward` gives it; t and y of the same rows."""
        return self._decode(features, self.embed(t, y))

    def forward(self, x, t, y=None):
        emb = self.embed(t, y)
        return self._decode(self._encode(x, self.time_embedding(t) if self.late_class else emb), emb)
