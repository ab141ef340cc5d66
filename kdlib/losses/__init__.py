"""Signals, divergences, the objective and the ledger: from what two models say to what a step costs.

Read in this order, then features; chunked and buffers make the same numbers in less memory.
"""
