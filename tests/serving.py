"""The chat app as a process of its own, for every test that needs one:

with the tiny model, or with a slow stand-in.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import fork_server
import psutil

ROOT = Path(__file__).parent.parent

# The app with a model that takes its time, repeats the message, and writes down what reaches it and
# when it is stopped.
SLOW = """
import json, os, runpy, sys, time
from sftlab.chat import service
from sftlab.chat.engine import Piece
from sftlab.runs.run_directory import read_run

def log(**what):
    with open(os.environ["SLOW_LOG"], "a") as file:
        file.write(json.dumps(what) + chr(10))

class Slow:
    context, closed, mixed = 4096, False, True
    sides, start, no_start = ("base", "tuned"), None, "no start"
    def __init__(self, folder, load_in_4bit=False, trusted=False):
        self.run = read_run(folder)
    def fit(self, history, most, stop=None):
        return history, 0
    def close(self):
        self.closed = True
    def reply(self, history, sides, settings, stop):
        def set_and_say():
            log(stopped_at=step)
            set_it()
        set_it, stop.set = stop.set, set_and_say
        step, how = 0, None
        log(history=history, sides=sides, settings=vars(settings))
        try:
            while how is None and not self.closed:
                time.sleep(0.04)  # the engine shows no more states a second
                step += 1
                full = step == settings.max_new_tokens
                how = "stopped" if stop.is_set() else "length" if full else None
                text = "heard " + history[-1]["content"] + " " + "word " * step
                each = lambda value: dict.fromkeys(sides, value)
                yield Piece(each(text), each(step), each(50.0), 0.02, each(how))
        finally:
            log(ended=how or "closed", step=step)

service.Chat = Slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server:
    """A running app: where it listens, its process, its votes, what it said, and what reached the
    slow model.
    """

    def __init__(self, process: subprocess.Popen, port: int, folder: Path) -> None:
        self.url, self.process, self.folder = f"http://127.0.0.1:{port}", process, folder
        self.ballot = folder / "votes.jsonl"

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def memory(self) -> int:
        """Resident bytes of the process that listens."""
        port = int(self.url.rpartition(":")[2])
        [pid] = {
            c.pid
            for c in psutil.net_connections("tcp4")
            if c.status == "LISTEN" and c.laddr.port == port
        }
        return psutil.Process(pid).memory_info().rss

    def log(self) -> list[dict]:
        """What reached the slow model."""
        path = self.folder / "slow.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def last_answer(self) -> dict:
        """The newest answer of the slow model:

        what was asked, at which step it was told to stop, how it ended.
        """
        found: dict = {}
        for record in self.log():
            found = record if "settings" in record else record | found
        return found

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


def heed_ctrl_c() -> None:
    """Tests that a shell started in the background ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(folder: Path, *arguments: str, slow: bool = False):
    """`python app/app.py ARGUMENTS` on a free port; ends it as Ctrl-C does, which must be clean."""
    port = free_port()
    (folder / "slow.py").write_text(SLOW)
    script = [*([str(folder / "slow.py")] if slow else []), str(ROOT / "app" / "app.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["SLOW_LOG"] = str(folder / "slow.jsonl")
    command = [
        fork_server.python(),
        *script,
        "--port",
        str(port),
        "--votes",
        str(folder / "votes.jsonl"),
        *arguments,
    ]
    with (folder / "said.txt").open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            preexec_fn=heed_ctrl_c,
        )
    server = Server(process, port, folder)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        assert process.poll() is None, server.said()[-2000:]
        yield server
        status = process.returncode if process.poll() is not None else server.interrupt()
        assert status == 0
        assert "Traceback" not in server.said()
    finally:
        process.kill()
        process.wait()


def waits_for(true, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()
