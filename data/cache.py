"""Decode once: every picture of a data set in one uint8 memory map under data/raw/cache, which later runs open in a moment.

    NAME-SIZEpx-KEY.npy     uint8 (N, C, size, size)
    NAME-SIZEpx-KEY.json    its checksum, of each image a hash and the size of its file's picture, and the rows that could not be read
                            (zeros in the array)

KEY hashes the paths, sizes and times of the files, the options, and VERSION: a changed file is another key. The folder may be
deleted at any time; the environment variable DIFFUSION_CLASSIFIERS_CACHE names another one.
"""
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import images
from .types import DataError

VERSION = 1                                             # to be raised when read_image gives other pixels for the same file


def folder():
    """Where the arrays lie."""
    default = Path(__file__).resolve().parent / "raw" / "cache"
    return Path(os.environ.get("DIFFUSION_CLASSIFIERS_CACHE") or default)


def load(paths, size, channels, fit, name="images", workers=None):
    """Files -> uint8 (N, channels, size, size) read-only memory map, N hashes, {row: why it cannot be read}, N pairs of the width and
    height in the file, list of notes.

    Decodes in threads: Pillow lets go of the GIL. Where the folder cannot be written, the array is held in memory.
    """
    paths = [images.follow(path) for path in paths]
    shape = (len(paths), channels, size, size)
    return remember(name, shape, paths, fit, lambda keep: _decode_all(paths, shape, fit, workers, keep),
                    lambda row: _readable(paths[row], size, channels, fit))


def remember(name, shape, sources, options, fill, mended=lambda row: False):
    """What fill(keep) makes out of the files `sources`, or what it made in an earlier run; returned as by `load`.

    fill calls keep(row, uint8 (C, size, size)) for each row in order, and returns N hashes, {row: why it cannot be read} and N sizes.
    mended(row): whether such a row can be read by now.
    """
    stem = folder() / f"{name}-{shape[-1]}px-{_key(sources, shape[-1], shape[1], options)}"
    if (found := _open(stem, shape)) and not any(map(mended, found[2])):
        return *found, []
    try:
        return *_build(stem, shape, fill), []
    except OSError as error:
        note = (f"cache folder {folder()} cannot be written ({error.strerror or error}): images are held in memory "
                "and decoded again in the next run")
    array = np.empty(shape, np.uint8)
    return array, *fill(array.__setitem__), [note]


def _key(paths, size, channels, fit):
    def facts(path):
        try:
            stat = os.stat(path)
            return [os.path.abspath(path), stat.st_mtime_ns, stat.st_size]
        except OSError:
            return [os.path.abspath(path), None, None]
    facts = json.dumps([VERSION, size, channels, fit, [facts(path) for path in paths]])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _readable(path, size, channels, fit):
    try:
        images.read_image(path, size, channels, fit)
        return True
    except DataError:
        return False


def _open(stem, shape):
    """(array, hashes, bad, sizes) of a cache that is whole, else None: it will be built again."""
    try:
        facts = json.loads(stem.with_suffix(".json").read_text())
        array = np.lib.format.open_memmap(stem.with_suffix(".npy"), mode="r")
        hashes, bad = list(facts["hashes"]), {int(row): str(reason) for row, reason in facts["bad"].items()}
        sizes = [(int(width), int(height)) for width, height in facts["sizes"]]
        whole = array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous and len(hashes) == len(sizes) == len(array)
        crc = 0
        for start in range(0, len(array) if whole else 0, 256):         # reads what the run will read anyway, 1 s a gigabyte
            crc = zlib.crc32(array[start:start + 256], crc)
        return (array, hashes, bad, sizes) if whole and crc == facts["crc"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, EOFError):
        return None


def _build(stem, shape, fill):
    """Writes the array and its facts, each to a temporary file first, so that a reader never meets half of one."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for litter in stem.parent.glob("*.tmp"):            # of a run that was killed
        if time.time() - litter.stat().st_mtime > 86400:
            litter.unlink(missing_ok=True)
    crc = 0
    with _replacing(stem.with_suffix(".npy")) as file:
        def keep(row, pixels):
            nonlocal crc
            file.write(pixels)
            crc = zlib.crc32(pixels, crc)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        hashes, bad, sizes = fill(keep)
    with _replacing(stem.with_suffix(".json")) as file:
        file.write(json.dumps({"crc": crc, "bad": bad, "hashes": hashes, "sizes": sizes}).encode())
    return np.lib.format.open_memmap(stem.with_suffix(".npy"), mode="r"), hashes, bad, sizes


@contextmanager
def _replacing(path):
    """A file that takes the place of `path` when the block ends well, and leaves nothing behind when it does not."""
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _decode_all(paths, shape, fit, workers, keep):
    """Calls keep(row, uint8 (C, size, size)) in order, with zeros for what cannot be read; returns N hashes, {row: reason}, N sizes."""
    def decode(path):
        try:
            (pixels, size), reason = images.decode(path, shape[-1], shape[1], fit), None
        except DataError as error:
            pixels, size, reason = np.zeros(shape[1:], np.uint8), (0, 0), str(error)
        return pixels, size, hashlib.blake2b(pixels, digest_size=16).hexdigest(), reason
    hashes, bad, sizes = [], {}, []
    pool = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bar = tqdm(pool.map(decode, paths), "decoding", len(paths), file=sys.stderr, disable=len(paths) < 500,
                       mininterval=1, unit="image")
            for row, (pixels, size, digest, reason) in enumerate(bar):
                keep(row, pixels)
                hashes.append(digest)
                sizes.append(size)
                if reason:
                    bad[row] = reason
    finally:
        pool.shutdown(cancel_futures=True)              # Ctrl-C waits for the pictures in hand, not for all
    return hashes, bad, sizes
