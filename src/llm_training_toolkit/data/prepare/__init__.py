"""Preparation: documents to packed sequences on disk."""
