"""The `pid-serve` command: bundles behind HTTP."""

import argparse
import contextlib
import math
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pid_runtime.backends.choice import device_name
from pid_runtime.command import console
from pid_runtime.command.decode_options import add_backend_options, number
from pid_runtime.command.sampling_options import read_tile
from pid_runtime.command.spread import LOCAL
from pid_runtime.errors import PidRuntimeError

if TYPE_CHECKING:  # it needs an extra, which --help does not
    from pid_serve.app import Limits
    from pid_serve.sessions import OpenDecoder

TOKEN = "PID_SERVE_TOKEN"

_MOST_CONNECTIONS = 512

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
    add("--port", type=_port, default=8000, help="the port to listen at; 0 for a free one")
    add(
        "--workers",
        type=_positive,
        default=1,
        metavar="N",
        help="processes of each bundle on each device, each with the weights",
    )
    add(
        "--queue",
        type=_positive,
        default=16,
        metavar="N",
        help="requests that may wait; with --ray, or run",
    )
    add(
        "--batch",
        type=_positive,
        default=1,
        metavar="N",
        help="requests of one size made at once; worth it where a GPU is not busy with one",
    )
    add("--encoder", metavar="ID_OR_DIR", help="encodes prompts, as pid-caption takes it")
    add("--vae", metavar="ID_OR_DIR", help="encodes pictures, as pid-upscale takes it")
    add("--vae-tile", type=read_tile, metavar="WxH", help="as of pid-upscale")
    add("--max-body", type=_positive, default=64, metavar="MIB", help="of a request")
    add("--max-pixels", type=_positive, default=2**24, metavar="N", help="of a picture sent")
    add("--max-result", type=_positive, default=2**26, metavar="N", help="pixels of an image made")
    add("--timeout", type=number, default=300.0, metavar="S", help="seconds until an answer")
    add("--upload-timeout", type=number, default=60.0, metavar="S", help="seconds for a body")
    add(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="serve on a Ray cluster, or on one of this machine alone",
    )
    add(
        "--replicas",
        type=_replicas,
        metavar="N",
        help="of each bundle with --ray, or auto, for as many as the load wants (default: auto)",
    )
    add_backend_options(parser)
    return parser


def _serve(arguments: Namespace) -> None:
    import uvicorn

    from pid_serve.app import Limits, make_app
    from pid_serve.listening import Protocol, bound_socket
    from pid_serve.pool import Pool
    from pid_serve.sessions import CaptionTask, DecodeTask, Floats, Made, OpenEncoder

    names = [path.resolve().name for path in arguments.bundles]
    if len(set(names)) < len(names) or "captions" in names:
        raise PidRuntimeError(
            f"expected bundles of different names, none of them captions, but got "
            f"{', '.join(names)}; rename a folder"
        )
    for option in ("timeout", "upload_timeout"):
        if not (0 < (seconds := getattr(arguments, option)) < float("inf")):
            name = option.replace("_", "-")
            raise PidRuntimeError(f"expected seconds above 0, but got {seconds:g}; change --{name}")
    if arguments.encoder is not None:
        console.need_packages(("tokenizers",), "captions")
    devices = _devices(arguments)
    limits = Limits(
        arguments.max_body * 2**20,
        arguments.max_pixels,
        arguments.timeout,
        arguments.upload_timeout,
        arguments.max_result,
    )
    token = os.environ.get(TOKEN) or None
    if arguments.ray is not None:
        _serve_on_ray(arguments, names, limits, token)
        return
    with contextlib.ExitStack() as opened:
        bound = opened.enter_context(bound_socket(arguments.host, arguments.port))
        models: dict[str, Pool[DecodeTask, Made]] = {}
        for name, path in zip(names, arguments.bundles, strict=True):
            openers = [_opener(path, device, arguments) for device in devices]
            pool = Pool[DecodeTask, Made](
                openers * arguments.workers,
                arguments.queue,
                arguments.batch,
                DecodeTask.kind,
                limits.seconds,
            )
            opened.callback(pool.close)
            models[name] = pool
        captions = None
        if arguments.encoder is not None:
            opener = OpenEncoder(arguments.encoder, arguments.backend, devices[0])
            captions = Pool[CaptionTask, Floats]([opener], arguments.queue, patience=limits.seconds)
            opened.callback(captions.close)
        app = make_app(models, limits, token, captions)
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=math.ceil(arguments.timeout),
        )
        _tell(arguments, names, bound.getsockname()[1])
        # uvicorn drains, and then raises the signal again.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([bound])


def _serve_on_ray(
    arguments: Namespace, names: Sequence[str], limits: "Limits", token: str | None
) -> None:
    """Deploy, and wait for Ctrl-C or SIGTERM."""
    console.need_packages(("ray",), "ray")
    device = _devices(arguments)
    if len(device) > 1 or arguments.encoder is not None or arguments.workers > 1:
        raise PidRuntimeError(
            "expected one device, no --encoder and no --workers with --ray, but got them; leave "
            "them out, and say --replicas"
        )
    from pid_serve.listening import bound_socket
    from pid_serve.ray_app import Cluster, start, stop

    with bound_socket(arguments.host, arguments.port) as bound:
        port = bound.getsockname()[1]  # is free
    cluster = Cluster(arguments.ray, arguments.replicas, arguments.host, port)
    openers = {
        name: _opener(path.resolve(), device[0], arguments)
        for name, path in zip(names, arguments.bundles, strict=True)
    }
    try:
        start(cluster, openers, arguments.queue, arguments.batch, limits, token)
        _tell(arguments, names, port)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
    finally:
        stop(cluster)


def _tell(arguments: Namespace, names: Sequence[str], port: int) -> None:
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{port}"
    result = {"address": address, "models": list(names)}
    console.emit(result, f"Serving {', '.join(names)} at {address}", as_json=arguments.json)


def _devices(arguments: Namespace) -> list[str]:
    """Where workers run: every device that is named, or the backend's own."""
    if arguments.device is None:
        return [device_name(arguments.backend, None)]
    return [name.strip() for name in arguments.device.split(",")]


def _opener(path: Path, device: str, arguments: Namespace) -> "OpenDecoder":
    from pid_serve.sessions import OpenDecoder

    return OpenDecoder(
        path,
        arguments.backend,
        device,
        threads=arguments.threads,
        verify=not arguments.no_verify,
        engines=arguments.engines,
        cuda_graphs=not arguments.no_cuda_graphs,
        vae=arguments.vae,
        vae_tile=arguments.vae_tile,
    )


def _replicas(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


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
