"""The page in a headless Chromium: a click becomes a track, and nothing else is asked for."""

from __future__ import annotations

import io
import os
import threading
import time
from urllib.parse import urlsplit

import browser
import numpy as np
import pytest
from PIL import Image

from cwm_jax import inputs
from cwm_jax.types import InputError


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
  program = browser.find()
  if program is None:
    reason = "install Chromium, or set CWM_CHROMIUM to one, to run this test"
    if os.environ.get("CI", "").lower() in ("1", "true"):
      pytest.fail(reason)
    pytest.skip(reason)
  profile = tmp_path_factory.mktemp("profile")
  with browser.Page(program, profile, width=1440, height=900) as opened:
    yield opened


@pytest.fixture
def page(chromium, server):
  chromium.open("about:blank")
  chromium.run("0")  # whatever the test before asked for is heard by now
  chromium.requests.clear()
  chromium.complaints.clear()
  chromium.open(server.address)
  chromium.wait_for("document.body.dataset.ready === 'yes'", timeout=60)
  return chromium


def _place(page, x, y):
  """A point of the clip in pixels of the window."""
  left, top, w, h = page.run(
    "(() => { const b = document.getElementById('video').getBoundingClientRect();"
    " return [b.left, b.top, b.width, b.height]; })()"
  )
  scale = min(w / 64, h / 48)
  return left + (w - 64 * scale) / 2 + x * scale, top + (h - 48 * scale) / 2 + y * scale


def _click_and_wait(page, x, y, number):
  page.click(*_place(page, x, y))
  page.wait_for(f"document.body.dataset.tracked === '{number}'", timeout=60)
  page.wait_for("document.body.dataset.pending === '0'", timeout=60)


def test_a_click_becomes_a_track_an_explanation_and_points_to_keep(page, server, tmp_path):
  blank = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), float)
  _click_and_wait(page, 30, 20, 1)
  track = page.run("points[0].track.map(a => a.xy)")
  x, y = page.run("points[0].xy")
  np.testing.assert_allclose([x, y], [30, 20], atol=0.2)
  want = [[x + 4 * t, y + 2 * t] for t in range(6)]
  np.testing.assert_allclose(track, want, atol=0.6)
  # The explanation begins a moment after the click; a quick track may be there before.
  page.wait_for("document.body.dataset.explained", timeout=60)
  assert page.run("document.body.dataset.masks") == "4"
  assert page.run("document.querySelectorAll('#masks canvas').length") == 4
  said = page.run("document.getElementById('said').textContent")
  assert "It moved 8.9 px" in said and "from the truth" in said and "4 masks." in said
  picture = page.screenshot()
  (tmp_path / "page.png").write_bytes(picture)
  drawn = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float)
  assert np.abs(drawn - blank).mean() > 2
  # The clicked point is drawn in its own colour where it was clicked.
  column, row = map(round, _place(page, 30, 20))
  near = drawn[row - 3 : row + 4, column - 3 : column + 4].reshape(-1, 3)
  assert np.abs(near - [64, 220, 255]).sum(axis=1).min() < 40

  # Scrubbing asks about another frame; the other modes follow again.
  page.run("seek(3)")
  page.wait_for("document.body.dataset.explained === '0-3'", timeout=60)
  assert page.run("document.getElementById('when').textContent") == "frame 3"
  _click_and_wait(page, 10, 40, 2)
  assert page.run("points[1].t") == 3
  page.run("$('mode').value = 'chain'; delete document.body.dataset.tracked; $('mode').onchange()")
  page.wait_for(
    "document.body.dataset.tracked && document.body.dataset.pending === '0'", timeout=60
  )
  np.testing.assert_allclose(page.run("points[0].track.map(a => a.xy)"), want, atol=1.0)
  page.run("$('push').onclick()")
  page.wait_for("document.body.dataset.pushed === '2'", timeout=60)
  assert "What moves along" in page.run("document.getElementById('said').textContent")
  # What the page saves is what `cwm-jax track --points` reads.
  page.run(
    "URL.createObjectURL = blob => {"
    " blob.text().then(text => { document.body.dataset.saved = text; }); return '#'; };"
    "HTMLAnchorElement.prototype.click = () => {}; $('save').onclick()"
  )
  page.wait_for("document.body.dataset.saved", timeout=30)
  (tmp_path / "points.csv").write_text(page.run("document.body.dataset.saved"))
  kept = inputs.read_points(str(tmp_path / "points.csv"), (48, 64))
  clicked = page.run("points.map(p => [p.t, p.xy[1], p.xy[0]])")
  np.testing.assert_allclose(kept, clicked, atol=0.011)
  page.run("$('clear').onclick()")
  assert page.run("points.length") == 0

  assert page.complaints == []
  asked = [urlsplit(url) for url in page.requests]
  hosts = {parts.netloc for parts in asked if parts.scheme not in ("data", "blob", "about")}
  assert hosts == {f"127.0.0.1:{server.server_port}"}


def test_while_many_points_are_followed_frames_still_come_and_the_chosen_one_is_next(
  page, answers, monkeypatch
):
  begun, go_on = [], threading.Event()

  def waiting(t, point_xy, mode):
    begun.append(round(point_xy[0]))
    yield {"t": t, "xy": point_xy, "visible": True, "confidence": 1.0}
    go_on.wait(60)
    for i in range(1, 6):
      yield {"t": i, "xy": point_xy, "visible": True, "confidence": 1.0}

  monkeypatch.setattr(answers, "track", waiting)
  try:
    for i in range(1, 8):
      page.click(*_place(page, 8 * i, 10))
    page.run("frames.clear(); seek(5)")
    # A browser opens six connections to a host; seven tracks would hold them all.
    page.wait_for("document.getElementById('when').textContent === 'frame 5'", timeout=20)
    # Those that were let in have a thread each.
    for _ in range(200):
      if len(begun) >= 3:
        break
      time.sleep(0.1)
    assert sorted(begun) == [8, 16, 24]
  finally:
    go_on.set()
  page.wait_for("document.body.dataset.pending === '0'", timeout=60)
  # The one that was clicked last; with it another may begin.
  assert begun.index(56) in (3, 4) and sorted(begun) == [8 * i for i in range(1, 8)]
  assert page.run("points.every(point => point.track.length === 6)")


def test_without_a_mouse_points_are_aimed_at_marked_and_chosen_again(page):
  assert page.run("$('video').tabIndex") == 0
  assert page.run("[...document.querySelectorAll('canvas')].every(c => c.role && c.ariaLabel)")
  assert page.run("['hint', 'said'].every(id => $(id).ariaLive === 'polite')")
  page.run("$('video').focus()")
  page.press("ArrowUp")  # shows the cross-hair, in the middle
  page.press("ArrowLeft", shift=True)
  page.press("ArrowDown")
  page.press("Enter")
  page.press("ArrowRight", shift=True)
  page.press("Enter")
  page.wait_for(
    "state.pending === '0' && story && story.done && story.point === chosen", timeout=60
  )
  assert page.run("points.map(point => point.xy)") == [[22, 25], [32, 25]]
  assert page.run("[now, chosen.number]") == [0, 2]  # the arrows moved no frames
  page.press("ArrowLeft", shift=True)
  page.press("Enter")
  assert page.run("[points.length, chosen.number]") == [2, 1]
  page.press("Enter", shift=True)
  assert page.run("points.length") == 3
  page.wait_for(
    "state.pending === '0' && story && story.done && story.point === chosen", timeout=60
  )
  page.run("$('masks').children[1].focus()")
  page.press("Enter")
  page.wait_for("$('masks').children[1].ariaPressed === 'true'", timeout=20)
  assert page.run("document.querySelectorAll('#masks [aria-pressed=true]').length") == 1
  # With a mouse, a click on a dot chooses it too, and the arrows step through the frames.
  page.click(*_place(page, 32, 25))
  assert page.run("[points.length, chosen.number]") == [3, 2]
  page.press("ArrowRight")
  assert page.run("[now, points.length]") == [1, 3]


def test_a_frame_that_failed_is_told_and_asked_for_again(page, answers, monkeypatch):
  with monkeypatch.context() as broken:

    def fails(t):
      raise InputError("this frame cannot be had")

    broken.setattr(answers, "frame", fails)
    page.run("seek(4)")
    page.wait_for("$('hint').textContent === 'this frame cannot be had'", timeout=20)
  page.run("seek(4)")
  page.wait_for("$('when').textContent === 'frame 4'", timeout=20)


def test_without_the_token_the_page_is_not_had(page, server):
  page.open(f"http://127.0.0.1:{server.server_port}/?token=wrong")
  page.wait_for("document.body.innerText.includes('lacks this session')", timeout=30)
