"""What should be: config entries and policies of workloads. Parse, validate, resolve. No I/O."""
