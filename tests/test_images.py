"""Every kind of picture file becomes uint8 (C, size, size), or one line that names the file and the remedy."""
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import DataError, read_images
from data.images import MAX_PIXELS, find_images, read_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 20, 3), np.uint8)
GREY = RNG.integers(0, 256, (20, 20), np.uint8)


def save(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def refusal(path, **options):
    with pytest.raises(DataError) as caught:
        read_image(path, 16, 3, **options)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and ";" in line          # the file, one line, a remedy
    return line


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_gives_the_grey_or_rgb_picture(tmp_path, mode, channels):
    if mode in ("I", "I;16", "F"):
        picture = Image.fromarray({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode](GREY) * 257)
        expected = Image.fromarray(GREY)
    else:
        picture = Image.fromarray(RGB).convert(mode)
        expected = picture
    path = tmp_path / "a.tif"
    picture.save(path)
    found = read_image(path, 20, channels)
    wanted = np.asarray(expected.convert("L" if channels == 1 else "RGB"))
    assert found.shape == (channels, 20, 20) and found.dtype == np.uint8
    assert np.abs(found.transpose(1, 2, 0).astype(int) - wanted.reshape(20, 20, channels)).max() <= 1


def test_16_bits_are_scaled_and_not_clipped_to_white(tmp_path):
    deep = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        found = read_image(save(tmp_path / name, deep), 20, 1)[0]
        assert np.abs(found - deep / 257).max() <= .5


def test_12_bits_use_the_whole_range(tmp_path):
    deep = np.linspace(0, 4095, 400).reshape(20, 20).astype(np.uint16)
    found = read_image(save(tmp_path / "a.png", deep), 20, 1)[0]
    assert found.min() == 0 and found.max() == 255


def test_how_deep_a_picture_is_its_whole_area_says_and_not_the_crop(tmp_path):
    deep = np.full((20, 40), 1000, np.uint16)
    deep[0, 0] = 60000                                                  # in the part that is cut off
    assert (read_image(save(tmp_path / "a.png", deep), 20, 1) == 4).all()


def test_floats_from_0_to_1_use_the_whole_range_and_nan_is_black(tmp_path):
    values = np.linspace(0, 1, 400).reshape(20, 20).astype(np.float32)
    values[3, 3] = np.nan
    found = read_image(save(tmp_path / "a.tif", values), 20, 1)[0]
    assert found.max() == 255 and found[3, 3] == 0


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "PA"])
def test_transparent_parts_are_black_whatever_colour_hides_there(tmp_path, mode):
    picture = Image.new("RGBA", (20, 20), (200, 200, 200, 255))
    picture.paste((255, 255, 255, 0), (0, 0, 10, 20))
    if mode == "P":
        indices = np.zeros((20, 20), np.uint8)
        indices[:, 10:] = 1
        picture = Image.fromarray(indices).convert("P")
        picture.putpalette([255, 255, 255, 200, 200, 200])
        path = save(tmp_path / "a.png", picture, transparency=0)
    else:
        path = save(tmp_path / ("a.tif" if mode == "PA" else "a.png"), picture if mode == "PA" else picture.convert(mode))
    found = read_image(path, 20, 3)
    assert (found[:, :, :10] == 0).all() and (np.abs(found[:, :, 10:].astype(int) - 200) <= 1).all()


def test_of_several_pages_the_first_is_read(tmp_path):
    path = save(tmp_path / "a.tif", GREY, save_all=True, append_images=[Image.new("L", (20, 20), 7)])
    assert np.array_equal(read_image(path, 20, 1)[0], GREY)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", RGB, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(read_image(path, 20, 3).transpose(1, 2, 0), expected)


@pytest.mark.parametrize("shape", [(30, 47), (47, 30), (31, 31)])
def test_crop_and_squash_are_pillows_own(tmp_path, shape):
    array = RNG.integers(0, 256, (*shape, 3), np.uint8)
    path, image = save(tmp_path / "a.png", array), Image.fromarray(array)
    squashed = image.resize((16, 16), Image.Resampling.BILINEAR)
    cropped = ImageOps.fit(image, (16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(read_image(path, 16, 3, "squash").transpose(1, 2, 0), np.asarray(squashed))
    found = read_image(path, 16, 3, "crop").transpose(1, 2, 0).astype(int)
    side, (h, w) = min(shape), shape
    top, left = (h - side) // 2, (w - side) // 2
    ours = Image.fromarray(array[top:top + side, left:left + side]).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(found, np.asarray(ours))
    assert np.abs(found - np.asarray(cropped)).mean() < 20                  # ImageOps.fit may stand half a pixel beside


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    v, u = np.mgrid[:600, :800] / 100
    smooth = ((np.sin(u)[..., None] * np.cos(v)[..., None] + 1) * [60, 90, 120]).astype(np.uint8)
    path = save(tmp_path / "a.jpg", smooth, quality=95)
    whole = Image.open(path).convert("RGB").crop((100, 0, 700, 600)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(read_image(path, 32, 3).transpose(1, 2, 0).astype(int) - np.asarray(whole)).mean() < 1.5


# ------------------------------------------------------------------------------------------------ refusals
def png_bomb(path, side):
    """A PNG of side x side pixels that is a few KB on disk (or merely says so: its data end early)."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    row = zlib.compress(bytes(side // 8 + 1) * 100)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
                     + chunk(b"IDAT", row) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [8001, 9600, 30000])                       # above our limit, Pillow's warning, Pillow's error
def test_a_bomb_is_refused_before_decoding_and_without_a_warning(tmp_path, side):
    assert side ** 2 > MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "too large" in refusal(png_bomb(tmp_path / "a.png", side))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, kind)
    path = tmp_path / "a.img"
    path.write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    refusal(path)


def test_files_that_are_no_images_are_named_with_the_remedy(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n")
    assert "git lfs pull" in refusal(path)
    path.write_text("hello")
    assert "not an image" in refusal(path)
    assert "no such file" in refusal(tmp_path / "none.png")
    assert "cannot be opened" in refusal(tmp_path)


def test_formats_outside_the_allow_list_are_refused(tmp_path):
    for kind in ("GIF", "EPS", "ICO"):
        assert "not an image of a known kind" in refusal(save(tmp_path / "a.png", RGB, format=kind))


def test_damaged_files_never_end_in_a_traceback(tmp_path):
    """150 mutations of small files: an array or a DataError."""
    path, refused = tmp_path / "a.png", 0
    for kind in ("JPEG", "PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(RGB).save(buffer, kind)
        for _ in range(50):
            data = bytearray(buffer.getvalue())
            for place in RNG.integers(0, len(data), 4):
                data[place] = RNG.integers(256)
            path.write_bytes(data)
            try:
                assert read_image(path, 16, 3).shape == (3, 16, 16)
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 0


def test_a_link_that_git_left_as_text_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    save(tmp_path / "real" / "a.png", RGB)
    (tmp_path / "a.png").write_text("real/a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 20, 3).transpose(1, 2, 0), RGB)


# ------------------------------------------------------------------------------------------------ a user's own paths
def test_folders_are_searched_without_litter_and_without_endless_loops(tmp_path):
    for name in ("b.PNG", "sub/a.JpG", "sub/c.tiff", ".hidden.png", "__MACOSX/x.png", ".ipynb_checkpoints/x.png", "Thumbs.db",
                 "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == ["b.PNG", "sub/a.JpG", "sub/c.tiff"]
    elsewhere = tmp_path / ".elsewhere"
    elsewhere.mkdir()
    save(elsewhere / "d.png", RGB)
    (tmp_path / "link").symlink_to(elsewhere)
    assert tmp_path / "link" / "d.png" in find_images(tmp_path)


def test_read_images_takes_files_and_folders_and_collects_problems(tmp_path):
    (tmp_path / "folder").mkdir()
    one, two = save(tmp_path / "one.png", RGB), save(tmp_path / "folder" / "two.png", RGB)
    images, ids, problems = read_images([one, tmp_path / "folder", one], 16, 3)
    assert images.shape == (2, 3, 16, 16) and ids == [str(one), str(two)] and problems == []
    bad = tmp_path / "folder" / "bad.png"
    bad.write_text("no")
    with pytest.raises(DataError, match="1 of 3 images.*bad.png.*--skip-bad"):
        read_images([one, tmp_path / "folder"], 16, 3)
    images, ids, problems = read_images([one, tmp_path / "folder"], 16, 3, skip_bad=True)
    assert len(images) == len(ids) == 2 and len(problems) == 1 and str(bad) in problems[0]
    with pytest.raises(DataError, match="bad.png"):
        read_images(str(bad), 16, 3, skip_bad=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="without images"):
        read_images([tmp_path / "empty"], 16, 3)
