"""A conversation on the chat app's page in a headless Chromium, at both widths, light and dark."""

import json
from pathlib import Path

import pytest
from browser_pages import MARKS, WIDTHS, answered, say, shot, slide
from serving import waits_for

pytestmark = MARKS


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_a_conversation_at_every_width_and_scheme(server, visit, width, scheme):
    page = visit(server.url, width, scheme)
    shot(page, f"{width}-{scheme}-empty")
    box = page.locator("#message").bounding_box()
    assert box["y"] + box["height"] <= WIDTHS[width]["height"], "the box is on the first screen"
    shown = page.locator("#left").bounding_box()
    examples = page.locator("#left .example").all()
    assert len(examples) == 3
    for example in examples:
        place = example.bounding_box()
        assert shown["y"] <= place["y"], "an example is whole"
        assert place["y"] + place["height"] <= shown["y"] + shown["height"], "an example is whole"
    slide(page, "Max new tokens", "20")
    slide(page, "Temperature", "0")
    say(page, "Repeat the number 7 in words.")
    page.get_by_role("button", name="Left is better").wait_for()
    assert answered(page).startswith("base · ")
    assert answered(page, "right").startswith("tuned · ")
    shot(page, f"{width}-{scheme}-answered")
    overflow = page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 0, f"the page is {overflow} pixels wider than the window"
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")


def test_sliders_act_and_retry_takes_the_next_seed(server, visit):
    page = visit(server.url)
    page.locator("#side").get_by_text("tuned").click()
    slide(page, "Max new tokens", "5")
    say(page, "Repeat the number 7 in words.")
    page.locator("#left .bot .thought", has_text=" 5 tokens").wait_for()
    assert "seed 0" in answered(page, says="cut at max new tokens")
    assert page.locator("#right").count() == 0 or not page.locator("#right").is_visible()
    slide(page, "Max new tokens", "9")
    page.get_by_role("button", name="Retry").click()
    page.locator("#left .bot .thought", has_text="seed 1").wait_for()
    page.locator("#left .bot .thought", has_text=" 9 tokens").wait_for()
    answered(page)
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function(
        "document.querySelector('#message textarea').value.startsWith('Repeat the number 7')"
    )
    assert page.locator("#left .bot .thought").count() == 0


def test_text_streams_and_stop_ends_it_within_a_token(slow, visit):
    page = visit(slow.url)
    slide(page, "Max new tokens", "2000")
    say(page, "Go on")
    words = page.locator("#left").get_by_text("heard Go on")
    words.wait_for()
    lengths = [len(words.last.inner_text())]
    while len(lengths) < 4:
        page.wait_for_function(
            "n => document.querySelector('#left .bot').innerText.length > n", arg=lengths[-1] + 10
        )
        lengths.append(len(words.last.inner_text()))
    page.fill("#message textarea", "too early")
    page.locator("#message textarea").press("Enter")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Stop").click()
    assert answered(page, says="stopped").startswith("base · ")
    assert page.locator("#message textarea").input_value() == "too early"
    last = slow.last_answer()
    assert last["history"][-1]["content"] == "Go on"
    assert last["step"] - last["stopped_at"] <= 1
    page.get_by_role("button", name="Clear", exact=True).last.click()
    page.wait_for_function("document.querySelectorAll('#left .bot .thought').length == 0")


def test_a_place_in_the_queue_is_shown_and_a_full_one_says_so(slow, visit):
    """One answers, one waits (the server's queue holds one), the third is told.

    Stop lets the second in.
    """
    first, second, third = (visit(slow.url) for _ in range(3))
    for page, text in ((first, "one"), (second, "two"), (third, "three")):
        slide(page, "Max new tokens", "2000" if page is first else "3")
        if page is second:
            first.locator("#left").get_by_text("heard one").wait_for()
        if page is third:
            second.get_by_text("queue: 1/1").first.wait_for()
            shot(second, "waiting")
        say(page, text)
    third.locator("#note").get_by_text("too many messages are waiting").wait_for()
    third.get_by_role("button", name="Send").wait_for()
    assert third.locator("#message textarea").input_value() == "three"
    shot(third, "full")
    first.get_by_role("button", name="Stop").click()
    second.locator("#left").get_by_text("heard two").wait_for()
    third.get_by_role("button", name="Send").click()
    third.locator("#left").get_by_text("heard three").wait_for()


def test_the_settings_of_the_page_reach_the_model(slow, visit):
    page = visit(slow.url)
    chosen = {
        "Temperature": "0.35",
        "Top-p": "0.55",
        "Top-k": "12",
        "Max new tokens": "3",
        "Repetition penalty": "1.3",
    }
    for label, value in chosen.items():
        slide(page, label, value)
    page.get_by_label("Seed").fill("42")
    page.get_by_label("System instruction").fill("Answer in verse.")
    say(page, "Hello")
    answered(page)
    asked = slow.last_answer()
    assert asked["settings"] == {
        "temperature": 0.35,
        "top_p": 0.55,
        "top_k": 12,
        "max_new_tokens": 3,
        "repetition_penalty": 1.3,
        "seed": 42,
    }
    assert asked["history"][0] == {"role": "system", "content": "Answer in verse."}
    assert sorted(asked["sides"]) == ["base", "tuned"]


def test_a_closed_tab_ends_its_generation_within_a_token(slow, context_of):
    page = context_of("desktop", "light").new_page()
    page.goto(slow.url)
    page.locator("#facts").get_by_text("rank 16").wait_for()
    slide(page, "Max new tokens", "2000")
    say(page, "closing")
    page.locator("#left").get_by_text("heard closing").wait_for()
    page.close()
    assert waits_for(lambda: "ended" in slow.last_answer())
    last = slow.last_answer()
    assert last["history"][-1]["content"] == "closing"
    assert last["step"] - last["stopped_at"] <= 1
    assert last["step"] < 1000


def test_html_is_inert_and_code_is_code(slow, visit):
    page = visit(slow.url)
    slide(page, "Max new tokens", "2")
    say(
        page,
        "<script>alert(1)</script> <img src=http://evil.example/x onerror=alert(2)> **bold** `a "
        "<b>`",
    )
    answered(page, says=" 2 tokens")
    answer = page.locator("#left .bot").first
    assert "**bold** `a <b>`" in answer.inner_text()  # as it was written
    page.locator("#left .bot").first.hover()
    page.locator("#left").get_by_label("Copy").last.click()
    copied = "heard <script>alert(1)</script> <img src=http://evil.example/x onerror=alert(2)> "
    assert waits_for(
        lambda: page.evaluate("navigator.clipboard.readText()").startswith(f"{copied}**bold** `a <")
    )
    page.get_by_label("Render Markdown").check()
    answer.locator("strong").wait_for()
    assert "<script>alert(1)</script>" in answer.inner_text()
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("code").inner_text() == "a <b>"
    assert page.locator("#left .message img").count() == 0


def test_fences_before_html_make_no_element(slow, visit):
    page = visit(slow.url)
    slide(page, "Max new tokens", "2")
    say(
        page, "``` ``` ` ```\n<h1 id=made>x</h1><iframe src=//evil.example></iframe> ```\n&copy R&D"
    )
    answered(page, says=" 2 tokens")
    for text in (page.locator("#left .user").first, page.locator("#left .bot").first):
        assert "``` ``` ` ```\n<h1 id=made>x</h1><iframe" in text.inner_text()
        assert "&copy R&D" in text.inner_text()
    for markdown in (False, True):
        page.get_by_label("Render Markdown").set_checked(markdown)
        page.wait_for_timeout(500)
        assert page.locator("#made, #left h1, #left iframe, #right h1, #right iframe").count() == 0


def test_an_empty_message_is_refused_in_words(slow, visit):
    page = visit(slow.url)
    refused = page.locator("#note").get_by_text("Not taken: the message is empty")
    for text in ("", "  \n "):
        say(page, text)
        refused.wait_for()
    slide(page, "Max new tokens", "2")
    say(page, "one")
    answered(page, says=" 2 tokens")
    assert not refused.is_visible()
    page.locator("#left").get_by_label("Edit").first.click()
    page.locator("#left textarea").fill(" ")
    page.locator("#left").get_by_label("Submit").click()
    refused.wait_for()
    assert page.locator("#left .user").first.inner_text().strip() == "one"


def test_editing_copying_and_saving(slow, visit):
    page = visit(slow.url)
    slide(page, "Max new tokens", "3")
    for text in ("one", "two"):
        say(page, text)
        page.locator("#left").get_by_text(f"heard {text}").wait_for()
        answered(page)
    page.locator("#left").get_by_label("Edit").first.click()
    page.locator("#left textarea").fill("three")
    page.locator("#left").get_by_label("Submit").click()
    page.locator("#left").get_by_text("heard three").wait_for()
    answered(page)
    page.locator("#left .bot").last.hover()
    page.locator("#left").get_by_label("Copy").last.click()
    assert waits_for(
        lambda: page.evaluate("navigator.clipboard.readText()").startswith("heard three word")
    )
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    [turn] = json.loads(Path(download.value.path()).read_text())["turns"]
    assert turn["message"] == "three"
    assert turn["texts"]["tuned"].startswith("heard three")
