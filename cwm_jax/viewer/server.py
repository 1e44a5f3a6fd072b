"""The viewer's HTTP server: this machine only, a handful of fixed addresses, nothing is uploaded.

Whoever is to be answered must come by a loopback address under its own name (no foreign Host, so
that no page on the web can reach us through a name of its own), from our own page or from none (no
foreign Origin), and must know the token of this session, since a machine's loopback is shared by
all who are logged in. No path is ever looked up on disk.
"""

from __future__ import annotations

import http.server
import json
import math
import secrets
import sys
import threading
from collections.abc import Iterator
from importlib import resources
from urllib.parse import parse_qsl

from cwm_jax.types import InputError
from cwm_jax.viewer.answers import Answers

_LONGEST_ADDRESS = 2000  # characters of a request's path and query
_MOST_CONNECTIONS = 24
_SILENCE_S = 30.0  # a client that says or takes nothing for so long is left
_POLICY = (
  "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data: blob:; "
  "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
  """A request that is not answered: (HTTP status, a sentence that says why)."""

  def __init__(self, status: int, sentence: str):
    super().__init__(sentence)
    self.status = status


class Server(http.server.ThreadingHTTPServer):
  """Serves one page about one clip on 127.0.0.1.

  Args:
    answers: what the page asks.
    port: 0 takes any that is free.

  Raises:
    OSError: the port cannot be had.
  """

  daemon_threads = True
  # A browser whose connection finds the queue full tries again only after a second, then three.
  request_queue_size = 64

  def __init__(self, answers: Answers, port: int):
    super().__init__(("127.0.0.1", port), _Handler)
    self.answers = answers
    self.token = secrets.token_urlsafe(24)
    self.places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
    self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

  @property
  def address(self) -> str:
    """Where the page is, with the token that it needs."""
    return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

  def process_request(self, request, client_address):
    """Serves in a thread of its own, while there are not too many."""
    if not self.places.acquire(blocking=False):
      self.shutdown_request(request)
      return
    super().process_request(request, client_address)

  def process_request_thread(self, request, client_address):
    """Gives its place back when done."""
    try:
      super().process_request_thread(request, client_address)
    finally:
      self.places.release()

  def handle_error(self, request, client_address):
    """A client that leaves early is no event; anything else is told on stderr."""
    if not isinstance(sys.exception(), ConnectionError | TimeoutError):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server
  timeout = _SILENCE_S

  def do_GET(self):
    try:
      self._check()
      path, _, query = self.path.partition("?")
      values = dict(parse_qsl(query))
      if path == "/":
        self._check_token(values.get("token", ""))
        self._send_page()
        return
      self._check_token(self.headers.get("X-Token", ""))
      answers = self.server.answers
      if path == "/clip":
        self._send("application/json", json.dumps(answers.clip()).encode())
      elif path == "/frame":
        self._send("image/jpeg", answers.frame(_whole(values, "t")))
      elif path == "/explain":
        times = _whole(values, "t1"), _whole(values, "t2")
        self._stream(answers.explain(*times, _point(values)))
      elif path == "/segment":
        event = answers.segment(_whole(values, "t"), _point(values))
        self._send("application/json", json.dumps(event).encode())
      elif path == "/track":
        mode = values.get("mode", "query")
        self._stream(answers.track(_whole(values, "t"), _point(values), mode))
      else:
        raise Refused(404, "there is nothing at this address")
    except Refused as refusal:
      self._send("text/plain; charset=utf-8", f"{refusal}\n".encode(), refusal.status)
    except InputError as error:
      self._send("text/plain; charset=utf-8", f"{error}\n".encode(), 400)
    except (ConnectionError, TimeoutError):
      self.close_connection = True

  def _refuse_method(self):
    sentence = f"{self.command} is not known here; only GET is, and nothing is uploaded"
    self._send("text/plain; charset=utf-8", f"{sentence}\n".encode(), 405)

  do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse_method

  def _check(self) -> None:
    """Raises Refused unless the request comes from our own page on this machine, and is small."""
    headers = self.headers
    if headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
      raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
    origins = {f"http://{host}" for host in self.server.hosts}
    if any(origin not in origins for origin in headers.get_all("Origin", [])):
      raise Refused(403, "requests from other pages are refused")
    if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
      raise Refused(403, "other pages may not lead here; paste the address into a new tab")
    if headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers:
      raise Refused(413, "nothing is uploaded here")
    if len(self.path) > _LONGEST_ADDRESS:
      raise Refused(414, "the address is too long")

  def _check_token(self, token: str) -> None:
    if not secrets.compare_digest(token.encode(), self.server.token.encode()):
      raise Refused(403, "the address lacks this session's token; take it from the terminal")

  def _send_page(self) -> None:
    nonce = secrets.token_urlsafe(16)
    files = resources.files("cwm_jax.viewer")
    page, script = (files.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "js"))
    content = page.replace("{{nonce}}", nonce).replace("{{script}}", script).encode()
    self._send("text/html; charset=utf-8", content, policy=_POLICY.format(nonce=nonce))

  def _stream(self, events: Iterator[dict]) -> None:
    """One JSON object a line, each as soon as it is known."""
    first = next(events, None)  # what is wrong with the question shows here
    self._begin(200, "application/x-ndjson")
    try:
      while first is not None:
        self.wfile.write(json.dumps(first).encode() + b"\n")
        first = next(events, None)
    finally:
      events.close()

  def _send(self, kind: str, content: bytes, status: int = 200, policy: str = "") -> None:
    self._begin(status, kind, policy or "default-src 'none'", len(content))
    self.wfile.write(content)

  def _begin(self, status: int, kind: str, policy: str = "", length: int | None = None) -> None:
    self.send_response(status)
    self.send_header("Content-Type", kind)
    if length is not None:
      self.send_header("Content-Length", str(length))
    self.send_header("Content-Security-Policy", policy or "default-src 'none'")
    self.send_header("Cache-Control", "no-store")
    self.send_header("Cross-Origin-Resource-Policy", "same-origin")
    self.send_header("Referrer-Policy", "no-referrer")
    self.send_header("X-Content-Type-Options", "nosniff")
    self.send_header("Connection", "close")
    self.end_headers()
    self.close_connection = True

  def version_string(self) -> str:
    return "cwm-jax"

  def log_message(self, *_) -> None:
    """The terminal is the user's."""


def _whole(values: dict[str, str], name: str) -> int:
  text = values.get(name, "")
  if not (text.isascii() and text.isdecimal() and len(text) < 10):
    raise Refused(400, f"{name} is a whole number from 0 up")
  return int(text)


def _point(values: dict[str, str]) -> tuple[float, float]:
  try:
    x, y = float(values.get("x", "")), float(values.get("y", ""))
  except ValueError:
    raise Refused(400, "x and y are numbers") from None
  if not (math.isfinite(x) and math.isfinite(y)):
    raise Refused(400, "x and y are finite numbers")
  return x, y
