"""What `make` asks of the package: `python -m simdiff_utils assets [NAME ...]` fetches and prepares what the
notebooks use by default (or the assets named), `python -m simdiff_utils results [FOLDER]` shows the newest
results.
"""

import argparse
import sys
from pathlib import Path

from simdiff_utils import SimDiffError
from simdiff_utils.assets import fetch
from simdiff_utils.models.checkpoints import checkpoint_folder
from simdiff_utils.provenance import runs_root
from simdiff_utils.results import summarise
from simdiff_utils.settings import Settings
from simdiff_utils.text.corpus import load_corpus


def prepare_assets(names: list[str]) -> None:
    """Fetch the assets named; without names, prepare the default model and text. Prints where they lie."""
    for name in names:
        print(f"{name}:", fetch(name))
    if not names:
        documents = load_corpus(Settings().text).documents
        print("text:", fetch("wikipedia"))
        print("      " + ", ".join(f"{len(docs)} articles to {split}" for split, docs in documents.items()))
        print("model:", checkpoint_folder(Settings().model))


def main(arguments: list[str]) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m simdiff_utils", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("assets").add_argument("names", nargs="*", metavar="NAME")
    commands.add_parser("results").add_argument("folder", nargs="?", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "assets":
        prepare_assets(given.names)
    else:
        print(summarise(given.folder or runs_root()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SimDiffError as error:
        sys.exit(f"simdiff: {error}")
