"""What a loader finds before any picture is decoded: a record an image, and the reader of the tables (CSV) that tell of them."""
import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .types import DataError


class Record(NamedTuple):
    """An image that a loader has found, before it is decoded."""
    path: Path
    label: int | tuple                          # index into the classes; multi-label: 0 or 1 of each class
    group: str | None                           # patient or lesion, None where it is not known
    id: str                                     # unique
    split: str                                  # "train", "val" or "test"
    source: dict = {}                           # {column: cell} of the table that is neither label nor id; never changed in place


@dataclass
class Table:
    """What a loader's `table` gives back."""
    records: list                               # of Record: labels 0..K-1 in the order of `classes`; some of each split
    classes: list                               # K names
    channels: int                               # 1 or 3, of the pictures
    notes: list = field(default_factory=list)   # see DataSet
    multilabel: bool = False
    boxes: dict = field(default_factory=dict)   # {id: float32 (K, 4)}: x0, y0, x1, y1 as shares of the side, nan where none; see Split


def read_table(path, only=None):
    """A table, its cells apart by comma, semicolon or tab -> (column names in lower case, rows as (line number, {name: value})), everything stripped.

    only: the columns to keep in the rows, where a table is large.
    Byte-order marks, CR LF, blank lines, unnamed columns and a header repeated in the body do no harm.
    Raises DataError for a file that is no such table, and for a line with too few fields.
    """
    lines = [(number, row) for number, row in read_lines(path) if any(row)]
    if not lines:
        raise DataError(f"{path}: the table is empty; download it again")
    header = lines[0][1]
    names = [name.lower() for name in header]
    place = {name: names.index(name) for name in names if name}         # the first of two equal names
    last, wanted = max(place.values()), [(name, i) for name, i in place.items() if only is None or name in only]
    rows = []
    for number, row in lines[1:]:
        if row == header:
            continue
        if len(row) <= last:
            raise DataError(f"{path}: line {number} has {len(row)} fields, the header {len(header)}; complete the line, or download the file again")
        rows.append((number, {name: row[i] for name, i in wanted}))
    return list(place), rows


def read_columns(path):
    """The column names of a table in lower case; of the first line alone, for some tables hold pixels."""
    return [name.lower() for name in next((row for _, row in read_lines(path, header_only=True)), []) if name]


def read_lines(path, header_only=False):
    """[(line number, cells)] of a table's rows, or of its first line alone; stripped, and a line break in a cell is a blank, for errors are
    one line. Raises DataError for a file that cannot be read or is no text."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline(10**6)
            file.seek(0)
            reader = csv.reader([first] if header_only else file, delimiter=max(",;\t", key=first.count))
            lines = [(reader.line_num, [cell.strip().replace("\n", " ").replace("\r", " ") for cell in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read as a table ({reason}); save it as CSV in UTF-8") from None
    if any("\0" in cell for _, row in lines for cell in row):
        raise DataError(f"{path}: holds NUL bytes, so it is no text; save it as CSV in UTF-8")
    return lines


def report_missing(missing, total, part, table, skip_bad, notes):
    """Images of a part of a table that are not there, some but not all: DataError, or with skip_bad a note."""
    if missing:
        what = f"{len(missing):,} of {total:,} {part} images are missing, first: {missing[0]} of {table}"
        if not skip_bad:
            raise DataError(f"{what}; unpack all image archives, or leave these rows out with --skip-bad")
        notes.append(f"{what}: left out")


def missing_columns(path, columns, needed):
    """The line for a table without its columns."""
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    return f"{path}: has the columns {shown or 'none'}; needed: {needed}"


def part_records(part, rows, images, skip_bad, notes):
    """A Record for each of rows {image: row with label, lesion, source, table} of one part, of images {image: path}. None of its images there: an
    empty list. Some missing: DataError, or left out."""
    there = [Record(images[i], row.label, row.lesion, i, part, row.source) for i, row in rows.items() if i in images]
    missing = [i for i in rows if i not in images]
    if rows and not there:
        notes.append(f"a table of {len(rows):,} {part} images, but none of the images")
    else:
        report_missing([f"{i}.jpg" for i in missing], len(rows), part, missing and rows[missing[0]].table, skip_bad, notes)
    return there
