"""The `pid-serve` command: bundles behind HTTP."""

import argparse
import contextlib
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pid_runtime.command import console
from pid_runtime.command.decode_options import add_backend_options, number
from pid_runtime.decoder import Bundle
from pid_runtime.errors import PidRuntimeError

TOKEN = "PID_SERVE_TOKEN"

_EXAMPLES = f"""examples:
  pid-serve nano
  curl --data-binary @latent.safetensors 'http://127.0.0.1:8000/v1/decode?seed=7' -o image.png
  curl -F image=@photo.jpg -F sigma=0.1 http://127.0.0.1:8000/v1/upscale -o larger.png

If {TOKEN} is set, clients must send it as a bearer token. Ctrl-C and SIGTERM answer what was
asked, and end.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `console.run`)."""
    return console.run(_parser(), _serve, argv, also=(OSError,), extra="serve")


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser("pid-serve", "Serve bundles over HTTP.", _EXAMPLES)
    add = parser.add_argument
    add("bundles", type=Path, nargs="+", metavar="BUNDLE", help="a bundle's folder")
    add("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 for every one")
    add("--port", type=_port, default=8000, help="the port to listen at")
    add("--workers", type=_positive, default=1, metavar="N", help="decoders of each bundle")
    add("--queue", type=_positive, default=16, metavar="N", help="requests that may wait")
    add("--max-body", type=_positive, default=64, metavar="MIB", help="of a request")
    add("--max-pixels", type=_positive, default=2**24, metavar="N", help="of a picture sent")
    add("--timeout", type=number, default=300.0, metavar="S", help="seconds until an answer")
    add_backend_options(parser)
    return parser


def _serve(arguments: Namespace) -> None:
    import uvicorn

    from pid_serve.app import Limits, make_app
    from pid_serve.workers import Workers

    names = [path.resolve().name for path in arguments.bundles]
    if len(set(names)) < len(names):
        raise PidRuntimeError(
            f"expected bundles of different names, but got {', '.join(names)}; rename a folder"
        )
    if not (0 < arguments.timeout < float("inf")):
        raise PidRuntimeError(
            f"expected a timeout above 0, but got {arguments.timeout:g}; change --timeout"
        )
    with contextlib.ExitStack() as opened:
        bundles = [opened.enter_context(_open(path, arguments)) for path in arguments.bundles]
        models = {
            name: Workers(bundle, arguments.workers, arguments.queue)
            for name, bundle in zip(names, bundles, strict=True)
        }
        for workers in models.values():
            opened.callback(workers.close)
        limits = Limits(arguments.max_body * 2**20, arguments.max_pixels, arguments.timeout)
        app = make_app(models, limits, os.environ.get(TOKEN) or None)
        config = uvicorn.Config(
            app, arguments.host, arguments.port, log_config=None, access_log=False
        )
        address = f"http://{arguments.host}:{arguments.port}"
        result = {"address": address, "models": names}
        console.emit(result, f"Serving {', '.join(names)} at {address}", as_json=arguments.json)
        # uvicorn drains, and then raises the signal again.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run()


def _open(path: Path, arguments: Namespace) -> Bundle:
    return Bundle.open(
        path,
        arguments.backend,
        arguments.device,
        threads=arguments.threads,
        verify=not arguments.no_verify,
        engines=arguments.engines,
        cuda_graphs=not arguments.no_cuda_graphs,
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"expected a port, 0 to 65535, but got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, but got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
