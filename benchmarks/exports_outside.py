"""Do a run's exports answer as the run in programs that know nothing of this project?

python eval/quality.py --run RUN --samples 64 --max_new_tokens 64
python benchmarks/exports_outside.py --run RUN --llama LLAMA/bin/python [--prompts 64] \
    [--answers 8] [--only FORM ...]

Exports the run in every form: each is verified by the export itself, on --prompts prompts. Each is
then copied to another folder, and another program answers the first --answers rows greedily, which
is compared with what quality.py kept. LLAMA is an environment with xllamacpp, which is llama.cpp.
benchmarks/exports_served.py asks vLLM.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sftlab.evaluation.base_and_tuned import finished_run, run_tokenizer
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance
from sftlab.schema import read_object
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

WORKER = Path(__file__).with_name("exports_outside_worker.py")
# a form's name: the options that write it, and the program that answers with it
FORMS = {
    "merged float32": ("--to merged --dtype float32", "transformers"),
    "merged float16": ("--to merged --dtype float16", "transformers"),
    "merged bfloat16": ("--to merged --dtype bfloat16", "transformers"),
    "adapter": ("--to adapter", "peft"),
    "gguf f32": ("--to gguf --gguf_type f32", "llama.cpp"),
    "gguf f16": ("--to gguf --gguf_type f16", "llama.cpp"),
    "gguf bf16": ("--to gguf --gguf_type bf16", "llama.cpp"),
    "gguf q8_0": ("--to gguf --gguf_type q8_0", "llama.cpp"),
}
SHOWN = ("export", "nats", "other_ends", "program", "same_prompts", "same_answers", "answers")


def main(argv: list[str]) -> None:
    """Export, let the other programs answer, write a row for each pair of the two."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--llama", required=True, help="python of xllamacpp's environment")
    parser.add_argument("--prompts", type=int, default=64, help="that an export is verified on")
    parser.add_argument("--answers", type=int, default=8, help="rows that other programs answer")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "exports")
    options = parser.parse_args(argv)
    tokenizer = run_tokenizer(options.run, finished_run(options.run))
    records = answered(options.run, options.answers)
    prompts = [record["prompt"] for record in records]
    rendered = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)
        for one in prompts
    ]
    expected = [
        (record["tuned"]["text"], len(ids)) for record, ids in zip(records, rendered, strict=True)
    ]
    limit = read_object(options.run / "eval" / "quality.json")["generation"]["max_new_tokens"]
    lines = []
    for form in options.only:
        given, program = FORMS[form]
        with TemporaryDirectory(prefix="exports-") as name:
            out = moved(exported(options, given, Path(name) / "made"), Path(name) / "elsewhere")
            found = asked(options, program, out, prompts, limit)
            verified = read_object(out / "verified.json")
        lines.append(row(options, form, verified, program, found, expected))
        print(*(f"{name} {lines[-1][name]};" for name in SHOWN), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "outside.csv", lines)
    print(aligned([list(SHOWN), *([str(line[name]) for name in SHOWN] for line in lines)]))


def answered(run: Path, count: int) -> list[dict[str, Any]]:
    """Returns the first records that quality.py kept of the run."""
    path = run / "eval" / "quality.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there: run eval/quality.py --run {run} first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:count]


def exported(options: Any, given: str, out: Path) -> Path:
    """Returns the folder of an export that its own command verified."""
    words = [str(ROOT / "recipes" / "export.py"), "--run", str(options.run), *given.split()]
    words += ["--out", str(out), "--prompts", str(options.prompts)]
    if subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"the export {given} was refused, as said above")
    return out


def moved(made: Path, elsewhere: Path) -> Path:
    """Returns the export's new folder: nothing may depend on where it was written."""
    return Path(shutil.move(made, elsewhere))


def asked(
    options: Any, program: str, out: Path, prompts: list[Any], limit: int
) -> list[tuple[str, int]]:
    """Returns the texts and the prompts' lengths of a program."""
    python = options.llama if program == "llama.cpp" else sys.executable
    words = [str(Path(python).absolute()), str(WORKER), program, str(out), str(limit)]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        words, input=json.dumps(prompts), cwd="/", env=clean, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise ValueError(f"{program} ended with status {done.returncode} on {out}")
    return json.loads(done.stdout.splitlines()[-1])


def row(
    options: Any, form: str, verified: dict[str, Any], program: str, found: Any, expected: Any
) -> dict[str, Any]:
    """Returns a line of the table."""
    pairs = list(zip(found, expected, strict=True))
    return {
        "export": form,
        "prompts": verified["prompts"],
        "nats": f"{verified['nats']:.2e}",
        "other_ends": verified["other_ends"],
        "program": program,
        "answers": len(pairs),
        "same_prompts": sum(a[1] == b[1] for a, b in pairs),
        "same_answers": sum(a[0].strip() == b[0] for a, b in pairs),
        **provenance(),
        "command": f"python benchmarks/exports_outside.py --run RUN --llama PYTHON "
        f"--prompts {options.prompts} --answers {options.answers}",
    }


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
