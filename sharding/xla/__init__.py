"""XLA's compilers: what is compiled for, with which options, and what each compiler does."""
