"""The authors' arrangements (tests/authors.py) and ours: equal to rounding where only the speed differs, unequal at its faults."""
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffclassifier
import diffmic
import mediffusion
import symmflow
from common import run
from common.autoencoder import AutoencoderKL
from common.schedules import respaced_timesteps
from common.unet import UNet
from data.batches import Batch
from diffmic import configure
from tests import authors

LABELS = torch.arange(6) % 5


pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def tiny(**given):
    """Regions as large as a cell of the saliency map, as at 224 pixels; for others the two do not find the same boxes."""
    return configure(**dict(data="toy", recipe="paper", width=8, guide_depth=18, hidden=32, roi_size=8, steps=4, baseline=False) | given)


def networks(config, channels=3):
    """Batch norms as after training: the running statistics are not 0 and 1."""
    torch.manual_seed(0)
    nets = diffmic.build(config, dict(channels=channels, classes=list(range(5)), multilabel=False))
    for m in norms(nets):
        m.running_mean.normal_(0, .2), m.running_var.uniform_(.5, 2)
    return nets.eval()


def norms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def colour(n=6, size=32, channels=3):
    return torch.rand(n, channels, size, size) * 2 - 1


def gray(n=6, size=32):
    """Three equal channels: the red one is all there is."""
    return colour(n, size, 1).expand(-1, 3, -1, -1).contiguous()


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))     # untrained draws are far from 0..1


def agree(a, b):
    return torch.equal(a.corners, b.corners) and all(close(u, v) for u, v in zip(a, b))


def counted(nets):
    """Calls from now on; a guide's forward, in either arrangement, computes its saliency map once."""
    calls = Counter()
    for name, module in (("encoder", nets.encoder), ("denoiser", nets.denoiser), ("guide", nets.guide.to_saliency)):
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


# ---------------------------------------------------------------------------------------------- guide
@pytest.mark.parametrize("given", [dict(), dict(size=64), dict(size=32, rois=3), dict(guide_depth=50), dict(size=224, roi_size=32)])
@torch.no_grad()
def test_both_guides_agree_where_regions_are_whole_cells(given):
    config = tiny(**given)
    nets, x = networks(config), colour(2 if config.size == 224 else 6, config.size)
    theirs = authors.guide(nets.guide, x, red=False)
    assert agree(theirs, nets.guide(x)) and theirs.corners.shape == (len(x), config.rois, 2)


@torch.no_grad()
def test_the_red_channel_is_all_of_a_gray_image():
    nets, x = networks(tiny()), gray()
    assert agree(authors.guide(nets.guide, x), nets.guide(x))


@torch.no_grad()
def test_an_image_of_one_channel_has_the_same_regions_in_red():
    nets, x = networks(tiny(), channels=1), colour(channels=1)
    assert agree(authors.guide(nets.guide, x), nets.guide(x))


@torch.no_grad()
def test_the_authors_local_prior_does_not_see_green_and_blue():
    nets, x = networks(tiny()), colour()
    theirs, ours = authors.guide(nets.guide, x), nets.guide(x)
    assert torch.equal(theirs.corners, ours.corners) and close(theirs.logits_g, ours.logits_g)
    assert not close(theirs.logits_l, ours.logits_l, 1e-2)
    corners, repainted = theirs.corners.numpy(), x.clone()
    repainted[:, 1:] = 0
    assert torch.equal(authors.crop(x, corners, 8, red=True), authors.crop(repainted, corners, 8, red=True))
    assert not torch.equal(authors.crop(x, corners, 8, red=False), authors.crop(repainted, corners, 8, red=False))


def test_crops_over_the_border_are_filled_with_the_minimum_of_the_image():
    x = colour(1)
    red, all_ = (authors.crop(x, torch.tensor([[[28, 30]]]).numpy(), 8, red=r)[0, 0] for r in (True, False))
    assert torch.equal(all_[:, :4, :2], x[0, :, 28:, 30:]) and torch.equal(red[:, :4, :2], x[0, :1, 28:, 30:].expand(3, -1, -1))
    assert (all_[:, 4:] == x.min()).all() and (all_[:, :, 2:] == x.min()).all() and (red[:, 4:] == x[0, 0].min()).all()


def test_crops_reach_over_the_border_at_64_pixels_and_never_at_224():
    def corner(grid, image, size):                                      # the last cell is the best one
        saliency = torch.randn(1, 2, grid, grid)
        saliency[..., -1, -1] = 9
        return authors.find_rois(saliency, (image, image), size, 1).max()

    assert corner(7, 224, 32) + 32 == 224 and corner(8, 64, 9) + 9 == 65


def test_a_constant_class_map_sends_all_the_authors_regions_to_the_corner():
    saliency = torch.randn(3, 5, 7, 7)
    saliency[0, 2] = .3
    assert authors.heat_map(saliency)[0].isnan().all() and authors.heat_map(saliency)[1:].isfinite().all()
    theirs, ours = authors.find_rois(saliency, (224, 224), 32, 6), diffmic.find_rois(saliency, (224, 224), 32, 6)
    assert (theirs[0] == 0).all() and len({tuple(b) for b in ours[0].tolist()}) == 6
    assert torch.equal(torch.from_numpy(theirs[1:]), ours[1:])


def test_a_cell_that_the_authors_set_to_zero_can_be_found_again():
    saliency = torch.zeros(1, 1, 7, 7)
    saliency[..., 3, 3] = 1                                             # all others are at the minimum: 0 after the scaling
    found = {tuple(b) for b in authors.find_rois(saliency, (224, 224), 32, 6)[0].tolist()}
    assert found == {(96, 96), (0, 0)}
    assert len({tuple(b) for b in diffmic.find_rois(saliency, (224, 224), 32, 6)[0].tolist()}) == 6


def test_the_authors_larger_windows_can_overlap():
    saliency, overlap = torch.zeros(1, 1, 14, 14), []
    saliency[..., 4:7, 4:7] = 1                                         # 3 x 3 cells; after 2 x 2 of them are set to 0, the best
    for find in (authors.find_rois, diffmic.find_rois):                 # window left shares a cell or two with the first
        a, b = torch.as_tensor(find(saliency, (448, 448), 64, 2))[0]
        overlap.append(bool(((a - b).abs() < 64).all()))
    assert overlap == [True, False]


def test_a_crop_smaller_than_its_window_is_the_windows_corner_for_the_authors_and_its_middle_here():
    saliency = torch.zeros(1, 1, 4, 4)
    saliency[..., 1, 2] = 1                                             # a cell of 8 x 8 pixels, a crop of 5 x 5
    assert authors.find_rois(saliency, (32, 32), 5, 1).tolist() == [[[8, 16]]]
    assert diffmic.find_rois(saliency, (32, 32), 5, 1).tolist() == [[[10, 18]]]


# ---------------------------------------------------------------------------------------------- prediction
@pytest.mark.parametrize("prior_mean", ["mean", "geometric"])
@pytest.mark.parametrize("given", [dict(), dict(prior_input="fused"), dict(steps=30), dict(size=224, roi_size=32)])
@torch.no_grad()
def test_with_the_same_levels_both_arrangements_draw_the_same_label(given, prior_mean):
    config = tiny(prior_mean=prior_mean, **given)
    B = 2 if config.size == 224 else 6
    nets, x, noise = networks(config), colour(B, config.size), torch.randn(B, config.steps, 5)
    levels = respaced_timesteps(config.timesteps, config.steps)
    theirs = authors.predict(nets, config, x, noise, levels, red=False)
    ours = diffmic.classify(nets, config, x, noise[:, None])
    assert close(theirs, ours.path[:, 0, -1]) and torch.equal(theirs.argmax(1), ours.p.argmax(1))


@torch.no_grad()
def test_the_authors_own_levels_are_the_first_ones_and_give_another_label():
    config = tiny()
    nets, x, noise = networks(config), gray(), torch.randn(6, 4, 5)
    assert authors.truncated_timesteps(1000, 4).tolist() == [3, 2, 1, 0] and respaced_timesteps(1000, 4).tolist() == [999, 666, 333, 0]
    default = authors.predict(nets, config, x, noise)
    assert torch.equal(default, authors.predict(nets, config, x, noise, authors.truncated_timesteps(1000, 4)))
    respaced = authors.predict(nets, config, x, noise, respaced_timesteps(1000, 4))
    assert default.isfinite().all() and not close(default, respaced, 1e-2)


def test_truncation_to_all_levels_is_respacing():
    assert torch.equal(authors.truncated_timesteps(50, 50), respaced_timesteps(50, 50))


@pytest.mark.parametrize("steps", [1, 7])
@torch.no_grad()
def test_the_authors_encode_an_image_at_every_step_and_guide_it_twice(steps):
    config = tiny(steps=steps)
    nets, x, noise = networks(config), colour(2), torch.randn(2, steps, 5)
    calls = counted(nets)
    authors.predict(nets, config, x, noise)
    assert calls == {"encoder": steps, "denoiser": steps, "guide": 2}
    calls.clear()
    diffmic.classify(nets, config, x, noise[:, None])
    assert calls == {"encoder": 1, "denoiser": steps, "guide": 1}


# ---------------------------------------------------------------------------------------------- training
def both_steps(config, x):
    """Losses and networks of a step in the authors' arrangement and in ours, with the same weights, priors, noise and levels."""
    theirs = networks(config)
    ours = copy.deepcopy(theirs)
    with torch.no_grad():
        y_g, y_l = ours.guide(x).priors()                               # in evaluation mode, as they take them
    torch.manual_seed(1)
    a = authors.train_step(theirs, config, x, LABELS, red=False)
    ours.train()
    torch.manual_seed(1)
    b = diffmic.loss(ours, config, x, F.one_hot(LABELS, 5).float(), y_g, y_l)
    b["diffusion"].backward()
    b["guide"] = diffmic.guide_loss(config, ours.guide(x), LABELS)
    b["guide"].backward()
    return a, b, theirs, ours


@pytest.mark.parametrize("given", [dict(), dict(prior_input="fused", prior_mean="geometric"), dict(antithetic=False, mmd_weight=2.)])
def test_a_training_step_has_the_same_losses_with_three_embeddings_of_an_image_and_with_one(given):
    a, b, *_ = both_steps(tiny(**given), colour())
    for name in ("eps", "mmd_g", "mmd_l", "diffusion", "guide"):
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-5, abs=1e-6)
    assert len({round(a[name].item(), 4) for name in ("eps", "mmd_g", "mmd_l", "guide")}) == 4     # none is missing


def test_a_training_step_has_the_same_gradients_in_both_arrangements():
    *_, theirs, ours = both_steps(tiny(), colour())
    mine = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        assert close(p.grad, mine[name], 1e-4) and p.grad.isfinite().all(), name
    assert all(p.grad.any() for net in (theirs.encoder, theirs.denoiser, theirs.guide.local_net) for p in net.parameters() if p.ndim > 1)


def test_on_gray_images_the_authors_red_regions_change_no_loss():
    config, x = tiny(), gray()
    losses = []
    for red in (True, False):
        torch.manual_seed(1)
        losses.append(authors.train_step(networks(config), config, x, LABELS, red))
    assert all(losses[0][k].item() == pytest.approx(losses[1][k].item(), rel=1e-5, abs=1e-6) for k in losses[0])


def test_three_updates_of_the_running_statistics_at_a_tenth_are_one_at_0_271():
    config, x = tiny(), colour()
    theirs = networks(config)
    ours = copy.deepcopy(theirs.encoder).train()
    for m in norms(ours):
        m.momentum = 1 - (1 - .1) ** 3
    authors.train_step(theirs, config, x, LABELS)
    ours(x)
    for a, b in zip(norms(theirs.encoder), norms(ours), strict=True):
        assert close(a.running_mean, b.running_mean) and close(a.running_var, b.running_var)
        assert a.num_batches_tracked == 3 and b.num_batches_tracked == 1 and b.momentum == pytest.approx(.271)


def test_the_authors_encode_a_batch_three_times_and_guide_it_twice():
    config, x = tiny(), colour()
    nets = networks(config)
    calls = counted(nets)
    authors.train_step(nets, config, x, LABELS)
    assert calls == {"encoder": 3, "denoiser": 3, "guide": 2}
    calls.clear()
    diffmic.train_step(nets=nets, ema=None, config=config, batch=Batch(x, LABELS, LABELS.numpy(), LABELS.numpy() * 0), joint=True)
    assert calls == {"encoder": 1, "denoiser": 3, "guide": 1}


def test_the_authors_diffusion_loss_has_a_gradient_in_the_guide_that_is_thrown_away(monkeypatch):
    config, x, thrown = tiny(), colour(), {}
    nets, alone = networks(config), networks(config)
    zero = nets.guide.zero_grad

    def spy():
        thrown.update({name: p.grad.clone() for name, p in nets.guide.named_parameters()})
        zero()

    monkeypatch.setattr(nets.guide, "zero_grad", spy)
    authors.train_step(nets, config, x, LABELS)
    layers = "global_net.conv1", "to_saliency", "local_net.conv1", "attention_w", "to_local"
    assert all(thrown[f"{layer}.weight"].any() for layer in layers)
    out = authors.guide(alone.guide.train(), x)
    F.cross_entropy((out.logits_g + out.logits_l) / 2, LABELS).backward()
    for (name, p), q in zip(nets.guide.named_parameters(), alone.guide.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name                        # of the cross-entropy, and nothing else


def test_the_authors_priors_leave_the_running_statistics_of_the_guide_to_its_own_step():
    config, x = tiny(), colour()
    nets = networks(config)
    authors.train_step(nets, config, x, LABELS)
    assert {int(m.num_batches_tracked) for m in norms(nets.guide)} == {1} and nets.guide.training


# ---------------------------------------------------------------------------------------------- MedSymmFlow
def worn(net):
    """As after training: what is zero at first is not."""
    for p in net.parameters():
        p.data += .1 * torch.randn_like(p)
    return net.eval()


@pytest.mark.parametrize("args, side", [((4, 4, 16, (1, 2, 2, 2), 1, {2}, 8), 16), ((6, 6, 8, (1, 2), 2, {1, 2}, 16), 8), ((9, 9, 12, (1, 2, 3), 1, {4}, 4), 12)])
@torch.no_grad()
def test_the_unet_with_einsum_attention_and_norms_in_float32_has_the_same_output(args, side):
    net, x, t = worn(UNet(*args)), torch.randn(3, args[0], side, side), torch.tensor([0., .3, 1.])
    ours = net(x, t)
    assert torch.allclose(authors.unet(net, x, t), ours, rtol=0, atol=1e-5) and ours.std() > .1


def test_both_unets_have_the_same_gradients():
    net, x, t = worn(UNet(4, 4, 8, (1, 2), 1, {2}, 8)), torch.randn(2, 4, 8, 8), torch.rand(2)
    grads = []
    for forward in (net, lambda *given: authors.unet(net, *given)):
        net.zero_grad()
        forward(x, t).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_under_autocast_the_authors_norms_are_float32_and_their_output_bfloat16():
    net, x = worn(UNet(4, 4, 8, (1, 2), 1, {2}, 8)), torch.randn(2, 4, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs, ours = authors.unet(net, x, torch.rand(2)), net(x, torch.rand(2))
    assert theirs.dtype == ours.dtype == torch.bfloat16


def latent_flow(tmp_path, **given):
    """Networks of the flow of a small autoencoder's latents, with the authors' scale."""
    torch.save(worn(AutoencoderKL(3, 8, (1, 2), 1, 4)).state_dict(), tmp_path / "autoencoder.pt")
    config = symmflow.configure(**dict(data="toy", recipe="paper", size=16, channels=8, mult="1,2", head_channels=8, baseline=False, latent="rgb",
                                       autoencoder=str(tmp_path / "autoencoder.pt"), latent_scale=authors.SCALE) | given)
    nets = symmflow.build(config, dict(channels=3, classes=list(range(5)), multilabel=False))
    worn(nets.unet)
    return config, nets


def calls_of(codec):
    calls = Counter()
    for name in ("encoder", "decoder"):
        getattr(codec, name).register_forward_hook(lambda module, args, out, name=name: calls.update({name: len(out)}))
    return calls


@torch.no_grad()
def test_the_authors_latent_classification_has_the_same_distances_and_decodes_an_image_more(tmp_path):
    config, nets = latent_flow(tmp_path)
    x, noise, calls = colour(3, 16), torch.randn(3, 4, 8, 8), calls_of(nets.codec.net)
    theirs = authors.classify_latents(nets.codec.net, nets.unet, nets.codes, x, noise)
    assert calls == {"encoder": 3, "decoder": 6}
    calls.clear()
    ours = symmflow.classify(nets, config, x, noise[:, None])
    assert calls == {"encoder": 3, "decoder": 3}
    assert close(ours.d, theirs) and torch.equal(ours.p.argmax(1), theirs.argmin(1)) and theirs.std() > .1


@torch.no_grad()
def test_the_authors_encode_image_and_label_map_at_every_step_and_we_once_an_image_and_once_a_class(tmp_path):
    config, nets = latent_flow(tmp_path)
    x, calls = colour(6, 16), calls_of(nets.codec.net)
    batch = Batch(x, LABELS, LABELS.numpy() * 10 + range(6), LABELS.numpy() * 0)
    for _ in range(3):
        theirs = authors.encode_latents(nets.codec.net, nets.codes, 0., x, LABELS)
    assert calls == {"encoder": 36}
    calls.clear()
    for _ in range(3):
        ours = nets.encode(x, batch), nets.label_map(LABELS, (8, 8))
    assert calls == {"encoder": 16 + 5}                                 # six images, filled up to sixteen, and five classes
    assert torch.allclose(ours[0], theirs[0], rtol=1e-3, atol=1e-4) and close(ours[1], theirs[1])


@torch.no_grad()
def test_the_authors_loop_over_steps_and_classes_has_the_errors_of_our_batches():
    config = diffclassifier.configure(data="toy", recipe="paper", size=16, channels=8, mult="1,2", attention="2", head_channels=8, blocks=1, width=8,
                                      wavelet=False, time_scale=20., votes=7, baseline=False)
    nets = worn(diffclassifier.build(config, dict(channels=3, classes=list("abc"), multilabel=False)))
    x, t, eps, calls = colour(1, 16), torch.rand(7), torch.randn(7, 3, 16, 16), Counter()
    row, c = torch.arange(7).repeat_interleave(3), torch.arange(3).repeat(7)
    ours = diffclassifier.errors(nets, config, x.expand(7, -1, -1, -1), t, eps, row, c).sum((1, 2, 3)).view(7, 3)
    nets.denoiser.register_forward_hook(lambda module, args, out: calls.update([len(out)]))
    theirs = authors.reconstruction_errors(nets, config, x, t, eps)
    assert close(ours, theirs) and calls == {1: 21} and ours.std(1).min() > 0


# ---------------------------------------------------------------------------------------------- Mediffusion
def test_a_finding_is_removed_alike_with_the_same_noise(monkeypatch):
    config = mediffusion.configure(data="toy_xray", recipe="paper", size=16, ae_width=8, ae_mult="1,2", ae_latent=2, channels=8, mult="1,2", attention="1,2",
                                   head_channels=8, hidden=16, baseline=False, remove_start=12, remove_scale=40.)
    torch.manual_seed(0)
    nets = mediffusion.build(config, dict(channels=1, classes=list("abc"), multilabel=True)).eval()
    for p in nets.unet.parameters():
        p.data += .1 * torch.randn_like(p)                              # what is zero at first is not
    x, noise = colour(3, 16, 1), torch.randn(13, 3, *nets.shape)

    def drawn(seed, names, shape, device):
        when = names[0].split()
        return noise[12 if when[-1] == "start" else 11 - int(when[-1])]  # ours counts steps, theirs levels
    monkeypatch.setattr(run, "image_noise", drawn)
    led, control = mediffusion.counterfactual(nets, config, x, torch.full((3,), 1), False, list("abc"))
    with torch.no_grad():
        assert close(authors.remove(nets, x, noise, 1, 40.), led, 1e-4) and close(authors.remove(nets, x, noise, 1, 0.), control, 1e-4)
    assert (led - control).abs().max() > .01
