"""Files and folders that appear whole or not at all, while others read, write and are killed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest
from meshwright.sharding.files import FolderInUse, FolderLock, locked, whole_folder, write_whole
from meshwright.sharding.processes import start

LOCKING = """
import pathlib, sys, time
from meshwright.sharding.files import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_is_left(tmp_path: pathlib.Path) -> None:
    write_whole(tmp_path / "a", "one ü")
    write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    (tmp_path / "b" / "full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as error:
        write_whole(tmp_path / "b", "three")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "b"), None)
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(tmp_path / "none" / "c", "four")
    assert missing.value.filename == str(tmp_path / "none" / "c")
    assert names(tmp_path) == ["a", "b"]


def test_readers_see_all_of_a_file_or_all_of_the_one_before(tmp_path: pathlib.Path) -> None:
    path, sizes = tmp_path / "a", set()
    write_whole(path, b"x" * 10)

    def write() -> None:
        for _ in range(40):
            for size in (10, 1 << 20):
                write_whole(path, b"x" * size)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        sizes.add(len(path.read_bytes()))
    assert sizes <= {10, 1 << 20}
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_when_it_is_filled(tmp_path: pathlib.Path) -> None:
    final = tmp_path / "entry"
    with whole_folder(final) as folder:
        (folder / "one").write_text("1")
        assert not final.exists()
    assert names(final) == ["one"]
    with contextlib.suppress(KeyError), whole_folder(final) as folder:
        (folder / "two").write_text("2")
        raise KeyError
    assert names(final) == ["one"]
    with whole_folder(final) as folder:
        (folder / "three").write_text("3")
    assert names(final) == ["three"]
    with whole_folder(final, keep=lambda there: (there / "three").exists()) as folder:
        (folder / "four").write_text("4")
    assert names(final) == ["three"]
    assert names(tmp_path) == ["entry"]


def test_many_writers_of_one_folder(tmp_path: pathlib.Path) -> None:
    final, failures = tmp_path / "entry", []

    def write(number: int) -> None:
        try:
            for _ in range(5):
                with whole_folder(final) as folder:
                    for name in "abc":
                        (folder / name).write_text(str(number))
        except OSError as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert names(tmp_path) == ["entry"]
    assert len({(final / name).read_text() for name in "abc"}) == 1


def test_one_at_a_time_makes_a_folder(tmp_path: pathlib.Path) -> None:
    final, inside, most = tmp_path / "entry", [], []

    def make() -> None:
        with locked(final):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.pop()

    makers = [threading.Thread(target=make) for _ in range(5)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert most == [1] * 5


def test_what_a_killed_process_left_is_removed(tmp_path: pathlib.Path) -> None:
    here = tmp_path / f".entry.{socket.gethostname()}.left"
    others = [tmp_path / ".entry.another-host.left", tmp_path / f".other.{socket.gethostname()}.left"]
    for folder in (here, *others):
        folder.mkdir()
    with locked(tmp_path / "entry"):
        assert not here.exists()
    assert all(folder.exists() for folder in others)


def test_a_folder_is_one_processes_until_it_ends(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", LOCKING, str(tmp_path)]
    process = start(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(FolderInUse) as held:
        FolderLock(tmp_path)
    assert held.value.owner == f"process {process.pid}"
    process.kill()
    process.wait()
    lock = FolderLock(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}\n"
    with pytest.raises(FolderInUse):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "none")
