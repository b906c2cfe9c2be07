"""diffclassifier.py: section 7 of papers/diffclassifier.md, item by item under its headings, then commands.

Oracles: loops in plain Python, closed forms, enumeration of all votes to come, and a denoiser of Gaussians whose likelihoods are known. Networks are a
few channels wide. Elsewhere: the schedule's values (test_schedules.py), the networks (test_unet.py, test_dit.py), rejection curves (test_metrics.py).
"""
import csv
import dataclasses
import itertools
import json
import math
import re
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffclassifier
from common import metrics, run, votes
from common.schedules import alpha_sigma, shifted_cosine, shifted_cosine_slope
from common.votes import count_votes
from common.wavelet import haar, unhaar
from data import DataSet, Split, load_for
from diffclassifier import Config, configure, rules, survivors
from tests.loading import opened, short
from tests.test_dit import multiply_adds
from tests.test_run import processes
from tests.test_symmflow import autoencoder, same
from tests.test_unet import count

CPU, KINDS = torch.device("cpu"), typing.get_args(Config.__dataclass_fields__["uncertainty"].type)
NETWORKS = [{}, dict(late_class=True), dict(backbone="dit")]
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def tiny(**given):
    """The paper's recipe with networks of a few thousand weights."""
    return configure(**dict(data="toy", recipe="paper", size=16, channels=8, mult="1,2", attention="2", head_channels=8, width=8, blocks=1, baseline=False,
                            patch=4, dim=16, depth=2, wavelet=False, time_scale=20., votes=9, val_votes=3, amp="off") | given)


def networks(config, classes=3, channels=3):
    """As after training: what is zero at first is not."""
    torch.manual_seed(0)
    nets = diffclassifier.build(config, dict(channels=channels, classes=list("abcdefgh")[:classes], multilabel=False))
    for p in nets.denoiser.parameters():
        p.data += .1 * torch.randn_like(p)
    return nets.eval()


def pictures(n, size=16, channels=3, classes=3):
    """A split of noise."""
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (n, channels, size, size), np.uint8), np.arange(n) % classes, [f"picture-{i}" for i in range(n)])


def some_errors(M=40, N=15, K=3, seed=0):
    """Errors of which the classes share most, as those of a network do, and times."""
    rng = np.random.default_rng(seed)
    error = 5 + rng.gamma(2, 1, (M, N, 1)) + .3 * rng.normal(size=(M, N, K)) + .15 * rng.normal(size=(M, 1, K))
    return error, rng.random((M, N)).astype(np.float32)


def ruled(config, error, t, alive=None, nets=None):
    K = error.shape[2]
    nets = nets or SimpleNamespace(shape=(1, 16, 16), shares=torch.ones(K) / K, weight=torch.zeros(votes.BUCKETS), temperature=torch.ones(4))
    return rules(nets, config, error, np.ones(error[:, 0].shape, bool) if alive is None else alive, t)


def labels(p):
    return {rule: q.argmax(1).tolist() for rule, q in p.items()}


# ---------------------------------------------------------------------------------------------- 1 the diffusion
@pytest.mark.parametrize("l", [-19., -3., 0., 4., 15.])
def test_errors_of_eps_v_and_x_are_proportional(l):
    x, eps, v_hat = torch.randn(3, 4, 2, 8, 8, dtype=torch.float64)
    level = torch.full((4,), l, dtype=torch.float64)
    z, a, s = diffclassifier.diffuse(x, eps, level)
    assert torch.allclose(a ** 2 + s ** 2, torch.ones(()).double())
    v, x_hat = a * eps - s * x, a * z - s * v_hat
    eps_hat = s * z + a * v_hat
    of = lambda d: d.square().sum((1, 2, 3))
    a2, s2 = a.flatten() ** 2, s.flatten() ** 2
    assert torch.allclose(of(eps_hat - eps), a2 * of(v_hat - v)) and torch.allclose(of(x_hat - x), s2 * of(v_hat - v))
    assert torch.allclose(of(x_hat - x), math.exp(-l) * of(eps_hat - eps))
    ours = diffclassifier.epsilon(tiny(), v_hat, z, a, s)
    assert torch.allclose(ours.double(), eps_hat, atol=1e-5)
    assert torch.allclose((z - s * eps_hat) / a, x_hat, atol=1e-5)      # as `draw` has it
    assert torch.equal(diffclassifier.epsilon(tiny(prediction="eps"), v_hat, z, a, s), v_hat.float())


def test_the_schedule_is_that_of_the_side_seen_and_never_below_noise_d():
    t = torch.rand(5)
    assert torch.equal(diffclassifier.logsnr(tiny(), t, 16), shifted_cosine(t, 64, 64))
    assert torch.equal(diffclassifier.logsnr(tiny(), t, 128), shifted_cosine(t, 64, 128))


@pytest.mark.parametrize("prediction", ["v", "eps"])
@pytest.mark.parametrize("l", [-6., -1., 0., 3., 8.])
def test_preconditioned_an_untrained_network_is_the_least_squares_line_and_sees_and_leaves_unit_spread(prediction, l):
    spread = torch.tensor([.05, .4, 1.3], dtype=torch.float64)[:, None, None]
    x, eps = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64)[:, :, None, None, None].expand(-1, -1, 3, -1, -1)     # independent
    level = torch.full((len(x),), l, dtype=torch.float64)
    z, a, s = diffclassifier.diffuse(spread * x, eps, level)
    target = a * eps - s * spread * x if prediction == "v" else eps
    enter, skip, scale = diffclassifier.preconditioning(prediction, spread, level[:1])
    square = lambda b: b.square().mean((0, 2, 3))                       # of each channel
    assert torch.allclose(skip.flatten(), (z * target).mean((0, 2, 3)) / square(z))
    assert torch.allclose(square(enter * z), torch.ones(3).double()) and torch.allclose(square((target - skip * z) / scale), torch.ones(3).double())


@pytest.mark.parametrize("given", NETWORKS + [dict(prediction="eps")], ids=str)
def test_preconditioning_at_unit_spread_is_the_network_itself_and_serves_pairs_as_it_serves_rows(given):
    plain, nets = (networks(tiny(precondition=on, **given)) for on in (False, True))
    z, l, c = torch.randn(4, 3, 16, 16), torch.linspace(-4, 4, 4), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        if given.get("prediction") != "eps":                            # a v-network's skip is 0 there, an eps-network's s
            assert torch.allclose(nets.denoise(z, l, c), plain.denoise(z, l, c), atol=1e-5)
        nets.spread.copy_(torch.tensor([.1, .5, 2.])[:, None, None])
        row, k = torch.tensor([0, 0, 3, 2]), torch.tensor([1, 2, 0, 3])
        assert not torch.allclose(nets.denoise(z, l, c), plain.denoise(z, l, c), atol=1e-2)
        assert torch.allclose(nets.denoise(z, l, k, row), nets.denoise(z[row], l[row], k), atol=1e-5)
        for p in nets.denoiser.parameters():
            p.zero_()
        assert torch.equal(nets.denoise(z, l, c), diffclassifier.preconditioning(nets.precondition, nets.spread, l)[1] * z)


def test_the_spread_is_that_of_the_training_images_as_the_network_sees_them_and_of_latents_the_unit_they_are_scaled_to(tmp_path):
    data = DataSet(pictures(40), pictures(6), pictures(6), list("abc"), False, 3)
    config = tiny(wavelet=True, precondition=True)
    nets = networks(config)
    diffclassifier.initialise(nets, data, config)
    with torch.no_grad():
        x = nets.encode(torch.from_numpy(data.train.images.astype(np.float32) / 127.5 - 1))
    assert nets.spread.shape == (12, 1, 1) and torch.allclose(nets.spread.flatten(), x.square().mean((0, 2, 3)).sqrt(), rtol=1e-4)
    for scale in (0., 3.):                                              # measured, given
        config = tiny(wavelet=True, precondition=True, latent_scale=scale, size=32, autoencoder=str(autoencoder(tmp_path / f"{scale}.pt")), mult="1")
        nets = networks(config)
        diffclassifier.initialise(nets, DataSet(pictures(20, 32), pictures(6, 32), pictures(6, 32), list("abc"), False, 3), config)
        z = torch.cat([diffclassifier.seen(nets, image, CPU) for image in pictures(20, 32).images])
        assert torch.allclose(nets.spread.flatten(), z.square().mean((0, 2, 3)).sqrt(), rtol=.01) and (scale or abs(float(z.std()) - 1) < .01)


def known(config, x, eps):
    """A network that knows image and noise."""
    def denoise(z, l, c, row=None):
        a, s = (p.view(-1, 1, 1, 1) for p in alpha_sigma(l))
        return a * eps - s * x if config.prediction == "v" else eps
    return denoise


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_who_knows_image_and_noise_has_no_loss_and_the_loss_is_finite_at_the_ends(prediction, monkeypatch):
    config, x, eps = tiny(prediction=prediction), torch.rand(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    nets = SimpleNamespace(classes=3, denoise=known(config, x, eps))
    assert diffclassifier.loss(nets, config, x, torch.zeros(8).long())["diffusion"] < 1e-10
    nets.denoise = lambda z, l, c: torch.zeros_like(z)
    for value in (0., 1.):
        with monkeypatch.context() as m:
            m.setattr(torch, "rand", lambda *n, device=None: torch.full(n, value))
            for kind in ("none", "min-snr", "authors", "band"):
                found = diffclassifier.loss(nets, dataclasses.replace(config, loss_weight=kind), x, torch.zeros(8).long())
                assert found["diffusion"].isfinite() and found["error_by_t"][1].tolist() == [8 * (i == 9 * value) for i in range(10)]


@pytest.mark.parametrize("l", [-19., -2., 0., 3., 11.])
def test_weights_of_v_and_eps_say_the_same_of_one_error(l):
    l = torch.tensor([l], dtype=torch.float64)
    snr, a2 = l.exp(), torch.sigmoid(l)
    wanted = {"min-snr": snr.clamp_max(5) / snr, "authors": 1 / (1 + snr.clamp_max(5))}                     # of eps
    for kind, of_eps in wanted.items():
        assert torch.allclose(diffclassifier.loss_weight(tiny(loss_weight=kind, prediction="eps"), l), of_eps)
        assert torch.allclose(diffclassifier.loss_weight(tiny(loss_weight=kind), l), of_eps * a2)
    assert diffclassifier.loss_weight(tiny(), l) == diffclassifier.loss_weight(tiny(prediction="eps"), l) == 1


def test_fifteen_percent_of_training_has_no_class_and_classification_always_has():
    seen, config = [], tiny()
    nets = SimpleNamespace(classes=3, denoise=lambda z, l, c: seen.append(c) or torch.zeros_like(z))
    diffclassifier.loss(nets, config, torch.zeros(20000, 1, 1, 1), torch.arange(20000) % 3)
    assert abs((seen[0] == 3).float().mean() - .15) < .01
    kept = seen[0] != 3
    assert torch.equal(seen[0][kept], (torch.arange(20000) % 3)[kept])
    nets = networks(config)
    nets.denoiser.register_forward_pre_hook(lambda net, given: seen.append(given[2]))
    diffclassifier.judge(nets, config, pictures(2), CPU)
    assert set(torch.cat(seen[1:]).tolist()) == {0, 1, 2}


def test_a_training_image_is_seen_at_several_levels_at_once_and_stratified_ones_fill_every_part_of_the_batch():
    seen, config = [], tiny(levels=4, stratified=True, class_dropout=0., noise_d=16)
    nets = SimpleNamespace(classes=3, denoise=lambda z, l, c: seen.append((z, l, c)) or torch.zeros_like(z))
    found = diffclassifier.loss(nets, config, torch.arange(3.).view(3, 1, 1, 1).expand(3, 1, 16, 16), torch.tensor([2, 0, 1]))
    (z, l, c), = seen
    assert c.tolist() == [2] * 4 + [0] * 4 + [1] * 4 and found["error_by_t"][1].sum() == 12
    of_image = (z.mean((1, 2, 3)) / alpha_sigma(l)[0])[l > 0].round()   # where little is noise: each image four times
    assert set(of_image.tolist()) <= {0., 1., 2.}
    edges = diffclassifier.logsnr(config, torch.linspace(0, 1, 13, dtype=torch.float64), 16)
    part = (l[:, None].double() < edges[1:-1]).sum(1)                    # l falls with t
    assert sorted(part.tolist()) == list(range(12)) != part.tolist()


# ---------------------------------------------------------------------------------------------- 2, 3 the rules
def test_votes_do_not_depend_on_the_space_or_weight_of_the_error_and_the_mean_does():
    error, t = some_errors()
    l = shifted_cosine(torch.from_numpy(t).double()).numpy()[..., None]
    for weight in (1 + np.exp(-l), np.exp(-l), np.random.default_rng(1).gamma(1, 1, l.shape)):      # v, x, any
        assert np.array_equal(count_votes(error), count_votes(error * weight))
    two = np.array([[[1., 0.], [0., .9]]])                              # the mean prefers class 1, x errors of which the second level counts double, 0
    assert votes.mean_errors(two).argmin(1) == 1 and votes.mean_errors(two, np.array([1., 2.])[None, :, None]).argmin(1) == 0


def test_votes_are_counted_as_by_a_double_loop():
    error, t = some_errors()
    p = ruled(tiny(), error, t)["majority"]
    for e, v, q in zip(error, count_votes(error), p):
        counted = np.bincount(e.argmin(1), minlength=3)
        assert v.tolist() == counted.tolist() and q.sum() == pytest.approx(1)
        lead = np.flatnonzero(counted == counted.max())
        assert q.argmax() == min(lead, key=lambda k: e[:, k].mean())


def test_one_level_is_one_vote_and_no_rule_differs():
    error, t = some_errors(N=1)
    found = labels(ruled(tiny(), error, t))
    assert found["majority"] == found["mean"] == found["elbo"] == error[:, 0].argmin(1).tolist()


def test_majority_and_mean_disagree_where_one_large_error_outweighs_two_small():
    error = np.array([[[1., 2.], [1., 2.], [9., 2.]]])
    found = labels(ruled(tiny(), error, np.full((1, 3), .5)))
    assert found["majority"] == [0] and found["mean"] == [1]


def test_a_tie_of_votes_goes_to_the_lower_mean_error_of_those_that_tie():
    """Class 2 has the lowest mean and too few votes; of 0 and 1, with two each, 1 has the lower mean."""
    error = np.array([[[1., 2, 2], [1, 2, 2], [9, 1, 2], [9, 1, 2], [30, 30, 0]]])
    p = ruled(tiny(), error, np.full((1, 5), .5))
    assert count_votes(error).tolist() == [[2, 2, 1]] and error.mean(1).argmin() == 2 and labels(p)["majority"] == [1]


def test_the_mean_rules_are_the_least_weighted_mean():
    error, t = some_errors()
    p = ruled(tiny(), error, t)
    slope = shifted_cosine_slope(torch.from_numpy(t).double()).numpy()[..., None]
    assert np.array_equal(p["mean"].argmax(1), error.mean(1).argmin(1)) and np.array_equal(p["elbo"].argmax(1), (slope * error).mean(1).argmin(1))


def test_the_order_of_classes_permutes_votes_and_probabilities():
    error, t = some_errors(K=4)
    turn = [2, 0, 3, 1]
    assert np.array_equal(count_votes(error)[:, turn], count_votes(error[..., turn]))
    a, b = ruled(tiny(), error, t), ruled(tiny(), error[..., turn], t)
    assert all(np.allclose(a[rule][:, turn], b[rule]) for rule in a)


def test_bucket_differences_are_those_of_a_loop():
    error, t = some_errors(M=3)
    error[1, 5:, 0] = np.nan
    l = np.random.default_rng(0).uniform(-14, 14, t.shape)
    found = votes.bucket_differences(error, l)
    for m, j, k in np.ndindex(found.shape):
        inside = [error[m, n, k] - np.nanmean(error[m, n]) for n in range(15) if min(max(int((l[m, n] + 10) // 2), 0), 9) == j and not np.isnan(error[m, n, k])]
        assert found[m, j, k] == pytest.approx(np.mean(inside) if inside else 0)


def test_the_learned_rule_finds_the_bucket_that_tells_and_leaves_the_shares_out():
    rng = np.random.default_rng(0)
    y = (rng.random(600) < .8).astype(int)
    x = rng.normal(size=(600, 10, 2))
    x[:, 4] += 1.5 * (1 - 2 * np.eye(2)[y])
    w = votes.fit(x, y)
    assert w.argmax() == 4 and w[4] > 5 * w[[0, 1, 2, 3, 5, 6, 7, 8, 9]].abs().max()
    score = -torch.einsum("j,mjk->mk", w, torch.from_numpy(x))
    assert (score.argmax(1).numpy() == y).mean() > .9
    p = (score + torch.tensor([.2, .8]).log()).softmax(1)                # Bayes' rule puts the shares back: calibrated in the mean
    assert abs(p[:, 1].mean() - y.mean()) < .02 < abs(score.softmax(1)[:, 1].mean() - y.mean())
    assert torch.allclose(1e4 * votes.fit(1e4 * x, y), w, atol=1e-4)
    often = np.repeat(np.arange(600), np.where(y == 1, 3, 1))            # a class three times as often: nothing changes
    assert torch.allclose(votes.fit(x[often], y[often]), w, rtol=.1, atol=.05)
    assert torch.isfinite(votes.fit(np.concatenate([x, x[..., :1]], 2), y)).all()                         # a class that no image has


# ---------------------------------------------------------------------------------------------- 4 common random numbers
@pytest.mark.parametrize("given", NETWORKS, ids=str)
def test_classes_of_one_embedding_have_equal_errors(given):
    config = tiny(**given)
    nets = networks(config)
    nets.denoiser.classes.weight.data[:] = nets.denoiser.classes.weight[0]
    error, _, _ = diffclassifier.judge(nets, config, pictures(3), CPU)
    assert np.allclose(error, error[..., :1], rtol=1e-5)


@pytest.mark.parametrize("given", NETWORKS, ids=str)
@pytest.mark.parametrize("prediction", ["v", "eps"])
@torch.no_grad()
def test_errors_of_a_batch_are_those_of_each_image_level_and_class_alone(given, prediction):
    config, split = tiny(**given, prediction=prediction, votes=3, stratified=True), pictures(2)
    nets = networks(config)
    error, alive, t = diffclassifier.judge(nets, config, split, CPU)
    for i, name in enumerate(split.ids):
        x = torch.from_numpy(split.images[i:i + 1]) / 127.5 - 1
        assert sorted((3 * t[i]).astype(int)) == [0, 1, 2]
        for n, k in np.ndindex(3, 3):
            eps, l = run.image_noise(0, [f"{name} {n}"], (3, 16, 16), CPU), shifted_cosine(torch.tensor([t[i, n]]))
            a, s = alpha_sigma(l)
            z = a * x + s * eps
            out = nets.denoiser(z, l * 20, torch.tensor([k]))               # forward, whatever late_class
            eps_hat = s * z + a * out if prediction == "v" else out
            assert error[i, n, k] == pytest.approx((eps_hat - eps).square().sum().item(), rel=1e-4)
    assert error.dtype == np.float64 and alive.all()


# ---------------------------------------------------------------------------------------------- 5 Gaussians
def test_weighted_as_the_likelihood_bound_the_errors_of_exact_denoisers_give_the_log_likelihood_ratio():
    """Classes N(m_k, .5^2 I) in 4 dimensions: E[x | z] is linear in z, and log p(x | 0) - log p(x | 1) is known. Rules give Bayes' label."""
    spread, means, N = .5, torch.tensor([[.6, 0, 0, 0], [-.3, .5, 0, 0]]), 20000
    config = tiny(votes=N, stratified=True)

    def denoise(z, l, c, row):
        a, s = (p.view(-1, 1, 1, 1)[row] for p in alpha_sigma(l))
        z, m = z[row], means[c].view(-1, 4, 1, 1)
        x_hat = m + a * spread ** 2 / (a ** 2 * spread ** 2 + s ** 2) * (z - a * m)
        return ((z - a * x_hat) / s - s * z) / a                        # as v
    nets = SimpleNamespace(denoise=denoise)
    for i, x in enumerate(torch.tensor([[.5, .1, .2, 0], [-.2, .4, 0, .3], [1., -.5, 0, 0]])):
        t = diffclassifier.times(config, f"g{i}")
        row, c = torch.arange(N).repeat_interleave(2), torch.arange(2).repeat(N)
        e = diffclassifier.errors(nets, config, x.view(1, 4, 1, 1).expand(N, -1, -1, -1), t, torch.randn(N, 4, 1, 1), row, c)
        error = e.sum((1, 2, 3)).view(1, N, 2).double().numpy()
        slope = shifted_cosine_slope(t.double()).numpy()[None, :, None]
        bound = votes.mean_errors(error, slope / 2)[0]
        exact = ((x - means) ** 2).sum(1) / (2 * spread ** 2)           # minus log p, but for a constant
        assert bound[1] - bound[0] == pytest.approx((exact[1] - exact[0]).item(), abs=.12)
        p = ruled(config, error, t.numpy()[None])
        assert labels({k: p[k] for k in ("majority", "mean", "elbo")}) == dict.fromkeys(("majority", "mean", "elbo"), [int(exact.argmin())])


# ---------------------------------------------------------------------------------------------- 6 stopping early
@pytest.mark.parametrize("K", [2, 3, 5])
def test_the_exact_stop_never_changes_a_label_and_stops_as_soon_as_the_leader_cannot_be_caught(K):
    error, t = some_errors(M=60, N=21, K=K)
    config = tiny(votes=21, stop="exact")
    kept, alive = diffclassifier.stopped(error, config)
    assert labels(ruled(config, kept, t, alive))["majority"] == labels(ruled(config, error, t))["majority"]
    used = (~np.isnan(kept)).all(2).sum(1)
    assert (used <= 21).all() and used.min() < 21 and np.array_equal(np.isnan(kept).any(2), np.isnan(kept).all(2))
    for e, n in zip(error, used):
        def lead(n):
            second, first = np.sort(np.bincount(e[:n].argmin(1), minlength=K))[-2:]
            return first - second > 21 - n
        assert n == next((i for i in range(1, 21) if lead(i)), 21)


@pytest.mark.parametrize("a, b, m", [(3, 1, 4), (0, 0, 3), (5, 2, 6), (4, 4, 5), (6, 0, 3)])
def test_the_chance_of_being_overtaken_is_that_of_all_votes_to_come(a, b, m):
    """Polya's urn: each vote falls to a side in proportion to its votes so far plus one."""
    total = 0.
    for votes_to_come in itertools.product([0, 1], repeat=m):
        n, p = [a + 1, b + 1], 1.
        for side in votes_to_come:
            p *= n[side] / sum(n)
            n[side] += 1
        total += p * (n[1] >= n[0])
    assert votes.overtaken(a, b, m) == pytest.approx(total)


def test_the_posterior_is_the_integral_of_the_share_below_one_half():
    q = (np.arange(200000) + .5) / 200000
    for a, b in ((0, 0), (3, 1), (10, 11), (26, 25), (40, 11)):
        density = q ** a * (1 - q) ** b
        assert votes.below_half(a, b) == pytest.approx(density[q < .5].sum() / density.sum(), rel=1e-4)


def test_the_approximate_stop_asks_less_and_seldom_errs():
    error, t = some_errors(M=100, N=51, K=2)
    full = np.array(labels(ruled(tiny(votes=51), error, t))["majority"])
    asked = []
    for stop in ("exact", "1e-3", "1e-1"):
        config = tiny(votes=51, stop=stop)
        kept, alive = diffclassifier.stopped(error, config)
        asked.append((~np.isnan(kept)).sum())
        assert (labels(ruled(config, kept, t, alive))["majority"] == full).mean() >= {"exact": 1, "1e-3": .98, "1e-1": .85}[stop]
    assert asked[0] > asked[1] > asked[2]


@pytest.mark.parametrize("t, df, p", [(2.093, 19, .05), (2.861, 19, .01), (3.883, 19, .001), (2.009, 50, .05), (3.496, 50, .001), (2.776, 4, .05)])
def test_paired_p_is_students(t, df, p):
    d = np.random.default_rng(0).normal(size=df + 1)
    d = (d - d.mean()) / d.std(ddof=1) + t / math.sqrt(df + 1)
    assert votes.paired_p(d) == pytest.approx(p, rel=.02) and votes.paired_p(-d) == pytest.approx(votes.paired_p(d))


def test_paired_p_of_differences_that_do_not_vary():
    assert votes.paired_p(np.zeros(5)) == 1 and votes.paired_p(np.ones(5)) == 0


def test_the_t_test_drops_classes_of_a_clearly_higher_mean_after_twenty_levels():
    rng = np.random.default_rng(0)
    error = rng.normal(size=(60, 1)) + np.array([0., .05, 2.]) + .3 * rng.normal(size=(60, 3))
    config = tiny(votes=60, stop="ttest", rule="mean")
    assert survivors(error[:19], np.arange(3), config).tolist() == [0, 1, 2]
    assert survivors(error[:20], np.arange(3), config).tolist() == [0, 1]


@pytest.mark.parametrize("rule", ["majority", "mean"])
def test_an_eliminated_class_never_wins_and_the_last_one_does(rule):
    error, t = some_errors(M=60, N=15, K=4)
    for stop, left in (("5:2", 2), ("3:3,9:1", 1), ("2:1", 1)):
        config = tiny(votes=15, stop=stop, rule=rule)
        kept, alive = diffclassifier.stopped(error, config)
        assert (alive.sum(1) == left).all()
        for r, p in ruled(config, kept, t, alive).items():
            assert alive[np.arange(60), p.argmax(1)].all() and np.isfinite(p).all() and np.allclose(p.sum(1), 1)
    first = ruled(tiny(), error[:, :2], t[:, :2])[rule].argmax(1)       # the last one: who was in front after two levels, by the rule's own order
    assert alive[np.arange(60), first].all()


@pytest.mark.parametrize("rule", ["majority", "mean"])
def test_stages_that_eliminate_nobody_are_none(rule):
    error, t = some_errors(K=2)
    plain = labels(ruled(tiny(votes=15), error, t))[rule]
    for stop in ("15:1", "5:2", "5:9,15:1"):
        config = tiny(votes=15, stop=stop, rule=rule)
        kept, alive = diffclassifier.stopped(error, config)
        assert np.array_equal(kept, error) and labels(ruled(config, kept, t, alive))[rule] == plain


@pytest.mark.parametrize("stop, rule", [("exact", "majority"), ("1e-1", "majority"), ("ttest", "mean"), ("2:2,6:1", "majority"), ("3:2", "mean")])
@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_stops_asks_what_a_whole_run_says_it_would(stop, rule, late):
    config = tiny(rule=rule, votes=23 if stop == "ttest" else 9, late_class=late, eval_batch_size=7)
    nets, split = networks(config), pictures(5)
    whole, _, t = diffclassifier.judge(nets, config, split, CPU)
    config = dataclasses.replace(config, stop=stop)
    error, alive, again = diffclassifier.judge(nets, config, split, CPU)
    kept, left = diffclassifier.stopped(whole, config)
    assert np.allclose(error, kept, rtol=1e-4, equal_nan=True) and np.array_equal(alive, left) and np.array_equal(t, again)


# ---------------------------------------------------------------------------------------------- 7 nothing else matters
def test_batch_size_and_order_of_images_change_nothing():
    config, split = tiny(votes=5), pictures(5)
    nets = networks(config)
    error, _, t = diffclassifier.judge(nets, config, split, CPU)
    for size in (1, 4, 50):
        other, _, times = diffclassifier.judge(nets, dataclasses.replace(config, eval_batch_size=size), split, CPU)
        assert np.allclose(other, error, rtol=1e-5) and np.array_equal(t, times) and np.array_equal(count_votes(other), count_votes(error))
    order = [3, 1, 4, 0, 2]
    other, _, times = diffclassifier.judge(nets, config, split.take(order), CPU)
    assert np.allclose(other, error[order], rtol=1e-5) and np.array_equal(times, t[order])


def test_two_evaluations_are_equal_and_the_method_comes_first():
    config, split = tiny(votes=3, baseline=True), pictures(4)
    nets = networks(config)
    (p, u), (q, w) = (diffclassifier.evaluate(nets.train(), split, config, CPU) for _ in range(2))
    assert list(p) == ["diffclassifier", "rule mean", "rule elbo", "rule learned", "resnet"] == list(q)
    assert all(np.array_equal(p[k], q[k]) for k in p) and all(np.array_equal(u[k], w[k]) for k in u)
    assert list(diffclassifier.evaluate(nets, split, dataclasses.replace(config, stop="exact"), CPU)[0]) == ["diffclassifier", "resnet"]


def test_two_processes_judge_what_one_does(tmp_path):
    config, split = tiny(votes=5, stop="exact", baseline=True), pictures(5)
    nets = networks(config)

    def work(rank):
        error, alive, t = diffclassifier.judge(nets, config, split, CPU)
        p, u = diffclassifier.evaluate(nets, split, config, CPU)
        return {"error": np.nan_to_num(error).tolist(), "alive": alive.tolist(), "t": t.tolist(), "p": p["diffclassifier"].tolist(), "u": u["posterior"].tolist()}
    alone = work(0)
    for found in processes(work, tmp_path):
        assert all(np.allclose(found[k], alone[k], rtol=1e-4) for k in alone)


def test_no_image_is_no_error():
    config = tiny()
    error, alive, _ = diffclassifier.judge(networks(config), config, pictures(0), CPU)
    assert error.shape == (0, 9, 3) and alive.shape == (0, 3)


def test_times_are_those_of_the_image_and_stratified_ones_fill_every_part_in_random_order():
    config = tiny(votes=101, stratified=True)
    a, b = diffclassifier.times(config, "a"), diffclassifier.times(config, "b")
    assert torch.equal(a, diffclassifier.times(config, "a")) and not torch.equal(a, b)
    assert sorted((a.double() * 101).int().tolist()) == list(range(101)) and abs(np.corrcoef(np.arange(101), a)[0, 1]) < .3
    plain = diffclassifier.times(tiny(votes=5000), "a")
    assert 0 <= plain.min() and plain.max() <= 1 and abs(plain.mean() - .5) < .02


# ---------------------------------------------------------------------------------------------- 9, 10 images
def calls(nets):
    seen = []
    nets.denoiser.register_forward_pre_hook(lambda net, given: seen.append(given[2].tolist()))
    return seen


@torch.no_grad()
def test_drawing_takes_a_call_a_step_and_two_with_guidance_of_which_every_other_has_no_class():
    nets, x, y = networks(tiny()), torch.zeros(2, 3, 16, 16), torch.tensor([0, 2])
    seen = calls(nets)
    plain = diffclassifier.draw(nets, tiny(guidance=0., draw_steps=4), x, y, ["a", "b"])
    assert seen == [[0, 2]] * 4 and plain.shape == (2, 3, 16, 16) and plain.dtype == np.uint8
    seen.clear()
    guided = diffclassifier.draw(nets, tiny(guidance=2., draw_steps=4), x, y, ["a", "b"])
    assert seen == [[0, 2], [3, 3]] * 4 and not np.array_equal(plain, guided)


@torch.no_grad()
def test_without_guidance_drawing_is_conditional_ancestral_sampling():
    nets, config, y = networks(tiny()), tiny(guidance=0., draw_steps=3), torch.tensor([1])
    levels = [shifted_cosine(torch.tensor(t)) for t in (1., 2 / 3, 1 / 3, 0.)]
    noise = [run.image_noise(0, [f"a draw {i}"], (3, 16, 16), CPU) for i in range(3)]
    z = noise[0]                                                        # (1 - 2e-9) of it: of the image nothing is left
    for i, (l, after) in enumerate(zip(levels, levels[1:])):
        (a, s), (a_s, s_s), c = alpha_sigma(l), alpha_sigma(after), -torch.expm1(l - after)
        x = (a * z - s * nets.denoiser(z, l.expand(1) * 20, y)).clamp(-1, 1)
        z = a_s * (z * (1 - c) / a + c * x) + s_s * c.sqrt() * noise[i + 1] if i < 2 else x
    drawn = diffclassifier.draw(nets, config, torch.zeros(1, 3, 16, 16), y, ["a"])
    assert np.abs(drawn.astype(int) - ((z.numpy() + 1) * 127.5).round()).max() <= 1


@torch.no_grad()
def test_one_label_and_name_are_one_image_and_from_time_0_the_image_comes_back():
    config = tiny(draw_steps=3)
    nets, x = networks(config), torch.rand(1, 3, 16, 16) * 2 - 1
    drawn = diffclassifier.draw(nets, config, x.expand(3, -1, -1, -1), torch.tensor([0, 0, 1]), ["a"] * 3, .5)
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    drawn = diffclassifier.draw(nets, config, x, torch.tensor([0]), ["a"], 0.)
    assert np.abs(drawn - ((x.numpy() + 1) * 127.5)).max() <= 2


@torch.no_grad()
def test_with_a_guidance_of_minus_one_drawing_is_that_of_no_class():
    config, x, name = tiny(guidance=0., draw_steps=4), torch.zeros(1, 3, 16, 16), ["a"]
    nets = networks(config)
    unguided = dataclasses.replace(config, guidance=-1.)                # a user's lies in 0..
    drawn, none = diffclassifier.draw(nets, unguided, x, torch.tensor([2]), name), diffclassifier.draw(nets, config, x, torch.tensor([3]), name)
    assert np.abs(drawn.astype(int) - none).max() <= 1 < np.abs(drawn.astype(int) - diffclassifier.draw(nets, config, x, torch.tensor([2]), name)).max()


@torch.no_grad()
def test_evidence_sums_to_the_difference_of_the_errors():
    config = tiny(votes=5, eval_batch_size=4)
    nets, split = networks(config), pictures(1)
    error, _, _ = diffclassifier.judge(nets, config, split, CPU)
    heat = diffclassifier.evidence(nets, config, diffclassifier.seen(nets, split.images[0], CPU), split.ids[0], 2, 0)
    assert heat.shape == (16, 16) and heat.sum() == pytest.approx((error[0, :, 0] - error[0, :, 2]).mean(), rel=1e-3, abs=1e-2)


@torch.no_grad()
def test_a_class_has_no_evidence_against_itself():
    config, x = tiny(votes=5, eval_batch_size=4), torch.rand(1, 3, 16, 16)
    assert (diffclassifier.evidence(networks(config), config, x, "a", 1, 1) == 0).all()                     # one noise for both


@pytest.mark.parametrize("wavelet", [False, True])
@pytest.mark.parametrize("k", [0, 1])
def test_evidence_lies_where_alone_the_classes_differ(k, wavelet):
    """Two Gaussians N(m_k, .3^2 I), whose means differ inside a box; who denoises knows them. Wavelets of half the side are of half the spread too."""
    config, box, spread, means = tiny(votes=31), np.zeros((16, 16), bool), .3, torch.zeros(2, 1, 16, 16)
    box[4:10, 6:14] = True
    means[1, 0, box] = .6
    image = (means[k:k + 1] + spread * torch.randn(1, 1, 16, 16) + 1).mul(127.5).round().clamp(0, 255).byte().numpy()
    encode = (lambda x: haar(x) / 2) if wavelet else lambda x: x
    seen, spread, box = encode(means), spread / (1 + wavelet), box[::2, ::2] if wavelet else box

    def denoise(z, l, c, row):
        a, s = (p.view(-1, 1, 1, 1)[row] for p in alpha_sigma(l))
        z, m = z[row], seen[c]
        x_hat = m + a * spread ** 2 / (a ** 2 * spread ** 2 + s ** 2) * (z - a * m)
        return ((z - a * x_hat) / s - s * z) / a                        # as v
    nets = SimpleNamespace(denoise=denoise, encode=encode, classes=2, shape=tuple(seen.shape[1:]))
    error, *_ = diffclassifier.judge(nets, config, Split(image, np.array([k]), ["a"]), CPU)
    heat = diffclassifier.evidence(nets, config, diffclassifier.seen(nets, image[0], CPU), "a", k, 1 - k)
    assert np.array_equal(heat != 0, box)
    assert heat.sum() == pytest.approx(np.diff(votes.mean_errors(error[..., [k, 1 - k]])).item(), rel=1e-4) and heat.sum() > 0


@pytest.mark.parametrize("sides", [(7, 8), (8, 7)])
def test_haar_of_odd_sides_is_refused(sides):
    with pytest.raises(ValueError, match="even sides"):
        haar(torch.zeros(1, 1, *sides))


def test_haar_is_orthonormal_and_halved_stays_in_range():
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    w = haar(x)
    assert w.shape == (2, 12, 4, 6) and torch.allclose(unhaar(w), x, atol=1e-6)
    assert torch.allclose(w.square().sum((1, 2, 3)), x.square().sum((1, 2, 3)), rtol=1e-5)
    assert (haar(torch.sign(x)) / 2).abs().max() <= 1
    a, b, c, d = x[0, 1, :2, :2].flatten().tolist()                     # of one square, by hand
    assert w[0, [1, 4, 7, 10], 0, 0].tolist() == pytest.approx([(a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2], abs=1e-6)


def test_wavelets_are_what_the_network_sees_and_decode_to_the_image():
    nets, x = networks(tiny(wavelet=True)), torch.rand(2, 3, 16, 16) * 2 - 1
    assert nets.shape == (12, 8, 8) and nets.encode(x).shape == (2, 12, 8, 8) and torch.allclose(nets.decode(nets.encode(x)), x, atol=1e-6)


# ---------------------------------------------------------------------------------------------- 11, 12 uncertainty, arithmetic
def test_uncertainties_lie_in_their_ranges_and_are_what_they_are_called():
    for K in (2, 5):
        error, t = some_errors(M=50, N=15, K=K)
        p = ruled(tiny(), error, t)["majority"]
        u = diffclassifier.uncertainties(error, p)
        assert set(u) == set(KINDS) and all(v.shape == (50,) and (v >= 0).all() and (v <= 1 + 1e-12).all() for v in u.values())
        q = count_votes(error).max(1) / 15
        assert np.allclose(u["votes"], 1 - q) and u["variance"].max() <= .5 * (1 - 1 / K) + 1e-12
        if K == 2:
            assert np.allclose(u["variance"], q * (1 - q)) and u["variance"].max() <= .25
            assert u["posterior"].max() <= .5
            order = np.argsort(q)
            assert (np.diff(u["posterior"][order]) <= 1e-12).all()      # the surer the vote, the less


def test_every_rule_has_a_temperature_of_its_own_which_keeps_its_labels():
    error, t = some_errors()
    nets = SimpleNamespace(shape=(1, 16, 16), shares=torch.ones(3) / 3, weight=torch.zeros(10), temperature=torch.tensor([1., 2., 1., 1.]))
    a, b = ruled(tiny(), error, t), ruled(tiny(), error, t, nets=nets)
    assert np.array_equal(a["majority"], b["majority"]) and labels(a) == labels(b)
    warm = np.sqrt(a["mean"])
    assert np.allclose(b["mean"], warm / warm.sum(1, keepdims=True))


def test_calibrate_fits_the_learned_rule_and_all_temperatures_but_its_own():
    config, split = tiny(votes=5, calibrate=True), pictures(12)
    nets = networks(config)
    diffclassifier.calibrate(nets, split, config, CPU)
    assert nets.temperature[3] == 1 and (nets.temperature[:3] != 1).all() and nets.weight.any()
    error, alive, t = diffclassifier.judge(nets, config, split, CPU)
    for rule, p in rules(nets, config, error, alive, t).items():         # no other exponent has a smaller loss
        assert rule == "learned" or metrics.sharpness(split.labels, p) == pytest.approx(1, abs=.02)
    diffclassifier.calibrate(nets, split, dataclasses.replace(config, calibrate=False), CPU)
    assert (nets.temperature == 1).all()


def test_bfloat16_votes_as_float32():
    """Of a network whose classes differ: the null token apart, embeddings are far from each other."""
    config = tiny(votes=15)
    nets, split = networks(config), pictures(6)
    nets.denoiser.classes.weight.data *= 5
    a, b = (diffclassifier.judge(nets, dataclasses.replace(config, amp=amp), split, CPU)[0] for amp in ("off", "bf16"))
    assert (a.argmin(2) == b.argmin(2)).mean() >= .95 and np.allclose(a, b, rtol=.1) and not np.array_equal(a, b)
    assert len(np.unique(b)) == b.size                                  # summed in float32: no ties


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_under_bfloat16_only_what_the_network_says_is_rounded(prediction):
    config, x, eps, t = tiny(prediction=prediction), *torch.rand(2, 4, 3, 16, 16), torch.tensor([.1, .4, .6, .9])
    l = diffclassifier.logsnr(config, t, 16)
    said = known(config, x, eps + .3)(None, l, None).bfloat16()
    a, s = (p.view(-1, 1, 1, 1).double() for p in alpha_sigma(l))
    eps_hat = s * (a * x + s * eps) + a * said.double() if prediction == "v" else said.double()
    nets, every = SimpleNamespace(denoise=lambda *args: said), torch.arange(4)
    with run.autocast(dataclasses.replace(config, amp="bf16"), CPU):
        found = diffclassifier.errors(nets, config, x, t, eps, every, every).sum((1, 2, 3))
    assert found.dtype == torch.float32 and torch.allclose(found.double(), (eps_hat - eps).square().sum((1, 2, 3)), rtol=1e-5)


# ---------------------------------------------------------------------------------------------- data, settings
def test_so_many_images_are_judged_drawn_by_class_and_always_the_same():
    config = configure(data="toy", size=28, limit=60)
    assert configure(data="toy").judged == 250
    whole, few, again = (load_for(dataclasses.replace(config, judged=n)) for n in (0, 20, 20))
    assert len(few.train) == len(whole.train) == 60 and len(few.val) == len(few.test) == 20 and few.test.ids == again.test.ids
    assert set(few.test.ids) < set(whole.test.ids) and set(few.test.labels) == set(range(5))
    assert abs(np.bincount(few.test.labels)[0] / 20 - np.bincount(whole.test.labels)[0] / 60) < .1
    rows = [whole.test.ids.index(name) for name in few.test.ids]
    assert np.array_equal(few.test.images, whole.test.images[rows]) and np.array_equal(few.test.posterior, whole.test.posterior[rows])


def facts(classes=5):
    return dict(channels=3, classes=list("abcdefgh")[:classes], multilabel=False)


@pytest.mark.parametrize("stop", ["never", "", "0", "1", "2", "0.0", "nan", "-1e-3", "10", "10:", "10:0", "0:3", "10:3,", "10:3:2", "1e-3,", "exact "])
def test_a_stop_that_is_none_is_refused(stop):
    with pytest.raises(run.UserError, match=r"take none, exact, a probability such as 1e-3, ttest, or stages such as 10:3,50:1"):
        diffclassifier.build(tiny(stop=stop), facts())


@pytest.mark.parametrize("stop, rule", [("none", "learned"), ("exact", "majority"), ("1e-3", "majority"), (".01", "majority"), ("0.05", "majority"),
                                        ("ttest", "mean"), ("10:3,50:1", "mean"), ("10:3", "majority")])
def test_a_stop_is_taken_with_a_rule_whose_label_it_settles(stop, rule):
    diffclassifier.build(tiny(stop=stop, rule=rule), facts())


@pytest.mark.parametrize("given, n, said", [
    (dict(stop="exact", rule="mean"), 5, "add --rule majority"), (dict(stop="ttest"), 5, "add --rule mean"), (dict(stop="1e-3", rule="learned"), 5, "add --rule majority"),
    (dict(stop="10:3,50:1", rule="elbo"), 5, "add --rule mean"), (dict(stop="10:1", rule="learned"), 5, "add --rule mean"),
    (dict(prior="training"), 5, "--prior training --rule majority: only the learned rule has probabilities"),
    (dict(votes=10), 2, "--votes 10: two classes could draw; take an odd number, such as 11"), (dict(pretrain_epochs=1), 5, "--no-baseline"),
    (dict(mult="1,x"), 5, "--mult 1,x --attention 2 --channels 8 --head-channels 8: no network can be made"),
    (dict(size=17), 5, "--size 17: must be a multiple of 2; take 16 or 18"),
    (dict(backbone="dit", size=18), 5, "--size 18: must be a multiple of 4; take 16 or 20"),
    (dict(backbone="dit", size=20, wavelet=True), 5, "--size 20: must be a multiple of 8; take 16 or 24"),
    (dict(backbone="dit", patch=32), 5, "--size 16: must be a multiple of 32; take 32"),
    (dict(backbone="dit", dim=18), 5, "--patch 4 --dim 18 --depth 2 --head-channels 8: no network can be made of these (dim 18: must be a multiple of 2"),
    (dict(backbone="dit", late_class=True), 5, "--backbone dit --late-class: a DiT has no decoder that the class could enter alone; leave one out")])
def test_what_the_method_cannot_take_is_one_line(given, n, said):
    with pytest.raises(run.UserError) as fault:
        diffclassifier.build(tiny(**given), facts(n))
    assert said in str(fault.value)


def test_a_class_missing_in_validation_does_not_stop_the_rule_that_is_fitted_there():
    config, split = tiny(rule="learned", votes=5), pictures(6)
    data, nets = DataSet(split, split.take([0, 1, 3, 4]), split, list("abc"), False, 3), networks(config)
    diffclassifier.initialise(nets, data, config)
    diffclassifier.calibrate(nets, data.val, config, CPU)
    assert torch.isfinite(nets.weight).all() and nets.weight.any()


def test_prior_is_bayes_rule_on_the_learned_answers_and_on_them_alone():
    error, t = some_errors()
    nets = SimpleNamespace(shape=(1, 16, 16), shares=torch.tensor([.7, .3, 0.]), weight=torch.linspace(0, 2, 10), temperature=torch.ones(4))
    equal, training = (ruled(tiny(rule="learned", prior=prior), error, t, nets=nets) for prior in ("equal", "training"))
    expected = equal["learned"] * np.array([.7, .3, 0])
    assert np.allclose(training["learned"], expected / expected.sum(1, keepdims=True), atol=1e-6)
    assert all(np.array_equal(equal[rule], training[rule]) for rule in ("majority", "mean", "elbo"))


# ---------------------------------------------------------------------------------------------- the paper's sizes
def paper(backbone, device="meta"):
    """The networks for CheXpert's two classes, without the control, and their settings."""
    config = configure(data="chexpert", backbone=backbone, baseline=False)
    with torch.device(device):
        return diffclassifier.build(config, facts(2)), config


def test_the_unet_lacks_what_the_authors_have_around_attention():
    """Theirs, 275.8 M and 88 G multiply-adds, attends in transformer blocks: a layer before and one behind, three norms, self-attention without biases
    but at its end, cross-attention to the class's token of 512 (of which a bias a class remains), an MLP with gates; and a layer of its own for
    the token, whose table they keep apart. Ours attends in one layer, and adds the class to the time embedding."""
    linear = lambda a, b: a * b + b
    ours = lambda c: 2 * c + linear(c, 3 * c) + linear(c, c)
    theirs = lambda c: 2 * c + 2 * linear(c, c) + 3 * 2 * c + 3 * c * c + linear(c, c) + c * c + 2 * 512 * c + linear(c, c) + linear(c, 8 * c) + linear(4 * c, c)
    net, config = paper("unet")
    assert net.shape == (12, 128, 128) and config.epochs == 700 and count(net) == 234_106_636
    more = 5 * (theirs(512) - ours(512)) + theirs(1024) - ours(1024)    # two blocks down, three up; the middle
    assert count(net) - 3 * 512 + more + linear(512, 512) == 275_840_268
    token = lambda c: 16 * c * c                                        # 2 at the ends, 2 of cross-attention, 12 of the MLP
    found = multiply_adds(net.denoiser, 12, 128) / 1e9
    assert found == pytest.approx(81.8, abs=.05) and found + (5 * 16 ** 2 * token(512) + 8 ** 2 * token(1024)) / 1e9 == pytest.approx(88, abs=.5)


def test_the_dit_is_the_authors_but_for_the_rows_of_classes_that_nobody_asks_for():
    """Theirs with one table and one time MLP, 130.6 M, has the 1,001 rows of ImageNet; ours the two classes and the null token."""
    net, _ = paper("dit")
    assert net.shape == (12, 128, 128) and count(net) == 129_807_552 == 130_574_016 - 998 * 768
    assert multiply_adds(net.denoiser, 12, 128) / 1e9 == pytest.approx(107, rel=.005)


def test_at_scale_paper_a_dit_is_trained_as_long_as_theirs_and_what_is_given_wins():
    config = configure(data="chexpert", backbone="dit")
    assert (config.epochs, config.lr, config.batch_size) == (512, 1e-4, 128) and round(config.warmup * 512 * 128) == 249       # 128 steps an epoch
    assert configure(data="chexpert", backbone="dit", epochs=3).epochs == 3 and configure(data="chexpert", backbone="dit", warmup=.1).warmup == .1
    small, unet = configure(backbone="dit"), configure()
    assert dataclasses.replace(small, backbone="unet") == unet


@pytest.mark.parametrize("size", [32, 48, 64])
def test_the_small_dit_costs_about_as_much_as_the_small_unet(size):
    a, b = (diffclassifier.build(configure(backbone=backbone, size=size, baseline=False), facts()).to("meta") for backbone in ("unet", "dit"))
    assert .5 < multiply_adds(b.denoiser, 12, size // 2) / multiply_adds(a.denoiser, 12, size // 2) < 2            # of wavelets


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_a_step_at_the_papers_size_lowers_the_loss(backbone):
    nets, config = paper(backbone, "cpu")
    optimizer = torch.optim.AdamW(diffclassifier.parameter_groups(nets, config))
    batch, found = SimpleNamespace(x=torch.rand(2, 3, 256, 256) * 2 - 1, y=torch.tensor([0, 1])), []
    for _ in range(2):
        torch.manual_seed(0)                                            # of times, noise and dropped classes
        found.append(diffclassifier.train_step(nets, None, config, batch, True)["loss"])
        if len(found) == 1:
            found[0].backward()
            optimizer.step()
    assert found[1] < found[0] and found[0].isfinite() and all(p.isfinite().all() for p in nets.parameters())


# ---------------------------------------------------------------------------------------------- runs and commands
ARGS = ("--data toy --size 28 --limit 12 --epochs 2 --batch-size 4 --val-votes 1 --channels 8 --mult 1,1,1 --attention 4 --head-channels 8 --width 8 --votes 5 "
        "--draw-steps 2 --no-wavelet --device cpu").split()


def go(folder, *more):
    """A run of a second or two; few resamples for its intervals. Returns the exit code."""
    return short(diffclassifier, *ARGS, "--output", folder, *more)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert go(folder) == 0
    return folder


def command(name, folder, *more):
    return short(diffclassifier, name, "--checkpoint", folder / "best.pt", *more)


def test_a_run_writes_its_numbers_and_pictures(toy_run):
    found = json.loads((toy_run / "metrics.json").read_text())
    assert set(opened(toy_run / "figures")) == {f"{name}.png" for name in ("curves", "confusion", "reliability", "coverage", "rules", "errors")}
    assert set(found["baselines"]) == {"majority", "rule majority", "rule mean", "rule elbo", "resnet"} and found["method"] == "diffclassifier"
    specific = found["method_specific"]
    assert [row["votes"] for row in specific["validation_by_votes"]] == [1, 3, 5] and set(specific["validation_by_votes"][0]) == {"votes", "majority", "mean", "elbo", "learned"}
    assert set(specific["validation_by_stop"]) == {"exact", "1e-4", "1e-3", "1e-2", "ttest"} and specific["calls_an_image"] == 25
    assert specific["validation_by_stop"]["exact"]["same_label"] == 1 and specific["validation_by_stop"]["exact"]["share_of_calls"] <= 1
    log = [json.loads(line) for line in (toy_run / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and len(log[0]["error_by_t"]) == 10 and "loss" in log[0]


def test_the_checkpoint_keeps_what_was_fitted(toy_run):
    config, nets, _, _ = run.load_model(toy_run / "best.pt", "diffclassifier", Config, diffclassifier.build, {})
    specific = json.loads((toy_run / "metrics.json").read_text())["method_specific"]
    assert config.rule == "learned" and nets.weight.tolist() == specific["bucket_weights"] and nets.weight.any() and nets.shares.tolist() == specific["shares"]


@pytest.mark.parametrize("stop, rule", [("exact", "majority"), ("1e-3", "majority"), ("ttest", "mean"), ("2:3,4:1", "mean"), ("none", "elbo")])
def test_eval_with_every_stop_says_what_it_cost(toy_run, tmp_path, stop, rule, capsys):
    given = dict(stop=stop, rule=rule, judged=8)
    assert command("eval", toy_run, "--stop", stop, "--rule", rule, "--judged", 8, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    config, nets, _, _ = run.load_model(toy_run / "best.pt", "diffclassifier", Config, diffclassifier.build, given)
    calls = (~np.isnan(diffclassifier.judge(nets, config, load_for(config).test, CPU)[0])).sum() / 8
    assert f"network calls an image: {calls:.1f} of 5 noise levels x 5 classes\n" in said and (calls == 25) == (stop in ("none", "ttest"))
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 9
    assert json.loads((tmp_path / "out" / "config.json").read_text())["stop"] == stop


def test_eval_gives_the_runs_own_numbers_and_the_exact_stop_those_of_the_whole_vote(toy_run, tmp_path):
    assert command("eval", toy_run, "--output", tmp_path / "a") == 0
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["test"] for folder in (tmp_path / "a", toy_run))
    assert {k: v for k, v in ours.items() if k != "ci95"} == {k: v for k, v in theirs.items() if k != "ci95"}
    for stop in ("none", "exact"):
        assert command("eval", toy_run, "--rule", "majority", "--stop", stop, "--output", tmp_path / stop) == 0
    a, b = ([row["predicted"] for row in csv.DictReader((tmp_path / stop / "predictions.csv").open())] for stop in ("none", "exact"))
    assert a == b


def own_images(folder, n=2):
    folder.mkdir()
    for i, image in enumerate(pictures(n, 40).images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"mine-{i}.png")
    return folder


def test_predict_writes_a_row_and_a_panel_an_image(toy_run, tmp_path, capsys):
    assert command("predict", toy_run, own_images(tmp_path / "mine"), "--output", tmp_path / "out") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert len(rows) == 2 == len(opened(tmp_path / "out")) and all(sum(float(v) for k, v in row.items() if k.startswith("p:")) == pytest.approx(1, abs=1e-4) for row in rows)
    said = capsys.readouterr().out
    assert all(f"{kind} " in said for kind in KINDS) and "not for clinical use" in said
    counts = re.findall(r"votes for \S+ (\d+), \S+ (\d+), \S+ (\d+)", said)
    assert len(counts) == 2 and all(5 >= int(a) >= int(b) >= int(c) for a, b, c in counts)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", [5, 14])
def test_a_resumed_run_ends_with_the_weights_and_the_votes_of_one_that_was_not_stopped(stop_at, tmp_path, monkeypatch):
    """Stopped in the second epoch, after one of the plain ResNet alone, and in the last; four steps an epoch."""
    given = dict(data="toy", size=28, limit=12, batch_size=3, epochs=3, pretrain_epochs=1, select="auroc", channels=8, mult="1,1", attention="2", head_channels=8, width=8,
                 votes=5, val_votes=1, calibrate=True, device="cpu", seed=1)
    monkeypatch.setattr(run.score, "__defaults__", (None, 5))
    whole = diffclassifier.train(configure(**given, output=str(tmp_path / "whole")))
    step, calls, config = diffclassifier.train_step, itertools.count(), configure(**given, output=str(tmp_path / "parted"))

    def stopping(*args):
        if next(calls) == stop_at:
            raise Stopped
        return step(*args)

    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(diffclassifier, "train_step", stopping)
        diffclassifier.train(config)
    parted = diffclassifier.train(config, resume=tmp_path / "parted")
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("whole", "parted"))
        assert same(a["nets"], b["nets"]) and same(a["ema"], b["ema"])
        assert name == "best.pt" or a["position"]["step"] == b["position"]["step"] == 16
    assert a["ema"]["weight"].any() and whole["test"] == parted["test"]
    assert whole["method_specific"]["validation_by_votes"] == parted["method_specific"]["validation_by_votes"]


@torch.no_grad()
def test_explain_shows_images_above_and_under_each_what_it_differs_in(toy_run, tmp_path, monkeypatch):
    shown, maps = [], []
    grey = lambda nets, config, x, labels, names, start: np.stack([np.full((3, 28, 28), 100 + 10 * k, np.uint8) for k in labels])
    monkeypatch.setattr(diffclassifier, "draw", grey)
    monkeypatch.setattr(diffclassifier, "evidence", lambda nets, config, x, name, best, other: np.eye(28) * (1 + 10 * best + other))
    signed = diffclassifier.plots.signed
    monkeypatch.setattr(diffclassifier.plots, "signed", lambda d: maps.append(d) or signed(d))
    keep = lambda path, title, tiles, charts, lines, columns: shown.append((title, list(tiles), charts, lines, columns))
    monkeypatch.setattr(diffclassifier.plots, "explanation", keep)
    assert command("explain", toy_run, "--limit", 1, "--output", tmp_path / "out") == 0
    config, nets, facts, _ = run.load_model(toy_run / "best.pt", "diffclassifier", Config, diffclassifier.build, dict(limit=1))
    test, names = load_for(config).test, facts["classes"]
    p = diffclassifier.evaluate(nets, test, config, CPU)[0]["diffclassifier"][0]
    a, b, c = np.argsort(-p)[:3]
    (title, captions, ((series, *_),), lines, columns), = shown
    difference = test.images[0].mean(0) - (100 + 10 * a)
    assert title == f"{names[a]} (true: {names[test.labels[0]]}), by --rule learned" and columns == 4
    assert captions == [f"image {test.ids[0]}", *(f"denoised as {names[k]}, p {p[k]:.3f}" for k in (a, b, c)),
                        f"evidence for {names[a]} against {names[b]}: orange for, blue against",
                        f"image minus denoised as {names[a]}: orange lighter, blue darker, by {np.abs(difference).max():.0f} of 255 at most",
                        *(f"{names[k]} minus {names[a]}: orange lighter, blue darker, by {10 * abs(k - a)} of 255 at most" for k in (b, c))]
    for found, wanted in zip(maps, (np.eye(28) * (1 + 10 * a + b), difference, 10. * (b - a), 10. * (c - a)), strict=True):
        assert np.allclose(found, wanted)
    assert lines[0].startswith("votes of 5 noise levels: nevus ")
    assert list(series) == names and all(x.tolist() == [1, 2, 3, 4, 5] and (np.diff(y) >= 0).all() for x, y in series.values())
    assert sum(y for _, y in series.values()).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("own", [False, True])
def test_explain_draws_a_picture_an_image(toy_run, tmp_path, own, capsys):
    paths = [own_images(tmp_path / "mine")] if own else ["--limit", 2]
    assert command("explain", toy_run, *paths, "--output", tmp_path / "out") == 0
    assert len(opened(tmp_path / "out")) == 2 and "not for clinical use" in capsys.readouterr().out


def test_sample_draws_the_same_again_and_the_first_of_many(toy_run, tmp_path):
    for n in (1, 3):
        assert command("sample", toy_run, "--label", "nevus", "-n", n, "--output", tmp_path / str(n)) == 0
    assert set(opened(tmp_path / "3")) == {"samples.png", *(f"nevus-{i:04d}.png" for i in range(3))}
    a, b = (np.asarray(Image.open(tmp_path / n / "nevus-0000.png")).astype(int) for n in "13")
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("options", [["--wavelet", "--late-class", "--mult", "1,1", "--prediction", "eps", "--loss-weight", "min-snr"],
                                     ["--recipe", "paper", "--stop", "exact", "--no-baseline", "--calibrate", "--balanced"]], ids=["wavelet", "paper"])
def test_other_settings_run_from_end_to_end(options, tmp_path):
    assert go(tmp_path / "run", *options) == 0
    assert command("sample", tmp_path / "run", "--label", 1, "-n", 1) == 0 and command("explain", tmp_path / "run", "--limit", 1) == 0
    calls = json.loads((tmp_path / "run" / "metrics.json").read_text())["method_specific"]["calls_an_image"]
    assert calls < 25 if "exact" in options else calls == 25


DIT = ["--backbone", "dit", "--dim", 16, "--depth", 2, "--epochs", 1]


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dit"
    assert go(folder, *DIT) == 0
    return folder


def test_a_dit_runs_from_end_to_end(dit_run, tmp_path, capsys):
    assert json.loads((dit_run / "config.json").read_text())["backbone"] == "dit" and "diffclassifier" == json.loads((dit_run / "metrics.json").read_text())["method"]
    assert command("eval", dit_run, "--stop", "exact", "--rule", "majority", "--judged", 8, "--output", tmp_path / "eval") == 0
    assert len((tmp_path / "eval" / "predictions.csv").read_text().splitlines()) == 9
    assert command("predict", dit_run, own_images(tmp_path / "mine"), "--output", tmp_path / "predict") == 0
    assert len(opened(tmp_path / "predict")) == 2
    assert command("explain", dit_run, tmp_path / "mine", "--output", tmp_path / "explain") == 0 and len(opened(tmp_path / "explain")) == 2
    assert command("sample", dit_run, "--label", "nevus", "-n", 1, "--output", tmp_path / "sample") == 0


def test_a_run_starts_from_the_weights_of_its_own_backbone_alone(toy_run, dit_run, tmp_path, capsys):
    capsys.readouterr()
    for file, theirs, ours in ((toy_run / "best.pt", "unet", "dit"), (dit_run / "best.pt", "dit", "unet")):
        assert go(tmp_path / "run", *DIT, "--backbone", ours, "--init", file) == 2
        assert capsys.readouterr().err == (f"error: --init {file}: is of a run with --backbone {theirs}, this one has --backbone {ours}; "
                                           f"add --backbone {theirs}, or name another\n")
    assert go(tmp_path / "run", *DIT, "--no-precondition", "--init", dit_run / "best.pt") == 2
    assert "is of a run with --precondition, this one has --no-precondition; add --precondition, or" in capsys.readouterr().err
    assert go(tmp_path / "run", *DIT, "--prediction", "eps", "--init", dit_run / "best.pt") == 2
    assert "is of a run with --prediction v, this one has --prediction eps; add --prediction v, or" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    config, nets, _, _ = run.load_model(dit_run / "best.pt", "diffclassifier", Config, diffclassifier.build, {})
    fresh = diffclassifier.build(config, facts())
    run.load_init(fresh, dit_run / "best.pt", "diffclassifier", backbone="dit")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), nets.parameters(), strict=True)) and "; new" not in capsys.readouterr().out


def test_latents_are_diffused_at_unit_spread_and_another_autoencoder_is_refused(tmp_path, capsys):
    folder, small, other = tmp_path / "run", autoencoder(tmp_path / "small.pt"), autoencoder(tmp_path / "other.pt", seed=2)
    assert go(folder, "--wavelet", "--mult", "1,1", "--autoencoder", small) == 0
    config, nets, facts, device = run.load_model(folder / "best.pt", "diffclassifier", Config, diffclassifier.build, {})
    z = torch.cat([diffclassifier.seen(nets, image, CPU) for image in load_for(config).train.images])
    assert z.shape == (12, 2, 14, 14) and .8 < z.std() < 1.25
    assert command("sample", folder, "--label", 1, "-n", 1) == 0 and command("explain", folder, "--limit", 1) == 0
    capsys.readouterr()
    for name, options in (("eval", []), ("sample", ["--label", 1, "-n", 1])):
        assert command(name, folder, "--autoencoder", other, *options) == 2
        assert capsys.readouterr().err == f"error: --autoencoder {other}: is not the one that this model was trained with\n"


@pytest.mark.parametrize("options", [["--votes", "0"], ["--stop", "never"], ["--stop", "exact", "--rule", "mean"], ["--val-votes", "0"], ["--mult", "1,x"]], ids=" ".join)
def test_bad_settings_are_one_line_and_exit_code_2(options, tmp_path, capsys):
    assert go(tmp_path / "run", *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --") and said.count("\n") == 1


def test_an_even_number_of_votes_for_two_classes_is_one_line(tmp_path, capsys):
    for name in ("ill", "well"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, image in enumerate(np.random.default_rng(len(name)).integers(0, 256, (8, 16, 16, 3), np.uint8)):
            Image.fromarray(image).save(tmp_path / "data" / name / f"{i}.png")
    assert go(tmp_path / "run", "--data", "folder", "--root", tmp_path / "data", "--size", 16, "--scale", "small", "--votes", 4) == 2
    said = capsys.readouterr().err
    assert said == "error: --votes 4: two classes could draw; take an odd number, such as 5\n"


@pytest.mark.parametrize("label", ["5", "melanom", "-1"])
def test_sample_refuses_a_label_that_is_none(toy_run, label, capsys):
    assert command("sample", toy_run, f"--label={label}") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --label {label}: no such class") and said.count("\n") == 1


# ---------------------------------------------------------------------------------------------- 13 learning
def blobs(n, seed):
    """16 pixels, gray: a bright blob at the left or at the right, on noise."""
    rng = np.random.default_rng(seed)
    labels, v, u = np.arange(n) % 2, *np.mgrid[:16, :16]
    centre = np.array([[8, 4], [8, 11]])[labels] + rng.uniform(-1.5, 1.5, (n, 2))
    blob = np.exp(-((v - centre[:, :1, None]) ** 2 + (u - centre[:, 1:, None]) ** 2) / 12)
    x = (.1 + .8 * blob + .03 * rng.normal(size=(n, 16, 16))).clip(0, 1)
    return Split((x * 255).round().astype(np.uint8)[:, None], labels, [f"{seed}-{i}" for i in range(n)])


@pytest.mark.slow
@pytest.mark.parametrize("given", [dict(channels=16, mult="1,2"), dict(backbone="dit", dim=64, depth=3)], ids=["unet", "dit"])
def test_a_tiny_network_learns_to_tell_left_from_right_and_bfloat16_votes_alike(given, tmp_path, monkeypatch):
    data = DataSet(blobs(480, 0), blobs(40, 1), blobs(80, 2), ["left", "right"], False, 1)
    monkeypatch.setattr(diffclassifier, "load_for", lambda config: data)
    monkeypatch.setattr(run.score, "__defaults__", (None, 5))
    config = configure(**given, data="toy", size=16, epochs=10, batch_size=16, augment="", votes=25, val_votes=1, baseline=False, device="cpu",
                       output=str(tmp_path / "run"))
    found = diffclassifier.train(config)
    assert found["test"]["accuracy"] > .95 and found["baselines"]["rule majority"]["accuracy"] > .95
    specific = found["method_specific"]
    assert specific["validation_by_votes"][-1]["majority"] >= specific["validation_by_votes"][0]["majority"] and specific["validation_by_stop"]["1e-3"]["same_label"] > .95
    _, nets, _, _ = run.load_model(tmp_path / "run" / "best.pt", "diffclassifier", Config, diffclassifier.build, {})
    a, b = (diffclassifier.judge(nets, dataclasses.replace(config, amp=amp), data.val, CPU)[0] for amp in ("off", "bf16"))
    clear = np.abs(a[..., 1] - a[..., 0]) > a.mean(2) / 256             # no near-tie: the classes differ by more than a rounding of bfloat16
    assert clear.mean() > .7 and (a.argmin(2) == b.argmin(2))[clear].mean() >= .99
    assert (count_votes(a).argmax(1) == count_votes(b).argmax(1)).mean() >= .99


@pytest.mark.slow
def test_trained_on_labels_that_say_nothing_of_the_image_no_rule_beats_chance(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    parts = (dataclasses.replace(part, labels=rng.permutation(part.labels)) for part in (blobs(320, 0), blobs(80, 1), blobs(200, 2)))
    data = DataSet(*parts, ["left", "right"], False, 1)
    monkeypatch.setattr(diffclassifier, "load_for", lambda config: data)
    monkeypatch.setattr(run.score, "__defaults__", (None, 5))
    found = diffclassifier.train(configure(data="toy", size=16, epochs=6, batch_size=16, augment="", votes=9, val_votes=1, channels=16, mult="1,2",
                                           baseline=False, device="cpu", output=str(tmp_path / "run")))
    rules = {"learned": found["test"]} | {k: v for k, v in found["baselines"].items() if k.startswith("rule")}
    assert len(rules) == 4 and all(abs(score["accuracy"] - .5) < .12 for score in rules.values())           # 3.4 standard errors
