"""The ledger: real processes and real brokers, one thing broken at a time while events flow, and every event counted.

    python -m tests.faults.ledger [--cell NAME] [--broker 3.10|4.0|4.3] [--events N] [--short]

`cells.py` lists what is broken, `faults.py` breaks it, `publisher.py` and `worker.py` are the programs that it happens
to, `books.py` is where they write down what they did, `count.py` turns that into figures, `report.py` prints them.
"""
