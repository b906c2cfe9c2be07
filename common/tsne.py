"""t-SNE, exact (van der Maaten and Hinton 2008): points in the plane whose neighbours are those of the high-dimensional rows."""
import numpy as np


def tsne(x, perplexity=30., steps=750):
    """Rows x (N, D) -> (N, 2) float64. Deterministic: it starts from the two first principal components.

    perplexity: the number of neighbours a row has, in effect; lowered to (N - 1) / 3 where there are few rows. O(N^2) in time
    and memory: meant for some hundred rows. Raises ValueError for under 4 rows or values that are not finite.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 4 or not np.isfinite(x).all():
        raise ValueError(f"t-SNE needs 4 rows or more of finite numbers, not {x.shape}")
    p = joint_probabilities(squared_distances(x), min(perplexity, (len(x) - 1) / 3))
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x @ x.T)                                    # the components from the Gram matrix: D may be 6144
    y = 1e-4 * u[:, :2] * np.sqrt(s[:2] / max(s[0], 1e-300)) * len(x) ** .5
    rate, velocity, gain = len(x) / 12, np.zeros_like(y), np.ones_like(y)     # N / exaggeration (Belkina et al. 2019): larger throws few points apart
    for i in range(steps):
        early = i < min(250, steps // 2)                                # exaggerated attraction first, so that clusters can move
        gradient = kl_gradient(p * 12 if early else p, y)
        gain = np.maximum(np.where(gradient * velocity < 0, gain + .2, gain * .8), .01)
        velocity = (.5 if early else .8) * velocity - rate * gain * gradient
        y = y + velocity
    return y - y.mean(0)


def squared_distances(x):
    """|x_i - x_j|^2, (N, N)."""
    square = (x ** 2).sum(1)
    return np.maximum(square[:, None] + square - 2 * x @ x.T, 0)


def joint_probabilities(d, perplexity):
    """p_ij (N, N) of squared distances d: symmetric, sums to 1. Each row's bandwidth is found by bisection, so that its
    conditional p_j|i has the entropy log(perplexity)."""
    n = len(d)
    others = ~np.eye(n, dtype=bool)
    d = d[others].reshape(n, n - 1)
    d = d - d.min(1, keepdims=True)                                     # changes no p_j|i, and keeps exp from vanishing
    d = d / np.maximum(d.mean(1, keepdims=True), 1e-300)
    low, high = np.full((n, 1), -60.), np.full((n, 1), 60.)             # log of 1 / (2 sigma^2)
    for _ in range(64):
        middle = (low + high) / 2
        w = np.exp(-np.exp(middle) * d)
        q = w / w.sum(1, keepdims=True)
        broad = -(q * np.log(np.maximum(q, 1e-300))).sum(1, keepdims=True) > np.log(perplexity)
        low, high = np.where(broad, middle, low), np.where(broad, high, middle)
    p = np.zeros((n, n))
    p[others] = q.ravel()
    return (p + p.T) / (2 * n)


def kl_gradient(p, y):
    """Gradient (N, 2) of KL(p || q) at y (N, 2), q Student's t with one degree of freedom (eq. 5 of the paper)."""
    w = 1 / (1 + squared_distances(y))
    np.fill_diagonal(w, 0)
    force = (p - w / w.sum()) * w
    return 4 * (force.sum(1)[:, None] * y - force @ y)
