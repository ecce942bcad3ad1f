"""Configuration of the actors, importable without torch.

May import: pydantic, actors.lora_settings, trainers.{ensembles, settings}.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from actors.lora_settings import LoRASettings, Quantization
from trainers.ensembles import EnsembleSettings, disagreement_name, member_name
from trainers.settings import Settings

Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16"]


class ModelSettings(Settings):
    """The policy to train: a Hugging Face folder, or ``builtin:NAME`` (see ``actors/model_folders.py``)."""

    path: str = Field(description="folder with config.json, safetensors and a tokenizer, or builtin:NAME")
    dtype: Dtype = Field(
        "auto",
        description="compute dtype of generator and learner; auto: bfloat16 where the processor multiplies "
        "it natively (CUDA, AVX512-BF16, AMX), else float32. Master weights are float32 always",
    )
    max_length: Positive | None = Field(None, description="prompt + completion; default: the model's own")


class SamplingSettings(Settings):
    """The distribution that is sampled.  The learner scores under the same one."""

    temperature: float = Field(1.0, gt=0, description="the learner divides its logits by it as well")
    max_tokens: Positive = Field(256, description="longest completion")
    stop: tuple[str, ...] = Field((), description="strings that end a completion, besides EOS")
    top_p: float = Field(1.0, description="only 1.0: see the error")
    top_k: int = Field(0, description="only 0 (off): see the error")

    @model_validator(mode="after")
    def _no_truncated_support(self) -> Self:
        for name, value, off in (("top_p", self.top_p, (1.0,)), ("top_k", self.top_k, (0, -1))):
            if value not in off:
                raise ValueError(
                    f"{name}={value}: the learner cannot score a truncated distribution without the sampler's own "
                    f"support set; use {name}={off[0]}"
                )
        return self


class GeneratorSettings(Settings):
    """vLLM generators."""

    num_workers: Positive = Field(1, description="generators (each one vLLM engine)")
    tensor_parallel_size: Positive = Field(1, description="GPUs of one generator")
    gpus_per_worker: float | None = Field(None, ge=0, description="default: tensor_parallel_size on GPU, 0 on CPU")
    engine: Literal["auto", "in_process", "beside"] = Field(
        "auto", description="vLLM's engine in the actor's process (best on CPU) or in its own (best on GPU)"
    )
    sampling: SamplingSettings = SamplingSettings()
    max_num_seqs: Positive = Field(256, description="samples decoded at once in one generator")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache on CPU, in GiB")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="share of the GPU for weights and KV cache")
    compile: bool | None = Field(None, description="torch.compile / CUDA graphs; default: on GPU only")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="passed through to vLLM's EngineArgs")
    start_deadline_s: float = Field(900.0, gt=0, description="for the engine to be ready, and for its first samples")
    group_deadline_s: float = Field(1800.0, gt=0, description="for one group of samples")

    def gpus(self, colocate: bool) -> float:
        """Of one engine, where there are GPUs; where roles share them, a worker has a part of one."""
        width = 1.0 if colocate else float(self.tensor_parallel_size)
        return width if self.gpus_per_worker is None else self.gpus_per_worker


class OptimizerSettings(Settings):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the moment estimates")
    eps: float = Field(1e-8, gt=0, description="added to the denominator")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, times the learning rate")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in loop steps")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up; to 0 at the end")
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    head_lr_factor: float = Field(
        1.0, gt=0, description="times lr for the head of a reward model or critic, which starts from nothing: at the "
        "backbone's rate its scores stay small for hundreds of steps"
    )  # fmt: skip


class LearnerSettings(Settings):
    """DeepSpeed learner ranks."""

    num_workers: Positive = Field(1, description="data-parallel ranks")
    gpus_per_worker: float | None = Field(None, ge=0, description="default: 1 on GPU, 0 on CPU")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what DeepSpeed partitions: 1 optimizer states, 2 gradients too, 3 parameters too"
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="where optimizer states live")
    offload_param: Literal["none", "cpu", "nvme"] = Field("none", description="where parameters live; zero_stage 3")
    nvme_path: str | None = Field(None, description="folder for nvme offload")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    token_budget: Positive = Field(4096, description="tokens of one packed micro-batch")
    logprob_chunk: Positive = Field(1024, description="response positions scored at once; bounds [chunk, vocabulary]")
    share_prompts: bool | None = Field(
        None, description="compute a group's prompt once a pack (default: where attention allows: SDPA)"
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="merged over the DeepSpeed configuration")
    update_deadline_s: float = Field(1800.0, gt=0, description="for one update, save, load or export")
    start_deadline_s: float = Field(900.0, gt=0, description="for all ranks to be ready, and for each collective")

    @model_validator(mode="after")
    def _offload_needs_its_stage(self) -> Self:
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_param={self.offload_param} needs zero_stage=3, not {self.zero_stage}")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(f"offload_optimizer={self.offload_optimizer} needs zero_stage of 1 to 3, not 0")
        if "nvme" in (self.offload_optimizer, self.offload_param) and not self.nvme_path:
            raise ValueError("nvme offload needs nvme_path, a folder on a local disk")
        return self


class ReferenceSettings(Settings):
    """The frozen reference; started only when a KL term asks for it."""

    num_workers: Positive = Field(1, description="replicas; groups go to the least loaded")
    gpus_per_worker: float | None = Field(None, ge=0, description="default: 1 on GPU, 0 on CPU")
    path: str | None = Field(None, description="default: model.path")
    token_budget: Positive = Field(8192, description="tokens scored at once")
    deadline_s: float = Field(900.0, gt=0, description="for one group")
    source: Literal["auto", "actor", "adapter"] = Field(
        "auto", description="who computes it: workers of its own (actor), or with model.lora the learner itself, with "
        "its adapter as it started (adapter), which needs no second copy; auto: adapter where it can be"
    )  # fmt: skip


class RewardWorkerSettings(Settings):
    """The processes that run reward functions, outside the loop's own."""

    num_workers: Positive = Field(1, description="processes; groups go to the least loaded")
    timeout_s: float = Field(60.0, gt=0, description="for one call of one function")
    num_retries: int = Field(1, ge=0, description="further tries after an exception or a timeout")


class PushSettings(Settings):
    """How new weights reach the generators."""

    backend: Literal["auto", "file", "nccl", "ipc"] = Field(
        "auto", description="auto: ipc where roles share a GPU, nccl between GPUs, file on CPU"
    )
    directory: str | None = Field(None, description="for file; default: shared memory of one host")
    bucket_bytes: Positive = Field(256 * 2**20, description="bytes packed into one transfer")
    deadline_s: float = Field(300.0, gt=0, description="for each step of a push")
    lora: Literal["auto", "adapter", "merged"] = Field(
        "auto", description="with model.lora: send the adapter alone, which every generator merges into the base on "
        "its disk, or the merged model; auto: adapter, and merged with model.quantization"
    )  # fmt: skip
    probe_tolerance: float = Field(
        0.15, gt=0, description="largest mean |log-prob difference| of generator and learner at start, in nats"
    )


class CriticSettings(LearnerSettings):
    """The value function's ranks, with algorithm.name=ppo; keys as in learner."""

    path: str | None = Field(
        None, description="a reward model or a causal language model with the policy's tokenizer; default: the first "
        "reward model that has it, else model.path"
    )  # fmt: skip
    lora: LoRASettings | None = Field(None, description="train an adapter and the head on a frozen model")
    quantization: Quantization | None = Field(
        None, description="QLoRA: with lora, its frozen linear layers as of model.quantization"
    )
    overlap: bool | None = Field(
        None, description="update at the same time as the policy; default: where both have GPUs of their own"
    )

    @model_validator(mode="after")
    def _only_with_lora(self) -> Self:
        if self.quantization is not None and self.lora is None:
            raise ValueError(f"quantization={self.quantization}: quantised weights cannot be trained; set lora (for "
                             "instance rank: 16), or leave quantization out")  # fmt: skip
        return self


class RewardModelSettings(Settings):
    """A learned reward: a sequence classifier with one label, or several as one, in processes of its own."""

    name: str = Field(pattern=r"^[^/<>]+$", description="in metrics and errors")
    path: str | tuple[str, ...] = Field(
        description="folder of a reward model, such as the export of a run with algorithm.name=reward; a list of two "
        "or more is an ensemble"
    )
    ensemble: EnsembleSettings | None = Field(None, description="how the models of path become one reward")
    weight: float = Field(1.0, allow_inf_nan=False, description="the total is the weighted sum of all rewards")
    normalize: bool = Field(
        False, description="to mean 0 and deviation 1 over the reference samples stored with it (reward_stats.json)"
    )
    clip: float | None = Field(None, gt=0, description="bound on the size of the (normalised) score")
    retokenize: bool = Field(
        False, description="its tokenizer is another one than the policy's: read the text again with its own"
    )
    token_budget: Positive = Field(8192, description="tokens scored at once")
    num_workers: Positive = Field(1, description="replicas; groups go to the least loaded")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="default: 1 on GPU, 0 on CPU; the members of an ensemble are dealt to them in turn"
    )
    deadline_s: float = Field(900.0, gt=0, description="for one group")

    @model_validator(mode="after")
    def _one_or_an_ensemble(self) -> Self:
        num, ensemble = len(self.paths), self.ensemble
        if num == 0 or len(set(self.paths)) < num:
            raise ValueError("path: names no model, or one of them twice; name each folder once")
        if ensemble is None:
            if num > 1:
                raise ValueError(f"ensemble: path names {num} models, and nothing says how they become one reward; "
                                 "give ensemble.combine, for instance worst_case")  # fmt: skip
            return self
        if num == 1:
            raise ValueError(f"path={self.paths[0]}: an ensemble of one model has no disagreement; name two or more "
                             "models, or leave ensemble out")  # fmt: skip
        if self.normalize == ensemble.same_scale:
            why = "normalize=true brings them there" if self.normalize else "scores of different models are not"
            raise ValueError(f"normalize={str(self.normalize).lower()}: members need one scale, and {why}; set either "
                             "normalize or ensemble.same_scale")  # fmt: skip
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """The folder of each model."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def members(self) -> list[Self]:
        """Settings of each model of an ensemble by itself; of a single model, these."""
        if self.ensemble is None:
            return [self]
        bare = {"ensemble": None, "weight": 1.0, "clip": None}
        return [
            self.model_copy(update={**bare, "name": member_name(self.name, i), "path": path})
            for i, path in enumerate(self.paths)
        ]

    def num_on_a_device(self, on_gpu: bool) -> int:
        """Models that one GPU of a worker holds at most; without GPUs, its process."""
        return -(-len(self.paths) // max(1, int(self.gpus_per_worker or 1))) if on_gpu else len(self.paths)

    @property
    def part_names(self) -> list[str]:
        """Every part of the reward that it gives, its own first."""
        if self.ensemble is None:
            return [self.name]
        return [self.name, *(member.name for member in self.members), disagreement_name(self.name)]
