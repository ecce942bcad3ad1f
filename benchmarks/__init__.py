"""Measurements against plain baselines on this machine, and the checks that need a GPU.  Not part of the package."""
