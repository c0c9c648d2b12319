"""What the kernel refused, told to a person.

The doors in this package know nothing of the rest of tidegate; their failures all are KernelErrors. The
parts above turn one into a message of their own where they know better what it means.
"""


class KernelError(Exception):
    """The kernel, or a library that speaks to it, refused something.

    The message is one sentence: what was tried, on what, and why it failed. `errno` is the kernel's
    number, or 0 where the failure has none.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        self.errno = errno
        super().__init__(message)
