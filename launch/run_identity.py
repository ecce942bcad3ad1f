"""What must be the same for a run of records to be continued: digests, and the settings that stand behind them.

A digest says that something differs, the settings say what.  They are redacted before they are compared or stored.
May import: trainers.errors, launch.redaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.redaction import redact
from trainers.errors import InputError

OF_REPLIES = ("model", "parameters")  # of an endpoint's section
LONGEST_SHOWN = 80  # characters of a value that the run was started with


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Of one run; both mappings have the same keys."""

    digests: Mapping[str, str]
    settings: Mapping[str, Any]  # plain data: what decides, and the paths of files whose content is in the digest

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        shown = {name: dict(flattened(redact(value, name), name)) for name, value in self.settings.items()}
        return {"identity": dict(self.digests), "identity_settings": shown}

    def check(self, manifest: Path) -> None:
        """InputError where the run with this ``manifest`` was started with something else.

        It names the first setting that differs, with both values.  Where none does, the content of a file differs,
        and where the manifest holds no settings nothing else is known: then both digests are shown.
        """
        before, now = json.loads(manifest.read_text()), self.to_json()
        for name, digest in now["identity"].items():
            if before["identity"].get(name) == digest:
                continue
            remedy = "restore it, or start a new run under another run.name"
            ours, theirs = now["identity_settings"][name], before.get("identity_settings", {}).get(name, {})
            for key in {**theirs, **ours} if theirs else ():
                if ours.get(key) != theirs.get(key):
                    reason = f"the run was started with {_short(theirs.get(key))}"
                    raise InputError(key, ours.get(key), reason, remedy)
            what = "the run was started with another one"
            if theirs:
                what = "no setting that is written down differs, but a file or function behind one, or a redacted one"
            raise InputError(name, digest, f"{what} (digest {before['identity'].get(name)})", remedy)


def deciding(value: Any) -> Any:
    """``value`` without what an endpoint's section says of pace, budget and address: it decides no reply."""
    if isinstance(value, Mapping):
        is_endpoint = "base_url" in value and "model" in value
        return {key: deciding(item) for key, item in value.items() if not is_endpoint or key in OF_REPLIES}
    return [deciding(item) for item in value] if isinstance(value, list | tuple) else value


def flattened(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping) and value:
        items = iter(value.items())
    elif isinstance(value, list | tuple) and value:
        items = iter(enumerate(value))
    if items is None:
        yield name, value
        return
    for key, below in items:
        yield from flattened(below, f"{name}.{key}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= LONGEST_SHOWN else shown[: LONGEST_SHOWN - 3] + "..."
