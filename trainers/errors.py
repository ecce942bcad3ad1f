"""The errors that Burnish raises on purpose.  One line each: field, value, reason, remedy.  Imports nothing.

    BurnishError
    |- InputError          bad configuration, data, model folder or reward function (exit code 2)
    |- GroupLost           one group could not be sampled or scored; the run tries it again, or goes on without it
    `- VerificationError   two things that must be equal are not (fingerprints, checksums, probes)
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


class GroupLost(BurnishError):
    """Raised by a generator or scorer for one group that came to nothing; its text is the reason, in one line."""


class VerificationError(BurnishError):
    """A check of equality between two parts of the system failed."""
