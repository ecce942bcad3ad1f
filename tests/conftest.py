"""What holds for every test: how long an example takes says something about the machine, nothing about a law."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("burnish", deadline=None)
settings.load_profile("burnish")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For `pytestmark = pytest.mark.usefixtures("one_thread")`: tiny matrices only lose by a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
