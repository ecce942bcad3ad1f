"""What share of the trained parameters an optimizer step changed.  May import: torch, actors.engine."""

from __future__ import annotations

import torch

from actors.engine import TrainingEngine

SAMPLED = 4096  # elements looked at in each tensor, at least; a tensor of fewer is looked at whole


class ParameterChange:
    """Compares parameters before and after a step, on evenly spaced elements of every trained tensor.

    The compared values are the float32 ones that the optimizer keeps, whole under ZeRO 3 too: there each look is one
    gathering of the model, tensor by tensor.  Every method is a collective and gives the same on all ranks.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self._before: list[tuple[int, torch.Tensor]] = []

    def look(self) -> None:
        """Call before the step."""
        self._before = self._elements()

    def fraction(self) -> float:
        """Share of the parameters whose value differs from that at :meth:`look`, which is forgotten."""
        before, self._before = self._before, []
        pairs = [(size, (then != now).double().mean()) for (size, then), (_, now) in zip(before, self._elements())]
        return float(sum(size * share for size, share in pairs) / sum(size for size, _ in pairs))

    def _elements(self) -> list[tuple[int, torch.Tensor]]:
        """(number of elements, copies of those looked at) of every trained tensor."""
        found = []
        for _, parameter in self._engine.named_parameters():
            if parameter.requires_grad:
                with self._engine.whole([parameter]):
                    flat = parameter.detach().flatten()
                    found.append((flat.numel(), flat[:: max(1, flat.numel() // SAMPLED)].clone()))
        return found
