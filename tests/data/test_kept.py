"""What is made of a corpus once."""

import shutil
import subprocess
import sys

import pytest

from sunfish_jax.data.kept import made_once

# Two of these run at the same time: each says when it begins to make the folder, and how it found it.
MAKING = """
import sys, time
from pathlib import Path
from sunfish_jax.data.kept import made_once
def make(folder):
    print("makes", flush=True)
    folder.mkdir()
    sys.stdin.readline()
    (folder / "file").write_text("whole")
print((made_once(Path(sys.argv[1]), "key", make) / "file").read_text(), flush=True)
"""


def make(folder):
    folder.mkdir()
    (folder / "file").write_text("made")


def test_it_is_made_once_for_each_key(tmp_path):
    directory = tmp_path / "a/b"
    first = made_once(directory, "one", make)
    (first / "file").write_text("kept")
    assert made_once(directory, "one", make) == first
    assert (first / "file").read_text() == "kept"
    assert (made_once(directory, "another", make) / "file").read_text() == "made"
    assert len([path for path in directory.iterdir() if path.is_dir()]) == 2


def test_what_fails_leaves_nothing_and_is_made_again(tmp_path):
    def fail(folder):
        make(folder)
        raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        made_once(tmp_path, "key", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (made_once(tmp_path, "key", make) / "file").read_text() == "made"


def test_a_second_process_waits_and_takes_what_the_first_made(tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", MAKING, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "makes\n"
        with subprocess.Popen(command, **pipes) as second:
            assert "waiting for another process" in second.stdout.readline()
            # What is at work is not taken for what a killed process left.
            assert len(list(tmp_path.glob("incomplete-*"))) == 1
            assert first.communicate("go\n")[0] == second.communicate()[0] == "whole\n"


def test_what_a_process_that_was_not_kept_away_made_is_taken(tmp_path):
    def make_both(folder):
        make(folder)
        # Another process is done before this one.
        made = folder.parent.parent / names[0]
        shutil.copytree(folder, made)
        (made / "file").write_text("theirs")

    names = [made_once(tmp_path, "key", make).name]
    shutil.rmtree(tmp_path / names[0])
    assert (made_once(tmp_path, "key", make_both) / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == names
