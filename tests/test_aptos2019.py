"""APTOS 2019: the order of the grades, every layout and copy, photographs that are there twice, and every wrong table in one line."""
import functools
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import data
from data import aptos2019
from data.__main__ import main
from tests.loading import noted, refused, sizes

HEADER = "id_code,diagnosis"
FOLDERS = ["No_DR", "Mild", "Moderate", "Severe", "Proliferate_DR"]             # of the coloured copy, in the order of the grades
RNG = np.random.default_rng(0)
NAMES = [f"{i:012x}" for i in range(100)]


def grade(name):
    return int(name, 16) % 5


def images(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(RNG.integers(0, 256, (6, int(name, 16) % 3 + 7, 3), np.uint8)).save(folder / f"{name}.png")


def table(path, names=NAMES, change=lambda s: s):
    path.write_text(change("\n".join([HEADER, *(f"{i},{grade(i)}" for i in names)]) + "\n"), newline="")


def kaggle(root, folder="train_images"):
    table(root / "train.csv")
    (root / "test.csv").write_text("id_code\nffff00000000\nffff00000001\n")
    (root / "sample_submission.csv").write_text(f"{HEADER}\nffff00000000,0\nffff00000001,0\n")
    images(root / folder)
    images(root / "test_images", ["ffff00000000", "ffff00000001"])
    return root


def graded(root):
    for k, folder in enumerate(FOLDERS):
        images(root / "colored_images" / folder, NAMES[k::5])
    return root


def three_lists(root):
    """2930, 366 and 366 images in the copy; here 60, 20 and 20."""
    for name, part, ids in (("train_1", "train", NAMES[:60]), ("valid", "val", NAMES[60:80]), ("test", "test", NAMES[80:])):
        table(root / f"{name}.csv", ids)
        images(root / f"{part}_images" / f"{part}_images", ids)
    return root


def load(root, **options):
    return data.load("aptos2019", root, size=8, **options)


refusal = functools.partial(refused, load)


def right(found):
    return all(split.labels.tolist() == list(map(grade, split.ids)) for split in (found.train, found.val, found.test) if split)


# ------------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("folder", ["train_images", "train", "train_images/train_images", "."])
def test_kaggles_layout_and_diffmics_give_the_same_grades_and_split(root, folder):
    found = load(kaggle(root, folder))
    assert found.classes == ["No DR", "Mild", "Moderate", "Severe", "Proliferative DR"] and found.channels == 3 and not found.multilabel
    assert sizes(found) == (60, 10, 30) and right(found) and all(set(s.labels) == set(range(5)) for s in (found.train, found.val, found.test))
    assert noted(found, "2 images stand in no table with grades") and noted(found, "no patient ids are known")
    assert noted(found, "not public: split group instead") and not set(found.test.ids) & {"ffff00000000", "ffff00000001"}
    assert found.test.ids == load(root, seed=3, split="group").test.ids and set(found.train.source["width"]) == {7, 8, 9}


@pytest.mark.parametrize("with_table", [True, False])
def test_in_the_coloured_copy_the_grade_orders_the_folders_and_not_the_alphabet(root, with_table):
    graded(root)
    if with_table:
        table(root / "train.csv")
    found = load(root)
    assert found.classes == aptos2019.CLASSES and right(found) and sizes(found) == (60, 10, 30)


def test_the_copy_of_three_tables_keeps_its_split_and_its_doubled_folders_are_found(root):
    found = load(three_lists(root))
    assert [sorted(s.ids) for s in (found.train, found.val, found.test)] == [NAMES[:60], NAMES[60:80], NAMES[80:]] and right(found)
    assert noted(found, "this copy's own train_1.csv, valid.csv and test.csv") and sum(sizes(load(root, split="group"))) == 100
    assert load(root, test_only=True).test.ids == found.test.ids
    (root / "valid.csv").unlink()
    carved = load(root)
    assert sizes(carved) == (55, 5, 20) and noted(carved, "10 % of train") and noted(carved, "20 images stand in no table")
    (root / "train_1.csv").unlink()
    assert "holds only a test set" in refusal(root) and load(root, test_only=True).train is None


def test_a_test_table_without_grades_is_no_test_set(root):
    three_lists(root)
    (root / "test.csv").write_text("id_code\n" + "\n".join(NAMES[80:]))
    found = load(root)
    assert sum(sizes(found)) == 80 and noted(found, "test.csv: without grades, so it is no test set") and noted(found, "20 images stand in no table")


def test_train_csv_goes_before_the_copys_tables(root):
    kaggle(three_lists(root))
    assert load(root).test.ids == load(root, split="group").test.ids and not noted(load(root), "this copy's own")


def test_labels_follow_the_class_order_of_a_model_and_a_limit_keeps_every_grade(root):
    found, other = load(kaggle(root)), load(root, classes=sorted(aptos2019.CLASSES))
    assert [other.classes[y] for y in other.test.labels] == [found.classes[y] for y in found.test.labels]
    assert sizes(load(root, limit=5)) == (5, 5, 5)


# ------------------------------------------------------------------------------------------------ photographs that are there twice
def test_copies_of_a_photograph_stay_on_one_side_and_the_papers_split_says_that_it_leaks(root):
    kaggle(root)
    for one, other in zip(NAMES[:20], NAMES[50:70]):
        shutil.copy(root / "train_images" / f"{one}.png", root / "train_images" / f"{other}.png")
    shutil.copy(root / "train_images" / f"{NAMES[0]}.png", root / "train_images" / f"{NAMES[71]}.png")     # of another grade
    found = load(root)
    side = {i: part for part in ("train", "val", "test") for i in getattr(found, part).ids}
    assert all(side[one] == side[other] for one, other in zip(NAMES[:20], NAMES[50:70])) and side[NAMES[71]] == side[NAMES[0]]
    assert set(side.values()) == {"train", "val", "test"} and not noted(found, "LEAK") and not noted(found, "dropped")
    assert noted(found, "41 files are copies of one another, 20 photographs (1 of them with more than one grade)") and sum(sizes(found)) == 100
    paper = load(root, split="paper")
    assert noted(paper, "by image, as DiffMIC's") and noted(paper, "LEAK: ") and noted(paper, "images dropped: pixel for pixel")


def test_in_the_copys_own_split_a_copied_photograph_leaves_train(root):
    three_lists(root)
    shutil.copy(root / "test_images" / "test_images" / f"{NAMES[80]}.png", root / "train_images" / "train_images" / f"{NAMES[0]}.png")
    found = load(root)
    assert sizes(found) == (59, 20, 20) and noted(found, "1 train images dropped")


# ------------------------------------------------------------------------------------------------ tables
SPELLINGS = {
    "bom": lambda s: "\ufeff" + s,
    "crlf": lambda s: s.replace("\n", "\r\n"),
    "floats": lambda s: re.sub(r"(?m),(\d)$", r",\1.0", s),
    "png in ids": lambda s: re.sub(r"(?m)^([0-9a-f]{12})", r"\1.png", s),
    "index": lambda s: "\n".join(f"{i},{row}" if i else "," + row for i, row in enumerate(s.strip().split("\n"))),
    "upper case": lambda s: s.replace(HEADER, HEADER.upper()),
    "other order": lambda s: "\n".join(",".join(row.split(",")[::-1]) for row in s.strip().split("\n")),
    "twice": lambda s: s + s.split("\n", 1)[1]}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_table_gives_the_same_split(root, change):
    plain = load(kaggle(root))
    table(root / "train.csv", change=change)
    found = load(root)
    assert found.test.ids == plain.test.ids and right(found)


@pytest.mark.parametrize("text, words", [
    ("id_code,level\na,0\n", "has the columns id_code, level; needed: id_code,diagnosis"),
    (f"{HEADER}\na,5\n", "line 2: diagnosis is '5'; expected a grade from 0 to 4"),
    (f"{HEADER}\na,-1\n", "line 2: diagnosis is '-1'"), (f"{HEADER}\na,1.5\n", "line 2: diagnosis is '1.5'"),
    (f"{HEADER}\na,nan\n", "diagnosis is 'nan'"), (f"{HEADER}\na,\n", "line 2: diagnosis is ''"), (f"{HEADER}\na\n", "line 2 has 1 fields"),
    (f"{HEADER}\n../../a,1\n", "'../../a' is no image id"), (f"{HEADER}\n,1\n", "'' is no image id"),
    (f"{HEADER}\na,1\na,2\n", "line 3: a is Moderate here and Mild before"), ("", "has the columns none"), ("\0", "NUL")])
def test_a_wrong_table_is_one_line_with_file_and_reason(root, text, words):
    (root / "train.csv").write_text(text)
    told = refusal(root)
    assert words in told and "train.csv" in told


def test_a_folder_that_contradicts_the_table_or_another_is_refused(root):
    table(graded(root) / "train.csv")
    shutil.move(root / "colored_images" / "Mild" / f"{NAMES[1]}.png", root / "colored_images" / "Severe")
    assert f"{NAMES[1]} lies in it and is Mild in" in refusal(root)
    shutil.copy(root / "colored_images" / "Severe" / f"{NAMES[1]}.png", root / "colored_images" / "Mild")
    assert "lies in" in refusal(root)


def test_an_image_in_two_lists_is_refused(root):
    three_lists(root)
    table(root / "valid.csv", NAMES[59:80])
    assert f"valid.csv: line 2: {NAMES[59]} stands in train_1.csv too" in refusal(root)


# ------------------------------------------------------------------------------------------------ images
def test_missing_images_and_git_lfs_pointers_are_counted_and_named(root, capsys):
    kaggle(root)
    for name in NAMES[3:5]:
        (root / "train_images" / f"{name}.png").unlink()
    told = refusal(root)
    assert f"2 of 100 train images are missing, first: {NAMES[3]}.png" in told and "--skip-bad" in told
    assert main(["aptos2019", "--root", str(root)]) == 2 and capsys.readouterr().err == f"error: {told}\n"
    (root / "train_images" / f"{NAMES[6]}.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    found = load(root, skip_bad=True)
    assert sum(sizes(found)) == 97 and noted(found, "git-LFS pointer") and noted(found, "2 of 100 train images are missing")


def test_pointers_alone_are_told_as_such_and_as_no_copies_of_one_another(root):
    kaggle(root)
    for number, path in enumerate((root / "train_images").iterdir()):
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{number:064x}\nsize 3\n")
    told = refusal(root)
    assert "100 of 100 images cannot be read" in told and "git lfs pull" in told


def test_a_missing_or_wrong_folder_is_told_what_is_expected_and_where_to_get_it(root):
    for told in (refusal(root / "none"), refusal(root)):
        assert str(root) in told
        for words in ("train.csv", "train_images", "kaggle.com/c/aptos2019-blindness-detection", "No_DR"):
            assert words in told
    (root / "a" / "b").mkdir(parents=True)
    kaggle(root / "a" / "b")
    assert f"did you mean {root / 'a' / 'b'}?" in refusal(root)
    for place in ("train_images", "test_images"):
        shutil.rmtree(root / "a" / "b" / place)
    assert "a table, but none of its 100 train images" in refusal(root / "a" / "b")
