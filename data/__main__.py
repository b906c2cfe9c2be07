"""`python -m data ham10000 --root DIR`: decodes a data set, prints what is in it and what is wrong, and draws a contact sheet; no training."""
import argparse
import io
import os
import sys

import numpy as np

from . import FITS, NAMES, SPLIT_RULES, DataError, load, report
from .shortcut import by_column


def main(argv=None):
    """Prints images and groups a class and split, sizes, repeats and the notes; draws the sheet; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__.split(":")[1].strip())
    parser.add_argument("name", help=", ".join(NAMES))
    parser.add_argument("--root", help="folder of the data, or its .npz file (default data/raw/NAME)")
    parser.add_argument("--size", type=int, help="pixels a side (default 224; toy sets and MedMNIST 32)")
    parser.add_argument("--split", default="official", help=" | ".join(SPLIT_RULES))
    parser.add_argument("--fit", help=" | ".join(FITS))
    parser.add_argument("--limit", type=int, default=0, help="images a split (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit and the toy images")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--output", help="picture with some images of each class (default NAME-contact.png, in the folder you are in)")
    options = vars(parser.parse_args(argv))
    output = options.pop("output") or f"{options['name']}-contact.png"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")               # the name of a folder may hold what a terminal cannot show
    try:
        if options["seed"] < 0 or options["limit"] < 0:
            raise DataError(f"--seed {options['seed']} --limit {options['limit']}: must not be below 0")
        found = load(**options)
        _print(found)
        try:
            report.contact_sheet(found, output)
        except OSError as error:
            raise DataError(f"--output {output}: cannot be written ({error.strerror or error}); name another file") from None
        print(f"contact sheet: {output}", flush=True)
        if rows := by_column(found):
            print("what can be told without the pixels: accuracy on validation, log loss explained (below 0: misled)")
            print(*(f"{name:>{max(16, *map(len, found.classes))}}{right:12.3f}{explained:12.1%}" for name, right, explained in rows), sep="\n")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                             # `| head` closed our output: no more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("stopped; what is decoded stays in the cache, the next call goes on from there", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print(found):
    parts = report.parts(found)
    print(f"{found.name}: {found.channels} channels, {found.train.images.shape[-1]} pixels a side")
    wide = max(12, *map(len, found.classes))

    def line(name, cells):
        print(f"{name:>{wide}}" + "".join(f"{cell if isinstance(cell, str) else f'{int(cell):,}':>12}" for cell in cells))
    line("class", parts)
    for k, name in enumerate(found.classes):
        line(name, [np.sum(split.labels[:, k] == 1 if found.multilabel else split.labels == k) for split in parts.values()])
    if found.multilabel:
        line("no finding", [np.sum(~(split.labels > 0).any(1)) for split in parts.values()])
        if any((split.labels < 0).any() for split in parts.values()):
            line("not known", [np.sum((split.labels < 0).any(1)) for split in parts.values()])
    line("all", [len(split) for split in parts.values()])
    groups = {part: set(split.groups or ()) for part, split in parts.items()}
    line("groups", [len(inside) or "unknown" for inside in groups.values()])
    within, between, other_label = report.repeats(found)
    line("repeats", within.values())
    print(f"sizes in the files: {report.sizes(found)}")
    if any(groups.values()):
        several = [group for part, inside in groups.items() for group in inside if any(group in groups[other] for other in groups if other != part)]
        print(f"groups are patients or lesions: {len(set(several)):,} of them on two sides")
    if any(within.values()) or between:
        print(f"repeats show the very pixels of another image in their split ({between:,} of one in another split); "
              f"{other_label:,} of them have another label than it")
    if n := sum(map(report.blank, parts.values())):
        print(f"{n:,} images are blank: of one colour")
    for note in found.notes:
        print(f"- {note}")


if __name__ == "__main__":
    sys.exit(main())
