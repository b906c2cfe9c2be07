"""ChestX-ray14 in every layout: fourteen labels an image, the official lists, patients on one side, boxes, and every wrong table in one line."""
import functools
import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import Batches, chestxray14, medmnist, splits
from data.__main__ import main
from tests.loading import apart, needs, noted, refused, sizes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FULL, SMALL, ORIGINALS = SHARED / "csv_full", SHARED / "chestxray14", SHARED / "chestxray14_kaggle_1024"
VARIANTS = SHARED / "csv_samples" / "header_variants"
HEADER = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],"
          "OriginalImagePixelSpacing[x,y]")
TABLE, BOXES = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"
KINDS = ["No Finding", "Cardiomegaly", "Effusion|Mass", "No Finding", "Pleural_Thickening", "Infiltration|Hernia|Edema"]
RNG = np.random.default_rng(0)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / "nih").mkdir(parents=True)
    return tmp_path / "data" / "nih"


def names(patients=range(1, 61)):
    return [f"{p:08d}_{view:03d}" for p in patients for view in (0, 1)]


def kind(name):
    return KINDS[int(name[:8]) % 6 if name.endswith("0") else 0]                # a finding of a patient is gone in the second image


def entries(ids, header=HEADER, row="{},{},0,{},71,M,PA,2682,2749,0.143,0.143"):
    return "\n".join([header, *(row.format(f"{i}.png", kind(i), int(i[:8])) for i in ids)]) + "\n"


def images(folder, ids, side=16):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ids:
        Image.fromarray(RNG.integers(0, 256, (side, side), np.uint8)).save(folder / f"{name}.png")


def is_test(name):
    return int(name[:8]) % 10 > 6


def nih(root, ids=None, lists=True):
    """One folder of images, the table and the two lists: 18 of 60 patients are test."""
    ids = ids or names()
    (root / TABLE).write_text(entries(ids))
    images(root / "images", ids)
    if lists:
        (root / "train_val_list.txt").write_text("\n".join(f"{i}.png" for i in ids if not is_test(i)))       # no newline at the end
        (root / "test_list.txt").write_text("".join(f"{i}.png\n" for i in ids if is_test(i)))
    return root


def load(root, **options):
    return data.load("chestxray14", root, **{"size": 16} | options)


refusal = functools.partial(refused, load)


def same(a, b):
    return a.ids == b.ids and np.array_equal(a.labels, b.labels) and np.array_equal(a.images, b.images)


# ------------------------------------------------------------------------------------------------ labels and splits
def test_the_official_lists_are_taken_and_validation_is_carved_by_patient(root):
    found = load(nih(root))
    assert found.multilabel and found.channels == 1 and found.classes == chestxray14.CLASSES == medmnist.CLASSES["chestmnist"]
    assert sum(sizes(found)) == 120 and len(found.test) == 36 and all(map(is_test, found.test.ids)) and apart(found)
    assert not any(map(is_test, found.train.ids + found.val.ids)) and 4 <= len(set(found.val.groups)) <= 8
    for part in (found.train, found.val, found.test):
        assert part.labels.dtype == np.float32 and part.labels.shape == (len(part), 14) and part.boxes is None
        assert part.groups == [str(int(i[:8])) for i in part.ids]
        for name, label in zip(part.ids, part.labels):
            assert {found.classes[k] for k in np.flatnonzero(label)} == set(kind(name).split("|")) - {"No Finding"}
        assert set(part.source["view"]) == {"PA"} and set(part.source["age"]) == {71}
    assert not noted(found, "LEAK") and not noted(found, "shortcut")


def test_kaggles_folders_doubled_and_one_folder_give_the_same(root):
    plain = load(nih(root))
    ids = names()
    for number, part in enumerate((ids[:50], ids[50:])):
        folder = root / f"images_{number + 1:03d}" / "images"
        folder.mkdir(parents=True)
        for name in part:
            shutil.copy(root / "images" / f"{name}.png", folder)
    shutil.rmtree(root / "images")
    found = load(root)
    assert all(same(a, b) for a, b in ((found.train, plain.train), (found.val, plain.val), (found.test, plain.test)))
    shutil.move(root / "images_001", root / "deeper" / "still" / "images_001")
    assert same(load(root).test, plain.test)


def test_kaggles_sample_has_another_table_and_no_lists(root):
    place = root / "sample"
    images(place / "images", names())
    header = HEADER.replace("[Width,Height]", "Width,OriginalImageHeight").replace("[x,y]", "_x,OriginalImagePixelSpacing_y")
    (place / "sample_labels.csv").write_text(entries(names(), header, "{},{},0,{},071Y,M,PA,2682,2749,0.143,0.143"))
    for where in (root, place):
        found = load(where)
        assert sum(sizes(found)) == 120 and apart(found) and noted(found, "no official lists here")
        assert .25 < len(set(found.test.groups)) / 60 < .4 and set(found.test.source["age"]) == {71}
    assert found.test.ids == load(place, split="group", seed=3).test.ids


@pytest.mark.parametrize("seed", range(3))
def test_the_group_split_ignores_the_lists_and_keeps_patients_apart(root, seed):
    found = load(nih(root), split="group", seed=seed)
    assert apart(found) and not all(map(is_test, found.test.ids)) and found.test.ids == load(root, split="group").test.ids


def test_paper_means_official(root):
    assert load(nih(root), split="paper").test.ids == load(root).test.ids


@pytest.mark.parametrize("lacking", ["train_val_list.txt", "test_list.txt"])
def test_one_list_is_enough(root, lacking):
    plain = load(nih(root))
    (root / lacking).unlink()
    assert load(root).test.ids == plain.test.ids


def test_images_of_neither_list_are_left_out_and_lists_may_name_more(root):
    nih(root)
    lines = (root / "test_list.txt").read_text().split("\n")
    (root / "test_list.txt").write_text("\n".join(["99999999_000.png", *lines[2:]]))
    found = load(root)
    assert len(found.test) == 34 and noted(found, "2 images are in neither of the official lists")
    assert noted(found, "name 1 images that the table has not")


def test_evaluation_needs_the_test_images_alone(root):
    plain = load(nih(root))
    for path in (root / "images").glob("*.png"):
        if not is_test(path.stem):
            path.unlink()
    found = load(root, test_only=True)
    assert found.train is None and found.test.ids == plain.test.ids


def test_labels_and_boxes_follow_the_class_order_of_a_model(root):
    with_boxes(nih(root))
    found, other = load(root), load(root, classes=sorted(chestxray14.CLASSES))
    order = [found.classes.index(c) for c in other.classes]
    assert np.array_equal(other.test.labels, found.test.labels[:, order])
    assert np.array_equal(other.test.boxes, found.test.boxes[:, order], equal_nan=True)
    assert "the model knows only Edema, Mass" in refusal(root, classes=["Edema", "Mass"])
    assert "does not tell of Fracture" in refusal(root, classes=[*chestxray14.CLASSES, "Fracture"])


def test_a_limit_draws_images_with_and_without_a_finding_before_decoding(root):
    found = load(nih(root), limit=12)
    for part in (found.train, found.test):
        assert len(part) == 12 and 0 < (~part.labels.any(1)).sum() < 12 and part.labels[:, [1, 12]].any(0).all()
    assert load(root, limit=12, seed=1).train.ids != found.train.ids


def test_batches_have_labels_of_floats_and_can_be_balanced(root):
    split = load(nih(root)).train
    for batch in Batches(split, 16, train=True, balanced=True, augment=("hflip",)):
        assert batch.y.shape == (len(batch.x), 14) and batch.y.dtype.is_floating_point
        assert np.array_equal(batch.y.numpy(), split.labels[batch.index])
    rows = np.concatenate([b.index for epoch in range(20) for b in Batches(split, 16, train=True, balanced=True, start=epoch * 5)])
    kinds, share = np.unique(splits.rarest(split.labels[rows]), return_counts=True)
    assert share.min() > .6 * share.max() and -1 in kinds


def test_the_command_line_counts_findings(root, capsys):
    found = load(nih(root))
    assert main(["chestxray14", "--root", str(root), "--size", "16", "--output", str(root / "sheet.png")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Hernia", *(str(int(s.labels[:, 13].sum())) for s in (found.train, found.val, found.test))] in lines
    assert ["no", "finding", *(str((~s.labels.any(1)).sum()) for s in (found.train, found.val, found.test))] in lines


# ------------------------------------------------------------------------------------------------ tables
SPELLINGS = {
    "bom": lambda s: "\ufeff" + s,
    "crlf": lambda s: s.replace("\n", "\r\n"),
    "trailing comma": lambda s: re.sub("$", ",", s.strip(), flags=re.M) + "\n",
    "trailing comma in the header alone": lambda s: s.replace("[x,y]", "[x,y],").replace("\n", ",\n").replace(",,\n", ",\n"),
    "sex": lambda s: s.replace("Gender", "Sex"),
    "quoted": lambda s: s.replace("OriginalImage[Width,Height]", '"OriginalImage[Width,Height]"'),
    "first release": lambda s: s.replace(",71,", ",071Y,"),
    "no patient column": lambda s: "\n".join(",".join(c for i, c in enumerate(line.split(",")) if i != 3) for line in s.strip().split("\n")),
    "two columns": lambda s: "\n".join(",".join(line.split(",")[:2]) for line in s.strip().split("\n")),
    "floats": lambda s: re.sub(r",0,(\d+),", r",0,\1.0,", s),
    "no ending": lambda s: s.replace(".png", ""),
    "blanks": lambda s: s.replace("|", " | "),
    "other spellings": lambda s: s.replace("Pleural_Thickening", "Pleural Thickening").replace("Infiltration", "Infiltrate"),
    "twice": lambda s: s + s.split("\n", 1)[1],
    "index": lambda s: "\n".join(f"{i},{line}" if i else "," + line for i, line in enumerate(s.strip().split("\n")))}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_table_gives_the_same(root, change):
    plain = load(nih(root))
    (root / TABLE).write_text(change((root / TABLE).read_text()), newline="")
    found = load(root)
    assert all(same(a, b) for a, b in ((found.train, plain.train), (found.val, plain.val), (found.test, plain.test)))


@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "data_entry_2017.csv", "sample_labels.csv"])
def test_every_name_of_the_table_is_known_and_the_newest_wins(root, name):
    nih(root)
    (root / name).write_text((root / TABLE).read_text().replace("Cardiomegaly", "Emphysema"))
    found = load(root)
    assert found.test.labels[:, 1].any() and noted(found, f"{name}, whose labels differ a little, is not")
    (root / TABLE).unlink()
    assert load(root).test.labels[:, 10].any()


def test_impossible_ages_are_unknown_and_counted(root):
    nih(root)
    text = (root / TABLE).read_text()
    for number, age in enumerate(["414", "148", "155Y", "old", "-1", "006M", "073D", "95", "120"], 1):
        text = text.replace(f",0,{number},71,", f",0,{number},{age},")
    (root / TABLE).write_text(text)
    found = load(root)
    assert noted(found, "10 ages are no age of a patient and taken as unknown, first: 00000001_000: 414")
    age = {g: a for s in (found.train, found.val, found.test) for g, a in zip(s.groups, s.source["age"])}
    assert all(np.isnan(age[str(n)]) for n in range(1, 6)) and [age[str(n)] for n in (6, 7, 8, 9, 10)] == [.5, .2, 95, 120, 71]


@pytest.mark.parametrize("header, row, words", [
    ("Image Index,Label", "00000001_000.png,Mass", "has the columns image index, label; needed: Image Index,Finding Labels"),
    ("Image Index,Finding Labels", "00000001_000.png,Broken leg", "line 2: unknown finding 'Broken leg'; known: Atelectasis, "),
    ("Image Index,Finding Labels", "00000001_000.png,", "line 2: unknown finding ''"),
    ("Image Index,Finding Labels", "00000001_000.png,Mass|", "line 2: unknown finding ''"),
    ("Image Index,Finding Labels", "00000001_000.png,Mass|No Finding", "line 2: 'Mass|No Finding': No Finding beside a finding"),
    ("Image Index,Finding Labels", "00000001_000.png", "line 2 has 1 fields"),
    ("Image Index,Finding Labels", "../../etc/passwd,Mass", "'../../etc/passwd' is no image name"),
    ("Image Index,Finding Labels", "/etc/00000001_000.png,Mass", "is no image name"),
    ("Image Index,Finding Labels", ",Mass", "'' is no image name"),
    ("Image Index,Finding Labels", "", "a header and no rows"),
    ("Image Index,Finding Labels,Patient ID", "00000001_000.png,Mass,2", "line 2: 00000001_000 is of patient 2, by its name of 1"),
    ("Image Index,Finding Labels,Patient ID", "00000001_000.png,Mass,x", "is of patient x"),
    ("Image Index,Finding Labels", "00000001_000.png,Mass\n00000001_000.png,Edema", "line 3: 00000001_000 has other findings than before")])
def test_a_wrong_table_is_one_line_with_file_and_reason(root, header, row, words):
    nih(root)
    (root / TABLE).write_text(f"{header}\n{row}\n")
    told = refusal(root)
    assert words in told and str(root / TABLE) in told


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"Image Index,Finding Labels\n\0,Mass\n", b"\x89PNG\r\n"])
@pytest.mark.parametrize("name", [TABLE, BOXES, "test_list.txt", "train_val_list.txt"])
def test_a_damaged_file_is_one_line(root, name, content):
    with_boxes(nih(root))
    (root / name).write_bytes(content)
    if (name, content) == (BOXES, b""):
        assert load(root).test.boxes is None                                    # no box is no mistake
    else:
        assert name in refusal(root)


def test_wrong_lists_are_one_line(root):
    nih(root)
    with open(root / "train_val_list.txt", "a") as file:
        file.write("\n00000007_000.png\n")
    assert "test_list.txt: 00000007_000.png stands in train_val_list.txt too" in refusal(root)
    (root / "test_list.txt").write_text("00000001_000.png 0 1 0\n")
    assert "test_list.txt: line 1: '00000001_000.png 0 1 0' is no image name" in refusal(root)


# ------------------------------------------------------------------------------------------------ boxes
def with_boxes(root):
    """The header of nine fields and the rows of six, as NIH's."""
    rows = ["00000007_000.png,Cardiomegaly,256.0,128.0,512.0,64.0", "00000008_000.png,Mass,0,0,1024,1024",
            "00000008_000.png,Effusion,10.5,20.25,100.0,200.0", "00000017_000.png,Infiltrate,1,2,3,4", "99999999_000.png,Mass,1,2,3,4"]
    (root / BOXES).write_text("\n".join(["Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows]) + "\n")
    return root


def test_boxes_are_by_image_and_finding_in_pixels_of_the_decoded_image(root):
    found = load(with_boxes(nih(root)), size=32)
    of = dict(zip(found.test.ids, found.test.boxes))
    assert found.test.boxes.shape == (36, 14, 4) and found.test.boxes.dtype == np.float32 and np.isnan(found.train.boxes).all()
    assert of["00000007_000"][1] == pytest.approx([8, 4, 24, 6]) and of["00000008_000"][4] == pytest.approx([0, 0, 32, 32])
    assert of["00000008_000"][2] == pytest.approx(np.array([10.5, 20.25, 110.5, 220.25]) / 32)
    assert of["00000017_000"][3] == pytest.approx(np.array([1, 2, 4, 6]) / 32)
    assert sum(~np.isnan(boxes[:, 0]).all() for boxes in of.values()) == 3 and np.isfinite(found.test.boxes[:, :, 0]).sum() == 4
    assert np.array_equal(found.test.take([3, 1]).boxes, found.test.boxes[[3, 1]], equal_nan=True)


def test_the_boxes_alone_are_in_pixels_of_the_original(root):
    assert chestxray14.boxes(nih(root)) == {}
    found = chestxray14.boxes(with_boxes(root))
    assert found["00000008_000"] == {"Mass": (0, 0, 1024, 1024), "Effusion": (10.5, 20.25, 110.5, 220.25)}
    assert found["00000017_000"] == {"Infiltration": (1, 2, 4, 6)} and len(found) == 4


def test_a_box_of_a_finding_that_the_table_has_not_is_noted(root):
    with_boxes(nih(root))
    with open(root / BOXES, "a") as file:
        file.write("00000019_000.png,Hernia,1,2,3,4\n")
    assert noted(load(root), "1 boxes are of a finding that the table has not, first: Hernia in 00000019_000")


@pytest.mark.parametrize("row, words", [
    ("00000007_000.png,Mass,1,2,3", "line 2 has 5 fields"),
    ("00000007_000.png,Mass,1,2,3,x", "1,2,3,x is no box"),
    ("00000007_000.png,Mass,1,2,3,nan", "is no box"),
    ("00000007_000.png,Mass,1,2,inf,4", "is no box"),
    ("00000007_000.png,Mass,1,2,0,4", "is no box"),
    ("00000007_000.png,Mass,-1,2,3,4", "is no box"),
    ("00000007_000.png,Mass,1000,2,25,4", "is no box (x, y, width, height) in an image of 1024 x 1024 pixels"),
    ("00000007_000.png,Leg,1,2,3,4", "line 2: unknown finding 'Leg'"),
    ("../x.png,Mass,1,2,3,4", "line 2: '../x.png' is no image name"),
    ("00000007_000.png,Mass,1,2,3,4\n00000007_000.png,Mass,1,2,3,5", "line 3: 00000007_000 has another box of Mass before")])
def test_a_wrong_box_is_one_line(root, row, words):
    nih(root)
    (root / BOXES).write_text(f"Image Index,Finding Label,Bbox [x,y,w,h],,,\n{row}\n")
    told = refusal(root)
    assert words in told and str(root / BOXES) in told


# ------------------------------------------------------------------------------------------------ images
def test_rgba_among_grey_images_is_read_as_grey(root):
    plain = load(nih(root))
    for name in names()[:40]:
        with Image.open(root / "images" / f"{name}.png") as image:
            image.convert("RGBA").save(root / "images" / f"{name}.png")
    found = load(root)
    assert found.channels == 1 and same(found.train, plain.train) and same(found.test, plain.test)


def test_missing_images_are_counted_and_named(root):
    nih(root)
    for name in ("00000001_000", "00000002_001"):
        (root / "images" / f"{name}.png").unlink()
    told = refusal(root)
    assert "2 of 84 train images are missing, first: 00000001_000.png" in told and "--skip-bad" in told
    found = load(root, skip_bad=True)
    assert sum(sizes(found)) == 118 and noted(found, "2 of 84")
    shutil.rmtree(root / "images")
    assert "none of its 36 test images" in refusal(root)


def test_a_missing_or_wrong_folder_is_told_what_is_expected_and_where_to_get_it(root):
    for told in (refusal(root / "none"), refusal(root)):
        assert str(root) in told
        for words in (TABLE, "test_list.txt", "images_001", "nihcc.app.box.com/v/ChestXray-NIHCC", "kaggle.com/datasets/nih-chest-xrays/data"):
            assert words in told
    (root / "a" / "b").mkdir(parents=True)
    nih(root / "a" / "b")
    assert f"did you mean {root / 'a' / 'b'}?" in refusal(root)
    (root / "other.csv").write_text("a,b\n1,2\n")
    assert "other.csv: has the columns a, b; needed" in refusal(root)


@pytest.mark.parametrize("method", ["diffmic", "symmflow", "diffclassifier"])
def test_methods_of_one_label_an_image_refuse_in_one_line(root, method, capsys):
    module = pytest.importorskip(method)
    assert module.main(["--data", "chestxray14", "--root", str(nih(root)), "--size", "32", "--output", str(root / "run"), "--device", "cpu"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "label" in told[0]


# ------------------------------------------------------------------------------------------------ the real tables
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    (folder / TABLE).write_bytes(gzip.decompress((FULL / f"{TABLE}.gz").read_bytes()))
    return chestxray14._read(folder / TABLE, []), chestxray14._read_boxes(FULL / BOXES)


@needs(FULL)
def test_the_full_table_has_the_known_counts(real):
    rows, _ = real
    count = np.array([label for label, _ in rows.values()]).sum(0)
    assert len(rows) == 112120 and len({name[:8] for name in rows}) == 30805
    assert dict(zip(chestxray14.CLASSES, count)) == {
        "Infiltration": 19894, "Effusion": 13317, "Atelectasis": 11559, "Nodule": 6331, "Mass": 5782, "Pneumothorax": 5302, "Consolidation": 4667,
        "Pleural_Thickening": 3385, "Cardiomegaly": 2776, "Emphysema": 2516, "Edema": 2303, "Fibrosis": 1686, "Pneumonia": 1431, "Hernia": 227}
    assert sum(not any(label) for label, _ in rows.values()) == 60361 and sum(sum(label) > 1 for label, _ in rows.values()) == 20796
    assert sum(s["sex"] == "M" for _, s in rows.values()) == 63340 and sum(s["view"] == "PA" for _, s in rows.values()) == 67310
    assert max(float(s["age"]) for _, s in rows.values()) == 95


@needs(FULL)
def test_the_full_lists_are_apart_by_patient_and_all_there_is(real):
    rows, _ = real
    notes = []
    parts = chestxray14._listed({name: FULL / name for name in chestxray14.LISTS.values()}, rows, notes)
    assert {part: len(ids) for part, ids in parts.items()} == {"train": 86524, "test": 25596} and not notes
    train, test = ({name[:8] for name in parts[part]} for part in ("train", "test"))
    assert (len(train), len(test)) == (28008, 2797) and not train & test
    assert [round(np.mean([any(rows[i][0]) for i in parts[part]]), 3) for part in ("train", "test")] == [.416, .615]


@needs(FULL)
def test_the_full_boxes_are_in_test_images_that_have_the_finding(real):
    rows, found = real
    count = {label: sum(label in inside for inside in found.values()) for label in chestxray14.CLASSES}
    assert {label: n for label, n in count.items() if n} == {"Atelectasis": 180, "Effusion": 153, "Cardiomegaly": 146, "Infiltration": 123,
                                                             "Pneumonia": 120, "Pneumothorax": 98, "Mass": 85, "Nodule": 79}
    notes, by_label = [], chestxray14._by_label(rows, found, [])
    assert len(by_label) == len(found) == 880 and sum(np.isfinite(b[:, 0]).sum() for b in by_label.values()) == 984
    chestxray14._by_label(rows, found, notes)
    assert not notes and set(found) <= chestxray14._names(FULL / "test_list.txt")


@needs(VARIANTS)
@pytest.mark.parametrize("name", ["Data_Entry_2017_v2020__patient_sex_trailing_comma.csv", "Data_Entry_2017__kaggle_2017_style.csv"])
def test_the_real_header_variants_are_read_alike(real, name):
    rows = chestxray14._read(VARIANTS / name, [])
    assert rows and all(real[0][i] == row for i, row in rows.items())


@needs(SMALL)
def test_the_thousand_images_load(capsys):
    found = load(SMALL, size=64)
    assert len(found.train) + len(found.val) == 690 and len(found.test) == 310 and apart(found) and found.channels == 1
    assert len({g for s in (found.train, found.val, found.test) for g in s.groups}) == 264 and len(set(found.test.groups)) == 15
    assert np.isfinite(found.test.boxes[:, :, 0]).sum() == 9 and np.nanmax(found.test.boxes) <= 64


@needs(ORIGINALS)
def test_the_originals_load_with_their_boxes():
    found = load(ORIGINALS, size=64)
    assert sum(sizes(found)) == 48 and len(found.test) == 13 and np.isfinite(found.test.boxes[:, :, 0]).sum() == 12
    assert all(part.images.std() > 10 for part in (found.train, found.val, found.test))
