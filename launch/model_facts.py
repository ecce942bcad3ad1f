"""What a Hugging Face folder says about its model, read without loading it: config.json and safetensors headers.

May import: trainers.errors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.errors import InputError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_HEADER_BYTES = 100 * 2**20  # the safetensors format's own limit
FIELD = "model.path"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Counts of a decoder model.  ``num_params`` is counted from the weights, not guessed from the shape."""

    num_params: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    max_length: int  # tokens
    architecture: str
    intermediate: int = 0
    head_dim: int = 0
    num_adapter_params: int = 0  # trained ones, where an adapter is trained; 0: all are
    quantized: tuple[int, int] | None = None  # (parameters of the base that are quantised, their bytes)


def check_model_folder(path: str | Path, field: str = FIELD) -> ModelFacts:
    """Check that a model folder is complete and return its facts.

    Raises InputError: no folder, no or unreadable config.json, no safetensors, a shard that is missing
    or cut short, no tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(field, str(path), "there is no such folder on this machine", "give a Hugging Face folder")
    if (folder / "adapter_config.json").is_file():
        if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors*")):
            reason = "holds adapter_config.json beside a whole model, and transformers would load that adapter too"
            raise InputError(field, str(path), reason, "move the files of the adapter elsewhere")
        raise InputError(field, str(path), "is an adapter, not a whole model",
                         "merge it into its base with `burnish merge` and give that folder")  # fmt: skip
    config = _read_json(folder / "config.json", field)
    shards = _shards(folder, field)
    num_params = sum(_count_parameters(shard, field) for shard in shards)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(field, str(path), "has no tokenizer", "add tokenizer.json next to config.json")
    text = config.get("text_config", config)

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(text.get(name), int):
                return int(text[name])
        if default is not None:
            return default
        reason = f"config.json has no {' or '.join(names)}"
        raise InputError(field, str(path), reason, "use the folder of a decoder language model")

    hidden = number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    return ModelFacts(
        num_params=num_params,
        hidden=hidden,
        layers=number("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        vocab=number("vocab_size"),
        max_length=number("max_position_embeddings", "n_positions"),
        architecture=(config.get("architectures") or ["unknown"])[0],
        intermediate=number("intermediate_size", "n_inner", default=4 * hidden),
        head_dim=number("head_dim", default=hidden // heads),
    )


def _read_json(file: Path, field: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(field, str(file), "is missing", "give the folder save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise InputError(field, str(file), f"cannot be read ({error})", "copy the model again") from error
    if not isinstance(content, dict):
        raise InputError(field, str(file), "is not a JSON object", "copy the model again")
    return content


def _shards(folder: Path, field: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, field).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            reason = f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
            raise InputError(field, str(folder), reason, "copy the model again")
        shards = [folder / name for name in names]
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InputError(field, str(folder), "has no *.safetensors", "save the weights with save_pretrained")
    return shards


def _count_parameters(shard: Path, field: str) -> int:
    """Parameters in one file.  The header also says how long the file must be."""
    remedy = "copy the file again"
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = shard.stat().st_size
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                reason = f"has {size} bytes, less than its header alone: it is cut short or not safetensors"
                raise InputError(field, str(shard), reason, remedy)
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        count = sum(int(math.prod(entry["shape"])) for entry in tensors)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(field, str(shard), f"its header cannot be read ({error})", remedy) from error
    if size != needed:
        reason = f"has {size} bytes, its header says {needed}"
        raise InputError(field, str(shard), reason, remedy)
    return count
