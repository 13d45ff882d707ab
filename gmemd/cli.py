"""`gmemd`: the command line of the daemon's host."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from gmemd import __version__, config, errors, log, mending, notify, streams
from gmemd.examples import epilog
from gmemd.keeping import guests_are_kept

Command = Callable[[argparse.Namespace], int]
INTERRUPTED = errors.SIGNALLED + signal.SIGINT
UNHEARD = errors.SIGNALLED + signal.SIGPIPE


class Help(argparse.HelpFormatter):
    """Fills a description, and leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Ends with one line and EX_USAGE, as documented, where argparse would show all options and end with 2. Its help
    ends with examples."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, **options)
        self.epilog = epilog(self.prog)

    def error(self, message: str) -> NoReturn:
        _tell(f"{self.prog}: {message}; see {self.prog} --help")
        self.exit(errors.UsageError.exit_code)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # help; else it would fail when Python ends, with a code of its own
        super().exit(status, message)


def run(parser: argparse.ArgumentParser, main: Command, arguments: list[str] | None) -> int:
    """Runs a command: what people can mend becomes one line and its exit code, anything else a traceback."""
    streams.mend()
    try:
        code = main(parser.parse_args(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop(sys.stdout)  # whoever reads it has enough
        return UNHEARD
    except (errors.GmemdError, OSError) as error:
        told = errors.for_people(error)
        if told is None:
            raise
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is None:
            return INTERRUPTED
        expected, bugs = group.split(lambda error: errors.for_people(error) is not None)
        told = errors.for_people(_first(expected)) if expected and not bugs else None
        if told is None:
            raise
    _drop(sys.stdout)
    _tell(f"{parser.prog}: {told}")
    return told.exit_code


def _tell(line: str) -> None:
    """On stderr. Where that cannot be written, there is the exit code."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
    _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    """What cannot be written must not fail once more when Python ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def serve(options: argparse.Namespace) -> int:
    manager = notify.Notifier(os.environ.get("NOTIFY_SOCKET", ""))
    before = mending.look(options.config) if guests_are_kept() else None
    try:
        return _serve(options)
    except (errors.GmemdError, OSError) as error:
        told = errors.for_people(error)
        if before is None or told is None:
            raise
        line = f"{told}; guests are kept for us: waits until that is mended, then starts again"
        wrong, code = isinstance(told, errors.ConfigError), told.exit_code
        del told  # and with it what the start has opened
    _tell(f"gmemd: {line}")
    manager.status(line)
    mending.wait(before, mending.LONGEST if wrong else mending.SOON)
    # After the exit code of a wrong configuration, the service manager gives up, and lets go of the guests.
    return errors.UnavailableError.exit_code if wrong else code


def _serve(options: argparse.Namespace) -> int:
    import trio

    from gmemd.daemon import Daemon
    from gmemd.native import keep_secret

    settings = config.load(options.config)
    if options.dump_config:
        print(config.dump(settings), end="")
        return 0
    keep_secret()
    log.set_up()
    trio.run(Daemon(settings, options.fd_store).run)
    return 0


def doctor(options: argparse.Namespace) -> int:
    from gmemd import doctor

    return doctor.main(options.json)


def status(options: argparse.Namespace) -> int:
    from gmemd import showstatus

    return showstatus.main(_status_socket(options), as_json=options.json, watch=options.watch)


def abandon(options: argparse.Namespace) -> int:
    from gmemd import status

    request = {"command": "abandon", "migration": options.migration, "force": options.force}
    answer = status.ask(_status_socket(options), request)
    missing = answer["pages_missing"]
    print(
        f"{options.migration} is given up; {'nobody knows how many' if missing is None else missing} pages were missing"
    )
    return 0


def demo(options: argparse.Namespace) -> int:
    from gmemd_tools.demo import demo

    return demo.main(options)


def _status_socket(options: argparse.Namespace) -> Path:
    return options.socket or config.load(options.config).daemon.status_socket


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(prog="gmemd", description="Pages a migrating KVM guest's memory in on demand.")
    top.add_argument("--version", action="version", version=f"gmemd {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, main: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(main=main)
        return command

    def add_config(command: argparse.ArgumentParser) -> None:
        command.add_argument("--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_PATH}")

    command = add("serve", serve, "Run the destination daemon.")
    add_config(command)
    command.add_argument(
        "--fd-store",
        type=Path,
        metavar="PATH",
        help="keep what a restart needs in a small process with a socket at PATH; without systemd",
    )
    command.add_argument("--dump-config", action="store_true", help="print the configuration in effect, and end")

    command = add("status", status, "Show what runs, how far it is, and what is stuck.")
    add_config(command)
    command.add_argument("--socket", type=Path, metavar="PATH", help="the daemon's status socket")
    command.add_argument("--json", action="store_true", help="one JSON object, or one a second with --watch")
    command.add_argument("--watch", action="store_true", help="go on showing it")

    command = add("abandon", abandon, "Give a migration up: its guest's memory stays incomplete.")
    add_config(command)
    command.add_argument("--socket", type=Path, metavar="PATH", help="the daemon's status socket")
    command.add_argument("--force", action="store_true", help="even if its guest runs here and its source is alive")
    command.add_argument("migration", metavar="ID")

    command = add("doctor", doctor, "Tell what this host can do, and what is missing and how to mend it.")
    command.add_argument("--json", action="store_true", help="one JSON object")

    from gmemd_tools.demo import options as demo_options

    demo_options.add(add("demo", demo, "Migrate a real guest on this machine, every page checked."))
    return top


def main(arguments: list[str] | None = None) -> int:
    """The console script."""
    return run(parser(), lambda options: options.main(options), arguments)


if __name__ == "__main__":
    sys.exit(main())
