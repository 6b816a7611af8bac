"""How an export is used: the code and the commands of its model card, as they stand."""

import shlex
from pathlib import Path
from typing import NamedTuple

_MESSAGES = '[{"role": "user", "content": "..."}]'


class Export(NamedTuple):
    """What was written: `name` is its folder, or its repository on the hub.

    `kind` is merged, adapter or gguf, `dtype` that of the weights as they were compared, `ends` the
    token ids that end an answer. `base` and `revision` are of the base model. `rank` and `layers`
    are what vLLM is told of an adapter, None where vLLM does not take it. `file` is a GGUF file.
    `text_of` is the class of a base model that takes images too.
    """

    name: str
    kind: str
    dtype: str
    ends: list[int]
    base: str
    revision: str | None = None
    rank: int | None = None
    layers: tuple[str, ...] = ()
    file: str | None = None
    text_of: str | None = None
    hub: bool = False


def serve_command(export: Export) -> str | None:
    """Returns the command that serves an export, None where it is an adapter vLLM does not take.

    vLLM is told what it would guess otherwise: it serves float32 weights in 16 bits, and under an
    adapter the template and the end tokens of the base model.
    """
    name = export.name
    if export.kind == "gguf":
        place = (
            ["-hf", name, "-hff", export.file] if export.hub else ["-m", f"{name}/{export.file}"]
        )
        return shlex.join(["llama-server", "--jinja", *map(str, place)])
    if export.kind == "merged":
        return shlex.join(["vllm", "serve", name, "--dtype", export.dtype])
    if export.rank is None:
        return None
    local = Path(export.base).is_dir()
    revision = [] if local or not export.revision else ["--revision", export.revision]
    return shlex.join(
        [
            *("vllm", "serve", export.base, *revision, "--dtype", export.dtype),
            *("--tokenizer", name, "--generation-config", name),
            *("--enable-lora", "--max-lora-rank", str(export.rank)),
            *("--lora-target-modules", *export.layers, "--lora-modules", f"tuned={name}"),
        ]
    )


def usage(export: Export) -> list[str]:
    """Returns the blocks of a model card that say how its export is used."""
    served = serve_command(export)
    if export.kind == "gguf":
        return [block(served or "", "")]
    if export.kind == "merged":
        return [block(_pipeline(export, "")), "With vLLM:", block(served or "", "")]
    lines = [block(_adapter(export)), *in_a_pipeline(export)]
    if served:
        lines += ["With vLLM, which then has it under the name `tuned`:", block(served, "")]
    return lines


def usage_in_run(export: Export, run: str) -> list[str]:
    """Returns the blocks of the card of a run's own adapter, or of its fully tuned model."""
    if export.kind == "merged":
        return [block(_pipeline(export, _ends(export)))]
    lines = [block(_adapter(export)), *in_a_pipeline(export)]
    if export.rank is not None:
        served = shlex.join(["python", "app/serve.py", "--run", run])
        lines += ["With vLLM, which then has it under the name `tuned`:", block(served, "")]
    return lines


def in_a_pipeline(export: Export) -> list[str]:
    """Returns how a pipeline loads an adapter; nothing where it would load another model."""
    if export.text_of:
        return []
    said = "A pipeline takes the base model's tokenizer and end tokens, unless these are named:"
    more = f', tokenizer="{export.name}", dtype="{export.dtype}"'
    return [said, block(_pipeline(export, _ends(export), more))]


def block(text: str, language: str = "python") -> str:
    """Returns a block of code."""
    return f"```{language}\n{text}\n```"


def _pipeline(export: Export, ends: str, more: str = "") -> str:
    return (
        "from transformers import pipeline\n\n"
        f'pipe = pipeline("text-generation", "{export.name}"{more})\n'
        f"answered = pipe({_MESSAGES}, max_new_tokens=256{ends})\n"
        'print(answered[0]["generated_text"][-1]["content"])'
    )


def _adapter(export: Export) -> str:
    name, whole = export.name, "AutoModelForImageTextToText"
    load = (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}", dtype="{export.dtype}")\n'
    )
    if export.text_of:
        load = (
            f"from peft import PeftModel\nfrom transformers import {whole}, AutoTokenizer\n\n"
            f'whole = {whole}.from_pretrained("{export.base}", dtype="{export.dtype}")\n'
            f'model = PeftModel.from_pretrained(whole, "{name}")\n'
        )
    return (
        f"{load}"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f"prompt = tokenizer.apply_chat_template(\n    {_MESSAGES},\n"
        '    add_generation_prompt=True, return_tensors="pt", return_dict=True,\n)\n'
        f"ids = model.generate(**prompt, max_new_tokens=256{_ends(export)})\n"
        'print(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))'
    )


def _ends(export: Export) -> str:
    """Returns the argument that ends answers where the template ends them."""
    return f", eos_token_id={export.ends}"
