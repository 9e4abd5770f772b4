"""The `xca-imaging` command: one module per verb."""
