"""What the records of a labelling run say of its judge: replies that could not be read, swap consistency, axes.

May import: trainers.{labellers, rubric}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from trainers.labellers import Labels
from trainers.rubric import Unmarked


@dataclass
class JudgeCounts:
    """Counts over records; JSON values."""

    unread: Counter[str] = field(default_factory=Counter)  # replies that could not be read, by kind
    num_read: int = 0  # pairs whose verdicts could be read in both orders
    num_consistent: int = 0  # of these, such that the verdict survives the swap
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)  # sum over candidates, and their number

    def add(self, notes: Mapping[str, Any], labels: Labels) -> None:
        """One record: what a judge of pairs, or of single answers, said and did not say."""
        self.unread.update(kind for *_, ab, ba in notes.get("unread", []) for kind in (ab, ba) if kind is not None)
        marks = (entry[2] for entry in notes.get("failures", []))
        self.unread.update(kind for kind in marks if kind in get_args(Unmarked))
        for name, values in notes.get("parts", {}).items():
            known = [value for value in values if value is not None]
            total, num = self.parts.get(name, (0.0, 0))
            self.parts[name] = total + sum(known), num + len(known)
        if "verdicts" in notes:
            found = sum(o.value is not None for o in labels.outcomes)
            self.num_consistent += found
            self.num_read += found + sum(o.reason == "inconsistent" for o in labels.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """What there is to say; nothing of a labeller that is no judge."""
        found: dict[str, Any] = {"unread": dict(self.unread.most_common())} if self.unread else {}
        found |= {f"mean_part_{name}": total / num for name, (total, num) in self.parts.items() if num}
        return found | ({"swap_consistency": self.num_consistent / self.num_read} if self.num_read else {})
