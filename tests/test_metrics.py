"""common/metrics.py against double loops, hand-computed values and, for 5,000 frozen cases, scikit-learn's answers."""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from common import metrics as M

pytestmark = pytest.mark.filterwarnings("error")                  # no warning may leak, in any test of this file
SEEDS = range(20)


def random_case(seed, n=40, K=4):
    """y, yhat (n,), p (n, K) with many ties; an odd seed leaves class 0 out of y."""
    rng = np.random.default_rng(seed)
    y = rng.integers(seed % 2, K, n)
    p = rng.integers(0, 4, (n, K)) + 2.0 * (y[:, None] == np.arange(K)) + 0.5
    return y, np.where(rng.random(n) < 0.6, y, rng.integers(0, K, n)), p / p.sum(1, keepdims=True)


def random_multilabel(seed, n=50, K=3):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, K)) < 0.4).astype(np.float32)
    return y, np.round(0.6 * rng.random((n, K)) + 0.4 * y * rng.random((n, K)), 1)


# ---------------------------------------------------------------------------------------------- oracles
def auc_by_pairs(y, s):
    pairs = [(a > b) + (a == b) / 2 for a in s[y == 1] for b in s[y == 0]]
    return np.mean(pairs) if pairs else np.nan


def average_precision_by_thresholds(y, s):
    total, recall_before = 0, 0
    for threshold in sorted(set(s), reverse=True):
        called = s >= threshold
        recall = np.sum(called & (y == 1)) / np.sum(y == 1)
        total, recall_before = total + (recall - recall_before) * np.mean(y[called] == 1), recall
    return total


def one_against_rest(metric, y, p):
    columns = [(y == k).astype(int) for k in range(p.shape[1])]
    return np.mean([metric(c, p[:, k]) for k, c in enumerate(columns) if 0 < c.sum() < len(c)])


@pytest.mark.parametrize("seed", SEEDS)
def test_auroc_and_average_precision_equal_double_loops_with_ties_and_absent_classes(seed):
    y, _, p = random_case(seed)
    assert M.auroc(y, p) == pytest.approx(one_against_rest(auc_by_pairs, y, p), abs=1e-12)
    assert M.average_precision(y, p) == pytest.approx(one_against_rest(average_precision_by_thresholds, y, p), abs=1e-12)
    binary = (y == 2).astype(int)
    assert M.auroc(binary, p[:, 2]) == pytest.approx(auc_by_pairs(binary, p[:, 2]), abs=1e-12)
    assert M.average_precision(binary, p[:, 2]) == pytest.approx(average_precision_by_thresholds(binary, p[:, 2]), abs=1e-12)


def test_values_are_those_that_scikit_learn_1_9_1_gave_for_a_frozen_case():
    i = np.arange(60)
    y = (i * i + i // 7) % 4
    p = 1.0 + (i[:, None] * (2 * np.arange(4) + 3)) % 5 + 3 * (y[:, None] == np.arange(4)) * (i[:, None] % 3 > 0)
    p /= p.sum(1, keepdims=True)
    yhat = p.argmax(1)
    ours = [M.accuracy(y, yhat), M.balanced_accuracy(y, yhat), M.f1_macro(y, yhat), M.cohen_kappa(y, yhat),
            M.cohen_kappa(y, yhat, "quadratic"), M.auroc(y, p), M.average_precision(y, p), M.nll(y, p), M.brier(y, p)]
    theirs = [0.6666666666666666, 0.6535218253968254, 0.6473332791198834, 0.5488721804511278, 0.5004111842105263,
              0.8468585718076207, 0.7560705987215462, 1.0871152182870258, 0.5700944376535192]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def drawn_case(i):
    """y, yhat (n,), p (n, K): 2 to 60 images, 2 to 8 classes of which some are absent, tied probabilities. RandomState: its numbers never change."""
    rng = np.random.RandomState(i)
    n, K = rng.randint(2, 61), rng.randint(2, 9)
    y = rng.choice(rng.permutation(K)[:rng.randint(1, K + 1)], n)
    p = rng.randint(0, 5, (n, K)) + 3. * rng.rand() * (y[:, None] == np.arange(K)) + .25
    return y, np.where(rng.rand(n) < .6, y, rng.randint(0, K, n)), p / p.sum(1, keepdims=True)


FROZEN = {                                                              # metric: what scikit-learn 1.9.1 was asked, of each class against the rest where S
    "accuracy": M.accuracy,                                             # accuracy_score
    "balanced_accuracy": M.balanced_accuracy,                           # mean over the classes of y of recall_score
    "f1_macro": M.f1_macro,                                             # f1_score(average="macro")
    "kappa": M.cohen_kappa,                                             # cohen_kappa_score(labels=range(K))
    "kappa_quadratic": lambda y, yhat: M.cohen_kappa(y, yhat, "quadratic"),     # the same with weights="quadratic"
    "auroc": M.auroc, "average_precision": M.average_precision,         # S: mean of roc_auc_score, average_precision_score, of classes in y that are not all of it
    "nll": M.nll, "brier": M.brier}                                     # log_loss(labels=range(K)); brier_score_loss, summed over the classes


@pytest.mark.parametrize("start", [0, pytest.param(slice(None), marks=pytest.mark.slow)], ids=["every fifth", "all"])
def test_metrics_are_those_that_scikit_learn_gave_for_frozen_cases(start):
    """nan where it has none. The answers were made once, by the calls in FROZEN, outside of the five packages."""
    with np.load(Path(__file__).parent / "results" / "scikit-learn.npz") as file:
        theirs = {name: file[name] for name in FROZEN}
    cases = range(5000)[slice(start, None, 5) if start == 0 else start]
    for i in cases:
        y, yhat, p = drawn_case(i)
        for name, metric in FROZEN.items():
            ours = metric(y, p if name in ("auroc", "average_precision", "nll", "brier") else yhat)
            assert ours == pytest.approx(theirs[name][i], abs=1e-9, nan_ok=True), (i, name)
    assert len(cases) >= 1000 and all(np.isfinite(theirs[name]).mean() > .7 for name in FROZEN) and np.isnan(theirs["auroc"]).any()


def test_hard_decisions_equal_values_computed_by_hand():
    y, yhat = [0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 2, 0]
    assert M.accuracy(y, yhat) == 5 / 8
    assert M.balanced_accuracy(y, yhat) == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    assert M.f1_macro(y, yhat) == pytest.approx((6 / 8 + 2 / 4 + 2 / 4) / 3)
    chance = (4 * 4 + 2 * 2 + 2 * 2) / 64                        # of agreement, from the margins 4 2 2 and 4 2 2
    assert M.cohen_kappa(y, yhat) == pytest.approx((5 / 8 - chance) / (1 - chance))
    # quadratic: squared differences 0 0 0 1 0 1 0 4 sum to 6; over all 64 pairs, margins against margins: 2 (4*2*1 + 4*2*4 + 2*2*1)
    assert M.cohen_kappa(y, yhat, "quadratic") == pytest.approx(1 - (6 / 8) / (88 / 64))


def test_f1_leaves_out_classes_that_are_in_neither_and_counts_those_in_one():
    assert M.f1_macro([0, 3, 3], [0, 3, 3]) == 1                 # classes 1 and 2 occur nowhere
    assert M.f1_macro([0, 0, 0], [0, 0, 1]) == pytest.approx((4 / 5 + 0) / 2)


def test_quadratic_kappa_takes_the_distance_of_the_grades_not_of_their_ranks():
    y, yhat = np.array([0, 1, 4, 4, 0, 1]), np.array([0, 4, 4, 1, 0, 1])
    ranks = np.searchsorted([0, 1, 4], y), np.searchsorted([0, 1, 4], yhat)
    expected = 1 - np.mean((y - yhat) ** 2) / np.mean((y[:, None] - yhat) ** 2)
    assert M.cohen_kappa(y, yhat, "quadratic") == pytest.approx(expected)
    assert M.cohen_kappa(y, yhat, "quadratic") != pytest.approx(M.cohen_kappa(*ranks, "quadratic"), abs=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_kappa_equals_a_double_loop_over_the_confusion_matrix(seed):
    y, yhat, _ = random_case(seed)
    C = M.confusion_matrix(y, yhat, 4)
    for weights, w in ((None, lambda i, j: i != j), ("quadratic", lambda i, j: (i - j) ** 2)):
        observed = sum(w(i, j) * C[i, j] for i in range(4) for j in range(4)) / 40
        chance = sum(w(i, j) * C[i].sum() * C[:, j].sum() for i in range(4) for j in range(4)) / 1600
        assert M.cohen_kappa(y, yhat, weights) == pytest.approx(1 - observed / chance, abs=1e-12)


def test_the_confusion_matrix_has_the_truth_in_its_rows_and_keeps_absent_classes():
    C = M.confusion_matrix([0, 0, 1, 3], [0, 1, 1, 0], 4)
    assert C.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]] and C.dtype == np.int64


def test_nll_and_brier_equal_values_computed_by_hand():
    p = [[0.5, 0.25, 0.25], [0, 1, 0]]
    assert M.nll([0, 1], p) == pytest.approx(math.log(2) / 2)
    assert M.brier([0, 1], p) == pytest.approx((0.25 + 0.0625 + 0.0625) / 2)
    assert M.nll([1, 0], [0.5, 0.75]) == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert M.brier([1, 0], [0.5, 0.75]) == pytest.approx((0.25 + 0.5625) / 2)
    assert M.nll([2, 0], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]) == pytest.approx(-math.log(1e-15) / 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_ece_equals_the_loop_of_guo_et_al(seed):
    y, _, p = random_case(seed, n=200)
    confidence, hit, total = p.max(1), p.argmax(1) == y, 0
    for low, high in itertools.pairwise(np.linspace(0, 1, 16)):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert M.ece(y, p) == pytest.approx(total, abs=1e-12)


def test_reliability_bins_are_right_closed_and_empty_ones_are_nan():
    confidence, accuracy, count = M.reliability_bins([0, 1, 1, 0, 1], [0.0, 0.25, 0.5, 0.51, 1.0], bins=4)
    assert count.tolist() == [2, 1, 1, 1]                        # 0 and .25 | .5 | .51 | 1
    np.testing.assert_allclose(confidence, [0.125, 0.5, 0.51, 1])
    np.testing.assert_allclose(accuracy, [0.5, 1, 0, 1])
    confidence, accuracy, count = M.reliability_bins([0, 1], [0.9, 0.9], bins=10)
    assert count.tolist() == [0] * 8 + [2, 0] and np.isnan(confidence[:8]).all() and np.isnan(accuracy[9])
    assert M.ece([0, 1], [0.9, 0.9], bins=10) == pytest.approx(0.4)


def test_reliability_bins_of_many_labels_pool_them_while_ece_is_their_mean():
    y, p = random_multilabel(0)
    np.testing.assert_array_equal(M.reliability_bins(y, p)[2], M.reliability_bins(y.ravel(), p.ravel())[2])
    assert M.ece(y, p) == pytest.approx(np.mean([M.ece(y[:, k], p[:, k]) for k in range(3)]))


def test_a_posterior_is_calibrated_and_its_temperature_is_not():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 20_000)
    y = (rng.random((len(p), 1)) > p.cumsum(1)).sum(1)
    sharp = p ** 3 / (p ** 3).sum(1, keepdims=True)
    assert M.ece(y, p) < 0.015 and M.ece(y, sharp) > 0.1 and M.nll(y, p) < M.nll(y, sharp) and M.brier(y, p) < M.brier(y, sharp)


# ------------------------------------------------------------------------------------ selective prediction
def kept_accuracy_by_permutations(correct, uncertainty):
    """Mean over all orders in which the uncertainty never falls: (N,) accuracies of the first k."""
    orders = [o for o in itertools.permutations(range(len(correct))) if np.all(np.diff(uncertainty[list(o)]) >= 0)]
    return np.mean([np.cumsum(correct[list(o)]) / np.arange(1, len(correct) + 1) for o in orders], axis=0)


@pytest.mark.parametrize("seed", range(12))
def test_aurc_and_coverage_accuracy_equal_brute_force_over_the_orders_of_tied_samples(seed):
    rng = np.random.default_rng(seed)
    correct, uncertainty = rng.integers(0, 2, 6), rng.integers(0, 3, 6) / 2
    kept = kept_accuracy_by_permutations(correct, uncertainty)
    assert M.aurc(correct, uncertainty) == pytest.approx(np.mean(1 - kept), abs=1e-12)
    np.testing.assert_allclose(M.coverage_accuracy(correct, uncertainty, [1, 5 / 6, 0.5, 1 / 6])[1], kept[[5, 4, 2, 0]], atol=1e-12)


def test_aurc_equals_values_computed_by_hand():
    assert M.aurc([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]) == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert M.aurc([1, 1, 0, 0], [0.4, 0.3, 0.2, 0.1]) == pytest.approx((1 + 1 + 2 / 3 + 2 / 4) / 4)
    assert M.aurc([1, 1, 0, 0], [7, 7, 7, 7]) == pytest.approx(0.5)      # no information: the error rate at every coverage
    assert M.aurc([1, 1], [0, 0]) == 0 and M.aurc([0, 0], [0, 0]) == 1


def test_coverage_accuracy_drops_the_most_uncertain_in_steps_of_five_percent():
    correct = np.arange(20) < 15                                 # the five most uncertain are wrong
    coverages, accuracies = M.coverage_accuracy(correct, np.arange(20))
    np.testing.assert_allclose(coverages, 1 - np.arange(20) * 0.05)
    np.testing.assert_allclose(accuracies, [15 / (20 - k) if k < 5 else 1 for k in range(20)])


@pytest.mark.parametrize("n", [1, 3, 7, 10, 100, 999])
def test_the_number_dropped_is_the_whole_part_of_share_times_n_in_exact_arithmetic(n):
    correct = np.arange(n) == 0                                  # one right answer, the most certain: accuracy is 1 / kept
    _, accuracies = M.coverage_accuracy(correct, np.arange(n))
    assert np.round(1 / accuracies).astype(int).tolist() == [n - n * k // 20 for k in range(20)]


# ---------------------------------------------------------------------------------------------- properties
HARD = {"accuracy": M.accuracy, "balanced_accuracy": M.balanced_accuracy, "f1_macro": M.f1_macro, "kappa": M.cohen_kappa,
        "kappa_quadratic": lambda y, yhat: M.cohen_kappa(y, yhat, "quadratic")}
SOFT = {"auroc": M.auroc, "average_precision": M.average_precision, "nll": M.nll, "ece": M.ece, "brier": M.brier}


@pytest.mark.parametrize("name", [*HARD, *SOFT])
def test_the_order_of_the_samples_does_not_matter(name):
    y, yhat, p = random_case(1)
    order = np.random.default_rng(0).permutation(len(y))
    metric, other = (HARD[name], yhat) if name in HARD else (SOFT[name], p)
    assert metric(y[order], other[order]) == pytest.approx(metric(y, other), abs=1e-12)


@pytest.mark.parametrize("name", [*HARD, *SOFT])
def test_the_names_of_the_classes_do_not_matter(name):
    y, yhat, p = random_case(2)
    p = p * [1, 0.99, 0.98, 0.97]                                # no ties within a row: argmax would take the first name
    p /= p.sum(1, keepdims=True)
    new = np.array([3, 2, 1, 0]) if name == "kappa_quadratic" else np.array([2, 0, 3, 1])       # grades may only be reversed
    metric, here, there = ((HARD[name], yhat, new[yhat]) if name in HARD else (SOFT[name], p, p[:, np.argsort(new)]))
    assert metric(new[y], there) == pytest.approx(metric(y, here), abs=1e-12)


@pytest.mark.parametrize("name", ["auroc", "average_precision"])
@pytest.mark.parametrize("rise", [np.exp, np.arctan, lambda s: 1e6 * s - 3, lambda s: s ** 3])
def test_a_strictly_increasing_map_of_the_scores_changes_no_ranking_metric(name, rise):
    y, _, p = random_case(3)
    score = np.log(p)
    assert SOFT[name](y, rise(score)) == SOFT[name](y, score)


def test_an_increasing_map_of_the_uncertainty_changes_no_aurc_and_a_negated_score_mirrors_auroc():
    y, yhat, p = random_case(4)
    assert M.aurc(y == yhat, np.exp(5 * p.max(1))) == M.aurc(y == yhat, p.max(1))
    assert M.auroc(y == 1, -p[:, 1]) == pytest.approx(1 - M.auroc(y == 1, p[:, 1]), abs=1e-12)


def test_perfect_answers_score_one_and_cost_nothing():
    y = np.array([0, 1, 2, 3, 1, 2])
    p = np.eye(4)[y]
    assert all(metric(y, y) == 1 for metric in HARD.values())
    assert M.auroc(y, p) == M.average_precision(y, p) == 1
    assert M.nll(y, p) == M.brier(y, p) == M.ece(y, p) == M.aurc(np.ones(6), np.zeros(6)) == 0


def test_guessing_scores_chance_within_four_standard_errors():
    rng = np.random.default_rng(0)
    n, K = 10_000, 4
    y, yhat, p = rng.integers(0, K, n), rng.integers(0, K, n), rng.dirichlet(np.ones(K), n)
    error = 4 * math.sqrt(1 / 4 * 3 / 4 / n)
    assert abs(M.accuracy(y, yhat) - 1 / K) < error and abs(M.balanced_accuracy(y, yhat) - 1 / K) < error
    assert abs(M.cohen_kappa(y, yhat)) < error * 4 / 3
    positive, negative = n / K, n * (K - 1) / K
    assert abs(M.auroc(y == 0, p[:, 0]) - 0.5) < 4 * math.sqrt((n + 1) / (12 * positive * negative))


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "kappa", "auroc", "average_precision", "nll", "ece", "brier"])
def test_multi_label_values_are_the_mean_over_the_labels(name):
    y, p = random_multilabel(0)
    metric, other = (HARD[name], p >= 0.5) if name in HARD else (SOFT[name], p)
    assert metric(y, other) == pytest.approx(np.mean([metric(y[:, k], other[:, k]) for k in range(3)]), abs=1e-12)


def test_multi_label_f1_is_that_of_the_findings_not_of_their_absence():
    y, yhat = np.array([[1, 0], [1, 0], [0, 1], [0, 0]]), np.array([[1, 0], [0, 0], [0, 0], [0, 0]])
    assert M.f1_macro(y, yhat) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("metric", [M.auroc, M.nll, M.brier, M.ece])
def test_float32_bool_and_lists_are_taken_and_results_are_python_floats(metric):
    y, p = [0, 1, 1, 0], [0.25, 0.75, 0.5, 0.5]
    for labels in (y, np.array(y, bool), np.array(y, np.float32), np.array(y, np.uint8)):
        value = metric(labels, np.float32(p))
        assert type(value) is float and value == metric(y, p)


def test_float32_softmax_that_ends_a_rounding_above_one_is_taken():
    assert M.nll([1], np.array([[0, 1 + 1e-7]])) == 0


# ------------------------------------------------------------------------------------------ undefined, refused
UNDEFINED = {
    "auroc, one class": lambda: M.auroc([1, 1, 1], [0.1, 0.2, 0.3]),
    "auroc, one class, many scores": lambda: M.auroc([1, 1], [[0.5, 0.5], [0.1, 0.9]]),
    "auroc, no label with both": lambda: M.auroc([[0, 1], [0, 1]], [[0.5, 0.5], [0.1, 0.9]]),
    "average precision, no positive": lambda: M.average_precision([0, 0], [0.1, 0.2]),
    "average precision, no negative": lambda: M.average_precision([1, 1], [0.1, 0.2]),
    "kappa, one class": lambda: M.cohen_kappa([2, 2], [2, 2]),
    "quadratic kappa, one class": lambda: M.cohen_kappa([2, 2], [2, 2], "quadratic"),
    "F1, no label occurs": lambda: M.f1_macro([[0], [0]], [[0], [0]]),
    "bootstrap, never defined": lambda: M.bootstrap_ci(M.auroc, [1, 1], [0.1, 0.2], n=10)[0],
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_an_undefined_value_is_nan_without_a_warning(case):
    assert math.isnan(UNDEFINED[case]())


def test_labels_without_both_classes_are_left_out_of_the_mean():
    y, p = np.array([[1, 0], [0, 0], [1, 0]]), np.array([[0.9, 0.1], [0.2, 0.5], [0.1, 0.3]])
    assert M.auroc(y, p) == M.auroc(y[:, 0], p[:, 0]) == 0.5


@pytest.mark.parametrize("call", [lambda: M.auroc([0, 1], [0.2, 0.9]), lambda: M.cohen_kappa([0, 0], [1, 1]) + 1,
                                  lambda: M.accuracy([3], [3]), lambda: M.balanced_accuracy([3], [3]),
                                  lambda: M.f1_macro([3], [3]), lambda: 1 + M.aurc([1], [0.0])])
def test_the_smallest_cases_are_defined(call):
    assert call() == 1


two = [[0.5, 0.5], [0.5, 0.5]]
REFUSED = {
    "score holds NaN": lambda: M.auroc([0, 1], [0.5, np.nan]),
    "score holds NaN or infinity, 1": lambda: M.average_precision([0, 1], [0.5, np.inf]),
    "p holds NaN": lambda: M.nll([0, 1], [[np.nan, 0.5], [0.5, 0.5]]),
    "uncertainty holds NaN": lambda: M.aurc([0, 1], [0.5, np.nan]),
    "y holds NaN": lambda: M.accuracy([0, np.nan], [0, 1]),
    "yhat has shape": lambda: M.accuracy([0, 1], [0]),
    "score has shape": lambda: M.auroc([0, 1, 1], two),
    "p has shape": lambda: M.nll([0], two),
    "uncertainty has shape": lambda: M.aurc([0, 1, 1], [0.5, 0.5]),
    "uncertainty must have": lambda: M.aurc([0, 1], two),
    "y must be a non-empty array": lambda: M.accuracy([], []),
    "score must be a non-empty array": lambda: M.auroc([], []),
    "yhat must be a non-empty array of numbers": lambda: M.accuracy([0, 1], ["nevus", "melanoma"]),
    "y must hold integer labels": lambda: M.f1_macro([0, 0.5], [0, 1]),
    "yhat must hold integer labels": lambda: M.cohen_kappa([[0, 1]], [[0.2, 0.9]]),
    "y must lie in 0..1": lambda: M.auroc([0, 2], [0.1, 0.2]),
    "y must lie in 0..1, it runs from -1": lambda: M.nll([0, -1], two),
    "yhat must lie in 0..1": lambda: M.confusion_matrix([0, 1], [0, 2], 2),
    "p must lie in": lambda: M.brier([0, 1], [0.5, 1.5]),
    "p must lie in -1e-06": lambda: M.ece([0, 1], [-0.5, 0.5]),
    "p must sum to 1 over the classes, row 1": lambda: M.nll([0, 1], [[0.5, 0.5], [0.9, 0.9]]),
    "correct must lie in 0..1": lambda: M.aurc([0, 3], [0.1, 0.2]),
    "coverages must lie in": lambda: M.coverage_accuracy([0, 1], [0.1, 0.2], [0.0, 0.5]),
    "weights must be": lambda: M.cohen_kappa([0, 1], [0, 1], "linear"),
    "bins must be": lambda: M.ece([0, 1], [0.1, 0.2], bins=0),
    "arrays and groups must": lambda: M.bootstrap_ci(M.accuracy, [0, 1], [0, 1], groups=[0]),
    "x and y must be": lambda: M.frechet_distance([[1.0, 2.0]], two),
    "x holds NaN": lambda: M.frechet_distance([[1.0, np.nan]], two),
    "p must have shape": lambda: M.summary([0, 1], [0.1, 0.9]),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused_in_a_sentence_that_names_the_argument(sentence):
    with pytest.raises(ValueError) as error:
        REFUSED[sentence]()
    assert str(error.value).startswith(sentence)


# ---------------------------------------------------------------------------------------------- bootstrap
@pytest.mark.parametrize("draws", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_bootstrap_interval_covers_a_known_auc_as_often_as_it_says(draws):
    rng, truth, covered = np.random.default_rng(0), 0.5 * (1 + math.erf(0.5)), 0
    y = np.arange(200) % 2
    for draw in range(draws):                                    # N(1, 1) against N(0, 1): AUC = Phi(1 / sqrt 2) = .760
        low, high = M.bootstrap_ci(M.auroc, y, rng.normal(size=200) + y, n=200, seed=draw)
        covered += low <= truth <= high
    error = 2 * math.sqrt(0.95 * 0.05 / draws) * (draws < 2000)  # 4 points: two binomial standard errors of 120 draws
    assert 0.93 - error < covered / draws < min(0.97 + error, 0.999)


def test_the_bootstrap_interval_of_a_mean_is_that_of_the_central_limit_theorem():
    right = np.arange(400) % 4 > 0                               # accuracy .75
    low, high = M.bootstrap_ci(M.accuracy, np.ones(400), right, n=4000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.005) and high == pytest.approx(0.75 + half, abs=0.005)


def test_copies_of_an_image_narrow_the_interval_unless_they_are_drawn_as_one_patient():
    y, yhat, p = random_case(5, n=60)
    honest = M.bootstrap_ci(M.auroc, y, p, n=200)
    copies = y.repeat(4), p.repeat(4, axis=0)
    naive = M.bootstrap_ci(M.auroc, *copies, n=200)
    patients = [f"patient {i:02d}" for i in np.arange(60).repeat(4)]
    assert M.bootstrap_ci(M.auroc, *copies, n=200, groups=patients) == pytest.approx(honest, abs=1e-12)
    assert naive[1] - naive[0] < 0.7 * (honest[1] - honest[0])


def test_the_bootstrap_has_no_interval_where_every_resample_says_the_same():
    right = np.ones(10, int)
    assert np.isnan(M.bootstrap_ci(M.accuracy, right, right, n=20)).all()                                   # all right: not certain to 1.000
    y, yhat = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    assert np.isnan(M.bootstrap_ci(M.accuracy, y, yhat, n=20, groups=["one patient"] * 4)).all() and not np.isnan(M.bootstrap_ci(M.accuracy, y, yhat, n=20)).any()


def test_the_bootstrap_leaves_out_resamples_without_both_classes_and_repeats_with_its_seed():
    y, s = [0, 0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.45]   # (5/6)^6 = 33 % of the resamples have no positive
    low, high = M.bootstrap_ci(M.auroc, y, s, n=300, seed=3)
    assert 0 < low <= M.auroc(y, s) <= high <= 1
    assert (low, high) == M.bootstrap_ci(M.auroc, y, s, n=300, seed=3) != M.bootstrap_ci(M.auroc, y, s, n=300, level=0.5, seed=3)


# ---------------------------------------------------------------------------------------------- features
def test_frechet_distance_equals_the_closed_form_of_gaussians_with_commuting_covariances():
    rng = np.random.default_rng(0)
    white = rng.normal(size=(500, 3))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T         # mean 0, covariance I exactly
    x, y = white * [1, 2, 3], white * [2, 2, 1] + [1, 0, -2]
    assert M.frechet_distance(x, y) == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, abs=1e-9)


def test_frechet_distance_takes_the_trace_of_the_root_of_a_product_that_is_not_symmetric():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(90, 6)) @ rng.normal(size=(6, 6)) + 1
    S_x, S_y = np.cov(x.T), np.cov(y.T)
    cross = np.sqrt(np.linalg.eigvals(S_x @ S_y).real).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(S_x + S_y) - 2 * cross
    assert M.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9) == M.frechet_distance(y, x)


def test_frechet_distance_is_zero_for_itself_even_with_fewer_rows_than_features():
    x = np.random.default_rng(0).normal(size=(10, 40))
    assert 0 <= M.frechet_distance(x, x) < 1e-5 and M.frechet_distance(x, x + 1) == pytest.approx(40, abs=1e-5)
    assert M.frechet_distance([[0.0], [2.0]], [[1.0], [3.0]]) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------- summary
KEYS = ["n", "accuracy", "balanced_accuracy", "f1_macro", "auroc", "kappa_quadratic", "ece", "nll", "aurc"]


def test_a_summary_holds_the_keys_of_metrics_json_with_the_values_of_the_functions():
    y, _, p = random_case(6)
    yhat = p.argmax(1)
    out = M.summary(y, p)
    assert list(out) == KEYS and json.loads(json.dumps(out)) == out
    assert out == {"n": 40, "accuracy": M.accuracy(y, yhat), "balanced_accuracy": M.balanced_accuracy(y, yhat), "nll": M.nll(y, p),
                   "f1_macro": M.f1_macro(y, yhat), "auroc": M.auroc(y, p), "ece": M.ece(y, p),
                   "kappa_quadratic": M.cohen_kappa(y, yhat, "quadratic"), "aurc": M.aurc(y == yhat, 1 - p.max(1))}


def test_a_summary_takes_the_methods_own_decision_and_uncertainty():
    y, vote, p = random_case(7)
    uncertainty = np.random.default_rng(0).random(40)
    out, default = M.summary(y, p, uncertainty, yhat=vote), M.summary(y, p)
    assert out["accuracy"] == M.accuracy(y, vote) != default["accuracy"] and out["aurc"] == M.aurc(y == vote, uncertainty)
    assert out["nll"] == default["nll"] and out["auroc"] == default["auroc"]


def test_a_summary_has_intervals_when_asked_by_patient_if_groups_are_given():
    y, _, p = random_case(8)
    out = M.summary(y, p, ci=50)
    assert set(out["ci95"]) == {"accuracy", "f1_macro", "auroc", "balanced_accuracy"} and json.loads(json.dumps(out)) == out
    assert all(low <= out[name] <= high for name, (low, high) in out["ci95"].items())
    grouped = M.summary(y, p, ci=50, groups=np.arange(40) // 5)["ci95"]["auroc"]
    assert grouped == list(M.bootstrap_ci(M.auroc, y, p, n=50, groups=np.arange(40) // 5)) != out["ci95"]["auroc"]


def test_a_multi_label_summary_is_the_mean_of_its_labels_and_counts_those_with_an_auroc():
    y, p = random_multilabel(1)
    y[:, 2] = 0                                                  # no image shows the third finding
    out = M.summary(y, p, ci=20)
    assert out["auroc_labels"] == 2 and np.isnan(out["per_label"]["auroc"][2])
    assert list(out["per_label"]) == KEYS[1:] and set(out["ci95"]) == {"accuracy", "f1_macro", "auroc", "balanced_accuracy"}
    for name, values in out["per_label"].items():
        assert len(values) == 3 and out[name] == pytest.approx(np.nanmean(values), abs=1e-12)
    one = M.aurc(y[:, 0] == (p[:, 0] >= 0.5), 1 - np.maximum(p[:, 0], 1 - p[:, 0]))
    assert out["per_label"]["aurc"][0] == one and out["per_label"]["auroc"][0] == M.auroc(y[:, 0], p[:, 0])


def test_a_metric_leaves_its_input_as_it_was():
    y, yhat, p = random_case(9)
    before = y.copy(), yhat.copy(), p.copy()
    M.summary(y, p, ci=5, yhat=yhat)
    assert all(np.array_equal(a, b) for a, b in zip(before, (y, yhat, p)))


def test_of_answers_that_are_all_right_nothing_is_made_surer():
    p = np.array([[.6, .4], [.3, .7], [.55, .45]])
    assert M.sharpness([0, 1, 0], p) == 1 and M.sharpness(np.array([0, 1, 1]), p) != 1


def test_sharpness_finds_the_temperature_that_was_applied():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (4000, 4))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = (p.cumsum(1) > rng.random((4000, 1))).argmax(1)
    blunt = p ** .4 / (p ** .4).sum(1, keepdims=True)
    assert M.sharpness(y, p) == pytest.approx(1, abs=.06)
    assert M.sharpness(y, blunt) == pytest.approx(2.5, abs=.15)
    grid = np.exp(np.linspace(np.log(.05), np.log(20), 2000))
    scores = [M.nll(y, blunt ** b / (blunt ** b).sum(1, keepdims=True)) for b in grid]
    assert M.sharpness(y, blunt) == pytest.approx(grid[np.argmin(scores)], rel=.005)


# ----------------------------------------------------------------------------------------------- boxes
@pytest.mark.parametrize("box", [(0, 0, 3, 2), (1, 2, 4, 5), (0, 0, 7, 5), (2, 1, 2, 4), (3, 3, 1, 5), (-2, -3, 2, 2), (5, 3, 99, 99), (8, 0, 9, 2),
                                 (1.5, .2, 3.5, 2)])
def test_a_box_mask_equals_a_double_loop(box):
    x0, y0, x1, y1 = box                                          # empty where an end is not behind its start; cut off at the border
    want = [[x0 <= x < x1 and y0 <= y < y1 for x in range(7)] for y in range(5)]
    found = M.box_mask(box, (5, 7))
    assert found.dtype == bool and found.shape == (5, 7) and found.tolist() == want


def test_an_empty_box_covers_nothing_and_one_over_the_border_what_is_inside():
    assert not M.box_mask((3, 1, 3, 4), (6, 6)).any() and not M.box_mask((9, 9, 12, 12), (6, 6)).any()
    assert M.box_mask((4, 5, 9, 9), (6, 6)).sum() == 2 and M.box_mask((-9, -9, 99, 99), (6, 6)).all()


def test_box_masks_of_many_boxes_stand_in_the_order_of_the_boxes():
    boxes = np.random.default_rng(0).integers(0, 9, (2, 3, 4))
    found = M.box_mask(boxes, (8, 9))
    assert found.shape == (2, 3, 8, 9)
    for i, j in itertools.product(range(2), range(3)):
        assert np.array_equal(found[i, j], M.box_mask(boxes[i, j].tolist(), (8, 9)))
    widths, heights = ((boxes[..., k + 2] - boxes[..., k]).clip(0) for k in (0, 1))
    inside = np.minimum(boxes[..., 3], 8) - np.minimum(boxes[..., 1], 8)
    assert np.array_equal(found.sum((2, 3)), widths * inside.clip(0)) and heights.any()


# ---------------------------------------------------------------------------------------------- images
def image_pair(N=2, C=2, H=13, W=15, spread=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (N, C, H, W))
    return x.astype(np.uint8), (x + rng.integers(-spread, spread + 1, x.shape)).clip(0, 255).astype(np.uint8)


def ssim_at(a, b):
    """Of two 11x11 patches, lists of Python numbers: Wang et al. 2004, eq. 13 with the moments of eqs. 14 to 16."""
    places = list(itertools.product(range(11), range(11)))
    w = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for i, j in places}
    total = sum(w.values())
    mean_a, mean_b = (sum(w[i, j] * c[i][j] for i, j in places) / total for c in (a, b))
    var_a, var_b = (sum(w[i, j] * (c[i][j] - m) ** 2 for i, j in places) / total for c, m in ((a, mean_a), (b, mean_b)))
    cov = sum(w[i, j] * (a[i][j] - mean_a) * (b[i][j] - mean_b) for i, j in places) / total
    c1, c2 = 2.55 ** 2, 7.65 ** 2
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))


@pytest.mark.parametrize("H, W", [(13, 15), (11, 11), (11, 14)])
def test_ssim_equals_a_double_loop_over_positions(H, W):
    x, y = image_pair(H=H, W=W)
    each = [ssim_at(x[n, c, i:i + 11, j:j + 11].tolist(), y[n, c, i:i + 11, j:j + 11].tolist())
            for n in range(2) for c in range(2) for i in range(H - 10) for j in range(W - 10)]
    assert M.ssim(x, y) == pytest.approx(np.mean(each), abs=1e-12)


def test_psnr_equals_a_double_loop_and_is_the_mean_of_the_images_own():
    x, y = image_pair()
    each = []
    for a, b in zip(x.tolist(), y.tolist()):
        squares = [(a[c][i][j] - b[c][i][j]) ** 2 for c in range(2) for i in range(13) for j in range(15)]
        each.append(20 * math.log10(255) - 10 * math.log10(sum(squares) / len(squares)))
    assert M.psnr(x, y) == pytest.approx(sum(each) / 2, abs=1e-12) and each[0] != each[1]


@pytest.mark.parametrize("a, b", [(0, 255), (10, 20), (200, 190), (7, 7)])
def test_ssim_of_two_flat_images_is_that_of_their_brightness(a, b):
    x, y = np.full((1, 1, 12, 12), a, np.uint8), np.full((1, 1, 12, 12), b, np.uint8)
    assert M.ssim(x, y) == pytest.approx((2 * a * b + 2.55 ** 2) / (a * a + b * b + 2.55 ** 2), abs=1e-9)


def test_ssim_is_one_of_equal_images_the_same_both_ways_and_falls_with_noise_and_for_a_negative():
    x, _ = image_pair()
    little, much = image_pair(spread=20)[1], image_pair(spread=90)[1]
    assert M.ssim(x, x) == pytest.approx(1, abs=1e-12) and M.ssim(x, little) == pytest.approx(M.ssim(little, x), abs=1e-12)
    assert 1 > M.ssim(x, little) > M.ssim(x, much) > M.ssim(x, 255 - x) and M.ssim(x, 255 - x) < 0


def test_psnr_of_a_grey_level_everywhere_is_48_decibels_and_uint8_does_not_wrap_around():
    x = np.full((3, 1, 4, 4), 254, np.uint8)
    assert M.psnr(x, x + np.uint8(1)) == M.psnr(x + np.uint8(1), x) == pytest.approx(48.1308, abs=1e-4)
    assert M.psnr(x * 0, x * 0 + np.uint8(255)) == 0


def test_psnr_leaves_out_pairs_of_equal_images_and_is_nan_where_all_are():
    x, y = image_pair(N=3)
    one = M.psnr(x[1:2], y[1:2])
    y[[0, 2]] = x[[0, 2]]
    assert M.psnr(x, y) == one and np.isnan(M.psnr(x, x))


@pytest.mark.parametrize("metric", [M.psnr, M.ssim])
def test_images_that_are_not_two_stacks_of_uint8_of_one_shape_are_refused(metric):
    x, y = image_pair()
    for a, b in ((x / 255, y), (x, y.astype(np.float32)), (x[0], y[0]), (x, y[:1]), (x[:0], y[:0]), (x.astype(np.int64), y)):
        with pytest.raises(ValueError, match="^x and y must be uint8"):
            metric(a, b)


@pytest.mark.parametrize("H, W", [(10, 11), (20, 10)])
def test_ssim_refuses_images_smaller_than_its_window(H, W):
    with pytest.raises(ValueError, match=f"^x and y are images of {H}x{W}, the sides must be 11 or more$"):
        M.ssim(*image_pair(H=H, W=W))
