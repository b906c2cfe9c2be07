"""PMG2000: four grades of placental maturity, grey ultrasound, as in the DiffMIC paper. The set is not public: this reads a folder of your own.

    ROOT/{train,val,test}/GRADE/*.png or ROOT/GRADE/*.png       and whatever else `folder` reads: classes.txt, groups.csv

Yang et al., MICCAI 2023: 2,098 images, 8:2. Of the authors' lists the names alone are known, and they are pickles, which nothing here opens.
"""
from pathlib import Path

from . import folder
from .types import DataError

NOT_PUBLIC = "PMG2000 is not public and cannot be downloaded; whoever has it, or placental ultrasound of their own, sorts it into a folder per grade"
GRADES = 4


def table(root, split="official", test_only=False, skip_bad=False, classes=None):
    """The Table of `folder.table`, and a note that nobody else can check a result on it."""
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; {NOT_PUBLIC}: ROOT/GRADE/*.png")
    found = folder.table(root, split, test_only, skip_bad, classes)
    found.notes.insert(0, NOT_PUBLIC)
    if len(found.classes) != GRADES:
        found.notes.append(f"{len(found.classes)} classes here ({', '.join(found.classes)}), PMG2000 has {GRADES} grades")
    return found
