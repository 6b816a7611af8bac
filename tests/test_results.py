"""results/README.md and the plots say what the committed tables say."""

import re
from collections.abc import Iterator

import pytest
from conftest import ROOT, load_script

from sftlab.tables import read_csv

RESULTS = ROOT / "results"
FOLDERS = sorted({path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.csv")})
NAMES = ("folder", "question", "hardware", "headline", "measured", "command")


def rows() -> dict[str, dict[str, str]]:
    """The rows of all tables of results/README.md, by folder."""
    found = {}
    for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ["):
            row = dict(zip(NAMES, line.strip("| ").split(" | "), strict=True))
            folder = re.fullmatch(r"\[(.+)\]\((.+)\)", row["folder"])
            assert folder and folder[1] == folder[2] not in found, line
            found[folder[1]] = row
    return found


def numbers(folder: str) -> Iterator[float]:
    """All figures in the tables of a folder."""
    for path in (RESULTS / folder).glob("*.csv"):
        for row in read_csv(path):
            yield from (float(v) for v in row.values() if re.fullmatch(r"-?\d+(\.\d+)?", v or ""))


def test_every_measurement_has_a_row():
    assert sorted(rows()) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_headline_figures_are_in_the_table(folder):
    row = rows()[folder]
    for figure in re.findall(r"\*\*(.+?)\*\*", row["headline"]):
        digits = len(figure.partition(".")[2])
        shown = (f"{number:,.{digits}f}" for number in numbers(folder))
        assert figure in shown, (folder, figure)
    assert "**" in row["headline"] or folder in ("plan_accuracy", "faults")


@pytest.mark.parametrize("folder", FOLDERS)
def test_hardware_and_command_are_those_of_the_measurement(folder):
    row = rows()[folder]
    texts = [path.read_text(encoding="utf-8") for path in (RESULTS / folder).glob("*.*[dv]")]
    for device in row["hardware"].replace(" (2)", "").split("; "):
        assert any(device.removesuffix("s") in text for text in texts), (folder, device)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["measured"])
    study = RESULTS / folder / "study.md"
    if study.is_file():
        assert row["command"].strip("`") in study.read_text(encoding="utf-8")
    scripts = re.findall(r"[\w./]+/\w+\.(?:py|yaml)\b", row["command"])
    assert scripts or row["command"] == "`make results`"
    assert all((ROOT / name).is_file() for name in scripts), scripts


@pytest.mark.parametrize("folder", FOLDERS)
def test_commands_in_the_tables_name_scripts_that_exist(folder):
    commands = {
        row["command"]
        for path in (RESULTS / folder).glob("*.csv")
        for row in read_csv(path)
        if row.get("command")
    }
    for command in commands:
        script = re.search(r"\S+\.py\b", command)
        assert script and (ROOT / script[0]).is_file(), command


def test_headlines_that_count_rows():
    headlines = {name: row["headline"] for name, row in rows().items()}

    faults = read_csv(RESULTS / "faults" / "faults.csv")
    exact, caught, trials = (
        sum(int(row[name]) for row in faults) for name in ("exact", "caught", "trials")
    )
    assert f"{exact} of {trials - caught} trials" in headlines["faults"]
    assert f"{caught} of 3 sabotaged" in headlines["faults"]

    cases = read_csv(RESULTS / "resume_on_gpus" / "resume_on_gpus.csv")
    cases = [row for row in cases if row["what"] == "continuation"]
    for sort, words in ((True, "deterministic cases"), (False, "others")):
        results = [row["result"] for row in cases if ("deterministic" in row["case"]) is sort]
        same = results.count("same adapter")
        assert f"{same} of {len(results)} {words}" in headlines["resume_on_gpus"]

    launches = [row["status"] for row in read_csv(RESULTS / "launch_matrix" / "launch_matrix.csv")]
    succeeded = f"{launches.count('succeeded')} of {len(launches)} launches succeeded"
    assert succeeded in headlines["launch_matrix"]

    cells = read_csv(RESULTS / "plan_accuracy" / "plan_accuracy.csv")
    counts = []
    for gpu in ("H200", "H100"):
        for name, limit in (("memory_error", 0.05), ("speed_error", 0.15)):
            errors = [abs(float(x[name])) for x in cells if gpu in x["hardware"] and x[name]]
            counts.append(f"{sum(error <= limit for error in errors)} of {len(errors)}")
    assert re.findall(r"\d+ of \d+", headlines["plan_accuracy"]) == counts


def test_every_variant_is_drawn():
    variants = load_script("benchmarks/throughput.py").EVERY
    groups = load_script("benchmarks/draw.py").GROUPS
    assert {name for group in groups.values() for name in group} == set(variants)


def test_a_group_is_drawn_whole_from_one_table_the_fastest_on_top():
    draw = load_script("benchmarks/draw.py")

    def row(variant: str, speed: int) -> dict[str, str]:
        figures = {name: str(speed) for name in ("tokens_per_s", "lowest", "highest")}
        about = {"share_of_limit": "0.5", "repeats": "3", "hardware": "a GPU"}
        return {"variant": variant, **figures, **about}

    one = [row("sft.py bf16", 10), row("trl bf16", 5), row("published loop, fp32", 3)]
    one.append(row("trl bf16, compiled", 7))
    other = [row("published loop, fp32", 4), row("sft.py fp32, 20 rows", 8)]
    figure = draw.draw_throughput(one, other)
    shown = [
        (
            [label.get_text() for label in panel.get_yticklabels()],
            [b.get_width() for b in panel.patches],
        )
        for panel in figure.axes
    ]
    names = ["sft.py, bf16, 32 rows", "trl, bf16, compiled, 20 rows", "trl, bf16, 20 rows"]
    assert shown[0] == (names, [10, 7, 5])
    assert shown[1:] == [(["sft.py, fp32, 20 rows", "published loop, fp32, 20 rows"], [8, 4])]
    colours = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert colours[0] != colours[1] == colours[2]


def test_the_recipes_table_is_that_of_the_demo_s_runs():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.partition("<!-- recipes:")[2].partition("<!-- end of recipes -->")[0].splitlines()
    runs = {row["run"]: row for row in read_csv(RESULTS / "demo" / "runs.csv")}
    assert {f"demo-{path.stem}" for path in (ROOT / "recipes" / "demo").glob("*.yaml")} == set(runs)
    for name, row in runs.items():
        start = f"| {name.removeprefix('demo-')} |"
        (line,) = (line for line in table if line.startswith(start))
        assert f"{float(row['tokens_per_s']):,.0f}" in line
        assert f"{float(row['tuned bleu']):.4g} [" in line
