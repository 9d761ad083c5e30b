"""The reward model: a language model's trunk with one number read at the last token, trained on
comparisons, and how far its probabilities can be trusted.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import conversations, models
from rlhf_helpers._forward import context_of, language_model
from rlhf_helpers._validate import (
    as_numbers,
    check_each,
    check_list,
    check_model,
    check_some,
    check_texts,
    check_tokenizer,
    finite,
    has,
    in_range,
    one_of,
    pair_problem,
    same_shape,
)
from rlhf_helpers.algorithms._loop import (
    check_finite,
    check_given,
    check_trainable,
    check_weights,
    set_learning_rate,
    steps_per_epoch,
    trained,
    trained_weights,
)
from rlhf_helpers.algorithms._resume import Progress, go_on, keep, look_up, state_of
from rlhf_helpers.algorithms.sft import check_lengths
from rlhf_helpers.losses import bradley_terry_loss, plackett_luce_loss, rao_kupper_loss

LOSSES = ("bradley-terry", "plackett-luce", "rao-kupper")
SIDES = ("right", "left")
# a run of a hundred steps is too short for a memory of a thousand; Brown et al. 2020, appendix B
BETAS = (0.9, 0.95)
_POOL = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        learning_rate: of AdamW, at its highest.
        epochs: passes over the comparisons.
        batch_size: comparisons a step.
        warm_up: share of the steps in which the learning rate rises from 0; it then falls to 0,
            both in a straight line.
        weight_decay: of AdamW.
        max_grad_norm: a longer gradient is shortened to this.
        loss: "bradley-terry", "plackett-luce" for rankings of more than two, or "rao-kupper", which
            gives ties a probability and learns the threshold.
        threshold_rate: learning rate of the threshold's logarithm, which starts at 0. In a run of
            some dozens of steps, the rate of a network would leave it there.
        centring: coefficient of the mean squared sum of a comparison's scores, which pulls the
            scores towards mean 0; comparisons say nothing about it.
        evaluate_every: steps between two looks at the held-out comparisons.
        seed: of the order of the comparisons.
    """

    learning_rate: float = 6e-4
    epochs: int = 1
    batch_size: int = 32
    warm_up: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loss: str = "bradley-terry"
    threshold_rate: float = 0.1
    centring: float = 0.0
    evaluate_every: int = 50
    seed: int = 0


# What the chapter changes, by scale, how many pairs its recorded runs train on, and how many passes
# over soft labels end the training of the highest and the lowest scores.
AT_SCALE = {"tiny": {"learning_rate": 6e-4}, "gpt2": {"learning_rate": 2e-5}}
PAIRS = 2000
PASSES = 3
STRENGTHS = ("unused", "margin", "weight")  # what the strength of a row can become
# of a row, see `preferences`
_FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "tie",
    "strength",
    "annotator",
    "chosen_ended",
    "rejected_ended",
)


class Comparison(NamedTuple):
    """Responses to one prompt, best first, and how sure that order is."""

    prompt: conversations.Prompt  # a text or a conversation
    responses: tuple[str, ...]  # two, or more for a ranking
    preference: float = 1.0  # P(the first is preferred); 0.5 for a tie
    margin: float = 0.0  # how far apart the scores should be at least
    weight: float = 1.0


class Batch(NamedTuple):
    """N comparisons of K responses, all side by side; row n·K + k is response k of comparison n."""

    tokens: Tensor  # [N·K, T]
    attention_mask: Tensor  # [N·K, T], 0 on padding
    preference: Tensor  # [N]
    margin: Tensor  # [N]
    weight: Tensor  # [N]


class Evaluation(NamedTuple):
    """How a model does on comparisons."""

    loss: float  # Bradley-Terry, nats a comparison
    accuracy: float  # share in which the preferred response scores higher
    margin: float  # mean of score of the first − score of the second


class Metrics(NamedTuple):
    """After one step."""

    step: int  # from 1
    loss: float  # nats a comparison, before the step, with the centring term
    margin: float  # mean of score of the first − score of the last, in this batch
    grad_norm: float  # before it is clipped
    learning_rate: float
    threshold: float | None  # ζ of Rao-Kupper after the step
    held_out: Evaluation | None  # after the step; None where not measured


# --- the model -----------------------------------------------------------------------------------


def load(
    source: str | os.PathLike | PreTrainedModel,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, Tokenizer]:
    """A reward model on the trunk of a causal language model, and the tokenizer.

    It is the library's model for sequence classification with one label. Made of a language model,
    its head starts at zero, so all scores are 0 and the first loss is log 2 a pair: it knows
    nothing yet. A reward model that was saved, or is given, keeps its head.

    Args:
        source, tokenizer, device: as in `models.load`; a model object is copied.
    Returns: (model in eval mode, tokenizer).
    Raises: as `models.load`; ValueError if the library has no classifier with a head on the last
        token for the architecture, if a classifier has more than one label, or on an adapter.
    """
    tokenizer = source if tokenizer is None and _is_path(source) else tokenizer
    if _is_path(source) and _holds_classifier(source):
        source = models.from_files(AutoModelForSequenceClassification, source, torch.float32)
    language_model, tokenizer = models.load(source, tokenizer, device)
    if isinstance(language_model, PeftModel):
        raise ValueError("source carries an adapter; pass source.merge_and_unload()")
    if isinstance(getattr(language_model, "score", None), nn.Module):
        labels = len(language_model.score.weight)
        if labels != 1:
            raise ValueError(f"source gives {labels} scores; pass a model with one")
        return copy.deepcopy(language_model), tokenizer
    config = copy.deepcopy(language_model.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(language_model.base_model.state_dict())
        nn.init.zeros_(model.score.weight)
    except (ValueError, AttributeError, RuntimeError) as error:
        name = type(language_model).__name__
        raise ValueError(
            f"source: the library has no classifier with one score at the last token for a {name}"
        ) from error
    return model.to(device, language_model.dtype).eval(), tokenizer


def _is_path(source: object) -> bool:
    return isinstance(source, str | os.PathLike)


def _holds_classifier(source: str | os.PathLike) -> bool:
    kinds = models.load_config(source).architectures or [""]
    return kinds[0].endswith("ForSequenceClassification")


def last_scores(model: nn.Module, tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """The score of each text: the head, applied to the hidden state of its last token.

    Equation: eq:reward-score

    Only there has the model read everything. Which token is the last is told by the mask, on
    whichever side the padding is, and never by the token, since the pad token may be the
    end-of-text token too.

    Args:
        model: as `load` returns it, or with an adapter on it.
        tokens: [N, T].
        attention_mask: [N, T]; 1 or True counts.
    Returns: [N].
    Raises: ValueError on unequal shapes, a text without a token, or one that is too long.
    """
    same_shape(tokens=tokens, attention_mask=attention_mask)
    mask = attention_mask.long()
    longest, limit = int(mask.sum(1).max()), context_of(model.config)
    if limit is not None and longest > limit:
        raise ValueError(f"a text has {longest} tokens and the model reads {limit}; shorten it")
    if not mask.any(1).all():
        empty = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"attention_mask[{empty}] is 0 everywhere; a score needs one token")
    classifier = language_model(model)
    hidden = classifier.base_model(
        tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    # 1, 2, 3, … on real tokens: the largest is the last one
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    rows = torch.arange(len(tokens), device=tokens.device)
    return classifier.score(hidden[rows, last]).squeeze(-1)


def collate(
    texts: Sequence[Sequence[int]], pad_token_id: int, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Token lists side by side: (tokens [N, T], attention_mask [N, T]), padded on one side.

    The score does not depend on the side; a model that reads the last column does.
    """
    one_of(side, SIDES, "side")
    check_list(texts, "texts")
    check_some(texts, "texts", "list of tokens")
    for index, ids in enumerate(texts):
        check_list(ids, f"texts[{index}]")
    in_range(pad_token_id, "pad_token_id", 0)
    width = max(map(len, texts))
    tokens = torch.full((len(texts), width), pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(texts):
        start = 0 if side == "right" else width - len(ids)
        tokens[row, start : start + len(ids)] = torch.tensor(ids)
        mask[row, start : start + len(ids)] = 1
    return tokens, mask


def encode(
    tokenizer: Tokenizer, prompts: Sequence[conversations.Prompt], responses: Sequence[str]
) -> list[list[int]]:
    """Tokens of each prompt, its response and the end token, which a response that is a
    `models.Cut` does not get; see `models.response_ids`. A response may be empty: a policy can end
    at once, and that has a score too. So may a prompt, which is a text or a conversation as in
    `models.encode_prompts`.

    Raises: ValueError on no texts, one text in place of a list, lists of unequal length, a text
        that becomes a special token, a tokenizer without an end-of-text token.
    """
    for name, texts in (("prompts", prompts), ("responses", responses)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is one text; pass a list of texts")
        check_list(texts, name)
    if len(responses) == 0 or len(prompts) != len(responses):
        raise ValueError(
            f"prompts has {len(prompts)} texts and responses {len(responses)}; pass one prompt for "
            "each response, and at least one"
        )
    before = models.prompt_ids(tokenizer, prompts)
    after = models.response_ids(tokenizer, responses, prompts=prompts)
    halves = zip(before, after, strict=True)
    return [[*prompt, *response] for prompt, response in halves]


@torch.no_grad()
def scores(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    responses: Sequence[str],
    batch_size: int = 128,
) -> Tensor:
    """Score of each response to its prompt, [N], on the CPU, without gradient.

    Raises: ValueError as `encode`, or on a text longer than the model can read.
    """
    check_model(model)
    check_tokenizer(tokenizer)
    in_range(batch_size, "batch_size", 1)
    texts = encode(tokenizer, prompts, responses)
    device = next(model.parameters()).device
    # texts of one length next to each other need little padding
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts))
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        tokens, mask = collate([texts[i] for i in part], tokenizer.pad_token_id)
        found[part] = last_scores(model, tokens.to(device), mask.to(device)).float().cpu()
    return found


def as_reward(model: nn.Module, tokenizer: Tokenizer) -> Callable[..., list[float]]:
    """The model as a reward function: (prompts, completions, **columns) to numbers. A conversation,
    which comes as a `conversations.ConversationText`, is read as the model was trained to, with the
    chat template."""
    check_model(model)
    check_tokenizer(tokenizer)

    def reward_model(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        return scores(model, tokenizer, prompts, completions).tolist()

    return reward_model


# --- training ------------------------------------------------------------------------------------


def comparisons(pairs: Iterable[Mapping], strength: str = "unused") -> list[Comparison]:
    """The rows of a data set of pairs (see `preferences`) as comparisons; a tie has preference ½, a
    response that had not ended is a `models.Cut`. Who the annotator was is not used.

    Args:
        pairs: rows.
        strength: what the strength of a row becomes: "margin", "weight", or "unused". Where a row
            has none, the margin is 0 and the weight 1.
    Raises: ValueError on no rows, one with a field that pairs do not have, or an unknown use of
        strength.
    """
    one_of(strength, STRENGTHS, "strength")
    found = []
    has(pairs, "pairs", "a data set, or a list of rows", "__iter__")
    for index, row in enumerate(pairs):
        has(row, f"pairs[{index}]", "a row of a data set", "keys", "get")
        missing = [name for name in _FIELDS[:3] if row.get(name) is None]
        if missing:
            raise ValueError(f"pairs[{index}] has no {missing[0]!r}; add it or leave the row out")
        unknown = sorted(set(row) - set(_FIELDS))
        if unknown:
            raise ValueError(
                f"pairs[{index}] has the field {unknown[0]!r}, of which comparisons make nothing;"
                " leave it out"
            )
        sides = [
            models.Cut(row[side]) if row.get(f"{side}_ended") is False else row[side]
            for side in ("chosen", "rejected")
        ]
        one = Comparison(row["prompt"], tuple(sides), 0.5 if row.get("tie") else 1.0)
        if strength != "unused" and row.get("strength") is not None:
            one = one._replace(**{strength: float(row["strength"])})
        found.append(one)
    if not found:
        raise ValueError("pairs is empty; pass at least one row")
    return found


def labelled(
    prompts: Sequence[conversations.Prompt],
    first: Sequence[str],
    second: Sequence[str],
    preference: Tensor,
) -> list[Comparison]:
    """Comparisons of two with soft labels.

    Args:
        prompts: N texts or conversations.
        first, second: N texts each.
        preference: [N], P(the first is preferred), e.g. the mean of what annotators said.
    Raises: ValueError on unequal lengths, one text in place of a list, or responses that nobody can
        compare, as `check_comparisons`.
    """
    for name, texts in (("prompts", prompts), ("first", first), ("second", second)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is one text; pass a list of texts")
    check_list(prompts, "prompts")
    check_texts(first=first, second=second)
    preference = as_numbers(preference, "preference")
    if preference.ndim != 1:
        raise ValueError(f"preference has shape {tuple(preference.shape)}; pass [N], one a pair")
    sizes = [len(prompts), len(first), len(second), len(preference)]
    if len(set(sizes)) > 1:
        raise ValueError(f"prompts, first, second and preference have lengths {sizes}")
    rows = zip(prompts, first, second, preference.tolist(), strict=True)
    found = [Comparison(prompt, (one, two), p) for prompt, one, two, p in rows]
    check_comparisons(found, "pairs")
    return found


def check_comparisons(data: Sequence[Comparison], name: str = "data") -> None:
    """Refuse what cannot be compared.

    Raises: ValueError, with the index, on a prompt that is neither text nor conversation, responses
        that are no texts, an empty response, or two that are equal but for what cannot be seen.
    """
    check_each(data, name, "a Comparison", *Comparison._fields)
    for index, one in enumerate(data):
        where = f"{name}[{index}]"
        if not isinstance(one.responses, tuple | list):
            raise ValueError(
                f"{where} has a {type(one.responses).__name__} as responses; pass a tuple of texts"
            )
        messages = conversations.messages_of(one.prompt)
        texts = one.responses if messages is not None else (one.prompt, *one.responses)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where} holds something other than texts; pass texts")
        problem = None if messages is None else conversations.conversation_problem(messages)
        if problem:
            raise ValueError(f"{where}.prompt {problem}")
        in_range(one.preference, f"{where}.preference", 0.0, 1.0)
        in_range(one.margin, f"{where}.margin", -math.inf)
        in_range(one.weight, f"{where}.weight", 0.0)
        for first, second in itertools.combinations(one.responses, 2):
            problem = pair_problem(first, second)
            if problem:
                raise ValueError(f"{where} {problem}; leave it out")


def token_lists(
    tokenizer: Tokenizer, data: Sequence[Comparison], name: str = "data"
) -> list[list[list[int]]]:
    """Tokens of each comparison's responses, each behind its prompt; all comparisons are of one
    size.

    Raises: ValueError, with the index, as `encode`, or on two responses with the same tokens.
    """
    check_each(data, name, "a Comparison", *Comparison._fields)
    before = [one.prompt for one in data]
    prompts = models.prompt_ids(tokenizer, before, name)
    columns = [
        models.response_ids(tokenizer, list(column), name, before)
        for column in zip(*(one.responses for one in data), strict=True)
    ]
    found = [
        [[*prompt, *ids] for ids in row] for prompt, *row in zip(prompts, *columns, strict=True)
    ]
    for index, row in enumerate(found):
        if len({tuple(ids) for ids in row}) < len(row):
            raise ValueError(
                f"{name}[{index}] has two responses with the same tokens, so nothing can be learned"
                " from it; leave it out"
            )
    return found


def batches(
    data: Sequence[Comparison], tokenizer: Tokenizer, config: Config, device: torch.device
) -> Iterator[Batch]:
    """The comparisons in random order, `epochs` times; a last batch that would not be full is left
    out, unless it is the only one. Comparisons of similar length share a batch, which saves
    padding."""
    size = len(data[0].responses)
    texts = [ids for row in token_lists(tokenizer, data) for ids in row]
    labels = torch.tensor([[one.preference, one.margin, one.weight] for one in data])
    lengths = torch.tensor([len(text) for text in texts]).view(-1, size).amax(1)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        order = torch.randperm(len(data), generator=generator)
        order = order[: steps_per_epoch(len(data), config) * config.batch_size]
        pools = order.split(_POOL * config.batch_size)
        sorted_pools = [pool[lengths[pool].argsort(stable=True)] for pool in pools]
        parts = [part for pool in sorted_pools for part in pool.split(config.batch_size)]
        for turn in torch.randperm(len(parts), generator=generator).tolist():
            part = parts[turn]
            rows = [texts[i * size + k] for i in part.tolist() for k in range(size)]
            tensors = (*collate(rows, tokenizer.pad_token_id), *labels[part].unbind(1))
            yield Batch(*(tensor.to(device) for tensor in tensors))


def reward_model_loss(
    scores: Tensor, batch: Batch, config: Config, log_threshold: Tensor | None = None
) -> Tensor:
    """The loss of the scores [N, K] of N comparisons, best first, and the centring term.

    Args:
        scores: [N, K]; K = 2 unless the loss is "plackett-luce".
        batch: its labels are used.
        config: which loss, and the coefficient of the centring term.
        log_threshold: log ζ of the Rao-Kupper loss, a scalar.
    Returns: a scalar, nats a comparison.
    Source: centring: Eisenstein et al. 2023, "Helping or Herding? Reward Model Ensembles Mitigate
        but do not Eliminate Reward Hacking", appendix A.
    """
    if config.loss == "plackett-luce":
        loss = plackett_luce_loss(scores)
    elif config.loss == "rao-kupper":
        loss = rao_kupper_loss(*scores.unbind(1), batch.preference, log_threshold.exp())
    else:
        loss = bradley_terry_loss(*scores.unbind(1), batch.margin, batch.preference, batch.weight)
    return loss + config.centring * scores.sum(1).square().mean()


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    log_threshold: Tensor | None = None,
) -> tuple[float, float, float]:
    """One step down the gradient of the loss: all responses of a batch in one pass.

    Returns: the loss before the step, the mean margin, the gradient's norm.
    Raises: TrainingStopped on a loss or a gradient that is not finite; there is no step then.
    """
    flat = last_scores(model, batch.tokens, batch.attention_mask)
    by_comparison = flat.view(len(batch.preference), -1)
    loss = reward_model_loss(by_comparison, batch, config, log_threshold)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trained(model), config.max_grad_norm)
    check_finite(loss=loss.detach(), gradient=norm)
    optimizer.step()
    check_weights(model=model)
    margin = (by_comparison[:, 0] - by_comparison[:, -1]).mean()
    return loss.item(), margin.item(), norm.item()


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: Sequence[Comparison],
    config: Config,
    held_out: Sequence[Comparison] = (),
    folder: str | os.PathLike | None = None,
    save_every: int = 50,
) -> Iterator[Metrics]:
    """Train a reward model in place; the caller plots, logs and stops.

    Args:
        model: as `load` returns it; only parameters that require a gradient are trained.
        tokenizer: its tokenizer.
        data: comparisons, all with the same number of responses.
        config: the settings.
        held_out: comparisons of two that are never trained on, measured every `evaluate_every`
            steps and after the last.
        folder: where checkpoints are written, the last two kept. If it holds one, the run goes on
            from there: pass the same arguments, the model as it was at the start included. A
            folder is for one run. Without one, a run that is killed is lost.
        save_every: steps from one checkpoint to the next; the last is always kept.
    Yields: Metrics, one a step; those of earlier steps first when a run goes on.
    Raises: ValueError on no comparisons, unequal numbers of responses, labels that the loss does
        not use, settings out of range, and with its index on a comparison as `check_comparisons`
        and `token_lists` or one that is too long, before the first step, or as
        `checkpoint.load`; TrainingStopped as `update`.
    """
    check_given(config, Config, model, tokenizer, folder, "model", data=data, held_out=held_out)
    _check(data, config)
    in_range(save_every, "save_every", 1)
    both = {"data": data, "held_out": held_out}
    learned = {name: _fitting(model, tokenizer, rows, name) for name, rows in both.items()}
    check_trainable(model, "model")
    model.eval()  # no dropout: the score that is trained is the score that is used
    kept = look_up(folder, save_every, config, model, tokenizer, learned, name="model")
    log_threshold = torch.zeros((), requires_grad=True) if config.loss == "rao-kupper" else None
    run = Progress(_optimizer(model, log_threshold, config))
    weights = {"model": trained_weights(model)}
    if log_threshold is not None:
        weights["log_threshold"] = log_threshold.detach()
    kept, _ = go_on(kept, run, weights, Metrics)
    yield from run.history
    steps, done = config.epochs * steps_per_epoch(len(data), config), len(run.history)
    every = batches(data, tokenizer, config, next(model.parameters()).device)
    for step, batch in enumerate(itertools.islice(every, done, None), done):
        rate = set_learning_rate(run.optimizer, step, steps, config.warm_up)
        loss, margin, norm = update(model, run.optimizer, batch, config, log_threshold)
        threshold = None if log_threshold is None else log_threshold.exp().item()
        due = (step + 1) % config.evaluate_every == 0 or step + 1 == steps
        measured = evaluate(model, tokenizer, held_out) if held_out and due else None
        run.history.append(Metrics(step + 1, loss, margin, norm, rate, threshold, measured))
        keep(kept, step + 1, steps, lambda: state_of(run, weights))
        yield run.history[-1]


def _optimizer(model: nn.Module, log_threshold: Tensor | None, config: Config) -> torch.optim.AdamW:
    groups = [{"params": trained(model), "weight_decay": config.weight_decay}]
    if log_threshold is not None:
        groups.append({"params": [log_threshold], "lr": config.threshold_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS)


def _fitting(
    model: nn.Module, tokenizer: Tokenizer, data: Sequence[Comparison], name: str
) -> list[list]:
    """What is learned from comparisons: the tokens of their responses, and their labels."""
    check_comparisons(data, name)
    found = token_lists(tokenizer, data, name)
    lengths = [max(map(len, row)) for row in found]
    check_lengths(model, lengths, name, "shorten it or leave it out")
    return [found, [list(one[2:]) for one in data]]


def _check(data: Sequence[Comparison], config: Config) -> None:
    check_each(data, "data", "a Comparison", *Comparison._fields)
    check_some(data, "data", "Comparison")
    one_of(config.loss, LOSSES, "loss")
    size = len(data[0].responses)
    plain = Comparison("", ())
    for index, one in enumerate(data):
        if len(one.responses) != size:
            raise ValueError(
                f"data[{index}] has {len(one.responses)} responses and data[0] has {size}; train"
                " on comparisons of one size"
            )
        labels = {"margin", "weight", "preference"} - {
            "bradley-terry": {"margin", "weight", "preference"},
            "rao-kupper": {"preference"},
            "plackett-luce": set(),
        }[config.loss]
        ignored = [name for name in sorted(labels) if getattr(one, name) != getattr(plain, name)]
        if ignored:
            raise ValueError(
                f"data[{index}] has a {ignored[0]}, which loss={config.loss!r} does not use; "
                'take "bradley-terry" or leave it out'
            )
    if size < 2 or (size > 2 and config.loss != "plackett-luce"):
        raise ValueError(
            f"data holds comparisons of {size} responses; pass two, or more with "
            'loss="plackett-luce"'
        )
    in_range(config.learning_rate, "learning_rate", 0.0, open_low=True)
    in_range(config.epochs, "epochs", 1)
    in_range(config.batch_size, "batch_size", 1)
    in_range(config.warm_up, "warm_up", 0.0, 1.0)
    in_range(config.weight_decay, "weight_decay", 0.0)
    in_range(config.threshold_rate, "threshold_rate", 0.0, open_low=True)
    in_range(config.centring, "centring", 0.0)
    in_range(config.evaluate_every, "evaluate_every", 1)
    in_range(config.max_grad_norm, "max_grad_norm", 0.0, open_low=True)


# --- measuring -----------------------------------------------------------------------------------


def score_gaps(model: nn.Module, tokenizer: Tokenizer, data: Sequence[Comparison]) -> Tensor:
    """Score of the first response less that of the second, for comparisons of two: the log-odds,
    [N], that the model gives to the first."""
    check_model(model)
    check_tokenizer(tokenizer)
    check_list(data, "data")
    check_comparisons(data)
    check_some(data, "data", "Comparison")
    prompts = [one.prompt for one in data for _ in range(2)]
    responses = [response for one in data for response in one.responses]
    if len(responses) != len(prompts):
        raise ValueError("data must hold comparisons of two responses")
    found = scores(model, tokenizer, prompts, responses).view(-1, 2)
    return found[:, 0] - found[:, 1]


def evaluate(model: nn.Module, tokenizer: Tokenizer, data: Sequence[Comparison]) -> Evaluation:
    """Loss, accuracy and margin on comparisons of two.

    Raises: ValueError on no comparisons, one of another size, or as `check_comparisons`.
    """
    gaps = score_gaps(model, tokenizer, data)
    preference = torch.tensor([one.preference for one in data])
    loss = bradley_terry_loss(gaps, torch.zeros_like(gaps), preference=preference)
    return Evaluation(loss.item(), accuracy(gaps, preference), gaps.mean().item())


def accuracy(gaps: Tensor, preference: Tensor) -> float:
    """Share of the comparisons whose sign is right. A gap of 0 and a tie are half right each.

    Given true probabilities in place of labels, this is the accuracy that is to be expected on
    labels, without their noise.

    Args:
        gaps: [N], log-odds given to the first response.
        preference: [N], P(the first is preferred), or a label: 1, 0, or ½ for a tie.
    Raises: ValueError on unequal shapes, no comparisons, a number that is not finite, a preference
        outside [0, 1].
    """
    _check_gaps(gaps, preference)
    return (0.5 + gaps.sign() * (preference - 0.5)).mean().item()


def _check_gaps(gaps: Tensor, preference: Tensor) -> None:
    same_shape(gaps=gaps, preference=preference)
    in_range(gaps.numel(), "number of gaps", 1)
    finite(gaps, "gaps")
    finite(preference, "preference")
    if preference.min() < 0 or preference.max() > 1:
        raise ValueError("preference must lie in [0, 1]: P(the first is preferred), or a label")


class Reliability(NamedTuple):
    """How sure the model was, and how often it was right, by bins of confidence."""

    confidence: Tensor  # [B], mean within the bin; NaN where the bin is empty
    accuracy: Tensor  # [B]
    count: Tensor  # [B]


def reliability(gaps: Tensor, preference: Tensor, bins: int = 10) -> Reliability:
    """Bins of equal width of the confidence max(p, 1 − p), from ½ to 1, with p = σ(gap).

    Args:
        gaps: [N], log-odds given to the first response.
        preference: [N], 1 where the first was preferred, 0 the second, or a share between.
        bins: B ≥ 1.
    Returns: Reliability. A soft preference counts as partly right.
    Raises: ValueError on unequal shapes, no comparisons, a number that is not finite, bins < 1.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    _check_gaps(gaps, preference)
    in_range(bins, "bins", 1)
    gaps, preference = gaps.double(), preference.double()
    confidence = gaps.abs().sigmoid()
    right = torch.where(gaps >= 0, preference, 1.0 - preference)
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    count = torch.bincount(bin_of, minlength=bins)
    mean = (torch.bincount(bin_of, x, minlength=bins) / count for x in (confidence, right))
    return Reliability(*mean, count)


def expected_calibration_error(gaps: Tensor, preference: Tensor, bins: int = 10) -> float:
    """Mean distance of confidence and accuracy over the bins, each weighted by its comparisons.

    Equation: eq:calibration-error

    Args, Raises: as in `reliability`.
    Returns: between 0 and 1. With few comparisons it is above 0 even for a perfect model.
    Source: Guo et al. 2017, equation 3.
    """
    found = reliability(gaps, preference, bins)
    distance = (found.confidence - found.accuracy).abs().nan_to_num(0.0)
    return ((distance * found.count).sum() / found.count.sum()).item()


def fit_temperature(gaps: Tensor, preference: Tensor) -> float:
    """The number τ > 0 that makes σ(gap / τ) fit the labels best; above 1 the model was too sure.

    Dividing changes no order and so no accuracy. Fit it on comparisons that were not trained on.

    Args:
        gaps: [N], log-odds given to the first response.
        preference: [N], in [0, 1].
    Returns: τ, to about four digits; inf if the gaps are no better than chance, since it is best
        then to say ½ to everything.
    Raises: ValueError on unequal shapes, no comparisons, or gaps that are right without exception:
        τ would go to 0.
    Source: Guo et al. 2017, section 4.2.
    """
    _check_gaps(gaps, preference)
    gaps, preference = gaps.double(), preference.double()

    def slope(inverse: float) -> float:
        """Derivative of the loss by 1/τ: it rises with 1/τ, since the loss is convex in it."""
        return (((inverse * gaps).sigmoid() - preference) * gaps).mean().item()

    low, high = 1e-4, 1e4
    if slope(low) >= 0:
        return math.inf
    if slope(high) <= 0:
        raise ValueError("gaps are right without exception; no temperature fits best")
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1.0 / math.sqrt(low * high)
