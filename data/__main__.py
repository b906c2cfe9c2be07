"""`python -m data ham10000 --root DIR`: decodes a data set and prints what is in it; no training. `--help` for the options."""
import argparse
import sys

import numpy as np

from . import FITS, NAMES, SPLIT_RULES, DataError, load
from .shortcut import by_column


def main(argv=None):
    """Prints images a class and split, and the notes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__.split(":")[1].strip())
    parser.add_argument("name", help=", ".join(NAMES))
    parser.add_argument("--root", help="folder of the data, or its .npz file (default data/raw/NAME)")
    parser.add_argument("--size", type=int, help="pixels a side (default 224; toy sets and MedMNIST 32)")
    parser.add_argument("--split", default="official", help=" | ".join(SPLIT_RULES))
    parser.add_argument("--fit", help=" | ".join(FITS))
    parser.add_argument("--limit", type=int, default=0, help="images a split (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit and the toy images")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read")
    try:
        found = load(**vars(parser.parse_args(argv)))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = {"train": found.train, "val": found.val, "test": found.test}
    print(f"{found.name}: {found.channels} channels, {found.train.images.shape[-1]} pixels a side")
    wide = max(12, *map(len, found.classes))
    print(f"{'class':>{wide}}" + "".join(f"{word:>12}" for word in parts))
    for k, name in enumerate(found.classes):
        counts = [np.sum(split.labels[:, k] if found.multilabel else split.labels == k) for split in parts.values()]
        print(f"{name:>{wide}}" + "".join(f"{int(n):12,}" for n in counts))
    if found.multilabel:
        print(f"{'no finding':>{wide}}" + "".join(f"{int(np.sum(~split.labels.any(1))):12,}" for split in parts.values()))
    print(f"{'all':>{wide}}" + "".join(f"{len(split):12,}" for split in parts.values()))
    for note in found.notes:
        print(f"- {note}")
    if rows := by_column(found):
        print("what can be told without the pixels: accuracy on validation, log loss explained (below 0: misled)")
        print(*(f"{name:>{max(wide, 16)}}{right:12.3f}{explained:12.1%}" for name, right, explained in rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
