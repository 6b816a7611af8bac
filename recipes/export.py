"""Export a finished run: merged weights, or an adapter that peft and vLLM load anywhere.

python recipes/export.py --run runs/mine --to merged --out exports/mine
python recipes/export.py --run runs/mine --to adapter --out exports/mine-adapter --push USER/NAME
python recipes/export.py --run runs/mine --verify_server http://127.0.0.1:8000/v1

The export is loaded again as its users load it, and held to the run on held-out prompts: token ids,
nats a response token, and where greedy answers end. Only an export that agrees is kept.
A running server is held to the run in the same way.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from sftlab.comparison.result_files import check_differences, read_quality
from sftlab.evaluation.base_and_tuned import (
    add_trust_flag,
    evaluation_errors,
    finished_run,
    load_pair,
    run_tokenizer,
)
from sftlab.evaluation.held_out import HeldOut, held_out
from sftlab.evaluation.server_client import ServerClient, Words
from sftlab.exit_messages import first_line
from sftlab.export.agreement import PROMPTS, Behaviour, compare, observe
from sftlab.export.formats import (
    adapted_base,
    adapted_layers,
    end_ids,
    facts_of_sizes,
    full_name,
    merge,
    refuse_for_vllm,
    stored_dtype,
    write_adapter,
    write_merged,
)
from sftlab.export.gguf_file import (
    GGUF_TYPES,
    ends_of,
    read_gguf,
    read_tokenizer,
    refuse_unwritable,
    write_gguf,
)
from sftlab.export.model_card import check_run, model_card
from sftlab.export.server_agreement import hold_to_run
from sftlab.export.unfinished_folder import unfinished_folder
from sftlab.export.usage import Export, serve_command
from sftlab.files import write_json
from sftlab.models.likelihood import with_fused_head
from sftlab.models.loading import read_config
from sftlab.runs.run_directory import adapter_hash
from sftlab.script_options import Options, server_address

VERIFIED = "verified.json"
# no name begins or ends with a dot or a hyphen, or has two of one in a row
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


def main(argv: list[str]) -> None:
    """Export the run, hold the export to it, describe it, and upload it if asked."""
    arguments = parse_arguments(argv)
    with evaluation_errors(": export on a machine with more of it, or with CUDA_VISIBLE_DEVICES="):
        if arguments.verify_server:
            return verify_server(arguments)
        export(arguments)
        if arguments.push:
            push(arguments.out, arguments.push, arguments.private)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--to", choices=("merged", "adapter", "gguf"))
    parser.add_argument("--out", type=Path, help="a folder that is not there yet")
    parser.add_argument(
        "--verify_server",
        metavar="URL",
        type=server_address,
        help="hold a running server to the run; export nothing",
    )
    parser.add_argument("--server_model", default="tuned", help="the run's name on that server")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of merged weights (default: the base model's own), or of a server's (the run's)",
    )
    parser.add_argument(
        "--gguf_type", choices=GGUF_TYPES, default="f16", help="of a GGUF file's weights"
    )
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help="held-out prompts that are compared"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to the hub afterwards")
    parser.add_argument("--private", action="store_true", help="upload it as a private repository")
    parser.needs("--gguf_type", "--to", "gguf")
    parser.needs("--private", "--push")
    parser.needs("--server_model", "--verify_server")
    add_trust_flag(parser)
    arguments = parser.parse_args(argv)
    if arguments.prompts < 1:
        parser.error(f"--prompts must be at least 1, got {arguments.prompts}")
    if arguments.push and not _REPOSITORY.fullmatch(arguments.push):
        parser.error(f"--push {arguments.push}: expected USER/NAME, such as ann/my-model")
    asked = [one for one in (arguments.to, arguments.out, arguments.push) if one is not None]
    if arguments.verify_server and asked:
        parser.error("--verify_server exports nothing: leave out --to, --out and --push")
    if arguments.dtype and arguments.to in ("adapter", "gguf"):
        parser.error("--dtype is of merged weights or a server's; --gguf_type is of a GGUF file's")
    if not arguments.verify_server and (arguments.to is None or arguments.out is None):
        parser.error("expected --to and --out, or --verify_server")
    return arguments


def export(arguments: argparse.Namespace) -> None:
    """Write the export beside its name, compare it with the run, and move it into place.

    Raises ValueError where it cannot be written or does not answer as the run.
    """
    folder, out = arguments.run, arguments.out
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out} is inside the run {folder}: give a folder beside it")
    run = finished_run(folder)
    check_run(run, str(folder / "run.json"))
    recipe = run["recipe"]
    if arguments.to == "adapter" and not recipe["use_peft"]:
        raise ValueError(f"{folder} is full fine-tuning, without an adapter: pass --to merged")
    rows = held_out(run)
    tokenizer = run_tokenizer(folder, run)
    config = base_config(recipe, arguments.trust_remote_code)
    stored = config.dtype  # of the base model's weights, if it says so
    own_dtype = recipe["dtype"] if stored is None else str(stored).removeprefix("torch.")
    if arguments.to == "adapter":
        refuse_for_vllm(folder / "adapter")
    if arguments.to == "gguf":
        refuse_unwritable(config, tokenizer)
    with unfinished_folder(out, print) as unfinished:
        print(f"asking the run {arguments.prompts} held-out prompts ...", flush=True)
        model = load_pair(folder, unquantised(run), arguments.trust_remote_code)
        ends = end_ids(model, tokenizer)
        expected = observe(model, tokenizer, rows, arguments.prompts, ends, recipe["max_length"])
        print(f"writing {out} ...", flush=True)
        if arguments.to == "adapter":
            write_adapter(folder, recipe["model_name_or_path"], unfinished, tokenizer, model)
        else:
            gguf_dtype = GGUF_TYPES[arguments.gguf_type] if arguments.to == "gguf" else None
            merged = merge(model, tokenizer, gguf_dtype or arguments.dtype or own_dtype, ends)
            if arguments.to == "merged":
                write_merged(merged, tokenizer, unfinished)
            else:
                gguf = unfinished / f"{out.name}.gguf"
                write_gguf(merged, tokenizer, gguf, arguments.gguf_type, ends)
            del merged
        del model
        print("loading it again and asking it the same ...", flush=True)
        found, kept = as_a_user(unfinished, arguments, rows, recipe, config, tokenizer)
        agreement = compare(expected, found, kept)
        if agreement.differs:
            raise ValueError(f"the export does not answer as {folder}: {agreement.differs}")
        made = described(arguments, run, kept, ends)
        model_card(run, quality_of(folder), made).save(unfinished / "README.md")
        write_json(
            unfinished / VERIFIED, agreement.facts(kept) | {"files": facts_of_sizes(unfinished)}
        )
    print(
        f"{out}: {arguments.to}, {kept}; it answers as {folder} on {agreement.prompts} prompts "
        f"(mean difference {agreement.nats:.1e} nats a response token; {agreement.other_ends} "
        "greedy answers end in one of the two alone)"
    )
    if recipe["load_in_4bit"] or recipe["load_in_8bit"]:
        print(
            "the run trained on quantised weights; the export is made of the base model's own, "
            "whose answers may differ a little from the run's evaluations"
        )
    print(f"serve it: {serve_command(made._replace(name=str(out), hub=False))}")


def verify_server(arguments: argparse.Namespace) -> None:
    """Ask the run and a running server the same held-out prompts.

    Raises ValueError where the server does not answer as the run.
    """
    folder, url, name = arguments.run, arguments.verify_server, arguments.server_model
    run = finished_run(folder)
    recipe, rows, tokenizer = run["recipe"], held_out(run), run_tokenizer(folder, run)
    words = Words("the server", "nothing was compared", "is it loading still?")
    client = ServerClient(url, words)
    client.refuse_unserved(name)
    print(f"asking the run and {name} on the server {arguments.prompts} prompts ...", flush=True)
    model = load_pair(folder, unquantised(run), arguments.trust_remote_code)
    limits = (arguments.prompts, recipe["max_length"], arguments.dtype or recipe["dtype"])
    agreement = hold_to_run(client, name, model, tokenizer, rows, *limits)
    print(
        f"{name} on {url} answers as {folder} on {agreement.prompts} prompts (nats a response "
        f"token differ by {agreement.nats:.1e}, {agreement.other_ends} answers end otherwise)"
    )


def quality_of(folder: Path) -> dict[str, Any]:
    """Returns quality.json of the run's adapter as it is now, {} without one."""
    path = folder / "eval" / "quality.json"
    found = read_quality(path)
    if found.get("adapter_hash") != adapter_hash(folder):
        return {}
    check_differences(path, found)
    return found


def described(
    arguments: argparse.Namespace, run: dict[str, Any], kept: str, ends: list[int]
) -> Export:
    """Returns what was written, under the name by which its users load it."""
    kind, out, recipe = arguments.to, arguments.out, run["recipe"]
    adapter = kind == "adapter"
    return Export(
        name=arguments.push or out.name,
        kind=kind,
        dtype=kept,
        ends=ends,
        base=full_name(recipe["model_name_or_path"]),
        revision=recipe["model_revision"],
        rank=refuse_for_vllm(arguments.run / "adapter") if adapter else None,
        layers=tuple(adapted_layers(arguments.run / "adapter")) if adapter else (),
        file=f"{out.name}.gguf" if kind == "gguf" else None,
        text_of=(run["ran"] or {}).get("text_of"),
        hub=arguments.push is not None,
    )


def base_config(recipe: dict[str, Any], trusted: bool) -> Any:
    """Returns the config of the base model's text part."""
    config = read_config(recipe["model_name_or_path"], recipe["model_revision"], trusted)
    return config.get_text_config()


def unquantised(run: dict[str, Any]) -> dict[str, Any]:
    """Returns run.json as if the base model had been loaded in its own 16 or 32 bits."""
    return run | {"recipe": run["recipe"] | {"load_in_4bit": False, "load_in_8bit": False}}


def as_a_user(
    out: Path,
    arguments: argparse.Namespace,
    rows: HeldOut,
    recipe: dict[str, Any],
    config: Any,
    own: PreTrainedTokenizerBase,
) -> tuple[Behaviour, str]:
    """Load an export from its folder alone, and ask it. Returns its answers and its dtype.

    `config` is the base model's and `own` the run's tokenizer. They tell what transformers does
    not read of a GGUF file.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trust = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.to == "gguf":
        kept, path = arguments.gguf_type, next(out.glob("*.gguf"))
        tokenizer = read_tokenizer(path, own)
        model = read_gguf(path, config)
        ends = ends_of(path)
        with_fused_head(model)
    elif arguments.to == "merged":
        kept, tokenizer = stored_dtype(out), AutoTokenizer.from_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto", **trust)
        ends = model.generation_config.eos_token_id
        with_fused_head(model)
    else:
        kept, tokenizer = recipe["dtype"], AutoTokenizer.from_pretrained(out)
        model = adapted_base(out, dtype=getattr(torch, kept), **trust)
        ends = GenerationConfig.from_pretrained(out).eos_token_id
        with_fused_head(model.get_base_model())
    ends = ends if isinstance(ends, list) else [ends]
    asked = observe(
        model.to(device).eval(), tokenizer, rows, arguments.prompts, ends, recipe["max_length"]
    )
    return asked, kept


def push(out: Path, name: str, private: bool) -> None:
    """Upload an export to the hub, as one commit."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=out, commit_message=f"Upload {out.name}")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        said = f"{out} is made, and was not uploaded to {name}"
        upload = shlex.join(["hf", "upload", name, str(out), *(["--private"] if private else [])])
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{said}, as the hub's offline mode is on: unset HF_HUB_OFFLINE, then `{upload}`"
            ) from error
        raise ValueError(
            f"{said}: {first_line(error).rstrip('.')}. Log in with `hf auth login`, then `{upload}`"
        ) from error
    print(f"uploaded: {url}")


if __name__ == "__main__":
    main(sys.argv[1:])
