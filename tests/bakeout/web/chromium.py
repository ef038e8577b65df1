"""Chromium without a window, driven through chromedriver, and a log of what it asked of whom."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # What the browser itself asks its makers for is answered by nobody.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SECONDS = 120
"""Most that a script of the page may take."""


def missing() -> str | None:
    """What of it is not installed."""
    return next((name for name in ("chromium", "chromedriver") if which(name) is None), None)


class Page:
    """A browser's only tab."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, url: str) -> None:
        """Go to an address."""
        _post(f"{self._session}/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What an asynchronous function's body returns in the page."""
        body = (
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{{script}}})(...[...arguments].slice(0, -1))"
            ".then((value) => done({value}), (error) => done({error: String(error.stack)}));"
        )
        answer = _post(f"{self._session}/execute/async", script=body, args=list(arguments))
        assert "error" not in answer, answer["error"]
        return answer.get("value")


@contextmanager
def chromium(profile: Path, log: Path) -> Iterator[Page]:
    """A browser with a profile of its own; its network log is whole when it has ended.

    Args:
        profile: an empty folder.
        log: the file to write.
    """
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        said = next(line for line in driver.stdout if "successfully" in line)
        found = re.search(r"on port (\d+)", said)
        assert found is not None
        at = f"http://127.0.0.1:{found[1]}/session"
        arguments = [*FLAGS, f"--user-data-dir={profile}", f"--log-net-log={log}"]
        options = {"args": arguments, "binary": which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        session = _post(at, capabilities={"alwaysMatch": wanted})["sessionId"]
        _post(f"{at}/{session}/timeouts", script=SECONDS * 1000)
        try:
            yield Page(f"{at}/{session}")
        finally:
            urllib.request.urlopen(urllib.request.Request(f"{at}/{session}", method="DELETE"))
    finally:
        driver.terminate()
        driver.wait(30)


def _post(at: str, **what: Any) -> Any:
    data = json.dumps(what).encode()
    request = urllib.request.Request(at, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS + 30) as answer:
        return json.load(answer)["value"]


def hosts_asked(log: Path) -> set[str]:
    """Hosts that pages asked for anything, by a network log; what the browser does on its own, as
    looking for updates, is not theirs.
    """
    found = json.loads(log.read_text())
    begun = found["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event.get("params", {}) for event in found["events"] if event["type"] == begun]
    urls = [of["url"] for of in asked if str(of.get("initiator")).startswith("http")]
    return {urlsplit(url).hostname or url for url in urls}
