"""`tidegate config validate`: files are checked without any server."""

import io
import json
import re
from pathlib import Path

import pytest

from tidegate.cli.main import main

GOOD = 'Kind = "mesh"\nKind = "service-defaults"\nName = "api"\nNamespace = "shop"\n'
BAD = "kind: service-defaults\nname: web\nmutualTLSMode: loose\nprotokol: http\n"
SERVICE = '{"service": {"name": "web", "port": 80, "connect": {"sidecar_service": {}}}}'


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("good.hcl", GOOD), ("bad.yaml", BAD), ("service.json", SERVICE)):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_entry_and_definition_that_is_right_gets_a_line(files, capsys):
    assert main(["config", "validate", "good.hcl", "service.json"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "good.hcl: mesh/mesh: ok",
        "good.hcl: service-defaults/shop/api: ok",
        "service.json: service/web: ok",
    ]
    assert printed.err == ""


def test_all_faults_of_all_files_are_told(files, capsys):
    assert main(["config", "validate", "bad.yaml", "nowhere", "good.hcl"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        'tidegate: bad.yaml: line 3: MutualTLSMode: Invalid MutualTLSMode "loose". '
        'Must be one of "", "strict", or "permissive".',
        "tidegate: bad.yaml: line 4: protokol: is not a field here; expected Protocol",
        "tidegate: nowhere: cannot be read: No such file or directory; expected a file, or -",
    ]
    assert printed.out.splitlines()[0] == "good.hcl: mesh/mesh: ok"


def test_standard_input_is_a_file_too(files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(GOOD.encode())))
    assert main(["config", "validate", "-", "service.json"]) == 0
    assert capsys.readouterr().out.startswith("standard input: mesh/mesh: ok\n")


def test_pipelines_get_json(files, capsys):
    assert main(["config", "validate", "--json", "bad.yaml", "service.json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["valid"] == [
        {
            "source": "service.json",
            "kind": "service",
            "name": "web",
            "namespace": "default",
            "partition": "default",
        }
    ]
    assert [(one["source"], one["line"]) for one in report["faults"]] == [
        ("bad.yaml", 3),
        ("bad.yaml", 4),
    ]
    assert report["faults"][1]["expected"] == "Protocol"


def test_the_same_entry_in_two_files_is_a_fault(files, capsys):
    (files / "again.json").write_text('[{"Kind": "mesh"}, {"Kind": "mesh", "Partition": "east"}]')
    assert main(["config", "validate", "good.hcl", "again.json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "tidegate: again.json: mesh/mesh: is there in good.hcl too; expected it once"


def test_a_file_of_both_kinds_is_refused(files, capsys):
    (files / "both.json").write_text(f'[{{"Kind": "mesh"}}, {SERVICE}]')
    assert main(["config", "validate", "both.json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tidegate: both.json: holds config entries and service definitions;")


DOCUMENT = Path(__file__).parents[2] / "docs" / "config.md"


@pytest.mark.parametrize("language", ["hcl", "json", "yaml"])
def test_the_examples_of_the_document_are_right(language, tmp_path, capsys):
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    assert blocks
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.{language}").write_text(block)
    assert main(["config", "validate", *map(str, sorted(tmp_path.iterdir()))]) == 0, (
        capsys.readouterr().err
    )


def test_the_faulty_example_of_the_document_is_told_as_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "services").mkdir()
    (tmp_path / "mesh.hcl").write_text('Kind = "mesh"')
    (tmp_path / "services" / "orders.yaml").write_text(
        "kind: service-defaults\nname: orders\nprotocol: tcp\nmutualTlsMod: strict\n"
    )
    assert main(["config", "validate", "mesh.hcl", "services/orders.yaml"]) == 1
    printed = capsys.readouterr()
    for line in (printed.out + printed.err).splitlines():
        assert line in DOCUMENT.read_text()
