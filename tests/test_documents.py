"""What README, the longer pages, the weights' cards and the notebooks tell to type can be typed."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial

import pytest
import tiny_job

from cwm_jax import arguments, jobs, optim, schedule
from cwm_jax.configs import base

PAGES = [
  path
  for pattern in ("*.md", "launch/*.md", "configs/*.md", "cwm_jax/*/*.md", "launch/colab/*.ipynb")
  for path in sorted(tiny_job.ROOT.glob(pattern))
]
COMMANDS = re.findall(r"^    (\w+) ", arguments.parser().format_help(), re.MULTILINE)


def text(path) -> str:
  """A page, or the prose of a notebook."""
  if path.suffix != ".ipynb":
    return path.read_text()
  cells = json.loads(path.read_text())["cells"]
  return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands(page: str) -> list[str]:
  """What is to be typed: the lines of its blocks, and what stands between backticks."""
  fenced = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
  blocks = "".join(fenced.findall(page)).replace("\\\n", " ").splitlines()
  lines = [re.split(r"\s+#\s", line)[0] for line in blocks]
  return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", fenced.sub("", page))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(tiny_job.ROOT)))
def test_every_command_on_a_page_is_one(path, capsys):
  for line in commands(text(path)):
    words = shlex.split(line)[1:] if line.startswith("cwm-jax ") else []
    options = [word for word in words if word.startswith("--")]
    if words and (words == options or words == [words[0], *options] and words[0] in COMMANDS):
      # Only named, not given anything.
      with pytest.raises(SystemExit):
        arguments.parser().parse_args([word for word in words if word in COMMANDS] + ["--help"])
      assert set(options) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), line
    elif words:
      try:
        arguments.parser().parse_args(words)
      except SystemExit:
        pytest.fail(f"{line!r} is no command line of cwm-jax")
    # Plain pytest is not what the set-up brings, and hides what a test prints.
    assert "-m pytest" not in line, line
    if script := re.search(r"\bbash (launch/\w[\w.]*)", line):
      assert (tiny_job.ROOT / script[1]).is_file(), line
    for config in re.findall(r"\bconfigs/[\w.]+", line):
      assert (tiny_job.ROOT / config).exists(), line
    for key in re.findall(r"--config\.(?!key=)([\w.]+)=", line):
      section = base.get_config()
      for part in key.split("."):
        assert part in section, line
        section = section[part]


def test_a_training_of_a_length_that_a_page_sets_has_a_learning_rate():
  lines = [line for path in PAGES for line in commands(text(path))]
  lines = [line for line in lines if "--config.total=" in line]
  for line in lines:
    keys = [word[9:] for word in shlex.split(line) if word.startswith("--config.")]
    named = re.search(r"\bconfigs/(\w+)\.py((?::\w+)?)", line)
    config = jobs.load_config("".join(named.groups())) if named else base.get_config()
    jobs.set_keys(config, [key for key in keys if re.match(r"total=|optim\.", key)])
    steps = partial(schedule.to_steps, batch_size=config.data.batch_size, epoch_examples=1000)
    o = config.optim
    rate = optim.learning_rate(
      peak=o.peak_lr,
      warmup_steps=steps(o.warmup),
      total_steps=steps(config.total),
      schedule=o.schedule,
    )
    assert rate(0) > 0, line
  assert len(lines) > 1


def test_the_pages_are_read_whole():
  lines = [line for path in PAGES for line in commands(text(path))]
  asked = [line for line in lines if line.startswith("cwm-jax ")]
  assert len(asked) > 35 and {line.split()[1] for line in asked} >= {"track", "eval", "train"}
  assert "cwm-jax segments picture.png --at 120,80" in lines  # broken by the line's end
  assert "cwm-jax track clip.mp4 --grid 4 --out tracks" in lines  # in a notebook
  assert sum("--config." in line for line in lines) > 5
