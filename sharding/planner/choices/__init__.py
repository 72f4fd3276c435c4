"""What the search chooses among, one file a choice.

The choices that make a layout (`space.LAYOUT`) have one signature, `choices(given, draft)`: each takes what
was chosen before it and yields every way on, or why there is none. What layers keep (`remat`), how many parts
the batch is taken in (`microbatches`) and what carries out attention (`attention`) go with any layout.
"""
