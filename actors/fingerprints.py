"""Do the generator's weights equal the learner's?  Pure comparison of bit sums.

vLLM fuses some of a checkpoint's tensors (q, k, v into one) and shards them over tensor-parallel
workers.  Bit sums are additive, so the sum over the fused tensors of the learner must equal the sum
over the workers' shards; a parameter that every worker holds whole counts once.
May import: cluster.{errors, weight_channel}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import DamagedError
from cluster.weight_channel import MASK, TensorMeta, WeightManifest


@dataclass(frozen=True, slots=True)
class Verified:
    """How many parameters were compared where they lie, and which could not be.

    A parameter that a kernel repacked after load (its bits are elsewhere now) was compared when it
    arrived, against the same fingerprint.
    """

    num_after_load: int
    num_at_arrival: int


def fused_name(name: str, fused: Mapping[str, Sequence[str]]) -> str:
    """``...self_attn.q_proj.weight`` -> ``...self_attn.qkv_proj.weight`` where the engine fuses them."""
    parts = name.split(".")
    for whole, pieces in fused.items():
        for i, part in enumerate(parts):
            if part in pieces:
                return ".".join([*parts[:i], whole, *parts[i + 1 :]])
    return name


def served_manifest(
    sent: WeightManifest, workers: Sequence[Mapping[str, Sequence[int]]], who: str
) -> WeightManifest:
    """What must lie in the workers' memory after a low-rank update, in the place of the manifest of what was sent.

    The learner proves base and adapter to each worker by their fingerprints; each worker then makes the same sum of the
    same bits.  Its fingerprints are those of whole tensors, so that :func:`compare` finds them in what was loaded.

    Args:
        workers: per worker, name -> (bit sum, elements) of the whole tensors that it made.

    Raises:
        DamagedError: two workers made different tensors, or one of them none.
    """
    if sent.low_rank is None:
        raise ValueError(f"version {sent.version} is no low-rank update")
    first = {name: tuple(found) for name, found in workers[0].items()}
    for other in workers:
        odd = [name for name in sent.low_rank.base if tuple(other.get(name, ())) != first.get(name, (None,))]
        if odd:
            raise DamagedError(f"{who}: its workers made different tensors {odd[0]} of version {sent.version}")
    tensors = tuple(TensorMeta(name, sent.low_rank.dtype, (int(first[name][1]),)) for name in sent.low_rank.base)
    return WeightManifest(sent.version, tensors, {name: int(first[name][0]) for name in sent.low_rank.base})


def compare(
    manifest: WeightManifest,
    workers: Sequence[Mapping[str, tuple[int, int]]],
    fused: Mapping[str, Sequence[str]],
    who: str,
) -> Verified:
    """Compare the learner's fingerprints with what each worker of one engine holds.

    Args:
        manifest: what the learner sent.
        workers: per worker, name -> (bit sum, elements) of its parameters.
        fused: fused module name -> checkpoint module names.
        who: the generator, for the error.

    Raises:
        DamagedError: names the first parameter that differs.
    """
    expected: dict[str, int] = {}
    elements: dict[str, int] = {}
    for tensor in manifest.tensors:
        name = fused_name(tensor.name, fused)
        expected[name] = (expected.get(name, 0) + manifest.fingerprints[tensor.name]) & MASK
        elements[name] = elements.get(name, 0) + math.prod(tensor.shape)
    in_place = at_arrival = 0
    for name, total in expected.items():
        shards = [worker[name] for worker in workers if name in worker]
        if not shards or any(count == 0 for _, count in shards) or len(shards) != len(workers):
            at_arrival += 1
            continue
        if all(count >= elements[name] for _, count in shards):
            # Whole on every worker (vocabulary padding adds zeros, whose sum is 0): the first that differs.
            found = next((sum_ for sum_, _ in shards if sum_ != total), total)
        elif sum(count for _, count in shards) > elements[name] and len(workers) > 1:
            at_arrival += 1  # partly replicated (fewer key-value heads than workers): the sum counts some twice
            continue
        else:
            found = sum(s for s, _ in shards) & MASK
        if found != total:
            raise DamagedError(
                f"{who}: {name} has fingerprint {found:016x}, version {manifest.version} has {total:016x}; "
                "the generator does not serve these weights"
            )
        in_place += 1
    if in_place == 0:
        raise DamagedError(f"{who}: no parameter of version {manifest.version} could be compared after load")
    return Verified(in_place, at_arrival)
