"""A folder per class: your own images, no edit anywhere.

    ROOT/{train,val,test}/CLASS/**.png      the splits as given (also called training, valid, validation, testing)
    ROOT/CLASS/**.png                       splits are carved: 30 % test, 10 % validation
    ROOT/classes.txt                        optional: the classes in order, a line each (for grades); else sorted, 2_x before 10_x
    ROOT/groups.csv                         optional: file,group with the patient of each file, path below ROOT or file name
    ROOT/findings.csv                       multi-label: file and a column of 0 and 1 for each finding; then folders are no classes, and the
                                            images lie anywhere below ROOT, or all of them in train, val and test
"""
import random
import re
from pathlib import Path

from PIL import Image

from .images import EXTENSIONS, FORMATS, GREY_MODES, find_images, follow
from .splits import SPLITS, TEST, VAL, assign
from .tables import Record, Table, missing_columns, read_lines, read_table, report_missing
from .types import DataError

PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
EXPECTED = "expected ROOT/CLASS/*.png or ROOT/{train,val,test}/CLASS/*.png with two classes or more"


def table(root, split="official", test_only=False, skip_bad=False, classes=None):
    """The Table of the folders below `root`; `data.load` describes the splits.

    test_only: root holds test/CLASS, or else all of ROOT/CLASS is test. Raises DataError for what is missing or does not fit.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'a file, not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
    notes = []
    if (root / "findings.csv").is_file():
        return _multilabel(root, root / "findings.csv", split, test_only, skip_bad, notes)
    given = {}
    for place in (p for p in _folders(root) if p.name.lower() in PARTS):
        if other := given.get(PARTS[place.name.lower()]):
            raise DataError(f"{root}: {other.name} and {place.name} are the same split; move the images of one into the other")
        given[PARTS[place.name.lower()]] = place
    others = [p for p in _folders(root) if p.name.lower() not in PARTS]
    if given and (beside := [p.name for p in others if find_images(p)]):
        names = f"{_list([p.name for p in given.values()])} beside {_list(beside[:5])}"
        if "train" not in given and not test_only:
            raise DataError(f"{root}: holds {names}: a split beside classes; move the classes into train/, or rename {'it' if len(given) == 1 else 'them'}")
        notes.append(f"{root}: holds {names}, whose images are left out")
    if others and not given:
        given = {"test" if test_only else "all": root}
    elif test_only and "test" in given:
        given = {"test": given["test"]}
    elif "train" not in given and given:
        raise DataError(f"{root}: holds only {', '.join(p.name for p in given.values())}; `eval` takes a test set, "
                        f"training needs train/CLASS too")
    found = [(part, path.name, image)
             for part, place in given.items() for path in _folders(place) for image in _images(path, notes)]
    if not found:
        loose = " (images lie in the folder itself: sort them into a folder per class)" if find_images(root) else ""
        raise DataError(f"{root}: no images in class folders{loose}; {EXPECTED}; extensions {' '.join(EXTENSIONS)}")
    classes = classes or _class_order(root, {name for _, name, _ in found}, notes)
    if strange := {name for _, name, _ in found} - set(classes):
        raise DataError(f"{root}: class folder {_list(strange)} is none of the classes {_list(classes)}; rename or remove it")
    if len(classes) < 2:
        raise DataError(f"{root}: one class only ({_list(classes)}); {EXPECTED}; is --root one folder too high or too low?")
    if len(alike := _alike([path for place in given.values() for path in _folders(place) if path.name in classes])) > 1:
        notes.append(f"each class holds the folders {_list(alike[:5])}: are those the classes? Then rename the folders above them train, val and test")
    group_of = _read_groups(root, [image for _, _, image in found], notes)
    records = [Record(image, classes.index(name), group_of.get(image), image.relative_to(root).as_posix(), part,
                      {"folder": image.relative_to(given[part] / name).parent.as_posix()})
               for part, name, image in found]
    if test_only and set(given) == {"test"}:
        notes.append(f"test set: every image below {given['test']}")
    else:
        records = _split(root, records, split, notes)
        _check_classes(root, records, classes, carved=len(given) < 3 or split != "official")
    return Table(records, list(classes), _channels([r.path for r in records]), notes)


def _multilabel(root, path, split, test_only, skip_bad, notes):
    """The Table of findings.csv."""
    images = find_images(root)
    columns, rows = read_table(path)
    classes = [name for name in read_lines(path, header_only=True)[0][1] if name and name.lower() != "file"]
    if "file" not in columns or not classes or len(set(columns)) <= len(classes):
        raise DataError(missing_columns(path, columns, "file and, once each, a column of 0 and 1 for every finding"))
    labels, missing, find = {}, [], _finder(root, images, path)
    for number, cells in rows:
        label = tuple(_binary(cells[name.lower()]) for name in classes)
        if None in label:
            name = classes[label.index(None)]
            raise DataError(f"{path}: line {number}: {name} is {cells[name.lower()] or 'empty'}: every column but file is a finding, each 0 or 1; patients belong "
                            "into groups.csv (file,group), and for one class an image there are class folders")
        image = find(cells["file"], number)
        if image is None:
            missing.append(cells["file"])
        elif labels.setdefault(image, label) != label:
            raise DataError(f"{path}: line {number}: {cells['file']} has other findings than before; remove one of the two")
    if not labels:
        raise DataError(f"{path}: a table, but none of its {len(rows):,} images; it names them by the path below {root}")
    report_missing(missing, len(rows), "listed", path, skip_bad, notes)
    if len(labels) < len(images):
        notes.append(f"{len(images) - len(labels):,} images are not in findings.csv and left out")
    parts = {image: PARTS.get(image.relative_to(root).parts[0].lower(), "all") for image in labels}
    flat = "all" in parts.values()
    if flat and (given := {p for p in parts.values() if p != "all"}):
        odd = next(image for image, part in parts.items() if part == "all").relative_to(root)
        raise DataError(f"{path}: lists images in {_list(given)} and others, as {odd}, in none of train, val and test; move them, or take them off the table")
    if not flat and "train" not in parts.values() and not test_only:
        raise DataError(f"{path}: lists only images of {_list(set(parts.values()))}; `eval` takes a test set, training needs train too")
    group_of = _read_groups(root, images, notes)
    records = [Record(image, label, group_of.get(image), image.relative_to(root).as_posix(), "all" if flat else parts[image])
               for image, label in labels.items()]
    if test_only:
        records = [r._replace(split="test") for r in records if flat or r.split == "test"]
        notes.append(f"test set: {root}, {len(records):,} images")
    else:
        records = _split(root, records, split, notes)
    return Table(records, classes, _channels([r.path for r in records]), notes, multilabel=True)


def _split(root, records, split, notes):
    """Keeps the given splits of "official", carves those that lack; carves all three for "group" and "paper"."""
    parts = {record.split for record in records}
    unit = "patients (groups.csv)" if any(r.group for r in records) else "images"
    if split == "paper" or split == "group" or parts == {"all"}:
        if split == "official":
            notes.append("no train and test folders: split group instead")
        unit = "images" if split == "paper" else unit
        name = "paper" if split == "paper" else "group"
        notes.append(f"split {name}: 30 % of the {unit} of each class are test, 10 % validation")
        return assign(records, by_group=split != "paper")
    train = [r for r in records if r.split == "train"]
    rest = [r for r in records if r.split != "train"]
    lacking = [p for p in ("val", "test") if p not in parts]
    if lacking:
        train = assign(train, test=TEST * ("test" in lacking), val=VAL * ("val" in lacking))
        share = " and ".join(f"{'10' if p == 'val' else '30'} % as {p}" for p in lacking)
        notes.append(f"split official: the folders as given; {share} carved from train, by {unit} within each class")
    else:
        notes.append("split official: the folders as given")
    return train + rest


def _check_classes(root, records, classes, carved):
    """Every class must be in every split."""
    for part in SPLITS:
        there = {r.label for r in records if r.split == part}
        if lacking := [name for k, name in enumerate(classes) if k not in there]:
            has = {p: sum(r.split == p and r.label == classes.index(lacking[0]) for r in records) for p in SPLITS}
            counts = ", ".join(f"{n:,} in {p}" for p, n in has.items())
            remedy = "to carve splits a class needs at least 3 images (of 3 patients, if groups.csv names them)" if carved else \
                "give every class to each of train, val and test, or take --split group"
            raise DataError(f"{root}: {part} lacks the class {_list(lacking)} (images of {lacking[0]}: {counts}); {remedy}")


def _binary(cell):
    """0 or 1, also of 1.0; None of anything else."""
    try:
        return {0: 0, 1: 1}.get(float(cell))
    except ValueError:
        return None


def _alike(folders):
    """The names of folders that are in each of these: perhaps the classes, and these splits or hospitals."""
    inside = [{p.name for p in _folders(folder)} for folder in folders]
    return sorted(set.intersection(*inside)) if len(inside) > 1 else []


def _folders(path):
    return sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX"),
                  key=lambda p: _natural(p.name))


def _images(folder, notes):
    found = find_images(folder)
    if not found:
        notes.append(f"{folder}: no images, so it is no class")
    return found


def _natural(name):
    """Sort key by which 2_moderate comes before 10_severe."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part], name


def _class_order(root, names, notes):
    """The classes in the order of classes.txt, or in natural order."""
    path = root / "classes.txt"
    if not path.is_file():
        return sorted(names, key=_natural)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); a class a line, in UTF-8") from None
    classes = [line for line in lines if line]
    if len(set(classes)) < len(classes) or set(classes) != names:
        raise DataError(f"{path}: lists {_list(classes)}, the folders are {_list(sorted(names))}; a line each, once")
    notes.append(f"class order from classes.txt: {_list(classes)}")
    return classes


def _read_groups(root, images, notes):
    """{path: patient} by groups.csv; a file is named by its path below root, or by its bare name where that is unique."""
    path = root / "groups.csv"
    if not path.is_file():
        notes.append("no patient ids are known: each image counts as its own patient, so one patient may be on two sides; "
                     "if you know them, add groups.csv (columns file,group) to the folder")
        return {}
    columns, rows = read_table(path)
    if not {"file", "group"} <= set(columns):
        raise DataError(missing_columns(path, columns, "file,group"))
    groups, unknown, find = {}, [], _finder(root, images, path)
    for number, cells in rows:
        name, group = cells["file"], cells["group"]
        image = find(name, number)
        if image is None:
            unknown.append(name)
        elif groups.setdefault(image, group) != group:
            raise DataError(f"{path}: line {number}: {name} has two groups, {groups[image]} and {group}; keep one")
    if rows and not groups:
        raise DataError(f"{path}: names none of the {len(images):,} images, its first is {unknown[0]}, an image's {images[0].relative_to(root).as_posix()}; "
                        f"name files by the path below {root}, or by the bare name with its suffix")
    groups = {image: group for image, group in groups.items() if group}
    if unknown:
        notes.append(f"groups.csv names {len(unknown):,} files that are not there, first: {unknown[0]}")
    if len(groups) < len(images):
        notes.append(f"groups.csv has no group for {len(images) - len(groups):,} images: each counts as its own patient")
    return groups


def _finder(root, images, path):
    """find(name, line of the table `path`) -> the image of that path below root, or of that bare name where it is unique; or None."""
    by_path, by_name = {image.relative_to(root).as_posix(): image for image in images}, {}
    for image in images:
        by_name.setdefault(image.name, []).append(image)

    def find(name, number):
        name = name.replace("\\", "/").removeprefix("./")
        matches = [by_path[name]] if name in by_path else by_name.get(name, [])
        if len(matches) > 1:
            raise DataError(f"{path}: line {number}: {name} is the name of {len(matches)} files; give the path below {root}")
        return matches[0] if matches else None
    return find


def _channels(paths):
    """1 if all of up to 64 pictures, drawn with a fixed seed, are grey by their header; else 3."""
    for path in random.Random(0).sample(paths, min(64, len(paths))):
        try:
            with Image.open(follow(path), formats=FORMATS) as image:
                if image.mode not in GREY_MODES:
                    return 3
        except Exception:                               # what cannot be read is named when it is decoded
            pass
    return 1


def _list(names):
    return ", ".join(map(str, sorted(names) if isinstance(names, set) else names))
