"""Supervisor process between the toolkit and a sandboxed program. Imports the standard library only.

Starts the program, enforces its timeout and outlives all of the program's descendants.
"""
