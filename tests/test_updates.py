"""Several steps in a row, against plain PyTorch: what a training loop does between its losses. Each
loop is given a model with dropout in train mode, a last batch that is not full, gradients that are
too long, and settings that are not the defaults."""

import copy

import pytest
import torch
from architectures import build, scored_alone
from numbers_and_words import WORDS, letters, normal
from torch.nn.functional import logsigmoid

from rlhf_helpers.algorithms import dpo, grpo, reward_model, sft
from rlhf_helpers.algorithms.reward_model import Comparison
from rlhf_helpers.worlds import enumerable

RATE, LONGEST = 1e-2, 1e-3
# of four steps half rise: in straight lines up to 1, and from there to 0
SHARES = (0.5, 1.0, 1.0, 0.5)
COMMON = {"learning_rate": RATE, "warm_up": 0.5, "max_grad_norm": LONGEST, "seed": 3}
TWICE = COMMON | {"epochs": 2, "batch_size": 2}
PROMPTS = ["a b", "f", "h i j k", "a", "x y z"]
FIRST = ["c d e", "g", "l m n", "b c d e f g", "z ."]
SECOND = ["d", "h i j", "o p", "q r", "s t u v"]
THIRD = ["w x", "y", "z a b c", ".", "e f g"]


@pytest.fixture
def policy():
    return build("gpt2", dtype=torch.float64, vocab_size=len(WORDS)).train()


def ids(text, end=True):
    return [WORDS.index(word) for word in text.split()] + [0] * end


def alone(model, prompt, response):
    """log π of each token of one response, without padding or a mask."""
    whole = torch.tensor([prompt + response])
    log_probs = model(whole).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, whole[0, 1:, None])[len(prompt) - 1 :, 0]


def two_passes(generator):
    """Rows of each step: of five examples one is left over in each pass."""
    return [part for _ in range(2) for part in torch.randperm(5, generator=generator)[:4].split(2)]


def descend(
    model, losses, betas=(0.9, 0.999), decay=0.0, shares=SHARES, beside=(), rate_beside=RATE
):
    """The steps by hand.

    Args:
        losses: of each step, called when it is its turn.
        beside: what is trained beside the model: without decay, and not a part of the gradient.
        rate_beside: its own highest rate.
    Returns: loss, norm of the gradient and learning rate of each step.
    """
    groups = [{"params": list(model.parameters()), "weight_decay": decay}]
    groups += [{"params": list(beside), "weight_decay": 0.0}] if beside else []
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas)
    told = []
    for share, loss in zip(shares, losses, strict=True):
        for group, highest in zip(optimizer.param_groups, (RATE, rate_beside), strict=False):
            group["lr"] = highest * share
        optimizer.zero_grad()
        value = loss()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LONGEST)
        assert norm > 2 * LONGEST
        optimizer.step()
        told.append((value.item(), norm.item(), RATE * share))
    return told


def same(model, plain, told, history, tolerance=1e-9):
    found = [(one.loss, one.grad_norm, one.learning_rate) for one in history]
    assert [x for row in found for x in row] == pytest.approx(
        [x for row in told for x in row], rel=1e-5, abs=1e-9
    )
    same_weights(model, plain, tolerance)


def same_weights(model, plain, tolerance=1e-9):
    moved = 0.0
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
        moved = max(moved, (mine.grad is not None) and mine.grad.abs().max().item())
    assert moved > 0


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_steps_of_sft(policy, loss_on):
    """Oracle: AdamW on the mean over tokens that stand alone, unpadded; order, rate and clipping
    written out."""
    plain = copy.deepcopy(policy).eval()
    data = [(ids(p, end=False), ids(r)) for p, r in zip(PROMPTS, FIRST, strict=True)]
    if loss_on == "all":
        data = [(p[:1], p[1:] + r) for p, r in data]
    rows = two_passes(torch.Generator().manual_seed(3))
    told = descend(
        plain, [lambda r=r: -torch.cat([alone(plain, *data[i]) for i in r]).mean() for r in rows]
    )
    pairs = list(zip(PROMPTS, FIRST, strict=True))
    history = list(sft.train(policy, letters(), pairs, sft.Config(**TWICE, loss_on=loss_on)))
    same(policy, plain, told, history)


# numbers that float32 holds exactly
SURE, UNSURE = [1.0] * 5, [1.0, 0.75, 0.625, 0.5, 0.875]


def pair_loss(log_probs, reference, lengths, preference, config):
    """The loss of some pairs, and the implicit rewards [N, 2], from the papers' formulas."""
    if config.variant == "simpo":
        rewards = config.beta * log_probs / lengths
        return -logsigmoid(rewards[:, 0] - rewards[:, 1] - config.gamma).mean(), rewards
    ratios = log_probs - reference
    if config.variant == "length-normalised":
        ratios = ratios / lengths
    rewards = config.beta * ratios
    gap = rewards[:, 0] - rewards[:, 1]
    if config.variant == "ipo":
        return (gap / config.beta - 1 / (2 * config.beta)).square().mean(), rewards
    if config.variant == "hinge":
        return torch.relu(1 - gap).mean(), rewards
    s = config.label_smoothing
    right = (1 - s) * preference + s * (1 - preference)
    return -(right * logsigmoid(gap) + (1 - right) * logsigmoid(-gap)).mean(), rewards


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize(
    ("variant", "more"),
    [
        ("sigmoid", {"beta": 0.3, "label_smoothing": 0.125}),
        ("length-normalised", {"beta": 2.0, "label_smoothing": 0.125}),
        ("ipo", {"beta": 0.3}),
        ("hinge", {"beta": 0.03}),
        ("simpo", {"beta": 2.0, "gamma": 1.3}),
    ],
)
def test_the_steps_of_dpo(policy, variant, more, micro_batch):
    """Oracle: AdamW on the papers' losses of responses that stand alone; the reference is the
    policy of the start, without dropout."""
    config = dpo.Config(**TWICE, variant=variant, micro_batch=micro_batch, **more)
    labels = UNSURE if "label_smoothing" in more else SURE
    columns = zip(PROMPTS, FIRST, SECOND, labels, strict=True)
    data = [dpo.Example(ids(p, end=False), ids(a), ids(b), label) for p, a, b, label in columns]
    plain = copy.deepcopy(policy).eval()
    lengths = torch.tensor([[len(one.chosen), len(one.rejected)] for one in data])
    preference = torch.tensor(labels)

    def log_probs(rows):
        sides = [[alone(plain, data[i].prompt, s).sum() for s in data[i][1:3]] for i in rows]
        return torch.stack([torch.stack(side) for side in sides])

    reference = log_probs(range(5)).detach().float()  # kept in single precision
    rewards = []

    def loss(rows):
        where = (reference[rows], lengths[rows], preference[rows], config)
        value, implicit = pair_loss(log_probs(rows), *where)
        rewards.append(implicit.detach().mean(0).tolist())
        return value

    rows = two_passes(torch.Generator().manual_seed(3))
    told = descend(plain, [lambda r=r: loss(r) for r in rows])
    history = list(dpo.train(policy, letters(), data, config))
    same(policy, plain, told, history, 1e-6)
    for one, wanted in zip(history, rewards, strict=True):
        assert [one.chosen_reward, one.rejected_reward] == pytest.approx(wanted, abs=1e-6)
        assert one.margin == pytest.approx(wanted[0] - wanted[1], abs=1e-6)


def ranking_loss(scores, labels, config, threshold):
    """The loss of some comparisons from their scores [N, K], from the papers' formulas."""
    preference, margin, weight = labels.unbind(1)
    gap = scores[:, 0] - scores[:, 1]
    if config.loss == "plackett-luce":
        loss = sum(scores[:, k:].logsumexp(1) - scores[:, k] for k in range(2)).mean()
    elif config.loss == "rao-kupper":
        win, lose = (gap - threshold).sigmoid(), (-gap - threshold).sigmoid()
        found = torch.where(preference == 1, win, lose)
        loss = -torch.where(preference == 0.5, 1 - win - lose, found).log().mean()
    else:
        gap = gap - margin
        loss = -preference * logsigmoid(gap) - (1 - preference) * logsigmoid(-gap)
        loss = (weight * loss).sum() / weight.sum()
    return loss + config.centring * scores.sum(1).square().mean()


@pytest.mark.parametrize("loss", reward_model.LOSSES)
def test_the_steps_of_the_reward_model(policy, loss):
    """Oracle: AdamW, its decay and its memory as the settings say, on the papers' losses of texts
    that stand alone. Comparisons of one length share a batch, and the batches come in random
    order."""
    config = reward_model.Config(
        **TWICE, loss=loss, weight_decay=0.1, centring=0.25, threshold_rate=3 * RATE
    )
    labels = torch.tensor([[1.0, 0.0, 1.0]] * 5)
    if loss == "bradley-terry":
        labels[:, 0] = torch.tensor(UNSURE)
        labels[:, 1] = torch.tensor([0.0, 0.5, 0.25, 1.0, 0.0])
        labels[:, 2] = torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0])
    elif loss == "rao-kupper":
        labels[:, 0] = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.5])
    sides = (FIRST, SECOND, THIRD)[: 3 if loss == "plackett-luce" else 2]
    responses = list(zip(*sides, strict=True))
    columns = zip(PROMPTS, responses, labels.tolist(), strict=True)
    data = [Comparison(prompt, texts, *label) for prompt, texts, label in columns]

    model, tokenizer = reward_model.load(policy, letters())
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)  # at zero the trunk would learn nothing at first
    plain = copy.deepcopy(model.train()).eval()
    plain.config.pad_token_id = None  # the library then reads the last column
    log_threshold = torch.zeros((), requires_grad=True)
    margins, rows = [], []

    def scores(i):
        texts = [torch.tensor([ids(data[i].prompt, end=False) + ids(r)]) for r in responses[i]]
        return torch.stack([plain(text).logits[0, 0] for text in texts])

    def value(part):
        found = torch.stack([scores(i) for i in part])
        margins.append((found[:, 0] - found[:, -1]).mean().item())
        return ranking_loss(found, labels[part], config, log_threshold.exp())

    luck = torch.Generator().manual_seed(3)
    long = [max(len(f"{one.prompt} {r}".split()) for r in one.responses) for one in data]
    for _ in range(2):
        order = sorted(torch.randperm(5, generator=luck)[:4].tolist(), key=long.__getitem__)
        rows += [[order[:2], order[2:]][k] for k in torch.randperm(2, generator=luck).tolist()]
    beside = [log_threshold] if loss == "rao-kupper" else []
    how = {"betas": (0.9, 0.95), "decay": 0.1, "beside": beside, "rate_beside": 3 * RATE}
    told = descend(plain, [lambda r=r: value(r) for r in rows], **how)
    history = list(reward_model.train(model, tokenizer, data, config))
    same(model, plain, told, history, 1e-7 if beside else 1e-9)
    assert [one.margin for one in history] == pytest.approx(margins, abs=1e-6)
    if beside:
        assert history[-1].threshold == pytest.approx(log_threshold.exp().item(), abs=1e-6)
        assert abs(history[-1].threshold - 1.0) > RATE


def early(prompts, completions, **_):
    return [sum(word < "m" for word in text.split()) / 4 for text in completions]


def group_loss(log_probs, old, ref, advantages, mask, config):
    """The objective of GRPO from the paper's formula, with the corrections that are asked for."""
    lengths = mask.sum(1, keepdim=True)
    log_ratio = (log_probs - old) * mask
    if config.importance == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    ratio, a = log_ratio.exp(), advantages[:, None]
    inside = torch.minimum(ratio * a, ratio.clamp(1 - config.clip, 1 + config.clip_high) * a)
    k3 = (ref - log_probs).exp() - 1 - (ref - log_probs)
    if config.bias_correct_kl:
        k3 = ratio * k3
    tokens = -inside + config.beta * k3
    divisor = config.max_new_tokens if config.loss_type == "dr_grpo" else lengths
    return (tokens * mask / divisor).sum(1).mean()


@pytest.mark.parametrize(
    "more",
    [
        {"loss_type": "grpo", "bias_correct_kl": True},
        {"loss_type": "dr_grpo", "bias_correct_kl": False},
        {"loss_type": "grpo", "importance": "sequence", "bias_correct_kl": False},
    ],
)
def test_the_steps_of_grpo(policy, more, monkeypatch):
    """Oracle: AdamW on the paper's objective of the completions that were sampled, each alone at
    the temperature of sampling; `old` is the policy before an iteration, the reference that before
    the first."""
    sizes = {"iterations": 4, "prompts": 2, "samples_per_prompt": 4, "max_new_tokens": 15}
    passes = {"epochs": 2, "mini_batches": 2, "temperature": 0.7, "scale": "none"}
    price = {"clip": 0.05, "clip_high": 0.4, "beta": 0.5}
    config = grpo.Config(**COMMON, **sizes, **passes, **price, **more)
    policy.generation_config.eos_token_id = list(range(9))  # so that completions end early
    plain, batches, update = copy.deepcopy(policy).eval(), [], grpo.update
    monkeypatch.setattr(grpo, "update", lambda run, b, c: batches.append(b) or update(run, b, c))
    history = list(grpo.train(policy, letters(), PROMPTS, early, config))
    assert min(batch.mask.shape[1] for batch in batches) < 15

    start, order = copy.deepcopy(plain), torch.Generator().manual_seed(3)

    def scored(model, batch, rows=slice(None)):
        where = (batch.tokens[rows], batch.attention_mask[rows], batch.mask.shape[1])
        return scored_alone(model, *where, temperature=0.7)

    def losses():
        for batch in batches:
            rewards = batch.rewards.double().view(2, 4)
            advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
            old, ref = (scored(model, batch).detach() for model in (plain, start))
            for _ in range(2):
                for group in torch.randperm(2, generator=order).tolist():
                    rows = slice(4 * group, 4 * group + 4)
                    fixed = (old[rows], ref[rows], advantages[rows], batch.mask[rows], config)
                    yield lambda b=batch, r=rows, f=fixed: group_loss(scored(plain, b, r), *f)

    told = descend(plain, losses(), shares=[s for s in SHARES for _ in range(4)])
    same_weights(policy, plain)
    by_iteration = [told[i : i + 4] for i in range(0, 16, 4)]
    for one, steps in zip(history, by_iteration, strict=True):
        assert one.loss == pytest.approx(sum(step[0] for step in steps) / 4, abs=1e-6)
        assert one.grad_norm == pytest.approx(sum(step[1] for step in steps) / 4, rel=1e-5)
    assert max(one.clip_fraction for one in history) > 0.05


def test_the_steps_of_online_dpo(policy, monkeypatch):
    """Oracle: AdamW on the pairs that the loop made, each response alone; the reference stays the
    policy of the start, the rate is that of an iteration, and each takes the next prompts."""
    sizes = {"iterations": 4, "prompts": 3, "samples_per_prompt": 3, "max_new_tokens": 4}
    config = dpo.Config(**COMMON, **sizes, epochs=2, batch_size=2, beta=0.3)
    plain, made, pairs_of = copy.deepcopy(policy).eval(), [], dpo.pairs_of

    def recorded(*arguments):
        found = pairs_of(*arguments)
        made.append((arguments[0], found[0]))
        return found

    monkeypatch.setattr(dpo, "pairs_of", recorded)
    seen = []

    def judge(prompts, completions, **_):
        seen.append(prompts[::3])
        return [len(set(text.split())) + text.count("a") / 4 for text in completions]

    history = list(dpo.online(policy, letters(), PROMPTS[:4], judge, config))
    asked = [prompt for some in seen for prompt in some]
    passes = [asked[i : i + 4] for i in (0, 4, 8)]
    assert all(sorted(one) == sorted(PROMPTS[:4]) for one in passes)
    assert passes[0] != passes[1]

    start, kls = copy.deepcopy(plain), []

    def losses():
        for (rollout, data), some in zip(made, seen, strict=True):
            assert all(one.prompt in [ids(p, end=False) for p in some] for one in data)
            where = (rollout.tokens, rollout.attention_mask, rollout.completion_mask.shape[1])
            now, then = (scored_alone(model, *where).sum(1).detach() for model in (plain, start))
            kls.append((now - then).mean().item())
            luck, whole = torch.Generator().manual_seed(3), max(1, len(data) // 2) * 2
            passes = [torch.randperm(len(data), generator=luck)[:whole] for _ in range(2)]
            parts = [part for rows in passes for part in rows.split(2)]
            for part in parts:
                yield lambda some=[data[i] for i in part]: step_loss(some)

    def step_loss(some):
        sums = [
            torch.stack([torch.stack([alone(m, e.prompt, s).sum() for s in e[1:3]]) for e in some])
            for m in (plain, start)
        ]
        preference = torch.tensor([one.preference for one in some])
        return pair_loss(sums[0], sums[1].detach().float(), None, preference, config)[0]

    counts = [2 * max(1, len(data) // 2) for _, data in made]
    shares = [share for share, n in zip(SHARES, counts, strict=True) for _ in range(n)]
    told = descend(plain, losses(), shares=shares)
    same_weights(policy, plain, 1e-6)
    assert [one.kl for one in history] == pytest.approx(kls, abs=1e-5)
    assert max(counts) > 1
    for one, n in zip(history, counts, strict=True):
        steps, told = told[:n], told[n:]
        assert one.loss == pytest.approx(sum(step[0] for step in steps) / n, abs=1e-6)
        assert one.grad_norm == pytest.approx(sum(step[1] for step in steps) / n, rel=1e-4)


def test_the_steps_of_dpo_on_a_language():
    """Oracle: the same steps on a table of log-probabilities; Adam is AdamW without decay."""
    language = enumerable.language(4, 2)
    count = len(language.tokens)
    model = torch.nn.ParameterList([normal(count)])
    plain = copy.deepcopy(model)
    chosen, rejected = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    reference = plain[0].detach().log_softmax(0)
    config = dpo.Config(**TWICE, beta=0.3)

    def loss(rows):
        ratios = plain[0].log_softmax(0) - reference
        return -logsigmoid(0.3 * (ratios[chosen[rows]] - ratios[rejected[rows]])).mean()

    rows = two_passes(torch.Generator().manual_seed(3))
    told = descend(plain, [lambda r=r: loss(r) for r in rows])
    how = (lambda: model[0].log_softmax(0), list(model), language, chosen, rejected, config)
    assert list(dpo.train_exact(*how)) == pytest.approx([step[0] for step in told], abs=1e-9)
    same_weights(model, plain)
