"""Profiles: how deep the prefixes of a model may be reused."""

from .depth_table import DepthTable
from .pairs import read_pairs
from .profiler import profile

__all__ = ["DepthTable", "profile", "read_pairs"]
