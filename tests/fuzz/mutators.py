"""Break an input in one of many ways: by its meaning, by its text, or as a file."""

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import yaml
from odd_values import TEXTS, WEIRD

Tree = Any


def value(rng: random.Random) -> Any:
    """Returns a value that few fields expect."""
    return copy.deepcopy(rng.choice(WEIRD))


def tree(rng: random.Random, whole: Tree, fields: tuple[str, ...] = (), key_types: bool = False):
    """Returns a changed copy of a JSON or YAML value; `fields` are names that may be set too."""
    whole = copy.deepcopy(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not isinstance(whole, dict | list) or not whole or rng.random() < 0.03:
            return value(rng)
        holder, key = rng.choice(_places(whole))
        how = rng.random()
        if fields and rng.random() < 0.6:
            whole[rng.choice(fields)] = value(rng)
        elif how < 0.2:
            del holder[key]
        elif how < 0.6:
            holder[key] = value(rng)
        elif how < 0.75:
            holder[key] = rng.choice((str, lambda v: [v], lambda v: {"value": v}))(holder[key])
        elif isinstance(holder, dict):
            names = [f"{key}s", str(key).replace("_", "-"), str(key).upper(), "unknown", ""]
            names += [1, None, True] if key_types else []
            holder[rng.choice(names)] = holder.pop(key) if how < 0.9 else holder[key]
        else:
            holder.insert(0, holder[key])
    return whole


def _places(whole: Tree) -> list[tuple[Any, Any]]:
    """Returns every (container, key), outer ones more often than inner ones."""
    found, level = [], [whole]
    while level and len(found) < 400:
        here = [
            (one, key)
            for one in level
            for key in (one if isinstance(one, dict) else range(len(one)))
        ]
        found += here if found else here * 2
        level = [one[key] for one, key in here if isinstance(one[key], dict | list) and one[key]]
    return found


def text(rng: random.Random, data: bytes) -> bytes:
    """Returns bytes that are cut, flipped, repeated or replaced."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    lines = data.splitlines(keepends=True) or [b""]
    line = rng.randrange(len(lines))
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        if flipped:
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    return rng.choice(
        (
            data[:at],
            data[:at] + data[to:],
            data[:at] + bytes(rng.randrange(256) for _ in range(8)) + data[at:],
            data[:at] + b"\x00" + data[at:],
            bytes(flipped),
            b"\xef\xbb\xbf" + data,
            data.replace(b"\n", b"\r\n"),
            data.decode("utf-8", "replace").encode("utf-16"),
            data + data,
            b"".join([*lines[:line], lines[line], *lines[line:]]),
            b"".join(lines[:line] + lines[line + 1 :]),
            data.replace(b":", b"", 1),
            data.replace(b'"', b"'"),
            rng.choice(TEXTS),
        )
    )


def json_file(rng: random.Random, data: bytes, fields: tuple[str, ...] = ()) -> bytes:
    if rng.random() < 0.35:
        return text(rng, data)
    return json.dumps(tree(rng, json.loads(data), fields), indent=2).encode()


def yaml_file(rng: random.Random, data: bytes, fields: tuple[str, ...] = ()) -> bytes:
    if rng.random() < 0.3:
        return text(rng, data)
    changed = tree(rng, yaml.safe_load(data), fields, key_types=True)
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).encode()


def json_lines(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.35:
        return text(rng, data)
    lines = data.splitlines()
    for _ in range(rng.choice((1, 1, 5))):
        place = rng.randrange(len(lines))
        try:
            lines[place] = json.dumps(tree(rng, json.loads(lines[place]))).encode()
        except ValueError:
            continue  # changed already
    return b"\n".join(lines) + b"\n"


def csv_file(rng: random.Random, data: bytes) -> bytes:
    head, _, rest = data.partition(b"\n")
    return rng.choice(
        (
            lambda: text(rng, data),
            lambda: (
                head.replace(b"response", rng.choice((b"", b"instruction", b"Response", b"text")))
                + b"\n"
                + rest
            ),
            lambda: head + b"\n" + b'a,"b\n' + rest,
            lambda: head + b"\n" + b"a,b,c,d,e\n" * 3 + rest,
            lambda: head + b"\n" + b"1,2,3\n" * 300,
            lambda: head + b"\n" + rest.replace(b",", b";"),
            lambda: head + b"\n" + b",,\n" * 30 + rest,
        )
    )()


def table_file(rng: random.Random, data: bytes, rows: list[dict], arrow: bool) -> bytes:
    """Rows as parquet or as an Arrow stream, with other columns, types or bytes."""
    if rng.random() < 0.4:
        return text(rng, data)
    changed = tree(rng, rows[:40])
    try:
        made = pa.Table.from_pylist(changed if isinstance(changed, list) else [])
        sink = pa.BufferOutputStream()
        if arrow:
            with pa.ipc.new_stream(sink, made.schema) as writer:
                writer.write_table(made)
        else:
            pa.parquet.write_table(made, sink)
    except (pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
        return text(rng, data)
    return sink.getvalue().to_pybytes()


def safetensors_file(rng: random.Random, data: bytes) -> bytes:
    """A header that says something else, of a wrong length, or weights that are cut."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = rng.random()
    if how < 0.2:
        return text(rng, data[: 8 + size]) + body
    if how < 0.3:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 10**6, 2**63))) + data[8:]
    if how < 0.45:
        return data[: rng.randrange(len(data))]
    name = rng.choice([one for one in header if one != "__metadata__"])
    if how < 0.6:
        header[rng.choice((f"model.{name}", f"{name}.x", "", name.upper()))] = header.pop(name)
    elif how < 0.7:
        header[name]["dtype"] = rng.choice(("F16", "BF16", "I64", "F8_E4M3", "BOOL", "X"))
    else:
        header = tree(rng, header)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def file_itself(rng: random.Random, path: Path) -> str:
    """Replace a file by what is no file. Returns what it is now."""
    path.unlink()
    how = rng.choice(("missing", "folder", "dangling link", "link to itself", "pipe", "device"))
    if how == "folder":
        path.mkdir()
    elif how == "dangling link":
        path.symlink_to("nowhere")
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/null")
    return how


def words(rng: random.Random, argv: list[str], fields: tuple[str, ...]) -> list[str]:
    """Returns a changed command line."""
    argv = list(argv)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(argv) + 1)
        options = [i for i, word in enumerate(argv) if word.startswith("--")]
        at = rng.choice(options) if options else None
        how = rng.random()
        if fields and how < 0.4:
            name, given = rng.choice(fields), _word(rng)
            argv += rng.choice(([f"--{name}={given}"], [f"--{name}", given], [f"--{name}"]))
        elif how < 0.5 and argv:
            del argv[rng.randrange(len(argv))]
        elif how < 0.6:
            argv.insert(
                place,
                rng.choice(
                    ("", "-", "--", "-h", "--unknown", "--unknown=1", "x", "=", "--=", "-x")
                ),
            )
        elif at is None:
            argv.append(_word(rng))
        elif how < 0.7:
            argv[at] = rng.choice(
                (argv[at].replace("_", "-"), argv[at][:-1], argv[at].upper(), argv[at][1:])
            )
        elif how < 0.75:
            argv += argv[at : at + 2]
        elif "=" in argv[at]:
            argv[at] = f"{argv[at].partition('=')[0]}={_word(rng)}"
        elif at + 1 < len(argv):
            argv[at + 1] = _word(rng)
    # no process can be given a zero byte
    return [word.replace("\x00", "?") for word in argv]


def _word(rng: random.Random) -> str:
    one = value(rng)
    return one if isinstance(one, str) else json.dumps(one)


Mutator = Callable[[random.Random, bytes], bytes]
BY_NAME: dict[str, Mutator] = {
    "json": json_file,
    "yaml": yaml_file,
    "jsonl": json_lines,
    "csv": csv_file,
    "text": text,
    "safetensors": safetensors_file,
}
