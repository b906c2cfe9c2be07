"""Toy skin lesions with a known Bayes optimum: no download, any size from 28 pixels up.

A lesion has three visible attributes z ~ N(mu_class, 0.65^2 I): diameter, asymmetry and the share of its area that is
blue instead of brown. Place, rotation, skin tone, light, blur and noise are drawn apart from the class, so the exact
posterior p(class | z) bounds what anybody can do from the picture; it is stored with each image (accuracy .926 on average).

`toy_xray` are grey chests with three findings, independent of one another. Each has a visible severity z ~ N(+-1.163, 1), + where it is
present: the width of the heart, the height of the fluid in one lung, the density of a round shadow. p(finding | z) = sigmoid(logit prior +
2.326 z) exactly, whose AUROC is Phi(2.326 / sqrt 2) = .95 for each. Build, tilt, place, light, ribs, blur and noise tell nothing.
"""
import numpy as np

from .types import DataError, DataSet, Split

CLASSES = ["nevus", "dysplastic", "keratosis", "melanoma", "vascular"]      # names for the eye only: nothing here is real
PRIOR = np.array([.45, .20, .15, .10, .10])
MEAN = np.array([[-1.2, -1.0, -1.0], [-.2, 1.2, -.8], [1.2, -.6, .6], [.9, 1.3, 1.4], [-.8, .2, 1.3]])     # (class, z)
SPREAD = 0.65
SIZES = {"train": 4000, "val": 500, "test": 1000}
FINDINGS = ["Cardiomegaly", "Effusion", "Mass"]
XRAY_PRIOR = np.array([.30, .25, .20])                                      # so that .42 of the images have no finding
DISTANCE = 2.326174                                     # of the two means of z, in standard deviations: sqrt(2) times Phi's inverse of .95
NAMES = ("toy", "toy_xray")


def make(seed=0, size=32, n=None):
    """The toy data set: DataSet of `n` = {"train": N, "val": N, "test": N} RGB images of `size` x `size` pixels.

    Image i of a split depends on (seed, split, i) alone: a smaller set is the beginning of a larger one.
    Raises DataError for a size under 28, where the attributes can no longer be seen.
    """
    return _made("toy", "lesion's outline", "lesions with two or three views", _split, CLASSES, seed, size, n)


def make_xray(seed=0, size=32, n=None):
    """The toy chests: multi-label DataSet of `n` = {"train": N, "val": N, "test": N} grey images of `size` x `size` pixels.

    boxes (N, 3, 4) are where each finding is, or where it would be: one that is absent is drawn as well, but slight, and its box is that of the
    same chest with it, DISTANCE more severe. As in `make`, image i of a split depends on (seed, split, i) alone. Raises DataError for a
    size under 28.
    """
    return _made("toy_xray", "finding", "patients with two or three images", _xray_split, FINDINGS, seed, size, n)


def _made(name, thing, groups, split, classes, seed, size, n):
    """The DataSet of splits split(seed, number, n, size, part)."""
    if size < 28:
        raise DataError(f"{name}: --size {size} is too small to see a {thing}; take 28 or more")
    n = SIZES | (n or {})
    splits = {part: split(seed, number, n[part], size, part) for number, part in enumerate(SIZES)}
    notes = [f"{name}: drawn, not real; {groups} stay in one split; the Bayes optimum is known"]
    train = splits["train"]
    return DataSet(**splits, classes=list(classes), multilabel=train.labels.ndim == 2, channels=train.images.shape[1], notes=notes, name=name)


def posterior(z):
    """Exact p(class | z) by Bayes' rule: (N, 3) attributes -> (N, 5) float64 probabilities."""
    log_p = np.log(PRIOR) - ((z[:, None] - MEAN) ** 2).sum(-1) / (2 * SPREAD ** 2)
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def xray_posterior(z):
    """Exact p(finding | z) of each finding: (N, 3) severities -> (N, 3) float64, which do not sum to 1."""
    return 1 / (1 + (1 / XRAY_PRIOR - 1) * np.exp(-DISTANCE * z))


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


def _xray_split(seed, part, n, size, name):
    labels, z, build, groups, patient = [], [], [], [], 0
    while len(labels) < n:                                          # a patient: findings, severities, build, one to three images
        rng = np.random.default_rng([seed, part, 2, patient])
        label = (rng.random(3) < XRAY_PRIOR).astype(np.float32)
        views = rng.choice([1, 2, 3], p=[.85, .10, .05])
        labels += [label] * views
        z += [rng.normal(DISTANCE * (label - .5), 1)] * views
        build += [rng.random(4)] * views
        groups += [f"{name}-patient-{patient:05d}"] * views
        patient += 1
    z = np.array(z[:n])
    images, boxes = np.empty((n, 1, size, size), np.uint8), np.empty((n, 3, 4), np.float32)
    for i in range(n):
        with_all = z[i] + DISTANCE * (labels[i] == 0)                # a heart that grows does so beyond the box of a small one
        images[i], boxes[i] = draw_xray(z[i], build[i], np.random.default_rng([seed, part, 3, i]), size, with_all)
    return Split(images, np.array(labels[:n]), [f"{name}-{i:05d}" for i in range(n)], groups[:n], boxes, xray_posterior(z))


def draw_xray(z, build, rng, size, boxed=None):
    """One chest: severities (3,), build (4,) in 0..1 (side of the fluid, side and place of the shadow) -> uint8 (1, size, size) and
    the boxes (3, 4) of heart, fluid and shadow at the severities `boxed` (3,), by default z: x0, y0, x1, y1 in pixels."""
    light, contrast, blur, scale = rng.uniform(-.06, .06), rng.uniform(.85, 1.1), rng.uniform(.008, .02), rng.uniform(.95, 1.06)
    turn, (dx, dy), phase = rng.uniform(-.07, .07), rng.uniform(-.025, .025, 2), rng.uniform(0, 2 * np.pi)
    v, u = (np.mgrid[:size, :size] + .5) / size - .5                # pixel centres, in -.5..+.5 and then in those of the chest
    u, v = (((u - dx) * np.cos(turn) + (v - dy) * np.sin(turn)) / scale, ((v - dy) * np.cos(turn) - (u - dx) * np.sin(turn)) / scale)

    def soft(depth):                                                # 1 inside, 0 outside, by the distance to the edge
        return 1 / (1 + np.exp(-np.clip(depth / (.4 * blur), -50, 50)))

    def ellipse(x, y, a, b):
        return soft((1 - np.hypot((u - x) / a, (v - y) / b)) * min(a, b))
    base, sides = .31, (-.2, .2)
    lungs = [ellipse(x, .02, .155, .38) * soft(base - v) for x in sides]
    x, y, radius = sides[int(build[1] < .5)] + .06 * (build[2] - .5), -.17 + .13 * (build[3] - .5), rng.uniform(.07, .085)
    shadow = ellipse(x, y, radius, radius)

    def grown(z):                                                   # heart and fluid, whose severity is their size
        return ellipse(.035, .11, max(.06, .15 + .026 * z[0]), .165), lungs[int(build[0] < .5)] * soft(v - base + max(0., .12 + .045 * z[1]))
    heart, fluid = grown(z)

    image = .10 + .48 * ellipse(0, .08, .47, .56)                   # dark air, then the body, the lungs in it, ribs, heart, fluid, shadow
    for lung in lungs:
        image = image + (.24 + .03 * np.sin(44 * v + 12 * np.abs(u) + phase) - image) * lung
    image = image + (.66 - image) * heart
    image = image + (.80 - image) * fluid
    image = image + (.95 - image) * shadow * np.clip(.33 + .12 * z[2], 0, 1)
    image = (image - .5) * contrast + .5 + light + rng.normal(0, rng.uniform(.01, .025), image.shape)
    boxes = np.empty((3, 4), np.float32)
    for k, mask in enumerate((*grown(z if boxed is None else boxed), shadow)):
        inside = mask > .5 * mask.max()
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        boxes[k] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return (image.clip(0, 1) * 255 + .5).astype(np.uint8)[None], boxes
