"""MedSymmFlow: one flow from an image to its label map, and back from a label map to an image.

Caetano et al., "MedSymmFlow: Bridging Generative Modeling and Classification in Medical Imaging through Symmetrical Flow
Matching", DGM4MICCAI 2025, arXiv 2507.19098; after SymmFlow, Caetano et al., AAAI 2026, arXiv 2506.10634. The label becomes a
picture of one colour. Image x and label map y are noised at opposite ends of one path, and one U-Net learns the velocity of
both. Followed from t = 1 to 0 it turns the image into its label map: the class; from t = 0 to 1 a label map into an image.

    x_t = (1 - (1 - s) t) xi_x + t x          v_x = x - (1 - s) xi_x        xi_x, xi_y ~ N(0, I)       `path`
    y_t = (1 - (1 - s) t) y + t xi_y          v_y = xi_y - (1 - s) y        one t ~ U(0, 1) an image
    L = w |v_x_hat - v_x|^2 + (1 - w) |v_y_hat - v_y|^2,  means over all entries; w = 0.7, plus: 0.3    `loss`
    dz/dt = v(z_t, t),  z = (x, y): Euler or Heun, t: 1 -> 0 classifies, t: 0 -> 1 draws               `flow`
    d_k = mean over pixels |y_0(p) - c_k|;  the class is the nearest colour, d its uncertainty         `distances`
B images, K classes, D channels of c_k, the colour of class k, S draws of noise; s: --sigma-min. One step of an exact flow ends at sum_k p(k | x) c_k.

    python symmflow.py                                      # toy lesions: trains and evaluates in minutes on a CPU
    python symmflow.py --data retinamnist --root DIR --scale small
    python symmflow.py predict --checkpoint RUN/best.pt a.jpg folder/
    python symmflow.py sample --checkpoint RUN/best.pt --label 3 -n 64
    python symmflow.py explain --checkpoint RUN/best.pt           # of test images, or of those named behind it

Read differently from the paper, and why (its text could not be had: "paper" is its project page, its tables and its authors' documentation)
 1. s = 0; the authors' code leaves s = 1e-4 of the label in y_1. w = 0.7 and one-cycle AdamW from and to 1e-6 are its documented command's
    (the paper has no w); its EMA of 0.7 averages three steps, here it is 0.999 with a warm-up.
 2. Dequantisation noise is, as in the code, beta grey levels wide for the palette and half the distance of two classes for grey; the
    paper's is 2 beta. Drawing starts at the clean colour, and so do encoded label maps (--latent rgb).
 3. Classifying takes one step, as in their last documentation (25 before; of their tables unknown), drawing 25. With more, y_0 is one colour, not a mixture, and tells of no doubt.
 4. Probabilities, which the paper has not: of the palette and grey softmax(-d / 0.2), of equidistant codes the weights of the colours in
    y_0, of --decision mode shares of pixels. For all codes but the palette d is the mean pixel's distance: noise does not add to it.
    AUROC is that of the probabilities, as MedMNIST's evaluator has it; the paper's, of d, is auroc_distance in metrics.json (validation).
 5. 28 pixels are padded to 32, not resized; validation, not the test split, selects. No flips where up or left means something.
 6. Latents: the encoder's mean, at unit spread (--latent-scale 0.18215: the authors'), computed once. --latent grid needs no decoder to classify.
`--recipe plus`, which --scale small and so the toy set takes unless told otherwise; what each field of PLUS is worth: tests/results (label_noise, pooled, guidance: not measured):
    p = softmax of what the U-Net's encoder says;  v_y = (y_t - sum_k p_k c_k) / t;  L_y = -log p_label          `outputs`, `velocity`, `loss`
as in variational flow matching (Eijkelboom et al. 2024); to classify in one step, its decoder is not needed. Equidistant codes: in a palette of 5 half of colour 1 and half
of 3 is colour 2. t times 1000 before its embedding; every image once more at t = 1, for the label alone; one noise for all pixels of a label map: noise of each pixel's own
averages out over a thousand pixels, and y_t gives the label away at every t < 1. precondition: the U-Net need not copy, and at t = 1 sees no noise of the label: one draw
will do, a second looks at the mirror image. pooled: group norms take away most of what all pixels share. guidance: drawing keeps to its class (`guided`).
Test AUROC on RetinaMNIST, three seeds of four minutes: plus .732, paper .643, ResNet-18 .733. (The paper has .731, of 1,000 epochs.)
"""
# ============================================================================= 2 imports
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from common import drawn, metrics, plots, run  # before torch, whose threads it tells how to wait
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.autoencoder import Codec
from common.resnet import ResNet
from common.unet import UNet
from data import Batches, DataError, load_for, mirrored, read_split, shortcut

METHOD = "symmflow"


# ============================================================================= 3 settings
@dataclass
class Config:
    """Every setting. Defaults: the paper's or its code's, but for the list above. SMALL, PLUS, BY_DATA replace some; the command line wins."""
    # --- data ---
    data: str = "toy"  # data set: toy, ham10000, retinamnist and other MedMNIST names, or folder (a folder per class)
    root: str = ""  # its folder; none: data/raw/NAME
    size: int = 32  # [8..2048] pixels a side, the paper's at every scale, even at each level of the U-Net but the last; of MedMNIST 28 are padded to 32
    split: Literal["official", "group", "paper"] = "official"  # official test set, else by patient or lesion; paper: the paper's own, which leaks
    fit: Literal["crop", "squash"] = "crop"  # make images square by a centre crop, or by squashing
    limit: int = 0  # [0..] at most so many images a split, drawn by class; 0: all
    skip_bad: bool = False  # leave out images that cannot be read, instead of stopping
    augment: str = "hflip,vflip"  # of training images: hflip, vflip, rotate (30 degrees), strong (half of them moved, covered, of other contrast), joined by commas
    balanced: bool = False  # draw every class equally often in training; probabilities then take the classes' shares into account
    # --- model ---
    scale: Literal["paper", "small"] = "paper"  # the paper's sizes for a GPU, or minutes on a CPU; not given: small for toy data
    recipe: Literal["paper", "plus"] = "paper"  # as the paper says, or with this project's improvements; not given: plus at scale small
    pretrained: str = ""  # file of ImageNet weights (torchvision's keys) for the plain ResNet
    init: str = ""  # checkpoint of another run to start from (fine-tuning)
    # --- training ---
    epochs: int = 1000  # [1..] passes over the training images
    pretrain_epochs: int = 0  # [0..] passes before them: of the plain ResNet alone
    batch_size: int = 64  # [2..] images a step, over all processes
    grad_accum: int = 1  # [1..] parts a batch is computed in, to save memory (2 images each at least)
    eval_batch_size: int = 128  # [1..] images at once when no gradient is needed; changes no result
    lr: float = 5e-4  # [0..] peak learning rate of AdamW
    warmup: float = 0.1  # [0..1] share of the steps over which it rises, before a cosine to 1e-6
    clip: float = 0.  # [0..] largest gradient norm; 0: no clipping
    ema: float = 0.999  # [0..1] decay of the weights' moving average, which is what is evaluated
    baseline: bool = True  # train a plain ResNet on the same batches, as a control
    select: Literal["accuracy", "balanced_accuracy", "f1_macro", "auroc", "nll", "last"] = "accuracy"  # validation metric that picks the epoch, nll the least; last: none does
    seed: int = 0  # [0..] of weights, order, noise, toy images and what --limit draws; splits do not depend on it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    amp: Literal["auto", "bf16", "off"] = "auto"  # bfloat16 arithmetic; auto: on CUDA
    compile: bool = False  # torch.compile the networks: slower start, faster steps
    # --- output ---
    output: str = ""  # the run's folder; none: the next free runs/METHOD-DATA-SCALE-RECIPE-sSEED
    # --- method ---
    width: int = 64  # [8..] channels in the first stage of the plain ResNet
    channels: int = 64  # [8..] of the U-Net's first level
    mult: str = "1,2,2,2"  # channels of each level, in multiples
    blocks: int = 2  # [1..] residual blocks a level
    attention: str = "2"  # downsampling factors at which there is attention
    head_channels: int = 64  # [1..] of an attention head
    latent: Literal["none", "rgb", "grid"] = "none"  # flow of an autoencoder's latents; label map encoded too (rgb), or codes on their grid
    autoencoder: str = ""  # its file: latent-diffusion's keys or diffusers' (sd-vae-ft-mse), or a Mediffusion run's autoencoder.pt
    latent_scale: float = 0.  # [0..] latents are multiplied by it; 0: to unit spread, measured; 0.18215 is the authors'
    codes: Literal["rgb", "grey", "onehot", "simplex"] = "rgb"  # colour of a class: the paper's palette, SymmFlow's grey, or equidistant codes
    beta: float = 4.  # [0..] width of the label maps' dequantisation noise in grey levels; codes grey: from lowest to highest code
    sigma_min: float = 0.  # [0..1] s of the path; the authors' code: 1e-4
    image_weight: float = 0.7  # [0..1] w of the loss
    time_scale: float = 1.  # [0..] t is multiplied by it before its embedding; 1 leaves the embedding nearly flat
    label_loss: Literal["velocity", "map", "posterior"] = "velocity"  # squared error of v_y; t^2 of it: of the label map; or cross-entropy of its class
    precondition: bool = False  # the U-Net adds to linear guesses of the velocity, and sees those of x_1 and y_0 in place of x_t and y_t
    label_noise: Literal["pixel", "shared"] = "pixel"  # xi_y of each pixel, whose mean gives the label away at t < 1, or one for all pixels
    pooled: bool = False  # the label map's mean pixel, as the U-Net sees it, also enters with the time embedding, past the group norms, which hide what is constant
    t_one: float = 0.  # [0..1] share of training images seen once more, at t = 1, all that one-step classification uses, for the label loss alone
    steps: int = 1  # [1..] of the flow when it classifies
    draw_steps: int = 25  # [1..] of the flow when it draws images
    guidance: float = 0.  # [0..] how far drawing leaves the mean of all classes' velocities behind, at a second network call a step
    solver: Literal["euler", "heun"] = "euler"  # one network call a step, or two
    samples: int = 1  # [1..] noise draws whose label maps are averaged; with precondition and one step a draw a mirror image is all, others would agree
    decision: Literal["mean", "mode"] = "mean"  # by the mean label map: its distances, or weights of equidistant codes; or by the vote of the pixels
    mirror: bool = False  # the draws look at the image and its mirror images, those of --augment, in turn
    calibrate: bool = False  # fit the softmax's temperature on validation, for the run's own steps, samples and decision
    uncertainty: Literal["distance", "entropy", "margin", "spread"] = "distance"  # what predictions are ranked by; spread needs more samples than one
    generated: int = 500  # [0..] images drawn and measured at the end, and validation images of the table of steps; 0: none drawn, all in the table


SMALL = dict(epochs=14, batch_size=16, lr=3e-3, ema=0.99, width=8, channels=16, mult="1,2,4,4", attention="4", head_channels=16, blocks=1, generated=100)
PLUS = dict(codes="onehot", time_scale=1000., t_one=1., label_loss="posterior", label_noise="shared", pooled=True, precondition=True, guidance=1.,
            calibrate=True, uncertainty="entropy", select="nll", mirror=True, samples=2, image_weight=.3)
SAMPLING = ["device", "eval_batch_size", "amp", "samples", "steps", "solver", "decision", "uncertainty", "autoencoder", "skip_bad", "output"]   # what may change when a checkpoint is used
BY_DATA = {"toy": dict(epochs=8), "folder": dict(augment="hflip")} | dict.fromkeys(     # no flips where up or left means something
    ("pneumoniamnist", "breastmnist", "octmnist", "organamnist", "organcmnist", "organsmnist", "chexpert"), dict(augment=""))
KINDS = ("distance", "entropy", "margin", "spread")                 # of uncertainty
PANELS = [("Losses", "loss", ["image", "label", "resnet"]), ("Validation", "accuracy", ["val_accuracy", "val_resnet_accuracy"])]


def configure(**given):
    """The Config of a scale, recipe and data set; what is `given` wins. `train(configure(data="toy", seed=1))`."""
    return run.configure(Config, given, SMALL, PLUS, BY_DATA)


# ============================================================================= 4 the method
def class_codes(kind, K, beta=4.):
    """The colours c_k of K classes, (K, D), and the half-width of their dequantisation noise, in units of [-1, 1]."""
    if kind == "rgb":                                                   # K of 64 colours, each channel 0, 75, 150 or 225
        index = torch.linspace(0, 63, K, dtype=torch.float64).floor().long()
        colours = torch.stack([index // 16, index // 4 % 4, index % 4], 1) * 75
        return colours / 127.5 - 1, beta / 2 / 127.5
    if kind == "grey":                                                  # -beta/2 .. beta/2: outside of [-1, 1]
        return (torch.linspace(-1, 1, K) * beta / 2)[:, None], beta / 4 / (K - 1)
    onehot = 2 * torch.eye(K) - 1
    if kind == "onehot":
        return onehot, beta / 2 / 127.5
    centred = onehot - onehot.mean(0)                                   # simplex: as equidistant, in K - 1 dimensions, 2 apart
    return torch.linalg.svd(centred.double())[0][:, :K - 1].float() * 2 ** .5, beta / 2 / 127.5


def label_map(codes, noise_width, y, size, noise=True):
    """Labels y (B,) -> (B, D, H, W) in the colour of the class, with uniform noise a pixel and channel."""
    maps = codes[y][:, :, None, None].expand(-1, -1, *size)
    return maps + noise_width * (2 * torch.rand_like(maps) - 1) if noise else maps


def path(x, y, xi_x, xi_y, t, s):
    """Point and velocity of the path at t (B,): ((x_t, y_t), (v_x, v_y)). That it is straight `outputs`, `velocity`, `loss` and `guided` know, too."""
    t = t.view(-1, 1, 1, 1)
    return (((1 - (1 - s) * t) * xi_x + t * x, (1 - (1 - s) * t) * y + t * xi_y), (x - (1 - s) * xi_x, xi_y - (1 - s) * y))


def outputs(unet, config, x, y, t, rows=None):
    """What the U-Net says at the point x, y (B, ., H, W) and time t (B,): v_x, and v_y or, with label_loss posterior, in its place logits of
    p(k | x_t, y_t), one for each pixel of the middle, (B, K, h, w), whose mean counts. rows: the decoder runs for the first so many only."""
    guess_x = guess_y = 0.
    if config.precondition:                                             # as if entries of x_1 had a mean square of 1, as noise and one-hot y_0 have
        u = t.view(-1, 1, 1, 1)
        variance = u ** 2 + (1 - u) ** 2
        guess_x, guess_y = (2 * u - 1) / variance * x, (2 * u - 1) / variance * y
        x, y = u / variance * x, (1 - u) / variance * y                 # guesses of x_1 and y_0: 0 where x_t (t = 0) or y_t (t = 1) is noise alone
    z, given = torch.cat([x, y], 1), (t * config.time_scale, *[y.mean((2, 3))] * config.pooled)
    if config.label_loss != "posterior":
        out = unet(z, *given).float()
        return out[:, :x.shape[1]] + guess_x, out[:, x.shape[1]:] + guess_y
    features, v_x = unet.encode(z, *given), torch.zeros_like(x)
    if rows != 0:
        v_x[:rows] = unet.decode([f[:rows] for f in features], *(part[:rows] for part in given)).float()
    return v_x + guess_x, unet.read(features).float()


def velocity(unet, config, x, y, t, rows=None):
    """v_x, v_y at the point x, y (B, ., H, W) and time t (B,)."""
    v_x, said = outputs(unet, config, x, y, t, rows)
    if config.label_loss != "posterior":
        return v_x, said
    p, t = said.mean((2, 3), keepdim=True).softmax(1), t.view(-1, 1, 1, 1)
    y_0 = 2 * p - 1                                                     # sum_k p_k c_k, to which v_y leads; c_k = 2 e_k - 1. At t = 0 y_t is y_0
    return v_x, torch.where(t > 0, (y - y_0) / t.clamp_min(1e-6), (config.sigma_min - 1) * y)


def loss(nets, config, x, y):
    """The flow-matching loss of images, or latents, x and label maps y -> dict of scalars, and the label's by tenths of t."""
    B, again = len(x), int(config.t_one * len(x) + torch.rand(()).item())
    x, y = (torch.cat([z, z[:again]]) for z in (x, y))
    t = torch.cat([torch.rand(B, device=x.device), torch.ones(again, device=x.device)])
    xi_y = torch.randn_like(y if config.label_noise == "pixel" else y[:, :, :1, :1]).expand_as(y)
    (x_t, y_t), (v_x, v_y) = path(x, y, torch.randn_like(x), xi_y, t, config.sigma_min)
    hat_x, said = outputs(nets.unet, config, x_t, y_t, t, rows=B)
    error_x = ((hat_x - v_x)[:B] ** 2).mean((1, 2, 3))
    error_y = F.cross_entropy(said.mean((2, 3)), y.mean((2, 3)).argmax(1), reduction="none") if config.label_loss == "posterior" else \
        ((said - v_y) ** 2).mean((1, 2, 3))                             # posterior: the class is read off the label map
    weight = t ** 2 if config.label_loss == "map" else 1.              # y_t - t v_y is the label map; its error is t times that of v_y
    losses = {"image": error_x.mean(), "label": (weight * error_y).mean()}
    losses["flow"] = config.image_weight * losses["image"] + (1 - config.image_weight) * losses["label"]
    tenth = F.one_hot((t * 10).long().clamp_max(9), 10).float()
    losses["label_by_t"] = torch.stack([(tenth * error_y.detach()[:, None]).sum(0), tenth.sum(0)])
    return losses


def train_step(nets, ema, config, batch, joint):
    """One batch -> dict of losses; "loss" is what is differentiated. joint=False: the plain ResNet alone."""
    losses = {}
    if nets.resnet is not None:                                         # the control: shares images, not weights
        losses["resnet"] = F.cross_entropy(nets.resnet(batch.x), batch.y)
    if joint:
        x = nets.encode(batch.x, batch)
        losses |= loss(nets, config, x, nets.label_map(batch.y, x.shape[2:]))
    return losses | {"loss": sum(losses[k] for k in ("resnet", "flow") if k in losses)}


def guided(nets, config, labels, x, y, t):
    """v_x + g (v_x - its mean over all classes), and v_y, of label maps on their way from `labels` (B,); Ho and Salimans 2022 without a null class. Each call
    looks at one other class, the next in turn, hence (K - 1) / K: begun at its colour c, the map would now be (1 - t) (c - c_label) away."""
    v_x, v_y = velocity(nets.unet, config, x, y, t)
    if config.guidance:
        K, step = nets.classes, (t * config.draw_steps).round().long()
        others = (labels + 1 + step % (K - 1)) % K
        own, other = (nets.label_map(k, y.shape[2:], noise=False) for k in (labels, others))
        v_other = velocity(nets.unet, config, x, y + (1 - t).view(-1, 1, 1, 1) * (other - own), t)[0]
        v_x = v_x + config.guidance * (K - 1) / K * (v_x - v_other)
    return v_x, v_y


def flow(unet, config, x, y, start, end, steps, field=None):
    """Follows dz/dt = v, or another field(x, y, t), from t = start to end in equal steps: the states [(x, y), ...], steps + 1 of them."""
    field = field or partial(velocity, unet, config)
    states, times = [(x, y)], torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    for t, after in zip(times, times[1:]):
        (x, y), h = states[-1], after - t
        v_x, v_y = field(x, y, torch.full((len(x),), t, device=x.device))
        if config.solver == "heun" and after > 0:                       # the mean of both ends of the Euler step; at t = 0 no v_y knows xi_y
            w_x, w_y = field(x + h * v_x, y + h * v_y, torch.full((len(x),), after, device=x.device))
            v_x, v_y = (v_x + w_x) / 2, (v_y + w_y) / 2
        states.append((x + h * v_x, y + h * v_y))
    return states


class Prediction(NamedTuple):
    p: torch.Tensor                     # (B, K) probabilities
    votes: torch.Tensor                 # (B, K) share of the pixels nearest to each colour
    d: torch.Tensor                     # (B, K) distances of the label map to each colour
    distance: torch.Tensor              # (B,) d of the class: the paper's uncertainty
    entropy: torch.Tensor               # (B,) of p, over log K: 0 sure .. 1 no idea
    margin: torch.Tensor                # (B,) 1 - (largest p - second)
    spread: torch.Tensor                # (B,) share of the draws that by d are nearest to another colour than their mean is
    y: torch.Tensor                     # (B, D, H, W) the label map, mean of the draws


def distances(y, codes, kind):
    """Label maps y (..., D, H, W) -> d (..., K): the mean of the pixels' distances for the palette, as in the paper; else the
    distance of the mean, which pixel noise does not lift."""
    if kind == "rgb":
        return (y.movedim(-3, -1)[..., None, :] - codes).norm(dim=-1).mean((-3, -2))
    return (y.mean((-2, -1))[..., None, :] - codes).norm(dim=-1)


def classify(nets, config, x, noise):
    """Images x (B, channels, H, W) and `classified`'s noise (B, S, D, H, W) -> Prediction, of nets.eval() under no_grad: a network call an image, draw and step."""
    field = partial(velocity, nets.unet, config, rows=0 if config.steps == 1 else None)            # 0: nobody looks at v_x
    views = [nets.encode(view) for view in mirrored(x, config.augment * config.mirror)[:noise.shape[1]]]
    noise = noise[:, :len(views)] if config.precondition and config.steps == 1 else noise          # else a view's draws would agree
    B, S = noise.shape[:2]
    z = torch.stack([views[s % len(views)] for s in range(S)], 1).flatten(0, 1)
    y = flow(nets.unet, config, z, noise.flatten(0, 1), 1., 0., config.steps, field)[-1][1]
    y = nets.decode_map(y.unflatten(0, (B, S)))
    each, y = distances(y, nets.codes, config.codes), y.mean(1)
    d = distances(y, nets.codes, config.codes)
    votes = F.one_hot(torch.cdist(y.flatten(2).mT.float(), nets.codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1), nets.classes).float().mean(1)
    if config.decision == "mode":
        logits = votes.clamp_min(1e-3).log()
    elif config.codes in ("onehot", "simplex"):                         # one step ends at the sum of p(k | x) c_k: p can be read off
        floor = 1e-6 if config.label_loss == "posterior" else 1e-3      # what is not probabilities by design may be negative
        logits = barycentric(y.mean((2, 3)), nets.codes).clamp_min(floor).log()
    else:
        logits = -d / .2
    p = ((logits + nets.prior.log()) / nets.temperature).softmax(1)
    best, top = p.argmax(1, keepdim=True), p.topk(2, 1).values
    entropy = -(p * p.clamp_min(1e-30).log()).sum(1) / np.log(nets.classes)
    spread = (each.argmin(2) != d.argmin(1, keepdim=True)).float().mean(1)
    return Prediction(p, votes, d, d.gather(1, best)[:, 0], entropy, 1 - (top[:, 0] - top[:, 1]), spread, y)


def barycentric(y, codes):
    """The weights (B, K), summing to 1, with which equidistant codes (K, D) give y (B, D); noise may make some negative."""
    centre = codes.mean(0)
    scale = (codes[0] - centre).square().sum() * len(codes) / (len(codes) - 1)
    return ((y - centre).float()[:, None] * (codes - centre)).sum(-1) / scale + 1 / len(codes)      # no matrix product: autocast would round it


def draw(nets, config, labels, noise):
    """Labels (B,) and noise (B, channels, H, W), or of latents -> images in [-1, 1]: t = 0 -> 1."""
    y = nets.label_map(labels, noise.shape[2:], noise=False)
    return nets.decode(flow(nets.unet, config, noise, y, 0., 1., config.draw_steps, partial(guided, nets, config, labels))[-1][0]).clamp(-1, 1)


# ============================================================================= 5 networks
class Networks(nn.Module):
    """The flow's U-Net, the plain ResNet, and how images and labels become what flows: pixels, or latents of a frozen autoencoder."""

    def __init__(self, config, channels, classes):
        super().__init__()
        self.classes, self.channels, self.config, self.maps = classes, channels, config, None
        self.resnet = ResNet(18, channels, classes, config.width, "small" if config.size < 100 else "imagenet",
                             bool(config.pretrained)) if config.baseline else None
        codes, self.noise_width = class_codes(config.codes, classes, config.beta)
        self.codec = Codec(config.autoencoder) if config.latent != "none" else None
        self.n_x = self.codec.latent if self.codec else channels        # channels of what flows: x, and y
        self.n_y = self.n_x if config.latent == "rgb" else codes.shape[1]
        mult, attention = (tuple(int(n) for n in text.split(",") if n) for text in (config.mult, config.attention))
        self.multiple = 2 ** (len(mult) - 1) * (self.codec.net.multiple if self.codec else 1)           # of which the sides of an image must be
        read = config.label_loss == "posterior"
        self.unet = UNet(self.n_x + self.n_y, self.n_x + self.n_y * (not read), config.channels, mult, config.blocks, attention, config.head_channels,
                         num_values=self.n_y if config.pooled else None, num_read=classes if read else None)
        buffers = dict(codes=codes.float(), prior=torch.ones(classes), temperature=torch.ones(()),      # prior: share over that in balanced training
                       latent_scale=torch.tensor(config.latent_scale or 1.), codec_id=torch.tensor(self.codec.id if self.codec else 0))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def shapes(self, size):
        """Of x and y, as they flow, for images of `size` pixels a side."""
        side = size // self.codec.net.multiple if self.codec else size
        return (self.n_x, side, side), (self.n_y, side, side)

    @torch.no_grad()
    def encode(self, x, batch=None):
        """Images (B, channels, H, W) -> what flows. Latents of a training batch are computed once an image and way of flipping it."""
        if not self.codec:
            return x
        self.codec.check(self.codec_id)
        turned = batch is None or batch.variant is None or (batch.variant < 0).any()
        return self.codec.encode(x, () if turned else (batch.index * 4 + batch.variant).tolist()) * self.latent_scale

    @torch.no_grad()
    def decode(self, z):
        """What flows -> images (B, channels, H, W)."""
        if not self.codec:
            return z
        self.codec.check(self.codec_id)
        return self.codec.decode(z / self.latent_scale, self.channels)

    @torch.no_grad()
    def label_map(self, labels, size, noise=True):
        """Labels (B,) -> label maps (B, D, *size) in the colours of the classes, or their latents, which are computed once and without noise."""
        if self.config.latent != "rgb":
            return label_map(self.codes, self.noise_width, labels, size, noise)
        if self.maps is None:
            sides, every = [side * self.codec.net.multiple for side in size], torch.arange(self.classes, device=labels.device)
            self.maps = self.codec.encode(label_map(self.codes, 0., every, sides, noise=False))
        return self.maps.to(labels.device)[labels] * self.latent_scale

    def decode_map(self, y):
        """Label maps (B, S, D, h, w) as they flow -> in colours; only --latent rgb needs the decoder for it."""
        return y if self.config.latent != "rgb" else self.codec.decode(y.flatten(0, 1) / self.latent_scale).unflatten(0, y.shape[:2])


def build(config, facts):
    """The networks for a data set's facts (channels, classes, multilabel; run.load_model), in training mode. Refuses what the method cannot take."""
    if facts["multilabel"]:
        raise run.UserError(f"--data {config.data}: has several labels an image, {METHOD} takes one; name a single-label data set")
    if config.codes == "rgb" and len(facts["classes"]) > 64:
        raise run.UserError(f"--codes rgb: has 64 colours for {len(facts['classes'])} classes; take onehot or simplex")
    if config.pretrain_epochs and not config.baseline:
        raise run.UserError(f"--pretrain-epochs {config.pretrain_epochs} --no-baseline: there is no plain ResNet to train before the flow; leave one out")
    if config.label_loss == "posterior" and config.codes != "onehot":
        raise run.UserError(f"--label-loss posterior --codes {config.codes}: gives the probabilities of one-hot codes; add --label-loss map for these")
    if config.label_loss == "posterior" and config.decision == "mode":
        raise run.UserError("--decision mode: with --label-loss posterior all pixels have one colour; take --decision mean")
    if config.uncertainty == "spread" and (config.samples == 1 or config.precondition and config.steps == 1 and not (config.mirror and "flip" in config.augment)):
        raise run.UserError("--uncertainty spread: the draws do not differ here; add --samples 4 --steps 2, or take entropy")
    if config.codes == "grey" and not config.beta:
        raise run.UserError("--codes grey --beta 0: all classes would have one colour, grey levels run from -beta/2 to beta/2; name a beta above 0")
    if config.latent != "none" and not config.autoencoder:
        raise run.UserError(f"--latent {config.latent}: needs --autoencoder FILE")
    if config.latent == "none" and config.autoencoder:
        raise run.UserError(f"--autoencoder {config.autoencoder}: would not be used; add --latent grid or --latent rgb")
    if config.latent == "rgb" and config.codes != "rgb":
        raise run.UserError(f"--latent rgb --codes {config.codes}: only the palette can be encoded as a picture; take --latent grid, or add --codes rgb --label-loss map")
    try:
        nets = Networks(config, facts["channels"], len(facts["classes"]))
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as fault:
        raise run.UserError(f"--mult {config.mult} --attention {config.attention} --channels {config.channels} --head-channels {config.head_channels}: "
                            f"no network can be made of these ({fault})") from None
    if nets.codec and nets.codec.channels == 1 and (facts["channels"] == 3 or config.latent == "rgb"):
        raise run.UserError(f"--autoencoder {config.autoencoder}: is one of gray images; colour images and --latent rgb need one of colour images")
    if (low := config.size // nets.multiple * nets.multiple) != config.size:
        raise run.UserError(f"--size {config.size}: must be a multiple of {nets.multiple}; take {f'{low} or ' * (low > 0)}{low + nets.multiple}")
    return nets


def initialise(nets, data, config):
    """Measures the spread of some training latents, and the classes' shares; loads ImageNet weights and those of another run, where asked for."""
    if config.balanced:
        nets.prior.copy_(torch.from_numpy(np.bincount(data.train.labels, minlength=nets.classes) / len(data.train) * nets.classes))
    if config.pretrained and nets.resnet is not None:
        run.load_pretrained(nets.resnet, config.pretrained)
    if nets.codec and not config.latent_scale:
        some = next(iter(Batches(data.train, min(256, len(data.train)), next(nets.parameters()).device, train=True, seed=config.seed)))
        nets.latent_scale.div_(torch.cat([nets.encode(x) for x in some.x.split(8)]).std())
    if config.init:
        run.load_init(nets, config.init, METHOD)


def parameter_groups(nets, config):
    """AdamW's groups: name, parameters, peak learning rate, largest gradient norm (0: none)."""
    return [dict(name=name, params=list(net.parameters()), lr=config.lr, peak=config.lr, clip=config.clip, weight_decay=0.)
            for name, net in (("resnet", nets.resnet), ("flow", nets.unet)) if net]


def learning_rate(config, group, epoch):
    """One-cycle: from 1e-6 to the peak on a cosine over the warm-up, then on a cosine to 1e-6."""
    begin = config.pretrain_epochs if group["name"] == "flow" else 0
    done, low = max(0., epoch - begin) / (config.pretrain_epochs + config.epochs - begin), min(1e-6, group["peak"])
    if done < config.warmup:
        return low + (group["peak"] - low) * (1 - math.cos(math.pi * done / config.warmup)) / 2
    return low + (group["peak"] - low) * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup))) / 2


# ============================================================================= 6 evaluation
@torch.no_grad()
def classified(nets, split, config, device):
    """Batch by batch of a split: the batch, its noise (B, S, D, H, W; --label-noise shared: all pixels alike), by (seed, id) and --samples, and its Prediction."""
    n_y, *size = nets.shapes(config.size)[1]
    shape = config.samples, n_y, *(size if config.label_noise == "pixel" else (1, 1))
    for batch in run.progress(Batches(split, config.eval_batch_size, device, rank=run.rank(), world=run.world()), "evaluate"):
        noise = run.image_noise(config.seed, [split.ids[i] for i in batch.index], shape, device).expand(-1, -1, -1, *size)
        with run.autocast(config, device):
            found = classify(nets, config, batch.x, noise)
        yield batch, noise, found


def collect(nets, split, config, device):
    """The Predictions of a whole split, over all processes: {field: (N, ...)} float64, without the label maps."""
    rows = zip(*(out[:-1] for *_, out in classified(nets, split, config, device)))
    return run.gather({name: torch.cat(v).cpu().numpy().astype(np.float64) for name, v in zip(Prediction._fields, rows)})


@torch.no_grad()
def evaluate(nets, split, config, device, joint=True):
    """Every model on a whole split: ({model: probabilities (N, K)}, {kind: uncertainty (N,)}); the method comes first. The ResNet sees as many views."""
    nets.eval()
    found, rows = collect(nets, split, config, device), []
    predictions = {METHOD: found["p"]}
    if nets.resnet is not None:
        for batch in Batches(split, config.eval_batch_size, device, rank=run.rank(), world=run.world()):
            with run.autocast(config, device):
                p = [(nets.resnet(view).float() + nets.prior.log()).softmax(1) for view in mirrored(batch.x, config.augment * config.mirror)[:config.samples]]
            rows.append(torch.stack(p).mean(0).cpu().numpy().astype(np.float64))
        predictions |= run.gather({"resnet": np.concatenate([np.empty((0, nets.classes)), *rows])})
    return predictions, {kind: found[kind] for kind in KINDS}


def calibrate(nets, split, config, device):
    """Fits the temperature by the likelihood of a validation split."""
    if config.calibrate:
        nets.temperature.fill_(1)
        nets.temperature.div_(metrics.sharpness(split.labels, evaluate(nets, split, config, device)[0][METHOD]))


@torch.no_grad()
def measure(nets, data, config, device, figures):
    """On validation: accuracy, calibration and time against steps and draws; both decisions, the paper's AUROC, and the area under the
    risk-coverage curve of each uncertainty; then what drawn images are worth."""
    val, table, some = data.val, [], data.val.take(drawn.some_rows(data.val, config.generated or len(data.val), config.seed))
    for steps, samples in dict.fromkeys([*((n, 1) for n in (1, 2, 5, 10, 25)), (1, 4), (config.steps, config.samples)]):
        began = time.monotonic()
        m = metrics.summary(some.labels, collect(nets, some, dataclasses.replace(config, steps=steps, samples=samples), device)["p"])
        table.append({"steps": steps, "samples": samples, **{k: m[k] for k in ("accuracy", "ece", "nll")}, "seconds_an_image": (time.monotonic() - began) / len(some)})
    full = collect(nets, val, config, device)
    rules = {"accuracy_mean": metrics.accuracy(val.labels, full["d"].argmin(1)), "accuracy_mode": metrics.accuracy(val.labels, full["votes"].argmax(1)),
             "auroc_distance": metrics.auroc(val.labels, -full["d"])}
    found = {"validation": metrics.summary(val.labels, full["p"]), "validation_by_steps_and_samples": table, "validation_by_rule": rules,
             "validation_aurc": {kind: metrics.aurc(full["p"].argmax(1) == val.labels, full[kind]) for kind in KINDS}}
    rows = drawn.some_rows(val, config.generated, config.seed)
    if len(rows) > 1:
        images = draw_images(nets, config, val.labels[rows], [f"drawn-{i}" for i in range(len(rows))], device)
        found["drawn"] = drawn.measure(images, rows, data, nets.resnet, device, figures, config.seed, f"Drawn in {config.draw_steps} steps")
    return found


@torch.no_grad()
def draw_images(nets, config, labels, ids, device):
    """Images uint8 (N, channels, H, W) of labels (N,), each with the noise of its id."""
    images, shape = [], nets.shapes(config.size)[0]
    for part in run.progress([slice(i, i + config.eval_batch_size) for i in range(0, len(labels), config.eval_batch_size)], "draw"):
        with run.autocast(config, device):
            x = draw(nets, config, torch.as_tensor(labels[part], device=device), run.image_noise(config.seed, ids[part], shape, device))
        images.append(plots.to_uint8(x))
    return np.concatenate(images)


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
    """Draws n images of a class: a picture each, and all in one grid."""
    config, nets, facts, device = run.load_model(checkpoint, METHOD, Config, build, given)
    classes, k = facts["classes"], run.class_number(label, facts["classes"])
    if n < 1:
        raise run.UserError(f"-n {n}: 1 or more")
    ids = [f"{classes[k]}-{i:04d}" for i in range(n)]
    images = draw_images(nets, config, np.full(n, k), ids, device)
    out = run.result_folder(output, checkpoint, "sample", config)
    run.save_images(out, ids, images, classes[k])


@torch.no_grad()
def explain_command(checkpoint, paths=(), limit=0, output="", **given):
    """A picture an image, `limit` at most (0: all of `paths`; 8 of the test split if none): five points of its way, the label map that it flows
    to, and what each pixel says for itself, and the image as every class, drawn from the noise that it flows to."""
    config, nets, facts, device = run.load_model(checkpoint, METHOD, Config, build, given)
    split, problems = run.to_explain(sys.modules[__name__], config, facts, paths, limit)
    classes, out = facts["classes"], run.result_folder(output, checkpoint, "explain", config)
    for batch, noise, found in classified(nets, split, config, device):
        with run.autocast(config, device):
            x = nets.encode(batch.x)
            way = flow(nets.unet, config, x, noise[:, 0], 1., 0., config.draw_steps)
            own = way[-1][0]                                            # the noise that the image flows to
            stops = [round(j * config.draw_steps / 4) for j in range(5)]
            way = [(nets.decode(way[j][0]), nets.decode_map(way[j][1][None])[0]) for j in stops]
            said = outputs(nets.unet, config, x, noise[:, 0], torch.ones(len(x), device=device), rows=0)[1]
            pixels = F.interpolate(2 * said.softmax(1) - 1, x.shape[2:]) if config.label_loss == "posterior" else found.y
            of_class = [draw(nets, config, torch.full((len(own),), k, device=device), own) for k in range(len(classes))]
        for i, row in enumerate(batch.index):
            name, p = split.ids[row], found.p[i].tolist()
            rows = [[split.images[row], *(plots.to_uint8(x[i]) for x, _ in way[1:])], [as_picture(nets, config, y[i]) for _, y in way],
                    [as_picture(nets, config, y[i]) for y in (found.y, pixels)],
                    [as_picture(nets, config, c[:, None, None].expand_as(found.y[i])) for c in nets.codes], [plots.to_uint8(x[i]) for x in of_class]]
            true = f" (true: {classes[split.labels[row]]})" if split.labels[row] >= 0 else ""
            captions = [[f"t = {1 - j / config.draw_steps:.2f}" for j in stops]] * 2 + [[f"d {found.distance[i]:.2f}", "by pixel"], classes]
            captions.append([f"{c}\np {q:.3f}" for c, q in zip(classes, p)])
            plots.image_grid(out / f"{row:04d}-{run.file_name(name)}.png", rows, captions,
                             ["image to noise", "noise to label map", f"steps {config.steps}, draws {config.samples}", "colours", "its noise as each class"],
                             title=f"{name}: {classes[found.p[i].argmax()]}{true}")
    print(*problems, f"pictures: {out}   (not for clinical use)", sep="\n")


def as_picture(nets, config, y):
    """A label map (D, H, W) as a picture: palette and grey as they are; of equidistant codes the palette, mixed by the weights of the classes."""
    if config.codes in ("rgb", "grey"):
        return plots.to_uint8(y if config.codes == "rgb" else y / config.beta * 2)
    weights = barycentric(y.flatten(1).T, nets.codes).clamp(0, 1)                       # (HW, K)
    palette = class_codes("rgb", nets.classes)[0].float().to(y.device)
    return plots.to_uint8((weights / weights.sum(1, keepdim=True).clamp_min(1e-6) @ palette).T.unflatten(1, y.shape[1:]))


def main(argv=None):
    """The command line; returns the exit code. `train`, `eval` and `predict` are those of every method: common/run.py."""
    label = {"--label": dict(required=True, help="class to draw, by name or number"), "-n": dict(type=int, default=16, metavar="N", help="how many; default 16")}
    limit = {"--limit": dict(type=int, default=0, metavar="N", help="at most so many pictures; default: all images given, or 8 of the test split")}
    return run.command_line(argv, sys.modules[__name__], {
        "sample": (sample_command, ["draw_steps", "guidance", "seed", *SAMPLING], "Draw images of a class.", label),
        "explain": (explain_command, ["data", "root", "split", "draw_steps", "guidance", *SAMPLING], "Show why: the label map, and the image as every class.", limit)})


if __name__ == "__main__":
    sys.exit(main())
