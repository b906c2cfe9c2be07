"""APTOS 2019: five grades of diabetic retinopathy, colour photographs of the eye's ground (Kaggle competition; academic use, no redistribution).

    ROOT/train.csv      id_code,diagnosis       ROOT/train_images/*.png, ROOT/train/*.png (DiffMIC), or folders of any name and depth
    ROOT/{No_DR,Mild,Moderate,Severe,Proliferate_DR}/*.png      the coloured 224 px copy: a folder per grade, below any other; train.csv may lack
    ROOT/{train_1,valid,test}.csv, ROOT/{train,val,test}_images/...     the copy that is split 2930 / 366 / 366

3,662 images, graded 0 to 4, which is the order of the classes (and not the folders' alphabetical one). The 1,928 test images of the competition
have no labels. Nobody knows which two eyes are of one patient. Some photographs are there twice, a few of them with two grades: copies
of a file stay on one side. DiffMIC split by image, 2,564 and 1,098.
"""
import hashlib
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from .images import find_images, follow
from .splits import assign
from .tables import Record, Table, missing_columns, read_columns, read_table, report_missing
from .types import DataError

CLASSES = ["No DR", "Mild", "Moderate", "Severe", "Proliferative DR"]
FOLDERS = {"nodr": 0, "mild": 1, "moderate": 2, "severe": 3, "proliferatedr": 4, "proliferativedr": 4}
LISTS = {"train": "train_1.csv", "val": "valid.csv", "test": "test.csv"}
NEEDED = "id_code,diagnosis"
EXPECTED = ("expected train.csv with train_images/*.png (Kaggle), train_1.csv, valid.csv and test.csv with their folders, or a folder per grade "
            "(No_DR, Mild, Moderate, Severe, Proliferate_DR); download: kaggle.com/c/aptos2019-blindness-detection (account; its rules)")


class Row(NamedTuple):
    label: int
    part: str                                           # "train", "val" or "test"
    table: Path


def table(root, split="official", test_only=False, skip_bad=False, classes=None):
    """The Table below `root`, in any of the layouts above; `data.load` describes the splits.

    "official" is the copy's own split where train_1.csv, valid.csv and test.csv are there, for the competition's test set has no labels.
    test_only: the copy's test.csv suffices. Raises DataError for what is missing, wrong or incomplete.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
    notes = []
    files = sorted(p for p in (*root.iterdir(), *root.glob("*/*.csv")) if p.suffix.lower() == ".csv" and p.is_file())
    rows, found = _read(files, notes), find_images(root)
    grades = _graded_folders(root, found)
    rows = rows or {name: Row(grade, "train", folder) for name, (grade, folder) in grades.items()}
    if not rows:
        raise DataError(_nothing_found(root, files))
    for name in rows.keys() & grades.keys():
        if rows[name].label != grades[name][0]:
            raise DataError(f"{grades[name][1]}: {name} lies in it and is {CLASSES[rows[name].label]} in {rows[name].table}; remove one of the two")
    images = {path.stem: path for path in reversed(found)}                      # of two copies the first in sorted order wins
    if unlabelled := [path for name, path in images.items() if name not in rows]:
        notes.append(f"{len(unlabelled):,} images stand in no table with grades and are ignored (the competition's test images have none): "
                     f"{min(unlabelled).parent}")
    parts = {row.part for row in rows.values()}
    if split == "official" and "test" in parts:
        wanted = ("test",) if test_only else ("train", "val", "test")
        records = [r for part in wanted for r in _records(part, {i: r for i, r in rows.items() if r.part == part}, images, skip_bad, notes)]
        if not test_only and "train" not in parts:
            raise DataError(f"{root}: holds only a test set; `eval` takes it, training needs the training images: {EXPECTED}")
        lacking = not test_only and "val" not in parts
        notes.append("split official: this copy's own train_1.csv, valid.csv and test.csv; no patient ids are known"
                     + ("; validation is 10 % of train, for valid.csv is not there" if lacking else ""))
        if lacking:
            records = assign([r for r in records if r.split == "train"], test=0) + [r for r in records if r.split == "test"]
        return Table(records, CLASSES, 3, notes)
    records = _records("train", rows, images, skip_bad, notes)
    if split == "official":
        notes.append("the labels of the competition's test set are not public: split group instead")
    if split == "paper":
        notes.append("split paper: 30 % test and 10 % validation by image, as DiffMIC's 2,564 and 1,098 (not its very list)")
        return Table(assign(_grouped(records, notes), by_group=False), CLASSES, 3, notes)
    notes.append("split group: 30 % of the images of each grade are test, 10 % validation; no patient ids are known, so two eyes of one patient "
                 "may be on two sides")
    return Table(assign(_grouped(records, notes)), CLASSES, 3, notes)


# ------------------------------------------------------------------------------------------------ tables
def _read(files, notes):
    """{image id: Row} of train.csv, or else of the copy's three tables; {} without one."""
    by_name = {path.name.lower(): path for path in reversed(files)}             # the one nearest to root
    lists = {"train": "train.csv"} if "train.csv" in by_name else LISTS
    rows, repeated = {}, 0
    for part, path in [(part, by_name[name]) for part, name in lists.items() if name in by_name]:
        columns = read_columns(path)
        if part == "test" and "id_code" in columns and "diagnosis" not in columns:
            notes.append(f"{path}: without grades, so it is no test set")
            continue
        if not {"id_code", "diagnosis"} <= set(columns):
            raise DataError(missing_columns(path, columns, NEEDED))
        for number, cells in read_table(path, NEEDED.split(","))[1]:
            name, label = _image_id(cells["id_code"], path, number), _grade(cells["diagnosis"], path, number)
            if (old := rows.get(name)) is not None:
                if old.label != label:
                    raise DataError(f"{path}: line {number}: {name} is {CLASSES[label]} here and {CLASSES[old.label]} before "
                                    f"({old.table.name}); remove one of the two")
                if old.part != part:
                    raise DataError(f"{path}: line {number}: {name} stands in {old.table.name} too; remove one of the two")
                repeated += 1
            rows[name] = Row(label, part, path)
    if repeated:
        notes.append(f"{repeated:,} rows that repeat an image id were dropped")
    return rows


def _image_id(text, path, number):
    found = re.fullmatch(r"([\w-]+)(?:\.(?:png|jpe?g))?", text, re.I | re.A)    # nothing that may lead out of root
    if not found:
        raise DataError(f"{path}: line {number}: {text!r} is no image id; expected one like 000c1434d8d7")
    return found[1]


def _grade(text, path, number):
    try:
        return {float(k): k for k in range(len(CLASSES))}[float(text)]
    except (ValueError, KeyError):
        raise DataError(f"{path}: line {number}: diagnosis is {text!r}; expected a grade from 0 to {len(CLASSES) - 1}") from None


def _graded_folders(root, images):
    """{image id: (grade, folder)} of the images that lie in a folder with a grade's name."""
    found = {}
    for path in images:
        grade = FOLDERS.get(re.sub("[^a-z]", "", path.parent.name.lower())) if path.parent != root else None
        if grade is not None and found.setdefault(path.stem, (grade, path.parent))[0] != grade:
            raise DataError(f"{path}: lies in {found[path.stem][1]} too; remove one of the two")
    return found


# ------------------------------------------------------------------------------------------------ images
def _records(part, rows, images, skip_bad, notes):
    """A Record for each of rows. None or some of its images missing: DataError, or the latter left out."""
    there = [Record(images[i], row.label, None, i, part) for i, row in rows.items() if i in images]
    missing = [i for i in rows if i not in images]
    if rows and not there:
        raise DataError(f"{next(iter(rows.values())).table}: a table, but none of its {len(rows):,} {part} images; {EXPECTED}")
    report_missing([f"{i}.png" for i in missing], len(rows), part, missing and rows[missing[0]].table, skip_bad, notes)
    return there


def _grouped(records, notes):
    """Records whose files are byte for byte the same get the first one's id as their group. Only files of equal size are read."""
    same = defaultdict(list)
    for record in records:
        same[follow(record.path).stat().st_size].append(record)
    copies = defaultdict(list)
    for inside in same.values():
        for record in inside if len(inside) > 1 else ():
            copies[hashlib.blake2b(follow(record.path).read_bytes()).digest()].append(record)
    copies = [inside for inside in copies.values() if len(inside) > 1]
    if copies:
        odd = sum(len({r.label for r in inside}) > 1 for inside in copies)
        notes.append(f"{sum(map(len, copies)):,} files are copies of one another, {len(copies):,} photographs ({odd:,} of them with more than one grade)")
    group = {record.id: inside[0].id for inside in copies for record in inside}
    return [record._replace(group=group.get(record.id)) for record in records]


def _nothing_found(root, files):
    """The line for a root without a table: what is there instead."""
    if files:
        return f"{missing_columns(files[0], read_columns(files[0]), NEEDED)}; {EXPECTED}"
    inside = [p.parent for p in (*sorted(root.glob("*/*/*.csv")), *sorted(root.parent.glob("*.csv")))
              if "diagnosis" in read_columns(p) and "id_code" in read_columns(p)]
    return f"{root}: no APTOS 2019 table here{f' (did you mean {inside[0]}?)' if inside else ''}; {EXPECTED}"
