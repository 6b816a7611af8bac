"""Stock lm-eval tasks on local files. The YAML files of this folder name the class.

python eval/harness.py --run runs/x --tasks gsm8k_local
    --files gsm8k_test=test.jsonl gsm8k_train=train.jsonl

It loads eval/tasks/local_files.py. With lm-eval alone: `lm_eval run --include_path eval/tasks
--metadata gsm8k_test=test.jsonl gsm8k_train=train.jsonl`.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

STOCK = Path(lm_eval.tasks.__file__).parent
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_KINDS = {"text": str, "list": list, "any": object}
_SPLIT_FIELDS = ("training_split", "validation_split", "test_split", "fewshot_split")


class LocalTask(ConfigurableTask):
    """A stock task whose splits are local files. Prompts and scoring are unchanged.

    Its YAML has these fields:

    - `stock`: a YAML file under lm_eval/tasks.
    - `files`: for each split, its file's name in the metadata. The first split is evaluated, the
      second gives few-shot examples.
    - `columns`: for each column, text, list or any.
    - `fewshot_by`: a column, where examples must share the document's value in it.

    Raises ValueError for a missing file or column.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        own = {key: value for key, value in config.items() if key != "class"}
        stock = load_yaml(STOCK / own.pop("stock"))
        self.file_names: dict[str, str] = own.pop("files")
        self.columns: dict[str, str] = own.pop("columns")
        self.fewshot_by: str | None = own.pop("fewshot_by", None)
        given = own["metadata"]
        self.paths = {
            split: Path(given[name]) for split, name in self.file_names.items() if name in given
        }
        self._require_files(own["task"])
        merged = {**stock, **own, "metadata": {**stock["metadata"], **given}}
        merged |= {field: None for field in _SPLIT_FIELDS if merged.get(field) not in self.paths}
        merged |= {"dataset_path": str(next(iter(self.paths.values()))), "dataset_name": None}
        super().__init__(
            config={key: value for key, value in merged.items() if key not in ("tag", "task_list")}
        )

    def _require_files(self, task: str) -> None:
        split, name = next(iter(self.file_names.items()))
        if split not in self.paths:
            optional = "".join(
                f" (few-shot also {other}=FILE)" for other in list(self.file_names.values())[1:]
            )
            raise ValueError(
                f"{task} reads local files: give --files {name}=FILE{optional}, or --metadata to "
                "lm_eval itself"
            )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the files instead of the hub."""
        self.dataset = {split: read_rows(path, self.columns) for split, path in self.paths.items()}

    def fewshot_docs(self) -> Dataset | None:
        """Returns the file of examples, or None.

        Without one lm-eval would draw examples from the documents under test.
        """
        return super().fewshot_docs() if len(self.paths) > 1 else None

    @cached_property
    def _examples(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for example in self.fewshot_docs():
            kinds.setdefault(example[self.fewshot_by], []).append(example)
        return kinds

    def fewshot_context(
        self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any
    ) -> str | list[str]:
        """Returns lm-eval's prompt, with examples that share the document's `fewshot_by` value.

        Raises ValueError where there are too few examples.
        """
        if num_fewshot > 0 and len(self.paths) < 2:
            raise ValueError(
                f"no file of examples: give --files {list(self.file_names.values())[1]}=FILE"
            )
        if num_fewshot > 0 and self.fewshot_by:
            examples = self._examples.get(doc[self.fewshot_by], [])
            if len(examples) < num_fewshot:
                raise ValueError(
                    f"{len(examples)} examples of {self.fewshot_by} {doc[self.fewshot_by]}"
                )
            self.sampler.replace_df(examples)
        return super().fewshot_context(doc, num_fewshot=num_fewshot, **kwargs)


def read_rows(path: Path, columns: dict[str, str]) -> Dataset:
    """Read the rows of a .json, .jsonl, .csv or .parquet file.

    Raises ValueError where one of `columns` is missing. `choices.text` is a field of a column.
    """
    if not path.is_file():
        raise ValueError(f"data file {path} not found")
    if path.suffix not in _READERS:
        raise ValueError(f"data file {path}: expected {', '.join(_READERS)}")
    try:
        rows = load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, StopIteration) as error:
        # datasets 5.2 raises StopIteration for a file without rows
        cause = (str(error.__cause__ or error) or "it has no rows").splitlines()[0]
        raise ValueError(f"data file {path} cannot be read: {cause}") from error
    if len(rows) == 0:
        raise ValueError(f"data file {path} has no rows")
    for column, kind in columns.items():
        name, _, field = column.partition(".")
        value = rows[0].get(name)
        if field:
            value = value.get(field) if isinstance(value, dict) else None
        if value is None or not isinstance(value, _KINDS[kind]):
            found = "missing" if value is None else f"{type(value).__name__}, expected {kind}"
            raise ValueError(
                f"data file {path}: column {column} is {found}; it has "
                f"{', '.join(rows.column_names)}"
            )
    return rows
