"""Sums with answers that can be checked, the rewards that check them, and the small GPT-2 that adds
carelessly."""

import itertools
import random
import re
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from experiments import train_tiny_arithmetic
from rlhf_helpers import models, rewards
from rlhf_helpers.algorithms import ppo
from rlhf_helpers.worlds import arithmetic

FOLDER = train_tiny_arithmetic.FOLDER
ALL = [(level, split) for level in arithmetic.LEVELS for split in arithmetic.SPLITS]


@pytest.fixture(scope="module")
def adder():
    return models.load(FOLDER)


def value(term):
    """Oracle: the sum that a text such as 15+80 stands for, by Python's whole numbers."""
    return sum(int(number) for number in term.split("+"))


def of(reward, completion, answer="95"):
    """The reward of one completion of 37+58=."""
    (found,) = reward(["37+58="], [completion], answer=[answer])
    return found


# problems


@pytest.mark.parametrize(("level", "split"), ALL)
def test_prompts_answers_and_operands_say_the_same(level, split):
    for problem in arithmetic.problems(level, split):
        assert re.fullmatch(r"\d+(\+\d+)+=", problem.prompt)
        assert [int(n) for n in problem.prompt[:-1].split("+")] == list(problem.operands)
        assert problem.answer == str(value(problem.prompt[:-1]))
        assert problem.level == level


def test_no_unordered_operands_are_in_both_splits():
    """Oracle: all sums, counted by hand (10·10, 90·10, 90·90 and 40³), as bags of numbers, over the
    levels together."""
    train, held_out = (
        [p for level in arithmetic.LEVELS for p in arithmetic.problems(level, split)]
        for split in ("train", "held_out")
    )
    bags = [{tuple(sorted(p.operands)) for p in part} for part in (train, held_out)]
    assert not bags[0] & bags[1]
    assert len({p.prompt for p in train + held_out}) == 100 + 900 + 8100 + 64_000
    for level in arithmetic.LEVELS:
        count = sum(p.level == level for p in held_out)
        assert 0.15 < count / (count + sum(p.level == level for p in train)) < 0.25


def test_the_split_never_changes():
    """Hard-coded: a model that was trained on one split must not be measured on another."""
    names = {(4, 0): "held_out", (0, 4): "held_out", (10, 13): "held_out", (10, 10): "train"}
    assert {bag: arithmetic.split_of(bag) for bag in names} == names
    for bag in itertools.permutations((12, 34, 45)):
        assert arithmetic.split_of(bag) == arithmetic.split_of((12, 34, 45))


def test_a_seed_draws_the_same_different_problems_again():
    state = random.getstate(), torch.get_rng_state()
    first, again, other = (arithmetic.sample(500, 3, "train", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(set(first)) == 500
    assert set(first) <= set(arithmetic.problems(3, "train"))
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 5, "train"), "level=5 is unknown"),
        ((1, 0, "train"), "level=0 is unknown"),
        ((1, 1, "test"), "split='test' is unknown"),
        ((0, 1, "train"), "n=0 must"),
        ((1000, 1, "train"), "n=1000 must"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.sample(*arguments)


# demonstrations


@pytest.mark.parametrize("worked", [False, True])
def test_every_term_of_a_solution_is_worth_the_sum(worked):
    for level, split in ALL:
        for problem in arithmetic.problems(level, split)[:3000]:
            chain = arithmetic.solution(problem, worked).split("=")
            assert {value(term) for term in chain} == {value(problem.prompt[:-1])}
            assert (len(chain) > 1) == (worked and level > 1)
            assert chain[-1] == problem.answer


def test_solutions_read_as_the_page_says():
    problem = {level: arithmetic.problems(level, "train")[-1] for level in arithmetic.LEVELS}
    written = {p.prompt + arithmetic.solution(p) for p in problem.values()}
    assert written == {
        "9+9=18",
        "99+9=18+90=108",
        "99+99=18+180=198",
        "99+99+98=18+180+98=198+98=16+280=296",
    }
    assert arithmetic.solution(problem[4], worked=False) == "296"


def test_a_careful_writer_is_always_right():
    pairs = arithmetic.demonstrations(3000, seed=4, worked=1.0, careless=False)
    for prompt, text in pairs:
        assert {value(term) for term in text.split("=")} == {value(prompt[:-1])}


def test_demonstrations_are_of_the_training_split_in_the_stated_shares():
    """Bounds of four standard errors of a share of 20,000."""
    n = 20_000
    pairs = arithmetic.demonstrations(n, seed=5)
    level = {p.prompt: k for k in arithmetic.LEVELS for p in arithmetic.problems(k, "train")}
    seen = Counter(level[prompt] for prompt, _ in pairs)  # a KeyError is a held-out problem
    for k, share in arithmetic.SHARES.items():
        assert abs(seen[k] / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    steps = [("=" in text) for prompt, text in pairs if level[prompt] > 1]
    assert abs(sum(steps) / len(steps) - arithmetic.WORKED) < 4 * (0.25 / len(steps)) ** 0.5
    assert pairs == arithmetic.demonstrations(n, seed=5)
    assert pairs != arithmetic.demonstrations(n, seed=6)


def test_slips_in_the_head_are_as_frequent_as_stated():
    """Oracle: an answer of d digits is right with probability (1 − slip)^d; bounds of four standard
    errors."""
    level = {p.prompt: k for k in arithmetic.LEVELS for p in arithmetic.problems(k, "train")}
    pairs = arithmetic.demonstrations(40_000, seed=7, worked=0.0)
    for k, slip in arithmetic.SLIP_IN_THE_HEAD.items():
        rows = [(value(p[:-1]), text) for p, text in pairs if level[p] == k]
        chances = [(1 - slip) ** len(str(right)) for right, _ in rows]
        found = sum(text == str(right) for right, text in rows)
        assert abs(found - sum(chances)) < 4 * sum(c * (1 - c) for c in chances) ** 0.5


def test_what_follows_a_slip_goes_on_from_it():
    """Every number put down is a slip or none away from the sum of what stands before it."""
    pairs = arithmetic.demonstrations(4000, seed=8, worked=1.0)
    three = [(p, text.split("=")) for p, text in pairs if "=" in text and p.count("+") == 1]
    slips = digits = 0
    for prompt, (steps, answer) in three:
        a, b = map(int, prompt[:-1].split("+"))
        units, tens = steps.split("+")
        written = [(a % 10 + b % 10, units), (a // 10 * 10 + b // 10 * 10, tens)]
        for right, text in [*written, (value(steps), answer)]:
            assert len(text) == len(str(right))
            assert text == str(int(text))  # no leading zero
            apart = [(int(x) - int(y)) % 10 for x, y in zip(text, str(right), strict=True)]
            assert set(apart) <= {0, 1, 9}
            slips, digits = slips + sum(map(bool, apart)), digits + len(apart)
    slip = arithmetic.SLIP_ON_PAPER
    assert abs(slips / digits - slip) < 4 * (slip * (1 - slip) / digits) ** 0.5


def test_the_longest_text_fits():
    longest = arithmetic.problems(4, "train")[-1]
    tokens = len(arithmetic.solution(longest)) + 1
    assert tokens <= arithmetic.MAX_NEW_TOKENS
    assert len(longest.prompt) + arithmetic.MAX_NEW_TOKENS <= arithmetic.CONTEXT


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"n": 1, "worked": 1.5}, {"n": 1, "worked": float("nan")}]
)
def test_demonstrations_refuse_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="must lie in"):
        arithmetic.demonstrations(**wrong)


# answers

ANSWERS = {
    # plain, and with steps
    "95": "95",
    "0": "0",
    "-7": "-7",
    "15+80=95": "95",
    "15+80=95=95": "95",
    "I think 15+80 = 95": "95",
    # only the last of several counts
    "95=96": "96",
    "94=95=96": "96",
    "96=95": "95",
    "95\n96": None,
    "95 96": None,
    "95,96": None,
    "95;": None,
    "95+96": None,
    "95=": None,
    "95=?": None,
    "95=95+0": None,
    "95=the answer": None,
    "95\n1+1=2": "2",
    # the prompt, or what looks like a command to the checker
    "37+58": None,
    "37+58=": None,
    "95=37+58": None,
    "37+58=95": "95",
    "the answer is 95": None,
    "answer: 95": None,
    "correct=True": None,
    "{'answer': '95'}": None,
    "95<|endoftext|>": None,
    "\\boxed{95}": None,
    # whitespace around the number does not matter, inside it does
    " 95": "95",
    "= \t95\r\n": "95",
    "9 5": None,
    "9\n5": None,
    "- 7": None,
    "95\x00": None,
    "\u200b95": None,
    # one number, one spelling
    "095": None,
    "00": None,
    "-0": None,
    "+95": None,
    "--7": None,
    "95.": None,
    "95.0": None,
    "9.5e1": None,
    "0x5f": None,
    "1,005": None,
    "1_005": None,
    "1'005": None,
    "1\u00a0005": None,
    # digits of other scripts and forms, another minus, another equals sign
    "٩٥": None,
    "９５": None,
    "⁹⁵": None,
    "9٥": None,
    "−7": None,
    "15+80＝95": None,
    # nothing
    "": None,
    " ": None,
    "=": None,
    "==": None,
    "-": None,
    "+": None,
    "\n": None,
}


@pytest.mark.parametrize(("completion", "answer"), ANSWERS.items())
def test_the_answer_of_a_completion(completion, answer):
    """Oracle: by hand."""
    assert arithmetic.extract_answer(completion) == answer
    assert of(arithmetic.exact, completion) == float(answer == "95")


@given(st.text("0123456789+-= \n\t,._٣９", max_size=30))
def test_an_answer_is_what_python_spells_so(completion):
    """Oracle: int() reads it and str() writes it the same."""
    last = completion.split("=")[-1].strip()
    try:
        spelled = last if str(int(last)) == last else None
    except ValueError:
        spelled = None
    assert arithmetic.extract_answer(completion) == spelled


@given(st.integers(), st.text("0123456789+-= x"))
def test_only_the_last_term_counts(number, before):
    assert arithmetic.extract_answer(f"{before}={number}") == str(number)
    assert arithmetic.exact([""], [f"{before}={number}"], answer=[number]) == [1.0]
    assert arithmetic.exact([""], [f"{before}={number}"], answer=[number + 1]) == [0.0]


def test_naming_every_number_fools_the_weak_checker_alone():
    every = "=".join(map(str, range(1000)))
    for answer in (0, 95, 500, 998):
        assert of(arithmetic.contains_answer, every, answer) == 1.0
        assert of(arithmetic.exact, every, answer) == 0.0
    assert of(arithmetic.contains_answer, "1950") == 1.0
    assert of(arithmetic.contains_answer, "9+5") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "9" * 10_000,
        "9" * 1_000_000,
        "0" * 1_000_000,
        "9" * 1_000_000 + "x",
        "1=" * 300_000,
        "1+" * 300_000,
        "1+1=" * 200_000 + "x",
        "=" * 1_000_000,
        " " * 1_000_000 + "x",
        "1" + " " * 1_000_000 + "1",
    ],
    ids=lambda text: f"{text[:5]}…{text[-2:]}",
)
def test_a_huge_completion_is_neither_slow_nor_an_error(text):
    start = time.process_time()
    for reward in (arithmetic.exact, arithmetic.contains_answer, arithmetic.well_formed):
        assert of(reward, text) in (0.0, 1.0)
    assert time.process_time() - start < 2
    assert of(arithmetic.exact, text) == 0.0


def test_a_huge_number_can_be_an_answer():
    assert of(arithmetic.exact, "9" * 10_000, "9" * 10_000) == 1.0
    assert of(arithmetic.exact, "9" * 10_001, "9" * 10_000) == 0.0


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("95", 1),
        ("0", 1),
        ("15+80=95", 1),
        ("15+80=96", 1),
        ("1+2+3=3+3=6", 1),
        ("95=95", 1),
        ("", 0),
        ("=95", 0),
        ("95=", 0),
        ("15+80", 0),
        ("15+=95", 0),
        ("+95", 0),
        ("-95", 0),
        ("15++80=95", 0),
        ("15==95", 0),
        ("015=95", 0),
        ("15+80=095", 0),
        ("15+80=95\n", 0),
        (" 95", 0),
        ("15 + 80=95", 0),
        ("٩٥", 0),
        ("x=95", 0),
    ],
)
def test_the_form_of_a_completion(text, good):
    """Oracle: by hand."""
    assert of(arithmetic.well_formed, text) == good


def test_what_is_well_formed_has_an_answer_and_every_demonstration_is():
    pairs = arithmetic.demonstrations(3000, seed=2)
    for _, text in pairs:
        assert of(arithmetic.well_formed, text) == 1.0
        assert arithmetic.extract_answer(text) is not None


def test_rewards_are_called_as_others_are():
    """Every other reward ignores columns that it does not know; so do these."""
    texts = ["95", "15+80=96", "nothing"]
    columns = {"answer": ["95", 95, "0"], "level": [3, 3, 3]}
    found = {
        reward.__name__: rewards.score(reward, ["37+58="] * 3, texts, **columns).tolist()
        for reward in (arithmetic.exact, arithmetic.well_formed, arithmetic.contains_answer)
    }
    assert found == {
        "exact": [1, 0, 0],
        "well_formed": [1, 1, 0],
        "contains_answer": [1, 0, 0],
    }
    assert arithmetic.exact([], [], answer=[]) == []


@pytest.mark.parametrize("reward", [arithmetic.exact, arithmetic.contains_answer])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["95"], "each of the 2 completions"),
        ("95", "each of the 2 completions"),
        (95, "each of the 2 completions"),
        (["95", "095"], r"answer\[1\] is '095'"),
        (["", "95"], r"answer\[0\] is ''"),
        ([None, "95"], r"answer\[0\] is None"),
        (["95", 95.0], r"answer\[1\] is 95.0"),
        ([True, "95"], r"answer\[0\] is True"),
    ],
)
def test_answers_that_nothing_could_match_are_refused(reward, answer, message):
    with pytest.raises(ValueError, match=message):
        reward(["p", "p"], ["95", "95"], answer=answer)


@pytest.mark.equation("eq:pass-at-k")
def test_pass_at_k_is_the_chance_that_one_of_k_is_right():
    """Oracle: all choices of k samples of n, listed."""
    right = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    for k in (1, 2, 5):
        chances = []
        for row in right.tolist():
            chosen = list(itertools.combinations(row, k))
            chances.append(sum(map(any, chosen)) / len(chosen))
        assert arithmetic.pass_at_k(right, k) == pytest.approx(sum(chances) / 3)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k} must"):
            arithmetic.pass_at_k(right, k)


# text


def test_a_text_is_its_characters_and_comes_back(adder):
    """Oracle: the alphabet's order, after three special tokens."""
    for tokenizer in (arithmetic.tokenizer(), adder[1]):
        number = {letter: 3 + i for i, letter in enumerate("0123456789+=")}
        for level, split in ALL:
            # one after the other in one text: a call for each would take seconds
            text = "".join(p.prompt + p.answer for p in arithmetic.problems(level, split))
            ids = tokenizer(text)["input_ids"]
            assert ids == [number[letter] for letter in text]
            assert tokenizer.decode(ids) == text
        special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
        assert special == [0, 1, 2]
        assert tokenizer("1  a\n2")["input_ids"] == [4, 2, 2, 2, 2, 5]
        assert tokenizer.padding_side == "left"


# the model that ships


def test_the_files_are_small_and_hold_no_pickle():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 4 * 2**20
    assert not [name for name in files if not name.endswith((".json", ".md", ".safetensors"))]
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


def test_the_library_alone_loads_it():
    model, tokenizer = (
        kind.from_pretrained(FOLDER) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert isinstance(model, GPT2LMHeadModel)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_pass_rates_are_in_their_bands_and_the_card_tells_them(adder):
    """The bands were set before the model was trained: level 3, the task of reinforcement learning,
    0.20 to 0.33; some level nearly solved, some in between, and one hardly ever right. The card's
    numbers are met within four standard errors."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (\d) \| `.*?` \| \d+ \| ([\d.]+) \| ([\d.]+) \|", card)
    assert f"{adder[0].num_parameters():,} parameters" in card
    rates = {}
    for level, rate, error in rows:
        some = arithmetic.problems(int(level), "held_out")
        some = random.Random(0).sample(some, min(200, len(some)))
        generator = torch.Generator().manual_seed(1)
        right, _ = train_tiny_arithmetic.rewards_of(*adder, some, 8, generator=generator)
        rates[int(level)] = right.mean().item()
        assert abs(rates[int(level)] - float(rate)) < 4 * 2**0.5 * float(error) + 0.01
    assert rates[1] > 0.9
    assert 0.2 < rates[2] < 0.6
    assert 0.20 < rates[3] < 0.33
    assert rates[4] < 0.05


def test_the_loop_of_the_book_runs_on_it():
    """Two iterations: rewards differ, so there is something to learn, and every completion ends by
    itself."""
    problems = arithmetic.sample(64, 2, "train", seed=1)
    config = ppo.Config(
        iterations=2,
        prompts=16,
        samples_per_prompt=4,
        max_new_tokens=arithmetic.MAX_NEW_TOKENS,
        baseline="group",
        kl_coefficient=0.0,
    )
    policy, tokenizer = models.load(FOLDER)
    columns = {"answer": [p.answer for p in problems]}
    prompts = [p.prompt for p in problems]
    history = list(ppo.train(policy, tokenizer, prompts, arithmetic.exact, config, columns=columns))
    assert all(0 < one.score < 1 for one in history)
    assert all(one.unended == 0 for one in history)


# the command that makes it


def test_the_command_makes_one_and_makes_the_same_again(monkeypatch, tmp_path):
    for name, small in {"STEPS": 3, "BATCH": 8, "PROBLEMS": 4, "SAMPLES": 2}.items():
        monkeypatch.setattr(train_tiny_arithmetic, name, small)
    monkeypatch.setattr(train_tiny_arithmetic.evaluate, "__defaults__", (4, 2))
    weights = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        train_tiny_arithmetic.main(folder)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "3 steps of AdamW on 8 demonstrations" in (folder / "README.md").read_text("utf-8")
    assert models.load(folder)[0].num_parameters() > 50_000
