"""What the search chooses among, one file a choice."""
