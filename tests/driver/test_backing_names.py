"""Backing file names: which file they mean, and which are refused."""

import json
import os
from typing import Any

import pytest

from qcowfs.driver.backing_names import resolve_backing
from qcowfs.errors import BadRequest, UnsupportedFeature


def test_a_plain_name_counts_from_the_folder_of_the_image() -> None:
    """Relative names join the image's folder as it was named; absolute ones stand."""
    cases = {
        b"base": "dir/base",
        b"../base": "dir/../base",
        b"/x/base": "/x/base",
        b"file:base": "dir/base",
        b"file:/x/base": "/x/base",
        b"sub/odd:name": "dir/sub/odd:name",
        b"./a:b": "dir/./a:b",
    }
    for name, path in cases.items():
        reference = resolve_backing(name, "dir/top.qcow2")
        assert (reference.path, reference.format) == (path, None)
    assert resolve_backing(b"base", "top.qcow2").path == "base"
    raw_name = b"\xff\xfe.img"
    assert os.fsencode(resolve_backing(raw_name, "/d/top").path) == b"/d/" + raw_name


@pytest.mark.parametrize(
    ("name", "word"),
    [
        (b"nbd://localhost/x", '"nbd"'),
        (b"fat:/tmp", '"fat"'),
        (b"ssh://host/x", '"ssh"'),
        (b"https://host/x", '"https"'),
        (b"\x1b[2Jnbd:x", '"\\x1b[2Jnbd"'),
        (b'json:{"driver":"nbd","host":"h"}', '"nbd"'),
        (b'json:{"driver":"qcow2","file":{"driver":"ssh","filename":"x"}}', '"ssh"'),
        (b'json:{"driver":"qcow2","offset":"512","file":{"filename":"x"}}', "offset"),
        (b'json:{"driver":"raw","read-only":"on","file":{"filename":"x"}}', '"read-only"'),
        (b'json:{"driver":"qcow2","file":"node"}', '"file"'),
        (b'json:{"driver":"raw","file":{"driver":"qcow2","file":{"filename":"x"}}}', '"qcow2"'),
    ],
)
def test_protocols_and_drivers_are_refused_by_name(name: bytes, word: str) -> None:
    """What is no file of this machine is refused, and the message says what it is."""
    with pytest.raises(UnsupportedFeature) as caught:
        resolve_backing(name, "top")
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        b"json:",
        b"json:[]",
        b"json:{",
        b'json:"x"',
        b"json:{}",
        b'json:{"driver":"qcow2"}',
        b'json:{"driver":7}',
        b'json:{"file":{"filename":null}}',
        b"json:" + b"[" * 1000,
        b"json:" + b'{"a":' * 200,
        b"json:" + b"9" * 1000,
        b'json:{"driver":"raw","offset":-512,"file":{"filename":"x"}}',
        b'json:{"driver":"raw","size":"1M","file":{"filename":"x"}}',
        b'json:{"driver":"raw","size":true,"file":{"filename":"x"}}',
        b'json:{"driver":"raw","offset":9223372036854775808,"file":{"filename":"x"}}',
        b"file:",
        b"",
    ],
)
def test_a_broken_name_is_a_bad_request(name: bytes) -> None:
    """Text that is not what it claims to be raises BadRequest, however deep it nests."""
    with pytest.raises(BadRequest):
        resolve_backing(name, "top")


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "b"}}, "qcow2"),
        ({"driver": "raw", "file": {"filename": "b"}}, "raw"),
        ({"driver": "qcow2", "file.driver": "file", "file.filename": "b"}, "qcow2"),
        ({"driver": "file", "filename": "b"}, "raw"),
        ({"driver": "host_device", "filename": "b"}, "raw"),
        ({"file": {"driver": "file", "filename": "b"}}, None),
        ({"driver": "vmdk", "file": {"driver": "file", "filename": "b"}}, "vmdk"),
    ],
)
def test_the_plain_kind_of_json_is_understood(options: dict[str, Any], stated: str | None) -> None:
    """Driver and file name, nested or with dots, mean a file with a stated format."""
    reference = resolve_backing(b"json:" + json.dumps(options).encode(), "/d/top")
    assert (reference.path, reference.format) == ("/d/b", stated)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"offset": 512}, (512, None)),
        ({"offset": "1048576", "size": "512"}, (1048576, 512)),
        ({"size": 4096}, (0, 4096)),
        ({}, (0, None)),
    ],
)
def test_a_raw_name_may_mean_a_part_of_a_file(options: dict[str, Any], part: object) -> None:
    """Offset and size of the driver raw are counts of bytes, as numbers or as digits."""
    name = {"driver": "raw", "file": {"driver": "file", "filename": "b"}, **options}
    reference = resolve_backing(b"json:" + json.dumps(name).encode(), "/d/top")
    assert (reference.start, reference.length) == part
