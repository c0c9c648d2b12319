"""Who had which address when, for a catalog that does not say: Consul's knows only who is there now. Pure.

The embedded store keeps the same in its file (`store.py`); here it is kept by whoever asks, from what was answered.
"""

from collections.abc import Iterable

import msgspec

from tidegate.model import Instance

DEPARTED_KEPT_S = 7 * 86400.0
"""How long a catalog remembers who had an address."""

DEPARTED_KEPT = 4096
"""How many that are gone it remembers at most; the longest gone are forgotten first."""


class History:
    """Instances as they were seen, one after the other. Times are seconds since the epoch."""

    def __init__(self, known: Iterable[Instance] = ()) -> None:
        """`known` are the living and departed that a former history returned."""
        self._living: dict[tuple[str, str], Instance] = {}
        self._departed: list[Instance] = []
        for instance in known:
            if instance.seen_until:
                self._departed.append(instance)
            else:
                self._living[instance.node, instance.id] = instance

    def update(self, present: Iterable[Instance], now: float) -> tuple[Instance, ...]:
        """Takes in who is there now; all that are and were there, with their times."""
        living: dict[tuple[str, str], Instance] = {}
        for instance in present:
            key = (instance.node, instance.id)
            before = self._living.get(key)
            if before is not None and before.addresses == instance.addresses:
                since = before.seen_from
            else:
                since = now if before is not None else min(instance.seen_from or now, now)
            living[key] = msgspec.structs.replace(instance, seen_from=since)
        for key, before in self._living.items():
            if key not in living or living[key].addresses != before.addresses:
                ended = msgspec.structs.replace(before, seen_until=max(now, before.seen_from))
                self._departed.append(ended)
        self._living = living
        self._departed = [one for one in self._departed if one.seen_until >= now - DEPARTED_KEPT_S][
            -DEPARTED_KEPT:
        ]
        return (*self._departed, *self._living.values())
