"""How a row of a data set is read: under which names, with which text, and where it stands."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sftlab.data.column_names import used_columns
from sftlab.data.formats import DATA_FORMATS
from sftlab.data.messages import CONTENT
from sftlab.data.row_notes import unused_parts
from sftlab.data.text_rows import JSON_ROW, parse_row, rows_in


class RowReader(NamedTuple):
    """Reads the rows of one data set. It can be pickled, and written as JSON.

    `columns` has the format's columns that stand under another name. With `numbers_as_text`, a
    number in a column of text is the text that is written in the file. `files` are the data set's
    local files, where there are several.
    """

    name: str
    data_format: str
    columns: dict[str, str]
    numbers_as_text: bool = False
    files: tuple[str, ...] = ()

    def read(self, batch: dict[str, list], offset: int) -> tuple[dict[str, Any], list[str]]:
        """Returns the columns of a row under the format's names, and what is not used of it.

        Raises ValueError for a row that is not JSON or lacks a column.
        """
        used = used_columns(self.data_format, self.columns)
        if JSON_ROW not in batch:
            row = {one: batch[column][offset] for one, column in used.items() if column in batch}
            if self.numbers_as_text:
                row = {one: _number_as_text(value) for one, value in row.items()}
            return row, unused_parts(row, self.data_format)
        text = batch[JSON_ROW][offset]
        try:
            found = parse_row(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        needed = [used[one] for one in DATA_FORMATS[self.data_format][0]]
        if missing := [column for column in needed if column not in found]:
            several = len(self.files) > 1
            hint = "; files of several formats are mixed with --datasets" if several else ""
            raise ValueError(f"it has no {' and no '.join(missing)}, only {', '.join(found)}{hint}")
        if self.numbers_as_text:
            written = parse_row(text, numbers_as_text=True)
            found |= {c: _as_written(found[c], written[c]) for c in used.values() if c in found}
        row = {one: found[column] for one, column in used.items() if column in found}
        others = {
            f"{column} of the file" if column in used else column: value
            for column, value in found.items()
            if column not in used.values()
        }
        return row, unused_parts(row | others, self.data_format)

    def place(self, index: int) -> str:
        """Returns the words for a row: its file and its number there, counted from 0."""
        number = index
        for file in self.files if len(self.files) > 1 else ():
            try:
                rows = rows_in(Path(file))
            except (OSError, ValueError):  # a worker on another machine may not see it
                break
            if number < rows:
                return f"row {number} of {file}"
            number -= rows
        return f"row {index} of {self.name}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_as_text(value: Any) -> Any:
    return str(value) if _is_number(value) else value


def _as_written(value: Any, written: Any) -> Any:
    """Returns a value whose numbers are text where text belongs: itself, or a message's content."""
    if _is_number(value):
        return written
    if not isinstance(value, list):
        return value
    return [
        message | {c: literal[c] for c in CONTENT if _is_number(message.get(c))}
        if isinstance(message, dict)
        else message
        for message, literal in zip(value, written, strict=True)
    ]
