"""Mediffusion's counterfactuals as a judge sees them, who shares neither label nor patient with the model: `python -m tests.claims --counterfactuals RUN`."""
import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

from common import drawn, metrics, plots  # before torch
from common import run as running
import numpy as np
import torch

from common.mmd import mmd_polynomial
from common.resnet import ResNet
from data import Batches, labelled, load_for

RESULTS = Path(__file__).resolve().parent / "results"
GUIDANCE = ["guide_on", "guide_through", "guide_clean", "guide_unit", "guide_goal", "hold_labels", "hold_latent", "guidance", "eta", "remove_start",
            "remove_scale", "enforce_start", "enforce_scale", "edit_steps", "edit_eta", "edit_keep"]       # mediffusion's fields that no training depends on
SURE = .75                                                              # AUROC of a judge below which it is not listened to
QUANTILES = (.05, .25, .5, .75, .95)
WHERE = ("inside", "outside", "inside, at random", "outside, at random")


def patients(split, rows=None):
    names = split.groups or split.ids
    return set(names if rows is None else [names[i] for i in rows])


def for_judge(data, few):
    """Rows of the training images from which a judge may learn: of patients of whom the model saw no label, and who are in no other split."""
    known, evaluated = patients(data.train, few), patients(data.val) | patients(data.test)
    if shared := sorted(known & evaluated):
        raise running.UserError(f"{len(shared):,} patients of whom the model saw labels are evaluated as well, first: {shared[0]}; train it with --split group")
    rows = np.flatnonzero([name not in known | evaluated for name in data.train.groups or data.train.ids])
    if not len(rows):
        raise running.UserError(f"judge and model would share patients: the model saw labels of all {len(known):,}; train it with --labels below 1")
    return rows


def train_judge(split, classes, config, device, epochs=6):
    """A plain ResNet of the images and labels of a split; how it is taught is never chosen by what it says."""
    mediffusion = importlib.import_module("mediffusion")
    torch.manual_seed(running.seed_of(config.seed, "judge"))
    net = running.place(ResNet(18, split.images.shape[1], classes, config.width, "small" if config.size < 100 else "imagenet"), device)
    count = len(Batches(split, 32, train=True))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    for epoch in range(epochs):
        for batch in Batches(split, 32, device, True, config.seed, [a for a in config.augment.split(",") if a], start=epoch * count):
            optimizer.zero_grad(set_to_none=True)
            mediffusion.class_loss(net(batch.x), batch.y).backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def starting(split, k, enforce, boxed=False, classes=()):
    """Rows of the images from which label k is removed: those with it, and with its box where boxes are known; or in which it is enforced: those without
    any finding or, `boxed`, as the authors have it, those with the box of some finding and none of this. Single-label: of all other classes.
    "No Finding", where it is one of the `classes`, is none, and is enforced in all that have not got it."""
    has = split.labels == k if split.labels.ndim == 1 else split.labels[:, k] > 0
    if split.labels.ndim == 1 or classes and classes[k] == "No Finding":
        return np.flatnonzero(has ^ enforce)
    box = (split.labels > 0) & (False if split.boxes is None else np.isfinite(split.boxes).all(-1))
    if enforce:
        return np.flatnonzero(box.any(1) & ~box[:, k] if boxed else (split.labels == 0)[:, [c != "No Finding" for c in classes] or slice(None)].all(1))
    return np.flatnonzero(box[:, k] if box[:, k].any() else has)


def around(seen, boxes, rng):
    """Of a Changed and the boxes (N, 4) of its label: quantiles over the images of the mean change in [0, 1] inside and outside of the box and of a box
    as large at a random place, and the share of the change in either. {} where no box is known."""
    known = np.flatnonzero(np.isfinite(boxes).all(1)) if boxes is not None else []
    if not len(known):
        return {}
    change, boxes = np.abs(seen.guided[known].astype(float) - seen.control[known]).mean(1) / 255, boxes[known]
    extent = boxes[:, 2:] - boxes[:, :2]
    corner = np.round(rng.random(extent.shape) * (np.array(change.shape[:0:-1]) - extent))
    found, shares = {}, []
    for where, of in (("", boxes), (", at random", np.concatenate([corner, corner + extent], 1))):
        inside = metrics.box_mask(of, change.shape[1:])
        shares.append(float(np.mean((change * inside).sum((1, 2)) / change.sum((1, 2)).clip(1e-12))))
        for name, mask in (("inside", inside), ("outside", ~inside)):
            found[name + where] = np.quantile((change * mask).sum((1, 2)) / mask.sum((1, 2)).clip(1), QUANTILES).tolist()
    return {"boxes": len(known), "change_by_place": found, "in_random_box": shares[1]}


def judged_rows(nets, config, data, judge, auroc, n, device, boxed=False):
    """{"remove Mass": numbers} of n test images a row: mediffusion.judged, `around`; a row whose label the judge does not know is refused."""
    mediffusion, found = importlib.import_module("mediffusion"), {}
    ask = lambda x: judge(x).float().sigmoid() if nets.multilabel else judge(x).float().softmax(1)
    for k, label in enumerate(data.classes):
        for enforce in (False, True):
            what, rows = f"{'enforce' if enforce else 'remove'} {label}", starting(data.test, k, enforce, boxed, data.classes)
            if not auroc[label] >= SURE:
                found[what] = {"refused": f"the judge's AUROC of {label} is {auroc[label]:.2f}, under {SURE}"}
            elif len(rows):
                rng = np.random.default_rng([config.seed, k, enforce])
                part, began = data.test.take(np.sort(rng.permutation(rows)[:n])), time.monotonic()
                seen, boxes = mediffusion.changed(nets, config, part, k, enforce, device, ask), mediffusion.boxes_of(part, k)
                seconds = time.monotonic() - began                      # guided and control
                before = float(np.mean((seen.p[mediffusion.METHOD]["control"][:, k] > .5) == enforce))
                found[what] = {"images": len(part), "seconds_an_image": seconds / len(part), "flipped_by_control": before}
                found[what] |= mediffusion.judged(seen, k, enforce, boxes) | around(seen, boxes, rng)
                said = found[what]["judge"]
                print(f"{what:24} judge {said['control']:.2f} -> {said['guided']:.2f}, others {said['other_abs']:.2f}, "
                      f"in box {found[what].get('in_box', np.nan):.2f}, {seconds:.0f} s", flush=True)
    return found


def drawn_samples(nets, config, data, judge, n, device):
    """n images drawn of each label, with guidance and without, beside as many real ones of the test split that have it, in the judge's features; the same
    of real validation images is the floor. No FID: these features are this data set's own. Agreement: the judge sees the label asked for."""
    mediffusion, parts = importlib.import_module("mediffusion"), {}
    for k, label in enumerate(data.classes):
        names = [f"{label} drawn {i}" for i in range(n)]
        real = [starting(replace(split, boxes=None), k, False)[:n] for split in (data.test, data.val)]
        of = {"reference": data.test.images[real[0]], "real": data.val.images[real[1]]}
        for name, scale in (("unguided", 0.), ("guided", config.guidance)):
            with running.autocast(config, device):
                x = mediffusion.draw(nets, config, torch.full((n,), k, device=device), names, scale, device)
            of[name] = plots.to_uint8(x)
        for name, images in of.items():
            _, x = drawn.judge(judge, images, device)
            logits = judge.fc(torch.from_numpy(x).float().to(device)).cpu()
            agrees = logits[:, k] > 0 if nets.multilabel else logits.argmax(1) == k
            parts.setdefault(name, []).append((x, agrees.numpy()))
    features, agreement = ({name: np.concatenate([each[i] for each in of]) for name, of in parts.items()} for i in (0, 1))
    y = features.pop("reference")
    return {name: {"images": len(x), "frechet": metrics.frechet_distance(x, y), "kernel": float(mmd_polynomial(torch.from_numpy(x), torch.from_numpy(y))),
                   "label_agreement": float(agreement[name].mean())} for name, x in features.items()}


def measured_counterfactuals(nets, config, data, few, device, n=64, arms=None, boxed=False):
    """The record of a model that saw the labels of the training rows `few`, where `data` has those of all: a judge is trained and tried on validation,
    counterfactuals are of test images. arms: {name: fields to replace}; of each level's steps, which are many, a quarter of the images."""
    rows = for_judge(data, few)
    judge = train_judge(data.train.take(rows), len(data.classes), config, device)
    with torch.no_grad():
        logits = torch.cat([judge(batch.x).float().cpu() for batch in Batches(data.val, 128, device)]).numpy()
    has = data.val.labels if data.val.labels.ndim == 2 else np.eye(len(data.classes))[data.val.labels]
    auroc = {name: metrics.auroc(has[:, k], logits[:, k]) for k, name in enumerate(data.classes)}
    print("judge, AUROC on validation:", ", ".join(f"{name} {value:.3f}" for name, value in auroc.items()), flush=True)
    found = {"judge": {"images": len(rows), "patients": len(patients(data.train, rows)), "val_auroc": auroc}, "boxed": boxed, "arms": {}}
    mediffusion = importlib.import_module("mediffusion")
    for name, given in (arms or {"as configured": {}}).items():
        led = replace(config, **given)
        nets.guide = [mediffusion.other_guide(led.guide, dict(classes=data.classes, channels=data.channels))] if led.guide != "own" else None
        print(name, flush=True)
        some = n if led.edit_steps else -(-n // 4)
        found["arms"][name] = {"settings": {field: getattr(led, field) for field in GUIDANCE},
                               "rows": judged_rows(nets, led, data, judge, auroc, some, device, boxed)}
    return found | {"samples": drawn_samples(nets, config, data, judge, n, device)}


def counterfactuals(folder, n=64, boxed=False):
    """Writes mediffusion-counterfactuals.json and its picture, of a run of mediffusion.py with few labels: led as recipe plus has it, as the paper, whose
    scales are for latents of another unit, and by the run's plain ResNet, which looks at decoded images."""
    mediffusion, file = importlib.import_module("mediffusion"), Path(folder) / "best.pt"
    config, nets, facts, device = running.load_model(file, "mediffusion", mediffusion.Config, mediffusion.build, {})
    data = load_for(replace(config, labels="1"))
    few = np.flatnonzero(labelled(data.train, config.labels, config.seed, [*data.val.ids, *data.test.ids]))
    plus, paper = ({field: getattr(of, field) for field in GUIDANCE} for of in (mediffusion.configure(data=config.data, recipe="plus"), mediffusion.Config))
    config = replace(config, **plus)                                    # today's, whatever the run was trained with
    arms = {"plus": {}, "the paper's": paper} | ({"another classifier": dict(guide=str(file))} if nets.resnet is not None else {})
    found = measured_counterfactuals(nets, config, data, few, device, n, arms, boxed)
    content = json.loads((Path(folder) / "metrics.json").read_text())
    record = {key: content[key] for key in ("method", "data", "scale", "recipe", "seed", "commit")}
    record |= {"command": "python -m tests.claims --counterfactuals RUN", "latent_scale": nets.latent_scale.item(), "labelled": len(few)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "mediffusion-counterfactuals.json"
    path.write_text(json.dumps(record | found, indent=1))
    box_plots(RESULTS / "mediffusion-boxes.png", found["arms"]["plus"]["rows"])
    return path


def counterfactuals_table(record, arms=("plus", "the paper's")):
    """The README's table: what the judge says, and where the change is; Diff = counterfactual - control."""
    lines = ["| | images | judge: image | control | counterfactual | Diff | Other diff of means | of sizes | own answer as aimed at | change in the box | in a random box |"]
    lines.append("|---" * 11 + "|")
    for arm in arms:
        for what, row in record["arms"][arm]["rows"].items():
            if "refused" in row:
                lines.append(f"| {arm}: {what} | refused: {row['refused']} |" + " |" * 9)
                continue
            judge, boxes = row["judge"], [f"{row[key]:.2f}" if key in row else "" for key in ("in_box", "in_random_box")]
            lines.append(f"| {arm}: {what} | {row['images']} | {judge['image']:.2f} | {judge['control']:.2f} | {judge['guided']:.2f} | {judge['diff']:+.2f} | "
                         f"{judge['other_diff']:.2f} | {judge['other_abs']:.2f} | {row['flipped']:.2f} (control {row['flipped_by_control']:.2f}) | "
                         f"{' | '.join(boxes)} |")
    return "\n".join(lines)


def samples_table(record):
    """The README's table of drawn images in the judge's features."""
    lines = ["| | Frechet distance to test | kernel distance | the judge sees the label |", "|---|---|---|---|"]
    lines += [f"| {name} | {row['frechet']:.3g} | {row['kernel']:.3g} | {row['label_agreement']:.2f} |" for name, row in record["samples"].items()]
    return "\n".join(lines)


def box_plots(path, rows):
    """As the paper's Fig. 4 and 8: the change inside and outside of the box, and of one as large at a random place; median, quartiles, 5 and 95 %."""
    rows = {what: row["change_by_place"] for what, row in rows.items() if "change_by_place" in row}
    canvas, bottom = plots.Canvas(900, 130 + 100 * len(rows), "What guidance changed, in and out of the finding's box"), 70 + 100 * len(rows)
    most = plots.ticks(0, max((found[name][-1] for found in rows.values() for name in WHERE), default=1) or 1.)[-1]
    for tick in plots.ticks(0, most):
        x = 210 + round(650 * tick / most)
        canvas.draw.line((x, 72, x, bottom), fill=plots.PALE)
        canvas.text(x, bottom + 6, f"{tick:g}", 12, "ma", plots.GREY)
    for j, name in enumerate(WHERE):
        canvas.draw.rectangle((16 + 215 * j, 44, 30 + 215 * j, 58), fill=plots.PALETTE[j])
        canvas.text(38 + 215 * j, 51, name, anchor="lm")
    for i, (what, found) in enumerate(rows.items()):
        canvas.text(16, 120 + 100 * i, what, anchor="lm", room=190)
        for j, name in enumerate(WHERE):
            y, (low, q1, middle, q3, high) = 80 + 100 * i + 20 * j, (210 + round(650 * v / most) for v in found[name])
            canvas.draw.line((low, y + 7, high, y + 7), fill=plots.GREY)
            canvas.draw.rectangle((q1, y, max(q3, q1 + 4), y + 14), fill=plots.PALETTE[j])                     # of all zeros it is still seen
            canvas.draw.line((middle, y, middle, y + 14), fill="white", width=2)
    canvas.text(860, canvas.height - 24, "a pixel's mean absolute change, of images in [0, 1]: median, quartiles, 5 and 95 % of the images", 12, "ra", plots.GREY)
    return canvas.save(path)
