"""Provenance: when, with what and on what a result was made; the code behind it."""

import json
import platform
import subprocess
import sys

import pytest

from simdiff_utils import provenance
from simdiff_utils.files import repository_root


def test_provenance_says_when_with_what_and_on_what_but_not_whose():
    facts = provenance.provenance()
    assert set(facts) == {"time", "python", "versions", "git_revision", "machine"}
    assert facts["versions"]["torch"].startswith("2.") and "transformers" in facts["versions"]
    assert facts["python"] == platform.python_version()
    assert facts["time"].endswith("+00:00")
    assert "GiB" in facts["machine"] and "cores" in facts["machine"]
    assert platform.node() not in json.dumps(facts)


def test_the_git_revision_is_a_hash_or_nothing(tmp_path, monkeypatch):
    def revision_in(folder):
        monkeypatch.setattr(provenance, "repository_root", lambda: folder)
        return provenance._git_revision()

    def git(*arguments):
        done = subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision_in(tmp_path) is None  # no repository
    git("init", "-q")
    assert revision_in(tmp_path) is None  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert revision_in(tmp_path) == git("rev-parse", "HEAD")
    monkeypatch.setattr(provenance.shutil, "which", lambda _: None)
    assert revision_in(tmp_path) is None  # no git


def test_peak_memory_is_this_processs_own_and_follows_what_is_used():
    """In a fresh process: neither the memory of the one that started it nor freed memory may mislead."""
    script = (
        "from simdiff_utils.provenance import peak_memory_gib\n"
        "before = peak_memory_gib(); block = bytearray(b'x') * 2**28; del block\n"
        "print(before, peak_memory_gib())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository_root(), capture_output=True, text=True, check=True
    )
    before, after = map(float, done.stdout.split())
    assert 0 < before < 0.2
    assert after - before == pytest.approx(0.25, abs=0.02)


def test_runs_lie_where_the_environment_says_else_in_the_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path))
    assert provenance.runs_root() == tmp_path
    monkeypatch.delenv("SIMDIFF_RUNS")
    assert provenance.runs_root() == repository_root() / "runs"
