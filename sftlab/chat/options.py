"""The app's options, from the command line or from environment variables."""

import argparse
import os
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from sftlab.chat.request_filter import accounts

# folders that may hold a report, the preferred one first
REPORTS = (Path("results/report"), Path("results/demo"))


def parse_options(argv: list[str], description: str) -> argparse.Namespace:
    """Read the options. SFTLAB_PORT and the like stand for an option that is not given.

    Exits with a message for a bad option and for a --run without run.json.
    """
    parser = argparse.ArgumentParser(description=description)
    switch = {
        "nargs": "?",
        "type": string_to_bool,
        "const": True,
        "default": False,
        "metavar": "true|false",
    }
    parser.add_argument("--run", type=Path, help="run directory (default: the newest finished)")
    parser.add_argument("--runs", type=Path, default="runs", help="folder of runs (default: runs)")
    reports = [folder for folder in REPORTS if (folder / "report.md").is_file()]
    parser.add_argument(
        "--report", type=Path, default=[*reports, REPORTS[0]][0], help="folder of eval/report.py"
    )
    parser.add_argument("--votes", type=Path, help="JSONL of votes (default: beside the runs)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--queue", type=int, default=16, help="messages that may wait (default: 16)"
    )
    parser.add_argument("--listen", **switch, help="serve other machines too")
    parser.add_argument("--auth", type=accounts, metavar="USER:PASSWORD|FILE")
    parser.add_argument("--load-in-4bit", **switch)
    given = {name: os.environ.get(f"SFTLAB_{name.upper()}") for name in vars(parser.parse_args([]))}
    parser.set_defaults(**{name: value for name, value in given.items() if value})
    options = parser.parse_args(argv)
    if options.run and not (options.run / "run.json").is_file():
        parser.error(f"--run {options.run}: no run directory (it has no run.json)")
    return options
