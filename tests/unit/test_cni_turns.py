"""Calls about one container come one after the other."""

from tidegate.node.cni_calls import Turns


def test_who_comes_later_begins_when_those_before_have_left() -> None:
    turns = Turns()
    begun: list[str] = []
    assert turns.take("c1", lambda: begun.append("first"))
    for name in ("second", "third"):
        assert not turns.take("c1", lambda name=name: begun.append(name))
    assert begun == []
    turns.leave("c1")
    assert begun == ["second"]
    assert not turns.take("c1", lambda: begun.append("fourth"))
    for _ in range(3):
        turns.leave("c1")
    assert begun == ["second", "third", "fourth"]
    assert turns.take("c1", lambda: begun.append("fifth"))


def test_containers_do_not_wait_for_each_other() -> None:
    turns = Turns()
    assert turns.take("c1", lambda: None)
    assert turns.take("c2", lambda: None)
