"""Best of n: sample n responses to each prompt and keep the one that the reward likes best.

Nothing is trained. Where all responses can be listed, `worlds.enumerable.best_of_n` has the exact
distribution of the one that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import conversations, rewards
from rlhf_helpers._validate import (
    check_model,
    check_some,
    check_tokenizer,
    finite,
    floats,
    in_range,
    same_shape,
)
from rlhf_helpers.algorithms.sampling import respond


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        n: responses per prompt, of which one is kept.
        max_new_tokens: the longest response.
        temperature: of the sampling.
        seed: of the sampling.
    """

    n: int = 16
    max_new_tokens: int = 48
    temperature: float = 1.0
    seed: int = 0


class Best(NamedTuple):
    """The response that is kept for each of B prompts."""

    texts: list[str]  # B; one without an end is a `models.Cut`
    scores: Tensor  # [B], of the kept ones
    all_scores: Tensor  # [B, n], of all that were sampled


def choose(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    config: Config,
    columns: Mapping[str, Sequence] | None = None,
) -> Best:
    """The best of n responses to each prompt; of equally good ones the first.

    Args:
        policy: a causal language model.
        prompts: B texts or conversations.
        reward: judges each response.
        columns: what else the reward takes, B entries each.
    Raises: ValueError on a setting out of range, no prompts, and as `rewards.score`.
    """
    check_model(policy, "policy")
    check_tokenizer(tokenizer)
    check_some(prompts, "prompts", "texts or conversations")
    in_range(config.n, "n", 1)
    device = next(policy.parameters()).device
    luck = torch.Generator(device).manual_seed(config.seed)
    found = respond(
        policy,
        tokenizer,
        prompts,
        reward,
        luck,
        config.n,
        config.max_new_tokens,
        config.temperature,
        columns,
    )
    scores = found.scores.view(len(prompts), config.n)
    best = scores.argmax(1)
    texts = [found.texts[i * config.n + j] for i, j in enumerate(best.tolist())]
    return Best(texts, scores.gather(1, best[:, None]).squeeze(1), scores)


def expected_best(scores: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    """What the best of n is worth on average, from m ≥ n samples of each prompt.

    Equation: eq:expected-best

    The mean over all sets of n of the m samples. In the order of the scores, the i-th is the best
    of C(i − 1, n − 1) of the C(m, n) sets. This is unbiased, and uses every sample.

    Args:
        scores: [B, m], by which the best is chosen; equal ones are chosen with equal chances.
        n: 1 to m.
        values: [B, m], what is averaged, such as the true quality; the scores if None.
    Returns: [B], float64.
    Raises: ValueError on other shapes, a number that is not finite, an n out of range.
    Source: Nakano et al. 2021, "WebGPT: Browser-assisted question-answering with human feedback",
        appendix I.
    """
    _check_scores(scores)
    m = scores.shape[1]
    in_range(n, "n", 1, m)
    values = scores if values is None else values
    same_shape(scores=scores, values=values)
    finite(values, "values")
    sets = [math.comb(i, n - 1) / math.comb(m, n) for i in range(m)]
    weights = torch.tensor(sets, dtype=torch.float64, device=scores.device)
    order = scores.argsort(dim=1, stable=True)
    among_equals = _mean_of_equals(weights.expand_as(scores), scores.gather(1, order))
    return (among_equals * values.double().gather(1, order)).sum(1)


def kl(scores: Tensor, n: int) -> Tensor:
    """KL(best of n‖policy) of each prompt in nats, estimated from the scores of m samples.

    Equation: eq:best-of-n-kl

    Only how the scores are distributed counts: a score that a share p of the samples has, and that
    a share F reaches at most, is the best with probability F^n − (F − p)^n. With the true shares
    this is exact, ties or not; with those of m samples it is somewhat low unless n is far below m.

    Args:
        scores: [B, m].
        n: ≥ 1.
    Returns: [B], float64, at most `kl_bound(n)`.
    Raises: ValueError on another shape, a number that is not finite, an n out of range.
    Source: Beirami et al. 2024, "Theoretical Guarantees on the Best-of-n Alignment Policy",
        section 3.
    """
    _check_scores(scores)
    in_range(n, "n", 1)
    found = []
    for row in scores.detach().double():
        _, counts = row.unique(return_counts=True)
        share = counts.double() / len(row)
        at_most = share.cumsum(0).clamp(max=1.0)
        below = torch.cat([at_most.new_zeros(1), at_most[:-1]])
        chosen = at_most**n - below**n
        found.append(torch.special.xlogy(chosen, chosen / share).sum())
    return torch.stack(found)


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n nats: no best of n is farther from its policy.

    It is reached where no two responses have the same score.

    Args:
        n: ≥ 1.
    Raises: ValueError on an n out of range.
    Source: Beirami et al. 2024, "Theoretical Guarantees on the Best-of-n Alignment Policy",
        theorem 1.
    """
    in_range(n, "n", 1)
    return math.log(n) - (n - 1) / n


def _mean_of_equals(weights: Tensor, scores: Tensor) -> Tensor:
    """Weights [B, m] averaged over neighbours with the same score."""
    new = torch.ones_like(scores, dtype=torch.long)
    new[:, 1:] = (scores[:, 1:] != scores[:, :-1]).long()
    level = new.cumsum(1) - 1
    total = torch.zeros_like(weights).scatter_add(1, level, weights)
    count = torch.zeros_like(weights).scatter_add(1, level, torch.ones_like(weights))
    return total.gather(1, level) / count.gather(1, level)


def _check_scores(scores: Tensor) -> None:
    floats(scores=scores)
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; pass a non-empty [B, m]")
    finite(scores, "scores")
