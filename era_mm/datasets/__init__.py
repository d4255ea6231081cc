"""Data sets that the project makes itself, so that nothing is downloaded."""
