"""What the training loops share: what is trained and in which order, the learning rate, what is
said of several updates, what stops a run, and what of it is kept. Names without an underscore are
for the algorithms alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_helpers import rewards
from rlhf_helpers._validate import check_folder, check_list, check_model, check_tokenizer, has
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.rollout import Rollout

# The ratio of an unchanged policy is 1 up to rounding: that of float32 at every token, and in half
# precision, where single tokens are off by tenths of a nat, in the mean over tokens.
RATIO_TOLERANCE = 1e-2
HALF_TOLERANCE = 0.1
_HALF = (torch.float16, torch.bfloat16)


# --- what a loop is given ------------------------------------------------------------------------


def check_given(
    config: Any,
    kind: type,
    model: nn.Module,
    tokenizer: Any,
    folder: Any = None,
    name: str = "policy",
    **lists: Sequence,
) -> None:
    """Raises: TypeError, naming the argument, on a config without the settings of `kind`, on what
    is no model, tokenizer, folder or list; ValueError on a folder without a name, or a file."""
    check_model(model, name)
    check_tokenizer(tokenizer)
    check_settings(config, kind)
    if folder is not None:
        check_folder(folder)
    for key, values in lists.items():
        # a text has a message of its own
        if not isinstance(values, str):
            check_list(values, key)


def check_settings(config: Any, kind: type) -> None:
    """Raises: TypeError on a config without the settings of `kind`."""
    has(config, "config", f"a Config of {kind.__module__}", *kind.__dataclass_fields__)


# --- what is trained, and in which order ---------------------------------------------------------


def check_trainable(model: nn.Module, name: str = "policy", frozen: bool = False) -> None:
    """Raises: ValueError if a model cannot be trained here: all its weights are frozen (unless
    `frozen` allows that); one that is trained is in float16, in which AdamW's ε is 0; or gradient
    checkpointing is on, which has an effect in training mode alone, and here dropout is off."""
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not parameters and not frozen:
        raise ValueError(
            f"{name} has nothing to train: all its weights are frozen; call"
            f" {name}.requires_grad_(True), or give it an adapter"
        )
    for key, parameter in parameters.items():
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} trains {key} in float16, half precision in which AdamW's steps are not"
                " finite; take float32 or bfloat16, or an adapter in float32"
            )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"{name} has gradient checkpointing on, which works in training mode alone, and here"
            f" dropout has to be off; call {name}.gradient_checkpointing_disable() and take"
            " smaller batches"
        )


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
    sampled grows from update to update, so that of the last one is told: an estimate from its
    mini-batch alone, before its step."""
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


def check_weights(**owners: nn.Module | None) -> None:
    """After a step, before it is called good.

    Raises: TrainingStopped on a trained weight that is not finite, naming it.
    """
    for owner, model in owners.items():
        found = {} if model is None else trained_weights(model)
        # asked of all at once, since each answer waits for the device
        if found and not torch.stack([w.isfinite().all() for w in found.values()]).all():
            check_finite(**{f"{owner}.{name}": weight for name, weight in found.items()})


def half_precision(model: nn.Module) -> bool:
    """Whether any of a model's weights is in float16 or bfloat16."""
    return any(parameter.dtype in _HALF for parameter in model.parameters())


def old_log_probs(policy: nn.Module, rollout: Rollout, temperature: float, group: int) -> Tensor:
    """Log-probabilities of what was sampled, [N, C], that those of training can be compared with.

    In float32 the sampler's own. In half precision a token at a time and all at once are rounded
    differently, by tenths of a nat, so they are scored again as training does it.
    """
    if not half_precision(policy):
        return rollout.log_probs
    where = (rollout.tokens, rollout.attention_mask, rollout.completion_mask.shape[1])
    return completion_log_probs(policy, *where, temperature, samples_per_prompt=group)


def check_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, half: bool = False) -> None:
    """Raises: TrainingStopped if the policy that is trained is not yet the one that sampled; `half`
    says that it computes in half precision."""
    differences = (log_probs.detach() - old_log_probs).masked_fill(~mask, 0.0).abs()
    difference = (differences.sum() / mask.sum() if half else differences.max()).item()
    if not difference <= (HALF_TOLERANCE if half else RATIO_TOLERANCE):
        mean = ", in the mean and in half precision" if half else ""
        raise TrainingStopped(
            "first ratio",
            f"before any update the log-probabilities of sampling and of training differ by "
            f"{difference:.3g} nats{mean}, so the ratio is not 1; look for dropout that is on, "
            "another temperature, padding without position ids, or half precision (autocast)",
        )


def as_list(values: Any) -> list:
    """A column of any kind (list, array, Series, tensor, of a data set) as a list of plain
    values."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def as_columns(columns: Mapping[str, Any] | None) -> dict[str, list]:
    """Further columns, each as a list."""
    return {} if columns is None else {name: as_list(v) for name, v in columns.items()}


def check_prompts(prompts: Sequence[str], columns: Mapping[str, Sequence] | None = None) -> None:
    """Raises: ValueError on no prompts, or a column of another length."""
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("prompts must be a list of at least one text")
    if columns is not None:
        has(columns, "columns", "a dictionary of lists", "items", "keys")
    rewards.check_columns({} if columns is None else columns)
    for name, values in ({} if columns is None else columns).items():
        listed = hasattr(values, "__len__") and hasattr(values, "__getitem__")
        if not listed or isinstance(values, str | bytes | Mapping):
            raise ValueError(f"columns[{name!r}] is a {type(values).__name__}; pass a list")
        if len(values) != len(prompts):
            raise ValueError(
                f"columns[{name!r}] has {len(values)} entries for {len(prompts)} prompts; make"
                " them equal"
            )
