"""Settings, command line, reading weights, seeds, EMA, files, signals, and several processes: all of common/run.py.

What a whole run survives (kills, full disks, non-finite numbers) is in test_faults.py, each mistake in an option in test_promises.py.
"""
import collections
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import socket
import struct
import tarfile
import time
import traceback
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffmic
from common import metrics, run
from common.mmd import mmd_rbf
from data import Batches, DataSet, Split, toy

FIELDS = dataclasses.fields(diffmic.Config)


def main(*argv, method=diffmic):
    """The command line in this process: exit code, what it printed, what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = method.main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def refusal(*argv, code=2, method=diffmic):
    """The text behind the one `error:` line that the command must end with."""
    got, _, err = main(*argv, method=method)
    lines = [line for line in err.strip().splitlines() if not re.fullmatch(r".+: \d+/\d+, .+ s left", line)]     # progress
    assert got == code and len(lines) == 1 and lines[0].startswith("error: "), f"{argv}: exit {got}, {err!r}"
    return lines[0].removeprefix("error: ")


@pytest.fixture
def configured(monkeypatch):
    """What `train` is asked for, without training."""
    seen = []
    monkeypatch.setattr(diffmic, "train", lambda config, resume=None: seen.append(config))

    def ask(*argv):
        code, _, err = main(*argv)
        assert code == 0, err
        return seen.pop()
    return ask


# ----------------------------------------------------------------------------- settings

def test_the_toy_set_is_small_and_plus_and_every_other_set_is_the_papers(configured):
    toy_run, real = configured(), configured("--data", "ham10000")
    assert (toy_run.scale, toy_run.recipe, real.scale, real.recipe) == ("small", "plus", "paper", "paper")
    assert {k: getattr(toy_run, k) for k in diffmic.SMALL if k != "size"} == {k: v for k, v in diffmic.SMALL.items() if k != "size"}
    assert {k: getattr(toy_run, k) for k in diffmic.PLUS} == diffmic.PLUS
    assert toy_run.size == 32 and real == diffmic.Config(data="ham10000")


def test_scale_recipe_and_fields_can_be_set_one_by_one(configured):
    real = configured("--data", "ham10000", "--scale", "small")
    assert (real.size, real.recipe, real.samples) == (64, "plus", diffmic.PLUS["samples"])
    real = configured("--data", "ham10000", "--scale", "small", "--recipe", "paper", "--width", "16")
    assert (real.size, real.samples, real.width, real.hidden) == (64, 1, 16, diffmic.SMALL["hidden"])
    big_toy = configured("--scale", "paper")
    assert (big_toy.recipe, big_toy.width, big_toy.size) == ("paper", 64, 32)       # a toy set keeps its own size
    assert configured("--size", "48").size == 48


def test_epochs_caps_the_warm_up_as_well(configured):
    assert configured("--epochs", "1").pretrain_epochs == 1
    assert configured("--epochs", "100").pretrain_epochs == diffmic.SMALL["pretrain_epochs"]
    assert configured("--epochs", "1", "--pretrain-epochs", "5").pretrain_epochs == 5
    assert configured("--data", "ham10000", "--epochs", "3").pretrain_epochs == 3


def test_underscores_and_short_names_are_understood(configured):
    want = configured("--batch-size", "7", "--output", "there", "--no-baseline", "--skip-bad")
    assert want.batch_size == 7 and want.output == "there" and not want.baseline and want.skip_bad
    assert configured("--batch_size=7", "--out", "there", "--no-baseline", "--skip_bad") == want
    assert configured("train", "--batch", "7", "--out=there", "--no-baseline", "--skip-bad") == want


def test_an_option_says_its_value_however_it_looks(configured):
    assert configured("--output", "a_b--c_d", "--root=x_y").output == "a_b--c_d"
    assert configured("--root=x_y").root == "x_y"


def test_an_unknown_option_names_the_nearest_one():
    assert "--epochz" in (line := refusal("--epochz", "3")) and "did you mean --epochs" in line
    assert "--batchsize" in (line := refusal("--batchsize", "3")) and "--batch-size" in line
    assert "--help" in refusal("--qqqqqqqq")
    assert "--epo" in refusal("--epo", "3"), "no abbreviations: they break when an option is added"
    assert "--checkpoint" in refusal("eval")
    assert "IMAGE" in refusal("predict", "--checkpoint", "x.pt")


def test_a_wrong_call_from_python_is_a_user_error_too():
    for given in (dict(epochs="3"), dict(epochs=None), dict(epochs=2.5), dict(lr="fast"), dict(seed=True), dict(data=5), dict(scale=1),
                  dict(baseline="no"), dict(nothing=1), dict(lr=math.nan)):
        with pytest.raises(run.UserError, match="--" + next(iter(given))):
            diffmic.configure(**given)
    assert diffmic.configure(lr=1).lr == 1                              # a whole number is a number


QUICK = "--limit 8 --epochs 1 --pretrain-epochs 0 --size 28 --hidden 8 --rois 2 --samples 1 --steps 2 --no-baseline".split()


@pytest.mark.parametrize("argv", [["--hidden", 10 ** 9], ["--timesteps", 10 ** 12], ["--samples", 10 ** 9], ["--width", 10 ** 10]], ids=str)
def test_what_no_memory_can_hold_is_one_line_and_no_traceback(argv, tmp_path):
    line = refusal(*QUICK, "--output", tmp_path / "run", *argv, code=1)
    assert "memory" in line and "--batch-size" in line


@dataclasses.dataclass
class Extended(diffmic.Config):
    # --- method ---
    extra: float = 1.  # [0..2] a setting of one's own


@dataclasses.dataclass
class Bare(diffmic.Config):
    extra: float = 1.


def test_a_config_may_be_extended_and_a_field_without_a_comment_is_named():
    assert run.field_comments(Extended)["extra"] == ("method", "[0..2] a setting of one's own") and run.field_comments(Extended)["lr"] == run.field_comments(diffmic.Config)["lr"]
    assert run.configure(Extended, dict(extra=2.), {}, {}, {}).extra == 2
    with pytest.raises(run.UserError, match="--extra 3"):
        run.configure(Extended, dict(extra=3.), {}, {}, {})
    with pytest.raises(TypeError, match="Bare.extra"):
        run.configure(Bare, {}, {}, {}, {})


def test_help_shows_every_option_with_its_default_in_its_group():
    code, text, err = main("--help")
    assert code == 0 and not err
    groups = ["data", "model", "training", "output", "method"]
    places = [text.index(f"\n{g}:\n") for g in groups]
    assert places == sorted(places) and "examples:" in text[places[-1]:]
    plain = " ".join(text.split())
    comments = run.field_comments(diffmic.Config)
    assert [f.name for f in FIELDS] == list(comments), "a field without a comment, or in another order"
    for field in FIELDS:
        default = field.default if field.default != "" else "none"
        place = re.search(rf"\n  (--\w+ \w+, )?--(\[?no-\]?)?{field.name.replace('_', '-')}\b", text)
        assert place, f"--{field.name} is missing"
        begin = groups.index(comments[field.name][0])
        assert places[begin] < place.start() < (places + [len(text)])[begin + 1], f"--{field.name} is in another group"
        assert " ".join(comments[field.name][1].split()) + f"; default {default}" in plain.replace("- ", "-") or \
            " ".join(comments[field.name][1].split()) + f"; default {default}" in plain, f"--{field.name}"
    for command in ("eval", "predict", "explain"):
        code, text, _ = main(command, "--help")
        assert code == 0 and "--checkpoint" in text and "--samples" in text and "--epochs" not in text


# ----------------------------------------------------------------------------- reading weights

TENSORS = {"a": torch.arange(6.).reshape(2, 3), "b": torch.tensor([1, 2, 3]), "c.d": torch.tensor(2.5, dtype=torch.float16)}


def write_safetensors(path, tensors=TENSORS, header=None, behind=b""):
    """By the format's description: length of the header, the header, the bytes in the order of their offsets."""
    kinds, block, entries = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}, b"", {"__metadata__": {"format": "pt"}}
    for name, t in tensors.items():
        raw = t.contiguous().numpy().tobytes()
        entries[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [len(block), len(block) + len(raw)]}
        block += raw
    text = json.dumps(header(entries) if header else entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + block + behind)
    return path


def same(a, b):
    """Equal to the last bit, whatever it is made of."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.ckpt", "old.pth", "w.safetensors"])
def test_weights_are_read_from_every_kind_of_file(name, tmp_path):
    path = tmp_path / name
    if name == "w.safetensors":
        write_safetensors(path)
    else:                                                               # torchvision's older files are no zip; .ckpt nests the weights
        torch.save({"state_dict": TENSORS, "epoch": 3} if name == "w.ckpt" else TENSORS, path, _use_new_zipfile_serialization=name != "old.pth")
    assert same(run.load_weights(path), TENSORS)


class Call:
    """Pickles as the call of a function, which is how a pickle runs code."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def pack(path, entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr("archive/" + name, content)
    return path


def checkpoint(path, method="diffmic", **more):
    """A small file laid out as State.save does it."""
    generator = torch.Generator().manual_seed(0)
    nets = {f"layer{i}.weight": torch.randn(24, 24, generator=generator) for i in range(4)}
    run.save(path, dict(format=run.FORMAT, method=method, config={}, facts={}, nets=nets, ema=nets, optimizer={}, position={}, **more))
    return path


def malicious(folder, touch):
    """Name of a file, what the refusal must say, and a loader that would fall for it (None: the file lies, it does not run)."""
    shell = f"touch {shlex.quote(str(touch))}"
    opcodes = (f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S{shell!r}\ntR.").encode()
    run_it = pickle.dumps(Call(os.system, shell))
    torch.save({"method": "diffmic", "ema": Call(os.system, shell)}, folder / "system.pt")
    yield "system.pt", "pickled code", lambda p: torch.load(p, weights_only=False)
    torch.save(Call(eval, f"__import__('os').system({shell!r})"), folder / "eval.pt")
    yield "eval.pt", "pickled code", lambda p: torch.load(p, weights_only=False)
    pack(folder / "getattr.pt", {"data.pkl": opcodes, "version": b"3\n", "byteorder": b"little"})
    yield "getattr.pt", "pickled code", lambda p: torch.load(p, weights_only=False)
    pack(folder / "jit.pt", {"data.pkl": run_it, "constants.pkl": run_it, "version": b"3\n", "code/__torch__.py": f"import os\nos.system({shell!r})\n"})
    yield "jit.pt", "TorchScript", None
    with tarfile.open(folder / "tar.pt", "w") as archive:               # torch's format before 0.1.10
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(run_it)
            archive.addfile(entry, io.BytesIO(run_it))
    yield "tar.pt", "", lambda p: pickle.loads(tarfile.open(p).extractfile("pickle").read())
    (folder / "bare.pth").write_bytes(opcodes)
    yield "bare.pth", "pickled code", lambda p: pickle.loads(p.read_bytes())
    torch.save({"method": np.array([Call(os.system, shell)], dtype=object)}, folder / "objects.pt")
    yield "objects.pt", "pickled code", lambda p: torch.load(p, weights_only=False)
    with zipfile.ZipFile(folder / "objects.npz.pt", "w") as archive, archive.open("a.npy", "w") as f:
        np.lib.format.write_array(f, np.array([Call(os.system, shell)], dtype=object), allow_pickle=True)
    yield "objects.npz.pt", "", lambda p: np.load(p, allow_pickle=True)["a"]
    pack(folder / "bomb.pt", {"data.pkl": pickle.dumps({}), "version": b"3\n", "data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    yield "bomb.pt", "compressed", None
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", 2 ** 63) + b"{}" + bytes(100))
    yield "header.safetensors", "header longer", None

    def second(begin, end):
        return lambda h: {**h, "b": {"dtype": "I64", "shape": [3], "data_offsets": [begin, end]}}
    write_safetensors(folder / "overlap.safetensors", header=second(0, 24))
    yield "overlap.safetensors", "overlaps", None
    write_safetensors(folder / "hole.safetensors", {k: TENSORS[k] for k in "ab"}, header=second(32, 56), behind=bytes(8))
    yield "hole.safetensors", "holes", None
    deep = b'{"a":' * 100_000
    (folder / "deep.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep)
    yield "deep.safetensors", "recursion", None


def test_no_malicious_file_is_read_and_none_runs_anything(tmp_path):
    touch = tmp_path / "marker"
    names = []
    for name, reason, victim in malicious(tmp_path, touch):
        names.append(name)
        if victim:                                                      # the file is a real danger: this loader falls for it
            with contextlib.suppress(Exception):
                victim(tmp_path / name)
            assert touch.exists(), f"{name} would harm nobody, so it tests nothing"
            touch.unlink()
        for argv in (["eval", "--checkpoint"], ["predict", "--checkpoint"], ["--limit", 8, "--output", tmp_path / "run", "--init"],
                     ["--limit", 8, "--output", tmp_path / "run", "--pretrained"])[:None if name in ("system.pt", "hole.safetensors") else 1]:
            line = refusal(*argv, tmp_path / name, *(["x.png"] if "predict" in argv else []))
            assert name in line and reason in line and not touch.exists(), line
    assert len(names) == 13


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = pack(tmp_path / "w.pt", {"data.pkl": pickle.dumps({}), "data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", lambda *a, **k: opened.append(a) or 1 / 0)
        patch.setattr(torch, "load", lambda *a, **k: opened.append(a))
        with pytest.raises(run.UserError, match="compressed"):
            run.load_weights(path)
    assert not opened


def test_a_compressed_entry_is_refused_however_small(tmp_path):
    path = pack(tmp_path / "w.pt", {"data.pkl": pickle.dumps({}), "version": b"3\n", "data/0": random.Random(0).randbytes(4000)}, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        assert sum(e.file_size for e in archive.infolist()) <= path.stat().st_size
    with pytest.raises(run.UserError, match="compressed"):
        run.load_weights(path)


def test_entries_that_share_bytes_are_refused(tmp_path):
    """A directory that lists one entry many times claims more bytes than there are: how a small file becomes a large memory."""
    path = pack(tmp_path / "w.pt", {"data.pkl": pickle.dumps({"w": 1}), "version": b"3\n", "data/0": bytes(5000)})
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir
    raw = path.read_bytes()
    end = raw.rindex(b"PK\5\6")
    last = raw[raw.rindex(b"PK\1\2"):end]
    count, size = 3 + 9, end - at + 9 * len(last)
    path.write_bytes(raw[:end] + 9 * last + raw[end:end + 8] + struct.pack("<HHI", count, count, size) + raw[end + 16:])
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == count and archive.testzip() is None
    with pytest.raises(run.UserError, match="overlapping"):
        run.load_weights(path)


def flipped(path, original, bits):
    """Tries each flipped bit: counts of "refused", "same" (a byte that means nothing) and, which must not be, "other"."""
    raw, counts = path.read_bytes(), collections.Counter()
    target = path.with_name("flipped.pt")
    for bit in bits:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        target.write_bytes(damaged)
        try:
            counts["same" if same(run.load_weights(target), original) else f"other: bit {bit % 8} of byte {bit // 8}"] += 1
        except run.UserError as refused:
            assert str(target) in str(refused) and "\n" not in str(refused)
            counts["refused"] += 1
    return counts


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    """torch alone accepts nearly all of them. What remains "same" are bytes of the zip that carry nothing: dates, padding, flags."""
    path = checkpoint(tmp_path / "w.pt")
    original, seed = run.load_weights(path), random.randrange(10 ** 6)
    print("seed", seed)
    counts = flipped(path, original, random.Random(seed).sample(range(8 * path.stat().st_size), 500))
    print(counts)
    assert counts["refused"] + counts["same"] == 500, counts
    assert counts["refused"] > 250


@pytest.mark.slow
def test_no_bit_of_a_whole_checkpoint_changes_what_is_read(tmp_path):
    """Every single bit of a small file: 0 are read as something else."""
    path = tmp_path / "w.pt"
    run.save(path, {"method": "diffmic", "nets": {"w": torch.arange(8.)}, "step": 3})
    counts = flipped(path, run.load_weights(path), range(8 * path.stat().st_size))
    print(counts)
    assert counts["refused"] + counts["same"] == 8 * path.stat().st_size, counts


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "old.pth"])
def test_a_file_cut_short_anywhere_is_refused(name, tmp_path):
    path = tmp_path / name
    if name == "w.safetensors":
        write_safetensors(path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name == "w.pt")
    raw = path.read_bytes()
    for length in sorted({0, 1, 3, 4, 7, 8, 9, *range(0, len(raw), max(1, len(raw) // 60)), len(raw) - 1}):
        path.write_bytes(raw[:length])
        with pytest.raises(run.UserError, match=re.escape(str(path))):
            run.load_weights(path)


def test_of_an_odd_pickle_protocol_no_warning_stands_beside_the_line(tmp_path, recwarn):
    torch.save({"w": torch.ones(2)}, path := tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"\x80\x02", b"\x80\x96"))
    with contextlib.suppress(run.UserError):
        run.load_weights(path)
    assert not recwarn.list


def test_a_file_that_is_no_checkpoint_of_this_method_is_refused_by_name(tmp_path):
    cases = {"missing.pt": "no such file", "empty.pt": "damaged", "text.pt": "refused|damaged", "weights.pt": "not a checkpoint", "list.pt": "not a checkpoint",
             "crafted.pt": "not a checkpoint", "other.pt": "python symmflow.py", "newer.pt": "newer version"}
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello, world")
    torch.save(TENSORS, tmp_path / "weights.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"method": "diffmic", "config": 3}, tmp_path / "crafted.pt")
    checkpoint(tmp_path / "other.pt", "symmflow")
    run.save(tmp_path / "newer.pt", dict(run.load_weights(checkpoint(tmp_path / "now.pt")), format=run.FORMAT + 1))
    for name, reason in cases.items():
        for argv in (["eval", "--checkpoint", tmp_path / name], ["predict", "--checkpoint", tmp_path / name, "x.png"], ["explain", "--checkpoint", tmp_path / name]):
            assert re.search(reason, line := refusal(*argv)) and name in line, line
    assert "best.pt" in refusal("eval", "--checkpoint", tmp_path), "a folder: the remedy names the file in it"


def test_a_checkpoint_that_does_not_fit_its_own_settings_is_refused(tmp_path):
    facts = dict(classes=list("abc"), channels=3, multilabel=False)
    config = diffmic.configure(guide_depth=18, hidden=8, timesteps=40, steps=2, width=8)
    nets = diffmic.build(config, facts).state_dict()
    run.save(tmp_path / "w.pt", dict(format=1, method="diffmic", config=dataclasses.asdict(config), facts=dict(facts, classes=list("abcd")), ema=nets))
    assert "do not fit" in refusal("eval", "--checkpoint", tmp_path / "w.pt")
    run.save(tmp_path / "w.pt", dict(format=1, method="diffmic", config=dict(dataclasses.asdict(config), width=-3), facts=facts, ema=nets))
    assert "--width" in refusal("eval", "--checkpoint", tmp_path / "w.pt")


# ----------------------------------------------------------------------------- seeds, noise, EMA

def test_a_seed_is_the_same_on_every_machine_and_differs_for_every_purpose():
    assert run.seed_of(0, "noise", "test-00001") == 7925277494858297507
    seeds = {run.seed_of(*parts) for parts in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"), (0, 1), ("0:1",), (0,)]}
    assert len(seeds) == 7, "all differ, but for (0, 1) and '0:1', which are written alike"
    assert all(0 <= s < 2 ** 63 for s in (run.seed_of(i) for i in range(1000)))


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    ids = [f"image {i}" for i in range(6)]
    whole = run.image_noise(3, ids, (2, 4), "cpu")
    assert whole.shape == (6, 2, 4)
    assert torch.equal(run.image_noise(3, ids[::-1], (2, 4), "cpu").flip(0), whole)
    assert torch.equal(torch.cat([run.image_noise(3, [i], (2, 4), "cpu") for i in ids]), whole)
    assert not torch.equal(run.image_noise(4, ids, (2, 4), "cpu"), whole) and len(whole.flatten().unique()) == 48
    many = run.image_noise(0, map(str, range(2000)), (5,), "cpu")
    assert abs(many.mean()) < .04 and abs(many.std() - 1) < .03


def test_pictures_of_the_same_name_in_two_folders_have_noise_of_their_own():
    noise = run.image_noise(0, ["benign/1.png", "malignant/1.png", "patient.1", "patient.2"], (3, 4), "cpu")
    assert len(noise.flatten().unique()) == 48
    assert torch.equal(noise[0], torch.randn(3, 4, generator=torch.Generator().manual_seed(run.seed_of(0, "noise", "benign/1.png"))))


def test_the_moving_average_is_the_formulas():
    torch.manual_seed(0)
    net, ema = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[1].running_mean.fill_(5.)
    net[1].num_batches_tracked.fill_(7)
    for step, decay, d in ((0, .99, .1), (1, .9999, 2 / 11), (8, .99, .5), (10 ** 6, .99, .99), (0, 0., 0.)):
        before = {k: v.clone() for k, v in ema.state_dict().items()}
        run.update_ema(ema, net, decay, step)
        for k, now in net.state_dict().items():
            want = d * before[k].double() + (1 - d) * now.double() if now.is_floating_point() else now
            torch.testing.assert_close(ema.state_dict()[k].double(), want.double(), rtol=1e-6, atol=1e-6)
    assert same(dict(ema.state_dict()), dict(net.state_dict())), "decay 0: the weights themselves"
    assert all(p.grad is None for p in ema.parameters())


# ----------------------------------------------------------------------------- files and folders

def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f.pt"
    run.write(path, "old")

    def fails(f):
        f.write(b"half of the new")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"No space.*f\.pt"):
        run.write(path, fails)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.pt"]
    with pytest.raises(run.WorkError, match=r"f\.pt: cannot save: No space.*unchanged"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda content, f: fails(f))
        run.save(path, {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.pt"]
    run.write(path, "né 文\udcff")                                       # any file's name can stand in a table
    assert path.read_bytes() == "né 文".encode() + b"\xff" and os.listdir(tmp_path) == ["f.pt"]


def test_a_table_of_predictions_has_no_truth_for_images_without_a_label(tmp_path):
    split = Split(np.zeros((3, 1, 8, 8), np.uint8), np.array([1, -1, 0]), ["a", "b,c", "d"])
    p = np.array([[.25, .75], [.875, .125], [.5, .5]])
    run.write_predictions(tmp_path / "p.csv", split, p, np.array([.1, .2, 1 / 3]), ["x", "y"])
    assert (tmp_path / "p.csv").read_text().splitlines() == ["id,true,predicted,uncertainty,p:x,p:y", "a,y,y,0.100000,0.25,0.75",
                                                             '"b,c",,x,0.200000,0.875,0.125', "d,x,x,0.333333,0.5,0.5"]


def test_answers_that_are_very_sure_keep_their_order_in_the_table(tmp_path):
    sure = np.array([3e-9, 1e-9, 2e-8, 1.23456789e-12, .5])
    run.write_predictions(tmp_path / "p.csv", Split(np.zeros((5, 1, 8, 8), np.uint8), np.zeros(5, np.int64), list("abcde")), np.stack([1 - sure, sure], 1), sure, ["x", "y"])
    with open(tmp_path / "p.csv", newline="") as file:
        assert [float(row["p:y"]) for row in csv.DictReader(file)] == pytest.approx(sure, rel=1e-8)


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda n, real=os.fsync: (order.append("fsync"), real(n)))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (order.append(Path(a).read_bytes()), real(a, b)))
    run.write(tmp_path / "f", b"all of it")
    assert order == ["fsync", b"all of it"]


def test_a_free_folder_is_absent_or_empty(tmp_path):
    path = tmp_path / "run"
    assert run.free_folder(path) == path
    path.mkdir()
    assert run.free_folder(path) == path
    (path / "x").touch()
    (tmp_path / "run-2").touch()                                        # a file has the name
    assert run.free_folder(path) == tmp_path / "run-3"


def test_the_leftovers_of_a_kill_are_swept_away_and_nothing_else(tmp_path):
    for name in (".last.pt.4711.tmp", ".notes.tmp", "last.pt", "mine.1.tmp"):
        (tmp_path / name).touch()
    run.make_folder(tmp_path, diffmic.Config())
    assert sorted({*os.listdir(tmp_path)} - {"figures"}) == [".notes.tmp", "config.json", "last.pt", "mine.1.tmp"]
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(diffmic.Config())


def test_a_finished_runs_folder_is_not_written_over(tmp_path):
    (tmp_path / "last.pt").touch()
    with pytest.raises(run.UserError, match="--resume"):
        run.choose_folder(diffmic.Config(output=str(tmp_path)), "diffmic")
    with pytest.raises(run.UserError, match="overwrite"):
        run.result_folder(str(tmp_path), tmp_path / "best.pt", "eval", diffmic.Config())
    assert os.listdir(tmp_path) == ["last.pt"]
    assert run.result_folder("", tmp_path / "best.pt", "eval", diffmic.Config()) == tmp_path.resolve() / "eval"


def known_set(labels=None, test=("e/5.png", "f")):
    split = Split(np.zeros((4, 1, 28, 28), np.uint8), np.array(labels or [0, 1, 0, 1]), ["a/1.png", "b/2, left.png", "c", "d"])
    rest = Split(np.zeros((len(test), 1, 28, 28), np.uint8), np.arange(len(test)) % 2, list(test))
    return DataSet(split, Split(rest.images[:2], rest.labels[:2], ["v", "w"]), rest, ["x", "y"], False, 1, ["a note"])


def test_images_that_a_run_has_seen_are_not_scored_without_a_warning():
    facts = run.facts_of(known_set(), diffmic.Config())
    assert run.seen_before(facts, ["e/5.png", "f", "another"]) == [] == run.seen_before({}, ["a/1.png"])       # its own test split; a checkpoint of old
    warning, = run.seen_before(facts, ["a/1.png", "v", "e/5.png"])
    assert "WARNING: 2 of these 3 images" in warning and "--root and --split as in training" in warning


def test_a_checkpoint_knows_where_its_data_lay_and_what_they_were(tmp_path, monkeypatch):
    (tmp_path / "there" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    config = diffmic.Config(data="folder", root="set")
    facts = run.facts_of(known_set(), config)
    assert facts["root"] == str(tmp_path / "there" / "set") and facts["notes"] == ["a note"] and facts["images"]["train"][0] == 4
    assert facts["images"] != run.facts_of(known_set(labels=[1, 1, 0, 1]), config)["images"] != run.facts_of(known_set(test=("e", "f")), config)["images"]
    net = nn.Linear(2, 3)
    run.State("diffmic", config, facts, net, torch.optim.SGD(net.parameters(), .1)).save(tmp_path / "best.pt")
    load = lambda **given: run.load_model(tmp_path / "best.pt", "diffmic", diffmic.Config, lambda *a: nn.Linear(2, 3), given | dict(device="cpu"))
    assert load()[0].root == "set" and load()[2]["own_data"]
    monkeypatch.chdir(tmp_path)                                          # from elsewhere, too
    assert load()[0].root == str(tmp_path / "there" / "set") and load()[2]["own_data"] and load(root="there/set")[2]["own_data"]
    assert not load(root=".")[2]["own_data"] and not load(data="toy")[2]["own_data"]


def test_a_run_is_not_resumed_on_other_images_or_labels(tmp_path):
    net, config = nn.Linear(2, 3), diffmic.Config()
    of = lambda data: run.State("diffmic", config, run.facts_of(data, config), net, torch.optim.SGD(net.parameters(), .1))
    of(known_set()).save(tmp_path / "last.pt")
    of(known_set()).load(tmp_path / "last.pt")
    for data, words in (known_set(test=("e/5.png",) * 3), "test 2, now 3"), (known_set(labels=[1, 0, 1, 0]), "train 4, now 4"):
        with pytest.raises(run.UserError, match=f"last.pt: the images, their labels or splits are others than when the run began: .*{words}"):
            of(data).load(tmp_path / "last.pt")


def test_a_file_of_a_runs_own_folder_has_the_noise_that_it_has_there(tmp_path):
    config = diffmic.Config(data="folder", root=str(tmp_path))
    assert run.names_of([tmp_path / "a" / "1.png", "else/1.png"], config) == ["a/1.png", "1"]
    assert run.names_of([tmp_path / "a" / "1.png"], dataclasses.replace(config, data="ham10000")) == ["1"]


def test_resume_needs_a_run_and_one_only(tmp_path):
    with pytest.raises(run.UserError, match="which run"):
        run.resume_folder("", "")
    with pytest.raises(run.UserError, match="no last.pt"):
        run.resume_folder(str(tmp_path), "")
    (tmp_path / "last.pt").touch()
    assert run.resume_folder(str(tmp_path), "") == run.resume_folder("", str(tmp_path)) == run.resume_folder(str(tmp_path / "last.pt"), "") == tmp_path
    with pytest.raises(run.UserError, match="one of the two"):
        run.resume_folder(str(tmp_path), str(tmp_path / "elsewhere"))


# ----------------------------------------------------------------------------- several labels an image, hidden labels

LABELS = ["effusion", "mass", "nodule"]


def several(n=60, seed=0, one_class=False):
    """A multi-label Split, and two models of it that know something."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < (.5, .3, 0 if one_class else .2)).astype(np.float32)
    p, q = (1 / (1 + np.exp(2 - strength * labels - rng.normal(size=labels.shape))) for strength in (4, 2))
    return Split(np.zeros((n, 1, 28, 28), np.uint8), labels, [f"i{i}" for i in range(n)]), {"mediffusion": p, "resnet": q}


def read_predictions(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_predictions_of_several_labels_are_read_back_as_they_were(tmp_path):
    split, predictions = several()
    p, uncertainty = predictions["mediffusion"], np.random.default_rng(1).random((60, 3))
    p[0], split.labels[0], p[1, 0], split.labels[2] = .4, 0, .5, -1     # says nothing and is nothing; just named; unknown
    split.labels[3] = 0, -1, 1                                          # of one label unknown
    run.write_predictions(tmp_path / "p.csv", split, p, uncertainty, LABELS)
    rows = read_predictions(tmp_path / "p.csv")
    assert list(rows[0]) == ["id", "true", "predicted", "uncertainty", "p:effusion", "p:mass", "p:nodule"] and [r["id"] for r in rows] == split.ids
    for column, chosen in (("true", split.labels == 1), ("predicted", p >= .5)):
        assert [[c in r[column].split("|") for c in LABELS] for r in rows] == chosen.tolist()
    assert (rows[0]["true"], rows[0]["predicted"], rows[2]["true"], rows[3]["true"]) == ("", "", "", "nodule")
    assert any(r["true"].count("|") == 1 for r in rows) and "effusion" in rows[1]["predicted"]
    np.testing.assert_allclose([float(r["uncertainty"]) for r in rows], uncertainty.mean(1), atol=1e-6)
    np.testing.assert_allclose([[float(r[f"p:{c}"]) for c in LABELS] for r in rows], p, atol=1e-6)


def test_several_labels_are_scored_label_by_label_and_one_that_nobody_has_is_left_out():
    split, predictions = several(one_class=True)
    split.posterior = predictions["mediffusion"]
    result = run.score(split, predictions, 1 - np.maximum(split.posterior, 1 - split.posterior), split.labels, ci=5)
    test, majority = result["test"], result["baselines"]["majority"]
    assert test["n"] == 60 and test["auroc_labels"] == 2 and np.isnan(test["per_label"]["auroc"][2])
    assert test["auroc"] == np.mean(test["per_label"]["auroc"][:2]) > result["baselines"]["resnet"]["auroc"] > majority["auroc"] == .5
    np.testing.assert_equal({k: v for k, v in test.items() if k != "ci95"}, result["bayes"])
    assert set(test["ci95"]) >= {"auroc", "accuracy"}
    assert majority["accuracy"] == pytest.approx(np.maximum(split.labels.mean(0), 1 - split.labels.mean(0)).mean())
    row = run.validation(split, predictions, "mediffusion")
    assert row["val_auroc"] == test["auroc"] and row["val_resnet_accuracy"] == result["baselines"]["resnet"]["accuracy"]
    assert f"{test['auroc']:10.3f}" in run.table("mediffusion", result) and "Bayes optimum" in run.table("mediffusion", result)
    assert json.loads(run.as_json(result))["test"]["per_label"]["auroc"][2] is None


def test_every_label_of_every_image_is_an_answer_to_set_aside():
    """An oracle: a loop over the 180 answers."""
    split, predictions = several()
    uncertainty = np.random.default_rng(1).random((60, 3))
    found = run.selective(split, predictions, uncertainty)
    for name, p in predictions.items():
        answers = sorted((uncertainty[i, k] if name == "mediffusion" else min(p[i, k], 1 - p[i, k]), (p[i, k] >= .5) == split.labels[i, k])
                         for i in range(60) for k in range(3))
        for kept, accuracy in zip(*found[name]):
            n = 180 - int(180 * (1 - kept) + 1e-9)
            assert accuracy == pytest.approx(np.mean([right for _, right in answers[:n]]))
    assert found["resnet"][1][0] == run.score(split, predictions, uncertainty, ci=0)["baselines"]["resnet"]["accuracy"]


def test_intervals_draw_whole_patients_where_they_are_known():
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    p = np.eye(2)[np.where(rng.random(20) < .7, labels, 1 - labels)] * .8 + .1
    ten = [np.repeat(a, 10, 0) for a in (labels, p)]                    # ten images of each of 20 patients
    splits = [Split(np.zeros((200, 1, 8, 8), np.uint8), ten[0], list(map(str, range(200))), groups) for groups in (None, list(np.repeat(np.arange(20), 10)))]
    alone, whole = (run.score(split, {"m": ten[1], "other": ten[1]}, np.zeros(200), ci=300) for split in splits)
    for of in (lambda found: found["test"], lambda found: found["baselines"]["other"]):
        low, high = of(whole)["ci95"]["accuracy"]
        assert high - low > 2 * np.subtract(*of(alone)["ci95"]["accuracy"][::-1]) and of(whole)["accuracy"] == of(alone)["accuracy"]


@pytest.mark.parametrize("kind", ["one label", "several labels"])
def test_the_majority_counts_the_labels_that_are_shown_and_no_others(kind):
    rng = np.random.default_rng(0)
    if kind == "one label":
        split, labels = Split(np.zeros((50, 1, 28, 28), np.uint8), np.arange(50) % 3, list(map(str, range(50)))), rng.choice(3, 40, p=[.2, .7, .1])
        p, rows = np.full((50, 3), 1 / 3), lambda labels: np.eye(3)[labels]
    else:
        split, p, labels, rows = several(50)[0], np.full((50, 3), .5), several(40, seed=1)[0].labels, lambda labels: labels
    hidden = np.concatenate([labels, np.full_like(labels, -1)])
    want = metrics.summary(split.labels, np.tile(rows(labels).mean(0), (50, 1)))
    for given in (labels, hidden, hidden[::-1]):
        got = run.score(split, {"m": p}, np.zeros(p.shape[:split.labels.ndim]), given, ci=0)["baselines"]["majority"]
        assert got["nll"] == pytest.approx(want["nll"]) and got["accuracy"] == want["accuracy"] and got["ece"] == pytest.approx(want["ece"])


def test_the_share_of_a_label_is_that_among_the_images_where_it_is_known():
    counts, known = run.class_counts(np.array([[1, -1, -1], [0, 1, -1], [-1, 1, -1]], np.float32), 3)
    assert counts.tolist() == [1, 2, 0] and known.tolist() == [2, 2, 0]
    counts, known = run.class_counts(np.array([2, -1, 0, 2, -1]), 4)
    assert counts.tolist() == [1, 0, 2, 0] and known == 3
    split, predictions = several()
    labels = np.where([True, True, False], split.labels, -1)            # the last label is never known
    assert run.score(split, predictions, np.zeros((60, 3)), labels, ci=0)["baselines"]["majority"]["per_label"]["nll"][2] > 1


@pytest.mark.parametrize("hide", [False, True])
def test_the_first_lines_of_a_run_count_the_known_labels_of_either_kind(hide, capsys, tmp_path):
    one = Split(np.zeros((8, 1, 28, 28), np.uint8), np.array([0, 1, 1, 2, 0, 1, 1, 2]), list("abcdefgh"))
    many = several(8)[0]
    many.labels[:] = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]] * 2)
    for split, multilabel, half, whole in ((one, False, (1, 2, 1), (2, 4, 2)), (many, True, (2, 2, 0), (4, 4, 0))):
        train = dataclasses.replace(split, labels=split.labels.copy())
        train.labels[4:] = -1 if hide else train.labels[4:]
        run.describe(tmp_path, diffmic.Config(), DataSet(train, split, dataclasses.replace(split, groups=["p"] * 8), LABELS, multilabel, 1), "diffmic", nn.Linear(2, 3), "cpu")
        words = lambda counts: "  ".join(f"{c} {n}" for c, n in zip(LABELS, counts))
        lines = capsys.readouterr().out.splitlines()[1:]
        assert lines == [f"  train      8 (4 labelled)  {words(half)}" if hide else f"  train      8  {words(whole)}",
                         f"  val        8  {words(whole)}", f"  test       8  {words(whole)}"]
        went = [f"{name},{part},{'p' if part == 'test' else ''}" for part, names in (("train", split.ids), ("val", split.ids), ("test", split.ids)) for name in names]
        assert (tmp_path / "splits.csv").read_text().splitlines() == ["id,split,group", *went]


def test_the_pictures_of_several_labels_have_the_auroc_of_each_and_no_confusion_matrix(tmp_path, monkeypatch):
    split, predictions = several(one_class=True)
    drawn, bars = [], run.plots.grouped_bars
    monkeypatch.setattr(run.plots, "grouped_bars", lambda path, series, *more: drawn.append(series) or bars(path, series, *more))
    run.write_evaluation(tmp_path, split, LABELS, predictions, np.zeros((60, 3)), [{"epoch": 1, "loss": .5}])
    assert sorted(os.listdir(tmp_path / "figures")) == ["coverage.png", "curves.png", "labels.png", "reliability.png"]
    assert len(read_predictions(tmp_path / "predictions.csv")) == 60
    for name, p in predictions.items():
        np.testing.assert_equal(drawn[0][name], metrics.summary(split.labels, p)["per_label"]["auroc"])


def test_predict_names_every_finding_or_none(tmp_path, monkeypatch, capsys):
    p = np.array([[.9, .2, .5], [.1, .2, .3]])
    kinds = {"entropy": np.array([[.1, .2, .6], [.5, .5, .2]]), "spread": np.zeros((2, 3))}
    split = Split(np.zeros((2, 1, 28, 28), np.uint8), np.full((2, 3), -1, np.float32), ["there/a.png", "b.png"])
    method = types.SimpleNamespace(METHOD="m", Config=None, build=None, read_split=lambda *given: (split, ["c.png: unreadable"]),
                                   evaluate=lambda nets, split, config, device: ({"m": p, "resnet": p}, kinds))
    config = diffmic.Config(output=str(tmp_path))
    config.uncertainty = "entropy"
    monkeypatch.setattr(run, "load_model", lambda *given: (config, None, dict(classes=LABELS, multilabel=True), "cpu"))
    bars = []
    monkeypatch.setattr(run.plots, "panel", lambda path, image, title, shown, lines, most: bars.append((path.name, title, shown, lines, most)))
    run.predict_command(method, "best.pt", ["a.png", "b.png"], str(tmp_path / "out"))
    first, second, problem, where = capsys.readouterr().out.splitlines()
    assert first == "there/a.png  effusion  p 0.900, nodule  p 0.500  entropy 0.300  spread 0.000"
    assert second == "b.png  no finding  entropy 0.400  spread 0.000"
    assert problem == "c.png: unreadable" and "predictions.csv" in where
    assert bars == [("0000-a.png", "effusion, nodule: a.png", dict(zip(LABELS, p[0])), ["entropy 0.300", "spread 0.000"], 3),
                    ("0001-b.png", "no finding: b.png", dict(zip(LABELS, p[1])), ["entropy 0.400", "spread 0.000"], 3)]
    rows = read_predictions(tmp_path / "out" / "predictions.csv")
    assert [(r["true"], r["predicted"], r["uncertainty"]) for r in rows] == [("", "effusion|nodule", "0.300000"), ("", "", "0.400000")]


# ----------------------------------------------------------------------------- non-finite numbers, signals

def test_the_finite_check_names_the_first_bad_step_and_its_images():
    check = run.FiniteCheck(every=3)
    one, bad = torch.tensor(1.), torch.tensor(math.nan)
    for step in range(5):
        check(one, one, step, ["a"])
    check.flush()
    check(one, one, 5, ["fine"])
    check(one, bad, 6, ["x", "y", "z", "w"])                            # a gradient's norm; not looked at before the third
    with pytest.raises(run.WorkError, match="step 6, batch of x, y, z.*--lr"):
        check(bad, one, 7, ["later"])
    check.flush()                                                       # and it forgets what it has told
    for value in (math.inf, -math.inf):
        with pytest.raises(run.WorkError, match="step 0"):
            run.FiniteCheck(every=1)(torch.tensor(value), one, 0, ["a"])


def steps_until(send, second_signal=False):
    """Ten steps of three parts each; `send` raises a signal within the third. What was done, saved and said."""
    done, saved = [], []
    with run.signals():
        try:
            with run.defer_signals(lambda: saved.append(list(done)), "go on"):
                for i in run.progress(range(10), "steps"):
                    if i == 2:
                        os.kill(os.getpid(), send)
                    if i == 2 and second_signal:
                        os.kill(os.getpid(), send)
                    done.append(i)
        except run.Interrupted as stop:
            return done, saved, stop
    raise AssertionError("it did not stop")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step_and_then_saves(number):
    done, saved, stop = steps_until(number)
    assert done == [0, 1, 2] and saved == [[0, 1, 2]] and stop.signum == number and stop.note == "go on"


def test_a_second_signal_does_not_wait_and_saves_no_torn_step():
    done, saved, stop = steps_until(signal.SIGINT, second_signal=True)
    assert done == [0, 1] and saved == [] and stop.signum == signal.SIGINT


def test_a_signal_outside_the_loop_stops_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(run.Interrupted), run.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with run.signals():                                                 # what was pending once is forgotten
        assert list(run.progress(range(3), "steps")) == [0, 1, 2]


# ----------------------------------------------------------------------------- several processes

def processes(work, tmp_path, n=2):
    """Runs work(rank) in n processes that torch.distributed joins; what each returns."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(n):
        if pid := os.fork():
            children.append(pid)
            continue
        code = 1
        try:                                                            # a child: it never comes back to pytest
            torch.set_num_threads(1)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            signal.alarm(120)
            with open(tmp_path / f"err{rank}", "w", buffering=1) as err, contextlib.redirect_stderr(err):
                try:
                    run.start(diffmic.Config(device="cpu"))
                    torch.save(work(rank), tmp_path / f"result{rank}")
                    torch.distributed.destroy_process_group()
                    code = 0
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    assert codes == [0] * n, "\n".join((tmp_path / f"err{r}").read_text() for r in range(n))
    arrays = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Int64DType]
    with torch.serialization.safe_globals(arrays):
        return [torch.load(tmp_path / f"result{r}", weights_only=True) for r in range(n)]


def test_gather_puts_the_rows_of_all_processes_in_their_order(tmp_path):
    whole = {"p": np.arange(14.).reshape(7, 2), "u": np.arange(7)}      # 7 rows: 4 and 3

    def work(rank):
        assert (run.rank(), run.world()) == (rank, 2)
        return run.gather({k: v[rank::2] for k, v in whole.items()})
    for got in processes(work, tmp_path):
        assert {k: v.tolist() for k, v in got.items()} == {k: v.tolist() for k, v in whole.items()}
        assert got["u"].dtype == whole["u"].dtype
    assert run.gather(whole) is whole


def test_gather_takes_fewer_rows_than_processes_and_none_at_all(tmp_path):
    for got in processes(lambda rank: [run.gather({"p": np.arange(2.)[None]} if rank == 0 else {}), run.gather({})], tmp_path):
        assert got[0]["p"].tolist() == [[0., 1.]] and got[1] == {}


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    """A mean over images and MMD, which sees all rows at once: two halves give what one process gives."""
    torch.manual_seed(0)
    x, target, start = torch.randn(16, 5), torch.randn(16, 3), nn.Linear(5, 3)

    def gradients(x, target):
        net = nn.Linear(5, 3)
        net.load_state_dict(start.state_dict())
        y = net(x)
        ((y - target) ** 2).mean().backward(retain_graph=True)
        mmd_rbf(run.all_rows(target), run.all_rows(y), 3.).backward()
        run.average_gradients(net.parameters())
        return [p.grad for p in net.parameters()]
    want = gradients(x, target)
    for got in processes(lambda rank: gradients(x[rank::2], target[rank::2]), tmp_path):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


TINY = ("--limit 26 --epochs 1 --pretrain-epochs 1 --batch-size 8 --width 8 --rois 2 --hidden 8 --steps 2 --samples 1 --timesteps 40 "
        "--size 28 --device cpu").split()


def test_two_processes_train_on_every_image_once_and_one_of_them_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(run.score, "__defaults__", (None, 2))           # resamples of the intervals

    def work(rank):
        seen, wrote = [], []
        real_step, real_write = diffmic.train_step, run.write
        diffmic.train_step = lambda nets, ema, config, batch, joint: (seen.append(batch.index.tolist()), real_step(nets, ema, config, batch, joint))[1]
        run.write = lambda path, content: (wrote.append(Path(path).name), real_write(path, content))
        real_save = run.State.save
        if rank == 0:                                                   # slow: if the other may read best.pt too early, it does
            monkeypatch.setattr(run.State, "save", lambda self, path: (time.sleep(.3), real_save(self, path)))
        text = io.StringIO()
        kept = {}
        real_load = run.State.load_best
        monkeypatch.setattr(run.State, "load_best", lambda self, path: (real_load(self, path), kept.update(self.nets.named_parameters()))[0])
        with contextlib.redirect_stdout(text):
            code = diffmic.main([*TINY, "--output", str(tmp_path / "run")])
        return dict(code=code, seen=seen, wrote=wrote, text=text.getvalue(), weights={k: v.detach() for k, v in kept.items()})
    first, second = processes(work, tmp_path)
    assert first["code"] == second["code"] == 0
    steps = [a + b for a, b in zip(first["seen"], second["seen"], strict=True)]
    for epoch in (steps[:4], steps[4:]):                                # 26 images in 4 batches
        assert sorted(sum(epoch, [])) == list(range(26)) and {len(s) for s in epoch} == {6, 7}
    assert {"config.json", "last.pt", "best.pt", "log.jsonl", "metrics.json", "predictions.csv"} <= set(first["wrote"]) and second["wrote"] == []
    assert "epoch 2/2" in first["text"] and second["text"] == ""
    assert same(first["weights"], second["weights"]) and len(first["weights"]) > 50
    predictions = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    assert len(predictions) == 27 and len({line.split(",")[0] for line in predictions}) == 27


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_of_the_processes_are_the_batches_of_one(world):
    split = Split(np.zeros((23, 1, 28, 28), np.uint8), np.arange(23) % 2, [str(i) for i in range(23)])
    for train in (True, False):
        alone = [b.index.tolist() for b in Batches(split, 6, train=train, seed=1)]
        shares = [[b.index.tolist() for b in Batches(split, 6, train=train, seed=1, rank=r, world=world)] for r in range(world)]
        assert sorted(sum((sum(s, []) for s in shares), [])) == list(range(23))
        if train:
            assert [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)] == [sorted(b) for b in alone]


@pytest.mark.parametrize("asked, number", [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_by_its_number_which_set_device_asks_for(asked, number, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *given, **more: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    switches = [(module, name, getattr(module, name)) for module, name in
                ((torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"), (torch.backends.cudnn, "benchmark"))]
    try:
        assert run.start(diffmic.configure(data="toy", device=asked)) == torch.device("cuda", number) and chosen == [number]
    finally:
        for switch in switches:                                         # monkeypatch (pytest 9.2) would delete what such a module only looks up
            setattr(*switch)
