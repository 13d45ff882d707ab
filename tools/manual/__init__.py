"""Man pages and shell completion, made from the parsers and from docs/."""
