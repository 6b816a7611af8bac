"""The rows that a run is judged on: its test split, or another data set."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sftlab.config.recipe import DataArguments
from sftlab.data.chat_template import encoder_of
from sftlab.data.column_names import HoldPairs
from sftlab.data.converter import turn_of
from sftlab.data.messages import Conversation, Message
from sftlab.data.splits import Splits, load_splits
from sftlab.data.template_errors import refusals_of
from sftlab.data.token_sequence import TokenSequence, labels_of
from sftlab.schema import BOOLEAN, COUNT, NUMBER, TEXT, Kind, check, list_of, one_of

# what reading the run's data again takes from run.json
_SHARE = Kind("a share above 0, up to 1", lambda value: NUMBER.holds(value) and 0 < value <= 1)
_SHARES = Kind(
    "three shares from 0 to 1",
    lambda value: (
        list_of(NUMBER).holds(value) and len(value) == 3 and all(0 <= one <= 1 for one in value)
    ),
)
_NEEDED = {
    "recipe.dataset_name": TEXT,
    "recipe.dataset_config": TEXT.or_null(),
    "recipe.dataset_train_split": TEXT,
    "recipe.dataset_streaming": BOOLEAN,
    "recipe.dataset_shape": TEXT.or_null(),
    "recipe.dataset_fraction": _SHARE,
    "recipe.split_fractions": _SHARES,
    "recipe.streaming_eval_rows": COUNT,
    "recipe.max_length": COUNT.or_null(),
    "data.train.fingerprint": TEXT,
    "data.test.fingerprint": TEXT,
}
# runs of earlier versions cut at the end
_OPTIONAL = {"recipe.truncation_mode": one_of("keep_start", "keep_end")}


class HeldOut(NamedTuple):
    """Held-out rows, converted, of one answer each, and their facts for the records.

    `unchecked` says what could not be checked, if anything.
    """

    rows: Dataset
    facts: dict[str, Any]
    unchecked: str | None


class ScoredRows(NamedTuple):
    """The rows that are scored, longest prompt first.

    Each has its number in the held-out set, its text (prompt, completion, reference, tools, and the
    number of its conversation), its token ids and its prompt's token ids.
    """

    numbers: list[int]
    rows: list[dict[str, Any]]
    encoded: list[dict[str, list[int]]]
    prompts: list[list[int]]
    left_out: dict[str, int]

    def batches(self, size: int) -> Iterator[slice]:
        """Returns slices of `size` rows."""
        return (slice(start, start + size) for start in range(0, len(self.numbers), size))


def held_out(
    run: dict[str, Any],
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    shape: str | None = None,
) -> HeldOut:
    """Returns the test split of the run's data, or all rows of `split` of another data set.

    The other one is read in a `shape`, None to recognise it. The run's data are read and split
    again. Raises ValueError where they have changed since, where there is no test split, and where
    a question was among the training or validation rows.
    """
    check(run, "run.json", _NEEDED, _OPTIONAL)
    recipe = run["recipe"]
    splits = _load(recipe)
    for name in ("test", "train"):
        then, now = run["data"][name]["fingerprint"], splits.facts[name]["fingerprint"]
        if then != now:
            raise ValueError(
                f"the {name} split of {recipe['dataset_name']} has changed since the run (it was "
                f"{then} and is {now}): train again, or bring the data back"
            )
    if dataset is None:
        rows, facts, origin = (
            splits.test,
            splits.facts["test"],
            f"{recipe['dataset_name']}, test split",
        )
        if len(rows) == 0:
            raise ValueError("the run's recipe has no test split (split_fractions)")
    else:
        # how the run's own data are read does not hold for another data set
        kept = ("loss_on", "dataset_text_from_numbers")
        other = _load_other(
            {name: recipe[name] for name in kept if name in recipe}
            | {"dataset_name": dataset, "dataset_config": config, "dataset_train_split": split}
            | {"split_fractions": [0.0, 0.0, 1.0], "dataset_shape": shape}
        )
        rows, facts, origin = other.test, other.facts["test"], dataset
    facts = {"dataset": origin, "fingerprint": facts["fingerprint"]}
    if recipe["dataset_streaming"]:
        unchecked = (
            "the run read a stream, so it was not checked that no row was trained on; the split by "
            "hash keeps them apart"
        )
        return HeldOut(rows, facts, unchecked)
    _refuse_overlap(rows, splits, origin)
    return HeldOut(rows, facts, None)


def questions_of(run: dict[str, Any]) -> frozenset[int]:
    """Returns the keys of the questions of the run's training and validation rows.

    The run's data are read again. Raises ValueError for a record that does not say how, and for a
    stream.
    """
    check(run, "run.json", _NEEDED, _OPTIONAL)
    if run["recipe"]["dataset_streaming"]:
        raise ValueError("a stream was trained on, whose questions are not known")
    splits = _load(run["recipe"])
    return frozenset(key for part in (splits.train, splits.validation) for key in part["opening"])


def select(
    dataset: HeldOut,
    samples: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    longest_prompt: int,
    truncation_mode: str = "keep_start",
) -> ScoredRows:
    """Choose the rows to score among the first `samples`.

    A row needs a response token within `max_length` and room for an answer behind its prompt. Rows
    are cut as the training cut them.
    Raises ValueError where there is none.
    """
    if longest_prompt < 1:
        raise ValueError("--max_new_tokens leaves the model no room for a prompt: give fewer")
    test = dataset.rows.select(range(min(samples or len(dataset.rows), len(dataset.rows))))
    encoder = encoder_of(tokenizer, shortcut=False)
    chosen, cut, no_room, no_response, documents = [], 0, 0, 0, 0
    for number, converted in enumerate(test):
        row = turn_of(converted)
        if not row["prompt"]:  # plain text asks nothing
            documents += 1
            continue
        with refusals_of(f"row {number} of {dataset.facts['dataset']}"):
            turn = Conversation.from_row(converted)
            ((whole,),) = encoder([turn])
            asked = encoder.render.text_of(turn)[0]
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        kept = whole.cut(max_length, truncation_mode)
        if not kept.spans:
            no_response += 1
        elif len(prompt) > longest_prompt:
            no_room += 1
        else:
            cut += len(kept.ids) < len(whole.ids)
            encoded = {"input_ids": kept.ids, "labels": labels_of(kept.ids, kept.spans)}
            row["reference"] = _reference(tokenizer, row["completion"][0], whole)
            chosen.append((number, row, encoded, prompt))
    if not chosen:
        raise ValueError(
            f"none of {len(test)} rows can be scored: {no_response} have no response token within "
            f"max_length {max_length}, {no_room} no room for an answer (a prompt may have "
            f"{longest_prompt} tokens)"
        )
    chosen.sort(key=lambda one: -len(one[3]))
    counts = {
        "rows_without_a_response_token": no_response,
        "rows_without_room": no_room,
        "references_cut": cut,
    } | ({"documents_without_a_question": documents} if documents else {})
    return ScoredRows(*map(list, zip(*chosen, strict=True)), counts)


def _reference(tokenizer: PreTrainedTokenizerBase, answer: Message, whole: TokenSequence) -> str:
    """Returns the text that a model should write: of calls and thoughts, what the template does."""
    if answer.keys() <= {"role", "content"}:
        return answer["content"].strip()
    (start, length) = whole.spans[:2]
    return tokenizer.decode(whole.ids[start : start + length], skip_special_tokens=True).strip()


def _load(fields: dict[str, Any]) -> Splits:
    # earlier versions trained on a row for each answer
    fields = {"loss_on": "completion"} | fields
    return load_splits(
        DataArguments(
            **{name: fields[name] for name in DataArguments.__dataclass_fields__ if name in fields}
        )
    )


def _load_other(fields: dict[str, Any]) -> Splits:
    try:
        return _load(fields)
    except HoldPairs as error:
        raise ValueError(
            f"{fields['dataset_name']} holds preference pairs: score a run of method dpo on them "
            "with eval/preferences.py --dataset_name, or give rows of one answer"
        ) from error


def _refuse_overlap(rows: Dataset, splits: Splits, origin: str) -> None:
    seen = {key for part in (splits.train, splits.validation) for key in part["opening"]}
    known = [index for index, key in enumerate(rows["opening"]) if key in seen]
    if known:
        raise ValueError(
            f"{len(known)} of {len(rows)} rows of {origin} ask what the run was trained or "
            f"validated on (the first is row {known[0]}): a score on them would mean nothing"
        )
