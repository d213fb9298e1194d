"""Names of files that users, settings and data give; and files that are written whole or not at all."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError  # noqa: E402


def start(main: Callable, Args: type) -> None:
    """main(Args) of the command line; one sentence in place of a traceback where input or disk is to blame."""
    about = sys.modules[main.__module__].__doc__.replace("\nRun:", "\n\nRun:")  # else --help joins the lines
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    try:
        sys.exit(main(tyro.cli(Args, description=about)))
    except InputError as error:
        sys.exit(f"error: {one_line(str(error))}")
    except OSError as error:  # what nobody foresaw: a disk pulled out
        sys.exit(f"error: {one_line(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


def expand_user(args) -> None:
    """~ in every path of `args`: a shell leaves that of --out=~/x alone."""
    for name, value in vars(args).items():
        several = value if isinstance(value, tuple) else (value,)
        several = tuple(Path(os.path.expanduser(v)) if isinstance(v, Path) else v for v in several)
        setattr(args, name, several if isinstance(value, tuple) else several[0])


def safe(text: str) -> str:
    """`text` as part of a file's name: no folder, not hidden."""
    return re.sub(r"[^\w.,=+-]+", "-", text.lstrip("./~")).lstrip(".-").rstrip("-")


def one_line(text: str) -> str:
    """Without what moves a terminal's cursor or ends the line of a table."""
    return "".join(c if c.isprintable() else " " for c in text)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file to write to, which becomes `path` at the end. What fails leaves the old one, and nothing else.

    Raises InputError where the disk is full or cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        hint = "free some space, or choose a folder that can be written"
        raise InputError(f"cannot write {path} ({error.strerror or error}): {hint}") from None
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:  # the folder itself is gone, or it was never to be written
            pass


def write_text(path: Path, text: str) -> None:
    with writing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
