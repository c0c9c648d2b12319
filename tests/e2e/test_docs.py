"""The documents are true: their commands run, their examples are accepted, the transcript is the demo's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from labs import tidegate

from tidegate.catalog.settings import load_config as load_server_config
from tidegate.kernel import netns
from tidegate.lab import spec
from tidegate.model import Workload
from tidegate.node.config import load_config as load_agent_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
STEP_BY_STEP = "onboarding.md"
"""Its commands wait for each other: test_onboarding.py runs them."""
NOT_READY = 1


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL
    )


def commands(document: Path) -> list[str]:
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line.strip()]


def take_down() -> None:
    for name in ("demo", "second"):
        tidegate("lab", "down", "--name", name)
    if "tg-docs" in netns.names():
        netns.delete("tg-docs")


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if commands(d) and d.name != STEP_BY_STEP],
    ids=lambda document: document.name,
)
def test_every_command_of_a_document_does_what_a_reader_expects(document: Path) -> None:
    bin_directory = Path(sys.executable).parent
    take_down()
    try:
        for line in commands(document):
            runnable = line.replace("sudo ", "").replace(".venv/bin/", f"{bin_directory}/")
            done = subprocess.run(
                ["/bin/bash", "-o", "pipefail", "-c", runnable],
                cwd=ROOT,
                env={**os.environ, "TIDEGATE_LAB": "demo"},
                text=True,
                capture_output=True,
                timeout=120,
                check=False,
            )
            # A verdict is told by the exit code too; anything else has to succeed.
            allowed = (0, NOT_READY, 2) if " ready" in line else (0,)
            assert done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr, done.stderr
            if " ready" in line:
                assert re.search("READY|UNKNOWN", done.stdout), f"{line}: no verdict: {done.stderr}"
    finally:
        take_down()


def test_the_configurations_of_the_documents_are_accepted(tmp_path: Path) -> None:
    lab, agent, server = tmp_path / "lab.yaml", tmp_path / "agent.yaml", tmp_path / "server.yaml"
    lab.write_text(blocks(ROOT / "docs/lab.md", "yaml")[0])
    assert spec.load(lab).name == "example"
    agent_text, server_text = blocks(ROOT / "docs/agent.md", "yaml")
    agent.write_text(agent_text)
    assert load_agent_config(agent).node == "node1"
    server.write_text(server_text)
    assert load_server_config(server).trust_domain == "example.test"
    workload = blocks(ROOT / "docs/agent.md", "json")[0]
    assert msgspec.json.decode(workload, type=Workload, strict=True).meshed


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_what_looks_like_a_command_is_run_or_said_to_be_an_example() -> None:
    """Blocks marked `sh` are run; those marked `console` need what a test of documents has not."""
    for document in DOCUMENTS:
        fences = re.findall(
            r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL
        )
        for language, block in fences:
            assert language, f"{document.name}: a block without a language: {block[:60]}"
            if language in ("sh", "console") or "1. A lab of two nodes" in block:
                continue
            typed = re.search(r"^(\$ |sudo |tidegate |kubectl ).*", block, re.MULTILINE)
            assert not typed, f"{document.name}: {typed[0]}"


def test_every_module_that_the_architecture_names_is_there() -> None:
    names = re.findall(
        r"`(?:[\w.]+/)*([\w-]+\.(?:py|h))`", (ROOT / "docs/architecture.md").read_text()
    )
    there = {path.name for part in ("agent", "bpf", "tests") for path in (ROOT / part).rglob("*.*")}
    assert len(names) > 80
    assert set(names) <= there


def story(text: str) -> list[str]:
    """What may not differ between two runs: chapters, commands, titles of tables, verdicts, who blocks and how, and the
    numbers of failures."""
    kept = []
    for line in text.splitlines():
        if line.startswith("$ ") or re.match(r"\d\. ", line):
            kept.append(line.rstrip("─ "))
        elif re.match(r" *(node|pod|caller) ", line):
            kept.append(" ".join(line.split()))
        elif match := re.search(r"^  - (\w+) \(\S+\) (calls [^ ]+ [^:]+)", line):
            kept.append(" ".join(match.groups()))
        elif match := re.search(r"^\w+: (READY|NOT READY|UNKNOWN)|failed: \d+", line):
            kept.append(match[0])
    return kept


def test_the_transcript_of_the_readme_is_what_the_demo_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.lab.demo"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert story(done.stdout) == story(blocks(ROOT / "README.md", "text")[0])
