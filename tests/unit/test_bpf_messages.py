"""What a person is told of a program that the verifier rejects, out of libbpf's output."""

import pytest

from tidegate.kernel.libbpf import verifier_message

BEGIN = "libbpf: prog 'from_pod': -- BEGIN PROG LOAD LOG --\n"
END = "-- END PROG LOAD LOG --\nlibbpf: prog 'from_pod': failed to load: -13\n"
DONE = "processed 5 insns (limit 1000000) max_states_per_insn 0 total_states 0\n"
LOGS = {
    "with everything": (
        "0: R1=ctx() R10=fp0\n"
        "; return *end; @ wrong.bpf.c:7\n"
        "0: (61) r1 = *(u32 *)(r1 +76)        ; R1=pkt(r=0)\n"
        "1: (61) r0 = *(u32 *)(r1 +0)\n"
        "invalid access to packet, off=0 size=4, R1(id=0,off=0,r=0)\n" + DONE,
        "the verifier rejects from_pod: invalid access to packet, off=0 size=4, R1(id=0,off=0,r=0); "
        "at instruction 1: (61) r0 = *(u32 *)(r1 +0); source: return *end; @ wrong.bpf.c:7",
    ),
    "of a kernel that does not say the line's number": (
        "; return *end;\n1: (61) r0 = *(u32 *)(r1 +0)          ; R0_w=scalar()\nR1 is no pointer\n"
        + DONE,
        "the verifier rejects from_pod: R1 is no pointer; at instruction 1: (61) r0 = *(u32 *)(r1 +0); "
        "source: return *end;",
    ),
    "that ends in states": (
        "; while (i) @ wrong.bpf.c:7\n7: (56) if w1 != 0x7 goto pc-2\n;  @ wrong.bpf.c:0\n"
        "infinite loop detected at insn 8\ncur state: R1=ctx()\nold state: R1=ctx()\n" + DONE,
        "the verifier rejects from_pod: infinite loop detected at insn 8; "
        "at instruction 7: (56) if w1 != 0x7 goto pc-2; source: while (i) @ wrong.bpf.c:7",
    ),
    "without instructions": (
        "combined stack size of 4 calls is 544. Too large\nverification time 9 usec\nstack depth 8+0\n"
        + DONE,
        "the verifier rejects from_pod: combined stack size of 4 calls is 544. Too large",
    ),
    "without a reason": (DONE, ""),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_log_becomes_one_line(name: str) -> None:
    log, message = LOGS[name]
    assert verifier_message(BEGIN + log + END) == message


def test_output_without_a_log_says_nothing() -> None:
    assert verifier_message("libbpf: failed to find BTF\n") == ""
