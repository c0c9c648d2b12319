"""What `make bench` measures: see docs/bench.md."""
