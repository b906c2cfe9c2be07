"""ISIC 2020 (SIIM-ISIC): melanoma against benign lesions, dermoscopy (CC BY-NC 4.0).

    ROOT/ISIC_2020_Training_GroundTruth.csv or ..._v2.csv       ROOT/train/*.jpg         ISIC; folders of any name and depth
    ROOT/ISIC_2020_Training_Duplicates.csv                      optional: 425 pairs, of which the second image is left out
    ROOT/train.csv                                              ROOT/jpeg/train/*.jpg    Kaggle

Rotemberg et al., Sci Data 8:34 (2021). 33,126 images of 2,056 patients, 584 with melanoma (1.76 %), 16 a patient, so that the patient is
what has to stay on one side. The labels of the 10,982 test images are not public. Favero et al. (2025) took melanomas of ISIC 2019 too,
and as many benign images of 2020, and split by image: there the source tells the class, and patients are on two sides.
"""
import re
from pathlib import Path
from typing import NamedTuple

from .images import find_images
from .splits import assign, balanced
from .tables import Record, Table, missing_columns, read_columns, read_table, report_missing
from .types import DataError

CLASSES = ["benign", "melanoma"]
TABLE_NAME = re.compile(r"ISIC.?2020.*Ground.?Truth.*\.csv|train\.csv", re.I)
PAIRS = ("image_name_1", "image_name_2")
LISTS = {"train": "isic-train.csv", "val": "isic-valid.csv", "test": "isic-test.csv"}                         # as the paper's authors
SOURCE = ("sex", "age_approx", "anatom_site_general_challenge")                       # for the control `shortcut`; diagnosis is the label
NEEDED = "image_name,patient_id,target"
EXPECTED = ("expected ISIC_2020_Training_GroundTruth.csv (or _v2) with train/*.jpg (ISIC), or train.csv with jpeg/train/*.jpg (Kaggle); "
            "download: challenge2020.isic-archive.com or kaggle.com/c/siim-isic-melanoma-classification; licence CC BY-NC 4.0")


class Row(NamedTuple):
    label: int
    patient: str | None
    table: Path
    source: dict = {}


def table(root, split="official", test_only=False, skip_bad=False, classes=None):
    """The Table below `root`, in ISIC's layout, Kaggle's, or both mixed; `data.load` describes the splits.

    There is no official test set with labels. Raises DataError for what is missing, wrong or incomplete.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
    notes = []
    files = sorted(p for p in (*root.iterdir(), *root.glob("*/*.csv")) if p.suffix.lower() == ".csv" and p.is_file())
    rows = _read(files, notes)
    images = {path.stem: path for path in reversed(find_images(root))}          # of two copies the first in sorted order wins
    _ignored(root, rows, images, notes)
    lists = {part: root / name for part, name in LISTS.items()}
    if split == "paper" and all(path.is_file() for path in lists.values()):
        return Table(_listed(lists, rows, images, skip_bad, notes), CLASSES, 3, notes)
    if not rows:
        raise DataError(_nothing_found(root, files))
    rows = _without_duplicates(files, rows, notes)
    if split == "paper":
        names = list(rows)
        rows = {names[i]: rows[names[i]] for i in balanced([row.label for row in rows.values()], names)}
        notes.append(f"split paper: {len(rows) // 2:,} of each class (by a hash of the image), 10 % test and 10 % validation by image, as theirs, "
                     f"but without ISIC 2019's melanomas (the very lists are taken where {', '.join(LISTS.values())} lie in root)")
    records = _records(rows, images, skip_bad, notes)
    if any(not record.group for record in records):
        notes.append(f"{sum(not r.group for r in records):,} images have no patient_id: each counts as its own patient")
    if split == "paper":
        return Table(assign(records, by_group=False, test=.1, val=.1), CLASSES, 3, notes)
    if split == "official":
        notes.append("the labels of the official test set are not public: split group instead")
    notes.append("split group: 30 % of the patients with melanoma and of those without are test, 10 % validation")
    return Table(assign(records), CLASSES, 3, notes)


# ------------------------------------------------------------------------------------------------ tables
def _read(files, notes):
    """{image id: Row} of all tables that have the columns of one; the same image may stand in several."""
    rows, repeated = {}, 0
    for path in files:
        columns = set(read_columns(path))
        if not columns.issuperset(NEEDED.split(",")):
            if TABLE_NAME.fullmatch(path.name):
                raise DataError(missing_columns(path, read_columns(path), NEEDED))
            continue                                    # test.csv, sample_submission.csv and the like
        for number, cells in read_table(path, [*NEEDED.split(","), *SOURCE])[1]:
            name, source = _image_id(cells["image_name"], path, number), {column: cells[column] for column in SOURCE if column in cells}
            row = Row(_label(cells, path, number), cells["patient_id"] or None, path, source)
            if (old := rows.get(name)) is not None:
                if old.label != row.label:
                    raise DataError(f"{path}: line {number}: {name} is {CLASSES[row.label]} here and {CLASSES[old.label]} before "
                                    f"({old.table.name}); remove one of the two")
                if old.patient and row.patient and old.patient != row.patient:
                    raise DataError(f"{path}: line {number}: {name} is of patient {row.patient} here and of {old.patient} before "
                                    f"({old.table.name}); remove one of the two")
                repeated += old.table == path
                row = old if old.patient else row
            rows[name] = row
    if repeated:
        notes.append(f"{repeated:,} rows that repeat an image id were dropped")
    return rows


def _image_id(text, path, number):
    found = re.fullmatch(r"([\w-]+)(?:\.(?:jpe?g|png|dcm))?", text, re.I | re.A)                # nothing that may lead out of root
    if not found:
        raise DataError(f"{path}: line {number}: {text!r} is no image id; expected one like ISIC_2637011")
    return found[1]


def _label(cells, path, number):
    try:
        return {0: 0, 1: 1}[float(cells["target"])]
    except (ValueError, KeyError):
        raise DataError(f"{path}: line {number}: target is {cells['target']!r}; expected 0 ({CLASSES[0]}) or 1 ({CLASSES[1]})") from None


def _without_duplicates(files, rows, notes):
    """Rows less the second image of each pair in ISIC_2020_Training_Duplicates.csv; of a chain of pairs one image stays."""
    lists = [path for path in files if set(PAIRS) <= set(read_columns(path))]
    same = {}                                           # image -> one that shows the same and comes before it

    def first(name):
        while name in same:
            name = same[name]
        return name
    for path in lists:
        for number, cells in read_table(path, PAIRS)[1]:
            one, other = (first(_image_id(cells[column], path, number)) for column in PAIRS)
            if one != other and one in rows and other in rows:
                same[other] = one
    notes.append(f"{len(same):,} images left out: the second of a pair in {lists[0].name}" if lists else
                 "no ISIC_2020_Training_Duplicates.csv here: 425 known duplicates, each of the same patient as its twin, are kept")
    return {name: row for name, row in rows.items() if name not in same}


# ------------------------------------------------------------------------------------------------ images
def _records(rows, images, skip_bad, notes, part="train"):
    """A Record for each row. None or some of its images missing: DataError, or the latter left out."""
    there = [Record(images[i], row.label, row.patient, i, part, row.source) for i, row in rows.items() if i in images]
    missing = [i for i in rows if i not in images]
    if rows and not there:
        raise DataError(f"{next(iter(rows.values())).table}: a table, but none of its {len(rows):,} images (.jpg or .png, not .dcm); {EXPECTED}")
    report_missing([f"{i}.jpg" for i in missing], len(rows), part, missing and rows[missing[0]].table, skip_bad, notes)
    return there


def _listed(lists, rows, images, skip_bad, notes):
    """The records of the paper's own lists (image_name,target), some of whose images are of ISIC 2019."""
    notes.append(f"split paper: the authors' own lists, {', '.join(LISTS.values())}, by image; nearly all melanomas are of ISIC 2019 and "
                 "all benign images of 2020, so that the source alone tells the class (94 % of their test images)")
    records, seen = [], {}                              # without the table's columns: it knows the images of 2020 alone
    for part, path in lists.items():
        columns, lines = read_table(path)
        if not {"image_name", "target"} <= set(columns):
            raise DataError(missing_columns(path, columns, "image_name,target"))
        inside = {}
        for number, cells in lines:
            name = _image_id(cells["image_name"], path, number)
            if seen.setdefault(name, path) != path:
                raise DataError(f"{path}: line {number}: {name} stands in {seen[name].name} too; remove one of the two")
            inside[name] = Row(_label(cells, path, number), rows[name].patient if name in rows else None, path)
        records += _records(inside, images, skip_bad, notes, part)
    if unknown := sum(not record.group for record in records):
        notes.append(f"no patient is known of {unknown:,} of {len(records):,} images: one patient may be on two sides")
    return records


def _ignored(root, rows, images, notes):
    """Notes how many images of the official test set, which has no labels, are there."""
    found = [path for name, path in images.items() if name not in rows and re.search("(?<![a-z])test", str(path.relative_to(root).parent), re.I)]
    if found:
        notes.append(f"{len(found):,} test images are ignored, for their labels are not public: {min(found).parent}")


def _nothing_found(root, files):
    """The line for a root without a table: what is there instead."""
    tests = [path for path in files if {"image_name", "patient_id"} <= set(read_columns(path))]
    if tests:
        return f"{tests[0]}: only the test set, whose labels are not public; {EXPECTED}"
    if files:
        return f"{missing_columns(files[0], read_columns(files[0]), NEEDED)}; {EXPECTED}"
    inside = [p.parent for p in sorted(root.glob("*/*/*.csv")) + sorted(root.parent.glob("*.csv")) if TABLE_NAME.fullmatch(p.name)]
    return f"{root}: no ISIC 2020 table here{f' (did you mean {inside[0]}?)' if inside else ''}; {EXPECTED}"
