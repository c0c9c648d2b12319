"""Runs tests under another kernel than this machine's: `python -m tests.vm [--limit SECONDS] [pytest arguments]`.

The kernel is Debian 12's 6.1, which has neither tcx nor netkit. Its exit status is pytest's.
"""

import argparse
import sys

from tests.vm import image, machine

META_PACKAGE = "linux-image-cloud-amd64"
LIMIT_S = 1200
_LIVE = "tests/kernel/test_classifier_live.py"
_PINS = "tests/kernel/test_pins.py"
_REDIRECT = "tests/kernel/test_redirect_backends.py::TestBothFamilies"
TESTS = (
    # The programs load, and packets have the classes that they should.
    "tests/kernel/test_classifier_streams.py",
    "tests/kernel/test_classifier_dialogues.py::test_a_label_of_a_suffix_can_stand_for_any_one_label",
    "tests/kernel/test_fuzz_cases.py",
    # They are attached with clsact, as there is no tcx, and see real clients, OpenSSL among them.
    f"{_LIVE}::test_calls_to_a_pod_are_classified_on_either_side_of_its_interface",
    f"{_LIVE}::test_openssl_s_client_is_seen_as_what_it_is_told_to_be",
    # With clsact they are upgraded, found again, and taken off. Those programs are small ones.
    f"{_PINS}::test_an_upgrade_replaces_every_program_and_goes_on_observing[By.CLSACT]",
    f"{_PINS}::test_no_connection_is_missed_while_programs_are_replaced[By.CLSACT]",
    f"{_PINS}::test_a_kernel_without_links_is_given_filters",
    f"{_PINS}::test_another_filter_beside_filters_keeps_its_verdict_and_hides_nothing",
    f"{_PINS}::test_a_returning_agent_finds_links_and_filters_again[By.CLSACT]",
    f"{_PINS}::test_what_a_killed_private_classifier_left_goes_with_the_next_start[By.CLSACT]",
    f"{_PINS}::test_what_the_verifier_rejects_is_one_line_with_reason_instruction_and_source",
    f"{_PINS}::test_a_header_before_ip_is_where_an_interface_has_one",
    # They report the names in hellos.
    "tests/kernel/test_observe.py::test_every_connection_is_told_with_its_names_and_its_bytes",
    # What is traced, by a program that is compiled there.
    "tests/kernel/test_trace.py::test_what_is_redirected_is_told_with_what_was_dialled_and_where_it_went",
    "tests/kernel/test_trace.py::test_connections_of_io_uring_are_told_the_accepting_end_by_who_reads",
    # Redirection.
    "tests/kernel/test_nftables.py",
    *(
        f"{_REDIRECT}::{test}[nftables-{version}]"
        for test in (
            "test_outbound_goes_to_the_sidecar_which_learns_what_was_dialled",
            "test_inbound_goes_to_the_sidecar_which_learns_what_was_dialled",
            "test_one_source_port_may_be_used_towards_several_redirected_ports",
        )
        for version in (4, 6)
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds (%(default)s)")
    parser.add_argument(
        "--command", action="store_true", help="what follows is a command, not for pytest"
    )
    parser.add_argument(
        "--compilers", action="store_true", help="with clang, bcc and their headers"
    )
    chosen, arguments = parser.parse_known_args()
    command = arguments or list(TESTS)
    if not chosen.command:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *command]
    try:
        compilers = chosen.compilers or not arguments
        return machine.run(image.kernel(META_PACKAGE), command, chosen.limit, compilers=compilers)
    except machine.MachineFailed as failure:
        print(f"the virtual machine {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
