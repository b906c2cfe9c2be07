"""The numbers that the README quotes: `python -m tests.claims [--only NAME] [--table]`.

Each cell (method, settings, seed) is one ordinary training; its metrics.json is the record, kept in tests/results/NAME-sSEED.json with
the command that made it. Cells whose record is there are not run again: delete the file to measure anew. --table prints the README's
tables from the records, --picture RUN its pictures; tests/test_readme.py holds the two together.
"""
import argparse
import csv
import importlib
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

from common import metrics, plots  # before torch
from common import run as running
import numpy as np
import torch

from data import Batches, DataError, load_for, toy
from data.batches import strong
from tests import controls
from tests.counterfactuals import counterfactuals

RESULTS = Path(__file__).resolve().parent / "results"
CELLS = {                                                               # name: (method, settings, seeds)
    "diffmic-toy": ("diffmic", dict(data="toy"), (0, 1, 2)),
    "diffmic-toy-paper": ("diffmic", dict(data="toy", recipe="paper"), (0,)),
    "diffmic-ham10000-small": ("diffmic", dict(data="ham10000", scale="small"), (0,)),
}
PICKED = dict(select="accuracy", mirror=False)                          # as plus was when its other fields were chosen
FIRST = dict(residual=False) | PICKED                                   # the same of DiffMIC
LITTLE = dict(data="toy", limit=300, epochs=100) | FIRST                # where a guide learns its images by heart: do its priors mislead?
CELLS |= {"diffmic-few": ("diffmic", LITTLE, (0,)), "diffmic-few-nodropout": ("diffmic", LITTLE | dict(prior_dropout=0.), (0,)),
          "diffmic-few-ema": ("diffmic", LITTLE | dict(prior_dropout=0., prior_source="ema"), (0,))}
CELLS |= {
    "symmflow-toy": ("symmflow", dict(data="toy"), (0, 1, 2)),
    "symmflow-toy-paper": ("symmflow", dict(data="toy", recipe="paper"), (0,)),
    "symmflow-retinamnist-small": ("symmflow", dict(data="retinamnist", scale="small"), (0, 1, 2)),
    "symmflow-retinamnist-small-paper": ("symmflow", dict(data="retinamnist", scale="small", recipe="paper"), (0,)),
}
CELLS |= {
    "diffclassifier-toy": ("diffclassifier", dict(data="toy"), (0, 1, 2)),
    "diffclassifier-toy-paper": ("diffclassifier", dict(data="toy", recipe="paper"), (0,)),
    "mediffusion-toy": ("mediffusion", dict(data="toy_xray"), (0, 1, 2)),
    "mediffusion-toy-no-diffusion": ("mediffusion", dict(data="toy_xray", variant="no_diffusion"), (0, 1, 2)),
}
IDEAS = {                                                               # of a method: one field of recipe plus changed at a time
    "diffmic": {"eps": dict(target="eps"), "uniform": dict(roi_weight="uniform"), "deep": dict(deep_supervision=False),
                "constant": dict(guide_schedule="constant"), "uncalibrated": dict(calibrate=False), "roi": dict(roi_size=8),
                "ema": dict(prior_source="ema"), "smoothing": dict(label_smoothing=.1), "balanced": dict(balanced=True)},
    "symmflow": {"map": dict(label_loss="map"), "velocity": dict(label_loss="velocity"), "rgb": dict(label_loss="map", codes="rgb"),
                 "simplex": dict(label_loss="map", codes="simplex"), "flat": dict(time_scale=1.), "uniform": dict(t_one=0.),
                 "pixel": dict(label_noise="pixel"), "raw": dict(precondition=False), "apart": dict(pooled=False), "balanced": dict(balanced=True), "label": dict(image_weight=.3)},
    "diffclassifier": {"level": dict(levels=1), "raw": dict(precondition=False), "unweighted": dict(loss_weight="none"), "added": dict(scale_shift=False), "independent": dict(stratified=False),
                       "late": dict(late_class=True), "balanced": dict(balanced=True)},
    "mediffusion": {"unscaled": dict(latent_scale=1.), "consistent": dict(consistency=1.), "noised": dict(cls_noise=100), "times": dict(feature_times="0,50,100"), "turn": dict(few_augment="rotate"), "strong": dict(few_augment="strong"), "mirror": dict(mirror=True)},
}
DATA = dict(diffmic="toy", symmflow="toy", diffclassifier="toy", mediffusion="toy_xray")
BASE = {"diffmic": FIRST | dict(prior_dropout=0.), "symmflow": PICKED | dict(samples=1, image_weight=.7),
        "diffclassifier": dict(epochs=3, votes=25, baseline=False),     # a third of the budget
        "mediffusion": dict(mirror=False, few_augment="", pretrain_epochs=4, epochs=4, baseline=False, explained=1)}
SEEDS = dict(diffmic=(0, 1, 2), symmflow=(0, 1, 2), diffclassifier=(0,), mediffusion=(0,))
CELLS |= {f"{method}-toy-base": (method, dict(data=DATA[method]) | BASE[method], seeds) for method, seeds in SEEDS.items()}
CELLS["diffmic-toy-picked"] = ("diffmic", dict(data="toy") | FIRST, (0, 1, 2))
CELLS |= {f"{method}-toy-{name}": (method, dict(data=DATA[method]) | BASE[method] | given, (0,)) for method, ideas in IDEAS.items() for name, given in ideas.items()}
for name in "raw", "label":
    CELLS[f"symmflow-toy-{name}"] = (*CELLS[f"symmflow-toy-{name}"][:2], (0, 1, 2))
for name in IDEAS["symmflow"].keys() - {"raw"}:                         # raw: its draws differ, the table of steps says what their mean is worth
    CELLS[f"symmflow-toy-{name}"][1]["generated"] = 20                 # drawing and the table of steps take as long as three epochs
# Real images: each method in recipe plus and paper, one ResNet and five, about four minutes of one thread each, of HAM10000 nine to sixteen: PASSES over the
# training images, of pretraining and of the rest
REAL = {"retinamnist": dict(data="retinamnist", size=32, augment="hflip,vflip"), "pneumoniamnist": dict(data="pneumoniamnist", size=32, augment=""),
        "ham10000": dict(data="ham10000", size=64, augment="hflip,vflip", limit=1500)}
PASSES = {"retinamnist": dict(diffmic=(4, 36), symmflow=(0, 18), diffclassifier=(0, 12), mediffusion=(8, 14), resnet=120),
          "pneumoniamnist": dict(diffmic=(1, 8), symmflow=(0, 4), diffclassifier=(0, 3), mediffusion=(2, 3), resnet=30),
          "ham10000": dict(diffmic=(2, 14), symmflow=(0, 8), diffclassifier=(0, 5), mediffusion=(4, 8), resnet=50)}
FOR_ALL = {"diffmic": {}, "symmflow": dict(generated=20), "diffclassifier": dict(judged=0, votes=25), "mediffusion": dict(explained=1)}
for data, given in REAL.items():
    for method, more in FOR_ALL.items():
        (first, second), both = PASSES[data][method], dict(scale="small", baseline=False)
        if (method, data) == ("diffclassifier", "ham10000"):            # 7 classes at 64 px: to judge 2,097 images by 25 levels takes an hour and a quarter
            more = more | dict(judged=300, votes=11)
        more_calls = dict(votes=4 * more["votes"] + 1) if method == "diffclassifier" else {}      # so that plus has a quarter of its calls
        settings, alike = given | both | dict(pretrain_epochs=first, epochs=second) | more, dict(few_augment="") if method == "mediffusion" else {}      # all see the same views
        CELLS |= {f"{method}-{data}": (method, settings | alike, (0, 1, 2)), f"{method}-{data}-paper": (method, settings | dict(recipe="paper") | more_calls, (0, 1, 2))}
    for name, members in ("resnet", 1), ("resnets", 5):
        CELLS[f"{name}-{data}"] = ("resnet", given | dict(scale="small", members=members, epochs=PASSES[data]["resnet"] // members), (0, 1, 2))
REAL_IDEAS = {                                                          # of a method: recipe plus on RetinaMNIST, another part or code
    "diffmic": {variant: dict(variant=variant) for variant in ("basic", "c2", "dcg")} | {"c1": dict(variant="c1", pretrain_epochs=0, epochs=40), "plain": dict(residual=False), "picked": FIRST, "last": dict(residual=False, select="last")},
    "symmflow": {"map": dict(label_loss="map"), "rgb": dict(label_loss="map", codes="rgb"), "grey": dict(label_loss="map", codes="grey"),
                 "last": dict(select="last"), "image": dict(select="last", image_weight=.7), "raw": dict(select="last", image_weight=.7, precondition=False)},
    "diffclassifier": {"init": dict(init=dict(data="ham10000", size=32, augment="hflip,vflip", limit=1500, scale="small", baseline=False, epochs=8, judged=50, votes=5))}}
for method, ideas in REAL_IDEAS.items():                                # init: trained on other images first
    CELLS |= {f"{method}-retinamnist-{name}": (method, CELLS[f"{method}-retinamnist"][1] | given, (0, 1, 2)) for name, given in ideas.items()}
SHARES = ("0.02", "0.05", "0.1", "0.2")                                 # of the labels of PneumoniaMNIST, of HAM10000 the third; the whole: the cells above
FEW_LABELS = {"joint": ("mediffusion", FOR_ALL["mediffusion"]), "alone": ("mediffusion", FOR_ALL["mediffusion"] | dict(variant="no_diffusion")),
              "resnet": ("resnet", dict(select="auroc")), "fixmatch": ("fixmatch", dict(fixmatch=True, select="auroc"))}
STEPS = 800                                                             # of the plain ResNet and of FixMatch on few labels, where validation picks one of a dozen
for data, share in [*(("pneumoniamnist", share) for share in SHARES), ("ham10000", "0.1")]:
    for name, (method, more) in FEW_LABELS.items():
        (first, second), given = PASSES[data]["mediffusion"], REAL[data] | dict(scale="small", labels=share) | more
        given |= dict(baseline=False, pretrain_epochs=first, epochs=second) if method == "mediffusion" else dict(steps=STEPS)
        if method == "resnet":                                          # sees the strong views that Mediffusion's classifier sees
            given["augment"] = f"{given['augment']},strong".strip(",")
        CELLS[f"{name}-{data}-{share}"] = (method, given, (0, 1, 2))
for data in ("pneumoniamnist", "ham10000"):
    CELLS[f"joint-{data}-0.1-paper"] = ("mediffusion", CELLS[f"joint-{data}-0.1"][1] | dict(recipe="paper"), (0, 1, 2))
    CELLS[f"joint-{data}-0.1-turn"] = ("mediffusion", CELLS[f"joint-{data}-0.1"][1] | dict(few_augment="rotate", mirror=False), (0, 1))
    CELLS[f"joint-{data}-0.1-weak"] = ("mediffusion", CELLS[f"joint-{data}-0.1"][1] | dict(few_augment=""), (0, 1, 2))
CELLS["alone-pneumoniamnist"] = ("mediffusion", CELLS["mediffusion-pneumoniamnist"][1] | dict(variant="no_diffusion"), (0, 1, 2))
KEYS = ("accuracy", "f1_macro", "auroc", "ece", "aurc")


def command(name, seed):
    method, settings, _ = CELLS[name]
    if method in ("resnet", "fixmatch"):
        return f"python -m tests.claims --only {name}"
    first = f"{line(method, settings['init'] | dict(seed=seed, output='FIRST'))} && " if "init" in settings else ""
    return first + line(method, settings | dict(seed=seed) | (dict(init="FIRST/best.pt") if first else {}))


def line(method, settings):
    """The command of settings."""
    given = {k.replace("_", "-"): v for k, v in settings.items() if (k, v) not in (("data", "toy"), ("seed", 0))}
    options = " ".join(f"--{k}" if v is True else f"--no-{k}" if v is False else f"--{k} {shlex.quote(str(v))}" for k, v in given.items())
    return f"python {method}.py {options}".strip()


def run(name, seed, root=None):
    """Trains one cell and writes its record."""
    method, settings, _ = CELLS[name]
    if method in ("resnet", "fixmatch"):
        return write(name, seed, *control(settings | dict(seed=seed) | (dict(root=root) if root else {})))
    module, found = importlib.import_module(method), None
    with tempfile.TemporaryDirectory() as folder:
        given = settings | dict(seed=seed, output=str(Path(folder) / "run")) | (dict(root=root) if root else {})
        if "init" in settings:
            module.train(module.configure(**settings["init"], seed=seed, output=str(Path(folder) / "first")))
            given["init"] = str(Path(folder) / "first" / "best.pt")
        result = module.train(module.configure(**given))
        best = json.loads((Path(folder) / "run" / "log.jsonl").read_text().splitlines()[result["selected_epoch"] - 1])
        if method == "diffmic" and settings["data"] == "toy":
            result["regions"] = regions(Path(folder) / "run" / "best.pt")
            result |= {"guide_in_training": best["guide_accuracy"], "val_guide_accuracy": best["val_guide_accuracy"]}
        if method == "mediffusion":
            result["val_auroc"] = best["val_auroc"]
            if "labels" in settings:
                result["val_auroc_of_strong_views"] = strong_views(Path(folder) / "run" / "best.pt")
        if name == "diffclassifier-toy":
            result["evidence"] = evidence(Path(folder) / "run" / "best.pt")
        if settings["data"] in REAL:
            if method == "diffmic" and settings.get("variant", "full") == "full":
                result["reverse"] = reverse(Path(folder) / "run" / "best.pt")
            if name == "diffclassifier-retinamnist":
                result["levels"] = levels(Path(folder) / "run" / "best.pt")
            result["ms_an_image"], found = speed(module, Path(folder) / "run" / "best.pt", root), answers(Path(folder) / "run" / "predictions.csv")
    write(name, seed, result, found)


def write(name, seed, result, found=None):
    """A record, and beside it what was said of each test image, where cells are to be compared image by image: ids (N,), labels (N,), p (N, K)."""
    RESULTS.mkdir(exist_ok=True)
    result = {"command": command(name, seed)} | {k: v for k, v in result.items() if k != "notes"}          # those name paths of a machine
    (RESULTS / f"{name}-s{seed}.json").write_text(json.dumps(result, indent=1))
    if found is not None:
        ids, labels, p = found
        np.savez_compressed(RESULTS / f"{name}-s{seed}.npz", ids=np.array(ids), labels=labels, p=p.astype(np.float32))


def answers(path):
    """ids, labels (N,) and p (N, K) of a single-label predictions.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [key for key in rows[0] if key.startswith("p:")]
    return [r["id"] for r in rows], np.array([names.index("p:" + r["true"]) for r in rows]), np.array([[float(r[k]) for k in names] for r in rows])


def speed(module, checkpoint, root=None, n=32):
    """Milliseconds an image of the test split to be classified, in batches as the method takes them."""
    config, nets, facts, device = running.load_model(checkpoint, module.METHOD, module.Config, module.build, dict(root=root) if root else {})
    test = load_for(config).test
    module.evaluate(nets, test.take(np.arange(4)), config, device)
    began = time.monotonic()
    module.evaluate(nets, test.take(np.arange(n)), config, device)
    return 1e3 * (time.monotonic() - began) / n


def control(settings):
    """A record and answers of plain ResNets: controls.measured."""
    own = ("members", "epochs", "steps", "fixmatch", "select")
    config = importlib.import_module("mediffusion").configure(**dict(labels="1") | {k: v for k, v in settings.items() if k not in own})
    return controls.measured(config, controls.Control(**{k: v for k, v in settings.items() if k in own}))


def strong_views(checkpoint):
    """Mediffusion's AUROC on validation images that are changed as no image of the data set is: the mean of three `strong` views of them all."""
    mediffusion, found = importlib.import_module("mediffusion"), []
    config, nets, facts, device = running.load_model(checkpoint, "mediffusion", mediffusion.Config, mediffusion.build, {})
    val, answer = load_for(config).val, mediffusion.models(nets.eval(), config)["mediffusion"]
    with torch.no_grad():
        for i in range(3):
            generator = torch.Generator().manual_seed(i)
            p = [answer(strong(batch.x, generator), [val.ids[j] for j in batch.index]).cpu().double() for batch in Batches(val, 128, device)]
            found.append(metrics.auroc(val.labels, torch.cat(p).numpy()))
    return float(np.mean(found))


def regions(checkpoint):
    """How DiffMIC's regions lie on the lesions of the validation split, by class: the share of the lesion's box that they cover, their
    share inside it, and by chance: their share of the image, which is what regions thrown at random would cover."""
    diffmic = importlib.import_module("diffmic")
    config, nets, facts, device = running.load_model(checkpoint, "diffmic", diffmic.Config, diffmic.build, {})
    val, side = load_for(config).val, nets.guide.roi_size
    with torch.no_grad():
        corners = torch.cat([nets.guide(batch.x).corners for batch in Batches(val, 128, device)]).cpu().numpy()[..., ::-1]
    found = metrics.box_mask(np.concatenate([corners, corners + side], -1), val.images.shape[2:]).any(1)       # (N, H, W)
    truth = metrics.box_mask(val.boxes, val.images.shape[2:])
    both = (found & truth).sum((1, 2))
    shares = {"covered": both / truth.sum((1, 2)), "inside": both / found.sum((1, 2)), "chance": found.mean((1, 2))}
    of = {name: val.labels == k for k, name in enumerate(facts["classes"])} | {"all": val.labels >= 0}
    return {name: {k: float(v[rows].mean()) for k, v in shares.items()} for name, rows in of.items()}


def reverse(checkpoint):
    """DiffMIC's reverse process on the validation split: `steps` of its levels spread over all of training's, or as the authors have it the first so many,
    begun from variance 1 all the same; one draw, or the mean of twenty. The temperature is the run's own, of spread levels and its draws."""
    diffmic, table = importlib.import_module("diffmic"), []
    config, nets, facts, device = running.load_model(checkpoint, "diffmic", diffmic.Config, diffmic.build, {})
    val = load_for(config).val
    for way, timesteps in ("spread", diffmic.respaced_timesteps), ("first", lambda T, n: torch.arange(n - 1, -1, -1)):
        for samples in (1, 20):
            with mock.patch.object(diffmic, "respaced_timesteps", timesteps):
                p = next(iter(diffmic.evaluate(nets, val, replace(config, samples=samples), device)[0].values()))
            m = metrics.summary(val.labels, p)
            table.append({"levels": way, "draws": samples, **{key: m[key] for key in ("accuracy", "auroc", "nll", "ece")}})
    return table


def reverse_table(name):
    """The table of `reverse`: mean over the seeds of a cell."""
    lines = ["| levels | draws | accuracy | AUROC | NLL | ECE |", "|---|---|---|---|---|---|"]
    for rows in zip(*(record["reverse"] for record in records(name))):
        lines.append(f"| {'spread over all' if rows[0]['levels'] == 'spread' else 'the first ones'} | {rows[0]['draws']} | " +
                     " | ".join(f"{np.mean([row[key] for row in rows]):.3f}" for key in ("accuracy", "auroc", "nll", "ece")) + " |")
    return "\n".join(lines)


def levels(checkpoint, votes=501):
    """Of the diffusion classifier on validation: accuracy of its rules by the number of noise levels up to that of the paper; what stops early, how early;
    the learned rule, which is fitted there, by how frequent the classes are taken to be."""
    diffclassifier = importlib.import_module("diffclassifier")
    config, nets, facts, device = running.load_model(checkpoint, "diffclassifier", diffclassifier.Config, diffclassifier.build, dict(votes=votes, stop="none"))
    data = load_for(config)
    diffclassifier.calibrate(nets, data.val, config, device)
    with tempfile.TemporaryDirectory() as figures:
        found = diffclassifier.measure(nets, data, config, device, Path(figures))
    error, alive, t, *_ = nets.validation
    learned = {prior: diffclassifier.rules(nets, replace(config, prior=prior), error, alive, t)["learned"] for prior in ("equal", "training")}
    return {key: found[key] for key in ("validation_by_votes", "validation_by_stop")} | {"validation_by_prior": {k: metrics.summary(data.val.labels, p) for k, p in learned.items()}}


def priors_table(name):
    """The learned rule by the prior, as `levels` has it: mean over the seeds of a cell."""
    lines, keys = ["| learned rule | accuracy | balanced | macro F1 | AUROC | NLL | ECE |", "|---|---|---|---|---|---|---|"], ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "nll", "ece")
    found = [record["levels"]["validation_by_prior"] for record in records(name)]
    for prior in found[0] if found else ():
        lines.append(f"| `--prior {prior}` | " + " | ".join(f"{np.mean([f[prior][key] for f in found]):.3f}" for key in keys) + " |")
    return "\n".join(lines)


def evidence(checkpoint, n=100):
    """Of the diffusion classifier's evidence for the class predicted against the second, on n validation images: the share that lies in the
    lesion's box, of the positive part and of its square, beside the box's share of the area; means over the images."""
    diffclassifier = importlib.import_module("diffclassifier")
    config, nets, facts, device = running.load_model(checkpoint, "diffclassifier", diffclassifier.Config, diffclassifier.build, dict(judged=n, stop="none"))
    val, found = load_for(config).val, []
    p = next(iter(diffclassifier.evaluate(nets, val, config, device)[0].values()))
    with torch.no_grad():
        for image, name, box, order in zip(val.images, val.ids, val.boxes, np.argsort(-p, 1)):      # of wavelets the evidence has half the sides
            heat = diffclassifier.evidence(nets, config, diffclassifier.seen(nets, image, device), name, order[0], order[1]).clip(0)
            inside = metrics.box_mask(box * heat.shape[0] / image.shape[1], heat.shape)
            found.append([(part * inside).sum() / part.sum() for part in (heat, heat ** 2, np.ones(heat.shape))])
    return dict(zip(("in_box", "square_in_box", "area"), np.mean(found, 0).tolist()), images=len(found))


def regions_table(name):
    """The README's table of `regions`: mean over the seeds of a cell."""
    found = [record["regions"] for record in records(name)]
    lines = ["| | lesion's box covered | by chance | regions inside the box |", "|---|---|---|---|"]
    for label in found[0]:
        mean = {k: np.mean([f[label][k] for f in found]) for k in found[0][label]}
        lines.append(f"| {label} | {mean['covered']:.2f} | {mean['chance']:.2f} | {mean['inside']:.2f} |")
    return "\n".join(lines)


def validation(record):
    """The method's numbers on the whole validation split."""
    specific = record["method_specific"]
    return specific["validation"] if "validation" in specific else specific["validation_by_steps_and_samples"][-1]


def choices_table():
    """What decided for recipe plus, RetinaMNIST's validation split: mean over the seeds of a cell."""
    lines = ["| | seeds | accuracy | AUROC | NLL |", "|---|---|---|---|---|"]
    for method, ideas in ("diffmic", ("plain", "last", "picked")), ("symmflow", ("last", "image", "raw")):
        for name in ("", *ideas):
            found = [r["reverse"][1] if "reverse" in r else r["method_specific"]["validation"] for r in records(f"{method}-retinamnist{'-' * bool(name)}{name}")]
            if found:
                option = line(method, REAL_IDEAS[method][name]).partition(".py ")[2] if name else ""
                lines.append(f"| {NAMES[method]}, {f'`{option}`' if option else '`plus`'} | {len(found)} | " + " | ".join(f"{np.mean([m[k] for m in found]):.3f}" for k in ("accuracy", "auroc", "nll")) + " |")
    return "\n".join(lines)


def few_table():
    """300 training images for 100 epochs: the guide on the augmented images it learns from and on others, and DiffMIC with each cure."""
    lines = ["| 300 images, 100 epochs | guide in training | guide on validation | DiffMIC, validation | NLL | test |", "|---|---|---|---|---|---|"]
    for name in (name for name in CELLS if name.startswith("diffmic-few")):
        record, = records(name)
        val = validation(record)
        options = command(name, 0).partition("--no-mirror")[2].strip()
        lines.append(f"| {f'`{options}`' if options else '`plus`, picked'} | {record['guide_in_training']:.3f} | {record['val_guide_accuracy']:.3f} | "
                     f"{val['accuracy']:.3f} | {val['nll']:.3f} | {record['test']['accuracy']:.3f} |")
    return "\n".join(lines)


def changed(name):
    """The options of a toy cell that its method's base has not."""
    method, settings, _ = CELLS[name]
    base = CELLS[f"{method}-toy-base"][1]
    option = line(method, {k: v for k, v in settings.items() if base.get(k) != v and k != "generated"}).partition(".py ")[2]
    return f"`{option}`" if option else "its base"


def ideas_table(method):
    """Recipe plus, as it was with the epoch picked and one view, its base, and the base with one field changed, toy seed 0: what decided (validation),
    what came of it (test)."""
    lines = ["| | validation accuracy | NLL | test accuracy | macro F1 | epoch |", "|---|---|---|---|---|---|"]
    shown = {"": "`plus`", "-picked": "`plus`, picked"}
    for name in (*shown, "-base", *(f"-{idea}" for idea in IDEAS[method])):
        for record in records(f"{method}-toy{name}")[:1]:
            val, test = validation(record), record["test"]
            lines.append(f"| {shown.get(name) or changed(f'{method}-toy{name}')} | {val['accuracy']:.3f} | {val['nll']:.3f} | {test['accuracy']:.3f} | "
                         f"{test['f1_macro']:.3f} | {record['selected_epoch']} |")
    return "\n".join(lines)


def votes_table():
    """The diffusion classifier's `plus` at a third of the budget, and with one field changed, toy seed 0, by what its votes say: they are fitted to nothing.
    A standard error of 250 images is .026."""
    lines = ["| | accuracy, validation | accuracy, test | AUROC, test |", "|---|---|---|---|"]
    for name in ("base", *IDEAS["diffclassifier"]):
        for record in records(f"diffclassifier-toy-{name}")[:1]:
            votes = record["baselines"]["rule majority"]
            lines.append(f"| {changed(f'diffclassifier-toy-{name}')} | {record['method_specific']['validation_by_votes'][-1]['majority']:.3f} | "
                         f"{votes['accuracy']:.3f} | {votes['auroc']:.3f} |")
    return "\n".join(lines)


def labels_table():
    """Mediffusion's `plus` at less than half of the budget and with one field changed, toy seed 0: the mean AUROC of its three findings."""
    lines = ["| | AUROC, validation | AUROC, test | epoch |", "|---|---|---|---|"]
    for name in ("base", *IDEAS["mediffusion"]):
        for record in records(f"mediffusion-toy-{name}")[:1]:
            lines.append(f"| {changed(f'mediffusion-toy-{name}')} | {record['val_auroc']:.3f} | {record['test']['auroc']:.3f} | {record['selected_epoch'] - 4} |")
    return "\n".join(lines)


def by_votes_table(name="diffclassifier-toy"):
    """Accuracy of its rules on validation by the number of noise levels: mean over the seeds of a cell."""
    lines = ["| noise levels | majority | mean | ELBO-weighted | learned (fitted here) |", "|---|---|---|---|---|"]
    for rows in zip(*((record.get("levels") or record["method_specific"])["validation_by_votes"] for record in records(name))):
        lines.append(f"| {rows[0]['votes']} | " + " | ".join(f"{np.mean([row[k] for row in rows]):.3f}" for k in rows[0] if k != "votes") + " |")
    return "\n".join(lines)


def stops_table(name="diffclassifier-toy"):
    """What its stops cost on validation, and how often they give the label of all levels: mean over the seeds of a cell."""
    lines = ["| stop | rule | share of the calls | same label |", "|---|---|---|---|"]
    found = [(record.get("levels") or record["method_specific"])["validation_by_stop"] for record in records(name)]
    for stop in found[0] if found else ():
        mean = {k: np.mean([f[stop][k] for f in found]) for k in found[0][stop]}
        lines.append(f"| `--stop {stop}` | {'mean' if stop == 'ttest' else 'majority'} | {mean['share_of_calls']:.2f} | {mean['same_label']:.3f} |")
    return "\n".join(lines)


def steps_table(name):
    """The README's table of the flow's steps and draws: validation, mean over the seeds of a cell."""
    lines = ["| steps | draws | accuracy | ECE | NLL | ms an image |", "|---|---|---|---|---|---|"]
    for rows in zip(*(record["method_specific"]["validation_by_steps_and_samples"] for record in records(name))):
        mean = {k: np.mean([row[k] for row in rows]) for k in rows[0]}
        lines.append(f"| {rows[0]['steps']} | {rows[0]['samples']} | {mean['accuracy']:.3f} | {mean['ece']:.3f} | {mean['nll']:.3f} | {1e3 * mean['seconds_an_image']:.1f} |")
    return "\n".join(lines)


DRAWN = {"label, as the plain ResNet sees it": ("label_agreement", "label_agreement_of_validation"),
         "Frechet distance, of the ResNet's features, to validation": ("frechet_drawn_to_validation", "frechet_training_to_validation"),
         "kernel distance, of the same": ("kernel_drawn_to_validation", "kernel_training_to_validation"),
         "distance to the nearest training image, grey levels": ("distance_to_training", "distance_of_validation")}


def drawn_table(name):
    """The README's table of drawn images beside real ones that the flow never saw, or for the two distances some that it did."""
    found = [record["method_specific"]["drawn"] for record in records(name)]
    lines = ["| | drawn | real |", "|---|---|---|"]
    for what, keys in DRAWN.items():
        cells = [[f[key] for f in found] for key in keys]
        lines.append(f"| {what} | " + " | ".join(f"{np.mean(v):.3g} ± {np.std(v, ddof=1):.2g}" for v in cells) + " |")
    return "\n".join(lines)


def coverage_table(name):
    """Accuracy of what is left when the most uncertain images are set aside: mean over the seeds of a cell."""
    found = [record["accuracy_by_coverage"] for record in records(name)]
    shown = (0, 4, 8, 12, 16, 19)                                       # of 0, 5, .. 95 % set aside
    lines = ["| set aside | " + " | ".join(f"{5 * i} %" for i in shown) + " |", "|---|" + "---|" * len(shown)]
    for model in found[0]:
        lines.append(f"| {model} | " + " | ".join(f"{np.mean([f[model][i][1] for f in found]):.3f}" for i in shown) + " |")
    return "\n".join(lines)


def records(name):
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-s[0-9]*.json"))]


def rows(name):
    """[(model, {key: values over seeds}), ...] of a cell: the method, its controls, the Bayes optimum where it is known."""
    found = {}
    for record in records(name):
        for model, m in [(record["method"], record["test"]), *record["baselines"].items(), ("Bayes optimum", record.get("bayes"))]:
            for key in KEYS if m else ():
                found.setdefault(model, {}).setdefault(key, []).append(m[key])
    return list(found.items())


def table(name):
    """The README's table of a cell, in Markdown: mean and sd over seeds."""
    lines = ["| | accuracy | macro F1 | AUROC | ECE | AURC |", "|---|---|---|---|---|---|"]
    for model, values in rows(name):
        cells = [f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") for v in values.values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ============================================================================= side by side, on the same test images
SCORES = {"accuracy": lambda y, p: metrics.accuracy(y, p.argmax(1)), "balanced accuracy": lambda y, p: metrics.balanced_accuracy(y, p.argmax(1)),
          "macro F1": lambda y, p: metrics.f1_macro(y, p.argmax(1)), "AUROC": metrics.auroc, "AURC": lambda y, p: -metrics.aurc(p.argmax(1) == y, 1 - p.max(1)),              # less is better
          "AUROC of right against wrong": lambda y, p: metrics.auroc((p.argmax(1) != y).astype(int), 1 - p.max(1))}
NAMES = {"resnet": "ResNet-18", "resnets": "mean of five ResNets", "diffmic": "DiffMIC", "symmflow": "MedSymmFlow", "diffclassifier": "diffusion classifier", "mediffusion": "Mediffusion"}
SHOWN = {"retinamnist": "RetinaMNIST", "pneumoniamnist": "PneumoniaMNIST", "ham10000": "HAM10000"}
RESNET = "is ahead of a ResNet-18 given the same images and about as many minutes"
FIVE = "is ahead of five ResNets that share one's passes"
PLUS = "is ahead with recipe plus of itself with recipe paper"
FEW = [*(f"pneumoniamnist-{share}" for share in SHARES), "ham10000-0.1"]
CLAIMS = {                                                              # (it .., in what, its cells, those it is set against)
    "DiffMIC": [(FIVE, "AUROC", [f"diffmic-{data}" for data in REAL], [f"resnets-{data}" for data in REAL]), *((words, "macro F1", [f"diffmic-{data}" for data in REAL], [f"{other}-{data}" for data in REAL]) for words, other in ((RESNET, "resnet"), (FIVE, "resnets"))),
                (PLUS, "macro F1", [f"diffmic-{data}" for data in REAL], [f"diffmic-{data}-paper" for data in REAL]),
                *((words, "macro F1", [f"diffmic-retinamnist{one}"], [f"diffmic-retinamnist-{other}"]) for words, one, other in (
                    ("is ahead of its guide alone", "", "dcg"), ("is ahead of itself without the MMD (C2)", "", "c2"), ("is without the MMD ahead of itself without a guide, too (C1)", "-c2", "c1"),
                    ("is without a guide ahead of a plain ResNet-18 (basic)", "-c1", "basic")))],
    "MedSymmFlow": [*((words, score, [f"symmflow-{data}" for data in REAL], [f"{other}-{data}{end}" for data in REAL])
                      for words, other, end in ((RESNET, "resnet", ""), (FIVE, "resnets", ""), (PLUS, "symmflow", "-paper")) for score in ("AUROC", "AURC")),
                    ("is ahead with one-hot codes of itself with the paper's palette", "AUROC", ["symmflow-retinamnist-map"], ["symmflow-retinamnist-rgb"]),
                    ("is ahead with grey codes of itself with the paper's palette", "AUROC", ["symmflow-retinamnist-grey"], ["symmflow-retinamnist-rgb"])],
    "The diffusion classifier": [*((words, "balanced accuracy", [f"diffclassifier-{data}" for data in REAL], [f"{other}-{data}" for data in REAL]) for words, other in ((RESNET, "resnet"), (FIVE, "resnets"))),
                                 (FIVE, "AUROC", [f"diffclassifier-{data}" for data in REAL], [f"resnets-{data}" for data in REAL]),
                                 *((f"is ahead of {words} whose classes are taken to be equally frequent, too", "balanced accuracy", [f"diffclassifier-{data}" for data in REAL], [f"{other}-{data}/shares" for data in REAL])
                                   for words, other in (("a ResNet-18", "resnet"), ("five ResNets", "resnets"))),
                                 ("tells its errors from its right answers better than a ResNet-18", "AUROC of right against wrong", [f"diffclassifier-{data}" for data in REAL], [f"resnet-{data}" for data in REAL]),
                                 (PLUS + ", whose network calls are four times as many, after half as much training", "balanced accuracy", [f"diffclassifier-{data}" for data in REAL], [f"diffclassifier-{data}-paper" for data in REAL]),
                                 ("is ahead, trained on other images first, of itself from scratch", "balanced accuracy", ["diffclassifier-retinamnist-init"], ["diffclassifier-retinamnist"])],
    "Mediffusion": [*((words, "AUROC", [f"mediffusion-{data}" for data in REAL], [f"{other}-{data}" for data in REAL]) for words, other in ((RESNET, "resnet"), (FIVE, "resnets"))),
                    ("is ahead of its classifier without the diffusion", "AUROC", [*(f"joint-{cell}" for cell in FEW), "mediffusion-pneumoniamnist"], [*(f"alone-{cell}" for cell in FEW), "alone-pneumoniamnist"]),
                    *((words, "AUROC", [f"joint-{cell}" for cell in cells], [f"{other}-{cell}{end}" for cell in cells]) for words, other, cells, end in (
                        ("is ahead of a ResNet-18 of the same labels", "resnet", FEW, ""),
                        ("is ahead with strong views of itself without", "joint", FEW[2::2], "-weak"), ("is ahead of FixMatch on a ResNet-18 of the same images and labels", "fixmatch", FEW, ""), (PLUS, "joint", FEW[2::2], "-paper")))]}


def said(name):
    """{seed: (ids, labels (N,), p (N, K))} of a cell's test images; of CELL/shares, p over the classes' shares in training, as if they were equally frequent."""
    name, _, over = name.partition("/")
    found, of = {}, records(f"diffclassifier-{name.partition('-')[2]}") if over else []
    for path in sorted(RESULTS.glob(f"{name}-s[0-9]*.npz")) if of or not over else ():
        with np.load(path) as file:
            p = file["p"].astype(np.float64) / (of[0]["method_specific"]["shares"] if over else 1)
            found[int(path.stem.rpartition("-s")[2])] = file["ids"], file["labels"], p / p.sum(1, keepdims=True)
    return found


def difference(one, other, score, n=1000):
    """Of two cells' answers (`said`), on the images that both answered: the mean over the seeds of score(one) - score(other), its sd, and the 95 % interval
    when seeds and images are drawn again, each image with all its answers; seeds may have seen other images."""
    both, every = [], sorted(set().union(*(found[0] for cell in (one, other) for found in cell.values())))
    for seed in sorted(one.keys() & other.keys()):
        ids, mine, theirs = np.intersect1d(one[seed][0], other[seed][0], return_indices=True)
        y, row = one[seed][1][mine], np.full(len(every), -1)
        if not len(ids) or (y != other[seed][1][theirs]).any():
            raise ValueError(f"seed {seed}: not the same images, or other labels")
        row[np.searchsorted(every, ids)] = np.arange(len(ids))
        both.append((row, y, one[seed][2][mine], other[seed][2][theirs]))

    def of(seed, images):
        row, y, p, q = both[seed]
        rows = row[images][row[images] >= 0]
        return score(y[rows], p[rows]) - score(y[rows], q[rows])
    by_seed, rng = [of(seed, np.arange(len(every))) for seed in range(len(both))], np.random.default_rng(0)
    drawn_again = []
    for _ in range(n):
        images = rng.integers(len(every), size=len(every))
        drawn_again.append(np.mean([of(seed, images) for seed in rng.integers(len(both), size=len(both))]))
    low, high = np.nanquantile(drawn_again, (.025, .975))
    return {"mean": float(np.mean(by_seed)), "sd": float(np.std(by_seed, ddof=1)) if len(both) > 1 else None, "low": float(low), "high": float(high),
            "by_seed": by_seed, "images": max(len(y) for _, y, _, _ in both)}


def differences():
    """Writes differences.json: on each of REAL, every method and five ResNets against one ResNet of the same minutes; and all of CLAIMS whose cells are there."""
    found = {"command": "python -m tests.claims --differences", "against": {}, "claims": []}
    for data in REAL:
        answered = {name: said(f"{name}-{data}") for name in ("resnet", "resnets", *FOR_ALL)}
        found["against"][data] = {name: {key: difference(mine, answered["resnet"], score) for key, score in SCORES.items()}
                                  for name, mine in answered.items() if name != "resnet" and mine and answered["resnet"]}
    for method, claims in CLAIMS.items():
        for words, score, ones, others in claims:
            for one, other in zip(ones, others):
                if (mine := said(one)) and (theirs := said(other)):
                    found["claims"].append(dict(method=method, claim=words, score=score, one=one, other=other) | difference(mine, theirs, SCORES[score]))
    path = RESULTS / "differences.json"
    path.write_text(json.dumps(found, indent=1))
    return path


def verdict(row):
    """Of a claim's difference and its interval: holds, does not, or cannot be told."""
    return "holds" if row["low"] > 0 else "does not" if row["high"] < 0 else "cannot be told"


def place(cell):
    """Where a claim was tried, as a sentence names it."""
    data = next(name for name in REAL if name in cell)
    share = re.search(r"-(0\.\d+)", cell)
    return f"{SHOWN[data]}, {float(share[1]):.0%} of the labels," if share else SHOWN[data]


def sentences(methods=CLAIMS, only=None):
    """The verdicts on CLAIMS, a sentence each, as a list in Markdown; of those without a record, that they were not measured."""
    found, lines = json.loads((RESULTS / "differences.json").read_text())["claims"], []
    for method in methods:
        for words, score, *_ in CLAIMS[method]:
            rows = [row for row in found if (row["method"], row["claim"], row["score"]) == (method, words, score)]
            each = [f"{place(row['one'])} {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]: {verdict(row)}{seeds(row['by_seed'])}" for row in rows]
            if only is None or words in only:
                lines.append(f"- {method} {words}, in {score}: {'; '.join(each) or 'not measured yet'}.")
    return "\n".join(lines)


def seeds(found):
    """How many, where they are not three."""
    return "" if len(found) == 3 else f" ({len(found)} seed{'s' * (len(found) > 1)})"


def interval(found):
    """As the tables print a difference; in bold where the interval leaves out 0."""
    text = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]{seeds(found['by_seed'])}"
    return f"**{text}**" if found["low"] * found["high"] > 0 else text


def on_test(cell):
    """A cell's test scores, a dict a seed; its AURC ranks by the largest p, as those of its controls and the differences do."""
    largest = [{"aurc": -SCORES["AURC"](y, p)} for _, (_, y, p) in sorted(said(cell).items())]
    return [record["test"] | mine for record, mine in zip(records(cell), largest)]


PARTS = {"diffmic": {"guide": "its guide alone"}, "diffclassifier": {"rule majority": "by votes", "rule mean": "by mean errors"}}


def side_table(data):
    """The four methods, one ResNet and five on one test split: mean and sd over seeds, and what each costs; below a method what its own parts say; at the end what
    needs no pixels."""
    lines = ["| | accuracy | balanced | macro F1 | AUROC | ECE | AURC | s to train | ms an image | parameters |", "|---|" + "---|" * 9]
    for name, recipe in (("resnet", ""), ("resnets", ""), *((method, recipe) for method in FOR_ALL for recipe in ("", "-paper"))):
        found, title = records(f"{name}-{data}{recipe}"), NAMES[name] + ", recipe paper" * bool(recipe)
        parts = {words: of for part, words in PARTS.get(name, {}).items() if len(of := [r["baselines"][part] for r in found if part in r.get("baselines", ())]) == len(found)}
        for words, of in ({"": on_test(f"{name}-{data}{recipe}")} | parts if found else {}).items():
            cells = []
            for key in ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "aurc"):
                v = [test[key] for test in of]
                cells.append(f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else ""))
            cost = " |  | " if words else f"{np.median([r['seconds'] for r in found]):.0f} | {np.median([r['ms_an_image'] for r in found]):.1f} | {found[0]['params']:,}"
            lines.append(f"| {title}{': ' * bool(words)}{words}{seeds(found)} | {' | '.join(cells)} | {cost} |")
    for part, title in ("majority", "majority class"), ("shortcut", "a tree that sees no pixels"):
        if of := [r["baselines"][part] for r in records(f"resnet-{data}") if part in r.get("baselines", ())]:
            cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=len(v) > 1):.3f}" for v in ([test[key] for test in of] for key in ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "aurc"))]
            lines.append(f"| {title} | {' | '.join(cells)} |  |  |  |")
    return "\n".join(lines)


def all_sides_table():
    """The README's: on each of REAL, mean over seeds of what a user asks first, in recipe plus; of the costs the median."""
    keys, done = {"balanced accuracy": "balanced_accuracy", "AUROC": "auroc"}, [data for data in REAL if records(f"resnet-{data}")]
    lines = ["| | " + " | ".join(f"{SHOWN[data]}: {key}" if i == 0 else key for data in done for i, key in enumerate(keys)) + " | s to train | ms an image |", "|---|" + "---|" * (len(keys) * len(done) + 2)]
    for name in ("resnet", "resnets", *FOR_ALL):
        found = [records(f"{name}-{data}") for data in done]
        cells = [f"{np.mean([test[key] for test in of]):.3f}{seeds(of) if i == 0 else ''}" if of else "" for of in (on_test(f"{name}-{data}") for data in done) for i, key in enumerate(keys.values())]
        costs = [" / ".join(f"{np.median([r[key] for r in of]):.{digits}f}" for of in found if of) for key, digits in (("seconds", 0), ("ms_an_image", 1))]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells + costs)} |")
    return "\n".join(lines)


def verdicts_table():
    """The README's: of each method, in the metric that it is for, the differences from what it must beat, on each of REAL in their order."""
    found = json.loads((RESULTS / "differences.json").read_text())["claims"]
    lines = ["| | in | against a ResNet-18 | against five ResNets | `plus` against `paper` |", "|---|---|---|---|---|"]
    short = lambda row: f"**{row['mean']:+.3f}**" if row["low"] * row["high"] > 0 else f"{row['mean']:+.3f}"
    of = lambda ones, score, other: " / ".join(short(row) + seeds(row["by_seed"]) for row in found if row["score"] == score and row["one"] in ones and re.fullmatch(other, row["other"]))
    rows = [(method, score, ones) for method, claims in CLAIMS.items() for words, score, ones, _ in claims if words == RESNET]
    tenth = [f"joint-{cell}" for cell in FEW[2::2] if any(row["one"] == f"joint-{cell}" for row in found)]
    for method, score, ones in [*rows, (f"Mediffusion, a tenth of the labels ({' / '.join(SHOWN[cell.split('-')[1]] for cell in tenth)})", "AUROC", tenth)]:
        cells = [of(ones, score, other) for other in (r"resnet-\w+(-0\.\d+)?", r"resnets-\w+", ".*-paper")]
        if any(cells):
            lines.append(f"| {method} | {score} | {' | '.join(cell or 'not claimed' for cell in cells)} |")
    return "\n".join(lines)


ARMS = {"Mediffusion": "joint", "its classifier alone": "alone", "ResNet-18": "resnet", "FixMatch, the same ResNet-18": "fixmatch"}


def by_share():
    """{arm: [AUROC on test of each seed, for each share of the labels]}; the whole of them is the cell of all methods."""
    whole = {"joint": "mediffusion"}
    return {arm: [[r["test"]["auroc"] for r in records(f"{name}-pneumoniamnist-{share}" if share != "1" else f"{whole.get(name, name)}-pneumoniamnist")] for share in (*SHARES, "1")]
            for arm, name in ARMS.items()}


def shares_table():
    """AUROC on test by the share of the labels that was shown, where there are records: mean and sd over seeds."""
    lines = ["| labels shown | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    titles = [*(f"PneumoniaMNIST, {float(share):.0%}" for share in (*SHARES, "1")), "HAM10000, 10%"]
    for title, *row in zip(titles, *([*of, [r["test"]["auroc"] for r in records(f"{ARMS[arm]}-ham10000-0.1")]] for arm, of in by_share().items())):
        cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else f"{v[0]:.3f} (one seed)" if v else "" for v in row]
        lines += [f"| {title} | {' | '.join(cells)} |"] * any(cells)
    return "\n".join(lines)


def curves():
    """The pictures of the tables: accuracy on the surest images, AUROC by the share of the labels, accuracy by the number of noise levels."""
    for data in REAL:
        series = {}
        for name in ("resnet", *FOR_ALL):
            lines = [metrics.coverage_accuracy(p.argmax(1) == y, 1 - p.max(1)) for _, y, p in said(f"{name}-{data}").values()]
            if lines:
                series[f"{NAMES[name]} ({len(lines)} seeds)"] = lines[0][0], np.mean([accuracy for _, accuracy in lines], 0)
        if series:
            plots.coverage(RESULTS / f"{data}-coverage.png", series, f"Accuracy on the images a model is surest of: {SHOWN[data]}")
    few = {arm: [v for v in of[:-1]] for arm, of in by_share().items() if all(of[:-1])}
    if few:
        band = lambda of: ([100 * float(share) for share in SHARES], *(np.array([f(v) for v in of]) for f in (np.mean, np.min, np.max)))
        plots.line_chart(RESULTS / "labels.png", {arm: band(of) for arm, of in few.items()}, "PneumoniaMNIST by the share of the labels; band: the seeds", "% of the labels shown", "AUROC, test")
    series = {}
    found = [record["levels"]["validation_by_votes"] for record in records("diffclassifier-retinamnist")]
    for rule in ("majority", "mean", "elbo", "learned") if found else ():
        series[rule] = np.log10([row["votes"] for row in found[0]]), np.mean([[row[rule] for row in table] for table in found], 0)
    if series:
        plots.line_chart(RESULTS / "levels.png", series, "RetinaMNIST, validation, to which learned is fitted", "log10 of the noise levels an image", "accuracy")


PAPERS = [                                                              # what the papers say of data that is here
    ("DiffMIC", "diffmic", "ham10000", dict(accuracy=.906, f1_macro=.816), "all 10,015 images at 224 px, ImageNet weights, 1,000 epochs, a split that shares lesions"),
    ("MedSymmFlow", "symmflow", "retinamnist", dict(accuracy=.514, auroc=.731), "1,000 epochs of a U-Net with 64 channels"),
    ("MedSymmFlow", "symmflow", "pneumoniamnist", dict(accuracy=.880, auroc=.952), "the same"),
    ("ResNet-18", "resnet", "retinamnist", dict(accuracy=.524, auroc=.717), "64 channels, 100 epochs: MedMNIST's own"),
    ("ResNet-18", "resnet", "pneumoniamnist", dict(accuracy=.854, auroc=.944), "the same")]


def papers_table():
    """The papers' numbers beside ours, where the data are the same or a part of them."""
    words = {"accuracy": "accuracy", "f1_macro": "macro F1", "auroc": "AUROC"}
    lines = ["| | data | the paper | `plus` | `--recipe paper` | what the paper had |", "|---|---|---|---|---|---|"]
    for name, method, data, said, why in PAPERS:
        ours = [", ".join(f"{np.mean([r['test'][key] for r in of]):.3f}" for key in said) if (of := records(f"{method}-{data}{end}")) else "" for end in ("", "-paper")]
        lines.append(f"| {name} | {SHOWN[data]} | {', '.join(f'{words[key]} {value:.3f}' for key, value in said.items())} | {' | '.join(ours)} | {why} |")
    return "\n".join(lines)


def differences_table(data):
    """What is ahead of one ResNet of the same minutes: differences with their 95 % intervals."""
    found = json.loads((RESULTS / "differences.json").read_text())["against"][data]
    lines = ["| ahead of a ResNet-18 by | " + " | ".join(SCORES) + " |", "|---|" + "---|" * len(SCORES)]
    for name, row in found.items():
        lines.append(f"| {NAMES[name]} | {' | '.join(interval(row[key]) for key in SCORES)} |")
    return "\n".join(lines)


def votes(folder):
    """Keeps what tests/bench.py stops early: the class that errs least (300, 501) of 300 toy test images at 501 noise levels."""
    diffclassifier = importlib.import_module("diffclassifier")
    config, nets, facts, device = running.load_model(Path(folder) / "best.pt", "diffclassifier", diffclassifier.Config, diffclassifier.build,
                                                     dict(votes=501, judged=300, stop="none"))
    error, *_ = diffclassifier.judge(nets, config, load_for(config).test, device)
    np.savez_compressed(RESULTS / "diffclassifier-votes.npz", votes=error.argmin(2).astype(np.uint8), classes=len(facts["classes"]))
    return RESULTS / "diffclassifier-votes.npz"


# ============================================================================= pictures
def pictures(folder):
    """The README's pictures, out of a toy run."""
    method = json.loads((Path(folder) / "metrics.json").read_text())["method"]
    return diffmic_pictures(folder) if method == "diffmic" else figures_and_explanation(method, folder)


FIGURES = {"symmflow": ("drawn", "nearest", "coverage"), "diffclassifier": ("rules", "errors", "coverage"),
           "mediffusion": ("counterfactuals",)}                         # of a run: what the README shows


def figures_and_explanation(method, folder):
    """FIGURES of a run, and a panel of explain."""
    for name in FIGURES[method]:
        shutil.copy(Path(folder) / "figures" / f"{name}.png", RESULTS / f"{method}-{name}.png")
    with tempfile.TemporaryDirectory() as out:
        importlib.import_module(method).explain_command(Path(folder) / "best.pt", limit=8, output=out)
        shutil.copy(sorted(Path(out).glob("0*.png"))[1], RESULTS / f"{method}-explain.png")
    return RESULTS / f"{method}-explain.png"


def diffmic_pictures(folder):
    """Predictions, one explanation, t-SNE as the paper's Fig. 2."""
    diffmic = importlib.import_module("diffmic")
    with tempfile.TemporaryDirectory() as out:
        diffmic.explain_command(Path(folder) / "best.pt", tsne=True, limit=8, output=out)
        panels = sorted(Path(out).glob("0*.png"))
        for source, name in (panels[1], "explain"), (Path(out) / "overview.png", "overview"), (Path(out) / "tsne.png", "tsne"):
            shutil.copy(source, RESULTS / f"diffmic-{name}.png")
    return picture(folder)


def picture(folder, path=RESULTS / "diffmic.png"):
    """Test images of a toy run by true class, each with what was predicted and how probably."""
    with open(Path(folder) / "predictions.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    test = toy.make(json.loads((Path(folder) / "config.json").read_text())["seed"], 96, {"train": 1, "val": 1}).test
    images, labels = [], []
    for k, name in enumerate(toy.CLASSES):
        some = [i for i in np.flatnonzero(test.labels == k) if test.ids[i] in rows][:8]
        found = [rows[test.ids[i]] for i in some]
        images.append(test.images[some])
        labels.append([f"{r['predicted']} {float(r['p:' + r['predicted']]):.2f}" for r in found])
    return plots.image_grid(path, images, labels, [f"true: {name}" for name in toy.CLASSES], scale=1,
                            title="DiffMIC on the toy test set (drawn at 96 px, classified at 32): predicted class and its probability")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CELLS)
    parser.add_argument("--root", help="folder of the data set, where it is not data/raw/NAME")
    parser.add_argument("--table", action="store_true", help="print the tables made from the records")
    parser.add_argument("--differences", action="store_true", help="of the cells on real images, with their intervals, and what they say of each claim")
    parser.add_argument("--votes", metavar="RUN", help="keep the votes of 300 test images at 501 levels, of a toy run of diffclassifier.py")
    parser.add_argument("--counterfactuals", metavar="RUN", help="of a run of mediffusion.py, by a judge that saw other patients")
    parser.add_argument("--images", type=int, default=64, help="how many a row; default 64")
    parser.add_argument("--boxed", action="store_true", help="enforce in images with a box of another finding, as the authors do, not in those of none")
    parser.add_argument("--picture", metavar="RUN", help="draw tests/results/METHOD*.png from a toy run")
    args = parser.parse_args(argv)
    if args.counterfactuals:
        try:
            return print(counterfactuals(args.counterfactuals, args.images, args.boxed))
        except (running.UserError, DataError) as fault:
            print(f"error: {fault}", file=sys.stderr)
            return 2
    if args.picture:
        return print(pictures(args.picture))
    if args.differences:
        return print(differences(), curves() or "")
    if args.votes:
        return print(votes(args.votes))
    if args.table:
        print(*(regions_table("diffmic-toy"), ideas_table("diffmic"), few_table(), steps_table("symmflow-toy"), coverage_table("symmflow-toy"), drawn_table("symmflow-toy"),
                ideas_table("symmflow"), votes_table(), by_votes_table(), stops_table(), labels_table(), shares_table(), choices_table(), all_sides_table(), papers_table(), *map(side_table, REAL), *map(differences_table, REAL), sentences(),
                *map(reverse_table, ("diffmic-retinamnist", "diffmic-retinamnist-paper")), by_votes_table("diffclassifier-retinamnist"), stops_table("diffclassifier-retinamnist"), priors_table("diffclassifier-retinamnist")), sep="\n\n")
    for name in args.only or CELLS:
        if args.table:
            print(f"{name}\n{table(name)}\n")
            continue
        for seed in CELLS[name][2]:
            if not (RESULTS / f"{name}-s{seed}.json").exists():
                run(name, seed, args.root)


if __name__ == "__main__":
    sys.exit(main())
