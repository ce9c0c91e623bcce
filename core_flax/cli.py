"""What every command line does alike: typed options, errors in one line, exit status, libraries kept quiet."""

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from core_flax.signals import Stopped
from core_flax.types import UserError

T = TypeVar("T")

Command = Callable[[Sequence[str]], None]

_RULE = re.compile(r"[─-]{3,}$")

_NOT_OURS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
"""What the system says of a folder that cannot be written as the user asked. Any other failure is ours to look into."""


def main(prog: str, commands: Mapping[str, tuple[str, Command]], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs ``prog COMMAND ...`` and exits with a status that tells what happened, and one line unless all went well.

    0 done; 2 a mistake of the user's, or a disk that is full or cannot be written; 70 a loss or gradient is no longer
    finite (the last good checkpoint stays); 75 interrupted and saved (run the same command again); 128 + n ended at
    once by signal n; 1, with a traceback, a mistake of ours.

    Args:
      prog: name of the program, for messages.
      commands: name -> (one line of help, function of the remaining arguments).
      argv: arguments without the program's name; None: the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(prog, commands))
        elif argv[0] in commands:
            commands[argv[0]][1](argv[1:])
        else:
            raise UserError(f"unknown command {argv[0]!r}{suggest(argv[0], commands)}; see {prog} --help")
        sys.stdout.flush()
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"{prog}: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (| head): nothing is wrong, and nothing can be told to anyone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        print(f"{prog}: error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _overview(prog: str, commands: Mapping[str, tuple[str, Command]]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {text}" for name, (text, _) in commands.items()]
    return "\n".join([f"usage: {prog} COMMAND [options]", "", *lines, "", f"{prog} COMMAND --help lists its options."])


def suggest(word: str, known: Any) -> str:
    """ "; did you mean ...?" or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def parse(cls: type[T], argv: Sequence[str], prog: str, default: T | None = None, description: str = "") -> T:
    """Parses options into a dataclass; its fields' docstrings are the help.

    Raises:
      UserError: an unknown option (with the nearest known one), a value of the wrong type, a missing option.
    """
    known = option_names(cls)
    for argument in argv:
        if argument == "--":
            break
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known and name != "--help":
            raise UserError(f"unknown option {name}{suggest(name, known)}; see {prog} --help")
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=list(argv), prog=prog, description=description or None, **defaults)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_first_sentence(printed.getvalue())}; see {prog} --help") from None


def option_names(cls: Any, prefix: str = "--") -> set[str]:
    """The options that a dataclass's fields become, with "--no-x" for flags."""
    names = set()
    for field in dataclasses.fields(cls):
        option = prefix + field.name.replace("_", "-")
        inner = field.type
        if dataclasses.is_dataclass(inner):
            names |= option_names(inner, option + ".")
        else:
            head, _, tail = option.rpartition(".") if "." in option else ("--", "", option[2:])
            names |= {option, f"{head}.no-{tail}" if "." in option else f"--no-{tail}"}
    return names


def _first_sentence(box: str) -> str:
    """What is wrong, from tyro's message: the lines between its title and the rule that follows them, as one line.

    On a terminal without box characters a rule stands under the title as well.
    """
    lines = [line.strip("│╰╯ ") for line in box.splitlines()[1:]]
    if lines and _RULE.match(lines[0]):
        lines = lines[1:]
    text = " ".join(line for line in itertools.takewhile(lambda line: not _RULE.match(line), lines) if line)
    return text.rstrip(".:") or "the options cannot be read"
