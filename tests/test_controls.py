"""The controls of tests/claims.py learn, and what is said of two cells' difference is right."""
import re
import importlib
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

import diffclassifier
import diffmic
import mediffusion
import symmflow
from common import metrics
from data import load_for
from tests import claims, controls
from tests.controls import Control, fixmatch_loss, measured

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**given):
    return mediffusion.configure(**dict(data="toy", size=28, width=8, limit=160, labels="1", device="cpu", seed=0) | given)


def test_a_plain_resnet_learns_and_the_mean_of_two_is_recorded_beside_each():
    result, (ids, labels, p) = measured(config(), Control(epochs=9, members=2, batch_size=16, checks=3))
    assert result["test"]["accuracy"] > result["baselines"]["majority"]["accuracy"] + .1
    assert {"member 1", "member 2", "one view", "not picked"} <= set(result["baselines"]) and result["members"] == len(result["selected"]) == 2
    assert result["params"] == 2 * (result["params"] // 2) and result["ms_an_image"] > 0 and result["labelled"] == 160
    assert p.shape == (160, 5) and len(ids) == len(labels) == 160 and np.allclose(p.sum(1), 1)
    assert result["test"]["accuracy"] == pytest.approx((p.argmax(1) == labels).mean())


@pytest.mark.parametrize("select", ["auroc", "nll"])
def test_the_control_is_the_one_that_validation_picked(select, monkeypatch):
    """The AUROC falls, or the NLL rises, from the first check on: its weights are kept."""
    data = load_for(config(labels="1"))
    picked = []
    monkeypatch.setattr(controls.running, "validation", lambda split, p, method: {"val_" + select: len(picked) * (1 if select == "nll" else -1) if picked.append(0) is None else 0})
    _, at, last = controls.member(data, np.arange(len(data.train)), config(), Control(epochs=4, batch_size=16, checks=4, select=select), torch.device("cpu"), 0)
    assert at == .25 and len(picked) == 4


def test_a_control_is_as_sure_as_validation_allows():
    """Answers that are right nine times of ten and claim more, become .9; order and sums stay; of several labels alike."""
    y = np.arange(1000) % 2
    p = np.where(np.eye(2)[np.where(np.arange(1000) % 10 == 0, 1 - y, y)] > 0, .999, .001)
    assert np.allclose(controls.sharpened(p, y, p).max(1), .9, atol=1e-3) and np.allclose(controls.sharpened(p, y, p).sum(1), 1)
    assert np.allclose(controls.sharpened(p, np.eye(2)[y], p).max(1), .9, atol=1e-3)


def test_a_control_says_the_same_of_an_image_and_of_its_mirror_images():
    split, net = load_for(config()).val.take(np.arange(8)), controls.ResNet(18, 3, 5, 8, "small")
    of = lambda flip, augment: controls.probabilities(net, replace(split, images=np.flip(split.images, flip).copy()), torch.device("cpu"), augment)
    both = (of((), "") + of(3, "")) / 2
    assert np.allclose(of((), "hflip,rotate"), both, atol=1e-6) and np.allclose(of(3, "hflip"), both, atol=1e-6) and not np.allclose(of((), ""), both, atol=1e-4)


@pytest.mark.parametrize("multilabel", [False, True])
def test_fixmatch_is_its_two_equations(multilabel):
    """On a network that answers what it is given, against a loop over the images."""
    rng = np.random.default_rng(0)
    x, few = torch.rand(6, 1, 8, 8), torch.rand(3, 1, 8, 8)
    logits = torch.from_numpy(4 * rng.standard_normal((15, 3))).float()
    y = torch.from_numpy(rng.integers(0, 2, (3, 3))).float() if multilabel else torch.tensor([0, 2, 1])
    part = lambda x, y: type("Part", (), dict(x=x, y=y))()
    batch = part(x, torch.zeros(6, 3) if multilabel else torch.zeros(6, dtype=torch.long))
    batch.few = part(few, y)
    found = fixmatch_loss(lambda seen: logits, batch, Control(1, sure=.8, weight=2.), torch.Generator().manual_seed(0))
    want = controls.class_loss(logits[:3], y)
    for weak, changed in zip(logits[3:9], logits[9:]):
        if multilabel:
            for a, b in zip(weak.sigmoid(), changed.sigmoid()):
                if max(a, 1 - a) >= .8:
                    want = want - 2. / 18 * torch.log(b if a > .5 else 1 - b)
        elif weak.softmax(0).max() >= .8:
            want = want - 2. / 6 * changed.log_softmax(0)[weak.argmax()]
    assert found.item() == pytest.approx(want.item(), rel=1e-4)


def test_fixmatch_learns_from_few_labels():
    result, _ = measured(config(labels="0.3", limit=160), Control(epochs=25, fixmatch=True, batch_size=16, ratio=1, checks=4))
    assert result["method"] == "fixmatch" and result["labelled"] < 60
    assert result["test"]["auroc"] > .65


# ----------------------------------------------------------------------------- differences
def answers(rng, n, skill, seeds=3, ids=None):
    found, labels = {}, rng.integers(0, 3, n)
    for seed in range(seeds):
        p = rng.dirichlet(np.ones(3), n)
        p[np.arange(n), labels] += skill
        found[seed] = np.array(ids or [f"image {i}" for i in range(n)]), labels, p / p.sum(1, keepdims=True)
    return found


def test_a_difference_is_the_mean_over_seeds_on_the_images_that_both_answered():
    rng = np.random.default_rng(0)
    one = answers(rng, 60, .5)
    other = {seed: (ids[::-1][:40], labels[::-1][:40], p[::-1][:40] * 0 + [1, 0, 0]) for seed, (ids, labels, p) in one.items()}
    found = claims.difference(one, other, claims.SCORES["accuracy"], n=50)
    want = [(p[20:].argmax(1) == labels[20:]).mean() - (labels[20:] == 0).mean() for _, labels, p in one.values()]
    assert found["by_seed"] == pytest.approx(want) and found["mean"] == pytest.approx(np.mean(want)) and found["images"] == 40
    assert found["sd"] == pytest.approx(np.std(want, ddof=1)) and found["low"] < found["mean"] < found["high"]
    with pytest.raises(ValueError, match="other labels"):
        claims.difference(one, {0: (one[0][0], (one[0][1] + 1) % 3, one[0][2])}, claims.SCORES["accuracy"])


def test_the_interval_covers_the_difference_about_as_often_as_it_says():
    """Two models of known accuracy, .6 and .5, on other images each time."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        ids, labels, right = np.arange(80), np.zeros(80, int), rng.random((2, 80)) < np.array([[.6], [.5]])
        one, other = ({0: (ids, labels, np.stack([r, ~r], 1).astype(float))} for r in right)
        found = claims.difference(one, other, claims.SCORES["accuracy"], n=200)
        inside += found["low"] <= .1 <= found["high"]
    assert .89 <= inside / 200 <= .99


@pytest.mark.parametrize("low, high, bold", [(.01, .03, True), (-.01, .03, False), (-.03, -.01, True)])
def test_an_interval_without_zero_is_bold(low, high, bold):
    assert claims.interval(dict(mean=.01, low=low, high=high, by_seed=[0, 0, 0])).startswith("**") == bold
    assert claims.interval(dict(mean=.01, low=low, high=high, by_seed=[0])).endswith("(1 seed)" + "**" * bold)


def test_the_parts_of_a_method_have_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    test = dict.fromkeys(("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "aurc"), .5)
    for seed, found in list(answers(np.random.default_rng(7), 50, .5).items())[:2]:
        claims.write("diffmic-retinamnist", seed, dict(test=test, baselines=dict(guide=dict(test, f1_macro=.6)), seconds=10. + seed, params=1000, ms_an_image=2.), found)
    whole, guide = claims.side_table("retinamnist").splitlines()[2:]
    assert whole.startswith("| DiffMIC (2 seeds) |") and "0.600 ± 0.000" in guide and guide.startswith("| DiffMIC: its guide alone (2 seeds) |") and whole.count("|") == guide.count("|")


def test_the_tables_are_made_from_records(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    test = dict.fromkeys(("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "aurc"), .5)
    for name, skill in (("resnet", .1), ("diffmic", .7), ("diffmic", 0.)):
        cell = f"{name}-retinamnist" + "-paper" * (skill == 0)
        for seed, found in answers(np.random.default_rng(7), 50, skill).items():
            claims.write(cell, seed, dict(test=test, seconds=10., params=1000, ms_an_image=2.), found)
    claims.differences()
    aurc = {cell: [metrics.aurc(p.argmax(1) == y, 1 - p.max(1)) for _, y, p in claims.said(cell).values()] for cell in ("resnet-retinamnist", "diffmic-retinamnist", "diffmic-retinamnist-paper")}
    ranked = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in aurc.values()]              # by the largest p, whatever uncertainty the record has
    assert claims.side_table("retinamnist").splitlines()[2:] == [
        f"| {name} | {' | '.join(['0.500 ± 0.000'] * 5)} | {v} | 10 | 2.0 | 1,000 |" for name, v in zip(("ResNet-18", "DiffMIC", "DiffMIC, recipe paper"), ranked)]
    first = claims.differences_table("retinamnist")
    assert "DiffMIC | **+" in first and first.count("**+") >= 4
    one, two = (line for line in claims.sentences().splitlines() if not line.endswith(": not measured yet."))
    assert f"- Mediffusion {claims.RESNET}, in AUROC: not measured yet." in claims.sentences()
    assert re.fullmatch(rf"- DiffMIC {claims.RESNET}, in macro F1: RetinaMNIST \+0\.\d+ \[\+0\.\d+, \+0\.\d+\]: holds\.", one) and "itself with recipe paper" in two
    assert claims.sentences(["DiffMIC"], [claims.PLUS]) == two
    row, = claims.verdicts_table().splitlines()[2:]
    assert re.fullmatch(r"\| DiffMIC \| macro F1 \| \*\*\+.+\*\* \| not claimed \| \*\*\+.+\*\* \|", row)
    rows = claims.all_sides_table().splitlines()
    assert rows[2] == "| ResNet-18 | 0.500 | 0.500 | 10 | 2.0 |" and {row.count("|") for row in rows} == {6}
    assert "| ResNet-18 | RetinaMNIST | accuracy 0.524, AUROC 0.717 | 0.500, 0.500 |  |" in claims.papers_table()
    for share in claims.SHARES:
        for name in claims.ARMS.values():
            for seed in range(2):
                claims.write(f"{name}-pneumoniamnist-{share}", seed, dict(test=dict(auroc=.8 + .1 * seed)))
    assert claims.shares_table().splitlines()[3] == "| PneumoniaMNIST, 5% " + "| 0.850 ± 0.071 " * 4 + "|"
    claims.write("diffclassifier-retinamnist", 0, dict(test=test, levels=dict(validation_by_votes=[dict(votes=n, majority=.5, mean=.5, elbo=.5, learned=.6) for n in (1, 501)])))
    claims.curves()
    assert {path.name for path in tmp_path.glob("*.png")} == {"retinamnist-coverage.png", "labels.png", "levels.png"}
    assert claims.by_votes_table("diffclassifier-retinamnist").splitlines()[3] == "| 501 | 0.500 | 0.500 | 0.500 | 0.600 |"


@pytest.mark.parametrize("low, high, said", [(.01, .03, "holds"), (-.03, -.01, "does not"), (-.01, .01, "cannot be told")])
def test_a_verdict_is_what_the_interval_says(low, high, said):
    assert claims.verdict(dict(low=low, high=high)) == said


def test_in_every_score_more_is_better():
    """A model that is right and sure where another is wrong, and unsure where both are."""
    y, sure, doubt = np.arange(300) % 3, np.eye(3), np.full((3, 3), .3) + .1 * np.roll(np.eye(3), 1, 1)
    good = np.concatenate([.8 * sure[y[:270]] + .2 / 3, doubt[y[270:]]])
    bad = np.concatenate([doubt[y[:60]], .6 * sure[y[60:270]] + .4 / 3, (.98 * np.roll(sure, 1, 1) + .02 / 3)[y[270:]]])
    for name, score in claims.SCORES.items():
        assert score(y, good) > score(y, bad), name


def test_the_interval_knows_of_other_seeds_and_of_seeds_with_other_images():
    rng = np.random.default_rng(0)
    ids, labels = np.array([f"image {i:03}" for i in range(400)]), np.zeros(400, int)
    of = lambda share, part: (ids[part], labels[part], np.stack([r := (rng.random(400) < share)[part], ~r], 1).astype(float))
    here = [rng.permutation(400)[:300] for _ in range(2)]
    found = claims.difference({s: of((.9, .5)[s], part) for s, part in enumerate(here)}, {s: of((.5, .9)[s], part) for s, part in enumerate(here)}, claims.SCORES["accuracy"])
    assert found["low"] < -.3 and found["high"] > .3 and abs(found["mean"]) < .1 and found["images"] == 300
    steady = claims.difference({s: of(.9, part) for s, part in enumerate(here)}, {s: of(.5, part) for s, part in enumerate(here)}, claims.SCORES["accuracy"])
    assert .3 < steady["low"] < .4 < steady["high"] < .5


def test_every_claim_names_cells_that_there_are_and_a_place():
    for method, rows in claims.CLAIMS.items():
        for words, score, ones, others in rows:
            assert score in claims.SCORES and len(ones) == len(others) and words.startswith(("is ", "tells "))
            for one, other in zip(ones, others):
                assert claims.CELLS[one][2] == claims.CELLS[other.removesuffix("/shares")][2] == (0, 1, 2) and claims.place(one)


def test_the_command_of_every_cell_says_its_settings(monkeypatch):
    """Read as a shell and the method's command line read it, it gives the settings again."""
    seen = []
    for module in (diffmic, symmflow, diffclassifier, mediffusion):
        monkeypatch.setattr(module, "train", lambda config, *rest, **more: seen.append(config))
    for name, (method, settings, _) in claims.CELLS.items():
        if method in ("resnet", "fixmatch"):
            continue
        module = importlib.import_module(method)
        for command in claims.command(name, 1).split(" && "):
            words = shlex.split(command)
            assert words[:2] == ["python", f"{method}.py"] and module.main(words[2:]) == 0
        given = settings | dict(seed=1) | (dict(init="FIRST/best.pt") if "init" in settings else {})
        assert seen[-1] == module.configure(**given), name
