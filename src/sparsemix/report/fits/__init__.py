"""Fits of losses over sizes and budgets, with intervals (docs/fits.md). numpy and scipy only."""
