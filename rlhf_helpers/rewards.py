"""Reward functions for texts: counts, word lists and rules, and a trained classifier.

All take `(prompts, completions, **columns)` and give one number for each completion; they are
called by these names, as TRL's trainers do, so the order is free. `columns` are what else a data
set holds, and go unused here. They score the completion alone, so a prompt full of praise earns
nothing. Prompts and completions are plain texts, also where a prompt is a conversation. Each can be
cheated, and most easily: none knows what a good text is.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from numbers import Rational, Real
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_helpers._forward import context_of
from rlhf_helpers._validate import (
    check_function,
    check_list,
    check_path,
    check_text,
    check_texts,
    has,
    in_range,
)
from rlhf_helpers.conversations import Prompt, plain_text
from rlhf_helpers.settings import Settings
from rlhf_helpers.worlds import reviews

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Reward = Callable[..., list[float]]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


POSITIVE = _set(
    """superb wonderful brilliant excellent outstanding magnificent perfect fantastic good great
    nice fine amazing beautiful delightful enjoyable charming funny moving love loved enjoyed
    adored best masterpiece recommend"""
)
NEGATIVE = _set(
    """terrible awful dreadful horrible atrocious abysmal hopeless unbearable bad poor weak dull
    boring disappointing annoying tedious mediocre stupid ugly hate hated disliked ruined worst
    waste avoid"""
)
NEGATIONS = _set(
    """not never no none nobody nothing neither nor cannot hardly barely scarcely rarely seldom
    without"""
)
NEGATION_REACH = 3  # words after a negation
REPEATED_WORDS = 3  # length of the word sequences that should not come again
TARGET_WORDS = 20
VADER_READS = 10_000  # letters; its time grows with the square of their number
COMPOSITE = {"length": 0.25, "relevance": 0.5, "formatted": 0.25}

_STOP_WORDS = _set(
    """a about after again all also an and any are as at be because been before being but by can
    could did do does down each for from had has have he her here him his how i if in into is it
    its just may me might more most must my no not of off on once one only or other our out over
    own same shall she should so some such than that the their them then there these they this
    those through to too under until up very was we were what when where which while who whom
    whose why will with would you your"""
)
_SHORT_FORMS = ("n't", "'m", "'re", "'ll", "'ve", "'d")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SHOWN = 60  # characters of a completion that an error shows

# --- calling a reward ----------------------------------------------------------------------------


def score(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str], /, **columns: Any
) -> Tensor:
    """What a reward function says about each completion, refused if it is not one number each.

    A reward that is NaN now and then, or one short, does no visible harm where it arises; some
    steps later the policy is NaN, or has learned from its neighbour's reward.

    Args:
        reward: a reward function, called as `call` says.
        prompts: N texts or conversations; like the completions a list, a tuple, an array or a
            Series.
        completions: N texts.
        columns: passed on to the reward function.
    Returns: [N], float64.
    Raises: ValueError on one text in place of a list or a column, lists of unequal length, a column
        named prompts or completions, or if the function returns anything but N finite numbers; it
        names the function and, where one number is wrong, its index and completion.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise ValueError("prompts and completions must be lists of texts; put one text into a list")
    check_list(prompts, "prompts")
    check_list(completions, "completions")
    if len(prompts) != len(completions):
        raise ValueError(
            f"prompts has {len(prompts)} texts and completions {len(completions)}; pass one prompt "
            "for each completion"
        )
    check_columns(columns)
    check_reward(reward)
    name = getattr(reward, "__name__", type(reward).__name__)
    values = plain(call(reward, list(prompts), list(completions), **columns))
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"{name} returned {shortened(values)}; return a list with one number for each"
            " completion"
        )
    if len(values) != len(completions):
        raise ValueError(
            f"{name} returned {len(values)} numbers for {len(completions)} completions; "
            "return one for each, in their order"
        )
    found = [_finite(plain(value)) for value in values]
    if None in found:
        i = found.index(None)
        completion = str(list(completions)[i])
        start = completion if len(completion) <= _SHOWN else f"{completion[:_SHOWN]}…"
        raise ValueError(
            f"{name} returned {_told(plain(values[i]))} for completions[{i}], {start!r}; "
            "return a finite number"
        )
    return torch.tensor(found, dtype=torch.float64)


def call(
    reward: Reward, prompts: Sequence[Prompt], completions: list[str], /, **columns: Any
) -> Sequence[float]:
    """Call a reward function by the names prompts, completions and those of the columns, as TRL's
    trainers do. Its parameters may stand in any order, and `**columns` take what it does not name.
    It gets a conversation as the text of `conversations.plain_text`.

    One that calls its first two parameters something else, such as (prompts, responses), is called
    by place, prompts first.

    Returns: what it returns.
    Raises: TypeError, from Python, on a function that cannot be called so.
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        prompts = [plain_text(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    named = {"prompts": prompts, "completions": completions, **columns}
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # something built in that does not tell
        return reward(**named)
    first, second = [*signature.parameters, "", ""][:2]
    try:
        signature.bind(**named)
    except TypeError:
        # (completions, texts) or (texts, prompts) by place would score the prompts
        if not (first.startswith("completion") or second.startswith("prompt")):
            return reward(prompts, completions, **columns)
    return reward(**named)


def check_reward(reward: Reward, name: str = "reward") -> None:
    """Raises: TypeError unless the reward, which messages call `name`, can be called."""
    check_function(reward, name, "a function of prompts and completions")


def check_columns(
    columns: Mapping[str, Any], taken: Collection[str] = ("prompts", "completions")
) -> None:
    """Refuse columns that reward functions could not be given.

    Raises: ValueError on a column with a name under which reward functions get something else,
        or on one text in place of a column.
    """
    has(columns, "columns", "a dictionary from name to list", "items")
    for name, values in columns.items():
        if name in taken:
            raise ValueError(
                f"columns[{name!r}]: reward functions get something else by this name; give the"
                " column another"
            )
        if isinstance(values, str):
            raise ValueError(
                f"columns[{name!r}] is a {type(values).__name__}; pass a list with one entry a"
                " prompt"
            )


def plain(values: Any) -> Any:
    """Tensors, and arrays, Series and numbers of NumPy and pandas, as Python's lists and numbers;
    anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _finite(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else None
    except OverflowError:
        return None


def _told(value: Any) -> str:
    # digits of a whole number that no float can hold say nothing, and Python refuses very many
    large = isinstance(value, Rational) and abs(value) >= 1e308
    return "a number too large for a float" if large else shortened(value)


# --- words ---------------------------------------------------------------------------------------


def word_count(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The number of words of each completion. Punctuation is no word; "don't" is one."""
    check_texts(completions=completions)
    return [float(len(_words(text))) for text in completions]


def sentiment_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The number of words from `POSITIVE` minus the number from `NEGATIVE` in each completion.

    Blind to negation: "not good" counts 1.
    """
    check_texts(completions=completions)
    return [float(sum(map(_polarity, _words(text)))) for text in completions]


def negation_aware(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """As `sentiment_words`, but a word shortly after a negation counts with the opposite sign.

    Shortly means among the next three words, and before the next punctuation mark. Negations are
    those of `NEGATIONS` and all that end in n't; several in front of a word count as one. That
    "anything but good" and "far from good" are negations too, it does not know.

    Source: Pang, Lee and Vaithyanathan 2002, "Thumbs up? Sentiment Classification using Machine
        Learning Techniques" (negation up to the next punctuation mark).
    """
    check_texts(completions=completions)
    return [float(sum(map(_turned, re.split(r"[.,;:!?…()—\n]", text)))) for text in completions]


def repetition(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Minus the share of each completion's word sequences that occurred in it before.

    A sequence is `REPEATED_WORDS` neighbouring words, whatever their case and the punctuation
    between them. 0 if none comes twice, also in a text too short to have one; close to −1 for one
    phrase over and over.
    """
    check_texts(completions=completions)
    return [_repeated(_words(text)) for text in completions]


def _words(text: str) -> list[str]:
    # an accent may be a character of its own, which would cut a word in two
    found = _WORD.findall(unicodedata.normalize("NFC", text))
    return [word.lower().replace("’", "'") for word in found]


def _polarity(word: str) -> int:
    return (word in POSITIVE) - (word in NEGATIVE)


def _turned(clause: str) -> int:
    words, total = _words(clause), 0
    for i, word in enumerate(words):
        before = words[max(0, i - NEGATION_REACH) : i]
        turned = any(one in NEGATIONS or one.endswith("n't") for one in before)
        total += -_polarity(word) if turned else _polarity(word)
    return total


def _repeated(words: list[str]) -> float:
    count = len(words) - REPEATED_WORDS + 1
    if count < 1:
        return 0.0
    distinct = {tuple(words[i : i + REPEATED_WORDS]) for i in range(count)}
    return (len(distinct) - count) / count


# --- a reward made of parts ----------------------------------------------------------------------


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for a completion of `TARGET_WORDS` words, less by an equal amount for each word that it has
    too few or too many, and 0 for none or for twice the target and more."""
    counts = word_count(prompts, completions)
    return [max(0.0, 1 - abs(count - TARGET_WORDS) / TARGET_WORDS) for count in counts]


def relevance(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of the prompt's different content words that each completion mentions, from 0 to 1.

    Content words are all but the commonest words of English (the, of, with, …). Case does not
    matter, nor whether a word stands in the singular or the plural. A prompt without a content
    word asks for nothing, and every completion has 1.

    Raises: ValueError on lists of unequal length.
    """
    check_texts(prompts=prompts, completions=completions)
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = {_singular(word) for word in _words(prompt) if not _is_stop_word(word)}
        said = {_singular(word) for word in _words(completion)}
        found.append(len(asked & said) / len(asked) if asked else 1.0)
    return found


def formatted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of four rules of form that each completion keeps, from 0 to 1.

    It begins with a capital or a digit; it ends with a full stop, an exclamation or a question
    mark; no two spaces stand side by side; no space stands before a punctuation mark. Spaces at
    both ends do not matter, nor quotation marks and brackets around it. An empty text keeps none.
    """
    check_texts(completions=completions)
    return [_form(text.strip()) for text in completions]


def composite(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The mean of `length`, `relevance` and `formatted`, weighted as `COMPOSITE` says: 0 to 1.

    Raises: ValueError on lists of unequal length.
    """
    parts = (length, relevance, formatted)
    weights = [COMPOSITE[part.__name__] for part in parts]
    rows = zip(*(part(prompts, completions) for part in parts), strict=True)
    return [
        sum(weight * value for weight, value in zip(weights, row, strict=True)) / sum(weights)
        for row in rows
    ]


def _is_stop_word(word: str) -> bool:
    return word.removesuffix("'s") in _STOP_WORDS or word.endswith(_SHORT_FORMS)


def _singular(word: str) -> str:
    """One spelling for the singular and the plural of a noun, not always a word of English."""
    word = word.removesuffix("'s")
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    # in both numbers, or movie would not meet movies: comedie(s), comedy; classe(s), class
    word = re.sub(r"(?<=..)ie$", "y", word)
    return re.sub(r"(ss|sh|ch|x|zz|o)e$", r"\1", word)


def _form(text: str) -> float:
    if not text:
        return 0.0
    first = text.lstrip("\"'“‘([")[:1]
    kept = (
        first.isupper() or first.isdigit(),
        text.rstrip("\"'”’)]").endswith((".", "!", "?")),
        "  " not in text,
        re.search(r"\s[.,;:!?]", text) is None,
    )
    return sum(kept) / len(kept)


# --- sentiment by others' work -------------------------------------------------------------------


def vader(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """VADER's compound score of each completion, from −1 to 1: a lexicon of 7,500 words, emoticons
    and emoji with rules for negation, emphasis and "but". Of a longer text the first `VADER_READS`
    letters count.

    Source: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis
        of Social Media Text".
    """
    check_texts(completions=completions)
    return [_analyser().polarity_scores(text[:VADER_READS])["compound"] for text in completions]


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def classifier(
    name: str | os.PathLike, label: str, device: str | torch.device = "cpu", batch_size: int = 64
) -> Reward:
    """A trained text classifier as a reward function: the log-odds log p/(1 − p) of one label.

    Log-odds, where p is nearly 1 or 0, still tell a good text from a better one. The label is
    chosen by its name: at which place it stands differs from one model to the next, and the wrong
    one trains for the opposite. A text longer than the model can read is cut at its end. Padding
    stands on the right, whatever the tokenizer's habit, and whether a text then scores the same
    beside a longer one is tried once.

    Only safetensors weights are read, and never code from the hub.

    Args:
        name: on the hub, or the path of a folder.
        label: one of the model's labels; upper or lower case.
        device: where the model goes.
        batch_size: completions a forward pass.
    Returns: a reward function; its `__name__` is made of the model's name and the label.
    Raises: OSError or ValueError as `models.load`, also on weights that no training has touched;
        ValueError if it has no such label (they are listed), labels that do not exclude each
        other, no token to pad with, or scores that change with the padding.
    """
    in_range(batch_size, "batch_size", 1)
    check_text(label, "label")
    check_path(name, "name")
    model, tokenizer = _load_classifier(name, device)
    index = _label_index(model.config, label)
    model.to(device).eval()
    limit = _longest_input(model, tokenizer)
    _make_paddable(model, tokenizer, limit, name)

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        # not every tokenizer makes a token of nothing, and a model needs one
        texts = [text or " " for text in completions]
        # texts of one length next to each other need little padding
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = [0.0] * len(texts)
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            logits = _logits(model, tokenizer, [texts[i] for i in part], limit)
            for i, value in zip(part, _log_odds(logits, index).tolist(), strict=True):
                found[i] = value
        return found

    reward.__name__ = f"{os.path.basename(os.path.normpath(name))}_{model.config.id2label[index]}"
    return reward


@torch.no_grad()
def _logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    limit: int | None,
    padding: bool = True,
) -> Tensor:
    batch = tokenizer(
        texts,
        padding=padding,
        truncation=limit is not None,
        max_length=limit,
        # what spells a special token in a completion stays letters
        split_special_tokens=True,
        return_tensors="pt",
    )
    return model(**batch.to(model.device)).logits


def _make_paddable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    name: str | os.PathLike,
) -> None:
    """Settings under which a text scores the same alone and beside others.

    The model's own pad token comes first: decoders look for it to find the last token of a text.
    """
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    short, long = ["good"], ["good good good bad good"]
    alone = _logits(model, tokenizer, short, limit, padding=False)
    config = model.config.get_text_config()
    own = getattr(config, "pad_token_id", None)
    known = [own, *map(tokenizer.convert_tokens_to_ids, _padding_tokens(tokenizer))]
    rows = range(min(model.get_input_embeddings().num_embeddings, len(tokenizer)))
    usable = [token for token in known if token in rows]
    if not usable:
        raise ValueError(f"name={str(name)!r}: the tokenizer has no token to pad with; give it one")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])
    config.pad_token_id = usable[0]
    try:
        beside = _logits(model, tokenizer, [*short, *long], limit)[:1]
        changed = f"changes a score by {(beside - alone).abs().max():.1g}"
    except (ValueError, RuntimeError, IndexError) as error:
        beside, changed = None, f"fails ({error})"
    if beside is None or not torch.allclose(beside, alone, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"name={str(name)!r}: padding a text with {tokenizer.pad_token!r} {changed}; pass"
            " another classifier, or save its tokenizer with the pad token it was trained with"
        )


def _padding_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
    return [token for token in found if token is not None]


def _log_odds(logits: Tensor, index: int) -> Tensor:
    # as a difference of logits: 1 − p has no digits left where p is nearly 1
    others = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
    return logits[:, index] - others.logsumexp(1)


def _load_classifier(
    name: str | os.PathLike, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification

    from rlhf_helpers.models import check_device, from_files, load_tokenizer

    check_device(device)
    kind = AutoModelForSequenceClassification
    return from_files(kind, name, torch.float32, "classifier"), load_tokenizer(name)


def _label_index(config: PretrainedConfig, label: str) -> int:
    labels = config.id2label
    if len(labels) < 2 or config.problem_type in ("multi_label_classification", "regression"):
        raise ValueError(
            f"name: the model's outputs ({', '.join(labels.values())}) are not labels that exclude "
            "each other; pass a classifier with at least two that do"
        )
    for index, known in labels.items():
        if known.casefold() == label.casefold():
            return index
    listed = ", ".join(map(repr, labels.values()))
    raise ValueError(f"label={label!r} is none of the model's labels; use one of {listed}")


def _longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens the model reads, as far as the tokenizer or the model says."""
    positions = context_of(model.config) or 0
    for path, module in model.named_modules():
        # RoBERTa and its kin start to count after the padding token's index
        if (
            path.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            positions -= module.padding_idx + 1
    # a tokenizer that does not know says 1e30
    known = [n for n in (tokenizer.model_max_length, positions) if 0 < n < 1e9]
    return min(known, default=None)


def true_utility(run: Settings) -> Reward:
    """What the simulated annotators of a scale want: at tiny the quality that the made-up world
    knows of every text, at gpt2 the log-odds of a sentiment classifier.

    Raises: as `classifier`.
    """
    has(run, "run", "the settings, as settings.load returns them", "classifier", "device")
    if not run.classifier:
        return reviews.quality
    return classifier(run.classifier, "POSITIVE", run.device)
