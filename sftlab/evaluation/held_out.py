"""The rows that a run is judged on:

its test split, or another data set, none of them trained on.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sftlab.config.recipe import DataArguments
from sftlab.data.chat_template import encode, prompt_ids
from sftlab.data.splits import Splits, load_splits, opening_key


class HeldOut(NamedTuple):
    """Rows (columns prompt and completion), what they are for the records, and what could not be
    checked.
    """

    rows: Dataset
    facts: dict[str, Any]
    unchecked: str | None


class ScoredRows(NamedTuple):
    """The rows that are scored, longest prompt first:

    number in the held-out set, row, token ids, prompt's ids.
    """

    numbers: list[int]
    rows: list[dict[str, Any]]
    encoded: list[dict[str, list[int]]]
    prompts: list[list[int]]
    left_out: dict[str, int]

    def batches(self, size: int) -> Iterator[slice]:
        """Slices of `size` rows."""
        return (slice(start, start + size) for start in range(0, len(self.numbers), size))


def held_out(
    run: dict[str, Any], dataset: str | None = None, config: str | None = None, split: str = "train"
) -> HeldOut:
    """The test split of the run's own data, made again, or all rows of `split` of another data set.

    Raises ValueError where the run's data have changed since, where there is no test split, and
    where a question of the rows is among those that the run was trained or validated on.
    """
    recipe = run["recipe"]
    splits = _load(recipe)
    for name in ("test", "train"):
        then, now = run["data"][name]["fingerprint"], splits.facts[name]["fingerprint"]
        if then != now:
            raise ValueError(
                f"the {name} split of {recipe['dataset_name']} has changed since the run ({then}, "
                f"now {now})"
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
        changes = {"dataset_name": dataset, "dataset_config": config, "dataset_train_split": split}
        whole = {
            "split_fractions": [0.0, 0.0, 1.0],
            "dataset_fraction": 1.0,
            "dataset_streaming": False,
        }
        other = _load(recipe | changes | whole | {"dataset_shape": None})
        rows, facts, origin = other.test, other.facts["test"], dataset
    facts = {"dataset": origin, "fingerprint": facts["fingerprint"]}
    if recipe["dataset_streaming"]:
        unchecked = (
            "the run read a stream: that no row was trained on rests on the split by hash alone"
        )
        return HeldOut(rows, facts, unchecked)
    _refuse_overlap(rows, splits, origin)
    return HeldOut(rows, facts, None)


def select(
    dataset: HeldOut,
    samples: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    longest_prompt: int,
) -> ScoredRows:
    """Of the first `samples` rows those with a response token within `max_length` and room left for
    an answer.
    """
    test = dataset.rows.select(range(min(samples or len(dataset.rows), len(dataset.rows))))
    chosen, cut, no_room, no_response = [], 0, 0, 0
    for number, row in enumerate(test):
        encoded, prompt = encode(tokenizer, row, None), prompt_ids(tokenizer, row["prompt"])
        kept = {key: ids[:max_length] for key, ids in encoded.items()}
        if all(label == -100 for label in kept["labels"]):
            no_response += 1
        elif len(prompt) > longest_prompt:
            no_room += 1
        else:
            cut += len(kept["labels"]) < len(encoded["labels"])
            chosen.append((number, row, kept, prompt))
    if not chosen:
        raise ValueError(
            f"none of {len(test)} rows can be scored: {no_response} have no response token within "
            "max_length "
            f"{max_length}, {no_room} no room for an answer (a prompt may have {longest_prompt} "
            "tokens)"
        )
    chosen.sort(key=lambda one: -len(one[3]))
    counts = {
        "rows_without_a_response_token": no_response,
        "rows_without_room": no_room,
        "references_cut": cut,
    }
    return ScoredRows(*map(list, zip(*chosen, strict=True)), counts)


def _load(fields: dict[str, Any]) -> Splits:
    return load_splits(
        DataArguments(**{name: fields[name] for name in DataArguments.__dataclass_fields__})
    )


def _refuse_overlap(rows: Dataset, splits: Splits, origin: str) -> None:
    seen = {key for part in (splits.train, splits.validation) for key in _opening_keys(part)}
    known = [index for index, prompt in enumerate(rows["prompt"]) if opening_key(prompt) in seen]
    if known:
        raise ValueError(
            f"{len(known)} of {len(rows)} rows of {origin} ask what the run was trained or "
            "validated on (the first is "
            f"row {known[0]}): a score on them would say nothing"
        )


def _opening_keys(rows: Dataset) -> Iterable[int]:
    # rows that were tokenized beforehand have it beside them
    return rows["opening"] if "opening" in rows.column_names else map(opening_key, rows["prompt"])
