"""mediffusion.py: section 6 of papers/mediffusion.md, item by item under its headings, then runs, commands and bad input.

Oracles: closed forms, torch's own functions, denoisers that know the image or the noise, a classifier linear in the mean pixel, whose gradient is known,
differences in float64, and an editor of planted boxes. Networks are a few channels wide. Elsewhere: the U-Net (test_unet.py), the autoencoder and its
losses (test_autoencoder.py), which images keep their label (test_data.py).
"""
import copy
import csv
import dataclasses
import functools
import itertools
import json
import os
import re
import signal
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import mediffusion
from common import metrics, plots, run
from common.autoencoder import autoencoder_from, kl, pyramid
from common.resnet import ResNet
from common.schedules import ddim_step, ddpm_step
from data import Batches, DataSet, Split, load_for, toy
from data.batches import Batch
from mediffusion import Aim, Changed, Config, configure, judged, levels, q_sample, reverse_step
from tests import claims, counterfactuals
from tests.loading import opened, short
from tests.test_chestxray14 import BOXES, TABLE, nih
from tests.test_run import processes
from tests.test_symmflow import autoencoder, same
from tests.test_unet import count

ROOT, CPU, AB, OWN = Path(__file__).resolve().parent.parent, torch.device("cpu"), mediffusion.alpha_bars(1000), "mediffusion"
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.fixture(scope="module", autouse=True)
def once():
    """The toy sets are the same for many runs, and the comments of the settings for all."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run, "field_comments", functools.cache(run.field_comments))
        for name in ("make", "make_xray"):
            made = functools.cache(lambda seed, size, n, make=getattr(toy, name): make(seed, size, dict(n)))
            m.setattr(toy, name, lambda seed, size, n=None, made=made: copy.copy(made(seed, size, tuple((n or {}).items()))))
        yield


def tiny(**given):
    """The paper's recipe with networks of a few thousand weights; latents of 2 x 8 x 8."""
    return configure(**dict(data="toy_xray", recipe="paper", size=16, ae_width=8, ae_mult="1,2", ae_blocks=1, ae_latent=2, channels=8, mult="1,2", blocks=1,
                            attention="1,2", head_channels=8, hidden=16, width=8, baseline=False, pretrain_epochs=1, epochs=2, batch_size=4, labelled_batch=3,
                            augment="hflip", amp="off") | given)


def facts(channels=1, classes=3, multilabel=True):
    return dict(channels=channels, classes=list("abcdefghijklmn")[:classes], multilabel=multilabel)


def networks(config, *args, **kwargs):
    """As after training: what is zero at first is not."""
    torch.manual_seed(0)
    nets = mediffusion.build(config, facts(*args, **kwargs))
    for p in [*nets.unet.parameters(), *nets.head.parameters()]:
        p.data += .1 * torch.randn_like(p)
    return nets.eval()


def pictures(n, size=16, channels=1, classes=3, multilabel=True, few=(), joining=3):
    """A split of noise with chance labels, of which those of the rows `few` are shown."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (n, classes)).astype(np.float32) if multilabel else np.arange(n) % classes
    labels[np.setdiff1d(np.arange(n), few)] = -1 if len(few) else labels[np.setdiff1d(np.arange(n), few)]
    images = rng.integers(0, 256, (n, channels, size, size), np.uint8)
    return Split(images, labels, [f"picture-{i}" for i in range(n)], few=(np.array(few), joining) if len(few) else None)


def average(nets):
    return copy.deepcopy(nets).eval().requires_grad_(False)


def stepping(config, split, nets=None, n=4, stage=2):
    """Trains n steps as `train` does, from the beginning of a stage; yields networks, average, batch and losses of each."""
    nets = nets or networks(config)
    ema, number = average(nets), itertools.count((stage - 1) * config.pretrain_epochs * len(Batches(split, config.batch_size, train=True)))
    optimizer = torch.optim.AdamW(mediffusion.parameter_groups(nets.train(), config))
    for number in itertools.islice(number, n):
        batch = next(iter(Batches(split, config.batch_size, CPU, True, 0, [a for a in config.augment.split(",") if a], config.balanced, number)))
        torch.manual_seed(number)
        optimizer.zero_grad(set_to_none=True)
        losses = mediffusion.train_step(nets, ema, config, batch, stage == 2)
        losses["loss"].backward()
        yield nets, ema, batch, losses
        optimizer.step()
        run.update_ema(ema, nets, config.ema, number)


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


# ---------------------------------------------------------------------------------------------- sizes
def paper(channels=1, classes=14, **given):
    """The paper's networks without memory, and their settings."""
    config = configure(**dict(data="chestxray14") | given)
    with torch.device("meta"):
        return mediffusion.build(config, facts(channels, classes)), config


@pytest.mark.parametrize("channels, of_autoencoder, of_discriminator", [(1, 83_649_253, 2_763_585), (3, 83_653_863, 2_765_633)])
def test_the_papers_networks_have_their_number_of_parameters(channels, of_autoencoder, of_discriminator):
    nets, config = paper(channels)
    assert config.scale == config.recipe == "paper" and nets.shape == (4, 32, 32)
    assert count(nets.unet) == 257_733_124 and len(nets.unet.state_dict()) == 306
    assert count(nets.autoencoder) == of_autoencoder and count(nets.discriminator) == of_discriminator
    assert count(nets.head) == 5_782_542 and len(nets.head.state_dict()) == 4 and nets.head[1].in_features == 5632
    assert nets.head[0].p == nets.head[3].p == .3 and nets.head[2].negative_slope == .2


@pytest.mark.parametrize("field, value", dict(batch_size=64, labelled_batch=32, lr=5e-5, ema=.9999, cls_start=5000, cls_every=4, timesteps=1000, ae_lr=4.5e-6,
                                              kl_weight=1e-6, gan_weight=.5, gan_start=50001, guidance=300., draw_steps=50, remove_start=300, remove_scale=500.,
                                              enforce_start=200, enforce_scale=200., clip=0., warmup=0., decay="none", size=256, fit="squash").items())
def test_scale_paper_has_the_numbers_of_the_paper(field, value):
    assert getattr(configure(data="chestxray14"), field) == value


@pytest.mark.parametrize("data, images, first, second", [("chestxray14", 77_872, 300_000, 200_000), ("isic2019", 17_732, 300_000, 20_000)])
def test_at_scale_paper_both_stages_take_about_as_many_steps_as_in_the_paper(data, images, first, second):
    """Of the images of training, once validation is set aside."""
    config = configure(data=data)
    steps = -(-images // config.batch_size)
    assert config.pretrain_epochs * steps == pytest.approx(first, rel=.05) and config.epochs * steps == pytest.approx(second, rel=.05)


@pytest.mark.parametrize("field", Config.__dataclass_fields__)
def test_every_setting_is_read_somewhere(field):
    source = "".join(p.read_text() for p in (ROOT / "mediffusion.py", ROOT / "common" / "run.py", *(ROOT / "data").glob("*.py")))
    assert re.search(rf"\bconfig\.{field}\b", source)


# ---------------------------------------------------------------------------------------------- features
def test_the_papers_features_are_ten_tensors_in_the_order_of_the_encoder():
    nets, _ = paper()
    z, t = torch.empty(2, 4, 32, 32, device="meta"), torch.zeros(2, device="meta")
    assert [tuple(m.shape[1:]) for m in nets.unet.encode(z, t)] == [(256, 32, 32)] * 3 + [(256, 16, 16)] + [(512, 16, 16)] * 2 + [(512, 8, 8)] + [(1024, 8, 8)] * 3
    assert nets.pooled(z, t).shape == (2, 5632)


@torch.no_grad()
def test_features_are_each_tensors_mean_over_its_pixels_in_their_order():
    nets, t = networks(tiny()), torch.zeros(3)
    for side in (8, 16):                                                # the entries do not depend on the latent's size
        z = torch.randn(3, 2, side, side)
        maps, found = nets.unet.encode(z, t), nets.pooled(z, t)
        assert found.shape == (3, 56) and len({m.shape[2] for m in maps}) == 2
        place = 0
        for m in maps:
            for c in range(m.shape[1]):
                assert torch.allclose(found[:, place], F.avg_pool2d(m, m.shape[2:])[:, c, 0, 0], atol=1e-6)
                place += 1
        assert place == 56


@pytest.mark.parametrize("given", [{}, dict(mult="1,2,3", size=32), dict(blocks=2), dict(mult="2"), dict(channels=16, mult="1,1")], ids=str)
def test_the_classifier_takes_what_the_encoder_has(given):
    nets = networks(tiny(**given))
    assert nets.pooled(torch.randn(1, *nets.shape), torch.zeros(1)).shape == (1, nets.head[1].in_features)


@torch.no_grad()
def test_the_classifier_sees_nothing_of_the_decoder():
    config, z, nets = tiny(), torch.randn(2, 2, 8, 8), networks(tiny())
    before = nets.head(mediffusion.features(nets, config, z, ["a", "b"]))
    for p in [*nets.unet.up.parameters(), *nets.unet.leave.parameters()]:
        p.fill_(torch.nan)
    assert torch.equal(nets.head(mediffusion.features(nets, config, z, ["a", "b"])), before) and nets.unet(z, torch.zeros(2)).isnan().all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_classification_loss_reaches_encoder_and_middle_and_not_the_decoder_nor_the_autoencoder(multilabel):
    config = tiny(variant="no_diffusion")
    for nets, _, _, losses in stepping(config, pictures(8, multilabel=multilabel, few=range(8)), networks(config, multilabel=multilabel), n=1):
        assert set(losses) == {"classifier", "loss"}
        for part in (nets.head, nets.unet.enter, nets.unet.down, nets.unet.middle, nets.unet.time):
            assert all(p.grad.abs().sum() > 0 for p in part.parameters())
        for part in (nets.unet.up, nets.unet.leave, nets.autoencoder):
            assert all(p.grad is None for p in part.parameters())


def test_the_diffusion_loss_reaches_the_whole_unet_and_not_the_classifier():
    nets = networks(tiny()).train()
    mediffusion.diffusion_loss(nets, tiny(), torch.randn(4, 2, 8, 8))["diffusion"].backward()
    assert all(p.grad.abs().sum() > 0 for p in nets.unet.parameters()) and all(p.grad is None for p in nets.head.parameters())


@torch.no_grad()
def test_features_at_several_levels_are_their_mean_and_noise_goes_by_the_image():
    nets, z, names = networks(tiny()), torch.randn(2, 2, 8, 8), ["a", "b"]
    at = lambda times: mediffusion.features(nets, tiny(feature_times=times), z, names)
    assert torch.equal(at("0"), nets.pooled(z, torch.zeros(2))) and not torch.allclose(at("400"), at("0"), atol=1e-3)
    assert torch.allclose(at("0,400,20"), (at("0") + at("400") + at("20")) / 3, atol=1e-6)
    assert torch.allclose(mediffusion.features(nets, tiny(feature_times="400"), z[1:], ["b"]), at("400")[1:], atol=1e-6)


@torch.no_grad()
def test_the_classifier_is_shown_noise_in_training_alone(monkeypatch):
    nets, seen, z = networks(tiny()), [], torch.randn(400, 2, 8, 8)
    monkeypatch.setattr(nets, "pooled", lambda z, t: seen.append((z, t)) or torch.zeros(len(z), 56))
    config = tiny(cls_noise=50)
    mediffusion.features(nets, config, z), mediffusion.features(nets, config, z, [""] * 400), mediffusion.features(nets, tiny(), z)
    (noised, t), *clean = seen
    assert set(t.tolist()) == set(range(50)) and all(torch.equal(x, z) and not t.any() for x, t in clean)
    eps = (noised - AB[t].sqrt().float().view(-1, 1, 1, 1) * z) / (1 - AB[t]).sqrt().float().view(-1, 1, 1, 1)
    assert abs(eps.std() - 1) < .01 and abs(eps.mean()) < .01


# ---------------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize("t, value", [(0, .99850), (49, .91845), (199, .61673), (200, .61458), (299, .40911), (300, .40716), (999, .00014)])
def test_alpha_bar_has_the_values_of_the_fact_sheet(t, value):
    assert AB.dtype == torch.float64 and AB[t].item() == pytest.approx(value, abs=5e-6)


def test_alpha_bar_is_the_running_product_of_one_minus_beta_whose_root_is_linear():
    product = 1.
    for t in range(1000):
        product *= 1 - (.0015 ** .5 + (.0195 ** .5 - .0015 ** .5) * t / 999) ** 2
        assert AB[t].item() == pytest.approx(product, rel=1e-10)


def test_at_any_number_of_levels_that_is_allowed_alpha_bar_falls_from_1_and_stays_above_0():
    low = int(re.match(r"\[(\d+)\.\.", run.field_comments(Config)["timesteps"][1])[1])
    for T in (low, low + 1, 30, 100, 5000):
        ab = mediffusion.alpha_bars(T)
        assert len(ab) == T and (ab > 0).all() and (ab < 1).all() and (ab.diff() < 0).all() and ab[-1] < .01, T


@pytest.mark.parametrize("t", [0, 299, 999])
def test_q_sample_has_the_mean_and_variance_of_its_level(t):
    z = torch.full((20000, 1, 1, 1), 1.7)
    z_t = q_sample(z, torch.randn_like(z), AB[t].item())
    assert z_t.mean().item() == pytest.approx(1.7 * AB[t].item() ** .5, abs=.03) and z_t.var().item() == pytest.approx(1 - AB[t].item(), rel=.04)
    assert q_sample(torch.randn_like(z), torch.randn_like(z), AB[t].item()).var().item() == pytest.approx(1, rel=.04)       # unit spread stays


def test_q_sample_takes_a_level_an_image_and_is_undone_by_who_knows_the_noise():
    z, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 299, 500, 999])
    z_t = q_sample(z, eps, AB[t])
    for i, ab in enumerate(AB[t].tolist()):
        assert torch.allclose(z_t[i], ab ** .5 * z[i] + (1 - ab) ** .5 * eps[i], atol=1e-6)
        assert torch.allclose((z_t[i] - (1 - ab) ** .5 * eps[i]) / ab ** .5, z[i], atol=1e-3)


# ---------------------------------------------------------------------------------------------- the way back
def test_fifty_of_a_thousand_levels_are_981_to_1_as_in_ddim():
    assert levels(1000, 50) == list(range(981, 0, -20)) and levels(300, 0) == levels(300, 300) == levels(300, 999) == list(range(299, -1, -1))


def test_a_single_step_begins_where_there_is_most_noise():
    assert levels(1000, 1) == [999] and levels(200, 1) == [199] and levels(1, 1) == [0]


def test_levels_fall_inside_the_range_without_repetition():
    for start, n in itertools.product(range(1, 41), range(1, 45)):
        found = levels(start, n)
        assert len(found) == min(n, start) and start > found[0] and found[-1] >= 0 and (np.diff(found) < 0).all(), (start, n)


PAIRS = [(.3, .4), (.00014, .5), (.40911, .41), (.9, .9985), (.9985, 1.)]


@pytest.mark.parametrize("ab_t, ab_s", PAIRS)
def test_a_step_with_eta_1_is_ddpms_posterior_and_with_eta_0_ddims(ab_t, ab_s):
    z_t, eps, noise = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64)
    z_0 = (z_t - (1 - ab_t) ** .5 * eps) / ab_t ** .5
    assert torch.allclose(reverse_step(z_t, eps, noise, ab_t, ab_s, 1.), ddpm_step(z_t, z_0, noise, ab_t, ab_s), atol=1e-10)
    assert torch.allclose(reverse_step(z_t, eps, noise, ab_t, ab_s, 0.), ddim_step(eps, z_0, ab_s), atol=1e-10)


def stand_in(unet):
    """All that `reverse` asks of networks when nothing leads."""
    return SimpleNamespace(unet=unet, alpha_bar=AB.float())


class Knows(nn.Module):
    """A denoiser that knows the clean latents, and keeps what it is asked."""

    def __init__(self, z_0):
        super().__init__()
        self.z_0, self.asked = z_0, []

    def forward(self, z, t):
        self.asked.append((t[0].item(), z))
        ab = AB[t].view(-1, 1, 1, 1)
        return ((z - ab.sqrt() * self.z_0) / (1 - ab).sqrt()).float()


@pytest.mark.parametrize("start, n", [(1000, 50), (1000, 1), (300, 0), (300, 7), (1, 0), (2, 1)])
def test_ddim_of_who_knows_the_image_goes_back_on_the_very_noise_it_came_by(start, n):
    z_0, eps = torch.randn(2, 3, 2, 4, 4)
    oracle, first = Knows(z_0), levels(start, n)[0]
    end = mediffusion.reverse(stand_in(oracle), tiny(), q_sample(z_0, eps, AB[first]), start, n, 0., list("abc"))
    assert torch.allclose(end, z_0, atol=1e-4) and [t for t, _ in oracle.asked] == levels(start, n)
    for t, z in oracle.asked:
        assert torch.allclose(z, q_sample(z_0, eps, AB[t]), atol=1e-2)


@pytest.mark.parametrize("eta", [.5, 1.])
def test_ancestral_steps_of_who_knows_the_image_have_each_levels_mean_and_variance_and_end_at_it(eta):
    z_0 = torch.full((1, 1, 120, 120), .8)
    oracle = Knows(z_0)
    end = mediffusion.reverse(stand_in(oracle), tiny(), q_sample(z_0, torch.randn_like(z_0), AB[299]), 300, 0, eta, ["a"])
    assert torch.allclose(end, z_0, atol=1e-4) and len(oracle.asked) == 300
    for t, z in oracle.asked[::25]:
        assert z.var().item() == pytest.approx(1 - AB[t].item(), rel=.08) and z.mean().item() == pytest.approx(.8 * AB[t].item() ** .5, abs=.03)
    (_, a), (_, b) = oracle.asked[0], oracle.asked[-1]
    assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < (.99 if eta < 1 else .1)                    # noise was added on the way


@torch.no_grad()
def test_the_noise_of_a_step_goes_by_the_image_and_not_by_its_neighbours():
    nets, z = networks(tiny()), torch.randn(3, 2, 8, 8)
    back = lambda rows, names: mediffusion.reverse(nets, tiny(), z[rows], 300, 4, 1., names)
    whole = back([0, 1, 2], list("abc"))
    assert torch.allclose(back([2], ["c"]), whole[2:], atol=1e-4) and not torch.allclose(back([2], ["d"]), whole[2:], atol=1e-2)


@torch.no_grad()
def test_a_drawn_image_depends_on_its_name_and_lies_in_the_range_of_images():
    config = tiny(draw_steps=3)
    nets = networks(config)
    nets.latent_scale.fill_(.01)                                        # decoded far outside of it
    draw = lambda names, scale, k=0: mediffusion.draw(nets, config, torch.full((len(names),), k), names, scale, CPU)
    a, b = draw(["a", "b"], 0.), draw(["b"], 0.)
    assert a.shape == (2, 1, 16, 16) and a.abs().max() == 1 and torch.allclose(a[1:], b, atol=1e-4) and not torch.allclose(a[:1], b, atol=1e-2)
    assert torch.equal(draw(["b"], 0., 2), b) and not torch.allclose(draw(["b"], 3e4), draw(["b"], 3e4, 2), atol=1e-3)


def test_a_drawn_image_is_led_to_its_label_from_pure_noise(monkeypatch):
    asked, nets = [], networks(tiny())
    monkeypatch.setattr(mediffusion, "reverse", lambda nets, config, z, *args: asked.append((z, *args)) or z)
    mediffusion.draw(nets, tiny(draw_steps=7, eta=.5), torch.tensor([2, 0]), ["a", "b"], 30., CPU)
    (z, start, steps, eta, names, aim), = asked
    assert (start, steps, eta, names, aim.scale) == (1000, 7, .5, ["a", "b"], 30.) and aim.label.tolist() == [2, 0] and aim.enforce.tolist() == [True, True]
    assert torch.equal(z, run.image_noise(0, ["a", "b"], nets.shape, CPU)) and aim.z is aim.logits is None


# ---------------------------------------------------------------------------------------------- guidance
class Linear:
    """All that `guided` asks of networks: the U-Net says slope * z, the classifier is linear in the mean pixel of what it sees."""

    def __init__(self, W, slope=0., multilabel=True):
        self.W, self.slope, self.multilabel, self.alpha_bar, self.unet, self.times = W, slope, multilabel, AB.float(), self, []

    def __call__(self, z, t):
        return self.slope * z

    def pooled(self, z, t):
        self.times.append(t.tolist())
        return z.mean((2, 3))

    def head(self, h):
        return h @ self.W.T


W = torch.tensor([[1., -.5], [.3, .8], [-1.2, .4]])                     # three labels of two channels
KINDS = [dict(guide_on="x0hat", guide_through="unet"), dict(guide_on="x0hat", guide_through="encoder"), dict(guide_on="zt")]


def aims(k, enforce, scale=1., **given):
    return Aim(torch.as_tensor(k), torch.as_tensor(enforce), scale, **given)


@pytest.mark.parametrize("multilabel", [True, False])
@pytest.mark.parametrize("given", KINDS, ids=str)
@pytest.mark.parametrize("t", [0, 299, 900])
def test_guidance_is_s_times_the_noise_times_the_gradient_of_a_linear_classifier(given, multilabel, t):
    """Worked out by hand: d own / d z = W_k, of one label of several against the others W_k - sum of q_j W_j, over the pixels, times d seen / d z."""
    config, nets, z, ab, s = tiny(**given), Linear(W, .4, multilabel), torch.randn(4, 2, 3, 3), AB[t].item(), 7.
    k, enforce = [0, 1, 2, 0], [True, False, True, False]
    of_z = {"unet": (1 - .4 * (1 - ab) ** .5) / ab ** .5, "encoder": ab ** -.5}[config.guide_through] if config.guide_on == "x0hat" else 1.
    seen = z * (1 - .4 * (1 - ab) ** .5) / ab ** .5 if config.guide_on == "x0hat" else z
    found = mediffusion.guided(nets, config, z, t, aims(k, enforce, s))
    for i in range(4):
        logits, others = W @ seen[i].mean((1, 2)), [j for j in range(3) if j != k[i]]
        q = logits[others].softmax(0)
        own = logits[k[i]] - (0 if multilabel else logits[others].logsumexp(0))
        to = W[k[i]] - (0 if multilabel else sum(q_j * W[j] for q_j, j in zip(q, others)))
        sign = 1 if enforce[i] else -1
        gradient = -sign * torch.sigmoid(-sign * own) * to * of_z / 9
        wanted = .4 * z[i] + s * (1 - ab) ** .5 * gradient[:, None, None]
        assert torch.allclose(found[i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", KINDS, ids=str)
@pytest.mark.parametrize("multilabel", [True, False])
@torch.no_grad()
def test_enforcing_raises_the_label_and_removing_lowers_it(given, multilabel):
    z, names = torch.randn(4, 2, 3, 3), list("abcd")
    nets, k = Linear(W, .3, multilabel), [0, 1, 2, 0]
    logits = {}
    for enforce in (True, False):
        config = tiny(**given)
        step = lambda eps: reverse_step(z, eps, 0., AB[299].item(), AB[298].item(), 0.)
        one = [nets.head(nets.pooled(step(eps), torch.zeros(4))) for eps in (mediffusion.guided(nets, config, z, 299, aims(k, [enforce] * 4, 20.)), .3 * z)]
        way = [nets.head(nets.pooled(mediffusion.reverse(nets, config, z, 300, 10, 0., names, aim), torch.zeros(4))) for aim in (aims(k, [enforce] * 4, 20.), None)]
        for led, control in (one, way):
            p, q = ((x.sigmoid() if multilabel else x.softmax(1))[range(4), k] for x in (led, control))
            assert ((p > q) if enforce else (p < q)).all()
        logits[enforce] = way[0] - way[1]
    assert not torch.equal(logits[True], logits[False])


@torch.no_grad()
def test_one_of_several_labels_is_led_and_those_independent_of_it_stay():
    nets, z = Linear(torch.eye(3)), torch.randn(2, 3, 4, 4)
    moved = mediffusion.guided(nets, tiny(), z, 299, aims([0, 2], [True, False], 50.))
    assert (moved[0, 0] < 0).all() and (moved[1, 2] > 0).all() and moved[0, 1:].abs().sum() == moved[1, :2].abs().sum() == 0


def objective(nets, config, z, t, aim, eps=None):
    """-log of the probability aimed at, summed, by other words, of networks in float64; eps: taken as constant."""
    ab, at = AB[t], torch.full((len(z),), t)
    eps = nets.unet(z, at) if eps is None else eps
    seen = z if config.guide_on == "zt" else (z - (1 - ab).sqrt() * eps) / ab.sqrt()
    maps = nets.unet.encode(seen, torch.zeros_like(at) if config.guide_clean else at)
    logits = nets.head(torch.cat([m.flatten(2).mean(2) for m in maps], 1))
    p = (logits.sigmoid() if nets.multilabel else logits.softmax(1)).gather(1, aim.label[:, None])[:, 0]
    return -torch.where(aim.enforce, p, 1 - p).log().sum()


@pytest.mark.parametrize("multilabel", [True, False])
@pytest.mark.parametrize("given", [*KINDS, dict(guide_clean=True), dict(guide_through="encoder", guide_clean=True)], ids=str)
def test_the_gradient_equals_finite_differences_through_what_is_classified(given, multilabel):
    """Of the U-Net's own guess of the clean latent, through both of its passes; with `encoder` as if what it says were constant; of z_t itself."""
    config, t, z = tiny(**given), 299, torch.randn(3, 2, 8, 8)
    nets, aim = networks(config, multilabel=multilabel), aims([0, 1, 2], [True, False, True], 11.)
    eps = nets.unet(z, torch.full((3,), t)).detach()
    found = (mediffusion.guided(nets, config, z, t, aim) - eps) / (11 * (1 - AB[t]).sqrt())
    double, z, h = copy.deepcopy(nets).double(), z.double(), 1e-4
    fixed = double.unet(z, torch.full((3,), t)).detach() if config.guide_through == "encoder" else None
    with torch.no_grad():
        for _ in range(4):
            d = torch.randn_like(z)
            slope = (objective(double, config, z + h * d, t, aim, fixed) - objective(double, config, z - h * d, t, aim, fixed)) / (2 * h)
            assert slope.item() == pytest.approx((found * d).sum().item(), rel=1e-3, abs=1e-5) and abs(slope) > 1e-5


def test_led_by_z_t_eps_is_the_unets_own_and_the_gradient_is_that_of_eq_2():
    config, nets, z, t = tiny(guide_on="zt"), networks(tiny()), torch.randn(2, 2, 8, 8), 120
    aim, at = aims([2, 0], [True, True], 5.), torch.full((2,), t)
    (wanted,) = torch.autograd.grad(F.logsigmoid(nets.head(nets.pooled(z.requires_grad_(), at))).gather(1, aim.label[:, None]).sum(), z)
    assert torch.allclose(mediffusion.guided(nets, config, z, t, aim), nets.unet(z, at) - 5 * (1 - AB[t]).sqrt().float() * wanted, atol=1e-5)


@pytest.mark.parametrize("given", [*KINDS, dict(guide_unit=True), dict(hold_labels=.3, hold_latent=2.)], ids=str)
def test_no_image_of_a_batch_is_led_by_another(given):
    config, z = tiny(**given), torch.randn(3, 2, 8, 8)
    nets, aim = networks(config), aims([0, 1, 2], [True, False, True], 400., z=torch.zeros(3, 2, 8, 8), logits=torch.zeros(3, 3))
    whole = mediffusion.guided(nets, config, z, 299, aim)
    for i in range(3):
        one = mediffusion.guided(nets, config, z[i:i + 1], 299, Aim(*(x if isinstance(x, float) else x[i:i + 1] for x in aim)))
        assert torch.allclose(one, whole[i:i + 1], rtol=1e-3, atol=1e-4)
    twice = mediffusion.guided(nets, config, z.repeat(2, 1, 1, 1), 299, Aim(*(x if isinstance(x, float) else torch.cat([x, x]) for x in aim)))
    assert torch.allclose(twice[:3], whole, rtol=1e-3, atol=1e-4)       # a sum over the batch, no mean


@pytest.mark.parametrize("scale", [1., 30.])
def test_at_unit_length_the_gradient_is_as_long_as_noise_however_sure_the_classifier_is(scale):
    nets, z, aim = networks(tiny()), torch.randn(3, 2, 8, 8), aims([0, 1, 2], [True, False, True], scale)
    plain, unit = (mediffusion.guided(nets, tiny(guide_unit=on), z, 299, aim) - nets.unet(z, torch.full((3,), 299)).detach() for on in (False, True))
    length = unit.flatten(1).norm(dim=1)
    assert torch.allclose(length, torch.full((3,), scale * (1 - AB[299].item()) ** .5 * 128 ** .5), rtol=1e-3)
    assert torch.allclose(F.cosine_similarity(plain.flatten(1), unit.flatten(1)), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("unit", [False, True])
def test_guidance_rests_where_the_goal_is_reached(unit):
    z, nets = torch.zeros(4, 2, 3, 3), Linear(torch.eye(2))
    z[0, 0], z[1, 0], z[2, 0], z[3, 0] = 2., -2., 2., -2.               # of label 0: p .88, .12, .88, .12
    led = mediffusion.guided(nets, tiny(guide_on="zt", guide_goal=.8, guide_unit=unit), z, 299, aims([0] * 4, [True, True, False, False], 10.))
    assert [bool(x.any()) for x in led] == [False, True, True, False]
    held = mediffusion.guided(nets, tiny(guide_goal=.8, guide_unit=unit, hold_latent=1.), z, 299, aims([0] * 4, [True, True, False, False], 10., z=z + 1))
    assert [bool(x.any()) for x in held] == ([False, True, True, False] if unit else [True] * 4)          # of unit length what holds would lead by itself
    assert all(x.any() for x in mediffusion.guided(nets, tiny(guide_on="zt", guide_unit=unit), z, 299, aims([0] * 4, [True, True, False, False], 10.)))


@pytest.mark.parametrize("labels, latent", [(.7, 0.), (0., 3.), (.7, 3.)])
def test_hold_terms_add_the_gradient_of_the_squared_change_of_other_labels_and_of_the_latent(labels, latent):
    """By hand, for a U-Net that says nothing: what is seen is z_t / sqrt(ab)."""
    nets, z, z_0, logits, ab = Linear(W), torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3), torch.randn(2, 3), AB[299].item()
    aim = aims([0, 1], [True, False], 4., z=z_0, logits=logits)
    free, held = (mediffusion.guided(nets, tiny(hold_labels=a, hold_latent=b), z, 299, aim) for a, b in ((0., 0.), (labels, latent)))
    for i, k in enumerate((0, 1)):
        seen = z[i] / ab ** .5
        change = W @ seen.mean((1, 2)) - logits[i]
        gradient = sum(2 * labels * change[j] * W[j] for j in range(3) if j != k)[:, None, None] / 9 + 2 * latent * (seen - z_0[i]) / 18
        assert torch.allclose(held[i] - free[i], 4 * (1 - ab) ** .5 * gradient / ab ** .5, rtol=1e-3, atol=1e-5)
    assert torch.equal(mediffusion.guided(nets, tiny(hold_labels=labels, hold_latent=latent), z, 299, aims([0, 1], [True, False], 4.)), free)
    noisy, same = (mediffusion.guided(nets, tiny(guide_on="zt", hold_labels=a, hold_latent=b), z, 299, aim) for a, b in ((0., 0.), (labels, latent)))
    assert torch.equal(noisy, same)                                     # z_t is noise; what is to be held is not


@pytest.mark.parametrize("given", [dict(), dict(guide_clean=True), dict(guide_on="zt", guide_clean=True)], ids=str)
def test_the_guess_is_classified_at_its_level_or_as_a_clean_one_and_z_t_at_its_own(given):
    nets = Linear(W)
    mediffusion.guided(nets, tiny(**given), torch.randn(2, 2, 3, 3), 200, aims([0, 1], [True, True]))
    assert nets.times == ([[0, 0]] if given == dict(guide_clean=True) else [[200, 200]])


@pytest.mark.parametrize("on", ["x0hat", "zt"])
def test_another_classifier_leads_by_the_decoded_image(on):
    config, z, t = tiny(guide="file", guide_on=on), torch.randn(2, 2, 8, 8), 299
    nets, other = networks(tiny()), ResNet(18, 1, 3, 8, "small", False).eval()
    nets.guide = [other]
    nets.latent_scale.fill_(.5)
    found = mediffusion.guided(nets, config, z, t, aims([0, 2], [True, False], 9.))
    z.requires_grad_()
    eps = nets.unet(z, torch.full((2,), t))
    seen = z if on == "zt" else (z - (1 - AB[t]).sqrt().float() * eps) / AB[t].sqrt().float()
    logits = other(nets.autoencoder.decode(seen / .5))
    (gradient,) = torch.autograd.grad(-F.logsigmoid(logits[0, 0]) - F.logsigmoid(-logits[1, 2]), z)
    assert torch.allclose(found, eps + 9 * (1 - AB[t]).sqrt().float() * gradient, rtol=1e-3, atol=1e-4) and gradient.any()


def test_the_answers_that_are_held_are_of_who_guides(monkeypatch):
    config, x, seen = tiny(guide="file", hold_labels=1., remove_start=20, edit_steps=2), torch.rand(2, 1, 16, 16) * 2 - 1, []
    nets, other = networks(tiny()), ResNet(18, 1, 3, 8, "small", False).eval()
    nets.guide = [other]
    monkeypatch.setattr(mediffusion, "guided", lambda nets, config, z, t, aim: seen.append(aim.logits) or torch.zeros_like(z))
    with torch.no_grad():
        mediffusion.counterfactual(nets, config, x, torch.tensor([0, 1]), False, list("ab"))
        assert torch.allclose(seen[0], other(nets.decoded(nets.latents(x))), atol=1e-5)


@pytest.mark.parametrize("eta", [0., 1.])
def test_with_a_scale_of_zero_the_counterfactual_is_the_control_bit_by_bit(eta):
    config, x = tiny(remove_scale=0., enforce_scale=1e4, remove_start=40, enforce_start=40, edit_steps=4, edit_eta=eta), torch.rand(3, 1, 16, 16) * 2 - 1
    nets, label = networks(config), torch.tensor([0, 1, 2])
    guided, control = mediffusion.counterfactual(nets, config, x, label, False, list("abc"))
    assert torch.equal(guided, control)
    led, same_way = mediffusion.counterfactual(nets, config, x, label, True, list("abc"))
    assert torch.equal(same_way, control) and not torch.allclose(led, control, atol=1e-3)                 # one noise for all, whatever the aim


def test_a_change_is_held_by_the_fewest_pixels_and_those_of_its_squares():
    change = torch.zeros(3, 2, 6, 6)
    change[0, :, 1, 1], change[0, 0, 4, 4] = 3., 1.                     # energies 9 and .5
    change[1, 1, 2, 2] = 1.
    for share, kept in ((.9, [[7], [14]]), (1., [[7, 28], [14]]), (.5, [[7], [14]])):
        mask = mediffusion.strongest(change, share, 1)
        assert mask.shape == (3, 1, 6, 6) and [m.flatten().nonzero()[:, 0].tolist() for m in mask] == [*kept, []]
    around = mediffusion.strongest(change[1:2], 1., 3)                  # averaged over squares, each of the nine holds a ninth
    assert around[0, 0, 1:4, 1:4].all() and around.sum() == 9 and mediffusion.strongest(change[1:2], .5, 3).sum() == 5
    x = torch.randn(4, 1, 9, 9)
    for share in (.2, .5, .8):
        mask, energy = mediffusion.strongest(x, share, 1), x.square()
        held = (energy * mask).sum((1, 2, 3)) / energy.sum((1, 2, 3))
        one_less = held - torch.where(mask, energy, torch.inf).amin((1, 2, 3)) / energy.sum((1, 2, 3))
        assert (held >= share - 1e-6).all() and (one_less < share).all() and (torch.where(mask, energy, torch.inf).amin((1, 2, 3)) >= (energy * ~mask).amax((1, 2, 3))).all()


def test_outside_of_what_is_kept_a_counterfactual_is_the_control_and_inside_it_is_as_if_all_were_kept():
    given, x = dict(enforce_scale=1e4, enforce_start=40, edit_steps=4), torch.rand(3, 1, 16, 16) * 2 - 1
    nets, label, names = networks(tiny(**given)), torch.tensor([0, 1, 2]), list("abc")
    whole, control = mediffusion.counterfactual(nets, tiny(**given), x, label, True, names)
    led, same_way = mediffusion.counterfactual(nets, tiny(edit_keep=.5, **given), x, label, True, names)
    mask = mediffusion.strongest(whole - control, .5, 1)
    assert torch.equal(same_way, control) and torch.equal(led, torch.where(mask, whole, control)) and 0 < mask.float().mean() < .5
    assert torch.equal(mediffusion.counterfactual(nets, tiny(edit_keep=0., **given), x, label, True, names)[0], control)
    assert configure(data="toy_xray", recipe="paper").edit_keep == 1 and configure(data="toy_xray").edit_keep < 1


@pytest.mark.parametrize("steps", [0, 7, 25])
def test_who_knows_the_noise_gets_the_image_back_for_it_is_denoised_at_the_level_it_was_noised_to(steps, monkeypatch):
    config, x = tiny(remove_scale=0., edit_steps=steps, edit_eta=0.), torch.rand(2, 1, 16, 16) * 2 - 1
    nets, eps = networks(config), torch.randn(2, 2, 8, 8)
    monkeypatch.setattr(run, "image_noise", lambda *args: eps)
    monkeypatch.setattr(nets.unet, "forward", lambda z, t: eps)
    _, control = mediffusion.counterfactual(nets, config, x, torch.tensor([0, 1]), False, ["a", "b"])
    assert torch.allclose(control, nets.decoded(nets.latents(x)).clamp(-1, 1), atol=1e-3)


@pytest.mark.parametrize("enforce, start, scale", [(False, 300, 500.), (True, 200, 200.)])
def test_a_finding_is_removed_from_level_300_and_enforced_from_200(enforce, start, scale, monkeypatch):
    asked, nets = [], networks(tiny())
    monkeypatch.setattr(mediffusion, "reverse", lambda nets, config, z, *args: asked.append((z, *args)) or z)
    config, x = tiny(hold_labels=1.), torch.rand(2, 1, 16, 16) * 2 - 1
    mediffusion.counterfactual(nets, config, x, torch.tensor([0, 1]), enforce, ["a", "b"])
    (z, first, steps, eta, names, aim), control = asked
    assert (first, steps, eta, names, aim.scale) == (start, 0, 1., ["a", "b"], scale) and aim.enforce.tolist() == [enforce] * 2 and aim.label.tolist() == [0, 1]
    assert control[-1] is None and torch.equal(control[0], z) and torch.equal(aim.z, nets.latents(x))
    assert torch.allclose(aim.logits, nets.head(nets.pooled(aim.z, torch.zeros(2))), atol=1e-5)


# ---------------------------------------------------------------------------------------------- training
def test_the_diffusion_loss_is_the_mean_square_of_the_noise_that_was_missed(monkeypatch):
    z, asked = torch.randn(300, 2, 8, 8), []
    nets = SimpleNamespace(alpha_bar=AB.float(), unet=lambda z_t, t: asked.append((z_t, t)) or torch.zeros_like(z_t))
    found = mediffusion.diffusion_loss(nets, tiny(), z)
    (z_t, t), = asked
    ab = AB[t].float().view(-1, 1, 1, 1)
    square = ((z_t - ab.sqrt() * z) / (1 - ab).sqrt()).square().mean((1, 2, 3))
    assert found["diffusion"].item() == pytest.approx(square.mean().item(), rel=1e-3) and .9 < square.mean() < 1.1
    total, n = found["error_by_t"]
    assert n.tolist() == np.bincount(t.numpy() // 100, minlength=10).tolist() and total.sum().item() == pytest.approx(square.sum().item(), rel=1e-3)
    assert t.min() < 20 and t.max() > 980


def test_who_knows_the_noise_has_no_loss():
    z = torch.randn(8, 2, 4, 4)
    assert mediffusion.diffusion_loss(stand_in(Knows(z)), tiny(), z)["diffusion"] < 1e-4


def test_single_labels_are_a_softmax_and_several_are_sigmoids_of_what_is_known():
    logits, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    assert torch.equal(mediffusion.class_loss(logits, y), F.cross_entropy(logits, y))
    y = torch.tensor([[0., 1, 1], [1, -1, 0], [-1, -1, -1], [0, 0, 0], [1, -1, 1]])
    total = n = 0
    for i, k in np.ndindex(5, 3):
        if y[i, k] >= 0:
            p = torch.sigmoid(logits[i, k])
            total, n = total - (p if y[i, k] else 1 - p).log().item(), n + 1
    assert n == 10 and mediffusion.class_loss(logits, y).item() == pytest.approx(total / n, rel=1e-5)
    assert mediffusion.class_loss(logits, torch.full((5, 3), -1.)) == 0
    whole = (y > 0).float()
    assert torch.allclose(mediffusion.class_loss(logits, whole), F.binary_cross_entropy_with_logits(logits, whole))


def test_the_classification_loss_is_absent_before_its_start_and_on_idle_steps():
    config = tiny(cls_start=3, cls_every=2, epochs=40)
    present = []
    for nets, _, _, losses in stepping(config, pictures(12, few=[1, 5, 6, 7]), n=9):
        present.append("classifier" in losses)
        assert present[-1] or torch.equal(losses["loss"], losses["diffusion"])
        assert all((p.grad is not None) == present[-1] for p in nets.head.parameters())
    assert present == [step >= 3 and step % 2 == 0 for step in range(9)]


def test_the_classifier_of_a_short_run_begins_to_learn_after_a_tenth_of_its_steps():
    config = tiny(cls_start=5000, cls_every=1, epochs=10)               # of three steps each
    assert ["classifier" in losses for *_, losses in stepping(config, pictures(12, few=[1, 5, 6, 7]), n=5)] == [False, False, False, True, True]


def test_without_diffusion_and_without_control_every_step_still_has_a_loss():
    config = tiny(variant="no_diffusion", cls_start=3, cls_every=2)
    for _, _, _, losses in stepping(config, pictures(8, few=range(8)), n=4):
        assert losses["loss"].requires_grad


@pytest.mark.parametrize("given", [dict(cls_weight=.3), dict(cls_weight=.3, consistency=2., cls_noise=30, baseline=True)], ids=str)
def test_the_loss_is_the_weighted_sum_of_its_parts(given):
    config, weight = tiny(**given), {"diffusion": 1., "resnet": 1., "classifier": .3, "consistency": 2., "error_by_t": 0.}
    nets = networks(config)
    nets.cls_weight.fill_(.3)
    for _, _, _, losses in stepping(config, pictures(8, few=[0, 3, 4]), nets, n=3):
        total = losses.pop("loss")
        assert total.item() == pytest.approx(sum(weight[k] * v.sum().item() for k, v in losses.items()), rel=1e-5)
        assert set(losses) == {"diffusion", "error_by_t", "classifier"} | ({"consistency", "resnet"} if config.baseline else set())


def test_the_consistency_term_pulls_towards_what_the_average_network_says_of_clean_latents(monkeypatch):
    config, asked = tiny(consistency=1., variant="no_diffusion", dropout=0., cls_noise=30), []
    monkeypatch.setattr(mediffusion, "features", lambda nets, config, z, real=mediffusion.features: asked.append((nets, config.cls_noise)) or real(nets, config, z))
    for nets, ema, _, losses in stepping(config, pictures(8, few=range(4)), n=2):
        assert {(of is ema, noise) for of, noise in asked} == {(True, 0), (False, 30)} and losses["consistency"] > 0
        assert all(p.grad is None for p in ema.parameters()) and all(p.grad is not None for p in nets.head.parameters())
    for *_, losses in stepping(dataclasses.replace(config, cls_noise=0), pictures(8, few=range(4)), n=1):
        assert losses["consistency"] == 0                              # one network, one latent


@pytest.mark.parametrize("multilabel", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_hidden_labels_are_never_read(multilabel, balanced):
    """Poisoned, they change no loss by a bit."""
    config, few, found = tiny(baseline=True, consistency=1., balanced=balanced, batch_size=4), [1, 5, 6, 7, 8], []
    hidden = np.setdiff1d(np.arange(12), few)
    for poison in (-1, 1, np.nan if multilabel else 10 ** 6):
        split = pictures(12, multilabel=multilabel, few=few)
        split.labels[hidden] = poison
        losses = [losses for stage in (1, 2) for *_, losses in stepping(config, split, networks(config, multilabel=multilabel), n=2, stage=stage)]
        found.append([{k: v.tolist() for k, v in each.items()} for each in losses])
    assert found[0] == found[1] == found[2] and all(np.isfinite(each["loss"]) for each in found[0])


def test_shown_labels_are_read():
    config, few, found = tiny(), [1, 5, 6, 7, 8], []
    for wrong in (False, True):
        split = pictures(12, few=few)
        split.labels[few] = 1 - split.labels[few] if wrong else split.labels[few]
        found.append([losses["classifier"].item() for *_, losses in stepping(config, split, n=2)])
    assert found[0] != found[1]


def test_images_with_labels_are_diffused_too_and_those_alone_are_classified(monkeypatch):
    config, split, few, seen, nets = tiny(augment=""), pictures(11, few=[1, 5, 6]), {1, 5, 6}, [], networks(tiny())
    nets.autoencoder.quant_conv.weight.data[2:], nets.autoencoder.quant_conv.bias.data[2:] = 0, -30.      # the posterior is its mean
    monkeypatch.setattr(mediffusion, "diffusion_loss", lambda nets, config, z, real=mediffusion.diffusion_loss: seen.append(z) or real(nets, config, z))
    diffused, classified = Counter(), Counter()
    for _, _, batch, _ in stepping(config, split, nets, n=3):
        assert torch.allclose(seen[-1], nets.latents(batch.x), atol=.02)
        diffused.update(batch.index.tolist())
        classified.update(batch.few.index.tolist())
    assert diffused == dict.fromkeys(range(11), 1) and set(classified) == few and sum(classified.values()) == 9


@pytest.mark.parametrize("share, found", [(.02, (1e-5, 5e-5)), (.024, (1e-5, 5e-5)), (.05, (2e-5, 1.5e-4)), (.0596, (2e-5, 1.5e-4)), (.1, (5e-5, 1e-3)),
                                          (.118, (5e-5, 1e-3)), (.2, (5e-5, 1e-3)), (1., (5e-5, 1e-3))])
def test_rate_and_weight_of_the_classifier_are_the_papers_for_each_share_of_labels(share, found):
    assert mediffusion.by_share(share) == found


def initialised(share, **given):
    n = 1000
    config = tiny(**given)
    nets = networks(config)
    mediffusion.initialise(nets, SimpleNamespace(train=pictures(n, size=1, few=range(round(n * share)))), config)
    return nets, config


def test_rate_and_weight_go_by_how_many_labels_there_are_unless_they_are_given():
    for share, rate, weight in ((.02, 1e-5, 5e-5), (.5, 5e-5, 1e-3)):
        nets, _ = initialised(share, head_lr=0., cls_weight=0.)
        assert nets.head_lr.item() == pytest.approx(rate) and nets.cls_weight.item() == pytest.approx(weight)
    nets, _ = initialised(.02, head_lr=.3, cls_weight=.7)
    assert nets.head_lr.item() == pytest.approx(.3) and nets.cls_weight.item() == pytest.approx(.7)


def test_for_isic_rate_and_weight_are_the_same_at_every_share_and_there_is_no_wait():
    config = configure(data="isic2019", labels="0.02")
    assert (config.head_lr, config.cls_weight, config.cls_start) == (5e-5, 1e-3, 0)


def test_the_optimizer_holds_every_weight_once_at_the_rate_of_its_part():
    nets, config = initialised(.5, gan_weight=.5, baseline=True, lr=2e-4, ae_lr=3e-5, head_lr=7e-4, clip=1.5, size=32)
    groups = {g["name"]: g for g in mediffusion.parameter_groups(nets, config)}
    assert {k: (g["peak"], g["betas"], g["clip"], g["weight_decay"]) for k, g in groups.items()} == {
        "autoencoder": (3e-5, (.5, .9), 1.5, 0.), "discriminator": (3e-5, (.5, .9), 1.5, 0.), "resnet": (2e-4, (.9, .999), 1.5, 0.),
        "diffusion": (2e-4, (.9, .999), 1.5, 0.), "classifier": (pytest.approx(7e-4), (.9, .999), 1.5, 0.)}
    assert sorted(id(p) for g in groups.values() for p in g["params"]) == sorted(id(p) for p in nets.parameters())


def test_at_the_papers_settings_the_learning_rate_is_constant_from_the_first_step_of_a_stage():
    config = configure(data="chestxray14")
    begin = config.pretrain_epochs
    assert {mediffusion.learning_rate(config, dict(name="autoencoder", peak=3.), e) for e in (0, 1e-3, 7.5, begin - .01)} == {3.}
    assert {mediffusion.learning_rate(config, dict(name="diffusion", peak=3.), e) for e in (begin, begin + 1e-3, begin + config.epochs - .01)} == {3.}


@pytest.mark.parametrize("name, begin, length", [("autoencoder", 0, 10), ("discriminator", 0, 10), ("diffusion", 10, 40), ("classifier", 10, 40), ("resnet", 10, 40)])
def test_with_a_warm_up_the_learning_rate_rises_and_falls_on_a_cosine_within_each_stage(name, begin, length):
    config = Config(pretrain_epochs=10, epochs=40, warmup=.1, decay="cosine")
    rate = [mediffusion.learning_rate(config, dict(name=name, peak=2.), begin + length * e) for e in np.linspace(0, 1, 201)]
    assert rate[0] < .1 and (np.diff(rate[:20]) > 0).all() and (np.diff(rate[20:]) < 0).all() and abs(rate[-1]) < 1e-6
    assert rate[100] == pytest.approx(1., rel=1e-6)


# ---------------------------------------------------------------------------------------------- the autoencoder and its latents
def test_the_first_stage_trains_the_autoencoder_alone_by_error_and_kl():
    config = tiny(gan_weight=0., baseline=True, kl_weight=.5)
    for nets, _, batch, losses in stepping(config, pictures(8, few=[0, 1]), n=2, stage=1):
        assert set(losses) == {*mediffusion.PANELS[1][2], "kl", "loss"}
        assert all(p.grad is None for part in (nets.unet, nets.head, nets.resnet) for p in part.parameters()) and all(p.grad is not None for p in nets.autoencoder.parameters())
    torch.manual_seed(3)
    found = mediffusion.autoencoder_loss(nets, config, batch.x, 0)
    torch.manual_seed(3)
    mean, logvar = nets.autoencoder.encode(batch.x)
    x_hat = nets.autoencoder.decode(mean + (logvar / 2).exp() * torch.randn_like(mean))
    wanted = ((batch.x - x_hat).abs() + pyramid(batch.x, x_hat)).sum() / 4 + .5 * kl(mean, logvar).mean()
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_discriminator_joins_at_its_step_and_learns_nothing_before():
    config = tiny(gan_weight=.5, gan_start=3, size=32)
    for step, (nets, _, _, losses) in enumerate(stepping(config, pictures(8, 32), n=6, stage=1)):
        assert ("discriminator" in losses) == (step >= 3) and all((p.grad is not None) == (step >= 3) for p in nets.discriminator.parameters())
        if step >= 3:
            assert losses["loss"].isfinite() and losses["discriminator"] > 0
    assert step == 5 and networks(tiny(gan_weight=0., size=32)).discriminator is None


def worn(nets, ema):
    """As after the first stage: the average is not the last weights."""
    for p in ema.autoencoder.parameters():
        p.data += .05 * torch.randn_like(p)


def test_as_the_second_stage_begins_the_autoencoder_is_its_average_and_latents_have_unit_spread():
    config, x = tiny(), torch.rand(6, 1, 16, 16) * 2 - 1
    nets = networks(config)
    ema = average(nets)
    worn(nets, ema)
    nets.freeze(ema, x)
    assert same(nets.autoencoder.state_dict(), ema.autoencoder.state_dict()) and nets.latent_scale == ema.latent_scale != 1
    z = nets.latents(x)
    assert z.std().item() == pytest.approx(1, rel=1e-4) and torch.equal(z, ema.latents(x))
    assert torch.allclose(z, ema.autoencoder.encode(x)[0] * ema.latent_scale) and torch.allclose(nets.decoded(z), nets.autoencoder.decode(z / nets.latent_scale))
    before = tensors(nets)
    worn(nets, ema)
    nets.freeze(ema, 5 * x)                                             # once: not again
    assert same(before, tensors(nets))


@pytest.mark.parametrize("scale", [1., .18215])
def test_a_scale_that_is_given_is_taken(scale):
    nets, x = networks(tiny(latent_scale=scale)), torch.rand(3, 1, 16, 16)
    nets.freeze(average(nets), x)
    assert nets.latent_scale.item() == pytest.approx(scale) and torch.allclose(nets.latents(x), nets.autoencoder.encode(x)[0] * scale)


def test_two_processes_measure_the_spread_of_the_whole_batch(tmp_path):
    x = torch.rand(5, 1, 16, 16) * torch.linspace(.1, 2, 5).view(-1, 1, 1, 1)

    def work(rank):
        nets = networks(tiny())
        nets.freeze(average(nets), x[rank::run.world()])
        return {"scale": nets.latent_scale.item()}
    alone = work(0)["scale"]
    assert [found["scale"] for found in processes(work, tmp_path)] == pytest.approx([alone] * 2, rel=1e-5)


def test_in_the_second_stage_the_autoencoder_does_not_move_and_its_average_is_itself():
    config, first = tiny(baseline=True, gan_weight=.5, size=32), None
    for nets, ema, _, _ in stepping(config, pictures(12, 32, few=[1, 2, 3, 4]), n=7):
        frozen = [tensors(part.autoencoder) for part in (nets, ema)] + [{"scale": part.latent_scale.clone()} for part in (nets, ema)]
        first = first or frozen
        assert all(same(a, b) for a, b in zip(first, frozen)) and same(*frozen[:2]) and same(*frozen[2:])
        assert all(p.grad is None for part in (nets.autoencoder, nets.discriminator) for p in part.parameters())


def test_no_layer_of_the_autoencoder_acts_otherwise_in_training():
    """Frozen, it is in whatever mode the networks around it are."""
    nets, x = networks(tiny()), torch.rand(2, 1, 16, 16)
    z = nets.latents(x)
    assert torch.equal(nets.train().latents(x), z) and torch.equal(nets.decoded(z), nets.eval().decoded(z))


@pytest.mark.parametrize("augment, variants", [("", 1), ("hflip", 2), ("hflip,vflip", 4)])
@torch.no_grad()
def test_latents_of_training_images_are_computed_once_a_variant_and_are_those_computed_anew(augment, variants):
    config, split, calls = tiny(augment=augment), pictures(10, few=[1, 2, 3]), []
    nets = networks(config)
    nets.autoencoder.encoder.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    augment = [a for a in augment.split(",") if a]
    for epoch in range(40):
        for batch in Batches(split, 4, train=True, augment=augment, start=epoch * 3):
            nets.latents(batch.few.x, batch.few, noise=True), nets.latents(batch.x, batch)
    assert len(nets.known) == 10 * variants and calls
    calls.clear()
    for batch in Batches(split, 4, train=True, augment=augment, start=123):
        for part in (batch, batch.few):
            z = nets.latents(part.x, part)
            assert not calls
            fresh = nets.latents(part.x)
            assert torch.equal(nets.latents(part.x, Batch(part.x, part.y, part.index)), fresh)          # made by hand: nobody knows how it was flipped
            calls.clear()
            assert torch.allclose(z, fresh, rtol=2e-3, atol=1e-3) and fresh.std() > .01 and z.dtype == torch.float32


@torch.no_grad()
def test_turned_images_and_those_of_no_training_batch_are_encoded_anew():
    nets, calls = networks(tiny()), []
    nets.autoencoder.encoder.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    for epoch in range(2):
        for batch in Batches(pictures(6), 3, train=True, augment=("rotate",), start=epoch * 2):
            nets.latents(batch.x, batch), nets.latents(batch.x)
    assert sum(calls) == 24 and not nets.known


@pytest.mark.parametrize("multilabel", [False, True])
def test_with_mirror_every_model_answers_for_the_image_and_its_mirror_images(multilabel):
    config, split = tiny(augment="hflip,vflip", mirror=True, baseline=True), pictures(6, multilabel=multilabel)
    nets = networks(config, multilabel=multilabel).eval()
    plain = dataclasses.replace(config, mirror=False)
    flipped = [dataclasses.replace(split, images=np.flip(split.images, dims).copy()) for dims in ((), 3, 2, (2, 3))]
    each = [mediffusion.evaluate(nets, part, plain, CPU)[0] for part in flipped]
    for model, p in mediffusion.evaluate(nets, split, config, CPU)[0].items():
        mean = lambda q: np.exp(np.log(q).mean(0))                      # of logits: of probabilities the geometric one, made to sum to 1
        several = np.stack([of[model] for of in each])
        expected = mean(several) / (mean(several) + mean(1 - several) if multilabel else mean(several).sum(1, keepdims=True))
        assert np.allclose(p, expected, atol=1e-5) and not np.allclose(each[0][model], each[1][model], atol=1e-5), model


@torch.no_grad()
def test_latents_are_a_sample_of_the_posterior_to_train_and_its_mean_to_test():
    nets = networks(tiny())
    nets.latent_scale.fill_(3.)
    nets.autoencoder.quant_conv.bias[2:] = 1.                           # log variance
    x = torch.rand(1, 1, 16, 16).expand(400, -1, -1, -1)
    mean, logvar = nets.autoencoder.encode(x[:1])
    z = nets.latents(x, noise=True)
    assert torch.allclose(nets.latents(x[:1]), 3 * mean) and torch.allclose(z.mean(0), 3 * mean[0], atol=1.5)
    assert torch.allclose(z.std(0), 3 * (logvar[0] / 2).exp(), rtol=.25)


def test_a_training_step_sees_samples_and_evaluation_means(monkeypatch):
    config, split, nets, asked = tiny(consistency=1.), pictures(8, few=range(4)), networks(tiny()), []
    real = nets.latents
    monkeypatch.setattr(nets, "latents", lambda x, batch=None, noise=False: asked.append((len(x), batch is not None, noise)) or real(x, batch, noise))
    mediffusion.train_step(nets.train(), average(nets), config, next(iter(Batches(split, 4, train=True, start=2))), True)
    assert asked == [(4, True, True), (3, True, True)]
    asked.clear()
    mediffusion.evaluate(nets, split, config, CPU)
    assert asked == [(8, False, False)]


@torch.no_grad()
def test_gray_images_in_a_colour_autoencoder_are_its_three_channels_and_come_back_as_their_mean(tmp_path):
    nets = networks(tiny(autoencoder=autoencoder(tmp_path / "colour.pt"), pretrain_epochs=0))
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.allclose(nets.latents(x), nets.autoencoder.encode(x.repeat(1, 3, 1, 1))[0])
    assert torch.allclose(nets.decoded(nets.latents(x)), nets.autoencoder.decode(nets.latents(x)).mean(1, keepdim=True)) and nets.discriminator is None


@pytest.mark.parametrize("joint", [False, True])
def test_under_bfloat16_both_stages_and_guidance_are_finite_and_of_float32(joint):
    config, split = tiny(amp="bf16", baseline=True, size=32, gan_weight=.5, gan_start=0), pictures(8, 32, few=range(4))
    with run.autocast(config, CPU):
        for nets, _, batch, losses in stepping(config, split, n=2, stage=1 + joint):
            assert all(v.isfinite().all() and v.dtype == torch.float32 for k, v in losses.items() if k != "error_by_t")
        guided, control = mediffusion.counterfactual(nets.eval(), dataclasses.replace(config, edit_steps=2), batch.x, torch.zeros(4).long(), True, list("abcd"))
    assert guided.dtype == torch.float32 and guided.isfinite().all() and not torch.equal(guided, control)


# ---------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("multilabel", [True, False])
def test_neither_batch_size_nor_order_changes_an_answer_and_the_method_comes_first(multilabel):
    config, split = tiny(baseline=True, feature_times="0,300"), pictures(5, multilabel=multilabel)
    nets = networks(config, multilabel=multilabel)
    p, u = mediffusion.evaluate(nets.train(), split, config, CPU)
    assert list(p) == ["mediffusion", "resnet"] and all(v.shape == (5, 3) and v.dtype == np.float64 for v in p.values())
    assert multilabel or np.allclose(p["mediffusion"].sum(1), 1)
    for size, order in ((1, range(5)), (3, [3, 1, 4, 0, 2])):
        q, v = mediffusion.evaluate(nets, split.take(list(order)), dataclasses.replace(config, eval_batch_size=size), CPU)
        assert all(np.allclose(q[k], p[k][list(order)], atol=1e-5) for k in p) and all(np.allclose(v[k], u[k][list(order)], atol=1e-4) for k in u)
    assert mediffusion.evaluate(nets, split, config, CPU, joint=False) == ({}, {})


def test_two_processes_evaluate_what_one_does(tmp_path):
    config, split = tiny(baseline=True, feature_times="0,20"), pictures(5)

    def work(rank):
        p, u = mediffusion.evaluate(networks(config), split, config, CPU)
        return {"p": p["mediffusion"].tolist(), "resnet": p["resnet"].tolist(), "u": u["entropy"].tolist()}
    alone = work(0)
    for found in processes(work, tmp_path):
        assert all(np.allclose(found[k], alone[k], atol=1e-5) for k in alone)


def test_uncertainty_is_0_of_the_sure_and_1_of_who_has_no_idea():
    for p, multilabel in (([[0., 1.], [.5, .5], [1., .25]], True), ([[0., 1., 0.], [1 / 3] * 3, [.5, .25, .25]], False)):
        u = mediffusion.uncertainties(np.array(p), multilabel)
        assert set(u) == {"entropy", "margin"}
        entropy = lambda *q: -sum(x * np.log(x) for x in q if x) / np.log(len(q))
        wanted = ([[0, 0], [1, 1], [0, entropy(.25, .75)]], [[0, 0], [1, 1], [0, .5]]) if multilabel else ([0, 1, entropy(.5, .25, .25)], [0, 1, .75])
        assert np.allclose(u["entropy"], wanted[0]) and np.allclose(u["margin"], wanted[1])


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("multilabel", [True, False])
def test_calibration_leaves_nothing_to_gain_by_another_temperature(multilabel, mirror):
    config, split, rng = tiny(calibrate=True, mirror=mirror, augment="hflip,vflip"), pictures(60, multilabel=multilabel), np.random.default_rng(0)
    nets = networks(config, multilabel=multilabel)
    before = mediffusion.evaluate(nets, split, config, CPU)[0]["mediffusion"]
    true = before ** .4 / (before ** .4 + (1 - before) ** .4 if multilabel else (before ** .4).sum(1, keepdims=True))      # of a network too sure by 2.5
    split.labels = (rng.random(true.shape) < true).astype(np.float32) if multilabel else np.array([rng.choice(3, p=p) for p in true])
    mediffusion.calibrate(nets, split, dataclasses.replace(config, calibrate=False), CPU)
    assert nets.temperature == 1
    mediffusion.calibrate(nets, split, config, CPU)
    p = mediffusion.evaluate(nets, split, config, CPU)[0]["mediffusion"]
    assert nets.temperature > 1.1 and np.array_equal(p.argmax(1), before.argmax(1))
    y = split.labels.ravel().astype(int) if multilabel else split.labels
    assert metrics.sharpness(y, np.stack([1 - p, p], -1).reshape(-1, 2) if multilabel else p) == pytest.approx(1, abs=.02)


# ---------------------------------------------------------------------------------------------- counterfactuals, measured
CORNERS = np.array([[0, 0], [0, 8], [8, 0]])                            # of the labels' quarters: y, x


def lesions(n, rng):
    """Gray films of 16 pixels; label k is a light square of 4 in quarter k, all three in each image, whose boxes are known."""
    images, boxes = rng.integers(60, 90, (n, 1, 16, 16)).astype(np.uint8), np.empty((n, 3, 4), np.float32)
    for i, k in np.ndindex(n, 3):
        y, x = CORNERS[k] + rng.integers(0, 5, 2)
        images[i, 0, y:y + 4, x:x + 4] = 220
        boxes[i, k] = x, y, x + 4, y + 4
    return Split(images, np.ones((n, 3), np.float32), [f"film-{i}" for i in range(n)], boxes=boxes)


def quarters(x):
    """A judge of the lightest pixel in each quarter: images in [-1, 1] -> (B, 3)."""
    return torch.stack([(x[:, 0, y:y + 8, x0:x0 + 8].amax((1, 2)) + 1) / 2 for y, x0 in CORNERS], 1)


def test_of_an_editor_that_removes_the_finding_alone_all_change_is_in_the_box_and_no_other_label_moves(monkeypatch):
    split, k, config = lesions(7, np.random.default_rng(0)), 1, tiny(eval_batch_size=3, baseline=True)

    def editor(nets, config, x, label, enforce, names):
        """On the way both lose the same; outside of the box the guided one is the control."""
        control = x - .05
        guided = control.clone()
        for i, name in enumerate(names):
            x0, y0, x1, y1 = split.boxes[split.ids.index(name), label[i]].astype(int)
            guided[i, :, y0:y1, x0:x1] = -.5
        return guided, control
    monkeypatch.setattr(mediffusion, "counterfactual", editor)
    seen = mediffusion.changed(networks(config), config, split, k, False, CPU, judge=quarters)
    assert seen.control.shape == seen.guided.shape == split.images.shape and seen.guided.dtype == np.uint8
    assert set(seen.p) == {OWN, "resnet", "judge"} and all(p.shape == (7, 3) for of in seen.p.values() for p in of.values())
    found = judged(seen, k, False, mediffusion.boxes_of(split, k))
    assert found["in_box"] == pytest.approx(1) and found["box_area"] == pytest.approx(16 / 256)
    judge = found["judge"]
    assert judge["other_diff"] == judge["other_abs"] == 0 and judge["image"] > judge["control"] and judge["guided"] < .45
    assert judge["diff"] == pytest.approx(judge["guided"] - judge["control"]) and judge["diff"] < -.3
    assert found["change"] == pytest.approx(np.abs(seen.guided.astype(float) - seen.control).mean() / 255) and found["change"] > 0


@torch.no_grad()
def test_the_classifiers_answers_are_of_image_control_and_counterfactual():
    config, split = tiny(edit_steps=2, baseline=True, eval_batch_size=2, remove_scale=3e4), pictures(3)
    nets = networks(config)
    nets.temperature.fill_(2.)
    seen = mediffusion.changed(nets, config, split, 1, False, CPU)
    for images, of in ((split.images, "image"), (seen.control, "control"), (seen.guided, "guided")):
        p, _ = mediffusion.evaluate(nets, Split(images, split.labels, split.ids), config, CPU)
        assert np.allclose(seen.p[OWN][of], p["mediffusion"], atol=.02) and np.allclose(seen.p["resnet"][of], p["resnet"], atol=.02)
    assert not np.array_equal(seen.control, seen.guided)


def of_change(change, k=0, base=.4, enforce=False, images=None, boxes=None, **given):
    """`judged` of probabilities that guidance changed by `change` (N, K)."""
    change = np.array(change)
    control, guided = images or (np.zeros((len(change), 1, 8, 8), np.uint8),) * 2
    p = {"image": np.full(change.shape, .9), "control": np.full(change.shape, base), "guided": base + change}
    return judged(Changed(control, guided, {OWN: p} | given), k, enforce, boxes)


def test_changes_of_other_labels_that_cancel_count_in_one_mean_and_not_in_the_other():
    """The paper takes |.| after the mean over images."""
    found = of_change([[-.3, .2, -.1], [-.1, -.2, .1]])[OWN]
    assert found["diff"] == pytest.approx(-.2) and found["other_diff"] == pytest.approx(0) and found["other_abs"] == pytest.approx(.15)
    found = of_change([[-.3, .2, -.1], [-.1, .2, -.1]])[OWN]
    assert found["other_diff"] == found["other_abs"] == pytest.approx(.15)


def test_what_counts_is_the_difference_from_the_control_and_not_from_the_image():
    found = of_change([[0., 0.]])[OWN]
    assert found["image"] == pytest.approx(.9) and found["control"] == found["guided"] == pytest.approx(.4) and found["diff"] == 0


@pytest.mark.parametrize("enforce, share", [(True, .25), (False, .75)])
def test_flipped_is_the_share_whose_answer_is_now_the_one_aimed_at(enforce, share):
    found = of_change([[.2, 0.], [-.2, .3], [.05, 0.], [0., .3]], enforce=enforce)
    assert found["flipped"] == share and found["flipped_by_control"] == (not enforce)         # its p is .4


def test_change_that_is_everywhere_is_in_the_box_by_its_area_and_images_without_a_box_do_not_count():
    control = np.full((3, 3, 8, 8), 100, np.uint8)
    guided, boxes = control + 20, np.array([[0, 0, 4, 4], [np.nan] * 4, [2, 2, 8, 8]], np.float32)
    found = of_change(np.zeros((3, 2)), images=(control, guided), boxes=boxes)
    assert found["in_box"] == pytest.approx(found["box_area"]) == pytest.approx((16 + 36) / 2 / 64) and found["change"] == pytest.approx(20 / 255)
    guided[2] = control[2] - 20                                         # darker is change as well
    assert of_change(np.zeros((3, 2)), images=(control, guided), boxes=boxes)["in_box"] == pytest.approx(found["in_box"])
    guided[0] = control[0]
    guided[0, :, 5, 5] = 0                                              # all of it outside
    assert of_change(np.zeros((3, 2)), images=(control, guided), boxes=boxes)["in_box"] == pytest.approx(36 / 64 / 2)
    for boxes in (None, np.full((3, 4), np.nan)):
        assert not {"in_box", "box_area"} & set(of_change(np.zeros((3, 2)), images=(control, guided), boxes=boxes))
    assert np.isfinite(of_change(np.zeros((3, 2)), boxes=np.array([[0, 0, 4, 4]] * 3))["in_box"])       # where nothing changed


def test_boxes_are_the_labels_own_where_there_are_several():
    split, alone = lesions(3, np.random.default_rng(0)), pictures(3)
    assert np.array_equal(mediffusion.boxes_of(split, 2), split.boxes[:, 2]) and mediffusion.boxes_of(alone, 2) is None
    alone.boxes = split.boxes[:, 0]
    assert np.array_equal(mediffusion.boxes_of(alone, 2), split.boxes[:, 0])


@torch.no_grad()
def test_light_beyond_white_stays_white():
    """Cast to bytes without a bound, it would come out black."""
    config = tiny(edit_steps=1)
    nets = networks(config)
    nets.autoencoder.decoder.conv_out.bias.data += 50.
    for image in mediffusion.counterfactual(nets, config, torch.rand(1, 1, 16, 16), torch.tensor([0]), False, ["a"]):
        assert (image == 1).all() and (plots.to_uint8(image) == 255).all()


def films(n, seed, name="film", views=1):
    """`lesions`, of which chance leaves some out; `views` images of each patient."""
    rng = np.random.default_rng(seed)
    split = lesions(n, rng)
    split.labels[:] = np.repeat(rng.random((-(-n // views), 3)) < .5, views, 0)[:n]
    for i, k in zip(*np.nonzero(split.labels == 0)):
        x0, y0, x1, y1 = split.boxes[i, k].astype(int)
        split.images[i, 0, y0:y1, x0:x1] = rng.integers(60, 90, (4, 4))
    split.ids, split.groups = [f"{name}-{i}" for i in range(n)], [f"{name}-patient-{i // views}" for i in range(n)]
    return split


def protocol(monkeypatch, config, data, few, n=12, **given):
    """tests.claims' record of an editor that draws the finding, or wipes it out, at its place and nowhere else."""
    of = {name: (split, i) for split in (data.val, data.test) for i, name in enumerate(split.ids)}

    def editor(nets, config, x, label, enforce, names):
        control = x.clone()
        led = control.clone()
        for i, name in enumerate(names):
            split, row = of[name]
            x0, y0, x1, y1 = split.boxes[row, label[i]].astype(int)
            led[i, :, y0:y1, x0:x1] = 220 / 127.5 - 1 if enforce else 75 / 127.5 - 1
        return led, control
    monkeypatch.setattr(mediffusion, "counterfactual", editor)
    monkeypatch.setattr(mediffusion, "draw", lambda nets, config, labels, names, scale, device: torch.rand(len(names), 1, 16, 16) * 2 - 1)
    return counterfactuals.measured_counterfactuals(networks(config), config, data, few, CPU, n, **given)


def test_the_protocol_finds_an_editor_of_the_finding_alone_by_a_judge_of_other_patients(monkeypatch, capsys):
    config, few, taught = tiny(augment="", width=8), np.arange(60), []
    data = DataSet(films(460, 0, "train", 2), films(100, 1, "val"), films(100, 2, "test"), ["a", "b", "c"], True, 1)
    data.train.labels[-40:, 2] = -1                                     # not known: no judge learns from them
    monkeypatch.setattr(counterfactuals, "train_judge", lambda split, *args, real=counterfactuals.train_judge, **given: taught.append(split) or real(split, *args, **given))
    found = protocol(monkeypatch, config, data, few)
    assert found["judge"]["images"] == 400 == len(taught[0]) and found["judge"]["patients"] == 200 and not set(taught[0].groups) & set(data.train.groups[:60])
    assert all(value > .9 for value in found["judge"]["val_auroc"].values()) and "AUROC on validation: a " in capsys.readouterr().out
    rows = found["arms"]["as configured"]["rows"]
    assert list(rows) == [f"{verb} {label}" for label in "abc" for verb in ("remove", "enforce")]
    for what, row in rows.items():
        judge, inside = row["judge"], row["change_by_place"]
        assert (judge["diff"] > .4 if what.startswith("enforce") else judge["diff"] < -.4) and judge["other_diff"] <= judge["other_abs"] < .2, what
        assert row["in_box"] == pytest.approx(1) and 0 <= row["in_random_box"] < .5 and row["boxes"] == row["images"] <= 12
        assert inside["outside"] == [0.] * 5 and .1 < inside["inside"][2] < .7 and inside["inside, at random"][2] < inside["inside"][2]
    assert set(found["samples"]) == {"real", "unguided", "guided"}
    real, drawn = found["samples"]["real"], found["samples"]["guided"]
    assert real["frechet"] < drawn["frechet"] and real["kernel"] < drawn["kernel"] and real["label_agreement"] > .8


def test_what_the_judge_does_not_know_is_refused_and_the_table_says_so(monkeypatch, tmp_path):
    data, rng = DataSet(films(200, 0, "train"), films(80, 1, "val"), films(60, 2, "test"), ["a", "b", "c"], True, 1), np.random.default_rng(0)
    data.val.labels[:, 1] = rng.integers(0, 2, 80)
    record = protocol(monkeypatch, tiny(augment=""), data, np.arange(20), n=4)
    rows = record["arms"]["as configured"]["rows"]
    assert "under 0.75" in rows["remove b"]["refused"] and "refused" in rows["enforce b"] and record["judge"]["val_auroc"]["b"] < .75
    table = counterfactuals.counterfactuals_table(record, record["arms"]).splitlines()
    assert len(table) == 8 and {line.count("|") for line in table} == {12} and sum("refused: the judge's AUROC of b is 0." in line for line in table) == 2
    assert counterfactuals.samples_table(record).count("\n") == 4 and counterfactuals.box_plots(tmp_path / "boxes.png", rows).exists() and opened(tmp_path)
    json.dumps(record)


@pytest.mark.parametrize("few, words", [(40, "judge and model would share patients"), (10, "evaluated as well, first: film-patient-3")])
def test_a_judge_that_would_share_patients_with_the_model_is_refused(few, words):
    data = DataSet(films(40, 0, "train", 2), films(4, 1, "val"), films(4, 2, "test"), ["a", "b", "c"], True, 1)
    if few == 10:
        data.train.groups[3] = data.test.groups[1] = "film-patient-3"
    with pytest.raises(run.UserError, match=words) as caught:
        counterfactuals.for_judge(data, np.arange(few))
    assert "\n" not in str(caught.value)
    assert few == 10 or counterfactuals.for_judge(data, np.arange(11)).tolist() == list(range(12, 40))              # the twelfth image is of the sixth patient, too


def test_a_run_that_saw_all_labels_is_refused_in_one_line(tmp_path, capsys):
    assert go(tmp_path / "run", "--labels", 1, "--epochs", 1, "--explained", 1, "--no-baseline") == 0
    capsys.readouterr()
    refused(capsys, claims.main(["--counterfactuals", str(tmp_path / "run")]), "judge and model would share patients", "--labels below 1")


def test_a_finding_is_enforced_where_there_is_none_or_as_the_authors_do_where_another_has_a_box():
    split = films(60, 0)
    has, boxes = split.labels > 0, split.boxes
    boxes[::2] = np.nan
    rows = lambda *args: counterfactuals.starting(split, *args).tolist()
    assert rows(1, True) == np.flatnonzero(~has.any(1)).tolist()
    odd = np.arange(60) % 2 == 1
    assert rows(1, True, True) == np.flatnonzero(odd & has.any(1) & ~has[:, 1]).tolist() and rows(1, False) == np.flatnonzero(odd & has[:, 1]).tolist()
    split.boxes = None
    assert rows(1, False) == np.flatnonzero(has[:, 1]).tolist()
    split.labels[:, 0] = ~has[:, 1:].any(1)                             # as CheXpert has it
    names = ["No Finding", *"abcdefgh"[:has.shape[1] - 1]]
    assert rows(1, True, False, names) == np.flatnonzero(split.labels[:, 0]).tolist() and rows(0, True, False, names) == np.flatnonzero(has[:, 1:].any(1)).tolist()
    assert rows(0, False, False, names) == np.flatnonzero(split.labels[:, 0]).tolist() and rows(1, True) == []
    single = pictures(9, multilabel=False)
    assert counterfactuals.starting(single, 2, False).tolist() == [2, 5, 8] and counterfactuals.starting(single, 2, True).tolist() == [0, 1, 3, 4, 6, 7]


# ---------------------------------------------------------------------------------------------- runs and commands
ARGS = ("--size 28 --limit 16 --epochs 2 --pretrain-epochs 1 --batch-size 4 --labelled-batch 4 --labels 0.5 --ae-width 8 --ae-mult 1,2 --ae-blocks 1 --ae-latent 2 "
        "--channels 8 --mult 1,2 --attention 2 --head-channels 8 --hidden 16 --width 8 --timesteps 50 --draw-steps 2 --remove-start 20 --enforce-start 20 "
        "--edit-steps 2 --explained 2 --device cpu").split()


def go(folder, *more):
    """A run of a second or two; few resamples for its intervals. Returns the exit code."""
    return short(mediffusion, *ARGS, "--output", folder, *more)


def command(name, folder, *more):
    return short(mediffusion, name, "--checkpoint", folder / "best.pt", *more)


def words_of(value):
    """A name for a test: its options, not what they say."""
    return " ".join(value) if value and isinstance(value, list) and value[0].startswith("--") else ""


def numbers(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def xray_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "xray"
    assert go(folder) == 0
    return folder


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert go(folder, "--data", "toy") == 0
    return folder


@pytest.fixture(params=["xray_run", "toy_run"])
def either(request):
    return request.getfixturevalue(request.param)


def test_a_run_writes_its_numbers_and_pictures(either):
    found, several = numbers(either), either.name == "xray"
    names = {"curves", "labels" if several else "confusion", "reliability", "coverage", "reconstructions", "guidance", "counterfactuals"}
    assert set(opened(either / "figures")) == {f"{name}.png" for name in names}
    assert found["method"] == "mediffusion" and {"majority", "resnet"} <= set(found["baselines"]) and np.isfinite(found["test"]["auroc"])
    classes, specific = toy.FINDINGS if several else toy.CLASSES, found["method_specific"]
    assert specific["labelled"] == 8 and specific["autoencoder"]["perceptual"] == "pyramid" and specific["autoencoder"]["psnr"] > 0
    assert set(specific["counterfactuals"]) <= {f"{what} {name}" for what in ("remove", "enforce") for name in classes} and len(specific["counterfactuals"]) >= 5
    for row in specific["counterfactuals"].values():
        assert 1 <= row["images"] <= 2 and 0 <= row["in_box"] <= 1 and 0 < row["box_area"] < 1 and {OWN, "resnet", "flipped", "change"} <= set(row)
        assert all(0 <= row[model][of] <= 1 for model in (OWN, "resnet") for of in ("image", "control", "guided"))
    log = [json.loads(line) for line in (either / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3 and set(mediffusion.PANELS[1][2]) <= set(log[0]) and "val_auroc" not in log[0]
    assert all(set(mediffusion.PANELS[0][2]) <= set(row) and {"val_auroc", "val_resnet_auroc"} <= set(row) for row in log[1:])
    assert found["selected_epoch"] > 1 and len(log[1]["error_by_t"]) == 10


def test_a_loss_that_is_not_computed_at_every_step_is_logged_as_the_mean_of_those_where_it_is(tmp_path):
    assert go(tmp_path / "run", "--epochs", 1, "--cls-every", 4, "--cls-weight", 1e-9, "--head-lr", 1e-9, "--lr", 1e-9, "--explained", 1, "--no-baseline") == 0
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert row["classifier"] == pytest.approx(np.log(2), rel=.2)       # three labels at chance, one step of four


def test_the_autoencoder_of_a_run_is_a_file_of_its_own(xray_run):
    net, held = autoencoder_from(run.load_weights(xray_run / "autoencoder.pt")), run.load_checkpoint(xray_run / "best.pt", "mediffusion")
    for part in ("nets", "ema"):
        assert same(net.state_dict(), {k.removeprefix("autoencoder."): v for k, v in held[part].items() if k.startswith("autoencoder.")})
    assert held["ema"]["frozen"] and held["ema"]["latent_scale"] == held["nets"]["latent_scale"] == numbers(xray_run)["method_specific"]["autoencoder"]["latent_scale"]


def test_a_new_run_takes_the_autoencoder_of_another(xray_run, tmp_path):
    args = [a for a in ARGS if a not in ("--pretrain-epochs",)]
    args.pop(args.index("--batch-size") - 1)                            # its number
    assert short(mediffusion, *args, "--epochs", 1, "--explained", 1, "--no-baseline", "--autoencoder", xray_run / "autoencoder.pt", "--output", tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pretrain_epochs"] == 0 and len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
    assert same(*(torch.load(folder / "autoencoder.pt", weights_only=True) for folder in (xray_run, tmp_path / "run")))
    assert command("predict", tmp_path / "run", own_images(tmp_path / "mine", 1)) == 0


def test_fine_tuning_keeps_the_other_runs_autoencoder(xray_run, tmp_path):
    assert go(tmp_path / "run", "--init", xray_run / "best.pt", "--pretrain-epochs", 0, "--epochs", 1, "--explained", 1, "--no-baseline") == 0
    assert same(*(torch.load(folder / "autoencoder.pt", weights_only=True) for folder in (xray_run, tmp_path / "run")))


def test_fine_tuning_takes_the_autoencoder_that_is_named_and_refuses_one_that_it_would_leave_untrained(xray_run, tmp_path, capsys):
    other = mediffusion.AutoencoderKL(1, 8, (1, 2), 1, 2)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    args = ["--init", xray_run / "best.pt", "--epochs", 1, "--explained", 1, "--no-baseline"]
    assert go(tmp_path / "run", *args, "--autoencoder", tmp_path / "other.pt", "--pretrain-epochs", 0) == 0
    assert same(torch.load(tmp_path / "run" / "autoencoder.pt", weights_only=True), other.state_dict())
    capsys.readouterr()
    assert go(tmp_path / "colour", *args, "--pretrain-epochs", 0, "--data", "toy") == 2
    assert "autoencoder.encoder.conv_in.weight is of another shape there" in capsys.readouterr().err


def test_the_checkpoint_holds_no_weights_of_the_perceptual_term_and_no_latents(xray_run):
    held = run.load_checkpoint(xray_run / "best.pt", "mediffusion")["ema"]
    assert {name.split(".")[0] for name in held} == {"resnet", "autoencoder", "unet", "head", "alpha_bar", "latent_scale", "frozen", "cls_weight", "head_lr", "temperature"}


def test_eval_gives_the_runs_own_numbers(either, tmp_path):
    assert command("eval", either, "--output", tmp_path / "out") == 0
    ours, theirs = numbers(tmp_path / "out")["test"], numbers(either)["test"]
    assert {k: v for k, v in ours.items() if k != "ci95"} == {k: v for k, v in theirs.items() if k != "ci95"}
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 17


def own_images(folder, n=2, channels=1):
    folder.mkdir()
    for i, image in enumerate(pictures(n, 40, channels).images):
        Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)).save(folder / f"mine-{i}.png")
    return folder


def test_predict_writes_a_row_and_a_panel_an_image(either, tmp_path, capsys):
    assert command("predict", either, own_images(tmp_path / "mine"), "--output", tmp_path / "out") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert len(rows) == 2 == len(opened(tmp_path / "out")) and all(0 <= float(v) <= 1 for row in rows for k, v in row.items() if k.startswith("p:"))
    said = capsys.readouterr().out
    assert "entropy" in said and "not for clinical use" in said


def test_sample_draws_the_same_again_and_the_first_of_many(xray_run, tmp_path):
    for n in (1, 3):
        assert command("sample", xray_run, "--label", "Effusion", "-n", n, "--output", tmp_path / str(n)) == 0
    assert set(opened(tmp_path / "3")) == {"samples.png", *(f"Effusion-{i:04d}.png" for i in range(3))}
    a, b = (np.asarray(Image.open(tmp_path / n / "Effusion-0000.png")).astype(int) for n in "13")
    assert np.abs(a - b).max() <= 1
    assert command("sample", xray_run, "--label", 0, "-n", 1, "--guidance", 0, "--eta", 1, "--draw-steps", 3, "--output", tmp_path / "other") == 0


@pytest.fixture
def shown(monkeypatch):
    """What `explain` draws: title, captions, lines."""
    seen, real = [], plots.explanation
    monkeypatch.setattr(plots, "explanation", lambda path, title, tiles, charts, lines, columns: seen.append((title, list(tiles), lines)) or
                        real(path, title, tiles, charts, lines, columns))
    return seen


@pytest.mark.parametrize("more, title", [(["--target", "Effusion", "--remove"], "Effusion removed"), (["--target", "2", "--enforce"], "Mass enforced"),
                                         (["--target", "Mass", "--remove", "--guide-on", "zt"], "Mass removed"), (["--enforce", "--edit-eta", "1"], "enforced"),
                                         (["--remove", "--guide-through", "unet", "--hold-labels", ".1", "--hold-latent", "1"], "removed")], ids=words_of)
def test_explain_removes_or_enforces_a_label(xray_run, tmp_path, more, title, shown, capsys):
    assert command("explain", xray_run, own_images(tmp_path / "mine", 1), *more, "--output", tmp_path / "out") == 0
    assert len(opened(tmp_path / "out")) == 1 and "not for clinical use" in capsys.readouterr().out
    (said, captions, lines), = shown
    assert said.endswith(title) and len(captions) == 4 and any(line.startswith(f"{OWN}: p of ") for line in lines) and any(line.startswith("resnet: ") for line in lines)
    assert captions[2].startswith("guided to " if "enforce" in title else "guided away from ")


def test_explain_by_itself_leads_away_from_what_is_predicted_and_to_what_is_not(either, tmp_path, shown):
    assert command("explain", either, "--limit", 2, "--output", tmp_path / "a") == 0
    _, nets, facts, _ = run.load_model(either / "best.pt", "mediffusion", Config, mediffusion.build, {})
    config = run.config_from(Config, run.load_checkpoint(either / "best.pt", "mediffusion"), limit=2)
    split = load_for(config).test
    p = mediffusion.evaluate(nets, split, config, CPU)[0]["mediffusion"][:2]
    assert len(shown) == len(p) == 2
    for (title, captions, lines), q, name in zip(shown, p, split.ids):
        removed = q.max() >= .5 or not facts["multilabel"]
        assert title == f"{facts['classes'][q.argmax()]} {'removed' if removed else 'enforced'}" and captions[0] == f"image {name}"
        assert lines[-1].endswith("of the area")
    shown.clear()
    target = facts["classes"][int(p[0].argmin())]
    assert p[0].min() >= .5 or command("explain", either, "--limit", 1, "--target", target, "--output", tmp_path / "b") == 0 and shown[0][0] == f"{target} enforced"


def test_another_runs_resnet_guides(xray_run, tmp_path, shown):
    args = ["--target", "Mass", "--remove", "--remove-scale", 30, "--output"]
    mine = own_images(tmp_path / "mine", 1)
    assert command("explain", xray_run, mine, *args, tmp_path / "own") == 0
    assert command("explain", xray_run, mine, "--guide", xray_run / "best.pt", *args, tmp_path / "other") == 0
    a, b = ((tmp_path / name / "0000-mine-0.png").read_bytes() for name in ("own", "other"))
    assert a != b and shown[0][0] == shown[1][0] == "Mass removed"


@pytest.mark.parametrize("options", [
    ["--recipe", "plus", "--variant", "no_diffusion", "--no-baseline", "--cls-every", "2", "--cls-start", "1", "--balanced"],
    ["--recipe", "paper", "--data", "toy", "--feature-times", "0,20", "--cls-noise", "10", "--consistency", "1", "--calibrate", "--grad-accum", "2", "--gan-weight", ".5",
     "--gan-start", "2", "--augment", "hflip,vflip,rotate", "--guide-on", "zt", "--hold-labels", ".1", "--hold-latent", ".1", "--guide-goal", ".9", "--latent-scale", "1"]],
    ids=["no_diffusion", "everything"])
def test_other_settings_run_from_end_to_end(options, tmp_path, capsys):
    assert go(tmp_path / "run", *options, "--explained", 1) == 0
    alone, pictures = "no_diffusion" in options, opened(tmp_path / "run" / "figures")
    assert bool(numbers(tmp_path / "run")["method_specific"]["counterfactuals"]) != alone and ("counterfactuals.png" in pictures) != alone
    for args in ["sample", tmp_path / "run", "--label", 1, "-n", 1], ["explain", tmp_path / "run", "--limit", 1]:
        capsys.readouterr()
        assert command(*args) == (2 if alone else 0)
        assert not alone or "draws or changes no image; take one of --variant joint" in capsys.readouterr().err


def test_a_list_of_names_shows_the_labels_of_these_images_and_explain_takes_fewer_images_than_it_names(tmp_path, capsys):
    ids = load_for(configure(data="toy_xray", size=28, limit=16, labels="1")).train.ids
    (tmp_path / "names.txt").write_text("\n".join(ids[:6]))
    assert go(tmp_path / "run", "--labels", tmp_path / "names.txt", "--epochs", 1, "--explained", 1, "--no-baseline") == 0
    assert numbers(tmp_path / "run")["method_specific"]["labelled"] == 6
    capsys.readouterr()
    assert command("explain", tmp_path / "run", "--limit", 2) == 0, capsys.readouterr().err


def test_a_run_outlives_the_files_it_was_trained_with(xray_run, tmp_path, capsys):
    """The autoencoder is in its folder, and weights of VGG-16 are for training alone."""
    file, mine = autoencoder(tmp_path / "ae.pt", 1), own_images(tmp_path / "mine", 1)
    assert go(tmp_path / "run", "--autoencoder", file, "--pretrain-epochs", 0, "--epochs", 1, "--explained", 1, "--no-baseline") == 0
    Path(file).unlink()
    capsys.readouterr()
    refused(capsys, command("predict", tmp_path / "run", mine), f"{file}: no such file")
    assert command("predict", tmp_path / "run", mine, "--autoencoder", tmp_path / "run" / "autoencoder.pt") == 0
    content = torch.load(xray_run / "best.pt", weights_only=True)
    content["config"] |= {"vgg": "gone.pt", "lpips": "gone too.pt"}
    (tmp_path / "other").mkdir()
    torch.save(content, tmp_path / "other" / "best.pt")
    assert command("predict", tmp_path / "other", mine) == 0, capsys.readouterr().err


class Stopped(Exception):
    pass


def without_times(rows):
    return [{k: repr(v) for k, v in row.items() if "seconds" not in k} for row in rows]


@pytest.mark.parametrize("how, at", [("by a signal", 2), ("killed", 4), ("by a signal", 6), ("killed", 9)])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(how, at, xray_run, tmp_path, monkeypatch, capsys):
    """Four steps an epoch, of which the first is the autoencoder's: stopped within it, as the second stage begins, in its first and its last epoch."""
    step, calls, out = mediffusion.train_step, itertools.count(), tmp_path / "run"

    def stopping(*args):
        if next(calls) == at:
            if how == "killed":
                raise Stopped
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as m:
        m.setattr(mediffusion, "train_step", stopping)
        if how == "killed":
            with pytest.raises(Stopped):
                go(out)
        else:
            assert go(out) == 128 + signal.SIGTERM and "go on with --resume" in capsys.readouterr().err
    assert short(mediffusion, "--resume", out) == 0
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (xray_run, out))
        assert same(a["nets"], b["nets"]) and same(a["ema"], b["ema"]), name
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (xray_run, out))
    assert a["position"]["step"] == b["position"]["step"] == 12 and without_times(a["position"]["history"]) == without_times(b["position"]["history"])
    x, y = (s["state"] for s in (a["optimizer"], b["optimizer"]))
    assert x.keys() == y.keys() and all(torch.equal(torch.as_tensor(x[i][k]), torch.as_tensor(y[i][k])) for i in x for k in x[i])
    assert numbers(xray_run)["test"] == numbers(out)["test"] and numbers(xray_run)["method_specific"] == numbers(out)["method_specific"]


# ---------------------------------------------------------------------------------------------- bad input
def refused(capsys, code, *words):
    """The one line of a command that ended with exit code 2."""
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("options, words", [
    (["--labels", "0"], ["--labels 0: a share over 0 and up to 1"]), (["--labels", "1.5"], ["--labels 1.5: a share over 0 and up to 1"]),
    (["--labels", "nowhere.txt"], ["--labels nowhere.txt: cannot be read"]), (["--size", "30"], ["--size 30: must be a multiple of 4; take 28 or 32"]),
    (["--lpips", "lin.pt"], ["--lpips lin.pt: ", "add --vgg FILE"]), (["--vgg", "vgg.pt"], ["vgg.pt: no such file"]),
    (["--feature-times", "noon"], ["--feature-times noon: noise levels 0..49"]), (["--feature-times", "0,50"], ["--feature-times 0,50: noise levels 0..49"]),
    (["--feature-times", ""], ["--feature-times"]), (["--feature-times", "0,,3"], ["--feature-times 0,,3"]), (["--feature-times", "-1"], ["--feature-times"]),
    (["--pretrain-epochs", "0"], ["--pretrain-epochs 0: there would be no trained autoencoder"]), (["--mult", "1,x"], ["--mult 1,x", "no network can be made"]),
    (["--mult", ""], ["--mult", "no network can be made"]), (["--ae-mult", "0,1"], ["--ae-mult 0,1", "no network can be made"]), (["--channels", "9"], ["--channels 9"]),
    (["--guide-goal", "2"], ["--guide-goal 2.0: must lie in [0..1]"]), (["--timesteps", "2"], ["--timesteps 2: must lie in"]), (["--labelled-batch", "1"], ["--labelled-batch 1"]),
    (["--guide", "nowhere.pt"], ["nowhere.pt: no such file"]), (["--autoencoder", "nowhere.pt"], ["--autoencoder nowhere.pt --pretrain-epochs 1"])], ids=words_of)
def test_bad_settings_are_one_line_and_exit_code_2(options, words, tmp_path, capsys):
    refused(capsys, go(tmp_path / "run", *options), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--size", "16", "--ae-mult", "1,1", "--gan-weight", ".5"], ["--size", "8", "--ae-mult", "1,1"]], ids=" ".join)
def test_images_too_small_for_what_is_asked_are_one_line_before_training_begins(options, tmp_path, capsys):
    """The discriminator needs 24 pixels, the structural similarity 11."""
    for name in ("ill", "well"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, image in enumerate(np.random.default_rng(len(name)).integers(0, 256, (8, 16, 16, 3), np.uint8)):
            Image.fromarray(image).save(tmp_path / "data" / name / f"{i}.png")
    code = go(tmp_path / "run", "--data", "folder", "--root", tmp_path / "data", "--scale", "small", "--explained", 1, "--gan-start", 0, *options)
    refused(capsys, code, f"--size {options[1]}")


def test_names_of_images_that_do_not_exist_are_one_line(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("toy_xray-train-00000\nsomebody-else\n")
    refused(capsys, go(tmp_path / "run", "--labels", tmp_path / "names.txt"), "names.txt: ", "names are of no image here")


@pytest.mark.parametrize("file, change, words", [
    (TABLE, ("Cardiomegaly", "Broken leg"), "unknown finding 'Broken leg'"), (TABLE, ("Image Index,Finding Labels", "Image Index,Label"), "needed: Image Index,Finding Labels"),
    (BOXES, (",5,6,7", ",5,6"), "line 2 has 5 fields"), (BOXES, ("Mass", "Leg"), "unknown finding 'Leg'")], ids=["finding", "header", "box", "box of what"])
def test_a_wrong_table_of_findings_or_boxes_is_one_line(file, change, words, tmp_path, capsys):
    (tmp_path / "nih").mkdir()
    root = nih(tmp_path / "nih")
    (root / BOXES).write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000007_000.png,Mass,4,5,6,7\n")
    (root / file).write_text((root / file).read_text().replace(*change))
    refused(capsys, go(tmp_path / "run", "--data", "chestxray14", "--root", root, "--size", 32), str(root / file), words)


def test_ages_of_414_infiltrates_and_rgba_among_gray_are_no_mistake(tmp_path):
    (tmp_path / "nih").mkdir()
    root = nih(tmp_path / "nih")
    (root / TABLE).write_text((root / TABLE).read_text().replace(",71,M", ",414,M", 5).replace("Infiltration", "Infiltrate"))
    for path in sorted((root / "images").glob("*.png"))[:20]:
        with Image.open(path) as image:
            image.convert("RGBA").save(path)
    config = tiny(data="chestxray14", root=str(root), labels="0.2", size=32, cls_start=0)
    data = mediffusion.load_for(config)
    assert any("5 ages are no age of a patient" in note for note in data.notes) and data.channels == 1 and len(data.classes) == 14
    assert data.test.labels[:, data.classes.index("Infiltration")].sum() > 0
    for *_, losses in stepping(config, data.train, networks(config, 1, 14), n=1):
        assert losses["loss"].isfinite() and losses["classifier"] > 0


def test_an_autoencoder_of_gray_images_is_refused_for_colour_data_and_one_that_is_none_for_any(tmp_path, capsys):
    file = autoencoder(tmp_path / "gray.pt", 1)
    refused(capsys, go(tmp_path / "run", "--data", "toy", "--autoencoder", file, "--pretrain-epochs", 0), f"--autoencoder {file}: is one of gray images")
    torch.save({"a": torch.zeros(2)}, tmp_path / "none.pt")
    refused(capsys, go(tmp_path / "run", "--autoencoder", tmp_path / "none.pt", "--pretrain-epochs", 0), "--autoencoder", "none.pt", "is no KL autoencoder")
    refused(capsys, go(tmp_path / "run", "--autoencoder", tmp_path / "nowhere.pt", "--pretrain-epochs", 0), "nowhere.pt: no such file")
    refused(capsys, go(tmp_path / "run", "--autoencoder", file), f"--autoencoder {file} --pretrain-epochs 1", "leave one out")


def test_a_target_that_is_no_class_is_refused_with_those_that_are(xray_run, capsys):
    for target in ("Pneumonia", "3", "-1"):
        refused(capsys, command("explain", xray_run, f"--target={target}", "--limit", 1), f"--target {target}: no such class", *toy.FINDINGS)
    refused(capsys, command("sample", xray_run, "--label", "5"), "--label 5: no such class", *toy.FINDINGS)


def test_one_cannot_remove_and_enforce_nor_draw_no_image(xray_run, capsys):
    refused(capsys, command("explain", xray_run, "--remove", "--enforce", "--limit", 1), "--remove --enforce: one of the two")
    refused(capsys, command("sample", xray_run, "--label", 0, "-n", 0), "-n 0: 1 or more")
    refused(capsys, command("explain", xray_run, "--limit", -1), "--limit -1: 0 or more")


def test_a_guide_that_knows_other_classes_or_is_no_run_is_refused(xray_run, toy_run, tmp_path, capsys):
    for file in (toy_run / "best.pt", xray_run / "autoencoder.pt"):
        refused(capsys, command("explain", xray_run, "--limit", 1, "--guide", file), f"--guide {file}: no run's checkpoint with a plain ResNet of the classes ", *toy.FINDINGS)
    refused(capsys, command("explain", xray_run, "--limit", 1, "--guide", tmp_path / "no.pt"), "no.pt: no such file")
    colour = torch.load(xray_run / "best.pt", weights_only=True)
    colour["ema"]["resnet.conv1.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(colour, tmp_path / "colour.pt")
    refused(capsys, command("explain", xray_run, "--limit", 1, "--guide", tmp_path / "colour.pt"), f"--guide {tmp_path / 'colour.pt'}")


# ---------------------------------------------------------------------------------------------- learning
@pytest.mark.slow
def test_a_tiny_network_learns_and_what_guidance_changes_is_the_finding_to_another_classifier_as_well(tmp_path, monkeypatch):
    """Films of 16 pixels with a light square in each of three quarters, or not; a tenth of the labels."""
    train = films(800, 0)
    train.few = (np.arange(80), 16)
    train.labels[80:] = -1
    data = DataSet(train, films(100, 1), films(200, 2), ["a", "b", "c"], True, 1)
    monkeypatch.setattr(mediffusion, "load_for", lambda config, facts=None: data)
    monkeypatch.setattr(run.score, "__defaults__", (None, 5))
    found = mediffusion.train(configure(data="toy_xray", size=16, epochs=12, pretrain_epochs=6, batch_size=16, ae_width=16, ae_mult="1,2", ae_lr=2e-3, channels=16, mult="1,2",
                                        augment="", remove_scale=100., enforce_scale=100., edit_keep=1.,        # squares so plain that the classifier is very sure
                                        device="cpu", output=str(tmp_path / "run")))
    assert found["test"]["auroc"] > .9
    for what, row in found["method_specific"]["counterfactuals"].items():
        assert row["in_box"] > 2 * row["box_area"] and row["resnet"]["other_abs"] < .3, what
        assert row[OWN]["diff"] > .05 if what.startswith("enforce") else row[OWN]["diff"] < -.3 and row["resnet"]["diff"] < -.3, what


def records():
    """{command: {seed: record}} of what was measured on the toy chests."""
    found = defaultdict(dict)
    for path in sorted((ROOT / "tests" / "results").glob("mediffusion-*-s*.json")):
        record = json.loads(path.read_text())
        if record.get("data") == "toy_xray":
            found[re.sub(r" --seed \d+", "", record["command"])][record["seed"]] = record
    return found


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="on toy films the diffusion changes the classifier's AUROC by -.007, -.005, +.002, against the paper's claim: tests/results/README.md")
def test_with_few_labels_the_joint_model_beats_the_same_classifier_without_diffusion_over_three_seeds():
    pairs = [(joint, alone) for words, alone in records().items() if "--variant no_diffusion" in words
             and len(set(joint := records().get(words.replace(" --variant no_diffusion", ""), {})) & set(alone)) >= 3]
    if not pairs:
        pytest.skip("no records of three seeds of both variants")
    for joint, alone in pairs:
        gain = [joint[seed]["test"]["auroc"] - alone[seed]["test"]["auroc"] for seed in joint.keys() & alone.keys()]
        assert np.mean(gain) > 0 and np.mean(gain) > np.std(gain, ddof=1) / len(gain) ** .5


@pytest.mark.slow
def test_in_the_records_guidance_lowers_what_it_removes_and_raises_what_it_enforces_beside_the_control():
    """By the model's own classifier and by the plain ResNet, which shares no weight with it."""
    rows = [(what, row) for words, seeds in records().items() if "no_diffusion" not in words for record in seeds.values() for what, row in record["method_specific"].get("counterfactuals", {}).items()]
    if not rows:
        pytest.skip("no records")
    for model in (OWN, "resnet"):
        for verb, sign in (("remove", -1), ("enforce", 1)):
            assert sign * np.mean([row[model]["diff"] for what, row in rows if what.startswith(verb) and model in row]) > 0


@pytest.mark.slow
def test_in_the_record_of_a_judge_of_other_patients_each_row_does_what_it_says_in_the_box_and_little_else():
    """Guided minus unguided: by .2 at least, more than twice as much as other labels move, and more than half of the change in the box."""
    path = ROOT / "tests" / "results" / "mediffusion-counterfactuals.json"
    if not path.exists():
        pytest.skip("no record: python -m tests.claims --counterfactuals RUN")
    record = json.loads(path.read_text())
    assert all(value >= .75 for value in record["judge"]["val_auroc"].values()) and len(record["arms"]["plus"]["rows"]) == 6
    for what, row in record["arms"]["plus"]["rows"].items():
        change = row["judge"]["diff"] * (1 if what.startswith("enforce") else -1)
        assert row["images"] >= 48 and change >= .2 and row["judge"]["other_abs"] < change / 2 and row["in_box"] > .5 > row["in_random_box"], what


def test_strong_views_are_of_images_with_labels_alone_and_in_plus_but_for_toy_films():
    given = [mediffusion.configure(data=data, scale="small", recipe=recipe).few_augment for data in ("pneumoniamnist", "toy_xray") for recipe in ("plus", "paper")]
    assert given == ["strong", "", "", ""]
    data = load_for(mediffusion.configure(data="toy", limit=80, labels="0.5", few_augment="strong"))
    batches = list(Batches(data.train, 16, train=True, augment=("hflip",)))
    assert all((b.variant >= 0).all() for b in batches) and {-1, 0, 1} == {v for b in batches for v in b.few.variant.tolist()}
