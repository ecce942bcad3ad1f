"""What stands behind a comparison's paths, as digests.

May import: actors.model_folders, launch.{compare_config, contents}.
"""

from __future__ import annotations

from pathlib import Path

from launch.compare_config import CompareConfig
from launch.contents import digest, model_digest


def contents_of(config: CompareConfig, train: str, held_out: str) -> dict[str, str]:
    """Configuration key -> digest of what is there.

    Args:
        train, held_out: prompts as they are written down for the runs.
    """
    from actors.model_folders import resolve_model

    found = {"prompts.train": digest(train.encode()), "prompts.eval": digest(held_out.encode())}
    models = {"model.path": config.model.path}
    for index, scorer in enumerate(config.reward_models):
        paths = (scorer.path,) if isinstance(scorer.path, str) else scorer.path
        models |= {f"reward_models.{index}.path" + (f".{i}" if i else ""): path for i, path in enumerate(paths)}
    models |= {f"judges.{i}.path": judge.path for i, judge in enumerate(config.judges) if judge.path is not None}
    found |= {field: model_digest(Path(resolve_model(path))) for field, path in models.items()}
    for index, reward in enumerate(config.rewards):
        file = Path(reward.function.rpartition(":")[0])
        if file.suffix == ".py" and file.is_file():
            found[f"rewards.{index}.function"] = digest(file.read_bytes())
    return found
