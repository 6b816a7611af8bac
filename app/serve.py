"""Serve a finished run with vLLM: its base model as `base`, its adapter as `tuned`.

python app/serve.py --run runs/mine [--port 8000] [--vllm .venv-vllm/bin/vllm] [-- VLLM'S OPTIONS]

The server speaks OpenAI's protocol under the run's own chat template. It listens on this machine
alone unless --host says otherwise. Clients must send the key in VLLM_API_KEY, where that is set.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from sftlab.child_process import Child
from sftlab.evaluation.base_and_tuned import (
    add_trust_flag,
    finished_run,
    refuse_untrusted,
    run_tokenizer,
)
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.export.vllm_command import (
    Address,
    find_vllm,
    refuse_unserved,
    vllm_command,
    vllm_environment,
    write_settings,
)
from sftlab.script_options import Options


def main(argv: list[str]) -> None:
    """Read the run, write what vLLM needs of it, start vLLM, wait until it ends."""
    options = parse_options(argv)
    run = finished_run(options.run)
    refuse_untrusted(options.run, run, options.trust_remote_code)
    recipe, adapter = run["recipe"], options.run / "adapter"
    refuse_unserved(adapter, recipe)  # before vLLM is asked for
    environment, program = vllm_environment(options.host), find_vllm(options.vllm)
    with tempfile.TemporaryDirectory(prefix="sftlab-served-") as folder:
        settings, address = Path(folder), Address(options.host, options.port)
        tokenizer = run_tokenizer(options.run, run)
        command = vllm_command(program, adapter, recipe, settings, address)
        write_settings(settings, recipe, tokenizer, options.trust_remote_code)
        trust = ["--trust-remote-code"] if options.trust_remote_code else []
        command += [*trust, *options.more]
        print(shlex.join(command), flush=True)
        url = f"http://{options.host}:{options.port}/v1"
        verify = ["--run", str(options.run), "--verify_server", url]
        print(f"once it has loaded: python recipes/export.py {shlex.join(verify)}", flush=True)
        if recipe["load_in_4bit"] or recipe["load_in_8bit"]:
            print(
                "the run trained on quantised weights; the base model's own are served, whose "
                "answers may differ a little from the run's evaluations",
                flush=True,
            )
        server = Child(command, env=environment)
        status = server.wait()
    if server.asked_to_stop:
        sys.exit(128 + server.signal)
    if status:
        sys.exit(f"error: vLLM ended with status {status}; its own lines above say why")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--vllm", help="vLLM's program (default: SFTLAB_VLLM, else vllm)")
    add_trust_flag(parser)
    parser.add_argument(
        "more", nargs="*", metavar="-- OPTION", help="further options of vllm serve"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
