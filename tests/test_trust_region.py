"""Conjugate gradient and Hessian-vector products against dense linear algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_helpers.trust_region import conjugate_gradient, hessian_vector_product

modest = settings(max_examples=30, deadline=None, derandomize=True)


def positive_definite(size, seed=0):
    """A symmetric positive definite matrix and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.5 * torch.eye(size, dtype=torch.float64), torch.randn(
        size, generator=generator, dtype=torch.float64
    )


def krylov_minimiser(a, b, steps):
    """The point of span{b, Ab, ..., A^(steps-1) b} with the smallest error in the A-norm, by dense
    algebra."""
    a, b = a.numpy(), b.numpy()
    vectors = [b / np.linalg.norm(b)]
    for _ in range(steps - 1):
        vectors.append(a @ vectors[-1] / np.linalg.norm(a @ vectors[-1]))
    basis, _ = np.linalg.qr(np.stack(vectors, axis=1))
    return basis @ np.linalg.solve(basis.T @ a @ basis, basis.T @ b)


# conjugate_gradient


@pytest.mark.parametrize("curvature", [0.0, -1.0, torch.nan, torch.inf])
def test_a_direction_without_curvature_is_refused(curvature):
    """Where v·Av is no positive number there is no minimum to step to; 0 would divide by zero."""
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="not positive definite"):
        conjugate_gradient(lambda v: curvature * v, b)


@pytest.mark.equation("eq:conjugate-gradient")
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_conjugate_gradient_solves_the_system(size):
    """Oracle: torch.linalg.solve; in exact arithmetic as many iterations as unknowns are enough."""
    a, b = positive_definite(size)
    found = conjugate_gradient(lambda x: a @ x, b, iterations=size + 2, tolerance=1e-24)
    torch.testing.assert_close(found, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-10)


@pytest.mark.equation("eq:conjugate-gradient")
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_each_iterate_is_the_best_of_its_krylov_space(iterations):
    """Oracle: a dense NumPy solve in the span of b, Ab, ..., which is what k conjugate-gradient
    steps must give."""
    a, b = positive_definite(6, seed=1)
    found = conjugate_gradient(lambda x: a @ x, b, iterations)
    np.testing.assert_allclose(
        found.numpy(), krylov_minimiser(a, b, iterations), rtol=1e-8, atol=1e-10
    )


@pytest.mark.equation("eq:conjugate-gradient")
def test_two_distinct_eigenvalues_need_two_iterations():
    """Oracle: the theory of the method, and division by the diagonal."""
    diagonal = torch.tensor([2.0, 2.0, 5.0, 5.0, 5.0, 2.0], dtype=torch.float64)
    b = torch.arange(1.0, 7.0, dtype=torch.float64)
    one, two = (conjugate_gradient(lambda x: diagonal * x, b, iterations=k) for k in (1, 2))
    torch.testing.assert_close(two, b / diagonal, rtol=1e-12, atol=1e-12)
    assert (one - b / diagonal).abs().max() > 0.1


@pytest.mark.equation("eq:conjugate-gradient")
@pytest.mark.parametrize("tolerance", [1.0, 1e-1, 1e-2, 1e-4])
def test_it_stops_when_the_squared_residual_falls_below_the_tolerance(tolerance):
    """Oracle: residuals of the dense Krylov iterates; the first whose r.r is below the tolerance is
    returned."""
    a, b = positive_definite(8, seed=2)
    iterates = [krylov_minimiser(a, b, k) for k in range(1, 9)]
    squares = [np.sum((b.numpy() - a.numpy() @ x) ** 2) for x in iterates]
    first = next(k for k, square in enumerate(squares) if square < tolerance)
    found = conjugate_gradient(lambda x: a @ x, b, iterations=8, tolerance=tolerance)
    np.testing.assert_allclose(found.numpy(), iterates[first], rtol=1e-6, atol=1e-8)


def test_iterations_bound_the_number_of_products():
    """Oracle: a counter in the product."""
    a, b = positive_definite(8)
    calls = []

    def product(x):
        calls.append(x.shape)
        return a @ x

    conjugate_gradient(product, b, iterations=3)
    assert calls == [(8,)] * 3


def test_a_zero_right_hand_side_gives_zero():
    """Oracle: the solution of A x = 0; a step length of 0 / 0 would be NaN."""
    found = conjugate_gradient(lambda x: 2 * x, torch.zeros(3, dtype=torch.float64))
    assert found.tolist() == [0.0, 0.0, 0.0]


@modest
@given(
    root=hnp.arrays(np.float64, (4, 4), elements=st.floats(-3, 3)),
    b=hnp.arrays(np.float64, (4,), elements=st.floats(-10, 10)),
)
def test_conjugate_gradient_solves_any_well_conditioned_system(root, b):
    """Oracle: torch.linalg.solve on drawn matrices R R^T + I."""
    a, b = torch.from_numpy(root @ root.T + np.eye(4)), torch.from_numpy(b)
    found = conjugate_gradient(lambda x: a @ x, b, iterations=20, tolerance=1e-20)
    torch.testing.assert_close(found, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-6)


# hessian_vector_product


def two_parameters():
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(8, generator=generator, dtype=torch.float64)
    return matrix, bias, vector


def scalar(matrix, bias):
    """Neither quadratic nor separable, so that every block of the Hessian is full and depends on
    the point."""
    return (
        torch.tanh(matrix @ torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64) + bias).pow(3).sum()
        * bias.exp().sum()
    )


def dense_hessian(function, *parameters):
    sizes = [p.numel() for p in parameters]

    def flat(theta):
        return function(
            *[x.reshape(p.shape) for x, p in zip(theta.split(sizes), parameters, strict=True)]
        )

    return torch.func.hessian(flat)(torch.cat([p.detach().flatten() for p in parameters]))


@pytest.mark.equation("eq:hessian-vector")
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_product_equals_the_dense_hessian_times_the_vector(damping):
    """Oracle: torch.func.hessian over the concatenated parameters, plus damping on its diagonal."""
    matrix, bias, vector = two_parameters()
    dense = dense_hessian(scalar, matrix, bias) + damping * torch.eye(8, dtype=torch.float64)
    found = hessian_vector_product(lambda: scalar(matrix, bias), [matrix, bias], vector, damping)
    torch.testing.assert_close(found, dense @ vector, rtol=1e-11, atol=1e-12)


@pytest.mark.equation("eq:hessian-vector")
def test_parameters_keep_their_order():
    """Oracle: the same dense Hessian with its two blocks exchanged."""
    matrix, bias, vector = two_parameters()
    dense = dense_hessian(lambda b, m: scalar(m, b), bias, matrix)
    found = hessian_vector_product(lambda: scalar(matrix, bias), [bias, matrix], vector)
    torch.testing.assert_close(found, dense @ vector, rtol=1e-11, atol=1e-12)


@pytest.mark.equation("eq:hessian-vector")
def test_product_equals_finite_differences_of_the_gradient():
    """Oracle: (grad f(x + h v) - grad f(x - h v)) / 2h."""
    _, bias, vector = two_parameters()
    vector, step = vector[:2], 1e-5

    def function(b):
        return (b.pow(4).sum() + b.prod()).exp() / 10

    def slope(point):
        point = point.detach().requires_grad_()
        return torch.autograd.grad(function(point), point)[0]

    expected = (slope(bias + step * vector) - slope(bias - step * vector)) / (2 * step)
    found = hessian_vector_product(lambda: function(bias), [bias], vector)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.equation("eq:hessian-vector")
@pytest.mark.equation("eq:conjugate-gradient")
def test_natural_gradient_of_a_softmax():
    """Oracle: torch.linalg.solve with the closed-form Fisher matrix diag(p) - p p^T + damping."""
    logits = torch.tensor([0.5, -1.0, 0.2, 1.1], dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, -1).detach()
    gradient = torch.tensor([0.3, -0.1, 0.4, -0.6], dtype=torch.float64)

    def kl():
        return (log_p.exp() * (log_p - torch.log_softmax(logits, -1))).sum()

    found = conjugate_gradient(
        lambda v: hessian_vector_product(kl, [logits], v, damping=0.05), gradient
    )
    fisher = torch.diag(log_p.exp()) - torch.outer(log_p.exp(), log_p.exp())
    expected = torch.linalg.solve(fisher + 0.05 * torch.eye(4, dtype=torch.float64), gradient)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("damping", "expected"), [(0.0, [0.0, 0.0, 3.0]), (0.5, [0.5, 1.0, 4.5])])
def test_parameters_without_curvature_contribute_only_the_damping(damping, expected):
    """Oracle: by hand: f = 3 u + y^2 / 2 does not contain x; H = diag(0, 0, 1), v = (1, 2, 3)."""
    x, u, y = (torch.tensor([1.0], dtype=torch.float64, requires_grad=True) for _ in range(3))
    vector = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = hessian_vector_product(lambda: (3 * u + y**2 / 2).sum(), [x, u, y], vector, damping)
    assert found.tolist() == expected


def test_a_linear_function_has_no_curvature():
    """Oracle: the Hessian of a linear function is zero."""
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = hessian_vector_product(lambda: 3 * x.sum(), [x], torch.ones(2, dtype=torch.float64))
    assert found.tolist() == [0.0, 0.0]


def test_a_product_can_be_taken_inside_no_grad():
    """Oracle: the Hessian of x^3 at 2 is 12."""
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        found = hessian_vector_product(
            lambda: x.pow(3).sum(), [x], torch.ones(1, dtype=torch.float64)
        )
    assert found.tolist() == [12.0]


@pytest.mark.parametrize("shape", [(7,), (9,), (1,), (2, 4)])
def test_a_vector_of_another_shape_is_named(shape):
    """Oracle: the specification: one flat tensor as long as all parameters; the message names the
    argument."""
    matrix, bias, _ = two_parameters()
    with pytest.raises(ValueError, match="vector"):
        hessian_vector_product(
            lambda: scalar(matrix, bias), [matrix, bias], torch.zeros(shape, dtype=torch.float64)
        )


def test_inputs_are_left_as_they_were():
    """Oracle: copies made before the calls; no gradient is stored and the result asks for none."""
    matrix, bias, vector = two_parameters()
    a, b = positive_definite(4)
    before = [x.detach().clone() for x in (matrix, bias, vector, a, b)]
    found = hessian_vector_product(lambda: scalar(matrix, bias), [matrix, bias], vector, 0.1)
    conjugate_gradient(lambda x: a @ x, b)
    after = (matrix, bias, vector, a, b)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert matrix.grad is None
    assert bias.grad is None
    assert not found.requires_grad


def test_no_graph_comes_out():
    """Oracle: autograd's own bookkeeping, for a right-hand side and a product that have graphs."""
    a, b = positive_definite(4)
    weight = a.clone().requires_grad_()
    found = conjugate_gradient(lambda v: weight @ v, b.clone().requires_grad_())
    assert not found.requires_grad
    matrix, bias, vector = two_parameters()
    vector.requires_grad_()
    found = hessian_vector_product(lambda: scalar(matrix, bias), [matrix, bias], vector, 0.1)
    assert not found.requires_grad
    assert vector.grad is None
