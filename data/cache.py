"""Decode once: every picture of a data set in one uint8 memory map under data/raw/cache, which later runs open in a moment.

    NAME-SIZEpx-KEY.npy     uint8 (N, C, size, size)
    NAME-SIZEpx-KEY.json    the checksum of each block of 256 images, of each image a hash and the size of its file's picture, and the rows
                            that could not be read (zeros in the array)
    NAME-SIZEpx-KEY.parts/  a build under way: the array, and of each block that is done a file that says so

KEY hashes the paths, sizes and times of the files, the options, and VERSION: a changed file is another key. A build that was interrupted or
killed goes on from its last block, and several processes build one array together: each takes blocks that none has done, and where
two do the same, they write the same bytes to the same place. The folder may be deleted at any time; the environment variable
DIFFUSION_CLASSIFIERS_CACHE names another one.
"""
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import images
from .types import DataError

VERSION = 3                                             # to be raised when read_image gives other pixels for the same file
ROWS = 256                                              # images a block: about what a killed build loses
TOLD = 100 * 10**6                                      # bytes of a cache above which its need is said before it is built


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
    return remember(name, shape, paths, fit, lambda *of: _decode_all(paths, shape, fit, workers, *of),
                    lambda row: _readable(paths[row], size, channels, fit))


def remember(name, shape, sources, options, fill, mended=lambda row: False, in_order=False):
    """What `fill` makes out of the files `sources`, or what it made in an earlier run; returned as by `load`.

    fill(blocks, tick) yields for each of the blocks (start, stop), an iterator, in turn: start, uint8 (n, C, size, size), n hashes,
    {row: why it cannot be read} and n sizes; it calls tick() for each image. in_order: it needs blocks in rising order.
    mended(row): whether such a row can be read by now.
    """
    stem = folder() / f"{name}-{shape[-1]}px-{_key(sources, shape[-1], shape[1], options)}"
    if (found := _open(stem, shape)) and not any(map(mended, found[2])):
        return *found, []
    try:
        stem.with_suffix(".json").unlink(missing_ok=True)                       # damaged, or of files that are mended
        return *_build(stem, shape, fill, in_order), []
    except OSError as error:
        if found := _open(stem, shape):                                         # another process was faster
            return *found, []
        reason = error.strerror or str(error)
    _check_memory(shape, reason)
    array, done = np.empty(shape, np.uint8), {}
    with _bar(len(array)) as bar:
        for start, pixels, *facts in fill(iter(_blocks(len(array))), bar.update):
            array[start:start + len(pixels)] = pixels
            done[start] = facts
    return array, *_joined(done), [f"cache folder {folder()} cannot be written ({reason}): images are held in memory "
                                   "and decoded again in the next run"]


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


def _blocks(n):
    return [(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]


def _bar(total, done=0):
    every = 1 if sys.stderr.isatty() else 30            # seconds: a line now and then in a log
    return tqdm(desc="decoding", total=total, initial=done, file=sys.stderr, delay=1, mininterval=every, maxinterval=every, unit="image")


def _joined(done):
    """hashes, bad, sizes of all images, of {start: those of a block}."""
    facts = [done[start] for start in sorted(done)]
    return [h for hashes, _, _ in facts for h in hashes], {row: why for _, bad, _ in facts for row, why in bad.items()}, \
        [tuple(map(int, size)) for _, _, sizes in facts for size in sizes]


def _open(stem, shape):
    """(array, hashes, bad, sizes) of a cache that is whole, else None: it will be built again."""
    try:
        facts = json.loads(stem.with_suffix(".json").read_text())
        array = np.lib.format.open_memmap(stem.with_suffix(".npy"), mode="r")
        hashes, bad = list(facts["hashes"]), {int(row): str(reason) for row, reason in facts["bad"].items()}
        sizes = [(int(width), int(height)) for width, height in facts["sizes"]]
        whole = array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous and len(hashes) == len(sizes) == len(array)
        return (array, hashes, bad, sizes) if whole and facts["crc"] == [       # reads what the run will read anyway, 1 s a gigabyte
            zlib.crc32(array[start:stop]) for start, stop in _blocks(len(array))] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, EOFError):
        return None


def _build(stem, shape, fill, in_order):
    """Builds the array in NAME.parts and moves it to its place, so that a reader never meets half of one."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    _sweep(stem.parent)
    parts, header, width = stem.with_suffix(".parts"), io.BytesIO(), int(np.prod(shape[1:]))
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    before = len(header.getvalue())
    parts.mkdir(exist_ok=True)
    try:
        with open(os.open(parts / "array.npy", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as file:
            blocks = _blocks(shape[0])
            done = {start: facts for start, stop in blocks if (facts := _part(parts, file, before, width, start, stop))}
            _check_room(stem.parent, shape, (len(blocks) - len(done)) / max(1, len(blocks)))
            file.seek(0)
            file.write(header.getvalue())
            file.truncate(before + shape[0] * width)
            if not in_order:
                random.Random(os.getpid()).shuffle(blocks)                      # so that several processes meet seldom
            with _bar(shape[0], sum(len(facts[1]) for facts in done.values())) as bar:
                def rest():
                    for start, stop in blocks:
                        if stem.with_suffix(".json").exists():
                            raise FileExistsError(f"{stem}: another process has built it")
                        if start in done:
                            continue
                        if facts := _part(parts, file, before, width, start, stop):     # done by another process by now
                            done[start] = facts
                            bar.update(stop - start)
                        else:
                            yield start, stop
                for start, pixels, *facts in fill(rest(), bar.update):
                    file.seek(before + start * width)
                    file.write(pixels)
                    file.flush()
                    os.fsync(file.fileno())
                    done[start] = [zlib.crc32(pixels), *facts]
                    with _replacing(parts / f"{start}.json") as note:           # after the pixels are on the disk
                        note.write(json.dumps(done[start]).encode())
            ours = os.fstat(file.fileno())
        with suppress(FileNotFoundError):               # where another process was faster by a moment
            os.replace(parts / "array.npy", stem.with_suffix(".npy"))
        if not os.path.samestat(ours, os.stat(stem.with_suffix(".npy"))):       # another process gave up and removed what we wrote to
            raise FileNotFoundError(f"{stem}: another array took its place")
        hashes, bad, sizes = _joined({start: facts[1:] for start, facts in done.items()})
        with _replacing(stem.with_suffix(".json")) as file:
            file.write(json.dumps({"crc": [done[start][0] for start in sorted(done)], "bad": bad, "hashes": hashes, "sizes": sizes}).encode())
        array = np.lib.format.open_memmap(stem.with_suffix(".npy"), mode="r")
    except (DataError, OSError):                        # not Ctrl-C: the next run goes on
        shutil.rmtree(parts, ignore_errors=True)
        raise
    shutil.rmtree(parts, ignore_errors=True)
    return array, hashes, bad, sizes


def _part(parts, file, before, width, start, stop):
    """[checksum, hashes, bad, sizes] of a block that is done and whole, else None."""
    try:
        crc, hashes, bad, sizes = json.loads((parts / f"{start}.json").read_text())
        file.seek(before + start * width)
        if len(hashes) == len(sizes) == stop - start and zlib.crc32(file.read((stop - start) * width)) == crc:
            return [crc, hashes, {int(row): str(reason) for row, reason in bad.items()}, sizes]
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    return None


def _sweep(folder):
    """Removes what killed runs have left: half-written files after a day, builds that nobody went on with after a week."""
    for litter in folder.glob("*.tmp"):
        if time.time() - litter.stat().st_mtime > 86400:
            litter.unlink(missing_ok=True)
    for parts in folder.glob("*.parts"):
        if time.time() - parts.stat().st_mtime > 7 * 86400:                     # of the last block that was done
            shutil.rmtree(parts, ignore_errors=True)


def _check_room(folder, shape, share):
    """Says what a large cache will need; OSError where the disk has no room for the `share` that is still to be built."""
    need, free = int(np.prod(shape)), shutil.disk_usage(folder).free
    if need >= TOLD:
        print(f"cache: {shape[0]:,} images of {shape[-1]} px take {_gb(need)} in {folder} ({_gb(free)} free)"
              + (f"; {1 - share:.0%} are there" if share < 1 else ""), file=sys.stderr, flush=True)
    if share * need > free:
        raise OSError(28, f"{_gb(share * need)} needed, {_gb(free)} free")


def _check_memory(shape, reason):
    """DataError for an array that has no place in memory either."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):                # Windows
        return
    if np.prod(shape, dtype=np.int64) > memory / 2:
        raise DataError(f"cache folder {folder()} cannot be written ({reason}), and {_gb(np.prod(shape, dtype=np.int64))} are too much for the memory "
                        f"({_gb(memory)}); make room, name another folder by DIFFUSION_CLASSIFIERS_CACHE, or take a smaller --size or --limit")


def _gb(n):
    return f"{n / 1e9:.1f} GB"


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


def _decode_all(paths, shape, fit, workers, blocks, tick):
    """As `fill` of `remember`: zeros for what cannot be read. Decodes in threads, a block ahead, so that none idles at a block's end."""
    def decode(path):
        try:
            (pixels, size), reason = images.decode(path, shape[-1], shape[1], fit), None
        except DataError as error:
            pixels, size, reason = np.zeros(shape[1:], np.uint8), (0, 0), str(error)
        return pixels, size, hashlib.blake2b(pixels, digest_size=16).hexdigest(), reason
    pool, waiting = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in chain(blocks, [None]):
                if block:
                    waiting.append((block[0], pool.map(decode, paths[slice(*block)])))
                while waiting and (len(waiting) > 1 or not block):
                    (start, coming), found = waiting.pop(0), []
                    for picture in coming:
                        found.append(picture)
                        tick()
                    pixels, sizes, hashes, reasons = zip(*found)
                    yield start, np.stack(pixels), hashes, {start + i: reason for i, reason in enumerate(reasons) if reason}, sizes
    finally:
        pool.shutdown(cancel_futures=True)              # Ctrl-C waits for the pictures in hand, not for all
