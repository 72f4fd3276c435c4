"""Attention whose sequence lies over a mesh axis: what moves between devices, and each device's own part."""
