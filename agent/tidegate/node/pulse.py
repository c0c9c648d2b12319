"""Whether the agent lives and is of use, for whoever restarts it: told of each round of the reconcile loop."""

import time

SILENCE_S = 60.0
"""An agent that has not come to the end of a round for so long will not by itself."""


class Pulse:
    """Answers with a sentence, empty when all is well. For the thread of the event loop."""

    def __init__(self) -> None:
        self._beaten_at = time.monotonic()
        self._was_whole = False

    def beat(self, *, whole: bool) -> None:
        """A round has ended; `whole` unless it was broken off by an error.

        An agent whose rounds fail lives: a full disk does not become emptier by starting it again.
        """
        self._beaten_at = time.monotonic()
        self._was_whole = self._was_whole or whole

    def unwell(self) -> str:
        """Why the agent should be started again."""
        silent = time.monotonic() - self._beaten_at
        return f"no round has ended for {silent:.0f} s" if silent > SILENCE_S else ""

    def unready(self) -> str:
        """Why nothing should count on the agent yet."""
        return self.unwell() or ("" if self._was_whole else "no round has been completed yet")
