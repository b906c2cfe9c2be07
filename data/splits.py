"""Who goes to train, validation and test: by group, so that no patient or lesion is on two sides, and without a seed."""
import hashlib
from collections import Counter, defaultdict

import numpy as np

SPLITS = ("train", "val", "test")
TEST, VAL = .3, .1                                      # of the groups of a class: the DiffMIC paper's 7:3, and our validation


def group_split(labels, groups, test=TEST, val=VAL):
    """The side of each image: a list of "train", "val", "test".

    Within each class the groups are sorted by the SHA-256 of their id; the first 30 % are test, the next 10 % validation, and
    at least one each where the class has enough groups. No seed: an image never moves from test to train between two runs.
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
    return [r._replace(split=s) for r, s in zip(records, group_split([r.label for r in records], groups, test, val))]


def leaking(records):
    """How many test images show a group that is in train or validation too; then the same for validation and train."""
    groups = {s: {r.group for r in records if r.split == s and r.group} for s in SPLITS}
    return (sum(r.split == "test" and r.group in groups["train"] | groups["val"] for r in records),
            sum(r.split == "val" and r.group in groups["train"] for r in records))


def draw(labels, n, rng):
    """Sorted rows of a stratified draw of n images (N,) -> (n,): each class its share, at least one image of each."""
    labels = np.asarray(labels)
    order = rng.permutation(len(labels))
    position = np.empty(len(labels))                    # of an image within its class, as a share of the class
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        position[rows] = (np.arange(len(rows)) + .5) / len(rows)
        position[rows[0]] = -1
    n = max(n, int((position < 0).sum()))
    return np.sort(order[np.argsort(position[order], kind="stable")[:n]])


def duplicates(hashes, splits):
    """Rows of train that look exactly like one of val or test, then rows of val like one of test: two lists."""
    seen = {s: {h for h, split in zip(hashes, splits) if split == s} for s in ("val", "test")}
    train = [i for i, h in enumerate(hashes) if splits[i] == "train" and (h in seen["val"] or h in seen["test"])]
    return train, [i for i, h in enumerate(hashes) if splits[i] == "val" and h in seen["test"]]
