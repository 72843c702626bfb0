"""Rendering of code and text: chunking, fill-in-the-middle (FIM), repository format."""
