"""A tokenized data set is opened for training and evaluation, if it has the recipe's rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from sftlab.data.shard_order import flat, ordered_rows
from sftlab.data.tokenized_dataset import SCHEMAS, SPLITS, difference, file_name, read_manifest

if TYPE_CHECKING:
    from sftlab.config.recipe import DataArguments

# settings of the recipe that decide which rows there are: these must be the tokens' own
ALWAYS = ("dataset_config", "dataset_train_split", "dataset_fraction", "split_fractions", "loss_on")
# and these too, where the recipe sets them
WHERE_SET = (
    *("dataset_shape", "columns", "dataset_text_from_numbers", "validation_file", "test_file"),
    *("dataset_validation_split", "dataset_test_split"),
)


def open_tokens(
    args: "DataArguments",
) -> tuple[Dataset, Dataset, Dataset, dict[str, Any], dict[str, Any]]:
    """Open train, validation and test, memory-mapped from their shards.

    Returns them with the facts of their text and the manifest. Raises ValueError for an unfinished
    or damaged data set, and for other rows or splits than `args` says.
    """
    folder = Path(str(args.dataset_name))
    manifest = read_manifest(folder) | {"folder": str(folder)}
    wanted = {name: getattr(args, name) for name in ALWAYS}
    wanted |= {name: value for name in WHERE_SET if (value := getattr(args, name))}
    if args.dataset_streaming:
        raise ValueError(f"{folder} is tokenized: leave dataset_streaming out of the recipe")
    if manifest["facts"] is None:
        raise ValueError(
            f"{folder} is not finished: start slurm/tokenize_dataset.py again with the same options"
        )
    if found := difference(manifest["settings"], wanted):
        raise ValueError(
            f"{folder} was made with {found}: tokenize again into another folder, or train on "
            f"{manifest['settings']['dataset_name']} itself"
        )
    for shard in manifest["shards"]:
        for name, file in shard["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise ValueError(
                    f"{path} is missing or damaged: start slurm/tokenize_dataset.py again with the "
                    "same options"
                )
    parts = [_open_split(folder, manifest, name) for name in SPLITS]
    if len(manifest["settings"]["sources"]) > 1:
        parts = _in_order(parts, folder, manifest)
    return *parts, manifest["facts"], manifest


def _open_split(folder: Path, manifest: Mapping[str, Any], split: str) -> Dataset:
    """Returns the rows of a split's files: all that are kept, then the dropped ones."""
    kept, dropped = [], []
    for shard in manifest["shards"]:
        name = file_name(split, shard["number"])
        if name in shard["files"]:
            rows, whole = shard["files"][name], Dataset.from_file(str(folder / name))
            for parts, part in (
                (kept, range(rows["kept"])),
                (dropped, range(rows["kept"], rows["rows"])),
            ):
                parts += [whole.select(part)] if part else []
    parts = kept + dropped
    return (
        concatenate_datasets(parts)
        if parts
        else Dataset.from_dict({n: [] for n in SCHEMAS[split].names})
    )


def _in_order(parts: list[Dataset], folder: Path, manifest: Mapping[str, Any]) -> list[Dataset]:
    """Returns the rows of several sources in the order of the text, the kept ones first."""
    tables = ordered_rows(folder, manifest["settings"], manifest["shards"]).tables
    found = []
    for name, part in zip(SPLITS, parts, strict=True):
        places = tables[name]["row"].to_numpy()
        if name != "test":
            places, kept = (flat(tables[name], column) for column in ("place", "loss_kept"))
            places = places[np.argsort(kept == 0, kind="stable")]
        found.append(part.select(places))
    return found
