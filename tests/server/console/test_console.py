"""The page in a browser: chat, stop, models, keys, keyboard, themes, charts, hostile answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from nybble.engine import Engine

from ..client import Client, run
from ..conftest import running_server
from .scripted import Scripted, serving

SECONDS = 120


class Page:
    def __init__(self, chrome: webdriver.Chrome, url: str) -> None:
        self.chrome = chrome
        # The page of the test before goes on asking its server, which is gone, until it is left.
        chrome.get("about:blank")
        chrome.get_log("browser")
        chrome.get(url)
        chrome.execute_script("localStorage.clear(); sessionStorage.clear()")
        chrome.get(url)
        self.until(lambda: len(Select(self.find("model")).options) > 0)

    def find(self, id: str) -> Any:
        return self.chrome.find_element(By.ID, id)

    def all(self, selector: str) -> list[Any]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.chrome, SECONDS, 0.05).until(lambda _: condition())

    def ask(self, text: str) -> Any:
        """Send it with the Enter key; the answer's element."""
        before = len(self.all("article.assistant"))
        self.find("prompt").send_keys(text, Keys.ENTER)
        self.until(lambda: len(self.all("article.assistant")) > before)
        return self.all("article.assistant")[-1]

    def answered(self) -> None:
        self.until(lambda: not self.all("article.busy"))

    def focused(self) -> str:
        return str(self.chrome.switch_to.active_element.get_attribute("id"))

    def complaints(self) -> list[str]:
        """What the browser's console has of errors and violated policies."""
        log = self.chrome.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


@pytest.fixture
def page(chromium: webdriver.Chrome, server: Scripted) -> Iterator[Page]:
    page = Page(chromium, server.url)
    yield page
    page.find("theme")  # still there


def test_an_answer_streams_in_with_its_rate_and_the_next_question_knows_it(
    page: Page, server: Scripted
) -> None:
    server.answer, server.pause = "One **two** three four five six seven eight.", 3600
    answer = page.ask("Count.")
    page.until(lambda: "One" in answer.text and "eight" not in answer.text)
    assert page.find("stop").is_displayed()
    assert not page.find("send").is_displayed()
    server.pause = 0.05
    page.answered()
    assert answer.find_element(By.CSS_SELECTOR, "strong").text == "two"
    stats = answer.find_element(By.CSS_SELECTOR, ".stats").text
    for part in ("s to first token", "tokens/s", "7 tokens"):
        assert part in stats
    assert page.find("send").is_displayed()
    page.ask("And?")
    page.answered()
    assert [turn["role"] for turn in server.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert server.asked[1]["messages"][1]["content"] == server.answer
    assert page.complaints() == []


def test_drafts_that_were_accepted_are_shown(page: Page, server: Scripted) -> None:
    server.usage = {"draft_tokens_details": {"draft_tokens": 9, "accepted_draft_tokens": 6}}
    answer = page.ask("Count.")
    page.answered()
    assert "6 of 9 drafts accepted" in answer.find_element(By.CSS_SELECTOR, ".stats").text


def test_the_runs_of_accepted_drafts_are_marked_while_the_answer_comes(
    page: Page, server: Scripted
) -> None:
    server.answer, server.piece = "**ab**cdefghi<b>", 2
    server.accepted = (0, 2, 0, 0, 1, 0, 0, 0)  # "ab" and "**" were drafted, then "ef"
    server.pause = 0.3
    answer = page.ask("Count.")
    page.until(lambda: "2 of 3 drafts accepted" in answer.text)
    assert "tokens/s" in answer.find_element(By.CSS_SELECTOR, ".stats").text
    assert "busy" in answer.get_attribute("class")
    page.answered()
    folded = answer.find_element(By.CSS_SELECTOR, "details.drafts")
    summary = folded.find_element(By.CSS_SELECTOR, "summary")
    assert summary.text == "Accepted drafts: 2 runs"
    assert not folded.find_element(By.CSS_SELECTOR, "pre").is_displayed()
    page.chrome.execute_script("arguments[0].focus()", summary)
    ActionChains(page.chrome).send_keys(Keys.ENTER).perform()
    assert folded.find_element(By.CSS_SELECTOR, "pre").text == server.answer
    marks = folded.find_elements(By.CSS_SELECTOR, "mark")
    assert [(mark.text, mark.get_attribute("title")) for mark in marks] == [
        ("ab**", "2 accepted draft tokens"),
        ("ef", "1 accepted draft token"),
    ]
    assert "underline" in marks[0].value_of_css_property("text-decoration-line")
    assert page.complaints() == []


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stopping_keeps_what_came_and_tells_the_server(
    page: Page, server: Scripted, by: str
) -> None:
    server.answer, server.pause = "word " * 2, 3600  # nothing on the page moves until it is stopped
    answer = page.ask("Talk.")
    page.until(lambda: "word" in answer.text)
    if by == "button":
        page.find("stop").click()
    else:
        page.find("prompt").send_keys(Keys.ESCAPE)
    page.answered()
    assert "word" in answer.text
    assert "stopped" in answer.find_element(By.CSS_SELECTOR, ".stats").text
    page.until(lambda: server.cut == 1)
    assert page.focused() == "prompt"


def test_model_system_prompt_and_sampling_are_sent(page: Page, server: Scripted) -> None:
    groups = page.all("#model optgroup")
    assert [group.get_attribute("label") for group in groups] == ["Base model", "Adapters"]
    Select(page.find("model")).select_by_value("pirate")
    page.find("system").send_keys("Be brief.")
    for name, value in {"temperature": "0.5", "top_p": "0.9", "top_k": "5", "seed": "7"}.items():
        page.find(name).send_keys(value)
    page.find("max_tokens").clear()
    answer = page.ask("Hi.")
    page.answered()
    assert answer.find_element(By.CSS_SELECTOR, "h2").text == "pirate"
    body = server.asked[0]
    expected = {"model": "pirate", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7}
    assert {name: body[name] for name in expected} == expected
    assert "max_tokens" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.find("temperature").send_keys("999")
    page.find("prompt").send_keys("No.", Keys.ENTER)
    assert len(page.all("article.assistant")) == 1  # the field is invalid and says so


def test_the_rate_is_shown_while_the_answer_comes(page: Page, server: Scripted) -> None:
    server.answer, server.pause = "word " * 400, 0.05
    answer = page.ask("Talk.")
    stats = answer.find_element(By.CSS_SELECTOR, ".stats")
    page.until(lambda: "tokens/s" in stats.text)
    assert page.all("article.busy")
    assert server.asked[0]["stream_options"]["continuous_usage_stats"] is True
    page.find("stop").click()
    page.answered()
    assert "tokens/s" in stats.text


def test_reasoning_is_folded_and_not_sent_back(page: Page, server: Scripted) -> None:
    server.thought, server.answer = "First, I count.", "Four."
    answer = page.ask("Two and two?")
    page.answered()
    (folded,) = answer.find_elements(By.CSS_SELECTOR, "details.thought")
    assert folded.get_attribute("open") is None
    assert "First" not in answer.text
    folded.find_element(By.CSS_SELECTOR, "summary").click()
    assert "First, I count." in answer.text
    page.ask("Sure?")
    page.answered()
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": "Four."}


def test_a_tool_call_is_shown_and_the_next_message_is_its_result(
    page: Page, server: Scripted
) -> None:
    tools = '[{"type": "function", "function": {"name": "clock"}}]'
    page.find("tools").send_keys(tools)
    server.answer, server.call = "", ("clock", '{"zone": "<b>utc"}')
    answer = page.ask("What time is it?")
    page.answered()
    (call,) = answer.find_elements(By.CSS_SELECTOR, "figure.call")
    assert call.text.split("\n") == ["Calls clock", '{"zone": "<b>utc"}']
    assert server.asked[0]["tools"] == json.loads(tools)
    server.answer, server.call = "Noon.", None
    page.ask("12:00")
    page.answered()
    _, called, result = server.asked[1]["messages"]
    assert called["tool_calls"][0]["function"]["arguments"] == '{"zone": "<b>utc"}'
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "12:00"}
    assert page.all("article.user h2")[-1].text == "Result of the call"
    # What is no list of tools is not sent.
    page.find("tools").send_keys("]")
    page.find("prompt").send_keys("And now?", Keys.ENTER)
    assert page.find("tools").get_property("validationMessage")
    assert len(server.asked) == 2


def test_two_models_answer_one_prompt_side_by_side(page: Page, server: Scripted) -> None:
    server.answer = "I am {model}."
    page.ask("Before.")
    page.answered()
    assert not page.find("others").is_displayed()
    Select(page.find("other")).select_by_value("pirate")
    page.find("prompt").send_keys("Who are you?", Keys.ENTER)
    page.until(lambda: len(page.all("article.assistant")) == 3)
    page.answered()
    columns = [page.find(id) for id in ("messages", "others")]
    last = [each.find_elements(By.CSS_SELECTOR, "article.assistant")[-1] for each in columns]
    assert [each.find_element(By.CSS_SELECTOR, ".body").text for each in last] == [
        "I am base.",
        "I am pirate.",
    ]
    first, second = server.asked[1:]
    assert {first["model"], second["model"]} == {"base", "pirate"}
    assert first["messages"] == second["messages"]  # the other knows what was said before
    left, right = (each.rect for each in columns)
    assert left["x"] + left["width"] <= right["x"] + 1
    assert left["y"] == right["y"]
    Select(page.find("other")).select_by_value("")
    assert not page.find("others").is_displayed()
    assert page.complaints() == []


def test_a_mixture_of_adapters_is_sent_and_compared(page: Page, server: Scripted) -> None:
    Select(page.find("model")).select_by_value("pirate")
    Select(page.find("other")).select_by_value("pirate")
    page.find("mixture").send_keys("pirate=0.7, a poet = -0.5")
    page.find("prompt").send_keys("Who are you?", Keys.ENTER)
    page.until(lambda: len(page.all("article.assistant")) == 2)
    page.answered()
    assert [each.text for each in page.all("article.assistant h2")] == [
        "pirate=0.7, a poet = -0.5",
        "pirate",
    ]
    asked = sorted((body["model"], body.get("adapter")) for body in server.asked)
    assert asked == [("base", {"pirate": 0.7, "a poet": -0.5}), ("pirate", None)]
    for wrong in ("pirate", "=1", "pirate=x", "pirate=1, pirate=2"):
        page.find("mixture").clear()
        page.find("mixture").send_keys(wrong)
        assert page.all("#mixture:invalid"), wrong
    assert page.complaints() == []


def test_it_can_be_used_with_the_keyboard_alone(page: Page, server: Scripted) -> None:
    assert page.focused() == "prompt"
    page.chrome.execute_script("document.activeElement.blur()")
    order = []
    for _ in range(19):
        ActionChains(page.chrome).send_keys(Keys.TAB).perform()
        focused = page.chrome.switch_to.active_element
        if focused.tag_name == "body":
            continue  # past the last element, before the first
        order.append(focused.get_attribute("id") or focused.get_attribute("class"))
        outline = focused.value_of_css_property("outline-style")
        assert outline != "none", f"focus on {order[-1]} cannot be seen"
    expected = "skip theme model system temperature top_p top_k max_tokens seed key messages prompt"
    assert [name for name in order if name in expected.split()][:12] == expected.split()
    page.find("prompt").send_keys("two", Keys.SHIFT, Keys.ENTER, Keys.NULL, "lines", Keys.ENTER)
    page.answered()
    page.until(lambda: server.asked)
    assert server.asked[0]["messages"][0]["content"] == "two\nlines"
    page.until(lambda: page.find("announce").get_attribute("textContent") == "Answer: Hello.")
    page.find("clear").send_keys(Keys.ENTER)
    assert page.all("article") == []
    assert page.find("empty").is_displayed()


ATTACKS = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"><svg onload="window.hacked = 3"></svg>
<iframe srcdoc="<script>parent.hacked = 4</script>"></iframe>

[click](javascript:window.hacked=5) [data](data:text/html,<script>alert(1)</script>)
[case](JaVaScRiPt:window.hacked=6) [tab](java\tscript:window.hacked=7)
![image](https://evil.example/pixel.png) <https://evil.example/auto>
[quote](https://ok.example/"onmouseover="window.hacked=8)

```html" onclick="window.hacked=9
<b onmouseover="window.hacked=10">x</b>
```

| <script>window.hacked=11</script> | b |
|---|---|
| <img src=x onerror=window.hacked=12> | `<style>*{display:none}</style>` |

<style>body { display: none }</style><base href="https://evil.example/">
<form action="https://evil.example"><input name="key"></form>
"""


def test_a_hostile_answer_stays_text(page: Page, server: Scripted) -> None:
    server.answer = ATTACKS
    answer = page.ask("<img src=x onerror='window.hacked = 0'>")
    page.answered()
    inside = {each.tag_name for each in page.all("#messages article *")}
    assert not inside & {"script", "img", "svg", "iframe", "style", "base", "form", "input", "b"}
    for link in answer.find_elements(By.TAG_NAME, "a"):
        assert link.get_attribute("href").startswith("https://")
        assert link.get_attribute("onmouseover") is None
        assert "noopener" in link.get_attribute("rel")
    for element in answer.find_elements(By.CSS_SELECTOR, "*"):
        assert element.get_attribute("onclick") is None
    for target in page.all("#messages article *"):
        if target.tag_name not in ("a", "button"):
            page.chrome.execute_script("arguments[0].click()", target)
    assert page.chrome.execute_script("return window.hacked ?? null") is None
    assert "window.hacked = 1" in answer.text
    assert page.all("article.user .body")[0].text == "<img src=x onerror='window.hacked = 0'>"
    assert page.complaints() == []


def test_the_policy_refuses_what_a_mistake_would_let_in(page: Page) -> None:
    inject = """
        try { document.body.innerHTML += '<img src=x onerror="window.hacked = 1">'; } catch {}
        const script = document.createElement('script');
        try { script.textContent = 'window.hacked = 2'; document.body.append(script); } catch {}
        return window.hacked ?? null;
    """
    assert page.chrome.execute_script(inject) is None
    fetched = page.chrome.execute_async_script(
        "const done = arguments[0];"
        "fetch('http://127.0.0.2:9/').then(() => done('sent'), () => done('refused'))"
    )
    assert fetched == "refused"
    assert any("Content Security Policy" in line for line in page.complaints())


def test_markdown_becomes_what_it_says(page: Page, server: Scripted) -> None:
    server.answer = (
        "# Title\n\nA *b* **c** `d <e>` ~~f~~ snake_case_name 2*3*4\nsame paragraph\n\n"
        "1. one\n2. two\n   - inner\n\n- x\n- y\n\n> quoted\n\n---\n\n"
        "```py\nif a < b:\n    pass\n```\n\n| h | i |\n|---|:-:|\n| j | k |\n\n"
        "[l](https://ok.example/a_(b)) https://ok.example/c. unfinished **bold and `code"
    )
    server.piece = 3
    answer = page.ask("Format.")
    page.answered()

    def texts(selector: str) -> list[str]:
        return [each.text for each in answer.find_elements(By.CSS_SELECTOR, selector)]

    assert texts(".body > h3") == ["Title"]
    assert texts("em") == ["b"]
    assert texts("strong") == ["c"]
    assert texts("p code") == ["d <e>"]
    assert texts("s") == ["f"]
    assert "snake_case_name 2*3*4" in texts("p")[0]
    assert len(texts(".body > ol > li")) == 2
    assert texts("ol ul li") == ["inner"]
    assert texts(".body > ul > li") == ["x", "y"]
    assert texts("blockquote") == ["quoted"]
    assert texts("pre code") == ["if a < b:\n    pass"]
    assert texts("figcaption") == ["py"]
    assert (texts("th"), texts("td")) == (["h", "i"], ["j", "k"])
    links = [each.get_attribute("href") for each in answer.find_elements(By.TAG_NAME, "a")]
    assert links == ["https://ok.example/a_(b)", "https://ok.example/c"]
    assert texts(".body > p")[-1].endswith("unfinished **bold and `code")


def test_a_key_is_asked_for_sent_and_gone_with_the_tab(page: Page, server: Scripted) -> None:
    server.key = "swordfish"
    answer = page.ask("Hi.")
    page.answered()
    assert "a valid API key is required" in answer.find_element(By.CSS_SELECTOR, ".problem").text
    assert page.focused() == "key"
    page.find("key").send_keys("swordfish", Keys.TAB)
    page.ask("Hi.")
    page.answered()
    assert len(server.asked) == 1
    assert [turn["role"] for turn in server.asked[0]["messages"]] == ["user"]  # no failed turn
    stored = "return [Object.values(sessionStorage), Object.values(localStorage)].map(String)"
    assert page.chrome.execute_script(stored) == ["swordfish", ""]
    assert page.find("key").get_attribute("type") == "password"


def test_errors_are_shown_where_the_answer_would_be(page: Page, server: Scripted) -> None:
    server.error = (429, "the server is full: try again in 3 s")
    answer = page.ask("Hi.")
    page.answered()
    assert "the server is full" in answer.find_element(By.CSS_SELECTOR, ".problem").text
    page.until(lambda: "full" in page.find("announce").get_attribute("textContent"))


def test_the_charts_are_of_the_servers_metrics(page: Page, server: Scripted) -> None:
    def metrics(tokens: int, slow: int) -> str:
        return (
            f"nybble_engine_healthy 1.0\nnybble_generation_tokens_total {tokens}\n"
            f"nybble_prompt_tokens_total 0.0\n"
            "nybble_sequences_running 3.0\nnybble_sequences_waiting 12.0\n"
            "nybble_kv_cache_usage_ratio 0.425\n"
            'nybble_adapters{in="device"} 2.0\nnybble_adapters{in="disk"} 40.0\n'
            'nybble_inter_token_latency_seconds_bucket{le="0.1"} 0.0\n'
            f'nybble_inter_token_latency_seconds_bucket{{le="0.2"}} {slow}\n'
            f'nybble_inter_token_latency_seconds_bucket{{le="+Inf"}} {slow}\n'
        )

    def label(title: str) -> str:
        (svg,) = page.all(f"#charts svg[aria-label^='{title}']")
        return str(svg.get_attribute("aria-label"))

    server.metrics = metrics(0, 0)
    page.until(lambda: "42.5 %" in label("KV cache"))
    assert "running 3, waiting 12; scale to 20" in label("Sequences")
    assert "device 2, host –, disk 40" in label("Adapters")
    assert "median –" in label("Between tokens")
    server.metrics = metrics(1000, 10)
    page.until(
        lambda: "generated –" not in label("Tokens") and "generated 0" not in label("Tokens")
    )
    page.until(lambda: "median 150 ms" in label("Between tokens"))
    assert page.all("#charts path.c0:not(.area)")[0].get_attribute("d").startswith("M")
    assert page.find("health").text == "ready · 1.2.3"
    server.metrics = "nybble_engine_healthy 0.0\n"
    page.until(lambda: page.find("health").text == "engine is down")


def luminance(color: str) -> float:
    channels = [int(part) / 255 for part in color.split("(")[1].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("system", ["light", "dark"])
def test_both_themes_can_be_read_and_the_choice_is_remembered(
    page: Page, server: Scripted, system: str, screenshots: Path
) -> None:
    feature = {"name": "prefers-color-scheme", "value": system}
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.ask("Hi.")
    page.answered()

    def color(selector: str, of: str) -> float:
        return luminance(page.all(selector)[0].value_of_css_property(of))

    def check(theme: str) -> None:
        page_color = color("body", "background-color")
        assert (page_color < 0.2) == (theme == "dark")
        for selector, on in (
            ("article.assistant .body", "body"),
            ("article .stats", "body"),
            ("#health", "header"),
            (".hint", "#settings"),
            ("#send", "#send"),
            (".legend li", "aside"),
        ):
            behind = page_color if on == "body" else color(on, "background-color")
            bright, dim = sorted((color(selector, "color"), behind), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (theme, selector)  # WCAG AA
        page.chrome.save_screenshot(str(screenshots / f"{theme}.png"))

    check(system)
    for theme in ("light", "dark"):
        page.find("theme").click()
        assert page.find("theme").text == f"Theme: {theme}"
        check(theme)
    page.chrome.refresh()
    page.until(lambda: page.find("theme").text == "Theme: dark")
    assert color("body", "background-color") < 0.2
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_fits_a_narrow_window(page: Page) -> None:
    page.chrome.set_window_size(420, 800)
    width = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.chrome.execute_script(width)
    assert page.find("send").is_displayed()
    page.chrome.set_window_size(1360, 860)


def test_a_real_model_answers_on_it(
    chromium: webdriver.Chrome, tiny_model: Callable[..., Path]
) -> None:
    with running_server(tiny_model(), "--api-key", "k", "--speculate", "ngram") as server:
        page = Page(chromium, server.url)
        page.find("key").send_keys("k", Keys.TAB)
        page.until(lambda: Select(page.find("model")).first_selected_option.text == "tiny")
        page.find("max_tokens").clear()
        page.find("max_tokens").send_keys("60")
        page.find("temperature").send_keys("0")
        answer = page.ask("hello")
        page.answered()
        stats = answer.find_element(By.CSS_SELECTOR, ".stats").text
        assert "to first token" in stats
        accepted = re.search(r"(\d+) of \d+ drafts accepted", stats)
        assert accepted is not None
        titles = [each.get_attribute("title") for each in page.all("details.drafts mark")]
        assert 0 < sum(int(title.split()[0]) for title in titles) <= int(accepted[1])
        page.until(lambda: page.find("health").text.startswith("ready"))
        assert not page.all(".problem")
        assert [m for m in page.complaints() if "401" not in m] == []


def test_the_page_needs_no_key_and_its_files_are_cached_until_they_change(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async with client.get("/") as response:
            assert response.status == 200
            assert response.content_type == "text/html"
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            etag = response.headers["ETag"]
        async with client.get("/", headers={"If-None-Match": etag}) as response:
            assert (response.status, await response.read()) == (304, b"")
        for path in ("/console/../app.py", "/console/page.py", "/console/%2e%2e%2fapp.py"):
            async with client.get(path) as response:
                assert response.status in (401, 404)
        async with client.get("/v1/models") as response:
            assert response.status == 401

    run(engine, scenario, api_keys=["k"])


def test_the_page_can_be_turned_off(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for path in ("/", "/console/app.js"):
            async with client.get(path) as response:
                assert response.status == 404

    run(engine, scenario, console=False)


def test_a_server_that_goes_away_is_told_of(chromium: webdriver.Chrome) -> None:
    with serving(Scripted(answer="word " * 2000, pause=0.05)) as server:
        page = Page(chromium, server.url)
        answer = page.ask("Talk.")
        page.until(lambda: "word" in answer.text)
    page.answered()
    assert answer.find_element(By.CSS_SELECTOR, ".problem").text
    page.until(lambda: page.find("health").text == "The server cannot be reached.")
