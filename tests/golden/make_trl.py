"""The numbers of TRL: DPO, robust DPO, IPO, KTO, ORPO, SimPO, GRPO and its relatives, RLOO.

Writes trl.json.  Needs an environment of its own: a new virtual environment with a CPU build of torch, transformers
(5.19 was there), accelerate and datasets, then ``pip install --no-deps trl==1.16.0``, and

    python tests/golden/make_trl.py

The trainers' own methods run here, on trainers that were never set up: a stand-in of a model returns the log-probs of
inputs.py, and nothing is trained, generated or loaded.  Where a method wants logits, the vocabulary has two tokens and
the logits are the log-probs of the token and of the other one.  float64, but for what a method casts itself (ORPO's
odds ratio: float32).  May import: torch, trl, tests/golden/inputs.py.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from inputs import double, inputs, laid_out, leaf, mask, padded, write
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

GIVEN = inputs()
ANSWERS, BATCH = GIVEN["answers"], GIVEN["batch"]
LENGTHS = BATCH["lengths"]
SHOWN = ("rewards/", "logps/", "nll_loss", "log_odds", "kl", "clip_ratio/region_mean")


class OneProcess:
    """accelerate.Accelerator of a single process."""

    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather

    def reduce(self, value: Any, reduction: str = "sum") -> Any:
        return value


def trainer_of(kind: type, **attributes: Any) -> Any:
    """A trainer that was never set up, with no more than the attributes that its methods read."""
    made = object.__new__(kind)
    shared = {
        "accelerator": OneProcess(), "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "aux_loss_enabled": False, "is_encoder_decoder": False, "_total_train_tokens": 0, "_tp_size": 1,
        "_metrics": {"train": defaultdict(list)}, "precompute_ref_logps": True,
    }  # fmt: skip
    for name, value in (shared | attributes).items():
        setattr(made, name, value)
    return made


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    last = {name: value[-1] if isinstance(value, list) else value for name, value in metrics.items()}
    return {name: float(value) for name, value in last.items() if name.startswith(SHOWN)}


# --- preferences --------------------------------------------------------------------------------


def spread(sums: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[N, longest]: each answer's log-prob in equal parts over its tokens; the losses see sums and means only."""
    return sums[:, None] / double(counts)[:, None] * mask(counts)


def outputs_of(log_probs: torch.Tensor) -> SimpleNamespace:
    """What a model with a fused head returns; entropy, logits and top tokens are of no interest here."""
    nothing = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def pairs_of(loss_type: str, beta: float, label_smoothing: float = 0.0) -> dict[str, Any]:
    """DPOTrainer's loss of the five pairs."""
    counts = ANSWERS["num_chosen"] + ANSWERS["num_rejected"]
    policy = leaf(ANSWERS["chosen"] + ANSWERS["rejected"])
    completion_mask = torch.cat([torch.zeros(len(counts), 1, dtype=torch.long), mask(counts)], dim=1)
    batch = {
        "input_ids": torch.ones_like(completion_mask), "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": double(ANSWERS["reference_chosen"]),
        "ref_rejected_logps": double(ANSWERS["reference_rejected"]),
    }  # fmt: skip
    trainer = trainer_of(
        DPOTrainer, ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=beta, label_smoothing=label_smoothing, use_weighting=False,
    )  # fmt: skip
    loss = trainer._compute_loss(lambda **_: outputs_of(spread(policy, counts)), batch, False)
    return of_pairs(
        "DPOTrainer._compute_loss", loss, policy, trainer._metrics["train"],
        {"loss": loss_type, "beta": beta, "label_smoothing": label_smoothing},
    )  # fmt: skip


def of_pairs(
    function: str, loss: torch.Tensor, policy: torch.Tensor, metrics: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    (gradient,) = torch.autograd.grad(loss, policy)
    chosen, rejected = gradient.chunk(2)
    found = {"loss": loss, "gradient_chosen": chosen, "gradient_rejected": rejected, "metrics": shown(metrics)}
    return {"function": function, "inputs": "answers", "settings": settings, "outputs": found}


def logits_of(log_probs: torch.Tensor) -> torch.Tensor:
    """[N, L + 1, 2] that give token 0 these log-probs, [N, L], one position later."""
    other = torch.log(-torch.expm1(torch.where(log_probs < 0, log_probs, -1.0)))
    both = torch.stack([log_probs, other], dim=2)
    return torch.cat([both, torch.zeros_like(both[:, :1])], dim=1)


def without_reference(kind: type, settings: dict[str, Any], **attributes: Any) -> dict[str, Any]:
    """The loss of a trainer that looks at logits of prompt and answer."""
    policy, prompts = leaf(ANSWERS["chosen"] + ANSWERS["rejected"]), double(ANSWERS["prompt"] * 2)
    counts, asked = ANSWERS["num_chosen"] + ANSWERS["num_rejected"], ANSWERS["num_prompt"] * 2
    rows, labels, lengths = [], [], []
    for i, (answer, prompt) in enumerate(zip(counts, asked, strict=True)):
        rows.append(torch.cat([(prompts[i] / prompt).expand(prompt), (policy[i] / answer).expand(answer)]))
        labels.append(torch.tensor([-100] * (prompt + 1) + [0] * answer))
        lengths.append(prompt + answer)
    log_probs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    label = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    attention = mask([n + 1 for n in lengths])
    n, batch = len(counts) // 2, {}
    for side, part in (("chosen", slice(0, n)), ("rejected", slice(n, 2 * n))):
        batch |= {
            f"{side}_input_ids": torch.zeros_like(attention[part]), f"{side}_attention_mask": attention[part],
            f"{side}_labels": label[part],
        }  # fmt: skip
    trainer = trainer_of(kind, padding_value=0, pad_token_id=0, **attributes)
    loss, metrics = trainer.get_batch_loss_metrics(
        lambda *_, **__: SimpleNamespace(logits=logits_of(log_probs)), batch
    )  # fmt: skip
    return of_pairs(f"{kind.__name__}.get_batch_loss_metrics", loss, policy, metrics, settings)


def kto(given: str, beta: float, desirable: float, undesirable: float) -> dict[str, Any]:
    answers = GIVEN[given]
    counts, policy = answers["num_chosen"] + answers["num_rejected"], leaf(answers["chosen"] + answers["rejected"])
    mismatched = double(answers["mismatched"])
    completion_mask = torch.cat([torch.zeros(len(counts), 1, dtype=torch.long), mask(counts)], dim=1)
    ids = torch.zeros_like(completion_mask)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask,
        "KL_input_ids": ids + 1, "KL_attention_mask": torch.ones_like(ids), "KL_completion_mask": completion_mask,
        "label": torch.tensor(answers["label"]),
        "ref_logps": double(answers["reference_chosen"] + answers["reference_rejected"]),
        "ref_KL_logps": double(answers["reference_mismatched"]),
    }  # fmt: skip
    trainer = trainer_of(
        KTOTrainer, calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=desirable,
        undesirable_weight=undesirable,
    )  # fmt: skip

    def model(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return outputs_of(spread(mismatched if input_ids.any() else policy, counts))

    loss = trainer._compute_loss(model, batch, False)
    (gradient,) = torch.autograd.grad(loss, policy)
    settings = {"loss": "kto", "beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable}
    found = {"loss": loss, "gradient": gradient, "metrics": shown(trainer._metrics["train"])}
    return {"function": "KTOTrainer._compute_loss", "inputs": given, "settings": settings, "outputs": found}


# --- policy gradients ---------------------------------------------------------------------------


def sampled(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Advantages from the rewards, then the loss: the two methods of a trainer between sampling and the optimizer."""
    policy, sampler = leaf(BATCH[settings.get("policy", "policy")]), BATCH["behavior"]
    before = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    rows = {id(before): BATCH["proximal"], "reference": BATCH["reference"]}
    num, correction = len(LENGTHS), settings.get("vllm_importance_sampling_mode")

    def log_probs(model: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        flat = policy if model == "policy" else double(rows[model if isinstance(model, str) else id(model)])
        found = padded(flat, LENGTHS)
        return found, torch.zeros_like(found), None

    def generated(_: Any) -> tuple[Any, ...]:
        prompts, completions = [[1]] * num, [[2] * length for length in LENGTHS]
        if kind is RLOOTrainer:
            return prompts, completions, [""] * num
        by_sampler = [row.tolist() for row in torch.split(double(sampler), LENGTHS)] if correction else None
        return prompts, completions, None, [""] * num, by_sampler, {}, None, None

    args = SimpleNamespace(
        per_device_train_batch_size=num, gradient_checkpointing_kwargs=None, steps_per_generation=1,
        gradient_accumulation_steps=1, delta=None, use_bias_correction_kl=False,
    )  # fmt: skip
    trainer = trainer_of(
        kind, model=before, ref_model="reference", args=args, environment_factories=None, tools=None, environments=None,
        _generate=generated, _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None,
        mask_truncated_completions=False, num_iterations=2, use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None, vllm_importance_sampling_mode=correction,
        vllm_importance_sampling_clip_min=settings.get("clip_min"),
        vllm_importance_sampling_clip_max=settings.get("clip_max"),
        _get_per_token_logps_and_entropies=log_probs, _calculate_rewards=lambda *_: double(BATCH["rewards"])[:, None],
        reward_weights=torch.ones(1, dtype=torch.float64), reward_func_names=["r"], reward_clip_range=None,
        num_generations=BATCH["group_size"], multi_objective_aggregation="sum_then_normalize",
        scale_rewards=settings.get("scale_rewards"), normalize_advantages=False, beta=settings["beta"],
        loss_type=settings.get("loss_type"), importance_sampling_level=settings.get("importance_sampling_level"),
        epsilon_low=settings.get("epsilon_low"), epsilon_high=settings["epsilon_high"], top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, max_completion_length=BATCH["max_tokens"],
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, log_multimodal=False,
        _logs=defaultdict(list, {"rewards": defaultdict(list), "extra": defaultdict(list)}),
        _pending_extra_logs={}, _pending_metrics={},
    )  # fmt: skip
    scored = trainer._generate_and_score_completions([{"prompt": "p"}] * num)
    loss = trainer._compute_loss("policy", scored)
    (gradient,) = torch.autograd.grad(loss, policy)
    found = {"advantages": scored["advantages"], "loss": loss, "gradient": gradient}
    if correction:
        weights = scored["importance_sampling_ratio"].expand(-1, max(LENGTHS))
        found["sampling_weights"] = laid_out(weights, LENGTHS)
    names = f"{kind.__name__}._generate_and_score_completions, _compute_loss"
    metrics = {"metrics": shown(trainer._metrics["train"])}
    return {"function": names, "inputs": "batch", "settings": settings, "outputs": found | metrics}


def grpo(loss_type: str, beta: float = 0.0, **settings: Any) -> dict[str, Any]:
    usual = {
        "loss_type": loss_type, "beta": beta, "scale_rewards": "group", "importance_sampling_level": "token",
        "epsilon_low": 0.2, "epsilon_high": 0.2,
    }  # fmt: skip
    return sampled(GRPOTrainer, usual | settings)


def main() -> None:
    gspo = {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
    cases = {
        "dpo": pairs_of("sigmoid", 0.3),
        "dpo, label smoothing": pairs_of("sigmoid", 0.3, 0.1),  # which this loss of TRL 1.16 does not read
        "robust dpo": pairs_of("robust", 0.3, 0.2),
        "ipo": pairs_of("ipo", 0.2),
        "kto": kto("answers", 0.2, 1.0, 1.0),
        "kto, weighted": kto("answers", 0.2, 1.3, 0.8),
        "kto, negative estimate": kto("answers_below", 0.2, 1.0, 1.0),
        "orpo": without_reference(ORPOTrainer, {"loss": "orpo", "beta": 0.4}, beta=0.4),
        "simpo": without_reference(
            CPOTrainer, {"loss": "simpo", "beta": 2.5, "gamma": 0.7}, loss_type="simpo", beta=2.5, simpo_gamma=0.7,
            label_smoothing=0.0, alpha=0.0, cpo_alpha=0.0,
        ),
        "grpo": grpo("grpo"),
        "grpo, kl": grpo("grpo", 0.2),
        "dr_grpo": grpo("dr_grpo", scale_rewards="none"),
        "dr_grpo, kl": grpo("dr_grpo", 0.2, scale_rewards="none"),
        "dapo": grpo("dapo", epsilon_high=0.28),
        "gspo": grpo("grpo", **gspo),
        "gspo, wide": grpo("grpo", importance_sampling_level="sequence"),
        "cispo": grpo("cispo", epsilon_high=1.25),
        "cispo, kl": grpo("cispo", 0.2, epsilon_high=1.25),
        "cispo, sampler": grpo(
            "cispo", epsilon_high=1.25, vllm_importance_sampling_mode="token_truncate", clip_max=1.2
        ),
        "rloo": sampled(RLOOTrainer, {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2}),
        "rloo, first update": sampled(
            RLOOTrainer, {"beta": 0.2, "epsilon_low": 0.2, "epsilon_high": 0.2, "policy": "proximal"}
        ),
        "rloo, kl": sampled(RLOOTrainer, {"beta": 0.2, "epsilon_low": 0.2, "epsilon_high": 0.2}),
    }  # fmt: skip
    for mode in ("token_truncate", "sequence_truncate", "token_mask", "sequence_mask"):
        bounds = {"clip_max": 1.2} if mode.endswith("truncate") else {"clip_min": 0.8, "clip_max": 1.4}
        cases[mode] = grpo("grpo", 0.2, vllm_importance_sampling_mode=mode, **bounds)
    write("trl", ["batch", "answers", "answers_below"], cases)


if __name__ == "__main__":
    main()
