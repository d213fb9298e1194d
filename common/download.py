"""D4RL's gym-mujoco v2 datasets by name: a file that is there already, else downloaded, resumed and checked."""

import hashlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

from common import InputError

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
D4RL = {  # bytes and the first 16 hex digits of the SHA-256 of each file
    "d4rl/halfcheetah-random-v2": (237338037, "25407aef85b5d16c"),
    "d4rl/halfcheetah-medium-v2": (237727262, "41324e8487a9556d"),
    "d4rl/halfcheetah-medium-replay-v2": (59448533, "48d494a4770c11f4"),
    "d4rl/halfcheetah-medium-expert-v2": (474567252, "015db75dae5bbe8e"),
    "d4rl/halfcheetah-expert-v2": (237464597, "d9fe53bb994eb1e2"),
    "d4rl/hopper-random-v2": (152525345, "63103ef7059db4c0"),
    "d4rl/hopper-medium-v2": (152756557, "5bdf1bc4a713c829"),
    "d4rl/hopper-medium-replay-v2": (75854457, "e121c5f7c9857a30"),
    "d4rl/hopper-medium-expert-v2": (304537315, "9d51ad87f8c905be"),
    "d4rl/hopper-expert-v2": (152427435, "01aa219a5f8eea5e"),
    "d4rl/walker2d-random-v2": (216109364, "4e863bb6090cf4a4"),
    "d4rl/walker2d-medium-v2": (232254996, "cf00f43add04c17f"),
    "d4rl/walker2d-medium-replay-v2": (86323963, "e75de96a4f77acf7"),
    "d4rl/walker2d-medium-expert-v2": (462197079, "6b8d7f868c45bbae"),
    "d4rl/walker2d-expert-v2": (230567195, "2985dc3d436a8baa"),
}
D4RL_ENVS = {  # to evaluate in, by the first word of the name: id and settings
    "halfcheetah": ("HalfCheetah-v5", {}),
    "hopper": ("Hopper-v5", {}),
    "walker2d": ("Walker2d-v5", {"xml_file": "walker2d.xml"}),  # its right foot slips as in v2; v5's own grips
}
TIMEOUT = 20  # seconds without an answer


def d4rl_file(name: str) -> Path:
    """The file of `name`, a key of D4RL, in $D4RL_DATASET_DIR or ~/.d4rl/datasets; downloaded when it is not there.

    Raises InputError for another name, for a file of the wrong size, and when the download fails or is not the file.
    """
    if name not in D4RL:
        raise InputError(f"There is no dataset {name}: choose one of {', '.join(D4RL)}.")
    size, sha256 = D4RL[name]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    file = folder / f"{name[len('d4rl/') : -len('-v2')].replace('-', '_')}-v2.hdf5"
    if not file.exists():
        _download(f"{D4RL_URL}/{file.name}", file, size, sha256)
    if file.stat().st_size != size:
        raise InputError(
            f"{file} has {file.stat().st_size:,} bytes but D4RL's file has {size:,}: move it away to have the same "
            "command download it, or give its path as --dataset to use it as it is."
        )
    return file


def _download(url: str, file: Path, size: int, sha256: str) -> None:
    """Into <file>.part, from where an earlier download stopped; moved to `file` only when whole and right.

    Two processes may do so at once, without a lock: each writes the server's bytes to their own places, so that both
    write the same, and stops when the other one has finished.
    """
    part = file.with_name(f"{file.name}.part")
    start, reason = part.stat().st_size if part.exists() else 0, ""
    if start < size:
        with _request(url, file.parent, start) as response:
            start = start if response.status == 206 else 0  # 200: the server sends the whole file, whatever was asked
            length = response.headers["Content-Length"]
            if length is not None and start + int(length) != size:
                raise InputError(f"{url} is not D4RL's file of {size:,} bytes: put that one into {file.parent}.")
            reason = _receive(response, part, file, start, size)
    try:
        if file.exists():  # another process was faster
            part.unlink(missing_ok=True)
            return
        if part.stat().st_size < size:
            raise InputError(
                f"{url} broke off after {part.stat().st_size:,} of {size:,} bytes ({reason}): the same command resumes."
            )
        with part.open("rb") as opened:
            right = hashlib.file_digest(opened, "sha256").hexdigest().startswith(sha256)
        if not right:
            part.unlink()
            raise InputError(f"What came from {url} has a wrong SHA-256 and was deleted: the same command tries again.")
        os.replace(part, file)
    except OSError as error:
        if not file.exists():  # else another process moved it a moment ago
            raise InputError(f"Cannot write {file} ({reason or error}): correct D4RL_DATASET_DIR.") from error


def _request(url: str, folder: Path, start: int) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        if start and getattr(error, "code", None) == 416:  # the server's file ends before that
            return _request(url, folder, 0)
        raise InputError(
            f"{url.rpartition('/')[2]} is not in {folder}, and its download from {url} failed ({error}): run the same "
            "command where there is a network, or put the file there, or set D4RL_DATASET_DIR to where it lies."
        ) from error


def _receive(response: http.client.HTTPResponse, part: Path, file: Path, start: int, size: int) -> str:
    """Writes the response to its place in `part`. Returns what stopped it."""
    style = dict(unit="B", unit_scale=True, mininterval=0.1 if sys.stderr.isatty() else 30, leave=False)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        with tqdm(desc=file.name, initial=start, total=size, **style) as bar, part.open("r+b") as opened:
            opened.seek(start)
            while not file.exists() and (chunk := response.read(2**16)):
                opened.write(chunk)
                bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        return str(error)
    return "the server closed the connection"
