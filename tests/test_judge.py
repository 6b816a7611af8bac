"""Judges: a local model, a server, alpaca-eval's annotators.

What is cut, what is kept, what a dead server leaves.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas
import pytest
from conftest import SHARED, byte_tokenizer, needs_shared
from judging import ScriptedJudge, longer_output, no_hub
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.data.chat_template import set_template
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.judging import judges as judging
from sftlab.judging.alpaca_annotators import Annotators, official
from sftlab.judging.alpaca_files import read_outputs, read_preferences
from sftlab.judging.asking import CUT, ask, longest_fitting
from sftlab.judging.judge_formats import load_format
from sftlab.judging.judgement_files import judgement_hashes
from sftlab.judging.judges import LocalJudge, ServerJudge
from sftlab.judging.length_control import alpaca_metrics, length_controlled
from sftlab.judging.pairwise import Pair, judge_pairs, score, tally
from sftlab.judging.sanity_checks import SanityChecks
from sftlab.runs.run_directory import SIDES

PLAIN = [{"role": "user", "content": "Which is better?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a random judge of 1,024 positions with a chat template."""
    folder = tmp_path_factory.mktemp("judge") / "random"
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    set_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prompt(text):
    return [{"role": "user", "content": text}]


def test_a_local_judge_loads_its_weights_when_it_is_first_asked(model, tmp_path):
    judge = LocalJudge(model, 8)
    assert judge.room == 1024 - 8
    assert "_model" not in vars(judge)
    prompts = [prompt("x" * n) for n in (5, 50, 5)]
    file = AnswerFile(tmp_path, judge.facts, kind="verdicts")
    first = ask(judge, prompts, file, 2, "judging")
    assert all(0 < one.tokens <= 8 for one in first)
    assert first[0] == first[2]
    assert len(file.found) == 2
    again = LocalJudge(model, 8)
    assert (
        ask(again, prompts, AnswerFile(tmp_path, again.facts, kind="verdicts"), 2, "judging")
        == first
    )
    assert "_model" not in vars(again)
    assert [LocalJudge(model, 8).answers([one])[0] for one in prompts] == first


def test_other_weights_are_another_judge(model, tmp_path):
    before = LocalJudge(model, 8).facts
    LlamaForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert LocalJudge(str(tmp_path / "other"), 8).facts["weights"] == before["weights"]
    (tmp_path / "other" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert LocalJudge(str(tmp_path / "other"), 8).facts["weights"] != before["weights"]


@pytest.mark.parametrize("system", ["{{ raise_exception('no system') }}", ""])
def test_a_template_without_a_place_for_a_system_prompt_gets_it_in_the_users_turn(model, system):
    judge = LocalJudge(model, 8)
    judge.tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'system' %}}{system}{{% else %}}{{{{ m.content "
        f"}}}}{{% endif %}}"
        "{% endfor %}"
    )
    messages = load_format("fastchat").messages("turn_1", question_1="q", answer_1="a")
    text = judge.tokenizer.decode(judge._ids(messages))
    assert text.startswith("You are a helpful assistant.\n\n[Instruction]")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("template", "has no chat template, so it cannot be asked"),
        ("nothing", "cannot be loaded"),
        ("room", "leaves the judge .* no room for a prompt: it has 1024 positions"),
    ],
)
def test_a_judge_that_cannot_judge_is_one_sentence(model, tmp_path, broken, message):
    folder, new_tokens = model, 8
    if broken == "template":
        LlamaForCausalLM.from_pretrained(model).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        folder = str(tmp_path)
    if broken == "nothing":
        folder = str(tmp_path / "nothing")
    if broken == "room":
        new_tokens = 1024
    with pytest.raises(ValueError, match=message) as error:
        LocalJudge(folder, new_tokens)
    assert "\n" not in str(error.value)


def test_answers_beyond_the_judges_context_are_cut_from_the_middle(model):
    judge = LocalJudge(model, 24)
    texts = {"a": "start" + "x" * 3000 + "end", "b": "short"}

    def build(kept):
        return prompt(f"Compare: {kept['a']} and {kept['b']}")

    messages, cut = longest_fitting(judge, build, texts)
    assert judge.room - 60 < judge.size(messages) <= judge.room
    head, _, tail = messages[0]["content"].partition(CUT)
    assert head.startswith("Compare: startxxx")
    assert tail.endswith("xxxend and short")
    assert cut == len(texts["a"]) - (len(head) - len("Compare: ")) - (len(tail) - len(" and short"))
    assert longest_fitting(judge, build, {"a": "x", "b": "y"}) == (build({"a": "x", "b": "y"}), 0)
    with pytest.raises(
        ValueError, match="room for prompts of 1000 tokens, and one without its answers has"
    ):
        longest_fitting(judge, lambda kept: prompt("x" * 2000 + kept["a"]), {"a": "y"})


def test_what_was_cut_is_counted_in_the_record(tmp_path):
    judge = ScriptedJudge(lambda *_: "[RESULT] A")
    judge.room = 3000
    style = load_format("prometheus")
    pairs = [Pair(0, "q", "x" * 4000, "y" * 10), Pair(1, "q", "x", "y")]
    file = AnswerFile(tmp_path, {}, kind="verdicts")
    long, short = judge_pairs(judge, style, pairs, file, 4, "judging")
    assert long["characters_cut"] > 1000
    assert short["characters_cut"] == 0
    assert all(CUT in one[0]["content"] for one in long["prompts"])
    assert long["answer"] == "x" * 4000


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ("AB", 1),
        ("BA", 0),
        ("AA", 0.5),
        ("BB", 0.5),
        ("CC", 0.5),
        ("AC", 0.5),
        ("CB", 0.5),
        ("A-", None),
        ("--", None),
    ],
)
def test_two_orders_make_one_score(verdicts, expected):
    assert score([None if one == "-" else one for one in verdicts]) == expected


@pytest.mark.parametrize(
    ("wins", "losses", "passed"), [(30, 10, False), (24, 16, True), (0, 0, True), (10, 30, False)]
)
def test_one_model_that_beats_itself_too_often_fails_the_judge(wins, losses, passed):
    scores = [1.0] * wins + [0.0] * losses + [0.5] * (40 - wins - losses)
    letters = {1.0: ["A", "B"], 0.0: ["B", "A"], 0.5: ["A", "A"]}
    records = [
        {
            "row": 0,
            "answer": "x",
            "score": one,
            "verdicts": letters[one],
            "contradictions": [False] * 2,
            "characters_cut": 0,
        }
        for one in scores
    ]
    checks = SanityChecks(lambda pairs, title: records)
    checks.noise_floor([])
    assert (checks.rows[0]["passed"], checks.fit) == (passed, passed)
    assert checks.rows[0]["value"] == sum(scores) / 40


def test_two_models_with_the_same_judgements_stop_it():
    records = {
        side: [{"answer": f"{side} {i}", "judgements": ["[RESULT] A"] * 2} for i in range(3)]
        for side in SIDES
    }
    assert len(set(judgement_hashes(records, "answer", "judgements").values())) == 2
    with pytest.raises(ValueError, match="base and tuned have the same judgements"):
        judgement_hashes(records | {"tuned": records["base"]}, "answer", "judgements")


class Server:
    """An OpenAI-compatible server on a thread; from `dies_at` requests on it answers 500."""

    def __init__(self, dies_at=10**6, refuses=None, garbles=None):
        self.requests, outer = [], self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, content):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.reply(
                    200,
                    {
                        "object": "list",
                        "data": [{"id": "m", "object": "model", "max_model_len": 400}],
                    },
                )

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(asked)
                if refuses:
                    self.reply(400, {"error": {"message": refuses}})
                elif garbles is not None and asked["messages"][0]["content"] == "garble":
                    self.reply(200, garbles)
                elif len(outer.requests) > dies_at:
                    self.reply(500, {"error": {"message": "out of order"}})
                else:
                    text = f" judged {asked['messages'][0]['content']} [RESULT] A"
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
                    top = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
                    self.reply(200, {**top, "choices": [choice], "usage": usage})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_a_server_is_asked_greedily_and_its_context_is_its_own(monkeypatch):
    with Server() as server:
        judge = ServerJudge("m", server.url, 100)
        assert judge.room == 300
        assert judge.size(prompt("x" * 30)) == 10
        texts = [one.text for one in judge.answers([prompt("one"), prompt("two")])]
        assert texts == ["judged one [RESULT] A", "judged two [RESULT] A"]
        assert {
            (one["temperature"], one["max_tokens"], one["model"]) for one in server.requests
        } == {(0, 100, "m")}
        with pytest.raises(ValueError, match="has no model 'other': it has m"):
            ServerJudge("other", server.url, 100)
        assert ServerJudge("m", "http://127.0.0.1:1/v1", 100, context=200).room == 100


def test_a_server_that_dies_in_the_middle_leaves_everything_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    prompts = [prompt(f"prompt {i}") for i in range(8)]
    with Server(dies_at=5) as server:
        judge = ServerJudge("m", server.url, 100)
        file = AnswerFile(tmp_path, judge.facts, kind="verdicts")
        with pytest.raises(
            ValueError, match="does not answer, tried 2 times: judgements are kept"
        ) as error:
            ask(judge, prompts, file, 2, "judging")
        assert "\n" not in str(error.value)
        assert len(file.found) == 5  # the batch that it died in too
        assert len(server.requests) == 5 + 2
    with pytest.raises(ValueError, match="does not answer"):
        ask(judge, prompts, file, 2, "judging")
    with Server() as server:
        judge = ServerJudge("m", server.url, 100)
        again = AnswerFile(tmp_path, {"server": "another"}, kind="verdicts")
        again.found.update(file.found)
        assert len(ask(judge, prompts, again, 2, "judging")) == 8
        assert len(server.requests) == 3


def test_a_server_that_refuses_says_why():
    with (
        Server(refuses="too long for me") as server,
        pytest.raises(ValueError, match=r"status 400: .*too long for me"),
    ):
        ServerJudge("m", server.url, 100).answers([PLAIN])


@pytest.mark.parametrize(
    "garbled", ["<html>", {"error": "x"}, {"choices": []}, {"choices": [{"message": None}]}]
)
def test_what_is_no_completion_is_said_and_the_others_are_kept(garbled, tmp_path):
    prompts = [prompt("one"), prompt("garble"), prompt("two")]
    with Server(garbles=garbled) as server:
        judge = ServerJudge("m", server.url, 100)
        file = AnswerFile(tmp_path, judge.facts, kind="verdicts")
        with pytest.raises(
            ValueError, match=f"what the judge's server at {server.url} answers is no completion"
        ):
            ask(judge, prompts, file, 3, "judging")
        assert len(file.found) == 2


def test_preferences_of_neither_kind_are_left_out(tmp_path):
    path = tmp_path / "annotations.json"
    texts = {"instruction": "i", "output_1": "a", "output_2": "b"}

    def read(*preferences):
        path.write_text(json.dumps([texts | {"preference": one} for one in preferences]))
        return read_preferences(path)[1]

    assert read(1, 2, 1.5, 0, None, float("nan"), 1.9) == [False, True, True]
    with pytest.raises(ValueError, match="prefers neither answer anywhere"):
        read(1.5, None)


ANNOTATIONS = SHARED / "alpaca_eval" / "alpaca-7b" / "annotations.json"


@needs_shared
def test_the_public_annotations_give_the_published_figures(monkeypatch):
    """alpaca-eval's own metrics on the leaderboard's annotations of alpaca-7b, length control
    offline.
    """
    folder = SHARED / "alpaca_eval"
    glm = alpaca_metrics()
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: folder / "df_gamed_standin.csv")
    rows = json.loads(ANNOTATIONS.read_text())
    found = official(
        [{"annotation": row} for row in rows], ("alpaca-7b", "gpt4_1106_preview"), control=True
    )
    assert found["n_total"] == 805
    assert found["win_rate"] == pytest.approx(2.591450540223603, abs=1e-6)
    assert found["standard_error"] == pytest.approx(0.4870855382635108, abs=1e-6)
    assert found["length_controlled_winrate"] == pytest.approx(5.875487163278986, abs=0.15)
    table = (
        pandas.read_csv(folder / "df_gamed_standin.csv").drop_duplicates("index").set_index("index")
    )
    monkeypatch.setattr(
        glm, "_get_instructions_difficulty", lambda: table["instruction_difficulty"]
    )
    weights = pandas.read_csv(folder / "glm_weights.csv", index_col=0)
    published = 100 * glm.predict_winrate("alpaca-7b", "gpt4_1106_preview", weights=weights)
    assert published == pytest.approx(5.875487163278986, abs=1e-4)


@needs_shared
def test_the_published_files_are_read():
    outputs = read_outputs(SHARED / "alpaca_eval" / "gpt4_1106_preview" / "model_outputs.json")
    assert (outputs.name, len(outputs.texts), outputs.published) == ("gpt4_1106_preview", 805, True)
    assert not outputs.first(804)._replace(published=False).published
    pairs, preferred, whose = read_preferences(ANNOTATIONS)
    assert whose == "weighted_alpaca_eval_gpt4_turbo"
    assert len(pairs) == len(preferred) == 802
    assert sum(preferred) == 17


def test_without_the_hubs_file_the_official_rate_has_no_length_control(monkeypatch):
    monkeypatch.setattr(alpaca_metrics(), "hf_hub_download", no_hub)
    rows = [
        {
            "instruction": f"q{i}",
            "output_1": "a",
            "output_2": "bb",
            "preference": 1.0 + (i % 4 == 0),
        }
        for i in range(40)
    ]
    found = official(
        [{"annotation": row} for row in rows], ("m", "gpt4_1106_preview"), control=True
    )
    assert found["win_rate"] == 25
    assert "df_gamed.csv is not in the hub's cache" in found["note"]


def test_annotators_of_alpaca_eval_see_both_orders_and_are_not_asked_twice(monkeypatch, tmp_path):
    """The config's own prompt and parser.

    In place of the API a model that prefers the longer output, by 9 to 1.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    asked = []

    def completions(prompts, **_):
        asked.extend(prompts)
        return longer_output(prompts)

    monkeypatch.setattr("alpaca_eval.decoders.openai.openai_completions", completions)
    pairs = [Pair(i, f"question {i}", "x" * (30 if i < 5 else 3), "y" * 10) for i in range(8)]
    records = Annotators("weighted_alpaca_eval_gpt4_turbo", tmp_path).judged(pairs, "judging")
    assert [one["score"] for one in records] == [1] * 5 + [0] * 3
    assert len(asked) == 16
    assert tally(records)["first_preferred"]["value"] is None
    first = [asked[i].index("xxx") < asked[i].index("yyy") for i in range(16)]
    assert sum(first) == 8
    own = [one["annotation"]["preference"] for one in records]
    assert own == pytest.approx([1.9] * 5 + [1.1] * 3)
    found = official(records, ("tuned", "gpt4_1106_preview"), control=False)
    assert found["win_rate"] == pytest.approx(100 * (5 * 0.9 + 3 * 0.1) / 8)
    again = Annotators("weighted_alpaca_eval_gpt4_turbo", tmp_path).judged(pairs, "judging")
    assert [one["score"] for one in again] == [one["score"] for one in records]
    assert len(asked) == 16


def test_length_control_finds_the_rate_at_equal_length(monkeypatch):
    monkeypatch.setattr("sftlab.judging.length_control.RESAMPLES", 30)
    rng = np.random.default_rng(0)
    references, answers, scores = ["y" * int(n) for n in rng.integers(100, 2000, 800)], {}, {}
    for side, intercept in (("base", 0.0), ("tuned", 1.0)):
        answers[side] = ["x" * int(n) for n in rng.integers(600, 4000, 800)]
        apart = np.array([len(a) - len(b) for a, b in zip(answers[side], references, strict=True)])
        chance = 1 / (1 + np.exp(-(intercept + 3 * np.tanh(apart / apart.std()))))
        scores[side] = (rng.random(800) < chance).astype(float).tolist()
        assert np.mean(scores[side]) > 0.7
    found = length_controlled(scores, answers, references)
    for side, truth in (("base", 50), ("tuned", 73.1)):
        low, high = found[side]["interval_95"]
        assert low < truth < high
        assert found[side]["value"] == pytest.approx(truth, abs=4)
    assert found["difference"]["value"] == pytest.approx(
        found["tuned"]["value"] - found["base"]["value"]
    )
    assert (
        length_controlled(
            {"tuned": scores["tuned"][:10]}, {"tuned": answers["tuned"][:10]}, references[:10]
        )
        is None
    )
    few = {"tuned": [1.0] * 9 + [0.0] * 791}
    assert length_controlled(few, {"tuned": answers["tuned"]}, references) is None, (
        "too few are won"
    )


def test_the_rate_at_equal_length_is_the_raw_one_where_length_does_not_matter(monkeypatch):
    monkeypatch.setattr("sftlab.judging.length_control.RESAMPLES", 60)
    rng = np.random.default_rng(0)
    answers, references = (["x" * int(n) for n in rng.integers(100, 1000, 200)] for _ in range(2))
    scores = (rng.random(200) < 0.55).astype(float)
    found = length_controlled({"tuned": scores.tolist()}, {"tuned": answers}, references)["tuned"]
    assert found["value"] == pytest.approx(100 * scores.mean(), abs=1.5)
    low, high = found["interval_95"]
    assert 8 < high - low < 20
