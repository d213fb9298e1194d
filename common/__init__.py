import os
import sys


class InputError(Exception):
    """Bad input; the message is one sentence for the user that says what is wrong and what to do."""


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
