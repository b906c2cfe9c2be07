"""What a whole run survives: signals, kill -9, a full disk, non-finite numbers, bad files. A run is always brought to its end.

Nearly every run here is a fork of this process (a fresh one costs seconds), told to misbehave at a chosen call of a chosen
function, so that nothing depends on the clock. All of it for DiffMIC; what the four methods promise alike is in test_promises.py.
"""
import contextlib
import copy
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
import diffmic
from common import run
from data import toy
from tests.test_run import same

ARGS = ("--limit 26 --epochs 2 --pretrain-epochs 1 --batch-size 8 --width 8 --rois 2 --hidden 16 --steps 2 --samples 2 --timesteps 40 "
        "--size 28 --device cpu").split()
STEPS, EPOCHS = 4, 3                                                    # an epoch, a run


class Ended(NamedTuple):
    code: int                           # -9: killed
    out: str
    err: str

    def errors(self):
        """The complaints: what is on stderr but for progress."""
        return [line for line in self.err.splitlines() if not re.fullmatch(r".+: \d+/\d+, .+ s left", line)]


class Shallow(diffmic.ResNet):
    """One block a stage instead of two: half the time, and the same kinds of tensors."""

    def __init__(self, *args):
        super().__init__(*args)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            del stage[1:]


@functools.cache
def drawn(seed, size, n, make=toy.make):
    return make(seed, size, dict(n))


@functools.cache
def once():
    """What every fork would do anew."""
    for make in (toy.make, toy.make_xray):
        drawn(0, 28, (("train", 126), ("val", 126), ("test", 126)), make)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])              # imports 800 modules


def lighten(method, measure=False):
    """For good: data drawn once, shallow networks, few resamples, no pictures and no measurements beside the scores."""
    for name, make in (("make", toy.make), ("make_xray", toy.make_xray)):
        setattr(toy, name, lambda seed, size, n, make=make: copy.copy(drawn(seed, size, tuple(n.items()), make)))
    method.ResNet = Shallow
    run.score.__defaults__ = None, 5
    for name in ("curves", "confusion", "reliability", "coverage", "grouped_bars"):
        setattr(run.plots, name, lambda *a, **k: None)
    if not measure:
        method.measure = lambda *a, **k: {}


def launch(argv, folder, prepare=None, stdout=None, method=diffmic, measure=False):
    """A fork that runs the command with one thread, as `lighten` has it; `prepare()` makes it misbehave."""
    once()
    if pid := os.fork():
        return pid
    code = 99
    try:                                                                # the child never comes back to pytest
        signal.alarm(300)
        torch.set_num_threads(1)
        sys.stdout.flush()
        out, err = (os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr"))
        os.dup2(stdout or out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", encoding="utf-8", closefd=False), open(2, "w", encoding="utf-8", buffering=1, closefd=False)
        lighten(method, measure)
        if prepare:
            prepare()
        code = method.main([str(a) for a in argv])
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid, folder):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, *((folder / name).read_text("utf-8", "surrogateescape") for name in ("stdout", "stderr")))


@pytest.fixture
def fork(tmp_path_factory):
    """fork(*argv, prepare=None) -> Ended."""
    folder = tmp_path_factory.mktemp("streams")
    return lambda *argv, **options: finish(launch(argv, folder, **options), folder)


def at(owner, name, call, act):
    """To be called in a child: the call-th call of owner.name is preceded by act(*arguments)."""
    real, count = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            act(*args)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)


def send(number):
    return lambda *args: os.kill(os.getpid(), number)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def result(folder):
    """All that a run leaves, but for what tells the time (as does some of method_specific): compared bit for bit."""
    metrics = json.loads((folder / "metrics.json").read_text())
    last, best = (run.load_checkpoint(folder / name, metrics["method"]) for name in ("last.pt", "best.pt"))
    timeless = lambda rows: [{k: str(v).replace("nan", "None") for k, v in row.items() if "seconds" not in k} for row in rows]
    return dict(last={k: last[k] for k in ("nets", "ema", "optimizer")}, best={k: best[k] for k in ("nets", "ema", "optimizer")},
                position={k: v for k, v in last["position"].items() if k != "history"}, history=timeless(last["position"]["history"]),
                log=timeless(json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()),
                predictions=(folder / "predictions.csv").read_bytes(), metrics={k: str(v) for k, v in metrics.items() if k not in ("seconds", "commit", "method_specific")})


def assert_same_run(folder, reference):
    want, got = result(reference), result(folder)
    different = [k for k in want if not same(got[k], want[k])]
    assert not different, f"differs from the uninterrupted run in {different}"
    assert [row["epoch"] for row in got["log"]] == ["1", "2", "3"] and got["log"] == got["history"]
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a run that nothing disturbed; beside it, the names of its files in the order in which it wrote them."""
    folder = tmp_path_factory.mktemp("reference")
    ended = finish(launch([*ARGS, "--output", folder / "run"], folder, prepare=lambda: note_files(folder / "files")), folder)
    assert ended.code == 0, ended.err
    assert sorted(p.name for p in (folder / "run").iterdir() if p.name != "figures") == \
        ["best.pt", "config.json", "last.pt", "log.jsonl", "metrics.json", "predictions.csv", "splits.csv"]
    assert run.load_checkpoint(folder / "run" / "last.pt", "diffmic")["position"]["step"] == STEPS * EPOCHS
    return folder / "run"


# ----------------------------------------------------------------------------- Ctrl-C and SIGTERM

MOMENTS = {                                                             # where a signal arrives: owner, function, which call
    "within the second step": (diffmic, "train_step", 2),
    "between gradient and step": (run, "average_gradients", 6),
    "within the last step of an epoch": (diffmic, "train_step", 2 * STEPS),
    "while the warm-up is validated": (diffmic, "evaluate", 1),
    "while sampling for validation": (diffmic, "sample", 1),
    "while best.pt is saved": (torch, "save", 2),
    "while last.pt is saved": (torch, "save", 3),
    "while the log is written": (run.State, "close_epoch", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(moment, reference, fork, tmp_path):
    out, number = tmp_path / "run", (signal.SIGTERM, signal.SIGINT)[list(MOMENTS).index(moment) % 2]
    stopped = fork(*ARGS, "--output", out, prepare=lambda: at(*MOMENTS[moment], send(number)))
    assert stopped.code == 128 + number, stopped.err
    assert len(stopped.errors()) == 1 and number.name in stopped.err and "Traceback" not in stopped.err
    at_step = run.load_checkpoint(out / "last.pt", "diffmic")["position"]["step"]
    assert at_step == {"within the second step": 2, "between gradient and step": 6, "within the last step of an epoch": 8,
                       "while the warm-up is validated": 4, "while sampling for validation": 8, "while best.pt is saved": 8,
                       "while last.pt is saved": 8, "while the log is written": 12}[moment]
    assert not (out / "metrics.json").exists()
    resumed = fork("--resume", out)
    assert resumed.code == 0 and not resumed.errors(), resumed.err
    assert_same_run(out, reference)


def test_a_run_stopped_at_every_other_step_goes_on_to_the_same_weights(reference, fork, tmp_path):
    out = tmp_path / "run"
    argv, stops = [*ARGS, "--output", out], 0
    while (ended := fork(*argv, prepare=lambda: at(diffmic, "train_step", 2, send(signal.SIGTERM)))).code == 143:
        argv, stops = ["--output", out, "--resume"], stops + 1
    assert ended.code == 0 and stops == STEPS * EPOCHS // 2
    assert_same_run(out, reference)


def test_a_signal_after_training_loses_nothing(reference, fork, tmp_path):
    out = tmp_path / "run"
    stopped = fork(*ARGS, "--output", out, prepare=lambda: at(run.State, "load_best", 1, send(signal.SIGINT)))
    assert stopped.code == 130 and len(stopped.errors()) == 1
    assert fork("--resume", out).code == 0
    assert_same_run(out, reference)


def test_two_signals_stop_at_once_and_leave_the_last_whole_checkpoint(reference, fork, tmp_path):
    out = tmp_path / "run"
    stopped = fork(*ARGS, "--output", out, prepare=lambda: at(run, "update_ema", 6, lambda *a: (send(signal.SIGINT)(), send(signal.SIGINT)())))
    assert stopped.code == 130 and "Traceback" not in stopped.err
    assert run.load_checkpoint(out / "last.pt", "diffmic")["position"]["step"] == STEPS, "step 6 was torn: the weights were new, their average was not"
    assert fork("--resume", out).code == 0
    assert_same_run(out, reference)


# ----------------------------------------------------------------------------- kill -9

def kill_at_file(n, when="half-written", real=os.replace):
    """To be called in a child: kill -9 at the n-th file that it writes."""
    count = [0]

    def replace(a, b):
        count[0] += 1
        if count[0] == n and when == "half-written":
            os.truncate(a, os.path.getsize(a) // 2)
        if count[0] == n and when != "after":
            send(signal.SIGKILL)()
        real(a, b)
        if count[0] == n:
            send(signal.SIGKILL)()
    os.replace = replace


def note_files(path, real=os.replace):
    """To be called in a child: a line for each file that it writes."""
    def replace(a, b):
        real(a, b)
        with open(path, "a") as f:
            f.write(f"{Path(b).name}\n")
    os.replace = replace


def until_done(out):
    """The command that brings a run to its end."""
    return ["--resume", out] if (out / "last.pt").exists() else [*ARGS, "--output", out]


@pytest.mark.parametrize("when, every", [("half-written", False), *(pytest.param(w, True, marks=pytest.mark.slow) for w in ("half-written", "before", "after"))])
def test_a_run_killed_at_any_of_its_files_goes_on_to_the_same_end(when, every, reference, tmp_path):
    """kill -9 at the n-th file: when half of its bytes are written, before it gets its name, or just after. Every file, or of each name the middle one."""
    files = reference.with_name("files").read_text().split()
    assert len(files) >= 3 + 2 * EPOCHS + 1, "config, the log and last.pt each epoch, best.pt twice, predictions and metrics"
    by_name = [[n for n, file in enumerate(files, 1) if file == name] for name in dict.fromkeys(files)]
    chosen = range(1, len(files) + 1) if every else [numbers[len(numbers) // 2] for numbers in by_name]
    for pair in (chosen[i:i + 2] for i in range(0, len(chosen), 2)):    # at once: two cores, and each run takes one
        outs, streams = [tmp_path / f"run{n}" for n in pair], [tmp_path / f"streams{n}" for n in pair]
        for folder in streams:
            folder.mkdir()
        begun = [launch([*ARGS, "--output", out], folder, prepare=lambda: kill_at_file(n, when)) for n, out, folder in zip(pair, outs, streams)]
        for n, out, pid, folder in zip(pair, outs, begun, streams):
            ended = finish(pid, folder)
            assert ended.code == -9, f"file {n}: {ended}"
            if (out / "metrics.json").exists():
                assert (out / "predictions.csv").exists(), "metrics.json says finished: it must be the last file"
        begun = [launch(until_done(out), folder) for out, folder in zip(outs, streams)]
        for out, pid, folder in zip(outs, begun, streams):
            ended = finish(pid, folder)
            assert ended.code == 0 and not ended.errors(), ended.err
            assert_same_run(out, reference)
            shutil.rmtree(out)


def random_kills(kills, start, reference, tmp_path, longest, args=ARGS, seed=None):
    """Starts and kills runs at random moments, going on until each is done; as many kills as asked for."""
    seed = random.randrange(10 ** 6) if seed is None else seed
    method = json.loads((reference / "metrics.json").read_text())["method"]
    print("seed", seed)
    dice, done, runs = random.Random(seed), 0, 0
    while done < kills:
        runs += 1
        out = tmp_path / f"run{runs}"
        while True:
            process = start(["--resume", out] if (out / "last.pt").exists() else [*args, "--output", out])
            if done < kills:
                time.sleep(dice.uniform(0, longest))
            else:
                process = process()                                     # to its end
                break
            code = process(kill=True)
            done += code == -9
            assert code in (0, -9), f"run {runs} after {done} kills ended with {code}"
            assert not (out / "last.pt").exists() or run.load_checkpoint(out / "last.pt", method)
            if code == 0:
                break
        if (out / "metrics.json").exists():
            assert_same_run(out, reference)
        shutil.rmtree(out)


def test_a_run_killed_at_random_moments_goes_on_to_the_same_end(reference, tmp_path):
    def start(argv):
        pid = launch(argv, tmp_path)

        def end(kill=False):
            if kill:
                os.kill(pid, signal.SIGKILL)
            ended = finish(pid, tmp_path)
            assert not ended.errors(), ended.err
            return ended.code
        return end
    random_kills(5, start, reference, tmp_path, longest=1.5 * json.loads((reference / "metrics.json").read_text())["seconds"])


@pytest.mark.slow
def test_the_command_itself_killed_30_times_goes_on_to_the_same_end(tmp_path):
    """The true command in a process of its own, nothing replaced, killed 30 times."""
    def start(argv):
        process = subprocess.Popen([sys.executable, ROOT / "diffmic.py", *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        first = process.stdout.readline()                               # imports are over

        def end(kill=False):
            if kill:
                process.kill()
            _, err = process.communicate()
            assert first and "Traceback" not in err, err
            return process.returncode
        return end
    began = time.monotonic()
    assert start([*ARGS, "--output", tmp_path / "reference"])() == 0
    random_kills(30, start, tmp_path / "reference", tmp_path, longest=time.monotonic() - began)


# ----------------------------------------------------------------------------- what resume and output refuse

def test_a_folder_that_holds_a_run_is_left_alone(reference, fork, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    before = {p.name: sha256(p) for p in (tmp_path / "run").iterdir() if p.is_file()}
    for argv in ([*ARGS, "--output"], ["eval", "--checkpoint", reference / "best.pt", "--output"]):
        ended = fork(*argv, tmp_path / "run")
        assert ended.code == 2 and len(ended.errors()) == 1 and "--output" in ended.err
    ended = fork("--resume", tmp_path / "run")
    assert ended.code == 0 and "finished already" in ended.out and "metrics.json" in ended.out
    assert {p.name: sha256(p) for p in (tmp_path / "run").iterdir() if p.is_file()} == before


def test_a_resumed_run_keeps_its_settings(reference, fork, tmp_path):
    out = tmp_path / "run"
    assert fork(*ARGS, "--output", out, prepare=lambda: at(diffmic, "train_step", 2, send(signal.SIGTERM))).code == 143
    before = sha256(out / "last.pt")
    for argv in (["--epochs", 5], ["--lr", 1], ["--no-baseline"], ["--seed", 1]):
        ended = fork("--resume", out, *argv)
        assert ended.code == 2 and len(ended.errors()) == 1 and argv[0].replace("no-", "") in ended.err and "keeps its settings" in ended.err
    assert sha256(out / "last.pt") == before
    assert fork("--resume", out / "last.pt", *ARGS).code == 0, "the same settings, said again, are no change"
    assert_same_run(out, reference)


@pytest.mark.parametrize("argv", [["--resume"], ["--resume", "nowhere"], ["--resume", "--output", "nowhere"]], ids=str)
def test_resume_of_nothing_is_an_error(argv, fork):
    ended = fork(*argv)
    assert ended.code == 2 and len(ended.errors()) == 1 and ended.err.startswith("error: --resume")


def test_a_damaged_checkpoint_stops_resume_and_stays_as_it_is(reference, fork, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    raw = bytearray((tmp_path / "run" / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 4
    for damaged in (raw, raw[:len(raw) // 2], b""):
        (tmp_path / "run" / "last.pt").write_bytes(damaged)
        ended = fork("--resume", tmp_path / "run")
        assert ended.code == 2 and len(ended.errors()) == 1 and "last.pt" in ended.err, ended
        assert (tmp_path / "run" / "last.pt").read_bytes() == damaged


# ----------------------------------------------------------------------------- numbers that are not finite

def poison_batch(nets, ema, config, batch, joint):
    batch.x[3] = math.nan


def poison_weight(nets, ema, config, batch, joint):
    next(nets.encoder.parameters()).data[0] = math.inf


def poison_gradient(nets, ema, config, batch, joint):
    next(nets.guide.parameters()).register_hook(lambda g: g * math.nan)


@pytest.mark.parametrize("poison", [poison_batch, poison_weight, poison_gradient])
def test_a_number_that_is_not_finite_stops_the_run_and_harms_nothing(poison, reference, fork, tmp_path):
    out = tmp_path / "run"

    def act(*args):
        shutil.copy(out / "last.pt", tmp_path / "then.pt")
        poison(*args)
    ended = fork(*ARGS, "--output", out, prepare=lambda: at(diffmic, "train_step", STEPS + 2, act))
    assert ended.code == 1 and len(ended.errors()) == 1 and ended.errors()[0].startswith("error: "), ended
    assert f"step {STEPS + 1}," in ended.err and re.search(r"train-\d{5}, train-\d{5}", ended.err) and "--lr" in ended.err
    assert sha256(out / "last.pt") == sha256(tmp_path / "then.pt")
    assert fork("--resume", out).code == 0
    assert_same_run(out, reference)


@pytest.mark.parametrize("options", [["--lr", "1e9"], ["--lr", "1e38", "--clip", "0", "--warmup", "0"],
                                     ["--guide-lr", "1e30"], ["--lr", "1e9", "--no-baseline"]], ids=str)
def test_an_absurd_learning_rate_ends_in_one_line(options, fork, tmp_path):
    """Either a step's loss is not finite, or the numbers stay finite and the run ends; never a traceback."""
    ended = fork(*ARGS, *options, "--output", tmp_path / "run")
    if ended.code:
        assert ended.code == 1 and len(ended.errors()) == 1 and "not finite" in ended.err and "step" in ended.err, ended
    else:
        assert "nan" not in (tmp_path / "run" / "predictions.csv").read_text()
    assert ended.code or "1e9" not in options, "1e9 is meant to fail"


@pytest.mark.parametrize("options", [["--batch-size", 1], ["--limit", 27, "--batch-size", 2],
                                     ["--grad-accum", 8], ["--grad-accum", 4], ["--eval-batch-size", 1]], ids=str)
def test_batches_of_one_image_train_or_are_refused(options, fork, tmp_path):
    """A batch norm cannot train on one image: whatever is done about it, it is not a traceback."""
    ended = fork(*ARGS, "--epochs", 1, *options, "--output", tmp_path / "run")
    assert ended.code == 0 or ended.code == 2 and len(ended.errors()) == 1 and re.search("--batch-size|--grad-accum", ended.err), ended


# ----------------------------------------------------------------------------- disk and streams

@pytest.mark.parametrize("limit, file", [(100_000, "last.pt"), (100_000, "best.pt"), (200, "log.jsonl")])
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_file(limit, file, reference, fork, tmp_path):
    """RLIMIT_FSIZE from the middle of an epoch on: the next file of that size fails half-way, as on a full disk."""
    out = tmp_path / "run"
    call = 2 if file == "best.pt" else STEPS + 2 if file == "last.pt" else 2

    def full(*args):
        if (out / "last.pt").exists():
            shutil.copy(out / "last.pt", tmp_path / "then.pt")
        if file == "last.pt":
            run.State.keep_best = lambda *a: None                       # so that last.pt is the first that fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                   # as Python does at its start
        at(*((run.State, "keep_best") if file == "best.pt" else (diffmic, "train_step")), call, full)
    ended = fork(*ARGS, "--output", out, prepare=prepare)
    assert ended.code == 1 and len(ended.errors()) == 1, ended
    assert ended.errors()[0].startswith("error: ") and file in ended.err, ended.err
    assert (out / "last.pt").exists() == (tmp_path / "then.pt").exists()
    if (tmp_path / "then.pt").exists():
        assert sha256(out / "last.pt") == sha256(tmp_path / "then.pt")
    assert not [p for p in out.iterdir() if p.name.endswith(".tmp")]
    ended = fork(*until_done(out))
    assert ended.code == 0 and not ended.errors(), ended.err
    assert_same_run(out, reference)


def test_an_output_that_cannot_be_is_refused_before_training(fork, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/nothing/run"):
        ended = fork(*ARGS, "--output", place)
        assert ended.code == 2 and len(ended.errors()) == 1 and "--output" in ended.err and "epoch" not in ended.out, ended


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_refused_before_training(fork, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    ended = fork(*ARGS, "--output", tmp_path / "locked" / "run")
    assert ended.code == 2 and len(ended.errors()) == 1 and "--output" in ended.err


@pytest.mark.parametrize("command", ["--help", "train"])
def test_a_closed_pipe_is_no_traceback(command, tmp_path):
    """`python diffmic.py | head -1`, in a process of its own: the interpreter's end must be silent as well."""
    read, write = os.pipe()
    if command == "--help":
        os.close(read)
    process = subprocess.Popen([sys.executable, ROOT / "diffmic.py", *(["--help"] if command == "--help" else [*ARGS, "--output", tmp_path / "run"])],
                               stdout=write, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(write)
    if command == "train":
        assert os.read(read, 10).startswith(b"diffmic")                 # `head -1` has seen its line and goes
        os.close(read)
    _, err = process.communicate(timeout=120)
    assert not Ended(process.returncode, "", err).errors() and process.returncode in (0, 141), (process.returncode, err)


# ----------------------------------------------------------------------------- eval and predict

def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        return {row["id"]: row for row in csv.DictReader(f)}


def probabilities(row):
    return np.array([float(v) for k, v in row.items() if k.startswith("p:")])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Toy lesions as a user's files: every kind that cameras and archives leave."""
    folder = tmp_path_factory.mktemp("pictures")
    images = [Image.fromarray(x.transpose(1, 2, 0)) for x in toy.make(5, 64, {"train": 1, "val": 1, "test": 9}).test.images]
    names = "plain.png", "photo.jpg", "b ü 文.png", "cmyk.jpg", "palette.png", "alpha.png", "deep.png", "grey.bmp", "two.tiff"
    for name, image in zip(names, images):
        if name == "deep.png":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        mode = {"cmyk.jpg": "CMYK", "palette.png": "P", "alpha.png": "RGBA", "grey.bmp": "L"}.get(name)
        (image.convert(mode) if mode else image).save(folder / name)
    return folder


def test_eval_repeats_the_scores_of_the_training_run_exactly(reference, fork, tmp_path):
    ended = fork("eval", "--checkpoint", reference / "best.pt", "--output", tmp_path / "eval")
    assert ended.code == 0 and not ended.errors(), ended.err
    assert sha256(tmp_path / "eval" / "predictions.csv") == sha256(reference / "predictions.csv")
    trained, scored = (json.loads((p / "metrics.json").read_text()) for p in (reference, tmp_path / "eval"))
    assert str(scored["test"]) == str(trained["test"]) and str(scored["baselines"]["resnet"]) == str(trained["baselines"]["resnet"])
    assert f"{trained['test']['accuracy']:.3f}" in ended.out
    before = sha256(reference / "best.pt")
    assert fork("eval", "--checkpoint", reference / "best.pt", "--samples", 1, "--sampler", "ddim", "--steps", 3, "--output", tmp_path / "other").code == 0
    assert sha256(tmp_path / "other" / "predictions.csv") != sha256(reference / "predictions.csv") and sha256(reference / "best.pt") == before


def test_predict_takes_a_folder_several_files_and_every_kind_of_picture(reference, fork, pictures, tmp_path):
    ended = fork("predict", "--checkpoint", reference / "best.pt", pictures, "--output", tmp_path / "all")
    assert ended.code == 0 and not ended.errors(), ended.err
    whole = rows(tmp_path / "all" / "predictions.csv")
    assert sorted(whole) == sorted(str(p) for p in pictures.iterdir())
    for name, row in whole.items():
        p = probabilities(row)
        assert row["true"] == "" and row["predicted"] == toy.CLASSES[p.argmax()] and abs(p.sum() - 1) < 1e-5 and p.min() >= 0
        assert name in ended.out and row["predicted"] in ended.out
    assert len(list((tmp_path / "all").glob("*.png"))) == len(whole), "a panel an image"
    some = [pictures / "photo.jpg", pictures / "b ü 文.png"]
    assert fork("predict", "--checkpoint", reference / "best.pt", *some, "--output", tmp_path / "some").code == 0
    few = rows(tmp_path / "some" / "predictions.csv")
    assert list(few) == [str(p) for p in some]
    assert all(r["predicted"] == whole[i]["predicted"] and abs(probabilities(r) - probabilities(whole[i])).max() <= 1.1e-5 for i, r in few.items())


def test_predict_names_a_broken_file_or_goes_on_without_it(reference, fork, pictures, tmp_path):
    good, raw = tmp_path / "good.png", (pictures / "plain.png").read_bytes()
    good.write_bytes(raw)
    broken = {"cut.png": raw[:len(raw) // 2], "empty.png": b"", "text.png": b"hello", "missing.png": None,
              "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"}
    for name, content in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        ended = fork("predict", "--checkpoint", reference / "best.pt", good, tmp_path / name, "--output", tmp_path / "out")
        assert ended.code == 2 and len(ended.errors()) == 1 and name in ended.err and not (tmp_path / "out").exists(), ended
    ended = fork("predict", "--checkpoint", reference / "best.pt", good, *(tmp_path / n for n in broken), "--skip-bad", "--output", tmp_path / "out")
    assert ended.code == 0 and list(rows(tmp_path / "out" / "predictions.csv")) == [str(good)], ended
    assert all(name in ended.out for name in broken)
    (tmp_path / "nothing").mkdir()
    ended = fork("predict", "--checkpoint", reference / "best.pt", tmp_path / "nothing")
    assert ended.code == 2 and "nothing" in ended.err


def test_a_picture_of_nan_gives_finite_probabilities(reference, fork, tmp_path):
    Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "black.png")
    assert fork("predict", "--checkpoint", reference / "best.pt", tmp_path / "nan.tiff", tmp_path / "black.png", "--output", tmp_path / "out").code == 0
    for row in rows(tmp_path / "out" / "predictions.csv").values():
        assert np.isfinite(probabilities(row)).all() and abs(probabilities(row).sum() - 1) < 1e-5


def test_blanks_letters_of_all_kinds_and_bytes_that_are_no_letters_do_no_harm(reference, fork, pictures, tmp_path):
    home = tmp_path / "my runs ü 文 'quoted'"
    assert fork(*ARGS, "--output", home / "a run").code == 0
    assert_same_run(home / "a run", reference)
    strange = os.fsdecode(os.fsencode(str(tmp_path)) + b"/latin-\xfc.png")
    shutil.copy(pictures / "plain.png", strange)
    ended = fork("predict", "--checkpoint", home / "a run" / "best.pt", strange, pictures / "b ü 文.png")
    assert ended.code == 0 and not ended.errors(), ended.err
    assert list(rows(home / "a run" / "predict" / "predictions.csv")) == [strange, str(pictures / "b ü 文.png")]
