"""Programs that nobody has read: run contained, limited in all they can use, and ended whatever they do."""
