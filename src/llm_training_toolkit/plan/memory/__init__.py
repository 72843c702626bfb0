"""Memory of devices and hosts by part, and the settings that fit."""
