"""Signals, divergences, the objective and the ledger: from what two models say to what a step costs."""
