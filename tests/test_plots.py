"""common/plots.py: the numbers on an axis, what a picture must show, and data that must not stop a run."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import plots

LONG = ["actinic keratosis / intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesion", "dermatofibroma", "melanoma",
        "melanocytic nevus", "vascular lesion"]
NAN = float("nan")
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 3, 32, 32), dtype=np.uint8)


def history(n):
    return [{"epoch": i, "loss": np.exp(-5 * i / n), "loss_mmd": 0.1 / i, "lr": 1e-3} | ({"val_accuracy": 1 - 0.5 / i} if i % 3 == 0 else {})
            for i in range(1, n + 1)]


def tiles(n, side=256):
    """As an explanation has them: {caption: picture}."""
    captions = "ISIC_0024306.jpg", f"saliency of {LONG[0]}", "regions, with their attention"
    return {captions[i % 3] + " " * (i // 3): plots.overlay(IMAGES[i], side=side) for i in range(n)}


def path_of(classes, S, steps=20):
    """Entries of y_t over a path, two of them with a band of S draws."""
    y = np.random.default_rng(0).normal(size=(S, steps + 1, len(classes))).cumsum(1)
    return {c: (np.arange(steps + 1), y[:, :, k].mean(0), *(np.quantile(y[:, :, k], (.1, .9), 0) if k < 2 else ())) for k, c in enumerate(classes)}


def cloud(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 2))


SERIES = "y_t: mean of 20 draws, band from 10 to 90 % of them", "reverse steps done: from t = T to 0", "entry of y_t"
PROBABILITY = "probability: " + ", ".join(f"{c} {i / 21:.3f}" for i, c in enumerate(LONG[:5]))


def coloured(path, color):
    """How many pixels of the picture have exactly this colour."""
    rgb = tuple(int(color[i:i + 2], 16) for i in (1, 3, 5))
    return int((np.asarray(Image.open(path)) == rgb).all(axis=-1).sum())


def rows_of(path, color):
    """(topmost, lowest) row in which this colour occurs."""
    rgb = tuple(int(color[i:i + 2], 16) for i in (1, 3, 5))
    found = np.flatnonzero((np.asarray(Image.open(path)) == rgb).all(axis=-1).any(axis=1))
    return found[0], found[-1]


PICTURES = {
    "curves of 12 epochs": lambda p: plots.curves(p, history(12), "a run", best=9),
    "curves of 1000 epochs": lambda p: plots.curves(p, history(1000), "a run", [("Loss", "loss", ["loss", "loss_mmd"])] * 4, best=720),
    "curves of nothing": lambda p: plots.curves(p, []),
    "curves of one epoch": lambda p: plots.curves(p, [{"epoch": 1, "loss": 0.5}], "one"),
    "curves of a key that is not there": lambda p: plots.curves(p, history(3), "", [("A", "a", ["nowhere"])]),
    "curves of nan": lambda p: plots.curves(p, [{"loss": NAN}, {"loss": float("inf")}, {"loss": None}]),
    "lines": lambda p: plots.line_chart(p, {c: ([1, 2, 3], [0.1, 0.2, i / 9]) for i, c in enumerate(LONG + ["a", "b"])}, "t", hline={"Bayes": 0.9}),
    "a band": lambda p: plots.line_chart(p, {"a": ([1, 2, 3], [1, 2, 3], [0, NAN, 2], [2, 3, 4])}, "t", "steps", "accuracy", ylim=(0, 1)),
    "one point": lambda p: plots.line_chart(p, {"a": ([3], [0.5])}, "t", "steps", "accuracy"),
    "a constant": lambda p: plots.line_chart(p, {"a": ([1, 2], [0, 0]), "b": ([1, 2], [NAN, NAN])}, "t", "steps", "accuracy", hline={"none": NAN}),
    "huge and tiny": lambda p: plots.line_chart(p, {"a": ([0, 1e-7, 2e-7], [1e12, -1e12, 1e300])}, "t", "steps", "accuracy"),
    "no lines": lambda p: plots.line_chart(p, {}, "t", "steps", "accuracy", hline={"Bayes": 0.9}),
    "letters the font lacks": lambda p: plots.line_chart(p, {"π 中文 \udcff": ([1, 2], [1, 2])}, "Ü\n\x00 \U0001F600", "шаг", "точность"),
    "a title too long": lambda p: plots.coverage(p, {"x" * 500: ([0.1, 1], [0.9, 0.8])}, "w" * 500),
    "bars of 14 labels": lambda p: plots.grouped_bars(p, {m: np.linspace(j / 4, 1, 14) for j, m in enumerate("ab")}, LONG * 2, "t", "note", .5),
    "bars of nan": lambda p: plots.grouped_bars(p, {"a": [NAN, 0, 1], "w" * 500: [.5, None, 7]}, ["x" * 300, "y", ""], "w" * 500, "n" * 500, .5),
    "confusion of 1": lambda p: plots.confusion(p, [[3]], ["only"]),
    "confusion of 2": lambda p: plots.confusion(p, [[512, 44], [0, 0]], ["normal", "pneumonia"], "t"),
    "confusion of 7": lambda p: plots.confusion(p, np.full((7, 7), 1341), LONG),
    "confusion of 15": lambda p: plots.confusion(p, np.diag(np.full(15, 99999)), LONG * 2 + ["nv"]),
    "reliability": lambda p: plots.reliability(p, [NAN, 0.3, 0.5, 0.7, 0.95], [NAN, 0.2, 0.5, 0.6, 0.9], [0, 10, 20, 30, 12345], 0.04, "t"),
    "reliability of several labels": lambda p: plots.reliability(p, [.1, .9], [.2, .8], [10, 99999], 0.04, "t", pooled=True),
    "reliability of nothing": lambda p: plots.reliability(p, [NAN] * 5, [NAN] * 5, [0] * 5, NAN),
    "grid": lambda p: plots.image_grid(p, IMAGES, [f"true: {LONG[i % 7]}\npredicted: nv" for i in range(11)], columns=4, title="t"),
    "grid of rows": lambda p: plots.image_grid(p, [IMAGES[:3], IMAGES[3:5], []], [["input", "a", "counterfactual"], ["b", "c"]], row_names=LONG[:3]),
    "grid of nothing": lambda p: plots.image_grid(p, IMAGES[:0]),
    "grid of grey 300 x 200": lambda p: plots.image_grid(p, np.zeros((2, 1, 200, 300), np.uint8), ["a", "b"]),
    "panel": lambda p: plots.panel(p, IMAGES[0], "a.jpg: nv", dict(zip(LONG, np.arange(7) / 21)), ["words " * 60, "x" * 300], {LONG[3]: (0.1, 0.3)}),
    "panel of 40 classes": lambda p: plots.panel(p, np.zeros((1, 700, 20), np.uint8), "t", {f"class {i}": i / 800 for i in range(40)}),
    "panel of all of 40 labels": lambda p: plots.panel(p, IMAGES[0], "t", {f"label {i}": i / 39 for i in range(40)}, most=40),
    "panel of nothing": lambda p: plots.panel(p, IMAGES[0], "", {}),
    "tensors": lambda p: plots.panel(p, torch.from_numpy(IMAGES[0]), "t", {"a": torch.tensor(0.5)}, intervals={"a": torch.tensor([0.1, 0.6])}),
    "a line of tensors": lambda p: plots.line_chart(p, {"a": (torch.arange(4), torch.ones(4), torch.zeros(4), torch.ones(4))}, "t"),
    "grid of tensors": lambda p: plots.image_grid(p, torch.from_numpy(IMAGES), torch.arange(11)),
    "confusion of a tensor": lambda p: plots.confusion(p, torch.eye(3), ["a", "b", "c"]),
    "explanation": lambda p: plots.explanation(p, f"{LONG[0]} (true: {LONG[4]})", tiles(3), [(path_of(LONG[:5], 20), *SERIES)], [PROBABILITY]),
    "explanation of one tile": lambda p: plots.explanation(p, "nv", tiles(1), [(path_of(["a", "b"], 1), *SERIES)], [PROBABILITY]),
    "explanation of one draw": lambda p: plots.explanation(p, "nv", tiles(3), [(path_of(LONG[:5], 1, 1), *SERIES)], [PROBABILITY]),
    "explanation of four tiles and two charts": lambda p: plots.explanation(
        p, "w" * 500, tiles(4), [(path_of(LONG[:2], 3), *SERIES), (path_of(["a"], 2), *SERIES)], ["words " * 60, "x" * 300]),
    "explanation without charts": lambda p: plots.explanation(p, "", {"x" * 300: plots.overlay(IMAGES[0]), "words " * 30: IMAGES[1].repeat(8, 1).repeat(8, 2)}, []),
    "explanation of eight tiles in two rows": lambda p: plots.explanation(p, "t", tiles(8), [(path_of(["a"], 2), *SERIES)], [PROBABILITY], 4),
    "explanation of nan": lambda p: plots.explanation(p, "t", tiles(3), [({"a": ([0, 1], [NAN, NAN], [NAN, NAN], [NAN, NAN])}, *SERIES)]),
    "scatter": lambda p: plots.scatter(p, {f"t = {t}": cloud(60, t) for t in range(7)}, np.arange(60) % 5, LONG[:5], "t-SNE", "colour: true class"),
    "scatter of 12 classes with long names": lambda p: plots.scatter(
        p, {"x" * 200: cloud(240), "y" * 200: cloud(240, 1)}, np.arange(240) % 12, [f"{c} {i}" for i, c in enumerate(LONG * 2)][:12], "w" * 500, "n" * 500),
    "scatter of 12 classes behind three": lambda p: plots.scatter(p, {f"t = {t}": cloud(24) for t in (1, 2, 3)}, np.arange(24) % 12, LONG * 2, "t", "n"),
    "scatter of four and no more": lambda p: plots.scatter(p, {f"t = {t}": cloud(24) for t in range(4)}, np.arange(24) % 2, LONG, "t", "n"),
    "scatter of constant points": lambda p: plots.scatter(p, {"a": np.full((6, 2), 3.), "b": np.stack([np.arange(6), np.zeros(6)], 1)}, [0] * 6, ["only"]),
    "scatter of one point": lambda p: plots.scatter(p, {"a": [[1e9, -1e-9]]}, [1], ["a", "b"]),
    "panel of nan": lambda p: plots.panel(p, IMAGES[0], "t", {"a": NAN, "b": 1.0}, intervals={"b": (NAN, 1)}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_written_whole_and_its_words_neither_overlap_nor_leave_it(name, tmp_path, monkeypatch):
    canvases, save = [], plots.Canvas.save
    monkeypatch.setattr(plots.Canvas, "save", lambda self, path: canvases.append(self) or save(self, path))
    path = PICTURES[name](str(tmp_path / "new" / "folder" / "a.png"))
    assert path == tmp_path / "new" / "folder" / "a.png"
    assert [f.name for f in path.parent.iterdir()] == ["a.png"], "a temporary file was left behind"
    with Image.open(path) as image:
        assert image.mode == "RGB" and 200 <= image.width <= 1500 and 100 <= image.height <= 1500
        width, height = image.size
    boxes = canvases[0].boxes
    for left, top, right, bottom, _ in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    straight = [box for box in boxes if box[4] != 45]                                   # the frames of slanted names overlap, the names do not
    for i, a in enumerate(straight):
        for b in straight[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"words overlap: {a} {b}"


@pytest.mark.parametrize("lo, hi, expected", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 12, [0, 5, 10, 15]), (0.41, 0.93, [0.4, 0.6, 0.8, 1]),
                                              (0, 1000, [0, 200, 400, 600, 800, 1000]), (-3, 3, [-4, -2, 0, 2, 4]), (0, 3e-5, [0, 1e-5, 2e-5, 3e-5])])
def test_ticks_are_the_numbers_a_person_would_choose(lo, hi, expected):
    assert plots.ticks(lo, hi) == expected


def test_ticks_cover_the_range_in_few_even_steps_of_1_2_or_5():
    rng = np.random.default_rng(0)
    for _ in range(500):
        lo = rng.normal() * 10 ** rng.uniform(-3, 6)
        hi = lo + 10 ** rng.uniform(-3, 6)
        count = int(rng.integers(2, 9))
        values = plots.ticks(lo, hi, count)
        steps = np.diff(values)
        assert values[0] <= lo + 1e-6 * steps[0] and values[-1] >= hi - 1e-6 * steps[0] and len(steps) <= count + 1
        assert np.allclose(steps, steps[0], rtol=1e-3)
        assert min(abs(steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-6) - m) for m in (1, 2, 5)) < 1e-2
        assert len(set(plots.tick_labels(values))) == len(values), "two ticks have the same label"


@pytest.mark.parametrize("value", [0, 0.5, -7, 1e9, 1e-12])
def test_ticks_of_a_single_value_have_it_inside(value):
    values = plots.ticks(value, value)
    assert values[0] < value < values[-1]


def test_epochs_are_whole_numbers():
    assert plots.ticks(1, 2, 5, whole=True) == [1, 2]
    assert plots.ticks(1, 1, 5, whole=True) == [0, 1, 2]


def test_a_logarithmic_axis_is_labelled_with_1_2_5_and_a_wide_one_with_the_decades():
    narrow, _ = plots.Axes.choose(np.log10([0.03, 1.5]), None, 5, log=True)
    wide, _ = plots.Axes.choose(np.log10([3e-5, 15]), None, 5, log=True)
    assert np.allclose(10 ** np.array(narrow), [0.05, 0.1, 0.2, 0.5, 1])
    assert np.allclose(10 ** np.array(wide), [1e-4, 1e-3, 1e-2, 1e-1, 1, 10])


def test_words_are_shortened_to_the_room_and_drawn_in_letters_the_font_has():
    assert plots.shorten("nv", 13, 100) == "nv"
    short = plots.shorten(LONG[0], 13, 100)
    assert short.endswith("…") and LONG[0].startswith(short[:-1]) and plots.font(13).getlength(short) <= 100
    assert plots.shorten("é 中", 13, 100) in ("é ?", "e ?")
    rows = plots.paragraph("one two three four", 13, 60)
    assert " ".join(rows) == "one two three four" and len(rows) > 1 and all(plots.font(13).getlength(row) <= 60 for row in rows)


def test_words_at_the_edge_are_pushed_back_into_the_picture():
    canvas = plots.Canvas(200, 100)
    for x, y in (0, 0), (200, 0), (0, 100), (200, 100):
        canvas.text(x, y, "legible", anchor="mm")
    widths = {right - left for left, _, right, _, _ in canvas.boxes}
    assert len(widths) == 1 and all(0 <= l and 0 <= t and r <= 200 and b <= 100 for l, t, r, b, _ in canvas.boxes)


def test_a_line_is_at_the_height_its_value_says(tmp_path):
    heights = [np.mean(rows_of(plots.line_chart(tmp_path / "a.png", {"": ([0, 1], [v, v])}, ylim=(0, 1)), plots.BLUE)[1]) for v in (0.25, 0.5, 0.75)]
    assert heights[0] > heights[1] > heights[2] and abs((heights[0] - heights[1]) - (heights[1] - heights[2])) <= 1


def test_data_outside_the_limits_are_not_drawn_over_the_labels(tmp_path):
    inside = plots.line_chart(tmp_path / "a.png", {"": ([0, 1], [0, 1])}, ylim=(0, 1))
    outside = plots.line_chart(tmp_path / "b.png", {"": ([0, 1], [-5, 6])}, ylim=(0, 1))
    assert rows_of(outside, plots.BLUE)[1] <= rows_of(inside, plots.BLUE)[1] + 4


def test_a_key_measured_every_third_epoch_is_drawn_as_one_line(tmp_path):
    rows = [{"epoch": i} | ({"a": 0.5} if i % 3 == 1 else {}) for i in range(1, 11)]
    full = plots.curves(tmp_path / "a.png", [{"epoch": i, "a": 0.5} for i in range(1, 11)], panels=[("", "", ["a"])])
    some = plots.curves(tmp_path / "b.png", rows, panels=[("", "", ["a"])])
    columns = [np.flatnonzero((np.asarray(Image.open(p)) == (0, 0x72, 0xB2)).all(axis=-1).any(axis=0)) for p in (full, some)]
    assert np.array_equal(*columns)


def test_a_likelier_class_has_a_longer_bar(tmp_path):
    small, large = (coloured(plots.panel(tmp_path / "a.png", IMAGES[0] * 0, "t", {"a": p}), plots.SKY) for p in (0.3, 0.6))
    assert large == pytest.approx(2 * small, rel=0.02)


def test_a_group_has_a_bar_of_each_series_as_long_as_its_value_and_none_where_it_is_undefined(tmp_path):
    path = plots.grouped_bars(tmp_path / "a.png", {"a": [.5, .25], "b": [1., NAN]}, ["x", "y"])
    square, unit = 15 * 14, (676 - 28 - int(plots.font(13).getlength("y"))) * 15       # in the legend; a bar of 1
    assert coloured(path, plots.BLUE) - square == pytest.approx(.75 * unit, rel=.01)
    assert coloured(path, plots.VERMILION) - square == pytest.approx(unit, rel=.01)
    (high, low), (other, _) = rows_of(path, plots.BLUE), rows_of(path, plots.VERMILION)
    assert high < other < low, "the second label's bar lies below"


def test_a_panel_has_as_many_bars_as_asked(tmp_path):
    bars = {f"label {i:02}": 1. for i in range(14)}
    ten, all_ = (coloured(plots.panel(tmp_path / "a.png", IMAGES[0], "t", bars, **most), plots.SKY) for most in ({}, dict(most=14)))
    assert all_ / ten == pytest.approx(1.4, rel=.02)                     # names of other widths leave other room


def test_accuracy_and_count_are_areas_in_the_reliability_picture(tmp_path):
    def areas(accuracy, count):
        path = plots.reliability(tmp_path / "a.png", [0.25, 0.75], [0.0, accuracy], [count, 100])
        return coloured(path, plots.SKY), coloured(path, plots.GREY)
    (low, few), (high, many) = areas(0.4, 10), areas(0.8, 90)
    assert high == pytest.approx(2 * low, rel=0.05) and many > few + 1000


def test_a_cell_of_the_confusion_matrix_is_shaded_by_the_share_of_its_row(tmp_path):
    image = np.asarray(Image.open(plots.confusion(tmp_path / "a.png", [[30, 10], [0, 4000]], ["a", "b"])))
    left, top = int(plots.font(13).getlength("b")) + 52, 66
    corner = {(i, j): image[top + i * 92 + 5, left + j * 92 + 5].astype(int) for i in (0, 1) for j in (0, 1)}
    sky = np.array([0x56, 0xB4, 0xE9])
    assert (corner[1, 1] == sky).all() and (corner[1, 0] == 255).all()
    assert np.abs(corner[0, 0] - (255 + 0.75 * (sky - 255))).max() <= 1 and np.abs(corner[0, 1] - (255 + 0.25 * (sky - 255))).max() <= 1


def test_a_grid_shows_every_pixel_enlarged_and_in_order_with_its_label_below(tmp_path, monkeypatch):
    canvases, save = [], plots.Canvas.save
    monkeypatch.setattr(plots.Canvas, "save", lambda self, path: canvases.append(self) or save(self, path))
    path = plots.image_grid(tmp_path / "a.png", IMAGES[:4], [f"true: {LONG[0]}\npredicted: nv"] * 4, columns=2, scale=3)
    shown, step = np.asarray(Image.open(path)), 96 + 12 + 3 * 16
    assert len(canvases[0].boxes) == 4 * 3, "a long true class takes two rows, the predicted class is still there"
    for _, top, _, bottom, _ in canvases[0].boxes:
        assert (top - 12) // step == (bottom - 12) // step and (top - 12) % step >= 96, "a label lies on an image"
    for k in range(4):
        y, x = 12 + (k // 2) * step, 16 + (k % 2) * (96 + 8)
        assert np.array_equal(shown[y:y + 96, x:x + 96][::3, ::3].transpose(2, 0, 1), IMAGES[k])
        assert np.array_equal(shown[y:y + 96, x:x + 96][2::3, 2::3].transpose(2, 0, 1), IMAGES[k])


def test_an_image_that_is_not_uint8_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(AssertionError, match="uint8"):
        plots.image_grid(tmp_path / "a.png", IMAGES.astype(np.float32))


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = plots.line_chart(tmp_path / "a.png", {"a": ([0, 1], [0, 1])})
    before = path.read_bytes()

    def full_disk(self, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError):
        plots.line_chart(path, {"b": ([0, 1], [1, 0])})
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.png"]


# ---------------------------------------------------------------- overlays, explanations, scatters
GREYS = np.broadcast_to(np.linspace(60, 120, 32).astype(np.uint8)[:, None], (3, 32, 32))            # no white, no black, no red


def colours(picture, color):
    """bool (h, w): where a picture (3, h, w) has exactly this colour."""
    return (picture == np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)])[:, None, None]).all(0)


@pytest.mark.parametrize("shape, side, expected", [((3, 32, 32), 256, (3, 256, 256)), ((1, 28, 28), 256, (3, 256, 256)), ((3, 300, 300), 256, (3, 256, 256)),
                                                   ((3, 40, 80), 160, (3, 80, 160)), ((3, 80, 40), 160, (3, 160, 80)), ((3, 40, 500), 160, (3, 13, 160))])
def test_an_overlay_is_the_image_with_its_longer_side_as_asked(shape, side, expected):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for found in plots.overlay(image, side=side), plots.overlay(image, np.eye(7), [(0, 0, 20, 20)], ["a"], side):
        assert found.shape == expected and found.dtype == np.uint8


def test_without_map_and_boxes_an_overlay_shows_every_pixel_enlarged():
    assert np.array_equal(plots.overlay(IMAGES[0]), IMAGES[0].repeat(8, 1).repeat(8, 2))
    assert np.array_equal(plots.overlay(torch.from_numpy(IMAGES[0])), plots.overlay(IMAGES[0]))


@pytest.mark.parametrize("heat", [np.zeros((7, 7)), np.full((4, 4), -3.5), np.full((1, 1), 9.), torch.ones(7, 7)], ids=["zero", "negative", "one cell", "tensor"])
def test_a_constant_map_leaves_the_image_as_it_is(heat):
    with np.errstate(all="raise"):
        assert np.array_equal(plots.overlay(IMAGES[0], heat), plots.overlay(IMAGES[0]))


@pytest.mark.parametrize("row, column", [(0, 0), (2, 5), (6, 3)])
@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-4, 50), (300, -7)])
def test_the_most_salient_cell_is_the_reddest_and_the_least_salient_is_clear(row, column, scale, shift):
    heat = np.zeros((7, 7))
    heat[row, column] = 1
    plain, found = plots.overlay(GREYS).astype(int), plots.overlay(GREYS, scale * heat + shift).astype(int)
    change = np.abs(found - plain).sum(0)
    y, x = np.unravel_index(change.argmax(), change.shape)
    assert (y * 7 // 256, x * 7 // 256) == (row, column) and found[0, y, x] > plain[0, y, x] + 60 > found[2, y, x]
    assert change[(row + 4) % 7 * 256 // 7 + 18, (column + 4) % 7 * 256 // 7 + 18] == 0
    assert found.min() >= 0 and (found[0] >= plain[0]).all()             # more red, nowhere less


@pytest.mark.parametrize("box", [(0, 0, 5, 5), (27, 27, 32, 32), (4, 10, 9, 15), (0, 0, 32, 32), (7, 3, 8, 4)])
def test_a_box_is_outlined_in_white_along_its_own_first_and_last_pixels(box):
    found, (x0, y0, x1, y1) = plots.overlay(GREYS, None, [box]), (8 * v for v in box)
    white = colours(found, "#FFFFFF")
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (y0, y1 - 1, x0, x1 - 1)
    assert white[y0, x0:x1].all() and white[y1 - 1, x0:x1].all() and white[y0:y1, x0].all() and white[y0:y1, x1 - 1].all()
    assert white.sum() == 2 * (x1 - x0) + 2 * (y1 - y0) - 4 and (found[:, ~white & ~colours(found, "#000000")] ==
                                                                  plots.overlay(GREYS)[:, ~white & ~colours(found, "#000000")]).all()


@pytest.mark.parametrize("box", [(1000, 1000, 1004, 1004), (0, 0, 1, 1), (5, 5, 5, 5)])
def test_a_box_smaller_than_a_pixel_of_the_picture_is_drawn_all_the_same(box):
    """As in the overview of images of 2048 pixels with regions of 4."""
    image = np.full((3, 2048, 2048), 100, np.uint8)
    assert 0 < colours(plots.overlay(image, None, [box], (), 160), "#FFFFFF").sum() <= 4


def test_a_box_has_its_mark_inside_and_boxes_without_marks_have_none():
    box = [(4, 10, 20, 26)]
    plain, marked = plots.overlay(GREYS, None, box), plots.overlay(GREYS, None, box, ["0.25"])
    y, x = np.nonzero((plain != marked).any(0))
    assert len(y) > 50 and 32 <= x.min() and x.max() < 160 and 80 <= y.min() and y.max() < 208
    two = plots.overlay(GREYS, None, box + [(22, 2, 30, 9)], ["0.25"])
    y, x = np.nonzero((two != plots.overlay(GREYS, None, box + [(22, 2, 30, 9)])).any(0))
    assert len(y) > 50 and x.max() < 160                                 # the second has no mark


def test_an_overlay_leaves_its_image_and_map_as_they_were():
    image, heat = IMAGES[0].copy(), np.random.default_rng(0).normal(size=(7, 7))
    before = heat.copy()
    plots.overlay(image, heat, [(0, 0, 5, 5)], ["a"])
    assert np.array_equal(image, IMAGES[0]) and np.array_equal(heat, before)


def test_an_explanation_shows_its_tiles_pixel_for_pixel_side_by_side(tmp_path):
    three = tiles(3)
    shown = np.asarray(Image.open(plots.explanation(tmp_path / "a.png", "t", three, [], ["line"]))).transpose(2, 0, 1)
    for i, tile in enumerate(three.values()):
        assert np.array_equal(shown[:, 48:304, 16 + 268 * i:272 + 268 * i], tile)


def test_tiles_that_fill_a_row_go_on_in_the_next(tmp_path):
    seven = tiles(7, side=64)
    shown = np.asarray(Image.open(plots.explanation(tmp_path / "a.png", "t", seven, [], columns=3))).transpose(2, 0, 1)
    step = 64 + 18 + 16 * max(len(plots.paragraph(caption, 12, 64)) for caption in seven)
    for i, tile in enumerate(seven.values()):
        y, x = 48 + i // 3 * step, 16 + i % 3 * 76
        assert np.array_equal(shown[:, y:y + 64, x:x + 64], tile)


def test_a_signed_map_is_grey_where_nothing_differs_red_where_more_and_blue_where_less():
    found = plots.signed(np.array([[0, 2.], [-4, 4]]), side=4)
    assert found.shape == (3, 4, 4) and found.dtype == np.uint8 and np.array_equal(found[:, ::2, ::2], found[:, 1::2, 1::2])
    assert colours(found, plots.PALE)[:2, :2].all() and colours(found, plots.VERMILION)[2:, 2:].all() and colours(found, plots.BLUE)[2:, :2].all()
    assert np.abs(found[:, 0, 2] - (found[:, 0, 0].astype(float) + found[:, 2, 2]) / 2).max() <= .5         # half as much, half as deep
    assert colours(plots.signed(np.zeros((3, 3))), plots.PALE).all() and np.array_equal(plots.signed(np.eye(3)), plots.signed(1e-5 * np.eye(3)))


def test_an_explanation_says_that_it_is_not_for_clinical_use(tmp_path, monkeypatch):
    said, text = [], plots.Canvas.text
    monkeypatch.setattr(plots.Canvas, "text", lambda self, x, y, words, *args, **options: said.append(words) or text(self, x, y, words, *args, **options))
    plots.explanation(tmp_path / "a.png", "nv", tiles(1), [(path_of(["a"], 1), *SERIES)], [PROBABILITY])
    assert "not for clinical use" in said and "nv" in said and SERIES[1] in said


def frames(path, n):
    """The inner pixels (218, 218, 3) of a scatter's frames."""
    image = np.asarray(Image.open(path))
    return [image[81 + i // 4 * 254:299 + i // 4 * 254, 17 + i % 4 * 232:235 + i % 4 * 232] for i in range(n)]


def test_a_scatter_has_a_point_of_its_classs_colour_at_its_place(tmp_path):
    points = np.array([[0, 0], [10, 0], [0, 10], [10, 10.]])             # y grows downwards
    (frame,) = frames(plots.scatter(tmp_path / "a.png", {"t": points}, [0, 1, 2, 0], ["a", "b", "c"]), 1)
    picture = frame.transpose(2, 0, 1)
    for color, places in ((plots.BLUE, {(0, 0), (1, 1)}), (plots.VERMILION, {(0, 1)}), (plots.GREEN, {(1, 0)})):
        y, x = np.nonzero(colours(picture, color))
        assert {(int(a > 109), int(b > 109)) for a, b in zip(y, x)} == places


def test_a_scatter_keeps_the_aspect_of_the_points_and_stays_in_its_frame(tmp_path):
    points = np.array([[0, 0], [100, 0], [50, 10.]])
    for frame in frames(plots.scatter(tmp_path / "a.png", {"a": points, "b": points * 1e-6 + 4}, [0, 0, 0], ["a"]), 2):
        y, x = np.nonzero((frame != 255).any(2))
        assert x.min() > 4 and x.max() < 213 and x.max() - x.min() > 195 and y.max() - y.min() < 40
        assert abs((y.max() + y.min()) / 2 - 109) < 12                   # in the middle


def test_classes_after_the_seventh_have_another_shape_and_absent_ones_no_entry(tmp_path, monkeypatch):
    said, text = [], plots.Canvas.text
    monkeypatch.setattr(plots.Canvas, "text", lambda self, x, y, words, *args, **options: said.append(words) or text(self, x, y, words, *args, **options))
    point = np.zeros((1, 2))
    (round_,), (square,) = (frames(plots.scatter(tmp_path / "a.png", {"t": point}, [k], LONG * 2), 1) for k in (0, 7))
    assert all(colours(f.transpose(2, 0, 1), plots.BLUE).any() for f in (round_, square))
    assert (255 - round_).sum() / (255 - square).sum() == pytest.approx(np.pi / 4, abs=.06)
    assert f"{LONG[0]} (1)" in said and not any(LONG[1] in str(words) for words in said)
