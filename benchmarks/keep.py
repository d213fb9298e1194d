"""The policies of a grid's finished runs, one small file per dataset, and run folders made of them again.

Weights are halved to float16, which moves an action by about a thousandth of its box; all else stays as it is. What
comes back can be filmed, displaced, exported and chosen among; critics and checkpoints are not kept. What a file held
before stays in it, but for runs of the same name.
Run: python benchmarks/keep.py runs/bench                                      into benchmarks/results/bench/policies
     python benchmarks/keep.py benchmarks/results/bench/policies --to runs/kept    back into run folders
"""

import gzip
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.files import HomePaths, safe, start, write_text  # noqa: E402
from benchmarks.film import from_runs, run_folders  # noqa: E402
from benchmarks.report import RESULTS, public_command, without_folder  # noqa: E402
from common import InputError, explained, writing  # noqa: E402
from common.dynamics import save  # noqa: E402


@dataclass
class Args(HomePaths):
    source: tyro.conf.Positional[Path]  # run folders, or a folder of kept policies
    to: Path | None = None  # by default the bench's policies; where the source holds kept ones, needed: run folders


def is_weight(value) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim > 1


def kept_run(folder: Path) -> dict:
    """policy.pt with halved weights, and progress.csv. Nothing in it names a folder of this machine."""
    with explained(f"{folder} holds no finished run", "finish it"):
        saved = torch.load(folder / "policy.pt", map_location="cpu", weights_only=True)
        config = json.loads((folder / "config.json").read_text())
        config |= {"command": public_command(config), "data": without_folder(str(config["data"]).split(" in ")[0])}
        config["args"] |= {"run_dir": "runs", "dataset": without_folder(config["args"]["dataset"])}
        config.pop("resumed", None)
        saved["actor"] = {key: x.half() if is_weight(x) else x for key, x in saved["actor"].items()}
        return saved | {"config": json.dumps(config), "progress": (folder / "progress.csv").read_text()}


def keep(source: Path, to: Path) -> int:
    """Returns the exit status: 1 where a run was left out."""
    by_file, kept = {}, from_runs((source,), kept_run)
    for folder, run in kept.items():
        runs = by_file.setdefault(to / f"{safe(json.loads(run['config'])['args']['dataset'])}.pt.gz", {})
        if folder.name in runs:
            raise InputError(f"two runs in {source} are called {folder.name}: name the folder of one of them")
        runs[folder.name] = run
    if not by_file:
        raise InputError(f"no finished run in {source}: there is nothing to keep")
    to.mkdir(parents=True, exist_ok=True)
    for file, runs in by_file.items():
        before = kept_runs(file) if file.exists() else {}
        torch.save(before | runs, packed := io.BytesIO())
        with writing(file) as part:
            part.write_bytes(gzip.compress(packed.getvalue(), mtime=0))
        print(f"{len(runs)} policies -> {file}, {len(before | runs)} in all, {file.stat().st_size / 1e6:.2f} MB")
    return int(len(kept) < len(run_folders((source,))))


def kept_runs(file: Path) -> dict[str, dict]:
    with explained(f"{file} holds no kept policies", "make it again"):
        packed = io.BytesIO(gzip.decompress(file.read_bytes()))
        return torch.load(packed, map_location="cpu", weights_only=True)


def restore(source: Path, to: Path) -> None:
    for file in sorted(source.glob("*.pt.gz")):
        runs = kept_runs(file)
        with explained(f"{file} holds no kept policies", "make it again"):
            for name, run in runs.items():
                folder = to / safe(name)
                if folder.exists():
                    raise InputError(f"{folder} is there already: choose another --to")
                actor = {key: x.float() if x.dtype == torch.float16 else x for key, x in run["actor"].items()}
                write_text(folder / "config.json", run["config"])
                write_text(folder / "progress.csv", run["progress"])
                save(folder / "policy.pt", {key: x for key, x in run.items() if key != "progress"} | {"actor": actor})
        print(f"{file} -> {len(runs)} run folders in {to}")


def main(args: Args) -> int:
    if any(args.source.glob("*.pt.gz")):
        if args.to is None:
            raise InputError(f"{args.source} holds kept policies: say by --to where run folders are to be made of them")
        restore(args.source, args.to)
        return 0
    return keep(args.source, args.to or RESULTS / "bench" / "policies")


if __name__ == "__main__":
    start(main, Args)
