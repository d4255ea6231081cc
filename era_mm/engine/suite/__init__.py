"""``suite``: a matrix of methods, pairs and seeds, and its tables.

Read in this order: ``spec`` (the file), ``cells`` (a run of the matrix),
``running``, ``worker`` (the program of a run), ``rows`` (what is kept),
``results`` and ``page`` (what is shown), ``command`` (all of it).
"""
