"""DiffMIC: diffusion on the label vector of an image, guided by a global and a local prior.

Yang et al., "DiffMIC: Dual-Guidance Diffusion Network for Medical Image Classification", MICCAI 2023, arXiv 2303.10610.
What is noised is not the image but its one-hot label y_0 in R^C. A guide (DCG) looks at the image x twice, as a whole and
through six small regions, and gives two priors y_g, y_l: class probabilities. A denoiser, which sees the image's embedding
rho(x) and both priors, learns the noise eps in y_t. At test time y_T starts as noise around the priors' mean and is
denoised step by step; the class is the largest entry of y_0, or of its mean over several draws.

    p(y_T) = N((y_g + y_l) / 2, I)                                                             eq. 1   `sample`
    y_t = sqrt(ab_t) y_0 + sqrt(1 - ab_t) eps + (1 - sqrt(ab_t)) f,   f the priors' mean       eq. 2   `q_sample`
    y_s = g0 y_0_hat + g1 y_t + g2 f + noise for s < t  (CARD, Han et al. 2022; not in the paper)      `common/schedules.py`
    eps_hat = D(E(proj([y_t, y_g, y_l]), rho(x), t), t)                                        eq. 3   `Denoiser`
    L_eps = |eps - eps_hat|^2                                                                  eq. 4   `loss`
    L_MMD(n || m) = K(n, n') - 2 K(m, n) + K(m, m'),  n = eps, m = eps_hat from one prior      eq. 5   `common/mmd.py`
    L = L_eps + 0.5 (L_MMD^g + L_MMD^l)                                                        eq. 6   `loss`

B images, C classes, K regions (in eq. 5: the kernel), S draws, F = 6144 hidden units; t = 0..T-1 stands for the paper's 1..T; ab = alpha_bar; E, D the denoiser's halves,
y_0_hat its guess of y_0. f is the priors' mean here; the paper's f(.), a linear layer, is proj (`Denoiser.lin1.linear`); its tau_D, tau_g, tau_l are `DCG` and its two nets.

    python diffmic.py                                      # toy lesions: trains and evaluates in minutes on a CPU
    python diffmic.py --data ham10000 --root DIR           # the paper's sizes and epochs, for a CUDA GPU
    python diffmic.py --data folder --root DIR --scale small      # your own images, a folder per class
    python diffmic.py eval --checkpoint RUN/best.pt
    python diffmic.py predict --checkpoint RUN/best.pt a.jpg folder/
    python diffmic.py explain --checkpoint RUN/best.pt --tsne     # or for images of your own

Read differently from the paper, and why
 1. Eq. 2 adds the priors, eq. 1 averages them; only the mean makes y_T of eq. 2 and eq. 1 agree. --prior-mean sum | geometric.
 2. The priors are probabilities, their mean is taken after the softmax; the paper does not say.
 3. A branch with one prior puts it in both places of the input: [y_t^g, y_g, y_g]. The authors' 2C: --prior-input fused --prior-mean geometric.
 4. "UNet" E, D is an MLP without skips; the image embedding has batch norm but no Softplus, as in the authors' code.
    t enters as a learned embedding, U(0, 1) at first, times the output of each of three linear layers.
 5. 250 (HAM10000), 60 (APTOS) or 100 (PMG2000) steps are spread over the 1000 trained ones. The authors run the first 250,
    where y_t has variance 0.48 (60: 0.04), but start from variance 1: tests/test_diffmic.py shows the error with an oracle.
 6. The guide gets no gradient from the diffusion loss (the authors compute it and throw it away). --end-to-end keeps it. One
    forward in training mode serves both losses; the authors run the guide twice and take the priors in evaluation mode.
 7. Regions are cut in colour (theirs: red alone), in the middle of their cells, no place twice, by one search for the batch.
 8. L_eps is the mean over batch and classes, K an RBF of bandwidth C (the paper leaves K open), as in the authors' code. So are
    T = 1000, ResNet-50 guides (theirs from ImageNet: --pretrained), antithetic t, clipping, warm-up and cosine, of which the paper says nothing.
    Adam, not AMSGrad. The branches of eq. 5 count in the denoiser's running batch statistics, too, though the main branch alone is evaluated.
Mended: rho(x) is computed once an image, not at every step; EMA weights are the ones evaluated; selection on a validation
split, not on the test set; a constant saliency map gives K places, not one K times; metrics over the whole set, not means of batches.
Accuracy on validation (standard error .011) and NLL, toy, seed 0. picked: `plus` with --no-residual --select accuracy --no-mirror; its base: picked with --prior-dropout 0;
the others: that base with one option, which undoes a part of plus or (last column) was rejected. --no-calibrate trains as its base does: rounding alone moves it so.
  plus                       .932  .205   --roi-weight uniform       .922  .298   --prior-source ema         .932  .262
  picked                     .938  .223   --no-deep-supervision      .930  .277   --label-smoothing 0.1      .930  .257
  its base                   .940  .227   --guide-schedule constant  .928  .279   --balanced                 .914  .288
  --target eps               .932  .263   --no-calibrate             .932  .297   --roi-size 8               .918  .295
target y0: y_0_hat = softmax(D(..) + log f), --no-residual: of D(..); eps_hat of it by eq. 2; cross-entropy in place of L_eps, the MMD still of eps_hat.
Test macro F1 on RetinaMNIST, three seeds: plus .326, paper .222, guide alone (--variant dcg) .362, ResNet-18 .332. (The paper has .816 on HAM10000, 1,000 epochs at 224 px.)
"""
# ============================================================================= 2 imports
import dataclasses
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from common import metrics, plots, run  # before torch, whose threads it tells how to wait
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.mmd import mmd_rbf
from common.resnet import ResNet
from common.schedules import ddim_step, ddpm_step, level, linear_alpha_bar, respaced_timesteps
from common.tsne import tsne as plane
from data import Batches, DataError, load_for, mirrored, read_split, shortcut

METHOD = "diffmic"
TEMPERATURE = 0.2                       # of our probabilities, softmax(y_0 / 0.2), the paper has none: (1, 0, ..., 0) is 0.97 sure of one of 5 classes


# ============================================================================= 3 settings
@dataclass
class Config:
    """Every setting. Defaults: the paper's, the authors' code's where it is silent. SMALL, PLUS, BY_DATA replace some; the command line wins."""
    # --- data ---
    data: str = "toy"  # data set: toy, ham10000, retinamnist and other MedMNIST names, or folder (a folder per class)
    root: str = ""  # its folder; none: data/raw/NAME
    size: int = 224  # [28..2048] pixels a side; 32 for toy, 64 for --scale small
    split: Literal["official", "group", "paper"] = "official"  # official test set, else by patient or lesion; paper: the paper's own, which leaks
    fit: Literal["crop", "squash"] = "crop"  # make images square by a centre crop, or by squashing
    limit: int = 0  # [0..] at most so many images a split, drawn by class; 0: all
    skip_bad: bool = False  # leave out images that cannot be read, instead of stopping
    augment: str = "hflip,rotate"  # of training images: hflip, vflip, rotate (30 degrees), strong (half of them moved, covered, of other contrast), joined by commas
    balanced: bool = False  # draw every class equally often
    # --- model ---
    scale: Literal["paper", "small"] = "paper"  # the paper's sizes for a GPU, or minutes on a CPU; not given: small for toy data
    recipe: Literal["paper", "plus"] = "paper"  # as the paper says, or with this project's improvements; not given: plus at scale small
    pretrained: str = ""  # file of ImageNet weights (torchvision's keys) for the guide's backbones
    init: str = ""  # checkpoint of another run to start from (fine-tuning)
    # --- training ---
    epochs: int = 1000  # [1..] passes over the training images; caps --pretrain-epochs as well
    pretrain_epochs: int = 10  # [0..] passes before them: the guide's warm-up
    batch_size: int = 32  # [2..] images a step, over all processes
    grad_accum: int = 1  # [1..] parts a batch is computed in, to save memory (2 images each at least)
    eval_batch_size: int = 128  # [1..] images at once when no gradient is needed; changes no result
    lr: float = 1e-3  # [0..] peak learning rate of Adam
    warmup: float = 0.04  # [0..1] share of the steps over which it rises, times a cosine to 0
    clip: float = 1.0  # [0..] largest gradient norm of denoiser and control, not of the guide; 0: no clipping
    ema: float = 0.9999  # [0..1] decay of the weights' moving average, which is what is evaluated
    baseline: bool = True  # train a plain ResNet on the same batches, as a control
    select: Literal["accuracy", "balanced_accuracy", "f1_macro", "auroc", "nll", "last"] = "accuracy"  # validation metric that picks the epoch, nll the least; last: none does
    seed: int = 0  # [0..] of weights, order, noise, toy images and what --limit draws; splits do not depend on it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    amp: Literal["auto", "bf16", "off"] = "auto"  # bfloat16 arithmetic; auto: on CUDA
    compile: bool = False  # torch.compile the networks: slower start, faster steps
    # --- output ---
    output: str = ""  # the run's folder; none: the next free runs/METHOD-DATA-SCALE-RECIPE-sSEED
    # --- method ---
    variant: Literal["full", "c2", "c1", "basic", "dcg"] = "full"  # Table 2: no MMD (c2), nor guide (c1), nor diffusion (basic); dcg: guide alone
    width: int = 64  # [8..] channels in the first stage of every ResNet
    guide_depth: Literal[18, 50] = 50  # layers of the guide's two ResNets
    hidden: int = 6144  # [1..] F, units of the denoiser
    rois: int = 6  # [1..] K, regions an image for the local prior
    roi_size: int = 0  # [0..] their side in pixels; 0: size / 7
    roi_weight: Literal["uniform", "probability"] = "uniform"  # classes' maps, each scaled to 0..1, are added as they are, or weighted by y_g
    guide_lr: float = 2e-4  # [0..] learning rate of the guide
    guide_schedule: Literal["constant", "cosine"] = "constant"  # of the guide's learning rate
    deep_supervision: bool = False  # cross-entropy on each prior as well as on their fusion
    end_to_end: bool = False  # let the diffusion loss train the guide
    label_smoothing: float = 0.  # [0..1] of the guide's labels
    prior_source: Literal["guide", "ema"] = "guide"  # whose priors the denoiser trains on; ema: the averaged guide's, and --end-to-end has no effect
    prior_dropout: float = 0.  # [0..1] share of training images whose priors are replaced by 1 / C
    target: Literal["eps", "y0"] = "eps"  # what the denoiser's last layer stands for
    residual: bool = False  # with target y0 its logits are added to those of the guide's answer, log f
    mmd_weight: float = 0.5  # [0..] lambda of eq. 6
    timesteps: int = 1000  # [25..] T, noise levels in training; for another T the betas are scaled by 1000 / T
    antithetic: bool = True  # draw t in pairs t, T-1-t
    prior_mean: Literal["mean", "sum", "geometric"] = "mean"  # f of eq. 2
    prior_input: Literal["both", "fused"] = "both"  # the denoiser's input: [y_t, y_g, y_l], or [y_t, f]
    steps: int = 250  # [1..] of the reverse process, spread over T
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # ancestral, or deterministic given y_T
    samples: int = 1  # [1..] S, draws averaged for a prediction
    mirror: bool = False  # the draws look in turn at the image and its mirror images, those of --augment; guide and ResNet at as many
    calibrate: bool = False  # fit the softmax's temperature on validation, for the run's own steps, samples and sampler
    uncertainty: Literal["entropy", "margin", "spread"] = "entropy"  # what predictions are ranked by; spread: of several samples
    stem = property(lambda self: "small" if self.size < 100 else "imagenet")    # of every ResNet


SMALL = dict(size=64, epochs=12, pretrain_epochs=2, batch_size=32, ema=0.99, width=8, guide_depth=18, hidden=256, steps=20,
             guide_lr=2e-3, lr=2e-3, warmup=0.1)
PLUS = dict(target="y0", residual=True, samples=20, calibrate=True, guide_schedule="cosine", deep_supervision=True, roi_weight="probability", prior_dropout=.3, select="nll", mirror=True)
SAMPLING = ["device", "eval_batch_size", "amp", "samples", "steps", "sampler", "uncertainty", "skip_bad", "output"]   # what a checkpoint's user may set
BY_DATA = {"toy": dict(size=32, augment="hflip,vflip,rotate"), "aptos2019": dict(steps=60, augment="hflip,vflip,rotate"), "pmg2000": dict(steps=100)}
PANELS = [("Losses", "loss", ["diffusion", "guide", "resnet"]), ("Regularisers", "MMD", ["mmd_g", "mmd_l"]),
          ("Validation; guide_accuracy: in training", "accuracy", ["val_accuracy", "val_guide_accuracy", "val_resnet_accuracy", "guide_accuracy"])]


def configure(**given):
    """The Config of a scale, recipe and data set; what is `given` wins. `train(configure(data="toy", seed=1))`. c1 has no guide to warm up."""
    return run.configure(Config, (dict(pretrain_epochs=0) if given.get("variant") == "c1" else {}) | given, SMALL, PLUS, BY_DATA)


# ============================================================================= 4 the method
def q_sample(y0, f, eps, a, b):
    """Eq. 2: labels y0, prior mean f and noise eps (B, C), a = sqrt(ab_t) and b = sqrt(1 - ab_t) (B, 1) -> y_t (B, C)."""
    return a * y0 + b * eps + (1 - a) * f


def prior_mean(y_g, y_l, mode="mean"):
    """f of eq. 2 from probabilities (B, C), and the mean of p(y_T); only mode "mean" is that of eq. 1."""
    if mode == "sum":                                                   # eq. 2 to the letter: its entries sum to 2
        return y_g + y_l
    if mode == "geometric":                                             # softmax of the mean of the logits: the authors' code
        return ((y_g.clamp_min(1e-30).log() + y_l.clamp_min(1e-30).log()) / 2).softmax(1)
    return (y_g + y_l) / 2


def draw_timesteps(B, T, antithetic, device):
    """t uniform on 0..T-1, (B,); antithetic: in pairs t, T-1-t (of an even B two stay alone), which evens out the levels within a batch."""
    t = torch.randint(T, (B // 2 + 1 if antithetic else B,), device=device)
    return torch.cat([t, T - 1 - t])[:B]


def estimate(denoiser, config, y, condition, t, a, b):
    """eps_hat of eq. 3 at y_t (B, C), and y_0_hat; either gives the other by eq. 2. condition: y_g, y_l, f (B, C) and rho(x) (B, F)."""
    out, f = denoiser(y, *condition, t).float(), condition[2]
    if config.target == "eps":
        return out, (y - b * out - (1 - a) * f) / a
    y0 = (out + f.clamp_min(1e-6).log() if config.residual else out).softmax(1)         # the last layer's C numbers are logits
    return (y - a * y0 - (1 - a) * f) / b, y0


def loss(nets, config, x, y0, y_g, y_l):
    """Eqs. 4-6 for images x, one-hot labels y0 and priors y_g, y_l (B, C) -> dict of scalars, and eps by tenths of t."""
    t, eps = draw_timesteps(len(y0), config.timesteps, config.antithetic, x.device), torch.randn_like(y0)
    a, b = nets.sqrt_ab[t, None], nets.sqrt_1m_ab[t, None]
    rho = nets.encoder(x)                                               # once, for the three branches

    def branch(y_g, y_l, f):
        return estimate(nets.denoiser, config, q_sample(y0, f, eps, a, b), (y_g, y_l, f, rho), t, a, b)

    eps_hat, y0_hat = branch(y_g, y_l, prior_mean(y_g, y_l, config.prior_mean))
    error = (eps_hat - eps) ** 2
    losses = {"eps": error.mean()}                                      # eq. 4; over C, too: beside a sum lambda would weigh C times less
    if config.target == "y0":                                           # cross-entropy takes its place
        losses["y0"] = -(y0 * y0_hat.clamp_min(1e-30).log()).sum(1).mean()
    if config.mmd_weight and config.variant == "full":
        n = run.all_rows(eps)
        for name, y in (("mmd_g", y_g), ("mmd_l", y_l)):                # eq. 5: one prior in both places
            losses[name] = mmd_rbf(n, run.all_rows(branch(y, y, y)[0]), bandwidth=y0.shape[1])
    losses["diffusion"] = losses[config.target] + config.mmd_weight * (losses.get("mmd_g", 0) + losses.get("mmd_l", 0))     # eq. 6
    tenth = F.one_hot(t * 10 // config.timesteps, 10).float()
    losses["eps_by_t"] = torch.stack([(tenth * error.detach().mean(1, keepdim=True)).sum(0), tenth.sum(0)])
    return losses


def guide_loss(config, guide, y):
    """Cross-entropy, a scalar, of the Guide's fused prior and labels y (B,); with deep supervision of each prior as well."""
    logits = [(guide.logits_g + guide.logits_l) / 2] + [guide.logits_g, guide.logits_l] * config.deep_supervision
    return sum(F.cross_entropy(z, y, label_smoothing=config.label_smoothing) for z in logits)


def train_step(nets, ema, config, batch, joint):
    """One batch -> dict of losses; "loss" is what is differentiated. joint=False: the guide's warm-up."""
    x, y, C, losses = batch.x, batch.y, nets.classes, {}
    if nets.resnet is not None:                                         # the control: shares images, not weights
        losses["resnet"] = F.cross_entropy(nets.resnet(x), y)
    y_g, y_l = torch.zeros(2, len(x), C, device=x.device)               # c1 has no guide: with priors of 0 eq. 2 is plain DDPM (--prior-mean geometric: 1 / C)
    if nets.guide is not None:
        guide = nets.guide(x)
        losses |= {"guide": guide_loss(config, guide, y), "guide_accuracy": (guide.fused().argmax(1) == y).float().mean()}
        with torch.set_grad_enabled(config.end_to_end):
            source = ema.guide(x) if config.prior_source == "ema" else guide
            drop = torch.rand(len(x), 1, device=x.device) < config.prior_dropout
            y_g, y_l = (torch.where(drop, 1 / C, prior) for prior in source.priors())
    if nets.denoiser is not None and (joint or nets.guide is None):     # without a guide there is nothing to warm up
        losses |= loss(nets, config, x, F.one_hot(y, C).float(), y_g, y_l)
    losses["loss"] = sum(losses[k] for k in ("resnet", "guide", "diffusion") if k in losses)
    return losses


def sample(denoiser, config, condition, noise, timesteps):
    """The reverse process over n falling levels: condition (as `estimate`), noise (B, n, C) -> the path (B, n + 1, C), y_T first, y_0 last.
    Each step predicts y_0 and eps, then draws y_s, s the next level, from the posterior. No clipping."""
    alpha_bar, f = linear_alpha_bar(config.timesteps), condition[2]
    path, levels = [f + noise[:, 0]], [*map(int, timesteps), -1]        # eq. 1
    for i, (t, s) in enumerate(zip(levels, levels[1:])):
        ab_t, ab_s, y = level(alpha_bar, t), level(alpha_bar, s), path[-1]
        eps, y0 = estimate(denoiser, config, y, condition, torch.full((len(y),), t, device=y.device), ab_t ** .5, (1 - ab_t) ** .5)
        path.append(ddim_step(eps, y0, ab_s, f) if config.sampler == "ddim" else
                    ddpm_step(y, y0, noise[:, i + 1] if s >= 0 else 0., ab_t, ab_s, f))
    return torch.stack(path, 1)


class Prediction(NamedTuple):
    p: torch.Tensor                     # (B, C) probabilities out of the mean of the draws and a temperature
    entropy: torch.Tensor               # (B,) of p, over log C: 0 sure .. 1 no idea
    margin: torch.Tensor                # (B,) 1 - (largest p - second)
    spread: torch.Tensor                # (B,) share of the draws that vote for another class than p does
    guides: tuple                       # what the guide saw in the image and in its mirror images: Guide or None
    condition: tuple                    # of the denoiser: y_g, y_l, f, rho(x)
    path: torch.Tensor                  # (B, S, steps + 1, C) from y_T to y_0


def told(nets, config, x):
    """What the guide sees in images x (B, channels, H, W), and what the denoiser is told of them: y_g, y_l, f (B, C), rho(x) (B, F)."""
    guide = nets.guide and nets.guide(x)
    y_g, y_l = guide.priors() if guide else x.new_zeros(2, len(x), nets.classes)
    return guide, (y_g, y_l, prior_mean(y_g, y_l, config.prior_mean), nets.encoder(x)) if nets.denoiser is not None else ()


def classify(nets, config, x, noise):
    """Images x (B, channels, H, W) and noise (B, S, --steps, C) -> Prediction, of nets.eval() under no_grad. Guide and encoder run once an image, or mirror image."""
    B, S, _, C = noise.shape
    views = mirrored(x, config.augment * config.mirror)[:S]
    guides, conditions = zip(*(told(nets, config, view) for view in views))
    if nets.denoiser is not None:
        of_draws = [torch.stack([c[s % len(views)] for s in range(S)], 1).flatten(0, 1) for c in zip(*conditions)]
        path = sample(nets.denoiser, config, of_draws, noise.flatten(0, 1), respaced_timesteps(config.timesteps, config.steps)).unflatten(0, (B, S))
        y0 = path[:, :, -1].mean(1)
        logits = y0.clamp_min(1e-30).log() if config.target == "y0" else y0 / TEMPERATURE
        p = (logits / nets.temperature).softmax(1)
    else:
        p = torch.stack([g.fused() for g in guides] if config.variant == "dcg" else [nets.resnet(view).float().softmax(1) for view in views]).mean(0)
        path = p[:, None, None]
    top = p.topk(2, 1).values
    entropy = -(p * p.clamp_min(1e-30).log()).sum(1) / np.log(C)
    spread = (path[:, :, -1].argmax(2) != p.argmax(1, keepdim=True)).float().mean(1)
    return Prediction(p, entropy, 1 - (top[:, 0] - top[:, 1]), spread, guides, conditions[0], path)


# ============================================================================= 5 networks
class Guide(NamedTuple):
    """What the guide sees in B images."""
    logits_g: torch.Tensor              # (B, C) of the whole image
    logits_l: torch.Tensor              # (B, C) of the regions
    saliency: torch.Tensor              # (B, C, h, w) class saliency maps
    corners: torch.Tensor               # (B, K, 2) upper left ones of the regions, in pixels: row, column
    attention: torch.Tensor             # (B, K) weights of the regions, summing to 1

    def priors(self):
        """y_g and y_l (B, C): probabilities."""
        return self.logits_g.float().softmax(1), self.logits_l.float().softmax(1)

    def fused(self):
        """The guide's own probabilities (B, C): softmax of the mean of both logits."""
        return ((self.logits_g + self.logits_l).float() / 2).softmax(1)


class DCG(nn.Module):
    """Dual-granularity conditional guidance (section 2.1, after GMIC): the priors of an image. Another backbone needs `features` and `dim`, as common/resnet.py."""

    def __init__(self, config, channels, classes):
        super().__init__()
        make = lambda: ResNet(config.guide_depth, channels, 0, config.width, config.stem, bool(config.pretrained))
        self.global_net, self.local_net = make(), make()
        dim = self.global_net.dim
        self.to_saliency = nn.Conv2d(dim, classes, 1, bias=False)
        self.attention_v = nn.Linear(dim, 128, bias=False)              # gated attention (Ilse et al. 2018, eq. 9)
        self.attention_u = nn.Linear(dim, 128, bias=False)
        self.attention_w = nn.Linear(128, 1, bias=False)
        self.to_local = nn.Linear(dim, classes, bias=False)
        self.rois, self.roi_size, self.roi_weight = config.rois, config.roi_size or round(config.size / 7), config.roi_weight

    def forward(self, x):
        saliency = self.to_saliency(self.global_net.features(x)).float()
        weight = saliency.detach().mean((2, 3)).softmax(1) if self.roi_weight == "probability" else None
        corners = find_rois(saliency.detach(), x.shape[2:], self.roi_size, self.rois, weight)
        crops = crop(x, corners, self.roi_size)                         # (B, K, channels, s, s)
        h = self.local_net.features(crops.flatten(0, 1)).mean((2, 3)).unflatten(0, crops.shape[:2])
        attention = self.attention_w(self.attention_v(h).tanh() * self.attention_u(h).sigmoid()).softmax(1)             # (B, K, 1)
        logits_l = self.to_local((attention * h).sum(1))
        return Guide(saliency.mean((2, 3)), logits_l, saliency, corners, attention[..., 0])          # 2.1: y_g of the map's mean, y_l


def find_rois(saliency, image_size, size, count, weight=None):
    """Upper left corners (B, K, 2) in pixels of the K most salient windows of `size` pixels, greedily, no two with a cell in common.

    Maps (B, C, h, w) are min-max normalised by class and summed, with weights (B, C) if given; a window covers round(size h / H)
    cells and is scored by its mean. K = min(count, windows). At 224 pixels, 32-pixel windows and a 7 x 7 map these are the 6 largest
    cells. No gradient, no device synchronisation. Once no free window is left, overlapping ones are taken, never one twice.
    """
    (B, _, h, w), (H, W) = saliency.shape, image_size
    low, high = saliency.amin((2, 3), keepdim=True), saliency.amax((2, 3), keepdim=True)
    heat = (saliency - low) / (high - low).clamp_min(1e-12)             # a constant map: 0, not NaN
    heat = (heat if weight is None else heat * weight[..., None, None]).sum(1, keepdim=True)
    kh, kw = min(h, max(1, round(size * h / H))), min(w, max(1, round(size * w / W)))
    score = F.avg_pool2d(heat, (kh, kw), 1)[:, 0]                       # (B, rows, columns) of windows
    rows, columns = score.shape[1:]
    r, c = torch.meshgrid(torch.arange(rows, device=heat.device), torch.arange(columns, device=heat.device), indexing="ij")
    corners = []
    for _ in range(min(count, rows * columns)):
        best = score.flatten(1).argmax(1).view(B, 1, 1)
        row, column = best // columns, best % columns
        overlap = ((r - row).abs() < kh) & ((c - column).abs() < kw)
        score = score.masked_fill((r == row) & (c == column), -torch.inf) - 1e4 * overlap       # a free one, <= C, comes before these
        y = (row + (kh - size * h / H) / 2) * H / h                     # cells -> pixels, the box in the window's middle
        x = (column + (kw - size * w / W) / 2) * W / w
        corners.append(torch.cat([y.round().clamp(0, H - size), x.round().clamp(0, W - size)], 1)[..., 0].long())
    return torch.stack(corners, 1)


def crop(x, corners, size):
    """Windows (B, K, channels, size, size) of images x (B, channels, H, W), all at once."""
    reach = torch.arange(size, device=x.device)
    rows, columns = corners[..., 0, None] + reach, corners[..., 1, None] + reach        # (B, K, size)
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    return x.permute(0, 2, 3, 1)[image, rows[..., None], columns[..., None, :]].permute(0, 1, 4, 2, 3).contiguous()


class ImageEncoder(nn.Module):
    """rho(x): ResNet-18 -> Linear -> BatchNorm, (B, channels, H, W) -> (B, F)."""

    def __init__(self, config, channels):
        super().__init__()
        self.net = ResNet(18, channels, 0, config.width, config.stem)
        self.project = nn.Linear(self.net.dim, config.hidden)
        self.norm = nn.BatchNorm1d(config.hidden)

    def forward(self, x):
        return self.norm(self.project(self.net.features(x).mean((2, 3))))


class TimedLinear(nn.Module):
    """Linear, times a learned embedding of t."""

    def __init__(self, n_in, config):
        super().__init__()
        self.linear, self.embed = nn.Linear(n_in, config.hidden), nn.Embedding(config.timesteps, config.hidden)
        nn.init.uniform_(self.embed.weight)

    def forward(self, x, t):
        return self.linear(x) * self.embed(t)


class Denoiser(nn.Module):
    """Eq. 3: eps_hat, or the logits of y_0 (`estimate`), (B, C) from y_t, the priors, rho(x) (B, F) and t (B,)."""

    def __init__(self, config, classes):
        super().__init__()
        n_in = classes * (3 if config.prior_input == "both" else 2)
        self.fused = config.prior_input == "fused"
        self.lin1, self.lin2, self.lin3 = (TimedLinear(n, config) for n in (n_in, config.hidden, config.hidden))
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm1d(config.hidden) for _ in range(3))
        self.out = nn.Linear(config.hidden, classes)

    def features(self, y, y_g, y_l, f, rho, t):
        """The last hidden layer (B, F): the denoised embedding."""
        h = torch.cat([y, f] if self.fused else [y, y_g, y_l], 1)
        h = F.softplus(self.norm1(self.lin1(h, t))) * rho               # E of eq. 3: proj and t, then Hadamard with rho(x)
        h = F.softplus(self.norm2(self.lin2(h, t)))                     # D of eq. 3
        return F.softplus(self.norm3(self.lin3(h, t)))

    def forward(self, *inputs):
        return self.out(self.features(*inputs))


class Networks(nn.Module):
    """All that is trained; what a variant does without is None."""

    def __init__(self, config, channels, classes):
        super().__init__()
        self.classes, variant, diffusion = classes, config.variant, config.variant in ("full", "c2", "c1")
        self.resnet = ResNet(18, channels, classes, config.width, config.stem) if config.baseline or variant == "basic" else None
        self.guide = DCG(config, channels, classes) if variant in ("full", "c2", "dcg") else None
        self.encoder = ImageEncoder(config, channels) if diffusion else None
        self.denoiser = Denoiser(config, classes) if diffusion else None
        self.register_buffer("temperature", torch.ones(()))
        ab = linear_alpha_bar(config.timesteps)                         # float64: 1 - ab would lose four digits in float32
        self.register_buffer("sqrt_ab", ab.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_1m_ab", (1 - ab).sqrt().float(), persistent=False)


def build(config, facts):
    """The networks for a data set's facts (channels, classes, multilabel; run.load_model), in training mode. Refuses what the method cannot take."""
    if facts["multilabel"]:
        raise run.UserError(f"--data {config.data}: has several labels an image, {METHOD} takes one; name a single-label data set")
    if config.steps > config.timesteps:
        raise run.UserError(f"--steps {config.steps}: no more than the {config.timesteps} of --timesteps")
    if config.roi_size > config.size:
        raise run.UserError(f"--roi-size {config.roi_size}: larger than the image, --size {config.size}")
    if config.uncertainty == "spread" and (config.samples == 1 or config.variant in ("basic", "dcg")):
        raise run.UserError("--uncertainty spread: needs several draws of a diffusion; add --samples 20, or take entropy")
    return Networks(config, facts["channels"], len(facts["classes"]))


def initialise(nets, data, config):
    """Loads ImageNet backbones into the guide and the weights of another run, where asked for."""
    if config.pretrained and nets.guide is not None:
        run.load_pretrained(nets.guide.global_net, config.pretrained)
        run.load_pretrained(nets.guide.local_net, config.pretrained)
    if config.init:
        run.load_init(nets, config.init, METHOD, target=config.target)


def parameter_groups(nets, config):
    """AdamW's groups: name, parameters, peak learning rate, largest gradient norm (0: none). Without weight decay it is Adam."""
    groups = {"resnet": ([nets.resnet], config.lr, config.clip), "guide": ([nets.guide], config.guide_lr, 0.),
              "diffusion": ([nets.encoder, nets.denoiser], config.lr, config.clip)}
    return [dict(name=name, params=[p for net in modules for p in net.parameters()], lr=lr, peak=lr, clip=clip, weight_decay=0.)
            for name, (modules, lr, clip) in groups.items() if modules[0] is not None]


def learning_rate(config, group, epoch):
    """Of a group at a (fractional) epoch: linear warm-up, from a little above 0, times a cosine to 0; the guide's is constant unless --guide-schedule cosine."""
    begin = config.pretrain_epochs if group["name"] == "diffusion" and config.variant != "c1" else 0
    done = max(0., epoch - begin) / (config.pretrain_epochs + config.epochs - begin)
    if group["name"] == "guide" and config.guide_schedule == "constant":
        return group["peak"]
    return group["peak"] * min(1., (done + 1e-3) / max(config.warmup, 1e-9)) * (1 + math.cos(math.pi * done)) / 2


# ============================================================================= 6 evaluation
@torch.no_grad()
def evaluate(nets, split, config, device, joint=True):
    """Every model on a whole split: ({model: probabilities (N, C)}, {kind: uncertainty (N,)}); the method comes first. --mirror is for all of them.
    joint=False, during the guide's warm-up, leaves the diffusion out. The noise of an image goes by (seed, id), --samples and --steps, not by its batch."""
    nets.eval()
    rows = defaultdict(list)
    for batch in run.progress(Batches(split, config.eval_batch_size, device, rank=run.rank(), world=run.world()), "evaluate"):
        views = mirrored(batch.x, config.augment * config.mirror)[:config.samples]
        noise = run.image_noise(config.seed, [split.ids[i] for i in batch.index], (config.samples, config.steps, nets.classes), device)
        with run.autocast(config, device):
            out = classify(nets, config, batch.x, noise) if joint else None
            if joint:
                rows[METHOD].append(out.p)
                for kind in ("entropy", "margin", "spread"):
                    rows[kind].append(getattr(out, kind))
            if nets.guide is not None:
                rows["guide"].append(torch.stack([guide.fused() for guide in (out.guides if joint else map(nets.guide, views))]).mean(0))
            if nets.resnet is not None:
                rows["resnet"].append(torch.stack([nets.resnet(view).float().softmax(1) for view in views]).mean(0))
    rows = run.gather({k: torch.cat(v).cpu().numpy().astype(np.float64) for k, v in rows.items()})
    return rows, {k: rows.pop(k) for k in ("entropy", "margin", "spread") if k in rows}


def calibrate(nets, split, config, device):
    """Fits the temperature that turns the mean draw into probabilities, by the likelihood of a validation split."""
    if config.calibrate and nets.denoiser is not None:
        nets.temperature.fill_(1)
        nets.temperature.div_(metrics.sharpness(split.labels, evaluate(nets, split, config, device)[0][METHOD]))


def measure(nets, data, config, device, figures):
    """On validation, against reverse steps and draws (one draw: one view): accuracy; ECE and NLL at the temperature of the full setting. Draws no `figures`."""
    table = []
    if nets.denoiser is None:
        return {}
    for steps, samples in sorted({(1, 1), (5, 1), (config.steps, 1), (config.steps, config.samples)}):
        setting = dataclasses.replace(config, steps=min(steps, config.timesteps), samples=samples)
        m = metrics.summary(data.val.labels, evaluate(nets, data.val, setting, device)[0][METHOD])
        table.append({"steps": setting.steps, "samples": samples, "accuracy": m["accuracy"], "ece": m["ece"], "nll": m["nll"]})
    return {"validation_by_steps_and_samples": table}


def embedding(nets, config, out, i):
    """For Fig. 2: the denoiser's last hidden layer (B, F), our choice, at reverse step i of each image's first draw."""
    t = respaced_timesteps(config.timesteps, config.steps)[i].to(out.path.device)
    return nets.denoiser.features(out.path[:, 0, i], *out.condition, t.expand(len(out.path)))


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
@torch.no_grad()
def explain_command(checkpoint, paths=(), limit=0, tsne=False, output="", **given):
    """A panel an image, `limit` at most (0: all of `paths`; 8 of the test split if none): regions, label's path; tsne: Fig. 2 of up to 300."""
    config, nets, facts, device = run.load_model(checkpoint, METHOD, Config, build, given)
    if nets.guide is None or nets.denoiser is None:
        raise run.UserError(f"{checkpoint}: --variant {config.variant} lacks a guide or the diffusion; take a run of full or c2")
    limit = limit or (sys.maxsize if paths else 8)
    split, problems = read_split(paths, config, facts) if paths else (load_for(dataclasses.replace(config, limit=max(limit, 300 * tsne)), facts).test, [])
    if limit < 0 or tsne and len(split) < 4:
        raise run.UserError(f"--limit {limit}: 0 or more" if limit < 0 else f"--tsne: {len(split)} images are too few, 4 are needed")
    split = split.take(np.arange(len(split))[:max(limit, 300 * tsne)])
    seeds = run.names_of(split.ids, config) if paths else split.ids     # as `predict` and `eval`
    out, classes, tiles, predicted, hidden = run.result_folder(output, checkpoint, "explain", config), facts["classes"], [], [], []
    truth = [f" (true: {classes[k]})" if k >= 0 else "" for k in split.labels]
    steps = sorted({round(i) for i in np.linspace(0, config.steps - 1, 7)})
    for batch in run.progress(Batches(split, config.eval_batch_size, device), "explain"):
        noise = run.image_noise(config.seed, [seeds[i] for i in batch.index], (config.samples, config.steps, len(classes)), device)
        with run.autocast(config, device):
            found = classify(nets, config, batch.x, noise)
            hidden.append([embedding(nets, config, found, i).float().cpu().numpy() for i in steps if tsne and batch.index[0] < 300])
        for row, *one in zip(batch.index, *(a.float().cpu().numpy() for a in (found.p, found.entropy, found.path, *found.condition[:2], *found.guides[0][2:]))):
            if row < limit:
                tiles.append(draw_explanation(out, split, row, classes, truth, nets.guide.roi_size, *one))
            predicted.append(int(one[0].argmax()))
    plots.image_grid(out / "overview.png", tiles, [f"{Path(split.ids[i]).name}\n{classes[predicted[i]]}{truth[i]}" for i in range(len(tiles))], scale=1)
    if tsne:
        levels = respaced_timesteps(config.timesteps, config.steps)[steps] + 1
        labels = np.where(split.labels < 0, predicted, split.labels)[:300]
        plots.scatter(out / "tsne.png", {f"t = {t}": plane(np.concatenate(h)[:300]) for t, h in zip(levels.tolist(), zip(*filter(None, hidden)))}, labels, classes,
                      "t-SNE of the denoised embedding", "colour: true class" if split.labels[0] >= 0 else "colour: predicted class")
    print(*problems, f"panels and overview.png: {out}   (not for clinical use)", sep="\n")


def draw_explanation(out, split, row, classes, truth, side, p, entropy, path, y_g, y_l, saliency, corners, attention):
    """One panel; returns the picture with regions and saliency, for the overview."""
    image, best, name = split.images[row], p.argmax(), Path(split.ids[row]).name
    boxes = np.concatenate([corners[:, ::-1], corners[:, ::-1] + side], 1)
    tiles = {name: plots.overlay(image), f"saliency of {classes[best]}, from its least to its most": plots.overlay(image, saliency[best]),
             "regions, by the maps of all classes, and their attention": plots.overlay(image, None, boxes, [f"{a:.2f}" for a in attention])}
    shown, done = np.argsort(-p)[:5], np.arange(path.shape[1])
    series = {classes[k]: (done, path[:, :, k].mean(0), *(np.quantile(path[:, :, k], (.1, .9), 0) if k in shown[:2] and len(path) > 1 else ())) for k in shown}
    plots.explanation(out / f"{row:04d}-{run.file_name(Path(name).stem)}.png", f"{classes[best]}{truth[row]}", tiles,
                      [(series, f"y_t, mean of the draws ({len(path)}); band: 10 to 90 % of them", "reverse steps done: from t = T to 0", "entry of y_t")],
                      [f"{name}: " + ", ".join(f"{classes[k]} {q[k]:.3f}" for k in shown) for name, q in
                       ((f"entropy {entropy:.3f}, probability", p), ("global prior y_g", y_g), ("local prior y_l", y_l))])
    return plots.overlay(image, saliency[best], boxes, side=160)


def main(argv=None):
    """The command line; returns the exit code. `train`, `eval` and `predict` are those of every method: common/run.py."""
    more = {"--limit": dict(type=int, default=0, metavar="N", help="at most so many panels; default: all images given, or 8 of the test split"),
            "--tsne": dict(action="store_true", help="also the t-SNE of the denoised embedding at seven steps")}
    return run.command_line(argv, sys.modules[__name__], {
        "explain": (explain_command, {"data", "root", "split", *SAMPLING} - {"uncertainty"}, "Show why: saliency, regions, the label's path.", more)})


if __name__ == "__main__":
    sys.exit(main())
