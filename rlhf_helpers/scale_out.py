"""Several processes: TRL's trainers, fed with the data, rewards and settings of this book's loops,
and a run that `accelerate launch` starts.

The launcher is accelerate's and the trainers are TRL's. What is here only translates: settings of
`grpo.Config`, `dpo.Config`, `reward_model.Config` and `sft.Config` into TRL's, texts into its data
sets, and what TRL cannot do into an error. A batch is the batch of all processes together, so that
a run does not change its meaning with their number. The tokens are those of this book's loops,
whatever the tokenizer puts around texts by itself.

No run keeps checkpoints unless it is told to, so one that is killed is lost. Each trainer takes
TRL's `save_strategy="steps", save_steps=10` among its options, and its
`.train(resume_from_checkpoint=True)` goes on from the last one.

    accelerate launch --config_file two_cpu_processes.yaml -m rlhf_helpers.scale_out --output
    runs/two
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PrinterCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from rlhf_helpers import conversations, models, rewards, settings
from rlhf_helpers._validate import (
    check_each,
    check_folder,
    check_model,
    check_path,
    has,
    in_range,
    one_of,
)
from rlhf_helpers.algorithms import dpo, grpo, reward_model, sft
from rlhf_helpers.algorithms._loop import check_settings, steps_per_epoch
from rlhf_helpers.rollout import end_tokens
from rlhf_helpers.worlds import arithmetic

CONFIGS = Path(__file__).parent / "assets" / "accelerate"
# Settings of GRPO that let vLLM sample: in the training processes, or in a server of its own.
VLLM = {
    "colocate": {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_enable_sleep_mode": True,
    },
    "server": {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": "http://127.0.0.1:8000",
    },
}
DPO_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "length-normalised": "sigmoid_norm"}
EVALUATION_SAMPLES = 4  # of each held-out problem
# what TRL gives reward functions itself, or takes for something else in a data set
TAKEN = (
    "prompt",  # first, since of the held-out problems it is a column
    *("prompts", "completion", "completions", "completion_ids", "image", "images"),
    *("environment", "environments", "trainer_state", "log_extra", "log_metric"),
)


# --- settings ------------------------------------------------------------------------------------


def processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(total: int, name: str) -> int:
    """What one process takes of a batch.

    Raises: ValueError if the processes cannot share it equally.
    """
    in_range(total, name, 1)
    count = processes()
    if total % count:
        raise ValueError(
            f"{name}={total} cannot be shared equally by {count} processes; make it a multiple of"
            f" {count}"
        )
    return total // count


def _common(config: Any, folder: str | Path, steps: int) -> dict[str, Any]:
    """The settings that TRL's four trainers share, without what TRL adds by itself."""
    check_folder(folder)
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": config.warm_up,
        "weight_decay": getattr(config, "weight_decay", 0.0),
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "use_cpu": not torch.cuda.is_available(),
        # the launcher's configuration decides; TRL would take bf16 on a CPU, too
        "bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }


def grpo_arguments(config: grpo.Config, folder: str | Path, **options: Any) -> GRPOConfig:
    """This book's settings of GRPO as TRL's.

    Args:
        config: `iterations`, `prompts` and so on, for all processes together.
        folder: where TRL writes.
        options: further settings of TRL's GRPOConfig, e.g. `**VLLM["colocate"]`; they win.
    Raises: ValueError on a setting that TRL does not know, or a batch that the processes cannot
        share.
    """
    _only(config.scale, grpo.ADVANTAGE_SCALES, "scale")
    _only(config.constant_groups, ("keep",), "constant_groups")
    groups = share(config.prompts // config.mini_batches, "prompts a mini-batch")
    updates = config.epochs * config.mini_batches
    arguments = _common(config, folder, config.iterations * updates) | {
        # TRL counts completions, not prompts, and those of one process
        "per_device_train_batch_size": groups * config.samples_per_prompt,
        "steps_per_generation": config.mini_batches,
        "num_iterations": config.epochs,
        "num_generations": config.samples_per_prompt,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "scale_rewards": config.scale,
        "loss_type": config.loss_type,
        "importance_sampling_level": config.importance,
        "epsilon": config.clip,
        "epsilon_high": config.clip_high,
        "beta": config.beta,
        "use_bias_correction_kl": config.bias_correct_kl,
        "disable_dropout": True,
    }
    return GRPOConfig(**arguments | options)


def _pairs_arguments(config: Any, folder: str | Path, count: int) -> dict[str, Any]:
    """Settings of the trainers that pass through given data."""
    return _common(config, folder, config.epochs * steps_per_epoch(count, config)) | {
        "per_device_train_batch_size": share(min(config.batch_size, count), "batch_size"),
        "dataloader_drop_last": count >= config.batch_size,
        "max_length": None,
    }


def _only(value: str, known: Sequence[str], name: str) -> None:
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is not in TRL; use one of {', '.join(map(repr, known))}"
        )


# --- trainers ------------------------------------------------------------------------------------
#
# TRL makes tokens of texts, and texts of tokens, as the tokenizer does by itself; many put a token
# in front, or drop a space. The trainers for SFT and rewards take tokens; these two would not, but
# for the methods that are replaced here.


class _GRPOTrainer(GRPOTrainer):
    def _tokenize_prompts(
        self, prompts: list[conversations.Prompt]
    ) -> tuple[list[list[int]], None, dict]:
        return models.prompt_ids(self.processing_class, prompts), None, {}

    def _calculate_rewards(
        self,
        inputs: list,
        prompts: list[conversations.Prompt],
        completions: list,
        ids: list[list[int]],
    ) -> torch.Tensor:
        texts = [_text(self.processing_class, row, self.eos_token_ids) for row in ids]
        prompts = [conversations.plain_text(prompt) for prompt in prompts]
        return super()._calculate_rewards(inputs, prompts, texts, ids)


class _DPOTrainer(DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def _text(tokenizer: Tokenizer, ids: list[int], ends: Sequence[int]) -> str:
    """What a reward function of this book's loops would be given for a completion."""
    row = torch.tensor([ids])
    text = models.decode(tokenizer, row, torch.ones_like(row))[0]
    return text if ids[-1] in ends else models.Cut(text)


def grpo_trainer(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    config: grpo.Config,
    columns: Mapping[str, Sequence] | None = None,
    held_out: Mapping[str, Sequence] | None = None,
    *,
    folder: str | Path,
    **options: Any,
) -> GRPOTrainer:
    """TRL's GRPO with what `grpo.train` takes; `.train()` trains the policy in place.

    TRL puts padding on the left of short prompts and scores without position ids. A model that
    counts positions from the first column, like GPT-2, then sees other positions than the sampler
    did, so prompts of unequal length are refused for such a model. No checkpoints are kept unless
    the options say so.

    Args:
        policy, tokenizer, prompts, reward, config, columns: as in `grpo.train`; dropout is switched
            off as in `without_dropout`. Prompts are all texts or all conversations, which TRL gets
            as such; the end of a turn then joins the end tokens of the policy's settings.
        held_out: columns "prompt" and the others, of prompts that TRL evaluates on.
        folder, options: as in `grpo_arguments`.
    Raises: ValueError as `grpo_arguments` or `without_dropout`; on prompts or columns that do not
        fit, texts among conversations, or a column with a name of `TAKEN`; on prompts of unequal
        length for a model that counts positions; with a price on KL, on a policy that is not the
        one that its name stands for, since TRL loads the reference by that name.
    """
    columns, held_out = _plain(columns, TAKEN), _plain(held_out, TAKEN[1:])
    prompts = rewards.plain(prompts)
    grpo.check(config, prompts, columns, None)
    _check_one_kind(prompts, "prompts")
    _check_one_kind((held_out or {}).get("prompt", ()), "held_out['prompt']")
    lengths = list(map(len, models.prompt_ids(tokenizer, prompts)))
    if min(lengths) < max(lengths) and _minds_padding(policy, tokenizer):
        raise ValueError(
            f"prompts have {min(lengths)} to {max(lengths)} tokens, and TRL's GRPO gives"
            f" left-padded prompts no position ids, which a {type(policy).__name__} needs; pass"
            " prompts of one length"
        )
    if models.turn_end(tokenizer) is not None:
        # TRL looks there for what ends a completion
        policy.generation_config.eos_token_id = end_tokens(policy, tokenizer)
    trainer = _GRPOTrainer(
        without_dropout(policy),
        reward,
        grpo_arguments(config, folder, **options),
        train_dataset=Dataset.from_dict({"prompt": _as_given(prompts)} | columns),
        eval_dataset=Dataset.from_dict(held_out) if held_out else None,
        processing_class=tokenizer,
    )
    _check_reference(trainer, policy)
    return _silent(trainer)


def _plain(columns: Mapping[str, Sequence] | None, taken: Sequence[str]) -> dict[str, list]:
    """Columns as a data set takes them, from arrays, Series and tensors too."""
    columns = {} if columns is None else columns
    rewards.check_columns(columns, taken)
    return {
        name: list(map(rewards.plain, rewards.plain(values))) for name, values in columns.items()
    }


def _as_given(prompts: Sequence[conversations.Prompt]) -> list[conversations.Prompt]:
    talks = map(conversations.messages_of, prompts)
    return [one if talk is None else talk for one, talk in zip(prompts, talks, strict=True)]


def _check_one_kind(prompts: Sequence[conversations.Prompt], name: str) -> None:
    """A column of a data set holds one type."""
    talks = [conversations.messages_of(prompt) is not None for prompt in prompts]
    if len(set(talks)) > 1:
        other = talks.index(not talks[0])
        raise ValueError(
            f"{name} holds conversations and texts, {name}[{other}] being the first of the other"
            " kind; make conversations of the texts with conversations.chat"
        )


def _check_reference(trainer: GRPOTrainer, policy: nn.Module) -> None:
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.ref_model is None or sharded:
        return
    reference = dict(trainer.ref_model.named_parameters())
    if not all(torch.equal(p.cpu(), reference[n].cpu()) for n, p in policy.named_parameters()):
        raise ValueError(
            f"policy is not {policy.config.name_or_path!r} any more, from where TRL takes the "
            "reference; save the policy with save_pretrained, and load it from there"
        )


def _silent(trainer: Any) -> Any:
    """What a trainer would print of each step stands in `trainer.state.log_history`."""
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def _minds_padding(policy: nn.Module, tokenizer: Tokenizer) -> bool:
    """Whether masked tokens on the left change the log-probabilities of what follows; probabilities
    would hide it, since those of a large vocabulary are all small."""
    if _divided(policy):
        return True  # it cannot be tried
    tokens = _some_tokens(policy)
    pads = torch.full_like(tokens[:, :3], tokenizer.pad_token_id)
    mask = torch.ones_like(tokens)
    was_training = policy.training
    policy.eval()
    plain = policy(tokens, attention_mask=mask).logits
    padded = policy(
        torch.cat([pads, tokens], 1), attention_mask=torch.cat([torch.zeros_like(pads), mask], 1)
    ).logits[:, 3:]
    policy.train(was_training)
    before, after = (logits.float().log_softmax(-1) for logits in (plain, padded))
    # sums in another order change them by less, in half precision at least in the mean
    rounding = torch.finfo(plain.dtype).eps ** 0.5 * before.std(-1).mean()
    return not (after - before).abs().mean() <= rounding


def _divided(model: nn.Module) -> bool:
    """Whether the weights are spread over processes, so that the model cannot be run by itself."""
    return any(p.numel() == 0 or p.is_meta for p in model.parameters())


def _some_tokens(model: nn.Module) -> torch.Tensor:
    """A short row of different tokens."""
    rows = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    return torch.arange(min(rows, 12), device=device).flip(0)[None]


def sft_trainer(
    policy: nn.Module,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    config: sft.Config,
    *,
    folder: str | Path,
    **options: Any,
) -> SFTTrainer:
    """TRL's supervised fine-tuning with what `sft.train` takes.

    The tokens are this book's: prompt and response are tokenised apart, where TRL would tokenise
    them together. No checkpoints are kept unless the options say so.

    Args:
        policy, tokenizer, pairs, config: as in `sft.train`.
        folder: where TRL writes.
        options: further settings of TRL's SFTConfig.
    Raises: ValueError as `sft.train` or `without_dropout`, or on a batch that the processes cannot
        share.
    """
    check_model(policy, "policy")
    sft.check(pairs, config)
    examples = sft.encode(tokenizer, pairs)
    rows = {
        "input_ids": [one.prompt + one.response for one in examples],
        "completion_mask": [[0] * len(one.prompt) + [1] * len(one.response) for one in examples],
    }
    arguments = _pairs_arguments(config, folder, len(examples)) | {
        "completion_only_loss": config.loss_on == "response"
    }
    trainer = SFTTrainer(
        without_dropout(policy),
        SFTConfig(**arguments | options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    return _silent(trainer)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with dropout switched off in every mode; TRL's SFT has no setting for it, and that
    of the others leaves alone what is no layer but a number (OPT's, or Llama's in attention).

    Raises: ValueError if two passes in training mode still differ.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    if not _divided(model) and _is_random(model):
        given = model.config.to_dict().items()
        named = [f"{name}={value}" for name, value in given if "drop" in name and value]
        raise ValueError(
            f"{type(model).__name__}: two passes in training mode differ, so something random could"
            f" not be switched off; set it to 0 in the model's config ({', '.join(named) or 'none'}"
            " of its settings is called dropout)"
        )
    return model


@torch.no_grad()
def _is_random(model: nn.Module) -> bool:
    tokens, was_training = _some_tokens(model), model.training
    with torch.random.fork_rng([tokens.device] if tokens.is_cuda else []):
        model.train()
        # not the output: the head of a new reward model is 0, and would hide everything
        passes = [model(tokens, output_hidden_states=True) for _ in range(2)]
        model.train(was_training)
    first, second = (found.hidden_states[-1] for found in passes)
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True)


def dpo_trainer(
    policy: nn.Module,
    tokenizer: Tokenizer,
    data: Sequence[reward_model.Comparison],
    config: dpo.Config,
    *,
    folder: str | Path,
    **options: Any,
) -> DPOTrainer:
    """TRL's DPO with what `dpo.train` takes as examples before they are tokens.

    TRL takes hard labels: the majority decides, and ties are dropped. The tokens are this book's:
    prompt and response are tokenised apart, where TRL would tokenise them together. No checkpoints
    are kept unless the options say so.

    Args:
        policy: trained in place, without dropout; the reference is a copy of it as it is now, or
            only what that copy would say of the pairs, with the option
            `precompute_ref_log_probs=True`.
        tokenizer, config: as in `dpo.train`.
        data: comparisons of two.
        folder: where TRL writes.
        options: further settings of TRL's DPOConfig.
    Raises: ValueError as `hard_pairs`, `dpo.encode` or `without_dropout`, or on a variant or a
        label smoothing that TRL does not have in this form, or a batch that the processes cannot
        share.
    """
    check_model(policy, "policy")
    check_settings(config, dpo.Config)
    check_each(data, "data", "a Comparison", *reward_model.Comparison._fields)
    _only(config.variant, tuple(DPO_LOSSES), "variant")
    if config.label_smoothing:
        raise ValueError(
            f"label_smoothing={config.label_smoothing}: TRL 1.16 ignores it for this loss; set it"
            " to 0"
        )
    for index, one in enumerate(data):
        if one.margin:
            raise ValueError(f"data[{index}] has a margin, which DPO does not use; set it to 0")
    rows = _pair_ids(tokenizer, hard_pairs(data))
    arguments = _pairs_arguments(config, folder, len(rows)) | {
        "beta": config.beta,
        "loss_type": DPO_LOSSES[config.variant],
        "disable_dropout": True,
    }
    # under FSDP, TRL without a copy would load the reference by the policy's name
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    alone = options.get("precompute_ref_log_probs") and not sharded
    without_dropout(policy)
    trainer = _DPOTrainer(
        policy,
        # TRL copies an adapter by itself, and would not know what to do with a copied policy
        None if alone or isinstance(policy, PeftModel) else copy.deepcopy(policy),
        DPOConfig(**arguments | options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return _silent(trainer)


def _pair_ids(tokenizer: Tokenizer, rows: Sequence[Mapping]) -> list[dict[str, list[int]]]:
    pairs = [
        reward_model.Comparison(row["prompt"], (row["chosen"], row["rejected"])) for row in rows
    ]
    return [
        {"prompt_ids": one.prompt, "chosen_ids": one.chosen, "rejected_ids": one.rejected}
        for one in dpo.encode(tokenizer, pairs)
    ]


def hard_pairs(data: Sequence[reward_model.Comparison]) -> list[dict[str, Any]]:
    """Comparisons of two as TRL takes them: prompt, chosen, rejected and margin. The response that
    more than half prefer is the chosen one; a comparison without a majority is dropped.

    Raises: ValueError on a comparison of another size or with a weight, and where nothing is left.
    """
    check_each(data, "data", "a Comparison", *reward_model.Comparison._fields)
    rows = []
    for index, one in enumerate(data):
        if isinstance(one.responses, str) or len(one.responses) != 2 or one.weight != 1.0:
            raise ValueError(f"data[{index}] must compare two responses with weight 1")
        if one.preference != 0.5:
            chosen, rejected = one.responses if one.preference > 0.5 else one.responses[::-1]
            rows.append({"prompt": one.prompt, "chosen": chosen, "rejected": rejected})
            rows[-1]["margin"] = one.margin
    if not rows:
        raise ValueError("data has no comparison with a majority; pass at least one")
    return rows


def reward_trainer(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: Sequence[reward_model.Comparison],
    config: reward_model.Config,
    *,
    folder: str | Path,
    **options: Any,
) -> RewardTrainer:
    """TRL's reward modelling with what `reward_model.train` takes; labels as in `hard_pairs`.

    The library's classifier finds the last token by looking for the pad token. Where that is the
    end token, every text would be read one token early, so padding is done with another token. No
    checkpoints are kept unless the options say so.

    Args:
        model: as `reward_model.load` returns it, trained in place.
        tokenizer, data, config: as in `reward_model.train`.
        folder: where TRL writes.
        options: further settings of TRL's RewardConfig.
    Raises: ValueError as `hard_pairs` or `without_dropout`, or on another loss than
        "bradley-terry", or a batch that the processes cannot share.
    """
    check_settings(config, reward_model.Config)
    _only(config.loss, ("bradley-terry",), "loss")
    rows = hard_pairs(data)
    prompts = [row["prompt"] for row in rows]
    found = {
        f"{side}_ids": reward_model.encode(tokenizer, prompts, [row[side] for row in rows])
        for side in ("chosen", "rejected")
    }
    if any(row["margin"] for row in rows):
        found["margin"] = [row["margin"] for row in rows]
    arguments = _pairs_arguments(config, folder, len(rows)) | {
        "center_rewards_coefficient": config.centring or None,
        "adam_beta1": reward_model.BETAS[0],
        "adam_beta2": reward_model.BETAS[1],
        "disable_dropout": True,
    }
    trainer = RewardTrainer(
        without_dropout(model),
        RewardConfig(**arguments | options),
        train_dataset=Dataset.from_dict(found),
        processing_class=_padding_apart(tokenizer),
    )
    return _silent(trainer)


def _padding_apart(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer whose pad token does not end texts."""
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    found = copy.deepcopy(tokenizer)
    found.pad_token = tokenizer.convert_ids_to_tokens(0 if tokenizer.eos_token_id else 1)
    return found


# --- configurations ------------------------------------------------------------------------------


def check_config(path: str | Path) -> dict[str, str]:
    """What accelerate's launcher makes of a configuration, without starting anything.

    Three checks, none of which needs a GPU: accelerate's loader refuses unknown keys, its launcher
    refuses combinations that exclude each other, and keys inside `fsdp_config` and
    `deepspeed_config`, which accelerate passes over in silence, must be known to the launcher.

    Args:
        path: a YAML file, e.g. in `CONFIGS`.
    Returns: the environment variables that the processes would be given.
    Raises: FileNotFoundError; ValueError naming the keys that are not known, or from accelerate.
    """
    check_path(path, "path")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path={str(path)!r} is no file; pass one, e.g. of CONFIGS")
    # here alone, since parts of it are not public and may move
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    args, found, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), "script.py"])
    )
    nested = {**found.fsdp_config, **found.deepspeed_config}
    unknown = sorted(set(nested) - known)
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(unknown)} is no option of accelerate launch; remove it"
        )
    if found.use_cpu and found.num_processes > 1 and not (args.multi_gpu or args.mpirun_hostfile):
        raise ValueError(
            f"{path}: without an mpirun_hostfile this starts one process, not"
            f" {found.num_processes}; write distributed_type: MULTI_GPU, which starts processes on"
            " CPUs too"
        )
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(found.deepspeed_config)
        return _given(prepare_deepspeed_cmd_env(args)[1])
    return _given(prepare_multi_gpu_env(args))


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    names = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in environment.items() if name.startswith(names)}


# --- a run ---------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a run, checked."""
    default = grpo.Config()
    parser = argparse.ArgumentParser(prog="rlhf_helpers.scale_out", description=main.__doc__)
    kept = "folder of the result; no checkpoint is kept"
    parser.add_argument("--output", type=Path, required=True, help=kept)
    parser.add_argument("--model", default=settings.TINY_ARITHMETIC, help="name or folder")
    parser.add_argument("--level", type=int, default=3, help="of the problems, 1 to 4")
    parser.add_argument("--steps", type=int, default=100, help="updates")
    parser.add_argument(
        "--prompts", type=int, default=default.prompts, help="a step, of all processes"
    )
    parser.add_argument(
        "--samples", type=int, default=default.samples_per_prompt, help="of a prompt"
    )
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--loss-type", default="dapo", choices=grpo.GRPO_TYPES)
    parser.add_argument("--evaluate-every", type=int, default=10, help="steps")
    parser.add_argument("--held-out", type=int, default=256, help="problems to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep the policy in the output folder")
    found = parser.parse_args(arguments)
    try:
        for name in ("steps", "evaluate_every"):
            in_range(getattr(found, name), f"--{name.replace('_', '-')}", 1)
        one_of(str(found.level), map(str, arithmetic.LEVELS), "--level")
        in_range(found.held_out, "--held-out", 1, len(arithmetic.problems(found.level, "held_out")))
        share(found.prompts, "--prompts")
        share(found.held_out, "--held-out")
        if found.steps % found.evaluate_every:
            raise ValueError(
                f"--evaluate-every={found.evaluate_every} must divide --steps={found.steps}"
            )
    except ValueError as error:
        parser.error(str(error))
    return found


def _check_args(args: argparse.Namespace) -> None:
    has(args, "args", "what parse returns", "steps", "prompts", "held_out", "level", "seed")


def config_of(args: argparse.Namespace) -> grpo.Config:
    """The settings of a run as this book's loop takes them."""
    _check_args(args)
    return grpo.Config(
        iterations=args.steps,
        prompts=args.prompts,
        samples_per_prompt=args.samples,
        max_new_tokens=args.max_new_tokens,
        learning_rate=args.learning_rate,
        loss_type=args.loss_type,
        seed=args.seed,
    )


def problems_of(args: argparse.Namespace) -> tuple[list, list]:
    """Problems to train on, in their order, and those to evaluate on, the same for every seed."""
    _check_args(args)
    held_out = arithmetic.sample(args.held_out, args.level, "held_out")
    return list(arithmetic.problems(args.level, "train")), held_out


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """TRL's settings for looking at the held-out problems, all at once, before the first step and
    then at equal distances. With `arithmetic.exact` as the reward their mean reward is pass@1."""
    _check_args(args)
    return {
        "eval_strategy": "steps",
        "eval_steps": args.evaluate_every,
        "eval_on_start": True,
        "num_generations_eval": EVALUATION_SAMPLES,
        "per_device_eval_batch_size": share(args.held_out, "--held-out") * EVALUATION_SAMPLES,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """GRPO with TRL on this book's arithmetic, in one process or in several. It keeps no
    checkpoints: a run that is killed has to begin anew. For your own prompts and reward, or for
    checkpoints, call `grpo_trainer` in a script of yours, and launch that in place of this module.
    """
    args = parse(arguments)
    begin = time.perf_counter()
    # kept, because transformers reads from it that weights are to be divided as they are loaded
    config, kept = config_of(args), grpo_arguments(config_of(args), args.output, **evaluation(args))
    policy, tokenizer = models.load(args.model)
    problems, held_out = problems_of(args)
    trainer = grpo_trainer(
        policy,
        tokenizer,
        [one.prompt for one in problems],
        arithmetic.exact,
        config,
        {"answer": [one.answer for one in problems]},
        {"prompt": [p.prompt for p in held_out], "answer": [p.answer for p in held_out]},
        folder=args.output,
        **evaluation(args),
    )
    trainer.train()
    if args.save:
        _save(trainer, tokenizer, args.output / "policy")
    group = torch.distributed.group.WORLD
    _finish(trainer, args.output / "curve.json", round(time.perf_counter() - begin, 1))
    # freed with the trainer, torch 2.13's group would wait, holding Python's lock, for a thread
    # that waits for this lock; so the group goes last
    del trainer, kept
    gc.collect()
    del group


def _save(trainer: GRPOTrainer, tokenizer: Tokenizer, folder: Path) -> None:
    # TRL's save_model would put a pickle of the settings beside the weights
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        policy = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        policy.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def _finish(trainer: GRPOTrainer, path: Path, seconds: float) -> None:
    """One process writes the curve; all wait for it, and leave together."""
    logs = trainer.state.log_history
    curve = [(log["step"], log["eval_reward"]) for log in logs if "eval_reward" in log]
    found = {
        "processes": trainer.accelerator.num_processes,
        "completions_a_process": trainer.args.per_device_train_batch_size,
        "seconds": seconds,
        "reward": [log["reward"] for log in logs if "reward" in log],
        "curve": [{"step": step, "pass_at_1": value} for step, value in curve],
    }
    if trainer.accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        step, value = curve[-1]
        print(f"processes: {found['processes']}, step {step}: pass@1 {value:.3f}", flush=True)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
