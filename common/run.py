"""A run's surroundings: settings and command line, seeds, folder, checkpoints, EMA, signals, report.

Nothing here knows a method. What is trained, and how, stands in the method's file.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import typing
import warnings
import zipfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn                                             # dist.nn is not there without it
from tqdm import tqdm

from . import metrics, plots
from .resnet import load_backbone

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1                                                              # of the checkpoint file


class UserError(Exception):
    """A user's mistake, in one line: what, where, remedy. Printed as `error: ...`; exit code 2."""


class WorkError(Exception):
    """A fault at work (full disk, non-finite loss), in one line. Printed as `error: ...`; exit code 1."""


# ----------------------------------------------------------------------------- settings and command line

@cache
def field_comments(Config):
    """The comment behind each field of the dataclass and of those that it extends, which is its help text: {name: (group, comment)}. Raises
    TypeError naming a field without one."""
    found, group = {}, ""
    for line in (line for part in reversed(Config.__mro__[:-1]) for line in inspect.getsource(part).splitlines()):
        if banner := re.fullmatch(r"\s+# --- (.+) ---", line):
            group = banner[1]
        elif field := re.fullmatch(r"\s+(\w+): .+?  # (.+)", line):
            found[field[1]] = (group, field[2])
    if bare := [field.name for field in dataclasses.fields(Config) if field.name not in found]:
        raise TypeError(f"{Config.__name__}.{bare[0]}: each field is on a line of its own with its comment behind it, two blanks before the #: that is its help text")
    return found


def configure(Config, given, small, plus, by_data):
    """A Config whose defaults are those of its scale, recipe and data set; what is `given` wins. Raises UserError."""
    for name in given:
        if name not in Config.__dataclass_fields__:
            raise UserError(f"--{name.replace('_', '-')}: no such option")
    check(Config(**given))                                              # types first: what follows computes with them
    data = given.get("data", Config.data)
    scale = given.get("scale") or ("small" if data.startswith("toy") else "paper")
    recipe = given.get("recipe") or ("plus" if scale == "small" else "paper")
    values = by_data.get(data, {}) | (small if scale == "small" else {}) | (plus if recipe == "plus" else {})
    if data.startswith("toy"):
        values = values | by_data.get(data, {})                         # a toy set's own size holds at every scale
    values = values | dict(scale=scale, recipe=recipe)
    if "epochs" in given and "pretrain_epochs" not in given:            # --epochs caps every stage
        values["pretrain_epochs"] = min(values.get("pretrain_epochs", Config.pretrain_epochs), given["epochs"])
    config = Config(**values | given)
    check(config)
    return config


def check(config):
    """Raises UserError naming the first field whose value is of a wrong type or outside the range in its comment."""
    comments = field_comments(type(config))
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), "--" + field.name.replace("_", "-")
        choices = typing.get_args(field.type)
        if choices and value not in choices:
            raise UserError(f"{option} {value!r}: choose from {', '.join(map(str, choices))}")
        if field.type in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, field.type))):
            raise UserError(f"{option} {value!r}: {'a whole' if field.type is int else 'a'} number is needed")
        if field.type in (str, bool) and not isinstance(value, field.type):
            raise UserError(f"{option} {value!r}: {'text' if field.type is str else 'true or false'} is needed")
        if field.type is int and abs(value) >= 2 ** 63:
            raise UserError(f"{option}: a number of {len(str(abs(value)))} digits is too large")
        if limits := re.match(r"\[([^\]]*?)\.\.([^\]]*?)\]", comments[field.name][1]):
            low, high = (float(x) if x else None for x in limits.groups())
            if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
                raise UserError(f"{option} {value}: must lie in {limits[0]}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if unknown := re.search(r"unrecognized arguments: (-\S+)", message):
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f" (did you mean {close[0]}?)" if close else " (--help lists the options)"
        raise UserError(message)


def add_options(parser, Config, names=None):
    """Options made from the dataclass, all or those of `names`: --batch-size from the field batch_size, grouped by banner."""
    groups = {}
    for name, (group, comment) in field_comments(Config).items():
        if names is not None and name not in names:
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        field = Config.__dataclass_fields__[name]
        options = ["--" + name.replace("_", "-"), *{"output": ["--out"], "batch_size": ["--batch"]}.get(name, [])]
        if name == "output" and names is not None:
            comment = "folder to write to; none: the next free one beside the checkpoint"
        extra = {"dest": name, "default": argparse.SUPPRESS,
                 "help": f"{comment}; default {(field.default if field.default != '' else 'none') if names is None else 'that of the run'}".replace("%", "%%")}
        if field.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif choices := typing.get_args(field.type):
            extra |= {"choices": choices, "type": type(choices[0])}
        else:
            extra |= {"type": field.type, "metavar": name.upper() if field.type is str else "N"}
        groups[group].add_argument(*options, **extra)


def command_line(argv, method, more):
    """Parses `argv` and runs a command of a method (its module); returns the exit code: 0, 1 a fault, 2 a user's mistake, 130/143 a signal.

    `more` = {"explain": (function(checkpoint, **given), names of settings, summary, {option: arguments of add_argument}), ...} beside the
    commands that every method has. The module's SMALL and PLUS are shown by --help; its DataError is a user's mistake.
    """
    commands = {"train": (partial(train_command, method), None, "Train, and score on the test split.", {}),
                "eval": (partial(evaluate_command, method), ["data", "root", "split", "limit", *method.SAMPLING], "Score a checkpoint on a test split.", {}),
                "predict": (partial(predict_command, method), method.SAMPLING, "Classify images.", {}), **more}
    argv = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) for a in (sys.argv[1:] if argv is None else argv)]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")               # the name of a file may hold what a terminal cannot show
    name = argv.pop(0) if argv and argv[0] in commands else "train"
    function, names, summary, extra = commands[name]
    doc, prog = method.__doc__, f"python {method.METHOD}.py" + (f" {name}" if name != "train" else "")
    epilog = "examples:\n" + re.sub(r"(?m)^ *", "  ", doc[doc.index(f"python {method.METHOD}.py"):].split("\n\n")[0])
    for option, table in ("--scale small", method.SMALL), ("--recipe plus", method.PLUS):
        epilog += f"\n\n{option} sets " + ", ".join(f"{k} {v}" for k, v in table.items())
    parser = Parser(prog, f"{prog} [options]" + (" IMAGE ..." if name in ("predict", "explain") else ""), summary, epilog,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if name == "train":
        parser.add_argument("--resume", nargs="?", const="", default=argparse.SUPPRESS, metavar="RUN",
                            help="go on with the run in --output, or with this one, from its last.pt alone")
    else:
        parser.add_argument("--checkpoint", required=True, help="a run's best.pt")
        if name in ("predict", "explain"):
            parser.add_argument("paths", nargs="+" if name == "predict" else "*", metavar="IMAGE",
                                help="image files, or folders of them" + "; none: some of the test split" * (name == "explain"))
    for option, arguments in extra.items():
        parser.add_argument(option, **arguments)
    add_options(parser, method.Config, names)
    try:
        if name in more and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"{name}: is the work of one process; leave out torchrun")
        with signals():
            function(**vars(parser.parse_args(argv)))
        sys.stdout.flush()
        return 0
    except SystemExit as end:                                           # --help
        return end.code or 0
    except BrokenPipeError:                                             # `| head` closed our output: no more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Interrupted as stop:
        print(f"stopped by {signal.Signals(stop.signum).name}; {stop.note}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except (UserError, method.DataError) as mistake:
        code, message = 2, str(mistake)
    except (WorkError, OSError) as fault:
        code, message = 1, str(fault)
    except (RuntimeError, MemoryError) as fault:                        # of the CPU's memory torch has no class of its own
        code, reason = 1, re.sub(r"^\[.*?\] .*?\. ", "", f"{fault} ").split(". ")[0]
        if isinstance(fault, MemoryError) or re.search("out of memory|allocate memory|not enough memory|size calculation", str(fault)):
            message = f"out of memory ({reason}): try a smaller --batch-size with --grad-accum, or --size"
        elif world() > 1 and re.search("gloo|NCCL|[Cc]onnection", str(fault)):
            message = "another process of this run has ended or does not answer; its own message says why; then go on from the last checkpoint with --resume"
        else:
            raise
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def train_command(method, resume=None, **given):
    """The command without a name: train, or --resume a run from its checkpoint alone."""
    if resume is None:
        return method.train(method.configure(**given))
    folder = resume_folder(resume, given.pop("output", ""))
    if (folder / "metrics.json").exists():
        return print(f"{folder}: finished already; its numbers are in {folder / 'metrics.json'}")
    return method.train(resume_config(method.Config, folder, method.METHOD, given), resume=folder)


def evaluate_command(method, checkpoint, output="", **given):
    """`eval`: scores the test split of the data set that a model was trained on, or of another with the same classes."""
    config, nets, facts, device = load_model(checkpoint, method.METHOD, method.Config, method.build, given)
    data = method.load_for(config, facts)
    predictions, uncertainty = method.evaluate(nets, data.test, config, device)
    if rank() > 0:
        return
    result = score(data.test, predictions | method.shortcut(data), uncertainty[config.uncertainty])
    out = result_folder(output, checkpoint, "eval", config)
    write_evaluation(out, data.test, facts["classes"], predictions, uncertainty[config.uncertainty])
    write(out / "metrics.json", as_json(result, indent=1))
    print(*data.notes, *seen_before(facts, data.test.ids), f"{len(data.test)} images", table(method.METHOD, result), f"pictures and numbers: {out}", sep="\n")


def seen_before(facts, ids):
    """[a warning] where a run has learned from images of these names, or was selected by them."""
    seen = set(facts["seen"].tolist()) if "seen" in facts else set()
    n = sum(seed_of("image", name) in seen for name in ids)
    return [f"WARNING: {n:,} of these {len(ids):,} images have the names of images that the run learned from or was selected by. If they are the same, the numbers "
            "below are too good: give --root and --split as in training, or images that it has not seen"] * (n > 0)


def predict_command(method, checkpoint, paths, output="", **given):
    """`predict`: class (multi-label: findings), probability and uncertainty of image files and folders; predictions.csv, and a panel an image."""
    config, nets, facts, device = load_model(checkpoint, method.METHOD, method.Config, method.build, given)
    split, problems = method.read_split(paths, config, facts)
    seeds = dataclasses.replace(split, ids=names_of(split.ids, config))
    predictions, uncertainty = method.evaluate(nets, seeds, config, device)
    if rank() > 0:
        return
    p, classes, out = predictions[method.METHOD], facts["classes"], result_folder(output, checkpoint, "predict", config)
    write_predictions(out / "predictions.csv", split, p, uncertainty[config.uncertainty], classes)
    votes = getattr(nets, "votes", None)                                # the diffusion classifier's, (N, K)
    most = len(classes) if split.labels.ndim == 2 else 10               # bars of a panel: each label is a question of its own
    for i, (name, decided) in enumerate(zip(split.ids, decisions(split, p)[1])):
        found, lines = np.flatnonzero(decided), [f"{kind} {np.mean(u[i]):.3f}" for kind, u in uncertainty.items()]
        lines += [] if votes is None else ["votes for " + ", ".join(f"{classes[k]} {votes[i, k]:.0f}" for k in np.argsort(-votes[i])[:3])]
        label = ", ".join(classes[k] for k in found) or "no finding"
        print(f"{name}  " + (", ".join(f"{classes[k]}  p {p[i, k]:.3f}" for k in found) or label) + "  " + "  ".join(lines))
        plots.panel(out / f"{i:04d}-{file_name(Path(name).stem)}.png", split.images[i], f"{label}: {Path(name).name}", dict(zip(classes, p[i])),
                    lines, most=most)
    print(*problems, f"panels and predictions.csv: {out}   (not for clinical use)", sep="\n")


# ----------------------------------------------------------------------------- signals and progress

class Interrupted(Exception):
    """Ctrl-C or SIGTERM. `note` says what was saved; `between` two steps, a state is whole and may be saved."""

    def __init__(self, signum, between=False):
        self.signum, self.between, self.note = signum, between, "files already written are whole"


_deferred, _pending = False, None


def _on_signal(signum, frame):
    global _pending
    if not _deferred or _pending:                                       # a second signal does not wait
        raise Interrupted(signum)
    _pending = signum


@contextlib.contextmanager
def signals():
    """Ctrl-C and SIGTERM raise Interrupted; inside `defer_signals` only between two steps, where a state is whole."""
    global _pending
    _pending, before = None, {}
    for s in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):                           # not in the main thread: leave them as they are
            before[s] = signal.signal(s, _on_signal)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def defer_signals(save, note):
    """Inside, a signal waits for the end of the step (`progress`); then `save()` is called and `note` says how to go on."""
    global _deferred
    _deferred = True
    try:
        yield
    except Interrupted as stop:
        if stop.between:                                                # a second signal: the step is torn, last.pt is not
            save()
        stop.note = note
        raise
    finally:
        _deferred = False


def check_signals():
    if _pending:
        raise Interrupted(_pending, between=True)


def progress(iterable, what, total=None, start=0):
    """Iterates with a tqdm bar and an ETA, plain lines every 10 s when stderr is no terminal; stops on a signal."""
    total = total or len(iterable)
    bar = tqdm(total=total, initial=start, desc=what, leave=False, file=sys.stderr, disable=not sys.stderr.isatty() or rank() > 0,
               dynamic_ncols=True, mininterval=.5)
    began = time.monotonic()
    said = began - 7                                                    # the first line after 3 s
    with bar:
        for i, item in enumerate(iterable):
            check_signals()
            yield item
            bar.update()
            now = time.monotonic()
            if bar.disable and rank() == 0 and now - said > 10:
                said = now
                left = (now - began) / (i + 1) * (total - start - i - 1)
                print(f"{what}: {start + i + 1}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
    check_signals()


# ----------------------------------------------------------------------------- seeds, device, several GPUs

def seed_of(*parts):
    """A 63-bit seed from (seed, purpose, index, ...): the same on every machine."""
    return int.from_bytes(hashlib.blake2b(":".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1


def file_id(path):
    """63 bits of a file's SHA-256."""
    with open(path, "rb") as file:
        return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:8], "big") >> 1


def names_of(paths, config):
    """The names by which the noise of a user's files is drawn: of a file in the run's own folder its id there, of others the name without folder and suffix."""
    root = Path(config.root).resolve() if config.data == "folder" and config.root else None
    return [full.relative_to(root).as_posix() if root in (full := Path(path).resolve()).parents else Path(path).stem for path in paths]


def image_noise(seed, ids, shape, device):
    """Standard normal noise (B, *shape), drawn image by image from (seed, id): no batch size or order changes it."""
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(seed, "noise", i))) for i in ids]
    return torch.stack(noise).to(device)


def rank():
    """The number of this process, 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(config):
    """Chooses the device, sets precision, joins the other processes under torchrun. Returns the torch.device."""
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise UserError(f"torch {torch.__version__} has known holes in reading weights: install 2.10 or later")
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)    # set_device below wants the number
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("no such kind of device here")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as fault:
        raise UserError(f"--device {name}: {str(fault).splitlines()[0]}; take auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def place(nets, device):
    """Networks on the device; channels_last on CUDA alone: on a CPU torch 2.13 crashes in the backward pass of a strided 1x1
    convolution of 8 channels on an odd batch (Conv2d(8, 16, 1, 2), 29 images of 32 x 32). Several GPUs share the batch norms' statistics."""
    nets = torch.nn.SyncBatchNorm.convert_sync_batchnorm(nets) if device.type == "cuda" and world() > 1 else nets
    return nets.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)


def autocast(config, device):
    """bf16 on CUDA, float32 elsewhere, unless --amp says otherwise."""
    on = config.amp == "bf16" or (config.amp == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


@contextlib.contextmanager
def first_process_first():
    """Under torchrun: the others wait while process 0 decodes the data into the cache, then find it there."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:                                                            # even if it fails: nobody waits in vain
        if world() > 1 and rank() == 0:
            dist.barrier()


def average_gradients(parameters):
    """Means the gradients over all processes (torchrun); nothing to do for one."""
    if world() > 1:
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world()


def all_rows(x):
    """The rows (B, ...) of all processes, with gradients: a statistic of the batch must see the whole batch."""
    if world() == 1:
        return x
    counts = [torch.tensor(0, device=x.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor(len(x), device=x.device))
    padded = torch.cat([x, x.new_zeros(max(counts).item() - len(x), *x.shape[1:])])     # the shares of a batch differ by a row
    return torch.cat([rows[:n] for rows, n in zip(dist.nn.functional.all_gather(padded), counts)])


def gather(rows):
    """Joins a dict of arrays, each process holding rows rank, rank + world, ... of the whole, in their order; of fewer rows than processes some hold {}."""
    if world() == 1:
        return rows
    shards = [None] * world()
    dist.all_gather_object(shards, rows)
    total = sum(len(next(iter(s.values()))) for s in shards if s)
    joined = {k: np.empty((total, *v.shape[1:]), v.dtype) for k, v in shards[0].items()}
    for r, shard in enumerate(shards):
        for k, v in shard.items():
            joined[k][r::world()] = v
    return joined


@torch.no_grad()
def update_ema(ema, nets, decay, step):
    """ema <- d ema + (1 - d) nets, d = min(decay, (1 + step) / (10 + step)); batch norm statistics included."""
    if world() > 1 and next(nets.parameters()).device.type != "cuda":   # statistics of its own share: `place` shares them on CUDA alone
        for name, buffer in nets.named_buffers():
            if "running_" in name:
                dist.all_reduce(buffer)
                buffer /= world()
    d = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(ema.state_dict().values(), nets.state_dict().values()))
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - d)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


# ----------------------------------------------------------------------------- a run's folder and its checkpoints

def choose_folder(config, method, resume=None):
    """The run's folder, not yet made. Raises UserError where another run's checkpoint would be overwritten."""
    if resume is not None:
        return Path(resume)
    if config.output:
        if holds_run(config.output):
            raise UserError(f"--output {config.output}: holds a run; add --resume to go on with it, or name another folder")
        return Path(config.output)
    out = [free_folder(ROOT / "runs" / f"{method}-{config.data}-{config.scale}-{config.recipe}-s{config.seed}")]
    if world() > 1:
        dist.broadcast_object_list(out)
    return out[0]


def holds_run(folder):
    """Whether a run that could go on lies in a folder. Raises UserError for what cannot be a folder."""
    try:
        return (Path(folder) / "last.pt").exists()
    except OSError as fault:                                            # a name too long, a folder that is not ours
        raise UserError(f"--output {folder}: cannot be used ({fault.strerror}); name another folder") from None


def free_folder(path):
    """`path`, or the first of path-2, path-3, ... that is absent or empty."""
    out, n = path, 1
    while out.exists() and (not out.is_dir() or any(out.iterdir())):
        n += 1
        out = path.with_name(f"{path.name}-{n}")
    return out


def make_folder(out, config):
    """Makes a folder with config.json in it. Raises UserError where nothing can be written."""
    if rank() > 0:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".*.tmp"):                                 # half-written files of a run that was killed
            if re.fullmatch(r"\..+\.\d+\.tmp", left.name):
                left.unlink(missing_ok=True)
        write(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    except OSError as fault:
        raise UserError(f"--output {out}: cannot write there ({fault.strerror}); name another folder") from None


def result_folder(output, checkpoint, name, config):
    """Where `eval` and `predict` write: --output, or the next free folder beside the checkpoint."""
    if output and holds_run(output):
        raise UserError(f"--output {output}: holds a run, whose numbers this would overwrite; name another folder")
    out = Path(output) if output else free_folder(Path(checkpoint).resolve().parent / name)
    make_folder(out, config)
    return out


def to_explain(method, config, facts, paths, limit):
    """The Split that `explain` is to show, and a list of problems: the images of `paths`, else of the test split; `limit` at most, 0: all, or 8 of the
    test split. Their noise goes by their ids, as in `predict`."""
    if limit < 0:
        raise UserError(f"--limit {limit}: 0 or more")
    limit = limit or (sys.maxsize if paths else 8)
    split, problems = method.read_split(paths, config, facts) if paths else (method.load_for(dataclasses.replace(config, limit=limit), facts).test, [])
    kept = split.take(range(len(split))[:limit])
    return dataclasses.replace(kept, ids=names_of(kept.ids, config) if paths else kept.ids), problems


def save_images(folder, ids, images, title):
    """Writes uint8 images (N, C, H, W), a picture each by its id and all in samples.png, and says where."""
    for name, image in zip(ids, images):
        plots.picture(image).save(folder / f"{file_name(name)}.png")
    print(f"{len(ids)} images of {title}: {plots.image_grid(folder / 'samples.png', images, title=title)}")


def class_number(label, classes, option="--label"):
    """A class by its name or number; UserError where there is none."""
    if label not in classes and not (label.isdecimal() and int(label) < len(classes)):
        raise UserError(f"{option} {label}: no such class; take one of {', '.join(classes)}, or its number 0..{len(classes) - 1}")
    return classes.index(label) if label in classes else int(label)


def file_name(name):
    """A name that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", name)[-80:]


def as_json(value, indent=None):
    """JSON text; a number that is not finite becomes null, which JSON has."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=indent)


def write(path, content):
    """Writes text, bytes, or by a function(file) to a temporary file, fsync, os.replace: whole, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            content(f) if callable(content) else f.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as fault:
        fault.filename, fault.filename2 = str(path), None               # so that the message names it
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save(path, content):
    """Saves a dict of tensors and plain values. A full disk raises WorkError and leaves the file before it as it was."""
    try:
        write(path, lambda f: torch.save(content, f))
    except (OSError, RuntimeError) as fault:                            # torch wraps the OSError of a failed write
        reason = fault.strerror if isinstance(fault, OSError) else "the disk is full or not writable"
        raise WorkError(f"{path}: cannot save: {reason}; the last good file is unchanged: make room, then --resume") from None


def load_weights(path, option=""):
    """Tensors and plain values from .pt .pth .ckpt (torch) or .safetensors. Runs no code from the file.

    A torch file's zip entries must be stored (not compressed), no larger than the file together, and true to their CRC:
    torch itself checks none of these. Raises UserError naming the file, behind the option that asks for it.
    """
    path, name = Path(path), f"{option} {path}".strip()
    if not path.is_file():
        raise UserError(f"{name}: no such file{' (a folder: name the best.pt in it)' if path.is_dir() else ''}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        with open(path, "rb") as f:
            if f.read(4) == b"PK\x03\x04":
                check_zip(path)
        with warnings.catch_warnings():                                 # of an odd pickle protocol torch warns, and then refuses it
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{name}: no weights file, or one that holds pickled code: refused, nothing was run") from None
    except Exception as fault:                                          # torch raises at least six kinds on a damaged file
        reason = (str(fault) or type(fault).__name__).splitlines()[0][:120]
        raise UserError(f"{name}: damaged or no weights file ({reason}); restore it from a copy or train again") from None
    return content.get("state_dict", content) if isinstance(content, dict) else content


def check_zip(path):
    """Raises ValueError where a file of torch.save is damaged, could unpack to more than itself, or holds a program."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise ValueError("compressed or overlapping entries")
        if any(e.filename.endswith("/constants.pkl") for e in entries):
            raise ValueError("a TorchScript program, not weights")
        if any(e.external_attr & 0x10 for e in entries):               # marked a folder, which torch reads as nothing at all
            raise ValueError("an entry is marked as a folder: bits have changed")
        if bad := archive.testzip():
            raise ValueError(f"checksum of {bad} is wrong: bits have changed")


def read_safetensors(path):
    """The safetensors format: 8-byte header length, JSON header, one block of bytes without holes or overlaps."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
             "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    size = path.stat().st_size
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length > min(size - 8, 100_000_000):
            raise ValueError("header longer than the file")
        header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        end, tensors = 0, {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            dtype, shape = kinds[entry["dtype"]], entry["shape"]
            if begin != end or any(not isinstance(n, int) or n < 0 for n in shape) \
                    or stop - begin != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
                raise ValueError(f"holes, overlaps or a wrong size at {name}")
            end, data = stop, bytearray(f.read(stop - begin))
            tensors[name] = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
        if 8 + length + end != size:
            raise ValueError("bytes behind the last tensor")
    return tensors


def load_checkpoint(path, method):
    """A checkpoint of this method, as `save` wrote it; UserError if it is anything else."""
    content, alien = load_weights(path), UserError(f"{path}: not a checkpoint of this project; take a run's best.pt or last.pt")
    holds = lambda inside, kinds: isinstance(inside, dict) and all(isinstance(inside.get(k), kind) for k, kind in kinds.items())
    if not holds(content, {"format": int, "method": str, "config": dict, "facts": dict, "ema": dict}):
        raise alien
    if content["method"] != method:
        raise UserError(f"{path}: a checkpoint of {content['method']}: use python {content['method']}.py")
    if content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer version of this project (format {content['format']}): update")
    facts, ema = content["facts"], content["ema"]
    if not holds(content["config"], {"data": str, "root": str}) or not holds(facts, {"classes": list, "channels": int, "multilabel": bool}) \
            or not facts["classes"] or not all(isinstance(x, str) for x in [*facts["classes"], *ema]) or not all(map(torch.is_tensor, ema.values())) \
            or not holds({"seen": torch.empty(0), "root": "", "border": 0} | facts, {"seen": torch.Tensor, "root": str, "border": int}) \
            or facts.get("border", 0) not in (0, 2):
        raise alien
    return content


def config_from(Config, content, **given):
    """The Config stored in a checkpoint, with what is `given` on the command line in its place."""
    known = {k: v for k, v in content["config"].items() if k in Config.__dataclass_fields__}
    if given.get("data", known.get("data")) != known.get("data"):
        known["root"] = ""                                              # the stored root is another data set's
    config = Config(**known | given)
    check(config)
    return config


def load_model(path, method, Config, build, given):
    """A run's best.pt -> (config, EMA networks in evaluation mode on the device, facts, device). Raises UserError for another file.

    method, Config, build are those of the method's file, given the settings to change, {} for none:
    `config, nets, facts, device = run.load_model("best.pt", "diffmic", diffmic.Config, diffmic.build, {})`.
    facts: {"channels": 1 or 3, "classes": names in the order of the labels, "multilabel": bool}, and what the run noted of its images.
    """
    content = load_checkpoint(path, method)
    config, facts, trained = config_from(Config, content, **given), content["facts"], content["config"]
    place_then = Path(trained["root"] and facts.get("root") or trained["root"])         # where a relative --root led to
    if "root" not in given and config.root and not Path(config.root).exists() and place_then.exists():
        config = dataclasses.replace(config, root=str(place_then))
    facts["own_data"] = config.data == trained["data"] and Path(config.root).resolve() in (place_then.resolve(), Path(trained["root"]).resolve())
    device = start(config)
    nets = build(config, facts)
    try:
        nets.load_state_dict(content["ema"])
    except RuntimeError as fault:
        raise UserError(f"{path}: its weights do not fit its settings ({str(fault).splitlines()[1].strip()[:100]})") from None
    return config, place(nets, device).eval(), facts, device


def resume_folder(resume, output):
    """The folder that `--resume [RUN]` means, checked to hold a last.pt."""
    folder = Path(resume or output or "")
    if not (resume or output):
        raise UserError("--resume: say which run: --resume RUN, or --output RUN --resume")
    if resume and output and Path(resume) != Path(output):
        raise UserError(f"--resume {resume} --output {output}: a resumed run stays in its folder; name one of the two")
    folder = folder.parent if folder.name in ("last.pt", "best.pt") else folder
    if not (folder / "last.pt").exists():
        raise UserError(f"--resume {folder}: no last.pt there; a run saves its first at the end of its first epoch")
    return folder


def resume_config(Config, folder, method, given):
    """A run's own Config. Only where it runs may change: other options that differ raise UserError."""
    config = config_from(Config, load_checkpoint(folder / "last.pt", method))
    for name, value in given.items():
        if name not in ("root", "device") and value != getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} {value}: the run has {getattr(config, name)}, and a resumed run keeps its settings")
    return dataclasses.replace(config, **given)


class FiniteCheck:
    """Stops a run at a loss or gradient that is not finite. On a GPU it looks every few steps, so as not to wait for each."""

    def __init__(self, every):
        self.every, self.waiting = every, []

    def __call__(self, loss, norm, step, ids):
        self.waiting.append((torch.stack([loss.detach().float(), norm.float()]), step, ids))
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self):
        waiting, self.waiting = self.waiting, []
        if waiting:
            for finite, (_, step, ids) in zip(torch.stack([w[0] for w in waiting]).isfinite().all(1).tolist(), waiting):
                if not finite:
                    raise WorkError(f"loss or gradient is not finite at step {step}, batch of {', '.join(ids[:3])}, ...; the last good "
                                    "checkpoint is unchanged: look at these images, or lower --lr")


class State:
    """All that changes while a run trains: networks, their EMA, the optimizer, the position, the log."""
    POSITION = ("step", "sums", "history", "best", "best_resnet")

    def __init__(self, method, config, facts, nets, optimizer):
        self.method, self.config, self.facts, self.nets, self.optimizer = method, config, facts, nets, optimizer
        self.ema = copy.deepcopy(nets).eval().requires_grad_(False)
        self.step = 0                                                   # batches so far; epochs so far: len(history)
        self.sums, self.history, self.best, self.best_resnet = {}, [], {}, {}

    def save(self, path):
        """Writes all of it to a file, whole or not at all; of several processes the first does."""
        if rank() == 0:
            save(path, dict(format=FORMAT, method=self.method, config=dataclasses.asdict(self.config), facts=self.facts,
                            nets=self.nets.state_dict(), ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict(),
                            position={k: getattr(self, k) for k in self.POSITION}, threads=torch.get_num_threads(),
                            torch=str(torch.__version__)))

    def load(self, path):
        """Goes on from such a file. Raises UserError for one of another method, of other images, or of other networks."""
        content = load_checkpoint(path, self.method)
        try:
            then, now = (facts.get("images") for facts in (content["facts"], self.facts))
            if then and now and then != now:
                counts = ", ".join(f"{k} {then[k][0]:,}, now {now[k][0]:,}" for k in now)
                raise UserError(f"{path}: the images, their labels or splits are others than when the run began: {counts}; restore them, or begin a new run")
            self.nets.load_state_dict(content["nets"])
            self.ema.load_state_dict(content["ema"])
            self.optimizer.load_state_dict(content["optimizer"])
            for k in self.POSITION:
                setattr(self, k, content["position"][k])
            device, threads = next(self.nets.parameters()).device, content["threads"]
            self.sums = {k: v.to(device) for k, v in self.sums.items()}
            if threads != torch.get_num_threads():                      # sums split over other threads round otherwise
                torch.set_num_threads(threads)
                print(f"note: going on with {threads} threads, as the run began", file=sys.stderr)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as fault:
            raise UserError(f"{path}: cannot be resumed ({' '.join(str(fault).split())[:150]}); was it written by another version of this project?") from None

    def add(self, losses, weight):
        """Sums losses over an epoch, on the device: scalars for their mean, (2, 10) for sum and count by tenths of t."""
        for k, v in {**losses, "count": torch.ones_like(losses["loss"])}.items():
            v = v.detach().float()
            self.sums[k] = self.sums.get(k, 0) + (torch.stack([v * weight, torch.full_like(v, weight)]) if v.ndim == 0 else v)

    def means(self):
        """The epoch's means, of several processes those of the first. The sums stay until `close_epoch`: a run stopped during validation needs them again."""
        sums = {k: v.cpu() for k, v in self.sums.items()}
        sums.pop("count")
        return {k: (v[0] / v[1]).item() if v.ndim == 1 else (v[0] / v[1]).tolist() for k, v in sums.items()}

    def keep_best(self, row, select, path):
        """Saves best.pt where the validation metric rose (nll: fell), with `select` last in every epoch; keeps the plain ResNet's best weights by its own."""
        metric = "accuracy" if select == "last" else select
        for name, key in ((self.method, f"val_{metric}"), ("resnet", f"val_resnet_{metric}")):
            score = {"last": row["epoch"], "nll": -row.get(key, math.inf)}.get(select, row.get(key))
            if key in row and not score <= self.best.get(name, {}).get("score", -math.inf):
                self.best[name] = {"score": score, "epoch": row["epoch"]}
                if name == "resnet":
                    self.best_resnet = copy.deepcopy(self.ema.resnet.state_dict())
                else:
                    self.save(path)

    def load_best(self, path):
        """Puts into `ema` the networks of the best epoch, and the plain ResNet of its own best; returns the checkpoint."""
        if world() > 1:
            dist.barrier()                                              # until process 0 has written it
        content = load_checkpoint(path, self.method)
        self.ema.load_state_dict(content["ema"] | {f"resnet.{k}": v for k, v in self.best_resnet.items()})
        return content

    def write_best(self, content, path):
        """The final best.pt: what `eval` and `predict` read."""
        if rank() == 0:
            save(path, content | {"ema": self.ema.state_dict()})

    def close_epoch(self, row, out, total):
        """Logs an epoch and saves last.pt; the log is written from the checkpoint's history, so that no line is lost or doubled."""
        self.history.append(row)
        self.sums = {}
        if rank() == 0:                                                 # before last.pt: a run killed in between does this epoch again
            write(out / "log.jsonl", "".join(as_json(r) + "\n" for r in self.history))
        self.save(out / "last.pt")
        if rank() == 0:
            shown = {k: v for k, v in row.items() if k in ("loss", "seconds") or k.endswith("accuracy") and "balanced" not in k}
            print(f"epoch {row['epoch']}/{total}  " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)


def load_pretrained(net, path):
    """ImageNet weights into a ResNet; UserError naming the tensor that does not fit."""
    try:
        load_backbone(net, load_weights(path))
    except UserError as fault:
        raise UserError(f"--pretrained {fault}") from None
    except (ValueError, AttributeError, TypeError, IndexError, RuntimeError) as fault:
        raise UserError(f"--pretrained {path}: {fault}; needed: torchvision's ResNet-{net.depth} weights, --size 100 or more") from None


def load_init(nets, path, method, leave="", whole="", **same):
    """Starts from the EMA weights of another run of this method, whose settings must have the values `same`; layers that do not fit (other classes)
    keep their own, as do those whose name begins with `leave`. All of those that begin with `whole` must fit."""
    try:
        content, own = load_checkpoint(path, method), nets.state_dict()
    except UserError as fault:
        raise UserError(f"--init {fault}") from None
    for name, value in same.items():
        if (theirs := content["config"].get(name, value)) != value:
            option, ours = (f"--{'no-' * (v is False)}{name}" + f" {v}" * (not isinstance(v, bool)) for v in (theirs, value))
            raise UserError(f"--init {path}: is of a run with {option}, this one has {ours}; add {option}, or name another")
    given = content["ema"]
    # weights and batch norms; not what was fitted to the other run, such as its temperature
    learnt = {name for name, _ in nets.named_parameters()} | {k for k in own if "running_" in k or k.endswith("num_batches_tracked")}
    learnt = {k for k in learnt if not (leave and k.startswith(leave))}
    fits = {k: v for k, v in given.items() if k in learnt and own[k].shape == v.shape}
    if not fits:
        raise UserError(f"--init {path}: no tensor fits this network (another --scale or --width?)")
    nets.load_state_dict(fits, strict=False)
    new = [k for k in own if k in learnt and k not in fits]
    if unfit := [k for k in new if whole and k.startswith(whole)]:
        raise UserError(f"--init {path}: {unfit[0]} is of another shape there (other --channels or --ae-width, or gray images?), and nothing here would train it")
    print(f"--init: {len(fits)} of {len(learnt)} tensors from {path}" + (f"; new: {', '.join(new[:6])}" if new else ""))


# ----------------------------------------------------------------------------- report

def facts_of(data, config):
    """What a checkpoint keeps of its data: classes, channels, multilabel, border and notes as in the DataSet; root, absolute; `seen`, 63 bits of the name of
    each image that is learned from or selected by; `images`, {split: [how many, a digest of names and labels]}."""
    splits = {name: getattr(data, name) for name in ("train", "val", "test")}
    known = {name: getattr(data, name) for name in ("classes", "channels", "multilabel", "border", "notes")}
    return known | dict(root=config.root and os.path.abspath(config.root), seen=torch.tensor([seed_of("image", name) for name in data.train.ids + data.val.ids]),
                        images={name: [len(split), str(seed_of(*split.ids, *split.labels.tolist()))] for name, split in splits.items()})


def describe(out, config, data, method, nets, device):
    """The first lines of a run: what is trained, on what, with how many images of which class, and of how many the label is shown; and splits.csv
    (id,split,group), who went where."""
    if rank() > 0:
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "split", "group"])
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        rows.writerows(zip(split.ids, itertools.repeat(part), split.groups or itertools.repeat("")))
    write(out / "splits.csv", text.getvalue())
    parameters = sum(p.numel() for p in nets.parameters())
    print(f"{method} --scale {config.scale} --recipe {config.recipe}: {config.data}, {data.channels} x {config.size} x {config.size}, "
          f"{parameters:,} parameters, {device}, seed {config.seed}")
    for note in data.notes:
        print(f"  {note}")
    for name in ("train", "val", "test"):
        split = getattr(data, name)
        counts, _ = class_counts(split.labels, len(data.classes))
        labelled = int((split.labels.reshape(len(split), -1) >= 0).any(1).sum())
        print(f"  {name:5} {len(split):6}" + f" ({labelled} labelled)" * (labelled < len(split)) + "  "
              + "  ".join(f"{c} {int(n)}" for c, n in zip(data.classes, counts)), flush=True)


def commit():
    """The git commit of this code, or 'unknown'."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=5).stdout.strip() or "unknown"
    return "unknown"


def class_counts(labels, K):
    """(how many images have each class (K,), of how many it is known: a number, multi-label (K,)). A label below 0 is unknown."""
    known = labels >= 0
    return ((labels > 0).sum(0), known.sum(0)) if labels.ndim == 2 else (np.bincount(labels[known], minlength=K), known.sum())


def decisions(split, p):
    """(true, predicted), bool (N, K): the classes an image has, none where its label is unknown (-1), and those a model names, p (N, K)."""
    if split.labels.ndim == 2:
        return split.labels > 0, p >= .5
    return tuple(a[:, None] == np.arange(p.shape[1]) for a in (split.labels, p.argmax(1)))


def write_predictions(path, split, p, uncertainty, classes):
    """predictions.csv: id,true,predicted,uncertainty,p:<class>,... `true` stays empty for images without a label (-1).

    Multi-label: the names of all true or predicted classes, joined by |, empty for none; the uncertainty is the mean over the labels.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "true", "predicted", "uncertainty", *(f"p:{c}" for c in classes)])
    for i, (row, *answers) in enumerate(zip(p, *decisions(split, p))):
        names = ("|".join(classes[k] for k in np.flatnonzero(answer)) for answer in answers)
        table.writerow([split.ids[i], *names, f"{np.mean(uncertainty[i]):.6f}", *(f"{x:.9g}" for x in row)])        # 9 digits: what is sure keeps its order
    write(path, text.getvalue())


def validation(split, predictions, method):
    """A log row's validation metrics: val_accuracy, ... of the method, val_resnet_accuracy, ... of the others."""
    row = {}
    for name, p in predictions.items():
        scores = metrics.summary(split.labels, p)
        keys = ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "nll") + ("ece",) * (name == method)
        row |= {("val_" if name == method else f"val_{name}_") + k: scores[k] for k in keys}
    return row


def score(split, predictions, uncertainty, train_labels=None, ci=1000):
    """Metrics of every model on one split: {"test": of the first model, "baselines": of the others, "bayes"}.

    predictions: {model: probabilities (N, K)}, the method first; uncertainty (N,), multi-label (N, K), belongs to the method. Intervals draw whole
    patients or lesions, where they are known.
    """
    (_, p), *others = predictions.items()
    result = {"test": metrics.summary(split.labels, p, uncertainty=uncertainty, ci=ci, groups=split.groups), "baselines": {}}
    if train_labels is not None:
        counts, known = class_counts(train_labels, p.shape[1])
        majority = counts / np.maximum(known, 1)                        # a label that no image shows: 0
        result["baselines"]["majority"] = metrics.summary(split.labels, np.tile(majority, (len(split), 1)))
    for name, q in others:
        result["baselines"][name] = metrics.summary(split.labels, q, ci=ci, groups=split.groups)
    if split.posterior is not None:
        result["bayes"] = metrics.summary(split.labels, split.posterior)
    result["accuracy_by_coverage"] = {name: [list(map(float, pair)) for pair in zip(*line)] for name, line in selective(split, predictions, uncertainty).items()}
    return result


def selective(split, predictions, uncertainty):
    """{model: (coverages, accuracies)} when 0, 5, .. 95 % of the images are set aside, the most uncertain first: the method by
    `uncertainty`, the others by 1 - their largest probability. Multi-label: every label of every image is an answer to set aside or keep."""
    found = {}
    for name, p in predictions.items():
        correct, best = ((p >= .5) == split.labels, np.maximum(p, 1 - p)) if split.labels.ndim == 2 else (p.argmax(1) == split.labels, p.max(1))
        found[name] = metrics.coverage_accuracy(correct.ravel(), np.ravel(1 - best if found else uncertainty))
    return found


def report(state, out, result, specific, device):
    """Writes and returns what metrics.json holds, and prints the table."""
    result = {"method": state.method, **{k: getattr(state.config, k) for k in ("data", "scale", "recipe", "seed")}, "commit": commit(),
              "torch": str(torch.__version__), "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
              "threads": torch.get_num_threads(), "seconds": sum(row["seconds"] for row in state.history),
              "params": sum(p.numel() for p in state.nets.parameters()), "selected_epoch": state.best[state.method]["epoch"],
              "notes": state.facts.get("notes", []), **result, "method_specific": specific}
    if rank() == 0:
        write(out / "metrics.json", as_json(result, indent=1))
        print(table(state.method, result) + f"\npictures: {out / 'figures'}   numbers: {out / 'metrics.json'}", flush=True)
    return result


def table(method, result):
    """The lines printed at the end: accuracy, macro F1, AUROC, ECE, AURC of the method beside its controls."""
    rows = [(method, result["test"]), *result["baselines"].items()] + ([("Bayes optimum", result["bayes"])] if "bayes" in result else [])
    lines = [f"{'':16}accuracy  macro F1     AUROC       ECE      AURC"]
    return "\n".join(lines + [f"{name:14}" + "".join(f"{m[k]:10.3f}" for k in ("accuracy", "f1_macro", "auroc", "ece", "aurc")) for name, m in rows])


def write_evaluation(out, split, classes, predictions, uncertainty, history=None, panels=()):
    """predictions.csv and the pictures every run has: learning curves, confusion matrix (multi-label: AUROC of each label), reliability, accuracy
    against coverage."""
    if rank() > 0:
        return
    figures, (method, p), several = Path(out) / "figures", next(iter(predictions.items())), split.labels.ndim == 2
    title, unit = f"{method}: test split", "answers" if several else "images"
    write_predictions(Path(out) / "predictions.csv", split, p, uncertainty, classes)
    if history:
        plots.curves(figures / "curves.png", history, "Learning curves", panels)
    if several:
        each = {name: [metrics.auroc(*column) for column in zip(split.labels.T, q.T)] for name, q in predictions.items()}
        plots.grouped_bars(figures / "labels.png", each, classes, "AUROC of each label: test split", "grey line: chance, 0.5", .5)
    else:
        plots.confusion(figures / "confusion.png", metrics.confusion_matrix(split.labels, p.argmax(1), len(classes)), classes, title)
    plots.reliability(figures / "reliability.png", *metrics.reliability_bins(split.labels, p), metrics.ece(split.labels, p), title, several)
    kept = selective(split, predictions, uncertainty)
    plots.coverage(figures / "coverage.png", kept, f"Accuracy when the most uncertain {unit} are set aside", unit)
