"""The Apptainer definition: its sections, and that it installs what requirements.txt says."""

import re
import shutil
import subprocess
import tomllib

import pytest
from conftest import ROOT

DEFINITION = ROOT / "slurm" / "sftlab.def"
SECTIONS = re.compile(r"^%(\w+)\n(.*?)(?=^%|\Z)", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    return dict(SECTIONS.findall(DEFINITION.read_text()))


def test_it_has_the_sections_that_apptainer_knows(sections):
    assert list(sections) == ["files", "post", "environment", "test", "runscript"]
    header = DEFINITION.read_text().partition("#")[0].split("\n")
    assert header[0] == "Bootstrap: docker"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert header[1] == f"From: python:{wanted.removeprefix('>=')}-slim"


def test_it_installs_the_versions_of_requirements_and_no_others(sections):
    for line in sections["files"].split("\n"):
        assert not line.strip() or (ROOT / line.split()[0]).is_file()
    assert "==" not in DEFINITION.read_text()
    assert "pip install --no-cache-dir -r /tmp/dependencies.txt" in sections["post"]
    last = (ROOT / "requirements.txt").read_text().splitlines()[-1]
    assert last == "-e ." and "grep -v '^-e '" in sections["post"]


@pytest.mark.parametrize("name", ["post", "environment", "test", "runscript"])
def test_its_scripts_are_shell(sections, name):
    done = subprocess.run(["sh", "-n"], input=sections[name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.skipif(shutil.which("apptainer") is None, reason="apptainer is not installed")
def test_apptainer_builds_it(tmp_path):
    command = ["apptainer", "build", str(tmp_path / "sftlab.sif"), str(DEFINITION)]
    subprocess.run(command, check=True, cwd=ROOT)
