"""StarCoder's document layouts: commits, issues and notebooks as texts behind special tokens."""
