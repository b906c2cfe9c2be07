"""CheXpert: Pleural Effusion against No Finding, grey chest X-rays (Stanford's research agreement: registration, no redistribution).

    ROOT/{train,valid}.csv      ROOT/{train,valid}/patient00001/study1/view1_frontal.jpg        CheXpert-v1.0 and -v1.0-small
    ROOT/CheXpert-v1.0 batch 1 (validate & csv)/*.csv, batch 2 (train 1)/patient00001/...       the archives as AIMI packs them
    ROOT/{val,test}_labels.csv  ROOT/{val,test}/patient64741/...                                the test set, as of CheXlocalize

Irvin et al., AAAI 2019. 223,414 images of 64,540 patients to train, 234 and 668 with radiologists' labels to validate and test.
What is taken is the rule of Favero et al., "Conditional Diffusion Models are Medical Image Classifiers" (2025): of each patient
study1/view1_frontal.jpg; blank is 0, uncertain (-1) is left out, and so is an image with both findings or neither; of the
training table as many of each class. Theirs are 20,404 images, 80:10:10, one a patient.

The names chexpert14 and chexpert5 read the same files as multi-label data, all findings or the competition's five, of all frontal views; blank
is 0. What an uncertain label (-1) is in training says the end of the name: 0 (none), 1 (-ones), or unknown (-ignore), which the loss of a
method that takes several labels passes over. Irvin et al. found -ones best for Atelectasis and Edema. Images to validate and to test have
no uncertain label: where these are carved from train.csv, such images are left out, the same ones whatever the name.
"""
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .splits import apart, assign, balanced
from .tables import Record, Table, missing_columns, read_columns, read_table, report_missing
from .types import DataError

CLASSES = ["No Finding", "Pleural Effusion"]
FINDINGS = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
            "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices"]         # as the table
COMPETITION = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
READINGS = {f"chexpert{len(labels)}{end}": (labels, value)                      # name -> labels, and what an uncertain one is in training
            for labels in (FINDINGS, COMPETITION) for end, value in (("", 0), ("-ones", 1), ("-ignore", -1))}
TABLES = {"train": ["train.csv"], "val": ["valid.csv", "val_labels.csv", "valid_labels.csv", "val.csv"],
          "test": ["test_labels.csv", "groundtruth.csv", "test.csv"]}           # not train_cheXbert.csv: other labels of the same images
LISTS = {"train": ["chexpert-train.csv"], "val": ["chexpert-valid.csv"], "test": ["chexpert-test.csv"]}       # as the paper's authors
SIDES = ("train", "valid", "val", "test")
IMAGE = re.compile(r"(?:^|/)(?:(train|valid|val|test)/)?(patient[0-9]+)/(study[0-9]+/view[0-9]+_[a-z]+)(\.(?i:jpe?g|png))$")
VIEW = "study1/view1_frontal"
SOURCE = ("sex", "age", "ap/pa")                        # for the control `shortcut`
EXPECTED = ("expected train.csv with train/patient00001/study1/view1_frontal.jpg, valid.csv with valid/..., and perhaps test_labels.csv "
            "with test/...; download: stanfordmlgroup.github.io/competitions/chexpert (registration; research only)")


class Row(NamedTuple):
    label: int | tuple                                  # multi-label: 0, 1 or, as long as it is uncertain, -1 of each finding
    patient: str
    file: str                                           # below the folder of the patients
    side: str | None                                    # that folder's name, where the table tells it
    source: dict = {}


def table(root, split="official", test_only=False, skip_bad=False, classes=None, reading=None):
    """The Table below `root`, in any of the layouts above; `data.load` describes the splits.

    test_only: the official test set, or else the validation set, suffices. reading: one of READINGS, for multi-label data. Raises
    DataError for what is missing or wrong.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
    labels, uncertain = reading or (CLASSES, None)
    notes, folders = [], _folders(root)
    places = [place for folder in folders for place in (folder, *(folder / side for side in SIDES)) if place.is_dir()]
    files = {part: _find(folders, names) for part, names in TABLES.items()}
    lists = {part: _find(folders, names) for part, names in LISTS.items()} if split == "paper" and not reading else {}

    def records(part, path, as_part=None, even=False):
        rows = _read_findings(path, labels, notes) if reading else _read(path, notes)
        if even and not reading:
            rows = _even(path, rows, notes)
        return _records(as_part or part, path, rows, places, skip_bad, notes)

    def found(records):
        return Table(_settled(records, uncertain, notes) if reading else records, list(labels), 1, notes, multilabel=bool(reading))
    if lists and all(lists.values()):
        notes.append(f"split paper: the authors' own lists, {lists['train']} and its two neighbours")
        return found(apart([record for part, path in lists.items() for record in records(part, path)], notes))
    if not any(files.values()):
        raise DataError(_nothing_found(root))
    if files["test"] and not {name.lower() for name in labels} <= set(read_columns(files["test"])):
        notes.append(f"{files['test']}: without labels, so it is no test set")
        files["test"] = None
    test = records("test", files["test"]) if files["test"] and (split == "official" or not files["train"]) else []
    if not test and not files["train"] and files["val"]:
        test = records("val", files["val"], as_part="test")
    if test and test_only:
        notes.append(f"test set: {root}, {len(test):,} images")
        return found(test)
    if not files["train"]:
        what = "holds only a test set; `eval` takes it, training needs the training images" if test else "a table, but none of its images"
        raise DataError(f"{root}: {what}: {EXPECTED}")
    train = records("train", files["train"], even=True)
    if not train:
        raise DataError(f"{root}: a table, but none of its images; {EXPECTED}")
    if test:
        val = records("val", files["val"]) if files["val"] else []
        notes.append("split official: test is CheXpert's test set, validation "
                     + ("its validation set" if val else "10 % of the training patients of each class"))
        return found((train if val else assign(train, test=0)) + val + test)
    if split == "official":
        notes.append("no official test set here (test_labels.csv with test/): split group instead")
    if files["val"]:
        notes.append(f"{files['val']} is left out, too small to choose by; a folder with it and its images alone is a test set for `eval`")
    theirs = split == "paper" and not reading
    notes.append(f"split paper: 10 % of the patients of each class are test, 10 % validation, as theirs (not the very lists: those are "
                 f"taken where {', '.join(name for names in LISTS.values() for name in names)} lie in root)" if theirs
                 else "split group: 30 % of the patients of each class are test, 10 % validation")
    return found(assign(train, **dict(test=.1, val=.1) if theirs else {}))


# ------------------------------------------------------------------------------------------------ tables
def _folders(root):
    """Root and the folders in it, two deep, that are called CheXpert; for one of AIMI's batches those beside it too."""
    def below(folder, depth):
        inside = [p for p in sorted(folder.iterdir()) if "chexpert" in p.name.lower() and p.is_dir()] if depth else []
        return [(2 - depth, folder)] + [pair for p in inside for pair in below(p, depth - 1)]
    found = [folder for _, folder in sorted(below(root, 2), key=lambda pair: pair[0])]
    if re.search("chexpert.*batch", root.resolve().name, re.I):
        found += [p for p in sorted(root.resolve().parent.iterdir())
                  if re.search("chexpert.*batch", p.name, re.I) and p.is_dir() and p != root.resolve()]
    return found


def _find(folders, names):
    """The path of the table in the folder nearest to root, or None. Two of them equally near are two copies: a DataError."""
    found = [next((folder / name for name in names if (folder / name).is_file()), None) for folder in folders]
    found = [path for path in found if path]
    if len(found) > 1 and found[0].parent.parent == found[1].parent.parent:
        raise DataError(f"{found[0]}: {found[1]} is there too; which copy? name its folder with --root")
    return found[0] if found else None


def _views(path, labels):
    """[(line number, cells, side, patient, view, suffix)] of a table with the columns of these labels."""
    wanted = [name.lower() for name in labels]
    columns, lines = read_table(path, ["path", "study", *wanted, *SOURCE])
    key = "path" if "path" in columns else "study"                              # a table by study: its first frontal view
    if key not in columns or not set(wanted) <= set(columns):
        raise DataError(missing_columns(path, columns, ",".join(["Path", *labels])))
    views = []
    for number, cells in lines:
        text = cells[key].replace("\\", "/") + ("/view1_frontal.jpg" if key == "study" else "")
        found = IMAGE.search(text)
        if not found or ".." in text:                                           # nothing in a table may lead out of root
            raise DataError(f"{path}: line {number}: {cells[key]!r} is no path of an image; expected one like "
                            "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg")
        views.append((number, cells, *found.groups()))
    return views


def _row(label, cells, side, patient, name, suffix):
    return Row(label, patient, name + suffix, side, {column: cells[column] for column in SOURCE if column in cells} | {"patient number": patient[7:]})


def _read(path, notes):
    """{id: Row} of the images that the rule takes; a note says what became of the others."""
    views, rows, seen, count = _views(path, CLASSES), {}, {}, Counter()
    for number, cells, side, patient, view, suffix in views:
        if view != VIEW:
            continue
        name, values = f"{patient}/{view}", tuple(_value(cells, column.lower(), path, number) for column in CLASSES)
        if name in seen:
            if seen[name] != values:
                raise DataError(f"{path}: line {number}: {name} has other labels than before; remove one of the two")
            continue
        seen[name] = values
        what = "uncertain" if -1 in values else "neither" if not any(values) else "both" if all(values) else CLASSES[int(values[1])]
        count[what] += 1
        if what in CLASSES:
            rows[name] = _row(CLASSES.index(what), cells, side, patient, name, suffix)
    notes.append(f"{path.name}: {len(views):,} rows, {len(seen):,} of them {VIEW}: " + ", ".join(f"{count[c]:,} {c}" for c in CLASSES)
                 + f"; left out: {count['uncertain']:,} uncertain (-1), {count['both']:,} with both, {count['neither']:,} with neither "
                   "(blank is 0)")
    if not rows:
        raise DataError(f"{path}: no row of {VIEW} has one of the two findings ({', '.join(CLASSES)}); is it CheXpert's table?")
    return rows


def _read_findings(path, labels, notes):
    """{id: Row} of all frontal views, uncertain labels still -1."""
    views, rows = _views(path, labels), {}
    for number, cells, side, patient, view, suffix in views:
        if not view.endswith("_frontal"):
            continue
        name, values = f"{patient}/{view}", tuple(int(_value(cells, column.lower(), path, number)) for column in labels)
        if name in rows and rows[name].label != values:
            raise DataError(f"{path}: line {number}: {name} has other labels than before; remove one of the two")
        rows[name] = _row(values, cells, side, patient, name, suffix)
    if not rows:
        raise DataError(f"{path}: no row is of a frontal view; is it CheXpert's table?")
    notes.append(f"{path.name}: {len(views):,} rows, {len(rows):,} frontal views, which are taken; blank is 0")
    return rows


def _settled(records, uncertain, notes):
    """Multi-label records whose uncertain labels are, in train, as the policy says; images of the other parts that have one are left out."""
    train = [r for r in records if r.split == "train"]
    known = [r for r in records if r.split != "train" and -1 not in r.label]
    if n := sum(r.label.count(-1) for r in train):
        notes.append(f"{n:,} training labels are uncertain and taken as {'unknown' if uncertain < 0 else uncertain}, in "
                     f"{sum(-1 in r.label for r in train):,} of {len(train):,} images")
    if n := len(records) - len(train) - len(known):
        notes.append(f"{n:,} images of validation and test are left out, for one of their labels is uncertain: the rest shows the clearer cases")
    return [r._replace(label=tuple(uncertain if value < 0 else value for value in r.label)) for r in train] + known


def _value(cells, column, path, number):
    try:
        value = float(cells[column] or 0)
    except ValueError:
        value = None
    if value not in (0, 1, -1):
        raise DataError(f"{path}: line {number}: {column} is {cells[column]!r}; expected 1.0, 0.0, -1.0 or nothing")
    return value


def _even(path, rows, notes):
    """As many rows of each class, drawn by a hash of the patient."""
    names = list(rows)
    kept = {names[i]: rows[names[i]] for i in balanced([row.label for row in rows.values()], [row.patient for row in rows.values()])}
    if len(kept) < len(rows):
        notes.append(f"{path.name}: {len(kept) // 2:,} of each class are taken, {len(rows) - len(kept):,} more of "
                     f"{Counter(CLASSES[row.label] for row in rows.values()).most_common(1)[0][0]} are left out (by a hash of the patient)")
    return kept


# ------------------------------------------------------------------------------------------------ images
def _records(part, path, rows, places, skip_bad, notes):
    """A Record for each row of a table. None of its images there: an empty list. Some missing: DataError, or left out."""
    near = {side: sorted(places, key=lambda place: place.name != side) for side in {row.side for row in rows.values()}}
    there, missing = [], []
    for name, row in rows.items():
        image = next((place / row.file for place in near[row.side] if (place / row.file).is_file()), None)
        if image:
            there.append(Record(image, row.label, row.patient, name, part, row.source))
        else:
            missing.append(row.file)
    if not there:
        notes.append(f"{path}: a table of {len(rows):,} {part} images, but none of the images")
    else:
        report_missing(missing, len(rows), part, path, skip_bad, notes)
    return there


def _nothing_found(root):
    """The line for a root without a table: what is there instead."""
    beside = [p for p in (root.parent, *(p for p in sorted(root.iterdir()) if p.is_dir())) if _find([p], TABLES["train"])]
    return f"{root}: no CheXpert table here{f' (did you mean {beside[0]}?)' if beside else ''}; {EXPECTED}"
