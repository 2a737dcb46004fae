"""Reports about runs: report.json, its HTML page and the model card."""
