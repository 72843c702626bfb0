"""The OpenAI-compatible server on Ray Serve."""
