"""The cache decodes once; groups stay on one side; load() draws, drops duplicates and refuses what cannot be learnt from."""
import dataclasses
import hashlib
import itertools
import os
import re
import shutil
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Batches, DataError, Split, aptos2019, batches, cache, chestxray14, ham10000, images, isic2019, isic2020, splits
from data.__main__ import main
from data.batches import mirrored
from data.tables import Record, read_columns, read_table
from tests.loading import noted

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_CLASSIFIERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The paths that are decoded, in a list that grows."""
    seen, real = [], images.decode
    monkeypatch.setattr(images, "decode", lambda path, *rest: seen.append(path) or real(path, *rest))
    return seen


def make_images(folder, n, size=12):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}.png" for i in range(n)]
    for path in paths:
        Image.fromarray(RNG.integers(0, 256, (size, size, 3), np.uint8)).save(path)
    return paths


# ------------------------------------------------------------------------------------------------ cache
def test_a_second_load_decodes_nothing_and_gives_the_same(tmp_path, decoded):
    paths = make_images(tmp_path / "x", 7)
    first, hashes, bad, pairs, notes = cache.load(paths, 8, 3, "crop")
    assert first.shape == (7, 3, 8, 8) and first.dtype == np.uint8 and len(set(hashes)) == 7 and not bad and not notes and pairs == [(12, 12)] * 7
    assert np.array_equal(first[3], images.read_image(paths[3], 8, 3, "crop"))
    decoded.clear()
    second, again, _, pairs_again, _ = cache.load(paths, 8, 3, "crop")
    assert not decoded and isinstance(second, np.memmap) and np.array_equal(first, second) and hashes == again and pairs == pairs_again


@pytest.mark.parametrize("options", [(9, 3, "crop"), (8, 1, "crop"), (8, 3, "squash")])
def test_other_options_are_another_cache(tmp_path, decoded, options):
    paths = make_images(tmp_path / "x", 3)
    cache.load(paths, 8, 3, "crop")
    decoded.clear()
    cache.load(paths, *options)
    assert len(decoded) == 3


def test_a_changed_file_is_decoded_again(tmp_path, decoded):
    paths = make_images(tmp_path / "x", 3)
    before = cache.load(paths, 8, 3, "crop")[0].copy()
    make_images(tmp_path / "x", 3)
    os.utime(paths[0], (1, 1))
    after = cache.load(paths, 8, 3, "crop")[0]
    assert len(decoded) == 6 and not np.array_equal(before, after)


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[-5] ^= 1
    path.write_bytes(blob)


@pytest.mark.parametrize("suffix, damage", [
    (".npy", flip), (".npy", lambda p: p.write_bytes(p.read_bytes()[:-1])), (".npy", lambda p: p.write_bytes(b"")),
    (".npy", lambda p: p.write_bytes(b"nonsense")), (".npy", lambda p: p.unlink()),
    (".npy", lambda p: np.save(p, np.zeros((3, 3, 8, 8)))), (".json", lambda p: p.write_bytes(b"\xff\xfe")),
    (".json", lambda p: p.unlink()), (".json", lambda p: p.write_text("{}")), (".json", lambda p: p.write_text("[1")),
    (".json", lambda p: p.write_text('{"crc": 1, "hashes": ["a", "b", "c"], "bad": {}}')),
    (".json", lambda p: p.write_text(p.read_text().replace('"sizes": [[12, 12], ', '"sizes": [')))])
def test_a_damaged_cache_is_built_again(tmp_path, cache_folder, decoded, suffix, damage):
    paths = make_images(tmp_path / "x", 3)
    before = np.array(cache.load(paths, 8, 3, "crop")[0])
    damage(next(cache_folder.glob("*" + suffix)))
    decoded.clear()
    assert np.array_equal(cache.load(paths, 8, 3, "crop")[0], before) and len(decoded) == 3
    cache.load(paths, 8, 3, "crop")
    assert len(decoded) == 3


def test_a_cache_that_cannot_be_written_is_held_in_memory_with_a_note(tmp_path, monkeypatch):
    paths = make_images(tmp_path / "x", 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFUSION_CLASSIFIERS_CACHE", str(tmp_path / "file" / "cache"))     # fails for root too
    array, hashes, bad, pairs, notes = cache.load(paths, 8, 3, "crop")
    assert array.shape == (3, 3, 8, 8) and len(hashes) == len(pairs) == 3 and "memory" in notes[0] and str(tmp_path / "file") in notes[0]


def test_a_full_disk_is_no_end_and_leaves_no_litter(tmp_path, cache_folder, monkeypatch):
    paths = make_images(tmp_path / "x", 3)
    monkeypatch.setattr(cache.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    array, *_, notes = cache.load(paths, 8, 3, "crop")
    assert np.array_equal(array[0], images.read_image(paths[0], 8, 3)) and "No space left" in notes[0]
    assert list(cache_folder.iterdir()) == []


@pytest.mark.parametrize("when", [0, 7, 10, 45, 99])
def test_after_ctrl_c_the_next_load_goes_on(tmp_path, cache_folder, monkeypatch, when):
    monkeypatch.setattr(cache, "ROWS", 10)
    paths, seen, real = make_images(tmp_path / "x", 100), [], images.decode

    def decode(path, *rest):
        seen.append(path)
        if len(seen) == when + 1:
            raise KeyboardInterrupt
        return real(path, *rest)
    monkeypatch.setattr(images, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        cache.load(paths, 8, 3, "crop", workers=1)
    (parts,) = cache_folder.iterdir()
    kept = len(list(parts.glob("*.json")))
    assert len(seen) <= when + 20 and max(0, when // 10 - 2) <= kept <= when // 10
    seen[:] = [None] * 1000                                                     # no interruption any more
    array, hashes, bad, sizes, notes = cache.load(paths, 8, 3, "crop")
    assert len(seen) == 1000 + 100 - 10 * kept and len(set(seen[1000:])) == 100 - 10 * kept and not bad and not notes
    assert all(np.array_equal(image, real(path, 8, 3, "crop")[0]) for image, path in zip(array, paths))
    assert len(set(hashes)) == len(sizes) == 100 and {p.suffix for p in cache_folder.iterdir()} == {".npy", ".json"}
    assert cache.load(paths, 8, 3, "crop")[1:] == (hashes, bad, sizes, []) and len(seen) == 1100 - 10 * kept


def part(cache_folder):
    (parts,) = cache_folder.glob("*.parts")
    return next(parts.glob("[0-9]*.json"))


@pytest.mark.parametrize("damage", [
    lambda folder: part(folder).write_text("{"), lambda folder: part(folder).write_text("[1, 2, 3, 4]"), lambda folder: part(folder).write_bytes(b"\xff"),
    lambda folder: part(folder).write_text('{"crc": 1}'), lambda folder: part(folder).unlink(), lambda folder: flip(part(folder))])
def test_a_damaged_block_of_an_interrupted_build_is_decoded_again(tmp_path, cache_folder, monkeypatch, decoded, damage):
    interrupted(tmp_path, cache_folder, monkeypatch)
    kept = len(list(cache_folder.glob("*.parts/*.json")))
    damage(cache_folder)
    decoded.clear()
    array, *_ = cache.load(sorted((tmp_path / "x").iterdir()), 8, 3, "crop")
    assert len(decoded) == 100 - 10 * (kept - 1)
    assert all(np.array_equal(image, images.read_image(path, 8, 3)) for image, path in zip(array, sorted((tmp_path / "x").iterdir())))


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:2000]),
                                    lambda p: p.write_bytes(bytes(p.stat().st_size))])
def test_a_damaged_array_of_an_interrupted_build_is_filled_again(tmp_path, cache_folder, monkeypatch, damage):
    interrupted(tmp_path, cache_folder, monkeypatch)
    damage(next(cache_folder.glob("*.parts/array.npy")))
    array, *_ = cache.load(sorted((tmp_path / "x").iterdir()), 8, 3, "crop")
    assert all(np.array_equal(image, images.read_image(path, 8, 3)) for image, path in zip(array, sorted((tmp_path / "x").iterdir())))


def interrupted(tmp_path, cache_folder, monkeypatch):
    """A build of 100 images that was stopped when about half were done."""
    monkeypatch.setattr(cache, "ROWS", 10)
    paths = make_images(tmp_path / "x", 100)
    with monkeypatch.context() as m:
        written, real = [], cache.os.fsync

        def fsync(handle):
            written.append(1)
            if len(written) > 10:                                               # twice a block: its pixels, its facts
                raise KeyboardInterrupt
            real(handle)
        m.setattr(cache.os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            cache.load(paths, 8, 3, "crop")


def slow_child(paths, out):
    """A process that loads, 2 ms an image, and writes how many images it decoded and the checksum of what it got."""
    if child := os.fork():
        return child
    status = 1
    try:
        seen, real = [], images.decode
        images.decode = lambda path, *rest: seen.append(time.sleep(.002)) or real(path, *rest)
        array, *_ = cache.load(paths, 8, 3, "crop", workers=1)
        out.write_text(f"{len(seen)} {zlib.crc32(np.ascontiguousarray(array))}")
        status = 0
    finally:
        os._exit(status)


def test_after_a_kill_the_next_load_goes_on(tmp_path, cache_folder, monkeypatch, decoded):
    monkeypatch.setattr(cache, "ROWS", 10)
    paths = make_images(tmp_path / "x", 300)
    child = slow_child(paths, tmp_path / "out")
    while len(list(cache_folder.glob("*.parts/*.json"))) < 3:
        time.sleep(.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kept = len(list(cache_folder.glob("*.parts/*.json")))
    decoded.clear()
    array, *_ = cache.load(paths, 8, 3, "crop")
    assert len(decoded) == 300 - 10 * kept <= 270 and not (tmp_path / "out").exists()
    assert all(np.array_equal(image, images.read_image(path, 8, 3)) for image, path in zip(array, paths))


def test_processes_build_one_cache_together(tmp_path, cache_folder, monkeypatch):
    monkeypatch.setattr(cache, "ROWS", 10)
    paths = make_images(tmp_path / "x", 300)
    outs = [tmp_path / f"out{i}" for i in range(3)]
    children = [slow_child(paths, out) for out in outs]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    counts, sums = zip(*(out.read_text().split() for out in outs))
    array, *_ = cache.load(paths, 8, 3, "crop")
    assert set(sums) == {str(zlib.crc32(np.ascontiguousarray(array)))} and 300 <= sum(map(int, counts)) < 900
    assert all(np.array_equal(image, images.read_image(path, 8, 3)) for image, path in zip(array, paths))
    assert {p.suffix for p in cache_folder.iterdir()} == {".npy", ".json"}


def test_a_cache_that_another_process_has_finished_meanwhile_is_taken(tmp_path, cache_folder, monkeypatch, decoded):
    monkeypatch.setattr(cache, "ROWS", 10)
    paths = make_images(tmp_path / "x", 100)
    real = cache._decode_all

    def slower(*of):
        for number, block in enumerate(real(*of)):
            if number == 3:
                monkeypatch.setattr(cache, "_decode_all", real)
                cache.load(paths, 8, 3, "crop")                                 # the other, who goes on with our blocks
            yield block
    monkeypatch.setattr(cache, "_decode_all", slower)
    array, hashes, bad, pairs, notes = cache.load(paths, 8, 3, "crop")
    assert not notes and isinstance(array, np.memmap) and len(decoded) <= 130 and len(hashes) == len(pairs) == 100
    assert all(np.array_equal(image, images.read_image(path, 8, 3)) for image, path in zip(array, paths))
    assert {p.suffix for p in cache_folder.iterdir()} == {".npy", ".json"}


def test_what_a_large_cache_needs_is_said_before_it_is_built(tmp_path, cache_folder, monkeypatch, capsys):
    paths = make_images(tmp_path / "x", 100)
    cache.load(paths, 8, 3, "crop")
    assert "cache:" not in capsys.readouterr().err                              # small ones go without saying
    monkeypatch.setattr(cache, "TOLD", 19200)
    monkeypatch.setattr(images, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.load(paths, 8, 3, "squash")
    assert f"cache: 100 images of 8 px take 0.0 GB in {cache_folder} (" in capsys.readouterr().err


def test_a_disk_without_room_is_told_before_the_work_and_memory_takes_over_if_it_can(tmp_path, cache_folder, monkeypatch):
    paths = make_images(tmp_path / "x", 20)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))
    array, *_, notes = cache.load(paths, 8, 3, "crop")
    assert np.array_equal(array[19], images.read_image(paths[19], 8, 3)) and "0.0 GB needed, 0.0 GB free" in notes[0]
    assert list(cache_folder.iterdir()) == []
    monkeypatch.setattr(cache.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 100}[name])
    monkeypatch.setattr(images, "decode", lambda *_: 1 / 0)                     # nothing is decoded for nothing
    with pytest.raises(DataError, match="are too much for the memory.*DIFFUSION_CLASSIFIERS_CACHE, or take a smaller --size"):
        cache.load(paths, 8, 3, "crop")


def test_a_large_set_is_built_and_gone_through_without_ever_being_in_memory(tmp_path, cache_folder, monkeypatch):
    """197 MB of pictures; what the process holds that is no file may grow by 60 MB. A copy of them is seen."""
    n, most = 16000, []

    def held():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    def decode(path, size, channels, fit):
        if int(path.stem) % 100 == 0:
            most.append(held())
        return np.full((channels, size, size), int(path.stem) % 251, np.uint8), (size, size)
    monkeypatch.setattr(images, "decode", decode)
    before = held()
    array, *_, notes = cache.load([tmp_path / f"{i}.png" for i in range(n)], 64, 3, "crop", workers=1)
    rows, grey = [], []
    for batch in Batches(Split(array, np.arange(n) % 2, list(map(str, range(n)))), 64, train=True):
        rows, grey = [*rows, *batch.index], [*grey, *batch.x.mean((1, 2, 3)).tolist()]
        most.append(held())
    assert not notes and sorted(rows) == list(range(n)) and np.allclose(grey, np.array(rows) % 251 / 127.5 - 1, atol=1e-5)
    assert max(most) - before < 60 and len(most) == 160 + 250
    whole = np.array(array)
    assert held() - before > 150 and len(whole) == n


def test_a_build_that_nobody_went_on_with_is_swept_after_a_week(tmp_path, cache_folder):
    for name, days in (("old", 8), ("new", 6)):
        (cache_folder / f"{name}.parts").mkdir(parents=True)
        (cache_folder / f"{name}.parts" / "array.npy").write_text("")
        os.utime(cache_folder / f"{name}.parts", (time.time() - days * 86400,) * 2)
    cache.load(make_images(tmp_path / "x", 2), 8, 3, "crop")
    assert [p.name for p in cache_folder.glob("*.parts")] == ["new.parts"]


def test_leftovers_of_a_killed_run_are_swept_after_a_day(tmp_path, cache_folder):
    cache_folder.mkdir()
    old, new = cache_folder / "old.tmp", cache_folder / "new.tmp"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    cache.load(make_images(tmp_path / "x", 2), 8, 3, "crop")
    assert not old.exists() and new.exists()


def test_bad_files_are_remembered_and_tried_again(tmp_path, decoded):
    paths = make_images(tmp_path / "x", 3)
    good = paths[1].read_bytes()
    paths[1].write_bytes(b"nonsense")
    array, _, bad, *_ = cache.load(paths, 8, 3, "crop")
    assert list(bad) == [1] and str(paths[1]) in bad[1] and not array[1].any()
    decoded.clear()
    assert list(cache.load(paths, 8, 3, "crop")[2]) == [1] and decoded == [paths[1]]
    paths[1].write_bytes(good)
    assert cache.load(paths, 8, 3, "crop")[2] == {}


# ------------------------------------------------------------------------------------------------ splits
def example(n=400):
    labels = RNG.integers(0, 4, n)
    return [Record(Path(f"{i}"), int(k), f"patient-{k}-{i // 3}", f"image-{i}", "all") for i, k in enumerate(labels)]


def test_no_group_is_on_two_sides_and_shares_are_as_stated():
    records = splits.assign(example(3000))
    sides = {}
    for r in records:
        sides.setdefault(r.group, set()).add(r.split)
    assert all(len(s) == 1 for s in sides.values())
    for label in range(4):
        groups = {r.group: r.split for r in records if r.label == label}
        share = [sum(s == part for s in groups.values()) / len(groups) for part in splits.SPLITS]
        assert np.allclose(share, (.6, .1, .3), atol=.01)


def test_the_split_depends_on_neither_the_order_nor_chance():
    records = example()
    shuffled = [records[i] for i in RNG.permutation(len(records))]
    assert sorted(splits.assign(records)) == sorted(splits.assign(shuffled))
    by_hash = sorted((hashlib.sha256(f"g{i}".encode()).digest(), i) for i in range(10))
    sides = splits.group_split([0] * 10, [f"g{i}" for i in range(10)])
    assert [sides[i] for _, i in by_hash] == ["test"] * 3 + ["val"] + ["train"] * 6


@pytest.mark.parametrize("n, expected", [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1)), (5, (2, 1, 2)),
                                         (10, (6, 1, 3))])
def test_a_class_of_three_groups_or_more_is_in_every_split(n, expected):
    sides = splits.group_split([0] * n, [f"g{i}" for i in range(n)])
    assert tuple(sides.count(part) for part in splits.SPLITS) == expected


def test_a_patient_with_two_classes_stays_whole():
    labels, groups = [0] * 40 + [1] * 4, [f"p{i % 20}" for i in range(44)]
    sides = splits.group_split(labels, groups)
    assert all(len({s for s, g in zip(sides, groups) if g == group}) == 1 for group in groups)
    assert {s for s, label in zip(sides, labels) if label == 1} == {"train", "val", "test"}


def test_leaks_are_counted():
    def record(group, split):
        return Record(Path("x"), 0, group, "", split)
    records = [record("a", "train"), record("a", "test"), record("a", "test"), record("b", "val"), record("b", "test"),
               record("c", "train"), record("c", "val"), record(None, "train"), record(None, "test"), record("d", "test")]
    assert splits.leaking(records) == (3, 1)
    assert splits.leaking(splits.assign(example())) == (0, 0) and splits.leaking(splits.assign(example(), by_group=False))[0] > 10


@pytest.mark.parametrize("n", [1, 4, 10, 100, 999, 1000, 5000])
def test_a_draw_is_stratified_and_has_every_class(n):
    labels = np.repeat([0, 1, 2, 3], [700, 200, 99, 1])
    rows = splits.draw(labels, n, np.random.default_rng(1))
    assert len(rows) == len(set(rows)) == min(max(n, 4), 1000) and set(labels[rows]) == {0, 1, 2, 3}
    assert np.array_equal(rows, splits.draw(labels, n, np.random.default_rng(1)))
    if n == 100:
        assert list(np.bincount(labels[rows])) in ([70, 20, 9, 1], [69, 20, 10, 1], [69, 21, 9, 1])
        assert not np.array_equal(rows, splits.draw(labels, n, np.random.default_rng(2)))


def findings(n=2000, seed=0):
    """Multi-label (n, 4): of three images in ten none, and one finding of 1 %."""
    return (np.random.default_rng(seed).random((n, 4)) < [.5, .3, .2, .01]).astype(np.float32)


def test_an_image_with_several_findings_counts_for_the_rarest():
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0]], np.float32)      # 5, 3 and 2 images
    assert splits.rarest(labels).tolist() == [0, 1, 2, -1, 2, 1] and splits.rarest([3, 1]).tolist() == [3, 1]
    assert splits.rarest(list(map(tuple, labels.astype(int)))).tolist() == [0, 1, 2, -1, 2, 1]


@pytest.mark.parametrize("n", [1, 10, 100, 2000, 3000])
def test_a_draw_of_multilabel_images_has_every_finding_and_images_without(n):
    labels = findings()
    rows = splits.draw(labels, n, np.random.default_rng(1))
    assert len(set(rows)) == min(max(n, 5), 2000) and labels[rows].any(0).all() and (~labels[rows].any(1)).any()
    if n == 100:
        assert labels[rows].mean(0) == pytest.approx(labels.mean(0), abs=.1)


def test_patients_with_several_findings_stay_whole_and_every_finding_is_on_every_side():
    labels = findings()
    records = [Record(Path("x"), tuple(map(int, y)), f"p{i // 3}", f"i{i}", "train") for i, y in enumerate(labels)]
    found = splits.assign(records)
    assert splits.leaking(found) == (0, 0)
    for part in splits.SPLITS:
        inside = np.array([r.label for r in found if r.split == part])
        assert inside.any(0).all() and inside.mean(0) == pytest.approx(labels.mean(0), abs=.06)


# ------------------------------------------------------------------------------------------------ few labels
def patients(n=2000, views=2, labels=None):
    labels = findings(n) if labels is None else labels
    return Split(np.zeros((n, 1, 1, 1), np.uint8), labels, [f"a/{i:04d}.png" for i in range(n)], [f"p{i // views}" for i in range(n)])


@pytest.mark.parametrize("labels", [findings(), np.random.default_rng(0).choice(4, 2000, p=[.6, .3, .09, .01])], ids=["multi-label", "single-label"])
def test_a_share_of_the_labels_is_by_patient_stratified_and_nested(labels):
    split = patients(labels=labels)
    kept = {share: splits.labelled(split, share) for share in (.01, .02, .1, .5, 1)}
    for share, rows in kept.items():
        assert rows.dtype == bool and share * 2000 <= rows.sum() <= share * 2000 + 2 + 5 * (share < .02)
        assert (rows.reshape(-1, 2)[:, 0] == rows.reshape(-1, 2)[:, 1]).all()                       # whole patients
        assert labels[rows].any(0).all() if labels.ndim == 2 else len(set(labels[rows])) == 4
    for small, large in zip(list(kept)[:-1], list(kept)[1:]):
        assert (kept[small] <= kept[large]).all()
    if labels.ndim == 2:
        assert labels[kept[.1]].mean(0) == pytest.approx(labels.mean(0), abs=.07)
    assert (splits.labelled(split, "0.1") == kept[.1]).all() and (splits.labelled(split, .1, seed=1) != kept[.1]).any()


def test_without_patients_a_share_is_of_images():
    split = patients()
    split.groups = None
    assert splits.labelled(split, .1).sum() == 200 and splits.labelled(split, 1e-9).sum() == 5      # one of each finding, one without


@pytest.mark.parametrize("share", [0, 1.5, "0", "1.5", "-0.1", "nan", "inf", float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(DataError, match="--labels .*: a share over 0 and up to 1"):
        splits.labelled(patients(), share)


@pytest.mark.parametrize("text", ["a/0003.png\na/0001\n", "\ufeffa/0001.png\r\na/0003.jpg", "\n a/0001\n\na/0003\na/0003.png\nv/9.png\n"])
def test_a_list_names_images_with_or_without_ending(tmp_path, text):
    (tmp_path / "names.txt").write_text(text, encoding="utf-8", newline="")
    rows = splits.labelled(patients(20), str(tmp_path / "names.txt"), elsewhere=["v/9.png"])
    assert np.flatnonzero(rows).tolist() == [1, 3]


@pytest.mark.parametrize("content, words", [
    (b"a/0001.png\nb/1.png\nb/2.png", "2 of 3 names are of no image here, first: 'b/1.png'; the first image is a/0000.png"),
    (b"", "names no image of train"), (b"v/9.png\n", "names no image of train"), (b"\xff\xfe\x00", "cannot be read"), (None, "No such file")])
def test_a_list_of_other_images_is_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        splits.labelled(patients(20), tmp_path / "names.txt", elsewhere=["v/9.png"])
    assert words in str(caught.value) and "names.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_without_ending_must_tell_one_image(tmp_path):
    split = Split(np.zeros((3, 1, 1, 1), np.uint8), np.zeros(3, np.int64), ["x.png", "x.jpg", "y.png"])
    (tmp_path / "names.txt").write_text("x.jpg\n")
    assert splits.labelled(split, tmp_path / "names.txt").tolist() == [False, True, False]
    (tmp_path / "names.txt").write_text("x\n")
    with pytest.raises(DataError, match="of no image here, first: 'x'"):
        splits.labelled(split, tmp_path / "names.txt")


def test_duplicates_are_dropped_from_train_then_from_val():
    hashes, sides = list("aabcbcd"), ["train", "test", "train", "train", "val", "val", "test"]
    assert splits.duplicates(hashes, sides) == ([0, 2, 3], [])
    assert splits.duplicates(["a", "a", "b"], ["val", "test", "train"]) == ([], [0])


# ------------------------------------------------------------------------------------------------ tables
def test_a_table_survives_bom_crlf_tabs_blanks_and_a_repeated_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf Name ,,B\r\n\r\n x ,1, y\r\nName,,B\r\n,,\r\nz,2,\r\n")
    assert read_table(path) == (["name", "b"], [(3, {"name": "x", "b": "y"}), (6, {"name": "z", "b": ""})])
    path.write_text("name\tb\nx, y\tz\n")
    assert read_table(path)[1] == [(2, {"name": "x, y", "b": "z"})]
    path.write_text('name,b\n"x\ny",z\n')
    assert read_table(path)[1] == [(3, {"name": "x y", "b": "z"})] and read_columns(path) == ["name", "b"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"a,b\n1\n", b"a,b\n1,\0\n", b"a,b\n\xff\xfe,1\n",
                                     b"a,b\n" + b'"' + b"x" * 200_000, "a,b\n1,2\n".encode("utf-16")])
def test_a_file_that_is_no_table_is_one_line(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match="t.csv") as caught:
        read_table(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [aptos2019, chestxray14, ham10000, isic2019, isic2020], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a/../../b.png", "..\\b.png", "C:\\b.png", "C:b.png", "//host/b.png", "a\0b"])
def test_no_name_in_a_table_leads_out_of_the_folder(module, name, tmp_path):
    with pytest.raises(DataError, match="line 2: .* is no image"):
        module._image_id(name, tmp_path / "table.csv", 2)


# ------------------------------------------------------------------------------------------------ load
def test_unknown_names_and_options_are_refused_with_the_known_ones(tmp_path):
    for options, words in ((dict(name="ham1000"), "ham10000"), (dict(name="toy", split="random"), "group"),
                           (dict(name="toy", size=7), "size"), (dict(name="folder", root=tmp_path, fit="pad"), "squash"),
                           (dict(name="toy", size=9), "28")):
        with pytest.raises(DataError, match=words):
            data.load(**options)


def test_the_toy_set_is_limited_with_every_class_and_keeps_its_truth():
    toy = data.load("toy", size=28, limit=12)
    for split in (toy.train, toy.val, toy.test):
        parts = (split, split.images, split.ids, split.groups, split.boxes, split.posterior)
        assert [len(part) for part in parts] == [12] * 6
        assert set(split.labels) == {0, 1, 2, 3, 4}
    only = data.load("toy", size=28, limit=12, test_only=True)
    assert only.train is None and np.array_equal(only.test.images, toy.test.images)


def test_the_toy_chests_load_with_every_option_and_keep_their_truth():
    found = data.load("toy_xray", limit=40)
    assert found.multilabel and found.classes == data.toy.FINDINGS and found.train.images.shape == (40, 1, 32, 32)
    for split in (found.train, found.val, found.test):
        assert [len(part) for part in (split, split.images, split.ids, split.groups, split.boxes, split.posterior)] == [40] * 6
        assert split.labels.any(0).all() and (~split.labels.any(1)).any() and split.boxes.shape == split.posterior.shape + (4,)
    only = data.load("toy_xray", limit=40, test_only=True, classes=data.toy.FINDINGS)
    assert only.train is None and np.array_equal(only.test.images, found.test.images)
    for options, words in ((dict(size=9), "28"), (dict(classes=["a"]), "--data toy_xray has the classes Cardiomegaly")):
        with pytest.raises(DataError, match=words):
            data.load("toy_xray", limit=5, **options)
    judged = data.load_for(Settings(data="toy_xray", size=28, limit=60, judged=20))
    assert [len(s) for s in (judged.train, judged.val, judged.test)] == [60, 20, 20] and judged.test.labels.any(0).all()
    assert data.shortcut(found) == {}


def make_folder(root, n=10, classes=("a", "b")):
    for name in classes:
        make_images(root / name, n)
    return root


def test_load_gives_aligned_views_of_the_cache(tmp_path):
    found = data.load("folder", make_folder(tmp_path / "set"), size=16)
    assert found.classes == ["a", "b"] and found.channels == 3 and not found.multilabel and found.name == "folder"
    assert [len(s) for s in (found.train, found.val, found.test)] == [12, 2, 6]
    for split in (found.train, found.val, found.test):
        assert split.labels.dtype == np.int64 and split.images.dtype == np.uint8 and isinstance(split.images, np.memmap)
        for image, label, name in zip(split.images, split.labels, split.ids):
            assert name.startswith(found.classes[label])
            assert np.array_equal(image, images.read_image(tmp_path / "set" / name, 16, 3))


def test_the_split_is_the_same_for_every_seed_and_the_limit_is_not(tmp_path):
    root = make_folder(tmp_path / "set", 30)
    one, two = data.load("folder", root, size=8, seed=1), data.load("folder", root, size=8, seed=2)
    assert one.train.ids == two.train.ids and one.test.ids == two.test.ids
    few = [data.load("folder", root, size=8, seed=s, limit=6) for s in (1, 1, 2)]
    assert few[0].train.ids == few[1].train.ids != few[2].train.ids and set(few[0].train.ids) < set(one.train.ids)
    assert [len(s) for s in (few[0].train, few[0].val, few[0].test)] == [6, 6, 6]


def test_the_limit_comes_before_decoding(tmp_path, decoded):
    data.load("folder", make_folder(tmp_path / "set", 30), size=8, limit=4)
    assert len(decoded) == 12


def test_identical_pictures_are_dropped_from_train_and_counted(tmp_path):
    root = tmp_path / "set"
    for part in ("train", "val", "test"):
        make_folder(root / part, 4)
    original = root / "test" / "a" / "000.png"
    (root / "train" / "a" / "copy.png").write_bytes(original.read_bytes())
    Image.open(original).save(root / "train" / "b" / "copy.bmp")                # other bytes, same pixels
    (root / "val" / "a" / "copy.png").write_bytes(original.read_bytes())
    found = data.load("folder", root, size=8)
    assert [len(s) for s in (found.train, found.val, found.test)] == [8, 8, 8]
    assert not any("copy" in name for name in found.train.ids + found.val.ids)
    for words in ("2 train images dropped", "1 validation images dropped"):
        assert any(words in note for note in found.notes)
    assert np.array_equal(found.train.images[5], images.read_image(root / found.train.ids[5], 8, 3))    # rows still fit their ids


def test_bad_files_stop_the_load_unless_they_are_skipped(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "a" / "000.png").write_bytes(b"")
    (root / "b" / "003.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="2 of 20 images cannot be read, first: .*--skip-bad") as caught:
        data.load("folder", root, size=8)
    assert "\n" not in str(caught.value)
    found = data.load("folder", root, size=8, skip_bad=True)
    assert sum(map(len, (found.train, found.val, found.test))) == 18 and any("2 of 20" in note for note in found.notes)
    for split in (found.train, found.val, found.test):
        assert split.images.any(axis=(1, 2, 3)).all() and len(split.images) == len(split)


def test_nothing_is_written_beside_the_users_images(tmp_path):
    root = make_folder(tmp_path / "set", 4)
    before = sorted(root.rglob("*"))
    data.load("folder", root, size=8)
    assert sorted(root.rglob("*")) == before


def test_labels_follow_the_classes_of_a_model(tmp_path):
    root = make_folder(tmp_path / "set")
    found = data.load("folder", root, size=8, classes=["b", "a"])
    assert found.classes == ["b", "a"]
    assert all(name.startswith("ba"[label]) for name, label in zip(found.test.ids, found.test.labels))
    with pytest.raises(DataError, match="class folder b is none of"):
        data.load("folder", root, size=8, classes=["a", "c"])
    only = data.load("folder", root, size=8, classes=["x", "b", "a"], test_only=True)
    assert only.train is None and only.val is None and len(only.test) == 20 and set(only.test.labels) == {1, 2}
    with pytest.raises(DataError, match="toy"):
        data.load("toy", size=28, limit=5, classes=["a", "b"])


def test_channels_may_be_given(tmp_path):
    assert data.load("folder", make_folder(tmp_path / "set", 4), size=8, channels=1).train.images.shape[1] == 1


def test_the_command_line_counts_what_is_there(tmp_path, capsys):
    root = make_folder(tmp_path / "set")
    assert main(["folder", "--root", str(root), "--size", "8", "--output", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[1:5]] == [["class", "train", "val", "test"], ["a", "6", "1", "3"],
                                                                ["b", "6", "1", "3"], ["all", "12", "2", "6"]]
    assert main(["folder", "--root", str(tmp_path / "none")]) == 2 and capsys.readouterr().err.startswith("error: ")


def cells(out, name):
    return next(line.split()[1:] for line in out.splitlines() if line.split()[:1] == [name])


def test_the_command_line_tells_groups_sizes_repeats_and_blanks(tmp_path, capsys):
    root, sheet = tmp_path / "set", tmp_path / "sheet.png"
    for part, n in (("train", 6), ("val", 2), ("test", 3)):
        make_folder(root / part, n)
    make_images(root / "train" / "c", 2, size=20)
    for part in ("val", "test"):
        make_images(root / part / "c", 1)
    train = root / "train"
    (train / "a" / "again.png").write_bytes((train / "a" / "000.png").read_bytes())
    (train / "b" / "again.png").write_bytes((train / "a" / "001.png").read_bytes())            # with another label
    (train / "b" / "gone.png").write_bytes((root / "test" / "a" / "000.png").read_bytes())
    Image.new("RGB", (12, 12), "red").save(train / "b" / "blank.png")
    (root / "groups.csv").write_text("file,group\n" + "".join(f"{p}/{c}/00{i}.png,{c}\n" for p, rows in (("train", (4, 5)), ("test", (0, 1))) for c in "ab" for i in rows) + "train/a/002.png,x\ntrain/a/003.png,x\n")
    assert main(["folder", "--root", str(root), "--size", "8", "--output", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert cells(out, "class") == ["train", "val", "test"] and cells(out, "all") == ["13", "5", "7"] and cells(out, "repeats") == ["2", "0", "0"]
    assert "12 x 12 to 20 x 20, 2 sizes; most often 12 x 12 (23 images)" in out and "1 images are blank" in out
    assert "(0 of one in another split); 1 of them have another label" in out and "1 train images dropped" in out
    assert cells(out, "groups") == ["12", "unknown", "5"] and "groups are patients or lesions: 0 of them on two sides" in out and "4 images left out: their patient" in out
    assert main(["folder", "--root", str(root), "--size", "8", "--split", "group", "--output", str(sheet)]) == 0
    assert "groups are patients or lesions: 0 of them on two sides" in capsys.readouterr().out


def test_the_contact_sheet_shows_training_images_of_each_class(tmp_path, capsys):
    root, sheet = tmp_path / "set", tmp_path / "sheet.png"
    for name, colour in (("a", (255, 0, 0)), ("\u6bd2 b", (0, 255, 0))):         # a name that the font has not
        (root / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (9, 9), colour).save(root / name / f"{'long-' * 20}{i}.png")
            Image.new("RGB", (9, 9), (*colour[:2], i + 1)).save(root / name / f"{'long-' * 20}{i}.png")
    assert main(["folder", "--root", str(root), "--size", "8", "--output", str(sheet)]) == 0 and f"contact sheet: {sheet}" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.size == (150 + 8 * 118 + 6, 6 + 2 * 132)
        pixels = np.asarray(image.convert("RGB"))
    for row, channel in ((0, 0), (1, 1)):
        for k in range(8):
            tile = pixels[6 + 132 * row:][:112, 150 + 118 * k:][:, :112]
            assert (tile[..., channel] == 255).all() and (tile[..., 1 - channel] == 0).all()
        assert (pixels[6 + 132 * row:][:112, :150] < 128).any()                 # its name
    assert not any((root / name).name == "sheet.png" for name in root.iterdir())


def test_a_sheet_that_cannot_be_written_and_data_that_cannot_be_loaded_are_one_line(tmp_path, capsys):
    root = make_folder(tmp_path / "set")
    for words in (["--root", str(root), "--output", str(tmp_path / "none" / "sheet.png")], ["--root", str(tmp_path / "none")], ["--root", str(root), "--size", "1"], ["--root", str(root), "--seed", "-1"]):
        assert main(["folder", "--size", "8", *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_the_sheet_of_a_multilabel_set_has_a_row_without_a_finding(tmp_path):
    found = data.load("toy_xray", limit=40)
    data.report.contact_sheet(found, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[1] == 6 + 132 * (len(found.classes) + 1)
    within, between, other_label = data.report.repeats(found)
    assert within == dict(train=0, val=0, test=0) and between == other_label == 0 and data.report.sizes(found) == "32 x 32 (all)"


# ------------------------------------------------------------------------------------------------ as a method asks
class Settings:
    """What `load_for` and `read_split` read of a method's settings."""
    data, root, size, seed, split, fit, limit, skip_bad, few_augment = "folder", "", 8, 0, "official", "crop", 0, False, ""

    def __init__(self, **given):
        vars(self).update(given)


def test_load_for_hands_every_setting_on(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load", lambda *args, **options: seen.append((args, options)))
    given = dict(data="d", root="r", size=9, seed=3, split="group", fit="squash", limit=5, skip_bad=True)
    data.load_for(Settings(**given))
    data.load_for(Settings(**given | dict(root="")), dict(classes=["b", "a"], channels=1, own_data=False, multilabel=False))
    options = dict(split="group", fit="squash", limit=5, skip_bad=True, several=False)       # a method that has --labels takes several
    assert seen == [(("d", "r", 9, 3), options), (("d", None, 9, 3), options | dict(test_only=True, classes=["b", "a"], channels=1))]


def test_a_model_gets_its_own_data_as_it_knows_them(tmp_path):
    settings = Settings(root=str(make_folder(tmp_path / "set")))
    new = data.load_for(settings)
    facts = dict(classes=new.classes, channels=new.channels, own_data=True)
    again = data.load_for(settings, facts)
    assert again.classes == new.classes == ["a", "b"] and again.test.ids == new.test.ids and np.array_equal(again.train.images, new.train.images)
    gray = data.load_for(settings, facts | dict(classes=["b", "a"], channels=1))
    assert gray.classes == ["b", "a"] and gray.test.images.shape[1] == 1 and gray.test.ids == new.test.ids
    assert (gray.test.labels == 1 - new.test.labels).all()


def test_of_another_data_set_a_model_gets_the_test_split_alone(tmp_path):
    root = make_folder(tmp_path / "set")
    found = data.load_for(Settings(root=str(root)), dict(classes=["a", "b", "c"], channels=3, own_data=False))
    assert found.train is None and found.val is None and len(found.test) == 20 and found.classes == ["a", "b", "c"]
    toy = data.load_for(Settings(data="toy", size=28, limit=12), dict(classes=data.toy.CLASSES, channels=3, own_data=False))
    assert toy.train is None and len(toy.test) == 12


@pytest.mark.parametrize("labels", ["0.3", "1e-9", "1"])
@pytest.mark.parametrize("name", ["toy", "toy_xray"])
def test_the_labels_of_whole_patients_are_hidden_in_train_alone(name, labels):
    settings = Settings(data=name, size=28, limit=100, seed=2)
    whole, found = data.load_for(settings), data.load_for(Settings(**vars(settings), labels=labels, labelled_batch=6))
    shown = splits.labelled(whole.train, labels, 2)
    (rows, n), train = found.train.few, found.train
    assert np.array_equal(rows, np.flatnonzero(shown)) and n == 6 and train.labels.dtype == whole.train.labels.dtype
    assert np.array_equal(train.labels[shown], whole.train.labels[shown]) and (train.labels[~shown] == -1).all()
    of = [{g for g, known in zip(train.groups, shown) if known == side} for side in (True, False)]
    assert not of[0] & of[1] and len(of[0] | of[1]) < 100                       # lesions or patients, of which some have two images
    assert splits.labelled(dataclasses.replace(whole.train, groups=None), "0.3", 2).tolist() != splits.labelled(whole.train, "0.3", 2).tolist()
    for key in ("images", "ids", "groups", "boxes", "posterior"):
        assert np.array_equal(getattr(train, key), getattr(whole.train, key))
    for part in ("val", "test"):
        ours, theirs = getattr(found, part), getattr(whole, part)
        assert np.array_equal(ours.labels, theirs.labels) and ours.ids == theirs.ids and ours.few is None and (ours.labels >= 0).all()
    note = f"--labels {labels}: {len(rows)} of 100 training images keep their label; the others are seen without it"
    assert found.notes == [*whole.notes, note] and whole.train.few is None
    assert {"0.3": range(30, 33), "1e-9": range(4, 9), "1": [100]}[labels].count(len(rows))
    (batch, *_) = Batches(train, 20, train=True)
    assert len(batch.y) == 20 and len(batch.few.y) == 6 and (batch.few.y >= 0).all()


def test_a_file_names_the_images_that_keep_their_label(tmp_path, monkeypatch):
    root, names = make_folder(tmp_path / "set", 30), tmp_path / "names.txt"
    whole = data.load_for(Settings(root=str(root)))
    before = whole.train.labels.copy()
    names.write_text("\n".join([*whole.train.ids[3:12:2], *whole.val.ids, whole.test.ids[0][:-4], *whole.test.ids[1:]]))
    given = dict(root=str(root), labels=str(names), labelled_batch=2)
    for more in ({}, dict(judged=2)):                                           # of validation and test some, or all
        found = data.load_for(Settings(**given, **more))
        assert found.train.few[0].tolist() == np.flatnonzero(found.train.labels >= 0).tolist() == [3, 5, 7, 9, 11] and found.train.few[1] == 2
        assert np.array_equal(found.train.labels[3:12:2], before[3:12:2]) and noted(found, f"--labels {names}: 5 of 36 training images keep their label")
        assert [len(s) for s in (found.val, found.test)] == ([2, 2] if more else [6, 18]) and (found.test.labels >= 0).all()
    train = whole.train
    monkeypatch.setattr(data, "load", lambda *_, **__: whole)
    assert (data.load_for(Settings(**given)).train.labels == -1).sum() == 31
    assert np.array_equal(train.labels, before) and train.few is None           # no array of the loader's is changed
    names.write_text("a/nobody.png\n")
    with pytest.raises(DataError, match="a/nobody.png"):
        data.load_for(Settings(**given))


def test_of_another_data_set_no_label_is_hidden(tmp_path):
    root = make_folder(tmp_path / "set")
    given, facts = dict(root=str(root), labels=str(tmp_path / "gone.txt"), labelled_batch=2), dict(classes=["a", "b"], channels=3)
    plain = data.load_for(Settings(root=str(root)), facts | dict(own_data=False))
    found = data.load_for(Settings(**given), facts | dict(own_data=False))      # its list is not even read
    assert found.train is None and found.val is None and len(found.test) == 20 and found.notes == plain.notes
    assert np.array_equal(found.test.labels, plain.test.labels) and found.test.few is None
    with pytest.raises(DataError, match="gone.txt"):
        data.load_for(Settings(**given))
    own = data.load_for(Settings(**given), facts | dict(own_data=True))         # a trained model is scored without it
    assert own.train is None and 0 < len(own.test) < 20 and data.shortcut(own) == {}
    new, again = (data.load_for(Settings(**given | dict(labels="0.5")), known) for known in (None, facts | dict(own_data=True)))
    assert np.array_equal(new.train.labels, again.train.labels) and (new.train.labels == -1).sum() == 6 and noted(again, "--labels 0.5: 6 of 12")


def test_pictures_of_28_pixels_are_given_the_border_that_a_model_was_trained_with(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    split, _ = data.read_split([tmp_path / "a.png"], Settings(size=32), dict(channels=3, classes=["a"], border=2))
    assert np.array_equal(split.images[0], data.medmnist.fitted(pixels, 32, 3))


def test_a_method_of_one_label_refuses_several_before_anything_is_decoded(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    (tmp_path / "set" / "findings.csv").write_text("file,Mass\n" + "".join(f"{p.relative_to(tmp_path / 'set').as_posix()},{i % 2}\n" for i, p in
                                                                           enumerate(sorted((tmp_path / "set").rglob("*.png")))))
    monkeypatch.setattr(data.cache, "load", lambda *a: pytest.fail("decoded"))
    with pytest.raises(DataError, match="--data folder: has several labels an image, this method takes one; .* mediffusion.py"):
        data.load("folder", tmp_path / "set", several=False)
    with pytest.raises(DataError, match="several labels"):
        data.load("chestmnist", tmp_path, several=False)


def test_a_users_files_are_a_split_without_labels(tmp_path):
    paths = make_images(tmp_path / "x", 3)
    (lone,) = make_images(tmp_path / "y", 1)
    split, problems = data.read_split([tmp_path / "x", lone], Settings(), dict(channels=3, classes=["a"]))
    assert problems == [] and split.ids == [str(p) for p in (*paths, lone)] and split.labels.tolist() == [-1] * 4 and split.groups is None
    assert split.images.shape == (4, 3, 8, 8) and all(np.array_equal(a, images.read_image(p, 8, 3, "crop")) for a, p in zip(split.images, split.ids))
    gray, _ = data.read_split([lone], Settings(size=10, fit="squash"), dict(channels=1))
    assert gray.images.shape == (1, 1, 10, 10)
    batch = next(iter(data.Batches(split, 4)))                                  # and can be evaluated
    assert batch.x.shape == (4, 3, 8, 8) and batch.y.tolist() == [-1] * 4


def test_a_file_of_a_user_that_cannot_be_read_is_an_error_or_a_problem(tmp_path):
    paths = make_images(tmp_path / "x", 3)
    paths[1].write_bytes(b"nonsense")
    with pytest.raises(DataError, match="001.png"):
        data.read_split([tmp_path / "x"], Settings(), dict(channels=3))
    split, problems = data.read_split([tmp_path / "x"], Settings(skip_bad=True), dict(channels=3))
    assert split.ids == [str(paths[0]), str(paths[2])] and len(problems) == 1 and "001.png" in problems[0] and len(split) == len(split.images) == 2


def test_a_users_files_have_unknown_labels_of_the_models_kind(tmp_path):
    paths = make_images(tmp_path / "x", 3)
    facts = dict(channels=1, classes=["a", "b"])
    assert data.read_split(paths, Settings(), facts | dict(multilabel=True))[0].labels.tolist() == [[-1, -1]] * 3
    assert data.read_split(paths, Settings(), facts | dict(multilabel=False))[0].labels.tolist() == [-1] * 3


@pytest.mark.parametrize("images", [np.zeros((2, 1, 8, 8), np.float32), np.zeros((2, 8, 8), np.uint8), np.zeros((3, 1, 8, 8), np.uint8)])
def test_images_that_are_no_bytes_or_of_another_number_than_their_labels_are_refused(images):
    with pytest.raises(DataError, match=f"type {images.dtype} and shape .* with 2 labels"):
        Split(images, np.zeros(2, np.int64), ["a", "b"])


def test_bytes_become_floats_from_exactly_minus_one_to_exactly_one():
    split = Split(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(2, 0), np.zeros(2, np.int64), ["a", "b"])
    (whole,), (turned,) = Batches(split, 2), Batches(split, 2, train=True, augment=("hflip", "rotate"))
    assert whole.x.min() == -1 and whole.x.max() == 1 and torch.allclose(whole.x[0].flatten(), torch.arange(256) / 127.5 - 1, atol=1e-6)
    assert -1 <= turned.x.min() and turned.x.max() <= 1


def test_images_augmented_a_few_at_a_time_are_those_augmented_together():
    made = np.random.default_rng(0).integers(0, 256, (20, 3, 224, 224), np.uint8)
    (part,) = Batches(Split(made, np.zeros(20, np.int64), list(map(str, range(20)))), 20, train=True, augment=("hflip", "rotate"))
    flip, angle = batches.draw_changes(("hflip", "rotate"), 20, np.random.default_rng([0, 2, 0, 0, 0]))
    assert torch.allclose(part.x, batches.finish(torch.from_numpy(made[part.index]), flip, angle), atol=1e-5)


@pytest.mark.parametrize("free, held", [(10 ** 6, True), (10 ** 4, False)])
def test_images_lie_on_the_gpu_where_they_fit_and_are_streamed_by_pinned_copies_where_not(tmp_path, monkeypatch, free, held):
    """A GPU is played by this machine: 20 images of 3 x 16 x 16 pixels against 40 % of its free memory."""
    np.save(tmp_path / "images.npy", RNG.integers(0, 256, (20, 3, 16, 16), np.uint8))
    split, pinned, to = Split(np.load(tmp_path / "images.npy", mmap_mode="r"), np.arange(20) % 3, [str(i) for i in range(20)]), [], torch.Tensor.to
    expected = [batch.x for batch in Batches(split, 8, train=True)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **given: x if str(device) == "cuda" else to(x, device, **given))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(len(x)) or x)
    for _ in range(2):
        batches = Batches(split, 8, "cuda", train=True)
        assert torch.is_tensor(batches.images) == held and all(map(torch.equal, [batch.x for batch in batches], expected))
    assert sum(pinned) == (0 if held else 40) and hasattr(split, "_on_device") == held


# ------------------------------------------------------------------------------------------------ batches of few labels
FLIPS = ("hflip", "vflip")


def partly(few, joining, n=50, multilabel=False, classes=3):
    """n images of noise, 6 x 9, of which as many have a label as `few` says, here and there; `joining` of them join each batch."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(n)[:few])
    labels = np.full((n, classes), -1, np.float32) if multilabel else np.full(n, -1)
    labels[rows] = rng.random((few, classes)) < [.6, .3, .1] if multilabel else np.arange(few) % classes
    return Split(rng.integers(0, 256, (n, 3, 6, 9), np.uint8), labels, [f"{i:03d}" for i in range(n)], few=(rows, joining))


def same(one, other):
    """Whether two batches are the same, with what joins them."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and np.array_equal(one.index, other.index) and \
        np.array_equal(one.variant, other.variant) and one.place == other.place and same(one.few, other.few)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("few, joining", [(7, 4), (7, 20), (40, 2), (28, 4), (1, 3), (50, 8)])
def test_to_each_batch_belong_labelled_images_all_of_them_in_turn(few, joining, multilabel):
    split, orders = partly(few, joining, multilabel=multilabel), []
    for epoch in range(3):
        found = list(Batches(split, 8, train=True, seed=1, start=7 * epoch))
        assert [b.place for b in found] == [b.few.place for b in found] == [(epoch, number, 7) for number in range(7)]
        assert all(len(b.few.y) == len(b.few.x) == len(b.few.index) == len(b.few.variant) == joining and b.few.few is None for b in found)
        assert np.sort(np.concatenate([b.index for b in found])).tolist() == list(range(50)) and {len(b.y) for b in found} == {7, 8}
        order = np.concatenate([b.few.index for b in found])
        rounds = [order[i:i + few] for i in range(0, len(order), few)]
        assert all(np.array_equal(np.sort(part), split.few[0]) for part in rounds[:7 * joining // few])
        assert len(set(rounds[-1])) == len(rounds[-1]) and set(order) <= set(split.few[0])
        orders += [part.tolist() for part in rounds if len(part) == few] or [order.tolist()]
    assert few == 1 or len(set(map(tuple, orders))) == len(orders)              # each round in an order of its own


@pytest.mark.parametrize("augment", [(), FLIPS])
def test_labelled_images_may_be_augmented_in_a_way_that_the_others_are_not(augment):
    split = partly(20, 6)
    more = dataclasses.replace(split, few=(*split.few, "rotate"))
    for plain, turned in zip(Batches(split, 8, train=True, augment=augment), Batches(more, 8, train=True, augment=augment), strict=True):
        assert same(plain._replace(few=None), turned._replace(few=None)) and (turned.variant >= 0).all()
        assert np.array_equal(plain.few.index, turned.few.index) and (turned.few.variant == -1).all() and (plain.few.variant >= 0).all()
        assert not any(map(torch.equal, plain.few.x, turned.few.x))
        assert augment or torch.allclose(plain.few.x, torch.from_numpy(split.images[plain.few.index]).float() / 127.5 - 1, atol=1e-6)


def test_the_strong_view_is_another_picture_in_the_same_range_and_repeatable():
    x = torch.rand(16, 3, 32, 32) * 2 - 1
    one, again = (batches.strong(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again) and one.shape == x.shape and one.min() >= -1 and one.max() <= 1
    assert ((one - x).abs().mean((1, 2, 3)) > .1).all() and len({tuple(image.flatten().tolist()) for image in one}) == 16
    assert torch.equal(x, x.clamp(-1, 1))


def test_half_of_the_images_become_strong_views_and_no_batch_depends_on_another():
    split = partly(40, 10)
    plain, strong = (list(Batches(split, 20, train=True, augment=augment)) for augment in (FLIPS, (*FLIPS, "strong")))
    shown = np.concatenate([[torch.equal(a, b) for a, b in zip(p.x, s.x)] for p, s in zip(plain, strong)])
    assert np.array_equal(shown, np.concatenate([s.variant for s in strong]) >= 0) and 10 <= shown.sum() <= 30
    assert all(s.x.min() >= -1 and s.x.max() <= 1 and np.array_equal(p.index, s.index) for p, s in zip(plain, strong))
    assert same(strong[1], next(iter(Batches(split, 20, train=True, augment=(*FLIPS, "strong"), start=1))))
    few = [b.few for b in Batches(dataclasses.replace(split, few=(*split.few, "strong")), 20, train=True, augment=FLIPS)]
    assert {v for f in few for v in f.variant} > {-1} and all(same(p._replace(few=None), s._replace(few=None)) for p, s in zip(plain, Batches(
        dataclasses.replace(split, few=(*split.few, "strong")), 20, train=True, augment=FLIPS)))
    with pytest.raises(DataError, match="--few-augment strongly: choose from hflip, vflip, rotate, strong"):
        Batches(dataclasses.replace(split, few=(*split.few, "strongly")), 20, train=True)


@pytest.mark.parametrize("augment, ways", [("", 1), ("rotate", 1), ("hflip", 2), ("vflip,rotate", 2), ("hflip,vflip", 4)])
def test_mirror_images_are_those_that_training_may_have_shown(augment, ways):
    x = torch.rand(2, 3, 4, 5)
    views = mirrored(x, augment)
    assert len(views) == ways and torch.equal(views[0], x) and len({view.numpy().tobytes() for view in views}) == ways
    shown = [batches.augment(x, np.array([flip] * 2), np.zeros(2)) for flip in itertools.product((-1, 1), repeat=2)]
    assert all(any(torch.equal(view, of) for of in shown) for view in views)
    assert all(torch.equal(view, x.flip(3 if augment == "hflip" else 2)) for view in views[1:] if ways == 2)


def test_without_few_and_where_a_split_is_judged_nothing_joins():
    split = partly(7, 4)
    plain = dataclasses.replace(split, few=None)
    for options in (dict(), dict(augment=(*FLIPS, "rotate")), dict(rank=1, world=2)):
        for joined, alone in zip(Batches(split, 8, train=True, **options), Batches(plain, 8, train=True, **options), strict=True):
            assert alone.few is None and joined.few is not None and same(joined._replace(few=None), alone)      # the main stream is as ever
        judged, rows = list(Batches(split, 8, **options)), np.arange(options.get("rank", 0), 50, options.get("world", 1))
        assert all(b.few is None for b in judged) and np.array_equal(np.concatenate([b.index for b in judged]), rows)
        assert [b.place for b in judged] == [(0, number, len(judged)) for number in range(len(judged))]
    assert split.take(np.arange(20)).few is None                                # rows of the whole are none of a part


@pytest.mark.parametrize("options", [dict(), dict(balanced=True), dict(augment=(*FLIPS, "rotate")), dict(balanced=True, augment=FLIPS, rank=1, world=2)])
def test_a_run_that_goes_on_sees_the_same_labelled_images(options):
    split = partly(7, 4)

    def batches_from(start, seed=3):
        return list(Batches(split, 8, train=True, seed=seed, start=start, **options))
    whole = batches_from(0) + batches_from(7)
    assert len(whole) == 14
    for start in range(14):
        rest = batches_from(start)
        assert len(rest) == 7 - start % 7 and all(map(same, rest, whole[start:]))
    for other in (whole[7:], batches_from(0, seed=4)):                          # another epoch, another seed
        assert [b.few.index.tolist() for b in whole[:7]] != [b.few.index.tolist() for b in other]
        assert "augment" not in options or not any(torch.equal(b.few.x, o.few.x) for b, o in zip(whole, other))
        assert "rank" not in options or [b.few.variant.tolist() for b in whole[:7]] != [b.few.variant.tolist() for b in other]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_several_processes_join_to_the_labelled_images_of_one(world, balanced):
    split = partly(20, 7)
    alone = list(Batches(split, 8, train=True, balanced=balanced))
    shares = [list(Batches(split, 8, train=True, balanced=balanced, rank=rank, world=world)) for rank in range(world)]
    for whole, *parts in zip(alone, *shares, strict=True):
        for rank, part in enumerate(parts):
            for one, other in ((part, whole), (part.few, whole.few)):
                assert all(np.array_equal(getattr(one, key), getattr(other, key)[rank::world]) for key in ("index", "x", "y"))
        assert sum(len(part.few.y) for part in parts) == 7 and whole.place == parts[-1].place
    split.few = split.few[0], 6                                                 # as many for each
    turned = [[b.few.variant.tolist() for b in Batches(split, 8, train=True, augment=FLIPS, rank=rank, world=world)] for rank in range(world)]
    assert turned[0] != turned[1]                                               # each augments on its own


@pytest.mark.parametrize("multilabel", [False, True])
def test_balanced_speaks_of_the_labelled_images(multilabel):
    split = partly(25, 6, multilabel=multilabel)
    rows = split.few[0]
    if not multilabel:
        split.labels[rows] = np.repeat([0, 1, 2], [20, 4, 1])
    else:
        assert (~split.labels[rows].any(1)).any() and split.labels[rows].any(0).all()               # no finding is a kind of its own
    drawn, plain = [], list(Batches(split, 8, train=True, seed=1))
    for epoch in range(60):
        found = list(Batches(split, 8, train=True, seed=1, balanced=True, start=7 * epoch))
        assert np.sort(np.concatenate([b.index for b in found])).tolist() == list(range(50)) and all(len(b.few.y) == 6 for b in found)
        assert epoch or all(np.array_equal(b.index, p.index) for b, p in zip(found, plain))         # the main stream is that without
        drawn += [i for b in found for i in b.few.index]
    kinds = splits.rarest(split.labels[rows])
    share = [np.isin(drawn, rows[kinds == kind]).mean() for kind in np.unique(kinds)]
    assert set(drawn) == set(rows) and np.allclose(share, 1 / len(share), atol=.04) and len(share) == 3 + multilabel
    of_plain = [np.isin(np.concatenate([b.few.index for b in plain]), rows[kinds == kind]).mean() for kind in np.unique(kinds)]
    assert np.allclose(of_plain, [np.mean(kinds == kind) for kind in np.unique(kinds)], atol=.08)   # unless asked, as they are


@pytest.mark.parametrize("size, joining, asked, parts", [(10, 10, 3, 3), (10, 10, 1, 1), (10, 4, 5, 2), (4, 10, 5, 2), (10, 7, 3, 3), (10, 3, 2, 1),
                                                        (10, 2, 4, 1), (10, 1, 4, 1), (2, 2, 9, 1), (10, 10, 99, 5)])
def test_a_batch_is_split_into_as_many_parts_of_both(size, joining, asked, parts):
    batch = list(Batches(partly(20, joining), size, train=True, augment=FLIPS))[1]
    assert len(batch.y) == size
    found = batch.split(asked)
    assert len(found) == parts and all(part.few.few is None for part in found)
    for whole, some in ((batch, found), (batch.few, [part.few for part in found])):
        for key in ("x", "y", "index", "variant"):
            assert np.array_equal(np.concatenate([getattr(p, key) for p in some]), getattr(whole, key))
            assert all(len(getattr(p, key)) == len(p.y) >= min(2, len(whole.y)) for p in some)
        assert all(p.place == batch.place == (0, 1, -(-50 // size)) for p in some)
    alone = batch._replace(few=None, variant=None).split(asked)
    assert len(alone) == max(1, min(asked, size // 2)) and all(part.few is None and part.variant is None and part.place == batch.place for part in alone)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("names", [(), ("hflip",), ("vflip",), FLIPS])
def test_the_labelled_images_are_those_of_the_split_each_turned_as_its_variant_says(names, multilabel):
    split, seen = partly(20, 8, multilabel=multilabel), []
    for epoch in range(2):
        found = list(Batches(split, 8, train=True, seed=2, augment=names, start=7 * epoch))
        for batch in (part for b in found for part in (b, b.few)):
            assert batch.x.dtype == torch.float32 and torch.equal(batch.y, torch.from_numpy(split.labels[batch.index]))
            for x, row, variant in zip(batch.x, batch.index, batch.variant):
                image = split.images[row][:, ::-1 if variant & 2 else 1, ::-1 if variant & 1 else 1]
                assert np.allclose(x, image / 127.5 - 1, atol=1e-6)
        assert all((b.few.y >= 0).all() for b in found) and any((b.y == -1).any() for b in found)   # the main stream has both, without telling
        seen += [v for b in found for v in b.few.variant.tolist()]
        assert not names or any(b.few.variant.tolist() != b.variant.tolist() for b in found if len(b.y) == 8)
        assert not names or all(.3 < np.mean([v & bit > 0 for v in seen]) < .7 for bit, name in ((1, "hflip"), (2, "vflip")) if name in names)
    assert set(seen) == {a + b for a in (0, 1) if a == 0 or "hflip" in names for b in (0, 2) if b == 0 or "vflip" in names}


def test_the_labelled_images_are_turned_by_numbers_of_their_own():
    split, names = partly(20, 8), (*FLIPS, "rotate")
    for number, batch in enumerate(Batches(split, 8, train=True, seed=2, augment=names, start=7)):
        flip, angle = batches.draw_changes(names, 8, np.random.default_rng([2, 7, 1, number, 0]))
        assert torch.allclose(batch.few.x, batches.finish(torch.from_numpy(split.images[batch.few.index]), flip, angle), atol=1e-5)
        assert (batch.few.variant == -1).all() and not torch.allclose(batch.few.x, torch.from_numpy(split.images[batch.few.index]) / 127.5 - 1, atol=.1)
