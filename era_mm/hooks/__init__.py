"""Hooks that several methods share."""
