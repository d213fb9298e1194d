import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class InputError(Exception):
    """Bad input; the message is one sentence for the user that says what is wrong and what to do."""


class WriteError(InputError):
    """A full disk, a folder that is gone or cannot be written to."""


@contextmanager
def explained(what: str, hint: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """One sentence for whatever goes wrong inside: `what` it comes to, the reason, and the `hint`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any kind: files may be damaged, simulators and modules are the user's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise kind(f"{what} ({reason}){hides(error)}: {hint}") from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file to write to, which becomes `path` at the end: a kill or a full disk leaves the old one, and nothing else.

    Raises WriteError.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        hint = "make room there, or choose another folder"
        raise WriteError(f"cannot write {path} ({error.strerror or error}): {hint}") from None
    finally:
        with suppress(OSError):  # the folder itself may be gone
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises WriteError."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def add_working_directory() -> None:
    """Lets the user's modules be imported, also those of a package `common` of theirs that ours has not got."""
    for path, folder in ((sys.path, os.getcwd()), (__path__, os.path.join(os.getcwd(), "common"))):
        if folder not in path:
            path.append(folder)


def hides(error: Exception) -> str:
    """The end of a sentence on `error` in a user's module: where it wanted what only their own `common` has."""
    wanted = error.name if isinstance(error, ImportError) else getattr(getattr(error, "obj", None), "__name__", None)
    ours = str(wanted).partition(".")[0] == "common"
    return " (this project's own package `common` hides yours: rename yours)" if ours else ""
