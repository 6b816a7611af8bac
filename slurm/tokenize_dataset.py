"""Tokenize a recipe's data set on a Dask cluster, on this machine's cores or in jobs of Slurm.

python slurm/tokenize_dataset.py --config recipes/llama3.2-1b/attn_r16.yaml --out data/tokens/openorca \
    [--workers 8] [--cluster slurm --partition cpu --time 02:00:00] [--any_field value]

What training would make of the rows (template, mask, splits, truncation) goes to Arrow shards under
--out, beside a manifest, and `sft.py --dataset_name data/tokens/openorca` trains on them. The bytes
do not depend on the workers. Start the same command again after an interruption: whole shards are
kept. Under Slurm the data sets' cache (HF_HOME), --out and this folder must be where every node
sees them.
"""

import sftlab.startup.filter_warnings  # noqa: F401, I001  (before the libraries that it quiets)

import argparse
import ctypes
import fcntl
import gc
import hashlib
import os
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
from datasets import Dataset
from tqdm import tqdm

from sftlab.data.splits import Converter
from sftlab.data.sources import read_source
from sftlab.data.batch_encoder import Encoder
from sftlab.data.shard_writer import (
    begin,
    convert_counting,
    finish,
    finished_records,
    place_of,
    tokenize_shard,
)
from sftlab.tables import aligned
from sftlab.data.tokenized_dataset import backend_text, encoding_settings

if TYPE_CHECKING:
    from sftlab.config.recipe import Recipe

# Every local worker imports this file when it starts: what would bring torch along is imported
# where it is used.
PROBED_ROWS = 256
LOGS = "slurm-logs"
# How often it is looked whether anybody works, and how long nobody may.
LOOK_S, SILENT_S = 5, 60
# One worker is one core.
THREADS = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main(argv: list[str]) -> None:
    """Check everything, then tokenize, put together and say what came of it."""
    try:
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
            lengths = finish(arguments.out, manifest, records)
    except ValueError as error:
        sys.exit(f"error: {error}")
    plot_lengths(lengths["train"], settings["max_length"], arguments.out / "lengths.png")
    print_summary(manifest, lengths["train"], recipe, arguments.out)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to the recipe."""
    site = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, help="the tokenized data set's folder")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes of one core each",
    )
    parser.add_argument(
        "--max_bad_rows",
        type=float,
        default=0.0,
        help="share of rows that may be no text (left out)",
    )
    parser.add_argument(
        "--rows_per_shard", type=int, default=4096, help="rows of the source; decides the bytes"
    )
    parser.add_argument("--partition", help="of the workers' jobs (else SBATCH_PARTITION)")
    parser.add_argument("--account", help="of the workers' jobs (else SBATCH_ACCOUNT)")
    parser.add_argument(
        "--time", default=site("SFTLAB_TIME", "01:00:00"), help="a job's limit (SFTLAB_TIME)"
    )
    parser.add_argument(
        "--memory", default=site("SFTLAB_MEMORY", "2GB"), help="a job's memory (SFTLAB_MEMORY)"
    )
    parser.add_argument(
        "--interface",
        default=site("SFTLAB_INTERFACE"),
        help="network that the nodes share (ib0, ...)",
    )
    arguments, fields = parser.parse_known_args(argv)
    if arguments.workers < 1 or arguments.rows_per_shard < 1:
        raise ValueError("--workers and --rows_per_shard must be at least 1")
    if not 0 <= arguments.max_bad_rows < 1:
        raise ValueError(
            f"--max_bad_rows is {arguments.max_bad_rows}: a share of the rows, 0 or more and less "
            "than 1"
        )
    if arguments.cluster == "slurm" and not shutil.which("sbatch"):
        raise ValueError(
            "--cluster slurm needs Slurm's sbatch, which is not here: leave --cluster out to use "
            "this host"
        )
    return arguments, fields


def prepare(
    recipe: "Recipe", arguments: argparse.Namespace
) -> tuple[list[bytes], dict[str, Any], str, dict[str, Any]]:
    """Where each shard's rows are; what decides the tokens; the tokenizer's backend.

    Its template and special tokens.

    The first rows are converted and encoded here, so that a mistake is found before any worker
    starts.
    """
    from sftlab.data.chat_template import set_template
    from sftlab.models.loading import load_tokenizer

    data, model = recipe.data, recipe.model
    if data.dataset_streaming:
        raise ValueError(
            "a stream cannot be cut into shards: leave dataset_streaming out of the recipe"
        )
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, recipe.training)
    set_template(tokenizer, recipe.training.chat_template_path)
    settings = encoding_settings(tokenizer, recipe.training)
    rows, shape = read_source(data)
    if not rows.cache_files:
        raise ValueError(
            f"{data.dataset_name} was read into memory: unset HF_DATASETS_IN_MEMORY_MAX_SIZE"
        )
    same = (
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_fraction",
        "split_fractions",
    )
    settings |= {name: getattr(data, name) for name in same}
    settings |= {
        "dataset_shape": shape,
        "rows": len(rows),
        "rows_per_shard": arguments.rows_per_shard,
    }
    settings["source"] = source_hash(data.dataset_name, rows)
    convert = Converter(shape, tuple(data.split_fractions), data.dataset_name)
    probe = {"bad": 0, "first_bad": None}
    first = convert_counting(convert, rows[:PROBED_ROWS], 0, probe)
    refuse_bad_rows(probe, len(rows), arguments.max_bad_rows)
    encoder = {
        "template": tokenizer.get_chat_template(),
        "special_tokens": tokenizer.special_tokens_map,
    }
    texts = first["prompt"], first["completion"]
    joined, plain = (
        list(Encoder(tokenizer.backend_tokenizer, **encoder, shortcut=shortcut)(*texts))
        for shortcut in (True, False)
    )
    assert joined == plain, "the encoder's shortcut does not hold for this tokenizer"
    size = arguments.rows_per_shard
    places = [
        place_of(rows, start, min(start + size, len(rows))) for start in range(0, len(rows), size)
    ]
    return places, settings, backend_text(tokenizer), encoder


def give_memory_back() -> None:
    """What loading the tokenizer took:

    the client needs it no more, and the allocator would keep it.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def source_hash(name: str, rows: Dataset) -> str:
    """SHA-256 of a local file; of a hub data set what `datasets` knows it by."""
    if not Path(name).is_file():
        return rows._fingerprint
    with Path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def refuse_bad_rows(counted: dict[str, Any], rows: int, share: float) -> None:
    """Raise ValueError where more rows than allowed are no text."""
    if counted["bad"] > share * rows:
        raise ValueError(
            f"{counted['first_bad']} ({counted['bad']} such rows so far, --max_bad_rows allows "
            f"{int(share * rows)} of "
            f"{rows})"
        )


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """ValueError while another process tokenizes into the folder."""
    with (folder / "tokenizer.json").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is tokenizing into {folder}") from error
        yield


def tokenize(places: list[bytes], rows: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Have every shard made that is not there yet; the records of all, in their order."""
    records = finished_records(arguments.out, len(places))
    counted = {"bad": sum(record["bad"] for record in records.values())}
    counted["first_bad"] = next(
        (record["first_bad"] for record in records.values() if record["bad"]), None
    )
    refuse_bad_rows(counted, rows, arguments.max_bad_rows)
    missing = [number for number in range(len(places)) if number not in records]
    done = sum(record["source_rows"] for record in records.values())
    if records:
        print(f"{len(records)} of {len(places)} shards are there already", flush=True)
    if not missing:
        return [records[number] for number in range(len(places))]
    workers = min(arguments.workers, len(missing))
    with (
        cluster_of(arguments, workers) as cluster,
        Client(cluster) as client,
        tqdm(
            total=rows, initial=done, unit="row", unit_scale=True, desc="tokenizing", smoothing=0.1
        ) as bar,
    ):
        print(f"dashboard: {client.dashboard_link}", flush=True)
        tasks = []
        for number in missing:
            shard = (
                str(arguments.out.resolve()),
                number,
                places[number],
                number * arguments.rows_per_shard,
            )
            tasks.append(client.submit(tokenize_shard, *shard, key=f"shard-{number}", pure=False))
        try:
            waiting, looked = as_completed(tasks, with_results=True), []
            while waiting.count():
                if not waiting.has_ready():
                    time.sleep(0.1)
                    refuse_silence(looked, client, cluster, arguments.out / LOGS)
                    continue
                for _, record in waiting.next_batch(block=False):
                    records[record["number"]] = record
                    bar.update(record["source_rows"])
                    counted["bad"] += record["bad"]
                    counted["first_bad"] = counted["first_bad"] or record["first_bad"]
                refuse_bad_rows(counted, rows, arguments.max_bad_rows)
        except KilledWorker as error:
            raise ValueError(
                f"{error.task} ended {error.allowed_failures + 1} workers: too little memory?"
            ) from error
    return [records[number] for number in range(len(places))]


def refuse_silence(
    looked: list[tuple[float, bool]], client: Client, cluster: Any, logs: Path
) -> None:
    """Look every few seconds whether anybody works (`looked`: when, and so).

    ValueError after a minute of nobody.
    """
    now = time.monotonic()
    if looked and now - looked[-1][0] < LOOK_S:
        return
    looked.append((now, nobody_works(client, cluster)))
    while len(looked) > 1 and looked[1][0] <= now - SILENT_S:
        looked.pop(0)
    if looked[0][0] <= now - SILENT_S and all(nobody for _, nobody in looked):
        raise ValueError(f"the workers' jobs are over and none of them reported: see {logs}")


def nobody_works(client: Client, cluster: LocalCluster | SLURMCluster) -> bool:
    """Whether no worker is there and Slurm has none of their jobs:

    one that ends before it reports is not replaced.
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
    """Workers of one core each. Under Slurm each is a job, and a lost one is replaced."""
    if arguments.cluster == "local":
        with LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            env=THREADS,
            dashboard_address=":0",
        ) as local:
            yield local
        return
    # how long Dask waits for a lost worker before it asks for another job: 15 s, without this
    dask.config.set({"distributed.deploy.lost-worker-timeout": "5s"})
    logs = arguments.out / LOGS
    logs.mkdir(exist_ok=True)
    with SLURMCluster(
        queue=arguments.partition, account=arguments.account, walltime=arguments.time, memory=arguments.memory,
        cores=1, processes=1, interface=arguments.interface, job_name="tokenize-worker", log_directory=str(logs),
        job_script_prologue=[f"export {name}={value}" for name, value in THREADS.items()],
        scheduler_options={"dashboard_address": ":0"},
    ) as slurm:  # fmt: skip
        script = logs / "job.sh"
        script.write_text(slurm.job_script())
        checked = subprocess.run(
            ["sbatch", "--test-only", str(script)], capture_output=True, text=True
        )
        if checked.returncode:
            raise ValueError(f"Slurm takes no such job: {' '.join(checked.stderr.split())}")
        # scale(n) would not replace the job of a lost worker
        slurm.adapt(minimum_jobs=workers, maximum_jobs=workers)
        yield slurm
    shutil.rmtree(logs)


def plot_lengths(lengths: np.ndarray, limit: int | None, path: Path) -> None:
    """Histogram of the training rows' tokens before truncation."""
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


def filled(lengths: np.ndarray, micro_batch: int) -> tuple[float, float]:
    """Share of real tokens in micro-batches of rows in random order:

    padded to the longest, and packed.
    """
    from sftlab.data.collator import TOKENS_MULTIPLE

    order = np.random.default_rng(0).permutation(lengths)[: 10_000 * micro_batch]
    whole = order[: len(order) - len(order) % micro_batch] if len(order) > micro_batch else order
    batches = whole.reshape(-1, min(micro_batch, max(1, len(whole))))
    real = batches.sum(1)
    packed = -(-real // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    return real.sum() / (batches.max(1) * batches.shape[1]).sum(), real.sum() / packed.sum()


def print_summary(
    manifest: dict[str, Any], lengths: np.ndarray, recipe: "Recipe", folder: Path
) -> None:
    """What there is now, and how to train on it."""
    facts, tokenized, limit = manifest["facts"], manifest["tokenized"], recipe.training.max_length
    lines = [["", "rows", "tokens", "dropped at max_length", "cut at max_length"]]
    for name in ("train", "validation", "test"):
        counts = tokenized[name]
        cells = [
            f"{counts[key]:,}" if key in counts else "" for key in ("tokens", "dropped", "cut")
        ]
        lines.append([name, f"{facts[name]['rows']:,}", *cells])
    print(f"\n{folder}: {facts['rows_read']:,} rows of {facts['dataset']} ({facts['shape']})")
    print(aligned(lines))
    left_out = f"{facts['empty_responses_dropped']:,} rows without a response"
    left_out += (
        f", {facts['bad_rows_left_out']:,} that are not text"
        if "bad_rows_left_out" in facts
        else ""
    )
    print(f"  left out: {left_out}")
    used = np.minimum(lengths, limit) if limit else lengths
    if len(used):
        micro_batch = recipe.training.per_device_train_batch_size
        padded, packed = filled(used, micro_batch)
        quantiles = " ".join(
            f"{value:,.0f}" for value in np.quantile(lengths, (0.05, 0.5, 0.95, 1))
        )
        print(
            f"  tokens of a training row (5 %, median, 95 %, longest): {quantiles} (plot: "
            f"{folder / 'lengths.png'})"
        )
        print(
            f"  real tokens in micro-batches of {micro_batch} rows: {padded:.1%} padded, "
            f"{packed:.1%} packed"
        )
    print(f"\nNext: sft.py with --dataset_name {folder}")


if __name__ == "__main__":
    # so that workers and their jobs are ended
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main(sys.argv[1:])
