"""Break one input after another, let the real scripts read it, and count how they end.

python tests/fuzz/campaign.py --out results/fuzz              (2,400 cases; make test-fuzz)
python tests/fuzz/campaign.py --only 17 --keep /tmp/case      (one case again, its folder kept)

A case breaks one input (cases.py) of a small world of valid ones (world.py) and runs the main of a
script that reads it, in a process forked from one that has imported the libraries. It must end
within 20 seconds of computing, by itself or with one sentence, and touch nothing but its own.
Everything is drawn from --seed. The exit status is 1 if anything came out otherwise.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "TENSORBOARD_LOGGING_DIR": ""}
# the package of this checkout, whichever one is installed
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))


import cases
import touched_files
import trials
import world
from conftest import ROOT

from sftlab.cpu_cores import cpu_cores
from sftlab.runs.environment import environment
from sftlab.tables import aligned, write_csv

GOOD = ("finished", "refused", "stopped")
BAD = ("traceback", "hang", "odd exit", "no sentence", "damage")


class Campaign:
    """The cases of a seed, a few at a time, and what came out."""

    def __init__(self, folder: Path, seed: int, keep: Path | None = None) -> None:
        self.folder, self.seed, self.keep = folder, seed, keep
        self.counts: Counter[tuple[str, str]] = Counter()
        self.findings: list[tuple[cases.Case, str, str]] = []
        self.running: dict[trials.Running, tuple[cases.Case, Path, dict, dict]] = {}
        self.seconds: Counter[str] = Counter()
        trials.load_mains()
        world.build(folder / "world", self._build_with)
        _write_commands(folder / "world" / "bin")

    def _build_with(self, script: str, argv: list[str]) -> None:
        work = self.folder / "world" / "work"
        process = trials.start(script, argv, work, self.folder / f"{script}.log")
        while (ended := process.ended()) is None:
            time.sleep(0.02)
        if ended.code:
            raise RuntimeError(f"{script} {' '.join(argv)} fails unbroken: {ended.said[-3000:]}")

    def run(self, numbers: list[int], jobs: int, seconds: float) -> None:
        """Run cases, `jobs` at a time; none begins after `seconds`."""
        waiting, began = list(reversed(numbers)), time.monotonic()
        while waiting or self.running:
            if time.monotonic() - began > seconds:
                waiting.clear()
            while waiting and len(self.running) < jobs:
                self._begin(waiting.pop())
            self._collect()
            time.sleep(0.005)

    def _begin(self, number: int) -> None:
        place = self.folder / f"case-{number}"
        cases.copy_world(self.folder / "world", place)
        case = cases.prepare(self.seed, number, place)
        before = touched_files.seen(place)
        hashes = {
            path: touched_files.digest(place / path)
            for path in before
            if path.removeprefix("work/").startswith(touched_files.KEPT)
            and (place / path).is_file()
        }
        log = self.folder / f"case-{number}.log"
        process = trials.start(case.script, case.argv, place / "work", log)
        self.running[process] = (case, place, before, hashes)

    def _collect(self) -> None:
        for process in list(self.running):
            if (ended := process.ended()) is None:
                continue
            case, place, before, hashes = self.running.pop(process)
            damaged = touched_files.damage(case.script, ended.code, place, before, hashes)
            kind, what = trials.outcome(ended, damaged, place / "work")
            self.counts[case.border, kind] += 1
            self.seconds[case.script] += ended.seconds
            if kind in BAD:
                self.findings.append((case, kind, what))
                print(f"{case.number} {case.border}, {case.script}: {kind}: {what}", flush=True)
            if self.keep:
                print(f"{case}\n{ended}\nkept in {place}")
            else:
                touched_files.clean(place)
                process.log.unlink()

    def rows(self) -> list[dict[str, object]]:
        """Returns a row a border, with a count of each outcome, and a row for all."""
        borders = sorted({border for border, _ in self.counts})
        counts = [{kind: self.counts[border, kind] for kind in GOOD + BAD} for border in borders]
        counts.append({kind: sum(one[kind] for one in counts) for kind in GOOD + BAD})
        return [
            {"border": border, "cases": sum(one.values())} | one
            for border, one in zip([*borders, "all"], counts, strict=True)
        ]

    def said(self) -> str:
        """Returns the findings by kind: script, what went wrong, how often, and the cases."""
        groups: dict[tuple[str, str, str], list[cases.Case]] = {}
        for case, kind, what in self.findings:
            groups.setdefault((case.script, kind, what), []).append(case)
        lines = []
        for (script, kind, what), found in sorted(groups.items(), key=lambda one: -len(one[1])):
            borders = ", ".join(sorted({case.border for case in found}))
            numbers = ", ".join(str(case.number) for case in found[:6])
            lines.append(
                f"- {len(found)} x {script} [{borders}] {kind}: {what} (cases {numbers}; first: "
                f"{found[0].done}, {' '.join(found[0].argv)[:300]})"
            )
        return "\n".join(lines)


def _write_commands(folder: Path) -> None:
    """Stand-ins for Slurm's commands and for launches of a study, so that no case starts one."""
    folder.mkdir()
    for name, said in (("srun", ""), ("scontrol", "n1 NodeAddr=127.0.0.1 JobState=RUNNING")):
        (folder / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (folder / name).chmod(0o755)
    for name in ("sbatch", "scancel", "squeue", "python"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)


def commit() -> str:
    """Returns the commit that was tested; a + says that files were changed."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout else "")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=cpu_cores())
    parser.add_argument("--quick", action="store_true", help="few of the cases take a second")
    parser.add_argument("--seconds", type=float, default=1e9, help="no case begins after these")
    parser.add_argument("--only", type=int, nargs="+", help="these cases alone")
    parser.add_argument("--keep", type=Path, help="the folder to work in, which is kept")
    parser.add_argument("--findings", type=Path, help="file for what went wrong, by kind")
    parser.add_argument("--commit", help="the commit that is tested (default: asked of git)")
    parser.add_argument("--out", type=Path, help="folder for fuzz.csv")
    given = parser.parse_args(argv)
    tested = given.commit or commit()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "world").mkdir(parents=True)
    try:
        campaign = Campaign(folder, given.seed, given.keep)
        chosen = given.only or cases.numbers(given.seed, given.cases, given.quick)
        campaign.run(chosen, given.jobs, given.seconds)
    finally:
        if not given.keep:
            touched_files.clean(folder)
    rows = campaign.rows()
    print()
    print(aligned([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]))
    used = ", ".join(f"{script} {s:.0f}" for script, s in campaign.seconds.most_common())
    print(f"\ncommit {tested}, seed {given.seed}; seconds of computing: {used}")
    if given.findings:
        given.findings.write_text(f"commit {tested}, seed {given.seed}\n\n{campaign.said()}\n")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        about = {"seed": given.seed, "commit": tested, "day": date.today().isoformat()}
        found = environment()
        about["hardware"] = "{cpu_cores} CPU cores, {machine}".format(**found["hardware"])
        about["versions"] = " ".join(f"{k} {v}" for k, v in found["versions"].items())
        write_csv(given.out / "fuzz.csv", [row | about for row in rows])
    return int(bool(campaign.findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
