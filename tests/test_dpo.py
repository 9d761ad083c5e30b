"""Direct preference optimisation: the losses are the libraries' and the derivation's, the updates
those of TRL's trainer, and the optimum the one that can be listed."""

import copy
import math

import pytest
import torch
import trl_stubs
from architectures import EOS, build
from numbers_and_words import letters, normal, value_and_gradient
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf_helpers import models, preferences
from rlhf_helpers.algorithms import dpo
from rlhf_helpers.algorithms._loop import TrainingStopped
from rlhf_helpers.algorithms.dpo import Config, Example
from rlhf_helpers.algorithms.reward_model import Comparison
from rlhf_helpers.losses import dpo_loss, kto_loss, simpo_loss
from rlhf_helpers.models import lora_policy
from rlhf_helpers.worlds import enumerable

DATA = [
    Comparison("a b", ("c d e", "f")),
    Comparison("g", ("h", "i j k l")),
    Comparison("m n o", ("p q", "r s t")),
    Comparison("u", ("v w x", "y z")),
]
# prompts and responses of unequal lengths; the end token is also the pad token, and occurs inside
EXAMPLES = [
    Example([1, 2, 3], [4, 5, EOS], [6, EOS]),
    Example([7], [8, EOS], [9, 10, 11, 12]),
    Example([1, EOS, 4, 5], [2, EOS], [3, 3, EOS]),
]


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the losses ----------------------------------------------------------------------------------


@pytest.mark.equation("eq:dpo-loss")
def test_dpo_by_hand():
    """Oracle: by hand: log-ratios log 3 apart at β = 1 give σ = 3/4, so the loss is log(4/3)."""
    ones = torch.ones(1, dtype=torch.float64)
    found = dpo_loss((math.log(3.0) - 2) * ones, -5 * ones, -2 * ones, -5 * ones, beta=1.0)
    assert found.loss.item() == pytest.approx(math.log(4 / 3))
    assert found.chosen_rewards.item() == pytest.approx(math.log(3.0))
    assert found.rejected_rewards.item() == 0.0


@pytest.mark.equation("eq:dpo-loss")
def test_the_loss_of_the_reference_is_log_2():
    """Oracle: both implicit rewards are 0, and σ(0) = ½, whatever the log-probabilities."""
    one, two = -100 * normal(2, 8).abs()
    for smoothing in (0.0, 0.3):
        found = dpo_loss(one, two, one, two, beta=0.7, label_smoothing=smoothing)
        assert found.loss.item() == pytest.approx(math.log(2), abs=1e-15)
        assert not found.chosen_rewards.any()
        assert not found.rejected_rewards.any()


@pytest.mark.equation("eq:dpo-loss")
@pytest.mark.parametrize("variant", ["sigmoid", "hinge"])
def test_dpo_equals_trl(variant):
    """Oracle: TRL's DPOTrainer._compute_loss on the same log-probabilities, value and gradient."""
    reference = normal(2, 6, seed=1)

    def theirs(x):
        return trl_stubs.dpo_loss(x, reference, 0.3, variant)

    def ours(x):
        return dpo_loss(*x, *reference, 0.3, variant).loss

    log_probs = 8 * normal(2, 6)
    expected, slope = value_and_gradient(theirs, log_probs)
    value, gradient = value_and_gradient(ours, log_probs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)
    assert (gradient == 0).any() == (variant == "hinge")


@pytest.mark.equation("eq:dpo-loss")
@pytest.mark.equation("eq:ipo-loss")
@pytest.mark.parametrize(
    ("variant", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
)
def test_dpo_equals_the_reference_free_losses_of_trl_on_log_ratios(variant, smoothing):
    """Oracle: TRL's CPOTrainer.cpo_loss, which knows label smoothing and the un-averaged IPO, fed
    with log-ratios."""
    reference = normal(2, 6, seed=1)
    expected, slope = value_and_gradient(
        lambda x: trl_stubs.cpo_loss(variant, 0.3, x - reference, smoothing), 3 * normal(2, 6)
    )
    value, gradient = value_and_gradient(
        lambda x: dpo_loss(*x, *reference, 0.3, variant, smoothing).loss, 3 * normal(2, 6)
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)


def test_robust_dpo_equals_trl():
    """Oracle: TRL's DPOTrainer with loss_type "robust", value and gradient."""
    reference = normal(2, 6, seed=1)
    expected, slope = value_and_gradient(
        lambda x: trl_stubs.dpo_loss(x, reference, 0.3, "robust", 0.2), 3 * normal(2, 6)
    )
    value, gradient = value_and_gradient(
        lambda x: dpo_loss(*x, *reference, 0.3, "robust", 0.2).loss, 3 * normal(2, 6)
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)


def test_robust_dpo_is_right_on_average_over_flipped_labels():
    """Oracle: what the loss is for: the mean over labels of which a share is flipped is the plain
    loss of the right ones."""
    chosen, rejected, ref_chosen, ref_rejected = normal(4, 5)
    share = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.49], dtype=torch.float64)

    def robust(i, flipped):
        sides = [chosen, rejected, ref_chosen, ref_rejected]
        order = (1, 0, 3, 2) if flipped else (0, 1, 2, 3)
        return dpo_loss(*(sides[k][i : i + 1] for k in order), 0.5, "robust", share[i].item()).loss

    plain = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5).loss
    mean = torch.stack(
        [(1 - share[i]) * robust(i, False) + share[i] * robust(i, True) for i in range(5)]
    ).mean()
    torch.testing.assert_close(mean, plain)
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5, "robust", 0.5)


@pytest.mark.equation("eq:kto-loss")
def test_kto_by_hand():
    """Oracle: log-ratios log 3 and log 2 with β = 1 and z₀ = 0: 1 − 3/4 for the good one and
    1 − 1/3 for the bad one."""
    ratio = torch.tensor([math.log(3.0), math.log(2.0)], dtype=torch.float64)
    zero, labels = torch.zeros(2, dtype=torch.float64), torch.tensor([True, False])
    loss = kto_loss(ratio, zero, labels, 0.0, 1.0)
    assert loss.item() == pytest.approx((1 / 4 + 2 / 3) / 2)
    # measured from where both are, each is even
    assert kto_loss(ratio[:1], zero[:1], labels[:1], math.log(3.0), 0.2).item() == pytest.approx(
        0.5
    )


@pytest.mark.equation("eq:kto-loss")
def test_the_gradient_of_kto():
    """Oracle: the derivative of the sigmoid by hand, β·σ·(1 − σ), down for the good and up for the
    bad; the reference and z₀ are constants."""
    log_probs, reference = normal(2, 6)
    log_probs.requires_grad_()
    reference.requires_grad_()
    drift = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([1, 0, 1, 1, 0, 0])
    kto_loss(log_probs, reference, good, drift, 0.7).backward()
    above = 0.7 * (log_probs - reference - drift).detach()
    slope = 0.7 * torch.sigmoid(above) * torch.sigmoid(-above) / 6
    torch.testing.assert_close(log_probs.grad, torch.where(good == 1, -slope, slope))
    assert reference.grad is None
    assert drift.grad is None


def test_the_term_on_the_chosen_response():
    """Oracle: written out: α times the mean over pairs of −log π / tokens of the chosen side, value
    and gradient."""
    log_probs, reference = -normal(2, 4, 2).abs()
    lengths = torch.tensor([[2, 3], [4, 1], [5, 5], [1, 2]])
    plain, held = (
        value_and_gradient(
            lambda x, a=alpha: (
                dpo.pair_loss(
                    x, reference, lengths, torch.ones(4), Config(beta=0.5, chosen_weight=a)
                ).loss
            ),
            log_probs,
        )
        for alpha in (0.0, 0.3)
    )
    per_token = -(log_probs[:, 0] / lengths[:, 0])
    torch.testing.assert_close(held[0] - plain[0], 0.3 * per_token.mean())
    torch.testing.assert_close((held[1] - plain[1])[:, 0], -0.3 / 4 / lengths[:, 0].double())
    assert not (held[1] - plain[1])[:, 1].any()


@pytest.mark.equation("eq:dpo-loss")
def test_label_smoothing_of_one_pair_each():
    """Oracle: pairs one by one, each with its own number."""
    sides, share = normal(4, 5), torch.rand(5, generator=torch.Generator().manual_seed(0))
    alone = [
        dpo_loss(*sides[:, i : i + 1], 0.5, label_smoothing=share[i].item()).loss for i in range(5)
    ]
    together = dpo_loss(*sides, 0.5, label_smoothing=share.double()).loss
    torch.testing.assert_close(together, torch.stack(alone).mean())


@pytest.mark.equation("eq:dpo-gradient")
def test_the_weight_of_a_pair_in_the_gradient():
    """Oracle: by hand: −β·σ(rejected reward − chosen reward) on the chosen log-probability, its
    opposite on the rejected one; Rafailov et al. 2023, section 4."""
    sides, beta = normal(4, 6), 0.4
    rewards = beta * (sides[:2] - sides[2:])
    _, gradient = value_and_gradient(lambda x: dpo_loss(*x, *sides[2:], beta).loss, sides[:2])
    weight = beta * torch.sigmoid(rewards[1] - rewards[0]) / 6
    torch.testing.assert_close(gradient, torch.stack([-weight, weight]))
    found = dpo.gradient_weight(*rewards, beta)
    torch.testing.assert_close(found, 6 * weight)


@pytest.mark.equation("eq:dpo-loss")
def test_the_optimal_policy_is_a_stationary_point_of_the_expected_loss():
    """Oracle: π* in closed form: over all pairs, with Bradley-Terry labels, the gradient vanishes
    there and the loss is the entropy of the labels; nowhere else on a random line through it is it
    lower."""
    language = enumerable.language(4, 2)
    reference = normal(len(language.tokens)).log_softmax(0)
    utilities = enumerable.utilities(language, 1)
    best = enumerable.optimal_policy(reference, utilities, 0.5)
    first, second = torch.combinations(torch.arange(len(reference))).unbind(1)
    p = torch.sigmoid(utilities[first] - utilities[second])

    def loss(logits):
        log_probs = logits.log_softmax(0)
        sides = (log_probs[first], log_probs[second], reference[first], reference[second])
        return dpo_loss(*sides, 0.5, label_smoothing=1 - p).loss

    value, gradient = value_and_gradient(loss, best)
    assert gradient.abs().max() < 1e-12
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    torch.testing.assert_close(value, entropy)
    assert all(loss(best + t * normal(len(best), seed=2)) > value for t in (-0.5, -0.1, 0.1, 0.5))


@pytest.mark.equation("eq:ipo-loss")
def test_ipo_is_least_at_one_over_two_tau():
    """Oracle: by hand: a difference of log-ratios of 1/(2τ) costs nothing, and one of 0 costs its
    square."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert dpo_loss(zero + 2.5, zero, zero, zero, beta=0.2, variant="ipo").loss == 0.0
    assert dpo_loss(zero, zero, zero, zero, beta=0.2, variant="ipo").loss == 2.5**2


@pytest.mark.equation("eq:simpo-loss")
def test_simpo_equals_trl():
    """Oracle: TRL's CPOTrainer.cpo_loss, which is given log-probabilities that are divided by the
    lengths already."""
    lengths = torch.tensor([[3, 5, 1, 8], [2, 5, 9, 4]])
    expected, slope = value_and_gradient(
        lambda x: trl_stubs.cpo_loss("simpo", 2.0, x / lengths, gamma=0.7), 3 * normal(2, 4)
    )
    value, gradient = value_and_gradient(
        lambda x: simpo_loss(*x, *lengths, beta=2.0, gamma=0.7), 3 * normal(2, 4)
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)


def test_the_reference_and_the_labels_are_constants():
    """Oracle: autograd gives them no gradient."""
    sides = normal(4, 3).requires_grad_()
    smoothing = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    dpo_loss(*sides, label_smoothing=smoothing).loss.backward()
    assert sides.grad[:2].abs().min() > 0
    assert not sides.grad[2:].any()
    assert smoothing.grad is None


PAIRS = (torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2))
BAD_LOSSES = [
    (lambda: dpo_loss(*PAIRS[:3], torch.zeros(3)), "shapes differ"),
    (lambda: dpo_loss(*(x[:0] for x in PAIRS)), "is empty"),
    (lambda: dpo_loss(torch.tensor([0.0, math.nan]), *PAIRS[1:]), r"chosen_log_probs\[1\] is nan"),
    (lambda: dpo_loss(*PAIRS, beta=0.0), "beta=0.0"),
    (lambda: dpo_loss(*PAIRS, variant="dpo"), "use one of 'sigmoid'"),
    (lambda: dpo_loss(*PAIRS, variant="ipo", label_smoothing=0.1), "label_smoothing"),
    (lambda: dpo_loss(*PAIRS, variant="hinge", label_smoothing=0.1), "label_smoothing"),
    (lambda: dpo_loss(*PAIRS, label_smoothing=1.5), "label_smoothing"),
    (lambda: dpo_loss(*PAIRS, label_smoothing=torch.zeros(3)), "label_smoothing has shape"),
    (lambda: simpo_loss(*PAIRS[:2], torch.tensor([1, 0]), torch.ones(2)), "chosen_lengths=0"),
    (lambda: simpo_loss(*PAIRS[:2], torch.ones(3), torch.ones(2)), "shapes differ"),
]


@pytest.mark.parametrize(("call", "message"), BAD_LOSSES, ids=[m for _, m in BAD_LOSSES])
def test_bad_input_of_a_loss_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- one batch -----------------------------------------------------------------------------------


def alone(model, prompt, response):
    """Log-probability of one response by itself, without padding, from the whole softmax."""
    ids = torch.tensor([prompt + response])
    log_probs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return log_probs.gather(1, torch.tensor(response)[:, None]).sum()


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_log_probs_are_those_of_each_response_alone(architecture):
    """Oracle: the library's model on one text at a time, without padding."""
    model = build(architecture, dtype=torch.float64)
    batch = dpo.collate(EXAMPLES, torch.zeros(3, 2), EOS)
    found = dpo.response_log_probs(model, batch)
    wanted = [[alone(model, e.prompt, side) for side in e[1:3]] for e in EXAMPLES]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    single = dpo.reference_log_probs(model, EXAMPLES, EOS, batch_size=1)
    torch.testing.assert_close(single.double(), found.detach(), rtol=1e-5, atol=1e-5)


def test_the_first_loss_is_log_2_with_dropout_in_the_model(tokenizer):
    """Oracle: log 2; had dropout been on in one of the two passes it would be another number."""
    model = build("gpt2", dropout=0.5).train()
    data = dpo.encode(tokenizer, DATA)
    first = next(dpo.train(model, tokenizer, data, Config(batch_size=4)))
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert first.margin == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_micro_batches_give_the_gradient_of_the_whole(variant, micro_batch):
    """Oracle: the same batch in one piece."""
    found = []
    for size in (None, micro_batch):
        model = build("gpt2", dtype=torch.float64)
        batch = dpo.collate(EXAMPLES, normal(3, 2) - 5, EOS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = Config(variant=variant, beta=0.5, micro_batch=size, max_grad_norm=1e9)
        found.append((dpo.update(model, optimizer, batch, config), gradients(model)))
    (whole, slopes), (parts, others) = found
    assert whole == pytest.approx(parts, rel=1e-9)
    for name in slopes:
        torch.testing.assert_close(slopes[name], others[name], rtol=1e-8, atol=1e-10)
    assert whole["grad_norm"] > 0


def test_length_normalised_is_the_loss_of_mean_log_probs():
    """Oracle: TRL's cpo_loss on mean log-ratios a token."""
    log_probs, reference = normal(2, 5, 2)
    lengths = torch.tensor([[3, 5], [1, 2], [4, 4], [9, 1], [2, 7]])
    found = dpo.pair_loss(
        log_probs, reference, lengths, torch.ones(5), Config(variant="length-normalised", beta=2.0)
    )
    theirs = trl_stubs.cpo_loss("sigmoid", 2.0, ((log_probs - reference) / lengths).unbind(1))
    torch.testing.assert_close(found.loss, theirs)


def test_a_soft_label_and_smoothing_mix_the_two_orders():
    """Oracle: the losses of both orders, weighed by hand: a label of 0.7 of which a tenth is taken
    to be wrong puts 0.7·0.9 + 0.3·0.1 on the order given."""
    log_probs, reference = normal(2, 4, 2)
    ones, lengths = torch.ones(4), torch.ones(4, 2)
    plain = Config(beta=0.5)
    given, turned = (
        dpo.pair_loss(a, b, lengths, ones, plain).loss
        for a, b in ((log_probs, reference), (log_probs.flip(1), reference.flip(1)))
    )
    config = Config(beta=0.5, label_smoothing=0.1)
    found = dpo.pair_loss(log_probs, reference, lengths, 0.7 * ones, config).loss
    torch.testing.assert_close(found, 0.66 * given + 0.34 * turned)


@pytest.mark.parametrize(
    ("variant", "theirs"),
    [("sigmoid", "sigmoid"), ("hinge", "hinge"), ("length-normalised", "sigmoid_norm")],
)
def test_trl_gives_the_same_loss_and_gradient_on_the_same_batch(
    variant, theirs, tokenizer, tmp_path
):
    """Oracle: TRL's DPOTrainer with its own collator and reference model."""
    trainer = trl_trainer(tokenizer, tmp_path, theirs)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    wanted = gradients(trainer.model)

    policy, reference = moved(), build("gpt2")
    data = dpo.encode(tokenizer, DATA)
    mine = dpo.collate(data, dpo.reference_log_probs(reference, data, EOS), EOS)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    config = Config(variant=variant, beta=0.5, max_grad_norm=1e9)
    found = dpo.update(policy, optimizer, mine, config)
    assert found["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert found["loss"] != pytest.approx(math.log(2), abs=1e-3)
    for name, slope in gradients(policy).items():
        torch.testing.assert_close(slope, wanted[name], rtol=1e-3, atol=1e-5)


def test_ipo_of_trl_divides_by_the_lengths_and_ours_does_not(tokenizer, tmp_path):
    """Oracle: TRL's DPOTrainer; by hand from our log-probabilities, with its division and
    without."""
    trainer = trl_trainer(tokenizer, tmp_path, "ipo")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    expected = trainer.compute_loss(trainer.model, batch).item()
    data = dpo.encode(tokenizer, DATA)
    log_probs, reference = (dpo.reference_log_probs(m, data, EOS) for m in (moved(), build("gpt2")))
    lengths = torch.tensor([[len(e.chosen), len(e.rejected)] for e in data])
    averaged = (log_probs - reference) / lengths
    assert (averaged[:, 0] - averaged[:, 1] - 1.0).square().mean() == pytest.approx(
        expected, abs=1e-5
    )
    config = Config(variant="ipo", beta=0.5)
    ours = dpo.pair_loss(log_probs, reference, lengths, torch.ones(4), config).loss.item()
    whole = log_probs - reference
    assert ours == pytest.approx((whole[:, 0] - whole[:, 1] - 1.0).square().mean().item(), abs=1e-5)
    assert ours != pytest.approx(expected, abs=1e-2)


def moved():
    """The reference of `build`, a step away from it."""
    policy = build("gpt2")
    with torch.no_grad():
        for seed, parameter in enumerate(policy.parameters()):
            generator = torch.Generator().manual_seed(seed)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def trl_trainer(tokenizer, folder, loss_type):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": one.prompt, "chosen": f" {one.responses[0]}", "rejected": f" {one.responses[1]}"}
        for one in DATA
    ]
    # TRL masks by the pad token in places, so it is given one of its own
    separate = copy.deepcopy(tokenizer)
    separate.pad_token = "z"
    arguments = DPOConfig(
        folder,
        beta=0.5,
        loss_type=loss_type,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    return DPOTrainer(
        moved(),
        build("gpt2"),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=separate,
    )


# --- the reference, once -------------------------------------------------------------------------


def test_the_cache_is_read_and_not_computed_again(tmp_path, monkeypatch):
    """Oracle: the second call may not run the model."""
    model, path = build("gpt2"), tmp_path / "folder" / "reference.safetensors"
    first = dpo.cached_log_probs(path, model, EXAMPLES, EOS)
    torch.testing.assert_close(first, dpo.reference_log_probs(model, EXAMPLES, EOS), rtol=0, atol=0)

    def fail(*_, **__):
        raise AssertionError("the model ran again")

    monkeypatch.setattr(dpo, "reference_log_probs", fail)
    assert torch.equal(dpo.cached_log_probs(path, model, EXAMPLES, EOS), first)
    assert [one.name for one in path.parent.iterdir()] == ["reference.safetensors"]


def stale(case, path, model):
    if case == "another model":
        with torch.no_grad():
            model.transformer.wte.weight[3, 3] += 1e-3
    examples = EXAMPLES[::-1] if case == "other pairs" else EXAMPLES
    if case == "no whole cache":
        path.write_bytes(path.read_bytes()[:-3])
    return examples


@pytest.mark.parametrize("case", ["another model", "other pairs", "no whole cache"])
def test_a_stale_cache_is_refused_and_kept(case, tmp_path):
    model, path = build("gpt2"), tmp_path / "reference.safetensors"
    dpo.cached_log_probs(path, model, EXAMPLES, EOS)
    examples = stale(case, path, model)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"reference\.safetensors.*{case}.*delete it"):
        dpo.cached_log_probs(path, model, examples, EOS)
    assert path.read_bytes() == before


def test_a_cache_that_is_half_written_has_another_name(tmp_path, monkeypatch):
    """Oracle: what stands under the path after a write that broke off, and the next call."""
    model, path = build("gpt2"), tmp_path / "reference.safetensors"

    def full(tensors, where, **_):
        where.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            dpo.cached_log_probs(path, model, EXAMPLES, EOS)
    assert not path.exists()
    dpo.cached_log_probs(path, model, EXAMPLES, EOS)


def test_every_byte_of_a_cache_counts(tmp_path):
    """Each byte changed in turn: refused by name, or the same numbers."""
    model, path = build("gpt2"), tmp_path / "reference.safetensors"
    wanted, refused = dpo.cached_log_probs(path, model, EXAMPLES[:2], EOS), 0
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x40
        path.write_bytes(changed)
        try:
            found = dpo.cached_log_probs(path, model, EXAMPLES[:2], EOS)
        except ValueError as error:
            assert "delete it" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert torch.equal(found, wanted)
    assert refused > 0.9 * len(whole)


def test_a_cache_of_another_shape_or_type_is_refused(tmp_path):
    model, path = build("gpt2"), tmp_path / "reference.safetensors"
    numbers = dpo.cached_log_probs(path, model, EXAMPLES, EOS)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    odd = {"whole": numbers.int(), "double": numbers.double(), "short": numbers[1:]}
    odd |= {"turned": numbers.T.contiguous(), "nan": numbers * math.nan}
    for values in odd.values():
        save_file({"log_probs": values}, path, metadata=metadata)
        with pytest.raises(ValueError, match="no whole cache"):
            dpo.cached_log_probs(path, model, EXAMPLES, EOS)


def test_a_cached_run_is_the_same_run(tokenizer, tmp_path):
    """Oracle: weights after training, to the bit."""
    found = []
    for cache in (None, tmp_path / "ref.safetensors", tmp_path / "ref.safetensors"):
        policy = build("gpt2")
        data = dpo.encode(tokenizer, DATA)
        for _ in dpo.train(policy, tokenizer, data, Config(batch_size=2, epochs=2), cache=cache):
            pass
        found.append(policy.state_dict())
    for other in found[1:]:
        assert all(torch.equal(found[0][k], other[k]) for k in found[0])


def test_the_reference_of_an_adapter_is_the_model_under_it(tokenizer):
    """Oracle: a run on a plain reference given by hand: the rewards are β times log-ratios to the
    base model."""
    base = build("gpt2")
    torch.manual_seed(0)
    policy = lora_policy(copy.deepcopy(base))
    data = dpo.encode(tokenizer, DATA)
    config = Config(batch_size=4, epochs=6, learning_rate=1e-2, max_new_tokens=8)
    *_, last = dpo.train(policy, tokenizer, data, config, held_out=data[1:3])
    with torch.no_grad():
        now = torch.stack(
            [torch.stack([alone(policy, e.prompt, s) for s in e[1:3]]) for e in data[1:3]]
        )
        then = torch.stack(
            [torch.stack([alone(base, e.prompt, s) for s in e[1:3]]) for e in data[1:3]]
        )
    margin = config.beta * ((now - then)[:, 0] - (now - then)[:, 1]).mean()
    assert last.held_out.margin == pytest.approx(margin.item(), abs=1e-4)
    assert last.held_out.margin > 0.01
    assert last.held_out.chosen_log_prob == pytest.approx(now[:, 0].mean().item(), abs=1e-3)


def test_an_adapter_that_was_trained_before_is_refused(tokenizer, tmp_path):
    """Its cache would carry the name of the model under it, and hold the numbers of another
    policy."""
    policy, data = lora_policy(build("gpt2")), dpo.encode(tokenizer, DATA)
    path = tmp_path / "reference.safetensors"
    for _ in dpo.train(policy, tokenizer, data, Config(learning_rate=1e-2), cache=path):
        pass
    with pytest.raises(ValueError, match="adapter is not a fresh one"):
        next(dpo.train(policy, tokenizer, data, Config(), cache=path))


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_each_variant_learns_what_it_is_told(variant, tokenizer):
    """Oracle: the order of the data; one word decides, so pairs that were never seen can be ordered
    too."""
    texts = [f"{x} {y}" for x in "bcdefg" for y in "hijklm"]
    data = dpo.encode(tokenizer, [Comparison("p", (f"{t} a", f"{t} x")) for t in texts])
    config = Config(
        variant=variant,
        learning_rate=1e-2,
        epochs=6,
        batch_size=8,
        evaluate_every=5,
        max_new_tokens=8,
    )
    history = list(dpo.train(build("gpt2"), tokenizer, data[:24], config, held_out=data[24:]))
    assert [m.step for m in history] == list(range(1, 19))
    assert history[-1].held_out.accuracy == 1.0
    assert [m.step for m in history if m.held_out] == [5, 10, 15, 18]
    assert history[-1].kl > 0


def test_same_seed_same_weights_and_another_order_for_another(tokenizer):
    found = []
    for seed in (0, 0, 1):
        policy = build("gpt2")
        for _ in dpo.train(
            policy, tokenizer, dpo.encode(tokenizer, DATA), Config(batch_size=2, seed=seed)
        ):
            pass
        found.append(policy.transformer.wte.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_kl_is_measured_on_held_out_prompts(tokenizer, monkeypatch):
    """Oracle: the prompts that were passed, in tokens."""
    data, held_out = dpo.encode(tokenizer, DATA[:2]), dpo.encode(tokenizer, DATA[2:3])
    assert held_out[0].prompt not in [one.prompt for one in data]
    asked = []
    monkeypatch.setattr(dpo, "sampled_kl", lambda p, f, t, prompts, c: asked.append(prompts) or 0.0)
    config = dpo.Config(batch_size=1, evaluate_every=1, max_new_tokens=2)
    list(dpo.train(build("gpt2"), tokenizer, data, config, held_out))
    assert asked == [[held_out[0].prompt]] * 2


def test_the_sampled_kl_is_near_the_exact_one():
    """Oracle: the sum over all sequences."""
    language = enumerable.language(4, 3)
    policy, other = (enumerable.small_gpt2(4, 3, seed=s, spread=0.5) for s in (0, 1))
    log_probs, ref = (enumerable.model_log_probs(m, language).detach() for m in (policy, other))
    found = dpo.sampled_kl(
        policy,
        models.reference(other),
        enumerable.tokenizer(language),
        [[0]] * 4000,
        Config(max_new_tokens=3),
    )
    p = log_probs.exp()
    exact = enumerable.kl(log_probs, ref).item()
    scatter = ((p * (log_probs - ref - exact).square()).sum() / 4000).sqrt().item()
    assert found == pytest.approx(exact, abs=4 * scatter)


def exact_case(vocabulary=4, length=2, beta=0.5, seed=0):
    language = enumerable.language(vocabulary, length)
    policy = enumerable.small_gpt2(vocabulary, length, seed=seed, spread=0.5)
    reference = enumerable.model_log_probs(policy, language).detach().double()
    utilities = enumerable.utilities(language, seed)
    return (
        language,
        policy,
        reference,
        utilities,
        enumerable.optimal_policy(reference, utilities, beta),
    )


def test_online_dpo_finds_the_optimal_policy():
    """Oracle: π* in closed form for the judge's rewards."""
    language, policy, reference, utilities, best = exact_case()
    config = Config(
        learning_rate=1e-2,
        beta=0.5,
        iterations=80,
        prompts=64,
        samples_per_prompt=2,
        max_new_tokens=2,
    )
    judge = enumerable.reward(language, utilities)
    history = list(dpo.online(policy, enumerable.tokenizer(language), [""], judge, config))
    found = enumerable.model_log_probs(policy, language).detach().double()
    start = enumerable.kl(reference, best).item()
    assert enumerable.kl(found, best).item() < 0.05 * start
    assert history[0].kl == pytest.approx(0.0, abs=1e-6)
    exact = enumerable.kl(found, reference).item()
    assert history[-1].kl == pytest.approx(exact, abs=0.5)


def small_online(judge, iterations=4, **changes):
    policy = enumerable.small_gpt2(4, 2, seed=0, spread=0.5)
    tokenizer = enumerable.tokenizer(enumerable.language(4, 2))
    config = Config(iterations=iterations, prompts=8, max_new_tokens=2, batch_size=4, **changes)
    return dpo.online(policy, tokenizer, [""], judge, config)


def test_an_iteration_without_a_pair_is_skipped_and_counted():
    """Oracle: by hand; the judge ties in the first and third iteration, and the weights stay."""
    calls = []

    def judge(prompts, completions, **_):
        calls.append(len(prompts))
        return [float(len(calls) % 2 == 0 and i % 2) for i in range(len(prompts))]

    history = list(small_online(judge))
    assert [one.pairs > 0 for one in history] == [False, True, False, True]
    assert [math.isnan(one.loss) for one in history] == [True, False, True, False]
    assert all(math.isfinite(one.kl) for one in history)
    assert history[1].kl == pytest.approx(0.0, abs=1e-6)  # nothing was learned before


def test_ties_for_some_prompts_leave_the_others():
    judge = lambda prompts, completions, **_: [float(i == 1) for i in range(len(prompts))]  # noqa: E731
    assert all(one.pairs <= 1 for one in small_online(judge, samples_per_prompt=4))


def test_a_run_without_any_pair_says_why():
    """Oracle: by hand: ties, equal responses, one kept."""
    with pytest.raises(ValueError, match="equal scores to 32 of the prompts"):
        list(small_online(lambda prompts, completions, **_: [1.0] * len(prompts)))
    tokenizer = enumerable.tokenizer(enumerable.language(4, 2))
    silent = enumerable.small_gpt2(4, 2, seed=0, spread=0.5)
    with torch.no_grad():  # a constant hidden state whose likeliest token is the end
        for norm in (silent.transformer.ln_f.weight, silent.transformer.ln_f.bias):
            norm.zero_()
        silent.transformer.ln_f.bias.copy_(1000 * silent.lm_head.weight[0])
    judge = lambda prompts, completions, **_: [float(i) for i in range(len(prompts))]  # noqa: E731
    config = Config(iterations=1, prompts=3, max_new_tokens=2)
    with pytest.raises(ValueError, match="equal responses to 3 of the prompts"):
        list(dpo.online(silent, tokenizer, [""], judge, config))
    config = Config(samples_per_prompt=2, max_new_tokens=2, beta=1e-6)
    policy = enumerable.small_gpt2(4, 2, seed=0, spread=0.5)
    with pytest.raises(ValueError, match="one response to 5 of the prompts"):
        dpo.rejection_sampled(policy, tokenizer, [""] * 5, judge, config)


def test_what_rejection_sampling_keeps_comes_from_the_optimal_policy():
    """Oracle: π* in closed form; counts of what is kept, against their standard errors."""
    _, _, reference, utilities, best = exact_case()
    luck = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(reference.exp(), 400_000, replacement=True, generator=luck).view(
        1, -1
    )
    kept = dpo.accept(utilities[drawn], 0.5, luck)
    counts = torch.bincount(drawn[kept], minlength=len(best)).double()
    share, wanted = counts / counts.sum(), best.exp()
    error = (wanted * (1 - wanted) / counts.sum()).sqrt()
    assert ((share - wanted).abs() < 4.5 * error + 1e-4).all()
    assert not ((share - reference.exp()).abs() < 4.5 * error + 1e-4).all()


def test_the_best_sample_of_each_prompt_is_kept_however_well_others_do():
    """Oracle: by hand; the prompts are 50 apart, and the chance of a sample next to the best."""
    scores = normal(2, 4000).clamp(max=2.0) + torch.tensor([[0.0], [50.0]])
    scores[:, 0] += torch.tensor([2.0, 52.0]) - scores[:, 0]
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(dpo.accept(scores, 0.5, torch.Generator().manual_seed(0)))
    assert torch.equal(*found)
    assert found[0][:, 0].all()
    chance = ((scores - torch.tensor([[2.0], [52.0]])) / 0.5).exp()
    error = (chance * (1 - chance)).sum(1).sqrt()
    assert ((found[0].sum(1) - chance.sum(1)).abs() < 4 * error).all()


def test_sampling_uses_no_luck_but_its_own():
    """Oracle: the same call again, after draws from the global generator; another seed."""
    language, policy, _, utilities, _ = exact_case()
    tokenizer, judge = enumerable.tokenizer(language), enumerable.reward(language, utilities)
    frozen = models.reference(enumerable.small_gpt2(4, 2, seed=1, spread=0.5))
    found = []
    for seed, state in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(state)
        config = Config(beta=2.0, samples_per_prompt=8, max_new_tokens=2, seed=seed)
        pairs = dpo.rejection_sampled(policy, tokenizer, [""] * 20, judge, config)
        found.append((pairs, dpo.sampled_kl(policy, frozen, tokenizer, [[0]] * 20, config)))
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))


def test_soft_labels_count_in_what_is_said_of_held_out_pairs(tokenizer):
    """Oracle: the cross-entropy of the label, by hand."""
    policy = moved()
    data = [e._replace(preference=0.75) for e in dpo.encode(tokenizer, DATA)]
    log_probs, reference = (dpo.reference_log_probs(m, data, EOS) for m in (policy, build("gpt2")))
    gaps = 0.5 * (log_probs - reference)
    p = torch.sigmoid(gaps[:, 0] - gaps[:, 1])
    found = dpo.evaluate(policy, data, reference, EOS, Config(beta=0.5))
    wanted = -(0.75 * p.log() + 0.25 * (1 - p).log()).mean().item()
    assert found.loss == pytest.approx(wanted, abs=1e-5)


def test_rejection_sampled_pairs_are_labelled_by_the_judge():
    """Oracle: the utilities of the two sequences, by hand."""
    language, policy, _, utilities, _ = exact_case()
    tokenizer = enumerable.tokenizer(language)
    config = Config(beta=2.0, samples_per_prompt=32, max_new_tokens=2)
    judge = enumerable.reward(language, utilities)
    pairs = dpo.rejection_sampled(policy, tokenizer, [""] * 20, judge, config)
    assert 5 < len(pairs) <= 20
    for one in pairs:
        rows = [torch.tensor([[*side, 0, 0][:2]]) for side in one[1:3]]
        masks = [torch.arange(2)[None] < len(side) for side in one[1:3]]
        u = [
            utilities[enumerable.index_of(t, m, language)].item()
            for t, m in zip(rows, masks, strict=True)
        ]
        assert u[0] >= u[1]
        assert one.preference == pytest.approx(1 / (1 + math.exp(u[1] - u[0])), abs=1e-6)
        assert one.chosen != one.rejected
        assert one.prompt == [0]
    assert len({tuple(one.rejected) for one in pairs}) > 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_is_the_maximum_likelihood_fit(seed):
    """Oracle: strengths fitted to the same pairs by `fit_strengths`, put into the closed form of
    π*."""
    language, _, reference, utilities, best = exact_case(seed=seed)
    luck = torch.Generator().manual_seed(seed)
    uniform = torch.zeros_like(reference).log_softmax(0)
    first, second = enumerable.draw_pairs(uniform, 4000, luck)
    won = enumerable.label_pairs(utilities, first, second, luck)
    chosen, rejected = torch.where(won, first, second), torch.where(won, second, first)
    wins = torch.zeros(len(reference), len(reference), dtype=torch.float64)
    wins.index_put_((chosen, rejected), torch.ones(4000, dtype=torch.float64), accumulate=True)
    fitted = enumerable.optimal_policy(reference, preferences.fit_strengths(wins), 0.5)
    table = torch.nn.Parameter(
        enumerable.next_log_probs(enumerable.small_gpt2(4, 2, seed=seed, spread=0.5), language)
        .detach()
        .double()
    )

    def log_probs():
        return enumerable.sequence_log_probs(table, language)

    config = Config(learning_rate=0.1, epochs=60, batch_size=1000, beta=0.5, max_grad_norm=1e9)
    losses = list(dpo.train_exact(log_probs, [table], language, chosen, rejected, config))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-9)
    assert enumerable.kl(log_probs(), fitted).item() < 1e-3
    assert enumerable.kl(reference, best).item() > 0.3


def test_the_side_that_most_prefer_is_the_chosen_one(tokenizer):
    """Oracle: by hand."""
    data = [DATA[0]._replace(preference=p) for p in (0.2, 0.5, 0.8)]
    found = dpo.encode(tokenizer, data)
    assert [one.preference for one in found] == pytest.approx([0.8, 0.5, 0.8])
    assert [len(one.chosen) for one in found] == [2, 4, 4]  # "f" and "c d e", with their ends
    assert all(one.prompt == [1, 2] and one.chosen[-1] == EOS for one in found)


# --- bad input -----------------------------------------------------------------------------------


def test_bad_pairs_are_named(tokenizer):
    cases = [
        ([], "data is empty"),
        ([Comparison("a", ("b", "c", "d"))], r"data\[0\] has 3 responses"),
        ([DATA[0], Comparison("a", ("b", "c"), margin=1.0)], r"data\[1\] has a margin"),
        ([DATA[0]._replace(weight=2.0)], r"data\[0\] has a margin or a weight"),
        ([Comparison("a", ("b", ""))], "empty response"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            dpo.encode(tokenizer, data)


BAD = [
    ({"variant": "ppo"}, "variant='ppo'"),
    ({"beta": 0.0}, "beta"),
    ({"learning_rate": -1.0}, "learning_rate"),
    ({"batch_size": 0}, "batch_size"),
    ({"micro_batch": 0}, "micro_batch"),
    ({"warm_up": 2.0}, "warm_up"),
    ({"label_smoothing": 1.2}, "label_smoothing"),
    ({"variant": "ipo", "label_smoothing": 0.1}, "takes labels that are 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_named(change, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        next(dpo.train(build("gpt2"), tokenizer, dpo.encode(tokenizer, DATA), Config(**change)))


def test_labels_that_a_variant_cannot_use_are_refused(tokenizer):
    soft = dpo.encode(tokenizer, [one._replace(preference=0.8) for one in DATA])
    for variant in ("ipo", "hinge", "simpo"):
        with pytest.raises(ValueError, match="takes labels that are 1"):
            next(dpo.train(build("gpt2"), tokenizer, soft, Config(variant=variant)))
    judge = lambda prompts, completions, **_: [0.0] * len(prompts)  # noqa: E731
    with pytest.raises(ValueError, match="takes labels that are 1"):
        next(dpo.online(build("gpt2"), tokenizer, ["a"], judge, Config(variant="ipo")))
    with pytest.raises(ValueError, match="prompts must be"):
        next(dpo.online(build("gpt2"), tokenizer, [], judge, Config()))
    with pytest.raises(ValueError, match="samples_per_prompt must be 2"):
        next(dpo.online(build("gpt2"), tokenizer, ["a"], judge, Config(samples_per_prompt=1)))


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer):
    model = build("gpt2")
    data = dpo.encode(tokenizer, DATA)
    run = dpo.train(model, tokenizer, data, Config(batch_size=2))
    next(run)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.inf
    with pytest.raises(TrainingStopped, match=r"log_probs holds a NaN .* lower learning_rate"):
        list(run)


def test_a_gradient_that_is_not_finite_costs_no_weights(tokenizer):
    """Oracle: the weights before the step."""
    model = build("gpt2")
    data = dpo.encode(tokenizer, DATA)
    run = dpo.train(model, tokenizer, data, Config(batch_size=2))
    next(run)
    model.transformer.ln_f.bias.register_hook(lambda gradient: gradient * math.nan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingStopped, match="gradient holds a NaN"):
        list(run)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
