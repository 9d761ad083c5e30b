"""Two ways to play a bandit without a policy gradient: estimate each arm's mean, and choose by the
estimates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_helpers._validate import check_seed, has, in_range
from rlhf_helpers.worlds.bandits import GaussianBandit


def epsilon_greedy(
    bandit: GaussianBandit,
    pulls: int,
    epsilon: float = 0.1,
    seed: int = 0,
    untried: float = math.inf,
) -> Tensor:
    """Pull the arm with the best average so far, but with probability ε an arm at random.

    Args:
        bandit: with means [R, K].
        pulls: how many, T.
        epsilon: in [0, 1].
        seed: of the choices and the noise.
        untried: the average of an arm that was never pulled. Infinity: every arm comes once first,
            as in `ucb`, wherever the zero of the rewards lies. Sutton and Barto start at 0.
    Returns: the arms pulled, [R, T].
    Raises: ValueError on epsilon outside [0, 1], pulls < 1, untried NaN, or means that are not
        [R, K].
    Source: Sutton and Barto 2018, "Reinforcement Learning", section 2.4.
    """
    in_range(epsilon, "epsilon", 0.0, 1.0)
    in_range(untried, "untried", -math.inf, infinite=True)
    check_seed(seed)
    runs, arms = _shape(bandit)
    generator = torch.Generator().manual_seed(seed)

    def choose(averages: Tensor, counts: Tensor, step: int) -> Tensor:
        explore = torch.rand(runs, generator=generator) < epsilon
        anywhere = torch.randint(arms, (runs,), generator=generator)
        greedy = averages.masked_fill(counts == 0, untried).argmax(-1)
        return torch.where(explore, anywhere, greedy)

    return _play(bandit, pulls, choose, generator)


def ucb(bandit: GaussianBandit, pulls: int, width: float = 2.0, seed: int = 0) -> Tensor:
    """Pull the arm whose average plus width·√(log t / n_a) is largest; n_a counts its pulls, every
    arm comes once.

    Args:
        bandit: with means [R, K].
        pulls: how many, T.
        width: c ≥ 0, how much doubt is worth.
        seed: of the noise (the choices are deterministic).
    Returns: the arms pulled, [R, T].
    Raises: ValueError on width < 0, pulls < 1, or means that are not [R, K].
    Source: Auer, Cesa-Bianchi and Fischer 2002, "Finite-time Analysis of the Multiarmed Bandit
        Problem"; with c as in Sutton and Barto 2018, equation 2.10.
    """
    in_range(width, "width", 0.0)
    check_seed(seed)
    _shape(bandit)

    def choose(averages: Tensor, counts: Tensor, step: int) -> Tensor:
        bonus = width * (math.log(step + 1) / counts).sqrt()
        return (averages + bonus).masked_fill(counts == 0, math.inf).argmax(-1)

    return _play(bandit, pulls, choose, torch.Generator().manual_seed(seed))


def _play(
    bandit: GaussianBandit,
    pulls: int,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Let `choose` pick an arm from averages and counts [R, K], `pulls` times; returns the arms
    [R, T]."""
    in_range(pulls, "pulls", 1)
    sums = torch.zeros_like(bandit.means)
    counts = torch.zeros_like(bandit.means)
    history = []
    for step in range(pulls):
        averages = sums / counts.clamp(min=1)
        actions = choose(averages, counts, step).unsqueeze(-1)
        sums.scatter_add_(-1, actions, bandit.pull(actions, generator))
        counts.scatter_add_(-1, actions, torch.ones_like(actions, dtype=counts.dtype))
        history.append(actions)
    return torch.cat(history, dim=-1)


def _shape(bandit: GaussianBandit) -> tuple[int, int]:
    has(bandit, "bandit", "a GaussianBandit", "means", "pull")
    if bandit.means.dim() != 2:
        raise ValueError(
            f"bandit has means of shape {tuple(bandit.means.shape)}; pass [runs, arms]"
        )
    runs, arms = bandit.means.shape
    return runs, arms
