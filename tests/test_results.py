"""Results: files and folders that appear whole or not at all, also beside a parallel writer and after a kill."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest

from simdiff_utils import results
from simdiff_utils.results import new_folder, read_json, write_json, write_text
from simdiff_utils.settings import SimDiffError, repository_root


def listing(folder) -> list[str]:
    """Everything below a folder, hidden leftovers included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_number(target, number, **options) -> None:
    with new_folder(target, **options) as partial:
        (partial / "number").write_text(str(number))


def test_a_folder_appears_at_the_end_and_whole(tmp_path):
    target = tmp_path / "deep" / "stage"
    with new_folder(target) as partial:
        assert partial.parent == target.parent  # the same disk, so that the rename is one step
        (partial / "number").write_text("1")
        assert not target.exists()
    assert listing(tmp_path) == ["deep", "deep/stage", "deep/stage/number"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [False, True])
def test_an_exception_leaves_nothing(tmp_path, error, replace):
    with pytest.raises(error), new_folder(tmp_path / "stage", replace) as partial:
        (partial / "half").write_text("half")
        raise error
    assert listing(tmp_path) == []


def test_an_exception_leaves_the_older_folder_alone(tmp_path):
    write_number(tmp_path / "stage", 1)
    with pytest.raises(ValueError), new_folder(tmp_path / "stage", replace=True) as partial:
        (partial / "number").write_text("2")
        raise ValueError
    assert listing(tmp_path) == ["stage", "stage/number"]
    assert (tmp_path / "stage" / "number").read_text() == "1"


def test_a_kill_leaves_nothing_at_the_target(tmp_path):
    script = ("import sys, time; from pathlib import Path; from simdiff_utils.results import new_folder\n"
              "with new_folder(Path(sys.argv[1])) as partial:\n"
              "    (partial / 'half').write_text('half'); print('ready', flush=True); time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "stage")], cwd=repository_root(),
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "stage").exists()
    write_number(tmp_path / "stage", 2)  # and the next run is not in its way
    assert (tmp_path / "stage" / "number").read_text() == "2"


def test_replace_puts_the_new_folder_in_the_old_ones_place(tmp_path):
    write_number(tmp_path / "stage", 1)
    (tmp_path / "stage" / "of the old one").touch()
    write_number(tmp_path / "stage", 2, replace=True)
    assert listing(tmp_path) == ["stage", "stage/number"]
    assert (tmp_path / "stage" / "number").read_text() == "2"


def test_without_replace_the_first_writer_stays(tmp_path):
    with new_folder(tmp_path / "stage") as partial:
        (partial / "number").write_text("slow")
        write_number(tmp_path / "stage", "quick")
    assert listing(tmp_path) == ["stage", "stage/number"]
    assert (tmp_path / "stage" / "number").read_text() == "quick"


@pytest.mark.parametrize("replace", [False, True])
def test_parallel_writers_leave_one_whole_folder(tmp_path, replace):
    """Two writers of the same stage reach the end at once, many times; each writes two files that must agree."""
    failures = []

    def work(me, barrier):
        try:
            for _ in range(40):
                with new_folder(tmp_path / "stage", replace) as partial:
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


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    import errno

    with pytest.raises(SimDiffError, match="the disk is full: stage was not written"), new_folder(tmp_path / "stage"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert listing(tmp_path) == []


def test_a_disk_that_fills_up_under_safetensors_is_said_in_a_sentence(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(SimDiffError, match="the disk is full"), new_folder(tmp_path / "stage"):
        save_file({"weights": np.zeros(100_000)}, "/dev/full")


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "stage"):
        (tmp_path / "nowhere" / "file").read_text()


# ---- files -----------------------------------------------------------------------------------------------------


def test_files_appear_whole_replace_older_ones_and_can_be_read(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"label": "größer", "removed": [1, 2], "alpha": 0.5})
    assert read_json(path) == {"label": "größer", "removed": [1, 2], "alpha": 0.5}
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.read_text(encoding="utf-8").endswith("}\n")
    write_json(path, {"label": "new"})
    assert read_json(path) == {"label": "new"}
    assert listing(tmp_path) == ["deep", "deep/result.json"]


def test_what_cannot_be_written_leaves_the_older_file_and_no_other(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"not JSON": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "half of it \udcff")
    assert listing(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


# ---- provenance ------------------------------------------------------------------------------------------------


def test_provenance_says_when_with_what_and_on_what_but_not_whose():
    facts = results.provenance()
    assert set(facts) == {"time", "python", "versions", "git_revision", "machine"}
    assert facts["versions"]["torch"].startswith("2.") and "transformers" in facts["versions"]
    assert facts["python"] == platform.python_version()
    assert facts["time"].endswith("+00:00")
    assert "GiB" in facts["machine"] and "cores" in facts["machine"]
    assert platform.node() not in json.dumps(facts)


def test_the_git_revision_is_a_hash_or_nothing(tmp_path, monkeypatch):
    def revision_in(folder):
        monkeypatch.setattr(results, "repository_root", lambda: folder)
        return results._git_revision()

    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision_in(tmp_path) is None  # no repository
    git("init", "-q")
    assert revision_in(tmp_path) is None  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert revision_in(tmp_path) == git("rev-parse", "HEAD")
    monkeypatch.setattr(results.shutil, "which", lambda _: None)
    assert revision_in(tmp_path) is None  # no git


def test_peak_memory_follows_what_is_used():
    before = results.peak_memory_gib()
    block = bytearray(os.urandom(1 << 20)) * 1024  # 1 GiB, every page touched
    assert results.peak_memory_gib() >= 1.0 and results.peak_memory_gib() >= before
    del block


def test_runs_lie_where_the_environment_says_else_in_the_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path))
    assert results.runs_root() == tmp_path
    monkeypatch.delenv("SIMDIFF_RUNS")
    assert results.runs_root() == repository_root() / "runs"
