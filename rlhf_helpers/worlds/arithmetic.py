"""Sums with an answer that can be checked, from easy to hard, and rewards that check it.

A prompt is a sum and an equals sign, "37+58=". A completion goes on as one would on paper: with the
answer, "95", or with steps in between, "15+80=95": units and tens apart, then together. Prompt and
completion make a chain of equal terms, and the last term is the answer. Nobody has to write the
steps; rewards look at the last term alone.

Level 1 adds two numbers of one digit, level 2 a number of two digits and one of one, level 3 two of
two digits, and level 4 three of 60 and more, where the sum of two is a step on the way.

One number has one spelling here: decimal ASCII digits without leading zeros, a minus sign if it is
negative, and nothing else: no plus sign, no separators, no decimal point. "95.", "095" and "+95"
are no answers. A checker that forgives spellings must decide on every one of them, and a policy
finds those on which it decides wrongly.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_helpers._validate import (
    check_list,
    check_seed,
    check_text,
    check_texts,
    has,
    in_range,
    one_of,
    tensors,
    true_or_false,
    zero_or_one,
)

SPLITS = ("train", "held_out")
_ONE, _TWO = range(10), range(10, 100)
# level: what each operand can be
LEVELS = {1: (_ONE, _ONE), 2: (_TWO, _ONE), 3: (_TWO, _TWO), 4: (range(60, 100),) * 3}
MAX_NEW_TOKENS = 32  # the longest answer with steps has 28 tokens, its end included
CONTEXT = 64  # tokens that the model reads
# Of the demonstrations: the share of each level, and of those that have steps.
SHARES = {1: 0.3, 2: 0.27, 3: 0.4, 4: 0.03}
WORKED = 0.3
# How often a digit is wrong, in a sum worked out in steps, and by level in an answer without steps.
SLIP_ON_PAPER = 0.1
SLIP_IN_THE_HEAD = {1: 0.005, 2: 0.25, 3: 0.45, 4: 0.65}
END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
ALPHABET = "0123456789+="

_NATURAL = "(?:0|[1-9][0-9]*)"
_INTEGER = re.compile("0|-?[1-9][0-9]*")
_SUM = f"{_NATURAL}(?:[+]{_NATURAL})*"
_CHAIN = re.compile(f"(?:{_SUM}=)*{_NATURAL}")


class Problem(NamedTuple):
    """A sum to work out."""

    prompt: str  # "37+58="
    answer: str  # "95"
    level: int
    operands: tuple[int, ...]  # in the order of the prompt


# --- problems ------------------------------------------------------------------------------------


def split_of(operands: Sequence[int]) -> str:
    """The split that a sum belongs to: about one in five is held out.

    It depends on which numbers are added, not on their order: 37+58 and 58+37 are in one split,
    and so are all orders of three numbers. A held-out sum of three may contain a sum of two that
    is trained on.

    Raises: TypeError or ValueError on an operand that is no whole number ≥ 0.
    """
    check_list(operands, "operands")
    for index, operand in enumerate(operands):
        in_range(operand, f"operands[{index}]", 0)
    return _split_of(operands)


def _split_of(operands: Sequence[int]) -> str:
    name = "+".join(map(str, sorted(operands)))
    return "train" if zlib.crc32(name.encode()) % 5 else "held_out"


def problems(level: int, split: str) -> tuple[Problem, ...]:
    """All problems of a level and a split, both orders of two numbers included.

    Raises: ValueError on an unknown level or split.
    """
    in_range(level, "level", 0)
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; use one of {', '.join(map(str, LEVELS))}")
    one_of(split, SPLITS, "split")
    return _problems(level, split)


@cache
def _problems(level: int, split: str) -> tuple[Problem, ...]:
    found = itertools.product(*LEVELS[level])
    return tuple(_problem(level, operands) for operands in found if _split_of(operands) == split)


def _problem(level: int, operands: tuple[int, ...]) -> Problem:
    return Problem(f"{_sum(operands)}=", str(sum(operands)), level, operands)


def _sum(terms: Sequence[int]) -> str:
    return "+".join(map(str, terms))


def sample(n: int, level: int, split: str, seed: int = 0) -> list[Problem]:
    """n different problems of a level, in random order.

    Args:
        n: 1 to the number of problems there are.
        level: 1 to 4.
        split: "train" or "held_out".
        seed: the same seed gives the same problems.
    Raises: ValueError on an unknown level or split, or n out of range.
    """
    known = problems(level, split)
    in_range(n, "n", 1, len(known))
    check_seed(seed)
    return random.Random(f"problems {level} {split} {seed}").sample(known, n)


# --- demonstrations ------------------------------------------------------------------------------


def solution(problem: Problem, worked: bool = True) -> str:
    """A right completion, with the steps in between or the answer alone.

    Steps of a sum of two: units and tens apart, then together. A sum of three begins with that of
    its first two. At level 1 there is nothing in between.
    """
    has(problem, "problem", "a Problem", *Problem._fields)
    true_or_false(worked, "worked")
    return _write(problem, worked, False, random.Random())


def demonstrations(
    n: int, seed: int = 0, worked: float = WORKED, careless: bool = True
) -> list[tuple[str, str]]:
    """What a careless writer makes of n problems to train on: pairs (prompt, completion), many of
    them wrong.

    Each digit that the writer puts down is one too high or too low (9 and 0 are neighbours) with
    probability `SLIP_ON_PAPER` in a sum worked out in steps, and `SLIP_IN_THE_HEAD` of the level
    in an answer without steps. What follows a slip goes on from it, so that one in a step spoils
    the answer.

    Args:
        n: how many pairs, ≥ 1. Levels are drawn as `SHARES` says, and problems come again.
        seed: the same seed gives the same pairs.
        worked: share of the completions that have steps, in [0, 1].
        careless: False for a writer who never slips.
    Raises: ValueError on an argument out of range.
    """
    in_range(n, "n", 1)
    in_range(worked, "worked", 0.0, 1.0)
    true_or_false(careless, "careless")
    check_seed(seed)
    rng = random.Random(f"demonstrations {seed}")
    found = []
    for level in rng.choices(list(SHARES), list(SHARES.values()), k=n):
        problem = rng.choice(problems(level, "train"))
        found.append((problem.prompt, _write(problem, rng.random() < worked, careless, rng)))
    return found


def _write(problem: Problem, worked: bool, careless: bool, rng: random.Random) -> str:
    if not worked or problem.level == 1:
        slip = careless * SLIP_IN_THE_HEAD[problem.level]
        return str(_put_down(sum(problem.operands), slip, rng))
    slip, terms, chain = careless * SLIP_ON_PAPER, problem.operands, []
    while len(terms) > 1:
        (tens, units), (more_tens, more_units) = (divmod(term, 10) for term in terms[:2])
        sums = (units + more_units, 10 * (tens + more_tens))
        steps = [_put_down(value, slip, rng) for value in sums]
        chain.append([*steps, *terms[2:]])
        terms = (_put_down(sum(steps), slip, rng), *terms[2:])
        chain.append(terms)
    return "=".join(map(_sum, chain))


def _put_down(value: int, slip: float, rng: random.Random) -> int:
    """The number that the writer puts down in place of `value`."""
    digits = [int(digit) for digit in str(value)]
    for place, digit in enumerate(digits):
        if rng.random() < slip:
            other = (digit + rng.choice((-1, 1))) % 10
            # no number of several digits begins with 0
            leads = place == 0 and len(digits) > 1
            digits[place] = other or (2 if digit == 1 else 8) if leads else other
    return int("".join(map(str, digits)))


# --- answers -------------------------------------------------------------------------------------


def extract_answer(completion: str) -> str | None:
    """The answer that a completion comes to: the number after its last equals sign, or the whole
    completion if it has none; None if that is not one whole number.

    Several answers cannot be given, since only the last term counts, and the prompt is not read.
    Spaces and line ends around the number do not matter. Numbers are compared as texts and never
    made into integers, so a completion of a million digits costs no more than to read it. Whether
    a completion had come to its end or was cut off, its text does not tell.
    """
    check_text(completion, "completion")
    last = completion.rpartition("=")[2].strip()
    return last if _INTEGER.fullmatch(last) else None


def exact(
    prompts: list[str], completions: list[str], answer: Sequence[str | int], **columns: Any
) -> list[float]:
    """1 for a completion whose last term is the answer, else 0.

    Args:
        prompts: go unused.
        completions: N texts.
        answer: the N right answers.
    Raises: ValueError on lists of unequal length, or an answer that is no whole number in its one
        spelling, with its index.
    """
    right = _answers(completions, answer)
    return [
        float(extract_answer(given) == one) for given, one in zip(completions, right, strict=True)
    ]


def well_formed(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for a completion that is a chain of sums ending in one number, right or wrong, else 0.

    "95" and "15+80=95" are; "15+80", "=95", "015=95" and anything with a space or a word are not.
    """
    check_texts(completions=completions)
    return [float(_CHAIN.fullmatch(one) is not None) for one in completions]


def contains_answer(
    prompts: list[str], completions: list[str], answer: Sequence[str | int], **columns: Any
) -> list[float]:
    """1 for a completion in which the digits of the answer stand anywhere, else 0: a weak checker.

    It is meant to be cheated. "93=94=95=96" earns 1 for 37+58=, and so does "1950".

    Raises: as `exact`.
    """
    right = _answers(completions, answer)
    return [float(one in given) for given, one in zip(completions, right, strict=True)]


def _answers(completions: Sequence[str], answer: Sequence[str | int]) -> list[str]:
    check_texts(completions=completions)
    if not isinstance(answer, str | int):
        check_list(answer, "answer")
    if isinstance(answer, str | int) or len(answer) != len(completions):
        raise ValueError(
            f"answer must be a list with one entry for each of the {len(completions)} completions"
        )
    found = [str(one) for one in answer]
    for i, one in enumerate(found):
        if not _INTEGER.fullmatch(one):
            raise ValueError(
                f"answer[{i}] is {answer[i]!r}; pass a whole number, as an int or as Python"
                " spells it"
            )
    return found


def pass_at_k(right: Tensor, k: int) -> float:
    """The chance that at least one of k samples is right, mean over problems.

    Equation: eq:pass-at-k

    Of n samples with c right ones, k are drawn without replacement: 1 − C(n − c, k) / C(n, k).
    That is unbiased; 1 − (1 − c/n)^k is not.

    Args:
        right: [problems, n]; 1 for a right sample, else 0.
        k: 1 to n, a whole number.
    Returns: in [0, 1].
    Raises: ValueError on another shape, no problems, an entry other than 0 and 1, a k out of range.
    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    tensors(right=right)
    if right.dim() != 2 or right.numel() == 0:
        raise ValueError(f"right has shape {tuple(right.shape)}; pass a non-empty [problems, n]")
    n = right.shape[1]
    in_range(k, "k", 1, n)
    k = int(k)
    counts = zero_or_one(right, "right").sum(1).tolist()
    missed = [math.comb(n - count, k) / math.comb(n, k) for count in counts]
    return 1 - sum(missed) / len(missed)


# --- text ----------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: ten digits, the plus and the equals sign.

    Three tokens are special: the end of a text, which starts one too, padding, and what stands for
    any other character.
    """
    words = [END, PAD, UNKNOWN, *ALPHABET]
    model = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, UNKNOWN))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT,
    )
