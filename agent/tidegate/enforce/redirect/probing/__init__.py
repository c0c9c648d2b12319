"""The parts of `verify`: where probes are made, sending them, judging them, and which there are."""
