"""A headless Chromium without a network, in which pages are tested as a reader meets them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ANOTHER_THREAD = 0.02  # seconds between two looks

SPY = """
window.addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.blockedURI}`));
(function look() {
  const ready = document.querySelector("#curves canvas") && document.querySelector("#about");
  requestAnimationFrame(ready ? () => setTimeout(() => (window.drawn = performance.now())) : look);
})();
"""  # runs before the page's own script, and notes when its first picture stands


class Browser:
    """One window, and what is asked of it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SPY})
        self.network(on=False)
        self.look(1440, 900)

    def network(self, on: bool) -> None:
        """Cut off unless a test serves a page itself."""
        settings = {"offline": not on, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", settings)

    def look(self, width: int, height: int, theme: str = "light") -> None:
        """The window's size, and what the reader's system prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, page: Path | str) -> Browser:
        """A page from its start, drawn."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get("about:blank")  # or a new fragment would not load it anew
        self.driver.get(page if isinstance(page, str) else page.as_uri())
        self.wait("window.drawn")
        return self

    def js(self, code: str, *arguments: Any) -> Any:
        """The value of an expression; `a` are the arguments."""
        return self.driver.execute_script(f"const a = arguments; return {code}", *arguments)

    def wait(self, code: str, *arguments: Any, seconds: float = 20) -> Any:
        """The same, once it is true."""
        end = time.monotonic() + seconds
        while not (found := self.js(code, *arguments)):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(ANOTHER_THREAD)
        return found

    def texts(self, css: str) -> list[str]:
        """The texts of elements, to the letter."""
        return self.js("[...document.querySelectorAll(a[0])].map((e) => e.textContent)", css)

    def click(self, css: str) -> None:
        """As a reader clicks: what is covered cannot be."""
        self.show(css)
        self.driver.find_element(By.CSS_SELECTOR, css).click()

    def fill(self, css: str, value: str) -> None:
        """Puts a value into a field or list of choices, which is told so."""
        self.js(
            "(() => { const e = document.querySelector(a[0]); e.value = a[1]; if (e.value !== a[1]) throw Error(a[1]);"
            " for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind)); })()",
            css,
            value,
        )

    def show(self, css: str) -> None:
        """Scrolls there, and waits until what is there was drawn."""
        self.js("document.querySelector(a[0]).scrollIntoView({block: 'center'})", css)
        self.settle()

    def settle(self) -> None:
        """Waits until everything that was asked for was painted."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))"
        )

    def hover(self, css: str, share: float = 0.5) -> str:
        """The text of the tip with the pointer at this share of an element's width, in the middle of its height."""
        self.show(css.split(maxsplit=1)[0])  # what lies in it may be drawn only now
        element = self.driver.find_element(By.CSS_SELECTOR, css)
        aside = int((share - 0.5) * element.size["width"])
        ActionChains(self.driver, duration=0).move_to_element_with_offset(element, aside, 0).perform()
        self.wait("!document.getElementById('tip').hidden")
        return self.js("document.getElementById('tip').innerText")

    def errors(self) -> list[str]:
        """The errors of the page since it was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses the page went to since it was opened, and before that the empty one."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not re.match("about:|data:,$", url)]


@contextmanager
def browser() -> Iterator[Browser]:
    """Such a browser, with nothing of a user's own."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
