"""What is kept of what was found out: the entries that were used last, and no more."""

from tidegate.enforce.redirect.recent import Recent


def test_memory_is_kept_of_the_last_ones_only():
    recent = Recent(3)
    for number in range(5):
        recent.put(number, str(number))
        assert recent.get(0) == "0"
    assert [recent.get(number) for number in range(5)] == ["0", None, None, "3", "4"]
