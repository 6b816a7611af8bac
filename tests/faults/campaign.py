"""Kill trainings at random moments, break checkpoints file by file, start again, and compare with
undisturbed runs.

python tests/faults/campaign.py --out results/faults          (all of it)
python tests/faults/campaign.py --cases "one process" DDP --trials 3 --faults 6
python tests/faults/campaign.py --cases "GPU bf16" "GPU DDP bf16" --faults 0 --no_controls --out X

What runs is recipes/sft.py (forked.py says how a start becomes cheap); a kill is SIGKILL to one
rank of several, upon which the others are killed as well. A trial is exact if the adapter's
SHA-256, all logged losses, the means of training and validation, and TensorBoard's curves (every
step once) are those of the undisturbed run. Everything is drawn from --seed; what a moment falls on
depends on the machine. The exit status is 1 if anything came out otherwise.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update({"CUDA_VISIBLE_DEVICES": "-1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "faults")]

import torch  # noqa: E402
import transformers  # noqa: E402
from cases import CASES, CPU_CASES, FIELDS, environment  # noqa: E402
from conftest import arguments, byte_tokenizer, instruction_rows, load_script, read, write_jsonl  # noqa: E402
from forked import Moment, Training  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from test_checkpoint import FAULTS  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import sftlab.runs.checkpoint_manifest  # noqa: E402
from sftlab.files import file_hash  # noqa: E402
from sftlab.runs.environment import provenance  # noqa: E402
from sftlab.runs.record import read_run  # noqa: E402
from sftlab.tables import aligned, write_csv  # noqa: E402

KINDS = ("start-up", "steps", "saving", "sealing", "rotating", "final save", "signal")


class Campaign:
    """Undisturbed runs, and trials against them, in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.sft = load_script("recipes/sft.py")
        self.lines: list[dict[str, Any]] = []
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
            "dataset_name": self.folder / "rows.jsonl",
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

    def trial(self, name: str, kind: str, number: int) -> None:
        """Interrupt once or more, start until it ends, compare."""
        self.begin(name)
        run, began = self.folder / f"{name} {kind} {number}", time.monotonic()
        starts = kills = signals = 0
        line = {"case": name, "kind": kind, "result": "exact", "why": ""}
        try:
            while True:
                again = kind if starts == 0 else "steps" if self.random.random() < 0.4 else None
                starts += 1
                if again == "signal":
                    self.signalled(name, run)
                    signals += 1
                elif again:
                    ranks = 1 if again in ("sealing", "rotating") else CASES[name].processes
                    victim = self.random.randrange(ranks)
                    training = self.start(name, run, self.moment(name, again, victim), victim)
                    training.wait()
                    kills += training.codes[victim] == -signal.SIGKILL
                else:
                    self.start(name, run).wait()
                # of several ranks one may have said that the run failed before it was killed too
                status = read(run)["status"] if (run / "run.json").is_file() else None
                if status == "succeeded" or not again:
                    break
            line |= self.compared(name, run)
        except RuntimeError as error:
            line |= {"result": "failed", "why": str(error)}
        counted = {
            "kills": kills,
            "signals": signals,
            "seconds": round(time.monotonic() - began, 1),
        }
        self.add(line | counted, run)

    def signalled(self, name: str, run: Path) -> None:
        """Signal one rank alone at a random moment; all end by themselves."""
        first = next(at for at, change in self.changes[name] if "progress.json" in change)
        last = next(at for at, change in self.changes[name] if ".adapter" in change)
        training = self.start(name, run)
        time.sleep(self.random.uniform(first / 2, last))
        number = self.random.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        training.signal(number, self.random.randrange(CASES[name].processes))
        training.wait(together=False)
        if not (run / "run.json").is_file():
            return  # it came before the run began
        status = read(run)["status"]
        if status not in ("interrupted", "succeeded"):
            raise RuntimeError(f"signal {number} ended with the status {status}: {run}.log")

    def broken_files(self, name: str, most: int | None) -> list[Callable[[], None]]:
        """Trials: a file of the newest checkpoint (or run.json, progress.json, the curves) broken
        in one way.
        """
        if most == 0:
            return []
        self.begin(name)
        cut = self.folder / f"{name} cut"
        self.cut_off(name, cut)
        kept = [path for path in (cut / "checkpoint-10").rglob("*") if path.is_file()]
        kept += [cut / "run.json", cut / "progress.json", *(cut / "tensorboard").iterdir()]
        pairs = [(path.relative_to(cut), fault) for path in sorted(kept) for fault in FAULTS]
        chosen = self.random.sample(pairs, len(pairs) if most is None else most)
        return [partial(self.break_file, name, cut, path, fault) for path, fault in chosen]

    def cut_off(self, name: str, run: Path) -> None:
        """A run that was killed after its checkpoint of step 10."""
        while not (run / "checkpoint-10" / "manifest.json").is_file():
            shutil.rmtree(run, ignore_errors=True)
            self.start(name, run, Moment("checkpoint-10/manifest.json", 1, 0.06)).wait()

    def break_file(self, name: str, cut: Path, path: Path, fault: Callable[[Path], None]) -> None:
        """Break a file of a copy of a run that was cut off, and start again."""
        run = self.folder / f"{name} {str(path).replace('/', ' ')[:60]} {fault.__name__}"
        shutil.copytree(cut, run)
        fault(run / path)
        self.start(name, run).wait()
        line = {"case": name, "kind": f"a file {fault.__name__}", "file": str(path)}
        line |= self.compared(name, run) if succeeded(run) else refusal(run)
        self.add(line, run)

    def control(
        self, what: str, sabotage: Callable[[], None], fault: Callable | None = None
    ) -> None:
        """A sabotaged continuation must be caught: a campaign that cannot fail shows nothing."""
        name = "dropout 0.1"
        self.begin(name)
        run = self.folder / f"control {what}"
        self.cut_off(name, run)
        if fault:
            fault(run / "checkpoint-10" / "adapter_model.safetensors")
        self.start(name, run, sabotage=sabotage).wait()
        found = self.compared(name, run) if read(run)["status"] == "succeeded" else refusal(run)
        caught = found["result"] != "exact"
        found |= {"result": "caught" if caught else "NOT CAUGHT"}
        self.add({"case": name, "kind": f"control: {what}", "kills": 1, **found}, run)

    def compared(self, name: str, run: Path) -> dict[str, Any]:
        """Whether a run is the undisturbed one, and what its interruptions cost."""
        if (status := read(run)["status"]) != "succeeded":
            return {"result": "failed", "why": f"{status}: {read(run)['reason']}"}
        found, expected = outcome(run), self.undisturbed[name]
        differing = [key for key in expected if found[key] != expected[key]]
        stops = read(run)["interruptions"]
        again = [stop["steps_done_again"] for stop in stops if stop["steps_done_again"] is not None]
        seconds = [
            stop["seconds_done_again"] for stop in stops if stop["seconds_done_again"] is not None
        ]
        return {
            "result": "DIFFERENT" if differing else "exact",
            "why": ", ".join(differing),
            "steps_again": sum(again),
            "seconds_again": round(sum(seconds), 3),
            "set_aside": sum(len(stop["set_aside"]) for stop in stops),
        }

    def add(self, line: dict[str, Any], run: Path) -> None:
        """Note a result; what went well is removed from the disk."""
        self.lines.append(line)
        good = line["result"] in ("exact", "refused", "caught")
        print(f"{line['case']}, {line['kind']}: {line['result']} {line.get('why', '')}", flush=True)
        if good:
            shutil.rmtree(run, ignore_errors=True)
            Path(f"{run}.log").unlink(missing_ok=True)
        else:
            print(f"  see {run} and {run}.log", flush=True)


def succeeded(run: Path) -> bool:
    """Whether a run says so; a damaged run.json is refused and stays as it is."""
    try:
        return read_run(run)["status"] == "succeeded"
    except ValueError:
        return False


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same."""
    record = read(run)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(("runtime", "_per_second"))]
    return {
        "adapter": file_hash(run / "adapter" / "adapter_model.safetensors"),
        "losses": record["losses"],
        "train_loss": record["measured"]["train_loss"],
        "validation_loss": record["measured"]["validation_loss"],
        "trainable_dtypes": record["ran"]["trainable_dtypes"],
        "curves": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags
        },
    }


def refusal(run: Path) -> dict[str, Any]:
    """A start that ended in one sentence was refused; with a traceback it failed."""
    said = Path(f"{run}.log").read_text()
    last = said.strip().splitlines()[-1]
    return {
        "result": "refused" if last.startswith("error: ") and "Traceback" not in said else "failed",
        "why": last,
    }


def no_random_states() -> None:
    """The random states are not restored."""
    transformers.Trainer._load_rng_state = lambda self, checkpoint: None


def no_verification() -> None:
    """A checkpoint is taken for whole without a look at its files."""
    manifest = sftlab.runs.checkpoint_manifest
    manifest.verify = manifest._read_manifest


def no_sums() -> None:
    """What has added up since the last log is not restored."""
    from sftlab.training.log_sums import TokenSums, TrainerSums

    TokenSums.restore = TrainerSums.restore = lambda self, state: None


CONTROLS = {
    "random states are not restored": (no_random_states,),
    "sums since the last log are not restored": (no_sums,),
    "a flipped bit, hashes not looked at": (no_verification, FAULTS[-1]),
}


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a case and kind."""
    rows = []
    for case, kind in dict.fromkeys((line["case"], line["kind"]) for line in lines):
        mine = [line for line in lines if (line["case"], line["kind"]) == (case, kind)]
        count = {
            result: sum(line["result"] == result for line in mine)
            for result in ("exact", "refused", "caught")
        }
        steps = [line["steps_again"] for line in mine if line.get("steps_again") is not None]
        row = {"case": case, "kind": kind, "trials": len(mine)}
        row |= {how: sum(line.get(how, 0) for line in mine) for how in ("kills", "signals")} | count
        row["otherwise"] = len(mine) - sum(count.values())
        row["steps_done_again"] = (
            f"{statistics.median(steps):g} [{min(steps)}, {max(steps)}]" if steps else ""
        )
        row["checkpoints_set_aside"] = sum(line.get("set_aside", 0) for line in mine)
        rows.append(row)
    keys = ("trials", "kills", "signals", "exact", "refused", "caught", "otherwise")
    whole = {key: sum(row[key] for row in rows) for key in keys}
    return [*rows, {"case": "all", "kind": "", **whole}]


def main(argv: list[str]) -> int:
    """Run it, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cases", nargs="+", default=list(CPU_CASES), choices=list(CASES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--trials", type=int, default=3, help="of every kind in every case")
    parser.add_argument(
        "--faults", type=int, help="how many broken files to try at most; all unless said"
    )
    parser.add_argument("--no_controls", action="store_true", help="leave sabotaged runs out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="no trial begins after these")
    parser.add_argument("--out", type=Path, help="folder for faults.csv")
    given = parser.parse_args(argv)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(folder, given.seed)
    about = provenance() | {"command": f"python tests/faults/campaign.py {' '.join(argv)}"}
    planned = [
        partial(campaign.trial, name, kind, number)
        for number in range(given.trials)
        for name in given.cases
        for kind in given.kinds
    ]
    if not given.no_controls:
        planned += [partial(campaign.control, what, *how) for what, how in CONTROLS.items()]
    broken = [name for name in ("one process", "DDP") if name in given.cases]
    planned += [one for name in broken for one in campaign.broken_files(name, given.faults)]
    for done, one in enumerate(planned):
        if time.monotonic() - began > given.seconds:
            print(
                f"{len(planned) - done} of {len(planned)} trials were not begun: "
                f"{given.seconds:.0f} s are over"
            )
            break
        one()
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            counted = summary(campaign.lines)[:-1]
            write_csv(given.out / "faults.csv", [row | about for row in counted])
    rows = summary(campaign.lines)
    print(
        "",
        aligned([list(rows[0]), *([str(row.get(key, "")) for key in rows[0]] for row in rows)]),
        sep="\n",
    )
    print(f"\n{time.monotonic() - began:.0f} s")
    if rows[-1]["otherwise"]:
        print(
            json.dumps(
                [
                    line
                    for line in campaign.lines
                    if line["result"] not in ("exact", "refused", "caught")
                ]
            )
        )
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
