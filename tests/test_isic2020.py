"""ISIC 2020 in both layouts: melanoma against benign, a patient on one side, duplicates out, the unlabelled test set ignored."""
import functools
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import isic2020
from tests.loading import apart, needs, noted, refused, sizes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES = SHARED / "csv_samples"
ISIC2019 = SHARED / "isic2019"
HEADERS = {1: "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target",
           2: "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target,asymmetry"}
TRUTH = "ISIC_2020_Training_GroundTruth.csv"
PAIRS = "ISIC_2020_Training_Duplicates.csv"
RNG = np.random.default_rng(0)


def images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).save(folder / f"{name}.jpg")


def names(n=120, first=1):
    return [f"ISIC_{i:07d}" for i in range(first, first + n)]


def owner(name):
    return f"IP_{int(name[5:]) // 4:07d}"                                       # four images of a patient


def is_melanoma(name):
    return int(name[5:]) % 12 == 4                                              # one image of every third patient


def truth(ids, version=1, target=is_melanoma):
    rows = []
    for name in ids:
        label, kind = int(target(name)), "malignant" if target(name) else "benign"
        rows.append(f"{name},{owner(name)},female,45,torso,unknown,{kind},{label}" if version == 1 else
                    f"{name},{owner(name)},IL_{name[5:]},female,45,torso,unknown,{kind},{label},0")
    return "\n".join([HEADERS[version], *rows]) + "\n"


def isic(root, version=1):
    root.mkdir(parents=True, exist_ok=True)
    (root / (TRUTH if version == 1 else TRUTH.replace(".csv", "_v2.csv"))).write_text(truth(names(), version))
    images(root / "train", names())
    return root


def kaggle(root):
    (root / "train.csv").write_text(truth(names()).replace(",45,", ",45.0,"))
    (root / "test.csv").write_text("image_name,patient_id,sex,age_approx,anatom_site_general_challenge\n"
                                   + "".join(f"{n},IP_9,male,70.0,\n" for n in names(5, 900)))
    (root / "sample_submission.csv").write_text("image_name,target\n" + "".join(f"{n},0\n" for n in names(5, 900)))
    images(root / "jpeg" / "train", names())
    images(root / "jpeg" / "test", names(5, 900))
    (root / "train").mkdir()
    (root / "train" / "ISIC_0000001.dcm").write_bytes(b"DICM")
    return root


def load(root, **options):
    return data.load("isic2020", root, size=8, **options)


refusal = functools.partial(refused, load)


# ------------------------------------------------------------------------------------------------ layouts and splits
@pytest.mark.parametrize("version", [1, 2])
def test_isics_layout_is_split_by_patient(root, version):
    found = load(isic(root, version))
    assert found.classes == ["benign", "melanoma"] and found.channels == 3 and not found.multilabel
    assert sum(sizes(found)) == 120 and apart(found) and not noted(found, "LEAK")
    for part in (found.train, found.val, found.test):
        assert set(part.labels) == {0, 1} and part.groups == [owner(n) for n in part.ids]
        assert [bool(y) for y in part.labels] == [is_melanoma(n) for n in part.ids]
    assert len({g for g, y in zip(found.test.groups, found.test.labels) if y}) == 3         # 30 % of the ten patients with melanoma
    assert noted(found, "labels of the official test set are not public: split group instead")


def test_kaggles_layout_gives_the_same_and_its_test_images_are_ignored(root):
    plain = load(isic(root.parent / "isic's"))
    found = load(kaggle(root))
    assert found.test.ids == plain.test.ids and np.array_equal(found.test.labels, plain.test.labels)
    assert noted(found, f"5 test images are ignored, for their labels are not public: {root / 'jpeg' / 'test'}")
    assert not noted(plain, "ignored")


def test_the_test_folder_of_isic_is_ignored(root):
    images(isic(root) / "ISIC_2020_Test_Input", names(4, 900))
    (root / "ISIC_2020_Test_Metadata.csv").write_text("image,patient,anatom_site_general,age_approx,sex\n")
    found = load(root)
    assert sum(sizes(found)) == 120 and noted(found, "4 test images are ignored")


def test_both_layouts_and_versions_in_one_folder_are_one_set(root):
    plain = load(kaggle(root))
    isic(root, 1), isic(root, 2)
    assert load(root).test.ids == plain.test.ids


@pytest.mark.parametrize("folder", ["images", ".", "ISIC_2020_Training_JPEG/train", "train/train"])
def test_images_and_the_table_may_lie_anywhere_in_root(root, folder):
    plain = load(isic(root))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for path in list((root / "train").glob("*.jpg")):
        path.rename(root / folder / path.name)
    (root / "labels").mkdir()
    (root / TRUTH).rename(root / "labels" / TRUTH)
    assert load(root).test.ids == plain.test.ids


@pytest.mark.parametrize("split", ["group", "paper"])
def test_no_split_depends_on_the_seed_and_the_group_split_keeps_patients_apart(root, split):
    first = load(isic(root), split=split)
    assert apart(first) == (split == "group")
    for seed in range(1, 5):
        other = load(root, split=split, seed=seed)
        assert all(a.ids == b.ids for a, b in ((first.train, other.train), (first.val, other.val), (first.test, other.test)))


def test_the_papers_split_is_even_and_by_image_and_says_that_it_leaks(root):
    (isic(root) / TRUTH).write_text(truth(names(), target=lambda n: int(n[5:]) % 3 == 1))
    found = load(root, split="paper")
    assert sizes(found) == (64, 8, 8) and all(2 * sum(s.labels) == len(s) for s in (found.train, found.val, found.test))
    held = set(found.train.groups) | set(found.val.groups)
    assert noted(found, f"LEAK: {sum(g in held for g in found.test.groups)} test images") and noted(found, "40 of each class")
    assert noted(found, "without ISIC 2019's melanomas")


def test_the_authors_lists_are_taken_where_they_lie_in_root(root):
    ids = names(60) + names(6, 900)
    parts = {"train": ids[:48], "valid": ids[48:54], "test": ids[54:]}
    images(isic(root) / "images", names(6, 900))                                # of ISIC 2019: in the lists alone
    for part, inside in parts.items():
        (root / f"isic-{part}.csv").write_text("image_name,target\n" + "".join(f"{n},{i % 2}\n" for i, n in enumerate(inside)))
    found = load(root, split="paper")
    assert [set(s.ids) for s in (found.train, found.val, found.test)] == list(map(set, parts.values()))
    assert noted(found, "the source alone tells the class") and noted(found, "no patient is known of 6 of 66") and noted(found, "LEAK")
    assert sum(sizes(load(root))) == 120                                        # the other rules do not look at them
    (root / "isic-test.csv").write_text(f"image_name,target\n{ids[0]},1\n")
    assert f"{ids[0]} stands in isic-train.csv too" in refusal(root, split="paper")


def test_evaluation_of_a_training_folder_scores_the_same_test_split(root):
    assert load(isic(root), test_only=True).test.ids == load(root).test.ids


def test_labels_follow_the_class_order_of_a_model(root):
    found, other = load(isic(root)), load(root, classes=["melanoma", "benign"])
    assert np.array_equal(other.test.labels, 1 - found.test.labels)


def test_images_without_a_patient_count_as_their_own(root):
    (isic(root) / TRUTH).write_text(re.sub("IP_000000[0-9]", "", truth(names())))
    found = load(root)
    assert noted(found, "39 images have no patient_id") and apart(found) and sum(sizes(found)) == 120


# ------------------------------------------------------------------------------------------------ duplicates
def pairs(root, *rows):
    (root / PAIRS).write_text("image_name_1,image_name_2\n" + "".join(f"{a},{b}\n" for a, b in rows))


def everything(found):
    return {name for part in (found.train, found.val, found.test) for name in part.ids}


def test_the_second_of_each_pair_is_left_out(root):
    a, b, c, d, e = names(5, 20)
    pairs(isic(root), (a, b), (d, e), ("ISIC_0999999", c))
    found = load(root)
    assert everything(found) == set(names()) - {b, e} and noted(found, f"2 images left out: the second of a pair in {PAIRS}")
    (root / PAIRS).unlink()
    assert noted(load(root), "are kept")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_of_a_chain_of_pairs_one_image_stays(root, order):
    a, b, c, d = names(4, 20)
    rows = [(a, b), (b, c), (c, d), (d, a)]
    pairs(isic(root), *(rows[i] for i in order))
    assert len({a, b, c, d} & everything(load(root))) == 1


# ------------------------------------------------------------------------------------------------ tables
SPELLINGS = {
    "bom": lambda s: "\ufeff" + s,
    "crlf": lambda s: s.replace("\n", "\r\n"),
    "blanks": lambda s: s.replace(",", " , "),
    "twice": lambda s: s + s.split("\n", 1)[1],
    "jpg in ids": lambda s: re.sub(r"(ISIC_\d+)", r"\1.jpg", s),
    "floats": lambda s: re.sub(r"(\d)$", r"\1.0", s, flags=re.M),
    "no ages": lambda s: s.replace(",45,", ",,"),
    "upper case": lambda s: s.replace(HEADERS[1], HEADERS[1].upper()),
    "index": lambda s: "\n".join(f"{i},{line}" if i else "," + line for i, line in enumerate(s.strip().split("\n")))}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_table_gives_the_same_split(root, change):
    plain = load(isic(root))
    (root / TRUTH).write_text(change((root / TRUTH).read_text()), newline="")
    found = load(root)
    assert found.test.ids == plain.test.ids and np.array_equal(found.test.labels, plain.test.labels)


@pytest.mark.parametrize("header, row, words", [
    ("image_name,patient_id,label", "ISIC_1,IP_1,0", "has the columns image_name, patient_id, label; needed: image_name,patient_id,target"),
    ("image_name,target", "ISIC_1,0", "needed: image_name,patient_id,target"),
    ("image_name,patient_id,target", "ISIC_1,IP_1,2", "line 2: target is '2'; expected 0"),
    ("image_name,patient_id,target", "ISIC_1,IP_1,", "line 2: target is ''; expected 0"),
    ("image_name,patient_id,target", "ISIC_1,IP_1,nan", "line 2: target is 'nan'"),
    ("image_name,patient_id,target", "ISIC_1,IP_1", "line 2 has 2 fields"),
    ("image_name,patient_id,target", "../../etc/passwd,IP_1,0", "no image id"),
    ("image_name,patient_id,target", "/etc/passwd,IP_1,0", "no image id"),
    ("image_name,patient_id,target", "..\\x,IP_1,0", "no image id"),
    ("image_name,patient_id,target", ",IP_1,0", "no image id"),
    ("image_name,patient_id,target", "ISIC_1,IP_1,0\nISIC_1,IP_1,1", "line 3: ISIC_1 is melanoma here and benign before"),
    ("image_name,patient_id,target", "ISIC_1,IP_1,0\nISIC_1,IP_2,0", "line 3: ISIC_1 is of patient IP_2 here and of IP_1 before")])
def test_a_wrong_table_is_one_line_with_file_and_reason(root, header, row, words):
    (root / TRUTH).write_text(f"{header}\n{row}\n")
    told = refusal(root)
    assert re.search(words, told) and TRUTH in told


def test_a_wrong_list_of_duplicates_is_one_line(root):
    pairs(isic(root), ("ISIC_0000001", "../x"))
    assert re.search(f"{PAIRS}: line 2: '../x' is no image id", refusal(root))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"image_name,patient_id,target\n\0,1,0\n"])
def test_a_damaged_table_is_one_line(root, content):
    (root / TRUTH).write_bytes(content)
    assert TRUTH in refusal(root)


# ------------------------------------------------------------------------------------------------ what is missing
def test_a_missing_or_wrong_folder_is_told_what_is_expected_and_where_to_get_it(root):
    for told in (refusal(root / "none"), refusal(root)):
        assert str(root) in told
        for words in (TRUTH, "jpeg/train", "challenge2020.isic-archive.com", "siim-isic-melanoma-classification", "CC BY-NC 4.0"):
            assert words in told
    isic(root / "a" / "b")
    assert f"did you mean {root / 'a' / 'b'}?" in refusal(root)
    assert f"did you mean {root / 'a' / 'b'}?" in refusal(root / "a" / "b" / "train")


def test_a_root_with_only_the_test_set_is_told_so(root):
    kaggle(root)
    (root / "train.csv").unlink()
    assert "only the test set, whose labels are not public" in refusal(root)


def test_missing_images_are_counted_and_named(root):
    isic(root)
    for name in names()[3:5]:
        (root / "train" / f"{name}.jpg").unlink()
    told = refusal(root)
    assert "2 of 120 train images are missing, first: ISIC_0000004.jpg" in told and "--skip-bad" in told
    found = load(root, skip_bad=True)
    assert sum(sizes(found)) == 118 and noted(found, "2 of 120")
    shutil.rmtree(root / "train")
    assert "none of its 120 images" in refusal(root)


# ------------------------------------------------------------------------------------------------ the real tables
def real(*paths):
    return isic2020._read([SAMPLES / path for path in paths], [])


@needs(SAMPLES)
@pytest.mark.parametrize("path", [TRUTH, TRUTH.replace(".csv", "_v2.csv"), "siim-isic-melanoma-classification/train.csv"])
def test_the_real_tables_are_read(path):
    rows = real(path)
    assert len(rows) == 49 and all(re.fullmatch(r"ISIC_\d{7}", n) and re.fullmatch(r"IP_\d{7}", r.patient) for n, r in rows.items())
    assert set(Counter(r.label for r in rows.values())) == {0, 1}


@needs(SAMPLES)
def test_the_real_tables_agree_with_one_another():
    parts = [TRUTH, TRUTH.replace(".csv", "_v2.csv"), "siim-isic-melanoma-classification/train.csv"]
    rows = real(*parts)
    assert sum(len(real(part)) for part in parts) >= len(rows) >= 49            # a conflict of labels or patients would be an error
    assert rows["ISIC_2637011"][:2] == (0, "IP_7279968")
    assert isic2020._read([SAMPLES / "siim-isic-melanoma-classification" / "test.csv"], []) == {}


@needs(SAMPLES)
def test_the_real_list_of_duplicates_is_read():
    path, notes = SAMPLES / PAIRS, []
    lines = [line.split(",") for line in path.read_text().split()[1:]]
    rows = {name: isic2020.Row(0, "IP_1", path) for pair in lines for name in pair}
    kept = isic2020._without_duplicates([path], rows, notes)
    assert len(lines) == 50 and set(kept) == {one for one, _ in lines} and "50 images left out" in notes[0]


@needs(SAMPLES)
def test_the_real_tables_load_with_pictures(root):
    shutil.copy(SAMPLES / TRUTH, root)
    shutil.copy(SAMPLES / PAIRS, root)
    images(root / "train", real(TRUTH))
    found = load(root)
    assert sum(sizes(found)) == 49 - len({n for n in real(TRUTH)} & {line.split(",")[1] for line in (SAMPLES / PAIRS).read_text().split()})
    assert apart(found) and not noted(found, "LEAK")


@needs(ISIC2019)
def test_isic_2019_is_not_taken_for_it():
    assert "needed: image_name,patient_id,target" in refusal(ISIC2019)


def test_the_published_counts_split_by_patient_with_melanoma_on_every_side(tmp_path):
    """33,126 images of 2,056 patients, 584 melanomas of 428 of them, as DATASETS.md counts; without pictures."""
    rng = np.random.default_rng(0)
    patients = np.concatenate([np.arange(2056), rng.integers(0, 2056, 33_126 - 2056)])
    sick = set(np.flatnonzero(patients < 428)[:584])                            # the first images are one of each patient
    records = [data.tables.Record(tmp_path, int(i in sick), f"IP_{p}", f"ISIC_{i:07d}", "train") for i, p in enumerate(patients)]
    found = data.splits.assign(records)
    assert data.splits.leaking(found) == (0, 0) and len(found) == 33_126
    there = {part: {r.group for r in found if r.split == part and r.label} for part in data.splits.SPLITS}
    assert {part: len(groups) for part, groups in there.items()} == {"train": 257, "val": 43, "test": 128}
