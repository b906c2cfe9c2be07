"""Damaged and malicious files through the command lines of all four methods: a run, or one line that names the file.

Each command is a fork of this process, for a fresh one costs seconds, and ends where the file is read and what it is for stands. What is done to
file n of a kind comes from (SEED, kind, n): `damage(whole, kind, n)` does it again; and a file that ended otherwise is kept. The malicious
weight files are made in test_run.py, where single flipped bits are too.
"""
import functools
import itertools
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import data
import diffclassifier
import diffmic
import mediffusion
import symmflow
from common import run
from common.autoencoder import Codec
from common.resnet import ResNet
from tests import test_aptos2019, test_chestxray14, test_chexpert, test_folder, test_ham10000, test_isic2019, test_isic2020, test_medmnist
from tests.test_images import png_bomb
from tests.test_run import malicious, write_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 0
KINDS = ("jpeg", "png", "npz", "csv", "checkpoint", "weights")
TINY = {diffmic: dict(pretrain_epochs=1, guide_depth=18, hidden=16, rois=2, steps=2, timesteps=40),
        symmflow: dict(channels=8, mult="1,1,1", attention="8", head_channels=8),
        diffclassifier: dict(channels=8, mult="1,1,1", attention="4", head_channels=8, wavelet=False),
        mediffusion: dict(pretrain_epochs=1, ae_width=8, ae_mult="1,2", ae_blocks=1, ae_latent=2, gan_weight=0., channels=8, mult="1,2", attention="2",
                          head_channels=8, hidden=16, timesteps=50)}
TOKENS = (b'"', b",", b"\n", b"\r", b"\t", b"\0", b"-1", b"1e999", b"nan", b"9" * 20, b"../", b"/", b"[", b"{", b"\xff", b"\xc3\xa9")
comments = functools.cache(run.field_comments)                          # 20 ms, which every fork would spend anew


class Case(NamedTuple):
    method: object
    path: Path                          # the file that is damaged
    argv: list
    instead: list                       # [(owner, name, what a fork has in its place)]


class Ended(NamedTuple):
    code: int                           # negative: a signal
    err: str
    memory: int                         # bytes that it took more than this process


def stop(*args, **kwargs):
    """In the place of what follows."""
    sys.exit(0)


def attempt(method, argv, folder, instead, room=2 << 30):
    """The command in a fork that may take 20 s, and `room` bytes of memory more than it begins with."""
    (folder / "memory").write_text("0")
    if not (pid := os.fork()):
        code = 99
        try:                                                            # the child never comes back to pytest
            signal.alarm(20)
            before, pages = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
            for number, name in (1, "stdout"), (2, "stderr"):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", errors="backslashreplace", closefd=False) for n in (1, 2))
            for owner, name, other in (run, "field_comments", comments), (method, "evaluate", stop), *instead:
                setattr(owner, name, other)
            code = method.main([str(a) for a in argv])
            (folder / "memory").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, (folder / "stderr").read_text("utf-8", "replace"), int((folder / "memory").read_text()) << 10)


def words(settings):
    """Settings as a command line says them."""
    return [f"--{'no-' * (v is False)}{k.replace('_', '-')}" + f"={v}" * (v is not False) for k, v in settings.items()]


def pictures(folder):
    """A few ways of writing a JPEG and a PNG: {kind: [path, ...]}."""
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    exif, deep = Image.Exif(), Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
    exif[0x0112] = 6
    for name, image, more in (("a.jpg", colour, {}), ("b.jpg", colour, dict(progressive=True, exif=exif)), ("c.jpg", colour.convert("CMYK"), {}),
                              ("a.png", colour, dict(exif=exif)), ("b.png", colour.convert("P"), dict(transparency=3)), ("c.png", deep, {})):
        image.save(folder / name, **more)
    return {"jpeg": sorted(folder.glob("*.jpg")), "png": sorted(folder.glob("*.png"))}


def tables(folder):
    """[(name of a data set, path of its table)], each in a folder with its images."""
    images = test_folder.fill(folder / "folder", a=12, b=12)
    test_folder.write_groups(images, [f"{c}/{i:02d}.png,patient{c}{i // 2}" for c in "ab" for i in range(12)])
    found = [("folder", images / "groups.csv"), ("folder", test_folder.findings(folder / "findings") / "findings.csv")]
    for name, make, table in (("aptos2019", test_aptos2019.kaggle, "train.csv"), ("ham10000", test_ham10000.kaggle, "HAM10000_metadata.csv"),
                              ("isic2019", test_isic2019.isic, test_isic2019.TRUTH), ("isic2019", test_isic2019.isic, test_isic2019.META),
                              ("isic2020", test_isic2020.isic, test_isic2020.TRUTH), ("chexpert", test_chexpert.training, "train.csv"),
                              ("chestxray14", test_chestxray14.nih, test_chestxray14.TABLE), ("chestxray14", test_chestxray14.nih, "test_list.txt")):
        root = folder / f"{len(found)}-{name}"
        root.mkdir()
        found.append((name, make(root) / table))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{kind: [Case, ...]} of files that are as they should be, method by method; and the folder they are in."""
    folder, found = tmp_path_factory.mktemp("whole"), {kind: [] for kind in KINDS}
    found["folder"] = folder
    undecoded = lambda paths, size, channels, fit, name: \
        (np.zeros((len(paths), channels, size, size), np.uint8), list(map(str, paths)), {}, [(8, 8)] * len(paths), [])     # the pictures are whole
    np.savez(folder / "stored.npz", **(arrays := test_medmnist.arrays("retinamnist", 8, dict(train=20, val=10, test=10))))
    np.savez_compressed(folder / "deflated.npz", **arrays)
    images, sets = pictures(folder), tables(folder)
    torch.manual_seed(SEED)
    weights = ResNet(18, 3, 5, 8, "small").state_dict()
    torch.save(weights, folder / "w.pt")
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    write_safetensors(folder / "w.safetensors", weights)
    for method, tiny in TINY.items():
        settings = dict(data="retinamnist", root=str(folder / "stored.npz"), size=28, width=8, epochs=1, device="cpu") | tiny
        config, path, out = method.configure(**settings, baseline=False), folder / method.METHOD / "last.pt", ["--output", folder / "out"]
        known = data.load_for(config)
        facts = dict(classes=known.classes, channels=3, multilabel=False)
        nets = method.build(config, facts)
        path.parent.mkdir()
        run.State(method.METHOD, config, facts, nets, torch.optim.AdamW(method.parameter_groups(nets, config), fused=True)).save(path)
        model = run.load_model(path, method.METHOD, method.Config, method.build, {})
        comments(method.Config)
        here = lambda value: lambda *args: value
        for kind, paths in images.items():
            found[kind] += [Case(method, p, ["predict", "--checkpoint", path, p, *out], [(run, "load_model", here(model))]) for p in paths]
        for p in folder / "stored.npz", folder / "deflated.npz":
            found["npz"].append(Case(method, p, words(settings | {"root": p}) + out, [(method, "build", stop)]))
        for name, p in sets:
            if not hasattr(config, "labels") and (name == "chestxray14" or p.name == "findings.csv"):
                continue                                                # refused before its images are looked for, whatever they hold
            found["csv"].append(Case(method, p, words(settings | {"data": name, "root": p.parent}) + out,
                                     [(method, "build", stop), (data.cache, "load", undecoded)]))
        for argv in ["predict", "--checkpoint", path, images["png"][0], *out], ["eval", "--checkpoint", path, *out], ["--resume", path.parent], \
                words(settings | {"init": path, "baseline": False}) + out:
            found["checkpoint"].append(Case(method, path, argv, [(method, "load_for", here(known)), (run, "make_folder", stop)]))
        for name in "w.pt", "old.pth", "w.safetensors":
            found["weights"].append(Case(method, folder / name, words(settings | {"pretrained": folder / name}) + out,
                                         [(method, "load_for", here(known)), (run, "State", stop)]))
    return found


def mutated(raw, other, rng):
    """Up to three of: cut, flip, delete, insert, and swap with a part of another file; the ends, where headers are, more often than the middle."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, n = int(len(raw) * rng.random() ** rng.choice((1, 6))), rng.choice((1, 1, 2, 8, 64))
        at, way = (len(raw) - at if rng.random() < .3 else at), rng.choice(("cut", "flip", "delete", "insert", "swap"))
        if way == "cut":
            del raw[at:]
        elif way == "flip":
            for i in range(at, min(at + n, len(raw))):
                raw[i] ^= 1 << rng.randrange(8)
        elif way == "delete":
            del raw[at:at + n]
        elif way == "insert":
            raw[at:at] = rng.choice((rng.randbytes(n), rng.choice(TOKENS)))
        else:
            begin = rng.randrange(max(1, len(other) - n))
            raw[at:at + n] = other[begin:begin + n]
    return bytes(raw)


def damage(whole, kind, n):
    """What comes of file n of a kind: (exit code, what is wrong with how it ended, or "")."""
    each = len(whole[kind]) // len(TINY)
    case, rng = whole[kind][n % len(TINY) * each + n // len(TINY) % each], random.Random(f"{SEED} {kind} {n}")       # the methods in turn
    raw = case.path.read_bytes()
    try:
        case.path.write_bytes(content := mutated(raw, rng.choice(whole[rng.choice((kind, kind, kind, *KINDS))]).path.read_bytes(), rng))
        ended = attempt(case.method, case.argv, whole["folder"], case.instead)
    finally:
        case.path.write_bytes(raw)
    refused = ended.code in (1, 2) and ended.err.startswith("error: ") and ended.err.count("\n") == 1 and str(case.path) in ended.err
    if (refused or ended.code == 0 and not ended.err) and "memory" not in ended.err and ended.memory < 2 << 30:
        return ended.code, ""
    (find := whole["folder"] / f"find-{kind}-{n}").write_bytes(content)
    return ended.code, f"{find} ({case.path.name}, {case.method.METHOD}): exit {ended.code}, {ended.memory:,} bytes\n{ended.err[-1500:]}"


# ----------------------------------------------------------------------------- damage

@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(kind, whole):
    for case in whole[kind][::3]:                                       # what is refused below was right before
        ended = attempt(case.method, case.argv, whole["folder"], case.instead)
        assert ended.code == 0 and not ended.err, f"{case.path}: {ended}"
    print("seed", SEED)
    ends = [damage(whole, kind, n) for n in range(20)]
    assert not any(wrong for _, wrong in ends), "\n".join(wrong for _, wrong in ends)


@pytest.mark.slow
def test_of_three_thousand_damaged_files_none_ends_otherwise(whole):
    counts, finds = {kind: Counter() for kind in KINDS}, []
    print("seed", SEED)
    for kind in KINDS:
        for n in range(500):
            code, wrong = damage(whole, kind, n)
            counts[kind][str(code)] += 1
            finds += [wrong] * bool(wrong)
    assert not finds, "\n".join(finds)
    record = dict(command="python -m pytest --slow tests/test_fuzz.py", seed=SEED, files=sum(c.total() for c in counts.values()), finds=len(finds),
                  exit_codes={kind: dict(sorted(c.items())) for kind, c in counts.items()}, torch=str(torch.__version__), pillow=Image.__version__)
    (run.ROOT / "tests" / "results" / "fuzz.json").write_text(json.dumps(record, indent=1) + "\n")


ALIEN = [lambda c: c["facts"].clear(), lambda c: c["facts"].update(classes=[]), lambda c: c["facts"].update(classes=[1, 2]),
         lambda c: c["facts"].update(channels="3"), lambda c: c["config"].pop("root"), lambda c: c["config"].update(data=torch.ones(2)),
         lambda c: c["facts"].update(border=10 ** 9), lambda c: c["facts"].update(border=torch.ones(2)), lambda c: c["facts"].update(root=7), lambda c: c["facts"].update(seen=[1]),
         lambda c: c["ema"].update({7: torch.ones(2)}), lambda c: c["ema"].update({next(iter(c["ema"])): 3})]
OTHER_VERSION = [lambda c: c["facts"].update(images=3), lambda c: c.pop("threads"), lambda c: c.update(threads="2"), lambda c: c["position"].pop("history"), lambda c: c["position"].update(sums=[]),
                 lambda c: c["nets"].popitem(), lambda c: c.update(nets=3), lambda c: c["optimizer"].pop("param_groups"), lambda c: c.update(optimizer=None)]


@pytest.mark.parametrize("complaint, change", [("not a checkpoint", f) for f in ALIEN] + [("cannot be resumed", f) for f in OTHER_VERSION])
def test_a_checkpoint_that_is_whole_but_holds_something_else_is_refused(complaint, change, whole):
    """No checksum tells of a file made by hand, or by another version. Each command with another method, or --resume with two of them."""
    for case in whole["checkpoint"][::5] if change in ALIEN else whole["checkpoint"][2::8]:
        raw, content = case.path.read_bytes(), run.load_weights(case.path)
        change(content)
        torch.save(content, case.path)
        ended = attempt(case.method, case.argv, whole["folder"], case.instead)
        case.path.write_bytes(raw)
        assert ended.code == 2 and ended.err.count("\n") == 1 and f"{case.path}: {complaint}" in ended.err, ended


def test_weights_that_are_none_are_refused_wherever_they_are_named(tmp_path):
    path, facts = tmp_path / "w.pt", dict(classes=["a", "b"], channels=1)
    for content in 3, [1, 2], torch.ones(2), {"ema": 3}, {"ema": {7: 3}}, {"ema": {"resnet.conv1.weight": torch.ones(())}, "facts": 3}:
        torch.save(content, path)
        for read in (lambda: run.load_pretrained(ResNet(18, 1, 2, 8), path), lambda: mediffusion.other_guide(path, facts), lambda: Codec(path)):
            with pytest.raises(run.UserError, match=str(path)):
                read()
    weights = ResNet(18, 3, 2, 8).state_dict()
    for kernels in 3, torch.ones(4), torch.ones(()), weights["conv1.weight"].to_sparse():
        torch.save(weights | {"conv1.weight": kernels}, path)
        for channels in 1, 3:
            with pytest.raises(run.UserError, match=str(path)):
                run.load_pretrained(ResNet(18, channels, 2, 8), path)


# ----------------------------------------------------------------------------- malice

def test_no_malicious_file_takes_a_gigabyte(whole, tmp_path):
    names = []
    for (name, reason, _), case in zip(malicious(tmp_path, tmp_path / "marker"), itertools.cycle(whole["checkpoint"][::5])):
        method, path = case.method, tmp_path / name
        for argv in ["eval", "--checkpoint", path], ["predict", "--checkpoint", path, "x.png"], ["--limit=8", f"--init={path}"]:
            ended = attempt(method, argv, whole["folder"], case.instead)
            assert ended.code == 2 and ended.err.count("\n") == 1 and f"{path}: " in ended.err and reason in ended.err, ended
            assert ended.memory < 1 << 30 and "memory" not in ended.err and not (tmp_path / "marker").exists()
        names.append(name)
    assert len(names) >= 12


def bombs(folder):
    """Small files of six kinds that say they are pictures of 81 megapixels; four hold no more than a few of these."""
    png_bomb(folder / "a.png", 9000)
    Image.new("1", (9000, 9000)).save(folder / "a.tif", compression="group4")
    small, side = Image.new("RGB", (16, 16)), struct.pack("<H", 9000)
    for name, more, changes in (("a.gif", {}, {6: side, 8: side}), ("a.bmp", {}, {18: side, 22: side}),       # where the sides stand
                                ("a.webp", dict(save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]), {24: side, 27: side})):
        small.save(folder / name, **more)
        raw = bytearray((folder / name).read_bytes())
        for at, value in changes.items():
            raw[at:at + 2] = value
        (folder / name).write_bytes(raw)
    png = (folder / "a.png").read_bytes()
    (folder / "a.ico").write_bytes(struct.pack("<3H4B2H2I", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png)
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_image_bombs_are_refused_under_300_megabytes(whole, tmp_path, monkeypatch):
    paths = bombs(tmp_path)
    assert len(paths) == 6
    for path, case in zip(paths, itertools.cycle(whole["png"][::3])):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        with Image.open(path) as image:                                 # Pillow believes it
            assert image.width * image.height > 80_000_000 > 64 * path.stat().st_size
        monkeypatch.undo()
        argv = [path if word == case.path else word for word in case.argv]
        ended = attempt(case.method, argv, whole["folder"], case.instead)
        assert ended.code == 2 and ended.err.count("\n") == 1 and ended.memory < 300 << 20, f"{path}: {ended}"
        assert re.search("too large" if path.suffix not in (".gif", ".ico") else "not an image of a known kind", ended.err) and str(path) in ended.err
