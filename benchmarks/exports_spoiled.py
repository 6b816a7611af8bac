"""Is an export that was spoilt between its writing and its check caught, whatever was spoilt?

python benchmarks/exports_spoiled.py --run RUN [--prompts 16] [--only KIND ...]

Each form of export is spoilt in ways that load without an error and answer wrongly. The table says
of each what recipes/export.py ended with. Nothing of these exports is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.script_options import Options
from sftlab.tables import write_csv

WRITERS = {"merged": "write_merged", "adapter": "write_adapter", "gguf": "write_gguf"}
OPTIONS = {"merged": ["--dtype", "float32"], "adapter": [], "gguf": ["--gguf_type", "f16"]}
# what the run makes of the prompts, once it was asked
OF_RUN: list[Any] = []


def main(argv: list[str]) -> None:
    """Spoil and export, one after the other, and write a row for each."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--prompts", type=int, default=16, help="that an export is verified on")
    parser.add_argument("--only", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "exports")
    options = parser.parse_args(argv)
    lines = []
    for kind in options.only:
        for what, spoil in WAYS.items():
            script = export_script()
            spoil(script, kind)
            status, said = ended(script, options, kind)
            lines.append(row(options, kind, what, status, said))
            print(f"{kind}, {what}: exit status {status}: {said}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "spoiled.csv", lines)


def export_script() -> ModuleType:
    """Returns recipes/export.py as a module of its own."""
    place = importlib.util.spec_from_file_location("export", ROOT / "recipes" / "export.py")
    assert place and place.loader
    script = importlib.util.module_from_spec(place)
    place.loader.exec_module(script)
    observe = script.observe

    def first(*given: Any) -> Any:  # an export asks the run first, which is always the same
        script.observe = observe
        OF_RUN[:] = OF_RUN or [observe(*given)]
        return OF_RUN[0]

    script.observe = first
    return script


def ended(script: ModuleType, options: Any, kind: str) -> tuple[int, str]:
    """Returns the exit status of an export, and what it said."""
    with TemporaryDirectory(prefix="spoiled-") as folder:
        out = Path(folder) / kind
        words = ["--run", str(options.run), "--to", kind, "--out", str(out), *OPTIONS[kind]]
        try:
            script.main([*words, "--prompts", str(options.prompts)])
        except SystemExit as stopped:
            return (1, stopped.code) if isinstance(stopped.code, str) else (stopped.code or 0, "")
        return 0, json.loads((out / "verified.json").read_text())["differs"] or "it agrees"


def zero_b(script: ModuleType, kind: str) -> None:
    """Let the adapter change nothing in what is written."""
    if kind == "adapter":
        return between(script, lambda out: rewritten(out, lambda n, t: t * ("lora_B" not in n)))
    merge = script.merge

    def without_b(model: Any, *more: Any) -> Any:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.mul_("lora_B" not in name)
        return merge(model, *more)

    script.merge = without_b


def template(script: ModuleType, kind: str) -> None:
    """Let the export bring a template that says `human` where the run's says `user`."""
    changed_arguments(script, kind, spoken)


def spoken(given: Any) -> Any:
    """Returns a tokenizer with other names of roles, and all else as it is."""
    if not hasattr(given, "chat_template"):
        return given
    found = copy.deepcopy(given)
    role = "message['role']"
    found.chat_template = found.chat_template.replace(role, f"({role} | replace('user', 'human'))")
    return found


def end_token(script: ModuleType, kind: str) -> None:
    """Let the export end answers at the token 0 alone."""
    if kind == "gguf":
        return changed_arguments(script, kind, lambda one: [0] if isinstance(one, list) else one)

    def written(out: Path) -> None:
        path = out / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))

    return between(script, written)


def swapped(script: ModuleType, kind: str) -> None:
    """Swap the query weights of two neighbouring layers in the file."""
    if kind == "gguf":
        return between(script, lambda out: swap_in_gguf(next(out.glob("*.gguf"))))

    def exchanged(out: Path) -> None:
        tensors = load_file(next(out.glob("*.safetensors")))
        a, b = (next(n for n in tensors if f"layers.{i}.self_attn.q_proj" in n) for i in (3, 4))
        rewritten(out, lambda n, t: tensors[{a: b, b: a}.get(n, n)])

    return between(script, exchanged)


def swap_in_gguf(path: Path) -> None:
    """Exchange two tensors of equal shape in place."""
    tensors = {one.name: one.data for one in GGUFReader(path, "r+").tensors}
    a, b = (tensors[f"blk.{layer}.attn_q.weight"] for layer in (3, 4))
    a[:], b[:] = b.copy(), a.copy()


def rewritten(out: Path, new: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Write an export's weights again, each as `new` gives it by its name."""
    path = next(out.glob("*.safetensors"))
    tensors = {name: new(name, tensor).contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def between(script: ModuleType, spoil: Callable[[Path], None]) -> None:
    """Spoil an export's folder after it is written and before it is loaded again."""
    load = script.as_a_user

    def loaded(out: Path, *more: Any) -> Any:
        spoil(out)
        return load(out, *more)

    script.as_a_user = loaded


def changed_arguments(script: ModuleType, kind: str, change: Callable[[Any], Any]) -> None:
    """Let what writes an export be given other arguments."""
    write = getattr(script, WRITERS[kind])
    setattr(script, WRITERS[kind], lambda *given: write(*map(change, given)))


WAYS: dict[str, Callable[[ModuleType, str], None]] = {
    "nothing": lambda script, kind: None,
    "LoRA B zeroed": zero_b,
    "another template": template,
    "another end token": end_token,
    "two tensors swapped": swapped,
}


def row(options: Any, kind: str, what: str, status: int, said: str) -> dict[str, Any]:
    """Returns a line of the table."""
    return {
        "export": " ".join([kind, *OPTIONS[kind][1:]]),
        "spoilt": what,
        "exit_status": status,
        "said": said.rpartition(f"{options.run}: ")[2],
        "prompts": options.prompts,
        **provenance(),
        "command": f"python benchmarks/exports_spoiled.py --run RUN --prompts {options.prompts}",
    }


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
