"""A tiny random base model with a byte-level tokenizer, and rows for it."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sftlab.data.converter import turn_of


def writes_letters(model):
    """Let a random model write letters and blanks alone, as bytes at random are seldom text."""
    letters = byte_tokenizer()("abcdefghij klmnop", add_special_tokens=False)["input_ids"]
    others = [i for i in range(259) if i not in letters]
    with torch.no_grad():
        model.lm_head.weight[others] = 0
        model.lm_head.weight[letters] += 0.01


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens: the bytes and bos, eos, pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<bos>", "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=512,
    )


def with_words_of_16(base: Path, folder: Path) -> Path:
    """A copy of a base whose words are a multiple of 16, as a head in float8 needs."""
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(pad_to_multiple_of=16)
    model.save_pretrained(folder)
    return folder


def write_base(folder: Path, head_dim: int = 16) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_base_of(family: str, folder: Path, **settings: object) -> Path:
    """Write a tiny random base model of a family of transformers. Returns its folder.

    Its weights are so large that attention and what happens to the logits are felt.
    """
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= settings
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    ids = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = AutoConfig.for_model(family, **size, **heads, **ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    base = folder / family
    model.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    return base


def instruction_rows(count: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Repeat the number {i} in words.",
            "context": "",
            "response": f"It is {i}{'!' * (i % 17)}",
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answered(rows: Iterable[dict]) -> list[dict]:
    """Converted rows of one answer, each as prompt and completion."""
    return [{name: turn_of(row)[name] for name in ("prompt", "completion")} for row in rows]


def pair_rows(count: int) -> list[dict[str, str]]:
    """Preference pairs: the number itself is chosen, another one is rejected."""
    return [
        {
            "prompt": f"Repeat the number {i} in words.",
            "chosen": f"It is {i}{'!' * (i % 17)}",
            "rejected": f"No number{'?' * (i % 5)}",
        }
        for i in range(count)
    ]
