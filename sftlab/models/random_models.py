"""Random-initialised models of published shapes, to measure speed and memory without weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sftlab.data.chat_template import encode, set_template
from sftlab.models.family_shapes import FAMILY_SHAPES, family_config
from sftlab.paths import ROOT

# fields of a LlamaConfig by the name of the shape; other families are in family_shapes.py
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": 128001,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "llama2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "bos_token_id": 31998, "eos_token_id": 31998,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "bos_token_id": 128000, "eos_token_id": 128001,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "mistral-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
        "bos_token_id": 31998, "eos_token_id": 31998,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "tiny": {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "bos_token_id": 1022, "eos_token_id": 1022,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


def shape_config(shape: str) -> PreTrainedConfig:
    """Returns the config of a shape, of any family, in bfloat16.

    Raises ValueError for an unknown one.
    """
    if shape in FAMILY_SHAPES:
        config = family_config(shape)
        config.dtype = torch.bfloat16
        return config
    if shape not in MODEL_SHAPES:
        known = ", ".join([*MODEL_SHAPES, *FAMILY_SHAPES])
        raise ValueError(f"no model shape {shape!r}: there are {known}")
    return LlamaConfig(**MODEL_SHAPES[shape], rms_norm_eps=1e-5, dtype="bfloat16")


def random_files(shape: str, longest: int, shortest: int = 16) -> tuple[Path, Path]:
    """Returns the folder of a random-initialised model, and the file of rows for it.

    Rows have `shortest` to `longest` tokens. Raises ValueError for an unknown shape.
    """
    shape_config(shape)
    lengths = f"{longest}" if shortest == 16 else f"{shortest}to{longest}"
    return ROOT / "data" / f"{shape}-words", ROOT / "data" / f"{shape}-rows{lengths}.jsonl"


def make_random_files(shape: str, longest: int, count: int = 3000, shortest: int = 16) -> None:
    """Make the files that `random_files` names, where they are missing."""
    folder, rows = random_files(shape, longest, shortest)
    save_random_model(folder, shape=shape)
    if not rows.is_file():
        write_rows(rows, AutoTokenizer.from_pretrained(folder), count, longest, shortest)


def save_random_model(
    folder: Path, tokenizer: str | None = None, shape: str = "llama3.2-1b"
) -> None:
    """Save a random-initialised model of a published shape, in bfloat16.

    Its tokenizer is that of the folder `tokenizer`, or `word_tokenizer`.
    """
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    config = shape_config(shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(torch.bfloat16)
    model.cpu()
    torch.cuda.empty_cache()
    own = (
        word_tokenizer(config.vocab_size)
        if tokenizer is None
        else AutoTokenizer.from_pretrained(tokenizer)
    )
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    model.save_pretrained(unfinished)
    own.save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `size` tokens: words w0, w1, ..., then <unk>, <eos> and <pad>."""
    special = {"<unk>": size - 3, "<eos>": size - 2, "<pad>": size - 1}
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size - 3)} | special, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def random_lengths(
    count: int, longest: int, shortest: int = 16, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Returns the lengths in tokens of the rows that `write_rows` writes.

    They are lognormal(5.75, 0.7), clipped to `shortest` and `longest`.
    """
    generator = generator or np.random.default_rng(0)
    return np.clip(generator.lognormal(5.75, 0.7, count).astype(int), shortest, longest)


def write_rows(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    longest: int,
    shortest: int = 16,
    seed: int = 0,
) -> None:
    """Write rows of random words in Dolly's data format, with `random_lengths` tokens.

    Their mean is about 315 tokens for `longest` 512. Nearly all of a row is its response. Each
    word is one token under `tokenizer`.
    """
    set_template(tokenizer)
    generator = np.random.default_rng(seed)
    lengths = random_lengths(count, longest, shortest, generator)
    texts = {tokenizer.decode([i]).strip() for i in range(256, min(30_000, len(tokenizer)))}
    texts = [text for text in sorted(texts) if re.fullmatch("[a-z]+[0-9]*", text) and len(text) > 2]
    ids = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    # choosing from a list would make an array of it for every row
    words = np.array([text for text, mine in zip(texts, ids, strict=True) if len(mine) == 1])
    row = {
        "prompt": [{"role": "user", "content": "1000"}],
        "completion": [{"role": "assistant", "content": str(words[0])}],
    }
    around = len(encode(tokenizer, row, None)["input_ids"]) - 1
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            text = " ".join(generator.choice(words, max(1, length - around)))
            file.write(
                json.dumps({"instruction": f"{number}", "context": "", "response": text}) + "\n"
            )
    unfinished.rename(path)


def train_random_llama(
    run: str, tokenizer: str, dataset: str, launch_config: str, flags: Sequence[str]
) -> None:
    """Train a finished run on a random-initialised Llama-3.2-1B, by the trainer itself.

    `run` is a folder relative to the repository, `dataset` a local file. `launch_config` names a
    file of accelerate_configs/. `flags` override the recipe llama3.2-1b/attn_r16. The base model is
    kept in data/llama3.2-1b-random. Raises CalledProcessError where the training fails.
    """
    base = ROOT / "data" / "llama3.2-1b-random"
    save_random_model(base, tokenizer)
    fields = {
        "config": "recipes/llama3.2-1b/attn_r16.yaml",
        "model_name_or_path": str(base),
        "output_dir": run,
        "dataset_name": dataset,
        "dataset_fraction": "1",
        "eval_strategy": "no",
        "save_strategy": "no",
        "overwrite": "true",
    }
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", f"accelerate_configs/{launch_config}.yaml", "recipes/sft.py"]
    given = [word for name, value in fields.items() for word in (f"--{name}", value)]
    subprocess.run([*launcher, *given, *flags], cwd=ROOT, check=True)
