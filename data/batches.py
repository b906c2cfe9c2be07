"""Batches of a split: shuffled, augmented and scaled to [-1, 1] on the device, each a pure function of (seed, epoch, number)."""
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .splits import rarest
from .types import DataError

AUGMENTATIONS = ("hflip", "vflip", "rotate", "strong")


class Batch(NamedTuple):
    """Some images as the networks take them, and where they come from. With x, y and index alone it may be made by hand."""
    x: torch.Tensor                             # float32 (B, C, H, W) in [-1, 1]
    y: torch.Tensor                             # int64 (B,), or float32 (B, K) for multi-label data
    index: np.ndarray                           # int64 (B,): rows of the split
    variant: np.ndarray | None = None           # int64 (B,): 0 as it is, 1 left-right, 2 up-down, 3 both; -1 changed otherwise, too
    place: tuple = (0, 0, 1)                    # epoch, number in it, batches an epoch
    few: "Batch | None" = None                  # of a split with `few`: another batch, of images with a label

    def split(self, n):
        """n parts of nearly equal size, for gradient accumulation; fewer, where a part would have one image (batch norm)."""
        n = max(1, min(n, len(self.y) // 2, len(self.few.y) // 2 if self.few else n))
        return [Batch(*part) for part in zip(self.x.tensor_split(n), self.y.tensor_split(n), np.array_split(self.index, n),
                                           [None] * n if self.variant is None else np.array_split(self.variant, n), [self.place] * n,
                                           self.few.split(n) if self.few else [None] * n)]


class Batches:
    """Iterates over the rest of the epoch that batch number `start` (counted over all epochs) belongs to.

    train=True: every image once an epoch in an order drawn from (seed, epoch), in batches whose sizes differ by one at most
    (no image is dropped, none left alone for a batch norm to fail on); augmented. train=False: in order, as they are.
    augment: names out of "hflip", "vflip" (half of the images each), "rotate" (-30..30 degrees, bilinear, black outside) and "strong" (half: `strong`).
    balanced: draws each class equally often, with replacement (multi-label: by an image's rarest finding). rank, world: the share of one
    process out of several. A split with `few` = (rows, n, *names): to each batch belong n more of these rows, all of them in turn, augmented by
    these names as well; and of these draws speaks `balanced`. Raises DataError for other names.
    """

    def __init__(self, split, batch_size, device="cpu", train=False, seed=0, augment=(), balanced=False, start=0, rank=0, world=1):
        for option, names in ("augment", augment), ("few-augment", (split.few or ())[2:]):
            if unknown := set(names) - set(AUGMENTATIONS):
                raise DataError(f"--{option} {','.join(sorted(unknown))}: choose from {', '.join(AUGMENTATIONS)}")
        self.split, self.device, self.train, self.augment = split, torch.device(device), train, augment if train else ()
        self.seed, self.rank, self.world, n = seed, rank, world, len(split)
        self.count = max(1, min(math.ceil(n / batch_size), n // 2)) if train else math.ceil(len(range(rank, n, world)) / batch_size)
        self.epoch, self.start = divmod(start, self.count) if train else (0, start)
        self.few = None
        if train:
            rows, joining, *more = split.few or (np.arange(n), 0)
            self.augment_few = (*self.augment, *more)
            rng = np.random.default_rng([seed, 1, self.epoch])
            order = self._balanced_order(rng, rows, n) if balanced and not joining else rng.permutation(n)
            self.indices = [rows[rank::world] for rows in np.array_split(order, self.count)]
            if joining:
                rng, needed = np.random.default_rng([seed, 6, self.epoch]), self.count * joining
                order = self._balanced_order(rng, rows, needed) if balanced else \
                    np.concatenate([rng.permutation(rows) for _ in range(math.ceil(needed / len(rows)))])[:needed]
                self.few = [rows[rank::world] for rows in np.array_split(order, self.count)]
        else:
            self.indices = np.array_split(np.arange(rank, n, world), range(batch_size, len(range(rank, n, world)), batch_size))
        self.images = _resident(split, self.device)
        self.labels = torch.from_numpy(split.labels)

    def __len__(self):
        """Batches in a whole epoch."""
        return self.count

    def _balanced_order(self, rng, rows, n):
        labels = rarest(self.split.labels[rows])
        of_class = [rows[labels == k] for k in np.unique(labels)]
        return np.array([rng.choice(of_class[k]) for k in rng.integers(len(of_class), size=n)])

    def _fetch(self, index):
        if torch.is_tensor(self.images):
            return self.images[torch.from_numpy(index).to(self.device)]
        x = torch.from_numpy(np.ascontiguousarray(self.images[index]))
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def __iter__(self):
        with ThreadPoolExecutor(1) as reader:                                   # reads one batch ahead
            def read(number):
                return [reader.submit(self._fetch, of[number]) for of in (self.indices, self.few) if of is not None]
            waiting = read(self.start)
            for number in range(self.start, self.count):
                raw = [part.result() for part in waiting]
                if number + 1 < self.count:
                    waiting = read(number + 1)
                few = self._finished(raw[1], self.few[number], number, 7, self.augment_few) if self.few else None
                yield self._finished(raw[0], self.indices[number], number, 2, self.augment)._replace(few=few)

    def _finished(self, raw, index, number, purpose, names):
        rng = np.random.default_rng([self.seed, purpose, self.epoch, number, self.rank])
        flip, angle = draw_changes(names, len(raw), rng)
        if names and self.device.type == "cpu":
            # a few images at a time from bytes to floats, all of it in the cache
            x, step = torch.empty(raw.shape), max(1, 1250000 // raw[0].numel())
            for part in (slice(i, i + step) for i in range(0, len(raw), step)):
                x[part] = finish(raw[part], flip[part], angle[part])
        else:
            x = finish(raw, flip, angle)
        half = (rng.random(len(x)) < .5) & ("strong" in names)
        if half.any():
            x = torch.where(torch.from_numpy(half).to(x.device).view(-1, 1, 1, 1), strong(x, torch.Generator().manual_seed(int(rng.integers(2 ** 63)))), x)
        return Batch(x, self.labels[torch.from_numpy(index)].to(self.device), index, np.where((angle != 0) | half, -1, (flip < 0) @ [1, 2]),
                     (self.epoch, number, self.count))


def draw_changes(names, B, rng):
    """Of B images: left-right and up-down (B, 2), -1 where mirrored, else 1; angles (B,) in radians. All numbers come from `rng`."""
    flip = np.stack([np.where((name in names) & (rng.random(B) < .5), -1., 1.) for name in ("hflip", "vflip")], 1)
    return flip, rng.uniform(-np.pi / 6, np.pi / 6, B) * ("rotate" in names)


def mirrored(x, augment):
    """Images (B, C, H, W) as they are, then mirrored in each way that --augment has: a list of 1, 2 or 4; "", as text * False is, has none."""
    views = [x, x.flip(3)] if "hflip" in augment else [x]
    return views + [view.flip(2) for view in views] if "vflip" in augment else views


def finish(raw, flip, angle):
    """Images uint8 (B, C, H, W) -> float32 in [-1, 1], mirrored and turned."""
    return augment(raw.float(), flip, angle).sub_(127.5).div_(127.5)            # exactly -1 and 1 at the ends


def augment(x, flip, angle):
    """Images (B, C, H, W), 0 is black, mirrored and turned in one resampling."""
    if not angle.any():                                                         # exact, no resampling
        for column, dim in ((0, 3), (1, 2)):
            if (flip[:, column] < 0).any():
                x = torch.where(torch.from_numpy(flip[:, column] < 0).to(x.device).view(-1, 1, 1, 1), x.flip(dim), x)
        return x
    aspect = x.shape[3] / x.shape[2]
    cos, sin = np.cos(angle), np.sin(angle)
    theta = np.stack([cos * flip[:, 0], -sin / aspect * flip[:, 1], sin * aspect * flip[:, 0], cos * flip[:, 1]])
    a, b, c, d = torch.from_numpy(theta).float().to(x.device)[..., None]        # (B, 1) each
    u, v = (torch.arange(1, 2 * n, 2, device=x.device) / n - 1 for n in (x.shape[3], x.shape[2]))       # pixel centres in [-1, 1]
    grid = torch.empty(len(x), *x.shape[2:], 2, device=x.device)                # F.affine_grid's, as an outer sum
    torch.add((a * u)[:, None], (b * v)[..., None], out=grid[..., 0])
    torch.add((c * u)[:, None], (d * v)[..., None], out=grid[..., 1])
    return F.grid_sample(x, grid, align_corners=False)                          # what lies outside becomes black


def strong(x, generator):
    """A view of images (B, C, H, W) in [-1, 1] as FixMatch's second (Sohn et al. 2020): turned to 30 degrees, sheared and moved to .2, contrast and
    brightness changed by up to half, and a rectangle of up to half of either side made grey."""
    B, device = len(x), x.device
    draw = lambda low, high: (low + (high - low) * torch.rand(B, generator=generator)).to(device)
    angle, shear = draw(-math.pi / 6, math.pi / 6), draw(-.2, .2)
    turn = torch.stack([torch.stack([angle.cos(), shear - angle.sin(), draw(-.4, .4)], 1), torch.stack([angle.sin(), angle.cos(), draw(-.4, .4)], 1)], 1)
    x = F.grid_sample(x + 1, F.affine_grid(turn, x.shape, align_corners=False), align_corners=False) - 1        # black outside
    mean = x.mean((1, 2, 3), keepdim=True)
    of = lambda value: value.view(B, 1, 1, 1)
    x = ((x - mean) * of(draw(.5, 1.5)) + mean + of(draw(-.5, .5))).clamp(-1, 1)
    place = lambda side: ((torch.arange(side, device=device) - draw(0, side)[:, None]).abs() < (draw(0, .25) * side)[:, None])
    hole = place(x.shape[2])[:, None, :, None] & place(x.shape[3])[:, None, None, :]
    return x.masked_fill(hole, 0.)


def _resident(split, device):
    """The split's images on the GPU, uploaded once, if they take less than 40 % of its free memory; else where they are."""
    if device.type != "cuda":
        return split.images
    held = getattr(split, "_on_device", None)
    if held is None:
        if split.images.nbytes > .4 * torch.cuda.mem_get_info(device)[0]:
            return split.images
        held = split._on_device = torch.from_numpy(np.array(split.images)).to(device)
    return held
