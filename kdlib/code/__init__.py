"""Programs that a model wrote: problems, the fence they run in, and what becomes of them."""
