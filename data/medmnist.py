"""MedMNIST v2 and MedMNIST+: twelve sets of small pictures, an .npz archive each (CC BY 4.0; DermaMNIST CC BY-NC 4.0).

    ROOT/NAME.npz                                   28 px: {train,val,test}_images uint8, {train,val,test}_labels, official splits
    ROOT/NAME_64.npz, NAME_128.npz, NAME_224.npz    the same pictures in the same order, larger (MedMNIST+)

Yang et al., Sci Data 10:41 (2023). The file of the wanted size is read, else the largest there, resized; 28 px for 32 are padded.
Archives are streamed 16 MB at a time into the cache: nothing is unpickled, and no array is ever whole in memory.
"""
import errno
import hashlib
import math
import os
import zipfile
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import cache, splits
from .types import DataError, DataSet, Split

ORGANS = ["bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
          "pancreas", "spleen"]
CLASSES = {                                             # in the order of the labels 0, 1, 2, ...
    "pathmnist": ["adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
                  "cancer-associated stroma", "colorectal adenocarcinoma epithelium"],
    "dermamnist": ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"],                           # as HAM10000, whose images they are
    "octmnist": ["choroidal neovascularization", "diabetic macular edema", "drusen", "normal"],
    "pneumoniamnist": ["normal", "pneumonia"],
    "retinamnist": ["0", "1", "2", "3", "4"],                                                   # grade of diabetic retinopathy
    "breastmnist": ["malignant", "normal or benign"],                                           # reversed from habit
    "bloodmnist": ["basophil", "eosinophil", "erythroblast", "immature granulocyte", "lymphocyte", "monocyte", "neutrophil",
                   "platelet"],
    "tissuemnist": ["collecting duct or connecting tubule", "distal convoluted tubule", "glomerular endothelial cells",
                    "interstitial endothelial cells", "leukocytes", "podocytes", "proximal tubule segments",
                    "thick ascending limb"],
    "organamnist": ORGANS, "organcmnist": ORGANS, "organsmnist": ORGANS,
    "chestmnist": ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
                   "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"]}      # as ChestX-ray14
MULTILABEL = ("chestmnist",)
SIDES = (28, 64, 128, 224)
MD5 = {                                                 # of SIDES, the first 8 digits, by MedMNIST's info.py v3 (Zenodo 10519652)
    "pathmnist": "a8b06965 55aa9c1e ac42d08f 2c51a510", "dermamnist": "0744692d b70a2f56 2defd784 8974907d",
    "octmnist": "c68d92d5 e229e944 0a97e766 abc493b6", "pneumoniamnist": "28209eda 8f4eceb4 05b46931 d6a3c71d",
    "retinamnist": "bd4c0672 afda852c e48e916a eae7e3b6", "breastmnist": "750601b1 742edef2 363e4b3f b56378a6",
    "bloodmnist": "7053d035 2b94928a adace1e0 b718ff68", "tissuemnist": "ebe78ee8 123ece2e 61b95535 b077128c",
    "organamnist": "68e3f884 2dcccc29 eeae80d0 50747347", "organcmnist": "b9ceb954 3ce34a87 773c1f00 050f5e87",
    "organsmnist": "9ab87b69 53a6d115 ded0c5fa b354719e", "chestmnist": "02c8a651 9de6cd0b db107e55 45bd33e6"}
KNOWN = {
    "dermamnist": ["LEAK: the official split ignores HAM10000's lesions: some are on two sides (doi 10.1038/s41597-025-04382-5)"],
    "pneumoniamnist": ["the test set comes from another folder of the source than train and val: expect less than on validation"],
    "chestmnist": ["its train part holds images of ChestX-ray14's official test list: never mix the two"]}
MAX_BYTES = 16 * 10**9                                  # of one array, unpacked; the largest official one, pathmnist_224, has 13.5
MAX_IMAGES = 10**6                                      # of one part; the largest official one, of tissuemnist, has 165,466
BLOCK = 2**24                                           # bytes unpacked at once
DOWNLOAD = "zenodo.org/records/10519652 (MedMNIST+)"


class Array(NamedTuple):
    """An array of an archive, by its .npy header."""
    key: str
    shape: tuple
    dtype: np.dtype
    start: int                                  # of the first value, in bytes


def load(name, root=None, size=32, seed=0, split="official", limit=0, test_only=False, classes=None, channels=None):
    """One of CLASSES as a DataSet; `data.load` describes the options (pictures are square: nothing to crop or to squash).

    root: the folder of the files, or an .npz file itself by any name; default data/raw/NAME, or else ~/.medmnist.
    Raises DataError for what is missing, wrong or damaged.
    """
    if split == "group":
        raise DataError(f"--data {name} --split group: MedMNIST tells of no patients; take --split official")
    path, own, multilabel = _find(name, root, size), CLASSES[name], name in MULTILABEL
    classes = list(classes or own)
    if not set(own) <= set(classes) or multilabel and len(own) < len(classes):
        raise DataError(f"{path}: has the classes {', '.join(own)}, the model knows {', '.join(classes)}")
    notes = [_official(name, path), f"split {split}: MedMNIST's own; no patient ids are known: one patient may be on two sides"]
    with _opened(path) as archive:
        arrays = {part: _array(archive, f"{part}_images") for part in (("test",) if test_only else splits.SPLITS)}
        side, depth = _check_images(path, list(arrays.values()))
        channels = channels or depth
        labels = {part: _labels(archive, name, part, array.shape[0]) for part, array in arrays.items()}
        rows = {part: _draw(labels[part], limit, [seed, splits.SPLITS.index(part)]) for part in arrays}
        ids = [f"{part}-{row:05d}" for part in rows for row in rows[part]]
        images, hashes, *_, troubles = cache.remember(name, (len(ids), channels, size, size), [path], ids,
                                                     lambda *of: _decode(archive, arrays, rows, size, channels, *of), in_order=True)
    if side != size:
        notes.append("28 px padded to 32: two pixels more on each side, of the border's values" if (side, size) == (28, 32) else
                     f"resized from {side} to {size} px (bilinear, antialiased)")
    notes += KNOWN.get(name, []) + troubles
    sides = np.repeat(list(rows), [len(inside) for inside in rows.values()])
    for part, twice, of in zip(("train", "validation"), splits.duplicates(hashes, list(sides)), ("validation or test", "test")):
        if twice:
            notes.append(f"{len(twice):,} {part} images dropped: pixel for pixel the same as one in {of}")
            sides[twice] = ""
    labels = np.concatenate([labels[part][rows[part]] for part in rows])
    order = np.array([classes.index(c) for c in own])
    labels = labels[:, order.argsort()] if multilabel else order[labels]
    found = {}
    for part in rows:
        here = np.flatnonzero(sides == part)
        if not len(here) or part == "train" and not multilabel and len(np.unique(labels[here])) < 2:
            raise DataError(f"{path}: {part} is of one class, or all of it in another part too; is the file as MedMNIST made it?")
        piece = slice(here[0], here[-1] + 1) if here[-1] - here[0] + 1 == len(here) else here     # a view, if nothing was dropped
        as_saved = {key: np.full(len(here), float(side)) for key in ("width", "height")}
        found[part] = Split(images[piece], labels[here], [ids[i] for i in here], source=as_saved)
    return DataSet(found.get("train"), found.get("val"), found["test"], classes, multilabel, channels, notes, name, border=2 * ((side, size) == (28, 32)))


# ------------------------------------------------------------------------------------------------ the file
def _find(name, root, size):
    """The file of the wanted size, else the largest, else the only one whose name begins with that of the set."""
    places = [Path(root)] if root else [Path(__file__).parent / "raw" / name, Path(os.path.expanduser("~/.medmnist"))]
    names = {side: f"{name}.npz" if side == 28 else f"{name}_{side}.npz" for side in SIDES}
    for place in places:
        if place.is_file():
            return place
        if there := [side for side in SIDES if (place / names[side]).is_file()]:
            wanted = 28 if size == 32 else size
            return place / names[wanted if wanted in there else there[-1]]
        others = sorted(place.glob(f"{name}*.npz"))
        if len(others) > 1:
            raise DataError(f"{place}: {', '.join(p.name for p in others)}: which one? name the file itself with --root")
        if others:
            return others[0]
    where = " and ".join(f"{place}{'' if place.exists() else ' (no such folder)'}" for place in places)
    raise DataError(f"{where}: looked for {', '.join(names.values())}; download one from {DOWNLOAD}, or name it with --root")


def _official(name, path):
    """The note that says whether the file has MedMNIST's own bytes. Another set's own bytes are a DataError."""
    md5 = hashlib.md5(usedforsecurity=False)            # against mix-ups, not against malice
    with _reading(path), open(path, "rb") as file:
        while block := file.read(2**20):
            md5.update(block)
    owner = next((owner for owner, known in MD5.items() if md5.hexdigest()[:8] in known.split()), None)
    if owner not in (name, None):
        raise DataError(f"{path}: is {owner}, not {name}; take --data {owner}")
    return f"{path}: {'the official bytes' if owner else 'not the official bytes'} (md5 {md5.hexdigest()})"


@contextmanager
def _reading(path):
    """One line for whatever reading may raise: damaged archives raise a dozen classes."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):      # EINVAL: damage made zipfile seek below 0
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged or cut short ({what}); download it again from {DOWNLOAD}") from None


@contextmanager
def _opened(path):
    """The archive; a file that is none is told apart."""
    with _reading(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: a git-LFS pointer instead of the archive; run `git lfs pull`")
        if not head.startswith(b"PK"):
            raise DataError(f"{path}: {'not an .npz archive' if head else 'empty (0 bytes)'}; download it again from {DOWNLOAD}")
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


# ------------------------------------------------------------------------------------------------ arrays
def _array(archive, key):
    """The Array of that name. What it claims to hold is checked before anything is unpacked."""
    names, file = archive.namelist(), archive.filename
    if f"{key}.npy" not in names:
        raise DataError(f"{file}: lacks {key}.npy, has {names[:8]}; is it a file of MedMNIST's 2D sets?")
    claimed = archive.getinfo(f"{key}.npy").file_size
    if claimed > MAX_BYTES:
        raise DataError(f"{file}: {key} claims {claimed:,} bytes, the limit is {MAX_BYTES:,}; download it from {DOWNLOAD}")
    with _reading(file), archive.open(f"{key}.npy") as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = header(member)
        start = member.tell()
    if dtype.hasobject:
        raise DataError(f"{file}: {key} holds pickled objects, which may run code; save it as plain numbers")
    if start + math.prod(shape) * dtype.itemsize != claimed:
        raise DataError(f"{file}: {key} claims to be {shape} of {dtype} in {claimed:,} bytes; download it again from {DOWNLOAD}")
    if columns_first:
        raise DataError(f"{file}: {key} is in Fortran order; save np.ascontiguousarray of it")
    return Array(key, shape, dtype, start)


def _check_images(path, arrays):
    """Pixels a side and channels of the pictures, the same in all parts."""
    for key, shape, dtype, _ in arrays:
        if dtype != np.uint8:
            raise DataError(f"{path}: {key} is {dtype}; save the pictures as uint8, 0..255")
        square = len(shape) in (3, 4) and shape[3:] in ((), (3,)) and shape[1] == shape[2] and 8 <= shape[1] <= 2048
        if not square or shape[1:] != arrays[0].shape[1:]:
            raise DataError(f"{path}: {key} has the shape {shape}; expected (N, 28, 28) grey or (N, 28, 28, 3) RGB, or another "
                            "square of 8..2048 pixels, the same in all parts")
        if not 0 < shape[0] <= MAX_IMAGES:
            raise DataError(f"{path}: {key} holds {shape[0]:,} images; expected 1..{MAX_IMAGES:,}")
    return shape[1], 3 if len(shape) == 4 else 1


def _labels(archive, name, part, n):
    """Labels of a part: int64 (n,), or float32 (n, K) for multi-label data."""
    array, K = _array(archive, f"{part}_labels"), len(CLASSES[name])
    what = f"{archive.filename}: {array.key}"
    if array.dtype.kind not in "iu":
        raise DataError(f"{what} is {array.dtype}; save whole numbers (uint8)")
    if array.shape not in ([(n, K)] if name in MULTILABEL else [(n,), (n, 1)]):
        raise DataError(f"{what} has the shape {array.shape}; expected {(n, K if name in MULTILABEL else 1)}, a row for each of "
                        f"{n:,} images; is the file {name}'s?")
    labels = np.concatenate(list(_rows(archive, array))).astype(np.int64)      # before any arithmetic: uint8 wraps
    top = 1 if name in MULTILABEL else K - 1
    if wrong := next((y for y in (labels.min(), labels.max()) if not 0 <= y <= top), None):
        raise DataError(f"{what} holds {wrong}, {name} has the labels 0..{top}; is the file {name}'s?")
    return labels.astype(np.float32) if name in MULTILABEL else labels.reshape(-1)


def _draw(labels, limit, seed):
    """Rows of at most `limit` images, each class its share; an image with several findings counts for the rarest of them."""
    return splits.draw(labels, limit, np.random.default_rng(seed)) if limit else np.arange(len(labels))


def _rows(archive, array):
    """The rows of an array in blocks; zipfile compares the CRC when it has unpacked the last."""
    width = math.prod(array.shape[1:]) * array.dtype.itemsize
    with _reading(archive.filename):
        member = archive.open(f"{array.key}.npy")
        member.read(array.start)
    with member:
        left, most = array.shape[0], max(1, BLOCK // width)
        while left:
            n = min(left, most)
            with _reading(archive.filename):
                block = np.frombuffer(member.read(n * width), array.dtype).reshape(n, *array.shape[1:])
            yield block
            left -= n


def _decode(archive, arrays, rows, size, channels, blocks, tick):
    """As `fill` of `cache.remember`, whose rows are the wanted rows of the parts, one part after another: blocks must rise."""
    def pictures():
        for part, array in arrays.items():
            first = 0
            for block in _rows(archive, array):
                low, high = np.searchsorted(rows[part], (first, first + len(block)))
                yield from (block[row - first] for row in rows[part][low:high])
                first += len(block)
    every, at = pictures(), 0
    for start, stop in blocks:
        pixels, hashes, sizes = np.empty((stop - start, channels, size, size), np.uint8), [], []
        for number, picture in enumerate(islice(every, start - at, stop - at)):
            pixels[number] = fitted(picture, size, channels)
            hashes.append(hashlib.blake2b(picture, digest_size=16).hexdigest())
            sizes.append(picture.shape[1::-1])
            tick()
        at = stop
        yield start, pixels, hashes, {}, sizes
    for _ in every:                                     # to the end, where zipfile compares the CRC
        pass


def fitted(pixels, size, channels):
    """A square picture, uint8 (H, H) or (H, H, 3) -> uint8 (channels, size, size): resized, but from 28 to 32 pixels padded."""
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    if (len(pixels), size) == (28, 32):                 # keeps every pixel as it is, and U-Nets want multiples of 8
        pixels = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0))[:2 + (channels == 3)], mode="edge")
    else:
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels.reshape(size, size, channels).transpose(2, 0, 1))
