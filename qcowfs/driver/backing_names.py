"""What the backing file name in an image means: a file of this machine, or a refusal by name.

Plain names, `file:` names and the plain kind of `json:` are understood: a
driver, a file name, and for raw an offset and a size. Nothing is opened here.
Invariants: no recursion a level of JSON; a protocol or an option that is not
understood is refused, never left out.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qcowfs.driver.layout.extensions import printable
from qcowfs.errors import BadRequest, UnsupportedFeature

FORMATS = ("qcow2", "qcow", "cow", "raw")
_FILE_DRIVERS = ("file", "host_device")


@dataclass(frozen=True, slots=True)
class Reference:
    """A file to open: its path, its format if that was said, and how messages call it.

    `start` and `length`, in bytes, are the part of the file that is a raw disk;
    a length of None means all the rest.
    """

    path: str
    format: str | None
    label: str | None = None
    start: int = 0
    length: int | None = None


def resolve_backing(name: bytes, image_path: str) -> Reference:
    """The file that the backing file `name` in the image at `image_path` means.

    A relative name counts from the folder of the image as that was named.
    Raises UnsupportedFeature for protocols, drivers and options, BadRequest.
    """
    text = os.fsdecode(name)
    folder = os.path.dirname(image_path)
    if text.startswith("json:"):
        return _parse_json_name(text.removeprefix("json:"), folder, printable(name))
    scheme, colon, rest = text.partition(":")
    if colon and "/" not in scheme:
        if scheme != "file":
            shown = printable(os.fsencode(scheme))
            raise UnsupportedFeature(f'the protocol "{shown}" is not supported')
        text = rest
    if not text:
        raise BadRequest("the name is empty")
    return Reference(os.path.join(folder, text), None, printable(name))


def _parse_json_name(text: str, folder: str, label: str) -> Reference:
    """The file, the format and the part of it that a `json:` name without its prefix means."""
    try:
        options = dict(_flatten(json.loads(text)))
    except (ValueError, RecursionError):
        raise BadRequest("a json: name that is no object") from None
    start = _take_number(options, "offset")
    length = _take_number(options, "size")
    for key, value in options.items():
        if not isinstance(value, str):
            raise BadRequest(f'json: name: the value of "{shown(key)}" is no text')
    driver = options.pop("driver", None)
    if "filename" in options and driver in _FILE_DRIVERS:
        file_name, stated_format = options.pop("filename"), "raw"
    else:
        protocol = options.pop("file.driver", "file")
        file_name, stated_format = options.pop("file.filename", None), driver
        if file_name is None and driver not in {None, *FORMATS}:
            raise UnsupportedFeature(f'the driver "{shown(driver)}" is not supported')
        if protocol not in _FILE_DRIVERS:
            raise UnsupportedFeature(f'the driver "{shown(protocol)}" is not supported')
    if options:
        raise UnsupportedFeature(f'json: name: "{shown(min(options))}" is not supported')
    if (start is not None or length is not None) and driver != "raw":
        raise UnsupportedFeature("json: name: offset and size are for the driver raw alone")
    if not file_name:
        raise BadRequest("json: name without a file name")
    return Reference(os.path.join(folder, file_name), stated_format, label, start or 0, length)


def _take_number(options: dict[str, Any], name: str) -> int | None:
    """Take a count of bytes out of the options: a number, or its digits as text."""
    value = options.pop(name, None)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if value is None or (type(value) is int and 0 <= value < 1 << 63):
        return value
    raise BadRequest(f'json: name: the value of "{name}" is no count of bytes')


def _flatten(options: Any) -> Iterator[tuple[str, Any]]:
    """The items of nested objects, keys joined by dots; raises ValueError when it is no object."""
    if not isinstance(options, dict):
        raise ValueError("not an object")
    todo = list(options.items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo.extend((f"{key}.{inner}", nested) for inner, nested in value.items())
        else:
            yield key, value


def shown(text: str) -> str:
    """Text out of an image or a command, with what a terminal might act on escaped."""
    return printable(text.encode("utf-8", "surrogatepass"))
