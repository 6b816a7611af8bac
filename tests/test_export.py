"""An export answers as the run that it was made from, or is not made."""

import copy
import json
import shutil
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest
import torch
from conftest import copy_of, load_script, read
from gguf import GGUFReader
from peft import AutoPeftModelForCausalLM
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sftlab.data.chat_template import prompt_ids, set_template
from sftlab.evaluation.base_and_tuned import finished_run, load_pair
from sftlab.export.formats import refuse_for_vllm
from sftlab.export.gguf_file import (
    ends_of,
    read_gguf,
    read_tokenizer,
    refuse_unwritable,
    write_gguf,
)
from sftlab.models.demo import train_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
QUESTION = [{"role": "user", "content": "Repeat the number 7 in words."}]


@pytest.fixture(scope="module")
def script():
    return load_script("recipes/export.py")


@pytest.fixture
def exported(script, finished, tmp_path):
    """Exports the finished run; returns the folder."""

    def export(kind, *more):
        out = tmp_path / "exports" / kind
        script.main(
            ["--run", str(finished[0]), "--to", kind, "--out", str(out), "--prompts", "8", *more]
        )
        return out

    return export


def test_a_run_in_bfloat16_over_a_base_in_float32_is_exported(script, finished, tmp_path):
    run = copy_of(finished[0], tmp_path / "run")
    record = read(run)
    record["recipe"]["dtype"] = "bfloat16"
    (run / "run.json").write_text(json.dumps(record))
    out = tmp_path / "out"
    script.main(["--run", str(run), "--to", "merged", "--out", str(out), "--prompts", "8"])
    verified = json.loads((out / "verified.json").read_text())
    assert (verified["dtype"], verified["tolerance_nats"]) == ("float32", 0.05)
    assert verified["nats"] > 1e-4, "the run's own rounding"


def logits(model, tokenizer):
    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(("kind", "near"), [("merged", 1e-4), ("adapter", 1e-6)])
def test_what_is_exported_answers_as_the_run(exported, finished, monkeypatch, kind, near, tmp_path):
    out = exported(kind)
    monkeypatch.chdir(tmp_path)  # from any folder
    loader = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    model = loader.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tuned = load_pair(finished[0], finished_run(finished[0]))
    expected = logits(tuned, AutoTokenizer.from_pretrained(finished[0] / "adapter"))
    assert (logits(model, tokenizer) - expected).abs().max() < near
    with tuned.disable_adapter():
        base = logits(tuned, AutoTokenizer.from_pretrained(finished[0] / "adapter"))
    assert (base - expected).abs().max() > 5 * near, "the run changed too little to tell"
    verified = json.loads((out / "verified.json").read_text())
    assert (verified["prompts"], verified["differs"]) == (8, None)
    card = (out / "README.md").read_text()
    assert "More Information Needed" not in card and "rank 16, alpha 32" in card
    assert [path.name for path in out.parent.iterdir()] == [kind], "nothing is left beside it"


def test_an_export_replaces_nothing(exported, tmp_path):
    (tmp_path / "exports" / "merged").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is there already"):
        exported("merged")


@pytest.mark.parametrize("scores", ["many", {"bleu": 5}, {"bleu": None}])
def test_a_damaged_evaluation_is_named_before_a_model_card_shows_it(
    script, scores, tmp_path, monkeypatch
):
    (tmp_path / "eval").mkdir()
    monkeypatch.setattr(script, "adapter_hash", lambda folder: "a")
    found = {"adapter_hash": "a", "scores": scores}
    (tmp_path / "eval" / "quality.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"quality\.json"):
        script.quality_of(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: run.pop("ran"), "has no ran, expected an object"),
        (lambda run: run["recipe"].pop("lora_alpha"), "has no recipe.lora_alpha"),
        (lambda run: run["data"].update(validation="x"), "has no data.validation.rows"),
        (lambda run: run["measured"].update(global_step="x"), "measured.global_step is"),
    ],
)
def test_a_damaged_record_is_named_before_anything_is_written(
    script, finished, tmp_path, damage, said
):
    folder, out = copy_of(finished[0], tmp_path / "run"), tmp_path / "out"
    run = read(folder)
    damage(run)
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match=said):
        script.main(["--run", str(folder), "--to", "merged", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("kind", ["adapter", "gguf"])
def test_a_dtype_of_what_is_not_merged_is_refused(script, finished, tmp_path, capsys, kind):
    words = ["--run", str(finished[0]), "--to", kind, "--out", str(tmp_path / kind)]
    with pytest.raises(SystemExit):
        script.main([*words, "--dtype", "float16"])
    assert "--dtype is of merged weights" in capsys.readouterr().err
    assert not (tmp_path / kind).exists()


def test_an_export_goes_beside_its_run(script, finished):
    out = finished[0] / "adapter" / "export"
    with pytest.raises(SystemExit, match="is inside the run"):
        script.main(["--run", str(finished[0]), "--to", "adapter", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "it holds whole modules"),
        ({"bias": "all"}, "it has biases"),
        ({"r": 1024}, "its rank is 1024"),
        ({"rank_pattern": {"q_proj": 600}}, "its rank is 600"),
    ],
)
def test_what_vllm_does_not_serve_is_refused(finished, tmp_path, change, said):
    adapter = shutil.copytree(finished[0] / "adapter", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    assert refuse_for_vllm(adapter) == 16
    path.write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=f"{said}.*--to merged"):
        refuse_for_vllm(adapter)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "r"}))
    assert refuse_for_vllm(adapter) == 8, "peft's rank where none is named"


@pytest.fixture(scope="module")
def words():
    """A byte-level BPE tokenizer with merges, and the instruction template."""
    tokenizer = train_tokenizer([f"Repeat the number {i} in words." for i in range(50)], 300)
    set_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize(("kind", "near"), [("f32", 1e-5), ("f16", 0.01), ("q8_0", 0.3)])
@pytest.mark.parametrize(
    ("config_class", "model_class", "more"),
    [
        (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
        (Qwen2Config, Qwen2ForCausalLM, {}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
    ],
    ids=["tied", "llama3", "qwen2", "qwen3"],
)
def test_a_gguf_file_is_the_model(words, tmp_path, config_class, model_class, more, kind, near):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = config_class(**sizes, **heads, **ends, max_position_embeddings=4096, **more)
    model = model_class(config)
    write_gguf(model, words, tmp_path / "x.gguf", kind, [words.eos_token_id])
    found = read_gguf(tmp_path / "x.gguf", config)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert prompt_ids(again, QUESTION) == prompt_ids(words, QUESTION)
    assert (logits(found, again) - logits(model, words)).abs().max() < near
    assert ends_of(tmp_path / "x.gguf") == [words.eos_token_id]


LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def by(pattern):
    split = pre_tokenizers.Split(Regex(LETTERS + pattern + REST), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (pre_tokenizers.ByteLevel(False), "gpt-2"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
            "smollm",
        ),
        (by(r"\p{N}{1,3}"), "llama-bpe"),
        (by(r"\p{N}"), "qwen2"),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2"],
)
def test_numbers_and_blanks_of_a_gguf_file_are_split_by_the_rule_that_it_names(
    tmp_path, rule, name
):
    texts = [f"Add  {i}  and {7 * i}, it's 123456.\n\n  {i}" for i in range(300)]
    words = train_tokenizer(texts, 600)
    set_template(words)
    words.backend_tokenizer.pre_tokenizer = rule
    config = LlamaConfig(
        vocab_size=640, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    write_gguf(LlamaForCausalLM(config), words, tmp_path / "x.gguf", "f16", [words.eos_token_id])
    pre = GGUFReader(tmp_path / "x.gguf").get_field("tokenizer.ggml.pre")
    assert pre.contents() == name
    again = read_tokenizer(tmp_path / "x.gguf", words)
    for text in texts[:20]:
        assert again(text).input_ids == words(text).input_ids
    other = copy.deepcopy(words)
    other.backend_tokenizer.pre_tokenizer = by(r"\p{N}{1,2}")
    with pytest.raises(ValueError, match="no byte-level BPE that GGUF has a name for"):
        read_tokenizer(tmp_path / "x.gguf", other)


def test_the_divisors_of_llama_3_are_those_of_transformers(words, tmp_path):
    config = LlamaConfig(
        rope_parameters=LLAMA3_ROPE,
        num_hidden_layers=1,
        vocab_size=320,
        hidden_size=256,
        num_attention_heads=2,
    )
    plain = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    write_gguf(LlamaForCausalLM(config), words, tmp_path / "x.gguf", "f16", [])
    [factors] = [
        t for t in GGUFReader(tmp_path / "x.gguf").tensors if t.name == "rope_freqs.weight"
    ]
    scaled, whole = (LlamaRotaryEmbedding(c).inv_freq for c in (config, plain))
    assert torch.allclose(torch.tensor(factors.data), whole / scaled, rtol=1e-4)


def test_what_gguf_has_no_name_for_is_refused(tokenizer, words):
    llama = LlamaConfig()
    with pytest.raises(ValueError, match="is no byte-level BPE that GGUF has a name for"):
        refuse_unwritable(llama, tokenizer)  # it has no merges
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ValueError, match="rope scaling 'yarn'"):
        refuse_unwritable(LlamaConfig(rope_parameters=yarn), words)
    refuse_unwritable(llama, words)
    with pytest.raises(ValueError, match="a gpt2 model is not written as GGUF"):
        refuse_unwritable(GPT2Config(), tokenizer)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; keeps the paths of what was committed."""

    committed: list[str] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            Hub.committed += [one["value"]["path"] for one in lines if one["key"] == "file"]
            url = f"http://{self.headers['Host']}/ann/mine/commit/1"
            return self.answer({"commitUrl": url, "commitOid": "1", "hookOutput": ""})
        return self.answer({"url": f"http://{self.headers['Host']}/ann/mine"})

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


def test_an_export_is_uploaded(script, exported, monkeypatch, capsys):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    out = exported("adapter", "--push", "ann/mine")
    server.shutdown()
    assert sorted(Hub.committed) == sorted(path.name for path in out.iterdir())
    assert "uploaded: " in capsys.readouterr().out


def test_an_upload_that_fails_keeps_the_export(script, exported, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="is made, and was not uploaded to ann/mine") as stopped:
        exported("adapter", "--push", "ann/mine")
    out = tmp_path / "exports" / "adapter"
    assert (out / "adapter_model.safetensors").is_file()
    said = str(stopped.value)
    assert said.endswith(f"unset HF_HUB_OFFLINE, then `hf upload ann/mine {out}`")
    assert "hf auth login" not in said
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def refused(*_, **__):
        raise OSError("the token is not valid.")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    with pytest.raises(ValueError, match=r"not valid\. Log in .* 'a b' --private`$"):
        script.push(Path("a b"), "ann/mine", private=True)


@pytest.mark.parametrize(
    "name", ["nouser", "ann/", "/mine", "a/b/c", "ann/my model", "ann/-x", "a/b--c"]
)
def test_a_repository_is_a_user_and_a_name(script, name, capsys):
    words = ["--run", "runs/none", "--to", "adapter", "--out", "x", "--push", name]
    with pytest.raises(SystemExit):
        script.main(words)
    assert f"--push {name}: expected USER/NAME" in capsys.readouterr().err
    assert script.parse_arguments([*words[:-1], "ann/My-model.v1_2"]).push == "ann/My-model.v1_2"
