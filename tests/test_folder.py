"""A folder per class: given or carved splits, patients, class order, and a line for whatever does not fit."""
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError, folder
from tests.loading import noted, sizes

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "folder_per_class_nih1000"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_CLASSIFIERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def fill(root, **counts):
    """fill(root, train__a=3): three pictures in train/a."""
    for name, n in counts.items():
        place = root / name.replace("__", "/")
        place.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(RNG.integers(0, 256, (6, 6, 3), np.uint8)).save(place / f"{i:02d}.png")
    return root


def refusal(root, **options):
    with pytest.raises(DataError) as caught:
        data.load("folder", root, size=8, **options)
    line = str(caught.value)
    assert str(root) in line and "\n" not in line
    return line


@pytest.mark.parametrize("val", ["val", "valid", "validation", "VAL"])
def test_given_splits_are_kept(root, val):
    fill(root, train__a=5, train__b=4, test__a=2, test__b=2, **{f"{val}__a": 1, f"{val}__b": 2})
    found = data.load("folder", root, size=8)
    assert sizes(found) == (9, 3, 4) and noted(found, "as given") and noted(found, "no patient ids are known")
    assert all(name.startswith("test/") for name in found.test.ids) and found.test.groups is None


def test_val_and_test_are_carved_from_train_where_they_lack(root):
    fill(root, train__a=10, train__b=10, test__a=3, test__b=3)
    found = data.load("folder", root, size=8)
    assert sizes(found) == (18, 2, 6) and noted(found, "10 % as val")
    found = data.load("folder", fill(root.parent / "only", train__a=10, train__b=10), size=8)
    assert sizes(found) == (12, 2, 6) and noted(found, "30 % as test")


def test_classes_are_in_natural_order_or_as_classes_txt_says(root):
    fill(root, **{"10_severe": 3, "2_mild": 3, "0_none": 3})
    assert data.load("folder", root, size=8).classes == ["0_none", "2_mild", "10_severe"]
    (root / "classes.txt").write_text("10_severe\r\n0_none\r\n\r\n2_mild\r\n")
    assert data.load("folder", root, size=8).classes == ["10_severe", "0_none", "2_mild"]
    (root / "classes.txt").write_text("10_severe\n0_none\n")
    assert "classes.txt" in refusal(root)


def test_images_lie_at_any_depth_and_litter_is_skipped(root):
    fill(root, a__x__deep=4, a=2, b=5)
    fill(root / "__MACOSX", a=2)
    fill(root / ".git", a=2)
    found = data.load("folder", root, size=8)
    assert found.classes == ["a", "b"] and sum(sizes(found)) == 11
    assert any("deep" in name for s in (found.train, found.val, found.test) for name in s.ids)


def test_a_split_is_not_taken_for_a_class(root):
    for part, n in ("Training", 20), ("Testing", 10):                       # as some of Kaggle's sets are called
        fill(root / part, a=n, b=n)
    found = data.load("folder", root, size=8)
    assert found.classes == ["a", "b"] and len(found.test) == 20 and noted(found, "10 % as val carved from train")
    fill(root, extra=3)
    assert noted(data.load("folder", root, size=8), "Testing, Training beside extra, whose images are left out")
    (root / "train").mkdir()
    assert "Training and train are the same split" in refusal(root)
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "Training")
    assert "holds Testing beside extra: a split beside classes; move the classes into train/, or rename it" in refusal(root)


def test_folders_that_each_class_has_may_be_the_classes_and_that_is_said(root):
    for site in "cohort1", "cohort2":
        fill(root / site, sick=10, well=10)
    assert noted(data.load("folder", root, size=8), "each class holds the folders sick, well: are those the classes?")
    assert not noted(data.load("folder", fill(root.parent / "plain", a=10, b=10), size=8), "each class holds")


def test_a_listed_image_outside_the_given_splits_does_not_undo_them(root):
    for part, n in (("train", 40), ("test", 20), ("extra", 1)):
        findings(root, n, part)
    assert "lists images in test, train and others, as extra/00.png, in none of train, val and test" in refusal(root)


def test_a_class_that_leaves_train_with_its_patients_is_named(root):
    for part, n in (("train", 6), ("val", 3), ("test", 3)):
        fill(root / part, a=n, b=n, rare=1)
    write_groups(root, [f"{part}/rare/00.png,p" for part in ("train", "val", "test")])
    found = data.load("folder", root, size=8)
    assert noted(found, "LACKING: no training image of rare is left, so no answer will ever be rare") and noted(found, "2 images left out")
    write_groups(root, [f"{p.relative_to(root).as_posix()},q" for part in ("val", "test") for p in (root / part).rglob("*.png")])
    assert "no val images are left; 7 images left out: their patient or lesion is in a later split too" in refusal(root)


def test_a_table_may_have_semicolons(root):
    fill(root, a=12, b=12)
    (root / "groups.csv").write_text("file;group\n" + "".join(f"{c}/{i:02d}.png;{c}{i // 2}\n" for c in "ab" for i in range(12)))
    assert len(set(data.load("folder", root, size=8).train.groups)) > 5


def test_a_folder_without_images_is_no_class_and_said_so(root):
    fill(root, a=4, b=4, docs=0)
    (root / "docs" / "readme.txt").write_text("x")
    found = data.load("folder", root, size=8)
    assert found.classes == ["a", "b"] and noted(found, "docs")


def write_groups(root, lines):
    (root / "groups.csv").write_text("file,group\n" + "\n".join(lines) + "\n")


def test_groups_csv_keeps_patients_on_one_side(root):
    fill(root, a=20, b=20)
    write_groups(root, [f"{c}/{i:02d}.png,patient{c}{i // 4}" for c in "ab" for i in range(20)] + ["a/gone.png,p"])
    found = data.load("folder", root, size=8)
    groups = [set(s.groups) for s in (found.train, found.val, found.test)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2] and sum(sizes(found)) == 40
    assert noted(found, "1 files that are not there, first: a/gone.png") and not noted(found, "LEAK")
    leaky = data.load("folder", root, size=8, split="paper")
    assert noted(leaky, "LEAK")


def test_a_patient_on_two_given_sides_stays_in_the_later_one_and_split_group_splits_anew(root):
    fill(root, train__a=9, train__b=9, val__a=3, val__b=3, test__a=2, test__b=2)
    write_groups(root, [f"{p}/{c}/{i:02d}.png,{c}{i}"
                        for p, n in (("train", 9), ("val", 3), ("test", 2)) for c in "ab" for i in range(n)])
    found = data.load("folder", root, size=8)
    assert sizes(found) == (12, 2, 4) and noted(found, "10 images left out: their patient or lesion is in a later split too") and not noted(found, "LEAK")
    mended = data.load("folder", root, size=8, split="group")
    assert sum(sizes(mended)) == 28 and not noted(mended, "LEAK") and not set(mended.train.groups) & set(mended.test.groups)


def test_groups_csv_takes_bare_names_and_refuses_unclear_ones(root):
    fill(root, a=5, b=4)                                                        # a/04.png is the only one of its name
    write_groups(root, ["04.png,p", "a\\03.png,p"])
    found = data.load("folder", root, size=8)
    assert noted(found, "no group for 7 images")
    write_groups(root, ["00.png,p"])
    assert "2 files" in refusal(root)
    write_groups(root, ["04.png,p", "a/04.png,q"])
    assert "two groups" in refusal(root)
    (root / "groups.csv").write_text("name,patient\n")
    assert "file,group" in refusal(root)


def test_a_folder_for_evaluation_may_be_all_test(root):
    fill(root, a=3, b=2)
    found = data.load("folder", root, size=8, test_only=True)
    assert found.train is None and found.val is None and len(found.test) == 5
    nested = fill(root.parent / "nested", test__a=2, test__b=2)
    assert len(data.load("folder", nested, size=8, test_only=True).test) == 4
    assert "holds only test" in refusal(nested)
    full = fill(root.parent / "full", train__a=5, train__b=5, test__a=2, test__b=2)
    assert len(data.load("folder", full, size=8, test_only=True).test) == 4


def test_one_line_says_what_does_not_fit(root):
    assert "no images" in refusal(root)
    assert "no such folder" in refusal(root / "none")
    file = root / "file.png"
    file.write_text("x")
    assert "a file, not a folder" in refusal(file)
    fill(root, a=5)
    assert "one class only (a)" in refusal(root)
    fill(root, b=2)
    line = refusal(root)
    assert "lacks the class b" in line and "at least 3" in line


def test_loose_images_are_explained(root):
    fill(root.parent, set=3)
    assert "sort them into a folder per class" in refusal(root)


@pytest.mark.parametrize("lacking", ["train", "val", "test"])
def test_a_class_that_one_split_lacks_is_refused(root, lacking):
    counts = {f"{part}__{name}": 3 for part in ("train", "val", "test") for name in "abc"}
    del counts[f"{lacking}__c"]
    line = refusal(fill(root, **counts))
    assert f"{lacking} lacks the class c" in line and "--split group" in line


def test_grey_pictures_give_one_channel_and_a_single_colour_picture_three(root):
    fill(root, a=1)
    for name in "ab":
        (root / name).mkdir(exist_ok=True)
        for i in range(8):
            kind = (np.uint8, np.uint16)[i % 2]
            Image.fromarray(RNG.integers(0, np.iinfo(kind).max, (6, 6), kind)).save(root / name / f"{i:02d}.png")
    assert data.load("folder", root, size=8).train.images.shape[1] == 1
    fill(root, b=1)
    assert data.load("folder", root, size=8).channels == 3


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/folder_per_class_nih1000 is not there")
def test_the_real_folder_is_600_200_200_and_its_leak_is_found(root):
    found = data.load("folder", REAL, size=28)
    assert sizes(found) == (600, 200, 200) and found.classes == ["0_normal", "1_abnormal"] and found.channels == 3
    assert found.train.images.std() > 10 and noted(found, "no patient ids are known")
    for image in folder.find_images(REAL):                                  # the same with the patients' ids, in our own folder
        place = root / image.relative_to(REAL)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder.follow(image).resolve())
    write_groups(root, [f"{p.relative_to(root).as_posix()},{p.name[:8]}" for p in folder.find_images(root)])
    apart = data.load("folder", root, size=28)
    groups = [set(part.groups) for part in (apart.train, apart.val, apart.test)]
    assert len(apart.test) == 200 and len(apart.train) < 600 and not groups[0] & (groups[1] | groups[2]) and not groups[1] & groups[2] and noted(apart, "images left out")
    mended = data.load("folder", root, size=28, split="group")
    assert not noted(mended, "LEAK") and sum(sizes(mended)) == 1000 and not set(mended.train.groups) & set(mended.test.groups)


def test_a_folders_tables_know_only_the_images_below_it(root, tmp_path):
    """chexpert, whose tables hold paths, has such a test of its own."""
    outside = tmp_path / "outside.png"
    fill(root, a=12, b=12)
    Image.new("RGB", (8, 8)).save(outside)
    for name in "../outside.png", str(outside), f"a/../../{outside.name}":
        write_groups(root, [f"{name},p"])
        assert f"names none of the 24 images, its first is {name}, an image's a/00.png; name files by the path" in refusal(root)
        write_groups(root, [f"{name},p", "a/01.png,p"])
        assert noted(data.load("folder", root, size=8), f"1 files that are not there, first: {name}")
        (root / "groups.csv").unlink()
        (root / "findings.csv").write_text(f"file,Mass\n{name},1\n")
        with pytest.raises(DataError, match="none of its 1 images"):
            data.load("folder", root, size=8)
        (root / "findings.csv").unlink()


# ------------------------------------------------------------------------------------------------ multi-label
def findings(root, n=60, part="pictures", header="file,Mass,Pleural Fluid", change=lambda s: s):
    """n images, two in three of them without a finding, and a row each in findings.csv."""
    place = root / part
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        Image.fromarray(RNG.integers(0, 256, (6, 6), np.uint8)).save(place / f"{i:02d}.png")
        lines.append(f"{(place / f'{i:02d}.png').relative_to(root).as_posix()},{int(i % 6 == 0)},{int(i % 6 in (0, 1))}.0")
    path = root / "findings.csv"
    path.write_text((path.read_text() if path.exists() else header + "\n") + change("\n".join(lines) + "\n"))
    return root


def test_a_table_of_findings_makes_a_multilabel_set(root):
    found = data.load("folder", findings(root), size=8)
    assert found.multilabel and found.classes == ["Mass", "Pleural Fluid"] and found.channels == 1 and sum(sizes(found)) == 60
    for split in (found.train, found.val, found.test):
        assert split.labels.dtype == np.float32 and split.labels.any(0).all() and (~split.labels.any(1)).any()
        assert [[i % 6 == 0, i % 6 in (0, 1)] for i in (int(name[-6:-4]) for name in split.ids)] == split.labels.astype(bool).tolist()
    assert noted(found, "30 % of the images") and noted(found, "no patient ids are known")
    only = data.load("folder", root, size=8, test_only=True, classes=["Pleural Fluid", "Mass"])
    assert len(only.test) == 60 and only.test.labels.sum(0).tolist() == [20, 10] and only.train is None


def test_a_table_of_findings_keeps_given_splits_and_patients(root):
    for part, n in (("train", 40), ("test", 20)):
        findings(root, n, part)
    found = data.load("folder", root, size=8)
    assert sizes(found) == (35, 5, 20) and all(name.startswith("test/") for name in found.test.ids)
    assert len(data.load("folder", root, size=8, test_only=True).test) == 20
    names = [f"{part}/{i:02d}.png,p{i // 4}\n" for part, n in (("train", 40), ("test", 20)) for i in range(n)]
    (root / "groups.csv").write_text("file,group\n" + "".join(names))
    found = data.load("folder", root, size=8, split="group")
    assert not set(found.train.groups) & set(found.test.groups) and sum(sizes(found)) == 60


@pytest.mark.parametrize("header, change, words", [
    ("name,Mass,Fluid", lambda s: s, "needed: file and, once each, a column of 0 and 1 for every finding"),
    ("file,Mass,mass", lambda s: s, "once each"),
    ("file,Mass,Fluid", lambda s: s.replace(",1,", ",2,"), "line 2: Mass is 2: every column but file is a finding, each 0 or 1"),
    ("file,Mass,Fluid", lambda s: s.replace(",1.0", ",p7"), "line 2: Fluid is p7: every column but file is a finding, each 0 or 1; patients belong into groups.csv"),
    ("file,Mass,Fluid", lambda s: s.replace("00.png", "xx.png"), "1 of 60 listed images are missing, first: pictures/xx.png"),
    ("file,Mass,Fluid", lambda s: s.replace("pictures", "../pictures"), "none of its 60 images"),
    ("file,Mass,Fluid", lambda s: s + "pictures/01.png,1,1\n", "line 62: pictures/01.png has other findings than before")])
def test_a_wrong_table_of_findings_is_one_line(root, header, change, words):
    assert words in refusal(findings(root, header=header, change=change))


def test_images_beside_the_table_of_findings_are_counted(root):
    findings(root, change=lambda s: s.replace("pictures/00.png,1,1.0\n", ""))
    assert noted(data.load("folder", root, size=8), "1 images are not in findings.csv")


# ------------------------------------------------------------------------------------------------ PMG2000
def test_pmg2000_is_a_folder_of_the_users_own_and_says_that_the_set_is_not_public(root):
    fill(root, **{f"grade_{k}": 10 for k in range(4)})
    found, plain = data.load("pmg2000", root, size=8), data.load("folder", root, size=8)
    assert found.test.ids == plain.test.ids and found.classes == plain.classes and "not public" in found.notes[0] and found.name == "pmg2000"
    fill(root, grade_9=10)
    assert noted(data.load("pmg2000", root, size=8), "5 classes here")
    for place in (root / "none", None):
        with pytest.raises(DataError, match="no such folder; PMG2000 is not public and cannot be downloaded"):
            data.load("pmg2000", place, size=8)
