"""What a run is said to have done: report.json and its summary in text."""
