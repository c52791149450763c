"""Several waits of one request at once, with plain exceptions.

A trio nursery wraps what fails in it into an exception group, which nobody
above a node expects. Invariant: `run_all` returns only when every job that was
begun has ended, so that no buffer is touched later.
"""

from collections.abc import Awaitable, Callable, Sequence

import trio


async def run_all(jobs: Sequence[Callable[[], Awaitable[None]]], worker_count: int) -> None:
    """Run all jobs, at most `worker_count` at a time; raises the first error met.

    After an error, jobs that have not begun are left out.
    """
    if len(jobs) == 1:
        await jobs[0]()
        return
    waiting = iter(jobs)
    failures: list[Exception] = []

    async def work() -> None:
        for job in waiting:
            try:
                await job()
            except Exception as error:
                failures.append(error)
            if failures:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(min(worker_count, len(jobs)) - 1):
            nursery.start_soon(work)
        await work()
    if failures:
        raise failures[0]
