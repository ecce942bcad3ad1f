"""The task of ``make pipeline`` for commands that go on where it ended: its recipes, and what makes them tiny.

May import: the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping

LABEL_RECIPE = "cpu-pipeline-label"
TINY = ("cluster.backend=in_process",)
QUICK: Mapping[str, tuple[str, ...]] = {
    "sft": (*TINY, "model.path=builtin:tiny-llama", "run.num_steps=2", "run.batch_size=4", "evaluation.size=8"),
    "label": (*TINY, "run.num_prompts=24", "model.max_length=128", "sampling.max_tokens=8"),
    "reward": (*TINY, "model.max_length=128", "run.batch_size=4", "evaluation.size=8"),
    "ppo": (*TINY, "model.max_length=128", "run.num_steps=2", "run.groups_per_step=4", "prompts.eval.size=4",
            "evaluation.every=1", "generator.sampling.max_tokens=8"),
    "eval": (*TINY, "model.max_length=128", "eval.num_prompts=8", "generator.sampling.max_tokens=8"),
    "dpo": (*TINY, "run.num_steps=2", "run.batch_size=4", "evaluation.size=4"),
    # as many prompts as a round labels
    "few": (*TINY, "model.max_length=128", "sampling.max_tokens=8", "run.num_prompts=12"),
}  # fmt: skip
