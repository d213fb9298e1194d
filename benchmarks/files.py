"""Names of files that users, settings and data give; and files that are written whole or not at all."""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import InputError  # noqa: E402


def start(main: Callable, Args: type) -> None:
    """main(Args) of the command line; one sentence in place of a traceback where input or disk is to blame."""
    about = sys.modules[main.__module__].__doc__.replace("\nRun:", "\n\nRun:")  # else --help joins the lines
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    try:
        sys.exit(main(tyro.cli(Args, description=about)))
    except (InputError, OSError) as error:  # the latter where nobody foresaw it: a disk pulled out
        sys.exit(f"error: {one_line(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


@dataclass
class HomePaths:
    """A base of Args: ~ in every path, which a shell leaves alone in --out=~/x."""

    def __post_init__(self):
        for name, value in vars(self).items():
            several = value if isinstance(value, tuple) else (value,)
            several = tuple(v.expanduser() if isinstance(v, Path) else v for v in several)
            setattr(self, name, several if isinstance(value, tuple) else several[0])


def safe(text: str) -> str:
    """`text` as part of a file's name: no folder, not hidden."""
    return re.sub(r"[^\w.,=+-]+", "-", text.lstrip("./~")).lstrip(".-").rstrip("-")


def one_line(text: str) -> str:
    """Without what moves a terminal's cursor or ends the line of a table."""
    return "".join(c if c.isprintable() else " " for c in text)


def write_text(path: Path, text: str) -> None:
    """As common.write_text, in a folder that is made if need be."""
    with suppress(OSError):  # it is said when the file cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
    common.write_text(path, text)
