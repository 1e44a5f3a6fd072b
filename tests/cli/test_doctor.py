"""`cwm-jax doctor`: what it says, and that nothing stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import command_line

from cwm_jax import doctor


def test_here_everything_needed_is_found(capsys):
  code, out, err = command_line.run(capsys, "doctor")
  assert (code, err) == (0, "")
  assert "all that is needed is here" in out and "missing" not in out
  for about in ("Python", "jax", "devices", "shipped weights", "video", "disk here"):
    assert f"  {about}" in out
  facts = json.loads(command_line.run(capsys, "doctor", "--json")[1])
  assert facts["ok"] and {f["state"] for f in facts["findings"]} <= {"ok", "note"}
  (jax,) = (f for f in facts["findings"] if f["about"] == "jax")
  assert jax["found"] == metadata.version("jax")


def test_what_is_missing_is_named_with_a_way_to_get_it_and_exit_code_1(
  capsys, monkeypatch, tmp_path
):
  monkeypatch.setattr(doctor, "_version", lambda name: None if name == "flax" else "1.0")
  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path / "none"))
  monkeypatch.setenv("CWM_DATA", str(tmp_path / "gone"))
  code, out, _ = command_line.run(capsys, "doctor")
  assert code == 1 and "1 missing" in out
  lines = out.splitlines()
  at = next(i for i, line in enumerate(lines) if line.startswith("missing flax"))
  assert lines[at + 1].strip() == "pip install flax"
  assert any(line.startswith("note    CWM_DATA") and "gone" in line for line in lines)
  assert "none yet" in out


def test_libraries_that_cannot_be_imported_are_findings_and_no_traceback():
  lost = {"av": "av", "PIL": "pillow", "jaxtyping": "jaxtyping", "jax": "jax"}  # module: package
  script = f"import sys; sys.modules.update(dict.fromkeys({list(lost)!r}))\n"
  script += "from cwm_jax import cli; sys.exit(cli.main(['doctor', '--json']))"
  done = subprocess.run(
    [sys.executable, "-c", script],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=300,
  )
  assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
  states = {f["about"]: f for f in json.loads(done.stdout)["findings"]}
  for package in lost.values():
    assert states[package]["state"] == "missing"
    assert "cannot be imported" in states[package]["found"]
    assert states[package]["fix"].endswith(f" {package}")
  # It looked at all the rest.
  assert "disk here" in states and states["safetensors"]["state"] == "ok"


def test_every_package_that_the_project_asks_for_is_looked_at(capsys):
  about = {
    f["about"] for f in json.loads(command_line.run(capsys, "doctor", "--json")[1])["findings"]
  }
  wanted = {"scipy", "safetensors", "clu", "ml_collections", "jaxtyping", "absl-py", "tensorboardX"}
  assert wanted | {"tensorflow-datasets", "av", "pillow"} <= about
  assert ("array_record" in about) is (sys.platform == "linux")
  assert "jax[cuda12]" not in about and "beartype" not in about


def test_the_folder_of_compiled_programs_is_told_and_whether_it_can_be_written(
  capsys, monkeypatch, tmp_path
):
  def programs():
    out = command_line.run(capsys, "doctor", "--json")[1]
    (found,) = (f for f in json.loads(out)["findings"] if f["about"] == "programs")
    return found

  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path / "cache"))
  assert programs()["found"] == f"{tmp_path / 'cache' / 'programs'}: 0 compiled and kept"
  assert not (tmp_path / "cache").exists()
  kind = tmp_path / "cache" / "programs" / "kind"
  kind.mkdir(parents=True)
  (kind / "jit_f-0123-cache").touch()
  assert programs()["found"].endswith(": 1 compiled and kept")
  (tmp_path / "file").touch()
  monkeypatch.setenv("CWM_JAX_CACHE", str(tmp_path / "file"))
  found = programs()
  assert found["state"] == "note" and "CWM_JAX_CACHE" in found["fix"]
  assert found["found"].endswith("cannot be written")


def test_weights_that_are_lost_and_a_device_that_fails_are_findings(capsys, monkeypatch, tmp_path):
  import jax

  from cwm_jax.pretrained import weights

  def no_devices():
    raise RuntimeError("Unable to initialize backend 'tpu'\nand more")

  monkeypatch.setattr(jax, "devices", no_devices)
  monkeypatch.setattr(weights, "shipped", lambda: tmp_path / "gone.safetensors")
  code, out, err = command_line.run(capsys, "doctor", "--json")
  states = {f["about"]: f for f in json.loads(out)["findings"]}
  assert code == 1 and err == ""
  assert states["devices"]["found"] == "Unable to initialize backend 'tpu'"
  assert "JAX_PLATFORMS=cpu" in states["devices"]["fix"]
  assert states["shipped weights"]["state"] == "missing"
