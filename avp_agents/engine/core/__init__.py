"""One step of the engine, to be read in an hour and in this order.

    sequence.py      one request: what it feeds the model next, and what it makes of the outputs
    prefill.py       a lineage as the runs that are prefilled
    scheduler.py     the thread that owns the model: admit, choose, run, take; round by round
    start.py         where a sequence starts: which of its positions have keys and values already
    kv_pool.py       keys and values of all contexts, in regions of one tensor pair per layer
    forward.py       pieces of several sequences become one forward pass
    model.py         the model, and its one forward call
    attention.py     what each position of that pass sees of the pool
    latent_step.py   f(h): from a last hidden state to the next input embedding
    sampling.py      from logits to a token

Nothing here knows prompts, text, stores, protocols or frameworks. What is off by default stands in `engine/extras/`,
behind `sequence.Extra` and subclasses of `forward.ModelRunner`.
"""
