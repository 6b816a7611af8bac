"""The app's options, from the command line or from environment variables."""

import argparse
import os
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from sftlab.chat.request_filter import accounts
from sftlab.script_options import Options

# where eval/report.py writes unless told otherwise
REPORT = Path("results/report")


def parse_options(argv: list[str], description: str) -> argparse.Namespace:
    """Read the options. SFTLAB_PORT and the like stand for an option that is not given.

    Exits with a message for a bad option and for a --run without run.json.
    """
    parser = Options(description=description)
    switch = {
        "nargs": "?",
        "type": string_to_bool,
        "const": True,
        "default": False,
        "metavar": "true|false",
    }
    parser.add_argument("--run", type=Path, help="run directory (default: the newest finished)")
    parser.add_argument("--runs", type=Path, default="runs", help="folder of runs (default: runs)")
    parser.add_argument("--report", type=Path, default=REPORT, help="folder of eval/report.py")
    parser.add_argument("--votes", type=Path, help="JSONL of votes (default: beside the runs)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--queue", type=int, default=16, help="messages that may wait (default: 16)"
    )
    parser.add_argument("--listen", **switch, help="serve other machines too")
    parser.add_argument("--auth", type=accounts, metavar="USER:PASSWORD|FILE")
    parser.add_argument("--load-in-4bit", **switch)
    given = {name: os.environ.get(f"SFTLAB_{name.upper()}") for name in vars(parser.parse_args([]))}
    parser.add_argument(  # no variable stands for it: trust is given on the command line, each time
        "--trust_remote_code",
        action="store_true",
        help="run code that a base model brings (default: never)",
    )
    parser.set_defaults(**{name: value for name, value in given.items() if value})
    options = parser.parse_args(argv)
    if not 0 < options.port < 65536:
        parser.error(f"--port {options.port}: expected a number from 1 to 65535")
    if options.queue < 1:
        parser.error(f"--queue {options.queue}: expected a number of at least 1")
    if options.votes and not options.votes.parent.is_dir():
        parser.error(f"--votes {options.votes}: there is no folder {options.votes.parent}")
    if options.votes and options.votes.is_dir():
        parser.error(f"--votes {options.votes}: it is a folder, expected a file")
    if options.run and not (options.run / "run.json").is_file():
        parser.error(f"--run {options.run}: no run directory (it has no run.json)")
    return options
