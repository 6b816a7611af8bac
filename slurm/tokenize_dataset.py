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
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
from dask.distributed import Client, KilledWorker, LocalCluster, as_completed
from dask_jobqueue import SLURMCluster
from distributed.security import Security
from tqdm import tqdm

from sftlab.cpu_cores import cpu_cores
from sftlab.data.length_summary import summary
from sftlab.data.shard_folder import begin, finish, finished_records
from sftlab.data.shard_plan import plan_shards, refuse_bad_rows
from sftlab.data.shard_writer import tokenize_shard
from sftlab.data.tokenizing_cluster import (
    DASHBOARD,
    add_cluster_options,
    certificate,
    check_cluster_options,
    how_to_see,
)
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.script_options import Options

if TYPE_CHECKING:
    from sftlab.config.recipe import Recipe

# Every local worker imports this file when it starts. Modules that import torch are therefore
# imported where they are used.
LOGS = "slurm-logs"
# seconds between two looks for a working worker, and without one before the script gives up
LOOK_S, SILENT_S = 5, 60
# one worker has one core
THREADS = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main(argv: list[str]) -> None:
    """Check everything, tokenize, join the shards and print a summary."""
    with mistakes_in_one_line():
        arguments, fields = parse_arguments(argv)
        from sftlab.config.launch import Launch
        from sftlab.config.parser import parse_recipe

        recipe = parse_recipe(fields, Launch.from_environment())
        places, settings, backend, encoder = prepare(recipe, arguments)
        said = [f"note: {one}" for one in recipe.notes]
        for line in [*said, *(f"warning: {one}" for one in settings["loss_warnings"])]:
            print(line, flush=True)
        manifest = begin(arguments.out, settings, backend, encoder)
        del backend
        give_memory_back()
        with only_writer(arguments.out):
            records = tokenize(places, settings["rows"], arguments)
            lengths = finish(arguments.out, manifest, records)["train"]
    limit, micro_batch = settings["max_length"], recipe.training.per_device_train_batch_size
    plot_lengths(lengths, limit, arguments.out / "lengths.png")
    print(summary(manifest, lengths, limit, micro_batch, arguments.out))
    print(f"\nNext: sft.py with --dataset_name {shlex.quote(str(arguments.out))}")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line. Returns this script's options and the fields of the recipe."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="the tokenized data set's folder")
    parser.add_argument(
        "--workers",
        type=int,
        default=cpu_cores(),
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
    from sftlab.models.loading import load_config, load_tokenizer

    model, training = recipe.model, recipe.training
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training)
    set_template(tokenizer, training.chat_template_path)
    config = load_config(
        model.model_name_or_path, model.model_revision, training, with_weights=False
    )
    sizes = arguments.rows_per_shard, arguments.max_bad_rows
    return plan_shards(recipe.data, training, tokenizer, *sizes, config)


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
    cluster: LocalCluster | SLURMCluster,
    places: list[bytes],
    missing: list[int],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Submit the missing shards, and yield the record of each when it is finished.

    Raises ValueError where workers die over a shard, or none works any more.
    """
    out = str(arguments.out.resolve())
    tasks = [
        client.submit(
            tokenize_shard,
            out,
            number,
            places[number],
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
            for task, record in waiting.next_batch(block=False):
                if task.status == "error":  # a batch holds what the worker raised
                    raise task.exception()
                yield record
    except KilledWorker as error:
        raise ValueError(
            f"{error.task} ended {error.allowed_failures + 1} workers: do they have too little "
            "memory?"
        ) from error


def refuse_silence(
    looked: list[tuple[float, bool]],
    client: Client,
    cluster: LocalCluster | SLURMCluster,
    logs: Path,
) -> None:
    """Raise ValueError where no worker has been there for a minute.

    `looked` keeps the time and the result of each look.
    """
    now = time.monotonic()
    if looked and now - looked[-1][0] < LOOK_S:
        return
    looked.append((now, nobody_works(client, cluster)))
    while len(looked) > 1 and looked[1][0] <= now - SILENT_S:
        looked.pop(0)
    if looked[0][0] <= now - SILENT_S and all(nobody for _, nobody in looked):
        raise ValueError(f"the workers' jobs have ended and none of them reported: see {logs}")


def nobody_works(client: Client, cluster: LocalCluster | SLURMCluster) -> bool:
    """Whether no worker is there and Slurm has no job of theirs.

    Dask does not replace a job that ends before its worker reports.
    """
    if isinstance(cluster, LocalCluster) or client.scheduler_info()["workers"]:
        return False
    jobs = {job.job_id for job in cluster.workers.values()}
    listed = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True)
    return listed.returncode == 0 and not jobs & set(listed.stdout.split())


@contextmanager
def cluster_of(
    arguments: argparse.Namespace, workers: int
) -> Iterator[LocalCluster | SLURMCluster]:
    """Start workers of one core each. Under Slurm each is a job, and a lost one is replaced."""
    if arguments.cluster == "slurm":
        with slurm_cluster(arguments, workers) as cluster:
            yield cluster
        return
    with (
        certificate() as keys,
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            env=THREADS,
            security=Security(**keys),
            dashboard_address=DASHBOARD,
        ) as cluster,
    ):
        yield cluster


@contextmanager
def slurm_cluster(arguments: argparse.Namespace, workers: int) -> Iterator[SLURMCluster]:
    """Start one job a worker."""
    # Dask would wait 15 s for a lost worker before it asks for another job
    dask.config.set({"distributed.deploy.lost-worker-timeout": "5s"})
    logs = arguments.out / LOGS
    logs.mkdir(exist_ok=True)
    with (
        certificate(logs.resolve()) as keys,
        SLURMCluster(
            queue=arguments.partition,
            account=arguments.account,
            walltime=arguments.time,
            memory=arguments.memory,
            cores=1,
            processes=1,
            interface=arguments.interface,
            job_name="tokenize-worker",
            log_directory=str(logs),
            job_script_prologue=[f"export {name}={value}" for name, value in THREADS.items()],
            security=Security(**keys),
            scheduler_options={"dashboard_address": DASHBOARD},
            worker_extra_args=["--dashboard-address", DASHBOARD],
        ) as cluster,
    ):
        script = logs / "job.sh"
        script.write_text(cluster.job_script())
        checked = subprocess.run(
            ["sbatch", "--test-only", str(script)], capture_output=True, text=True
        )
        if checked.returncode:
            raise ValueError(f"Slurm refuses the workers' job: {' '.join(checked.stderr.split())}")
        # scale(n) would not replace a lost worker's job
        cluster.adapt(minimum_jobs=workers, maximum_jobs=workers)
        yield cluster
    shutil.rmtree(logs)


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
    with mistakes_in_one_line():
        main(sys.argv[1:])
