"""What must never be READY: evidence that is missing, out of date, or only looks right."""

import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from labs import Lab, eventually, lab_up, tidegate

PAY_PORT = 8443


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_up("truth") as up:
        eventually(lambda: up.sees(("web", "api", "mesh")), "traffic")
        yield up


def verdict(lab: Lab, service: str) -> Any:
    [answer] = lab.json("ready", service)["verdicts"]
    return answer


def reasons(lab: Lab, service: str) -> dict[str, Any]:
    return {reason["kind"]: reason for reason in verdict(lab, service)["reasons"]}


def test_tls_with_the_meshs_name_that_bypasses_the_sidecars_blocks(lab: Lab) -> None:
    host = f"pay.default.dc1.internal.tidegate.test:{PAY_PORT}"
    called = lab.exec(
        "nightly", "curl", "-sk", "--connect-to", f"{host}:pay:{PAY_PORT}", f"https://{host}/"
    )
    assert called.returncode == 0, called.stderr
    answer = verdict(lab, "pay")
    assert answer["verdict"] == "NOT READY"
    [imitation] = [
        reason
        for reason in answer["reasons"]
        if reason["caller"] and reason["caller"]["workload"] == "nightly"
    ]
    assert imitation["class"] == "mesh"
    assert "does not come from a sidecar" in imitation["message"]


def test_rules_that_somebody_flushed_come_back_and_the_verdict_knows(lab: Lab) -> None:
    namespace = f"tg-{lab.name}-db"
    eventually(lambda: "evidence-lost" not in reasons(lab, "db"), "nothing lost yet")
    flush = ["ip", "netns", "exec", namespace, "nft", "flush", "ruleset"]
    subprocess.run(flush, check=True)

    def repaired() -> bool:
        listing = ["ip", "netns", "exec", namespace, "nft", "list", "tables"]
        return "tidegate" in subprocess.run(listing, text=True, capture_output=True).stdout

    eventually(repaired, "the rules to be back")
    lost = eventually(lambda: reasons(lab, "db").get("evidence-lost"), "the repair to show")
    assert "another program changed the redirection of" in lost["message"]


def test_without_the_intent_server_nothing_is_ready(lab: Lab) -> None:
    server = psutil.Process(lab.status()["server_pid"])
    server.send_signal(signal.SIGKILL)
    psutil.wait_procs([server], timeout=10)
    try:
        answer = verdict(lab, "db")
        assert answer["verdict"] == "UNKNOWN"
        assert any("may have changed" in reason["message"] for reason in answer["reasons"])
        answered = lab.answered("web")
        eventually(lambda: lab.answered("web") > answered + 5, "requests without a server")
    finally:
        done = tidegate("lab", "up", "--lab", lab.name)
        assert done.returncode == 0, done.stderr
    assert lab.failures() == []
