"""`python -m gshard_examples.serving FOLDER`: serves an exported translator."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import socket
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from gshard_tf.io.command_line import INTERRUPTED, Parser, report

INSTALL = "Install it with: pip install 'gshard-tf[serve]'"
# Beyond this a batch only takes memory: the model decodes 64 texts at a time.
MOST_TOGETHER = 1024


def make_parser() -> argparse.ArgumentParser:
    import gshard_tf
    from gshard_examples.serving.requests import Limits

    parser = Parser(
        prog="python -m gshard_examples.serving",
        description="Serves an exported translator: a page at /, JSON at /translate. "
        "Exit status: 0 after SIGTERM or Ctrl-C; 2 for an option, a model, an "
        "address or an installation that cannot be used.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {gshard_tf.__version__}"
    )
    parser.add_argument("saved_model", help="folder of the SavedModel")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=port, default=8000, help="1 to 65535")
    parser.add_argument(
        "--max-batch", type=positive, default=32, help="texts together, 1 to 1024"
    )
    parser.add_argument(
        "--max-waiting",
        type=positive,
        default=256,
        help=f"texts that wait; at least {Limits.texts}, which one request may hold",
    )
    parser.add_argument(
        "--timeout", type=seconds, default=Limits.seconds, help="seconds to an answer"
    )
    return parser


def port(text: str) -> int:
    """A port's number."""
    if not (text.isdecimal() and len(text) < 6 and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(
            f"a port must be a whole number of 1 to 65535. Received: {text!r}"
        )
    return int(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not (text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"must be a whole number of 1 or more. Received: {text!r}"
        )
    return int(text)


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(
            f"must be a finite number of seconds above 0. Received: {text!r}"
        )
    return value


def main(arguments: list[str] | None = None) -> int:
    """Serves until it is stopped; returns the exit status.

    Raises:
        SystemExit: with status 2, for an option that cannot be used.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    try:
        import uvicorn

        from gshard_examples.serving.app import make_app
        from gshard_examples.serving.model import Model, UnusableModelError
        from gshard_examples.serving.requests import Limits
    except ImportError as error:
        return report(parser.prog, f"{error}. {INSTALL}")
    try:
        # Before the model loads, which takes long: who else has the port is told now.
        with _bind(options.host, options.port) as listening:
            model = Model(options.saved_model)
            print("warming up ...", flush=True)
            model.warm_up(options.max_batch)
            app = make_app(
                model,
                Limits(seconds=options.timeout),
                max_batch=options.max_batch,
                max_waiting=options.max_waiting,
            )
            listening.listen(2048)
            host = f"[{options.host}]" if ":" in options.host else options.host
            print(f"http://{host}:{options.port}", flush=True)
            config = uvicorn.Config(
                app,
                log_level="warning",
                # Connections beyond these get status 503 from uvicorn, before any work.
                limit_concurrency=4 * options.max_waiting,
                timeout_keep_alive=5,
            )
            # uvicorn answers what is in flight, and then raises the signal once more.
            signal.signal(signal.SIGTERM, lambda number, frame: None)
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listening])
    except ImportError as error:
        return report(parser.prog, f"{error}. {INSTALL}")
    except UnusableModelError as error:
        return report(parser.prog, f"no model to serve: {error}")
    # (UnicodeError: no name of a host.)
    except (OSError, UnicodeError) as error:
        return report(
            parser.prog,
            f"cannot listen on host {options.host!r}, port {options.port}: {error}",
        )
    except KeyboardInterrupt:
        return report(parser.prog, "stopped before it served", INTERRUPTED)
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks options against each other; `parser.error` exits with status 2."""
    from gshard_examples.serving.requests import Limits

    if options.max_waiting < Limits.texts:
        parser.error(
            f"argument --max-waiting: must be at least {Limits.texts}, the texts that "
            f"one request may hold. Received: {options.max_waiting}"
        )
    if options.max_batch > min(options.max_waiting, MOST_TOGETHER):
        parser.error(
            "argument --max-batch: at most as many texts as may wait "
            f"(--max-waiting {options.max_waiting}) and at most {MOST_TOGETHER}. "
            f"Received: {options.max_batch}"
        )


def _bind(host: str, number: int) -> socket.socket:
    """A socket of this address that does not listen yet."""
    addresses = socket.getaddrinfo(
        host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = addresses[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # A server that is started again has its port at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


if __name__ == "__main__":
    sys.exit(main())
