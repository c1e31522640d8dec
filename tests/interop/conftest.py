"""Other people's tools, each in an environment of its own from the package index, kept between runs."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

TOOLS = Path(
    os.environ.get("SIMDIFF_INTEROP") or platformdirs.user_cache_path("simdiff-interop", appauthor=False)
)


@pytest.fixture(scope="session")
def environment() -> Callable[..., Path]:
    """Makes the `bin` folder of an environment with these requirements; skips where they cannot be had."""

    def make(name: str, *requirements: str, shares_torch: bool = False) -> Path:
        """shares_torch: what is not asked for comes from the environment of the tests."""
        folder = TOOLS / name
        made_of, wanted = folder / "made_of.txt", " ".join(requirements)
        if not (made_of.is_file() and made_of.read_text() == wanted):
            options = ["--no-deps"] if shares_torch else []
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(folder)],
                [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *options, *requirements],
            ):
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"{name} could not be installed: {done.stderr.strip().splitlines()[-1]}")
            made_of.write_text(wanted)
        if shares_torch:  # read after the environment's own packages, which therefore come first; every time,
            (own,) = folder.glob("lib/python*/site-packages")  # since another clone may have made the folder
            (own / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
        return folder / "bin"

    return make
