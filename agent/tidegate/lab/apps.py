"""The applications of a lab: starts each in its pod as the lab file says, and reads what they count.

Gives them resolved addresses, and a certificate to those that speak TLS of their own. What an
application does is in traffic.py, which runs in the pods.
"""

import datetime
from collections.abc import Callable, Iterator, Sequence

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tidegate.errors import InputError
from tidegate.lab import network, processes, state, traffic
from tidegate.lab.network import Layout
from tidegate.lab.processes import with_log
from tidegate.lab.spec import AppKind, CallKind, CallSpec, LabSpec, PodSpec
from tidegate.lab.state import AppStatistics, LabError, LabPaths, TargetStatistics

START_DEADLINE_S = 30.0


def start(spec: LabSpec, paths: LabPaths, layout: Layout, progress: Callable[[str], None]) -> None:
    """Make the applications run as the lab file says; those that already do are left alone."""
    pods = [pod for pod in spec.pods if pod.app.kind is not AppKind.NONE]
    for pod in spec.pods:
        if pod.app.kind is AppKind.NONE:
            processes.stop(paths, process_name(pod.name))
        if pod.app.kind is AppKind.TLS:
            ensure_certificate(paths, pod)
    for batch in _start_order(spec, pods):
        progress(f"applications: {', '.join(pod.name for pod in batch)}")
        started = [pod for pod in batch if _start_app(spec, paths, layout, pod)]
        for pod in started:
            _wait_for_app(paths, pod)


def trigger(paths: LabPaths, pod: PodSpec, timeout_s: float) -> tuple[TargetStatistics, ...]:
    """Make every manual call of a pod's application once and return how those targets fare now.

    Raises InputError for a pod without manual calls, LabError when the application does not run or
    the calls do not end in time.
    """
    manual = [index for index, call in enumerate(pod.app.calls) if call.every_s is None]
    if not manual:
        raise InputError(
            f"pod {pod.name} has no call that waits to be told", expected="every: manual"
        )
    before = _manual_targets(paths, pod, manual)
    record = processes.recorded(paths, process_name(pod.name))
    if record is None or not processes.send(record, traffic.TRIGGER):
        raise LabError(f"the application of pod {pod.name} does not run")
    processes.wait_until(
        lambda: all(
            now.ok + now.failed > then.ok + then.failed
            for now, then in zip(_manual_targets(paths, pod, manual), before, strict=True)
        ),
        timeout_s,
        lambda: f"the calls of pod {pod.name} did not end within {timeout_s:g} s",
    )
    return _manual_targets(paths, pod, manual)


def statistics(paths: LabPaths, pod: str) -> AppStatistics | None:
    """What the application of a pod counts; None while it has written nothing."""
    return state.read(paths.statistics(pod), AppStatistics)


def ensure_certificate(paths: LabPaths, pod: PodSpec) -> None:
    """Make the self-signed certificate of an application that speaks TLS of its own, once."""
    names = [x509.DNSName(name) for name in sorted(pod.names)]
    if paths.app_certificate(pod.name).exists():
        certificate = x509.load_pem_x509_certificate(paths.app_certificate(pod.name).read_bytes())
        known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        if list(known.value) == names:
            return
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, pod.service)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    state.write_bytes(
        paths.app_key(pod.name),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    state.write_bytes(
        paths.app_certificate(pod.name), certificate.public_bytes(serialization.Encoding.PEM)
    )


def process_name(pod: str) -> str:
    """Name of the process, and of its log."""
    return f"app-{pod}"


def _start_order(spec: LabSpec, pods: Sequence[PodSpec]) -> Iterator[list[PodSpec]]:
    """The applications in batches: after those that they call, unless calls go in circles."""
    waiting = {pod.name: pod for pod in pods}
    while waiting:
        batch = [
            pod
            for pod in waiting.values()
            if not any(
                target.name in waiting and target.name != pod.name
                for call in pod.app.calls
                for target in spec.pods_of(call.target)
            )
        ] or list(waiting.values())
        for pod in batch:
            del waiting[pod.name]
        yield batch


def configuration(
    spec: LabSpec, paths: LabPaths, layout: Layout, pod: PodSpec
) -> traffic.AppConfig:
    """What the application of a pod is started with; certificates of those that speak TLS are there already."""
    serves_tls = pod.app.kind is AppKind.TLS
    return traffic.AppConfig(
        pod=pod.name,
        kind=pod.app.kind,
        ports=tuple(port for port in pod.ports.values() if port),
        statistics=str(paths.statistics(pod.name)),
        certificate=str(paths.app_certificate(pod.name)) if serves_tls else "",
        key=str(paths.app_key(pod.name)) if serves_tls else "",
        calls=tuple(_call(spec, paths, layout, call) for call in pod.app.calls),
    )


def _start_app(spec: LabSpec, paths: LabPaths, layout: Layout, pod: PodSpec) -> bool:
    config = msgspec.json.encode(configuration(spec, paths, layout, pod))
    argv = (processes.PYTHON, "-m", "tidegate.lab.traffic", str(paths.app(pod.name)))
    name, digest = process_name(pod.name), processes.digest(*argv, config)
    if processes.runs_just_so(paths, name, digest):
        return False
    processes.stop(paths, name)
    paths.statistics(pod.name).unlink(missing_ok=True)
    state.write_bytes(paths.app(pod.name), config)
    processes.start(paths, name, network.namespace(spec.name, pod.name), argv, digest)
    return True


def _call(spec: LabSpec, paths: LabPaths, layout: Layout, call: CallSpec) -> traffic.CallConfig:
    pods = spec.pods_of(call.target)
    certificates = [
        paths.app_certificate(pod.name).read_text()
        for pod in pods
        if call.kind is CallKind.TLS and pod.app.kind is AppKind.TLS
    ]
    return traffic.CallConfig(
        target=call.target,
        addresses=tuple(address for pod in pods for address in layout.pod_addresses(pod.name)),
        answers=tuple(pod.name for pod in pods),
        port=call.port,
        kind=call.kind,
        every_s=call.every_s,
        keepalive=call.keepalive,
        timeout_s=call.timeout_s,
        trusted_certificates="".join(certificates),
        server_name=call.target,
    )


def _wait_for_app(paths: LabPaths, pod: PodSpec) -> None:
    name = process_name(pod.name)

    def runs() -> bool:
        if not processes.alive(processes.recorded(paths, name)):
            raise LabError(
                with_log(paths, name, f"the application of {pod.name} ended while it was starting")
            )
        return paths.statistics(pod.name).exists()

    processes.wait_until(
        runs,
        START_DEADLINE_S,
        lambda: with_log(paths, name, f"the application of {pod.name} does not start"),
    )


def _manual_targets(
    paths: LabPaths, pod: PodSpec, indexes: Sequence[int]
) -> tuple[TargetStatistics, ...]:
    found = statistics(paths, pod.name)
    if found is None or len(found.targets) != len(pod.app.calls):
        raise LabError(f"the application of pod {pod.name} does not run")
    return tuple(found.targets[index] for index in indexes)
