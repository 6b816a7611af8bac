"""Runs without training, canned answers and scripted judges for the tests of eval/alpaca.py and
eval/mt_bench.py.
"""

import json
import math
import re
from pathlib import Path

from conftest import ROOT, byte_tokenizer
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.chat_template import set_template, template_hash
from sftlab.evaluation.generation import Answer
from sftlab.judging.model_answers import Contestants


def untrained_run(base: Path, folder: Path) -> Path:
    """The directory of a succeeded run whose adapter is random."""
    tokenizer = byte_tokenizer()
    set_template(tokenizer)
    lora = LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    flags = ["--config", str(ROOT / "recipes/demo/attn_r16.yaml"), f"--model_name_or_path={base}"]
    recipe = parse_recipe(flags, Launch("fp32", "single", 1, 1, True, {})).facts()
    run = {
        "status": "succeeded",
        "reason": None,
        "recipe": recipe,
        "launch": {"precision": "fp32", "strategy": "single", "world_size": 1},
        "template": {"hash": template_hash(tokenizer)},
    }
    (folder / "run.json").write_text(json.dumps(run, default=str))
    return folder


def answer(text: str) -> Answer:
    return Answer(text, len(text.split()), "stop", False)


def canned(
    monkeypatch, base: dict[str, str], tuned: dict[str, str], start: dict[str, str] | None = None
) -> None:
    """The models answer a conversation by its last message; two draws of base are the same."""

    def answers(self, side, conversations, sampling, title):
        said = {"base": base, "start": start, "tuned": tuned}[side]
        return [answer(said[conversation[-1]["content"]]) for conversation in conversations]

    def draws(self, conversations, sampling, title):
        return [self.answers("base", conversations, sampling, title)] * 2

    monkeypatch.setattr(Contestants, "answers", answers)
    monkeypatch.setattr(Contestants, "draws", draws)


class ScriptedJudge:
    """Says what `rule` says:

    of a pair given its instruction and both answers, of one answer its prompt.
    """

    facts = {"judge": "scripted"}
    room = None

    def __init__(self, rule, fails_after: int | None = None):
        self.rule, self.fails_after, self.asked = rule, fails_after, []

    def size(self, messages):
        return sum(len(message["content"]) for message in messages)

    def answers(self, prompts, seed=0):
        if self.fails_after is not None and len(self.asked) + len(prompts) > self.fails_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return [answer(self.rule(*shown(messages[-1]["content"]))) for messages in prompts]


def prompt(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


PROMETHEUS = re.compile(
    r"###Instruction:\n(.*?)\n\n###Response A:\n(.*?)\n\n###Response B:\n(.*?)\n\n###Score Rubric:",
    re.DOTALL,
)
FASTCHAT = re.compile(
    r"\[User Question\]\n(.*?)\n\n"
    r"\[The Start of Assistant A's Answer\]\n(.*?)\n\[The End of Assistant A's Answer\]\n\n"
    r"\[The Start of Assistant B's Answer\]\n(.*?)\n\[The End of Assistant B's Answer\]",
    re.DOTALL,
)


def shown(prompt: str) -> tuple[str, ...]:
    """Instruction and both answers of a pair's prompt, or the whole prompt."""
    match = PROMETHEUS.search(prompt) or FASTCHAT.search(prompt)
    return match.groups() if match else (prompt,)


def entry(run: Path, name: str = "alpaca") -> dict:
    """The newest entry of a report."""
    return json.loads((run / "eval" / f"{name}.json").read_text())["entries"][-1]


def lines(run: Path, pattern: str) -> list[dict]:
    """The records of a file of the evaluation."""
    (path,) = (run / "eval").glob(pattern)
    return [json.loads(line) for line in path.read_text().splitlines()]


def longer_output(prompts, **_):
    """OpenAI's completions of alpaca-eval's weighted prompt:

    the longer output is preferred, by 9 to 1.
    """
    shown = [prompt.split('"output": """')[1:] for prompt in prompts]
    chosen = ["mM"[len(a.split('"""')[0]) < len(b.split('"""')[0])] for a, b in shown]
    found = []
    for letter in chosen:
        top = [
            {"token": token, "logprob": math.log(0.9 if token == letter else 0.1)} for token in "mM"
        ]
        found.append({"logprobs": {"content": [{"top_logprobs": top}]}})
    return {"completions": chosen, "completions_all": found}


def no_hub(*_, **__):
    """What a download is without a network and a cache."""
    raise LocalEntryNotFoundError("not in the cache")
