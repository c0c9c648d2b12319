"""Annotations and labels are read as Kubernetes writes them into a pod's files."""

import pytest

from tidegate.errors import InputError
from tidegate.intent.downward import parse


class TestValues:
    def test_are_read_with_their_names(self):
        text = 'app="web"\ntidegate.io/exclude-inbound-ports="9000,9001"\nempty=""\n'
        assert parse(text, "labels") == {
            "app": "web",
            "tidegate.io/exclude-inbound-ports": "9000,9001",
            "empty": "",
        }

    def test_of_several_lines_and_with_quotes_are_as_they_were(self):
        text = r'config="{\"ProxyUserID\":\"5995\"}\n\tnext\\ é=\"x\""' + "\n"
        assert parse(text, "annotations") == {"config": '{"ProxyUserID":"5995"}\n\tnext\\ é="x"'}

    def test_with_characters_that_cannot_be_printed_are_as_they_were(self):
        text = r'a="\u200b\U000e0001\a\b\f\v\r"'
        assert parse(text, "annotations") == {"a": "\u200b\U000e0001\a\b\f\v\r"}

    def test_may_look_like_other_lines(self):
        assert parse('a="b=\\"c\\"\\nd=\\"e\\""', "annotations") == {"a": 'b="c"\nd="e"'}

    def test_of_an_empty_file_are_none(self):
        assert parse("", "labels") == {}


class TestFaults:
    @pytest.mark.parametrize(
        "line", ["web", "app=web", 'app="web', 'app="we"b"', '="web"', 'app="web" ', r'a="\"']
    )
    def test_in_a_line_name_file_and_line(self, line):
        with pytest.raises(InputError) as told:
            parse(f'first="1"\n{line}\n', "/etc/podinfo/labels")
        assert str(told.value).startswith("/etc/podinfo/labels: line 2: ")
        assert "is no annotation or label; expected" in str(told.value)

    @pytest.mark.parametrize("escape", [r"\q", r"\U00110000", r"\xZZ"])
    def test_in_an_escape_name_it(self, escape):
        with pytest.raises(InputError, match="stands for nothing"):
            parse(f'a="{escape}"', "annotations")
