"""Random-initialised models of published shapes: what speed and memory are measured on where no weights can be had."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sftlab.template import encode, set_template

ROOT = Path(__file__).parent.parent


def save_random_llama(folder: Path, tokenizer: str) -> None:
    """A random-initialised model of Llama-3.2-1B's shape (1.236e9 parameters, bfloat16) with a tokenizer."""
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001, dtype="bfloat16",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def write_rows(path: Path, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, seed: int = 0) -> None:
    """Rows in Dolly's shape of random words, with lognormal(5.75, 0.7) tokens cut to 16..`longest`.

    Mean near 315 tokens at 512. Nearly all of a row is its response; its words are one token each under `tokenizer`.
    """
    set_template(tokenizer)
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(5.75, 0.7, count).astype(int), 16, longest)
    texts = (tokenizer.decode([i]) for i in range(256, 30_000))
    words = [
        t for t in texts if re.fullmatch(" [a-z]{3,}", t) and len(tokenizer.encode(t, add_special_tokens=False)) == 1
    ]
    prompt = {"role": "user", "content": "1000"}
    row = {"prompt": [prompt], "completion": [{"role": "assistant", "content": words[0].strip()}]}
    around = len(encode(tokenizer, row, None)["input_ids"]) - 1
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            text = "".join(generator.choice(words, max(1, length - around))).strip()
            file.write(json.dumps({"instruction": f"{number}", "context": "", "response": text}) + "\n")


def train_random_llama(run: str, tokenizer: str, dataset: str, launch_config: str, flags: Sequence[str]) -> None:
    """A finished run on such a model, by the trainer as a user starts it, under accelerate_configs/LAUNCH_CONFIG.yaml.

    `run` is relative to the repository, `dataset` a local file; `flags` override the recipe llama3.2-1b/attn_r16. The
    model itself is kept in data/llama3.2-1b-random. CalledProcessError where the training fails.
    """
    base = ROOT / "data" / "llama3.2-1b-random"
    save_random_llama(base, tokenizer)
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", f"accelerate_configs/{launch_config}.yaml", "recipes/sft.py"),
        *("--config", "recipes/llama3.2-1b/attn_r16.yaml", "--model_name_or_path", str(base), "--output_dir", run),
        *("--dataset_name", dataset, "--dataset_fraction", "1", "--eval_strategy", "no", "--save_strategy", "no"),
        *("--overwrite", "true", *flags),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
