"""Why the API server did not say what it was asked."""

import msgspec

from tidegate.errors import TidegateError

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what is expected; the last for what is nested too deeply."""


class ApiError(TidegateError):
    """Nobody can say at the moment: there is no answer, or none that can be used."""


class ApiUnreachable(ApiError):
    """No API server answers, or not in time, or it cannot be asked."""


class ApiRefused(ApiError):
    """The API server answered and said no, or something that is no answer.

    `status` is HTTP's, `reason` the machine-readable word of a Status object, "" without one.
    """

    def __init__(
        self, status: int, reason: str, text: str, *, retry_after_s: float = 0.0, causes: str = ""
    ) -> None:
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s
        """How long the server wants to be left alone, 0 where it does not say."""
        self._causes = causes
        super().__init__(text)

    @property
    def is_nonsense(self) -> bool:
        """Whether the server means well, and nobody understands what it says."""
        return self.status == 200

    @property
    def is_expired(self) -> bool:
        """Whether the server has forgotten the version that was asked for: all has to be listed anew."""
        return self.status == 410 or self.reason in ("Expired", "Gone")

    @property
    def is_ahead(self) -> bool:
        """Whether the version that was asked for is one that the server has not reached, such as after a restore."""
        return "ResourceVersionTooLarge" in self._causes or "Too large resource version" in str(
            self
        )


class ApiTooLarge(ApiRefused):
    """The API server sends more at once than anybody should have to hold."""

    def __init__(self, address: str, limit: int) -> None:
        """`limit` in bytes."""
        text = f"the Kubernetes API server at {address} sends more than {limit} bytes at once"
        super().__init__(200, "", text)
