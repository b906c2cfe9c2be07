"""Image files -> uint8 arrays: every mode, 8 to 16 bits, nothing decoded before it is known to be a small enough picture."""
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .types import DataError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")        # an allow-list: no format that runs programs (EPS) or holds others
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 64_000_000                                 # a 160 KB file may claim far more and fill the memory
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
FITS = ("crop", "squash")
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}                # EXIF orientation -> what undoes it


def read_image(path, size, channels, fit="crop"):
    """The picture in a file as uint8 (channels, size, size), channels 1 or 3.

    fit: "crop" the largest centred square, then resize (bilinear, antialiased); "squash" resizes without keeping the aspect.
    Upright by its EXIF orientation; the first page of several; transparent parts black. Deeper than 8 bits: 0..65535 is scaled
    to 0..255, or 0..4095 where the largest value is below 4096 (12-bit sensors), or 0..maximum above 65535; floats also from
    0..1 or 0..255. A JPEG at least four times too large is decoded at a half, a quarter or an eighth (`draft`).
    Raises DataError: one line with the file, what is wrong and the remedy.
    """
    with warnings.catch_warnings():                     # Pillow warns of bombs and bad EXIF: we refuse or read, and say so once
        warnings.simplefilter("ignore")
        return decode(follow(path), size, channels, fit)[0]


def decode(path, size, channels, fit):
    """read_image for threads, with the width and height of the picture in the file: (pixels, (width, height)). `catch_warnings` is not
    safe there, so the caller silences warnings around the whole pool."""
    try:
        with open(path, "rb") as file:
            _refuse_what_is_no_image(path, file)
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{width} x {height} pixels")
                return _array(image, size, channels, fit), (width, height)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check the file and its permissions") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image of a known kind; convert it to {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        what = str(error).split(", could")[0]
        raise DataError(f"{path}: too large ({what}), the limit is {MAX_PIXELS // 10**6} megapixels; make it smaller") from None
    except Exception as error:                          # Pillow's decoders raise a dozen classes on damaged files
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged or cut short ({what}); download or export it again") from None


def _refuse_what_is_no_image(path, file):
    head = file.read(64)
    file.seek(0)
    if not head:
        raise DataError(f"{path}: the file is empty (0 bytes); download it again")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a git-LFS pointer instead of the image; run `git lfs pull`")


def _array(image, size, channels, fit):
    """An opened PIL image -> uint8 (channels, size, size)."""
    if image.format == "JPEG":                          # leaves at least 2 x size pixels a side, so that resizing still filters
        image.draft("L" if channels == 1 and image.mode == "RGB" else None, (2 * size, 2 * size))
    image.load()
    orientation = image.getexif().get(0x0112)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    image = _eight_bits(image)                          # before the crop: how deep it is, all of its pixels say
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bits(image):
    """A PIL image without more than 8 bits a channel and without transparency (Pillow alone would clip 16 bits to white)."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0).clip(0)
        top = float(values.max())
        full = next((f for f in ((1, 255) if image.mode == "F" else ()) + (4095, 65535) if top <= f), top)
        return Image.fromarray((values * (255 / full) + .5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(image, mask=image.getchannel("A"))
        return black
    return image


def follow(path):
    """The path, or its target where git without symbolic links (Windows) has left a link as a text file that holds it."""
    try:
        if os.path.getsize(path) < 256:
            target = Path(path).parent / Path(path).read_text("utf-8")
            if target.suffix.lower() in EXTENSIONS and target.is_file():
                return target
    except (OSError, ValueError):                       # missing, or no text: whoever opens it will say so
        pass
    return path


def find_images(folder):
    """Sorted paths of the images below a folder, by extension in any case. Links are followed, loops and litter are not."""
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_cannot_list):
        seen.add(os.path.realpath(here))
        folders[:] = sorted(f for f in folders if not _litter(f) and os.path.realpath(os.path.join(here, f)) not in seen)
        found += [Path(here, f) for f in files if not _litter(f) and f.lower().endswith(EXTENSIONS)]
    return sorted(found)


def _litter(name):
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def _cannot_list(error):
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")


def read_images(paths, size, channels, fit="crop", skip_bad=False):
    """A user's own files and folders (searched at any depth) -> uint8 (N, channels, size, size), N ids, list of problems.

    An id is the path as given, or below the folder given. A file that cannot be read is a DataError, or with skip_bad a line
    in the list of problems. No image at all is always a DataError.
    """
    files = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        inside = find_images(path) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path}: a folder without images ({' '.join(EXTENSIONS)})")
        files += inside
    images, ids, problems = [], [], []
    for path in dict.fromkeys(files):
        try:
            images.append(read_image(path, size, channels, fit))
            ids.append(str(path))
        except DataError as problem:
            problems.append(str(problem))
    if problems and (not skip_bad or not images):
        raise DataError(too_many_bad(problems, len(images) + len(problems)))
    if not images:
        raise DataError("no image given: name files or folders")
    return np.stack(images), ids, problems


def too_many_bad(problems, n):
    """The line for files that cannot be read: how many, the first, the remedy."""
    if n == 1:
        return problems[0]
    return f"{len(problems)} of {n:,} images cannot be read, first: {problems[0]}; repair them, or leave them out with --skip-bad"
