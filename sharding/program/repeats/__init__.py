"""Layers that are written out one after another, found in a traced program and run as a scan."""
