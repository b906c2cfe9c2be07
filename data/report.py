"""What `python -m data` tells of a DataSet besides its counts: groups, sizes, repeated and blank pictures; and a contact sheet to look at."""
import hashlib
from collections import Counter, defaultdict

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ACROSS, TILE, GAP, MARGIN = 8, 112, 6, 150              # of the contact sheet: images a class, and pixels


def parts(found):
    """{"train": Split, ...} of those that there are."""
    return {name: split for name in ("train", "val", "test") if (split := getattr(found, name)) is not None}


def sizes(found):
    """A line on the width and height of the pictures in their files, or as they came where no file is known to be one picture."""
    count = Counter()
    for split in parts(found).values():
        of = split.source if {"width", "height"} <= split.source.keys() else \
            {key: np.full(len(split), split.images.shape[axis]) for key, axis in (("width", 3), ("height", 2))}
        count.update(zip(of["width"].astype(int).tolist(), of["height"].astype(int).tolist()))
    (most, n), small, large = count.most_common(1)[0], min(count, key=np.prod), max(count, key=np.prod)
    return f"{most[0]} x {most[1]} (all)" if len(count) == 1 else \
        f"{small[0]} x {small[1]} to {large[0]} x {large[1]}, {len(count):,} sizes; most often {most[0]} x {most[1]} ({n:,} images)"


def repeats(found):
    """({split: images that show the very pixels of one before them in it}, how many show those of an image in another split, and how many
    of both have another label than it). Of two splits one is dropped by the loader, so a loaded set has none of the second kind."""
    seen, within, between, other_label = defaultdict(set), {}, 0, 0
    first = {}
    for part, split in parts(found).items():
        within[part] = 0
        for image, label in zip(split.images, split.labels):
            key = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
            within[part] += part in seen[key]
            between += bool(seen[key] - {part})
            other_label += not np.array_equal(first.setdefault(key, label), label)
            seen[key].add(part)
    return within, between, other_label


def blank(split):
    """How many images (C, H, W) of a Split are of one colour."""
    return sum(int((image.min((1, 2)) == image.max((1, 2))).all()) for image in split.images)


def contact_sheet(found, path):
    """Writes a picture (PNG) with up to eight training images of each class in a row, its name and number left of them, each one's id below."""
    split, font, small = next(iter(parts(found).values())), ImageFont.load_default(size=13), ImageFont.load_default(size=10)
    has = {name: split.labels[:, k] == 1 if found.multilabel else split.labels == k for k, name in enumerate(found.classes)}
    if found.multilabel:
        has["no finding"] = ~(split.labels > 0).any(1)
    step = TILE + GAP + 14
    sheet = Image.new("RGB", (MARGIN + ACROSS * (TILE + GAP) + GAP, GAP + step * len(has)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, rows) in enumerate(has.items()):
        y, rows = GAP + number * step, np.flatnonzero(rows)
        draw.text((GAP, y), _fitting(name, font, MARGIN - 2 * GAP), "black", font)
        draw.text((GAP, y + 18), f"{len(rows):,} in train", "dimgray", font)
        for at, row in enumerate(rows[np.linspace(0, len(rows) - 1, min(ACROSS, len(rows))).astype(int)]):
            x, pixels = MARGIN + at * (TILE + GAP), split.images[row]
            image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            way = Image.Resampling.NEAREST if image.width < TILE else Image.Resampling.BILINEAR     # small pixels are seen as they are
            sheet.paste(image.resize((TILE, TILE), way), (x, y))
            draw.text((x, y + TILE + 1), _fitting(split.ids[row], small, TILE, start=False), "dimgray", small)
    sheet.save(path, "PNG")


def _fitting(text, font, room, start=True):
    """The start or the end of a text that is no wider than room, in letters that Pillow's own font has."""
    text = " ".join(text.encode("latin-1", "replace").decode("latin-1").split())
    while font.getlength(text) > room:
        text = text[:-1] if start else text[1:]
    return text
