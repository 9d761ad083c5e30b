"""Reward functions: counts by hand, VADER's published scores, the library's own pipeline, and TRL
as the caller."""

import json
import math
import os
import random
import subprocess
import sys
from fractions import Fraction
from functools import partial

import fake_hub
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from rlhf_helpers import models, preferences, rewards, settings
from rlhf_helpers.algorithms import grpo, sampling
from rlhf_helpers.rewards import classifier, score
from rlhf_helpers.worlds import reviews

RULES = (
    rewards.word_count,
    rewards.sentiment_words,
    rewards.negation_aware,
    rewards.repetition,
    rewards.length,
    rewards.relevance,
    rewards.formatted,
    rewards.composite,
    rewards.vader,
)
ODD = [
    "",
    " ",
    "...",
    "\n\n",
    "😀🎬",
    "¡Qué película!",
    "映画は最高だ。",
    "İ",
    "don’t",
    "a\u0301",
    "\x00",
]


def of(reward, completion, prompt=""):
    """The reward of one completion."""
    (value,) = reward([prompt], [completion])
    return value


# score


def constant(values):
    def my_reward(prompts, completions, **columns):
        return values

    return my_reward


@pytest.mark.parametrize(
    "values",
    [
        [1, -2.5],
        (1.0, -2.5),
        [True, Fraction(-5, 2)],
        torch.tensor([1.0, -2.5], requires_grad=True),
        [torch.tensor(1), np.float32(-2.5)],
        np.array([1.0, -2.5], dtype=np.float16),
    ],
)
def test_numbers_of_every_kind_become_one_tensor(values):
    """Oracle: the numbers themselves, all exact in half precision."""
    found = score(constant(values), ["p", "q"], ["a", "b"])
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert found.tolist() == [1.0, -2.5]


def test_texts_and_columns_reach_the_reward():
    """Oracle: what was passed; the lists are copies, so a reward cannot change the caller's."""
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [float(stars) for stars in columns["stars"]]

    prompts, completions = ("p", "q"), ["a", "b"]
    assert score(spy, prompts, completions, stars=[4, 2]).tolist() == [4, 2]
    assert seen == {"prompts": ["p", "q"], "completions": ["a", "b"], "stars": [4, 2]}
    assert seen["completions"] is not completions
    assert score(constant([]), [], []).shape == (0,)


@pytest.mark.parametrize(
    "value",
    [
        None,
        math.nan,
        math.inf,
        -math.inf,
        "3",
        1j,
        [1.0],
        torch.tensor([1.0]),
        torch.tensor(math.nan),
    ],
)
def test_a_reward_that_is_no_finite_number_is_named_with_its_completion(value):
    """Oracle: the specification: function, index, beginning of the completion, and the fix."""
    long = "The plot was good. " * 20
    with pytest.raises(ValueError, match="finite number") as caught:
        score(constant([0.0, value]), ["p", "q"], ["fine", long])
    message = str(caught.value)
    assert "my_reward" in message
    assert "completions[1]" in message
    assert "The plot was good. The plot" in message
    assert len(message) < 200


def test_a_whole_tensor_with_a_nan_is_refused_too():
    """Oracle: the specification; the first wrong one is named, and a short text is shown whole."""
    with pytest.raises(ValueError, match=r"my_reward returned nan for completions\[1\], 'b'; "):
        score(constant(torch.tensor([0, math.nan, math.inf])), ["p"] * 3, ["a", "b", "c"])


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 3, torch.ones(1), torch.ones(3)])
def test_a_wrong_number_of_rewards_is_refused(values):
    """Oracle: the specification."""
    with pytest.raises(ValueError, match=rf"my_reward returned {len(values)} numbers for 2 comple"):
        score(constant(values), ["p", "q"], ["a", "b"])


@pytest.mark.parametrize(
    "values", [None, 1.0, torch.tensor(1.0), {0.1, 0.2}, {0: 0.1, 1: 0.2}, "ab", iter([0.1, 0.2])]
)
def test_what_is_no_list_is_refused(values):
    """Oracle: the specification; None is a forgotten return, a set has no order."""
    with pytest.raises(ValueError, match=r"my_reward returned .*; return a list with one number"):
        score(constant(values), ["p", "q"], ["a", "b"])


def test_unequal_lists_and_single_texts_are_refused():
    """Oracle: the specification; the reward is not called."""
    with pytest.raises(ValueError, match="prompts has 1 texts and completions 2"):
        score(None, ["p"], ["a", "b"])
    for pair in [("ab", ["a", "b"]), (["a", "b"], "ab"), ("ab", "cd")]:
        with pytest.raises(ValueError, match="must be lists"):
            score(None, *pair)


# rewards that say 1 for "x", written in every way that TRL calls, and in those by place
WAYS = {
    "ours": lambda prompts, completions, **columns: [float(t == "x") for t in completions],
    "completions first": lambda completions, prompts, **columns: [t == "x" for t in completions],
    "by name only": lambda *, completions, prompts: [float(t == "x") for t in completions],
    "no prompts": lambda completions, **columns: [float(t == "x") for t in completions],
    "names alone": lambda **columns: [float(t == "x") for t in columns["completions"]],
    "partial": partial(
        lambda by, completions, **columns: [by * (t == "x") for t in completions], 1
    ),
    "other names": lambda p, c: [float(t == "x") for t in c],
    "one other name": lambda prompts, responses, **columns: [float(t == "x") for t in responses],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_reward_is_called_as_trl_calls_it(way):
    """Oracle: by hand: the second completion is the one; through score, an annotator, and the
    probabilities of one."""
    reward = WAYS[way]
    assert score(reward, ["x", "x"], ["p", "x"]).tolist() == [0, 1]
    sure = [preferences.Annotator("sure", temperature=1e-3)]
    pairs = (["x", "x"], ["x", "p"], ["p", "x"])
    assert preferences.annotate(*pairs, reward, sure).preferences[:, 0].tolist() == [1, 0]
    p = preferences.choice_probabilities(*pairs, reward, sure)[:, 0, 0]
    torch.testing.assert_close(p, torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("way", ["completions first", "no prompts"])
def test_loops_and_evaluations_call_it_so_too(way):
    """Oracle: the texts that were sampled, by hand."""
    policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
    if way == "no prompts":
        reward = lambda completions, **columns: [float(len(t)) for t in completions]  # noqa: E731
    else:
        reward = lambda completions, prompts: [float(len(t)) for t in completions]  # noqa: E731
    luck = torch.Generator().manual_seed(0)
    found = sampling.respond(policy, tokenizer, ["1+1=", "2+2="], reward, luck, 4, 4)
    assert found.scores.tolist() == [len(text) for text in found.texts]
    config = grpo.Config(samples_per_prompt=4, max_new_tokens=4)
    found = sampling.evaluate(policy, policy, tokenizer, ["1+1="], {"length": reward}, config)
    assert found.scores["length"].tolist() == [len(text) for text in found.texts]
    assert len("1+1=") not in map(len, found.texts)


@pytest.mark.parametrize(
    "reward",
    [
        lambda texts, prompts: [0.0] * len(texts),
        lambda completions, texts: [0.0] * len(texts),
        lambda completion, prompt: [0.0] * len(prompt),
        lambda completions: [0.0] * len(completions),
    ],
)
def test_a_reward_that_would_score_the_prompts_is_refused(reward):
    """Oracle: the specification; by place each would be given the prompts as completions."""
    with pytest.raises(TypeError, match=r"prompts|completions"):
        score(reward, ["p"], ["x"])


def test_columns_may_have_any_name_but_two():
    """Oracle: what was passed."""
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(columns)
        return [1.0]

    given = {"reward": [1.0], "name": ["a"], "self": [2], "answer": np.array([3])}
    assert score(spy, ["p"], ["x"], **given).tolist() == [1.0]
    assert seen == given
    for name in ("prompts", "completions"):
        with pytest.raises(ValueError, match=rf"columns\['{name}'\]: .*give the column another"):
            score(spy, ["p"], ["x"], **{name: ["a"]})
    with pytest.raises(ValueError, match=r"columns\['answer'\] is a str; pass a list"):
        score(spy, ["p", "q"], ["x", "y"], answer="12")


@pytest.mark.parametrize(
    "value", [10**400, Fraction(10**400), -(10**5000)], ids=["whole", "fraction", "huge"]
)
def test_a_number_too_large_for_a_float_is_named(value):
    """Oracle: the specification; Python itself raises OverflowError."""
    with pytest.raises(ValueError, match=r"my_reward returned a number too large .*ns\[1\], 'b'"):
        score(constant([0, value]), ["p", "q"], ["a", "b"])


@pytest.mark.parametrize("of_type", [tuple, np.array, pd.Series], ids=lambda kind: kind.__name__)
def test_texts_and_rewards_may_lie_in_arrays_and_series(of_type):
    """Oracle: the same in lists; the index of a Series says nothing about places."""
    texts = ["a", "bb", "ccc"]
    reward = lambda prompts, completions, **c: of_type([len(t) for t in completions])  # noqa: E731
    given = of_type(texts)
    if of_type is pd.Series:
        given.index = [7, 1, 0]
    assert score(reward, given, given).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"returned nan for completions\[1\], 'bb'"):
        score(constant(of_type([0.0, math.nan, 1.0])), given, given)


def test_a_reward_without_a_name_is_called_by_its_type():
    """Oracle: the specification; functools.partial has no __name__."""
    with pytest.raises(ValueError, match=r"^partial returned None for"):
        score(partial(constant([None])), ["p"], ["a"])


# words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("  \n\t ", 0),
        ("... — !? 😀 * _ __", 0),
        ("The plot is good.", 4),
        ("good,bad;fine—nice...ugly", 5),
        (" Leading and trailing. ", 3),
        ("It isn't, it isn’t: two-faced 'quoted' rock'n'roll", 8),
        ("4-star review of 2001", 5),
        ("__bold__ snake_case", 3),
        ("Müller's café, nai\u0308ve cafe\u0301s", 4),
        ("Отличный фильм", 2),
        ("İstanbul ŞİİR", 2),
    ],
)
def test_words_are_counted(text, count):
    """Oracle: by hand; an accent written as a character of its own cuts no word in two."""
    assert of(rewards.word_count, text) == count


def test_the_lists_hold_the_strong_words_of_the_world_and_do_not_overlap():
    """Oracle: the grammar's adjectives of valence 2 and −2; as many words for as against."""
    assert set(reviews.ADJECTIVES[2]) < rewards.POSITIVE
    assert set(reviews.ADJECTIVES[-2]) < rewards.NEGATIVE
    assert len(rewards.POSITIVE) == len(rewards.NEGATIVE)
    assert not rewards.POSITIVE & rewards.NEGATIVE
    for words in (rewards.POSITIVE, rewards.NEGATIVE, rewards.NEGATIONS):
        assert not words & rewards._STOP_WORDS - {"not", "no"}
        assert all(rewards._words(word) == [word] for word in words)


# text: its score blind to negation, and with it
COUNTED = {
    "": (0, 0),
    "The plot exists.": (0, 0),
    "Good": (1, 1),
    "GOOD, good,good!(good)": (4, 4),
    "'Good' and \"bad\".": (0, 0),
    "Goodness, a badly paced film": (0, 0),
    "The plot is not good.": (1, -1),
    "The plot isn't good, the acting is.": (1, -1),
    "It isn’t very good": (1, -1),
    "It is n't bad": (-1, 1),
    "NOT bad at all": (-1, 1),
    "never a really good film": (1, -1),
    "never a really very good film": (1, 1),
    "not good bad awful terrible": (-2, 0),
    "not good or bad": (0, 0),
    "neither good nor bad": (0, 0),
    "not never good": (1, -1),
    "No. Good plot": (1, 1),
    "It is no good, great cast": (2, 0),
    "I could not stand it.\nGreat cast": (1, 1),
    "not\ngood": (1, 1),
    "hardly a masterpiece, without great actors, nobody loved it": (3, -3),
    "a good plot, not": (1, 1),
    "not-so-good": (1, -1),
    "anything but good": (1, 1),
    "nothing good; a note, a knot and a good cannon": (2, 0),
}


@pytest.mark.parametrize("text", COUNTED)
def test_sentiment_is_counted_with_and_without_negation(text):
    """Oracle: by hand."""
    assert (of(rewards.sentiment_words, text), of(rewards.negation_aware, text)) == COUNTED[text]


def test_negation_is_read_where_the_grammar_negates():
    """Oracle: the valence that the grammar gave to each judgement of the form 'not … at all'."""
    read = [reviews.parse(text) for text in reviews.texts("train", 1500)]
    judged = {j for review in read for j in review.judgements if j.text.endswith(" at all")}
    known = [j for j in judged if of(rewards.sentiment_words, j.text)]
    assert {j.valence for j in known} == {-1, 1}
    for judgement in known:
        assert of(rewards.sentiment_words, judgement.text) == -judgement.valence
        assert of(rewards.negation_aware, judgement.text) == judgement.valence


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0),
        ("good good", 0),
        ("a b c d e f", 0),
        ("a b c a b c", -1 / 4),
        ("The plot, the PLOT. The plot!", -2 / 4),
        ("good " * 4, -1 / 2),
        ("good " * 102, -99 / 100),
        ("one two three. Four one two three", -1 / 5),
    ],
)
def test_repetition_is_the_share_of_word_triples_that_came_before(text, value):
    """Oracle: by hand."""
    assert of(rewards.repetition, text) == pytest.approx(value, abs=1e-15)
    assert math.copysign(1, of(rewards.repetition, "a b c")) == 1


@given(st.lists(st.sampled_from("ab"), max_size=12))
def test_repetition_counts_what_a_reader_would(words):
    """Oracle: going through the text and looking back, one triple at a time."""
    triples = [words[i : i + 3] for i in range(len(words) - 2)]
    again = sum(triple in triples[:i] for i, triple in enumerate(triples))
    expected = -again / len(triples) if triples else 0
    assert of(rewards.repetition, " ".join(words)) == pytest.approx(expected, abs=1e-15)


# the composite and its parts


def test_length_is_a_tent_around_the_target():
    """Oracle: by hand; 0, a quarter, half, all, one and a half, twice and three times the
    target."""
    target = rewards.TARGET_WORDS
    assert target % 4 == 0
    counts = [0, target // 4, target // 2, target, target * 3 // 2, target * 2, target * 3]
    found = rewards.length([""] * 7, ["word " * count for count in counts])
    assert found == pytest.approx([0, 0.25, 0.5, 1, 0.5, 0, 0])


PROMPT = "Write a 4-star review about the music.\n"  # write, 4, star, review, music


@pytest.mark.parametrize(
    ("prompt", "completion", "value"),
    [
        (PROMPT, "", 0),
        (PROMPT, "The a about of", 0),
        (PROMPT, "MUSIC, music: the music!", 1 / 5),
        (PROMPT, "Reviews of music,stars", 3 / 5),
        (PROMPT, "I write a review: music with 4 stars.", 1),
        ("", "anything", 1),
        ("It is what it is, and that's what's what.", "", 1),
        ("I didn't, I'm, we've", "", 1),
        ("comedies and movies", "A comedy is a movie.", 1),
        ("The class of a church", "classes in churches", 1),
        ("The film's boss", "Films have bosses", 1),
        ("the cast", "the castle", 0),
        ("this bus", "bu", 0),
        ("Café", "cafe\u0301s", 1),
        ("filmed film", "film", 1 / 2),
        ("the gas", "ga", 0),
        ("the cars", "A car.", 1),
    ],
)
def test_relevance_is_the_share_of_the_prompts_words_that_come_up(prompt, completion, value):
    """Oracle: by hand."""
    assert of(rewards.relevance, completion, prompt) == pytest.approx(value)


PLURALS = """movie movies|comedy comedies|class classes|box boxes|axe axes|match matches|bush bushes
hero heroes|shoe shoes|tie ties|day days|song songs|chef chefs|prize prizes|house houses|bus bus
actress actresses|crisis crisis|pie pies|buzz buzzes|scene scenes|gas gas|cliché clichés"""


def test_singular_and_plural_meet_and_different_words_do_not():
    """Oracle: a list of English plurals."""
    pairs = [pair.split() for pair in PLURALS.replace("\n", "|").split("|")]
    for one, many in pairs:
        assert of(rewards.relevance, many, one) == of(rewards.relevance, one, many) == 1, one
    assert len({rewards._singular(one) for one, _ in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", 0),
        (" \n", 0),
        ("The plot is good.", 4),
        (" The plot is good! \n", 4),
        ("4 stars: I saw it?", 4),
        ("“The plot is good.”", 4),
        ("(Élan vital!)", 4),
        ("the plot is good.", 3),
        ("The plot is good", 3),
        ("The plot  is good.", 3),
        ("The plot , it is good.", 3),
        ("the plot  is good", 1),
        ("the plot  is good ,", 0),
        ('"', 2),
        ("?", 3),
    ],
)
def test_form_is_the_share_of_rules_kept(text, kept):
    """Oracle: by hand, out of four."""
    assert of(rewards.formatted, text) == kept / 4


def test_the_composite_is_the_weighted_mean_of_its_parts(monkeypatch):
    """Oracle: by hand: 10 of 20 words, 1 of 2 content words, 3 of 4 rules."""
    text = "The music is good and so is all of it"
    prompt = "music, plot"
    monkeypatch.setattr(rewards, "TARGET_WORDS", 20)
    parts = [
        of(part, text, prompt) for part in (rewards.length, rewards.relevance, rewards.formatted)
    ]
    assert parts == [0.5, 0.5, 0.75]
    assert set(rewards.COMPOSITE) == {"length", "relevance", "formatted"}
    assert sum(rewards.COMPOSITE.values()) == 1
    monkeypatch.setattr(rewards, "COMPOSITE", {"formatted": 5, "length": 1, "relevance": 2})
    assert of(rewards.composite, text, prompt) == pytest.approx((0.5 + 2 * 0.5 + 5 * 0.75) / 8)


# vader


@pytest.mark.parametrize(
    ("text", "compound"),
    [
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is smart, handsome, and funny!", 0.8439),
        ("VADER is very smart, handsome, and funny.", 0.8545),
        ("VADER is VERY SMART, handsome, and FUNNY.", 0.9227),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was good.", 0.4404),
        ("At least it isn't a horrible book.", 0.4310),
        (
            "The plot was good, but the characters are uncompelling and the dialog is not great.",
            -0.7042,
        ),
        ("Today SUX!", -0.5461),
        ("", 0.0),
    ],
)
def test_vader_gives_its_published_scores(text, compound):
    """Oracle: the examples of VADER's README."""
    assert of(rewards.vader, text) == compound


def test_vader_normalises_the_sum_of_its_words():
    """Oracle: x / √(x² + 15) with x = 1.5 (like) + 2.3 (fun), the values of its lexicon."""
    expected = 3.8 / math.sqrt(3.8**2 + 15)
    found = of(rewards.vader, "I like using VADER, its a fun tool to use")
    assert found == pytest.approx(expected, abs=5e-5)


def test_vader_reads_the_beginning_of_a_very_long_text():
    """Oracle: the same text cut by hand; and VADER itself where nothing is cut. It takes minutes
    for the whole."""
    cut = rewards.VADER_READS
    text = "a very good film but not bad " * 6000
    assert of(rewards.vader, text) == of(rewards.vader, text[:cut])
    assert of(rewards.vader, "x" * (cut - 5) + " good") > 0
    assert of(rewards.vader, "x" * (cut - 4) + " good") == 0


# all the rules


@pytest.mark.parametrize("reward", RULES, ids=lambda reward: reward.__name__)
def test_a_rule_scores_each_completion_by_itself(reward):
    """Oracle: the same rule on one text at a time, whatever the order; odd texts have a score
    too."""
    completions = ODD + [text for text, _ in fake_hub.reviews(10, seed=1)]
    prompts = ["The plot was good."] * len(completions)
    found = score(reward, prompts, completions).tolist()
    assert found == [of(reward, text, prompts[0]) for text in completions]
    assert score(reward, prompts, completions[::-1]).tolist() == found[::-1]
    assert score(reward, [], []).numel() == 0


@pytest.mark.parametrize("reward", RULES, ids=lambda reward: reward.__name__)
def test_only_relevance_reads_the_prompt(reward):
    """Oracle: the specification; a prompt full of praise earns nothing."""
    completion, praise = "The plot is not bad.", "A superb, wonderful, brilliant plot!"
    reads = reward in (rewards.relevance, rewards.composite)
    assert (of(reward, completion, praise) != of(reward, completion, "Cast.")) == reads


@given(st.text(), st.text())
def test_rewards_stay_in_their_range(prompt, completion):
    """Oracle: the specification, for any text that Unicode has."""
    low = {"repetition": -1, "vader": -1}
    high = {
        "repetition": 0,
        "vader": 1,
        "length": 1,
        "relevance": 1,
        "formatted": 1,
        "composite": 1,
    }
    for reward in RULES:
        value = score(reward, [prompt], [completion]).item()
        if reward.__name__ in high:
            assert low.get(reward.__name__, 0) <= value <= high[reward.__name__]


def test_lists_of_unequal_length_are_refused_where_the_prompt_counts():
    """Oracle: the specification."""
    for reward in (rewards.relevance, rewards.composite):
        with pytest.raises(ValueError, match="prompts 1, completions 2"):
            reward(["p"], ["a", "b"])


def test_trl_calls_them_and_gets_the_same_numbers(tmp_path, labelled):
    """Oracle: the function itself; TRL's GRPOTrainer calls by keyword and adds arguments of its
    own."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    functions = [*RULES, classifier(labelled["two"], "positive")]
    model, tokenizer = models.load(models.TINY)
    rows = [{"prompt": one.prompt, "stars": one.stars} for one in reviews.instructions("train", 4)]
    completions = [one.response for one in reviews.instructions("train", 4, seed=1)]
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=2,
    )
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_funcs=functions,
    )
    prompts = [row["prompt"] for row in rows]
    theirs = trainer._calculate_rewards(rows, prompts, completions, [[1]] * 4)
    mine = torch.stack([score(reward, prompts, completions) for reward in functions], dim=1)
    torch.testing.assert_close(theirs, mine.float(), rtol=1e-6, atol=1e-6)
    assert trainer.reward_func_names == [*(reward.__name__ for reward in RULES), "two_POSITIVE"]


# classifier

TEXTS = [text for text, _ in fake_hub.reviews(9, seed=4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small DistilBERT classifier and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    fake_hub.write_sentiment(folder, TEXTS)
    return folder


def write_classifier(base, folder, labels, rows, **changes):
    """The base model with random weights that give clear opinions; its head is made of the chosen
    rows of a random one."""
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    head = 0.15 * torch.randn(3, model.config.dim + 1)[rows]
    model.classifier = torch.nn.Linear(model.config.dim, len(rows))
    model.classifier.load_state_dict({"weight": head[:, :-1], "bias": head[:, -1]})
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}
    model.config.update(changes)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def labelled(base, tmp_path_factory):
    """Folders of classifiers: two labels, the same in reversed order, three labels."""
    home = tmp_path_factory.mktemp("classifiers")
    write_classifier(base, home / "two", ["NEGATIVE", "POSITIVE"], [0, 1])
    write_classifier(base, home / "reversed", ["POSITIVE", "NEGATIVE"], [1, 0])
    write_classifier(base, home / "three", ["neg", "neutral", "pos"], [0, 2, 1])
    return {name: home / name for name in ("two", "reversed", "three")}


def log_odds_of_pipeline(folder, texts):
    """label: log p/(1 − p) of each text, from the probabilities of transformers' own pipeline."""
    ask = pipeline("text-classification", model=str(folder), top_k=None, truncation=True)
    answers = [{row["label"]: row["score"] for row in rows} for rows in ask(texts)]
    return {
        label: [math.log(p[label]) - math.log(1 - p[label]) for p in answers]
        for label in answers[0]
    }


@pytest.mark.parametrize("name", ["two", "reversed", "three"])
def test_the_reward_is_the_log_odds_of_the_label(name, labelled):
    """Oracle: transformers' text-classification pipeline, one text at a time, for every label."""
    texts = [*TEXTS, "", "good", " "]
    expected = log_odds_of_pipeline(labelled[name], texts)
    for label, odds in expected.items():
        for batch_size in (1, 5, 64):
            reward = classifier(labelled[name], label, batch_size=batch_size)
            found = score(reward, [""] * len(texts), texts)
            assert found.std() > 0.01  # a hundred times the tolerance
            torch.testing.assert_close(
                found, torch.tensor(odds, dtype=torch.float64), rtol=1e-4, atol=1e-4
            )


def test_the_label_is_found_by_name_wherever_it_stands(labelled):
    """Oracle: the same network with its two outputs exchanged; of two labels one's odds are minus
    the other's."""
    prompts = [""] * len(TEXTS)
    first, second = (classifier(labelled[name], "positive") for name in ("two", "reversed"))
    found = score(first, prompts, TEXTS)
    torch.testing.assert_close(score(second, prompts, TEXTS), found, rtol=1e-5, atol=1e-5)
    against = score(classifier(labelled["reversed"], "Negative"), prompts, TEXTS)
    torch.testing.assert_close(against, -found, rtol=1e-5, atol=1e-5)
    assert (first.__name__, second.__name__) == ("two_POSITIVE", "reversed_POSITIVE")


def test_only_the_completion_is_scored_without_dropout_or_gradient(labelled):
    """Oracle: the same call again, with other prompts; the order of the texts does not matter;
    autograd keeps nothing for a backward pass."""
    reward, kept = classifier(str(labelled["two"]) + "/", "positive"), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        found = reward(prompts=["A superb film."] * 9, completions=TEXTS, stars=[1] * 9)
    assert not kept
    assert all(type(value) is float for value in found)
    assert reward([""] * 9, TEXTS) == found
    order = random.Random(0).sample(range(9), 9)
    again = reward([""] * 9, [TEXTS[i] for i in order])
    assert again == pytest.approx([found[i] for i in order], rel=1e-5)
    assert reward.__name__ == "two_POSITIVE"
    assert reward([], []) == []


def test_certainty_does_not_flatten_the_reward(labelled, tmp_path):
    """Oracle: the same head with 30 added to one bias, so 30 more; in single precision p is 1 then,
    whatever the text."""
    plain = score(classifier(labelled["two"], "POSITIVE"), [""] * 9, TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(labelled["two"])
    model.classifier.bias.data += torch.tensor([0.0, 30.0])
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(labelled["two"]).save_pretrained(tmp_path)
    found = score(classifier(tmp_path, "POSITIVE"), [""] * 9, TEXTS)
    assert torch.sigmoid(found.float()).unique().tolist() == [1.0]
    torch.testing.assert_close(found, plain + 30, rtol=0, atol=1e-4)


def test_a_text_that_is_too_long_is_cut_at_its_end(labelled):
    """Oracle: the pipeline with truncation; 600 words and another end give the same."""
    long = ["good " * 600 + end for end in ("awful", "dull")]
    found = classifier(labelled["two"], "POSITIVE")(["", ""], long)
    assert found[0] == found[1]
    expected = log_odds_of_pipeline(labelled["two"], long)["POSITIVE"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def words_only():
    """A tokenizer of words and spaces that adds no token of its own and knows no maximum length."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "good", "bad", " "])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="</s>", pad_token="<pad>")


def test_the_model_says_how_much_it_reads_if_the_tokenizer_does_not(tmp_path):
    """Oracle: RoBERTa has 12 positions and starts at 2, so it reads 10 tokens: the library's model
    fails on 11 and gives the expected score of the first 10."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = RobertaConfig(
        vocab_size=6, max_position_embeddings=12, intermediate_size=8, pad_token_id=1, **sizes
    )
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.roberta.embeddings.word_embeddings.weight)
    model.save_pretrained(tmp_path)
    words_only().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length > 1e9
    ten = torch.tensor([[3, 5, 3, 5, 3, 5, 3, 5, 3, 5]])
    with pytest.raises((IndexError, RuntimeError), match="out of"), torch.no_grad():
        model(torch.cat([ten, ten[:, :1]], 1))
    with torch.no_grad():
        logits = model(ten).logits[0]
    (found,) = classifier(tmp_path, "LABEL_1")([""], [" ".join(["good"] * 8)])
    assert found == pytest.approx((logits[1] - logits[0]).item(), abs=1e-6)


def test_an_empty_completion_has_a_score_where_the_tokenizer_adds_nothing(tmp_path):
    """Oracle: the library's model on the one token of a space, alone and next to longer texts."""
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=6, pad_token_id=1, **sizes)).eval()
    model.save_pretrained(tmp_path)
    words_only().save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(torch.tensor([[5]])).logits[0]
    reward = classifier(tmp_path, "label_0")
    for texts in ([""], ["good bad good", "", "bad"], ["", ""]):
        found = reward([""] * len(texts), texts)[texts.index("")]
        assert found == pytest.approx((logits[0] - logits[1]).item(), abs=1e-6)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSIFIERS = {
    "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=1280),
    "llama": lambda: LlamaConfig(intermediate_size=24, vocab_size=1280, **SIZES),
    "roberta": lambda: RobertaConfig(
        intermediate_size=24, vocab_size=1280, max_position_embeddings=64, **SIZES
    ),
    "distilbert": lambda: DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=1280, max_position_embeddings=64
    ),
}
REVIEWS = ["Bad", "A long and winding road of a film, which nobody needs to see twice.", "Good fun"]


def write_family(family, folder, pad, **habits):
    """A small classifier with clear opinions and a byte-level tokenizer: with a pad token, with one
    that only the tokenizer or only the model knows, or with none."""
    config = CLASSIFIERS[family]()
    tokenizer = AutoTokenizer.from_pretrained(models.TINY, **habits)
    config.pad_token_id = tokenizer.pad_token_id if pad in ("both", "model") else None
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    if pad not in ("both", "tokenizer"):
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("pad", ["both", "tokenizer", "model", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_text_scores_the_same_beside_others(family, side, pad, tmp_path):
    """Oracle: the library's model on one text at a time, without padding."""
    write_family(family, tmp_path, pad, padding_side=side, truncation_side=side)
    if family == "roberta" and pad in ("tokenizer", "none"):
        pytest.skip("it cannot be built without one")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in REVIEWS]
    wanted = [(two - one).item() for one, two in logits]
    reward = classifier(tmp_path, "LABEL_1")
    assert reward([""] * 3, REVIEWS) == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) - min(wanted) > 0.05


def test_a_classifier_that_cannot_be_padded_is_refused_at_once(tmp_path, monkeypatch):
    """Oracle: the specification: no token at all; and a model that reads the padding."""
    write_family("gpt2", tmp_path, "none")
    monkeypatch.setattr(rewards, "_padding_tokens", lambda tokenizer: [])
    with pytest.raises(ValueError, match="no token to pad with; give it one"):
        classifier(tmp_path, "LABEL_1")
    monkeypatch.undo()
    forward = GPT2ForSequenceClassification.forward

    def blind(self, input_ids, attention_mask):
        return forward(self, input_ids[:, -2:])

    monkeypatch.setattr(GPT2ForSequenceClassification, "forward", blind)
    with pytest.raises(ValueError, match=r"changes a score by .*; pass another classifier"):
        classifier(tmp_path, "LABEL_1")

    def fails(self, input_ids, attention_mask):
        if len(input_ids) > 1:
            raise ValueError("one at a time")
        return forward(self, input_ids)

    monkeypatch.setattr(GPT2ForSequenceClassification, "forward", fails)
    with pytest.raises(ValueError, match=r"fails \(one at a time\); pass another"):
        classifier(tmp_path, "LABEL_1")


def test_a_long_text_is_cut_at_its_end_whatever_the_tokenizers_habit(tmp_path):
    """Oracle: another end makes no difference, another beginning does."""
    write_family("gpt2", tmp_path, "both", truncation_side="left")
    reward = classifier(tmp_path, "LABEL_1")
    texts = [start + " and" * 100 + end for start in ("Good", "Bad") for end in (" yes", " no")]
    first, second, third, fourth = reward([""] * 4, texts)
    assert (first, third) == (second, fourth)
    assert abs(first - third) > 1e-3


def test_a_special_token_that_a_completion_spells_is_only_letters(tmp_path):
    """Oracle: the ids that the model is given, against those of the letters."""
    write_family("gpt2", tmp_path, "both")
    seen, forward = [], GPT2ForSequenceClassification.forward
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reward = classifier(tmp_path, "LABEL_1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GPT2ForSequenceClassification,
            "forward",
            lambda self, input_ids, **rest: seen.append(input_ids) or forward(self, input_ids),
        )
        reward([""], [f"Bad {tokenizer.eos_token} good {tokenizer.pad_token}"])
    assert not set(seen[0].flatten().tolist()) & set(tokenizer.all_special_ids)


def test_a_model_without_a_longest_input_reads_it_all(tmp_path):
    """Oracle: the library's model on all tokens; BLOOM's positions have no end, and the tokenizer
    knows none."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=6, hidden_size=8, n_layer=1, n_head=2, pad_token_id=1)
    model = BloomForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.transformer.word_embeddings.weight)
    model.save_pretrained(tmp_path)
    words_only().save_pretrained(tmp_path)
    text = " ".join(["good"] * 400)
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")).logits
    assert of(classifier(tmp_path, "LABEL_1"), text) == pytest.approx(
        (logits[0, 1] - logits[0, 0]).item(), abs=1e-5
    )


def test_a_classifier_that_is_nowhere_is_missed_by_name(tmp_path):
    """Oracle: the specification."""
    with pytest.raises(OSError, match=r"No classifier .*nothing.*\n.*path of a saved model"):
        classifier(tmp_path / "nothing", "POSITIVE")


def test_a_label_that_is_not_there_is_refused_with_the_list(labelled):
    """Oracle: the specification; a position is no name."""
    for label in ("good", "1", "LABEL_1", ""):
        with pytest.raises(ValueError, match="use one of 'NEGATIVE', 'POSITIVE'") as caught:
            classifier(labelled["two"], label)
        assert f"label={label!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        (["POSITIVE"], {}),
        (["NEGATIVE", "POSITIVE"], {"problem_type": "multi_label_classification"}),
        (["NEGATIVE", "POSITIVE"], {"problem_type": "regression"}),
    ],
)
def test_outputs_that_are_no_alternatives_are_refused(labels, changes, base, tmp_path):
    """Oracle: the specification; the pipeline does not apply softmax to these either."""
    write_classifier(base, tmp_path, labels, list(range(len(labels))), **changes)
    with pytest.raises(ValueError, match="exclude each other; pass a classifier"):
        classifier(tmp_path, "POSITIVE")


def test_a_model_without_a_trained_head_is_refused(labelled, tmp_path):
    """Oracle: the specification; transformers draws the head at random and only warns."""
    DistilBertModel.from_pretrained(labelled["two"]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(labelled["two"]).save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no trained weights for classifier\.bias, classifier\.we"
    ):
        classifier(tmp_path, "POSITIVE")


def test_half_precision_files_are_read_in_single_precision(labelled, tmp_path):
    """Oracle: the rounded weights in the library's own model."""
    AutoTokenizer.from_pretrained(labelled["two"]).save_pretrained(tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(labelled["two"], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    tokens = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        logits = half.float().eval()(**tokens).logits[0]
    found = of(classifier(tmp_path, "POSITIVE"), TEXTS[0])
    assert found == pytest.approx((logits[1] - logits[0]).item(), rel=1e-5)


def test_pickled_weights_are_refused(labelled, tmp_path):
    """Oracle: the same folder is accepted by transformers itself, which unpickles it."""
    model = AutoModelForSequenceClassification.from_pretrained(labelled["two"])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no safetensors weights"):
        classifier(tmp_path, "POSITIVE")


@pytest.mark.parametrize("name", ["weights.bin", "../outside.bin", "../outside.safetensors"])
def test_an_index_that_names_other_files_is_refused(labelled, name, tmp_path):
    """Oracle: transformers itself, which opens the file that is named."""
    folder = tmp_path / "model"
    model = AutoModelForSequenceClassification.from_pretrained(labelled["two"])
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(labelled["two"]).save_pretrained(folder)
    weights = model.state_dict()
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    with pytest.raises(OSError, match=name):
        classifier(folder, "POSITIVE")


def test_code_that_comes_with_a_classifier_is_never_run(labelled, tmp_path):
    """Oracle: the module of the folder would write a file when it is imported."""
    AutoModelForSequenceClassification.from_pretrained(labelled["two"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "own.Own",
            "AutoModelForSequenceClassification": "own.Own",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        classifier(tmp_path, "POSITIVE")
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_tokenizer_and_a_batch_of_nothing_are_refused(labelled, tmp_path):
    """Oracle: the specification."""
    AutoModelForSequenceClassification.from_pretrained(labelled["two"]).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="No tokenizer"):
        classifier(tmp_path, "POSITIVE")
    with pytest.raises(ValueError, match="batch_size"):
        classifier(labelled["two"], "POSITIVE", batch_size=0)


HUB = """
import sys
from rlhf_helpers import rewards, settings
heavy = {"transformers", "peft", "datasets", "vaderSentiment"} & set(sys.modules)
assert not heavy, heavy
chosen = settings.load()
reward = rewards.classifier(chosen.classifier, "positive")
print(reward.__name__, rewards.score(reward, ["", ""], ["a great film", ""]).shape)
try:
    rewards.classifier("nobody/nothing", "positive")
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_classifier_of_scale_gpt2_comes_from_the_cache_without_a_network(tmp_path):
    """Oracle: by hand; the real name. A missing one says in two lines what to do, and importing
    rewards loads no library of models."""
    fake_hub.write_sentiment(fake_hub.snapshot(tmp_path, fake_hub.SENTIMENT), TEXTS)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment["RLHF_SCALE"] = "gpt2"
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    first, missing, remedy = run.stdout.splitlines()
    assert first == "distilbert-imdb_POSITIVE torch.Size([2])"
    assert "No classifier 'nobody/nothing'" in missing
    assert all(words in remedy for words in ("Connect", "RLHF_SCALE=tiny", "path"))


def test_the_true_utility_belongs_to_the_scale(monkeypatch):
    """Oracle: the specification: the world's own at tiny, the named label of a classifier at
    gpt2."""
    monkeypatch.delenv("RLHF_SCALE", raising=False)
    assert rewards.true_utility(settings.load()) is reviews.quality
    asked = []
    monkeypatch.setattr(rewards, "classifier", lambda *all_of_it: asked.append(all_of_it))
    monkeypatch.setenv("RLHF_SCALE", "gpt2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rewards.true_utility(settings.load())
    assert asked == [("lvwerra/distilbert-imdb", "POSITIVE", "cpu")]
