"""common/schedules.py: the headings "Schedule" and "Posterior" of papers/diffmic.md, section 5, against longhand tables."""
import math

import pytest
import torch

from common.schedules import (alpha_sigma, ddim_step, ddpm_step, level, linear_alpha_bar, logsnr_step, posterior, respaced_timesteps,
                              shifted_cosine, shifted_cosine_slope)

AB = linear_alpha_bar()


def betas(T=1000):
    """The paper's schedule longhand, without torch."""
    return [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)]


def pairs(n, T=1000):
    """(alpha_bar before, after) of each step of a chain of n levels, the last one to the clean end."""
    ab, levels = linear_alpha_bar(T), [*respaced_timesteps(T, n).tolist(), -1]
    return [(level(ab, t), level(ab, s)) for t, s in zip(levels, levels[1:])]


# ---------------------------------------------------------------------------------------------- Schedule
def test_alpha_bar_is_the_running_product_of_one_minus_beta_in_float64():
    assert AB.dtype == torch.float64 and AB.shape == (1000,)
    product = 1.0
    for t, beta in enumerate(betas()):
        product *= 1 - beta
        assert AB[t].item() == pytest.approx(product, rel=1e-12)


def test_beta_goes_from_1e4th_to_a_fiftieth():
    beta = 1 - AB / torch.cat([torch.ones(1), AB[:-1]])
    assert beta[0].item() == pytest.approx(1e-4, rel=1e-9) and beta[-1].item() == pytest.approx(0.02, rel=1e-9)
    assert (beta.diff() > 0).all()


@pytest.mark.parametrize("t, value", [(999, 0.0063528), (59, 0.97957)])
def test_sqrt_alpha_bar_has_the_values_of_the_fact_sheet(t, value):
    assert math.sqrt(AB[t]) == pytest.approx(value, rel=1e-4)


def test_alpha_bar_after_250_steps_is_still_a_half():
    assert AB[249].item() == pytest.approx(0.52409, abs=5e-6)            # where the authors' HAM10000 chain starts, from variance 1


def test_the_clean_end_has_all_of_the_signal():
    assert level(AB, -1) == 1.0 and level(AB, 0) == AB[0].item() and level(AB, 999) == AB[-1].item()


@pytest.mark.parametrize("T", [2, 10, 1000])
@pytest.mark.parametrize("share", [0.0, 0.06, 0.25, 0.5, 1.0])
def test_respaced_levels_fall_from_the_first_to_the_last_without_repetition(T, share):
    n = max(1, round(share * T))
    t = respaced_timesteps(T, n)
    assert len(t) == n and t[0] == T - 1 and t.dtype == torch.int64
    if n > 1:
        gap = (T - 1) / (n - 1)
        assert t[-1] == 0 and (t.diff() < 0).all() and (t.diff() + gap).abs().max() < 1    # even, up to rounding
    assert n < T or t.tolist() == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("n", [0, -1, 11])
def test_more_steps_than_levels_or_none_are_refused_with_the_range(n):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        respaced_timesteps(10, n)


# ---------------------------------------------------------------------------------------------- Posterior
@pytest.mark.parametrize("n", [1, 2, 10, 60, 100, 250, 1000])
def test_posterior_coefficients_sum_to_one(n):
    for ab_t, ab_s in pairs(n):
        g0, g1, g2, _ = posterior(ab_t, ab_s)
        assert g0 + g1 + g2 == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n", [1, 60, 1000])
def test_the_last_step_returns_y0_and_adds_no_noise(n):
    ab_t, ab_s = pairs(n)[-1]
    assert posterior(ab_t, ab_s) == pytest.approx((1, 0, 0, 0), abs=1e-12)
    y, y0 = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.allclose(ddpm_step(y, y0, torch.full_like(y, 1e6), ab_t, ab_s, f=7.0), y0, rtol=0, atol=1e-12)


def test_each_single_step_has_the_coefficients_of_ddpm_and_the_gamma_2_of_card():
    ab = 1.0                                                             # Ho et al. eqs. 6-7; CARD's gammas, from beta_t
    for t, beta in enumerate(betas()):
        before, ab, alpha = ab, ab * (1 - beta), 1 - beta
        got = posterior(level(AB, t), level(AB, t - 1))
        assert got[0] == pytest.approx(math.sqrt(before) * beta / (1 - ab), rel=1e-7)
        assert got[1] == pytest.approx(math.sqrt(alpha) * (1 - before) / (1 - ab), rel=1e-7, abs=1e-15)
        assert got[2] == pytest.approx(1 + (math.sqrt(ab) - 1) * (math.sqrt(alpha) + math.sqrt(before)) / (1 - ab), abs=1e-9)
        assert got[3] == pytest.approx((1 - before) / (1 - ab) * beta, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("n", [2, 60, 250, 1000])
def test_the_posterior_variance_is_at_most_the_noise_added_between_the_levels(n):
    for ab_t, ab_s in pairs(n):
        assert 0 <= posterior(ab_t, ab_s)[3] <= 1 - ab_t / ab_s


@pytest.mark.parametrize("n", [5, 60, 1000])
def test_the_posterior_is_bayes_rule_for_the_two_gaussians_it_joins(n):
    y0, f, y_t = 0.9, -0.4, 1.7                                          # q(y_s | y_0) q(y_t | y_s), both Gaussian in y_s
    for ab_t, ab_s in pairs(n)[:-1]:
        a, r = math.sqrt(ab_s), math.sqrt(ab_t / ab_s)
        precision = 1 / (1 - ab_s) + r ** 2 / (1 - r ** 2)
        mean = ((a * y0 + (1 - a) * f) / (1 - ab_s) + r * (y_t - (1 - r) * f) / (1 - r ** 2)) / precision
        g0, g1, g2, variance = posterior(ab_t, ab_s)
        assert variance == pytest.approx(1 / precision, rel=1e-9)
        assert g0 * y0 + g1 * y_t + g2 * f == pytest.approx(mean, abs=1e-9)


def test_one_step_chains_compose_to_the_closed_form():
    mean_y0, mean_f, variance = 1.0, 0.0, 0.0                            # q(y_t | y_{t-1}) = N(sqrt(a) y + (1 - sqrt(a)) f, beta)
    for t, beta in enumerate(betas()):
        r = math.sqrt(1 - beta)
        mean_y0, mean_f, variance = r * mean_y0, r * mean_f + 1 - r, r ** 2 * variance + beta
        assert (mean_y0, mean_f, variance) == pytest.approx((math.sqrt(AB[t]), 1 - math.sqrt(AB[t]), 1 - AB[t].item()), rel=1e-9)


@pytest.mark.parametrize("n", [2, 60, 1000])
def test_a_reverse_step_from_the_forward_marginal_lands_on_the_forward_marginal(n):
    for ab_t, ab_s in pairs(n):
        g0, g1, g2, variance = posterior(ab_t, ab_s)
        a = math.sqrt(ab_t)                                              # y_t = a y0 + (1 - a) f + noise of variance 1 - ab_t
        assert g0 + g1 * a == pytest.approx(math.sqrt(ab_s), abs=1e-9)
        assert g2 + g1 * (1 - a) == pytest.approx(1 - math.sqrt(ab_s), abs=1e-9)
        assert g1 ** 2 * (1 - ab_t) + variance == pytest.approx(1 - ab_s, abs=1e-9)


def test_without_a_prior_mean_a_step_is_the_textbook_ddpm_step():
    y_t, y0, z = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (1, 500, 999):
        beta, ab, before = betas()[t], AB[t].item(), AB[t - 1].item()
        mean = before ** .5 * beta / (1 - ab) * y0 + (1 - beta) ** .5 * (1 - before) / (1 - ab) * y_t
        expected = mean + ((1 - before) / (1 - ab) * beta) ** .5 * z
        assert torch.allclose(ddpm_step(y_t, y0, z, ab, before), expected, rtol=0, atol=1e-10)
        assert torch.equal(ddpm_step(y_t, y0, z, ab, before), ddpm_step(y_t, y0, z, ab, before, torch.zeros_like(y0)))


def test_a_ddim_step_keeps_the_noise_and_moves_along_the_closed_form():
    y0, eps, f = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for s in (0, 59, 998):
        a, c = math.sqrt(AB[s]), math.sqrt(1 - AB[s])
        assert torch.allclose(ddim_step(eps, y0, AB[s].item(), f), a * y0 + c * eps + (1 - a) * f, rtol=0, atol=1e-12)
    assert torch.equal(ddim_step(eps, y0, 1.0, f), y0)


# ---------------------------------------------------------------------------------------------- continuous time, by log-SNR
TIMES = torch.tensor([0, .05, .1, .25, .5, .75, .9, 1], dtype=torch.float64)


def test_the_shifted_cosine_has_the_values_of_the_diffusion_classifiers_authors():
    found = shifted_cosine(TIMES, 64, 256)
    assert torch.allclose(found, torch.tensor([10.84, 2.29, .90, -1.01, -2.774, -4.54, -6.46, -19.16], dtype=torch.float64), atol=5.1e-3)
    a, s = alpha_sigma(found[4])
    assert a.item() == pytest.approx(.242, abs=5e-4) and s.item() == pytest.approx(.970, abs=5e-4)
    assert (shifted_cosine(torch.linspace(0, 1, 1001), 64, 256).diff() < 0).all()


def test_without_a_shift_it_is_the_cosine_between_its_bounds_and_a_shift_lowers_its_middle_by_that_of_the_noise():
    plain = shifted_cosine(TIMES, 64, 64)
    assert plain[0].item() == pytest.approx(15) and plain[-1].item() == pytest.approx(-15) and plain[4].item() == pytest.approx(0, abs=1e-9)
    assert torch.allclose(plain[1:-1], -2 * torch.log(torch.tan(math.pi / 2 * TIMES[1:-1])), atol=.02)
    assert shifted_cosine(TIMES[4], 64, 128).item() == pytest.approx(2 * math.log(1 / 2), abs=2e-3)


@pytest.mark.parametrize("image_d", [32, 64, 256])
def test_the_slope_is_the_derivative_of_the_log_snr(image_d):
    t = TIMES.clone().requires_grad_()
    slope, = torch.autograd.grad(shifted_cosine(t, 64, image_d).sum(), t)
    assert torch.allclose(shifted_cosine_slope(TIMES, 64, image_d), -slope, rtol=1e-9)


def test_signal_and_noise_have_variance_one_together_and_the_log_snr_between_them():
    logsnr = torch.linspace(-19, 15, 50, dtype=torch.float64)
    a, s = alpha_sigma(logsnr)
    assert torch.allclose(a ** 2 + s ** 2, torch.ones(50, dtype=torch.float64)) and torch.allclose(2 * torch.log(a / s), logsnr)


def test_a_step_in_log_snr_is_ddpms_step_between_the_same_levels():
    z, x, noise = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for low, high in ((-6., -5.5), (-1., 3.), (0., 12.)):
        low, high = torch.tensor([low, high], dtype=torch.float64)
        expected = ddpm_step(z, x, noise, torch.sigmoid(low).item(), torch.sigmoid(high).item())
        assert torch.allclose(logsnr_step(z, x, noise, low, high), expected, atol=1e-9)


@pytest.mark.parametrize("T", [1, 19, 20])
def test_levels_too_few_for_the_scaled_betas_are_refused(T):
    with pytest.raises(ValueError, match=f"{T} levels"):
        linear_alpha_bar(T)
    assert (linear_alpha_bar(21) > 0).all()
