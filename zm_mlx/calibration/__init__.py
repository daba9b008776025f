"""Tables of rows per KV head: how they are calibrated, what they are, and how they are found again."""
