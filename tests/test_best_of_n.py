"""Best of n: what is kept, what it is worth on average, and how far it is from its policy."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_helpers.algorithms import best_of_n
from rlhf_helpers.algorithms.best_of_n import Config, choose, expected_best, kl, kl_bound
from rlhf_helpers.worlds import enumerable

ROWS = st.lists(st.integers(-3, 3), min_size=2, max_size=7)


def mean_over_sets(scores, values, n):
    """The mean over all sets of n samples of the value of the best, of equals each as often."""
    total, sets = Fraction(0), list(itertools.combinations(range(len(scores)), n))
    for chosen in sets:
        top = max(scores[i] for i in chosen)
        best = [values[i] for i in chosen if scores[i] == top]
        total += Fraction(sum(best), len(best))
    return float(total / len(sets))


@pytest.mark.equation("eq:expected-best")
@given(ROWS, st.data())
def test_the_expected_best_is_the_mean_over_all_sets(row, data):
    """Oracle: all sets of n of the samples, in fractions."""
    n = data.draw(st.integers(1, len(row)))
    values = data.draw(st.lists(st.integers(-9, 9), min_size=len(row), max_size=len(row)))
    found = expected_best(torch.tensor([row]).double(), n, torch.tensor([values]).double())
    assert found.item() == pytest.approx(mean_over_sets(row, values, n), abs=1e-9)


@pytest.mark.equation("eq:expected-best")
def test_the_expected_best_by_hand():
    """Oracle: by hand. Of 1, 2 and 4 the best of two is 2 once and 4 twice."""
    assert expected_best(torch.tensor([[4.0, 1.0, 2.0]]), 2).item() == pytest.approx(10 / 3)


@pytest.mark.equation("eq:expected-best")
def test_the_expected_best_is_unbiased():
    """Oracle: the exact distribution of the best of n on four listed texts."""
    p, quality = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1.0, -1.0, 3.0, 0.0])
    scores = torch.tensor([0.0, 1.0, 2.0, 2.0])
    exact = (enumerable.best_of_n(p.double().log(), scores, 3).exp() * quality).sum()
    luck = torch.Generator().manual_seed(0)
    drawn = p.multinomial(20_000 * 5, True, generator=luck).view(-1, 5)
    found = expected_best(scores[drawn], 3, quality[drawn])
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.equation("eq:best-of-n-kl")
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_the_kl_is_that_of_the_exact_distribution(n):
    """Oracle: all texts listed, with probabilities of tenths, so that ten samples have them."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    scores = torch.tensor([2.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    best = enumerable.best_of_n(p.log(), scores, n)
    samples = scores.repeat_interleave((10 * p).round().long())[None]
    assert kl(samples, n).item() == pytest.approx(enumerable.kl(best, p.log()).item(), abs=1e-9)


@pytest.mark.equation("eq:best-of-n-kl")
def test_the_kl_reaches_its_bound_where_no_scores_are_equal():
    """Oracle: ∫ n uⁿ⁻¹ log(n uⁿ⁻¹) du, by a sum over a million steps."""
    steps = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (1, 2, 16):
        density = n * steps ** (n - 1)
        assert kl_bound(n) == pytest.approx((density * density.log()).mean().item(), abs=1e-5)
        assert kl(steps[None, ::100], n).item() == pytest.approx(kl_bound(n), abs=1e-3)
    assert kl(torch.zeros(1, 50), 16).item() == 0


@given(ROWS, st.integers(1, 40))
def test_the_kl_lies_between_zero_and_its_bound(row, n):
    found = kl(torch.tensor([row]).double(), n).item()
    assert -1e-12 <= found <= kl_bound(n) + 1e-12


def test_what_is_kept_is_the_best_of_its_prompt_and_the_first_of_equals():
    language = enumerable.language(4, 3)
    tokenizer = enumerable.tokenizer(language)
    policy = enumerable.small_gpt2(4, 5, seed=3)

    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    config = Config(n=5, max_new_tokens=3, seed=7)
    best = choose(policy, tokenizer, ["", "a"], length, config)
    again = best_of_n.respond(
        policy, tokenizer, ["", "a"], length, torch.Generator().manual_seed(7), 5, 3
    )
    groups = [again.texts[:5], again.texts[5:]]
    assert best.texts == [max(group, key=len) for group in groups]
    assert best.scores.tolist() == [float(max(map(len, group))) for group in groups]
    assert best.all_scores.tolist() == [[float(len(text)) for text in group] for group in groups]


def test_columns_reach_the_reward():
    language = enumerable.language(4, 3)
    tokenizer, seen = enumerable.tokenizer(language), []

    def reward(prompts, completions, topic):
        seen.append(topic)
        return [0.0] * len(completions)

    policy = enumerable.small_gpt2(4, 5, seed=3)
    choose(policy, tokenizer, ["", "a"], reward, Config(n=2, max_new_tokens=2), {"topic": [1, 2]})
    assert seen == [[1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_best(torch.ones(1, 3), 4), "n=4 must lie in"),
        (lambda: expected_best(torch.ones(3), 1), r"scores has shape \(3,\); pass a non-empty"),
        (lambda: expected_best(torch.ones(1, 3) / 0, 1), r"scores\[0, 0\] is"),
        (lambda: expected_best(torch.ones(1, 3), 1, torch.ones(1, 2)), "shapes differ: scores"),
        (lambda: kl(torch.ones(1, 3), 0), "n=0 must"),
        (lambda: kl(torch.ones(0, 3), 1), "pass a non-empty"),
        (lambda: kl_bound(0), "n=0 must"),
        (lambda: kl_bound(1.5), "n=1.5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_and_prompts_are_refused_by_name():
    language = enumerable.language(4, 3)
    tokenizer, policy = enumerable.tokenizer(language), enumerable.small_gpt2(4, 5)
    with pytest.raises(ValueError, match="n=0 must"):
        choose(policy, tokenizer, ["a"], lambda p, c, **k: [0.0] * len(c), Config(n=0))
    with pytest.raises(ValueError, match="prompts"):
        choose(policy, tokenizer, [], lambda p, c, **k: [], Config())
