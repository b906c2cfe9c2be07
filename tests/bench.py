"""Speed as ratios, both sides in one run: `python -m tests.bench [--only ROW ...] [--device cuda] [--quick] [--write]`.

Ours beside the authors' arrangement (tests/authors.py), over the same weights, threads, dtype and images; what an evaluation does
runs under no_grad on both sides. --write keeps the record in tests/results/bench-DEVICE.json, whose table the README shows
(--table); --quick is a trial at small sizes. Machines are shared and noisy: times mean little, ratios more. Multiply-adds are counted,
not timed.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Callable, NamedTuple
from unittest import mock

from common import run  # before torch
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import diffclassifier
import diffmic
import mediffusion
import symmflow
from common.autoencoder import AutoencoderKL, Codec
from common.unet import UNet
from common.votes import overtaken
from data import Batches, Split, cache
from data.batches import Batch
from tests import authors

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
VOTES = RESULTS / "diffclassifier-votes.npz"                            # of 300 toy images: what `stops` reads
JUDGED = RESULTS / "mediffusion-counterfactuals.json"                   # what both ways of removing do to the judge's answer


class Setting:
    """What every row measures: networks at the paper's sizes, images, device; --quick: at small ones."""

    def __init__(self, device, quick):
        self.device, self.quick = torch.device(device), quick
        self.most = 256 if self.device.type == "cuda" else 8 if quick else 64      # images at once in prediction

    @functools.cached_property
    def diffmic(self):
        """(config, networks, images, labels) of DiffMIC."""
        given = dict(size=64, width=8, guide_depth=18, hidden=64, steps=10) if self.quick else {}
        config = diffmic.configure(data="ham10000", baseline=False, device=str(self.device), **given)
        return self.made(diffmic, config, dict(channels=3, classes=list("ABCDEFG"), multilabel=False), 8 if self.quick else 32, config.size)

    @functools.cached_property
    def symmflow(self):
        """The same of MedSymmFlow: the paper's pixels of 32 x 32, 64 channels."""
        config = symmflow.configure(data="bloodmnist", baseline=False, device=str(self.device), **dict(channels=8) if self.quick else {})
        return self.made(symmflow, config, dict(channels=3, classes=list("ABCDEFGH"), multilabel=False), 4 if self.quick else 64, config.size)

    @functools.cached_property
    def latents(self):
        """The same of its latent variant, with the label map on the latent grid and an autoencoder of random weights."""
        config, nets = latent_flow(self.device, **dict(size=64, channels=8) if self.quick else {})
        return config, run.place(nets, self.device), *self.images(4 if self.quick else 64, config.size)

    @functools.cached_property
    def diffclassifier(self):
        """(config, networks, Split) of the diffusion classifier's small networks: toy images of 32 x 32, 11 noise levels each."""
        config = diffclassifier.configure(data="toy", baseline=False, device=str(self.device), **dict(votes=3, channels=8) if self.quick else dict(votes=11))
        nets = self.made(diffclassifier, config, dict(channels=3, classes=list("ABCDE"), multilabel=False), 1, config.size)[1]
        n = 4 if self.quick else 32
        images = np.random.default_rng(0).integers(0, 256, (n, 3, config.size, config.size), np.uint8)
        return config, nets.eval(), Split(images, np.zeros(n, np.int64), [str(i) for i in range(n)])

    @functools.cached_property
    def mediffusion(self):
        """The same of Mediffusion's small networks: toy chests of 32 x 32, recipe plus."""
        given = dict(channels=8, head_channels=8, ae_width=8, edit_steps=3) if self.quick else {}
        config = mediffusion.configure(data="toy_xray", baseline=False, device=str(self.device), **given)
        torch.manual_seed(0)
        nets = run.place(mediffusion.build(config, dict(channels=1, classes=list("ABC"), multilabel=True)), self.device).eval()
        return config, nets, self.images(2 if self.quick else 16, config.size)[0][:, :1]

    def made(self, method, config, facts, n, size):
        torch.manual_seed(0)
        return config, run.place(method.build(config, facts), self.device), *self.images(n, size)

    def images(self, n, size):
        return torch.rand(n, 3, size, size, device=self.device) * 2 - 1, torch.arange(n, device=self.device) % 7

    def seconds(self, work, repeat=1):
        """Least of `repeat` times of work(), the device's queue emptied before and after."""
        times = []
        for _ in range(repeat):
            self.wait()
            began = time.perf_counter()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                work()
            self.wait()
            times.append(time.perf_counter() - began)
        return min(times)

    def both(self, ours, theirs, repeat):
        """Least of `repeat` times of each, taken in turns, after one of ours that is not counted: it takes the memory."""
        self.seconds(ours)
        pairs = [(self.seconds(ours), self.seconds(theirs)) for _ in range(repeat)]
        return tuple(min(times) for times in zip(*pairs))

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ============================================================================= rows: (ours, theirs) in seconds
def prediction(s):
    """One draw of every image, T = 250 reverse steps: guide, embedding, chain."""
    config, nets, x, _ = s.diffmic
    nets.eval()
    noise = torch.randn(len(x), 1, config.steps, 7, device=s.device)
    with torch.no_grad():
        s.seconds(lambda: nets.denoiser(*[torch.zeros(2, 7, device=s.device)] * 4, nets.encoder(x[:2]), torch.zeros(2, dtype=torch.long, device=s.device)))
        ours = lambda: diffmic.classify(nets, config, x, noise)
        first, theirs = s.seconds(ours), s.seconds(lambda: authors.predict(nets, config, x, noise[:, 0]))
        return min(first, s.seconds(ours)), theirs                      # theirs takes minutes: a neighbour comes and goes meanwhile


def training_step(s):
    """Forward and backward passes of guide, encoder and denoiser."""
    config, nets, x, y = s.diffmic
    batch = Batch(x, y, np.arange(len(x)))

    def ours():
        nets.zero_grad(set_to_none=True)
        nets.train()
        diffmic.train_step(nets, None, config, batch, True)["loss"].backward()

    def theirs():
        nets.zero_grad(set_to_none=True)
        authors.train_step(nets, config, x, y)
    found = s.both(ours, theirs, 2)
    nets.zero_grad(set_to_none=True)
    return found


def regions(s):
    """Six regions an image out of a 7 x 7 map, found and cut."""
    _, nets, x, _ = s.diffmic
    saliency, size, count, shape = torch.randn(len(x), 7, 7, 7, device=s.device), nets.guide.roi_size, 6, x.shape[2:]

    def theirs():
        return authors.crop(x, authors.find_rois(saliency, shape, size, count), size, red=False)

    def ours():
        return diffmic.crop(x, diffmic.find_rois(saliency, shape, size, count), size)
    assert s.quick or torch.equal(ours(), theirs())                     # the same boxes where they are whole cells
    if s.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")                         # ours must not make the host wait
        ours()
        torch.cuda.set_sync_debug_mode("default")
    return s.seconds(ours, 20), s.seconds(theirs, 20)


def photographs(folder, n):
    """n JPEGs of 600 x 450, about as hard to decode as photographs of skin."""
    rng, files = np.random.default_rng(0), [Path(folder) / f"{i}.jpg" for i in range(n)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((600, 450), Image.Resampling.BICUBIC)
        grain = Image.fromarray(rng.integers(0, 256, (450, 600, 3), np.uint8))
        Image.blend(coarse, grain, .08).save(file, quality=90)
    return files


class Photographs(torch.utils.data.Dataset):
    """What a torch DataLoader decodes."""

    def __init__(self, files, size, names):
        self.files, self.size, self.names = files, size, names

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return torch.tensor(square(self.files[i], self.size, self.names, np.random.default_rng([0, i]))).float() / 127.5 - 1


def epoch(s, names, loader=False):
    """An epoch of batches of 32 from the cache, beside decoding 600 x 450 JPEGs each time: by Pillow in as many threads as torch has, or by a
    DataLoader with two workers, which are there before the clock starts."""
    n, size = (32, 64) if s.quick else (512, 224)
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(folder, n)
        split = Split(np.stack([square(file, size) for file in files]), np.zeros(n, np.int64), [f.stem for f in files])
        workers = torch.utils.data.DataLoader(Photographs(files, size, names), 32, shuffle=True, num_workers=2, persistent_workers=True) if loader else None

        def ours():
            for batch in Batches(split, 32, s.device, True, 0, names):
                pass

        def theirs():
            if loader:
                return [batch.to(s.device) for batch in workers]
            rngs = [np.random.default_rng([0, i]) for i in range(n)]
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                for i in range(0, n, 32):
                    rows = list(pool.map(lambda j: square(files[j], size, names, rngs[j]), range(i, min(n, i + 32))))
                    (torch.from_numpy(np.stack(rows)).to(s.device).float() / 127.5 - 1)
        s.seconds(theirs)
        return s.seconds(ours, 9), s.seconds(theirs, 3)


def decoding(s):
    """The cache of 3,000 JPEGs, built by both cores and by one."""
    n, size = (32, 64) if s.quick else (3000, 224)
    with tempfile.TemporaryDirectory() as folder:
        files, builds = photographs(folder, n), itertools.count()

        def build(workers):
            with mock.patch.dict("os.environ", DIFFUSION_CLASSIFIERS_CACHE=f"{folder}/cache-{next(builds)}"):
                cache.load(files, size, 3, "crop", workers=workers)
        return s.both(lambda: build(2), lambda: build(1), 1 if s.quick else 2)


def start_up(s):
    """From the start of `python diffmic.py --data folder` on 100,000 images of 64 px to its first training step, in seconds: with the cache and without it."""
    n, rng = 64 if s.quick else 100_000, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(2):
            (Path(folder) / "data" / f"class{k}").mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64)).save(f"{folder}/data/class{i % 2}/{i}.png", compress_level=1)
        argv = ["--data", "folder", "--root", f"{folder}/data", "--scale", "small", "--size", "64", "--width", "8", "--no-baseline", "--device", str(s.device)]
        code = ("import sys, diffmic\n"
                "def stop(*given): raise diffmic.run.UserError('first step')\n"
                "diffmic.train_step = stop\n"
                "sys.exit(diffmic.main(sys.argv[1:]) - 2)")

        def started(run):
            subprocess.run([sys.executable, "-c", code, *argv, "--output", f"{folder}/run-{run}"], cwd=ROOT, check=True, capture_output=True,
                           env=os.environ | dict(DIFFUSION_CLASSIFIERS_CACHE=f"{folder}/cache"))
        cold = s.seconds(lambda: started(0))
        return s.seconds(lambda: started(1)), cold


def square(file, size, names=(), rng=None):
    """A JPEG decoded, cropped to its central square, resized, flipped and turned as the authors do -> uint8 (3, size, size)."""
    image = Image.open(file).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    if "hflip" in names and rng.random() < .5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "rotate" in names:
        image = image.rotate(rng.uniform(-30, 30), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def unet_pass(s, training):
    """MedSymmFlow's U-Net, 64 images of 32 x 32 at once: the forward pass, or forward and backward."""
    config, nets, x, y = s.symmflow
    z, t = torch.cat([x, nets.label_map(y, x.shape[2:])], 1), torch.rand(len(x), device=s.device)

    def work(forward):
        with torch.set_grad_enabled(training):
            out = forward(z, t).float().square().mean()
            if training:
                out.backward()
                nets.zero_grad(set_to_none=True)
    return s.both(lambda: work(nets.unet), lambda: work(lambda *given: authors.unet(nets.unet, *given)), 9)


def votes_of_images(s):
    """The diffusion classifier's errors of 32 images at 11 noise levels, as each of 5 classes; theirs of a few of them, scaled to 32."""
    config, nets, split = s.diffclassifier
    few = max(1, len(split) // 8)

    @torch.no_grad()
    def theirs():
        for image in split.images[:few]:
            eps = torch.randn(config.votes, *nets.shape, device=s.device)
            authors.reconstruction_errors(nets, config, diffclassifier.seen(nets, image, s.device), torch.rand(config.votes, device=s.device), eps)
    ours, each = s.both(lambda: diffclassifier.judge(nets, config, split, s.device), theirs, 3)
    return ours, each * len(split) / few


def settled_after(votes, K, stop):
    """Levels after which `stop` ends an image's votes (N,), and the class that is ahead there: what `survivors` of diffclassifier.py does, of all
    levels at once."""
    N = len(votes)
    counts = np.cumsum(np.eye(K, dtype=int)[votes], 0)                  # (N, K) after 1 .. N levels
    order = np.argsort(-counts, 1, kind="stable")
    ranked = np.take_along_axis(counts, order, 1)
    for n in range(1, N):
        a, *others = ranked[n - 1].tolist()
        over = a - others[0] > N - n if stop == "exact" else sum(overtaken(a, b, N - n) for b in others) < float(stop)
        if over:
            return n, order[n - 1, 0]
    return N, order[-1, 0]


def stops(s, stop):
    """Network calls an image until the vote of N = 501 levels is settled, and in how many cases with the label of them all: votes of 300 toy
    images, kept by `python -m tests.claims`, in 100 random orders."""
    with np.load(VOTES) as file:
        votes, K = file["votes"], int(file["classes"])
    rng, found = np.random.default_rng(0), []
    for image in votes[:20] if s.quick else votes:
        whole = np.argsort(-np.bincount(image, minlength=K), kind="stable")[0]
        for _ in range(2 if s.quick else 100):
            n, label = settled_after(rng.permutation(image), K, stop)
            found.append((n, label == whole))
    calls, same = np.mean(found, 0)
    return K * calls, K * votes.shape[1], {"same_label": same}


def removal(s):
    """A finding removed, from image to image: with our control, whose latents the guided ones are compared to; theirs has none. The judge's Diff of both
    is the mean over the findings, from the record of `python -m tests.claims --counterfactuals`."""
    config, nets, x = s.mediffusion
    T, label, names = 5 if s.quick else mediffusion.Config.remove_start, torch.zeros(len(x), dtype=torch.long, device=s.device), [str(i) for i in range(len(x))]
    noise = torch.randn(T + 1, len(x), *nets.shape, device=s.device)
    with torch.no_grad():
        times = s.both(lambda: mediffusion.counterfactual(nets, config, x, label, False, names),
                       lambda: authors.remove(nets, x, noise, 0, mediffusion.Config.remove_scale), 1 if s.quick else 2)
    if not JUDGED.exists():
        return times
    arms = json.loads(JUDGED.read_text())["arms"]
    diff = [np.mean([row["judge"]["diff"] for what, row in arms[arm]["rows"].items() if what.startswith("remove") and "judge" in row])
            for arm in ("plus", "the paper's")]
    return *times, {"judge_diff": dict(zip(("ours", "theirs"), map(float, diff)))}


class NoFile(Codec):
    """An autoencoder of the paper's size with random weights, in place of one from a file."""

    def __init__(self, path):
        self.net, self.id, self.path, self.known, self.channels, self.latent = AutoencoderKL(), 0, path, {}, 3, 4


def latent_flow(device, **given):
    """MedSymmFlow's networks on a latent grid at the paper's size: 256 px, latents of 4 x 32 x 32, 128 channels."""
    config = symmflow.configure(**dict(data="bloodmnist", size=256, latent="grid", codes="onehot", autoencoder="none", channels=128,
                                       baseline=False, device=str(device)) | given)
    with mock.patch.object(symmflow, "Codec", NoFile), torch.device(device):
        nets = symmflow.build(config, dict(channels=3, classes=list("ABCDEFGH"), multilabel=False))
    nets.codec_id = torch.tensor(0)                                     # on the meta device too, where it has no value
    return config, nets


def multiply_adds(s=None):
    """Of one classification by the latent variant, counted at the paper's size without memory, in 10^9: ours with the label map on
    the latent grid, theirs with pictures of label maps."""
    config, nets = latent_flow("meta")
    with torch.device("meta"):
        theirs, x, codes = UNet(8, 8, 128, (1, 2, 2, 2), 2, {2}, 64), torch.empty(1, 3, 256, 256), torch.empty(8, 3)
        noise, grid = torch.empty(1, 4, 32, 32), torch.empty(1, 1, 8, 32, 32)
    counts = []
    for work in (lambda: symmflow.classify(nets, config, x, grid), lambda: authors.classify_latents(nets.codec.net, theirs, codes, x, noise)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops() / 2e9)
    return tuple(counts)


def late_class(s=None):
    """Multiply-adds of one noise level as two classes at the paper's size, counted without memory, in 10^9: encoded once, and for each class."""
    counts = []
    for late in (True, False):
        config = diffclassifier.configure(data="isic2020", baseline=False, late_class=late)
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            nets = diffclassifier.build(config, dict(channels=3, classes=["benign", "melanoma"], multilabel=False)).eval()
            x = torch.empty(1, *nets.shape)
            diffclassifier.errors(nets, config, x, torch.empty(1), x, torch.zeros(2, dtype=torch.long), torch.arange(2))
        counts.append(counter.get_total_flops() / 2e9)
    return tuple(counts)


ROWS = {                                                                # name: (work, what it is, aim for theirs / ours, unit)
    "prediction": (prediction, "DiffMIC: prediction of 32 images, 224 px, 250 steps, one draw", 10, "s"),
    "training step": (training_step, "DiffMIC: forward and backward passes of training, 32 images of 224 px", 1 / .7, "s"),
    "regions": (regions, "DiffMIC: six regions of 32 images, found and cut", None, "s"),
    "unet": (lambda s: unet_pass(s, False), "MedSymmFlow: U-Net, 64 channels, 64 images of 32 px", 1, "s"),
    "unet, training": (lambda s: unet_pass(s, True), "MedSymmFlow: the same, forward and backward", 1, "s"),
    "multiply-adds": (multiply_adds, "MedSymmFlow: multiply-adds of one latent classification, 256 px", 5, "G"),
    "votes": (votes_of_images, "diffusion classifier: errors of 32 toy images, 11 noise levels, 5 classes", 2, "s"),
    "late class": (late_class, "diffusion classifier: multiply-adds of a noise level as two classes, `--late-class`, 256 px", None, "G"),
    "stop 1e-3": (lambda s: stops(s, "1e-3"), "diffusion classifier: network calls an image, `--stop 1e-3`", None, "calls"),
    "stop 3e-3": (lambda s: stops(s, "3e-3"), "diffusion classifier: network calls an image, `--stop 3e-3`", 4, "calls"),
    "stop exact": (lambda s: stops(s, "exact"), "diffusion classifier: network calls an image, `--stop exact`", None, "calls"),
    "removal": (removal, "Mediffusion: a finding removed from 16 toy chests, 300 steps of the authors'", 3, "s"),
    "epoch": (lambda s: epoch(s, ()), "epoch of 512 images of 224 px, not augmented", 10, "s"),
    "epoch, augmented": (lambda s: epoch(s, ("hflip", "rotate")), "epoch of 512 images of 224 px, flips and rotation", 4, "s"),
    "loader": (lambda s: epoch(s, (), True), "the same epoch, beside a torch DataLoader with two workers", 5, "s"),
    "loader, augmented": (lambda s: epoch(s, ("hflip", "rotate"), True), "the same with flips and rotation", 2, "s"),
    "decoding": (decoding, "the cache of 3,000 JPEGs of 600 x 450, built by two cores, beside one", 1.7, "s"),
    "start-up": (start_up, "from the command to its first step, 100,000 images of 64 px in the cache, beside an empty one", None, "s"),
}


# ============================================================================= the full size, on its own
class Full(NamedTuple):
    """What `full_size` measures of a method at its paper's size."""
    method: ModuleType
    config: object
    nets: torch.nn.Module
    batches: list                       # taken in turn: not every step need do the same
    predict: Callable                   # work() under no_grad
    images: float                       # how many images that classifies
    joint: bool = True                  # False: the stage before


def batch_of(x, y, few=None, step=0):
    return Batch(x, y, np.arange(len(x)), np.zeros(len(x), int), (0, step, 10 ** 6), few)


def full_diffmic(s):
    config, nets, x, y = s.diffmic
    many = x.repeat(s.most // len(x), 1, 1, 1)
    noise = torch.randn(len(many), 1, config.steps, 7, device=s.device)
    return Full(diffmic, config, nets, [batch_of(x, y)], lambda: diffmic.classify(nets, config, many, noise), len(many))


def full_symmflow(s):
    config, nets, x, y = s.latents
    many = x.repeat(s.most // len(x), 1, 1, 1)
    noise = torch.randn(len(many), 1, *nets.shapes(config.size)[1], device=s.device)
    return Full(symmflow, config, nets, [batch_of(x, y)], lambda: symmflow.classify(nets, config, many, noise), len(many))


def full_votes(s, backbone):
    """The diffusion classifier: 256 px as 12 x 128 x 128 wavelets, two classes. Prediction: N = 501 levels as each class."""
    config = diffclassifier.configure(data="isic2020", baseline=False, device=str(s.device), backbone=backbone,
                                      **dict(size=32, channels=8, dim=64, depth=1) if s.quick else {})
    config, nets, x, y = s.made(diffclassifier, config, dict(channels=3, classes=["benign", "melanoma"], multilabel=False), 4 if s.quick else 128, config.size)
    z, t = nets.encode(x), torch.rand(len(x), device=s.device)
    pairs = [torch.arange(len(x), device=s.device).repeat(2), torch.arange(2, device=s.device).repeat_interleave(len(x))]
    return Full(diffclassifier, config, nets, [batch_of(x, y % 2)], lambda: diffclassifier.errors(nets, config, z, t, torch.randn_like(z), *pairs).sum((1, 2, 3)),
                len(x) / config.votes)


def full_mediffusion(s, joint):
    """Mediffusion: 64 images and 32 with labels, every fourth step classifies; or its autoencoder with the GAN."""
    config = mediffusion.configure(data="chestxray14", baseline=False, device=str(s.device), **dict(size=64, channels=8, head_channels=8, ae_width=8) if s.quick else {})
    config, nets, x, _ = s.made(mediffusion, config, dict(channels=1, classes=list("ABCDEFGHIJKLMN"), multilabel=True), 4 if s.quick else 64, config.size)
    x, y = x[:, :1].contiguous(), torch.zeros(len(x), 14, device=s.device)
    few = batch_of(x[::2], y[::2])
    batches = [batch_of(x, y, few, step).split(1)[0]._replace(place=(joint * config.pretrain_epochs, step, 10 ** 6)) for step in range(60000, 60004 if joint else 60001)]
    answer = next(iter(mediffusion.models(nets, config).values()))
    return Full(mediffusion, config, nets, batches, lambda: answer(x, [str(i) for i in range(len(x))]), len(x), joint)


FULL_SIZE = {                                                           # name: (make, what it is, images that the paper's schedule sees)
    "full size": (full_diffmic, "DiffMIC, 224 px (HAM10000, 1,000 epochs)", 1000 * 7010),
    "full size, latents": (full_symmflow, "MedSymmFlow, latents of 256 px (BloodMNIST, 1,000 epochs)", 1000 * 11959),
    "full size, unet": (lambda s: full_votes(s, "unet"), "diffusion classifier, U-Net, 256 px (CheXpert, 700 epochs)", 89600 * 128),
    "full size, dit": (lambda s: full_votes(s, "dit"), "diffusion classifier, DiT-B/4, 256 px (CheXpert, 512 epochs)", 65536 * 128),
    "full size, autoencoder": (lambda s: full_mediffusion(s, False), "Mediffusion's autoencoder with its GAN, 256 px (300,000 steps)", 300000 * 64),
    "full size, joint": (lambda s: full_mediffusion(s, True), "Mediffusion, latents of 256 px and 32 labelled (200,000 steps)", 200000 * 64),
}


def full_size(s, make, seconds=None):
    """Throughput at the paper's size: whole training steps and predictions, images a second, share of the device's measured peak, memory; and in how many
    parts (--grad-accum) a step fits a card of 24 GB. How long a training waits for its data stands in its log.jsonl: data_seconds of seconds."""
    cuda = s.device.type == "cuda"
    seconds = seconds or (4. if cuda else 30.)
    method, config, nets, batches, predict, images, joint = make(s)
    ema = copy.deepcopy(nets)
    optimizer = torch.optim.AdamW(method.parameter_groups(nets, config), fused=True)

    def losses(batch, parts):
        for part in batch.split(parts):
            with run.autocast(config, s.device):
                loss = method.train_step(nets, ema, config, part, joint)["loss"]
            (loss * len(part.y) / len(batch.y)).backward()

    def step(parts):
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            losses(batch, parts)
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], group["clip"] or torch.inf)
            optimizer.step()
            run.update_ema(ema, nets, config.ema, 10 ** 6)

    def memory(work):
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan

    def many(work, repeat=20):
        first = s.seconds(work)
        k = max(1, min(repeat, int(seconds / max(first, 1e-3))))
        return s.seconds(lambda: [work() for _ in range(k)]) / k
    nets.train()
    parts, found = 1, {}
    while True:                                                         # all at once, where the device's memory allows it
        try:
            found["train memory GB"] = memory(lambda: step(parts))      # latents are computed once a training: here
            break
        except torch.OutOfMemoryError:
            parts *= 2
    with FlopCounterMode(display=False) as count:
        for batch in batches:
            losses(batch, parts)
    train, most = many(lambda: step(parts)) / len(batches), peak(s)
    flops = count.get_total_flops() / len(batches) / train
    found |= {"batch": len(batches[0].y), "grad accum": parts, "train images/s": len(batches[0].y) / train, "train TFLOP/s": flops / 1e12, "peak TFLOP/s": most / 1e12,
              "share of peak": flops / most}
    while cuda and (used := memory(lambda: step(parts))) > 22 and parts < len(batches[0].y) // 2:
        parts *= 2
    if cuda:
        found |= {"24 GB: grad accum": parts, "24 GB: train memory GB": used}
    nets.eval()
    with torch.no_grad():
        found["prediction memory GB"] = memory(predict)
        found["prediction ms an image"] = 1e3 * many(predict) / images
    return {k: v for k, v in found.items() if v == v}


def peak(s):
    """FLOP/s of one large matrix product in the dtype that training uses: the device's peak, as measured."""
    n = 8192 if s.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=s.device, dtype=torch.bfloat16 if s.device.type == "cuda" else torch.float32)
    s.seconds(lambda: a @ a)
    return 2 * n ** 3 / s.seconds(lambda: a @ a, 10)


# ============================================================================= record and table
def machine(s):
    if s.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of a shared {platform.machine()} CPU"


def table(record):
    lines = [f"| {record['machine']}, {record['dtype']} | ours | beside it | ratio | aim |", "|---|---|---|---|---|"]
    for name, row in record["rows"].items():
        _, what, aim, unit = ROWS[name]
        more = f", {100 * row['same_label']:.2f} % the same label" if "same_label" in row else ""
        more += "; the judge's answer {ours:+.2f} and {theirs:+.2f}".format(**row["judge_diff"]) if "judge_diff" in row else ""
        ours, theirs = (f"{row[side]:,.0f}" if row[side] >= 1000 else f"{row[side]:.3g}" for side in ("ours", "theirs"))
        lines.append(f"| {what}{more} | {ours} {unit} | {theirs} {unit} | {row['theirs'] / row['ours']:.1f} | "
                     + (f"{aim:.1f} |" if aim else "|"))
    return "\n".join(lines)


def full_table(record):
    """The README's table of the full size: hours are the paper's schedule at the throughput measured, without validation."""
    lines = [f"| {record['machine']}, {record['dtype']} | batch | images/s in training | share of peak | GB | parts that fit 24 GB | prediction, ms an image | hours |",
             "|---|---|---|---|---|---|---|---|"]
    for name, (_, what, images) in FULL_SIZE.items():
        if row := record.get(name):
            each = row["prediction ms an image"]
            lines.append(f"| {what} | {row['batch']} | {row['train images/s']:.0f} | {100 * row['share of peak']:.0f} % | {row['train memory GB']:.0f} | "
                         f"{row['24 GB: grad accum']} | {each:,.{0 if each > 10 else 2}f} | {images / row['train images/s'] / 3600:.0f} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*ROWS, *FULL_SIZE])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    path = RESULTS / f"bench-{args.device.split(':')[0]}.json"
    if args.table:
        record = json.loads(path.read_text())
        return print(table(record), *[full_table(record)] * any(name in record for name in FULL_SIZE), sep="\n\n")
    if args.quick and args.write:
        parser.error("--quick is a trial: its numbers are no record; leave out --write")
    s = Setting(args.device, args.quick)
    record = {"command": f"python -m tests.bench --device {args.device} --write", "machine": machine(s), "torch": str(torch.__version__),
              "dtype": "bf16" if s.device.type == "cuda" else "float32", "rows": {}}
    if args.write and path.exists():
        record = json.loads(path.read_text()) | record | {"rows": json.loads(path.read_text())["rows"]}
    for name in args.only or ROWS:
        if name in FULL_SIZE:
            record[name] = full_size(s, FULL_SIZE[name][0]) | {"commit": run.commit()}
            print(name, json.dumps(record[name], indent=1), flush=True)
        else:
            ours, theirs, *more = ROWS[name][0](s)
            record["rows"][name] = {"ours": ours, "theirs": theirs, "commit": run.commit()} | (more[0] if more else {})
            print(f"{name:18} ours {ours:9.4f} {ROWS[name][3]}   theirs {theirs:9.4f} {ROWS[name][3]}   ratio {theirs / ours:6.2f}", flush=True)
        if args.write:
            path.write_text(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
