"""Toy skin lesions with a known Bayes optimum: no download, any size from 28 pixels up.

A lesion has three visible attributes z ~ N(mu_class, 0.65^2 I): diameter, asymmetry and the share of its area that is
blue instead of brown. Place, rotation, skin tone, light, blur and noise are drawn apart from the class, so the exact
posterior p(class | z) bounds what anybody can do from the picture; it is stored with each image (accuracy .926 on average).
"""
import numpy as np

from .types import DataError, DataSet, Split

CLASSES = ["nevus", "dysplastic", "keratosis", "melanoma", "vascular"]      # names for the eye only: nothing here is real
PRIOR = np.array([.45, .20, .15, .10, .10])
MEAN = np.array([[-1.2, -1.0, -1.0], [-.2, 1.2, -.8], [1.2, -.6, .6], [.9, 1.3, 1.4], [-.8, .2, 1.3]])     # (class, z)
SPREAD = 0.65
SIZES = {"train": 4000, "val": 500, "test": 1000}


def make(seed=0, size=32, n=None):
    """The toy data set: DataSet of `n` = {"train": N, "val": N, "test": N} RGB images of `size` x `size` pixels.

    Image i of a split depends on (seed, split, i) alone: a smaller set is the beginning of a larger one.
    Raises DataError for a size under 28, where the attributes can no longer be seen.
    """
    if size < 28:
        raise DataError(f"toy: --size {size} is too small to see a lesion's outline; take 28 or more")
    n = SIZES | (n or {})
    splits = {name: _split(seed, part, n[name], size, name) for part, name in enumerate(SIZES)}
    notes = ["toy: drawn, not real; lesions with two or three views stay in one split; the Bayes optimum is known"]
    return DataSet(**splits, classes=list(CLASSES), multilabel=False, channels=3, notes=notes, name="toy")


def posterior(z):
    """Exact p(class | z) by Bayes' rule: (N, 3) attributes -> (N, 5) float64 probabilities."""
    log_p = np.log(PRIOR) - ((z[:, None] - MEAN) ** 2).sum(-1) / (2 * SPREAD ** 2)
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _split(seed, part, n, size, name):
    labels, z, tone, groups, lesion = [], [], [], [], 0
    while len(labels) < n:                                          # a lesion: class, attributes, skin, one to three views
        rng = np.random.default_rng([seed, part, 0, lesion])
        label = rng.choice(len(PRIOR), p=PRIOR)
        views = rng.choice([1, 2, 3], p=[.85, .10, .05])
        labels += [label] * views
        z += [rng.normal(MEAN[label], SPREAD)] * views
        tone += [rng.random()] * views
        groups += [f"{name}-lesion-{lesion:05d}"] * views
        lesion += 1
    labels, z, tone = np.array(labels[:n]), np.array(z[:n]), np.array(tone[:n])
    images, boxes = np.empty((n, 3, size, size), np.uint8), np.empty((n, 4), np.float32)
    for i in range(n):
        images[i], boxes[i] = draw(z[i], tone[i], np.random.default_rng([seed, part, 1, i]), size)
    return Split(images, labels.astype(np.int64), [f"{name}-{i:05d}" for i in range(n)], groups[:n], boxes, posterior(z))


def draw(z, tone, rng, size):
    """One view of a lesion: attributes (3,), skin tone in 0..1 -> uint8 (3, size, size) and its box x0, y0, x1, y1 in pixels."""
    turn, light, slope, blur = rng.uniform(0, 2 * np.pi), rng.uniform(.85, 1.12), rng.uniform(0, 2 * np.pi), rng.uniform(.008, .03)
    radius, ragged, share = .21 + .045 * z[0], max(0., .22 + .09 * z[1]), 1 / (1 + np.exp(-z[2]))
    reach = max(0., .48 - radius * (1 + 1.2 * ragged))              # how far the centre may move with the lesion still inside
    cx, cy = .5 + np.clip(rng.uniform(-.15, .15, 2), -reach, reach)

    v, u = np.mgrid[:size, :size] / size + .5 / size                # pixel centres in 0..1
    distance, angle = np.hypot(u - cx, v - cy), np.arctan2(v - cy, u - cx) - turn
    outline = radius * (1 + ragged * (np.cos(2 * angle) + .5 * np.cos(3 * angle)))
    lesion = 1 / (1 + np.exp((distance - outline) / (.4 * blur)))   # 1 inside, 0 outside, an edge as wide as the blur

    k, phase = rng.normal(0, 14, (5, 2)), rng.uniform(0, 2 * np.pi, 5)
    texture = np.sin(u[..., None] * k[:, 0] + v[..., None] * k[:, 1] + phase).sum(-1)
    inside = lesion > .5
    threshold = np.quantile(texture[inside], 1 - share)             # so that exactly this share of the lesion is blue
    blue = (1 / (1 + np.exp((threshold - texture) / (8 * blur))))[..., None]

    skin = np.array([.93, .78, .68]) * (1 - tone) + np.array([.60, .42, .32]) * tone
    pigment = skin * np.array([.52, .40, .32]) * (1 - blue) + skin * np.array([.30, .42, .80]) * blue
    rgb = skin + (pigment - skin) * lesion[..., None]
    rgb = rgb * light * (1 + .12 * ((u - .5) * np.cos(slope) + (v - .5) * np.sin(slope)))[..., None]
    rgb = rgb + rng.normal(0, rng.uniform(.01, .03), rgb.shape)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    return (rgb.clip(0, 1) * 255 + .5).astype(np.uint8).transpose(2, 0, 1), box
