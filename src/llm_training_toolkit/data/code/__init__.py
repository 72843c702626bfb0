"""Code and text to tokens: chunks, fill-in-the-middle, repositories."""
