"""One file per question; each prints a table, then one JSON line."""
