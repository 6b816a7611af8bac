"""Votes, runs, results and the API on the chat app's page in a headless Chromium; no run at all."""

import pytest
from browser_pages import MARKS, answered, say, shot, slide
from serving import serve

from sftlab.chat import votes

pytestmark = MARKS


def test_a_blind_vote_is_revealed_written_and_summed(server, visit):
    page = visit(server.url)
    slide(page, "Max new tokens", "10")
    page.get_by_label("Blind").check()
    say(page, "Repeat the number 3 in words.")
    page.get_by_role("button", name="Right is better").wait_for()
    assert (answered(page), answered(page, "right")) == ("answer A", "answer B")
    shot(page, "blind")
    page.get_by_role("button", name="Right is better").click()
    page.locator("#note").get_by_text("Voted").wait_for()
    vote = votes.read(server.ballot).votes[-1]
    assert (vote["blind"], vote["vote"], vote["message"]) == (
        True,
        vote["order"][1],
        "Repeat the number 3 in words.",
    )
    page.locator("#right .bot .thought", has_text=f"{vote['order'][1]} · ").wait_for()
    page.get_by_role("row", name="first blind").wait_for()
    shot(page, "voted")


def test_another_run_a_broken_one_and_a_reload(server, visit):
    page = visit(server.url)
    slide(page, "Max new tokens", "5")
    for run, words in (("broken", "broken cannot be used"), ("second", "rank 16")):
        page.get_by_label("Run", exact=True).click()
        page.get_by_role("option", name=run).click()
        page.locator("#facts").get_by_text(words).wait_for()
        shot(page, run)
    say(page, "Hello")
    assert "tokens/s" in answered(page)
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("cell", name="second", exact=True).wait_for()
    shot(page, "runs")
    page.get_by_role("tab", name="Results").click()
    page.locator(".tables img").first.wait_for()
    assert page.evaluate(
        "[...document.querySelectorAll('.tables img')].every(image => image.naturalWidth > 100)"
    )
    shot(page, "results")
    page.reload()
    page.locator("#facts").get_by_text("rank 16").wait_for()
    slide(page, "Max new tokens", "5")
    say(page, "Hello again")
    assert "tokens/s" in answered(page)


@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_the_start_of_a_run_answers_and_is_voted_on(preferred, tmp_path, visit, width):
    with serve(tmp_path, "--run", str(preferred)) as server:
        page = visit(server.url, width)
        page.locator("#facts").get_by_text("start ").wait_for()
        slide(page, "Max new tokens", "5")
        page.get_by_label("start and tuned").check()
        say(page, "Hello")
        assert answered(page).startswith("start · ")
        assert answered(page, "right").startswith("tuned · ")
        shot(page, f"start-{width}")
        page.get_by_role("button", name="Left is better").click()
        page.get_by_role("row", name=f"{preferred.name} open start 1 0 0").wait_for()
        assert votes.read(server.ballot).votes[-1]["vote"] == "start"


def test_the_api_page_is_there(server, visit):
    page = visit(server.url)
    page.get_by_role("button", name="Use via API").click()
    page.get_by_text("/chat").first.wait_for()
    shot(page, "api")


def test_without_a_run_the_page_says_how_to_make_one_and_finds_it_later(slow, visit):
    runs = slow.folder / "runs"
    runs.rename(slow.folder / "gone")
    page = visit(slow.url, "phone", loaded="No finished run yet")
    assert not page.locator("#message").is_visible()
    shot(page, "empty")
    (slow.folder / "gone").rename(runs)
    page.reload()
    page.locator("#facts").get_by_text("rank 16").wait_for()
    assert page.locator("#message").is_visible()
