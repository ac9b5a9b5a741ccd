"""The report in a real browser, without a window: quiet, as wide as the screen, and telling what is behind a mark."""

import base64
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, as .ci/run does")
PATIENCE_S = 90
# Chromium talks over its descriptors 3 and 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
SPOKEN = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")


class Browser:
    """One page, driven by the DevTools protocol."""

    def __init__(self, profile):
        ends = [end for _ in range(2) for end in os.pipe()]
        theirs = [fcntl.fcntl(ends[0], fcntl.F_DUPFD, 10), fcntl.fcntl(ends[3], fcntl.F_DUPFD, 10)]
        options = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]
        command = [sys.executable, "-c", START, *map(str, theirs), CHROMIUM, *options]
        with (profile.parent / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(command, pass_fds=theirs, stdout=stderr, stderr=stderr)
        for one in (ends[0], ends[3], *theirs):
            os.close(one)
        self.into, self.out = ends[1], ends[2]
        self.rest, self.events, self.count, self.session = b"", [], 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self):
        until = time.monotonic() + PATIENCE_S
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.out], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self.out, 1 << 20) if ready else b""
            assert data, "Chromium ended" if ready else f"Chromium said nothing for {PATIENCE_S} s"
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while (found := self.read()).get("id") != self.count:
            self.events.append(found)
        assert "error" not in found, (method, found)
        return found["result"]

    def open(self, url, width, *, mobile=False, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not self.heard("Page.loadEventFired"):
            self.events.append(self.read())

    def heard(self, *methods):
        return [one["params"] for one in self.events if one.get("method") in methods]

    def js(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, expression, *, tap=False):
        """Move the pointer to the middle of an element, or tap it; returns what the page says then."""
        self.js(f"({expression}).scrollIntoView({{block: 'center'}})")
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # scrolling is over
        place = f"(() => {{ const b = ({expression}).getBoundingClientRect();"
        x, y = self.js(f"{place} return [b.left + b.width / 2, b.top + b.height / 2]; }})()")
        if tap:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return self.said()

    def said(self):
        return self.js("(() => { const t = document.getElementById('tip'); return t.hidden ? '' : t.textContent; })()")

    def close(self):
        self.call("Browser.close")
        self.process.wait(PATIENCE_S)
        os.close(self.into)
        os.close(self.out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(written):
    return (written / "report.html").as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "mobile"), [(1200, False), (390, True)])
def test_it_is_quiet_fetches_nothing_and_is_as_wide_as_the_screen(browser, url, width, mobile, dark):
    browser.open(url, width, mobile=mobile, dark=dark)
    assert browser.js("document.querySelectorAll('section').length") == 12
    assert browser.js("[...document.querySelectorAll('svg')].filter(one => one.clientWidth).length") > 8
    assert browser.js("document.documentElement.scrollWidth") <= width
    wide = (
        "[...document.querySelectorAll('section > *, figure > *')].filter(one => one.offsetWidth > innerWidth).length"
    )
    assert browser.js(wide) == 0
    small = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height || 99))"
    assert browser.js(small) >= 9
    light = browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light is not dark
    assert browser.heard(*SPOKEN) == []
    assert [one["request"]["url"] for one in browser.heard("Network.requestWillBeSent")] == [url]


def test_one_picture_of_the_front_is_shown_at_each_width(browser, url):
    shown = "[...document.querySelectorAll('#trade-off svg.chart')].map(one => one.clientWidth > 0)"
    browser.open(url, 1200)
    assert browser.js(shown) == [True, False]
    browser.open(url, 390, mobile=True)
    assert browser.js(shown) == [False, True]


def test_pointing_at_a_mark_tells_its_plan_and_leaving_it_ends_that(browser, url):
    browser.open(url, 1200)
    mark = "document.querySelector('#trade-off svg.wide [data-tip^=chosen]')"
    assert browser.point(mark).startswith("chosen plan, from Optuna\nperplexity +2.00% [+1.80%, +2.20%]")
    box = browser.js("(() => { const b = document.getElementById('tip').getBoundingClientRect();"
                     "return [b.left, b.top, innerWidth - b.right, innerHeight - b.bottom]; })()")  # fmt: skip
    assert min(box) >= 0
    assert browser.point("document.querySelector('h1')") == ""


def test_a_cell_tells_its_layer_by_mouse_and_by_touch(browser, url):
    panel = "document.querySelectorAll('#where-each-scheme-hurts .panel svg')[2]"
    wanted = "model.layers.2.mlp.up_proj\nfp6(format=e2m3)\ninstead: +100 µs a request"
    browser.open(url, 1200)
    assert browser.point(panel).startswith(wanted)  # the picture's middle is the last of three blocks
    browser.open(url, 390, mobile=True)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    assert browser.point(panel, tap=True).startswith(wanted)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_marks_are_reached_by_keyboard(browser, url):
    browser.open(url, 1200)
    mark = "document.querySelector('#trade-off svg.wide [data-tip]')"
    browser.point("document.querySelector('h1')")
    browser.js(f"{mark}.focus({{focusVisible: true}})")
    assert browser.said().startswith("none on every layer")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert browser.said() == ""


def test_it_prints_on_a_few_pages(browser, url):
    browser.open(url, 1200, dark=True)
    data = browser.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)["data"]
    pdf = base64.b64decode(data)
    assert pdf[:5] == b"%PDF-"
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="")
    assert browser.heard(*SPOKEN) == []
