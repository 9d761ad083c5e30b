"""TRL's own losses, driven with plain tensors: its trainers without what makes them trainers. They
are oracles; nothing of ours is called here."""

from collections import defaultdict
from types import SimpleNamespace

import torch


def same(x, **_):
    return x


def grpo_loss(
    log_probs,
    old,
    advantages,
    mask,
    clip,
    clip_high,
    delta,
    ref=None,
    beta=0.0,
    loss_type="bnpo",
    importance="token",
    longest=None,
    bias_correct=False,
):
    """TRL's GRPO loss driven with plain tensors; "bnpo" is the mean over the batch's tokens, as in
    PPO."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = object.__new__(GRPOTrainer)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        log_probs,
        torch.zeros_like(log_probs),
        None,
    )
    trainer.aux_loss_enabled = trainer.use_vllm = trainer._entropy_bonus_enabled = False
    trainer.vllm_importance_sampling_correction = False
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold, trainer.beta = 1.0, None, beta
    trainer.importance_sampling_level, trainer.loss_type = importance, loss_type
    trainer.max_completion_length = longest
    trainer.epsilon_low, trainer.epsilon_high = clip, clip if clip_high is None else clip_high
    trainer.args = SimpleNamespace(
        delta=delta, use_bias_correction_kl=bias_correct, steps_per_generation=1
    )
    trainer.model, trainer.current_gradient_accumulation_steps = SimpleNamespace(training=True), 1
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=same, gather_for_metrics=same, reduce=same
    )
    names = ["kl", "entropy", "low_mean", "high_mean", "region_mean", "low_min", "high_max"]
    trainer._metrics = {
        "train": {name if name in ("kl", "entropy") else f"clip_ratio/{name}": [] for name in names}
    }
    ids = torch.zeros(log_probs.shape, dtype=torch.int64)
    batch = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    batch |= {
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    return loss, trainer._metrics["train"]["clip_ratio/region_mean"][0]


def dpo_loss(log_probs, reference, beta, variant, smoothing=0.0):
    """TRL's DPO loss of log-probabilities [2, N], those of the chosen first."""
    from trl import DPOTrainer

    count = log_probs.numel()
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[variant],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(),
    )
    outputs = SimpleNamespace(
        log_probs=log_probs.reshape(count, 1),
        entropy=torch.zeros(count, 1),
        mean_logits=torch.zeros(count, 1),
        is_top1=torch.zeros(count, 1, dtype=torch.bool),
        loss=None,
    )
    inputs = {
        "input_ids": torch.zeros(count, 2, dtype=torch.long),
        "attention_mask": torch.ones(count, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * count),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, False)


def cpo_loss(loss_type, beta, log_probs, label_smoothing=0.0, gamma=0.0):
    """TRL's CPO losses of log-ratios (or of mean log-probabilities, for "simpo")."""
    from trl.experimental.cpo import CPOTrainer

    stub = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=gamma,
    )
    return CPOTrainer.cpo_loss(stub, *log_probs)[0].mean()


def reward_loss(scores, margin=None):
    """TRL's reward-model loss of scores [2, N], those of the chosen first."""
    from trl.trainer.reward_trainer import RewardTrainer

    trainer = object.__new__(RewardTrainer)
    trainer.model, trainer.args = SimpleNamespace(training=False), SimpleNamespace()
    trainer.args.center_rewards_coefficient = None
    trainer.accelerator = SimpleNamespace(gather=same, gather_for_metrics=same)
    trainer._metrics, trainer._total_train_tokens = {"eval": defaultdict(list)}, 0
    outputs = SimpleNamespace(logits=scores.reshape(scores.numel(), 1))
    inputs = {} if margin is None else {"margin": margin}
    return RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
