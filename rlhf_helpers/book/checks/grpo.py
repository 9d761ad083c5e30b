"""Checks of the exercises of grpo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, gradient_of, judge, judge_number, vector

# --- 1: the loss of a group ----------------------------------------------------------------------


def _loss(
    mean: str = "answers",
    minimum: Function | None = torch.minimum,
    advantage: Function = lambda r: (r - r.mean()) / (r.std() + 1e-4),
    ratio: Function = lambda new, old: (new - old).exp(),
    masked: bool = True,
    sign: float = -1.0,
) -> Function:
    """GRPO's loss of one group, or what a mistake makes of it."""

    def loss(logits: Tensor, tokens: Tensor, mask: Tensor, old: Tensor, rewards: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        counted = mask if masked else torch.ones_like(mask)
        rho, weight = ratio(log_probs, old), advantage(rewards)[:, None]
        gain = rho * weight
        if minimum is not None:
            gain = minimum(gain, rho.clamp(0.8, 1.2) * weight)
        gain = gain * counted
        if mean == "tokens":
            return sign * gain.sum() / counted.sum()
        sums = gain.sum(1)
        return sign * (sums / counted.sum(1) if mean == "answers" else sums).mean()

    return loss


def _loss_cases() -> list[tuple]:
    luck = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    cases = []
    for rewards in ([1, 0, 0, 1], [0.5, 2.0, -1.0, 0.0], [1, 1, 1, 1]):
        logits = torch.randn(4, 4, 5, generator=luck, dtype=torch.float64)
        tokens = torch.randint(5, (4, 4), generator=luck)
        log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        old = log_probs - 0.4 * torch.randn(4, 4, generator=luck, dtype=torch.float64)
        cases.append((logits, tokens, mask, old, vector(rewards)))
    return cases


def check_group_loss(answer: Function) -> None:
    """Exercise 1: answer(logits [G, T, V], tokens [G, T], mask [G, T], old [G, T], rewards [G]) ->
    GRPO's loss, ε = 0.2; value and gradient are looked at."""

    def both(loss: Function) -> Function:
        def found(logits: Tensor, *rest: Tensor) -> tuple:
            return gradient_of(loss)(logits, *rest), loss(logits, *rest)

        return found

    def centred(rewards: Tensor) -> Tensor:
        return rewards - rewards.mean()

    judge(
        both(answer),
        both(_loss()),
        _loss_cases(),
        {
            "the sign is turned round: this would make right answers less likely.": both(
                _loss(sign=1.0)
            ),
            "all tokens count alike here: take the mean of each answer first.": both(
                _loss(mean="tokens")
            ),
            "the sum over an answer's tokens is not divided by their number.": both(
                _loss(mean="sums")
            ),
            "nothing is clipped.": both(_loss(minimum=None)),
            "clipped, but without the smaller of the two products: a token that went the wrong way "
            "has no gradient left.": both(_loss(minimum=lambda plain, clipped: clipped)),
            "take the smaller of the two products, not the larger.": both(
                _loss(minimum=torch.maximum)
            ),
            "the advantages are centred, and not yet divided.": both(_loss(advantage=centred)),
            "the mean of the group was not taken off.": both(
                _loss(advantage=lambda r: r / (r.std() + 1e-4))
            ),
            "these are the rewards; the advantages are wanted.": both(_loss(advantage=lambda r: r)),
            "this divides by the biased standard deviation; torch's std() has G − 1 below the "
            "sum.": both(_loss(advantage=lambda r: centred(r) / (r.std(unbiased=False) + 1e-4))),
            "a constant group gives NaN: add 1e-4 to the standard deviation.": both(
                _loss(advantage=lambda r: centred(r) / r.std())
            ),
            "the mask is missing: padding counts.": both(_loss(masked=False)),
            "the ratio is that of the probabilities, exp(new − old).": both(
                _loss(ratio=lambda new, old: new / old)
            ),
        },
    )


# --- 2: a checker --------------------------------------------------------------------------------

RIGHT = [
    ("#### 95", "95"),
    ("#### 95\n", "95"),
    ("#### 95  ", "95"),
    ("\n#### 95", "95"),
    ("37+58=95\n#### 95", "95"),
    ("30+50=80, 7+8=15, 80+15=95\n#### 95", "95"),
    ("Is it 94? No, 95.\n#### 95", "95"),
    ("The tens make 80.\n\nThe units make 15.\n#### 95", "95"),
    ("# Units\n15\n# Tens\n80\n#### 95", "95"),
    ("I think = is odd ...\n#### 95", "95"),
    ("95 is 9.5e1\n#### 95\n\n", "95"),
    ("⁹⁵ in small\n#### 95", "95"),
    ("#### 7", "7"),
    ("3+4=7\n#### 7", "7"),
    ("#### 0", "0"),
    ("nothing is left\n#### 0", "0"),
    ("#### 100", "100"),
    ("60+40=100\n#### 100", "100"),
    ("#### 233", "233"),
    ("14+140+80=154+80=3+240=233... no: 233\n#### 233", "233"),
]
CHEATS = [
    ("", "there is no answer in it"),
    ("95", "the mark #### is missing"),
    ("The answer is 95.", "the mark #### is missing"),
    ("#### ", "there is no answer in it"),
    ("#### 94", "the number is wrong"),
    ("95\n#### 94", "the right number is not in the last line"),
    ("#### 195", "the answer's digits stand in another number"),
    ("#### 950", "the answer's digits stand in another number"),
    ("#### 1234567890951", "the answer's digits stand in another number"),
    ("#### 9", "only a part of the answer is there"),
    ("#### 95 or 94", "two answers are offered"),
    ("#### 94 95", "two answers are offered"),
    ("#### 93=94=95", "several answers are offered"),
    ("#### 94\n#### 95", "two answers are offered, in two lines"),
    ("#### 95\n#### 94", "two answers are offered, in two lines"),
    ("#### 94 #### 95", "two answers are offered, in one line"),
    ("#### 95 #### 95", "the mark stands there twice"),
    ("#### 95\nOr is it 94?", "the answer is not in the last line"),
    ("So #### 95", "the line does not begin with the mark"),
    ("#### 90+5", "that is a sum, not a number"),
    ("#### 095", "a zero stands in front"),
    ("#### +95", "a plus sign stands in front"),
    ("#### --95", "signs stand in front"),
    ("#### 95.0", "that is a decimal number"),
    ("#### 9.5e1", "that is a decimal number"),
    ("#### 9_5", "Python's int() reads this as 95"),
    ("#### ９５", "Python's int() reads these wide digits as 95"),
    ("#### ٩٥", "Python's int() reads these Arabic digits as 95"),
    ("#### ⁹⁵", "these are small digits, not 0 to 9"),
    ("#### 0x5f", "that is 95 in another base"),
    ("#### 95%", "something stands behind the number"),
]


def check_checker(answer: Callable[[str, str], bool | None]) -> None:
    """Exercise 2: answer(text, right answer) -> whether it is paid; twenty right responses must be,
    and no cheat."""
    wanted = [(text, right, True, "it is right") for text, right in RIGHT]
    wanted += [(text, "95", False, why) for text, why in CHEATS]
    for text, right, paid, why in wanted:
        try:
            found = answer(text, right)
        except Exception as error:
            print(
                f"Not yet: for {text!r} your checker raised {type(error).__name__}: {error}."
                " A policy can write anything; a checker must never stop."
            )
            return
        if found is None:
            print(
                "Not attempted: your function returns nothing yet. Write it, then run this cell"
                " again."
            )
            return
        if bool(found) != paid:
            verdict = "refuses" if paid else "pays for"
            print(f"Not yet: your checker {verdict} {text!r} (answer {right}): {why}.")
            return
    print("Right.")


# --- 3: how many groups teach? -------------------------------------------------------------------


def check_constant_share(answer: float | None) -> None:
    """Exercise 3, first part: the share of groups of eight that teach nothing at a pass rate of
    0.1."""
    nothing = 0.9**8 + 0.1**8
    judge_number(
        answer,
        nothing,
        {
            "that is the share of groups that teach something.": 1 - nothing,
            "that is the chance that all eight are right; all wrong teaches nothing, too.": 0.1**8,
            "that is the chance of one wrong answer.": 0.9,
            "that is the pass rate.": 0.1,
            "write it as a share, between 0 and 1.": 100 * nothing,
        },
        tolerance=0.005,
    )


def check_smallest_group(answer: float | None) -> None:
    """Exercise 3, second part: the smallest G of which half of the groups teach something at a pass
    rate of 0.1."""
    judge_number(
        answer,
        7,
        {
            "with six, 0.47 of the groups teach something: not yet half.": 6,
            "eight is enough; is fewer enough, too?": 8,
            "with ten, one answer is right on average, but half of the groups get there with "
            "fewer.": 10,
            "that is where the chance that all are wrong times G is one half; solve 0.9^G = "
            "0.5.": 5,
        },
        tolerance=0.01,
    )


# --- 4: pulls by hand ----------------------------------------------------------------------------


def check_pulls(answer: Sequence[float] | None) -> None:
    """Exercise 4: pull on all tokens of `95` and of `15+80=95` together, under GRPO and under Dr.
    GRPO with the constant 16: four numbers. Two digits are enough."""
    divided, plain = 0.75 / (6 / 28) ** 0.5, 0.75  # two right of eight: variance 8/7 · 3/16 = 6/28
    grpo, dr_grpo = divided / 8, plain / (8 * 16)
    right = (grpo, grpo, 3 * dr_grpo, 9 * dr_grpo)
    mistakes = {
        "these are the pulls on one token; an answer has three or nine of them.": (
            grpo / 3,
            grpo / 9,
            dr_grpo,
            dr_grpo,
        ),
        "Dr. GRPO does not divide the advantage by the standard deviation.": (
            grpo,
            grpo,
            3 * divided / 128,
            9 * divided / 128,
        ),
        "in Dr. GRPO each answer's sum is divided by the constant, 16.": (
            grpo,
            grpo,
            3 * plain / 8,
            9 * plain / 8,
        ),
        "the mean over the eight answers is missing: divide by N = 8.": tuple(8 * x for x in right),
        "in GRPO a token's weight is 1/(N·T), and the answer has T tokens.": (
            3 * grpo,
            9 * grpo,
            3 * dr_grpo,
            9 * dr_grpo,
        ),
    }
    if answer is None:
        print("Not attempted: replace None with your prediction, then run this cell again.")
        return
    if not _four_numbers(answer):
        print("Not yet: write four numbers, such as (0.1, 0.2, 0.3, 0.4).")
        return
    if _near(answer, right):
        print("Right.")
        return
    for message, wrong in mistakes.items():
        if _near(answer, wrong):
            print(f"Not yet: {message}")
            return
    off = [i + 1 for i, pair in enumerate(zip(answer, right, strict=True)) if not _near(*zip(pair))]
    print(f"Not yet: look again at number {', '.join(map(str, off))}.")


def _four_numbers(answer: object) -> bool:
    if not hasattr(answer, "__len__") or len(answer) != 4:
        return False
    return all(hasattr(one, "__float__") for one in answer)


def _near(given: Sequence[float], wanted: Sequence[float]) -> bool:
    pairs = zip(given, wanted, strict=True)
    return all(abs(float(x) - y) <= 0.04 * abs(y) for x, y in pairs)


# --- 5: a bug ------------------------------------------------------------------------------------


def check_advantages(answer: Function) -> None:
    """Exercise 5: answer(rewards [B·G], G) -> advantages [B·G]; the answers to one problem are
    neighbours."""

    def of_groups(rewards: Tensor, size: int) -> Tensor:
        groups = rewards.view(-1, size)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()

    def mixed(rewards: Tensor, size: int) -> Tensor:
        groups = rewards.view(size, -1)
        return ((groups - groups.mean(0)) / (groups.std(0) + 1e-4)).flatten()

    def across(rewards: Tensor, size: int) -> Tensor:
        groups = rewards.view(-1, size)
        return ((groups - groups.mean(0)) / (groups.std(0) + 1e-4)).flatten()

    judge(
        answer,
        of_groups,
        [
            (vector([1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1]), 4),
            (vector([0.5, 2.0, -1.0, 3.0, 0.0, 1.0]), 2),
        ],
        {
            "the rows are groups now, but mean and deviation go down the columns.": across,
            "this compares with the whole batch: other problems are in it.": lambda r, size: (
                (r - r.mean()) / (r.std() + 1e-4)
            ),
            "the mean is the group's, the deviation that of the whole batch.": lambda r, size: (
                (r.view(-1, size) - r.view(-1, size).mean(1, keepdim=True)) / (r.std() + 1e-4)
            ).flatten(),
        },
        untouched=mixed,
    )


# --- 6: three logs -------------------------------------------------------------------------------


def check_diagnosis(answer: Sequence[str] | None) -> None:
    """Exercise 6: of the runs A, B and C, the one that is cheated, the one that learned to write
    steps, and the one that dropped them."""
    if answer is None:
        print("Not attempted: replace None with your prediction, then run this cell again.")
        return
    given = tuple(str(one).strip().upper() for one in answer)
    if sorted(given) != ["A", "B", "C"]:
        print('Not yet: name each run once, such as ("A", "B", "C").')
    elif given == ("B", "C", "A"):
        print("Right.")
    elif given[0] != "B":
        print(
            "Not yet: look for answers that grow right up to the limit of 32 tokens while the"
            " reward comes near 1. Nothing in a sum of two numbers needs that."
        )
    else:
        print("Not yet: the cheated run is found. Steps make answers longer, not shorter.")
