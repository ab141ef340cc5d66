"""kdlib: knowledge distillation of language models, seen term by term.  Begin with kdlib/losses."""

__version__ = "0.1.0"
