"""Reference models: plain functions of parameters and batch, with Flax NNX modules behind them."""
