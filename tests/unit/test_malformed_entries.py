"""What is wrong in a file of config entries or service definitions is told in one sentence each, with its line.

A corpus: input, and what is said of it. A message that ends in "one of " goes on with a long list.
"""

# ruff: noqa: E501

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.cli.main import main
from tidegate.errors import InputError, InputErrors
from tidegate.intent.entries import parse_entries
from tidegate.intent.services import parse_services

MESH = 'Kind = "mesh"\n'
PROXY = 'Kind = "proxy-defaults"\nName = "global"\n'
SERVICE = 'Kind = "service-defaults"\nName = "a"\n'
INTENTIONS = 'Kind = "service-intentions"\nName = "a"\n'
YAML = "kind: service-defaults\nname: a\n"
CRD = "apiVersion: consul.hashicorp.com/v1alpha1\n"
WEB = 'service {\n  name = "web"\n  port = 80\n'


def sources(text):
    return f"{INTENTIONS}Sources = [\n{text}\n]\n"


# fmt: off
ENTRIES = [
    # HCL that cannot be read
    ("Kind = mesh", [
        'line 1, column 8: \'mesh\' is not a value; expected true, false or a string in quotes: "mesh"',
    ]),
    ('Kind "mesh"', [
        "line 1, column 12: found the end of the text; expected '=' or '{' after 'mesh'",
    ]),
    ('Kind = "mesh', [
        'line 1, column 8: a string that does not end on its line; expected \'"\'',
    ]),
    ("Kind = 'mesh'", [
        'line 1, column 8: the character "\'"; expected a name, a value or a comment',
    ]),
    ('Kind := "mesh"', [
        "line 1, column 6: the character ':'; expected a name, a value or a comment",
    ]),
    ('Kind == "mesh"', [
        "line 1, column 7: found '='; expected a value",
    ]),
    ('= "mesh"', [
        "line 1, column 1: found '='; expected the name of a field or a block",
    ]),
    ("Kind =", [
        "line 1, column 7: found the end of the text; expected a value",
    ]),
    ("Kind", [
        "line 1, column 5: found the end of the text; expected '=' or '{' after 'Kind'",
    ]),
    ('Kind = "mesh" }', [
        "line 1, column 15: found '}'; expected the name of a field or a block",
    ]),
    (MESH + "TransparentProxy {", [
        "line 2, column 19: found the end of the text; expected '}' for the '{' on line 2",
    ]),
    (MESH + "TransparentProxy {\n  MeshDestinationsOnly = \n}", [
        "line 4, column 1: found '}'; expected a value",
    ]),
    (MESH + "TransparentProxy }", [
        "line 2, column 18: found '}'; expected '=' or '{' after 'TransparentProxy'",
    ]),
    (MESH + "TransparentProxy = {\n MeshDestinationsOnly true }", [
        "line 3, column 28: found '}'; expected '=' or '{' after 'true'",
    ]),
    (MESH + "Meta {\n  a = [1, 2\n}", [
        "line 4, column 1: found '}'; expected ',' or ']' for the '[' on line 3",
    ]),
    (MESH + "Meta = [1 2]", [
        "line 2, column 11: found a number; expected ',' or ']' for the '[' on line 2",
    ]),
    (MESH + "Meta = [,]", [
        "line 2, column 9: found ','; expected a value",
    ]),
    (MESH + "/* open", [
        "line 2, column 1: a comment that does not end; expected '*/'",
    ]),
    (MESH + 'Meta { a = "\\q" }', [
        'line 2, column 13: the escape \'\\\\q\'; expected one like \\n, \\", \\\\ or \\u00e9',
    ]),
    (MESH + 'Meta { a = "\\ud800" }', [
        "line 2, column 13: the character number 0xd800; expected a Unicode character",
    ]),
    (MESH + 'Meta { a = "\\x4" }', [
        'line 2, column 13: the escape \'\\\\x\'; expected one like \\n, \\", \\\\ or \\u00e9',
    ]),
    (MESH + "Meta { a = <<EOF\nx\n}", [
        "line 2, column 12: a heredoc that does not end; expected a line with EOF alone",
    ]),
    (MESH + "Meta { a = << EOF }", [
        "line 2, column 12: the character '<'; expected a value or a heredoc such as <<EOF",
    ]),
    (MESH + "AllowEnablingPermissiveMutualTLS = yes", [
        'line 2, column 36: \'yes\' is not a value; expected true, false or a string in quotes: "yes"',
    ]),
    (MESH + "AllowEnablingPermissiveMutualTLS = True", [
        'line 2, column 36: \'True\' is not a value; expected true, false or a string in quotes: "True"',
    ]),
    (MESH + "AllowEnablingPermissiveMutualTLS = null", [
        'line 2, column 36: \'null\' is not a value; expected true, false or a string in quotes: "null"',
    ]),
    (MESH + "CreateIndex = " + "9" * 40, [
        "line 2, column 15: a number that is too long; expected at most 32 digits",
    ]),
    (MESH + "CreateIndex = 1_000", [
        "line 2, column 20: found the end of the text; expected '=' or '{' after '_000'",
    ]),
    (MESH + "CreateIndex = +1", [
        "line 2, column 15: the character '+'; expected a name, a value or a comment",
    ]),
    (MESH + "@", [
        "line 2, column 1: the character '@'; expected a name, a value or a comment",
    ]),
    (MESH + "Kind: mesh", [
        "line 2, column 5: the character ':'; expected a name, a value or a comment",
    ]),
    (MESH + "---\n" + MESH, [
        "line 2, column 1: the character '-'; expected a name, a value or a comment",
    ]),
    (MESH + "Meta { a = ${x} }", [
        "line 2, column 12: the character '$'; expected a name, a value or a comment",
    ]),
    (MESH + 'Meta { a = file("x") }', [
        'line 2, column 12: \'file\' is not a value; expected true, false or a string in quotes: "file"',
    ]),
    (MESH + "Meta { a b c }", [
        "line 2, column 14: found '}'; expected '=' or '{' after 'c'",
    ]),
    (MESH + "AllowEnablingPermissiveMutualTLS = true false", [
        "line 2, column 46: found the end of the text; expected '=' or '{' after 'false'",
    ]),
    ('Kind = "mesh";', [
        "line 1, column 14: the character ';'; expected a name, a value or a comment",
    ]),
    ("<Kind>mesh</Kind>", [
        "line 1, column 1: the character '<'; expected a value or a heredoc such as <<EOF",
    ]),
    (MESH + 'Meta { a = "x" a = "y" }', [
        "line 2: a: is set twice; expected one value (the first is on line 2)",
    ]),
    (MESH + "\n\nTLS = true\nTLS = false", [
        "line 5: TLS: is set twice; expected one value (the first is on line 4)",
    ]),
    ("\x00", [
        "line 1, column 1: the character '\\x00'; expected a name, a value or a comment",
    ]),
    (MESH + 'Meta { "a\nb" = 1 }', [
        'line 2, column 8: a string that does not end on its line; expected \'"\'',
    ]),
    ('Kind = "mesh" “x”', [
        "line 1, column 15: the character '“'; expected a name, a value or a comment",
    ]),
    # nesting and size in HCL
    ("x = " + "[" * 50000, [
        "line 1, column 37: is nested too deeply; expected at most 32 levels",
    ]),
    ("x { " * 50000, [
        "line 1, column 131: is nested too deeply; expected at most 32 levels",
    ]),
    ("a " * 50000, [
        "line 1, column 67: is nested too deeply; expected at most 32 levels",
    ]),
    ("x = " + "{ x = " * 40, [
        "line 1, column 197: is nested too deeply; expected at most 32 levels",
    ]),
    (MESH + "Meta { " + "a { " * 33 + " } " * 33 + "}", [
        "line 2, column 134: is nested too deeply; expected at most 32 levels",
    ]),
    ("x" * (600 << 10), [
        "614400 characters; expected at most 524288 characters",
    ]),
    (MESH + "# " + "x" * (600 << 10), [
        "614416 characters; expected at most 524288 characters",
    ]),
    # JSON that cannot be read
    ("{", [
        'line 1, column 2: found the end of the text; expected a name in quotes, such as "Kind"',
    ]),
    ("[", [
        "line 1, column 2: found the end of the text; expected a value",
    ]),
    ("{}}", [
        "line 1, column 3: found '}'; expected the end of the text",
    ]),
    ('{"Kind"}', [
        'line 1, column 8: found \'}\'; expected \':\' after "Kind"',
    ]),
    ('{"Kind":}', [
        "line 1, column 9: found '}'; expected a value",
    ]),
    ('{"Kind": "mesh"', [
        "line 1, column 16: found the end of the text; expected ',' or '}' for the '{' on line 1",
    ]),
    ('{"Kind": "mesh",}', [
        'line 1, column 17: found \'}\'; expected a name in quotes, such as "Kind"',
    ]),
    ('{"Kind": "mesh" "Name": "x"}', [
        'line 1, column 17: found \'"\'; expected \',\' or \'}\' for the \'{\' on line 1',
    ]),
    ("{'Kind': 'mesh'}", [
        'line 1, column 2: found "\'"; expected a name in quotes, such as "Kind"',
    ]),
    ('{Kind: "mesh"}', [
        'line 1, column 2: found \'Kind\'; expected a name in quotes, such as "Kind"',
    ]),
    ('{"Kind": mesh}', [
        "line 1, column 10: found 'mesh'; expected a value",
    ]),
    ('{"Kind": "mesh}', [
        "line 1, column 10: unterminated string; expected JSON",
    ]),
    ('{"Kind": "me\nsh"}', [
        "line 1, column 13: invalid control character; expected JSON",
    ]),
    ('{"Kind": "\\q"}', [
        "line 1, column 11: invalid \\escape; expected JSON",
    ]),
    ('{"Kind": "\\u12"}', [
        "line 1, column 12: invalid \\uXXXX escape; expected JSON",
    ]),
    ('{"Kind": NaN}', [
        "line 1, column 10: found 'NaN'; expected a value",
    ]),
    ('{"Kind": Infinity}', [
        "line 1, column 10: found 'Infinity'; expected a value",
    ]),
    ('{"Kind": -}', [
        "line 1, column 10: found '-'; expected a value",
    ]),
    ('{"Kind": 01}', [
        "line 1, column 11: found '1'; expected ',' or '}' for the '{' on line 1",
    ]),
    ('{"Kind": 1.}', [
        "line 1, column 11: found '.'; expected ',' or '}' for the '{' on line 1",
    ]),
    ('{"Kind": .5}', [
        "line 1, column 10: found '.'; expected a value",
    ]),
    ('{"Kind": True}', [
        "line 1, column 10: found 'True'; expected a value",
    ]),
    ('{"Kind": "mesh"} {"Kind": "mesh"}', [
        "line 1, column 18: found '{'; expected the end of the text",
    ]),
    ('{"Kind": "mesh"}\n// done', [
        "line 2, column 1: found '/'; expected the end of the text",
    ]),
    ('{\n  // first\n  "Kind": "mesh"}', [
        'line 2, column 3: found \'/\'; expected a name in quotes, such as "Kind"',
    ]),
    ('{"Kind": "mesh",\n "Kind": "mesh"}', [
        "line 2: Kind: is set twice; expected one value (the first is on line 1)",
    ]),
    ('{"Kind": ' + "9" * 5000 + "}", [
        "line 1, column 10: a number that is too long; expected at most 32 digits",
    ]),
    ('{"Kind": 1e999}', [
        "line 1, column 10: a number that is too large; expected a number up to 1.8e308",
    ]),
    ("[1]", [
        "[0]: is not an object; expected {...}",
    ]),
    ('[{"Kind": "mesh"}, 3]', [
        "[1]: is not an object; expected {...}",
    ]),
    ("[null]", [
        "[0]: is not an object; expected {...}",
    ]),
    ('[[{"Kind": "mesh"}]]', [
        "[0]: is not an object; expected {...}",
    ]),
    ('[{"Kind": "mesh"}, ]', [
        "line 1, column 20: found ']'; expected a value",
    ]),
    ('[{"Kind": "mesh"} {"Kind": "mesh"}]', [
        "line 1, column 19: found '{'; expected ',' or ']' for the '[' on line 1",
    ]),
    ("\x00{}", [
        "line 1, column 1: the character '\\x00'; expected a name, a value or a comment",
    ]),
    ('{"a": "\ud7ff\x01"}', [
        "line 1, column 9: invalid control character; expected JSON",
    ]),
    # nesting and size in JSON
    ("[" * 50000, [
        "line 1, column 33: is nested too deeply; expected at most 32 levels",
    ]),
    ('{"a":' * 50000, [
        "line 1, column 161: is nested too deeply; expected at most 32 levels",
    ]),
    ('[{"a":' * 20 + "1", [
        "line 1, column 97: is nested too deeply; expected at most 32 levels",
    ]),
    ('{"Kind": "mesh", "Meta": ' + "[" * 31 + "1" + "]" * 31 + "}", [
        "line 1: Meta: a list is not an object; expected fields in { }",
    ]),
    ('{"Kind": "' + "x" * (600 << 10) + '"}', [
        "614412 characters; expected at most 524288 characters",
    ]),
    # YAML that cannot be read
    ("kind: mesh\n\tname: x", [
        "line 2, column 1: found a tab character that violates indentation; expected YAML",
    ]),
    ("kind: mesh\n name: x", [
        "line 2, column 6: mapping values are not allowed in this context; expected YAML",
    ]),
    ("kind: [mesh", [
        "line 2, column 1: did not find expected ',' or ']'; expected YAML",
    ]),
    ("kind: {mesh", [
        "line 2, column 1: did not find expected ',' or '}'; expected YAML",
    ]),
    ('kind: "mesh', [
        "line 1, column 12: found unexpected end of stream; expected YAML",
    ]),
    ("kind: 'mesh", [
        "line 1, column 12: found unexpected end of stream; expected YAML",
    ]),
    ("kind: mesh: x", [
        "line 1, column 11: mapping values are not allowed in this context; expected YAML",
    ]),
    ("kind: mesh\nkind: mesh", [
        "line 2: kind: is set twice; expected one value (the first is on line 1)",
    ]),
    ("kind: &a mesh\nname: *a", [
        "line 2, column 7: an alias; expected the value itself",
    ]),
    ("a: *b", [
        "line 1, column 4: an alias; expected the value itself",
    ]),
    ("kind: !!str mesh", [
        "line 1, column 7: the tag tag:yaml.org,2002:str; expected a plain value",
    ]),
    ("kind: !x mesh", [
        "line 1, column 7: the tag !x; expected a plain value",
    ]),
    ("kind: mesh\n? [a]\n: b", [
        "line 2, column 3: a key that is not a name; expected a field name",
    ]),
    ("kind: mesh\n<<: {name: x}", [
        "line 2: <<: is not a field here; expected one of ",
    ]),
    ("kind: @mesh", [
        "line 1, column 7: found character that cannot start any token; expected YAML",
    ]),
    ("kind: `mesh`", [
        "line 1, column 7: found character that cannot start any token; expected YAML",
    ]),
    ("kind: %mesh", [
        "line 1, column 7: found character that cannot start any token; expected YAML",
    ]),
    ("--- mesh", [
        "line 1, column 5: is not a mapping; expected fields such as `kind: ServiceDefaults`",
    ]),
    ("--- [mesh]", [
        "[0]: is not an object; expected {...}",
    ]),
    ("--- 3", [
        "line 1, column 5: is not a mapping; expected fields such as `kind: ServiceDefaults`",
    ]),
    ("kind: mesh\n--- x", [
        "line 2, column 5: is not a mapping; expected fields such as `kind: ServiceDefaults`",
    ]),
    ("%YAML 3.0\n---\nkind: mesh", [
        "line 1, column 1: found incompatible YAML document; expected YAML",
    ]),
    ("kind: mesh\nmeta: {a: 1, a: 2}", [
        "line 2: a: is set twice; expected one value (the first is on line 2)",
    ]),
    ("kind: mesh\n...\n}", [
        "line 3, column 1: did not find expected <document start>; expected YAML",
    ]),
    ('kind: mesh\nmeta: "\\q"', [
        "line 2, column 8: found unknown escape character; expected YAML",
    ]),
    ("kind: mesh\x00", [
        "line 1: the character '\\x00'; expected text that YAML allows",
    ]),
    ("kind: mesh\x07", [
        "line 1: the character '\\x07'; expected text that YAML allows",
    ]),
    ("kind: mesh\nmeta:\n- a\n b", [
        "line 2: Meta: 'a b' is not an object; expected fields in { }",
    ]),
    ("{kind: mesh}", [
        'line 1, column 2: found \'kind\'; expected a name in quotes, such as "Kind"',
    ]),
    # nesting and size in YAML
    ("a: " + "[" * 10000, [
        "line 1, column 36: is nested too deeply; expected at most 32 levels",
    ]),
    ("a: " + "{a: " * 10000, [
        "line 1, column 132: is nested too deeply; expected at most 32 levels",
    ]),
    ("\n".join(" " * i + "a:" for i in range(40)), [
        "line 34, column 34: is nested too deeply; expected at most 32 levels",
    ]),
    ("kind: " + "x" * (600 << 10), [
        "614406 characters; expected at most 524288 characters",
    ]),
    # what is no entry
    ("", [
        'no config entry; expected an entry such as `Kind = "mesh"`',
    ]),
    ("   \n\t", [
        'no config entry; expected an entry such as `Kind = "mesh"`',
    ]),
    ("# only a comment", [
        'no config entry; expected an entry such as `Kind = "mesh"`',
    ]),
    ("{}", [
        'line 1: Payload does not contain a kind/Kind key at the top level; expected such as Kind = "mesh"',
    ]),
    ("[]", [
        'no config entry; expected an entry such as `Kind = "mesh"`',
    ]),
    ("---", [
        'no config entry; expected an entry such as `Kind = "mesh"`',
    ]),
    ("null", [
        "line 1, column 5: found the end of the text; expected '=' or '{' after 'null'",
    ]),
    ("x = 1", [
        'line 1: Payload does not contain a kind/Kind key at the top level; expected such as Kind = "mesh"',
    ]),
    ('Name = "x"', [
        'line 1: Payload does not contain a kind/Kind key at the top level; expected such as Kind = "mesh"',
    ]),
    ("Kind = 3", [
        "line 1: Kind: Kind value in payload is not a string; expected one of mesh, proxy-defaults, service-defaults, service-intentions",
    ]),
    ('Kind = ["mesh"]', [
        "line 1: Kind: Kind value in payload is not a string; expected one of mesh, proxy-defaults, service-defaults, service-intentions",
    ]),
    ("Kind { a = 1 }", [
        "line 1: Kind: Kind value in payload is not a string; expected one of mesh, proxy-defaults, service-defaults, service-intentions",
    ]),
    ('Kind = ""', [
        "line 1: Kind: invalid config entry kind: ''; expected one of mesh, proxy-defaults, service-defaults, service-intentions",
    ]),
    ('Kind = "Mesh"', [
        "line 1: Kind: invalid config entry kind: 'Mesh'; expected mesh",
    ]),
    ('Kind = "mesch"', [
        "line 1: Kind: invalid config entry kind: 'mesch'; expected mesh",
    ]),
    ('Kind = "service-default"', [
        "line 1: Kind: invalid config entry kind: 'service-default'; expected service-defaults",
    ]),
    ('Kind = "proxy_defaults"', [
        "line 1: Kind: invalid config entry kind: 'proxy_defaults'; expected proxy-defaults",
    ]),
    ('Kind = "intentions"', [
        "line 1: Kind: invalid config entry kind: 'intentions'; expected service-intentions",
    ]),
    ('Kind = "service-router"\nName = "a"', [
        "line 1: Kind: kind 'service-router' is not supported: tidegate does nothing with it; expected one of ",
    ]),
    ('Kind = "jwt-provider"', [
        "line 1: Kind: kind 'jwt-provider' is not supported: tidegate does nothing with it; expected one of ",
    ]),
    ("kind: ServiceDefaults\nname: a", [
        "line 1: Kind: invalid config entry kind: 'ServiceDefaults'; expected service-defaults",
    ]),
    ('{"kind": null}', [
        "line 1: Kind: Kind value in payload is not a string; expected one of mesh, proxy-defaults, service-defaults, service-intentions",
    ]),
    ('{"Kind": {"a": 1}}', [
        "line 1: Kind: Kind value in payload is not a string; expected one of mesh, proxy-defaults, service-defaults, service-intentions",
    ]),
    ('{"Kind": "service-resolver", "Name": "a"}', [
        "line 1: Kind: kind 'service-resolver' is not supported: tidegate does nothing with it; expected one of ",
    ]),
    ('Kind = "mesh"\nkind = "mesh"\nkIND = "mesh"\nName = "x"', [
        'line 4: Name: invalid name (\'x\'); expected "mesh"',
    ]),
    ('{"Kind":"mesh","kind":"mesh"}', [
        "line 1: Kind: is set twice, as Kind and as kind; expected one value",
    ]),
    # names
    ('Kind = "service-defaults"', [
        "line 1: Name: is missing; expected a service name",
    ]),
    ('Kind = "service-defaults"\nName = ""', [
        "line 2: Name: '' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "*"', [
        "line 2: Name: '*' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "A"', [
        "line 2: Name: 'A' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "a_b"', [
        "line 2: Name: 'a_b' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "-a"', [
        "line 2: Name: '-a' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "a."', [
        "line 2: Name: 'a.' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "a/b"', [
        "line 2: Name: 'a/b' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "' + "a" * 64 + '"', [
        "line 2: Name: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = "bücher"', [
        "line 2: Name: 'bücher' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "service-defaults"\nName = true', [
        "line 2: Name: true is not text; expected a string in quotes",
    ]),
    ('Kind = "service-defaults"\nName = ["a", "b"]', [
        "line 2: Name: a list is not text; expected a string in quotes",
    ]),
    ('Kind = "service-defaults"\nName = "a\\n"', [
        "line 2: Name: 'a\\n' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('Kind = "proxy-defaults"', [
        'line 1: Name: is missing; expected "global"',
    ]),
    ('Kind = "proxy-defaults"\nName = "Global"', [
        'line 2: Name: invalid name (\'Global\'); expected "global"',
    ]),
    ('Kind = "proxy-defaults"\nName = "web"', [
        'line 2: Name: invalid name (\'web\'); expected "global"',
    ]),
    ('Kind = "mesh"\nName = "global"', [
        'line 2: Name: invalid name (\'global\'); expected "mesh"',
    ]),
    (SERVICE + 'Namespace = "*"', [
        "line 3: Namespace: '*' is not a name of a namespace or partition; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    (SERVICE + 'Namespace = "a b"', [
        "line 3: Namespace: 'a b' is not a name of a namespace or partition; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    (SERVICE + 'Partition = "*"', [
        "line 3: Partition: '*' is not a name of a namespace or partition; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    (SERVICE + "Partition = 3.5", [
        "line 3: Partition: '3.5' is not a name of a namespace or partition; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    (MESH + 'Namespace = "x"', [
        'line 2: Namespace: \'x\' is not possible for what holds for a whole partition; expected "default" or nothing',
    ]),
    (PROXY + 'Namespace = "billing"', [
        'line 3: Namespace: \'billing\' is not possible for what holds for a whole partition; expected "default" or nothing',
    ]),
    (SERVICE + 'name = "b"', [
        "line 3: Name: is set twice, as Name and as name; expected one value",
    ]),
    (SERVICE + 'NameSpace = "x"\nnamespace = "y"', [
        "line 4: Namespace: is set twice, as NameSpace and as namespace; expected one value",
    ]),
    ('Kind = "service-intentions"', [
        'line 1: Name: is missing; expected a service name or "*"',
        "line 1: Sources: is missing; expected at least one source",
    ]),
    ('Kind = "service-intentions"\nName = "a*"', [
        'line 2: Name: \'a*\' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end, or "*" alone',
    ]),
    ('Kind = "service-intentions"\nName = "a"\nNamespace = "*"\nSources { Name = "b" Action = "allow" }', [
        'line 2: Name: a is one service, and Namespace is "*"; expected Name "*", or one namespace',
    ]),
    # keys
    (SERVICE + 'MutualTLS = "strict"', [
        "line 3: MutualTLS: is not a field here; expected MutualTLSMode",
    ]),
    (SERVICE + 'MutualTLSModes = "strict"', [
        "line 3: MutualTLSModes: is not a field here; expected MutualTLSMode",
    ]),
    (SERVICE + 'mutual_tls_mod = "strict"', [
        "line 3: mutual_tls_mod: is not a field here; expected MutualTLSMode",
    ]),
    (SERVICE + 'Protokoll = "http"', [
        "line 3: Protokoll: is not a field here; expected Protocol",
    ]),
    (SERVICE + "x = 1", [
        "line 3: x: is not a field here; expected one of ",
    ]),
    (SERVICE + 'Sources { Name = "b" Action = "allow" }', [
        "line 3: Sources: is not a field here; expected one of ",
    ]),
    (SERVICE + "AllowEnablingPermissiveMutualTLS = true", [
        "line 3: AllowEnablingPermissiveMutualTLS: is not a field here; expected one of ",
    ]),
    (MESH + 'MutualTLSMode = "permissive"', [
        "line 2: MutualTLSMode: is not a field here; expected one of ",
    ]),
    (MESH + "AllowEnablingPermissiveMTLS = true", [
        "line 2: AllowEnablingPermissiveMTLS: is not a field here; expected AllowEnablingPermissiveMutualTLS",
    ]),
    (MESH + "TransparentProxy { MeshDestinationOnly = true }", [
        "line 2: TransparentProxy.MeshDestinationOnly: is not a field here; expected MeshDestinationsOnly",
    ]),
    (MESH + "TransparentProxy { OutboundListenerPort = 15001 }", [
        "line 2: TransparentProxy.OutboundListenerPort: is not a field here; expected MeshDestinationsOnly",
    ]),
    (SERVICE + "TransparentProxy {\n  OutboundPort = 15001\n}", [
        "line 4: TransparentProxy.OutboundPort: is not a field here; expected OutboundListenerPort",
    ]),
    (MESH + 'TLS { Incomming { TLSMinVersion = "TLSv1_2" } }', [
        "line 2: TLS.Incomming: is not a field here; expected Incoming",
    ]),
    (MESH + 'TLS { Incoming { MinVersion = "TLSv1_2" } }', [
        "line 2: TLS.Incoming.MinVersion: is not a field here; expected TLSMinVersion",
    ]),
    (PROXY + "Defaults { }", [
        "line 3: Defaults: is not a field here; expected one of ",
    ]),
    (PROXY + "AccessLog { Enabled = true }", [
        "line 3: AccessLog: is not a field here; expected AccessLogs",
    ]),
    (SERVICE + 'UpstreamConfig { Default { Protocol = "http" } }', [
        "line 3: UpstreamConfig.Default: is not a field here; expected Defaults",
    ]),
    (SERVICE + 'UpstreamConfig {\n  Overrides = [{\n    Name = "b"\n    Timeout = 3\n  }]\n}', [
        "line 6: UpstreamConfig.Overrides[0].Timeout: is not a field here; expected ConnectTimeoutMs",
    ]),
    (SERVICE + 'MeshGateway { Modus = "local" }', [
        "line 3: MeshGateway.Modus: is not a field here; expected Mode",
    ]),
    (SERVICE + 'Expose { Path = "/" }', [
        "line 3: Expose.Path: is not a field here; expected Paths",
    ]),
    ('{"Kind": "service-defaults",\n "Name": "a",\n "MutualTlsMode": "strict",\n "MutualTls": "strict"}', [
        "line 4: MutualTls: is not a field here; expected MutualTLSMode",
    ]),
    (YAML + "mutual_tls: strict", [
        "line 3: mutual_tls: is not a field here; expected MutualTLSMode",
    ]),
    (SERVICE + 'MutualTLSMode = "strict"\nmutual_tls_mode = "strict"', [
        "line 4: MutualTLSMode: is set twice, as MutualTLSMode and as mutual_tls_mode; expected one value",
    ]),
    (SERVICE + "Meta {}\nmeta = {}", [
        "line 4: Meta: is set twice, as Meta and as meta; expected one value",
    ]),
    # values
    (SERVICE + 'MutualTLSMode = "loose"', [
        'line 3: MutualTLSMode: Invalid MutualTLSMode "loose". Must be one of "", "strict", or "permissive".',
    ]),
    (SERVICE + 'MutualTLSMode = "Strict"', [
        'line 3: MutualTLSMode: Invalid MutualTLSMode "Strict". Must be one of "", "strict", or "permissive".',
    ]),
    (SERVICE + "MutualTLSMode = true", [
        'line 3: MutualTLSMode: Invalid MutualTLSMode "true". Must be one of "", "strict", or "permissive".',
    ]),
    (SERVICE + 'MutualTLSMode = ["strict", "permissive"]', [
        'line 3: MutualTLSMode: Invalid MutualTLSMode "a list". Must be one of "", "strict", or "permissive".',
    ]),
    (SERVICE + 'Protocol = "htp"', [
        "line 3: Protocol: 'htp' is not known here; expected http",
    ]),
    (SERVICE + 'Protocol = "udp"', [
        "line 3: Protocol: 'udp' is not known here; expected one of tcp, http, http2, grpc",
    ]),
    (SERVICE + "Protocol = 6", [
        "line 3: Protocol: '6' is not known here; expected one of tcp, http, http2, grpc",
    ]),
    (SERVICE + 'Mode = "direct"', [
        "line 3: Mode: 'direct' is not supported: tidegate redirects the traffic of every meshed workload; expected transparent",
    ]),
    (SERVICE + 'Mode = "tproxy"', [
        "line 3: Mode: 'tproxy' is not known here; expected transparent",
    ]),
    (SERVICE + 'TransparentProxy = "transparent"', [
        "line 3: TransparentProxy: 'transparent' is not an object; expected fields in { }",
    ]),
    (SERVICE + "TransparentProxy { OutboundListenerPort = 70000 }", [
        "line 3: TransparentProxy.OutboundListenerPort: 70000 is out of range; expected a whole number from 0 to 65535",
    ]),
    (SERVICE + "TransparentProxy { OutboundListenerPort = -1 }", [
        "line 3: TransparentProxy.OutboundListenerPort: -1 is out of range; expected a whole number from 0 to 65535",
    ]),
    (SERVICE + 'TransparentProxy { OutboundListenerPort = "http" }', [
        "line 3: TransparentProxy.OutboundListenerPort: 'http' is not a whole number; expected a whole number from 0 to 65535",
    ]),
    (SERVICE + "TransparentProxy { OutboundListenerPort = 1.5 }", [
        "line 3: TransparentProxy.OutboundListenerPort: 1.5 is not a whole number; expected a whole number from 0 to 65535",
    ]),
    (SERVICE + 'TransparentProxy { DialedDirectly = "maybe" }', [
        "line 3: TransparentProxy.DialedDirectly: 'maybe' is not a bool; expected true or false",
    ]),
    (SERVICE + "TransparentProxy { DialedDirectly = 2 }", [
        "line 3: TransparentProxy.DialedDirectly: 2 is not a bool; expected true or false",
    ]),
    (SERVICE + "TransparentProxy {}\nTransparentProxy {}", [
        "line 3: TransparentProxy: a list is not an object; expected fields in { }",
    ]),
    (MESH + 'AllowEnablingPermissiveMutualTLS = "ja"', [
        "line 2: AllowEnablingPermissiveMutualTLS: 'ja' is not a bool; expected true or false",
    ]),
    (MESH + "AllowEnablingPermissiveMutualTLS = [true, false]", [
        "line 2: AllowEnablingPermissiveMutualTLS: a list is not a bool; expected true or false",
    ]),
    (MESH + "TransparentProxy = [{ MeshDestinationsOnly = true }, {}]", [
        "line 2: TransparentProxy: a list is not an object; expected fields in { }",
    ]),
    (MESH + "TransparentProxy { MeshDestinationsOnly = 0.5 }", [
        "line 2: TransparentProxy.MeshDestinationsOnly: 0.5 is not a bool; expected true or false",
    ]),
    (MESH + 'TLS = "TLSv1_2"', [
        "line 2: TLS: 'TLSv1_2' is not an object; expected fields in { }",
    ]),
    (MESH + 'TLS { Incoming { TLSMinVersion = "1.2" } }', [
        "line 2: TLS.Incoming.TLSMinVersion: '1.2' is not known here; expected one of TLSv1_0, TLSv1_1, TLSv1_2, TLSv1_3, TLS_AUTO",
    ]),
    (MESH + 'TLS { Outgoing { TLSMaxVersion = "TLSv1_4" } }', [
        "line 2: TLS.Outgoing.TLSMaxVersion: 'TLSv1_4' is not known here; expected TLSv1_3",
    ]),
    (MESH + 'TLS { Incoming { CipherSuites = ["x"] } }', [
        "line 2: TLS.Incoming.CipherSuites[0]: 'x' is not known here; expected one of ",
    ]),
    (MESH + 'TLS { Incoming { CipherSuites = ["TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA265"] } }', [
        "line 2: TLS.Incoming.CipherSuites[0]: 'TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA265' is not known here; expected TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    ]),
    (MESH + "CreateIndex = -1", [
        "line 2: CreateIndex: -1 is out of range; expected a whole number from 0 to 9223372036854775807",
    ]),
    (MESH + 'ModifyIndex = "9223372036854775808"', [
        "line 2: ModifyIndex: 9223372036854775808 is out of range; expected a whole number from 0 to 9223372036854775807",
    ]),
    (MESH + 'Meta = "x"', [
        "line 2: Meta: 'x' is not an object; expected fields in { }",
    ]),
    (MESH + "Meta { a = { b = 1 } }", [
        "line 2: Meta.a: an object is not text; expected a string in quotes",
    ]),
    (MESH + "Meta { a = [1] }", [
        "line 2: Meta.a: a list is not text; expected a string in quotes",
    ]),
    (MESH + 'Meta { "" = "x" }', [
        'line 2: Meta."": a bad key; expected 1 to 128 characters',
    ]),
    (MESH + 'Meta { a = "' + "x" * 513 + '" }', [
        "line 2: Meta.a: a value that is too long; expected at most 512 characters",
    ]),
    (MESH + "Meta { " + " ".join(f"k{i} = 1" for i in range(65)) + " }", [
        "line 2: Meta: 65 pairs; expected at most 64",
    ]),
    (SERVICE + 'LocalConnectTimeoutMs = "10s"', [
        "line 3: LocalConnectTimeoutMs: '10s' is not a whole number; expected a whole number from 0 to 2147483647",
    ]),
    (SERVICE + "LocalRequestTimeoutMs = -5", [
        "line 3: LocalRequestTimeoutMs: -5 is out of range; expected a whole number from 0 to 2147483647",
    ]),
    (SERVICE + 'BalanceInboundConnections = "even"', [
        "line 3: BalanceInboundConnections: 'even' is not known here; expected exact_balance",
    ]),
    (SERVICE + 'MeshGateway { Mode = "far" }', [
        "line 3: MeshGateway.Mode: 'far' is not known here; expected one of none, local, remote",
    ]),
    (SERVICE + 'UpstreamConfig { Defaults { PassiveHealthCheck { Interval = "soon" } } }', [
        'line 3: UpstreamConfig.Defaults.PassiveHealthCheck.Interval: \'soon\' is not a duration; expected one such as "10s"',
    ]),
    (SERVICE + "UpstreamConfig { Defaults { PassiveHealthCheck { EnforcingConsecutive5xx = 101 } } }", [
        "line 3: UpstreamConfig.Defaults.PassiveHealthCheck.EnforcingConsecutive5xx: 101 is out of range; expected a whole number from 0 to 100",
    ]),
    (SERVICE + "UpstreamConfig { Defaults { ConnectTimeoutMs = true } }", [
        "line 3: UpstreamConfig.Defaults.ConnectTimeoutMs: true is not a whole number; expected a whole number from 0 to 2147483647",
    ]),
    (PROXY + 'Config = "x"', [
        "line 3: Config: 'x' is not an object; expected fields in { }",
    ]),
    (PROXY + 'PrioritizeByLocality { Mode = "nearest" }', [
        "line 3: PrioritizeByLocality.Mode: 'nearest' is not known here; expected one of none, failover",
    ]),
    (PROXY + 'FailoverPolicy { Mode = "random" }', [
        "line 3: FailoverPolicy.Mode: 'random' is not known here; expected one of sequential, order-by-locality",
    ]),
    ('{"Kind": "mesh", "Meta": {"a": "\\ud800"}}', [
        "line 1: Meta.a: a lone surrogate in the text; expected Unicode text",
    ]),
    ('{"Kind": "mesh", "Meta": {"\\ud800": "a"}}', [
        "line 1: Meta.'\\ud800': a bad key; expected 1 to 128 characters",
    ]),
    (YAML + "mutualTLSMode: off", [
        'line 3: MutualTLSMode: Invalid MutualTLSMode "off". Must be one of "", "strict", or "permissive".',
    ]),
    (YAML + "transparentProxy: [1, 2]", [
        "line 3: TransparentProxy: a list is not an object; expected fields in { }",
    ]),
    (YAML + "protocol: {}", [
        "line 3: Protocol: 'an object' is not known here; expected one of tcp, http, http2, grpc",
    ]),
    (PROXY + 'AccessLogs { Enabled = "please" }', [
        "line 3: AccessLogs.Enabled: 'please' is not a bool; expected true or false",
    ]),
    # contradictions
    (MESH + 'TLS { Incoming { TLSMinVersion = "TLSv1_3" TLSMaxVersion = "TLSv1_2" } }', [
        "line 2: TLS.Incoming.TLSMaxVersion: TLSv1_2 is less than TLSMinVersion TLSv1_3; expected TLSv1_3 or higher",
    ]),
    (MESH + 'TLS {\n  Outgoing {\n    TLSMinVersion = "TLSv1_3"\n    CipherSuites = ["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"]\n  }\n}', [
        "line 5: TLS.Outgoing.CipherSuites: cannot be chosen for TLS 1.3; expected TLSMinVersion of TLSv1_2 or lower",
    ]),
    (sources('{ Name = "b" Action = "allow" },\n{ Name = "b" Action = "deny" }'), [
        "line 5: Sources[1].Name: b is there twice; expected one action for each source",
    ]),
    (sources('{ Name = "b" Action = "allow" },\n{ Name = "b" Namespace = "default" Action = "deny" }'), [
        "line 5: Sources[1].Name: b is there twice; expected one action for each source",
    ]),
    (sources('{ Name = "b" Namespace = "*" Action = "deny" }'), [
        'line 4: Sources[0].Name: b is one service, and Namespace is "*"; expected Name "*", or one namespace',
    ]),
    ('Kind = "service-intentions"\nName = "*"\nNamespace = "*"\nSources = [{ Name = "*" Action = "deny" },\n{ Name = "*" Namespace = "default" Action = "allow" }]', [
        "line 5: Sources[1].Name: * is there twice; expected one action for each source",
    ]),
    # intentions
    (INTENTIONS, [
        "line 1: Sources: is missing; expected at least one source",
    ]),
    (INTENTIONS + "Sources = []", [
        "line 3: Sources: is empty; expected at least one source",
    ]),
    (INTENTIONS + "Sources = 3", [
        "line 3: Sources[0]: 3 is not an object; expected fields in { }",
    ]),
    (INTENTIONS + 'Sources = "b"', [
        "line 3: Sources[0]: 'b' is not an object; expected fields in { }",
    ]),
    (INTENTIONS + "Sources { }", [
        'line 3: Sources[0].Name: is missing; expected a service name or "*"',
        'line 3: Sources[0].Action: is missing; expected "allow" or "deny"',
    ]),
    (INTENTIONS + 'Sources { Action = "deny" }', [
        'line 3: Sources[0].Name: is missing; expected a service name or "*"',
    ]),
    (INTENTIONS + 'Sources { Name = "b" }', [
        'line 3: Sources[0].Action: is missing; expected "allow" or "deny"',
    ]),
    (sources('{ Name = "b" Action = "allow" },\n{ Name = "c" }'), [
        'line 5: Sources[1].Action: is missing; expected "allow" or "deny"',
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "permit" }', [
        'line 3: Sources[0].Action: Invalid Action "permit". Must be "allow" or "deny".',
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "Allow" }', [
        'line 3: Sources[0].Action: Invalid Action "Allow". Must be "allow" or "deny".',
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = true }', [
        'line 3: Sources[0].Action: Invalid Action "true". Must be "allow" or "deny".',
    ]),
    (INTENTIONS + 'Sources { Name = "b*" Action = "deny" }', [
        'line 3: Sources[0].Name: \'b*\' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end, or "*" alone',
    ]),
    (INTENTIONS + 'Sources { Name = "B" Action = "deny" }', [
        'line 3: Sources[0].Name: \'B\' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end, or "*" alone',
    ]),
    (INTENTIONS + 'Sources { Name = "b" Acton = "deny" }', [
        "line 3: Sources[0].Acton: is not a field here; expected Action",
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "deny" Partition = "*" }', [
        "line 3: Sources[0].Partition: '*' is not a name of a namespace or partition; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "deny" Type = "external-uri" }', [
        "line 3: Sources[0].Type: 'external-uri' is not known here; expected consul",
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "deny" Precedence = 10 }', [
        "line 3: Sources[0].Precedence: 10 is out of range; expected a whole number from 0 to 9",
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "deny" Description = { a = 1 } }', [
        "line 3: Sources[0].Description: an object is not text; expected a string in quotes",
    ]),
    (INTENTIONS + 'Source { Name = "b" Action = "deny" }', [
        "line 3: Source: is not a field here; expected Sources",
    ]),
    ('{"Kind": "service-intentions", "Name": "a", "Sources": [\n  {"Name": "b", "Action": "allow"},\n  {"Name": "c", "Aktion": "allow"}\n]}', [
        "line 3: Sources[1].Aktion: is not a field here; expected Action",
    ]),
    ("kind: service-intentions\nname: a\nsources:\n- name: b\n  action: allow\n- name: c\n  action: maybe\n", [
        'line 7: Sources[1].Action: Invalid Action "maybe". Must be "allow" or "deny".',
    ]),
    ("kind: service-intentions\nname: a\nsources:\n- b\n", [
        "line 3: Sources[0]: 'b' is not an object; expected fields in { }",
    ]),
    # what Consul has and tidegate cannot keep silently
    (INTENTIONS + 'Sources { Name = "b" Permissions = [{ Action = "allow" HTTP { PathPrefix = "/" } }] }', [
        "line 3: Sources[0].Permissions: is not supported: tidegate's sidecars do not look into HTTP; expected it left out",
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "allow" Peer = "other" }', [
        "line 3: Sources[0].Peer: is not supported: tidegate knows no other clusters; expected it left out",
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "allow" SamenessGroup = "all" }', [
        "line 3: Sources[0].SamenessGroup: is not supported: tidegate knows no other clusters; expected it left out",
    ]),
    (INTENTIONS + 'Sources { Name = "b" Action = "allow" }\nJWT { Providers = [{ Name = "x" }] }', [
        "line 4: JWT: is not supported: tidegate's sidecars do not look into HTTP; expected it left out",
    ]),
    (SERVICE + "Expose { Checks = true }", [
        "line 3: Expose.Checks: is not supported: tidegate opens no listeners for checks; its annotation direct-probes lets probes through; expected it left out",
    ]),
    (SERVICE + 'Expose {\n  Paths = [{ Path = "/health" LocalPathPort = 80 ListenerPort = 21500 }]\n}', [
        "line 4: Expose.Paths: is not supported: tidegate opens no listeners for paths; its annotation direct-probes lets probes through; expected it left out",
    ]),
    (SERVICE + 'ExternalSNI = "x.example.com"', [
        "line 3: ExternalSNI: is not supported: tidegate's sidecars call services by the names of their mesh; expected it left out",
    ]),
    (SERVICE + 'Destination { Addresses = ["example.com"] Port = 443 }', [
        "line 3: Destination: is not supported: what is outside the mesh is reached directly, or not at all with MeshDestinationsOnly; expected it left out",
    ]),
    (SERVICE + "MaxInboundConnections = 10", [
        "line 3: MaxInboundConnections: is not supported: tidegate's sidecars count no connections, so the limit would not hold; expected it left out",
    ]),
    (SERVICE + "RateLimits { InstanceLevel { RequestsPerSecond = 1 } }", [
        "line 3: RateLimits: is not supported: tidegate's sidecars count no connections, so the limit would not hold; expected it left out",
    ]),
    (SERVICE + 'EnvoyExtensions = [{ Name = "builtin/lua" }]', [
        "line 3: EnvoyExtensions: is not supported: tidegate's sidecars have no extensions; expected it left out",
    ]),
    (SERVICE + "UpstreamConfig { Defaults { Limits { MaxConnections = 3 } } }", [
        "line 3: UpstreamConfig.Defaults.Limits: is not supported: tidegate's sidecars count no connections, so the limit would not hold; expected it left out",
    ]),
    (SERVICE + 'UpstreamConfig { Overrides = [{ Name = "b" EnvoyClusterJSON = "{}" }] }', [
        "line 3: UpstreamConfig.Overrides[0].EnvoyClusterJSON: is not supported: tidegate writes the sidecar's configuration whole; expected it left out",
    ]),
    (PROXY + 'EnvoyExtensions = [{ Name = "builtin/lua" }]', [
        "line 3: EnvoyExtensions: is not supported: tidegate's sidecars have no extensions; expected it left out",
    ]),
    (PROXY + 'Config { envoy_public_listener_json = "{}" }', [
        "line 3: Config.envoy_public_listener_json: is not supported: tidegate writes the sidecar's configuration whole; expected it left out",
    ]),
    (PROXY + 'AccessLogs { Enabled = true Type = "file" Path = "/x" }', [
        "line 3: AccessLogs.Type: is not supported: tidegate's sidecars log plaintext connections to a file of their own; expected it left out",
        "line 3: AccessLogs.Path: is not supported: tidegate's sidecars log plaintext connections to a file of their own; expected it left out",
    ]),
    (MESH + "HTTP { SanitizeXForwardedClientCert = true }", [
        "line 2: HTTP: is not supported: tidegate's sidecars do not look into HTTP; expected it left out",
    ]),
    # custom resources
    (CRD + "kind: Mesh\nmetadata: {name: mesh}\nspec: {meshDestinationsOnly: true}", [
        "line 4: meshDestinationsOnly: is not a field here; expected one of ",
    ]),
    (CRD + "kind: Meshh\nmetadata: {name: mesh}", [
        "line 2: kind: invalid config entry kind: 'Meshh'; expected Mesh",
    ]),
    (CRD + "kind: mesh\nmetadata: {name: mesh}", [
        "line 2: kind: invalid config entry kind: 'mesh'; expected Mesh",
    ]),
    (CRD + "kind: ServiceRouter\nmetadata: {name: a}", [
        "line 2: kind: kind 'ServiceRouter' is not supported: tidegate does nothing with it; expected one of ",
    ]),
    (CRD + "metadata: {name: a}", [
        "line 1: kind: Kind value in payload is not a string; expected one of Mesh, ProxyDefaults, ServiceDefaults, ServiceIntentions",
    ]),
    ("apiVersion: v1\nkind: ServiceDefaults\nmetadata: {name: a}", [
        "line 1: apiVersion: 'v1' is not known; expected consul.hashicorp.com/v1alpha1",
    ]),
    ("apiVersion: consul.hashicorp.com/v2\nkind: ServiceDefaults\nmetadata: {name: a}", [
        "line 1: apiVersion: 'consul.hashicorp.com/v2' is not known; expected consul.hashicorp.com/v1alpha1",
    ]),
    ("apiversion: consul.hashicorp.com/v1alpha1\nkind: ServiceDefaults\nmetadata: {name: a}", [
        "line 1: apiversion: is not a field here; expected apiVersion, kind, metadata, spec",
    ]),
    (CRD + "kind: ServiceDefaults\nspec: {}", [
        "line 1: Name: is missing; expected a service name",
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: {}\nspec: {}", [
        "line 1: Name: is missing; expected a service name",
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: a", [
        "line 3: metadata: 'a' is not an object; expected fields in { }",
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: {name: a}\nspec: permissive", [
        "line 4: spec: 'permissive' is not an object; expected fields in { }",
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: {name: a}\nspecs: {}", [
        "line 4: specs: is not a field here; expected apiVersion, kind, metadata, spec",
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: {name: a}\nspec:\n  mutualTlsMod: strict", [
        "line 5: mutualTlsMod: is not a field here; expected MutualTLSMode",
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: {name: a}\nspec:\n  mutualTLSMode: none", [
        'line 5: MutualTLSMode: Invalid MutualTLSMode "none". Must be one of "", "strict", or "permissive".',
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: {name: A}\nspec: {}", [
        "line 3: Name: 'A' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    (CRD + "kind: ProxyDefaults\nmetadata: {name: proxy}\nspec: {}", [
        'line 3: Name: invalid name (\'proxy\'); expected "global"',
    ]),
    (CRD + "kind: ServiceIntentions\nmetadata: {name: a}\nspec:\n  sources:\n  - {name: b, action: allow}", [
        'line 1: Name: is missing; expected a service name or "*"',
    ]),
    (CRD + "kind: ServiceIntentions\nmetadata: {name: a}\nspec:\n  destination: {name: a, port: 80}\n  sources:\n  - {name: b, action: allow}", [
        "line 5: spec.destination.port: is not a field here; expected name, namespace",
    ]),
    (CRD + "kind: ServiceIntentions\nmetadata: {name: a}\nspec:\n  destination: a", [
        "line 5: spec.destination: 'a' is not an object; expected fields in { }",
    ]),
    (CRD + "kind: ServiceIntentions\nmetadata: {name: a}\nspec:\n  destination: {name: a}\n  sources:\n  - name: b\n    action: allow\n    permissions: [{action: allow}]", [
        "line 9: Sources[0].Permissions: is not supported: tidegate's sidecars do not look into HTTP; expected it left out",
    ]),
    (CRD + "kind: ServiceDefaults\nmetadata: {name: a}\nspec: {name: b, destination: {port: 3}}", [
        "line 4: Destination: is not supported: what is outside the mesh is reached directly, or not at all with MeshDestinationsOnly; expected it left out",
        "line 3: Name: is set twice, as name and as Name; expected one value",
    ]),
    ("apiVersion: v1\nkind: List\nitems:\n- 3", [
        "line 3: items: is not a field here; expected apiVersion, kind, metadata, spec",
        "line 1: apiVersion: 'v1' is not known; expected consul.hashicorp.com/v1alpha1",
        "line 2: kind: invalid config entry kind: 'List'; expected one of Mesh, ProxyDefaults, ServiceDefaults, ServiceIntentions",
    ]),
    ("apiVersion: v1\nkind: List\nitems:\n- kind: mesh\n- kind: mash", [
        "line 5: Kind: invalid config entry kind: 'mash'; expected mesh",
    ]),
    # several entries in one file
    (MESH + SERVICE + "x = 1\n" + MESH, [
        "line 4: x: is not a field here; expected one of ",
    ]),
    (MESH + 'Kind = "service-defaults"\n\n' + SERVICE, [
        "line 2: Name: is missing; expected a service name",
    ]),
    ("kind: mesh\n---\nkind: service-defaults\n", [
        "line 3: Name: is missing; expected a service name",
    ]),
    ('[{"Kind": "mesh"},\n{"Kind": "service-defaults"},\n{"Kind": "x"}]', [
        "line 2: Name: is missing; expected a service name",
        "line 3: Kind: invalid config entry kind: 'x'; expected one of mesh, proxy-defaults, service-defaults, service-intentions",
    ]),
    ("- kind: mesh\n- kind: service-defaults\n  nme: a\n", [
        "line 3: nme: is not a field here; expected Name",
    ]),
    ("kind: mesh\n---\n- 3\n", [
        "[0]: is not an object; expected {...}",
    ]),
    (MESH + "x = 1\n" + 'Kind = "msh"\n', [
        "line 2: x: is not a field here; expected one of ",
        "line 3: Kind: invalid config entry kind: 'msh'; expected mesh",
    ]),
]

SERVICES = [
    # service definitions
    ("service {}", [
        "line 1: service.Name: is missing; expected a service name",
    ]),
    ('service { name = "" }', [
        "line 1: service.Name: '' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('service { name = "Web" }', [
        "line 1: service.Name: 'Web' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('service { name = "web" port = 70000 }', [
        "line 1: service.Port: 70000 is out of range; expected a whole number from 0 to 65535",
    ]),
    ('service { name = "web" port = "http" }', [
        "line 1: service.Port: 'http' is not a whole number; expected a whole number from 0 to 65535",
    ]),
    ('service { name = "web" prt = 80 }', [
        "line 1: service.prt: is not a field here; expected Port",
    ]),
    ('service { name = "web" socket_path = "/run/web" }', [
        "line 1: service.SocketPath: is not supported: only TCP can be redirected, no unix socket; expected it left out",
    ]),
    ('service { name = "web" ports = [{ name = "a" port = 80 }] }', [
        "line 1: service.Ports: is not supported: a service has one port; a definition for each port makes several services; expected it left out",
    ]),
    ('service { kind = "mesh-gateway" name = "gw" }', [
        "line 1: service.Kind: 'mesh-gateway' is not supported: tidegate runs no gateways; expected connect-proxy",
    ]),
    ('service { kind = "proxy" name = "gw" }', [
        "line 1: service.Kind: 'proxy' is not known here; expected connect-proxy",
    ]),
    ('service { name = "web" tags = [["a"]] }', [
        "line 1: service.Tags[0]: a list is not text; expected a string in quotes",
    ]),
    ('service { name = "web" meta { a = {} } }', [
        "line 1: service.Meta.a: an object is not text; expected a string in quotes",
    ]),
    ('service { name = "web" namespace = "*" }', [
        "line 1: service.Namespace: '*' is not a name of a namespace or partition; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    ('service { name = "web" tagged_addresses { virtual = "10.1.2.3" } }', [
        "line 1: service.TaggedAddresses.virtual: '10.1.2.3' is not an object; expected fields in { }",
    ]),
    ('service { name = "web" tagged_addresses { virtual { address = "web.example" } } }', [
        "line 1: service.TaggedAddresses.virtual.Address: 'web.example' is not an address; expected such as 10.1.2.3 or fd00::1",
    ]),
    ('service { name = "web" tagged_addresses { virtual { port = 80 } } }', [
        "line 1: service.TaggedAddresses.virtual.Address: is missing; expected an IP address",
    ]),
    ('service = "web"', [
        "line 1: service: 'web' is not an object; expected fields in { }",
    ]),
    ("services = []", [
        'no service definition; expected one such as `service { name = "web" port = 80 }`',
    ]),
    ('services = [{ name = "a" }, 3]', [
        "line 1: services[1]: 3 is not an object; expected fields in { }",
    ]),
    ('services {\n  name = "a"\n}\nservices {\n  name = "a"\n}', [
        "line 4: services[1].ID: a is there twice; expected an ID for each (the first is on line 1)",
    ]),
    ('service { name = "a" }\nx = 1', [
        "line 2: x: is not a field here; expected service or services",
    ]),
    ('Kind = "mesh"\nservice { name = "a" }', [
        "line 1: Kind: is not a field here; expected service or services",
    ]),
    ('{"service": {"name": "web", "port": 80,\n  "conect": {}}}', [
        "line 2: service.conect: is not a field here; expected Connect",
    ]),
    ("service:\n  name: web\n  port: eighty\n", [
        "line 3: service.Port: 'eighty' is not a whole number; expected a whole number from 0 to 65535",
    ]),
    ('[{"Name": "a"}, {"Name": "a"}]', [
        "line 1: ID: a is there twice; expected an ID for each (the first is on line 1)",
    ]),
    ('name = "web"\nport = -1', [
        "line 2: Port: -1 is out of range; expected a whole number from 0 to 65535",
    ]),
    ('service { name = "a" check = "http" }', [
        "line 1: service.Check: 'http' is not an object; expected fields in { }",
    ]),
    ('service { name = "a" weights { passing = "many" } }', [
        "line 1: service.Weights.Passing: 'many' is not a whole number; expected a whole number from 0 to 65535",
    ]),
    ("", [
        'no service definition; expected one such as `service { name = "web" port = 80 }`',
    ]),
    # sidecars and proxies
    (WEB + "  connect { sidecar_service { port = 80 } }\n}", [
        "line 4: service.Connect.SidecarService.Port: 80 is the service's own port; expected another port",
    ]),
    (WEB + '  connect { sidecar_service { id = "x" } }\n}', [
        "line 4: service.Connect.SidecarService.ID: is not supported: it follows from the service's ID; expected it left out",
    ]),
    (WEB + "  connect { native = true }\n}", [
        "line 4: service.Connect.Native: is not supported: tidegate's meshed workloads have a sidecar; expected it left out",
    ]),
    (WEB + "  connect { sidecar { } }\n}", [
        "line 4: service.Connect.sidecar: is not a field here; expected SidecarService",
    ]),
    (WEB + '  connect {\n    sidecar_service {\n      proxy {\n        mutual_tls_mode = "loose"\n      }\n    }\n  }\n}', [
        'line 7: service.Connect.SidecarService.Proxy.MutualTLSMode: Invalid MutualTLSMode "loose". Must be one of "", "strict", or "permissive".',
    ]),
    (WEB + '  connect { sidecar_service { proxy { mode = "direct" } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy.Mode: 'direct' is not supported: tidegate redirects the traffic of every meshed workload; expected transparent",
    ]),
    (WEB + "  connect { sidecar_service { proxy { transparent_proxy { outbound_listener_port = 70000 } } } }\n}", [
        "line 4: service.Connect.SidecarService.Proxy.TransparentProxy.OutboundListenerPort: 70000 is out of range; expected a whole number from 0 to 65535",
    ]),
    (WEB + '  connect { sidecar_service { proxy { local_service_address = "localhost" } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy.LocalServiceAddress: 'localhost' is not an address; expected such as 10.1.2.3 or fd00::1",
    ]),
    (WEB + '  connect { sidecar_service { proxy { local_service_socket_path = "/run/x" } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy.LocalServiceSocketPath: is not supported: only TCP can be redirected, no unix socket; expected it left out",
    ]),
    (WEB + '  connect { sidecar_service { proxy { destination_service_name = "db" } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy: names a destination, which is the service itself; expected the proxy without it",
    ]),
    (WEB + "  connect { sidecar_service { proxy { upstreams = [{ local_bind_port = 9191 }] } } }\n}", [
        "line 4: service.Connect.SidecarService.Proxy.Upstreams[0].DestinationName: is missing; expected a service name",
    ]),
    (WEB + '  connect { sidecar_service { proxy { upstreams = [{ destination_name = "*" }] } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy.Upstreams[0].DestinationName: '*' is not a service name; expected 1 to 63 of a-z, 0-9 and -, with no - at the start or end",
    ]),
    (WEB + '  connect { sidecar_service { proxy { upstreams = [{ destination_name = "db" destination_type = "prepared_query" }] } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy.Upstreams[0].DestinationType: 'prepared_query' is not known here; expected service",
    ]),
    (WEB + '  connect { sidecar_service { proxy { upstreams = [{ destination_name = "db" destination_peer = "x" }] } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy.Upstreams[0].DestinationPeer: is not supported: tidegate knows no other clusters; expected it left out",
    ]),
    (WEB + '  connect { sidecar_service { proxy { upstreams = [\n    { destination_name = "db" },\n    { destination_name = "db" }\n  ] } } }\n}', [
        "line 6: service.Connect.SidecarService.Proxy.Upstreams[1].DestinationName: db is there twice; expected each upstream once",
    ]),
    (WEB + '  connect { sidecar_service { proxy { upstreams = [\n    { destination_name = "db" local_bind_port = 9191 },\n    { destination_name = "pay" local_bind_port = 9191 }\n  ] } } }\n}', [
        "line 6: service.Connect.SidecarService.Proxy.Upstreams[1].LocalBindPort: 9191 is there twice; expected a port for each upstream",
    ]),
    (WEB + "  connect { sidecar_service { proxy { expose { checks = true } } } }\n}", [
        "line 4: service.Connect.SidecarService.Proxy.Expose.Checks: is not supported: tidegate opens no listeners for checks; its annotation direct-probes lets probes through; expected it left out",
    ]),
    (WEB + '  connect { sidecar_service { proxy { config { envoy_local_cluster_json = "{}" } } } }\n}', [
        "line 4: service.Connect.SidecarService.Proxy.Config.envoy_local_cluster_json: is not supported: tidegate writes the sidecar's configuration whole; expected it left out",
    ]),
    (WEB + '  proxy { destination_service_name = "web" }\n}', [
        'line 4: service.Proxy: is the place of a proxy\'s own registration; expected Kind "connect-proxy", or connect { sidecar_service { proxy { } } }',
    ]),
    ('service { kind = "connect-proxy" name = "p" port = 20000 }', [
        "line 1: service.Proxy.DestinationServiceName: is missing; expected the service that it is for",
    ]),
    ('service { kind = "connect-proxy" name = "p" proxy { destination_service_name = "web" } }', [
        "line 1: service.Port: is missing; expected the port of its public listener",
    ]),
    ('service { kind = "connect-proxy" name = "p" port = 20000 proxy { destination_service_name = "web" } connect { sidecar_service {} } }', [
        "line 1: service.Connect: a proxy has no sidecar; expected the registration without it",
    ]),
    ('service { kind = "connect-proxy" name = "p" port = 20000 proxy { destination_service_nam = "web" } }', [
        "line 1: service.Proxy.destination_service_nam: is not a field here; expected DestinationServiceName",
    ]),
]
# fmt: on


def said_of(parse, text):
    with pytest.raises(InputError) as caught:
        parse(text, "f")
    error = caught.value
    faults = error.faults if isinstance(error, InputErrors) else (error,)
    return [str(fault) for fault in faults]


def same(said, expected):
    return said.startswith(expected) if expected.endswith("one of ") else said == expected


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [(parse_entries, *case) for case in ENTRIES] + [(parse_services, *case) for case in SERVICES],
    ids=range(len(ENTRIES) + len(SERVICES)),
)
def test_each_fault_is_told_in_one_sentence_with_its_line(parse, text, expected):
    said = said_of(parse, text)
    assert len(said) == len(expected), said
    for one, wanted in zip(said, expected, strict=True):
        assert same(one, f"f: {wanted}"), one
        assert one.isprintable()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'Kind = "mesh"\nMeta { a = "\xff" }', "byte 26 is not UTF-8; expected UTF-8 text"),
        (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8; expected UTF-8 text"),
        (b"\x00" * 100, "line 1, column 1: the character '\\x00'"),
        (b'Kind = "mesh"\n' * 750_000, "is too large; expected at most 524288 characters"),
        (
            b'{"a": "' + b"x" * (10 << 20) + b'"}',
            "is too large; expected at most 524288 characters",
        ),
        (b"a: [" * (10 << 18), "is too large; expected at most 524288 characters"),
        ('Kind = "\U0001f300"'.encode(), "invalid config entry kind: '\U0001f300'"),
    ],
    ids=["one-byte", "utf-16", "zeros", "10-mb-hcl", "10-mb-json", "10-mb-yaml", "emoji"],
)
def test_a_file_that_is_no_text_of_reasonable_size_is_refused_in_one_line(
    content, expected, tmp_path, capsys
):
    file = tmp_path / "bad"
    file.write_bytes(content)
    assert main(["config", "validate", str(file)]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"tidegate: {file}: ")
    assert expected in line
    assert printed.out == ""


WRITING = st.text(
    st.sampled_from(list("{}[]\":,=-#&*!|>%@'<\\/ \n\tkind0.e1\x00\x85\u2028é\ud800")), max_size=40
)
BEGINNINGS = (
    "",
    "{",
    "[",
    "kind: mesh\n",
    'Kind = "mesh"\n',
    '{"Kind": "mesh", ',
    "- ",
    "service {\n",
)


@given(st.sampled_from(BEGINNINGS), WRITING)
def test_any_text_is_read_or_refused_in_printable_lines(beginning, rest):
    for parse in (parse_entries, parse_services):
        said = ""
        try:
            parse(beginning + rest, "f")
        except InputError as error:
            said = str(error)
        assert all(line.isprintable() for line in said.split("\n"))
