"""A compiled program's text, read: instructions, shapes, loops, groups of devices, source lines."""
