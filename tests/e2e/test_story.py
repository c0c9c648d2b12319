"""The story of the demo, step by step, in one lab; each test goes on where the one before it ended."""

import json
import time
from collections.abc import Iterator

import pytest
from labs import Lab, eventually, lab_up, start

API, PAY = 8080, 8443


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_up("story") as up:
        yield up


def intention(destination: str, *sources: str) -> str:
    rules = [{"Name": source, "Action": "allow"} for source in sources]
    return json.dumps({"Kind": "service-intentions", "Name": destination, "Sources": rules})


def verdict(lab: Lab, service: str, *options: str) -> tuple[int, dict]:
    done = lab.run("ready", service, "--json", *options)
    [answer] = json.loads(done.stdout)["verdicts"]
    return done.returncode, answer


def curl(lab: Lab, where: str, url: str) -> int:
    return lab.exec(where, "curl", "-skS", "--max-time", "3", url).returncode


def test_1_the_lab_has_seven_pods_with_both_families_on_two_nodes(lab: Lab) -> None:
    status = lab.status()
    assert len(status["nodes"]) == 2
    pods = {pod["name"]: pod for pod in status["pods"]}
    assert set(pods) == {"api", "web", "legacy", "pay", "tlsonly", "nightly", "db"}
    assert {name for name, pod in pods.items() if pod["mesh"]} == {"api", "web", "pay", "db"}
    for pod in pods.values():
        assert any("." in address for address in pod["addresses"])
        assert any(":" in address for address in pod["addresses"])


def test_2_the_ledger_shows_who_talks_to_whom_and_how(lab: Lab) -> None:
    expected = {
        ("web", "api", "mesh"),
        ("legacy", "api", "plaintext"),
        ("tlsonly", "pay", "tls"),
        ("web", "db", "plaintext"),
    }
    eventually(lambda: lab.sees(*expected), f"{expected} in the ledger")
    edges = {key: row for key, row in lab.edges().items() if key[2] != "empty"}
    assert set(edges) == expected, "nobody else talks, and nobody in another way"
    assert edges["web", "db", "plaintext"]["path"] == "outside the sidecars"
    assert edges["web", "api", "mesh"]["path"] == "sidecar"
    assert all(row["connections"] > 0 for row in edges.values())


def test_2_the_ledger_counts_every_connection_that_the_callers_opened(lab: Lab) -> None:
    def counted() -> bool:
        before = sum(target["connections"] for target in lab.targets("legacy"))
        rows = lab.edges()
        after = sum(target["connections"] for target in lab.targets("legacy"))
        seen = sum(row["connections"] for key, row in rows.items() if key[:2] == ("legacy", "api"))
        return before <= seen <= after

    eventually(counted, "the ledger to count what legacy opened")


def test_3_a_service_with_plaintext_callers_is_not_ready_and_names_them(lab: Lab) -> None:
    for service, caller, flow_class in (("api", "legacy", "plaintext"), ("pay", "tlsonly", "tls")):
        code, answer = verdict(lab, service)
        assert (code, answer["verdict"]) == (1, "NOT READY")
        reason = next(one for one in answer["reasons"] if one["kind"] == "blocking-flow")
        assert reason["caller"]["workload"] == caller
        assert reason["caller"]["service"] == caller
        assert reason["caller"]["meshed"] is False
        assert reason["class"] == flow_class
        assert reason["connections"] > 0
        assert abs(time.time() - reason["last_seen"]) < 30
        assert f"onboard {caller}" in reason["next_step"]
        text = lab.run("ready", service).stdout
        assert caller in text
        assert "NOT READY" in text


def test_4_callers_come_into_the_mesh_while_they_keep_calling(lab: Lab) -> None:
    for entry in (intention("api", "web", "legacy"), intention("pay", "tlsonly")):
        written = lab.run("config", "write", "-", stdin=entry)
        assert written.returncode == 0, written.stderr
    done = lab.run("lab", "onboard", "legacy", "tlsonly")
    assert done.returncode == 0, done.stderr
    mesh = [("legacy", "api", "mesh"), ("tlsonly", "pay", "mesh")]
    eventually(lambda: lab.sees(*mesh), "legacy and tlsonly in the mesh")
    assert lab.failures() == []


def test_5_after_a_clean_window_both_are_ready(lab: Lab) -> None:
    for service in ("api", "pay"):
        code, answer = verdict(lab, service, "--wait", "40s")
        assert (code, answer["verdict"]) == (0, "READY"), answer["reasons"]
        assert answer["reasons"] == []
        assert answer["coverage"]["complete"]
        assert all(one["agrees"] for one in answer["witness"]), answer["witness"]
    assert lab.failures() == []


def test_6_the_flip_refuses_plaintext_from_outside_and_fails_no_mesh_request(lab: Lab) -> None:
    url = f"http://api:{API}/"
    assert curl(lab, "outside", url) == 0, "permissive lets it in"
    eventually(lambda: verdict(lab, "api")[1]["verdict"] == "NOT READY", "the outside call seen")
    verdict(lab, "api", "--wait", "40s")
    before = lab.answered("web") + lab.answered("legacy")
    flip = start("strict", "--lab", lab.name, "api", "--guard", "5s", "--json")
    eventually(lambda: lab.pod("api")["agent"]["mode"] == "strict", "strict mode")
    assert curl(lab, "outside", url) != 0, "plaintext is refused"
    output, _ = flip.communicate(timeout=60)
    assert flip.returncode == 0, output
    assert [json.loads(line)["event"] for line in output.splitlines()][-1] == "kept"
    assert curl(lab, "outside", url) != 0
    assert lab.answered("web") + lab.answered("legacy") > before
    assert lab.failures() == []


def test_7_the_guard_rolls_back_for_a_caller_that_was_forgotten(lab: Lab) -> None:
    url = f"https://pay:{PAY}/"
    flip = start("strict", "--lab", lab.name, "pay", "--guard", "2m", "--json")
    eventually(lambda: lab.pod("pay")["agent"]["mode"] == "strict", "strict mode")
    assert curl(lab, "nightly", url) != 0, "strict refuses nightly"
    output, _ = flip.communicate(timeout=120)
    events = [json.loads(line) for line in output.splitlines()]
    assert flip.returncode == 1, output
    assert events[-1]["event"] == "rolled-back"
    assert {reason["caller"]["workload"] for reason in events[-1]["reasons"]} == {"nightly"}
    assert verdict(lab, "pay")[1]["mode"] == "permissive"
    eventually(lambda: curl(lab, "nightly", url) == 0, "nightly to be let in again", 5)
    assert lab.failures() == []
