"""Sizes, escaping, and the lines that errors become."""

import errno
import os

import pytest

from qcowfs.cli import common
from qcowfs.errors import BadRequest, CorruptImage


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("1.5G", 3 << 29),
        ("0.25M", 262144),
        ("2T", 2 << 40),
        ("1TiB", 1 << 40),
        (" 7M ", 7 << 20),
        ("7E", 7 << 60),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """A number with a unit in powers of 1024."""
    assert common.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1..5G", "1.G", "1Q", "1 K", "x", "8E", "+5", "٣"])
def test_what_is_no_size(text: str) -> None:
    """Anything else raises BadRequest and names what it was."""
    with pytest.raises(BadRequest, match="size"):
        common.parse_size(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, with blanks and ümläuts", "plain, with blanks and ümläuts"),
        ("a\nb\x1b[2J\x7f", "a\\x0ab\\x1b[2J\\x7f"),
        ("\u202eabc\u2028", "\\u202eabc\\u2028"),
        (os.fsdecode(b"\xff\xfe"), "\\xff\\xfe"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    """What a terminal would act on is written out; the rest stays."""
    assert common.escape(text) == shown


def _line(error: BaseException, file: str = "disk") -> str:
    return common.describe_error(error, file).line()


def test_an_expected_error_is_its_message() -> None:
    """File, cause and hint in one line."""
    error = CorruptImage("L1 entry 3 is 0x5", hint="qcowfs check")
    assert _line(error) == "qcowfs: disk: L1 entry 3 is 0x5; hint: qcowfs check"


def test_an_error_of_the_host_is_its_text() -> None:
    """The file at fault is named when it is another one."""
    missing = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "disk")
    assert _line(missing) == "qcowfs: disk: No such file or directory"
    other = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "base")
    assert _line(other) == "qcowfs: disk: base: No such file or directory"


def test_a_group_of_one_is_that_one() -> None:
    """What trio wraps is unwrapped."""
    group = ExceptionGroup("nursery", [ExceptionGroup("inner", [CorruptImage("broken")])])
    assert _line(group) == "qcowfs: disk: broken"


def test_an_unexpected_error_is_one_line_too() -> None:
    """No traceback: the type and the message, in one line."""
    assert _line(ZeroDivisionError("a\nb")) == (
        "qcowfs: disk: internal error: ZeroDivisionError: a\\x0ab"
    )


def test_mount_table() -> None:
    """Blanks in names are octal, other bytes stay, and a row that is cut off is none."""
    table = (
        b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        b"42 22 0:39 / /a\\040b\\134c rw,nosuid - fuse.qcowfs /x\r\xff\\012y rw,user_id=0\n"
        b"43 22 0:40 / /cut"
    )
    assert common.parse_mounts(table) == [
        common.Mount("/", "8:1", "ext4", "/dev/sda1"),
        common.Mount("/a b\\c", "0:39", "fuse.qcowfs", "/x\r\udcff\ny"),
    ]


def test_the_machine_s_own_mounts() -> None:
    """The table of the running system has a root and a /proc."""
    assert {"/", "/proc"} <= {mount.mountpoint for mount in common.all_mounts()}
