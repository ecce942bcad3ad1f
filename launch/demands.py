"""What a run asks of the machines: workers and GPUs by role, memory of each worker, and the facts of a node.

May import: the configuration, actors.{lora_settings, model_folders, publisher, settings},
launch.{estimate, judge_workers, model_facts}, cluster.{host, layout, rendezvous}.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.lora_settings import QUANTIZED_BYTES
from actors.model_folders import resolve_model
from actors.settings import CriticSettings, LearnerSettings
from cluster.host import host_facts
from cluster.layout import RoleDemand
from cluster.rendezvous import free_port, node_address
from launch.config import RunConfig
from launch.estimate import MemoryEstimate, estimate_generator, estimate_learner, estimate_reference, with_staging
from launch.judge_workers import judge_demand
from launch.model_facts import ModelFacts, check_model_folder

if TYPE_CHECKING:
    from actors.publisher import Transport


def node_facts(model_path: str | None = None) -> dict[str, Any]:
    """host_facts() of this node, whether the model folder can be read here, and where ranks could meet.

    Run it on every node.  ``rendezvous`` is (address, a free port there), the port None when none can be bound;
    ``critic_rendezvous`` has another port, for ranks 0 of policy and critic on one node.
    """
    facts = host_facts()
    address = node_address()
    try:
        facts["rendezvous"] = (address, free_port(address))
        facts["critic_rendezvous"] = (address, other_port(address, facts["rendezvous"][1]))
    except OSError:
        facts["rendezvous"] = (address, None)
    if model_path is not None:
        facts["model_readable"] = (Path(model_path).expanduser() / "config.json").is_file()
    return facts


def other_port(address: str, taken: int) -> int:
    """A free port that is not ``taken``, which nobody listens on yet."""
    port = free_port(address)
    while port == taken:
        port = free_port(address)
    return port


def role_demands(config: RunConfig, on_gpu: bool) -> list[RoleDemand]:
    """What each role of a run asks for; a reference is there only when a KL term needs it, a critic with PPO."""

    def gpus(setting: float | None, default: float) -> float:
        return (default if setting is None else setting) if on_gpu else 0.0

    def model(name: str, num_workers: int, setting: float | None, default: float = 1.0) -> RoleDemand:
        return RoleDemand(name, num_workers, gpus(setting, default), config.cluster.own_cores)

    demands = [
        model("generator", config.generator.num_workers, config.generator.gpus(config.cluster.colocate)),
        model("learner", config.learner.num_workers, config.learner.gpus_per_worker),
    ]
    if config.algorithm.needs_critic:
        demands.append(model("critic", config.critic.num_workers, config.critic.gpus_per_worker))
    if config.has_reference_workers:
        demands.append(model("reference", config.reference.num_workers, config.reference.gpus_per_worker))
    for index, scorer in enumerate(config.reward_models):
        demands.append(model(f"reward_models.{index}", scorer.num_workers, scorer.gpus_per_worker))
    for index, judge in enumerate(config.judges):
        place = config.cluster
        demands.append(judge_demand(judge, index, on_gpu, place.own_cores, place.colocate))
    if config.rewards:
        demands.append(RoleDemand("reward_workers", config.reward_workers.num_workers, 0.0))
    return demands


def transport(config: RunConfig, on_gpu: bool) -> Transport:
    """How weights travel; between CPU processes ``nccl`` runs its state machine over gloo."""
    backend = config.push.backend
    if backend == "auto":
        backend = ("ipc" if config.cluster.colocate else "nccl") if on_gpu else "file"
    return {"file": "file", "nccl": "group", "ipc": "ipc"}[backend]  # type: ignore[return-value]


def num_workers(config: RunConfig) -> int:
    """Processes of a run."""
    return sum(demand.num_workers for demand in role_demands(config, False))


def num_gpus_asked(config: RunConfig) -> float:
    """GPUs a run on GPUs needs in all: roles that share GPUs need those of the widest one."""
    asked = [demand.num_workers * demand.gpus_per_worker for demand in role_demands(config, True)]
    return max(asked) if config.cluster.colocate else sum(asked)


def _critic_adapter(critic: CriticSettings, facts: ModelFacts) -> tuple[int, tuple[int, int] | None]:
    """(trained parameters of the critic's adapter, (quantised ones, their bytes)) by the policy's shape; 0: all are.

    Bounds from above of what it needs: as if every linear layer of a dense decoder had the adapter, and no table of
    tokens were among what is quantised.
    """
    if critic.lora is None:
        return 0, None
    adapter = facts.layers * critic.lora.rank * (8 * facts.hidden + 3 * (facts.hidden + facts.intermediate))
    if critic.quantization is None:
        return adapter + facts.hidden, None
    linear = max(0, facts.num_params - 2 * facts.vocab * facts.hidden)
    num = linear if facts.quantized is None else facts.quantized[0]
    return adapter + facts.hidden, (num, int(num * QUANTIZED_BYTES[critic.quantization]))


def estimates(config: RunConfig, facts: ModelFacts, on_gpu: bool, compute_bytes: int) -> dict[str, MemoryEstimate]:
    """Memory of one worker (a generator: of one of its GPUs) of each role that holds a model.

    The critic and the reward models are taken to be of the policy's shape.
    """
    generator = config.generator
    shape = {"hidden": facts.hidden, "intermediate": facts.intermediate}

    def trained(
        settings: LearnerSettings, vocab: int, adapter: int, quantized: tuple[int, int] | None
    ) -> MemoryEstimate:
        return estimate_learner(
            facts.num_params,
            settings.zero_stage,
            settings.num_workers,
            token_budget=settings.token_budget,
            layers=facts.layers,
            logprob_chunk=settings.logprob_chunk,
            vocab=vocab,
            checkpointing=settings.gradient_checkpointing,
            compute_bytes=compute_bytes,
            offload_optimizer=settings.offload_optimizer != "none",
            offload_param=settings.offload_param != "none",
            adapter_params=adapter,
            quantized=quantized,
            **shape,
        )

    def frozen(token_budget: int, vocab: int, num_models: int = 1) -> MemoryEstimate:
        found = estimate_reference(
            num_models * facts.num_params, token_budget=token_budget, vocab=vocab,
            logprob_chunk=config.learner.logprob_chunk, compute_bytes=compute_bytes, **shape,
        )  # fmt: skip
        return replace(found, loading=facts.num_params * compute_bytes)  # one model after the other

    found = {
        "generator": estimate_generator(
            facts.num_params,
            tensor_parallel_size=generator.tensor_parallel_size,
            layers=facts.layers,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            max_num_seqs=1,  # vLLM takes what there is; one sample of full length must fit
            max_length=config.model.max_length or facts.max_length,
            compute_bytes=compute_bytes,
            kv_cache_bytes=None if on_gpu else int(generator.kv_cache_gib * 2**30),
        ),
        "learner": trained(config.learner, facts.vocab, facts.num_adapter_params, facts.quantized),
    }
    if transport(config, on_gpu) != "file":
        alone = config.model.lora is not None and not config.pushes_merged  # the adapter, in float32
        pushed = facts.num_adapter_params * 4 if alone else facts.num_params * compute_bytes
        on_host = on_gpu and transport(config, on_gpu) == "group"
        found["learner"] = with_staging(found["learner"], pushed, on_host)
    if config.algorithm.needs_critic:
        found["critic"] = trained(config.critic, 0, *_critic_adapter(config.critic, facts))
    if config.has_reference_workers:
        found["reference"] = frozen(config.reference.token_budget, facts.vocab)
    for index, model in enumerate(config.reward_models):
        found[f"reward_models.{index}"] = frozen(model.token_budget, 0, model.num_on_a_device(on_gpu))
    for index, judge in enumerate(config.judges):
        if judge.path is not None:
            own = check_model_folder(resolve_model(judge.path), f"judges.{index}.path")
            found[f"judges.{index}"] = estimate_generator(
                own.num_params, tensor_parallel_size=judge.generator.tensor_parallel_size, layers=own.layers,
                kv_heads=own.kv_heads, head_dim=own.head_dim, max_num_seqs=1,
                max_length=judge.max_length or own.max_length, compute_bytes=compute_bytes,
                kv_cache_bytes=None if on_gpu else int(judge.generator.kv_cache_gib * 2**30),
            )  # fmt: skip
    return found
