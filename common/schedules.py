"""Noise schedules and the steps of the reverse process, as pure functions. Tables are float64; cast where they are used.

Indices: t = 0..T-1 counts the noise levels that a network is trained on (the papers' t = 1..T); alpha_bar[t] is the share
of signal variance left at level t. A reverse step goes from level t to s < t; s = -1 is the clean end, alpha_bar = 1.
"""
import math

import torch


def linear_alpha_bar(T=1000, beta_start=1e-4, beta_end=0.02):
    """DDPM's linear schedule (Ho et al. 2020): alpha_bar (T,) float64, the product of 1 - beta.

    The betas are those for T = 1000; for another T they are scaled by 1000 / T, so that the last level is still noise. Raises ValueError where
    a beta would then be 1 or more (T <= 1000 beta_end).
    """
    if beta_end * 1000 >= T:
        raise ValueError(f"{T} levels: betas up to {beta_end} scaled by 1000 / T need more than {1000 * beta_end:.0f}")
    return (1 - torch.linspace(beta_start, beta_end, T, dtype=torch.float64) * 1000 / T).cumprod(0)


def respaced_timesteps(T, n):
    """n levels spread evenly over 0..T-1, int64 (n,), falling, first T-1 and (n > 1) last 0: respacing, not truncation. Raises ValueError
    for n outside 1..T."""
    if not 1 <= n <= T:
        raise ValueError(f"{n} steps: must lie in 1..{T}")
    return torch.linspace(T - 1, 0, n, dtype=torch.float64).round().long() if n > 1 else torch.tensor([T - 1])


def level(alpha_bar, t):
    """alpha_bar at level t as a float; 1 at the clean end t = -1."""
    return float(alpha_bar[t]) if t >= 0 else 1.0


def posterior(ab_t, ab_s):
    """q(y_s | y_t, y_0) of a process whose mean drifts from y_0 to a prior mean f (Han et al. 2022, CARD, eq. 8).

    ab_t < ab_s: alpha_bar at the two levels. Returns g0, g1, g2, variance with mean = g0 y_0 + g1 y_t + g2 f.
    g0 + g1 + g2 = 1; with f = 0 it is DDPM's posterior (Ho et al. 2020, eqs. 6-7); at ab_s = 1 it is (1, 0, 0), 0.
    """
    alpha = ab_t / ab_s                                                 # of the step: beta = 1 - alpha
    g0 = (1 - alpha) * ab_s ** .5 / (1 - ab_t)
    g1 = (1 - ab_s) * alpha ** .5 / (1 - ab_t)
    g2 = 1 + (ab_t ** .5 - 1) * (alpha ** .5 + ab_s ** .5) / (1 - ab_t)
    return g0, g1, g2, (1 - ab_s) / (1 - ab_t) * (1 - alpha)


def ddpm_step(y_t, y0, noise, ab_t, ab_s, f=0.):
    """Draws y_s from the posterior; `noise` is standard normal. The last step (ab_s = 1) returns y0 itself."""
    g0, g1, g2, variance = posterior(ab_t, ab_s)
    return g0 * y0 + g1 * y_t + g2 * f + variance ** .5 * noise


def ddim_step(eps, y0, ab_s, f=0.):
    """The deterministic step (Song et al. 2021, eta = 0): the same noise at the next level."""
    return ab_s ** .5 * y0 + (1 - ab_s) ** .5 * eps + (1 - ab_s ** .5) * f


# ----------------------------------------------------------------------------- continuous time, by log-SNR
def shifted_cosine(t, noise_d=64, image_d=64):
    """log-SNR of the cosine schedule (Nichol & Dhariwal 2021) at times t in 0..1 (any shape), falling, shifted for images of image_d pixels
    a side to the noise that noise_d pixels would have (Hoogeboom et al. 2023, simple diffusion, eqs. 4-6).

    The authors of the diffusion classifier shift the bounds -15 and 15 as well, as here: values are those of their schedule.
    """
    low, span = _cosine_range(noise_d, image_d)
    return -2 * torch.log(torch.tan(low + t * span)) + 2 * math.log(noise_d / image_d)


def shifted_cosine_slope(t, noise_d=64, image_d=64):
    """-d log-SNR / dt, positive: half of it weighs the eps error in the likelihood bound (Kingma et al. 2021, eq. 17)."""
    low, span = _cosine_range(noise_d, image_d)
    return 4 * span / torch.sin(2 * (low + t * span))


def _cosine_range(noise_d, image_d):
    shift = math.log(noise_d / image_d)
    low, high = math.atan(math.exp(-(15 + shift) / 2)), math.atan(math.exp(-(-15 + shift) / 2))
    return low, high - low


def alpha_sigma(logsnr):
    """Scales of signal and noise, alpha^2 + sigma^2 = 1, of a log-SNR (any shape)."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def logsnr_step(z, x_hat, noise, logsnr_t, logsnr_s):
    """Draws z_s from q(z_s | z_t, x = x_hat), logsnr_s > logsnr_t: DDPM's posterior in continuous time (Kingma et al. 2021, eq. 35)."""
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    c = -torch.expm1(logsnr_t - logsnr_s)
    return alpha_s * (z * (1 - c) / alpha_t + c * x_hat) + sigma_s * c.sqrt() * noise
