import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class InputError(Exception):
    """Bad input, or a full disk; the message is one sentence for the user: what is wrong, and what to do."""


@contextmanager
def explained(what: str, hint: str) -> Iterator[None]:
    """An InputError for whatever goes wrong inside: `what` it comes to, the reason, and the `hint`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any kind: files may be damaged, simulators and modules are the user's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ImportError | AttributeError) and re.search(r"'common\b", reason):
            hint = "this project's own package `common` hides yours: rename yours"
        raise InputError(f"{what} ({reason}): {hint}") from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file to write to, which becomes `path` at the end: a kill or a full disk leaves the old one, and nothing else.

    Raises InputError.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # the latter is torch's word for a disk that is full
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"cannot write {path} ({reason}): make room there, or choose another folder") from None
    finally:
        with suppress(OSError):  # the folder itself may be gone
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises InputError."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def add_working_directory() -> None:
    """Lets the user's modules be imported, also those of a package `common` of theirs that ours has not got."""
    for path, folder in ((sys.path, os.getcwd()), (__path__, os.path.join(os.getcwd(), "common"))):
        if folder not in path:
            path.append(folder)
