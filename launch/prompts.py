"""Prompts: from rows to token ids, held-out questions kept apart, and a stream of them.

May import: numpy, trainers.errors, trainers.experience, launch.config, launch.datasets.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from launch.config import PromptSettings
from launch.datasets import Row, load_rows, prompt_key
from trainers.errors import InputError
from trainers.experience import Prompt
from trainers.reward_calls import PROTOCOL

TRAIN, EVAL = "prompts.train", "prompts.eval"


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """How many prompts there are, how many of them differ, and how many were removed to keep eval apart."""

    num_train: int
    num_train_distinct: int
    num_eval: int
    num_eval_distinct: int
    num_removed: int


def load_prompts(
    settings: PromptSettings, tokenizer: Any, max_prompt_tokens: int, seed: int
) -> tuple[list[Prompt], list[Prompt], DatasetReport]:
    """Training and held-out prompts with no question in common.

    Held-out questions are chosen first.  A procedural train set then draws others, so a small
    question space serves both; from a train file nothing is taken: its questions leave eval instead.
    Without ``settings.eval`` the second list is empty.
    """
    held_rows: list[Row] = [] if settings.eval is None else load_rows(settings.eval, seed, EVAL)
    procedural = settings.train.procedural is not None
    exclude = {prompt_key(row["prompt"]) for row in held_rows} if procedural else set()
    train_rows = load_rows(settings.train, seed, TRAIN, exclude)
    train = build_prompts(train_rows, settings, tokenizer, max_prompt_tokens, TRAIN)
    held_out = build_prompts(held_rows, settings, tokenizer, max_prompt_tokens, EVAL)
    if settings.eval is None:
        num_distinct = len({p.prompt_id for p in train})
        return train, [], DatasetReport(len(train), num_distinct, 0, 0, 0)
    return split_disjoint(train, held_out, remove_from="train" if procedural else "eval")


def split_disjoint(
    train: Sequence[Prompt], held_out: Sequence[Prompt], remove_from: Literal["train", "eval"] = "eval"
) -> tuple[list[Prompt], list[Prompt], DatasetReport]:
    """(train, held_out, report) with no prompt id in common, and no id twice in held_out.

    Common prompts are removed from the side ``remove_from``; raises InputError when nothing of it remains.
    """
    held = list({p.prompt_id: p for p in reversed(held_out)}.values())[::-1]  # the first of equal ones stays
    kept = list(train)
    if remove_from == "eval":
        others = {p.prompt_id for p in train}
        held = [p for p in held if p.prompt_id not in others]
    else:
        others = {p.prompt_id for p in held}
        kept = [p for p in kept if p.prompt_id not in others]
    for field, left, given in ((EVAL, held, held_out), (TRAIN, kept, train)):
        if not left:
            raise InputError(
                field, f"{len(given)} prompts", "none is left that is not in the other set too", "use other questions"
            )
    num_removed = len(train) + len(held_out) - len(kept) - len(held)
    report = DatasetReport(len(kept), len({p.prompt_id for p in kept}), len(held), len(held), num_removed)
    return kept, held, report


# --- rows to prompts --------------------------------------------------------------------------


def build_prompts(
    rows: Sequence[Row], settings: PromptSettings, tokenizer: Any, max_prompt_tokens: int, field: str
) -> list[Prompt]:
    """Render and tokenise each row.

    Plain text goes through ``template``; then the chat template is applied if ``chat`` is set.  Messages
    always get the chat template.  ``system`` is put before both, unless the messages bring their own.
    ``field`` names the dataset in errors.  Raises InputError for a prompt longer than
    ``max_prompt_tokens``, a tokenizer without a chat template, and columns that are not JSON.
    """
    if "{prompt}" not in settings.template:
        raise InputError("prompts.template", settings.template, "shows no prompt", "put {prompt} into it")
    if taken := {name for row in rows for name in row} & set(PROTOCOL):
        raise InputError(field, sorted(taken), "reward functions get their own lists of these names",
                         "rename the columns")  # fmt: skip
    return [_build(row, i, settings, tokenizer, max_prompt_tokens, field) for i, row in enumerate(rows)]


def _build(row: Row, i: int, settings: PromptSettings, tokenizer: Any, max_tokens: int, field: str) -> Prompt:
    where, source = f"{field} row {i}", row["prompt"]
    text, ids = _render(source, settings, tokenizer, where)
    if not 1 <= len(ids) <= max_tokens:
        raise InputError(
            where,
            text,
            f"has {len(ids)} tokens, and 1 to {max_tokens} are allowed",
            "remove or shorten it, raise model.max_length or lower generator.sampling.max_tokens",
        )
    token_ids = np.array(ids, dtype=np.int32)
    token_ids.setflags(write=False)
    return Prompt(
        prompt_id=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        token_ids=token_ids,
        text=tokenizer.decode(ids),
        source=source,
        columns={name: _plain(value, f"{where}, column {name}") for name, value in row.items() if name != "prompt"},
    )


def _render(source: Any, settings: PromptSettings, tokenizer: Any, where: str) -> tuple[str, list[int]]:
    """The rendered text and its token ids."""
    if isinstance(source, str):
        content = settings.template.replace("{prompt}", source)
        if not settings.chat:
            if settings.system is not None:
                raise InputError("prompts.system", settings.system, "plain text has no system message",
                                 "put it into prompts.template, or set prompts.chat=true")  # fmt: skip
            return content, list(tokenizer.encode(content))
        messages = [{"role": "user", "content": content}]
    else:
        messages = list(source)
    if settings.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": settings.system})
    if not tokenizer.chat_template:
        raise InputError(
            "prompts.chat",
            settings.chat,
            f"{where} needs a chat template, and the tokenizer has none",
            "use a model that has one" + (", or set prompts.chat=false" if isinstance(source, str) else ""),
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except TemplateError as error:
        raise InputError(
            where, messages, f"the chat template refuses it: {error}", "give messages that the model knows"
        ) from error
    return text, list(ids)


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON would bring it back, so that every process sees the same."""

    def convert(other: Any) -> Any:
        if isinstance(other, (np.generic, np.ndarray)):
            return other.tolist()
        if isinstance(other, (datetime.date, datetime.time)):
            return other.isoformat()
        if isinstance(other, decimal.Decimal):
            return float(other)
        raise TypeError(f"{type(other).__name__} is not JSON")

    try:
        return json.loads(json.dumps(value, default=convert))
    except (TypeError, ValueError) as error:
        raise InputError(where, value, f"cannot be kept: {error}", "remove or convert the column") from error


# --- the stream -------------------------------------------------------------------------------


class PromptStream:
    """Epoch after epoch of ``prompts``, each in an order that ``seed`` and the epoch alone determine.

    A position counts prompts from the start of the run; what stands there is pure arithmetic, so the stream has
    no cursor (the ledger knows what was used), and a position that is issued again yields the same prompt.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise InputError(TRAIN, 0, "has no prompts", "give a dataset that has some")
        self._prompts, self._seed, self._shuffle = tuple(prompts), seed, shuffle
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))  # epoch, its order
        self._copies: dict[str, list[int]] = {}  # prompt id -> indices of its copies
        for i, prompt in enumerate(self._prompts):
            self._copies.setdefault(prompt.prompt_id, []).append(i)
        names = [str(seed), str(shuffle), *(p.prompt_id for p in self._prompts)]
        self._digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._prompts)

    def at(self, position: int) -> Prompt:
        """The prompt at ``position``."""
        return self._prompts[self._index(position)]

    def occurrence(self, position: int) -> int:
        """A number that differs between all turns of one question: the epoch, if no question has a copy.

        Pass it to ``sample_seed`` as ``epoch``: copies of one question then draw different samples.
        """
        index = self._index(position)
        copies = self._copies[self._prompts[index].prompt_id]
        return position // len(self) * len(copies) + copies.index(index)

    def identity(self) -> dict[str, Any]:
        """JSON values; ``digest`` names the prompts and their order."""
        return {"num_prompts": len(self), "digest": self._digest}

    def check(self, identity: Mapping[str, Any]) -> None:
        """InputError when ``identity`` was taken of other prompts or another order."""
        if identity["digest"] != self._digest or identity["num_prompts"] != len(self):
            raise InputError(
                TRAIN,
                f"{len(self)} prompts",
                f"are not the {identity['num_prompts']} prompts (or their order) that the checkpoint was made with",
                "restore the dataset, its settings, prompts.shuffle and run.seed, or start a new run",
            )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if not self._shuffle:
            return place
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self)))
        return int(self._order[1][place])
