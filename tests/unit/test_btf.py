"""Fields of the kernel's own structures are found where its type information says."""

from pathlib import Path

import pytest

from tidegate.kernel import btf

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/btf/vmlinux").exists(), reason="this kernel has no type information"
)


def test_fields_are_found_at_the_offsets_that_their_standards_give_them() -> None:
    # RFC 9293 3.1, RFC 791 3.1, RFC 8200 3.
    fields = {
        ("tcphdr", "source"): 0,
        ("tcphdr", "dest"): 2,
        # A field of four bits.
        ("tcphdr", "doff"): 12,
        ("tcphdr", "window"): 14,
        # Of structures and unions without a name.
        ("iphdr", "saddr"): 12,
        ("iphdr", "daddr"): 16,
        ("ipv6hdr", "daddr"): 24,
        # Of a structure in a structure.
        ("sockaddr_in", "sin_addr.s_addr"): 4,
    }
    assert btf.offsets_in_kernel(fields) == fields


def test_what_a_kernel_does_not_have_has_no_offset() -> None:
    fields = [("no_such_struct", "a"), ("tcphdr", "no_such_field"), ("tcphdr", "source.inner")]
    assert btf.offsets_in_kernel(fields) == dict.fromkeys(fields)
