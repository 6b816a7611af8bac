"""Trainings that nothing disturbs, when they change their folders, and starts of a case."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, FIELDS, environment
from conftest import (
    arguments,
    byte_tokenizer,
    instruction_rows,
    load_script,
    pair_rows,
    write_jsonl,
)
from forked import Moment, Training
from transformers import LlamaConfig, LlamaForCausalLM
from verdicts import outcome


class UndisturbedRuns:
    """The undisturbed run of every case in a folder, and starts and moments drawn from a seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.sft = load_script("recipes/sft.py")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "base")
        byte_tokenizer().save_pretrained(folder / "base")
        write_jsonl(folder / "rows.jsonl", instruction_rows(200))
        write_jsonl(folder / "pairs.jsonl", pair_rows(200))
        self.undisturbed: dict[str, dict[str, Any]] = {}
        self.changes: dict[str, list[tuple[float, str]]] = {}

    def start(
        self,
        name: str,
        run: Path,
        moment: Moment | None = None,
        victim: int = 0,
        sabotage: Callable | None = None,
    ) -> Training:
        """Start a case in a run directory."""
        case = CASES[name]
        data = {
            "model_name_or_path": self.folder / "base",
            "dataset_name": self.folder / f"{'pairs' if 'method' in case.fields else 'rows'}.jsonl",
        }
        argv = arguments(
            {k: str(v) for k, v in (data | {"output_dir": run} | FIELDS | case.fields).items()}
        )

        def prepare() -> None:
            for one in (case.prepare, sabotage):
                if one:
                    one()

        return Training(
            self.sft,
            argv,
            Path(f"{run}.log"),
            case.processes,
            moment,
            victim,
            prepare,
            environment(case),
            case.config is not None,
        )

    def begin(self, name: str) -> None:
        """The undisturbed run of a case, and when it changes its folder."""
        if name in self.undisturbed:
            return
        run = self.folder / f"{name} undisturbed"
        if not self.start(name, run, Moment(count=-1)).wait():
            raise RuntimeError(
                f"{name}: the undisturbed run failed: {Path(f'{run}.log').read_text()[-2000:]}"
            )
        self.undisturbed[name] = outcome(run)
        lines = Path(f"{run}.changes").read_text().splitlines()
        self.changes[name] = [
            (float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in lines
        ]

    def moment(self, name: str, kind: str, victim: int) -> Moment:
        """A random moment of a kind in the life of a rank.

        Only the first one notes progress and seals.
        """
        changes, draw = self.changes[name], self.random.uniform
        first = next(at for at, change in changes if "progress.json" in change)
        saved = next(at for at, change in changes if ".adapter" in change)
        end = changes[-1][0]
        if kind == "start-up":
            return Moment(after_s=draw(0, first))
        if victim and kind == "saving":
            return Moment("resume_state-", self.random.randint(1, 4), draw(0, 0.01))
        if victim:
            return Moment(after_s=draw(first, saved) if kind != "final save" else draw(saved, end))
        if kind == "steps":
            return Moment("progress.json", 1, draw(0, saved - first))
        if kind == "final save" and self.random.random() < 0.5:
            return Moment(".adapter", 1, draw(0, end - saved))
        where, delay = {
            "saving": ("/checkpoint-", 0.004),
            "sealing": ("manifest.json", 0),
            "rotating": ("os.rmdir", 0.001),
            "final save": (".adapter", 0.003),
        }[kind]
        events = sum(where in change for _, change in changes)
        return Moment(where, self.random.randint(1, events), draw(0, delay))

    def cut_off(self, name: str, run: Path) -> None:
        """A run that was killed after its checkpoint of step 10."""
        while not (run / "checkpoint-10" / "manifest.json").is_file():
            shutil.rmtree(run, ignore_errors=True)
            self.start(name, run, Moment("checkpoint-10/manifest.json", 1, 0.06)).wait()
