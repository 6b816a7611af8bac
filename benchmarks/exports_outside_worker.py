"""Answers messages with one program that knows nothing of this project.

python benchmarks/exports_outside_worker.py PROGRAM EXPORT TOKENS < MESSAGES > ANSWERS

benchmarks/exports_outside.py starts it, in that program's own environment and in another folder.
PROGRAM is transformers, peft or llama.cpp. MESSAGES is a JSON list of conversations, ANSWERS one of
[text, tokens of the prompt]. Answers are greedy; the export says how a prompt is written and where
an answer ends.
"""

import json
import sys
from pathlib import Path
from typing import Any

Answered = list[tuple[str, int]]


def main(program: str, export: str, tokens: str) -> None:
    """Read the conversations, answer each, write the answers as the last line."""
    conversations = json.load(sys.stdin)
    answer = with_llama_cpp if program == "llama.cpp" else with_transformers
    found = answer(program, Path(export), conversations, int(tokens))
    print(json.dumps(found))


def with_transformers(kind: str, export: Path, conversations: list[Any], tokens: int) -> Answered:
    """Returns the answers of transformers, or of peft with the base model that the adapter names.

    peft takes its end tokens from the base model, so those that the adapter names are given.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if kind == "peft":
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(export, dtype="float32")
    else:
        model = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(export)
    ends = GenerationConfig.from_pretrained(export).eos_token_id
    found = []
    for messages in conversations:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        width = prompt["input_ids"].shape[1]
        ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=ends)
        found.append((tokenizer.decode(ids[0, width:], skip_special_tokens=True), width))
    return found


def with_llama_cpp(_: str, export: Path, conversations: list[Any], tokens: int) -> Answered:
    """Returns the answers of llama.cpp's own server, in this process by way of xllamacpp."""
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path = str(next(export.glob("*.gguf")))
    given.n_ctx, given.n_parallel, given.use_jinja = 2048, 1, True
    given.verbosity = 0
    server = xllamacpp.Server(given)
    found = []
    for messages in conversations:
        asked = {"messages": messages, "max_tokens": tokens, "temperature": 0}
        said = server.handle_chat_completions(asked)
        said = json.loads(said) if isinstance(said, str | bytes) else said
        text = said["choices"][0]["message"]["content"]
        found.append((text, said["usage"]["prompt_tokens"]))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
