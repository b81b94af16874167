"""The pages for contributors name files, modules, classes and functions that are there.

In the section "Where to make a change" of `docs/contributing.md`, what stands between backticks is a path, a name that
a file named in the same item defines or holds, or a placeholder such as `<format>`. The drawing of the floors in
`docs/design.md` has the names of the law of imports.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_imports import RANKS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "oocpatch"
SECTION = "## Where to make a change"


def recipes() -> str:
    page = (ROOT / "docs" / "contributing.md").read_text()
    return re.split(r"^## ", page.partition(SECTION)[2], flags=re.MULTILINE)[0]


def items(text: str) -> Iterator[str]:
    """The paragraphs and the numbered items of a text, each on one line, without code blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for item in re.split(r"\n\s*\n|\n(?=\d+\. )", prose):
        if line := " ".join(item.split()):
            yield line


def located(path: str) -> list[Path]:
    """What a path names: from the root of the repository, else in the package; of a placeholder its folder."""
    if "<" in path:
        path = f"{path.partition('<')[0].rpartition('/')[0]}/"
    return [place / path for place in (ROOT, PACKAGE) if (place / path).exists()]


def is_path(name: str) -> bool:
    return "/" in name or name.endswith((".py", ".md", ".toml", ".txt"))


def defines(source: str, name: str) -> bool:
    """Whether a module defines a name, or `Class.member`; an attribute that a class gives itself is a member."""
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        node = next((node for node in body if part in names_of(node)), None)
        if node is None:
            return False
        body = node.body if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
    return True


def names_of(node: ast.stmt) -> set[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def problems(text: str) -> list[str]:
    """What a text names and is not there."""
    wrong = []
    for item in items(text):
        names = re.findall(r"`([^`]+)`", item)
        files = [file for name in names if is_path(name) for file in located(name) if file.is_file()]
        sources = [file.read_text() for file in files]
        modules = [source for file, source in zip(files, sources, strict=True) if file.suffix == ".py"]
        for name in names:
            if is_path(name):
                there = bool(located(name))
            elif "." in name and name != "module.Class":
                there = any(defines(source, name) or f"{name}(" in source for source in modules)
            elif name in {"module.Class", "predict"} or not sources:
                there = True  # a form of text; the subject of all of it; an item about no file
            else:
                there = any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources)
            if not there:
                wrong.append(f"{name}: {item[:60]}")
    return wrong


def test_the_recipes_name_what_is_there() -> None:
    assert problems(recipes()) == []


def test_each_recipe_names_the_test_files_that_it_changes() -> None:
    parts = re.split(r"^### ", recipes(), flags=re.MULTILINE)[1:]
    assert len(parts) == 8
    for part in parts:
        tests = re.findall(r"`(tests/[\w/]+\.py)`", part)
        assert tests, part.partition("\n")[0]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`planning/nowhere.py`", "planning/nowhere.py"),
        ("`<format>/spec.py` and `planned/<format>.py`", "planned/<format>.py"),
        ("`engine/stages.py`: `no_such_function`", "no_such_function"),
        ("`planning/heads.py`: `Head.blendet`", "Head.blendet"),
        ("1. `planning/heads.py`: `Head.blended`\n2. `planning/box.py`: `Head.blended`", "Head.blended"),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_detected(text: str, wrong: str) -> None:
    assert [problem.partition(": ")[0] for problem in problems(text)] == [wrong]


def test_the_drawing_of_the_floors_has_the_names_of_the_law_from_the_top_to_the_bottom() -> None:
    drawing = (ROOT / "docs" / "design.md").read_text().partition("## The floors")[2].split("```")[1]
    rows = [re.split(r"\s{2,}", line.strip()) for line in drawing.splitlines()[1:] if line.strip()]
    drawn = [name for row in rows for name in row if name in RANKS]
    assert sorted(drawn) == sorted(RANKS.keys() - {"__main__"})
    below = [max(RANKS[name] for name in row if name in RANKS) for row in rows]
    assert below == sorted(below, reverse=True)


def test_the_folders_that_the_page_for_contributors_lists_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text()
    folders = sorted(f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
    overview, size = (page.partition(heading)[2] for heading in ("## How the package is built", "## Size"))
    for table in (overview.partition("\n- ")[0], size.partition("## ")[0]):
        named = [name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in row.split(", ")]
        listed = sorted(name.strip("`") for name in named if re.fullmatch(r"`\w+/`", name))
        assert [name for name in listed if name != "oocpatch/"] == folders
