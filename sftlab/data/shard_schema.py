"""What must stand in the manifest of a tokenized data set, and in a shard's record."""

from collections.abc import Mapping
from typing import Any

from sftlab.schema import COUNT, OBJECT, OBJECTS, TEXT, Kind, check, list_of

_SPLITS = ("train", "validation", "test")
# what sequence_facts.count counts beside `kept`
_SEQUENCES = (
    "dropped",
    "cut",
    "tokens",
    "longest",
    "longest_before_cut",
    "loss_tokens",
    "loss_tokens_cut",
    "conversations_split",
)
_FILES = Kind(
    "an object of files with rows, kept, bytes and sha256",
    lambda value: (
        isinstance(value, dict)
        and all(
            isinstance(one, dict)
            and all(COUNT.holds(one.get(name)) for name in ("rows", "kept", "bytes"))
            and one["kept"] <= one["rows"]
            and TEXT.holds(one.get("sha256"))
            for one in value.values()
        )
    ),
)
_COUNTS = Kind(
    "an object of numbers",
    lambda value: isinstance(value, dict) and all(map(COUNT.holds, value.values())),
)
_UNUSED = Kind(
    "numbers of rows by column or field",
    lambda value: _COUNTS.holds(value) and all(" " in name for name in value),
)
_MANIFEST = {
    "settings": OBJECT,
    "settings.dataset_name": TEXT,
    "settings.sources": OBJECTS,
    "encoder": OBJECT,
    "facts": OBJECT.or_null(),
    "shards": OBJECTS,
}
# facts and tokenized of a finished data set
_OF_FINISHED = {
    "facts.dataset": TEXT,
    "facts.shape": TEXT,
    "facts.rows_read": COUNT,
    "facts.empty_responses_dropped": COUNT,
    "facts.not_used": _UNUSED,
    "facts.rows_with": _COUNTS,
    **{f"facts.{split}.rows": COUNT for split in _SPLITS},
    **{f"facts.{split}.fingerprint": TEXT for split in _SPLITS},
    **{f"tokenized.{split}.kept": COUNT for split in _SPLITS},
    **{f"tokenized.{split}.{one}": COUNT for split in _SPLITS[:2] for one in _SEQUENCES},
}
_COUNTED = {
    "facts.rows_there": COUNT,
    "facts.rows_without_an_answer": COUNT,
    "facts.bad_rows_left_out": COUNT,
    "facts.sources": OBJECTS,
    "facts.columns": OBJECT,
    "facts.left_out_as_known": OBJECT,
}
# a shard's record, as slurm/tokenize_dataset.py counts it together with the others
_RECORD = {
    "number": COUNT,
    "source_rows": COUNT,
    "bad": COUNT,
    "first_bad": TEXT.or_null(),
    "notes": _COUNTS,
    "without_turn": list_of(COUNT),
    "control_marks": COUNT,
    "source": COUNT,
    "files": _FILES,
}


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a value of a manifest that training or tokenizing cannot use."""
    check(manifest, where, _MANIFEST, {"control_marks": COUNT})
    if manifest["facts"] is not None:
        check(manifest, where, _OF_FINISHED, _COUNTED)
    for place, shard in enumerate(manifest["shards"]):
        check(
            shard, f"{where}, shards[{place}]", {"number": COUNT, "source": COUNT, "files": _FILES}
        )


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a value of a shard's record that cannot be counted with the others."""
    check(record, where, _RECORD)
