"""Tokenize a recipe's data set on a Dask cluster: this machine's cores, or jobs of Slurm.

python slurm/tokenize_dataset.py --config recipes/llama3.2-1b/attn_r16.yaml
    --out data/tokens/openorca [--workers 8] [--cluster slurm --partition cpu --time 02:00:00]
    [--any_field value]

The rows are rendered, masked, split and truncated as training would do it. They are written as
Arrow shards under --out, beside a manifest, and `sft.py --dataset_name data/tokens/openorca` trains
on them. The bytes do not depend on the number of workers. After an interruption the same command
keeps the finished shards. Under Slurm every node must see the data sets' cache (HF_HOME), --out and
this folder.
"""

import sftlab.startup.filter_warnings  # noqa: F401, I001  (before the libraries that it quiets)

import argparse
import ctypes
import fcntl
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.distributed import Client, KilledWorker, as_completed
from tqdm import tqdm

from sftlab.data.length_summary import summary
from sftlab.data.shard_folder import begin, finish, finished_records
from sftlab.data.shard_plan import plan_shards, refuse_bad_rows
from sftlab.data.shard_writer import tokenize_shard
from sftlab.data.tokenizing_cluster import (
    LOGS,
    add_cluster_options,
    check_cluster_options,
    cluster_of,
    how_to_see,
    refuse_silence,
)
from sftlab.exit_messages import mistakes_in_one_line

if TYPE_CHECKING:
    from dask.distributed import LocalCluster
    from dask_jobqueue import SLURMCluster

    from sftlab.config.recipe import Recipe

# Every local worker imports this file when it starts. Modules that import torch are therefore
# imported where they are used.


def main(argv: list[str]) -> None:
    """Check everything, tokenize, join the shards and print a summary."""
    with mistakes_in_one_line():
        arguments, fields = parse_arguments(argv)
        from sftlab.config.launch import Launch
        from sftlab.config.parser import parse_recipe

        recipe = parse_recipe(fields, Launch.from_environment())
        places, settings, backend, encoder = prepare(recipe, arguments)
        manifest = begin(arguments.out, settings, backend, encoder)
        del backend
        give_memory_back()
        with only_writer(arguments.out):
            records = tokenize(places, settings["rows"], arguments)
            lengths = finish(arguments.out, manifest, records)["train"]
    limit, micro_batch = settings["max_length"], recipe.training.per_device_train_batch_size
    plot_lengths(lengths, limit, arguments.out / "lengths.png")
    print(summary(manifest, lengths, limit, micro_batch, arguments.out))
    print(f"\nNext: sft.py with --dataset_name {arguments.out}")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line. Returns this script's options and the fields of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, help="the tokenized data set's folder")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes of one core each (default: this machine's cores)",
    )
    parser.add_argument(
        "--max_bad_rows",
        type=float,
        default=0.0,
        help="largest share of rows that are not text; they are left out (default: 0)",
    )
    parser.add_argument(
        "--rows_per_shard", type=int, default=4096, help="rows of the source; decides the bytes"
    )
    add_cluster_options(parser)
    arguments, fields = parser.parse_known_args(argv)
    if arguments.workers < 1 or arguments.rows_per_shard < 1:
        raise ValueError("--workers and --rows_per_shard must be at least 1")
    if not 0 <= arguments.max_bad_rows < 1:
        raise ValueError(
            f"--max_bad_rows is {arguments.max_bad_rows}: expected a share of the rows, from 0 to "
            "less than 1"
        )
    check_cluster_options(arguments)
    return arguments, fields


def prepare(
    recipe: "Recipe", arguments: argparse.Namespace
) -> tuple[list[bytes], dict[str, Any], str, dict[str, Any]]:
    """Load the tokenizer, check the first rows and cut the data set into shards.

    Returns what `plan_shards` returns.
    """
    from sftlab.data.chat_template import set_template
    from sftlab.models.loading import load_tokenizer

    model, training = recipe.model, recipe.training
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training)
    set_template(tokenizer, training.chat_template_path)
    return plan_shards(
        recipe.data, training, tokenizer, arguments.rows_per_shard, arguments.max_bad_rows
    )


def give_memory_back() -> None:
    """Return the memory that loading the tokenizer took. The allocator would keep it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises ValueError while another process tokenizes into it."""
    with (folder / "tokenizer.json").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is tokenizing into {folder}") from error
        yield


def tokenize(places: list[bytes], rows: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Have every missing shard made. Returns the records of all shards, in order."""
    records = finished_records(arguments.out, len(places))
    bad = [record for record in records.values() if record["bad"]]
    counted = {
        "bad": sum(record["bad"] for record in bad),
        "first_bad": bad[0]["first_bad"] if bad else None,
    }
    refuse_bad_rows(counted, rows, arguments.max_bad_rows)
    missing = [number for number in range(len(places)) if number not in records]
    if records:
        print(f"{len(records)} of {len(places)} shards are there already", flush=True)
    if missing:
        done = sum(record["source_rows"] for record in records.values())
        with (
            cluster_of(arguments, min(arguments.workers, len(missing))) as cluster,
            Client(cluster) as client,
            tqdm(
                total=rows,
                initial=done,
                unit="row",
                unit_scale=True,
                desc="tokenizing",
                smoothing=0.1,
            ) as bar,
        ):
            print(how_to_see(client.dashboard_link), flush=True)
            for record in made_by_workers(client, cluster, places, missing, arguments):
                records[record["number"]] = record
                bar.update(record["source_rows"])
                counted["bad"] += record["bad"]
                counted["first_bad"] = counted["first_bad"] or record["first_bad"]
                refuse_bad_rows(counted, rows, arguments.max_bad_rows)
    return [records[number] for number in range(len(places))]


def made_by_workers(
    client: Client,
    cluster: "LocalCluster | SLURMCluster",
    places: list[bytes],
    missing: list[int],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Submit the missing shards, and yield the record of each when it is finished.

    Raises ValueError where workers die over a shard, or none works any more.
    """
    out, size = str(arguments.out.resolve()), arguments.rows_per_shard
    tasks = [
        client.submit(
            tokenize_shard,
            out,
            number,
            places[number],
            number * size,
            key=f"shard-{number}",
            pure=False,
        )
        for number in missing
    ]
    waiting, looked = as_completed(tasks, with_results=True), []
    try:
        while waiting.count():
            if not waiting.has_ready():
                time.sleep(0.1)
                refuse_silence(looked, client, cluster, arguments.out / LOGS)
                continue
            for _, record in waiting.next_batch(block=False):
                yield record
    except KilledWorker as error:
        raise ValueError(
            f"{error.task} ended {error.allowed_failures + 1} workers: do they have too little "
            "memory?"
        ) from error


def plot_lengths(lengths: np.ndarray, limit: int | None, path: Path) -> None:
    """Draw a histogram of the training rows' tokens before truncation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(
        lengths, bins=100, range=(0, max(1, np.quantile(lengths, 0.999))) if len(lengths) else None
    )
    if limit:
        axes.axvline(limit, color="tab:red", label=f"max_length {limit}")
        axes.legend()
    axes.set(xlabel="tokens of a row, before truncation", ylabel="training rows")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    # an exit in Python ends the workers and their jobs
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main(sys.argv[1:])
