"""The language that can be listed: against plain loops over all sequences and all draws, closed
forms and autograd."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from architectures import build
from scipy.stats import chisquare, entropy
from torch.autograd import gradcheck
from transformers import GPT2LMHeadModel

from rlhf_helpers.kl import exact_kl
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.models import lora_policy
from rlhf_helpers.rollout import sample
from rlhf_helpers.worlds import enumerable as world

SIZES = [(2, 1), (2, 3), (3, 1), (3, 2), (4, 3), (6, 4)]
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def table(language, seed=0):
    """Random logits [S, V]."""
    return normal(language.num_states, language.vocabulary, seed=seed)


def policy(count=8, seed=0):
    return normal(count, seed=seed).log_softmax(-1)


def listed(vocabulary, length):
    """Every sequence once, cut after its first 0, in the documented order."""
    found = set()
    for row in itertools.product(range(vocabulary), repeat=length):
        end = row.index(0) + 1 if 0 in row else length
        found.add(row[:end])
    return sorted(found, key=lambda row: (len(written(row)), written(row)))


def written(row):
    return tuple(token for token in row if token)


def prefixes(vocabulary, length):
    """Every state, in the documented order."""
    tokens = range(1, vocabulary)
    return [row for count in range(length) for row in itertools.product(tokens, repeat=count)]


# The language


@pytest.mark.parametrize(("vocabulary", "length"), SIZES)
def test_all_sequences_are_listed_once_and_in_order(vocabulary, length):
    """Oracle: all strings of L tokens, cut after the first 0 and sorted, with the states as
    tuples."""
    language = world.language(vocabulary, length)
    rows, states = listed(vocabulary, length), prefixes(vocabulary, length)
    assert language.num_states == len(states)
    assert [tuple(t[m].tolist()) for t, m in zip(language.tokens, language.mask, strict=True)] == (
        rows
    )
    assert language.tokens.shape == language.mask.shape == (len(rows), length)
    assert not language.tokens[~language.mask].any()
    for row, found, mask in zip(rows, language.states, language.mask, strict=True):
        assert found[mask].tolist() == [states.index(row[:t]) for t in range(len(row))]
        assert not found[~mask].any()
    for number, state in enumerate(states):
        assert rows[number] == (*state, 0)


def test_the_size_of_the_book_s_language():
    """Oracle: 1 + 5 + 25 + 125 sequences that end, and as many states; 625 that are cut off."""
    language = world.language(6, 4)
    assert (len(language.tokens), language.num_states) == (781, 156)
    # a large one takes no more memory than its rows
    language = world.language(1000, 2)
    assert (len(language.tokens), language.num_states) == (999_001, 1000)


@pytest.mark.parametrize(("vocabulary", "length"), SIZES)
def test_numbers_follow_the_documented_rule(vocabulary, length):
    """Oracle: the tuples: a state with one token more is the number (V − 1)·s + a among states and
    whole sequences."""
    states, rows = prefixes(vocabulary, length), listed(vocabulary, length)
    for number, state in enumerate(states):
        for token in range(1, vocabulary):
            following = (vocabulary - 1) * number + token
            if following < len(states):
                assert states[following] == (*state, token)
            else:
                assert rows[following] == (*state, token)


@pytest.mark.parametrize(("vocabulary", "length"), SIZES)
def test_every_sequence_finds_itself_among_many(vocabulary, length):
    """Oracle: the row's own number, in any order, with whatever stands after the end."""
    language = world.language(vocabulary, length)
    order = torch.randperm(len(language.tokens), generator=torch.Generator().manual_seed(0)).repeat(
        2
    )
    tokens, mask = language.tokens[order], language.mask[order]
    torch.testing.assert_close(
        world.index_of(tokens.masked_fill(~mask, 99), mask.long(), language), order
    )
    # all samples have ended early, so that the batch is narrower
    short = order[~mask[:, -1] | (length == 1)]
    width = max(1, length - 1)
    found = world.index_of(language.tokens[short, :width], language.mask[short, :width], language)
    torch.testing.assert_close(found, short)


@pytest.mark.parametrize(
    ("row", "mask"),
    [
        ([1, 2, 0], [1, 1, 0]),  # neither ended nor of full length
        ([0, 1, 0], [1, 1, 1]),  # goes on after its end
        ([0, 0, 0], [1, 1, 0]),  # ends twice
        ([1, 0, 2], [1, 0, 1]),  # a gap
        ([0, 1, 2], [0, 1, 1]),  # begins late
        ([1, 2, 2], [0, 0, 0]),  # nothing counts
        ([1, 4, 0], [1, 1, 1]),  # a token outside
        ([1, -1, 0], [1, 1, 1]),
    ],
)
def test_what_is_no_sequence_is_refused(row, mask):
    """Oracle: the message says which row and how to sample one."""
    language = world.language(4, 3)
    good, counted = language.tokens[:2], language.mask[:2]
    tokens = torch.cat([good, torch.tensor([row])])
    mask = torch.cat([counted, torch.tensor([mask]).bool()])
    with pytest.raises(ValueError, match=r"tokens: row 2, .*max_new_tokens=3 and eos_token_id=0"):
        world.index_of(tokens, mask, language)


# Policies


def one_by_one(logits, vocabulary, length):
    """Log-probability of every sequence by a loop over its tokens."""
    states, found = prefixes(vocabulary, length), []
    for row in listed(vocabulary, length):
        terms = [
            logits[states.index(row[:t]), token] - logits[states.index(row[:t])].exp().sum().log()
            for t, token in enumerate(row)
        ]
        found.append(sum(terms))
    return torch.stack(found)


@pytest.mark.parametrize(("vocabulary", "length"), SIZES[:-1])
def test_a_table_s_sequences(vocabulary, length):
    """Oracle: a loop over tokens in every sequence; value, and the gradient of a random sum by
    autograd of the loop."""
    language = world.language(vocabulary, length)
    logits = table(language).requires_grad_()
    found, expected = (
        world.sequence_log_probs(logits, language),
        one_by_one(logits, vocabulary, length),
    )
    torch.testing.assert_close(found, expected, **EXACT)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    weights = normal(len(found), seed=1)
    gradients = [
        torch.autograd.grad((weights * each).sum(), logits)[0] for each in (found, expected)
    ]
    torch.testing.assert_close(*gradients, **EXACT)


def test_a_token_can_be_impossible():
    """Oracle: the loop over tokens; a sequence with the token has no probability, and no gradient
    is NaN."""
    language = world.language(4, 3)
    logits = table(language)
    logits[:, 2] = -math.inf
    logits[1, 0] = -math.inf
    logits.requires_grad_()
    found = world.sequence_log_probs(logits, language)
    torch.testing.assert_close(found, one_by_one(logits, 4, 3), **EXACT)
    assert found.isinf().sum() > 10
    assert found.exp().sum().item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(found[found.isfinite()].sum(), logits)
    assert gradient.isfinite().all()


def each_alone(model, language):
    """Next-token log-probabilities of every state, each run alone."""
    rows = []
    for state in prefixes(language.vocabulary, language.length):
        rows.append(model(torch.tensor([[0, *state]])).logits[0, -1].log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["small", "gpt2", "llama", "openai-gpt"])
@pytest.mark.parametrize(("vocabulary", "length"), [(2, 3), (4, 1), (4, 3)])
def test_a_model_s_table_is_that_of_each_state_alone(name, vocabulary, length):
    """Oracle: a forward pass for every state alone."""
    language = world.language(vocabulary, length)
    if name == "small":
        model = world.small_gpt2(vocabulary, length).double()
    else:
        model = build(name, torch.float64, vocab_size=vocabulary)
    with torch.no_grad():
        found, expected = world.next_log_probs(model, language), each_alone(model, language)
    # some families compute parts in float32 whatever their weights
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_s_sequences_are_scored_as_completions(adapter):
    """Oracle: completion_log_probs of every sequence after the prompt, value and gradient; and the
    sum of all probabilities."""
    language = world.language(5, 3)
    model = world.small_gpt2(5, 3, layers=2).double()
    if adapter:
        with torch.random.fork_rng():
            model = lora_policy(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
    count = len(language.tokens)
    prompt, ones = (each.expand(count, 1) for each in language.prompt())
    expected = completion_log_probs(
        model,
        torch.cat([prompt, language.tokens], dim=1),
        torch.cat([ones, language.mask.long()], dim=1),
        language.length,
    ).sum(1)
    found = world.model_log_probs(model, language)
    torch.testing.assert_close(found, expected, **EXACT)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    weights, trained = normal(count), [p for p in model.parameters() if p.requires_grad]
    of_found, of_expected = (
        torch.autograd.grad((weights * each).sum(), trained, allow_unused=True)
        for each in (found, expected)
    )
    assert len(trained) > (2 if adapter else 20)
    for ours, theirs in zip(of_found, of_expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_sampled_sequences_have_their_exact_probabilities():
    """Oracle: a chi-square test of 20,000 samples; sequences expected less than 40 times are taken
    together."""
    language, count = world.language(4, 3), 20_000
    model = world.small_gpt2(4, 3, seed=3)
    with torch.no_grad():
        probs = world.model_log_probs(model, language).double().exp()
    rollout = sample(
        model,
        *language.prompt(),
        language.length,
        eos_token_id=0,
        pad_token_id=0,
        samples_per_prompt=count,
        generator=torch.Generator().manual_seed(0),
    )
    index = world.index_of(
        rollout.tokens[:, rollout.prompt_length :], rollout.completion_mask, language
    )
    seen = torch.bincount(index, minlength=len(probs)).double()
    rare = count * probs < 40
    both = torch.stack([seen, count * probs])
    cells = both[:, ~rare]
    if rare.any():
        cells = torch.cat([cells, both[:, rare].sum(1, keepdim=True)], dim=1)
    assert (~rare).sum() > 20
    assert chisquare(*(cells / cells.sum(1, keepdim=True) * count).numpy()).pvalue > 1e-3
    torch.testing.assert_close(
        rollout.log_probs.sum(1).exp().double(), probs[index], rtol=1e-4, atol=0
    )


def test_the_small_model_is_the_same_with_every_release_of_transformers():
    """Oracle: some of its weights, as transformers 5.23 drew them."""
    recorded = torch.tensor(
        [
            [-0.163532, 0.003627],
            [-0.069602, -0.048823],
            [-0.095221, -0.15065],
            [-0.031236, 0.000802],
        ]
    )
    model = world.small_gpt2(4, 3, seed=3, layers=2)
    block = model.transformer.h[1]
    matrices = (model.transformer.wpe, block.attn.c_proj, block.mlp.c_fc, model.lm_head)
    found = torch.stack([module.weight.flatten()[-2:] for module in matrices])
    torch.testing.assert_close(found, recorded, rtol=0, atol=1e-5)


@pytest.mark.pins
@pytest.mark.parametrize("layers", [1, 3])
def test_the_small_model_is_drawn_as_the_pinned_release_draws_one(layers):
    """Oracle: transformers itself, seeded."""
    model = world.small_gpt2(5, 3, seed=2, layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        theirs = dict(GPT2LMHeadModel(model.config).named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, theirs[name]) == (name != "lm_head.weight"), name


def test_the_small_model_is_random_but_repeatable():
    """Oracle: the same seed, another seed, the state of the global generator, and the entropy of
    the table."""
    language = world.language(6, 4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (world.small_gpt2(6, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        first, second, third = (world.next_log_probs(m, language) for m in (one, two, other))
        assert torch.equal(first, second)
        assert (first - third).abs().max() > 0.5
        assert torch.equal(first, world.next_log_probs(one.train(), language))
    entropies = -(first.exp() * first).sum(1)
    assert 0.8 * math.log(6) < entropies.mean().item() < 0.97 * math.log(6)
    # the token before the last matters
    assert (first[-25:-20] - first[-30:-25]).abs().max() > 0.2


def test_the_spread_is_that_of_the_logits():
    """Oracle: the standard deviation of the logits over states, tokens and 20 seeds; without spread
    all tokens are alike."""
    language = world.language(6, 4)
    with torch.no_grad():
        logits = [
            world.small_gpt2(6, 4, seed=seed, spread=1.5)(language.tokens[:1]).logits
            for seed in range(20)
        ]
        flat = world.next_log_probs(world.small_gpt2(6, 4, spread=0.0), language)
    assert torch.stack(logits).std().item() == pytest.approx(1.5, rel=0.15)
    torch.testing.assert_close(flat, torch.full_like(flat, -math.log(6)))


# Values


def expected_rest(probs, rewards, paid, rows, states, start, token=None):
    """Expected sum of the rewards after the state `start` (and the given token), by a loop over all
    sequences."""
    total = 0.0
    for row, reward in zip(rows, rewards, strict=True):
        depth = len(start)
        if len(row) <= depth or row[:depth] != start or token not in (None, row[depth]):
            continue
        chance, earned = 1.0, reward
        for t in range(depth, len(row)):
            number = states.index(row[:t])
            if token is None or t > depth:
                chance *= probs[number][row[t]]
            earned += paid[number][row[t]]
        total += chance * earned
    return total


@pytest.mark.parametrize("with_token_rewards", [False, True])
@pytest.mark.parametrize(("vocabulary", "length"), [(2, 1), (2, 3), (3, 2), (4, 3)])
def test_values_are_expectations(vocabulary, length, with_token_rewards):
    """Oracle: the definition, by a loop over all sequences that go on from the state, in plain
    Python."""
    language = world.language(vocabulary, length)
    logits, rewards = table(language), normal(len(language.tokens), seed=1)
    paid = table(language, seed=2) if with_token_rewards else torch.zeros_like(logits)
    v, q = world.values(logits, rewards, language, paid if with_token_rewards else None)
    rows, states = listed(vocabulary, length), prefixes(vocabulary, length)
    given = (logits.softmax(-1).tolist(), rewards.tolist(), paid.tolist(), rows, states)
    assert (v.shape, q.shape) == ((len(states),), (len(states), vocabulary))
    for number, state in enumerate(states):
        assert v[number].item() == pytest.approx(expected_rest(*given, state))
        for token in range(vocabulary):
            assert q[number, token].item() == pytest.approx(expected_rest(*given, state, token))


def test_advantages_give_the_policy_gradient():
    """Oracle: the policy-gradient theorem: autograd of Σ π(y)·r(y) is P(s)·π(a|s)·A(s, a), with
    P(s) counted from the sequences."""
    language = world.language(4, 3)
    logits, rewards = table(language).requires_grad_(), normal(len(language.tokens), seed=1)
    probs = world.sequence_log_probs(logits, language).exp()
    (gradient,) = torch.autograd.grad((probs * rewards).sum(), logits)
    visits = logits.new_zeros(language.num_states)
    for state, mask, p in zip(language.states, language.mask, probs.detach(), strict=True):
        visits[state[mask]] += p
    with torch.no_grad():
        v, q = world.values(logits, rewards, language)
        expected = visits.unsqueeze(1) * logits.softmax(-1) * (q - v.unsqueeze(1))
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_the_price_of_the_log_ratios_makes_the_regularised_objective():
    """Oracle: regularised_objective: with −β·log(π/π_ref) paid a token, the value of the empty
    state is J, gradient included."""
    language, beta = world.language(4, 3), 0.3
    logits, reference = table(language).requires_grad_(), table(language, seed=3).log_softmax(-1)
    rewards = normal(len(language.tokens), seed=1)
    price = -beta * (logits.log_softmax(-1) - reference)
    v, _ = world.values(logits, rewards, language, price)
    log_probs, ref_log_probs = (
        world.sequence_log_probs(each, language) for each in (logits, reference)
    )
    objective = world.regularised_objective(log_probs, ref_log_probs, rewards, beta)
    torch.testing.assert_close(v[0], objective, **EXACT)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (v[0], objective)]
    torch.testing.assert_close(*gradients, **EXACT)


# The optimum


@pytest.mark.equation("eq:optimal-policy")
@pytest.mark.equation("eq:log-partition")
@pytest.mark.equation("eq:regularised-objective")
def test_two_sequences_by_hand():
    """Oracle: by hand: with r/β = log 3 a fair coin becomes 3/4 to 1/4, Z is 2, and J is β·log 2 at
    the optimum."""
    reference, beta = double([0.5, 0.5]).log(), 0.2
    rewards = double([beta * math.log(3), 0.0])
    optimum = world.optimal_policy(reference, rewards, beta)
    torch.testing.assert_close(optimum.exp(), double([0.75, 0.25]))
    assert world.log_partition(reference, rewards, beta).item() == pytest.approx(math.log(2))
    at_optimum = world.regularised_objective(optimum, reference, rewards, beta)
    assert at_optimum.item() == pytest.approx(beta * math.log(2))
    certain = double([1.0, 0.0]).log()
    price = world.regularised_objective(certain, reference, rewards, beta)
    assert price.item() == pytest.approx(beta * math.log(3) - beta * math.log(2))


@pytest.mark.equation("eq:optimal-policy")
@pytest.mark.equation("eq:log-partition")
@pytest.mark.parametrize("beta", [0.01, 0.5, 100.0])
def test_optimum_in_plain_python(beta):
    """Oracle: exact rational weights would overflow at β = 0.01, so: logs in Python floats, with
    the largest taken out."""
    reference, rewards = policy(), 10 * normal(8, seed=1)
    exponents = [p + r / beta for p, r in zip(reference.tolist(), rewards.tolist(), strict=True)]
    largest = max(exponents)
    log_z = largest + math.log(math.fsum(math.exp(each - largest) for each in exponents))
    found = world.log_partition(reference, rewards, beta)
    assert found.item() == pytest.approx(log_z, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(
        world.optimal_policy(reference, rewards, beta),
        double([each - log_z for each in exponents]),
        **EXACT,
    )


@pytest.mark.equation("eq:regularised-objective")
def test_objective_in_plain_python():
    """Oracle: the two sums in Python floats."""
    log_probs, reference, rewards = policy(), policy(seed=1), normal(8, seed=2)
    expected = sum(
        math.exp(a) * (r - 0.3 * (a - b))
        for a, b, r in zip(
            *(each.tolist() for each in (log_probs, reference, rewards)), strict=True
        )
    )
    found = world.regularised_objective(log_probs, reference, rewards, 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq:optimal-policy")
@pytest.mark.equation("eq:log-partition")
@pytest.mark.equation("eq:regularised-objective")
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_no_policy_is_better_than_the_optimum(beta):
    """Oracle: 10,000 random policies, near and far; each falls short by exactly β·KL(π‖π*),
    computed by torch.distributions."""
    reference, rewards = policy(30), normal(30, seed=1)
    optimum = world.optimal_policy(reference, rewards, beta)
    best = beta * world.log_partition(reference, rewards, beta)
    torch.testing.assert_close(
        world.regularised_objective(optimum, reference, rewards, beta), best, **EXACT
    )
    sizes = torch.logspace(-6, 1, 10_000, dtype=torch.float64).unsqueeze(1)
    others = (optimum + sizes * normal(10_000, 30, seed=2)).log_softmax(-1)
    objectives = world.regularised_objective(others, reference, rewards, beta)
    assert objectives.shape == (10_000,)
    assert objectives.max() <= best + 1e-12
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=others),
        torch.distributions.Categorical(logits=optimum),
    )
    torch.testing.assert_close(best - objectives, beta * divergence, rtol=1e-9, atol=1e-12)


@pytest.mark.equation("eq:optimal-policy")
@pytest.mark.equation("eq:regularised-objective")
def test_the_optimum_satisfies_the_lagrange_condition():
    """Oracle: autograd: ∂J/∂π(y) is the same number for all y at π*, that is β·log Z − β, and
    differs elsewhere."""
    reference, rewards, beta = policy(), normal(8, seed=1), 0.4

    def slopes(log_probs):
        probs = log_probs.exp().requires_grad_()
        objective = world.regularised_objective(probs.log(), reference, rewards, beta)
        return torch.autograd.grad(objective, probs)[0]

    multiplier = beta * world.log_partition(reference, rewards, beta) - beta
    at_optimum = slopes(world.optimal_policy(reference, rewards, beta))
    torch.testing.assert_close(at_optimum, multiplier.expand(8), **EXACT)
    assert slopes(reference).std() > 0.1


@pytest.mark.equation("eq:optimal-policy")
@pytest.mark.equation("eq:log-partition")
@pytest.mark.equation("eq:regularised-objective")
@pytest.mark.parametrize("seed", range(3))
def test_gradient_ascent_arrives_at_the_optimum(seed):
    """Oracle: L-BFGS on the logits of a table, from a random start."""
    language, beta = world.language(4, 3), 0.5
    reference = world.sequence_log_probs(table(language, seed=10), language)
    rewards = world.utilities(language, seed)
    logits = table(language, seed).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=400,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimiser.zero_grad()
        log_probs = world.sequence_log_probs(logits, language)
        negated = -world.regularised_objective(log_probs, reference, rewards, beta)
        negated.backward()
        return negated

    start = -loss().item()
    optimiser.step(loss)
    best = beta * world.log_partition(reference, rewards, beta).item()
    assert best - start > 0.5
    assert -loss().item() == pytest.approx(best, abs=1e-8)
    reached = world.sequence_log_probs(logits.detach(), language)
    optimum = world.optimal_policy(reference, rewards, beta)
    torch.testing.assert_close(reached.exp(), optimum.exp(), rtol=0, atol=1e-5)
    assert world.kl(reached, optimum) < 1e-7


@pytest.mark.equation("eq:optimal-policy")
@pytest.mark.equation("eq:log-partition")
@pytest.mark.equation("eq:regularised-objective")
def test_gradients():
    """Oracle: finite differences, in policy, reference and rewards; and ∂(β·log Z)/∂r = π*."""
    logits, other, rewards = (normal(5, seed=seed).requires_grad_() for seed in range(3))

    def objective(a, b, r):
        return world.regularised_objective(a.log_softmax(-1), b.log_softmax(-1), r, 0.3)

    assert gradcheck(objective, (logits, other, rewards))
    assert gradcheck(lambda b, r: world.optimal_policy(b.log_softmax(-1), r, 0.3), (other, rewards))
    assert gradcheck(lambda b, r: world.log_partition(b.log_softmax(-1), r, 0.3), (other, rewards))
    reference = other.detach().log_softmax(-1)
    (slope,) = torch.autograd.grad(0.3 * world.log_partition(reference, rewards, 0.3), rewards)
    optimum = world.optimal_policy(reference, rewards.detach(), 0.3)
    torch.testing.assert_close(slope, optimum.exp(), **EXACT)


@pytest.mark.equation("eq:optimal-policy")
@pytest.mark.equation("eq:regularised-objective")
def test_what_the_reference_cannot_produce():
    """Oracle: the same problem without the impossible sequence; a policy that gives it mass pays
    infinitely."""
    smaller, rewards = policy(4), normal(5, seed=1)
    reference = torch.cat([smaller, double([-math.inf])])
    optimum = world.optimal_policy(reference, rewards, 0.5)
    without = world.optimal_policy(smaller, rewards[:4], 0.5)
    torch.testing.assert_close(optimum, torch.cat([without, double([-math.inf])]), **EXACT)
    log_probs = optimum.clone().requires_grad_()
    objective = world.regularised_objective(log_probs, reference, rewards, 0.5)
    expected = world.regularised_objective(without, smaller, rewards[:4], 0.5)
    torch.testing.assert_close(objective, expected, **EXACT)
    assert torch.autograd.grad(objective, log_probs)[0].isfinite().all()
    assert world.regularised_objective(policy(5), reference, rewards, 0.5) == -math.inf


def test_divergence_of_distributions():
    """Oracle: scipy.stats.entropy(p, q), with a zero in p and one in q; and exact_kl of the same
    numbers as logits."""
    p, q = double([0.5, 0.5, 0.0, 0.0]), double([0.25, 0.25, 0.5, 0.0])
    found = world.kl(p.log(), q.log())
    assert found.item() == pytest.approx(entropy(p.numpy(), q.numpy()))
    assert found.item() == pytest.approx(math.log(2))
    assert world.kl(q.log(), p.log()) == math.inf
    assert world.kl(p.log(), p.log()) == 0
    many, one = policy((5), 3).expand(2, 5).clone(), policy(5, seed=4)
    many[1] = policy(5, seed=5)
    torch.testing.assert_close(world.kl(many, one), exact_kl(many, one.expand(2, 5)))
    torch.testing.assert_close(world.kl(one, many), exact_kl(one.expand(2, 5), many))


# Best of n


def by_all_draws(probs, scores, n):
    """The distribution of the best of n by going through all Y^n draws, in exact fractions."""
    found = [Fraction(0)] * len(probs)
    for draw in itertools.product(range(len(probs)), repeat=n):
        chance = math.prod(probs[y] for y in draw)
        highest = max(scores[y] for y in draw)
        winners = [y for y in draw if scores[y] == highest]
        for y in winners:
            found[y] += chance / len(winners)
    return found


@pytest.mark.equation("eq:best-of-n")
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "scores", [[3, 1, 2, 0, 5], [1, 0, 1, 0, 1], [2, 2, 2, 2, 2], [0, 1, 1, 2, 0]]
)
def test_best_of_n_is_that_of_all_draws(scores, n):
    """Oracle: all 5^n draws in exact fractions, each best one drawn sharing the draw's
    probability."""
    probs = [Fraction(k, 16) for k in (5, 1, 4, 2, 4)]
    found = world.best_of_n(double([float(p) for p in probs]).log(), double(scores), n)
    expected = double([float(p) for p in by_all_draws(probs, scores, n)])
    torch.testing.assert_close(found.exp(), expected, **EXACT)


@pytest.mark.equation("eq:best-of-n")
@pytest.mark.parametrize("n", [1, 100, 10_000, 10**9])
def test_best_of_very_many(n):
    """Oracle: F(s)^n − F(s−)^n in exact fractions of probabilities from 2^-60 to 1/2 for n ≤
    10,000; beyond, π·n for the rarest."""
    exact = [Fraction(1, 2**k) for k in (1, 2, 3, 10, 20, 40, 60)]
    exact.append(1 - sum(exact))
    scores = [0, 1, 2, 4, 3, 5, 6, 1.5]
    log_probs = double([math.log(p) for p in exact])
    found = world.best_of_n(log_probs, double(scores), n)
    assert found.logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)
    if n > 10_000:
        # the rarest are drawn at most once
        assert found[6].item() == pytest.approx(math.log(n) - 60 * math.log(2), abs=1e-9)
        return
    for y, score in enumerate(scores):
        at_most = sum(p for p, s in zip(exact, scores, strict=True) if s <= score)
        less = at_most - exact[y]
        chance = at_most**n - less**n
        # scaled to about 1, since the smallest are below any float
        bits = chance.denominator.bit_length() - chance.numerator.bit_length()
        expected = math.log(float(chance * 2**bits)) - bits * math.log(2)
        assert found[y].item() == pytest.approx(expected, rel=1e-13, abs=1e-14)


@pytest.mark.equation("eq:best-of-n")
def test_best_of_n_keeps_its_distance_below_the_known_bound():
    """Oracle: KL(best of n‖π) ≤ log n − (n − 1)/n, reached as ever more equally likely sequences
    are ranked."""
    for n in (2, 4, 16):
        bound = math.log(n) - (n - 1) / n
        for log_probs in (policy(20), 3 * policy(20)):
            log_probs = log_probs.log_softmax(-1)
            best = world.best_of_n(log_probs, normal(20, seed=1), n)
            assert world.kl(best, log_probs) < bound
        fine = torch.full((100_000,), -math.log(100_000), dtype=torch.float64)
        best = world.best_of_n(fine, torch.arange(100_000), n)
        assert world.kl(best, fine).item() == pytest.approx(bound, abs=1e-3)


@pytest.mark.equation("eq:best-of-n")
def test_best_of_n_with_impossible_sequences_and_in_single_precision():
    """Oracle: the same problem without the impossible sequences; the same numbers in float64."""
    log_probs, scores = policy(), normal(8, seed=1)
    full = torch.cat([double([-math.inf]), log_probs, double([-math.inf])])
    padded = torch.cat([double([-9.0]), scores, double([9.0])])
    for n in (1, 7):
        expected = world.best_of_n(log_probs, scores, n)
        found = world.best_of_n(full, padded, n)
        torch.testing.assert_close(found[1:-1], expected, **EXACT)
        assert found[0] == found[-1] == -math.inf
    single = log_probs.float()
    found = world.best_of_n(single, scores, 10_000)
    assert found.dtype == torch.float32
    expected = world.best_of_n(single.double(), scores, 10_000)
    torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=0)


# Preferences


def test_pairs_are_two_samples_that_differ():
    """Oracle: a chi-square test of 50,000 pairs against π(a)·π(b), scaled to the pairs with a ≠
    b."""
    log_probs, count = double([0.6, 0.2, 0.15, 0.05]).log(), 50_000
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = world.draw_pairs(log_probs, count, torch.Generator().manual_seed(0))
    again = world.draw_pairs(log_probs, count, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert first.shape == second.shape == (count,)
    assert not (first == second).any()
    joint = log_probs.exp().outer(log_probs.exp()).fill_diagonal_(0.0).flatten()
    expected = count * joint / joint.sum()
    seen = torch.bincount(4 * first + second, minlength=16)
    kept = joint > 0
    assert chisquare(seen[kept].numpy(), expected[kept].numpy()).pvalue > 1e-3


def test_labels_follow_bradley_and_terry():
    """Oracle: shares of 40,000 labels a pair, within four standard errors of 1/(1 + exp(u_2 −
    u_1))."""
    utilities, count = double([0.0, 1.0, -2.0]), 40_000
    for a, b in [(0, 1), (1, 0), (1, 2), (2, 2)]:
        first, second = (torch.full((count,), each) for each in (a, b))
        labels = world.label_pairs(utilities, first, second, torch.Generator().manual_seed(a))
        assert labels.dtype == torch.bool
        expected = 1 / (1 + math.exp(utilities[b] - utilities[a]))
        spread = math.sqrt(expected * (1 - expected) / count)
        assert abs(labels.double().mean().item() - expected) < 4 * spread


def test_utilities_are_standard_normal_and_repeatable():
    """Oracle: moments of 781 numbers within four standard errors; and the distance from the optimum
    that is promised."""
    language = world.language(6, 4)
    for seed in range(3):
        utilities = world.utilities(language, seed)
        assert torch.equal(utilities, world.utilities(language, seed))
        assert abs(utilities.mean().item()) < 4 / math.sqrt(781)
        assert abs(utilities.var().item() - 1) < 4 * math.sqrt(2 / 781)
        with torch.no_grad():
            reference = world.model_log_probs(world.small_gpt2(6, 4, seed), language)
        optimum = world.optimal_policy(reference, utilities, 0.5)
        assert 1 < world.kl(reference, optimum) < 4
    assert (world.utilities(language, 0) - world.utilities(language, 1)).std() > 1


def test_structured_utilities_are_sums_over_neighbours():
    """Oracle: least squares on counts of neighbouring tokens, which explain the share of the
    variance that is asked for."""
    language = world.language(6, 4)
    counts = torch.zeros(781, 36, dtype=torch.float64)
    for y, (row, mask) in enumerate(zip(language.tokens, language.mask, strict=True)):
        sequence = [0, *row[mask].tolist()]
        for pair in itertools.pairwise(sequence):
            counts[y, 6 * pair[0] + pair[1]] += 1
    inputs = torch.cat([counts, torch.ones(781, 1).double()], dim=1)
    for structure, low, high in [(1.0, 1 - 1e-12, 1 + 1e-12), (0.5, 0.43, 0.6), (0.0, 0.0, 0.12)]:
        utilities = world.utilities(language, structure=structure)
        fit = inputs @ torch.linalg.lstsq(inputs, utilities, driver="gelsd").solution
        explained = 1 - ((utilities - fit).var() / utilities.var()).item()
        assert low <= explained <= high
        assert utilities.std().item() == pytest.approx(1.0, abs=0.15)
    # after the prompt a token is worth something else than after itself: rows 0, 1, 6 are '', 1, 11
    empty, one, two = world.utilities(language, structure=1.0)[[0, 1, 6]]
    assert abs((one - empty) - (two - one)) > 0.1


# Bad input

SMALL = world.language(3, 2)
FIVE = policy(5)
REWARDS = normal(5, seed=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world.language(1, 3), "vocabulary=1 must lie in"),
        (lambda: world.language(3, 0), "length=0 must lie in"),
        (lambda: world.language(50, 4), "5,884,901 sequences; lower one of them"),
        (lambda: world.small_gpt2(1, 3), "vocabulary=1"),
        (lambda: world.small_gpt2(3, 0), "length=0"),
        (lambda: world.small_gpt2(3, 3, layers=0), "layers=0"),
        (lambda: world.small_gpt2(3, 3, width=30), "width=30 must be a multiple of 4"),
        (lambda: world.small_gpt2(3, 3, spread=-1.0), "spread=-1.0"),
        (
            lambda: world.model_log_probs(world.small_gpt2(4, 2), SMALL),
            "model has a vocabulary of 4, the language 3; make them equal",
        ),
        (
            lambda: world.index_of(torch.zeros(2, 3).long(), torch.ones(2, 3), SMALL),
            r"tokens has shape \(2, 3\); pass \[samples, 1 to 2 tokens\]",
        ),
        (lambda: world.index_of(SMALL.tokens, SMALL.mask[1:], SMALL), "shapes differ: tokens"),
        (
            lambda: world.sequence_log_probs(torch.zeros(3, 2), SMALL),
            r"logits has shape \(3, 2\); pass \(3, 3\)",
        ),
        (
            lambda: world.sequence_log_probs(
                torch.tensor([[0.0] * 3, [math.nan] * 3, [0.0] * 3]), SMALL
            ),
            "logits: state 1 has no distribution",
        ),
        (
            lambda: world.values(torch.zeros(3, 3), torch.zeros(6), SMALL),
            r"rewards has shape \(6,\); pass \(7,\)",
        ),
        (
            lambda: world.values(torch.zeros(3, 3), torch.zeros(7), SMALL, torch.zeros(3)),
            r"token_rewards has shape \(3,\); pass \(3, 3\)",
        ),
        (
            lambda: world.values(torch.zeros(3, 3), torch.full((7,), math.inf), SMALL),
            r"rewards\[0\] is inf; it must be finite",
        ),
        (
            lambda: world.values(
                torch.zeros(3, 3), torch.zeros(7), SMALL, torch.full((3, 3), math.nan)
            ),
            r"token_rewards\[0, 0\] is nan",
        ),
        (lambda: world.best_of_n(FIVE, REWARDS, 0), "n=0 must lie in"),
        (lambda: world.best_of_n(FIVE, REWARDS[1:], 2), "shapes differ: log_probs"),
        (lambda: world.best_of_n(FIVE, REWARDS / 0, 2), r"scores\[0\] is"),
        (
            lambda: world.best_of_n(FIVE + 1, REWARDS, 2),
            "log_probs holds probabilities that sum to",
        ),
        (
            lambda: world.best_of_n(FIVE.expand(2, 5), REWARDS.expand(2, 5), 2),
            r"log_probs has shape \(2, 5\); pass \(5,\)",
        ),
        (lambda: world.kl(FIVE, policy(4)), r"log_p \(5,\), log_q \(4,\): the last dimension must"),
        (lambda: world.kl(FIVE, FIVE - 1), "log_q holds probabilities that sum to 0.367"),
        (lambda: world.kl(FIVE[0], FIVE[0]), "the last dimension must be the sequences"),
        (lambda: world.kl(FIVE[:0], FIVE[:0]), "the last dimension must be the sequences"),
        (
            lambda: world.draw_pairs(double([0.999, 0.001]).log(), 5, torch.Generator()),
            "log_probs gives two equal samples with probability 0.9980; pass a distribution",
        ),
        (lambda: world.draw_pairs(FIVE, 0, torch.Generator()), "n=0"),
        (lambda: world.draw_pairs(FIVE.exp(), 1, torch.Generator()), "log_probs holds prob"),
        (
            lambda: world.draw_pairs(FIVE.expand(2, 5), 1, torch.Generator()),
            r"log_probs has shape \(2, 5\); pass \(5,\)",
        ),
        (
            lambda: world.label_pairs(
                REWARDS, torch.tensor([0]), torch.tensor([5]), torch.Generator()
            ),
            r"second holds a number outside \[0, 5\)",
        ),
        (
            lambda: world.label_pairs(
                REWARDS, torch.tensor([-1]), torch.tensor([1]), torch.Generator()
            ),
            "first holds a number outside",
        ),
        (
            lambda: world.label_pairs(
                REWARDS, torch.tensor([0, 1]), torch.tensor([1]), torch.Generator()
            ),
            "shapes differ: first",
        ),
        (
            lambda: world.label_pairs(
                REWARDS * math.nan, torch.tensor([0]), torch.tensor([1]), torch.Generator()
            ),
            r"utilities\[0\] is nan",
        ),
        (lambda: world.utilities(SMALL, structure=1.5), "structure=1.5 must lie in"),
    ],
)
def test_bad_input_is_named(call, message):
    """Oracle: the message holds the argument's name, what is wrong with it, and the fix."""
    with pytest.raises(ValueError, match=message):
        call()


def with_objective(*arguments):
    return world.regularised_objective(FIVE, *arguments)


@pytest.mark.parametrize("function", [world.optimal_policy, world.log_partition, with_objective])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FIVE, REWARDS, 0.0), "beta=0.0 must lie in"),
        ((FIVE, REWARDS, -1.0), "beta=-1.0"),
        ((FIVE, REWARDS, math.nan), "beta=nan"),
        ((FIVE, REWARDS, math.inf), "beta=inf"),
        ((FIVE, REWARDS[1:], 1.0), r"shapes differ: ref_log_probs \(5,\), rewards \(4,\)"),
        ((FIVE, double([0, 1, math.nan, 0, 0]), 1.0), r"rewards\[2\] is nan"),
        (
            (FIVE.exp(), REWARDS, 1.0),
            "ref_log_probs holds probabilities that sum to .* log_softmax",
        ),
        (
            (FIVE + 2e-4, REWARDS, 1.0),
            "ref_log_probs holds probabilities that sum to 1.0002, not 1",
        ),
        ((FIVE * math.nan, REWARDS, 1.0), "ref_log_probs holds probabilities that sum to nan"),
    ],
)
def test_bad_objectives_are_named(function, arguments, message):
    """Oracle: the message holds the argument's name, what is wrong with it, and the fix."""
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_a_policy_that_is_no_distribution_is_named():
    """Oracle: the message; rounding of single precision is let through."""
    with pytest.raises(ValueError, match=r"log_probs holds probabilities that sum to 0\.5, not 1"):
        world.regularised_objective(FIVE + math.log(0.5), FIVE, REWARDS, 1.0)
    with pytest.raises(ValueError, match=r"log_probs \(4,\), ref_log_probs \(5,\)"):
        world.regularised_objective(policy(4), FIVE, REWARDS, 1.0)
    assert world.regularised_objective(FIVE.float(), FIVE, REWARDS, 1.0).isfinite()
