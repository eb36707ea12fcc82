"""The page in a headless browser: nothing is fetched, everything opens, the console stays empty."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from holdfast.report.items import Changed
from holdfast.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
KNOWN = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# root may not use its sandbox; a container has no GPU and little /dev/shm
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's own Chromium, or one that is installed."""
    with playwright.sync_playwright() as tools:
        own = tools.chromium.executable_path
        path = own if os.path.exists(own) else next(filter(None, map(shutil.which, KNOWN)), None)
        if path is None:
            pytest.skip("no browser: `apt install chromium` or `playwright install chromium`")
        opened = tools.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_works_in_a_browser(
    browser: Any, run: Any, width: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    worst = [
        Changed("gsm8k", f"q{n}", "guardrail", f"<b>{n}</b> + 2 =", "4", "100.0%", "0.0%",
                "4", "</pre><script>console.error('broke out')</script>")
        for n in range(10)
    ]  # fmt: skip
    path = write_report(tmp_path_factory.mktemp("page"), replace(run, worst=worst))
    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    places = page.locator("[data-figure]")
    drawn = [places.nth(i).locator(".main-svg").count() > 0 for i in range(places.count())]
    assert len(drawn) >= 7
    assert all(drawn)

    closed = page.locator("details:not([open]) > summary")
    while closed.count():
        closed.first.click()
    assert page.locator("details[open]").count() == page.locator("details").count() == 11
    assert page.get_by_text("</pre><script>").first.is_visible()
    legends = page.locator(".legendtoggle")
    before = page.locator(".plot .trace").count()
    for i in range(min(6, legends.count())):
        legends.nth(i).click(force=True)
    page.wait_for_timeout(600)  # plotly waits for a second click
    assert page.locator(".plot .trace").count() <= before
    places.first.hover()
    page.emulate_media(color_scheme="dark")  # redraws every figure
    page.wait_for_timeout(200)
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()
