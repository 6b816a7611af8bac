"""Rows, tokenizers and jobs for the tests of tokenized data sets."""

import hashlib
from pathlib import Path

import pytest
from conftest import (
    arguments,
)

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.shard_folder import begin, finish, finished_records
from sftlab.data.shard_writer import tokenize_shard

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n' + m['content'] "
    "+ '<|turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n' }}{% endif %}"
)
ODD = (
    "Ordinary words! a  b \n\n \t\r\n# 'S don't 12345 é\u0301 日本語 <|turn|> "
    "### Response:\n \x85\u3000x"
)


def recipe_of(fields):
    return parse_recipe(arguments(fields), Launch.from_environment())


def tokenized(script, fields, out, size=64, share=0.0):
    """The data set of a recipe tokenized in this process, without a cluster; the manifest."""
    given, rest = script.parse_arguments(
        [
            "--out",
            str(out),
            "--rows_per_shard",
            str(size),
            "--max_bad_rows",
            str(share),
            *arguments(fields),
        ]
    )
    places, *made = script.prepare(parse_recipe(rest, Launch.from_environment()), given)
    return tokenized_of(places, made, out)


def tokenized_of(places, made, out):
    """The planned shards written in this process; the manifest."""
    manifest = begin(out, *made)
    records = finished_records(out, len(places))
    for number, place in enumerate(places):
        if number not in records:
            records[number] = tokenize_shard(str(out), number, place)
    finish(out, manifest, [records[number] for number in sorted(records)])
    return manifest


def contents(folder):
    """Every file of a folder with its hash; hidden ones too."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())
    }


def fields_of(model, rows, folder, **more):
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(rows),
        "output_dir": str(folder / "run"),
        "max_length": "100",
        **more,
    }


def refused(script, fields, out, *more):
    """What the script says as it ends."""
    with pytest.raises(SystemExit) as caught:
        script.main(["--out", str(out), *more, *arguments(fields)])
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message
