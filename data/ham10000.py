"""HAM10000 and ISIC 2018 Task 3: seven kinds of pigmented skin lesion, dermoscopy, one label an image (CC BY-NC 4.0).

Tschandl et al., Sci Data 5:180161 (2018). 10,015 images of 7,470 lesions to train, 193 and 1,512 to validate and test.
A table is known by its columns, not by its name; what an image is for, by the table's name or else by its ISIC number.
"""
import re
from pathlib import Path
from typing import NamedTuple

from .images import find_images
from .splits import assign
from .tables import Table, missing_columns, part_records, read_columns, read_table
from .types import DataError

CLASSES = ["mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"]            # ISIC's order of columns; Kaggle code often sorts them
FIRST_WORD = {"melanoma": "mel", "melanocytic": "nv", "nevus": "nv", "nevi": "nv", "basal": "bcc", "actinic": "akiec",
              "bowen": "akiec", "benign": "bkl", "dermatofibroma": "df", "vascular": "vasc"}      # of a name written out
OFFICIAL_IDS = {"val": range(34321, 34524), "test": range(34524, 36065)}                          # ISIC_0034524 is a test image
SOURCE = ("age", "sex", "localization", "dataset")      # for the control `shortcut`
LEAK = {"dx_type", "diagnosis_confirm_type"}            # how the diagnosis was made, known only with it
TABLE_NAME = re.compile("HAM10000_metadata|ISIC.?2018.*Ground.?Truth", re.I)
NEEDED = "lesion_id,image_id,dx (Kaggle) or image,MEL,NV,BCC,AKIEC,BKL,DF,VASC (ISIC)"
EXPECTED = ("expected HAM10000_metadata.csv with HAM10000_images_part_1/*.jpg and HAM10000_images_part_2/*.jpg (Kaggle), or "
            "ISIC2018_Task3_Training_GroundTruth/*.csv with ISIC2018_Task3_Training_Input/*.jpg (ISIC); download: "
            "kaggle.com/datasets/kmader/skin-cancer-mnist-ham10000, doi:10.7910/DVN/DBW86T or "
            "challenge.isic-archive.com/data (2018, Task 3); licence CC BY-NC 4.0")


class Row(NamedTuple):
    label: int
    lesion: str | None
    part: str                                           # "train", "val" or "test"
    table: Path
    source: dict = {}


def table(root, split="official", test_only=False, skip_bad=False, classes=None):
    """The Table below `root`, in Kaggle's layout, ISIC's, or both mixed; `data.load` describes the splits.

    test_only: the official test set suffices. Raises DataError for what is missing, wrong or incomplete.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
    notes = []
    files = _tables_in(root)
    rows = _read(files, root, notes)
    found = {row.part for row in rows.values()}
    if not rows:
        raise DataError(_nothing_found(root, files))
    images = {path.stem: path for path in reversed(find_images(root))}          # of two copies the first in sorted order wins
    if split == "official" and "test" not in found:
        found |= _add_sibling_test_set(root, rows, images, notes)

    def records(part):
        return part_records(part, {i: row for i, row in rows.items() if row.part == part}, images, skip_bad, notes)
    test = records("test") if split == "official" or "train" not in found else []
    if test and test_only:
        return Table(test, CLASSES, 3, notes + [f"test set: {root}, {len(test):,} images"])
    train = records("train")
    if not train and test:
        raise DataError(f"{root}: holds only a test set; `eval` takes it, training needs the training images: {EXPECTED}")
    if not train:
        raise DataError(f"{root}: a table, but none of its images; {EXPECTED}")
    if not any(record.group for record in train):
        notes.append("no lesion ids are known (add ISIC2018_Task3_Training_LesionGroupings.csv or HAM10000_metadata.csv): "
                     "each image counts as its own lesion, so views of one lesion may be on two sides")
    if test:
        val = records("val")
        notes.append("split official: test is the ISIC 2018 test set, validation "
                     + ("the ISIC 2018 validation set" if val else "10 % of the training lesions of each class"))
        return Table((train if val else assign(train, test=0)) + val + test, CLASSES, 3, notes)
    if split == "official":
        notes.append("no official test set here (ISIC2018_Task3_Test_Input, ISIC2018_Task3_Test_GroundTruth): split group instead")
    notes.append("split paper: 30 % test and 10 % validation by image, as DiffMIC's 7:3 (not its very list)" if split == "paper"
                 else "split group: 30 % of the lesions of each class are test, 10 % validation")
    return Table(assign(train, by_group=split != "paper"), CLASSES, 3, notes)


# ------------------------------------------------------------------------------------------------ tables
def _tables_in(folder, depth=2):
    """Paths of the tables in a folder and in its sub-folders that ISIC's archives make."""
    inside = sorted(folder.iterdir())
    files = [p for p in inside if (p.suffix.lower() in (".csv", ".tab", ".tsv") or p.name == "HAM10000_metadata") and p.is_file()]
    for sub in inside if depth else ():
        if re.search("isic.?2018|ground.?truth", sub.name, re.I) and sub.is_dir():
            files += _tables_in(sub, depth - 1)
    return files


def _read(files, root, notes):
    """{image id: Row} of all tables that have the columns of one; lesions from whichever table knows them."""
    rows, lesions, sources, repeated, moved, leak = {}, {}, {}, 0, 0, set()
    for path in files:
        columns = set(read_columns(path))
        key = "image_id" if "image_id" in columns else "image"
        labelled = "dx" in columns or columns.issuperset(CLASSES)
        if key not in columns or not (labelled or "lesion_id" in columns):
            if TABLE_NAME.search(path.name):
                raise DataError(missing_columns(path, read_columns(path), NEEDED))
            continue                                    # pixel tables and others that Kaggle adds
        leak |= LEAK & columns
        for number, cells in read_table(path)[1]:
            name = _image_id(cells[key], path, number)
            if cells.get("lesion_id"):
                lesions[name] = cells["lesion_id"]
            sources[name] = sources.get(name, {}) | {column: cells[column] for column in SOURCE if cells.get(column)}
            if not labelled:
                continue
            row = Row(_label(cells, path, number), None, _part(name, path.relative_to(root)), path)
            if (old := rows.get(name)) is not None:
                if old.label != row.label:
                    raise DataError(f"{path}: line {number}: {name} is {CLASSES[row.label]} here and {CLASSES[old.label]} before "
                                    f"({old.table.name}); remove one of the two")
                repeated += old.table == path
                moved += old.part != row.part
                row = max(row, old, key=lambda r: ("train", "val", "test").index(r.part))
            rows[name] = row
    if repeated:
        notes.append(f"{repeated:,} rows that repeat an image id were dropped")
    warning = f"{' and '.join(sorted(leak))}: how the diagnosis was made, which leaks it (all that was followed up is nv): the control `shortcut` is not shown it"
    if leak and warning not in notes:                   # a test set beside root is read apart
        notes.append(warning)
    if moved:
        notes.append(f"{moved:,} images stand in the tables of two splits: taken as test, or else as validation")
    return {name: row._replace(lesion=lesions.get(name), source=sources[name]) for name, row in rows.items()}


def _image_id(text, path, number):
    name = re.sub(r"\.(jpe?g|png|bmp|tiff?|webp)$", "", text, flags=re.I)
    if not name or ".." in name or re.search(r'[/\\:\0]', name):                # nothing in a table may lead out of root
        raise DataError(f"{path}: line {number}: {text!r} is no image id; expected one like ISIC_0024306")
    return name


def _label(cells, path, number):
    if "dx" in cells:
        words = re.findall("[a-z]+", cells["dx"].lower()) or [""]
        name = words[0] if words[0] in CLASSES else FIRST_WORD.get(words[0])
        if name is None:
            raise DataError(f"{path}: line {number}: unknown dx {cells['dx']!r}; known: {', '.join(CLASSES)}")
        return CLASSES.index(name)
    try:
        ones = [k for k, name in enumerate(CLASSES) if float(cells[name] or 0) == 1]
    except ValueError:
        ones = []
    if len(ones) != 1:
        raise DataError(f"{path}: line {number}: exactly one of {','.join(CLASSES).upper()} must be 1")
    return ones[0]


def _part(name, path):
    """train, val or test: as the table's name (below root) says, else as the image's number says."""
    for part in ("test", "val"):
        if re.search(f"(?<![a-z]){part}", str(path), re.I):
            return part
    number = re.fullmatch(r"ISIC_(\d{7})", name)
    return next((part for part, ids in OFFICIAL_IDS.items() if number and int(number[1]) in ids), "train")


def _add_sibling_test_set(root, rows, images, notes):
    """Adds the ISIC 2018 test set that lies beside root, if one does, to rows and images; returns the parts it added."""
    beside = root.resolve().parent
    try:
        places = [p for p in sorted(beside.iterdir()) if re.search("isic.?2018.*test", p.name, re.I) and p != root.resolve()]
    except OSError:
        return set()
    folders = [p for p in places if p.is_dir()]
    files = [p for p in places if p.suffix.lower() == ".csv"] + [f for p in folders for f in _tables_in(p)]
    new = {i: row for i, row in _read(files, beside, notes).items() if row.part == "test"}
    for path in reversed([p for folder in folders for p in find_images(folder)] if new else []):
        if path.stem in new:
            images[path.stem] = path
    rows.update(new)
    return {row.part for row in new.values()}


def _nothing_found(root, files):
    """The line for a root without a table: what is there instead."""
    if files:
        return f"{missing_columns(files[0], read_columns(files[0]), NEEDED)}; {EXPECTED}"
    inside = [p for p in sorted(root.iterdir()) if p.is_dir() and any(TABLE_NAME.search(f.name) for f in _tables_in(p, depth=0))]
    hint = f" (did you mean {inside[0]}?)" if inside else ""
    return f"{root}: no HAM10000 table here{hint}; {EXPECTED}"
