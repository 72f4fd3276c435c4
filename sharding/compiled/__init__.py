"""What the compiler made of a program: its instructions, its collectives, the lines they came from."""
