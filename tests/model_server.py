"""A stand-in for vLLM: base and tuned of a run behind an OpenAI-compatible server on a thread.

It answers with transformers, so that what a client makes of it can be compared exactly.
"""

from pathlib import Path

import torch
from local_server import LocalServer
from transformers import GenerationConfig

from sftlab.data.chat_template import pad_id, prompt_ids
from sftlab.evaluation.base_and_tuned import answering, finished_run, load_pair, run_tokenizer
from sftlab.evaluation.generation import turn_of


class ModelServer(LocalServer):
    """Serves a run as `base` and `tuned`. What differs from the run is set on it before a request.

    `tuned_is` is the side that answers as tuned, `ends` end its answers, `template` renders
    messages. `fault(path, number)` is (status, body) or None: what is answered instead. A body that
    is text is sent as it is.
    """

    def __init__(self, run: Path):
        facts = finished_run(run)
        self.model, self.tokenizer = load_pair(run, facts), run_tokenizer(run, facts)
        self.ends = turn_of(self.model, self.tokenizer).end_tokens
        self.tuned_is, self.fault, self.requests = "tuned", lambda path, number: None, []
        super().__init__([{"id": name, "max_model_len": 512} for name in ("base", "tuned")])

    def answer(self, path, asked):
        with self.lock:
            self.requests.append((path, asked))
            fault = self.fault(path, len(self.requests))
            return fault or (200, self.answered(path, asked))

    def answered(self, path, asked):
        if path == "/tokenize":
            return {"tokens": prompt_ids(self.tokenizer, asked["messages"])}
        side = self.tuned_is if asked["model"] == "tuned" else "base"
        chat = path.endswith("/chat/completions")
        ids = prompt_ids(self.tokenizer, asked["messages"]) if chat else asked["prompt"]
        own = [] if asked.get("ignore_eos") else self.ends
        ends = [*own, *asked.get("stop_token_ids", [])]
        with torch.no_grad(), answering(self.model, side):
            new = self.generated(ids, ends, asked["max_tokens"], asked.get("logit_bias"))
            ended = bool(new) and new[-1] in ends
            text = self.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
            cuts = [text.find(stop) for stop in asked.get("stop") or [] if stop in text]
            text, ended = text[: min(cuts, default=None)], ended or bool(cuts)
            choice = {"index": 0, "finish_reason": "stop" if ended else "length", "text": text}
            if asked.get("echo"):
                choice["logprobs"] = self.log_probs(ids)
        choice["message"] = {"role": "assistant", "content": text}
        return {"choices": [choice], "usage": {"completion_tokens": len(new)}}

    def generated(self, ids, ends, most, biased):
        if biased:  # by so much that the token is certain
            (token,) = map(int, biased)
            return [token] * (1 if token in ends else most)
        config = GenerationConfig(
            max_new_tokens=most, eos_token_id=ends, pad_token_id=pad_id(self.tokenizer)
        )
        given = torch.tensor([ids])
        made = self.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), generation_config=config
        )
        return made[0, len(ids) :].tolist()

    def log_probs(self, ids):
        given = torch.tensor([ids])
        logits = self.model(input_ids=given).logits.log_softmax(-1)[0, :-1]
        each = logits.gather(-1, given[0, 1:, None])[:, 0].tolist()
        best = logits.max(dim=-1).values.tolist()
        top = [{"own": one, "likeliest": most} for one, most in zip(each, best, strict=True)]
        return {"token_logprobs": [None, *each, -1.0], "top_logprobs": [None, *top, {"x": -1.0}]}
