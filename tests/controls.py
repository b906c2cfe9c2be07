"""What tests/claims.py sets beside the methods and no method contains: a ResNet-18 given as much time, several of them averaged, and FixMatch.
As recipe plus of three methods does, each looks at the mirror images that training shows, too, and fits a temperature on validation; its record has
the metrics of one view and of the last weights as well.

    python -m tests.claims --only resnet-retinamnist fixmatch-pneumoniamnist-0.1

They see the images, augmentation, sizes and width of the method they stand beside; the epoch is picked on validation.
"""
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from common import metrics
from common import run as running
from common.resnet import ResNet
from data import Batches, labelled, load_for, mirrored, shortcut
from data.batches import strong


@dataclass
class Control:
    """epochs: passes over the images with a label, or, where few are shown, so many `steps` in all. members: networks, whose probabilities are averaged,
    each of other weights and order. checks: times at which validation may pick the weights. fixmatch: images without a label join (Sohn et al. 2020),
    `ratio` for each with one; a guess surer than `sure` becomes its label. select: validation's metric that picks, nll the least, at its temperature."""
    epochs: int = 1
    steps: int = 0
    members: int = 1
    fixmatch: bool = False
    ratio: int = 3
    sure: float = .95
    weight: float = 1.
    batch_size: int = 32
    lr: float = 2e-3
    warmup: float = .1
    ema: float = .99
    checks: int = 12
    select: str = "nll"


def class_loss(logits, y):
    return F.binary_cross_entropy_with_logits(logits, y) if y.ndim == 2 else F.cross_entropy(logits, y)


def probabilities(net, split, device, augment=""):
    """(N, K), in float64: the mean over the image and its mirror images, those of `augment`."""
    answer = (lambda x: net(x).double().sigmoid()) if split.labels.ndim == 2 else (lambda x: net(x).double().softmax(1))
    net.eval()
    with torch.no_grad():
        return torch.cat([torch.stack([answer(x) for x in mirrored(batch.x, augment)]).mean(0).cpu() for batch in Batches(split, 128, device)]).numpy()


def sharpened(p, y, val):
    """Probabilities (N, K) at the temperature that suits those of validation, `val`, with labels y; of several labels each is a question of two answers."""
    two = (lambda q: np.stack([1 - q, q], -1).reshape(-1, 2)) if y.ndim == 2 else lambda q: q
    q = two(p) ** metrics.sharpness(y.ravel().astype(int), two(val))
    q /= q.sum(1, keepdims=True)
    return q[:, 1].reshape(p.shape) if y.ndim == 2 else q


def fixmatch_loss(net, batch, control, generator):
    """Eqs. 3 and 4 of FixMatch on the weakly augmented batch.x, batch.few: cross-entropy of the images with a label, and on a strong view of the others
    where the guess from the weak one is sure; multi-label: label by label, sure of either answer. One pass over all three, so that batch norm sees all."""
    B, n = len(batch.few.y), len(batch.x)
    logits = net(torch.cat([batch.few.x, batch.x, strong(batch.x, generator)])).float()
    few, weak, changed = logits.split([B, n, n])
    if batch.y.ndim == 2:
        p = weak.detach().sigmoid()
        each, taken = F.binary_cross_entropy_with_logits(changed, (p > .5).float(), reduction="none"), torch.maximum(p, 1 - p) >= control.sure
    else:
        p, guess = weak.detach().softmax(1).max(1)
        each, taken = F.cross_entropy(changed, guess, reduction="none"), p >= control.sure
    return class_loss(few, batch.few.y) + control.weight * (each * taken).mean()


def member(data, rows, config, control, device, seed):
    """One network, its parameters' average at the check that validation likes best; the share of the steps then done; and the average in the end."""
    torch.manual_seed(running.seed_of(seed, "control"))
    make = lambda: running.place(ResNet(18, data.channels, len(data.classes), config.width, "small" if config.size < 100 else "imagenet"), device)
    net, average = make(), make()
    average.load_state_dict(net.state_dict())
    train, names = data.train.take(rows), [a for a in config.augment.split(",") if a]
    batches = Batches(train, control.batch_size, train=True)
    steps = control.steps or control.epochs * len(batches)
    if control.fixmatch:
        train = replace(data.train, few=(rows, control.batch_size))
    optimizer = torch.optim.AdamW(net.parameters(), control.lr, weight_decay=0.)
    generator, step, best, kept = torch.Generator().manual_seed(running.seed_of(seed, "strong")), 0, -math.inf, None
    check = max(1, steps // control.checks)
    while step < steps:
        for batch in Batches(train, control.batch_size * (control.ratio if control.fixmatch else 1), device, True, seed, names, start=step):
            net.train()
            done = step / steps
            optimizer.param_groups[0]["lr"] = control.lr * min(1., (done + 1e-3) / control.warmup) * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss = fixmatch_loss(net, batch, control, generator) if control.fixmatch else class_loss(net(batch.x).float(), batch.y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
            optimizer.step()
            running.update_ema(average, net, control.ema, step)
            step += 1
            if step % check == 0 or step == steps:
                p = probabilities(average, data.val, device, config.augment)
                if control.select == "nll":                             # a temperature comes in the end: overconfidence is no fault yet
                    p = sharpened(p, data.val.labels, p)
                found = running.validation(data.val, {"resnet": p}, "resnet")["val_" + control.select] * (-1 if control.select == "nll" else 1)
                if found >= best:
                    best, kept, at = found, {k: v.clone() for k, v in average.state_dict().items()}, step
            if step == steps:
                break
    net.load_state_dict(kept)
    return net, at / steps, average


def measured(config, control):
    """Trains the members and scores their mean on the test split once: a record like a method's metrics.json, with the single networks' metrics, and the
    ids, labels and probabilities of the test images."""
    device, method = running.start(config), "fixmatch" if control.fixmatch else "resnet"
    data = load_for(replace(config, labels="1") if hasattr(config, "labels") else config)
    rows = np.flatnonzero(labelled(data.train, getattr(config, "labels", "1"), config.seed, [*data.val.ids, *data.test.ids]))
    began, seconds, found, nets = time.monotonic(), 0., [], []
    for i in range(control.members):
        net, at, last = member(data, rows, config, control, device, running.seed_of(config.seed, i) if i else config.seed)
        nets.append(net)
        seconds += time.monotonic() - began
        found.append((probabilities(net, data.val, device, config.augment), probabilities(net, data.test, device, config.augment), at,
                      probabilities(net, data.test, device), probabilities(last, data.test, device, config.augment)))
        print(f"{method} {i + 1} of {control.members}: best at {at:.2f} of its steps, {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
    val, *rest = (np.mean([f[i] for f in found], 0) for i in (0, 1, 3, 4))
    p, one_view, last = (sharpened(p, data.val.labels, val) for p in rest)
    unsure = 1 - np.maximum(p, 1 - p) if data.multilabel else 1 - p.max(1)
    more = {"one view": one_view, "not picked": last} | ({f"member {i + 1}": f[1] for i, f in enumerate(found)} if control.members > 1 else {})
    result = {"method": method, "data": config.data, "scale": config.scale, "seed": config.seed, "commit": running.commit(), "torch": str(torch.__version__),
              "device": device.type, "threads": torch.get_num_threads(), "seconds": seconds, "labelled": len(rows), "members": control.members,
              "params": sum(q.numel() for q in net.parameters()) * control.members, "selected": [f[2] for f in found],
              "validation": running.validation(data.val, {method: val}, method)}
    began = time.monotonic()
    for net in nets:
        probabilities(net, data.test.take(np.arange(min(32, len(data.test)))), device, config.augment)
    result["ms_an_image"] = 1e3 * (time.monotonic() - began) / min(32, len(data.test))
    result |= running.score(data.test, {method: p} | more | (shortcut(data) if len(rows) == len(data.train) else {}), unsure, data.train.labels[rows])
    return result, (data.test.ids, data.test.labels, p)
