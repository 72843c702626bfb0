"""Documents to batches: sources, tokenizer, rendering, packing and the order of the data."""
