"""Checks of the exercises of sft_lora."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_share_of_probability(answer: float | None) -> None:
    """Exercise 1: 0.08 nats per token above the floor, 25 tokens; the share of the probability that
    a right response should have, in the geometric mean."""
    judge_number(
        answer,
        0.1353,
        {
            "that is the share for one token; a response has 25.": 0.9231,
            "that is the number of nats; the share is e to minus it.": 2.0,
            "the sign is turned round: the model gives less than it should, not more.": 7.389,
            "that is what is missing; the share is what is left.": 0.8647,
            "the nats of the tokens add; divide nowhere by 25.": 0.9968,
        },
    )


def check_loss_mask(answer: Function) -> None:
    """Exercise 2: answer(tokens [N, T], prompt_lengths [N], lengths [N], pad) -> which tokens are
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


def check_nucleus(answer: Function) -> None:
    """Exercise 3: answer(probs [V], top_p) -> the probabilities that top-p sampling draws from,
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


def check_two_temperatures(answer: float | None) -> None:
    """Exercise 4: mean of scored minus sampled log-probability, per token, when sampling at
    temperature 0.5 and scoring at 1.."""
    if answer is None:
        print("Not attempted: replace None with the number that you measured.")
    elif not isinstance(answer, (int, float)) or answer != answer:
        print(f"Not yet: {answer!r} is not a number; write one such as 0.5.")
    elif _MEASURED[0] <= answer <= _MEASURED[1]:
        print("Right.")
    elif abs(answer) < 1e-3:
        print("Not yet: that is one temperature on both sides; sample at 0.5, score at 1.")
    elif _MEASURED[0] <= -answer <= _MEASURED[1]:
        print("Not yet: the sign is turned round; take scored minus sampled.")
    elif answer < 3 * _MEASURED[0]:
        print(
            "Not yet: that is a sum over tokens, or padding was counted; take the mean per token."
        )
    else:
        print("Not yet: average over the tokens that rollout.completion_mask counts, no others.")


# the smallest and the largest of twenty seeds, and some room
_MEASURED = (-0.115, -0.05)

_NOT_ATTEMPTED = (
    "Not attempted: your function returns nothing yet. Write it, then run this cell again."
)
# the toy language of exercise 5: what follows each of its four tokens; 3 is the end
_FOLLOWS = [
    [0.1, 0.6, 0.2, 0.1],
    [0.3, 0.1, 0.2, 0.4],
    [0.5, 0.1, 0.1, 0.3],
    [0.7, 0.1, 0.1, 0.1],
]
_END, _MOST, _DRAWS = 3, 6, 3000


def check_sampler(answer: Function) -> None:
    """Exercise 5: answer(next_logits, ids, end, most) -> list of new tokens, the end included."""
    asked = []

    def next_logits(ids: list[int]) -> Tensor:
        asked.append(list(ids))
        return vector(_FOLLOWS[int(ids[-1])]).log() + 1.0

    written = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(_DRAWS):
            try:
                found = answer(next_logits, [0, 2], _END, _MOST)
                if found is None:
                    print(_NOT_ATTEMPTED)
                    return
                written.append([int(token) for token in found])
            except Exception as error:
                print(f"Not yet: your function raised {type(error).__name__}: {error}")
                return
            if len(written) == 50 and _fault_of(written, asked):
                break
    fault = _fault_of(written, asked) or _fault_of_chances(written)
    print(f"Not yet: {fault}" if fault else "Right.")


def _fault_of(written: list[list[int]], asked: list[list[int]]) -> str:
    """What is wrong with the form of the texts; "" if nothing is."""
    if all(text[:2] == [0, 2] for text in written):
        return "return the new tokens alone, without those of the prompt."
    if not any(written):
        return "no token was drawn."
    if max(map(len, asked)) == 2:
        return "the model is always asked about the prompt; append each token before you ask again."
    if any(_END in text[:-1] for text in written):
        return "a text goes on behind its end; stop when the end is drawn."
    if max(map(len, written)) > _MOST:
        return f"a text has more than {_MOST} tokens; stop there."
    if not any(_END in text for text in written):
        return "the end itself is missing; it is a token of the response."
    if all(text == written[0] for text in written):
        return "every text is the same: that is greedy. Draw from the softmax."
    return ""


def _fault_of_chances(written: list[list[int]]) -> str:
    """What is wrong with how often which token follows which; "" if nothing is."""
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for text in written:
        for before, token in zip([2, *text], text, strict=False):
            counts[before, token] += 1
    shares = counts[:_END] / counts[:_END].sum(1, keepdim=True)
    right = vector(_FOLLOWS)[:_END]
    if (shares - right).abs().max() < 0.04:
        return ""
    if (shares - 0.25).abs().max() < 0.04:
        return "all tokens are equally likely; use the logits."
    return "tokens are drawn with other probabilities than the softmax of the logits gives."


def check_lora(answer: Callable[..., nn.Module | None]) -> None:
    """Exercise 6: answer(linear, rank, alpha) -> a module: the frozen linear layer plus a low-rank
    correction that is zero at the start."""
    linear = nn.Linear(5, 4).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in linear.parameters():
            nn.init.normal_(parameter)
        h = torch.randn(7, 5, dtype=torch.float64)
        plain = linear(h).detach()
        try:
            layer = answer(linear, 2, 6)
            fault = _NOT_ATTEMPTED if layer is None else _fault_of_lora(layer, linear, h, plain)
        except Exception as error:
            fault = f"your layer raised {type(error).__name__}: {error}"
    attempted = "" if fault == _NOT_ATTEMPTED else "Not yet: "
    print(f"{attempted}{fault}" if fault else "Right.")


def _fault_of_lora(layer: nn.Module, linear: nn.Linear, h: Tensor, plain: Tensor) -> str:
    """What is wrong with a LoRA layer of rank 2 and alpha 6; "" if nothing is."""
    layer = layer.double()
    if not torch.allclose(layer(h), plain):
        return "it does not start as the layer it was given; let B begin at zero."
    moving = [p for p in layer.parameters() if p.requires_grad]
    if any(p is one for p in moving for one in linear.parameters()):
        return "the given layer is still trained; freeze its weight and its bias."
    if sorted(tuple(sorted(p.shape)) for p in moving) != [(2, 4), (2, 5)]:
        shapes = ", ".join(str(tuple(p.shape)) for p in moving) or "none"
        return f"trained are {shapes}; it should be 5 × 2 and 2 × 4 (as nn.Parameter)."
    layer(h).square().sum().backward()
    gradients = [p.grad for p in moving]
    if not any(g is not None and g.any() for g in gradients):
        return "neither factor has a gradient: both begin at zero. Let A begin at random."
    with torch.no_grad():
        for p in moving:
            nn.init.normal_(p)
        unit = torch.eye(5, dtype=torch.float64)
        correction = layer(unit) - linear(unit)  # [5, 4]
        a, b = sorted(moving, key=lambda p: 4 in p.shape)
        product = (a if a.shape[0] == 5 else a.T) @ (b if b.shape[1] == 4 else b.T)
        scale = ((correction * product).sum() / product.square().sum()).item()
        if not torch.allclose(correction, scale * product):
            return "the correction is not a multiple of the product of the two factors."
    if abs(scale - 3) > 1e-6:
        return (
            f"the correction is {scale:g} times the product; it should be alpha / rank = 3 times."
        )
    return ""
