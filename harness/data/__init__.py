"""Data: sources, prompt templates, tokenisation, collation, and the rows that statistics are taken from."""
