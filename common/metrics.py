"""Metrics of classification, calibration and selective prediction: numpy in, a Python float out, float64 inside.

    single-label   y (N,) of 0..K-1    yhat (N,)          p or score (N, K)
    binary         y (N,) of 0, 1      yhat (N,)          p or score (N,), that of class 1
    multi-label    y (N, K) of 0, 1    yhat (N, K)        p or score (N, K), K separate yes/no questions

Multi-label values are the mean over the labels for which the metric is defined. What is undefined (the AUROC of one class)
is nan, never 0, never an exception or a warning; bad input is a ValueError that names the argument.
Values agree with scikit-learn 1.9 to 1e-9 where it defines them, but for two choices: average precision of one class is nan
(there 0 or 1), and quadratic kappa takes grades 0, 1, 4 as they are, 4 apart (there 0, 1, 2 unless labels= is given).
"""
import numpy as np


# ------------------------------------------------------------------------------------------------ input
def _array(name, a, integer=False, low=-np.inf, high=np.inf):
    a = np.asarray(a)
    if a.ndim not in (1, 2) or a.size == 0 or a.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be a non-empty array of numbers, (N,) or (N, K), not {a.dtype} {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError(f"{name} holds NaN or infinity, {np.sum(~np.isfinite(a))} times")
    if integer and a.dtype.kind == "f" and np.any(a != np.floor(a)):
        raise ValueError(f"{name} must hold integer labels")
    if a.min() < low or a.max() > high:
        raise ValueError(f"{name} must lie in {low:.3g}..{high:.3g}, it runs from {float(a.min()):g} to {float(a.max()):g}")
    return a.astype(np.int64 if integer else np.float64)


def _labels(y, yhat):
    if np.shape(y) != np.shape(yhat):
        raise ValueError(f"yhat has shape {np.shape(yhat)}, y has {np.shape(y)}: one prediction a label")
    limits = (0, 1) if np.ndim(y) == 2 else (-np.inf, np.inf)
    return _array("y", y, True, *limits), _array("yhat", yhat, True, *limits)


def _scores(y, score, names=("y", "score")):
    score = _array(names[1], score)
    if np.shape(y) not in (score.shape, score.shape[:1]):
        raise ValueError(f"{names[1]} has shape {score.shape}, {names[0]} has {np.shape(y)}: one row a sample in both")
    return _array(names[0], y, True, 0, 1 if np.ndim(y) == score.ndim else score.shape[1] - 1), score


def _probabilities(y, p):
    y, p = _scores(y, _array("p", p, low=-1e-6, high=1 + 1e-6), ("y", "p"))          # room for the rounding of float32
    if y.ndim < p.ndim and np.abs(p.sum(1) - 1).max() > 0.01:                    # and of bfloat16
        raise ValueError(f"p must sum to 1 over the classes, row {np.abs(p.sum(1) - 1).argmax()} does not")
    return y, p.clip(0, 1)


def _mean(values):
    """Mean of the defined values; nan, without numpy's warning, if there is none."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _over_labels(metric, a, b):
    return _mean([metric(a[:, k], b[:, k]) for k in range(a.shape[1])])


# --------------------------------------------------------------------------------------- hard decisions
def accuracy(y, yhat):
    """Share of right answers."""
    y, yhat = _labels(y, yhat)
    return float(np.mean(y == yhat))


def balanced_accuracy(y, yhat):
    """Mean recall of the classes that occur in y."""
    y, yhat = _labels(y, yhat)
    if y.ndim == 2:
        return _over_labels(balanced_accuracy, y, yhat)
    _, code, count = np.unique(y, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(code, weights=y == yhat) / count))


def f1_macro(y, yhat):
    """Mean F1 = 2 TP / (2 TP + FP + FN) of the classes that occur in y or yhat; multi-label: of class 1 of each label."""
    y, yhat = _labels(y, yhat)
    classes = np.union1d(y, yhat)
    y, yhat = (a == 1 if a.ndim == 2 else a[:, None] == classes for a in (y, yhat))
    total = y.sum(0) + yhat.sum(0)                                               # 2 TP + FP + FN
    return _mean(2 * (y & yhat).sum(0)[total > 0] / total[total > 0])


def cohen_kappa(y, yhat, weights=None):
    """1 - observed / chance disagreement (Cohen 1960). A pair (i, j) disagrees by i != j, or by (i - j)^2 if "quadratic"."""
    if weights not in (None, "quadratic"):
        raise ValueError(f'weights must be None or "quadratic", not {weights!r}')
    y, yhat = _labels(y, yhat)
    if y.ndim == 2:
        return _over_labels(lambda a, b: cohen_kappa(a, b, weights), y, yhat)
    n = len(y)
    if weights is None:                                                          # sums over the n^2 pairs (y_i, yhat_j), exact
        observed = n * np.sum(y != yhat)
        chance = n * n - sum(np.sum(y == c) * np.sum(yhat == c) for c in np.unique(y))
    else:
        observed = n * np.sum((y - yhat) ** 2)
        chance = n * np.sum(y ** 2) + n * np.sum(yhat ** 2) - 2 * y.sum() * yhat.sum()
    return float(1 - observed / chance) if chance else float("nan")


def confusion_matrix(y, yhat, K):
    """int64 (K, K): entry [i, j] counts the samples of class i that were called j. y, yhat (N,) of 0..K-1."""
    y, yhat = _labels(_array("y", y, True, 0, K - 1), _array("yhat", yhat, True, 0, K - 1))
    return np.bincount(y.ravel() * K + yhat.ravel(), minlength=K * K).reshape(K, K)


# ---------------------------------------------------------------------------------------------- ranking
def _over_rankings(area, y, score):
    """Mean of area(negatives, positives), counts at each distinct score, ascending; classes one against the rest."""
    y, score = _scores(y, score)
    if y.ndim < score.ndim:
        y = y[:, None] == np.arange(score.shape[1])
    values = []
    for truth, s in zip(y.reshape(len(y), -1).T, score.reshape(len(y), -1).T):
        _, code, count = np.unique(s, return_inverse=True, return_counts=True)
        positives = np.bincount(code, weights=truth)
        values.append(area(count - positives, positives) if 0 < truth.sum() < len(truth) else np.nan)
    return _mean(values)


def auroc(y, score):
    """P(score of a positive > score of a negative) + P(equal) / 2, from ranks. (N, K) scores: each class against the rest."""
    return _over_rankings(lambda negatives, positives: positives @ (np.cumsum(negatives) - negatives / 2)
                          / (positives.sum() * negatives.sum()), y, score)


def average_precision(y, score):
    """Sum over descending thresholds of (step in recall) x precision, not interpolated. Shapes as in `auroc`."""
    def area(negatives, positives):
        precision = np.cumsum(positives[::-1]) / np.cumsum((positives + negatives)[::-1])
        return positives[::-1] @ precision / positives.sum()
    return _over_rankings(area, y, score)


# ---------------------------------------------------------------------------------------- probabilities
def nll(y, p):
    """Mean -log of the probability given to the truth, clipped at 1e-15 (a flat zero costs 34.5, not infinity)."""
    y, p = _probabilities(y, p)
    right = p[np.arange(len(y)), y] if y.ndim < p.ndim else np.where(y == 1, p, 1 - p)
    return float(-np.log(np.maximum(right, 1e-15)).mean())


def sharpness(y, p):
    """The exponent b in 0.05..20 that gives p^b (normalised; p (N,K), y (N,)) the least NLL on this split (Guo et al. 2017: b = 1/T).

    1 where every answer is right: the likelihood would then have b without end, and a few easy images would make an answer sure of anything.
    """
    if (np.argmax(p, 1) == y).all():
        return 1.
    log_p, low, high = np.log(np.clip(p, 1e-30, None)), np.log(.05), np.log(20.)

    def loss(log_b):
        z = np.exp(log_b) * log_p
        return (np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(len(z)), y]).mean()

    for _ in range(60):                                 # ternary search: convex in b, so one minimum in log b
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def brier(y, p):
    """Mean squared error of the probabilities; single-label: summed over the classes, so 0..2 (Brier 1950)."""
    y, p = _probabilities(y, p)
    square = (p - (np.eye(p.shape[1])[y] if y.ndim < p.ndim else y)) ** 2
    return float(square.sum(1).mean() if y.ndim < p.ndim else square.mean())


def reliability_bins(y, p, bins=15):
    """(confidence, accuracy, count), each (bins,): means over the samples in equal, right-closed bins of [0, 1].

    Single-label: of the class with the largest p. Binary: of class 1, p against the share of ones. Multi-label: all labels
    pooled, as if binary. An empty bin holds nan, nan, 0.
    """
    if bins < 1:
        raise ValueError(f"bins must be positive, not {bins}")
    y, p = _probabilities(y, p)
    confidence, hit = (p.max(1), p.argmax(1) == y) if y.ndim < p.ndim else (p.ravel(), y.ravel())
    index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)       # an edge belongs to the bin below it
    count = np.bincount(index, minlength=bins)
    share = np.where(count > 0, count, np.nan)
    return np.bincount(index, confidence, bins) / share, np.bincount(index, hit, bins) / share, count


def ece(y, p, bins=15):
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence| of `reliability_bins`, weighted by their counts."""
    if np.ndim(y) == 2:
        return _over_labels(lambda a, b: ece(a, b, bins), *_probabilities(y, p))
    confidence, hits, count = reliability_bins(y, p, bins)
    return float(np.nansum(count * np.abs(hits - confidence)) / count.sum())


# --------------------------------------------------------------------------------- selective prediction
def _kept_accuracy(correct, uncertainty):
    """(N,) accuracy of the k least uncertain, k = 1..N; a tie is broken at random: its samples count their mean, by linearity."""
    correct, uncertainty = _scores(correct, uncertainty, ("correct", "uncertainty"))
    if uncertainty.ndim == 2:
        raise ValueError("uncertainty must have the shape of correct, (N,)")
    _, code, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    return np.cumsum(np.repeat(np.bincount(code, correct) / count, count)) / np.arange(1, len(correct) + 1)


def aurc(correct, uncertainty):
    """Area under the risk-coverage curve: share of errors among the k least uncertain, mean over k = 1..N (Geifman et al. 2019).

    correct: 0 or 1, (N,), or (N, K) for the mean over labels; uncertainty: any scale, the same shape.
    """
    if np.ndim(correct) == 2:
        return _over_labels(aurc, *_scores(correct, uncertainty, ("correct", "uncertainty")))
    return float(np.mean(1 - _kept_accuracy(correct, uncertainty)))


def coverage_accuracy(correct, uncertainty, coverages=None):
    """(coverages, accuracies): accuracy of what is left when the most uncertain int(N * (1 - coverage)) samples are dropped.

    correct, uncertainty (N,), ties as in `aurc`; coverages (M,): shares kept, above 0 and up to 1, by default 1, .95, ..., .05.
    """
    kept = _kept_accuracy(correct, uncertainty)
    coverages = _array("coverages", np.arange(20, 0, -1) / 20 if coverages is None else coverages, low=1e-9, high=1)
    dropped = np.floor(len(kept) * (1 - coverages) + 1e-9).astype(int)           # 10 * (1 - .9) is .9999999999999998
    return coverages, kept[len(kept) - 1 - np.minimum(dropped, len(kept) - 1)]


# --------------------------------------------------------------------------- intervals, features, summary
def bootstrap_ci(metric, *arrays, n=1000, level=0.95, seed=0, groups=None):
    """(low, high) percentile interval of metric(*arrays) over n resamples of rows; those where it is nan are left out. nan, nan where all say the
    same: of one patient, or of answers that are all right, the resamples know no more than the mean.

    groups (N,): whole groups (patients, lesions) are drawn, since the images of one patient are not independent.
    """
    arrays, rng, values = [np.asarray(a) for a in arrays], np.random.default_rng(seed), []
    groups = np.arange(len(arrays[0])) if groups is None else np.asarray(groups)
    if len({len(a) for a in arrays + [groups]}) > 1 or not len(groups):
        raise ValueError(f"arrays and groups must have one row a sample, not {[len(a) for a in arrays + [groups]]} rows")
    _, code, count = np.unique(groups, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(code, kind="stable"), np.cumsum(count)[:-1])   # the rows of each group
    for _ in range(n):
        rows = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        values.append(metric(*(a[rows] for a in arrays)))
    values = [v for v in values if not np.isnan(v)] or [np.nan]
    if min(values) == max(values):
        return float("nan"), float("nan")
    return tuple(float(q) for q in np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))


def frechet_distance(x, y):
    """|mean x - mean y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of features (N, D), (M, D) (FID, Heusel et al. 2017)."""
    x, y = _array("x", x), _array("y", y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"x and y must be (N, D) and (M, D), two rows or more, not {x.shape} and {y.shape}")
    S_x, S_y = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    value, vector = np.linalg.eigh(S_x)
    root = (vector * np.sqrt(value.clip(0))) @ vector.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ S_y @ root).clip(0)).sum()         # S_x S_y has the same eigenvalues
    return float(max(0, np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(S_x) + np.trace(S_y) - 2 * cross))


def summary(y, p, uncertainty=None, ci=0, yhat=None, groups=None):
    """The "test" entry of metrics.json, a dict. p (N, K); y (N,), or (N, K) for multi-label.

    yhat: by default the largest p, multi-label p >= 0.5. uncertainty (N,), multi-label (N, K): by default 1 - the probability
    of the likelier answer. ci: resamples of `bootstrap_ci` for "ci95", with `groups`. Multi-label adds "per_label", {metric:
    list}, and "auroc_labels", the number of labels with both classes.
    """
    y, p = _probabilities(y, p)
    if p.ndim == 1:
        raise ValueError("p must have shape (N, K), a column a class or label")
    best = np.maximum(p, 1 - p) if y.ndim == 2 else p.max(1)
    yhat = np.asarray(yhat) if yhat is not None else (p >= 0.5).astype(int) if y.ndim == 2 else p.argmax(1)
    uncertainty = 1 - best if uncertainty is None else np.asarray(uncertainty)

    def values(y, p, yhat, uncertainty):
        return {"accuracy": accuracy(y, yhat), "balanced_accuracy": balanced_accuracy(y, yhat), "f1_macro": f1_macro(y, yhat),
                "auroc": auroc(y, p), "kappa_quadratic": cohen_kappa(y, yhat, "quadratic"), "ece": ece(y, p), "nll": nll(y, p),
                "aurc": aurc(y == yhat, uncertainty)}

    out = {"n": len(y), **values(y, p, yhat, uncertainty)}
    if y.ndim == 2:
        each = [values(*(a[:, [k]] for a in (y, p, yhat, uncertainty))) for k in range(y.shape[1])]
        out["per_label"] = {name: [value[name] for value in each] for name in out if name != "n"}
        out["auroc_labels"] = int(np.isfinite(out["per_label"]["auroc"]).sum())
    if ci:
        out["ci95"] = {metric.__name__: list(bootstrap_ci(metric, y, a, n=ci, groups=groups)) for metric, a in
                       ((accuracy, yhat), (f1_macro, yhat), (auroc, p), (balanced_accuracy, yhat))}
    return out


def box_mask(boxes, size):
    """boxes (..., 4) as x0, y0, x1, y1 in pixels -> bool (..., H, W), True inside; size = (H, W)."""
    y, x = np.arange(size[0])[:, None], np.arange(size[1])
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes), -1, 0)[..., None, None]
    return (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)


# ----------------------------------------------------------------------------------------------- images
def _image_pairs(x, y, side=1):
    """Yields the N pairs of images, float64 (C, H, W), of two stacks uint8 (N, C, H, W)."""
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype != np.uint8 or y.dtype != np.uint8 or x.shape != y.shape or x.ndim != 4 or x.size == 0:
        raise ValueError(f"x and y must be uint8 (N, C, H, W) of the same shape, not {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    if min(x.shape[2:]) < side:
        raise ValueError(f"x and y are images of {x.shape[2]}x{x.shape[3]}, the sides must be {side} or more")
    return ((a.astype(np.float64), b.astype(np.float64)) for a, b in zip(x, y))


def psnr(x, y):
    """10 log10(255^2 / MSE) in dB, mean over the images; x, y uint8 (N, C, H, W). Pairs of equal images, infinite, are left out: nan if all are."""
    errors = [np.mean((a - b) ** 2) for a, b in _image_pairs(x, y)]
    return _mean([10 * np.log10(255 ** 2 / e) if e > 0 else np.nan for e in errors])


def ssim(x, y):
    """Structural similarity (Wang et al. 2004, eq. 13; Gaussian window 11x11, sigma 1.5), mean over images, channels and valid positions.

    x, y uint8 (N, C, H, W), 11x11 or more (ValueError) -> -1..1, equal images 1. The paper's own numbers are of gray images.
    """
    window = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    window, c1, c2 = window / window.sum(), (.01 * 255) ** 2, (.03 * 255) ** 2

    def local(a):                                                                # weighted mean around each valid position
        rows = sum(w * a[:, i:a.shape[1] - 10 + i] for i, w in enumerate(window))
        return sum(w * rows[:, :, i:a.shape[2] - 10 + i] for i, w in enumerate(window))

    values = []
    for a, b in _image_pairs(x, y, side=11):
        mean_a, mean_b = local(a), local(b)
        var_a, var_b, cov = local(a * a) - mean_a ** 2, local(b * b) - mean_b ** 2, local(a * b) - mean_a * mean_b
        values.append(np.mean((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))))
    return float(np.mean(values))
