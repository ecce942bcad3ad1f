"""Replies on disk, by what was asked: a question that was answered once is not asked again.

The key is a digest of everything that shapes a reply: the model's name, the whole conversation (template, rubric and
texts are in it, filled in), the sampling parameters.  Not of it is where the model is served.  A reply is one small
file that appears by a rename, so any number of processes may write one folder; who comes second writes the same.
May import: trainers.asking.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.asking import Reply

VERSION = 1  # of the files' form


def question_key(body: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of a request's body (trainers/chat_protocol.py), whatever the order of its keys."""
    text = json.dumps({"version": VERSION, **body}, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, person=b"burnish-reply").hexdigest()


class ReplyCache:
    """Replies in ``folder``; a file that cannot be read is as good as none, and is written again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply to a question that was answered before."""
        try:
            found = json.loads(self._file(key).read_text(encoding="utf-8"))
            return Reply(
                str(found["text"]), cut_off=bool(found["cut_off"]), num_prompt_tokens=int(found["num_prompt_tokens"]),
                num_completion_tokens=int(found["num_completion_tokens"]),
            )  # fmt: skip
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; a silence is not one."""
        if reply.silence is not None:
            raise ValueError(f"a silence ({reply.silence}) is not kept: the question shall be asked again")
        target = self._file(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(
            target,
            {
                "text": reply.text, "cut_off": reply.cut_off, "num_prompt_tokens": reply.num_prompt_tokens,
                "num_completion_tokens": reply.num_completion_tokens,
            },
        )  # fmt: skip

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


class Account:
    """What a run spent on one endpoint, in ``folder``: a file of each process, summed up."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._file = folder / f"spent-{name}-{os.getpid()}-{os.urandom(4).hex()}.json"

    def spent(self) -> tuple[int, int]:
        """(requests, tokens) that every process wrote down, for a budget that a resumed run goes on with."""
        requests = tokens = 0
        for file in self._folder.glob(f"spent-{self._name}-*.json"):
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                requests, tokens = requests + int(found["num_requests"]), tokens + int(found["num_tokens"])
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue
        return requests, tokens

    def write(self, num_requests: int, num_tokens: int) -> None:
        """What this process spent so far; it replaces what it wrote before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._file, {"num_requests": num_requests, "num_tokens": num_tokens})


def _write(target: Path, value: Mapping[str, Any]) -> None:
    """The whole file or none of it, by a rename; equal names of scratch files cannot meet."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        scratch.write_text(json.dumps(value), encoding="utf-8")
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
