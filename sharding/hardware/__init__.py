"""Chips, topologies, the links between devices, meshes and their axes."""
