"""The pages: links that lead somewhere, options and messages that exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("runtime", "export", "engines", "pid_ref")
COMMANDS = {
    "pid-bench": "pid_bench.cli",
    "pid-build": "pid_engines.cli",
    "pid-calibrate": "pid_export.calibrate_cli",
    "pid-caption": "pid_pipelines.caption_cli",
    "pid-decode": "pid_runtime.command.decode_cli",
    "pid-doctor": "pid_runtime.command.doctor_cli",
    "pid-export": "pid_export.cli",
    "pid-generate": "pid_pipelines.generate_cli",
    "pid-serve": "pid_serve.cli",
    "pid-triton": "pid_serve.triton_cli",
    "pid-upscale": "pid_pipelines.upscale_cli",
    "pid-verify": "pid_export.verify_cli",
}


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M):
        plain = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found |= {plain, *(f"{plain}-{number}" for number in range(1, 4))}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_the_index_has_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    pages = {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"index.md"}
    assert {name for name in pages if f"]({name})" not in text} == set()
    assert "(docs/index.md)" in (ROOT / "README.md").read_text("utf-8")


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Every call of a command of ours in a block of shell: its page, its name, its words."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in COMMANDS:
                    yield page.name, words[0], words[1:]


@cache
def options(command: str, subcommand: str) -> set[str]:
    code = f"import sys; from {COMMANDS[command]} import main; main(sys.argv[1:])"
    given = [subcommand] if subcommand else []
    done = subprocess.run(
        [sys.executable, "-c", code, *given, "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", done.stdout))


def test_commands_have_the_options_that_pages_give_them() -> None:
    found = list(commands())
    assert {name for _, name, _ in found} == COMMANDS.keys()
    for page, name, words in found:
        sub = words[0] if words[:1] in (["compare"], ["merge"]) else ""
        given = {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)}
        assert given <= options(name, sub), f"{page}: {name} {given - options(name, sub)}"


def test_messages_exist_as_the_page_has_them() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 20
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    text = " ".join(file.read_text("utf-8") for file in files)
    joined = re.sub(r'"\s*\n\s*f?"', "", text)
    assert [message for message in messages if message.strip() not in joined] == []


def test_polygraphy_runs_the_commands_of_its_page(golden_bundle: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "polygraphy.md").read_text("utf-8")
    lines = re.findall(r"```sh\n(.*?)```", page, re.S)[0].splitlines()
    assert len(lines) == 4
    bundle = tmp_path / "bundle"
    shutil.copytree(golden_bundle, bundle)
    for line in lines:
        words = shlex.split(line)
        environment = dict(word.split("=") for word in words if re.match("[A-Z_]+=", word))
        given = words[len(environment) + 1 :]
        done = subprocess.run(
            [Path(sys.executable).with_name("polygraphy"), *given],
            cwd=bundle,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert "--load-outputs" not in given or "Pass Rate: 100.00%" in done.stdout
    assert (bundle / "latent.engine").stat().st_size > 0
