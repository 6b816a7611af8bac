"""One training a run directory: a lock that ends with its process, on any host.

It is a POSIX record lock on `run.lock`. The kernel frees it when the process ends, however it ends,
and NFS keeps it on the server, so it holds across hosts. Children that outlive the process do not
inherit it. The file says who holds the lock: host, process and start; it stays when the run ends.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

LOCK = "run.lock"
# file descriptors of the locks of this process; closing any other descriptor of the file would
# free its lock
_held: dict[str, int] = {}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def refuse_held(folder: Path) -> None:
    """Raise ValueError if another process trains in the folder. Changes nothing."""
    path = folder / LOCK
    if _key(path) in _held or not os.path.lexists(path):
        return
    descriptor = _opened(path)
    try:
        _lock(descriptor, folder)
    finally:
        os.close(descriptor)  # frees it too


def acquire(folder: Path) -> None:
    """Take the lock of a folder that exists. Raises ValueError if another process has it."""
    path = folder / LOCK
    if _key(path) in _held:
        return
    descriptor = _opened(path, os.O_CREAT)
    try:
        _lock(descriptor, folder)
    except ValueError:
        os.close(descriptor)
        raise
    about = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": _started()}
    about |= {"job": os.environ.get("SLURM_JOB_ID")}
    about["since"] = datetime.now(UTC).isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode() + b"\n", 0)
    _held[_key(path)] = descriptor


def release(folder: Path) -> None:
    """Give the lock back, if this process has it."""
    descriptor = _held.pop(_key(folder / LOCK), None)
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _opened(path: Path, more: int = 0) -> int:
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise ValueError(f"{path} is no file that a run made: move it away")
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | more, 0o644)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror}") from error


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return _refuse_living(descriptor, folder)
        if _is_earlier_start(descriptor):
            return
        raise ValueError(
            f"{folder} is being written by a running process ({_holder(descriptor)}): wait for it, "
            "stop it, or train with another --output_dir"
        ) from error


def _is_earlier_start(descriptor: int) -> bool:
    """Whether an earlier start of this Slurm job holds the lock.

    Slurm ends it before it restarts the job. A file server may keep the lock of a node that is gone
    for longer.
    """
    job, again = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return bool(job and again and found["job"] == job)
    except (ValueError, KeyError, TypeError):
        return False


def _refuse_living(descriptor: int, folder: Path) -> None:
    """Go by the file's content on a file system without locks."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        host, pid, began = found["host"], int(found["pid"]), found["process_started"]
    except (ValueError, KeyError, TypeError):
        return  # given back, or cut short by a kill
    if host == socket.gethostname() and (pid == os.getpid() or _started(pid) != began):
        return
    raise ValueError(
        f"{folder} is being written by process {pid} on {host}, and its file system has no locks: "
        f"if that process is gone, remove {folder / LOCK}"
    )


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has just begun"


def _started(pid: int | str = "self") -> int | None:
    """Returns when a process of this host started, in ticks since its boot; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _key(path: Path) -> str:
    return f"{os.getpid()}:{os.path.realpath(path)}"  # a fork has no lock of its parent's
