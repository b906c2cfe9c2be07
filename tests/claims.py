"""The numbers that the README quotes: `python -m tests.claims [--only NAME] [--table]`.

Each cell (method, settings, seed) is one ordinary training; its metrics.json is the record, kept in tests/results/NAME-sSEED.json with
the command that made it. Cells whose record is there are not run again: delete the file to measure anew. --table prints the README's
table from the records, --picture RUN its picture; tests/test_readme.py holds the two together.
"""
import argparse
import csv
import importlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from common import plots
from data import toy

RESULTS = Path(__file__).resolve().parent / "results"
CELLS = {                                                               # name: (method, settings, seeds)
    "diffmic-toy": ("diffmic", dict(data="toy"), (0, 1, 2)),
    "diffmic-toy-paper": ("diffmic", dict(data="toy", recipe="paper"), (0,)),
    "diffmic-ham10000-small": ("diffmic", dict(data="ham10000", scale="small"), (0,)),
}
KEYS = ("accuracy", "f1_macro", "auroc", "ece")


def command(name, seed):
    method, settings, _ = CELLS[name]
    options = " ".join(f"--{k} {v}" for k, v in (settings | {"seed": seed}).items() if (k, v) not in (("data", "toy"), ("seed", 0)))
    return f"python {method}.py {options}".strip()


def run(name, seed, root=None):
    """Trains one cell and writes its record."""
    method, settings, _ = CELLS[name]
    module = importlib.import_module(method)
    with tempfile.TemporaryDirectory() as folder:
        given = settings | dict(seed=seed, output=str(Path(folder) / "run")) | (dict(root=root) if root else {})
        result = module.train(module.configure(**given))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-s{seed}.json").write_text(json.dumps({"command": command(name, seed)} | result, indent=1))


def records(name):
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-s*.json"))]


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
    lines = ["| | accuracy | macro F1 | AUROC | ECE |", "|---|---|---|---|---|"]
    for model, values in rows(name):
        cells = [f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") for v in values.values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(folder, path=RESULTS / "diffmic.png"):
    """The README's picture: test images of a toy run by true class, each with what was predicted and how probably."""
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
    parser.add_argument("--only", choices=CELLS)
    parser.add_argument("--root", help="folder of the data set, where it is not data/raw/NAME")
    parser.add_argument("--table", action="store_true", help="print the tables made from the records")
    parser.add_argument("--picture", metavar="RUN", help="draw tests/results/diffmic.png from a toy run")
    args = parser.parse_args(argv)
    if args.picture:
        return print(picture(args.picture))
    for name in [args.only] if args.only else CELLS:
        if args.table:
            print(f"{name}\n{table(name)}\n")
            continue
        for seed in CELLS[name][2]:
            if not (RESULTS / f"{name}-s{seed}.json").exists():
                run(name, seed, args.root)


if __name__ == "__main__":
    sys.exit(main())
