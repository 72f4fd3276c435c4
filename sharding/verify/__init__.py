"""Plans compiled by the real compiler of their topology, in processes of their own."""
