"""Checks of the exercises of sft_lora."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_sequence_log_prob(answer: Function) -> None:
    """Exercise 1: answer(logits [T, V], tokens [T]) -> log-probability of tokens 2 to T given the
    first."""

    def picked(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    judge(
        answer,
        lambda z, y: picked(z[:-1], y[1:]).sum(),
        [
            (
                vector([[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 3.0, 1.0], [1.0, -1.0, 0.5, 0.2]]),
                torch.tensor([3, 1, 2]),
            ),
            (
                vector([[0.3, -0.2], [1.0, 2.0], [-1.0, 1.0], [0.0, 0.7]]),
                torch.tensor([1, 0, 0, 1]),
            ),
        ],
        {
            "row t of the logits predicts token t + 1; here each row is asked about its own "
            "token.": lambda z, y: picked(z, y).sum(),
            "row t of the logits predicts token t + 1; here it is asked about token t − 1.": (
                lambda z, y: picked(z[1:], y[:-1]).sum()
            ),
            "the last row is asked about the first token; it predicts a token that is not "
            "there.": lambda z, y: picked(z, y.roll(-1)).sum(),
            "this is the mean over tokens; the log-probability of a sequence is the sum.": (
                lambda z, y: picked(z[:-1], y[1:]).mean()
            ),
            "this is the probability; return its logarithm.": lambda z, y: (
                picked(z[:-1], y[1:]).sum().exp()
            ),
            "the sign is turned round: a log-probability is never positive.": lambda z, y: (
                -picked(z[:-1], y[1:]).sum()
            ),
            "a logit is not a log-probability: take log_softmax of each row first.": lambda z, y: (
                z[:-1].gather(-1, y[1:].unsqueeze(-1)).sum()
            ),
        },
    )


def check_nucleus(answer: Function) -> None:
    """Exercise 2: answer(probs [V], top_p) -> the probabilities that top-p sampling draws from,
    [V]."""

    def kept(probs: Tensor, keep: Tensor) -> Tensor:
        return probs.masked_fill(~keep, 0.0)

    def before(probs: Tensor) -> Tensor:
        """For each token, the probability of all likelier ones."""
        order = probs.argsort(descending=True)
        return torch.empty_like(probs).index_put((order,), probs[order].cumsum(0) - probs[order])

    def right(probs: Tensor, top_p: float) -> Tensor:
        some = kept(probs, before(probs) < top_p)
        return some / some.sum()

    def too_few(probs: Tensor, top_p: float) -> Tensor:
        some = kept(probs, before(probs) + probs <= top_p)
        return some / some.sum()

    def threshold(probs: Tensor, top_p: float) -> Tensor:
        some = kept(probs, probs >= top_p)
        return some / some.sum()

    def in_order(probs: Tensor, top_p: float) -> Tensor:
        some = kept(probs, probs.cumsum(0) - probs < top_p)
        return some / some.sum()

    judge(
        answer,
        right,
        [
            (vector([0.1, 0.4, 0.05, 0.25, 0.2]), 0.7),
            (vector([0.05, 0.15, 0.5, 0.3]), 0.6),
            (vector([0.6, 0.1, 0.3]), 0.5),
        ],
        {
            "what is left does not sum to 1; divide it by its sum.": lambda p, top_p: kept(
                p, before(p) < top_p
            ),
            "the token that crosses top_p belongs in the set; without it the set holds less than "
            "top_p.": (too_few),
            "each token is compared with top_p by itself; it is the running total that counts.": (
                threshold
            ),
            "the running total goes through the vocabulary in its own order; sort by probability "
            "first.": (in_order),
            "the result is still sorted; put every probability back in its own place.": (
                lambda p, top_p: right(p, top_p).sort(descending=True).values
            ),
        },
    )


def check_loss_mask(answer: Function) -> None:
    """Exercise 3: answer(tokens [N, T], prompt_lengths [N], lengths [N], pad) -> which tokens are
    trained, [N, T]."""

    def columns(tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1])

    def right(tokens: Tensor, prompts: Tensor, lengths: Tensor, pad: int) -> Tensor:
        place = columns(tokens)
        return (place >= prompts[:, None]) & (place < lengths[:, None])

    def by_id(tokens: Tensor, prompts: Tensor, lengths: Tensor, pad: int) -> Tensor:
        return (columns(tokens) >= prompts[:, None]) & (tokens != pad)

    def without_end(tokens: Tensor, prompts: Tensor, lengths: Tensor, pad: int) -> Tensor:
        return right(tokens, prompts, lengths - 1, pad)

    judge(
        answer,
        right,
        [
            (
                torch.tensor([[5, 6, 7, 0, 0], [5, 8, 9, 4, 0], [3, 6, 0, 0, 0]]),
                torch.tensor([2, 1, 1]),
                torch.tensor([4, 5, 3]),
                0,
            ),
            # the pad token also stands inside a response
            (torch.tensor([[2, 0, 3, 0, 0, 0]]), torch.tensor([1]), torch.tensor([4]), 0),
        ],
        {
            "the last real token is missing: a row of length n has its end in column n − 1.": (
                without_end
            ),
            "one column too many: a row of length n has its end in column n − 1.": (
                lambda t, p, n, pad: right(t, p, n + 1, pad)
            ),
            "the prompt is trained, too; begin at its length.": lambda t, p, n, pad: right(
                t, 0 * p, n, pad
            ),
            "one token of the prompt is trained; the response begins in column prompt_lengths.": (
                lambda t, p, n, pad: right(t, p - 1, n, pad)
            ),
            "the padding is trained as well; stop at the length.": lambda t, p, n, pad: (
                columns(t) >= p[:, None]
            ),
        },
        untouched=by_id,
    )


def check_lora_size(answer: float | None) -> None:
    """Exercise 4: trained parameters of LoRA at rank 8 on the 12 attention inputs (768 to 2304)
    of GPT-2."""
    judge_number(
        answer,
        294_912,
        {
            "that is one layer; there are twelve.": 24_576,
            "that is the full matrices, which stay frozen.": 21_233_664,
            "that is the first factor alone; the second has 8 rows of 2304.": 73_728,
            "that is the second factor alone; the first has 768 rows of 8.": 221_184,
            "the sizes of the two factors add; they do not multiply.": 8 * 768 * 2304 * 12,
        },
        tolerance=1e-6,
    )


def check_perplexity(answer: Function) -> None:
    """Exercise 5: answer(nats [N], tokens [N]) -> perplexity of a set of sequences."""
    judge(
        answer,
        lambda nats, tokens: (nats.sum() / tokens.sum()).exp(),
        [
            (vector([2.0, 30.0]), torch.tensor([4, 12])),
            (vector([1.0, 8.0, 3.0]), torch.tensor([2, 10, 1])),
        ],
        {
            "this is the cross-entropy; the perplexity is its exponential.": lambda nats, tokens: (
                nats.sum() / tokens.sum()
            ),
            "this is the mean of the sequences' perplexities; one bad short sequence would rule "
            "it.": lambda nats, tokens: (nats / tokens).exp().mean(),
            "each sequence counts the same here; a token should: sum first, then divide.": (
                lambda nats, tokens: (nats / tokens).mean().exp()
            ),
            "divide by the number of tokens, not of sequences.": lambda nats, tokens: (
                nats.mean().exp()
            ),
            "the surprise is in nats, so the base is e, not 2.": lambda nats, tokens: (
                2 ** (nats.sum() / tokens.sum())
            ),
        },
    )
