"""The main job: plan a run, run it, write the artifact."""
