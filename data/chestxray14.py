"""ChestX-ray14 (NIH): fourteen findings, any number of them an image, grey chest X-rays (free to use; cite it and link to NIH's page).

    ROOT/Data_Entry_2017_v2020.csv      the labels; or Data_Entry_2017.csv (first release, Kaggle), or sample_labels.csv (Kaggle's sample)
    ROOT/{train_val,test}_list.txt      the official split, by patient
    ROOT/BBox_List_2017.csv             optional: 984 boxes in 880 of the test images
    ROOT/images_001/images/*.png        12 such folders (Kaggle), one (NIH), or any others; 1024 x 1024 pixels or a smaller copy

Wang et al., CVPR 2017. 112,120 images of 30,805 patients, 86,524 and 25,596 to train and to test; 60,361 without a finding. The labels were
mined from reports, and the test images have far more findings (61.5 % against 41.6 %). There is no official validation set.
"""
import math
import re
from pathlib import Path

import numpy as np

from .images import find_images
from .splits import assign
from .tables import Record, Table, missing_columns, read_columns, read_lines, read_table, report_missing
from .types import DataError

CLASSES = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation",
           "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]                    # in the order of CheXNet and ChestMNIST
SPELLED = {re.sub("[^a-z]", "", name.lower()): k for k, name in enumerate(CLASSES)} | {"infiltrate": CLASSES.index("Infiltration")}
TABLES = ("data_entry_2017_v2020.csv", "data_entry_2017.csv", "sample_labels.csv")              # the first that is there is read
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
BOXES = "bbox_list_2017.csv"
SIDE = 1024                                             # pixels of the originals, in which the boxes are given
OLDEST = 120                                            # ages above, up to 414, are typing errors
SOURCE = {"patient age": "age", "patient gender": "sex", "patient sex": "sex", "view position": "view"}
NEEDED = "Image Index,Finding Labels"
EXPECTED = ("expected Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), train_val_list.txt, test_list.txt and images_001/images/*.png ..., "
            "or one folder images; download: nihcc.app.box.com/v/ChestXray-NIHCC or kaggle.com/datasets/nih-chest-xrays/data")


def table(root, split="official", test_only=False, skip_bad=False, classes=None):
    """The Table below `root`, multi-label, in any of the layouts above; `data.load` describes the splits ("paper" is the official one).

    test_only: the images of the test list suffice. Raises DataError for what is missing, wrong or incomplete.
    """
    root = _folder(root)
    notes, files = [], _files(root)
    path = next((files[name] for name in TABLES if name in files), None)
    if path is None:
        raise DataError(_nothing_found(root))
    if others := [files[name].name for name in TABLES if name in files and files[name] != path]:
        notes.append(f"{path} is read; {', '.join(others)}, whose labels differ a little, is not")
    rows, boxes = _read(path, notes), _read_boxes(files[BOXES]) if BOXES in files else {}
    parts = _listed(files, rows, notes) if split != "group" else {}
    images = {image.stem: image for image in reversed(find_images(root))}       # of two copies the first in sorted order wins

    def records(part, names):
        there = [Record(images[i], rows[i][0], str(int(i[:8])), i, part, rows[i][1]) for i in names if i in images]
        if names and not there:
            raise DataError(f"{path}: a table, but none of its {len(names):,} {part} images (00000001_000.png, ...); {EXPECTED}")
        report_missing([f"{i}.png" for i in names if i not in images], len(names), part, path, skip_bad, notes)
        return there
    if "test" in parts:
        found = records("test", parts["test"])
        if test_only:
            notes.append(f"test set: {root}, {len(found):,} images")
        else:
            notes.append("split official: test is NIH's test_list.txt, validation 10 % of the patients of train_val_list.txt")
            found = assign(records("train", parts["train"]), test=0) + found
    else:
        notes.append(("" if split == "group" else "no official lists here (train_val_list.txt, test_list.txt): split group instead; ")
                     + "split group: 30 % of the patients are test, 10 % validation")
        found = assign(records("train", list(rows)))
    return Table(found, list(CLASSES), 1, notes, multilabel=True, boxes=_by_label(rows, boxes, notes))


def boxes(root):
    """The radiologist's boxes below `root`: {image id: {finding: (x0, y0, x1, y1)}} in pixels of the 1024 x 1024 original, {} where there
    is no BBox_List_2017.csv. `Split.boxes` has them in pixels of the images as they were decoded. Raises DataError for a wrong file."""
    files = _files(_folder(root))
    return _read_boxes(files[BOXES]) if BOXES in files else {}


# ------------------------------------------------------------------------------------------------ tables
def _folder(root):
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
    return root


def _files(root):
    """{name in lower case: path} of the tables and lists in root, or else in a folder in it."""
    wanted = {*TABLES, *LISTS.values(), BOXES}
    found = [p for p in (*sorted(root.iterdir()), *sorted(root.glob("*/*.*"))) if p.name.lower() in wanted and p.is_file()]
    return {p.name.lower(): p for p in reversed(found)}


def _read(path, notes):
    """{image id: (14 numbers 0 or 1, {column: cell})} of the table, in its order."""
    columns = read_columns(path)
    if not {"image index", "finding labels"} <= set(columns):
        raise DataError(missing_columns(path, columns, NEEDED))
    rows, repeated, typos = {}, 0, []
    for number, cells in read_table(path, ["image index", "finding labels", "patient id", *SOURCE])[1]:
        name, label = _image_id(cells["image index"], path, number), _label(cells["finding labels"], path, number)
        if "patient id" in cells and cells["patient id"].removesuffix(".0").lstrip("0") != name[:8].lstrip("0"):
            raise DataError(f"{path}: line {number}: {name} is of patient {cells['patient id'] or '(blank)'}, by its name of {int(name[:8])}; "
                            "download the table again")
        source = {new: cells[old] for old, new in SOURCE.items() if old in cells}
        if source.get("age") and (age := _years(source["age"])) != source["age"]:
            typos += [f"{name}: {source['age']}"] if not age else []
            source["age"] = age
        if name in rows and rows[name][0] != label:
            raise DataError(f"{path}: line {number}: {name} has other findings than before; remove one of the two")
        repeated += name in rows
        rows[name] = label, source
    if not rows:
        raise DataError(f"{path}: has a header and no rows; download it again")
    if repeated:
        notes.append(f"{repeated:,} rows that repeat an image were dropped")
    if typos:
        notes.append(f"{len(typos):,} ages are no age of a patient and taken as unknown, first: {typos[0]}")
    return rows


def _image_id(text, path, number):
    found = re.fullmatch(r"([0-9]{8}_[0-9]{3})(?:\.(?:png|jpe?g))?", text, re.I)                # nothing that may lead out of root
    if not found:
        raise DataError(f"{path}: line {number}: {text!r} is no image name; expected one like 00000001_000.png")
    return found[1]


def _finding(text, path, number):
    k = SPELLED.get(re.sub("[^a-z]", "", text.lower()))
    if k is None:
        raise DataError(f"{path}: line {number}: unknown finding {text!r}; known: {', '.join(CLASSES)}, No Finding")
    return k


def _label(text, path, number):
    names = [name.strip() for name in text.split("|")]
    if [name.lower() for name in names] == ["no finding"]:
        return (0,) * len(CLASSES)
    if any(name.lower() == "no finding" for name in names):
        raise DataError(f"{path}: line {number}: {text!r}: No Finding beside a finding; keep one of the two")
    found = {_finding(name, path, number) for name in names}
    return tuple(int(k in found) for k in range(len(CLASSES)))


def _years(text):
    """An age as written (58, 58.0, 058Y, 011M, 003D) in years, as text; "" for what is no age."""
    found = re.fullmatch(r"([0-9]{1,4})(?:\.0*)?([YMD]?)", text, re.I)
    years = int(found[1]) / {"M": 12, "D": 365}.get(found[2].upper(), 1) if found else math.inf
    return f"{years:g}" if years <= OLDEST else ""


def _listed(files, rows, notes):
    """{"train": ids, "test": ids} of the official lists, as far as the table has them; {} without a list."""
    lists = {part: _names(files[name]) for part, name in LISTS.items() if name in files}
    if not lists:
        return {}
    if both := sorted(set.intersection(*lists.values())) if len(lists) == 2 else []:
        raise DataError(f"{files[LISTS['test']]}: {both[0]}.png stands in {LISTS['train']} too ({len(both):,} do); download both again")
    listed = set.union(*lists.values())
    if absent := sorted(listed - rows.keys()):
        notes.append(f"the official lists name {len(absent):,} images that the table has not, first: {absent[0]}.png")
    if len(lists) == 2 and (unlisted := [i for i in rows if i not in listed]):
        notes.append(f"{len(unlisted):,} images are in neither of the official lists and left out, first: {unlisted[0]}.png")
    train, test = lists.get("train"), lists.get("test")
    parts = {"train": [i for i in rows if (i in train if train is not None else i not in test)],
             "test": [i for i in rows if (i in test if test is not None else i not in train)]}
    if empty := [part for part, names in parts.items() if not names]:
        notes.append(f"the official lists have no {empty[0]} images among those of the table")
        return {}
    return parts


def _names(path):
    """The set of image ids in a list, a name a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); an image name a line, in UTF-8") from None
    names = {_image_id(line.strip(), path, number) for number, line in enumerate(lines, 1) if line.strip()}
    if not names:
        raise DataError(f"{path}: the list is empty; download it again")
    return names


# ------------------------------------------------------------------------------------------------ boxes
def _read_boxes(path):
    """As `boxes`. By position: the header has nine fields and a row six (name, finding, x, y, width, height)."""
    found = {}
    for number, cells in read_lines(path):
        if not any(cells) or cells[0].lower() == "image index":
            continue
        if len(cells) < 6:
            raise DataError(f"{path}: line {number} has {len(cells)} fields; expected image,finding,x,y,width,height")
        name, k = _image_id(cells[0], path, number), _finding(cells[1], path, number)
        try:
            x, y, w, h = map(float, cells[2:6])
        except ValueError:
            x = math.nan
        if not (math.isfinite(x) and 0 <= x < x + w <= SIDE and 0 <= y < y + h <= SIDE):
            raise DataError(f"{path}: line {number}: {','.join(cells[2:6])} is no box (x, y, width, height) in an image of {SIDE} x {SIDE} pixels")
        if found.setdefault(name, {}).setdefault(CLASSES[k], (x, y, x + w, y + h)) != (x, y, x + w, y + h):
            raise DataError(f"{path}: line {number}: {name} has another box of {CLASSES[k]} before; remove one of the two")
    return found


def _by_label(rows, found, notes):
    """{image id: float32 (14, 4)}: x0, y0, x1, y1 as shares of the side, nan for a finding without a box; of the images of the table."""
    without = [f"{CLASSES[k]} in {name}" for name, inside in found.items() if name in rows
               for k in map(CLASSES.index, inside) if not rows[name][0][k]]
    if without:
        notes.append(f"{len(without):,} boxes are of a finding that the table has not, first: {without[0]}")
    return {name: np.array([found[name].get(label, (np.nan,) * 4) for label in CLASSES], np.float32) / SIDE for name in found if name in rows}


def _nothing_found(root):
    """The line for a root without a table: what is there instead."""
    tables = [p for p in sorted(root.glob("*.csv")) if p.name.lower() != BOXES]
    if tables:
        return f"{missing_columns(tables[0], read_columns(tables[0]), NEEDED)}; {EXPECTED}"
    beside = [p.parent for p in (*sorted(root.glob("*/*/*.csv")), *sorted(root.parent.glob("*.csv"))) if p.name.lower() in TABLES]
    return f"{root}: no ChestX-ray14 table here{f' (did you mean {beside[0]}?)' if beside else ''}; {EXPECTED}"
