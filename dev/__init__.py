"""Scripts of the maintainers; no user needs one."""
