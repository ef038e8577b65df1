"""Tasks of lm-evaluation-harness on every engine."""
