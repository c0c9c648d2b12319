"""Tracing on demand: each connect and accept of this machine's processes, by a program that bcc compiles when asked.

Nothing of it is resident. `session` starts Debian's Python, which alone can import bcc, on `reader.py`; that compiles
program.c, and prints what it tells as JSON lines. `records` makes one record of each connection from these.
"""
