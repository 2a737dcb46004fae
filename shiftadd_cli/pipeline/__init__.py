"""The main pipeline: plan a run, run it, write the artifact."""
