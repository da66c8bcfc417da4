"""The report's page in a real browser: looked at, listened to, and used by keyboard alone. Needs Debian's chromium."""

import json
import re
import shutil

import pytest
import torch
from playwright.sync_api import sync_playwright

from hf_moe.routing import RoutingStats, specialise
from hf_moe.routing.advice import advise
from hf_moe.routing.page import COLOURS, LINES, STEPS, Passage, render, step
from hf_moe.routing.summary import summarise

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> {{ 7*7 }} & '\""
)
THEMES = ("light", "dark")
READABLE = 4.5  # WCAG 2.2, 1.4.3, contrast of text


def made_page(experts=12, layers=(0, 2, 5), title=HOSTILE):
    """A page of three layers, two domains and hostile text; layer 2 has dead experts."""
    generator = torch.Generator().manual_seed(0)
    stats = RoutingStats(layers, experts)
    passages = []
    for domain in ("law", HOSTILE):
        for _ in range(3):
            index = torch.rand(3, 30, experts, generator=generator).argsort(-1)[..., :2]
            index[1] %= 4
            index[1, :, 1] = (index[1, :, 0] + 1) % 4
            gates = torch.full((30, 2), 0.5)
            ids = torch.randint(0, 4, (30,), generator=generator)
            chosen = {layer: (index[place], gates) for place, layer in enumerate(layers)}
            stats.update(chosen, ids=ids, rows=torch.zeros(30), domain=domain)
            choices = tuple(tuple(((a, 60), (b, 40)) for a, b in one.tolist()) for one in index)
            pieces = tuple((" ", HOSTILE if at == 3 else f"word{at}") for at in range(30))
            passages.append(Passage(domain, pieces, choices))
    found = specialise(stats, permutations=20)
    summary = summarise(stats, specialisation=found, similarity={0: 0.5}, name_of=lambda token: f"{HOSTILE}{token}")
    return render(summary, advise(summary), passages, title)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("There is no chromium to look at the report with; apt-get install chromium.", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(made_page(), encoding="utf-8")
    return file


@pytest.fixture
def open_page(browser, file):
    """(theme) -> the page, which must neither complain nor ask for anything."""
    said, asked, opened = [], [], []

    def open_(theme="light", file=file, width=1000):
        page = browser.new_page(color_scheme=theme, viewport={"width": width, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        opened.append(page)
        return page

    yield open_
    for page in opened:
        page.close()
    assert said == []
    assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []


def first_token(page):
    return page.locator(".passage .tok").first


def test_hostile_text_stays_text(open_page):
    page = open_page()
    assert page.title() == f"Routing of {HOSTILE}"
    assert page.locator("h1").inner_text() == f"Routing of {HOSTILE}"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.locator(".passage .tok").nth(3).text_content() == HOSTILE


def test_the_slider_works_by_keyboard_and_colours_the_text(open_page):
    page = open_page()
    slider, passages = page.get_by_label("Layer", exact=True), page.locator("#choices").text_content()
    choices = json.loads(passages)
    slider.focus()
    for place, layer in enumerate((0, 2, 5)):
        assert page.locator("#layer-name").inner_text() == str(layer)
        assert slider.get_attribute("aria-valuetext") == f"layer {layer}"
        tokens = page.locator(".passage").first.locator(".tok").all()
        for token, chosen in zip(tokens, choices[0][place], strict=True):
            expert = chosen[0][0]
            kinds = token.get_attribute("class").split()
            assert kinds == ["tok", f"c{expert % len(COLOURS)}", f"u{expert // len(COLOURS)}"]
            assert token.get_attribute("data-e") == str(expert)
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    assert page.locator("#layer-name").inner_text() == "0"


def test_a_token_tells_its_experts_without_a_mouse(open_page):
    page = open_page()
    for _ in range(30):  # from the top of the page
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('tok')"):
            break
    page.keyboard.press("ArrowRight")
    active = page.evaluate("document.activeElement.textContent")
    [one, other] = json.loads(page.locator("#choices").text_content())[0][0][1]
    told = page.locator("#told").inner_text()
    assert told == f"“{active}” in layer 0: expert {one[0]} (gate 60 %), expert {other[0]} (gate 40 %)"
    number = "getComputedStyle(document.activeElement, '::after').content"
    assert page.evaluate(number) in (f'"{one[0]}"', "attr(data-e)")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "word29"
    page.keyboard.press("Tab")  # to the next passage, not the next token
    assert page.evaluate("document.activeElement.dataset.p") == "1"


def test_numbers_can_stand_at_every_token(open_page):
    page = open_page()
    content = "getComputedStyle(document.querySelector('.passage .tok'), '::after').content"
    assert page.evaluate(content) == "none"
    page.get_by_label("expert numbers").check()
    assert page.evaluate(content) != "none"


def test_the_theme_follows_the_system_and_the_button(open_page):
    grounds = {}
    for theme in THEMES:
        page = open_page(theme)
        ground = "getComputedStyle(document.body).backgroundColor"
        grounds[theme] = page.evaluate(ground)
        page.get_by_role("button", name="Dark theme").press("Enter")
        grounds[f"not {theme}"] = page.evaluate(ground)
    assert grounds["light"] == grounds["not dark"] != grounds["dark"] == grounds["not light"]


# Every text with what stands behind it: [red, green, blue] of both, and the text.
READ_COLOURS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  document.querySelectorAll("details").forEach((details) => (details.open = true));
  const walker = document.createTreeWalker(document.querySelector("body"), NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (text && element.tagName !== "SCRIPT")
      found.push([numbers(getComputedStyle(element).color), behind(element), text]);
  }
  return found;
}"""


def luminance(colour):
    """Relative, of WCAG 2.2."""
    parts = (value / 255 for value in colour[:3])
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", THEMES)
def test_every_text_stands_out_from_what_is_behind_it(theme, open_page):
    found = open_page(theme).evaluate(READ_COLOURS)
    assert len(found) > 200
    behind = {tuple(ground) for _, ground, _ in found}
    assert len(behind) >= len(COLOURS) + 5  # tokens in every colour, steps of the scale, ground and panel
    for text, ground, words in found:
        brighter, darker = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= READABLE, (words, text, ground)


@pytest.mark.parametrize("width", [1000, 360])
def test_nothing_is_wider_than_the_screen(width, open_page):
    page = open_page(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width + 1  # Chromium rounds up


def test_colours_beyond_the_eighth_have_another_line(open_page):
    page = open_page()
    keys = page.locator("[aria-label='Colours of experts'] .tok").all()
    styles = [token.evaluate("e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).borderBottomStyle]")
              for token in keys]  # fmt: skip
    assert len(styles) == len({tuple(style) for style in styles}) == 12


def test_figures_and_dead_experts_are_on_the_page(open_page):
    page = open_page()
    text = page.locator("main").inner_text()
    assert "layer 2: experts 4, 5, 6, 7, 8, 9, 10, 11" in text
    assert "8 experts are dead on this text" in text
    row = page.locator("section[aria-labelledby=load] tbody tr").nth(1)
    shares = [float(cell) for cell in row.locator("td").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares[4:] == [0] * 8
    assert re.search(r"Over all layers together p = 0\.\d\d\d", text)


def test_the_page_needs_no_script_to_be_read(browser, file):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(file.as_uri())
    assert page.locator(".passage .tok").count() == 180
    assert page.locator(".passage .tok").first.get_attribute("data-e").isdigit()


def test_the_scale_has_every_step():
    fair = 0.25
    times = (0.05, 0.3, 0.7, 1.0, 1.5, 1.9, 4.0)
    assert [step(value * fair, fair) for value in times] == [f"h{place}" for place in range(len(STEPS))]
    assert step(None, fair) == step(float("nan"), fair) == ""
    assert len(LINES) * len(COLOURS) == 32
