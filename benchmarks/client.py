"""The measured client: a process of its own that does a fixed number of requests.

Run as `python -m benchmarks.client JSON`, prints `{"seconds": ...}`. It costs
little beside the system call: one preadv or pwritev a request into one aligned
buffer, with offsets and buffers made before the clock starts.

Invariants: the same workload gives the same requests in the same order each
time; with several jobs the clock runs from the common start to the last end.
"""

import json
import mmap
import os
import random
import sys
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Self

_PATTERN_SEED = 20


@dataclass(frozen=True, slots=True)
class Workload:
    """What a client does; lengths in bytes, counts for each job.

    `order` is "sequential" or "random" (each block at most once a pass);
    `sync_every` counts writes between two fdatasyncs, 0 for none; `final_sync`
    ends each job with one. Sequential jobs share the span evenly. With
    `warm_up` all requests are made once before the clock starts: what the host
    spends on dirtying a clean page is then behind both sides.
    """

    write: bool
    order: str
    block_length: int
    count: int
    span_length: int
    jobs: int = 1
    sync_every: int = 0
    final_sync: bool = False
    direct: bool = True
    warm_up: bool = False
    seed: int = 1

    def dump(self) -> str:
        """The JSON form that `load` takes."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Self:
        """The workload of a JSON form."""
        return cls(**json.loads(text))


def offsets(workload: Workload, job: int) -> list[int]:
    """Where each request of a job goes."""
    block_count = workload.span_length // workload.block_length
    if workload.order == "sequential":
        first = block_count * job // workload.jobs
        numbers = [(first + n) % block_count for n in range(workload.count)]
    else:
        rng = random.Random(workload.seed * 1000 + job)
        numbers = []
        while len(numbers) < workload.count:
            part = min(block_count, workload.count - len(numbers))
            numbers += rng.sample(range(block_count), part)
    return [number * workload.block_length for number in numbers]


def _run_job(path: str, workload: Workload, job: int, ready: int, go: int) -> None:
    flags = os.O_RDWR if workload.write else os.O_RDONLY
    fd = os.open(path, flags | (os.O_DIRECT if workload.direct else 0))
    memory = mmap.mmap(-1, workload.block_length)
    if workload.write:
        memory[:] = random.Random(_PATTERN_SEED).randbytes(workload.block_length)
    else:
        memory[:] = bytes(workload.block_length)
    wanted = offsets(workload, job)
    call = os.pwritev if workload.write else os.preadv
    buffers = [memory]
    sync_every = workload.sync_every
    if workload.warm_up:
        for offset in wanted:
            call(fd, buffers, offset)
    os.write(ready, b"r")
    os.read(go, 1)
    for number, offset in enumerate(wanted, 1):
        if call(fd, buffers, offset) != workload.block_length:
            raise OSError(f"short transfer at {offset}")
        if sync_every and number % sync_every == 0:
            os.fdatasync(fd)
    if workload.final_sync:
        os.fdatasync(fd)
    os.close(fd)


def run(path: str, workload: Workload) -> float:
    """Do the workload on `path`; the seconds that it took."""
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    children = []
    for job in range(workload.jobs):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _run_job(path, workload, job, ready_write, go_read)
                status = 0
            except OSError as error:
                print(f"job {job}: {error}", file=sys.stderr)
            finally:
                os._exit(status)
        children.append(child)
    # A child that fails before it is ready leaves the pipe's end to its parent.
    os.close(ready_write)
    for _ in children:
        if not os.read(ready_read, 1):
            break
    begun = perf_counter()
    os.write(go_write, b"g" * workload.jobs)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    seconds = perf_counter() - begun
    if failed:
        raise OSError(f"{len(failed)} of {workload.jobs} jobs failed")
    return seconds


def main() -> None:
    """Read path and workload from the command line, print the result."""
    _, path, text = sys.argv
    print(json.dumps({"seconds": run(path, Workload.load(text))}))


if __name__ == "__main__":
    main()
