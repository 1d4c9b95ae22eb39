"""A lock for what a process makes once."""

from __future__ import annotations

import os
import threading
from typing import Any


class OneAtATime:
    """`with` it: one thread at a time, which may come back to it from within.

    A child process begins with a free one: who held it, when a thread forked, is not there.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()
