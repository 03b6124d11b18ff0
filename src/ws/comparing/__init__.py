"""Methods on equal terms: which are compared, what they may choose, and the tables, page and picture."""
