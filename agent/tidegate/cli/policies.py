"""Which policy the redirect commands speak of: built-in defaults, changed by what the options give."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from tidegate.cli import redirect_text
from tidegate.cli.arguments import source_of, text_of
from tidegate.cli.redirect_text import SHOWN
from tidegate.cli.workloads import KnownWorkload
from tidegate.errors import InputError, InputErrors
from tidegate.intent.annotations import policy_from_annotations, policy_of
from tidegate.intent.documents import read_documents
from tidegate.intent.policy import DEFAULT, Policy
from tidegate.intent.policy_documents import (
    policy_from_consul_config,
    policy_from_document,
    policy_to_document,
)
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


class Layer(NamedTuple):
    """A source of settings, and the policy as it is with it and those below."""

    name: str
    policy: Policy


def options_given(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The options that give a policy, as they were given."""
    values = [(_option(source), getattr(args, source)) for source in _CHANGES]
    return [(option, value) for option, value in values if value is not None]


def given(args: argparse.Namespace) -> tuple[Layer, ...]:
    """The policy that the options give is that of the last layer; the built-in defaults are below the first.

    Warns of a manifest that has no annotations. InputErrors with the faults of all options.
    """
    _refuse_second_stdin(args)
    layers = []
    policy = DEFAULT
    faults: list[InputError] = []
    for source, change in _CHANGES.items():
        option = getattr(args, source)
        if option is None:
            continue
        try:
            policy = change(option, policy)
            layers.append(Layer(_option(source), policy))
        except InputErrors as error:
            faults += error.faults
        except InputError as error:
            faults.append(error)
    if faults:
        raise InputErrors(tuple(faults))
    return tuple(layers)


def of_workload(workload: KnownWorkload) -> Policy:
    """The policy of its annotations, built-in defaults below. InputErrors names the workload in each fault."""
    with _from(f"workload {workload.name}"):
        return _annotated(workload.namespace_annotations, workload.annotations)


def layers_of_workload(workload: KnownWorkload) -> tuple[Layer, ...]:
    """Where the policy of its annotations comes from; () where they have faults, and another one is in force."""
    try:
        of_namespace = _annotated(workload.namespace_annotations, {})
        whole = of_workload(workload)
    except InputErrors:
        return ()
    return Layer("its namespace", of_namespace), Layer("its annotations", whole)


def as_yaml(policy: Policy, layers: Iterable[Layer] = (), others: str = "") -> str:
    """All settings of a policy, a line each, as a document that --policy reads again.

    Comments say what is not the built-in default, and which layer said so last; `others` did where none of them did.
    """
    defaults = policy_to_document(DEFAULT)
    authors = said_by(policy, layers, others)
    lines = []
    for section, fields in policy_to_document(policy).items():
        in_section = isinstance(fields, dict)
        if in_section:
            lines.append(f"{section}:")
        for place, value in _settings({section: fields}):
            default = _at(defaults, [*place])
            who = authors.get(place)
            remark = f"  # default: {json.dumps(default)}" + (f"; by {who}" if who else "")
            # A value of JSON is one of YAML.
            line = f"{place[-1]}: {json.dumps(value)}{'' if value == default else remark}"
            lines.append(f"  {line}" if in_section else line)
    return "".join(f"{line}\n" for line in lines)


def said_by(
    policy: Policy, layers: Iterable[Layer], others: str = ""
) -> dict[tuple[str, ...], str]:
    """Which layer said each setting last that is not the built-in default; `others` did where none of them did.

    By place, such as ("outbound", "port"); a setting of which that is not known is not among them.
    """
    settings = policy_to_document(policy)
    before = defaults = policy_to_document(DEFAULT)
    authors: dict[tuple[str, ...], str] = {}
    for layer in layers:
        after = policy_to_document(layer.policy)
        authors |= {
            place: layer.name
            for place, value in _settings(after)
            if value != _at(before, [*place]) and value == _at(settings, [*place])
        }
        before = after
    changed = [place for place, value in _settings(settings) if value != _at(defaults, [*place])]
    named = {place: authors.get(place, others) for place in changed}
    return {place: who for place, who in named.items() if who}


def _settings(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each setting of a document, with its place."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from (((name, field), each) for field, each in value.items())
        else:
            yield (name,), value


def _annotated(namespace_annotations: Mapping[str, str], annotations: Mapping[str, str]) -> Policy:
    return policy_of(namespace_annotations, annotations, DEFAULT, users=user_id, groups=group_id)


def _option(source: str) -> str:
    return f"--{source.replace('_', '-')}"


def faults_of_workload(workload: KnownWorkload) -> tuple[InputError, ...]:
    """What is wrong with its annotations, each fault with the name of the annotation."""
    try:
        of_workload(workload)
    except InputErrors as error:
        return tuple(
            InputError(fault.problem, field=fault.field, expected=fault.expected)
            for fault in error.faults
        )
    return ()


def _refuse_second_stdin(args: argparse.Namespace) -> None:
    readers = [source for source in _CHANGES if getattr(args, source) == "-"]
    if len(readers) > 1:
        names = " and ".join(map(_option, readers))
        raise InputError(f"{names} both read standard input", expected="one of them from a file")


def _by_document(option: str, base: Policy) -> Policy:
    source = source_of(option)
    return policy_from_document(text_of(option), source, base, users=user_id, groups=group_id)


def _by_annotations(option: str, base: Policy) -> Policy:
    source = source_of(option)
    annotations = _annotations(text_of(option), source)
    with _from(source):
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
OPTIONS: Final = tuple(map(_option, _CHANGES))


def _annotations(text: str, source: str) -> Mapping[str, object]:
    documents = read_documents(text, source)
    if not documents:
        raise InputError("holds nothing", source=source, expected="one mapping, or one manifest")
    if len(documents) > 1:
        problem = f"holds {len(documents)} documents ({_named(documents)})"
        raise InputError(problem, source=source, expected="one of them, in a file of its own")
    document: Mapping[str, Any] = documents[0]
    if "metadata" in document or "kind" in document:
        return _annotations_of_manifest(document, source)
    for name, value in document.items():
        if isinstance(value, Mapping):
            expected = "annotations only, or a whole manifest with its kind"
            raise InputError("is a mapping", source=source, field=name, expected=expected)
    return document


def _annotations_of_manifest(manifest: Mapping[str, Any], source: str) -> Mapping[str, object]:
    """A pod's annotations: those of its own manifest, or of the template of whatever makes the pod."""
    _refuse_list(manifest, source)
    path = ["metadata", "annotations"]
    for template in (["spec", "template"], ["spec", "jobTemplate", "spec", "template"]):
        if _at(manifest, template) is not None:
            path = [*template, *path]
    field = ".".join(path)
    found = _at(manifest, path)
    if found is not None and not isinstance(found, Mapping):
        raise InputError("is not a mapping", source=source, field=field, expected="name: value")
    if not found:
        redirect_text.warn(f"{source}: the manifest has no annotations ({field})")
    return found or {}


def _refuse_list(manifest: Mapping[str, Any], source: str) -> None:
    """InputError for what `kubectl get` prints of several objects."""
    kind, items = manifest.get("kind"), manifest.get("items")
    if not str(kind).endswith("List") and not isinstance(items, list):
        return
    items = items if isinstance(items, list) else []
    named = f" ({_named(items)})" if items else ""
    names = [words for words in map(_kind_and_name, items) if len(words) == 2]
    example = f"`kubectl get {names[0][0].lower()} {names[0][1]} -o yaml`" if names else ""
    raise InputError(
        f"is a {kind} of {len(items)} manifests{named}",
        source=source,
        expected=f"one of them, such as {example} prints" if example else "one manifest",
    )


def _named(manifests: Sequence[Any]) -> str:
    """What each of several manifests is, as far as a line can hold them."""
    shown = [
        " ".join(words) if len(words) == 2 else f"a {words[0]}"
        for words in map(_kind_and_name, manifests[:SHOWN])
    ]
    more = ["..."] if len(manifests) > SHOWN else []
    return ", ".join(shown + more)


def _kind_and_name(manifest: Any) -> tuple[str, ...]:
    kind, name = (
        _at(manifest, path) if isinstance(manifest, Mapping) else None
        for path in (["kind"], ["metadata", "name"])
    )
    return (str(kind) if kind else "mapping", *((str(name),) if name else ()))


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
