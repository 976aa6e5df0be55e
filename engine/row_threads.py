"""Threads for the loops that leave the GIL alone (engine/logit_kernels.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")


class RowThreads:
    """`count` threads; None: as many as this process may use cores. The work of one runs in the caller's own."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.count) if self.count > 1 else None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def each(self, work: Callable[[Item], object], items: Iterable[Item]) -> None:
        """Does the work for every item; the first error is raised when all have ended."""
        if self._pool is None:
            for item in items:
                work(item)
            return
        for done in [self._pool.submit(work, item) for item in items]:
            done.result()

    def share(self, size: int, work: Callable[[int, int], object]) -> None:
        """Does the work for parts [first, last) of range(size), one for each thread."""
        ends = [size * index // self.count for index in range(self.count + 1)]
        self.each(lambda part: work(*part), [part for part in pairwise(ends) if part[0] < part[1]])
