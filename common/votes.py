"""What follows from the errors (M, N, K) of K classes at N noise levels of M images, nan where a class was not asked: votes, means, differences,
a logistic regression on them; and what follows from votes: whether more of them could still change the winner."""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

BUCKETS = 10                                            # ranges of log-SNR, -10 to 10, that `bucket_differences` averages over


def count_votes(error):
    """Votes (M, K): at how many levels each class erred least; of equal errors the first class has the vote."""
    least = np.where(np.isnan(error), np.inf, error).argmin(2)
    return (np.eye(error.shape[2])[least] * ~np.isnan(error).all(2)[..., None]).sum(1)


def mean_errors(error, weight=1.):
    """(M, K): mean over the levels at which a class was asked, weighted by (M, N, 1)."""
    asked = ~np.isnan(error)
    return (np.where(asked, error, 0) * weight).sum(1) / asked.sum(1)


def mean_scores(error, alive, weight=1.):
    """Minus the weighted mean error (M, K), less that of the best class alive, in units of the standard error of their difference: as sums over
    thousands of pixels, errors would make every softmax 0 or 1."""
    best = np.where(alive, mean_errors(error, weight), np.inf).argmin(1)[:, None, None]
    asked, d = ~np.isnan(error), (error - np.take_along_axis(error, best, 2)) * weight
    mean, n = mean_errors(d), asked.sum(1)
    spread = np.sqrt((np.where(asked, d - mean[:, None], 0) ** 2).sum(1)) / n
    return -np.divide(mean, spread, out=np.sign(mean), where=spread > 0)


def bucket_differences(error, l):
    """What the learned rule sees, (M, BUCKETS, K): how much more a class errs than the mean of all, averaged over ranges of log-SNR l (M, N)."""
    asked = ~np.isnan(error)
    zeroed = np.where(asked, error, 0)
    d = np.where(asked, error - zeroed.sum(2, keepdims=True) / asked.sum(2, keepdims=True).clip(1), 0)
    bucket = np.eye(BUCKETS)[np.clip(((l + 10) / 20 * BUCKETS).astype(int), 0, BUCKETS - 1)]               # (M, N, BUCKETS)
    return bucket.transpose(0, 2, 1) @ d / (bucket.transpose(0, 2, 1) @ asked).clip(1)


def fit(features, labels, ridge=.1):
    """Logistic regression by LBFGS, logits_k = - sum_j w_j features_jk -> w (BUCKETS,): how much a difference says at each noise. Each class weighs
    the same, whatever its share of the labels: the softmax of the logits is for classes equally frequent."""
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    scale, of_class = x.square().mean((0, 2)).sqrt().clamp_min(1e-30), 1 / torch.bincount(y, minlength=x.shape[2]).clamp_min(1).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(-torch.einsum("j,mjk->mk", w / scale, x), y, of_class) + ridge * w.square().mean()
        value.backward()
        return value
    with torch.enable_grad():
        optimizer.step(closure)
    return (w / scale).detach()


# ----------------------------------------------------------------------------- votes
@functools.lru_cache(maxsize=None)
def overtaken(a, b, m):
    """P(b + X >= a + m - X), a float, of whole a, b, m >= 0: X of the m votes to come go to the one that has b of a + b, the others to the one that has a; its share is uniform
    before any vote, so that X is beta-binomial."""
    def log_p(x):
        return (math.lgamma(m + 1) - math.lgamma(x + 1) - math.lgamma(m - x + 1) + math.lgamma(b + 1 + x) + math.lgamma(a + 1 + m - x)
                - math.lgamma(a + b + 2 + m) + math.lgamma(a + b + 2) - math.lgamma(a + 1) - math.lgamma(b + 1))
    return sum(math.exp(log_p(x)) for x in range(max(0, math.ceil((a - b + m) / 2)), m + 1))


@functools.lru_cache(maxsize=None)
def below_half(a, b):
    """P(share < 1/2), a float, of one that had a of a + b votes, if any share was as likely before: the tail of Beta(a + 1, b + 1)."""
    n = a + b + 1
    return sum(math.comb(n, j) for j in range(a + 1, n + 1)) / 2 ** n


def paired_p(d):
    """Two-sided p-value of Student's t for a mean of 0 of the differences d (n,), n >= 2, by Wallace's normal approximation (1959)."""
    n, sd = len(d), d.std(ddof=1)
    if sd == 0:
        return float(d.mean() == 0)
    t2, df = (d.mean() / sd) ** 2 * n, n - 1
    return math.erfc((8 * df + 1) / (8 * df + 3) * math.sqrt(df * math.log1p(t2 / df)) / math.sqrt(2))
