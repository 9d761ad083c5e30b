"""Supervised fine-tuning: raise the log-probability of given responses to given prompts.

A batch lies in memory as a rollout does: prompts padded on the left, responses on the right, so
that all responses begin in one column.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from reprlib import repr as shortened
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_helpers import conversations, models
from rlhf_helpers._forward import check_context
from rlhf_helpers._validate import (
    check_each,
    check_list,
    check_model,
    check_some,
    check_tokenizer,
    in_range,
    one_of,
)
from rlhf_helpers.algorithms._loop import (
    adamw,
    check_finite,
    check_given,
    check_settings,
    check_trainable,
    check_weights,
    set_learning_rate,
    shuffled,
    steps_per_epoch,
    trained,
    trained_weights,
)
from rlhf_helpers.algorithms._resume import Progress, go_on, keep, look_up, state_of
from rlhf_helpers.logprobs import completion_log_probs, masked_mean

LOSS_ON = ("response", "all")


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        learning_rate: of AdamW, at its highest.
        epochs: passes over the examples.
        batch_size: examples a step.
        warm_up: share of the steps in which the learning rate rises from 0; it then falls to 0,
            both in a straight line.
        max_grad_norm: a longer gradient is shortened to this.
        loss_on: "response", or "all" to train on the tokens of the prompt too.
        evaluate_every: steps between two looks at the held-out pairs.
        seed: of the order of the examples.
    """

    learning_rate: float = 1e-3
    epochs: int = 1
    batch_size: int = 16
    warm_up: float = 0.1
    max_grad_norm: float = 1.0
    loss_on: str = "response"
    evaluate_every: int = 25
    seed: int = 0


# What the chapter changes, by scale: for all weights, and for an adapter.
AT_SCALE = {"tiny": {"learning_rate": 1e-3}, "gpt2": {"learning_rate": 5e-5}}
LORA_AT_SCALE = {"tiny": {"learning_rate": 1e-2}, "gpt2": {"learning_rate": 1e-3}}
EXAMPLES = {"tiny": 4000, "gpt2": 2000}  # drawn; it trains on those of about four kinds in five


class Example(NamedTuple):
    """A prompt and a response in tokens; the response ends with the end-of-text token, unless it
    was cut."""

    prompt: list[int]
    response: list[int]


class Batch(NamedTuple):
    """Examples side by side, in P + C columns."""

    tokens: Tensor  # [N, P + C], prompts end in column P − 1
    attention_mask: Tensor  # [N, P + C], 0 on padding
    loss_mask: Tensor  # [N, C], 1 where a token is trained


class Metrics(NamedTuple):
    """After one step."""

    step: int  # from 1
    loss: float  # nats a trained token, before the step
    grad_norm: float  # before it is clipped
    learning_rate: float
    held_out: float | None  # cross-entropy after the step, nats a token; None where not measured


def encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[conversations.Prompt, str]],
    name: str = "pairs",
) -> list[Example]:
    """Tokenise prompts and responses, each by itself, and close a response that has ended with one
    end token; see `models.response_ids`.

    Args:
        tokenizer: with an end-of-text token.
        pairs: (prompt, response, …); what follows is ignored. A prompt is a text or a conversation,
            as in `models.encode_prompts`; a response that is a `models.Cut` gets no end.
        name: what messages call the pairs.
    Raises: ValueError on what is no pair of texts, an empty response, a prompt as in
        `models.encode_prompts` or a response that becomes a special token (with its index), or a
        tokenizer without an end-of-text token.
    """
    check_pairs(pairs, name)
    prompts, responses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for index, response in enumerate(responses):
        if not response:
            raise ValueError(f"{name}[{index}] has an empty response; drop it or fill it in")
    found = zip(
        models.prompt_ids(tokenizer, prompts, name),
        models.response_ids(tokenizer, responses, name, prompts),
        strict=True,
    )
    return [Example(*ids) for ids in found]


def check_pairs(pairs: Sequence[tuple[conversations.Prompt, str]], name: str = "pairs") -> None:
    """Refuse what is no pair of texts.

    Raises: ValueError, with the index, on what is no (prompt, response, …); a text is none,
        though it has letters to take for them, nor is a message.
    """
    if isinstance(pairs, str):
        raise ValueError(f"{name} is one text; pass a list of (prompt, response)")
    check_list(pairs, name)
    for index, pair in enumerate(pairs):
        parts = () if isinstance(pair, str) or not isinstance(pair, Sequence) else pair[:2]
        talk = len(parts) == 2 and conversations.messages_of(parts[0]) is not None
        texts = parts[1:] if talk else parts
        if len(parts) < 2 or not all(isinstance(part, str) for part in texts):
            raise ValueError(
                f"{name}[{index}] is {shortened(pair)}; pass a tuple of two texts,"
                " (prompt, response); the prompt may be a conversation"
            )


def check_lengths(model: nn.Module, lengths: Sequence[int], name: str, fix: str) -> None:
    """Refuse examples that are too long, before the first step.

    Raises: ValueError, naming the longest by its index, if it does not fit the model's
        context.
    """
    if lengths:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        check_context(model, lengths[longest], f"{name}[{longest}]", fix)


def encode_fitting(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    name: str,
) -> list[Example]:
    """As `encode`, and ValueError, naming the longest by its index, if one does not fit the model's
    context."""
    examples = encode(tokenizer, pairs, name)
    lengths = [len(one.prompt) + len(one.response) for one in examples]
    check_lengths(policy, lengths, name, "shorten it or leave it out")
    return examples


def collate(examples: Sequence[Example], pad_token_id: int, loss_on: str = "response") -> Batch:
    """Put examples side by side; masks come from lengths, never from token ids.

    With loss_on="all" everything after the first token counts as response.
    """
    one_of(loss_on, LOSS_ON, "loss_on")
    check_each(examples, "examples", "an Example, as encode returns it", "prompt", "response")
    in_range(pad_token_id, "pad_token_id", 0)
    check_some(examples, "examples", "Example")
    if loss_on == "all":
        examples = [Example(p[:1], p[1:] + r) for p, r in examples]
    left = max(len(example.prompt) for example in examples)
    right = max(len(example.response) for example in examples)
    tokens = torch.full((len(examples), left + right), pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, (prompt, response) in enumerate(examples):
        span = slice(left - len(prompt), left + len(response))
        tokens[row, span] = torch.tensor(prompt + response)
        mask[row, span] = 1
    return Batch(tokens, mask, mask[:, left:])


def batches(
    examples: Sequence[Example], config: Config, pad_token_id: int, device: str = "cpu"
) -> Iterator[Batch]:
    """The examples in random order, `epochs` times; a last batch that would not be full is left
    out, unless it is the only one."""
    for rows in shuffled(len(examples), config):
        part = [examples[i] for i in rows.tolist()]
        yield Batch(*(t.to(device) for t in collate(part, pad_token_id, config.loss_on)))


def sft_loss(policy: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-probability of the trained tokens, each given all tokens before it.

    Equation: eq:sft-loss

    The mean is over tokens, so a long response weighs more than a short one.

    Args:
        policy: a causal language model.
        batch: tokens [N, P + C], attention_mask [N, P + C], loss_mask [N, C].
    Returns: a scalar, nats a token.
    Source: Ouyang et al. 2022, "Training language models to follow instructions with human
        feedback", section 3.5.
    """
    length = batch.loss_mask.shape[1]
    log_probs = completion_log_probs(policy, batch.tokens, batch.attention_mask, length)
    return -masked_mean(log_probs, batch.loss_mask)


def update(
    policy: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, max_grad_norm: float = 1.0
) -> tuple[float, float]:
    """One step down the gradient of the loss.

    Returns: the loss and the gradient's norm before it.
    Raises: TrainingStopped on a loss or a gradient that is not finite; there is no step then.
    """
    loss = sft_loss(policy, batch)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trained(policy), max_grad_norm)
    check_finite(loss=loss.detach(), gradient=norm)
    optimizer.step()
    check_weights(policy=policy)
    return loss.item(), norm.item()


def train(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    config: Config,
    held_out: Sequence[tuple[str, str]] = (),
    folder: str | os.PathLike | None = None,
    save_every: int = 50,
) -> Iterator[Metrics]:
    """Fine-tune a policy in place; the caller plots, logs and stops.

    Args:
        policy: a causal language model; only parameters that require a gradient are trained.
        tokenizer: its tokenizer.
        pairs: (prompt, response, …), as text.
        config: the settings.
        held_out: pairs that are never trained on, to be measured every `evaluate_every` steps and
            after the last.
        folder: where checkpoints are written, the last two kept. If it holds one, the run goes on
            from there: pass the same arguments, the policy as it was at the start included. A
            folder is for one run. Without one, a run that is killed is lost.
        save_every: steps from one checkpoint to the next; the last is always kept.
    Yields: Metrics, one a step; those of earlier steps first when a run goes on.
    Raises: ValueError as `encode`, on no pairs, one that is longer than the model's context (before
        the first step), settings out of range, or as `checkpoint.load`; TrainingStopped as
        `update`.
    """
    check_given(config, Config, policy, tokenizer, folder, pairs=pairs, held_out=held_out)
    check(pairs, config)
    in_range(save_every, "save_every", 1)
    check_trainable(policy)
    policy.eval()  # no dropout: what is trained is what is sampled
    examples = encode_fitting(policy, tokenizer, pairs, "pairs")
    data = {"pairs": examples, "held_out": encode_fitting(policy, tokenizer, held_out, "held_out")}
    kept = look_up(folder, save_every, config, policy, tokenizer, data)
    run, weights = Progress(adamw(policy, config.learning_rate)), trained_weights(policy)
    kept, _ = go_on(kept, run, weights, Metrics)
    yield from run.history
    steps = config.epochs * steps_per_epoch(len(examples), config)
    device = next(policy.parameters()).device
    every = batches(examples, config, tokenizer.pad_token_id, device)
    done = len(run.history)
    for step, batch in enumerate(islice(every, done, None), done):
        rate = set_learning_rate(run.optimizer, step, steps, config.warm_up)
        loss, norm = update(policy, run.optimizer, batch, config.max_grad_norm)
        due = (step + 1) % config.evaluate_every == 0 or step + 1 == steps
        measured = cross_entropy(policy, tokenizer, held_out) if held_out and due else None
        run.history.append(Metrics(step + 1, loss, norm, rate, measured))
        keep(kept, step + 1, steps, lambda: state_of(run, weights))
        yield run.history[-1]


def check(pairs: Sequence[tuple[str, str]], config: Config) -> None:
    """Raises: ValueError on no pairs or a setting out of range, naming it."""
    _check_some(pairs)
    check_settings(config, Config)
    in_range(config.learning_rate, "learning_rate", 0.0, open_low=True)
    in_range(config.epochs, "epochs", 1)
    in_range(config.batch_size, "batch_size", 1)
    in_range(config.warm_up, "warm_up", 0.0, 1.0)
    in_range(config.evaluate_every, "evaluate_every", 1)
    in_range(config.max_grad_norm, "max_grad_norm", 0.0, open_low=True)
    one_of(config.loss_on, LOSS_ON, "loss_on")


def _check_some(pairs: Sequence[tuple[str, str]]) -> None:
    check_pairs(pairs)
    check_some(pairs, "pairs", "(prompt, response)")


@torch.no_grad()
def surprise(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 100,
) -> tuple[Tensor, Tensor]:
    """How unexpected each response is to the policy: −log π(response and its end | prompt).

    Returns: (nats [N], tokens [N]).
    """
    check_model(policy, "policy")
    check_tokenizer(tokenizer)
    in_range(batch_size, "batch_size", 1)
    _check_some(pairs)
    examples = encode(tokenizer, pairs)
    device = next(policy.parameters()).device
    nats, tokens = [], []
    for begin in range(0, len(examples), batch_size):
        batch = collate(examples[begin : begin + batch_size], tokenizer.pad_token_id)
        batch = Batch(*(t.to(device) for t in batch))
        length = batch.loss_mask.shape[1]
        log_probs = completion_log_probs(policy, batch.tokens, batch.attention_mask, length)
        nats.append(-log_probs.sum(1).cpu())
        tokens.append(batch.loss_mask.sum(1).cpu())
    return torch.cat(nats), torch.cat(tokens)


def cross_entropy(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> float:
    """Mean surprise a token of the responses, nats; its exponential is the perplexity."""
    nats, tokens = surprise(policy, tokenizer, pairs)
    return (nats.sum() / tokens.sum()).item()
