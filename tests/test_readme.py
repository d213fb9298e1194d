"""The README's code is taken from there and run as it stands (how a policy is loaded: tests/test_run.py)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from common.dataset import load_dataset

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
QUICK = "--no-compile --num-threads 1 --num-updates 1800 --eval-interval 600"
QUICK += " --dynamics-hidden-size 64 --tau 0.02 --actor-lr 1e-3 --critic-lr 1e-3"


def test_an_environment_with_a_rule_that_nobody_knows_is_learned_from_plain_arrays(tmp_path):
    section = README.split("### An environment of your own")[1].split("\n## ")[0]
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", section, re.DOTALL):
        (tmp_path / name).write_text(code)
    env = os.environ | {"OFFLINE_MBRL_CACHE": str(tmp_path / "cache"), "MINARI_DATASETS_PATH": str(tmp_path / "minari")}
    commands = [shlex.split(line) for line in re.findall(r"^    python (.*)$", section, re.MULTILINE)]
    assert [command[0] for command in commands] == ["record.py", "algos/mopo.py"]
    for script, *flags in commands:
        path = tmp_path / script if script == "record.py" else ROOT / script
        command = [sys.executable, str(path), *flags, *(QUICK.split() if script != "record.py" else [])]
        output = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert output.returncode == 0, output.stderr
    assert "auto chose learned: Walk-v0 is not in the table" in output.stdout
    score, behaviour = (
        float(re.search(rf"^{word} +(-?[\d.]+)", output.stdout, re.MULTILINE)[1]) for word in ("score", "behaviour")
    )
    # without a rule of termination the policy walks off the table: its score stays below 15
    assert behaviour < 5 and score > 25


def test_logs_saved_as_the_readme_says_load_with_every_row(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    walk, ends = rng.normal(size=(101, 2)).cumsum(axis=0), np.arange(100) % 25 == 24
    arrays = dict(obs=walk[:-1], next_obs=walk[1:] + ends[:, None], actions=rng.uniform(-1, 1, (100, 1)))
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(import numpy as np\n\nnp\.savez.*?)```", README, re.DOTALL)[1]
    exec(code, arrays | dict(rewards=walk[1:, 0], terminals=np.zeros(100, bool), timeouts=ends))
    data = load_dataset("mine.npz")
    assert len(data.obs) == 100 and len(data.episode_returns) == 4 and capsys.readouterr().err == ""
