"""Mediffusion: one encoder for a diffusion model of all images and a classifier of those with labels; together they show what would change a diagnosis.

Kaleta et al., "Mediffusion: Joint Diffusion for Self-Explainable Semi-Supervised Classification and Medical Image Generation",
arXiv 2411.09434 (2024). An autoencoder makes latents of images. A U-Net learns to denoise the latents of all images; what its encoder
makes of a clean latent, averaged over pixels, is classified, learnt from the few images that have labels. To draw, or to change, an image,
the classifier's gradient leads the reverse process: a counterfactual is the image as it would have to be for another answer.

    z = E(x);  z_t = sqrt(ab_t) z + sqrt(1 - ab_t) eps                                          `q_sample`
    H_t = means over pixels of the U-Net's encoder's tensors (ten); g(y | H_0), two layers   `features`, `Networks.head`
    L = |eps_hat(z_t, t) - eps|^2 over all images + w L_class(g(y | H_0)) over those with labels         eq. 1 and below   `train_step`
    eps' = eps_hat - s sqrt(1 - ab_t) grad_{z_t} log g(y | .), to remove log (1 - g)     eq. 2, which leaves out s   `guided`
    x' = D(z'), z' denoised so from z_t, t = 300 or 200: "remove" leads away from a label, "enforce" to it           `counterfactual`

B images, K labels (multi-label: sigmoids, else a softmax), E and D the autoencoder, ab = alpha_bar, s the guidance; the paper's e_nu is `unet.encode`,
its g_omega `head`, its decoder psi `unet.decode`. `--labels 0.1` shows a tenth of the labels.

    python mediffusion.py                                     # toy chest films, 10 % of the labels: minutes on a CPU
    python mediffusion.py --data chestxray14 --root DIR --labels 0.02       # the paper's sizes, for a CUDA GPU; also isic2019
    python mediffusion.py predict --checkpoint RUN/best.pt a.png folder/
    python mediffusion.py explain --checkpoint RUN/best.pt --target Cardiomegaly --remove a.png
    python mediffusion.py sample --checkpoint RUN/best.pt --label Effusion -n 16

Read differently from the paper, and why
 1. Appendix C swaps two terms: the perceptual one is there from the start (weight 1), the GAN from step 50,001 (0.5). Without --vgg and --lpips: a pyramid.
 2. Attention "at 4x4, 2x2, 1x1" are downsampling factors: every level. "10,000 features by average pooling" is the mean over all pixels: 5,632.
 3. The joint loss is a sum; the paper's minus is a slip. Labels of all 14 findings (8 classes in ISIC); ChestX-ray14's "No Finding" is none.
 4. Eq. 2 classifies z_t; the authors' code what the U-Net takes for z_0, with t's embedding (--guide-on). That code teaches the classifier at every 4th step (--cls-every).
 5. Latents have unit spread (--latent-scale 1: as they come, the authors'): s = 500 is not theirs. t = 300 is level 299, of the noise (theirs: 300) and of the first step.
 6. Validation, which keeps all labels, selects, not the test split. Who has labels goes by patient. Of a counterfactual counts guided minus control.
 7. Images are mirrored, not cropped at random: latents are computed once. Training samples E's posterior, testing takes its mean. The classifier sees no noise: t = 0.
 8. Recipe plus classifies strong views, too (--few-augment), answers for mirror images (--mirror), fits a temperature; its guidance is as long as noise (--guide-unit),
    goes through the encoder (--guide-through), a short way (--edit-steps), holds other answers (--hold-labels), rests at --guide-goal, keeps little (--edit-keep).
AUROC on toy chest films, a tenth of the labels, three seeds: plus .912, its classifier alone .915, ResNet-18 .898: the diffusion, the paper's claim, does not help here.
"""
# ============================================================================= 2 imports
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

from common import drawn, metrics, plots, run  # before torch, whose threads it tells how to wait
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.autoencoder import AutoencoderKL, Discriminator, Perceptual, adaptive_weight, autoencoder_from, encode_once, gan_losses, gan_weight, reconstruction_loss, sample
from common.resnet import ResNet
from common.unet import UNet
from data import Batches, DataError, load_for, mirrored, read_split, shortcut

METHOD = "mediffusion"
NOT_DRAWN = "--variant no_diffusion: such a run has learned to classify alone, and draws or changes no image; take one of --variant joint"


# ============================================================================= 3 settings
@dataclass
class Config:
    """Every setting. Defaults: the paper's, the authors' code's where it is silent (hidden, dropout, ema), but for the list above. SMALL, PLUS, BY_DATA replace some."""
    # --- data ---
    data: str = "toy_xray"  # data set: toy_xray, toy, chestxray14, isic2019, ham10000, chexpert, MedMNIST names, or folder (a folder per class)
    root: str = ""  # its folder; none: data/raw/NAME
    size: int = 256  # [8..2048] pixels a side; 32 for the toy sets, 64 for --scale small
    split: Literal["official", "group", "paper"] = "official"  # official test set, else by patient or lesion; paper: the paper's own, which may leak
    fit: Literal["crop", "squash"] = "crop"  # make images square by a centre crop, or by squashing
    limit: int = 0  # [0..] at most so many images a split, drawn by class; 0: all
    skip_bad: bool = False  # leave out images that cannot be read, instead of stopping
    augment: str = "hflip"  # of training images: hflip, vflip, rotate (30 degrees), strong (half of them moved, covered, of other contrast), joined by commas
    balanced: bool = False  # draw every class equally often, of the images with labels; probabilities are not corrected for it
    # --- model ---
    scale: Literal["paper", "small"] = "paper"  # the paper's sizes for a GPU, or minutes on a CPU; not given: small for toy data
    recipe: Literal["paper", "plus"] = "paper"  # as the paper says, or with this project's improvements; not given: plus at scale small
    pretrained: str = ""  # file of ImageNet weights (torchvision's keys) for the plain ResNet
    init: str = ""  # checkpoint of another run to start from (fine-tuning)
    # --- training ---
    epochs: int = 160  # [1..] passes over the training images; 160 are about 200,000 steps of ChestX-ray14
    pretrain_epochs: int = 240  # [0..] passes before them: of the autoencoder alone
    batch_size: int = 64  # [2..] images a step, over all processes
    grad_accum: int = 1  # [1..] parts a batch is computed in, to save memory (2 images each at least)
    eval_batch_size: int = 128  # [1..] images at once when no gradient is needed; changes no result
    lr: float = 5e-5  # [0..] peak learning rate of Adam, for the U-Net and the plain ResNet
    warmup: float = 0.  # [0..1] share of the steps over which it rises
    clip: float = 0.  # [0..] largest gradient norm; 0: no clipping
    ema: float = 0.9999  # [0..1] decay of the weights' moving average, which is what is evaluated
    baseline: bool = True  # train a plain ResNet on the same labels, as a control
    select: Literal["accuracy", "balanced_accuracy", "f1_macro", "auroc", "nll", "last"] = "auroc"  # validation metric that picks the epoch, nll the least; last: none does
    seed: int = 0  # [0..] of weights, order, noise, toy images and what --limit draws; splits do not depend on it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    amp: Literal["auto", "bf16", "off"] = "auto"  # bfloat16 arithmetic; auto: on CUDA
    compile: bool = False  # torch.compile the networks: slower start, faster steps
    # --- output ---
    output: str = ""  # the run's folder; none: the next free runs/METHOD-DATA-SCALE-RECIPE-sSEED
    # --- method ---
    labels: str = "1"  # share of the training images whose label is shown, over 0 and up to 1, or a file with an image name a line
    labelled_batch: int = 32  # [2..] images with labels that join each batch
    few_augment: str = ""  # of images with labels, for the classifier and the plain ResNet, besides: rotate, strong; the diffusion's stay as they are
    mirror: bool = False  # answers are the mean (of logits) over the image and its mirror images, those of --augment
    variant: Literal["joint", "no_diffusion"] = "joint"  # no_diffusion: the classifier alone, at every step (the paper's Table 3, not its settings)
    width: int = 64  # [8..] channels in the first stage of the plain ResNet
    autoencoder: str = ""  # file of one to use instead of training one: latent-diffusion's keys or diffusers' (sd-vae-ft-mse), or a run's autoencoder.pt
    ae_width: int = 128  # [8..] channels of the autoencoder's first level
    ae_mult: str = "1,2,4,4"  # of each level, in multiples; each but the last halves the sides
    ae_blocks: int = 2  # [1..] its residual blocks a level
    ae_latent: int = 4  # [1..] channels of the latents
    ae_lr: float = 4.5e-6  # [0..] learning rate of autoencoder and discriminator
    kl_weight: float = 1e-6  # [0..] of the latents' divergence from noise, against an error that is a sum over pixels
    gan_weight: float = 0.5  # [0..] of the patch discriminator, times the adaptive weight; 0: none
    gan_start: int = 50001  # [0..] step at which it joins
    vgg: str = ""  # file of VGG-16's weights (torchvision's keys) for the perceptual term; none: a weight-free pyramid
    lpips: str = ""  # file of LPIPS's five linear layers; with --vgg the perceptual term is LPIPS
    latent_scale: float = 0.  # [0..] latents are multiplied by it; 0: to unit spread, measured; 1: the authors'
    channels: int = 256  # [8..] of the U-Net's first level
    mult: str = "1,2,4"  # channels of each level, in multiples
    blocks: int = 2  # [1..] residual blocks a level
    attention: str = "1,2,4"  # downsampling factors at which there is attention
    head_channels: int = 32  # [1..] of an attention head
    timesteps: int = 1000  # [25..] T, noise levels
    hidden: int = 1024  # [1..] units between the classifier's two layers
    dropout: float = 0.3  # [0..1] before each of them
    decay: Literal["none", "cosine"] = "none"  # of the learning rate
    head_lr: float = 0.  # [0..] the classifier's learning rate; 0: the paper's for this share of labels
    cls_weight: float = 0.  # [0..] w, of the classification loss; 0: the paper's for this share of labels
    cls_start: int = 5000  # [0..] steps of diffusion alone before it, a tenth of them all at most
    cls_every: int = 4  # [1..] steps from one classification loss to the next
    cls_noise: int = 0  # [0..] the classifier sees latents of up to so many noise levels in training; 0: clean ones
    feature_times: str = "0"  # noise levels at which features are taken, their mean is classified; 0: of the clean latent
    consistency: float = 0.  # [0..] weight of agreement with the EMA network's answers on all images (mean teacher, Tarvainen & Valpola 2017)
    guide: str = "own"  # what leads: own, or the checkpoint of another run, whose plain ResNet sees the decoded image (appendix H: of z_t, s 100 times as large)
    guide_on: Literal["x0hat", "zt"] = "x0hat"  # what is classified: the U-Net's guess of z_0 (the authors' code), or z_t (eq. 2)
    guide_through: Literal["unet", "encoder"] = "unet"  # the gradient of the guess: through the whole U-Net, or as if eps_hat were constant
    guide_clean: bool = False  # the guess is classified with the embedding of t = 0, as in training, not of t
    guide_unit: bool = False  # the gradient as long as standard normal noise (root mean square 1): s no longer depends on how sure the classifier is
    guide_goal: float = 1.  # [0..1] guidance rests where the probability aimed at is above it
    hold_labels: float = 0.  # [0..] weight of the other labels' squared change, in logits; like the next not with --guide-on zt, which sees noise
    hold_latent: float = 0.  # [0..] weight of the latent's squared change
    guidance: float = 300.  # [0..] s, where images are drawn
    draw_steps: int = 50  # [1..] of the reverse process
    eta: float = 0.  # [0..1] its noise: 0 DDIM, 1 DDPM
    remove_start: int = 300  # [1..] noise level from which a finding is removed
    remove_scale: float = 500.  # [0..] s for it
    enforce_start: int = 200  # [1..] noise level from which a finding is enforced
    enforce_scale: float = 200.  # [0..] s for it
    edit_steps: int = 0  # [0..] of the reverse process of counterfactuals, whose first level is the first of `levels`; 0: each level
    edit_eta: float = 1.  # [0..1] its noise
    edit_keep: float = 1.  # [0..1] a counterfactual is the control but for the pixels that hold this share of the change's energy; 1: all
    explained: int = 16  # [1..] images of each class that are changed and measured at the end
    calibrate: bool = False  # fit the probabilities' temperature on validation
    uncertainty: Literal["entropy", "margin"] = "entropy"  # what predictions are ranked by


SMALL = dict(size=64, epochs=16, pretrain_epochs=8, batch_size=16, labelled_batch=16, lr=1e-3, warmup=.05, clip=1., ema=.995, width=8, decay="cosine",
             ae_width=16, ae_mult="1,2,4", ae_blocks=1, ae_lr=1e-3, gan_weight=0., channels=32, blocks=1, head_channels=16, hidden=128, head_lr=1e-3,
             cls_weight=.05, cls_start=0, cls_every=1)
PLUS = dict(few_augment="strong", mirror=True, calibrate=True, guide_through="encoder", guide_clean=True, guide_unit=True, guide_goal=.99, hold_labels=.005, guidance=.15,
            eta=1., remove_start=200, remove_scale=3., enforce_scale=3., edit_steps=25, edit_eta=0., edit_keep=.5)
SAMPLING = ["device", "eval_batch_size", "amp", "guide", "guide_on", "guide_through", "guide_clean", "guide_unit", "guide_goal", "hold_labels", "hold_latent",
            "autoencoder", "uncertainty", "skip_bad", "output"]   # what may change when a checkpoint is used
TOY = dict(size=32, labels="0.1", pretrain_epochs=5, epochs=10, few_augment="")    # they all come out of one machine
BY_DATA = {"toy_xray": TOY, "toy": TOY | dict(augment="hflip,vflip"), "chestxray14": dict(fit="squash"),
           "isic2019": dict(epochs=72, pretrain_epochs=1080, cls_start=0, head_lr=5e-5, cls_weight=1e-3)}
PANELS = [("Losses", "loss", ["diffusion", "classifier", "resnet"]), ("Autoencoder", "error a pixel", ["l1", "perceptual"]),
          ("Validation", "AUROC", ["val_auroc", "val_resnet_auroc"])]


def configure(**given):
    """The Config of a scale, recipe and data set; what is `given` wins. `train(configure(data="toy", seed=1))`."""
    return run.configure(Config, (dict(pretrain_epochs=0) if given.get("autoencoder") else {}) | given, SMALL, PLUS, BY_DATA)


# ============================================================================= 4 the method
def alpha_bars(T):
    """ab (T,) float64 of latent diffusion's schedule: beta from 0.0015 to 0.0195, evenly in their roots; for another T times 1000 / T, hence T >= 20."""
    return (1 - torch.linspace(.0015 ** .5, .0195 ** .5, T, dtype=torch.float64) ** 2 * 1000 / T).cumprod(0)


def q_sample(z, eps, ab):
    """z_t of z, eps (B, ...) at levels whose alpha_bar is ab, (B,) or one number."""
    ab = torch.as_tensor(ab, dtype=torch.float32, device=z.device).view(-1, 1, 1, 1)
    return ab.sqrt() * z + (1 - ab).sqrt() * eps


def levels(start, n):
    """The noise levels of a reverse process, start - 1 down to 0 (n = 0), or n of them, as latent diffusion's DDIM has them: 981, 961, .. 1 of 1000 in 50 steps; a
    single step begins at start - 1 (that code: at 1, where there is hardly any noise)."""
    n = min(n, start)
    return list(range(start))[::-1] if n in (0, start) else [start - 1] if n == 1 else [i * start // n + 1 for i in range(n)][::-1]


def reverse_step(z_t, eps, noise, ab_t, ab_s, eta):
    """From level t to a less noisy s (Song et al. 2021, eq. 12, sigma eq. 16): eta 0 is DDIM, eta 1 DDPM's posterior. Nothing is clamped."""
    z_0 = (z_t - (1 - ab_t) ** .5 * eps) / ab_t ** .5
    sigma = eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)) ** .5
    return ab_s ** .5 * z_0 + max(0., 1 - ab_s - sigma ** 2) ** .5 * eps + sigma * noise


def class_loss(logits, y):
    """Cross-entropy of labels y (B,); of multi-label y (B, K) binary, the mean over all entries that are known (0 or 1)."""
    if y.ndim == 1:
        return F.cross_entropy(logits, y)
    known = (y >= 0).float()
    return (F.binary_cross_entropy_with_logits(logits, y.clamp_min(0), reduction="none") * known).sum() / known.sum().clamp_min(1)


def autoencoder_loss(nets, config, x, step):
    """Stage 1: error, KL and, from `gan_start`, the discriminator's verdict, each as in common/autoencoder.py."""
    x = nets.as_seen(x)
    mean, logvar = nets.autoencoder.encode(x)
    x_hat = nets.autoencoder.decode(sample(mean, logvar, torch.randn_like(mean))).float()
    nll, kl, losses = reconstruction_loss(x, x_hat, mean, logvar, nets.perceptual, config.kl_weight)
    losses["loss"] = nll + kl
    if config.gan_weight and gan_weight(step, config.gan_start):
        generator, losses["discriminator"] = gan_losses(nets.discriminator, x, x_hat)
        factor = config.gan_weight * adaptive_weight(nll, generator, nets.autoencoder.decoder.conv_out.weight)
        losses["loss"] = losses["loss"] + factor * generator + losses["discriminator"]
    return losses


def diffusion_loss(nets, config, z):
    """Latents z (B, C, H, W) of all images, labels unseen -> dict: eps-MSE, and by tenths of t."""
    t, eps = torch.randint(config.timesteps, (len(z),), device=z.device), torch.randn_like(z)
    error = (nets.unet(q_sample(z, eps, nets.alpha_bar[t]), t).float() - eps).square().mean((1, 2, 3))
    tenth = F.one_hot(t * 10 // config.timesteps, 10).float()
    return {"diffusion": error.mean(), "error_by_t": torch.stack([(tenth * error.detach()[:, None]).sum(0), tenth.sum(0)])}


def features(nets, config, z, names=None):
    """What is classified, of clean latents z (B, C, H, W): features (B, F), the mean over `feature_times`. In training (no names), with `cls_noise`,
    of a level up to it instead. Noise goes by the images' names, where they are given."""
    if names is None and config.cls_noise:
        t = torch.randint(min(config.cls_noise, config.timesteps), (len(z),), device=z.device)
        return nets.pooled(q_sample(z, torch.randn_like(z), nets.alpha_bar[t]), t)
    found = []
    for t in map(int, config.feature_times.split(",")):
        if t:
            eps = torch.randn_like(z) if names is None else run.image_noise(config.seed, [f"{name} at {t}" for name in names], z.shape[1:], z.device)
        found.append(nets.pooled(q_sample(z, eps, nets.alpha_bar[t]) if t else z, torch.full((len(z),), t, device=z.device)))
    return sum(found) / len(found)


def train_step(nets, ema, config, batch, joint):
    """One batch -> dict of losses; "loss" is what is differentiated. joint=False: stage 1, the autoencoder alone; else batch.few holds the images with labels."""
    epoch, number, count = batch.place
    step = (epoch - joint * config.pretrain_epochs) * count + number    # of this stage
    if not joint:
        return autoencoder_loss(nets, config, batch.x, step)
    nets.freeze(ema, batch.x)
    losses, few = {}, batch.few
    if nets.resnet is not None:                                         # the control: the same labels, not the same weights
        losses["resnet"] = class_loss(nets.resnet(few.x), few.y)
    if config.variant == "joint" or config.consistency:
        z = nets.latents(batch.x, batch, noise=True)
    if config.variant == "joint":
        losses |= diffusion_loss(nets, config, z)
    if config.variant == "no_diffusion" or (step >= min(config.cls_start, config.epochs * count // 10) and step % config.cls_every == 0):
        losses["classifier"] = class_loss(nets.head(features(nets, config, nets.latents(few.x, few, noise=True))), few.y)
    if config.consistency:                                              # mean teacher: the EMA network, which sees it clean
        with torch.no_grad():
            agreed = ema.answers(ema.head(features(ema, dataclasses.replace(config, cls_noise=0), z)))
        losses["consistency"] = (nets.answers(nets.head(features(nets, config, z))) - agreed).square().mean()
    weight = {"resnet": 1., "diffusion": 1., "classifier": nets.cls_weight, "consistency": config.consistency}
    return losses | {"loss": sum(weight[k] * losses[k] for k in weight if k in losses)}


# ----------------------------------------------------------------------------- guidance
class Aim(NamedTuple):
    """Where guidance leads B images."""
    label: torch.Tensor                 # (B,) the label spoken of
    enforce: torch.Tensor               # (B,) True: to it, False: away from it
    scale: float                        # s of eq. 2
    z: torch.Tensor | None = None       # (B, C, H, W) the latents to stay close to
    logits: torch.Tensor | None = None  # (B, K) the answers to hold, but for the label's


def aim_loss(logits, label, enforce, multilabel):
    """-log of the probability aimed at, (B,): of the label or, to remove it, of its absence. Of several labels the others do not matter."""
    own = logits.gather(1, label[:, None])[:, 0]
    if not multilabel:                                                  # log odds of the label against all others
        own = own - logits.scatter(1, label[:, None], -math.inf).logsumexp(1)
    return F.softplus(torch.where(enforce, -own, own))


def guided(nets, config, z_t, t, aim):
    """eps' of eq. 2 for latents z_t (B, C, H, W) at level t. Losses are summed over the batch: no image's gradient knows of another image."""
    ab, at = nets.alpha_bar[t], torch.full((len(z_t),), t, device=z_t.device)
    with torch.enable_grad():
        z_t = z_t.detach().requires_grad_()
        with torch.set_grad_enabled(config.guide_on == "x0hat" and config.guide_through == "unet"):
            eps = nets.unet(z_t, at).float()                            # through the encoder alone: as if eps_hat did not depend on z_t
        seen = z_t if config.guide_on == "zt" else (z_t - (1 - ab).sqrt() * eps) / ab.sqrt()
        clean = config.guide_clean and config.guide_on == "x0hat"
        logits = (nets.head(nets.pooled(seen, 0 * at if clean else at)) if config.guide == "own" else nets.other(nets.decoded(seen))).float()
        losses = aim_loss(logits, aim.label, aim.enforce, nets.multilabel)
        wanted = (-losses.detach()).exp() < config.guide_goal           # else: the probability aimed at is there already
        losses = losses * wanted
        if config.hold_labels and aim.logits is not None and config.guide_on == "x0hat":
            losses = losses + config.hold_labels * (logits - aim.logits).scatter(1, aim.label[:, None], 0).square().sum(1)
        if config.hold_latent and aim.z is not None and config.guide_on == "x0hat":
            losses = losses + config.hold_latent * (seen - aim.z).square().mean((1, 2, 3))
        (gradient,) = torch.autograd.grad(losses.sum(), z_t)
    if config.guide_unit:                                               # as long as standard normal noise
        factor = wanted * gradient[0].numel() ** .5 / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        gradient = gradient * factor.view(-1, 1, 1, 1)
    return eps.detach() + aim.scale * (1 - ab).sqrt() * gradient


@torch.no_grad()
def reverse(nets, config, z, start, n, eta, names, aim=None):
    """Latents z, noised to the first of `levels(start, n)`, -> clean ones (latent diffusion's DDIM stops at level 0), in n steps (0: each level); noise by image names."""
    way, ab = levels(start, n), nets.alpha_bar.tolist()
    for i, (t, s) in enumerate(zip(way, [*way[1:], -1])):
        eps = guided(nets, config, z, t, aim) if aim and aim.scale else nets.unet(z, torch.full((len(z),), t, device=z.device)).float()
        noise = run.image_noise(config.seed, [f"{name} step {i}" for name in names], z.shape[1:], z.device) if eta else 0.
        z = reverse_step(z, eps, noise, ab[t], ab[s] if s >= 0 else 1., eta)
    return z


@torch.no_grad()
def draw(nets, config, labels, names, scale, device):
    """Images (B, channels, H, W) of labels (B,), led by guidance s = scale from noise that goes by their names."""
    z, aim = run.image_noise(config.seed, names, nets.shape, device), Aim(labels, torch.ones_like(labels, dtype=torch.bool), scale)
    return nets.decoded(reverse(nets, config, z, config.timesteps, config.draw_steps, config.eta, names, aim)).clamp(-1, 1)


def strongest(change, share, side):
    """Mask (B, 1, H, W) of the fewest pixels that hold this share of the energy of a change (B, C, H, W), averaged over squares of `side`, odd."""
    energy = F.avg_pool2d(change.square().mean(1, keepdim=True), side, 1, side // 2)
    most, order = energy.flatten(1).sort(dim=1, descending=True, stable=True)
    held = most.cumsum(1) - most < share * most.sum(1, keepdim=True)    # by those before it
    return torch.zeros_like(held).scatter(1, order, held).view_as(energy)


def counterfactual(nets, config, x, label, enforce, names):
    """Images x (B, channels, H, W) as they would be without a label (B,), or with it: (guided, control), in [-1, 1]. The control is the same
    way through autoencoder and noise without guidance: what guidance changed is guided - control, of which `edit_keep` leaves the strongest
    part, as the masks of Jeanneret et al. 2023 (ACE). `enforce`: True or False, for all."""
    z, start = nets.latents(x), min(config.enforce_start if enforce else config.remove_start, config.timesteps)
    eps = run.image_noise(config.seed, [f"{name} start" for name in names], z.shape[1:], z.device)
    z_t = q_sample(z, eps, nets.alpha_bar[levels(start, config.edit_steps)[0]])
    logits = nets.head(features(nets, config, z, names)) if config.guide == "own" else nets.other(nets.decoded(z))     # of who guides
    aim = Aim(label, torch.full_like(label, enforce, dtype=torch.bool), config.enforce_scale if enforce else config.remove_scale, z, logits)
    led, control = (nets.decoded(reverse(nets, config, z_t, start, config.edit_steps, config.edit_eta, names, to)).clamp(-1, 1) for to in (aim, None))
    if config.edit_keep < 1:                                            # squares just under a latent's pixel
        led = torch.where(strongest(led - control, config.edit_keep, max(1, nets.autoencoder.multiple - 1) | 1), led, control)
    return led, control


# ============================================================================= 5 networks
class Networks(nn.Module):
    """Autoencoder and discriminator, the U-Net of the latents, the classifier on its encoder, and the plain ResNet."""

    def __init__(self, config, channels, classes, multilabel):
        super().__init__()
        self.classes, self.channels, self.multilabel, self.known, self.ready = classes, channels, multilabel, {}, False
        self.scale_given, self.guide = config.latent_scale, None
        self.resnet = ResNet(18, channels, classes, config.width, "small" if config.size < 100 else "imagenet",
                             bool(config.pretrained)) if config.baseline else None
        mult, attention, ae_mult = (tuple(int(n) for n in text.split(",") if n) for text in (config.mult, config.attention, config.ae_mult))
        if config.autoencoder:
            try:
                self.autoencoder = autoencoder_from(run.load_weights(config.autoencoder, "--autoencoder"))
            except ValueError as fault:
                raise run.UserError(f"--autoencoder {config.autoencoder}: {fault}") from None
        else:
            self.autoencoder = AutoencoderKL(channels, config.ae_width, ae_mult, config.ae_blocks, config.ae_latent)
        self.discriminator = Discriminator(channels) if config.gan_weight and config.pretrain_epochs else None
        self.perceptual = Perceptual()                                  # no module: a checkpoint holds none of it
        C, side = self.autoencoder.post_quant_conv.in_channels, config.size // self.autoencoder.multiple
        self.shape, self.multiple = (C, side, side), self.autoencoder.multiple * 2 ** (len(mult) - 1)
        self.unet = UNet(C, C, config.channels, mult, config.blocks, attention, config.head_channels)
        entries = config.channels * (1 + sum(mult[:-1]) + config.blocks * sum(mult) + mult[-1])         # 5,632 in the paper
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(entries, config.hidden), nn.LeakyReLU(.2),
                                  nn.Dropout(config.dropout), nn.Linear(config.hidden, classes))
        buffers = dict(alpha_bar=alpha_bars(config.timesteps).float(), latent_scale=torch.ones(()), frozen=torch.tensor(False),
                       cls_weight=torch.ones(()), head_lr=torch.ones(()), temperature=torch.ones(()))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def as_seen(self, x):
        """Gray images for a colour autoencoder."""
        return x.expand(-1, self.autoencoder.decoder.conv_out.out_channels, -1, -1)

    @torch.no_grad()
    def freeze(self, ema, x):
        """Once, as stage 2 begins: the autoencoder is from here on its average, and the latents' spread is measured on a batch of images."""
        self.ready = self.ready or bool(self.frozen)
        if not self.ready:
            self.autoencoder.load_state_dict(ema.autoencoder.state_dict())
            mean, _ = self.autoencoder.encode(self.as_seen(x))
            for nets in (self, ema):
                nets.latent_scale.copy_(self.scale_given or 1 / run.all_rows(mean.float()).std())
                nets.frozen.fill_(True)
            self.ready = True

    @torch.no_grad()
    def latents(self, x, batch=None, noise=False):
        """Images (B, channels, H, W) -> latents (B, C, h, w): the mean, or with noise a sample. Those of a training batch are computed once an
        image and way of flipping it, and kept in half precision."""
        if batch is None or batch.variant is None or (batch.variant < 0).any():
            mean, logvar = (part.float() for part in self.autoencoder.encode(self.as_seen(x)))
        else:
            keys = (batch.index * 4 + batch.variant).tolist()
            mean, logvar = encode_once(lambda x: torch.stack(self.autoencoder.encode(self.as_seen(x)), 1), x, keys, self.known).unbind(1)
        return (sample(mean, logvar, torch.randn_like(mean)) if noise else mean) * self.latent_scale

    def decoded(self, z):
        """Latents -> images (B, channels, H, W), not clamped; the mean of the colours for gray data. With gradient, for a guide that sees images."""
        x = self.autoencoder.decode(z / self.latent_scale).float()
        return x.mean(1, keepdim=True) if self.channels == 1 else x

    def other(self, x):
        """What the other classifier, of --guide FILE, says of images."""
        return self.guide[0].to(x.device)(x)

    def pooled(self, z, t):
        """H_t (sec. 3.3), (B, F), in the paper 5,632: of each tensor of the encoder, in their order, the mean over its pixels."""
        return torch.cat([h.float().mean((2, 3)) for h in self.unet.encode(z, t)], 1)

    def answers(self, logits):
        """Probabilities (B, K): a sigmoid for each of several labels, or a softmax."""
        logits = logits.float() / self.temperature
        return logits.sigmoid() if self.multilabel else logits.softmax(1)


def build(config, facts):
    """The networks for a data set's facts (channels, classes, multilabel; run.load_model), in training mode. Refuses what the method cannot take."""
    if config.autoencoder and config.pretrain_epochs:
        raise run.UserError(f"--autoencoder {config.autoencoder} --pretrain-epochs {config.pretrain_epochs}: this one is trained already; leave one out")
    if config.lpips and not config.vgg:
        raise run.UserError(f"--lpips {config.lpips}: weighs VGG-16's features; add --vgg FILE")
    if not all(t.isdecimal() and int(t) < config.timesteps for t in config.feature_times.split(",")):
        raise run.UserError(f"--feature-times {config.feature_times}: noise levels 0..{config.timesteps - 1}, joined by commas")
    if not config.autoencoder and not config.pretrain_epochs and not config.init:
        raise run.UserError("--pretrain-epochs 0: there would be no trained autoencoder; name one with --autoencoder FILE or --init CHECKPOINT")
    try:
        nets = Networks(config, facts["channels"], len(facts["classes"]), facts["multilabel"])
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as fault:
        raise run.UserError(f"--mult {config.mult} --attention {config.attention} --channels {config.channels} --head-channels {config.head_channels} --ae-mult "
                            f"{config.ae_mult} --ae-width {config.ae_width}: no network can be made of these ({fault})") from None
    if "own_data" not in facts:                                         # of a trained model nobody asks for it any more
        nets.perceptual = Perceptual(config.vgg, config.lpips)
    if facts["channels"] > nets.autoencoder.decoder.conv_out.out_channels:
        raise run.UserError(f"--autoencoder {config.autoencoder}: is one of gray images; colour images need one of colour images")
    if (low := config.size // nets.multiple * nets.multiple) != config.size:
        raise run.UserError(f"--size {config.size}: must be a multiple of {nets.multiple}; take {f'{low} or ' * (low > 0)}{low + nets.multiple}")
    if config.size < (24 if nets.discriminator else 16 if config.vgg else 11):
        raise run.UserError(f"--size {config.size}: too small to be judged by a discriminator or by VGG, or measured; take {24 if nets.discriminator else 16} or more")
    if config.guide != "own":
        nets.guide = [other_guide(config.guide, facts)]                 # in a list: no part of the network's weights
    return nets


def other_guide(path, facts):
    """The plain ResNet of another run's checkpoint, which guides by what it sees in decoded images (appendix H)."""
    content = run.load_weights(path, "--guide")
    ema, theirs = (content.get(k) if isinstance(content, dict) else None for k in ("ema", "facts"))
    held = {str(k).removeprefix("resnet."): v for k, v in ema.items() if str(k).startswith("resnet.")} if isinstance(ema, dict) else {}
    if getattr(first := held.get("conv1.weight"), "ndim", 0) != 4 or not isinstance(theirs, dict) or theirs.get("classes") != list(facts["classes"]):
        raise run.UserError(f"--guide {path}: no run's checkpoint with a plain ResNet of the classes {', '.join(facts['classes'])}")
    net = ResNet(18, facts["channels"], len(facts["classes"]), len(first), "small" if first.shape[-1] == 3 else "imagenet", bool((content.get("config") or {}).get("pretrained")))
    try:
        net.load_state_dict(held)
    except RuntimeError as fault:
        raise run.UserError(f"--guide {path}: is of other images ({str(fault).splitlines()[1].strip()[:100]})") from None
    return net.eval().requires_grad_(False)


def by_share(share):
    """The paper's learning rate of the classifier and weight of its loss, for this share of labels (appendix D)."""
    return (1e-5, 5e-5) if share < .035 else (2e-5, 1.5e-4) if share < .075 else (5e-5, 1e-3)


def initialise(nets, data, config):
    """Sets what depends on the share of labels; loads ImageNet weights and those of another run, where asked for."""
    head_lr, weight = by_share(len(data.train.few[0]) / len(data.train))
    nets.head_lr.fill_(config.head_lr or head_lr)
    nets.cls_weight.fill_(config.cls_weight or weight)
    if config.pretrained and nets.resnet is not None:
        run.load_pretrained(nets.resnet, config.pretrained)
    if config.init:
        run.load_init(nets, config.init, METHOD, "autoencoder." * bool(config.autoencoder), "autoencoder." * (not config.autoencoder and not config.pretrain_epochs))


def parameter_groups(nets, config):
    """AdamW's groups: name, parameters, peak learning rate, largest gradient norm (0: none). Without weight decay it is Adam."""
    groups = {"autoencoder": (nets.autoencoder, config.ae_lr), "discriminator": (nets.discriminator, config.ae_lr), "resnet": (nets.resnet, config.lr),
              "diffusion": (nets.unet, config.lr), "classifier": (nets.head, nets.head_lr.item())}
    return [dict(name=name, params=list(net.parameters()), lr=lr, peak=lr, clip=config.clip, weight_decay=0.,
                 betas=(.5, .9) if name in ("autoencoder", "discriminator") else (.9, .999)) for name, (net, lr) in groups.items() if net is not None]


def learning_rate(config, group, epoch):
    """Constant, or a cosine to 0, after a linear warm-up, in each of the two stages."""
    first = group["name"] in ("autoencoder", "discriminator")
    begin, length = (0, config.pretrain_epochs) if first else (config.pretrain_epochs, config.epochs)
    done = min(1., max(0., epoch - begin) / max(length, 1))
    return group["peak"] * (min(1., done / config.warmup) if config.warmup else 1.) * ((1 + math.cos(math.pi * done)) / 2 if config.decay == "cosine" else 1)


# ============================================================================= 6 evaluation
@torch.no_grad()
def evaluate(nets, split, config, device, joint=True):
    """Every model on a whole split: ({model: probabilities (N, K)}, {kind: uncertainty (N,) or (N, K)}); the method comes first. Stage 1 says nothing yet."""
    nets.eval()
    if not joint:
        return {}, {}
    rows = []
    for batch in run.progress(Batches(split, config.eval_batch_size, device, rank=run.rank(), world=run.world()), "evaluate"):
        with run.autocast(config, device):
            rows.append([model(batch.x, [split.ids[i] for i in batch.index]).cpu().double().numpy() for model in models(nets, config).values()])
    predictions = run.gather(dict(zip(models(nets, config), map(np.concatenate, zip(*rows)))))
    return predictions, uncertainties(predictions[METHOD], nets.multilabel)


def models(nets, config):
    """{name: function of images (B, channels, H, W) and their names to probabilities (B, K)}, of nets.eval(); the method first, whose temperature is undone for the other."""
    of = {METHOD: lambda x, names: nets.head(features(nets, config, nets.latents(x), names)).float()}
    of |= {"resnet": lambda x, names: nets.temperature * nets.resnet(x).float()} if nets.resnet is not None else {}
    views = lambda x: mirrored(x, config.augment * config.mirror)       # logits are averaged, not probabilities: so one temperature fits the mean
    return {name: lambda x, names, f=f: nets.answers(torch.stack([f(view, names) for view in views(x)]).mean(0)) for name, f in of.items()}


def uncertainties(p, multilabel):
    """{kind: (N,)} of probabilities (N, K), 0 sure .. 1 no idea; of several labels (N, K), each a question of its own."""
    two = np.stack([1 - p, p], -1) if multilabel else p
    first, second = np.sort(two, -1)[..., -1], np.sort(two, -1)[..., -2]
    return {"entropy": -(two * np.log(two.clip(1e-30))).sum(-1) / np.log(two.shape[-1]), "margin": 1 - (first - second)}


def calibrate(nets, split, config, device):
    """Fits the temperature by the likelihood of a validation split."""
    if config.calibrate:
        nets.temperature.fill_(1)
        p, y = evaluate(nets, split, config, device)[0][METHOD], split.labels
        if nets.multilabel:                                             # each label is a question with two answers
            y, p = y.ravel().astype(int), np.stack([1 - p, p], -1).reshape(-1, 2)
        nets.temperature.div_(metrics.sharpness(y, p))


class Changed(NamedTuple):
    """What `counterfactual` did to the N images of a split, for label k."""
    control: np.ndarray                 # (N, channels, H, W) uint8
    guided: np.ndarray                  # the same
    p: dict                             # {model: {"image", "control", "guided": (N, K)}}: probabilities before and after


@torch.no_grad()
def changed(nets, config, split, k, enforce, device, judge=None):
    """Counterfactuals of a split -> Changed, with the answers of this classifier, of the plain ResNet and of a judge(x) -> (B, K), if given."""
    asked, parts = models(nets, config) | ({"judge": lambda x, names: judge(x)} if judge else {}), []
    for batch in Batches(split, config.eval_batch_size, device):
        names = [split.ids[i] for i in batch.index]
        with run.autocast(config, device):
            guided, control = counterfactual(nets, config, batch.x, torch.full((len(names),), k, device=device), enforce, names)
            p = [of(x, names).cpu().double().numpy() for of in asked.values() for x in (batch.x, control, guided)]
        parts.append((plots.to_uint8(control), plots.to_uint8(guided), *p))
    control, guided, *p = (np.concatenate(part) for part in zip(*parts))
    return Changed(control, guided, {model: dict(zip(("image", "control", "guided"), p[3 * i:])) for i, model in enumerate(asked)})


def judged(seen, k, enforce, boxes=None):
    """Numbers of a Changed for label k, each model's: mean probability of the image, of the control, of the counterfactual; what guidance changed
    (`diff`, counterfactual - control) and, of the others, the mean of |mean change| (the authors' code) and of |change| (the paper's words); the share of
    images that now are on the side of 1/2 aimed at, and of controls; the share of the change, and of the area, in the label's boxes (N, 4), where known."""
    found = {}
    for model, p in seen.p.items():
        change = p["guided"] - p["control"]
        others = np.delete(change, k, 1) if change.shape[1] > 1 else np.zeros_like(change)
        found[model] = {name: float(of[:, k].mean()) for name, of in p.items()} | {
            "diff": float(change[:, k].mean()), "other_diff": float(np.abs(others.mean(0)).mean()), "other_abs": float(np.abs(others).mean())}
    found |= {name: float(np.mean((seen.p[METHOD][of][:, k] > .5) == enforce)) for name, of in (("flipped", "guided"), ("flipped_by_control", "control"))}
    change = np.abs(seen.guided.astype(np.float64) - seen.control).mean(1) / 255
    found["change"] = float(change.mean())
    if boxes is not None and (known := np.isfinite(boxes).all(-1)).any():
        inside = metrics.box_mask(boxes[known], change.shape[1:])
        found |= {"in_box": float(np.mean((change[known] * inside).sum((1, 2)) / change[known].sum((1, 2)).clip(1e-12))), "box_area": float(inside.mean())}
    return found


def boxes_of(split, k):
    """Boxes (N, 4) of label k, nan where none is known; None without any."""
    return None if split.boxes is None else split.boxes[:, k] if split.boxes.ndim == 3 else split.boxes


@torch.no_grad()
def measure(nets, data, config, device, figures):
    """Writes autoencoder.pt; on validation: the autoencoder's round trip and, of a joint run, what guidance does to some images with each label and to some
    without a finding (single-label: of other classes), as `judged` has it; and pictures: reconstructions, drawn images by guidance, counterfactuals."""
    if run.rank() == 0:
        run.save(figures.parent / "autoencoder.pt", nets.autoencoder.state_dict())
    val, some, counterfactuals, led, rows, names = data.val, data.val.take(drawn.some_rows(data.val, 200, config.seed)), {}, {}, [], []
    labels, findings = list(enumerate(data.classes)) * (config.variant == "joint"), [name != "No Finding" for name in data.classes]
    trip = np.concatenate([plots.to_uint8(nets.decoded(nets.latents(batch.x))) for batch in Batches(some, config.eval_batch_size, device)])
    plots.image_grid(figures / "reconstructions.png", [some.images[:8], trip[:8]], row_names=["image", "from its latent"], title="What the autoencoder keeps")
    for k, label in labels[:6]:
        for scale in (0., config.guidance / 3, config.guidance * 2 / 3, config.guidance):
            with run.autocast(config, device):
                images = draw(nets, config, torch.full((8,), k, device=device), [f"drawn-{i}" for i in range(8)], scale, device)
            led[f"{label}, s = {scale:.3g}"] = plots.to_uint8(images)
    for k, label in labels:
        has = val.labels[:, k] > 0 if nets.multilabel else val.labels == k
        for enforce, of in ((False, has), (True, ~val.labels[:, findings].any(1) if nets.multilabel and findings[k] else ~has)):
            if (of := np.flatnonzero(of)[:config.explained]).size:
                part, what = val.take(of), f"{'enforce' if enforce else 'remove'} {label}"
                seen = changed(nets, config, part, k, enforce, device)
                counterfactuals[what] = {"images": len(of)} | judged(seen, k, enforce, boxes_of(part, k))
                rows, names = [*rows, as_tiles(part.images[0], seen, 0, boxes_of(part, k))], [*names, what]
    if rows:
        plots.image_grid(figures / "guidance.png", list(led.values()), row_names=list(led), title="The same noise, led to a class by more and more guidance")
        plots.image_grid(figures / "counterfactuals.png", rows, [["image", "through noise and back", "and guided", "what guidance changed"]] * len(rows), names, title="Counterfactuals")
    return {"labelled": len(data.train.few[0]), "counterfactuals": counterfactuals,
            "autoencoder": {"psnr": metrics.psnr(some.images, trip), "ssim": metrics.ssim(some.images, trip), "perceptual": nets.perceptual.tier, "latent_scale": nets.latent_scale.item()}}


def as_tiles(image, seen, i, boxes=None):
    """Image i of a Changed as four pictures uint8 (3, 256, 256): image, control, counterfactual, and their signed difference with the label's box."""
    box = () if boxes is None or not np.isfinite(boxes[i]).all() else [boxes[i] * 256 / image.shape[-1]]
    difference = plots.signed(seen.guided[i].astype(np.float32).mean(0) - seen.control[i].astype(np.float32).mean(0))
    return [*(plots.overlay(x) for x in (image, seen.control[i], seen.guided[i])), plots.overlay(difference, boxes=box)]


# ============================================================================= 7 setup
def train(config, resume=None):
    """Trains, evaluates on the test split once and writes the run's folder; returns what metrics.json holds.

    resume: a folder with a last.pt to go on from. For arrays of your own replace this file's `load_for`. Raises run.UserError, DataError, run.WorkError, run.Interrupted.
    """
    device = run.start(config)
    out = run.choose_folder(config, METHOD, resume)
    with run.first_process_first():
        data = load_for(config)
    facts = run.facts_of(data, config)
    torch.manual_seed(config.seed)
    nets = run.place(build(config, facts), device)
    if resume is None:
        initialise(nets, data, config)
    state = run.State(METHOD, config, facts, nets, torch.optim.AdamW(parameter_groups(nets, config), fused=True))
    if resume is not None:
        state.load(out / "last.pt")
    if config.compile:
        for net in nets.children():
            net.compile()
    run.make_folder(out, config)
    run.describe(out, config, data, METHOD, nets, device)
    total, steps = config.pretrain_epochs + config.epochs, len(Batches(data.train, config.batch_size, train=True))
    finite = run.FiniteCheck(every=1 if device.type == "cpu" else 16)

    # ========================================================================= 8 training loop
    with run.defer_signals(lambda: (finite.flush(), state.save(out / "last.pt")), f"go on with --resume {out}"):
        while len(state.history) < total:
            epoch, began, waited = len(state.history), time.monotonic(), 0.
            joint = epoch >= config.pretrain_epochs
            if state.step < (epoch + 1) * steps:                        # else: stopped between training and validation
                nets.train()
                batches = Batches(data.train, config.batch_size, device, True, config.seed, [a for a in config.augment.split(",") if a],
                                  config.balanced, state.step, run.rank(), run.world())
                ready = time.monotonic()
                for batch in run.progress(batches, f"epoch {epoch + 1}/{total}", start=state.step % steps):
                    waited += time.monotonic() - ready
                    torch.manual_seed(run.seed_of(config.seed, state.step, run.rank()))     # a resumed run draws the same numbers
                    for group in state.optimizer.param_groups:
                        group["lr"] = learning_rate(config, group, state.step / steps)
                    state.optimizer.zero_grad(set_to_none=True)
                    for part in batch.split(config.grad_accum):
                        with run.autocast(config, device):
                            losses = train_step(nets, state.ema, config, part, joint)
                        (losses["loss"] * len(part.y) / len(batch.y)).backward()
                        state.add(losses, len(part.y) / len(batch.y))
                    run.average_gradients(nets.parameters())
                    norm = sum(nn.utils.clip_grad_norm_(g["params"], g["clip"] or torch.inf) for g in state.optimizer.param_groups)
                    finite(losses["loss"], norm, state.step, [data.train.ids[i] for i in batch.index])
                    state.optimizer.step()
                    # the average begins anew with the second stage: it would otherwise hold on to initial weights
                    run.update_ema(state.ema, nets, config.ema, state.step - joint * config.pretrain_epochs * steps)
                    state.step += 1
                    ready = time.monotonic()
                finite.flush()
            row = {"epoch": epoch + 1, "step": state.step, "images": (epoch + 1) * len(data.train), **state.means()}
            predictions, _ = evaluate(state.ema, data.val, config, device, joint)
            row |= run.validation(data.val, {k: p for k, p in predictions.items() if joint or k != METHOD}, METHOD)
            state.keep_best(row, config.select, out / "best.pt")
            state.close_epoch(row | {"seconds": time.monotonic() - began, "data_seconds": waited}, out, total)

    # ========================================================================= 9 end
    best = state.load_best(out / "best.pt")
    calibrate(state.ema, data.val, config, device)
    state.write_best(best, out / "best.pt")
    specific = measure(state.ema, data, config, device, out / "figures")
    predictions, uncertainty = evaluate(state.ema, data.test, config, device)
    result = run.score(data.test, predictions | shortcut(data), uncertainty[config.uncertainty], data.train.labels)
    run.write_evaluation(out, data.test, data.classes, predictions, uncertainty[config.uncertainty], state.history, PANELS)
    return run.report(state, out, result, specific, device)             # last: a run with metrics.json is finished


# ============================================================================= 10 commands
def sample_command(checkpoint, label, n=16, output="", **given):
    """Draws n images of a class, led by the classifier: a picture each, and all in one grid."""
    config, nets, facts, device = run.load_model(checkpoint, METHOD, Config, build, given)
    classes, k = facts["classes"], run.class_number(label, facts["classes"])
    if n < 1 or config.variant == "no_diffusion":
        raise run.UserError(f"-n {n}: 1 or more" if n < 1 else NOT_DRAWN)
    ids, images = [f"{classes[k]}-{i:04d}" for i in range(n)], []
    for part in run.progress([ids[i:i + config.eval_batch_size] for i in range(0, n, config.eval_batch_size)], "draw"):
        with run.autocast(config, device):
            images.append(plots.to_uint8(draw(nets, config, torch.full((len(part),), k, device=device), part, config.guidance, device)))
    out = run.result_folder(output, checkpoint, "sample", config)
    run.save_images(out, ids, np.concatenate(images), classes[k])


def explain_command(checkpoint, paths=(), limit=0, target="", remove=False, enforce=False, output="", **given):
    """A picture an image, `limit` at most (0: all of `paths`; 8 of the test split if none): the image, the same through noise and back, and guided
    away from the label `target` or to it (by default the likeliest; away from what is predicted, to what is not), and what guidance changed."""
    config, nets, facts, device = run.load_model(checkpoint, METHOD, Config, build, given)
    if remove and enforce or config.variant == "no_diffusion":
        raise run.UserError("--remove --enforce: one of the two" if remove and enforce else NOT_DRAWN)
    classes, given_k = facts["classes"], run.class_number(target, facts["classes"], "--target") if target else None
    split, problems = run.to_explain(sys.modules[__name__], config, facts, paths, limit)
    out, p = run.result_folder(output, checkpoint, "explain", config), evaluate(nets, split, config, device)[0][METHOD]
    for i, name in enumerate(run.progress(split.ids, "explain")):
        k = given_k if given_k is not None else int(p[i].argmax())
        to = enforce or not remove and p[i, k] < .5 and (nets.multilabel or k != p[i].argmax())
        part = split.take([i])
        seen = changed(nets, config, part, k, to, device)
        found, boxes = judged(seen, k, to, boxes_of(part, k)), boxes_of(part, k)
        captions = [f"image {name}", "through autoencoder and noise, without guidance", f"guided {'to' if to else 'away from'} {classes[k]}",
                    f"what guidance changed: orange lighter, blue darker, {255 * found['change']:.1f} of 255 on average"]
        lines = [f"{model}: p of {classes[k]} {of['image']:.3f}, without guidance {of['control']:.3f}, guided {of['guided']:.3f}; others moved by {of['other_abs']:.3f}"
                 for model, of in found.items() if isinstance(of, dict)]
        lines += [f"{found['in_box']:.0%} of the change is in the box, which is {found['box_area']:.0%} of the area"] if "in_box" in found else []
        plots.explanation(out / f"{i:04d}-{run.file_name(name)}.png", f"{classes[k]} {'enforced' if to else 'removed'}",
                          dict(zip(captions, as_tiles(split.images[i], seen, 0, boxes))), [], lines, 4)
    print(*problems, f"pictures: {out}   (not for clinical use)", sep="\n")


def main(argv=None):
    """The command line; returns the exit code. `train`, `eval` and `predict` are those of every method: common/run.py."""
    label = {"--label": dict(required=True, help="class to draw, by name or number"), "-n": dict(type=int, default=16, metavar="N", help="how many; default 16")}
    why = {"--limit": dict(type=int, default=0, metavar="N", help="at most so many pictures; default: all images given, or 8 of the test split"),
           "--target": dict(default="", help="the label to remove or to enforce, by name or number; default: the likeliest"),
           "--remove": dict(action="store_true", help="lead away from it"), "--enforce": dict(action="store_true", help="lead to it")}
    edit = ["remove_start", "remove_scale", "enforce_start", "enforce_scale", "edit_steps", "edit_eta", "edit_keep"]
    return run.command_line(argv, sys.modules[__name__], {
        "sample": (sample_command, ["draw_steps", "eta", "guidance", "seed", *SAMPLING], "Draw images of a class.", label),
        "explain": (explain_command, ["data", "root", "split", *edit, *SAMPLING], "Show what would have to change for another answer.", why)})


if __name__ == "__main__":
    sys.exit(main())
