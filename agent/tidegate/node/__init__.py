"""The daemon of one node: puts intent, enforcement and observation together."""
