"""Rows/s of tokenization: this project's workers, one thread, and the published design.

python benchmarks/tokenize_speed.py --tokenizer meta-llama/Llama-3.2-1B \
    --files alpaca.json gsm8k_train.jsonl [--rows 60000] [--rounds 5] [--out results/tokenize_speed]

The corpus is made of the files' rows (Alpaca's and GSM8K's columns), several of them to a row. In
every round each variant tokenizes it once, in changing order. Ratios are taken within a round. What
a cluster takes to start, with its workers' tokenizers loaded, is measured apart. Where `sinfo`
answers, workers in SLURM jobs are a variant too.

The published design is rebuilt: rows go out through Dask, a worker calls the Hugging Face tokenizer
for each, and lists of ids, mask and labels come back. Its labels are the ids: it does not encode
prompts to mask them, the others do.

Scaling is modelled as start + rows / (workers x a worker's rows/s) + half a shard at the end + the
client putting the shards together. Where the scheduler's seconds a task are longer than the
workers' time, they count instead.
"""

import sftlab.startup.filter_warnings  # noqa: F401, I001  (before the libraries that it quiets)

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dask.distributed import Client, LocalCluster, as_completed
from dask_jobqueue import SLURMCluster
from datasets import Dataset, load_dataset

from sftlab.cpu_cores import cpu_cores
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.paths import ROOT
from sftlab.data.shard_folder import begin, finish
from sftlab.data.shard_writer import place_of, tokenize_shard
from sftlab.script_options import Options
from sftlab.tables import aligned, write_csv

WORKERS = 2
ROWS_A_TASK = 2048
MAX_LENGTH = 512
MODELLED = (1, 2, 4, 8, 16, 32, 64, 128)
TEMPLATE = ROOT / "recipes" / "templates" / "instruction.jinja"
THREADS = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
# OpenOrca: rows, and the minutes that were published for it, serially and with Dask on SLURM
OPENORCA_ROWS, SERIAL_MINUTES, CLUSTER_MINUTES = 3_000_000, 80, 36


def main() -> None:
    """Make the corpus, run the rounds, write the table and the plot."""
    arguments = parse_arguments()
    os.environ |= THREADS
    work = Path(tempfile.mkdtemp(prefix="tokenize-speed-", dir=arguments.work_dir))
    try:
        corpus = make_corpus(arguments, work)
        load_tokenizer(arguments.tokenizer).save_pretrained(work / "tokenizer")
        slurm = (
            bool(shutil.which("sinfo"))
            and subprocess.run(["sinfo"], capture_output=True).returncode == 0
        )
        variants = {
            "one thread that only encodes": encode_only,
            "local workers": local,
            "published design": published,
        }
        variants |= {"SLURM workers": slurm_workers} if slurm else {}
        rounds = []
        for number in range(arguments.rounds):
            names = (
                list(variants)[number % len(variants) :] + list(variants)[: number % len(variants)]
            )
            measured = {}
            for name in names:
                measured[name] = variants[name](corpus, work)
                print(
                    f"round {number + 1}, {name}: {measured[name]['rows_per_s']:,.0f} rows/s",
                    flush=True,
                )
            rounds.append(measured)
        overhead = scheduler_cost()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    lines = table(rounds, overhead, len(corpus))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "tokenize_speed.csv", [line | about(arguments) for line in lines])
    drawing = [sys.executable, "benchmarks/draw.py", str(arguments.out.resolve())]
    subprocess.run(drawing, cwd=ROOT, check=True)
    shown = ("variant", "rows_per_s", "ratio", "lowest", "highest", "start_s", "worker_mb")
    print(aligned([list(shown), *([f"{line.get(name, '')}" for name in shown] for line in lines)]))


def parse_arguments() -> argparse.Namespace:
    """Returns the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a model on the hub, or a folder")
    parser.add_argument(
        "--files", required=True, nargs="+", help="rows in Alpaca's or GSM8K's columns"
    )
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--work_dir", help="where shards are written (default: the system's temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "tokenize_speed")
    return parser.parse_args()


def make_corpus(arguments: argparse.Namespace, work: Path) -> Dataset:
    """Returns rows of three questions and three answers each, memory-mapped.

    They are the same in every run.
    """
    asked, answered, draw = [], [], random.Random(0)
    for name in arguments.files:
        for row in load_dataset("json", data_files=name, split="train"):
            asked.append(
                "\n".join(
                    filter(None, (row.get("instruction"), row.get("input"), row.get("question")))
                )
            )
            answered.append(row.get("output") or row.get("answer"))
    path = work / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(arguments.rows):
            row = {
                "instruction": "\n".join(draw.sample(asked, 3)),
                "response": "\n".join(draw.sample(answered, 3)),
            }
            file.write(json.dumps(row) + "\n")
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(work / "cache"))


@lru_cache(maxsize=1)
def load_tokenizer(name: str) -> Any:
    """Returns the Hugging Face tokenizer with the project's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def encode_only(corpus: Dataset, work: Path) -> dict[str, float]:
    """Encode whole texts with the tokenizer's backend in one thread, and drop the ids."""
    tokenizer = load_tokenizer(str(work / "tokenizer"))
    seconds = 0.0
    for part in parts(corpus):
        texts = tokenizer.apply_chat_template([messages(row) for row in part], tokenize=False)
        began = time.perf_counter()
        tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - began
    return {"rows_per_s": len(corpus) / seconds}


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    """Returns a row as the messages of a conversation."""
    return [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row["response"]},
    ]


def local(corpus: Dataset, work: Path) -> dict[str, float]:
    """Tokenize with this project's workers as processes of this machine."""
    began = time.perf_counter()
    with LocalCluster(
        n_workers=WORKERS, threads_per_worker=1, env=THREADS, dashboard_address=None
    ) as cluster:
        return shards(cluster, corpus, work, began)


def slurm_workers(corpus: Dataset, work: Path) -> dict[str, float]:
    """Tokenize with this project's workers as SLURM jobs."""
    began = time.perf_counter()
    prologue = [f"export {name}={value}" for name, value in THREADS.items()]
    job = {
        "cores": 1,
        "processes": 1,
        "memory": "2GB",
        "walltime": "00:30:00",
        "log_directory": str(work),
    }
    with SLURMCluster(
        **job, job_script_prologue=prologue, scheduler_options={"dashboard_address": None}
    ) as cluster:
        cluster.adapt(minimum_jobs=WORKERS, maximum_jobs=WORKERS)
        return shards(cluster, corpus, work, began)


def shards(cluster: Any, corpus: Dataset, work: Path, began: float) -> dict[str, float]:
    """Tokenize into shards and put them together.

    The time counts from when every worker has its tokenizer.
    """
    folder = work / "out"
    shutil.rmtree(folder, ignore_errors=True)
    with Client(cluster) as client:
        client.wait_for_workers(WORKERS)
        manifest = begin_folder(folder, corpus, work)
        client.run(warm_up, str(folder), place_of(corpus, 0, 8))
        started = time.perf_counter()
        tasks = [
            client.submit(
                tokenize_shard, str(folder), number, place_of(part, 0, len(part)), pure=False
            )
            for number, part in enumerate(parts(corpus))
        ]
        records = [record for _, record in as_completed(tasks, with_results=True)]
        encoded = time.perf_counter()
        finish(folder, manifest, sorted(records, key=lambda record: record["number"]))
        ended = time.perf_counter()
        memory = max(client.run(highest_mb).values())
    rate = len(corpus) / (ended - started)
    return {
        "rows_per_s": rate,
        "start_s": started - began,
        "finish_s": ended - encoded,
        "worker_mb": memory,
    }


def parts(corpus: Dataset) -> list[Dataset]:
    """Returns the rows of each task, memory-mapped."""
    starts = range(0, len(corpus), ROWS_A_TASK)
    return [corpus.select(range(start, min(start + ROWS_A_TASK, len(corpus)))) for start in starts]


def begin_folder(folder: Path, corpus: Dataset, work: Path) -> dict[str, Any]:
    """Make the folder of the shards. Returns its manifest."""
    tokenizer = load_tokenizer(str(work / "tokenizer"))
    settings = {
        "dataset_name": "corpus",
        "dataset_shape": "dolly",
        "split_fractions": [0.9, 0.1, 0.0],
        "loss_on": "all",
    }
    settings |= {"rows": len(corpus), "max_length": MAX_LENGTH, "truncation_mode": "keep_start"}
    encoder = {"template": tokenizer.chat_template, "special_tokens": tokenizer.special_tokens_map}
    settings["completion_only_loss"] = True
    return begin(folder, settings, tokenizer.backend_tokenizer.to_str(), encoder)


def warm_up(folder: str, place: bytes) -> None:
    """Let this worker load its tokenizer with a shard that is removed again."""
    number = 90_000 + os.getpid() % 9_000
    tokenize_shard(folder, number, place)
    for path in Path(folder).glob(f"*-{number}.*"):
        path.unlink()


def highest_mb() -> float:
    """Returns the peak resident memory of this process in MB (2**20 bytes)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def published(corpus: Dataset, work: Path) -> dict[str, float]:
    """Send rows through the scheduler, tokenize them one at a time, and gather lists."""
    began = time.perf_counter()
    with (
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, env=THREADS, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(encode_rows, [dict(corpus[0])], str(work / "tokenizer"))
        started = time.perf_counter()
        tasks = [
            client.submit(encode_rows, part.to_list(), str(work / "tokenizer"), pure=False)
            for part in parts(corpus)
        ]
        back = [row for rows in client.gather(tasks) for row in rows]
        ended = time.perf_counter()
    assert len(back) == len(corpus)
    return {"rows_per_s": len(corpus) / (ended - started), "start_s": started - began}


def encode_rows(rows: list[dict[str, str]], tokenizer: str) -> list[dict[str, list[int]]]:
    """Tokenize as a worker of the published design."""
    loaded, encoded = load_tokenizer(tokenizer), []
    for row in rows:
        text = loaded.apply_chat_template(messages(row), tokenize=False)
        one = loaded(text, truncation=True, max_length=MAX_LENGTH, add_special_tokens=False)
        encoded.append({**one, "labels": list(one["input_ids"])})
    return encoded


def scheduler_cost(tasks: int = 5000) -> float:
    """Returns the scheduler's seconds a task, from tasks that do nothing."""
    with (
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, env=THREADS, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.gather([client.submit(abs, number, pure=False) for number in range(100)])
        started = time.perf_counter()
        for _ in as_completed([client.submit(abs, number, pure=False) for number in range(tasks)]):
            pass
        return (time.perf_counter() - started) / tasks


def model_minutes(workers: int, measured: dict[str, float], overhead: float) -> float:
    """Returns the minutes that OpenOrca takes by the model in this file's docstring."""
    rate = measured["rows_per_s"] / WORKERS
    encoding = max(OPENORCA_ROWS / (workers * rate), overhead * OPENORCA_ROWS / ROWS_A_TASK)
    together = measured["finish_s"] / measured["rows"] * OPENORCA_ROWS
    return (measured["start_s"] + encoding + ROWS_A_TASK / rate / 2 + together) / 60


def medians(rounds: list[dict[str, dict[str, float]]], name: str, rows: int) -> dict[str, float]:
    """Returns the median over the rounds of each figure of a variant."""
    keys = rounds[0][name]
    return {key: statistics.median(one[name][key] for one in rounds) for key in keys} | {
        "rows": rows
    }


def table(
    rounds: list[dict[str, dict[str, float]]], overhead: float, rows: int
) -> list[dict[str, Any]]:
    """Returns a row a variant, then the rows of the model and of the published minutes.

    Ratios are to one thread that only encodes, and to the published design.
    """
    lines = []
    base, design = "one thread that only encodes", "published design"
    for name in rounds[0]:
        line: dict[str, Any] = {"variant": name, "workers": 1 if name == base else WORKERS}
        found = medians(rounds, name, rows)
        line |= {
            key: round(found[key], 2)
            for key in ("rows_per_s", "start_s", "finish_s", "worker_mb")
            if key in found
        }
        for key, other in (("", base), ("_to_published", design)):
            ratios = [one[name]["rows_per_s"] / one[other]["rows_per_s"] for one in rounds]
            line[f"ratio{key}"] = round(statistics.median(ratios), 3)
            line |= {f"lowest{key}": round(min(ratios), 3), f"highest{key}": round(max(ratios), 3)}
        lines.append(line)
    measured = medians(rounds, "local workers", rows)
    lines.append({"variant": "scheduler, a task that does nothing", "start_s": round(overhead, 6)})
    for workers in MODELLED:
        minutes = model_minutes(workers, measured, overhead)
        line = {"variant": "model: OpenOrca", "workers": workers, "minutes": round(minutes, 2)}
        lines.append(line | {"rows_per_s": round(OPENORCA_ROWS / minutes / 60, 1)})
    for name, minutes in (
        ("published: OpenOrca serially", SERIAL_MINUTES),
        ("published: Dask and SLURM", CLUSTER_MINUTES),
    ):
        lines.append(
            {
                "variant": name,
                "minutes": minutes,
                "rows_per_s": round(OPENORCA_ROWS / minutes / 60, 1),
            }
        )
    return lines


def about(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns hardware, versions and command, for every row."""
    packages = ("tokenizers", "transformers", "datasets", "pyarrow", "distributed", "dask-jobqueue")
    versions = [f"{name} {version(name)}" for name in packages]
    files = " ".join(Path(name).name for name in arguments.files)
    command = f"--tokenizer {Path(arguments.tokenizer).name} --files {files}"
    command += f" --rows {arguments.rows} --rounds {arguments.rounds}"
    hardware, command = (
        f"{cpu_cores()} CPU cores",
        f"python benchmarks/tokenize_speed.py {command}",
    )
    return {"hardware": hardware, "versions": " ".join(versions), "command": command}


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
