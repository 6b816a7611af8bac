"""Run one script's main in a forked process, and say how it ended and what it touched."""

import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
from conftest import ROOT, load_script
from dask.distributed import LocalCluster
from own_progress_lock import take_own_progress_lock
from transformers.trainer_callback import DefaultFlowCallback

from sftlab.chat.options import parse_options
from sftlab.chat.service import Lab
from sftlab.config.launch import exported
from sftlab.exit_messages import mistakes_in_one_line

LIMIT_S = 20
# of wall-clock time, for machines that others use too
PATIENCE = 4
MEMORY = 6 * 2**30
STEPS = 20
ENDS = (0, 1, 2, 130)
_SENTENCE = re.compile(r"(\S+: )?error: \S|stopped: ")
SCRIPTS = {
    "sft": "recipes/sft.py",
    "plan": "recipes/plan.py",
    "show": "recipes/show.py",
    "study": "recipes/study.py",
    "export": "recipes/export.py",
    "doctor": "recipes/doctor.py",
    "quality": "eval/quality.py",
    "preferences": "eval/preferences.py",
    "alpaca": "eval/alpaca.py",
    "mt_bench": "eval/mt_bench.py",
    "report": "eval/report.py",
    "tokenize": "slurm/tokenize_dataset.py",
    "job": "slurm/job.py",
}
SLURM = {
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_ID": "1",
    "SLURM_NODEID": "0",
    "SLURM_JOB_CPUS_PER_NODE": "1",
}


@dataclass(eq=False)
class Ended:
    """How a process ended: its exit status (None: it was killed as hanging) and what it printed."""

    code: int | None
    seconds: float
    said: str


@dataclass(eq=False)
class Running:
    """A forked process and the file that it prints to."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)

    def ended(self) -> Ended | None:
        """Returns None while it runs. A process that hangs is killed."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        wall = time.monotonic() - self.began
        if not pid and wall < LIMIT_S * PATIENCE:
            return None
        code = os.waitstatus_to_exitcode(status) if pid else None
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            _, _, used = os.wait4(self.pid, 0)
        if code == -signal.SIGXCPU:
            code = None
        return Ended(code, used.ru_utime + used.ru_stime, self.log.read_text("utf-8", "replace"))


def start(script: str, argv: list[str], work: Path, log: Path) -> Running:
    """Fork and run a script's main in `work`. It prints to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        _become(script, argv, work, log)
    return Running(pid, log)


def load_mains() -> None:
    """Import every script once, so that a fork has it."""
    for script, path in SCRIPTS.items():
        module = load_script(path)
        MAINS[script] = module.main
        if script == "tokenize":
            module.cluster_of = in_threads
    MAINS["app"] = app


MAINS: dict[str, Callable[[list[str]], object]] = {}


def app(argv: list[str]) -> None:
    """What the page shows of a folder of runs, and one answer of the first run."""
    options = parse_options(argv, "the app")
    lab = Lab(options.runs, options.run, options.report, options.votes, options.load_in_4bit)
    for show in (lab.runs_table, lab.votes_table, lab.report):
        print(show())
    for name in list(lab.runs())[:1]:
        print(lab.facts_line(name))
        lab.model(name)


@contextmanager
def in_threads(*_: object) -> Iterator[LocalCluster]:
    """A Dask cluster of one thread in this process."""
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        yield cluster


def _become(script: str, argv: list[str], work: Path, log: Path) -> None:
    code: object = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(work)
        _settle(script, work)
        argv = [word.replace("HERE/", f"{work}/") for word in argv]
        if "URL" in argv:
            argv = [serve(work / "reply.json") if word == "URL" else word for word in argv]
        # the sentences of these two come from elsewhere: its own main, and the page
        own = script in ("sft", "app")
        with nullcontext() if own else mistakes_in_one_line():
            code = MAINS[script](argv) or 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except ValueError as error:
        # the page shows a ValueError as a sentence
        if script != "app":
            sys.excepthook(*sys.exc_info())
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _settle(script: str, work: Path) -> None:
    """The environment that a launch would give; limits; no work beyond some steps."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "PATH": f"{work.parent}/bin:{os.environ['PATH']}"}
    if script == "sft":
        os.environ |= exported(ROOT / "accelerate_configs" / "cpu.yaml")
    if script == "job":
        os.environ |= SLURM
    if script == "study":  # its trainings fail at once
        sys.executable = str(work.parent / "bin" / "python")
    datasets.config.HF_DATASETS_CACHE = work.parent / "cache"
    take_own_progress_lock()
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stop = DefaultFlowCallback.on_step_end

    def on_step_end(self, args, state, control, **more):
        if state.global_step >= STEPS:
            os._exit(0)
        return stop(self, args, state, control, **more)

    DefaultFlowCallback.on_step_end = on_step_end


def serve(reply: Path) -> str:
    """Answer every question with the bytes of a file. Returns the server's address."""
    body = reply.read_bytes() if reply.is_file() else b""
    models = b'{"object": "list", "data": [{"id": "judge", "object": "model", "created": 0}]}'

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send(self, content):
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.send(models)

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


def outcome(ended: Ended, damaged: list[str], work: Path) -> tuple[str, str]:
    """Returns the kind of an ending, and in a few words what is wrong with it ("": nothing).

    An internal error counts as a traceback; the script ran in `work`.
    """
    lines = [line for line in ended.said.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if damaged:
        return "damage", "; ".join(damaged[:3])
    if ended.code is None:
        return "hang", f"killed after {ended.seconds:.0f} s of computing; last said: {last[:160]}"
    if kept := re.search(r"internal error: .* the traceback is in (\S+?):? ", f"{last} "):
        path = work / kept[1]
        where = _where(path.read_text("utf-8", "replace").splitlines()) if path.is_file() else "?"
        path.unlink(missing_ok=True)
        return "traceback", f"{where}: {last[:160]}"
    if "Traceback (most recent call last)" in ended.said:
        return "traceback", f"{_where(lines)}: {last[:200]}"
    if ended.code not in ENDS:
        return "odd exit", f"exit status {ended.code}: {last[:160]}"
    if ended.code == 0:
        return "finished", ""
    if ended.code == 130:
        return "stopped", ""
    # a list may follow the sentence
    if not any(map(_SENTENCE.match, lines[-8:])) or len(last) > 1500:
        return "no sentence", f"exit status {ended.code}: {last[:200]!r}"
    return "refused", ""


def _where(lines: list[str]) -> str:
    """Returns the innermost line of the project in a traceback."""
    found = ""
    for line in lines:
        if match := re.match(r'\s+File "(.+)", line (\d+)', line):
            path = match[1]
            if ".venv" not in path and "/tests/" not in path and str(ROOT) in path:
                found = f"{Path(path).relative_to(ROOT)}:{match[2]}"
    return found or "outside the project"
