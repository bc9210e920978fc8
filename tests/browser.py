"""A real Chromium, where there is one."""

import contextlib
import os
import shutil
from collections.abc import Generator

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def browsing() -> Generator[Browser]:
    """A browser without a window; skips the test where none is installed."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    # Its sandbox does not work for root, which CI runs as.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        with contextlib.closing(browser):
            yield browser
