"""A grid of runs: what it refuses, what a kill costs, and that no run depends on how it was started."""

import csv
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import benchmarks.run as run
from common.dataset import InputError

ROOT = Path(__file__).resolve().parents[1]
TINY = """
script = "iql"
compile = false
num-updates = 60
eval-interval = 20
eval-episodes = 2
checkpoint-interval = 20
batch-size = 32
hidden-sizes = "16 16"
"""
LONG = TINY.replace("num-updates = 60", "num-updates = 600").replace("eval-interval = 20", "eval-interval = 200")
MODEL = """
rollout-batch-size = 100
rollout-interval = 15
dynamics-max-epochs = 1
dynamics-hidden-size = 16
"""
WITH_MODEL = TINY.replace("iql", "mopo") + MODEL


@pytest.fixture
def home(tmp_path, tmp_path_factory, monkeypatch):
    """The working directory of the commands; the dataset is made once for all tests, ensembles are not shared."""
    datasets = tmp_path_factory.getbasetemp() / "datasets"
    datasets.mkdir(exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "datasets").symlink_to(datasets)
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_grid(home: Path, *blocks: str, tiny: str = TINY) -> str:
    file = home / "grid.toml"
    file.write_text('name = "g"\n' + "".join(f"[[grid]]\n{tiny}{block}\n" for block in blocks))
    return str(file)


def progress(folder: Path) -> list[dict]:
    """Without the columns that depend on the clock."""
    with open(folder / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "updates_per_second")} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert progress(one) == progress(other) and len(progress(one)) > 1
    a, b = (torch.load(folder / "policy.pt", weights_only=True)["actor"] for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- What is run ---
def test_every_cell_is_one_run_with_a_name_of_its_own(home):
    blocks = (
        'seed = [0, 1]\npenalty-coef = [0, 0.5]\ndataset = ["pendulum/random-v0", "a.npz"]',
        "seed = 7\ngamma = 0.9",
    )
    args = run.Args(grid=write_grid(home, *blocks, tiny=WITH_MODEL))
    runs = run.make_runs(*run.read_grid(args), args)
    assert len(runs) == 9
    names = [one.folder.name for one in runs]
    assert {"pendulum-random-v0__mopo__penalty-coef=0.5__1", "a.npz__mopo__penalty-coef=0__0"} <= set(names)
    assert str(runs[-1].folder) == "runs/g/pendulum-random-v0__mopo__7"
    assert runs[-1].settings["gamma"] == 0.9 and runs[-1].settings["num_updates"] == 60


def test_however_a_number_is_written_it_is_the_same_method(home):
    for text, name in (("0.0", "0"), ("5e-1", "0.5"), ("2", "2"), ('"2.0"', "2")):
        args = run.Args(grid=write_grid(home, f"penalty-coef = [{text}]", tiny=WITH_MODEL))
        [made] = run.make_runs(*run.read_grid(args), args)
        assert made.variant == f"penalty-coef={name}" and f"__penalty-coef={name}__" in made.folder.name
    args = run.Args(grid=write_grid(home, 'dynamics = ["ens-1.0", "ens-1"]', tiny=WITH_MODEL))
    assert [made.variant for made in run.make_runs(*run.read_grid(args), args)] == [
        "dynamics=ens-1.0",
        "dynamics=ens-1",
    ]


def test_a_setting_of_several_numbers_is_a_text_and_an_axis_of_them_a_list_of_texts(home):
    tiny = TINY.replace('hidden-sizes = "16 16"', "")
    for line, sizes in (
        ('hidden-sizes = "64 32"', {"": [64, 32]}),
        ('hidden-sizes = ["64 64", "8"]', {"hidden-sizes=64-64": [64, 64], "hidden-sizes=8": [8]}),
    ):
        args = run.Args(grid=write_grid(home, line, 'dataset = "my data.npz"\n' + line, tiny=tiny))
        runs = run.make_runs(*run.read_grid(args), args)
        for made in runs:
            assert made.settings["hidden_sizes"] == sizes[made.variant]
            words = made.command(1)
            at, numbers = words.index("--hidden-sizes"), list(map(str, sizes[made.variant]))
            assert words[at + 1 : at + 1 + len(numbers)] == numbers
            assert f"__iql__{made.variant}__0".replace("____", "__") in made.folder.name
        assert len(runs) == 2 * len(sizes) and "my data.npz" in runs[-1].command(1)
    args = run.Args(script="iql", set=("hidden-sizes=64 64,8",))
    assert [made.variant for made in run.make_runs(*run.read_grid(args), args)] == list(sizes)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "grids").glob("*.toml")), ids=lambda file: file.stem)
def test_every_grid_here_can_be_read(home, file):
    args = run.Args(grid=str(file))
    name, blocks = run.read_grid(args)
    assert name == file.stem and run.make_runs(name, blocks, args) and not Path("runs").exists()


def test_a_block_is_made_once_with_each_table_that_it_shares_and_its_own_settings_win(home):
    tables = "[shared.a]\nseed = [0, 1]\ngamma = 0.8\n[shared.b]\nseed = 2\nnum-updates = 7\n"
    Path("g.toml").write_text(tables + '[[grid]]\nscript = "mopo"\nshared = ["a", "b"]\nnum-updates = 5\n')
    args = run.Args(grid="g.toml")
    made = [run.settings for run in run.make_runs(*run.read_grid(args), args)]
    assert [(one["seed"], one["gamma"], one["num_updates"]) for one in made] == [(0, 0.8, 5), (1, 0.8, 5), (2, 0.99, 5)]


@pytest.mark.parametrize("table, name", [("small", '"small"'), ("1", "[1]")])
def test_a_block_may_name_the_one_table_that_it_shares(home, table, name):
    Path("g.toml").write_text(f'[shared.{table}]\nseed = [3, 4]\n[[grid]]\nscript = "mopo"\nshared = {name}\n')
    args = run.Args(grid="g.toml")
    assert [made.settings["seed"] for made in run.make_runs(*run.read_grid(args), args)] == [3, 4]


def test_a_grid_goes_seed_by_seed_and_set_by_set_so_that_a_part_of_it_can_be_compared(home, capsys):
    axes = 'seed = [0, 1]\ndataset = ["b.npz", "a.npz"]\n'
    Path("g.toml").write_text("".join(f'[[grid]]\nscript = "{script}"\n{axes}' for script in ("iql", "bc")))
    assert run.main(run.Args(grid="g.toml", dry_run=True)) == 0
    names = re.findall(r"--run-name (\S+)", capsys.readouterr().out)
    assert names == [f"{a}__{b}__{seed}" for seed in (0, 1) for a in ("b.npz", "a.npz") for b in ("iql", "bc")]


def test_flags_make_the_same_grid_as_a_file(home):
    text = 'name = "g"\n[[grid]]\nscript = "mopo"\nseed = [0, 1]\npenalty-coef = [0, 1]\nnum-updates = 9\n'
    (home / "f.toml").write_text(text)
    settings = ("penalty-coef=0,1", "num-updates=9")
    by_flags = run.Args(script="mopo", seeds=(0, 1), set=settings, name="g")
    by_file = run.Args(grid="f.toml")
    one, other = (run.make_runs(*run.read_grid(args), args) for args in (by_flags, by_file))
    key = lambda made: (str(made.folder), made.settings)  # noqa: E731
    assert sorted(map(key, one), key=str) == sorted(map(key, other), key=str) and len(one) == 4


def test_a_printed_command_does_by_hand_what_the_grid_would_have_done(home, capsys):
    grid = write_grid(home, "gamma = [0.9]")
    assert run.main(run.Args(grid=grid, dry_run=True)) == 0
    command = capsys.readouterr().out.strip()
    assert not Path("runs").exists()
    words = shlex.split(command)
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    assert run.main(run.Args(grid=grid, dry_run=True)) == 0
    assert capsys.readouterr().out.startswith("# finished: ")
    assert run.main(run.Args(grid=grid, run_dir="others", workers=1)) == 0
    name = "pendulum-random-v0__iql__gamma=0.9__0"
    assert_same_run(Path("runs/g") / name, Path("others/g") / name)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[grid]]\nseed = 1", "needs a script"),
        ('[[grid]]\nscript = "no"', "there is no script algos/no.py"),
        ('[[grid]]\nscript = "mopo"\nno-such = 1', "algos/mopo.py has no setting no-such: python algos/mopo.py --help"),
        ('[[grid]]\nscript = "mopo"\npenalty = 1', "has no setting penalty: did you mean penalty-coef"),
        ('[[grid]]\nscript = "mopo"\nhelp = true', "has no setting help"),
        ('[[grid]]\nscript = "mopo"\ntyro-print-completion = "bash"', "has no setting tyro-print-completion"),
        ('[[grid]]\nscript = "mopo"\ndataset = "--help"', "Missing value for argument '--dataset'"),
        ('[[grid]]\nscript = "mopo"\nhidden-sizes = "64 -h"', "-h makes it end without a run: take it out"),
        ('[[grid]]\nscript = "mopo"\nseed = "one"', "seed"),
        ('[[grid]]\nscript = "mopo"\nseed = []', "every list a value"),
        ('[[grid]]\nscript = "mopo"\ngamma = {a = 1}', "gamma cannot be"),
        ('[[grid]]\nscript = "mopo"\nhidden-sizes = [[64, 64]]', "several numbers are one: '64 64'"),
        ('[[grid]]\nscript = "mopo"\nreal-ratio = 2.0', "between 0 and 1"),
        ('[[grid]]\nscript = "mopo"\nnum-threads = 2', "num-threads cannot be set in a grid"),
        ('[[grid]]\nscript = "mopo"\n[[grid]]\nscript = "mopo"\ngamma = 0.9', "must differ in a list"),
        ('name = "../up"\n[[grid]]\nscript = "mopo"', "cannot be a folder's name"),
        ('seed = 1\n[[grid]]\nscript = "mopo"', "seed stands outside"),
        ('[[grid]]\nscript = "mopo"\nshared = ["small"]', "shares 'small', but there is no [shared.small] table"),
        ('shared = 1\n[[grid]]\nscript = "mopo"\nshared = "small"', "there is no [shared.small] table"),
        ("script = ", "is no TOML"),
        ("", "has no [[grid]] block"),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_run_is_refused_with_one_sentence(home, text, words):
    (home / "bad.toml").write_text(text)
    with pytest.raises(InputError) as error:
        run.main(run.Args(grid="bad.toml", workers=1))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize("dataset", ["./a.npz", "../a.npz", "~/a.npz", "/../.a.npz", ".hidden/../a.npz"])
def test_no_run_is_made_in_a_hidden_folder_or_outside_of_the_grids(home, dataset):
    args = run.Args(grid=write_grid(home, f'dataset = "{dataset}"'))
    (one,) = run.make_runs(*run.read_grid(args), args)
    assert one.folder.parent == Path("runs/g") and one.folder.name.endswith("a.npz__iql__0")
    assert one.folder.name[0] not in ".-~"


def test_a_tilde_is_the_home_in_every_path(home, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(home))
    write_grid(home, 'dataset = "~/a.npz"')
    assert run.main(run.Args(grid="~/grid.toml", run_dir="~/runs", dry_run=True)) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[command.index("--run-dir") + 1] == str(home / "runs/g")
    assert f"'{home}/a.npz'" in repr(run.make_runs(*run.read_grid(a := run.Args(grid="~/grid.toml")), a)[0].settings)


@pytest.mark.parametrize(
    "block, trusts", [("trust = true", True), ('env-id = "mine:A-v0"', True), ("gamma = 0.9", False)]
)
def test_a_run_goes_on_with_trust_where_the_grid_gave_it_or_names_the_module(home, block, trusts):
    args = run.Args(grid=write_grid(home, block))
    (one,) = run.make_runs(*run.read_grid(args), args)
    one.folder.mkdir(parents=True)
    # as a run's folder has them: never with its own word for trust
    (one.folder / "config.json").write_text(json.dumps({"args": one.settings | {"trust": False}}))
    assert one.state() == "begun" and ("--trust" in one.command(1)) == trusts


@pytest.mark.parametrize("peak", ["[1]", '{"peak_memory_gb": null}', '{"peak_memory_gb": "much"}', "{"])
def test_what_lies_damaged_in_a_folder_costs_no_grid(home, peak):
    args = run.Args(grid=write_grid(home, ""))
    (one,) = run.make_runs(*run.read_grid(args), args)
    one.folder.mkdir(parents=True)
    (one.folder / "resources.json").write_text(peak)
    (one.folder / "log.txt").write_bytes(b"\xff $ CUDA_VISIBLE_DEVICES=1 python algos/iql.py")
    (one.folder / "progress.csv").write_bytes(b"\xff")
    assert (one.peak_memory_gb(), one.gpu(), one.last_update()) == (0, "1", 0)
    one.write_resources(1.5)
    assert one.peak_memory_gb() == 1.5


def test_where_nothing_can_be_written_there_is_one_sentence(home):
    (home / "no").write_text("a file")
    grid = write_grid(home, "")
    with pytest.raises(InputError, match="^cannot write to no/runs/g/.*: choose another --run-dir$"):
        run.main(run.Args(grid=grid, run_dir="no/runs"))
    limits = "import resource, runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limits += "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); "  # bytes of a file, as if the disk were full
    start = f"{limits}runpy.run_path({str(ROOT / 'benchmarks' / 'run.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", start, grid], capture_output=True, text=True)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 1 and said.startswith("error: cannot write to runs/g (File too large): ")
    assert not list(home.rglob("*.tmp"))


def test_a_grid_for_gpus_needs_one_here_only_where_it_runs_here(home, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, blocks = run.read_grid(run.Args(grid=write_grid(home, 'device = "cuda"')))
    with pytest.raises(InputError, match="torch finds no GPU"):
        run.make_runs(name, blocks, run.Args())
    (one,) = run.make_runs(name, blocks, run.Args(ray="auto"))
    assert one.settings["device"] == "cuda" and one.command(1)[2:][one.flags.index("--device") :][1] == "cuda"
    blocks = run.read_grid(run.Args(grid=write_grid(home, 'device = ["cpu", "cuda"]')))[1]
    assert [made.variant for made in run.make_runs(name, blocks, run.Args(ray="auto"))] == ["device=cpu", "device=cuda"]
    assert not torch.cuda.is_available()


def gpus_of_sleeping_runs(monkeypatch) -> list[str | None]:
    """Runs that do nothing for a second; as each one starts it adds the GPU that it sees."""
    popen, seen = subprocess.Popen, []

    def sleeping(command, env, **kwargs):
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return popen([sys.executable, "-c", "import time; time.sleep(1)"], env=env, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    return seen


def test_the_gpu_of_a_run_that_was_left_behind_is_not_given_to_another(home, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    grid, seen = write_grid(home, "seed = [0, 1]"), gpus_of_sleeping_runs(monkeypatch)
    left_behind = Path("runs/g/pendulum-random-v0__iql__0")
    left_behind.mkdir(parents=True)
    (left_behind / "log.txt").write_text("half a bar$ CUDA_VISIBLE_DEVICES=0 python algos/iql.py\n")
    with open(left_behind / "log.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        threading.Timer(2, lambda: fcntl.flock(log, fcntl.LOCK_UN)).start()
        assert run.main(run.Args(grid=grid, memory_per_worker=0.01)) == 1
    assert seen == ["1", "0"]


@pytest.mark.parametrize(
    "visible, device, workers, at_a_time, gpus",
    [
        (None, "auto", 0, 2, ["0", "1"]),
        ("7,GPU-a5", "auto", 0, 2, ["7", "GPU-a5"]),
        (None, "auto", 4, 4, ["0", "1"]),
        (None, "cpu", 4, 4, [None, None]),
    ],
)
def test_runs_are_spread_over_the_gpus(home, monkeypatch, capsys, visible, device, workers, at_a_time, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    seen = gpus_of_sleeping_runs(monkeypatch)
    grid = write_grid(home, f'device = "{device}"\nseed = [0, 1, 2, 3]')
    assert run.main(run.Args(grid=grid, workers=workers, memory_per_worker=0.01)) == 1  # nothing was trained
    assert f", {at_a_time} at a time," in capsys.readouterr().out
    assert seen[:2] == gpus and sorted(seen[2:], key=str) == sorted(gpus, key=str)


def test_more_workers_than_memory_and_axes_that_have_a_flag_are_refused(home):
    with pytest.raises(InputError, match="the largest number that fits is"):
        run.main(run.Args(grid=write_grid(home, ""), workers=100_000))
    with pytest.raises(InputError, match="lower --memory-per-worker"):
        run.main(run.Args(grid=write_grid(home, ""), memory_per_worker=1e6))
    with pytest.raises(InputError, match="--set seed=0,1: give it as --seeds,"):
        run.main(run.Args(script="mopo", set=("seed=0,1",)))


@pytest.mark.parametrize(
    "top, line, limit, usage, stat",
    [
        ("sys/fs/cgroup", "0::/", "memory.max", "memory.current", "inactive_file 50"),
        ("sys/fs/cgroup/memory", "0::/\n4:memory:/", "memory.limit_in_bytes", "memory.usage_in_bytes",
         "inactive_file 10\ntotal_inactive_file 50"),
    ],
    ids=["version 2", "version 1"],
)  # fmt: skip
def test_room_is_what_the_control_groups_leave(tmp_path, top, line, limit, usage, stat):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")

    assert run.cgroup_room(tmp_path) == float("inf")  # no such system
    write("proc/self/cgroup", f"9:cpu:/\n{line}job/step")
    for group, values in (("", ("1000", "100")), ("job", ("600", "300")), ("job/step", ("max", "300"))):
        for name, value in zip((limit, usage), values):
            write(f"{top}/{group}/{name}", value)
        write(f"{top}/{group}/memory.stat", f"anon 7\n{stat}")
    assert run.cgroup_room(tmp_path) == 600 - 300 + 50  # the job's
    write(f"{top}/job/step/{limit}", "400")
    assert run.cgroup_room(tmp_path) == 400 - 300 + 50  # the step's
    write("proc/self/cgroup", f"{line}of/the/host")  # as a container sees it without a namespace of its own
    assert run.cgroup_room(tmp_path) == 1000 - 100 + 50


def test_what_a_killed_start_has_left_behind_counts_as_room(home, monkeypatch):
    monkeypatch.setattr(run, "available_gb", lambda: 0.1)
    grid, folder = write_grid(home, ""), Path("runs/g/pendulum-random-v0__iql__0")
    with pytest.raises(InputError, match="lower --memory-per-worker"):
        run.main(run.Args(grid=grid, workers=1))
    folder.mkdir(parents=True)
    with run.Run("iql", "", folder, [], {}).lock() as log:
        left_behind = subprocess.Popen(["sleep", "3"], stdout=log)
    assert run.main(run.Args(grid=grid, workers=1)) == 0  # it has waited for the end, then started the run
    assert left_behind.wait() == 0 and (folder / "policy.pt").is_file()


@pytest.mark.parametrize(
    "args, words",
    [
        ({"workers": -1}, "--workers must be at least 0"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"gpus_per_run": -0.5}, "--gpus-per-run must be at least 0"),
        ({"memory_per_worker": 0.0}, "--memory-per-worker must be at least 0.01"),
        ({"memory_per_worker": float("nan")}, "--memory-per-worker must be at least 0.01"),
        ({"script": ""}, "nothing to run: name the file of a grid, or a script with --script"),
        ({"set": ("gamma",)}, "--set gamma: write name=value or name=value,value, and every name once"),
        ({"set": ("gamma=0.9", "gamma=0.8")}, "--set gamma=0.8: write name=value"),
        ({"set": ("dataset=a.npz",)}, "--set dataset=a.npz: give it as --dataset, with a blank between values"),
        ({"grid": "g.toml"}, "give the file of a grid, or --script, --dataset, --seeds and --set, not both"),
        ({"grid": "no.toml", "script": ""}, "cannot read the grid no.toml: No such file or directory"),
    ],
)
def test_flags_that_make_no_grid_are_refused_with_one_sentence(home, args, words):
    with pytest.raises(InputError) as error:
        run.main(run.Args(**{"script": "iql", "dry_run": True} | args))
    assert words in str(error.value) and "\n" not in str(error.value)


# --- What happens to runs ---
def test_a_failing_run_stops_nothing_and_is_listed_with_its_last_words(home, capsys):
    grid = write_grid(home, 'dataset = ["missing.npz", "pendulum/random-v0"]')
    assert run.main(run.Args(grid=grid, workers=1)) == 1
    out = capsys.readouterr().out
    assert "1 of 2 runs finished, 1 failed" in out
    assert re.search(r"failed +missing\.npz__iql__0, exit status 1\n(    .*\n)*    error: .*missing\.npz", out)
    done = Path("runs/g/pendulum-random-v0__iql__0/policy.pt")
    before = done.stat().st_mtime_ns
    assert run.main(run.Args(grid=grid, workers=1)) == 1  # the finished one is skipped
    assert done.stat().st_mtime_ns == before
    assert "1 finished" in capsys.readouterr().out


def test_a_run_that_is_killed_is_reported_by_the_name_of_the_signal(home, capsys, monkeypatch):
    start, kill = run.start, ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(run, "start", lambda command, *rest, **gpu: start(kill, *rest, **gpu))
    assert run.main(run.Args(grid=write_grid(home, ""), workers=1)) == 1
    out = capsys.readouterr().out
    assert "failed      pendulum-random-v0__iql__0, killed by SIGKILL\n" in out and "0 of 1 runs finished" in out


def test_a_folder_with_other_settings_is_refused_and_kept(home):
    grid = write_grid(home, "gamma = 0.9")
    assert run.main(run.Args(grid=grid, workers=1)) == 0
    grid = write_grid(home, "gamma = 0.8")
    with pytest.raises(InputError, match=r"holds a run with gamma 0.9, the grid asks for 0.8"):
        run.main(run.Args(grid=grid, workers=1))
    assert Path("runs/g/pendulum-random-v0__iql__0/policy.pt").is_file()


def test_a_run_that_comes_out_with_other_settings_fails_alone(home, capsys, monkeypatch):
    def start_edited(command, *rest, **gpu):  # as if the script had been edited since the grid began
        return start(command + ["--gamma", "0.5"] if command[-1].endswith("iql__0") else command, *rest, **gpu)

    start = run.start
    monkeypatch.setattr(run, "start", start_edited)
    grid = write_grid(home, "seed = [0, 1]")
    assert run.main(run.Args(grid=grid, workers=1)) == 1
    out = capsys.readouterr().out
    assert "1 of 2 runs finished, 1 failed" in out
    assert re.search(r"failed +\S+__iql__0, .*\n(    .*\n)*    error: .* holds a run with gamma 0.5", out)


def test_a_folder_that_spoils_while_its_run_waits_is_left_alone(home, capsys, monkeypatch):
    def start_and_spoil(*inputs, **gpu):
        Path("runs/g/pendulum-random-v0__iql__1/config.json").write_text("{")
        return start(*inputs, **gpu)

    start = run.start
    monkeypatch.setattr(run, "start", start_and_spoil)
    assert run.main(run.Args(grid=write_grid(home, "seed = [0, 1, 2]"), workers=1)) == 1
    out = capsys.readouterr().out
    assert "2 of 3 runs finished, 1 failed" in out and "config.json is damaged" in out
    assert not Path("runs/g/pendulum-random-v0__iql__1/checkpoint.pt").exists()


def test_two_workers_that_want_the_same_ensemble_fit_it_once(home):
    assert run.main(run.Args(grid=write_grid(home, "penalty-coef = [0, 1, 2]", tiny=WITH_MODEL), workers=2)) == 0
    logs = [file.read_text() for file in Path("runs/g").glob("*/log.txt")]
    assert len(logs) == 3 and sum("fitted in" in log for log in logs) == 1
    assert len(list((home / "cache" / "dynamics").glob("*.pt"))) == 1


def wait_for_checkpoints(runner: subprocess.Popen, number: int) -> None:
    deadline = time.monotonic() + 300
    while len(list(Path("runs/g").glob("*/checkpoint.pt"))) < number:
        assert runner.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def kill_all(runner: subprocess.Popen, folder: Path) -> None:
    """SIGKILL for the runner and for every process with its folder in the command line, as when a machine goes down."""
    runner.kill()
    runner.wait()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:  # it has just ended
            pass


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found by /proc")
@pytest.mark.parametrize("everything", [True, False], ids=["runs are killed too", "only the runner is killed"])
def test_a_killed_grid_goes_on_and_ends_as_an_undisturbed_one(home, everything):
    grid = write_grid(home, "seed = [0, 1]", tiny=LONG)
    folder = home / "killed" / "g"
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), grid, "--run-dir", str(home / "killed")]
    runner = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    if everything:
        kill_all(runner, folder)
    else:
        runner.kill()
        runner.wait()
    saved = [file.parent for file in folder.glob("*/checkpoint.pt")]
    assert saved and not list(folder.glob("*/policy.pt"))
    assert run.main(run.Args(grid=grid, run_dir=str(home / "killed"), workers=2)) == 0
    for made in folder.iterdir():  # what each start of it began with
        starts = re.findall(r"\$ python .*", (made / "log.txt").read_text())
        assert len(starts) == (2 if everything else 1)
        assert not everything or made not in saved or "--resume" in starts[1]
    assert run.main(run.Args(grid=grid, run_dir=str(home / "whole"), workers=2)) == 0
    for seed in (0, 1):
        name = f"pendulum-random-v0__iql__{seed}"
        assert_same_run(folder / name, home / "whole" / "g" / name)


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_at_a_checkpoint_and_says_how_to_go_on(home):
    endless = re.sub("(num-updates|eval-interval) = .*", r"\1 = 1_000_000", TINY)
    flags = ["--run-dir", str(home / "runs"), "--workers", "1"]  # by this folder what stays behind is killed
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), write_grid(home, "", tiny=endless), *flags]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_checkpoints(runner, 1)
        runner.send_signal(signal.SIGINT)
        output, _ = runner.communicate(timeout=60)
    finally:
        kill_all(runner, home)
    folder = Path("runs/g/pendulum-random-v0__iql__0")
    assert runner.returncode == 130, output
    assert f"to go on: python {shlex.join(command[1:])}" in output and "0 of 1 runs finished, 0 failed" in output
    assert not (folder / "policy.pt").exists() and "stopped     after" in (folder / "log.txt").read_text()


# --- Ray ---
@pytest.fixture
def cluster(home):
    pytest.importorskip("ray", reason="pip install -r requirements-cluster.txt")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "memory": 4 * 10**9})
    yield cluster
    cluster.shutdown()


def start_on_ray(grid: str, cluster) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), grid, "--ray", cluster.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_finished_as_here(runner: subprocess.Popen, grid: str, seeds: tuple[int, ...]) -> None:
    output, _ = runner.communicate(timeout=300)
    assert runner.returncode == 0, output
    assert f"{len(seeds)} of {len(seeds)} runs finished, 0 failed" in output
    assert run.main(run.Args(grid=grid, run_dir="here", workers=1)) == 0
    for name in (f"pendulum-random-v0__iql__{seed}" for seed in seeds):
        assert_same_run(Path("runs/g") / name, Path("here/g") / name)
        there, here = (json.loads((Path(where, "g", name) / "config.json").read_text()) for where in ("runs", "here"))
        assert there["commit"] == here["commit"] != ""


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_of_the_grid_costs_what_came_after_the_last_checkpoint(home, cluster):
    grid = write_grid(home, "seed = [0, 1, 2]", tiny=TINY.replace("num-updates = 60", "num-updates = 600"))
    node = cluster.add_node(num_cpus=1, memory=4 * 10**9)
    cluster.wait_for_nodes()
    runner = start_on_ray(grid, cluster)
    wait_for_checkpoints(runner, 2)  # both nodes are at work
    cluster.remove_node(node, allow_graceful=False)
    assert_finished_as_here(runner, grid, (0, 1, 2))
    assert sum("--resume" in file.read_text() for file in Path("runs/g").glob("*/log.txt")) == 1


@pytest.mark.slow
def test_a_killed_grid_on_a_cluster_goes_on_from_the_last_checkpoint(home, cluster):
    grid = write_grid(home, "seed = [0]", tiny=TINY.replace("num-updates = 60", "num-updates = 600"))
    runner, folder = start_on_ray(grid, cluster), Path("runs/g/pendulum-random-v0__iql__0")
    wait_for_checkpoints(runner, 1)
    runner.kill()
    runner.communicate()
    assert len(progress(folder)) and not (folder / "policy.pt").exists()
    assert_finished_as_here(start_on_ray(grid, cluster), grid, (0,))
    assert "--resume" in (folder / "log.txt").read_text()
