"""Servers on loopback, and clients of theirs."""

import contextlib
import http.client
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from pid_serve.app import make_app
from pid_serve.listening import Protocol
from pid_serve.pool import Pool
from pid_serve.sessions import DecodeTask, Made, OpenDecoder

Answer = tuple[int, Mapping[str, str], bytes]


def pool(bundle: Path, workers: int = 1, queue: int = 16, batch: int = 1) -> Pool[DecodeTask, Made]:
    """Workers of a bundle, on the processor."""
    openers = [OpenDecoder(bundle, threads=1)] * workers
    return Pool[DecodeTask, Made](openers, queue, batch, DecodeTask.kind)


@contextlib.contextmanager
def serving(
    models: Mapping[str, Pool[DecodeTask, Made]], *options: Any, **more: Any
) -> Generator[int]:
    """Serve in a thread; gives the port."""
    app = make_app(models, *options, **more)
    config = uvicorn.Config(
        app, port=0, http=Protocol, ws="none", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def running(*arguments: object) -> Generator[tuple[int, int]]:
    """The command `pid-serve` as a process of its own; gives its port and its id."""
    command = [sys.executable, "-m", "pid_serve.cli", *map(str, arguments), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(json.loads(process.stdout.readline())["address"].split(":")[-1]), process.pid
        finally:
            process.terminate()
            assert process.wait(60) == 0


def own_bytes(pid: int) -> int:
    """Memory of a process that is not a file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def metric(port: int, name: str) -> float:
    """The sum of a metric over its labels."""
    text = ask(port, "GET", "/metrics")[2].decode()
    return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)))


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """One request; header names have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def ask_form(port: int, image: bytes, **fields: str) -> Answer:
    """A form to /v1/upscale."""
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts.append(b'name="image"; filename="a"\r\n\r\n' + image)
    head = b"--sep\r\nContent-Disposition: form-data; "
    body = b"".join(head + part + b"\r\n" for part in parts) + b"--sep--\r\n"
    return ask(port, "POST", "/v1/upscale", body, Content_Type="multipart/form-data; boundary=sep")


def picture(width: int, height: int) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Fail unless something holds in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
