"""Releases by name: downloads that go on, checksums that hold, one sentence where nothing helps."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cwm_jax.pretrained import convert, download, releases, weights
from cwm_jax.types import InputError

CONTENT = bytes(range(256)) * 5000
CUT = 300_000


class _Handler(http.server.BaseHTTPRequestHandler):
  """Serves CONTENT as its server's `mood` says, and notes what it was asked for."""

  def do_GET(self):
    server = self.server
    asked = self.headers.get("Range")
    server.asked.append((self.path, asked))
    if self.path != "/file.pt":
      return self.send_error(404)
    start = int(asked[6:-1]) if asked and server.ranges else 0
    condition = self.headers.get("If-Range")
    if condition is not None and condition != server.tag:
      start = 0
    if start >= len(server.content) and asked and server.ranges:
      return self.send_error(416)
    body = server.content[start:]
    self.send_response(206 if start else 200)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("ETag", server.tag)
    if start:
      last = len(server.content) - 1
      self.send_header("Content-Range", f"bytes {start}-{last}/{len(server.content)}")
    self.end_headers()
    self.wfile.write(body[: server.cut] if server.cut else body)
    if server.cut:
      self.connection.close()
      server.cut = 0

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as made:
    made.content, made.tag, made.ranges, made.cut, made.asked = CONTENT, '"one"', True, 0, []
    made.address = f"http://127.0.0.1:{made.server_port}/file.pt"
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()


@pytest.fixture
def path(tmp_path):
  return tmp_path / "cache" / "file.pt"


def _interrupt(server, path):
  server.cut = CUT
  with pytest.raises(InputError, match=r"stopped after 0.3 MB .*run this again to go on") as caught:
    download.fetch(server.address, path)
  assert "\n" not in str(caught.value) and not path.exists()


def test_a_file_is_fetched_whole_with_progress_and_its_checksum_recorded(server, path):
  told = []
  found = download.fetch(server.address, path, progress=lambda *seen: told.append(seen))
  assert path.read_bytes() == CONTENT
  assert found == hashlib.sha256(CONTENT).hexdigest() == download.recorded(path)
  assert told[-1] == (len(CONTENT), len(CONTENT))
  assert sorted(p.name for p in path.parent.iterdir()) == ["file.pt", "file.pt.sha256"]


def test_what_is_there_already_is_not_fetched_again(server, path):
  download.fetch(server.address, path)
  download.fetch(server.address, path)
  assert len(server.asked) == 1


def test_an_interrupted_download_goes_on_where_it_stopped(server, path):
  _interrupt(server, path)
  download.fetch(server.address, path)
  assert path.read_bytes() == CONTENT
  assert server.asked[1] == ("/file.pt", f"bytes={CUT}-")


def test_a_server_that_sends_no_parts_is_asked_for_the_whole(server, path):
  server.ranges = False
  _interrupt(server, path)
  download.fetch(server.address, path)
  assert path.read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server, path):
  _interrupt(server, path)
  server.content, server.tag = CONTENT[::-1], '"two"'
  download.fetch(server.address, path)
  assert path.read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_is_thrown_away(server, path):
  _interrupt(server, path)
  server.content = CONTENT[: CUT // 2]
  download.fetch(server.address, path)
  assert path.read_bytes() == CONTENT[: CUT // 2]


def test_a_file_that_is_not_what_it_was_is_refused(server, path):
  download.fetch(server.address, path)
  path.write_bytes(CONTENT[:-1] + b"x")
  with pytest.raises(InputError, match="not the file it should be.*delete it"):
    download.fetch(server.address, path)


@pytest.mark.parametrize(
  "known, sentence",
  [
    ({"sha256": "0" * 64}, "not the file it should be"),
    ({"size": 5}, "has 1,280,000 bytes, not 5"),
  ],
)
def test_a_download_that_is_not_the_published_file_is_refused(server, path, known, sentence):
  with pytest.raises(InputError, match=sentence):
    download.fetch(server.address, path, **known)
  assert download.recorded(path) is None


def test_a_missing_file_is_said_with_the_servers_answer(server, path):
  address = server.address.replace("file", "other")
  with pytest.raises(InputError, match=f"answers 404 Not Found; fetch it elsewhere .* {path}"):
    download.fetch(address, path)
  assert list(path.parent.iterdir()) == []


def test_without_a_network_one_sentence_says_what_to_fetch_and_where_to_put_it(path):
  address = "http://127.0.0.1:9/file.pt"
  with pytest.raises(InputError) as caught:
    download.fetch(address, path)
  assert address in str(caught.value) and f"put it at {path}" in str(caught.value)
  assert "\n" not in str(caught.value)


class _Waiting(logging.Handler):
  """Calls `then` once somebody waits for another process's download."""

  def __init__(self, then):
    super().__init__()
    self._then = then

  def emit(self, record):
    assert "another process is fetching" in record.getMessage()
    self._then()


@pytest.fixture
def held(server, path, request):
  """Another process's half of a download, and what is done once somebody waits for it."""
  path.parent.mkdir()
  # A lock belongs to the opening of a file, so that threads stand for processes.
  other = open(path.with_name("file.pt.part"), "ab")
  fcntl.flock(other, fcntl.LOCK_EX)
  log, done = logging.getLogger(download.__name__), threading.Event()

  def leave(then):
    def let_go():
      then(other)
      other.close()
      done.set()

    # In a thread: who waits only begins to once it has told so.
    handler = _Waiting(lambda: threading.Timer(0.05, let_go).start())
    log.addHandler(handler)
    request.addfinalizer(lambda: log.removeHandler(handler))

  yield leave
  assert done.wait(5)


def test_who_meets_another_process_s_download_waits_and_takes_its_file(server, path, held):
  def finish(other):
    other.write(CONTENT)
    other.flush()
    os.replace(other.name, path)

  held(finish)
  download.fetch(server.address, path)
  assert path.read_bytes() == CONTENT and server.asked == []
  assert sorted(p.name for p in path.parent.iterdir()) == ["file.pt", "file.pt.sha256"]


def test_where_the_other_process_gave_up_its_part_is_gone_on_with(server, path, held):
  def stop(other):
    other.write(CONTENT[:CUT])
    other.flush()

  held(stop)
  download.fetch(server.address, path)
  assert path.read_bytes() == CONTENT
  assert server.asked == [("/file.pt", f"bytes={CUT}-")]


def test_where_the_other_process_got_nothing_the_file_is_fetched_from_its_start(server, path, held):
  held(lambda other: os.unlink(other.name))
  download.fetch(server.address, path)
  assert path.read_bytes() == CONTENT and server.asked == [("/file.pt", None)]


def test_several_that_begin_together_fetch_a_file_once(server, path):
  with ThreadPoolExecutor(4) as pool:
    found = set(pool.map(lambda _: download.fetch(server.address, path), range(4)))
  assert found == {hashlib.sha256(CONTENT).hexdigest()} and len(server.asked) == 1
  assert sorted(p.name for p in path.parent.iterdir()) == ["file.pt", "file.pt.sha256"]


def test_every_release_names_its_files_source_and_licence():
  predictors = ["cwm-2frame-8x8", "cwm-2frame-4x4", "opt-cwm-256", "opt-cwm-512"]
  networks = ["raft-large-C_T_SKHT_V2", "raft-small-C_T_V2", "sea-raft-M", "opt-cwm-distilled"]
  assert set(predictors + networks) <= set(releases.names())
  for name in releases.names():
    release = releases.get(name)
    assert release.licence and release.source.startswith("https://")
    assert all(file.address.startswith("https://") for file in release.files)
  assert [f.name for f in releases.get("opt-cwm-512").files] == [
    "base_cwm_512_ckpt.pt",
    "opt_cwm_ckpt.pt",
  ]


def test_every_release_has_a_model_of_its_name():
  from cwm_jax.configs import flow_networks, opt_cwm

  assert sorted([*opt_cwm.MODELS, *flow_networks.NETWORKS]) == sorted(releases.names())


def test_a_checksum_may_be_known_by_its_beginning(server, path):
  whole = hashlib.sha256(CONTENT).hexdigest()
  assert download.fetch(server.address, path, sha256=whole[:8]) == whole
  with pytest.raises(InputError, match=f"SHA-256 begins {whole[:12]}, not 00000000;"):
    download.fetch(server.address, path, sha256="0" * 8)


def test_an_unknown_release_is_answered_with_the_three_nearest_and_where_all_are():
  with pytest.raises(InputError, match=r"unknown release 'opt-cwm-51'; .*info --list") as told:
    releases.get("opt-cwm-51")
  known = [*weights.shipped_names(), *releases.names()]
  named = [name for name in re.findall(r"[\w.-]+", str(told.value)) if name in known]
  assert len(named) == 3 and "opt-cwm-512" in named and len(known) > 10


def test_what_is_neither_a_file_nor_a_release_is_said_so(tmp_path):
  with pytest.raises(InputError, match=r"no weights file .*absent.safetensors'; the nearest names"):
    releases.locate(tmp_path / "absent.safetensors")


@pytest.fixture
def tiny_release(monkeypatch, tmp_path, cwm_goldens):
  """A release of two files whose cache holds small ones, put there by hand."""
  import json

  from torch_writer import Tensor, write

  from cwm_jax.pretrained import safetensors_file

  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path / "cache"))
  files = tuple(
    releases.File(name, f"http://127.0.0.1:9/{name}", None, None) for name in ("base.pt", "over.pt")
  )
  release = releases.Release("tiny", files, "tiny", "title", "source", "licence")
  monkeypatch.setattr(releases, "_table", lambda: {"tiny": release})
  section = json.loads((cwm_goldens / "config.json").read_text())["base_cwm"]
  heads = (section["encoder_num_heads"], section["decoder_num_heads"])
  plain = convert.assemble
  monkeypatch.setattr(
    convert, "assemble", lambda s, *, release, keep_base: plain(s, heads=heads, keep_base=keep_base)
  )
  base = safetensors_file.read(cwm_goldens / "c1_base_cwm_state.safetensors")
  flow = safetensors_file.read(cwm_goldens / "c4_flow_state.safetensors")
  over = {f"flow_predictor.{name}": array for name, array in flow.items()}
  folder = tmp_path / "cache" / "tiny"
  folder.mkdir(parents=True)
  for name, state in (("base.pt", base), ("over.pt", over)):
    write(folder / name, {"model": {n: Tensor(np.asarray(a)) for n, a in state.items()}})
  return folder


def test_a_release_in_the_cache_is_converted_once_and_needs_no_network(tiny_release):
  made = releases.locate("tiny")
  assert made.parent == tiny_release and weights.load_perturber(made) is not None
  when = made.stat().st_mtime_ns
  for source in ("base.pt", "over.pt"):
    (tiny_release / source).unlink()
  assert releases.load("tiny") == made and made.stat().st_mtime_ns == when


def test_keeping_the_base_makes_another_weights_file(tiny_release):
  both = [releases.load("tiny", keep_base=keep) for keep in (False, True)]
  assert both[0] != both[1]
  tokens = [weights.load(path)[0]["mask_token"] for path in both]
  assert not np.array_equal(*tokens)


def test_a_release_that_is_not_there_names_every_file_and_place(tiny_release):
  for source in ("base.pt", "over.pt"):
    (tiny_release / source).unlink()
  with pytest.raises(InputError) as caught:
    releases.load("tiny")
  for source in ("base.pt", "over.pt"):
    assert f"http://127.0.0.1:9/{source}" in str(caught.value)
    assert str(tiny_release / source) in str(caught.value)


def test_the_cache_is_where_the_variable_says_or_in_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path))
  assert releases.cache_folder() == tmp_path
  monkeypatch.delenv("CWM_JAX_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert releases.cache_folder() == Path(tmp_path, ".cache", "cwm_jax")
