"""The built-in corpora, one file each: source, columns, examples."""
