"""Which models of the hosts' zoos can be distilled: ``docs/zoo.md``."""
