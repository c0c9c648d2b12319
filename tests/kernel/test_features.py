"""Probing the kernel for features."""

from pathlib import Path

import pytest
from namespaces import open_descriptors

from tidegate.kernel import features, netns
from tidegate.kernel.errors import KernelError


def test_every_feature_is_found_here_and_probing_leaves_nothing_behind():
    features.probe_all()
    before = netns.names(), Path("/proc/self/mounts").read_text(), open_descriptors()
    found = features.probe_all()
    assert [feature for feature in found if not feature.present] == []
    assert (netns.names(), Path("/proc/self/mounts").read_text(), open_descriptors()) == before


@pytest.mark.parametrize("failure", [KernelError("not supported"), OSError(95, "Not supported")])
def test_a_feature_that_the_kernel_refuses_is_missing_with_the_reason(monkeypatch, failure):
    def refuse(*_):
        raise failure

    monkeypatch.setattr(features, "_bpf", refuse)
    missing = [feature for feature in features.probe_all() if not feature.present]
    assert {feature.name for feature in missing} == {
        "bpf(2) with traffic control programs",
        "tcx links or clsact filters",
        "BPF ring buffers",
    }
    for feature in missing:
        assert feature.detail == str(failure)
        assert feature.lost_without


def test_where_tcx_is_refused_clsact_is_tried(monkeypatch):
    ask = features._bpf

    def refuse_links(command, attribute, what):
        if command == features._BPF_LINK_CREATE:
            raise KernelError("cannot attach a tcx link: Invalid argument")
        return ask(command, attribute, what)

    monkeypatch.setattr(features, "_bpf", refuse_links)
    (found,) = [each for each in features.probe_all() if each.name.startswith("tcx")]
    assert found.present
    assert "clsact" in found.detail
    assert "Invalid argument" in found.detail
