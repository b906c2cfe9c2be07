"""What every loader returns: a DataSet of three Splits, and the error that names a user's mistake."""
from dataclasses import dataclass, field

import numpy as np


class DataError(Exception):
    """A user's mistake about data, in one line: what, where, remedy. The command line prints it and exits with 2."""


@dataclass
class Split:
    """Images and what is known of them, row by row. Raises DataError for images of another type, which would be scaled twice, or shape."""
    images: np.ndarray                          # uint8 (N, C, H, W), may be a memory map
    labels: np.ndarray                          # int64 (N,), or float32 (N, K) of 0 and 1 for multi-label data; -1, in train or in a user's own files: not known, or hidden
    ids: list                                   # N unique names
    groups: list | None = None                  # patient or lesion of each image
    boxes: np.ndarray | None = None             # float32 (N, 4): x0, y0, x1, y1 in pixels; multi-label (N, K, 4), nan where none is known
    posterior: np.ndarray | None = None         # (N, K) exact class probabilities, toy sets only
    source: dict = field(default_factory=dict)  # {name: (N,)} of numbers or str: what is known besides the pixels: shortcut.py
    few: tuple | None = None                    # semi-supervised training: the rows with a label (M,), how many of them join each batch, more augmentations of theirs

    def __post_init__(self):
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or len(self.images) != len(self.labels):
            raise DataError(f"images of type {self.images.dtype} and shape {self.images.shape} with {len(self.labels)} labels: a Split has a label each of "
                            "uint8 (N, C, H, W), 0 black to 255 white")

    def __len__(self):
        return len(self.labels)

    def take(self, rows):
        """The Split of these rows (n,)."""
        pick = lambda values: None if values is None else values[rows]
        return Split(self.images[rows], self.labels[rows], [self.ids[i] for i in rows], self.groups and [self.groups[i] for i in rows],
                     pick(self.boxes), pick(self.posterior), {name: column[rows] for name, column in self.source.items()})


@dataclass
class DataSet:
    """Three splits and the facts that a network needs."""
    train: Split | None
    val: Split | None
    test: Split | None
    classes: list
    multilabel: bool
    channels: int
    notes: list = field(default_factory=list)   # one line each: split rule, duplicates dropped, no patient ids, ...
    name: str = ""
    border: int = 0                             # pixels on each side of every image that repeat its edge: MedMNIST's 28 as 32
