"""Pictures that the tools write."""
