"""Recovery without a notebook, for machines with several devices:

    accelerate launch --num_processes 4 -m simdiff_utils.recovery.train \\
        --model some/model --criterion portfolio --n_remove 8 --training distillation --preset published --train_data tatsu-lab/alpaca --export_to healed

Any setting of `simdiff_utils.settings` may be given by its name; the rest keep their defaults. Where it was
killed, the same command goes on.
"""

import argparse
import dataclasses
import sys

import yaml
from accelerate import PartialState

from simdiff_utils.recovery.stage import Ladder
from simdiff_utils.settings import Settings, SimDiffError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", metavar="VALUE")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    types = {field.name: field.type for field in dataclasses.fields(Settings)}
    try:  # texts stay as they are; what else a setting may be is written as in YAML
        run = Ladder(
            Settings(
                **{
                    name: value if types[name] is str else yaml.safe_load(value)
                    for name, value in given.items()
                }
            )
        )
        checkpoint = run.recovered_checkpoint()
    except SimDiffError as error:
        sys.exit(f"simdiff: {error}")
    if PartialState().is_main_process:
        print(f"{run.name}: {checkpoint}")


if __name__ == "__main__":
    main()
