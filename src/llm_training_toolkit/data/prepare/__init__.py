"""Preparation of data: documents to packed sequences on disk."""
