"""Records uniformly random actions in an environment as a local Minari dataset, and prints what came out.

Run: python benchmarks/record_random.py --env-id Hopper-v5 --dataset-id hopper/random-v0 --num-steps 200000 --seed 0
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from minari.storage.datasets_root_dir import get_dataset_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.dataset import InputError, load_dataset, record_random  # noqa: E402


@dataclass
class Args:
    env_id: str  # gymnasium id of an environment with continuous actions
    dataset_id: str  # name of the new dataset, which ends in -v and a number
    num_steps: int = 200_000  # environment steps
    seed: int = 0  # of the environment and of the actions


def main(args: Args) -> None:
    if not re.search(r"-v\d+$", args.dataset_id):
        raise InputError(f"--dataset-id must end in -v and a number, as Minari wants it, not {args.dataset_id}")
    if args.num_steps < 1:
        raise InputError(f"--num-steps must be at least 1, not {args.num_steps}")
    folder = get_dataset_path(args.dataset_id)
    if folder.exists():  # record_random would take it for its own earlier work
        raise InputError(f"{args.dataset_id} exists already: choose another id, or remove {folder}")
    record_random(args.env_id, args.dataset_id, args.num_steps, args.seed)
    print(load_dataset(args.dataset_id).summary())


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
