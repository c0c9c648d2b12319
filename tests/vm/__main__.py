"""Runs tests under another kernel than this machine's: `python -m tests.vm [--limit SECONDS] [pytest arguments]`.

The kernel is Debian 12's 6.1, which has neither tcx nor netkit. Its exit status is pytest's.
"""

import argparse
import sys

from tests.vm import image, machine

META_PACKAGE = "linux-image-cloud-amd64"
LIMIT_S = 1200
_LIVE = "tests/kernel/test_classifier_live.py"
_REDIRECT = "tests/kernel/test_redirect_nftables.py::TestBothFamilies"
TESTS = (
    # The programs load, and packets have the classes that they should.
    "tests/kernel/test_classifier_streams.py",
    # They are attached with clsact, as there is no tcx, and see real clients, OpenSSL among them.
    f"{_LIVE}::test_calls_to_a_pod_are_classified_on_either_side_of_its_interface",
    f"{_LIVE}::test_openssl_s_client_is_seen_as_what_it_is_told_to_be",
    # Redirection.
    "tests/kernel/test_nftables.py",
    f"{_REDIRECT}::test_outbound_goes_to_the_sidecar_which_learns_what_was_dialled",
    f"{_REDIRECT}::test_inbound_goes_to_the_sidecar_which_learns_what_was_dialled",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds (%(default)s)")
    parser.add_argument(
        "--command", action="store_true", help="what follows is a command, not for pytest"
    )
    parser.add_argument("--compilers", action="store_true", help="with clang and its headers")
    chosen, arguments = parser.parse_known_args()
    command = arguments or list(TESTS)
    if not chosen.command:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *command]
    try:
        return machine.run(
            image.kernel(META_PACKAGE), command, chosen.limit, compilers=chosen.compilers
        )
    except machine.MachineFailed as failure:
        print(f"the virtual machine {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
