"""D4RL's gym-mujoco v2 datasets by name: a file that is there already, else downloaded and checked."""

import os
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch
from urllib.request import urlopen

from torch.hub import download_url_to_file

from common import InputError, explained

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
D4RL = {  # environment to evaluate in, and the first 16 hex digits of the SHA-256 of the file
    f"d4rl/{env_id.removesuffix('-v5').lower()}-{grade}-v2": (env_id, digest)
    for env_id, digests in {
        "HalfCheetah-v5": "25407aef85b5d16c 41324e8487a9556d 48d494a4770c11f4 015db75dae5bbe8e d9fe53bb994eb1e2",
        "Hopper-v5": "63103ef7059db4c0 5bdf1bc4a713c829 e121c5f7c9857a30 9d51ad87f8c905be 01aa219a5f8eea5e",
        "Walker2d-v5": "4e863bb6090cf4a4 cf00f43add04c17f e75de96a4f77acf7 6b8d7f868c45bbae 2985dc3d436a8baa",
    }.items()
    for grade, digest in zip(("random", "medium", "medium-replay", "medium-expert", "expert"), digests.split())
}
TIMEOUT = 20  # seconds without an answer


def d4rl_file(name: str) -> Path:
    """The file of `name`, a key of D4RL, in $D4RL_DATASET_DIR or ~/.d4rl/datasets; downloaded when it is not there.

    Raises InputError for another name, and when the download fails or is not the file.
    """
    if name not in D4RL:
        raise InputError(f"There is no dataset {name}: choose one of {', '.join(D4RL)}.")
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    file = folder / f"{name[len('d4rl/') : -len('-v2')].replace('-', '_')}-v2.hdf5"
    if not file.exists():
        _download(f"{D4RL_URL}/{file.name}", file, D4RL[name][1])
    return file


def _download(url: str, file: Path, sha256: str) -> None:
    """Into a file beside it, which becomes `file` only when its SHA-256 begins with `sha256`."""
    what = f"{file.name} is not in {file.parent}, and its download from {url} failed"
    hint = "run the same command where there is a network, or put the file there, or set D4RL_DATASET_DIR to a folder"
    patient = patch("torch.hub.urlopen", partial(urlopen, timeout=TIMEOUT))  # torch gives it none
    with explained(what, f"{hint} that has it or can be written"), patient:
        file.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(file), sha256, progress=sys.stderr.isatty())
