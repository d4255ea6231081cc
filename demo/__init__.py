"""What ``make demo`` and ``make demo-classification`` run."""
