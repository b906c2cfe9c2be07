"""One level of Haar wavelets: an image as four of half its sides, orthonormally."""
import torch


def haar(x):
    """(B, C, H, W), H and W even -> (B, 4C, H/2, W/2): one level of Haar wavelets, orthonormal, so that white noise stays white. Raises
    ValueError for an odd side."""
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]} pixels: Haar wavelets need even sides")
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2


def unhaar(w):
    """The inverse of `haar`: (B, 4C, h, w) -> (B, C, 2h, 2w)."""
    p, q, r, s = w.chunk(4, 1)
    rows = [torch.stack(pair, -1).flatten(-2) for pair in ((p + q + r + s, p - q + r - s), (p + q - r - s, p - q - r + s))]
    return torch.stack(rows, -2).flatten(-3, -2) / 2
