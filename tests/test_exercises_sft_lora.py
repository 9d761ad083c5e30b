"""The checks of sft_lora: stub, right answer, and each typical mistake."""

import math
import random

import pytest
import torch
from torch import nn

from rlhf_helpers import models, settings, worlds
from rlhf_helpers.book.checks import sft_lora as checks
from rlhf_helpers.rollout import sample


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


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


def draw(next_logits, ids, end, most):
    """With the standard library's random numbers, seeded by the check through torch."""
    rng = random.Random(torch.rand(()).item())
    new = []
    while len(new) < most and (not new or new[-1] != end):
        weights = [math.exp(z) for z in next_logits(ids + new).tolist()]
        new += rng.choices(range(len(weights)), weights)
    return new


def greedy(next_logits, ids, end, most):
    new = []
    while len(new) < most and end not in new:
        new.append(next_logits(ids + new).argmax().item())
    return new


def of_the_prompt(next_logits, ids, end, most):
    return [torch.multinomial(next_logits(ids).softmax(-1), 1).item() for _ in range(most)]


def without_a_stop(next_logits, ids, end, most):
    return draw(next_logits, ids, 99, most)


def without_a_limit(next_logits, ids, end, most):
    return draw(next_logits, ids, end, 10**6)


def equally(next_logits, ids, end, most):
    return draw(lambda tokens: 0 * next_logits(tokens), ids, end, most)


def sharper(next_logits, ids, end, most):
    return draw(lambda tokens: 2 * next_logits(tokens), ids, end, most)


def without_the_end(next_logits, ids, end, most):
    return [token for token in draw(next_logits, ids, end, most) if token != end]


class Corrected(nn.Module):
    """A low-rank correction as two linear layers without bias, in PEFT's way."""

    def __init__(self, linear, rank, alpha, frozen=True, a=True, b=False, scale=None, double=False):
        super().__init__()
        self.linear = linear.requires_grad_(not frozen)
        self.down = nn.Linear(linear.in_features, 2 * rank if double else rank, bias=False)
        self.up = nn.Linear(2 * rank if double else rank, linear.out_features, bias=False)
        self.scale = alpha / rank if scale is None else scale
        if not a:
            nn.init.zeros_(self.down.weight)
        if not b:
            nn.init.zeros_(self.up.weight)

    def forward(self, h):
        return self.linear(h) + self.scale * self.up(self.down(h))


class Bent(Corrected):
    def forward(self, h):
        return self.linear(h) + self.scale * self.up(self.down(h).tanh())


def having(**how):
    return lambda linear, rank, alpha: Corrected(linear, rank, alpha, **how)


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_share_of_probability, None),
        (checks.check_loss_mask, lambda *x: None),
        (checks.check_loss_mask, mask_by_id),
        (checks.check_nucleus, lambda probs, top_p: None),
        (checks.check_two_temperatures, None),
        (checks.check_sampler, lambda *x: None),
        (checks.check_lora, lambda *x: None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_share_of_probability, math.exp(-2)),
        (checks.check_share_of_probability, 0.14),
        (checks.check_loss_mask, mask),
        (checks.check_nucleus, nucleus),
        (checks.check_sampler, draw),
        (checks.check_sampler, lambda *x: torch.tensor(draw(*x))),
        (checks.check_lora, Corrected),
        # which factor begins at zero is free
        (checks.check_lora, having(a=False, b=True)),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


def test_the_band_of_two_temperatures_is_what_the_model_does(capsys):
    """Oracle: the log-probabilities of each token at both temperatures, from the whole model's
    logits."""
    run = settings.load()
    model, tokenizer = models.load(run.model)
    world = worlds.load(run.world)
    for seed in range(3):
        tokens, mask = models.encode_prompts(tokenizer, world.openings("held_out", 16))
        luck = torch.Generator().manual_seed(seed)
        end = tokenizer.eos_token_id
        rollout = sample(
            model,
            tokens,
            mask,
            run.max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
            temperature=0.5,
            samples_per_prompt=4,
            generator=luck,
        )
        where = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(
                rollout.tokens, attention_mask=rollout.attention_mask, position_ids=where
            ).logits[:, rollout.prompt_length - 1 : -1]
        drawn = rollout.tokens[:, rollout.prompt_length :, None]
        hot, cold = (
            (logits / t).log_softmax(-1).gather(-1, drawn)[..., 0][rollout.completion_mask]
            for t in (1.0, 0.5)
        )
        assert said(capsys, checks.check_two_temperatures, (hot - cold).mean().item()) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_share_of_probability, 0.92, "for one token"),
        (checks.check_share_of_probability, 2, "the number of nats"),
        (checks.check_share_of_probability, 7.39, "sign is turned round"),
        (checks.check_share_of_probability, 0.86, "what is missing"),
        (checks.check_share_of_probability, 0.997, "divide nowhere"),
        (checks.check_loss_mask, lambda *x: mask(*x, last=-1), "the last real token is missing"),
        (checks.check_loss_mask, lambda *x: mask(*x, last=1), "one column too many"),
        (checks.check_loss_mask, lambda *x: mask(*x, first=-99), "the prompt is trained"),
        (checks.check_loss_mask, lambda *x: mask(*x, first=-1), "one token of the prompt"),
        (checks.check_loss_mask, lambda *x: mask(*x, last=99), "the padding is trained"),
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
        (checks.check_two_temperatures, 0.0, "one temperature on both sides"),
        (checks.check_two_temperatures, 0.08, "scored minus sampled"),
        (checks.check_two_temperatures, -1.7, "sum over tokens"),
        (checks.check_two_temperatures, -0.03, "rollout.completion_mask"),
        (checks.check_two_temperatures, math.nan, "is not a number"),
        (checks.check_sampler, lambda n, ids, *x: ids + draw(n, ids, *x), "new tokens alone"),
        (checks.check_sampler, lambda *x: [], "no token was drawn"),
        (checks.check_sampler, of_the_prompt, "always asked about the prompt"),
        (checks.check_sampler, without_a_stop, "behind its end"),
        (checks.check_sampler, without_a_limit, "more than 6"),
        (checks.check_sampler, without_the_end, "the end itself is missing"),
        (checks.check_sampler, greedy, "that is greedy"),
        (checks.check_sampler, equally, "equally likely"),
        (checks.check_sampler, sharper, "other probabilities"),
        (checks.check_sampler, lambda *x: 1 / 0, "ZeroDivisionError"),
        (checks.check_lora, having(b=True), "does not start as the layer"),
        (checks.check_lora, having(frozen=False), "the given layer is still trained"),
        (checks.check_lora, having(a=False), "both begin at zero"),
        (checks.check_lora, having(double=True), "it should be 5 × 2 and 2 × 4"),
        (checks.check_lora, lambda linear, *x: linear.requires_grad_(False), "trained are none"),
        (checks.check_lora, having(scale=6), "6 times the product"),
        (checks.check_lora, Bent, "not a multiple of the product"),
        (checks.check_lora, lambda *x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
