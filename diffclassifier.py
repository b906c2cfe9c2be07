"""Diffusion classifier: an image has the class under which a diffusion model reconstructs it best, by the vote of many noise levels.

Favero et al., "Conditional Diffusion Models are Medical Image Classifiers that Provide Explainability and Uncertainty for Free",
MIDL 2025, arXiv 2502.03687; after Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV 2023. A diffusion
model of images learns to denoise with the class given. To classify, the image is noised N times and denoised as every class; each
time the class with the least error has a vote. Classes share the noise, so that only what they change is compared.

    z = a x + s eps,  a^2 = sigmoid(l), s^2 = sigmoid(-l), l the log-SNR at t ~ U(0, 1)       `diffuse`, common/schedules.py
    v = a eps - s x;  eps_hat = s z + a v_hat;  x_hat = (z - s eps_hat) / a                    `epsilon`, `draw`
    L = w(l) |v_hat(z, l, c) - v|^2,  c replaced by a null token with probability 0.15         `loss`
    E[n, c] = |eps_hat(z_n, l_n, c) - eps_n|^2,  the same (t_n, eps_n) for every c             `errors`
    majority: the c with most n such that E[n, c] is least (Favero);  mean: least mean E (Li);  elbo: least mean of -dl/dt E, twice the
    bound of -log p(x | c) but for a constant;  learned: logits -sum_j w_j D[j, c], D the mean of E[n, c] - mean_k E[n, k] over the n whose l is in the j-th
    of ten ranges, w fitted on validation (common/votes.py). All assume equally frequent classes; --prior training (learned alone): as in training      `rules`

M images, N noise levels an image, K classes; all rules read one array of errors, (M, N, K), rows summed in float32, these in float64. `survivors` stops early.

    python diffclassifier.py                                  # toy lesions: trains and classifies in minutes on a CPU
    python diffclassifier.py --data chexpert --root DIR --split paper       # the paper's sizes, for a CUDA GPU; its other network: --backbone dit
    python diffclassifier.py eval --checkpoint RUN/best.pt --rule majority --stop 1e-3
    python diffclassifier.py predict --checkpoint RUN/best.pt a.jpg folder/
    python diffclassifier.py explain --checkpoint RUN/best.pt a.jpg
    python diffclassifier.py sample --checkpoint RUN/best.pt --label 3 -n 16

Read differently from the paper, and why (the paper's text could not be had: "paper" is its figures and a description of its authors' code)
 1. Plain error of v. The authors' weight 1 / (1 + min(SNR, 5)) on eps is not the min-SNR that they name (Hang et al. 2023): --loss-weight authors, min-snr.
 2. Class: added to every block's time embedding; theirs enters transformer blocks (275.8 M parameters in all; ours, with plain attention, 234.1 M), a bias per class at
    16x16 and 8x8 alone. One table, averaged and clipped (theirs: neither); their DiT has one a block, a second null token and dropout, by our reading on when it classifies.
 3. Errors are of eps, as in their code; of x, as in their figure, votes would be the same, means not. Equal votes go to the lower mean error, not to the first class.
 4. EMA at every step (theirs: every fifth); gray films have one channel (theirs three); each epoch is validated, by accuracy (every 50th, by F1). An eliminated class cannot win.
 5. Counterfactuals share start and step noise with the factual reconstruction, so that what differs is the class.
 6. The schedule is shifted for the 128 pixels that the network sees of 256; halving the wavelets makes it that of 256. Theirs shifts for 256 and halves: that of 512.
Recipe plus: the network adds to a linear denoiser (--precondition), class and time scale its features (--scale-shift); it sees an image at four noise levels
at once (--levels, --stratified), most where classes differ (--loss-weight band); the errors' weights are fitted (--rule learned); AUROC picks the epoch, since
after few votes accuracy says little (--select). What each is worth: tests/results.
Test balanced accuracy on RetinaMNIST, --scale small, three seeds: plus .348 (25 noise levels), recipe paper .290 (101), ResNet-18 .350. The paper's data are not here.
"""
# ============================================================================= 2 imports
import dataclasses
import math
import re
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

from common import metrics, plots, run  # before torch, whose threads it tells how to wait
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.autoencoder import Codec
from common.dit import DiT
from common.resnet import ResNet
from common.schedules import alpha_sigma, logsnr_step, shifted_cosine, shifted_cosine_slope
from common.unet import UNet
from common.votes import BUCKETS, below_half, bucket_differences, count_votes, fit, mean_errors, mean_scores, overtaken, paired_p
from common.wavelet import haar, unhaar
from data import Batches, DataError, load_for, read_split, shortcut

METHOD = "diffclassifier"


# ============================================================================= 3 settings
@dataclass
class Config:
    """Every setting. Defaults: the authors' code's, but for the list above. SMALL, PLUS, BY_DATA replace some; the command line wins."""
    # --- data ---
    data: str = "toy"  # data set: toy, chexpert, isic2020, ham10000, retinamnist and other MedMNIST names, or folder (a folder per class)
    root: str = ""  # its folder; none: data/raw/NAME
    size: int = 256  # [8..2048] pixels a side; 32 for toy, 64 for --scale small
    split: Literal["official", "group", "paper"] = "official"  # official test set, else by patient or lesion; paper: the paper's own, which may leak
    fit: Literal["crop", "squash"] = "crop"  # make images square by a centre crop, or by squashing
    limit: int = 0  # [0..] at most so many images a split, drawn by class; 0: all
    skip_bad: bool = False  # leave out images that cannot be read, instead of stopping
    augment: str = ""  # of training images: hflip, vflip, rotate (30 degrees), strong (half of them moved, covered, of other contrast), joined by commas
    balanced: bool = False  # draw every class equally often in training; probabilities of the plain ResNet then take the classes' shares into account
    # --- model ---
    scale: Literal["paper", "small"] = "paper"  # the paper's sizes for a GPU, or minutes on a CPU; not given: small for toy data
    recipe: Literal["paper", "plus"] = "paper"  # as the paper says, or with this project's improvements; not given: plus at scale small
    pretrained: str = ""  # file of ImageNet weights (torchvision's keys) for the plain ResNet
    init: str = ""  # checkpoint of another run to start from (fine-tuning)
    # --- training ---
    epochs: int = 700  # [1..] passes over the training images
    pretrain_epochs: int = 0  # [0..] passes before them: of the plain ResNet alone
    batch_size: int = 128  # [2..] images a step, over all processes
    grad_accum: int = 1  # [1..] parts a batch is computed in, to save memory (2 images each at least)
    eval_batch_size: int = 128  # [1..] images at once when no gradient is needed; changes no result
    lr: float = 1e-4  # [0..] peak learning rate of Adam
    warmup: float = 0.001  # [0..1] share of the steps over which it rises, before a cosine to 0
    clip: float = 1.  # [0..] largest gradient norm; 0: no clipping
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
    backbone: Literal["unet", "dit"] = "unet"  # what denoises: a U-Net, or a DiT (512 epochs, at scale paper); the paper's fine-tuned Stable Diffusion is not here
    channels: int = 128  # [8..] of the U-Net's first level
    mult: str = "1,1,2,4,8"  # channels of each level, in multiples
    blocks: int = 2  # [1..] residual blocks a level
    attention: str = "8"  # downsampling factors at which there is attention
    head_channels: int = 64  # [1..] of an attention head
    patch: int = 4  # [1..] of the DiT: side of the square that is a token
    dim: int = 768  # [4..] of the DiT: entries of a token
    depth: int = 12  # [1..] of the DiT: blocks
    scale_shift: bool = False  # time and class scale and shift what the U-Net's group norms give (AdaGN), instead of being added before them
    late_class: bool = False  # the class enters the U-Net's decoder alone, so that one encoding serves all classes
    wavelet: bool = True  # the network sees one level of Haar wavelets: half the sides, four times the channels; not of latents
    autoencoder: str = ""  # diffuse an autoencoder's latents: its file, latent-diffusion's keys or diffusers', or a Mediffusion run's autoencoder.pt
    latent_scale: float = 0.  # [0..] latents are multiplied by it; 0: to unit spread, measured
    prediction: Literal["v", "eps"] = "v"  # what the network predicts
    loss_weight: Literal["none", "min-snr", "authors", "band"] = "none"  # of the error by log-SNR; band: where classes differ, around log-SNR -1
    levels: int = 1  # [1..] noise levels at which a training image is seen at once; each costs as much as another image
    class_dropout: float = 0.15  # [0..1] share of training images without their class, for guidance
    noise_d: int = 64  # [1..] pixels a side of the images whose noise levels are used; larger images are noised more
    precondition: bool = False  # the network adds to what the best linear denoiser predicts, and sees and predicts unit spread (Karras et al. 2022)
    time_scale: float = 1.  # [0..] the log-SNR, -19 to 15, is multiplied by it before its embedding (theirs: 1; --scale small: 20 in both recipes)
    votes: int = 501  # [1..] N, noise levels that an image is judged at, for which p is fitted: of fewer it is too sure; odd, where there are two classes
    val_votes: int = 3  # [1..] of them for the validation of an epoch
    judged: int = 0  # [0..] at most so many images of validation, and of test, drawn by class; 0: all
    stratified: bool = False  # one noise level in each N-th of the times, in random order, instead of independent ones; likewise over a training batch
    rule: Literal["majority", "mean", "elbo", "learned"] = "majority"  # votes; least mean error; weighted as the likelihood bound, or as fitted on validation
    prior: Literal["equal", "training"] = "equal"  # how frequent the learned rule takes the classes to be: equally, for balanced accuracy, or as in training
    stop: str = "none"  # none, exact (the leader cannot be caught), a probability such as 1e-3 (that the label still changes), ttest, stages 10:3,50:1: after 10 levels 3 classes, then one
    calibrate: bool = False  # fit the temperatures of the rules' probabilities on validation
    uncertainty: Literal["votes", "variance", "posterior", "entropy"] = "variance"  # what predictions are ranked by
    guidance: float = 4.5  # [0..] w of classifier-free guidance, where images are drawn
    draw_steps: int = 50  # [1..] of the reverse process
    start: float = 0.5  # [0..1] time to which explain noises an image before it is denoised again


SMALL = dict(size=64, epochs=10, batch_size=16, lr=4e-3, warmup=.1, ema=.99, width=8, channels=32, mult="1,1,2,2", attention="", head_channels=16, blocks=1,
             patch=2, dim=64, depth=6, votes=51, val_votes=9, judged=250, time_scale=20.)
PLUS = dict(levels=4, scale_shift=True, precondition=True, loss_weight="band", rule="learned", stratified=True, calibrate=True, uncertainty="entropy", select="auroc")
SAMPLING = ["device", "eval_batch_size", "amp", "votes", "stop", "rule", "prior", "uncertainty", "guidance", "draw_steps", "judged", "autoencoder",
            "skip_bad", "output"]   # what may change when a checkpoint is used
BY_DATA = {"toy": dict(size=32, augment="hflip,vflip"), "chexpert": dict(fit="squash"), "isic2020": dict(fit="squash")}
PANELS = [("Losses", "loss", ["diffusion", "resnet"]), ("Validation", "accuracy", ["val_accuracy", "val_resnet_accuracy"])]


def configure(**given):
    """The Config of a scale, recipe and data set; what is `given` wins. `train(configure(data="toy", seed=1))`. A DiT at scale paper: the authors' schedule."""
    config = run.configure(Config, given, SMALL, PLUS, BY_DATA)
    return run.configure(Config, dict(epochs=512, warmup=.0038) | given, SMALL, PLUS, BY_DATA) if (config.backbone, config.scale) == ("dit", "paper") else config


# ============================================================================= 4 the method
def logsnr(config, t, side):
    """log-SNR at times t in 0..1 (any shape) of images of `side` pixels as the network sees them; none is noised less than `noise_d`'s."""
    return shifted_cosine(t, config.noise_d, max(side, config.noise_d))


def diffuse(x, eps, l):
    """x, eps (B, ...), log-SNR l (B,) -> z, and the scales a, s of signal and noise (B, 1, 1, 1)."""
    a, s = (part.view(-1, 1, 1, 1) for part in alpha_sigma(l))
    return a * x + s * eps, a, s


def preconditioning(prediction, spread, l):
    """c_in, c_skip, c_out (B, C, 1, 1) of a prediction c_skip z + c_out network(c_in z) at log-SNR l (B,), as if the entries of x's channels were
    independent with root mean square `spread` (C, 1, 1): the linear least-squares prediction, and the spread of what it leaves (Karras et al. 2022, eq. 7)."""
    a, s = (part.view(-1, 1, 1, 1) for part in alpha_sigma(l))
    power = (a * spread) ** 2 + s ** 2                                  # of z
    skip, left = (a * s * (1 - spread ** 2), spread) if prediction == "v" else (s, a * spread)
    return power ** -.5, skip / power, left / power ** .5


def epsilon(config, out, z, a, s):
    """What the network says of z -> eps_hat, float32."""
    return s * z + a * out.float() if config.prediction == "v" else out.float()


def loss_weight(config, l):
    """w(l) of the squared error of what is predicted: of v, or of eps, whose error is a^2 times that of v; SNR = e^l."""
    snr, a2 = l.exp(), torch.sigmoid(l)
    ratio = a2 if config.prediction == "eps" else torch.ones_like(l)    # so that min-snr and authors mean the same for both
    return {"none": torch.ones_like(l), "min-snr": snr.clamp_max(5) / (1 + snr) / ratio, "authors": a2 / (1 + snr.clamp_max(5)) / ratio,
            "band": .05 + torch.exp(-((l + 1) / 4) ** 2)}[config.loss_weight]


def loss(nets, config, x, y):
    """The denoising loss of what the network sees, x (B, C, H, W), with labels y (B,) -> dict of scalars, and the error by tenths of t."""
    x, y = (part.repeat_interleave(config.levels, 0) for part in (x, y))
    t, eps = torch.rand(len(x), device=x.device), torch.randn_like(x)
    t = (torch.randperm(len(x), device=x.device) + t) / len(x) if config.stratified else t
    l = logsnr(config, t, x.shape[-1])
    z, a, s = diffuse(x, eps, l)
    c = torch.where(torch.rand(len(x), device=x.device) < config.class_dropout, nets.classes, y)            # nets.classes: the null token
    target = a * eps - s * x if config.prediction == "v" else eps
    error = (nets.denoise(z, l, c).float() - target).square().mean((1, 2, 3))
    tenth = F.one_hot((t * 10).long().clamp_max(9), 10).float()
    return {"diffusion": (loss_weight(config, l) * error).mean(), "error_by_t": torch.stack([(tenth * error.detach()[:, None]).sum(0), tenth.sum(0)])}


def train_step(nets, ema, config, batch, joint):
    """One batch -> dict of losses; "loss" is what is differentiated. joint=False: the plain ResNet alone."""
    losses = {}
    if nets.resnet is not None:                                         # the control: shares images, not weights
        losses["resnet"] = F.cross_entropy(nets.resnet(batch.x), batch.y)
    if joint:
        losses |= loss(nets, config, nets.encode(batch.x, batch), batch.y)
    return losses | {"loss": sum(losses[k] for k in ("resnet", "diffusion") if k in losses)}


def times(config, name):
    """The N times in 0..1 at which the image of this name is judged, (N,) float32; the same at every call."""
    rng = torch.Generator().manual_seed(run.seed_of(config.seed, "times", name))
    u = torch.rand(config.votes, generator=rng, dtype=torch.float64)
    return ((torch.randperm(config.votes, generator=rng) + u) / config.votes if config.stratified else u).float()


def errors(nets, config, x, t, eps, row, c):
    """Squared errors of eps (T, C, H, W), float32, of pairs of a row of x, t, eps (R, ...) and a class: row and c are (T,)."""
    l = logsnr(config, t, x.shape[-1])
    z, a, s = diffuse(x, eps, l)
    return (epsilon(config, nets.denoise(z, l, c, row), z[row], a[row], s[row]) - eps[row]).square()


# ----------------------------------------------------------------------------- rules: from errors (M, N, K), nan where a class was not asked
def rules(nets, config, error, alive, t):
    """{rule: probabilities (M, K)} of errors (M, N, K) at times t (M, N); a class that is not alive (M, K) was eliminated, and cannot win."""
    side, t = nets.shape[-1], torch.from_numpy(t).double()
    slope = shifted_cosine_slope(t, config.noise_d, max(side, config.noise_d)).numpy()[..., None]
    lower = (-mean_errors(error)).argsort(1).argsort(1) / error.shape[2]                # by mean error, the least is highest; it breaks ties of votes + 1/2
    differences = bucket_differences(error, logsnr(config, t, side).numpy())
    scores = {"majority": np.log(count_votes(error) + .5 + .1 * lower), "mean": mean_scores(error, alive), "elbo": mean_scores(error, alive, slope),
              "learned": (config.prior == "training") * np.log(nets.shares.cpu().numpy().clip(1e-9)) - np.einsum("j,mjk->mk", nets.weight.cpu().numpy(), differences)}
    for (rule, score), temperature in zip(scores.items(), nets.temperature.tolist()):
        best = np.where(alive, score, -np.inf).max(1, keepdims=True)
        p = np.exp((np.where(alive, score, np.minimum(score, best - 1e-6)) - best) / temperature)
        scores[rule] = p / p.sum(1, keepdims=True)
    return scores


def survivors(error, classes, config):
    """Which of the classes can still win, by an image's errors so far (n, K); the others are not asked any more. One left: the label is settled."""
    n, left = len(error), config.votes - len(error)
    if config.stop == "none" or left == 0:
        return classes
    votes, mean = count_votes(error[None])[0], error[:, classes].mean(0)
    if ":" in config.stop:                                              # Li et al. 2023
        keep = dict(map(int, part.split(":")) for part in config.stop.split(","))
        order = np.lexsort((mean, -votes[classes])) if config.rule == "majority" else mean.argsort()
        return np.sort(classes[order[:keep.get(n, len(classes))]])
    if config.stop == "ttest":                                          # Clark and Jaini 2023, algorithm 1
        best = classes[mean.argmin()]
        return np.array([k for k in classes if n < 20 or k == best or paired_p(error[:, k] - error[:, best]) > 2e-3])
    leader, *others = np.argsort(-votes, kind="stable")
    over = votes[leader] - votes[others[0]] > left if config.stop == "exact" else \
        sum(overtaken(int(votes[leader]), int(votes[k]), left) for k in others) < float(config.stop)
    return np.array([leader]) if over else classes


def stopped(error, config):
    """What would have been asked of a whole run's errors (M, N, K), had it been stopped as `config` says: errors with nan, and who is alive (M, K)."""
    kept, alive = np.full_like(error, np.nan), np.zeros(error[:, 0].shape, bool)
    for i, whole in enumerate(error):
        classes, n = np.arange(error.shape[2]), 0
        while n < len(whole) and len(classes) > 1:
            kept[i, n, classes] = whole[n, classes]
            n += 1
            classes = survivors(kept[i, :n], classes, config)
        alive[i, classes] = True
    return kept, alive


def draw(nets, config, x, labels, names, start=1.):
    """x (B, C, H, W), as the network sees it, noised to time `start` and denoised as the labels (B,) in `draw_steps` ancestral steps -> images
    uint8. Guidance: (1 + w) conditional - w unconditional. Where `names` (B) are equal, so is the noise."""
    l = logsnr(config, torch.linspace(start, 0, config.draw_steps + 1, dtype=torch.float64), x.shape[-1]).float().to(x.device)
    noise = (run.image_noise(config.seed, [f"{name} draw {i}" for name in names], x.shape[1:], x.device) for i in range(config.draw_steps + 1))
    z, *_ = diffuse(x, next(noise), l[0].expand(len(x)))
    for i in range(config.draw_steps):
        at, (a, s) = l[i].expand(len(x)), alpha_sigma(l[i])
        eps = epsilon(config, nets.denoise(z, at, labels), z, a, s)
        if config.guidance:
            eps = eps + config.guidance * (eps - epsilon(config, nets.denoise(z, at, torch.full_like(labels, nets.classes)), z, a, s))
        x_hat = ((z - s * eps) / a).clamp(-nets.bound, nets.bound)
        z = logsnr_step(z, x_hat, next(noise), l[i], l[i + 1]) if i + 1 < config.draw_steps else x_hat
    return plots.to_uint8(nets.decode(z))


# ============================================================================= 5 networks
class Networks(nn.Module):
    """The denoiser, the plain ResNet, and how images become what is denoised: pixels, wavelets, or latents of a frozen autoencoder."""

    def __init__(self, config, channels, classes):
        super().__init__()
        self.classes, self.channels, self.time_scale = classes, channels, config.time_scale      # class number `classes`: the null token
        self.precondition = config.prediction if config.precondition else None
        self.resnet = ResNet(18, channels, classes, config.width, "small" if config.size < 100 else "imagenet",
                             bool(config.pretrained)) if config.baseline else None
        self.codec = Codec(config.autoencoder) if config.autoencoder else None
        self.wavelet, self.bound = config.wavelet and not self.codec, 5. if self.codec else 1.    # bound: of what is seen, for `draw`
        shrink = self.codec.net.multiple if self.codec else 1 + self.wavelet
        C, side = self.codec.latent if self.codec else channels * shrink ** 2, config.size // shrink
        self.shape = (C, side, side)                                     # of what is seen
        mult, attention = (tuple(int(n) for n in text.split(",") if n) for text in (config.mult, config.attention))
        multiple, self.late_class = (2 ** (len(mult) - 1) if config.backbone == "unet" else config.patch) * shrink, config.late_class
        if (low := config.size // multiple * multiple) != config.size:
            raise run.UserError(f"--size {config.size}: must be a multiple of {multiple}; take {f'{low} or ' * (low > 0)}{low + multiple}")
        if config.backbone == "unet":
            self.denoiser = UNet(C, C, config.channels, mult, config.blocks, attention, config.head_channels, classes + 1, late_class=config.late_class, scale_shift=config.scale_shift)
        else:
            self.denoiser = DiT(C, C, side, config.patch, config.dim, config.depth, max(1, config.dim // config.head_channels), classes + 1)
        buffers = dict(spread=torch.ones(C, 1, 1), weight=torch.zeros(BUCKETS), temperature=torch.ones(4),      # of what is seen; learned; of each rule
                       shares=torch.ones(classes) / classes,                            # of the classes in training
                       latent_scale=torch.tensor(config.latent_scale or 1.), codec_id=torch.tensor(self.codec.id if self.codec else 0))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def denoise(self, z, l, c, row=None):
        """The prediction for z (B, C, H, W), log-SNR l (B,), class c (B,); given row, for pairs of a row (T,) of z and l, encoded once if late, and c (T,)."""
        t, row = l * self.time_scale, slice(None) if row is None else row
        enter, skip, scale = preconditioning(self.precondition, self.spread, l) if self.precondition else (1, None, None)
        x = enter * z
        out = self.denoiser.decode([f[row] for f in self.denoiser.encode(x, t)], t[row], c) if self.late_class else self.denoiser(x[row], t[row], c)
        return skip[row] * z[row] + scale[row] * out if self.precondition else out

    @torch.no_grad()
    def encode(self, x, batch=None):
        """Images (B, channels, H, W) -> what the denoiser sees. Latents of a training batch are computed once an image and way of flipping it."""
        if not self.codec:
            return haar(x) / 2 if self.wavelet else x
        self.codec.check(self.codec_id)
        turned = batch is None or batch.variant is None or (batch.variant < 0).any()
        return self.codec.encode(x, () if turned else (batch.index * 4 + batch.variant).tolist()) * self.latent_scale

    @torch.no_grad()
    def decode(self, x):
        """What the denoiser sees -> images (B, channels, H, W)."""
        if not self.codec:
            return unhaar(2 * x) if self.wavelet else x
        self.codec.check(self.codec_id)
        return self.codec.decode(x / self.latent_scale, self.channels)


def build(config, facts):
    """The networks for a data set's facts (channels, classes, multilabel; run.load_model), in training mode. Refuses what the method cannot take."""
    if facts["multilabel"]:
        raise run.UserError(f"--data {config.data}: has several labels an image, {METHOD} takes one; name a single-label data set")
    if config.pretrain_epochs and not config.baseline:
        raise run.UserError(f"--pretrain-epochs {config.pretrain_epochs} --no-baseline: there is no plain ResNet to train before the diffusion; leave one out")
    if len(facts["classes"]) == 2 and config.votes % 2 == 0:
        raise run.UserError(f"--votes {config.votes}: two classes could draw; take an odd number, such as {config.votes + 1}")
    if config.late_class and config.backbone == "dit":
        raise run.UserError("--backbone dit --late-class: a DiT has no decoder that the class could enter alone; leave one out")
    number, pair = r"0?\.\d*[1-9]\d*|[1-9](\.\d+)?e-\d+", r"[1-9]\d*:[1-9]\d*"
    if not re.fullmatch(f"none|exact|ttest|{number}|{pair}(,{pair})*", config.stop):
        raise run.UserError(f"--stop {config.stop}: take none, exact, a probability such as 1e-3, ttest, or stages such as 10:3,50:1")
    settles = config.rule if config.stop == "none" else "mean" if config.stop == "ttest" or ":" in config.stop and config.rule != "majority" else "majority"
    if settles != config.rule:
        raise run.UserError(f"--stop {config.stop} --rule {config.rule}: stops where the label of the {settles} is settled; add --rule {settles}")
    if config.prior != "equal" and config.rule != "learned":
        raise run.UserError(f"--prior {config.prior} --rule {config.rule}: only the learned rule has probabilities that it could change; add --rule learned")
    try:
        nets = Networks(config, facts["channels"], len(facts["classes"]))
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as fault:
        said = " ".join(f"--{k} {getattr(config, k)}" for k in (("mult", "attention", "channels") if config.backbone == "unet" else ("patch", "dim", "depth")))
        raise run.UserError(f"{said} --head-channels {config.head_channels}: no network can be made of these ({fault})") from None
    if nets.codec and nets.codec.channels == 1 and facts["channels"] == 3:
        raise run.UserError(f"--autoencoder {config.autoencoder}: is one of gray images; colour images need one of colour images")
    return nets


def initialise(nets, data, config):
    """Measures the spread of what is diffused on some training images; loads ImageNet weights and those of another run, where asked for."""
    nets.shares.copy_(torch.from_numpy(np.bincount(data.train.labels, minlength=nets.classes) / len(data.train)))
    if config.pretrained and nets.resnet is not None:
        run.load_pretrained(nets.resnet, config.pretrained)
    if nets.codec and not config.latent_scale or config.precondition:
        some = next(iter(Batches(data.train, min(256, len(data.train)), next(nets.parameters()).device, train=True, seed=config.seed)))
        x = torch.cat([nets.encode(x) for x in some.x.split(8)])
        if nets.codec and not config.latent_scale:
            nets.latent_scale.div_(x.std())
            x = x / x.std()
        nets.spread.copy_(x.square().mean((0, 2, 3))[:, None, None].sqrt().clamp_min(1e-3))
    if config.init:
        run.load_init(nets, config.init, METHOD, backbone=config.backbone, precondition=config.precondition, prediction=config.prediction)


def parameter_groups(nets, config):
    """AdamW's groups: name, parameters, peak learning rate, largest gradient norm (0: none)."""
    groups = {"resnet": nets.resnet, "diffusion": nets.denoiser}
    return [dict(name=name, params=list(net.parameters()), lr=config.lr, peak=config.lr, clip=config.clip, weight_decay=0.) for name, net in groups.items() if net]


def learning_rate(config, group, epoch):
    """A cosine from the peak to 0, times a linear warm-up."""
    begin = config.pretrain_epochs if group["name"] == "diffusion" else 0
    done = max(0., epoch - begin) / (config.pretrain_epochs + config.epochs - begin)
    return group["peak"] * (min(1., done / config.warmup) if config.warmup else 1.) * (1 + math.cos(math.pi * done)) / 2


# ============================================================================= 6 evaluation
def seen(nets, image, device):
    """An image uint8 (channels, H, W) as the network sees it, (1, C, H, W)."""
    return nets.encode(torch.from_numpy(image[None].astype(np.float32) / 127.5 - 1).to(device))


@torch.no_grad()
def judge(nets, config, split, device):
    """A whole split, over all processes: errors (M, N, K), nan where a class was not asked; classes that could still win (M, K); times (M, N).

    A batch holds as many images as it can take with all their classes, a level each (several, if none can be settled before its last); an image
    that is settled makes room for the next."""
    share, room = range(run.rank(), len(split), run.world()), max(1, config.eval_batch_size // nets.classes)
    t = np.array([times(config, name).numpy() for name in split.ids]).reshape(-1, config.votes)
    error, alive, done = np.full((*t.shape, nets.classes), np.nan), np.ones((len(split), nets.classes), bool), [0] * len(split)

    def settled():
        waiting, x = deque(share), {}                                   # x: of the images that are being judged
        while waiting or x:
            while waiting and len(x) < room:
                i = waiting.popleft()
                x[i] = seen(nets, split.images[i], device)
            levels = 1 if config.stop != "none" else min(max(1, room // len(x)), *(config.votes - done[i] for i in x))
            rows = [(i, j) for i in x for j in range(done[i], done[i] + levels)]
            pairs = [(r, k) for r, (i, _) in enumerate(rows) for k in np.flatnonzero(alive[i])]
            eps = run.image_noise(config.seed, [f"{split.ids[i]} {j}" for i, j in rows], nets.shape, device)
            level = torch.from_numpy(t[tuple(zip(*rows))]).to(device)
            with run.autocast(config, device):
                found = errors(nets, config, torch.cat([x[i] for i, _ in rows]), level, eps, *torch.tensor(pairs, device=device).T)
            for (r, k), e in zip(pairs, found.sum(3).cpu().double().sum((1, 2)).tolist()):
                error[(*rows[r], k)] = e
            for i in list(x):
                done[i] += levels
                classes = survivors(error[i, :done[i]], np.flatnonzero(alive[i]), config)
                alive[i] = np.isin(np.arange(nets.classes), classes)
                if done[i] == config.votes or len(classes) == 1:
                    del x[i]
                    yield i
    deque(run.progress(settled(), "judge", total=max(1, len(share))), 0)         # all of them; error and alive are filled
    rows = run.gather({"error": error[share], "alive": alive[share]})
    return rows["error"], rows["alive"], t


@torch.no_grad()
def evaluate(nets, split, config, device, joint=None):
    """Every model on a whole split: ({model: probabilities (M, K)}, {kind: uncertainty (M,)}); the method, by its rule, comes first.
    joint: True or False while training (`val_votes` levels, by majority), None at the end."""
    nets.eval()
    if joint is not None:
        config = dataclasses.replace(config, votes=config.val_votes, stop="none", rule="majority")
    error, alive, t = judge(nets, config, split, device)
    nets.votes, found, rows = count_votes(error), rules(nets, config, error, alive, t), []
    if joint is None and run.rank() == 0:
        print(f"network calls an image: {(~np.isnan(error)).sum((1, 2)).mean():.1f} of {config.votes} noise levels x {nets.classes} classes", flush=True)
    predictions = {METHOD: found[config.rule]}
    if joint is None and config.stop == "none":                         # errors of a run that stops early are of use to its own rule alone
        predictions |= {f"rule {rule}": p for rule, p in found.items() if rule != config.rule}
    if nets.resnet is not None:                                         # of balanced training: back to the classes' shares
        shift = ((nets.classes * nets.shares) ** config.balanced).log()
        for batch in Batches(split, config.eval_batch_size, device, rank=run.rank(), world=run.world()):
            with run.autocast(config, device):
                rows.append((nets.resnet(batch.x).float() + shift).softmax(1).cpu().numpy().astype(np.float64))
        predictions |= run.gather({"resnet": np.concatenate([np.empty((0, nets.classes)), *rows])})
    return predictions, uncertainties(error, predictions[METHOD])


def uncertainties(error, p):
    """{kind: (M,)}, a kind of --uncertainty each. With q the shares of the votes: 1 - q of the class predicted; half the sum of q (1 - q), for two
    classes the variance of a vote; the chance, by the votes, that a longer run would have its strongest rival in front; entropy of p over log K."""
    votes, mine = count_votes(error), np.eye(p.shape[1], dtype=bool)[p.argmax(1)]
    q = votes / votes.sum(1, keepdims=True)
    posterior = np.array([below_half(int(a), int(b)) for a, b in zip(votes[mine], np.where(mine, 0, votes).max(1))])
    return {"votes": 1 - q[mine], "variance": (q * (1 - q)).sum(1) / 2, "posterior": posterior,
            "entropy": -(p * np.log(p.clip(1e-30))).sum(1) / np.log(p.shape[1])}


@torch.no_grad()
def calibrate(nets, split, config, device):
    """Fits the learned rule's weights to a validation split and, with --calibrate, the other rules' temperatures. `measure` uses its errors."""
    whole, began = dataclasses.replace(config, stop="none"), time.monotonic()
    error, alive, t = judge(nets, whole, split, device)
    differences = bucket_differences(error, logsnr(config, torch.from_numpy(t).double(), nets.shape[-1]).numpy())
    nets.validation = error, alive, t, differences, (time.monotonic() - began) / len(split)
    nets.weight[:], nets.temperature[:] = fit(differences, split.labels), 1
    if config.calibrate:                                                # all but the learned rule, whose fit has made it calibrated
        for i, p in enumerate(list(rules(nets, whole, error, alive, t).values())[:3]):
            nets.temperature[i] /= metrics.sharpness(split.labels, p)


def measure(nets, data, config, device, figures):
    """On validation, of the errors that `calibrate` found (rule learned: that it was fitted to): accuracy of each rule by number of levels; what share of the network's calls each way to
    stop needs, and how often it gives the label of the whole run; pictures of the rules, and of the errors by log-SNR."""
    (error, alive, t, differences, seconds), labels, table, stops = nets.validation, data.val.labels, [], {}
    for n in [n for n in (1, 3, 5, 11, 25, 51, 101, 251) if n < config.votes] + [config.votes]:
        found = {rule: p.argmax(1) for rule, p in rules(nets, config, error[:, :n], alive, t[:, :n]).items()}
        table.append({"votes": n, **{rule: metrics.accuracy(labels, label) for rule, label in found.items()}})
    for stop, rule in (("exact", "majority"), ("1e-4", "majority"), ("1e-3", "majority"), ("1e-2", "majority"), ("ttest", "mean")):
        kept, left = stopped(error, dataclasses.replace(config, stop=stop, rule=rule))
        same = rules(nets, config, kept, left, t)[rule].argmax(1) == found[rule]       # found: of the last row, all levels
        stops[stop] = {"share_of_calls": float((~np.isnan(kept)).mean()), "same_label": float(same.mean())}
    plots.line_chart(figures / "rules.png", {rule: ([row["votes"] for row in table], [row[rule] for row in table]) for rule in found},
                     "Accuracy on validation, to which learned is fitted", "noise levels an image", "accuracy")
    plots.line_chart(figures / "errors.png", {name: (np.arange(-9, 10, 2), differences[labels == k, :, k].mean(0)) for k, name in enumerate(data.classes) if (labels == k).any()},
                     "How much less the true class errs, by noise", "log-SNR: noise to the left", "squared error - mean of all classes'")
    return {"validation": metrics.summary(labels, rules(nets, config, error, alive, t)[config.rule]), "validation_by_votes": table,
            "validation_by_stop": stops, "seconds_an_image": seconds, "bucket_weights": nets.weight.tolist(), "shares": nets.shares.tolist(),
            "calls_an_image": float((~np.isnan(stopped(error, config)[0])).sum((1, 2)).mean())}


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
def sample_command(checkpoint, label, n=16, output="", **given):
    """Draws n images of a class: a picture each, and all in one grid."""
    config, nets, facts, device = run.load_model(checkpoint, METHOD, Config, build, given)
    classes, k = facts["classes"], run.class_number(label, facts["classes"])
    if n < 1:
        raise run.UserError(f"-n {n}: 1 or more")
    ids, images = [f"{classes[k]}-{i:04d}" for i in range(n)], []
    for part in run.progress([ids[i:i + config.eval_batch_size] for i in range(0, n, config.eval_batch_size)], "draw"):
        with run.autocast(config, device):                              # at time 1 nothing is left of the zeros
            images += list(draw(nets, config, torch.zeros(len(part), *nets.shape, device=device), torch.full((len(part),), k, device=device), part))
    out = run.result_folder(output, checkpoint, "sample", config)
    run.save_images(out, ids, np.stack(images), classes[k])


@torch.no_grad()
def explain_command(checkpoint, paths=(), limit=0, output="", **given):
    """A picture an image, `limit` at most (0: all of `paths`; 8 of the test split if none): the image denoised as the most probable classes from the same
    noise; below, the evidence: where the second class errs more than the first; image and other classes minus the image denoised as the first."""
    config, nets, facts, device = run.load_model(checkpoint, METHOD, Config, build, given)
    split, problems = run.to_explain(sys.modules[__name__], config, facts, paths, limit)
    classes, out = facts["classes"], run.result_folder(output, checkpoint, "explain", config)
    error, alive, t = judge(nets, config, split, device)
    p, votes = rules(nets, config, error, alive, t)[config.rule], np.stack([count_votes(error[:, :n]) for n in range(1, config.votes + 1)], -1)
    for i, (name, image) in enumerate(zip(split.ids, split.images)):
        best, second, *_ = shown = np.argsort(-p[i])[:3]
        x = seen(nets, image, device)
        with run.autocast(config, device):
            drawn = draw(nets, config, x.expand(len(shown), -1, -1, -1), torch.tensor(shown, device=device), [name] * len(shown), config.start)
            heat = evidence(nets, config, x, name, best, second)
        tiles = {f"image {name}": plots.overlay(image)}
        tiles |= {f"denoised as {classes[k]}, p {p[i, k]:.3f}": plots.overlay(picture) for k, picture in zip(shown, drawn)}
        tiles[f"evidence for {classes[best]} against {classes[second]}: orange for, blue against"] = plots.signed(heat)
        for what, picture in zip(["image minus denoised as", *[f"{classes[k]} minus" for k in shown[1:]]], [image, *drawn[1:]]):
            difference = picture.mean(0) - drawn[0].mean(0)
            tiles[f"{what} {classes[best]}: orange lighter, blue darker, by {np.abs(difference).max():.0f} of 255 at most"] = plots.signed(difference)
        plots.explanation(out / f"{i:04d}-{run.file_name(name)}.png", f"{classes[best]}{f' (true: {classes[split.labels[i]]})' * bool(split.labels[i] >= 0)}, by --rule {config.rule}", tiles,
                          [(dict(zip(classes, ((np.arange(1, config.votes + 1), v) for v in votes[i]))), "Votes as they come in", "noise levels", "votes")],
                          [f"votes of {votes[i, :, -1].sum():.0f} noise levels: " + ", ".join(f"{c} {v:.0f}" for c, v in zip(classes, votes[i, :, -1]))], len(shown) + 1)
    print(*problems, f"pictures: {out}   (not for clinical use)", sep="\n")


def evidence(nets, config, x, name, best, other):
    """(H, W), as the network sees it: how much more the class `other` errs at each place than `best`, mean over all N levels, whatever --stop. Sums to
    the difference of their mean errors; the other rules weigh the levels otherwise, and may decide against it."""
    total, t = 0, times(config, name).to(x.device)
    for part in torch.arange(config.votes).split(max(1, config.eval_batch_size // 2)):
        eps = run.image_noise(config.seed, [f"{name} {j}" for j in part.tolist()], nets.shape, x.device)
        row, c = torch.arange(len(part), device=x.device).repeat(2), torch.tensor([best, other], device=x.device).repeat_interleave(len(part))
        of_best, of_other = errors(nets, config, x.expand(len(part), -1, -1, -1), t[part], eps, row, c).sum(1).chunk(2)
        total = total + (of_other - of_best).sum(0)
    return (total / config.votes).cpu().numpy()


def main(argv=None):
    """The command line; returns the exit code. `train`, `eval` and `predict` are those of every method: common/run.py."""
    label = {"--label": dict(required=True, help="class to draw, by name or number"), "-n": dict(type=int, default=16, metavar="N", help="how many; default 16")}
    limit = {"--limit": dict(type=int, default=0, metavar="N", help="at most so many pictures; default: all images given, or 8 of the test split")}
    return run.command_line(argv, sys.modules[__name__], {
        "sample": (sample_command, ["seed", *SAMPLING], "Draw images of a class.", label),
        "explain": (explain_command, ["data", "root", "split", "start", *SAMPLING], "Show why: the image as every class, and where the classes' errors differ.", limit)})


if __name__ == "__main__":
    sys.exit(main())
