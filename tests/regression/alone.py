"""Compilers that time their choices in processes beside one another: each timing has the GPU for itself."""

from __future__ import annotations

import fcntl
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def holding(path: str) -> Iterator[None]:
    """A lock of the file system's, which a process that is ended gives back."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_alone(gpu: Callable[[], AbstractContextManager[None]], only_compile: bool = False) -> None:
    """The compilers' own timings hold the GPU. only_compile: Triton's autotuner runs each configuration once and times none."""
    from torch._inductor.runtime.benchmarking import benchmarker
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def locked(*args: Any, **kwargs: Any) -> Any:
            with gpu():
                return function(*args, **kwargs)

        return locked

    def once(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
        call()
        return [0.0] * len(quantiles)

    short = alone(functools.partial(do_bench, warmup=5, rep=20))
    Autotuner.do_bench = property(lambda _: once if only_compile else short)
    benchmarker.benchmark_gpu = alone(benchmarker.benchmark_gpu)
