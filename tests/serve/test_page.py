"""The page of `pid-serve`, in a real Chromium."""

import contextlib
import io
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from safetensors.numpy import save

from browser import browsing
from pid_runtime.decoder import Decoder
from pid_serve.app import Limits
from pid_serve.pool import Pool
from pid_serve.sessions import DecodeTask, Made
from serving import ask, ask_form, picture, pool, serving, wait_until

BAD = ("error", "warning")

Served = tuple[int, Pool[DecodeTask, Made]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser: Browser, golden_bundle: Path, nano: Path) -> Iterator[Served]:
    """After the browser: without one there is nothing to serve."""
    model = pool(nano)
    with serving({"nano": model, "golden": pool(golden_bundle)}) as port:
        yield port, model


@contextlib.contextmanager
def opened(browser: Browser, port: int, width: int = 1000, height: int = 800) -> Generator[Page]:
    """The page, which asks nobody else and says nothing on the console."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, accept_downloads=True
    )
    with contextlib.closing(context):
        page = context.new_page()
        page.set_default_timeout(20_000)
        others: list[str] = []
        said: list[str] = []
        own = (f"http://127.0.0.1:{port}/", "blob:", "data:")
        page.on("request", lambda each: others.extend([] if each.url.startswith(own) else each.url))
        page.on("console", lambda each: said.append(each.text) if each.type in BAD else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        expect(
            page.locator("#model option").or_(page.locator("#error:not(:empty)"))
        ).not_to_have_count(0)
        yield page
        assert others == []
        # A refusal is not silent in the console.
        assert [text for text in said if "the server responded with a status" not in text] == []


def choose(page: Page, name: str, data: bytes) -> None:
    kind = "image/png" if name.endswith("png") else "application/octet-stream"
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def downloaded(page: Page) -> bytes:
    with page.expect_download() as download:
        page.get_by_text("Download").click()
    return Path(download.value.path()).read_bytes()


def test_a_picture_by_keyboard_alone(browser: Browser, served: Served) -> None:
    sent = picture(24, 16)
    with opened(browser, served[0]) as page:
        choose(page, "photo.png", sent)
        page.locator("#file").focus()
        press = page.keyboard.press
        for key in ("Tab", "Tab", "ArrowRight", "ArrowRight"):  # model, then sigma
            press(key)
        press("Tab")
        page.keyboard.type("7")  # seed: what is there is selected
        press("Tab")
        page.keyboard.type("2")  # steps
        press("Tab")  # save as
        press("Tab")  # tiles
        press("Tab")
        expect(page.locator("#start")).to_be_focused()
        press("Enter")
        expect(page.locator("#result")).to_be_visible()
        expect(page.locator("#status")).to_have_text("Done")
        expect(page.locator("#about")).to_contain_text("96 x 64")
        wanted = ask_form(served[0], sent, model="nano", sigma="0.1", seed="7", steps="2")[2]
        assert downloaded(page) == wanted
        cut = page.locator("#compare")
        before = cut.evaluate("each => each.style.getPropertyValue('--cut')")
        page.locator("#slider").focus()
        press("Home")
        assert cut.evaluate("each => each.style.getPropertyValue('--cut')") == "0%" != before


def test_the_picture_without_pid_is_beside(browser: Browser, served: Served, nano: Path) -> None:
    sent = picture(32, 32)
    with opened(browser, served[0]) as page:
        choose(page, "photo.png", sent)
        page.click("#start")
        expect(page.locator("#result")).to_be_visible()
        size = "each => [each.naturalWidth, each.naturalHeight]"
        assert page.locator("#native").evaluate(size) == [32, 32]
        box = page.locator("#compare").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 9)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 9)
        page.mouse.up()
        assert page.locator("#slider").input_value() == "90"
        shown = Image.open(io.BytesIO(page.locator("#compare").screenshot())).convert("RGB")
        with Decoder.open(nano) as pid:
            latent = pid.encode(Image.open(io.BytesIO(sent)))
            native = pid.native_decode(latent)[0].transpose(1, 2, 0)
        found = np.asarray(shown.resize((32, 32), Image.Resampling.BOX), float) / 127.5 - 1
        left = np.abs(found - np.clip(native, -1, 1))[4:28, 4:24]
        assert left.mean() < 0.05


def test_a_latent_and_a_refusal(browser: Browser, served: Served) -> None:
    body = save({"latent": np.zeros((16, 2, 3), np.float32)})
    with opened(browser, served[0]) as page:
        choose(page, "some.safetensors", save({"other": np.zeros(3, np.float32)}))
        page.click("#start")
        expect(page.locator("#error")).to_contain_text("body: expected a tensor latent")
        choose(page, "some.safetensors", body)
        page.select_option("#model", "golden")
        page.select_option("#output", "webp")
        page.click("#start")
        expect(page.locator("#result")).to_be_visible()
        expect(page.locator("#error")).to_be_empty()
        expect(page.locator("#slider")).to_be_hidden()
        wanted = ask(served[0], "POST", "/v1/decode?model=golden&output=webp", body)[2]
        assert downloaded(page) == wanted


def test_progress_and_cancelling(browser: Browser, served: Served) -> None:
    port, model = served
    with opened(browser, port) as page:
        choose(page, "photo.png", picture(16, 16))
        for pid in model.pids:
            os.kill(pid, signal.SIGSTOP)
        page.click("#start")
        expect(page.locator("#start")).to_be_disabled()
        page.click("#cancel")
        expect(page.locator("#status")).to_have_text("Cancelled")
        for pid in model.pids:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: model.waiting == 0)
        page.evaluate(
            """() => { window.seen = []; new MutationObserver(() => window.seen.push(
                document.getElementById("status").textContent)).observe(
                document.getElementById("status"), { childList: true }) }"""
        )
        page.click("#start")
        expect(page.locator("#status")).to_have_text("Done")
        seen = page.evaluate("window.seen")
        assert seen == ["Waiting", *(f"Step {step} of 4" for step in range(1, 5)), "Done"]
        assert page.locator("#preview").evaluate("each => each.naturalWidth") == 64


def test_on_a_phone_nothing_is_cut_off(browser: Browser, served: Served) -> None:
    with opened(browser, served[0], 360, 640) as page:
        choose(page, "a-long-name-" * 9 + ".png", picture(128, 16))
        page.click("#start")
        expect(page.locator("#result")).to_be_visible()
        widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths == [360, 360]
        for name in ("#start", "#slider", "#seed"):
            box = page.locator(name).bounding_box()
            assert box is not None and box["height"] >= 40  # a thumb hits it


def test_a_token_is_asked_for(browser: Browser, golden_bundle: Path) -> None:
    with (
        serving({"golden": pool(golden_bundle)}, Limits(), "secret") as port,
        opened(browser, port) as page,
    ):
        expect(page.locator("#error")).to_have_text("This server wants a token.")
        page.fill("#token", "secret")
        page.press("#token", "Tab")
        expect(page.locator("#error")).to_be_empty()
        choose(page, "some.safetensors", save({"latent": np.zeros((16, 2, 3), np.float32)}))
        page.click("#start")
        expect(page.locator("#result")).to_be_visible()
