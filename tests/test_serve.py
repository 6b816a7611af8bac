"""A run is served by vLLM: the command, what it refuses, and a real vLLM where there is one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import httpx
import pytest
from conftest import ROOT, load_script, write_base
from serving import free_port

from sftlab.files import write_json

# Stands in for vLLM: writes down what it was given, and ends with the status in STATUS.
RECORDER = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--generation-config") + 1])
seen = {{"words": words, "key": os.environ.get("VLLM_API_KEY")}}
seen["files"] = {{path.name: path.read_text() for path in folder.iterdir()}}
pathlib.Path(os.environ["SEEN"]).write_text(json.dumps(seen))
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture(scope="module")
def script():
    return load_script("app/serve.py")


@pytest.fixture
def serve(script, run, tmp_path, monkeypatch, handlers):
    """Serves the run; returns what the stand-in was given."""
    program, seen = tmp_path / "vllm", tmp_path / "seen.json"
    program.write_text(RECORDER.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("SFTLAB_VLLM", str(program))
    monkeypatch.setenv("SEEN", str(seen))
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def serve(*more):
        script.main(["--run", str(run), *more])
        return json.loads(seen.read_text())

    return serve


def test_base_and_adapter_are_served_side_by_side(serve, run, base, capsys):
    seen = serve("--port", "8123", "--", "--max-model-len", "256")
    words, template = seen["words"], (run / "adapter" / "chat_template.jinja").read_text()
    assert words[:4] == ["serve", str(base), "--served-model-name", "base"]
    given = dict(pairwise(words))
    assert given["--lora-modules"] == f"tuned={run / 'adapter'}"
    assert (given["--max-lora-rank"], given["--dtype"]) == ("8", "float32")
    layers = words.index("--lora-target-modules") + 1
    assert words[layers : layers + 3] == ["q_proj", "v_proj", "--chat-template"]
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "8123")
    assert words[-2:] == ["--max-model-len", "256"]
    assert seen["files"]["chat_template.jinja"] == template
    assert 257 in json.loads(seen["files"]["generation_config.json"])["eos_token_id"]
    assert "--verify_server http://127.0.0.1:8123/v1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_never_on_the_command_line(serve, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "sk-of-a-test")
    seen = serve("--host", "0.0.0.0")
    assert seen["key"] == "sk-of-a-test"
    assert "sk-of-a-test" not in " ".join(seen["words"]) + capsys.readouterr().out


def test_what_cannot_be_served_is_refused(script, serve, run, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="lets other machines in: set VLLM_API_KEY"):
        serve("--host", "0.0.0.0")
    with pytest.raises(ValueError, match="there is no program nowhere/vllm: install vLLM"):
        serve("--vllm", "nowhere/vllm")
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(SystemExit, match="vLLM ended with status 3; its own lines above"):
        serve()
    shared = (run / "adapter").resolve()
    (run / "adapter").unlink()
    path = shutil.copytree(shared, run / "adapter") / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"use_dora": True})
    with pytest.raises(ValueError, match=r"does not serve the adapter .* DoRA.*--to merged"):
        serve("--vllm", "nowhere/vllm")
    whole = json.loads((run / "run.json").read_text())
    whole["recipe"] |= {"use_peft": False}
    monkeypatch.setattr(script, "finished_run", lambda folder: whole)
    with pytest.raises(ValueError, match=r"is full fine-tuning.* --to merged"):
        serve("--vllm", "nowhere/vllm")


@pytest.mark.vllm
@pytest.mark.skipif(
    shutil.which(os.environ.get("SFTLAB_VLLM", "vllm")) is None,
    reason="no vLLM: set SFTLAB_VLLM to the vllm program of its environment",
)
def test_a_real_vllm_answers_as_the_run(fields, trained_here, tmp_path):
    """Served with both names, it is held to the run; asked as tuned by base's name it is not."""
    run, port, log = tmp_path / "run", free_port(), tmp_path / "vllm.log"
    write_base(tmp_path / "base", head_dim=32)  # vLLM's attention on a CPU takes no smaller heads
    trained_here({**fields, "model_name_or_path": str(tmp_path / "base")})
    words = ["app/serve.py", "--run", str(run), "--port", str(port), "--", "--enforce-eager"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=out, stderr=out
        )
    try:
        wait_for(f"{url}/health", server, log)
        export = load_script("recipes/export.py")
        asked = ["--run", str(run), "--verify_server", f"{url}/v1", "--prompts", "8"]
        export.main(asked)
        with pytest.raises(SystemExit, match="the weights are not the run's"):
            export.main([*asked, "--server_model", "base"])
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_for(url, server, log):
    """Wait until the server answers; on busy cores its imports take minutes."""
    for _ in range(1200):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url).is_success:
                return
        except httpx.HTTPError:
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])
