"""What the training loops share: which prompts come next, the learning rate, and what stops a run."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

# the ratio of an unchanged policy is 1 up to the rounding of float32
RATIO_TOLERANCE = 1e-2


def prompt_indices(count: int, iteration: int, config: Any) -> list[int]:
    """Which prompts iteration 0, 1, … takes: the next ones of a random order, a new order for each
    pass; it depends on the settings alone, so that a run can go on anywhere."""
    found: list[int] = []
    for place in range(iteration * config.prompts, (iteration + 1) * config.prompts):
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + place // count)
        found.append(int(torch.randperm(count, generator=generator)[place % count]))
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def learning_rate_at(step: int, steps: int, highest: float, warm_up: float) -> float:
    """Learning rate of step 0, 1, …, steps − 1: up in a straight line, then down to 0."""
    rising = warm_up * steps
    up = (step + 1) / rising if rising > 0 else math.inf
    down = (steps - step) / max(1.0, steps - rising)
    return highest * min(1.0, up, down)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, steps: int, warm_up: float
) -> None:
    """Each group's rate, from its highest."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, steps, group["highest"], warm_up)


class TrainingStopped(RuntimeError):
    """A run that could not go on to any good. `name` says why, in a word or two."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingStopped(
                "not finite",
                f"{name} holds a NaN or an infinity; lower learning_rate or max_grad_norm, and go on "
                "from an earlier checkpoint",
            )


def check_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> None:
    difference = (log_probs.detach() - old_log_probs).masked_fill(~mask, 0.0).abs().max().item()
    if not difference <= RATIO_TOLERANCE:
        raise TrainingStopped(
            "first ratio",
            f"before any update the log-probabilities of sampling and of training differ by "
            f"{difference:.3g} nats, so the ratio is not 1; look for dropout that is on, another "
            "temperature, or padding without position ids",
        )
