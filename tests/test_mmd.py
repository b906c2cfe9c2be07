"""common/mmd.py against double loops and the closed forms of Gaussians."""
import math

import pytest
import torch

from common.mmd import mmd_polynomial, mmd_rbf


def normal(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rbf_by_loops(x, y, bandwidth):
    def mean_kernel(a, b):
        return sum(math.exp(-sum((u - v) ** 2 for u, v in zip(p, q)) / bandwidth ** 2) for p in a for q in b) / (len(a) * len(b))
    x, y = x.tolist(), y.tolist()
    return mean_kernel(x, x) - 2 * mean_kernel(x, y) + mean_kernel(y, y)


def polynomial_by_loops(x, y):
    def k(p, q):
        return (sum(u * v for u, v in zip(p, q)) / len(p) + 1) ** 3
    def within(a):
        return sum(k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j) / (len(a) * (len(a) - 1))
    x, y = x.tolist(), y.tolist()
    return within(x) - 2 * sum(k(p, q) for p in x for q in y) / (len(x) * len(y)) + within(y)


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (7, 7, 5), (6, 9, 3)])
def test_mmd_rbf_equals_a_double_loop(n, m, d):
    x, y = normal(n, d), normal(m, d, seed=1) + 0.5
    assert mmd_rbf(x, y, 1.7).item() == pytest.approx(rbf_by_loops(x, y, 1.7), abs=1e-12)


@pytest.mark.parametrize("n, m, d", [(2, 2, 1), (7, 7, 5), (6, 9, 3)])
def test_mmd_polynomial_equals_a_double_loop_without_its_diagonal(n, m, d):
    x, y = normal(n, d), normal(m, d, seed=1) + 0.5
    assert mmd_polynomial(x, y).item() == pytest.approx(polynomial_by_loops(x, y), abs=1e-12)


def test_mmd_rbf_of_two_single_points_is_two_minus_twice_the_kernel():
    a, b = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert mmd_rbf(a, b, 5.0).item() == pytest.approx(2 - 2 * math.exp(-1), abs=1e-6)          # |a - b|^2 = 25


def test_the_kernel_at_distance_zero_is_exactly_one():
    far = torch.full((1, 3), 1e4)                                # |a|^2 - 2ab + |b|^2 would be off by units here
    assert mmd_rbf(far, far.clone(), 0.1).item() == 0
    rows = torch.tensor([[1e4, 1.0], [-1e4, 2.0]])               # K = identity within, zero across: 1/2 - 0 + 1
    assert mmd_rbf(rows, torch.zeros(1, 2), 0.1).item() == 1.5


@pytest.mark.parametrize("d, value", [(4, 0.640), (5, 0.690), (7, 0.760)])
def test_the_mean_kernel_of_independent_normals_has_its_closed_form(d, value):
    kernel = [1 - mmd_rbf(a[None], b[None], d) / 2 for a, b in zip(normal(3000, d), normal(3000, d, seed=1))]
    assert (1 + 4 / d ** 2) ** (-d / 2) == pytest.approx(value, abs=5e-4)
    assert sum(kernel).item() / 3000 == pytest.approx(value, abs=0.015)                        # 4 standard errors


def test_the_bias_of_the_v_statistic_at_the_papers_batch_is_a_fiftieth():
    values = torch.stack([mmd_rbf(normal(32, 5, seed), normal(32, 5, 1000 + seed), 5) for seed in range(300)])
    assert values.mean().item() == pytest.approx(2 * (1 - (1 + 4 / 25) ** -2.5) / 32, rel=0.05)      # .0194: the diagonals


def test_the_polynomial_mmd_has_no_bias_and_may_be_negative():
    values = torch.stack([mmd_polynomial(normal(10, 4, seed), normal(10, 4, 1000 + seed)) for seed in range(1000)])
    assert abs(values.mean()) < 4 * values.std() / 1000 ** 0.5 and values.min() < 0


def test_mmd_rbf_of_a_sample_and_itself_in_any_order_is_zero():
    x = normal(32, 5)
    assert mmd_rbf(x, x, 5).item() == 0
    assert abs(mmd_rbf(x, x[torch.randperm(32, generator=torch.Generator().manual_seed(0))], 5).item()) < 1e-15


@pytest.mark.parametrize("seed", range(10))
def test_mmd_rbf_is_not_negative_and_is_symmetric(seed):
    x, y = normal(9, 3, seed), normal(12, 3, seed + 50)
    assert mmd_rbf(x, y, 3).item() > 0
    assert mmd_rbf(x, y, 3).item() == pytest.approx(mmd_rbf(y, x, 3).item(), abs=1e-15)
    assert mmd_polynomial(x, y).item() == pytest.approx(mmd_polynomial(y, x).item(), abs=1e-12)


def test_the_order_of_the_rows_does_not_matter():
    x, y, order = normal(9, 3), normal(12, 3, seed=1), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert mmd_rbf(x[order], y, 3).item() == pytest.approx(mmd_rbf(x, y, 3).item(), abs=1e-15)
    assert mmd_polynomial(x[order], y).item() == pytest.approx(mmd_polynomial(x, y).item(), abs=1e-12)


@pytest.mark.parametrize("mmd", [lambda x, y: mmd_rbf(x, y, 5), mmd_polynomial])
def test_mmd_grows_with_the_shift_of_the_mean(mmd):
    x, y = normal(64, 5), normal(64, 5, seed=1)
    values = [mmd(x, y + shift).item() for shift in (0, 0.5, 1, 2, 4)]
    assert values == sorted(values) and values[-1] > values[0] + 0.5


def test_the_gradient_is_finite_at_coincident_points_and_zero_where_the_samples_are_the_same():
    x = torch.zeros(4, 3, requires_grad=True)
    mmd_rbf(x, torch.zeros(4, 3), 3).backward()                  # the root in a Euclidean distance would give nan here
    assert torch.equal(x.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("mmd", [lambda x, y: mmd_rbf(x, y, 2.0), mmd_polynomial])
def test_the_gradient_is_that_of_finite_differences(mmd):
    x, y = normal(4, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(mmd, (x, y))


def test_with_weight_zero_the_loss_and_its_gradient_are_the_mean_squared_error():
    eps, out = normal(8, 5), normal(8, 5, seed=1)
    out[0] = eps[0]                                              # a distance of zero must not make 0 * nan
    gradients = []
    for weight in (0.0, None):
        a = out.clone().requires_grad_()
        mse = (eps - a).square().mean()
        loss = mse if weight is None else mse + weight * mmd_rbf(eps, a, 5)
        assert loss.item() == mse.item()
        gradients += torch.autograd.grad(loss, a)
    assert torch.equal(*gradients)


def test_descending_the_gradient_moves_one_sample_onto_the_other():
    x, y = (normal(32, 2) + 1.5).requires_grad_(), normal(32, 2, seed=1)
    before = mmd_rbf(x, y, 2).item()
    for _ in range(200):
        x = (x - 10 * torch.autograd.grad(mmd_rbf(x, y, 2), x)[0]).detach().requires_grad_()
    assert mmd_rbf(x, y, 2).item() < 0.02 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mmd", [lambda x, y: mmd_rbf(x, y, 5), mmd_polynomial])
def test_the_dtype_is_kept_and_the_value_is_a_scalar(mmd, dtype):
    value = mmd(normal(8, 5, dtype=torch.float32).to(dtype), normal(6, 5, seed=1, dtype=torch.float32).to(dtype))
    assert value.dtype == dtype and value.shape == ()


@pytest.mark.parametrize("call, word", [
    (lambda: mmd_rbf(torch.zeros(3), torch.zeros(3), 1), "x and y"),
    (lambda: mmd_rbf(torch.zeros(3, 2), torch.zeros(3, 4), 1), "x and y"),
    (lambda: mmd_rbf(torch.zeros(0, 2), torch.zeros(3, 2), 1), "x and y"),
    (lambda: mmd_rbf(torch.zeros(3, 2), torch.zeros(3, 2), 0), "bandwidth"),
    (lambda: mmd_polynomial(torch.zeros(1, 2), torch.zeros(3, 2)), "at least 2 rows")])
def test_bad_input_is_refused_in_a_sentence_that_names_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call()
