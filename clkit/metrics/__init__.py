"""What was measured: the history of a run, the metrics on it, and the files that hold both; no model is needed."""
