"""`python -m examples.serving FOLDER`: serves an exported translator."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def parser() -> argparse.ArgumentParser:
    from examples.serving.requests import Limits

    made = argparse.ArgumentParser(
        prog="python -m examples.serving",
        description="Serves an exported translator: a page at /, JSON at /translate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("saved_model", help="folder of the SavedModel")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on")
    made.add_argument("--port", type=int, default=8000, help="port")
    made.add_argument("--max-batch", type=int, default=32, help="texts together")
    made.add_argument("--max-waiting", type=int, default=256, help="texts that wait")
    made.add_argument(
        "--timeout", type=float, default=Limits.seconds, help="seconds to an answer"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        import uvicorn

        from examples.serving.app import make_app
        from examples.serving.model import Model
        from examples.serving.requests import Limits

        model = Model(options.saved_model)
    except ImportError as error:
        hint = "Install it with: pip install 'gshard-tf[serve]'"
        print(f"{error}. {hint}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"no SavedModel to serve: {error}", file=sys.stderr)
        return 1
    print("warming up ...", flush=True)
    model.warm_up(options.max_batch)
    app = make_app(
        model,
        Limits(seconds=options.timeout),
        max_batch=options.max_batch,
        max_waiting=options.max_waiting,
    )
    print(f"http://{options.host}:{options.port}", flush=True)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        # Connections beyond these get status 503 from uvicorn, before any work.
        limit_concurrency=4 * options.max_waiting,
        timeout_keep_alive=5,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
