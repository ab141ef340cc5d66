"""kdlib: knowledge distillation of language models, seen term by term.

Read the modules in this order: signals, schedulers, losses, objective, trainer, compare; the rest serves
them.
"""

__version__ = "0.1.0"
