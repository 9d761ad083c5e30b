"""What the training loops share: what is trained and in which order, the learning rate, what is
said of several updates, what stops a run, and what of it is kept. Names without an underscore are
for the algorithms alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_helpers.checkpoint import Checkpoint

# the ratio of an unchanged policy is 1 up to the rounding of float32
RATIO_TOLERANCE = 1e-2


# --- what is trained, and in which order ---------------------------------------------------------


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient: all of them, or those of an adapter."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The same by name, without gradient."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW on what is trained, without weight decay."""
    return torch.optim.AdamW(trained(model), lr=learning_rate, weight_decay=0.0)


def steps_per_epoch(count: int, config: Any) -> int:
    """How many batches one pass over `count` examples has: a last one that would not be full is
    left out, unless it is the only one."""
    return max(1, count // config.batch_size)


def shuffled(count: int, config: Any) -> Iterator[Tensor]:
    """Indices of the examples of each step: a new random order for each pass."""
    generator = torch.Generator().manual_seed(config.seed)
    whole = steps_per_epoch(count, config) * config.batch_size
    for _ in range(config.epochs):
        yield from torch.randperm(count, generator=generator)[:whole].split(config.batch_size)


def prompt_indices(count: int, iteration: int, config: Any) -> list[int]:
    """Which prompts iteration 0, 1, … takes: the next ones of a random order, a new order for each
    pass; it depends on the settings alone, so that a run can go on anywhere."""
    found: list[int] = []
    for place in range(iteration * config.prompts, (iteration + 1) * config.prompts):
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + place // count)
        found.append(int(torch.randperm(count, generator=generator)[place % count]))
    return found


def picked(columns: Mapping[str, Sequence] | None, indices: Sequence[int]) -> dict[str, list]:
    """The rows of some prompts of each column."""
    return {name: [values[i] for i in indices] for name, values in (columns or {}).items()}


# --- learning rate -------------------------------------------------------------------------------


def learning_rate_at(step: int, steps: int, highest: float, warm_up: float) -> float:
    """Learning rate of step 0, 1, …, steps − 1: up in a straight line, then down to 0."""
    rising = warm_up * steps
    up = (step + 1) / rising if rising > 0 else math.inf
    down = (steps - step) / max(1.0, steps - rising)
    return highest * min(1.0, up, down)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, steps: int, warm_up: float
) -> float:
    """Each group's rate, from its highest: what it has under that name, or else the rate that it
    was made with.

    Returns: that of the first group.
    """
    for group in optimizer.param_groups:
        highest = group.setdefault("highest", group["lr"])
        group["lr"] = learning_rate_at(step, steps, highest, warm_up)
    return optimizer.param_groups[0]["lr"]


# --- what is said of several updates -------------------------------------------------------------


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over updates."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def mean_of_updates(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The same for the updates on one batch, and how many there were. The KL from the policy that
    sampled grows from update to update, so the last one is told."""
    return mean_of(rows) | {"approx_kl": rows[-1]["approx_kl"], "updates": len(rows)}


# --- what stops a run ----------------------------------------------------------------------------


class TrainingStopped(RuntimeError):
    """A run that could not go on to any good. `name` says why, in a word or two."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def check_finite(**tensors: Tensor) -> None:
    """Raises: TrainingStopped on a NaN or an infinity, naming what holds it."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingStopped(
                "not finite",
                f"{name} holds a NaN or an infinity; lower learning_rate or max_grad_norm, and go"
                " on from an earlier checkpoint",
            )


def check_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> None:
    """Raises: TrainingStopped if the policy that is trained is not yet the one that sampled."""
    difference = (log_probs.detach() - old_log_probs).masked_fill(~mask, 0.0).abs().max().item()
    if not difference <= RATIO_TOLERANCE:
        raise TrainingStopped(
            "first ratio",
            f"before any update the log-probabilities of sampling and of training differ by "
            f"{difference:.3g} nats, so the ratio is not 1; look for dropout that is on, another "
            "temperature, or padding without position ids",
        )


def check_prompts(prompts: Sequence[str], columns: Mapping[str, Sequence] | None = None) -> None:
    """Raises: ValueError on no prompts, or a column of another length."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    for name, values in (columns or {}).items():
        if len(values) != len(prompts):
            raise ValueError(
                f"columns[{name!r}] has {len(values)} entries for {len(prompts)} prompts; make"
                " them equal"
            )


# --- a run that goes on --------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A short name of anything that JSON can hold: the same value, the same name."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def state_of(run: Any, weights: Any, **further: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a run: trained weights, optimizer, generators and history.

    Args:
        run: with optimizer, sampling, order and history.
        weights: what is trained, by name, nested as you like.
        further: what else the algorithm needs to go on.
    """
    return {
        "weights": weights,
        "optimizer": run.optimizer.state_dict(),
        "sampling": run.sampling.get_state(),
        "order": run.order.get_state(),
        "history": [list(metrics) for metrics in run.history],
    } | further


@torch.no_grad()
def restore(run: Any, weights: Any, found: Checkpoint, metrics: type) -> None:
    """Put back what `state_of` kept, apart from `further`; metrics is the type of the history."""
    _copy(weights, found.state["weights"])
    run.optimizer.load_state_dict(found.state["optimizer"])
    run.sampling.set_state(found.state["sampling"])
    run.order.set_state(found.state["order"])
    run.history = [metrics(*values) for values in found.state["history"]]


def _copy(weights: Any, stored: Any) -> None:
    for name, value in weights.items():
        if isinstance(value, Tensor):
            value.copy_(stored[name])
        else:
            _copy(value, stored[name])
