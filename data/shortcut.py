"""What is known of an image besides its pixels, and how well that alone tells its class: the control `shortcut` of the final table.

Columns are the file's name, its type, width and height, and what a data set's table says: age, sex, site, view. Where a rule that sees
no pixels comes near a network, the network may have learnt the same: of Favero et al.'s ISIC images "id < 100000, or *_downsampled:
melanoma" has 94 % right. A high score shows what can be had without the disease, not that a network took it.
"""
import re

import numpy as np

BINS = 1024                                             # codes of a column: the most frequent words, or ranges of numbers


def columns(records, sizes):
    """{name: (N,)} of N Records and their files' sizes (N, 2), width and height: numbers as float64, nan where missing, else str, ""."""
    rows = []
    for record, (width, height) in zip(records, sizes):
        stem = record.path.stem
        numbers = re.findall("[0-9]+", stem) or [""]
        rows.append(record.source | {
            "name number": numbers[0], "name last number": numbers[-1] if len(numbers) > 1 else "", "name length": len(stem),
            "name pattern": re.sub("[0-9]+", "#", stem), "file type": record.path.suffix.lower(),
            "width": width, "height": height, "aspect": width / height if height else ""})
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name, "") for row in rows]
        try:
            found[name] = np.array([float("nan" if value == "" else value) for value in values])
        except ValueError:
            found[name] = np.array(values, object)      # str as wide as the longest would be large
    return found


def telling(train, part):
    """The names of the columns that differ within the Split train, and of which the Split `part` knows any."""
    values = {name: {"" if value != value else value for value in column.tolist()} for name, column in train.source.items()}
    return [name for name, seen in values.items() if len(seen) > 1 and any(value == value and value != "" for value in part.source[name].tolist())]


def shortcut(data):
    """{"shortcut": probabilities (M, K)} of a DataSet's test split by its columns, learnt from train; {} where no column tells images
    apart, where there is no train, and for multi-label data."""
    names = [] if data.train is None or data.multilabel else telling(data.train, data.test)
    return {"shortcut": _by(names, data, data.test)} if names else {}


def by_column(data):
    """[(name, accuracy, share of the log loss that is explained)] on validation: of the majority class, of all columns, then of the best five
    alone. The share is below 0 where a column misleads. [] where `shortcut` is {}."""
    names = [] if data.train is None or data.multilabel else telling(data.train, data.val)
    if not names:
        return []
    found, y = [], data.val.labels
    for title, only in ("majority class", []), ("all columns", names), *((name, [name]) for name in names):
        p = _by(only, data, data.val)
        loss = -np.log(p[np.arange(len(y)), y]).mean()
        most = most if found else loss
        found.append((title, float(np.mean(p.argmax(1) == y)), float(1 - loss / most)))
    return found[:2] + sorted(found[2:], key=lambda row: row[1:], reverse=True)[:5]


def _by(names, data, split):
    """Probabilities (M, K) for a split of M images by these columns; without any, the classes' shares in train."""
    known = data.train.labels >= 0                      # a hidden label stays hidden
    of_train = {name: data.train.source[name][known] for name in names} or {"": np.zeros(known.sum())}
    of_split = {name: split.source[name] for name in names} or {"": np.zeros(len(split))}
    return tree(of_train, of_split, data.train.labels[known], len(data.classes))


def tree(train, columns, labels, K):
    """Probabilities (M, K) for `columns` {name: (M,)} by a decision tree grown on train {name: (N,)} and its labels (N,) of 0..K-1.

    A node is cut where the log likelihood gains most, a number at a threshold, a word against all others, and no further when the gain
    is below what chance gives the best of so many cuts (BIC, and the log of their number). What is missing or was never seen in train
    is a value of its own, below all numbers; where a node has met none, it goes with the larger part. Leaves are smoothed to the prior.
    """
    coded = [_codes(train[name], columns[name]) for name in train]
    prior = (np.bincount(labels, minlength=K) + 1) / (len(labels) + K)
    p = np.empty((len(next(iter(columns.values()))), K))
    todo = [(np.arange(len(labels)), np.arange(len(p)))]
    while todo:
        rows, others = todo.pop()
        count = np.bincount(labels[rows], minlength=K)
        p[others] = (count + prior) / (len(rows) + 1)
        best, cut, cuts = 0, None, 0
        for code, other, size, ordered in coded:
            here = np.bincount(code[rows] * K + labels[rows], minlength=size * K).reshape(size, K)
            left = here.cumsum(0) if ordered else here                          # (size, K): classes on one side of each cut
            gain = _log_likelihood(left) + _log_likelihood(count - left) - _log_likelihood(count)
            cuts += here.any(1).sum()
            if gain.max() > best:
                best, at = gain.max(), gain.argmax()
                side = np.arange(size) <= at if ordered else np.arange(size) == at
                side[0] = side[0] if here[0].any() else 2 * left[at].sum() > len(rows)
                cut = side[code[rows]], side[other[others]]
        if cut and best > ((count > 0).sum() - 1) / 2 * np.log(len(rows)) + np.log(cuts):
            todo += [(rows[cut[0]], others[cut[1]]), (rows[~cut[0]], others[~cut[1]])]
    return p


def _log_likelihood(count):
    """Of counts (..., K) under their own shares."""
    each, total = (c * np.log(np.maximum(c, 1)) for c in (count, count.sum(-1)))
    return each.sum(-1) - total


def _codes(train, column):
    """A column (N,) of train and another (M,) as whole numbers, 0 for what is missing or not in train; how many codes; whether in order."""
    if train.dtype.kind == "f":
        edges = np.unique(train[~np.isnan(train)])
        edges = edges[np.linspace(0, len(edges) - 1, min(len(edges), BINS)).astype(int)]
        return *(np.where(np.isnan(v), 0, 1 + np.searchsorted(edges, v)) for v in (train, column)), len(edges) + 2, True
    words, count = np.unique(train, return_counts=True)
    place = {word: code for code, word in enumerate([w for w in words[np.argsort(-count, kind="stable")] if w][:BINS], 1)}
    return *(np.array([place.get(word, 0) for word in v], int) for v in (train, column)), len(place) + 1, False
