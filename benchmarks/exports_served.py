"""Does a vLLM server answer as the run, and is one that differs refused, whatever differs?

python eval/quality.py --run RUN --samples 24 --max_new_tokens 64
python benchmarks/exports_served.py --run RUN --vllm VLLM/bin/vllm [--prompts 8] [--answers 4]

vLLM is started with the run as app/serve.py does it, with the merged export, and in two wrong ways.
recipes/export.py --verify_server holds each of its models to the run. What agrees also answers the
first --answers rows greedily, which is compared with what quality.py kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from safetensors.torch import load_file, save_file

from sftlab.evaluation.base_and_tuned import finished_run
from sftlab.evaluation.server_client import ServerClient, Words
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.schema import read_object
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

PORT = 8137
URL = f"http://127.0.0.1:{PORT}/v1"
SHOWN = ("server", "exit_status", "said", "same_answers", "answers")
QUICK = ("--enforce-eager", "--max-model-len", "1024")


def main(argv: list[str]) -> None:
    """Start the servers one after the other, hold their models to the run, write the table."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--vllm", required=True, help="vLLM's program")
    parser.add_argument(
        "--prompts", type=int, default=8, help="that a server is held to the run on"
    )
    parser.add_argument("--answers", type=int, default=4, help="rows that are answered")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "exports")
    options = parser.parse_args(argv)
    finished_run(options.run)
    options.run = options.run.resolve()
    lines: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="served-") as name:
        for more, models in servers(options, Path(name)):
            with serving(options, more, Path(name) / "vllm.log"):
                for server, model in models.items():
                    lines.append(row(options, server, model))
                    print(*(f"{name} {lines[-1][name]};" for name in SHOWN), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "served.csv", lines)
    print(aligned([list(SHOWN), *([str(line[name]) for name in SHOWN] for line in lines)]))


def servers(options: Any, folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yields vLLM's own options, and what is asked of that server: its models by what they are."""
    adapter = options.run / "adapter"
    zeroed = changed(
        adapter, folder / "zeroed", lambda name, all_: all_[name] * ("lora_B" not in name)
    )
    swapped = changed(adapter, folder / "swapped", lambda name, all_: all_[other_layer(name)])
    modules = [f"tuned={adapter}", f"zeroed={zeroed}", f"swapped={swapped}"]
    yield (
        ["--lora-modules", *modules],
        {
            "the run": "tuned",
            "base asked as tuned": "base",
            "LoRA B zeroed": "zeroed",
            "two tensors swapped": "swapped",
        },
    )
    template = folder / "other.jinja"
    own = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    template.write_text(own.replace("message['role']", "'human'"), encoding="utf-8")
    yield ["--chat-template", str(template)], {"another template": "tuned"}
    (folder / "ends").mkdir()
    (folder / "ends" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    yield (
        [
            "--generation-config",
            str(folder / "ends"),
            "--tokenizer",
            str(other_end(adapter, folder)),
        ],
        {"another end token": "tuned"},
    )


def other_end(adapter: Path, folder: Path) -> Path:
    """Returns a copy of the tokenizer whose end token is another; vLLM ends answers at it too."""
    out = folder / "tokenizer"
    shutil.copytree(adapter, out)
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(read_object(path) | {"eos_token": "<|endoftext|>"}))
    return out


def changed(adapter: Path, out: Path, new: Any) -> Path:
    """Returns a copy of an adapter whose tensors are `new(name, all of them)`."""
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    found = load_file(path)
    tensors = {name: new(name, found).contiguous() for name in found}
    save_file(tensors, path, metadata={"format": "pt"})
    return out


def other_layer(name: str) -> str:
    """Returns the tensor that takes the place of another: q_proj's A of layers 3 and 4 change."""
    layers = {"3": "4", "4": "3"}
    head, _, tail = name.partition("layers.")
    number, _, rest = tail.partition(".")
    moved = number in layers and rest.startswith("self_attn.q_proj.lora_A")
    return f"{head}layers.{layers[number]}.{rest}" if moved else name


@contextmanager
def serving(options: Any, more: list[str], log: Path) -> Iterator[None]:
    """Serve the run with further options of vLLM, until the block ends."""
    script = str(ROOT / "app" / "serve.py")
    words = [sys.executable, script, "--run", str(options.run), "--port", str(PORT)]
    words += ["--vllm", options.vllm, "--", *QUICK, *more]
    with log.open("w") as out:
        server = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        while server.poll() is None and not is_up():
            time.sleep(1)
        if server.poll() is not None:
            raise ValueError(f"vLLM ended: {log.read_text()[-1500:]}")
        yield
    finally:
        server.terminate()
        server.wait(60)


def is_up() -> bool:
    """Returns whether the server answers."""
    try:
        return httpx.get(URL.replace("/v1", "/health")).is_success
    except httpx.HTTPError:
        return False


def row(options: Any, server: str, model: str) -> dict[str, Any]:
    """Returns a line of the table: what the check ends with, and what answers are the run's."""
    words = [str(ROOT / "recipes" / "export.py"), "--run", str(options.run)]
    words += ["--verify_server", URL, "--server_model", model, "--prompts", str(options.prompts)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
    same = [] if done.returncode else same_answers(options, model)
    return {
        "server": server,
        "exit_status": done.returncode,
        "said": said.rpartition("as the run: ")[2].rpartition("prompts (")[2].rstrip(")"),
        "prompts": options.prompts,
        "answers": len(same),
        "same_answers": sum(same),
        **provenance(),
        "command": f"python benchmarks/exports_served.py --run RUN --vllm VLLM "
        f"--prompts {options.prompts} --answers {options.answers}",
    }


def same_answers(options: Any, model: str) -> list[bool]:
    """Returns for the first rows whether the server's answer is that which quality.py kept."""
    folder = options.run / "eval"
    limit = read_object(folder / "quality.json")["generation"]["max_new_tokens"]
    lines = (folder / "quality.jsonl").read_text(encoding="utf-8").splitlines()
    client = ServerClient(URL, Words("vLLM", "nothing was compared", "is it loading still?"))
    found = []
    for record in map(json.loads, lines[: options.answers]):
        body = client.chat(model=model, messages=record["prompt"], temperature=0, max_tokens=limit)
        text = body["choices"][0]["message"]["content"]
        found.append(text.strip() == record["tuned"]["text"])
    return found


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
