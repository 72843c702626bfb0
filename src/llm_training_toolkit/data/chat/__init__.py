"""Conversations to tokens with exact loss masks."""
