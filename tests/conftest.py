"""What holds for every test: how long an example takes says something about the machine, nothing about a law."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("burnish", deadline=None)
settings.load_profile("burnish")
