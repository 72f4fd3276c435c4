"""A batch worked through in parts: with the whole batch's values, by proof, or as the mean of its parts."""
