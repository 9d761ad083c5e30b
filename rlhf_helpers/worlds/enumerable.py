"""A language so small that all its sequences can be listed: what is estimated elsewhere is summed
here.

There are V tokens. Token 0 starts every sequence (it is the prompt), ends it, and pads it, as one
token does all three for GPT-2. A sequence ends with token 0, or after L tokens without it. A state
is what has been written before the next token is chosen: up to L − 1 tokens, none of them 0.

States and sequences are numbered alike: shorter ones first, and those of one length in the order
of their tokens. State 0 is the empty one. In state s, token 0 ends sequence s, and token a > 0
leads to number (V − 1)·s + a: a state if that is below the number S of states, else a sequence of
L tokens.

A policy is a model, or a table of logits [S, V] with one row a state. Distributions over the
sequences are log-probabilities [Y], in nats; −inf means that a sequence cannot occur.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf_helpers._validate import (
    check_generator,
    check_seed,
    check_tensor,
    finite,
    floats,
    has,
    in_range,
    integers,
    same_shape,
    zero_or_one,
)

# The tables need torch alone: chapters without a language model use them too.
if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

_LARGEST = 1_000_000  # sequences
_TOLERANCE = 1e-4  # of a distribution's total probability, on the scale of its logarithm


class Language(NamedTuple):
    """All Y sequences of a language.

    tokens [Y, L] holds token 0 after the end, where mask [Y, L] is False; mask is True on the end
    token. states [Y, L] is the number of the state in which each token is chosen, 0 where the mask
    is False. The first S rows of tokens are the states, too: state s is sequence s without its end.
    """

    vocabulary: int
    length: int
    tokens: Tensor
    mask: Tensor
    states: Tensor

    @property
    def num_states(self) -> int:
        """S, the number of states."""
        return len(self.tokens) - (self.vocabulary - 1) ** self.length

    def prompt(self) -> tuple[Tensor, Tensor]:
        """What every sequence starts with, for `rollout.sample`: tokens and mask, both [1, 1]."""
        return self.tokens.new_zeros(1, 1), self.tokens.new_ones(1, 1)


def language(vocabulary: int, length: int) -> Language:
    """The language of `vocabulary` tokens and sequences of at most `length` of them.

    It has Y = 1 + (V − 1) + … + (V − 1)^(L − 1) + (V − 1)^L sequences; the last term counts those
    that are cut off at L tokens, the others are as many as there are states.

    Args:
        vocabulary: V, the end token included; ≥ 2.
        length: L, ≥ 1.
    Returns: a Language.
    Raises: ValueError on a number out of range, or more than a million sequences.
    """
    in_range(vocabulary, "vocabulary", 2)
    in_range(length, "length", 1)
    count = sum((vocabulary - 1) ** depth for depth in range(length + 1))
    if count > _LARGEST:
        raise ValueError(
            f"vocabulary={vocabulary} and length={length} make {count:,} sequences; "
            f"lower one of them, to {_LARGEST:,} sequences at most"
        )
    levels = [torch.zeros(1, 0, dtype=torch.long)]
    for _ in range(length):
        before = levels[-1].repeat_interleave(vocabulary - 1, dim=0)
        following = torch.arange(1, vocabulary).repeat(len(levels[-1])).unsqueeze(1)
        levels.append(torch.cat([before, following], dim=1))
    tokens = torch.cat([pad(rows, (0, length - depth)) for depth, rows in enumerate(levels)])
    mask = torch.arange(length) <= (tokens > 0).sum(1, keepdim=True)
    states = _numbers(tokens, vocabulary)[:, :-1] * mask
    return Language(vocabulary, length, tokens, mask, states)


def _numbers(tokens: Tensor, vocabulary: int) -> Tensor:
    """The number of what is written before each token and after the last: [N, C] -> [N, C + 1]."""
    numbers = [torch.zeros_like(tokens[:, 0])]
    for column in tokens.unbind(1):
        before = numbers[-1]
        numbers.append(torch.where(column > 0, (vocabulary - 1) * before + column, before))
    return torch.stack(numbers, dim=1)


def index_of(tokens: Tensor, mask: Tensor, language: Language) -> Tensor:
    """Which sequence of the language each sample is.

    Args:
        tokens: [N, C] with C ≤ L: completions, e.g. `rollout.tokens[:, rollout.prompt_length :]`.
        mask: [N, C]; 1 or True on a completion, its end token included.
        language: as `language` returns it.
    Returns: [N], row numbers of language.tokens.
    Raises: ValueError on unequal shapes, or a row that is no sequence of the language: not yet
        ended, going on after its end, with a gap in its mask, or with a token outside the
        vocabulary.
    """
    _check_language(language)
    integers(tokens=tokens)
    check_tensor(mask, "mask")
    same_shape(tokens=tokens, mask=mask)
    if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= language.length:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; pass [samples, 1 to {language.length} tokens]"
        )
    missing = (0, language.length - tokens.shape[1])
    mask = pad(zero_or_one(mask), missing)
    tokens = pad(tokens, missing).masked_fill(~mask, 0)
    known = tokens.clamp(0, language.vocabulary - 1)
    index = _numbers(known, language.vocabulary)[:, -1]
    wrong = ((tokens != language.tokens[index]) | (mask != language.mask[index])).any(1)
    if wrong.any():
        row = wrong.nonzero()[0].item()
        raise ValueError(
            f"tokens: row {row}, {tokens[row][mask[row]].tolist()}, is no sequence of the"
            f" language; sample with its prompt, max_new_tokens={language.length} and"
            " eos_token_id=0"
        )
    return index


# --- policies ------------------------------------------------------------------------------------


def small_gpt2(
    vocabulary: int,
    length: int,
    seed: int = 0,
    layers: int = 1,
    width: int = 32,
    spread: float = 0.7,
) -> GPT2LMHeadModel:
    """A random GPT-2 for the language: a policy to start from, whose probabilities are not uniform.

    Input and output embedding are different weights: tied ones would favour the token just
    written, which at the start is the end token. There is no dropout. The global random state is
    untouched.

    Args:
        vocabulary: V.
        length: L; the context is the prompt and L tokens.
        seed: of the weights.
        layers: how many blocks.
        width: of the hidden states, a multiple of 4, the number of attention heads.
        spread: standard deviation of the logits, ≥ 0; 0 gives the uniform policy.
    Returns: the model, in eval mode, float32.
    Raises: ValueError on a number out of range.
    """
    in_range(vocabulary, "vocabulary", 2)
    in_range(length, "length", 1)
    in_range(layers, "layers", 1)
    in_range(spread, "spread", 0.0)
    in_range(width, "width", 1)
    check_seed(seed)
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4, the number of attention heads")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length + 1,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        # the same function as GPT-2's "gelu_new", as one kernel
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # GPT-2's own 0.02 suits its width; in a narrow model it would drown the tokens before the
        # last
        initializer_range=width**-0.5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config)
    _draw_weights(model, torch.Generator().manual_seed(seed), spread)
    return model.eval()


@torch.no_grad()
def _draw_weights(model: GPT2LMHeadModel, generator: torch.Generator, spread: float) -> None:
    """Draw the matrices of a GPT-2 in the order of transformers 5.23, whose releases differ.

    Some are drawn more than once there; the last time counts.
    """
    body, head, std = model.transformer, model.lm_head, model.config.initializer_range
    embeddings = [body.wte, body.wpe]
    paths = [path for block in body.h for path in _residual_paths(block)]
    for module in (*embeddings, *(module for path in paths for module in path)):
        module.weight.normal_(generator=generator)
    for module in embeddings:
        module.weight.normal_(std=std, generator=generator)
    for into, out in paths:
        into.weight.normal_(std=std, generator=generator)
        out.weight.normal_(std=std, generator=generator)
        # the sum of all paths is to have the size of one
        out.weight.normal_(std=std / math.sqrt(len(paths)), generator=generator)
    head.weight.uniform_(generator=generator)
    head.weight.normal_(std=std, generator=generator)
    # the last layer norm gives states of mean square 1
    head.weight.normal_(std=spread * std, generator=generator)


def _residual_paths(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The first and the last matrix of a block's attention and of its MLP."""
    return [(block.attn.c_attn, block.attn.c_proj), (block.mlp.c_fc, block.mlp.c_proj)]


def next_log_probs(model: nn.Module, language: Language) -> Tensor:
    """The table of a model: the log-probability of every token in every state.

    One forward pass over the longest states gives those of their beginnings as well.

    Args:
        model: a causal language model with the language's vocabulary, LoRA or not.
        language: as `language` returns it.
    Returns: [S, V], nats, on the language's device; differentiable.
    Raises: ValueError if the model has another vocabulary.
    """
    has(model, "model", "a causal language model", "parameters", "forward")
    _check_language(language)
    branches, last = language.vocabulary - 1, language.length - 1
    longest = language.tokens[language.num_states - branches**last : language.num_states]
    device = next(model.parameters()).device
    # the prompt in front takes the place of the end
    inputs = longest.roll(1, dims=1).to(device)
    logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
    if logits.shape[-1] != language.vocabulary:
        raise ValueError(
            f"model has a vocabulary of {logits.shape[-1]}, the language {language.vocabulary}; "
            "make them equal"
        )
    log_probs = logits.log_softmax(-1).to(language.tokens.device)
    return torch.cat([log_probs[:: branches ** (last - t), t] for t in range(language.length)])


def sequence_log_probs(logits: Tensor, language: Language) -> Tensor:
    """Log-probability of every sequence under a policy given as a table.

    Args:
        logits: [S, V], one row a state; log-probabilities will do. −inf makes a token impossible.
        language: as `language` returns it.
    Returns: [Y], nats; the probabilities sum to 1. Differentiable.
    Raises: ValueError if logits is no such table, or holds NaN.
    """
    chosen = _log_table(logits, language)[language.states, language.tokens]
    return chosen.masked_fill(~language.mask, 0.0).sum(1)


def model_log_probs(model: nn.Module, language: Language) -> Tensor:
    """Log-probability of every sequence under a model: `sequence_log_probs` of `next_log_probs`.

    Args:
        model: as in `next_log_probs`.
        language: as `language` returns it.
    Returns: [Y], nats; the probabilities sum to 1. Differentiable.
    Raises: ValueError if the model has another vocabulary, or its logits are NaN.
    """
    return sequence_log_probs(next_log_probs(model, language), language)


def values(
    logits: Tensor, rewards: Tensor, language: Language, token_rewards: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact values of a policy by backward induction, without discount; A = Q − V.

    Args:
        logits: [S, V], the policy's table, as in `sequence_log_probs`.
        rewards: [Y], paid when the sequence has ended.
        language: as `language` returns it.
        token_rewards: [S, V], paid for a token in a state, e.g. the price of its log-ratio; None
            pays nothing.
    Returns: (V [S], Q [S, V]): the expected sum of the rewards still to come, from a state, and
        from a state after a token. Differentiable.
    Raises: ValueError on a wrong shape, NaN logits, or a reward that is not finite.
    """
    probs = _log_table(logits, language).exp()
    token_rewards = torch.zeros_like(probs) if token_rewards is None else token_rewards
    _check_shape(rewards, "rewards", (len(language.tokens),))
    _check_shape(token_rewards, "token_rewards", tuple(probs.shape))
    finite(rewards, "rewards")
    finite(token_rewards, "token_rewards")
    branches = language.vocabulary - 1
    sizes = [branches**depth for depth in range(language.length)]
    ended, later = rewards[: language.num_states].split(sizes), rewards[language.num_states :]
    levels = []
    for p, end, paid in zip(
        reversed(probs.split(sizes)),
        reversed(ended),
        reversed(token_rewards.split(sizes)),
        strict=True,
    ):
        q = paid + torch.cat([end.unsqueeze(1), later.reshape(-1, branches)], dim=1)
        later = (p * q).sum(1)
        levels.append((later, q))
    v, q = map(torch.cat, zip(*reversed(levels), strict=True))
    return v, q


def _check_language(language: Language) -> None:
    has(language, "language", "what language() returns", *Language._fields, "num_states")


def _log_table(logits: Tensor, language: Language) -> Tensor:
    _check_language(language)
    floats(logits=logits)
    _check_shape(logits, "logits", (language.num_states, language.vocabulary))
    table = logits.log_softmax(-1)
    if table.isnan().any():
        row = table.isnan().any(1).nonzero()[0].item()
        raise ValueError(
            f"logits: state {row} has no distribution; give it numbers that are not NaN or +inf, "
            "and one at least above −inf"
        )
    return table


# --- the optimum ---------------------------------------------------------------------------------


def optimal_policy(ref_log_probs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The policy that maximises E[r] − β·KL(π‖π_ref): π*(y) = π_ref(y)·exp(r(y)/β)/Z.

    Equation: eq:optimal-policy

    Args:
        ref_log_probs: [Y], log π_ref, a distribution.
        rewards: [Y].
        beta: β, the price of a nat, > 0.
    Returns: [Y], log π*; −inf where π_ref has no mass. Differentiable.
    Raises: ValueError on unequal shapes, a reward that is not finite, a reference that is no
        distribution, beta ≤ 0.
    Source: Rafailov et al. 2023, "Direct Preference Optimization", equation 4.
    """
    _check_objective(rewards, beta, ref_log_probs=ref_log_probs)
    return (ref_log_probs + rewards / beta).log_softmax(-1)


def log_partition(ref_log_probs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z = log Σ_y π_ref(y)·exp(r(y)/β); β·log Z is the largest regularised objective.

    Equation: eq:log-partition

    Args:
        ref_log_probs: [Y], log π_ref, a distribution.
        rewards: [Y].
        beta: β, > 0.
    Returns: a scalar. Differentiable.
    Raises: ValueError as `optimal_policy`.
    Source: Rafailov et al. 2023, "Direct Preference Optimization", appendix A.1.
    """
    _check_objective(rewards, beta, ref_log_probs=ref_log_probs)
    return (ref_log_probs + rewards / beta).logsumexp(-1)


def regularised_objective(
    log_probs: Tensor, ref_log_probs: Tensor, rewards: Tensor, beta: float
) -> Tensor:
    """J(π) = Σ_y π(y)·r(y) − β·KL(π‖π_ref), exact.

    Equation: eq:regularised-objective

    Args:
        log_probs: [Y], log π, a distribution; [..., Y] for many policies at once.
        ref_log_probs: [Y], log π_ref, a distribution.
        rewards: [Y].
        beta: β, > 0.
    Returns: a scalar, or [...]; −inf where π gives mass to what π_ref cannot produce.
        Differentiable. The gradient is that of the sum as it stands, with every π(y) free: keep π a
        distribution, e.g. by log_softmax.
    Raises: ValueError on unequal shapes, a reward that is not finite, a policy or reference that is
        no distribution, beta ≤ 0.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2;
        Rafailov et al. 2023, "Direct Preference Optimization", equation 3.
    """
    _check_objective(rewards, beta, log_probs=log_probs, ref_log_probs=ref_log_probs)
    expected = (log_probs.exp() * rewards).sum(-1)
    return expected - beta * kl(log_probs, ref_log_probs)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ_y p(y)·(log p(y) − log q(y)) of distributions over the sequences.

    Unlike `rlhf_helpers.kl.exact_kl` it takes no logits: nothing is normalised on the way, and the
    gradient is that of the sum as it stands.

    Args:
        log_p, log_q: [Y], or [..., Y] that can be broadcast; distributions.
    Returns: a scalar, or [...], nats; +inf where p gives mass to what q cannot produce.
    Raises: ValueError on unequal numbers of sequences, or what is no distribution.
    """
    _check_distributions(log_p=log_p, log_q=log_q)
    p = log_p.exp()
    # 0 · (−inf) is NaN where the limit is 0
    impossible = p == 0
    log_p, log_q = torch.broadcast_tensors(log_p, log_q)
    log_ratio = log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0)
    return (p * log_ratio).sum(-1)


def best_of_n(log_probs: Tensor, scores: Tensor, n: int) -> Tensor:
    """The distribution of the best of n independent samples, exact: the one with the highest score,
    and any of those drawn, with equal chances, if several have it.

    Equation: eq:best-of-n

    The best has score s if all n score at most s, but not all less: F(s)^n − F(s−)^n, where F(s)
    is the probability of a score ≤ s and F(s−) of one < s. Among sequences of one score the shares
    stay those of π.

    Args:
        log_probs: [Y], log π, a distribution.
        scores: [Y]; only their order counts.
        n: ≥ 1.
    Returns: [Y], log-probabilities. Computed in float64, and without a gradient.
    Raises: ValueError on unequal shapes, a score that is not finite, no distribution, n < 1.
    Source: Beirami et al. 2024, "Theoretical Guarantees on the Best-of-n Alignment Policy", section
        2 (there without ties).
    """
    check_tensor(scores, "scores")
    same_shape(log_probs=log_probs, scores=scores)
    _check_distributions(log_probs=log_probs)
    _check_shape(log_probs, "log_probs", log_probs.shape[-1:])
    finite(scores, "scores")
    in_range(n, "n", 1)
    log_p = log_probs.detach().double().log_softmax(-1)
    levels, level = scores.detach().unique(return_inverse=True)
    mass = log_p.new_zeros(len(levels)).index_add(0, level, log_p.exp())
    # the smallest number keeps 0/0 away from levels that cannot occur
    at_most = mass.cumsum(0).clamp(min=torch.finfo(mass.dtype).tiny)
    share = (mass / at_most).clamp(max=1.0)
    # near 1 the small rest is more exact than F, whose rounding would count n times
    above = torch.cat([mass[1:].flip(0).cumsum(0).flip(0), mass.new_zeros(1)])
    log_at_most = torch.where(above < 0.5, torch.log1p(-above), at_most.log())
    # F^n − (F − m)^n = m · F^(n − 1) · (1 − (1 − x)^n)/x with x = m/F; the last factor tends to n
    tried = -torch.expm1(n * torch.log1p(-share)) / share
    gain = (n - 1) * log_at_most + torch.where(share > 0, tried, float(n)).log()
    return (log_p + gain[level]).to(log_probs.dtype)


def _check_objective(rewards: Tensor, beta: float, **log_probs: Tensor) -> None:
    in_range(beta, "beta", 0.0, open_low=True)
    _check_distributions(**log_probs)
    check_tensor(rewards, "rewards")
    same_shape(ref_log_probs=log_probs["ref_log_probs"], rewards=rewards)
    finite(rewards, "rewards")


def _check_distributions(**log_probs: Tensor) -> None:
    """Raise ValueError unless all are log-probabilities of the same number of sequences."""
    floats(**log_probs)
    sizes = {name: tuple(each.shape[-1:]) for name, each in log_probs.items()}
    if len(set(sizes.values())) > 1 or () in sizes.values() or (0,) in sizes.values():
        shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in log_probs.items())
        raise ValueError(f"{shapes}: the last dimension must be the sequences, equally many")
    for name, each in log_probs.items():
        total = each.detach().logsumexp(-1)
        # so that NaN is refused too
        wrong = ~(total.abs() <= _TOLERANCE)
        if wrong.any():
            found = total[wrong][0].exp().item()
            raise ValueError(
                f"{name} holds probabilities that sum to {found:.6g}, not 1; pass "
                "log-probabilities of all sequences, e.g. by log_softmax"
            )


def _check_shape(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    floats(**{name: tensor})
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass {tuple(shape)}")


# --- preferences ---------------------------------------------------------------------------------


def utilities(language: Language, seed: int = 0, structure: float = 0.0) -> Tensor:
    """A true utility for every sequence: standard normal numbers, independent by default.

    A table has a number for each of them; a small GPT-2 must learn them one by one. `structure`
    replaces some of the chance by a sum over pairs of neighbouring tokens, the prompt and the end
    included, which a GPT-2 picks up in a few updates.

    With independent utilities as rewards and a π_ref that spreads over hundreds of sequences,
    KL(π_ref‖π*) is about 1/(2β²) nats: β = 0.5 gives more than 1.

    Args:
        language: as `language` returns it.
        seed: the same seed gives the same utilities.
        structure: share of the variance that is a sum over pairs of neighbours, in [0, 1].
    Returns: [Y], float64; over the sequences, the variance is about 1.
    Raises: ValueError if structure is out of range.
    """
    _check_language(language)
    in_range(structure, "structure", 0.0, 1.0)
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    independent = torch.randn(len(language.tokens), **draw)
    pairs = torch.randn(language.vocabulary, language.vocabulary, **draw)
    before = pad(language.tokens[:, :-1], (1, 0))
    habits = (pairs[before, language.tokens] * language.mask).sum(1)
    habits = (habits - habits.mean()) / habits.std()
    return math.sqrt(structure) * habits + math.sqrt(1 - structure) * independent


def draw_pairs(log_probs: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of different sequences: two independent samples, drawn again if they are the same.

    Args:
        log_probs: [Y], the distribution that is sampled.
        n: how many pairs, ≥ 1.
        generator: of the samples.
    Returns: (first, second), [n] each, numbers of sequences.
    Raises: ValueError if log_probs is no distribution, or two samples of it are the same more than
        99 times in 100; n < 1.
    """
    _check_distributions(log_probs=log_probs)
    _check_shape(log_probs, "log_probs", log_probs.shape[-1:])
    in_range(n, "n", 1)
    check_generator(generator, log_probs.device)
    probs = log_probs.detach().double().exp()
    same = probs.square().sum().item()
    if same > 0.99:
        raise ValueError(
            f"log_probs gives two equal samples with probability {same:.4f}; "
            "pass a distribution that is less certain"
        )
    pairs = torch.zeros(2, n, dtype=torch.long)
    while (again := pairs[0] == pairs[1]).any():
        count = 2 * int(again.sum())
        drawn = torch.multinomial(probs, count, replacement=True, generator=generator)
        pairs[:, again] = drawn.view(2, -1)
    return pairs[0], pairs[1]


def label_pairs(
    utilities: Tensor, first: Tensor, second: Tensor, generator: torch.Generator
) -> Tensor:
    """Labels of a Bradley-Terry annotator: the first is preferred with probability σ(u_1 − u_2).

    Args:
        utilities: [Y], true utilities.
        first, second: [N], numbers of sequences.
        generator: of the labels.
    Returns: [N], True where the first is preferred.
    Raises: ValueError on unequal shapes, a number that is no sequence's, a utility that is not
        finite.
    """
    integers(first=first, second=second)
    same_shape(first=first, second=second)
    floats(utilities=utilities)
    if utilities.dim() != 1:
        raise ValueError(f"utilities has shape {tuple(utilities.shape)}; pass [sequences]")
    check_generator(generator, utilities.device)
    finite(utilities, "utilities")
    for name, numbers in (("first", first), ("second", second)):
        if numbers.numel() and not 0 <= numbers.min() <= numbers.max() < len(utilities):
            raise ValueError(
                f"{name} holds a number outside [0, {len(utilities)}), the sequences of utilities"
            )
    preferred = torch.sigmoid(utilities[first] - utilities[second])
    uniform = torch.rand(preferred.shape, generator=generator, dtype=preferred.dtype)
    return uniform < preferred


# --- text ----------------------------------------------------------------------------------------


def tokenizer(language: Language) -> PreTrainedTokenizerFast:
    """Letters for tokens, so that code that works on texts works on the language: token 1 is "a",
    token 2 is "b", with spaces between them. Token 0, "<end>", is written nowhere.

    The prompt of the language is the empty text: `models.encode_prompts` makes token 0 of it.

    Args:
        language: as `language` returns it.
    Returns: a tokenizer; end, start and padding are token 0. A text of anything else is refused.
    Raises: ValueError if the alphabet has fewer letters than the language.
    """
    words = ["<end>", *_letters(language)]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=model, padding_side="left", **roles)


def reward(language: Language, utilities: Tensor) -> Callable[..., list[float]]:
    """The utilities as a reward function on texts.

    A text of L letters is the sequence that was cut off, a shorter one has ended.

    Args:
        language: as `language` returns it.
        utilities: [Y], one a sequence.
    Returns: a reward function; it raises ValueError on a completion that is no sequence, naming it.
    Raises: ValueError on a wrong shape, a utility that is not finite, or too few letters.
    """
    _check_language(language)
    _check_shape(utilities, "utilities", (len(language.tokens),))
    finite(utilities, "utilities")
    words = ["", *_letters(language)]
    texts = (" ".join(words[token] for token in row if token) for row in language.tokens.tolist())
    known = dict(zip(texts, utilities.tolist(), strict=True))

    def utility(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        for i, text in enumerate(completions):
            if text not in known:
                raise ValueError(
                    f"completions[{i}], {text!r}, is no sequence of the language; sample with its "
                    f"tokenizer and max_new_tokens={language.length}"
                )
        return [known[text] for text in completions]

    return utility


def _letters(language: Language) -> str:
    _check_language(language)
    most = len(string.ascii_lowercase)
    if language.vocabulary - 1 > most:
        raise ValueError(
            f"vocabulary={language.vocabulary} has more tokens than there are letters; "
            f"lower it to {most + 1} at most"
        )
    return string.ascii_lowercase[: language.vocabulary - 1]
