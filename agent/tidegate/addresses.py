"""Addresses as people and programs read them, the same everywhere. Pure."""


def endpoint(address: str, port: int) -> str:
    """An address and a port as they are written together: 10.1.2.3:443, [fd00::1]:443."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
