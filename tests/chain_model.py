"""A language model that says one thing whatever it is asked, on real engines.  Not a test."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer

SURE = 10.0


def chain_model(folder: Path, says: str) -> str:
    """A model folder; greedy or not it answers ``says`` and ends, after any text that ends with none of its tokens.

    The layers add nothing, so that a token's embedding alone chooses the next one: each token of ``says`` has a
    direction of its own, which leads to its successor, all others share the one that leads to the first.
    """
    path = resolve_model("builtin:tiny-llama")
    tokenizer, model = load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path)
    chain = tokenizer.encode(says, add_special_tokens=False)
    assert len(set(chain)) == len(chain) < model.config.hidden_size, "each token has one successor"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.zero_()
        head.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding[:, 0] = 1.0
        for place, (token, successor) in enumerate(zip(chain, [*chain[1:], model.config.eos_token_id]), start=1):
            embedding[token] = 0.0
            embedding[token, place] = 1.0
            head[successor, place] = SURE
        head[chain[0], 0] = SURE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
