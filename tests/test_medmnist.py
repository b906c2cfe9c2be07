"""MedMNIST: every set by its name, the file of the wanted size, official splits; whatever is wrong with an archive is one line."""
import io
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError, medmnist
from data.__main__ import main
from tests.loading import noted

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "medmnist"
RETINA, PNEUMONIA = REAL / "retinamnist.npz", REAL / "pneumoniamnist_reassembled_NOT_OFFICIAL_MD5.npz"
SIZES = dict(train=12, val=5, test=7)
needs = lambda path: pytest.mark.skipif(not path.exists(), reason=f"shared/data/medmnist/{path.name} is not there")   # noqa: E731


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No set that lies in the tester's ~/.medmnist is found."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def arrays(name="bloodmnist", side=28, sizes=SIZES):
    """What a file of the set holds: noise, and labels 0, 1, ... K-1, 0, 1, ..."""
    rng, K = np.random.default_rng(0), len(medmnist.CLASSES[name])
    colour = (3,) if name in ("pathmnist", "dermamnist", "retinamnist", "bloodmnist") else ()
    found = {}
    for part, n in sizes.items():
        found[f"{part}_images"] = rng.integers(0, 256, (n, side, side, *colour), np.uint8)
        found[f"{part}_labels"] = (np.arange(n) % K).astype(np.uint8)[:, None]
        if name in medmnist.MULTILABEL:
            found[f"{part}_labels"] = rng.integers(0, 2, (n, K), np.uint8)
    return found


def write(path, name="bloodmnist", side=28, **changes):
    """Writes such a file; changes: other arrays, None for a key left out. Returns what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in (arrays(name, side) | changes).items() if value is not None}
    np.savez(path, **content)
    return content


def refusal(root, name="bloodmnist", **options):
    with pytest.raises(DataError) as caught:
        data.load(name, root, **options)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    return str(caught.value)


def parts(found):
    return {"train": found.train, "val": found.val, "test": found.test}


# ------------------------------------------------------------------------------------------------ what is loaded
@pytest.mark.parametrize("name", medmnist.CLASSES)
def test_every_set_is_known_by_its_name(tmp_path, name):
    content = write(tmp_path / f"{name}.npz", name)
    found = data.load(name, tmp_path, size=28)
    assert name in data.NAMES and found.name == name and found.classes == medmnist.CLASSES[name]
    assert found.channels == content["test_images"].reshape(7, 28, 28, -1).shape[3] and found.multilabel == (name == "chestmnist")
    for part, split in parts(found).items():
        images = content[f"{part}_images"].reshape(-1, 28, 28, found.channels).transpose(0, 3, 1, 2)
        assert split.images.dtype == np.uint8 and np.array_equal(split.images, images) and isinstance(split.images, np.memmap)
        assert split.ids == [f"{part}-{row:05d}" for row in range(SIZES[part])] and split.groups is None
        labels = content[f"{part}_labels"]
        assert np.array_equal(split.labels, labels if found.multilabel else labels[:, 0])
        assert split.labels.dtype == (np.float32 if found.multilabel else np.int64)


def test_the_sets_have_the_published_numbers_of_classes():
    numbers = {name: len(classes) for name, classes in medmnist.CLASSES.items()}
    assert numbers == dict(pathmnist=9, dermamnist=7, octmnist=4, pneumoniamnist=2, retinamnist=5, breastmnist=2, bloodmnist=8,
                           tissuemnist=8, organamnist=11, organcmnist=11, organsmnist=11, chestmnist=14)
    assert all(len(set(classes)) == len(classes) for classes in medmnist.CLASSES.values())
    sums = [md5 for known in medmnist.MD5.values() for md5 in known.split()]
    assert set(medmnist.MD5) == set(numbers) and len(set(sums)) == 48 and all(re.fullmatch("[0-9a-f]{8}", md5) for md5 in sums)


def test_28_pixels_are_padded_to_32_with_the_borders_values(tmp_path):
    content = write(tmp_path / "bloodmnist.npz")
    found = data.load("bloodmnist", tmp_path)                                   # 32 is the default
    image, original = found.test.images[3], content["test_images"][3].transpose(2, 0, 1)
    assert image.shape == (3, 32, 32) and np.array_equal(image[:, 2:-2, 2:-2], original)
    assert np.array_equal(image[:, 0, 2:-2], original[:, 0]) and np.array_equal(image[:, 2:-2, 31], original[:, :, 27])
    assert (image[:, :2, :2] == original[:, :1, :1]).all() and noted(found, "28 px padded to 32")


@pytest.mark.parametrize("side, size", [(64, 32), (28, 48), (28, 8), (64, 224)])
def test_other_sizes_are_resized_as_pillow_does_and_said_so(tmp_path, side, size):
    content = write(tmp_path / "x.npz", "octmnist", side)
    found = data.load("octmnist", tmp_path / "x.npz", size=size)
    expected = np.asarray(Image.fromarray(content["val_images"][2]).resize((size, size), Image.Resampling.BILINEAR))
    assert np.array_equal(found.val.images[2, 0], expected) and noted(found, f"resized from {side} to {size} px")


@pytest.mark.parametrize("size, side", [(28, 28), (32, 28), (64, 64), (128, 128), (224, 128), (48, 128), (512, 128)])
def test_the_file_of_the_wanted_size_is_taken_or_else_the_largest(tmp_path, size, side):
    for there in (28, 64, 128):
        write(tmp_path / f"retinamnist{'' if there == 28 else f'_{there}'}.npz", "retinamnist", there)
    found = data.load("retinamnist", tmp_path, size=size, limit=5)
    assert found.test.images.shape[2:] == (size, size) and noted(found, f"resized from {side}") == (size not in (28, 32, 64, 128))
    assert noted(found, f"retinamnist{'' if side == 28 else f'_{side}'}.npz: not the official bytes")


def test_an_archive_may_have_any_name_if_it_is_named_itself_or_is_the_only_one(tmp_path):
    write(tmp_path / "bloodmnist_copy.npz")
    assert len(data.load("bloodmnist", tmp_path / "bloodmnist_copy.npz").test) == len(data.load("bloodmnist", tmp_path).test) == 7
    write(tmp_path / "bloodmnist_other.npz")
    assert "bloodmnist_copy.npz, bloodmnist_other.npz: which one?" in refusal(tmp_path)
    write(tmp_path / "bloodmnist_64.npz", side=64)
    assert noted(data.load("bloodmnist", tmp_path), "bloodmnist_64.npz")


def test_without_root_the_folder_of_the_medmnist_package_is_looked_in_too(own_home, monkeypatch, tmp_path):
    monkeypatch.setattr(medmnist, "__file__", str(tmp_path / "data" / "medmnist.py"))
    with pytest.raises(DataError, match=r"raw/bloodmnist \(no such folder\) and .*\.medmnist \(no such folder\)"):
        data.load("bloodmnist")
    write(own_home / ".medmnist" / "bloodmnist.npz")
    assert noted(data.load("bloodmnist"), str(own_home))
    write(tmp_path / "data" / "raw" / "bloodmnist" / "bloodmnist.npz")
    assert noted(data.load("bloodmnist"), str(tmp_path / "data"))


def test_labels_may_be_a_column_or_a_row_and_of_any_whole_numbers(tmp_path):
    plain = data.load("bloodmnist", write(tmp_path / "a.npz") and tmp_path / "a.npz")
    for kind in (np.uint8, np.int64, ">i2"):
        flat = {key: value.reshape(-1).astype(kind) for key, value in arrays().items() if key.endswith("labels")}
        write(tmp_path / "b.npz", **flat)
        found = data.load("bloodmnist", tmp_path / "b.npz")
        assert all(np.array_equal(a.labels, b.labels) and b.labels.dtype == np.int64
                   for a, b in zip(parts(plain).values(), parts(found).values()))


def test_grey_and_colour_follow_the_channels_that_are_asked_for(tmp_path):
    content = write(tmp_path / "breastmnist.npz", "breastmnist")
    found = data.load("breastmnist", tmp_path, size=28, channels=3)
    assert found.channels == 3 and np.array_equal(found.test.images, np.stack([content["test_images"]] * 3, 1))
    content = write(tmp_path / "bloodmnist.npz")
    found = data.load("bloodmnist", tmp_path, size=28, channels=1)
    assert np.array_equal(found.test.images[0, 0], np.asarray(Image.fromarray(content["test_images"][0]).convert("L")))


def test_identical_pictures_are_dropped_from_train_and_counted(tmp_path):
    content = arrays()
    content["train_images"][[2, 5]] = content["test_images"][0], content["val_images"][1]
    content["val_images"][3] = content["test_images"][6]
    content["train_images"][9] = content["train_images"][8]                     # twice in train does no harm
    write(tmp_path / "bloodmnist.npz", **content)
    found = data.load("bloodmnist", tmp_path, size=28)
    assert found.train.ids == [f"train-{row:05d}" for row in range(12) if row not in (2, 5)] and len(found.test) == 7
    assert found.val.ids == [f"val-{row:05d}" for row in (0, 1, 2, 4)]
    assert noted(found, "2 train images dropped") and noted(found, "1 validation images dropped")
    for row, name in enumerate(found.train.ids):
        assert np.array_equal(found.train.images[row], content["train_images"][int(name[6:])].transpose(2, 0, 1))
        assert found.train.labels[row] == int(name[6:]) % 8


def test_a_limit_is_drawn_by_class_and_seed(tmp_path):
    write(tmp_path / "bloodmnist.npz", **arrays(sizes=dict(train=160, val=40, test=80)))
    whole, few = data.load("bloodmnist", tmp_path), [data.load("bloodmnist", tmp_path, limit=16, seed=seed) for seed in (1, 1, 2)]
    assert few[0].train.ids == few[1].train.ids != few[2].train.ids
    for part, split in parts(few[0]).items():
        assert len(split) == 16 and (np.bincount(split.labels) == 2).all()
        rows = [int(name.split("-")[1]) for name in split.ids]
        assert np.array_equal(split.images, parts(whole)[part].images[rows])
        assert np.array_equal(split.labels, parts(whole)[part].labels[rows])
    assert [len(split) for split in parts(data.load("bloodmnist", tmp_path, limit=1)).values()] == [8, 8, 8]


def test_a_limit_keeps_rare_findings_of_a_multilabel_set(tmp_path):
    labels = np.zeros((300, 14), np.uint8)
    labels[:150, 3] = 1
    labels[[7, 77], 13] = 1
    write(tmp_path / "chestmnist.npz", "chestmnist", **arrays("chestmnist", sizes={"train": 300}) | {"train_labels": labels})
    few = data.load("chestmnist", tmp_path, limit=20)
    assert len(few.train) == 20 and few.train.labels[:, 13].sum() >= 1 and 6 <= few.train.labels[:, 3].sum() <= 12


def test_for_evaluation_the_test_arrays_suffice(tmp_path):
    write(tmp_path / "bloodmnist.npz", train_images=None, train_labels=None, val_images=None, val_labels=None)
    found = data.load("bloodmnist", tmp_path, test_only=True)
    assert found.train is None and found.val is None and len(found.test) == 7
    assert "lacks train_images" in refusal(tmp_path)


def test_labels_follow_the_class_order_of_a_model(tmp_path):
    write(tmp_path / "pneumoniamnist.npz", "pneumoniamnist")
    write(tmp_path / "chestmnist.npz", "chestmnist")
    found = data.load("pneumoniamnist", tmp_path)
    other = data.load("pneumoniamnist", tmp_path, classes=["pneumonia", "x", "normal"])
    assert [found.classes[k] for k in found.test.labels] == [other.classes[k] for k in other.test.labels]
    assert "the model knows a, b" in refusal(tmp_path, "pneumoniamnist", classes=["a", "b"])
    own = medmnist.CLASSES["chestmnist"]
    turned = data.load("chestmnist", tmp_path, classes=[*own[3:], *own[:3]])
    assert np.array_equal(turned.test.labels, np.roll(data.load("chestmnist", tmp_path).test.labels, -3, 1))
    assert "the model knows" in refusal(tmp_path, "chestmnist", classes=[*own, "Fracture"])     # not looked for is not absent


def test_the_papers_split_is_the_official_one_and_groups_are_refused(tmp_path):
    write(tmp_path / "bloodmnist.npz")
    assert data.load("bloodmnist", tmp_path, split="paper").train.ids == data.load("bloodmnist", tmp_path).train.ids
    with pytest.raises(DataError, match="bloodmnist --split group: MedMNIST tells of no patients; take --split official"):
        data.load("bloodmnist", tmp_path, split="group")


def test_what_is_known_to_be_wrong_with_a_set_is_said(tmp_path):
    write(tmp_path / "dermamnist.npz", "dermamnist")
    found = data.load("dermamnist", tmp_path, fit="squash", skip_bad=True)
    assert noted(found, "LEAK") and noted(found, "no patient ids are known")


def test_the_second_load_comes_from_the_cache_and_a_changed_file_does_not(tmp_path, monkeypatch):
    path, seen, real = tmp_path / "bloodmnist.npz", [], medmnist.fitted
    monkeypatch.setattr(medmnist, "fitted", lambda *of: seen.append(1) or real(*of))
    write(path)
    first = data.load("bloodmnist", tmp_path)
    again = data.load("bloodmnist", tmp_path)
    assert len(seen) == sum(SIZES.values()) and np.array_equal(first.train.images, again.train.images)
    write(path, side=64)
    data.load("bloodmnist", tmp_path)
    assert len(seen) == 2 * sum(SIZES.values())


def test_no_array_is_ever_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(medmnist, "BLOCK", 2**18)
    monkeypatch.setattr(medmnist.cache, "ROWS", 16)
    content = write(tmp_path / "bloodmnist_64.npz", **arrays(side=64, sizes=dict(train=800, val=20, test=20)))
    tracemalloc.start()
    try:
        found = data.load("bloodmnist", tmp_path, size=64)
        assert tracemalloc.get_traced_memory()[1] < content["train_images"].nbytes / 4
    finally:
        tracemalloc.stop()
    assert np.array_equal(found.train.images, content["train_images"].transpose(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------ what is refused
WRONG = {
    "missing key": (dict(val_labels=None), r"lacks val_labels.npy, has \['train_images.npy'"),
    "pickled objects": (dict(test_labels=np.array([{}, *range(6)], object)), "test_labels holds pickled objects"),
    "float images": (dict(train_images=np.zeros((12, 28, 28, 3), np.float32)), "train_images is float32; save the pictures as"),
    "float labels": (dict(train_labels=np.zeros((12, 1))), "train_labels is float64; save whole numbers"),
    "3D pictures": (dict(train_images=np.zeros((12, 28, 28, 28), np.uint8)), r"train_images has the shape \(12, 28, 28, 28\)"),
    "a flat table": (dict(train_images=np.zeros((12, 784), np.uint8)), r"train_images has the shape \(12, 784\); exp"),
    "no square": (dict(val_images=np.zeros((5, 28, 30, 3), np.uint8)), "has the shape"),
    "too small": ({f"{part}_images": np.zeros((n, 4, 4), np.uint8) for part, n in SIZES.items()}, "8..2048 pixels"),
    "several sizes": (dict(test_images=np.zeros((7, 64, 64, 3), np.uint8)), "test_images has .*, the same in all parts"),
    "columns first": (dict(test_images=np.asfortranarray(arrays()["test_images"])), "test_images is in Fortran order"),
    "a scalar": (dict(test_images=np.uint8(1)), r"test_images has the shape \(\)"),
    "empty": (dict(val_images=np.zeros((0, 28, 28, 3), np.uint8)), "val_images holds 0 images"),
    "labels too few": (dict(test_labels=np.zeros((6, 1), np.uint8)), r"test_labels has the shape \(6, 1\); expected \(7, 1\)"),
    "labels of many": (dict(test_labels=np.zeros((7, 14), np.uint8)), r"test_labels has the shape \(7, 14\)"),
    "label too large": (dict(test_labels=np.full((7, 1), 8, np.uint8)), r"test_labels holds 8, bloodmnist has the labels 0\.\.7"),
    "label negative": (dict(test_labels=np.full(7, -1)), "test_labels holds -1"),
    "label that wraps": (dict(test_labels=np.full(7, 2**64 - 1, np.uint64)), "test_labels holds -1"),
    "one class": (dict(train_labels=np.zeros(12, np.uint8)), "train is of one class"),
    "train in test": (dict(train_images=arrays()["test_images"][[0] * 12]), "all of it in another part too")}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_an_array_that_does_not_fit_is_one_line_with_file_key_and_remedy(tmp_path, changes, words):
    write(tmp_path / "bloodmnist.npz", **changes)
    line = refusal(tmp_path / "bloodmnist.npz")
    assert re.search(words, line) and re.search("; (save|is|expected) ", line)


def test_a_multilabel_set_takes_noughts_and_ones_only(tmp_path):
    path = tmp_path / "chestmnist.npz"
    write(path, "chestmnist", val_labels=np.full((5, 14), 2, np.uint8))
    assert "val_labels holds 2, chestmnist has the labels 0..1" in refusal(path, "chestmnist")
    write(path, "chestmnist", val_labels=np.zeros((5, 1), np.uint8))
    assert "expected (5, 14)" in refusal(path, "chestmnist")


@pytest.mark.parametrize("content, words", [
    (b"", "empty (0 bytes)"), (b"nonsense", "not an .npz archive"), (b"PK\3\4nonsense", "damaged or cut short"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"PK\5\6" + bytes(18), "lacks train_images.npy, has []")])
def test_a_file_that_is_no_archive_is_told_apart(tmp_path, content, words):
    (tmp_path / "bloodmnist.npz").write_bytes(content)
    assert words in refusal(tmp_path)


def test_a_download_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "bloodmnist.npz"
    write(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "damaged or cut short" in refusal(path)


def test_a_file_that_may_not_be_read_is_told_as_such(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")
    write(tmp_path / "bloodmnist.npz")
    monkeypatch.setattr(medmnist, "open", denied, raising=False)                # chmod would not stop root
    assert "cannot be read (Permission denied); check the file and its permissions" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["train_images", "test_labels"])
def test_a_flipped_bit_is_refused_by_its_crc_and_leaves_no_cache(tmp_path, key, own_cache_folder):
    path = tmp_path / "bloodmnist.npz"
    content = write(path)
    blob = bytearray(path.read_bytes())
    blob[blob.index(content[key].tobytes()) + 3] ^= 1
    path.write_bytes(blob)
    assert re.search("damaged or cut short .*CRC", refusal(path)) and list(own_cache_folder.glob("*")) == []


@pytest.fixture
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_CLASSIFIERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def npy(array, shape=None, kind="|u1"):
    """The bytes of an .npy file whose header may lie."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape or array.shape})
    return file.getvalue() + array.tobytes()


@pytest.mark.parametrize("lie", [(12_000_000, 28, 28, 3), (13, 28, 28, 3), (2**70, 28, 28, 3), (-12, -28, 28, 3), (10**900,)])
def test_a_header_that_claims_more_than_the_archive_holds_is_refused_before_it_is_read(tmp_path, lie):
    path = tmp_path / "bloodmnist.npz"
    write(path, train_images=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_images.npy", npy(arrays()["train_images"], lie))
    assert re.search("claims|expected", refusal(path))


def test_a_bomb_is_refused_by_what_it_declares(tmp_path, monkeypatch):
    path = tmp_path / "bloodmnist.npz"
    write(path)
    monkeypatch.setattr(medmnist, "MAX_BYTES", 20_000)
    monkeypatch.setattr(medmnist, "_rows", lambda *_: pytest.fail("unpacked"))
    assert re.search("train_images claims 28,352 bytes, the limit is 20,000; download", refusal(path))
    monkeypatch.setattr(medmnist, "MAX_BYTES", 16 * 10**9)
    monkeypatch.setattr(medmnist, "MAX_IMAGES", 11)
    assert "train_images holds 12 images; expected 1..11" in refusal(path)


@pytest.mark.parametrize("offset, value", [(24, 5), (24, 10**9)])
def test_an_archive_that_lies_about_a_members_size_is_refused(tmp_path, offset, value):
    path = tmp_path / "bloodmnist.npz"
    write(path)
    blob = bytearray(path.read_bytes())
    entry = blob.rindex(b"PK\1\2")                                              # of the last member, test_labels, in the directory
    blob[entry + offset:entry + offset + 4] = value.to_bytes(4, "little")
    path.write_bytes(blob)
    assert re.search("claims|damaged", refusal(path))


def test_mutated_archives_give_a_line_or_the_right_set_and_never_a_traceback(tmp_path):
    content, rng, path = io.BytesIO(), np.random.default_rng(0), tmp_path / "bloodmnist.npz"
    np.savez_compressed(content, **arrays(side=8))
    refused = 0
    for _ in range(400):
        blob = bytearray(content.getvalue())
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(len(blob))), rng.integers(4)
            if kind == 0:
                blob[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del blob[at:at + int(rng.integers(1, 50))]
            elif kind == 2:
                blob[at:at] = rng.bytes(int(rng.integers(1, 20)))
            else:
                blob[at:at + 4] = rng.bytes(4)
        path.write_bytes(blob)
        try:
            found = data.load("bloodmnist", tmp_path, size=8)
            assert np.array_equal(found.test.images, arrays(side=8)["test_images"].transpose(0, 3, 1, 2))
        except DataError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 300


def test_another_sets_official_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "bloodmnist.npz"
    write(path)
    monkeypatch.setitem(medmnist.MD5, "pathmnist", "00000000 " + medmnist.hashlib.md5(path.read_bytes()).hexdigest()[:8])
    assert "is pathmnist, not bloodmnist; take --data pathmnist" in refusal(path)
    monkeypatch.setitem(medmnist.MD5, "bloodmnist", medmnist.MD5.pop("pathmnist"))
    assert noted(data.load("bloodmnist", path), ": the official bytes (md5 ")


def test_a_missing_file_is_told_with_the_names_that_were_looked_for(tmp_path):
    for line in (refusal(tmp_path), refusal(tmp_path / "none")):
        for words in ("bloodmnist.npz, bloodmnist_64.npz, bloodmnist_128.npz, bloodmnist_224.npz", "zenodo.org/records/10519652"):
            assert words in line
    assert "none (no such folder)" in line
    with pytest.raises(DataError, match="--data bloodminst: no such data set; known: .*bloodmnist"):
        data.load("bloodminst", tmp_path)


def test_a_cache_that_cannot_be_written_is_no_end(tmp_path, monkeypatch):
    content = write(tmp_path / "bloodmnist.npz")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFUSION_CLASSIFIERS_CACHE", str(tmp_path / "file" / "cache"))
    found = data.load("bloodmnist", tmp_path, size=28)
    assert noted(found, "held in memory") and np.array_equal(found.test.images, content["test_images"].transpose(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------ the command line, real files
def test_the_command_line_counts_classes_and_findings(tmp_path, capsys):
    write(tmp_path / "bloodmnist.npz")
    content = write(tmp_path / "chestmnist.npz", "chestmnist")
    assert main(["bloodmnist", "--root", str(tmp_path), "--output", str(tmp_path / "sheet.png")]) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert ["immature granulocyte", "2", "1", "1"] in lines and ["all", "12", "5", "7"] in lines
    assert main(["chestmnist", "--root", str(tmp_path), "--output", str(tmp_path / "sheet.png")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Hernia", *(str(content[f"{part}_labels"][:, 13].sum()) for part in SIZES)] in lines


@needs(RETINA)
def test_the_real_retinamnist_is_the_official_one(tmp_path, capsys):
    found = data.load("retinamnist", REAL)
    counts = [list(np.bincount(split.labels)) for split in parts(found).values()]
    assert counts == [[486, 128, 206, 194, 66], [54, 12, 28, 20, 6], [174, 46, 92, 68, 20]]
    assert [split.images.shape for split in parts(found).values()] == [(n, 3, 32, 32) for n in (1080, 120, 400)]
    assert noted(found, "the official bytes (md5 bd4c0672f1bba3e3a89f0e4e876791e4)") and not noted(found, "dropped")
    with np.load(RETINA, allow_pickle=False) as archive:
        assert np.array_equal(found.val.images[:, :, 2:-2, 2:-2], archive["val_images"].transpose(0, 3, 1, 2))
    assert main(["retinamnist", "--root", str(REAL), "--output", str(tmp_path / "sheet.png")]) == 0
    assert ["all", "1,080", "120", "400"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@needs(PNEUMONIA)
def test_the_real_pneumoniamnist_loses_the_train_images_that_are_held_out_too():
    with np.load(PNEUMONIA, allow_pickle=False) as archive:
        pictures = {part: [image.tobytes() for image in archive[f"{part}_images"]] for part in SIZES}
        labels = archive["train_labels"].reshape(-1)
    twice = np.array([image in {*pictures["val"], *pictures["test"]} for image in pictures["train"]])
    assert sum(image in {*pictures["train"]} for image in pictures["val"]) == 8                 # DATASETS.md
    for root in (PNEUMONIA, REAL):
        found = data.load("pneumoniamnist", root)
        assert np.array_equal(found.train.labels, labels[~twice]) and (len(found.val), len(found.test)) == (524, 624)
        assert noted(found, f"{twice.sum()} train images dropped") and noted(found, "not the official bytes (md5 2905d1da")
    assert list(np.bincount(labels)) == [1214, 3494] and [list(np.bincount(s.labels)) for s in (found.val, found.test)] == \
        [[135, 389], [234, 390]] and found.channels == 1 and found.classes == ["normal", "pneumonia"]
