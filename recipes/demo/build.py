"""Build the demo base model and the demo data set, on a CPU and without a network.

python recipes/demo/build.py

Writes data/demo/base/ (a small Llama with its tokenizer, pre-trained here),
data/demo/instructions.jsonl (columns instruction, context, response), and
data/demo/preferences.jsonl (columns prompt, chosen, rejected). A complete build is kept;
--overwrite builds it again.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

# GNU OpenMP threads spin while they wait, which on busy cores costs several times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tqdm import tqdm

from sftlab.script_options import Options

BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def parse_arguments() -> argparse.Namespace:
    """Returns the command line."""
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=1700, help="pre-training steps of 1,024 tokens each"
    )
    parser.add_argument("--rows", type=int, default=4000, help="instruction rows")
    parser.add_argument(
        "--overwrite", action="store_true", help="build again what is there already"
    )
    return parser.parse_args()


def is_complete(out: Path) -> bool:
    """Returns whether base and instructions are there; instructions.jsonl is written last."""
    wanted = [out / "instructions.jsonl", *(out / "base" / name for name in BASE_FILES)]
    return all(path.is_file() for path in wanted)


def build_base(folder: Path, steps: int, seed: int) -> str:
    """Train tokenizer and model and write them to `folder`. Returns a line of figures."""
    # Imported here: torch and transformers take seconds that a complete build need not wait for.
    from sftlab.models import demo

    texts = demo.pretraining_text(40_000, seed)
    tokenizer = demo.train_tokenizer(texts)
    blocks = demo.pack(tokenizer, texts)
    model = demo.build_model(tokenizer, seed)
    with tqdm(total=steps, desc="pre-training", unit="step") as bar:

        def advance(_: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        losses = demo.pretrain(model, blocks, steps, advance, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-20:]
    return (
        f"{model.num_parameters():,} parameters, {steps * demo.BATCH * demo.BLOCK:,} tokens seen, "
        f"final loss {sum(last) / len(last):.3f}"
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(folder: Path, count: int, seed: int) -> None:
    """Write `count` instruction rows, and preference pairs over the same questions."""
    from sftlab.models import demo

    write_rows(folder / "instructions.jsonl", demo.instruction_rows(count, seed))
    write_preferences(folder, seed)


def write_preferences(folder: Path, seed: int) -> None:
    """Write a preference pair for each instruction row of `folder`."""
    from sftlab.models.demo_preferences import preference_rows

    lines = (folder / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    write_rows(folder / "preferences.jsonl", preference_rows(list(map(json.loads, lines)), seed))


def install(built: Path, out: Path) -> None:
    """Move all parts from `built` into `out`, the mark of completeness last."""
    (out / "instructions.jsonl").unlink(missing_ok=True)
    if (out / "base").exists():
        shutil.rmtree(out / "base")
    os.rename(built / "base", out / "base")
    os.replace(built / "preferences.jsonl", out / "preferences.jsonl")
    os.rename(built / "instructions.jsonl", out / "instructions.jsonl")


def main() -> None:
    """Build in a temporary directory beside the result, then move it into place."""
    arguments = parse_arguments()
    out = arguments.out
    if is_complete(out) and not arguments.overwrite:
        if not (out / "preferences.jsonl").is_file():
            write_preferences(out, arguments.seed)
        print(f"{out} is complete already; --overwrite builds it again")
        return
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=out) as name:
        built = Path(name)
        figures = build_base(built / "base", arguments.steps, arguments.seed)
        write_data(built, arguments.rows, arguments.seed)
        install(built, out)
    print(f"{out}: {figures}, {arguments.rows:,} rows, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
