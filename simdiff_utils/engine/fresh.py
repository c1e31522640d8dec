"""A function of this package run in a fresh process, where only what it needs takes memory."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from simdiff_utils import SimDiffError


def run_fresh(function: str, what: str, **arguments: object) -> object:
    """What a function of this package returns when a fresh process calls it.

    Args:
        function: "module:name"; arguments and answer are what JSON can say.
        what: for the sentence, such as "the capture".

    Raises:
        SimDiffError: the process failed; its last line is in the sentence.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "simdiff_utils.engine.fresh", function, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SimDiffError(f"{what} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))))
