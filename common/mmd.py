"""Maximum mean discrepancy (Gretton et al. 2012): how far two samples lie apart in the feature space of a kernel.

    MMD^2(x, y) = E K(x, x') - 2 E K(x, y) + E K(y, y')          x (N, D), y (M, D) -> a scalar tensor, differentiable

Both keep the input's dtype. The value is a small difference of numbers near 1: float32 at least; `mmd_polynomial`, a matrix product, outside autocast.
"""
import torch


def _check(x, y, rows):
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < rows:
        raise ValueError(f"x and y must be (N, D) and (M, D) with at least {rows} rows, not {tuple(x.shape)} and {tuple(y.shape)}")


def mmd_rbf(x, y, bandwidth):
    """The loss of DiffMIC, eq. 5: K(a, b) = exp(-|a - b|^2 / bandwidth^2), the biased V-statistic, which counts the diagonal.

    It is >= 0, and 0 for y = x in any order of rows. The paper leaves K open; its authors' code takes bandwidth = D.
    """
    _check(x, y, rows=1)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, not {bandwidth!r}")

    def mean_kernel(a, b):
        # the differences themselves, O(N M D): |a|^2 - 2ab + |b|^2 loses K(a, a) = 1, the root in cdist the gradient at 0
        square = ((a[:, None] - b[None]) ** 2).sum(-1)                       # (N, M)
        return torch.exp(-square / bandwidth ** 2).mean()

    return mean_kernel(x, x) - 2 * mean_kernel(x, y) + mean_kernel(y, y)


def mmd_polynomial(x, y):
    """The kernel inception distance (Binkowski et al. 2018) of features: K(a, b) = (a.b / D + 1)^3, unbiased, so it may be < 0."""
    _check(x, y, rows=2)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3                               # (N, M)

    def mean_off_diagonal(k):
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    return mean_off_diagonal(kernel(x, x)) - 2 * kernel(x, y).mean() + mean_off_diagonal(kernel(y, y))
