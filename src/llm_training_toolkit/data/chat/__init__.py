"""Chat conversations: parsing, and rendering to tokens with exact loss masks."""
