"""Data layer: sources, tokenizer, rendering, packing, and the order of batches."""
