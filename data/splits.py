"""Who goes to train, validation and test: by group, so that no patient or lesion is on two sides, and without a seed."""
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from .images import EXTENSIONS
from .types import DataError

SPLITS = ("train", "val", "test")
TEST, VAL = .3, .1                                      # of the groups of a class: the DiffMIC paper's 7:3, and our validation


def group_split(labels, groups, test=TEST, val=VAL):
    """The side of each image: a list of "train", "val", "test".

    Within each class the groups are sorted by the SHA-256 of their id; the first 30 % are test, the next 10 % validation, and
    at least one each where the class has enough groups. No seed: of the same images none ever changes its side; where some are added or gone, a
    few groups near the edges do.
    A group with several classes counts for the rarest of them.
    """
    count = Counter(labels)
    classes_of = defaultdict(set)
    for label, group in zip(labels, groups):
        classes_of[group].add(label)
    members = defaultdict(list)
    for group, classes in classes_of.items():
        members[min(classes, key=lambda c: (count[c], c))].append(group)
    side = {}
    for inside in members.values():
        inside.sort(key=_place)
        n, parts = len(inside), 1 + (test > 0) + (val > 0)
        n_test, n_val = (max(round(share * n), int(share > 0 and n >= parts)) for share in (test, val))
        for i, group in enumerate(inside):
            side[group] = "test" if i < n_test else "val" if i < n_test + n_val and n >= parts else "train"
    return [side[group] for group in groups]


def _place(name):
    """A sort key that is a lottery and always the same one."""
    return hashlib.sha256(str(name).encode("utf-8", "surrogateescape")).digest()


def balanced(labels, names):
    """Sorted rows with as many images of each class as the rarest has: those whose name comes first by SHA-256. No seed."""
    inside = defaultdict(list)
    for row in sorted(range(len(names)), key=lambda row: _place(names[row])):
        inside[labels[row]].append(row)
    n = min(map(len, inside.values()), default=0)
    return sorted(row for rows in inside.values() for row in rows[:n])


def assign(records, by_group=True, test=TEST, val=VAL):
    """Records with the split that `group_split` gives them; where no group is known, or by_group is False, by image."""
    groups = [(by_group and r.group) or r.id for r in records]
    return [r._replace(split=s) for r, s in zip(records, group_split(rarest([r.label for r in records]).tolist(), groups, test, val))]


def leaking(records):
    """How many test images show a group that is in train or validation too; then the same for validation and train."""
    groups = {s: {r.group for r in records if r.split == s and r.group} for s in SPLITS}
    return (sum(r.split == "test" and r.group in groups["train"] | groups["val"] for r in records),
            sum(r.split == "val" and r.group in groups["train"] for r in records))


def apart(records, notes):
    """The records less those whose patient or lesion is in a later split too: one of test stays there, one of validation leaves train."""
    inside = {part: {r.group for r in records if r.split == part and r.group} for part in SPLITS}
    later = {"train": inside["val"] | inside["test"], "val": inside["test"], "test": set()}
    kept = [r for r in records if r.group not in later[r.split]]
    if len(kept) < len(records):
        notes.append(f"{len(records) - len(kept):,} images left out: their patient or lesion is in a later split too (--split group splits anew)")
    return kept


def rarest(labels):
    """Labels (N,) as they are; multi-label (N, K) -> (N,): of each image the finding that the fewest images have, -1 without any."""
    labels = np.asarray(labels)
    if labels.ndim < 2:
        return labels
    has = labels > 0                                    # -1, not known, is no finding
    return np.where(has.any(1), np.where(has, has.sum(0), np.inf).argmin(1), -1)


def stratified(labels, rng):
    """Rows of labels (N,), every beginning of which has each class by its share, after one image of each: int64 (N,)."""
    order = rng.permutation(len(labels))
    position = np.empty(len(labels))                    # of an image within its class, as a share of the class
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        position[rows] = (np.arange(len(rows)) + .5) / len(rows)
        position[rows[0]] = -1
    return order[np.argsort(position[order], kind="stable")]


def draw(labels, n, rng):
    """Sorted rows of a stratified draw of n images (N,) or (N, K) -> (n,): each class its share, at least one image of each."""
    labels = rarest(labels)
    return np.sort(stratified(labels, rng)[:max(n, len(np.unique(labels)))])


def duplicates(hashes, splits):
    """Rows of train that look exactly like one of val or test, then rows of val like one of test: two lists."""
    seen = {s: {h for h, split in zip(hashes, splits) if split == s} for s in ("val", "test")}
    train = [i for i, h in enumerate(hashes) if splits[i] == "train" and (h in seen["val"] or h in seen["test"])]
    return train, [i for i, h in enumerate(hashes) if splits[i] == "val" and h in seen["test"]]


def labelled(split, labels, seed=0, elsewhere=()):
    """bool (N,): the images of a Split whose labels may be used, where `labels` is a share of them or names them.

    labels: a number over 0 and up to 1, or as text such a number or the path of a file with an image id a line, with or without .png or
    .jpg. A share is of images: whole patients or lesions in an order drawn from `seed`, stratified by class (multi-label: by the rarest
    finding), at least one of each; a smaller share is inside a larger one. Names in `elsewhere`, ids of the other splits, are passed over.
    Raises DataError for a share out of range, and for a file that cannot be read or names other images.
    """
    try:
        share = float(str(labels))
    except ValueError:
        return _named(split, Path(labels), elsewhere)
    if not 0 < share <= 1:
        raise DataError(f"--labels {labels}: a share over 0 and up to 1 is needed, or a file with an image name a line")
    _, row, size = np.unique(split.groups or split.ids, return_inverse=True, return_counts=True)
    _, kind, count = np.unique(rarest(split.labels), return_inverse=True, return_counts=True)
    classes = np.full(len(size), len(count))
    np.minimum.at(classes, row, count.argsort(kind="stable").argsort()[kind])   # a group with several classes counts for the rarest
    order = stratified(classes, np.random.default_rng([seed, 5]))
    before = size[order].cumsum() - size[order]
    chosen = np.zeros(len(size), bool)
    chosen[order[:max(len(np.unique(classes)), int((before < share * len(split)).sum()))]] = True
    return chosen[row]


def _named(split, path, elsewhere):
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"--labels {path}: cannot be read ({getattr(error, 'strerror', None) or error}); give a share over 0 and up to 1, "
                        "or a file with an image name a line") from None
    place, others = _places(split.ids), _places(elsewhere)
    chosen, strange = np.zeros(len(split), bool), []
    for name in names:
        bare = _bare(name)
        if (row := place.get(name, place.get(bare))) is not None:
            chosen[row] = True
        elif name not in others and bare not in others:
            strange.append(name)
    if strange:
        raise DataError(f"{path}: {len(strange):,} of {len(names):,} names are of no image here, first: {strange[0]!r}; the first image is "
                        f"{split.ids[0]} (--limit and --skip-bad leave images out)")
    if not chosen.any():
        raise DataError(f"{path}: names no image of train; an image name a line, as {split.ids[0]}")
    return chosen


def _bare(name):
    return name[:name.rindex(".")] if name.lower().endswith(EXTENSIONS) else name


def _places(ids):
    """{id: row}, and the same without the ending, where that tells one image."""
    count = Counter(map(_bare, ids))
    return {_bare(name): row for row, name in enumerate(ids) if count[_bare(name)] == 1} | {name: row for row, name in enumerate(ids)}
