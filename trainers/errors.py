"""The errors that Burnish raises on purpose.  One line each: field, value, reason, remedy.  Imports nothing.

    BurnishError
    |- InputError          bad configuration, data, model folder or reward function (exit code 2)
    |   `- RowKindError    a row of another kind than what learns from it: the dataset is the wrong one
    |- EndpointError       a model behind an endpoint that nobody is answered by any more (exit code 1)
    |   |- EndpointDownError, EndpointSlowError, RateLimitedError, EndpointBrokenError, EndpointRejectedError,
    |   `- NonsenseError, BudgetSpentError
    |- VerificationError   two things that must be equal are not (fingerprints, checksums, probes)
    `- GroupFailedError    a prompt group that no generator could sample
        `- NoGeneratorError    there is no generator any more, nor will there be one
"""

from __future__ import annotations


class BurnishError(Exception):
    """Base of every error Burnish raises on purpose."""


class InputError(BurnishError):
    """Input that is refused before anything is allocated.

    ``field`` is a dotted configuration key or the name of a file, ``value`` what was found there,
    ``reason`` why it cannot be used and ``remedy`` what to do about it.
    """

    def __init__(self, field: str, value: object, reason: str, remedy: str) -> None:
        self.field, self.value, self.reason, self.remedy = field, value, reason, remedy
        super().__init__(field, value, reason, remedy)

    def __str__(self) -> str:
        shown = repr(self.value)
        if len(shown) > 160:
            shown = shown[:157] + "..."
        line = f"{self.field} = {shown}: {self.reason}; {self.remedy}"
        return " ".join(line.split())


class RowKindError(InputError):
    """A row of another kind than what learns from it: not the row is wrong, but the dataset."""


class EndpointError(BurnishError):
    """A model behind an endpoint cannot be asked any more; the run ends, and goes on from there once it is mended.

    ``status`` is the last HTTP status, or what there was in its place.
    """

    def __init__(self, url: str, status: str, reason: str, remedy: str) -> None:
        self.url, self.status, self.reason, self.remedy = url, status, reason, remedy
        super().__init__(url, status, reason, remedy)

    def __str__(self) -> str:
        return " ".join(f"{self.url} ({self.status}): {self.reason}; {self.remedy}".split())


class EndpointDownError(EndpointError):
    """Nobody takes the connection."""


class EndpointSlowError(EndpointError):
    """It takes the connection and does not answer in time."""


class RateLimitedError(EndpointError):
    """It wants to be left alone for longer than the run waits."""


class EndpointBrokenError(EndpointError):
    """It answers with errors of its own (5xx)."""


class EndpointRejectedError(EndpointError):
    """It takes no question of ours: key, model, address or parameters are wrong."""


class NonsenseError(EndpointError):
    """It answers, and not as chat completions are answered."""


class BudgetSpentError(EndpointError):
    """The run has asked as much as it may."""


class VerificationError(BurnishError):
    """A check of equality between two parts of the system failed."""


class GroupFailedError(BurnishError):
    """Every try to sample a group failed; ``reasons``: of each, oldest first."""

    def __init__(self, group_id: str, reasons: tuple[str, ...]) -> None:
        self.group_id, self.reasons = group_id, reasons
        super().__init__(group_id, reasons)

    def __str__(self) -> str:
        return f"group {self.group_id} was tried {len(self.reasons)} times: {'; '.join(self.reasons)}"


class NoGeneratorError(GroupFailedError):
    """It is not the group's fault, and every other group would fail as well."""
