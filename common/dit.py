"""The diffusion transformer DiT (Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023): patches are tokens.

    x ── patches ── linear ── + positions ── block ── ... ── block ── norm ── linear ── patches to pixels ── prediction
    t ── sinusoid ── MLP ── + row of the class = e ──┴─────────────────┴───────┘
adaLN-zero: of every norm the shift and scale, and of every branch the gate, are linear in silu(e), and zero at first: a fresh
block is the identity. There is one e, and one table of classes, for all blocks.

The papers' networks:  DiT(12, 12, 128, 4, 768, 12, 12, 3)              129,807,552   Favero et al.'s DiT-B/4 (theirs, an e a block: 147.7 M), 1,024 tokens of wavelets
                       DiT(4, 8, 32, 2, 1152, 28, 16, 1001)             674,834,720   Peebles and Xie's DiT-XL/2, 256 tokens of latents
"""
import torch
import torch.nn.functional as F
from torch import nn

from .unet import sinusoid, zero


def positions(n, dim):
    """Of n x n tokens, row by row: (n * n, dim), half the entries the sinusoid of the row, half that of the column."""
    along = sinusoid(torch.arange(n), dim // 2)
    return torch.cat([along.repeat_interleave(n, 0), along.repeat(n, 1)], dim=1)


def modulate(x, shift, scale):
    """Tokens (B, N, dim), each brought to mean 0 and variance 1, then scaled and shifted (B, 1, dim) as its image's e says."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """x (B, N, dim), e (B, dim) -> (B, N, dim): x += gate * attention(modulate(x)), then x += gate * mlp(modulate(x))."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.modulation = heads, nn.Linear(dim, 6 * dim)
        self.qkv, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def attention(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)                  # (B, heads, N, d) each
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))

    def forward(self, x, e):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(e))[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1))
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class DiT(nn.Module):
    """x (B, in_channels, side, side), t (B,), c (B,) int64 -> (B, out_channels, side, side); exactly zero before training.

    A token is a square of `patch` pixels a side. num_classes: rows of the class embedding; a null token is a row more, asked
    for by the caller, and nothing here drops a class. t is used as it comes (see `sinusoid`). The output has the dtype of
    torch's linear layers: bfloat16 under autocast. Weights begin as in the paper's code, whose table of classes has a row for
    each of ImageNet's 1,000 classes and the null token. Raises ValueError for a side that is no multiple of the patch, and for
    a dim that does not divide into heads, or into the sines and cosines of rows and columns.
    """
    FREQUENCIES = 256                                                   # entries of the sinusoid of t

    def __init__(self, in_channels, out_channels, side, patch, dim, depth, heads, num_classes):
        super().__init__()
        if side % patch:
            raise ValueError(f"image of {side}x{side}: the sides must be multiples of {patch}, the patch")
        if dim % heads or dim % 4:
            raise ValueError(f"dim {dim}: must be a multiple of {heads}, the heads, and of 4, for sines and cosines of rows and columns")
        self.patch, self.grid = patch, side // patch
        self.time = nn.Sequential(nn.Linear(self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = nn.Embedding(num_classes, dim)
        self.register_buffer("positions", positions(self.grid, dim), persistent=False)
        self.enter = nn.Linear(in_channels * patch ** 2, dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.modulation, self.leave = nn.Linear(dim, 2 * dim), nn.Linear(dim, out_channels * patch ** 2)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (self.time[0], self.time[2], self.classes):
            nn.init.normal_(m.weight, std=.02)
        for m in (*(block.modulation for block in self.blocks), self.modulation, self.leave):
            zero(m)

    def forward(self, x, t, c):
        e = self.time(sinusoid(t, self.FREQUENCIES).to(self.enter.weight.dtype)) + self.classes(c)          # (B, dim)
        x = self.enter(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.positions        # (B, N, dim)
        for block in self.blocks:
            x = block(x, e)
        shift, scale = self.modulation(F.silu(e))[:, None].chunk(2, dim=2)
        x = self.leave(modulate(x, shift, scale)).transpose(1, 2).unflatten(2, (self.grid, self.grid))      # (B, out * patch^2, grid, grid)
        return F.pixel_shuffle(x, self.patch)
