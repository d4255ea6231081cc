"""Data sets that are generated, so that nothing is downloaded."""
