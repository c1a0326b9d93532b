"""One style for all commands: errors, exit codes, `--config` and shell completion.

An error is a line of standard error, and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from gshard_tf.io.config_file import flag_name, flag_value, read_config
from gshard_tf.io.paths import path_option

# argparse's own, for input that cannot be used. 1 stays for what was found to be wrong,
# and for errors with a traceback.
BAD_INPUT = 2
# As shells do for Ctrl-C, and for SIGPIPE.
INTERRUPTED = 130
READER_LEFT = 141

INSTALL = "Install it with: pip install 'gshard-tf[completion]'"


class Append(argparse.Action):
    """A flag that may be repeated; the first one replaces what a file says."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        kept = [] if before is self.default else before
        setattr(namespace, self.dest, [*kept, values])


class PrintCompletion(argparse.Action):
    """A flag that prints the script that completes a command in a shell."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.exit(report(parser.prog, f"{self.option_strings[0]}: {INSTALL}"))
        if isinstance(parser, CommandParser):
            for action in parser.all_actions():
                if action.type is path_option:
                    setattr(action, "complete", shtab.FILE)  # noqa: B010 (shtab's own)
        print(shtab.complete(parser, values))
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """An argument parser of a command, or of one of its subcommands.

    Errors are one line, without the usage before it. `--config FILE` names a TOML file
    of the flags' defaults. A flag that may be repeated must have a list as its default.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._commands: Mapping[str, CommandParser] = {}
        self.register("action", "append", Append)
        self.add_argument(
            "--config",
            type=path_option,
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="TOML file of defaults of these flags, as steps-per-epoch = 100",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def all_actions(self) -> Iterator[argparse.Action]:
        """Yields the arguments of this parser and of its subcommands."""
        yield from self._actions
        for command in self._commands.values():
            yield from command.all_actions()

    def take_defaults(self, values: Mapping[str, Any]) -> set[str]:
        """Makes a file's values the defaults of the flags that they name.

        A subcommand leaves out what another one has: one file is for all of them.

        Args:
            values: From `read_config`.

        Returns:
            The names of the flags that exist.

        Raises:
            ValueError: A value is none of its flag's.
        """
        known: set[str] = set()
        for action in self._actions:
            name = flag_name(action)
            if name is not None and name in values:
                self.set_defaults(**{action.dest: flag_value(action, values[name])})
                action.required = False
                known.add(name)
        for command in self._commands.values():
            known |= command.take_defaults(values)
        return known


class Parser(CommandParser):
    """The parser of a whole command."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # `python -m ...` is none that a shell could complete.
        if " " not in self.prog:
            self.add_argument(
                "--print-completion",
                action=PrintCompletion,
                choices=("bash", "zsh", "tcsh"),
                default=argparse.SUPPRESS,
                help="print a script that completes this command in a shell",
            )

    def add_subparsers(self, **options: Any) -> Any:
        """Returns argparse's own, of `CommandParser`s."""
        result = super().add_subparsers(parser_class=CommandParser, **options)
        self._commands = result.choices
        return result

    def parse_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> argparse.Namespace:
        """Returns the arguments; those that are left out are the file's, if any."""
        arguments = sys.argv[1:] if args is None else list(args)
        self._read_config(arguments)
        return super().parse_args(arguments, namespace)

    def _read_config(self, arguments: Sequence[str]) -> None:
        # Ahead of the others, whose defaults it has.
        first = argparse.ArgumentParser(prog=self.prog, add_help=False)
        first.error = self.error  # type: ignore[method-assign]
        first.add_argument("--config", type=path_option)
        path = first.parse_known_args(arguments)[0].config
        if path is None:
            return
        try:
            values = read_config(path)
            unknown = sorted(values.keys() - self.take_defaults(values))
        except (OSError, ValueError) as error:
            self.error(f"argument --config: {error}")
        if unknown:
            names = {flag_name(action) for action in self.all_actions()} - {None}
            near = difflib.get_close_matches(unknown[0], sorted(map(str, names)))
            meant = f" Near it: {', '.join(near)}." if near else ""
            self.error(
                f"argument --config: {path} must have flags of this command.{meant} "
                f"Received: {', '.join(unknown)}"
            )


def report(prog: str, message: object, status: int = BAD_INPUT) -> int:
    """Writes `PROG: MESSAGE` to standard error, and returns the exit code.

    Args:
        prog: The name of the command.
        message: What is wrong.
        status: The exit code.
    """
    print(f"{prog}: {message}", file=sys.stderr, flush=True)
    return status


def reader_left() -> int:
    """Returns the exit code where `| head` has read enough; nothing more is written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_LEFT
