"""The commands as a shell runs them: help, options, and what they print and leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfs.cli.main import COMMANDS
from tests.interop import tools
from tests.interop.tools import GIB, KIB, MIB


def test_help_names_every_command() -> None:
    """`qcowfs --help` lists the commands, and each has a help of its own."""
    said = tools.qcowfs("--help").stdout
    for command in COMMANDS:
        assert f"  {command} " in said
        assert "usage: " in tools.qcowfs(command, "--help").stdout


def test_help_loads_nothing_heavy() -> None:
    """No event loop, no numpy, no cryptography for a command that needs none of them."""
    program = (
        "import sys; from qcowfs.cli.main import main; main(['--help']);"
        "print([name for name in ('trio', 'pyfuse3', 'numpy', 'cryptography')"
        " if name in sys.modules])"
    )
    assert tools.run(sys.executable, "-c", program).stdout.endswith("[]\n")


def test_mounting_loads_nothing_heavy(tmp_path: Path) -> None:
    """The way to a ready mount does without numpy and cryptography."""
    program = (
        "import sys, qcowfs.cli.mount, qcowfs.fuse.session;"
        "print([name for name in ('numpy', 'cryptography') if name in sys.modules])"
    )
    assert tools.run(sys.executable, "-c", program).stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["mount"], ["create"], ["create", "--nonsense", "x"], ["info"], ["umount"],
     ["snapshot", "x"], ["snapshot", "create", "x"], ["info", "/nonexistent"]],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(arguments: list[str]) -> None:
    """One line, exit code 1, no usage text and no traceback."""
    finished = tools.qcowfs(*arguments, check=False)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stderr.startswith("qcowfs: ")


def test_a_reader_that_leaves_is_no_error() -> None:
    """Output into a closed pipe ends without a traceback."""
    words = [*tools.QCOWFS, "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.PIPE,
        env=tools.environment(),
    )
    os.close(writing)
    assert process.communicate()[1] == b""


CREATED = {
    "default": ([], {}),
    "version 2": (["--version", "2"], {"compat": "0.10"}),
    "clusters": (["--cluster-size", "4K"], {"cluster_size": 4 * KIB}),
    "clusters by -o": (["-o", "cluster_size=2M"], {"cluster_size": 2 * MIB}),
    "refcounts": (["-o", "refcount_bits=1,compat=1.1"], {"refcount_bits": 1}),
    "subclusters": (["--extended-l2"], {"extended_l2": "on"}),
    "zstd": (["--compression-type=zstd"], {"compression_type": "zstd"}),
    "lazy": (["-o", "lazy_refcounts=on"], {"lazy_refcounts": "on"}),
    "metadata": (["--preallocation=metadata"], {"preallocation": "metadata"}),
    "falloc": (["-o", "preallocation=falloc"], {"preallocation": "falloc"}),
    "full": (["-o", "preallocation=full"], {"preallocation": "full"}),
}


@pytest.mark.parametrize("name", CREATED)
def test_create_makes_what_qemu_img_makes(tmp_path: Path, name: str) -> None:
    """The same options give an image of which qemu-img says the same, and finds it clean."""
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    arguments, options = CREATED[name]
    tools.qcowfs("create", *arguments, ours, "33M")
    tools.create(theirs, 33 * MIB, **options)
    tools.check_image(ours)
    facts = []
    for image in (ours, theirs):
        told = json.loads(tools.qemu_img("info", "--output=json", image))
        told.pop("filename")
        told.pop("actual-size")
        told.pop("children", None)
        facts.append(told)
    assert facts[0] == facts[1]
    assert tools.raw_sha256(ours) == tools.raw_sha256(theirs)


def test_create_over_a_backing_file(tmp_path: Path) -> None:
    """Size and format come from the backing file, whose name counts from the image's folder."""
    (tmp_path / "folder").mkdir()
    tools.create(tmp_path / "folder" / "base.qcow2", 5 * MIB)
    tools.qcowfs("create", "-b", "base.qcow2", "folder/top.qcow2", cwd=tmp_path)
    facts = json.loads(
        tools.qemu_img("info", "--output=json", tmp_path / "folder" / "top.qcow2")
    )
    assert facts["virtual-size"] == 5 * MIB
    assert facts["backing-filename"] == "base.qcow2"
    assert facts["backing-filename-format"] == "qcow2"


def test_create_keeps_a_relative_name_out_of_the_way(tmp_path: Path) -> None:
    """A backing file that is not there is refused, and `-u` believes it."""
    image = tmp_path / "top.qcow2"
    finished = tools.qcowfs("create", "-b", "missing", "-F", "raw", image, check=False)
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1
    assert not image.exists()
    tools.qcowfs("create", "-u", "-b", "missing", "-F", "raw", image, "1M")
    assert image.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["x"],
        ["x", "12Q"],
        ["--cluster-size", "1000", "x", "1M"],
        ["--cluster-size", "4M", "x", "1M"],
        ["--version", "2", "--refcount-bits", "8", "x", "1M"],
        ["--version", "2", "--extended-l2", "x", "1M"],
        ["--version", "4", "x", "1M"],
        ["--extended-l2", "--cluster-size", "8K", "x", "1M"],
        ["--refcount-bits", "3", "x", "1M"],
        ["-o", "nonsense=1", "x", "1M"],
        ["-o", "extended_l2=perhaps", "x", "1M"],
        ["-f", "vmdk", "x", "1M"],
        ["-F", "raw", "x", "1M"],
        ["x", "8E"],
    ],
    ids=" ".join,
)
def test_create_refuses(tmp_path: Path, arguments: list[str]) -> None:
    """Combinations that qemu-img refuses: one line, and no file."""
    finished = tools.qcowfs("create", *arguments, check=False, cwd=tmp_path)
    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_info_has_qemu_img_s_facts(tmp_path: Path) -> None:
    """`info --json` has the keys and values of `qemu-img info --output=json`."""
    tools.create(tmp_path / "base.qcow2", 2 * GIB)
    image = tmp_path / "top.qcow2"
    words = ["-o", "lazy_refcounts=on", "-b", "base.qcow2", "-F", "qcow2", str(image)]
    tools.qemu_img("create", "-q", "-f", "qcow2", *words)
    tools.qemu_io(image, "write 1M 3M")
    tools.qemu_img("snapshot", "-c", "one", image)
    theirs = json.loads(tools.qemu_img("info", "--output=json", image))
    ours = json.loads(tools.qcowfs("info", "--json", image).stdout)
    theirs.pop("children", None)
    assert {key: ours.get(key) for key in theirs} == theirs
    said = tools.qcowfs("info", image).stdout
    for text in ("2 GiB (2147483648 bytes)", "base.qcow2", "one", "refcount bits: 16"):
        assert text in said


def test_snapshot_list_as_json(tmp_path: Path) -> None:
    """The entries of `qemu-img info --output=json`, with each snapshot's own size."""
    image = tools.create(tmp_path / "disk.qcow2", 3 * MIB)
    tools.qemu_img("snapshot", "-c", "one", image)
    theirs = json.loads(tools.qemu_img("info", "--output=json", image))["snapshots"]
    ours = json.loads(tools.qcowfs("snapshot", "list", "--json", image).stdout)
    assert [{key: entry[key] for key in theirs[0]} for entry in ours] == theirs
    assert ours[0]["disk-size"] == 3 * MIB
    assert json.loads(tools.qcowfs("snapshot", "list", "--json", "-U", image).stdout) == ours


@tools.needs_fuse
def test_the_demo(tmp_path: Path) -> None:
    """The tour runs to its end, shows what it promises, and leaves nothing behind."""
    said = tools.run(
        sys.executable, "-m", "qcowfs.cli.demo", env=dict(tools.environment(), TMPDIR=str(tmp_path))
    ).stdout
    assert "W95 FAT32" in said
    assert "kept the first version" in said
    assert "has  the second version" in said
    assert "before" in said
    assert "No errors were found" in said
    assert os.listdir(tmp_path) == []
