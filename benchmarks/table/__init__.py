"""The table of methods: `python -m benchmarks.table.table.reproduce_table` trains every method and compares them."""
