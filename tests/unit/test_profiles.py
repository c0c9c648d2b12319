"""Profiles of meshes: by name, or from a file."""

import pytest

from tidegate.cli import profiles
from tidegate.cli.workloads import Mesh
from tidegate.errors import InputError
from tidegate.observe.classifier import ISTIO, MeshProfile


@pytest.mark.parametrize(
    "text", ["alpn: [h2]", 'alpn = ["h2"]', '{"alpn": ["h2"]}'], ids=["yaml", "hcl", "json"]
)
def test_a_profile_is_written_in_any_of_three_notations(text, tmp_path):
    file = tmp_path / "mesh"
    file.write_text(text)
    assert profiles.chosen(str(file)) == MeshProfile(name="custom", alpn=("h2",))


def test_without_a_name_it_is_consuls_in_the_trust_domains_that_are_known():
    assert profiles.chosen(None) == profiles.chosen("consul") == profiles.KNOWN["consul"]
    found = profiles.chosen(None, {Mesh("consul", "b.test"), Mesh("consul", "a.test")})
    assert found.sni_suffixes == (
        ".internal.a.test",
        ".internal-v1.a.test",
        ".internal.b.test",
        ".internal-v1.b.test",
    )


def test_without_a_name_it_is_that_of_the_agent_whatever_the_mesh():
    assert profiles.chosen(None, {Mesh("istio", "cluster.local")}) == ISTIO
    both = profiles.chosen(None, {Mesh("istio", "cluster.local"), Mesh("consul", "a.test")})
    assert both.alpn == ISTIO.alpn
    assert ".internal.a.test" in both.sni_suffixes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpn: [x, ", "mesh: line "),
        ('alpn = ["x"', "mesh: line 1"),
        ('{"alpn": ["x"}', "mesh: line 1"),
        ("alpn: [x]\n---\nalpn: [y]\n", "mesh: holds 2 profiles; expected one for each file"),
        ("alpn: 3", "mesh: Expected `array`, got `int` - at `$.alpn`"),
        ("", "mesh: recognises nothing; expected sni_suffixes, alpn or proxy_ports"),
        ("proxy_ports: [0]", "mesh: proxy_ports: 0 is no port; expected 1 to 65535"),
    ],
)
def test_a_fault_is_told_with_the_file_that_it_is_in(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mesh").write_text(text)
    with pytest.raises(InputError) as caught:
        profiles.chosen("./mesh")
    assert str(caught.value).startswith(f"./{message}")
