"""For whom a worker waits while it has no call: derived from what the others do.  Pure.

A learner's gap ends when its next batch is complete, its push delivered, its peer done.  At every moment of it the
learner waits for that of the things going on which *ended last before* the gap ended: the slowest one.  What goes on
beyond the end of the gap (a group of a later step, an evaluation beside the training) was not waited for.

    generator          waits for what the learner does (the gate is shut until it has), or waits for
    critic             for the learner while it learns, then as the scorers
    scorer, reference  for the generators while they sample, then as a generator

May import: trainers.accounting.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainers.accounting import Cause, Piece, Span, cut

GENERATOR, LEARNER, CRITIC = "generator", "learner", "critic"  # roles with rules of their own

# What somebody waits for who waits for a worker with this cause.  Stages of a group come from the loop's side,
# with the time that the group spent in a queue.
_AWAITED = {
    Cause.PUSH: "push", Cause.PAUSE: "push", Cause.CHECKPOINT: "checkpoint", Cause.EVALUATE: "evaluation",
    Cause.START: "start", Cause.GENERATE: GENERATOR, Cause.PREFILL_AGAIN: GENERATOR,
}  # fmt: skip
STAGES = ("score", "reference", CRITIC)  # of a group after it was sampled
WAITED_FOR = (GENERATOR, LEARNER, *STAGES, "push", "checkpoint", "evaluation", "start")


def explain(
    calls: Sequence[Sequence[Span[Cause]]],
    busy: Sequence[Sequence[Piece[Cause]]],
    roles: Sequence[str],
    stages: Sequence[Span[str]],
    start: int,
    end: int,
) -> list[list[Piece[str]]]:
    """For each worker its gaps in [start, end), cut by whom it waited for; label None: for nobody.

    Args:
        calls: spans of each worker; an open one ends after ``end``.
        busy: the same made disjoint, gaps with the label None; no gap of a learner goes on after ``end``.
        roles: of each worker.
        stages: of groups, labels of ``STAGES``, queues included.
    """
    awaited = [
        Span(s.start, s.end, _awaited(role, s.label), 0)
        for role, spans in zip(roles, calls, strict=True)
        for s in spans
        if role == LEARNER or s.label in _AWAITED or (role == CRITIC and s.label == Cause.LEARN)
    ]
    rivals = [*awaited, *stages]
    learners = {i: _slowest(busy[i], rivals) for i, role in enumerate(roles) if role == LEARNER}
    lap = awaited  # without a learner: whatever goes on
    if learners:
        first = next(iter(learners))
        own = [(p.start, p.end, _awaited(LEARNER, p.label)) for p in busy[first] if p.label is not None]
        own += [(p.start, p.end, p.label) for p in learners[first] if p.label is not None]
        lap = [Span(*times, 0) for times in own]
    sampling = [Span(s.start, s.end, GENERATOR, 1) for s in awaited if s.label == GENERATOR]
    learning = [Span(s.start, s.end, LEARNER, 2) for s in lap if s.label == LEARNER]
    views = {GENERATOR: cut(lap, start, end), CRITIC: cut([*lap, *sampling, *learning], start, end)}
    scorer = cut([*lap, *sampling], start, end)
    return [
        learners[i] if i in learners else _within(pieces, views.get(roles[i], scorer)) for i, pieces in enumerate(busy)
    ]


def _awaited(role: str, cause: Cause) -> str:
    """What is waited for by whoever waits for a worker of ``role`` that is busy with ``cause``."""
    return _AWAITED.get(cause, role)


def _slowest(pieces: Sequence[Piece[Cause]], rivals: Sequence[Span[str]]) -> list[Piece[str]]:
    gaps: list[Piece[str]] = []
    for gap in (p for p in pieces if p.label is None):
        over = [Span(s.start, s.end, s.label, s.end) for s in rivals if gap.start < s.end <= gap.end]
        gaps += cut(over, gap.start, gap.end)
    return gaps


def _within(pieces: Sequence[Piece[Cause]], view: Sequence[Piece[str]]) -> list[Piece[str]]:
    """The parts of ``view``, which is disjoint and in order, that lie in gaps of ``pieces``."""
    found: list[Piece[str]] = []
    place = 0
    for gap in (p for p in pieces if p.label is None):
        while place < len(view) and view[place].end <= gap.start:
            place += 1
        i = place
        while i < len(view) and view[i].start < gap.end:
            found.append(Piece(max(gap.start, view[i].start), min(gap.end, view[i].end), view[i].label))
            i += 1
    return found
