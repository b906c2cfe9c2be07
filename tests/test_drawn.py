"""common/drawn.py: what drawn images are worth, against double loops and features made by hand."""
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common import drawn, plots
from common.resnet import ResNet
from data.types import DataSet, Split

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def pictures(n, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, 3, size, size), np.uint8), np.arange(n) % 3, [f"picture-{i}" for i in range(n)])


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_the_nearest_training_image_is_that_of_a_double_loop(chunk):
    rng = np.random.default_rng(0)
    some, among = (rng.integers(0, 256, (n, 1, 4, 4), np.uint8) for n in (5, 30))
    some[2] = among[17]
    distance, where = drawn.nearest(some, among, CPU, chunk)
    table = np.sqrt(((some[:, None].astype(float) - among[None]) ** 2).mean((2, 3, 4)))
    assert np.array_equal(where, table.argmin(1)) and np.allclose(distance, table.min(1), atol=1e-3) and where[2] == 17


def test_a_copy_of_a_training_image_is_at_distance_zero():
    among = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), np.uint8)
    distance, where = drawn.nearest(among[[7, 30]], among, CPU)
    assert distance.tolist() == [0, 0] and where.tolist() == [7, 30]


def test_rows_are_drawn_from_the_whole_split_and_are_all_of_it_where_it_is_small():
    split = pictures(40)
    rows = drawn.some_rows(split, 10, 0)
    assert len(set(rows.tolist())) == 10 and (np.diff(rows) > 0).all() and rows[-1] > 20 and not np.array_equal(rows, drawn.some_rows(split, 10, 1))
    assert drawn.some_rows(split, 99, 0).tolist() == list(range(40)) and len(drawn.some_rows(split, 0, 0)) == 0


@torch.no_grad()
def test_images_of_a_memory_map_are_measured_without_a_warning():
    resnet, images = ResNet(18, 3, 3, 8, "small").eval(), pictures(6).images
    images.flags.writeable = False                                      # as data/cache.py gives them
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn.judge(resnet, images, CPU)
            drawn.nearest(images, images, CPU)
    finally:
        torch.set_warn_always(False)


@torch.no_grad()
def test_the_judge_is_the_plain_resnet_and_its_pooled_features():
    resnet, split = ResNet(18, 3, 3, 8, "small").eval(), pictures(6)
    labels, features = drawn.judge(resnet, split.images, CPU)
    logits = resnet(torch.from_numpy(split.images).float() / 127.5 - 1)
    assert np.array_equal(labels, logits.argmax(1).numpy()) and features.shape[0] == 6
    assert torch.allclose(resnet.fc(torch.from_numpy(features).float()), logits, atol=1e-4)


@pytest.mark.parametrize("x, grey", [(-1., 0), (1., 255), (0., 128), (-3., 0), (2., 255), (1 / 127.5 - 1, 1)])
def test_images_become_bytes_as_batches_made_them_floats(x, grey):
    assert plots.to_uint8(torch.full((1, 1, 1, 1), x)).item() == grey


def test_drawn_images_are_measured_against_validation_beside_as_many_of_training(tmp_path, monkeypatch):
    """Features are told apart by their mean: drawn 0, validation 1, training 4."""
    train, val, images, spread = pictures(20), pictures(12, seed=1), pictures(8, seed=2).images, np.random.default_rng(0).normal(size=(8, 2))
    data, rows, known = DataSet(train, val, None, ["a", "b", "c"], False, 3), drawn.some_rows(val, 8, 0), {i.tobytes() for i in train.images}

    def judge(resnet, part, device):
        assert len(part) == 8 and resnet == "the resnet"
        kind = "validation" if np.array_equal(part, val.images[rows]) else "training" if {i.tobytes() for i in part} <= known else "drawn"
        return np.where(kind == "drawn", val.labels[rows], 9), spread + {"drawn": 0, "validation": 1, "training": 4}[kind]

    monkeypatch.setattr(drawn, "judge", judge)
    found = drawn.measure(images, rows, data, "the resnet", CPU, tmp_path, 0, "Drawn")
    assert found["frechet_drawn_to_validation"] == pytest.approx(2, abs=1e-6) and found["frechet_training_to_validation"] == pytest.approx(18, abs=1e-6)
    assert found["label_agreement"] == 1 and found["label_agreement_of_validation"] == 0 and found["images"] == 8
    assert found["kernel_training_to_validation"] > found["kernel_drawn_to_validation"]
    assert found["distance_of_validation"] == pytest.approx(np.median(drawn.nearest(val.images[rows], train.images, CPU)[0]))
    for name in ("drawn.png", "nearest.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100
    assert set(drawn.measure(images, rows, data, None, CPU, tmp_path, 0, "Drawn")) == {"images", "distance_to_training", "distance_of_validation"}
