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


@pytest.mark.slow
def test_a_plain_resnet_with_many_images_comes_within_three_points_of_bayes():
    data = toy.make(0, 32, {"train": 12000, "val": 1, "test": 1000})
    torch.manual_seed(0)
    net, epochs = ResNet(18, 3, 5, 8, "small"), 6
    optimizer, steps = torch.optim.Adam(net.parameters(), fused=True), 0
    for epoch in range(epochs):
        batches = Batches(data.train, 64, train=True, augment=("hflip", "vflip"), start=epoch * math.ceil(12000 / 64))
        for batch in batches:
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (steps + 1) / 100) * (1 + math.cos(math.pi * steps / (epochs * len(batches)))) / 2
            optimizer.zero_grad()
            F.cross_entropy(net(batch.x), batch.y).backward()
            optimizer.step()
            steps += 1
    net.eval()
    with torch.no_grad():
        yhat = torch.cat([net(b.x).argmax(1) for b in Batches(data.test, 250)]).numpy()
    bayes = metrics.accuracy(data.test.labels, data.test.posterior.argmax(1))
    assert metrics.accuracy(data.test.labels, yhat) > bayes - .03
