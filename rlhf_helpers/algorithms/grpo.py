"""Group relative policy optimisation, from top to bottom: problems, groups, advantages, update,
train.

`policy` is trained. `old` is the policy as it was when the batch was sampled; only its
log-probabilities are kept. `reference`, needed if the KL has a price, is the policy as it was
before the first update. There is no value function: what a sample is measured against are the other
samples of its prompt.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import conversations, models, rewards
from rlhf_helpers._validate import (
    all_equal,
    check_list,
    check_model,
    check_tokenizer,
    in_range,
    one_of,
)
from rlhf_helpers.advantages import (
    ADVANTAGE_SCALES,
    group_relative_advantages,
    leave_one_out_advantages,
)
from rlhf_helpers.algorithms._loop import (
    adamw,
    as_columns,
    as_list,
    check_finite,
    check_given,
    check_prompts,
    check_ratio,
    check_settings,
    check_trainable,
    check_weights,
    half_precision,
    mean_of_updates,
    old_log_probs,
    picked,
    prompt_indices,
    set_learning_rate,
    trained,
    trained_weights,
)
from rlhf_helpers.algorithms._resume import Kept, go_on, keep, look_up, state_of
from rlhf_helpers.algorithms.sampling import check_prompt_lengths, respond
from rlhf_helpers.algorithms.sampling import solve as solve
from rlhf_helpers.logprobs import completion_log_probs, masked_mean
from rlhf_helpers.losses import GRPO_TYPES, IMPORTANCE, grpo_loss

SCALES = (*ADVANTAGE_SCALES, "leave-one-out")
CONSTANT_GROUPS = ("keep", "drop", "resample")
_COUNTS = (
    "iterations",
    "prompts",
    "samples_per_prompt",
    "max_new_tokens",
    "epochs",
    "mini_batches",
    "rounds",
)
_POSITIVE = ("temperature", "learning_rate", "max_grad_norm", "clip")
FORGET = 0.02  # how much of what is known of a kind of prompt each new group of it replaces
EVEN = 0.1  # share of the prompts that a curriculum draws from all kinds alike


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        iterations: batches to collect and learn from.
        prompts: prompts an iteration.
        samples_per_prompt: completions of each, the group; ≥ 2.
        max_new_tokens: the longest completion.
        temperature: of sampling, and of every log-probability.
        epochs: passes over a batch.
        mini_batches: updates a pass; divides `prompts`.
        learning_rate: of AdamW, at its highest.
        warm_up: share of the iterations in which the learning rate rises; it then falls to 0.
        max_grad_norm: a longer gradient is shortened to this.
        scale: what the centred rewards are divided by: "group", "batch" or "none"; or
            "leave-one-out", the reward less the mean of the others.
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo": how tokens are weighed.
        importance: "token" or "sequence". GSPO is "sequence" with loss_type "grpo"; the other loss
            types weigh a sequence's one ratio by its length, and a warning says so.
        clip, clip_high: ε below and above 1; clip_high None means clip.
        beta: price of a nat of KL in the loss; 0 needs no reference.
        bias_correct_kl: whether k3 is multiplied by the ratio.
        constant_groups: what to do with groups whose rewards are all equal, which teach nothing:
            "keep", "drop" (the batch gets smaller), or "resample" (new prompts take their place).
        rounds: of sampling in one iteration at most, with "resample".
        seed: of sampling and of the order of prompts.
    """

    iterations: int = 200
    prompts: int = 32
    samples_per_prompt: int = 8
    max_new_tokens: int = 16
    temperature: float = 1.0
    epochs: int = 1
    mini_batches: int = 1
    learning_rate: float = 7e-4
    warm_up: float = 0.05
    max_grad_norm: float = 1.0
    scale: str = "group"
    loss_type: str = "grpo"
    importance: str = "token"
    clip: float = 0.2
    clip_high: float | None = None
    beta: float = 0.0
    bias_correct_kl: bool = True
    constant_groups: str = "keep"
    rounds: int = 4
    seed: int = 0


# What the chapter changes, by scale.
AT_SCALE = {
    "tiny": {"iterations": 300},
    "gpt2": {"iterations": 100, "learning_rate": 1e-5},
}


class Batch(NamedTuple):
    """N = B·G completions of up to C tokens with their prompts; a group's samples are
    neighbours."""

    tokens: Tensor  # [N, P + C]
    attention_mask: Tensor  # [N, P + C]
    mask: Tensor  # [N, C], True on a completion, its end included
    old_log_probs: Tensor  # [N, C]
    ref_log_probs: Tensor | None  # [N, C]
    rewards: Tensor  # [N]
    advantages: Tensor  # [N]
    ended: Tensor  # [N], whether it came to its end token
    sampled: int  # completions that it took to get this batch


class Metrics(NamedTuple):
    """After one iteration; what is said of the batch was measured before the updates."""

    iteration: int  # from 1
    reward: float  # mean over completions that are kept
    reward_std: float  # within a group, mean over groups
    constant: float  # share of the sampled groups whose rewards are all equal
    sampled: int  # completions sampled in this iteration
    length: float  # tokens, the end included
    length_right: float  # of completions with more than their group's mean reward; NaN if none
    length_wrong: float  # of those with less
    unended: float  # share of completions without an end
    entropy: float  # −log π of the sampled tokens, mean over tokens: an estimate of it, nats
    shares: dict[str, float]  # of each kind among the sampled prompts; empty without kinds
    kl: float  # log π − log π_ref summed over tokens, mean over sequences; NaN without a reference
    loss: float  # mean over the updates; 0 at the first update of a batch, whatever is learned
    clip_fraction: float
    approx_kl: float  # from `old`, nats a token: estimate on the last mini-batch, before its step
    grad_norm: float
    updates: int
    rollout_seconds: float
    update_seconds: float


@dataclass
class Run:
    """What changes from one iteration to the next, and what it is made of."""

    policy: nn.Module
    tokenizer: Tokenizer
    reference: Callable[[], AbstractContextManager[nn.Module]] | None
    optimizer: torch.optim.Optimizer
    sampling: torch.Generator  # on the policy's device
    order: torch.Generator
    rounds: int = 0  # of sampling, so far
    # of a kind of prompt: variance of the rewards within a group, a running mean
    learnability: dict[str, float] = field(default_factory=dict)
    history: list[Metrics] = field(default_factory=list)


# --- groups --------------------------------------------------------------------------------------


@torch.no_grad()
def groups(
    run: Run,
    prompts: Sequence[str],
    reward: rewards.Reward,
    config: Config,
    columns: Mapping[str, Sequence] | None = None,
) -> Batch:
    """Sample a group of completions for each prompt, and score them. The prompt goes through the
    model once for its whole group.

    Raises: ValueError as `rewards.score`.
    """
    group, how = config.samples_per_prompt, (config.max_new_tokens, config.temperature)
    rollout, _, scores, ended = respond(
        run.policy, run.tokenizer, prompts, reward, run.sampling, group, *how, columns
    )
    mask = rollout.completion_mask
    log_probs = old_log_probs(run.policy, rollout, config.temperature, group)
    where = (rollout.tokens, rollout.attention_mask, mask.shape[1])
    ref_log_probs = None
    if run.reference is not None:
        with run.reference() as model:
            ref_log_probs = completion_log_probs(
                model, *where, config.temperature, samples_per_prompt=group
            )
    advantages = advantages_of(scores, config)
    logs = (log_probs, ref_log_probs, scores, advantages, ended, len(scores))
    return Batch(*where[:2], mask, *logs)


def advantages_of(scores: Tensor, config: Config) -> Tensor:
    """Advantage of each completion [N] against its group."""
    if config.scale == "leave-one-out":
        return leave_one_out_advantages(scores, config.samples_per_prompt)
    return group_relative_advantages(scores, config.samples_per_prompt, config.scale)


def kept(batch: Batch, config: Config) -> tuple[Batch, float]:
    """The batch without the groups that teach nothing, unless the settings keep them, and the share
    of such groups. If all are such, the batch stays as it is."""
    varied = ~all_equal(batch.rewards.view(-1, config.samples_per_prompt))[:, 0]
    share = 1.0 - varied.double().mean().item()
    if config.constant_groups == "keep" or not varied.any():
        return batch, share
    rows = varied.repeat_interleave(config.samples_per_prompt)
    return _rows(batch, rows), share


def chances(kinds: Sequence[str], learnability: Mapping[str, float]) -> dict[str, float]:
    """The curriculum: the chance of each kind of prompt to be drawn next.

    It grows with the kind's learnability, the variance of the rewards within its groups: p(1 − p)
    where a share p of the answers is right, so most where that is one half and none where all
    answers are right or all wrong. A kind that was never drawn counts as the best one known. A
    share `EVEN` goes to all kinds alike, so that what cannot be learned yet is looked at again.

    Args:
        kinds: the different kinds.
        learnability: of those that were drawn before.
    Source: Foster et al. 2025, "Learning to Reason at the Frontier of Learnability", by kinds of
        prompts instead of single ones.
    """
    best = max(learnability.values(), default=1.0)
    found = {kind: learnability.get(kind, best) for kind in kinds}
    total = sum(found.values())
    even = 1 / len(found)
    return {k: EVEN * even + (1 - EVEN) * (v / total if total else even) for k, v in found.items()}


def draw(run: Run, count: int, config: Config, kinds: Sequence[str] | None) -> list[int]:
    """Which of `count` prompts come next: in a random order, or with `kinds` by the curriculum."""
    if kinds is None:
        return prompt_indices(count, run.rounds, config)
    names = sorted(set(kinds))
    odds = torch.tensor(list(chances(names, run.learnability).values()))
    drawn = torch.multinomial(odds, config.prompts, replacement=True, generator=run.order)
    members = {name: [i for i, kind in enumerate(kinds) if kind == name] for name in names}
    luck = torch.rand(config.prompts, generator=run.order).tolist()
    pools = [members[names[kind]] for kind in drawn.tolist()]
    return [pool[int(u * len(pool))] for pool, u in zip(pools, luck, strict=True)]


def note(run: Run, batch: Batch, kinds: Sequence[str], config: Config) -> None:
    """Keep in mind how much the rewards of each kind of prompt varied."""
    spread = batch.rewards.double().view(-1, config.samples_per_prompt).var(1).tolist()
    for kind, variance in zip(kinds, spread, strict=True):
        known = run.learnability.get(kind, variance)
        run.learnability[kind] = known + FORGET * (variance - known)


def collect(
    run: Run,
    prompts: Sequence[str],
    reward: rewards.Reward,
    config: Config,
    columns: Mapping[str, Sequence] | None = None,
    kinds: Sequence[str] | None = None,
) -> tuple[Batch, dict[str, Any]]:
    """One iteration's batch; and of the groups that were sampled, the share of constant ones and
    that of each kind.

    With "resample", rounds of new prompts follow until there are as many groups with something to
    learn as the settings ask for, or `rounds` have passed.
    """
    found: list[Batch] = []
    shares, seen = [], []
    for _ in range(config.rounds if config.constant_groups == "resample" else 1):
        chosen = draw(run, len(prompts), config, kinds)
        run.rounds += 1
        some = [prompts[i] for i in chosen]
        batch = groups(run, some, reward, config, picked(columns, chosen))
        if kinds is not None:
            seen += [kinds[i] for i in chosen]
            note(run, batch, seen[-len(chosen) :], config)
        batch, share = kept(batch, config)
        found.append(batch)
        shares.append(share)
        if (
            sum(len(one.rewards) for one in found if _varied(one, config))
            >= config.prompts * config.samples_per_prompt
        ):
            break
    useful = [one for one in found if _varied(one, config)] or found[:1]
    batch = _join(useful, run.tokenizer.pad_token_id)
    sampled = sum(one.sampled for one in found)
    most = config.prompts * config.samples_per_prompt
    keep = torch.arange(len(batch.rewards), device=batch.rewards.device) < most
    drawn = {kind: seen.count(kind) / len(seen) for kind in sorted(set(seen))}
    told = {"constant": sum(shares) / len(shares), "shares": drawn}
    return _rows(batch, keep)._replace(sampled=sampled), told


def _varied(batch: Batch, config: Config) -> bool:
    """Whether any group teaches something; only then does `kept` leave out the others."""
    return not all_equal(batch.rewards.view(-1, config.samples_per_prompt)).all()


def _rows(batch: Batch, rows: Tensor) -> Batch:
    parts = (part[rows] if isinstance(part, Tensor) else part for part in batch)
    return Batch(*parts)


def _join(batches: Sequence[Batch], pad_token_id: int) -> Batch:
    """Batches below each other: prompts padded on the left, completions on the right."""
    if len(batches) == 1:
        return batches[0]
    right = max(one.mask.shape[1] for one in batches)
    left = max(one.tokens.shape[1] - one.mask.shape[1] for one in batches)

    def widened(one: Batch, tensor: Tensor, value: float, prompt: bool) -> Tensor:
        before = left - (one.tokens.shape[1] - one.mask.shape[1]) if prompt else 0
        return torch.nn.functional.pad(tensor, (before, right - one.mask.shape[1]), value=value)

    def all_of(name: str, value: float = 0.0, prompt: bool = False) -> Tensor | None:
        if getattr(batches[0], name) is None:
            return None
        return torch.cat([widened(one, getattr(one, name), value, prompt) for one in batches])

    return Batch(
        all_of("tokens", pad_token_id, prompt=True),
        all_of("attention_mask", 0, prompt=True),
        all_of("mask", False),
        all_of("old_log_probs"),
        all_of("ref_log_probs"),
        *(
            torch.cat([getattr(one, n) for one in batches])
            for n in ("rewards", "advantages", "ended")
        ),
        sum(one.sampled for one in batches),
    )


# --- update --------------------------------------------------------------------------------------


def update(run: Run, batch: Batch, config: Config) -> dict[str, float]:
    """Passes over the batch, each in mini-batches of whole groups.

    Returns: means over the updates, and how many there were.
    Raises: TrainingStopped if the first ratio is not 1, on a loss or a gradient that is not finite,
        or if the weights are not after the last step.
    """
    group, seen = config.samples_per_prompt, []
    count = len(batch.rewards) // group
    size = -(-count // config.mini_batches)
    for _ in range(config.epochs):
        for chosen in torch.randperm(count, generator=run.order).split(size):
            inside = torch.arange(group)
            rows = (chosen[:, None] * group + inside).flatten().to(batch.tokens.device)
            seen.append(step(run, _rows(batch, rows), config, first=not seen))
    check_weights(policy=run.policy)
    return mean_of_updates(seen)


def step(run: Run, batch: Batch, config: Config, first: bool = False) -> dict[str, float]:
    """One step down the gradient of the loss on some groups."""
    run.optimizer.zero_grad()  # the last gradients need not lie beside the activations
    where = (batch.tokens, batch.attention_mask, batch.mask.shape[1])
    log_probs = completion_log_probs(
        run.policy, *where, config.temperature, samples_per_prompt=config.samples_per_prompt
    )
    if first:
        check_ratio(log_probs, batch.old_log_probs, batch.mask, half_precision(run.policy))
    found = grpo_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        config.clip,
        config.clip_high,
        batch.ref_log_probs,
        config.beta,
        config.loss_type,
        config.importance,
        config.max_new_tokens,
        config.bias_correct_kl,
    )
    found.loss.backward()
    norm = nn.utils.clip_grad_norm_(trained(run.policy), config.max_grad_norm)
    check_finite(loss=found.loss.detach(), gradient=norm)
    run.optimizer.step()
    numbers = zip(("loss", "clip_fraction", "approx_kl"), found, strict=True)
    return {name: value.item() for name, value in numbers} | {"grad_norm": norm.item()}


# --- train ---------------------------------------------------------------------------------------


def start(policy: nn.Module, tokenizer: Tokenizer, config: Config) -> Run:
    """A run before its first iteration; with a price on KL the policy as it is becomes the
    reference.

    Raises: ValueError if the policy has nothing to train, is trained in float16, or has gradient
        checkpointing on; or as `models.reference`.
    """
    check_model(policy, "policy")
    check_tokenizer(tokenizer)
    check_settings(config, Config)
    check_trainable(policy)
    policy.eval()  # no dropout: the first ratio has to be 1
    device = next(policy.parameters()).device
    return Run(
        policy,
        tokenizer,
        models.reference(policy) if config.beta else None,
        adamw(policy, config.learning_rate),
        torch.Generator(device).manual_seed(config.seed),
        torch.Generator().manual_seed(config.seed),
    )


def train(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    config: Config,
    columns: Mapping[str, Sequence] | None = None,
    kinds: Sequence[str] | None = None,
    folder: str | Path | None = None,
    save_every: int = 10,
) -> Iterator[Metrics]:
    """Train a policy in place; the caller plots, logs and stops.

    Args:
        policy: a causal language model, LoRA or not.
        tokenizer: its tokenizer, as `models.load` returns it.
        prompts: texts or conversations; each iteration takes the next ones in an order that changes
            with every pass.
        reward: a reward function.
        config: the settings.
        columns: further columns, as long as `prompts`, that the reward function is given, e.g. the
            right answers.
        kinds: the kind of each prompt, e.g. its level; kinds whose groups teach most are then drawn
            most often, see `chances`. None takes the prompts in a random order.
        folder: where checkpoints are written, the last two kept. If it holds one, the run goes on
            from there: pass the same arguments, the policy as it was at the start included. A
            folder is for one run. Without one, a run that is killed is lost.
        save_every: iterations from one checkpoint to the next; the last is always kept.
    Yields: Metrics, one an iteration; those of earlier iterations first when a run goes on.
    Raises: ValueError on settings out of range, or as `checkpoint.load`; TrainingStopped, with
        a name, on a fault that more iterations would not mend.
    Source: Shao et al. 2024, "DeepSeekMath", algorithm 1.
    """
    check_given(config, Config, policy, tokenizer, folder, prompts=prompts)
    check(config, prompts, columns, kinds)
    rewards.check_reward(reward)
    in_range(save_every, "save_every", 1)
    prompts, columns = as_list(prompts), as_columns(columns)
    check_prompt_lengths(policy, tokenizer, prompts, config.max_new_tokens)
    kinds = None if kinds is None else as_list(kinds)
    data = {"prompts": prompts, "columns": columns, "kinds": kinds}
    kept = look_up(folder, save_every, config, policy, tokenizer, data, reward)
    run = start(policy, tokenizer, config)
    kept = _go_on(kept, run)
    yield from run.history
    for index in range(len(run.history), config.iterations):
        set_learning_rate(run.optimizer, index, config.iterations, config.warm_up)
        metrics = iterate(run, prompts, reward, config, columns, kinds)
        run.history.append(metrics)
        keep(kept, metrics.iteration, config.iterations, lambda: _state(run))
        yield metrics


def iterate(
    run: Run,
    prompts: Sequence[str],
    reward: rewards.Reward,
    config: Config,
    columns: Mapping[str, Sequence] | None = None,
    kinds: Sequence[str] | None = None,
) -> Metrics:
    """One iteration: collect, update, measure."""
    begin = time.perf_counter()
    batch, told = collect(run, prompts, reward, config, columns, kinds)
    collected = time.perf_counter()
    after = update(run, batch, config)
    return Metrics(
        iteration=len(run.history) + 1,
        **told,
        **measure(batch, config),
        **after,
        rollout_seconds=collected - begin,
        update_seconds=time.perf_counter() - collected,
    )


def measure(batch: Batch, config: Config) -> dict[str, float]:
    """What is worth knowing of a batch before anything is learned from it."""
    lengths = batch.mask.sum(1).double()
    grouped = batch.rewards.double().view(-1, config.samples_per_prompt)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    kl = torch.tensor(torch.nan)
    if batch.ref_log_probs is not None:
        log_ratio = (batch.old_log_probs - batch.ref_log_probs).masked_fill(~batch.mask, 0.0)
        kl = log_ratio.sum(1).mean()
    return {
        "reward": grouped.mean().item(),
        "reward_std": grouped.std(1).mean().item(),
        "sampled": batch.sampled,
        "length": lengths.mean().item(),
        "length_right": lengths[centred > 1e-9].mean().item(),
        "length_wrong": lengths[centred < -1e-9].mean().item(),
        "unended": 1.0 - batch.ended.double().mean().item(),
        "entropy": -masked_mean(batch.old_log_probs, batch.mask).item(),
        "kl": kl.item(),
    }


# --- a run that goes on --------------------------------------------------------------------------


def _drawn(run: Run) -> dict[str, Any]:
    return {"rounds": run.rounds, "learnability": run.learnability}


def _state(run: Run) -> dict[str, Any]:
    return state_of(run, trained_weights(run.policy), **_drawn(run))


def _go_on(kept: Kept, run: Run) -> Kept:
    kept, found = go_on(kept, run, trained_weights(run.policy), Metrics, **_drawn(run))
    run.rounds, run.learnability = found["rounds"], found["learnability"]
    return kept


def check(
    config: Config,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence] | None,
    kinds: Sequence[str] | None,
) -> None:
    """Raises: ValueError on prompts, columns, kinds or settings that do not fit, naming them."""
    check_settings(config, Config)
    check_prompts(prompts, columns)
    if kinds is not None:
        if isinstance(kinds, str):
            raise ValueError("kinds is one text; pass a list with the kind of each prompt")
        check_list(kinds, "kinds")
        if len(kinds) != len(prompts):
            raise ValueError(f"kinds has {len(kinds)} entries for {len(prompts)} prompts")
        if not all(isinstance(kind, str) for kind in kinds):
            raise ValueError('kinds must be texts, e.g. "level 3"')
    one_of(config.scale, SCALES, "scale")
    one_of(config.loss_type, GRPO_TYPES, "loss_type")
    one_of(config.importance, IMPORTANCE, "importance")
    one_of(config.constant_groups, CONSTANT_GROUPS, "constant_groups")
    if config.importance == "sequence" and config.loss_type != "grpo":
        warnings.warn(
            f'importance="sequence" with loss_type={config.loss_type!r} weighs the one ratio of a'
            ' sequence by its length, which is not GSPO; take loss_type="grpo" for that',
            stacklevel=3,
        )
    for name in _COUNTS:
        in_range(getattr(config, name), name, 1)
    for name in _POSITIVE:
        in_range(getattr(config, name), name, 0.0, open_low=True, infinite=name == "clip")
    in_range(config.beta, "beta", 0.0)
    in_range(config.warm_up, "warm_up", 0.0, 1.0)
    if config.samples_per_prompt < 2:
        raise ValueError(
            "samples_per_prompt must be 2 or more; a group needs another to compare with"
        )
    if config.prompts % config.mini_batches:
        raise ValueError(
            f"mini_batches={config.mini_batches} must divide the {config.prompts} prompts"
        )
