"""Bandits whose best possible reward is known in closed form.

A batch is one call: actions of any shape are pulled at once. Noise comes from the generator that
is passed in, so a run is repeated by repeating its seed. Tensors are float64: printed results do
not depend on the CPU's kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.spatial import ConvexHull
from torch import Tensor

from rlhf_helpers._validate import check_generator, check_seed, finite, floats, in_range, integers


@dataclass(frozen=True)
class GaussianBandit:
    """K arms; arm a pays a normal reward with mean `means[a]` and standard deviation `noise_std`.

    Args:
        means: [K], or [R, K] for R bandits played side by side.
        noise_std: the standard deviation (not the variance) of one pull, ≥ 0.
    Raises: ValueError on no arms, means that are not finite, a negative noise_std.
    """

    means: Tensor
    noise_std: float = 1.0

    def __post_init__(self) -> None:
        floats(means=self.means)
        if self.means.dim() not in (1, 2) or self.means.shape[-1] == 0:
            raise ValueError(
                f"means has shape {tuple(self.means.shape)}; pass [arms] or [bandits, arms]"
            )
        finite(self.means, "means")
        in_range(self.noise_std, "noise_std", 0.0)

    def pull(self, actions: Tensor, generator: torch.Generator) -> Tensor:
        """Reward of each pull. actions: integers, [N] (or [R, N] for R bandits) -> rewards of that
        shape."""
        _check_actions(actions, self.means.shape[-1])
        check_generator(generator)
        if self.means.dim() == 2 and actions.shape[:-1] != self.means.shape[:-1]:
            raise ValueError(
                f"actions has shape {tuple(actions.shape)}; pass [{len(self.means)}, pulls], a row"
                " for each bandit"
            )
        mean = self.means[actions] if self.means.dim() == 1 else self.means.gather(-1, actions)
        return mean + self.noise_std * torch.randn(
            actions.shape, generator=generator, dtype=mean.dtype
        )

    def optimal_value(self) -> Tensor:
        """Mean of the best arm: what the best policy earns a pull. Scalar, or [R]."""
        return self.means.max(-1).values

    def expected_reward(self, logits: Tensor) -> Tensor:
        """J(θ) = Σ_a π(a)·μ_a of the softmax policy with these logits [..., K] -> [...].
        Differentiable."""
        _check_logits(logits, self.means.shape[-1])
        return (logits.softmax(-1) * self.means).sum(-1)

    def gradient(self, logits: Tensor) -> Tensor:
        """Exact ∇J of the softmax policy: π(k)·(μ_k − J) for logit k. logits [..., K] -> [..., K].

        Equation: eq:bandit-gradient

        Source: Sutton and Barto 2018, "Reinforcement Learning", section 2.8.
        """
        advantages = self.means - self.expected_reward(logits).unsqueeze(-1)
        return logits.softmax(-1) * advantages

    def gradient_variance(self, logits: Tensor, baseline: float | Tensor = 0.0) -> Tensor:
        """Variance, logit by logit, of the one-sample estimate (r − b)·∇ log π(a) of ∇J. logits
        [K] -> [K].

        Equation: eq:gradient-variance

        A mean over N independent samples has 1/N of it. The sum over the logits is the total
        variance.

        Args:
            logits: [K].
            baseline: b, the same for every action.
        Raises: ValueError unless there is one bandit and logits is [K].
        Source: the definition of the variance; compare Greensmith, Bartlett and Baxter 2004,
            "Variance Reduction Techniques for Gradient Estimates in Reinforcement Learning",
            section 3.
        """
        floats(logits=logits)
        if self.means.dim() != 1 or logits.shape != self.means.shape:
            raise ValueError(f"logits has shape {tuple(logits.shape)}; pass [arms] for one bandit")
        if isinstance(baseline, Tensor) and baseline.numel() != 1:
            raise ValueError(f"baseline has shape {tuple(baseline.shape)}; pass one number")
        in_range(
            baseline.item() if isinstance(baseline, Tensor) else baseline, "baseline", -math.inf
        )
        probs = logits.softmax(-1)
        score = torch.eye(len(probs), dtype=probs.dtype) - probs  # row a: ∇ log π(a)
        second_moment = (self.means - baseline).square() + self.noise_std**2
        return (probs * second_moment) @ score.square() - self.gradient(logits).square()


@dataclass(frozen=True)
class LinearBandit:
    """A contextual bandit: in context x, arm a pays w_a·x plus normal noise; contexts are standard
    normal, or such numbers mixed.

    Args:
        weights: [K, D], one row an arm.
        noise_std: the standard deviation (not the variance) of one pull, ≥ 0.
        mixing: [D, D]; a context is z·mixing with z standard normal. None leaves z as it is.
    Raises: ValueError on a wrong shape, weights or a mixing that are not finite, a negative
        noise_std.
    """

    weights: Tensor
    noise_std: float = 1.0
    mixing: Tensor | None = None

    def __post_init__(self) -> None:
        floats(weights=self.weights)
        if self.weights.dim() != 2 or len(self.weights) < 2 or self.weights.shape[1] == 0:
            raise ValueError(
                f"weights has shape {tuple(self.weights.shape)}; pass [arms ≥ 2, context size]"
            )
        finite(self.weights, "weights")
        in_range(self.noise_std, "noise_std", 0.0)
        if self.mixing is not None:
            floats(weights=self.weights, mixing=self.mixing)
            size = self.weights.shape[1]
            if self.mixing.shape != (size, size):
                raise ValueError(
                    f"mixing has shape {tuple(self.mixing.shape)}; pass [{size}, {size}]"
                )
            finite(self.mixing, "mixing")

    def contexts(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Draw contexts: [*shape, D]."""
        for size in shape:
            in_range(size, "shape", 0)
        check_generator(generator)
        drawn = torch.randn(
            *shape, self.weights.shape[1], generator=generator, dtype=self.weights.dtype
        )
        return drawn if self.mixing is None else drawn @ self.mixing

    def mean_rewards(self, contexts: Tensor) -> Tensor:
        """Mean reward of every arm in every context: [..., D] -> [..., K]."""
        self._check_contexts(contexts)
        return contexts @ self.weights.T

    def pull(self, contexts: Tensor, actions: Tensor, generator: torch.Generator) -> Tensor:
        """Reward of one arm in each context. contexts [..., D], actions [...] -> rewards [...]."""
        _check_actions(actions, len(self.weights))
        self._check_contexts(contexts)
        check_generator(generator)
        if contexts.shape[:-1] != actions.shape:
            raise ValueError(
                f"actions has shape {tuple(actions.shape)}, contexts {tuple(contexts.shape)}; pass"
                " one for each context"
            )
        mean = self.mean_rewards(contexts).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return mean + self.noise_std * torch.randn(
            actions.shape, generator=generator, dtype=mean.dtype
        )

    def expected_reward(self, logits: Tensor, contexts: Tensor) -> Tensor:
        """Exact expected reward of the softmax policy in each context: logits [..., K], contexts
        [..., D] -> [...]."""
        _check_logits(logits, len(self.weights))
        means = self.mean_rewards(contexts)
        try:
            torch.broadcast_shapes(logits.shape, means.shape)
        except RuntimeError as error:
            raise ValueError(
                f"logits has shape {tuple(logits.shape)}, contexts {tuple(contexts.shape)}; pass a"
                " row of logits for each context"
            ) from error
        return (logits.softmax(-1) * means).sum(-1)

    def _check_contexts(self, contexts: Tensor) -> None:
        floats(contexts=contexts)
        size, dtype = self.weights.shape[1], self.weights.dtype
        if contexts.shape[-1:] != (size,) or contexts.dtype != dtype:
            raise ValueError(
                f"contexts has shape {tuple(contexts.shape)} and dtype {contexts.dtype}; pass"
                f" [..., {size}] of {dtype}, as the weights"
            )

    def optimal_value(self) -> float:
        """E_x[max_a w_a·x], what the best policy earns a pull, in closed form; for contexts in the
        plane (D = 2).

        Equation: eq:linear-optimum

        The maximum over arms is the support function of the polygon that the arms span. Its
        integral over all directions is the polygon's perimeter L, and a standard normal context
        has mean length √(π/2), which gives L / (2·√(2π)).

        Raises: ValueError unless D = 2, or if contexts are mixed.
        Source: Cauchy's perimeter formula, e.g. Santaló 2004, "Integral Geometry and Geometric
            Probability", chapter I.1.
        """
        if self.weights.shape[1] != 2:
            raise ValueError(
                f"weights has {self.weights.shape[1]} columns; the closed form needs contexts"
                " with 2"
            )
        if self.mixing is not None:
            raise ValueError("mixing is set; the closed form needs standard normal contexts")
        if torch.linalg.matrix_rank(self.weights - self.weights[0]) < 2:
            perimeter = (
                2 * torch.pdist(self.weights).max().item()
            )  # all arms on one line: walked there and back
        else:
            perimeter = ConvexHull(
                self.weights.numpy()
            ).area  # in the plane, SciPy's "area" is the perimeter
        return perimeter / (2 * math.sqrt(2 * math.pi))


def ten_arms(
    runs: int = 1, offset: float = 0.0, noise_std: float = 1.0, seed: int = 0
) -> GaussianBandit:
    """`runs` bandits of ten arms each, whose means are drawn from N(offset, 1): the ten-armed
    testbed. means [R, 10].

    Raises: ValueError if runs < 1.
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 2.3.
    """
    in_range(runs, "runs", 1)
    in_range(offset, "offset", -math.inf)
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    means = offset + torch.randn(runs, 10, generator=generator, dtype=torch.float64)
    return GaussianBandit(means, noise_std)


def fan(arms: int = 8, noise_std: float = 1.0) -> LinearBandit:
    """A linear bandit in the plane: arm a's weight points at angle 2πa/arms with length 1, so each
    arm owns a sector.

    Raises: ValueError if arms < 2.
    """
    in_range(arms, "arms", 2)
    angles = 2 * math.pi * torch.arange(arms, dtype=torch.float64) / arms
    return LinearBandit(torch.stack([angles.cos(), angles.sin()], dim=1), noise_std)


def stretched(
    arms: int = 8, size: int = 8, decades: float = 1.5, noise_std: float = 1.0, seed: int = 0
) -> LinearBandit:
    """A linear bandit that shows its policy badly scaled inputs: some directions are 10^decades
    times as large as others, although all matter equally for the reward.

    Arm a pays u_a·z, with z standard normal and u_a a random direction of length 1. The context is
    x = Mz, with M symmetric, its scales log-spaced from 1 down to 10^−decades along random axes.

    Raises: ValueError if arms < 2, size < 1, decades < 0.
    """
    in_range(arms, "arms", 2)
    in_range(size, "size", 1)
    in_range(decades, "decades", 0.0)
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(arms, size, generator=generator, dtype=torch.float64)
    units /= units.norm(dim=1, keepdim=True)
    random = torch.randn(size, size, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(random).Q
    scales = 10 ** torch.linspace(0, -decades, size, dtype=torch.float64)
    mixing = axes * scales @ axes.T
    return LinearBandit(units @ (axes / scales @ axes.T), noise_std, mixing)


def _check_actions(actions: Tensor, arms: int) -> None:
    integers(actions=actions)
    if actions.numel() and (actions.min() < 0 or actions.max() >= arms):
        raise ValueError(f"actions holds an arm outside [0, {arms})")


def _check_logits(logits: Tensor, arms: int) -> None:
    floats(logits=logits)
    if logits.shape[-1:] != (arms,):
        raise ValueError(f"logits has shape {tuple(logits.shape)}; pass [..., {arms}], one an arm")
