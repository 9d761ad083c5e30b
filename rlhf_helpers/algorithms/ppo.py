"""Proximal policy optimisation for a language model, from top to bottom: collect, advantages,
update, train.

Three policies appear. `policy` is trained. `old` is the policy as it was when the batch was
sampled; only its log-probabilities are kept. `reference` is the policy as it was before the first
update, frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import conversations, models, rewards
from rlhf_helpers._forward import checked_mask, completion_states
from rlhf_helpers._validate import (
    as_float,
    check_each,
    check_list,
    check_model,
    check_tokenizer,
    in_range,
    one_of,
)
from rlhf_helpers.advantages import discounted_returns, gae, leave_one_out_advantages
from rlhf_helpers.algorithms import sft
from rlhf_helpers.algorithms._loop import (
    TrainingStopped,
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
from rlhf_helpers.algorithms.sampling import evaluate as evaluate
from rlhf_helpers.kl import AdaptiveKLController, kl_estimate
from rlhf_helpers.logprobs import (
    completion_log_probs,
    entropy,
    masked_mean,
    masked_whiten,
    token_log_probs,
)
from rlhf_helpers.losses import PolicyLoss, ppo_clip_loss, value_loss

BASELINES = ("value", "group", "none")
PATIENCE = 5  # iterations in a row before a slow fault stops a run
_ENTROPY_ROWS = 16  # sequences that the logged entropy is measured on
# settings that are at least 1, those that are at least 0, and those that are above 0
_COUNTS = (
    "iterations",
    "prompts",
    "samples_per_prompt",
    "max_new_tokens",
    "epochs",
    "mini_batches",
)
_FROM_ZERO = (
    "kl_coefficient",
    "entropy_coefficient",
    "ptx_coefficient",
    "missing_end_penalty",
    "value_coefficient",
)
_POSITIVE = (
    "temperature",
    "learning_rate",
    "value_learning_rate",
    "max_grad_norm",
    "clip",
    "kl_horizon",
)


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        iterations: batches to collect and learn from.
        prompts: prompts an iteration.
        samples_per_prompt: completions of each.
        max_new_tokens: the longest completion.
        temperature: of sampling, and of every log-probability.
        epochs: passes over a batch.
        mini_batches: updates a pass; divides `prompts`.
        micro_batch: prompts that go through the model at once; None takes a mini-batch whole.
        learning_rate, value_learning_rate: of AdamW, at their highest.
        warm_up: share of the iterations in which the learning rates rise; they then fall to 0.
        max_grad_norm: a longer gradient is shortened to this, policy and value function apart.
        clip: ε of the ratio.
        value_clip: how far a value may move from the one at the rollout; None for no limit.
        gamma, lam: discount and λ of the advantages.
        whiten: whether advantages are scaled to mean 0 and variance 1 over the batch.
        baseline: "value" (a value function and GAE), "group" (the mean of the prompt's other
            samples; needs two or more), or "none".
        kl_coefficient: β, price of a nat of KL, taken from the reward token by token.
        kl_target: nats a sequence; β then adapts to hold it. None keeps β.
        kl_horizon: samples that it takes to adapt.
        entropy_coefficient: of the entropy bonus.
        ptx_coefficient: of the loss on texts given as `ptx` ("PPO-ptx").
        stop_kl: nats a token; the updates on a batch end when the KL from `old`, as estimated on
            one mini-batch before its step, exceeds 1.5 times this. None: never.
        missing_end_penalty: taken from the score of a completion that did not end.
        seed: of sampling and of the order of prompts.
        value_coefficient: of the value loss. It matters with `ValueModel(share_trunk=True)`, where
            that loss moves the policy too; otherwise Adam's steps hardly depend on it.
    """

    iterations: int = 20
    prompts: int = 32
    samples_per_prompt: int = 4
    max_new_tokens: int = 48
    temperature: float = 1.0
    epochs: int = 2
    mini_batches: int = 4
    micro_batch: int | None = None
    learning_rate: float = 5e-4
    value_learning_rate: float = 1e-3
    warm_up: float = 0.1
    max_grad_norm: float = 1.0
    clip: float = 0.2
    value_clip: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    baseline: str = "value"
    kl_coefficient: float = 0.05
    kl_target: float | None = None
    kl_horizon: int = 2000
    entropy_coefficient: float = 0.0
    ptx_coefficient: float = 0.0
    stop_kl: float | None = None
    missing_end_penalty: float = 0.0
    seed: int = 0
    value_coefficient: float = 1.0


# What the chapter changes, by scale.
AT_SCALE = {
    "tiny": {"iterations": 15},
    "gpt2": {
        "iterations": 60,
        "max_new_tokens": 64,
        "learning_rate": 1e-5,
        "value_learning_rate": 1e-5,
        # so that GPT-2 fits into the memory of a small GPU
        "micro_batch": 2,
    },
}


class Batch(NamedTuple):
    """What one iteration learns from: N completions of up to C tokens, with their prompts; samples
    of one prompt are neighbours."""

    tokens: Tensor  # [N, P + C]
    attention_mask: Tensor  # [N, P + C]
    mask: Tensor  # [N, C], True on a completion, its end included
    old_log_probs: Tensor  # [N, C], of the policy that sampled
    ref_log_probs: Tensor  # [N, C]
    values: Tensor  # [N, C], at the rollout
    rewards: Tensor  # [N, C], with the KL term
    advantages: Tensor  # [N, C]
    returns: Tensor  # [N, C], targets of the value function
    scores: Tensor  # [N], what the reward function said, less the penalty
    ended: Tensor  # [N], whether it came to its end token
    texts: list[str]  # N completions


class Metrics(NamedTuple):
    """After one iteration; what is said of the batch was measured before the updates."""

    iteration: int  # from 1
    reward: float  # score − β·KL, mean over sequences
    score: float
    score_std: float
    kl: float  # log π − log π_ref of the samples, summed over tokens, mean over sequences, nats
    kl_coefficient: float
    entropy: float  # of the next token, over the vocabulary, nats
    clip_fraction: float
    approx_kl: float  # from `old`, nats a token: estimate on the last mini-batch, before its step
    explained_variance: float  # share of the returns' variance that the values foresaw
    policy_loss: float
    value_loss: float
    grad_norm: float  # of the policy, mean over updates, before it is clipped
    length: float  # tokens, the end included
    unended: float  # share of completions without an end
    distinct: float  # different completions, as a share of all
    updates: int
    rollout_seconds: float
    update_seconds: float


@dataclass
class Run:
    """What changes from one iteration to the next, and what it is made of."""

    policy: nn.Module
    value_model: nn.Module | None
    tokenizer: Tokenizer
    reference: Callable[[], AbstractContextManager[nn.Module]]
    optimizer: torch.optim.Optimizer
    controller: AdaptiveKLController | None
    sampling: torch.Generator  # on the policy's device
    order: torch.Generator
    kl_coefficient: float
    history: list[Metrics] = field(default_factory=list)


# --- collect -------------------------------------------------------------------------------------


def kl_rewards(
    scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coefficient: float
) -> Tensor:
    """The reward of each token: the price of its log-ratio, and at the last token the score.

    Equation: eq:kl-reward

    Args:
        scores: [N].
        log_probs, ref_log_probs: [N, C], of the policy that sampled and of the reference.
        mask: [N, C]; True on a completion.
        kl_coefficient: β ≥ 0.
    Returns: [N, C]; 0 where the mask is 0. A row sums to its score − β · its log-ratio.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """
    log_ratio = kl_estimate(log_probs, ref_log_probs, "k1").masked_fill(~mask, 0.0)
    rewards = -kl_coefficient * log_ratio
    last = mask.sum(1) - 1
    rewards[torch.arange(len(mask), device=mask.device), last] += scores.to(rewards)
    return rewards


@torch.no_grad()
def collect(
    run: Run,
    prompts: Sequence[str],
    reward: rewards.Reward,
    config: Config,
    columns: Mapping[str, Sequence] | None = None,
) -> Batch:
    """Sample completions, score them, and find what each token was worth.

    Raises: TrainingStopped on weights, log-probabilities or values that are not finite; ValueError
        as `rewards.score`.
    """
    for owner, weights in _weights(run).items():
        check_finite(**{f"{owner}.{name}": weight for name, weight in weights.items()})
    group, how = config.samples_per_prompt, (config.max_new_tokens, config.temperature)
    rollout, texts, scores, ended = respond(
        run.policy, run.tokenizer, prompts, reward, run.sampling, group, *how, columns
    )
    mask = rollout.completion_mask
    log_probs = old_log_probs(run.policy, rollout, config.temperature, group)
    scores = scores - config.missing_end_penalty * ~ended
    where = (rollout.tokens, rollout.attention_mask, mask.shape[1])
    with run.reference() as reference:
        ref_log_probs = completion_log_probs(
            reference, *where, config.temperature, samples_per_prompt=group
        )
    values = torch.zeros_like(log_probs)
    if run.value_model is not None:
        values = run.value_model(*where, group).to(log_probs)
    check_finite(reference_log_probs=ref_log_probs, values=values)
    shaped = kl_rewards(scores, log_probs, ref_log_probs, mask, run.kl_coefficient)
    advantages, returns = advantages_of(shaped, values, mask, config)
    logs = (log_probs, ref_log_probs, values, shaped, advantages, returns)
    return Batch(*where[:2], mask, *logs, scores, ended, texts)


def advantages_of(
    token_rewards: Tensor, values: Tensor, mask: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N, C] by the baseline of the settings; whitening touches the
    advantages alone."""
    if config.baseline == "value":
        advantages, returns = gae(token_rewards, values, mask, config.gamma, config.lam)
    else:
        returns = discounted_returns(token_rewards, mask, config.gamma)
        advantages = returns
        if config.baseline == "group":
            total = token_rewards.sum(1)
            gains = leave_one_out_advantages(total, config.samples_per_prompt)
            # every token of a sample is measured against the same mean of the others
            advantages = (returns - (total - gains)[:, None]).masked_fill(~mask, 0.0)
    return (masked_whiten(advantages, mask) if config.whiten else advantages), returns


# --- update --------------------------------------------------------------------------------------


def update(
    run: Run,
    batch: Batch,
    config: Config,
    ptx: Sequence[sft.Example] = (),
) -> dict[str, float]:
    """Several passes over the batch, each in mini-batches of whole prompts.

    Returns: means over the updates, and how many there were.
    Raises: TrainingStopped if the first ratio is not 1, on a loss or a gradient that is not finite,
        or if the weights are not after the last step.
    """
    group, seen = config.samples_per_prompt, []
    size = len(batch.scores) // group // config.mini_batches
    for _ in range(config.epochs):
        order = torch.randperm(len(batch.scores) // group, generator=run.order)
        for prompts in order.split(size):
            seen.append(step(run, batch, prompts, config, ptx, first=not seen))
            if config.stop_kl is not None and seen[-1]["approx_kl"] > 1.5 * config.stop_kl:
                break
        else:
            continue
        break
    check_weights(policy=run.policy, value_model=run.value_model)
    return mean_of_updates(seen)


def step(
    run: Run,
    batch: Batch,
    prompts: Tensor,
    config: Config,
    ptx: Sequence[sft.Example] = (),
    first: bool = False,
) -> dict[str, float]:
    """One update on some prompts of the batch, by index. In micro-batches the gradient is that of
    the whole: each part counts by its share of the tokens."""
    device = batch.tokens.device
    group = torch.arange(config.samples_per_prompt, device=device)
    rows = (prompts.to(device)[:, None] * config.samples_per_prompt + group).flatten()
    total = batch.mask[rows].sum().item()
    micro = (config.micro_batch or len(prompts)) * config.samples_per_prompt
    run.optimizer.zero_grad()
    sums: dict[str, float] = {}
    for part in rows.split(micro):
        loss, found = losses(run, batch, part, config, first)
        share = batch.mask[part].sum().item() / total
        (share * loss).backward()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + share * value
    if config.ptx_coefficient:
        (config.ptx_coefficient * ptx_loss(run, ptx, len(rows))).backward()
    norms = []
    for group_of in run.optimizer.param_groups:
        norms.append(nn.utils.clip_grad_norm_(group_of["params"], config.max_grad_norm).item())
    check_finite(**{name: torch.tensor(value) for name, value in sums.items()})
    check_finite(gradient=torch.tensor(norms))
    run.optimizer.step()
    return sums | {"grad_norm": norms[0]}


def losses(
    run: Run, batch: Batch, rows: Tensor, config: Config, first: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """The loss on some rows of the batch: clipped policy loss, entropy bonus, value loss."""
    where = (batch.tokens[rows], batch.attention_mask[rows], batch.mask.shape[1])
    mask, old = batch.mask[rows], batch.old_log_probs[rows]
    bonus = 0.0
    if config.entropy_coefficient:
        logits = completion_logits(run.policy, *where) / config.temperature
        log_probs = token_log_probs(logits, where[0][:, -where[2] :])
        bonus = masked_mean(entropy(logits), mask)
    else:
        log_probs = completion_log_probs(
            run.policy, *where, config.temperature, samples_per_prompt=config.samples_per_prompt
        )
    if first:
        check_ratio(log_probs, old, mask, half_precision(run.policy))
    policy: PolicyLoss = ppo_clip_loss(log_probs, old, batch.advantages[rows], mask, config.clip)
    loss = policy.loss - config.entropy_coefficient * bonus
    found = {
        "policy_loss": policy.loss.item(),
        "clip_fraction": policy.clip_fraction.item(),
        "approx_kl": policy.approx_kl.item(),
        "value_loss": 0.0,
    }
    if run.value_model is not None:
        values = run.value_model(*where, config.samples_per_prompt).to(old)
        error = value_loss(values, batch.values[rows], batch.returns[rows], mask, config.value_clip)
        loss = loss + config.value_coefficient * error
        found["value_loss"] = error.item()
    return loss, found


def ptx_loss(run: Run, ptx: Sequence[sft.Example], count: int) -> Tensor:
    """The fine-tuning loss on `count` random examples.

    Source: Ouyang et al. 2022, "Training language models to follow instructions with human
        feedback", equation 2.
    """
    drawn = torch.randint(len(ptx), (count,), generator=run.order).tolist()
    batch = sft.collate([ptx[i] for i in drawn], run.tokenizer.pad_token_id)
    device = next(run.policy.parameters()).device
    return sft.sft_loss(run.policy, sft.Batch(*(tensor.to(device) for tensor in batch)))


def completion_logits(
    model: nn.Module, tokens: Tensor, attention_mask: Tensor, completion_length: int
) -> Tensor:
    """Logits [N, C, V] that predict the completion; those of the prompt are not made. A model in
    half precision gives float32, which can be divided by a temperature."""
    mask = checked_mask(model, tokens, attention_mask, completion_length)
    return as_float(completion_states(model, tokens, mask, completion_length, 1))


# --- train ---------------------------------------------------------------------------------------


def start(
    policy: nn.Module, tokenizer: Tokenizer, config: Config, value_model: nn.Module | None = None
) -> Run:
    """A run before its first iteration; the policy as it is now becomes the reference.

    Args:
        policy: a causal language model, LoRA or not.
        tokenizer: its tokenizer.
        config: the settings.
        value_model: a `ValueModel`; None makes one from the policy's trunk if the settings ask for
            one. What it shares with the policy is trained once, at the policy's rate.
    Raises: ValueError if the policy has nothing to train, is trained in float16, or has gradient
        checkpointing on; or as `models.reference`.
    """
    check_model(policy, "policy")
    check_tokenizer(tokenizer)
    check_settings(config, Config)
    check_trainable(policy)
    policy.eval()  # no dropout: the first ratio has to be 1
    if value_model is None and config.baseline == "value":
        value_model = models.ValueModel(policy)
    groups = [{"params": trained(policy), "highest": config.learning_rate}]
    if value_model is not None:
        check_model(value_model, "value_model")
        check_trainable(value_model, "value_model", frozen=True)
        value_model.eval()
        shared = {id(parameter) for parameter in groups[0]["params"]}
        alone = [parameter for parameter in trained(value_model) if id(parameter) not in shared]
        groups.append({"params": alone, "highest": config.value_learning_rate})
    controller = None
    if config.kl_target is not None:
        controller = AdaptiveKLController(
            config.kl_coefficient, config.kl_target, config.kl_horizon
        )
    device = next(policy.parameters()).device
    return Run(
        policy,
        value_model,
        tokenizer,
        models.reference(policy),
        torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0),
        controller,
        torch.Generator(device).manual_seed(config.seed),
        torch.Generator().manual_seed(config.seed),
        config.kl_coefficient,
    )


def train(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    config: Config,
    value_model: nn.Module | None = None,
    columns: Mapping[str, Sequence] | None = None,
    ptx: Sequence[tuple[str, str]] = (),
    folder: str | Path | None = None,
    save_every: int = 1,
) -> Iterator[Metrics]:
    """Train a policy in place; the caller plots, logs and stops.

    Args:
        policy: a causal language model, LoRA or not, as it should be at the start; it is the
            reference too.
        tokenizer: its tokenizer, as `models.load` returns it.
        prompts: texts or conversations; each iteration takes the next ones in an order that changes
            with every pass.
        reward: a reward function.
        config: the settings.
        value_model: see `start`.
        columns: further columns, as long as `prompts`, that the reward function is given.
        ptx: (prompt, response) pairs for the PPO-ptx term.
        folder: where checkpoints are written, the last two kept. If it holds one, the run goes on
            from there: pass the same arguments, the policy as it was at the start included. A
            folder is for one run. Without one, a run that is killed is lost.
        save_every: iterations from one checkpoint to the next; the last is always kept.
    Yields: Metrics, one an iteration; those of earlier iterations first when a run goes on.
    Raises: ValueError on settings out of range, or as `checkpoint.load`; TrainingStopped, with a
        name, on a fault that more iterations would not mend.
    Source: Ouyang et al. 2022, "Training language models to follow instructions with human
        feedback", section 3.5; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
    """
    check_given(config, Config, policy, tokenizer, folder, prompts=prompts, ptx=ptx)
    if value_model is not None:
        check_model(value_model, "value_model")
    _check(config, prompts, columns, ptx)
    rewards.check_reward(reward)
    in_range(save_every, "save_every", 1)
    prompts, columns = as_list(prompts), as_columns(columns)
    check_prompt_lengths(policy, tokenizer, prompts, config.max_new_tokens)
    data = {"prompts": prompts, "columns": columns, "ptx": list(ptx)}
    kept = look_up(folder, save_every, config, policy, tokenizer, data, reward, value_model)
    run = start(policy, tokenizer, config, value_model)
    kept = _go_on(kept, run)
    yield from run.history
    diagnose(run.history)
    examples = sft.encode_fitting(policy, tokenizer, ptx, "ptx pairs") if ptx else ()
    for index in range(len(run.history), config.iterations):
        set_learning_rate(run.optimizer, index, config.iterations, config.warm_up)
        chosen = prompt_indices(len(prompts), index, config)
        some = [prompts[i] for i in chosen]
        metrics = iterate(run, some, reward, config, picked(columns, chosen), examples)
        run.history.append(metrics)
        keep(kept, metrics.iteration, config.iterations, lambda: _state(run))
        yield metrics
        diagnose(run.history)


def iterate(
    run: Run,
    prompts: Sequence[str],
    reward: rewards.Reward,
    config: Config,
    columns: Mapping[str, Sequence] | None = None,
    ptx: Sequence[sft.Example] = (),
) -> Metrics:
    """One iteration: collect, update, adapt the KL coefficient, measure."""
    begin = time.perf_counter()
    batch = collect(run, prompts, reward, config, columns)
    collected = time.perf_counter()
    before = measure(run, batch, config)
    after = update(run, batch, config, ptx)
    if run.controller is not None:
        run.kl_coefficient = run.controller.update(before["kl"], len(batch.scores))
    times = {
        "rollout_seconds": collected - begin,
        "update_seconds": time.perf_counter() - collected,
    }
    return Metrics(iteration=len(run.history) + 1, **before, **after, **times)


@torch.no_grad()
def measure(run: Run, batch: Batch, config: Config) -> dict[str, float]:
    """What is worth knowing of a batch before anything is learned from it."""
    mask = batch.mask
    log_ratio = (batch.old_log_probs - batch.ref_log_probs).masked_fill(~mask, 0.0)
    logits = completion_logits(
        run.policy,
        batch.tokens[:_ENTROPY_ROWS],
        batch.attention_mask[:_ENTROPY_ROWS],
        mask.shape[1],
    )
    spread = entropy(logits / config.temperature)
    returns, errors = batch.returns[mask], (batch.returns - batch.values)[mask]
    variance = returns.var(unbiased=False)
    return {
        "reward": batch.rewards.sum(1).mean().item(),
        "score": batch.scores.mean().item(),
        # in float64 that of equal scores is 0, without a residue of the mean's rounding
        "score_std": batch.scores.double().std().item() if len(batch.scores) > 1 else 0.0,
        "kl": log_ratio.sum(1).mean().item(),
        "kl_coefficient": run.kl_coefficient,
        "entropy": masked_mean(spread, mask[:_ENTROPY_ROWS]).item(),
        "explained_variance": (1 - errors.var(unbiased=False) / variance).item()
        if variance
        else 0.0,
        "length": mask.sum(1).double().mean().item(),
        "unended": 1.0 - batch.ended.double().mean().item(),
        "distinct": len(set(batch.texts)) / len(batch.texts),
    }


# --- a run that goes on --------------------------------------------------------------------------


def _weights(run: Run) -> dict[str, dict[str, Tensor]]:
    both = {"policy": run.policy, "value_model": run.value_model}
    return {name: trained_weights(model) for name, model in both.items() if model is not None}


def _state(run: Run) -> dict[str, Any]:
    return state_of(run, _weights(run), kl_coefficient=run.kl_coefficient)


def _go_on(kept: Kept, run: Run) -> Kept:
    kept, found = go_on(kept, run, _weights(run), Metrics, kl_coefficient=run.kl_coefficient)
    run.kl_coefficient = found["kl_coefficient"]
    if run.controller is not None:
        run.controller.coefficient = run.kl_coefficient
    return kept


# --- what stops a run ----------------------------------------------------------------------------


def diagnose(history: Sequence[Metrics]) -> None:
    """Stop a run whose last `PATIENCE` iterations all show the same fault.

    Raises: TrainingStopped named "equal rewards", "collapse" or "negative KL".
    """
    check_list(history, "history")
    last = history[-PATIENCE:]
    check_each(last, "history", "Metrics", "score_std", "entropy", "distinct", "kl")
    if len(last) < PATIENCE:
        return
    if all(one.score_std == 0.0 for one in last):
        raise TrainingStopped(
            "equal rewards",
            "every completion earned the same, so there is nothing to learn; look at the reward "
            "function, or take easier prompts",
        )
    if all(one.entropy < 0.05 and one.distinct < 0.2 for one in last):
        raise TrainingStopped(
            "collapse",
            f"entropy {last[-1].entropy:.2g} nats, {last[-1].distinct:.0%} of the completions "
            "distinct: the policy writes one text; raise kl_coefficient or lower learning_rate",
        )
    if all(one.kl < -0.5 for one in last):
        raise TrainingStopped(
            "negative KL",
            f"the mean log-ratio is {last[-1].kl:.2g} nats, which no divergence can be; what is "
            "sampled is not what is scored (a higher temperature, padding)",
        )


def _check(
    config: Config,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence] | None,
    ptx: Sequence[tuple[str, str]],
) -> None:
    check_prompts(prompts, columns)
    sft.check_pairs(ptx, "ptx pairs")
    if config.ptx_coefficient and not ptx:
        raise ValueError(
            "ptx is empty, but ptx_coefficient is not 0; pass (prompt, response) pairs"
        )
    _check_settings(config)


def _check_settings(config: Config) -> None:
    one_of(config.baseline, BASELINES, "baseline")
    for name in _COUNTS:
        in_range(getattr(config, name), name, 1)
    for name in _FROM_ZERO:
        in_range(getattr(config, name), name, 0.0)
    for name in _POSITIVE:
        in_range(getattr(config, name), name, 0.0, open_low=True, infinite=name == "clip")
    for name in ("warm_up", "gamma", "lam"):
        in_range(getattr(config, name), name, 0.0, 1.0)
    if config.micro_batch is not None:
        in_range(config.micro_batch, "micro_batch", 1)
    for name in ("value_clip", "kl_target", "stop_kl"):
        if getattr(config, name) is not None:
            in_range(getattr(config, name), name, 0.0, open_low=True)
    if config.prompts % config.mini_batches:
        raise ValueError(
            f"mini_batches={config.mini_batches} must divide the {config.prompts} prompts"
        )
    if config.prompts * config.samples_per_prompt < 2:
        raise ValueError(
            "prompts=1 with samples_per_prompt=1 is a batch of one completion, which has no spread"
            " to be whitened or measured; take two or more of one of the two"
        )
    if config.baseline == "group" and config.samples_per_prompt < 2:
        raise ValueError('baseline="group" needs samples_per_prompt of 2 or more')
