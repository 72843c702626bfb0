"""What runs between the toolkit and a contained program: a process that imports the standard library alone.

It starts the program, limits its time and outlives everything the program started.
"""
