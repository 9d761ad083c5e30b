"""Famous bugs, each as a wrong and a right function of a few lines and a check that only the right
one passes. `experiments.errors` measures what they do to a run; the page is built from both."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax


class Bug(NamedTuple):
    """One bug of the collection."""

    name: str  # of its place on the page
    title: str
    symptoms: tuple[str, ...]  # what somebody sees who has it, as they would search for it
    wrong: Callable
    right: Callable
    check: Callable[[Callable], None]  # AssertionError for the wrong one
    shows: str  # the diagnostic that gives it away
    test: str  # of the package, which watches the same place
    chapter: str  # where the book treats it
    hidden: int  # 1: seen at once, 2: seen by who looks, 3: nothing looks wrong for a whole run


BUGS: list[Bug] = []


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- tokens and masks ----------------------------------------------------------------------------


def wrong_labels(tokens: Tensor, mask: Tensor, pad: int) -> Tensor:
    return tokens.masked_fill(tokens == pad, -100)  # pad is the end token, too


def right_labels(tokens: Tensor, mask: Tensor, pad: int) -> Tensor:
    return tokens.masked_fill(mask == 0, -100)


def check_labels(labels: Callable) -> None:
    """The end token of a response is trained, the padding behind it is not."""
    tokens, mask = torch.tensor([[5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 0]])
    close(labels(tokens, mask, 0), torch.tensor([[5, 6, 0, -100]]))


BUGS.append(
    Bug(
        name="padding-is-the-end",
        title="Padding found by its token hides the end token, too",
        symptoms=("responses never end", "every response is cut off at the limit"),
        wrong=wrong_labels,
        right=right_labels,
        check=check_labels,
        shows="the share of responses that end, before and after training",
        test="tests/test_sft.py::test_the_end_is_trained_though_it_is_the_pad_token",
        chapter="sft_lora",
        hidden=3,
    )
)


def wrong_scores(scores: Tensor, mask: Tensor) -> Tensor:
    return scores[:, -1]  # padded on the right: this is a padding token


def right_scores(scores: Tensor, mask: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return scores.gather(1, last[:, None]).squeeze(1)


def check_scores(read: Callable) -> None:
    """The score of a text does not depend on its neighbours in the batch."""
    scores = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    close(read(scores, mask), torch.tensor([2.0, 5.0]))


BUGS.append(
    Bug(
        name="score-of-the-padding",
        title="The reward model's score is read at the padding",
        symptoms=("a text's score changes with its batch", "reward model at chance"),
        wrong=wrong_scores,
        right=right_scores,
        check=check_scores,
        shows="score one text alone, then beside a longer one",
        test="tests/test_reward_model.py::test_the_score_is_that_of_the_text_alone",
        chapter="reward_model",
        hidden=3,
    )
)


def wrong_logits(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    return model(tokens, attention_mask=mask).logits  # positions count the padding


def right_logits(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(tokens, attention_mask=mask, position_ids=positions).logits


def check_logits(logits: Callable) -> None:
    """A prompt padded on the left is read as it is read alone."""
    from rlhf_helpers.worlds import enumerable

    model = enumerable.small_gpt2(5, 6, seed=1)
    tokens, mask = torch.tensor([[0, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        close(logits(model, tokens, mask)[:, 2:], model(tokens[:, 2:]).logits)


BUGS.append(
    Bug(
        name="positions-of-the-padding",
        title="Left padding without position ids",
        symptoms=("log-probabilities change with the batch", "the first ratio is not 1"),
        wrong=wrong_logits,
        right=right_logits,
        check=check_logits,
        shows="log-probabilities of one prompt alone and in a batch",
        test="tests/test_completion_log_probs.py::test_a_batch_gives_the_values_and_gradients_of_each_sequence_alone",
        chapter="token_mdp",
        hidden=3,
    )
)


def wrong_token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits and tokens [N, T] of whole texts."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def right_token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits and tokens [N, T] of whole texts."""
    logits, tokens = logits[:, :-1], tokens[:, 1:]  # a position predicts the next token
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def check_token_log_probs(log_probs: Callable) -> None:
    """A model that is sure of the next token has log-probability 0 for it."""
    tokens = torch.tensor([[1, 2, 0]])
    sure = 50 * torch.eye(3)[torch.tensor([[2, 0, 1]])]
    assert log_probs(sure, tokens).sum() > -1


BUGS.append(
    Bug(
        name="off-by-one",
        title="Logits of a token compared with that same token",
        symptoms=("the first loss is far too high", "the loss falls to 0", "the model repeats"),
        wrong=wrong_token_log_probs,
        right=right_token_log_probs,
        check=check_token_log_probs,
        shows="the loss before the first step: it must be the model's cross-entropy",
        test="tests/test_sft.py::test_the_loss_by_hand",
        chapter="sft_lora",
        hidden=1,
    )
)


def wrong_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).mean()  # padding counts in the denominator


def right_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def check_mean(mean: Callable) -> None:
    """More padding changes nothing."""
    values, mask = torch.tensor([[2.0, 4.0]]), torch.ones(1, 2)
    padded = torch.cat([values, torch.zeros(1, 2)], 1), torch.cat([mask, torch.zeros(1, 2)], 1)
    close(mean(*padded), mean(values, mask))


BUGS.append(
    Bug(
        name="mean-over-padding",
        title="A mean that counts the padding",
        symptoms=("the learning rate seems to depend on the batch", "long texts slow learning"),
        wrong=wrong_mean,
        right=right_mean,
        check=check_mean,
        shows="the same batch with ten more columns of padding: the loss must not move",
        test="tests/test_logprobs.py::test_masked_mean_counts_tokens_not_rows",
        chapter="sft_lora",
        hidden=3,
    )
)


def wrong_repeat(prompts: list[str], n: int) -> list[str]:
    return prompts * n  # a, b, a, b: but the samples come as a, a, b, b


def right_repeat(prompts: list[str], n: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(n)]


def check_repeat(repeat: Callable) -> None:
    """Samples of one prompt are neighbours."""
    assert repeat(["a", "b"], 2) == ["a", "a", "b", "b"]


BUGS.append(
    Bug(
        name="rows-in-another-order",
        title="Prompts repeated in another order than their samples",
        symptoms=("the reward does not rise", "right answers are pushed down"),
        wrong=wrong_repeat,
        right=right_repeat,
        check=check_repeat,
        shows="print three rows: prompt, response, reward, advantage",
        test="tests/test_rollout.py::test_samples_of_a_prompt_are_neighbours_and_each_prompt_is_run_once",
        chapter="grpo",
        hidden=2,
    )
)


def wrong_joined(prompt: str, response: str) -> str:
    return prompt.strip() + response.strip()


def right_joined(prompt: str, response: str) -> str:
    return prompt + response  # the response brings its own space


def check_joined(joined: Callable) -> None:
    """The words of the text are those of its parts."""
    assert joined("I think it's", " excellent.").split() == ["I", "think", "it's", "excellent."]


BUGS.append(
    Bug(
        name="no-space",
        title="Prompt and response are joined without the space",
        symptoms=("a good word earns nothing", "the reward does not change"),
        wrong=wrong_joined,
        right=right_joined,
        check=check_joined,
        shows="print the text that is scored",
        test="tests/test_texts_and_tokens.py::test_spaces_at_the_border_are_those_of_the_tokens",
        chapter="reward_model",
        hidden=2,
    )
)


def wrong_judged(reward: Callable, prompts: list[str], responses: list[str]) -> list[float]:
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return reward(prompts, texts)  # pays for words that the policy did not write


def right_judged(reward: Callable, prompts: list[str], responses: list[str]) -> list[float]:
    return reward(prompts, responses)


def check_judged(judged: Callable) -> None:
    """An empty response earns nothing, whatever the prompt says."""
    from rlhf_helpers.rewards import sentiment_words

    assert judged(sentiment_words, ["I love this great film"], [""]) == [0.0]


BUGS.append(
    Bug(
        name="prompt-is-paid",
        title="The reward scores the prompt along with the response",
        symptoms=("high reward before a word is written", "some prompts always win"),
        wrong=wrong_judged,
        right=right_judged,
        check=check_judged,
        shows="the reward of the empty response",
        test="tests/test_rewards.py::test_only_relevance_reads_the_prompt",
        chapter="gpt2_sentiment_ppo",
        hidden=2,
    )
)


# --- sampling and scoring ------------------------------------------------------------------------


def wrong_mode(model: nn.Module) -> nn.Module:
    return model.train()  # dropout on: another network than the one that sampled


def right_mode(model: nn.Module) -> nn.Module:
    return model.eval()


def check_mode(mode: Callable) -> None:
    """The same input twice gives the same output."""
    model = mode(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1)))
    x = torch.ones(64, 8)
    close(model(x), model(x))


BUGS.append(
    Bug(
        name="dropout",
        title="Dropout is on when the samples are scored",
        symptoms=("the first ratio is not 1", "samples are clipped before the first step"),
        wrong=wrong_mode,
        right=right_mode,
        check=check_mode,
        shows="the first ratio of an iteration",
        test="tests/test_ppo.py::test_a_first_ratio_other_than_one_stops_the_run",
        chapter="gpt2_sentiment_ppo",
        hidden=2,
    )
)


def wrong_scored(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of tokens that were drawn at a temperature."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def right_scored(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of tokens that were drawn at a temperature."""
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def check_scored(scored: Callable) -> None:
    """The shares of many draws are the probabilities that the draws are scored with."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = torch.tensor([[0], [1], [2]])
    expected = softmax(logits / 0.5, -1).log().squeeze(0)
    close(scored(logits[None].expand(3, 1, 3), drawn, 0.5).squeeze(1), expected)


BUGS.append(
    Bug(
        name="two-temperatures",
        title="Sampled at one temperature, scored at another",
        symptoms=("the first ratio is not 1", "KL is negative"),
        wrong=wrong_scored,
        right=right_scored,
        check=check_scored,
        shows="the KL of the untrained policy to itself: it must be 0",
        test="tests/test_ppo.py::test_the_log_probs_of_training_are_those_of_sampling",
        chapter="gpt2_sentiment_ppo",
        hidden=2,
    )
)


def wrong_precision(logits: Tensor) -> Tensor:
    return logits.bfloat16().log_softmax(-1).float()


def right_precision(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def check_precision(log_probs: Callable) -> None:
    """Probabilities add up to 1 to a thousandth."""
    logits = torch.linspace(-5, 5, 500)
    assert abs(log_probs(logits).exp().sum().item() - 1) < 1e-3


BUGS.append(
    Bug(
        name="half-precision",
        title="Log-probabilities in half precision",
        symptoms=("the first ratio is not 1", "ratios jump about on long responses"),
        wrong=wrong_precision,
        right=right_precision,
        check=check_precision,
        shows="the first ratio, and its spread over whole responses",
        test="tests/test_logprobs.py::test_half_precision_logits_are_scored_in_higher_precision",
        chapter="gpt2_sentiment_ppo",
        hidden=2,
    )
)


def wrong_old(log_probs: Callable, steps: int, step: Callable) -> None:
    for _ in range(steps):
        old = log_probs().detach()  # taken anew: the ratio is always 1
        step(log_probs(), old)


def right_old(log_probs: Callable, steps: int, step: Callable) -> None:
    old = log_probs().detach()  # once, when the samples are drawn
    for _ in range(steps):
        step(log_probs(), old)


def check_old(loop: Callable) -> None:
    """After the first step the ratio is no longer 1."""
    policy, ratios = torch.zeros(2, requires_grad=True), []

    def step(new: Tensor, old: Tensor) -> None:
        ratios.append((new - old).exp().item())
        with torch.no_grad():
            policy[0] += 1

    loop(lambda: policy.log_softmax(-1)[0], 2, step)
    assert ratios[1] > 1.1


BUGS.append(
    Bug(
        name="old-taken-anew",
        title="The old log-probabilities are computed anew in each pass",
        symptoms=("the ratio is always 1", "the clip fraction is 0", "the policy runs away"),
        wrong=wrong_old,
        right=right_old,
        check=check_old,
        shows="the ratio in the second pass: it must differ from 1",
        test="tests/test_ppo.py::test_the_gradient_is_that_of_the_objective_written_out",
        chapter="contextual_bandit_ppo",
        hidden=2,
    )
)


def wrong_anchor(policies: list[nn.Module]) -> list[nn.Module]:
    """The reference of each iteration, from the policy at its start."""
    return [copy.deepcopy(policy) for policy in policies]  # the anchor moves along


def right_anchor(policies: list[nn.Module]) -> list[nn.Module]:
    """The reference of each iteration, from the policy at its start."""
    return [copy.deepcopy(policies[0])] * len(policies)


def check_anchor(references: Callable) -> None:
    """The second iteration is compared with where the run began."""
    policies = [nn.Linear(1, 1), nn.Linear(1, 1)]
    close(references(policies)[1].weight, policies[0].weight)


BUGS.append(
    Bug(
        name="reference-refreshed",
        title="The reference is copied from the policy in every iteration",
        symptoms=("KL is always 0", "reward rises and texts get worse"),
        wrong=wrong_anchor,
        right=right_anchor,
        check=check_anchor,
        shows="the KL to the model the run began with, measured on the side",
        test="tests/test_ppo.py::test_the_reference_stays_and_the_policy_moves",
        chapter="gpt2_sentiment_ppo",
        hidden=3,
    )
)


def wrong_trained(attention: Tensor, prompt_length: int) -> Tensor:
    return attention[:, 1:]  # all tokens, as if the policy had written the prompt


def right_trained(attention: Tensor, prompt_length: int) -> Tensor:
    trained = attention.clone()
    trained[:, :prompt_length] = 0
    return trained[:, 1:]


def check_trained(mask: Callable) -> None:
    """Of two tokens of a prompt and two of a response, the two of the response are trained."""
    close(mask(torch.ones(1, 4), 2), torch.tensor([[0.0, 1.0, 1.0]]))


BUGS.append(
    Bug(
        name="prompt-is-trained",
        title="The tokens of the prompt are trained as if they were the response",
        symptoms=("the loss falls, the answers do not improve", "the model writes prompts"),
        wrong=wrong_trained,
        right=right_trained,
        check=check_trained,
        shows="count the trained tokens of one row, and decode them",
        test="tests/test_sft.py::test_the_loss_is_the_librarys_cross_entropy",
        chapter="sft_lora",
        hidden=3,
    )
)

# --- the objective -------------------------------------------------------------------------------


def wrong_clip(ratio: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.max(ratio * advantage, clipped * advantage).mean()


def right_clip(ratio: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantage, clipped * advantage).mean()


def check_clip(loss: Callable) -> None:
    """A good action that has become likely enough gets no further push."""
    ratio = torch.tensor([1.5], requires_grad=True)
    loss(ratio, torch.tensor([1.0])).backward()
    assert ratio.grad.item() == 0


BUGS.append(
    Bug(
        name="optimistic-clip",
        title="The larger of the two terms instead of the smaller",
        symptoms=("clipping does not hold the policy back", "KL jumps within one batch"),
        wrong=wrong_clip,
        right=right_clip,
        check=check_clip,
        shows="the approximate KL after many passes over one batch",
        test="tests/test_losses.py::test_the_four_cases_of_clipping",
        chapter="contextual_bandit_ppo",
        hidden=2,
    )
)


def wrong_entropy(logits: Tensor, actions: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(1)
    return -(log_probs.exp() * log_probs).mean()  # weights the samples a second time


def right_entropy(logits: Tensor, actions: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


def check_entropy(entropy: Callable) -> None:
    """The uniform policy over four actions has log 4."""
    close(entropy(torch.zeros(8, 4), torch.arange(8) % 4), torch.tensor(4.0).log())


BUGS.append(
    Bug(
        name="entropy-of-the-samples",
        title="An entropy over the sampled tokens only",
        symptoms=("the entropy bonus does not help", "the entropy is far too small"),
        wrong=wrong_entropy,
        right=right_entropy,
        check=check_entropy,
        shows="the entropy of a uniform policy: it must be log V",
        test="tests/test_logprobs.py::test_entropy_of_known_distributions",
        chapter="kl_and_critics",
        hidden=3,
    )
)


def wrong_actor(log_probs: Tensor, rewards: Tensor, values: Tensor) -> Tensor:
    return -(log_probs * (rewards - values)).mean()  # trains the critic, too


def right_actor(log_probs: Tensor, rewards: Tensor, values: Tensor) -> Tensor:
    return -(log_probs * (rewards - values).detach()).mean()


def check_actor(loss: Callable) -> None:
    """The policy's loss gives the critic no gradient."""
    values = torch.zeros(2, requires_grad=True)
    log_probs = torch.tensor([-0.5, -1.0], requires_grad=True)
    loss(log_probs, torch.ones(2), values).backward()
    assert values.grad is None or not values.grad.any()


BUGS.append(
    Bug(
        name="advantage-with-gradient",
        title="The policy's loss trains the critic",
        symptoms=("values are too high", "explained variance stays low"),
        wrong=wrong_actor,
        right=right_actor,
        check=check_actor,
        shows="the mean of value minus return: it must go to 0",
        test="tests/test_losses.py::test_what_is_constant_gets_no_gradient",
        chapter="kl_and_critics",
        hidden=3,
    )
)


def wrong_deltas(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    return (rewards + after - values) * mask  # the value of what follows the end


def right_deltas(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    values = values * mask  # nothing is earned after the end
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    return (rewards + after - values) * mask


def check_deltas(deltas: Callable) -> None:
    """At the end the surprise is reward minus value."""
    rewards, mask = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, 0.7, 9.0]])
    close(deltas(rewards, values, mask), torch.tensor([[0.2, 0.3, 0.0]]))


BUGS.append(
    Bug(
        name="value-after-the-end",
        title="The value of the padding counts as the future",
        symptoms=("advantages of last tokens are large",),
        wrong=wrong_deltas,
        right=right_deltas,
        check=check_deltas,
        shows="the sum of the surprises of a response: reward minus first value",
        test="tests/test_advantages.py::test_garbage_after_the_end_does_not_leak",
        chapter="token_mdp",
        hidden=3,
    )
)


def wrong_price(log_probs: Tensor, reference: Tensor) -> Tensor:
    return (log_probs - reference).mean()  # k1 as a loss: its expected gradient is zero


def right_price(log_probs: Tensor, reference: Tensor) -> Tensor:
    gap = log_probs - reference
    return (gap.detach() * log_probs).mean()  # as a reward: the gradient of the KL


def check_price(price: Callable) -> None:
    """The gradient over all actions, each as often as it is drawn, is that of the KL."""
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    log_probs = logits.log_softmax(-1)
    weights = log_probs.detach().exp() * 3  # makes the mean an expectation
    found = torch.zeros(3, dtype=torch.float64)
    for a in range(3):
        one = price(log_probs[a : a + 1], reference[a : a + 1])
        found += weights[a] / 3 * torch.autograd.grad(one, logits, retain_graph=True)[0]
    kl = (log_probs.exp() * (log_probs - reference)).sum()
    close(found, torch.autograd.grad(kl, logits)[0])


BUGS.append(
    Bug(
        name="k1-as-a-loss",
        title="The plain log-ratio added to the loss as a price of KL",
        symptoms=("the KL coefficient does nothing", "KL grows at any price"),
        wrong=wrong_price,
        right=right_price,
        check=check_price,
        shows="train on the price alone, from far away: the KL must fall",
        test="tests/test_kl.py::test_gradient_of_each_estimate_used_as_a_loss",
        chapter="kl_and_critics",
        hidden=3,
    )
)


def wrong_sign(scores: Tensor, log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    return scores - beta * (reference - log_probs)  # pays for drifting


def right_sign(scores: Tensor, log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    return scores - beta * (log_probs - reference)


def check_sign(reward: Callable) -> None:
    """What the policy says more often than the reference costs something."""
    assert reward(torch.zeros(1), torch.tensor([-1.0]), torch.tensor([-2.0]), 0.1).item() < 0


BUGS.append(
    Bug(
        name="sign-of-the-price",
        title="Reference minus policy instead of policy minus reference",
        symptoms=("KL is negative", "KL grows from the first step"),
        wrong=wrong_sign,
        right=right_sign,
        check=check_sign,
        shows="the sign of the logged KL: its mean over many samples cannot be negative",
        test="tests/test_ppo.py::test_the_reward_of_each_token_by_hand",
        chapter="gpt2_sentiment_ppo",
        hidden=1,
    )
)


def wrong_reference(policy: nn.Module) -> nn.Module:
    return policy  # a second name for the same weights


def right_reference(policy: nn.Module) -> nn.Module:
    return copy.deepcopy(policy).requires_grad_(False)


def check_reference(reference: Callable) -> None:
    """Training leaves the reference as it was."""
    policy = nn.Linear(1, 1)
    frozen, before = reference(policy), policy.weight.item()
    with torch.no_grad():
        policy.weight += 1
    assert frozen.weight.item() == before


BUGS.append(
    Bug(
        name="reference-is-the-policy",
        title="The reference is another name of the policy",
        symptoms=("DPO's loss stays at 0.693", "KL is always 0", "texts fall apart"),
        wrong=wrong_reference,
        right=right_reference,
        check=check_reference,
        shows="the KL after ten steps: it must not be exactly 0",
        test="tests/test_models.py::test_the_reference_of_a_plain_model_is_a_copy_that_stays",
        chapter="dpo_derivation",
        hidden=3,
    )
)


def wrong_lengths(losses: Tensor, mask: Tensor) -> Tensor:
    return ((losses * mask).sum(1) / mask.sum(1)).mean()  # a token of a long answer counts less


def right_lengths(losses: Tensor, mask: Tensor) -> Tensor:
    return (losses * mask).sum() / mask.sum()


def check_lengths(mean: Callable) -> None:
    """A token weighs the same in a short and in a long answer."""
    losses = torch.ones(2, 4, requires_grad=True)
    mean(losses, torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])).backward()
    close(losses.grad[0, 0], losses.grad[1, 0])


BUGS.append(
    Bug(
        name="long-wrong-answers",
        title="Each answer's loss is divided by its own length",
        symptoms=("wrong answers get longer",),
        wrong=wrong_lengths,
        right=right_lengths,
        check=check_lengths,
        shows="the length of right and of wrong answers, drawn apart",
        test="tests/test_losses.py::test_a_token_of_a_long_sequence_weighs_less_in_grpo_alone",
        chapter="grpo",
        hidden=3,
    )
)


def wrong_advantages(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


def right_advantages(rewards: Tensor) -> Tensor:
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def check_advantages(advantages: Callable) -> None:
    """Equal rewards teach nothing."""
    assert not advantages(torch.full((8,), 0.1)).any()


BUGS.append(
    Bug(
        name="equal-rewards",
        title="A group of equal rewards divided by next to nothing",
        symptoms=("the policy drifts though all rewards are equal",),
        wrong=wrong_advantages,
        right=right_advantages,
        check=check_advantages,
        shows="the advantages of eight rewards of 0.1: they must be exactly 0",
        test="tests/test_advantages.py::test_a_constant_group_gives_exactly_zero",
        chapter="grpo",
        hidden=3,
    )
)


# --- models --------------------------------------------------------------------------------------


def wrong_adapter(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rank, inputs), torch.zeros(outputs, rank)  # neither ever moves


def right_adapter(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, inputs) / inputs**0.5, torch.zeros(outputs, rank)


def check_adapter(adapter: Callable) -> None:
    """The product starts at 0, and one of the two has a gradient."""
    a, b = (part.requires_grad_() for part in adapter(4, 3, 2))
    assert not (b @ a).any()
    (b @ a).sum().backward()
    assert a.grad.any() or b.grad.any()


BUGS.append(
    Bug(
        name="adapter-of-zeros",
        title="Both matrices of an adapter start at zero",
        symptoms=("the loss does not move", "the gradient norm is 0"),
        wrong=wrong_adapter,
        right=right_adapter,
        check=check_adapter,
        shows="the gradient norm of the first step",
        test="tests/test_models.py::test_a_fresh_policy_is_the_model_and_trains_only_its_attention",
        chapter="sft_lora",
        hidden=1,
    )
)


def wrong_loaded(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(weights, strict=False)  # what does not fit is left out
    return model


def right_loaded(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(weights)
    return model


def check_loaded(load: Callable) -> None:
    """A head that is missing from the file is an error."""
    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "score": nn.Linear(2, 1)})
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("score")}
    try:
        load(model, weights)
    except RuntimeError:
        return
    raise AssertionError("a missing head was loaded in silence")


BUGS.append(
    Bug(
        name="head-left-out",
        title="Weights that do not fit are left out in silence",
        symptoms=("all rewards are equal", "a saved reward model is at chance"),
        wrong=wrong_loaded,
        right=right_loaded,
        check=check_loaded,
        shows="the held-out accuracy of the model that was loaded, not of the one in memory",
        test="tests/test_models.py::test_a_folder_without_all_weights_or_with_others_is_refused_by_name",
        chapter="reward_model",
        hidden=2,
    )
)


# --- measuring -----------------------------------------------------------------------------------


def wrong_pass_at_k(right: int, samples: int, k: int) -> float:
    return 1 - (1 - right / samples) ** k  # draws the same answer twice


def right_pass_at_k(right: int, samples: int, k: int) -> float:
    miss = 1.0
    for i in range(k):
        miss *= max(0, samples - right - i) / (samples - i)
    return 1 - miss


def check_pass(pass_at_k: Callable) -> None:
    """With one right answer of two, both answers surely hold it."""
    assert pass_at_k(1, 2, 2) == 1


BUGS.append(
    Bug(
        name="answers-put-back",
        title="pass@k from the share of right answers",
        symptoms=("pass@k is too low",),
        wrong=wrong_pass_at_k,
        right=right_pass_at_k,
        check=check_pass,
        shows="k equal to the number of samples: it must be 1 as soon as one is right",
        test="tests/test_arithmetic.py::test_pass_at_k_is_the_chance_that_one_of_k_is_right",
        chapter="grpo",
        hidden=3,
    )
)


def wrong_checker(answer: str, completion: str) -> float:
    return float(answer in completion)


def right_checker(answer: str, completion: str) -> float:
    return float(completion.strip().split("=")[-1] == answer)


def check_checker(checker: Callable) -> None:
    """A text that lists all numbers is no answer."""
    assert checker("95", "15+80=95") == 1
    assert checker("95", " ".join(map(str, range(100)))) == 0


BUGS.append(
    Bug(
        name="answer-somewhere",
        title="A checker that looks for the answer anywhere",
        symptoms=("reward rises and texts get worse", "answers get longer and odd"),
        wrong=wrong_checker,
        right=right_checker,
        check=check_checker,
        shows="read ten answers that were paid; a second checker that nobody trains on",
        test="tests/test_arithmetic.py::test_naming_every_number_fools_the_weak_checker_alone",
        chapter="grpo",
        hidden=2,
    )
)


def wrong_compared(before: list[float], after: list[float]) -> bool:
    """One sample of four training prompts each."""
    return sum(after[:4]) > sum(before[:4])


def right_compared(before: list[float], after: list[float]) -> bool:
    """The mean difference on held-out prompts, and its 95 % interval."""
    gain = torch.tensor(after) - torch.tensor(before)
    return bool(gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5)


def check_compared(compared: Callable) -> None:
    """A model against itself improves in 2.5 % of such comparisons."""
    draws = torch.randn(400, 2, 64, generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(compared(before, after) for before, after in draws) / 400 < 0.06


BUGS.append(
    Bug(
        name="four-prompts",
        title="Before and after on four training prompts",
        symptoms=("nobody else can reproduce the gain",),
        wrong=wrong_compared,
        right=right_compared,
        check=check_compared,
        shows="the untrained model against itself",
        test="tests/test_ppo.py::test_an_evaluation_samples_judges_and_learns_nothing",
        chapter="gpt2_sentiment_ppo",
        hidden=2,
    )
)
