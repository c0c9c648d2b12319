"""Which policy the redirect commands speak of: built-in defaults, changed by what the options give."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from tidegate.cli.arguments import text_of
from tidegate.cli.workloads import KnownWorkload
from tidegate.errors import InputError, InputErrors
from tidegate.intent.annotations import policy_from_annotations, policy_of
from tidegate.intent.documents import read_documents
from tidegate.intent.policy import DEFAULT, Policy
from tidegate.intent.policy_documents import policy_from_consul_config, policy_from_document
from tidegate.node.users import group_id, user_id


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that give a policy."""
    group = parser.add_argument_group(
        "policy (default: the workload's, else the built-in one; each option changes what those before it gave)"
    )
    group.add_argument(
        "--policy", metavar="FILE", help="a policy in YAML or JSON; - for standard input"
    )
    group.add_argument(
        "--annotations",
        metavar="FILE",
        help="annotations: a YAML or JSON mapping, or a Kubernetes manifest with them; - for standard input",
    )
    group.add_argument(
        "--consul-config",
        metavar="JSON",
        help="Consul's redirect-traffic-config, as it stands in the annotation; @FILE or - to read it",
    )


def is_given(args: argparse.Namespace) -> bool:
    """Whether the options give a policy."""
    return any(getattr(args, source) is not None for source in _CHANGES)


def given(args: argparse.Namespace) -> Policy:
    """The policy that the options give, built-in defaults below. InputErrors with the faults of all of them."""
    _refuse_second_stdin(args)
    policy = DEFAULT
    faults: list[InputError] = []
    for source, change in _CHANGES.items():
        option = getattr(args, source)
        if option is None:
            continue
        try:
            policy = change(option, policy)
        except InputErrors as error:
            faults += error.faults
        except InputError as error:
            faults.append(error)
    if faults:
        raise InputErrors(tuple(faults))
    return policy


def of_workload(workload: KnownWorkload) -> Policy:
    """The policy of its annotations, built-in defaults below. InputErrors names the workload in each fault."""
    with _from(f"workload {workload.name}"):
        return policy_of(
            workload.namespace_annotations,
            workload.annotations,
            DEFAULT,
            users=user_id,
            groups=group_id,
        )


def _refuse_second_stdin(args: argparse.Namespace) -> None:
    readers = [source for source in _CHANGES if getattr(args, source) == "-"]
    if len(readers) > 1:
        names = " and ".join(f"--{source.replace('_', '-')}" for source in readers)
        raise InputError(f"{names} both read standard input", expected="one of them from a file")


def _by_document(option: str, base: Policy) -> Policy:
    return policy_from_document(text_of(option), option, base, users=user_id, groups=group_id)


def _by_annotations(option: str, base: Policy) -> Policy:
    annotations = _annotations(text_of(option), option)
    with _from(option):
        return policy_from_annotations(annotations, base, users=user_id, groups=group_id)


def _by_consul_config(option: str, base: Policy) -> Policy:
    file = option if option == "-" else option[1:] if option.startswith("@") else None
    return policy_from_consul_config(option if file is None else text_of(file), base)


_CHANGES: Final[Mapping[str, Callable[[str, Policy], Policy]]] = {
    "policy": _by_document,
    "annotations": _by_annotations,
    "consul_config": _by_consul_config,
}
"""The options that give a policy, in the order in which they are applied."""


def _annotations(text: str, source: str) -> Mapping[str, str]:
    documents = read_documents(text, source)
    if len(documents) != 1:
        expected = "one mapping, or one manifest"
        raise InputError(f"holds {len(documents)} documents", source=source, expected=expected)
    document: Mapping[str, Any] = documents[0]
    if "metadata" in document or "kind" in document:
        document = _annotations_of_manifest(document, source)
    faults = tuple(
        InputError(
            "is not a string",
            source=source,
            field=name,
            expected=json.dumps(json.dumps(value)),
        )
        for name, value in document.items()
        if not isinstance(value, str)
    )
    if faults:
        raise InputErrors(faults)
    return document


def _annotations_of_manifest(manifest: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """A pod's annotations: those of its own manifest, or of the template of whatever makes the pod."""
    path = ["metadata", "annotations"]
    for template in (["spec", "template"], ["spec", "jobTemplate", "spec", "template"]):
        if _at(manifest, template) is not None:
            path = [*template, *path]
    found = _at(manifest, path)
    if found is not None and not isinstance(found, Mapping):
        field = ".".join(path)
        raise InputError("is not a mapping", source=source, field=field, expected="name: value")
    return found or {}


def _at(document: Mapping[str, Any], path: list[str]) -> Any:
    found: Any = document
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


@contextlib.contextmanager
def _from(source: str) -> Iterator[None]:
    """Names the source in the faults of annotations, which bear only the annotation's name."""
    try:
        yield
    except InputErrors as error:
        raise InputErrors(
            tuple(
                InputError(fault.problem, source=source, field=fault.field, expected=fault.expected)
                for fault in error.faults
            )
        ) from error
