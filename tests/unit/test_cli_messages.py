"""What docs/troubleshooting.md quotes is said by the code: who has a message before them finds it there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (*(ROOT / "agent/tidegate").rglob("*.py"), *(ROOT / "init/cni").glob("*.c"))
AROUND = " ,;:()"
SHORTEST = 6
"""Letters of a quotation: less would be found anywhere."""


def quotations() -> list[str]:
    """What stands in the first column of the page's tables, "..." for what differs from case to case."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    found = [quoted for row in rows for quoted in re.findall(r"`([^`]+)`", row)]
    return [quoted for quoted in found if not quoted.startswith("tidegate ")]


def texts(source: Path) -> list[str]:
    """The string literals of a file, those that the compiler joins joined."""
    if source.suffix == ".py":
        nodes = ast.walk(ast.parse(source.read_text()))
        constants = (node.value for node in nodes if isinstance(node, ast.Constant))
        return [each for each in constants if isinstance(each, str)]
    joined = re.sub(r'"\s*\n\s*"', "", source.read_text())
    return re.findall(r'"((?:[^"\\\n]|\\.)*)"', joined)


@pytest.fixture(scope="module")
def said() -> list[list[str]]:
    return [texts(source) for source in SOURCES]


@pytest.mark.parametrize("quoted", quotations())
def test_a_quoted_message_is_one_of_the_code(said, quoted):
    parts = [part.strip(AROUND) for part in quoted.split("...")]
    parts = [part for part in parts if part]
    assert len("".join(parts)) >= SHORTEST, "too short to be told apart"
    assert any(all(any(part in text for text in file) for part in parts) for file in said), quoted


def test_the_page_quotes_messages():
    assert len(quotations()) > 40
