"""What a solve and its gradient cost, against their limit and against other packages.

`python -m benchmarks` measures and writes a record; the chapter "Performance" shows it,
and runs a small part of it live.
"""
