"""Of every loader, whatever the seed: no patient or lesion on two sides unless --split paper asks for it and says so; no image lost or doubled."""
import re

import numpy as np
import pytest

import data
from tests import test_aptos2019, test_chestxray14, test_chexpert, test_folder, test_ham10000, test_isic2019, test_isic2020, test_medmnist
from tests.loading import FULL, needs, noted

SEEDS = range(5)


def chexpert(root):
    root = root / test_chexpert.TOP                     # as the archive unpacks
    return test_chexpert.training(root)


def several_findings(root):
    return test_chexpert.multilabel(root / test_chexpert.TOP, certain=True)


def aptos(root):
    test_aptos2019.kaggle(root)
    for one, other in zip(test_aptos2019.NAMES[:20], test_aptos2019.NAMES[50:70]):                  # twenty photographs are there twice
        (root / "train_images" / f"{other}.png").write_bytes((root / "train_images" / f"{one}.png").read_bytes())
    return root


def folders(root):
    test_folder.fill(root, a=30, b=30)
    test_folder.write_groups(root, [f"{c}/{i:02d}.png,{c}{i // 3}" for c in "ab" for i in range(30)])
    return root


def table_of_findings(root):
    test_folder.findings(root)
    test_folder.write_groups(root, [f"pictures/{i:02d}.png,p{i // 2}" for i in range(60)])
    return root


def medmnist(root):
    test_medmnist.write(root / "bloodmnist.npz")
    return root


# name, a root of it, images in its tables that are taken, whether its "paper" split is by image
LOADERS = {
    "HAM10000": ("ham10000", test_ham10000.kaggle, 70, True), "ISIC 2019": ("isic2019", test_isic2019.isic, 240, True),
    "ISIC 2020": ("isic2020", test_isic2020.isic, 120, True), "ChestX-ray14": ("chestxray14", test_chestxray14.nih, 120, False),
    "CheXpert": ("chexpert", chexpert, 40, False), "CheXpert, 14 findings": ("chexpert14-ignore", several_findings, 240, False),
    "APTOS": ("aptos2019", aptos, 100, True), "MedMNIST": ("bloodmnist", medmnist, 24, False), "folder": ("folder", folders, 60, True),
    "folder of findings": ("folder", table_of_findings, 60, True)}


def sides(found):
    """{group: the splits it is in}, of what is known of groups."""
    where = {}
    for part in ("train", "val", "test"):
        for group in getattr(found, part).groups or ():
            where.setdefault(group, set()).add(part)
    return where


@pytest.mark.parametrize("split", ["official", "group", "paper"])
@pytest.mark.parametrize("loader", LOADERS)
def test_no_group_is_on_two_sides_and_no_image_is_lost_or_doubled(root, loader, split):
    name, make, n, by_image = LOADERS[loader]
    make(root)
    if loader == "MedMNIST" and split == "group":
        with pytest.raises(data.DataError, match="tells of no patients"):
            data.load(name, root, size=8, split=split)
        return
    first = None
    for seed in SEEDS:
        found = data.load(name, root, size=28 if loader == "MedMNIST" else 8, split=split, seed=seed)
        parts = [getattr(found, part) for part in data.splits.SPLITS]
        ids = [i for part in parts for i in part.ids]
        dropped = sum(int(note.split()[0]) for note in found.notes if "images dropped: pixel for pixel" in note)
        taken = 20 if (loader, split) == ("ISIC 2020", "paper") else n          # as many benign images as melanomas
        assert len(set(ids)) == len(ids) == taken - dropped and all(len(part) for part in parts)
        first = first or [part.ids for part in parts]
        assert first == [part.ids for part in parts]                            # no split depends on the seed
        several = [group for group, inside in sides(found).items() if len(inside) > 1]
        if split == "paper" and by_image:
            counts = [int(m[1]) for note in found.notes if (m := re.match(r"LEAK: ([\d,]+) (test|validation) images", note))]
            assert counts and noted(found, "split paper")
            assert dropped or several                                           # of APTOS those that leak are the very pictures that are dropped
            if not dropped:
                train, val, test = (set(part.groups) for part in parts)
                leaking = sum(g in train | val for g in parts[2].groups), sum(g in train for g in parts[1].groups)
                assert counts == [k for k in leaking if k]
        else:
            assert not several and not noted(found, "LEAK") and not dropped


@needs(FULL)
def test_the_table_of_the_official_validation_set_of_isic_2018_has_the_known_counts():
    rows = test_ham10000.read(FULL / "ISIC2018_Task3_Validation_GroundTruth.csv")
    count = np.bincount([row.label for row in rows.values()], minlength=7)
    assert dict(zip(test_ham10000.NAMES, count)) == dict(mel=21, nv=123, bcc=15, akiec=8, bkl=22, df=1, vasc=3) and len(rows) == 193
    assert {row.part for row in rows.values()} == {"val"}


@needs(FULL)
def test_lesions_of_several_images_are_as_many_as_is_known():
    rows = test_ham10000.read(FULL / "HAM10000_metadata.csv")
    count = np.unique([row.lesion for row in rows.values()], return_counts=True)[1]
    assert np.bincount(count)[1:].tolist() == [5514, 1423, 490, 34, 5, 4] and (count > 1).sum() == 1956
    assert len({(row.lesion, row.label) for row in rows.values()}) == 7470      # no lesion of two kinds
    assert sum(not row.source.get("age") for row in rows.values()) == 57
