"""bpf/consts.h and bpf/structs.h, as the compiler sees them, against their transcription in Python."""

import ctypes
import enum
import shutil
import subprocess
from pathlib import Path

import pytest

from tidegate.observe import abi

HEADERS = Path(__file__).parents[2] / "bpf"
STRUCTS = {
    "tg_interface": abi.Interface,
    "tg_attachment": abi.Attachment,
    "tg_flow_key": abi.FlowKey,
    "tg_flow_seed": abi.FlowSeed,
    "tg_flow": abi.Flow,
    "tg_edge_key": abi.EdgeKey,
    "tg_edge": abi.Edge,
    "tg_text": abi.Text,
    "tg_profile": abi.Profile,
    "tg_hello_chunk": abi.HelloChunk,
}
ENUMS: dict[str, type[enum.IntEnum] | type[enum.IntFlag]] = {
    "TG_": abi.Class,
    "TG_FLOW_": abi.FlowFlag,
    "TG_VERDICT_": abi.Verdict,
    "TG_HINT_": abi.Hint,
    "TG_PLACE_": abi.Place,
    "TG_EDGE_": abi.EdgeState,
    "TG_TURN_": abi.Turn,
}
NUMBERS = {
    "TG_FLOW_KEY_WORDS": abi.FLOW_KEY_WORDS,
    "TG_EDGES_MAX": abi.EDGES_MAX,
    "TG_SERVICE_PORTS": abi.SERVICE_PORTS,
    "TG_PROXY_PORTS": abi.PROXY_PORTS,
    "TG_NAMES": abi.NAMES,
    "TG_TEXT_BYTES": abi.TEXT_BYTES,
    "TG_PREFIX_BYTES": abi.PREFIX_BYTES,
    "TG_TURN_BYTES": abi.TURN_BYTES,
    "TG_HINT_BYTES": abi.HINT_BYTES,
    "TG_HELLOS_BYTES": abi.HELLOS_BYTES,
    "TG_CLASSES": len(abi.Class),
    "TG_COUNTERS": len(abi.Counter),
    "TG_COUNTER_LOSSES": abi.COUNTER_LOSSES,
    **{
        f"TG_{member.name}": member
        for member in (*abi.Direction, *abi.Role, *abi.Tally, *abi.Counter, *abi.Looking)
    },
    **{prefix + member.name: member for prefix, kind in ENUMS.items() for member in kind},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Every number asked for, by its C expression, as a compiled program prints it."""
    compiler = shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    expressions = list(NUMBERS)
    for name, structure in STRUCTS.items():
        expressions.append(f"sizeof(struct {name})")
        for field in structure._fields_:
            expressions.append(f"offsetof(struct {name}, {field[0]})")
            expressions.append(f"sizeof(((struct {name} *)0)->{field[0]})")
    directory = tmp_path_factory.mktemp("layout")
    source = directory / "layout.c"
    lines = [f'printf("%s=%lld\\n", "{text}", (long long)({text}));' for text in expressions]
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "structs.h"\n'
        "int main(void)\n{\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    program = directory / "layout"
    subprocess.run([compiler, "-I", HEADERS, "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {
        name: int(value)
        for name, _, value in (line.rpartition("=") for line in printed.split("\n")[:-1])
    }


def test_every_number_is_the_headers_number(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in NUMBERS} == {
        name: int(value) for name, value in NUMBERS.items()
    }


@pytest.mark.parametrize("name", STRUCTS)
def test_every_struct_has_the_compilers_layout(name: str, compiled: dict[str, int]) -> None:
    structure: type[ctypes.Structure] = STRUCTS[name]
    assert ctypes.sizeof(structure) == compiled[f"sizeof(struct {name})"]
    for field in structure._fields_:
        described = getattr(structure, field[0])
        assert described.offset == compiled[f"offsetof(struct {name}, {field[0]})"], field[0]
        assert described.size == compiled[f"sizeof(((struct {name} *)0)->{field[0]})"], field[0]


@pytest.mark.parametrize("name", STRUCTS)
def test_no_struct_has_hidden_padding(name: str) -> None:
    structure = STRUCTS[name]
    named = sum(getattr(structure, field[0]).size for field in structure._fields_)
    assert named == ctypes.sizeof(structure)
