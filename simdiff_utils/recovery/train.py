"""Recovery without a notebook, for machines with several devices:

    accelerate launch --num_processes 4 -m simdiff_utils.recovery.train \\
        --model some/model --criterion portfolio --n_remove 8 --training distillation --preset published \\
        --train_data tatsu-lab/alpaca --export_to healed

Any setting of `simdiff_utils.settings` may be given by its name; the rest keep their defaults. Where it was
killed, the same command goes on.
"""

import argparse
import sys

import yaml
from accelerate import PartialState

from simdiff_utils import SimDiffError
from simdiff_utils.recovery.stage import recovered_checkpoint, rung_name
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings


def main() -> None:
    """Make the healed checkpoint that the command line asks for, and say where it lies."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in Settings.model_fields:
        parser.add_argument(f"--{name}", metavar="VALUE")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    for (
        name,
        value,
    ) in given.items():  # texts stay as they are; what else a setting may be is written as in YAML
        if Settings.model_fields[name].annotation is not str:
            given[name] = yaml.safe_load(value)
    try:
        run = Run(Settings(**given))
        checkpoint = recovered_checkpoint(run)
    except SimDiffError as error:
        sys.exit(f"simdiff: {error}")
    if PartialState().is_main_process:
        print(f"{rung_name(run)}: {checkpoint}")


if __name__ == "__main__":
    main()
