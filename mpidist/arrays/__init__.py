"""Arrays: their namespaces and dtypes, boxes, flat storage of many, and shards of one."""
