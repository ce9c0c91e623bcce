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
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import docstring_parser
import tyro
from tyro.constructors import StructConstructorSpec, StructFieldSpec, StructTypeInfo

from core_flax.compilation import keep_compiled_programs
from core_flax.signals import Stopped
from core_flax.types import UserError

T = TypeVar("T")

SHORT_RUN = "A run of fewer --train.num-steps than the preset's warmup needs a lower --schedule.warmup-steps too."

Command = Callable[[Sequence[str]], None]

_UNIONS = typing.Union, types.UnionType
_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_LESS = "a lower batch size, more microbatches, shorter rows, fewer beams"

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

    0 done; 2 a mistake of the user's, a disk that is full or cannot be written, or too little memory; 70 a loss or
    gradient is no longer finite (the last good checkpoint stays); 75 interrupted and saved (run the same command
    again); 128 + n ended at once by signal n; 1, with a traceback, a mistake of ours.

    Args:
      prog: name of the program, for messages.
      commands: name -> (one line of help, function of the remaining arguments).
      argv: arguments without the program's name; None: the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the letters of a text gets their numbers
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_compiled_programs()  # before a command imports jax
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(prog, commands))
        elif argv[0] in commands:
            commands[argv[0]][1](argv[1:])
        else:
            raise UserError(f"unknown command {argv[0]!r}{suggest(argv[0], commands)}; see {prog} --help")
        print(end="", flush=True)  # there may be no standard output
    except UserError as error:
        _refuse(prog, str(error))
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
        _refuse(prog, f"{error.filename or 'a file'}: {error.strerror}")
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        _refuse(prog, f"out of memory ({_first_line(error)}); take less at a time: {_LESS}")
    sys.exit(0)


def _refuse(prog: str, why: str) -> NoReturn:
    print(f"{prog}: error: {why}", file=sys.stderr, flush=True)
    if among := sys.modules.get("core_flax.distributed"):  # otherwise this process has never been one of several
        among.tell_refusal(why)
    sys.exit(2)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an array could not be had: XLA's error by name, since jax may not be there."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no more is known"])[0][:200]


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

    A class whose options do not all go together has a method ``check_given``, which is told those that stood there
    (``options_given``), so that one is refused as well that says what holds anyway.

    Raises:
      UserError: an unknown option (with the nearest known one), a value of the wrong type, a missing option, a list
        that is given twice, of which the first would be lost.
    """
    _check_names(cls, argv, prog)
    given: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                cls, args=list(argv), prog=prog, description=description or None, registry=_registry, **given
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        box = printed.getvalue()
        missing = _missing(cls, argv, tyro.MISSING if default is None else default) if "Missing from" in box else []
        wrong = f"{', '.join(missing)} must be given" if missing else _flag_with_value([cls], argv)
        wrong = wrong or _first_sentence(box)
        raise UserError(f"{wrong}; see {prog} --help") from None
    if check := getattr(parsed, "check_given", None):
        check(options_given(cls, argv))
    return parsed


def _check_names(cls: Any, argv: Sequence[str], prog: str) -> None:
    """Raises UserError as ``parse``, for what can be told from the options' names alone."""
    known, once, before = options_of(cls), options_given_once(cls), ""
    given = set()
    for argument in argv:
        if argument == "--":
            break
        name = _option(argument)
        if _is_option(name) and name not in known and name not in ("-h", "--help"):
            is_value = known.get(before, False)
            remedy = f"as a value it is written {before}={argument}" if is_value else f"see {prog} --help"
            raise UserError(f"unknown option {name}{suggest(name, known)}; {remedy}")
        if name in given & once.keys():
            raise UserError(f"{name} is given twice; {once[name]}")
        given.add(name)
        before = argument.replace("_", "-")


def _is_option(word: str) -> bool:
    """Whether a word looks like one: a dash alone and numbers do not."""
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def options_given(cls: Any, argv: Sequence[str]) -> frozenset[str]:
    """The options of ``cls`` that stand in ``argv``, as they are written in the help, values aside."""
    known, is_value, given = options_of(cls), False, set()
    for argument in argv:
        if not is_value and argument.startswith("-"):
            given.add(_option(argument))
        is_value = not is_value and "=" not in argument and known.get(_option(argument), False)
    return frozenset(given & known.keys())


def options_changed(config: Any) -> frozenset[str]:
    """The options of a flat dataclass whose values are not the defaults: what is known where no command line is."""
    return frozenset(
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and getattr(config, field.name) != field.default
    )


def parse_preset(
    presets: Mapping[str, Callable[[], Any]],
    command_of: Callable[[Any], type[T]],
    default: str,
    argv: Sequence[str],
    prog: str,
    purpose: str,
) -> tuple[T, str, frozenset[str]]:
    """Parses ``[PRESET] --workdir DIR [options]``, the command line of all training.

    Args:
      presets: name -> function that makes a config.
      command_of: a preset's config -> class of the command: its fields are the config's and some more.
      default: the preset without one.
      argv: arguments.
      prog: program and command.
      purpose: what the command does, a sentence's end: "pretrains a model".

    Returns:
      The command, the preset's name, and the options that stood on the command line (``options_given``).

    Raises:
      UserError: as ``parse``, and if there is no such preset.
    """
    commands = [command_of(preset()) for preset in presets.values()]
    words, rest = take_words(commands, argv)
    if any(word not in presets for word in words) and (wrong := _flag_with_value(commands, argv)):
        raise UserError(f"{wrong}; see {prog} --help")
    if len(words) > 1:
        raise UserError(f"{' '.join(words)}: one preset at a time; settings are options (--name value)")
    name = words[0] if words else default
    program = prog.split()[0]
    if name not in presets:
        raise UserError(f"unknown preset {name!r}{suggest(name, presets)}; {program} presets lists them")
    config = presets[name]()
    command = command_of(config)
    doc = [
        f"{prog} [PRESET] --workdir DIR [options] {purpose}, or resumes the run that is in DIR.",
        f"Presets: {', '.join(presets)}; without one, {default}. {program} presets tells their sizes.",
        f"Defaults below are those of {name}. {' '.join(paragraphs(presets[name]))} {SHORT_RUN}",
    ]
    parsed = parse(command, rest, f"{prog} {name}", as_command(command, config), "\n\n".join(doc))
    return parsed, name, options_given(command, rest)


def as_command(command: type[T], config: Any) -> T:
    """A preset as the defaults of a command, whose class adds options to the settings'; ``workdir`` has no default."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return command(**values | {"workdir": tyro.MISSING})


def settings_of(command: Any, config: type[T]) -> T:
    """The settings alone of what ``as_command`` made."""
    return config(**{field.name: getattr(command, field.name) for field in dataclasses.fields(config)})  # type: ignore


def paragraphs(documented: object) -> list[str]:
    """A docstring's paragraphs, each on one line."""
    return [" ".join(each.replace("``", "").split()) for each in (documented.__doc__ or "").split("\n\n")]


def take_words(classes: Any, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words that are neither options of a class, or of several, nor their values; all the rest), in any order."""
    words, rest = [], []
    known, is_value = _options_of_all(classes if isinstance(classes, list) else [classes]), False
    for argument in argv:
        is_word = not is_value and not argument.startswith("-")
        (words if is_word else rest).append(argument)
        is_option = not is_value and not is_word
        is_value = is_option and "=" not in argument and known.get(_option(argument), True)
    return words, rest


def _options_of_all(classes: Sequence[Any]) -> dict[str, bool]:
    """``options_of`` several classes, and the help."""
    found = {option: takes for cls in classes for option, takes in options_of(cls).items()}
    return found | {"-h": False, "--help": False}


def _flag_with_value(classes: Sequence[Any], argv: Sequence[str]) -> str:
    """What is wrong with "--flag False" and "--flag=False", if that is in ``argv``; otherwise nothing."""
    flags = {option for option, takes in _options_of_all(classes).items() if not takes}
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        value = argument.partition("=")[2] or following
        if (name := _option(argument)) in flags and value.lower() in _TRUTHS:
            section, dot, last = name.removeprefix("--").rpartition(".")
            positive = f"--{section}{dot}{last.removeprefix('no-')}"
            positive = positive if positive in flags else name
            is_on = _TRUTHS[value.lower()] == (name == positive)
            remedy = positive if is_on else f"--{section}{dot}no-{positive.removeprefix('--').rpartition('.')[2]}"
            return f"{name} {value}: it is on or off and takes no value; write {remedy}"
    return ""


def options_of(cls: Any, prefix: str = "--") -> dict[str, bool]:
    """The options that a dataclass's fields become, and whether a value follows: none does for flags ("--no-x")."""
    found = {}
    for field in dataclasses.fields(cls):
        option = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            found |= options_of(field.type, option + ".")
        elif field.type is bool:
            found |= {option: False, f"{prefix}no-{option.removeprefix(prefix)}": False}
        else:
            found[option] = True
    return found


def options_given_once(cls: Any) -> dict[str, str]:
    """The options of a dataclass's own of which a second would do away with files or texts, with the remedy.

    Of numbers and choices the last one counts, so that a script's can be changed by what is written behind it.
    """
    found = {}
    for field in dataclasses.fields(cls):
        kinds = typing.get_args(field.type) if typing.get_origin(field.type) in _UNIONS else (field.type,)
        option = f"--{field.name.replace('_', '-')}"
        if any(typing.get_origin(kind) is tuple for kind in kinds):
            found[option] = "give all of its values after one"
        elif str in kinds:
            found[option] = "it takes one"
    return found


def _missing(cls: Any, argv: Sequence[str], default: Any) -> list[str]:
    """What has no default and is not in ``argv``: tyro tells it together with all of its help."""
    required = [field for field in dataclasses.fields(cls) if _default(field, default) in _NO_VALUE]
    placed = [field for field in required if typing.get_origin(field.type) is typing.Annotated]  # tyro.conf.Positional
    given = {_option(argument) for argument in argv}
    options = [f"--{field.name.replace('_', '-')}" for field in required if field not in placed]
    absent = placed[len(take_words(cls, argv)[0]) :]
    return [*(field.name.upper() for field in absent), *(option for option in options if option not in given)]


def _option(argument: str) -> str:
    """The option in "--section.some_name=value", as it is written in the help."""
    return argument.partition("=")[0].replace("_", "-")


_registry = tyro.constructors.ConstructorRegistry()


@_registry.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's own rule, but that a field's docstring is one paragraph, and that required fields come first."""
    if not dataclasses.is_dataclass(info.type):
        return None
    types, help_texts = typing.get_type_hints(info.type, include_extras=True), _field_docstrings(info.type)
    fields = [
        StructFieldSpec(field.name, types[field.name], _default(field, info.default), help_texts.get(field.name))
        for field in dataclasses.fields(info.type)
    ]
    return StructConstructorSpec(info.type, tuple(sorted(fields, key=lambda field: field.default not in _NO_VALUE)))


_NO_VALUE = (tyro.MISSING, tyro.constructors.MISSING_NONPROP)


def _default(field: dataclasses.Field, whole: Any) -> Any:
    if whole not in _NO_VALUE:
        return getattr(whole, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.constructors.MISSING_NONPROP if field.default is dataclasses.MISSING else field.default


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string under each field, on one line."""
    documented = [docstring_parser.parse_from_object(base).params for base in reversed(cls.__mro__[:-1])]
    return {each.arg_name: " ".join((each.description or "").split()) for params in documented for each in params}


def _first_sentence(box: str) -> str:
    """What is wrong, from tyro's message: the lines between its title and the rule that follows them, as one line.

    On a terminal without box characters a rule stands under the title as well.
    """
    lines = [line.strip("│╰╯ ") for line in box.splitlines()[1:]]
    if lines and _RULE.match(lines[0]):
        lines = lines[1:]
    text = " ".join(line for line in itertools.takewhile(lambda line: not _RULE.match(line), lines) if line)
    return text.rstrip(".:") or "the options cannot be read"
