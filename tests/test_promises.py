"""What all four methods promise alike: shapes of data, mistakes in options, golden losses, determinism, kills and signals, two processes.

Forks of tiny runs, as in test_faults.py, where DiffMIC is killed and stopped in full. `python -m tests.test_promises` writes the golden files anew; do
that only after a change that is meant to change the losses.
"""
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import zlib
from pathlib import Path

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
from data import DataSet, Split, toy
from tests import test_faults
from tests.test_faults import assert_same_run, at, drawn, finish, kill_at_file, launch, lighten, probabilities, random_kills, rows, send, sha256
from tests.test_run import processes, refusal

METHODS = [diffmic, symmflow, diffclassifier, mediffusion]
TINY = {diffmic: test_faults.ARGS}                                      # three epochs of four steps each
TINY |= {method: f"--limit 26 --batch-size 8 --size 28 --width 8 --channels 8 --head-channels 8 --device cpu {more}".split() for method, more in {
    symmflow: "--epochs 2 --pretrain-epochs 1 --mult 1,1 --attention 4 --generated 8 --draw-steps 2",
    diffclassifier: "--epochs 2 --pretrain-epochs 1 --mult 1,1 --attention 2 --votes 5 --val-votes 1 --draw-steps 2",
    mediffusion: "--epochs 2 --pretrain-epochs 1 --mult 1,1 --attention 2 --labelled-batch 4 --labels 0.5 --ae-width 8 --ae-mult 1,1 --ae-blocks 1 "
                 "--ae-latent 2 --hidden 16 --timesteps 50 --draw-steps 2 --remove-start 20 --enforce-start 20 --edit-steps 2 --explained 1"}.items()}
every, others = (pytest.mark.parametrize("method", methods, ids=lambda m: m.METHOD) for methods in (METHODS, METHODS[1:]))


@pytest.fixture
def fork(tmp_path_factory):
    """fork(method, *argv, prepare=None, measure=False) -> test_faults.Ended."""
    folder = tmp_path_factory.mktemp("streams")
    return lambda method, *argv, **options: finish(launch(argv, folder, method=method, **options), folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(method): the folder of a run that nothing disturbed."""
    @functools.cache
    def of(method):
        folder = tmp_path_factory.mktemp("reference")
        ended = finish(launch([*TINY[method], "--output", folder / "run"], folder, method=method), folder)
        assert ended.code == 0 and not ended.errors(), ended.err
        return folder / "run"
    return of


@every
def test_what_has_not_been_trained_yet_is_no_candidate(method, reference):
    log = [json.loads(line) for line in (reference(method) / "log.jsonl").read_text().splitlines()]
    assert ["val_accuracy" in row for row in log] == [False, *[True] * (len(log) - 1)]
    assert all("val_resnet_accuracy" in row for row in log) or method is mediffusion
    assert json.loads((reference(method) / "metrics.json").read_text())["selected_epoch"] > 1


@every
def test_with_select_nll_the_least_picks_the_epoch(method, fork, tmp_path):
    assert fork(method, *TINY[method], "--select", "nll", "--epochs", 4, "--output", tmp_path / "run").code == 0
    found = {row["epoch"]: row["val_nll"] for row in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if "val_nll" in row}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["selected_epoch"] == min(found, key=lambda epoch: (found[epoch], -epoch)) and len(found) > 1


@every
def test_with_select_last_no_epoch_is_picked(method, fork, tmp_path):
    assert fork(method, *TINY[method], "--select", "last", "--output", tmp_path / "run").code == 0
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["selected_epoch"] == len(log) > 1


# ----------------------------------------------------------------------------- every kind of data

def noise(channels, size, classes, multilabel):
    """Eight images of noise in each split, every class in each."""
    rng = np.random.default_rng(0)
    labels = np.arange(8) % classes if not multilabel else (np.arange(8)[:, None] >> np.arange(classes) & 1).astype(np.float32)
    splits = (Split(rng.integers(0, 256, (8, channels, size, size), np.uint8), labels.copy(), [f"{part}-{i}" for i in range(8)])
              for part in ("train", "val", "test"))
    return DataSet(*splits, [f"class {k}" for k in range(classes)], multilabel, channels)


KINDS = list(itertools.product((1, 3), (28, 32, 64), ((2, False), (7, False), (3, True))))
OFTEN = KINDS[2], KINDS[4], KINDS[6], KINDS[10], KINDS[12]              # every number of channels, size and kind of label; the others are slow


@pytest.mark.parametrize("channels, size, labels", [pytest.param(*kind, id=f"{kind[0]}x{kind[1]}-{kind[2][0]}" + "labels" * kind[2][1],
                                                                 marks=[] if kind in OFTEN else pytest.mark.slow) for kind in KINDS])
@every
def test_two_steps_and_an_evaluation_of_every_kind_of_data(method, channels, size, labels, fork, tmp_path):
    argv = [*TINY[method], "--size", size, "--epochs", 1, "--pretrain-epochs", int(method is mediffusion), "--batch-size", 4]
    argv, (classes, multilabel) = argv + ["--labels", 1] * (method is mediffusion), labels
    ended = fork(method, *argv, "--output", tmp_path / "run", measure=size < 64,
                 prepare=lambda: setattr(data, "load", lambda *a, **k: noise(channels, size, classes, multilabel)))
    if multilabel and method is not mediffusion:
        assert ended.code == 2 and len(ended.errors()) == 1 and ended.err.startswith("error: --data toy: has several labels an image"), ended
    else:
        assert ended.code == 0 and not ended.errors(), ended.err
        assert np.isfinite(json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["accuracy"])
        assert len(rows(tmp_path / "run" / "predictions.csv")) == 8


# ----------------------------------------------------------------------------- mistakes

MORE = {"device": ["meta", "cpu:x", "cuda:99"], "augment": ["hflip,nonsense"]}
OWN = {(diffmic, "roi_size"): ["33"], (diffmic, "steps"): ["1001"],     # wider than the image; more than the noise levels
       (mediffusion, "feature_times"): ["1001"], (mediffusion, "labels"): ["0", "1.5"], **{(method, "size"): ["31"] for method in METHODS[1:]}}


def mistakes(method, field):
    """An argv for each way of getting a field wrong, made from its type and the range in its comment."""
    option = "--" + field.name.replace("_", "-")
    wrong = [*MORE.get(field.name, ()), *OWN.get((method, field.name), ())]
    if typing.get_args(field.type):
        wrong += "nonsense", "", "-1"
    elif field.type is bool:
        wrong += "nonsense", "1"
    elif field.type in (int, float):
        wrong += "nonsense", "", "nan", "inf", "1,5", "0x10", "9" * 400
        if field.type is int:
            wrong += "1.5", "1e3", str(2 ** 64)
        limits = re.match(r"\[(.*?)\.\.(.*?)\]", run.field_comments(method.Config)[field.name][1]).groups()
        wrong += [f"{field.type(x) + by:g}" for x, by in zip(limits, (-1, 1)) if x]
    elif field.name == "output":
        wrong += "/dev/null/nonsense", "n" * 300
    elif field.name == "root":
        return [["--data", name, "--root", "/nonsense"] for name in ("folder", "ham10000")]
    else:
        wrong += ["nonsense"]
    return [[f"{option}={x}"] for x in wrong]


@pytest.mark.parametrize("method, field", [pytest.param(m, f, id=f"{m.METHOD}-{f.name}") for m in METHODS for f in dataclasses.fields(m.Config)])
def test_every_mistake_in_an_option_is_one_line_with_its_name(method, field, tmp_path, monkeypatch):
    for name, make in (("make", toy.make), ("make_xray", toy.make_xray)):
        monkeypatch.setattr(toy, name, lambda seed, size, n, make=make: copy.copy(drawn(seed, size, tuple(n.items()), make)))
    wrong = mistakes(method, field)
    for argv in wrong:
        place = [] if field.name == "output" else ["--output", tmp_path / "run"]
        line = refusal(*TINY[method], *place, *argv, method=method)
        assert re.search(rf"--{field.name.replace('_', '-')}\b", line) or field.name == "root" and "/nonsense" in line, f"{argv}: {line}"
        assert len(line) < 600 and not (tmp_path / "run" / "last.pt").exists()
    assert wrong


# ----------------------------------------------------------------------------- golden losses

# Made so that rounding stays rounding: of DiffMIC all 16 windows are regions, for a choice among near equals may fall differently elsewhere, and the
# learning rates are low, for Adam makes a step of full size out of a gradient of 1e-9. Other instruction sets (SSE, AVX2) and two threads then differ
# by 1.3e-6 in DiffMIC; with the defaults it were 4 % by step 20.
STILL = {diffmic: "--pretrain-epochs 2 --rois 16 --guide-lr 1e-5", symmflow: "", diffclassifier: "", mediffusion: "--ae-lr 1e-5 --head-lr 1e-5"}


def golden(method):
    return Path(__file__).with_name(f"golden_{method.METHOD}.txt")


def header():
    """What decides how sums are rounded."""
    with contextlib.suppress(OSError):
        about = sorted({line for line in Path("/proc/cpuinfo").read_text().splitlines() if re.match("model name|flags", line)})
        return f"torch {torch.__version__}, one thread, {torch.backends.cpu.get_cpu_capability()}, kind of CPU {zlib.crc32(''.join(about).encode()):08x}"
    return f"torch {torch.__version__}, one thread, {torch.backends.cpu.get_cpu_capability()}"


def first_losses(method, *rank, options=None, draws=0):
    """The first 20 losses of a tiny run. options: in place of STILL's; draws: another number, other noise for the same images."""
    losses, options = [], ["--lr", "1e-5", *STILL[method].split()] if options is None else options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "seed_of", lambda *of, real=run.seed_of: real(*of, *[draws] * bool(draws)))
        patch.setattr(run.FiniteCheck, "__call__", lambda self, loss, norm, step, ids: losses.append(loss.item()))
        patch.setattr(run.State, "save", lambda self, path: None)
        patch.setattr(method, "evaluate", lambda *a, **k: ({}, {}))
        patch.setattr(run, "validation", lambda *a: {} if len(losses) < 20 else 1 / 0)
        patch.setattr(run, "make_folder", lambda *a: None)
        patch.setattr(run, "write", lambda *a: None)
        with contextlib.suppress(ZeroDivisionError), contextlib.redirect_stdout(io.StringIO()):
            method.main([*TINY[method], "--limit", "40", "--epochs", "8", *options, "--output", "none"])
    return losses[:20]


@every
def test_the_first_20_losses_are_those_of_the_golden_file(method, tmp_path):
    (losses,) = processes(functools.partial(first_losses, method), tmp_path, n=1)
    first, *lines = golden(method).read_text().splitlines()
    want = np.array(lines, float)
    assert len(want) == 20 == len(set(want))
    np.testing.assert_allclose(losses, want, rtol=1e-8 if first.endswith(header()) else 1e-4)      # nine digits tell floats apart


# ----------------------------------------------------------------------------- the same command, the same run

@every
def test_the_same_command_twice_gives_the_same_run_and_another_seed_another(method, reference, fork, tmp_path):
    assert fork(method, *TINY[method], "--output", tmp_path / "run").code == 0
    assert sha256(tmp_path / "run" / "predictions.csv") == sha256(reference(method) / "predictions.csv")
    assert_same_run(tmp_path / "run", reference(method))
    assert fork(method, *TINY[method], "--seed", 1, "--epochs", 1, "--output", tmp_path / "other").code == 0
    assert sha256(tmp_path / "other" / "predictions.csv") != sha256(reference(method) / "predictions.csv")


def assert_same_answers(got, want):
    """Rows of predictions.csv: equal labels, p to 1e-5 and the last digit written."""
    assert list(got) == list(want) and [row["predicted"] for row in got.values()] == [row["predicted"] for row in want.values()]
    assert max(abs(probabilities(got[name]) - probabilities(want[name])).max() for name in want) <= 1.1e-5


@every
def test_eval_gives_the_same_labels_for_every_batch_size(method, reference, fork, tmp_path):
    for size in (1, 7, 64):
        ended = fork(method, "eval", "--checkpoint", reference(method) / "best.pt", "--eval-batch-size", size, "--output", tmp_path / f"b{size}")
        assert ended.code == 0, ended.err
        assert_same_answers(rows(tmp_path / f"b{size}" / "predictions.csv"), rows(reference(method) / "predictions.csv"))


def pictures(method, names, folder):
    """Files of these toy test images; the noise goes by the name, so a file has that of its image."""
    folder.mkdir()
    test = drawn(0, 28, (("train", 126), ("val", 126), ("test", 126)), toy.make_xray if method is mediffusion else toy.make).test
    for name in names:
        Image.fromarray(test.images[test.ids.index(name)].transpose(1, 2, 0).squeeze()).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in names]


@every
def test_a_file_alone_is_classified_as_its_image_in_the_set(method, reference, fork, tmp_path):
    want = rows(reference(method) / "predictions.csv")
    for file in pictures(method, list(want)[:2], tmp_path / "pictures"):
        ended = fork(method, "predict", "--checkpoint", reference(method) / "best.pt", file, "--output", tmp_path / file.stem)
        assert ended.code == 0, ended.err
        (row,) = rows(tmp_path / file.stem / "predictions.csv").values()
        assert_same_answers({file.stem: row}, {file.stem: want[file.stem]})


# ----------------------------------------------------------------------------- kills and signals

@others
def test_a_run_killed_five_times_goes_on_to_the_same_end(method, reference, tmp_path):
    """Every other one while a file is half-written, the rest at any moment."""
    starts, files, kills = itertools.count(), itertools.cycle((2, 5, 3)), [0, 0]

    def start(argv):
        inside, n = sum(kills) < 5 and next(starts) % 2, next(files)     # the last one runs to its end
        pid = launch(argv, tmp_path, prepare=(lambda: kill_at_file(n)) if inside else None, method=method)

        def end(kill=False):
            if kill and not inside:
                os.kill(pid, signal.SIGKILL)
            ended = finish(pid, tmp_path)
            assert not ended.errors(), ended.err
            kills[inside] += ended.code == -9
            return ended.code
        return end
    longest = 1.5 * json.loads((reference(method) / "metrics.json").read_text())["seconds"]
    random_kills(5, start, reference(method), tmp_path, longest, TINY[method], seed=METHODS.index(method))
    assert min(kills) and sum(kills) == 5


@others
def test_a_run_stopped_by_sigterm_and_by_ctrl_c_goes_on_to_the_same_weights_bit_for_bit(method, reference, fork, tmp_path):
    out = tmp_path / "run"
    argv = [*TINY[method], "--output", out]
    for number, more, step in (signal.SIGTERM, 2, 2), (signal.SIGINT, 5, 7):
        stopped = fork(method, *argv, prepare=lambda: at(method, "train_step", more, send(number)))
        assert stopped.code == 128 + number and len(stopped.errors()) == 1 and number.name in stopped.err, stopped.err
        assert run.load_checkpoint(out / "last.pt", method.METHOD)["position"]["step"] == step
        argv = ["--resume", out]
    ended = fork(method, *argv)
    assert ended.code == 0 and not ended.errors(), ended.err
    assert_same_run(out, reference(method))


@others
def test_a_number_that_is_not_finite_names_its_step_and_images_and_harms_nothing(method, fork, tmp_path):
    out = tmp_path / "run"

    def poison(nets, *rest):
        shutil.copy(out / "last.pt", tmp_path / "then.pt")
        next((nets.denoiser if method is diffclassifier else nets.unet).parameters()).data.fill_(np.nan)
    ended = fork(method, *TINY[method], "--output", out, prepare=lambda: at(method, "train_step", test_faults.STEPS + 2, poison))
    assert ended.code == 1 and len(ended.errors()) == 1 and re.match(rf"error: .*step {test_faults.STEPS + 1}, batch of \S+, \S+, ", ended.errors()[0]), ended
    assert sha256(out / "last.pt") == sha256(tmp_path / "then.pt")


# ----------------------------------------------------------------------------- two processes

def written(folder):
    """A list that names what this process makes or writes in a folder from now on."""
    found = []

    def see(event, given):
        if event in ("open", "os.mkdir", "os.rename") and (event != "open" or given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            if isinstance(given[0], (str, bytes, os.PathLike)) and os.fsdecode(given[0]).startswith(str(folder)):
                found.append(os.fsdecode(given[0]))
    sys.addaudithook(see)
    return found


def quietly(method, *argv):
    """The command in this process, a child: exit code and what it printed."""
    lighten(method, measure=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return method.main([str(a) for a in argv]), out.getvalue()


@every
def test_two_processes_evaluate_what_one_does_and_one_of_them_writes(method, reference, tmp_path):
    want, best = rows(reference(method) / "predictions.csv"), reference(method) / "best.pt"
    files = pictures(method, list(want)[:3], tmp_path / "pictures")

    def work(rank):
        names = written(reference(method))
        return *(quietly(method, name, "--checkpoint", best, *paths) for name, paths in (("eval", []), ("predict", files), ("explain", []))), names
    (*first, wrote), (*second, nothing) = processes(work, tmp_path)
    assert [code for code, _ in first + second] == [0, 0, 2] * 2, "explain is the work of one process, and says so"
    assert wrote and not nothing and {said for _, said in second} == {""}
    assert_same_answers(rows(reference(method) / "eval" / "predictions.csv"), want)
    for name, row in rows(reference(method) / "predict" / "predictions.csv").items():
        assert_same_answers({"": row}, {"": want[Path(name).stem]})


@every
def test_two_processes_answer_for_one_picture(method, reference, tmp_path):
    want, best = rows(reference(method) / "predictions.csv"), reference(method) / "best.pt"
    file, = pictures(method, list(want)[:1], tmp_path / "pictures")
    found = processes(lambda rank: quietly(method, "predict", "--checkpoint", best, file, "--output", tmp_path / "out"), tmp_path)
    assert [code for code, _ in found] == [0, 0]
    assert_same_answers({"": next(iter(rows(tmp_path / "out" / "predictions.csv").values()))}, {"": want[list(want)[0]]})


def share_draws(rank, world):
    """To be called in a child: what is drawn for the rows of a batch is drawn for those of all processes, of which each takes its own."""
    count = itertools.count()

    def shared(draw):
        def of_all(*shape, **more):
            rng = torch.Generator().manual_seed(next(count))
            return draw(*(n * world if i == 0 else n for i, n in enumerate(shape)), generator=rng, **more)[rank::world]
        return of_all
    rand, randn, randint = shared(torch.rand), shared(torch.randn), torch.randint
    scalar = torch.tensor(.5)
    torch.rand = lambda *shape, **more: scalar if shape == ((),) else rand(*shape, **more)
    torch.randn_like, torch.rand_like = (lambda x, draw=draw: draw(*x.shape) for draw in (randn, rand))
    torch.randint = lambda high, shape, **more: shared(lambda n, **m: randint(high, (n, *shape[1:]), **m))(shape[0], **more)


STAGES = {mediffusion: "--dropout 0 --ae-lr 0 --labelled-batch 8".split()}             # stage 1 leaves the autoencoder as it is


@every
def test_the_first_step_of_two_processes_is_that_of_one_with_the_whole_batch(method, tmp_path):
    if method is diffmic:
        pytest.skip("DiffMIC's networks have batch norms, which on a CPU see their own half of the batch")

    class Enough(Exception):
        pass

    def work(rank):
        share_draws(rank, run.world())
        seen, step, average = {}, [], run.average_gradients

        def averaged(parameters):
            parameters = list(parameters)
            average(parameters)
            seen["gradients"] = [p.grad for p in parameters if p.grad is not None]

        def stop(self, loss, norm, *more):
            step.append(loss.item())
            if len(step) > steps:
                seen["loss"] = loss.detach()
                raise Enough
        run.average_gradients, run.FiniteCheck.__call__ = averaged, stop
        with contextlib.suppress(Enough):
            quietly(method, *TINY[method], "--limit", 16, "--batch-size", 16, "--recipe", "paper", "--augment=", "--no-baseline", "--lr", 0,
                    *STAGES.get(method, ["--pretrain-epochs", 0]), "--output", tmp_path / f"{steps}-{run.world()}")
        return seen
    for steps in (0, 1) if method is mediffusion else (0,):             # the first of each stage
        (one,) = processes(work, tmp_path, n=1)
        two = processes(work, tmp_path)
        assert sum(found["loss"] for found in two) / 2 == pytest.approx(one["loss"].item(), rel=1e-5)
        largest = max(g.abs().max().item() for g in one["gradients"])
        for found in two:
            for a, b in zip(found["gradients"], one["gradients"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("method", [pytest.param(m, id=m.METHOD, marks=[] if m is diffmic else pytest.mark.slow) for m in METHODS])
def test_the_losses_of_two_processes_are_those_of_one_within_a_tenth_and_its_noise(method, tmp_path):
    """The means of four epochs, beside two runs of one process, each with noise of its own. A batch norm that sees four images instead of eight changes
    DiffMIC's by up to .04 of them, and it has no test above; of the others only the plain ResNet has one."""
    options = [] if method is diffmic else ["--no-baseline"] + ["--pretrain-epochs", "0"] * (method is not mediffusion)
    (ones,) = processes(lambda rank: [first_losses(method, options=options, draws=n) for n in range(2)], tmp_path, n=1)
    two = np.mean(processes(functools.partial(first_losses, method, options=options), tmp_path), 0).reshape(4, 5).mean(1)
    one, other = np.reshape(ones, (2, 4, 5)).mean(2)
    assert (abs(two - (one + other) / 2) <= .1 * abs(one) + 2 * abs(one - other)).all(), (two, one, other)


@pytest.mark.parametrize("method", [pytest.param(m, id=m.METHOD, marks=[] if m is symmflow else pytest.mark.slow) for m in METHODS])
def test_two_processes_stopped_by_a_signal_go_on_together_to_the_same_end(method, tmp_path):
    def work(rank):
        codes = [quietly(method, *TINY[method], "--output", tmp_path / "whole")[0]]
        names = written(tmp_path)
        at(method, "train_step", 6, send(signal.SIGTERM))
        return *codes, quietly(method, *TINY[method], "--output", tmp_path / "run")[0], quietly(method, "--resume", tmp_path / "run")[0], names
    for rank, (*codes, names) in enumerate(processes(work, tmp_path)):
        assert codes == [0, 143, 0] and bool(names) == (rank == 0)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_starts_two_processes_stops_both_and_goes_on(tmp_path):
    """The command of the README, in processes of its own; it ends with an error of torchrun's where a signal stopped it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", run.ROOT / "diffmic.py"]
    out, log = tmp_path / "run", open(tmp_path / "said", "w")
    process = subprocess.Popen([*command, *TINY[diffmic], "--epochs", "9", "--output", out], stdout=log, stderr=log)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) and not (out / "metrics.json").exists(), (tmp_path / "said").read_text()
    assert 4 <= run.load_checkpoint(out / "last.pt", "diffmic")["position"]["step"] < 40 and f"--resume {out}" in (tmp_path / "said").read_text()
    subprocess.run([*command, "--resume", out], stdout=log, stderr=log, check=True, timeout=300)
    assert [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()] == list(range(1, 11))
    assert len(rows(out / "predictions.csv")) == 26


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    def work(rank):
        if rank == 1:
            at(diffmic, "train_step", 6, lambda *a: (torch.save(None, tmp_path / "result1"), os._exit(0)))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code, _ = quietly(diffmic, *TINY[diffmic], "--output", tmp_path / "run")
        return code, err.getvalue()
    (code, err), _ = processes(work, tmp_path)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "process" in err and "--resume" in err, err
    assert run.load_checkpoint(tmp_path / "run" / "last.pt", "diffmic")["position"]["step"] == test_faults.STEPS


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in METHODS:
        found = first_losses(one)
        golden(one).write_text(f"# the first losses of a tiny run, python -m tests.test_promises; {header()}\n" + "".join(f"{x:.9g}\n" for x in found))
        print(golden(one).name, *found)
