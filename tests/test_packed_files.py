"""Files packed as .gz or .zst are read as the text in them: whole, streamed and tokenized."""

import json

import pyarrow
import pytest
from conftest import load_script
from test_columns_and_files import pairs
from test_data import load
from tokenizing import contents, fields_of, tokenized

from sftlab.data.data_files import open_text

CODECS = {".gz": "gzip", ".zst": "zstd"}
ROWS = [{"question": f"{i} é?", "answer": f"00{i}.50 日本"} for i in range(400)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def pack(path, text):
    """Write a packed file; returns its path."""
    with pyarrow.CompressedOutputStream(str(path), CODECS[path.suffix]) as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", CODECS)
def test_rows_of_packed_files_are_those_of_the_text(packed, streaming, tmp_path):
    pack(tmp_path / f"a.jsonl{packed}", LINES[: len(LINES) // 2].rpartition("\n")[0] + "\n")
    read = len(LINES[: len(LINES) // 2].rpartition("\n")[0]) + 1
    pack(tmp_path / f"b.jsonl{packed}", LINES[read:])
    found = load(f"{tmp_path}/*.jsonl{packed}", dataset_streaming=streaming)
    assert pairs(found) == [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize("packed", CODECS)
def test_packed_tables_and_documents_are_read(packed, tmp_path):
    table = pack(
        tmp_path / f"a.csv{packed}", "question;answer\r\n\ufeffA?;007\r\n".encode("utf-16")
    )
    assert pairs(load(table)) == [("\ufeffA?", "007")]
    text = pack(tmp_path / f"a.txt{packed}", "Once\n\nupon.")
    assert json.loads(load(text).train[0]["messages"])[0]["content"] == "Once\n\nupon."


def test_frames_one_after_another_are_one_text(tmp_path):
    one = pack(tmp_path / "a.jsonl.zst", "abc\n")
    two = tmp_path / "b.jsonl.zst"
    two.write_bytes(one.read_bytes() * 3)
    with open_text(two) as file:
        assert file.read() == "abc\n" * 3


@pytest.mark.parametrize("packed", CODECS)
def test_tokens_of_packed_files_are_those_of_the_text(packed, base, tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES)
    pack(tmp_path / f"rows.jsonl{packed}", LINES)
    script, found = load_script("slurm/tokenize_dataset.py"), []
    for name in ("rows.jsonl", f"rows.jsonl{packed}"):
        out = tmp_path / f"out-{len(found)}"
        tokenized(script, fields_of(base, tmp_path / name, tmp_path), out, size=150)
        found.append({n: h for n, h in contents(out).items() if n.endswith(".arrow")})
    assert len(found[0]) >= 3 and found[0] == found[1]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("packed", CODECS)
def test_a_damaged_packed_file_is_one_sentence(packed, kind, tmp_path):
    path = pack(tmp_path / f"a.{kind}{packed}", LINES * 30)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:900] + b"\xff" * 200 + whole[1100:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.{kind}{packed} cannot be read: ") as caught:
            load(path)
        assert "\n" not in str(caught.value)
