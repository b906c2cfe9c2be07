"""ISIC 2019: eight classes, a lesion on one side, names that end in _downsampled, UNK, and every wrong table in one line."""
import functools
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import ham10000, isic2019, splits
from tests.loading import apart, needs, noted, refused, sizes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FULL, SMALL = SHARED / "csv_full", SHARED / "isic2019"
TRUTH, META = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"
HEADER = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"
RNG = np.random.default_rng(0)


def names(n=240, first=0):
    return [f"ISIC_{i:07d}{'_downsampled' if i % 10 == 3 else ''}" for i in range(first, first + n)]


def label(name):
    return int(name[5:12]) // 3 % 8                                             # three images of a lesion


def lesion(name):
    return "" if int(name[5:12]) % 24 < 3 else f"BCN_{int(name[5:12]) // 3:07d}"    # of one class none is known


def truth(ids, of=label):
    return "\n".join([HEADER, *(f"{i}," + ",".join(f"{float(of(i) == k)}" for k in range(9)) for i in ids)]) + "\n"


def images(folder, ids):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ids:
        Image.fromarray(RNG.integers(0, 256, (8, 9, 3), np.uint8)).save(folder / f"{name}.jpg")


def isic(root):
    root.mkdir(parents=True, exist_ok=True)
    (root / TRUTH).write_text(truth(names()))
    (root / META).write_text("image,age_approx,anatom_site_general,lesion_id,sex\n" + "".join(f"{i},55,,{lesion(i)},female\n" for i in names()))
    images(root / "ISIC_2019_Training_Input", names())
    return root


def test_set(root, **options):
    ids = names(45, 34321)
    (root / "ISIC_2019_Test_GroundTruth.csv").write_text(re.sub("(?m)$", ",1.0,0.0", truth(ids, **options).strip()).replace(
        "UNK,1.0,0.0", "UNK,score_weight,validation_weight") + "\n")
    (root / "ISIC_2019_Test_Metadata.csv").write_text("image,age_approx,anatom_site_general,sex\n" + "".join(f"{i},60,torso,male\n" for i in ids))
    images(root / "ISIC_2019_Test_Input", ids)
    return ids


test_set.__test__ = False


def load(root, **options):
    return data.load("isic2019", root, size=8, **options)


refusal = functools.partial(refused, load)


# ------------------------------------------------------------------------------------------------ layouts and splits
def test_lesions_stay_on_one_side_and_unknown_ones_count_alone(root):
    found = load(isic(root))
    assert found.classes == isic2019.CLASSES and found.channels == 3 and not found.multilabel
    assert sum(sizes(found)) == 240 and apart(found) and not noted(found, "LEAK")
    for part in (found.train, found.val, found.test):
        assert set(part.labels) == set(range(8)) and part.labels.tolist() == [label(i) for i in part.ids]
        assert part.groups == [lesion(i) or i for i in part.ids] and any(i.endswith("_downsampled") for i in part.ids)
        assert set(part.source["sex"]) == {"female"} and set(part.source["age"]) == {55}
    assert noted(found, "30 of 240 images have no lesion_id") and noted(found, "no official test set here")


def test_the_papers_split_is_by_image_and_says_that_it_leaks(root):
    found = load(isic(root), split="paper")
    assert sizes(found) == (168, 24, 48) and noted(found, "LEAK") and noted(found, "20 % test by image, as Mediffusion's")


def test_the_official_test_set_is_used_where_it_is_and_unk_is_left_out(root):
    ids = test_set(isic(root), of=lambda i: 8 if int(i[5:12]) % 9 == 0 else label(i))
    kept = [i for i in ids if int(i[5:12]) % 9]
    found = load(root)
    assert sorted(found.test.ids) == kept and sum(sizes(found)) == 240 + len(kept)
    assert found.test.groups is None and not set(found.train.groups) & set(found.val.groups)       # nobody knows its lesions
    assert noted(found, "ISIC_2019_Test_GroundTruth.csv: 5 images are UNK") and noted(found, "test is the ISIC 2019 test set")
    assert set(found.test.source["site"]) == {"torso"} and set(load(root, split="group").test.ids) < set(names())
    for path in (TRUTH, META):
        (root / path).unlink()
    shutil.rmtree(root / "ISIC_2019_Training_Input")
    assert load(root, test_only=True).test.ids == found.test.ids
    assert "holds only a test set" in refusal(root)


def test_a_test_set_without_labels_or_without_images_is_none(root):
    plain = load(isic(root))
    test_set(root)
    shutil.rmtree(root / "ISIC_2019_Test_Input")
    assert load(root).test.ids == plain.test.ids
    (root / "ISIC_2019_Test_GroundTruth.csv").unlink()
    assert load(root).test.ids == plain.test.ids


@pytest.mark.parametrize("folder", ["ISIC_2019_Training_Input/ISIC_2019_Training_Input", ".", "images"])
def test_images_and_tables_may_lie_anywhere_in_root(root, folder):
    plain = load(isic(root))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for path in list((root / "ISIC_2019_Training_Input").glob("*.jpg")):
        path.rename(root / folder / path.name)
    (root / "tables").mkdir()
    for name in (TRUTH, META):
        (root / name).rename(root / "tables" / name)
    found = load(root)
    assert found.test.ids == plain.test.ids and np.array_equal(found.test.images, plain.test.images)


def test_without_metadata_each_image_counts_as_its_own_lesion(root):
    (isic(root) / META).unlink()
    found = load(root)
    assert found.train.groups is None and noted(found, "240 of 240 images have no lesion_id") and noted(found, f"add {META}")


def test_labels_follow_the_class_order_of_a_model(root):
    found, other = load(isic(root)), load(root, classes=sorted(isic2019.CLASSES))
    assert [other.classes[y] for y in other.test.labels] == [found.classes[y] for y in found.test.labels]


def test_a_limit_keeps_every_class(root):
    found = load(isic(root), limit=10)
    assert sizes(found) == (10, 10, 10) and all(set(s.labels) == set(range(8)) for s in (found.train, found.val, found.test))


def test_images_of_ham10000_are_counted(root):
    isic(root)
    (root / TRUTH).write_text(truth(names()).replace("ISIC_0000000,", "ISIC_0024306,").replace("ISIC_0000001,", "ISIC_0034321,"))
    for old, new in (("0000000", "0024306"), ("0000001", "0034321")):
        (root / "ISIC_2019_Training_Input" / f"ISIC_{old}.jpg").rename(root / "ISIC_2019_Training_Input" / f"ISIC_{new}.jpg")
    assert noted(load(root), "1 training images are HAM10000's: test no model")


# ------------------------------------------------------------------------------------------------ tables
SPELLINGS = {
    "bom": lambda s: "\ufeff" + s,
    "crlf": lambda s: s.replace("\n", "\r\n"),
    "ints": lambda s: s.replace(".0", ""),
    "numbers for names": lambda s: s.replace(HEADER, "image,0,1,2,3,4,5,6,7,8"),
    "lower case": lambda s: s.replace(HEADER, HEADER.lower()),
    "no unk": lambda s: "\n".join(row.rsplit(",", 1)[0] for row in s.split()) + "\n",
    "other order": lambda s: "\n".join(",".join([row.split(",")[0], *row.split(",")[:0:-1]]) for row in s.split()) + "\n",
    "more columns": lambda s: re.sub("(?m)$", ",more", s.strip()) + "\n",
    "twice": lambda s: s + s.split("\n", 1)[1],
    "jpg in ids": lambda s: re.sub(r"(?m)^(ISIC\w+)", r"\1.jpg", s)}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_table_gives_the_same_split(root, change):
    plain = load(isic(root))
    (root / TRUTH).write_text(change((root / TRUTH).read_text()), newline="")
    found = load(root)
    assert found.test.ids == plain.test.ids and np.array_equal(found.test.labels, plain.test.labels)


def test_gender_is_sex_and_blanks_are_unknown(root):
    (isic(root) / META).write_text((root / META).read_text().replace("sex", "gender").replace(",55,", ",,"))
    found = load(root)
    assert set(found.train.source["sex"]) == {"female"} and "age" not in found.train.source


ROW = "ISIC_1,0,1,0,0,0,0,0,0,0"


@pytest.mark.parametrize("text, words", [
    ("image,MEL,NV\nISIC_1,0,1\n", "has the columns image, mel, nv; needed: image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC"),
    (f"{HEADER}\nISIC_1,1,1,0,0,0,0,0,0,0\n", "line 2: exactly one of MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK must be 1"),
    (f"{HEADER}\nISIC_1,0,0,0,0,0,0,0,0,0\n", "line 2: exactly one of"),
    (f"{HEADER}\nISIC_1,0,.5,0,0,0,0,0,0,0\n", "line 2: exactly one of"),
    (f"{HEADER}\nISIC_1,0,nan,0,0,0,0,0,0,1\n", "line 2: exactly one of"),
    (f"{HEADER}\nISIC_1,0,x,0,0,0,0,0,0,1\n", "line 2: exactly one of"),
    (f"{HEADER}\nISIC_1,0,1\n", "line 2 has 3 fields"),
    (f"{HEADER}\n{ROW.replace('ISIC_1', '../../x')}\n", "'../../x' is no image id"),
    (f"{HEADER}\n{ROW.replace('ISIC_1', '/x')}\n", "'/x' is no image id"),
    (f"{HEADER}\n{ROW}\n{ROW.replace('0,1', '1,0', 1)}\n", "line 3: ISIC_1 is mel here and nv before"),
    ("", "has the columns none"), ("\0", "NUL")])
def test_a_wrong_table_is_one_line_with_file_and_reason(root, text, words):
    (root / TRUTH).write_text(text)
    told = refusal(root)
    assert words in told and TRUTH in told


def test_two_lesions_of_an_image_and_an_image_of_two_splits_are_refused(root):
    isic(root)
    with open(root / META, "a") as file:
        file.write("ISIC_0000004,55,,BCN_9,female\n")
    assert f"{META}: line 242: ISIC_0000004 is of lesion BCN_9 here and of BCN_0000001 before" in refusal(root)
    (root / META).unlink()
    (root / "ISIC_2019_Test_GroundTruth.csv").write_text(truth(names(3)))
    assert "is in train and in test" in refusal(root)


def test_missing_images_are_counted_and_named(root):
    isic(root)
    for name in ("ISIC_0000003_downsampled", "ISIC_0000005"):
        (root / "ISIC_2019_Training_Input" / f"{name}.jpg").unlink()
    told = refusal(root)
    assert "2 of 240 train images are missing, first: ISIC_0000003_downsampled.jpg" in told and "--skip-bad" in told
    assert sum(sizes(load(root, skip_bad=True))) == 238
    shutil.rmtree(root / "ISIC_2019_Training_Input")
    assert "a table, but none of its images" in refusal(root)


def test_a_missing_or_wrong_folder_is_told_what_is_expected_and_where_to_get_it(root):
    for told in (refusal(root / "none"), refusal(root)):
        assert str(root) in told
        for words in (TRUTH, META, "ISIC_2019_Training_Input", "challenge.isic-archive.com/data", "CC BY-NC 4.0"):
            assert words in told
    isic(root / "a" / "b")
    assert f"did you mean {root / 'a' / 'b'}?" in refusal(root)


# ------------------------------------------------------------------------------------------------ the real tables
@pytest.fixture(scope="module")
def real():
    return isic2019._read([FULL / TRUTH, FULL / META], FULL, [])


@needs(FULL)
def test_the_full_tables_have_the_known_counts(real):
    assert len(real) == 25331 and sum(name.endswith("_downsampled") for name in real) == 2074
    count = Counter(isic2019.CLASSES[row.label] for row in real.values())
    assert count == dict(nv=12875, mel=4522, bcc=3323, bkl=2624, ak=867, scc=628, vasc=253, df=239)
    lesions = Counter(row.lesion for row in real.values() if row.lesion)
    assert len(lesions) == 11847 and max(lesions.values()) == 31 and sum(n > 1 for n in lesions.values()) == 5059
    assert Counter((row.lesion or "    ")[:4] for row in real.values()) == {"BCN_": 12413, "HAM_": 10015, "MSK4": 819, "    ": 2084}
    assert [sum(not row.source.get(name) for row in real.values()) for name in ("age", "sex", "site")] == [437, 384, 2631]
    assert len({(row.lesion, row.label) for row in real.values() if row.lesion}) == 11847


@needs(FULL)
def test_the_images_of_ham10000_are_those_of_its_numbers_with_the_same_lesions(real):
    ham = ham10000._read([FULL / "HAM10000_metadata.csv"], FULL, [])
    assert set(ham) == {name for name in real if name[5:].isdigit() and int(name[5:]) in isic2019.HAM10000} and len(ham) == 10015
    assert all(real[name].lesion == row.lesion for name, row in ham.items())
    assert Counter(isic2019.CLASSES[real[name].label] for name, row in ham.items() if ham10000.CLASSES[row.label] == "akiec") == dict(ak=130, scc=197)


@needs(FULL)
def test_the_full_table_is_split_by_lesion(real):
    sides = splits.group_split([row.label for row in real.values()], [row.lesion or name for name, row in real.items()])
    of = {part: {row.lesion or name for (name, row), side in zip(real.items(), sides) if side == part} for part in splits.SPLITS}
    assert not of["train"] & of["test"] and not of["val"] & (of["train"] | of["test"]) and sum(map(len, of.values())) == 11847 + 2084
    assert .28 < sides.count("test") / len(sides) < .32


@needs(SMALL)
def test_the_real_images_load():
    found = load(SMALL)
    assert sum(sizes(found)) == 5984 and apart(found) and noted(found, "5,984 training images are HAM10000's")
    count = np.bincount(np.concatenate([s.labels for s in (found.train, found.val, found.test)]))
    assert dict(zip(found.classes, count)) == dict(nv=4323, bkl=583, mel=491, bcc=264, ak=69, scc=114, vasc=80, df=60)
