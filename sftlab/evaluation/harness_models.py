"""lm-eval's model of transformers, dealt over processes, or with a server that answers for it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from peft import PeftModel
from sqlitedict import SqliteDict
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftlab.data.chat_template import TurnEnd
from sftlab.evaluation.generation import Sampling
from sftlab.evaluation.harness_tasks import SEED, LoadedTasks
from sftlab.evaluation.processes import Processes
from sftlab.evaluation.served_answers import (
    Asking,
    ServedModels,
    asked_together,
    prompt_logprobs,
)
from sftlab.models.inner_model import inner_model

Request, Response = TypeVar("Request"), TypeVar("Response")
# a request for a log-likelihood: its texts, and the token ids of context and continuation
Scored = tuple[tuple[str, str], list[int], list[int]]
GENERATED = "generate_until"
SERVER, TRANSFORMERS = "server", "transformers"
# what lm-eval may ask of a generation and a server is told
_ASKED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


class DealtModel(HFLM):
    """lm-eval's model of transformers. Its batches are dealt over `processes`, and each is whole.

    A batch is the one that lm-eval makes for one process, so the results are the same to the last
    bit. Every process returns all of them.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        processes: Processes,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.processes = processes

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the greedy one."""
        score = super()._loglikelihood_tokens
        if self.processes.count == 1:
            return score(requests, disable_tqdm, override_bs)
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # scored by one pass
        for place, (_, context, continuation) in enumerate(requests):
            one_token = tuple(context + continuation[:-1])
            alike[one_token if self.logits_cache else (place,)].append(place)
        firsts = [max(places, key=lambda at: len(requests[at][2])) for places in alike.values()]
        together = dict(zip(firsts, alike.values(), strict=True))
        tokens = {at: requests[at][1] + requests[at][2] for at in firsts}
        order = Collator(firsts, sort_fn=lambda at: (-len(tokens[at]), tuple(tokens[at])))
        batches = [
            [place for at in batch for place in together[at]]
            for batch in order.get_batched(n=self.batch_size)
        ]
        return self._dealt(requests, batches, lambda part: score(part, disable_tqdm=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns a generated text for each request."""
        generate = super().generate_until
        if self.processes.count == 1:
            return generate(requests, disable_tqdm)
        contexts = [request.args[0] for request in requests]
        order = Collator(
            list(range(len(requests))),
            sort_fn=lambda at: (-len(self.tok_encode(contexts[at])), contexts[at]),
            group_by="gen_kwargs",
            group_fn=lambda at: requests[at].args[1],
        )
        batches = list(order.get_batched(n=self.batch_size))
        return self._dealt(requests, batches, lambda part: generate(part, disable_tqdm=True))

    def _dealt(
        self,
        requests: Sequence[Request],
        batches: Sequence[list[int]],
        answer: Callable[[list[Request]], list[Response]],
    ) -> list[Response]:
        """Returns the responses to all requests; each process answers its own batches."""
        own: dict[int, list[Response]] = {}
        quiet = not self.processes.is_main
        with tqdm(total=len(batches), desc="batches", disable=quiet) as bar:
            for number in self.processes.dealt(len(batches)):
                own[number] = answer([requests[place] for place in batches[number]])
                bar.update(self.processes.count)
        found = zip(batches, self.processes.merged(own), strict=True)
        by_place = {
            place: response
            for places, responses in found
            for place, response in zip(places, responses, strict=True)
        }
        return [by_place[place] for place in range(len(requests))]


class ServedModel(DealtModel):
    """lm-eval's model of transformers, whose texts come from a server, asked for by token ids.

    With `likelihoods` the server gives log-likelihoods too. `side` says which model is asked. What
    ends a text here ends it there: lm-eval's stops, and the end tokens of tokenizer and model.
    """

    side = "base"

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        served: ServedModels,
        likelihoods: bool,
    ) -> None:
        super().__init__(model, tokenizer, batch_size, Processes())
        self.served, self.likelihoods = served, likelihoods
        own = inner_model(model).generation_config.eos_token_id
        ends = own if isinstance(own, list) else [own]
        self.ends = sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the server's text for each request."""
        asked = [self._generation(request) for request in requests]
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)

        def ask(place: int) -> str:
            ids, sampling, stops = asked[place]
            name, turn = self.served.names[self.side], TurnEnd(self.ends, stops)
            asking = Asking(self.served.client, name, self.tokenizer, sampling, turn)
            text = asking.completion(ids, place)["choices"][0]["text"]
            return postprocess_generated_text(text, [*stops, eos], None)

        return self._together(GENERATED, [request.args for request in requests], ask)

    def _generation(self, request: Instance) -> tuple[list[int], Sampling, list[str]]:
        """Returns the token ids of a request's prompt, the sampling, and what ends the text."""
        context, kwargs = request.args
        how = normalize_gen_kwargs(kwargs, self.max_gen_toks)
        if unknown := sorted(how.keys() - _ASKED):
            raise ValueError(
                f"{request.task_name} generates with {unknown[0]}, which is not asked of a server: "
                "leave out --server"
            )
        most = how["max_gen_toks"]
        ids, _ = self.tok_batch_encode(
            [context], left_truncate_len=self.max_length - most, truncation=self.truncation
        )
        temperature = how["temperature"] if how.get("do_sample") else 0.0
        sampling = Sampling(most, temperature, how.get("top_p", 1.0), SEED)
        return ids[0].tolist(), sampling, handle_stop_sequences(how["until"], None)

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the greedy one."""
        if not self.likelihoods:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        name = self.served.names[self.side]

        def ask(place: int) -> tuple[float, bool]:
            _, context, continuation = requests[place]
            ids = (context + continuation)[1 - self.max_length :]  # a server adds a token
            found = prompt_logprobs(self.served.client, name, ids)
            new = slice(len(ids) - len(continuation), None)
            if found.top is None or not all(found.top[new]):
                raise ValueError(
                    f"the server at {self.served.client.url} does not tell the likeliest token "
                    "(top_logprobs): leave out --server_likelihoods"
                )
            pairs = zip(found.each[new], found.top[new], strict=True)
            greedy = all(one >= max(top.values()) for one, top in pairs)
            return sum(found.each[new]), greedy

        return self._together("loglikelihood", [texts for texts, *_ in requests], ask)

    def _together(
        self, kind: str, keys: Sequence[Any], ask: Callable[[int], Response]
    ) -> list[Response]:
        """Returns what `ask` finds for each request, kept under its key as it comes."""
        found: dict[int, Response] = {}
        with tqdm(total=len(keys), desc=f"{kind}, {self.side}, by the server") as bar:

            def keep(place: int, response: Response) -> None:
                self.cache_hook.add_partial(kind, keys[place], response)
                found[place] = response
                bar.update()

            asked_together(self.served, range(len(keys)), ask, keep)
        return [found[place] for place in range(len(keys))]


def answered_by(loaded: LoadedTasks, served: bool, likelihoods: bool) -> str:
    """Returns who answers a unit's tasks: transformers, the server, or both."""
    kinds = {task.get_config("output_type") == GENERATED for task in loaded["tasks"].values()}
    who = {SERVER if served and (texts or likelihoods) else TRANSFORMERS for texts in kinds}
    return " and ".join(sorted(who))


def joined_cache(path: Path, processes: Processes) -> Path:
    """Returns this process's file of kept answers, which has those that any process kept.

    Every process keeps its own in a file of its own, from an interrupted evaluation on.
    """
    own = path.with_name(f"{path.stem}.{processes.rank}{path.suffix}")
    if processes.is_main:
        _join(sorted(path.parent.glob(f"{path.stem}.*{path.suffix}")), own)
    processes.wait()
    if not processes.is_main:
        _join([path.with_name(f"{path.stem}.0{path.suffix}")], own)
    processes.wait()
    return own


def _join(files: Sequence[Path], into: Path) -> None:
    with SqliteDict(str(into), outer_stack=False) as kept:
        for file in files:
            if file != into:
                with SqliteDict(str(file), outer_stack=False) as other:
                    kept.update(other)
        kept.commit()
