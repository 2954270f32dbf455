"""Reading, narrowing and writing checkpoints."""
