"""Pictures drawn with Pillow alone: each function writes one PNG (temporary file, then os.replace), makes its folder, returns the path.

Data are arrays, lists or CPU tensors. Values that are not finite are left out; where nothing is left the picture says "no data". A character
the font lacks becomes its nearest Latin letter or "?". The core is `Canvas` (text that stays inside) and `Axes` (data to pixels).
"""
import os
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Okabe and Ito's colour-blind-safe palette without its yellow, too pale for a line on white
PALETTE = BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
INK, GREY, LIGHT, PALE = "#222222", "#666666", "#A0A0A0", "#E8E8E8"
FINE = 4      # lines are drawn this many times larger and averaged down: Pillow itself does not smooth them


# ---------------------------------------------------------------- text, numbers, ticks
font = lru_cache(maxsize=None)(lambda size: ImageFont.load_default(size=size))


@lru_cache(maxsize=None)
def glyph(char):
    """`char` as the font can draw it."""
    missing = bytes(font(20).getmask("\U0010FFFF"))
    for c in (char, unicodedata.normalize("NFKD", char)[0]):
        if c == " " or (unicodedata.category(c)[0] not in "CZ" and bytes(font(20).getmask(c)) != missing):
            return c
    return " " if char.isspace() else "?"


def shorten(text, size, room):
    """`text` in drawable characters, with an ellipsis for its end where it is wider than `room` pixels."""
    text = full = "".join(map(glyph, str(text)))
    while text and font(size).getlength(text if text is full else text + "…") > room:
        text = text[:-1]
    return text if text is full else text.rstrip() + "…"


def paragraph(text, size, room):
    """The words of `text` in rows no wider than `room`."""
    rows = []
    for word in (shorten(word, size, room) for word in str(text).split()):
        if rows and font(size).getlength(f"{rows[-1]} {word}") <= room:
            rows[-1] += " " + word
        else:
            rows.append(word)
    return rows


def numbers(values):
    """float64 array; what is missing (None), infinite or too large to draw is nan."""
    values = np.asarray(list(values), dtype=np.float64)
    return np.where(np.abs(values) < 1e30, values, np.nan)


def ticks(lo, hi, count=5, whole=False):
    """Multiples of 1, 2 or 5 times a power of ten, from at or below `lo` to at or above `hi`, in at most `count` + 1 steps; `whole`: integers."""
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi), 1e-9):                                   # one value: a range around it
        pad = 1.0 if whole or abs(lo) < 1e-9 else 0.1 * abs(lo)
        lo, hi = lo - pad, hi + pad
    power = 10.0 ** np.floor(np.log10((hi - lo) / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (hi - lo) / count * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return [float(f"{k * step:.12g}") for k in range(int(np.floor(lo / step + 1e-9)), int(np.ceil(hi / step - 1e-9)) + 1)]


def tick_labels(values):
    """Evenly spaced numbers as text, with as many decimals as tell them apart: a list of str."""
    step = min(np.diff(values), default=1.0)
    if step < 1e-4 or max(np.abs(values)) >= 1e7:
        return [f"{v:.6g}" for v in values]
    return [f"{v:,.{max(0, -int(np.floor(np.log10(step) + 1e-9)))}f}" for v in values]


# ---------------------------------------------------------------- the core: a canvas, axes on it, lines on them
class Canvas:
    """A white RGB picture. `boxes` lists (left, top, right, bottom, angle) of every text, in pixels: the tests read it."""
    def __init__(self, width, height, title=""):
        self.width, self.height, self.boxes = int(width), int(height), []
        self.image = Image.new("RGB", (self.width, self.height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.text(16, 12, title, 17)

    def text(self, x, y, text, size=13, anchor="la", color=INK, room=1e9, angle=0):
        """(x, y) is the left, middle or right ("l", "m", "r") of the line's top or middle ("a", "m"); of a turned text, of the box around it.
        Shortened to `room`, and pushed back where it would leave the canvas."""
        text = shorten(text, size, min(room, (self.height if angle == 90 else self.width - x * (anchor[0] == "l")) - 8))
        _, _, w, h = font(size).getbbox(text)
        tile = Image.new("L", (int(w) + 2, max(int(h) + 1, round(1.25 * size))))        # as high as a line, whatever its letters
        ImageDraw.Draw(tile).text((0, 0), text, 255, font=font(size))
        tile = tile.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        x, y = x - tile.width * "lmr".index(anchor[0]) / 2, y - tile.height * "am".index(anchor[1]) / 2
        x, y = int(np.clip(round(x), 0, self.width - tile.width)), int(np.clip(round(y), 0, self.height - tile.height))
        self.image.paste(color, (x, y), tile)
        if tile.getbbox():
            self.boxes.append((*np.add(tile.getbbox(), (x, y, x, y)).tolist(), angle))

    def save(self, path):
        """Writes the picture as PNG, whole or not at all; returns its Path."""
        path = Path(path)
        if os.environ.get("RANK", "0") != "0":                          # of several processes, under torchrun, one draws
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.{path.name[-40:]}.tmp")
        try:
            self.image.save(temporary, format="PNG")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


class Axes:
    """Title, legend [(name, colour, dashed)], grid, ticks and axis names inside `box` (left, top, right, bottom) of a canvas. `x` and `y` hold all
    the values that must fit; a limit (lo, hi) is kept exactly; `gutter`: room for the labels of y; `log`: y holds log10 of what the labels say."""
    def __init__(self, canvas, box, x, y, xlabel, ylabel, title="", legend=(), xlim=None, ylim=None, whole=False, log=False, gutter=None):
        left, top, right, bottom = box
        self.canvas = canvas
        canvas.text(left + 8, top, title, 14, room=right - left - 16)
        top, at = top + (24 if title else 4), left + 8
        for name, color, dashed in legend:
            name = shorten(name, 13, right - left - 60)
            if at > left + 8 and at + 30 + font(13).getlength(name) > right:
                top, at = top + 20, left + 8
            for a, b in [(0, 8), (13, 21)] if dashed else [(0, 21)]:
                canvas.draw.line((at + a, top + 8, at + b, top + 8), fill=color, width=3)
            canvas.text(at + 27, top, name)
            at += font(13).getlength(name) + 44
        top += 20 * bool(legend)
        self.top, self.bottom, self.right = top + 12, bottom - 46, right - 22
        y_ticks, self.ylim = self.choose(y, ylim, (self.bottom - self.top) // 45, log=log)
        labels = [f"{10 ** v:.3g}" for v in y_ticks] if log else tick_labels(y_ticks)
        self.left = left + int(gutter or 38 + max(map(font(12).getlength, labels), default=0))
        x_ticks, self.xlim = self.choose(x, xlim, (self.right - self.left) // 75, whole)
        for v, label in zip(y_ticks, labels):
            _, at = self.pixels(self.xlim[:1], [v])[0]
            canvas.draw.line((self.left, at, self.right, at), fill=PALE)
            canvas.text(self.left - 7, at, label, 12, "rm", GREY)
        for v, label in zip(x_ticks, tick_labels(x_ticks)):
            at, _ = self.pixels([v], self.ylim[:1])[0]
            canvas.draw.line((at, self.bottom, at, self.bottom + 4), fill=GREY)
            canvas.text(at, self.bottom + 7, label, 12, "ma", GREY)
        canvas.draw.line((self.left, self.top, self.left, self.bottom, self.right, self.bottom), fill=GREY)
        canvas.text((self.left + self.right) / 2, self.bottom + 25, xlabel, anchor="ma", room=right - left)
        canvas.text(left + 14, (self.top + self.bottom) / 2, ylabel, anchor="mm", room=bottom - top, angle=90)
        if not (np.isfinite(x).any() and np.isfinite(y).any()):
            canvas.text((self.left + self.right) / 2, (self.top + self.bottom) / 2, "no data", 16, "mm", GREY)

    @staticmethod
    def choose(values, limit, count, whole=False, log=False):
        """Ticks and limits of an axis for these values."""
        values = values[np.isfinite(values)]
        lo, hi = limit or ((values.min(), values.max()) if len(values) else (0, 1))
        if log:                                                                         # 1, 2, 5 in each decade, or the decades alone
            limit = lo - 0.04 * (hi - lo), hi + 0.04 * (hi - lo)
            found = [k + np.log10(m) for k in range(-30, 31) for m in ((1, 2, 5) if hi - lo < 3 else (1,))]
        else:
            found = ticks(lo, hi, max(2, count), whole)
            limit = limit or (found[0], found[-1])
        return [v for v in found if limit[0] - 1e-9 <= v <= limit[1] + 1e-9], limit

    def pixels(self, x, y):
        """Data to canvas pixels: [(x, y), ...]."""
        def place(v, limit, start, end):
            return np.clip(start + (np.asarray(v) - limit[0]) / (limit[1] - limit[0]) * (end - start), -5000, 9000).tolist()
        return list(zip(place(x, self.xlim, self.left, self.right), place(y, self.ylim, self.bottom, self.top)))

    def line(self, x, y, color, dashed=False, dots=False, thick=2.0, upper=None):
        """A line through (x, y) with or without dots; with `upper`, the pale band between y and upper. Nothing leaves the axes by over 4 pixels."""
        left, top, right, bottom = self.left - 4, self.top - 4, self.right + 4, self.bottom + 4
        mask = Image.new("L", ((right - left) * FINE, (bottom - top) * FINE))
        draw = ImageDraw.Draw(mask)
        points = self.pixels(x, y) + (self.pixels(x, upper)[::-1] if upper is not None else [])
        points = [((px - left) * FINE, (py - top) * FINE) for px, py in points]
        if upper is not None and len(x) > 1:
            draw.polygon(points, fill=55)
        elif len(points) > 1:
            draw.line(points, fill=255, width=round(thick * FINE), joint="curve")
        for px, py in points if dots else ():
            draw.ellipse((px - 3.5 * FINE, py - 3.5 * FINE, px + 3.5 * FINE, py + 3.5 * FINE), fill=255)
        weight = np.asarray(mask.resize((right - left, bottom - top), Image.Resampling.BOX))
        weight = weight * (np.arange(right - left) % 14 < 8).astype(np.uint8) if dashed else weight
        self.canvas.image.paste(color, (left, top), Image.fromarray(weight))

    def bar(self, x0, x1, y, color):
        """From x0 to x1, from the lower edge of the axes to y."""
        (a, b), (c, d) = self.pixels([x0, x1], [y, self.ylim[0]])
        self.canvas.draw.rectangle((round(a) + 1, round(b), max(round(c) - 1, round(a) + 1), max(round(d) - 1, round(b))), fill=color)


def chart(canvas, box, series, title="", xlabel="", ylabel="", xlim=None, ylim=None, hline=None, vline=None, whole=False, log=False):
    """Axes with named lines: series {name: (x, y)} or {name: (x, y, lo, hi)}; in grey, hline {name: y} dashed and vline {name: x}."""
    lines = []
    for i, (name, data) in enumerate(series.items()):
        data = np.stack([numbers(d) for d in data])
        data[1:] = np.log10(data[1:]) if log else data[1:]
        data = data[:, np.isfinite(data[:2]).all(axis=0)]
        lines.append((name if data.size else f"{name} (no data)", data, PALETTE[i % len(PALETTE)], i >= len(PALETTE)))
    x, y = (np.concatenate([[], *(data[rows].ravel() for _, data, *_ in lines)]) for rows in (slice(0, 1), slice(1, None)))
    if len(x):
        flat = {name: v for name, v in (hline or {}).items() if v is not None and np.isfinite(v)}
        ends, y = xlim or (x.min(), x.max()), np.append(y, list(flat.values()))
        lines += [(name, np.array([ends, (v, v)]), (GREY, LIGHT)[i % 2], True) for i, (name, v) in enumerate(flat.items())]
        lines += [(name, np.array([(v, v), ylim or (np.nanmin(y), np.nanmax(y))]), LIGHT, False) for name, v in (vline or {}).items()]
    axes = Axes(canvas, box, x, y, xlabel, ylabel, title, [(name, *style) for name, _, *style in lines], xlim, ylim, whole, log)
    for _, data, color, _ in lines:
        if len(data) == 4:
            x, _, lo, hi = data[:, np.isfinite(data).all(axis=0)]
            axes.line(x, lo, color, upper=hi)
    for _, (x, y, *_), color, dashed in lines[::-1]:                                    # the first name on top
        axes.line(x, y, color, dashed, dots=len(x) <= 40 and color in PALETTE, thick=2 if len(x) <= 300 else 1.25)


# ---------------------------------------------------------------- the pictures
def line_chart(path, series, title="", xlabel="", ylabel="", xlim=None, ylim=None, hline=None):
    """series {name: (x, y)} or {name: (x, y, lo, hi)}, the latter with a band; hline {name: value}, such as a baseline."""
    canvas = Canvas(760, 460, title)
    chart(canvas, (8, 40, 752, 456), series, "", xlabel, ylabel, xlim, ylim, hline)
    return canvas.save(path)


def coverage(path, series, title="Accuracy on the images the model is surest of", unit="images"):
    """series {name: (shares kept, accuracies)}; at the right, 1.0, every image (or other `unit`) is decided."""
    return line_chart(path, series, title, f"share of {unit} kept, the most certain first", f"accuracy on the {unit} kept", xlim=(0, 1))


def grouped_bars(path, series, names, title="", note="", mark=None):
    """series {name: values (K,) in 0..1}: a bar of each beside each of the K `names`, "undefined" where not finite; a grey line at `mark`."""
    names = [shorten(name, 13, 170) for name in names]
    left = 28 + int(max(map(font(13).getlength, names), default=0))
    full, step, top = 676 - left, 17 * len(series) + 12, 68 + 18 * len(series)          # `full`: pixels of 1
    canvas = Canvas(760, top + step * len(names) + 8, title)
    canvas.text(16, 36, note, color=GREY)
    for i, name in enumerate(names):
        canvas.text(left - 8, top + step * i + 17 * len(series) / 2 - 1, name, anchor="rm")
    for j, (name, values) in enumerate(series.items()):
        color = PALETTE[j % len(PALETTE)]
        canvas.draw.rectangle((16, 60 + 18 * j, 30, 73 + 18 * j), fill=color)
        canvas.text(38, 66 + 18 * j, name, anchor="lm")
        for i, v in enumerate(numbers(values)):
            y, end = top + step * i + 17 * j, left + round(full * np.clip(np.nan_to_num(v), 0, 1))
            if end > left:
                canvas.draw.rectangle((left, y, end - 1, y + 14), fill=color)
            canvas.text(end + 6, y + 7, f"{v:.3f}" if np.isfinite(v) else "undefined", 12, "lm", GREY)
    if mark is not None:
        canvas.draw.line((left + full * mark, top - 6, left + full * mark, canvas.height - 14), fill=LIGHT)
    return canvas.save(path)


def curves(path, history, title="", panels=None, best=None):
    """history: a dict an epoch, keys may be missing; panels [(title, y label, [keys])], by default the losses and the val_ metrics; best: an
    epoch to mark. The y axis is logarithmic where the values of a panel are positive and differ by more than a factor of 30."""
    keys = list(dict.fromkeys(k for row in history for k, v in row.items() if isinstance(v, (int, float))))
    panels = panels or [("Losses", "loss", [k for k in keys if "loss" in k]),
                        ("Validation", "metric", [k for k in keys if k.startswith("val_") and "loss" not in k])]
    panels = [p for p in panels if p[2]] or [("", "", [])]
    epochs = [row.get("epoch", i + 1) for i, row in enumerate(history)]
    columns = min(3, len(panels))
    canvas = Canvas(max(16 + 470 * columns, 560), 44 + 360 * -(-len(panels) // columns), title)
    xlim = (0, max(epochs)) if len(set(epochs)) > 1 else None
    vline = {} if best is None else {f"selected: epoch {best}": best}
    for i, (name, label, chosen) in enumerate(panels):
        values = {k: numbers(row.get(k) for row in history) for k in chosen}
        every = np.concatenate([[], *values.values()])
        log = bool(np.isfinite(every).any() and 0 < np.nanmin(every) < np.nanmax(every) / 30)
        left, top = 8 + 470 * (i % columns), 44 + 360 * (i // columns)
        chart(canvas, (left, top, left + 466, top + 352), {k: (epochs, v) for k, v in values.items()}, name, "epoch", label + " (log scale)" * log,
              xlim, vline=vline, whole=True, log=log)
    return canvas.save(path)


def reliability(path, confidence, accuracy, count, ece=None, title="Reliability", pooled=False):
    """Per bin of equal width on 0..1: mean confidence, accuracy (nan where a bin is empty), number of images. Under the diagonal the model claims
    more than it achieves. pooled: of several labels, the share of ones among answers of like probability."""
    what, height, unit = ("label", "share of positives", "answers") if pooled else ("predicted class", "accuracy", "images")
    confidence, accuracy, count = numbers(confidence), numbers(accuracy), numbers(count)
    canvas = Canvas(560, 640, title)
    error = "" if ece is None else f"expected calibration error {ece:.3f}{', mean of the labels' * pooled}, {np.nansum(count):,.0f} {unit}"
    canvas.text(16, 40, error, color=GREY)
    legend = [(f"{height} in the bin", SKY, False), ("against the mean confidence in the bin", VERMILION, False), ("ideal", GREY, True)]
    upper = Axes(canvas, (8, 62, 552, 462), confidence, accuracy, "", height, "", legend, (0, 1), (0, 1), gutter=84)
    xlabel = f"confidence (probability of the {what})"
    lower = Axes(canvas, (8, 436, 552, 636), count, np.append(count, (0, 1)), xlabel, unit, xlim=(0, 1), gutter=84)
    for axes, heights, color in (upper, accuracy, SKY), (lower, count, GREY):
        for i in np.flatnonzero(heights > 0):
            axes.bar(i / len(count), (i + 1) / len(count), heights[i], color)
    upper.line([0, 1], [0, 1], GREY, dashed=True)
    known = np.isfinite(confidence + accuracy)
    upper.line(confidence[known], accuracy[known], VERMILION, dots=True)
    return canvas.save(path)


def confusion(path, matrix, classes, title="Confusion matrix"):
    """matrix (K,K) of counts, row = true, column = predicted. The shade and the percent are the share of the row; a cell of 0 shows only that."""
    matrix = np.nan_to_num(np.asarray(matrix, dtype=np.float64))
    K, side = len(matrix), int(np.clip(690 // max(len(matrix), 1), 46, 92))
    names = [shorten(c, 13, 170) for c in classes]
    longest = max(map(font(13).getlength, names), default=0)
    turned = longest > side - 8                                                         # names under the columns at 45 degrees
    left, top = int(longest) + 52, 66
    canvas = Canvas(max(left + K * side + 24, 430), top + K * side + 48 + (0.72 * longest + 12 if turned else 16), title)
    canvas.text(16, 38, "count, and percent of the row (share of the true class)", color=GREY)
    for i, row in enumerate(matrix):
        y = top + i * side
        canvas.text(left - 8, y + side / 2, names[i], anchor="rm")
        canvas.text(left + (i + 0.5) * side + 4 * turned, top + K * side + 6, names[i], anchor="ra" if turned else "ma", angle=45 * turned)
        for j, n in enumerate(row):
            x, share = left + j * side, n / max(row.sum(), 1e-12)
            canvas.draw.rectangle((x, y, x + side, y + side), fill=tuple(int(255 - (255 - c) * share) for c in (86, 180, 233)), outline="#C8C8C8")
            color = INK if n else GREY
            canvas.text(x + side / 2, y + side / 2 - 9 * (n > 0), f"{n:,.0f}", 14 if side > 60 else 12, "mm", color)
            canvas.text(x + side / 2, y + side / 2 + 9, "" if n == 0 else "<1 %" if share < 0.005 else f"{100 * share:.0f} %", 12, "mm", color)
    canvas.text(left + K * side / 2, canvas.height - 26, "predicted", 14, "ma")
    canvas.text(18, top + K * side / 2, "true", 14, "mm", angle=90)
    return canvas.save(path)


def to_uint8(x):
    """Tensors of images in [-1, 1] -> uint8 arrays."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def picture(image):
    """uint8 (C,H,W) to a PIL image: RGB of three channels, else grey of the first."""
    image = np.asarray(image)
    assert image.dtype == np.uint8 and image.ndim == 3, f"an image is uint8 (C,H,W), not {image.dtype} {image.shape}"
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0) if len(image) == 3 else image[0])).convert("RGB")


def image_grid(path, images, labels=None, row_names=None, columns=8, scale=None, title=""):
    """images uint8 (N,C,H,W), broken into rows of `columns`, or a list of rows of images; labels likewise, several lines if wanted.
    `scale` enlarges without smoothing; by default to 96 pixels or a little more."""
    labels = [] if labels is None else labels
    if len(images) and getattr(images[0], "ndim", 4) == 3:
        images = [images[i:i + columns] for i in range(0, len(images), columns)]
    if len(labels) and np.ndim(labels[0]) == 0:
        columns = max(map(len, images), default=1)
        labels = [labels[i:i + columns] for i in range(0, len(labels), columns)]
    w, h = picture(next((row[0] for row in images if len(row)), np.zeros((1, 96, 96), np.uint8))).size
    scale = scale or -(-96 // min(w, h))
    w, h = round(w * scale), round(h * scale)

    def wrap(label):                                                                    # each of its lines in two rows at most
        rows = [paragraph(line, 12, w + 2) for line in str(label).split("\n")]
        return [text for row in rows for text in row[:1] + [shorten(" ".join(row[1:]), 12, w + 2)] if text]
    texts = [[wrap(label) for label in row] for row in labels]
    lines = max((len(text) for row in texts for text in row), default=0)
    names = [shorten(name, 13, 190) for name in row_names or []]
    left, top, step = 16 + int(max((font(13).getlength(s) + 10 for s in names), default=0)), 44 if title else 12, h + 12 + 16 * lines
    canvas = Canvas(max(left + max(map(len, images), default=2) * (w + 8) + 8, 200), top + max(len(images), 1) * step + 4, title)
    for r, row in enumerate(images):
        y = top + r * step
        canvas.text(left - 10, y + h / 2, "".join(names[r:r + 1]), anchor="rm")
        for c, image in enumerate(row):
            x = left + c * (w + 8)
            canvas.image.paste(picture(image).resize((w, h), Image.Resampling.NEAREST), (x, y))
            for k, line in enumerate(texts[r][c] if r < len(texts) and c < len(texts[r]) else ()):
                canvas.text(x + w / 2, y + h + 3 + 16 * k, line, 12, "ma")
    if not len(images):
        canvas.text(100, top + 40, "no data", 16, "mm", GREY)
    return canvas.save(path)


def panel(path, image, title, bars, lines=(), intervals=None, most=10):
    """One prediction: image uint8 (C,H,W), bars {class: probability} (the `most` largest are shown), lines of text, intervals {class: (lo, hi)}."""
    bars = {name: float(p) for name, p in bars.items()}
    shown = sorted(bars, key=lambda name: -np.nan_to_num(bars[name]))[:most]
    text = [row for line in lines for row in paragraph(line, 14, 724)]
    image = picture(image)
    size = [max(1, round(256 * side / max(image.size))) for side in image.size]
    names = [shorten(name, 13, 170) for name in shown]
    left = 312 + int(max(map(font(13).getlength, names), default=0))
    full, below = 696 - left, 52 + max(256, 26 * len(shown) + 22) + 20                  # `full`: pixels of probability 1
    canvas = Canvas(760, below + 21 * len(text) + 36, title)
    canvas.image.paste(image.resize(size, Image.Resampling.NEAREST if max(image.size) < 256 else Image.Resampling.LANCZOS), (16, 52))
    heading = "probability" + " and interval" * bool(intervals) + f", {len(shown)} largest of {len(bars)} classes" * (len(bars) > len(shown))
    canvas.text(left, 50, heading, color=GREY)
    for i, name in enumerate(shown):
        y, p = 74 + 26 * i, np.clip(np.nan_to_num(bars[name]), 0, 1)
        canvas.text(left - 8, y + 9, names[i], anchor="rm")
        canvas.draw.rectangle((left, y, left + full, y + 18), fill=PALE)
        if p > 0:
            canvas.draw.rectangle((left, y, left + round(full * p), y + 18), fill=SKY)
        lo, hi = left + full * np.clip(numbers((intervals or {}).get(name, (None, None))), 0, 1)
        if np.isfinite(lo + hi):
            for stroke in (lo, y + 9, hi, y + 9), (lo, y + 4, lo, y + 14), (hi, y + 4, hi, y + 14):
                canvas.draw.line(stroke, fill=INK, width=2)
        canvas.text(left + full + 8, y + 9, f"{bars[name]:.3f}", anchor="lm")
    for i, line in enumerate(text):
        canvas.text(16, below + 21 * i, line, 14)
    canvas.text(16, canvas.height - 26, "not for clinical use", color=VERMILION)
    return canvas.save(path)


def overlay(image, heat=None, boxes=(), marks=(), side=256):
    """image uint8 (C,H,W) enlarged to `side` -> uint8 (3,h,w), with a map heat (rows,columns) from clear (least) to red (most) laid over it, and
    boxes (x0, y0, x1, y1) in the image's pixels with a short text each."""
    image = picture(image)
    scale = side / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    if heat is not None:
        heat = np.asarray(heat, dtype=np.float32)
        heat = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)
        weight = Image.fromarray((heat * 165).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
        image.paste(VERMILION, (0, 0), weight)
    draw = ImageDraw.Draw(image)
    for i, box in enumerate(boxes):
        x0, y0, x1, y1 = (round(float(v) * scale) for v in box)
        x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
        for grow, color in (1, BLACK), (0, "white"):                                    # seen on light and on dark
            draw.rectangle((x0 - grow, y0 - grow, x1 - 1 + grow, y1 - 1 + grow), outline=color)
        if i < len(marks):
            draw.text((x0 + 3, y0 + 1), str(marks[i]), "white", font=font(12), stroke_width=2, stroke_fill=BLACK)
    return np.asarray(image).transpose(2, 0, 1)


def signed(difference, side=256):
    """A map (rows,columns) of what is more or less, enlarged to `side` -> uint8 (3,h,w): grey none, orange more, blue less, deepest at the largest."""
    d = np.asarray(difference, dtype=np.float32)
    d = d / max(np.abs(d).max(), 1e-12)
    none, more, less = (np.array(ImageColor.getrgb(color), np.float32)[:, None, None] for color in (PALE, VERMILION, BLUE))
    return overlay((none + np.abs(d) * (np.where(d > 0, more, less) - none)).round().astype(np.uint8), side=side)


def explanation(path, title, tiles, charts, lines=(), columns=99):
    """Why a model decided so: tiles {caption: uint8 (C,h,w) of equal size} in rows of `columns`, a row of charts [(series, title, x label, y label)]
    as `chart` draws them, and lines of text."""
    tiles = {caption: picture(tile) for caption, tile in tiles.items()}
    w, h = next(iter(tiles.values())).size
    width = max(16 + min(len(tiles), columns) * (w + 12), 620)
    texts = [paragraph(caption, 12, w) for caption in tiles]
    text = [row for line in lines for row in paragraph(line, 14, width - 32)]
    step = h + 18 + 16 * max(map(len, texts))
    top = 42 + -(-len(tiles) // columns) * step
    canvas = Canvas(width, top + 330 * bool(charts) + 21 * len(text) + 44, title)
    for i, (tile, rows) in enumerate(zip(tiles.values(), texts)):
        x, y = 16 + i % columns * (w + 12), 48 + i // columns * step
        canvas.image.paste(tile, (x, y))
        for k, row in enumerate(rows):
            canvas.text(x + w / 2, y + 6 + h + 16 * k, row, 12, "ma")
    for i, (series, name, xlabel, ylabel) in enumerate(charts):
        left, right = 8 + i * (width - 16) // len(charts), 8 + (i + 1) * (width - 16) // len(charts)
        chart(canvas, (left, top, right, top + 325), series, name, xlabel, ylabel)
    for i, row in enumerate(text):
        canvas.text(16, top + 330 * bool(charts) + 8 + 21 * i, row, 14)
    canvas.text(16, canvas.height - 26, "not for clinical use", color=VERMILION)
    return canvas.save(path)


def scatter(path, panels, labels, classes, title="", note=""):
    """panels {title: points (N,2)} side by side in frames without axes, coloured by labels (N,) into `classes`; four frames a row, then the legend."""
    columns, side = 4, 220
    canvas = Canvas(16 + columns * (side + 12), 60 + -(-(len(panels) + 1) // columns) * (side + 34), title)
    canvas.text(16, 36, note, 12, color=GREY)
    shown = [k for k in range(len(classes)) if (np.asarray(labels) == k).any()]

    def mark(draw, x, y, k, r):                                                         # a colour, and another shape after seven
        shape = (draw.ellipse, draw.rectangle)[k // len(PALETTE) % 2]
        shape((x - r, y - r, x + r, y + r), fill=PALETTE[k % len(PALETTE)])
    for i, (name, points) in enumerate(panels.items()):
        left, top, points = 16 + i % columns * (side + 12), 60 + i // columns * (side + 34), np.asarray(points, dtype=np.float64)
        canvas.text(left, top, name, 13, room=side)
        low, span = points.min(0), max(float(np.ptp(points, axis=0).max()), 1e-12)
        tile = Image.new("RGB", (side * FINE, side * FINE), "white")
        draw = ImageDraw.Draw(tile)
        for (x, y), k in zip(10 * FINE + (points - low + (span - np.ptp(points, axis=0)) / 2) / span * (side - 20) * FINE, labels):
            mark(draw, x, y, int(k), 2.6 * FINE)
        canvas.image.paste(tile.resize((side, side), Image.Resampling.BOX), (left, top + 20))
        canvas.draw.rectangle((left, top + 20, left + side, top + 20 + side), outline=LIGHT)
    left, top = 28 + len(panels) % columns * (side + 12), 84 + len(panels) // columns * (side + 34)
    for i, k in enumerate(shown[:12]):
        mark(canvas.draw, left, top + 18 * i + 8, k, 4)
        canvas.text(left + 12, top + 18 * i, f"{classes[k]} ({(np.asarray(labels) == k).sum()})", 13, room=side - 30)
    return canvas.save(path)
