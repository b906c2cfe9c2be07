"""common/tsne.py against double loops, differences and closed cases: the perplexity that is asked for, the gradient, what a picture must show."""
import math

import numpy as np
import pytest

from common.tsne import joint_probabilities, kl_gradient, squared_distances, tsne

pytestmark = pytest.mark.filterwarnings("error")                  # no overflow, no division by zero


def rows(n, d=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def clusters(n=15, d=50, distance=8., seed=0):
    """Three clusters of n rows, and which row is in which."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, d)) * distance / math.sqrt(2 * d)
    return np.concatenate([c + rng.normal(size=(n, d)) / math.sqrt(d) for c in centres]), np.repeat([0, 1, 2], n)


def entropy(p):
    return -sum(v * math.log(v) for v in p if v > 0)


def conditional(x, i, perplexity):
    """p_j|i of row i by loops and a search of its own, over the bandwidth itself."""
    d = [sum((a - b) ** 2 for a, b in zip(x[i], other)) for other in x]
    low, high = 1e-3, 1e3
    for _ in range(200):
        sigma = math.sqrt(low * high)
        w = [0. if j == i else math.exp(-(d[j] - min(d[:i] + d[i + 1:])) / (2 * sigma ** 2)) for j in range(len(x))]
        p = [v / sum(w) for v in w]
        low, high = (sigma, high) if entropy(p) < math.log(perplexity) else (low, sigma)
    assert math.exp(entropy(p)) == pytest.approx(perplexity, rel=1e-9)
    return p


def kl(p, y):
    """KL(p || q) of a picture, pair by pair."""
    pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if i != j]
    w = {(i, j): 1 / (1 + float(np.sum((y[i] - y[j]) ** 2))) for i, j in pairs}
    return sum(p[ij] * math.log(p[ij] / (w[ij] / sum(w.values()))) for ij in pairs if p[ij] > 0)


# ---------------------------------------------------------------------------------------------- probabilities
def test_squared_distances_equal_a_double_loop_and_are_never_negative():
    x = rows(9) + 1e3                                             # cancellation would show
    want = [[sum((a - b) ** 2 for a, b in zip(p, q)) for q in x.tolist()] for p in x.tolist()]
    found = squared_distances(x)
    assert np.allclose(found, want, atol=1e-7) and (found >= 0).all()


@pytest.mark.parametrize("perplexity", [2, 5, 9])
def test_every_row_gets_the_perplexity_that_is_asked_for(perplexity):
    x = (rows(20) * np.arange(1, 21)[:, None]).tolist()           # rows at very different distances: each needs its own bandwidth
    each = np.array([conditional(x, i, perplexity) for i in range(20)])
    assert np.allclose(joint_probabilities(squared_distances(np.array(x)), perplexity), (each + each.T) / 40, atol=1e-9)


@pytest.mark.parametrize("perplexity", [2.5, 4, 7])
def test_in_a_ring_where_all_rows_are_alike_the_joint_itself_has_that_perplexity(perplexity):
    angle = 2 * np.pi * np.arange(12) / 12
    p = joint_probabilities(squared_distances(np.stack([np.cos(angle), np.sin(angle)], 1)), perplexity)
    for row in 12 * p:                                            # p_j|i = p_i|j there
        assert row.sum() == pytest.approx(1) and math.exp(entropy(row)) == pytest.approx(perplexity, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_joint_probabilities_are_symmetric_sum_to_one_and_do_not_know_the_unit(scale):
    p = joint_probabilities(squared_distances(rows(30)), 8)
    other = joint_probabilities(squared_distances(rows(30) * scale), 8)
    assert np.array_equal(p, p.T) and p.sum() == pytest.approx(1) and (p >= 0).all() and not np.diag(p).any()
    assert np.allclose(other, p, atol=1e-9)


def test_moving_and_turning_the_rows_changes_no_probability():
    x = rows(30)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    p, moved = (joint_probabilities(squared_distances(a), 8) for a in (x, x @ turn + 5))
    assert np.allclose(p, moved, atol=1e-10) and not np.allclose(p, joint_probabilities(squared_distances(x * np.arange(1, 9)), 8), atol=1e-3)


def test_nearer_rows_have_larger_probabilities():
    x = np.array([[0.], [1], [3], [6], [10]])
    p = joint_probabilities(squared_distances(x), 2)
    assert p[0, 1] > p[0, 2] > p[0, 3] > p[0, 4]


# ---------------------------------------------------------------------------------------------- gradient
def test_the_gradient_is_eq_5_as_a_double_loop():
    p, y = joint_probabilities(squared_distances(rows(9)), 3), rows(9, 2, 1)
    w = [[0 if i == j else 1 / (1 + float(np.sum((y[i] - y[j]) ** 2))) for j in range(9)] for i in range(9)]
    total = sum(map(sum, w))
    want = [sum(4 * (p[i, j] - w[i][j] / total) * w[i][j] * (y[i] - y[j]) for j in range(9)) for i in range(9)]
    assert np.allclose(kl_gradient(p, y), want, atol=1e-12)


@pytest.mark.parametrize("spread", [.01, 1, 20])
def test_the_gradient_is_the_slope_of_the_divergence(spread):
    p, y, h = joint_probabilities(squared_distances(rows(7)), 2), rows(7, 2, 1) * spread, 1e-5
    slopes = np.zeros_like(y)
    for i, k in np.ndindex(*y.shape):
        step = np.zeros_like(y)
        step[i, k] = h
        slopes[i, k] = (kl(p, y + step) - kl(p, y - step)) / (2 * h)
    assert np.allclose(kl_gradient(p, y), slopes, atol=1e-6) and np.abs(slopes).max() > 1e-3


# ---------------------------------------------------------------------------------------------- the picture
@pytest.mark.parametrize("n", [7, 15, 30])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_apart_in_the_picture(n, seed):
    x, k = clusters(n, seed=seed)
    y = tsne(x)
    assert y.shape == (3 * n, 2) and y.dtype == np.float64 and np.allclose(y.mean(0), 0, atol=1e-9)
    centres = np.stack([y[k == c].mean(0) for c in range(3)])
    radius = max(np.linalg.norm(y[k == c] - centres[c], axis=1).max() for c in range(3))
    assert min(np.linalg.norm(centres[a] - centres[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 2 * radius


def test_neighbours_stay_neighbours():
    t = np.linspace(0, 6, 40)                                     # a curve in five dimensions
    x = np.stack([np.cos(t), np.sin(t), t, np.cos(2 * t), t ** 2 / 6], 1)
    d = squared_distances(tsne(x, 8))
    np.fill_diagonal(d, np.inf)
    assert np.mean(np.abs(d.argmin(1) - np.arange(40)) <= 2) > .9


def test_the_steps_lower_the_divergence():
    x = rows(20)
    p = joint_probabilities(squared_distances(x), 5)
    start, end = (kl(p, tsne(x, 5, steps)) for steps in (0, 750))
    assert end < start / 2


def test_the_start_is_the_plane_of_largest_variance():
    x = rows(20) * [9, 4, 1, 1, 1, 1, 1, 1]
    y = tsne(x, 5, steps=0)
    x = x - x.mean(0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    cosine = np.abs([np.corrcoef(y[:, k], x @ axes[k])[0, 1] for k in (0, 1)])
    assert np.allclose(cosine, 1) and y[:, 0].std() == pytest.approx(1e-4, rel=1e-6) and y[:, 1].std() < y[:, 0].std()


def test_the_same_rows_give_the_same_picture():
    x = rows(12)
    kept = x.copy()
    assert np.array_equal(tsne(x, 4, 60), tsne(x, 4, 60)) and np.array_equal(x, kept)
    assert np.array_equal(tsne(x.tolist(), 4, 60), tsne(x, 4, 60))


@pytest.mark.parametrize("x", [rows(4), rows(5), rows(4, 1), rows(12, 6144), np.ones((6, 3)), np.repeat(rows(2), 4, 0), rows(6) * 1e8, rows(6) * 1e-8,
                               rows(20).astype(np.float32)], ids="four five line wide equal twins large small float32".split())
def test_few_equal_and_wide_rows_give_finite_points(x):
    y = tsne(x, steps=120)
    assert y.shape == (len(x), 2) and np.isfinite(y).all()
    assert y.any() == (x != x[0]).any()                           # equal rows lie on each other


def test_rows_that_are_far_apart_in_6144_dimensions_are_told_apart():
    x = rows(10, 6144) + 40 * np.repeat([[0.], [1]], 5, 0)
    y = tsne(x, 2, 200)
    assert min(np.linalg.norm(y[i] - y[j]) for i in range(5) for j in range(5, 10)) > \
        max(np.linalg.norm(y[i] - y[j]) for k in (0, 5) for i in range(k, k + 5) for j in range(k, k + 5))


def test_the_perplexity_is_lowered_where_there_are_few_rows():
    x = rows(10)
    assert np.array_equal(tsne(x, 30, 60), tsne(x, 3, 60)) and not np.array_equal(tsne(x, 2, 60), tsne(x, 3, 60))


@pytest.mark.parametrize("x", [rows(3), rows(8)[0], np.where(rows(8) > 1.3, np.nan, rows(8)), np.where(np.eye(8) > 0, np.inf, 1.), np.zeros((0, 2))],
                         ids="three vector nan inf none".split())
def test_what_has_no_picture_is_refused_with_a_sentence(x):
    with pytest.raises(ValueError, match="4 rows or more of finite numbers"):
        tsne(x)
