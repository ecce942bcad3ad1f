"""What may be a secret: redacted before anything is written down or sent.  Whether W&B would find a key.

May import: the standard library.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

REDACTED = "<redacted>"
_SECRET_NAME = re.compile(r"token(?!iz)|key|secret|password", re.IGNORECASE)
_COUNT_NAME = re.compile(r"tokens|token_", re.IGNORECASE)  # max_tokens, token_budget: names of numbers
_SECRET_VALUE = re.compile(
    r"\b[0-9a-f]{40}\b|\bwandb_v\d+_\w{20,}|\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{20,}|://[^/\s@]+:[^/\s@]+@"
)
_SECRET_ARGUMENT = re.compile(r"(token(?!s|_|iz)|key|secret|password)[\w.-]*(=|$)", re.IGNORECASE)


def redact(value: Any, name: str = "") -> Any:
    """``value`` with everything that could be a secret replaced, at any depth.

    A value goes when its key matches token, key, secret or password, or when it looks like a credential.
    Numbers whose key counts tokens (max_tokens, token_budget) stay, as do booleans and null.
    """
    if value is None or isinstance(value, bool):
        return value
    if _SECRET_NAME.search(name) and not (isinstance(value, int | float) and _COUNT_NAME.search(name)):
        return REDACTED
    if isinstance(value, Mapping):
        return {str(k): redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if isinstance(value, str):
        return REDACTED if _SECRET_VALUE.search(value) else value
    return value


def wandb_key_is_there() -> bool:
    """Whether W&B would find a key without asking: its variables, or the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for place in (Path(p).expanduser() for p in places):
        try:
            if place.is_file() and netrc.netrc(str(place)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def command_line_has_secrets(arguments: Sequence[str]) -> bool:
    """Whether an argument names or holds what could be a secret."""
    return any(_SECRET_ARGUMENT.search(a) or _SECRET_VALUE.search(a) for a in arguments)
