"""Who is answered, who is refused, and what the page is told."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import time

import numpy as np
import pytest
from PIL import Image

from cwm_jax.counterfactual import segments
from cwm_jax.viewer import command

QUESTIONS = (
  "/clip",
  "/frame?t=0",
  "/explain?t1=0&t2=1&x=20&y=20",
  "/track?t=0&x=20&y=20",
  "/segment?t=0&x=9&y=9",
)


def _ask(server, path, *, method="GET", token=True, host=None, headers=(), body=None):
  """Sends one request exactly as it is written; returns (status, headers, content)."""
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
  connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
  hosts = [f"127.0.0.1:{server.server_port}"] if host is None else host
  sent = [("Host", value) for value in hosts] + list(headers)
  if token:
    sent.append(("X-Token", server.token))
  for name, value in sent:
    connection.putheader(name, value)
  connection.endheaders(body)
  answer = connection.getresponse()
  content = answer.read()
  connection.close()
  return answer.status, answer.headers, content


def _lines(server, path):
  status, _, content = _ask(server, path)
  assert status == 200, content
  return [json.loads(line) for line in content.splitlines()]


def test_only_the_loopback_is_listened_to(server):
  assert server.server_address[0] == "127.0.0.1"
  assert server.address.startswith(f"http://127.0.0.1:{server.server_port}/?token=")


def test_the_page_comes_with_the_token_and_may_load_and_reach_nothing_else(server):
  status, headers, content = _ask(server, f"/?token={server.token}", token=False)
  assert status == 200 and headers["Content-Type"].startswith("text/html")
  policy = dict(
    part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
  )
  assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
  assert policy["connect-src"] == "'self'"
  nonce = policy["script-src"].removeprefix("'nonce-").removesuffix("'")
  page = content.decode()
  assert page.count("<script") == page.count(f'<script nonce="{nonce}">') == 1
  assert "http://" not in page and "https://" not in page and "{{" not in page
  other = _ask(server, f"/?token={server.token}", token=False)[1]["Content-Security-Policy"]
  assert nonce not in other


@pytest.mark.parametrize("path", ["/", *QUESTIONS])
@pytest.mark.parametrize("token", ["", "?token=", "?token=wrong", "&token=wrong"])
def test_without_the_token_nothing_is_answered(server, path, token):
  status, _, content = _ask(server, path + token, token=False)
  assert status == 403 and b"token" in content
  assert _ask(server, path, token=False, headers=[("X-Token", "wrong")])[0] == 403


@pytest.mark.parametrize("path", ["/?token=", *QUESTIONS])
@pytest.mark.parametrize(
  "host",
  [["evil.example"], ["127.0.0.1"], ["127.0.0.1:1"], ["127.0.0.1.evil.example"], [], ["0.0.0.0"]],
  ids=str,
)
def test_a_foreign_host_is_refused(server, path, host):
  # With the port of this server too: a page of another site may have a name that leads here.
  for named in (host, [f"{name}:{server.server_port}" for name in host if ":" not in name]):
    if named == [f"127.0.0.1:{server.server_port}"]:
      continue
    status, _, content = _ask(server, path + (server.token if "?token" in path else ""), host=named)
    assert status == 403 and b"127.0.0.1 and localhost only" in content


def test_two_hosts_are_refused_and_localhost_is_a_name_of_ours(server):
  ours = f"127.0.0.1:{server.server_port}"
  assert _ask(server, "/clip", host=[ours, "evil.example"])[0] == 403
  assert _ask(server, "/clip", host=[f"localhost:{server.server_port}"])[0] == 200


@pytest.mark.parametrize("path", ["/?token=", *QUESTIONS])
@pytest.mark.parametrize(
  "header",
  [
    ("Origin", "http://evil.example"),
    ("Origin", "https://127.0.0.1"),
    ("Origin", "http://127.0.0.1:1"),
    ("Origin", "null"),
    ("Sec-Fetch-Site", "cross-site"),
    ("Sec-Fetch-Site", "same-site"),
  ],
  ids=str,
)
def test_a_request_from_another_page_is_refused(server, path, header):
  path += server.token if "?token" in path else ""
  status, headers, content = _ask(server, path, headers=[header])
  assert status == 403 and b"other pages" in content
  assert not any(name.lower().startswith("access-control") for name in headers)


def test_our_own_page_is_answered(server):
  origin = f"http://127.0.0.1:{server.server_port}"
  own = [("Origin", origin), ("Sec-Fetch-Site", "same-origin")]
  assert _ask(server, "/clip", headers=own)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
def test_nothing_but_get_is_known(server, method):
  status, _, content = _ask(server, "/clip", method=method)
  assert status == 405 and (method == "HEAD" or b"nothing is uploaded" in content)


@pytest.mark.parametrize(
  "headers, body",
  [
    ([("Content-Length", "5")], b"hello"),
    ([("Content-Length", "99999999999")], None),
    ([("Transfer-Encoding", "chunked")], b"5\r\nhello\r\n0\r\n\r\n"),
  ],
)
def test_an_upload_is_refused_unread(server, headers, body):
  status, _, content = _ask(server, "/clip", headers=headers, body=body)
  assert status == 413 and b"nothing is uploaded here" in content


@pytest.mark.parametrize(
  "path",
  [
    "/../../../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/frame/../../../etc/passwd",
    "/..%5c..%5cetc%5cpasswd",
    "//etc/passwd",
    "/page.html",
    "/server.py",
    "http://evil.example/clip",
    "/clip/",
    "/frame%00",
  ],
)
def test_no_path_leads_to_a_file(server, path):
  status, _, content = _ask(server, path)
  assert status == 404 and content == b"there is nothing at this address\n"


@pytest.mark.parametrize(
  "path, sentence",
  [
    ("/frame", "t is a whole number"),
    ("/frame?t=-1", "t is a whole number"),
    ("/frame?t=99999999999999999999", "t is a whole number"),
    ("/frame?t=6", "there is no frame 6; they are 0 to 5"),
    ("/frame?t=../../etc/passwd", "t is a whole number"),
    ("/track?t=0&x=1", "x and y are numbers"),
    ("/track?t=0&x=nan&y=1", "finite"),
    ("/track?t=0&x=65&y=1", "(x=65, y=1) lies outside the 64 x 48 frames"),
    ("/track?t=0&x=5&y=1&mode=best", "the mode is 'best'; choose one of query, chain, anchor"),
    ("/explain?t1=0&t2=9&x=5&y=1", "there is no frame 9"),
  ],
)
def test_a_question_that_cannot_be_asked_is_told_in_one_sentence(server, path, sentence):
  status, _, content = _ask(server, path)
  assert status == 400 and sentence in content.decode() and content.count(b"\n") == 1


def test_an_address_that_is_too_long_is_refused(server):
  assert _ask(server, "/clip?" + "a" * 3000)[0] == 414


def test_too_many_connections_are_closed_and_the_rest_go_on(server):
  waiting = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(24)]
  try:
    # All places are taken by clients that say nothing.
    late = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
    assert late.recv(10) == b""
    late.close()
  finally:
    for client in waiting:
      client.close()
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    try:
      if _ask(server, "/clip")[0] == 200:
        return
    except ConnectionError:
      time.sleep(0.05)
  pytest.fail("no place became free")


def test_connections_that_come_at_once_are_not_sent_back_to_wait(answers):
  with command.make_server(answers, None) as busy, contextlib.ExitStack() as waiting:
    for _ in range(24):
      # The server takes none of them: where its queue is full, this one waits in vain.
      made = socket.create_connection(("127.0.0.1", busy.server_port), timeout=10)
      waiting.enter_context(made)


def test_a_frame_is_the_clips(server, answers):
  status, headers, content = _ask(server, "/frame?t=3")
  assert status == 200 and headers["Content-Type"] == "image/jpeg"
  picture = np.asarray(Image.open(io.BytesIO(content)), float)
  away = [np.abs(picture - frame).mean() for frame in answers._footage.frames]
  assert np.argmin(away) == 3 and away[3] < 0.5 * away[2]


def test_the_clip_is_described(server):
  facts = json.loads(_ask(server, "/clip")[2])
  assert (facts["name"], facts["frames"], facts["height"], facts["width"]) == (
    "drift.mp4",
    *(6, 48, 64),
  )


@pytest.mark.parametrize("mode", ["query", "chain", "anchor"])
def test_a_track_goes_both_ways_from_the_click_in_pixels_of_the_clip(server, mode):
  truth, *events = _lines(server, f"/track?t=2&x=33&y=25&mode={mode}")
  assert truth["truth_xy"][3] == [35, 26] and truth["truth_xy"][5] is None
  assert events[0] == {"t": 2, "xy": [33.0, 25.0], "visible": True, "confidence": 1.0}
  assert sorted(event["t"] for event in events) == list(range(6))
  for event in events:
    away = event["t"] - 2
    # Moved by (2, 1) of the frames that are kept, which are half as large.
    np.testing.assert_allclose(event["xy"], [33 + 4 * away, 25 + 2 * away], atol=0.6)
    assert event["visible"]


def test_in_query_mode_a_long_track_is_first_shown_whole_and_coarse():
  from cwm_jax.viewer import answers

  (order,) = answers._orders(5, 40, "query")
  assert order[0] == 5 and sorted(order) == list(range(40))
  assert order[1:5] == [13, 21, 29, 37] and set(order[5:10]) == {1, 9, 17, 25, 33}
  assert answers._orders(2, 5, "chain") == [[2, 3, 4], [2, 1, 0]]


def test_an_explanation_streams_mask_by_mask_into_the_trackers_own(server, answers, toy_tracker):
  events = _lines(server, "/explain?t1=1&t2=4&x=20&y=20")
  assert [event["mask"] for event in events] == [0, 1, 2, 3]
  assert [set(event) >= {"marked", "mark"} for event in events] == [True, False, False, False]
  frames = answers._footage.frames
  story = toy_tracker.explain(frames[1], frames[4], [10, 10])
  np.testing.assert_allclose(events[-1]["to_xy"], story.to_xy * 2, atol=1e-4)
  np.testing.assert_allclose(events[-1]["mean"]["top"], story.mean.max(), rtol=1e-4)
  for event, mask in zip(events, story.masks):
    assert event["hidden"] == ["".join(map(str, row)) for row in mask.astype(int)]
    assert event["clean"].startswith("data:image/png;base64,")


def test_what_moves_along_is_the_programs_own_answer(server, answers, toy_tracker):
  event = json.loads(_ask(server, "/segment?t=1&x=20&y=20")[2])
  frame = answers._footage.frames[1]
  along = toy_tracker.ask(segments.moves_along, frame, frame, [10, 10])
  np.testing.assert_allclose(event["along"]["top"], along.max(), rtol=1e-4)
  assert (event["along"]["height"], event["along"]["width"]) == (24, 32)


def test_a_client_that_leaves_early_stops_the_work_and_holds_up_nobody(server):
  with socket.create_connection(("127.0.0.1", server.server_port)) as client:
    request = f"GET /explain?t1=0&t2=1&x=20&y=20 HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}"
    client.sendall(f"{request}\r\nX-Token: {server.token}\r\n\r\n".encode())
    client.recv(1)
  # A track waits for explanations; it would wait for ever had the first one not been ended.
  assert len(_lines(server, "/track?t=0&x=20&y=20")) == 7
