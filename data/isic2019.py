"""ISIC 2019: eight kinds of skin lesion, dermoscopy, one label an image (CC BY-NC 4.0).

    ROOT/ISIC_2019_Training_GroundTruth.csv     image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK
    ROOT/ISIC_2019_Training_Metadata.csv        optional: lesion_id of each image, age, sex, site
    ROOT/ISIC_2019_Training_Input/*.jpg         folders of any name and depth
    ROOT/ISIC_2019_Test_{GroundTruth,Metadata}.csv, ROOT/ISIC_2019_Test_Input/*.jpg     optional: the test set, whose labels came later

HAM10000, BCN_20000 and MSK: 25,331 images, 23,247 of them of 11,847 known lesions. All of HAM10000 is in the training set, its akiec here AK
or SCC, and the ISIC 2018 test set in this test set: never train on the one and test on the other. The three sources differ in size, crop
and classes. UNK, "none of the others", stands in the test set alone and is left out. Mediffusion split by image, 20 % test, so that
lesions are on both sides.
"""
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .images import find_images
from .splits import assign
from .tables import Table, missing_columns, part_records, read_columns, read_table
from .types import DataError

CLASSES = ["mel", "nv", "bcc", "ak", "bkl", "df", "vasc", "scc"]        # ISIC's order of columns
NUMBERS = [str(k) for k in range(len(CLASSES))]         # some copies have the header image,0,1,...,8
TABLE_NAME = re.compile(r"ISIC.?2019.*Ground.?Truth.*\.csv", re.I)
SOURCE = {"age_approx": "age", "sex": "sex", "gender": "sex", "anatom_site_general": "site"}    # for the control `shortcut`
HAM10000 = range(24306, 34321)                          # its ISIC numbers
NEEDED = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC"
EXPECTED = ("expected ISIC_2019_Training_GroundTruth.csv and ISIC_2019_Training_Metadata.csv with ISIC_2019_Training_Input/*.jpg; "
            "download: challenge.isic-archive.com/data (2019); licence CC BY-NC 4.0")


class Row(NamedTuple):
    label: int
    lesion: str | None
    part: str                                           # "train" or "test"
    table: Path
    source: dict = {}


def table(root, split="official", test_only=False, skip_bad=False, classes=None):
    """The Table below `root`; `data.load` describes the splits.

    test_only: the official test set suffices. Raises DataError for what is missing, wrong or incomplete.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
    notes = []
    files = sorted(p for p in (*root.iterdir(), *root.glob("*/*.csv")) if p.suffix.lower() == ".csv" and p.is_file())
    rows = _read(files, root, notes)
    if not rows:
        raise DataError(_nothing_found(root, files))
    images = {path.stem: path for path in reversed(find_images(root))}          # of two copies the first in sorted order wins

    def records(part):
        return part_records(part, {i: row for i, row in rows.items() if row.part == part}, images, skip_bad, notes)
    has_train = any(row.part == "train" for row in rows.values())
    test = records("test") if split == "official" or not has_train else []
    if test and test_only:
        return Table(test, CLASSES, 3, notes + [f"test set: {root}, {len(test):,} images"])
    train = records("train")
    if not train:
        raise DataError(f"{root}: holds only a test set; `eval` takes it, training needs the training images: {EXPECTED}" if test else
                        f"{root}: a table, but none of its images; {EXPECTED}")
    if unknown := sum(not record.group for record in train):
        notes.append(f"{unknown:,} of {len(train):,} images have no lesion_id: each counts as its own lesion, so views of one may be on two sides"
                     + ("" if unknown < len(train) else " (add ISIC_2019_Training_Metadata.csv)"))
    if ham := sum(bool(n := re.match("ISIC_([0-9]{7})$", r.id)) and int(n[1]) in HAM10000 for r in train):
        notes.append(f"{ham:,} training images are HAM10000's: test no model of this set on HAM10000, nor the other way round")
    if test:
        notes.append("split official: test is the ISIC 2019 test set without UNK, validation 10 % of the training lesions of each class")
        return Table(assign(train, test=0) + test, CLASSES, 3, notes)
    if split == "official":
        notes.append("no official test set here (ISIC_2019_Test_GroundTruth.csv, ISIC_2019_Test_Input): split group instead")
    if split == "paper":
        notes.append("split paper: 20 % test by image, as Mediffusion's (not its very list), and 10 % validation, which it had none of")
        return Table(assign(train, by_group=False, test=.2), CLASSES, 3, notes)
    notes.append("split group: 30 % of the lesions of each class are test, 10 % validation")
    return Table(assign(train), CLASSES, 3, notes)


# ------------------------------------------------------------------------------------------------ tables
def _read(files, root, notes):
    """{image id: Row} of all tables that have the columns of one, with the lesion from whichever table knows it; without UNK."""
    rows, lesions, sources, left_out, repeated = {}, {}, {}, Counter(), 0
    for path in files:
        columns = set(read_columns(path))
        names = next((names for names in (CLASSES, NUMBERS) if columns.issuperset(names)), None)
        if "image" not in columns or not (names or columns & {"lesion_id", *SOURCE}):
            if TABLE_NAME.fullmatch(path.name):
                raise DataError(missing_columns(path, read_columns(path), NEEDED))
            continue
        part = "test" if re.search("(?<![a-z])test", str(path.relative_to(root)), re.I) else "train"
        for number, cells in read_table(path)[1]:
            name = _image_id(cells["image"], path, number)
            if lesion := cells.get("lesion_id"):
                if lesions.setdefault(name, lesion) != lesion:
                    raise DataError(f"{path}: line {number}: {name} is of lesion {lesion} here and of {lesions[name]} before; remove one of the two")
            sources[name] = sources.get(name, {}) | {new: cells[old] for old, new in SOURCE.items() if cells.get(old)}
            if not names:
                continue
            label = _label(cells, names, path, number)
            if label is None:
                left_out[path.name] += name not in rows
                continue
            if (old := rows.get(name)) is not None:
                if old.label != label:
                    raise DataError(f"{path}: line {number}: {name} is {CLASSES[label]} here and {CLASSES[old.label]} before "
                                    f"({old.table.name}); remove one of the two")
                if old.part != part:
                    raise DataError(f"{path}: line {number}: {name} is in train and in test; remove one of the two")
                repeated += old.table == path
            rows[name] = Row(label, None, part, path)
    if repeated:
        notes.append(f"{repeated:,} rows that repeat an image id were dropped")
    notes += [f"{name}: {n:,} images are UNK, which no model here can tell, and left out" for name, n in left_out.items()]
    return {name: row._replace(lesion=lesions.get(name), source=sources[name]) for name, row in rows.items()}


def _image_id(text, path, number):
    found = re.fullmatch(r"([\w-]+)(?:\.(?:jpe?g|png))?", text, re.I | re.A)                    # nothing that may lead out of root
    if not found:
        raise DataError(f"{path}: line {number}: {text!r} is no image id; expected one like ISIC_0000000 or ISIC_0000017_downsampled")
    return found[1]


def _label(cells, names, path, number):
    """The class of a row, None for UNK."""
    every = [*names, "unk" if names is CLASSES else "8"]
    try:
        values = [float(cells.get(name) or 0) for name in every]
    except ValueError:
        values = []
    if sorted(values) != [0.] * (len(every) - 1) + [1.]:
        raise DataError(f"{path}: line {number}: exactly one of {','.join(every).upper()} must be 1, the others 0")
    return values.index(1) if values.index(1) < len(CLASSES) else None


def _nothing_found(root, files):
    """The line for a root without a table: what is there instead."""
    if files:
        return f"{missing_columns(files[0], read_columns(files[0]), NEEDED)}; {EXPECTED}"
    inside = [p.parent for p in (*sorted(root.glob("*/*/*.csv")), *sorted(root.parent.glob("*.csv"))) if TABLE_NAME.fullmatch(p.name)]
    return f"{root}: no ISIC 2019 table here{f' (did you mean {inside[0]}?)' if inside else ''}; {EXPECTED}"
