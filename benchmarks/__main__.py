"""`python -m benchmarks`: qcowfs against qemu-storage-daemon, case by case.

Runs as any user; cases with loop devices only as root. The client is
benchmarks/client.py for both sides. Work goes on in a temporary folder (give
one on a real disk with --folder), which is gone at the end.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.cases import Case, all_cases
from benchmarks.images import GIB, MIB, Images
from benchmarks.measure import Bench, Result, Side, remove_folder
from benchmarks.servers import ServerFailed, qcowfs, qemu_export

RESULTS = Path(__file__).resolve().parent / "results"
_ROOM = 8 * GIB


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", action="append", metavar="CASE", help="run this case (may be repeated)")
    add("--rounds", type=int, default=3, metavar="N", help="times A B B A (default 3)")
    add("--qsd", default="qemu-storage-daemon", metavar="PATH", help="the peer's program")
    add("--size", type=int, default=1024, metavar="MIB", help="disk size in MiB (default 1024)")
    add("--folder", type=Path, help="where to work; on the disk to be measured")
    add("--output", type=Path, default=RESULTS, help="where the results go")
    add("--option", action="append", default=[], metavar="OPT",
        help="an option for `qcowfs mount` (write --option=--no-lane)")  # fmt: skip
    add("--list", action="store_true", help="list the cases and end")
    return parser.parse_args()


def _choose(cases: list[Case], wanted: list[str] | None) -> list[Case]:
    if wanted is None:
        return cases
    unknown = set(wanted) - {case.name for case in cases}
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    return [case for case in cases if case.name in wanted]


def _first_line(*command: str) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False
    )
    return done.stdout.splitlines()[0] if done.stdout else command[0]


def _about(qsd: str, rounds: int) -> str:
    return (
        f"{os.cpu_count()} processors, Linux {platform.release()}, "
        f"Python {platform.python_version()}; peer: {_first_line(qsd, '--version')}; "
        f"medians of {2 * rounds} paired runs. Ratio: time of qcowfs by time of the peer."
    )


def _sides(case: Case, arguments: argparse.Namespace) -> tuple[Side, Side]:
    ours = Side("qcowfs", qcowfs(*arguments.option), case.measure)
    peer = Side("peer", qemu_export(arguments.qsd), case.measure_peer or case.measure)
    return ours, peer


def _run_case(bench: Bench, case: Case, arguments: argparse.Namespace) -> Result:
    image = bench.images.get(case.image_name, case.make_image)
    ours, peer = _sides(case, arguments)
    return bench.run_pairs(case.name, image, ours, peer, rounds=arguments.rounds, fresh=case.fresh)


def main() -> int:
    """Run the cases that were asked for; 1 when one failed."""
    arguments = _arguments()
    cases = _choose(all_cases(arguments.size * MIB), arguments.only)
    if arguments.list:
        for case in cases:
            print(f"{case.name:32} {case.what}")
        return 0
    if shutil.which(arguments.qsd) is None:
        sys.exit(f"{arguments.qsd} is not there; --qsd PATH names another")
    work = Path(tempfile.mkdtemp(prefix="qcowfs-bench-", dir=arguments.folder))
    (work / "images").mkdir()
    if shutil.disk_usage(work).free < _ROOM:
        remove_folder(work)
        sys.exit(f"less than {_ROOM // GIB} GiB free in {work.parent}")
    images = Images(work / "images", arguments.size * MIB)
    bench = Bench(work, images)
    entries: list[tuple[Case, Result]] = []
    failed = False
    print(report.HEAD, flush=True)
    try:
        for case in cases:
            if case.missing or (case.needs_root and os.geteuid() != 0):
                continue
            try:
                result = _run_case(bench, case, arguments)
            except (ServerFailed, OSError, RuntimeError, subprocess.SubprocessError) as error:
                print(f"{case.name}: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            entries.append((case, result))
            print(report.row(case, result), flush=True)
    finally:
        remove_folder(work)
    if entries:
        missing = [case for case in cases if case.missing]
        report.write(arguments.output, entries, missing, _about(arguments.qsd, arguments.rounds))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
