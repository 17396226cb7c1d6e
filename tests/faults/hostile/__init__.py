"""Messages that nobody should send, by the hundred thousand, through a live worker; and a worker with too much to do.

Each message is counted: sent = handled + dead-lettered, byte for byte. `python -m tests.faults.hostile --help`.
"""
