"""Encoders and run checkpoints on disk: safe to read, self-describing, written atomically."""
