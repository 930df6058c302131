"""The `iapo/*` metrics (`training`, `validation`) and where they go (`file`, `console`); see docs/metrics.md."""
