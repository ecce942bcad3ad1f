"""The sampling stream of each sample, from what names it and nothing else.  Imports nothing but hashlib.

A seed does not depend on the generator, the order of arrival or the batch, so a prompt that is
issued again after a fault is sampled from the same stream.
"""

from __future__ import annotations

import hashlib


def sample_seed(run_seed: int, prompt_id: str, sample_index: int, epoch: int) -> int:
    """63-bit seed: 0 <= seed < 2**63.

    ``epoch`` counts how often the prompt was issued before (``PromptStream.occurrence``), so the next
    epoch, or a second copy of the row, draws new samples.
    """
    name = f"{run_seed}/{prompt_id}/{sample_index}/{epoch}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"burnish-sample").digest(), "big") >> 1
