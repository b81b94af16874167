"""The documentation runs: what the README and docs/ show is executed here, in the order in which it is read.

Each Markdown file is one story, told in an empty directory:

- a `python` block runs in the file's one namespace; if its first line is a comment such as `# net.py`, it is also saved
  under that name, as a reader would save it;
- a `text` block right after a `python` block is what that block prints;
- in a `console` block each line after `$ ` is a shell command, and lines below it are what it prints, if there are any;
  those of the README go to a shell, others that are plain calls of `oocpatch` to a process that has it imported;
- `...` in printed text stands for anything, and runs of blanks are all alike;
- other languages are only shown;
- a picture that the story makes under the name of one that the page shows is that picture.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import oocpatch
from tests.support.children import Children

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "console", "text", "bash", "json", "toml"}


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a Markdown file."""

    language: str
    text: str
    line: int
    """Number of the block's first line in its file, from 1."""
    follows: bool
    """Whether nothing but blank lines stands between the block before and this one."""


def blocks(markdown: str) -> Iterator[Block]:
    fence, start, last_stop = None, 0, 0
    lines = markdown.splitlines()
    for number, line in enumerate(lines, 1):
        if fence is None and (opening := re.match(r"(`{3,})(\S*)\s*$", line)):
            fence, language, start = opening[1], opening[2], number
        elif fence is not None and line.rstrip() == fence:
            text = "".join(f"{inner}\n" for inner in lines[start : number - 1])
            yield Block(language, text, start + 1, last_stop > 0 and not "".join(lines[last_stop : start - 1]).strip())
            fence, last_stop = None, number
    if fence is not None:
        raise ValueError(f"the block that starts at line {start} has no end")


def assert_prints(expected: str, printed: str, where: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(expected, printed, flags):
        raise AssertionError(f"{where} shows\n{expected}but it is\n{printed}")


def run_python(block: Block, path: Path, namespace: dict[str, object]) -> str:
    """Execute a block and return what it printed; tracebacks show the line of the Markdown file."""
    if saved := re.match(r"# (\w+\.py)\n", block.text):
        Path(saved[1]).write_text(block.text)
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)  # noqa: S102 (our own documentation)
    return printed.getvalue()


def run_command(command: str, environment: dict[str, str], children: Children | None) -> tuple[int, str]:
    """Exit code of a command and what it printed."""
    if children is not None and command.startswith("oocpatch ") and not set(command) & set("|&;<>$*`"):
        code, printed, _ = children.call(
            "tests.support.command_child", *shlex.split(command)[1:], folder=Path.cwd(), merged=True
        )
        return code, printed
    # The shell is what a reader would type into; the commands are our own.
    shell = ["/bin/sh", "-c", command]
    done = subprocess.run(
        shell, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def run_console(block: Block, where: str, children: Children | None) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for entry in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = re.sub(r"\\\n\s*", "", entry).partition("\n")
        code, printed = run_command(command, environment, children)
        if code != 0:
            raise AssertionError(f"{where}: `{command}` ended with {code}\n{printed}")
        if expected.strip():
            assert_prints(expected, printed, f"{where}: `{command}`")


def forget_saved_modules() -> None:
    """Let the next story import its own `net.py`, and not this one's."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or os.devnull).parent == Path.cwd():
            del sys.modules[name]


def run_story(path: Path, children: Children | None = None) -> None:
    """Run all blocks of a Markdown file, in order, in the current directory."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(path.read_text()):
        where = f"{path.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a block must name one of {sorted(LANGUAGES)}"
        if block.language == "text" and printed is not None and block.follows:
            assert_prints(block.text, printed, where)
        printed = run_python(block, path, namespace) if block.language == "python" else None
        if block.language == "console":
            run_console(block, where, children)


def pictures(path: Path) -> list[Path]:
    """Files of pictures that a page shows."""
    return [path.parent / target for target in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", path.read_text())]


def assert_same_picture(shown: Path, made: Path) -> None:
    """A drawing to the letter; a PNG but for a few pixels: scores that are nearly equal may fall either way."""
    if shown.suffix == ".svg":
        assert shown.read_text() == made.read_text(), f"{shown.name} is not what the page makes"
        return
    expected, found = (np.asarray(Image.open(p).convert("RGB")).astype(int) for p in (shown, made))
    if expected.shape != found.shape or np.abs(expected - found).mean() > 1:
        raise AssertionError(f"{shown.name} is not what the page makes: {found.shape}, shown {expected.shape}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_documentation_shows_runs_and_prints_what_it_says(
    path: Path, children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        run_story(path, None if path.name == "README.md" else children)
    finally:
        forget_saved_modules()
    for shown in pictures(path):
        if (tmp_path / shown.name).exists():
            assert_same_picture(shown, tmp_path / shown.name)


def test_the_readme_shows_a_first_example_and_the_command_line() -> None:
    shown = [block.language for block in blocks((ROOT / "README.md").read_text())]
    assert "python" in shown
    assert "console" in shown


@pytest.mark.parametrize("ending", ["oocpatch demo", "pytest"])
def test_the_readme_gives_one_command_that_needs_a_fresh_clone_only(ending: str) -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3.11 -m venv")]
    assert sum(command.endswith(f"/{ending}") for command in commands) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    assert [t for t in targets if t and "://" not in t and not (path.parent / t).exists()] == []


def test_the_reference_has_every_public_name_once() -> None:
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs/reference/python.rst").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(oocpatch.__all__)


@pytest.mark.parametrize(
    ("story", "failure"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2, 'x is 1'\n```\n", "x is 1"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "wrong.md:6 shows\n2\nbut it is\n1"),
        ("```console\n$ true\n$ exit 3\n```\n", "wrong.md:2: `exit 3` ended with 3"),
        ("```console\n$ echo a \\\n    b\nb\n```\n", "wrong.md:2: `echo a b` shows\nb\nbut it is\na b"),
        ("```py\nx = 1\n```\n", "wrong.md:2: a block must name one of"),
    ],
    ids=["python", "printed", "console", "console-printed", "language"],
)
def test_documentation_that_is_wrong_fails(
    story: str, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.md").write_text(story)
    with pytest.raises(AssertionError, match=re.escape(failure)):
        run_story(tmp_path / "wrong.md")


def test_a_picture_that_is_not_what_the_page_makes_fails(tmp_path: Path) -> None:
    shown = pictures(ROOT / "docs/tutorial.md")
    assert [p.name for p in shown] == ["labels.zarr.png"]
    assert_same_picture(shown[0], shown[0])
    Image.open(shown[0]).convert("RGB").rotate(180).save(tmp_path / "turned.png")
    with pytest.raises(AssertionError, match="not what the page makes"):
        assert_same_picture(shown[0], tmp_path / "turned.png")


def test_documentation_that_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "right.md").write_text(
        "```python\n# sea.py\nx = 1\n```\nThen\n\n```python\nimport sea\nprint(sea.x, 5, x)\n```\n\n"
        "```text\n1 ... 1\n```\n\n"
        "```console\n$ cat sea.py | \\\n    head -1\n# sea.py\n$ true\n```\n\n```text\na drawing\n```\n"
    )
    run_story(tmp_path / "right.md")
    forget_saved_modules()
    assert "sea" not in sys.modules
