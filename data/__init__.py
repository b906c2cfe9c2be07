"""Data sets as arrays: `load(name, root)` decodes once and splits by patient, `Batches` turns a split into float batches."""
import dataclasses
import functools
from pathlib import Path

import numpy as np

from . import aptos2019, cache, chestxray14, chexpert, folder, ham10000, isic2019, isic2020, medmnist, pmg2000, report, splits, toy
from .batches import Batches, mirrored
from .images import FITS, read_images, too_many_bad
from .shortcut import columns, shortcut, telling
from .splits import labelled
from .types import DataError, DataSet, Split

__all__ = ["load", "Batches", "DataSet", "Split", "DataError", "NAMES", "load_for", "mirrored", "read_split", "labelled", "shortcut"]
# A data set of one's own: a module with `table(root, split, test_only, skip_bad, classes) -> tables.Table`, as pmg2000.py has, and its name here
LOADERS = {"ham10000": ham10000.table, "isic2019": isic2019.table, "isic2020": isic2020.table, "chexpert": chexpert.table,
           "chestxray14": chestxray14.table, "aptos2019": aptos2019.table, "pmg2000": pmg2000.table, "folder": folder.table,
           **{name: functools.partial(chexpert.table, reading=reading) for name, reading in chexpert.READINGS.items()}}
NAMES = (*toy.NAMES, *LOADERS, *medmnist.CLASSES)
SPLIT_RULES = ("official", "group", "paper")


def load(name, root=None, size=None, seed=0, *, split="official", limit=0, fit=None, skip_bad=False, test_only=False,
         classes=None, channels=None, several=True):
    """A data set, decoded to `size` x `size` pixels and split: DataSet. Raises DataError for every mistake of a user.

    name      one of NAMES
    root      its folder (MedMNIST: or the .npz file itself); default data/raw/NAME (MedMNIST: or ~/.medmnist)
    size      pixels a side; default 32 for toy sets and MedMNIST, else 224
    seed      of the toy images and of `limit`; no split depends on it
    split     "official": the test set that comes with the data, less training images of its patients, else as "group"; "group": 30 % test and 10 % validation by
              patient or lesion; "paper": the same by image, as DiffMIC did, so that lesions are on both sides (the diffusion
              classifier's two sets, chexpert by patient and isic2020 by image: 10 % and 10 %, as many images of each class;
              Mediffusion's, isic2019 by image: 20 % and 10 %, and chestxray14 as "official")
    limit     at most this many images a split, each class its share and at least one, drawn before decoding
    fit       "crop" the central square (default) or "squash" the whole picture
    skip_bad  leave out files that are missing or cannot be read, and say how many; otherwise they are an error
    test_only only test is wanted (train and val are None), so root may hold nothing else; a plain folder of classes is then
              all test: for foreign data, never for the root that a model was trained on
    classes   the class names in the order that the labels shall have, as a trained model knows them
    channels  1 or 3; default as the pictures are
    several   False: of data with several labels an image a DataError, before anything is decoded
    """
    if name not in NAMES:
        raise DataError(f"--data {name}: no such data set; known: {', '.join(NAMES)} (own images: --data folder --root DIR)")
    if split not in SPLIT_RULES:
        raise DataError(f"--split {split}: no such rule; known: {', '.join(SPLIT_RULES)}")
    fit, size = fit or "crop", size or (32 if name in (*toy.NAMES, *medmnist.CLASSES) else 224)
    if fit not in FITS:
        raise DataError(f"--fit {fit}: no such way; known: {', '.join(FITS)}")
    if not 8 <= size <= 2048:
        raise DataError(f"--size {size}: must be 8..2048 pixels")
    if name in toy.NAMES:
        return _toy(name, seed, size, limit, test_only, classes)

    given, root = root, Path(root or Path(__file__).parent / "raw" / ("chexpert" if name in chexpert.READINGS else name))
    try:
        table = LOADERS[name](root, split=split, test_only=test_only, skip_bad=skip_bad, classes=classes) if name in LOADERS else None
        if not several and (table.multilabel if table else name in medmnist.MULTILABEL):
            raise DataError(f"--data {name}: has several labels an image, this method takes one; name a single-label data set, or take mediffusion.py")
        if table is None:
            return medmnist.load(name, given, size, seed, split, limit, test_only, classes, channels)
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read ({error.strerror}); check its permissions") from None
    if classes:
        _relabel(table, list(classes), root)
    records, notes = table.records, table.notes
    if split != "paper":
        records = splits.apart(records, notes)
    for part, n, of in zip(("test", "validation"), splits.leaking(records), ("train or validation", "train")):
        if n:
            notes.append(f"LEAK: {n:,} {part} images show a patient or lesion that is in {of} too; train with --split group")
    if test_only:
        records = [r for r in records if r.split == "test"]
    records = _limited(records, limit, seed)
    return _decoded(name, root, records, table, size, channels or table.channels, fit, skip_bad, test_only)


def load_for(config, facts=None):
    """The data set that a run's settings name. `facts` (classes, channels, own_data) of a trained model: as that knows it, and of another
    data set than its own the test split alone. Of a method that judges slowly, `judged` images of validation and of test are drawn by class. Of one
    that needs few, `labels` says of which training images the label is shown: the others' are -1, and those join each batch (Split.few)."""
    known = {} if facts is None else dict(test_only=not facts["own_data"], classes=facts["classes"], channels=facts["channels"])
    data = load(config.data, config.root or None, config.size, config.seed, split=config.split, fit=config.fit, limit=config.limit,
                skip_bad=config.skip_bad, several=hasattr(config, "labels"), **known)
    if hasattr(config, "labels") and data.train is not None:
        try:
            known = labelled(data.train, config.labels, config.seed, [*data.val.ids, *data.test.ids])
        except DataError:                                               # a list that is gone, or names images that a limit leaves out
            if facts is None:
                raise
            data.train = None                                           # a trained model is scored all the same, without the row `shortcut`
            return data
        few = np.flatnonzero(known), config.labelled_batch, *(name for name in config.few_augment.split(",") if name)
        data.train = dataclasses.replace(data.train, few=few, labels=data.train.labels.copy())
        data.train.labels[~known] = -1
        data.notes = [*data.notes, f"--labels {config.labels}: {known.sum():,} of {len(known):,} training images keep their label; the others are seen without it"]
    judged = getattr(config, "judged", 0)
    for number, part in enumerate(splits.SPLITS[1:] if judged else ()):
        whole = getattr(data, part)
        if whole is not None and len(whole) > judged:
            setattr(data, part, whole.take(splits.draw(whole.labels, judged, np.random.default_rng([config.seed, 3 + number]))))
    return data


def read_split(paths, config, facts):
    """A user's own files and folders as a trained model takes them: a Split whose labels are -1, and a list of problems."""
    border = facts.get("border", 0)
    images, ids, problems = read_images(paths, config.size - 2 * border, facts["channels"], config.fit, config.skip_bad)
    images = np.pad(images, ((0, 0), (0, 0), (border, border), (border, border)), mode="edge")
    unknown = np.full((len(ids), len(facts["classes"])), -1, np.float32) if facts.get("multilabel") else np.full(len(ids), -1)
    return Split(images, unknown, ids), problems


def _limited(records, limit, seed):
    """Records in the order train, val, test, so that each split is one piece of the array; at most `limit` of each."""
    kept = []
    for number, part in enumerate(splits.SPLITS):
        inside = sorted((r for r in records if r.split == part), key=lambda r: r.id)
        if limit and inside:
            rows = splits.draw([r.label for r in inside], limit, np.random.default_rng([seed, number]))
            inside = [inside[row] for row in rows]
        kept += inside
    return kept


def _decoded(name, root, records, table, size, channels, fit, skip_bad, test_only):
    """Records -> DataSet: pictures from the cache, without those that cannot be read or that are on two sides."""
    images, hashes, bad, sizes, notes = cache.load([r.path for r in records], size, channels, fit, name)
    notes = table.notes + notes
    if bad:
        line = too_many_bad(list(bad.values()), len(records))
        if not skip_bad:
            raise DataError(line)
        first = next(iter(bad.values()))
        notes.append(f"{len(bad):,} of {len(records):,} images cannot be read and are left out, first: {first}")
    sides = ["bad" if row in bad else r.split for row, r in enumerate(records)]
    twice = splits.duplicates(hashes, sides)
    for part, rows, of in zip(("train", "validation"), twice, ("validation or test", "test")):
        if rows:
            notes.append(f"{len(rows):,} {part} images dropped: pixel for pixel the same as one in {of}")
    for row in (*bad, *twice[0], *twice[1]):
        sides[row] = None
    parts, source, no_box = {}, columns(records, sizes), np.full((len(table.classes), 4), np.nan, np.float32)
    for part in ("test",) if test_only else splits.SPLITS:
        rows = np.flatnonzero([side == part for side in sides])
        if not len(rows):
            raise DataError("; ".join([f"{root}: no {part} images are left", *(n for n in notes if "left out" in n or "dropped" in n), "check the folder, --split and --limit"]))
        inside = [records[row] for row in rows]
        grouped = any(r.group for r in inside)
        piece = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows     # a view, if nothing was dropped
        parts[part] = Split(images[piece], np.array([r.label for r in inside], np.float32 if table.multilabel else np.int64),
                            [r.id for r in inside], [r.group or r.id for r in inside] if grouped else None,
                            np.stack([table.boxes.get(r.id, no_box) for r in inside]) * size if table.boxes else None,
                            source={name: column[rows] for name, column in source.items()})
    if not test_only and len(np.unique(parts["train"].labels)) < 2:
        raise DataError(f"{root}: the training images are all of one class; check the folder and its table")
    if not test_only and not table.multilabel:
        notes += [f"LACKING: no training image of {name} is left, so no answer will ever be {name}" for k, name in enumerate(table.classes) if k not in parts["train"].labels]
    if seen := [] if test_only or table.multilabel else telling(parts["train"], parts["test"]):
        notes.append(f"the row `shortcut` of the last table: a rule that sees, instead of the pixels, {', '.join(seen)}")
    return DataSet(parts.get("train"), parts.get("val"), parts["test"], table.classes, table.multilabel, channels, notes, name)


def _relabel(table, classes, root):
    """Labels in the order of `classes`; the data may lack some of them (multi-label: none), never have others."""
    if strange := [c for c in table.classes if c not in classes]:
        raise DataError(f"{root}: has the class {', '.join(strange)}, the model knows only {', '.join(classes)}")
    if not table.multilabel:
        table.records = [r._replace(label=classes.index(table.classes[r.label])) for r in table.records]
    elif lacking := [c for c in classes if c not in table.classes]:
        raise DataError(f"{root}: does not tell of {', '.join(lacking)}, which the model knows; its labels are {', '.join(table.classes)}")
    else:
        order = [table.classes.index(c) for c in classes]
        table.records = [r._replace(label=tuple(r.label[k] for k in order)) for r in table.records]
        table.boxes = {name: inside[order] for name, inside in table.boxes.items()}
    table.classes = classes


def _toy(name, seed, size, limit, test_only, classes):
    """A toy set; for `limit`, a stratified draw out of somewhat more images, so that every class is there."""
    make = toy.make_xray if name == "toy_xray" else toy.make
    data = make(seed, size, {part: min(n, limit + 100) for part, n in toy.SIZES.items()} if limit else None)
    if classes and list(classes) != data.classes:
        raise DataError(f"--data {name} has the classes {', '.join(data.classes)}, the model {', '.join(classes)}")
    for number, part in enumerate(splits.SPLITS if limit else ()):
        whole = getattr(data, part)
        setattr(data, part, whole.take(splits.draw(whole.labels, limit, np.random.default_rng([seed, number]))))
    if test_only:
        data.train = data.val = None
    return data
