"""The fair comparison of methods: the methods, their choices on the dev split, and the tables, page and figure."""
