"""The command-line options that evaluations by a judge share, and the judge they choose."""

import argparse
from pathlib import Path
from typing import Any

from sftlab.evaluation.base_and_tuned import add_trust_flag
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.served_answers import add_server_flags, refuse_many_askers, served_models
from sftlab.judging.judge_formats import JudgeFormat, load_format
from sftlab.judging.judges import Judge, LocalJudge
from sftlab.judging.model_answers import Contestants
from sftlab.judging.server_judge import ServerJudge
from sftlab.script_options import Options

# for one judgement: a day
LONGEST_TIMEOUT_S = 86_400


def add_evaluation_flags(
    parser: Options,
    sanity_checks: int,
    limit: str,
    max_new_tokens: str,
    needs_run: bool = True,
) -> None:
    """Add the options that both evaluations by a judge have.

    `sanity_checks` is the default number of items in each. `limit` and `max_new_tokens` are help
    texts.
    """
    parser.add_argument("--run", required=needs_run, type=Path, help="a finished run's directory")
    add_trust_flag(parser)
    add_judge_flags(parser)
    add_server_flags(parser)
    parser.add_argument("--limit", type=int, default=0, help=limit)
    parser.add_argument(
        "--sanity_checks", type=int, default=sanity_checks, help="items in each sanity check"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="answers in a batch")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help=max_new_tokens)
    parser.add_argument(
        "--allow-unparsed",
        action="store_true",
        help="score the models however many judgements are unparsed",
    )


def contestants_of(
    arguments: argparse.Namespace, run: dict[str, Any], processes: Processes
) -> Contestants:
    """Returns the two models of a run, which answer here or on the server of the options."""
    refuse_many_askers(arguments, processes)
    served = served_models(arguments)
    size, trusted = arguments.batch_size, arguments.trust_remote_code
    return Contestants(arguments.run, run, size, trusted, served, processes)


def add_judge_flags(parser: Options) -> None:
    """Add the options that choose a judge."""
    parser.add_argument(
        "--judge", help="a causal model (hub name or folder), or a server's model with --judge_url"
    )
    parser.add_argument(
        "--judge_url", help="an OpenAI-compatible server, for instance http://localhost:8000/v1"
    )
    parser.add_argument(
        "--judge_context",
        type=int,
        help="context length of a server's model in tokens (default: the server is asked)",
    )
    parser.add_argument(
        "--judge_timeout", type=float, default=300, help="seconds for one judgement of a server"
    )
    parser.needs("--judge_timeout", "--judge_url")
    parser.add_argument(
        "--judge_format",
        help="a file of eval/judges without .yaml (default: prometheus if the judge's name has "
        "that word, else fastchat)",
    )
    parser.add_argument("--judge_in_4bit", action="store_true", help="load a local judge in 4 bits")
    parser.add_argument("--judge_batch_size", type=int, default=16, help="judgements in a batch")
    parser.add_argument("--judge_max_new_tokens", type=int, default=1024, help="longest judgement")


def judge_from(arguments: argparse.Namespace) -> tuple[Judge, JudgeFormat]:
    """Returns the judge that the options name, and its format.

    Raises ValueError where the options contradict one another.
    """
    name = arguments.judge
    if arguments.judge_batch_size < 1:
        raise ValueError(f"--judge_batch_size must be at least 1, got {arguments.judge_batch_size}")
    style = load_format(
        arguments.judge_format or ("prometheus" if "prometheus" in name.lower() else "fastchat")
    )
    new_tokens = arguments.judge_max_new_tokens
    if new_tokens < 1:
        raise ValueError(f"--judge_max_new_tokens must be at least 1, got {new_tokens}")
    if arguments.judge_url:
        return _server_judge(arguments), style
    if arguments.judge_context:
        raise ValueError(
            "--judge_context is for a server: give --judge_url too, or leave it out (a local "
            "judge's config has its context length)"
        )
    size = arguments.judge_batch_size
    return LocalJudge(name, new_tokens, arguments.judge_in_4bit, size), style


def _server_judge(arguments: argparse.Namespace) -> ServerJudge:
    """Returns the judge behind --judge_url. Raises ValueError for options that it cannot have."""
    url, new_tokens = arguments.judge_url, arguments.judge_max_new_tokens
    context, timeout = arguments.judge_context, arguments.judge_timeout
    if arguments.judge_in_4bit:
        raise ValueError(
            "--judge_in_4bit is for a local judge, and --judge_url names a server: leave one of "
            "them out"
        )
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"--judge_url is {url!r}: expected an address such as http://localhost:8000/v1"
        )
    if context is not None and context <= new_tokens:
        raise ValueError(
            f"--judge_context {context} leaves no room for a prompt: it must be above "
            f"--judge_max_new_tokens {new_tokens}"
        )
    if not 0 < timeout <= LONGEST_TIMEOUT_S:
        raise ValueError(
            f"--judge_timeout must be above 0 and at most {LONGEST_TIMEOUT_S:,} s, got {timeout:g}"
        )
    return ServerJudge(arguments.judge, url, new_tokens, context, timeout)
