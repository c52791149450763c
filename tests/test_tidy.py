"""The house rules that a machine can hold: the order of modules, their rooms, their sizes."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qcowfs"

# A module imports only from those above it.
ORDER = """
driver.qcow2.parallel
errors
driver.secrets
driver.extent
driver.layout.geometry
driver.layout.extensions
driver.layout.header
driver.layout.mapping
driver.layout.table_references
driver.layout.refcounts
driver.layout.snapshot_table
driver.layout.bitmap_directory
driver.layout.luks
driver.layout.qcow1
driver.layout.uml_cow
driver.hostcalls
driver.locking
driver.storage
driver.qcow2.failsafe
driver.transform.compression
driver.transform.cipher
driver.transform.keys
driver.node
driver.mapping_chain
driver.qcow2.counters
driver.qcow2.requests
driver.qcow2.ciphering
driver.qcow2.unlocking
driver.qcow2.guard
driver.qcow2.switching
driver.qcow2.l1
driver.qcow2.tables
driver.qcow2.lookup
driver.qcow2.refcounting
driver.qcow2.frees
driver.qcow2.protecting
driver.qcow2.allocator
driver.qcow2.commit
driver.qcow2.l2_tables
driver.qcow2.parts
driver.qcow2.metadata
driver.qcow2.references
driver.qcow2.copied
driver.qcow2.linking
driver.qcow2.inflating
driver.qcow2.reading
driver.qcow2.writing
driver.qcow2.encrypted
driver.qcow2.sealed
driver.qcow2.zeroing
driver.qcow2.snapshots
driver.qcow2.truncation
driver.qcow2.resize
driver.qcow2.new_luks
driver.qcow2.new_data_file
driver.qcow2.create
driver.qcow2.description
driver.qcow2.image
driver.qcow2.key_slots
driver.raw
driver.pages
driver.guest_ranges
driver.image_base
driver.new_file
driver.qcow1_check
driver.qcow1_tables
driver.qcow1_reading
driver.qcow1_writing
driver.qcow1_zeroing
driver.qcow1_create
driver.qcow1
driver.uml_cow_create
driver.uml_cow
driver.window
driver.backing_names
driver.data_file
driver.opening
fuse.tree
fuse.xattrs
fuse.files
fuse.lane_ranges
fuse.changes
fuse.status
fuse.kernel
fuse.operations
fuse.wire
fuse.lane_peer
fuse.lane_buffers
fuse.lane_tasks
fuse.device
fuse.lane
fuse.session
cli.common
cli.keys
cli.mount
cli.umount
cli.create
cli.info
cli.amend
cli.snapshot
cli.main
cli.demo
__main__
""".split()

TOP_LEVEL = {
    "pyproject.toml", "qcowfs", "tests", "systemd", "README.md", "Makefile", "benchmarks", "docs",
    "CHANGELOG.md", "LICENSE", ".ci", ".gitignore",
}  # fmt: skip

MODULE_LINES = 550
FUNCTION_LINES = 80

# Room: what its modules must not import (a name stands for all below it).
STORAGE_FORMATS = ("qcowfs.driver.layout", "qcowfs.driver.qcow2", "qcowfs.fuse")
OTHER_FORMATS = """
qcow1 qcow1_check qcow1_tables qcow1_reading qcow1_writing qcow1_zeroing qcow1_create uml_cow
uml_cow_create raw pages guest_ranges image_base new_file window backing_names
""".split()
ROOMS = {
    **{f"driver.{name}": ("qcowfs.driver.qcow2",) for name in OTHER_FORMATS},
    "driver": ("pyfuse3", "argparse", "qcowfs.fuse", "qcowfs.cli"),
    "driver.layout": ("trio", "os", "logging", "asyncio", "threading", "pathlib", "io"),
    "driver.storage": STORAGE_FORMATS,
    "driver.locking": STORAGE_FORMATS,
    "driver.hostcalls": STORAGE_FORMATS,
    "driver.transform": ("trio", "pathlib", "qcowfs.driver.storage", "qcowfs.driver.qcow2"),
    "fuse": ("argparse", "qcowfs.cli"),
    "fuse.tree": ("trio", "pyfuse3"),
    "fuse.xattrs": ("trio", "pyfuse3"),
    "fuse.operations": ("qcowfs.driver.qcow2",),
    "fuse.lane": ("qcowfs.driver.qcow2", "qcowfs.fuse.tree", "qcowfs.fuse.xattrs"),
    "cli": ("pyfuse3", "numpy", "cryptography"),
}


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILES if not name.endswith("__init__")]


def _tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module by its full name, and the line; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            module = node.module or ""
            yield module, node.lineno
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


@pytest.mark.parametrize("name", MODULES)
def test_order(name: str) -> None:
    """A module stands in the order and imports only from modules above it."""
    assert name in ORDER, "not in ORDER: put it below all that it imports"
    place = ORDER.index(name)
    for imported, line in _imports(_tree(name)):
        short = imported.removeprefix("qcowfs.")
        if imported.startswith("qcowfs.") and short in ORDER:
            assert ORDER.index(short) < place, f"line {line}: imports upwards, {short}"


@pytest.mark.parametrize("name", MODULES)
def test_room(name: str) -> None:
    """A module does not import what its room must not touch."""
    for room, banned in ROOMS.items():
        if name != room and not name.startswith(room + "."):
            continue
        for imported, line in _imports(_tree(name)):
            for ban in banned:
                inside = imported == ban or imported.startswith(ban + ".")
                assert not inside, f"line {line}: {room} must not import {ban}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("driver.layout.")])
def test_layout_is_pure(name: str) -> None:
    """The layout room waits for nothing."""
    for node in ast.walk(_tree(name)):
        waits = isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncWith, ast.AsyncFor))
        assert not waits, f"line {getattr(node, 'lineno', 0)}: layout is synchronous and pure"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_level_state(name: str) -> None:
    """More than one image can live in one process: nothing rebinds a module's names."""
    for node in ast.walk(_tree(name)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: a global statement"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("cli.")])
def test_only_the_command_line_prints(name: str) -> None:
    """Outside of cli nothing prints or ends the process."""
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Call) and name != "__main__":
            called = ast.unparse(node.func)
            assert called not in {"print", "sys.exit", "exit", "os._exit"}, f"line {node.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_size(name: str) -> None:
    """A module is a room, not a hall; a function fits a screen."""
    length = len(FILES[name].read_text().splitlines())
    assert length <= MODULE_LINES, f"{length} lines"
    for node in ast.walk(_tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name}: {lines} lines"


def _all_modules() -> list[Path]:
    folders = [PACKAGE, ROOT / "tests", ROOT / "benchmarks"]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [path for path in paths if path.stat().st_size]


@pytest.mark.parametrize("path", _all_modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstring(path: Path) -> None:
    """Every module says first what it is for."""
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring at its beginning"


def _test_modules() -> list[Path]:
    return sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", _test_modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_state_their_rule(path: Path) -> None:
    """A test's docstring is the rule that it holds."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            stated = not node.name.startswith("test_") or ast.get_docstring(node)
            assert stated, f"line {node.lineno}: {node.name} states no rule"


def test_top_level() -> None:
    """The repository's top folder holds what belongs there and nothing else."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files",
               "--cached", "--others", "--exclude-standard", "-z"]  # fmt: skip
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git work tree: nothing tells the tracked files")
    names = {name.partition("/")[0] for name in listing.stdout.split("\0") if name}
    assert names <= TOP_LEVEL, f"does not belong here: {sorted(names - TOP_LEVEL)}"


def test_order_has_no_ghosts() -> None:
    """ORDER names no module twice."""
    assert len(ORDER) == len(set(ORDER))
