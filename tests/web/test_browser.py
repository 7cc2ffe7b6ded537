"""The page in a real browser: Debian's Chromium, driven by playwright.

Every test fails on an error in the console, on a violation of the content security policy and on a
request that leaves this machine.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")

STATE = "/?model=meta-llama%2FLlama-3.1-8B&gpu=rtx-4090&method=qlora"
MESSAGE = (
    "CUDA out of memory. Tried to allocate 150.00 MiB. GPU 0 has a total capacity of 3.80 GiB of "
    "which 130.31 MiB is free. Of the allocated memory 3.52 GiB is allocated by PyTorch, and 53.87 "
    "MiB is reserved by PyTorch but unallocated."
)
MEASURED = f"{STATE}&measured=30GiB&oom={quote(MESSAGE)}"
VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start in a container that runs as root.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, base_url) -> Iterator:
    """A function that opens an address in a fresh profile; the watch ends with the test."""
    contexts, faults = [], []

    def watch(page):
        page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
        page.on(
            "console",
            lambda message: faults.append(message.text) if message.type == "error" else None,
        )
        page.on(
            "request",
            lambda request: (
                faults.append(f"left the machine: {request.url}")
                if not request.url.startswith((base_url, "data:", "blob:"))
                else None
            ),
        )

    def opened(path=STATE, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        context.add_init_script(VIOLATIONS)
        contexts.append(context)
        page = context.new_page()
        watch(page)
        page.goto(base_url + path)
        return page

    yield opened
    for context in contexts:
        for page in context.pages:
            if page.evaluate("typeof window.violations") == "object":
                faults += page.evaluate("window.violations")
        context.close()
    assert faults == []


def wait_for_chart(page):
    page.wait_for_selector("#peak .main-svg")


def changed_verdict(page, change):
    """Make a change in the form and return the verdict that follows it."""
    before = page.inner_text("#verdict")
    change()
    page.wait_for_function(
        "before => document.getElementById('verdict').innerText !== before", arg=before
    )
    return page.inner_text("#verdict")


def test_the_page_opens_with_its_answer_and_chart(open_page):
    page = open_page()
    wait_for_chart(page)
    assert "GiB" in page.inner_text("#verdict .number")
    assert page.get_attribute("#verdict", "aria-live") == "polite"


def test_an_empty_page_opens_without_an_error(open_page):
    assert "Name a model" in open_page("/").inner_text("#verdict")


def test_the_answer_follows_the_form_and_the_address_follows_both(open_page):
    page = open_page()
    wait_for_chart(page)
    changed_verdict(page, lambda: page.fill("#seq-len", "65536"))
    query = parse_qs(urlsplit(page.url).query)
    assert query == {
        "model": ["meta-llama/Llama-3.1-8B"],
        "gpu": ["rtx-4090"],
        "method": ["qlora"],
        "seq-len": ["65536"],
    }
    shown = page.inner_text("#verdict")
    page.reload()
    assert page.inner_text("#verdict") == shown


def test_the_chart_follows_the_answer(open_page):
    page = open_page()
    wait_for_chart(page)
    measure = "document.querySelector('#peak script').textContent"
    before = page.evaluate(measure)
    changed_verdict(page, lambda: page.select_option("#activation-checkpointing", "full"))
    assert page.evaluate(measure) != before
    wait_for_chart(page)


def test_a_refusal_takes_the_place_of_the_answer_and_goes_away_again(open_page):
    page = open_page()
    assert "closest known" in changed_verdict(page, lambda: page.fill("#model", "llama-3.1-8c"))
    assert "GiB" in changed_verdict(page, lambda: page.fill("#model", "llama-3.1-8b"))


def test_a_click_on_a_suggestion_applies_it_and_back_takes_it_back(open_page):
    page = open_page("/?model=meta-llama%2FLlama-3.1-8B&gpu=rtx-4090")
    before, address = page.inner_text("#verdict"), page.url
    changed_verdict(page, lambda: page.click("a.apply >> nth=0"))
    assert page.url != address
    page.go_back()
    page.wait_for_function(
        "before => document.getElementById('verdict').innerText === before", arg=before
    )
    assert page.url == address


def test_only_the_fields_of_the_chosen_method_are_shown(open_page):
    page = open_page()
    assert page.is_visible("#lora-r")
    page.select_option("#method", "full")
    assert not page.is_visible("#lora-r")


def test_the_form_works_from_the_keyboard_alone(open_page):
    page = open_page("/")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "model":
            break
    page.keyboard.type("llama-3.1-8b")
    page.wait_for_selector("#verdict .number")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "gpu"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


def test_the_toolbar_with_its_upload_button_is_not_there(open_page):
    page = open_page()
    wait_for_chart(page)
    page.hover("#peak .main-svg >> nth=0")
    assert page.locator(".modebar-btn").count() == 0


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("path", ["/", STATE, MEASURED, "/docs"])
def test_no_width_makes_the_page_scroll_sideways(open_page, width, path):
    page = open_page(path, viewport={"width": width, "height": 740})
    if path == STATE:
        wait_for_chart(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_dark_follows_the_system(open_page):
    colours = set()
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        wait_for_chart(page)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == {"rgb(255, 255, 255)", "rgb(13, 17, 23)"}


def test_the_page_answers_without_javascript(open_page):
    page = open_page("/", java_script_enabled=False)
    page.fill("#model", "llama-3.1-8b")
    page.select_option("#gpu", "rtx-4090")
    page.select_option("#method", "qlora")
    page.click("button[type=submit]")
    assert "GiB" in page.inner_text("#verdict .number")
    assert page.locator("#peak svg rect").count() >= 3
    assert page.locator("#components tbody tr").count() >= 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "path",
    ["/", STATE, MEASURED, "/?model=llama-3.1-8b&gpu=t4", "/docs", "/problems/unknown-model"],
)
def test_axe_finds_nothing_serious(open_page, path, scheme):
    # axe runs as a script of the page, which the policy rightly refuses.
    page = open_page(path, color_scheme=scheme, bypass_csp=True)
    if "gpu=" in path:
        wait_for_chart(page)
        for summary in page.locator("summary").all():
            summary.click()
    assert serious_faults(page) == {}


def test_axe_finds_nothing_serious_in_a_refusal(open_page):
    page = open_page("/", bypass_csp=True)
    changed_verdict(page, lambda: page.fill("#model", "llama-3.1-8c"))
    assert serious_faults(page) == {}


def serious_faults(page):
    """Return what axe finds that would keep somebody from using the page, by its rule."""
    found = axe_api.Axe().run(page).response["violations"]
    return {
        item["id"]: [node["html"][:200] for node in item["nodes"]]
        for item in found
        if item["impact"] in ("serious", "critical")
    }


def test_a_measurement_is_explained_and_stays_while_the_run_changes(open_page):
    page = open_page()
    page.fill("#measured", "30GiB")
    page.select_option("#meter", "reserved")
    page.click("#measurement button")
    page.wait_for_selector("#hypotheses")
    explained = page.inner_text("#explained")
    assert explained.startswith("Measured 30.00 GiB (reserved)")
    changed_verdict(page, lambda: page.fill("#seq-len", "1024"))
    assert parse_qs(urlsplit(page.url).query)["measured"] == ["30GiB"]
    assert page.inner_text("#explained") != explained


def test_what_a_visitor_types_never_runs(open_page):
    page = open_page("/")
    attack = """"><img src=x onerror="window.violations.push('ran')"><b>"""
    assert "onerror" in changed_verdict(page, lambda: page.fill("#model", attack))
    assert page.locator("main img, main b").count() == 0
