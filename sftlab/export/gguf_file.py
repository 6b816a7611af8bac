"""Merged weights as one GGUF file, which llama.cpp and its many front ends read.

Written with llama.cpp's own `gguf` package for Llama's and Qwen's families with a byte-level BPE
tokenizer. What it has no name for is refused: a wrong name would load and answer wrongly.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
    quants,
)
from gguf.constants import MODEL_ARCH
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# type of a file's weights: the dtype that they are merged in, as torch names it
GGUF_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float32"}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
# transformers' model_type: llama.cpp's architecture, and whether heads are permuted
_FAMILIES = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
}
_DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
# part of the expression that splits text before its bytes: llama.cpp's name of the rule
_EXPRESSIONS = ((_DIGITS + r"\p{N}{1,3}|", "llama-bpe"), (_DIGITS + r"\p{N}|", "qwen2"))


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: str,
    ends: list[int],
) -> None:
    """Write a merged model to `path`. `kind` is one of GGUF_TYPES; norms and biases stay float32.

    `ends` are the token ids that end an answer. Raises ValueError for a model or a tokenizer that
    it has no name for.
    """
    config = model.config.get_text_config()
    refuse_unwritable(config, tokenizer)
    arch, permuted = _FAMILIES[config.model_type]
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    writer = GGUFWriter(path, arch=arch.name.lower())
    writer.add_name(path.stem)
    writer.add_file_type(_FILE_TYPES[kind])
    _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for other in [one for one in ends if one != tokenizer.eos_token_id][:1]:
        writer.add_eot_token_id(other)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ValueError(f"GGUF has no name for the tensor {name}: export it with --to merged")
        if permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads
            heads = config.num_key_value_heads if "k_proj" in name else heads
            tensor = _permuted(tensor, heads)
        data = tensor.detach().to("cpu", torch.float32).numpy()
        stored = GGMLQuantizationType[kind.upper() if data.ndim > 1 else "F32"]
        writer.add_tensor(new, quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, config: Any) -> PreTrainedModel:
    """Load a file with transformers, in float32.

    transformers does not read the divisors of the rotary frequencies, so those of the base model's
    `config` hold.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.config.rope_parameters = config.rope_parameters
    inner = model.get_decoder()
    inner.rotary_emb = type(inner.rotary_emb)(model.config)
    return model


def read_tokenizer(path: Path, own: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Load a file's tokenizer with transformers, which splits every text as GPT-2 does.

    The file names its rule of splitting as llama.cpp knows it. Where that is the rule of `own`,
    the tokenizer that the file was written from, it splits as `own` does.
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    named = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if named is not None and named.contents() == _pre_tokenizer(own):
        tokenizer.backend_tokenizer.pre_tokenizer = own.backend_tokenizer.pre_tokenizer
    return tokenizer


def ends_of(path: Path) -> list[int]:
    """Returns the token ids that end an answer, as the file names them."""
    reader = GGUFReader(path)
    fields = (reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return [int(field.contents()) for field in fields if field is not None]


def refuse_unwritable(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a model or tokenizer that `write_gguf` has no name for."""
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"a {config.model_type} model is not written as GGUF here (known are "
            f"{', '.join(_FAMILIES)}): export it with --to merged and convert that with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if _scaling(config) not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rope scaling {_scaling(config)!r} is not written as GGUF here: export it with "
            "--to merged"
        )
    _pre_tokenizer(tokenizer)


def _add_shape(writer: GGUFWriter, config: Any) -> None:
    head = _head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if _scaling(config) == "linear":
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _head_size(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _scaling(config: Any) -> str:
    return config.rope_parameters.get("rope_type", "default")


def _rope_factors(config: Any) -> np.ndarray | None:
    """Returns Llama 3's divisors of the rotary frequencies [head size / 2], or None."""
    if _scaling(config) != "llama3":
        return None
    given = config.rope_parameters
    head = _head_size(config)
    frequencies = given["rope_theta"] ** -(np.arange(0, head, 2) / head)
    turns = given["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = given["low_freq_factor"], given["high_freq_factor"], given["factor"]
    # between the two, frequencies are blended as the Llama 3.1 release does it
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns rows of a query or key weight in llama.cpp's order: rotary pairs side by side."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns llama.cpp's name for how the tokenizer splits text. Raises ValueError for others."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    name = _rule_name(backend["pre_tokenizer"] or {})
    merges = backend["model"].get("merges")
    if name and merges and backend.get("normalizer") in (None, {"type": "NFC"}):
        return name
    raise ValueError(
        "the tokenizer is no byte-level BPE that GGUF has a name for here: export it with "
        "--to merged and convert that with llama.cpp's convert_hf_to_gguf.py"
    )


def _rule_name(rule: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name for a pre-tokenizer as tokenizers stores it; None for others."""
    *first, last = rule.get("pretokenizers") or [rule]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(first) > 1:
        return None
    if not first:
        return "gpt-2" if last["use_regex"] else None
    if first[0]["type"] == "Digits":
        return "smollm" if first[0]["individual_digits"] and last["use_regex"] else None
    if first[0]["type"] != "Split" or last["use_regex"]:
        return None
    expression = first[0]["pattern"].get("Regex", "")
    return next((name for part, name in _EXPRESSIONS if part in expression), None)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    added = tokenizer.added_tokens_decoder
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for index in range(size):
        tokens.append(known.get(index, f"[PAD{index}]"))
        special = index in added and added[index].special
        kind = TokenType.USER_DEFINED if index in added else TokenType.NORMAL
        kind = TokenType.CONTROL if special else kind
        kinds.append(kind if index in known else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        if (found := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(found)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_chat_template(tokenizer.get_chat_template())
