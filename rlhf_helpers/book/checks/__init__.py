"""The exercises check themselves: each chapter's checks are in a file of their own."""

from rlhf_helpers.book.checks.chapter_01 import (
    check_bandit_gradient,
    check_batch_mean_factor,
    check_leave_one_out,
    check_policy_gradient_loss,
)
from rlhf_helpers.book.checks.chapter_02 import (
    check_clipped_objective,
    check_effective_sample_size,
    check_four_slopes,
    check_mended_loss,
)
from rlhf_helpers.book.checks.chapter_03 import (
    check_batches_to_double,
    check_categorical_kl,
    check_fisher_product,
    check_line_search,
)
from rlhf_helpers.book.checks.chapter_04 import (
    check_first_credit,
    check_gae,
    check_mean_entropy,
    check_third_estimate,
    check_two_losses,
)
from rlhf_helpers.book.checks.chapter_05 import (
    check_lora_size,
    check_loss_mask,
    check_nucleus,
    check_perplexity,
    check_sequence_log_prob,
)
from rlhf_helpers.book.checks.chapter_06 import (
    check_bradley_terry_loss,
    check_last_score,
    check_noise_ceiling,
    check_preference_probability,
    check_score_gap,
)
from rlhf_helpers.book.checks.chapter_07 import (
    check_adaptive_coefficient,
    check_best_of_n_kl,
    check_token_rewards,
    check_value_targets,
)
from rlhf_helpers.book.checks.chapter_08 import (
    check_best_policy,
    check_hidden_reward,
    check_implicit_reward,
    check_pair_weight,
)
from rlhf_helpers.book.checks.chapter_09 import (
    check_constant_share,
    check_group_advantages,
    check_mean_of_means,
    check_pass_at_k,
)
from rlhf_helpers.book.checks.chapter_11 import (
    check_device_batch,
    check_local_losses,
    check_shard,
    check_state_bytes,
)

__all__ = [
    "check_adaptive_coefficient",
    "check_bandit_gradient",
    "check_batch_mean_factor",
    "check_batches_to_double",
    "check_best_of_n_kl",
    "check_best_policy",
    "check_bradley_terry_loss",
    "check_categorical_kl",
    "check_clipped_objective",
    "check_constant_share",
    "check_device_batch",
    "check_effective_sample_size",
    "check_first_credit",
    "check_fisher_product",
    "check_four_slopes",
    "check_gae",
    "check_group_advantages",
    "check_hidden_reward",
    "check_implicit_reward",
    "check_last_score",
    "check_leave_one_out",
    "check_line_search",
    "check_local_losses",
    "check_lora_size",
    "check_loss_mask",
    "check_mean_entropy",
    "check_mean_of_means",
    "check_mended_loss",
    "check_noise_ceiling",
    "check_nucleus",
    "check_pair_weight",
    "check_pass_at_k",
    "check_perplexity",
    "check_policy_gradient_loss",
    "check_preference_probability",
    "check_score_gap",
    "check_sequence_log_prob",
    "check_shard",
    "check_state_bytes",
    "check_third_estimate",
    "check_token_rewards",
    "check_two_losses",
    "check_value_targets",
]
