"""The inode tree: names, inode numbers, directory offsets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowfs.fuse.tree import (
    ACTIVE_INODE,
    INFO_INODE,
    ROOT_INODE,
    SNAPSHOTS_INODE,
    EntryKind,
    Tree,
    escape_name,
    snapshot_name_of,
    unescape_name,
)
from tests.fuse.fake_node import FakeSnapshot

ROOT_NAMES = [b"active.raw", b"snapshots", b"info.json"]


def snapshots(*names: bytes) -> list[FakeSnapshot]:
    return [
        FakeSnapshot(id=b"%d" % number, name=name, date_sec=number)
        for number, name in enumerate(names, start=1)
    ]


def names(tree: Tree) -> set[bytes]:
    return {entry.name for entry in tree.snapshot_entries()}


def test_root_has_the_fixed_names() -> None:
    """The root shows active.raw, snapshots/ and info.json, and nothing that is empty."""
    assert [entry.name for entry in Tree().listing(ROOT_INODE)] == ROOT_NAMES


def test_fixed_inode_numbers() -> None:
    """The fixed files have fixed inode numbers, whatever the image holds."""
    tree = Tree(snapshots(b"a"))
    found = [tree.lookup(ROOT_INODE, name) for name in ROOT_NAMES]
    inodes = [entry.inode for entry in found if entry is not None]
    assert inodes == [ACTIVE_INODE, SNAPSHOTS_INODE, INFO_INODE]


def test_dot_and_dot_dot() -> None:
    """`.` is the directory itself, `..` its parent, and the root is its own parent."""
    tree = Tree(snapshots(b"a"))
    for inode, name, expected in [
        (ROOT_INODE, b".", ROOT_INODE),
        (ROOT_INODE, b"..", ROOT_INODE),
        (SNAPSHOTS_INODE, b".", SNAPSHOTS_INODE),
        (SNAPSHOTS_INODE, b"..", ROOT_INODE),
    ]:
        entry = tree.lookup(inode, name)
        assert entry is not None
        assert entry.inode == expected


def test_snapshot_entry() -> None:
    """A snapshot is the file NAME.raw in snapshots/."""
    entry = Tree(snapshots(b"before update")).lookup(SNAPSHOTS_INODE, b"before update.raw")
    assert entry is not None
    assert entry.kind is EntryKind.SNAPSHOT
    assert entry.snapshot is not None
    assert entry.snapshot.id == b"1"


def test_inodes_survive_rename_and_deletion_of_others() -> None:
    """An inode number depends on its own snapshot alone, and not on its name."""
    first, second, third = snapshots(b"a", b"b", b"c")
    before = Tree([first, second, third]).lookup(SNAPSHOTS_INODE, b"c.raw")
    renamed = FakeSnapshot(id=third.id, name=b"z", date_sec=third.date_sec)
    after = Tree([renamed]).lookup(SNAPSHOTS_INODE, b"z.raw")
    assert before is not None
    assert after is not None
    assert before.inode == after.inode


def test_reused_id_gets_another_inode() -> None:
    """A new snapshot with a deleted one's ID is another inode: old handles must not meet it."""
    old = Tree([FakeSnapshot(id=b"1", name=b"a", date_sec=1)]).snapshot_entries()[0]
    new = Tree([FakeSnapshot(id=b"1", name=b"a", date_sec=2)]).snapshot_entries()[0]
    assert old.inode != new.inode


def test_equal_records_have_distinct_inodes_and_names() -> None:
    """A broken image whose snapshots are all alike still shows each of them once."""
    tree = Tree([FakeSnapshot(id=b"1", name=b"a")] * 20)
    assert len(names(tree)) == 20
    assert len({entry.inode for entry in tree.snapshot_entries()}) == 20


def test_inodes_fit_handles_and_offsets() -> None:
    """Inode numbers leave room for an access bit and for signed directory offsets."""
    tree = Tree(snapshots(*(b"%d" % number for number in range(100))))
    assert all(1 << 32 <= entry.inode < 1 << 62 for entry in tree.snapshot_entries())


def test_shared_names_carry_ids() -> None:
    """Where two snapshots share a name, all of them carry NAME@ID."""
    assert names(Tree(snapshots(b"a", b"b", b"a"))) == {b"a@1.raw", b"b.raw", b"a@3.raw"}


def test_name_that_looks_like_one_with_id() -> None:
    """A snapshot called what another one needs as NAME@ID gets a name of its own."""
    assert len(names(Tree(snapshots(b"a", b"a", b"a@1")))) == 3


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        (b"plain name-1.2", b"plain name-1.2"),
        ("größe".encode(), "größe".encode()),
        (b"", b"%"),
        (b".", b"%2E"),
        (b"..", b"%2E%2E"),
        (b"...", b"..."),
        (b".hidden", b".hidden"),
        (b"a/b", b"a%2Fb"),
        (b"a\0b", b"a%00b"),
        (b"\xff", b"%FF"),
        (b"100%", b"100%"),
        (b"%", b"%25"),
        (b"%41", b"%2541"),
        (b"%4g", b"%4g"),
        (b"%~", b"%25~"),
        (b"%/", b"%%2F"),
    ],
)
def test_escapes(name: bytes, stem: bytes) -> None:
    """Only what cannot stand in a file name is written %XX, `%` where it would be misread."""
    assert escape_name(name) == stem
    assert unescape_name(stem) == name


@given(st.binary(max_size=60))
def test_escaping_is_reversible(name: bytes) -> None:
    """Every name comes back from its escaped form."""
    assert unescape_name(escape_name(name)) == name


@given(st.lists(st.binary(max_size=300), max_size=12))
def test_every_file_name_is_legal_and_unique(list_of_names: list[bytes]) -> None:
    """Whatever snapshots are called, each has one legal file name of its own."""
    tree = Tree(snapshots(*list_of_names))
    found = [entry.name for entry in tree.snapshot_entries()]
    assert len(set(found)) == len(list_of_names)
    for name in found:
        name.decode("utf-8")
        assert 0 < len(name) <= 255
        assert b"/" not in name
        assert b"\0" not in name
        assert name not in {b".", b".."}


def test_too_long_names() -> None:
    """Names too long for a file are shortened, told apart, and the same at each mount."""
    records = snapshots(b"x" * 300 + b"1", b"x" * 300 + b"2")
    found = names(Tree(records))
    assert len(found) == 2
    assert names(Tree(list(reversed(records)))) == found


def test_snapshot_name_of_file_name() -> None:
    """A file name tells the name of the snapshot that would show it."""
    assert snapshot_name_of(b"a%2Fb.raw") == b"a/b"


@pytest.mark.parametrize("file_name", [b"a", b"a.img", b"a%2fb.raw", b"%~1.raw", b"x" * 252])
def test_file_names_that_no_snapshot_can_have(file_name: bytes) -> None:
    """A rename to a name that would not be shown as asked is refused."""
    with pytest.raises(ValueError, match="name"):
        snapshot_name_of(file_name)


def test_listing_resumes_after_an_offset() -> None:
    """A listing goes on behind the offset of any entry, whether that still exists or not."""
    records = snapshots(*(b"%d" % number for number in range(50)))
    entries = list(Tree(records).listing(SNAPSHOTS_INODE))
    gone = entries[20].snapshot
    smaller = Tree([record for record in records if record is not gone])
    rest = list(smaller.listing(SNAPSHOTS_INODE, entries[20].inode))
    assert [entry.inode for entry in rest] == [entry.inode for entry in entries[21:]]


def test_gone_since() -> None:
    """Names that vanish or come to mean another inode are told, others are not."""
    first, second, third = snapshots(b"a", b"b", b"a")
    before = Tree([first, second, third])
    after = Tree([first, second])
    assert {entry.name for entry in after.gone_since(before)} == {b"a@1.raw", b"a@3.raw"}


def test_as_many_snapshots_as_a_table_holds() -> None:
    """65,536 snapshots are all listed, each once."""
    records = snapshots(*(b"snapshot %d" % number for number in range(65_536)))
    tree = Tree(records)
    assert len({entry.name for entry in tree.listing(SNAPSHOTS_INODE)}) == 65_536
