"""common/download.py against a real server on this machine: D4RL's files arrive whole and right, or not at all."""

import hashlib
import importlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest

import common.download as download
from common.dataset import InputError, load_dataset
from common.download import D4RL, d4rl_file

ROOT = Path(__file__).resolve().parents[1]
NAME, FILE = "d4rl/walker2d-medium-replay-v2", "walker2d_medium_replay-v2.hdf5"
CONTENT = np.random.default_rng(0).bytes(500_000)


class Server(ThreadingHTTPServer):
    """Sends `content` for any path, as `mode` says, and keeps the path of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.mode, self.paths = CONTENT, "whole", []
        self.finished = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        if server.mode == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", len(server.content))
        self.end_headers()
        stop = len(server.content) if server.mode == "whole" else len(server.content) // 2
        self.wfile.write(server.content[:stop])
        if server.mode == "silent":
            server.finished.wait(10)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(download, "D4RL_URL", f"http://127.0.0.1:{server.server_port}/v2")
    yield server
    server.finished.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where files are looked for; the names stand for CONTENT."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    publish(monkeypatch, NAME, CONTENT)
    return tmp_path / "d4rl"


def publish(monkeypatch, name: str, content: bytes) -> None:
    monkeypatch.setitem(D4RL, name, (D4RL[name][0], hashlib.sha256(content).hexdigest()[:16]))


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def refusal(name=NAME) -> str:
    with pytest.raises(InputError) as error:
        d4rl_file(name)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- What arrives ---
def test_missing_file_is_downloaded_once_and_nothing_else_is_left(server, folder):
    usual = socket.getdefaulttimeout()
    assert d4rl_file(NAME) == folder / FILE == d4rl_file(NAME)
    assert (folder / FILE).read_bytes() == CONTENT and files(folder) == [FILE]
    assert server.paths == [f"/v2/{FILE}"] and socket.getdefaulttimeout() == usual


def test_interrupted_download_leaves_nothing(server, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch.hub.tqdm.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            d4rl_file(NAME)
    assert files(folder) == []
    assert d4rl_file(NAME).read_bytes() == CONTENT


def test_connection_that_falls_silent_is_cut(server, folder, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.mode, start = "silent", time.monotonic()
    assert "timed out" in refusal() and time.monotonic() - start < 3 and files(folder) == []


def test_three_at_once_get_the_same_right_file(server, folder):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(d4rl_file(NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [folder / FILE] * 3 and (folder / FILE).read_bytes() == CONTENT and files(folder) == [FILE]


# --- What is refused ---
@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT[:300_000], CONTENT + b"?", "cut"])
def test_what_is_not_the_file_is_deleted_and_the_next_try_succeeds(content, server, folder):
    server.content, server.mode = (CONTENT, "cut") if content == "cut" else (content, "whole")
    message = refusal()
    assert "invalid hash value" in message and "run the same command" in message and files(folder) == []
    server.content, server.mode = CONTENT, "whole"
    assert d4rl_file(NAME).read_bytes() == CONTENT


def test_without_network_the_sentence_comes_at_once_and_says_where_it_looked(folder, monkeypatch):
    with socket.socket() as free:  # a port where nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(download, "D4RL_URL", url)
    start, message = time.monotonic(), refusal()
    assert time.monotonic() - start < 3
    for words in (f"{FILE} is not in {folder}", f"{url}/{FILE}", "refused", "put the file there", "D4RL_DATASET_DIR"):
        assert words in message
    assert files(folder) == []


def test_server_without_the_file_gives_the_same_sentence(server, folder):
    server.mode = "missing"
    assert "404" in refusal() and files(folder) == []


def test_folder_that_cannot_be_written_gives_a_sentence(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file" / "d4rl"))
    message = refusal()
    assert "Not a directory" in message and "set D4RL_DATASET_DIR to a folder that has it or can be written" in message


def test_unknown_name_lists_the_possible_ones(server):
    with pytest.raises(InputError) as error:
        load_dataset("d4rl/hopper-medium-v0")
    assert "no dataset d4rl/hopper-medium-v0" in str(error.value) and all(name in str(error.value) for name in D4RL)
    assert server.paths == []


# --- Names ---
def test_names_are_the_15_of_d4rl_and_those_that_are_tuned(monkeypatch, server):
    grades = ("random", "medium", "medium-replay", "medium-expert", "expert")
    names = {f"d4rl/{env}-{grade}-v2" for env in ("halfcheetah", "hopper", "walker2d") for grade in grades}
    assert set(D4RL) == names
    for script in (path.stem for path in (ROOT / "algos").glob("*.py") if path.stem != "sdm_gan"):
        tuned = importlib.import_module(f"algos.{script}").TUNED
        assert {name for name in tuned if name.startswith("d4rl/")} <= names
    for name in sorted(names):
        publish(monkeypatch, name, CONTENT)
        assert d4rl_file(name).name == f"{name[5:-3].replace('-', '_')}-v2.hdf5"


def test_without_the_variable_files_are_in_the_users_folder(server, tmp_path, monkeypatch):
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".d4rl" / "datasets").mkdir(parents=True)
    (tmp_path / ".d4rl" / "datasets" / FILE).write_bytes(CONTENT)
    assert d4rl_file(NAME) == tmp_path / ".d4rl" / "datasets" / FILE and server.paths == []


# --- As datasets ---
def recorded(path: Path, obs_dim: int, action_dim: int) -> bytes:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = rng.normal(size=(2, 30, obs_dim)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (30, action_dim)).astype(np.float32)
        file["rewards"] = rng.normal(size=30).astype(np.float32)
        file["terminals"] = file["timeouts"] = np.arange(30) == 29
    return path.read_bytes()


def test_walker2d_is_downloaded_and_evaluated_with_its_own_right_foot(server, tmp_path, monkeypatch):
    name = "d4rl/walker2d-medium-v2"
    server.content = recorded(tmp_path / "source.hdf5", obs_dim=17, action_dim=6)
    publish(monkeypatch, name, server.content)
    data, again = load_dataset(name), load_dataset(name)
    assert data.name == name and len(data.obs) == 30 and data.data_hash == again.data_hash and len(server.paths) == 1
    assert data.env_spec.id == "Walker2d-v5" and data.env_spec.kwargs == {"xml_file": "walker2d.xml"}
    assert data.ref_scores == (1.629008, 4592.3) and data.action_high.tolist() == [1.0] * 6
    assert gym.spec("Walker2d-v5").kwargs == {}  # the registered one is left alone
    friction = {}
    for which, spec in (("d4rl", data.env_spec), ("v5", load_dataset(name, env_id="Walker2d-v5").env_spec)):
        env = gym.make(spec)
        friction[which] = [env.unwrapped.model.geom(f"foot{side}_geom").friction[0] for side in ("", "_left")]
        assert env.observation_space.shape == (17,)
        env.close()
    assert friction == {"d4rl": [0.9, 1.9], "v5": [1.9, 1.9]}


@pytest.mark.parametrize(
    "env_id, obs_dim, action_dim, ref_scores",
    [("Hopper-v5", 11, 3, (-20.272305, 3234.3)), ("HalfCheetah-v5", 17, 6, (-280.178953, 12135.0))],
)
def test_other_environments_are_those_of_v5(env_id, obs_dim, action_dim, ref_scores, folder, tmp_path, monkeypatch):
    name = f"d4rl/{env_id[:-3].lower()}-expert-v2"
    folder.mkdir()
    content = recorded(folder / f"{env_id[:-3].lower()}_expert-v2.hdf5", obs_dim, action_dim)
    publish(monkeypatch, name, content)
    data = load_dataset(name)
    assert data.env_spec == gym.spec(env_id) and data.ref_scores == ref_scores
