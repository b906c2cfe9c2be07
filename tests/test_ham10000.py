"""HAM10000 in both layouts and every header met in the wild; the official test set wherever it lies."""
import functools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError, ham10000
from tests.loading import needs, noted, refused, sizes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FULL = SHARED / "csv_full" / "HAM10000_metadata.csv"
VARIANTS = SHARED / "csv_samples" / "header_variants"
REAL = SHARED / "ham10000"
NAMES = ham10000.CLASSES
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_CLASSIFIERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / "ham").mkdir(parents=True)
    return tmp_path / "data" / "ham"


def images(folder, ids):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ids:
        Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).save(folder / f"{name}.jpg")


def ids(first=24306, n=70):
    return [f"ISIC_{i:07d}" for i in range(first, first + n)]


def kaggle(root, names=None, header="lesion_id,image_id,dx,dx_type,age,sex,localization", file="HAM10000_metadata.csv"):
    """The Kaggle layout with ten images of each class, two of a lesion."""
    names = names or ids()
    lines = [f"HAM_{i // 14:03d}{i % 7},{name},{NAMES[i % 7]},histo,80.0,male,scalp" for i, name in enumerate(names)]
    root.mkdir(exist_ok=True)
    (root / file).write_text("\n".join([header, *lines]) + "\n")
    images(root / "HAM10000_images_part_1", names[:30])
    images(root / "HAM10000_images_part_2", names[30:])
    return root


def one_hot(names):
    lines = [name + "," + ",".join("1.0" if k == i % 7 else "0.0" for k in range(7)) for i, name in enumerate(names)]
    return "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n" + "\n".join(lines) + "\n"


def isic(root, part, names, nested=True):
    """One part ("Training", "Validation", "Test") of the ISIC layout."""
    table = f"ISIC2018_Task3_{part}_GroundTruth"
    place = root / table if nested else root
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{table}.csv").write_text(one_hot(names))
    images(root / f"ISIC2018_Task3_{part}_Input", names)
    return root


def load(root, **options):
    return data.load("ham10000", root, size=8, **options)


refusal = functools.partial(refused, load)


# ------------------------------------------------------------------------------------------------ layouts
def test_kaggle_layout_is_split_by_lesion(root):
    found = load(kaggle(root))
    assert found.classes == ["mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"] and found.channels == 3
    assert sizes(found) == (28, 14, 28)                                        # 2, 1 and 2 of the five lesions of each class
    assert not set(found.train.groups) & set(found.test.groups) and not set(found.train.groups) & set(found.val.groups)
    assert all(set(s.labels) == set(range(7)) for s in (found.train, found.val, found.test))
    for name, label in zip(found.test.ids, found.test.labels):
        assert label == (int(name[5:]) - 24306) % 7
    assert noted(found, "no official test set") and noted(found, "30 % of the lesions")


def test_lower_case_copies_are_read_once(root):
    kaggle(root)
    images(root / "ham10000_images_part_1", ids()[:30])
    found = load(root)
    assert sum(sizes(found)) == 70
    paths = [r.path for r in ham10000.table(root).records]
    assert not any("ham10000_images" in str(p) for p in paths)


@pytest.mark.parametrize("folder", ["images", "."])
def test_images_may_lie_anywhere_in_root(root, folder):
    kaggle(root)
    for path in list(root.glob("HAM10000_images_part_*/*.jpg")):
        (root / folder).mkdir(exist_ok=True)
        path.rename(root / folder / path.name)
    assert sum(sizes(load(root))) == 70


def test_isic_layout_uses_the_official_sets(root):
    isic(root, "Training", ids())
    isic(root, "Validation", ids(34321, 14))
    isic(root, "Test", ids(34524, 21))
    found = load(root)
    assert sizes(found) == (70, 14, 21)
    assert noted(found, "the ISIC 2018 validation set") and noted(found, "no lesion ids are known")
    assert set(found.test.ids) == set(ids(34524, 21)) and found.test.groups is None


@pytest.mark.parametrize("nested", [True, False])
def test_without_the_official_validation_it_is_carved_by_lesion(root, nested):
    isic(root, "Training", ids(), nested)
    isic(root, "Test", ids(34524, 21), nested)
    (root / "ISIC2018_Task3_Training_LesionGroupings.csv").write_text(
        "image,lesion_id,diagnosis_confirm_type\n" + "".join(f"{n},L{i // 14}{i % 7},x\n" for i, n in enumerate(ids())))
    found = load(root)
    assert len(found.test) == 21 and len(found.train) + len(found.val) == 70 and noted(found, "10 % of the training lesions")
    assert not set(found.train.groups) & set(found.val.groups) and not noted(found, "no lesion ids")


@pytest.mark.parametrize("place", ["inside", "beside", "beside in one folder"])
def test_the_official_test_set_is_found_inside_and_beside_a_kaggle_folder(root, place):
    kaggle(root)
    places = {"inside": root, "beside": root.parent, "beside in one folder": root.parent / "isic2018_test"}
    isic(places[place], "Test", ids(34524, 21))
    found = load(root)
    assert len(found.test) == 21 and len(found.train) + len(found.val) == 70 and noted(found, "test is the ISIC 2018 test set")
    grouped = load(root, split="group")
    assert sum(sizes(grouped)) == 70 and not set(grouped.test.ids) & set(ids(34524, 21))


def test_dataverses_test_table_has_the_other_header_and_is_still_the_test_set(root):
    kaggle(root)
    kaggle(root / "x", ids(34524, 21), file="ISIC2018_Task3_Test_GroundTruth.csv")
    (root / "x" / "ISIC2018_Task3_Test_GroundTruth.csv").rename(root / "ISIC2018_Task3_Test_GroundTruth.csv")
    found = load(root)
    assert set(found.test.ids) == set(ids(34524, 21)) and noted(found, "images left out: their patient or lesion is in a later split")   # L00 .. in both tables
    assert 0 < len(found.train) + len(found.val) < 70 and not set(found.test.groups) & {*found.train.groups, *found.val.groups}


def test_both_layouts_in_one_folder_are_one_set(root):
    kaggle(root)
    isic(root, "Training", ids())
    found = load(root)
    assert sum(sizes(found)) == 70 and found.train.groups is not None


def test_a_root_with_only_the_test_set_is_for_evaluation(root):
    isic(root, "Test", ids(34524, 21))
    line = refusal(root)
    assert "only a test set" in line and "`eval`" in line
    found = load(root, test_only=True)
    assert found.train is None and found.val is None and len(found.test) == 21
    (root / "ISIC2018_Task3_Test_GroundTruth" / "ISIC2018_Task3_Test_GroundTruth.csv").rename(root / "labels.csv")
    assert len(load(root, test_only=True).test) == 21                           # known by its ISIC numbers


def test_evaluation_of_a_training_folder_scores_the_same_test_split(root):
    kaggle(root)
    assert load(root, test_only=True).test.ids == load(root).test.ids
    assert load(root, test_only=True, limit=7, seed=3).test.ids == load(root, limit=7, seed=3).test.ids


def test_the_papers_split_leaks_and_says_how_much(root):
    found = load(kaggle(root), split="paper")
    held = set(found.train.groups) | set(found.val.groups)
    leaking = sum(group in held for group in found.test.groups)
    assert sizes(found) == (42, 7, 21) and leaking > 0
    assert noted(found, f"LEAK: {leaking} test images") and noted(found, "split paper")


def test_labels_follow_the_class_order_of_a_model(root):
    kaggle(root)
    found, other = load(root), load(root, classes=sorted(NAMES))
    assert other.classes == sorted(NAMES)
    assert [found.classes[k] for k in found.test.labels] == [other.classes[k] for k in other.test.labels]
    with pytest.raises(DataError, match="the model knows only a, b"):
        load(root, classes=["a", "b"])


# ------------------------------------------------------------------------------------------------ headers
def read(path):
    return ham10000._read([path], path.parent, [])


@needs(FULL)
def test_the_full_table_has_the_published_counts():
    rows = read(FULL)
    assert len(rows) == 10_015 and len({r.lesion for r in rows.values()}) == 7_470
    assert {r.part for r in rows.values()} == {"train"}
    counts = Counter(NAMES[r.label] for r in rows.values())
    assert counts == dict(nv=6705, mel=1113, bkl=1099, bcc=514, akiec=327, vasc=142, df=115)


@needs(FULL)
def test_the_full_table_splits_without_a_leak_and_the_papers_way_with_one():
    records = [data.tables.Record(Path(i), r.label, r.lesion, i, "train") for i, r in read(FULL).items()]
    honest, paper = data.splits.assign(records), data.splits.assign(records, by_group=False)
    assert data.splits.leaking(honest) == (0, 0)
    leak, n = data.splits.leaking(paper)[0], sum(r.split == "test" for r in paper)
    assert n in range(3000, 3010) and .30 < leak / n < .42                      # the authors' list: 3,004 and 34.9 % (train alone)


@needs(VARIANTS)
@pytest.mark.parametrize("name", ["dataverse_with_dataset_column", "leading_index_column"])
def test_header_variants_met_in_the_wild_are_read(name):
    rows, full = read(VARIANTS / f"HAM10000_metadata__{name}.csv"), read(FULL) if FULL.exists() else {}
    assert len(rows) >= 25
    for i, row in rows.items():
        assert re.fullmatch(r"ISIC_\d{7}", i) and row.lesion.startswith("HAM_") and full.get(i, row)[:2] == row[:2]


LONG = dict(mel="Melanoma", nv="Melanocytic nevi", bcc="Basal cell carcinoma", akiec="Actinic keratoses", df="Dermatofibroma",
            bkl="Benign keratosis-like lesions ", vasc="Vascular lesions")


SPELLINGS = {
    "bom": lambda s: "\ufeff" + s,
    "crlf": lambda s: s.replace("\n", "\r\n"),
    "tab": lambda s: s.replace(",", "\t"),
    "blanks": lambda s: s.replace(",", " , "),
    "body twice": lambda s: s + s.split("\n", 1)[1],
    "file twice": lambda s: s + s,
    "jpg in ids": lambda s: re.sub(r"(ISIC_\d+)", r"\1.jpg", s),
    "no ages": lambda s: s.replace("80.0", ""),
    "long names": lambda s: re.sub(r",(mel|nv|bcc|akiec|bkl|df|vasc),", lambda m: f",{LONG[m[1]]},", s),
    "upper case": lambda s: s.upper(),
    "empty lines": lambda s: s.replace("\n", "\n\n"),
    "index": lambda s: "\n".join(f"{i},{line}" if i else "," + line for i, line in enumerate(s.strip().split("\n")))}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_table_gives_the_same_split(root, change):
    plain = load(kaggle(root))
    table = root / "HAM10000_metadata.csv"
    table.write_text(change(table.read_text()))
    found = load(root)
    assert found.test.ids == plain.test.ids and np.array_equal(found.test.labels, plain.test.labels)
    for name in ("HAM10000_metadata", "HAM10000_metadata.tab"):
        table = table.rename(root / name)
        assert load(root).test.ids == plain.test.ids


@pytest.mark.parametrize("header, row, words", [
    ("lesion_id,image_id,diagnosis", "a,b,nv", "has the columns lesion_id, image_id, diagnosis; needed: .*image_id,dx"),
    ("lesion_id,image_id,dx", "a,ISIC_1,wart", "line 2: unknown dx 'wart'"),
    ("lesion_id,image_id,dx", "a,ISIC_1", "line 2 has 2 fields"),
    ("lesion_id,image_id,dx", "a,../../etc/passwd,nv", "no image id"),
    ("lesion_id,image_id,dx", "a,/etc/passwd,nv", "no image id"),
    ("lesion_id,image_id,dx", "a,..\\x,nv", "no image id"),
    ("lesion_id,image_id,dx", "a,,nv", "no image id"),
    ("lesion_id,image_id,dx", "a,ISIC_1,nv\na,ISIC_1,mel", "ISIC_1 is mel here and nv before"),
    ("image,MEL,NV,BCC,AKIEC,BKL,DF,VASC", "ISIC_1,1,1,0,0,0,0,0", "exactly one"),
    ("image,MEL,NV,BCC,AKIEC,BKL,DF,VASC", "ISIC_1,x,0,0,0,0,0,0", "exactly one"),
    ("image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK", "ISIC_1,1,0,0,0,0,0,0,0,0", "needed: .*AKIEC")])
def test_a_wrong_table_is_one_line_with_file_and_reason(root, header, row, words):
    (root / "HAM10000_metadata.csv").write_text(f"{header}\n{row}\n")
    line = refusal(root)
    assert re.search(words, line) and "HAM10000_metadata.csv" in line


def test_pixel_tables_are_ignored(root):
    kaggle(root)
    (root / "hmnist_28_28_RGB.csv").write_text(",".join(f"pixel{i:04d}" for i in range(2352)) + ",label\n" + "1," * 2352 + "2\n")
    assert sum(sizes(load(root))) == 70


# ------------------------------------------------------------------------------------------------ what is missing
def test_a_missing_or_wrong_folder_is_told_what_is_expected_and_where_to_get_it(root):
    for line in (refusal(root / "none"), refusal(root)):
        assert str(root) in line
        for words in ("HAM10000_images_part_1", "ISIC2018_Task3_Training_Input", "kmader/skin-cancer-mnist-ham10000",
                      "10.7910/DVN/DBW86T", "challenge.isic-archive.com", "CC BY-NC 4.0"):
            assert words in line
    kaggle(root / "inner")
    assert f"did you mean {root / 'inner'}?" in refusal(root)


def test_missing_images_are_counted_and_named(root):
    kaggle(root)
    for name in ids()[3:5]:
        (root / "HAM10000_images_part_1" / f"{name}.jpg").unlink()
    line = refusal(root)
    assert "2 of 70 train images are missing, first: ISIC_0024309.jpg" in line and "--skip-bad" in line
    found = load(root, skip_bad=True)
    assert sum(sizes(found)) == 68 and noted(found, "2 of 70")


def test_a_table_without_any_image_is_refused(root):
    kaggle(root)
    for path in root.glob("*/*.jpg"):
        path.unlink()
    assert "none of its images" in refusal(root)


def test_a_test_table_without_images_falls_back_to_the_group_split(root):
    kaggle(root)
    (root / "ISIC2018_Task3_Test_GroundTruth.csv").write_text(one_hot(ids(34524, 21)))
    found = load(root)
    assert sum(sizes(found)) == 70 and noted(found, "none of the images") and noted(found, "split group instead")


@needs(REAL)
def test_the_real_images_load(root):
    found = data.load("ham10000", REAL, size=64, limit=50)
    assert sizes(found) == (50, 50, 50) and all(set(s.labels) == set(range(7)) for s in (found.train, found.val, found.test))
    assert found.train.images.shape == (50, 3, 64, 64) and 60 < found.train.images.mean() < 220 and found.train.images.std() > 20
    assert noted(found, "no official test set") and not noted(found, "LEAK")
    whole = ham10000.table(REAL).records
    assert len(whole) == 5_984 and len({r.id for r in whole}) == 5_984
