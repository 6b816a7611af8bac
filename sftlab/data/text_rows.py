"""Rows of local files of text, which stays as it stands in the file.

Readers that type a column by its first block turn 00199 into 199 and a date into a time. Here a row
of JSON stays one text until it is converted, and every field of a CSV file is text. A .txt file is
one document.
"""

import csv
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value

from sftlab.data.data_files import data_suffix, file_kind, open_text
from sftlab.schema import once

# the column of a row that is still JSON
JSON_ROW = "row as JSON"
# rows that are looked at to find the columns
_LOOKED_AT = 1000
# what stands between the fields of a .csv file whose heading has no comma
_SEPARATORS = (";", "\t", "|")
# keys of a file's only object that hold its rows
_OF_ROWS = ("data", "train", "rows", "instances", "examples")
# what a file raises that is no text, or whose packed bytes are not whole
_DAMAGED = (UnicodeDecodeError, EOFError, OSError, zlib.error)


def read_text_rows(paths: Sequence[Path | str], streaming: bool) -> Dataset | IterableDataset:
    """Returns the rows of text files: one column of JSON, the columns of a heading, or `text`.

    Files are paths, or addresses on the hub. Raises ValueError for a heading that is empty or names
    a column twice.
    """
    kind, columns, read = file_kind(paths[0]), [JSON_ROW], json_rows
    if kind == "csv":
        columns, read = csv_heading(paths[0]), csv_rows
    elif kind == "text":
        columns, read = ["text"], documents
    # size and time of change make the cache of a changed file another one
    files = [_identity(path) for path in paths]
    made = IterableDataset if streaming else Dataset
    features = Features({name: Value("string") for name in columns})
    if next(read(files), None) is None:
        raise ValueError(f"{paths[0]} is empty: it has no row")
    return made.from_generator(read, features=features, gen_kwargs={"files": files})


def _identity(path: Path | str) -> tuple[str, int, int]:
    if isinstance(path, str):  # an address names its revision
        return path, 0, 0
    return str(path), path.stat().st_size, path.stat().st_mtime_ns


def documents(files: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """Yield the whole text of each file as one row."""
    for path, *_ in files:
        with open_text(path) as file:
            try:
                yield {"text": file.read()}
            except _DAMAGED as error:
                raise ValueError(_unreadable(path, error)) from error


def json_rows(files: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """Yield each object as its own text, from JSON lines, one list, or objects in a row."""
    for path, *_ in files:
        with open_text(path) as file:
            try:
                for text in _json_texts(file):
                    if text.strip():
                        yield {JSON_ROW: text.strip()}
            except _DAMAGED as error:
                raise ValueError(_unreadable(path, error)) from error


def _json_texts(file: IO[str]) -> Iterator[str]:
    # a stream that is unpacked on the way cannot be read twice
    begin = file.read(4096) + file.readline()
    if begin.lstrip().startswith("["):
        return _elements(begin + file.read())
    # an object over several lines opens with a line of its own
    if begin.lstrip().partition("\n")[0].strip() == "{":
        return _objects(begin + file.read())
    return chain(io.StringIO(begin), file)


def _unreadable(path: str, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return (
            f"{path} is not UTF-8 text: {error.reason}; save it as UTF-8, for example with "
            f"`iconv -f WINDOWS-1252 -t UTF-8 {path}`"
        )
    return f"{path} cannot be read: {error}"


def _elements(text: str) -> Iterator[str]:
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while True:
        place = _behind_blanks(text, place)
        if text[place : place + 1] == "]":
            if rest := text[place + 1 :].strip():
                raise ValueError(
                    f"behind the list of rows stands {rest!r:.40}: write one list of objects, or "
                    "an object a line"
                )
            return
        _, end = decoder.raw_decode(text, place)
        yield text[place:end]
        place = _behind_blanks(text, end)
        if text[place : place + 1] == ",":
            place += 1
        elif text[place : place + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)


def _objects(text: str) -> Iterator[str]:
    decoder, place = json.JSONDecoder(), _behind_blanks(text, 0)
    while place < len(text):
        _, end = decoder.raw_decode(text, place)
        yield text[place:end]
        place = _behind_blanks(text, end)


def _behind_blanks(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def csv_heading(path: Path | str) -> list[str]:
    """Returns the columns that the first line names."""
    with open_text(path, newline="") as file:
        columns = next(_csv_lines(str(path), file), [])
    twice = {name for name in columns if columns.count(name) > 1}
    if not columns or twice:
        what = f"names {', '.join(sorted(twice))} twice" if twice else "is empty"
        raise ValueError(f"the heading of {path} {what}: give every column a name of its own")
    return columns


def csv_rows(files: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """Yield each row with its fields as text. Raises ValueError with the number of a bad line."""
    heading = csv_heading(files[0][0])
    for path, *_ in files:
        with open_text(path, newline="") as file:
            lines = _csv_lines(path, file)
            if next(lines, []) != heading:
                raise ValueError(f"{path} has another heading than {files[0][0]}")
            for fields in lines:
                if len(fields) != len(heading):
                    raise ValueError(
                        f"{path}: the row {', '.join(fields)!r:.60} has {len(fields)} fields and "
                        f"the heading {len(heading)}"
                    )
                yield dict(zip(heading, fields, strict=True))


def _csv_lines(path: str, file: Any) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    before = 0
    try:
        first = file.readline()
        separator, is_row = _separator(path, first)
        before = 0 if is_row else 1
        lines = chain([first], file) if is_row else file
        reader = csv.reader(lines, delimiter=separator, strict=True)
        yield from filter(None, reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {before + reader.line_num}: {error}") from error
    except _DAMAGED as error:
        raise ValueError(_unreadable(path, error)) from error


def _separator(path: str, first: str) -> tuple[str, bool]:
    """Returns what stands between the fields, and whether the first line is a row.

    Excel may say the separator in a line of its own: `sep=;`.
    """
    if data_suffix(Path(path)) == ".tsv":
        return "\t", True
    if said := re.fullmatch(r"sep=(.)", first.strip("\r\n"), re.IGNORECASE):
        return said[1], False
    bare = re.sub(r'"[^"]*"', "", first)
    counts = {one: bare.count(one) for one in _SEPARATORS}
    most = max(counts, key=counts.__getitem__)
    return (most if counts[most] and "," not in bare else ","), True


def rows_in(path: Path) -> int:
    """Returns the number of rows of a local file."""
    kind, files = file_kind(path), [(str(path), 0, 0)]
    if kind == "parquet":
        return pq.read_metadata(path).num_rows
    if kind == "arrow":
        return len(Dataset.from_file(str(path)))
    read = {"csv": csv_rows, "text": documents}.get(str(kind), json_rows)
    return sum(1 for _ in read(files))


def parse_row(text: str, numbers_as_text: bool = False) -> dict[str, Any]:
    """Returns a row of JSON, with numbers as numbers or as they are written.

    Raises JSONDecodeError where it is not JSON, and ValueError where it is no object or names a key
    twice.
    """
    try:
        number = str if numbers_as_text else None
        row = json.loads(text, object_pairs_hook=once, parse_int=number, parse_float=number)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(
            f'expected an object of columns such as {{"prompt": "...", "completion": "..."}}, got '
            f"{text!r:.60}"
        )
    return row


def columns_of(rows: Dataset | IterableDataset) -> list[str] | None:
    """Returns the columns in the first rows of JSON; None where the rows are not JSON.

    Raises ValueError where there is no row, and JSONDecodeError where the first is not JSON.
    """
    if rows.column_names != [JSON_ROW]:
        return None
    first = [row[JSON_ROW] for row in rows.take(_LOOKED_AT)]
    if not first:
        raise ValueError("the data set is empty")
    columns = dict.fromkeys(parse_row(first[0]))
    if len(first) == 1:
        _refuse_rows_under_key(parse_row(first[0]))
    for text in first[1:]:
        try:
            columns |= dict.fromkeys(parse_row(text))
        except ValueError:
            continue  # the conversion names the row
    return list(columns)


def _refuse_rows_under_key(only: dict[str, Any]) -> None:
    """Raise ValueError where a file's only object holds the rows."""
    for key in _OF_ROWS:
        held = only.get(key)
        if isinstance(held, list) and held and isinstance(held[0], dict):
            raise ValueError(
                f"the rows are a list under the key {key!r}: write the list alone, for example "
                f"with `jq .{key} FILE > rows.json`"
            )
    if len(only) > 1 and _are_columns(list(only.values())):
        raise ValueError(
            "it is one object that holds whole columns: write an object a row, for example with "
            'pandas\' to_json(..., orient="records", lines=True)'
        )


def _are_columns(values: list[Any]) -> bool:
    """Whether values are pandas' columns: lists of texts of one length, or objects of them."""
    if all(isinstance(one, dict) for one in values):
        return bool(values[0]) and all(list(one) == list(values[0]) for one in values)
    if not all(isinstance(one, list) and len(one) == len(values[0]) for one in values):
        return False
    return bool(values[0]) and all(isinstance(held, str) for one in values for held in one)
