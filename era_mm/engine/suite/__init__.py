"""``suite``: a matrix of methods, pairs and seeds, and its tables.

Read in this order: ``spec`` (the file), ``cells`` (a run of the matrix),
``running``, ``worker`` (the process of a run), ``rows`` (the records),
``results`` and ``page`` (the tables), ``command`` (everything together).
"""
