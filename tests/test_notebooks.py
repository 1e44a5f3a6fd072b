"""The notebooks run from top to bottom, are stripped of outputs, and install themselves on Colab.

They are run without Jupyter: the code cells one after the other, in a process of its own, with tiny
settings instead of those in the cell tagged `parameters`, as papermill would.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_job

import cwm_jax
from cwm_jax import jobs, tracking, viz
from cwm_jax.configs import pretrain_tiny
from cwm_jax.data import video
from cwm_jax.pretrained import weights

FOLDER = Path(__file__).parent.parent / "launch" / "colab"
SETTINGS = {
  "1_track_a_video": {"FRAMES": 4, "SIZE": 32, "GRID": 2, "MASKS": 1},
  "2_how_a_counterfactual_sees_motion": {"SIZE": 32, "MASKS": 2},
  "3_train_a_tiny_world_model": {
    "STEPS": 4,
    "BATCH": 4,
    "MODEL": {
      "image_hw": (16, 16),
      **dict.fromkeys(["encoder_width", "decoder_width"], 32),
      **dict.fromkeys(["encoder_depth", "decoder_depth"], 1),
      **dict.fromkeys(["encoder_heads", "decoder_heads"], 2),
    },
    "EVAL_EVERY": 2,
    "HELD_OUT": 2,
    "MASKS": 1,
  },
  "4_evaluate_on_tapvid": {
    **{"TRACKERS": ("mm1", "zero"), "CLIPS": 1, "FRAMES": 7, "POINTS": 2, "SIZE": 32}
  },
}
# Stands in for a kernel: cells run while an event loop does, and the value of a cell's last line is
# made a picture of. Whoever asks for another machine is refused.
KERNEL = """
import ast, asyncio, json, sys, types

def refuse(event, arguments):
  host = {"socket.getaddrinfo": lambda: arguments[0], "socket.connect": lambda: arguments[1][0]}
  if event in host and host[event]() != "127.0.0.1":
    raise PermissionError(f"{event} {arguments}: a notebook takes nothing from the network")

def video(path, *, embed):
  assert embed and open(path, "rb").read(12)[4:8] == b"ftyp", path

display = types.ModuleType("IPython.display")
display.Video = video
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": display}
book, settings = json.loads(sys.argv[1]), ast.literal_eval(sys.argv[2])

async def run_all():
  space = {"__name__": "__main__"}
  for cell in book["cells"]:
    if cell["cell_type"] != "code":
      continue
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell["id"], "exec"), space)
    value = last and eval(compile(ast.Expression(last.value), cell["id"], "eval"), space)
    if hasattr(value, "_repr_png_"):
      print(cell["id"], "shows", len(value._repr_png_()), "bytes")
    if "parameters" in cell["metadata"].get("tags", ()):
      space |= settings

sys.addaudithook(refuse)
asyncio.run(run_all())
"""


def book(name: str) -> dict:
  return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code(name: str) -> list[str]:
  """The sources of the code cells."""
  return ["".join(c["source"]) for c in book(name)["cells"] if c["cell_type"] == "code"]


def test_there_are_four_notebooks():
  assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_notebook_is_valid_and_its_outputs_are_stripped(name):
  content = book(name)
  assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
  assert set(content) == {"cells", "metadata", "nbformat", "nbformat_minor"}
  assert content["cells"][0]["source"][0].startswith("# ")  # the title, the only one
  later = [cell["source"] for cell in content["cells"][1:] if cell["cell_type"] == "markdown"]
  assert not any(line.startswith("# ") for source in later for line in source)
  ids = [cell["id"] for cell in content["cells"]]
  assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", id) for id in ids)
  for cell in content["cells"]:
    own = {"cell_type", "id", "metadata", "source"}
    assert all(isinstance(line, str) for line in cell["source"])
    if cell["cell_type"] == "code":
      assert set(cell) == own | {"execution_count", "outputs"}
      assert cell["outputs"] == [] and cell["execution_count"] is None
    else:
      assert cell["cell_type"] == "markdown" and set(cell) == own
  if importlib.util.find_spec("nbformat"):
    import nbformat

    nbformat.validate(nbformat.from_dict(content))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_notebook_names_no_folder_of_a_machine_and_its_links_lead_somewhere(name):
  text = "".join("".join(cell["source"]) for cell in book(name)["cells"])
  assert not re.search(r"(?<![\w.])(/(work|home|root|tmp|Users|content|mnt)\b|[A-Z]:\\)", text)
  for link in re.findall(r"\]\(([^)]+)\)", text):
    assert (FOLDER / link).is_file(), link


def test_the_first_cell_is_the_same_in_all_and_installs_only_where_the_package_is_missing(
  monkeypatch,
):
  (cell,) = {code(name)[0] for name in SETTINGS}
  asked = []
  monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
  exec(cell, {})
  assert asked == []
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match="set SOURCE"):
    exec(cell, {})
  monkeypatch.setattr("shutil.which", lambda name: None)
  exec(cell.replace("/OWNER/", "/somebody/"), {})
  ((python, *command),) = asked
  assert python == sys.executable and command[:3] == ["-m", "pip", "install"]
  assert command[-1] == "cwm-jax @ git+https://github.com/somebody/cwm_jax"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_notebook_runs_with_tiny_settings_and_without_a_network(name, tmp_path):
  (settings,) = (
    "".join(cell["source"])
    for cell in book(name)["cells"]
    if "parameters" in cell["metadata"].get("tags", ())
  )
  names = {node.id for node in ast.walk(ast.parse(settings)) if isinstance(node, ast.Name)}
  assert set(SETTINGS[name]) <= names
  done = subprocess.run(
    [sys.executable, "-c", KERNEL, json.dumps(book(name)), repr(SETTINGS[name])],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=tiny_job.environment(XLA_FLAGS=tiny_job.QUICK),
    timeout=400,
  )
  assert done.returncode == 0, done.stderr
  # Every notebook draws what it does.
  shown = re.findall(r"^cell-\d+ shows (\d+) bytes$", done.stdout, re.M)
  assert len(shown) >= 2 and all(int(size) > 200 for size in shown)


def test_the_command_at_the_end_of_a_training_goes_on_with_the_network_of_that_training():
  name = "3_train_a_tiny_world_model"
  (settings,) = (text for text in code(name) if "WORKDIR =" in text)
  run = {}
  exec(settings, run)
  begun = pretrain_tiny.get_config("match")
  begun.model.update(run["MODEL"])
  text = "".join(book(name)["cells"][-1]["source"])
  command = re.search(r"```\n(python .*?)\n```", text, re.S)[1].replace("\\\n", "")
  goes_on = pretrain_tiny.get_config(re.search(r"pretrain_tiny.py:(\w+)", command)[1])
  jobs.set_keys(goes_on, re.findall(r"--config\.(\S+)", command))
  assert goes_on.init_from == run["WORKDIR"]
  shapes = [weights.expected_shapes(c.to_dict(), where="test")[1] for c in (begun, goes_on)]
  assert shapes[0] == shapes[1]


def run_cell(source: str, space: dict, *, without: str = ""):
  """Runs a cell, but for its function of that name; returns the value of its last line."""
  tree = ast.parse(source)
  tree.body = [part for part in tree.body if getattr(part, "name", None) != without]
  last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
  exec(compile(tree, "cell", "exec"), space)
  return last and eval(compile(ast.Expression(last.value), "cell", "eval"), space)


@pytest.fixture
def jupyter(monkeypatch):
  display = types.SimpleNamespace(Video=lambda path, *, embed: path)
  monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
  monkeypatch.setitem(sys.modules, "IPython.display", display)


def test_a_large_video_of_ones_own_is_shown_small_and_at_its_own_rate(
  jupyter, tmp_path, monkeypatch
):
  class Still:
    @classmethod
    def load(cls, **_):
      return cls()

    def dense_flow(self, frame1, frame2, *, stride):
      at_xy = tracking.grid(frame1.shape[:2], stride)
      return np.zeros_like(at_xy), at_xy

  monkeypatch.setattr(cwm_jax, "Tracker", Still, raising=False)
  cells = code("1_track_a_video")
  space = {}
  run_cell(cells[1], space)
  clip = viz.write_mp4(tmp_path / "v.mp4", np.zeros((2, 540, 960, 3), np.uint8), fps=30)
  space |= {"VIDEO": str(clip), "GRID": 1, "OUT": str(tmp_path / "out")}
  assert run_cell(cells[2], space).width < 1400
  xy = np.full((1, 2, 2), 80.0, np.float32)
  space["tracks"] = types.SimpleNamespace(xy=xy, visible=np.ones((1, 2), bool))
  assert video.probe(run_cell(cells[4], space)).fps == 30
  assert run_cell(cells[7], space).width < 1500


def test_other_settings_of_the_drawn_set_draw_other_clips_and_are_evaluated_elsewhere(
  jupyter, tmp_path
):
  def draw_clip(seed):
    size, count = space["SIZE"], (space["POINTS"], space["FRAMES"])
    frames = np.zeros((space["FRAMES"], size, size, 3), np.uint8)
    return {
      "video": frames,
      "points": np.zeros((*count, 2), np.float32),
      "occluded": np.zeros(count, bool),
    }

  cells = code("4_evaluate_on_tapvid")
  space = {"draw_clip": draw_clip}
  run_cell(cells[1], space)
  folders = []
  for clips, size in ((2, 16), (1, 16), (1, 24)):
    space |= {"CLIPS": clips, "SIZE": size, "WORKDIR": str(tmp_path)}
    run_cell(cells[2], space, without="draw_clip")
    assert len(space["clips"].names) == clips
    assert space["clips"].read(0).video.shape[1:3] == (size, size)
    space["evaluate"] = types.SimpleNamespace(run=lambda config, folder: folders.append(folder))
    run_cell(cells[4], space)
  assert len(set(folders)) == 3
