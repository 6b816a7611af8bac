"""A Python that starts warm: it forks a process that has imported the libraries already.

`python()` returns an executable that takes what `python` takes: a script, `-m MODULE` or `-c CODE`.
It passes its arguments, environment, folder, cores and standard streams to the fork server, and
signals to the fork; it ends as the fork ends. So a launch runs accelerate's own launcher and
torchrun, and one process a rank, without importing torch anew in each. What a warm start does not
test is the imports; some launches of every kind therefore stay with `sys.executable`.

The fork server serves every worker of one test run. It ends with the process that started the run.
"""

import atexit
import contextlib
import fcntl
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from own_progress_lock import take_own_progress_lock

FOLDER = Path()  # of the executable and the socket; conftest.py sets it
# In the order of recipes/sft.py; the first two change how the others are imported.
_LIBRARIES = (
    "sftlab.startup.filter_warnings",
    "sftlab.startup.preload",
    "sftlab.training.trainer",
    "sftlab.planning.plan",
    "sftlab.evaluation.held_out",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "lm_eval.models.huggingface",
    "matplotlib.pyplot",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "gradio",
    "pytest",
)
_CLIENT = """#!{python} -IS
import sys
sys.path.insert(0, {folder!r})
import fork_client
fork_client.main({socket!r})
"""


def python() -> str:
    """Returns the executable; the first call of a test run starts the server.

    Where there is no Linux it returns Python itself.
    """
    if sys.platform != "linux":
        return sys.executable
    folder, executable, listening = FOLDER, FOLDER / "python", FOLDER / "socket"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not executable.exists():
            _start(folder, listening)
            here = str(Path(__file__).parent)
            text = _CLIENT.format(python=sys.executable, folder=here, socket=str(listening))
            executable.write_text(text)
            executable.chmod(0o755)
    return str(executable)


def _start(folder: Path, listening: Path) -> None:
    """Start the server and wait until it listens."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    # one thread, because a fork has no other; no GPU, because a fork cannot share its state
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    log = (folder / "log").open("w")
    command = [sys.executable, __file__, str(listening), str(owner)]
    server = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    while not listening.exists():
        if server.poll() is not None:
            raise RuntimeError(f"the fork server ended: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.05)


def main(listening: str, owner: int) -> None:
    """Import what scripts import, then fork one supervisor for every client."""
    _import_libraries()
    if threading.active_count() > 1:
        sys.exit("a library has started a thread while it was imported")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{listening}.new")
    server.listen(64)
    server.settimeout(1)
    os.rename(f"{listening}.new", listening)
    while os.path.exists(f"/proc/{owner}"):
        try:
            client, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            server.close()
            _supervise(client, os.path.join(os.path.dirname(listening), "python"))
        client.close()


def _import_libraries() -> None:
    for name in _LIBRARIES:
        importlib.import_module(name)


def _supervise(client: socket.socket, executable: str) -> None:
    """Fork the script; pass on the client's signals; tell the client how the script ended.

    Where the client was killed, kill the script and what it started in its process group.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    client.settimeout(None)
    message, streams, *_ = socket.recv_fds(client, 1 << 16, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 16)
    pid = os.fork()
    if pid == 0:
        client.close()
        os.setsid()
        _become(json.loads(message), streams, executable)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    while ended not in select.select([client, ended], [], [])[0]:
        if numbers := client.recv(64):
            for number in numbers:
                os.kill(pid, number)
        else:
            os.killpg(pid, signal.SIGKILL)
            break
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.sendall(str(code).encode())
    os._exit(0)


def _become(wanted: dict, streams: list[int], executable: str) -> None:
    """Run what the client asks for and end as Python ends."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    os.sched_setaffinity(0, wanted["cores"])
    signal.signal(signal.SIGINT, signal.SIG_IGN if wanted["deaf"] else signal.default_int_handler)
    random.seed()
    sys.executable = executable
    take_own_progress_lock()
    # imported for its effect, which depends on the environment
    for name in [name for name in sys.modules if name.startswith("sftlab.startup.")]:
        del sys.modules[name]
    try:
        code = _run(wanted["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = -signal.SIGINT
        sys.excepthook(*sys.exc_info())
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _run(words: list[str]) -> int:
    """Run `python WORDS` in this process; returns 0."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    while words[0] == "-u":
        unbuffered, words = True, words[1:]
    sys.stdout.reconfigure(write_through=unbuffered)
    if words[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), words[1:]
        if not hasattr(sys.modules.get(words[1]), "__path__"):  # a package keeps its parts
            sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(words[0])), words
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
