"""Training loop, without Ray and DeepSpeed."""
