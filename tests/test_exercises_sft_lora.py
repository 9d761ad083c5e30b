"""The checks of sft_lora: stub, right answer, and each typical mistake."""

import math

import pytest
import torch

from rlhf_helpers.book.checks import sft_lora as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def log_prob(logits, tokens):
    """One token after the other, in plain Python."""
    total = 0.0
    for row, token in zip(logits[:-1].tolist(), tokens[1:].tolist(), strict=True):
        total += row[token] - math.log(sum(math.exp(z) for z in row))
    return total


def nucleus(probs, top_p):
    """Take the likeliest token again and again, until there is enough."""
    left, kept, total = dict(enumerate(probs.tolist())), {}, 0.0
    while total < top_p:
        best = max(left, key=left.get)
        kept[best] = left.pop(best)
        total += kept[best]
    return torch.tensor([kept.get(i, 0.0) / total for i in range(len(probs))])


def nucleus_without_the_last(probs, top_p):
    kept = nucleus(probs, top_p) > 0
    smallest = probs.masked_fill(~kept, 2.0).argmin()
    kept[smallest] = kept.sum() == 1
    if probs[kept].sum() > top_p:
        kept[:] = False
    return probs * kept / (probs * kept).sum()


def nucleus_unsorted(probs, top_p):
    ahead = torch.tensor([sum(probs.tolist()[:i]) for i in range(len(probs))])
    kept = ahead < top_p
    return probs * kept / (probs * kept).sum()


def mask(tokens, prompts, lengths, pad, first=0, last=0):
    rows = [
        [p + first <= column < n + last for column in range(tokens.shape[1])]
        for p, n in zip(prompts.tolist(), lengths.tolist(), strict=True)
    ]
    return torch.tensor(rows)


def mask_by_id(tokens, prompts, lengths, pad):
    return mask(tokens, prompts, lengths + 99, pad) & (tokens != pad)


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_sequence_log_prob, lambda logits, tokens: None),
        (checks.check_nucleus, lambda probs, top_p: None),
        (checks.check_loss_mask, lambda *x: None),
        (checks.check_loss_mask, mask_by_id),
        (checks.check_lora_size, None),
        (checks.check_perplexity, lambda nats, tokens: None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_sequence_log_prob, log_prob),
        (checks.check_nucleus, nucleus),
        (checks.check_loss_mask, mask),
        (checks.check_lora_size, 12 * 8 * (768 + 2304)),
        (checks.check_perplexity, lambda n, t: math.exp(sum(n.tolist()) / sum(t.tolist()))),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (
            checks.check_sequence_log_prob,
            lambda z, y: z.log_softmax(-1)[torch.arange(len(y)), y].sum(),
            "asked about its own token",
        ),
        (
            checks.check_sequence_log_prob,
            lambda z, y: z[1:].log_softmax(-1)[torch.arange(len(y) - 1), y[:-1]].sum(),
            "asked about token t − 1",
        ),
        (
            checks.check_sequence_log_prob,
            lambda z, y: z.log_softmax(-1)[torch.arange(len(y)), y.roll(-1)].sum(),
            "about the first token",
        ),
        (
            checks.check_sequence_log_prob,
            lambda z, y: log_prob(z, y) / (len(y) - 1),
            "the mean over tokens",
        ),
        (checks.check_sequence_log_prob, lambda z, y: math.exp(log_prob(z, y)), "its logarithm"),
        (checks.check_sequence_log_prob, lambda z, y: -log_prob(z, y), "sign is turned round"),
        (
            checks.check_sequence_log_prob,
            lambda z, y: z[torch.arange(len(y) - 1), y[1:]].sum(),
            "a logit is not a log-probability",
        ),
        (
            checks.check_nucleus,
            lambda p, top_p: p * (nucleus(p, top_p) > 0),
            "does not sum to 1",
        ),
        (checks.check_nucleus, nucleus_without_the_last, "crosses top_p belongs"),
        (
            checks.check_nucleus,
            lambda p, top_p: p * (p >= top_p) / (p * (p >= top_p)).sum(),
            "compared with top_p by itself",
        ),
        (checks.check_nucleus, nucleus_unsorted, "sort by probability first"),
        (
            checks.check_nucleus,
            lambda p, top_p: torch.tensor(sorted(nucleus(p, top_p).tolist(), reverse=True)),
            "still sorted",
        ),
        (checks.check_loss_mask, lambda *x: mask(*x, last=-1), "the last real token is missing"),
        (checks.check_loss_mask, lambda *x: mask(*x, last=1), "one column too many"),
        (checks.check_loss_mask, lambda *x: mask(*x, first=-99), "the prompt is trained"),
        (checks.check_loss_mask, lambda *x: mask(*x, first=-1), "one token of the prompt"),
        (checks.check_loss_mask, lambda *x: mask(*x, last=99), "the padding is trained"),
        (checks.check_lora_size, 8 * (768 + 2304), "there are twelve"),
        (checks.check_lora_size, 12 * 768 * 2304, "stay frozen"),
        (checks.check_lora_size, 12 * 8 * 768, "the first factor alone"),
        (checks.check_lora_size, 12 * 8 * 2304, "the second factor alone"),
        (checks.check_lora_size, 12 * 8 * 768 * 2304, "they do not multiply"),
        (checks.check_perplexity, lambda n, t: n.sum() / t.sum(), "this is the cross-entropy"),
        (checks.check_perplexity, lambda n, t: (n / t).exp().mean(), "mean of the sequences'"),
        (checks.check_perplexity, lambda n, t: (n / t).mean().exp(), "a token should"),
        (checks.check_perplexity, lambda n, t: n.mean().exp(), "not of sequences"),
        (checks.check_perplexity, lambda n, t: 2 ** (n.sum() / t.sum()), "not 2"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
