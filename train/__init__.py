"""Stage two: a feature store and a corpus become a small student. `python -m train run --help`."""
