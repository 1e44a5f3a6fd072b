"""The page in a headless Chromium: a click becomes a track, and nothing else is asked for."""

from __future__ import annotations

import io
import os
from urllib.parse import urlsplit

import browser
import numpy as np
import pytest
from PIL import Image

from cwm_jax import inputs


@pytest.fixture
def page(tmp_path, server):
  program = browser.find()
  if program is None:
    reason = "install Chromium, or set CWM_CHROMIUM to one, to run this test"
    if os.environ.get("CI", "").lower() in ("1", "true"):
      pytest.fail(reason)
    pytest.skip(reason)
  with browser.Page(program, tmp_path / "profile", width=1440, height=900) as opened:
    opened.open(server.address)
    opened.wait_for("document.body.dataset.ready === 'yes'", timeout=60)
    yield opened


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


def test_without_the_token_the_page_is_not_had(page, server):
  page.open(f"http://127.0.0.1:{server.server_port}/?token=wrong")
  page.wait_for("document.body.innerText.includes('lacks this session')", timeout=30)
