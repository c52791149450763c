"""Results as a Markdown table, as JSON, and as an SVG bar chart."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.measure import Result, Sample, median

_MIB = 1 << 20
_ROW = 22
_LEFT = 230
_WIDTH = 760
_RIGHT = 70


def _time(seconds: float, count: int) -> str:
    """Per request where there are many, else in all."""
    if count > 100:
        return f"{seconds / count * 1e6:.1f} µs"
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _memory(sample: Sample) -> str:
    return f"{sample.peak_memory / _MIB:.0f} MiB" if sample.peak_memory else "-"


def row(case: Case, result: Result) -> str:
    """One line of the table."""
    ours, peer = median(result.ours), median(result.peer)
    wanted = f"{case.ratio:.1f}" if case.ratio is not None else "-"
    if case.seconds is not None:
        wanted = f"{case.seconds} s"
    cpu = "-"
    if ours.cpu_seconds:
        cpu = f"{ours.cpu_seconds * 1e6:.1f} / {peer.cpu_seconds * 1e6:.1f}"
    return (
        f"| {case.name} | {_time(ours.seconds, ours.request_count)} "
        f"| {_time(peer.seconds, peer.request_count)} | **{result.ratio:.2f}** | {wanted} "
        f"| {_memory(ours)} / {_memory(peer)} | {cpu} |"
    )


HEAD = (
    "| case | qcowfs | peer | ratio | to reach | peak memory | CPU µs a request |\n"
    "|---|---|---|---|---|---|---|"
)


def table(entries: Sequence[tuple[Case, Result]], missing: Sequence[Case], about: str) -> str:
    """The whole Markdown document."""
    lines = [f"{about}\n", HEAD, *(row(case, result) for case, result in entries), ""]
    lines += [f"- {case.name}: {case.what}" for case, _ in entries]
    if missing:
        lines += ["", "Not run:", ""]
        lines += [f"- {case.name}: {case.missing}" for case in missing]
    return "\n".join(lines) + "\n"


def as_json(entries: Sequence[tuple[Case, Result]], about: str) -> str:
    """Every sample, for those who want other statistics."""
    cases = {
        result.case: {
            "ratio": round(result.ratio, 3),
            "ours": [asdict(sample) for sample in result.ours],
            "peer": [asdict(sample) for sample in result.peer],
        }
        for _, result in entries
    }
    return json.dumps({"about": about, "cases": cases}, indent=1) + "\n"


def chart(entries: Sequence[tuple[Case, Result]], title: str) -> str:
    """Bars of ratios; a line at 1, where both take the same time, a tick at the ratio wanted."""
    entries = [entry for entry in entries if entry[0].seconds is None]
    longest = max([1.2, *(min(result.ratio, 2.5) for _, result in entries)])
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    height = _ROW * len(entries) + 70
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (case, result) in enumerate(entries):
        y = 40 + number * _ROW
        length = min(result.ratio, longest) * scale
        color = "#2a7f62" if result.ratio <= 1 else "#b5533c"
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(case.name)}</text>',
            (
                f'<rect x="{_LEFT}" y="{y + 3}" width="{length:.1f}" height="{_ROW - 7}" '
                f'fill="{color}"/>'
            ),
            f'<text x="{_LEFT + length + 6:.1f}" y="{y + 14}">{result.ratio:.2f}</text>',
        ]
        if case.ratio is not None:
            x = _LEFT + case.ratio * scale
            parts.append(
                f'<line x1="{x:.1f}" y1="{y + 1}" x2="{x:.1f}" y2="{y + _ROW - 2}" '
                f'stroke="#222222" stroke-width="2"/>'
            )
    x = _LEFT + scale
    bottom = 40 + _ROW * len(entries)
    parts += [
        (
            f'<line x1="{x:.1f}" y1="34" x2="{x:.1f}" y2="{bottom + 4}" stroke="#888888" '
            f'stroke-dasharray="4 3"/>'
        ),
        (
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555555">'
            f"1 = the same time; shorter is faster; tick: to reach</text>"
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def write(
    folder: Path, entries: Sequence[tuple[Case, Result]], missing: Sequence[Case], about: str
) -> None:
    """results.md, results.json and results.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(table(entries, missing, about))
    (folder / "results.json").write_text(as_json(entries, about))
    (folder / "results.svg").write_text(chart(entries, "Time of qcowfs by time of its peer"))
