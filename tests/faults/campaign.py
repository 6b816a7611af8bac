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
import shutil
import signal
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

from cases import CASES, CPU_CASES  # noqa: E402
from conftest import read  # noqa: E402
from controls import CONTROLS  # noqa: E402
from test_checkpoint import FAULTS  # noqa: E402
from undisturbed import UndisturbedRuns  # noqa: E402
from verdicts import outcome, refusal, succeeded, summary  # noqa: E402

from sftlab.runs.environment import provenance  # noqa: E402
from sftlab.tables import aligned, write_csv  # noqa: E402

KINDS = ("start-up", "steps", "saving", "sealing", "rotating", "final save", "signal")


class Campaign(UndisturbedRuns):
    """Trials against undisturbed runs, and what came out."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self.lines: list[dict[str, Any]] = []

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
