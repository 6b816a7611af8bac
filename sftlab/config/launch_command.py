"""The command that starts a script under a launch config, as a user would type it."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

LAUNCHER = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")


def launch_command(
    launch_config: str, script: str, arguments: Sequence[str], flags: Sequence[str] = ()
) -> list[str]:
    """Returns the words of `accelerate launch` with this Python.

    They are relative to the repository's root. `launch_config` is the name of a file in
    accelerate_configs/, `flags` are accelerate's own, and `arguments` are the script's.
    """
    config = ("--config_file", f"accelerate_configs/{launch_config}.yaml")
    return [*LAUNCHER, *config, *flags, script, *arguments]


def as_arguments(fields: Mapping[str, Any]) -> list[str]:
    """Returns fields of a recipe as words of a command line: `--name=value`."""
    return [f"--{name}={value}" for name, value in fields.items()]
