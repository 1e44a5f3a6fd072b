"""Headless Chromium, driven through its own debugging pipe; no driver and no package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
  """Where a Chromium is: CWM_CHROMIUM, or one of the usual names on the path."""
  named = os.environ.get("CWM_CHROMIUM")
  return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
  """One page of a fresh browser; a context manager.

  Attributes:
    requests: the addresses of all requests that the page has made.
    complaints: what went to the console as an error, and exceptions that nobody caught.
  """

  def __init__(self, program: str, profile: Any, *, width: int, height: int):
    theirs_in, self._out = os.pipe()
    self._in, theirs_out = os.pipe()
    # Chromium looks at 3 and 4; above 9, moving them there overwrites neither. A program of its own
    # moves them, for a process with threads must not run code of its own in a forked child.
    ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
    place = (
      "import os, sys; [os.dup2(int(end), to) for to, end in zip((3, 4), sys.argv[1:3])]; "
      "os.execv(sys.argv[3], sys.argv[3:])"
    )
    self._process = subprocess.Popen(
      [
        sys.executable,
        "-c",
        place,
        *map(str, ends),
        program,
        "--headless=new",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
      ]
      + ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
      + [f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
      pass_fds=ends,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for fd in (theirs_in, theirs_out, *ends):
      os.close(fd)
    self._count, self._rest, self._session = 0, b"", None
    self.requests, self.complaints = [], []
    targets = self._ask("Target.getTargets", timeout=60)["targetInfos"]
    target = next(t["targetId"] for t in targets if t["type"] == "page")
    attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Runtime", "Network", "Log"):
      self._ask(f"{domain}.enable")

  def __enter__(self) -> Page:
    return self

  def __exit__(self, *_) -> None:
    self._process.terminate()
    self._process.wait(timeout=30)
    os.close(self._in)
    os.close(self._out)

  def open(self, address: str) -> None:
    """Goes to an address."""
    self._ask("Page.navigate", url=address)

  def run(self, script: str) -> Any:
    """The value of a piece of JavaScript."""
    done = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    if "exceptionDetails" in done:
      raise RuntimeError(done["exceptionDetails"]["exception"]["description"])
    return done["result"].get("value")

  def wait_for(self, script: str, *, timeout: float) -> float:
    """Waits until a piece of JavaScript is true; returns the seconds that took."""
    start = time.monotonic()
    while not self.run(f"document.body && ({script})"):
      if time.monotonic() - start > timeout:
        raise TimeoutError(f"{script} is still not true; the console says {self.complaints}")
      time.sleep(0.02)
    return time.monotonic() - start

  def click(self, x: float, y: float) -> None:
    """A click of the left button, in pixels of the window."""
    for kind in ("mousePressed", "mouseReleased"):
      self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

  def press(self, key: str, *, shift: bool = False) -> None:
    """A key, by its name in JavaScript; Enter also acts on the button that has the focus."""
    text = {"text": "\r"} if key == "Enter" else {}
    for kind, more in (("keyDown", text), ("keyUp", {})):
      self._ask("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **more)

  def screenshot(self) -> bytes:
    """The window as PNG."""
    return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

  def _ask(self, method: str, timeout: float = 30.0, **params: Any) -> dict:
    self._count += 1
    message = {"id": self._count, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._out, json.dumps(message).encode() + b"\0")
    deadline = time.monotonic() + timeout
    while True:
      answer = self._next(deadline)
      if answer.get("id") == self._count:
        if "error" in answer:
          raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]
      self._hear(answer)

  def _next(self, deadline: float) -> dict:
    while b"\0" not in self._rest:
      ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
      more = os.read(self._in, 2**16) if ready else b""
      if not more:
        raise TimeoutError("the browser does not answer")
      self._rest += more
    message, self._rest = self._rest.split(b"\0", 1)
    return json.loads(message)

  def _hear(self, event: dict) -> None:
    method, params = event.get("method"), event.get("params", {})
    if method == "Network.requestWillBeSent":
      self.requests.append(params["request"]["url"])
    elif method == "Runtime.exceptionThrown":
      self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
    elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
      self.complaints.append(params["entry"]["text"])
