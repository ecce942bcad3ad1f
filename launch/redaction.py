"""What may be a secret: refused in a recipe, redacted in what is shared.  Whether W&B would find a key.

What is surely a secret is refused where a recipe is read: a run's config.yaml holds true values, so that it is a recipe
again.  What only may be one (any name with "key" in it) is redacted in W&B, in provenance and in reports.
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
_SURE_NAME = re.compile(
    r"(?:^|[_.-])(?:api_?key|(?:access|auth|api|bearer|hf|refresh)_?token|(?:access|private|secret)_?key|secret|password|"
    r"passwd|authorization)$",
    re.IGNORECASE,
)
_SURE_VALUE = re.compile(  # not the last part of a path: /data/hf_ultrafeedback_binarized, /models/sk-small
    r"(?<![/\w])(?:wandb_v\d+_\w{20,}|hf_[A-Za-z0-9]{30,}\b|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})|"
    r"://[^/\s@:]+:[^/\s@]+@"
)
_SECRET_VALUE = re.compile(
    r"(?<!/snapshots/)\b[0-9a-f]{40}\b|\bwandb_v\d+_\w{20,}|\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{20,}|://[^/\s@]+:[^/\s@]+@"
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


def find_secret(value: Any, name: str = "") -> str | None:
    """Dotted key of the first text that is surely a secret, by its own key or by its looks; None if there is none.

    Keys are compared without regard to case and hyphens; names of variables (``api_key_env``) are no secrets.
    """
    if isinstance(value, Mapping):
        below = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        below = [(f"{name}.{index}", item) for index, item in enumerate(value)]
    else:
        last = name.rpartition(".")[2].replace("-", "_")
        is_secret = isinstance(value, str) and value and (_SURE_NAME.search(last) or _SURE_VALUE.search(value))
        return name if is_secret else None
    return next((found for key, item in below if (found := find_secret(item, key)) is not None), None)


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
