"""What other meshes left is told in one harmless sentence, whatever somebody called it."""

from tidegate.enforce.redirect.foreign import recognised
from tidegate.kernel.chains import Chain, Store


def test_names_that_a_pod_chose_can_do_nothing_to_a_terminal_and_take_little_room():
    names = [
        "ISTIO_\x1b[2J\nthe kernel equals the policy",
        *(f"ISTIO_{n:06}" for n in range(40000)),
    ]
    (found,) = recognised(Chain(Store.NF_TABLES, "ip", "nat", name) for name in names)
    assert str(found).isprintable()
    assert len(str(found)) < 400
    assert "Istio redirects in the nftables table ip nat" in str(found)
    assert "39996 more" in str(found)
