"""symmflow.py: section 6 of papers/symmflow.md, item by item under its headings, then commands, then a run that learns.

Oracles: loops in plain Python, closed forms, a velocity that knows the ends of the path, and the exact marginal velocity of a
mixture of Gaussians, whose posterior is known (`Marginal`). Networks are a few channels wide, and one thread is enough.
Elsewhere: ranks and rejection (test_metrics.py), the archives (test_medmnist.py), the U-Net and the autoencoder themselves.
"""
import copy
import csv
import dataclasses
import functools
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import symmflow
from common import metrics, plots, run
from common.autoencoder import AutoencoderKL
from data import Batches, DataSet, Split, load_for, toy
from data.batches import Batch, augment, draw_changes
from symmflow import Config, configure
from tests.loading import opened, short
from tests.test_medmnist import write as write_medmnist
from tests.test_run import processes

CPU, KINDS = torch.device("cpu"), ("rgb", "grey", "onehot", "simplex")


pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The toy set is the same for many runs."""
    make = functools.cache(lambda seed, size, n, make=toy.make: make(seed, size, dict(n)))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(toy, "make", lambda seed, size, n=None: copy.copy(make(seed, size, tuple((n or {}).items()))))
        yield


def tiny(**given):
    """The paper's recipe with networks of a few thousand weights."""
    return configure(**dict(data="toy", recipe="paper", size=16, channels=8, mult="1,2", head_channels=8, width=8, baseline=False) | given)


def networks(config, channels=3, classes=5, wear=True):
    """As after training: what is zero at first is not."""
    torch.manual_seed(0)
    nets = symmflow.build(config, dict(channels=channels, classes=list(range(classes)), multilabel=False))
    for p in nets.unet.parameters() if wear else ():
        p.data += .1 * torch.randn_like(p)
    return nets.eval()


def images(n, size=16, channels=3):
    return torch.rand(n, channels, size, size) * 2 - 1


def batch(n, size=16, channels=3, classes=5):
    return Batch(images(n, size, channels), torch.arange(n) % classes, np.arange(n), np.zeros(n, np.int64))


def pictures(n, size=16, channels=3, classes=5):
    """A split of noise."""
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (n, channels, size, size), np.uint8), np.arange(n) % classes, [f"picture-{i}" for i in range(n)])


def stand_in(unet, kind, K, beta=4.):
    """All that `classify` asks of networks, for pixels and any velocity."""
    return SimpleNamespace(unet=unet, codes=symmflow.class_codes(kind, K, beta)[0].float(), classes=K, prior=torch.ones(K), temperature=torch.ones(()),
                           encode=lambda x: x, decode_map=lambda y: y)


def read(maps, kind, K, **given):
    """The Prediction for label maps (B, D, H, W): one step of a velocity that leads there."""
    nothing = torch.zeros(len(maps), 1, *maps.shape[2:])
    nets = stand_in(lambda z, t: torch.cat([nothing, -maps], 1), kind, K)
    return symmflow.classify(nets, tiny(codes=kind, **given), nothing, torch.zeros_like(maps)[:, None])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------- 1 the path
def ends(n=3):
    return torch.randn(4, n, 2, 3, 3, dtype=torch.float64)


def along(x, y, xi_x, xi_y, t, s=0.):
    return symmflow.path(x, y, xi_x, xi_y, torch.full((len(x),), t, dtype=torch.float64), s)


def test_the_path_goes_from_noise_to_the_image_and_from_the_label_map_to_noise():
    x, y, xi_x, xi_y = ends()
    (x_t, y_t), _ = along(x, y, xi_x, xi_y, 0.)
    assert torch.equal(x_t, xi_x) and torch.equal(y_t, y)
    (x_t, y_t), _ = along(x, y, xi_x, xi_y, 1.)
    assert torch.equal(x_t, x) and torch.equal(y_t, xi_y)


def test_with_the_authors_sigma_a_ten_thousandth_of_the_label_map_is_left_at_the_end():
    x, y, xi_x, xi_y = ends()
    (x_t, y_t), _ = along(x, y, xi_x, xi_y, 1., 1e-4)
    assert torch.allclose(y_t, xi_y + 1e-4 * y, atol=1e-12) and torch.allclose(x_t, x + 1e-4 * xi_x, atol=1e-12)


@pytest.mark.parametrize("s", [0., 1e-4, .3])
@pytest.mark.parametrize("t", [.01, .37, .99])
def test_the_velocity_is_the_difference_quotient_of_the_path(t, s):
    given, h = ends(), 1e-4
    before, after, (_, v) = along(*given, t - h, s)[0], along(*given, t + h, s)[0], along(*given, t, s)
    for a, b, v in zip(before, after, v):
        assert torch.allclose((b - a) / (2 * h), v, atol=1e-9)


@pytest.mark.parametrize("t", [0., .2, .5, 1.])
def test_the_branches_are_each_other_backwards(t):
    x, y, xi_x, xi_y = ends()
    (x_t, y_t), (v_x, v_y) = along(x, y, xi_x, xi_y, t)
    (a, b), (v_a, v_b) = along(y, x, xi_y, xi_x, 1 - t)
    assert torch.allclose(x_t, b) and torch.allclose(y_t, a) and torch.allclose(v_x, -v_b) and torch.allclose(v_y, -v_a)


def test_every_image_has_its_own_time_and_both_of_its_branches_have_the_same():
    given, t = ends(4), torch.tensor([0., .25, .5, 1.], dtype=torch.float64)
    (x_t, y_t), _ = symmflow.path(*given, t, 0.)
    for i in range(4):
        (a, b), _ = along(*(z[i:i + 1] for z in given), t[i].item())
        assert torch.equal(a[0], x_t[i]) and torch.equal(b[0], y_t[i])


# ---------------------------------------------------------------------------------------------- 2 the loss
class Oracle:
    """The velocity of somebody who knows image and label map: what is noise follows from the point."""

    def __init__(self, x, y, s):
        self.x, self.y, self.s = x, y, s

    def __call__(self, z, t):
        t = t.view(-1, 1, 1, 1)
        left, n = 1 - (1 - self.s) * t, self.x.shape[1]
        xi_x, xi_y = (z[:, :n] - t * self.x) / left, (z[:, n:] - left * self.y) / t
        return torch.cat([self.x - (1 - self.s) * xi_x, xi_y - (1 - self.s) * self.y], 1)


@pytest.fixture
def seen(monkeypatch):
    """What `path` is given and gives, of every call."""
    calls, path = [], symmflow.path

    def spy(*given):
        calls.append((given, path(*given)))
        return calls[-1][1]

    monkeypatch.setattr(symmflow, "path", spy)
    return calls


@pytest.mark.parametrize("s", [0., 1e-4])
def test_a_velocity_that_knows_the_ends_has_no_loss(s):
    x, y = torch.rand(64, 3, 4, 4), torch.rand(64, 2, 4, 4)
    losses = symmflow.loss(SimpleNamespace(unet=Oracle(x, y, s)), tiny(sigma_min=s), x, y)
    assert all(losses[k] < 1e-8 for k in ("image", "label", "flow"))


@pytest.mark.parametrize("w", [0., .7, 1.])
def test_before_training_the_loss_is_the_weighted_square_of_the_velocities(seen, w):
    config = tiny(image_weight=w)
    nets, x = networks(config, wear=False), images(16)
    losses = symmflow.loss(nets, config, x, nets.label_map(torch.arange(16) % 5, (16, 16)))
    v_x, v_y = seen[0][1][1]
    assert losses["image"].item() == pytest.approx(v_x.square().mean().item(), rel=1e-5)
    assert losses["label"].item() == pytest.approx(v_y.square().mean().item(), rel=1e-5)
    assert losses["flow"].item() == pytest.approx(w * v_x.square().mean().item() + (1 - w) * v_y.square().mean().item(), rel=1e-5)


def test_the_noises_are_standard_normal_and_independent(seen):
    config = tiny()
    nets = networks(config, wear=False)
    symmflow.loss(nets, config, images(64), nets.label_map(torch.arange(64) % 5, (16, 16)))
    _, _, xi_x, xi_y = seen[0][0][:4]
    for xi in (xi_x, xi_y):
        assert abs(xi.mean()) < .03 and abs(xi.var() - 1) < .03
    assert abs((xi_x * xi_y).mean()) < .03


def test_shared_noise_is_one_number_a_label_channel_and_image_in_training_and_in_classification(seen, monkeypatch):
    config = tiny(label_noise="shared", samples=3)
    nets = networks(config, wear=False)
    symmflow.loss(nets, config, images(64), nets.label_map(torch.arange(64) % 5, (16, 16)))
    _, _, xi_x, xi_y = seen[0][0][:4]
    assert xi_x.std((2, 3)).min() > .5 and xi_y.shape == (64, 3, 16, 16) and torch.equal(xi_y, xi_y[:, :, :1, :1].expand_as(xi_y))
    assert abs(xi_y.mean()) < .3 and .6 < xi_y[:, :, 0, 0].var() < 1.5
    ((batch, noise, out),) = symmflow.classified(nets, pictures(4), config, CPU)
    assert noise.shape == (4, 3, 3, 16, 16) and len(noise[..., 0, 0].unique()) == 36 and (noise == noise[..., :1, :1]).all()


def test_pooled_the_mean_pixel_of_the_label_map_enters_beside_the_time():
    config, given = tiny(pooled=True), []
    nets, y = networks(config), torch.randn(4, 3, 16, 16)
    nets.unet.classes.register_forward_hook(lambda module, args, out: given.append(args[0]))
    with torch.no_grad():
        symmflow.velocity(nets.unet, config, images(4), y, torch.rand(4))
    assert torch.equal(given[0], y.mean((2, 3))) and networks(tiny()).unet.classes is None


@pytest.mark.parametrize("time", [0., .2, .5, .9, 1.])
def test_the_preconditioning_is_the_least_squares_slope_of_the_velocity_on_the_point(time):
    """For images and label maps of spread 1, of both branches: what the U-Net is left to learn is uncorrelated with its input."""
    config = tiny(precondition=True)
    nets = networks(config, wear=False)                                 # its U-Net gives exactly 0
    x, y, xi_x, xi_y = torch.randn(4, 500, 3, 16, 16)
    (x_t, y_t), (v_x, v_y) = symmflow.path(x, y, xi_x, xi_y, torch.full((500,), time), 0.)
    with torch.no_grad():
        hat_x, hat_y = symmflow.velocity(nets.unet, config, x_t, y_t, torch.full((500,), time))
    for z, v, hat in ((x_t, v_x, hat_x), (y_t, v_y, hat_y)):
        slope = (z * v).sum() / z.square().sum()
        assert torch.allclose(hat, slope * z, atol=.05)
    plain = symmflow.velocity(nets.unet, tiny(), x_t, y_t, torch.full((500,), time))
    assert not any(v.any() for v in plain)


@torch.no_grad()
def test_heun_ends_where_the_posterior_says_and_not_at_half_the_noise():
    config = tiny(label_loss="posterior", codes="onehot", precondition=True, label_noise="shared")
    nets, x, noise = networks(config), images(2), torch.randn(2, 1, 5, 1, 1).expand(-1, -1, -1, 16, 16)
    euler, heun = (symmflow.classify(nets, dataclasses.replace(config, solver=solver), x, noise).p for solver in ("euler", "heun"))
    assert torch.allclose(euler, heun, atol=1e-5)


@pytest.mark.parametrize("given, said", [(dict(label_loss="posterior", codes="onehot", decision="mode"), "--decision mode"),
                                         (dict(uncertainty="spread"), "--uncertainty spread"),
                                         (dict(uncertainty="spread", samples=3, precondition=True), "--uncertainty spread")])
def test_what_could_say_nothing_is_refused(given, said):
    with pytest.raises(run.UserError, match=f"^{said}: .*take"):
        networks(tiny(**given))
    networks(tiny(uncertainty="spread", samples=2, precondition=True, mirror=True, augment="hflip"))        # draws differ by the mirror image


def test_where_draws_cannot_differ_each_mirror_image_is_looked_at_once(monkeypatch):
    config = tiny(label_loss="posterior", codes="onehot", precondition=True, augment="hflip", mirror=True, samples=6)
    nets, x, noise, seen = networks(config), images(3), torch.randn(3, 6, 5, 16, 16), []
    monkeypatch.setattr(symmflow, "flow", lambda unet, config, z, y, *rest, own=symmflow.flow: seen.append(len(z)) or own(unet, config, z, y, *rest))
    with torch.no_grad():
        p = [symmflow.classify(nets, dataclasses.replace(config, steps=steps, samples=n), x, noise[:, :n]).p for steps, n in ((1, 6), (1, 2), (1, 1), (2, 6))]
    assert seen == [6, 6, 3, 18] and torch.allclose(p[0], p[1], atol=1e-6) and not torch.allclose(p[0], p[2], atol=1e-4)


def test_compiled_the_parts_that_are_called_by_themselves_are_too():
    graphs, nets = [], networks(tiny(label_loss="posterior", codes="onehot"))
    nets.unet.compile(backend=lambda graph, given: (graphs.append(graph), graph.forward)[1])
    with torch.no_grad():
        symmflow.classify(nets, tiny(label_loss="posterior", codes="onehot"), images(2), torch.randn(2, 1, 5, 16, 16))
    assert graphs


@torch.no_grad()
def test_preconditioned_the_network_sees_no_noise_where_there_is_nothing_else():
    config, given = tiny(precondition=True, codes="onehot"), []
    nets, x, y = networks(config), torch.randn(2, 3, 16, 16), torch.randn(2, 5, 16, 16)
    nets.unet.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    for time in (0., 1., .5):
        symmflow.velocity(nets.unet, config, x, y, torch.full((2,), time))
    start, end, middle = given
    assert not start[:, :3].any() and torch.equal(start[:, 3:], y) and torch.equal(end[:, :3], x) and not end[:, 3:].any()
    assert torch.allclose(middle, torch.cat([x, y], 1))


@torch.no_grad()
@pytest.mark.parametrize("noise", ["pixel", "shared"])
def test_posterior_the_velocity_leads_to_the_mean_of_the_codes_under_p(noise):
    config = tiny(label_loss="posterior", codes="onehot", precondition=True, label_noise=noise, sigma_min=0.)
    nets, x, y = networks(config), torch.randn(2, 3, 16, 16), torch.randn(2, 5, 16, 16)
    for time in (1., .6, .1, 0.):
        t = torch.full((2,), time)
        p = symmflow.outputs(nets.unet, config, x, y, t)[1].mean((2, 3)).softmax(1)
        mean = torch.einsum("bk,kd->bd", p, nets.codes)[..., None, None].expand(-1, -1, 16, 16)
        v_y = symmflow.velocity(nets.unet, config, x, y, t)[1]
        assert torch.allclose(y - time * v_y, mean if time else y, atol=1e-5) and p.std(1).min() > 1e-3
        assert time or torch.equal(v_y, -y)                             # where y_t is the label map itself
    found = symmflow.classify(nets, config, x, torch.stack([y, -y], 1))
    p = symmflow.outputs(nets.unet, config, x, y, torch.ones(2))[1].mean((2, 3)).softmax(1)
    assert torch.allclose(found.p, p, atol=1e-4) and not found.spread.any()      # at t = 1 the label's noise is not seen: the draws agree


def test_posterior_the_loss_is_the_cross_entropy_of_the_class(seen):
    config = tiny(label_loss="posterior", codes="onehot", image_weight=0.)
    nets, labels = networks(config), torch.arange(16) % 5
    found = symmflow.loss(nets, config, images(16), nets.label_map(labels, (16, 16)))
    (given, ((x_t, y_t), _)), = seen
    logits = symmflow.outputs(nets.unet, config, x_t, y_t, given[4])[1].mean((2, 3))
    assert found["label"].item() == found["flow"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    found["flow"].backward()
    assert nets.unet.reader.weight.grad.any() and not nets.unet.leave[-1][-1].weight.grad.any() and nets.unet.leave[-1][-1].out_channels == 3


@pytest.mark.parametrize("codes", ["rgb", "grey", "simplex"])
def test_posterior_is_of_one_hot_codes(codes):
    with pytest.raises(run.UserError, match=f"--label-loss posterior --codes {codes}: .*add --label-loss map"):
        networks(tiny(label_loss="posterior", codes=codes))


@torch.no_grad()
def test_balanced_training_is_undone_in_the_probabilities():
    config = tiny(balanced=True, codes="onehot")
    nets, data = networks(config), load_for(configure(data="toy", size=28))
    symmflow.initialise(nets, data, config)
    shares = torch.from_numpy(np.bincount(data.train.labels) / len(data.train))
    assert torch.allclose(nets.prior.double(), shares * 5, atol=1e-6) and shares.max() > 2 * shares.min()
    x, noise = images(6), torch.randn(6, 1, 5, 16, 16)
    with_shares = symmflow.classify(nets, config, x, noise).p
    nets.prior.fill_(1)
    without = symmflow.classify(nets, config, x, noise).p * shares
    assert torch.allclose(with_shares.double(), without / without.sum(1, keepdim=True), atol=1e-5)


def test_the_loss_of_the_label_map_is_the_squared_error_of_where_the_velocity_leads(seen):
    config = tiny(label_loss="map")
    nets = networks(config)
    y = nets.label_map(torch.arange(16) % 5, (16, 16))
    with torch.no_grad():
        found = symmflow.loss(nets, config, images(16), y)["label"]
        (given, ((x_t, y_t), _)), = seen
        _, v_y = symmflow.velocity(nets.unet, config, x_t, y_t, given[4])
    reached = y_t - given[4].view(-1, 1, 1, 1) * v_y                    # one step from t to 0
    assert found.item() == pytest.approx((reached - y).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("w, silent", [(1., slice(3, None)), (0., slice(0, 3))])
def test_a_weight_of_one_or_zero_leaves_half_of_the_output_without_gradient(w, silent):
    config = tiny(image_weight=w)
    nets = networks(config)
    symmflow.loss(nets, config, images(4), nets.label_map(torch.arange(4), (16, 16)))["flow"].backward()
    grad = nets.unet.leave[-1][-1].weight.grad
    assert not grad[silent].any() and grad.flatten(1).any(1).sum() == 3


def times_seen(monkeypatch, config, n=2000):
    """The t that the network was given and that the path was made with, and the losses."""
    given, path = [], symmflow.path
    monkeypatch.setattr(symmflow, "path", lambda *a: (given.append(a[4]), path(*a))[1])
    unet = lambda z, t: (given.append(t), torch.zeros_like(z))[1]
    losses = symmflow.loss(SimpleNamespace(unet=unet), config, torch.ones(n, 1, 1, 1), torch.ones(n, 2, 1, 1))
    return given[1], given[0], losses


def test_the_time_is_uniform_and_one_number_an_image(monkeypatch):
    t, of_path, _ = times_seen(monkeypatch, tiny())
    assert t.shape == (2000,) and torch.equal(t, of_path) and (t < 1).all()
    counts = torch.histc(t, 10, 0, 1)
    assert (counts - 200).abs().max() < 5 * math.sqrt(200)


@pytest.mark.parametrize("scale", [1., 1000.])
def test_the_networks_time_is_that_of_the_path_times_its_scale(monkeypatch, scale):
    t, of_path, _ = times_seen(monkeypatch, tiny(time_scale=scale, t_one=.2))
    assert torch.equal(t, of_path * scale)


@pytest.mark.parametrize("share, n", [(.3, 600), (1., 2000)])
def test_a_share_of_the_images_is_seen_again_at_the_one_time_that_classification_uses(monkeypatch, share, n):
    t, *_ = times_seen(monkeypatch, tiny(t_one=share))
    assert len(t) == 2000 + n and (t[2000:] == 1).all() and (t[:2000] < 1).all() and abs(t[:2000].mean() - .5) < .03


def test_posterior_the_decoder_sees_no_image_a_second_time():
    config, seen_by = tiny(label_loss="posterior", codes="onehot", t_one=.5), Counter()
    nets = networks(config)
    nets.unet.enter[0].register_forward_hook(lambda module, args, out: seen_by.update(encoder=len(out)))
    nets.unet.leave[-1].register_forward_hook(lambda module, args, out: seen_by.update(decoder=len(out)))
    symmflow.loss(nets, config, images(8), nets.label_map(torch.arange(8) % 5, (16, 16)))
    assert seen_by == {"encoder": 12, "decoder": 8}
    seen_by.clear()
    with torch.no_grad():
        symmflow.classify(nets, config, images(8), torch.randn(8, 1, 5, 16, 16))
        assert seen_by == {"encoder": 8}                                # one step: nobody looks at the image's velocity
        symmflow.classify(nets, dataclasses.replace(config, steps=2), images(8), torch.randn(8, 1, 5, 16, 16))
    assert seen_by == {"encoder": 24, "decoder": 16}


def test_images_at_one_do_not_enter_the_image_loss_and_all_enter_that_of_the_labels(seen):
    config = tiny(t_one=.5)
    nets = networks(config)
    losses = symmflow.loss(nets, config, images(32), nets.label_map(torch.arange(32) % 5, (16, 16)))
    (images_seen, *_, t, _), ((x_t, y_t), (v_x, v_y)) = seen[0]
    with torch.no_grad():
        hat = nets.unet(torch.cat([x_t, y_t], 1), t)
    error_x, error_y = (hat[:, :3] - v_x).square().mean((1, 2, 3)), (hat[:, 3:] - v_y).square().mean((1, 2, 3))
    assert (t == 1).sum() == 16 and torch.equal(images_seen[32:], images_seen[:16])
    assert losses["image"].item() == pytest.approx(error_x[t < 1].mean().item(), rel=1e-5)
    assert losses["label"].item() == pytest.approx(error_y.mean().item(), rel=1e-5)


def test_the_label_loss_is_kept_by_tenths_of_the_time(seen):
    config = tiny(t_one=.2)
    nets = networks(config, wear=False)
    by_t = symmflow.loss(nets, config, images(32), nets.label_map(torch.arange(32) % 5, (16, 16)))["label_by_t"]
    (*_, t, _), (_, (_, v_y)) = seen[0]
    for k in range(10):
        inside = (t * 10).floor().clamp_max(9) == k
        assert by_t[1, k] == inside.sum() and by_t[0, k].item() == pytest.approx(v_y[inside].square().mean((1, 2, 3)).sum().item(), rel=1e-4, abs=1e-5)


def test_the_plain_resnet_shares_images_and_no_weights_and_is_alone_before_the_flow_begins():
    config = tiny(baseline=True)
    nets, part = networks(config), batch(4)
    alone = symmflow.train_step(nets, None, config, part, joint=False)
    assert set(alone) == {"resnet", "loss"} and alone["loss"] == alone["resnet"]
    both = symmflow.train_step(nets, None, config, part, joint=True)
    assert both["loss"].item() == pytest.approx((both["resnet"] + both["flow"]).item())
    both["flow"].backward()
    assert all(p.grad is None for p in nets.resnet.parameters())


# ---------------------------------------------------------------------------------------------- 3 colours
PALETTE = {2: "0,0,0 225,225,225", 5: "0,0,0 0,225,225 75,225,225 150,225,225 225,225,225",
           7: "0,0,0 0,150,150 75,75,75 75,225,225 150,150,150 225,75,0 225,225,225",
           8: "0,0,0 0,150,75 75,0,150 75,150,225 150,75,0 150,225,75 225,75,150 225,225,225"}


@pytest.mark.parametrize("K", PALETTE)
def test_the_palette_has_the_papers_colours(K):
    codes, _ = symmflow.class_codes("rgb", K)
    expected = [[int(n) for n in colour.split(",")] for colour in PALETTE[K].split()]
    assert torch.allclose((codes.double() + 1) * 127.5, torch.tensor(expected, dtype=torch.float64), atol=1e-4)
    assert codes.min() == -1 and codes.max().item() == pytest.approx(225 / 127.5 - 1)         # .765, never 1


@pytest.mark.parametrize("K, nearest", [(2, 3.06), (5, .59), (7, 1.02), (8, 1.32)])
def test_the_palettes_colours_are_as_far_apart_as_in_the_paper(K, nearest):
    d = torch.pdist(symmflow.class_codes("rgb", K)[0])
    assert d.min().item() == pytest.approx(nearest, abs=.005) and d.max().item() == pytest.approx(3.06, abs=.005)


def test_the_palettes_indices_are_whole_parts_in_exact_arithmetic():
    for K in range(2, 65):
        index = ((symmflow.class_codes("rgb", K)[0] + 1) * 1.7).round().long() @ torch.tensor([16, 4, 1])
        assert index.tolist() == [k * 63 // (K - 1) for k in range(K)] and len(set(index.tolist())) == K


def test_more_classes_than_the_palette_has_colours_are_refused():
    with pytest.raises(run.UserError, match="--codes"):
        networks(tiny(codes="rgb"), classes=65)


@pytest.mark.parametrize("beta", [4., 15.])
@pytest.mark.parametrize("K", [2, 5])
def test_grey_levels_run_from_minus_to_plus_half_of_beta(K, beta):
    codes, width = symmflow.class_codes("grey", K, beta)
    assert codes.shape == (K, 1) and torch.allclose(codes[:, 0], torch.tensor([beta / 2 * (2 * k / (K - 1) - 1) for k in range(K)]))
    assert width == pytest.approx(beta / 2 / (2 * (K - 1)))
    assert 2 * width <= (codes[1] - codes[0]).item() / 2 + 1e-6                                # supports half a spacing wide: disjoint


@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_one_hot_and_simplex_codes_are_equidistant(K):
    for kind, D in (("onehot", K), ("simplex", K - 1)):
        codes, _ = symmflow.class_codes(kind, K)
        d = torch.pdist(codes.double())
        assert codes.shape == (K, D) and torch.allclose(d, d[:1].expand_as(d), atol=1e-5) and d[0] > 1
    assert codes.mean(0).abs().max() < 1e-6                                                    # a simplex around 0
    assert torch.equal(symmflow.class_codes("onehot", K)[0].argmax(1), torch.arange(K))


@pytest.mark.parametrize("kind, width", [("rgb", 2 / 127.5), ("grey", .25), ("onehot", 2 / 127.5), ("simplex", 2 / 127.5)])
def test_noise_is_uniform_by_pixel_and_channel_and_keeps_its_bounds(kind, width):
    codes, noise_width = symmflow.class_codes(kind, 5)
    y = torch.arange(20) % 5
    off = symmflow.label_map(codes.float(), noise_width, y, (16, 16)) - codes.float()[y][:, :, None, None]
    assert noise_width == pytest.approx(width) and off.abs().max() <= width + 1e-6 and off.abs().max() > .99 * width
    assert abs(off.mean()) < .02 * width and off.var().item() == pytest.approx(width ** 2 / 3, rel=.05)
    assert off.flatten().unique().numel() > .4 * off.numel()                                   # float32 rounds some together


def test_without_noise_a_label_map_is_one_colour():
    codes, width = symmflow.class_codes("rgb", 7)
    maps = symmflow.label_map(codes.float(), width, torch.tensor([4, 0]), (3, 5), noise=False)
    assert maps.shape == (2, 3, 3, 5) and torch.equal(maps, codes.float()[[4, 0]][:, :, None, None].expand(-1, -1, 3, 5))


# ---------------------------------------------------------------------------------------------- 4 there and back
@pytest.mark.parametrize("decision", ["mean", "mode"])
@pytest.mark.parametrize("kind, K", [*itertools.product(KINDS, (2, 3, 5, 7, 8, 11, 64))])
def test_a_noisy_label_map_is_read_as_its_label(kind, K, decision):
    codes, width = symmflow.class_codes(kind, K)
    y = torch.arange(K)
    out = read(symmflow.label_map(codes.float(), width, y, (4, 4)), kind, K, decision=decision)
    assert torch.equal(out.p.argmax(1), y) and torch.equal(out.d.argmin(1), y) and torch.equal(out.votes.argmax(1), y)
    assert torch.allclose(out.p.sum(1), torch.ones(K), atol=1e-5) and out.votes.max(1).values.eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_vote_stands_as_long_as_half_of_the_pixels_do(kind):
    codes = symmflow.class_codes(kind, 5)[0].float()
    maps = symmflow.label_map(codes, 0., torch.arange(5), (10, 10), noise=False).flatten(2).clone()
    maps[:, :, :49] = codes.flip(0)[:, :, None] * 3                     # far away
    out = read(maps.unflatten(2, (10, 10)), kind, 5, decision="mode")
    assert torch.equal(out.p.argmax(1), torch.arange(5)) and torch.allclose(out.votes.max(1).values[[0, 1, 3, 4]], torch.full((4,), .51))


@pytest.mark.parametrize("kind", KINDS)
def test_votes_are_shares_of_pixels_nearest_to_each_colour(kind):
    codes = symmflow.class_codes(kind, 5)[0].float()
    maps = torch.randn(3, codes.shape[1], 4, 6) * codes.std()
    out = read(maps, kind, 5)
    for b in range(3):
        count = Counter(min(range(5), key=lambda k: (maps[b, :, i, j] - codes[k]).norm().item()) for i in range(4) for j in range(6))
        assert out.votes[b].tolist() == pytest.approx([count[k] / 24 for k in range(5)])


# ---------------------------------------------------------------------------------------------- 5 the solver
class Recorder:
    """A velocity that depends on z and t alone, and remembers the times it was asked for."""

    def __init__(self, v):
        self.v, self.times = v, []

    def __call__(self, z, t):
        assert t.shape == (len(z),) and (t == t[0]).all()
        self.times.append(t[0].item())
        return self.v(z, t)


def constant(z, t):
    return torch.arange(1., z.shape[1] + 1).view(1, -1, 1, 1).expand_as(z)


@pytest.mark.parametrize("solver, calls", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25])
@pytest.mark.parametrize("start, end", [(1., 0.), (0., 1.)])
def test_a_step_is_one_call_of_the_network_for_euler_and_two_for_heun_on_an_even_grid(start, end, steps, solver, calls):
    unet = Recorder(constant)
    states = symmflow.flow(unet, tiny(solver=solver), torch.zeros(2, 1, 2, 2), torch.zeros(2, 2, 2, 2), start, end, steps)
    blind = solver == "heun" and end == 0                               # at t = 0 no velocity of the label map knows its noise
    assert len(states) == steps + 1 and len(unet.times) == calls * steps - blind
    grid = [start + (end - start) * i / steps for i in range(steps + 1)]
    wanted = grid[:-1] if solver == "euler" else [t for pair in zip(grid, grid[1:]) for t in pair]
    assert unet.times == pytest.approx(wanted[:-1] if blind else wanted, abs=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 3, 6, 7, 11, 25, 49, 100])
def test_any_number_of_steps_ends_exactly_at_the_end(steps, solver):
    """The authors' loop stops at .9 for steps of .3 (5.8). A unit velocity measures the time that was covered."""
    for start, end in ((1., 0.), (0., 1.)):
        nothing = torch.zeros(1, 1, 1, 1)
        states = symmflow.flow(lambda z, t: torch.ones_like(z), tiny(solver=solver), nothing, nothing, start, end, steps)
        assert all(z.item() == pytest.approx(end - start, abs=1e-6) for z in states[-1])


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("there, back", [(1, 1), (25, 1), (7, 3)])
def test_there_and_back_through_a_constant_velocity_is_the_start(there, back, solver):
    x, y, config = torch.randn(3, 1, 2, 2), torch.randn(3, 2, 2, 2), tiny(solver=solver)
    end = symmflow.flow(constant, config, x, y, 0., 1., there)[-1]
    assert torch.allclose(end[0], x + 1, atol=1e-5) and torch.allclose(end[1], y + torch.tensor([2., 3]).view(1, 2, 1, 1), atol=1e-5)
    again = symmflow.flow(constant, config, *end, 1., 0., back)[-1]
    assert torch.allclose(again[0], x, atol=1e-5) and torch.allclose(again[1], y, atol=1e-5)


def test_eulers_error_falls_with_the_step_and_heuns_with_its_square():
    def error(solver, steps):
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        end = symmflow.flow(lambda z, t: z, tiny(solver=solver), one, one, 0., 1., steps)[-1]
        return abs(end[0].item() - math.e)

    assert error("euler", 20) / error("euler", 40) == pytest.approx(2, rel=.05)
    assert error("heun", 20) / error("heun", 40) == pytest.approx(4, rel=.05) and error("heun", 20) < error("euler", 40) / 10


def test_image_and_label_map_flow_together():
    """Each one's velocity is the other: (x + y)' = x + y, and (x - y)' = y - x."""
    x, y, swap = torch.tensor(2.).view(1, 1, 1, 1), torch.tensor(1.).view(1, 1, 1, 1), lambda z, t: z.flip(1)
    a, b = symmflow.flow(swap, tiny(solver="heun"), x, y, 0., 1., 200)[-1]
    assert (a + b).item() == pytest.approx(3 * math.e, rel=1e-4) and (a - b).item() == pytest.approx(1 / math.e, rel=1e-4)


@pytest.mark.parametrize("classes", [2, 5, 8])
def test_by_default_a_class_needs_one_call_at_one_and_an_image_25_from_zero(classes):
    config = tiny()
    nets, calls = networks(config, classes=classes), []
    nets.unet.register_forward_hook(lambda module, args, out: calls.append((len(args[0]), args[1][0].item())))
    with torch.no_grad():
        symmflow.classify(nets, config, images(3), torch.randn(3, 1, 3, 16, 16))
        assert calls == [(3, 1.)]
        calls.clear()
        symmflow.draw(nets, config, torch.tensor([0, 1]), torch.randn(2, 3, 16, 16))
    assert [n for n, _ in calls] == [2] * 25 and [t for _, t in calls] == pytest.approx([.04 * i for i in range(25)], abs=1e-6)


@torch.no_grad()
def test_drawing_starts_at_the_noise_and_the_label_map_and_ends_within_the_range_of_images(monkeypatch):
    config, started = tiny(draw_steps=2), []
    nets, noise, flow = networks(config), torch.randn(2, 3, 16, 16), symmflow.flow
    monkeypatch.setattr(symmflow, "flow", lambda *a: (started.append(a[2:]), flow(*a))[1])
    x = symmflow.draw(nets, config, torch.tensor([4, 2]), noise)
    a, b, start, end, steps, _ = started[0]
    assert torch.equal(a, noise) and torch.equal(b, nets.codes[[4, 2]][:, :, None, None].expand(-1, -1, 16, 16)) and (start, end, steps) == (0., 1., 2)
    assert x.shape == (2, 3, 16, 16) and x.abs().max() <= 1


@torch.no_grad()
def test_guidance_moves_the_image_away_from_the_mean_over_all_classes_and_leaves_the_label_map():
    config = tiny(guidance=3.)
    nets, labels, t = networks(config), torch.tensor([4, 2]), torch.tensor([.25, .25])
    x, xi = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 1, 1)
    at = lambda k: .75 * nets.codes[k].view(-1, 3, 1, 1) + .25 * xi                # where the maps of classes k (B,) are at t, of the same noise
    own = symmflow.velocity(nets.unet, config, x, at(labels).expand(-1, -1, 16, 16), t)
    every = torch.stack([symmflow.velocity(nets.unet, config, x, at(torch.tensor([k, k])).expand(-1, -1, 16, 16), t)[0] for k in range(5)])
    found = []
    for draw_steps in (4, 8, 12, 16):                                   # t = 1/4 is their step 1, 2, 3, 4: each of the other classes once
        v_x, v_y = symmflow.guided(nets, dataclasses.replace(config, draw_steps=draw_steps), labels, x, at(labels).expand(-1, -1, 16, 16), t)
        assert torch.equal(v_y, own[1]) and not any(torch.allclose(v_x, other, atol=1e-5) for other in found)
        found.append(v_x)
    assert torch.allclose(torch.stack(found).mean(0), own[0] + 3 * (own[0] - every.mean(0)), atol=1e-4)
    plain = symmflow.guided(nets, tiny(), labels, x, at(labels).expand(-1, -1, 16, 16), t)
    assert torch.equal(plain[0], own[0]) and (own[0] - every.mean(0)).abs().max() > 1e-3


@torch.no_grad()
def test_drawing_needs_a_second_call_a_step_where_it_is_guided_whatever_the_number_of_classes():
    calls = Counter()
    for guidance, wanted in ((0., 4), (2., 4 * 2)):
        config = tiny(draw_steps=4, guidance=guidance)
        nets = networks(config)
        nets.unet.register_forward_hook(lambda *given, g=guidance: calls.update([g]))
        symmflow.draw(nets, config, torch.tensor([0, 1]), torch.randn(2, 3, 16, 16))
        assert calls[guidance] == wanted


# ---------------------------------------------------------------------------------------------- 6 one step, exactly
MEANS = torch.arange(-2., 3, dtype=torch.float64)


class Marginal:
    """1.6: E[v | x_t, y_t] where x is a number, N(mean of its class, spread^2), and every class is equally likely."""

    def __init__(self, codes, spread):
        self.codes, self.spread = codes.double(), spread

    def __call__(self, z, t):
        z, t = z.double().flatten(1), t.double()[:, None]
        x, y = z[:, :1], z[:, 1:]
        variance, off = (1 - t) ** 2 + (t * self.spread) ** 2, y[:, None] - (1 - t)[:, None] * self.codes       # off: t xi_y
        w = (-(x - t * MEANS) ** 2 / (2 * variance) - off.square().sum(2) / (2 * t ** 2)).softmax(1)[..., None]
        v_x = MEANS + (t * self.spread ** 2 - (1 - t)) / variance * (x - t * MEANS)
        v = torch.cat([(w * v_x[..., None]).sum(1), (w * (off / t[..., None] - self.codes)).sum(1)], 1)
        return v[..., None, None].float()


def mixture(spread, n=4000):
    """n numbers, their labels and their exact posterior."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, n)
    x = torch.from_numpy(rng.normal(MEANS.numpy()[label], spread))
    return x, label, (-((x[:, None] - MEANS) / spread) ** 2 / 2).softmax(1)


def flowed(kind, spread, seed=0, **given):
    """x, label, posterior and the Prediction of the exact velocity."""
    x, label, posterior = mixture(spread)
    nets = stand_in(None, kind, 5)
    nets.unet = Marginal(nets.codes, spread)
    noise = torch.randn(len(x), given.get("samples", 1), nets.codes.shape[1], 1, 1, generator=torch.Generator().manual_seed(seed))
    return label, posterior, nets, symmflow.classify(nets, tiny(codes=kind, **given), x.float().view(-1, 1, 1, 1), noise)


@pytest.mark.parametrize("spread", [.2, .6])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_the_exact_velocity_is_the_mean_colour_of_the_posterior(kind, spread):
    _, posterior, nets, out = flowed(kind, spread)
    assert (out.y[..., 0, 0] - posterior.float() @ nets.codes).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_does_not_depend_on_the_noise(kind):
    a, b = flowed(kind, .6, seed=1)[3], flowed(kind, .6, seed=2)[3]
    assert (a.y - b.y).abs().max() < 1e-4 and (a.p - b.p).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["onehot", "simplex"])
@pytest.mark.parametrize("spread", [.2, .6])
def test_with_equidistant_codes_one_step_gives_the_posterior_and_decides_as_bayes_does(spread, kind):
    label, posterior, _, out = flowed(kind, spread)
    floored = posterior.clamp_min(1e-3)
    assert (out.p - floored / floored.sum(1, keepdim=True)).abs().max() < 1e-4
    sure = posterior.topk(2).values.diff().abs()[:, 0] > 1e-3
    assert torch.equal(out.p.argmax(1)[sure], posterior.argmax(1)[sure])
    accuracy, bayes = ((p.argmax(1).numpy() == label).mean() for p in (out.p, posterior))
    right = math.erf(.5 / spread / 2 ** .5)                              # within half a unit of a mean; outer classes are open on a side
    assert accuracy == pytest.approx(bayes, abs=1e-3) and bayes == pytest.approx((2 * (1 + right) / 2 + 3 * right) / 5, abs=.02)


def test_with_the_palette_one_step_is_nearly_as_accurate():
    for spread in (.2, .6):
        label, posterior, _, out = flowed("rgb", spread)
        accuracy, bayes = ((p.argmax(1).numpy() == label).mean() for p in (out.p, posterior))
        assert accuracy == pytest.approx(bayes, abs=.015)


def test_more_steps_of_the_exact_velocity_cost_accuracy_and_make_every_answer_sure():
    """1.6: the image is noised again while the label map is denoised. Euler's first step alone is E[c | x]."""
    accuracy, distance = {}, {}
    for steps in (1, 2, 5, 25):
        label, _, _, out = flowed("rgb", .6, steps=steps)
        accuracy[steps], distance[steps] = (out.p.argmax(1).numpy() == label).mean(), out.distance.mean().item()
    assert accuracy == pytest.approx({1: .677, 2: .540, 5: .464, 25: .437}, abs=.03)       # of 100,000
    assert distance[1] == pytest.approx(.292, abs=.02) and distance[25] < .01


def curve(correct, uncertainty):
    return np.array(metrics.coverage_accuracy(correct, np.asarray(uncertainty, np.float64))[1])


def test_the_one_hot_code_has_the_selective_curve_of_the_posterior_and_the_palette_has_not():
    label, posterior, _, out = flowed("onehot", .6)
    oracle = curve(posterior.argmax(1).numpy() == label, 1 - posterior.max(1).values)
    correct = out.p.argmax(1).numpy() == label
    assert np.abs(curve(correct, 1 - out.p.max(1).values) - oracle).max() < .01
    for kind in ("distance", "entropy", "margin"):
        assert np.abs(curve(correct, getattr(out, kind)) - oracle).max() < .05, kind
    assert oracle[16] == pytest.approx(.924, abs=.03)                    # 20 % kept; of 100,000 numbers .924 and .806
    _, _, _, out = flowed("rgb", .6)
    palette = curve(out.p.argmax(1).numpy() == label, out.distance)
    assert palette[16] == pytest.approx(.806, abs=.04) and palette[16] < oracle[16] - .05


def test_accuracy_never_falls_where_an_oracle_rejects():
    label, _, _, out = flowed("rgb", .6)
    correct = out.p.argmax(1).numpy() == label
    assert (np.diff(curve(correct, 1. - correct)) >= 0).all() and curve(correct, 1. - correct)[0] == correct.mean()


def test_rejection_drops_the_most_uncertain_first():
    label, _, _, out = flowed("rgb", .6)
    correct, u = out.p.argmax(1).numpy() == label, out.distance.numpy().astype(np.float64)
    order = np.argsort(-u, kind="stable")
    for i, r in enumerate(range(0, 100, 5)):
        kept = order[4000 * r // 100:]
        assert len(kept) == 4000 - int(4000 * r / 100) and curve(correct, u)[i] == pytest.approx(correct[kept].mean(), abs=2e-3)


# ---------------------------------------------------------------------------------------------- 7 distances
@pytest.mark.parametrize("kind", KINDS)
def test_a_distance_is_zero_where_the_map_has_the_colour_and_nowhere_else(kind):
    codes = symmflow.class_codes(kind, 5)[0].float()
    maps = symmflow.label_map(codes, 0., torch.arange(5), (3, 4), noise=False)
    d = symmflow.distances(maps, codes, kind)
    assert torch.equal(d.diagonal(), torch.zeros(5)) and (d + 9 * torch.eye(5)).min() > .1
    maps = maps.clone()
    maps[:, 0, 2, 1] += .5
    assert (symmflow.distances(maps, codes, kind).diagonal() > .01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_palettes_distance_is_a_mean_of_pixels_and_the_others_that_of_the_mean(kind):
    codes = symmflow.class_codes(kind, 4)[0].float()
    maps = torch.randn(2, 3, codes.shape[1], 3, 4)                       # (B, S): any leading sides
    d = symmflow.distances(maps, codes, kind)
    assert d.shape == (2, 3, 4)
    for b, s, k in itertools.product(range(2), range(3), range(4)):
        pixels = maps[b, s].flatten(1).T
        wanted = torch.stack([(p - codes[k]).norm() for p in pixels]).mean() if kind == "rgb" else (pixels.mean(0) - codes[k]).norm()
        assert d[b, s, k].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_pixel_noise_lifts_the_mean_of_distances_and_not_the_distance_of_the_mean():
    codes = symmflow.class_codes("onehot", 5)[0]
    noisy = symmflow.label_map(codes, 0., torch.arange(5), (32, 32)) + torch.randn(5, 5, 32, 32)
    assert symmflow.distances(noisy, codes, "rgb").diagonal().min() > 2 and symmflow.distances(noisy, codes, "onehot").diagonal().max() < .2


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_the_nearest_colour_and_its_distance_the_uncertainty(kind):
    codes = symmflow.class_codes(kind, 5)[0].float()
    out = read(torch.randn(50, codes.shape[1], 2, 2) * codes.std(), kind, 5)
    assert torch.equal(out.p.argmax(1), out.d.argmin(1)) and torch.equal(out.distance, out.d.min(1).values)


@pytest.mark.parametrize("K, doubt, taken_for", [(5, (1, 3), 2), (5, (2, 4), 3), (7, (0, 4), 2), (7, (2, 6), 4)])
def test_in_the_papers_palette_a_doubt_between_two_classes_is_a_sure_third_and_in_ours_a_doubt(K, doubt, taken_for):
    """Retina's grades 1 and 3 as a certain 2; Derma's classes 0 (akiec) and 4 (melanoma) as 2 (benign keratosis)."""
    for kind in ("rgb", "onehot", "simplex"):
        codes = symmflow.class_codes(kind, K)[0].float()
        out = read(codes[list(doubt)].mean(0).view(1, -1, 1, 1).expand(1, -1, 4, 4), kind, K)
        if kind == "rgb":
            assert out.p.argmax() == taken_for and out.distance < 1e-6
        else:
            assert out.p.argmax() in doubt and out.distance > .9 and out.margin > .99
            assert out.p[0, list(doubt)].min() > .49 and out.entropy.item() == pytest.approx(math.log(2) / math.log(K), abs=.03)


def test_barycentric_weights_give_the_point_back():
    for kind in ("onehot", "simplex"):
        codes, w = symmflow.class_codes(kind, 6)[0].float(), torch.randn(8, 6).softmax(1)
        assert torch.allclose(symmflow.barycentric(w @ codes, codes), w, atol=1e-5)
        beyond = torch.tensor([[1.3, -.3, 0, 0, 0, 0]])
        assert torch.allclose(symmflow.barycentric(beyond @ codes, codes), beyond, atol=1e-5)
    off_the_plane = codes.new_ones(1, 6) * 5 + 2 * torch.eye(6)[:1]      # one-hot: what lies beside the plane of the codes is ignored
    assert symmflow.barycentric(off_the_plane, symmflow.class_codes("onehot", 6)[0]).sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_uncertainties_are_those_computed_by_hand():
    codes = symmflow.class_codes("onehot", 3)[0]
    w = torch.tensor([[.7, .2, .1], [1., 0, 0]])
    out = read((w @ codes)[:, :, None, None].expand(-1, -1, 2, 2), "onehot", 3)
    assert out.entropy[0].item() == pytest.approx(-sum(p * math.log(p) for p in (.7, .2, .1)) / math.log(3), abs=1e-4)
    assert out.margin[0].item() == pytest.approx(.5, abs=1e-4) and out.distance[0].item() == pytest.approx(2 * math.sqrt(.3 ** 2 + .2 ** 2 + .1 ** 2), abs=1e-4)
    assert out.entropy[1] < .02 and out.margin[1] < .01 and out.distance[1] < 1e-5 and (out.spread == 0).all()


@torch.no_grad()
def test_a_temperature_flattens_the_probabilities_and_moves_no_decision():
    config = tiny(codes="onehot")
    nets, x, noise = networks(config), images(6), torch.randn(6, 1, 5, 16, 16)
    cold = symmflow.classify(nets, config, x, noise)
    nets.temperature.fill_(3)
    warm = symmflow.classify(nets, config, x, noise)
    flat = cold.p ** (1 / 3) / (cold.p ** (1 / 3)).sum(1, keepdim=True)
    assert torch.allclose(warm.p, flat, atol=1e-5) and torch.equal(warm.p.argmax(1), cold.p.argmax(1)) and (warm.entropy > cold.entropy).all()


# ---------------------------------------------------------------------------------------------- 8 AUROC by distance
def test_the_papers_auroc_ranks_pairs_by_distance():
    label, _, _, out = flowed("rgb", .6)
    label, d = label[:150], out.d[:150].numpy().round(2)                 # rounded, so that some tie
    areas = []
    for k in range(5):
        pairs = [(d[i, k], d[j, k]) for i in range(150) for j in range(150) if label[i] == k != label[j]]
        areas.append(np.mean([(a < b) + .5 * (a == b) for a, b in pairs]))
    assert metrics.auroc(label, -d) == pytest.approx(np.mean(areas), abs=1e-12)


def test_for_two_classes_the_papers_auroc_is_medmnists_where_maps_lie_between_the_colours():
    share, label = torch.rand(200), np.arange(200) % 2
    share = torch.where(torch.from_numpy(label) == 1, share ** .5, share)
    codes = symmflow.class_codes("rgb", 2)[0].float()
    maps = (codes[0] + share[:, None] * (codes[1] - codes[0]))[:, :, None, None].expand(-1, -1, 2, 2)
    d = read(maps, "rgb", 2).d.double().numpy()
    assert metrics.auroc(label, -d) == pytest.approx(metrics.auroc(label, -d[:, 1]), abs=1e-3) and .6 < metrics.auroc(label, -d) < .9


# ---------------------------------------------------------------------------------------------- 10 networks
@pytest.mark.parametrize("data, channels, classes, count", [("pneumoniamnist", 1, 2, 8_953_220), ("retinamnist", 3, 5, 8_955_526), ("bloodmnist", 3, 8, 8_955_526)])
def test_the_papers_networks_have_the_papers_number_of_parameters(data, channels, classes, count):
    config = configure(data=data)
    assert (config.scale, config.recipe, config.codes, config.size, config.epochs) == ("paper", "paper", "rgb", 32, 1000)
    with torch.device("meta"):
        nets = networks(config, channels, classes, wear=False)
    assert sum(p.numel() for p in nets.unet.parameters()) == count
    assert nets.shapes(32) == ((channels, 32, 32), (3, 32, 32))


def test_the_papers_latent_network_has_its_number_of_parameters_and_the_same_at_every_number_of_classes(latent):
    config = configure(data="bloodmnist", size=256, latent="rgb", autoencoder=latent.file, channels=128, baseline=False)
    assert sum(p.numel() for p in networks(config, 3, 8, wear=False).unet.parameters()) == 35_757_832


@pytest.mark.parametrize("codes, channels", [*itertools.product(KINDS, (1, 3))])
def test_untrained_networks_answer_zero_in_the_shape_of_what_flows(codes, channels):
    config = tiny(codes=codes)
    nets, D = networks(config, channels, wear=False), {"rgb": 3, "grey": 1, "onehot": 5, "simplex": 4}[codes]
    assert nets.shapes(16) == ((channels, 16, 16), (D, 16, 16))
    v_x, v_y = symmflow.velocity(nets.unet, config, torch.randn(2, channels, 16, 16), torch.randn(2, D, 16, 16), torch.rand(2))
    assert v_x.shape == (2, channels, 16, 16) and v_y.shape == (2, D, 16, 16) and not v_x.any() and not v_y.any()


def test_at_the_papers_sizes_there_is_attention_at_16_pixels_and_in_the_middle():
    with torch.device("meta"):
        nets = networks(configure(data="retinamnist"), wear=False)
    places = [name for name, module in nets.unet.named_modules() if hasattr(module, "qkv")]
    assert sorted(places) == sorted(["down.1.0.attention", "down.1.1.attention", "middle.0.attention",
                                     *(f"up.2.{i}.attention" for i in range(3))])


# ---------------------------------------------------------------------------------------------- 11 learning rate and average
PAPER = configure(data="retinamnist")


@pytest.mark.parametrize("name", ["resnet", "flow"])
def test_the_learning_rate_rises_from_a_millionth_to_its_peak_and_falls_back(name):
    group, at = dict(name=name, peak=5e-4), lambda epoch: symmflow.learning_rate(PAPER, dict(name=name, peak=5e-4), epoch)
    assert at(0) == 1e-6 and at(100) == 5e-4 and at(1000) == pytest.approx(1e-6, rel=1e-9)
    assert at(1000 - 1 / 17) == pytest.approx(1e-6, rel=1e-3)            # the last step of 17 an epoch
    rates = [at(e) for e in range(1001)]
    assert all(a < b for a, b in zip(rates[:100], rates[1:])) and all(a > b for a, b in zip(rates[100:], rates[101:])) and group["peak"] == max(rates)


def test_the_learning_rate_is_that_of_torchs_one_cycle_schedule():
    n, optimizer = 20_000, torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=5e-4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, n, pct_start=.1, div_factor=500, final_div_factor=1, cycle_momentum=False)
    worst = 0
    for step in range(n):
        worst = max(worst, abs(optimizer.param_groups[0]["lr"] - symmflow.learning_rate(PAPER, dict(name="flow", peak=5e-4), step * 1000 / n)))
        optimizer.step()
        if step < n - 1:
            theirs.step()
    assert worst < 1e-3 * 5e-4


def test_while_the_resnet_is_trained_alone_the_flow_waits_and_then_has_its_whole_cycle():
    config = configure(data="retinamnist", epochs=100, pretrain_epochs=20)
    flow, resnet = (lambda e, name=name: symmflow.learning_rate(config, dict(name=name, peak=5e-4), e) for name in ("flow", "resnet"))
    assert flow(0) == flow(20) == 1e-6 and flow(30) == pytest.approx(5e-4) and flow(120) == pytest.approx(1e-6)
    assert resnet(0) == 1e-6 and resnet(12) == pytest.approx(5e-4) and resnet(120) == pytest.approx(1e-6)


@pytest.mark.parametrize("warmup", [0., 1.])
def test_no_warm_up_and_nothing_but_warm_up_are_defined_at_every_step(warmup):
    config = configure(data="retinamnist", epochs=3, warmup=warmup)
    rates = [symmflow.learning_rate(config, dict(name="flow", peak=1e-3), step / 10) for step in range(30)]
    assert rates[0] == (1e-6 if warmup else 1e-3) and all(1e-6 <= r <= 1e-3 for r in rates)


def test_the_optimizer_has_the_papers_settings():
    config = tiny(baseline=True, lr=5e-4)
    nets = networks(config)
    groups = torch.optim.AdamW(symmflow.parameter_groups(nets, config)).param_groups
    assert [g["name"] for g in groups] == ["resnet", "flow"] and all(g["peak"] == 5e-4 and g["clip"] == 0 and g["betas"] == (.9, .999) for g in groups)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in nets.parameters()}
    assert [g["weight_decay"] for g in groups] == [0, 0]                 # papers/symmflow.md 2.2; AdamW's own default is .01


def test_the_average_copies_at_zero_freezes_at_one_and_keeps_what_is_no_weight():
    config = tiny(codes="onehot")
    nets, ema = networks(config), networks(config, wear=False)
    nets.codec_id.fill_(2 ** 62 + 12345)
    nets.temperature.fill_(1.7), ema.temperature.fill_(1.7)
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    run.update_ema(ema, nets, 1., 10 ** 9)
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in ema.state_dict().items() if k != "codec_id")
    run.update_ema(ema, nets, 0., 5)
    assert same(dict(ema.state_dict()), dict(nets.state_dict())) and int(ema.codec_id) == 2 ** 62 + 12345


def test_averaged_for_long_codes_and_temperature_stay_bit_identical():
    nets, ema = (networks(tiny(codes="simplex")) for _ in range(2))
    nets.temperature.fill_(.3), ema.temperature.fill_(.3)
    for step in range(200):
        run.update_ema(ema, nets, .999, step)
    assert torch.equal(ema.codes, nets.codes) and torch.equal(ema.temperature, nets.temperature) and torch.equal(ema.latent_scale, nets.latent_scale)


# ---------------------------------------------------------------------------------------------- 12 data
@pytest.mark.parametrize("data, flips", [("retinamnist", "hflip,vflip"), ("bloodmnist", "hflip,vflip"), ("dermamnist", "hflip,vflip"), ("pneumoniamnist", "")])
def test_retina_blood_and_skin_are_flipped_and_lungs_are_not(data, flips):
    for scale in ("paper", "small"):
        config = configure(data=data, scale=scale)
        assert config.augment == flips
        names = [a for a in config.augment.split(",") if a]
        variants = {v for part in Batches(pictures(64), 32, train=True, augment=names) for v in part.variant.tolist()}
        assert variants == ({0, 1, 2, 3} if flips else {0})


def test_28_pixels_are_padded_to_32_labels_are_flat_and_images_lie_between_minus_one_and_one(tmp_path):
    content = write_medmnist(tmp_path / "retinamnist.npz", "retinamnist")
    config = configure(data="retinamnist", root=str(tmp_path))
    data = load_for(config)
    assert config.size == 32 and data.test.images.shape[1:] == (3, 32, 32) and data.test.labels.ndim == 1
    assert np.array_equal(data.test.images[0, :, 2:-2, 2:-2], content["test_images"][0].transpose(2, 0, 1))
    x = next(iter(Batches(data.test, 4))).x
    assert x.dtype == torch.float32 and -1 <= x.min() < -.9 and .9 < x.max() <= 1
    assert not np.array_equal(data.val.images[:2], data.test.images[:2])
    symmflow.build(dataclasses.replace(config, baseline=False, channels=8, mult="1,2", head_channels=8), dict(channels=3, classes=data.classes, multilabel=False))


@pytest.mark.parametrize("variant, dims", [(0, ()), (1, (3,)), (2, (2,)), (3, (2, 3))])
def test_a_variant_names_the_flips_of_an_image(variant, dims):
    x = images(40)
    flip, angle = draw_changes(("hflip", "vflip"), 40, np.random.default_rng(0))
    flipped, variants = augment(x, flip, angle), np.where(angle != 0, -1, (flip < 0) @ [1, 2])
    rows = np.flatnonzero(variants == variant)
    assert len(rows) > 2 and torch.equal(flipped[rows], x[rows].flip(dims) if dims else x[rows])


def test_balanced_training_draws_every_class_equally_often():
    split = pictures(200)
    split.labels = np.array([0] * 160 + [1] * 30 + [2] * 10)
    labels = torch.cat([part.y for epoch in range(5) for part in Batches(split, 20, train=True, balanced=True, start=epoch * 10)])
    assert (torch.bincount(labels) / len(labels) - 1 / 3).abs().max() < .06


@pytest.mark.parametrize("size, given, words", [
    (20, dict(mult="1,2,2,2"), "multiple of 8; take 16 or 24"), (28, dict(mult="1,2,2,2"), "multiple of 8; take 24 or 32"),
    (30, dict(mult="1,2,2"), "multiple of 4; take 28 or 32"), (9, dict(), "multiple of 2; take 8 or 10"), (8, dict(mult="1,1,1,1,1"), "multiple of 16; take 16")])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(size, given, words):
    with pytest.raises(run.UserError, match=f"^--size {size}: must be a {words}$"):
        networks(tiny(size=size, **given))


def test_several_labels_an_image_are_refused():
    with pytest.raises(run.UserError, match="--data chestmnist: has several labels"):
        symmflow.build(configure(data="chestmnist", scale="small"), dict(channels=1, classes=["a", "b"], multilabel=True))


# ---------------------------------------------------------------------------------------------- 13 latents
def autoencoder(path, channels=3, seed=1, latent=2, mult=(1, 2)):
    """A small KL autoencoder's file, of random weights."""
    torch.manual_seed(seed)
    net = AutoencoderKL(channels, 8, mult, 1, latent)
    for p in net.parameters():
        p.data += .1 * torch.randn_like(p)
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """Files of autoencoders: halving the sides to 2 channels, as latent-diffusion's to 4, another one, one of gray images."""
    folder = tmp_path_factory.mktemp("autoencoders")
    return SimpleNamespace(file=autoencoder(folder / "latent4.pt", latent=4, mult=(1, 1, 1, 1)), small=autoencoder(folder / "small.pt"),
                           other=autoencoder(folder / "other.pt", seed=2), gray=autoencoder(folder / "gray.pt", 1), folder=folder)


def calls_of(nets):
    """Images given to encoder and decoder from now on."""
    calls = Counter()
    for name in ("encoder", "decoder"):
        getattr(nets.codec.net, name).register_forward_hook(lambda module, args, out, name=name: calls.update({name: len(out)}))
    return calls


def latent_networks(latent, mode="grid", channels=3, file=None, **given):
    config = tiny(**dict(latent=mode, codes="onehot" if mode == "grid" else "rgb", autoencoder=file or latent.small, latent_scale=.5) | given)
    return config, networks(config, channels)


@pytest.mark.parametrize("channels, file", [(3, "small"), (1, "small"), (1, "gray")])
@torch.no_grad()
def test_what_is_encoded_is_scaled_and_what_is_decoded_scaled_back(latent, channels, file):
    for scale in (.18215, 1., 7.):
        config, nets = latent_networks(latent, channels=channels, file=getattr(latent, file), latent_scale=scale)
        x, net = images(3, channels=channels), nets.codec.net
        z, mean = nets.encode(x), net.encode(x.expand(-1, nets.codec.channels, -1, -1))[0]
        assert z.shape == (3, 2, 8, 8) == (3, *nets.shapes(16)[0]) and torch.allclose(z / scale, mean, atol=1e-5)
        again = net.decode(mean)
        assert torch.allclose(nets.decode(z), again.mean(1, keepdim=True) if channels == 1 else again, atol=1e-4) and nets.decode(z).shape == x.shape


@pytest.mark.parametrize("mode, decoded", [("grid", 0), ("rgb", 12)])
@torch.no_grad()
def test_classification_decodes_nothing_on_the_grid_and_a_label_map_a_draw_in_colour(latent, mode, decoded):
    config, nets = latent_networks(latent, mode)
    calls = calls_of(nets)
    out = symmflow.classify(nets, config, images(4), torch.randn(4, 3, *nets.shapes(16)[1]))
    assert calls == Counter(encoder=4, decoder=decoded) and out.p.shape == (4, 5)
    assert out.y.shape == ((4, 5, 8, 8) if mode == "grid" else (4, 3, 16, 16))


@pytest.mark.parametrize("codes", ["onehot", "simplex", "grey", "rgb"])
@torch.no_grad()
def test_on_the_grid_any_code_classifies(latent, codes):
    config, nets = latent_networks(latent, codes=codes)
    calls = calls_of(nets)
    out = symmflow.classify(nets, config, images(2), torch.randn(2, 1, *nets.shapes(16)[1]))
    assert nets.shapes(16)[1] == (nets.codes.shape[1], 8, 8) and out.p.isfinite().all() and calls == {"encoder": 2}


@torch.no_grad()
def test_label_maps_in_colour_are_the_encoded_pictures_of_the_palette_and_are_read_back(latent):
    config, nets = latent_networks(latent, "rgb")
    calls = calls_of(nets)
    for _ in range(3):
        z = nets.label_map(torch.tensor([4, 0, 4]), (8, 8))
    assert calls == {"encoder": 5} and z.shape == (3, 2, 8, 8) and torch.equal(z[0], z[2])
    picture = nets.codes[4].view(1, 3, 1, 1).expand(-1, -1, 16, 16)
    wanted = nets.codec.net.encode(picture)[0] * .5
    assert torch.allclose(z[:1], wanted, atol=1e-5)
    assert torch.allclose(nets.decode_map(z[:, None])[0, 0], nets.codec.net.decode(wanted / .5)[0], atol=1e-4)


@pytest.mark.parametrize("augmentations, variants", [((), 1), (("hflip",), 2), (("hflip", "vflip"), 4)])
@torch.no_grad()
def test_latents_of_training_images_are_computed_once_a_variant_and_kept_in_half_precision(latent, augmentations, variants):
    config, nets = latent_networks(latent)
    calls, split = calls_of(nets), pictures(10)
    for epoch in range(40):
        for part in Batches(split, 4, train=True, augment=augmentations, start=epoch * 3):
            nets.encode(part.x, part)
    assert len(nets.codec.known) == 10 * variants and calls["encoder"] % 16 == 0         # sixteen at a time, the last filled up
    calls.clear()
    for part in Batches(split, 4, train=True, augment=augmentations, start=40 * 3):
        nets.encode(part.x, part)
    assert not calls
    for part in Batches(split, 4, train=True, augment=augmentations, start=40 * 3):
        z, fresh = nets.encode(part.x, part), nets.encode(part.x)
        assert torch.equal(nets.encode(part.x, Batch(part.x, part.y, part.index)), fresh)               # made by hand: nobody knows how it was flipped
        assert z.dtype == torch.float32 and torch.allclose(z, fresh, rtol=2e-3, atol=1e-3) and fresh.std() > .1


@torch.no_grad()
def test_turned_images_and_those_of_no_training_batch_are_encoded_anew(latent):
    config, nets = latent_networks(latent)
    calls, split = calls_of(nets), pictures(6)
    for epoch in range(2):
        for part in Batches(split, 3, train=True, augment=("rotate",), start=epoch * 2):
            nets.encode(part.x, part)
            nets.encode(part.x)
    assert calls == {"encoder": 24} and not nets.codec.known


@torch.no_grad()
def test_an_image_twice_in_a_batch_has_its_latent_twice(latent):
    config, nets = latent_networks(latent)
    x = images(3)
    part = Batch(x[[0, 1, 0, 2]], torch.zeros(4, dtype=torch.long), np.array([7, 8, 7, 9]), np.zeros(4, np.int64))
    for _ in range(2):
        z = nets.encode(part.x, part)
        assert torch.equal(z[0], z[2]) and torch.allclose(z, nets.encode(part.x), rtol=2e-3, atol=1e-3)


@torch.no_grad()
def test_the_parts_of_a_batch_have_their_own_latents(latent):
    config, nets = latent_networks(latent)
    whole = next(iter(Batches(pictures(8), 8, train=True, augment=("hflip", "vflip"))))
    parts = [nets.encode(part.x, part) for part in whole.split(3)]
    assert torch.allclose(torch.cat(parts), nets.encode(whole.x), rtol=2e-3, atol=1e-3)


def test_the_spread_of_latents_is_measured_and_becomes_one_unless_it_is_given(latent):
    split = pictures(60)
    data = DataSet(split, split, split, list(range(5)), False, 3)
    config, nets = latent_networks(latent, latent_scale=0.)
    symmflow.initialise(nets, data, config)
    assert nets.encode(torch.from_numpy(split.images) / 127.5 - 1).std().item() == pytest.approx(1, abs=.01) and nets.latent_scale != 1
    config, nets = latent_networks(latent, latent_scale=.18215)
    symmflow.initialise(nets, data, config)
    assert nets.latent_scale.item() == pytest.approx(.18215)


def test_the_autoencoder_is_frozen_shared_by_copies_and_no_part_of_the_networks_weights(latent):
    config, nets = latent_networks(latent)
    assert not any(p.requires_grad for p in nets.codec.net.parameters()) and not nets.codec.net.training
    assert copy.deepcopy(nets).codec is nets.codec and not any("codec.net" in k for k in nets.state_dict())
    losses = symmflow.train_step(nets.train(), None, config, batch(4), joint=True)
    losses["loss"].backward()
    assert not nets.codec.net.training and all(p.grad is not None for p in nets.unet.parameters())


def trained_with(latent, file, mode="grid", **given):
    """Networks as a checkpoint of another autoencoder leaves them."""
    _, known = latent_networks(latent, mode)
    config, nets = latent_networks(latent, mode, file=file, **given)
    nets.load_state_dict(known.state_dict())
    return config, nets


@pytest.mark.parametrize("use", ["classify", "train", "draw"])
@pytest.mark.parametrize("mode", ["grid", "rgb"])
def test_another_autoencoder_than_that_of_training_is_refused_at_its_use(latent, mode, use):
    config, nets = trained_with(latent, latent.other, mode)
    work = {"classify": lambda: symmflow.classify(nets, config, images(2), torch.randn(2, 1, *nets.shapes(16)[1])),
            "train": lambda: symmflow.train_step(nets, None, config, batch(2), True),
            "draw": lambda: symmflow.draw(nets, config, torch.tensor([0, 1]), torch.randn(2, *nets.shapes(16)[0]))}[use]
    with pytest.raises(run.UserError, match="--autoencoder .*other.pt: is not the one"), torch.no_grad():
        work()


def test_the_autoencoder_may_be_moved_and_renamed(latent, tmp_path):
    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path(latent.small).read_bytes())
    config, nets = trained_with(latent, str(moved))
    with torch.no_grad():
        symmflow.classify(nets, config, images(2), torch.randn(2, 1, *nets.shapes(16)[1]))


@pytest.mark.parametrize("given, words", [
    (dict(latent="grid", codes="onehot"), "--latent grid: needs --autoencoder FILE"), (dict(latent="rgb"), "--latent rgb: needs --autoencoder FILE"),
    (dict(latent="grid", codes="onehot", autoencoder="/nowhere/ae.pt"), "/nowhere/ae.pt: no such file"),
    (dict(latent="rgb", codes="onehot", autoencoder="small"), "only the palette can be encoded"),
    (dict(latent="grid", codes="onehot", autoencoder="resnet"), "--autoencoder .*resnet.pt: is no KL autoencoder"),
    (dict(latent="grid", codes="onehot", autoencoder="small", size=18), "--size 18: must be a multiple of 4; take 16 or 20"),
    (dict(latent="grid", codes="onehot", autoencoder="file", size=40), "--size 40: must be a multiple of 16; take 32 or 48"),
    (dict(latent="grid", codes="onehot", autoencoder="gray"), "--autoencoder .*gray.pt")])
def test_an_autoencoder_that_cannot_serve_is_one_line(latent, given, words):
    torch.save(networks(tiny(baseline=True)).resnet.state_dict(), latent.folder / "resnet.pt")
    if given.get("autoencoder", "/")[0] != "/":
        given = given | dict(autoencoder=str(latent.folder / {"file": "latent4.pt"}.get(given["autoencoder"], given["autoencoder"] + ".pt")))
    with pytest.raises(run.UserError, match=words) as caught:
        networks(tiny(**given))                                          # the last: colour pictures, an autoencoder of gray ones
    assert "\n" not in str(caught.value)


def test_colour_label_maps_for_an_autoencoder_of_gray_images_are_refused(latent):
    with pytest.raises(run.UserError, match="--autoencoder|--latent rgb"):
        config, nets = latent_networks(latent, "rgb", channels=1, file=latent.gray)
        nets.label_map(torch.tensor([0]), (8, 8))


# ---------------------------------------------------------------------------------------------- draws, batches, seeds
@pytest.mark.parametrize("augment, ways", [("hflip", 2), ("", 1)])
def test_with_mirror_the_draws_look_at_the_image_and_its_mirror_images_in_turn(augment, ways):
    config = tiny(augment=augment, mirror=True, samples=4)
    nets, x = networks(config), images(3)
    noise = torch.randn(3, 1, *nets.shapes(16)[1]).expand(-1, 4, -1, -1, -1)        # all draws alike, but for what they look at
    plain = dataclasses.replace(config, mirror=False)
    with torch.no_grad():
        found, other = symmflow.classify(nets, config, x, noise), symmflow.classify(nets, config, x.flip(3), noise)
        alone = [symmflow.classify(nets, plain, view, noise[:, :1]) for view in (x, x.flip(3))[:ways]]
    assert torch.allclose(found.y, sum(one.y for one in alone) / ways, atol=1e-5)
    assert torch.allclose(found.p, other.p, atol=1e-5) == (ways == 2)
    assert torch.allclose(found.p, symmflow.classify(nets, plain, x, noise).p, atol=1e-6) == (ways == 1)


@pytest.mark.parametrize("codes", KINDS)
@torch.no_grad()
def test_several_draws_are_averaged_before_the_decision(codes):
    config = tiny(codes=codes, samples=4)
    nets, x = networks(config), images(3)
    noise = torch.randn(3, 4, *nets.shapes(16)[1])
    out, each = symmflow.classify(nets, config, x, noise), [symmflow.classify(nets, config, x, noise[:, s:s + 1]) for s in range(4)]
    mean = torch.stack([one.y for one in each]).mean(0)
    assert torch.allclose(out.y, mean, atol=1e-4) and torch.allclose(out.d, symmflow.distances(mean, nets.codes, codes), atol=1e-4)
    votes = torch.stack([one.d.argmin(1) for one in each])
    assert torch.allclose(out.spread, (votes != out.d.argmin(1)).float().mean(0)) and not torch.allclose(each[0].y, each[1].y, atol=1e-2)


@torch.no_grad()
def test_one_draw_has_no_spread():
    config = tiny()
    out = symmflow.classify(networks(config), config, images(8), torch.randn(8, 1, 3, 16, 16))
    assert not out.spread.any()


def test_every_draw_of_every_image_has_its_own_noise_which_depends_on_seed_and_name_alone(monkeypatch):
    config, given, classify = tiny(samples=3), [], symmflow.classify
    nets, split = networks(config), pictures(5)
    monkeypatch.setattr(symmflow, "classify", lambda nets, config, x, noise: (given.append(noise), classify(nets, config, x, noise))[1])
    for size in (5, 2):
        symmflow.evaluate(nets, split, dataclasses.replace(config, eval_batch_size=size), CPU)
    whole, parted = given[0], torch.cat(given[1:])
    assert whole.shape == (5, 3, 3, 16, 16) and torch.equal(whole, parted) and len(whole.flatten(0, 1).flatten(1).unique(dim=0)) == 15
    symmflow.evaluate(nets, split, dataclasses.replace(config, seed=1), CPU)
    assert not torch.equal(given[-1], whole)


@pytest.mark.parametrize("given", [dict(), dict(codes="onehot", samples=3), dict(steps=3, solver="heun", decision="mode"), dict(codes="grey")])
def test_predictions_do_not_depend_on_the_size_of_the_batch(given):
    config = tiny(**given)
    nets, split = networks(config), pictures(20)
    at_once, parts = ([symmflow.evaluate(nets, split, dataclasses.replace(config, eval_batch_size=n), CPU) for n in sizes] for sizes in ((20,), (1, 7, 64)))
    for p, u in parts:
        assert np.abs(p["symmflow"] - at_once[0][0]["symmflow"]).max() <= 1e-5
        assert all(np.abs(u[k] - at_once[0][1][k]).max() <= 1e-4 for k in symmflow.KINDS)


def test_an_evaluation_has_every_model_and_every_uncertainty():
    config = tiny(baseline=True)
    predictions, uncertainty = symmflow.evaluate(networks(config), pictures(9), config, CPU)
    assert list(predictions) == ["symmflow", "resnet"] and set(uncertainty) == {"distance", "entropy", "margin", "spread"}
    for p in predictions.values():
        assert p.shape == (9, 5) and p.dtype == np.float64 and np.allclose(p.sum(1), 1, atol=1e-5)
    assert all(u.shape == (9,) and np.isfinite(u).all() and u.min() >= 0 for u in uncertainty.values())


@pytest.mark.parametrize("codes", KINDS)
def test_in_bfloat16_probabilities_are_still_computed_in_float32(codes):
    """Only the network's arithmetic may be coarse: its answer is read off in float32."""
    config = tiny(codes=codes, amp="bf16")
    nets, split = networks(config), pictures(40)
    coarse, _ = symmflow.evaluate(nets, split, config, CPU)
    p = coarse["symmflow"]
    assert np.allclose(p.sum(1), 1, atol=1e-5) and np.isfinite(p).all()
    rounded = torch.from_numpy(p).bfloat16().double().numpy()
    assert (p == rounded).mean() < .5                                    # not all of 8 bits
    assert np.abs(p - symmflow.evaluate(nets, split, dataclasses.replace(config, amp="off"), CPU)[0]["symmflow"]).max() < .1


@torch.no_grad()
def test_in_bfloat16_the_posterior_is_read_off_exactly():
    codes, w = symmflow.class_codes("onehot", 5)[0], torch.randn(200, 5).softmax(1)
    maps = (w @ codes)[:, :, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        out = read(maps, "onehot", 5)
    w = w.clamp_min(1e-3)
    assert (out.p.float() - w / w.sum(1, keepdim=True)).abs().max() < 1e-3


def test_a_temperature_is_fitted_on_validation_only_where_it_is_asked_for():
    config = tiny(codes="onehot")
    nets, split = networks(config), pictures(60)
    symmflow.calibrate(nets, split, config, CPU)
    assert nets.temperature == 1
    before = metrics.nll(split.labels, symmflow.evaluate(nets, split, config, CPU)[0]["symmflow"])
    symmflow.calibrate(nets, split, dataclasses.replace(config, calibrate=True), CPU)
    after = metrics.nll(split.labels, symmflow.evaluate(nets, split, config, CPU)[0]["symmflow"])
    assert after < before and nets.temperature != 1
    again = nets.temperature.item()
    symmflow.calibrate(nets, split, dataclasses.replace(config, calibrate=True), CPU)
    assert nets.temperature.item() == pytest.approx(again, rel=1e-3)


# ---------------------------------------------------------------------------------------------- drawn images
@torch.no_grad()
def test_drawn_images_depend_on_seed_and_name_and_not_on_the_batch():
    config = tiny(draw_steps=2)
    nets, labels, ids = networks(config), np.array([0, 1, 2, 3, 4, 0]), [f"drawn-{i}" for i in range(6)]
    whole, parted, other = (symmflow.draw_images(nets, dataclasses.replace(config, **given), labels, ids, CPU)
                            for given in (dict(), dict(eval_batch_size=4), dict(seed=1)))
    assert whole.dtype == np.uint8 and whole.shape == (6, 3, 16, 16)
    assert np.abs(whole.astype(int) - parted).max() <= 1 and np.abs(whole.astype(int) - other).mean() > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_map_is_shown_in_the_colour_of_its_class(kind):
    config = tiny(codes=kind)
    nets = networks(config)
    shown = np.stack([symmflow.as_picture(nets, config, nets.label_map(torch.tensor([k]), (2, 2), noise=False)[0]) for k in range(5)])
    palette = [[int(n) for n in colour.split(",")] for colour in PALETTE[5].split()]
    wanted = [[round(255 * k / 4)] for k in range(5)] if kind == "grey" else palette
    assert np.abs(shown[:, :, 0, 0].astype(int) - wanted).max() <= 1 and (shown == shown[:, :, :1, :1]).all()


# ---------------------------------------------------------------------------------------------- runs and commands
ARGS = ("--data toy --size 28 --limit 12 --epochs 1 --batch-size 8 --channels 8 --mult 1,1,1 --attention 8 --head-channels 8 --width 8 --samples 2 "
        "--generated 8 --draw-steps 3 --device cpu").split()


def go(folder, *more):
    """A run of a second or two; few resamples for its intervals. Returns the exit code."""
    return short(symmflow, *ARGS, "--output", folder, *more)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert go(folder) == 0
    return folder


def command(name, folder, *more):
    return symmflow.main([name, "--checkpoint", str(folder / "best.pt"), *map(str, more)])


def test_a_run_writes_its_numbers_and_pictures(toy_run):
    found = json.loads((toy_run / "metrics.json").read_text())
    assert {"best.pt", "last.pt", "config.json", "log.jsonl", "metrics.json", "predictions.csv", "figures"} <= {p.name for p in toy_run.iterdir()}
    assert set(opened(toy_run / "figures")) == {f"{name}.png" for name in ("curves", "confusion", "reliability", "coverage", "drawn", "nearest")}
    assert found["method"] == "symmflow" and set(found["baselines"]) == {"majority", "resnet"} and "bayes" in found
    assert {"accuracy", "auroc", "ece", "nll", "aurc"} <= set(found["test"])
    specific = found["method_specific"]
    table = specific["validation_by_steps_and_samples"]
    assert [(row["steps"], row["samples"]) for row in table] == [(1, 1), (2, 1), (5, 1), (10, 1), (25, 1), (1, 4), (1, 2)]
    assert all(set(row) == {"steps", "samples", "accuracy", "ece", "nll", "seconds_an_image"} for row in table)
    assert set(specific["validation_aurc"]) == set(symmflow.KINDS) and all(0 <= value <= 1 for value in specific["validation_aurc"].values())
    for name in ("symmflow", "resnet"):
        coverages, accuracies = zip(*found["accuracy_by_coverage"][name])
        assert coverages == pytest.approx([1 - .05 * i for i in range(20)]) and accuracies[0] == (found["test"] if name == "symmflow" else found["baselines"][name])["accuracy"]
    assert set(specific["validation_by_rule"]) == {"accuracy_mean", "accuracy_mode", "auroc_distance"}
    measured = specific["drawn"]
    assert measured["images"] == 8 and all(math.isfinite(measured[k]) for k in measured)
    assert {"label_agreement", "label_agreement_of_validation", "distance_to_training", "distance_of_validation", "frechet_drawn_to_validation",
            "frechet_training_to_validation", "kernel_drawn_to_validation", "kernel_training_to_validation"} < set(measured)
    assert not any("fid" in k.lower() for k in measured)


def test_the_validation_that_is_kept_is_what_the_checkpoint_gives(toy_run):
    config, nets, facts, device = run.load_model(toy_run / "best.pt", "symmflow", Config, symmflow.build, {})
    val = load_for(config).val
    p = symmflow.evaluate(nets, val, config, device)[0]["symmflow"]
    row = json.loads((toy_run / "metrics.json").read_text())["method_specific"]["validation"]
    assert metrics.accuracy(val.labels, p.argmax(1)) == row["accuracy"] and metrics.nll(val.labels, p) == pytest.approx(row["nll"], abs=1e-9)


def test_the_two_decisions_and_the_papers_auroc_are_those_of_validation(toy_run, monkeypatch):
    config, nets, _, device = run.load_model(toy_run / "best.pt", "symmflow", Config, symmflow.build, {})
    data = load_for(config)
    # of votes and distances that disagree, as those of a network trained so little do not
    monkeypatch.setattr(symmflow, "classify", lambda *given, ours=symmflow.classify: ours(*given)._replace(votes=ours(*given).votes.roll(1, 1)))
    found = symmflow.measure(nets, data, dataclasses.replace(config, generated=0), device, toy_run / "figures")
    out = [out for *_, out in symmflow.classified(nets, data.val, config, device)]
    d, votes = torch.cat([o.d for o in out]).numpy(), torch.cat([o.votes for o in out]).numpy()
    labels, rules = data.val.labels, found["validation_by_rule"]
    assert rules == {"accuracy_mean": metrics.accuracy(labels, d.argmin(1)), "accuracy_mode": metrics.accuracy(labels, votes.argmax(1)),
                     "auroc_distance": metrics.auroc(labels, -d)}
    assert "drawn" not in found
    assert (d.argmin(1) != votes.argmax(1)).any()                        # else this says little


def test_two_processes_measure_what_one_does(toy_run, tmp_path):
    config, nets, _, device = run.load_model(toy_run / "best.pt", "symmflow", Config, symmflow.build, {})
    data, config = load_for(config), dataclasses.replace(config, generated=0)

    def work(rank):
        found = symmflow.measure(nets, data, config, device, toy_run)
        return found["validation_by_rule"] | found["validation_aurc"]
    alone = work(0)
    for found in processes(work, tmp_path):
        assert found == pytest.approx(alone, abs=1e-6)


def test_autocast_ends_where_a_batch_is_handed_over(monkeypatch):
    config = tiny(amp="bf16")
    for batch, noise, found in symmflow.classified(networks(config), pictures(3), config, CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_a_warm_up_of_a_resnet_that_is_not_there_is_refused():
    with pytest.raises(run.UserError, match="--pretrain-epochs 2 --no-baseline"):
        networks(tiny(pretrain_epochs=2, baseline=False))


def test_a_checkpoint_is_read_without_code_and_is_bit_identical(toy_run):
    config, nets, facts, _ = run.load_model(toy_run / "best.pt", "symmflow", Config, symmflow.build, {})
    content = torch.load(toy_run / "best.pt", weights_only=True, map_location="cpu")
    assert same(dict(nets.state_dict()), content["ema"]) and dataclasses.asdict(config) == content["config"]
    with open(toy_run / "predictions.csv") as file:
        written = list(csv.DictReader(file))
    test = load_for(config).test
    p = symmflow.evaluate(nets, test, config, CPU)[0]["symmflow"]
    assert [row["id"] for row in written] == test.ids
    assert [[f"{x:.9g}" for x in row] for row in p] == [[row[f"p:{c}"] for c in facts["classes"]] for row in written]


def test_the_same_seed_gives_the_same_run_and_another_another(toy_run, tmp_path):
    assert go(tmp_path / "again") == 0 and go(tmp_path / "other", "--seed", 1) == 0
    first, again, other = (torch.load(folder / "best.pt", weights_only=True)["ema"] for folder in (toy_run, tmp_path / "again", tmp_path / "other"))
    assert same(first, again) and not same(first, other)
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (toy_run, tmp_path / "again")]
    assert found[0]["test"] == found[1]["test"] and found[0]["method_specific"]["drawn"] == found[1]["method_specific"]["drawn"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("mode", ["none", "grid"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(mode, tmp_path, monkeypatch, latent):
    given = dict(data="toy", size=28, limit=12, batch_size=8, epochs=3, channels=8, mult="1,1", head_channels=8, width=8, generated=0, draw_steps=1,
                 latent=mode, autoencoder=latent.small if mode == "grid" else "", device="cpu")
    monkeypatch.setattr(run.score, "__defaults__", (None, 5))
    monkeypatch.setattr(symmflow, "measure", lambda *a: {})
    symmflow.train(configure(**given, output=str(tmp_path / "whole")))
    step, calls, config = symmflow.train_step, itertools.count(), configure(**given, output=str(tmp_path / "parted"))

    def stopping(*args):
        if next(calls) == 3:                             # in the second epoch
            raise Stopped
        return step(*args)

    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(symmflow, "train_step", stopping)
        symmflow.train(config)
    symmflow.train(config, resume=tmp_path / "parted")
    whole, parted = (torch.load(tmp_path / name / "last.pt", weights_only=True)["nets"] for name in ("whole", "parted"))
    assert same(whole, parted)
    assert mode == "none" or whole["latent_scale"] not in (0., 1.)


@pytest.mark.parametrize("more, codes", [
    (["--codes", "rgb", "--recipe", "paper"], (5, 3)), (["--codes", "grey", "--recipe", "paper", "--decision", "mode"], (5, 1)),
    (["--codes", "simplex", "--label-loss", "map", "--balanced", "--solver", "heun", "--steps", "2"], (5, 4)), (["--pretrain-epochs", "1", "--grad-accum", "2", "--clip", "1"], (5, 5))])
def test_every_code_runs_from_end_to_end(more, codes, tmp_path):
    assert go(tmp_path / "run", *more) == 0
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["ema"]["codes"].shape == codes
    assert command("sample", tmp_path / "run", "--label", "nevus", "-n", 2) == 0
    assert command("explain", tmp_path / "run", "--limit", 1) == 0
    assert len(opened(tmp_path / "run" / "explain")) == 1


@pytest.mark.parametrize("mode, more", [("grid", ["--codes", "onehot"]), ("rgb", ["--codes", "rgb", "--label-loss", "map"])])
def test_latent_runs_go_from_end_to_end_and_name_a_wrong_autoencoder(mode, more, tmp_path, latent, capsys):
    folder = tmp_path / "run"
    assert go(folder, "--mult", "1,1", "--latent", mode, "--autoencoder", latent.small, *more) == 0
    assert command("eval", folder) == 0 and command("explain", folder, "--limit", 1) == 0 and command("sample", folder, "--label", 1, "-n", 2) == 0
    assert {"explain", "sample"} <= {p.name for p in folder.iterdir()} and len(opened(folder / "explain")) == 1
    capsys.readouterr()
    for name, options in (("eval", []), ("explain", ["--limit", 1]), ("sample", ["--label", 1, "-n", 2])):
        assert command(name, folder, "--autoencoder", latent.other, *options) == 2, name
        said = capsys.readouterr().err.split("s left\n")[-1]
        assert re.fullmatch("error: --autoencoder .*other.pt: is not the one that this model was trained with\n", said), name
    assert command("eval", folder, "--autoencoder", latent.file) == 2     # of other sizes
    assert command("eval", folder, "--autoencoder", tmp_path / "gone.pt") == 2 and "no such file" in capsys.readouterr().err


def test_gray_pictures_of_two_classes_run_from_end_to_end(tmp_path):
    write_medmnist(tmp_path / "pneumoniamnist.npz", "pneumoniamnist")
    assert go(tmp_path / "run", "--data", "pneumoniamnist", "--root", tmp_path, "--size", 32, "--scale", "small") == 0
    assert command("sample", tmp_path / "run", "--label", "pneumonia", "-n", 2) == 0
    assert command("eval", tmp_path / "run", "--data", "pneumoniamnist", "--root", tmp_path) == 0


@pytest.mark.parametrize("label, name", [("nevus", "nevus"), ("4", "vascular"), ("0", "nevus")])
def test_sample_draws_a_class_by_name_or_number(toy_run, tmp_path, label, name, capsys):
    assert command("sample", toy_run, "--label", label, "-n", 3, "--output", tmp_path / "out") == 0
    found = opened(tmp_path / "out")
    assert set(found) == {"samples.png", *(f"{name}-{i:04d}.png" for i in range(3))} and found[f"{name}-0000.png"] == (28, 28)
    assert f"3 images of {name}" in capsys.readouterr().out
    assert len({(tmp_path / "out" / f"{name}-{i:04d}.png").read_bytes() for i in range(3)}) == 3


def test_sample_draws_the_same_again_and_the_first_of_many(toy_run, tmp_path):
    for n in (2, 4):
        assert command("sample", toy_run, "--label", 1, "-n", n, "--output", tmp_path / str(n)) == 0
    a, b = (np.asarray(Image.open(tmp_path / n / "dysplastic-0001.png")).astype(int) for n in ("2", "4"))
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("label", ["5", "7", "melanom", "-1", "1.0", "²", ""])
def test_sample_refuses_a_label_that_is_none(toy_run, label, capsys):
    assert command("sample", toy_run, f"--label={label}") == 2
    said = capsys.readouterr().err
    assert said == f"error: --label {label}: no such class; take one of nevus, dysplastic, keratosis, melanoma, vascular, or its number 0..4\n"
    assert not (toy_run / "sample").exists()


@pytest.mark.parametrize("n", [0, -3])
def test_sample_refuses_to_draw_nothing(toy_run, n, tmp_path, capsys):
    assert command("sample", toy_run, "--label", 0, "-n", n, "--output", tmp_path / "out") == 2 and "-n" in capsys.readouterr().err


def test_images_of_a_class_whose_name_has_a_dot_differ(toy_run, tmp_path):
    content = torch.load(toy_run / "best.pt", weights_only=True)
    content["facts"]["classes"] = ["St. John's", "grade 1.5", "c", "d", "e"]
    torch.save(content, tmp_path / "best.pt")
    assert symmflow.main(["sample", "--checkpoint", str(tmp_path / "best.pt"), "--label", "grade 1.5", "-n", "4", "--output", str(tmp_path / "out")]) == 0
    drawn = [np.asarray(Image.open(p)).tobytes() for p in (tmp_path / "out").glob("*.png") if p.name != "samples.png"]
    assert len(drawn) == len(set(drawn)) == 4


def own_images(folder, n=3):
    folder.mkdir()
    for i, image in enumerate(pictures(n, 40).images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"mine-{i}.png")
    return folder


def test_predict_writes_a_row_and_a_panel_an_image(toy_run, tmp_path, capsys):
    assert command("predict", toy_run, own_images(tmp_path / "mine"), "--output", tmp_path / "out") == 0
    with open(tmp_path / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(row["true"] == "" and sum(float(v) for k, v in row.items() if k.startswith("p:")) == pytest.approx(1, abs=1e-4) for row in rows)
    assert len(opened(tmp_path / "out")) == 3
    said = capsys.readouterr().out
    assert all(f"{kind} " in said for kind in symmflow.KINDS) and "not for clinical use" in said


@pytest.mark.parametrize("own", [False, True])
def test_explain_draws_a_picture_an_image(toy_run, tmp_path, own, capsys):
    paths = [own_images(tmp_path / "mine", 2)] if own else ["--limit", 2]
    assert command("explain", toy_run, *paths, "--output", tmp_path / "out") == 0
    found = opened(tmp_path / "out")
    assert len(found) == 2 and all(w > 500 and h > 400 for w, h in found.values()) and "not for clinical use" in capsys.readouterr().out


def test_what_explain_shows_is_the_way_from_image_and_noise_and_the_image_as_every_class(toy_run, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(symmflow.plots, "image_grid", lambda path, rows, labels, names, title: grids.append((rows, labels, names)))
    assert command("explain", toy_run, "--limit", 1, "--output", tmp_path / "out") == 0
    (((x_way, y_way, read_as, colours, as_class), captions, names),) = grids
    config, nets, facts, device = run.load_model(toy_run / "best.pt", "symmflow", Config, symmflow.build, {})
    split = load_for(dataclasses.replace(config, limit=1)).test
    x = torch.from_numpy(split.images[:1]) / 127.5 - 1
    noise = run.image_noise(config.seed, split.ids[:1], (config.samples, nets.n_y, 1, 1), device)[:, 0].expand(-1, -1, 28, 28)      # label noise is shared
    with torch.no_grad():
        way = symmflow.flow(nets.unet, config, x, noise, 1., 0., config.draw_steps)
        again = [plots.to_uint8(symmflow.draw(nets, config, torch.tensor([k]), way[-1][0])[0]) for k in range(5)]
    assert (len(x_way), len(y_way), len(read_as), len(colours), len(as_class)) == (5, 5, 2, 5, 5) and len(names) == 5
    assert np.array_equal(x_way[0], split.images[0]) and np.array_equal(x_way[4], plots.to_uint8(way[-1][0][0]))
    assert np.array_equal(y_way[0], symmflow.as_picture(nets, config, noise[0])) and np.array_equal(y_way[4], symmflow.as_picture(nets, config, way[-1][1][0]))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(as_class, again, strict=True))
    assert captions[0][0] == "t = 1.00" and captions[0][4] == "t = 0.00" and [c.split("\n")[0] for c in captions[4]] == captions[3] == facts["classes"]
    palette = symmflow.class_codes("rgb", 5)[0].float()                 # of the classes' corners: their own colours
    assert all(np.array_equal(tile[:, 0, 0], plots.to_uint8(colour[:, None, None])[:, 0, 0]) for tile, colour in zip(colours, palette, strict=True))


def test_eval_gives_the_runs_own_numbers(toy_run, tmp_path):
    assert command("eval", toy_run, "--output", tmp_path / "out") == 0
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["test"] for folder in (tmp_path / "out", toy_run))
    assert {k: v for k, v in ours.items() if k != "ci95"} == {k: v for k, v in theirs.items() if k != "ci95"}
    assert set(opened(tmp_path / "out")) == {f"figures/{name}.png" for name in ("confusion", "reliability", "coverage")}


def test_more_draws_and_steps_may_be_asked_of_a_checkpoint(toy_run, tmp_path):
    more = "--samples 3 --steps 3 --solver heun --uncertainty spread --output".split()
    assert command("eval", toy_run, *more, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["steps"] == 3


@pytest.mark.parametrize("options", [["--mult", "1,x"], ["--mult", ""], ["--mult", "0,1"], ["--attention", "two"], ["--channels", "9"],
                                     ["--channels", "28"], ["--mult", "1,-2"]], ids=" ".join)
def test_sizes_of_which_no_network_can_be_made_are_one_line(options, tmp_path, capsys):
    more = [*ARGS, "--output", str(tmp_path / "run"), *options]
    assert symmflow.main(more) == 2
    assert capsys.readouterr().err.startswith("error: --")


def test_several_labels_an_image_are_refused_on_the_command_line(tmp_path, capsys):
    write_medmnist(tmp_path / "chestmnist.npz", "chestmnist")
    assert go(tmp_path / "run", "--data", "chestmnist", "--root", tmp_path, "--size", 32) == 2
    assert "several labels an image" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_fine_tuning_takes_the_weights_and_keeps_its_own_codes_and_temperature(tmp_path):
    """rgb and simplex of four classes have the same shape, and mean different colours."""
    facts, data = dict(channels=3, classes=list("abcd"), multilabel=False), None
    old, new = tiny(codes="rgb"), tiny(codes="simplex", init=str(tmp_path / "best.pt"))
    before, after = (symmflow.build(config, facts) for config in (old, new))
    before.temperature.fill_(3.)
    run.save(tmp_path / "best.pt", dict(format=1, method="symmflow", config=dataclasses.asdict(old), facts=facts, ema=before.state_dict()))
    symmflow.initialise(after, data, new)
    assert torch.equal(after.unet.enter[0].weight, before.unet.enter[0].weight)
    assert torch.equal(after.codes, symmflow.class_codes("simplex", 4)[0].float()) and after.temperature == 1


def test_a_run_on_pixels_can_be_the_start_of_one_on_latents(tmp_path, latent):
    facts, split = dict(channels=3, classes=list("abcde"), multilabel=False), pictures(8)
    old = tiny(codes="onehot")
    before = symmflow.build(old, facts)
    run.save(tmp_path / "best.pt", dict(format=1, method="symmflow", config=dataclasses.asdict(old), facts=facts, ema=before.state_dict()))
    config, nets = latent_networks(latent, latent_scale=0., init=str(tmp_path / "best.pt"))
    symmflow.initialise(nets, DataSet(split, split, split, facts["classes"], False, 3), config)
    with torch.no_grad():
        z = nets.encode(images(4))
    assert z.isfinite().all() and nets.latent_scale != 1


# ---------------------------------------------------------------------------------------------- 14 learning
def blobs(n, seed):
    """16 pixels, gray: a bright blob in one of three corners, of random size and light, on noise."""
    rng = np.random.default_rng(seed)
    labels, v, u = np.arange(n) % 3, *np.mgrid[:16, :16]
    centre = np.array([[4, 4], [4, 11], [11, 7]])[labels] + rng.uniform(-1.5, 1.5, (n, 2))
    radius, light = rng.uniform(2, 3, (n, 1, 1)), rng.uniform(.6, 1, (n, 1, 1))
    blob = light * np.exp(-((v - centre[:, :1, None]) ** 2 + (u - centre[:, 1:, None]) ** 2) / (2 * radius ** 2))
    x = (.1 + .8 * blob + .03 * rng.normal(size=(n, 16, 16))).clip(0, 1)
    return Split((x * 255).round().astype(np.uint8)[:, None], labels, [f"{seed}-{i}" for i in range(n)])


@pytest.mark.slow
def test_a_tiny_network_learns_to_classify_blobs_in_one_step_and_to_draw_what_it_classifies(tmp_path, monkeypatch):
    torch.manual_seed(0)
    data = DataSet(blobs(960, 0), blobs(120, 1), blobs(300, 2), ["left", "right", "below"], False, 1)
    monkeypatch.setattr(symmflow, "load_for", lambda config: data)
    monkeypatch.setattr(run.score, "__defaults__", (None, 5))
    config = configure(data="toy", size=16, epochs=12, batch_size=32, channels=16, mult="1,2", augment="", generated=60, draw_steps=10,
                       device="cpu", output=str(tmp_path / "run"))
    found = symmflow.train(config)
    assert found["test"]["accuracy"] >= .95
    config, nets, _, _ = run.load_model(tmp_path / "run" / "best.pt", "symmflow", Config, symmflow.build, {})
    labels = np.arange(150) % 3
    drawn = symmflow.draw_images(nets, config, labels, [f"drawn-{i}" for i in range(150)], CPU)
    p = symmflow.evaluate(nets, Split(drawn, labels, [f"of-{i}" for i in range(150)]), config, CPU)[0]["symmflow"]
    assert (p.argmax(1) == labels).mean() >= .9
    assert found["method_specific"]["drawn"]["label_agreement"] >= .8    # of the plain ResNet, which has not seen the flow
