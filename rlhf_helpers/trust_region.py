"""Second-order tools without second-order matrices: Hessian-vector products and conjugate
gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_helpers._validate import check_function, has, in_range, tensors


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """Solve A·x = b for a symmetric positive-definite A that is known only through its products
    with vectors.

    Equation: eq:conjugate-gradient

    Args:
        matvec: v [P] -> A·v [P].
        b: [P], finite.
        iterations: products with A at most; P of them solve any A exactly, up to rounding.
        tolerance: stop when the squared residual r·r falls below it.
    Returns: x, [P], without gradient.
    Raises: ValueError on a b that is not one finite vector of float32 or float64, fewer than one
        iteration, a negative tolerance, a matvec of the wrong shape, or a direction along which A
        is not positive definite (add damping) or not finite.
    Source: Hestenes and Stiefel 1952, "Methods of Conjugate Gradients", section 3; used for
        policies by Schulman et al. 2015, "Trust Region Policy Optimization", appendix C.
    """
    check_function(matvec, "matvec", "a function from v to A·v")
    _check_precision(b, "b")
    if b.dim() != 1 or b.numel() == 0 or not torch.isfinite(b).all():
        raise ValueError(
            f"b must be one finite, non-empty vector [P]; it has shape {tuple(b.shape)}"
        )
    in_range(iterations, "iterations", 1)
    in_range(tolerance, "tolerance", 0.0)
    b = b.detach()
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = residual @ residual
    for _ in range(int(iterations)):
        if squared <= tolerance:
            break
        product = matvec(direction)
        tensors(**{"the result of matvec": product})
        product = product.detach()
        if product.shape != b.shape:
            raise ValueError(
                f"matvec returned shape {tuple(product.shape)}; it must keep {tuple(b.shape)}"
            )
        curvature = direction @ product
        if not 0 < curvature < torch.inf:
            raise ValueError(
                f"matvec is not positive definite, or not finite (v·Av = {curvature:.3g}); add"
                " damping"
            )
        step = squared / curvature
        x = x + step * direction
        residual = residual - step * product
        previous, squared = squared, residual @ residual
        direction = residual + (squared / previous) * direction
    return x


def hessian_vector_product(
    scalar_fn: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    vector: Tensor,
    damping: float = 0.0,
) -> Tensor:
    """H·v + damping·v for the Hessian H of a scalar function, by differentiating twice; H is never
    built.

    Equation: eq:hessian-vector

    Args:
        scalar_fn: called without arguments; returns a scalar that depends on the parameters.
        parameters: tensors that require a gradient, P entries in all.
        vector: v, one flat tensor [P], the parameters in order.
        damping: ≥ 0; added to the diagonal.
    Returns: [P], without gradient. A parameter that the function does not depend on has a zero
        row.
    Raises: ValueError if scalar_fn returns no scalar or one that depends on no parameter, on a
        vector of the wrong size or neither float32 nor float64, parameters without gradient, or
        damping < 0.
    Source: Pearlmutter 1994, "Fast Exact Multiplication by the Hessian".
    """
    check_function(scalar_fn, "scalar_fn", "a function without arguments")
    has(parameters, "parameters", "a list of tensors", "__iter__")
    if isinstance(parameters, Tensor):  # its rows would be taken for parameters that go unused
        raise TypeError("parameters is one tensor; put it into a list")
    parameters = list(parameters)
    in_range(damping, "damping", 0.0)
    tensors(**{f"parameters[{i}]": p for i, p in enumerate(parameters)})
    _check_precision(vector, "vector")
    size = sum(p.numel() for p in parameters)
    if size == 0 or not all(p.requires_grad for p in parameters):
        raise ValueError(
            "parameters must hold tensors that require a gradient; call .requires_grad_() on them"
        )
    if vector.shape != (size,):
        raise ValueError(f"vector has shape {tuple(vector.shape)}; the parameters need [{size}]")
    if vector.dtype not in {p.dtype for p in parameters}:
        raise ValueError(f"vector has dtype {vector.dtype}, no parameter has; make them equal")
    with torch.enable_grad():
        scalar = scalar_fn()
        tensors(**{"the result of scalar_fn": scalar})
        if scalar.numel() != 1:
            raise ValueError(
                f"scalar_fn returned shape {tuple(scalar.shape)}; it must return one number"
            )
        if not scalar.requires_grad:
            raise ValueError(
                "scalar_fn returned a constant; it must depend on the parameters (is it detached?)"
            )
        vector = vector.detach()
        gradient = _flat_gradient(scalar, parameters, create_graph=True)
        # the gradient of a linear function is a constant, and its Hessian zero
        linear = not gradient.requires_grad
        product = (
            torch.zeros_like(vector) if linear else _flat_gradient(gradient @ vector, parameters)
        )
    return (product + damping * vector).detach()


def _check_precision(values: Tensor, name: str) -> None:
    """Refuse half precision: in its squares and differences nothing would be left of a residual."""
    tensors(**{name: values})
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} has dtype {values.dtype}; pass float32 or float64")


def _flat_gradient(
    scalar: Tensor, parameters: Sequence[Tensor], create_graph: bool = False
) -> Tensor:
    """Gradient of a scalar with respect to the parameters, as one flat tensor."""
    pieces = torch.autograd.grad(scalar, parameters, create_graph=create_graph, allow_unused=True)
    filled = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, pieces, strict=True)
    ]
    return torch.cat([g.reshape(-1) for g in filled])
