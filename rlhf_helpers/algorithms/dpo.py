"""Direct preference optimisation: the reward model and the policy are one network. Offline from
comparisons, or in a loop that samples its own pairs and asks a judge.

`policy` is trained. `reference` is the policy as it was before the first update; of it only the
log-probabilities of the given responses are needed, so they are computed once.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import conversations, models, rewards
from rlhf_helpers._validate import (
    check_each,
    check_generator,
    check_model,
    check_path,
    check_some,
    finite,
    in_range,
    one_of,
    same_shape,
    tensors,
)
from rlhf_helpers.algorithms import sft
from rlhf_helpers.algorithms._loop import (
    adamw,
    as_list,
    check_finite,
    check_given,
    check_prompts,
    check_settings,
    check_trainable,
    check_weights,
    mean_of,
    prompt_indices,
    set_learning_rate,
    shuffled,
    steps_per_epoch,
    trained,
    trained_weights,
)
from rlhf_helpers.algorithms._resume import (
    Progress,
    digest,
    go_on,
    keep,
    look_up,
    model_digest,
    state_of,
)
from rlhf_helpers.algorithms.reward_model import Comparison, check_comparisons
from rlhf_helpers.algorithms.sampling import check_prompt_lengths, respond
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.losses import DPO_VARIANTS, PreferenceLoss, dpo_loss, simpo_loss
from rlhf_helpers.rollout import Rollout, end_tokens, sample
from rlhf_helpers.worlds.enumerable import Language

VARIANTS = (*DPO_VARIANTS, "length-normalised", "simpo")
_SOFT = ("sigmoid", "length-normalised")  # variants whose label may be a probability
_SMOOTH = (*_SOFT, "robust")  # variants that can be told a share of wrong labels
_KL_PROMPTS = 64  # that the KL is measured on
_COUNTS = (
    "epochs",
    "batch_size",
    "evaluate_every",
    "iterations",
    "prompts",
    "samples_per_prompt",
    "max_new_tokens",
)


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        learning_rate: of AdamW, at its highest.
        epochs: passes over the pairs; in the online loop, over the pairs of an iteration.
        batch_size: pairs a step.
        micro_batch: pairs that go through the model at once; None takes a batch whole.
        warm_up: share of the steps in which the learning rate rises from 0; it then falls to 0,
            both in a straight line.
        max_grad_norm: a longer gradient is shortened to this.
        beta: β, the price of a nat of KL in units of the implicit reward; in "ipo" τ, in "simpo"
            the scale of the score.
        variant: "sigmoid", "robust", "ipo", "hinge", "length-normalised" (log-ratios divided by the
            number of tokens) or "simpo".
        label_smoothing: share of the labels that are taken to be wrong.
        chosen_weight: α, how much the mean negative log-probability per token of the chosen
            responses counts beside the loss.
        gamma: by how much the score of the chosen one should be ahead in "simpo".
        evaluate_every: steps between two looks at the held-out pairs and the KL.
        iterations, prompts, samples_per_prompt: of the online loop: how many batches of prompts,
            prompts in each, and responses to each, of which the judge's best and worst make a pair.
        max_new_tokens: the longest response that is sampled.
        seed: of the order of pairs, and of sampling.
    """

    learning_rate: float = 5e-4
    epochs: int = 1
    batch_size: int = 32
    micro_batch: int | None = None
    warm_up: float = 0.1
    max_grad_norm: float = 1.0
    beta: float = 0.1
    variant: str = "sigmoid"
    label_smoothing: float = 0.0
    chosen_weight: float = 0.0
    gamma: float = 0.5
    evaluate_every: int = 50
    iterations: int = 15
    prompts: int = 64
    samples_per_prompt: int = 2
    max_new_tokens: int = 48
    seed: int = 0


# What the chapter changes, by scale.
AT_SCALE = {
    "tiny": {},
    "gpt2": {"learning_rate": 1e-5, "max_new_tokens": 64},
}


class Example(NamedTuple):
    """A prompt and two responses in tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    preference: float = 1.0  # P(chosen is preferred), from ½ on


class Batch(NamedTuple):
    """N pairs; rows 2n and 2n + 1 are the chosen and the rejected response of pair n."""

    tokens: Tensor  # [2N, P + C], prompts end in column P − 1
    attention_mask: Tensor  # [2N, P + C]
    mask: Tensor  # [2N, C], 1 on a response
    reference: Tensor  # [N, 2], log π_ref of chosen and rejected, summed over tokens
    preference: Tensor  # [N]


class Evaluation(NamedTuple):
    """How a policy does on pairs; means over them."""

    loss: float
    accuracy: float  # share in which the chosen response has the larger implicit reward
    margin: float  # implicit reward of the chosen − of the rejected
    chosen_log_prob: float  # summed over tokens, nats
    rejected_log_prob: float


class Metrics(NamedTuple):
    """After one step; of the batch, before the step."""

    step: int  # from 1
    loss: float
    chosen_reward: float  # implicit, in units of β · nats; mean over pairs
    rejected_reward: float
    margin: float  # the difference of the two
    accuracy: float  # share in which the chosen has the larger; ½ where they are equal
    chosen_log_prob: float  # summed over tokens, nats
    rejected_log_prob: float
    grad_norm: float  # before it is clipped
    learning_rate: float
    kl: float | None  # KL(π‖π_ref) a response, from samples, nats; None where not measured
    held_out: Evaluation | None  # None where not measured
    pairs: int = 0  # that the step, or the iteration of the online loop, learned from


# of an iteration without a pair there is nothing to say in these
_SAID_OF_PAIRS = Metrics._fields[1 : Metrics._fields.index("learning_rate")]


# --- pairs ---------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, data: Sequence[Comparison]) -> list[Example]:
    """Tokens of comparisons of two; a response that has ended is closed with one end token, as in
    `models.response_ids`, a `models.Cut` is not. The one that is preferred by more than half
    becomes the chosen one.

    Args:
        tokenizer: with an end-of-text token.
        data: as `reward_model.comparisons` or `reward_model.labelled` makes them.
    Raises: ValueError on no data, and with its index on a comparison of another size, one with a
        margin or a weight (DPO knows neither), an empty response, two that are equal as texts (see
        `reward_model.check_comparisons`) or as tokens, or as `sft.encode`.
    """
    check_comparisons(data)
    check_some(data, "data", "Comparison")
    for index, one in enumerate(data):
        if len(one.responses) != 2:
            raise ValueError(f"data[{index}] has {len(one.responses)} responses; pass two")
        if one.margin != 0.0 or one.weight != 1.0:
            raise ValueError(f"data[{index}] has a margin or a weight, which DPO does not use")
    columns = [
        sft.encode(tokenizer, [(one.prompt, one.responses[side]) for one in data], "data")
        for side in range(2)
    ]
    examples = []
    for index, (one, first, second) in enumerate(zip(data, *columns, strict=True)):
        if first.response == second.response:
            raise ValueError(
                f"data[{index}] has two responses with the same tokens, so nothing can be learned"
                " from it; leave it out"
            )
        sides = (first, second) if one.preference >= 0.5 else (second, first)
        share = max(one.preference, 1.0 - one.preference)
        examples.append(Example(first.prompt, sides[0].response, sides[1].response, share))
    return examples


def collate(examples: Sequence[Example], reference: Tensor, pad_token_id: int) -> Batch:
    """Put pairs side by side, chosen and rejected as neighbours; masks come from lengths."""
    _check_examples(examples, "examples")
    check_some(examples, "examples", "Example")
    tensors(reference=reference)
    if reference.shape != (len(examples), 2):
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}; pass [{len(examples)}, 2], chosen and"
            " rejected"
        )
    sides = [sft.Example(one.prompt, part) for one in examples for part in one[1:3]]
    tokens, attention_mask, mask = sft.collate(sides, pad_token_id)
    preference = torch.tensor([one.preference for one in examples])
    return Batch(tokens, attention_mask, mask, reference, preference)


def response_log_probs(policy: nn.Module, batch: Batch) -> Tensor:
    """log π of the responses, summed over their tokens: [N, 2], chosen and rejected in one pass.

    The prompt that the two share goes through the model once.
    """
    length = batch.mask.shape[1]
    where = (batch.tokens, batch.attention_mask, length)
    log_probs = completion_log_probs(policy, *where, samples_per_prompt=2)
    return log_probs.sum(1).view(-1, 2)  # 0 where the mask is 0


@torch.no_grad()
def reference_log_probs(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int = 64
) -> Tensor:
    """log π_ref of all responses, [N, 2], on the CPU; the model must be in the mode that the
    policy is trained in (no dropout)."""
    check_model(model)
    _check_examples(examples, "examples")
    in_range(batch_size, "batch_size", 1)
    device = next(model.parameters()).device
    # pairs of one length next to each other need little padding
    order = sorted(range(len(examples)), key=lambda i: max(map(len, examples[i][1:3])))
    found = torch.empty(len(examples), 2)
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        batch = collate([examples[i] for i in part], found[part], pad_token_id)
        found[part] = response_log_probs(model, _to(batch, device)).float().cpu()
    return found


def cached_log_probs(
    path: str | os.PathLike, model: nn.Module, examples: Sequence[Example], pad_token_id: int
) -> Tensor:
    """`reference_log_probs`, read from a file if it holds those of this model and these pairs, else
    computed and written there.

    Args:
        path: a safetensors file.
        model, examples, pad_token_id: as in `reference_log_probs`.
    Raises: ValueError if the file belongs to another model or other pairs, or is damaged, which a
        checksum of the numbers tells. It is never overwritten.
    """
    check_path(path, "path")
    check_model(model)
    _check_examples(examples, "examples")
    path = Path(path)
    key = {
        "model": model_digest(model),
        "data": digest(list(examples)),
    }
    if path.exists():
        return _read_cache(path, key, len(examples))
    found = reference_log_probs(model, examples, pad_token_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({"log_probs": found}, aside, metadata=key | {"values": digest(found.tolist())})
    os.replace(aside, path)
    return found


def _read_cache(path: Path, key: dict[str, str], count: int) -> Tensor:
    advice = "delete it, or pass another path"
    broken = f"{path} is no whole cache of log-probabilities; {advice}"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            log_probs = file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        raise ValueError(broken) from error
    for what, wanted in key.items():
        if metadata.get(what) != wanted:
            other = "another model" if what == "model" else "other pairs"
            raise ValueError(f"{path} holds the log-probabilities of {other}; {advice}")
    fits = log_probs.dtype == torch.float32 and log_probs.shape == (count, 2)
    if not fits or metadata.get("values") != digest(log_probs.tolist()):
        raise ValueError(broken)
    return log_probs


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))


# --- update --------------------------------------------------------------------------------------


def pair_loss(
    log_probs: Tensor, reference: Tensor, lengths: Tensor, preference: Tensor, config: Config
) -> PreferenceLoss:
    """The loss of the settings, from log-probabilities of whole responses.

    Args:
        log_probs, reference: [N, 2], log π and log π_ref of chosen and rejected, nats.
        lengths: [N, 2], tokens.
        preference: [N], P(chosen is preferred).
        config: variant, β, label smoothing, α, γ.
    Returns: PreferenceLoss; in "simpo" the rewards are its scores, without a reference.
    Source: as `losses.dpo_loss` and `losses.simpo_loss`; "length-normalised": Lambert et al. 2024,
        "Tulu 3", section 5.1.1; chosen_weight: Pang et al. 2024, "Iterative Reasoning Preference
        Optimization", equation 1.
    """
    found = _pair_loss(log_probs, reference, lengths, preference, config)
    if not config.chosen_weight:
        return found
    held_up = -(log_probs[:, 0] / lengths[:, 0]).mean()
    return found._replace(loss=found.loss + config.chosen_weight * held_up)


def _pair_loss(
    log_probs: Tensor, reference: Tensor, lengths: Tensor, preference: Tensor, config: Config
) -> PreferenceLoss:
    if config.variant == "simpo":
        loss = simpo_loss(*log_probs.unbind(1), *lengths.unbind(1), config.beta, config.gamma)
        scores = config.beta * log_probs.detach() / lengths
        return PreferenceLoss(loss, *scores.unbind(1))
    variant, smoothing = config.variant, config.label_smoothing
    if variant == "length-normalised":
        variant, log_probs, reference = "sigmoid", log_probs / lengths, reference / lengths
    wrong = smoothing * preference + (1.0 - smoothing) * (1.0 - preference)
    sides = (*log_probs.unbind(1), *reference.unbind(1))
    return dpo_loss(*sides, config.beta, variant, wrong)


def update(
    policy: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, config: Config
) -> dict[str, float]:
    """One step down the gradient of the loss. In micro-batches the gradient is that of the whole.

    Returns: means over the pairs, before the step, and the gradient's norm.
    Raises: TrainingStopped on a log-probability or a gradient that is not finite; there is no step
        then.
    """
    optimizer.zero_grad()
    count = len(batch.preference)
    lengths = batch.mask.sum(1).view(-1, 2)
    sums: dict[str, float] = {}
    for rows in torch.arange(count, device=batch.mask.device).split(config.micro_batch or count):
        part = _rows(batch, rows)
        log_probs = response_log_probs(policy, part)
        check_finite(log_probs=log_probs.detach())
        found = pair_loss(log_probs, part.reference, lengths[rows], part.preference, config)
        share = len(rows) / count
        (share * found.loss).backward()
        for name, value in describe(found, log_probs).items():
            sums[name] = sums.get(name, 0.0) + share * value
    norm = nn.utils.clip_grad_norm_(trained(policy), config.max_grad_norm)
    check_finite(gradient=norm)
    optimizer.step()
    check_weights(policy=policy)
    return sums | {"grad_norm": norm.item()}


def describe(found: PreferenceLoss, log_probs: Tensor) -> dict[str, float]:
    """Loss, implicit rewards and log-probabilities [N, 2] of some pairs, as means."""
    margin = found.chosen_rewards - found.rejected_rewards
    return {
        "loss": found.loss.item(),
        "chosen_reward": found.chosen_rewards.mean().item(),
        "rejected_reward": found.rejected_rewards.mean().item(),
        "margin": margin.mean().item(),
        "accuracy": (0.5 + 0.5 * margin.sign()).mean().item(),
        "chosen_log_prob": log_probs[:, 0].mean().item(),
        "rejected_log_prob": log_probs[:, 1].mean().item(),
    }


def gradient_weight(chosen_rewards: Tensor, rejected_rewards: Tensor, beta: float) -> Tensor:
    """How much a pair counts in the gradient of the DPO loss: large where the implicit rewards are
    in the wrong order, near 0 where they are right by far.

    Equation: eq:dpo-gradient

    Args:
        chosen_rewards, rejected_rewards: implicit rewards β·log(π/π_ref), of one shape.
        beta: β > 0.
    Returns: the same shape; between 0 and β.
    Raises: ValueError on unequal shapes or beta ≤ 0.
    Source: Rafailov et al. 2023, "Direct Preference Optimization", section 4.
    """
    same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    in_range(beta, "beta", 0.0, open_low=True)
    return beta * torch.sigmoid(rejected_rewards - chosen_rewards)


def _rows(batch: Batch, pairs: Tensor) -> Batch:
    rows = (2 * pairs[:, None] + torch.arange(2, device=pairs.device)).flatten()
    return Batch(*(t[rows] for t in batch[:3]), batch.reference[pairs], batch.preference[pairs])


# --- train ---------------------------------------------------------------------------------------


def train(
    policy: nn.Module,
    tokenizer: Tokenizer,
    data: Sequence[Example],
    config: Config,
    held_out: Sequence[Example] = (),
    cache: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    save_every: int = 50,
) -> Iterator[Metrics]:
    """Train a policy in place on given pairs; the caller plots, logs and stops.

    Args:
        policy: a causal language model, LoRA or not, as it should be at the start; it is the
            reference too. An adapter must be a fresh one: the reference is what lies under it.
        tokenizer: its tokenizer.
        data: pairs, as `encode` returns them.
        config: the settings.
        held_out: pairs that are never trained on; measured every `evaluate_every` steps and after
            the last, and the KL on their prompts with them.
        cache: file for the log-probabilities of the reference, see `cached_log_probs`. A run that
            goes on has them in its checkpoint.
        folder: where checkpoints are written, the last two kept. If it holds one, the run goes on
            from there: pass the same arguments, the policy as it was at the start included. A
            folder is for one run. Without one, a run that is killed is lost.
        save_every: steps from one checkpoint to the next; the last is always kept.
    Yields: Metrics, one a step; those of earlier steps first when a run goes on.
    Raises: ValueError on no data, settings out of range, a label that the variant cannot use, a
        pair that is longer than the model's context (before the first step, with its index), a
        stale cache, an adapter that was trained before, as `checkpoint.load`, or as `update`.
    Source: Rafailov et al. 2023, "Direct Preference Optimization", section 4.
    """
    check_given(config, Config, policy, tokenizer, folder, data=data, held_out=held_out)
    if cache is not None:
        check_path(cache, "cache")
    _check(config, data)
    in_range(save_every, "save_every", 1)
    check_trainable(policy)
    _check_lengths(policy, data, held_out, config)
    policy.eval()  # no dropout: the first loss has to be log 2
    pad, device = tokenizer.pad_token_id, next(policy.parameters()).device
    given = {"data": list(data), "held_out": list(held_out)}
    kept = look_up(folder, save_every, config, policy, tokenizer, given)
    # a copy of a plain policy is needed for the KL alone; an adapter is switched off
    frozen = models.reference(policy) if held_out or isinstance(policy, PeftModel) else None
    everything = [*data, *held_out]
    reference = torch.empty(len(everything), 2)
    if kept.found is None:  # else it stands in the checkpoint
        with frozen() if frozen else nullcontext(policy) as model:
            reference = _reference(model, everything, pad, config, cache)
    run = Progress(adamw(policy, config.learning_rate))
    weights = {"policy": trained_weights(policy), "reference": reference}
    kept, _ = go_on(kept, run, weights, Metrics)
    yield from run.history
    steps = config.epochs * steps_per_epoch(len(data), config)
    done = len(run.history)
    for step, rows in enumerate(islice(shuffled(len(data), config), done, None), done):
        batch = collate([data[i] for i in rows.tolist()], reference[rows], pad)
        rate = set_learning_rate(run.optimizer, step, steps, config.warm_up)
        found = update(policy, run.optimizer, _to(batch, device), config)
        kl = measured = None
        if held_out and ((step + 1) % config.evaluate_every == 0 or step + 1 == steps):
            measured = evaluate(policy, held_out, reference[len(data) :], pad, config)
            prompts = [one.prompt for one in held_out[:_KL_PROMPTS]]
            kl = sampled_kl(policy, frozen, tokenizer, prompts, config)
        told = {"kl": kl, "held_out": measured, "pairs": len(rows)}
        run.history.append(Metrics(step + 1, **found, learning_rate=rate, **told))
        keep(kept, step + 1, steps, lambda: state_of(run, weights))
        yield run.history[-1]


def _check_examples(examples: Sequence[Example], name: str) -> None:
    check_each(examples, name, "an Example, as encode returns it", *Example._fields)


def _check_lengths(
    policy: nn.Module, data: Sequence[Example], held_out: Sequence[Example], config: Config
) -> None:
    for name, examples in (("data", data), ("held_out", held_out)):
        _check_examples(examples, name)
        lengths = [len(one.prompt) + max(map(len, one[1:3])) for one in examples]
        sft.check_lengths(policy, lengths, name, "shorten it or leave it out")
    answered = [len(one.prompt) + config.max_new_tokens for one in held_out[:_KL_PROMPTS]]
    fix = f"lower max_new_tokens={config.max_new_tokens} or shorten the prompt"
    sft.check_lengths(policy, answered, "held_out", fix)


def _reference(
    model: nn.Module,
    examples: list[Example],
    pad_token_id: int,
    config: Config,
    cache: str | os.PathLike | None,
) -> Tensor:
    if config.variant == "simpo":  # knows no reference
        return torch.zeros(len(examples), 2)
    if cache is not None:
        return cached_log_probs(cache, model, examples, pad_token_id)
    return reference_log_probs(model, examples, pad_token_id)


@torch.no_grad()
def evaluate(
    policy: nn.Module,
    examples: Sequence[Example],
    reference: Tensor,
    pad_token_id: int,
    config: Config,
) -> Evaluation:
    """Loss, accuracy, margin and log-probabilities on pairs; reference [N, 2] as from
    `reference_log_probs`."""
    check_settings(config, Config)
    log_probs = reference_log_probs(policy, examples, pad_token_id)
    lengths = torch.tensor([[len(one.chosen), len(one.rejected)] for one in examples])
    preference = torch.tensor([one.preference for one in examples])
    found = describe(pair_loss(log_probs, reference, lengths, preference, config), log_probs)
    return Evaluation(**{name: found[name] for name in Evaluation._fields})


@torch.no_grad()
def sampled_kl(
    policy: nn.Module,
    frozen: Callable,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    config: Config,
) -> float:
    """KL(π‖π_ref) a response, nats, estimated from one response of the policy to each prompt (in
    tokens)."""
    device = next(policy.parameters()).device
    # the response is empty: it comes
    tokens, mask, _ = sft.collate([sft.Example(p, []) for p in prompts], tokenizer.pad_token_id)
    luck = torch.Generator(device).manual_seed(config.seed)
    rollout = sample(
        policy,
        tokens.to(device),
        mask.to(device),
        config.max_new_tokens,
        eos_token_id=end_tokens(policy, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        generator=luck,
    )
    return _log_ratio(rollout, frozen, 1).mean().item()


# --- pairs of its own ----------------------------------------------------------------------------


def online(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    config: Config,
    folder: str | os.PathLike | None = None,
    save_every: int = 5,
) -> Iterator[Metrics]:
    """Online DPO: in each iteration the policy answers new prompts, a judge says which of its
    answers is best and which worst, and the policy is updated on those pairs.

    Args:
        policy, tokenizer: as in `train`; the reference stays the policy of the start.
        prompts: texts or conversations; each iteration takes the next ones.
        reward: the judge, a reward function in log-odds: a pair's label is σ(difference).
        config: the settings; steps are counted over the whole run.
        folder: where checkpoints are written, the last two kept. If it holds one, the run goes on
            from there: pass the same arguments, the policy as it was at the start included. A
            folder is for one run. Without one, a run that is killed is lost.
        save_every: iterations from one checkpoint to the next; the last is always kept.
    Yields: Metrics, one an iteration, those of earlier ones first when a run goes on: means over
        its steps; `kl` from its samples, before them. An iteration without a pair, in which all
        scores of each prompt are equal or all responses, changes nothing: its `pairs` is 0, and
        what is said of pairs is NaN.
    Raises: ValueError on no prompts, one that is too long (before the first step, with its index),
        settings out of range, a variant that cannot use labels between 0 and 1, as `rewards.score`
        or `checkpoint.load`, or after the last iteration if none had a pair, saying why.
    Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", section 3.
    """
    check_given(config, Config, policy, tokenizer, folder, prompts=prompts)
    _check(config, soft=True)
    check_prompts(prompts)
    rewards.check_reward(reward)
    check_prompt_lengths(policy, tokenizer, prompts, config.max_new_tokens)
    in_range(save_every, "save_every", 1)
    check_trainable(policy)
    policy.eval()
    given = {"prompts": as_list(prompts)}
    kept = look_up(folder, save_every, config, policy, tokenizer, given, reward)
    frozen, device = models.reference(policy), next(policy.parameters()).device
    luck = torch.Generator(device).manual_seed(config.seed)
    run, weights = Progress(adamw(policy, config.learning_rate), luck), trained_weights(policy)
    kept, further = go_on(kept, run, weights, Metrics, left_out={})
    left_out = Counter(further["left_out"])
    yield from run.history
    for index in range(len(run.history), config.iterations):
        some = [prompts[i] for i in prompt_indices(len(prompts), index, config)]
        rollout, scores = answers(policy, tokenizer, some, reward, config, luck)
        data, why = pairs_of(rollout, scores, scores.argmax(1), scores.argmin(1))
        left_out.update(why + Counter(pairs=len(data)))
        rate = set_learning_rate(run.optimizer, index, config.iterations, config.warm_up)
        seen = _updates(policy, frozen, run.optimizer, data, tokenizer.pad_token_id, config)
        kl = _log_ratio(rollout, frozen, config.samples_per_prompt).mean().item()
        told = {"kl": kl, "held_out": None, "pairs": len(data)}
        run.history.append(Metrics(index + 1, **mean_of(seen), learning_rate=rate, **told))
        state = partial(state_of, run, weights, left_out=dict(left_out))
        keep(kept, index + 1, config.iterations, state)
        yield run.history[-1]
    if not left_out["pairs"]:
        raise ValueError(_no_pair(left_out, "equal scores"))


def _updates(
    policy: nn.Module,
    frozen: Callable,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Example],
    pad_token_id: int,
    config: Config,
) -> list[dict[str, float]]:
    """The updates of one iteration, and what is said of each; NaN without a pair."""
    if not data:
        return [dict.fromkeys(_SAID_OF_PAIRS, math.nan)]
    with frozen() as model:
        reference = reference_log_probs(model, data, pad_token_id)
    device, seen = next(policy.parameters()).device, []
    for rows in shuffled(len(data), config):
        batch = collate([data[i] for i in rows.tolist()], reference[rows], pad_token_id)
        seen.append(update(policy, optimizer, _to(batch, device), config))
    return seen


def answers(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    config: Config,
    generator: torch.Generator,
) -> tuple[Rollout, Tensor]:
    """Responses to B prompts, and the judge's scores of them, [B, samples_per_prompt], on the
    CPU."""
    group = config.samples_per_prompt
    found = respond(policy, tokenizer, prompts, reward, generator, group, config.max_new_tokens)
    return found.rollout, found.scores.view(-1, group).cpu()


def pairs_of(
    rollout: Rollout, scores: Tensor, first: Tensor, second: Tensor
) -> tuple[list[Example], Counter]:
    """Two responses of each prompt as a pair; equal ones are left out.

    Args:
        rollout: N = B·G responses, those of a prompt next to each other.
        scores: [B, G], log-odds.
        first, second: [B], which of the G; the one with the higher score becomes the chosen one,
            with the label σ(difference of scores).
    Returns: (pairs, how many prompts have none): "one" where first and second are the same, "equal"
        where they have the same tokens.
    """
    found, left_out = [], Counter()
    group = scores.shape[1]
    tokens, mask = rollout.tokens.cpu(), rollout.attention_mask.bool().cpu()
    width = rollout.prompt_length
    for index, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        best, worst = sorted(pair, key=lambda i: -scores[index, i])
        rows = [index * group + best, index * group + worst]
        prompt = tokens[rows[0], :width][mask[rows[0], :width]].tolist()
        sides = [tokens[row, width:][mask[row, width:]].tolist() for row in rows]
        if sides[0] == sides[1]:
            left_out["one" if best == worst else "equal"] += 1
        else:
            gap = (scores[index, best] - scores[index, worst]).item()
            label = torch.sigmoid(torch.tensor(gap)).item()
            found.append(Example(prompt, *sides, label))
    return found, left_out


def judged(rollout: Rollout, scores: Tensor, first: Tensor, second: Tensor) -> list[Example]:
    """The pairs of `pairs_of`.

    Raises: ValueError if there is none, saying why.
    """
    found, left_out = pairs_of(rollout, scores, first, second)
    if not found:
        raise ValueError(_no_pair(left_out, "one response"))
    return found


def _no_pair(left_out: Counter, one: str) -> str:
    reasons = {"one": one, "equal": "equal responses"}
    listed = " and ".join(f"{reasons[k]} to {left_out[k]}" for k in reasons if left_out[k])
    return f"no prompt gave a pair to compare: there were {listed} of the prompts"


def accept(scores: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Rejection sampling: which of a prompt's samples from π_ref to keep, so that those kept come
    from π* ∝ π_ref·exp(r/β), as far as the best sample shows the largest reward.

    Args:
        scores: [B, G], rewards of G samples from π_ref for each of B prompts.
        beta: β > 0; small keeps the best alone.
        generator: of the chance.
    Returns: [B, G], True where kept; the best of each prompt always is.
    Raises: ValueError if beta ≤ 0, or on scores of another shape or that are not finite.
    Source: Liu et al. 2024, "Statistical Rejection Sampling Improves Preference Optimization",
        algorithm 1.
    """
    in_range(beta, "beta", 0.0, open_low=True)
    finite(scores, "scores")
    if scores.dim() != 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; pass [prompts, samples]")
    check_generator(generator, scores.device)
    scores = scores.double()
    probability = ((scores - scores.amax(1, keepdim=True)) / beta).exp()
    return torch.rand(scores.shape, generator=generator, dtype=torch.float64) < probability


def rejection_sampled(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    config: Config,
) -> list[Example]:
    """Pairs for `train` that come from nearly the optimal policy: of each prompt's samples, two of
    those that rejection sampling keeps, labelled by the judge.

    Prompts of which fewer than two different responses are kept give no pair.

    Args: as in `online`, with samples_per_prompt as the number of candidates.
    Raises: ValueError on settings out of range, a prompt that is too long, or if no pair is left,
        saying why.
    Source: Liu et al. 2024, section 3.
    """
    check_given(config, Config, policy, tokenizer, prompts=prompts)
    _check(config, soft=True)
    check_prompts(prompts)
    rewards.check_reward(reward)
    check_prompt_lengths(policy, tokenizer, prompts, config.max_new_tokens)
    luck = torch.Generator(next(policy.parameters()).device).manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    rollout, scores = answers(policy, tokenizer, prompts, reward, config, luck)
    kept = accept(scores, config.beta, order)
    # a random order in which those that are kept come first
    place = torch.rand(kept.shape, generator=order) + ~kept
    two = place.argsort(1)[:, :2]
    usable = kept.gather(1, two).all(1)
    # a pair of a response with itself is left out
    return judged(rollout, scores, two[:, 0], torch.where(usable, two[:, 1], two[:, 0]))


def _log_ratio(rollout: Rollout, frozen: Callable, count: int) -> Tensor:
    """log π − log π_ref of sampled responses, [N]."""
    where = (rollout.tokens, rollout.attention_mask, rollout.completion_mask.shape[1])
    with frozen() as reference:
        ref_log_probs = completion_log_probs(reference, *where, samples_per_prompt=count)
    return (rollout.log_probs - ref_log_probs).sum(1)


# --- on a language that can be listed ------------------------------------------------------------


def train_exact(
    log_probs: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    language: Language,
    chosen: Tensor,
    rejected: Tensor,
    config: Config,
) -> Iterator[float]:
    """The same loss and steps on the sequences of an enumerable language, whose log-probabilities
    the policy gives all at once.

    Args:
        log_probs: gives log π [Y] as it is now, e.g. `enumerable.sequence_log_probs` of a table of
            logits that is trained; before the first step, the reference.
        parameters: what is trained.
        language: as `enumerable.language` returns it.
        chosen, rejected: [N], numbers of sequences.
        config: the settings.
    Yields: the loss before each step, nats a pair.
    Raises: ValueError on no pairs, or settings out of range.
    """
    _check(config)
    in_range(len(chosen), "number of pairs", 1)
    reference = log_probs().detach()
    lengths, pairs = language.mask.sum(1), torch.stack([chosen, rejected], 1)
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    steps = config.epochs * steps_per_epoch(len(pairs), config)
    for step, rows in enumerate(shuffled(len(pairs), config)):
        set_learning_rate(optimizer, step, steps, config.warm_up)
        part = pairs[rows]
        sure = torch.ones(len(part), dtype=reference.dtype)
        loss = pair_loss(log_probs()[part], reference[part], lengths[part], sure, config).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        yield loss.item()


# --- checks --------------------------------------------------------------------------------------


def _check(config: Config, data: Sequence[Example] | None = None, soft: bool = False) -> None:
    check_settings(config, Config)
    one_of(config.variant, VARIANTS, "variant")
    for name in _COUNTS:
        in_range(getattr(config, name), name, 1)
    for name in ("learning_rate", "max_grad_norm", "beta"):
        in_range(getattr(config, name), name, 0.0, open_low=True)
    in_range(config.warm_up, "warm_up", 0.0, 1.0)
    in_range(config.label_smoothing, "label_smoothing", 0.0, 1.0)
    in_range(config.chosen_weight, "chosen_weight", 0.0)
    if config.micro_batch is not None:
        in_range(config.micro_batch, "micro_batch", 1)
    if soft and config.samples_per_prompt < 2:
        raise ValueError("samples_per_prompt must be 2 or more; a pair needs two responses")
    if data is not None:
        _check_examples(data, "data")
        check_some(data, "data", "Example")
    sure = not soft and all(one.preference == 1.0 for one in data or ())
    smooth = config.label_smoothing == 0.0 or config.variant in _SMOOTH
    if config.variant not in _SOFT and not (sure and smooth):
        refused = "labels that are 1" + ("" if smooth else " and no label_smoothing")
        raise ValueError(
            f"variant={config.variant!r} takes {refused}; use one"
            f" of {', '.join(map(repr, _SOFT))}, or put the preferred response first and drop ties"
        )
