"""The corpora that fedloom knows by name, one page each: source, columns, examples."""
