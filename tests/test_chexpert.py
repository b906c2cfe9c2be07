"""CheXpert in every layout met in the wild, by the paper's rule: who is taken, who is left out, who is on which side."""
import functools
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import chexpert, splits
from data.__main__ import main
from tests.loading import apart, noted, refused, sizes
from tests.test_data import Settings

HEADER = ("Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,"
          "Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices")
TOP = "CheXpert-v1.0-small"
KINDS = [("1.0", ""), ("", "1.0"), ("0.0", "1.0"), ("", "-1.0"), ("1.0", "-1.0"), ("", ""), ("0.0", "0.0"), ("1.0", "1.0"), ("1.0", "0.0")]
TAKEN = [0, 1, 1, None, None, None, None, None, 0]                              # the label that the rule gives to each of KINDS
RNG = np.random.default_rng(0)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / TOP).mkdir(parents=True)
    return tmp_path / "data" / TOP


def patient(number):
    return f"patient{number:05d}"


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (8, 9), np.uint8)).save(path)


def line(path, finding, effusion):
    return f"{path},Female,60,Frontal,AP,{finding},,,1.0,,,,,,,{effusion},,,1.0"


def make(root, numbers, part="train", table="train.csv", prefix=TOP + "/", header=HEADER, place=None):
    """Two studies and three views a patient, of which the rule looks at the first; the labels go through KINDS."""
    lines = [header]
    for number in numbers:
        for view in ("study1/view1_frontal", "study1/view2_lateral", "study2/view1_frontal"):
            kind = KINDS[number % 9] if view == chexpert.VIEW else ("", "1.0")
            lines.append(line(f"{prefix}{part}/{patient(number)}/{view}.jpg", *kind))
        image(root / (part if place is None else place) / patient(number) / f"{chexpert.VIEW}.jpg")
    root.mkdir(parents=True, exist_ok=True)
    (root / table).write_text("\n".join(lines) + "\n")
    return root


def training(root, n=90, **options):
    return make(root, range(1, n + 1), **options)                               # ten patients of each of KINDS


def official_val(root, n=18):
    return make(root, range(64541, 64541 + n), "valid", "valid.csv")


def official_test(root, n=27, **options):
    return make(root, range(64741, 64741 + n), "test", **{"table": "test_labels.csv", **options})


def load(root, **options):
    return data.load("chexpert", root, size=8, **options)


refusal = functools.partial(refused, load)


# ------------------------------------------------------------------------------------------------ the rule
def test_the_rule_takes_the_first_frontal_view_with_exactly_one_of_the_two_findings(root):
    found = load(training(root))
    assert found.classes == ["No Finding", "Pleural Effusion"] and found.channels == 1 and not found.multilabel
    assert found.train.images.shape[1:] == (1, 8, 8)
    assert sizes(found) == (24, 4, 12)                                          # of 20 patients a class: 6 test, 2 validation
    for part in (found.train, found.val, found.test):
        for name, label, group in zip(part.ids, part.labels, part.groups):
            assert name == f"{group}/study1/view1_frontal" and TAKEN[int(group[7:]) % 9] == label
    assert noted(found, "train.csv: 270 rows, 90 of them study1/view1_frontal: 20 No Finding, 20 Pleural Effusion; left out: "
                        "20 uncertain (-1), 10 with both, 20 with neither (blank is 0)")
    assert noted(found, "no official test set") and noted(found, "30 % of the patients") and not noted(found, "LEAK")


def test_the_larger_class_is_cut_to_the_smaller_without_a_seed(root):
    make(root, [n for n in range(1, 91) if n % 9 != 8])                         # ten of No Finding, twenty of Pleural Effusion
    found = load(root)
    assert sum(sizes(found)) == 20 and noted(found, "10 of each class are taken, 10 more of Pleural Effusion are left out")
    labels = np.concatenate([s.labels for s in (found.train, found.val, found.test)])
    assert list(np.bincount(labels)) == [10, 10]


@pytest.mark.parametrize("split", ["group", "paper"])
def test_patients_are_on_one_side_whatever_the_seed(root, split):
    training(root, 270)
    first = load(root, split=split)
    assert apart(first) and not noted(first, "LEAK")
    assert sizes(first) == {"group": (72, 12, 36), "paper": (96, 12, 12)}[split]
    for seed in range(1, 5):
        other = load(root, split=split, seed=seed)
        assert all(a.ids == b.ids for a, b in ((first.train, other.train), (first.val, other.val), (first.test, other.test)))


def test_the_papers_split_says_that_it_is_not_the_very_list(root):
    assert noted(load(training(root), split="paper"), "10 % of the patients of each class are test, 10 % validation, as theirs")


def test_the_authors_lists_are_taken_where_they_lie_in_root(root):
    training(root)
    taken = [n for n in range(1, 91) if TAKEN[n % 9] is not None]
    parts = {"train": taken[:28], "valid": taken[28:34], "test": taken[34:]}
    for part, numbers in parts.items():
        lines = [f"{TOP}/train/{patient(n)}/study1/view1_frontal.jpg,{TAKEN[n % 9]}.0,{1 - TAKEN[n % 9]}.0,true" for n in numbers]
        (root / f"chexpert-{part}.csv").write_text("\n".join(["Path,Pleural Effusion,No Finding,healthy_or_sick", *lines]) + "\n")
    found = load(root, split="paper")
    assert [set(s.groups) for s in (found.train, found.val, found.test)] == [set(map(patient, ns)) for ns in parts.values()]
    assert noted(found, "the authors' own lists") and all(TAKEN[int(g[7:]) % 9] == y for g, y in zip(found.test.groups, found.test.labels))
    assert sizes(load(root)) == (24, 4, 12)                                     # the other rules do not look at them
    (root / "train.csv").unlink()
    assert sizes(load(root, split="paper")) == (28, 6, 6)


def test_labels_follow_the_class_order_of_a_model(root):
    found, other = load(training(root)), load(root, classes=["Pleural Effusion", "No Finding"])
    assert np.array_equal(other.test.labels, 1 - found.test.labels)


def test_a_limit_keeps_both_classes(root):
    assert sizes(load(training(root), limit=4)) == (4, 4, 4)


# ------------------------------------------------------------------------------------------------ the official sets
def test_the_official_test_and_validation_sets_are_used_where_they_are(root):
    official_test(official_val(training(root)))
    found = load(root)
    assert sizes(found) == (40, 8, 12) and apart(found)                         # all that the rule takes: nothing carved, test as it is
    assert {int(g[7:]) for g in found.test.groups} <= set(range(64741, 64768))
    assert noted(found, "test is CheXpert's test set, validation its validation set")
    assert set(load(root, split="group").train.groups) < set(found.train.groups)


def test_without_the_validation_set_it_is_carved_by_patient(root):
    found = load(official_test(training(root)))
    assert sizes(found) == (36, 4, 12) and apart(found) and noted(found, "10 % of the training patients")


def test_without_a_test_set_valid_csv_is_left_out_and_said_so(root):
    found = load(official_val(training(root)))
    assert sizes(found) == (24, 4, 12) and noted(found, "valid.csv is left out")
    assert max(int(g[7:]) for s in (found.train, found.val, found.test) for g in s.groups) <= 90


@pytest.mark.parametrize("names", [("val_labels.csv", "val"), ("valid.csv", "valid")])
def test_a_root_with_only_the_radiologists_labels_is_for_evaluation(root, names):
    official_val(root)
    (root / "valid.csv").rename(root / names[0])
    (root / "valid").rename(root / names[1])                                    # CheXlocalize: the path says valid, the folder is val
    assert "only a test set" in refusal(root) and "`eval`" in refusal(root)
    found = load(root, test_only=True)
    assert found.train is None and found.val is None and len(found.test) == 8 and noted(found, "test set:")
    official_test(root, prefix="")
    assert load(root, test_only=True).test.groups[0] > patient(64740)           # the test set goes first


def test_a_test_table_by_study_and_without_sex_and_age_is_read(root):
    official_test(training(root))
    lines = [f"CheXpert-v1.0/test/{patient(n)}/study1,{KINDS[n % 9][0] or 0},{KINDS[n % 9][1] or 0}" for n in range(64741, 64768)]
    (root / "test_labels.csv").unlink()
    (root / "groundtruth.csv").write_text("\n".join(["Study,No Finding,Pleural Effusion", *lines]))
    assert len(load(root).test) == 12


def test_a_test_list_without_labels_is_no_test_set(root):
    training(root)
    (root / "test.csv").write_text("Path\ntest/patient64741/study1/view1_frontal.jpg\n")
    found = load(root)
    assert noted(found, "without labels") and noted(found, "split group instead")


def test_a_test_table_without_its_images_falls_back_to_the_group_split(root):
    official_test(training(root))
    shutil.rmtree(root / "test")
    found = load(root)
    assert sizes(found) == (24, 4, 12) and noted(found, "none of the images") and noted(found, "split group instead")


def test_a_patient_in_two_tables_stays_in_the_later_one(root):
    training(root)
    make(root, range(1, 28), "test", "test_labels.csv")
    found = load(root)
    assert apart(found) and len(found.test) == 12 and noted(found, "their patient or lesion is in a later split too") and not noted(found, "LEAK")


def test_evaluation_of_a_training_folder_scores_the_same_test_split(root):
    assert load(training(root), test_only=True).test.ids == load(root).test.ids


# ------------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("prefix", ["CheXpert-v1.0/", "CheXpert-v1.0-small/", "", "./", "/data/CheXpert-v1.0/", "C:\\data\\"])
def test_the_front_of_a_path_does_not_matter(root, prefix):
    plain = load(training(root))
    make(root, range(1, 91), prefix=prefix)
    if "\\" in prefix:
        (root / "train.csv").write_text(re.sub("/(?=.*jpg)", r"\\", (root / "train.csv").read_text()))
    assert load(root).test.ids == plain.test.ids


def test_the_folder_that_holds_the_set_will_do(root):
    training(root)
    assert sizes(load(root.parent)) == (24, 4, 12)
    training(root / TOP)                                                        # packed twice: the nearer table counts
    assert sizes(load(root)) == (24, 4, 12)
    shutil.copytree(root, root.parent / "CheXpert-v1.0")
    assert "which copy?" in refusal(root.parent)


def test_aimis_batches_are_one_set_from_any_of_them_and_from_above(root):
    top = root.parent
    make(top, range(1, 46), place="CheXpert-v1.0 batch 2 (train 1)")
    make(top, range(46, 91), place="CheXpert-v1.0 batch 3 (train 2)")
    batch = top / "CheXpert-v1.0 batch 1 (validate & csv)"
    batch.mkdir()
    (top / "train.csv").unlink()
    training(batch)
    shutil.rmtree(batch / "train")
    official_val(batch)
    for place in (top, batch, top / "CheXpert-v1.0 batch 3 (train 2)"):
        assert sizes(load(place)) == (24, 4, 12)


def test_other_labels_of_the_same_images_are_not_mixed_in(root):
    plain = load(training(root))
    text = (root / "train.csv").read_text()
    (root / "train_cheXbert.csv").write_text(text.replace("1.0", "0.0"))
    assert load(root).test.ids == plain.test.ids
    (root / "train.csv").unlink()
    assert "no CheXpert table here" in refusal(root)


SPELLINGS = {
    "bom": lambda s: "\ufeff" + s,
    "crlf": lambda s: s.replace("\n", "\r\n"),
    "integers": lambda s: s.replace("1.0", "1").replace("0.0", "0"),
    "blanks": lambda s: s.replace(",", " , "),
    "twice": lambda s: s + s,
    "index": lambda s: "\n".join(f"{i},{row}" if i else "," + row for i, row in enumerate(s.strip().split("\n"))),
    "other order": lambda s: "\n".join(",".join([*row.split(",")[1:], row.split(",")[0]]) for row in s.strip().split("\n")),
    "upper case": lambda s: s.replace(HEADER, HEADER.upper())}


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_table_gives_the_same_split(root, change):
    plain = load(training(root))
    (root / "train.csv").write_text(change((root / "train.csv").read_text().replace("CheXpert-v1.0-small", "CheXpert")), newline="")
    found = load(root)
    assert found.test.ids == plain.test.ids and np.array_equal(found.test.labels, plain.test.labels)


# ------------------------------------------------------------------------------------------------ what is wrong or missing
PATH = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"


@pytest.mark.parametrize("header, row, words", [
    ("Path,No Finding,Effusion", f"{PATH},,1.0", "has the columns path, no finding, effusion; needed: Path,No Finding,Pleural Effusion"),
    ("Image,No Finding,Pleural Effusion", f"{PATH},,1.0", "has the columns image, .*needed: Path"),
    ("Path,No Finding,Pleural Effusion", f"{PATH},,2.0", "line 2: pleural effusion is '2.0'; expected"),
    ("Path,No Finding,Pleural Effusion", f"{PATH},yes,", "line 2: no finding is 'yes'; expected"),
    ("Path,No Finding,Pleural Effusion", f"{PATH},1.0", "line 2 has 2 fields"),
    ("Path,No Finding,Pleural Effusion", f"{PATH},1.0,\n{PATH},,1.0", "line 3: patient00001/study1/view1_frontal has other labels"),
    ("Path,No Finding,Pleural Effusion", f"{PATH},,\n", "no row .* has one of the two findings"),
    ("Path,No Finding,Pleural Effusion", "/etc/passwd,1.0,", "line 2: '/etc/passwd' is no path of an image"),
    ("Path,No Finding,Pleural Effusion", "train/../../patient00001/study1/view1_frontal.jpg,1.0,", "is no path of an image"),
    ("Path,No Finding,Pleural Effusion", "train/patient00001/study1/..\\view1_frontal.jpg,1.0,", "is no path of an image"),
    ("Path,No Finding,Pleural Effusion", ",1.0,", "line 2: '' is no path of an image")])
def test_a_wrong_table_is_one_line_with_file_and_reason(root, header, row, words):
    (root / "train.csv").write_text(f"{header}\n{row}\n")
    told = refusal(root)
    assert re.search(words, told) and "train.csv" in told


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"Path\0,No Finding,Pleural Effusion\nx,1,0\n", b'Path,"' + b"x" * 200_000])
def test_a_damaged_table_is_one_line(root, content):
    (root / "train.csv").write_bytes(content)
    assert "train.csv" in refusal(root)


def test_a_path_reads_nothing_outside_of_root(root, tmp_path):
    training(root)
    shutil.move(root / "train" / patient(1), tmp_path / "data" / patient(1))
    (root / "train.csv").write_text((root / "train.csv").read_text().replace(f"{TOP}/train/{patient(1)}", f"{tmp_path}/data/{patient(1)}"))
    assert f"1 of 40 train images are missing, first: {patient(1)}/study1/view1_frontal.jpg" in refusal(root)


def test_a_missing_or_wrong_folder_is_told_what_is_expected_and_where_to_get_it(root):
    for told in (refusal(root / "none"), refusal(root)):
        assert str(root) in told and "train/patient00001/study1/view1_frontal.jpg" in told
        assert "stanfordmlgroup.github.io/competitions/chexpert" in told and "research only" in told
    training(root)
    assert f"did you mean {root}?" in refusal(root / "train")
    training(root.parent / "x-rays" / "inner")
    assert f"did you mean {root.parent / 'x-rays' / 'inner'}?" in refusal(root.parent / "x-rays")


def test_missing_images_are_counted_and_named(root):
    training(root)
    for number in (9, 10):                                                      # No Finding (kind 0) and Pleural Effusion (kind 1)
        (root / "train" / patient(number) / f"{chexpert.VIEW}.jpg").unlink()
    told = refusal(root)
    assert "2 of 40 train images are missing, first: patient00009/study1/view1_frontal.jpg" in told and "--skip-bad" in told
    found = load(root, skip_bad=True)
    assert sum(sizes(found)) == 38 and noted(found, "2 of 40")
    shutil.rmtree(root / "train")
    assert "none of its images" in refusal(root)


def test_the_command_prints_the_counts(root, capsys):
    assert main(["chexpert", "--root", str(training(root)), "--size", "8", "--output", str(root / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"chexpert: 1 channels, 8 pixels", out) and re.search(r"Pleural Effusion +12 +2 +6\n", out)
    assert main(["chexpert", "--root", str(root / "none")]) == 2 and "error: " in capsys.readouterr().err


def test_twenty_thousand_patients_are_split_in_the_papers_sizes(root):
    """The paper's 20,404 images out of a table of CheXpert's counts of patients, without decoding."""
    rows = [(n, KINDS[0] if n % 6 == 0 else KINDS[1] if n % 2 else KINDS[3]) for n in range(1, 64541)][:61212]
    (root / "train.csv").write_text("\n".join([HEADER, *(line(f"{TOP}/train/{patient(n)}/study1/view1_frontal.jpg", *kind) for n, kind in rows)]))
    notes = []
    kept = chexpert._even(root / "train.csv", chexpert._read(root / "train.csv", notes), notes)
    assert Counter(row.label for row in kept.values()) == {0: 10_202, 1: 10_202} and len(notes) == 2
    sides = splits.group_split([row.label for row in kept.values()], [row.patient for row in kept.values()], test=.1, val=.1)
    assert Counter(sides) == {"train": 16_324, "val": 2_040, "test": 2_040}


# ------------------------------------------------------------------------------------------------ multi-label
def cell(number, k):
    """Of patient and finding: 1, 0, -1 or blank; of a tenth of the patients everything is certain."""
    return ("1.0", "", "0.0", "-1.0" if number % 10 else "")[(number * (k + 3) + k) % 4 if k else (0 if number % 3 else 1)]


def multilabel(root, numbers=range(1, 121), part="train", table="train.csv", certain=False):
    """Three views a patient, two of them frontal, with the labels of `cell`."""
    lines = [HEADER]
    for number in numbers:
        cells = [cell(number, k) for k in range(14)]
        cells = ["0.0" if value == "-1.0" else value for value in cells] if certain else cells
        for view in ("study1/view1_frontal", "study1/view2_lateral", "study2/view1_frontal"):
            lines.append(f"{TOP}/{part}/{patient(number)}/{view}.jpg,Female,60,Frontal,AP,{','.join(cells)}")
            if not view.endswith("lateral"):                                    # laterals need not even be there
                image(root / part / patient(number) / f"{view}.jpg")
    root.mkdir(parents=True, exist_ok=True)
    (root / table).write_text("\n".join(lines) + "\n")
    return root


def truth(name, labels, uncertain):
    number = int(name[7:12])
    return [{"1.0": 1, "0.0": 0, "": 0, "-1.0": uncertain}[cell(number, chexpert.FINDINGS.index(label))] for label in labels]


@pytest.mark.parametrize("name, uncertain", [("", 0), ("-ones", 1), ("-ignore", -1)])
@pytest.mark.parametrize("labels", [chexpert.FINDINGS, chexpert.COMPETITION], ids=len)
def test_uncertain_labels_are_in_train_as_the_name_says_and_nowhere_else(root, labels, name, uncertain):
    found = data.load(f"chexpert{len(labels)}{name}", multilabel(root), size=8)
    assert found.multilabel and found.classes == labels and found.channels == 1 and apart(found)
    for split in (found.train, found.val, found.test):
        assert split.labels.dtype == np.float32 and split.labels.tolist() == [truth(i, labels, uncertain) for i in split.ids]
        assert all(i.endswith("_frontal") for i in split.ids)
    assert {-1, 0, 1} >= set(np.unique(found.train.labels)) and (found.train.labels == -1).any() == (uncertain == -1)
    assert (found.val.labels >= 0).all() and (found.test.labels >= 0).all()
    assert noted(found, "360 rows, 240 frontal views") and noted(found, f"are uncertain and taken as {'unknown' if uncertain < 0 else uncertain}, in ")
    left_out = 240 - sum(sizes(found))
    assert left_out > 0 and noted(found, f"{left_out} images of validation and test are left out, for one of their labels is uncertain")


def test_the_policies_share_their_images_and_their_test_labels(root):
    multilabel(root)
    zeros, ones, ignore = (data.load(f"chexpert5{end}", root, size=8) for end in ("", "-ones", "-ignore"))
    for other in (ones, ignore):
        assert all(a.ids == b.ids for a, b in ((zeros.train, other.train), (zeros.val, other.val), (zeros.test, other.test)))
        assert np.array_equal(zeros.test.labels, other.test.labels) and np.array_equal(zeros.val.labels, other.val.labels)
    unknown = ignore.train.labels == -1
    assert (zeros.train.labels[unknown] == 0).all() and (ones.train.labels[unknown] == 1).all()
    assert np.array_equal(zeros.train.labels[~unknown], ones.train.labels[~unknown])
    assert all(data.load("chexpert5-ignore", root, size=8, split="paper").train.ids == data.load("chexpert5", root, size=8, split=rule).train.ids
               for rule in ("group", "paper"))


def test_the_radiologists_sets_are_validation_and_test_of_several_labels_too(root):
    multilabel(multilabel(multilabel(root), range(64541, 64561), "valid", "valid.csv", certain=True), range(64741, 64761), "test", "test_labels.csv", certain=True)
    found = data.load("chexpert14-ignore", root, size=8)
    assert sizes(found) == (240, 40, 40) and apart(found) and not noted(found, "are left out") and noted(found, "test is CheXpert's test set")
    only = data.load("chexpert14-ignore", root, size=8, test_only=True, classes=chexpert.FINDINGS[::-1])
    assert only.train is None and np.array_equal(only.test.labels, found.test.labels[:, ::-1])


def test_the_masked_loss_of_mediffusion_passes_over_what_is_unknown(root):
    from mediffusion import class_loss
    found = data.load_for(Settings(data="chexpert14-ignore", root=str(multilabel(root)), size=8, labels="1", labelled_batch=4))
    batch = next(iter(data.Batches(found.train, 16, train=True))).few
    assert (batch.y == -1).any() and len(found.train.few[0]) == len(found.train)
    logits = torch.randn(batch.y.shape, generator=torch.Generator().manual_seed(0))
    known = batch.y >= 0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], batch.y[known])
    assert torch.isclose(class_loss(logits, batch.y), expected)
    assert torch.isclose(class_loss(torch.where(known, logits, 1e3), batch.y), expected)


def test_an_unknown_label_is_no_finding_to_a_draw():
    labels = np.array([[1, -1, 0], [0, -1, -1], [-1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    assert splits.rarest(labels).tolist() == [0, -1, 1, 0, -1]


@pytest.mark.parametrize("text, words", [
    ("Path,No Finding\nx,1\n", "needed: Path,Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion"),
    (f"{HEADER}\n{TOP}/train/patient00001/study1/view1_frontal.jpg,F,60,Frontal,AP" + ",2" * 14, "line 2: atelectasis is '2'; expected 1.0, 0.0, -1.0"),
    (f"{HEADER}\n{TOP}/train/patient00001/study1/view1_lateral.jpg,F,60,Lateral," + ",1" * 14, "no row is of a frontal view"),
    (f"{HEADER}\n" + "\n".join(f"{TOP}/train/patient00001/study1/view1_frontal.jpg,F,60,Frontal,AP" + f",{v}" * 14 for v in (0, 1)),
     "line 3: patient00001/study1/view1_frontal has other labels than before")])
def test_a_wrong_table_of_several_labels_is_one_line(root, text, words):
    (root / "train.csv").write_text(text)
    told = refused(functools.partial(data.load, "chexpert5"), root)
    assert words in told and "train.csv" in told
