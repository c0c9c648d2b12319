"""Texts that somebody else wrote into a namespace, made fit for a terminal, a log and a status."""

SHOWN = 300
"""Most characters that are repeated of such a text."""


def shown(text: str) -> str:
    """A text of bounded length, without what could do something to a terminal or begin a line of its own."""
    clipped = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in clipped
    )
