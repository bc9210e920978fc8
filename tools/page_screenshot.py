"""Takes docs/serving-page.jpg: the page of pid-serve after it has enlarged a photograph.

python tools/page_screenshot.py BUNDLE, a bundle of space nano; needs Chromium.
"""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright
from quality import resized
from skimage.data import astronaut

PICTURE = Path(__file__).parents[1] / "docs" / "serving-page.jpg"


def main(bundle: str) -> int:
    """Serve a bundle and look at it; returns the exit code."""
    photo = io.BytesIO()
    Image.fromarray(resized(np.asarray(astronaut()), 128, 128)).save(photo, "PNG")
    command = [sys.executable, "-m", "pid_serve.cli", bundle, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server, sync_playwright() as play:
        assert server.stdout is not None
        try:
            address = json.loads(server.stdout.readline())["address"]
            browser = play.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1000, "height": 700}, color_scheme="light")
            page.goto(address)
            page.set_input_files(
                "#file",
                {"name": "astronaut.png", "mimeType": "image/png", "buffer": photo.getvalue()},
            )
            page.click("#start")
            page.wait_for_selector("#result", timeout=120_000)
            page.wait_for_timeout(200)
            page.screenshot(path=PICTURE, type="jpeg", quality=85)
        finally:
            server.terminate()
    return server.returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
