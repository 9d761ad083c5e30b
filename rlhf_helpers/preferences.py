"""Preferences: pairs of responses and where they are kept, simulated annotators, agreement between
annotators, and strengths from counts of wins.

A pair is a row with a prompt, the chosen and the rejected response, and, where they are known,
whether it was a tie, how strong the preference was, and who gave it. A set of pairs is a
`datasets.Dataset` with those columns. The prompt is a text, or a conversation as in TRL; responses
are texts.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_helpers import rewards
from rlhf_helpers._validate import (
    as_numbers,
    check_each,
    check_list,
    check_path,
    check_seed,
    check_some,
    check_text,
    finite,
    floats,
    has,
    in_range,
    one_of,
    pair_problem,
    visible,
)
from rlhf_helpers.conversations import (
    Conversation,
    Prompt,
    chat,
    conversation_problem,
    messages_of,
)
from rlhf_helpers.models import Cut, response_ids
from rlhf_helpers.rollout import write

TEXTS = ("prompt", "chosen", "rejected")
_LABELS = (*TEXTS, "tie", "strength", "annotator")
_ENDED = {"chosen": "chosen_ended", "rejected": "rejected_ended"}  # False for one that was cut
FEATURES = Features(
    {name: Value("string") for name in TEXTS}
    | {"tie": Value("bool"), "strength": Value("float64"), "annotator": Value("string")}
    | {name: Value("bool") for name in _ENDED.values()}
)
MESSAGES = List({"role": Value("string"), "content": Value("string")})  # a column of conversations
# what public sets say of a pair besides, of which only the scores are used
EXTRA = ("messages", "prompt_id", "source", "score_chosen", "score_rejected")
_HH = re.compile(r"\n\n(Human|Assistant):")  # how HH-RLHF begins a turn
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
LEVELS = ("nominal", "ordinal", "interval", "ratio")
_SHOWN = 20  # bad rows that an error lists
_RESAMPLES = 1000
_NEWTON_STEPS = 10_000

# A reward function: (prompts, completions) to as many numbers, called as `rewards.call` says.
Utility = Callable[[list[str], list[str]], Sequence[float]]

# --- pairs ---------------------------------------------------------------------------------------


def from_rows(rows: Iterable[Mapping]) -> Dataset:
    """A data set of pairs.

    Read are also the forms of public sets. In TRL's conversations prompt, chosen and rejected are
    lists of messages, of which chosen and rejected have one, the assistant's. Without a prompt, or
    with one as a text (UltraFeedback-binarized), chosen and rejected are whole conversations that
    are equal but for the last message: what is equal is the prompt, and one beside it is not used.
    In HH-RLHF they are whole conversations as one text, with "Human:" or "Assistant:" behind an
    empty line before each turn; they become messages, without spaces at their ends.

    Of the fields `EXTRA`, which such sets have besides, score_chosen − score_rejected becomes the
    strength, in the units of the scores, where the row has none of its own; equal scores are a tie.
    The others are left out.

    Args:
        rows: each with prompt (text or conversation), chosen and rejected (texts; only the prompt
            may be empty), and possibly tie (bool), strength (number ≥ 0), annotator (text), and
            chosen_ended and rejected_ended (bool; False for a response that was cut, as for a
            `models.Cut`); None counts as missing.
    Returns: the columns prompt, chosen, rejected, and the others that any row names, with None
        where a row does not. If any prompt is a conversation, all are: a text becomes one message
        of the user.
    Raises: ValueError on no rows, or one that lists the bad rows: a missing or unknown field, a
        wrong type, a conversation as in `conversations.conversation_problem`, conversations that
        differ before their last message, a single response with a label (an unpaired set, as for
        KTO), a chosen response with the lower score, an empty response, two equal responses. Spaces
        and line ends at the ends of a response, and letters that cannot be seen, count for
        nothing.
    """
    return _from_rows(rows, "rows")


def _from_rows(rows: Iterable[Mapping], name: str) -> Dataset:
    has(rows, name, "a data set, or a list of rows", "__iter__")
    rows = list(rows)
    check_some(rows, name, "pair")
    found, problems = [], []
    for i, row in enumerate(rows):
        try:
            found.append(_checked(row))
        except ValueError as error:
            problems.append(f"{name}[{i}]: {error}")
    _refuse(name, problems)
    return _dataset(found)


def read_jsonl(path: str | os.PathLike) -> Dataset:
    """The pairs of a file with one JSON object a line; `scan_jsonl` reads what is good of it.

    Args:
        path: a UTF-8 file of rows as `from_rows` takes them; empty lines are skipped.
    Returns: as `from_rows`.
    Raises: ValueError that lists the bad lines by number; OSError if the file cannot be read.
    """
    pairs, problems = scan_jsonl(path)
    _refuse(str(path), problems)
    if not len(pairs):
        raise ValueError(f"{path} holds no pairs; write one JSON object a line")
    return pairs


def scan_jsonl(path: str | os.PathLike) -> tuple[Dataset, list[str]]:
    """The good pairs of a file, and what is wrong with the other lines.

    Args:
        path: as in `read_jsonl`.
    Returns: (pairs, problems); a problem names the line, counted from 1, and the field.
    Raises: OSError if the file cannot be read.
    """
    rows, problems = [], []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            rows.append(_checked(_parse(line.rstrip())))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    return _dataset(rows), problems


def write_jsonl(pairs: Iterable[Mapping], path: str | os.PathLike) -> None:
    """Write pairs to a file, one JSON object a line; `read_jsonl` gives the same pairs back.

    The file is written aside and then renamed: whoever reads sees the old file or the new one,
    even if this run is cut off.

    Args:
        pairs: a data set of pairs, or rows as `from_rows` takes them.
        path: an existing file is replaced.
    Raises: ValueError as `from_rows`; OSError if the folder cannot be written.
    """
    check_path(path, "path")
    pairs = _from_rows(pairs, "pairs")
    path = Path(path).resolve()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            for row in pairs:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _dataset(rows: list[Mapping]) -> Dataset:
    rows = [{**_cut_marks(row), **row} for row in rows]
    named = {name for row in rows for name in row}
    features = Features({k: v for k, v in FEATURES.items() if k in TEXTS or k in named})
    talks = [messages_of(row["prompt"]) for row in rows]
    if any(talk is not None for talk in talks):
        features["prompt"] = MESSAGES
        rows = [
            {**row, "prompt": _two_fields(talk) if talk else chat([row["prompt"]])[0]}
            for row, talk in zip(rows, talks, strict=True)
        ]
    columns = {name: [row.get(name) for row in rows] for name in features}
    if "strength" in columns:
        columns["strength"] = [None if s is None else float(s) for s in columns["strength"]]
    return Dataset.from_dict(columns, features=features)


def _cut_marks(row: Mapping) -> dict[str, bool]:
    return {mark: False for side, mark in _ENDED.items() if isinstance(row[side], Cut)}


def _two_fields(messages: Conversation) -> Conversation:
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        rest = len(problems) - _SHOWN
        more = [f"and {rest} more"] if rest > 0 else []
        listed = "\n".join(problems[:_SHOWN] + more)
        raise ValueError(f"{what}: {len(problems)} bad; correct them or leave them out\n{listed}")


def _lines(path: str | os.PathLike) -> Iterator[bytes]:
    check_path(path, "path")
    # as bytes, because a line that is not UTF-8 must not hide the others
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _parse(line: bytes) -> object:
    """The value of a line. Raises: ValueError saying what is wrong with it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from error
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("not a pair: brackets nested too deep") from error


def _fields(pairs: list[tuple[str, object]]) -> dict:
    # JSON lets a name come twice, and Python keeps the last
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a field comes twice; keep one")
    return row


# --- forms of public sets ------------------------------------------------------------------------


def _checked(row: object) -> Mapping:
    """A row in this book's form. Raises: ValueError saying what is wrong with it."""
    if isinstance(row, Mapping):
        row = _scored(_paired(row))
    problem = _problem(row)
    if problem:
        raise ValueError(problem)
    return row


def _paired(row: Mapping) -> Mapping:
    """A row with its responses as texts, whatever form it had."""
    if "completion" in row and row.get("chosen") is None and row.get("rejected") is None:
        raise ValueError(
            "completion is a single response; a pair needs two, chosen and rejected (an unpaired"
            " set, as for KTO, cannot be used)"
        )
    sides = [row.get("chosen"), row.get("rejected")]
    talks = [messages_of(side) for side in sides]
    of_hh = (isinstance(side, str) and _HH.match(side) for side in sides)
    if row.get("prompt") is None and all(of_hh):
        talks = [_turns(side) for side in sides]
    if None in talks:
        return row
    prompt, chosen, rejected = _split(row.get("prompt"), *talks)
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _turns(text: str) -> Conversation:
    """The messages of a conversation of HH-RLHF."""
    _, *parts = _HH.split(text)
    return [
        {"role": _HH_ROLES[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _split(
    prompt: Prompt | None, chosen: Conversation, rejected: Conversation
) -> tuple[Prompt | None, str, str]:
    """Prompt and responses of two conversations, with or without the prompt in them."""
    responses = []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        last = messages[-1] if messages else None
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            raise ValueError(f"{name} does not end with a message of the assistant")
        problem = conversation_problem([{**last, "role": "user"}])
        if problem:
            raise ValueError(f"the last message of {name} {problem}")
        responses.append(last["content"])
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last message")
    given = messages_of(prompt)
    if before and given is not None and before[: len(given)] != given:
        raise ValueError("chosen and rejected do not begin with the prompt")
    if isinstance(prompt, str):
        prompt = chat([prompt])[0]
    return before or prompt, *responses


def _scored(row: Mapping) -> Mapping:
    """A row without the fields that public sets have besides; scores become a strength."""
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    found = {name: value for name, value in row.items() if name not in EXTRA}
    if None in scores or found.get("strength") is not None:
        return found
    for name, score in zip(("score_chosen", "score_rejected"), scores, strict=True):
        if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
            raise ValueError(f"{name} is {score!r}, not a finite number")
    if scores[0] < scores[1]:
        raise ValueError("score_chosen is below score_rejected; exchange the two responses")
    found["strength"] = float(scores[0]) - float(scores[1])
    if found.get("tie") is None and found["strength"] == 0:
        found["tie"] = True
    return found


def _problem(row: object) -> str | None:
    """What is wrong with a row; None if nothing is."""
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}, not an object with prompt, chosen and rejected"
    for name in row:
        if name not in FEATURES:
            return f"unknown field {name!r}; the fields are {', '.join(FEATURES)}"
    for name in TEXTS:
        if row.get(name) is None:
            return f"{name} is missing"
    talk = messages_of(row["prompt"])
    if talk is not None and (problem := conversation_problem(talk)):
        return f"prompt {problem}"
    if not all(_is_valid(one["content"]) for one in talk or ()):
        return "prompt is not valid Unicode"
    for name in (*TEXTS[talk is not None :], "annotator"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name} is a {type(value).__name__}, not a text"
        if value is not None and not _is_valid(value):
            return f"{name} is not valid Unicode"
        if value is not None and name != "prompt" and not visible(value):
            return f"{name} is empty"
    if pair_problem(row["chosen"], row["rejected"]):
        return "chosen equals rejected"
    for name in ("tie", *_ENDED.values()):
        if not isinstance(row.get(name), bool | np.bool_ | None):
            return f"{name} is a {type(row[name]).__name__}, not true or false"
    return _strength_problem(row.get("strength"))


def _is_valid(text: str) -> bool:
    # a file can spell half a character, which no UTF-8 can hold
    return text.encode("utf-8", "replace").decode() == text


def _strength_problem(strength: object) -> str | None:
    if strength is None:
        return None
    if isinstance(strength, bool) or not isinstance(strength, Real):
        return f"strength is a {type(strength).__name__}, not a number"
    if not 0 <= strength <= sys.float_info.max:
        return "strength must be a finite number ≥ 0"
    return None


def sample_pairs(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    generator: torch.Generator | None = None,
) -> tuple[list[Prompt], list[str], list[str]]:
    """Two responses of the policy to each prompt, to be compared.

    Args:
        policy, tokenizer: as `models.load` returns them.
        prompts: texts or conversations.
        max_new_tokens: the longest response.
        generator: of the sampling.
    Returns: (prompts, first, second), without the prompts whose two responses are equal, as text or
        as tokens, or of which one is empty, since nobody can compare those. One that was cut is a
        `models.Cut`.
    Raises: ValueError as `rollout.write`, or if no pair is left.
    """
    texts = write(
        policy,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        samples_per_prompt=2,
        generator=generator,
    )
    ids = response_ids(tokenizer, [str(text) for text in texts])
    rows = zip(prompts, texts[::2], texts[1::2], ids[::2], ids[1::2], strict=True)
    kept = [(p, a, b) for p, a, b, x, y in rows if x != y and pair_problem(a, b) is None]
    if not kept:
        raise ValueError("policy gave two equal responses, or an empty one, to each of the prompts")
    first, second, third = map(list, zip(*kept, strict=True))
    return first, second, third


# --- annotators ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotator:
    """A simulated annotator, who feels a difference between two responses and reports it.

    What is felt is z = (u_1 − u_2)/temperature + length_bias · (words_1 − words_2) +
    position_bias, plus a random number from the logistic distribution. The first is preferred if
    that is above `tie_threshold`, the second if it is below −`tie_threshold`; else it is a tie.
    Without ties, P(first preferred) = (1 − noise) · σ(z) + noise/2: the Bradley-Terry model, with
    known faults.

    Args:
        name: tells annotators apart, and belongs to the seed.
        temperature: > 0; differences of utility are felt in this unit. Small is sure.
        length_bias: per word; above 0 for someone who likes long responses.
        position_bias: above 0 for someone who likes what is shown first.
        noise: share of the pairs that are answered without looking, as if z were 0.
        tie_threshold: ≥ 0, in units of z; 0 makes no ties.
    Raises: ValueError on a value out of range.
    """

    name: str
    temperature: float = 1.0
    length_bias: float = 0.0
    position_bias: float = 0.0
    noise: float = 0.0
    tie_threshold: float = 0.0

    def __post_init__(self) -> None:
        check_text(self.name, "name")
        if not self.name.strip():
            raise ValueError("name is empty; give each annotator one")
        in_range(self.temperature, "temperature", 0.0, open_low=True)
        in_range(self.noise, "noise", 0.0, 1.0)
        in_range(self.tie_threshold, "tie_threshold", 0.0)
        for name in ("length_bias", "position_bias"):
            in_range(getattr(self, name), name, -math.inf)


def crowd(temperature: float, count: int = 5) -> list[Annotator]:
    """Annotators of one temperature and without faults, each with luck of their own."""
    in_range(count, "count", 1)
    return [Annotator(f"annotator {n + 1}", temperature) for n in range(count)]


class Annotations(NamedTuple):
    """What annotators said."""

    pairs: Dataset  # one row a pair and annotator, the annotators of a pair next to each other
    preferences: Tensor  # [N, A]: 1 where the first was preferred, 0 the second, 0.5 a tie


def annotate(
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    utility: Utility,
    annotators: Sequence[Annotator],
    seed: int = 0,
) -> Annotations:
    """Have simulated annotators compare pairs of responses.

    Each annotator has a random stream of their own, so one more changes nothing about the others.

    Args:
        prompts: N texts or conversations.
        first: N responses, shown first.
        second: N responses to the same prompts, each different from the first, as in
            `from_rows`.
        utility: true utilities of responses: (prompts, responses) to as many numbers; any reward
            function will do, and its parameters prompts and completions may stand in any order.
        annotators: A of them, with different names.
        seed: of the labels.
    Returns: Annotations(pairs, preferences). In a tie the response shown first stands as chosen.
        `strength` is the size of what was felt, in units of z, and 0 for a tie.
    Raises: ValueError on lists of unequal length, no pairs, equal or empty responses, annotators
        of one name, utilities that are not finite.
    """
    _check_pairs(prompts, first, second, annotators)
    check_seed(seed)
    felt = _felt(prompts, first, second, utility, annotators)
    streams = [random.Random(f"annotate {seed} {one.name}") for one in annotators]
    rows, preferences = [], []
    for prompt, one, two, zs in zip(prompts, first, second, felt.tolist(), strict=True):
        labels = []
        for annotator, z, rng in zip(annotators, zs, streams, strict=True):
            looks = rng.random() >= annotator.noise
            total = (z if looks else 0.0) + _logistic(rng)
            tie = abs(total) <= annotator.tie_threshold
            label = 0.5 if tie else float(total > 0)
            chosen, rejected = (one, two) if label > 0 else (two, one)
            # the last digits of a logarithm differ between machines
            strength = 0.0 if tie else round(abs(total), 6)
            values = (prompt, chosen, rejected, tie, strength, annotator.name)
            rows.append(dict(zip(_LABELS, values, strict=True)))
            labels.append(label)
        preferences.append(labels)
    return Annotations(_dataset(rows), torch.tensor(preferences, dtype=torch.float64))


def choice_probabilities(
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    utility: Utility,
    annotators: Sequence[Annotator],
) -> Tensor:
    """How likely each annotator is to prefer the first response, to call a tie, to prefer the
    second.

    Equation: eq:annotator

    Args, Raises: as in `annotate`.
    Returns: [N, A, 3], float64; sums to 1 over the last dimension.
    """
    _check_pairs(prompts, first, second, annotators)
    felt = _felt(prompts, first, second, utility, annotators)
    noise = torch.tensor([one.noise for one in annotators], dtype=torch.float64)
    threshold = torch.tensor([one.tie_threshold for one in annotators], dtype=torch.float64)

    def wins(z: Tensor) -> Tensor:
        return (1 - noise) * torch.sigmoid(z - threshold) + noise * torch.sigmoid(-threshold)

    win, lose = wins(felt), wins(-felt)
    return torch.stack([win, (1 - win - lose).clamp(min=0), lose], dim=-1)


def ceiling(probabilities: Tensor) -> float:
    """The best accuracy that any predictor can have on the labels: the noise ceiling.

    Counted are the pairs that were decided; a tie is neither right nor wrong. Without ties this is
    the mean of max(p, 1 − p). The predictor knows the utilities and everything else that the
    annotator sees, also which response was shown first. A reward model does not know that: if
    there is a position bias, its ceiling, for pairs shown in random order, is
    `ceiling((p + swapped.flip(-1)) / 2)`, with `swapped` made from the responses exchanged.

    Args:
        probabilities: [..., 3], as `choice_probabilities` returns them.
    Returns: between 0.5 and 1.
    Raises: ValueError on another shape, a number outside [0, 1], sums that are not 1, ties only.
    """
    floats(probabilities=probabilities)
    if probabilities.dim() == 0 or probabilities.shape[-1] != 3 or probabilities.numel() == 0:
        raise ValueError(
            f"probabilities has shape {tuple(probabilities.shape)}; pass [..., 3]: first, tie,"
            " second"
        )
    finite(probabilities, "probabilities")
    sums = probabilities.sum(-1)
    if probabilities.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        raise ValueError("probabilities must be ≥ 0 and sum to 1 over the last dimension")
    decided = probabilities[..., [0, 2]]
    if decided.sum() == 0:
        raise ValueError("probabilities give ties only; there is nothing to predict")
    return (decided.amax(-1).sum() / decided.sum()).item()


def _felt(
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    utility: Utility,
    annotators: Sequence[Annotator],
) -> Tensor:
    """z of each pair and annotator, [N, A], float64."""
    texts = (first, second)
    utilities = torch.tensor([_utilities(utility, prompts, t) for t in texts], dtype=torch.float64)
    words = torch.tensor([[len(text.split()) for text in t] for t in texts], dtype=torch.float64)
    better, longer = utilities[0] - utilities[1], words[0] - words[1]
    columns = [
        better / one.temperature + one.length_bias * longer + one.position_bias
        for one in annotators
    ]
    return torch.stack(columns, dim=1)


def _check_pairs(
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    annotators: Sequence[Annotator],
) -> None:
    for name, texts in (("prompts", prompts), ("first", first), ("second", second)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is one text; pass a list of texts")
        check_list(texts, name)
    sizes = [len(prompts), len(first), len(second)]
    if len(set(sizes)) > 1 or 0 in sizes:
        raise ValueError(
            f"prompts, first and second have lengths {sizes}; pass three lists of one length"
        )
    check_each(annotators, "annotators", "an Annotator", *Annotator.__dataclass_fields__)
    names = [one.name for one in annotators]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"annotators have the names {names}; pass at least one, names all different"
        )
    rows = zip(prompts, first, second, strict=True)
    checked = ((i, _problem(dict(zip(TEXTS, row, strict=True)))) for i, row in enumerate(rows))
    problems = [f"pair {i}: {problem}" for i, problem in checked if problem]
    _refuse("prompts, first (as chosen) and second (as rejected)", problems)


def _utilities(
    utility: Utility, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[float]:
    rewards.check_reward(utility, "utility")
    values = rewards.call(utility, list(prompts), list(responses))
    # a number can be read from a text of digits, one by one
    if isinstance(values, str) or any(isinstance(value, str) for value in values):
        raise ValueError("utility gave texts; return one number for each response")
    values = [math.nan if value is None else float(value) for value in values]
    if len(values) != len(responses):
        raise ValueError(
            f"utility gave {len(values)} numbers for {len(responses)} responses; return one for"
            " each"
        )
    finite(torch.tensor(values, dtype=torch.float64), "utility")
    return values


def _logistic(rng: random.Random) -> float:
    uniform = rng.random() or 2.0**-54
    return math.log(uniform / (1.0 - uniform))


# --- several people ------------------------------------------------------------------------------


class Ratings(NamedTuple):
    """What several annotators said about the same pairs, side by side."""

    prompts: list[Prompt]
    first: list[str]
    second: list[str]
    preferences: Tensor  # [N, A]: 1 where the first was preferred, 0 the second, 0.5 a tie, or NaN
    annotators: list[str]


def by_pair(pairs: Iterable[Mapping]) -> Ratings:
    """Answers of several people, one a row, gathered by what they were about.

    Args:
        pairs: a data set of pairs, or rows as `from_rows` takes them, each with an annotator. The
            rows of one pair need not be neighbours.
    Returns: Ratings, pairs in the order in which they come first, annotators by name; NaN where one
        did not answer. Which of two responses is the first does not depend on the answers: it is
        the one that comes first in the alphabet.
    Raises: ValueError as `from_rows`, on a row without an annotator, or a pair that one annotator
        answered twice.
    """
    answers: dict[str, dict[str, float]] = {}
    texts: dict[str, tuple[Prompt, str, str]] = {}
    for index, row in enumerate(from_rows(pairs)):
        name = row.get("annotator")
        if name is None:
            raise ValueError(f"pairs[{index}] has no annotator; say in each row who answered")
        first, second = sorted((row["chosen"], row["rejected"]))
        key = json.dumps([row["prompt"], first, second])
        texts.setdefault(key, (row["prompt"], first, second))
        given = answers.setdefault(key, {})
        if name in given:
            raise ValueError(f"pairs[{index}] is a second answer of {name!r} to one pair; keep one")
        given[name] = 0.5 if row.get("tie") else float(row["chosen"] == first)
    names = sorted({name for given in answers.values() for name in given})
    table = [[given.get(name, math.nan) for name in names] for given in answers.values()]
    prompts, firsts, seconds = map(list, zip(*texts.values(), strict=True))
    return Ratings(prompts, firsts, seconds, torch.tensor(table, dtype=torch.float64), names)


# --- agreement -----------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """A coefficient of agreement (1 perfect, 0 chance) with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def fleiss_kappa(table: np.ndarray | Tensor, seed: int = 0) -> Agreement:
    """Agreement beyond chance when every item was judged by the same number of annotators.

    Args:
        table: [items, categories], how many annotators put the item into the category;
            statsmodels' `aggregate_raters(preferences)[0]` makes it from [items, annotators].
        seed: of the bootstrap over items.
    Returns: Agreement(value, low, high); percentiles of 1,000 resamples of the items.
    Raises: ValueError on counts below 0 or not whole, rows with unequal sums, fewer than two
        annotators or items, judgements that all fall into one category.
    Source: Fleiss 1971, "Measuring Nominal Scale Agreement among Many Raters".
    """
    # it takes a second, and few callers need it
    from statsmodels.stats.inter_rater import fleiss_kappa as kappa

    in_range(seed, "seed", 0)
    table = as_numbers(table, "table").numpy()
    if table.ndim != 2 or len(table) < 2:
        raise ValueError(
            f"table has shape {table.shape}; pass [items, categories], two items or more"
        )
    if not (np.isfinite(table).all() and (table >= 0).all() and (table == table.round()).all()):
        raise ValueError("table must hold counts: whole numbers from 0")
    judgements = table.sum(1)
    if judgements.min() < 2 or judgements.min() < judgements.max():
        raise ValueError(
            f"table has rows with sums from {judgements.min():g} to {judgements.max():g}; every"
            " item needs the same number of annotators, at least 2 (krippendorff_alpha takes"
            " unequal ones)"
        )
    if (table.sum(0) > 0).sum() < 2:
        raise ValueError("table has only one category in use; agreement beyond chance is undefined")
    return _bootstrap(table, kappa, seed)


def krippendorff_alpha(
    ratings: np.ndarray | Tensor, level: str = "nominal", seed: int = 0
) -> Agreement:
    """Agreement beyond chance for any number of annotators an item, some ratings missing.

    Args:
        ratings: [items, annotators], NaN where an annotator did not judge the item; items with
            fewer than two ratings do not count.
        level: how ratings differ: "nominal" (equal or not), "ordinal" (by rank), "interval" (by
            difference) or "ratio".
        seed: of the bootstrap over items.
    Returns: Agreement(value, low, high); percentiles of 1,000 resamples of the items.
    Raises: ValueError on another shape, fewer than two items with two ratings, an infinite rating,
        an unknown level, ratings that are all equal.
    Source: Hayes and Krippendorff 2007, "Answering the Call for a Standard Reliability Measure for
        Coding Data".
    """
    import krippendorff

    one_of(level, LEVELS, "level")
    in_range(seed, "seed", 0)
    ratings = as_numbers(ratings, "ratings").numpy()
    if ratings.ndim != 2 or np.isinf(ratings).any():
        raise ValueError(f"ratings has shape {ratings.shape}; pass finite [items, annotators]")
    ratings = ratings[(~np.isnan(ratings)).sum(1) >= 2]
    if len(ratings) < 2:
        raise ValueError("ratings has fewer than two items with two ratings; collect more")
    domain = np.unique(ratings[~np.isnan(ratings)])
    if len(domain) < 2:
        raise ValueError(f"ratings are all {domain[0]:g}; agreement beyond chance is undefined")
    counts = (ratings[:, :, None] == domain).sum(1)

    def alpha(counts: np.ndarray) -> float:
        return krippendorff.alpha(
            value_counts=counts, value_domain=domain, level_of_measurement=level
        )

    return _bootstrap(counts, alpha, seed)


def _bootstrap(
    items: np.ndarray, coefficient: Callable[[np.ndarray], float], seed: int
) -> Agreement:
    rng = np.random.default_rng(seed)
    resamples = rng.integers(len(items), size=(_RESAMPLES, len(items)))
    # a resample in which all judgements are equal has no coefficient; NaN leaves it out
    with np.errstate(invalid="ignore"):
        values = [coefficient(items[chosen]) for chosen in resamples]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return Agreement(float(coefficient(items)), float(low), float(high))


# --- strengths -----------------------------------------------------------------------------------


def fit_strengths(wins: np.ndarray | Tensor, spread: float | None = None) -> Tensor:
    """Strengths of a few items under which their wins are most likely, by the Bradley-Terry model;
    or the most probable ones, if how far apart strengths are is known beforehand.

    Args:
        wins: [K, K], wins[i, j] counts how often i was preferred to j; a tie is half a win for
            each; the diagonal is 0.
        spread: standard deviation of a normal prior with mean 0 on each strength, > 0; None has no
            prior.
    Returns: [K], float64, mean 0, in units of log-odds, to about six digits.
    Raises: ValueError on another shape, K < 2, a count below 0 or not finite, a diagonal that is
        not 0, spread ≤ 0, or, without a prior, items that fall into two groups of which one never
        won against the other: the likelihood then has no maximum.
    Source: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs"; the condition: Ford
        1957, "Solution of a Ranking Problem from Binary Comparisons".
    """
    wins = as_numbers(wins, "wins")
    _check_wins(wins, connected=spread is None)
    if spread is not None:
        in_range(spread, "spread", 0.0, open_low=True)
    strengths = torch.zeros(len(wins), dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        step = _newton_step(wins, strengths, spread)
        # within one unit the curvature is known well enough that each step is one down
        strengths = strengths + step / max(1.0, (step.max() - step.min()).item())
        if step.abs().max() < 1e-10:
            break
    return strengths - strengths.mean()


def _newton_step(wins: Tensor, strengths: Tensor, spread: float | None) -> Tensor:
    """Newton's step of the negative log-likelihood, with the first item where it is; with a prior,
    of the negative log-posterior, and all items move. Its size is what is still wrong with the
    strengths, however lopsided the counts."""
    loses = torch.sigmoid(strengths - strengths[:, None])  # P(i loses to j)
    surprise = wins * loses
    gradient = surprise.sum(0) - surprise.sum(1)
    curvature = (wins + wins.T) * loses * loses.T
    hessian = torch.diag(curvature.sum(1)) - curvature
    if spread is not None:
        hessian.diagonal().add_(spread**-2)
        return -torch.linalg.solve(hessian, gradient + strengths / spread**2)
    step = torch.zeros_like(strengths)
    step[1:] = -torch.linalg.solve(hessian[1:, 1:], gradient[1:])
    return step


def _check_wins(wins: Tensor, connected: bool = True) -> None:
    if wins.dim() != 2 or wins.shape[0] != wins.shape[1] or len(wins) < 2:
        raise ValueError(f"wins has shape {tuple(wins.shape)}; pass [K, K] with K ≥ 2")
    finite(wins, "wins")
    if wins.min() < 0 or wins.diagonal().any():
        raise ValueError("wins must be ≥ 0, and 0 on the diagonal")
    if not connected:
        return
    won = (wins > 0).numpy()
    groups, group_of = connected_components(won, directed=True, connection="strong")
    if groups > 1:
        # of the groups, one at least never lost to the rest
        unbeaten = next(
            members
            for members in (group_of == g for g in range(groups))
            if not won[~members][:, members].any()
        )
        raise ValueError(
            f"wins: items {unbeaten.nonzero()[0].tolist()} never lost to the others, so no finite "
            "strengths fit best; add comparisons, or pass a spread"
        )


def stochastic_transitivity_violations(p: np.ndarray | Tensor) -> int:
    """How many of the triples break weak stochastic transitivity: a is preferred to b and b to c,
    each with probability ½ or more, but a to c with less.

    No strengths can explain such a triple, whatever the model, if only the stronger one is
    preferred more often than not.

    Args:
        p: [K, K], probability that i is preferred to j; p + pᵀ = 1 off the diagonal, which is
            ignored.
    Returns: the number of triples {a, b, c}, of K(K − 1)(K − 2)/6, that break it in some order.
    Raises: ValueError on another shape, probabilities outside [0, 1], pairs that do not sum to 1.
    Source: Tversky 1969, "Intransitivity of Preferences".
    """
    p = as_numbers(p, "p").clone()
    if p.dim() != 2 or p.shape[0] != p.shape[1]:
        raise ValueError(f"p has shape {tuple(p.shape)}; pass [K, K]")
    p.fill_diagonal_(0.5)
    finite(p, "p")
    if p.min() < 0 or not torch.allclose(p + p.T, torch.ones_like(p), rtol=0, atol=1e-6):
        raise ValueError("p must lie in [0, 1], and p[i, j] + p[j, i] must be 1")
    at_least = p >= 0.5
    broken = at_least[:, :, None] & at_least[None, :, :] & ~at_least[:, None, :]
    orders = itertools.permutations(range(3))
    any_order = torch.stack([broken.permute(order) for order in orders]).any(0)
    return int(any_order.sum()) // 6
