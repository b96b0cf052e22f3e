"""The latent engine: one scheduler thread, one preallocated KV pool and the latent step around transformers' models."""
