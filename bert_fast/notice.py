"""Warnings of this package, each said once in a process: forwards run in loops."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(told: str, stacklevel: int = 5) -> None:
    """A UserWarning, unless the same was said before. stacklevel: as in `warnings.warn`."""
    warnings.warn(told, stacklevel=stacklevel)
