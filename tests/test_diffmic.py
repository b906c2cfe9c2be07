"""diffmic.py: section 5 of papers/diffmic.md, item by item under its headings, then the networks, then tiny runs that learn.

Oracles: loops in plain Python, closed forms, a noise predictor that knows the answer, Bayes' rule. Networks are a few
channels wide, and one thread is as fast for them as two.
"""
import dataclasses
import itertools
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import diffmic
from common import metrics, run
from common.mmd import mmd_rbf
from common.schedules import linear_alpha_bar, respaced_timesteps
from data import Batches, Split, splits, toy
from data.batches import Batch
from data.images import read_images
from diffmic import Config, configure

CPU, ROOT = torch.device("cpu"), Path(diffmic.__file__).resolve().parent
AB = linear_alpha_bar()


pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def tiny(**given):
    """The paper's recipe on the toy set with networks of a few thousand weights."""
    return configure(**dict(data="toy", recipe="paper", hidden=32, steps=4, baseline=False) | given)


def networks(config, channels=3, classes=5):
    torch.manual_seed(0)
    return diffmic.build(config, dict(channels=channels, classes=list(range(classes)), multilabel=False))


def worn(net):
    """Batch norms as after training: the running statistics are not 0 and 1."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, .2), m.running_var.uniform_(.5, 2)
    return net.eval()


def images(n, size=32, channels=3):
    return torch.rand(n, channels, size, size) * 2 - 1


def batch(n, size=32, channels=3, classes=5):
    return Batch(images(n, size, channels), torch.arange(n) % classes, np.arange(n))


def priors(n, classes=5):
    return torch.randn(n, classes).softmax(1), torch.randn(n, classes).softmax(1)


def state(*nets):
    return {f"{i}.{k}": v.clone() for i, net in enumerate(nets) for k, v in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------- Schedule/forward
# beta[0], beta[-1], the values of ab and the composition of one-step chains: tests/test_schedules.py
def moments(t, y0, f, n=20_000):
    a, s = AB[t].sqrt().float(), (1 - AB[t]).sqrt().float()
    y = diffmic.q_sample(y0, f, torch.randn(n, len(y0)), a, s)
    return y.mean(0), y.var(0)


@pytest.mark.parametrize("t", [0, 59, 249, 500, 999])
def test_q_sample_has_the_mean_and_variance_of_eq_2(t):
    y0, f, a = torch.tensor([0., 1, 0, 0]), torch.tensor([.1, .4, .3, .2]), AB[t].sqrt().item()
    mean, variance = moments(t, y0, f)
    assert torch.allclose(mean, a * y0 + (1 - a) * f, atol=4 * math.sqrt((1 - AB[t]) / 20_000))
    assert torch.allclose(variance, torch.full((4,), 1 - AB[t].item()), rtol=.03 if t else .04)


def test_q_sample_without_noise_goes_from_the_label_to_the_prior_mean():
    y0, f = F.one_hot(torch.tensor([1]), 4).float(), torch.full((1, 4), .25)
    at = lambda t: diffmic.q_sample(y0, f, torch.zeros(1, 4), AB[t].sqrt().float(), (1 - AB[t]).sqrt().float())
    assert torch.allclose(at(0), y0, atol=1e-4) and torch.allclose(at(999), f, atol=.007)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_a_label_equal_to_its_prior_mean_stays_there_at_every_level(t):
    f = torch.tensor([.1, .4, .3, .2])
    y = diffmic.q_sample(f, f, torch.zeros(4), AB[t].sqrt().float(), (1 - AB[t]).sqrt().float())
    assert torch.allclose(y, f, atol=1e-6)


@pytest.mark.parametrize("mode, total", [("mean", 1), ("geometric", 1), ("sum", 2)])
def test_the_prior_mean_sums_to_one_and_eq_2_to_the_letter_to_two(mode, total):
    y_g, y_l = priors(6)
    f = diffmic.prior_mean(y_g, y_l, mode)
    y0 = F.one_hot(torch.arange(6) % 5, 5).float()
    end = diffmic.q_sample(y0, f, torch.zeros(6, 5), AB[999].sqrt().float(), (1 - AB[999]).sqrt().float())
    assert torch.allclose(f.sum(1), torch.full((6,), float(total)), atol=1e-5)
    assert torch.allclose(end.sum(1), torch.full((6,), float(total)), atol=.01)


def test_the_three_prior_means_are_those_written_out_by_hand():
    y_g, y_l = torch.tensor([[.8, .2]]), torch.tensor([[.2, .8]])
    assert torch.allclose(diffmic.prior_mean(y_g, y_l), torch.tensor([[.5, .5]]))
    y_g, y_l = torch.tensor([[.9, .1]]), torch.tensor([[.5, .5]])
    assert torch.allclose(diffmic.prior_mean(y_g, y_l, "sum"), torch.tensor([[1.4, .6]]))
    assert torch.allclose(diffmic.prior_mean(y_g, y_l, "geometric"), torch.tensor([[.75, .25]]))      # sqrt(.45) : sqrt(.05) = 3 : 1


def test_the_geometric_prior_mean_is_the_softmax_of_the_mean_logits_as_in_the_authors_code():
    g, l = torch.randn(2, 6, 5)
    assert torch.allclose(diffmic.prior_mean(g.softmax(1), l.softmax(1), "geometric"), ((g + l) / 2).softmax(1), atol=1e-6)


@pytest.mark.parametrize("B", [1, 2, 7, 32])
def test_antithetic_levels_come_in_pairs_that_sum_to_T_minus_1(B):
    t = diffmic.draw_timesteps(B, 1000, True, CPU)
    first, second = t[:B // 2 + 1], t[B // 2 + 1:]
    assert t.shape == (B,) and t.dtype == torch.int64
    assert (first[:len(second)] + second == 999).all()


@pytest.mark.parametrize("antithetic", [True, False])
def test_every_level_is_drawn_equally_often(antithetic):
    counts = torch.bincount(diffmic.draw_timesteps(40_000, 10, antithetic, CPU), minlength=10)
    assert len(counts) == 10 and (counts - 4000).abs().max() < 5 * math.sqrt(2 * 4000)


# ---------------------------------------------------------------------------------------------- Posterior: tests/test_schedules.py
# ---------------------------------------------------------------------------------------------- Sampler
class Oracle:
    """eps of somebody who knows y_0; remembers what it was asked."""

    def __init__(self, y0, f):
        self.y0, self.f, self.seen = y0, f, []

    def __call__(self, y, y_g, y_l, f, rho, t):
        self.seen.append((int(t[0]), y))
        a, s = AB[t[0]].sqrt(), (1 - AB[t[0]]).sqrt()
        return (y.double() - a * self.y0 - (1 - a) * self.f) / s


def draw(denoiser, f, noise, timesteps, sampler="ddpm"):
    """y_0 (B, C), the end of the path."""
    return diffmic.sample(denoiser, Config(sampler=sampler), (f, f, f, None), noise, timesteps)[:, -1]


def truncated(n):
    """The authors' n steps: the first n levels, although the chain starts from pure noise."""
    return torch.arange(n - 1, -1, -1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("n", [1, 2, 10, 60, 250, 1000])
def test_with_an_oracle_the_chain_ends_exactly_at_the_label(n, sampler):
    y0, f = F.one_hot(torch.arange(8) % 5, 5).float(), priors(8)[0]
    end = draw(Oracle(y0, f), f, torch.randn(8, n, 5), respaced_timesteps(1000, n), sampler)
    tolerance = 1e-6 if n > 1 else 1e-4                                  # one step alone divides by sqrt(ab_T) = .006
    assert (end - y0).abs().max() < tolerance


def chain_variance(timesteps):
    """{t: variance of y_t} of an oracle's chain, without sampling: y is linear in its noises, so its variance is the sum
    of its squared responses to a unit of each."""
    n = len(timesteps)
    unit = torch.cat([torch.zeros(1, n), torch.eye(n)])[..., None]
    oracle = Oracle(torch.ones(1), torch.full((1,), .3))
    draw(oracle, torch.full((n + 1, 1), .3), unit, timesteps)
    return {t: ((y[1:] - y[0]) ** 2).sum().item() for t, y in oracle.seen}


@pytest.mark.parametrize("n", [2, 10, 60, 250, 1000])
def test_full_and_respaced_chains_have_the_variance_of_the_forward_process_at_every_level(n):
    for t, variance in chain_variance(respaced_timesteps(1000, n)).items():
        assert variance == pytest.approx(1 - AB[t].item(), rel=2e-3)


@pytest.mark.parametrize("n", [2, 60, 1000])
def test_full_and_respaced_chains_have_the_mean_of_the_forward_process_at_every_level(n):
    oracle = Oracle(torch.ones(1), torch.full((1,), .3))
    draw(oracle, torch.full((1, 1), .3), torch.zeros(1, n, 1), respaced_timesteps(1000, n))
    for t, y in oracle.seen:
        a = AB[t].sqrt().item()
        assert y.item() == pytest.approx(a + (1 - a) * .3, abs=.0063528 * .7 + 1e-5)       # the start, f, is off by sqrt(ab_T)


def test_truncated_chains_have_a_wrong_variance_even_with_an_oracle():
    """Documents the authors' sampler: see the docstring of diffmic.py, 5."""
    variance = chain_variance(truncated(60))
    true = {t: 1 - AB[t].item() for t in (29, 59)}
    assert variance[59] == pytest.approx(1, abs=1e-5) and true[59] == pytest.approx(.0404, abs=1e-4)
    # what is too much at level 59 shrinks by g1^2 a step, and the g1 multiply up to this:
    excess = (1 - true[59]) * (true[29] / true[59]) ** 2 * (AB[59] / AB[29]).item()
    assert variance[29] == pytest.approx(true[29] + excess, rel=1e-4)
    assert variance[29] == pytest.approx(.0883, abs=1e-4) and true[29] == pytest.approx(.0116, abs=1e-4)     # 7.6 times too much


class BayesDenoiser:
    """E[eps | y_t] when the label has the probabilities p: what a perfect network would answer."""

    def __init__(self, p):
        self.p = p

    def __call__(self, y, y_g, y_l, f, rho, t):
        a, v = AB[t[0]].sqrt().float(), (1 - AB[t[0]]).float()
        centres = a * torch.eye(y.shape[1]) + (1 - a) * f[:, None]                          # (B, label, C)
        weight = (self.p.log() - ((y[:, None] - centres) ** 2).sum(2) / (2 * v)).softmax(1)
        return (y - a * weight - (1 - a) * f) / v.sqrt()


@pytest.fixture(scope="module")
def toy_accuracies():
    """Accuracy of one draw of the perfect network, and of the mean of ten, where Bayes' rule reaches about .81."""
    torch.manual_seed(0)
    n, p = 2000, torch.distributions.Dirichlet(torch.full((5,), .3)).sample((2000,)).clamp_min(1e-6)
    label = torch.multinomial(p, 1)[:, 0]
    found = {"bayes": (p.argmax(1) == label).float().mean().item()}
    chains = {"full": respaced_timesteps(1000, 1000), "respaced 60": respaced_timesteps(1000, 60), "truncated 60": truncated(60),
              "truncated 250": truncated(250)}
    for name, timesteps in chains.items():
        y0 = draw(BayesDenoiser(p), p, torch.randn(n, len(timesteps), 5), timesteps)
        found[name] = (y0.argmax(1) == label).float().mean().item()
    ten = p.repeat_interleave(10, 0)
    for name in ("respaced 60", "truncated 60"):
        y0 = draw(BayesDenoiser(ten), ten, torch.randn(10 * n, 60, 5), chains[name]).view(n, 10, 5).mean(1)
        found[f"{name}, ten draws"] = (y0.argmax(1) == label).float().mean().item()
    found["expected of a draw"] = (p ** 2).sum(1).mean().item()
    return found


def test_a_perfect_network_samples_the_label_from_its_posterior(toy_accuracies):
    a = toy_accuracies
    assert a["full"] == pytest.approx(a["expected of a draw"], abs=.035)                    # 3 standard errors
    assert a["respaced 60"] == pytest.approx(a["full"], abs=.04)


def test_respacing_beats_truncation_with_a_perfect_network(toy_accuracies):
    a = toy_accuracies
    assert a["respaced 60"] > a["truncated 60"] + .15
    assert a["respaced 60, ten draws"] > a["truncated 60, ten draws"] + .02


def test_the_mean_of_ten_draws_is_better_than_one_draw_and_nearly_bayes(toy_accuracies):
    a = toy_accuracies
    assert a["respaced 60, ten draws"] > a["respaced 60"] + .03
    assert a["bayes"] - .03 < a["respaced 60, ten draws"] <= a["bayes"] + .01


def test_respacing_over_all_levels_is_the_full_loop_written_out():
    torch.manual_seed(1)
    f, noise, W = priors(3)[0], torch.randn(3, 1000, 5), torch.randn(5, 5) / 5
    network = lambda y, y_g, y_l, f, rho, t: .5 * y @ W + .1 * torch.sin(t / 100.)[:, None]
    beta = [1e-4 + (.02 - 1e-4) * t / 999 for t in range(1000)]
    ab = np.cumprod([1 - b for b in beta])
    y = (f + noise[:, 0]).double()
    for k, t in enumerate(range(999, -1, -1)):                           # CARD's algorithm 2, with its gammas
        before, alpha = (ab[t - 1] if t else 1.), 1 - beta[t]
        eps = network(y.float(), f, f, f, None, torch.full((3,), t)).double()
        y0 = (y - (1 - ab[t] ** .5) * f - (1 - ab[t]) ** .5 * eps) / ab[t] ** .5
        g0, g1 = beta[t] * before ** .5 / (1 - ab[t]), (1 - before) * alpha ** .5 / (1 - ab[t])
        g2 = 1 + (ab[t] ** .5 - 1) * (alpha ** .5 + before ** .5) / (1 - ab[t])
        y = g0 * y0 + g1 * y + g2 * f
        if t:
            y = y + ((1 - before) / (1 - ab[t]) * beta[t]) ** .5 * noise[:, k + 1]
    assert torch.allclose(draw(network, f, noise, respaced_timesteps(1000, 1000)).double(), y, rtol=1e-3, atol=1e-3)


def test_ddim_depends_on_the_first_noise_alone_and_ddpm_on_all():
    f, noise = priors(4)[0], torch.randn(4, 10, 5)
    other = noise.clone()
    other[:, 1:] = torch.randn(4, 9, 5)
    denoiser, t = BayesDenoiser(f), respaced_timesteps(1000, 10)
    assert torch.equal(draw(denoiser, f, noise, t, "ddim"), draw(denoiser, f, other, t, "ddim"))
    assert not torch.allclose(draw(denoiser, f, noise, t), draw(denoiser, f, other, t))


def test_ten_ddim_steps_reach_the_accuracy_of_the_long_chain(toy_accuracies):
    p = torch.distributions.Dirichlet(torch.full((5,), .3)).sample((2000,)).clamp_min(1e-6)
    y0 = draw(BayesDenoiser(p), p, torch.randn(2000, 10, 5), respaced_timesteps(1000, 10), "ddim")
    accuracy = (y0.argmax(1) == torch.multinomial(p, 1)[:, 0]).float().mean().item()
    assert accuracy == pytest.approx(toy_accuracies["full"], abs=.06)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_path_goes_from_the_noise_around_the_prior_mean_to_the_label(sampler):
    f, noise, y0 = priors(4)[0], torch.randn(4, 6, 5), F.one_hot(torch.arange(4), 5).float()
    oracle, t = Oracle(y0, f), respaced_timesteps(1000, 6)
    path = diffmic.sample(oracle, Config(sampler=sampler), (f, f, f, None), noise, t)
    assert path.shape == (4, 7, 5) and torch.equal(path[:, 0], f + noise[:, 0]) and torch.allclose(path[:, -1], y0, atol=1e-6)
    assert [level for level, _ in oracle.seen] == t.tolist()             # entry i is what the denoiser saw at level t[i]
    assert all(torch.equal(path[:, i], y) for i, (_, y) in enumerate(oracle.seen))


def test_with_an_oracle_the_path_of_ddim_is_eq_2_with_the_same_noise_at_every_level():
    f, noise, y0 = priors(4)[0], torch.randn(4, 6, 5), F.one_hot(torch.arange(4), 5).float()
    t = respaced_timesteps(1000, 6)
    path = diffmic.sample(Oracle(y0, f), Config(sampler="ddim"), (f, f, f, None), noise, t).double()
    first = AB[999]
    eps = (path[:, 0] - first.sqrt() * y0 - (1 - first.sqrt()) * f) / (1 - first).sqrt()
    for i, ab in enumerate(AB[t]):
        assert torch.allclose(path[:, i], diffmic.q_sample(y0.double(), f.double(), eps, ab.sqrt(), (1 - ab).sqrt()), atol=1e-5)


@torch.no_grad()
def test_a_prediction_keeps_the_path_of_every_draw_and_what_the_denoiser_was_given():
    config = tiny(samples=3)
    nets, x, noise = worn(networks(config)), images(2), torch.randn(2, 3, 4, 5)
    out = diffmic.classify(nets, config, x, noise)
    y_g, y_l, f, rho = out.condition
    assert out.path.shape == (2, 3, 5, 5) and torch.equal(out.path[:, :, 0], f[:, None] + noise[:, :, 0])
    assert torch.equal(f, (y_g + y_l) / 2) and torch.allclose(rho, nets.encoder(x), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip((y_g, y_l), nets.guide(x).priors()))
    assert torch.allclose(out.p, (out.path[:, :, -1].mean(1) / diffmic.TEMPERATURE).softmax(1), atol=1e-6)


@pytest.mark.parametrize("samples, given", [(1, {}), (3, {}), (2, dict(prior_input="fused")), (2, dict(variant="c1"))])
@torch.no_grad()
def test_the_embedding_is_the_denoisers_last_hidden_layer_at_that_step_of_the_first_draw(samples, given):
    config, hidden = tiny(samples=samples, steps=5, **given), []
    nets = worn(networks(config))
    nets.denoiser.out.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    out = diffmic.classify(nets, config, images(3), torch.randn(3, samples, 5, 5))
    assert len(hidden) == 5
    for i in range(5):
        found, want = diffmic.embedding(nets, config, out, i), hidden[i][::samples]     # draws of an image lie side by side
        assert found.shape == (3, 32) and torch.allclose(found, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, hidden[i - 1][::samples], rtol=1e-2)


def test_the_same_seed_and_image_give_the_same_prediction_and_another_seed_another():
    config = tiny()
    nets, x = worn(networks(config)), images(3)
    predict = lambda seed: diffmic.classify(nets, config, x, run.image_noise(seed, ["a", "b", "c"], (1, 4, 5), CPU)).p
    with torch.no_grad():
        assert torch.equal(predict(0), predict(0)) and not torch.equal(predict(0), predict(1))


@pytest.mark.parametrize("mode", [True, False])
@torch.no_grad()
def test_the_sampler_leaves_batch_norms_and_mode_as_they_are(mode):
    config = tiny()
    nets = worn(networks(config)).train(mode)
    rho, (y_g, y_l) = nets.encoder(images(6)), priors(6)
    before, modes = state(nets), [m.training for m in nets.modules()]
    if mode:                                                             # the sampler sets no mode: its caller evaluates
        nets.denoiser.eval()
        modes = [m.training for m in nets.modules()]
    diffmic.sample(nets.denoiser, config, (y_g, y_l, y_g, rho), torch.randn(6, 4, 5), respaced_timesteps(1000, 4))
    assert same(state(nets), before) and [m.training for m in nets.modules()] == modes


@torch.no_grad()
@pytest.mark.parametrize("target", ["eps", "y0"])
def test_with_mirror_the_draws_look_at_the_image_and_its_mirror_images_in_turn(target):
    config = tiny(augment="hflip,vflip", mirror=True, samples=8, target=target)
    nets, x = worn(networks(config)), images(3)
    noise = torch.randn(3, 1, config.steps, 5).expand(-1, 8, -1, -1)      # all draws alike, but for what they look at
    with torch.no_grad():
        found, plain = (diffmic.classify(nets, c, x, noise) for c in (config, dataclasses.replace(config, mirror=False)))
        views = [x, x.flip(3), x.flip(2), x.flip(2, 3)]
        alone = [diffmic.classify(nets, dataclasses.replace(config, mirror=False), view, noise[:, :1]) for view in views]
        assert all(torch.allclose(diffmic.classify(nets, config, view, noise).p, found.p, atol=1e-5) for view in views)
    for s in range(8):
        assert torch.allclose(found.path[:, s], alone[s % 4].path[:, 0], atol=1e-5)
    assert not torch.allclose(found.path, plain.path, atol=1e-3) and torch.equal(found.guides[0].saliency, plain.guides[0].saliency)
    assert all(map(torch.equal, found.condition, plain.condition))        # of the image as it is: what explain shows
    assert diffmic.classify(nets, dataclasses.replace(config, samples=1), x, noise[:, :1]).path.shape[1] == 1   # one draw: no view but the first


def test_with_mirror_the_guide_and_the_plain_resnet_look_at_mirror_images_too():
    config, split = tiny(augment="hflip,rotate", mirror=True, samples=4, baseline=True), toy.make(0, 28, {"train": 1, "val": 12, "test": 1}).val
    flipped = dataclasses.replace(split, images=split.images[..., ::-1].copy())
    nets = worn(networks(config))
    plain = dataclasses.replace(config, mirror=False)
    of = lambda c, part, joint: diffmic.evaluate(nets, part, c, CPU, joint)[0]
    for joint in (False, True):
        one, other, both = of(plain, split, joint), of(plain, flipped, joint), of(config, split, joint)
        for model in ("guide", "resnet"):
            assert np.allclose(both[model], (one[model] + other[model]) / 2, atol=1e-5) and not np.allclose(one[model], other[model], atol=1e-4), (model, joint)
    for variant, model in ("dcg", "guide"), ("basic", "resnet"):
        config = dataclasses.replace(config, variant=variant)
        nets = worn(networks(config))
        found = of(config, split, True)
        assert np.allclose(found["diffmic"], found[model], atol=1e-6)


def test_classifying_changes_nothing_in_the_networks():
    config = tiny(samples=2)
    nets = worn(networks(config))
    before = state(nets)
    diffmic.classify(nets, config, images(3), torch.randn(3, 2, 4, 5))
    assert same(state(nets), before) and not any(m.training for m in nets.modules())


def counted(nets, names):
    """Calls of each network from now on."""
    calls = Counter()
    for name in names:
        getattr(nets, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("steps, samples", [(1, 1), (7, 3)])
@torch.no_grad()
def test_encoder_and_guide_run_once_a_prediction_however_many_steps_and_draws(steps, samples):
    config = tiny(steps=steps, samples=samples)
    nets = worn(networks(config))
    calls = counted(nets, ("encoder", "guide", "denoiser"))
    diffmic.classify(nets, config, images(2), torch.randn(2, samples, steps, 5))
    assert calls == {"encoder": 1, "guide": 1, "denoiser": steps}


@pytest.mark.parametrize("variant, branches", [("full", 3), ("c2", 1)])
def test_encoder_and_guide_run_once_a_training_step(variant, branches):
    config = tiny(variant=variant)
    nets = networks(config).train()
    calls = counted(nets, ("encoder", "guide", "denoiser"))
    diffmic.train_step(nets, None, config, batch(4), joint=True)
    assert calls == {"encoder": 1, "guide": 1, "denoiser": branches}


def test_the_prediction_is_the_mean_of_the_draws_and_its_uncertainty_is_theirs(monkeypatch):
    config = tiny(samples=3)
    nets = worn(networks(config, classes=3))
    draws = torch.tensor([[[1., 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 1.], [0, 0, 1], [0, 0, 1]]])
    monkeypatch.setattr(diffmic, "sample", lambda *args: draws.flatten(0, 1)[:, None])
    out = diffmic.classify(nets, config, images(2), torch.zeros(2, 3, 4, 3))
    e = torch.tensor([[math.exp(10 / 3), math.exp(5 / 3), 1], [1, 1, math.exp(5)]])      # mean draws (2/3, 1/3, 0), (0, 0, 1); over .2
    p = e / e.sum(1, keepdim=True)
    assert torch.allclose(out.p, p, atol=1e-5)
    assert torch.allclose(out.margin, 1 - (p.sort(1).values[:, 2] - p.sort(1).values[:, 1]), atol=1e-5)
    assert torch.allclose(out.entropy, torch.tensor([-sum(q * math.log(q) for q in row) / math.log(3) for row in p.tolist()]), atol=1e-5)
    assert torch.allclose(out.spread, torch.tensor([1 / 3, 0]))
    assert torch.allclose(out.p.sum(1), torch.ones(2)) and (out.p > 0).all()


@torch.no_grad()
def test_each_draw_of_an_image_uses_its_own_noise_and_its_own_priors():
    config = tiny(samples=3)
    nets, x, noise = worn(networks(config)), images(4), torch.randn(4, 3, 4, 5)
    nets.temperature.fill_(100 / diffmic.TEMPERATURE)                           # an untrained network's draws are far apart
    together = diffmic.classify(nets, config, x, noise).p
    for i in range(4):
        one = [diffmic.classify(nets, tiny(samples=1), x[i:i + 1], noise[i:i + 1, s:s + 1]).p for s in range(3)]
        assert torch.allclose(together[i], torch.cat(one).log().mean(0).softmax(0), atol=1e-4)      # softmax of the mean draw


@torch.no_grad()
def test_the_temperature_is_fitted_on_validation_and_changes_no_label():
    config = tiny(samples=3, calibrate=True)
    nets = worn(networks(config))
    split = toy.make(0, 28, {"train": 1, "val": 60, "test": 1}).val
    before, _ = diffmic.evaluate(nets, split, config, torch.device("cpu"))
    diffmic.calibrate(nets, split, config, torch.device("cpu"))
    after, _ = diffmic.evaluate(nets, split, config, torch.device("cpu"))
    once = float(nets.temperature)
    diffmic.calibrate(nets, split, config, torch.device("cpu"))                 # a resumed run does it again, from the start
    assert float(nets.temperature) == once != 1
    assert (before["diffmic"].argmax(1) == after["diffmic"].argmax(1)).all()
    assert metrics.nll(split.labels, after["diffmic"]) < metrics.nll(split.labels, before["diffmic"])
    diffmic.calibrate(nets, split, tiny(samples=3), torch.device("cpu"))        # the paper's recipe: left alone
    assert float(nets.temperature) == once


# ---------------------------------------------------------------------------------------------- Target
def levels(t):
    """sqrt(ab_t) and sqrt(1 - ab_t), (B, 1)."""
    return AB[t].sqrt().float()[:, None], (1 - AB[t]).sqrt().float()[:, None]


@pytest.mark.parametrize("target", ["eps", "y0"])
def test_noise_and_label_of_an_estimate_belong_together_by_eq_2(target):
    y, f, out, t = torch.randn(8, 5), priors(8)[0], torch.randn(8, 5), torch.tensor([0, 1, 10, 100, 300, 500, 900, 999])
    a, s = levels(t)
    eps_hat, y0_hat = diffmic.estimate(lambda *args: out, tiny(target=target), y, (f, f, f, None), t, a, s)
    assert torch.allclose(diffmic.q_sample(y0_hat, f, eps_hat, a, s), y, atol=1e-4)
    assert torch.equal(*((eps_hat, out) if target == "eps" else (y0_hat, out.softmax(1))))


def test_a_residual_denoiser_that_says_nothing_leaves_the_guides_answer_and_one_without_a_guide_is_alone():
    y, f, out, t = torch.randn(8, 5), priors(8)[0], torch.randn(8, 5), torch.tensor([0, 1, 10, 100, 300, 500, 900, 999])
    a, s = levels(t)
    of = lambda said, f, residual: diffmic.estimate(lambda *args: said, tiny(target="y0", residual=residual), y, (f, f, f, None), t, a, s)
    assert torch.allclose(of(0 * out, f, True)[1], f, atol=1e-5) and torch.allclose(of(out, f, True)[1], out.exp() * f / (out.exp() * f).sum(1, keepdim=True), atol=1e-5)
    for nothing in 0 * f, 0 * f + .2:                                   # c1; --prior-dropout
        assert all(torch.allclose(u, v, atol=1e-4) for u, v in zip(of(out, nothing, True), of(out, nothing, False)))
    eps_hat, y0_hat = of(out, f, True)
    assert torch.allclose(diffmic.q_sample(y0_hat, f, eps_hat, a, s), y, atol=1e-4)


def test_both_targets_give_the_same_estimate_when_their_denoisers_know_the_same():
    y, f, logits, t = torch.randn(6, 5), priors(6)[0], torch.randn(6, 5), torch.tensor([0, 10, 100, 300, 500, 900])
    a, s = levels(t)
    as_label = diffmic.estimate(lambda *args: logits, tiny(target="y0"), y, (f, f, f, None), t, a, s)
    as_noise = diffmic.estimate(lambda *args: as_label[0], tiny(), y, (f, f, f, None), t, a, s)
    assert all(torch.allclose(u, v, rtol=1e-4, atol=1e-4) for u, v in zip(as_label, as_noise))


def test_logits_that_name_the_label_give_the_noise_and_the_label_exactly():
    y0, f, eps, t = F.one_hot(torch.arange(5), 5).float(), priors(5)[0], torch.randn(5, 5), torch.tensor([1, 100, 300, 700, 999])
    a, s = levels(t)
    y = diffmic.q_sample(y0, f, eps, a, s)
    eps_hat, y0_hat = diffmic.estimate(lambda *args: 1e4 * y0, tiny(target="y0"), y, (f, f, f, None), t, a, s)
    assert torch.equal(y0_hat, y0) and torch.allclose(eps_hat, eps, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_with_logits_that_name_the_label_every_chain_ends_at_it(n, sampler):
    y0, f = F.one_hot(torch.arange(8) % 5, 5).float(), priors(8)[0]
    config = Config(sampler=sampler, target="y0")
    path = diffmic.sample(lambda *args: 1e4 * y0, config, (f, f, f, None), torch.randn(8, n, 5), respaced_timesteps(1000, n))
    assert torch.allclose(path[:, -1], y0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1., 2.])
def test_with_the_label_as_target_the_probabilities_are_the_mean_draw_over_a_temperature(temperature, monkeypatch):
    config = tiny(samples=2, target="y0")
    nets = worn(networks(config, classes=3))
    nets.temperature.fill_(temperature)
    draws = torch.tensor([[[.7, .2, .1], [.5, .1, .4]], [[0., 0, 1], [0, 0, 1]]])
    monkeypatch.setattr(diffmic, "sample", lambda *args: draws.flatten(0, 1)[:, None])
    out = diffmic.classify(nets, config, images(2), torch.zeros(2, 2, 4, 3))
    p = torch.tensor([[.6, .15, .25], [1e-30, 1e-30, 1]]) ** (1 / temperature)
    assert torch.allclose(out.p, p / p.sum(1, keepdim=True), atol=1e-5)


# ---------------------------------------------------------------------------------------------- MMD
# mmd(x, x) = 0, >= 0, symmetric, order of rows, shift of the mean, K(0) = 1, E K of normals, finite gradient: tests/test_mmd.py
class Fixed(nn.Module):
    """An encoder that gives no features, a denoiser that answers a known function; remembers its inputs."""

    def __init__(self, T=1000):
        super().__init__()
        self.seen, self.gain = [], nn.Parameter(torch.tensor(.5))
        self.sqrt_ab, self.sqrt_1m_ab = AB.sqrt().float(), (1 - AB).sqrt().float()

    def encoder(self, x):
        return None

    def denoiser(self, y, y_g, y_l, f, rho, t):
        self.seen.append((y.detach(), y_g, y_l, f, t))
        return self.gain * y


@pytest.fixture
def parts():
    """The loss on known networks, and everything it is made of: (losses, nets, eps, y0, y_g, y_l)."""
    def make(**given):
        torch.manual_seed(0)
        nets, y0, (y_g, y_l) = Fixed(), F.one_hot(torch.arange(6) % 5, 5).float(), priors(6)
        torch.manual_seed(7)
        losses = diffmic.loss(nets, tiny(**given), images(1).expand(6, -1, -1, -1), y0, y_g, y_l)
        y, _, _, f, t = nets.seen[0]
        a, s = AB[t].sqrt().float()[:, None], (1 - AB[t]).sqrt().float()[:, None]
        return losses, nets, (y - a * y0 - (1 - a) * f) / s, y0, y_g, y_l
    return make


def mmd_by_loops(x, y):
    x, y = x.tolist(), y.tolist()
    K = lambda p, q: math.exp(-sum((u - v) ** 2 for u, v in zip(p, q)) / len(p) ** 2)
    mean = lambda a, b: sum(K(p, q) for p in a for q in b) / (len(a) * len(b))
    return mean(x, x) - 2 * mean(x, y) + mean(y, y)


def test_the_loss_is_eq_6_written_out(parts):
    losses, nets, eps, y0, y_g, y_l = parts()
    out = [(nets.gain * y).detach() for y, *_ in nets.seen]
    mse = sum((a - b) ** 2 for a, b in zip(eps.flatten().tolist(), out[0].flatten().tolist())) / 30
    assert losses["eps"].item() == pytest.approx(mse, rel=1e-2)                             # eps is recovered by a division
    assert losses["mmd_g"].item() == pytest.approx(mmd_by_loops(eps, out[1]), abs=1e-3)
    assert losses["mmd_l"].item() == pytest.approx(mmd_by_loops(eps, out[2]), abs=1e-3)
    assert losses["diffusion"].item() == pytest.approx((losses["eps"] + .5 * (losses["mmd_g"] + losses["mmd_l"])).item(), rel=1e-6)


def test_with_the_label_as_target_cross_entropy_is_in_the_place_of_eq_4(parts):
    losses, nets, eps, y0, y_g, y_l = parts(target="y0")
    entropy, noises = 0., []
    for y, _, _, f, t in nets.seen:                                      # the three branches
        a, s = levels(t)
        noises.append(((y - a * (.5 * y).softmax(1) - (1 - a) * f) / s).detach())
    for row, label in zip((.5 * nets.seen[0][0]).tolist(), y0.argmax(1).tolist()):
        entropy -= (row[label] - math.log(sum(math.exp(v) for v in row))) / 6
    assert losses["y0"].item() == pytest.approx(entropy, rel=1e-5) and losses["eps"].item() != pytest.approx(entropy, rel=.1)
    assert losses["mmd_g"].item() == pytest.approx(mmd_by_loops(eps, noises[1]), abs=1e-3)
    assert losses["mmd_l"].item() == pytest.approx(mmd_by_loops(eps, noises[2]), abs=1e-3)
    assert losses["diffusion"].item() == pytest.approx((losses["y0"] + .5 * (losses["mmd_g"] + losses["mmd_l"])).item(), rel=1e-6)
    assert torch.autograd.grad(losses["y0"], nets.gain)[0].abs() > 1e-3


def test_the_three_branches_share_noise_and_level_and_differ_in_their_priors(parts):
    _, nets, eps, y0, y_g, y_l = parts()
    expected = [(y_g, y_l, (y_g + y_l) / 2), (y_g, y_g, y_g), (y_l, y_l, y_l)]
    for (y, g, l, f, t), (want_g, want_l, want_f) in zip(nets.seen, expected, strict=True):
        assert torch.equal(g, want_g) and torch.equal(l, want_l) and torch.allclose(f, want_f) and torch.equal(t, nets.seen[0][4])
        a, s = AB[t].sqrt().float()[:, None], (1 - AB[t]).sqrt().float()[:, None]
        assert torch.allclose(y, a * y0 + s * eps + (1 - a) * want_f, atol=1e-5)


@pytest.mark.parametrize("given", [dict(mmd_weight=0.), dict(variant="c2")])
def test_without_mmd_the_loss_is_the_mean_squared_error_and_one_branch_is_computed(parts, given):
    losses, nets, *_ = parts(**given)
    assert losses["diffusion"].item() == losses["eps"].item() and len(nets.seen) == 1 and "mmd_g" not in losses
    assert losses["eps"].item() == pytest.approx(parts()[0]["eps"].item(), rel=1e-6)


def test_the_mmd_weight_scales_the_single_prior_branches_and_nothing_else(parts):
    one, three = parts(mmd_weight=1.)[0], parts(mmd_weight=3.)[0]
    assert (three["diffusion"] - one["diffusion"]).item() == pytest.approx(2 * (one["mmd_g"] + one["mmd_l"]).item(), rel=1e-3)


def test_the_gradient_of_the_loss_is_finite_and_includes_the_mmd(parts):
    gradients = []
    for weight in (0., .5):
        losses, nets, *_ = parts(mmd_weight=weight)
        gradients += torch.autograd.grad(losses["diffusion"], nets.gain)
    assert all(g.isfinite() for g in gradients) and gradients[0] != gradients[1]


def test_the_error_by_tenths_of_t_adds_up_to_the_whole_error(parts):
    losses, nets, *_ = parts()
    total, count = losses["eps_by_t"]
    assert count.sum() == 6 and total.sum().item() / 6 == pytest.approx(losses["eps"].item(), rel=1e-5)
    assert torch.equal(count, torch.bincount(nets.seen[0][4] // 100, minlength=10).float())


def test_the_mmd_of_a_batch_does_not_notice_that_predictions_were_exchanged():
    eps = torch.randn(32, 5)                                             # why eq. 4 is needed beside eq. 5
    other = eps.roll(1, 0)
    assert mmd_rbf(eps, other, 5).item() == pytest.approx(0, abs=1e-6) and F.mse_loss(eps, other) > 1


# ---------------------------------------------------------------------------------------------- DCG
def guide_of(size=32, channels=3, classes=5, **given):
    return worn(networks(tiny(size=size, variant="dcg", **given), channels, classes).guide)


@torch.no_grad()
def test_the_saliency_map_of_224_pixels_has_7_by_7_cells_a_class():
    out = guide_of(224, classes=7)(images(2, 224))
    assert out.saliency.shape == (2, 7, 7, 7) and out.logits_g.shape == out.logits_l.shape == (2, 7)
    assert out.corners.shape == (2, 6, 2) and out.attention.shape == (2, 6)


@torch.no_grad()
def test_the_global_prior_is_the_mean_of_the_map_and_a_linear_layer_on_pooled_features():
    guide, x = guide_of(), images(3)
    out = guide(x)
    by_hand = guide.global_net.features(x).mean((2, 3)) @ guide.to_saliency.weight[:, :, 0, 0].T
    assert torch.allclose(out.logits_g, out.saliency.mean((2, 3))) and torch.allclose(out.logits_g, by_hand, atol=1e-4)


@torch.no_grad()
def test_the_local_prior_is_gated_attention_written_out():
    guide, x = guide_of(), images(3)
    out = guide(x)
    V, U, w, W = (layer.weight for layer in (guide.attention_v, guide.attention_u, guide.attention_w, guide.to_local))
    for i in range(3):
        h = [guide.local_net.features(x[i:i + 1, :, r:r + 5, c:c + 5]).mean((0, 2, 3)) for r, c in out.corners[i].tolist()]
        score = [(w @ (torch.tanh(V @ k) * torch.sigmoid(U @ k))).item() for k in h]
        weight = [math.exp(s) / sum(math.exp(q) for q in score) for s in score]
        assert out.attention[i].tolist() == pytest.approx(weight, abs=1e-5)
        assert torch.allclose(out.logits_l[i], W @ sum(a * k for a, k in zip(weight, h)), atol=1e-4)


@torch.no_grad()
def test_attention_weights_sum_to_one_and_are_equal_for_identical_crops():
    guide = guide_of()
    assert torch.allclose(guide(images(3)).attention.sum(1), torch.ones(3))
    assert torch.allclose(guide(torch.full((2, 3, 32, 32), .3)).attention, torch.full((2, 6), 1 / 6))


@torch.no_grad()
def test_the_local_prior_does_not_depend_on_the_order_of_the_crops(monkeypatch):
    guide, x, order = guide_of(), images(3), torch.tensor([3, 0, 5, 1, 4, 2])
    before, find = guide(x), diffmic.find_rois
    monkeypatch.setattr(diffmic, "find_rois", lambda *args: find(*args)[:, order])
    after = guide(x)
    assert torch.equal(after.corners, before.corners[:, order]) and torch.allclose(after.attention, before.attention[:, order], atol=1e-6)
    assert torch.allclose(after.logits_l, before.logits_l, atol=1e-5) and before.attention.std() > 0


def test_fusion_is_the_mean_of_the_logits_and_the_guide_learns_from_it_alone():
    g, l, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True), torch.arange(4)
    guide = diffmic.Guide(g, l, None, None, None)
    p = ((g + l) / 2).softmax(1)
    assert torch.allclose(guide.fused(), p)
    assert diffmic.guide_loss(tiny(), guide, y).item() == pytest.approx(-p[range(4), y].log().mean().item(), rel=1e-5)
    both = -sum(z.softmax(1)[range(4), y].log().mean() for z in (g, l))
    assert diffmic.guide_loss(tiny(deep_supervision=True), guide, y).item() == pytest.approx((both - p[range(4), y].log().mean()).item(), rel=1e-5)


def test_the_accuracy_of_the_guide_in_training_is_its_share_of_right_answers_and_is_not_differentiated():
    config, part = tiny(variant="dcg"), batch(20)
    nets = networks(config).eval()
    right = [row.index(max(row)) == label for row, label in zip(nets.guide(part.x).fused().tolist(), part.y.tolist())]
    assert 0 < sum(right) < 20
    losses = diffmic.train_step(nets, None, config, part, joint=True)
    assert losses["guide_accuracy"].item() == pytest.approx(sum(right) / 20) and not losses["guide_accuracy"].requires_grad
    assert losses["loss"].item() == losses["guide"].item()


@pytest.mark.parametrize("deep", [False, True])
def test_label_smoothing_reaches_every_cross_entropy_of_the_guide(deep):
    g, l, y, share = torch.randn(4, 5), torch.randn(4, 5), torch.arange(4), .1
    config = tiny(deep_supervision=deep, label_smoothing=share)
    want = 0.
    for z in [(g + l) / 2] + [g, l] * deep:
        for row, label in zip(z.softmax(1).tolist(), y.tolist()):
            want -= ((1 - share) * math.log(row[label]) + share / 5 * sum(map(math.log, row))) / 4
    assert diffmic.guide_loss(config, diffmic.Guide(g, l, None, None, None), y).item() == pytest.approx(want, rel=1e-5)
    nets = networks(config)
    part = batch(4)
    assert diffmic.train_step(nets, None, config, part, joint=False)["guide"].item() == \
        pytest.approx(diffmic.guide_loss(config, nets.guide(part.x), part.y).item(), rel=1e-5)


# ------------------------------------------------------------------- DCG: regions
def rois_by_loops(saliency, image_size, size, count):
    """Greedy search, one image, window by window. Only for as many regions as find a free window."""
    C, h, w = saliency.shape
    (H, W), heat = image_size, [[0.] * w for _ in range(h)]
    for channel in saliency.tolist():
        low, high = min(map(min, channel)), max(map(max, channel))
        for r, c in itertools.product(range(h), range(w)):
            heat[r][c] += (channel[r][c] - low) / (high - low)
    kh, kw, taken, corners = max(1, round(size * h / H)), max(1, round(size * w / W)), set(), []
    while len(corners) < count:
        best = None
        for r, c in itertools.product(range(h - kh + 1), range(w - kw + 1)):
            cells = set(itertools.product(range(r, r + kh), range(c, c + kw)))
            value = sum(heat[i][j] for i, j in cells) / (kh * kw)
            if not cells & taken and (best is None or value > best[0]):
                best = value, r, c, cells
        if best is None:
            return corners, False
        _, r, c, cells = best
        taken |= cells
        middle = (r + kh / 2) * H / h, (c + kw / 2) * W / w
        corners.append([min(max(m - size / 2, 0), side - size) for m, side in zip(middle, (H, W))])
    return corners, True


@pytest.mark.parametrize("image, grid, size, count", [
    ((224, 224), (7, 7), 32, 6), ((448, 448), (14, 14), 64, 6), ((224, 224), (7, 7), 64, 3), ((256, 256), (8, 8), 37, 6),
    ((200, 200), (7, 7), 29, 6), ((192, 320), (6, 10), 64, 4), ((64, 64), (8, 8), 9, 6), ((64, 64), (8, 8), 16, 5), ((32, 32), (4, 4), 5, 6),
    ((28, 28), (4, 4), 4, 6), ((448, 448), (14, 14), 96, 6), ((448, 224), (14, 7), 64, 4)])
def test_regions_are_those_of_a_slow_greedy_loop(image, grid, size, count):
    saliency = torch.randn(20, 3, *grid)
    boxes, complete = diffmic.find_rois(saliency, image, size, count), 0
    for maps, found in zip(saliency, boxes.tolist()):
        expected, enough = rois_by_loops(maps, image, size, count)
        complete += enough
        for box, want in zip(found, expected):
            assert box == pytest.approx(want, abs=.5001)                 # whole pixels
    assert complete >= 15                                                # or the case would test little


def test_at_224_pixels_regions_are_the_six_largest_cells():
    saliency = torch.randn(30, 7, 7, 7)
    low, high = saliency.amin((2, 3), keepdim=True), saliency.amax((2, 3), keepdim=True)
    cells = ((saliency - low) / (high - low)).sum(1).flatten(1).topk(6).indices
    expected = torch.stack([cells // 7 * 32, cells % 7 * 32], 2)
    assert torch.equal(diffmic.find_rois(saliency, (224, 224), 32, 6), expected)


@pytest.mark.parametrize("image, grid", [((224, 224), (7, 7)), ((200, 200), (7, 7)), ((256, 256), (8, 8)), ((448, 448), (14, 14)),
                                         ((224, 320), (7, 10)), ((300, 200), (10, 7)), ((28, 28), (4, 4)), ((32, 32), (4, 4)), ((64, 64), (8, 8))])
@pytest.mark.parametrize("kind", ["random", "constant", "one cell", "border"])
def test_every_region_lies_inside_the_image_and_none_is_found_twice(image, grid, kind):
    saliency = {"random": torch.randn, "constant": torch.ones}.get(kind, torch.zeros)(5, 3, *grid)
    if kind == "one cell":
        saliency[..., 2, 3] = 1
    elif kind == "border":
        saliency[..., -1, :], saliency[..., :, 0] = 1, 1
    size = round(image[0] / 7)
    boxes = diffmic.find_rois(saliency, image, size, 6)
    assert boxes.shape == (5, 6, 2) and boxes.dtype == torch.int64
    assert (boxes >= 0).all() and (boxes + size <= torch.tensor(image)).all()
    assert all(len({tuple(b) for b in one}) == 6 for one in boxes.tolist())


def overlaps(boxes, size):
    return sum(all(abs(a - b) < size for a, b in zip(p, q)) for p, q in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("image, grid, size, count", [((224, 224), (7, 7), 32, 6), ((448, 448), (14, 14), 64, 6), ((64, 64), (8, 8), 8, 6),
                                                      ((32, 32), (4, 4), 8, 6), ((224, 320), (7, 10), 32, 9)])
def test_regions_do_not_overlap_where_the_window_is_as_large_as_the_crop(image, grid, size, count):
    for boxes in diffmic.find_rois(torch.randn(20, 3, *grid), image, size, count).tolist():
        assert overlaps(boxes, size) == 0


def test_once_no_free_window_is_left_regions_overlap_but_none_comes_twice():
    boxes = diffmic.find_rois(torch.randn(20, 3, 4, 4), (128, 128), 64, 9)                  # 9 windows of 2 x 2, at most 4 are disjoint
    for found in boxes.tolist():
        assert len({tuple(b) for b in found}) == 9 and overlaps(found, 64) > 0
        first = next(n for n in range(2, 10) if overlaps(found[:n], 64))
        free = [c for c in itertools.product((0, 32, 64), repeat=2) if not any(overlaps([c, b], 64) for b in found[:first - 1])]
        assert not free                                                  # it overlapped only when it had to


@pytest.mark.parametrize("count, windows", [(6, 4), (100, 4), (3, 3)])
def test_there_are_never_more_regions_than_windows(count, windows):
    assert diffmic.find_rois(torch.randn(2, 3, 2, 2), (64, 64), 32, count).shape == (2, windows, 2)


@pytest.mark.parametrize("image, grid", [((224, 224), (7, 7)), ((200, 200), (7, 7)), ((256, 256), (8, 8)), ((28, 28), (4, 4))])
def test_the_first_region_holds_the_most_salient_cell(image, grid):
    saliency = torch.randn(30, 4, *grid)
    low, high = saliency.amin((2, 3), keepdim=True), saliency.amax((2, 3), keepdim=True)
    best = ((saliency - low) / (high - low)).sum(1).flatten(1).argmax(1)
    size = round(image[0] / 7)
    for (r, c), cell in zip(diffmic.find_rois(saliency, image, size, 6)[:, 0].tolist(), best.tolist()):
        y, x = (cell // grid[1] + .5) * image[0] / grid[0], (cell % grid[1] + .5) * image[1] / grid[1]
        assert r <= y <= r + size and c <= x <= c + size


def weighted_heat(saliency, weight):
    """(B, h, w) by loops: every class's map scaled to 0..1, times its weight, added."""
    heat = torch.zeros(len(saliency), *saliency.shape[2:])
    for b, k in itertools.product(range(len(saliency)), range(saliency.shape[1])):
        low, high = saliency[b, k].min(), saliency[b, k].max()
        heat[b] += weight[b, k] * (saliency[b, k] - low) / (high - low)
    return heat


def test_the_first_weighted_region_holds_the_largest_cell_of_the_weighted_map():
    saliency, weight = torch.randn(30, 5, 7, 7), torch.randn(30, 5).mul(2).softmax(1)
    best = weighted_heat(saliency, weight).flatten(1).argmax(1)
    first = diffmic.find_rois(saliency, (224, 224), 32, 6, weight)[:, 0]
    assert torch.equal(first, torch.stack([best // 7 * 32, best % 7 * 32], 1))
    assert not torch.equal(first, diffmic.find_rois(saliency, (224, 224), 32, 6)[:, 0])


def test_equal_weights_change_no_region_and_a_sure_guide_looks_at_one_map_alone():
    saliency = torch.randn(20, 5, 7, 7)
    find = lambda maps, weight: diffmic.find_rois(maps, (224, 224), 32, 6, weight)
    assert torch.equal(find(saliency, torch.full((20, 5), .2)), find(saliency, None))
    assert torch.equal(find(saliency, F.one_hot(torch.full((20,), 3), 5).float()), find(saliency[:, 3:4], None))


@pytest.mark.parametrize("roi_weight", ["uniform", "probability"])
@torch.no_grad()
def test_the_guide_weighs_the_maps_by_its_global_prior_where_asked(roi_weight, monkeypatch):
    guide, x, seen, find = guide_of(roi_weight=roi_weight), images(3), [], diffmic.find_rois
    guide.to_saliency.weight.mul_(20)                                    # an untrained guide is nearly undecided
    monkeypatch.setattr(diffmic, "find_rois", lambda *args: seen.append(args) or find(*args))
    out = guide(x)
    assert torch.equal(out.corners, find(*seen[0])) and len(seen) == 1
    if roi_weight == "uniform":
        assert torch.equal(out.corners, find(out.saliency, (32, 32), 5, 6))
    else:
        y_g, _ = out.priors()
        assert torch.allclose(seen[0][4], y_g) and y_g.max() - y_g.min() > .3
        assert torch.equal(out.corners, find(out.saliency, (32, 32), 5, 6, y_g)) and not torch.equal(out.corners, find(out.saliency, (32, 32), 5, 6))


def test_a_planted_bright_cell_is_cut_out_in_all_channels():
    r, c, x, saliency = 4, 2, images(3, 224), torch.randn(3, 5, 7, 7)
    saliency[:, :, r, c] = 50.
    boxes = diffmic.find_rois(saliency, (224, 224), 32, 6)
    crops = diffmic.crop(x, boxes, 32)
    assert crops.shape == (3, 6, 3, 32, 32)
    assert torch.equal(crops[:, 0], x[..., 32 * r:32 * r + 32, 32 * c:32 * c + 32])
    for i, k in itertools.product(range(3), range(6)):
        row, column = boxes[i, k].tolist()
        assert torch.equal(crops[i, k], x[i, :, row:row + 32, column:column + 32])


@pytest.mark.parametrize("weighted", [False, True])
def test_regions_are_found_and_cut_without_reading_a_value(weighted):
    """On the meta device there are no values: whatever would wait for a GPU, or ask one, fails here."""
    saliency, x = torch.randn(2, 5, 7, 7, device="meta"), torch.randn(2, 3, 224, 224, device="meta")
    with pytest.raises(RuntimeError):
        saliency.max().item()                                            # so would this
    boxes = diffmic.find_rois(saliency, (224, 224), 32, 6, torch.rand(2, 5, device="meta") if weighted else None)
    assert boxes.shape == (2, 6, 2) and boxes.dtype == torch.int64 and boxes.is_meta
    assert diffmic.crop(x, boxes, 32).shape == (2, 6, 3, 32, 32)


@pytest.mark.parametrize("given", [dict(), dict(roi_weight="probability"), dict(target="y0", sampler="ddim"), dict(variant="c1")])
@torch.no_grad()
def test_a_whole_prediction_reads_no_value_on_the_way(given):
    config = tiny(samples=2, **given)
    nets = networks(config).eval().to("meta")
    out = diffmic.classify(nets, config, images(3).to("meta"), torch.randn(3, 2, 4, 5, device="meta"))
    assert out.p.is_meta and out.p.shape == (3, 5) and out.path.shape == (3, 2, 5, 5)


@pytest.mark.parametrize("given", [dict(), dict(end_to_end=True, prior_dropout=.5), dict(target="y0", antithetic=False)])
def test_a_whole_training_step_reads_no_value_on_the_way(given):
    config = tiny(baseline=True, **given)
    nets = networks(config).train().to("meta")
    losses = diffmic.train_step(nets, None, config, Batch(images(4).to("meta"), torch.zeros(4, dtype=torch.long, device="meta"), np.arange(4)), True)
    losses["loss"].backward()
    assert losses["loss"].is_meta and all(p.grad is not None for p in nets.denoiser.out.parameters())


def test_regions_do_not_change_when_a_class_map_is_scaled_and_shifted():
    saliency = torch.randn(20, 5, 7, 7, dtype=torch.float64)
    scale, shift = torch.rand(20, 5, 1, 1) * 9 + .1, torch.randn(20, 5, 1, 1) * 5
    find = lambda maps: diffmic.find_rois(maps, (224, 224), 32, 6)
    assert torch.equal(find(saliency * scale + shift), find(saliency)) and not torch.equal(find(-saliency), find(saliency))


@torch.no_grad()
def test_an_image_without_any_structure_gives_finite_priors():
    out = guide_of()(torch.zeros(2, 3, 32, 32))
    assert all(v.isfinite().all() for v in (out.logits_g, out.logits_l, out.saliency, out.attention))
    assert len({tuple(b) for b in out.corners[0].tolist()}) == 6


def test_the_local_prior_has_no_gradient_to_the_saliency_map():
    guide = guide_of()
    out = guide(images(2))
    assert torch.autograd.grad(out.logits_l.sum(), out.saliency, allow_unused=True, retain_graph=True) == (None,)
    out.logits_l.square().sum().backward()
    assert all(p.grad is None for net in (guide.global_net, guide.to_saliency) for p in net.parameters())
    assert all(p.grad is not None and p.grad.any() for p in guide.local_net.parameters())


# ---------------------------------------------------------------------------------------------- Denoiser
@pytest.mark.parametrize("prior_input, features", [("both", 15), ("fused", 10)])
def test_the_denoiser_takes_three_vectors_or_two_with_fused_priors(prior_input, features):
    nets = worn(networks(tiny(prior_input=prior_input)))
    assert nets.denoiser.lin1.linear.in_features == features
    y, (y_g, y_l), rho, t = torch.randn(4, 5), priors(4), torch.randn(4, 32), torch.arange(4)
    moved = lambda d: nets.denoiser(y, y_g + d, y_l - d, (y_g + y_l) / 2, rho, t)
    assert torch.equal(moved(0), moved(.1)) == (prior_input == "fused")                     # the mean of both is the same


@torch.no_grad()
def test_the_denoiser_is_eq_3_written_out():
    net = worn(networks(tiny()).denoiser)
    y, (y_g, y_l), rho, t = torch.randn(4, 5), priors(4), torch.randn(4, 32), torch.tensor([0, 7, 500, 999])
    h = torch.cat([y, y_g, y_l], 1)
    for lin, norm in ((net.lin1, net.norm1), (net.lin2, net.norm2), (net.lin3, net.norm3)):
        h = (h @ lin.linear.weight.T + lin.linear.bias) * lin.embed.weight[t]
        h = (h - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        h = torch.log1p(h.exp()) * (rho if lin is net.lin1 else 1)
    expected = h @ net.out.weight.T + net.out.bias
    assert torch.allclose(net(y, y_g, y_l, None, rho, t), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("what", ["y", "y_g", "y_l", "rho", "t"])
def test_each_input_changes_the_output(what):
    net = worn(networks(tiny()).denoiser)
    given = dict(y=torch.randn(4, 5), y_g=priors(4)[0], y_l=priors(4)[1], f=None, rho=torch.randn(4, 32), t=torch.arange(4))
    changed = given | {what: given[what] + 1}
    assert not torch.allclose(net(*given.values()), net(*changed.values()), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_embedding_computed_once_gives_the_outputs_of_one_computed_at_every_step(sampler):
    nets, x, (y_g, y_l), noise = worn(networks(tiny())), images(4), priors(4), torch.randn(4, 6, 5)
    at_every_step = lambda y, y_g, y_l, f, rho, t: nets.denoiser(y, y_g, y_l, f, nets.encoder(x), t)
    rho, f, args = nets.encoder(x), (y_g + y_l) / 2, (noise, respaced_timesteps(1000, 6))
    once = diffmic.sample(nets.denoiser, tiny(sampler=sampler), (y_g, y_l, f, rho), *args)
    every = diffmic.sample(at_every_step, tiny(sampler=sampler), (y_g, y_l, f, None), *args)
    assert torch.allclose(once, every, rtol=0, atol=1e-6 * max(1, every.abs().max().item()))


def test_a_diffusion_step_leaves_the_guide_as_it_was():
    config = tiny()
    nets = networks(config).train()
    guide, rest = state(nets.guide), state(nets.encoder, nets.denoiser)
    optimizer = torch.optim.Adam(nets.parameters(), 1e-3)
    diffmic.loss(nets, config, images(6), F.one_hot(torch.arange(6) % 5, 5).float(), *priors(6))["diffusion"].backward()
    optimizer.step()
    assert same(state(nets.guide), guide) and not same(state(nets.encoder, nets.denoiser), rest)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_diffusion_loss_trains_the_guide_only_end_to_end(end_to_end):
    config = tiny(end_to_end=end_to_end)
    nets = networks(config).train()
    optimizer = torch.optim.Adam(nets.parameters(), 1e-3)
    losses = diffmic.train_step(nets, None, config, batch(6), joint=True)
    guide = {k: p.detach().clone() for k, p in nets.guide.named_parameters()}
    losses["diffusion"].backward()
    optimizer.step()
    changed = [k for k, p in nets.guide.named_parameters() if not torch.equal(p, guide[k])]
    if end_to_end:                                                       # both streams
        assert any(k.startswith("global_net") for k in changed) and any(k.startswith("local_net") for k in changed)
    else:
        assert changed == []


@pytest.fixture
def given_priors(monkeypatch):
    """y_g and y_l (B, C) as the diffusion loss gets them in one training step."""
    def ask(nets, ema, config, part):
        seen, real = [], diffmic.loss
        monkeypatch.setattr(diffmic, "loss", lambda *args: seen.append(args[-2:]) or real(*args))
        losses = diffmic.train_step(nets, ema, config, part, joint=True)
        monkeypatch.setattr(diffmic, "loss", real)
        return *seen[0], losses
    return ask


def test_prior_dropout_gives_the_diffusion_no_opinion_for_its_share_of_the_images(given_priors):
    nets, part, shares = networks(tiny()).eval(), batch(60, 28), {}
    with torch.no_grad():
        nets.guide.to_saliency.weight.mul_(20)                           # an opinion is not 1 / C
        y = nets.guide(part.x).priors()
    for share in (0., .5, 1.):
        y_g, y_l, _ = given_priors(nets, None, tiny(prior_dropout=share), part)
        kept = torch.tensor([torch.allclose(a, b, atol=1e-5) for a, b in zip(y_g, y[0])])
        assert (y_g[~kept] == 1 / 5).all() and (y_l[~kept] == 1 / 5).all() and torch.allclose(y_l[kept], y[1][kept], atol=1e-5)
        shares[share] = 1 - kept.float().mean().item()
    assert shares[0.] == 0 and shares[1.] == 1 and abs(shares[.5] - .5) < .26       # 4 standard errors


def test_dropped_priors_carry_no_gradient_to_the_guide(given_priors):
    config = tiny(prior_dropout=1., end_to_end=True)
    nets = networks(config).train()
    *_, losses = given_priors(nets, None, config, batch(6))
    losses["diffusion"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in nets.guide.parameters())


@pytest.mark.parametrize("source", ["guide", "ema"])
@pytest.mark.parametrize("end_to_end", [False, True])
def test_priors_of_the_moving_average_come_from_it_in_evaluation_mode_and_without_gradient(source, end_to_end, given_priors):
    config, part, calls = tiny(prior_source=source, end_to_end=end_to_end), batch(6), []
    nets = networks(config).train()
    ema = run.State("diffmic", config, {}, worn(networks(config)), None).ema
    with torch.no_grad():
        for p in ema.guide.parameters():
            p.mul_(1.1)                                                  # weights of its own
    for name, guide in (("guide", nets.guide), ("ema", ema.guide)):
        guide.register_forward_hook(lambda module, *_, name=name: calls.append((name, module.training)))
    before = state(ema)
    y_g, y_l, losses = given_priors(nets, ema, config, part)
    assert sorted(calls) == ([("guide", True)] if source == "guide" else [("ema", False), ("guide", True)]) and same(state(ema), before)
    assert y_g.requires_grad == y_l.requires_grad == (end_to_end and source == "guide")
    losses["loss"].backward()
    assert all(p.grad is None for p in ema.parameters()) and all(p.grad is not None for p in nets.guide.parameters())
    with torch.no_grad():
        want = ema.guide(part.x).priors()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip((y_g, y_l), want)) == (source == "ema")


def test_the_warm_up_trains_the_guide_and_the_control_and_leaves_the_diffusion_alone():
    config = tiny(baseline=True)
    nets = networks(config).train()
    losses = diffmic.train_step(nets, None, config, batch(6), joint=False)
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx((losses["guide"] + losses["resnet"]).item(), rel=1e-6)
    assert all(p.grad is None for net in (nets.encoder, nets.denoiser) for p in net.parameters())
    assert all(p.grad is not None for net in (nets.guide.global_net, nets.resnet) for p in net.parameters())


def parameters(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def test_the_authors_arrangement_has_their_108_436_037_parameters():
    config = Config(timesteps=1001, prior_input="fused")                 # they never use the last of 1001 embeddings
    with torch.device("meta"):
        encoder, denoiser = diffmic.ImageEncoder(config, 3), diffmic.Denoiser(config, 5)
    assert parameters(encoder, denoiser) == 108_436_037


@pytest.mark.parametrize("classes", [4, 5, 7])
def test_the_papers_networks_have_the_sizes_computed_by_hand(classes):
    config, F_ = Config(), 6144
    with torch.device("meta"):
        guide, encoder, denoiser = diffmic.DCG(config, 3, classes), diffmic.ImageEncoder(config, 3), diffmic.Denoiser(config, classes)
    resnet18, resnet50 = 11_689_512 - 513 * 1000, 25_557_032 - 2049 * 1000                 # torchvision's, without the last layer
    assert parameters(guide) == 2 * resnet50 + 2 * 2048 * classes + 2 * 2048 * 128 + 128   # 47,560,960 at 5 classes
    assert parameters(encoder) == resnet18 + 513 * F_ + 2 * F_
    assert parameters(denoiser) == (3 * classes + 1) * F_ + 2 * (F_ + 1) * F_ + 3 * (1000 + 2) * F_ + (F_ + 1) * classes


# ---------------------------------------------------------------------------------------------- Training/eval
PAPER = dict(size=224, batch_size=32, epochs=1000, pretrain_epochs=10, lr=1e-3, guide_lr=2e-4, warmup=.04, clip=1., ema=.9999, width=64,
             guide_depth=50, hidden=6144, rois=6, mmd_weight=.5, timesteps=1000, antithetic=True, prior_mean="mean", prior_input="both",
             variant="full", sampler="ddpm", samples=1, guide_schedule="constant", deep_supervision=False, end_to_end=False, steps=250,
             roi_weight="uniform", label_smoothing=0., prior_source="guide", prior_dropout=0., target="eps")


@pytest.mark.parametrize("field", PAPER)
def test_scale_paper_has_the_numbers_of_the_paper(field):
    assert getattr(configure(data="ham10000", scale="paper"), field) == PAPER[field]


@pytest.mark.parametrize("data, steps", [("ham10000", 250), ("aptos2019", 60), ("pmg2000", 100)])
def test_each_data_set_has_the_papers_number_of_reverse_steps(data, steps):
    assert configure(data=data).steps == steps


@pytest.mark.parametrize("data", ["toy", "ham10000", "folder"])
def test_scale_small_builds_networks_of_a_few_million_weights(data):
    config = configure(data=data, scale="small")
    assert config.recipe == "plus" and config.samples > 1
    assert 5e5 < parameters(networks(config)) < 3e6


@pytest.mark.parametrize("field", Config.__dataclass_fields__)
def test_every_setting_is_read_somewhere(field):
    source = "".join(p.read_text() for p in (ROOT / "diffmic.py", ROOT / "common" / "run.py", *(ROOT / "data").glob("*.py")))
    assert re.search(rf"\bconfig\.{field}\b", source)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_on_a_cosine_to_zero():
    config = Config(epochs=100, pretrain_epochs=10, warmup=.04)
    group = lambda name, peak: dict(name=name, peak=peak)
    diffusion = [diffmic.learning_rate(config, group("diffusion", 1e-3), e) for e in np.arange(10, 110, .25)]
    top = int(np.argmax(diffusion))
    assert 0 < diffusion[0] < 5e-5 and 10 <= top <= 20                   # 4 % of 100 epochs, in quarters
    assert diffusion[top] == pytest.approx(1e-3, rel=.01) and diffusion[-1] < 1e-6
    assert (np.diff(diffusion[:top]) > 0).all() and (np.diff(diffusion[top:]) < 0).all()
    half = 10 + 50
    assert diffmic.learning_rate(config, group("diffusion", 1e-3), half) == pytest.approx(5e-4, rel=.02)
    assert {diffmic.learning_rate(config, group("guide", 2e-4), e) for e in range(110)} == {2e-4}
    plus = dataclasses.replace(config, guide_schedule="cosine")
    assert diffmic.learning_rate(plus, group("guide", 2e-4), 109.9) < 1e-7


def test_the_three_groups_of_the_optimizer_hold_every_weight_once_with_the_papers_rates():
    config = dataclasses.replace(Config(), width=8, hidden=16, guide_depth=18)
    nets = networks(config)
    groups = {g["name"]: g for g in diffmic.parameter_groups(nets, config)}
    assert {k: (g["lr"], g["clip"]) for k, g in groups.items()} == {"resnet": (1e-3, 1.), "guide": (2e-4, 0.), "diffusion": (1e-3, 1.)}
    assert sorted(id(p) for g in groups.values() for p in g["params"]) == sorted(id(p) for p in nets.parameters())


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_colour_at_every_size_train_and_predict(channels, size, classes):
    config = tiny(size=size, hidden=16, steps=2, samples=2, baseline=True)
    nets = networks(config, channels, classes).train()
    optimizer = torch.optim.Adam(diffmic.parameter_groups(nets, config))
    for _ in range(2):
        losses = diffmic.train_step(nets, None, config, batch(4, size, channels, classes), joint=True)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        assert all(v.isfinite().all() for k, v in losses.items() if k != "eps_by_t")
    with torch.no_grad():
        out = diffmic.classify(nets.eval(), config, images(3, size, channels), torch.randn(3, 2, 2, classes))
    assert out.p.shape == out.guides[0].fused().shape == (3, classes) and torch.allclose(out.p.sum(1), torch.ones(3))


HAS = {"full": ("guide", "encoder", "denoiser"), "c2": ("guide", "encoder", "denoiser"), "c1": ("encoder", "denoiser"),
       "basic": ("resnet",), "dcg": ("guide",)}
LOSSES = {"full": {"guide", "guide_accuracy", "eps", "mmd_g", "mmd_l", "diffusion"}, "c2": {"guide", "guide_accuracy", "eps", "diffusion"},
          "c1": {"eps", "diffusion"}, "basic": {"resnet"}, "dcg": {"guide", "guide_accuracy"}}


@pytest.mark.parametrize("variant", HAS)
def test_each_ablation_trains_through_the_guides_warm_up(variant):
    """Without a guide there is none: the diffusion trains from the first step."""
    nets = networks(tiny(variant=variant, baseline=False)).train()
    diffmic.train_step(nets, None, tiny(variant=variant), batch(6), joint=False)["loss"].backward()
    assert any(p.grad is not None for p in nets.parameters())


@pytest.mark.parametrize("variant", HAS)
def test_each_ablation_of_table_2_builds_steps_and_classifies(variant):
    config = tiny(variant=variant)
    nets = networks(config).train()
    assert {k for k in ("resnet", "guide", "encoder", "denoiser") if getattr(nets, k) is not None} == set(HAS[variant])
    before, optimizer = state(nets), torch.optim.Adam(diffmic.parameter_groups(nets, config))
    losses = diffmic.train_step(nets, None, config, batch(6), joint=True)
    losses["loss"].backward()
    optimizer.step()
    assert losses.keys() - {"eps_by_t", "loss"} == LOSSES[variant] and not same(state(nets), before)
    with torch.no_grad():
        out = diffmic.classify(nets.eval(), config, images(3), torch.randn(3, 1, 4, 5))
        assert torch.allclose(out.p.sum(1), torch.ones(3)) and all(v.shape == (3,) for v in out[1:4])


@torch.no_grad()
def test_the_two_controls_answer_with_the_guide_alone_and_with_the_plain_resnet_alone():
    x, noise = images(3), torch.randn(3, 1, 4, 5)
    nets = worn(networks(tiny(variant="dcg")))
    assert torch.allclose(diffmic.classify(nets, tiny(variant="dcg"), x, noise).p, nets.guide(x).fused())
    nets = worn(networks(tiny(variant="basic")))
    assert torch.allclose(diffmic.classify(nets, tiny(variant="basic"), x, noise).p, nets.resnet(x).softmax(1))


@torch.no_grad()
def test_without_a_guide_the_prior_is_nothing(monkeypatch):
    config, seen = tiny(variant="c1"), []
    nets = worn(networks(config))
    nets.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args))
    diffmic.classify(nets, config, images(2), torch.randn(2, 1, 4, 5))
    assert len(seen) == 4 and not any(prior.any() for args in seen for prior in args[1:4])


def test_several_labels_an_image_and_more_steps_than_levels_are_refused():
    with pytest.raises(run.UserError, match="several labels"):
        diffmic.build(tiny(), dict(channels=3, classes=list("ab"), multilabel=True))
    with pytest.raises(run.UserError, match="--steps 40"):
        networks(tiny(steps=40, timesteps=30))


@pytest.mark.parametrize("given", [dict(samples=1), dict(samples=9, variant="dcg"), dict(samples=9, variant="basic")])
def test_a_spread_of_one_draw_is_refused(given):
    networks(tiny(samples=2, uncertainty="spread"))
    with pytest.raises(run.UserError, match="--uncertainty spread: needs several draws"):
        networks(tiny(uncertainty="spread", **given))


def test_without_a_guide_nothing_is_warmed_up():
    assert configure(variant="c1", data="toy").pretrain_epochs == 0 and configure(variant="c2", data="toy").pretrain_epochs == 2
    config = configure(variant="c1", pretrain_epochs=3, data="toy")
    groups = {name: diffmic.learning_rate(config, dict(name=name, peak=1.), 2.) for name in ("diffusion", "resnet")}
    assert groups["diffusion"] == groups["resnet"] > .5


# ------------------------------------------------------------------- Training/eval: tiny runs learn
def fit(nets, config, part, steps):
    """`steps` Adam steps on one batch, the rate falling to 0; every step's losses."""
    optimizer, log = torch.optim.Adam(diffmic.parameter_groups(nets.train(), config)), []
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - i / steps)
        losses = diffmic.train_step(nets, None, config, part, joint=True)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        log.append({k: v.item() for k, v in losses.items() if v.ndim == 0})
    nets.eval()
    return log


def mean(log, key):
    return float(np.mean([row[key] for row in log]))


def test_the_loss_is_finite_and_falls_on_two_classes():
    data = toy.make(0, 28, dict(train=60, val=1, test=1)).train
    rows = np.flatnonzero((data.labels == 0) | (data.labels == 3))[:24]
    part = Batch(torch.from_numpy(data.images[rows]) / 127.5 - 1, torch.from_numpy((data.labels[rows] == 3).astype(np.int64)), rows)
    config = tiny(size=28, lr=1e-2, guide_lr=4e-3, hidden=64)
    log = fit(networks(config, classes=2), config, part, 50)
    assert np.isfinite([row["loss"] for row in log]).all()
    assert mean(log[-10:], "loss") < .8 * mean(log[:10], "loss")
    assert mean(log[-10:], "guide") < .3 * mean(log[:10], "guide") and mean(log[-10:], "eps") < .8 * mean(log[:10], "eps")


@pytest.mark.slow
def test_thirty_two_images_are_learnt_by_heart():
    split = toy.make(0, 28, dict(train=32, val=1, test=1)).train
    config = tiny(size=28, variant="c2", lr=2e-2, guide_lr=4e-3, hidden=128, timesteps=50, steps=10, samples=8)
    nets = networks(config)
    log = fit(nets, config, next(iter(Batches(split, 32))), 120)
    predictions, _ = diffmic.evaluate(nets, split, config, CPU)
    accuracy = {k: np.mean(p.argmax(1) == split.labels) for k, p in predictions.items()}
    assert accuracy["guide"] == 1 and accuracy["diffmic"] >= .8, accuracy
    assert mean(log[-10:], "eps") < .7


class Witness(Split):
    """A split that writes down when its images or labels are looked at."""

    def __getattribute__(self, name):
        log = object.__getattribute__(self, "__dict__").get("log")
        if log is not None and name in ("images", "labels"):
            log.append(f"test {name}")
        return object.__getattribute__(self, name)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """One run of a quarter of a minute, watched: {result, config, folder, log, evaluated, averaged, test}."""
    monkeypatch, log, evaluated, averaged, kept = pytest.MonkeyPatch(), [], [], [], {}
    load, step, close, evaluate, average = (diffmic.load_for, diffmic.train_step, run.State.close_epoch, diffmic.evaluate, run.update_ema)

    def watched_load(*args, **kwargs):
        data = load(*args, **kwargs)
        data.test = Witness(**vars(data.test))
        data.test.log, kept["data"] = log, data
        data.val = Split(data.val.images[:200], data.val.labels[:200], data.val.ids[:200])
        return data

    def watched_step(*args):
        log.append("step")
        return step(*args)

    def watched_close(self, *args):
        log.append("epoch")
        return close(self, *args)

    def watched_evaluate(nets, *args, **kwargs):
        evaluated.append(nets)
        return evaluate(nets, *args, **kwargs)

    def watched_average(ema, nets, decay, n):
        averaged.append((ema, nets, decay, n))
        return average(ema, nets, decay, n)

    with monkeypatch.context() as m:
        for owner, name, function in ((diffmic, "load_for", watched_load), (diffmic, "train_step", watched_step), (run.State, "close_epoch", watched_close),
                                      (diffmic, "evaluate", watched_evaluate), (run, "update_ema", watched_average)):
            m.setattr(owner, name, function)
        m.setattr(run.score, "__defaults__", (None, 5))                  # resamples of the intervals
        config = configure(data="toy", device="cpu", size=28, limit=640, epochs=4, pretrain_epochs=2, batch_size=16, timesteps=50, steps=10, samples=8,
                           hidden=64, lr=2e-2, guide_lr=4e-3, mmd_weight=0., baseline=False, output=str(tmp_path_factory.mktemp("run") / "toy"))
        result = diffmic.train(config)
    vars(kept["data"].test).pop("log")
    return dict(result=result, config=config, folder=Path(config.output), log=log, evaluated=evaluated, averaged=averaged, data=kept["data"])


def test_a_short_run_on_the_cpu_learns_more_than_the_majority(toy_run):
    result = toy_run["result"]
    assert result["device"] == "cpu"
    assert result["test"]["accuracy"] > result["baselines"]["majority"]["accuracy"] + .05
    assert result["test"]["auroc"] > .7 and result["baselines"]["guide"]["accuracy"] > result["baselines"]["majority"]["accuracy"] + .1
    assert result["test"]["accuracy"] < result["bayes"]["accuracy"]


def test_the_test_images_are_not_looked_at_before_training_is_over(toy_run):
    log = toy_run["log"]
    first, last = log.index("step"), len(log) - 1 - log[::-1].index("epoch")
    assert "test images" not in log[:last]                               # the labels are counted once, in the first lines printed
    assert not any(event.startswith("test") for event in log[first:last]) and "test images" in log[last:]
    assert log.count("epoch") == 6 and log.count("step") == 6 * 40


def test_what_is_evaluated_is_the_moving_average_and_never_the_raw_weights(toy_run):
    pairs = {(id(ema), id(nets)) for ema, nets, *_ in toy_run["averaged"]}
    ((ema, raw),) = pairs
    assert {id(nets) for nets in toy_run["evaluated"]} == {ema} and ema != raw
    ema, raw, *_ = toy_run["averaged"][-1]
    assert not same(state(ema), state(raw))
    shared = {p.data_ptr() for p in ema.state_dict().values()} & {p.data_ptr() for p in raw.state_dict().values()}
    assert not shared


def test_corrupt_raw_weights_do_not_change_what_is_evaluated(toy_run):
    config, data = toy_run["config"], toy_run["data"]
    ema, raw, *_ = toy_run["averaged"][-1]
    some = Split(data.val.images[:16], data.val.labels[:16], data.val.ids[:16])
    before = diffmic.evaluate(ema, some, config, CPU)[0]["diffmic"]
    kept = state(raw)
    for p in raw.parameters():
        p.data.fill_(torch.nan)
    after = diffmic.evaluate(ema, some, config, CPU)[0]["diffmic"]
    raw.load_state_dict({k.split(".", 1)[1]: v for k, v in kept.items()})
    assert np.array_equal(before, after) and np.isfinite(after).all()


def test_the_moving_average_starts_again_where_the_diffusion_does(toy_run):
    counts = [n for *_, n in toy_run["averaged"]]
    assert counts[:80] == list(range(80)) and counts[80:] == list(range(160))       # two epochs of warm-up, four joint


def test_a_saved_run_loads_to_networks_with_identical_predictions(toy_run):
    config, nets, facts, device = run.load_model(toy_run["folder"] / "best.pt", diffmic.METHOD, Config, diffmic.build, {})
    assert config == toy_run["config"] and device == CPU
    test = toy_run["data"].test
    predictions, _ = diffmic.evaluate(nets, test, config, device)
    assert run.metrics.summary(test.labels, predictions["diffmic"])["nll"] == toy_run["result"]["test"]["nll"]
    loaded = torch.load(toy_run["folder"] / "best.pt", weights_only=True)["ema"]
    assert same(dict(nets.state_dict()), loaded)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_predictions_do_not_depend_on_the_size_of_the_batch(toy_run, size):
    config, nets, _, _ = run.load_model(toy_run["folder"] / "best.pt", diffmic.METHOD, Config, diffmic.build, {})
    test = toy_run["data"].test
    some = Split(test.images[:64], test.labels[:64], test.ids[:64])
    at_once = diffmic.evaluate(nets, some, dataclasses.replace(config, eval_batch_size=33), CPU)[0]
    parted = diffmic.evaluate(nets, some, dataclasses.replace(config, eval_batch_size=size), CPU)[0]
    for name in ("diffmic", "guide"):
        assert np.array_equal(at_once[name].argmax(1), parted[name].argmax(1))
        assert np.abs(at_once[name] - parted[name]).max() <= 1e-5


def test_an_image_alone_is_classified_as_in_its_set(toy_run):
    config, nets, _, _ = run.load_model(toy_run["folder"] / "best.pt", diffmic.METHOD, Config, diffmic.build, {})
    test = toy_run["data"].test
    some = Split(test.images[:20], test.labels[:20], test.ids[:20])
    together, _ = diffmic.evaluate(nets, some, config, CPU)
    for i in (0, 13, 19):
        alone, _ = diffmic.evaluate(nets, Split(test.images[i:i + 1], test.labels[i:i + 1], [test.ids[i]]), config, CPU)
        assert np.abs(alone["diffmic"][0] - together["diffmic"][i]).max() <= 1e-5


# ------------------------------------------------------------------- Training/eval: what a run must keep
def test_a_moving_average_with_decay_zero_is_the_weights():
    nets, ema = networks(tiny()), networks(tiny())
    for v in nets.state_dict().values():
        v.copy_(torch.randint(0, 9, v.shape))
    run.update_ema(ema, nets, 0., step=1000)
    assert same(state(ema), state(nets))


@pytest.mark.parametrize("step, d", [(0, .1), (1, 2 / 11), (90, .91), (890, .99), (10 ** 6, .99)])
def test_the_moving_average_warms_up_by_its_count(step, d):
    one, zero = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    one.weight.data.fill_(1), zero.weight.data.fill_(0)
    one.running_var.fill_(1), zero.running_var.fill_(0)
    zero.num_batches_tracked += 5
    run.update_ema(one, zero, .99, step)
    assert one.weight.item() == pytest.approx(d, abs=1e-6) and one.running_var.item() == pytest.approx(d, abs=1e-6)
    assert one.num_batches_tracked == 5                                  # a count is copied


@pytest.mark.parametrize("N, batch_size", [(33, 32), (65, 32), (3, 2), (97, 16)])
def test_a_last_batch_of_one_image_does_not_happen(N, batch_size):
    split = toy.make(0, 28, dict(train=N, val=1, test=1)).train
    config = tiny(size=28, hidden=16)
    nets, sizes = networks(config).train(), []
    for part in Batches(split, batch_size, train=True):
        sizes.append(len(part.y))
        if len(sizes) < 3:
            diffmic.train_step(nets, None, config, part, joint=True)["loss"].backward()     # a batch norm would refuse one row
    assert sum(sizes) == N and max(sizes) - min(sizes) <= 1 and min(sizes) > 1


@pytest.mark.parametrize("B, n", [(13, 4), (9, 4), (32, 3), (10, 4)])
def test_the_parts_of_a_batch_differ_by_one_image_and_know_their_rows(B, n):
    whole = Batch(torch.arange(B).float().view(B, 1, 1, 1), torch.arange(B), np.arange(B))
    parts = whole.split(n)
    assert len(parts) == n and max(len(p.y) for p in parts) - min(len(p.y) for p in parts) <= 1
    assert all(p.y.tolist() == p.index.tolist() == p.x.flatten().tolist() for p in parts)
    assert torch.equal(torch.cat([p.y for p in parts]), whole.y)


@pytest.mark.parametrize("size", [28, 32, 96])
def test_on_a_cpu_no_convolution_gets_images_that_lie_channels_last(size):
    """torch 2.13 writes past its memory, and Python dies, in the backward pass of a strided 1x1 convolution of fewer than 16
    channels on an odd number of such images with two threads or more (oneDNN 3.12); see `run.place`. Regions are images too."""
    config, wrong = tiny(size=size, baseline=True, rois=5), set()
    nets = run.place(networks(config), CPU).train()

    for name, module in nets.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, args, name=name: None if args[0].is_contiguous() else wrong.add(name))
    diffmic.train_step(nets, None, config, batch(3, size), joint=True)
    assert wrong == set()


@pytest.mark.parametrize("seed", range(3))
def test_no_lesion_is_on_two_sides(seed):
    data = toy.make(seed, 28, dict(train=60, val=40, test=40))
    sides = [set(part.groups) for part in (data.train, data.val, data.test)]
    assert all(not a & b for a, b in itertools.combinations(sides, 2)) and len(sides[0]) < 60      # some lesions have two views
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 120, 300)
    labels = (groups % 5).tolist()
    side = splits.group_split(labels, [f"lesion {g}" for g in groups])
    assert all(len({s for s, g in zip(side, groups) if g == k}) == 1 for k in set(groups.tolist())) and set(side) == {"train", "val", "test"}


class Stopped(Exception):
    pass


SHORT = dict(data="toy", size=28, limit=32, batch_size=8, epochs=3, pretrain_epochs=1, hidden=16, steps=2, samples=1, baseline=False)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run.score, "__defaults__", (None, 5))
        diffmic.train(configure(**SHORT, output=str(folder)))
    return folder


@pytest.mark.parametrize("stop_at", [5, 9])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(stop_at, whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.score, "__defaults__", (None, 5))
    step, calls = diffmic.train_step, itertools.count()

    def stopping(*args):
        if next(calls) == stop_at:
            raise Stopped
        return step(*args)

    config = configure(**SHORT, output=str(tmp_path / "parted"))
    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(diffmic, "train_step", stopping)
        diffmic.train(config)
    diffmic.train(config, resume=tmp_path / "parted")
    whole, parted = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole_run, tmp_path / "parted"))
    assert same(whole["nets"], parted["nets"]) and same(whole["ema"], parted["ema"]) and whole["position"]["step"] == 16
    shown = [[{k: v for k, v in row.items() if "seconds" not in k} for row in content["position"]["history"]] for content in (whole, parted)]
    assert repr(shown[0]) == repr(shown[1])


def test_macro_f1_and_quadratic_kappa_are_those_computed_by_hand():
    y, yhat = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    p = np.eye(3)[yhat] * .9 + .1 / 3
    summary = run.metrics.summary(y, p)
    assert summary["accuracy"] == pytest.approx(4 / 6)
    assert summary["f1_macro"] == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)               # 2 TP / (2 TP + FP + FN), class by class
    # sum of squared distances: 2 observed; by chance, rows 3 2 1 x columns 2 2 2 over 6: (6 + 24 + 4 + 4 + 8 + 2) / 6 = 8
    assert summary["kappa_quadratic"] == pytest.approx(1 - 2 / 8)


def test_fine_tuning_takes_the_weights_and_not_the_temperature(tmp_path):
    config = tiny(size=28, width=8, guide_depth=18, timesteps=50, steps=9)
    other = worn(networks(config))
    other.temperature.fill_(3.)
    run.save(tmp_path / "best.pt", dict(format=run.FORMAT, method="diffmic", config=dataclasses.asdict(config), ema=other.state_dict(),
                                        facts=dict(classes=toy.CLASSES, channels=3, multilabel=False)))
    torch.manual_seed(1)
    nets = diffmic.build(config, dict(channels=3, classes=toy.CLASSES, multilabel=False))
    diffmic.initialise(nets, None, dataclasses.replace(config, init=str(tmp_path / "best.pt")))
    assert nets.temperature == 1
    assert all(torch.equal(a, b) for (k, a), b in zip(nets.state_dict().items(), other.state_dict().values()) if k != "temperature")


# ---------------------------------------------------------------------------------------------- explain
def saved(path, **given):
    """A checkpoint of networks that were never trained."""
    config = tiny(**dict(size=28, width=8, guide_depth=18, timesteps=50, steps=9) | given)
    facts = dict(classes=toy.CLASSES, channels=3, multilabel=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.save(path, dict(format=run.FORMAT, method="diffmic", config=dataclasses.asdict(config), facts=facts, ema=worn(networks(config)).state_dict()))
    return path


def lesions(folder, n):
    """Pictures of a user, larger than the network takes them, without labels."""
    folder.mkdir(parents=True)
    made = toy.make(7, 40, dict(train=1, val=1, test=n)).test.images
    for i, image in enumerate(made):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"mole {i}.png")
    return sorted(folder.iterdir())


def explain(*argv):
    return diffmic.main(["explain", *map(str, argv)])


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def assert_pictures(folder, n, more=()):
    """n panels, an overview, `more` and config.json, all of them whole and wide."""
    names = sorted(p.name for p in folder.iterdir())
    panels = [name for name in names if re.match(r"\d{4}-.+\.png", name)]
    assert len(panels) == n and names == sorted([*panels, "overview.png", "config.json", *more])
    for name in names:
        if name.endswith(".png"):
            with Image.open(folder / name) as picture:
                picture.load()
                assert picture.width > 300 or name == "overview.png" and n == 1
    return panels


@pytest.fixture
def shown(monkeypatch):
    """Arguments of every picture that is drawn from now on: {"explanation": [...], "scatter": [...], "image_grid": [...]}."""
    seen = {name: [] for name in ("explanation", "scatter", "image_grid")}
    for name, calls in seen.items():
        real = getattr(diffmic.plots, name)
        monkeypatch.setattr(diffmic.plots, name, lambda *args, real=real, calls=calls, **options: calls.append(args) or real(*args, **options))
    return seen


def test_explain_shows_what_evaluation_predicts_for_some_of_the_test_split(toy_run, tmp_path, shown, capsys):
    checkpoint, before = toy_run["folder"] / "best.pt", tree(toy_run["folder"])
    assert explain("--checkpoint", checkpoint, "--limit", 6, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert str(tmp_path / "out") in printed.out and "not for clinical use" in printed.out and "error" not in printed.err
    config, nets, facts, _ = run.load_model(checkpoint, diffmic.METHOD, Config, diffmic.build, dict(limit=6))
    test = diffmic.load_for(config, facts).test
    predictions, _ = diffmic.evaluate(nets, test, config, CPU)
    panels = assert_pictures(tmp_path / "out", 6)
    assert panels == [f"{i:04d}-{name}.png" for i, name in enumerate(test.ids)] and len(shown["explanation"]) == 6
    for i, (_, title, tiles, ((series, *_),), lines) in enumerate(shown["explanation"]):
        p = predictions["diffmic"][i]
        order = np.argsort(-p)
        assert title == f"{toy.CLASSES[order[0]]} (true: {toy.CLASSES[test.labels[i]]})"
        assert list(series) == [toy.CLASSES[k] for k in order] and f"{toy.CLASSES[order[0]]} {p[order[0]]:.3f}" in lines[0]
        assert list(tiles)[0] == test.ids[i] and toy.CLASSES[order[0]] in list(tiles)[1]
        assert np.array_equal(list(tiles.values())[0], diffmic.plots.overlay(test.images[i]))
        steps, mean, low, high = series[toy.CLASSES[order[0]]]
        assert len(steps) == len(mean) == 11 and (low <= mean + 1e-6).all() and (mean <= high + 1e-6).all() and len(series[toy.CLASSES[order[2]]]) == 2
        ends = np.array([series[c][1][-1] for c in toy.CLASSES])         # the mean draw, which the probabilities are made of
        logits = np.log(ends.clip(1e-6)) if config.target == "y0" else ends / diffmic.TEMPERATURE
        soft = np.exp(logits / float(nets.temperature))
        assert np.allclose(soft / soft.sum(), p, atol=1e-4)
    assert tree(toy_run["folder"]) == before


@pytest.mark.parametrize("given, n", [([], 8), (["--limit", 2], 2), (["--limit", 1, "--samples", 3, "--sampler", "ddim", "--steps", 1], 1)])
def test_explain_draws_as_many_panels_as_asked(given, n, tmp_path, capsys):
    assert explain("--checkpoint", saved(tmp_path / "run" / "best.pt"), *given, "--output", tmp_path / "out") == 0
    assert_pictures(tmp_path / "out", n)


def test_explain_takes_files_and_folders_without_labels(tmp_path, shown, capsys):
    files, folder = lesions(tmp_path / "some", 2), lesions(tmp_path / "folder" / "inner", 3)
    checkpoint = saved(tmp_path / "run" / "best.pt", samples=2)
    assert explain("--checkpoint", checkpoint, *files, tmp_path / "folder", "--eval-batch-size", 2, "--output", tmp_path / "out") == 0
    assert assert_pictures(tmp_path / "out", 5) == [f"{i:04d}-{p.stem.replace(' ', '_')}.png" for i, p in enumerate([*files, *folder])]
    assert [list(tiles)[0] for _, _, tiles, *_ in shown["explanation"]] == [p.name for p in (*files, *folder)]
    assert all(title in toy.CLASSES for _, title, *_ in shown["explanation"])           # no truth is known
    ((_, images, labels),) = shown["image_grid"]
    assert len(images) == len(labels) == 5 and not any("true" in label for label in labels)
    assert all(p.name in label and title in label for p, label, (_, title, *_) in zip([*files, *folder], labels, shown["explanation"]))


def test_the_same_file_is_predicted_and_explained_alike_in_any_folder(tmp_path, shown, capsys):
    first, again = lesions(tmp_path / "a", 1)[0], lesions(tmp_path / "b" / "c", 1)[0]
    checkpoint = saved(tmp_path / "run" / "best.pt")
    assert diffmic.main(["predict", "--checkpoint", str(checkpoint), str(first), str(again), "--output", str(tmp_path / "p")]) == 0
    one, two = ((tmp_path / "p" / "predictions.csv").read_text().splitlines())[1:]
    assert one.split(",")[1:] == two.split(",")[1:] and one.split(",")[0] != two.split(",")[0]
    assert explain("--checkpoint", checkpoint, first, again, "--output", tmp_path / "out") == 0
    (_, title, _, _, lines), (_, title2, _, _, lines2) = shown["explanation"]
    assert (title, lines) == (title2, lines2) and f"{title} {float(one.split(',')[4 + toy.CLASSES.index(title)]):.3f}" in lines[0]


def test_explained_regions_are_the_guides(tmp_path, shown):
    """Drawn at the rows and columns that the guide cut out, with the attention it gave them."""
    (file,), marks = lesions(tmp_path / "some", 1), []
    checkpoint, real = saved(tmp_path / "run" / "best.pt", size=32, rois=3), diffmic.plots.overlay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffmic.plots, "overlay", lambda *args, **options: marks.append(args) or real(*args, **options))
        assert explain("--checkpoint", checkpoint, file, "--output", tmp_path / "out") == 0
    config, nets, facts, _ = run.load_model(checkpoint, diffmic.METHOD, Config, diffmic.build, {})
    image = diffmic.read_split([file], config, facts)[0].images
    with torch.no_grad():
        guide = nets.guide(torch.from_numpy(image) / 127.5 - 1)
    (drawn,) = [args for args in marks if len(args) == 4]
    corners = guide.corners[0].tolist()
    assert drawn[2].tolist() == [[c, r, c + 5, r + 5] for r, c in corners] and any(r != c for r, c in corners)
    assert drawn[3] == [f"{a:.2f}" for a in guide.attention[0].tolist()]
    best = toy.CLASSES.index(shown["explanation"][0][1])
    assert np.allclose([args for args in marks if len(args) == 2][0][1], guide.saliency[0, best], atol=1e-4)


def test_the_t_sne_of_given_pictures_has_seven_steps_from_noise_to_label(tmp_path, shown):
    lesions(tmp_path / "some", 12)
    assert explain("--checkpoint", saved(tmp_path / "run" / "best.pt"), tmp_path / "some", "--tsne", "--output", tmp_path / "out") == 0
    assert_pictures(tmp_path / "out", 12, ["tsne.png"])
    ((_, panels, labels, classes, _, note),) = shown["scatter"]
    t = [int(name.removeprefix("t = ")) for name in panels]
    assert len(t) == 7 and t == sorted(t, reverse=True) and (t[0], t[-1]) == (50, 1)      # the paper's t = 1..T
    assert all(np.shape(y) == (12, 2) and np.isfinite(y).all() for y in panels.values()) and classes == toy.CLASSES
    assert "predicted" in note and [toy.CLASSES[k] for k in labels] == [title for _, title, *_ in shown["explanation"]]


def test_the_t_sne_of_more_than_300_images_is_of_the_first_300(tmp_path, shown, monkeypatch):
    rows = []
    monkeypatch.setattr(diffmic, "plane", lambda x: rows.append(x) or x[:, :2])
    monkeypatch.setattr(diffmic, "draw_explanation", lambda *args: np.zeros((8, 8, 3), np.uint8))
    assert explain("--checkpoint", saved(tmp_path / "run" / "best.pt", steps=3), "--tsne", "--limit", 330, "--eval-batch-size", 64, "--output", tmp_path / "out") == 0
    assert len(rows) == 3 and all(len(x) == 300 for x in rows) and len(shown["scatter"][0][2]) == 300


def test_explain_classifies_no_more_images_than_it_draws(tmp_path, shown, monkeypatch):
    own, sizes = diffmic.classify, []
    monkeypatch.setattr(diffmic, "classify", lambda nets, config, x, noise: sizes.append(len(x)) or own(nets, config, x, noise))
    assert explain("--checkpoint", saved(tmp_path / "run" / "best.pt", steps=3), *lesions(tmp_path / "some", 5), "--limit", 2, "--output", tmp_path / "out") == 0
    assert sizes == [2]


def test_the_t_sne_of_a_test_split_is_of_the_denoised_embeddings_and_coloured_by_truth(tmp_path, shown, monkeypatch):
    rows = []
    monkeypatch.setattr(diffmic, "plane", lambda x: rows.append(x) or x[:, :2])         # 300 rows in earnest take a while
    checkpoint = saved(tmp_path / "run" / "best.pt", steps=3)
    assert explain("--checkpoint", checkpoint, "--tsne", "--limit", 12, "--eval-batch-size", 64, "--output", tmp_path / "out") == 0
    assert_pictures(tmp_path / "out", 12, ["tsne.png"])
    ((_, panels, labels, _, _, note),) = shown["scatter"]
    config, nets, facts, _ = run.load_model(checkpoint, diffmic.METHOD, Config, diffmic.build, dict(limit=len(labels)))
    test = diffmic.load_for(config, facts).test
    assert len(rows) == 3 and list(panels) == [f"t = {int(t) + 1}" for t in respaced_timesteps(50, 3)]
    assert all(x.shape == (len(labels), 32) for x in rows) and len(labels) >= 12 and labels.tolist() == test.labels.tolist() and "true" in note
    x = torch.from_numpy(test.images) / 127.5 - 1
    with torch.no_grad():
        out = diffmic.classify(nets, config, x, run.image_noise(config.seed, test.ids, (1, 3, 5), CPU))
        assert all(np.allclose(diffmic.embedding(nets, config, out, i), rows[i], rtol=1e-3, atol=1e-4) for i in range(3))


def test_explain_writes_beside_the_checkpoint_and_nowhere_else(tmp_path, monkeypatch):
    checkpoint, (file,) = saved(tmp_path / "run" / "best.pt"), lesions(tmp_path / "some", 1)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    for name in ("explain", "explain-2"):
        assert explain("--checkpoint", checkpoint, file) == 0
        assert_pictures(tmp_path / "run" / name, 1)
        after = tree(tmp_path)
        assert {p for p in after if p not in before and p.parent != tmp_path / "run" / name} == set()
        assert all(after[p] == at for p, at in before.items())
        before = after


@pytest.mark.parametrize("variant", ["dcg", "c1", "basic"])
def test_what_has_no_guide_or_no_diffusion_is_not_explained(variant, tmp_path, capsys):
    checkpoint = saved(tmp_path / "run" / "best.pt", variant=variant)
    assert explain("--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and str(checkpoint) in error and f"--variant {variant}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n", [1, 3])
def test_a_t_sne_of_fewer_than_four_pictures_is_refused(n, tmp_path, capsys):
    files = lesions(tmp_path / "some", n)
    assert explain("--checkpoint", saved(tmp_path / "run" / "best.pt"), *files, "--tsne", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --tsne") and "\n" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, words", [(["--limit", "many"], "--limit"), (["--limit", "-1"], "--limit -1"), (["--steps", "51"], "--steps"), (["nowhere.png"], "nowhere.png"), (["--tsn"], "--tsne")])
def test_a_mistake_in_an_explain_command_is_one_line(argv, words, tmp_path, capsys):
    assert explain("--checkpoint", saved(tmp_path / "run" / "best.pt"), *argv, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and words in error and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the paper's size
@pytest.mark.slow
def test_two_real_images_go_through_one_step_and_one_prediction_at_full_size(capsys):
    root = Path(__file__).resolve().parents[2] / "shared" / "data" / "ham10000"
    files = sorted(root.glob("HAM10000_images_part_1/*.jpg"))[:2]
    if len(files) == 2:
        x, _, _ = read_images([str(f) for f in files], 224, 3, "crop", False)
    else:
        x = toy.make(0, 224, dict(train=2, val=1, test=1)).train.images
    torch.set_num_threads(2)
    config = configure(data="ham10000", scale="paper")
    nets, began = networks(config, 3, 7).train(), time.perf_counter()
    assert parameters(nets.guide) == 47_569_152 and config.steps == 250
    optimizer = torch.optim.Adam(diffmic.parameter_groups(nets, config))
    part = Batch(torch.from_numpy(np.ascontiguousarray(x)) / 127.5 - 1, torch.tensor([1, 4]), np.arange(2))
    assert part.x.shape == (2, 3, 224, 224)
    losses = diffmic.train_step(nets, None, config, part, joint=True)
    losses["loss"].backward()
    optimizer.step()
    stepped = time.perf_counter()
    split = Split(np.asarray(x), np.zeros(2, np.int64), ["a", "b"])
    predictions, _ = diffmic.evaluate(nets, split, config, CPU)
    with capsys.disabled():
        print(f"\nfull size on {torch.get_num_threads()} threads: a training step of 2 images {stepped - began:.1f} s, "
              f"a prediction of 250 steps {time.perf_counter() - stepped:.1f} s")
    torch.set_num_threads(1)
    assert losses["loss"].isfinite() and set(predictions) == {"diffmic", "guide", "resnet"}
    assert all(p.shape == (2, 7) and np.isfinite(p).all() and np.allclose(p.sum(1), 1) for p in predictions.values())
