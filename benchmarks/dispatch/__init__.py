"""From recorded times to `auto`'s table."""
