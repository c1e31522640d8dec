"""Files and folders: whole or not at all, also beside a parallel writer and after a kill; where the
repository is."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from simdiff_utils import SimDiffError
from simdiff_utils.files import hash_file, read_json, repository_root, write_json, write_whole


def listing(folder) -> list[str]:
    """Everything below a folder, hidden leftovers included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_number(target, number, **options) -> None:
    """A stage's folder that holds one file."""
    with write_whole(target, **options) as partial:
        partial.mkdir()
        (partial / "number").write_text(str(number))


def test_a_folder_appears_at_the_end_and_whole(tmp_path):
    target = tmp_path / "deep" / "stage"
    with write_whole(target) as partial:
        assert not partial.exists()
        partial.mkdir()
        (partial / "number").write_text("1")
        assert not target.exists()
    assert listing(tmp_path) == ["deep", "deep/stage", "deep/stage/number"]
    assert target.stat().st_mode & 0o700 == 0o700


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [False, True])
def test_an_exception_leaves_nothing_new_and_the_older_alone(tmp_path, error, replace):
    write_number(tmp_path / "older", 1)
    for name in ("stage", "older"):
        with pytest.raises(error), write_whole(tmp_path / name, replace) as partial:
            partial.mkdir()
            (partial / "half").write_text("half")
            raise error
    assert listing(tmp_path) == ["older", "older/number"]
    assert (tmp_path / "older" / "number").read_text() == "1"


def test_a_kill_leaves_nothing_at_the_target(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from simdiff_utils.files import write_whole\n"
        "with write_whole(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "stage")], cwd=repository_root(), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "stage").exists()
    (leftover,) = tmp_path.glob(".*")
    write_number(tmp_path / "stage", 2)  # the next run is not in its way, and cleans up what is a day old
    assert (tmp_path / "stage" / "number").read_text() == "2" and leftover.exists()
    os.utime(leftover, (0, 0))
    write_number(tmp_path / "other", 3)
    assert leftover.exists(), "someone may still be writing inside"
    for path in (leftover, *leftover.rglob("*")):
        os.utime(path, (0, 0))
    write_number(tmp_path / "other", 3)
    assert not leftover.exists()


def test_replace_puts_the_new_folder_in_the_old_ones_place(tmp_path):
    write_number(tmp_path / "stage", 1)
    (tmp_path / "stage" / "of the old one").touch()
    write_number(tmp_path / "stage", 2, replace=True)
    assert listing(tmp_path) == ["stage", "stage/number"]
    assert (tmp_path / "stage" / "number").read_text() == "2"


def test_without_replace_the_first_writer_stays(tmp_path):
    with write_whole(tmp_path / "stage", replace=False) as partial:
        partial.mkdir()
        (partial / "number").write_text("slow")
        write_number(tmp_path / "stage", "quick", replace=False)
    assert listing(tmp_path) == ["stage", "stage/number"]
    assert (tmp_path / "stage" / "number").read_text() == "quick"


@pytest.mark.parametrize("replace", [False, True])
def test_parallel_writers_leave_one_whole_folder(tmp_path, replace):
    """Two writers of the same stage reach the end at once, many times; each writes two files that must
    agree."""
    failures = []

    def work(me, barrier):
        try:
            for _ in range(200):
                with write_whole(tmp_path / "stage", replace) as partial:
                    partial.mkdir()
                    for name in ("a", "b"):
                        (partial / name).write_text(me)
                    barrier.wait()
        except Exception as error:
            failures.append(error)
            barrier.abort()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(me, barrier)) for me in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert listing(tmp_path) == ["stage", "stage/a", "stage/b"]
    assert (tmp_path / "stage" / "a").read_text() == (tmp_path / "stage" / "b").read_text()


def test_a_folder_that_another_writer_just_moved_away_is_no_error(tmp_path, monkeypatch):
    """The race of the test above, made to happen."""
    write_number(tmp_path / "stage", 1)
    rename = os.rename

    def late(source, target):
        if source == tmp_path / "stage":
            shutil.rmtree(source)  # by the other writer, which is about to put its own there
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    write_number(tmp_path / "stage", 2, replace=True)
    assert (tmp_path / "stage" / "number").read_text() == "2"


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    with (
        pytest.raises(SimDiffError, match="cannot write stage in .*No space left on device"),
        write_whole(tmp_path / "stage"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert listing(tmp_path) == []


def test_a_disk_that_fills_up_under_safetensors_is_said_in_a_sentence(tmp_path):
    """safetensors raises an error of its own, which is no OSError; these are its words."""
    with pytest.raises(SimDiffError, match="cannot write stage"), write_whole(tmp_path / "stage"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert listing(tmp_path) == []


def test_a_missing_input_is_not_called_a_full_disk(tmp_path):
    """An OSError of the body that has nothing to do with the target keeps its own words."""
    with pytest.raises(Exception) as error, write_whole(tmp_path / "stage"):
        (tmp_path / "nowhere" / "input.json").read_text()
    assert "make room" not in str(error.value) and "input.json" in str(error.value)


# ---- files ---------------------------------------------------------------------------------------


def test_json_files_replace_older_ones_and_can_be_read(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"label": "größer", "removed": [1, 2], "alpha": 0.5})
    assert read_json(path) == {"label": "größer", "removed": [1, 2], "alpha": 0.5}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    write_json(path, {"label": "new"})
    assert read_json(path) == {"label": "new"}
    assert listing(tmp_path) == ["deep", "deep/result.json"]


def test_what_cannot_be_written_leaves_the_older_file_and_no_other(tmp_path):
    write_json(tmp_path / "file", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"not JSON": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "file", {"half of it": "\udcff"})
    assert listing(tmp_path) == ["file"]
    assert read_json(tmp_path / "file") == {"old": 1}


def test_the_hash_of_a_file_is_its_sha256_and_follows_its_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert hash_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"abcd")
    assert hash_file(path) == hashlib.sha256(b"abcd").hexdigest()


# ---- provenance ----------------------------------------------------------------------------------


def test_the_repository_is_found_from_inside_and_the_place_itself_from_outside(tmp_path):
    root = Path(__file__).parents[2]
    assert repository_root(root / "notebooks") == repository_root(root / "simdiff_utils") == root
    (tmp_path / "pyproject.toml").touch()  # another project's
    assert repository_root(tmp_path) == tmp_path
    (tmp_path / "deep").mkdir()
    assert repository_root(tmp_path / "deep") == tmp_path / "deep"
