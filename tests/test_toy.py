"""The toy lesions: what is drawn, what is known of it, and that it can be seen."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import metrics
from common.resnet import ResNet
from data import Batches, DataError, toy


@pytest.fixture(scope="module")
def small():
    return toy.make(0, 32, {"train": 600, "val": 60, "test": 60})


def test_the_bayes_accuracy_of_the_attributes_is_926():
    rng = np.random.default_rng(0)
    y = rng.choice(5, 100_000, p=toy.PRIOR)
    z = rng.normal(toy.MEAN[y], toy.SPREAD)
    assert (toy.posterior(z).argmax(1) == y).mean() == pytest.approx(.926, abs=.003)


def test_the_posterior_is_bayes_rule():
    z = np.random.default_rng(1).normal(0, 1, (20, 3))
    for row, p in zip(z, toy.posterior(z)):
        density = [prior * math.prod(math.exp(-(a - m) ** 2 / (2 * .65 ** 2)) for a, m in zip(row, mean)) for prior, mean in zip(toy.PRIOR, toy.MEAN)]
        assert p == pytest.approx(np.array(density) / sum(density), rel=1e-9)


def test_an_image_depends_on_seed_split_and_number_alone(small):
    again = toy.make(0, 32, {"train": 50, "val": 60, "test": 10})
    assert (again.train.images == small.train.images[:50]).all() and again.train.groups == small.train.groups[:50]
    assert (again.test.posterior == small.test.posterior[:10]).all()
    assert (toy.make(1, 32, {"train": 50, "val": 1, "test": 1}).train.images != again.train.images).any()
    assert (small.val.images != small.test.images).any()


def test_some_lesions_have_several_views_all_in_one_split(small):
    views = np.unique(small.train.groups, return_counts=True)[1]
    assert set(views) == {1, 2, 3} and .75 < (views == 1).mean() < .95
    assert not set(small.train.groups) & (set(small.val.groups) | set(small.test.groups))
    first = {}
    for group, label, p, image in zip(small.train.groups, small.train.labels, small.train.posterior, small.train.images):
        if group in first:                                              # the same attributes in another picture
            assert first[group][0] == label and (first[group][1] == p).all() and (first[group][2] != image).any()
        first.setdefault(group, (label, p, image))


def test_the_default_sizes_and_priors_are_those_of_the_design():
    assert toy.SIZES == {"train": 4000, "val": 500, "test": 1000} and toy.PRIOR.tolist() == [.45, .2, .15, .1, .1]


@pytest.mark.parametrize("size", [28, 32, 64, 100])
def test_the_box_holds_the_lesion_at_any_size(size):
    split = toy.make(0, size, {"train": 40, "val": 1, "test": 1}).train
    assert split.images.shape == (40, 3, size, size) and split.images.dtype == np.uint8
    for image, (x0, y0, x1, y1) in zip(split.images, split.boxes.astype(int)):
        assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
        outside = np.ones((size, size), bool)
        outside[max(0, y0 - 1):y1 + 1, max(0, x0 - 1):x1 + 1] = False
        assert image.mean(0)[~outside].min() < image.mean(0)[outside].mean() - 20           # the pigment is dark
        assert image.mean(0)[outside].std() < 25                                            # and the skin even


def test_too_small_a_picture_is_refused():
    with pytest.raises(DataError, match="28 or more"):
        toy.make(0, 27)


def learnt(data, loss, augment=(), epochs=6):
    """Logits (N, K) for the test split of a plain ResNet that was trained for six epochs."""
    torch.manual_seed(0)
    net = ResNet(18, data.channels, len(data.classes), 8, "small")
    optimizer, steps = torch.optim.Adam(net.parameters(), fused=True), 0
    for epoch in range(epochs):
        batches = Batches(data.train, 64, train=True, augment=augment, start=epoch * math.ceil(len(data.train) / 64))
        for batch in batches:
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (steps + 1) / 100) * (1 + math.cos(math.pi * steps / (epochs * len(batches)))) / 2
            optimizer.zero_grad()
            loss(net(batch.x), batch.y).backward()
            optimizer.step()
            steps += 1
    net.eval()
    with torch.no_grad():
        return torch.cat([net(b.x) for b in Batches(data.test, 250)])


@pytest.mark.slow
def test_a_plain_resnet_with_many_images_comes_within_three_points_of_bayes():
    data = toy.make(0, 32, {"train": 12000, "val": 1, "test": 1000})
    yhat = learnt(data, F.cross_entropy, ("hflip", "vflip")).argmax(1).numpy()
    bayes = metrics.accuracy(data.test.labels, data.test.posterior.argmax(1))
    assert metrics.accuracy(data.test.labels, yhat) > bayes - .03


# ------------------------------------------------------------------------------------------------ toy_xray
@pytest.fixture(scope="module")
def chests():
    return toy.make_xray(0, 32, {"train": 600, "val": 60, "test": 60})


def test_the_bayes_auroc_of_each_finding_is_95(chests):
    rng = np.random.default_rng(0)
    y = rng.random((40_000, 3)) < toy.XRAY_PRIOR
    p = toy.xray_posterior(rng.normal(toy.DISTANCE * (y - .5), 1))
    assert metrics.summary(y.astype(int), p)["per_label"]["auroc"] == pytest.approx([.95] * 3, abs=.005)
    assert .5 * math.erfc(-toy.DISTANCE / 2) == pytest.approx(.95, abs=1e-6)                # Phi(d / sqrt 2)
    assert metrics.ece(y.astype(int), p) < .01
    assert metrics.auroc(chests.train.labels, chests.train.posterior) == pytest.approx(.95, abs=.02)


def test_the_posterior_of_a_finding_is_bayes_rule():
    z = np.random.default_rng(1).normal(0, 2, (20, 3))
    for row, p in zip(z, toy.xray_posterior(z)):
        for a, prior, q in zip(row, toy.XRAY_PRIOR, p):
            there, not_there = prior * math.exp(-(a - toy.DISTANCE / 2) ** 2 / 2), (1 - prior) * math.exp(-(a + toy.DISTANCE / 2) ** 2 / 2)
            assert q == pytest.approx(there / (there + not_there), rel=1e-9)


def test_the_chests_are_one_channel_with_independent_findings_of_the_stated_prevalence():
    found = toy.make_xray(0, 28)
    assert found.name == "toy_xray" and found.multilabel and found.channels == 1 and found.classes == toy.FINDINGS
    assert [len(s) for s in (found.train, found.val, found.test)] == [4000, 500, 1000]
    y = found.train.labels
    assert y.dtype == np.float32 and y.shape == (4000, 3) and set(np.unique(y)) == {0, 1}
    assert y.mean(0) == pytest.approx(toy.XRAY_PRIOR, abs=.025) and (~y.any(1)).mean() == pytest.approx(.7 * .75 * .8, abs=.03)
    assert np.abs(np.corrcoef(y.T) - np.eye(3)).max() < .06
    assert found.train.posterior.shape == (4000, 3) and found.train.boxes.shape == (4000, 3, 4)


def test_a_chest_depends_on_seed_split_and_number_alone(chests):
    again = toy.make_xray(0, 32, {"train": 50, "val": 60, "test": 10})
    assert (again.train.images == chests.train.images[:50]).all() and again.train.groups == chests.train.groups[:50]
    assert (again.test.posterior == chests.test.posterior[:10]).all() and (again.val.boxes == chests.val.boxes).all()
    assert (toy.make_xray(1, 32, {"train": 50, "val": 1, "test": 1}).train.images != again.train.images).any()
    assert (chests.val.images != chests.test.images).any()


def test_some_patients_have_several_images_all_in_one_split(chests):
    views = np.unique(chests.train.groups, return_counts=True)[1]
    assert set(views) == {1, 2, 3} and .75 < (views == 1).mean() < .95
    assert not set(chests.train.groups) & (set(chests.val.groups) | set(chests.test.groups))
    first = {}
    for group, label, p, image in zip(chests.train.groups, chests.train.labels, chests.train.posterior, chests.train.images):
        if group in first:                                              # the same severities in another picture
            assert (first[group][0] == label).all() and (first[group][1] == p).all() and (first[group][2] != image).any()
        first.setdefault(group, (label, p, image))


@pytest.mark.parametrize("size", [28, 32, 64, 100])
def test_a_finding_changes_its_box_and_little_else(size):
    z, build = np.array([-1., -1, -1]), np.array([.2, .7, .5, .5])
    draw = lambda z: toy.draw_xray(z, build, np.random.default_rng(7), size)        # noqa: E731  the same chest and noise
    image, _ = draw(z)
    for k in range(3):
        other, boxes = draw(np.where(np.arange(3) == k, 2., z))
        assert other.shape == (1, size, size) and other.dtype == np.uint8
        change = np.abs(other.astype(int) - image)[0]
        x0, y0, x1, y1 = boxes[k].astype(int)
        assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
        assert change[y0:y1, x0:x1].sum() > .85 * change.sum() and change.max() > 40
        assert (x1 - x0) * (y1 - y0) < .25 * size ** 2


def test_the_boxes_are_inside_the_picture_and_the_finding_is_brighter_than_the_lung():
    split = toy.make_xray(3, 64, {"train": 300, "val": 1, "test": 1}).train
    assert (split.boxes[..., :2] >= 0).all() and (split.boxes[..., 2:] <= 64).all() and (split.boxes[..., :2] < split.boxes[..., 2:]).all()
    inside = metrics.box_mask(split.boxes, (64, 64))                                # (300, 3, 64, 64)
    mean = (split.images * inside).sum((2, 3)) / inside.sum((2, 3))
    shadow = [mean[split.labels[:, 2] == y, 2].mean() for y in (0, 1)]
    assert shadow[1] - shadow[0] > 20 and (mean[:, 1] > mean[:, 2])[split.labels[:, 1] == 1].mean() > .9
    size = (split.boxes[..., 2:] - split.boxes[..., :2]).prod(-1)
    for k in range(3):                                                              # of an absent finding: where it would be
        assert size[split.labels[:, k] == 0, k].mean() == pytest.approx(size[split.labels[:, k] == 1, k].mean(), rel=.15)


@pytest.mark.parametrize("k", range(3))
def test_the_box_of_an_absent_finding_is_where_the_picture_would_change_if_it_came(k):
    build, rng, shares = [.3, .2, .5, .5], np.random.default_rng(0), []
    for i, z in enumerate(rng.normal(-toy.DISTANCE / 2, 1, (40, 3))):
        more = z + toy.DISTANCE * (np.arange(3) == k)
        without, boxes = toy.draw_xray(z, build, np.random.default_rng(i), 32, more)
        with_it, same = toy.draw_xray(more, build, np.random.default_rng(i), 32)
        change = np.abs(with_it[0].astype(int) - without[0])
        assert (boxes[k] == same[k]).all()
        shares.append((change * metrics.box_mask(boxes[k], change.shape)).sum() / max(change.sum(), 1))
    assert np.mean(shares) > .85


def test_too_small_a_chest_is_refused():
    with pytest.raises(DataError, match="28 or more"):
        toy.make_xray(0, 27)


@pytest.mark.slow
def test_a_plain_resnet_with_many_chests_comes_within_three_points_of_bayes():
    data = toy.make_xray(0, 32, {"train": 12000, "val": 1, "test": 1000})
    p = learnt(data, F.binary_cross_entropy_with_logits).sigmoid().numpy()
    ours, bayes = (metrics.summary(data.test.labels, q)["per_label"]["auroc"] for q in (p, data.test.posterior))
    assert all(a > b - .03 for a, b in zip(ours, bayes))
