"""What the tests of the loaders and of the methods share."""
from pathlib import Path

import pytest
from PIL import Image

from common import run
from data import DataError

FULL = Path(__file__).resolve().parents[2] / "shared" / "data" / "csv_full"     # complete official tables, where there are some


def needs(path):
    """Marks a test that reads real data."""
    return pytest.mark.skipif(not path.exists(), reason=f"shared/data/{path.name} is not there")


def short(method, *words):
    """A method's command line with few resamples for its intervals; the exit code."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run.score, "__defaults__", (None, 5))
        return method.main([str(word) for word in words])


def sizes(found):
    return tuple(len(s) for s in (found.train, found.val, found.test))


def noted(found, words):
    return any(words in note for note in found.notes)


def apart(found):
    train, val, test = (set(s.groups) for s in (found.train, found.val, found.test))
    return not train & val and not train & test and not val & test


def refused(load, root, **options):
    """The one line with which a loader refuses."""
    with pytest.raises(DataError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def opened(folder):
    """Pictures below a folder, decoded: {path: size}."""
    found = {}
    for path in sorted(Path(folder).rglob("*.png")):
        with Image.open(path) as image:
            image.load()
            found[str(path.relative_to(folder))] = image.size
    return found
