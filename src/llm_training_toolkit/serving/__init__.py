"""OpenAI-compatible HTTP server for one model: requests, queue, answers and a page; knows nothing of Ray."""
